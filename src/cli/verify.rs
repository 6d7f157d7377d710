//! `walferry verify`.

use std::process::ExitCode;
use std::time::Duration;

use super::ask::Asker;
use super::options::JobArgs;
use super::print;
use crate::apply::parked::{self, Parked};
use crate::config::parse_duration;
use crate::id::{QualifiedName, Stream};
use crate::job::store::Store;
use crate::job::{self, JobConfig, Phase, align, rest};
use crate::large;
use crate::pg::{Config, Purpose, Session};
use crate::verify::{self, DifferenceKind, Report, Side};

/// Options of the command.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    job: JobArgs,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
    /// Give up if both sides cannot be lined up within this time (a long transaction on the live
    /// side delays it)
    #[arg(long, value_name = "TIME", value_parser = parse_duration, default_value = "10m")]
    timeout: Duration,
}

/// Compares both sides while they live. 0 equal, 1 different.
pub async fn run(args: Args) -> anyhow::Result<ExitCode> {
    let mut asker = Asker::connect(&args.job.job()?).await?;
    let outcome = async {
        let report = compare(&mut asker, args.timeout).await?;
        let large = large_objects(asker.config()).await?;
        let parked = quarantined(asker.config()).await?;
        Ok::<_, anyhow::Error>((report, large, parked))
    };
    let outcome = outcome.await;
    let closed = asker.close().await;
    let (report, large, parked) = outcome?;
    closed?;
    let same = report.equal && large.as_ref().is_none_or(|large| large.differing.is_empty());
    if args.json {
        let mut value = serde_json::to_value(&report)?;
        if let (Some(object), Some(large)) = (value.as_object_mut(), &large) {
            object.insert("equal".to_string(), same.into());
            object.insert("large_objects".to_string(), serde_json::to_value(large)?);
        }
        if let Some(object) = value.as_object_mut() {
            object.insert("quarantined".to_string(), serde_json::to_value(&parked)?);
        }
        print::json(&value)?;
    } else {
        show(&report, large.as_ref(), same);
        for table in &parked {
            let (name, changes) = (&table.table, table.changes);
            println!("{name}: {changes} changes are kept aside, see walferry quarantine list");
        }
    }
    Ok(if same { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Large objects named of each kind.
const SHOWN: usize = 20;

/// How often tables that are truncated or rewritten while they are compared are tried again.
const ROUNDS: usize = 10;

async fn compare(asker: &mut Asker, timeout: Duration) -> anyhow::Result<Report> {
    let stream = flowing(asker.config()).await?;
    // A runner of our own may still be connecting its streams.
    asker.ask("ping", &serde_json::Value::Null, Duration::from_secs(60)).await?;
    let mut report = compare_once(asker, stream, timeout, None).await?;
    for _ in 0..ROUNDS {
        if report.rewritten.is_empty() {
            return Ok(report);
        }
        let tables = report.rewritten.clone();
        report = report.amend(compare_once(asker, stream, timeout, Some(tables)).await?);
    }
    Err(verify::Error::Rewritten { tables: report.rewritten }.into())
}

/// Compares `tables`, or all, at one point of the stream.
async fn compare_once(
    asker: &mut Asker,
    stream: Stream,
    timeout: Duration,
    tables: Option<Vec<QualifiedName>>,
) -> anyhow::Result<Report> {
    let config = asker.config().clone();
    let (from, to) = match stream {
        Stream::Forward => (&config.source, &config.target),
        Stream::Reverse => (&config.target, &config.source),
    };
    let line = line(&config, stream, from, to).await?;
    let aligned = align::align(&mut asker.client, &line, timeout).await?;
    let options = &config.options;
    let mut source = Session::connect(&config.source, Purpose::Sql).await?;
    let selection = options.selection(&mut source).await?;
    let side = |config: &Config, snapshot: &str| Side {
        config: config.clone(),
        snapshot: Some(snapshot.to_string()),
    };
    // Source and target keep their names whichever way the rows flow.
    let (from, to) = (side(from, &aligned.from_snapshot), side(to, &aligned.to_snapshot));
    let mut wanted = match stream {
        Stream::Forward => verify::Options::new(from, to),
        Stream::Reverse => verify::Options::new(to, from),
    };
    wanted.selection = selection;
    wanted.tables = tables;
    let home = Session::connect(&config.target, Purpose::Sql).await?;
    let mut store = Store::new(home, config.job.clone());
    wanted.publication = store.load_readings().await?.publication;
    wanted.parallelism = config.jobs;
    Ok(verify::run(wanted).await?)
}

async fn line(
    config: &JobConfig,
    stream: Stream,
    from: &Config,
    to: &Config,
) -> anyhow::Result<align::Line> {
    let home = Session::control(&config.target).await?;
    let mut readings = Store::new(home, config.job.clone()).load_readings().await?;
    Ok(align::Line {
        stream,
        publications: readings.publications(stream, &config.job.object(stream)),
        reading: readings.of(stream).clone().unwrap_or_default(),
        from: from.clone(),
        to: to.clone(),
    })
}

/// The stream that keeps the other side current in this phase.
async fn flowing(config: &JobConfig) -> anyhow::Result<Stream> {
    let home = Session::control(&config.target).await?;
    let row = Store::new(home, config.job.clone()).load().await?;
    let phase = row.map_or(Phase::Planned, |row| row.phase);
    match phase {
        Phase::CatchingUp | Phase::Following | Phase::RolledBack => Ok(Stream::Forward),
        Phase::Switched => Ok(Stream::Reverse),
        phase => Err(job::Error::Refused(job::state::Refused {
            phase,
            asked: "verify",
            why: "it compares two sides that a stream keeps level; wait for following",
        })
        .into()),
    }
}

/// Tables that the stream keeps changes of aside: they are expected to differ.
async fn quarantined(config: &JobConfig) -> anyhow::Result<Vec<Parked>> {
    let mut home = Session::control(&config.target).await?;
    Ok(parked::parked(&mut home, &config.job.object(Stream::Forward)).await?)
}

/// Large objects, if they move. They are carried at a switch and not while following, so what the
/// live side has changed since is no difference, but told.
async fn large_objects(config: &JobConfig) -> anyhow::Result<Option<large::Comparison>> {
    let (live, dest, side) = match flowing(config).await? {
        Stream::Forward => (&config.source, &config.target, "source"),
        Stream::Reverse => (&config.target, &config.source, "target"),
    };
    let mut home = Session::connect(&config.target, Purpose::Sql).await?;
    if !rest::moves_large_objects(&mut home, config).await? {
        return Ok(None);
    }
    let since = rest::load_mark(&mut home, config.job.as_str(), side).await?;
    let mut live = Session::connect(live, Purpose::Sql).await?;
    let mut dest = Session::connect(dest, Purpose::Sql).await?;
    Ok(Some(large::compare(&mut live, &mut dest, since).await?))
}

fn show(report: &Report, large: Option<&large::Comparison>, same: bool) {
    for table in &report.tables {
        let verdict = match table.equal {
            true => "equal".to_string(),
            false => format!("{} differing", print::count(table.differing)),
        };
        println!("{:<50} {:>14} rows  {verdict}", table.name, print::count(table.rows));
        for line in table.problems.iter().chain(&table.notes) {
            println!("    {line}");
        }
        for difference in &table.keys {
            let kind = match difference.kind {
                DifferenceKind::MissingOnTarget => "missing on the target",
                DifferenceKind::ExtraOnTarget => "only on the target",
                DifferenceKind::Different => "different values",
            };
            println!("    {}: {kind}", difference.key);
        }
    }
    if let Some(large) = large.filter(|large| large.count > 0 || !large.differing.is_empty()) {
        let verdict = match large.differing.len() as u64 {
            0 => "equal".to_string(),
            n => format!("{} differing", print::count(n)),
        };
        println!("{:<50} {:>14}       {verdict}", "large objects", print::count(large.count));
        for oid in large.differing.iter().take(SHOWN) {
            println!("    {oid}: different, and not because it was changed on the live side");
        }
        for oid in large.pending.iter().take(SHOWN) {
            println!("    {oid}: changed since; the next switch carries it");
        }
        let hidden = large.pending.len().saturating_sub(SHOWN);
        if hidden > 0 {
            println!("    and {hidden} more that the next switch carries");
        }
    }
    println!("{}", if same { "equal" } else { "different" });
}
