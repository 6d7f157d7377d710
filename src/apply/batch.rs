//! Collecting items into batches. Pure.
//!
//! A batch holds whole source transactions in commit order (law 5). One transaction larger than a
//! batch is given out chunk by chunk, to be written inside one open target transaction, so that
//! memory stays fixed (law 9).

use std::collections::VecDeque;

use super::error::{Error, Result};
use super::growth::Limits;
use crate::change::{Begin, Chunk, Commit, Ending, Item};
use crate::limit;
use crate::lsn::Lsn;

/// What to do next.
#[derive(Debug)]
pub(super) enum Work {
    /// Write these chunks.
    Write(Batch),
    /// The stream began again inside a transaction of which chunks were written: roll it back.
    Abandon,
    /// Everything below this position (exclusive) has been given out, and nothing is waiting.
    Idle(Lsn),
}

/// Chunks that are written in one round trip.
#[derive(Debug)]
pub(super) struct Batch {
    /// In commit order.
    pub chunks: Vec<Chunk>,
    /// False if an earlier batch opened the target transaction.
    pub opens: bool,
    /// The last transaction's commit; `None` if the target transaction stays open for more chunks.
    pub commit: Option<Commit>,
    /// There was enough for a batch; else for less.
    pub full: bool,
}

impl Batch {
    /// How its one transaction ends, where that is not with COMMIT: such a one is alone.
    pub fn ending(&self) -> &Ending {
        self.chunks.first().map_or(&Ending::Commit, |chunk| &chunk.begin.ending)
    }

    /// Its one transaction, or a part of it, if that ends with PREPARE TRANSACTION.
    pub fn prepares(&self) -> Option<&Begin> {
        let begin = self.chunks.first().map(|chunk| &*chunk.begin);
        begin.filter(|begin| matches!(begin.ending, Ending::Prepare(_)))
    }

    /// Cut before this change: what is before it, if anything is, and the rest.
    pub fn split(mut self, chunk_at: usize, change_at: usize) -> (Option<Batch>, Batch) {
        let mut rest = self.chunks.split_off(chunk_at.min(self.chunks.len()));
        if let Some(first) = rest.first_mut().filter(|_| change_at > 0) {
            let changes = first.changes.split_off(change_at.min(first.changes.len()));
            let bytes = changes.iter().map(crate::change::Change::bytes).sum();
            let (number, commit) = (first.number.saturating_add(1), first.commit.take());
            let tail = Chunk { begin: first.begin.clone(), number, changes, commit, bytes };
            first.bytes = first.bytes.saturating_sub(bytes);
            self.chunks.push(std::mem::replace(first, tail));
        }
        let commit = self.chunks.last().and_then(|chunk| chunk.commit);
        let (full, opens) = (self.full, self.opens);
        let after = |opens| Batch { chunks: rest, opens, commit: self.commit, full };
        if self.chunks.is_empty() {
            return (None, after(opens));
        }
        let tail = after(commit.is_some());
        (Some(Batch { chunks: self.chunks, opens, commit, full: false }), tail)
    }

    /// Number of source transactions that end in this batch.
    pub fn transactions(&self) -> u64 {
        self.chunks.iter().filter(|c| c.commit.is_some()).count() as u64
    }
}

/// Chunks taken from the feed and not yet given out: about one batch at most.
#[derive(Debug)]
pub(super) struct Batcher {
    limits: Limits,
    queue: VecDeque<Chunk>,
    /// Bytes in `queue`.
    bytes: usize,
    /// How many chunks at the front of `queue` belong to transactions that are complete.
    complete: usize,
    /// End of the last complete transaction taken in, or progress at the start. What commits
    /// before it has been seen already.
    seen_lsn: Lsn,
    /// Number of the chunk that must come next; 0 between transactions.
    next_number: u32,
    /// Some chunks of the transaction at the front were given out already.
    open: bool,
    /// The open transaction was cut.
    abandoned: bool,
    idle_lsn: Option<Lsn>,
}

