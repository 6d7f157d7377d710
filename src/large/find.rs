//! What of the large objects differs between two sides.

use std::collections::{HashMap, HashSet};

use serde::Serialize;

use super::{Error, Mark, Result, rights};
use crate::pg::{self, Session};

/// Objects asked for in one question.
const ASKED: usize = 5_000;

/// What has to be done on the other side.
#[derive(Debug)]
pub(super) struct Found {
    /// Contents that differ, or may; ascending.
    pub differing: Vec<u32>,
    /// Objects to remove.
    pub gone: Vec<u32>,
    /// Objects whose owner, grants and comment may differ.
    pub touched: Vec<u32>,
    /// The live side's.
    pub mark: Mark,
}

/// The outcome of a comparison that changes nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Comparison {
    /// How many the live side has.
    pub count: u64,
    /// Objects that differ because the live side has changed them since both were level: the next
    /// cutover or rollback carries them.
    pub pending: Vec<u32>,
    /// Objects that differ though nobody changed them there.
    pub differing: Vec<u32>,
}

/// Begins the transaction in which a side is read.
pub(super) async fn open(session: &mut Session) -> pg::Result<()> {
    session.execute("begin isolation level repeatable read read only").await?;
    Ok(())
}

/// The mark of what the session's transaction, or a statement of its own, sees.
pub async fn mark(session: &mut Session) -> pg::Result<Mark> {
    let sql = "select pg_catalog.txid_snapshot_xmin(pg_catalog.txid_current_snapshot()), \
         (select count(*) from pg_catalog.pg_largeobject_metadata)";
    let row = session.query_one(sql, &[]).await?;
    Ok(Mark { xmin: row.parse(0)?, count: row.parse(1)? })
}

/// The live side's mark now, if nothing has changed there since `since`; in one question. Where
/// the role does not see pages (`sees_pages`), only having none at all is known to be no change.
pub async fn unchanged(live: &mut Session, since: Mark, sees_pages: bool) -> Result<Option<Mark>> {
    let pages = match sees_pages {
        true => format!(
            "exists (select 1 from pg_catalog.pg_largeobject where {0}) \
             or exists (select 1 from pg_catalog.pg_largeobject_metadata where {0})",
            newer(since)
        ),
        false => "exists (select 1 from pg_catalog.pg_largeobject_metadata)".to_string(),
    };
    let sql = format!(
        "select pg_catalog.txid_snapshot_xmin(pg_catalog.txid_current_snapshot()), \
         (select count(*) from pg_catalog.pg_largeobject_metadata), {pages}"
    );
    let row = live.query_one(&sql, &[]).await?;
    let now = Mark { xmin: row.parse(0)?, count: row.parse(1)? };
    Ok((!row.bool(2)? && now.count == since.count).then_some(now))
}

/// Compares the contents in full. What has changed on `live` since `since` is told apart from what
/// is merely different; without a mark, or where it cannot be used, all counts as changed.
pub async fn compare(
    live: &mut Session,
    dest: &mut Session,
    since: Option<Mark>,
) -> Result<Comparison> {
    open(live).await?;
    let compared = async {
        refuse_unreadable(live).await?;
        let whole = whole(live, dest).await?;
        let all = [whole.differing, whole.gone].concat();
        let mut comparison = Comparison { count: whole.mark.count, ..Comparison::default() };
        let Some(since) = since.filter(|_| !all.is_empty()) else {
            return Ok(Comparison { pending: all, ..comparison });
        };
        if !sees_pages(live).await? {
            return Ok(Comparison { pending: all, ..comparison });
        }
        let changed = changed(live, dest, since, whole.mark).await?;
        let changed: HashSet<u32> =
            [changed.differing, changed.gone].concat().into_iter().collect();
        (comparison.pending, comparison.differing) =
            all.into_iter().partition(|oid| changed.contains(oid));
        Ok(comparison)
    };
    let outcome = compared.await;
    if live.in_transaction() {
        live.execute("rollback").await?;
    }
    outcome
}

