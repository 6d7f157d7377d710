//! `walferry quarantine`: rows that the target refused, and tables that wait for them.

use std::process::ExitCode;
use std::time::Duration;

use serde_json::{Value, json};

use super::options::JobArgs;
use super::print;
use crate::config::{self, parse_duration};
use crate::job::ask::Asker;
use crate::job::quarantine::{self, Listed, Tried};
use crate::job::store::Store;
use crate::pg::Session;

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Action {
    /// Show parked tables, why they are, and what is kept of them
    List,
    /// Try to write what is kept, in order, and follow the table again
    Retry,
    /// Forget one change (--id), or all that is kept of a table, which is followed again from here
    Drop,
}

/// Options of the command.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    job: JobArgs,
    /// What to do
    #[arg(value_enum)]
    action: Action,
    /// These tables (schema.table) [default: all; drop needs one, or --all]
    #[arg(value_name = "TABLE")]
    tables: Vec<String>,
    /// Drop this change alone, as list numbers it; the table stays parked until a retry
    #[arg(long, value_name = "ID", conflicts_with_all = ["tables", "all"])]
    id: Option<i64>,
    /// Drop all that is kept of every table
    #[arg(long, conflicts_with = "tables")]
    all: bool,
    /// List at most so many changes of each table
    #[arg(long, value_name = "N", default_value = "20")]
    limit: usize,
    /// Wait so long for what comes of a retry
    #[arg(long, value_name = "TIME", value_parser = parse_duration, default_value = "10m")]
    timeout: Duration,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

/// 0 done, or nothing is kept; 1 a table stays parked after a retry or drop.
pub async fn run(args: Args) -> anyhow::Result<ExitCode> {
    match args.action {
        Action::List => list(&args).await,
        Action::Drop if args.id.is_some() => drop_one(&args).await,
        Action::Drop if args.tables.is_empty() && !args.all => Err(config::Error::Value {
            option: "quarantine drop",
            message: "name the table, or --id of one change, or --all".to_string(),
        }
        .into()),
        Action::Retry | Action::Drop => retry(&args).await,
    }
}

async fn list(args: &Args) -> anyhow::Result<ExitCode> {
    let (job, home, _) = args.job.home()?;
    let mut store = Store::new(Session::control(&home).await?, job.clone());
    store.load_existing().await?;
    let listed = quarantine::list(&mut store.session, &job, &args.tables, args.limit).await?;
    if args.json {
        print::json(&json!({ "tables": listed }))?;
        return Ok(ExitCode::SUCCESS);
    }
    listed.iter().for_each(show);
    if listed.is_empty() {
        println!("nothing is kept aside");
    }
    Ok(ExitCode::SUCCESS)
}

fn show(listed: &Listed) {
    let table = &listed.parked;
    println!("{}: {} changes kept since {}", table.table, table.changes, table.since);
    println!("    {}", table.error);
    if let Some(sql) = &table.awaited {
        println!("    waits for: {sql}");
    }
    for row in &listed.rows {
        let image = row.new.as_ref().or(row.old.as_ref());
        println!(
            "    {:>6}  {} {}  (transaction {} committed at {}, change {})",
            row.id,
            row.operation,
            image.unwrap_or(&Value::Null),
            row.xid,
            row.commit_lsn,
            row.ordinal
        );
        if let Some(error) = &row.error {
            println!("            {error}");
        }
    }
    let hidden = table.changes - listed.rows.len() as i64;
    if hidden > 0 {
        println!("            and {hidden} more");
    }
}

async fn drop_one(args: &Args) -> anyhow::Result<ExitCode> {
    let (job, home, _) = args.job.home()?;
    let mut home = Session::control(&home).await?;
    let tried = quarantine::discard_one(&mut home, &job, args.id.unwrap_or_default()).await?;
    if args.json {
        print::json(&json!({ "tables": [tried] }))?;
    } else {
        println!(
            "dropped; {} keeps {} changes, which walferry quarantine retry writes",
            tried.table, tried.changes
        );
    }
    Ok(ExitCode::SUCCESS)
}

async fn retry(args: &Args) -> anyhow::Result<ExitCode> {
    let mut asker = Asker::connect(&args.job.job()?, print::sayings()).await?;
    quarantine::refuse_still(asker.row.phase)?;
    let outcome = async {
        // A runner of our own may still be connecting its streams.
        asker.ask("ping", &Value::Null, Duration::from_secs(60)).await?;
        let discard = args.action == Action::Drop;
        let (job, wait) = (asker.config().job.clone(), args.timeout);
        let home = asker.client.session();
        Ok::<_, anyhow::Error>(quarantine::retry(home, &job, &args.tables, discard, wait).await?)
    };
    let outcome = outcome.await;
    let closed = asker.close().await;
    let tried = outcome?;
    closed?;
    if args.json {
        print::json(&json!({ "tables": tried }))?;
    } else {
        tried.iter().for_each(tell);
        if tried.is_empty() {
            println!("nothing is kept aside");
        }
    }
    let stays = tried.iter().any(|tried| !tried.written);
    Ok(if stays { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn tell(tried: &Tried) {
    match &tried.error {
        None if tried.dropped > 0 => {
            println!("{}: {} changes dropped, followed again", tried.table, tried.dropped);
        }
        None => println!("{}: written, followed again", tried.table),
        Some(error) => {
            println!("{}: {} changes stay: {error}", tried.table, tried.changes);
        }
    }
}
