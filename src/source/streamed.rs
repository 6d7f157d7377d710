//! Transactions that the server sends while they are in progress, kept until they end.
//!
//! <https://www.postgresql.org/docs/current/protocol-logical-replication.html>
//!
//! A server with more changes in progress than its logical_decoding_work_mem sends the largest
//! transaction's, a block at a time, instead of writing them to its own disk. Blocks of several
//! transactions, and whole small transactions, come between each other; each transaction's own come
//! in order. Here they are put into a file for each (`change::Spill`), a piece at a time, and what
//! the assembler is given is the same as if the transaction had been sent at its commit:
//!
//! ```text
//! STREAM START 700 first   opens it
//! INSERT 700, INSERT 701   701 is a subtransaction; it begins at change 1
//! STREAM STOP              both are written to 700's file
//! BEGIN 705 ... COMMIT     a small one that committed meanwhile: not ours
//! STREAM ABORT 700, 701    the file is cut to one change
//! STREAM COMMIT 700        BEGIN, one change, COMMIT for the assembler
//! ```
//!
//! What is rolled back with a savepoint is cut off at the subtransaction's first change. All that
//! follows is its own or below it: a backend is in one subtransaction at a time, and whatever ended
//! below it and was kept is now rolled back with it (PostgreSQL's own applier relies on the same).
//!
//! Memory is one piece, and 16 bytes or so for each subtransaction that wrote something, of the
//! transactions in progress. Nothing survives a crash or a new connection, and nothing has to: the
//! slot's restart_lsn is before the first change of every transaction that has not ended, so all of
//! it comes again. A file that cannot be written ends the reader; the next one asks the server not
//! to stream.

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::io;
use std::sync::Arc;

use super::{Error, Result};
use crate::change::{Begin, Change, Commit, Spill, SpillFile};
use crate::clock::PgTimestamp;
use crate::decode::{self, Event, Prepared};
use crate::limit::{CHUNK_BYTES, CHUNK_CHANGES};
use crate::lsn::Lsn;

/// Collects blocks, and gives out what they come to.
pub(super) struct Streams {
    slot: String,
    spill: Option<Arc<dyn Spill>>,
    under_way: HashMap<u32, Streamed>,
    /// Whose block is being received.
    current: Option<u32>,
    delivery: Option<Delivery>,
}

/// One transaction in progress.
#[derive(Default)]
struct Streamed {
    /// See [`Begin::origin`].
    origin: Option<String>,
    file: Option<Box<dyn SpillFile>>,
    /// Of each piece in the file, how many changes come before it.
    pieces: Vec<u64>,
    /// Changes in the file.
    stored: u64,
    /// Changes that come after those.
    pending: Vec<Change>,
    pending_bytes: usize,
    /// Of each subtransaction, how many changes come before its first.
    first: HashMap<u32, u64>,
}

/// A transaction that has committed and is being given out.
struct Delivery {
    streamed: Streamed,
    /// Last first.
    begin: Vec<Event>,
    next_piece: usize,
    changes: std::vec::IntoIter<Change>,
    end: Option<Event>,
}

impl Streams {
    /// Without a place for them, nothing may be streamed.
    pub fn new(slot: &str, spill: Option<Arc<dyn Spill>>) -> Streams {
        let (under_way, current, delivery) = (HashMap::new(), None, None);
        Streams { slot: slot.to_string(), spill, under_way, current, delivery }
    }

    /// True of an event that [`Streams::take`] would give back as it is.
    pub fn pass(&self, event: &Event) -> bool {
        let streams = matches!(
            event,
            Event::StreamStart { .. }
                | Event::StreamStop
                | Event::StreamAbort { .. }
                | Event::StreamCommit { .. }
                | Event::StreamPrepare(_)
                | Event::Change { xid: Some(_), .. }
        );
        self.current.is_none() && self.delivery.is_none() && !streams
    }

