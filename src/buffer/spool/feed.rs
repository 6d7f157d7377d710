//! The reading end: a thread that reads files, and the queue it fills.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use tokio::runtime::Handle;

use super::disk::{Disk, DiskFile};
use super::encode::{self, Relations};
use super::error::{Error, Result};
use super::frame::{self, Head, Place};
use super::segment;
use super::writer::{Next, Shared};
use crate::buffer::memory;
use crate::change::{Feed, Item, Sink};
use crate::lsn::Lsn;

/// So much is read from a file at a time, where there is so much.
const READ_BYTES: u64 = 1 << 20;

/// Items read ahead of the applier, in bytes.
const AHEAD_BYTES: usize = 16 << 20;

/// Reads frames one after another. Blocking.
pub(super) struct Reader<D: Disk> {
    disk: Arc<D>,
    place: Place,
    file: Option<D::File>,
    /// Bytes of the file from `place.offset` on.
    ahead: Bytes,
    relations: Relations,
}

impl<D: Disk> Reader<D> {
    /// Begins with the frame at `body` of a segment.
    pub fn new(disk: Arc<D>, segment: u64, body: u64) -> Reader<D> {
        let place = Place { segment, offset: body };
        Reader { disk, place, file: None, ahead: Bytes::new(), relations: Relations::new() }
    }

    /// Where it stands: segment and offset.
    pub fn at(&self) -> (u64, u64) {
        (self.place.segment, self.place.offset)
    }

    /// Goes on with another segment.
    pub fn go_to(&mut self, segment: u64, body: u64) {
        *self = Reader::new(self.disk.clone(), segment, body);
    }

    /// The next item below `end` of this segment's file; `None` if there is no more.
    pub fn next(&mut self, end: u64) -> Result<Option<Item>> {
        while self.place.offset < end {
            self.have(frame::HEADER as u64, end)?;
            let head = Head::read(self.place, &self.ahead).map_err(|e| self.corrupt(e))?;
            self.have(head.size(), end)?;
            let mut stored = self.ahead.split_to(head.size() as usize);
            let stored = stored.split_off(frame::HEADER);
            head.check(self.place, &stored).map_err(|e| self.corrupt(e))?;
            let item = match head.mark {
                true => None,
                false => {
                    let raw = head.item(stored).map_err(|e| self.corrupt(e))?;
                    let item = encode::read(raw, &mut self.relations);
                    Some(item.map_err(|e| self.corrupt(&e.to_string()))?)
                }
            };
            self.place.offset += head.size();
            if item.is_some() {
                return Ok(item);
            }
        }
        Ok(None)
    }

    /// Sees to it that `want` bytes are at hand.
    fn have(&mut self, want: u64, end: u64) -> Result<()> {
        if self.ahead.len() as u64 >= want {
            return Ok(());
        }
        let left = end.saturating_sub(self.place.offset);
        if left < want {
            return Err(self.corrupt("the file ends inside a frame"));
        }
        let name = segment::name(self.place.segment);
        let fail = |error| Error::io("read", &*name, error);
        let file = match &mut self.file {
            Some(file) => file,
            None => self.file.insert(self.disk.open(&name).map_err(fail)?),
        };
        let mut bytes = vec![0; left.min(READ_BYTES.max(want)) as usize];
        let read = file.read_at(self.place.offset, &mut bytes).map_err(fail)?;
        bytes.truncate(read);
        self.ahead = Bytes::from(bytes);
        if self.ahead.len() as u64 >= want {
            return Ok(());
        }
        Err(self.corrupt("the file is shorter than it was"))
    }

    fn corrupt(&self, detail: &str) -> Error {
        Error::Corrupt {
            file: segment::name(self.place.segment),
            offset: self.place.offset,
            detail: detail.to_string(),
            dir: self.disk.place(),
        }
    }
}

/// True if the target has it already (law 3).
pub(super) fn is_below(item: &Item, lsn: Lsn) -> bool {
    match item {
        Item::Chunk(chunk) => chunk.begin.commit_lsn < lsn,
        Item::Idle { lsn: idle_lsn } => *idle_lsn <= lsn,
    }
}

/// The reading end of a spool. Dropping it leaves the spool as it is.
pub struct SpoolFeed {
    queue: memory::Receiver,
    shared: Arc<Shared>,
    stop: Arc<AtomicBool>,
}

impl SpoolFeed {
    pub(super) fn start<D: Disk>(
        reader: Reader<D>,
        from_lsn: Lsn,
        shared: Arc<Shared>,
    ) -> Result<SpoolFeed> {
        let (sender, queue) = memory::queue(AHEAD_BYTES);
        let stop = Arc::new(AtomicBool::new(false));
        let run = Run { shared: shared.clone(), stop: stop.clone(), from_lsn };
        let (handle, gauge) = (Handle::current(), queue.gauge());
        shared.attach(reader.at(), gauge);
        std::thread::Builder::new()
            .name("spool reader".to_string())
            .spawn(move || run.run(reader, sender, &handle))
            .map_err(|e| Error::io("start a thread for", "reading", e))?;
        Ok(SpoolFeed { queue, shared, stop })
    }
}

