//! From events to items: chunks of transactions, and positions.

use std::sync::Arc;

use super::{Error, Event, Prepared, Result};
use crate::change::{Begin, Change, Chunk, Commit, Ending, Item};
use crate::limit::{CHUNK_BYTES, CHUNK_CHANGES};
use crate::lsn::Lsn;

/// Collects the open transaction. Each event gives at most one item.
#[derive(Debug, Default)]
pub struct Assembler {
    open: Option<Open>,
    /// End of the last transaction or the last idle position given: nothing below comes again.
    decoded_lsn: Lsn,
}

/// The transaction between its BEGIN and its COMMIT.
#[derive(Debug)]
struct Open {
    begin: Begin,
    /// `begin` has a lower bound in place of its commit position.
    unplaced: bool,
    /// It was prepared before two-phase decoding began, and comes whole now that it is committed.
    late: bool,
    /// Made at the first change, when the origin is known.
    shared: Option<Arc<Begin>>,
    number: u32,
    changes: Vec<Change>,
    bytes: usize,
}

impl Open {
    fn new(begin: Begin) -> Self {
        let (changes, bytes) = (Vec::new(), 0);
        Open { begin, unplaced: false, late: false, shared: None, number: 0, changes, bytes }
    }

    /// The transaction's end is known. Chunks that went out before it keep what they said.
    fn place(&mut self, commit: &Commit) {
        if self.unplaced && self.number == 0 {
            self.begin.commit_lsn = commit.commit_lsn;
            self.begin.commit_time = commit.commit_time;
        }
    }

    /// True if this commit can be the open transaction's.
    fn fits(&self, commit: &Commit) -> bool {
        match self.unplaced {
            true => commit.commit_lsn >= self.begin.commit_lsn,
            false => commit.commit_lsn == self.begin.commit_lsn,
        }
    }

    fn is_full(&self) -> bool {
        self.bytes >= CHUNK_BYTES || self.changes.len() >= CHUNK_CHANGES
    }

    fn push(&mut self, change: Change) {
        self.bytes += change.bytes();
        self.changes.push(change);
    }

    /// The changes so far as a chunk; the next one starts empty.
    fn cut(&mut self, commit: Option<Commit>) -> Chunk {
        let begin = self.shared.get_or_insert_with(|| Arc::new(self.begin.clone())).clone();
        let chunk = Chunk {
            begin,
            number: self.number,
            changes: std::mem::take(&mut self.changes),
            commit,
            bytes: std::mem::take(&mut self.bytes),
        };
        self.number = self.number.saturating_add(1);
        chunk
    }
}

impl Assembler {
    /// Starts where the stream was asked to start; keepalives at or below it say nothing new.
    pub fn new(start_lsn: Lsn) -> Self {
        Assembler { open: None, decoded_lsn: start_lsn }
    }

    /// True between a transaction's BEGIN and its COMMIT.
    pub fn in_transaction(&self) -> bool {
        self.open.is_some()
    }

    /// Exclusive end of all that was given in whole transactions or idle positions.
    pub fn decoded_lsn(&self) -> Lsn {
        self.decoded_lsn
    }

    /// Takes one event; gives the chunk that it completes, if it does.
    ///
    /// A chunk ends when it holds [`CHUNK_BYTES`] or [`CHUNK_CHANGES`], so it is larger than that
    /// by at most one change. Errors for events out of their place.
    pub fn event(&mut self, event: Event) -> Result<Option<Item>> {
        match event {
            Event::Begin(begin) => self.begin(begin, false),
            Event::Start { xid, first_lsn } => self.start(xid, first_lsn),
            Event::Origin { name, .. } => self.origin(name),
            Event::UnknownOrigin => self.origin(String::new()),
            Event::Relation(_) | Event::Type { .. } => Ok(None),
            Event::Change { xid: None, change } => self.change(change),
            Event::Commit(commit) => self.commit(commit),
            Event::Change { xid: Some(_), .. } => not_asked("a change of a streamed transaction"),
            Event::StreamStart { .. } => not_asked("Stream Start"),
            Event::StreamStop => not_asked("Stream Stop"),
            Event::StreamCommit { .. } => not_asked("Stream Commit"),
            Event::StreamAbort { .. } => not_asked("Stream Abort"),
            Event::BeginPrepare(prepared) => self.begin_prepare(prepared),
            Event::Prepare(_) if self.is_late() => Ok(None),
            Event::Prepare(prepared) => self.commit(ended(&prepared)),
            Event::CommitPrepared(prepared) if self.is_late() => self.commit(ended(&prepared)),
            Event::CommitPrepared(Prepared { xid, lsn, end_lsn, time, gid }) => {
                let commit = Commit { commit_lsn: lsn, end_lsn, commit_time: time };
                self.finish(xid, Ending::CommitPrepared(gid), commit)
            }
            Event::RollbackPrepared(Prepared { xid, end_lsn, time, gid, .. }) => {
                // The last byte of the record, which compares as its start would.
                let commit_lsn = Lsn(end_lsn.0.saturating_sub(1));
                let commit = Commit { commit_lsn, end_lsn, commit_time: time };
                self.finish(xid, Ending::RollbackPrepared(gid), commit)
            }
            Event::StreamPrepare(_) => not_asked("Stream Prepare"),
        }
    }

    /// Takes a keepalive's position: an idle item if no transaction is open and it is news.
    ///
    /// The server sends `end_lsn` once everything that commits before it has been sent, so it is
    /// an exclusive end. The item goes the way of the transactions before it and must be
    /// acknowledged after them: the keepalive itself never moves the slot (pgcopydb#1033).
    pub fn keepalive(&mut self, end_lsn: Lsn) -> Option<Item> {
        if self.open.is_some() || end_lsn <= self.decoded_lsn {
            return None;
        }
        self.decoded_lsn = end_lsn;
        Some(Item::Idle { lsn: end_lsn })
    }

