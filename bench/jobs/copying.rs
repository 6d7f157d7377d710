//! From an empty target to following, all indexes there: copy and tables, and what both cost.

use std::path::PathBuf;
use std::process::Command;
use std::sync::Mutex;
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail};
use walferry::demo::binaries;

use crate::catchup::cpu_per_million;
use crate::data;
use crate::machine::Machine;
use crate::options::Options;
use crate::pair::{DATABASE, Pair, cores};
use crate::process::{Watched, run};
use crate::report::{Contestant, OURS, Outcome, Sample, quantile, take_turns};
use crate::stage::{PATIENCE, Peer, Stage, walferry};

const COPY_PHASE: &str = "COPY phase";
const PIPE: &str = "psql | psql, rows only";

/// 1.2 GB: pgbench's tables, and one of documents with a GIN index.
pub fn copy(options: &Options, machine: &Machine) -> Result<Vec<Outcome>> {
    let pair = large_tables(options)?;
    let mut outcome = race(options, machine, "copy", &pair, true)?;
    let figures = (outcome.median(OURS), outcome.best(&["native", "pgcopydb"]));
    outcome.ratio("time of the best peer's", figures, 1.0, Some(0.75));
    let phase = outcome.median(&format!("{OURS}: {COPY_PHASE}"));
    outcome.ratio("COPY phase of the pipe's", (phase, outcome.median(PIPE)), 1.1, None);
    Ok(vec![outcome])
}

/// 8,192 tables of 100 rows, and 1,000 partitions.
pub fn tables(options: &Options, machine: &Machine) -> Result<Vec<Outcome>> {
    let pair = Pair::start(options.smoke)?;
    data::many_tables(&pair, options.sized(8192, 8), options.sized(1000, 4))?;
    // A subscription needs a worker, a slot and two connections for each table: minutes a round, and
    // no bar asks for it. PEERS=native does.
    let mut outcome = race(options, machine, "tables", &pair, false)?;
    let figures = (outcome.median(OURS), outcome.best(&["pgcopydb"]));
    outcome.ratio("time of pgcopydb's", figures, 0.5, Some(0.25));
    Ok(vec![outcome])
}

/// walferry's own CPU for a million row changes, and for a gigabyte copied.
pub fn cost(options: &Options, machine: &Machine) -> Result<Vec<Outcome>> {
    let title = "walferry's own CPU".to_string();
    let mut outcome = Outcome::new(options, machine, "cost", title, "s of time");
    let pair = large_tables(options)?;
    let gigabytes = pair.source.psql(
        DATABASE,
        "select sum(pg_table_size(oid)) / 1e9 from pg_class \
         where relkind = 'r' and relnamespace = 'public'::regnamespace",
    )?;
    let gigabytes: f64 = gigabytes.parse().context("size of the source")?;
    pair.save(&pair.source, "base")?;
    let contestant: Contestant<'_> = (OURS.to_string(), Box::new(|| by_walferry(&pair)));
    println!("cost: {gigabytes:.2} GB copied");
    let copied = take_turns(options, vec![contestant])?;
    let cpu = copied.first().and_then(|entry| quantile(&entry.cpu, 0.5));
    outcome.bar("CPU s per GB copied", cpu.map(|cpu| cpu / gigabytes), 1.0, Some(0.3));
    let backlog = data::pgbench_backlog(options, 200_000);
    println!("cost: {} row changes", backlog.changes());
    let mut stage = Stage::set(options, &backlog, &[Peer::Walferry])?;
    stage.pile_up(&backlog)?;
    let contestant: Contestant<'_> =
        (OURS.to_string(), Box::new(|| stage.catch_up(Peer::Walferry)));
    let caught = take_turns(options, vec![contestant])?;
    let cpu = cpu_per_million(&caught, backlog.changes());
    outcome.bar("CPU s per million row changes", cpu, 2.0, Some(1.0));
    for (entries, name) in [(copied, "walferry copies"), (caught, "walferry catches up")] {
        let ours = entries.into_iter().filter(|entry| entry.who == OURS);
        outcome.entries.extend(ours.map(|mut entry| {
            entry.who = name.to_string();
            entry
        }));
    }
    Ok(vec![outcome])
}

fn large_tables(options: &Options) -> Result<Pair> {
    let pair = Pair::start(options.smoke)?;
    data::pgbench_tables(&pair, options.sized(60, 1))?;
    pair.source.psql(DATABASE, &data::documents(options.sized(400_000, 1000)))?;
    Ok(pair)
}

fn race(
    options: &Options,
    machine: &Machine,
    scenario: &str,
    pair: &Pair,
    with_pipe: bool,
) -> Result<Outcome> {
    pair.source.psql(DATABASE, "create publication bench for all tables")?;
    pair.source.psql(DATABASE, "vacuum analyze")?;
    let size = pair.source.psql(
        DATABASE,
        "select pg_size_pretty(pg_database_size(current_database())) || ' in ' || count(*) || \
         ' tables' from pg_class where relkind = 'r' and relnamespace = 'public'::regnamespace",
    )?;
    let title = format!("{size}, empty target to following, indexes there");
    println!("{scenario}: {title}");
    pair.save(&pair.source, "base")?;
    let mut contestants: Vec<Contestant<'_>> = vec![
        (OURS.to_string(), Box::new(|| by_walferry(pair))),
        ("native".to_string(), Box::new(|| by_subscription(pair))),
    ];
    if std::path::Path::new("/usr/bin/pgcopydb").exists() {
        contestants.push(("pgcopydb".to_string(), Box::new(|| by_pgcopydb(pair))));
    }
    if with_pipe {
        contestants.push((PIPE.to_string(), Box::new(|| by_pipes(pair))));
    }
    let is_asked = |who: &str| match (with_pipe, who) {
        (false, "native") => options.peers.iter().any(|peer| peer == who),
        _ => options.wants(who),
    };
    contestants.retain(|(who, _)| who == OURS || is_asked(who));
    let entries = take_turns(options, contestants)?;
    let mut outcome = Outcome::new(options, machine, scenario, title, "s");
    outcome.entries = entries;
    Ok(outcome)
}

