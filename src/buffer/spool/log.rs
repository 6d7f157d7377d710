//! The log itself: appends, syncs, rolls, removes, and opens again after a crash. Blocking, and
//! without threads, so that a test can stop it between any two calls.
//!
//! Two orders hold it together. A segment is durable whole before the next one is made, so only the
//! last can be torn. Segments go from the head one by one, each removal durable before the next, so
//! no hole can appear.

use std::collections::VecDeque;
use std::sync::Arc;

use super::disk::{Disk, DiskFile};
use super::encode::{self, Described};
use super::error::{Error, Result};
use super::frame::{self, Place, Says};
use super::segment::{self, Header, Identity, Look};
use crate::change::Item;
use crate::lsn::Lsn;

/// A segment that is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    pub number: u64,
    /// See [`Header::first_lsn`].
    pub first_lsn: Lsn,
    /// It begins inside a transaction.
    pub inside: bool,
    /// Where its frames begin, in bytes.
    pub body: u64,
    /// Length of its file.
    pub bytes: u64,
    /// Position reached at its end.
    pub end_lsn: Lsn,
    /// It ends inside a transaction that goes on in the next.
    pub open: bool,
}

/// The file being written.
struct Current<F> {
    file: F,
    described: Described,
    synced: u64,
}

/// Of the two scratch buffers, so much is kept between items.
const KEEP_BYTES: usize = 4 << 20;

/// A stream's segments on one disk.
pub(super) struct Log<D: Disk> {
    disk: Arc<D>,
    identity: Identity,
    segment_bytes: u64,
    segments: VecDeque<Segment>,
    current: Option<Current<D::File>>,
    next_number: u64,
    end_lsn: Lsn,
    /// Where the next segment begins if the log is to jump ahead.
    jump_lsn: Option<Lsn>,
    open: bool,
    durable_lsn: Lsn,
    /// Names were made that are not durable.
    names_dirty: bool,
    /// The last frame is a mark.
    marked: bool,
    raw: Vec<u8>,
    framed: Vec<u8>,
}

impl<D: Disk> Log<D> {
    /// Opens what is there, cutting a torn tail. All that is left is durable on return.
    pub fn open(disk: Arc<D>, identity: Identity, segment_bytes: u64) -> Result<Log<D>> {
        let mut log = Log {
            disk,
            identity,
            segment_bytes,
            segments: VecDeque::new(),
            current: None,
            next_number: 1,
            end_lsn: Lsn::ZERO,
            jump_lsn: None,
            open: false,
            durable_lsn: Lsn::ZERO,
            names_dirty: false,
            marked: true,
            raw: Vec::new(),
            framed: Vec::new(),
        };
        let mut numbers = log.numbers()?;
        while let Some(last) = numbers.last().copied() {
            match segment::look(&*log.disk, last)? {
                Look::Whole(_) => break,
                Look::Torn(torn) => log.drop_torn(last, torn)?,
            }
            numbers.pop();
        }
        log.load(&numbers)?;
        log.drop_rests()?;
        log.durable_lsn = log.end_lsn;
        Ok(log)
    }

    /// Removes a head that has only the rest of a transaction, as a crash in [`Self::release`]
    /// leaves it. If that was no crash, what follows begins later than it is to be read from, which
    /// is seen.
    fn drop_rests(&mut self) -> Result<()> {
        while self.segments.front().is_some_and(|front| front.inside) {
            self.remove_front()?;
            if self.segments.is_empty() {
                (self.end_lsn, self.open) = (Lsn::ZERO, false);
            }
        }
        Ok(())
    }

    fn numbers(&self) -> Result<Vec<u64>> {
        let names = self.disk.list().map_err(|e| Error::io("list", self.disk.place(), e))?;
        let mut numbers: Vec<u64> = names.iter().filter_map(|name| segment::number(name)).collect();
        numbers.sort_unstable();
        for pair in numbers.windows(2) {
            if let [one, next] = pair
                && one + 1 != *next
            {
                let file = segment::name(one + 1);
                return Err(Error::Missing { file, dir: self.disk.place() });
            }
        }
        Ok(numbers)
    }

    /// The power went before the last segment had its header; damage if it had more than that.
    fn drop_torn(&mut self, number: u64, torn: &'static str) -> Result<()> {
        if segment::check_tail(&*self.disk, number, 0).is_err() {
            return Err(self.corrupt(number, 0, torn));
        }
        self.remove_file(number)
    }

    fn corrupt(&self, number: u64, offset: u64, detail: &str) -> Error {
        let (file, dir) = (segment::name(number), self.disk.place());
        Error::Corrupt { file, offset, detail: detail.to_string(), dir }
    }

