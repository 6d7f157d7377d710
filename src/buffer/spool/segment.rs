//! A segment file: a header that says whose it is and where it stands, then frames.
//!
//! ```text
//! "WALFSPL\0"  version u32  length of what follows u32
//!     number u64  first_lsn u64  prior_end_lsn u64  prior_bytes u64  inside u8  timeline u32
//!     job text  stream text  system text  slot text  made_lsn u64
//! crc u32 of all before
//! ```
//! Segments are numbered without holes, and each header has the length of the file before it: a
//! file that lost its end, or is missing, is found.

use bytes::{Buf, BufMut};

use super::disk::{Disk, DiskFile};
use super::error::{Error, Result};
use super::frame::{self, Head, Place};
use crate::lsn::Lsn;

const MAGIC: &[u8; 8] = b"WALFSPL\0";
const VERSION: u32 = 1;
const FIXED: usize = 16;

/// More than any header takes: names are at most 63 bytes.
const HEADER_MAX: usize = 4096;

/// Whose spool it is. Equal in all its segments, but for the timeline, which a failover changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The job.
    pub job: String,
    /// `forward` or `reverse`.
    pub stream: String,
    /// System identifier of the server that is read.
    pub system: String,
    /// Its timeline when the stream began.
    pub timeline: u32,
    /// The slot.
    pub slot: String,
    /// The slot's consistent point: tells it from an earlier one of the same name. `0/0` if it is
    /// not known.
    pub made_lsn: Lsn,
}

/// A segment's header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub number: u64,
    /// Everything that commits at or after it, and before the end, is in the spool from here on.
    pub first_lsn: Lsn,
    /// Where the segment before ended. Below `first_lsn` if the target had got ahead of the spool.
    pub prior_end_lsn: Lsn,
    /// Length of the file before; 0 if this is the first.
    pub prior_bytes: u64,
    /// It begins inside a transaction.
    pub inside: bool,
    pub identity: Identity,
}

/// `0000000000000001.seg`
pub(super) fn name(number: u64) -> String {
    format!("{number:016}.seg")
}

/// The number in a segment's file name.
pub(super) fn number(name: &str) -> Option<u64> {
    let digits = name.strip_suffix(".seg").filter(|digits| digits.len() == 16)?;
    digits.parse().ok()
}

impl Header {
    /// The header as it stands at the file's beginning.
    pub fn write(&self) -> Vec<u8> {
        let mut body = Vec::with_capacity(256);
        body.put_u64(self.number);
        body.put_u64(self.first_lsn.0);
        body.put_u64(self.prior_end_lsn.0);
        body.put_u64(self.prior_bytes);
        body.put_u8(u8::from(self.inside));
        let Identity { job, stream, system, timeline, slot, made_lsn } = &self.identity;
        body.put_u32(*timeline);
        for text in [job, stream, system, slot] {
            body.put_u32(text.len() as u32);
            body.put_slice(text.as_bytes());
        }
        body.put_u64(made_lsn.0);
        let mut out = Vec::with_capacity(body.len() + 20);
        out.put_slice(MAGIC);
        out.put_u32(VERSION);
        out.put_u32(body.len() as u32);
        out.put_slice(&body);
        out.put_u32(crc32c::crc32c(&out));
        out
    }

    /// Reads the header at the beginning of `bytes`, and its length. `Ok(Err)`: it does not check.
    pub fn read(
        file: &str,
        bytes: &[u8],
    ) -> Result<std::result::Result<(Header, u64), &'static str>> {
        let Some((mut fixed, rest)) = bytes.split_at_checked(FIXED) else {
            return Ok(Err("it ends inside its header"));
        };
        if fixed.get(..MAGIC.len()) != Some(MAGIC) {
            return Ok(Err("it does not begin as a segment does"));
        }
        fixed.advance(MAGIC.len());
        let (version, len) = (fixed.get_u32(), fixed.get_u32() as usize);
        let body = rest.get(..len).zip(rest.get(len..len.saturating_add(4)));
        let Some((body, crc)) = body else { return Ok(Err("it ends inside its header")) };
        let checked = bytes.get(..FIXED + len).unwrap_or_default();
        if crc != crc32c::crc32c(checked).to_be_bytes() {
            return Ok(Err("its header does not check"));
        }
        if version != VERSION {
            return Err(Error::Version { file: file.to_string(), found: version, known: VERSION });
        }
        let header = Self::read_body(body);
        Ok(header.map(|header| (header, (FIXED + len + 4) as u64)).ok_or("its header is too short"))
    }

    fn read_body(mut body: &[u8]) -> Option<Header> {
        let number = body.try_get_u64().ok()?;
        let first_lsn = Lsn(body.try_get_u64().ok()?);
        let prior_end_lsn = Lsn(body.try_get_u64().ok()?);
        let prior_bytes = body.try_get_u64().ok()?;
        let inside = body.try_get_u8().ok()? != 0;
        let timeline = body.try_get_u32().ok()?;
        let mut text = || {
            let len = body.try_get_u32().ok()? as usize;
            let (text, rest) = body.split_at_checked(len)?;
            body = rest;
            String::from_utf8(text.to_vec()).ok()
        };
        let (job, stream, system, slot) = (text()?, text()?, text()?, text()?);
        let made_lsn = Lsn(body.try_get_u64().ok()?);
        let identity = Identity { job, stream, system, timeline, slot, made_lsn };
        Some(Header { number, first_lsn, prior_end_lsn, prior_bytes, inside, identity })
    }

    /// An error if the segment is not of the stream `expected`.
    pub fn check(&self, file: &str, dir: &str, expected: &Identity) -> Result<()> {
        let found = &self.identity;
        let made = (found.made_lsn.to_string(), expected.made_lsn.to_string());
        for (what, found, expected) in [
            ("job", &found.job, &expected.job),
            ("stream", &found.stream, &expected.stream),
            ("source's system identifier", &found.system, &expected.system),
            ("slot", &found.slot, &expected.slot),
            ("slot's first position", &made.0, &made.1),
        ] {
            if found != expected {
                return Err(Error::Foreign {
                    file: file.to_string(),
                    what,
                    found: found.clone(),
                    expected: expected.clone(),
                    dir: dir.to_string(),
                });
            }
        }
        Ok(())
    }
}

