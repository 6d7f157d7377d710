//! Sequences of the side to come, past every value that the live side hands out.
//!
//! nextval asks no fence: a client that only takes values goes on taking them while writers wait,
//! up to the moment it is led to the other side. So each sequence is set further than it stood when
//! it was read, by what clients may take in the longest time that a switch may last: as many as at
//! the rate of the last moments, and a few of the blocks that sessions take at once (CACHE). Gaps
//! in sequences are normal; collisions are not.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use super::Result;
use crate::catalog::{self, Selection, Sequence};
use crate::id::QualifiedName;
use crate::pg::Session;
use crate::schema;

/// Increments added at least: for 20,000 a second, all of a sudden, over 50 ms.
const MARGIN: u64 = 1000;

/// Sessions that may each take another block of CACHE values meanwhile.
const BLOCKS: u64 = 100;

/// Times the rate seen: traffic has peaks.
const PEAK: f64 = 4.0;

/// Where the live side's sequences stood, and when; and which ones the other side has.
#[derive(Debug)]
pub struct Stood {
    at: Instant,
    values: HashMap<QualifiedName, i64>,
    dest: HashMap<QualifiedName, i64>,
}

impl Stood {
    /// Reads both sides. Done while nobody is held.
    pub async fn read(live: &mut Session, dest: &mut Session) -> Result<Stood> {
        let (dest, sequences) =
            tokio::try_join!(catalog::sequences(dest), catalog::sequences(live))?;
        let dest = dest.into_iter().map(|s| (s.name, s.last_value)).collect();
        let values = sequences.into_iter().map(|s| (s.name, s.last_value)).collect();
        Ok(Stood { at: Instant::now(), values, dest })
    }

    /// The live side alone.
    pub async fn of(live: &mut Session) -> Result<Stood> {
        let sequences = catalog::sequences(live).await?;
        let values = sequences.into_iter().map(|s| (s.name, s.last_value)).collect();
        Ok(Stood { at: Instant::now(), values, dest: HashMap::new() })
    }

    /// Increments by which the other side is ahead: of a sequence that both sides drew from.
    fn ahead(&self, sequence: &Sequence) -> u64 {
        ahead(sequence, self.dest.get(&sequence.name).copied())
    }

    /// Increments a second since then.
    fn rate(&self, now: &Sequence) -> f64 {
        let Some(then) = self.values.get(&now.name) else { return 0.0 };
        let moved = i128::from(now.last_value) - i128::from(*then);
        let increments = moved.checked_div(i128::from(now.increment)).unwrap_or(0);
        // A probe takes milliseconds: counted over less, one block would be a flood.
        let seconds = self.at.elapsed().as_secs_f64().max(0.05);
        increments.max(0) as f64 / seconds
    }
}

/// Increments by which one that stands at `there` is further than `sequence`.
fn ahead(sequence: &Sequence, there: Option<i64>) -> u64 {
    let Some(there) = there.filter(|_| !sequence.cycle) else { return 0 };
    let further = i128::from(there) - i128::from(sequence.last_value);
    let increments = further.checked_div(i128::from(sequence.increment)).unwrap_or(0);
    u64::try_from(increments).map_or(0, |increments| increments.saturating_add(1))
}

/// Increments by which a sequence is set further than it was read.
fn margin(sequence: &Sequence, rate: f64, hold: Duration) -> u64 {
    let blocks = u64::try_from(sequence.cache).unwrap_or(1).saturating_mul(BLOCKS);
    let taken = (rate * PEAK * hold.as_secs_f64()) as u64;
    MARGIN.max(blocks).saturating_add(taken)
}

/// Sets every sequence of `dest` past what `live` hands out within `hold`. What makes it durable is
/// the next commit on `dest`.
///
/// One that should be there and is not is an error; that of a table left out need not be there, but
/// may, as another table may use it. Of tables alone only what they own is set: other sequences of
/// the target are others' to count with. `renamed` are set under their names there.
pub async fn carry(
    live: &mut Session,
    dest: &mut Session,
    (selection, renamed): (&Selection, &HashMap<QualifiedName, QualifiedName>),
    stood: &Stood,
    hold: Duration,
) -> Result<()> {
    let mut sequences = catalog::sequences(live).await?;
    sequences.retain(|sequence| {
        renamed.contains_key(&sequence.name)
            || selection.has_sequence(sequence.owner.as_ref())
            || (!selection.tables_only && stood.dest.contains_key(&sequence.name))
    });
    let mut rates = HashMap::with_capacity(sequences.len());
    for sequence in &mut sequences {
        let rate = stood.rate(sequence);
        if let Some(name) = renamed.get(&sequence.name) {
            sequence.name = name.clone();
        }
        rates.insert(sequence.name.clone(), rate);
    }
    let rate = |sequence: &Sequence| rates.get(&sequence.name).copied().unwrap_or(0.0);
    let margin =
        |sequence: &Sequence| margin(sequence, rate(sequence), hold).max(stood.ahead(sequence));
    schema::set_sequences(dest, &sequences, margin).await?;
    Ok(())
}

