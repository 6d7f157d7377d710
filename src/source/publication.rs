//! walferry's own publication: exactly the job's tables.
//!
//! FOR ALL TABLES would need a superuser and would publish tables that the job leaves behind. The
//! publication must exist before the slot is made, and a table must be in it before its first
//! change that matters is written: decoding looks at the catalogs as they were at each change.
//!
//! Partitions publish under their own names (`publish_via_partition_root = false`), so that a
//! TRUNCATE of one leaf is seen and rows stay where the source put them. From 13 on it is enough to
//! publish the top of a partition tree, and partitions attached later come along; 10 to 12 know
//! only leaves, so there [`ensure`] must run again when one is attached.
//!
//! <https://www.postgresql.org/docs/current/sql-createpublication.html>

use std::collections::{BTreeMap, BTreeSet, HashMap};

use crate::id::{QualifiedName, quote_ident, quote_literal};
use crate::pg::Session;

use super::{Error, Result};

/// What [`ensure`] had to do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ensured {
    /// The publication was not there.
    pub created: bool,
    /// Tables that were not in it, as published (roots or leaves).
    pub added: Vec<QualifiedName>,
    /// Tables that were in it and should not be.
    pub removed: Vec<QualifiedName>,
}

/// Makes the publication cover exactly `tables`, all operations, and nothing else.
///
/// One that the role does not own is left as it is if it covers `tables` at least.
///
/// A partition may be listed with or without its parents, and a parent stands for all its
/// partitions. Idempotent: a second call changes nothing. Errors before changing anything:
/// `Unlogged`, `TablesMissing`, `PublicationForeign`; and `PublicationRefused` for missing rights.
pub async fn ensure(
    session: &mut Session,
    publication: &str,
    tables: &[QualifiedName],
) -> Result<Ensured> {
    let wanted = published(session, tables).await?;
    let mut ensured = Ensured::default();
    match flags(session, publication).await? {
        None => {
            let sql = format!(
                "create publication {}{} with ({})",
                quote_ident(publication),
                for_table(&wanted),
                options(session)
            );
            change(session, &format!("creating publication {publication}"), &sql).await?;
            ensured.created = true;
            ensured.added = wanted.into_iter().collect();
            return Ok(ensured);
        }
        Some(flags) if flags.all_tables => {
            return Err(Error::PublicationForeign { publication: publication.to_string() });
        }
        // An administrator's does if it shows enough: what it shows besides is filtered.
        Some(flags) if flags.as_wanted && !flags.owned => {
            if missing(session, publication, tables).await?.is_empty() {
                return Ok(ensured);
            }
        }
        Some(flags) if flags.as_wanted => {}
        Some(_) => {
            let sql = format!(
                "alter publication {} set ({})",
                quote_ident(publication),
                options(session)
            );
            change(session, &format!("altering publication {publication}"), &sql).await?;
        }
    }
    let present = members(session, publication).await?;
    let whole: BTreeSet<QualifiedName> =
        present.iter().filter(|m| m.whole).map(|m| m.table.clone()).collect();
    ensured.added = wanted.difference(&whole).cloned().collect();
    ensured.removed =
        present.into_iter().map(|m| m.table).filter(|t| !wanted.contains(t)).collect();
    if !ensured.added.is_empty() || !ensured.removed.is_empty() {
        let doing = format!("altering publication {publication}");
        change(session, &doing, &set_tables(publication, &wanted, &ensured.removed)).await?;
    }
    Ok(ensured)
}

/// Has the server itself leave out rows of tables of our publication that fail a condition, where
/// it can (15 and on). Gives the tables of which it does.
///
/// A condition it refuses (functions that are not its own, for one) is the reader's to apply, who
/// applies the others as well: the server only sends less. Each condition must be of columns of the
/// table's replica identity, or the server would refuse an application's UPDATE and DELETE.
///
/// <https://www.postgresql.org/docs/current/logical-replication-row-filter.html>
pub async fn narrow(
    session: &mut Session,
    publication: &str,
    conditions: &BTreeMap<QualifiedName, String>,
) -> Result<Vec<QualifiedName>> {
    let owned = flags(session, publication).await?.is_some_and(|flags| flags.owned);
    if conditions.is_empty() || session.major_version() < 15 || !owned {
        return Ok(Vec::new());
    }
    let (name, mut narrowed) = (quote_ident(publication), Vec::new());
    session.execute("begin").await?;
    for (table, condition) in conditions {
        let one = table_list([table]);
        let sql = format!(
            "savepoint one; alter publication {name} drop table {one}; \
             alter publication {name} add table {one} where ({condition})"
        );
        match session.execute(&sql).await {
            Ok(_) => narrowed.push(table.clone()),
            Err(error) if error.is_closed() => return Err(error.into()),
            Err(error) => {
                tracing::info!(%table, %error, "its rows are left out here");
                session.execute("rollback to savepoint one").await?;
            }
        }
    }
    session.execute("commit").await?;
    Ok(narrowed)
}