/// A segment's file, looked at from its beginning.
pub(super) struct Found {
    pub header: Header,
    /// Where frames begin.
    pub body: u64,
    /// Length of the file.
    pub bytes: u64,
}

/// What looking at a file gave.
pub(super) enum Look {
    /// A segment.
    Whole(Found),
    /// Its header does not check, for this reason.
    Torn(&'static str),
}

/// Reads a file's header.
pub(super) fn look<D: Disk>(disk: &D, number: u64) -> Result<Look> {
    let file = name(number);
    let fail = |error| Error::io("read", &*file, error);
    let mut open = disk.open(&file).map_err(fail)?;
    let bytes = open.size().map_err(fail)?;
    let mut start = vec![0; HEADER_MAX.min(bytes as usize)];
    let read = open.read_at(0, &mut start).map_err(fail)?;
    start.truncate(read);
    Ok(match Header::read(&file, &start)? {
        Ok((header, _)) if header.number != number => {
            let detail = format!("it is segment {} by its header", header.number);
            return Err(Error::Corrupt { file, offset: 0, detail, dir: disk.place() });
        }
        Ok((header, body)) => Look::Whole(Found { header, body, bytes }),
        Err(torn) => Look::Torn(torn),
    })
}

/// Where the last segment ends, as far as its frames are whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tail {
    /// In bytes.
    pub end: u64,
    /// The last position that a frame ended with, if one did.
    pub end_lsn: Option<Lsn>,
}

/// Checks every frame from `from` on. What follows the last whole frame is a torn tail, unless a
/// later frame says that it had been durable: then it is damage.
pub(super) fn check_tail<D: Disk>(disk: &D, number: u64, from: u64) -> Result<Tail> {
    let file = name(number);
    let fail = |error| Error::io("read", &*file, error);
    let mut open = disk.open(&file).map_err(fail)?;
    let mut bytes = vec![0; open.size().map_err(fail)? as usize];
    let read = open.read_at(0, &mut bytes).map_err(fail)?;
    bytes.truncate(read);
    let mut tail = Tail { end: from, end_lsn: None };
    let torn = loop {
        let place = Place { segment: number, offset: tail.end };
        let rest = bytes.get(tail.end as usize..).unwrap_or_default();
        if rest.is_empty() {
            return Ok(tail);
        }
        let head = match whole(place, rest) {
            Ok(head) => head,
            Err(torn) => break torn,
        };
        tail.end += head.size();
        tail.end_lsn = head.end_lsn.or(tail.end_lsn);
    };
    let place = Place { segment: number, offset: tail.end };
    let rest = bytes.get(tail.end as usize..).unwrap_or_default();
    let later = frame::candidates(place, rest).find(|(_, head)| u64::from(head.synced) > tail.end);
    match later {
        None => Ok(tail),
        Some((offset, head)) => Err(Error::Corrupt {
            file,
            offset: tail.end,
            detail: format!("{torn}, but {} bytes were durable by {offset}", head.synced),
            dir: disk.place(),
        }),
    }
}

/// The frame at the beginning of `bytes`, if it is whole.
fn whole(place: Place, bytes: &[u8]) -> std::result::Result<Head, &'static str> {
    let head = Head::read(place, bytes)?;
    let stored = bytes.get(frame::HEADER..head.size() as usize);
    head.check(place, stored.ok_or("it ends inside a frame")?)?;
    Ok(head)
}
