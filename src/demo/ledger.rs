//! Which transactions must be found again, and whether they are.
//!
//! Every transaction of the writer inserts (writer, seq) into bank.ledger. The writer notes which
//! COMMITs were acknowledged; a move may lose none of them, double none, and bring back none that
//! was rolled back. Where the connection died during COMMIT nobody but the database knows.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use crate::pg::{Config, Error, Purpose, Result, Session};

/// At most so many numbers of each kind are listed: one is enough to be wrong.
const LISTED: usize = 20;

/// Increasing numbers, kept as ranges: a writer's acknowledged ones are nearly consecutive.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ranges(Vec<(i64, i64)>);

impl Ranges {
    /// Adds a number greater than all before it.
    pub fn push(&mut self, number: i64) {
        match self.0.last_mut() {
            Some((_, end)) if *end + 1 == number => *end = number,
            _ => self.0.push((number, number)),
        }
    }

    /// True if the number was added.
    pub fn contains(&self, number: i64) -> bool {
        let after = self.0.partition_point(|(start, _)| *start <= number);
        let range = after.checked_sub(1).and_then(|at| self.0.get(at));
        range.is_some_and(|(_, end)| number <= *end)
    }

    /// How many numbers there are.
    pub fn count(&self) -> u64 {
        self.0.iter().map(|(start, end)| end.abs_diff(*start) + 1).sum()
    }

    fn iter(&self) -> impl Iterator<Item = RangeInclusive<i64>> + '_ {
        self.0.iter().map(|(start, end)| *start..=*end)
    }
}

/// What became of the transactions of one connection.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Account {
    /// Numbers up to and including this one belong to an earlier writer of the same number.
    pub base: i64,
    /// COMMIT was answered with COMMIT.
    pub acknowledged: Ranges,
    /// The connection was lost before COMMIT was answered.
    pub unknown: Ranges,
}

/// What became of all transactions, by the writer's number.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ledger {
    /// One entry for each connection.
    pub accounts: BTreeMap<i32, Account>,
}

impl Ledger {
    /// How many transactions were acknowledged.
    pub fn acknowledged(&self) -> u64 {
        self.accounts.values().map(|a| a.acknowledged.count()).sum()
    }

    /// How many transactions have an outcome that only the database knows.
    pub fn unknown(&self) -> u64 {
        self.accounts.values().map(|a| a.unknown.count()).sum()
    }
}

/// The verdict of [`check`]. Each list holds (writer, seq), at most 20 of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LedgerCheck {
    /// Acknowledged, and found exactly once.
    pub found: u64,
    /// Acknowledged, and not there.
    pub lost: Vec<(i32, i64)>,
    /// There more than once.
    pub duplicated: Vec<(i32, i64)>,
    /// There, though rolled back or never committed.
    pub phantom: Vec<(i32, i64)>,
}

impl LedgerCheck {
    /// True if every acknowledged transaction is there once, and nothing else is.
    pub fn is_exact(&self) -> bool {
        self.lost.is_empty() && self.duplicated.is_empty() && self.phantom.is_empty()
    }
}

/// Compares the ledger table of a database with what the writer was told. The writer must be
/// stopped or paused, or a transaction committed but not yet noted would look like a phantom.
/// Streams the table; memory does not grow with it.
pub async fn check(uri: &str, ledger: &Ledger) -> Result<LedgerCheck> {
    let mut session = Session::connect(&Config::parse(uri)?, Purpose::Sql).await?;
    let mut verdict = LedgerCheck::default();
    for (writer, account) in &ledger.accounts {
        let sql = format!(
            "copy (select seq from bank.ledger where writer = {writer} and seq > {} order by seq) \
             to stdout",
            account.base
        );
        let mut copy = session.copy_out(&sql).await?;
        let mut due = account.acknowledged.iter().flatten().peekable();
        let mut last = None;
        while let Some(line) = copy.next().await? {
            let seq = read_number(&line)?;
            while let Some(missing) = due.next_if(|d| *d < seq) {
                list(&mut verdict.lost, *writer, missing);
            }
            if last == Some(seq) {
                list(&mut verdict.duplicated, *writer, seq);
            } else if due.next_if_eq(&seq).is_some() {
                verdict.found += 1;
            } else if !account.unknown.contains(seq) {
                list(&mut verdict.phantom, *writer, seq);
            }
            last = Some(seq);
        }
        for missing in due {
            list(&mut verdict.lost, *writer, missing);
        }
    }
    Ok(verdict)
}

fn list(numbers: &mut Vec<(i32, i64)>, writer: i32, seq: i64) {
    if numbers.len() < LISTED {
        numbers.push((writer, seq));
    }
}

fn read_number(line: &[u8]) -> Result<i64> {
    let text = std::str::from_utf8(line).unwrap_or_default().trim_end();
    text.parse().map_err(|_| Error::Result(format!("bank.ledger: \"{text}\" is not a number")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_hold_exactly_what_was_added() {
        let mut ranges = Ranges::default();
        for number in [1, 2, 3, 7, 9, 10] {
            ranges.push(number);
        }
        assert_eq!(ranges.count(), 6);
        let held: Vec<i64> = (0..12).filter(|n| ranges.contains(*n)).collect();
        assert_eq!(held, [1, 2, 3, 7, 9, 10]);
        assert_eq!(ranges.iter().flatten().collect::<Vec<_>>(), held);
    }
}