/// Tables listed in the publication, ordered; `None` if there is no such publication.
pub async fn list(session: &mut Session, publication: &str) -> Result<Option<Vec<QualifiedName>>> {
    if flags(session, publication).await?.is_none() {
        return Ok(None);
    }
    let members = members(session, publication).await?;
    Ok(Some(members.into_iter().map(|m| m.table).collect()))
}

/// Those of `tables` that the publication does not cover, by themselves or by a parent, ordered: as
/// published, so a new leaf of a published tree is none of them.
pub async fn missing(
    session: &mut Session,
    publication: &str,
    tables: &[QualifiedName],
) -> Result<Vec<QualifiedName>> {
    let wanted = published(session, tables).await?;
    let present = members(session, publication).await?;
    let present: BTreeSet<QualifiedName> = present.into_iter().map(|m| m.table).collect();
    Ok(wanted.difference(&present).cloned().collect())
}

/// True if there is such a publication, and it covers `tables`.
///
/// Errors: `TablesMissing`, `Unlogged`.
pub async fn covers(
    session: &mut Session,
    publication: &str,
    tables: &[QualifiedName],
) -> Result<bool> {
    Ok(flags(session, publication).await?.is_some()
        && missing(session, publication, tables).await?.is_empty())
}

/// Drops the publication; `false` if there was none, or an administrator made it, whose it stays.
pub async fn drop(session: &mut Session, publication: &str) -> Result<bool> {
    let sql = format!(
        "select 1 from pg_catalog.pg_publication where pubname = {} \
         and pg_catalog.pg_has_role(pubowner, 'usage')",
        quote_literal(publication)
    );
    if session.query(&sql).await?.is_empty() {
        return Ok(false);
    }
    let sql = format!("drop publication if exists {}", quote_ident(publication));
    change(session, &format!("dropping publication {publication}"), &sql).await?;
    Ok(true)
}

async fn change(session: &mut Session, doing: &str, sql: &str) -> Result<()> {
    match session.execute(sql).await {
        Ok(_) => Ok(()),
        Err(source) if source.code() == Some("42501") => {
            Err(Error::PublicationRefused { doing: doing.to_string(), source })
        }
        Err(error) => Err(error.into()),
    }
}

fn options(session: &Session) -> &'static str {
    match session.major_version() {
        0..11 => "publish = 'insert, update, delete'",
        11 | 12 => "publish = 'insert, update, delete, truncate'",
        _ => "publish = 'insert, update, delete, truncate', publish_via_partition_root = false",
    }
}

/// ONLY, or tables that inherit from a listed one without being listed would come along.
fn table_list<'a>(tables: impl IntoIterator<Item = &'a QualifiedName>) -> String {
    let names: Vec<String> =
        tables.into_iter().map(|table| format!("only {}", table.quoted())).collect();
    names.join(", ")
}

fn for_table(tables: &BTreeSet<QualifiedName>) -> String {
    if tables.is_empty() { String::new() } else { format!(" for table {}", table_list(tables)) }
}

/// One statement, so that no moment has a publication that is neither the old nor the new one.
fn set_tables(
    publication: &str,
    wanted: &BTreeSet<QualifiedName>,
    removed: &[QualifiedName],
) -> String {
    let publication = quote_ident(publication);
    if wanted.is_empty() {
        return format!("alter publication {publication} drop table {}", table_list(removed));
    }
    format!("alter publication {publication} set table {}", table_list(wanted))
}

struct Flags {
    all_tables: bool,
    as_wanted: bool,
    owned: bool,
}

async fn flags(session: &mut Session, publication: &str) -> Result<Option<Flags>> {
    let sql = format!(
        "select p.puballtables, p.pubinsert and p.pubupdate and p.pubdelete \
           and coalesce((pg_catalog.to_jsonb(p) ->> 'pubtruncate')::bool, true) \
           and not coalesce((pg_catalog.to_jsonb(p) ->> 'pubviaroot')::bool, false), \
           pg_catalog.pg_has_role(p.pubowner, 'usage') \
         from pg_catalog.pg_publication p where p.pubname = {}",
        quote_literal(publication)
    );
    match session.query(&sql).await?.first() {
        Some(row) => Ok(Some(Flags {
            all_tables: row.bool(0)?,
            as_wanted: row.bool(1)?,
            owned: row.bool(2)?,
        })),
        None => Ok(None),
    }
}