/// Where sequences have to stand to be past what several sources hand out.
#[derive(Debug, Default)]
pub struct Past {
    /// Each where the source stands that is furthest.
    sequences: HashMap<QualifiedName, Sequence>,
    /// The largest margin that one of them needs.
    margins: HashMap<QualifiedName, u64>,
}

/// Reads the sequences of all `lives`, which stood so before, and hand out values for `hold` yet.
pub async fn past_all(lives: &mut [Session], stood: &[Stood], hold: Duration) -> Result<Past> {
    let mut past = Past::default();
    let reading = futures_util::future::try_join_all(lives.iter_mut().map(catalog::sequences));
    for (sequences, stood) in reading.await?.into_iter().zip(stood) {
        for sequence in sequences {
            let needs = margin(&sequence, stood.rate(&sequence), hold);
            past.add(sequence, needs);
        }
    }
    Ok(past)
}

impl Past {
    fn add(&mut self, sequence: Sequence, needs: u64) {
        let most = self.margins.entry(sequence.name.clone()).or_default();
        *most = needs.max(*most);
        let known = self.sequences.entry(sequence.name.clone()).or_insert_with(|| sequence.clone());
        let further = match sequence.increment {
            1.. => sequence.last_value > known.last_value,
            _ => sequence.last_value < known.last_value,
        };
        if further || (sequence.last_value == known.last_value && sequence.is_called) {
            *known = sequence;
        }
    }

    /// Sets those that are `there`, with where each stood: none back behind what was drawn there.
    pub async fn set(&self, dest: &mut Session, there: &HashMap<QualifiedName, i64>) -> Result<()> {
        let named = there.keys().filter_map(|name| self.sequences.get(name));
        let sequences: Vec<Sequence> = named.cloned().collect();
        let margin = |sequence: &Sequence| {
            let most = self.margins.get(&sequence.name).copied().unwrap_or(0);
            most.max(ahead(sequence, there.get(&sequence.name).copied()))
        };
        Ok(schema::set_sequences(dest, &sequences, margin).await?)
    }
}

/// After an undone switch: sets those sequences of `home` past `away`'s that are not, and moves
/// none back, as applications go on there. Cycling ones stay: nothing lies past their values.
pub async fn come_home(
    away: &mut Session,
    home: &mut Session,
    selection: &Selection,
) -> Result<()> {
    let mut sequences = catalog::sequences(away).await?;
    let here: HashMap<QualifiedName, i64> =
        catalog::sequences(home).await?.into_iter().map(|s| (s.name, s.last_value)).collect();
    sequences.retain(|sequence| {
        let ours = selection.has_sequence(sequence.owner.as_ref());
        let ahead = here.get(&sequence.name).is_some_and(|value| match sequence.increment {
            1.. => sequence.last_value > *value,
            _ => sequence.last_value < *value,
        });
        ours && ahead && !sequence.cycle
    });
    schema::set_sequences(home, &sequences, |sequence| margin(sequence, 0.0, Duration::ZERO))
        .await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_margin_covers_blocks_of_cache_and_the_rate_of_the_last_moments() {
        let mut sequence = Sequence {
            name: QualifiedName::new("s", "q"),
            last_value: 10_000,
            is_called: true,
            increment: 1,
            min_value: 1,
            max_value: i64::MAX,
            cache: 1,
            cycle: false,
            owner: None,
        };
        let hold = Duration::from_secs(5);
        assert_eq!(margin(&sequence, 0.0, hold), 1000);
        assert_eq!(margin(&sequence, 20_000.0, hold), 401_000);
        sequence.cache = 5000;
        assert_eq!(margin(&sequence, 0.0, hold), 500_000);
        let values = HashMap::from([(sequence.name.clone(), 30_000)]);
        let at = Instant::now() - Duration::from_secs(1);
        sequence.increment = -2;
        let dest = HashMap::from([(sequence.name.clone(), 9_001)]);
        let stood = Stood { at, values, dest };
        let rate = stood.rate(&sequence);
        assert!((9_000.0..=10_000.0).contains(&rate), "{rate}");
        // From 10,000 down by twos, past 9,001.
        assert_eq!(stood.ahead(&sequence), 500);
        sequence.increment = 2;
        assert_eq!(stood.ahead(&sequence), 0);
    }
}
