//! `walferry status`.

use std::process::ExitCode;
use std::time::Duration;

use super::options::JobArgs;
use super::print;
use crate::fault::{Fault, Faulty};
use crate::job::place::Place;
use crate::job::reads::ReadState;
use crate::job::standby_status::StandbyStatus;
use crate::job::status::{self, Status, TableStatus};
use crate::job::store::StreamRow;

/// Options of the command.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    job: JobArgs,
    /// Print it as JSON
    #[arg(long)]
    json: bool,
    /// Print it again every second
    #[arg(long)]
    watch: bool,
}

/// A runner stores positions twice a second, but for what it does in one piece.
const SILENT_SECONDS: f64 = 60.0;

/// Shows where the job stands. 0, or 1 if there is no such job. With `--watch` it goes on until it
/// is stopped or the job is gone, and through times in which the home database is away.
pub async fn run(args: Args) -> anyhow::Result<ExitCode> {
    let (job, home, source) = args.job.home()?;
    let mut seen = false;
    loop {
        match status::read(&job, &home, source.as_ref()).await {
            Ok(status) => {
                seen = true;
                if args.watch && !args.json {
                    print!("\x1b[H\x1b[2J");
                }
                if args.json { print::json(&status)? } else { show(&status) }
            }
            Err(error) if args.watch && seen && error.fault() == Fault::Retry => {
                eprintln!("{error}; trying again");
            }
            Err(error) => return Err(error.into()),
        }
        if !args.watch {
            return Ok(ExitCode::SUCCESS);
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

fn show(status: &Status) {
    println!("job      {} ({} -> {})", status.job, status.source, status.target);
    println!("phase    {}", status.phase);
    if let Some(reading) = &status.reading {
        let at = status.decoded_at.as_ref().map(|at| format!(" from standby {at}"));
        let at = at.unwrap_or_default();
        println!("reading  {} by {}{at}", reading.decoder, reading.transport);
    }
    match &status.runner {
        Some(pid) => {
            println!("runner   alive (backend {pid} on the target){}", silence(status, pid));
        }
        None if status.held_clients => println!(
            "runner   none, in the middle of a flip: clients may be held until `walferry run`, \
             which undoes or finishes it at once"
        ),
        None if matches!(&*status.phase, "finished" | "canceled") => {
            println!("runner   none; the job has ended");
        }
        None => println!("runner   none; `walferry run` goes on from here"),
    }
    if let Some(error) = &status.error {
        println!("error    {error}");
    }
    if let Some(reads) = &status.reads {
        let where_to = match reads.state {
            ReadState::Leading => "on their way to the target",
            ReadState::Led => "on the target",
            ReadState::Returning => "on their way back to the source",
        };
        println!("readers  {where_to}, by {}", reads.shown().join("; "));
    }
    for group in &status.groups {
        let lsn = group.switched_lsn.as_ref().map_or(String::new(), |lsn| format!(", from {lsn}"));
        let name = group.group.as_deref().unwrap_or("never switched");
        println!("group    {name}: {} tables on the {}{lsn}", group.tables, group.owner);
    }
    if let Some(spool) = &status.spool {
        let place = match &spool.place {
            Place::Spool(spool) => format!("spool    {} on host {}", spool.dir, spool.host),
            Place::Kafka(kafka) => format!("kafka    topic {} of {}", kafka.topic, kafka.brokers),
        };
        println!("{place}; its loss would cost {}", spool.loss);
    }
    for standby in &status.standbys {
        let StandbyStatus { standby, state, slot_lsn, said, age_seconds } = standby;
        let at = slot_lsn.as_ref().map(|lsn| format!(", slot at {lsn}")).unwrap_or_default();
        let said = said.as_ref().map(|said| format!(": {said}")).unwrap_or_default();
        println!("standby  {standby} {state}{at} ({age_seconds:.0} s ago){said}");
    }
    if let Some(policy) = &status.on_conflict {
        println!("both     sides are written; conflicts are settled by {policy}");
    }
    show_stream("forward", &status.positions);
    show_fallbacks(status.fallbacks);
    show_conflicts(status.conflicts, "target");
    show_tables(&status.tables);
    show_aside(status);
    if let Some(reverse) = &status.reverse {
        show_stream("reverse", &reverse.positions);
        show_fallbacks(reverse.fallbacks);
        show_conflicts(reverse.conflicts, "source");
        show_tables(&reverse.tables);
    }
}

/// What waits for somebody.
fn show_aside(status: &Status) {
    for table in &status.parked {
        println!("parked   {}, {} changes: {}", table.table, table.changes, table.error);
        if let Some(sql) = &table.awaited {
            println!("         waits for: {sql}");
        }
    }
    for sql in &status.awaited {
        println!("awaited  on the target, as no stream shows it: {sql}");
    }
}

/// A runner that hangs keeps its lease.
fn silence(status: &Status, pid: &str) -> String {
    let live = match status.phase.as_str() {
        "switched" => status.reverse.as_ref().map(|reverse| &reverse.positions),
        "catching_up" | "following" | "rolled_back" => Some(&status.positions),
        _ => None,
    };
    match live.and_then(|positions| positions.age_seconds) {
        Some(seconds) if seconds > SILENT_SECONDS => format!(
            ", silent for {seconds:.0} s: if its process hangs or its host is gone, end it there \
             (select pg_terminate_backend({pid});) and start `walferry run` again"
        ),
        _ => String::new(),
    }
}

fn show_stream(name: &str, row: &StreamRow) {
    let text = |value: &Option<String>| value.clone().unwrap_or_else(|| "-".to_string());
    println!(
        "{name}  lag {} / {:.1} s  received {}  applied {}  durable {}  confirmed {}",
        row.lag_bytes.map_or("-".to_string(), |b| print::bytes(b.unsigned_abs())),
        row.lag_seconds.unwrap_or(0.0),
        text(&row.received_lsn),
        text(&row.applied_lsn),
        text(&row.durable_lsn),
        text(&row.confirmed_lsn),
    );
    show_spool(row);
}

fn show_spool(row: &StreamRow) {
    let Some(bytes) = row.spool_bytes else { return };
    let size = |bytes: i64| print::bytes(bytes.unsigned_abs());
    println!(
        "         spool {}, durable to {}; the source keeps {} of WAL",
        size(bytes),
        row.spooled_lsn.as_deref().unwrap_or("-"),
        row.retained_bytes.map_or("-".to_string(), size)
    );
}

fn show_conflicts(conflicts: i64, side: &str) {
    if conflicts > 0 {
        println!("         {conflicts} conflicts on record, in walferry.conflict on the {side}");
    }
}

fn show_fallbacks(batches: i64) {
    if batches > 0 {
        println!("         {batches} batches refused as sets, and written in row order");
    }
}

fn show_tables(tables: &[TableStatus]) {
    if tables.is_empty() {
        return;
    }
    println!(
        "  {:<40} {:>8} {:>12} {:>12} {:>12} {:>10} {:>6} {:>6}",
        "table", "copy", "rows copied", "decoded", "applied", "filtered", "aside", "lost"
    );
    for table in tables {
        println!(
            "  {:<40} {:>8} {:>12} {:>12} {:>12} {:>10} {:>6} {:>6}",
            table.name,
            table.copy_state,
            print::count(table.rows_copied.unsigned_abs()),
            print::count(table.decoded.unsigned_abs()),
            print::count(table.applied.unsigned_abs()),
            print::count(table.filtered.unsigned_abs()),
            table.quarantined,
            table.lost
        );
    }
}
