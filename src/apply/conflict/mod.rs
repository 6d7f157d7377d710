//! Writes a stream to a side that applications write to as well: conflicts are found, settled by a
//! policy that both sides compute alike, and recorded with both rows.
//!
//! # What a conflict is
//! Two changes of one row of which neither was made knowing the other. Not: the last writer of the
//! row was somebody else, which is what most replication calls one, and which counts every row that
//! the two sides write in turn.
//!
//! Each transaction that is applied leaves a row in `walferry.two_way_applied`: its xid and commit
//! time there, its xid here, and the clock here after it had locked and written its rows. So when a
//! change comes and meets a row that a local transaction wrote, the side that it comes from is
//! asked when it had applied that transaction. The change knew of it if and only if it committed
//! after that moment: both moments are of one clock, and both transactions held the row's lock.
//!
//! # Why both sides end equal
//! A change that knew of the row it meets is written. Of two that did not know each other, each
//! side sees one come and has the other, and both decide by the same pair (commit time, side), or
//! by side alone. Every later change of the loser's side was made before the winner came there, and
//! so meets it in the same way, or after, and so knew it. Commit times need no synchronous clocks
//! for that: a clock that is behind only loses more often. Each clock must not run backwards.
//!
//! A row that is gone has no last writer: a trigger on each side notes the keys that applications
//! delete, in the deleting transaction (`walferry.two_way_deleted`). A column's values need not
//! grow as commit times do, which takes a note of its own: see `greatest`.
//!
//! A change of the key is a deletion and an insertion for whoever did not know it: the other side
//! has the row under the new key whatever became of the old one, and so it comes there as well.
//!
//! # Steps, for each source transaction
//! 1. BEGIN, and all rows that it changes are looked at and locked, in its order.
//! 2. Where a local transaction wrote one last, the other side is asked (`other`); `judge` decides.
//! 3. Records, rows, counters, progress, COMMIT.
//!
//! One source transaction is one target transaction, as locks of many at once would meet those of
//! applications in another order. A row that violates a unique constraint rolls it back, and it is
//! written once more change by change, looking at every unique index (`unique`).
//!
//! # What survives a crash
//! Records, books and what was applied commit with the rows. What is forgotten, and when, is
//! decided by the job: a transaction older than `walferry.two_way.seen_before` is known to both
//! sides.
//!
//! Left out: TRUNCATE (a trigger refuses it on both sides), tables without a primary key.

mod greatest;
mod judge;
mod look;
mod other;
mod policy;
mod round;
mod settle;
mod unique;

#[cfg(test)]
mod tests;

use std::collections::HashMap;

pub use greatest::{Weight, weights};
pub use policy::{Policy, Rule};

use crate::id::Stream;
use crate::pg::{Config, Session};

/// What [`super::DDL`] does not make, as only jobs of two ways have it. Idempotent.
pub const DDL: &str = "set client_min_messages = error; \
     create table if not exists walferry.stream_lost ( \
     stream text, schema text, name text, changes bigint not null, \
     primary key (stream, schema, name)); \
     create table if not exists walferry.two_way ( \
     stream text primary key, seen_before timestamptz not null); \
     create table if not exists walferry.two_way_applied ( \
     stream text, own_xid bigint, xid bigint not null, commit_time timestamptz not null, \
     at timestamptz not null, primary key (stream, own_xid)); \
     create index if not exists two_way_applied_time \
     on walferry.two_way_applied (stream, commit_time); \
     create table if not exists walferry.two_way_deleted ( \
     id bigint generated always as identity primary key, relation oid not null, \
     key jsonb not null); \
     create index if not exists two_way_deleted_key \
     on walferry.two_way_deleted (relation, pg_catalog.md5(key::text)); \
     create table if not exists walferry.two_way_left ( \
     id bigint generated always as identity primary key, relation oid not null, \
     key jsonb not null, value text, xid xid not null); \
     create index if not exists two_way_left_key \
     on walferry.two_way_left (relation, pg_catalog.md5(key::text)); \
     create table if not exists walferry.two_way_sequence ( \
     job text, schema text, name text, increment bigint not null, \
     primary key (job, schema, name)); \
     create table if not exists walferry.conflict ( \
     id bigint generated always as identity primary key, stream text not null, \
     schema text not null, name text not null, kind text not null, policy text not null, \
     outcome text not null, incoming jsonb not null, local jsonb, commit_lsn pg_lsn not null, \
     xid bigint not null, commit_time timestamptz not null, local_xid bigint, \
     local_commit_time timestamptz, \
     at timestamptz not null default pg_catalog.clock_timestamp()); \
     reset client_min_messages";

/// How to settle conflicts on the side that a stream writes.
#[derive(Clone, Debug)]
pub struct TwoWay {
    /// Who wins.
    pub policy: Policy,
    /// Which stream this is: the forward one brings changes of the source.
    pub stream: Stream,
    /// The name under which the side that is read keeps what it applied of the side written here.
    pub opposite: String,
    /// The side that is read.
    pub other: Config,
}

/// What an applier of two ways keeps between transactions. Belongs to one session.
pub(super) struct Settler {
    options: TwoWay,
    other: Option<Session>,
    /// Statements by the address of their relation, which they keep alive.
    plans: HashMap<usize, look::Plan>,
    stream: String,
    prepared: usize,
    /// What committed here before it, in microseconds, is known to the other side; only grows.
    seen_before: Option<i64>,
}

impl Settler {
    /// Opens nothing on the other side yet.
    pub async fn open(
        session: &mut Session,
        options: TwoWay,
        stream: &str,
    ) -> super::Result<Settler> {
        // Keys are noted as JSON, whose times depend on it.
        session.execute("set timezone = 'UTC'").await?;
        // Where a superuser may: of two that wait for each other the application is not the victim.
        let _ = session.execute("set deadlock_timeout = '100ms'").await;
        settle::prepare(session).await?;
        Ok(Settler {
            options,
            other: None,
            plans: HashMap::new(),
            stream: stream.to_string(),
            prepared: 0,
            seen_before: None,
        })
    }
}
