//! Prepared transactions of the source, prepared on the target under a name of their own and ended
//! there when the source ends them.
//!
//! Progress cannot commit with the rows of a transaction that is prepared: its row would be locked
//! until somebody on the source makes up his mind, and nothing behind could be applied. So it
//! commits just after, and what a crash in between leaves is looked for at the next start:
//!
//! ```text
//! BEGIN, a row of walferry.prepared, the changes, PREPARE TRANSACTION   in pg_prepared_xacts
//!     a crash here: PREPARE comes again, is found there, and only progress is written
//! progress
//!     ...
//! COMMIT PREPARED                                            in walferry.prepared, visible now
//!     a crash here: it comes again, its row is found, and only progress is written
//! progress, the row goes
//! ```
//! The row of walferry.prepared is written by the prepared transaction itself: it is seen if and
//! only if that transaction has committed. So of each prepared transaction the target itself says,
//! whenever it is asked, that it is open, that it has committed, or neither (law 2). Both PREPARE
//! and COMMIT PREPARED are flushed by the server before they are answered.
//!
//! Names are `<stream>:<xid>:<gid>`, cut to what a server takes; the xid alone makes one of them
//! unique, as the source keeps it while the transaction is prepared. A predecessor cannot be at
//! work any more when the target is asked: its session held the stream's origin.
//!
//! <https://www.postgresql.org/docs/current/sql-prepare-transaction.html>

use std::collections::HashMap;

use super::Applier;
use super::batch::Batch;
use super::error::{Error, Result};
use super::request::{Request, Role};
use crate::change::{Begin, Ending};
use crate::id::quote_literal;
use crate::pg::{self, Pipeline, Row, Session};

/// A server's GIDSIZE without the NUL.
const GID_BYTES: usize = 199;

/// What the target has of a prepared transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// It is prepared.
    Open,
    /// It has committed, and its end was not recorded yet.
    Committed,
}

/// The stream's prepared transactions, by the source's xid.
#[derive(Debug, Default)]
pub(super) struct Prepared {
    stream: String,
    states: HashMap<u32, State>,
}

impl Prepared {
    /// Asks the target: for those that have committed, and for those that are prepared. The
    /// stream's progress must be claimed already.
    pub fn asking(stream: &str) -> [Pipeline; 2] {
        ["select xid from walferry.prepared where stream = $1", NAMES].map(|sql| {
            let mut pipeline = Pipeline::new();
            pipeline.ask(sql, &[Some(stream)]);
            pipeline
        })
    }

    /// By the answers to that.
    pub fn told(
        stream: &str,
        committed: pg::Result<Vec<Row>>,
        open: pg::Result<Vec<Row>>,
    ) -> Result<Prepared> {
        let mut prepared = Prepared { stream: stream.to_string(), ..Prepared::default() };
        let committed = match committed {
            // A job of an earlier version has no such table.
            Err(error) if error.code() == Some("42P01") => Vec::new(),
            rows => rows?,
        };
        for row in committed {
            prepared.states.insert(row.parse(0)?, State::Committed);
        }
        for row in open? {
            let gid = row.str(0)?;
            let rest = gid.strip_prefix(stream).and_then(|rest| rest.strip_prefix(':'));
            let xid = rest.and_then(|rest| rest.split(':').next()?.parse().ok());
            if let Some(xid) = xid {
                prepared.states.insert(xid, State::Open);
            }
        }
        Ok(prepared)
    }

    /// What the target has of it.
    pub fn state(&self, xid: u32) -> Option<State> {
        self.states.get(&xid).copied()
    }

    /// The batch is on the target: if it ended with PREPARE, that is there now.
    pub fn landed(&mut self, batch: &Batch) {
        if let (Some(begin), Some(_)) = (batch.prepares(), batch.commit) {
            self.states.entry(begin.xid).or_insert(State::Open);
        }
    }

    /// Adds what says, once it can be seen, that the transaction has committed: its first row.
    pub fn begin(&self, request: &mut Request, begin: &Begin) {
        let (stream, xid) = (quote_literal(&self.stream), begin.xid);
        let sql = format!("insert into walferry.prepared (stream, xid) values ({stream}, {xid})");
        request.aside(&sql);
    }

