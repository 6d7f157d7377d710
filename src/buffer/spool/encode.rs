//! Items as bytes and back.
//!
//! Numbers are big-endian. A text is a u32 length and its bytes. A row is its own layout
//! ([`crate::change::row`]), so that writing one is a copy and reading one a slice.
//!
//! ```text
//! idle    0  lsn u64
//! chunk   (1 | 2 ending u8  gid text)  xid u32  commit_lsn u64  commit_time i64
//!            origin (0 | 1 text)  number u32
//!            commit (0 | 1 commit_lsn u64  end_lsn u64  commit_time i64)
//!            relations u32, each: id u32  oid u32  schema text  name text  identity u8
//!                columns u16, each: name text  type u32  modifier i32  key u8
//!            changes u32, each: I id row | U id (0 | K row | O row) row | D id (K | O) row
//!                | T flags u8  count u32  id ... | M flags u8  lsn u64  prefix text  content text
//! ```
//! A relation is described once a segment, in the first chunk that names it; its id counts within
//! the segment. The decoder's own `Arc` tells relations apart, so a table described anew is a new
//! relation, as it is to the applier.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::{Buf, BufMut, Bytes, TryGetError};

use crate::change::{
    Begin, Change, Chunk, Column, Commit, Ending, Item, OldRow, Relation, ReplicaIdentity, Row,
    RowError,
};
use crate::clock::PgTimestamp;
use crate::id::QualifiedName;
use crate::lsn::Lsn;

/// Relations described so far in the segment being written.
#[derive(Debug, Default)]
pub(super) struct Described {
    /// By address; the `Arc` kept beside it sees to it that no address is used twice.
    ids: HashMap<usize, (u32, Arc<Relation>)>,
}

impl Described {
    /// The id, and whether it is new.
    fn id(&mut self, relation: &Arc<Relation>) -> (u32, bool) {
        let next = self.ids.len() as u32;
        let mut new = false;
        let address = Arc::as_ptr(relation) as usize;
        let (id, _) = self.ids.entry(address).or_insert_with(|| {
            new = true;
            (next, relation.clone())
        });
        (*id, new)
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// Forgets all but the first `len`: what was written of the others was taken back.
    pub fn shrink_to(&mut self, len: usize) {
        self.ids.retain(|_, (id, _)| (*id as usize) < len);
    }

    /// Those described after the first `len`.
    pub fn since(&self, len: usize) -> impl Iterator<Item = (u32, Arc<Relation>)> + '_ {
        let all = self.ids.values().map(|(id, relation)| (*id, relation.clone()));
        all.filter(move |(id, _)| *id as usize >= len)
    }

    fn known(&self, relation: &Arc<Relation>) -> u32 {
        self.ids.get(&(Arc::as_ptr(relation) as usize)).map_or(u32::MAX, |(id, _)| *id)
    }
}

/// Appends the item to `out`, describing its relations as far as they are new.
pub(super) fn write(item: &Item, described: &mut Described, out: &mut Vec<u8>) {
    match item {
        Item::Idle { lsn } => {
            out.put_u8(0);
            out.put_u64(lsn.0);
        }
        Item::Chunk(chunk) => write_chunk(chunk, described, out),
    }
}

/// At most how many bytes the item takes, its relations' descriptions apart.
pub(super) fn size(item: &Item) -> usize {
    let Item::Chunk(chunk) = item else { return 9 };
    let origin = chunk.begin.origin.as_ref().map_or(0, |origin| origin.len() + 4);
    let rows = |row: &Row| row.as_bytes().len();
    let changes = chunk.changes.iter().map(|change| match change {
        Change::Insert { new, .. } => 5 + rows(new),
        Change::Update { old, new, .. } => {
            6 + old.as_ref().map_or(0, |o| rows(o.row())) + rows(new)
        }
        Change::Delete { old, .. } => 6 + rows(old.row()),
        Change::Truncate { relations, .. } => 6 + relations.len() * 4,
        Change::Message { prefix, content, .. } => 18 + prefix.len() + content.len(),
    });
    let gid = chunk.begin.ending.gid().map_or(0, |gid| gid.len() + 5);
    59 + origin + gid + changes.sum::<usize>()
}

fn write_chunk(chunk: &Chunk, described: &mut Described, out: &mut Vec<u8>) {
    match chunk.begin.ending.gid() {
        None => out.put_u8(1),
        Some(gid) => {
            out.put_u8(2);
            out.put_u8(match chunk.begin.ending {
                Ending::Commit => 0,
                Ending::Prepare(_) => 1,
                Ending::CommitPrepared(_) => 2,
                Ending::RollbackPrepared(_) => 3,
            });
            write_text(gid.as_bytes(), out);
        }
    }
    out.put_u32(chunk.begin.xid);
    out.put_u64(chunk.begin.commit_lsn.0);
    out.put_i64(chunk.begin.commit_time.0);
    out.put_u8(u8::from(chunk.begin.origin.is_some()));
    if let Some(origin) = &chunk.begin.origin {
        write_text(origin.as_bytes(), out);
    }
    out.put_u32(chunk.number);
    out.put_u8(u8::from(chunk.commit.is_some()));
    if let Some(commit) = &chunk.commit {
        out.put_u64(commit.commit_lsn.0);
        out.put_u64(commit.end_lsn.0);
        out.put_i64(commit.commit_time.0);
    }
    let mut new = Vec::new();
    for relation in chunk.changes.iter().flat_map(Change::relations) {
        if let (id, true) = described.id(relation) {
            new.push((id, relation));
        }
    }
    out.put_u32(new.len() as u32);
    for (id, relation) in new {
        write_relation(id, relation, out);
    }
    out.put_u32(chunk.changes.len() as u32);
    for change in &chunk.changes {
        write_change(change, described, out);
    }
}

