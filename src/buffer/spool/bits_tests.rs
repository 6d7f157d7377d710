//! A bit flipped anywhere in a spool is found, and nothing that it hit is delivered.

use super::power_tests::{open, read_all};
use super::sim_tests::SimDisk;
use super::{Error, Result};
use crate::buffer::contract::samples;
use crate::change::Item;
use crate::lsn::Lsn;

/// A log that was closed in order.
fn closed(count: usize) -> (SimDisk, Vec<Item>) {
    let mut random = fastrand::Rng::with_seed(1);
    let items = samples(&mut random, count);
    let disk = SimDisk::default();
    let mut log = open(&disk).unwrap();
    log.jump(Lsn(1));
    for (index, item) in items.iter().enumerate() {
        log.append(item).unwrap();
        if index % 5 == 0 {
            log.sync().unwrap();
        }
    }
    log.mark().unwrap();
    (disk, items)
}

fn deliver(disk: &SimDisk) -> Result<Vec<Item>> {
    let log = open(disk)?;
    read_all(disk, &log)
}

/// Flips one bit; the outcome is an error that names file and offset, or all items, if the bit was
/// in the mark at the end, which is cut.
fn flip(disk: &SimDisk, items: &[Item], file: &str, bit: usize) -> bool {
    let mut world = disk.world();
    world.file_mut(file)[bit / 8] ^= 1 << (bit % 8);
    match deliver(&SimDisk::of(world)) {
        Err(Error::Corrupt { file: named, offset, .. }) => {
            assert_eq!(named, file, "bit {bit}");
            assert!(offset <= bit as u64 / 8, "bit {bit}: {offset}");
            true
        }
        Err(error) => panic!("{file} bit {bit}: {error}"),
        Ok(delivered) => {
            assert_eq!(delivered, items, "{file} bit {bit}");
            false
        }
    }
}

#[test]
fn every_bit_of_a_small_spool_is_watched() {
    let (disk, items) = closed(22);
    let files = disk.world().files();
    assert!(files.len() > 1, "{files:?}");
    let (mut bits, mut cut) = (0, 0);
    for file in &files {
        let len = disk.world().file_mut(file).len() * 8;
        for bit in 0..len {
            bits += 1;
            cut += usize::from(!flip(&disk, &items, file, bit));
        }
    }
    println!("{bits} bits, {cut} of them in the last mark");
    assert_eq!(cut, super::frame::HEADER * 8);
}

#[test]
fn sampled_bits_of_a_large_spool_are_watched() {
    let (disk, items) = closed(400);
    let mut random = fastrand::Rng::new();
    let files = disk.world().files();
    for _ in 0..100 {
        let file = &files[random.usize(..files.len() - 1)];
        let len = disk.world().file_mut(file).len() * 8;
        assert!(flip(&disk, &items, file, random.usize(..len)));
    }
}

#[test]
fn a_missing_a_shortened_and_a_renamed_file_are_named() {
    let (disk, _) = closed(60);
    let files = disk.world().files();
    let mut world = disk.world();
    world.apply(&super::sim_tests::Op::Remove(files[1].clone()));
    let error = deliver(&SimDisk::of(world)).unwrap_err();
    assert!(matches!(&error, Error::Missing { file, .. } if *file == files[1]), "{error}");
    for len in [0, 10, 300] {
        let mut world = disk.world();
        world.file_mut(&files[1]).truncate(len);
        let error = deliver(&SimDisk::of(world)).unwrap_err();
        assert!(matches!(&error, Error::Corrupt { file, .. } if *file == files[1]), "{error}");
    }
    let mut world = disk.world();
    let first = world.file_mut(&files[0]).clone();
    *world.file_mut(&files[1]) = first;
    let error = deliver(&SimDisk::of(world)).unwrap_err().to_string();
    assert!(error.contains("by its header"), "{error}");
}