    /// If the batch ends with PREPARE: that, unless it is there already, and the beginning of the
    /// transaction that books and progress are in.
    pub fn prepare(&self, request: &mut Request, batch: &Batch, there: bool) {
        let Some(begin) = batch.prepares() else { return };
        if !there {
            let name = quote_literal(&self.name(begin));
            request.pipeline.once(&format!("prepare transaction {name}"));
            request.roles.push(Role::Prepare);
        }
        request.run("walferry_begin", Role::Aside);
    }

    /// The name on the target.
    fn name(&self, begin: &Begin) -> String {
        name(&self.stream, begin.xid, begin.ending.gid().unwrap_or_default())
    }
}

fn name(stream: &str, xid: u32, gid: &str) -> String {
    let mut name = format!("{stream}:{xid}:{gid}");
    let mut end = GID_BYTES.min(name.len());
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    name.truncate(end);
    name
}

/// Names of a stream's transactions that are prepared in this database.
const NAMES: &str = "select gid from pg_catalog.pg_prepared_xacts \
     where database = pg_catalog.current_database() \
     and pg_catalog.left(gid, pg_catalog.length($1) + 1) = $1 || ':' order by prepared";

async fn names(session: &mut Session, stream: &str) -> pg::Result<Vec<String>> {
    let rows = session.query_params(NAMES, &[Some(stream)]).await?;
    rows.iter().map(|row| row.string(0)).collect()
}

/// Rolls back what is prepared under the stream's name.
pub(super) async fn roll_back_all(session: &mut Session, stream: &str) -> Result<()> {
    for name in names(session, stream).await? {
        session.execute(&format!("rollback prepared {}", quote_literal(&name))).await?;
    }
    Ok(())
}

impl Applier {
    /// Ends a prepared transaction as the source did, and records progress. Nothing may be under
    /// way.
    pub(super) async fn end_prepared(&mut self, batch: &Batch) -> Result<()> {
        let (Some(chunk), Some(commit)) = (batch.chunks.first(), batch.commit) else {
            return Err(Error::Broken("the end of a prepared transaction has none".to_string()));
        };
        let begin = &chunk.begin;
        let prepared = &self.writer.prepared;
        let (name, state) = (prepared.name(begin), prepared.state(begin.xid));
        let commits = matches!(begin.ending, Ending::CommitPrepared(_));
        match (state, commits) {
            (Some(State::Open), true) => {
                self.session.execute(&format!("commit prepared {}", quote_literal(&name))).await?;
                self.writer.prepared.states.insert(begin.xid, State::Committed);
            }
            (Some(State::Open), false) => {
                let sql = format!("rollback prepared {}", quote_literal(&name));
                self.session.execute(&sql).await?;
            }
            (None, true) => {
                return Err(Error::NotPrepared { name, end_lsn: commit.end_lsn });
            }
            // One that was rolled back before, or that the source never told us of.
            (Some(State::Committed), _) | (None, false) => {}
        }
        let mut pipeline = Pipeline::new();
        pipeline.once("begin");
        pipeline.once(&format!(
            "delete from walferry.prepared where stream = {} and xid = {}",
            quote_literal(&self.writer.prepared.stream),
            begin.xid
        ));
        self.commit_progress(pipeline, &commit).await?;
        self.writer.prepared.states.remove(&begin.xid);
        self.applied.applied_lsn = commit.end_lsn;
        self.applied.last_end_lsn = commit.end_lsn;
        self.applied.commit_time = Some(commit.commit_time);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_has_stream_and_xid_and_never_more_than_a_server_takes() {
        assert_eq!(name("walferry_shop_forward", 731, "a b"), "walferry_shop_forward:731:a b");
        for length in 150..210 {
            let long = name("walferry_shop_forward", u32::MAX, &"\u{e9}".repeat(length));
            assert!(long.len() <= GID_BYTES && long.len() >= GID_BYTES - 1);
        }
    }
}
