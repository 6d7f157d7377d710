//! Every row of all sources compared with the target that it goes to, while both are in use.
//!
//! All pairs are lined up at once, as one is for an ordinary job (`job::align`): each source's
//! streams are held at one position of its log, of which a temporary slot gives the snapshot; once
//! all pairs of all sources stand there, a snapshot is taken on each target, and streams go on.
//! What the snapshots show is compared by target (`verify::run_united`).

use std::time::Duration;

use futures_util::future::try_join_all;
use serde_json::{Value, json};

use super::layout::Pair;
use super::store::{Stage, Store};
use super::{Error, Reshard};
use crate::clock::Deadline;
use crate::cutover::barrier;
use crate::id::Stream;
use crate::job::align::hold;
use crate::job::client::{ASK_AGAIN, Client};
use crate::job::{self, Result, lease};
use crate::lsn::Lsn;
use crate::pg::{Config, Purpose, Session, SlotKind};
use crate::source::{ExportedSnapshot, HeldSlot, slot, snapshot};
use crate::verify::{self, Report, Side};

/// A runner that has just begun may still be connecting its streams.
const PING_WAIT: Duration = Duration::from_secs(60);

/// How long a stream that was held is asked to go on.
const LET_GO_WAIT: Duration = Duration::from_secs(10);

/// How often tables that are rewritten while they are compared are tried again.
const ROUNDS: usize = 10;

/// Snapshots of all sides at one point of each stream.
struct Aligned {
    sources: Vec<HeldSlot>,
    targets: Vec<ExportedSnapshot>,
}

/// A pair, and who asks its runner.
struct Asked {
    pair: Pair,
    client: Client,
}

/// Compares through runners that are alive; a report for each target, in their order. All must be
/// lined up within `timeout`.
///
/// # Errors
/// Once it is switched, and where runners are not alive. A difference is none: see the reports.
pub async fn verify(reshard: &Reshard, timeout: Duration) -> Result<Vec<Report>> {
    let layout = reshard.layout().await?;
    let mut store = Store::new(Session::control(reshard.home()?).await?, reshard.name.clone());
    let stage = store.load_existing().await?.stage;
    if stage != Stage::Running {
        let (name, stage) = (reshard.name.to_string(), stage.to_string());
        let why = "streams do not flow any more: compare before the cutover";
        return Err(Error::Refused { asked: "verify", name, stage, why }.into());
    }
    if lease::holder(&mut store.session, &reshard.name).await?.is_none() {
        return Err(Error::NotRun { name: reshard.name.to_string() }.into());
    }
    let mut asked = Vec::new();
    for pair in reshard.pairs(&layout)? {
        let mut client = Client::connect(&pair.config.target, &pair.config.job).await?;
        client.ask("ping", &Value::Null, PING_WAIT).await?;
        asked.push(Asked { pair, client });
    }
    for _ in 0..ROUNDS {
        let aligned = line_up(reshard, &mut asked, Deadline::after(timeout)).await?;
        let targets = 0..reshard.targets.len();
        let comparing = targets.map(|target| compare(&asked, &aligned, target));
        let reports = try_join_all(comparing).await?;
        if reports.iter().all(|report| report.rewritten.is_empty()) {
            return Ok(reports);
        }
    }
    Err(verify::Error::Rewritten { tables: Vec::new() }.into())
}

/// Again, where a stream was begun anew meanwhile and has let its hold go.
async fn line_up(reshard: &Reshard, asked: &mut [Asked], deadline: Deadline) -> Result<Aligned> {
    loop {
        let outcome = hold_all(reshard, asked, deadline).await;
        let going = asked
            .iter_mut()
            .map(|asked| async move { asked.client.ask("let_go", &json!({}), LET_GO_WAIT).await });
        let going = try_join_all(going).await;
        match outcome {
            Err(job::Error::Remote(said)) if said.ends_with(ASK_AGAIN) && !deadline.passed() => {
                tracing::debug!(said, "aligning again");
            }
            outcome => {
                let aligned = outcome?;
                going?;
                return Ok(aligned);
            }
        }
    }
}

async fn hold_all(reshard: &Reshard, asked: &mut [Asked], deadline: Deadline) -> Result<Aligned> {
    let mut lives = Vec::new();
    for source in &reshard.sources {
        lives.push(Session::connect(source, Purpose::Sql).await?);
    }
    let ends = try_join_all(lives.iter_mut().map(|live| barrier::mark(live, "align"))).await?;
    let held = hold_each(asked, &ends, false, deadline).await?;
    let making = try_join_all(reshard.sources.iter().map(|source| make(source, deadline)));
    tokio::pin!(making);
    let sources = loop {
        tokio::select! {
            made = &mut making => break made?,
            // A hold whose asker is silent is let go, and the stream would run past the snapshot.
            () = tokio::time::sleep(Duration::from_secs(1)) => {
                for (asked, id) in asked.iter_mut().zip(&held) {
                    asked.client.poll(id).await?;
                }
            }
        }
    };
    try_join_all(lives.iter_mut().map(|live| barrier::mark(live, "align"))).await?;
    let points: Vec<Lsn> = sources.iter().map(|held| held.consistent_lsn).collect();
    hold_each(asked, &points, true, deadline).await?;
    let exporting = reshard.targets.iter().map(|target| async move {
        Ok::<_, job::Error>(snapshot::export(Session::connect(target, Purpose::Sql).await?).await?)
    });
    Ok(Aligned { sources, targets: try_join_all(exporting).await? })
}

/// Holds every stream at the position of its source; gives the commands.
async fn hold_each(
    asked: &mut [Asked],
    points: &[Lsn],
    exact: bool,
    deadline: Deadline,
) -> Result<Vec<String>> {
    let holding = asked.iter_mut().map(|asked| async move {
        let point = points.get(asked.pair.source).copied().unwrap_or(Lsn::ZERO);
        hold(&mut asked.client, Stream::Forward, point, exact, deadline).await
    });
    try_join_all(holding).await
}

/// A temporary slot, whose snapshot is of exactly what had committed before its point.
async fn make(source: &Config, deadline: Deadline) -> Result<HeldSlot> {
    let maker = Session::connect(source, Purpose::Replication).await?;
    let mut watcher = Session::connect(source, Purpose::Sql).await?;
    let options = slot::CreateOptions {
        name: format!("walferry_verify_{:08x}", fastrand::u32(..)),
        plugin: "pgoutput".to_string(),
        kind: SlotKind::Temporary,
        wait: deadline.left(),
    };
    Ok(slot::create(maker, &mut watcher, &options, |_| {}).await?)
}

async fn compare(asked: &[Asked], aligned: &Aligned, target: usize) -> Result<Report> {
    let mut all = Vec::new();
    for Asked { pair, .. } in asked.iter().filter(|asked| asked.pair.target == target) {
        let side =
            |config: &Config, snapshot: Option<String>| Side { config: config.clone(), snapshot };
        let seen = aligned.sources.get(pair.source).map(|held| held.snapshot_name.clone());
        let there = aligned.targets.get(target).map(|exported| exported.name.clone());
        let source = side(&pair.config.source, seen);
        let mut wanted = verify::Options::new(source, side(&pair.config.target, there));
        let mut session = Session::connect(&pair.config.source, Purpose::Sql).await?;
        wanted.selection = pair.config.options.selection(&mut session).await?;
        wanted.map = pair.config.map.clone();
        all.push(wanted);
    }
    Ok(verify::run_united(all).await?)
}
