//! A table as the source described it when a change was written.

use crate::id::QualifiedName;

/// `pg_class.relreplident`: which old columns an UPDATE or DELETE carries.
///
/// <https://www.postgresql.org/docs/current/logical-replication-publication.html>
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ReplicaIdentity {
    /// The primary key (`d`); nothing if there is none.
    Default,
    /// Nothing (`n`): updates and deletes cannot be published.
    Nothing,
    /// The whole old row (`f`).
    Full,
    /// A chosen unique index (`i`).
    Index,
}

impl ReplicaIdentity {
    /// From `relreplident`; `None` for a letter PostgreSQL does not use.
    pub fn from_letter(letter: u8) -> Option<Self> {
        match letter {
            b'd' => Some(Self::Default),
            b'n' => Some(Self::Nothing),
            b'f' => Some(Self::Full),
            b'i' => Some(Self::Index),
            _ => None,
        }
    }
}

/// One published column, in the order in which rows carry them.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Column {
    /// `pg_attribute.attname`, unquoted.
    pub name: String,
    /// `pg_attribute.atttypid` on the source; never meaningful on the target for user types.
    pub type_oid: u32,
    /// `pg_attribute.atttypmod`.
    pub type_modifier: i32,
    /// Part of the replica identity (all columns are, under FULL).
    pub key: bool,
}

/// A table's description in force for the changes that point to it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Relation {
    /// `pg_class.oid` on the source.
    pub oid: u32,
    /// Where the table is on the source.
    pub name: QualifiedName,
    /// What old rows carry.
    pub identity: ReplicaIdentity,
    /// The published columns, in row order.
    pub columns: Vec<Column>,
}

/// A column of a source's table as it was last known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KnownColumn {
    /// `pg_attribute.attnum`, which is never given again; 0 where nobody knows it.
    pub attnum: i16,
    /// `attname`, unquoted.
    pub name: String,
    /// `atttypid` on the source.
    pub type_oid: u32,
    /// `atttypmod`.
    pub type_modifier: i32,
}

impl Relation {
    /// Indexes of the replica identity's columns, in column order.
    pub fn key_columns(&self) -> impl Iterator<Item = usize> + '_ {
        self.columns.iter().enumerate().filter(|(_, c)| c.key).map(|(i, _)| i)
    }
}