    /// Takes an event that has to do with streaming; gives back any other. After an event that
    /// completes a transaction, [`Streams::next`] must be called until it gives nothing.
    pub async fn take(&mut self, event: Event) -> Result<Option<Event>> {
        match (event, self.current) {
            (Event::StreamStart { xid, first }, None) if self.spill.is_some() => {
                self.start(xid, first)?;
            }
            (Event::StreamStop, Some(xid)) => {
                self.current = None;
                self.store(xid).await?;
            }
            (Event::Change { xid: Some(subxid), change }, Some(xid)) => {
                self.change(xid, subxid, change).await?;
            }
            (Event::Origin { name, .. }, Some(xid)) => self.transaction(xid)?.origin = Some(name),
            (Event::UnknownOrigin, Some(xid)) => {
                self.transaction(xid)?.origin = Some(String::new());
            }
            (Event::StreamAbort { xid, subxid, at }, None) => self.abort(xid, subxid, at).await?,
            (Event::StreamCommit { xid, commit }, None) => self.commit(xid, commit)?,
            (Event::StreamPrepare(prepared), None) => self.prepare(prepared)?,
            (event @ (Event::Relation(_) | Event::Type { .. }), _) => return Ok(Some(event)),
            (event, None) => return Ok(Some(event)),
            (_, Some(xid)) => return Err(self.odd(xid, "is interrupted by another message")),
        }
        Ok(None)
    }

    /// The next event of a transaction that was completed.
    pub async fn next(&mut self) -> Result<Option<Event>> {
        let Some(delivery) = &mut self.delivery else { return Ok(None) };
        if let Some(event) = delivery.begin.pop() {
            return Ok(Some(event));
        }
        loop {
            if let Some(change) = delivery.changes.next() {
                return Ok(Some(Event::Change { xid: None, change }));
            }
            let index = delivery.next_piece;
            delivery.next_piece += 1;
            let streamed = &mut delivery.streamed;
            delivery.changes = if index < streamed.pieces.len() {
                let read = on_file(&mut streamed.file, move |file| file.read(index)).await;
                read.map_err(|source| Error::Spill { slot: self.slot.clone(), source })?
            } else if !streamed.pending.is_empty() {
                std::mem::take(&mut streamed.pending)
            } else {
                let end = delivery.end.take();
                self.delivery = None;
                return Ok(end);
            }
            .into_iter();
        }
    }

    fn start(&mut self, xid: u32, first: bool) -> Result<()> {
        let known = self.under_way.contains_key(&xid);
        if first == known {
            let what = if first { "begins a second time" } else { "goes on and has not begun" };
            return Err(self.odd(xid, what));
        }
        if first {
            self.under_way.insert(xid, Streamed::default());
        }
        self.current = Some(xid);
        Ok(())
    }

    async fn change(&mut self, xid: u32, subxid: u32, change: Change) -> Result<()> {
        let streamed = self.transaction(xid)?;
        if subxid != xid {
            let before = streamed.changes();
            streamed.first.entry(subxid).or_insert(before);
        }
        streamed.pending_bytes += change.bytes();
        streamed.pending.push(change);
        match streamed.is_full() {
            true => self.store(xid).await,
            false => Ok(()),
        }
    }

    /// Writes what is pending to the transaction's file.
    async fn store(&mut self, xid: u32) -> Result<()> {
        let spill = self.spill.clone();
        let streamed = self.transaction(xid)?;
        if streamed.pending.is_empty() {
            return Ok(());
        }
        let piece = std::mem::take(&mut streamed.pending);
        streamed.pending_bytes = 0;
        streamed.pieces.push(streamed.stored);
        streamed.stored += piece.len() as u64;
        let mut file = streamed.file.take();
        let stored = blocking(move || {
            if let (None, Some(spill)) = (&file, spill) {
                file = Some(spill.create()?);
            }
            if let Some(file) = &mut file {
                file.append(&piece)?;
            }
            Ok(file)
        })
        .await;
        let file = stored.map_err(|source| Error::Spill { slot: self.slot.clone(), source })?;
        self.transaction(xid)?.file = file;
        Ok(())
    }

