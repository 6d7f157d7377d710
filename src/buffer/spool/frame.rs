//! A frame: 32 bytes that say what follows, and one item, perhaps compressed.
//!
//! ```text
//! magic u16   flags u16 (1: lz4, 2: the transaction goes on, 4: a mark, no item)
//! stored u32   raw u32
//! synced u32: so many bytes of this file were durable when the frame was written
//! end_lsn u64 (0 inside a transaction)   crc of the stored bytes u32   crc of all before u32
//! ```
//! Both crcs begin with the segment's number and the frame's offset, so that a frame that strayed
//! to another place does not check. `synced` is what tells a torn tail from damage: a power cut can
//! only hurt what no later frame calls durable. So that there is a later frame even in quiet times,
//! a mark follows the last item once that is durable.

use bytes::{Buf, BufMut, Bytes};

use super::error::{Error, Result};
use crate::lsn::Lsn;

const MAGIC: u16 = 0x57F5;
const MAGIC_BYTES: [u8; 2] = MAGIC.to_be_bytes();
const LZ4: u16 = 1;
const OPEN: u16 = 2;
const MARK: u16 = 4;

/// Bytes before the item.
pub(super) const HEADER: usize = 32;

/// What lz4 is tried on. Below, what it saves is not worth the call; above is one huge value, for
/// which there is no memory to spare.
const COMPRESS: std::ops::Range<usize> = 512..(64 << 20);

/// Where a frame stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// The segment.
    pub segment: u64,
    /// In its file, in bytes.
    pub offset: u64,
}

impl Place {
    fn crc(self, bytes: &[u8]) -> u32 {
        let seed = crc32c::crc32c(&self.segment.to_be_bytes());
        crc32c::crc32c_append(crc32c::crc32c_append(seed, &self.offset.to_be_bytes()), bytes)
    }
}

/// What a frame's first bytes say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Head {
    /// Bytes that follow the header.
    pub stored: u32,
    /// Bytes of the item.
    pub raw: u32,
    /// Bytes of the file known to be durable when it was written.
    pub synced: u32,
    /// Position the stream has reached with it, if it ends a transaction or is idle.
    pub end_lsn: Option<Lsn>,
    /// A transaction goes on after it.
    pub open: bool,
    /// It holds no item.
    pub mark: bool,
    compressed: bool,
    crc: u32,
}

impl Head {
    /// Reads a header; an error says what is wrong with it.
    pub fn read(place: Place, bytes: &[u8]) -> std::result::Result<Head, &'static str> {
        let Some((mut bytes, _)) = bytes.split_at_checked(HEADER) else {
            return Err("it ends inside a frame's header");
        };
        let (checked, crc) = bytes.split_at(HEADER - 4);
        if crc != place.crc(checked).to_be_bytes() {
            return Err("a frame's header does not check");
        }
        if bytes.get_u16() != MAGIC {
            return Err("there is no frame");
        }
        let flags = bytes.get_u16();
        Ok(Head {
            stored: bytes.get_u32(),
            raw: bytes.get_u32(),
            synced: bytes.get_u32(),
            end_lsn: Some(Lsn(bytes.get_u64())).filter(|lsn| lsn.is_valid()),
            open: flags & OPEN != 0,
            mark: flags & MARK != 0,
            compressed: flags & LZ4 != 0,
            crc: bytes.get_u32(),
        })
    }

    /// Bytes of the whole frame.
    pub fn size(&self) -> u64 {
        HEADER as u64 + u64::from(self.stored)
    }

    /// An error if the bytes after the header are not those that were written.
    pub fn check(&self, place: Place, stored: &[u8]) -> std::result::Result<(), &'static str> {
        if place.crc(stored) == self.crc { Ok(()) } else { Err("a frame's content does not check") }
    }

    /// The item's bytes, from those after the header, which have been checked.
    pub fn item(&self, stored: Bytes) -> std::result::Result<Bytes, &'static str> {
        if !self.compressed {
            return Ok(stored);
        }
        let raw = lz4_flex::block::decompress(&stored, self.raw as usize);
        raw.map(Bytes::from).map_err(|_| "a frame does not decompress")
    }
}

/// Where frames may begin in `bytes`, which begin at `place`: each offset with a header that
/// checks.
pub(super) fn candidates(place: Place, bytes: &[u8]) -> impl Iterator<Item = (u64, Head)> + '_ {
    memchr::memmem::find_iter(bytes, &MAGIC_BYTES).filter_map(move |at| {
        let offset = place.offset + at as u64;
        let head = Head::read(Place { offset, ..place }, bytes.get(at..)?).ok()?;
        Some((offset, head))
    })
}

/// What a frame is to say of its item.
#[derive(Clone, Copy, Debug)]
pub(super) struct Says {
    /// See [`Head::synced`].
    pub synced: u64,
    /// See [`Head::end_lsn`].
    pub end_lsn: Option<Lsn>,
    /// See [`Head::open`].
    pub open: bool,
}

/// Makes a frame of an item's bytes, or a mark of none, and appends it to `out`.
pub(super) fn write(place: Place, says: Says, raw: &[u8], out: &mut Vec<u8>) -> Result<()> {
    if raw.len() > u32::MAX as usize - HEADER {
        return Err(Error::TooLarge { bytes: raw.len() });
    }
    let compressed = COMPRESS.contains(&raw.len()).then(|| lz4_flex::block::compress(raw));
    let compressed = compressed.filter(|small| small.len() <= raw.len() / 8 * 7);
    let stored = compressed.as_deref().unwrap_or(raw);
    let flags = [(compressed.is_some(), LZ4), (says.open, OPEN), (raw.is_empty(), MARK)];
    let flags = flags.iter().filter(|(set, _)| *set).fold(0, |all, (_, flag)| all | flag);
    let mut header = Vec::with_capacity(HEADER);
    header.put_u16(MAGIC);
    header.put_u16(flags);
    header.put_u32(stored.len() as u32);
    header.put_u32(raw.len() as u32);
    header.put_u32(says.synced.min(u64::from(u32::MAX)) as u32);
    header.put_u64(says.end_lsn.unwrap_or(Lsn::ZERO).0);
    header.put_u32(place.crc(stored));
    let crc = place.crc(&header);
    header.put_u32(crc);
    out.extend_from_slice(&header);
    out.extend_from_slice(stored);
    Ok(())
}