impl Batcher {
    /// Transactions whose commit record starts before `progress_lsn` are skipped whole (law 3).
    pub fn new(progress_lsn: Lsn, limits: Limits) -> Self {
        Batcher {
            limits,
            queue: VecDeque::new(),
            bytes: 0,
            complete: 0,
            seen_lsn: progress_lsn,
            next_number: 0,
            open: false,
            abandoned: false,
            idle_lsn: None,
        }
    }

    /// Other bounds for the next batch.
    pub fn resize(&mut self, limits: Limits) {
        self.limits = limits;
    }

    /// False once there is enough for a batch, or what is there must be given out first.
    pub fn wants_more(&self) -> bool {
        !self.is_full() && !self.abandoned
    }

    /// Chunks are counted too, as empty transactions have no bytes.
    fn is_full(&self) -> bool {
        let bytes = match self.complete {
            // A part of one transaction.
            0 => self.limits.bytes.min(limit::PART_BYTES),
            _ => self.limits.bytes,
        };
        self.bytes >= bytes || self.queue.len() >= self.limits.transactions.max(1)
    }

    /// Bytes of what is here.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// True if no chunk is here.
    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// True if what is at the front may not be applied yet.
    pub fn is_held(&self, hold_lsn: Option<Lsn>) -> bool {
        // Where the end of a transaction is known, it says where it committed: the beginning may
        // know no more than a lower bound of that.
        let ended = self.queue.iter().take(self.complete).find_map(|chunk| chunk.commit);
        let begun = self.queue.front().map(|chunk| chunk.begin.commit_lsn);
        match (ended.map(|commit| commit.commit_lsn).or(begun), hold_lsn) {
            (Some(commit_lsn), Some(hold_lsn)) => !self.open && commit_lsn >= hold_lsn,
            _ => false,
        }
    }

    /// True while a target transaction is open for a transaction given out in part.
    pub fn is_open(&self) -> bool {
        self.open
    }

    /// Takes an item in. Errors if chunks of a transaction are missing.
    pub fn push(&mut self, item: Item) -> Result<()> {
        match item {
            Item::Idle { lsn } => {
                if self.next_number == 0 {
                    self.idle_lsn = Some(lsn);
                }
                Ok(())
            }
            Item::Chunk(chunk) => self.push_chunk(chunk),
        }
    }

    fn push_chunk(&mut self, chunk: Chunk) -> Result<()> {
        if chunk.number == 0 {
            self.forget_incomplete();
        }
        if chunk.begin.commit_lsn < self.seen_lsn {
            return self.skip(&chunk);
        }
        if chunk.number != self.next_number {
            return Err(Error::Broken(format!(
                "chunk {} of transaction {} (commit at {}) arrived where chunk {} is due",
                chunk.number, chunk.begin.xid, chunk.begin.commit_lsn, self.next_number
            )));
        }
        self.idle_lsn = None;
        self.next_number = chunk.number.saturating_add(1);
        self.bytes += chunk.bytes;
        let commit = chunk.commit;
        self.queue.push_back(chunk);
        if let Some(commit) = commit {
            self.seen_lsn = commit.end_lsn;
            self.next_number = 0;
            self.complete = self.queue.len();
        }
        Ok(())
    }

    /// Chunks of a transaction seen before. Where the decoder learns of the commit only at the end,
    /// the chunks before it carry a lower bound: a stream that began below what was seen here may
    /// make a new transaction look old. Better stopped than lost.
    fn skip(&self, chunk: &Chunk) -> Result<()> {
        match chunk.commit {
            Some(commit) if commit.end_lsn > self.seen_lsn => Err(Error::Broken(format!(
                "transaction {} looked as if it had committed before {}, and ended at {}; the \
                 stream must start at the target's progress",
                chunk.begin.xid, self.seen_lsn, commit.end_lsn
            ))),
            _ => Ok(()),
        }
    }

    /// The reader connected again: what it had sent of an unfinished transaction comes once more.
    fn forget_incomplete(&mut self) {
        if self.next_number == 0 {
            return;
        }
        for chunk in self.queue.drain(self.complete..) {
            self.bytes -= chunk.bytes;
        }
        self.next_number = 0;
        if self.open && self.complete == 0 {
            self.abandoned = true;
        }
    }