    fn load(&mut self, numbers: &[u64]) -> Result<()> {
        for number in numbers {
            let found = match segment::look(&*self.disk, *number)? {
                Look::Whole(found) => found,
                Look::Torn(torn) => return Err(self.corrupt(*number, 0, torn)),
            };
            let header = found.header;
            header.check(&segment::name(*number), &self.disk.place(), &self.identity)?;
            if let Some(prior) = self.segments.back_mut() {
                (prior.end_lsn, prior.open) = (header.prior_end_lsn, header.inside);
                if prior.bytes != header.prior_bytes {
                    let (number, bytes) = (prior.number, prior.bytes);
                    let detail = format!("it had {} bytes when it was closed", header.prior_bytes);
                    return Err(self.corrupt(number, bytes.min(header.prior_bytes), &detail));
                }
            }
            self.segments.push_back(Segment {
                number: *number,
                first_lsn: header.first_lsn,
                inside: header.inside,
                body: found.body,
                bytes: found.bytes,
                end_lsn: header.first_lsn,
                open: false,
            });
        }
        self.load_tail()
    }

    fn load_tail(&mut self) -> Result<()> {
        let Some(last) = self.segments.back_mut() else { return Ok(()) };
        let file = segment::name(last.number);
        let tail = segment::check_tail(&*self.disk, last.number, last.body)?;
        let mut open = self.disk.open(&file).map_err(|e| Error::io("open", &*file, e))?;
        if tail.end < last.bytes {
            open.cut(tail.end).map_err(|e| Error::io("cut the torn end of", &*file, e))?;
        }
        // What a killed process had written and not synced is whole, and not yet durable.
        open.sync().map_err(|e| Error::io("sync", &*file, e))?;
        self.disk.sync_dir().map_err(|e| Error::io("sync", self.disk.place(), e))?;
        last.bytes = tail.end;
        last.end_lsn = tail.end_lsn.unwrap_or(last.first_lsn);
        self.end_lsn = last.end_lsn;
        self.next_number = last.number + 1;
        Ok(())
    }

    /// Exclusive end of the whole transactions and idle positions in it; `0/0` if it is empty.
    pub fn end_lsn(&self) -> Lsn {
        self.end_lsn
    }

    /// The same, of what no power cut can take back.
    pub fn durable_lsn(&self) -> Lsn {
        self.durable_lsn
    }

    /// True if something was appended that is not durable.
    pub fn is_dirty(&self) -> bool {
        let written = self.segments.back().map_or(0, |segment| segment.bytes);
        self.current.as_ref().is_some_and(|current| current.synced < written)
    }

    /// Bytes appended that are not durable.
    pub fn dirty_bytes(&self) -> u64 {
        let written = self.segments.back().map_or(0, |segment| segment.bytes);
        self.current.as_ref().map_or(0, |current| written - current.synced)
    }

    /// Length of all files.
    pub fn bytes(&self) -> u64 {
        self.segments.iter().map(|segment| segment.bytes).sum()
    }

    /// All that are there, oldest first.
    pub fn segments(&self) -> &VecDeque<Segment> {
        &self.segments
    }

    /// The log is to go on at `lsn`, beyond its end: what lies between is on the target already.
    /// An empty log begins there.
    pub fn jump(&mut self, lsn: Lsn) {
        self.end_lsn = lsn;
        self.durable_lsn = lsn;
        self.jump_lsn = Some(lsn);
        self.open = false;
    }

    /// Removes everything; the log is empty then.
    pub fn clear(&mut self) -> Result<()> {
        self.current = None;
        while let Some(number) = self.segments.front().map(|segment| segment.number) {
            self.remove_file(number)?;
            self.segments.pop_front();
        }
        (self.end_lsn, self.durable_lsn, self.open) = (Lsn::ZERO, Lsn::ZERO, false);
        Ok(())
    }

    /// Appends an item. After an error nothing of it is in the log, and it can be tried again.
    pub fn append(&mut self, item: &Item) -> Result<()> {
        let begins = !matches!(item, Item::Chunk(chunk) if chunk.number > 0);
        if begins {
            self.open = false;
        }
        let full = self.segments.back().is_some_and(|last| last.bytes >= self.segment_bytes);
        if self.current.is_none() || full || self.jump_lsn.is_some() {
            self.roll()?;
        }
        let (Some(current), Some(last)) = (&mut self.current, self.segments.back_mut()) else {
            return Ok(());
        };
        self.raw.clear();
        let described = current.described.len();
        encode::write(item, &mut current.described, &mut self.raw);
        let (end_lsn, open) = (item.end_lsn(), item.end_lsn().is_none());
        let framed = put(current, last, (end_lsn, open), &self.raw, &mut self.framed);
        // One huge value must not keep its memory for ever.
        self.raw.shrink_to(KEEP_BYTES);
        self.framed.shrink_to(KEEP_BYTES);
        if let Err(error) = framed {
            current.described.shrink_to(described);
            return Err(error);
        }
        self.marked = false;
        (last.open, self.open) = (open, open);
        if let Some(end_lsn) = end_lsn {
            (last.end_lsn, self.end_lsn) = (end_lsn, end_lsn);
        }
        Ok(())
    }

