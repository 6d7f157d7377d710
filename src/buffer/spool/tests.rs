//! A spool on a real directory keeps the contract, bounds its disk, and says whose it is.

use std::path::PathBuf;
use std::time::Duration;

use super::power_tests::identity;
use super::{Error, Opened, Options, Spool, SpoolFeed, SpoolSink, cost, remove};
use crate::buffer::{Ends, Make, MakeDurable, contract};
use crate::change::{Feed, Item, Sink};
use crate::lsn::Lsn;

/// A directory of this test's own, gone with it.
struct Dir(PathBuf);

impl Dir {
    fn new() -> Dir {
        let name = format!("walferry-spool-{}-{:x}", std::process::id(), fastrand::u64(..));
        Dir(std::env::temp_dir().join(name))
    }

    fn options(&self, limit_bytes: u64, segment_bytes: u64) -> Options {
        Options { segment_bytes, ..Options::new(&self.0, identity(), limit_bytes) }
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A spool behaves as a queue where its owner releases what was read, and closes it when the reader
/// goes.
struct Attached {
    feed: SpoolFeed,
    spool: Spool,
    _dir: Dir,
}

impl Attached {
    fn note(&self, item: Option<Item>) -> Option<Item> {
        if let Some(end_lsn) = item.as_ref().and_then(Item::end_lsn) {
            self.spool.release(end_lsn);
        }
        item
    }
}

impl Feed for Attached {
    async fn pop(&mut self) -> Option<Item> {
        let item = self.feed.pop().await;
        self.note(item)
    }

    fn try_pop(&mut self) -> Option<Item> {
        let item = self.feed.try_pop();
        self.note(item)
    }
}

struct Disk;

impl Make for Disk {
    type Sink = SpoolSink;
    type Feed = Attached;

    fn make(&self, limit_bytes: usize) -> Ends<SpoolSink, Attached> {
        let dir = Dir::new();
        // Each item a segment, so that room is made item by item.
        let spool = Spool::open(&dir.options(limit_bytes as u64, 1)).unwrap();
        let (sink, feed) = (spool.sink(), spool.feed(Lsn::ZERO).unwrap());
        (sink, Attached { feed, spool, _dir: dir })
    }

    fn bytes(&self, outlet: &Attached) -> usize {
        outlet.spool.bytes() as usize
    }

    fn cost(&self, item: &Item) -> usize {
        cost(item)
    }
}

impl MakeDurable for Disk {
    type Place = Dir;
    type Buffer = Spool;
    type Sink = SpoolSink;
    type Feed = SpoolFeed;

    fn place(&self) -> Dir {
        Dir::new()
    }

    /// The thread that read for the feed before, or a child that another test is just starting,
    /// may hold the lock for a moment longer.
    fn open(&self, place: &Dir) -> Spool {
        let options = place.options(1 << 30, 4096);
        for _ in 0..200 {
            match Spool::open(&options) {
                Err(Error::InUse { .. }) => std::thread::sleep(Duration::from_millis(10)),
                opened => return opened.unwrap(),
            }
        }
        panic!("{} is in use for two seconds", place.0.display());
    }

    fn sink(&self, spool: &Spool) -> SpoolSink {
        spool.sink()
    }

    fn feed(&self, spool: &Spool, from_lsn: Lsn) -> SpoolFeed {
        spool.feed(from_lsn).unwrap()
    }

    fn durable(&self, spool: &Spool) -> tokio::sync::watch::Receiver<Lsn> {
        spool.durable()
    }

    fn release(&self, spool: &Spool, lsn: Lsn) {
        spool.release(lsn);
    }

    async fn close(&self, spool: Spool) {
        tokio::task::spawn_blocking(|| spool.close()).await.unwrap();
    }
}

#[tokio::test]
async fn the_spool_keeps_the_contract() {
    contract::check(&Disk).await.unwrap();
    contract::check_durable(&Disk).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_spool_keeps_the_contract_across_threads() {
    contract::check(&Disk).await.unwrap();
    contract::check_durable(&Disk).await.unwrap();
}

async fn push(sink: &mut SpoolSink, numbers: std::ops::RangeInclusive<u64>) {
    for number in numbers {
        sink.push(contract::item(number, 100)).await.unwrap();
    }
}

async fn durable(spool: &Spool, number: u64) {
    durable_within(spool, number, Duration::from_secs(10)).await;
}

async fn durable_within(spool: &Spool, number: u64, limit: Duration) {
    let mut durable = spool.durable();
    let waiting = durable.wait_for(|lsn| lsn.0 > number * 2);
    tokio::time::timeout(limit, waiting).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_spool_that_is_lost_below_what_the_slot_was_told_is_refused() {
    let dir = Dir::new();
    let options = dir.options(1 << 20, 2000);
    let Opened::Open(spool) = Spool::open_at(&options, Lsn(1), Lsn(1)).unwrap() else { panic!() };
    let mut sink = spool.sink();
    push(&mut sink, 1..=50).await;
    durable(&spool, 50).await;
    drop(sink);
    spool.close();
    // It reaches to 101: what the slot was told must be in it.
    let lost = |progress: u64, confirmed: u64| match Spool::open_at(
        &options,
        Lsn(progress),
        Lsn(confirmed),
    )
    .unwrap()
    {
        Opened::Lost(held) => held.is_some_and(|held| held.end_lsn > Lsn(100)),
        Opened::Open(spool) => {
            spool.close();
            false
        }
    };
    assert!(!lost(1, 101) && !lost(40, 60) && !lost(101, 101));
    assert!(lost(1, 102) && lost(101, 103));
    // A target that got ahead leaves a gap, which is no loss, and is remembered.
    let Opened::Open(spool) = Spool::open_at(&options, Lsn(201), Lsn(1)).unwrap() else { panic!() };
    let mut sink = spool.sink();
    push(&mut sink, 110..=120).await;
    durable(&spool, 120).await;
    drop(sink);
    spool.close();
    assert!(!lost(201, 241) && !lost(230, 241));
    assert!(lost(150, 241), "150 to 201 is nowhere");
    // Gone altogether.
    assert!(remove(&dir.0).unwrap());
    let opened = Spool::open_at(&options, Lsn(201), Lsn(241)).unwrap();
    assert!(matches!(opened, Opened::Lost(None)));
    assert!(matches!(Spool::open_at(&options, Lsn(201), Lsn(201)).unwrap(), Opened::Open(_)));
}

#[tokio::test]
async fn another_streams_spool_and_one_in_use_are_refused() {
    let dir = Dir::new();
    let options = dir.options(1 << 20, 2000);
    let spool = Spool::open(&options).unwrap();
    assert!(matches!(Spool::open(&options), Err(Error::InUse { .. })));
    assert!(matches!(remove(&dir.0), Err(Error::InUse { .. })));
    let mut sink = spool.sink();
    push(&mut sink, 1..=3).await;
    spool.close();
    for change in 0..4 {
        let mut other = options.clone();
        let (what, identity) = ("other".to_string(), &mut other.identity);
        match change {
            0 => identity.job = what,
            1 => identity.slot = what,
            2 => identity.system = what,
            _ => identity.made_lsn = Lsn(77),
        }
        let Err(error) = Spool::open(&other) else { panic!("{change}") };
        assert!(matches!(error, Error::Foreign { .. }), "{error}");
        assert!(error.to_string().contains("rm -r"), "{error}");
    }
}

#[tokio::test]
async fn a_transaction_larger_than_the_limit_passes_once_all_before_it_was_read() {
    let dir = Dir::new();
    let spool = Spool::open(&dir.options(20_000, 2000)).unwrap();
    let (mut sink, mut feed) = (spool.sink(), spool.feed(Lsn::ZERO).unwrap());
    let writing = tokio::spawn(async move {
        push(&mut sink, 1..=3).await;
        for number in 0..100 {
            let Item::Chunk(mut chunk) = contract::item(9, 400) else { panic!() };
            chunk.number = number;
            chunk.commit = chunk.commit.filter(|_| number == 99);
            sink.push(Item::Chunk(chunk)).await.unwrap();
        }
        sink
    });
    let mut chunks = 0;
    while chunks < 103 {
        let popped = tokio::time::timeout(Duration::from_secs(10), feed.pop()).await;
        assert!(popped.expect("it is stuck").is_some());
        chunks += 1;
    }
    let mut sink = writing.await.unwrap();
    assert!(spool.bytes() > 20_000);
    // Its segments end inside of it, and go all the same: the next one finds room.
    spool.release(spool.end_lsn());
    let pushed = tokio::time::timeout(Duration::from_secs(10), push(&mut sink, 11..=13)).await;
    pushed.expect("what the target has keeps its room");
    drop(sink);
    spool.close();
}

/// A file system of a few megabytes, unmounted with this; `None` where we may not mount one.
struct Small(Dir);

impl Small {
    fn new(megabytes: u32) -> Option<Small> {
        let dir = Dir::new();
        std::fs::create_dir_all(&dir.0).unwrap();
        let size = format!("size={megabytes}m");
        let mount = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", &size, "none"])
            .arg(&dir.0)
            .status();
        mount.is_ok_and(|status| status.success()).then_some(Small(dir))
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg(&self.0.0).status();
    }
}

/// ENOSPC from a real file system: in the middle of an append, and at the making of a segment.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_a_full_disk_the_spool_waits_for_what_is_released_and_loses_nothing() {
    let Some(small) = Small::new(3) else {
        println!("not shown: mounting a tmpfs takes root");
        return;
    };
    let spool = Spool::open(&small.0.options(1 << 30, 300_000)).unwrap();
    let mut sink = spool.sink();
    let writing = tokio::spawn(async move {
        for number in 1..=12 {
            sink.push(large(number * 100)).await.unwrap();
            push(&mut sink, number * 100 + 1..=number * 100 + 20).await;
        }
        sink
    });
    let begun = std::time::Instant::now();
    while spool.trouble().is_none() {
        assert!(begun.elapsed() < Duration::from_secs(20), "the disk never was full");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let said = spool.trouble().unwrap();
    assert!(said.contains("space"), "{said}");
    let mut feed = spool.feed(Lsn::ZERO).unwrap();
    let mut last = Lsn::ZERO;
    for _ in 0..12 * 21 {
        let popped = tokio::time::timeout(Duration::from_secs(20), feed.pop()).await;
        let item = popped.expect("it is stuck").expect("it has ended");
        let end_lsn = item.end_lsn().unwrap();
        assert!(end_lsn > last, "{end_lsn} after {last}");
        last = end_lsn;
        spool.release(last);
    }
    drop(writing.await.unwrap());
    assert_eq!(last, Lsn(1220 * 2 + 1));
    assert!(spool.failure().is_none());
    spool.close();
}

/// A transaction of 1 MiB that does not compress.
fn large(number: u64) -> Item {
    let Item::Chunk(mut chunk) = contract::item(number, 0) else { panic!() };
    let content = std::iter::repeat_with(|| fastrand::u64(..).to_ne_bytes()).take(1 << 17);
    let content: Vec<u8> = content.flatten().collect();
    let change = crate::change::Change::Message {
        transactional: true,
        lsn: Lsn(number),
        prefix: String::new(),
        content: content.into(),
    };
    (chunk.bytes, chunk.changes) = (change.bytes(), vec![change]);
    Item::Chunk(chunk)
}

/// A transaction of about 1 MiB in rows of an ordinary table, of which half compresses.
fn ordinary(number: u64) -> Item {
    let Item::Chunk(mut chunk) = contract::item(number, 0) else { panic!() };
    let mut random = fastrand::Rng::with_seed(number);
    let column = |name: &str, key| crate::change::Column {
        name: name.to_string(),
        type_oid: 25,
        type_modifier: -1,
        key,
    };
    let relation = std::sync::Arc::new(crate::change::Relation {
        oid: 1,
        name: crate::id::QualifiedName::new("public", "t"),
        identity: crate::change::ReplicaIdentity::Default,
        columns: vec![column("id", true), column("name", false), column("note", false)],
    });
    let insert = |_| {
        let mut row = crate::change::RowBuilder::new();
        let (id, name) = (random.u32(..).to_string(), format!("{:016x}", random.u64(..)));
        let note = format!("an ordinary note of number {id} that says what notes say, {name}");
        for value in [&id, &name, &note] {
            row.push(crate::change::Value::Text(value.as_bytes()));
        }
        crate::change::Change::Insert { relation: relation.clone(), new: row.finish() }
    };
    chunk.changes = (0..5500).map(insert).collect();
    chunk.bytes = chunk.changes.iter().map(|change| change.bytes()).sum();
    Item::Chunk(chunk)
}

/// `make spool-bench`: the release build beside dd, in one run.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement"]
async fn throughput_beside_dd() {
    const COUNT: u64 = 2048;
    let dir = Dir::new();
    std::fs::create_dir_all(&dir.0).unwrap();
    let pool: Vec<Item> = (1..=8).map(large).collect();
    let in_rows: Vec<Item> = (1..=8).map(ordinary).collect();
    let (mut dd, mut spooled, mut rows) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..3 {
        let begun = std::time::Instant::now();
        let to = dir.0.join("dd");
        let status = std::process::Command::new("dd")
            .args(["if=/dev/zero", "bs=1M", "conv=fdatasync", "status=none"])
            .args([format!("of={}", to.display()), format!("count={COUNT}")])
            .status();
        assert!(status.unwrap().success());
        dd.push((COUNT << 20) as f64 / 1e6 / begun.elapsed().as_secs_f64());
        std::fs::remove_file(&to).unwrap();

        spooled.push(write_all(&dir, &pool, COUNT).await);
        rows.push(write_all(&dir, &in_rows, COUNT).await);
    }
    println!("MB/s: dd {dd:.0?}, spool {spooled:.0?}, of rows {rows:.0?}");
    let best = |speeds: &[f64]| speeds.iter().copied().fold(0.0, f64::max);
    let bar = (best(&dd) * 0.8).min(300.0);
    assert!(best(&spooled) >= bar && best(&rows) >= bar, "under {bar:.0} MB/s");
}

/// Writes so many items of about 1 MiB and makes them durable; MB/s of what the items hold.
async fn write_all(dir: &Dir, pool: &[Item], count: u64) -> f64 {
    let spool_dir = Dir(dir.0.join("spool"));
    let spool = Spool::open(&Options::new(&spool_dir.0, identity(), 1 << 40)).unwrap();
    let mut sink = spool.sink();
    let mut bytes = 0;
    let begun = std::time::Instant::now();
    for number in 1..=count {
        let Item::Chunk(mut chunk) = pool[number as usize % pool.len()].clone() else { panic!() };
        let Item::Chunk(numbered) = contract::item(number, 0) else { panic!() };
        (chunk.begin, chunk.commit) = (numbered.begin, numbered.commit);
        let item = Item::Chunk(chunk);
        bytes += super::encode::size(&item);
        sink.push(item).await.unwrap();
    }
    durable_within(&spool, count, Duration::from_secs(300)).await;
    let speed = bytes as f64 / 1e6 / begun.elapsed().as_secs_f64();
    drop(sink);
    spool.close();
    speed
}
