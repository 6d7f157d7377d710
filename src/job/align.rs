//! Both sides at one point, while both live: DESIGN's aligned snapshots.
//!
//! 1. The applier is held at the reading side's end of WAL, read now.
//! 2. A temporary slot on the reading side exports a snapshot of exactly what had committed before
//!    its consistent point, which is not before the hold.
//! 3. The hold moves to that point; when everything before it is applied, a snapshot is exported on
//!    the written side. The stream goes on; the two snapshots show the same rows.
//!
//! The stream is held for as long as the temporary slot takes to find its point: milliseconds, or
//! as long as the longest transaction on the reading side.
//!
//! Where the reading side is pulled from, no replication connection is needed here either: the
//! temporary slot is made by SQL, before the hold, and places an ordinary snapshot of the reading
//! side in the log (see `source::order`). The hold moves to that place.

use std::time::Duration;

use serde_json::json;

use super::admit::recorded;
use super::client::{ASK_AGAIN, Client};
use super::reading::Reading;
use super::{Error, Gone, Result};
use crate::clock::Deadline;
use crate::cutover::barrier;
use crate::id::Stream;
use crate::lsn::Lsn;
use crate::pg::{Config, Purpose, Session, SlotKind};
use crate::source::{
    ExportedSnapshot, HeldSlot, Order, Place, StreamOptions, Transport, slot, snapshot,
};

/// Snapshots of the reading side are taken this often over the same slot and hold.
const SNAPSHOTS: usize = 50;

/// The stream whose ends are lined up, and how it is read.
#[derive(Clone, Debug)]
pub struct Line {
    /// Which way.
    pub stream: Stream,
    /// Its publications, where the decoder is pgoutput.
    pub publications: Vec<String>,
    /// Decoder and transport.
    pub reading: Reading,
    /// The side that is read.
    pub from: Config,
    /// The side that is written.
    pub to: Config,
}

/// How the runner's answer ends where the stream ran past a hold.
pub(super) const PASSED: &str = "already; ask again";

/// Two snapshots of the same state. They live as long as this does.
#[derive(Debug)]
pub struct Aligned {
    /// Snapshot to import on the side that is read.
    pub from_snapshot: String,
    /// Snapshot to import on the side that is written.
    pub to_snapshot: String,
    /// The point.
    pub lsn: Lsn,
    _from: Kept,
    _to: ExportedSnapshot,
}