    /// Says in the log itself that all of it is durable, once it is. Nothing if it says so already.
    pub fn mark(&mut self) -> Result<()> {
        self.sync()?;
        if let (Some(current), Some(last), false) =
            (&mut self.current, self.segments.back_mut(), self.marked)
        {
            put(current, last, (None, self.open), &[], &mut self.framed)?;
            self.marked = true;
            self.sync()?;
        }
        Ok(())
    }

    /// Begins a new segment, once the one before is durable whole.
    fn roll(&mut self) -> Result<()> {
        self.sync()?;
        self.current = None;
        let first_lsn = self.jump_lsn.unwrap_or(self.end_lsn);
        if let Some(prior) = self.segments.back_mut() {
            // A transaction that was cut is not continued.
            prior.open = self.open;
        }
        let header = Header {
            number: self.next_number,
            first_lsn,
            prior_end_lsn: self.segments.back().map_or(first_lsn, |prior| prior.end_lsn),
            prior_bytes: self.segments.back().map_or(0, |prior| prior.bytes),
            inside: self.open,
            identity: self.identity.clone(),
        };
        let file = segment::name(header.number);
        let mut open = self.disk.create(&file).map_err(|e| Error::io("create", &*file, e))?;
        let bytes = header.write();
        if let Err(error) = open.append(&bytes) {
            self.remove_file(header.number)?;
            return Err(Error::io("write", file, error));
        }
        self.names_dirty = true;
        self.jump_lsn = None;
        self.next_number += 1;
        self.segments.push_back(Segment {
            number: header.number,
            first_lsn,
            inside: header.inside,
            body: bytes.len() as u64,
            bytes: bytes.len() as u64,
            end_lsn: first_lsn,
            open: header.inside,
        });
        self.current = Some(Current { file: open, described: Described::default(), synced: 0 });
        Ok(())
    }

    /// Makes all that was appended durable. After an error nothing appended since the last sync is
    /// in the log any more: a file whose sync failed cannot be trusted to hold it.
    pub fn sync(&mut self) -> Result<()> {
        let (Some(current), Some(last)) = (&mut self.current, self.segments.back()) else {
            return Ok(());
        };
        let file = segment::name(last.number);
        if current.synced < last.bytes
            && let Err(error) = current.file.sync()
        {
            // Even a sync that works the second time says nothing of what the first one dropped.
            let _ = current.file.cut(current.synced.max(last.body));
            return Err(Error::Io { doing: "sync", file, source: Arc::new(error) });
        }
        if self.names_dirty {
            self.disk.sync_dir().map_err(|e| Error::io("sync", self.disk.place(), e))?;
            self.names_dirty = false;
        }
        current.synced = last.bytes;
        self.durable_lsn = self.end_lsn;
        Ok(())
    }

    /// Removes whole segments from the head that end at or below `lsn`, which is durable on the
    /// target. One that ends inside a transaction goes with those that have the rest of it. The one
    /// being written stays until it is full, unless `all`. Gives how many went.
    pub fn release(&mut self, lsn: Lsn, all: bool) -> Result<usize> {
        let last = self.segments.len().checked_sub(1);
        let mut go = 0;
        for (index, segment) in self.segments.iter().enumerate() {
            let written = Some(index) == last && self.current.is_some();
            let stays = written && !all && segment.bytes < self.segment_bytes;
            // A log that is opened again counts the segments from the one that is there.
            if stays || segment.end_lsn > lsn {
                break;
            }
            if !segment.open {
                go = index + 1;
            }
        }
        for _ in 0..go {
            self.remove_front()?;
        }
        Ok(go)
    }

    fn remove_front(&mut self) -> Result<()> {
        let Some(number) = self.segments.front().map(|front| front.number) else { return Ok(()) };
        if self.segments.len() == 1 {
            self.current = None;
        }
        self.remove_file(number)?;
        self.segments.pop_front();
        Ok(())
    }

    fn remove_file(&mut self, number: u64) -> Result<()> {
        let file = segment::name(number);
        match self.disk.remove(&file) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::io("remove", file, error));
            }
            _ => {}
        }
        self.disk.sync_dir().map_err(|e| Error::io("sync", self.disk.place(), e))
    }
}

/// Appends one frame. After an error the file is as it was before.
fn put<F: DiskFile>(
    current: &mut Current<F>,
    last: &mut Segment,
    (end_lsn, open): (Option<Lsn>, bool),
    raw: &[u8],
    framed: &mut Vec<u8>,
) -> Result<()> {
    framed.clear();
    let place = Place { segment: last.number, offset: last.bytes };
    frame::write(place, Says { synced: current.synced, end_lsn, open }, raw, framed)?;
    if let Err(error) = current.file.append(framed) {
        let file = segment::name(last.number);
        current.file.cut(last.bytes).map_err(|e| Error::Io {
            doing: "take back what was written in part to",
            file: file.clone(),
            source: Arc::new(e),
        })?;
        return Err(Error::io("write", file, error));
    }
    last.bytes += framed.len() as u64;
    Ok(())
}
