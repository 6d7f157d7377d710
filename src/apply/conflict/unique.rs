//! Rows that have a unique value which a change is about to write, under another primary key.
//!
//! Of the two rows one can be: the loser is deleted, or not let in, on both sides. What violates an
//! index over expressions or a part of the table is not looked for, and stops the stream.

use std::sync::Arc;

use super::Settler;
use super::greatest::Place;
use super::judge::{Incoming, Rival};
use super::look::{LastWriter, last_writer};
use crate::apply::error::Result;
use crate::apply::statement::Mapping;
use crate::change::{Change, Relation, Value};
use crate::id::quote_ident;
use crate::pg::{self, Session};

/// Columns of the table's unique indexes, without those that are only INCLUDEd (11 and newer).
const INDEXES: &str = "select pg_catalog.array_to_json(array(select a.attname::text \
     from pg_catalog.unnest(i.indkey::int2[]) with ordinality as k (attnum, place) \
     join pg_catalog.pg_attribute a on a.attrelid = i.indrelid and a.attnum = k.attnum \
     where k.place <= coalesce((pg_catalog.to_jsonb(i) ->> 'indnkeyatts')::int, 32) \
     order by k.place))::text from pg_catalog.pg_index i \
     where i.indrelid = $1::text::regclass and i.indisunique and i.indisvalid \
     and i.indpred is null and i.indexprs is null order by i.indexrelid";

/// A row in the way.
#[derive(Clone, Debug)]
pub(super) struct Hit {
    /// Where it is, for as long as it is locked.
    pub ctid: String,
    /// The local transaction that wrote it, if the change was made without knowing that.
    pub rival: Option<Rival>,
}

impl Settler {
    /// Locks and gives the rows in the way of `new`, which is to be the row now found by `key`.
    pub(super) async fn hits(
        &mut self,
        session: &mut Session,
        (relation, mapping): (&Arc<Relation>, &Mapping),
        (key, change): (&[Option<String>], &Change),
        incoming: &Incoming,
    ) -> Result<Vec<Hit>> {
        let address = Arc::as_ptr(relation).addr();
        let indexes = match self.plan(relation)?.unique.clone() {
            Some(indexes) => indexes,
            None => indexes(session, relation, mapping).await?,
        };
        let (Change::Insert { new, .. } | Change::Update { new, .. }) = change else {
            return Ok(Vec::new());
        };
        let values: Vec<Value<'_>> = new.values().collect();
        let mut found = Vec::new();
        for columns in &indexes {
            let text = |column: &usize| match values.get(*column) {
                Some(Value::Text(bytes)) => Some(String::from_utf8_lossy(bytes).into_owned()),
                // NULL is in nobody's way; what is unchanged is where it was.
                _ => None,
            };
            let given: Option<Vec<String>> = columns.iter().map(text).collect();
            let Some(given) = given else { continue };
            let plan = self.plan(relation)?;
            let mut parts = Vec::new();
            for (n, column) in columns.iter().enumerate() {
                let Some(target) = mapping.target(*column) else { continue };
                let operator = target.equality.as_deref().unwrap_or("=");
                let (name, type_name) = (quote_ident(&target.name), &target.base_type_name);
                parts.push(format!("t.{name} {operator} ${}::{type_name}", n + 1));
            }
            let sql = format!(
                "select t.ctid::text, {} from only {} t where {} and not ({}) for update of t",
                last_writer("t.xmin", &self.stream),
                mapping.table.name.quoted(),
                parts.join(" and "),
                plan.has_key(columns.len() + 1),
            );
            let given = given.iter().map(|text| Some(text.as_str()));
            let params: Vec<Option<&str>> = given.chain(key.iter().map(|k| k.as_deref())).collect();
            for row in session.query_params(&sql, &params).await? {
                found.push((row.string(0)?, LastWriter::read(&row, 1)?));
            }
        }
        if let Some(plan) = self.plans.get_mut(&address) {
            plan.unique = Some(indexes);
        }
        let mut hits: Vec<Hit> = Vec::new();
        for (ctid, last) in found {
            if hits.iter().any(|hit| hit.ctid == ctid) {
                continue;
            }
            let mut rival = self.rival(last, incoming.commit_time).await?;
            if let Some(rival) = rival.as_mut().filter(|_| incoming.rule.is_none()) {
                let (table, place) = (mapping.table.name.quoted(), Place::Ctid(&ctid));
                let at = (relation, &*table);
                let value = self.value_here(session, at, (key, change)).await?;
                rival.outweighed = self.outweighs(session, at, (value, place), incoming).await?;
            }
            hits.push(Hit { ctid, rival });
        }
        Ok(hits)
    }
}

async fn indexes(
    session: &mut Session,
    relation: &Relation,
    mapping: &Mapping,
) -> Result<Vec<Vec<usize>>> {
    let table = mapping.table.name.quoted();
    let mut indexes = Vec::new();
    for row in session.query_params(INDEXES, &[Some(&table)]).await? {
        let names: Vec<String> = serde_json::from_str(row.str(0)?)
            .map_err(|e| pg::Error::Result(format!("unique indexes of {table}: {e}")))?;
        let place = |name: &String| relation.columns.iter().position(|c| c.name == *name);
        let columns: Option<Vec<usize>> = names.iter().map(place).collect();
        indexes.extend(columns.filter(|columns| !columns.is_empty()));
    }
    Ok(indexes)
}
