//! Parts, from the source's session into one transaction of the target's.
//!
//! A part of a large table has a transaction to itself. Small tables travel together: their COPY
//! statements are one request on either side, so that a table costs neither a round trip nor a
//! commit. What refuses such a bundle is found by copying its tables one by one.

use tokio::sync::mpsc;

use super::error::Error;
use super::format::Wires;
use super::parts::{Part, SMALL_BYTES, read_sql, weight, write_sql};
use super::progress::CopyProgress;
use super::store::{self, Done};
use super::{Freeze, Result};
use crate::catalog::Table;
use crate::id::QualifiedName;
use crate::lsn::Lsn;
use crate::pg::{self, Config, CopyChunk, Filled, Purpose, Session};

/// Rows are handed on in pieces of about this many bytes, so that the queue costs nothing a row.
const CHUNK_BYTES: usize = 256 << 10;

/// What a piece has room for at first where tables are small.
const SMALL_CHUNK_BYTES: usize = 8 << 10;

/// Pieces between the reader and the writer: 4 MiB, which covers the hiccups of either side. When
/// it is full the reader waits, and the source's backend with it. A row larger than a piece is one.
const CHUNKS: usize = 16;

/// What is needed to copy one part.
#[derive(Clone, Debug)]
pub(super) struct Item {
    pub table: std::sync::Arc<Table>,
    pub part: Part,
    /// COPY options.
    pub with: Wires,
    /// `only `, or nothing where the target's table is partitioned.
    pub only: &'static str,
    /// An earlier attempt may have left dead rows.
    pub begun: bool,
}

impl Item {
    /// A whole table, from the first row to the last.
    fn is_whole(&self) -> bool {
        self.part.parts == 1
    }
}

/// What all parts of a run have in common.
#[derive(Clone, Debug)]
pub(super) struct Origin {
    pub job: String,
    /// `slot`, or the snapshot's text.
    pub snapshot: String,
    pub snapshot_lsn: Lsn,
    pub snapshot_id: String,
    pub freeze: Freeze,
}

/// Copies these parts in one transaction, but for those that turn out to be done; gives the tables
/// that were rewritten since the snapshot was taken, which are left out. On an error the sessions
/// cannot be used again; closing them leaves nothing on the target. The error names the table it
/// is about only where that is the only one.
pub(super) async fn transfer(
    source: &mut Session,
    target: &mut Session,
    origin: &Origin,
    work: &[Item],
    progress: &CopyProgress,
) -> Result<Vec<QualifiedName>> {
    let (mut pinned, rewritten) = pin(source, work).await?;
    if pinned.is_empty() {
        return Ok(rewritten);
    }
    if let [only] = work {
        target.execute(&store::begun_sql(&origin.job, &only.part)).await?;
    }
    let done = store::lock(target, &origin.job, work.iter().map(|item| &item.part)).await?;
    pinned.retain(|pinned| {
        let is_done = done.contains(&pinned.item.part.table);
        if is_done {
            progress.part_done(&pinned.item.part.table);
        }
        !is_done
    });
    let Some(first) = pinned.first().map(|pinned| pinned.item) else {
        target.execute("rollback").await?;
        return Ok(rewritten);
    };
    let refuse = |error| refused(&first.part.table, error);
    let frozen = match work {
        [only] => prepare(target, origin.freeze, only).await.map_err(refuse)?,
        _ => false,
    };
    let mut counts: Vec<Count> =
        pinned.iter().map(|pinned| Count::new(progress, &pinned.item.part.table)).collect();
    let (sender, receiver) = mpsc::channel(CHUNKS);
    let ((), rows) = tokio::try_join!(
        read(source, &pinned, sender, &mut counts),
        write(target, &pinned, frozen, receiver)
    )?;
    for (count, rows) in counts.iter_mut().zip(&rows) {
        count.correct(*rows);
    }
    let done: Vec<Done<'_>> = pinned
        .iter()
        .zip(&counts)
        .map(|(pinned, count)| Done {
            part: &pinned.item.part,
            filenode: pinned.filenode,
            rows: count.rows,
            bytes: count.bytes,
        })
        .collect();
    // Deferred constraints of the target's own are checked at COMMIT, hence the table's name.
    let sql = store::done_sql(origin, &done) + "; commit";
    target.execute(&sql).await.map_err(refuse)?;
    for mut count in counts {
        count.kept = true;
        progress.part_done(count.table);
    }
    Ok(rewritten)
}