/// What keeps the reading side's snapshot alive.
#[derive(Debug)]
enum Kept {
    Slot(#[expect(dead_code, reason = "dropped with its session")] HeldSlot),
    Snapshot(#[expect(dead_code, reason = "dropped with its session")] ExportedSnapshot),
}

/// Lines both sides up through a runner that is alive, and through the next one where it dies and
/// another takes over at once. Errors: [`Gone::Runner`] where none does;
/// [`Gone::NotAligned`] after `wait`.
pub async fn align(client: &mut Client, line: &Line, wait: Duration) -> Result<Aligned> {
    let deadline = Deadline::after(wait);
    loop {
        let outcome = match line.reading.transport()? {
            Transport::Stream => hold_and_export(client, line, deadline).await,
            Transport::Pull => hold_and_place(client, line, deadline).await,
        };
        if let Err(error @ Error::Gone(Gone::Runner { .. })) = outcome {
            return Err(error);
        }
        let let_go = client.ask("let_go", &json!({}), Duration::from_secs(10)).await;
        match outcome {
            // A restart of the stream lets a hold go, where BEGIN does not tell where a transaction
            // commits, one larger than a batch is written past it, and a runner that died has been
            // replaced.
            Err(Error::Remote(said)) if said.ends_with(ASK_AGAIN) && !deadline.passed() => {
                tracing::debug!(said, "aligning again");
            }
            Err(Error::Gone(Gone::NotAligned { detail, .. })) => {
                return Err(Gone::NotAligned { detail, wait }.into());
            }
            outcome => {
                let aligned = outcome?;
                match let_go {
                    // A hold ends with the runner that had it.
                    Ok(_) | Err(Error::Gone(Gone::Runner { .. })) => return Ok(aligned),
                    Err(error) => return Err(error),
                }
            }
        }
    }
}

async fn hold_and_export(client: &mut Client, line: &Line, deadline: Deadline) -> Result<Aligned> {
    let Line { stream, from, to, .. } = line;
    let mut live = Session::connect(from, Purpose::Sql).await?;
    let end_lsn = barrier::mark(&mut live, "align").await?;
    let first = hold(client, *stream, end_lsn, false, deadline).await?;
    let name = format!("walferry_verify_{:08x}", fastrand::u32(..));
    let maker = Session::connect(from, Purpose::Replication).await?;
    let options = slot::CreateOptions {
        name,
        plugin: "pgoutput".to_string(),
        kind: SlotKind::Temporary,
        wait: deadline.left(),
    };
    let mut watcher = Session::connect(from, Purpose::Sql).await?;
    let making = slot::create(maker, &mut watcher, &options, |_| {});
    tokio::pin!(making);
    let held = loop {
        tokio::select! {
            held = &mut making => break held?,
            // A hold whose asker is silent is let go, and the stream would run past the snapshot.
            () = tokio::time::sleep(Duration::from_secs(1)) => { client.poll(&first).await?; }
        }
    };
    barrier::mark(&mut live, "align").await?;
    hold(client, *stream, held.consistent_lsn, true, deadline).await?;
    let session = Session::connect(to, Purpose::Sql).await?;
    let exported = snapshot::export(session).await?;
    Ok(Aligned {
        from_snapshot: held.snapshot_name.clone(),
        to_snapshot: exported.name.clone(),
        lsn: held.consistent_lsn,
        _from: Kept::Slot(held),
        _to: exported,
    })
}

/// The same by SQL alone.
async fn hold_and_place(client: &mut Client, line: &Line, deadline: Deadline) -> Result<Aligned> {
    loop {
        let name = format!("walferry_verify_{:08x}", fastrand::u32(..));
        let recorded = recorded(&line.from, None, &line.reading.decoder);
        let options = StreamOptions {
            publications: line.publications.clone(),
            ..StreamOptions::new(&name, &name, Lsn::ZERO, recorded)
        };
        let mut order = Order::watch(&line.from, options, deadline.left()).await?;
        for _ in 0..SNAPSHOTS {
            if order.is_spent() {
                break;
            }
            let outcome = place(client, line, &mut order, deadline).await;
            match outcome {
                Ok(Ok(aligned)) => return Ok(aligned),
                Ok(Err(Place::Unknown)) => {
                    // What ran when the slot was made ends, or another slot is made after it.
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                Ok(Err(_)) => {}
                // The stream had passed the position already: a later one is asked for.
                Err(Error::Remote(said)) if !deadline.passed() => {
                    tracing::debug!(said, "taking another snapshot");
                }
                Err(error) => return Err(error),
            }
            if deadline.passed() {
                return Err(not_aligned(format!(
                    "no snapshot of the {} stream's source lay between two commits",
                    line.stream
                )));
            }
        }
    }
}

/// One try: holds at the log's end, takes a snapshot, and moves the hold to its place.
async fn place(
    client: &mut Client,
    line: &Line,
    order: &mut Order,
    deadline: Deadline,
) -> Result<std::result::Result<Aligned, Place>> {
    let mut live = Session::connect(&line.from, Purpose::Sql).await?;
    let floor_lsn = barrier::mark(&mut live, "align").await?;
    hold(client, line.stream, floor_lsn, false, deadline).await?;
    let seen = snapshot::export(Session::connect(&line.from, Purpose::Sql).await?).await?;
    let upto_lsn = barrier::mark(&mut live, "align").await?;
    let lsn = match order.place(&seen, floor_lsn, upto_lsn).await? {
        Place::At(lsn) => lsn,
        elsewhere => return Ok(Err(elsewhere)),
    };
    hold(client, line.stream, lsn, true, deadline).await?;
    let exported = snapshot::export(Session::connect(&line.to, Purpose::Sql).await?).await?;
    Ok(Ok(Aligned {
        from_snapshot: seen.name.clone(),
        to_snapshot: exported.name.clone(),
        lsn,
        _from: Kept::Snapshot(seen),
        _to: exported,
    }))
}

/// Has the stream held at `lsn`, and waits until it stands there; gives the command's id. `exact`:
/// an error if the stream has passed the position already.
pub(super) async fn hold(
    client: &mut Client,
    stream: Stream,
    lsn: Lsn,
    exact: bool,
    deadline: Deadline,
) -> Result<String> {
    let args = json!({ "stream": stream.as_str(), "lsn": lsn.to_string(), "exact": exact });
    let id = client.post("hold", &args).await?;
    match client.wait(&id, "hold", deadline).await? {
        Some(_) => Ok(id),
        None => Err(not_aligned(format!("the {stream} stream did not come to {lsn}"))),
    }
}

/// How long was waited is known by [`align`].
fn not_aligned(detail: String) -> Error {
    Gone::NotAligned { detail, wait: Duration::ZERO }.into()
}
