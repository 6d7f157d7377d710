//! An idle database pins no WAL, and its lag is measured all the same.

use std::process::Command;
use std::time::{Duration, Instant};

use walferry::demo::server::Server;

use crate::support::job::Ends;
use crate::support::{Walferry, session, until_within};

/// What the slot may keep of the source's WAL.
const RETAINED_MAX: i64 = 64 << 20;

const RETAINED: &str = "select pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn)::int8 \
    from pg_replication_slots where slot_name = 'walferry_main_forward'";

fn idle(majors: (u32, u32)) -> Ends {
    let ends = Ends::start(majors.0, majors.1);
    ends.source.psql("app", "create table item (id int primary key, note text)").unwrap();
    ends.source.psql("app", "insert into item values (1, 'a')").unwrap();
    ends
}

async fn following(ends: &Ends, arguments: &[&str]) -> Walferry {
    let mut run = ends.spawn(&[&["run"], arguments].concat());
    ends.until_phase(&mut run, "following").await;
    run
}

async fn stop(run: Walferry) {
    run.signal("INT");
    run.ended().await.expect_success();
}

fn retained(server: &Server) -> i64 {
    server.psql("app", RETAINED).unwrap().parse().unwrap()
}

async fn lag_seconds(ends: &Ends) -> f64 {
    ends.status().await["lag_seconds"].as_f64().unwrap_or(0.0)
}

/// A tenth of what was written is more than a round trip and a checkpoint, and less than the bar.
async fn keeps_little(server: &Server) {
    until_within(Duration::from_secs(20), "the slot lets WAL go", async || {
        retained(server) < RETAINED_MAX / 4
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_database_beside_a_busy_one_pins_no_wal_and_its_lag_is_measured() {
    let ends = idle((15, 15));
    let run = following(&ends, &["--heartbeat", "200ms"]).await;
    ends.source.psql("postgres", "create database busy").unwrap();
    ends.source.psql("busy", "create table noise (n int, v text)").unwrap();
    let from = ends.source.psql("app", "select pg_current_wal_lsn()").unwrap();
    for _ in 0..6 {
        let noise = "insert into noise select i, repeat(md5(i::text), 5) \
                     from generate_series(1, 100000) i";
        ends.source.psql("busy", noise).unwrap();
        ends.source.psql("busy", "checkpoint").unwrap();
        keeps_little(&ends.source).await;
    }
    let written = format!("select pg_wal_lsn_diff(pg_current_wal_lsn(), '{from}') > 100000000");
    assert_eq!(ends.source.psql("app", &written).unwrap(), "t");

    // Level, and the way open: what a beat takes. Stuck, it is what the oldest has been waiting.
    until_within(Duration::from_secs(20), "a beat", async || {
        let lag = lag_seconds(&ends).await;
        lag > 0.0 && lag < 1.5
    })
    .await;
    let mut target = session(&ends.target, "app").await;
    target.execute("begin; lock table walferry.progress in exclusive mode").await.unwrap();
    until_within(Duration::from_secs(20), "a lag", async || lag_seconds(&ends).await > 2.0).await;
    target.execute("rollback").await.unwrap();
    until_within(Duration::from_secs(20), "none", async || lag_seconds(&ends).await < 1.5).await;
    stop(run).await;
}

/// PostgreSQL 10 shows no messages by pgoutput.
#[tokio::test(flavor = "multi_thread")]
async fn where_messages_are_not_shown_a_row_beats_and_any_statement_may() {
    let ends = idle((10, 15));
    let run = following(&ends, &["--heartbeat", "200ms"]).await;
    let token = "select token from walferry.canary_main where leg = 'heartbeat'";
    let beat = async |last: &str| {
        until_within(Duration::from_secs(20), "another beat", async || {
            let token = ends.target.psql("app", token).unwrap();
            !token.is_empty() && token != last
        })
        .await;
        ends.target.psql("app", token).unwrap()
    };
    let first = beat("").await;
    beat(&first).await;
    stop(run).await;

    let sql = "update public.item set note = clock_timestamp()::text where id = 1";
    let run = following(&ends, &["--heartbeat-sql", sql]).await;
    let arrived = "select note <> 'a' from item where id = 1";
    until_within(Duration::from_secs(20), "the statement's row", async || {
        ends.target.psql("app", arrived).unwrap() == "t"
    })
    .await;
    stop(run).await;
    for short in ["1ms", "soon"] {
        let refused = ends.walferry(&["run", "--heartbeat", short]).await;
        assert_eq!(refused.code, Some(2), "{refused:?}");
    }
}

/// The bar of ten minutes, `make heartbeat`: pgbench beside an idle database.
#[ignore = "ten minutes"]
#[tokio::test(flavor = "multi_thread")]
async fn an_idle_database_beside_pgbench_pins_no_wal() {
    let seconds = std::env::var("WALFERRY_HEARTBEAT").unwrap_or("600".to_string());
    let ends = idle((15, 15));
    let run = following(&ends, &[]).await;
    ends.source.psql("postgres", "create database busy").unwrap();
    let uri = ends.source.uri("busy");
    let pgbench = ends.source.bin_dir().join("pgbench");
    let made = Command::new(&pgbench).args(["-i", "-q", "-s", "10", &uri]).output().unwrap();
    assert!(made.status.success(), "{made:?}");
    let arguments = ["-n", "-c", "4", "-T", &seconds, &uri];
    let mut bench = Command::new(&pgbench).args(arguments).spawn().unwrap();
    let (begun, mut most) = (Instant::now(), 0);
    while bench.try_wait().unwrap().is_none() {
        most = most.max(retained(&ends.source));
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
    println!("{:?} of pgbench, at most {most} bytes of WAL retained", begun.elapsed());
    assert!(most < RETAINED_MAX, "{most}");
    stop(run).await;
}