/// A session that writes. Commits need not wait for the disk: the mark of a part is in the same
/// transaction as its rows, so a crash of the server loses both or neither.
pub(super) async fn connect_target(config: &Config, async_commit: bool) -> Result<(Session, bool)> {
    let mut session = Session::connect(config, Purpose::Sql).await?;
    if async_commit {
        session.execute("set synchronous_commit = off").await?;
    }
    match session.execute("set session_replication_role = replica").await {
        Ok(_) => Ok((session, true)),
        Err(error) if error.code() == Some("42501") => Ok((session, false)),
        Err(error) => Err(Error::Pg(error)),
    }
}

/// Empties a whole table again if an attempt was made before: its dead rows would stay until a
/// vacuum. True if the rows may be written frozen: then the table was emptied by TRUNCATE in this
/// transaction, which nobody else can see into.
async fn prepare(target: &mut Session, freeze: Freeze, item: &Item) -> pg::Result<bool> {
    if !item.is_whole() {
        return Ok(false);
    }
    // COPY FREEZE does not know partitioned tables. And a commit that drops a file, as after
    // TRUNCATE, waits for the disk whatever it is told: too long for a small table.
    let is_small = weight(&item.table) <= SMALL_BYTES;
    let freezes = freeze == Freeze::Whole && !item.only.is_empty() && !is_small;
    if !item.begun && !freezes {
        return Ok(false);
    }
    let table = item.table.written_name();
    if !item.begun {
        // It was empty when the copy began; rows that came since are somebody's.
        let sql = format!("select exists (select from {}{})", item.only, table.quoted());
        if target.query_one(&sql, &[]).await?.bool(0)? {
            return Ok(false);
        }
    }
    let truncated = store::empty(target, table, item.only).await?;
    Ok(freezes && truncated)
}

/// Counts what is under way, and takes it back unless it was committed.
struct Count<'a> {
    progress: &'a CopyProgress,
    table: &'a QualifiedName,
    rows: u64,
    bytes: u64,
    kept: bool,
}

impl<'a> Count<'a> {
    fn new(progress: &'a CopyProgress, table: &'a QualifiedName) -> Count<'a> {
        Count { progress, table, rows: 0, bytes: 0, kept: false }
    }

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

/// What travels from the reader to the writer.
enum Piece {
    Rows(CopyChunk),
    /// The table under way has no more.
    End,
}

