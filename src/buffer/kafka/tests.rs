//! The format and the rule of reading; what needs a broker is tested with one, elsewhere.

use std::path::Path;

use bytes::Bytes;
use prost::Message as _;

use super::envelope::v1::{Envelope, envelope::Content};
use super::envelope::{self, Described, Unreadable, contents};
use super::follower::Follower;
use crate::buffer::contract::{item, samples};
use crate::change::{Chunk, Item};
use crate::lsn::Lsn;

/// The committed code is what the schema gives. `WALFERRY_BLESS=1` writes it anew.
#[test]
fn the_generated_code_agrees_with_the_schema() {
    let proto = Path::new(env!("CARGO_MANIFEST_DIR")).join("proto");
    let set = protox::compile(["envelope.proto"], [&proto]).unwrap();
    let out = std::env::temp_dir().join(format!("walferry-proto-{:x}", fastrand::u64(..)));
    std::fs::create_dir(&out).unwrap();
    let generated = prost_build::Config::new().out_dir(&out).bytes(["."]).compile_fds(set);
    let text = generated.and_then(|()| std::fs::read_to_string(out.join("walferry.v1.rs")));
    std::fs::remove_dir_all(&out).unwrap();
    let (text, committed) = (text.unwrap(), proto.join("envelope.rs"));
    if std::env::var_os("WALFERRY_BLESS").is_some() {
        std::fs::write(&committed, &text).unwrap();
    }
    assert!(std::fs::read_to_string(&committed).unwrap() == text, "run it with WALFERRY_BLESS=1");
}

/// A writer without a broker.
struct Pen {
    writer_id: u64,
    described: Described,
    previous_lsn: Lsn,
    chunks: u32,
}

impl Pen {
    fn new(writer_id: u64, previous_lsn: Lsn) -> Pen {
        Pen { writer_id, described: Described::default(), previous_lsn, chunks: 0 }
    }

    fn write(&mut self, item: &Item, limit_bytes: usize) -> Vec<Bytes> {
        if matches!(item, Item::Chunk(chunk) if chunk.number == 0) {
            self.chunks = 0;
        }
        let contents = contents(item, self.chunks, limit_bytes, &mut self.described);
        self.chunks += envelope::count(&contents);
        let records = contents.into_iter().map(|content| self.record(content));
        let records = records.collect();
        self.previous_lsn = item.end_lsn().unwrap_or(self.previous_lsn);
        records
    }

    fn record(&self, content: Content) -> Bytes {
        let envelope = Envelope {
            version: envelope::VERSION,
            stream_id: 7,
            writer_id: self.writer_id,
            previous_lsn: self.previous_lsn.0,
            content: Some(content),
        };
        Bytes::from(envelope.encode_to_vec())
    }
}

fn take(follower: &mut Follower, record: &Bytes) -> Option<Item> {
    follower.take(envelope::read(record.clone()).unwrap()).unwrap()
}

/// Changes of the transactions, in order, with what they belong to: chunks may be cut otherwise.
fn flat(items: &[Item]) -> Vec<String> {
    let mut lines = Vec::new();
    for item in items {
        match item {
            Item::Idle { lsn } => lines.push(format!("idle {lsn}")),
            Item::Chunk(Chunk { begin, number, changes, commit, .. }) => {
                if *number == 0 {
                    lines.push(format!("{begin:?}"));
                }
                lines.extend(changes.iter().map(|change| format!("{change:?}")));
                lines.extend(commit.iter().map(|commit| format!("{commit:?}")));
            }
        }
    }
    lines
}

#[test]
fn items_come_back_as_they_were_whatever_a_record_may_hold() {
    for seed in 0..30 {
        let mut random = fastrand::Rng::with_seed(seed);
        let items = samples(&mut random, 200);
        for limit_bytes in [1_000_000, 3000, 300] {
            let (mut pen, mut follower) = (Pen::new(1, Lsn(1)), Follower::new(Lsn(1)));
            let (mut back, mut records) = (Vec::new(), 0);
            for item in &items {
                for record in pen.write(item, limit_bytes) {
                    assert!(record.len() <= limit_bytes.max(1024) + 512, "{}", record.len());
                    back.extend(take(&mut follower, &record));
                    records += 1;
                }
            }
            assert!(flat(&back) == flat(&items), "seed {seed}");
            assert!(limit_bytes > 3000 || records > items.len(), "nothing was cut");
            assert_eq!(Some(follower.position()), items.iter().rev().find_map(Item::end_lsn));
        }
    }
}

#[test]
fn numbers_of_chunks_have_no_hole_where_a_chunk_was_cut() {
    let mut random = fastrand::Rng::with_seed(1);
    let items = samples(&mut random, 300);
    let (mut pen, mut follower) = (Pen::new(1, Lsn(1)), Follower::new(Lsn(1)));
    let mut next = 0;
    for record in items.iter().flat_map(|item| pen.write(item, 300)) {
        if let Some(Item::Chunk(chunk)) = take(&mut follower, &record) {
            assert_eq!(chunk.number, next);
            next = if chunk.commit.is_some() { 0 } else { next + 1 };
        }
    }
}

