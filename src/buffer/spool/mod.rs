//! A buffer on a local disk: a log of segment files.
//!
//! It exists so that a source need not keep WAL while the target is away, slow, or still being
//! copied to. What it holds durably the slot may be told of, and is told of only when the source
//! keeps too much WAL; until then the source could still send everything again, and a lost spool
//! costs nothing.
//!
//! # Steps
//! 1. [`Spool::open`] locks the directory, checks that the segments there are this stream's and
//!    whole, and cuts a torn tail. [`Spool::end_lsn`] is where the source is to be read from.
//! 2. [`SpoolSink`] hands items to the writing thread (`writer`), which appends frames to the `log`
//!    and syncs once for all that came within 20 ms. [`Spool::durable`] publishes how far.
//! 3. [`SpoolFeed`], opened at the target's progress, gives what was written, durable or not: a
//!    thread reads the files (`feed`), mostly from the page cache. What the target then has and a
//!    power cut takes from the spool is skipped by its position (law 3).
//! 4. [`Spool::release`] is told what is durable on the target; whole segments below go.
//!
//! `segment` and `frame` are the format, `encode` the items in it, `disk` all that touches a file
//! system: a trait, so that a test can cut the power anywhere. `spill` has files of the same frames
//! that are no part of the log: changes of transactions that have not committed yet.
//!
//! # When full
//! From four fifths of the limit on pushes are slowed, the more the fuller it is, so that the
//! applier gets ahead. At the limit they wait: the reader stops reading, feedback goes on, and WAL
//! stays on the source. The same where the disk is full. A transaction larger than the limit is let
//! in beyond it once everything before has been read, as it could never be applied otherwise.
//!
//! # What survives a crash
//! Everything up to the durable position, in order; mostly more. Segments are durable whole before
//! the next is begun, so only the last can be torn; it is cut behind its last whole frame. Every
//! frame says how much of its file was durable when it was written, so a frame that does not check
//! below that is no torn tail but damage: an error with file and offset. Damage in what was synced
//! last, within half a second and by nothing followed, looks like a torn tail and is cut; then the
//! spool ends before what the slot was told, and whoever opens the stream finds that (law 4).
//! A sync that fails ends the spool's life in this process: what it should have made durable is
//! cut.
//!
//! ```text
//! slot told        500 (WAL below is gone from the source)
//! segments      [300 ... 420][420 ... 560][560 ... 610 tor|n
//! progress            400: feed begins in the first segment, skips to 400
//! source read from 610 on, after opening again
//! ```
//!
//! Left out: more than one stream in a log, and reading it from another process.

mod disk;
mod encode;
mod error;
mod feed;
mod frame;
mod log;
mod segment;
mod spill;
mod writer;

#[cfg(test)]
mod bits_tests;
#[cfg(test)]
mod power_tests;
#[cfg(test)]
mod sim_tests;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::sync::watch;

pub use disk::{Directory, Disk, DiskFile};
pub use error::{Error, Result};
pub use feed::SpoolFeed;
pub use segment::Identity;
pub use spill::Spill;

use crate::change::{Item, Sink, SinkClosed};
use crate::lsn::Lsn;
use feed::Reader;
use log::{Log, Segment};
use writer::{Admission, Shared, Writer};

/// A segment is closed at this many bytes: large enough that making one costs nothing, small enough
/// that little stays behind what was released.
pub const SEGMENT_BYTES: u64 = 64 << 20;

/// From here on pushes are slowed.
const THROTTLE_FROM: f64 = 0.8;

/// How fast a spool that has just begun to throttle still takes items, bytes a second.
const THROTTLE_RATE: f64 = 64e6;

/// And one that is all but full.
const THROTTLE_RATE_MIN: f64 = 1e6;

/// Where a spool is, whose, and how large.
#[derive(Clone, Debug)]
pub struct Options {
    /// Its directory; made if it is not there.
    pub dir: PathBuf,
    /// Whose it is.
    pub identity: Identity,
    /// Bytes of files and of items on their way into them; see "When full".
    pub limit_bytes: u64,
    /// See [`SEGMENT_BYTES`].
    pub segment_bytes: u64,
}

impl Options {
    /// With segments that suit the limit.
    pub fn new(dir: impl Into<PathBuf>, identity: Identity, limit_bytes: u64) -> Options {
        let segment_bytes = SEGMENT_BYTES.min(limit_bytes / 8);
        Options { dir: dir.into(), identity, limit_bytes, segment_bytes }
    }
}

