//! What records mean, one after another: pure.
//!
//! Records are not always one clean run. A writer that was killed leaves a transaction unfinished,
//! its successor begins at the last whole one, and for a moment both may write. So everybody who
//! reads a topic, the applier as the writer that looks where to go on, goes by one rule: a
//! position,
//! the end of the last whole transaction; what begins below is there already; what begins beyond is
//! a gap; a transaction that is begun again replaces what there was of it.

use std::sync::Arc;

use bytes::Bytes;
use prost::Message as _;

use super::envelope::v1::{self, envelope::Content};
use super::envelope::{Known, Unreadable, read_begin, read_chunk};
use crate::change::{Begin, Item};
use crate::lsn::Lsn;

/// The transaction whose chunks are being taken.
#[derive(Debug)]
struct Open {
    writer_id: u64,
    begin: Arc<Begin>,
    next: u32,
}

/// Pieces of a chunk, so far.
#[derive(Debug)]
struct Pieces {
    writer_id: u64,
    next: u32,
    bytes: Vec<u8>,
}

/// Reads records in the order of their offsets.
#[derive(Debug, Default)]
pub(super) struct Follower {
    position: Lsn,
    gap: Option<Lsn>,
    open: Option<Open>,
    pieces: Option<Pieces>,
    known: Known,
}

impl Follower {
    /// Stands at `position`: everything that commits below is had already.
    pub fn new(position: Lsn) -> Follower {
        Follower { position, ..Follower::default() }
    }

    /// Exclusive end of what was taken, in whole transactions.
    pub fn position(&self) -> Lsn {
        self.position
    }

    /// Where the last record began, if that is beyond the position: unless a later one mends it,
    /// what lies between is not there.
    pub fn gap(&self) -> Option<Lsn> {
        self.gap
    }

    /// Goes over a gap, for who only looks where the records end.
    pub fn jump(&mut self) {
        if let Some(lsn) = self.gap.take() {
            (self.position, self.open) = (lsn, None);
        }
    }

    /// Takes the next record. `None` for one that adds nothing: begun below the position, no part
    /// of the transaction that counts, or beyond a gap.
    pub fn take(&mut self, envelope: v1::Envelope) -> Result<Option<Item>, Unreadable> {
        let previous_lsn = Lsn(envelope.previous_lsn);
        if previous_lsn > self.position {
            self.gap = Some(previous_lsn);
            return Ok(None);
        }
        self.gap = None;
        let writer_id = envelope.writer_id;
        match envelope.content {
            None => Err(Unreadable::Detail("a record of an unknown kind".to_string())),
            Some(Content::Opening(_)) => Ok(None),
            Some(Content::Idle(idle)) => Ok(self.idle(Lsn(idle.lsn))),
            Some(Content::Chunk(chunk)) => Ok(self.chunk(writer_id, chunk)?),
            Some(Content::Fragment(fragment)) => match self.piece(writer_id, fragment) {
                None => Ok(None),
                Some(whole) => {
                    let chunk = v1::Chunk::decode(Bytes::from(whole));
                    let chunk = chunk.map_err(|e| Unreadable::Detail(e.to_string()))?;
                    Ok(self.chunk(writer_id, chunk)?)
                }
            },
        }
    }

    fn idle(&mut self, lsn: Lsn) -> Option<Item> {
        if lsn <= self.position {
            return None;
        }
        (self.position, self.open) = (lsn, None);
        Some(Item::Idle { lsn })
    }

    fn chunk(&mut self, writer_id: u64, chunk: v1::Chunk) -> Result<Option<Item>, String> {
        let begin = read_begin(&chunk)?;
        if begin.commit_lsn < self.position {
            return Ok(None);
        }
        let continues = self.open.as_ref().is_some_and(|open| {
            open.writer_id == writer_id && open.next == chunk.number && open.begin.xid == begin.xid
        });
        let begin = match &self.open {
            _ if chunk.number == 0 => Arc::new(begin),
            Some(open) if continues => open.begin.clone(),
            _ => return Ok(None),
        };
        let chunk = read_chunk(chunk, writer_id, begin.clone(), &mut self.known)?;
        self.open = match &chunk.commit {
            None => Some(Open { writer_id, begin, next: chunk.number.saturating_add(1) }),
            Some(commit) => {
                self.position = self.position.max(commit.end_lsn);
                None
            }
        };
        Ok(Some(Item::Chunk(chunk)))
    }

    fn piece(&mut self, writer_id: u64, fragment: v1::Fragment) -> Option<Vec<u8>> {
        if fragment.index == 0 {
            self.pieces = Some(Pieces { writer_id, next: 0, bytes: Vec::new() });
        }
        let pieces = self.pieces.as_mut()?;
        if pieces.writer_id != writer_id || pieces.next != fragment.index {
            return None;
        }
        pieces.next = pieces.next.saturating_add(1);
        pieces.bytes.extend_from_slice(&fragment.content);
        if fragment.last { self.pieces.take().map(|pieces| pieces.bytes) } else { None }
    }
}
