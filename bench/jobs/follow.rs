//! From a commit on the source until it is seen on the target, under paced transactions.
//!
//! One session commits a row on the source a hundred times a second, and takes the time when the
//! server has answered; another asks the target for it until it is there. Both are in this process
//! and read one clock. A figure is too large by up to one question to the target (some 0.1 ms), for
//! every contestant alike. Rows are sent at their times whether or not the last has arrived, so
//! that a stall counts for all that fall into it.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use tokio::sync::mpsc;
use walferry::demo::binaries;
use walferry::pg::{Config, Purpose, Session};

use crate::data;
use crate::machine::Machine;
use crate::options::Options;
use crate::pair::{DATABASE, Pair};
use crate::process::Watched;
use crate::report::{Contestant, OURS, Outcome, RATE, Sample, quantile, take_turns};
use crate::stage::{PATIENCE, Peer, Stage};

/// Between two probes.
const EVERY: Duration = Duration::from_millis(10);

/// A probe that has not come by then never will.
const LOST: Duration = Duration::from_secs(60);

/// 500 and 2,000 transactions a second.
pub fn follow(options: &Options, machine: &Machine) -> Result<Vec<Outcome>> {
    // The tables only: nothing is written before the race.
    let tables = data::pgbench_backlog(options, 200_000);
    let stage = Stage::set(options, &tables, &[Peer::Walferry, Peer::Native("")])?;
    stage.put_aside()?;
    let seconds = options.sized(20, 3);
    let mut outcomes = Vec::new();
    for rate in [500_u64, 2000] {
        let title = format!("commit to visible at {rate} transactions a second for {seconds} s");
        println!("follow-{rate}: {title}");
        let stage = &stage;
        let contestants = stage.peers.iter().map(|peer| -> Contestant<'_> {
            (peer.name(), Box::new(move || one_run(stage, *peer, rate, seconds)))
        });
        let entries = take_turns(options, contestants.collect())?;
        let scenario = format!("follow-{rate}");
        let mut outcome = Outcome::new(options, machine, &scenario, title, "ms, p50");
        outcome.entries = entries;
        let figures = (outcome.median(OURS), outcome.median("native"));
        outcome.ratio("p50 of native's", figures, 1.5, Some(1.0));
        let tails = (outcome.median(&format!("{OURS}: p99")), outcome.median("native: p99"));
        outcome.ratio("p99 of native's", tails, 1.0, None);
        outcomes.push(outcome);
    }
    Ok(outcomes)
}

fn one_run(stage: &Stage, peer: Peer, rate: u64, seconds: u64) -> Result<Sample> {
    stage.bring_back(peer)?;
    let pair = &stage.pair;
    let worker = stage.go(peer)?;
    pair.source.psql(DATABASE, "insert into bench_probe values (0)")?;
    let first = "select exists (select from public.bench_probe where id = 0)";
    pair.wait_for(first, Instant::now(), PATIENCE, worker.as_ref())?;
    let mut command = Command::new(binaries::client("pgbench")?);
    command.args(["-n", "--random-seed=7", "-M", "prepared", "-c", "8", "-j", "2"]);
    command.args(["-R", &rate.to_string(), "-T", &seconds.to_string(), &pair.source_uri()]);
    let load = Watched::start(&mut command, &pair.log("pgbench"))?;
    // The first second warms up: connections, plans, caches.
    std::thread::sleep(Duration::from_secs(1));
    let count = (seconds - 1) * 1000 / EVERY.as_millis() as u64;
    let times = pair.runtime.block_on(probe(pair, count))?;
    let said = pair.log("pgbench");
    load.finish(PATIENCE)?;
    pair.source.psql(DATABASE, "update bench_mark set done = true")?;
    stage.arrival(Instant::now(), worker.as_ref())?;
    let usage = Stage::halt(worker)?;
    pair.check_equal(&peer.name())?;
    let of = |at| quantile(&times, at).context("no probe arrived");
    let parts = vec![
        ("p99".to_string(), of(0.99)?),
        ("longest".to_string(), of(1.0)?),
        (RATE.to_string(), achieved(&std::fs::read_to_string(said)?)),
    ];
    Ok(Sample { value: of(0.5)?, usage, parts })
}

/// `tps = 498.2 (without initial connection time)`
fn achieved(said: &str) -> f64 {
    let line = said.lines().find_map(|line| line.strip_prefix("tps = "));
    line.and_then(|rest| rest.split(' ').next()?.parse().ok()).unwrap_or(0.0)
}

/// Milliseconds of each probe.
async fn probe(pair: &Pair, count: u64) -> Result<Vec<f64>> {
    let open = async |uri: String| -> Result<Session> {
        Ok(Session::connect(&Config::parse(&uri)?, Purpose::Sql).await?)
    };
    let (mut source, mut target) = (open(pair.source_uri()).await?, open(pair.target_uri()).await?);
    let (sent, mut arriving) = mpsc::unbounded_channel();
    let send = async move {
        let mut clock = tokio::time::interval(EVERY);
        for id in 1..=count {
            clock.tick().await;
            source.execute(&format!("insert into public.bench_probe values ({id})")).await?;
            sent.send((id, Instant::now()))?;
        }
        anyhow::Ok(())
    };
    let receive = async move {
        let mut times = Vec::new();
        let mut seen = 0_u64;
        while let Some((id, at)) = arriving.recv().await {
            while seen < id {
                let row = target.query_one("select max(id) from public.bench_probe", &[]).await?;
                seen = row.parse(0)?;
                if at.elapsed() > LOST {
                    bail!("probe {id} did not arrive within {} s", LOST.as_secs());
                }
            }
            times.push(at.elapsed().as_secs_f64() * 1e3);
        }
        anyhow::Ok(times)
    };
    let (sent, times) = tokio::join!(send, receive);
    sent?;
    times
}
