//! `walferry verify`.

use std::process::ExitCode;
use std::time::Duration;

use serde_json::Value;

use super::options::JobArgs;
use super::print;
use crate::clock::Deadline;
use crate::config::parse_duration;
use crate::job::ask::Asker;
use crate::job::state::may_compare;
use crate::job::store::JobRow;
use crate::job::{self, Gone, JobConfig, comparing, quarantine};
use crate::large;
use crate::verify::{DifferenceKind, Report};

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
    let fits = |row: &JobRow| may_compare(row.phase).map_err(job::Error::from);
    let mut asker = Asker::connect_if(&args.job.job()?, print::sayings(), fits).await?;
    let outcome = async {
        let config = asker.config().clone();
        let report = compare(&mut asker, &config, args.timeout).await?;
        let large = comparing::large_objects(&config).await?;
        Ok::<_, anyhow::Error>((report, large, quarantine::of(&config).await?))
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

/// A runner answers this at its next turn.
const PING_WAIT: Duration = Duration::from_secs(60);

/// Compares through whatever runner is alive; where it dies meanwhile, through one of our own.
async fn compare(
    asker: &mut Asker,
    config: &JobConfig,
    timeout: Duration,
) -> anyhow::Result<Report> {
    let deadline = Deadline::after(timeout);
    loop {
        // Starts another runner where ours does not come up; comparing only asks the one alive.
        asker.ask("ping", &Value::Null, PING_WAIT).await?;
        match comparing::compare(&mut asker.client, config, deadline.left()).await {
            Err(job::Error::Gone(Gone::Runner { .. })) if !deadline.passed() => {}
            compared => return Ok(compared?),
        }
    }
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