/// The source as it was, an empty target, nothing left to write.
fn fresh(pair: &Pair) -> Result<()> {
    pair.restore(&pair.source, "base")?;
    pair.empty_target()?;
    pair.settle()
}

fn by_walferry(pair: &Pair) -> Result<Sample> {
    fresh(pair)?;
    let mut command = walferry(pair, &pair.target_uri(), &["run", "--until", "following"]);
    let log = pair.log(OURS);
    let usage = Watched::start(&mut command, &log)?.finish(PATIENCE)?;
    pair.check_equal(OURS)?;
    let said = std::fs::read_to_string(&log)?;
    // "copied 7,000,000 rows, 1.2 GB, in 12.3 s"
    let phase = said
        .lines()
        .filter(|line| line.starts_with("copied "))
        .filter_map(|line| line.rsplit_once(" in ")?.1.strip_suffix(" s")?.parse::<f64>().ok())
        .sum();
    Ok(Sample { value: usage.seconds, usage, parts: vec![(COPY_PHASE.to_string(), phase)] })
}

/// The runbook that is quickest by hand: tables, rows by the subscription, then indexes in
/// parallel, then statistics.
fn by_subscription(pair: &Pair) -> Result<Sample> {
    fresh(pair)?;
    let since = Instant::now();
    let dump = pair.dump(true)?;
    pair.restore_dump(&dump, Some("pre-data"), 1)?;
    let create = format!(
        "create subscription bench connection '{}' publication bench",
        pair.source_dsn(pair.source.port())
    );
    pair.target.psql(DATABASE, &create)?;
    let ready = "select count(*) > 0 and bool_and(srsubstate = 'r') from pg_subscription_rel";
    pair.wait_for(ready, since, PATIENCE, None)?;
    pair.restore_dump(&dump, Some("post-data"), cores())?;
    let mut analyze = Command::new(binaries::client("vacuumdb")?);
    run(analyze.args(["-q", "-Z", "-j", &cores().to_string(), "-d", &pair.target_uri()]))?;
    let sample = Sample::of(since.elapsed().as_secs_f64());
    pair.check_equal("native")?;
    pair.target.psql(DATABASE, "drop subscription bench")?;
    Ok(sample)
}

/// Without a stream behind it, which makes its work less than the others'.
fn by_pgcopydb(pair: &Pair) -> Result<Sample> {
    fresh(pair)?;
    let work = pair.scratch.join("pgcopydb");
    if work.exists() {
        std::fs::remove_dir_all(&work)?;
    }
    let jobs = cores().to_string();
    let mut command = Command::new("pgcopydb");
    command.args(["clone", "--source", &pair.source_uri(), "--target", &pair.target_uri()]);
    command.args(["--table-jobs", &jobs, "--index-jobs", &jobs, "--dir"]).arg(&work);
    command.args(["--split-tables-larger-than", "256MB"]);
    let mut usage = Watched::start(&mut command, &pair.log("pgcopydb"))?.finish(PATIENCE)?;
    // It is a family of processes: the peak of the first says nothing.
    usage.peak_rss = 0;
    pair.check_equal("pgcopydb")?;
    Ok(Sample { value: usage.seconds, usage, parts: Vec::new() })
}

/// The rows alone, into tables without indexes: a floor under every COPY phase.
fn by_pipes(pair: &Pair) -> Result<Sample> {
    fresh(pair)?;
    let dump = pair.dump(true)?;
    pair.restore_dump(&dump, Some("pre-data"), 1)?;
    let listed = pair.source.psql(
        DATABASE,
        "select oid::regclass from pg_class where relkind = 'r' \
         and relnamespace = 'public'::regnamespace order by pg_table_size(oid)",
    )?;
    // The largest is last, and so taken first.
    let waiting: Mutex<Vec<&str>> = Mutex::new(listed.lines().collect());
    let psql: PathBuf = binaries::client("psql")?;
    let (from, to) = (pair.source_uri(), pair.target_uri());
    let work = || -> Result<()> {
        loop {
            let taken = waiting.lock().map_err(|_| anyhow!("a pipe broke"))?.pop();
            let Some(table) = taken else { return Ok(()) };
            let script = "set -e; \"$0\" -X -q -d \"$1\" -c \"copy $3 to stdout\" \
                          | \"$0\" -X -q -d \"$2\" -c \"copy $3 from stdin\"";
            let mut shell = Command::new("sh");
            run(shell.args(["-c", script]).arg(&psql).args([&from, &to, table]))?;
        }
    };
    let since = Instant::now();
    let done: Vec<Result<()>> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..cores()).map(|_| scope.spawn(work)).collect();
        let join = |worker: std::thread::ScopedJoinHandle<'_, Result<()>>| {
            worker.join().unwrap_or_else(|_| Err(anyhow!("a pipe broke")))
        };
        workers.into_iter().map(join).collect()
    });
    let sample = Sample::of(since.elapsed().as_secs_f64());
    if let Some(Err(error)) = done.into_iter().find(Result::is_err) {
        bail!("{error:#}");
    }
    pair.check_equal(PIPE)?;
    Ok(sample)
}
