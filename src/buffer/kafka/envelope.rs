//! Items as records and back. The format is `proto/envelope.proto`, with a word on every field.
//!
//! The code for its messages is generated, committed, and held against it by a test.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;

use bytes::Bytes;
use prost::Message as _;

use crate::change::{
    Begin, Change, Chunk, Column, Commit, Ending, Item, OldRow, Relation, ReplicaIdentity, Row,
};
use crate::clock::PgTimestamp;
use crate::id::QualifiedName;
use crate::lsn::Lsn;

/// The generated messages.
#[allow(missing_docs, clippy::all, reason = "generated")]
pub mod v1 {
    include!(concat!(env!("CARGO_MANIFEST_DIR"), "/proto/envelope.rs"));
}

use v1::change::Kind;
use v1::envelope::Content;

/// Of the envelope.
pub const VERSION: u32 = 1;

/// What an envelope takes beside its content, and a chunk beside its relations and changes.
const FRAME_BYTES: usize = 256;

/// Descriptions of tables that a writer has given.
#[derive(Debug, Default)]
pub(super) struct Described {
    /// By address; the `Arc` kept beside it sees to it that no address is used twice.
    ids: HashMap<usize, (u32, Arc<Relation>)>,
}

impl Described {
    fn id(&mut self, relation: &Arc<Relation>) -> u32 {
        let next = self.ids.len() as u32;
        let address = Arc::as_ptr(relation) as usize;
        self.ids.entry(address).or_insert_with(|| (next, relation.clone())).0
    }
}

/// Cuts an item into the contents of records of at most about `limit_bytes`. The first of a chunk
/// is numbered `number`, the next one more.
pub(super) fn contents(
    item: &Item,
    number: u32,
    limit_bytes: usize,
    described: &mut Described,
) -> Vec<Content> {
    let chunk = match item {
        Item::Idle { lsn } => return vec![Content::Idle(v1::Idle { lsn: lsn.0 })],
        Item::Chunk(chunk) => chunk,
    };
    let limit_bytes = limit_bytes.saturating_sub(FRAME_BYTES).max(1024);
    let (mut chunks, mut part) = (Vec::new(), Part::default());
    for change in &chunk.changes {
        let (relations, change) = write_change(change, described);
        let bytes = part.cost(&relations, &change);
        if !part.changes.is_empty() && part.bytes + bytes > limit_bytes {
            chunks.push(std::mem::take(&mut part));
        }
        part.push(relations, change);
    }
    chunks.push(part);
    let last = chunks.len() - 1;
    let mut contents = Vec::new();
    for (index, part) in chunks.into_iter().enumerate() {
        let commit = chunk.commit.filter(|_| index == last);
        let whole = v1::Chunk {
            begin: Some(v1::Begin {
                xid: chunk.begin.xid,
                commit_lsn: chunk.begin.commit_lsn.0,
                commit_time: chunk.begin.commit_time.0,
                origin: chunk.begin.origin.clone(),
                ending: write_ending(&chunk.begin.ending).into(),
                gid: chunk.begin.ending.gid().unwrap_or_default().to_string(),
            }),
            number: number.saturating_add(index as u32),
            commit: commit.map(|commit| v1::Commit {
                commit_lsn: commit.commit_lsn.0,
                end_lsn: commit.end_lsn.0,
                commit_time: commit.commit_time.0,
            }),
            relations: part.relations,
            changes: part.changes,
        };
        if part.bytes <= limit_bytes {
            contents.push(Content::Chunk(whole));
        } else {
            contents.extend(fragments(&whole, limit_bytes));
        }
    }
    contents
}

/// How many of the contents are chunks, whole or cut.
pub(super) fn count(contents: &[Content]) -> u32 {
    let begins = contents.iter().filter(|content| match content {
        Content::Chunk(_) => true,
        Content::Fragment(fragment) => fragment.index == 0,
        _ => false,
    });
    begins.count() as u32
}

#[derive(Default)]
struct Part {
    relations: Vec<v1::Relation>,
    changes: Vec<v1::Change>,
    bytes: usize,
}

impl Part {
    fn has(&self, relation: &v1::Relation) -> bool {
        self.relations.iter().any(|known| known.id == relation.id)
    }

    fn cost(&self, relations: &[v1::Relation], change: &v1::Change) -> usize {
        let new = relations.iter().filter(|relation| !self.has(relation));
        // A tag and a length for each.
        new.map(|relation| relation.encoded_len() + 6).sum::<usize>() + change.encoded_len() + 6
    }

    fn push(&mut self, relations: Vec<v1::Relation>, change: v1::Change) {
        self.bytes += self.cost(&relations, &change);
        for relation in relations {
            if !self.has(&relation) {
                self.relations.push(relation);
            }
        }
        self.changes.push(change);
    }
}