/// Writers that are killed anywhere, and for a moment write beside each other: each transaction
/// comes out once, in order, whoever wrote it, and from wherever the topic is read.
#[test]
fn writers_that_die_and_overlap_leave_one_stream() {
    for seed in 0..50 {
        let mut random = fastrand::Rng::with_seed(seed);
        let items = samples(&mut random, 60);
        let records = overlapping(&mut random, &items);
        let ends: Vec<Lsn> = items.iter().filter_map(Item::end_lsn).collect();
        let from = *random.choice(&ends).unwrap_or(&Lsn(1));
        for from_lsn in [Lsn(1), from] {
            let mut follower = Follower::new(from_lsn);
            let mut back: Vec<Item> = Vec::new();
            for record in &records {
                let Some(item) = take(&mut follower, record) else { continue };
                // A transaction begun again replaces what there is of it.
                if matches!(&item, Item::Chunk(chunk) if chunk.number == 0) {
                    while matches!(back.last(), Some(Item::Chunk(c)) if c.commit.is_none()) {
                        back.pop();
                    }
                }
                back.push(item);
            }
            let mut wanted = Vec::new();
            let mut done = Lsn(1);
            for item in &items {
                if done >= from_lsn {
                    wanted.push(item.clone());
                }
                done = item.end_lsn().unwrap_or(done);
            }
            assert!(flat(&back) == flat(&wanted), "seed {seed}, from {from_lsn}");
            assert_eq!(follower.gap(), None);
        }
    }
}

/// Records of several writers: each begins at the end of whole transactions as they stand. The one
/// before it may write a few more after that; the writer that finds such a record between its own
/// goes on only with what it has sent already.
fn overlapping(random: &mut fastrand::Rng, items: &[Item]) -> Vec<Bytes> {
    let mut records: Vec<Bytes> = Vec::new();
    let mut late: Vec<Bytes> = Vec::new();
    for writer_id in 1.. {
        let mut end = Follower::new(Lsn(1));
        records.iter().for_each(|record| drop(take(&mut end, record)));
        let mut pen = Pen::new(writer_id, end.position());
        let left = behind(items, end.position());
        let all: Vec<Bytes> = left.iter().flat_map(|item| pen.write(item, 600)).collect();
        let mut stop = random.usize(1..30);
        for (index, record) in all.iter().enumerate() {
            if index >= stop {
                break;
            }
            records.push(record.clone());
            if index < 3 && !late.is_empty() {
                records.push(late.remove(0));
                stop = stop.min(index + random.usize(1..4));
            }
        }
        if all.len() <= stop {
            return records;
        }
        late = all.into_iter().skip(stop).take(random.usize(0..3)).collect();
    }
    records
}

fn behind(items: &[Item], lsn: Lsn) -> Vec<&Item> {
    let mut done = Lsn(1);
    let mut left = Vec::new();
    for item in items {
        if done >= lsn {
            left.push(item);
        }
        done = item.end_lsn().unwrap_or(done);
    }
    left
}

#[test]
fn a_gap_is_seen_until_a_later_record_mends_it() {
    let items: Vec<Item> = (1..=6).map(|number| item(number, 10)).collect();
    let mut pen = Pen::new(1, Lsn(1));
    let records: Vec<Bytes> = items.iter().flat_map(|item| pen.write(item, 1 << 20)).collect();
    let mut follower = Follower::new(Lsn(1));
    assert_eq!(take(&mut follower, &records[0]), Some(items[0].clone()));
    assert_eq!(take(&mut follower, &records[3]), None);
    assert_eq!(follower.gap(), Some(Lsn(7)));
    // Written again from where the gap began.
    let mut again = Pen::new(2, Lsn(3));
    for item in &items[1..] {
        for record in again.write(item, 1 << 20) {
            assert_eq!(take(&mut follower, &record).as_ref(), Some(item));
        }
    }
    assert_eq!((follower.gap(), follower.position()), (None, Lsn(13)));
}

#[test]
fn another_version_and_bytes_that_are_none_are_told_apart() {
    let mut pen = Pen::new(1, Lsn(1));
    let mut envelope = envelope::read(pen.write(&item(1, 10), 1 << 20).remove(0)).unwrap();
    envelope.version = 2;
    let mut later = envelope.encode_to_vec();
    assert_eq!(envelope::read(later.clone().into()), Err(Unreadable::Version(2)));
    // What a later version may have put there.
    later.extend_from_slice(b"\xfa\x3f\x02hi");
    assert_eq!(envelope::read(later.into()), Err(Unreadable::Version(2)));
    for bytes in [&b"{\"json\": 1}"[..], b"", b"\x08"] {
        let read = envelope::read(Bytes::from_static(bytes));
        assert!(matches!(read, Err(Unreadable::Detail(_))), "{bytes:?} {read:?}");
    }
}

#[test]
fn mutated_records_are_errors_or_items_and_never_a_panic() {
    let mut random = fastrand::Rng::with_seed(3);
    let mut pen = Pen::new(1, Lsn(1));
    let items = samples(&mut random, 50);
    let records: Vec<Bytes> = items.iter().flat_map(|item| pen.write(item, 2000)).collect();
    for _ in 0..20_000 {
        let mut bytes = random.choice(&records).unwrap().to_vec();
        for _ in 0..random.usize(1..4) {
            let at = random.usize(..bytes.len());
            bytes[at] = random.u8(..);
        }
        bytes.truncate(random.usize(..=bytes.len()));
        if let Ok(envelope) = envelope::read(bytes.into()) {
            let _ = Follower::new(Lsn(random.u64(..100))).take(envelope);
        }
    }
}
