//! How long a writer waits at most while a group moves. `make stalls` measures it, with the release
//! binary: WALFERRY_MOVES says how many moves, and the bar holds.

use std::time::{Duration, Instant};

use serde_json::Value;

use super::{Cluster, Load, Move};

/// Moves in the short form.
const MOVES: usize = 2;

/// What a loaded machine must keep to in the short form. The figure itself is printed.
const BOUND: Duration = Duration::from_secs(2);

/// In the median of the moves, where it is measured on purpose.
const BAR: Duration = Duration::from_millis(100);

/// The middle one of each step's times, over all moves.
fn medians(moves: &[Value]) -> String {
    let mut times: Vec<(&str, Vec<f64>)> = Vec::new();
    for step in moves.iter().flat_map(|steps| steps.as_array().unwrap()) {
        let (name, ms) = (step["name"].as_str().unwrap(), step["ms"].as_f64().unwrap());
        match times.iter_mut().find(|(known, _)| *known == name) {
            Some((_, all)) => all.push(ms),
            None => times.push((name, vec![ms])),
        }
    }
    let middle = |(name, all): &mut (&str, Vec<f64>)| {
        all.sort_by(f64::total_cmp);
        format!("{name} {:.1}", all[all.len() / 2])
    };
    times.iter_mut().map(middle).collect::<Vec<_>>().join(", ")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writers_wait_for_milliseconds_while_groups_move() {
    let moves = std::env::var("WALFERRY_MOVES").ok().and_then(|text| text.parse().ok());
    let bound = if moves.is_some() { BAR } else { BOUND };
    let Some(cluster) = Cluster::start(3) else { return };
    let cluster = cluster.with_tables();
    let uris: Vec<String> = vec![cluster.coordinator.uri("postgres"); 8];
    let load = Load::start(&uris, Duration::ZERO);
    load.more(500).await;
    let begun = (Instant::now(), load.count());
    let (mut windows, mut steps) = (Vec::new(), Vec::new());
    for number in 0..moves.unwrap_or(MOVES) {
        let groups = cluster.groups();
        let (port, shards) = &groups[number % groups.len()];
        let others = cluster.workers.iter().filter(|worker| worker.port() != *port);
        let target = others.clone().nth(number % others.count()).unwrap();
        let name = format!("move{number}");
        let job = Move::new(&name, cluster.worker(*port), target, &cluster.route(), shards);
        let run = job.follow().await;
        let from = Instant::now();
        let outcome = job.done(&["cutover", "--json"]).await.json();
        windows.push((from, Instant::now(), outcome["fenced_ms"].as_f64().unwrap()));
        steps.push(outcome["steps"].clone());
        load.more(50).await;
        job.done(&["verify"]).await;
        job.done(&["finish"]).await;
        run.ended().await.expect_success();
    }
    let rate = (load.count() - begun.1) as f64 / begun.0.elapsed().as_secs_f64();
    let seen = load.end().await;
    assert_eq!(seen.errors, Vec::<String>::new());
    assert_eq!(cluster.audit(), seen.acknowledged);
    let mut longest: Vec<Duration> =
        windows.iter().map(|(from, to, _)| seen.longest(*from, *to)).collect();
    let mut held: Vec<f64> = windows.iter().map(|(_, _, held)| *held).collect();
    longest.sort();
    held.sort_by(f64::total_cmp);
    let middle = longest.len() / 2;
    println!(
        "{} moves at {rate:.0} tx/s: worst write {:?} in the median (all {longest:?}), held {:.1} ms \
         in the median",
        longest.len(),
        longest[middle],
        held[middle]
    );
    println!("steps in the median, ms: {}", medians(&steps));
    assert!(longest[middle] < bound, "{longest:?}");
}