fn write_text(text: &[u8], out: &mut Vec<u8>) {
    out.put_u32(text.len() as u32);
    out.put_slice(text);
}

fn write_relation(id: u32, relation: &Relation, out: &mut Vec<u8>) {
    out.put_u32(id);
    out.put_u32(relation.oid);
    write_text(relation.name.schema.as_bytes(), out);
    write_text(relation.name.name.as_bytes(), out);
    out.put_u8(match relation.identity {
        ReplicaIdentity::Default => b'd',
        ReplicaIdentity::Nothing => b'n',
        ReplicaIdentity::Full => b'f',
        ReplicaIdentity::Index => b'i',
    });
    out.put_u16(relation.columns.len() as u16);
    for column in &relation.columns {
        write_text(column.name.as_bytes(), out);
        out.put_u32(column.type_oid);
        out.put_i32(column.type_modifier);
        out.put_u8(u8::from(column.key));
    }
}

fn write_change(change: &Change, described: &Described, out: &mut Vec<u8>) {
    match change {
        Change::Insert { relation, new } => {
            out.put_u8(b'I');
            out.put_u32(described.known(relation));
            out.put_slice(new.as_bytes());
        }
        Change::Update { relation, old, new } => {
            out.put_u8(b'U');
            out.put_u32(described.known(relation));
            match old {
                Some(old) => write_old(old, out),
                None => out.put_u8(0),
            }
            out.put_slice(new.as_bytes());
        }
        Change::Delete { relation, old } => {
            out.put_u8(b'D');
            out.put_u32(described.known(relation));
            write_old(old, out);
        }
        Change::Truncate { relations, cascade, restart_identity } => {
            out.put_u8(b'T');
            out.put_u8(u8::from(*cascade) | u8::from(*restart_identity) << 1);
            out.put_u32(relations.len() as u32);
            for relation in relations {
                out.put_u32(described.known(relation));
            }
        }
        Change::Message { transactional, lsn, prefix, content } => {
            out.put_u8(b'M');
            out.put_u8(u8::from(*transactional));
            out.put_u64(lsn.0);
            write_text(prefix.as_bytes(), out);
            write_text(content, out);
        }
    }
}

fn write_old(old: &OldRow, out: &mut Vec<u8>) {
    out.put_u8(if matches!(old, OldRow::Key(_)) { b'K' } else { b'O' });
    out.put_slice(old.row().as_bytes());
}

