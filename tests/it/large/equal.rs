//! Whole jobs over clients that are hard to follow, killed again and again, in every combination of
//! ways to carry large transactions: the end state is the source's.

use std::time::Duration;

use walferry::demo::compare::compare;
use walferry::demo::server::Server;
use walferry::pg::Config;

use super::work::{self, Work};
use crate::support::job::{Ends, broker, conserved};
use crate::support::until_within;

/// Where changes wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wait {
    Memory,
    Spool,
    Kafka,
}

async fn a_job(arguments: &[&str], wait: Wait, seed: u64) {
    println!("{arguments:?} {wait:?} WALFERRY_SEED={seed}");
    let settings = ["logical_decoding_work_mem = '64kB'", "max_prepared_transactions = 20"];
    let start = || Server::start(&Server::bin_of(15).unwrap(), &settings).unwrap();
    let mut ends = Ends::of(start(), start());
    match wait {
        Wait::Memory => {}
        Wait::Spool => ends = ends.with_spool(),
        Wait::Kafka => ends = ends.with_kafka(&broker().address()),
    }
    ends.source.psql("app", &work::ddl()).unwrap();
    let mut all = vec!["run"];
    all.extend(arguments);
    let mut run = ends.spawn(&all);
    ends.until_phase(&mut run, "following").await;
    let source = Config::parse(&ends.source_uri()).unwrap();
    let two_phase = arguments.contains(&"--two-phase");
    // Of each of the clients; WALFERRY_TRANSACTIONS for a longer form.
    let asked = std::env::var("WALFERRY_TRANSACTIONS").ok().and_then(|n| n.parse().ok());
    let (transactions, rows_max) = (asked.unwrap_or(30), 2500);
    let work =
        Work { transactions, rows_max, alters: false, prepares: true, truncates: !two_phase };
    // One that is prepared all the while, through all kills.
    let held = "begin; insert into all_of_them values (-1, 9, 'held'); prepare transaction 'held'";
    ends.source.psql("app", held).unwrap();
    let mut writing = tokio::spawn(async move { work::write(&source, seed, work).await });
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
    held_through(&ends, two_phase).await;
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

/// The transaction that was prepared from the beginning is on the target as such, and nothing else
/// is; a cutover is refused because of it. Then it is committed.
async fn held_through(ends: &Ends, two_phase: bool) {
    let pending = "select string_agg(gid, ' ') from pg_prepared_xacts";
    let wanted = |gid: &str| match two_phase {
        true => gid.starts_with("walferry_main_forward:") && gid.ends_with(":held"),
        false => gid.is_empty(),
    };
    until_within(Duration::from_secs(90), "prepared transactions on the target", async || {
        let found = ends.target.psql("app", pending).unwrap();
        wanted(&found) && !found.contains(' ')
    })
    .await;
    let refused = ends.walferry(&["cutover"]).await;
    assert_eq!(refused.code, Some(1), "{refused:?}");
    assert!(refused.err.contains("commit prepared 'held'"), "{}", refused.err);
    ends.source.psql("app", "commit prepared 'held'").unwrap();
    let arrived = "select count(*) from all_of_them where id = -1";
    until_within(Duration::from_secs(60), "the held row", async || {
        ends.target.psql("app", arrived).unwrap() == "1"
    })
    .await;
    assert_eq!(ends.target.psql("app", pending).unwrap(), "");
    assert_eq!(ends.target.psql("app", "select count(*) from walferry.prepared").unwrap(), "0");
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

#[tokio::test(flavor = "multi_thread")]
async fn killed_jobs_end_the_same_with_two_phases_and_without() {
    let seed = seed();
    a_job(&["--two-phase", "on", "--streaming", "on"], Wait::Spool, seed).await;
    a_job(&["--two-phase", "on"], Wait::Memory, seed).await;
    if cfg!(feature = "kafka") {
        a_job(&["--two-phase", "on", "--streaming", "on"], Wait::Kafka, seed).await;
    }
}

/// Not at PREPARE, and by name.
#[tokio::test(flavor = "multi_thread")]
async fn two_phases_without_room_on_the_target_are_refused_by_check() {
    let settings = ["max_prepared_transactions = 20"];
    let start = |settings: &[&str]| Server::start(&Server::bin_of(15).unwrap(), settings).unwrap();
    let ends = Ends::of(start(&settings), start(&["max_prepared_transactions = 0"]));
    ends.source.psql("app", "create table t (id int primary key)").unwrap();
    let found = ends.walferry(&["check", "--two-phase", "on"]).await;
    assert_eq!(found.code, Some(1), "{found:?}");
    let said = "ALTER SYSTEM SET max_prepared_transactions = 20";
    assert!(found.out.contains(said), "{}", found.out);
    let found = ends.walferry(&["check"]).await;
    assert!(!found.out.contains(said), "{}", found.out);
}
