//! The bulk of a backlog, read by SQL before the stream begins.
//!
//! A walsender goes to its socket once a message, and that is what a backlog costs on the source,
//! not decoding: 200,000 pgbench transactions (1.2 million messages) took 6.1 s by a walsender to a
//! reader that throws them away, and 0.9 s by one function call and a COPY of what it gives.
//!
//! 1. The slot is copied to a temporary one, the mark, which belongs to this session and goes with
//!    it. The job's own slot stays where it is: it is told what is durable, and nothing else (law
//!    1).
//! 2. Chunks are taken with `pg_logical_slot_get_binary_changes`, which moves the mark behind
//!    them. The source decodes from the mark's restart_lsn for each, so they grow; the first is
//!    small, that the target has something to do.
//! 3. This ends when little is left, and earlier where it does not pay: when a chunk of log had no
//!    end of a transaction in it (a large one had better be sent piece by piece), or when the
//!    source decodes too much again for each.
//! 4. The mark is dropped, and the job's slot streamed from the end of what was read: the server
//!    passes over what committed before. No record is missed between, and none comes twice.
//!
//! Where it cannot be (before 12, on a standby, without a free slot), the stream begins at once.
//! Nothing survives a crash, and nothing has to: the mark is no promise to anybody.
//!
//! <https://www.postgresql.org/docs/current/functions-admin.html#FUNCTIONS-REPLICATION>

use std::time::Duration;

use tokio::time::Instant;

use super::fetch::{Ends, fetch, push};
use super::intake::Intake;
use super::options::{Spoken, plugin_options};
use super::peek::{Chunks, Peeks, Starts};
use super::{End, Result, StreamOptions, slot};
use crate::change::Sink;
use crate::decode::Plugin;
use crate::id::quote_literal;
use crate::lsn::Lsn;
use crate::pg::Session;

/// Bytes of log of the first chunk, and of any.
const CHUNK_WAL: (u64, u64) = (64 << 20, 256 << 20);

/// More than this is not decoded again for each chunk.
const AGAIN_BYTES: u64 = 1 << 30;

/// The job's slot is told what is durable no more often than this, nor in more than a twentieth of
/// the time: the server decodes for it.
const ADVANCE_GAP: Duration = Duration::from_secs(10);

/// A backlog to be read so.
#[derive(Debug)]
pub(super) struct Bulk {
    /// Name of the temporary slot.
    mark: String,
    peeks: Peeks,
    slot: Peeks,
    starts: Starts,
    /// Where the mark stands: exclusive end of what was read.
    read_lsn: Lsn,
    confirmed_lsn: Lsn,
    /// So much is left to the stream.
    rest_bytes: u64,
    chunks: Chunks,
    chunk_bytes: u64,
    advance_at: Instant,
}

/// How the mark stands after a chunk.
enum Went {
    On,
    /// It is for the stream to go on.
    Over,
    End(End),
}

impl Bulk {
    /// Makes the mark; `None` where the backlog is short, or where this cannot be done. The session
    /// is a replication session of the slot's database, which has ended at `flush_lsn`.
    pub async fn begin(
        session: &mut Session,
        options: &StreamOptions,
        spoken: Spoken,
        confirmed_lsn: Lsn,
        flush_lsn: Lsn,
    ) -> Result<Option<Bulk>> {
        let Some(least_bytes) = options.bulk_bytes else { return Ok(None) };
        let backlog_bytes = flush_lsn.0.saturating_sub(options.start_lsn.0);
        let may = spoken.plugin == Plugin::Pgoutput && !options.two_phase;
        if !may || session.major_version() < 12 || backlog_bytes < least_bytes.max(1) {
            return Ok(None);
        }
        // A mark is told of prepared transactions at their end only, and what was prepared in the
        // bulk and ends behind it would have come from neither: not now, and not where the slot
        // tells of PREPARE from an earlier run.
        if slot::is_two_phase(session, &options.slot).await? {
            return Ok(None);
        }
        let mark = format!("walferry_bulk_{:08x}", fastrand::u32(..));
        match make(session, options, &mark, confirmed_lsn).await {
            Ok(()) => {}
            Err(error) if error.is_closed() => return Err(error.into()),
            Err(error) => {
                tracing::info!(slot = options.slot, %error, "the backlog is streamed");
                return Ok(None);
            }
        }
        let wanted = StreamOptions { spill: None, ..options.clone() };
        let wanted = plugin_options(spoken, session.major_version(), &wanted);
        let peeks = |slot: &str| Peeks::new(slot, spoken.plugin, session.major_version(), &wanted);
        tracing::debug!(slot = options.slot, mark, backlog_bytes, "reading in bulk");
        Ok(Some(Bulk {
            peeks: peeks(&mark),
            slot: peeks(&options.slot),
            starts: Starts::of(session, spoken.plugin),
            mark,
            read_lsn: options.start_lsn,
            confirmed_lsn,
            rest_bytes: least_bytes / 4,
            chunks: Chunks::of(options.pull_messages),
            chunk_bytes: CHUNK_WAL.0,
            advance_at: Instant::now() + ADVANCE_GAP,
        }))
    }

