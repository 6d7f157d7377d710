//! Tables whose changes are kept instead of written: in order, in the very transaction that would
//! have written them.
//!
//! A table is parked from one change on: one that the target refused (`--on-row-error quarantine`),
//! or the first one under a description that the target's table does not have (`--ddl hold`). All
//! later changes of the table wait behind it, whatever their rows. To park single keys would let
//! others through, but what a row is to its table (unique values that change hands, TRUNCATE, a
//! table without a key) is known to the target alone, and a change in the wrong order is worse than
//! one that waits. All other tables go on.
//!
//! ```text
//! walferry.parked           a row for each table: why, from which change on, what would mend it
//! walferry.parked_relation  descriptions that kept changes were read under
//! walferry.parked_change    the changes, `id` in the order of the stream
//! ```
//! A refused row is found when its batch has failed. What was written of it is rolled back, the
//! table's row is written with the transaction and the place in it, and the stream begins again
//! from the target's progress, as after a crash; on its second way the change is kept. So there is
//! no moment at which a crash could lose it: until the row is there, it is refused again.
//!
//! Transactions stay whole for all tables that are not parked. Of a parked one a reader sees an
//! earlier state, until its changes are written by `release`.

use std::collections::HashMap;
use std::sync::Arc;

use super::admit::Admitted;
use super::batch::Batch;
use super::error::{Culprit, Error, Result};
use super::request::{Request, Role};
use super::writer::Writer;
use crate::change::{Change, Column, OldRow, Relation, ReplicaIdentity, Row};
use crate::id::QualifiedName;
use crate::pg::{self, Param, Pipeline, Session};

/// What becomes of a row that the target refuses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnRowError {
    /// The stream stops, and nothing of its transaction is written.
    #[default]
    Stop,
    /// It is kept, and its table parked; the stream goes on.
    Quarantine,
}

impl std::str::FromStr for OnRowError {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<OnRowError, String> {
        match text {
            "stop" => Ok(OnRowError::Stop),
            "quarantine" => Ok(OnRowError::Quarantine),
            other => Err(format!("\"{other}\" is neither stop nor quarantine")),
        }
    }
}

/// Why a table is parked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The target refused a row of it.
    Row,
    /// The source's table was altered, and the target's was not.
    Ddl,
}

impl Reason {
    /// As stored.
    pub fn as_str(self) -> &'static str {
        match self {
            Reason::Row => "row",
            Reason::Ddl => "ddl",
        }
    }

    /// From what is stored.
    pub fn named(text: &str) -> Reason {
        if text == "ddl" { Reason::Ddl } else { Reason::Row }
    }
}

/// A table that is parked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Park {
    /// Why.
    pub reason: Reason,
    /// Before which change its changes are still written: transaction, and place in it.
    pub from: Option<(u32, u64)>,
    /// What keeps it.
    pub error: String,
    /// The SQL that is waited for.
    pub awaited: Option<String>,
}

/// A change that is kept.
#[derive(Debug)]
pub(super) struct Kept {
    /// Chunk and change in the batch.
    pub at: (usize, usize),
    /// Its table; of a TRUNCATE one of its tables.
    pub relation: Arc<Relation>,
    /// Its place in its transaction.
    pub ordinal: u64,
}

/// All parked tables of a stream, by the names that their changes come under.
#[derive(Debug, Default)]
pub(super) struct Parks {
    tables: HashMap<QualifiedName, Park>,
    /// Place in its transaction of the change that comes next.
    ordinal: u64,
}

impl Parks {
    /// The stream's, as the target has them.
    pub async fn read(session: &mut Session, stream: &str) -> Result<Parks> {
        let [rows] = session.exchange_each([Parks::asking(stream)]).await?;
        Parks::told(rows)
    }

    /// Asks for them.
    pub fn asking(stream: &str) -> Pipeline {
        let mut pipeline = Pipeline::new();
        let sql = "select schema, name, reason, error, awaited, \
               case when not begun then from_xid end, from_ordinal \
             from walferry.parked where stream = $1";
        pipeline.ask(sql, &[Some(stream)]);
        pipeline
    }

