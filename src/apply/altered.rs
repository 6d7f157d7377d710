//! Source tables that were altered while they are followed.
//!
//! Each table's description is remembered (`walferry.source_table`), first as it was when the
//! schema was copied. A description in the stream that differs is held against that, at the place
//! where its first change stands, and whoever knows both catalogs ([`Alter`]) says what it takes on
//! the target:
//!
//! ```text
//! nothing        the target's table has it already      remembered, and on
//! statements     run here, once: in the target transaction of the changes behind them, which also
//!                holds progress and what is remembered. What is before them in the batch is
//!                written first, in a transaction of its own where the source's ended there.
//! to wait        the table is parked from this change on, and asked about again every second
//! to stop        an error that names the SQL
//! ```
//! A crash before that transaction commits leaves nothing of it; after, the description is the
//! remembered one.

use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use super::batch::Batch;
use super::error::{Culprit, Error, Result};
use super::parking::{self, Noted, Park, Reason};
use super::release::Refusal;
use super::{Applier, MESSAGE_PREFIX};
use crate::change::{Captured, KnownColumn, Relation};
use crate::fault::{Fault, Faulty};
use crate::id::QualifiedName;
use crate::pg::{self, Session};

/// What an altered table takes on the target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing.
    Fits,
    /// These statements, here.
    Apply(Vec<String>),
    /// To wait.
    Hold(Why),
    /// A person.
    Stop(Why),
}

/// What was altered, and what has to be run on the target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Why {
    /// In words.
    pub altered: String,
    /// The SQL; empty where it cannot be told.
    pub sql: String,
}

/// A future of whoever knows both catalogs.
pub type Answer<'a> =
    Pin<Box<dyn Future<Output = Result<(Verdict, Vec<KnownColumn>)>> + Send + 'a>>;

/// Knows the source's and the target's catalog, and what is wanted.
pub trait Alter: Send + Sync {
    /// The table whose rows are DDL that the source has captured, if there is one.
    fn captures(&self) -> Option<&QualifiedName>;

    /// The statement that is meant, to be run inside the transaction or, where the flag says so and
    /// none is open, outside; `None` if there is nothing to do.
    fn captured(&self, ddl: &Captured) -> std::result::Result<Option<(String, bool)>, Why>;

    /// What it takes to write rows of `relation`, and the columns to remember it by. `known` is
    /// what was remembered; `None` for a table that is new. `target` is the session that writes,
    /// so that it sees what was altered in the transaction that is open.
    fn altered<'a>(
        &'a self,
        target: &'a mut Session,
        known: Option<&'a [KnownColumn]>,
        relation: &'a Relation,
    ) -> Answer<'a>;

    /// The same where the target refused a text for a type of its own (22P02): enum labels.
    fn relabelled<'a>(&'a self, target: &'a mut Session, relation: &'a Relation) -> Answer<'a>;
}

/// What is remembered, by table.
pub(super) type Known = HashMap<QualifiedName, Vec<KnownColumn>>;

/// Remembers descriptions of tables, of a stream that does not run.
pub async fn remember(
    session: &mut Session,
    stream: &str,
    tables: &HashMap<QualifiedName, Vec<KnownColumn>>,
) -> Result<()> {
    session.execute("begin").await?;
    for (table, columns) in tables {
        store(session, stream, table, columns).await?;
    }
    session.execute("commit").await?;
    Ok(())
}

async fn store(
    session: &mut Session,
    stream: &str,
    table: &QualifiedName,
    columns: &[KnownColumn],
) -> Result<()> {
    let columns: Vec<_> =
        columns.iter().map(|c| (c.attnum, &c.name, c.type_oid, c.type_modifier)).collect();
    let columns = serde_json::json!(columns).to_string();
    let sql = "insert into walferry.source_table (stream, schema, name, columns) \
         values ($1, $2, $3, $4) on conflict (stream, schema, name) do update \
         set columns = excluded.columns";
    let params = [stream, &table.schema, &table.name, &columns].map(Some);
    session.query_params(sql, &params).await?;
    Ok(())
}