    async fn abort(&mut self, xid: u32, subxid: u32, at: Option<(Lsn, PgTimestamp)>) -> Result<()> {
        let at = at.map(|(lsn, _)| lsn);
        tracing::trace!(xid, subxid, ?at, "streamed transaction rolled back");
        if xid == subxid {
            self.under_way.remove(&xid);
            return Ok(());
        }
        let slot = self.slot.clone();
        // 18 also tells the end of those that it never sent anything of, or whose transaction went
        // before.
        let Some(streamed) = self.under_way.get_mut(&xid) else { return Ok(()) };
        // One that wrote nothing we were sent, or that went with another already.
        let Some(keep) = streamed.first.remove(&subxid) else { return Ok(()) };
        let cut = streamed.cut(keep).await;
        cut.map_err(|source| Error::Spill { slot, source })
    }

    fn commit(&mut self, xid: u32, commit: Commit) -> Result<()> {
        let Some(streamed) = self.under_way.remove(&xid) else {
            return Err(self.odd(xid, "commits and has not begun"));
        };
        let begin = Begin {
            xid,
            commit_lsn: commit.commit_lsn,
            commit_time: commit.commit_time,
            origin: streamed.origin.clone(),
            ending: Default::default(),
        };
        self.deliver(streamed, vec![Event::Begin(begin)], Event::Commit(commit));
        Ok(())
    }

    fn prepare(&mut self, prepared: Prepared) -> Result<()> {
        let Some(mut streamed) = self.under_way.remove(&prepared.xid) else {
            return Err(self.odd(prepared.xid, "is prepared and has not begun"));
        };
        let origin = streamed.origin.take().map(|name| Event::Origin { lsn: Lsn::ZERO, name });
        let begin = origin.into_iter().chain([Event::BeginPrepare(prepared.clone())]).collect();
        self.deliver(streamed, begin, Event::Prepare(prepared));
        Ok(())
    }

    fn deliver(&mut self, streamed: Streamed, begin: Vec<Event>, end: Event) {
        let changes = Vec::new().into_iter();
        self.delivery = Some(Delivery { streamed, begin, next_piece: 0, changes, end: Some(end) });
    }

    fn transaction(&mut self, xid: u32) -> Result<&mut Streamed> {
        if !self.under_way.contains_key(&xid) {
            return Err(self.odd(xid, "is not under way"));
        }
        Ok(self.under_way.entry(xid).or_default())
    }

    fn odd(&self, xid: u32, what: &'static str) -> Error {
        let source = decode::Error::OddStream { xid, what };
        Error::Decode { slot: self.slot.clone(), source }
    }
}

impl Streamed {
    /// Changes so far.
    fn changes(&self) -> u64 {
        self.stored + self.pending.len() as u64
    }

    fn is_full(&self) -> bool {
        self.pending_bytes >= CHUNK_BYTES || self.pending.len() >= CHUNK_CHANGES
    }

    /// Forgets all changes but the first `keep`.
    async fn cut(&mut self, keep: u64) -> io::Result<()> {
        if keep < self.stored {
            // The piece with the first change to go; what it has before comes back into memory.
            let index = self.pieces.partition_point(|before| *before <= keep).saturating_sub(1);
            let before = self.pieces.get(index).copied().unwrap_or(0);
            let read = on_file(&mut self.file, move |file| {
                let piece = file.read(index)?;
                file.truncate(index)?;
                Ok(piece)
            });
            self.pending = read.await?;
            self.pieces.truncate(index);
            self.stored = before;
        }
        self.pending.truncate((keep.saturating_sub(self.stored)) as usize);
        self.pending_bytes = self.pending.iter().map(Change::bytes).sum();
        Ok(())
    }
}

/// Works on the file where blocking hurts nobody.
async fn on_file<T: Send + 'static>(
    file: &mut Option<Box<dyn SpillFile>>,
    work: impl FnOnce(&mut dyn SpillFile) -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    let Some(mut taken) = file.take() else {
        return Err(io::Error::other("a piece was stored and there is no file"));
    };
    let (taken, done) = blocking(move || {
        let done = work(&mut *taken);
        Ok((taken, done))
    })
    .await?;
    *file = Some(taken);
    done
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}