/// One stream's spool, open. Dropping it lets the writing thread end by itself.
pub struct Spool {
    shared: Arc<Shared>,
    disk: Arc<Directory>,
    durable: watch::Receiver<Lsn>,
    thread: Option<JoinHandle<()>>,
}

/// What a spool holds, by position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Coverage {
    /// Everything that commits from here on ...
    pub first_lsn: Lsn,
    /// ... to here (exclusive) is in it.
    pub end_lsn: Lsn,
}

impl Spool {
    /// Opens the spool as it is, or makes an empty one. Blocks for as long as checking the last
    /// segment takes. Errors: damage, another stream's files, a directory that another process
    /// uses.
    pub fn open(options: &Options) -> Result<Spool> {
        let (disk, log) = open_log(options)?;
        Self::start(disk, log, options.limit_bytes)
    }

    /// Opens it to go on behind `progress_lsn`, the target's durable progress, when the slot was
    /// told `confirmed_lsn`: what only the spool can have must be in it (law 4). What it has and
    /// nobody can use any more is thrown away.
    pub fn open_at(options: &Options, progress_lsn: Lsn, confirmed_lsn: Lsn) -> Result<Opened> {
        let (disk, mut log) = open_log(options)?;
        let covered = coverage(log.segments(), progress_lsn);
        if confirmed_lsn > progress_lsn && covered.is_none_or(|c| c.end_lsn < confirmed_lsn) {
            let first = log.segments().front();
            let end_lsn = log.end_lsn();
            let held = first.map(|first| Coverage { first_lsn: first.first_lsn, end_lsn });
            return Ok(Opened::Lost(held));
        }
        match covered.filter(|covered| covered.end_lsn == log.end_lsn()) {
            // The target got ahead of it: a power cut took the end that was not durable yet.
            Some(covered) if covered.end_lsn < progress_lsn => log.jump(progress_lsn),
            Some(_) => {}
            // Empty, or of a time to which the target has gone back.
            None => {
                log.clear()?;
                log.jump(progress_lsn);
            }
        }
        Self::start(disk, log, options.limit_bytes).map(Opened::Open)
    }

    fn start(disk: Arc<Directory>, log: Log<Directory>, limit_bytes: u64) -> Result<Spool> {
        let (orders, taken) = mpsc::channel();
        let shared = Arc::new(Shared::new(limit_bytes, &log, orders));
        let durable = shared.durable.subscribe();
        let writer = Writer { log, shared: shared.clone(), orders: taken };
        let thread = std::thread::Builder::new()
            .name("spool writer".to_string())
            .spawn(move || writer.run())
            .map_err(|e| Error::io("start a thread for", "writing", e))?;
        Ok(Spool { shared, disk, durable, thread: Some(thread) })
    }

    /// The writing end. One at a time; items that the spool has already are dropped (law 3).
    pub fn sink(&self) -> SpoolSink {
        self.shared.sink_is_back();
        SpoolSink { shared: self.shared.clone(), debt: Duration::ZERO }
    }

    /// The reading end from a position on: the target's progress. One at a time; the spool does not
    /// mind its going, and gives everything from the new position to the next. Must be called
    /// within a runtime. Error: [`Error::Gap`] if the spool begins later.
    pub fn feed(&self, from_lsn: Lsn) -> Result<SpoolFeed> {
        let segments = self.shared.segments();
        let begin = segments.iter().rev().find(|s| !s.inside && s.first_lsn <= from_lsn);
        let reader = match (begin, segments.front()) {
            (Some(begin), _) => Reader::new(self.disk.clone(), begin.number, begin.body),
            (None, None) => Reader::new(self.disk.clone(), 0, 0),
            (None, Some(first)) => {
                return Err(Error::Gap {
                    dir: self.disk.place(),
                    first_lsn: first.first_lsn,
                    progress_lsn: from_lsn,
                });
            }
        };
        SpoolFeed::start(reader, from_lsn, self.shared.clone())
    }

    /// Exclusive end of what was pushed, in whole transactions: the source is read from here on.
    pub fn end_lsn(&self) -> Lsn {
        self.shared.pushed_lsn()
    }

    /// Exclusive end of what no power cut can take from it any more: what the slot may be told.
    pub fn durable(&self) -> watch::Receiver<Lsn> {
        self.durable.clone()
    }

    /// Everything below `lsn` is durable on the target and not needed here any more.
    pub fn release(&self, lsn: Lsn) {
        self.shared.release(lsn);
    }

