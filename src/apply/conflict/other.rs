//! The side that is read, asked what it knew and what it has now.

use std::sync::Arc;

use super::Settler;
use super::judge::Rival;
use crate::apply::error::Result;
use crate::change::{Relation, Row, RowBuilder, Value};
use crate::clock::PgTimestamp;
use crate::id::quote_ident;
use crate::pg::Session;

/// When the other side had applied a transaction of this one; and before when all that committed
/// is known there. By xid first, as two may commit in one microsecond; by time where the xid is
/// that of a subtransaction, which the stream does not tell.
const SEEN: &str = "select (select (extract(epoch from a.at) * 1000000)::int8 \
     from walferry.two_way_applied a where a.stream = $1 \
     and a.commit_time = timestamptz 'epoch' + $3::int8 * interval '1 microsecond' \
     order by (a.xid = $2::int8) desc, a.at desc limit 1), \
     (select (extract(epoch from seen_before) * 1000000)::int8 \
     from walferry.two_way where stream = $1)";

impl Settler {
    /// True if the change that committed at `commit_time` over there was made knowing what
    /// `rival` wrote here.
    pub(super) async fn knew(&mut self, rival: Rival, commit_time: PgTimestamp) -> Result<bool> {
        let time = rival.commit_time.unix_micros();
        if self.seen_before.is_some_and(|before| time < before) {
            return Ok(true);
        }
        let xid = rival.xid.to_string();
        let time_text = time.to_string();
        let opposite = self.options.opposite.clone();
        let mut other = self.take_other().await?;
        let row = other.query_one(SEEN, &[Some(&opposite), Some(&xid), Some(&time_text)]).await?;
        self.other = Some(other);
        // Without it the job was not opened to writers of both sides yet: nobody is a rival.
        self.seen_before = row.parse_opt::<i64>(1)?;
        if let Some(at) = row.parse_opt::<i64>(0)? {
            return Ok(commit_time.unix_micros() > at);
        }
        Ok(self.seen_before.is_none_or(|before| time < before))
    }

    /// The row with those values that the stream left out (unchanged TOAST) as the other side has
    /// them now; `None` if it has the row no more, which the stream is about to tell.
    pub(super) async fn filled(
        &mut self,
        relation: &Arc<Relation>,
        row: &Row,
    ) -> Result<Option<Row>> {
        let values: Vec<Value<'_>> = row.values().collect();
        let unchanged = values.iter().enumerate().filter(|(_, v)| **v == Value::Unchanged);
        let columns: Vec<usize> = unchanged.map(|(column, _)| column).collect();
        if columns.is_empty() {
            return Ok(Some(row.clone()));
        }
        let plan = self.plan(relation)?;
        let name = |c: &usize| relation.columns.get(*c).map_or("", |c| c.name.as_str());
        let list: Vec<String> =
            columns.iter().map(|c| format!("t.{}::text", quote_ident(name(c)))).collect();
        let (list, table) = (list.join(", "), relation.name.quoted());
        let sql = format!("select {list} from only {table} t where {}", plan.has_key(1));
        let key = plan.key_of(row);
        let key: Vec<Option<&str>> = key.iter().map(|k| k.as_deref()).collect();
        let mut other = self.take_other().await?;
        let found = other.query_opt(&sql, &key).await?;
        self.other = Some(other);
        let Some(found) = found else { return Ok(None) };
        let mut builder = RowBuilder::new();
        let mut next = 0;
        for value in &values {
            if *value != Value::Unchanged {
                builder.push(*value);
                continue;
            }
            let text = found.bytes(next);
            next += 1;
            builder.push(text.map_or(Value::Null, |bytes| Value::Text(bytes)));
        }
        Ok(Some(builder.finish()))
    }

    /// To be put back where nothing failed: a broken session is not used again.
    async fn take_other(&mut self) -> Result<Session> {
        match self.other.take() {
            Some(session) => Ok(session),
            None => Ok(Session::control(&self.options.other).await?),
        }
    }
}
