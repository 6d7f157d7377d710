//! `walferry capture`: the half of `run` that reads the source.

use std::process::ExitCode;
use std::sync::{Arc, Mutex};

use tokio::sync::watch;

use super::options::JobArgs;
use super::run::stop_on_signal;
use crate::job::Notice;
use crate::job::capturing::capture;

/// Options of the command.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    job: JobArgs,
    /// Wait while another process reads the source, and take over from it
    #[arg(long)]
    take_over: bool,
}

/// Reads until the job has ended or it is stopped. 0 then; 1 on an error.
pub async fn run(args: Args) -> anyhow::Result<ExitCode> {
    let config = args.job.job()?;
    let (stop, stopping) = watch::channel(false);
    tokio::spawn(stop_on_signal(stop));
    let last = Mutex::new(String::new());
    let report = Arc::new(move |notice: Notice| {
        let line = match notice {
            Notice::Said(text) => text,
            Notice::Trouble(text) => format!("trying again: {text}"),
            Notice::Ended => "stopped: the job is ended by finish or cancel".to_string(),
            _ => return,
        };
        let Ok(mut last) = last.lock() else { return };
        if *last != line {
            eprintln!("{line}");
            *last = line;
        }
    });
    capture(config, args.take_over, report, stopping).await?;
    Ok(ExitCode::SUCCESS)
}