    /// What to do next, if anything can be done. Transactions whose commit record starts at or
    /// after `hold_lsn` stay here.
    pub fn take(&mut self, hold_lsn: Option<Lsn>) -> Option<Work> {
        if self.abandoned {
            (self.abandoned, self.open) = (false, false);
            return Some(Work::Abandon);
        }
        let hold_lsn = hold_lsn.unwrap_or(Lsn(u64::MAX));
        let count = if self.open { self.rest_of_open() } else { self.whole_below(hold_lsn) };
        if count > 0 {
            return Some(Work::Write(self.give(count)));
        }
        let oversized = !self.open && self.complete == 0 && self.is_full();
        if oversized && self.queue.front().is_some_and(|c| c.begin.commit_lsn < hold_lsn) {
            return Some(Work::Write(self.give(self.queue.len())));
        }
        if !self.queue.is_empty() || self.open {
            return None;
        }
        self.idle_lsn.take().map(Work::Idle)
    }

    /// Chunks at the front up to the open transaction's commit.
    fn rest_of_open(&self) -> usize {
        let commit_at = self.queue.iter().position(|c| c.commit.is_some());
        commit_at.map_or(self.queue.len(), |at| at + 1)
    }

    /// Chunks at the front that are whole transactions, within the limits and below `hold_lsn`.
    fn whole_below(&self, hold_lsn: Lsn) -> usize {
        let (mut count, mut bytes, mut transactions) = (0, 0, 0);
        for (index, chunk) in self.queue.iter().take(self.complete).enumerate() {
            let alone = chunk.begin.ending != Ending::Commit;
            if alone && count > 0 {
                break;
            }
            bytes += chunk.bytes;
            if let Some(commit) = chunk.commit {
                if commit.commit_lsn >= hold_lsn {
                    break;
                }
                (count, transactions) = (index + 1, transactions + 1);
                let full = bytes >= self.limits.bytes || transactions >= self.limits.transactions;
                if full || alone {
                    break;
                }
            }
        }
        count
    }

