//! The fence delays the cutover, never the application.

use std::time::Duration;

use walferry::demo::pgbouncer::PgBouncer;
use walferry::demo::writer::{Options, Writer, create_schema};

use super::{Ends, Stage, session};
use crate::support::job::route_of;

/// The default of --lock-timeout, and what a busy machine may add.
const LONGEST: Duration = Duration::from_millis(200 + 200);

/// One writer sits in a transaction; the others never wait longer than the lock timeout.
async fn one_sits_in_a_transaction(through: Option<PgBouncer>, ends: Ends) {
    let route = through.as_ref().map(route_of);
    let uri = through.as_ref().map_or(ends.source_uri(), |pooler| pooler.uri("app"));
    let mut run = ends.spawn(&["run"]);
    ends.until_phase(&mut run, "following").await;
    let options = Options { tx_per_second: Some(200.0), ..Options::new(&uri) };
    let writer = Writer::start(options).await.unwrap();
    let mut sitting = session(&uri).await;
    let begun = "begin; insert into public.side values (1, 'sitting')";
    sitting.execute(begun).await.unwrap();
    let with_route = |arguments: &[&str]| -> Vec<String> {
        let route = route.iter().flat_map(|route| ["--route".to_string(), route.clone()]);
        arguments.iter().map(|a| a.to_string()).chain(route).collect()
    };
    let cutover = async |arguments: &[&str]| {
        let arguments = with_route(arguments);
        ends.walferry(&arguments.iter().map(String::as_str).collect::<Vec<_>>()).await
    };
    assert!(writer.committed_more(20).await, "the writer is stuck");
    writer.reset_stalls();

    let ended = cutover(&["cutover", "--timeout", "1500ms"]).await;
    assert_eq!(ended.code, Some(1), "{ended:?}");
    for part in ["could not stop writers", "pid ", "(postgres, ", "insert into public.side"] {
        assert!(ended.err.contains(part), "{part}: {}", ended.err);
    }
    assert_eq!(ends.status().await["phase"], "following");
    assert!(writer.committed_more(20).await, "the writer is stuck");
    let report = writer.report_now();
    assert_eq!(report.failed_statements, 0, "{:?}", report.errors);
    let longest = (report.longest_stall, report.longest_stall_statement);
    assert!(longest.0 < LONGEST, "{longest:?}");

    let line = journalled(&ends);
    let (ended, ()) = tokio::join!(cutover(&["cutover", "--json"]), async {
        until_fencing(&ends, &line).await;
        assert!(writer.committed_more(100).await, "the writer is stuck");
        sitting.execute("commit").await.unwrap();
    });
    let outcome = ended.expect_success().json();
    assert!(outcome["retries"].as_u64().unwrap() > 0, "{outcome}");
    let rows = ends.target.psql("app", "select count(*) from public.side").unwrap();
    assert_eq!(rows, "1", "committed before the barrier");
    if through.is_some() {
        assert!(writer.committed_more(20).await, "the writer is stuck");
        let report = writer.stop().await;
        assert_eq!(report.failed_statements, 0, "{:?}", report.errors);
        let longest = (report.longest_stall, report.longest_stall_statement);
        assert!(longest.0 < LONGEST, "{longest:?}");
        println!("longest stall through pgbouncer {:?}", longest.0);
    } else {
        println!("longest stall {:?}", longest.0);
    }
    run.signal("INT");
    run.ended().await.expect_success();
}

/// The newest line of the journal.
fn journalled(ends: &Ends) -> String {
    let sql = "select coalesce(max(id), 0) from walferry.journal";
    ends.target.psql("app", sql).unwrap()
}

/// Waits until an attempt that began after that line is trying to stop writers.
async fn until_fencing(ends: &Ends, line: &str) {
    let mut home = session(&ends.target_uri()).await;
    let sql = format!(
        "select exists (select 1 from walferry.journal where id > {line} and step = 'fence')"
    );
    crate::support::until_sql(&mut home, &sql).await;
}

