//! Whole jobs over clients that are hard to follow, killed again and again, in every combination of
//! ways to carry large transactions: the end state is the source's.

use std::time::Duration;

use walferry::demo::compare::compare;
use walferry::demo::server::Server;
use walferry::pg::Config;

use super::work;
use crate::support::job::{Ends, conserved};

/// Where changes wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wait {
    Memory,
    Spool,
}

async fn a_job(arguments: &[&str], wait: Wait, seed: u64) {
    println!("{arguments:?} {wait:?} WALFERRY_SEED={seed}");
    let settings = ["logical_decoding_work_mem = '64kB'", "max_prepared_transactions = 20"];
    let start = || Server::start(&Server::bin_of(15).unwrap(), &settings).unwrap();
    let mut ends = Ends::of(start(), start());
    if wait == Wait::Spool {
        ends = ends.with_spool();
    }
    ends.source.psql("app", &work::ddl()).unwrap();
    let mut all = vec!["run"];
    all.extend(arguments);
    let mut run = ends.spawn(&all);
    ends.until_phase(&mut run, "following").await;
    let source = Config::parse(&ends.source_uri()).unwrap();
    let mut writing =
        tokio::spawn(async move { work::write(&source, seed, 100, 2500, false).await });
    let mut random = fastrand::Rng::with_seed(seed);
    let mut kills = 0;
    loop {
        let pause = Duration::from_millis(random.u64(200..1500));
        if tokio::time::timeout(pause, &mut writing).await.is_ok() {
            break;
        }
        run.kill9().await;
        kills += 1;
        run = ends.spawn(&all);
    }
    println!("{kills} kills");
    assert!(kills > 0, "it was over before the first kill");
    ends.until_phase(&mut run, "following").await;
    ends.done(&["verify"]).await;
    let comparison = compare(&ends.source_uri(), &ends.target_uri()).await.unwrap();
    assert_eq!(comparison.differences, Vec::<String>::new());
    conserved(&ends.status().await["tables"]);
    assert!(!run.has_ended(), "the run ended: {}", run.so_far());
    ends.done(&["cancel"]).await;
    let _ = run.ended().await;
}

fn seed() -> u64 {
    let seed = std::env::var("WALFERRY_SEED").ok().and_then(|n| n.parse().ok());
    seed.unwrap_or_else(|| fastrand::u64(..))
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_jobs_end_the_same_with_streaming_and_without() {
    let seed = seed();
    a_job(&["--streaming", "on"], Wait::Memory, seed).await;
    a_job(&["--streaming", "on"], Wait::Spool, seed).await;
    a_job(&["--streaming", "off"], Wait::Memory, seed).await;
}
