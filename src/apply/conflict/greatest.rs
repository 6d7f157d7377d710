//! The greater value in a column wins: `--on-conflict greatest:COLUMN`.
//!
//! # What is weighed
//! A change that comes has the value of its row; a deletion has none, and is less than all, NULL
//! next. What is here has the greatest value of all versions of the row that the change did not
//! know, not only the last: the other side met them one by one, and let the first greater one, and
//! all behind it, take the place of what it had. So a row whose value falls must not lose here what
//! it has won there. Commit times cannot fall, which is why only columns take this.
//!
//! The last version is the row itself. The value of one before is noted by a trigger
//! (`walferry.two_way_left`) with the xid that wrote it, where an application lowers it or deletes
//! the row. Of the notes the latest that is not less than the change decides: if that one was
//! known, so were those before it. Once the stream has overwritten a row that it did not know, the
//! notes before it count no more, and go. What a stream's own session notes, where it may not
//! switch triggers off, never counts: the value is not an application's choice.
//!
//! Both sides weigh by the type's own order (its default btree operator class). Texts are ordered
//! by their bytes, as the order of a language differs between servers; enums by their labels, which
//! both sides have from one definition.
//!
//! # What cannot be weighed
//! A value that an UPDATE leaves as it is may be out of line (TOAST), and is not in the stream then
//! but for REPLICA IDENTITY FULL. Check asks for that where it may come to it; otherwise the stream
//! stops, as what the other side has by now is another version.

use std::collections::HashMap;
use std::sync::Arc;

use super::Settler;
use super::judge::Incoming;
use super::look::{LastWriter, Plan, is_ours, last_writer};
use crate::apply::error::{Error, Result};
use crate::change::{Change, OldRow, Relation, Row, Value};
use crate::id::{QualifiedName, Stream, quote_ident, quote_literal};
use crate::pg::{self, Session};

/// What a table's column is worth for settling conflicts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Weight {
    /// The type without length, precision or domains, for a cast.
    pub type_name: String,
    /// `operator(schema.<)` of the type; `None` where it has no order, or none that two servers
    /// agree on: arrays, ranges and rows may hold texts, and money is written in many ways.
    pub less: Option<String>,
    /// Its order is that of a collation.
    pub collates: bool,
    /// `GENERATED ALWAYS AS (...)`: not in the stream.
    pub generated: bool,
    /// Its values may be out of line, where a stream does not show those that stay as they are.
    pub toasted: bool,
}

/// Columns of the name `$2` in tables `$1`.
///
/// The operator is found as for equality, see `apply::target`.
const WEIGHTS: &str = "with recursive named as ( \
       select n.nspname, c.relname, a.atttypid, a.attstorage in ('x', 'e') as toasted, \
         coalesce(pg_catalog.to_jsonb(a) ->> 'attgenerated', '') <> '' as generated \
         from pg_catalog.jsonb_array_elements($1::jsonb) w(name) \
         join pg_catalog.pg_namespace n on n.nspname = w.name ->> 0 \
         join pg_catalog.pg_class c on c.relnamespace = n.oid and c.relname = w.name ->> 1 \
         join pg_catalog.pg_attribute a on a.attrelid = c.oid and a.attname = $2::text \
           and a.attnum > 0 and not a.attisdropped), \
     base(own, oid, typbasetype) as ( \
       select t.oid, t.oid, t.typbasetype from pg_catalog.pg_type t \
         where t.oid in (select atttypid from named) \
       union all select b.own, t.oid, t.typbasetype from base b \
         join pg_catalog.pg_type t on t.oid = b.typbasetype), \
     less(oid, operator) as ( \
       select distinct on (b.oid) b.oid, \
         pg_catalog.format('operator(%I.%s)', n.nspname, o.oprname) \
         from base b \
         join pg_catalog.pg_opclass k on k.opcdefault and k.opcintype in (select b.oid union all \
             select x.casttarget from pg_catalog.pg_cast x where x.castsource = b.oid \
             and x.castmethod = 'b' and x.castcontext = 'i') \
         join pg_catalog.pg_am m on m.oid = k.opcmethod and m.amname = 'btree' \
         join pg_catalog.pg_amop p on p.amopfamily = k.opcfamily and p.amopstrategy = 1 \
             and p.amoplefttype = k.opcintype and p.amoprighttype = k.opcintype \
         join pg_catalog.pg_operator o on o.oid = p.amopopr \
         join pg_catalog.pg_namespace n on n.oid = o.oprnamespace \
         where b.typbasetype = 0 \
         order by b.oid, k.opcintype = b.oid desc, o.oid) \
     select d.nspname, d.relname, pg_catalog.format_type(b.oid, -1), \
       case when b.oid = 'pg_catalog.money'::pg_catalog.regtype then null \
         when t.typtype = 'e' then 'operator(pg_catalog.<)' \
         else (select l.operator from less l where l.oid = b.oid) end, \
       t.typcollation <> 0, d.generated, d.toasted \
     from named d join base b on b.own = d.atttypid and b.typbasetype = 0 \
     join pg_catalog.pg_type t on t.oid = b.oid";

