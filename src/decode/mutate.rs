//! Mutated messages for every decoder: 20,000 in the usual tests, a million under `make fuzz`.

/// Gives `check` mutations of `seeds`: bytes changed, cut, repeated, moved, and two messages mixed.
/// `WALFERRY_FUZZ` says how many, `WALFERRY_SEED` repeats a run.
pub fn each(seeds: &[&[u8]], mut check: impl FnMut(&[u8])) {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let runs = number("WALFERRY_FUZZ").unwrap_or(20_000);
    let seed = number("WALFERRY_SEED").unwrap_or_else(|| fastrand::u64(..));
    println!("WALFERRY_SEED={seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    for _ in 0..runs {
        let mut data = random.choice(seeds).map_or_else(Vec::new, |seed| seed.to_vec());
        for _ in 0..random.usize(1..6) {
            mutate(&mut data, seeds, &mut random);
        }
        check(&data);
    }
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
