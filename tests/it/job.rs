//! The main job through the commands of the command line, on real servers, under a writer.

use std::time::Duration;

use serde_json::Value;
use walferry::demo::compare::compare;
use walferry::demo::ledger;
use walferry::demo::server::{Server, StopMode};
use walferry::demo::writer::{Options, Writer, broken_invariants, create_schema};

use crate::support::job::{Ends, Run, walferry};

/// Both servers, the data, a writer at `rate` on the source.
async fn moving(rate: f64) -> (Ends, Writer) {
    let ends = Ends::start(15, 15);
    create_schema(&ends.source_uri(), 1).await.unwrap();
    let writer = Writer::start(Options {
        tx_per_second: Some(rate),
        ..Options::new(&ends.source_uri())
    })
    .await
    .unwrap();
    (ends, writer)
}

async fn assert_equal(ends: &Ends) {
    let comparison = compare(&ends.source_uri(), &ends.target_uri()).await.unwrap();
    assert!(comparison.is_equal(), "{:#?}", comparison.differences);
    assert!(comparison.rows() > 1000);
    for uri in [ends.source_uri(), ends.target_uri()] {
        assert_eq!(broken_invariants(&uri).await.unwrap(), Vec::<String>::new());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_moves_under_a_writer_switches_and_comes_back() {
    let (ends, writer) = moving(200.0).await;
    let before = ends.inventory().await;
    ends.walferry(&["check"]).success();
    let run = Run::start(&ends, &[]);
    run.until_phase("following").await;
    ends.walferry(&["verify"]).success();

    let outcome: Value = ends.walferry(&["cutover", "--json"]).success().json();
    assert!(outcome["fenced_ms"].as_f64().unwrap() < 2000.0, "{outcome}");
    let report = writer.stop().await;
    assert!(report.committed > 0);
    // Stragglers cannot write to the old side.
    let refused = ends.source.psql("app", "delete from bank.ledger").unwrap_err().to_string();
    assert!(refused.contains("this database has moved"), "{refused}");
    assert!(ledger::check(&ends.target_uri(), &report.ledger).await.unwrap().is_exact());

    let writer = Writer::start(Options {
        tx_per_second: Some(200.0),
        first_writer: 100,
        ..Options::new(&ends.target_uri())
    })
    .await
    .unwrap();
    writer.committed_more(100).await;
    ends.walferry(&["verify"]).success();
    ends.walferry(&["rollback"]).success();
    let second = writer.stop().await;
    assert!(second.committed > 100);
    for report in [&report, &second] {
        assert!(ledger::check(&ends.source_uri(), &report.ledger).await.unwrap().is_exact());
    }
    ends.walferry(&["verify"]).success();
    assert_equal(&ends).await;
    let status: Value = ends.walferry(&["status", "--json"]).success().json();
    assert_eq!(status["phase"], "rolled_back");
    conserved(&status["tables"]);
    conserved(&status["reverse"]["tables"]);

    ends.walferry(&["finish"]).success();
    run.ended().await;
    let after = ends.inventory().await;
    assert_eq!(before.source, after.source, "something of walferry is left on the source");
    assert_eq!(before.target, after.target, "something of walferry is left on the target");
}

/// Law 10, as status shows it.
fn conserved(tables: &Value) {
    let tables = tables.as_array().unwrap();
    assert!(!tables.is_empty());
    for table in tables {
        let n = |key: &str| table[key].as_i64().unwrap();
        assert_eq!(n("decoded"), n("applied") + n("filtered") + n("quarantined"), "{table}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_killed_at_random_moments_ends_exact() {
    let (ends, writer) = moving(150.0).await;
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    fastrand::seed(seed);
    let kills = std::env::var("WALFERRY_KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(12);
    for _ in 0..kills {
        let run = Run::start(&ends, &[]);
        tokio::time::sleep(Duration::from_millis(fastrand::u64(20..1500))).await;
        run.kill9().await;
    }
    let run = Run::start(&ends, &[]);
    run.until_phase("following").await;
    let report = writer.stop().await;
    ends.walferry(&["verify"]).success();
    assert_equal(&ends).await;
    assert!(ledger::check(&ends.target_uri(), &report.ledger).await.unwrap().is_exact());
    let status: Value = ends.walferry(&["status", "--json"]).success().json();
    conserved(&status["tables"]);
    run.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn both_servers_restart_in_every_phase() {
    let (ends, writer) = moving(100.0).await;
    let run = Run::start(&ends, &[]);
    for (server, mode) in [
        (&ends.target, StopMode::Fast),
        (&ends.source, StopMode::Fast),
        (&ends.target, StopMode::Immediate),
        (&ends.source, StopMode::Immediate),
    ] {
        tokio::time::sleep(Duration::from_millis(300)).await;
        server.restart(mode).unwrap();
    }
    run.until_phase("following").await;
    for (server, mode) in [
        (&ends.target, StopMode::Immediate),
        (&ends.source, StopMode::Immediate),
        (&ends.target, StopMode::Fast),
        (&ends.source, StopMode::Fast),
    ] {
        writer.committed_more(20).await;
        server.restart(mode).unwrap();
    }
    let report = writer.stop().await;
    ends.walferry(&["verify"]).success();
    assert_equal(&ends).await;
    assert!(ledger::check(&ends.target_uri(), &report.ledger).await.unwrap().is_exact());
    run.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cancel_leaves_the_source_as_it_was_found() {
    let (ends, writer) = moving(100.0).await;
    let before = ends.inventory().await;
    let run = Run::start(&ends, &["--until", "following"]);
    run.ended().await;
    ends.walferry(&["cancel"]).success();
    writer.stop().await;
    assert_eq!(before.source, ends.inventory().await.source);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_without_a_job_says_so() {
    let ends = Ends::start(15, 15);
    for command in ["status", "verify", "cutover", "rollback", "finish", "cancel"] {
        let output = ends.walferry(&[command]);
        assert_eq!(output.code, 1, "{command}");
        assert!(output.stderr.contains("there is no job"), "{command}: {}", output.stderr);
    }
    let output = walferry(&["run", "--sorce", "x"]);
    assert_eq!(output.code, 2);
    let output = walferry(&["run", "--target", "postgres://u:secret@h/d"]);
    assert_eq!(output.code, 2);
    assert!(output.stderr.contains("--source") && !output.stderr.contains("secret"));
}

#[allow(dead_code)]
fn keep(_: &Server) {}