    /// Bytes held: files, and what is on its way into them.
    pub fn bytes(&self) -> u64 {
        self.shared.bytes()
    }

    /// What ended it, if something did: then pushes are refused and feeds end.
    pub fn failure(&self) -> Option<Error> {
        self.shared.failure()
    }

    /// What it waits for, if it does: space on its disk.
    pub fn trouble(&self) -> Option<String> {
        self.shared.trouble()
    }

    /// Writes what was pushed, makes it durable, and ends the writing thread. Blocks.
    pub fn close(mut self) {
        self.shared.close();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Spool {
    fn drop(&mut self) {
        self.shared.close();
    }
}

/// What [`Spool::open_at`] found.
pub enum Opened {
    /// It can be gone on with.
    Open(Spool),
    /// The slot was told of positions that are neither on the target nor here. What is here, if
    /// anything.
    Lost(Option<Coverage>),
}

fn open_log(options: &Options) -> Result<(Arc<Directory>, Log<Directory>)> {
    let shown = error::shown(&options.dir);
    let opened = Directory::open(&options.dir);
    let opened = opened.map_err(|e| Error::io("open the directory", shown.clone(), e))?;
    let disk = Arc::new(opened.ok_or(Error::InUse { dir: shown })?);
    let log = Log::open(disk.clone(), options.identity.clone(), options.segment_bytes)?;
    Ok((disk, log))
}

/// The unbroken stretch of the log that has `from_lsn` in it or ends before it; `None` if there is
/// none.
fn coverage(segments: &VecDeque<Segment>, from_lsn: Lsn) -> Option<Coverage> {
    let mut found: Option<Coverage> = None;
    for segment in segments {
        match &mut found {
            Some(covered) if covered.end_lsn == segment.first_lsn => {
                covered.end_lsn = segment.end_lsn;
            }
            // The first, or behind a jump: what that left out was on the target then.
            _ if segment.first_lsn <= from_lsn => {
                let (first_lsn, end_lsn) = (segment.first_lsn, segment.end_lsn);
                found = Some(Coverage { first_lsn, end_lsn });
            }
            _ => break,
        }
    }
    found
}

/// Removes a spool's directory with all it holds; false if there was none. Blocks. An error if a
/// process uses it.
pub fn remove(dir: &Path) -> Result<bool> {
    if !dir.exists() {
        return Ok(false);
    }
    let shown = error::shown(dir);
    let opened = Directory::open(dir).map_err(|e| Error::io("open", shown.clone(), e))?;
    let lock = opened.ok_or(Error::InUse { dir: shown.clone() })?;
    std::fs::remove_dir_all(dir).map_err(|e| Error::io("remove", shown, e))?;
    drop(lock);
    Ok(true)
}

/// The writing end of a spool. `push` returns once the item is on its way, in order; whether it is
/// durable is told by [`Spool::durable`]. It is refused once the spool has failed or was closed,
/// not for want of a reader.
pub struct SpoolSink {
    shared: Arc<Shared>,
    /// Time not yet slept for what was let in while throttled.
    debt: Duration,
}

/// About what an item takes in a spool, in bytes; at least what it really takes.
pub fn cost(item: &Item) -> usize {
    // A segment's header is of about this size, and there may be one for each item.
    encode::size(item) + frame::HEADER + 192
}

impl SpoolSink {
    async fn throttle(&mut self, bytes: usize) {
        let over = (self.shared.fill() - THROTTLE_FROM) / (1.0 - THROTTLE_FROM);
        if over <= 0.0 {
            return;
        }
        let rate = (THROTTLE_RATE * (1.0 - over)).max(THROTTLE_RATE_MIN);
        self.debt += Duration::from_secs_f64(bytes as f64 / rate);
        if self.debt >= Duration::from_millis(2) {
            tokio::time::sleep(std::mem::take(&mut self.debt)).await;
        }
    }
}

impl Sink for SpoolSink {
    async fn push(&mut self, item: Item) -> std::result::Result<(), SinkClosed> {
        let bytes = cost(&item);
        self.throttle(bytes).await;
        let mut item = item;
        loop {
            match self.shared.admit(item, bytes) {
                Admission::In => return Ok(()),
                Admission::Closed => return Err(SinkClosed),
                Admission::Full(refused) => item = refused,
            }
            self.shared.room.notified().await;
        }
    }
}

impl Drop for SpoolSink {
    fn drop(&mut self) {
        self.shared.sink_gone();
    }
}
