//! DDL that the source has captured: rows of a table of ours, each a statement that is run where
//! the row stands in the stream, by the role and under the search_path that it was run under.
//!
//! As for what is told from descriptions (`altered`) the batch is cut before it, and the statement
//! is in one transaction with what is behind it and progress, so it is run once. What the target
//! refuses because it has it already (or, dropping, has it no more) was done by hand, or by both
//! ways at once, and is passed over; any other refusal stops the stream.

use super::Applier;
use super::altered::Place;
use super::batch::Batch;
use super::error::{Error, Result};
use crate::change::{Captured, Change};
use crate::fault::{Fault, Faulty};
use crate::id::{QualifiedName, quote_ident, quote_literal};
use crate::pg;

impl Applier {
    /// True if the table's rows are DDL.
    pub(super) fn is_captured(&self, table: &QualifiedName) -> bool {
        self.alter.as_ref().and_then(|alter| alter.captures()) == Some(table)
    }

    /// Runs what the row at the place says; gives the rest of the batch, in which the row has
    /// become a change that says nothing.
    pub(super) async fn carry(&mut self, mut batch: Batch, place: &Place) -> Result<Batch> {
        let row = silence(&mut batch, place.chunk, place.change);
        let Some(Change::Insert { relation, new }) = row else { return Ok(batch) };
        let broken = || Error::Broken(format!("{} holds what is no statement", relation.name));
        let ddl = Captured::from_row(&relation, &new).ok_or_else(broken)?;
        let Some(alter) = self.alter.clone() else { return Ok(batch) };
        let stopped = |why: super::altered::Why| Error::Captured {
            id: ddl.id,
            tag: ddl.tag.clone(),
            said: why.altered,
            sql: why.sql,
        };
        let Some((sql, before)) = alter.captured(&ddl).map_err(stopped)? else { return Ok(batch) };
        let mut batch = self.write_before(batch, place).await?;
        if !self.session.in_transaction() {
            // A label is of no use in the transaction that adds it; nobody misses anything if it is
            // there a moment early.
            if before {
                self.writer.routes.foresee_no_more();
                self.run_captured(&ddl, &sql, false).await?;
                return Ok(batch);
            }
            self.begin_marked().await?;
        }
        self.run_captured(&ddl, &sql, true).await?;
        batch.opens = false;
        // What the target was asked about its tables may be otherwise now.
        self.writer.routes.forget_all();
        Ok(batch)
    }

    async fn run_captured(&mut self, ddl: &Captured, sql: &str, inside: bool) -> Result<()> {
        tracing::info!(sql, role = ddl.role, "DDL of the source");
        let role = format!("set role {}", quote_ident(&ddl.role));
        let path = format!(
            "select pg_catalog.set_config('search_path', {}, false)",
            quote_literal(&ddl.search_path)
        );
        if inside {
            self.session.execute("savepoint walferry_ddl").await?;
        }
        let ran = async {
            self.session.execute(&role).await?;
            self.session.execute(&path).await?;
            self.session.execute(sql).await
        };
        let ran = ran.await;
        match &ran {
            Err(error) if error.is_closed() => {}
            Err(_) if inside => {
                self.session.execute("rollback to savepoint walferry_ddl").await?;
            }
            _ => {}
        }
        if let Err(error) = ran {
            if error.is_closed() || error.fault() == Fault::Retry {
                return Err(error.into());
            }
            if !is_done(&ddl.tag, &error) {
                let (tag, said) = (ddl.tag.clone(), error.to_string());
                let by = format!("set role {}; set search_path = {}; ", ddl.role, ddl.search_path);
                return Err(Error::Captured { id: ddl.id, tag, said, sql: format!("{by}{sql}") });
            }
            tracing::warn!(%error, sql, "the target has it already");
        }
        self.session.execute("reset role; set search_path = ''").await?;
        if inside {
            self.session.execute("release savepoint walferry_ddl").await?;
            let journal = "insert into walferry.altered (stream, schema, name, sql) \
                 values ($1, '', $2, $3)";
            let params = [&*self.writer.stream, &ddl.tag, sql].map(Some);
            self.session.query_params(journal, &params).await?;
        }
        Ok(())
    }
}

/// Puts a message that nobody reads in a change's place, so that all others keep theirs.
fn silence(batch: &mut Batch, chunk: usize, change: usize) -> Option<Change> {
    let slot = batch.chunks.get_mut(chunk)?.changes.get_mut(change)?;
    let nothing = Change::Message {
        transactional: true,
        lsn: crate::lsn::Lsn::ZERO,
        prefix: String::new(),
        content: bytes::Bytes::new(),
    };
    Some(std::mem::replace(slot, nothing))
}

/// True if the target has done it already: what is made is there, what is dropped is not.
fn is_done(tag: &str, error: &pg::Error) -> bool {
    let drops = tag.starts_with("DROP");
    match error.code() {
        Some("42701" | "42P06" | "42P07" | "42710" | "42723") => !drops,
        Some("42704" | "42P01" | "42883" | "3F000") => drops,
        _ => false,
    }
}
