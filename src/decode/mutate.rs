//! Mutated messages for every decoder: 20,000 in the usual tests, a million under `make fuzz`. None
//! may make a decoder panic, hang, or hold more memory than it may.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

/// What may be held at once for a message of so many bytes, beside tables already known: 16 for
/// each of its bytes (a pgoutput description with empty names makes most of its own), and room for
/// a decoder and the rows that it builds.
fn bytes_at_most(message_bytes: usize) -> usize {
    (64 << 10) + 16 * message_bytes
}

/// Gives `check` mutations of `seeds`: bytes changed, cut, repeated, moved, and two messages mixed.
/// `WALFERRY_FUZZ` says how many, `WALFERRY_SEED` repeats a run.
pub fn each(seeds: &[&[u8]], mut check: impl FnMut(&[u8])) {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let runs = number("WALFERRY_FUZZ").unwrap_or(20_000);
    let seed = number("WALFERRY_SEED").unwrap_or_else(|| fastrand::u64(..));
    println!("WALFERRY_SEED={seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let mut largest = 0;
    for _ in 0..runs {
        let mut data = random.choice(seeds).map_or_else(Vec::new, |seed| seed.to_vec());
        for _ in 0..random.usize(1..6) {
            mutate(&mut data, seeds, &mut random);
        }
        let held = most_held(|| check(&data));
        let most = bytes_at_most(data.len());
        assert!(held <= most, "{held} bytes held, {most} allowed, for {data:?}");
        largest = largest.max(held);
    }
    println!("{runs} messages, at most {largest} bytes held for one");
}

fn mutate(data: &mut Vec<u8>, seeds: &[&[u8]], random: &mut fastrand::Rng) {
    let at = random.usize(..=data.len());
    let end = random.usize(at..=data.len());
    match random.u8(..7) {
        0 => data.truncate(at),
        1 => data.insert(at, random.u8(..)),
        2 if at < data.len() => data[at] = random.u8(..),
        3 => drop(data.drain(at..end)),
        4 => {
            let part = data[at..end].to_vec();
            data.splice(at..at, part);
        }
        5 => {
            let Some(other) = random.choice(seeds) else { return };
            let from = random.usize(..=other.len());
            data.splice(at..end, other[from..].iter().copied());
        }
        _ if at < data.len() => data[at] ^= 1 << random.u8(..8),
        _ => {}
    }
}

/// Counts what each thread holds. Of the tests of this library only.
struct Counting;

#[global_allocator]
static COUNTING: Counting = Counting;

thread_local! {
    /// Bytes that this thread has asked for and not given back, and the most there were of them.
    static HELD: Cell<(isize, isize)> = const { Cell::new((0, 0)) };
}

fn count(more: usize, less: usize) {
    // None while a thread ends.
    let _ = HELD.try_with(|held| {
        let (now, most) = held.get();
        let with = now.saturating_add_unsigned(more);
        held.set((with.saturating_sub_unsigned(less), most.max(with)));
    });
}

#[allow(unsafe_code, reason = "an allocator is unsafe; this one asks the system's, as it is asked")]
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size(), 0);
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        count(0, layout.size());
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size(), 0);
        unsafe { System.alloc_zeroed(layout) }
    }

    /// Both are there for a moment, at the worst.
    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size, layout.size());
        unsafe { System.realloc(at, layout, size) }
    }
}

/// The most bytes that `work` held at once on this thread.
fn most_held(work: impl FnOnce()) -> usize {
    HELD.set((0, 0));
    work();
    usize::try_from(HELD.get().1).unwrap_or(0)
}

#[test]
fn what_is_held_at_once_is_seen() {
    let mib = 1 << 20;
    assert!(most_held(|| ()) < 100);
    assert_eq!(most_held(|| drop(vec![7_u8; mib])), mib);
    assert_eq!(most_held(|| drop(vec![0_u8; mib])), mib);
    let one_after_the_other = || (0..10).for_each(|_| drop(vec![7_u8; mib]));
    assert_eq!(most_held(one_after_the_other), mib);
    let grown = || vec![7_u8; mib].reserve_exact(2 * mib);
    assert_eq!(most_held(grown), 4 * mib);
    let elsewhere = || assert!(std::thread::spawn(move || drop(vec![7_u8; mib])).join().is_ok());
    assert!(most_held(elsewhere) < mib);
}
