//! The main job by each decoder and transport: there, back, and over kills.

use std::time::Duration;

use walferry::demo::writer::create_schema;

use crate::job::{assert_exact, sequences_are_past, writer};
use crate::support::job::{Ends, conserved};

/// Run, cutover, rollback and finish under a writer; nothing lost, nothing left behind.
async fn there_and_back(majors: (u32, u32), decoder: &str, transport: &str) {
    let ends = Ends::start(majors.0, majors.1);
    create_schema(&ends.source_uri(), 1).await.unwrap();
    // Tables that take no part, changed all the time.
    ends.source.psql("app", "create table public.left_out (id int primary key)").unwrap();
    let first = writer(&ends.source_uri(), 150.0, 1).await;
    let before = ends.inventories().await;
    let asked = ["--decoder", decoder, "--transport", transport, "--exclude", "public.left_out"];
    let with = |command: &[&'static str]| [command, &asked.map(leak)].concat();
    ends.done(&with(&["check"])).await;
    let mut run = ends.spawn(&with(&["run"]));
    ends.until_phase(&mut run, "following").await;
    ends.source.psql("app", "insert into public.left_out select generate_series(1, 500)").unwrap();
    ends.done(&with(&["verify"])).await;
    let status = ends.status().await;
    assert_eq!(status["decoder"], decoder, "{status}");
    assert_eq!(status["transport"], transport, "{status}");

    ends.done(&with(&["cutover"])).await;
    let first = first.stop().await;
    sequences_are_past(&ends.source_uri(), &ends.target_uri()).await;
    let second = writer(&ends.target_uri(), 150.0, 100).await;
    assert!(second.committed_more(100).await, "the writer is stuck");
    ends.done(&with(&["rollback"])).await;
    let second = second.stop().await;
    ends.done(&with(&["verify"])).await;
    ends.source.psql("app", "drop table public.left_out").unwrap();
    assert_exact(&ends, &[&first, &second]).await;
    let status = ends.status().await;
    assert_eq!(status["phase"], "rolled_back");
    conserved(&status["tables"]);
    conserved(&status["reverse"]["tables"]);

    ends.done(&with(&["finish"])).await;
    run.ended().await.expect_success();
    let after = ends.inventories().await;
    let left_out = |line: &String| !line.contains("left_out");
    let lost: Vec<_> = before.0.diff(&after.0).into_iter().filter(left_out).collect();
    assert_eq!(lost, Vec::<String>::new());
    assert_eq!(before.1.leftovers(&after.1), Vec::<String>::new());
}

fn leak(text: &str) -> &'static str {
    text.to_string().leak()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_moves_and_comes_back_by_pgoutput_and_pull() {
    there_and_back((15, 15), "pgoutput", "pull").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_moves_and_comes_back_by_wal2json_and_stream() {
    there_and_back((15, 15), "wal2json", "stream").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_moves_and_comes_back_by_wal2json_and_pull() {
    there_and_back((15, 15), "wal2json", "pull").await;
}

/// Between kills the transport changes; the slot is the same, and nothing is lost or doubled.
async fn killed(decoder: &str, transports: &[&str]) {
    let ends = Ends::start(15, 15);
    create_schema(&ends.source_uri(), 1).await.unwrap();
    let writer = writer(&ends.source_uri(), 150.0, 1).await;
    let seed = std::env::var("WALFERRY_SEED").ok().and_then(|n| n.parse().ok());
    let seed = seed.unwrap_or_else(|| fastrand::u64(..));
    println!("WALFERRY_SEED={seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let with = |transport| ["run", "--decoder", decoder, "--transport", transport];
    for transport in transports.iter().cycle().take(10) {
        let wait = Duration::from_millis(random.u64(50..1500));
        ends.spawn(&with(transport)).kill9_after(wait).await;
    }
    let mut run = ends.spawn(&with(transports[0]));
    ends.until_phase(&mut run, "following").await;
    assert!(writer.committed_more(100).await, "the writer is stuck");
    let report = writer.stop().await;
    ends.done(&["verify"]).await;
    assert_exact(&ends, &[&report]).await;
    conserved(&ends.status().await["tables"]);
    run.signal("INT");
    run.ended().await.expect_success();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_killed_at_random_moments_ends_exact() {
    killed("pgoutput", &["pull"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_changes_its_transport_between_kills_and_ends_exact() {
    killed("pgoutput", &["stream", "pull"]).await;
}
