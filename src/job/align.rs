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

use std::time::Duration;

use serde_json::json;

use super::client::Client;
use super::{Error, Result};
use crate::clock::Deadline;
use crate::cutover::barrier;
use crate::id::Stream;
use crate::lsn::Lsn;
use crate::pg::{Config, Purpose, Session};
use crate::source::{ExportedSnapshot, HeldSlot, slot, snapshot};

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
    _from: HeldSlot,
    _to: ExportedSnapshot,
}

/// Lines both sides up through a runner that is alive.
pub async fn align(
    client: &mut Client,
    stream: Stream,
    from: &Config,
    to: &Config,
    wait: Duration,
) -> Result<Aligned> {
    let deadline = Deadline::after(wait);
    loop {
        let outcome = hold_and_export(client, stream, from, to, deadline).await;
        let let_go = client.ask("let_go", &json!({}), Duration::from_secs(10)).await;
        match outcome {
            // A restart of the stream lets a hold go, and where BEGIN does not tell where a
            // transaction commits, one larger than a batch is written past it.
            Err(Error::Remote(said)) if said.ends_with(PASSED) && !deadline.passed() => {
                tracing::debug!(said, "aligning again");
            }
            outcome => {
                let aligned = outcome?;
                let_go?;
                return Ok(aligned);
            }
        }
    }
}

async fn hold_and_export(
    client: &mut Client,
    stream: Stream,
    from: &Config,
    to: &Config,
    deadline: Deadline,
) -> Result<Aligned> {
    let mut live = Session::connect(from, Purpose::Sql).await?;
    let end_lsn = barrier::mark(&mut live, "align").await?;
    let first = post_hold(client, stream, end_lsn, false).await?;
    wait_held(client, &first, deadline).await?;
    let name = format!("walferry_verify_{:08x}", fastrand::u32(..));
    let maker = Session::connect(from, Purpose::Replication).await?;
    let options = slot::CreateOptions {
        name,
        plugin: "pgoutput".to_string(),
        temporary: true,
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
    let second = post_hold(client, stream, held.consistent_lsn, true).await?;
    wait_held(client, &second, deadline).await?;
    let session = Session::connect(to, Purpose::Sql).await?;
    let exported = snapshot::export(session).await?;
    Ok(Aligned {
        from_snapshot: held.snapshot_name.clone(),
        to_snapshot: exported.name.clone(),
        lsn: held.consistent_lsn,
        _from: held,
        _to: exported,
    })
}

/// `exact`: an error if the stream has passed the position already.
async fn post_hold(client: &mut Client, stream: Stream, lsn: Lsn, exact: bool) -> Result<String> {
    let args = json!({ "stream": stream.as_str(), "lsn": lsn.to_string(), "exact": exact });
    client.post("hold", &args).await
}

async fn wait_held(client: &mut Client, id: &str, deadline: Deadline) -> Result<()> {
    while client.poll(id).await?.is_none() {
        if deadline.passed() {
            let verb = "hold".to_string();
            return Err(Error::NoAnswer { verb, wait: Duration::ZERO });
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}