/// Asks a side about the columns of that name; tables that have none are left out.
///
/// # Errors
/// What the server or the connection says.
pub async fn weights(
    session: &mut Session,
    tables: &[QualifiedName],
    column: &str,
) -> pg::Result<HashMap<QualifiedName, Weight>> {
    let names: Vec<[&str; 2]> = tables.iter().map(|n| [&*n.schema, &*n.name]).collect();
    let names = serde_json::json!(names).to_string();
    let rows = session.query_params(WEIGHTS, &[Some(&names), Some(column)]).await?;
    let read = |row: &pg::Row| {
        let weight = Weight {
            type_name: row.string(2)?,
            less: row.opt(3)?.map(str::to_string),
            collates: row.bool(4)?,
            generated: row.bool(5)?,
            toasted: row.bool(6)?,
        };
        Ok((QualifiedName::new(row.str(0)?, row.str(1)?), weight))
    };
    rows.iter().map(read).collect()
}

impl Weight {
    /// The condition of a trigger that an UPDATE lowers the column; `None` where it has no order.
    pub fn falls(&self, column: &str) -> Option<String> {
        let column = quote_ident(column);
        let (old, new) = (format!("old.{column}"), format!("new.{column}"));
        let lower = self.less(&new, &old)?;
        Some(format!("{lower} or ({new} is null and {old} is not null)"))
    }

    fn less(&self, a: &str, b: &str) -> Option<String> {
        let collate = if self.collates { " collate pg_catalog.\"C\"" } else { "" };
        self.less.as_ref().map(|less| format!("{a} {less} {b}{collate}"))
    }
}

/// The column that settles a table.
#[derive(Clone, Debug)]
pub(super) struct Scale {
    name: String,
    /// Its place in the relation.
    place: usize,
    weight: Weight,
}

impl Scale {
    /// Asks the written side; `None` if the table has no such column.
    pub async fn of(
        session: &mut Session,
        relation: &Relation,
        table: &QualifiedName,
        column: &str,
    ) -> Result<Option<Scale>> {
        let unfit = |why| Error::TwoWayColumn {
            table: relation.name.clone(),
            column: column.to_string(),
            why,
        };
        let found = weights(session, std::slice::from_ref(table), column).await?.remove(table);
        let Some(weight) = found else { return Ok(None) };
        if weight.less.is_none() {
            return Err(unfit("its type has no order that both sides read alike"));
        }
        let place = relation.columns.iter().position(|c| c.name == column);
        let place = place.ok_or_else(|| unfit("the stream does not bring it"))?;
        Ok(Some(Scale { name: column.to_string(), place, weight }))
    }

    /// The condition that `$1`, the value of a change of `stream`, is not greater than `local`.
    fn holds(&self, local: &str, stream: Stream) -> String {
        let come = format!("$1::{}", self.weight.type_name);
        let less = |a: &str, b: &str| self.weight.less(a, b).unwrap_or_default();
        match stream {
            // Of two that are equal the source's wins, and that is the one that comes.
            Stream::Forward => {
                format!("({} or ({come} is null and {local} is not null))", less(&come, local))
            }
            Stream::Reverse => format!("({come} is null or not {})", less(local, &come)),
        }
    }

    /// The writers of all that `$1` is not greater than: of the row `t` of `table` that `found`
    /// tells, and of the latest such value that one of the key left.
    fn rivals(&self, table: &str, found: &str, key: &str, streams: (&str, Stream)) -> String {
        let (name, stream) = streams;
        let own = format!("t.{}", quote_ident(&self.name));
        let left = format!("l.value::{}", self.weight.type_name);
        format!(
            "(select {} from only {table} t where {found} and {}) union all \
             (select {} from walferry.two_way_left l where {} and {} and not {} \
             order by l.id desc limit 1)",
            last_writer("t.xmin", name),
            self.holds(&own, stream),
            last_writer("l.xid", name),
            left_by(table, key),
            self.holds(&left, stream),
            is_ours("l.xmin", name),
        )
    }
}

/// The condition that a note `l` is of the key that `key` gives as JSON.
fn left_by(table: &str, key: &str) -> String {
    format!(
        "l.relation = {}::regclass::oid \
         and pg_catalog.md5(l.key::text) = pg_catalog.md5(({key})::text)",
        quote_literal(table)
    )
}

/// Takes away the notes of the key that `key` gives as JSON.
pub(super) fn forget(table: &str, key: &str) -> String {
    format!("delete from walferry.two_way_left l where {}", left_by(table, key))
}