    /// By the answer to that.
    pub fn told(rows: pg::Result<Vec<pg::Row>>) -> Result<Parks> {
        let mut parks = Parks::default();
        let rows = match rows {
            // Nothing was ever parked by an earlier version's job.
            Err(error) if matches!(error.code(), Some("42P01" | "3F000")) => Vec::new(),
            rows => rows?,
        };
        for row in rows {
            let ordinal: u64 = row.parse(6)?;
            let park = Park {
                reason: Reason::named(row.str(2)?),
                from: row.parse_opt(5)?.map(|xid| (xid, ordinal)),
                error: row.string(3)?,
                awaited: row.opt(4)?.map(str::to_string),
            };
            parks.tables.insert(QualifiedName::new(row.str(0)?, row.str(1)?), park);
        }
        Ok(parks)
    }

    /// True if no table is parked.
    pub fn is_empty(&self) -> bool {
        self.tables.is_empty()
    }

    /// True if none of the table's changes is written any more.
    pub fn keeps_all(&self, table: &QualifiedName) -> bool {
        self.tables.get(table).is_some_and(|park| park.from.is_none())
    }

    /// The table's changes are kept from now on.
    pub fn insert(&mut self, table: QualifiedName, park: Park) {
        self.tables.insert(table, park);
    }

    /// They are written again.
    pub fn remove(&mut self, table: &QualifiedName) {
        self.tables.remove(table);
    }

    /// From which change on the table is parked: `None` for one that is not, `Some(None)` if all of
    /// its changes are kept by now.
    pub fn from(&self, table: &QualifiedName) -> Option<Option<(u32, u64)>> {
        self.tables.get(table).map(|park| park.from)
    }

    /// Place in its transaction of the change that comes next.
    pub fn ordinal(&self) -> u64 {
        self.ordinal
    }

    /// The place of a chunk's first change in its transaction.
    pub fn chunk(&mut self, number: u32, changes: usize) -> u64 {
        let first = if number == 0 { 0 } else { self.ordinal };
        self.ordinal = first + changes as u64;
        first
    }

    /// True if this change of the table is to be kept.
    pub fn keeps(&mut self, table: &QualifiedName, xid: u32, ordinal: u64) -> bool {
        let Some(park) = self.tables.get_mut(table) else { return false };
        match park.from {
            Some((first_xid, first)) if xid != first_xid || ordinal < first => return false,
            Some(_) => park.from = None,
            None => {}
        }
        true
    }
}

const PARK: &str = "insert into walferry.parked as p (stream, schema, name, reason, from_xid, \
       from_ordinal, from_lsn, begun, error, awaited) \
     values ($1::text, $2::text, $3::text, $4::text, $5::int8, $6::int8, $7::pg_lsn, $8::bool, \
       $9::text, $10::text) \
     on conflict (stream, schema, name) do update set begun = p.begun or excluded.begun";

const DESCRIBE: &str = "insert into walferry.parked_relation (stream, id, description) \
     values ($1::text, $2::text, $3::text) on conflict (stream, id) do nothing";

const KEEP: &str = "insert into walferry.parked_change (stream, schema, name, relation, xid, \
       commit_lsn, ordinal, operation, old_full, old, new) \
     values ($1::text, $2::text, $3::text, $4::text, $5::int8, $6::pg_lsn, $7::int8, $8::text, \
       $9::bool, $10::bytea, $11::bytea)";

impl Writer {
    /// Adds what keeps the changes of parked tables: their tables first, as the stream's order of
    /// changes is the order of the statements.
    pub(super) fn park(&self, request: &mut Request, batch: &Batch, admitted: &Admitted) {
        if admitted.kept.is_empty() {
            return;
        }
        let mut tables: Vec<&QualifiedName> = Vec::new();
        let mut relations: HashMap<usize, String> = HashMap::new();
        for kept in &admitted.kept {
            let Some(chunk) = batch.chunks.get(kept.at.0) else { continue };
            let name = &kept.relation.name;
            if !tables.contains(&name)
                && let Some(park) = self.routes.parks.tables.get(name)
            {
                tables.push(name);
                let first = (chunk.begin.xid, kept.ordinal, chunk.begin.commit_lsn.to_string());
                self.park_table(request, name, park, &first, true);
            }
            relations.entry(Arc::as_ptr(&kept.relation).addr()).or_insert_with(|| {
                let description = describe(&kept.relation);
                let id = fingerprint(&description);
                let params = [&*self.stream, &id, &description];
                once(request, DESCRIBE, &params.map(|p| Param::Text(Some(p.as_bytes()))));
                id
            });
        }
        request.pipeline.parse("", KEEP, &[]);
        for kept in &admitted.kept {
            let relation = relations.get(&Arc::as_ptr(&kept.relation).addr());
            self.keep(request, batch, kept, relation.map_or("", String::as_str));
        }
    }