fn fragments(chunk: &v1::Chunk, limit_bytes: usize) -> Vec<Content> {
    let mut bytes = Bytes::from(chunk.encode_to_vec());
    let mut fragments = Vec::new();
    while !bytes.is_empty() {
        let content = bytes.split_to(limit_bytes.min(bytes.len()));
        let (index, last) = (fragments.len() as u32, bytes.is_empty());
        fragments.push(Content::Fragment(v1::Fragment { index, last, content }));
    }
    fragments
}

fn write_change(change: &Change, described: &mut Described) -> (Vec<v1::Relation>, v1::Change) {
    let mut relations = Vec::new();
    let mut id = |relation: &Arc<Relation>| {
        let id = described.id(relation);
        relations.push(write_relation(id, relation));
        id
    };
    let bytes = |row: &Row| row.as_bytes().clone();
    let old =
        |old: &OldRow| v1::Old { key_only: matches!(old, OldRow::Key(_)), row: bytes(old.row()) };
    let kind = match change {
        Change::Insert { relation, new } => {
            Kind::Insert(v1::Insert { relation: id(relation), new: bytes(new) })
        }
        Change::Update { relation, old: before, new } => Kind::Update(v1::Update {
            relation: id(relation),
            old: before.as_ref().map(old),
            new: bytes(new),
        }),
        Change::Delete { relation, old: before } => {
            Kind::Delete(v1::Delete { relation: id(relation), old: Some(old(before)) })
        }
        Change::Truncate { relations, cascade, restart_identity } => Kind::Truncate(v1::Truncate {
            relations: relations.iter().map(id).collect(),
            cascade: *cascade,
            restart_identity: *restart_identity,
        }),
        Change::Message { transactional, lsn, prefix, content } => Kind::Message(v1::Message {
            transactional: *transactional,
            lsn: lsn.0,
            prefix: prefix.clone(),
            content: content.clone(),
        }),
    };
    (relations, v1::Change { kind: Some(kind) })
}

fn write_relation(id: u32, relation: &Relation) -> v1::Relation {
    let identity = match relation.identity {
        ReplicaIdentity::Default => v1::ReplicaIdentity::Default,
        ReplicaIdentity::Nothing => v1::ReplicaIdentity::Nothing,
        ReplicaIdentity::Full => v1::ReplicaIdentity::Full,
        ReplicaIdentity::Index => v1::ReplicaIdentity::Index,
    };
    let columns = relation.columns.iter().map(|column| v1::Column {
        name: column.name.clone(),
        type_oid: column.type_oid,
        type_modifier: column.type_modifier,
        key: column.key,
    });
    v1::Relation {
        id,
        oid: relation.oid,
        schema: relation.name.schema.clone(),
        name: relation.name.name.clone(),
        identity: identity.into(),
        columns: columns.collect(),
    }
}

/// Only the field that says whether the rest can be understood.
#[derive(Clone, PartialEq, prost::Message)]
struct Versioned {
    #[prost(uint32, tag = "1")]
    version: u32,
}

/// Why bytes are no envelope.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Unreadable {
    /// Of another version.
    Version(u32),
    /// Anything else.
    Detail(String),
}

impl From<String> for Unreadable {
    fn from(detail: String) -> Self {
        Unreadable::Detail(detail)
    }
}

/// Reads one record's value.
pub(super) fn read(bytes: Bytes) -> Result<v1::Envelope, Unreadable> {
    let versioned = Versioned::decode(bytes.clone());
    match versioned {
        Ok(Versioned { version: VERSION }) => {}
        Ok(Versioned { version: 0 }) => {
            return Err(Unreadable::Detail("it has no version".to_string()));
        }
        Ok(Versioned { version }) => return Err(Unreadable::Version(version)),
        Err(error) => return Err(Unreadable::Detail(error.to_string())),
    }
    v1::Envelope::decode(bytes).map_err(|error| Unreadable::Detail(error.to_string()))
}

/// Descriptions by writer and number.
#[derive(Debug, Default)]
pub(super) struct Known {
    writer_id: u64,
    relations: HashMap<u32, Arc<Relation>>,
}

impl Known {
    /// Remembers what the chunk describes; a description seen before stays the same `Arc`.
    fn note(&mut self, writer_id: u64, relations: Vec<v1::Relation>) -> Result<(), String> {
        if self.writer_id != writer_id {
            self.relations.clear();
            self.writer_id = writer_id;
        }
        for relation in relations {
            if let Entry::Vacant(vacant) = self.relations.entry(relation.id) {
                vacant.insert(Arc::new(read_relation(relation)?));
            }
        }
        Ok(())
    }

    fn get(&self, id: u32) -> Result<Arc<Relation>, String> {
        self.relations.get(&id).cloned().ok_or_else(|| format!("relation {id} is not described"))
    }
}