impl Feed for SpoolFeed {
    async fn pop(&mut self) -> Option<Item> {
        if let Some(item) = self.try_pop() {
            return Some(item);
        }
        self.queue.pop().await
    }

    fn try_pop(&mut self) -> Option<Item> {
        let item = self.queue.try_pop();
        if item.is_none() {
            self.shared.drained();
        }
        item
    }
}

impl Drop for SpoolFeed {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        self.shared.wake_reader();
    }
}

/// What the reading thread works with.
struct Run {
    shared: Arc<Shared>,
    stop: Arc<AtomicBool>,
    from_lsn: Lsn,
}

impl Run {
    fn run<D: Disk>(self, mut reader: Reader<D>, mut queue: memory::Sender, handle: &Handle) {
        if let Err(error) = self.read(&mut reader, &mut queue, handle) {
            self.shared.fail(error);
        }
    }

    fn read<D: Disk>(
        &self,
        reader: &mut Reader<D>,
        queue: &mut memory::Sender,
        handle: &Handle,
    ) -> Result<()> {
        loop {
            match self.shared.next(reader.at(), &self.stop) {
                Next::Frames { end } => match self.frames(reader, end, queue, handle) {
                    Ok(true) => {}
                    Ok(false) => return Ok(()),
                    // A reader that begins where the target stands, or that nobody listens to any
                    // more, may come to a segment that is just being removed.
                    Err(error) if error.is_gone() && self.shared.is_released(reader.at().0) => {
                        reader.go_to(reader.at().0, u64::MAX);
                    }
                    Err(error) => return Err(error),
                },
                Next::Segment { number, body } => reader.go_to(number, body),
                Next::End => return Ok(()),
            }
        }
    }

    /// Hands on what the segment has up to `end`. False if nobody takes it any more.
    fn frames<D: Disk>(
        &self,
        reader: &mut Reader<D>,
        end: u64,
        queue: &mut memory::Sender,
        handle: &Handle,
    ) -> Result<bool> {
        while let Some(item) = reader.next(end)? {
            let unwanted = is_below(&item, self.from_lsn);
            if !unwanted && handle.block_on(queue.push(item)).is_err() {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::sync::mpsc;

    use super::super::disk::Directory;
    use super::super::log::Log;
    use super::super::power_tests::identity;
    use super::*;
    use crate::buffer::contract;

    /// Three segments or more, the first of which is removed behind the back of whoever reads: its
    /// name is gone, and what the ends share still has it. `released`: the target had all of it.
    async fn first_segment_gone(released: bool) -> (Vec<Item>, Lsn, Arc<Shared>) {
        let name = format!("walferry-feed-{:016x}", fastrand::u64(..));
        let dir: PathBuf = std::env::temp_dir().join(name);
        let disk = Arc::new(Directory::open(&dir).unwrap().unwrap());
        let mut log = Log::open(disk.clone(), identity(), 2000).unwrap();
        for number in 1..=12 {
            log.append(&contract::item(number, 400)).unwrap();
        }
        log.sync().unwrap();
        let first = log.segments().front().unwrap().clone();
        assert!(log.segments().len() > 2);
        let (orders, _taken) = mpsc::channel();
        let shared = Arc::new(Shared::new(1 << 30, &log, orders));
        if released {
            shared.release(first.end_lsn);
        }
        std::fs::remove_file(dir.join(segment::name(first.number))).unwrap();
        let reader = Reader::new(disk, first.number, first.body);
        let mut feed = SpoolFeed::start(reader, Lsn::ZERO, shared.clone()).unwrap();
        shared.sink_gone();
        let mut items = Vec::new();
        while let Some(item) = feed.pop().await {
            items.push(item);
        }
        std::fs::remove_dir_all(dir).unwrap();
        (items, first.end_lsn, shared)
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_segment_removed_just_before_it_is_read_is_passed_over() {
        let (items, from_lsn, shared) = first_segment_gone(true).await;
        assert!(shared.failure().is_none(), "{:?}", shared.failure());
        let ends: Vec<Lsn> = items.iter().filter_map(Item::end_lsn).collect();
        let expected = (1..=12).map(|number| Lsn(number * 2 + 1));
        assert_eq!(ends, expected.filter(|lsn| *lsn > from_lsn).collect::<Vec<_>>());
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_segment_that_is_gone_and_was_needed_is_an_error() {
        let (items, _, shared) = first_segment_gone(false).await;
        assert!(items.is_empty() && shared.failure().is_some(), "{items:?}");
    }
}
