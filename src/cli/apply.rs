//! `walferry apply`: `run` without reading the source, which `walferry capture` does.

use std::process::ExitCode;

use super::run::{Args as RunArgs, run_half};
use crate::job::opening::Half;

/// Options of the command.
#[derive(Debug, clap::Args)]
#[group(skip)]
pub struct Args {
    #[command(flatten)]
    run: RunArgs,
    /// Wait while another process applies, and take over from it
    #[arg(long)]
    take_over: bool,
}

/// Runs the job. Exit codes are those of `run`.
pub async fn run(args: Args) -> anyhow::Result<ExitCode> {
    run_half(args.run, Half::Apply, args.take_over).await
}