/// How many objects a pass would write or remove. Writes nothing.
pub async fn look(live: &mut Session, dest: &mut Session, since: Option<Mark>) -> Result<usize> {
    open(live).await?;
    let found = find(live, dest, since).await;
    if live.in_transaction() {
        live.execute("rollback").await?;
    }
    found.map(|found| found.differing.len() + found.gone.len())
}

pub(super) async fn find(
    live: &mut Session,
    dest: &mut Session,
    since: Option<Mark>,
) -> Result<Found> {
    refuse_unreadable(live).await?;
    match since {
        Some(since) if sees_pages(live).await? => {
            let now = mark(live).await?;
            changed(live, dest, since, now).await
        }
        _ => whole(live, dest).await,
    }
}

async fn refuse_unreadable(session: &mut Session) -> Result<()> {
    let Some(refusal) = rights::unreadable(session).await? else { return Ok(()) };
    let peer = session.peer().to_string();
    Err(Error::Unreadable { peer, count: refusal.count, fix: refusal.fix })
}

/// Reading xmin takes the right to read the table.
pub async fn sees_pages(session: &mut Session) -> pg::Result<bool> {
    let sql = "select pg_catalog.has_table_privilege('pg_catalog.pg_largeobject', 'select')";
    session.query_one(sql, &[]).await?.bool(0)
}

async fn oids(session: &mut Session) -> pg::Result<HashSet<u32>> {
    let sql = "select oid from pg_catalog.pg_largeobject_metadata";
    session.query(sql).await?.iter().map(|row| row.parse(0)).collect()
}

/// A list of oids as an array of PostgreSQL's.
pub(super) fn array(oids: &[u32]) -> String {
    let list: Vec<String> = oids.iter().map(u32::to_string).collect();
    format!("'{{{}}}'::pg_catalog.oid[]", list.join(","))
}

fn sorted(oids: impl Iterator<Item = u32>) -> Vec<u32> {
    let mut oids: Vec<u32> = oids.collect();
    oids.sort_unstable();
    oids
}

/// Compares everything.
async fn whole(live: &mut Session, dest: &mut Session) -> Result<Found> {
    let mark = mark(live).await?;
    let (here, there) = (oids(live).await?, oids(dest).await?);
    let both = sorted(here.intersection(&there).copied());
    let mut differing = differing(live, dest, &both).await?;
    differing.extend(here.difference(&there));
    Ok(Found {
        differing: sorted(differing.into_iter()),
        gone: sorted(there.difference(&here).copied()),
        touched: sorted(here.into_iter()),
        mark,
    })
}

/// A condition on rows that were written since.
///
/// A row that a snapshot shows cannot be of a transaction to come: one that looks so is of one two
/// thousand million transactions ago.
fn newer(since: Mark) -> String {
    let xid = since.xmin % (1 << 32);
    format!("pg_catalog.age(xmin) between 0 and pg_catalog.age('{xid}'::pg_catalog.xid)")
}

/// What was written to `live` since `since`.
async fn changed(live: &mut Session, dest: &mut Session, since: Mark, now: Mark) -> Result<Found> {
    let newer = newer(since);
    let list = async |live: &mut Session, sql: String| -> pg::Result<HashSet<u32>> {
        live.query(&sql).await?.iter().map(|row| row.parse(0)).collect()
    };
    let sql = format!("select distinct loid from pg_catalog.pg_largeobject where {newer}");
    let mut contents = list(live, sql).await?;
    let sql = format!("select oid from pg_catalog.pg_largeobject_metadata where {newer}");
    let objects = list(live, sql).await?;
    let mut gone = Vec::new();
    if !objects.is_empty() || now.count != since.count {
        let (here, there) = (oids(live).await?, oids(dest).await?);
        gone = sorted(there.difference(&here).copied());
        contents.extend(objects.difference(&there));
        // Removed and made again, and empty now: no page tells of it.
        let doubtful = sorted(objects.difference(&contents).copied());
        let sql = format!(
            "select o.oid from pg_catalog.unnest({}) o(oid) where not exists \
             (select 1 from pg_catalog.pg_largeobject l where l.loid = o.oid)",
            array(&doubtful)
        );
        contents.extend(list(live, sql).await?);
    }
    let touched = sorted(contents.union(&objects).copied());
    Ok(Found { differing: sorted(contents.into_iter()), gone, touched, mark: now })
}