    /// What the job's slot was told last.
    pub fn confirmed_lsn(&self) -> Lsn {
        self.confirmed_lsn
    }

    /// The job's options, of the slot that is held while this goes on.
    pub fn options(&self, options: &StreamOptions) -> StreamOptions {
        StreamOptions { slot: self.mark.clone(), ..options.clone() }
    }

    /// Reads until the stream had better go on, or the reader is to end.
    pub async fn run<S: Sink>(
        &mut self,
        session: &mut Session,
        intake: &mut Intake<'_, S>,
        ends: &mut Ends,
    ) -> Result<Option<End>> {
        loop {
            match self.chunk(session, intake, ends).await? {
                Went::On => self.advance(session, ends).await?,
                Went::End(end) => return Ok(Some(end)),
                Went::Over => break,
            }
        }
        let drop =
            format!("select pg_catalog.pg_drop_replication_slot({})", quote_literal(&self.mark));
        ends.link.bounded(session.query(&drop)).await?;
        ends.link.bounded(session.execute("reset work_mem")).await?;
        Ok(None)
    }

    async fn chunk<S: Sink>(
        &mut self,
        session: &mut Session,
        intake: &mut Intake<'_, S>,
        ends: &mut Ends,
    ) -> Result<Went> {
        let asked = session.query("select pg_catalog.pg_current_wal_flush_lsn()");
        let rows = ends.link.bounded(asked).await?;
        let flush_lsn = rows.first().map_or(Ok(Lsn::ZERO), |row| row.lsn(0))?;
        let left_bytes = flush_lsn.0.saturating_sub(self.read_lsn.0);
        if left_bytes <= self.rest_bytes || !self.starts.take() {
            return Ok(Went::Over);
        }
        let (begun, limit) = (Instant::now(), self.chunks.messages());
        let upto_lsn = flush_lsn.min(Lsn(self.read_lsn.0.saturating_add(self.chunk_bytes)));
        let sql = self.peeks.taking(upto_lsn, limit);
        let (count, bytes) = match fetch(session, &sql, intake, ends, self.confirmed_lsn).await? {
            Ok(received) => received,
            Err(end) => return Ok(Went::End(end)),
        };
        self.chunks.learn(count >= limit, begun.elapsed(), bytes);
        self.chunk_bytes = (self.chunk_bytes * 2).min(CHUNK_WAL.1);
        let status = ends.link.bounded(slot::status(session, &self.mark)).await?;
        let Some(status) = status else { return Ok(Went::Over) };
        // The server stops at the end of a record: all that committed before has come.
        self.read_lsn = status.confirmed_flush_lsn.unwrap_or(self.read_lsn).max(self.read_lsn);
        if let Some(idle) = intake.idle(self.read_lsn)
            && let Some(end) = push(intake, &mut ends.watch, idle, self.confirmed_lsn).await
        {
            return Ok(Went::End(end));
        }
        intake.publish(intake.decoded_lsn(), self.confirmed_lsn);
        let again_bytes = self.read_lsn.0.saturating_sub(status.restart_lsn.unwrap_or(Lsn::ZERO).0);
        let pays = count > 0 && again_bytes < AGAIN_BYTES;
        Ok(if pays { Went::On } else { Went::Over })
    }

    /// Tells the job's slot what is durable, so that the source may let go of its log.
    async fn advance(&mut self, session: &mut Session, ends: &Ends) -> Result<()> {
        let durable_lsn = ends.watch.durable_lsn();
        if Instant::now() < self.advance_at || durable_lsn <= self.confirmed_lsn {
            return Ok(());
        }
        let begun = Instant::now();
        let (sql, pid) = (self.slot.advance(durable_lsn), session.process_id());
        tokio::select! {
            biased;
            advanced = session.query(&sql) => advanced?,
            silent = ends.link.until_dead(pid) => return Err(silent),
        };
        self.confirmed_lsn = durable_lsn;
        self.advance_at = Instant::now() + ADVANCE_GAP.max(begun.elapsed() * 20);
        Ok(())
    }
}

/// Copies the slot, and brings the copy to where reading begins.
async fn make(
    session: &mut Session,
    options: &StreamOptions,
    mark: &str,
    confirmed_lsn: Lsn,
) -> crate::pg::Result<()> {
    let (slot, name) = (quote_literal(&options.slot), quote_literal(mark));
    let copy = format!("select pg_catalog.pg_copy_logical_replication_slot({slot}, {name}, true)");
    session.query(&copy).await?;
    if options.start_lsn > confirmed_lsn {
        let start_lsn = options.start_lsn;
        let sql = format!("select pg_catalog.pg_replication_slot_advance({name}, '{start_lsn}')");
        session.query(&sql).await?;
    }
    // A chunk that fits does not go through a temporary file.
    session.execute("set work_mem = '64MB'").await?;
    if session.major_version() >= 14 {
        // Not every platform of a server can do it, and refuses then.
        let _ = session.execute("set client_connection_check_interval = '5s'").await;
    }
    Ok(())
}
