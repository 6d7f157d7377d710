//! One part, from the source's session into a transaction of the target's.

use bytes::{Bytes, BytesMut};
use tokio::sync::mpsc;

use super::Result;
use super::error::Error;
use super::format::Wires;
use super::parts::{Part, read_sql, write_sql};
use super::progress::CopyProgress;
use super::store::{self, Done};
use crate::catalog::Table;
use crate::id::QualifiedName;
use crate::lsn::Lsn;
use crate::pg::{self, Session};

/// Rows are handed on in pieces of about this many bytes, so that the queue costs nothing a row.
const CHUNK_BYTES: usize = 256 << 10;

/// Pieces between the reader and the writer: 4 MiB, which covers the hiccups of either side. When
/// it is full the reader waits, and the source's backend with it. A row larger than a piece is one.
const CHUNKS: usize = 16;

/// What is needed to copy one part.
#[derive(Clone, Debug)]
pub(super) struct Work {
    pub table: std::sync::Arc<Table>,
    pub part: Part,
    /// COPY options.
    pub with: Wires,
    /// `only `, or nothing where the target's table is partitioned.
    pub only: &'static str,
    /// An earlier attempt may have left dead rows.
    pub begun: bool,
}

/// What all parts of a run have in common.
#[derive(Clone, Debug)]
pub(super) struct Origin {
    pub job: String,
    /// `slot`, or the snapshot's text.
    pub snapshot: String,
    pub snapshot_lsn: Lsn,
    pub snapshot_id: String,
}

/// Copies the part, unless it turns out to be done. On an error but `Rewritten` the sessions cannot
/// be used again; closing them leaves nothing of the part on the target.
pub(super) async fn transfer(
    source: &mut Session,
    target: &mut Session,
    origin: &Origin,
    work: &Work,
    progress: &CopyProgress,
) -> Result<()> {
    let (job, part) = (origin.job.as_str(), &work.part);
    let filenode = pin(source, work).await?;
    target.execute(&store::begun_sql(job, part)).await?;
    target.execute("begin").await?;
    let locked = target.query(&store::lock_sql(job, part)).await?;
    let Some(row) = locked.first() else {
        let text = format!("part {} of {} is not stored", part.part, part.table);
        return Err(Error::Bug(text));
    };
    if row.bool(0)? {
        target.execute("rollback").await?;
        progress.part_done(&part.table);
        return Ok(());
    }
    if work.begun && part.parts == 1 {
        // Dead rows of the attempt before would stay until a vacuum.
        store::empty(target, &part.table, work.only).await.map_err(|e| refused(&part.table, e))?;
    }
    let mut count = Count { progress, table: &part.table, rows: 0, bytes: 0, kept: false };
    let (sender, receiver) = mpsc::channel(CHUNKS);
    let ((), rows) =
        tokio::try_join!(read(source, work, sender, &mut count), write(target, work, receiver))?;
    count.correct(rows);
    let done = Done {
        snapshot: &origin.snapshot,
        snapshot_lsn: origin.snapshot_lsn,
        snapshot_id: &origin.snapshot_id,
        filenode,
        rows,
        bytes: count.bytes,
    };
    // Deferred constraints of the target's own are checked at COMMIT, hence the table's name.
    let refuse = |error| refused(&part.table, error);
    target.execute(&store::done_sql(job, part, &done)).await.map_err(refuse)?;
    target.execute("commit").await.map_err(refuse)?;
    count.kept = true;
    progress.part_done(&part.table);
    Ok(())
}

/// Counts what is under way, and takes it back unless it was committed.
struct Count<'a> {
    progress: &'a CopyProgress,
    table: &'a QualifiedName,
    rows: u64,
    bytes: u64,
    kept: bool,
}

impl Count<'_> {
    fn add(&mut self, rows: u64, bytes: usize) {
        self.rows += rows;
        self.bytes += bytes as u64;
        self.progress.add(self.table, rows, bytes as u64);
    }

    /// Binary data ends with a message that is no row; the target's count is the true one.
    fn correct(&mut self, rows: u64) {
        self.progress.take_back(self.table, self.rows.saturating_sub(rows), 0);
        self.rows = rows;
    }
}

