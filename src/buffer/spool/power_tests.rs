//! The power is cut between any two calls to the disk.

use std::sync::Arc;

use super::feed::Reader;
use super::log::Log;
use super::segment::Identity;
use super::sim_tests::{Op, SimDisk, World};
use super::{Error, Result};
use crate::buffer::contract::samples;
use crate::change::Item;
use crate::lsn::Lsn;

const SEGMENT: u64 = 2048;

pub fn identity() -> Identity {
    Identity {
        job: "shop".to_string(),
        stream: "forward".to_string(),
        system: "7".to_string(),
        timeline: 1,
        slot: "walferry_shop_forward".to_string(),
        made_lsn: Lsn(1),
    }
}

pub fn open(disk: &SimDisk) -> Result<Log<SimDisk>> {
    Log::open(Arc::new(disk.clone()), identity(), SEGMENT)
}

/// Everything in the log, oldest first.
pub fn read_all(disk: &SimDisk, log: &Log<SimDisk>) -> Result<Vec<Item>> {
    let mut items = Vec::new();
    for segment in log.segments() {
        let mut reader = Reader::new(Arc::new(disk.clone()), segment.number, segment.body);
        while let Some(item) = reader.next(segment.bytes)? {
            items.push(item);
        }
    }
    Ok(items)
}

/// A run: appends, syncs, marks, releases and a crash or two, at random. Gives the items in order.
fn record(random: &mut fastrand::Rng, count: usize) -> (SimDisk, Vec<Item>) {
    let disk = SimDisk::default();
    let mut log = open(&disk).unwrap();
    log.jump(Lsn(1));
    let items = samples(random, count);
    // It began where the target stood.
    let mut released = Lsn(1);
    for (index, item) in items.iter().enumerate() {
        log.append(item).unwrap();
        match random.u8(0..12) {
            0..4 => log.sync().unwrap(),
            4 => log.mark().unwrap(),
            5 if log.durable_lsn().0 > 200 => {
                released = released.max(Lsn(log.durable_lsn().0 - random.u64(0..200)));
                disk.note(log.durable_lsn(), released);
                log.release(released, random.bool()).unwrap();
            }
            6 if index % 7 == 0 && item.end_lsn().is_some() => log = open(&disk).unwrap(),
            _ => {}
        }
        disk.note(log.durable_lsn(), released);
    }
    (disk, items)
}

/// Opens what a crash left and holds it against what was promised.
fn check(world: World, items: &[Item], acknowledged: Lsn, released: Lsn) {
    let disk = SimDisk::of(world);
    let log = open(&disk).unwrap_or_else(|e| panic!("{e}"));
    let end_lsn = log.end_lsn();
    let empty = log.segments().is_empty();
    let whole = end_lsn >= acknowledged || empty && released >= acknowledged;
    assert!(whole, "ends at {end_lsn}, {acknowledged} was acknowledged");
    let left = read_all(&disk, &log).unwrap();
    let Some(first) = left.first() else { return };
    // What is there is a stretch of what was pushed, without a hole, from the released on.
    let at = items.iter().position(|item| item == first).expect("an item that was pushed");
    assert_eq!(left, items[at..at + left.len()], "a hole, or an item that never was");
    let before = items[..at].iter().filter_map(Item::end_lsn).next_back();
    assert!(before.is_none_or(|lsn| lsn <= released), "{before:?} is gone, released {released}");
    // And it can be gone on with.
    let mut log = log;
    let next = Item::Idle { lsn: Lsn(1 << 40) };
    log.append(&next).unwrap();
    log.sync().unwrap();
    drop(log);
    let log = open(&disk).unwrap();
    assert_eq!(log.end_lsn(), Lsn(1 << 40));
    assert_eq!(read_all(&disk, &log).unwrap().len(), left.len() + 1);
}

fn cut_everywhere(seed: u64, count: usize, variants: usize) -> usize {
    let mut random = fastrand::Rng::with_seed(seed);
    let (disk, items) = record(&mut random, count);
    let (mut world, mut points) = (World::default(), 0);
    let (mut acknowledged, mut released) = (Lsn::ZERO, Lsn(1));
    for op in disk.ops() {
        // A release is noted before it is done: from then on what it names may be gone.
        if let Op::Note { acknowledged: a, released: r } = op {
            (acknowledged, released) = (a, r);
            continue;
        }
        world.apply(&op);
        check(world.killed(), &items, acknowledged, released);
        check(world.cut_hard(), &items, acknowledged, released);
        for _ in 0..variants {
            check(world.cut_at_random(&mut random), &items, acknowledged, released);
        }
        points += 2 + variants;
    }
    points
}

#[test]
fn a_power_cut_anywhere_loses_nothing_acknowledged_and_invents_nothing() {
    let seed = std::env::var("WALFERRY_SEED").ok().and_then(|n| n.parse().ok());
    let first = seed.unwrap_or_else(|| fastrand::u64(..));
    let (mut points, mut seed) = (0, first);
    while points < 12_000 {
        println!("WALFERRY_SEED={seed}");
        points += cut_everywhere(seed, 120, 8);
        seed = seed.wrapping_add(1);
    }
    println!("{points} crash points");
}

#[test]
fn a_disk_that_is_full_takes_nothing_by_halves() {
    let mut random = fastrand::Rng::with_seed(3);
    let items = samples(&mut random, 60);
    let disk = SimDisk::default();
    let mut log = open(&disk).unwrap();
    log.jump(Lsn(1));
    for (index, item) in items.iter().enumerate() {
        // Room for a part of it, now and then for none.
        let used: usize = log.bytes() as usize;
        disk.set_room(Some(used + index % 90));
        for _ in 0..3 {
            if let Err(error) = log.append(item) {
                assert!(matches!(error, Error::NoSpace { .. }), "{error}");
            } else {
                break;
            }
        }
        disk.set_room(None);
        if log.end_lsn() < item.end_lsn().unwrap_or(Lsn::ZERO) || !written(&disk, &log, index) {
            log.append(item).unwrap();
        }
    }
    log.sync().unwrap();
    assert_eq!(read_all(&disk, &log).unwrap(), items);
    let reopened = open(&disk).unwrap();
    assert_eq!(read_all(&disk, &reopened).unwrap(), items);
}

fn written(disk: &SimDisk, log: &Log<SimDisk>, index: usize) -> bool {
    read_all(disk, log).unwrap().len() > index
}

#[test]
fn what_a_failed_sync_was_to_make_durable_is_not_there_afterwards() {
    let mut random = fastrand::Rng::with_seed(4);
    let items = samples(&mut random, 20);
    let disk = SimDisk::default();
    let mut log = open(&disk).unwrap();
    log.jump(Lsn(1));
    for item in &items[..10] {
        log.append(item).unwrap();
    }
    log.sync().unwrap();
    for item in &items[10..12] {
        log.append(item).unwrap();
    }
    // The second may have begun a segment, which makes the one before durable.
    let durable_lsn = log.durable_lsn();
    assert!(log.end_lsn() > durable_lsn);
    disk.fail_syncs();
    let error = log.sync().unwrap_err();
    assert!(error.to_string().contains("cannot sync 0000"), "{error}");
    let reopened = open(&SimDisk::of(disk.world())).unwrap();
    assert_eq!(reopened.end_lsn(), durable_lsn);
}