    fn park_table(
        &self,
        request: &mut Request,
        name: &QualifiedName,
        park: &Park,
        (xid, ordinal, lsn): &(u32, u64, String),
        begun: bool,
    ) {
        let (xid, ordinal) = (xid.to_string(), ordinal.to_string());
        let begun = if begun { "t" } else { "f" };
        let text = |text: &'static str| text;
        let params = [
            Some(&*self.stream),
            Some(&*name.schema),
            Some(&*name.name),
            Some(text(park.reason.as_str())),
            Some(&*xid),
            Some(&*ordinal),
            Some(&**lsn),
            Some(begun),
            Some(&*park.error),
            park.awaited.as_deref(),
        ];
        once(request, PARK, &params.map(|p| Param::Text(p.map(str::as_bytes))));
    }

    fn keep(&self, request: &mut Request, batch: &Batch, kept: &Kept, relation: &str) {
        let chunk = batch.chunks.get(kept.at.0);
        let change = chunk.and_then(|chunk| chunk.changes.get(kept.at.1));
        let (Some(chunk), Some(change)) = (chunk, change) else { return };
        let (operation, old, new) = match change {
            Change::Insert { new, .. } => ("INSERT", None, Some(new)),
            Change::Update { old, new, .. } => ("UPDATE", old.as_ref(), Some(new)),
            Change::Delete { old, .. } => ("DELETE", Some(old), None),
            Change::Truncate { restart_identity: true, .. } => (TRUNCATE_RESTART, None, None),
            Change::Truncate { .. } => ("TRUNCATE", None, None),
            Change::Message { .. } => return,
        };
        let full = old.map(|old| if matches!(old, OldRow::Full(_)) { "t" } else { "f" });
        let (xid, ordinal) = (chunk.begin.xid.to_string(), kept.ordinal.to_string());
        let lsn = chunk.begin.commit_lsn.to_string();
        let name = &kept.relation.name;
        let params = [
            text(&self.stream),
            text(&name.schema),
            text(&name.name),
            text(relation),
            text(&xid),
            text(&lsn),
            text(&ordinal),
            text(operation),
            full.map_or(Param::Text(None), text),
            image(old.map(OldRow::row)),
            image(new),
        ];
        request.pipeline.run_mixed("", &params);
        request.roles.push(Role::Aside);
    }
}

/// `operation` of a TRUNCATE ... RESTART IDENTITY.
pub(super) const TRUNCATE_RESTART: &str = "TRUNCATE RESTART IDENTITY";

fn text(text: &str) -> Param<'_> {
    Param::Text(Some(text.as_bytes()))
}

fn image(row: Option<&Row>) -> Param<'_> {
    row.map_or(Param::Text(None), |row| Param::Binary(row.as_bytes()))
}

/// Adds one statement with parameters, without a name.
fn once(request: &mut Request, sql: &str, params: &[Param<'_>]) {
    request.pipeline.parse("", sql, &[]);
    request.pipeline.run_mixed("", params);
    request.roles.push(Role::Aside);
}

/// Notes that the table is parked from the culprit on, in a transaction of its own. Harmless if it
/// is noted already.
pub(super) async fn park_from(session: &mut Session, stream: &str, park: &Noted<'_>) -> Result<()> {
    let Noted { culprit, reason, error, awaited } = park;
    let (xid, ordinal) = (culprit.xid.to_string(), culprit.ordinal.to_string());
    let params = [
        Some(stream),
        Some(&*culprit.table.schema),
        Some(&*culprit.table.name),
        Some(reason.as_str()),
        Some(&*xid),
        Some(&*ordinal),
        Some(&*culprit.commit_lsn.to_string()),
        Some("f"),
        Some(*error),
        *awaited,
    ];
    session.query_params(PARK, &params).await?;
    Ok(())
}

/// Why a table is parked from a change on.
pub(super) struct Noted<'a> {
    /// The change.
    pub culprit: &'a Culprit,
    /// Why.
    pub reason: Reason,
    /// In words.
    pub error: &'a str,
    /// What would mend it.
    pub awaited: Option<&'a str>,
}

