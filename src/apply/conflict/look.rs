//! What the written side has in a change's place: the statements, and reading their answers.

use std::sync::Arc;

use super::Settler;
use super::greatest::{self, Scale};
use super::judge::Rival;
use super::policy::Rule;
use crate::apply::error::{Error, Result};
use crate::apply::statement::Mapping;
use crate::change::{Change, OldRow, Relation, Row, Value};
use crate::clock::PgTimestamp;
use crate::id::{quote_ident, quote_literal};
use crate::pg::{self, Pipeline, Session};

/// A table's statements. Parameters of all of them end with, or are, its key.
pub(super) struct Plan {
    pub relation: Arc<Relation>,
    /// Places of the key's columns in the relation, with the type they are cast to and the operator
    /// that compares them.
    key: Vec<(usize, String, String)>,
    /// Prepared: locks the row for an update, for a deletion; looks for a deletion; records.
    pub look: String,
    pub look_away: String,
    pub gone: String,
    pub record: String,
    /// The same, of what settles by a column: takes away the notes of a key.
    pub forget: String,
    /// Unique keys beside the primary one, asked for when needed.
    pub unique: Option<Vec<Vec<usize>>>,
    /// What settles the table's conflicts; `None`: `scale` does.
    pub rule: Option<Rule>,
    /// The column whose values do.
    pub scale: Option<Scale>,
    /// The policy as recorded.
    policy: String,
}

/// The last writer of a row.
#[derive(Clone, Copy, Debug)]
pub(super) struct LastWriter {
    /// This stream, or the transaction under way.
    pub ours: bool,
    /// Otherwise a local transaction, unless it is older than commit times are kept.
    pub local: Option<Rival>,
}

impl LastWriter {
    /// From the columns of [`last_writer`], the first of which is at `column`.
    pub fn read(row: &pg::Row, column: usize) -> pg::Result<LastWriter> {
        let commit_time = row.parse_opt::<i64>(column + 2)?.map(PgTimestamp::from_unix_micros);
        let xid: u32 = row.parse(column)?;
        let local = commit_time.map(|commit_time| Rival { xid, commit_time, outweighed: false });
        Ok(LastWriter { ours: row.bool(column + 1)?, local })
    }
}

/// Columns that tell whose `xid` is: the xid, whether it is this stream's, commit time in
/// microseconds. A raw xmin of a row frozen long ago may be that of a transaction of now, four
/// billion later; then a conflict is found that is none.
///
/// <https://www.postgresql.org/docs/current/functions-info.html> (commit timestamps)
pub(super) fn last_writer(xid: &str, stream: &str) -> String {
    format!(
        "{xid}::text, {}, \
         (extract(epoch from pg_catalog.pg_xact_commit_timestamp({xid})) * 1000000)::int8",
        is_ours(xid, stream)
    )
}

/// The condition that `xid` is of this stream, or of the transaction under way.
pub(super) fn is_ours(xid: &str, stream: &str) -> String {
    let stream = quote_literal(stream);
    format!(
        "({xid}::text::int8 = pg_catalog.txid_current() % 4294967296 or exists (select 1 \
         from walferry.two_way_applied a where a.stream = {stream} \
         and a.own_xid = {xid}::text::int8))"
    )
}

impl Plan {
    /// The condition that a row of `t` has the key given as parameters from `first` on.
    pub fn has_key(&self, first: usize) -> String {
        let parts: Vec<String> = self
            .key
            .iter()
            .enumerate()
            .map(|(n, (column, type_name, operator))| {
                let name = quote_ident(self.name(*column));
                format!("t.{name} {operator} ${}::{type_name}", first + n)
            })
            .collect();
        parts.join(" and ")
    }

    fn name(&self, column: usize) -> &str {
        self.relation.columns.get(column).map_or("", |column| column.name.as_str())
    }

