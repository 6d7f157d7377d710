//! Files for the changes of transactions that have not committed yet, in the spool's frames.
//!
//! They have no name: each is unlinked as soon as it is open. What is in them comes again from the
//! source after any crash, so the best thing that can happen to it then is that nobody has to look
//! for it. Nothing is synced for the same reason.
//!
//! Bytes of all of them together are bounded. One that would go beyond, or that the disk has no
//! room for, is refused; the refusal is remembered, for whoever opens the stream next.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use bytes::Bytes;

use super::encode::{self, Described, Relations};
use super::frame::{self, Head, Place, Says};
use crate::change::{self, Begin, Change, Chunk, Item, SpillFile};
use crate::clock::PgTimestamp;
use crate::lsn::Lsn;

/// A directory for them, and how much they may take.
#[derive(Debug)]
pub struct Spill {
    dir: PathBuf,
    limit_bytes: u64,
    used: Arc<Used>,
}

#[derive(Debug, Default)]
struct Used {
    bytes: AtomicU64,
    refused: AtomicBool,
}

impl Spill {
    /// Files in `dir`, which is made when the first of them is, of `limit_bytes` in sum.
    pub fn new(dir: impl Into<PathBuf>, limit_bytes: u64) -> Spill {
        Spill { dir: dir.into(), limit_bytes, used: Arc::default() }
    }

    /// Bytes of all files.
    pub fn bytes(&self) -> u64 {
        self.used.bytes.load(Ordering::Relaxed)
    }

    /// True once after a file could not be made or written.
    pub fn take_refused(&self) -> bool {
        self.used.refused.swap(false, Ordering::Relaxed)
    }

    fn open(&self) -> io::Result<File> {
        std::fs::create_dir_all(&self.dir)?;
        let name = format!("walferry-{}-{:016x}.spill", std::process::id(), fastrand::u64(..));
        let path = self.dir.join(name);
        let file = OpenOptions::new().create_new(true).read(true).write(true).open(&path)?;
        std::fs::remove_file(&path)?;
        Ok(file)
    }
}

impl change::Spill for Spill {
    fn create(&self) -> io::Result<Box<dyn SpillFile>> {
        let opened = self.open().map_err(|error| named(&self.dir, &error));
        let file = opened.inspect_err(|_| self.used.refused.store(true, Ordering::Relaxed))?;
        Ok(Box::new(Unnamed {
            dir: self.dir.clone(),
            file,
            used: self.used.clone(),
            limit_bytes: self.limit_bytes,
            described: Described::default(),
            known: Relations::new(),
            pieces: Vec::new(),
            end: 0,
        }))
    }
}

/// An I/O error says nothing of where it was.
fn named(dir: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", dir.display()))
}

/// One file.
struct Unnamed {
    dir: PathBuf,
    file: File,
    used: Arc<Used>,
    limit_bytes: u64,
    described: Described,
    known: Relations,
    pieces: Vec<Piece>,
    end: u64,
}

/// Where a piece begins, and how many relations had been described then.
#[derive(Clone, Copy)]
struct Piece {
    offset: u64,
    described: usize,
}

impl Unnamed {
    fn write(&mut self, framed: &[u8]) -> io::Result<()> {
        let bytes = framed.len() as u64;
        let before = self.used.bytes.fetch_add(bytes, Ordering::Relaxed);
        let written = match before + bytes > self.limit_bytes {
            true => Err(io::Error::new(
                ErrorKind::StorageFull,
                format!("the limit of {} bytes is reached", self.limit_bytes),
            )),
            false => self.file.write_all_at(framed, self.end),
        };
        if let Err(error) = written {
            self.used.bytes.fetch_sub(bytes, Ordering::Relaxed);
            self.used.refused.store(true, Ordering::Relaxed);
            return Err(named(&self.dir, &error));
        }
        self.end += bytes;
        Ok(())
    }

    /// Bytes from one offset to another, as an item.
    fn item(&mut self, place: Place, end: u64) -> Result<Item, String> {
        let mut bytes = vec![0; (end - place.offset) as usize];
        self.file.read_exact_at(&mut bytes, place.offset).map_err(|e| e.to_string())?;
        let head = Head::read(place, &bytes)?;
        let stored = Bytes::from(bytes).split_off(frame::HEADER);
        head.check(place, &stored)?;
        encode::read(head.item(stored)?, &mut self.known).map_err(|e| e.to_string())
    }
}

/// As it would be in the log, but that nothing is known of it yet but its changes.
fn item(changes: Vec<Change>) -> Item {
    let (commit_lsn, commit_time) = (Lsn::ZERO, PgTimestamp::default());
    let ending = Default::default();
    let begin = Begin { xid: 0, commit_lsn, commit_time, origin: None, ending };
    Item::Chunk(Chunk { begin: Arc::new(begin), number: 0, changes, commit: None, bytes: 0 })
}