/// What is remembered of the stream's tables.
pub(super) async fn known(session: &mut Session, stream: &str) -> Result<Known> {
    let mut known = Known::new();
    let sql = "select schema, name, columns from walferry.source_table where stream = $1";
    for row in session.query_params(sql, &[Some(stream)]).await? {
        type Stored = Vec<(i16, String, u32, i32)>;
        let columns: Stored = serde_json::from_str(row.str(2)?)
            .map_err(|e| Error::Broken(format!("walferry.source_table: {e}")))?;
        let column = |(attnum, name, type_oid, type_modifier)| KnownColumn {
            attnum,
            name,
            type_oid,
            type_modifier,
        };
        let columns = columns.into_iter().map(column).collect();
        known.insert(QualifiedName::new(row.str(0)?, row.str(1)?), columns);
    }
    Ok(known)
}

/// True if the description is what is remembered.
fn is_known(known: &[KnownColumn], relation: &Relation) -> bool {
    known.len() == relation.columns.len()
        && known.iter().zip(&relation.columns).all(|(known, column)| {
            known.name == column.name
                && known.type_oid == column.type_oid
                && known.type_modifier == column.type_modifier
        })
}

/// The place of a relation's first change in a batch.
pub(super) struct Place {
    pub chunk: usize,
    pub change: usize,
    ordinal: u64,
    relation: Arc<Relation>,
}

impl Applier {
    /// Gets to know the tables of the batch, of which nothing may be under way. Gives what is left
    /// of it to be written: all, or what is behind statements that were run here.
    pub(super) async fn meet(&mut self, mut batch: Batch) -> Result<Batch> {
        if self.alter.is_none() {
            self.writer.meet(&mut self.session, &batch).await?;
            return Ok(batch);
        }
        self.writer.routes.retire();
        self.writer.foresee(&mut self.session, &batch).await?;
        while let Some(place) = self.first_unknown(&batch) {
            let Place { relation, ordinal, .. } = &place;
            let Some(begin) = batch.chunks.get(place.chunk).map(|c| c.begin.clone()) else { break };
            if self.is_captured(&relation.name) {
                batch = self.carry(batch, &place).await?;
                continue;
            }
            if self.is_kept_at(&batch, &place) {
                self.writer.routes.learn(relation, None);
                continue;
            }
            let (verdict, columns) = self.judge(relation).await?;
            match verdict {
                Verdict::Fits => {
                    self.remember(&relation.name, columns).await?;
                    self.writer.routes.ensure(&mut self.session, relation).await?;
                }
                Verdict::Stop(why) => {
                    let table = relation.name.clone();
                    return Err(Error::Altered { table, altered: why.altered, sql: why.sql });
                }
                Verdict::Hold(why) => {
                    let park = Park {
                        reason: Reason::Ddl,
                        from: Some((begin.xid, *ordinal)),
                        error: why.altered,
                        awaited: Some(why.sql).filter(|sql| !sql.is_empty()),
                    };
                    tracing::warn!(table = %relation.name, awaited = park.awaited, "parked");
                    self.writer.routes.parks.insert(relation.name.clone(), park);
                    self.writer.routes.learn(relation, None);
                }
                Verdict::Apply(statements) => {
                    batch = self.write_before(batch, &place).await?;
                    let culprit = Culprit {
                        operation: "ALTER",
                        table: relation.name.clone(),
                        key: String::new(),
                        commit_lsn: begin.commit_lsn,
                        xid: begin.xid,
                        ordinal: *ordinal,
                    };
                    self.alter_here(&culprit, &statements, columns).await?;
                    batch.opens = false;
                    self.writer.routes.foresee_no_more();
                    self.writer.routes.ensure(&mut self.session, relation).await?;
                }
            }
        }
        self.writer.routes.foresee_no_more();
        Ok(batch)
    }