    fn begin(&mut self, begin: Begin, unplaced: bool) -> Result<Option<Item>> {
        if self.open.is_some() {
            return Err(self.out_of_place("BEGIN", "inside a transaction"));
        }
        self.open = Some(Open { unplaced, ..Open::new(begin) });
        Ok(None)
    }

    /// A transaction whose commit position comes only with its COMMIT. One that fits into a chunk
    /// waits for it. The chunks of a larger one must go out before; what they say instead is the
    /// largest position that the commit record cannot be below. Transactions come in commit order,
    /// and none that committed before the position asked for, so the end of the last one is such.
    fn start(&mut self, xid: u32, first_lsn: Lsn) -> Result<Option<Item>> {
        let commit_lsn = first_lsn.max(self.decoded_lsn);
        let (commit_time, ending) = Default::default();
        self.begin(Begin { xid, commit_lsn, commit_time, origin: None, ending }, true)
    }

    /// A server sends what was prepared before it was asked for two-phase decoding only at its
    /// COMMIT PREPARED, and calls it prepared at the old position. That is a transaction like any
    /// other, whose commit is told at its end.
    fn begin_prepare(&mut self, prepared: Prepared) -> Result<Option<Item>> {
        let Prepared { xid, lsn, time, gid, .. } = prepared;
        if lsn >= self.decoded_lsn {
            let ending = Ending::Prepare(gid);
            let begin = Begin { xid, commit_lsn: lsn, commit_time: time, origin: None, ending };
            return self.begin(begin, false);
        }
        self.start(xid, lsn)?;
        if let Some(open) = &mut self.open {
            open.late = true;
        }
        Ok(None)
    }

    fn is_late(&self) -> bool {
        self.open.as_ref().is_some_and(|open| open.late)
    }

    /// What became of a prepared transaction, as one without changes.
    fn finish(&mut self, xid: u32, ending: Ending, commit: Commit) -> Result<Option<Item>> {
        let (commit_lsn, commit_time) = (commit.commit_lsn, commit.commit_time);
        self.begin(Begin { xid, commit_lsn, commit_time, origin: None, ending }, false)?;
        self.commit(commit)
    }

    fn origin(&mut self, name: String) -> Result<Option<Item>> {
        let after = self.decoded_lsn;
        let place = match &mut self.open {
            // Later, chunks without it may have gone out: the loop filter would miss them.
            Some(open) if open.number > 0 || !open.changes.is_empty() => "after a change",
            Some(open) => {
                open.begin.origin = Some(name);
                return Ok(None);
            }
            None => "outside a transaction",
        };
        Err(Error::OutOfPlace { event: "ORIGIN", place, after })
    }

    fn change(&mut self, change: Change) -> Result<Option<Item>> {
        if let Some(open) = &mut self.open {
            open.push(change);
            return Ok(open.is_full().then(|| Item::Chunk(open.cut(None))));
        }
        match change {
            Change::Message { transactional: false, lsn, .. } => Ok(self.lone_message(lsn, change)),
            _ => Err(self.out_of_place("a change", "outside a transaction")),
        }
    }

    /// A message written outside any transaction becomes one of its own, with xid 0.
    ///
    /// The position it comes with is the end of its record, and may be the very start of the next
    /// transaction's commit record, which must not look as if it had been passed.
    fn lone_message(&mut self, lsn: Lsn, change: Change) -> Option<Item> {
        let commit = Commit {
            commit_lsn: Lsn(lsn.0.saturating_sub(1)),
            end_lsn: lsn,
            commit_time: Default::default(),
        };
        if commit.end_lsn <= self.decoded_lsn {
            return None;
        }
        let mut open = Open::new(Begin {
            xid: 0,
            commit_lsn: commit.commit_lsn,
            commit_time: commit.commit_time,
            origin: None,
            ending: Ending::Commit,
        });
        open.push(change);
        self.decoded_lsn = commit.end_lsn;
        Some(Item::Chunk(open.cut(Some(commit))))
    }

    fn commit(&mut self, commit: Commit) -> Result<Option<Item>> {
        let Some(open) = &mut self.open else {
            return Err(self.out_of_place("COMMIT", "outside a transaction"));
        };
        if !open.fits(&commit) {
            return Err(Error::WrongCommit {
                xid: open.begin.xid,
                begin_lsn: open.begin.commit_lsn,
                commit_lsn: commit.commit_lsn,
            });
        }
        if commit.end_lsn <= self.decoded_lsn || commit.end_lsn <= commit.commit_lsn {
            return Err(Error::Disorder {
                commit_lsn: commit.commit_lsn,
                end_lsn: commit.end_lsn,
                after: self.decoded_lsn,
            });
        }
        open.place(&commit);
        let chunk = open.cut(Some(commit));
        self.open = None;
        self.decoded_lsn = commit.end_lsn;
        Ok(Some(Item::Chunk(chunk)))
    }

    fn out_of_place(&self, event: &'static str, place: &'static str) -> Error {
        Error::OutOfPlace { event, place, after: self.decoded_lsn }
    }
}

/// The end of what was prepared, or of what is committed now.
fn ended(prepared: &Prepared) -> Commit {
    let Prepared { lsn, end_lsn, time, .. } = prepared;
    Commit { commit_lsn: *lsn, end_lsn: *end_lsn, commit_time: *time }
}

fn not_asked(event: &'static str) -> Result<Option<Item>> {
    Err(Error::NotAskedFor { event })
}
