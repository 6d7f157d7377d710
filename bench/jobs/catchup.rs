//! Backlogs: catchup, shapes, large, far and growth.

use anyhow::{Result, bail};

use crate::data::{self, Backlog};
use crate::machine::Machine;
use crate::options::Options;
use crate::report::{Contestant, Entry, OURS, Outcome, take_turns};
use crate::stage::{Peer, Stage};

/// Everyone catches up with one backlog, in turns.
fn race(
    options: &Options,
    machine: &Machine,
    scenario: &str,
    backlog: &Backlog,
    peers: &[Peer],
) -> Result<Outcome> {
    let title = format!(
        "{} transactions, {} row changes, slot start to exact end state",
        backlog.transactions,
        backlog.changes()
    );
    println!("{scenario}: {title}");
    let mut stage = Stage::set(options, backlog, peers)?;
    stage.pile_up(backlog)?;
    let stage = &stage;
    let contestants = stage
        .peers
        .iter()
        .map(|peer| -> Contestant<'_> { (peer.name(), Box::new(move || stage.catch_up(*peer))) });
    let entries = take_turns(options, contestants.collect())?;
    let mut outcome = Outcome::new(options, machine, scenario, title, "s");
    outcome.entries = entries;
    Ok(outcome)
}

/// CPU seconds of walferry for a million row changes.
pub fn cpu_per_million(entries: &[Entry], changes: u64) -> Option<f64> {
    let entry = entries.iter().find(|entry| entry.who == OURS)?;
    let cpu = crate::report::quantile(&entry.cpu, 0.5)?;
    Some(cpu / changes as f64 * 1e6)
}

/// 200k pgbench transactions.
pub fn catchup(options: &Options, machine: &Machine) -> Result<Vec<Outcome>> {
    let backlog = data::pgbench_backlog(options, 200_000);
    let peers = [Peer::Walferry, Peer::Native(""), Peer::Native("binary"), Peer::Receive];
    let mut outcome = race(options, machine, "catchup", &backlog, &peers)?;
    let figures = (outcome.median(OURS), outcome.best(&["native"]));
    outcome.ratio("time of native's", figures, 1.0 / 3.0, Some(0.2));
    Ok(vec![outcome])
}

/// Inserts, hot keys, deletes, rows without a key, wide rows.
pub fn shapes(options: &Options, machine: &Machine) -> Result<Vec<Outcome>> {
    let mut outcomes = Vec::new();
    let mut backlogs = data::shapes(options);
    let is_one = |shape: &String| backlogs.iter().any(|backlog| backlog.name == shape);
    if let Some(unknown) = options.shapes.iter().find(|shape| !is_one(shape)) {
        bail!("no shape {unknown:?}");
    }
    backlogs.retain(|backlog| options.wants_shape(backlog.name));
    for backlog in backlogs {
        let scenario = format!("shapes-{}", backlog.name);
        let peers = [Peer::Walferry, Peer::Native("")];
        let mut outcome = race(options, machine, &scenario, &backlog, &peers)?;
        let figures = (outcome.median(OURS), outcome.best(&["native"]));
        let limit = if backlog.name == "full-no-key" { 0.05 } else { 0.5 };
        outcome.ratio("time of native's", figures, limit, None);
        outcomes.push(outcome);
    }
    Ok(outcomes)
}

/// One transaction of five million rows.
pub fn large(options: &Options, machine: &Machine) -> Result<Vec<Outcome>> {
    let backlog = data::one_large(options);
    let peers = [Peer::Walferry, Peer::Native(""), Peer::Native("streamed")];
    let mut outcome = race(options, machine, "large", &backlog, &peers)?;
    let figures = (outcome.median(OURS), outcome.best(&["native"]));
    outcome.ratio("time of native's best", figures, 1.0, None);
    let peak = peak_mb(&outcome, OURS);
    outcome.bar("peak memory, MB", peak, 128.0, Some(64.0));
    Ok(vec![outcome])
}

/// The largest of all rounds.
fn peak_mb(outcome: &Outcome, who: &str) -> Option<f64> {
    let entry = outcome.entries.iter().find(|entry| entry.who == who)?;
    crate::report::quantile(&entry.peak_mb, 1.0)
}

/// The target 20 ms away, and the same backlog at home in the same run.
pub fn far(options: &Options, machine: &Machine) -> Result<Vec<Outcome>> {
    let backlog = data::pgbench_backlog(options, 200_000);
    let peers = [Peer::Walferry, Peer::WalferryFar, Peer::NativeFar];
    let mut outcome = race(options, machine, "far", &backlog, &peers)?;
    let away = outcome.median(&Peer::WalferryFar.name());
    let figures = (away, outcome.median(OURS));
    outcome.ratio("time at 20 ms of that at home", figures, 1.25, Some(1.1));
    Ok(vec![outcome])
}

/// A backlog once, four and sixteen times as long. Four times is catchup's: a shorter one is over before
/// memory is at what it keeps.
pub fn growth(options: &Options, machine: &Machine) -> Result<Vec<Outcome>> {
    let mut all: Option<Outcome> = None;
    let mut figures = Vec::new();
    for factor in [1, 4, 16] {
        let backlog = data::pgbench_backlog(options, 50_000 * factor);
        let outcome = race(options, machine, "growth", &backlog, &[Peer::Walferry])?;
        figures.push((outcome.median(OURS), peak_mb(&outcome, OURS), backlog.transactions as f64));
        let all = all.get_or_insert_with(|| {
            let title = "a pgbench backlog of 50,000 transactions x 1, 4, 16".to_string();
            Outcome::new(options, machine, "growth", title, "s")
        });
        all.entries.extend(outcome.entries.into_iter().map(|mut entry| {
            entry.who = format!("{OURS} x{factor}");
            entry
        }));
    }
    let (Some(mut outcome), [one, four, sixteen]) = (all, figures.as_slice()) else {
        return Ok(Vec::new());
    };
    // What the start takes falls out of a difference.
    let slope = |a: &Figures, b: &Figures| Some((b.0? - a.0?) / (b.2 - a.2));
    let slopes = (slope(four, sixteen), slope(one, four));
    outcome.ratio("a transaction from x4 to x16 of one from x1 to x4", slopes, 1.1, None);
    outcome.ratio("peak memory of x16 of that of x4", (sixteen.1, four.1), 1.1, None);
    Ok(vec![outcome])
}

/// Seconds, peak memory, transactions.
type Figures = (Option<f64>, Option<f64>, f64);
