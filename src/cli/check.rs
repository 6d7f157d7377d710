//! `walferry check`.

use std::process::ExitCode;

use super::options::JobArgs;
use super::print;
use crate::job;
use crate::job::check::{self, CheckOptions, Level};
use crate::pg::{Purpose, Session};

/// Options of the command.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    job: JobArgs,
    /// Print the findings as JSON
    #[arg(long)]
    json: bool,
}

/// Says what stands in the way. 0 ready, 1 not.
pub async fn run(args: Args) -> anyhow::Result<ExitCode> {
    let mut config = args.job.job()?;
    match config.clone().reaching_shards().await {
        Ok(reaching) => config = reaching,
        Err(error @ job::Error::ShardsCaptured { .. }) => return Err(error.into()),
        // A side that cannot be reached is a finding, as below.
        Err(_) => {}
    }
    let mut selection = config.options.patterns()?;
    // A source that cannot be reached is a finding; see there.
    if let Ok(mut source) = Session::connect(&config.source, Purpose::Sql).await {
        selection = selection.with_partitions(&mut source).await?;
    }
    let wanted = CheckOptions::of(&config, selection);
    let report = check::run(&config.source, &config.target, wanted).await?;
    if args.json {
        print::json(&report)?;
    } else {
        for finding in &report.findings {
            let level = match finding.level {
                Level::Error => "error",
                Level::Warning => "warning",
                Level::Info => "info",
            };
            println!("{level:>8}  {}: {}", finding.place(), finding.message);
            for line in finding.fix.iter().flat_map(|fix| fix.lines()) {
                println!("{:>10}{line}", "");
            }
        }
        println!("{}", if report.ready() { "ready" } else { "not ready" });
    }
    Ok(if report.ready() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
