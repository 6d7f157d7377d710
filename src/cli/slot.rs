//! `walferry slot`: the source's end of a job whose copy somebody else makes.

use std::process::ExitCode;

use anyhow::Context;
use tokio::sync::watch;

use super::options::JobArgs;
use super::print;
use super::run::stop_on_signal;
use crate::config;
use crate::job::reserve::{Reserved, reserve};

/// Options of the command.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, clap::Subcommand)]
enum Action {
    /// Make publication and slot on the source, and print what to write down
    Create(Create),
}

#[derive(Debug, clap::Args)]
struct Create {
    #[command(flatten)]
    job: JobArgs,
    /// Keep the slot's snapshot until stopped, for pg_dump --snapshot
    #[arg(long)]
    hold: bool,
    /// Print it as JSON
    #[arg(long)]
    json: bool,
}

/// Makes them. 0 done; 1 on an error, and where they are there already.
pub async fn run(args: Args) -> anyhow::Result<ExitCode> {
    let Action::Create(args) = args.action;
    let config = args.job.without_target()?;
    if config.options.publication.is_some() {
        let message = "is not for a slot that is made ahead".to_string();
        return Err(config::Error::Value { option: "--publication", message }.into());
    }
    let made = reserve(&config, args.hold, &print::sayings())
        .await
        .context("making the source's end of the job")?;
    match args.json {
        true => print::json(&made)?,
        false => show(&made),
    }
    if made.held.is_some() {
        let (stop, mut stopping) = watch::channel(false);
        tokio::spawn(stop_on_signal(stop));
        eprintln!("the snapshot is there until this is stopped (Ctrl-C); the slot stays");
        let _ = stopping.wait_for(|stop| *stop).await;
    }
    Ok(ExitCode::SUCCESS)
}

fn show(made: &Reserved) {
    println!("slot               {} ({})", made.slot, made.plugin);
    println!("publication        {}", made.publication.as_deref().unwrap_or("none needed"));
    println!("system identifier  {}", made.system_identifier);
    println!("timeline           {}", made.timeline);
    println!("position           {}", made.consistent_lsn);
    if let Some(snapshot) = &made.snapshot {
        println!("snapshot           {snapshot}");
    }
    println!(
        "\nThe slot keeps WAL from here on, and has all that commits at or after that \
         position. Now make the copy:\n\
         - of files (base backup, storage snapshot): begin it now, have it replay the source's \
         log at least up to the position, and promote it (standby.signal or a recovery target, \
         then pg_promote). Its timeline tells where it stands:\n    \
         walferry run --name {job} --initial-copy none\n\
         - by pg_dump: only under the snapshot of walferry slot create --hold, which sees just \
         what commits before the position:\n    \
         pg_dump --snapshot NAME ...; restore it;\n    \
         walferry run --name {job} --initial-copy none --from-lsn {lsn}\n\
         To give up: walferry cancel --name {job} --target-is-gone",
        job = made.job,
        lsn = made.consistent_lsn
    );
}