    fn give(&mut self, count: usize) -> Batch {
        let full = self.is_full();
        let chunks: Vec<Chunk> = self.queue.drain(..count).collect();
        self.bytes -= chunks.iter().map(|c| c.bytes).sum::<usize>();
        self.complete = self.complete.saturating_sub(count);
        let commit = chunks.last().and_then(|c| c.commit);
        let opens = !self.open;
        self.open = commit.is_none();
        Batch { chunks, opens, commit, full }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::clock::PgTimestamp;

    /// Chunk `number` of the transaction whose commit record is `at..at+10`.
    fn chunk(at: u64, number: u32, last: bool, bytes: usize) -> Item {
        let begin = Begin {
            xid: at as u32,
            commit_lsn: Lsn(at),
            commit_time: PgTimestamp(0),
            origin: None,
            ending: Ending::Commit,
        };
        let commit = last.then_some(Commit {
            commit_lsn: Lsn(at),
            end_lsn: Lsn(at + 10),
            commit_time: PgTimestamp(0),
        });
        Item::Chunk(Chunk { begin: Arc::new(begin), number, changes: vec![], commit, bytes })
    }

    /// `100,200+` for a written batch (+ leaves the transaction open, ~ continues one).
    fn take(batcher: &mut Batcher, hold_lsn: Option<u64>) -> String {
        match batcher.take(hold_lsn.map(Lsn)) {
            None => "-".to_string(),
            Some(Work::Abandon) => "abandon".to_string(),
            Some(Work::Idle(lsn)) => format!("idle {}", lsn.0),
            Some(Work::Write(batch)) => {
                let starts: Vec<String> =
                    batch.chunks.iter().map(|c| c.begin.commit_lsn.0.to_string()).collect();
                let head = if batch.opens { "" } else { "~" };
                let tail = if batch.commit.is_some() { "" } else { "+" };
                format!("{head}{}{tail}", starts.join(","))
            }
        }
    }

    fn batcher(items: impl IntoIterator<Item = Item>) -> Batcher {
        let limits = Limits { bytes: 100, transactions: 3 };
        let mut batcher = Batcher::new(Lsn(50), limits);
        items.into_iter().for_each(|i| batcher.push(i).unwrap());
        batcher
    }

    #[test]
    fn a_batch_is_whole_transactions_within_the_limits() {
        let mut b = batcher((1..=5).map(|n| chunk(n * 100, 0, true, 1)));
        assert_eq!(take(&mut b, None), "100,200,300");
        assert_eq!(take(&mut b, None), "400,500");
        assert_eq!(take(&mut b, None), "-");
        let mut b = batcher((1..=3).map(|n| chunk(n * 100, 0, true, 60)));
        assert_eq!(take(&mut b, None), "100,200");
        let mut b = batcher([chunk(100, 0, true, 1), chunk(200, 0, false, 1)]);
        assert_eq!(take(&mut b, None), "100");
        assert_eq!(take(&mut b, None), "-");
        b.push(chunk(200, 1, true, 1)).unwrap();
        assert_eq!(take(&mut b, None), "200,200");
    }

    #[test]
    fn a_transaction_larger_than_a_batch_is_given_out_in_parts() {
        let mut b = batcher([chunk(100, 0, true, 1), chunk(200, 0, false, 99)]);
        assert!(!b.wants_more());
        assert_eq!(take(&mut b, None), "100");
        assert_eq!(take(&mut b, None), "-");
        b.push(chunk(200, 1, false, 60)).unwrap();
        assert_eq!(take(&mut b, None), "200,200+");
        assert_eq!(take(&mut b, None), "-");
        b.push(chunk(200, 2, true, 1)).unwrap();
        b.push(chunk(300, 0, true, 1)).unwrap();
        assert_eq!(take(&mut b, None), "~200");
        assert_eq!(take(&mut b, None), "300");
    }

    #[test]
    fn empty_transactions_and_chunks_are_bounded_by_their_number() {
        let mut b = batcher((1..=3).map(|n| chunk(n * 100, 0, true, 0)));
        assert!(!b.wants_more());
        assert_eq!(take(&mut b, None), "100,200,300");
        let mut b = batcher((0..3).map(|n| chunk(100, n, false, 0)));
        assert!(!b.wants_more());
        assert_eq!(take(&mut b, None), "100,100,100+");
        assert!(b.wants_more());
    }

    #[test]
    fn what_was_seen_is_skipped_whole_and_a_cut_transaction_begins_again() {
        let mut b = batcher([chunk(40, 0, false, 1), chunk(40, 1, true, 1), chunk(50, 0, true, 1)]);
        assert_eq!(take(&mut b, None), "50");
        let mut b = batcher([chunk(100, 0, true, 1), chunk(200, 0, false, 1)]);
        b.push(chunk(100, 0, true, 1)).unwrap();
        b.push(chunk(200, 0, true, 1)).unwrap();
        assert_eq!(take(&mut b, None), "100,200");
        let mut b = batcher([chunk(200, 0, false, 100)]);
        assert_eq!(take(&mut b, None), "200+");
        b.push(chunk(200, 0, true, 1)).unwrap();
        assert!(!b.wants_more());
        assert_eq!(take(&mut b, None), "abandon");
        assert_eq!(take(&mut b, None), "200");
    }

    #[test]
    fn a_complete_open_transaction_outlives_the_restart_of_the_stream() {
        let mut b = batcher([chunk(200, 0, false, 100)]);
        assert_eq!(take(&mut b, None), "200+");
        b.push(chunk(200, 1, true, 1)).unwrap();
        b.push(chunk(300, 0, false, 1)).unwrap();
        b.push(chunk(200, 0, false, 100)).unwrap();
        b.push(chunk(200, 1, true, 1)).unwrap();
        assert_eq!(take(&mut b, None), "~200");
        assert_eq!(take(&mut b, None), "-");
    }

    #[test]
    fn a_missing_chunk_is_an_error() {
        let mut b = batcher([]);
        assert!(b.push(chunk(100, 1, true, 1)).is_err());
    }

    #[test]
    fn a_transaction_that_looked_old_and_was_not_is_an_error() {
        let early = |number, end: Option<u64>| match chunk(40, number, end.is_some(), 1) {
            Item::Chunk(mut chunk) => {
                chunk.commit = chunk.commit.map(|c| Commit { end_lsn: Lsn(end.unwrap()), ..c });
                Item::Chunk(chunk)
            }
            idle => idle,
        };
        let mut b = batcher([early(0, None)]);
        b.push(early(1, Some(50))).unwrap();
        b.push(early(0, None)).unwrap();
        let error = b.push(early(1, Some(51))).unwrap_err().to_string();
        assert!(error.contains("transaction 40"), "{error}");
        assert_eq!(take(&mut b, None), "-");
    }

    #[test]
    fn a_hold_keeps_back_what_commits_at_or_after_it() {
        let mut b = batcher([chunk(100, 0, true, 1), chunk(200, 0, true, 1)]);
        assert_eq!(take(&mut b, Some(200)), "100");
        assert!(b.is_held(Some(Lsn(200))));
        assert_eq!(take(&mut b, Some(200)), "-");
        assert_eq!(take(&mut b, None), "200");
        let mut b = batcher([chunk(100, 0, false, 200)]);
        assert_eq!(take(&mut b, Some(100)), "-");
    }

    /// As test_decoding has it: where a transaction of several chunks committed shows at its end.
    #[test]
    fn a_hold_keeps_back_what_turns_out_to_commit_after_it() {
        let early = |number, last| match (chunk(100, number, last, 1), chunk(300, 1, true, 1)) {
            (Item::Chunk(mut chunk), Item::Chunk(late)) => {
                chunk.commit = chunk.commit.and(late.commit);
                Item::Chunk(chunk)
            }
            _ => panic!("a chunk"),
        };
        let mut b = batcher([chunk(60, 0, true, 1), early(0, false), early(1, true)]);
        assert_eq!(take(&mut b, Some(200)), "60");
        assert_eq!(take(&mut b, Some(200)), "-");
        assert!(b.is_held(Some(Lsn(200))));
        assert_eq!(take(&mut b, Some(301)), "100,100");
    }

    #[test]
    fn idleness_is_told_only_when_nothing_is_waiting() {
        let mut b = batcher([chunk(100, 0, true, 1), Item::Idle { lsn: Lsn(150) }]);
        assert_eq!(take(&mut b, Some(100)), "-");
        assert_eq!(take(&mut b, None), "100");
        assert_eq!(take(&mut b, None), "idle 150");
        assert_eq!(take(&mut b, None), "-");
        b.push(chunk(200, 0, false, 1)).unwrap();
        b.push(Item::Idle { lsn: Lsn(250) }).unwrap();
        assert_eq!(take(&mut b, None), "-");
    }

    #[test]
    fn what_has_to_do_with_prepare_is_never_with_others() {
        let ending = |at, number, last, ending: Ending| match chunk(at, number, last, 1) {
            Item::Chunk(mut chunk) => {
                let begin = Begin { ending, ..(*chunk.begin).clone() };
                chunk.begin = Arc::new(begin);
                Item::Chunk(chunk)
            }
            idle => idle,
        };
        let gid = || "g".to_string();
        let mut b = batcher([
            chunk(100, 0, true, 1),
            chunk(200, 0, true, 1),
            ending(300, 0, false, Ending::Prepare(gid())),
            ending(300, 1, true, Ending::Prepare(gid())),
            chunk(400, 0, true, 1),
            ending(500, 0, true, Ending::CommitPrepared(gid())),
            ending(600, 0, true, Ending::RollbackPrepared(gid())),
        ]);
        for batch in ["100,200", "300,300", "400", "500", "600", "-"] {
            assert_eq!(take(&mut b, None), batch);
        }
    }
}
