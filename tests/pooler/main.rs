//! The bar of the main job: a cutover and a rollback through pgbouncer at 500 transactions a second,
//! with no failed statement and a stall that nobody notices.
//!
//! A test binary of its own: what it measures must not be the noise of other tests.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

#[path = "../it/support/mod.rs"]
mod support;

use std::time::Duration;

use walferry::demo::compare::compare;
use walferry::demo::ledger;
use walferry::demo::pgbouncer::PgBouncer;
use walferry::demo::writer::{Options, Report, Writer, broken_invariants, create_schema};

use support::job::{Ends, route_of};

/// Longest stall allowed, the median of all rounds: the promise where it is measured on purpose, and
/// what a busy machine may make of it, with a binary that is not optimized, in a run of all tests.
fn bar() -> Duration {
    let measuring = std::env::var("WALFERRY_ROUNDS").is_ok();
    Duration::from_millis(if measuring { 150 } else { 500 })
}

/// What one flip cost the application.
struct Flip {
    command: &'static str,
    stall: Duration,
    statement: String,
    fenced_ms: f64,
    steps: String,
}

fn rounds() -> usize {
    std::env::var("WALFERRY_ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(3)
}

fn median(mut stalls: Vec<Duration>) -> Duration {
    stalls.sort();
    stalls[stalls.len() / 2]
}

/// Flips under the writer and gives the longest stall around it.
async fn flip(ends: &Ends, writer: &Writer, command: &'static str, route: &str) -> Flip {
    assert!(writer.committed_more(300).await, "the writer is stuck");
    writer.reset_stalls();
    let outcome = ends.done(&[command, "--route", route, "--json"]).await.json();
    assert!(writer.committed_more(100).await, "the writer is stuck");
    let report = writer.report_now();
    let steps: Vec<String> = outcome["steps"].as_array().unwrap().iter().map(shown).collect();
    Flip {
        command,
        stall: report.longest_stall,
        statement: report.longest_stall_statement,
        fenced_ms: outcome["fenced_ms"].as_f64().unwrap(),
        steps: steps.join(", "),
    }
}

fn shown(step: &serde_json::Value) -> String {
    format!("{} {:.1}", step["name"].as_str().unwrap(), step["ms"].as_f64().unwrap())
}

async fn assert_exact(ends: &Ends, old: &str, live: &str, report: &Report) {
    ends.done(&["verify"]).await;
    let comparison = compare(old, live).await.unwrap();
    assert_eq!(comparison.differences, Vec::<String>::new());
    for uri in [old, live] {
        assert_eq!(broken_invariants(uri).await.unwrap(), Vec::<String>::new());
        let check = ledger::check(uri, &report.ledger).await.unwrap();
        assert!(check.is_exact(), "{check:?}");
    }
}

/// `make cutover-bench` runs this with the release binary and more rounds.
#[tokio::test(flavor = "multi_thread")]
async fn clients_of_pgbouncer_notice_next_to_nothing_at_500_transactions_a_second() {
    let ends = Ends::start(15, 15);
    create_schema(&ends.source_uri(), 1).await.unwrap();
    let pooler = PgBouncer::start(&ends.source, &["app"]).unwrap();
    let options =
        Options { tx_per_second: Some(500.0), connections: 16, ..Options::new(&pooler.uri("app")) };
    let writer = Writer::start(options).await.unwrap();
    let mut run = ends.spawn(&["run"]);
    ends.until_phase(&mut run, "following").await;
    let mut flips = Vec::new();
    for _ in 0..rounds() {
        flips.push(flip(&ends, &writer, "cutover", &route_of(&pooler)).await);
        flips.push(flip(&ends, &writer, "rollback", &route_of(&pooler)).await);
    }
    let report = writer.stop().await;
    assert_exact(&ends, &ends.target_uri(), &ends.source_uri(), &report).await;
    run.signal("INT");
    run.ended().await.expect_success();
    let rate = report.committed as f64 / report.elapsed.as_secs_f64();
    for flip in &flips {
        println!(
            "{:<8} stall {:>6.1} ms, held {:>6.1} ms: {} ({})",
            flip.command,
            flip.stall.as_secs_f64() * 1e3,
            flip.fenced_ms,
            flip.steps,
            flip.statement
        );
    }
    for command in ["cutover", "rollback"] {
        let of = flips.iter().filter(|flip| flip.command == command).map(|flip| flip.stall);
        let median = median(of.collect());
        println!("{command}: median of {} rounds {:.1} ms", rounds(), median.as_secs_f64() * 1e3);
        assert!(median < bar(), "{command}: {median:?}");
    }
    println!("{rate:.0} transactions a second, p99 of statements {:?}", report.stall_p99);
    assert_eq!((report.failed_statements, report.failed_connects), (0, 0), "{:?}", report.errors);
}