    /// The key given as parameters from `first` on as a trigger notes it, see `job::noting`.
    pub fn key_json(&self, first: usize) -> String {
        self.noted(|n, (_, type_name, _)| format!("${}::{type_name}", first + n))
    }

    /// The same of a row `t`.
    pub fn own_key_json(&self) -> String {
        self.noted(|_, (column, ..)| format!("t.{}", quote_ident(self.name(*column))))
    }

    fn noted(&self, value: impl Fn(usize, &(usize, String, String)) -> String) -> String {
        let part = |(n, part): (usize, &(usize, String, String))| {
            let name = quote_literal(self.name(part.0));
            format!("{name}, pg_catalog.to_jsonb({}) #>> '{{}}'", value(n, part))
        };
        let parts: Vec<String> = self.key.iter().enumerate().map(part).collect();
        format!("pg_catalog.jsonb_build_object({})", parts.join(", "))
    }

    /// The key's values in a row.
    pub fn key_of(&self, row: &Row) -> Vec<Option<String>> {
        let values: Vec<Value<'_>> = row.values().collect();
        let text = |column: usize| {
            let bytes = values.get(column).and_then(|value| value.bytes());
            bytes.map(|bytes| String::from_utf8_lossy(bytes).into_owned())
        };
        self.key.iter().map(|(column, ..)| text(*column)).collect()
    }

    /// The key of the row that the change finds, and the key that the row has then, where that is
    /// another.
    pub fn keys(&self, change: &Change) -> (Vec<Option<String>>, Option<Vec<Option<String>>>) {
        match change {
            Change::Insert { new, .. } => (self.key_of(new), None),
            Change::Update { old: None, new, .. } => (self.key_of(new), None),
            Change::Update { old: Some(old), new, .. } => {
                let (before, after) = (self.key_of(old.row()), self.key_of(new));
                // A key may be unchanged TOAST.
                let moved = before != after && after.iter().all(Option::is_some);
                (before, moved.then_some(after))
            }
            Change::Delete { old, .. } => (self.key_of(old.row()), None),
            Change::Truncate { .. } | Change::Message { .. } => (Vec::new(), None),
        }
    }
}

impl Settler {
    /// Prepares a table's statements.
    pub(super) async fn meet(
        &mut self,
        session: &mut Session,
        relation: &Arc<Relation>,
        mapping: &Mapping,
    ) -> Result<()> {
        let key = key(relation, mapping)?;
        let policy = &self.options.policy;
        let scale = match policy.column() {
            Some(column) => Scale::of(session, relation, &mapping.table.name, column).await?,
            None => None,
        };
        let rule = policy.others().filter(|_| scale.is_none());
        let settled_by = match (&scale, rule) {
            (Some(_), _) => format!("greatest:{}", policy.column().unwrap_or_default()),
            (None, Some(rule)) => rule.as_str().to_string(),
            (None, None) => {
                let column = policy.column().unwrap_or_default().to_string();
                let (table, why) = (relation.name.clone(), "there is none");
                return Err(Error::TwoWayColumn { table, column, why });
            }
        };
        self.prepared += 1;
        let name = |what: &str| format!("walferry_two_way_{what}_{}", self.prepared);
        let plan = Plan {
            relation: relation.clone(),
            key,
            look: name("look"),
            look_away: name("away"),
            gone: name("gone"),
            record: name("record"),
            forget: name("forget"),
            unique: None,
            rule,
            scale,
            policy: settled_by,
        };
        let mut pipeline = Pipeline::new();
        let (table, filter) = (mapping.table.name.quoted(), plan.has_key(1));
        let look = format!(
            "select {} from only {table} t where {filter}",
            last_writer("t.xmin", &self.stream)
        );
        pipeline.parse(&plan.look, &format!("{look} for no key update of t"), &[]);
        pipeline.parse(&plan.look_away, &format!("{look} for update of t"), &[]);
        let key_json = plan.key_json(1);
        let gone = format!(
            "select {} from walferry.two_way_deleted d where d.relation = {}::regclass::oid \
             and pg_catalog.md5(d.key::text) = pg_catalog.md5(({key_json})::text) \
             order by d.id desc limit 1",
            last_writer("d.xmin", &self.stream),
            quote_literal(&table),
        );
        pipeline.parse(&plan.gone, &gone, &[]);
        if plan.scale.is_some() {
            pipeline.parse(&plan.forget, &greatest::forget(&table, &key_json), &[]);
        }
        let row = format!("select pg_catalog.to_jsonb(t) from only {table} t where {}", {
            plan.has_key(9)
        });
        pipeline.parse(&plan.record, &self.record_sql(&plan, &row), &[]);
        session.exchange(pipeline, |_| {}).await?;
        self.plans.insert(Arc::as_ptr(relation).addr(), plan);
        Ok(())
    }