/// The bytes check, and yet are no item: written by something else, or a fault of ours.
#[derive(Debug, thiserror::Error)]
pub(super) enum DecodeError {
    /// They end too early.
    #[error("an item ends too early")]
    Short,
    /// A row does.
    #[error(transparent)]
    Row(#[from] RowError),
    /// A letter or number that means nothing.
    #[error("{what} {value} is not known")]
    Unknown {
        /// Of which kind.
        what: &'static str,
        /// Which.
        value: u32,
    },
    /// A text that is not UTF-8.
    #[error("a name is not UTF-8")]
    NotText,
    /// Bytes after the item.
    #[error("{0} bytes follow the item")]
    Rest(usize),
}

impl From<TryGetError> for DecodeError {
    fn from(_: TryGetError) -> Self {
        DecodeError::Short
    }
}

/// Relations described so far in the segment being read.
pub(super) type Relations = HashMap<u32, Arc<Relation>>;

/// Reads the one item in `bytes`, which rows and messages are slices of.
pub(super) fn read(mut bytes: Bytes, known: &mut Relations) -> Result<Item, DecodeError> {
    let item = match bytes.try_get_u8()? {
        0 => Item::Idle { lsn: Lsn(bytes.try_get_u64()?) },
        1 => Item::Chunk(read_chunk(&mut bytes, Ending::Commit, known)?),
        2 => {
            let ending = read_ending(&mut bytes)?;
            Item::Chunk(read_chunk(&mut bytes, ending, known)?)
        }
        other => return Err(unknown("item", other)),
    };
    if bytes.is_empty() { Ok(item) } else { Err(DecodeError::Rest(bytes.len())) }
}

fn unknown(what: &'static str, value: impl Into<u32>) -> DecodeError {
    DecodeError::Unknown { what, value: value.into() }
}

fn read_ending(bytes: &mut Bytes) -> Result<Ending, DecodeError> {
    let number = bytes.try_get_u8()?;
    let gid = read_text(bytes)?;
    match number {
        1 => Ok(Ending::Prepare(gid)),
        2 => Ok(Ending::CommitPrepared(gid)),
        3 => Ok(Ending::RollbackPrepared(gid)),
        other => Err(unknown("ending", other)),
    }
}

fn read_chunk(
    bytes: &mut Bytes,
    ending: Ending,
    known: &mut Relations,
) -> Result<Chunk, DecodeError> {
    let xid = bytes.try_get_u32()?;
    let commit_lsn = Lsn(bytes.try_get_u64()?);
    let commit_time = PgTimestamp(bytes.try_get_i64()?);
    let origin = if bytes.try_get_u8()? == 0 { None } else { Some(read_text(bytes)?) };
    let number = bytes.try_get_u32()?;
    let commit = if bytes.try_get_u8()? == 0 {
        None
    } else {
        let (commit_lsn, end_lsn) = (Lsn(bytes.try_get_u64()?), Lsn(bytes.try_get_u64()?));
        Some(Commit { commit_lsn, end_lsn, commit_time: PgTimestamp(bytes.try_get_i64()?) })
    };
    for _ in 0..bytes.try_get_u32()? {
        let id = bytes.try_get_u32()?;
        let relation = read_relation(bytes)?;
        // Whoever wrote it may be the one who reads it, and has its own.
        known.entry(id).or_insert_with(|| Arc::new(relation));
    }
    let mut changes = Vec::new();
    for _ in 0..bytes.try_get_u32()? {
        changes.push(read_change(bytes, known)?);
    }
    let begin = Arc::new(Begin { xid, commit_lsn, commit_time, origin, ending });
    let size = changes.iter().map(Change::bytes).sum();
    Ok(Chunk { begin, number, changes, commit, bytes: size })
}

fn take(bytes: &mut Bytes) -> Result<Bytes, DecodeError> {
    let len = bytes.try_get_u32()? as usize;
    if len > bytes.len() {
        return Err(DecodeError::Short);
    }
    Ok(bytes.split_to(len))
}

fn read_text(bytes: &mut Bytes) -> Result<String, DecodeError> {
    String::from_utf8(take(bytes)?.to_vec()).map_err(|_| DecodeError::NotText)
}

fn read_relation(bytes: &mut Bytes) -> Result<Relation, DecodeError> {
    let oid = bytes.try_get_u32()?;
    let (schema, name) = (read_text(bytes)?, read_text(bytes)?);
    let letter = bytes.try_get_u8()?;
    let identity =
        ReplicaIdentity::from_letter(letter).ok_or_else(|| unknown("identity", letter))?;
    let mut columns = Vec::new();
    for _ in 0..bytes.try_get_u16()? {
        columns.push(Column {
            name: read_text(bytes)?,
            type_oid: bytes.try_get_u32()?,
            type_modifier: bytes.try_get_i32()?,
            key: bytes.try_get_u8()? != 0,
        });
    }
    Ok(Relation { oid, name: QualifiedName { schema, name }, identity, columns })
}

fn read_change(bytes: &mut Bytes, known: &Relations) -> Result<Change, DecodeError> {
    Ok(match bytes.try_get_u8()? {
        b'I' => {
            let relation = known_relation(bytes, known)?;
            Change::Insert { relation, new: Row::split_from(bytes)? }
        }
        b'U' => {
            let relation = known_relation(bytes, known)?;
            let old = match bytes.try_get_u8()? {
                0 => None,
                letter => Some(read_old(letter, bytes)?),
            };
            Change::Update { relation, old, new: Row::split_from(bytes)? }
        }
        b'D' => {
            let relation = known_relation(bytes, known)?;
            let letter = bytes.try_get_u8()?;
            Change::Delete { relation, old: read_old(letter, bytes)? }
        }
        b'T' => {
            let flags = bytes.try_get_u8()?;
            let mut relations = Vec::new();
            for _ in 0..bytes.try_get_u32()? {
                relations.push(known_relation(bytes, known)?);
            }
            let (cascade, restart_identity) = (flags & 1 != 0, flags & 2 != 0);
            Change::Truncate { relations, cascade, restart_identity }
        }
        b'M' => Change::Message {
            transactional: bytes.try_get_u8()? != 0,
            lsn: Lsn(bytes.try_get_u64()?),
            prefix: read_text(bytes)?,
            content: take(bytes)?,
        },
        other => return Err(unknown("change", other)),
    })
}

fn known_relation(bytes: &mut Bytes, known: &Relations) -> Result<Arc<Relation>, DecodeError> {
    let id = bytes.try_get_u32()?;
    known.get(&id).cloned().ok_or_else(|| unknown("relation", id))
}

fn read_old(letter: u8, bytes: &mut Bytes) -> Result<OldRow, DecodeError> {
    let row = Row::split_from(bytes)?;
    match letter {
        b'K' => Ok(OldRow::Key(row)),
        b'O' => Ok(OldRow::Full(row)),
        other => Err(unknown("old row", other)),
    }
}