    fn first_unknown(&self, batch: &Batch) -> Option<Place> {
        let mut next = self.writer.routes.parks.ordinal();
        for (chunk_at, chunk) in batch.chunks.iter().enumerate() {
            let first = if chunk.number == 0 { 0 } else { next };
            next = first + chunk.changes.len() as u64;
            for (change_at, change) in chunk.changes.iter().enumerate() {
                let mut unknown =
                    change.relations().iter().filter(|r| self.writer.routes.get(r).is_none());
                if let Some(relation) = unknown.next() {
                    return Some(Place {
                        chunk: chunk_at,
                        change: change_at,
                        ordinal: first + change_at as u64,
                        relation: relation.clone(),
                    });
                }
            }
        }
        None
    }

    /// True if the change there comes after the one from which on its table is parked.
    fn is_kept_at(&self, batch: &Batch, place: &Place) -> bool {
        let parks = &self.writer.routes.parks;
        let (xid, ordinal) = match parks.from(&place.relation.name) {
            None => return false,
            Some(None) => return true,
            Some(Some(from)) => from,
        };
        let mut next = parks.ordinal();
        for (at, chunk) in batch.chunks.iter().enumerate().take(place.chunk + 1) {
            let first = if chunk.number == 0 { 0 } else { next };
            next = first + chunk.changes.len() as u64;
            let end = if at == place.chunk { place.ordinal + 1 } else { next };
            if chunk.begin.xid == xid && end > ordinal {
                return true;
            }
        }
        false
    }

    /// What the description takes; what fits is to be remembered by the columns.
    async fn judge(&mut self, relation: &Relation) -> Result<(Verdict, Vec<KnownColumn>)> {
        let known = self.known.get(&relation.name);
        let ours = relation.name.schema == MESSAGE_PREFIX;
        let none = ours || !self.writer.routes.takes_part(&relation.name);
        let Some(alter) = self.alter.clone().filter(|_| !none) else {
            return Ok((Verdict::Fits, Vec::new()));
        };
        if let Some(known) = known.filter(|known| is_known(known, relation)) {
            return Ok((Verdict::Fits, known.clone()));
        }
        alter.altered(&mut self.session, known.map(Vec::as_slice), relation).await
    }

    /// Of a parked table: what keeps changes under this description from being written, if
    /// something does. What may be run for them is run. Nothing may be open.
    pub(super) async fn admit_kept(&mut self, relation: &Relation) -> Result<Option<Refusal>> {
        let (verdict, columns) = self.judge(relation).await?;
        let statements = match verdict {
            Verdict::Hold(why) | Verdict::Stop(why) => {
                let awaited = Some(why.sql).filter(|sql| !sql.is_empty());
                let error = why.altered;
                return Ok(Some(Refusal { id: None, error, awaited, of_row: false }));
            }
            Verdict::Fits => Vec::new(),
            Verdict::Apply(statements) => statements,
        };
        if statements.is_empty() {
            self.remember(&relation.name, columns).await?;
            return Ok(None);
        }
        self.begin_marked().await?;
        let ran = self.run_statements(&relation.name, &statements, &columns).await;
        match ran {
            Ok(()) => {
                self.session.execute("commit").await?;
                self.known.insert(relation.name.clone(), columns);
                Ok(None)
            }
            Err(Error::Pg(error)) if !error.is_closed() && error.fault() != Fault::Retry => {
                self.session.execute("rollback").await?;
                let (error, awaited) = (error.to_string(), Some(statements.join("; ")));
                Ok(Some(Refusal { id: None, error, awaited, of_row: false }))
            }
            Err(error) => Err(error),
        }
    }

    async fn remember(&mut self, table: &QualifiedName, columns: Vec<KnownColumn>) -> Result<()> {
        if columns.is_empty() || self.known.get(table).is_some_and(|known| *known == columns) {
            return Ok(());
        }
        store(&mut self.session, &self.writer.stream, table, &columns).await?;
        self.known.insert(table.clone(), columns);
        Ok(())
    }

    /// Writes what stands in the batch before the place; gives the rest.
    pub(super) async fn write_before(&mut self, batch: Batch, place: &Place) -> Result<Batch> {
        let (head, tail) = batch.split(place.chunk, place.change);
        if let Some(head) = head {
            let progress_lsn = self.progress_lsn;
            self.writer.launch(&mut self.session, &self.progress, progress_lsn, head).await?;
            self.land_all().await?;
        }
        Ok(tail)
    }

