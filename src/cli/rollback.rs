//! `walferry rollback`.

use std::process::ExitCode;

use super::cutover::{self, FlipArgs};
use super::options::JobArgs;
use crate::id::Stream;

/// Options of the command.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    job: JobArgs,
    #[command(flatten)]
    flip: FlipArgs,
}

/// Switches applications back to the source. 0 switched, 1 not.
pub async fn run(args: Args) -> anyhow::Result<ExitCode> {
    cutover::flip(Stream::Reverse, &args.job, &args.flip).await
}