/// Where a row is that a change meets.
pub(super) enum Place<'a> {
    /// Under this key, or gone from there.
    Key(&'a [Option<String>]),
    /// Here, locked.
    Ctid(&'a str),
}

impl Settler {
    /// Whether a change's value is greater than those that it did not know, of a row that some
    /// rival wrote last.
    pub(super) async fn outweighs(
        &mut self,
        session: &mut Session,
        (relation, table): (&Arc<Relation>, &str),
        (value, place): (Option<String>, Place<'_>),
        incoming: &Incoming,
    ) -> Result<bool> {
        let plan = self.plan(relation)?;
        let Some(scale) = plan.scale.as_ref() else { return Ok(false) };
        let streams = (self.stream.as_str(), incoming.stream);
        let mut params = vec![value];
        let sql = match place {
            Place::Key(key) => {
                params.extend(key.iter().cloned());
                scale.rivals(table, &plan.has_key(2), &plan.key_json(2), streams)
            }
            Place::Ctid(ctid) => {
                let (here, key) = plan.at(table, ctid);
                scale.rivals(table, &here, &key, streams)
            }
        };
        let params: Vec<Option<&str>> = params.iter().map(|param| param.as_deref()).collect();
        for row in session.query_params(&sql, &params).await? {
            let last = LastWriter::read(&row, 0)?;
            if self.rival(last, incoming.commit_time).await?.is_some() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The value of a change in the column that settles its table; `None` for NULL.
    ///
    /// # Errors
    /// The stream does not show it.
    pub(super) fn value_of(
        &self,
        relation: &Arc<Relation>,
        change: &Change,
    ) -> Result<Option<String>> {
        let plan = self.plan(relation)?;
        let (new, old) = match change {
            Change::Insert { new, .. } => (new, None),
            Change::Update { new, old, .. } => (new, old.as_ref()),
            _ => return Ok(None),
        };
        let Some(scale) = &plan.scale else { return Ok(None) };
        let before = match old {
            Some(OldRow::Full(row)) => Some(row),
            _ => None,
        };
        let text = |row: &Row| match row.values().nth(scale.place) {
            Some(Value::Null) => Some(None),
            Some(Value::Text(bytes) | Value::Binary(bytes)) => {
                Some(Some(String::from_utf8_lossy(bytes).into_owned()))
            }
            Some(Value::Unchanged) | None => None,
        };
        text(new).or_else(|| before.and_then(text)).ok_or_else(|| Error::TwoWayUnseen {
            table: relation.name.clone(),
            column: scale.name.clone(),
        })
    }

    /// The same of a change to a row that is here and was known: what it leaves is here.
    pub(super) async fn value_here(
        &self,
        session: &mut Session,
        (relation, table): (&Arc<Relation>, &str),
        (key, change): (&[Option<String>], &Change),
    ) -> Result<Option<String>> {
        let plan = self.plan(relation)?;
        let (unseen, scale) = match (self.value_of(relation, change), &plan.scale) {
            (Err(unseen @ Error::TwoWayUnseen { .. }), Some(scale)) => (unseen, scale),
            (outcome, _) => return outcome,
        };
        let column = quote_ident(&scale.name);
        let sql = format!("select t.{column}::text from only {table} t where {}", plan.has_key(1));
        let key: Vec<Option<&str>> = key.iter().map(|part| part.as_deref()).collect();
        let row = session.query_opt(&sql, &key).await?.ok_or(unseen)?;
        Ok(row.opt(0)?.map(str::to_string))
    }
}

impl Plan {
    /// The condition that `t` is the row at `ctid`, and its key as JSON.
    pub(super) fn at(&self, table: &str, ctid: &str) -> (String, String) {
        let here = format!("t.ctid = {}::tid", quote_literal(ctid));
        let key = format!("select {} from only {table} t where {here}", self.own_key_json());
        (here, key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scale(type_name: &str, collates: bool) -> Scale {
        let less = Some("operator(pg_catalog.<)".to_string());
        let type_name = type_name.to_string();
        let weight = Weight { type_name, less, collates, generated: false, toasted: false };
        Scale { name: "at".to_string(), place: 0, weight }
    }

    #[test]
    fn of_two_equal_values_the_sources_wins_on_both_sides() {
        let scale = scale("bigint", false);
        assert_eq!(
            scale.holds("x", Stream::Forward),
            "($1::bigint operator(pg_catalog.<) x or ($1::bigint is null and x is not null))"
        );
        assert_eq!(
            scale.holds("x", Stream::Reverse),
            "($1::bigint is null or not x operator(pg_catalog.<) $1::bigint)"
        );
    }

    #[test]
    fn texts_are_compared_by_their_bytes_in_triggers_and_in_streams() {
        let scale = scale("text", true);
        let less = "operator(pg_catalog.<)";
        assert_eq!(
            scale.weight.falls("At").unwrap(),
            format!(
                "new.\"At\" {less} old.\"At\" collate pg_catalog.\"C\" \
                 or (new.\"At\" is null and old.\"At\" is not null)"
            )
        );
        assert!(scale.holds("x", Stream::Reverse).contains("collate pg_catalog.\"C\""));
        let unordered = Weight { less: None, ..scale.weight };
        assert_eq!(unordered.falls("at"), None);
    }
}
