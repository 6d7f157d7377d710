//! `walferry verify`.

use std::process::ExitCode;
use std::time::Duration;

use super::ask::Asker;
use super::options::JobArgs;
use super::print;
use crate::catalog::{Selection, tables};
use crate::config::parse_duration;
use crate::id::Stream;
use crate::job::store::Store;
use crate::job::{self, JobConfig, Phase, align};
use crate::pg::{Purpose, Session};
use crate::verify::{self, Report};

/// Options of the command.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    job: JobArgs,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
    /// Give up if both sides cannot be lined up within this time (a long transaction on the live side
    /// delays it)
    #[arg(long, value_name = "TIME", value_parser = parse_duration, default_value = "10m")]
    timeout: Duration,
}

/// Compares both sides while they live. 0 equal, 1 different.
pub async fn run(args: Args) -> anyhow::Result<ExitCode> {
    let mut asker = Asker::connect(&args.job.job()?).await?;
    let outcome = compare(&mut asker, args.timeout).await;
    let closed = asker.close().await;
    let report = outcome?;
    closed?;
    if args.json {
        print::json(&report)?;
    } else {
        show(&report);
    }
    Ok(if report.equal { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn compare(asker: &mut Asker, timeout: Duration) -> anyhow::Result<Report> {
    let config = asker.config().clone();
    let stream = flowing(&config).await?;
    // A runner of our own may still be connecting its streams.
    asker.ask("ping", &serde_json::Value::Null, Duration::from_secs(60)).await?;
    let (from, to) = match stream {
        Stream::Forward => (&config.source, &config.target),
        Stream::Reverse => (&config.target, &config.source),
    };
    let aligned = align::align(&mut asker.client, stream, from, to, timeout).await?;
    let options = &config.options;
    let selection = Selection::parse(&options.include, &options.exclude, &options.schema_only)?;
    let mut session = Session::connect(from, Purpose::Sql).await?;
    let tables = tables(&mut session, &selection).await?;
    let tables =
        tables.into_iter().filter(|t| selection.has_rows(&t.name) && !t.unlogged).collect();
    let options = verify::Options {
        source: from.clone(),
        source_snapshot: Some(aligned.from_snapshot.clone()),
        target: to.clone(),
        target_snapshot: Some(aligned.to_snapshot.clone()),
        tables,
        jobs: config.jobs,
    };
    Ok(verify::run(options).await?)
}

/// The stream that keeps the other side current in this phase.
async fn flowing(config: &JobConfig) -> anyhow::Result<Stream> {
    let home = Session::connect(&config.target, Purpose::Sql).await?;
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

fn show(report: &Report) {
    for table in &report.tables {
        let verdict = if table.equal { "equal".to_string() } else {
            format!("{} differing", table.differing)
        };
        println!("{:<50} {:>12} rows  {verdict}", table.name, print::count(table.rows));
        for difference in &table.keys {
            println!("    {difference}");
        }
    }
    println!("{}", if report.equal { "equal" } else { "different" });
}
