//! Writing what was kept of a parked table, once whatever kept it is mended.
//!
//! The applier does it itself, between batches: it is the one session that writes, so nothing can
//! come in between, and the last of what is kept is followed by the stream. Who wants a try says so
//! in the table's row (`asked`); what waits for SQL on the target is tried every second. A piece is
//! one transaction: the changes are written, go from where they were kept, and are counted as
//! applied. So a crash at any moment leaves each of them either kept or written.
//!
//! A change that is refused again stays, with those behind it; what was before it is written.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::admit::Step;
use super::batch::Batch;
use super::error::{self, Error, Result};
use super::lanes::Lane;
use super::parking::{self, Noted, OnRowError, Parks, Reason, TRUNCATE_RESTART, described};
use super::request::{Replies, Request, Role};
use super::statement::GUARD_PREFIX;
use super::{Applier, Mode, altered};
use crate::change::{Begin, Change, Chunk, OldRow, Relation, Row};
use crate::fault::{Fault, Faulty};
use crate::id::QualifiedName;
use crate::limit;
use crate::lsn::Lsn;
use crate::pg::{self, Param};

/// How often parked tables are looked at.
pub(super) const TURN: Duration = Duration::from_secs(1);

/// After so long the stream has its turn again.
const WORK_MAX: Duration = Duration::from_millis(500);

/// Fewer changes than this are written one by one.
const SET_CHANGES_MIN: usize = 64;

/// A piece of what is kept: so many changes, of about [`limit::BATCH_BYTES`] at most, one at least.
const PIECE: &str = "select id, relation, xid, commit_lsn, operation, old_full, \
       pg_catalog.encode(old, 'hex'), pg_catalog.encode(new, 'hex') \
     from (select k.*, pg_catalog.row_number() over w as n, \
           pg_catalog.sum(coalesce(pg_catalog.octet_length(k.old), 0) \
             + coalesce(pg_catalog.octet_length(k.new), 0)) over w as bytes \
         from (select * from walferry.parked_change \
             where stream = $1 and schema = $2 and name = $3 order by id limit 1000) k \
         window w as (order by k.id)) k \
     where bytes <= $4::int8 or n = 1 order by id";

/// What is written goes from where it was kept; an error if somebody else has dropped some of it.
const GONE: &str = "with d as (delete from walferry.parked_change where stream = $1::text \
       and schema = $2::text and name = $3::text and id between $4::int8 and $5::int8 returning 1) \
     select case when pg_catalog.count(*) = $6::int8 then 1 \
       else pg_catalog.concat('walferry kept: ', pg_catalog.count(*))::int end from d";

const COUNTED: &str = "update walferry.stream_table set applied = applied + $4::int8, \
       quarantined = quarantined - $4::int8 \
     where stream = $1::text and schema = $2::text and name = $3::text";

/// A change that was kept.
#[derive(Debug)]
struct Stored {
    id: i64,
    xid: u32,
    commit_lsn: Lsn,
    change: Change,
}

/// What came of writing a piece.
enum Sent {
    Written,
    /// Somebody dropped some of it meanwhile.
    Changed,
    /// The change at this place was refused; or a set was.
    Refused(usize, String),
}

/// Why a table stays parked: the change that is refused, in words, and the SQL it waits for.
#[derive(Debug)]
pub(super) struct Refusal {
    /// Its row of walferry.parked_change.
    pub id: Option<i64>,
    /// What the target said.
    pub error: String,
    /// What would mend it; for a row, what was waited for already.
    pub awaited: Option<String>,
    /// It is a row that is refused.
    pub of_row: bool,
}

impl Applier {
    /// True if it is time to look at parked tables, and they can be written to now.
    pub(super) fn parks_are_due(&self) -> bool {
        self.has_parks() && self.parked_at.elapsed() >= TURN && !self.batcher.is_open()
    }

    /// True if a table is parked.
    pub(super) fn has_parks(&self) -> bool {
        !self.writer.routes.parks.is_empty()
    }

    /// Writes what is kept of tables that wait for SQL, or that somebody asked for. Nothing may be
    /// under way. Comes back after a while though there may be more: it stays due then.
    pub(super) async fn try_parked(&mut self) -> Result<()> {
        let sql = "select schema, name from walferry.parked where stream = $1 and begun \
             and (asked or reason = 'ddl') order by since, schema, name";
        let stream = self.writer.stream.clone();
        let mut more = false;
        for row in self.session.query_params(sql, &[Some(&stream)]).await? {
            let table = QualifiedName::new(row.str(0)?, row.str(1)?);
            if self.writer.routes.parks.keeps_all(&table) {
                more |= self.try_table(&table).await?;
            }
        }
        if !more {
            self.parked_at = Instant::now();
        }
        Ok(())
    }