impl SpillFile for Unnamed {
    fn append(&mut self, piece: &[Change]) -> io::Result<()> {
        let before = self.described.len();
        let mut raw = Vec::new();
        // A change is a few reference counts; its bytes are not copied.
        encode::write(&item(piece.to_vec()), &mut self.described, &mut raw);
        let place = Place { segment: 0, offset: self.end };
        let says = Says { synced: 0, end_lsn: None, open: true };
        let mut framed = Vec::new();
        let written = frame::write(place, says, &raw, &mut framed).map_err(io::Error::other);
        if let Err(error) = written.and_then(|()| self.write(&framed)) {
            self.described.shrink_to(before);
            return Err(error);
        }
        self.known.extend(self.described.since(before));
        self.pieces.push(Piece { offset: place.offset, described: before });
        Ok(())
    }

    fn read(&mut self, index: usize) -> io::Result<Vec<Change>> {
        let begin = self.pieces.get(index).map(|piece| piece.offset);
        let end = self.pieces.get(index + 1).map_or(self.end, |piece| piece.offset);
        let place = begin.map(|offset| Place { segment: 0, offset });
        let read = place.map(|place| self.item(place, end));
        match read {
            Some(Ok(Item::Chunk(chunk))) => Ok(chunk.changes),
            Some(Err(detail)) => {
                let detail = format!("{}: piece {index}: {detail}", self.dir.display());
                Err(io::Error::new(ErrorKind::InvalidData, detail))
            }
            None | Some(Ok(Item::Idle { .. })) => {
                Err(io::Error::new(ErrorKind::InvalidInput, "there is no such piece"))
            }
        }
    }

    fn truncate(&mut self, count: usize) -> io::Result<()> {
        let Some(first) = self.pieces.get(count).copied() else { return Ok(()) };
        self.file.set_len(first.offset).map_err(|error| named(&self.dir, &error))?;
        self.used.bytes.fetch_sub(self.end - first.offset, Ordering::Relaxed);
        self.end = first.offset;
        self.pieces.truncate(count);
        self.described.shrink_to(first.described);
        self.known.retain(|id, _| (*id as usize) < first.described);
        Ok(())
    }
}

impl Drop for Unnamed {
    fn drop(&mut self) {
        self.used.bytes.fetch_sub(self.end, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buffer::contract;
    use crate::change::Spill as _;

    fn dir() -> PathBuf {
        std::env::temp_dir().join(format!("walferry-spill-{:016x}", fastrand::u64(..)))
    }

    /// Changes of rows, of relations of their own.
    fn piece(number: u64) -> Vec<Change> {
        let items = contract::samples(&mut fastrand::Rng::with_seed(number), 30).into_iter();
        items.flat_map(|item| if let Item::Chunk(c) = item { c.changes } else { vec![] }).collect()
    }

    #[test]
    fn pieces_come_back_as_they_were_and_no_file_has_a_name() {
        let spill = Spill::new(dir(), 1 << 30);
        let mut file = spill.create().unwrap();
        for number in 0..40 {
            file.append(&piece(number)).unwrap();
        }
        assert_eq!(std::fs::read_dir(&spill.dir).unwrap().count(), 0);
        assert_eq!(file.read(7).unwrap(), piece(7));
        file.truncate(20).unwrap();
        assert!(file.read(20).is_err());
        for number in 100..110 {
            file.append(&piece(number)).unwrap();
        }
        for index in 0..30 {
            let number = if index < 20 { index } else { index + 80 };
            assert_eq!(file.read(index as usize).unwrap(), piece(number), "{index}");
        }
        assert!(spill.bytes() > 0);
        drop(file);
        assert_eq!(spill.bytes(), 0);
        std::fs::remove_dir(&spill.dir).unwrap();
    }

    #[test]
    fn beyond_the_limit_a_piece_is_refused_and_the_refusal_remembered_once() {
        let spill = Spill::new(dir(), 20_000);
        let (mut one, mut other) = (spill.create().unwrap(), spill.create().unwrap());
        let mut kept = 0;
        let error = loop {
            match one.append(&piece(kept)) {
                Ok(()) => kept += 1,
                Err(error) => break error,
            }
        };
        assert_eq!(error.kind(), ErrorKind::StorageFull, "{error}");
        assert!(kept > 0 && other.append(&piece(kept)).is_err());
        assert!(spill.take_refused() && !spill.take_refused());
        // What is there is whole, and room that is made is room.
        assert_eq!(one.read(kept as usize - 1).unwrap(), piece(kept - 1));
        one.truncate(1).unwrap();
        other.append(&piece(1)).unwrap();
        std::fs::remove_dir(&spill.dir).unwrap();
    }
}