impl Drop for Count<'_> {
    fn drop(&mut self) {
        if !self.kept {
            self.progress.take_back(self.table, self.rows, self.bytes);
        }
    }
}

/// Reads the part to its end.
async fn read(
    source: &mut Session,
    work: &Work,
    sender: mpsc::Sender<Bytes>,
    count: &mut Count<'_>,
) -> Result<()> {
    let table = &work.part.table;
    let sql = read_sql(&work.table, &work.part, &work.with.read);
    let unreadable = |error| unreadable(table, error);
    let mut copy = source.copy_out(&sql).await.map_err(unreadable)?;
    let mut chunk = BytesMut::with_capacity(CHUNK_BYTES);
    let mut rows = 0;
    while let Some(data) = copy.next().await.map_err(unreadable)? {
        rows += 1;
        if !chunk.is_empty() && chunk.len() + data.len() > CHUNK_BYTES {
            count.add(rows - 1, chunk.len());
            rows = 1;
            pass(&sender, chunk.split().freeze()).await?;
            chunk.reserve(CHUNK_BYTES);
        }
        if data.len() >= CHUNK_BYTES {
            count.add(rows, data.len());
            rows = 0;
            pass(&sender, data).await?;
        } else {
            chunk.extend_from_slice(&data);
        }
    }
    count.add(rows, chunk.len());
    pass(&sender, chunk.freeze()).await?;
    Ok(())
}

/// Locks the table until our transaction ends, so that nobody can rewrite it any more, and looks
/// whether somebody has since the snapshot was taken (ALTER TYPE, TRUNCATE, CLUSTER): in the new
/// file the snapshot may see nothing, and COPY would give no rows and no error. pg_class as the
/// snapshot sees it still names the file before. Gives the file, for tables of several parts.
async fn pin(source: &mut Session, work: &Work) -> Result<Option<u32>> {
    let table = &work.part.table;
    let sql = format!(
        "lock table only {} in access share mode; \
         select c.relfilenode, pg_catalog.pg_relation_filenode(c.oid) \
         from pg_catalog.pg_class c where c.oid = {}",
        table.quoted(),
        work.table.oid
    );
    let rows = source.query(&sql).await.map_err(|error| unreadable(table, error))?;
    let rewritten = || Error::Rewritten { table: table.clone() };
    let row = rows.first().ok_or_else(rewritten)?;
    let (seen, now): (Option<u32>, Option<u32>) = (row.parse_opt(0)?, row.parse_opt(1)?);
    if seen != now {
        return Err(rewritten());
    }
    Ok(if work.part.parts == 1 { None } else { now })
}

async fn pass(sender: &mpsc::Sender<Bytes>, chunk: Bytes) -> Result<()> {
    // The writer ends before us only with an error, which try_join reports.
    sender.send(chunk).await.map_err(|_| Error::Bug("the writer of a copy is gone".to_string()))
}

/// Writes what comes; gives the number of rows the target counted.
async fn write(
    target: &mut Session,
    work: &Work,
    mut receiver: mpsc::Receiver<Bytes>,
) -> Result<u64> {
    let table = &work.part.table;
    let sql = write_sql(&work.table, &work.with.write);
    let mut copy = target.copy_in(&sql).await.map_err(|e| refused(table, e))?;
    while let Some(chunk) = receiver.recv().await {
        if !chunk.is_empty() {
            copy.write(&chunk).await.map_err(|e| refused(table, e))?;
        }
    }
    copy.finish().await.map_err(|e| refused(table, e))
}

fn refused(table: &QualifiedName, error: pg::Error) -> Error {
    if error.server().is_none() || error.is_closed() {
        return Error::Pg(error);
    }
    Error::Refused { table: table.clone(), error: Box::new(error) }
}

fn unreadable(table: &QualifiedName, error: pg::Error) -> Error {
    match error.server() {
        // "snapshot too old", where old_snapshot_threshold is set (up to 16).
        Some(said) if said.code == "72000" => {
            Error::SnapshotLost { name: "in use".to_string(), detail: said.message.clone() }
        }
        Some(_) if !error.is_closed() => {
            Error::Unreadable { table: table.clone(), error: Box::new(error) }
        }
        _ => Error::Pg(error),
    }
}