    /// True if there is more.
    async fn try_table(&mut self, table: &QualifiedName) -> Result<bool> {
        let begun = Instant::now();
        loop {
            let Some((relation, kept)) = self.kept(table).await? else {
                self.unpark(table).await?;
                return Ok(false);
            };
            if let Some(refusal) = self.write_kept(&relation, &kept).await? {
                self.writer.routes.forget(table);
                self.note(table, &refusal).await?;
                return Ok(false);
            }
            if begun.elapsed() > WORK_MAX {
                self.writer.routes.forget(table);
                return Ok(true);
            }
        }
    }

    /// The oldest changes kept of a table that were read under one description; `None` if there are
    /// none.
    async fn kept(
        &mut self,
        table: &QualifiedName,
    ) -> Result<Option<(Arc<Relation>, Vec<Stored>)>> {
        let bytes = limit::BATCH_BYTES.to_string();
        let stream = self.writer.stream.clone();
        let params = [Some(&*stream), Some(&table.schema), Some(&table.name), Some(&bytes)];
        let rows = self.session.query_params(PIECE, &params).await?;
        let Some(first) = rows.first() else { return Ok(None) };
        let id = first.string(1)?;
        let sql = "select description from walferry.parked_relation where stream = $1 and id = $2";
        let row = self.session.query_one(sql, &[Some(&stream), Some(&id)]).await?;
        let relation = Arc::new(described(row.str(0)?)?);
        let mut kept = Vec::with_capacity(rows.len());
        for row in rows.iter().take_while(|row| row.str(1).is_ok_and(|under| under == id)) {
            kept.push(stored(row, &relation)?);
        }
        Ok(Some((relation, kept)))
    }

    /// Writes a piece as far as the target takes it.
    async fn write_kept(
        &mut self,
        relation: &Arc<Relation>,
        kept: &[Stored],
    ) -> Result<Option<Refusal>> {
        let first = kept.first().map(|stored| stored.id);
        if let Some(refusal) = self.admit_kept(relation).await? {
            return Ok(Some(Refusal { id: first, ..refusal }));
        }
        match self.writer.routes.renew(&mut self.session, relation).await {
            Err(
                error @ (Error::NoTable { .. } | Error::NoColumn { .. } | Error::NotATable { .. }),
            ) => {
                let (error, awaited) = (error.to_string(), None);
                return Ok(Some(Refusal { id: first, error, awaited, of_row: true }));
            }
            renewed => renewed?,
        }
        let acts = self.writer.routes.get(relation).and_then(|route| route.mapping.as_ref());
        let acts = acts.is_none_or(|mapping| mapping.table.acts);
        let mut sets = !acts && self.writer.mode != Mode::Rows && kept.len() >= SET_CHANGES_MIN;
        let (mut count, mut refusal) = (kept.len(), None);
        while let Some(piece) = kept.get(..count).filter(|piece| !piece.is_empty()) {
            match self.send_kept(relation, piece, sets).await? {
                Sent::Written | Sent::Changed => break,
                Sent::Refused(..) if sets => sets = false,
                Sent::Refused(at, error) => {
                    let id = kept.get(at).map(|stored| stored.id);
                    refusal = Some(Refusal { id, error, awaited: None, of_row: true });
                    count = at;
                }
            }
        }
        Ok(refusal)
    }

    /// Writes a piece, all of it or nothing.
    async fn send_kept(
        &mut self,
        relation: &Arc<Relation>,
        kept: &[Stored],
        sets: bool,
    ) -> Result<Sent> {
        let (batch, steps) = batch_of(relation, kept);
        let mut request = Request::default();
        request.run("walferry_begin", Role::Aside);
        if self.progress.is_marker() {
            self.progress.mark(&mut request.pipeline);
            request.roles.push(Role::Aside);
        }
        match sets {
            true => self.writer.sets(&mut request, &batch, &steps)?,
            false => {
                for (at, step) in steps.iter().enumerate() {
                    match self.writer.step(&mut request, &batch, at, step) {
                        Err(error @ Error::NotIdentified { .. }) => {
                            return Ok(Sent::Refused(at, error.to_string()));
                        }
                        added => added?,
                    }
                }
            }
        }
        self.settle_kept(&mut request, &relation.name, kept);
        request.run("walferry_commit", Role::Commit);
        let pipeline = std::mem::take(&mut request.pipeline);
        let mut replies = Replies::default();
        let sent = self.session.exchange(pipeline, |reply| replies.take(&request.roles, reply));
        if let Err(error) = sent.await {
            return self.refused_kept(error, &replies, &request.roles).await;
        }
        if replies.odd(&request.roles).is_some() {
            return Err(Error::Broken("a kept row was not inserted".to_string()));
        }
        replies.settle(&request.roles, Lsn::ZERO)?;
        self.applied.rows += kept.len() as u64;
        self.restarted |= kept.iter().any(|stored| stored.change.restarts());
        Ok(Sent::Written)
    }