    /// The statement that records a conflict; `row` gives the local row as JSON. Its own parameters
    /// are eight.
    pub(super) fn record_sql(&self, plan: &Plan, row: &str) -> String {
        let name = &plan.relation.name;
        format!(
            "insert into walferry.conflict (stream, schema, name, kind, policy, outcome, incoming, \
             local, commit_lsn, xid, commit_time, local_xid, local_commit_time) \
             values ({}, {}, {}, $1::text, {}, $2::text, $3::jsonb, ({row}), $4::pg_lsn, \
             $5::int8, $6::timestamptz, $7::int8, $8::timestamptz)",
            quote_literal(&self.stream),
            quote_literal(&name.schema),
            quote_literal(&name.name),
            quote_literal(&plan.policy),
        )
    }

    pub(super) fn plan(&self, relation: &Arc<Relation>) -> Result<&Plan> {
        let plan = self.plans.get(&Arc::as_ptr(relation).addr());
        plan.ok_or_else(|| Error::Broken(format!("{} was not looked at before", relation.name)))
    }
}

/// The primary key, if the stream identifies rows by it.
fn key(relation: &Relation, mapping: &Mapping) -> Result<Vec<(usize, String, String)>> {
    use crate::apply::statement::Locator;
    let unkeyed = || Error::TwoWayWithoutKey { table: relation.name.clone() };
    let Locator::Key(found_by) = &mapping.locator else { return Err(unkeyed()) };
    let place = |name: &String| relation.columns.iter().position(|c| c.name == *name);
    let key: Option<Vec<usize>> = mapping.table.key.iter().map(place).collect();
    let key = key.filter(|key| !key.is_empty()).ok_or_else(unkeyed)?;
    if !key.iter().all(|column| found_by.contains(column)) {
        return Err(unkeyed());
    }
    let typed = |column: usize| {
        let target = mapping.target(column).ok_or_else(unkeyed)?;
        let operator = target.equality.clone().unwrap_or_else(|| "=".to_string());
        Ok((column, target.base_type_name.clone(), operator))
    };
    key.into_iter().map(typed).collect()
}

/// A change's row as people read it: what the stream has of it, by column.
pub(super) fn shown(relation: &Relation, change: &Change) -> String {
    let row = match change {
        Change::Insert { new, .. } | Change::Update { new, .. } => new,
        Change::Delete { old, .. } => old.row(),
        Change::Truncate { .. } | Change::Message { .. } => return "{}".to_string(),
    };
    let only_key = matches!(change, Change::Delete { old: OldRow::Key(_), .. });
    let mut object = serde_json::Map::new();
    for (column, value) in relation.columns.iter().zip(row.values()) {
        let value = match value {
            Value::Null if only_key => continue,
            Value::Unchanged => continue,
            Value::Null => serde_json::Value::Null,
            Value::Text(bytes) | Value::Binary(bytes) => {
                serde_json::Value::String(String::from_utf8_lossy(bytes).into_owned())
            }
        };
        object.insert(column.name.clone(), value);
    }
    serde_json::Value::Object(object).to_string()
}