async fn ends() -> Ends {
    let ends = Ends::start(15, 15);
    create_schema(&ends.source_uri(), 1).await.unwrap();
    ends.source.psql("app", "create table public.side (id int primary key, v text)").unwrap();
    ends
}

#[tokio::test(flavor = "multi_thread")]
async fn an_open_transaction_delays_the_cutover_and_no_statement_of_others() {
    one_sits_in_a_transaction(None, ends().await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_open_transaction_behind_pgbouncer_delays_nobody_else() {
    let ends = ends().await;
    let pooler = PgBouncer::start(&ends.source, &["app"]).unwrap();
    one_sits_in_a_transaction(Some(pooler), ends).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn maintenance_delays_the_cutover_and_readers_are_not_disturbed() {
    let stage = Stage::start().await;
    let ends = &stage.ends;
    let mut maintenance = session(&ends.source_uri()).await;
    // ANALYZE holds SHARE UPDATE EXCLUSIVE until its transaction ends.
    maintenance.execute("begin; analyze public.side").await.unwrap();
    let ended = ends.walferry(&["cutover", "--timeout", "600ms"]).await;
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(ended.err.contains("analyze public.side"), "{}", ended.err);
    let mut reader = session(&ends.source_uri()).await;
    reader.execute("begin isolation level repeatable read").await.unwrap();
    reader.query("select * from public.t, public.side").await.unwrap();
    let mut long = session(&ends.source_uri()).await;
    let line = journalled(ends);
    let reading = long.query("select count(*), pg_catalog.pg_sleep(2) from public.t");
    let (read, ()) = tokio::join!(reading, async {
        let (ended, ()) = tokio::join!(ends.done(&["cutover", "--json"]), async {
            until_fencing(ends, &line).await;
            maintenance.execute("commit").await.unwrap();
        });
        assert!(ended.json()["fenced_ms"].as_f64().unwrap() < 2000.0);
    });
    assert_eq!(read.unwrap()[0].str(0).unwrap(), "0");
    reader.query("select * from public.t, public.side").await.unwrap();
    reader.execute("commit").await.unwrap();
    stage.end().await;
}

/// Holding clients and locking tables have their time each.
#[tokio::test(flavor = "multi_thread")]
async fn a_hook_that_takes_longer_than_the_lock_timeout_leaves_time_for_locks() {
    let stage = Stage::start().await;
    let route = "hook:if [ $WALFERRY_PHASE = hold ]; then sleep 0.3; fi";
    stage.ends.done(&["cutover", "--timeout", "5s", "--route", route]).await;
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cutover_that_nothing_would_stop_writers_for_is_refused() {
    let stage = Stage::start().await;
    let ended = stage.ends.walferry(&["cutover", "--fence", "none"]).await;
    assert!(ended.code != Some(0) && ended.err.contains("add --route"), "{ended:?}");
    assert_eq!(stage.phase().await, "following");
    stage.end().await;
}

/// A pooler may be paused meanwhile: another job at the same notes must not be waited for.
#[tokio::test(flavor = "multi_thread")]
async fn a_read_only_fence_does_not_wait_for_another_job_for_ever() {
    let stage = Stage::start().await;
    let mut other = session(&stage.ends.source_uri()).await;
    other.execute("begin; lock table walferry.read_only in exclusive mode").await.unwrap();
    let cutover = stage.ends.walferry(&["cutover", "--fence", "read-only", "--timeout", "1s"]);
    let ended = tokio::time::timeout(Duration::from_secs(60), cutover).await.expect("it hangs");
    assert!(ended.err.contains("could not stop writers"), "{ended:?}");
    assert_eq!(stage.phase().await, "following");
    other.execute("rollback").await.unwrap();
    stage.ends.done(&["cutover", "--fence", "read-only"]).await;
    stage.end().await;
}