    /// Adds what takes a piece from where it was kept into the books.
    fn settle_kept(&self, request: &mut Request, table: &QualifiedName, kept: &[Stored]) {
        let (Some(first), Some(last)) = (kept.first(), kept.last()) else { return };
        let count = kept.len().to_string();
        let (first, last) = (first.id.to_string(), last.id.to_string());
        let name = [&*self.writer.stream, &*table.schema, &*table.name];
        for (sql, more) in [(GONE, vec![&*first, &*last, &*count]), (COUNTED, vec![&*count])] {
            let params = name.iter().copied().chain(more);
            let params: Vec<_> = params.map(|p| Param::Text(Some(p.as_bytes()))).collect();
            request.pipeline.parse("", sql, &[]);
            request.pipeline.run_mixed("", &params);
            request.roles.push(Role::Aside);
        }
    }

    async fn refused_kept(
        &mut self,
        error: pg::Error,
        replies: &Replies,
        roles: &[Role],
    ) -> Result<Sent> {
        if error.is_closed() || error.fault() == Fault::Retry {
            return Err(error.into());
        }
        // Statements that were to be prepared after the one that failed are not there.
        self.writer.routes.forget_statements(Lane::Main);
        if self.session.in_transaction() {
            self.session.execute("rollback").await?;
        }
        let Some(server) = error.server() else { return Err(error.into()) };
        let guarded = server.message.split_once(GUARD_PREFIX).filter(|_| server.code == "22P02");
        let said = match guarded {
            Some((_, rest)) => {
                let rows: String = rest.chars().take_while(char::is_ascii_digit).collect();
                format!("it met {rows} rows on the target instead of 1")
            }
            None => error::said(server),
        };
        Ok(match replies.failed(roles) {
            Some(Role::Step { at, .. }) => Sent::Refused(at, said),
            Some(Role::Set { .. }) => Sent::Refused(0, said),
            _ if server.message.contains("walferry kept: ") => Sent::Changed,
            // COMMIT, by a constraint that is deferred, which tells of no change.
            _ => Sent::Refused(0, said),
        })
    }

    /// The table's changes are written from now on.
    async fn unpark(&mut self, table: &QualifiedName) -> Result<()> {
        let stream = self.writer.stream.clone();
        let params = [Some(&*stream), Some(&table.schema), Some(&table.name)];
        let sql = "delete from walferry.parked where stream = $1 and schema = $2 and name = $3";
        self.session.query_params(sql, &params).await?;
        let sql = "delete from walferry.parked_relation where stream = $1 \
             and not exists (select from walferry.parked where stream = $1)";
        self.session.query_params(sql, &[Some(&stream)]).await?;
        self.writer.routes.parks.remove(table);
        self.writer.routes.forget(table);
        tracing::info!(%table, "what was kept of it is written; it is followed again");
        Ok(())
    }

    /// A transaction was given up that may have parked tables, or altered them.
    pub(super) async fn reread_parks(&mut self) -> Result<()> {
        if self.has_parks() {
            let parks = Parks::read(&mut self.session, &self.writer.stream).await?;
            self.writer.routes.parks = parks;
        }
        if self.alter.is_some() {
            self.known = altered::known(&mut self.session, &self.writer.stream).await?;
            self.writer.routes.forget_all();
        }
        Ok(())
    }

    /// The error that ends the stream. Where a row is its cause, and rows may be kept, its table is
    /// parked from that row on, and the stream can begin again.
    pub(super) async fn park_row(&mut self, error: Error) -> Error {
        let Some(culprit) = error.refused_row() else { return error };
        let quarantine = self.on_row_error == OnRowError::Quarantine;
        if !quarantine && self.alter.is_none() {
            return error;
        }
        let parking = async {
            self.writer.drain(&mut self.session).await?;
            if self.session.in_transaction() {
                self.session.execute("rollback").await?;
            }
            if let Some(altered) = self.relabel(&error).await? {
                return Ok(Some(altered));
            }
            if !quarantine {
                return Ok(None);
            }
            let noted =
                Noted { culprit, reason: Reason::Row, error: &error.to_string(), awaited: None };
            parking::park_from(&mut self.session, &self.writer.stream, &noted).await?;
            Ok(Some(error.parked()))
        };
        match parking.await {
            Ok(Some(parked)) => parked,
            Ok(None) => error,
            Err(other) => other,
        }
    }