/// Those of `both` whose contents differ.
async fn differing(live: &mut Session, dest: &mut Session, both: &[u32]) -> Result<Vec<u32>> {
    let mut found = Vec::new();
    for asked in both.chunks(ASKED) {
        let sides = tokio::try_join!(fingerprints(live, asked), fingerprints(dest, asked))?;
        found.extend(asked.iter().filter(|oid| sides.0.get(oid) != sides.1.get(oid)));
    }
    Ok(found)
}

/// Bytes of a page of pg_largeobject, as an int8.
pub(super) const PAGE: &str = "(pg_catalog.current_setting('block_size')::int8 / 4)";

/// The oid with its descriptor and size. A subquery with OFFSET is evaluated once for each row; but
/// what it gave is remembered (Memoize, from 14 on) by what goes into it, and descriptors that are
/// closed come again: so the oid goes in.
const OPENED: &str = "lateral (select pg_catalog.lo_open(o.oid, 262144) fd offset 0) f, \
     lateral (select pg_catalog.lo_lseek64(f.fd, 0, 2) + 0 * o.oid::int8 size offset 0) s";

/// Size and fingerprint, in pieces of a megabyte, however large an object is.
async fn fingerprints(session: &mut Session, oids: &[u32]) -> pg::Result<HashMap<u32, String>> {
    let sql = format!(
        "select o.oid, s.size || ' ' || (select pg_catalog.md5(pg_catalog.string_agg( \
             pg_catalog.md5(pg_catalog.lo_get(o.oid, g * 1048576, 1048576)), '' order by g)) \
             from pg_catalog.generate_series(0::int8, (s.size - 1) / 1048576) g), \
         pg_catalog.lo_close(f.fd) from pg_catalog.unnest({}) o(oid), {OPENED}",
        array(oids)
    );
    // Descriptors belong to a transaction; alone, the statement is one.
    session.query(&sql).await?.iter().map(|row| Ok((row.parse(0)?, row.string(1)?))).collect()
}

/// Sizes in bytes. Where pages are seen, without opening the objects: that takes a lock which a
/// fence of ours would not let through.
pub(super) async fn sizes(
    session: &mut Session,
    oids: &[u32],
    sees_pages: bool,
) -> pg::Result<Vec<(u32, u64)>> {
    if sees_pages {
        let sql = format!(
            "select o.oid, coalesce((select l.pageno * {PAGE} + length(l.data) \
                 from pg_catalog.pg_largeobject l where l.loid = o.oid \
                 order by l.pageno desc limit 1), 0) from pg_catalog.unnest({}) o(oid) order by 1",
            array(oids)
        );
        let rows = session.query(&sql).await?;
        return rows.iter().map(|row| Ok((row.parse(0)?, row.parse(1)?))).collect();
    }
    let sql = format!(
        "select o.oid, s.size, pg_catalog.lo_close(f.fd) from pg_catalog.unnest({}) o(oid), \
         {OPENED} order by 1",
        array(oids)
    );
    session.query(&sql).await?.iter().map(|row| Ok((row.parse(0)?, row.parse(1)?))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn oids_become_an_array() {
        assert_eq!(array(&[7, 4_000_000_000]), "'{7,4000000000}'::pg_catalog.oid[]");
        assert_eq!(sorted([3, 1, 2].into_iter()), [1, 2, 3]);
    }
}
