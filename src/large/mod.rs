//! Large objects, which no decoder shows: copied whole, then brought level by difference.
//!
//! Why it exists: changes of pg_largeobject are in no logical stream, so every tool that follows
//! leaves large objects behind, or carries those of the first minute only. What has changed can be
//! found all the same: a page that was written bears the transaction that wrote it.
//!
//! 1. `level` with no [`Mark`]: what the two sides have is compared in full, by size and
//!    fingerprint, and what differs is copied, oids kept. Into an empty database that is the copy;
//!    after a crash it is the same call again, which passes over what has arrived.
//! 2. It gives a mark: the oldest transaction that was running, and how many objects there were.
//! 3. `level` since a mark: pages of pg_largeobject whose xmin is not older, objects whose row in
//!    pg_largeobject_metadata is not older, and, where their number says so, those that are gone.
//!    One scan, no byte read of what has not changed: short enough to be done inside a fence.
//!
//! A truncation leaves a mark as well: it writes the page in which it ends, be it an empty one.
//! Whole objects are copied, not pages: holes between pages leave no trace.
//!
//! What survives a crash: the mark that the caller stores once both sides were level. An older mark
//! finds more, never less. The live side is read in one REPEATABLE READ transaction.
//!
//! Roles that may not read pg_largeobject have no marks: their every pass compares in full, and
//! reads by lo_get, which asks each object's own rights. Others read pages: lo_get, a reader, takes
//! a lock as writers do, and would wait for a fence of ours. So do an application's readers, for as
//! long as its writers are held.
//!
//! Left out: security labels; comments that change while a fence holds.
//!
//! - `find`: what has to be copied. - `copy`: contents. - `attributes`: owners, grants, comments.
//! - `rights`: what the role may not read or write, with the SQL that mends it.
//!
//! <https://www.postgresql.org/docs/current/lo-implementation.html>

mod attributes;
mod copy;
mod error;
mod find;
mod rights;

use serde::{Deserialize, Serialize};

pub use error::Error;
pub use find::{Comparison, compare, look, mark, sees_pages, unchanged};
pub use rights::{Refusal, are_lockable, unreadable, unwritable};

use crate::pg::{self, Session};

/// Result with this room's error.
pub type Result<T> = std::result::Result<T, Error>;

/// Where a side stood when the other had the same large objects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    /// `txid_snapshot_xmin`: whatever is not in the snapshot was written by this or a later one.
    pub xmin: u64,
    /// How many objects there were.
    pub count: u64,
}

/// What a pass did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Levelled {
    /// The live side's, for the next pass.
    pub mark: Mark,
    /// Objects whose contents were written.
    pub copied: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Objects removed.
    pub removed: u64,
    /// What the role may not do on the other side (give an owner, remove an object), by name.
    pub left: Vec<String>,
}

/// How many large objects the database has. Anyone may ask.
pub async fn count(session: &mut Session) -> pg::Result<u64> {
    let sql = "select count(*) from pg_catalog.pg_largeobject_metadata";
    session.query_one(sql, &[]).await?.parse(0)
}

/// Makes `dest`'s large objects those of `live`: all of them, or what has changed on `live` since
/// it was at `since`. With `owners` false, owners and grants are left as they fall.
///
/// Blocks for as long as reading and writing what differs takes. What was written stays written
/// when it fails in the middle, and the same call goes on from there.
///
/// # Errors
/// [`Error::Unreadable`] names what the role may not read; [`Error::Refused`] what `dest` did not
/// take.
pub async fn level(
    live: &mut Session,
    dest: &mut Session,
    since: Option<Mark>,
    owners: bool,
) -> Result<Levelled> {
    find::open(live).await?;
    let outcome = level_within(live, dest, since, owners).await;
    for session in [live, dest] {
        if session.in_transaction() {
            session.execute("rollback").await?;
        }
    }
    outcome
}

async fn level_within(
    live: &mut Session,
    dest: &mut Session,
    since: Option<Mark>,
    owners: bool,
) -> Result<Levelled> {
    let found = find::find(live, dest, since).await?;
    let (copied, bytes) = copy::copy(live, dest, &found.differing).await?;
    let (removed, mut left) = copy::remove(dest, &found.gone).await?;
    left.extend(attributes::level(live, dest, &found.touched, owners).await?);
    Ok(Levelled { mark: found.mark, copied, bytes, removed, left })
}