    /// Why the table stays parked, for those who asked.
    async fn note(&mut self, table: &QualifiedName, refusal: &Refusal) -> Result<()> {
        let stream = self.writer.stream.clone();
        let id = refusal.id.map(|id| id.to_string());
        let (error, awaited) = (Some(&*refusal.error), refusal.awaited.as_deref());
        let sql = "update walferry.parked_change set error = $2 where id = $1::int8 \
             and error is distinct from $2";
        self.session.query_params(sql, &[id.as_deref(), error]).await?;
        let sql = "update walferry.parked set error = $4, asked = false, \
               awaited = case when $6::bool then awaited else $5 end \
             where stream = $1 and schema = $2 and name = $3 \
             and (asked or error is distinct from $4 \
               or (not $6::bool and awaited is distinct from $5))";
        let of_row = Some(if refusal.of_row { "t" } else { "f" });
        let params =
            [Some(&*stream), Some(&table.schema), Some(&table.name), error, awaited, of_row];
        self.session.query_params(sql, &params).await?;
        Ok(())
    }
}

/// The changes as a batch that neither begins nor ends a transaction.
fn batch_of(relation: &Arc<Relation>, kept: &[Stored]) -> (Batch, Vec<Step>) {
    let (mut chunks, mut steps): (Vec<Chunk>, Vec<Step>) = (Vec::new(), Vec::new());
    for stored in kept {
        let begun = chunks.last().is_some_and(|chunk| chunk.begin.xid == stored.xid);
        if !begun {
            let begin = Begin {
                xid: stored.xid,
                commit_lsn: stored.commit_lsn,
                commit_time: Default::default(),
                origin: None,
                ending: Default::default(),
            };
            let (number, commit, changes, bytes) = (1, None, Vec::new(), 0);
            chunks.push(Chunk { begin: Arc::new(begin), number, changes, commit, bytes });
        }
        let at = chunks.len().saturating_sub(1);
        if let Some(chunk) = chunks.last_mut() {
            let place = chunk.changes.len();
            steps.push(match stored.change {
                Change::Truncate { .. } => Step::Truncate(at, place, vec![relation.clone()]),
                _ => Step::Row(at, place),
            });
            chunk.changes.push(stored.change.clone());
        }
    }
    (Batch { chunks, opens: false, commit: None, full: false }, steps)
}

fn stored(row: &pg::Row, relation: &Arc<Relation>) -> Result<Stored> {
    let broken = || Error::Broken("walferry.parked_change holds what is no change".to_string());
    let image = |column| -> Result<Option<Row>> {
        let Some(text) = row.opt(column)? else { return Ok(None) };
        let mut bytes = unhex(text).map(bytes::Bytes::from).ok_or_else(broken)?;
        Ok(Some(Row::split_from(&mut bytes).map_err(|_| broken())?))
    };
    let (old, new) = (image(6)?, image(7)?);
    let old = match row.opt(5)? {
        Some("t") => old.map(OldRow::Full),
        _ => old.map(OldRow::Key),
    };
    let relation = relation.clone();
    let change = match (row.str(4)?, old, new) {
        ("INSERT", _, Some(new)) => Change::Insert { relation, new },
        ("UPDATE", old, Some(new)) => Change::Update { relation, old, new },
        ("DELETE", Some(old), _) => Change::Delete { relation, old },
        (truncate @ ("TRUNCATE" | TRUNCATE_RESTART), ..) => Change::Truncate {
            relations: vec![relation],
            cascade: false,
            restart_identity: truncate == TRUNCATE_RESTART,
        },
        _ => return Err(broken()),
    };
    Ok(Stored { id: row.parse(0)?, xid: row.parse(2)?, commit_lsn: row.lsn(3)?, change })
}

/// Bytes of pairs of hexadecimal digits.
pub(super) fn unhex(text: &str) -> Option<Vec<u8>> {
    let digit = |byte: u8| char::from(byte).to_digit(16);
    let pairs = text.as_bytes().chunks(2);
    pairs
        .map(|pair| match pair {
            [high, low] => Some((digit(*high)? * 16 + digit(*low)?) as u8),
            _ => None,
        })
        .collect()
}