/// A description as JSON.
fn describe(relation: &Relation) -> String {
    let columns: Vec<serde_json::Value> = relation
        .columns
        .iter()
        .map(|c| serde_json::json!([c.name, c.type_oid, c.type_modifier, c.key]))
        .collect();
    let letter = match relation.identity {
        ReplicaIdentity::Default => "d",
        ReplicaIdentity::Nothing => "n",
        ReplicaIdentity::Full => "f",
        ReplicaIdentity::Index => "i",
    };
    let (schema, name) = (&relation.name.schema, &relation.name.name);
    serde_json::json!([relation.oid, schema, name, letter, columns]).to_string()
}

/// The other way.
pub(super) fn described(text: &str) -> Result<Relation> {
    type Stored = (u32, String, String, String, Vec<(String, u32, i32, bool)>);
    let broken = |what: String| Error::Broken(format!("walferry.parked_relation: {what}"));
    let (oid, schema, name, letter, columns): Stored =
        serde_json::from_str(text).map_err(|e| broken(e.to_string()))?;
    let identity = letter.bytes().next().and_then(ReplicaIdentity::from_letter);
    let column =
        |(name, type_oid, type_modifier, key)| Column { name, type_oid, type_modifier, key };
    Ok(Relation {
        oid,
        name: QualifiedName { schema, name },
        identity: identity.ok_or_else(|| broken(format!("identity {letter}")))?,
        columns: columns.into_iter().map(column).collect(),
    })
}

/// Tells descriptions apart in few bytes.
fn fingerprint(description: &str) -> String {
    use sha2::Digest;
    let digest = sha2::Sha256::digest(description.as_bytes());
    digest.iter().take(16).map(|byte| format!("{byte:02x}")).collect()
}

/// Forgets a stream's parked tables and all that was kept of them. Harmless if there are none.
pub(super) async fn forget(session: &mut Session, stream: &str) -> pg::Result<()> {
    for table in ["parked", "parked_change", "parked_relation", "source_table", "altered"] {
        let there = format!("select pg_catalog.to_regclass('walferry.{table}') is not null");
        if session.query_one(&there, &[]).await?.bool(0)? {
            let sql = format!("delete from walferry.{table} where stream = $1");
            session.query_params(&sql, &[Some(stream)]).await?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn park(from: Option<(u32, u64)>) -> Park {
        Park { reason: Reason::Row, from, error: String::new(), awaited: None }
    }

    #[test]
    fn a_table_is_kept_from_its_change_on_and_no_other() {
        let [table, other] = ["t", "u"].map(|name| QualifiedName::new("public", name));
        let mut parks = Parks::default();
        assert!(!parks.keeps(&table, 7, 3));
        parks.insert(table.clone(), park(Some((7, 3))));
        assert!(!parks.keeps(&table, 6, 9));
        assert!(!parks.keeps(&table, 7, 2));
        assert!(!parks.keeps(&other, 7, 3));
        assert!(parks.keeps(&table, 7, 3));
        assert!(parks.keeps(&table, 8, 0));
        parks.remove(&table);
        assert!(!parks.keeps(&table, 9, 0));
    }

    #[test]
    fn places_go_on_over_the_chunks_of_a_transaction() {
        let mut parks = Parks::default();
        assert_eq!(
            [(0, 5), (1, 3), (2, 1), (0, 2)].map(|(n, len)| parks.chunk(n, len)),
            [0, 5, 8, 0]
        );
    }

    #[test]
    fn a_description_comes_back_as_it_was() {
        let column = |name: &str, key| Column {
            name: name.to_string(),
            type_oid: 23,
            type_modifier: -1,
            key,
        };
        let relation = Relation {
            oid: 99,
            name: QualifiedName::new("My \"s\"", "t,1"),
            identity: ReplicaIdentity::Index,
            columns: vec![column("a b", true), column("\u{e9}", false)],
        };
        assert_eq!(described(&describe(&relation)).unwrap(), relation);
        assert!(described("[1]").is_err());
    }
}