    /// Begins a target transaction, tagged.
    pub(super) async fn begin_marked(&mut self) -> Result<()> {
        let mut pipeline = pg::Pipeline::new();
        pipeline.once("begin");
        if self.progress.is_marker() {
            self.progress.mark(&mut pipeline);
        }
        Ok(self.session.exchange(pipeline, |_| {}).await?)
    }

    /// Runs the statements in the target transaction that is open, or in a new one, which stays
    /// open. Where the target refuses one the table is parked, and the stream begins again.
    async fn alter_here(
        &mut self,
        culprit: &Culprit,
        statements: &[String],
        columns: Vec<KnownColumn>,
    ) -> Result<()> {
        if !self.session.in_transaction() {
            self.begin_marked().await?;
        }
        let ran = self.run_statements(&culprit.table, statements, &columns).await;
        let error = match ran {
            Ok(()) => {
                self.known.insert(culprit.table.clone(), columns);
                return Ok(());
            }
            Err(Error::Pg(error)) if !error.is_closed() && error.fault() != Fault::Retry => error,
            Err(error) => return Err(error),
        };
        self.session.execute("rollback").await?;
        let sql = statements.join("; ");
        let error =
            Error::Altered { table: culprit.table.clone(), altered: error.to_string(), sql };
        let (said, sql) = (error.to_string(), statements.join("; "));
        let noted = Noted { culprit, reason: Reason::Ddl, error: &said, awaited: Some(&sql) };
        parking::park_from(&mut self.session, &self.writer.stream, &noted).await?;
        Err(error.parked())
    }

    async fn run_statements(
        &mut self,
        table: &QualifiedName,
        statements: &[String],
        columns: &[KnownColumn],
    ) -> Result<()> {
        for sql in statements {
            tracing::info!(%table, sql, "altering the target");
            self.session.execute(sql).await?;
            let journal = "insert into walferry.altered (stream, schema, name, sql) \
                 values ($1, $2, $3, $4)";
            let params = [&*self.writer.stream, &table.schema, &table.name, sql].map(Some);
            self.session.query_params(journal, &params).await?;
        }
        store(&mut self.session, &self.writer.stream, table, columns).await
    }

    /// A text that the target refused for a type of its own, as it lacks a label or has it from the
    /// transaction under way: labels may be added at once, as they are in nobody's way; else the
    /// table waits for them. `None` if that is not it.
    pub(super) async fn relabel(&mut self, error: &Error) -> Result<Option<Error>> {
        let (Some(alter), Error::Refused { culprit, source, .. }) = (self.alter.clone(), error)
        else {
            return Ok(None);
        };
        let relation = self.writer.routes.relation(&culprit.table);
        let Some(relation) = relation.filter(|_| matches!(source.code(), Some("22P02" | "55P04")))
        else {
            return Ok(None);
        };
        let said = |why: Why| Error::Altered {
            table: culprit.table.clone(),
            altered: why.altered,
            sql: why.sql,
        };
        match alter.relabelled(&mut self.session, &relation).await?.0 {
            Verdict::Fits => Ok(None),
            Verdict::Stop(why) => Ok(Some(said(why))),
            Verdict::Apply(statements) => {
                // Not in a transaction: before 12 they may not be, and later the rows could not
                // use what is not committed.
                for sql in &statements {
                    self.session.execute(sql).await?;
                }
                let (table, sql) = (&culprit.table, statements.join("; "));
                Ok(Some(Error::Again(format!("run on the target for table {table}: {sql}"))))
            }
            Verdict::Hold(why) => {
                let awaited = why.sql.clone();
                let error = said(why);
                let noted = Noted {
                    culprit,
                    reason: Reason::Ddl,
                    error: &error.to_string(),
                    awaited: Some(&awaited),
                };
                parking::park_from(&mut self.session, &self.writer.stream, &noted).await?;
                Ok(Some(error.parked()))
            }
        }
    }
}