/// The chunk as decoders give it. `begin` is the one of the transaction's first chunk.
pub(super) fn read_chunk(
    chunk: v1::Chunk,
    writer_id: u64,
    begin: Arc<Begin>,
    known: &mut Known,
) -> Result<Chunk, String> {
    known.note(writer_id, chunk.relations)?;
    let mut changes = Vec::with_capacity(chunk.changes.len());
    for change in chunk.changes {
        changes.push(read_change(change, known)?);
    }
    let bytes = changes.iter().map(Change::bytes).sum();
    let commit = chunk.commit.map(|commit| Commit {
        commit_lsn: Lsn(commit.commit_lsn),
        end_lsn: Lsn(commit.end_lsn),
        commit_time: PgTimestamp(commit.commit_time),
    });
    Ok(Chunk { begin, number: chunk.number, changes, commit, bytes })
}

/// The chunk's transaction.
pub(super) fn read_begin(chunk: &v1::Chunk) -> Result<Begin, String> {
    let begin = chunk.begin.as_ref().ok_or("a chunk without begin")?;
    Ok(Begin {
        xid: begin.xid,
        commit_lsn: Lsn(begin.commit_lsn),
        commit_time: PgTimestamp(begin.commit_time),
        origin: begin.origin.clone(),
        ending: read_ending(begin)?,
    })
}

fn write_ending(ending: &Ending) -> v1::Ending {
    match ending {
        Ending::Commit => v1::Ending::Commit,
        Ending::Prepare(_) => v1::Ending::Prepare,
        Ending::CommitPrepared(_) => v1::Ending::CommitPrepared,
        Ending::RollbackPrepared(_) => v1::Ending::RollbackPrepared,
    }
}

fn read_ending(begin: &v1::Begin) -> Result<Ending, String> {
    let gid = begin.gid.clone();
    match v1::Ending::try_from(begin.ending) {
        Ok(v1::Ending::Commit) => Ok(Ending::Commit),
        Ok(v1::Ending::Prepare) => Ok(Ending::Prepare(gid)),
        Ok(v1::Ending::CommitPrepared) => Ok(Ending::CommitPrepared(gid)),
        Ok(v1::Ending::RollbackPrepared) => Ok(Ending::RollbackPrepared(gid)),
        Err(_) => Err(format!("ending {} is not known", begin.ending)),
    }
}

fn read_relation(relation: v1::Relation) -> Result<Relation, String> {
    let identity = match v1::ReplicaIdentity::try_from(relation.identity) {
        Ok(v1::ReplicaIdentity::Default) => ReplicaIdentity::Default,
        Ok(v1::ReplicaIdentity::Nothing) => ReplicaIdentity::Nothing,
        Ok(v1::ReplicaIdentity::Full) => ReplicaIdentity::Full,
        Ok(v1::ReplicaIdentity::Index) => ReplicaIdentity::Index,
        Err(_) => return Err(format!("replica identity {} is not known", relation.identity)),
    };
    let columns = relation.columns.into_iter().map(|column| Column {
        name: column.name,
        type_oid: column.type_oid,
        type_modifier: column.type_modifier,
        key: column.key,
    });
    Ok(Relation {
        oid: relation.oid,
        name: QualifiedName { schema: relation.schema, name: relation.name },
        identity,
        columns: columns.collect(),
    })
}

fn read_change(change: v1::Change, known: &Known) -> Result<Change, String> {
    Ok(match change.kind.ok_or("a change of an unknown kind")? {
        Kind::Insert(insert) => {
            Change::Insert { relation: known.get(insert.relation)?, new: read_row(insert.new)? }
        }
        Kind::Update(update) => Change::Update {
            relation: known.get(update.relation)?,
            old: update.old.map(read_old).transpose()?,
            new: read_row(update.new)?,
        },
        Kind::Delete(delete) => Change::Delete {
            relation: known.get(delete.relation)?,
            old: read_old(delete.old.ok_or("a delete without its row")?)?,
        },
        Kind::Truncate(truncate) => Change::Truncate {
            relations: truncate
                .relations
                .into_iter()
                .map(|id| known.get(id))
                .collect::<Result<_, _>>()?,
            cascade: truncate.cascade,
            restart_identity: truncate.restart_identity,
        },
        Kind::Message(message) => Change::Message {
            transactional: message.transactional,
            lsn: Lsn(message.lsn),
            prefix: message.prefix,
            content: message.content,
        },
    })
}

fn read_old(old: v1::Old) -> Result<OldRow, String> {
    let row = read_row(old.row)?;
    Ok(if old.key_only { OldRow::Key(row) } else { OldRow::Full(row) })
}

fn read_row(mut bytes: Bytes) -> Result<Row, String> {
    let row = Row::split_from(&mut bytes).map_err(|e| e.to_string())?;
    if bytes.is_empty() { Ok(row) } else { Err(format!("{} bytes follow a row", bytes.len())) }
}
