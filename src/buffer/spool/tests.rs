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

    fn open(&self, place: &Dir) -> Spool {
        Spool::open(&place.options(1 << 30, 4096)).unwrap()
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
    let mut durable = spool.durable();
    let waiting = durable.wait_for(|lsn| lsn.0 >= number * 2 + 1);
    tokio::time::timeout(Duration::from_secs(10), waiting).await.unwrap().unwrap();
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
    let lost = |progress: u64, confirmed: u64| {
        let opened = Spool::open_at(&options, Lsn(progress), Lsn(confirmed)).unwrap();
        matches!(opened, Opened::Lost(Some(held)) if held.end_lsn == Lsn(101))
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
    let lost = |progress: u64, confirmed: u64| {
        let opened = Spool::open_at(&options, Lsn(progress), Lsn(confirmed)).unwrap();
        matches!(opened, Opened::Lost(_))
    };
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
            let Item::Chunk(mut chunk) = contract::item(9, 1000) else { panic!() };
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
    let sink = writing.await.unwrap();
    assert!(spool.bytes() > 20_000);
    spool.release(Lsn(19));
    drop(sink);
    spool.close();
}