/// Reads the parts one after the other to their ends.
async fn read(
    source: &mut Session,
    pinned: &[Pinned<'_>],
    sender: mpsc::Sender<Piece>,
    counts: &mut [Count<'_>],
) -> Result<()> {
    let sql: Vec<String> = pinned
        .iter()
        .map(|Pinned { item, .. }| read_sql(&item.table, &item.part, &item.with.read))
        .collect::<std::result::Result<_, _>>()
        .map_err(Error::Mask)?;
    let unreadable = |error| unreadable(pinned, error);
    let mut copy = source.copy_out(&sql.join("; ")).await.map_err(unreadable)?;
    let room = if pinned.len() > 1 { SMALL_CHUNK_BYTES } else { CHUNK_BYTES };
    for count in counts {
        loop {
            let mut chunk = CopyChunk::with_capacity(room);
            let (rows, filled) = copy.fill(&mut chunk, CHUNK_BYTES).await.map_err(unreadable)?;
            count.add(rows, chunk.len());
            if !chunk.is_empty() {
                pass(&sender, Piece::Rows(chunk)).await?;
            }
            match filled {
                Filled::Full => {}
                Filled::Copied => break,
                Filled::Ready => {
                    return Err(Error::Bug(format!("no COPY of {} was made", count.table)));
                }
            }
        }
        pass(&sender, Piece::End).await?;
    }
    let mut rest = CopyChunk::with_capacity(0);
    match copy.fill(&mut rest, CHUNK_BYTES).await.map_err(unreadable)? {
        (0, Filled::Ready) => Ok(()),
        _ => Err(Error::Bug("rows came after the end of a copy".to_string())),
    }
}

async fn pass(sender: &mpsc::Sender<Piece>, piece: Piece) -> Result<()> {
    // The writer ends before us only with an error, which try_join reports.
    sender.send(piece).await.map_err(|_| Error::Bug("the writer of a copy is gone".to_string()))
}

/// Writes what comes; gives the number of rows of each part that the target counted.
async fn write(
    target: &mut Session,
    pinned: &[Pinned<'_>],
    frozen: bool,
    mut receiver: mpsc::Receiver<Piece>,
) -> Result<Vec<u64>> {
    let freeze = if frozen { ", freeze" } else { "" };
    let sql: Vec<String> = pinned
        .iter()
        .map(|Pinned { item, .. }| write_sql(&item.table, &format!("{}{freeze}", item.with.write)))
        .collect();
    let refuse = |error| match pinned.first() {
        Some(first) => refused(&first.item.part.table, error),
        None => Error::Pg(error),
    };
    let mut copy = target.copy_in(&sql.join("; ")).await.map_err(refuse)?;
    let mut left = pinned.len();
    while let Some(piece) = receiver.recv().await {
        match piece {
            Piece::Rows(chunk) => copy.pass(chunk).await.map_err(refuse)?,
            Piece::End => {
                left = left.saturating_sub(1);
                if left > 0 {
                    copy.next();
                }
            }
        }
    }
    copy.finish().await.map_err(refuse)
}

/// A part whose table is locked and is what the snapshot sees.
struct Pinned<'a> {
    item: &'a Item,
    /// Its file, for tables of several parts.
    filenode: Option<u32>,
}

/// Locks the tables until our transaction ends, so that nobody can rewrite them any more, and looks
/// whether somebody has since the snapshot was taken (ALTER TYPE, TRUNCATE, CLUSTER): in the new
/// file the snapshot may see nothing, and COPY would give no rows and no error. pg_class as the
/// snapshot sees it still names the file before. Gives those that are as they were, and the others.
async fn pin<'a>(
    source: &mut Session,
    items: &'a [Item],
) -> Result<(Vec<Pinned<'a>>, Vec<QualifiedName>)> {
    let names: Vec<String> =
        items.iter().map(|item| format!("only {}", item.part.table.quoted())).collect();
    let oids: Vec<String> = items.iter().map(|item| item.table.oid.to_string()).collect();
    let sql = format!(
        "lock table {} in access share mode; \
         select c.oid, c.relfilenode, pg_catalog.pg_relation_filenode(c.oid) \
         from pg_catalog.pg_class c where c.oid in ({})",
        names.join(", "),
        oids.join(", ")
    );
    let unreadable = |error| match items.first() {
        Some(first) => unreadable_table(&first.part.table, error),
        None => Error::Pg(error),
    };
    let mut files = std::collections::HashMap::with_capacity(items.len());
    for row in source.query(&sql).await.map_err(unreadable)? {
        let (seen, now): (Option<u32>, Option<u32>) = (row.parse_opt(1)?, row.parse_opt(2)?);
        files.insert(row.parse::<u32>(0)?, (seen, now));
    }
    let mut pinned = Vec::with_capacity(items.len());
    let mut rewritten = Vec::new();
    for item in items {
        match files.get(&item.table.oid) {
            Some((seen, now)) if seen == now => {
                let filenode = if item.is_whole() { None } else { *now };
                pinned.push(Pinned { item, filenode });
            }
            _ => rewritten.push(item.part.table.clone()),
        }
    }
    Ok((pinned, rewritten))
}

fn refused(table: &QualifiedName, error: pg::Error) -> Error {
    if error.server().is_none() || error.is_closed() {
        return Error::Pg(error);
    }
    Error::Refused { table: table.clone(), error: Box::new(error) }
}

fn unreadable(pinned: &[Pinned<'_>], error: pg::Error) -> Error {
    match pinned.first() {
        Some(first) => unreadable_table(&first.item.part.table, error),
        None => Error::Pg(error),
    }
}

fn unreadable_table(table: &QualifiedName, error: pg::Error) -> Error {
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