struct Member {
    table: QualifiedName,
    /// Without row filter and column list (15 and on). Ours may have a filter: see [`narrow`].
    whole: bool,
}

async fn members(session: &mut Session, publication: &str) -> Result<Vec<Member>> {
    let sql = format!(
        "select n.nspname, c.relname, pg_catalog.to_jsonb(r) ->> 'prqual' is null \
           and pg_catalog.to_jsonb(r) ->> 'prattrs' is null \
         from pg_catalog.pg_publication p \
         join pg_catalog.pg_publication_rel r on r.prpubid = p.oid \
         join pg_catalog.pg_class c on c.oid = r.prrelid \
         join pg_catalog.pg_namespace n on n.oid = c.relnamespace \
         where p.pubname = {} order by 1, 2",
        quote_literal(publication)
    );
    let mut members = Vec::new();
    for row in session.query(&sql).await? {
        let table = QualifiedName::new(row.str(0)?, row.str(1)?);
        members.push(Member { table, whole: row.bool(2)? });
    }
    Ok(members)
}

/// A table as far as publishing it goes.
struct Candidate {
    name: QualifiedName,
    partitioned: bool,
    logged: bool,
    parent: Option<u32>,
    plain: bool,
}

/// What to list so that exactly `tables` (and partitions of listed parents) are published.
async fn published(
    session: &mut Session,
    tables: &[QualifiedName],
) -> Result<BTreeSet<QualifiedName>> {
    let candidates = candidates(session).await?;
    let by_name: HashMap<&QualifiedName, u32> =
        candidates.iter().map(|(oid, c)| (&c.name, *oid)).collect();
    let missing: Vec<_> = tables.iter().filter(|t| !by_name.contains_key(t)).cloned().collect();
    if !missing.is_empty() {
        return Err(Error::TablesMissing { tables: missing });
    }
    let asked: BTreeSet<u32> = tables.iter().filter_map(|t| by_name.get(t).copied()).collect();
    // The topmost asked-for table above each; the whole tree below it counts.
    let top = |oid: u32| {
        let chain = std::iter::successors(Some(oid), |oid| candidates.get(oid)?.parent);
        chain.filter(|oid| asked.contains(oid)).last()
    };
    let covered: Vec<(u32, &Candidate, u32)> = candidates
        .iter()
        .filter_map(|(oid, candidate)| Some((*oid, candidate, top(*oid)?)))
        .collect();
    let mut unlogged: Vec<QualifiedName> =
        covered.iter().filter(|(_, c, _)| !c.logged).map(|(_, c, _)| c.name.clone()).collect();
    if !unlogged.is_empty() {
        unlogged.sort();
        return Err(Error::Unlogged { tables: unlogged });
    }
    let roots = session.major_version() >= 13;
    let listed = covered.iter().filter(|(oid, candidate, top)| {
        if roots { oid == top } else { candidate.plain && !candidate.partitioned }
    });
    Ok(listed.map(|(_, candidate, _)| candidate.name.clone()).collect())
}

async fn candidates(session: &mut Session) -> Result<HashMap<u32, Candidate>> {
    let rows = session
        .query(
            "select c.oid, n.nspname, c.relname, c.relkind = 'p', c.relpersistence = 'p', \
               case when c.relispartition then h.inhparent end, c.relkind <> 'f' \
             from pg_catalog.pg_class c \
             join pg_catalog.pg_namespace n on n.oid = c.relnamespace \
             left join pg_catalog.pg_inherits h on h.inhrelid = c.oid and c.relispartition \
             where c.relkind in ('r', 'p') or (c.relkind = 'f' and c.relispartition)",
        )
        .await?;
    let mut candidates = HashMap::with_capacity(rows.len());
    for row in &rows {
        let candidate = Candidate {
            name: QualifiedName::new(row.str(1)?, row.str(2)?),
            partitioned: row.bool(3)?,
            logged: row.bool(4)?,
            parent: row.parse_opt(5)?,
            plain: row.bool(6)?,
        };
        candidates.insert(row.parse(0)?, candidate);
    }
    Ok(candidates)
}
