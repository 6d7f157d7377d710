//! An idle database pins no WAL, and its lag is measured all the same.

use std::process::Command;
use std::time::{Duration, Instant};

use walferry::demo::server::Server;
use walferry::source::nudge::{Nudge, Nudged};

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

/// Less than a third of the bar, and more than a step and what comes meanwhile.
async fn keeps_little(server: &Server) {
    until_within(Duration::from_secs(20), "the slot lets WAL go", async || {
        retained(server) < RETAINED_MAX / 3
    })
    .await;
}

/// What another database of the same server writes; 17 MB.
const NOISE: &str = "insert into noise select i, repeat(md5(i::text), 5) \
    from generate_series(1, 100000) i";

/// Two records of running transactions take a server half a minute by itself, so six times in one
/// minute is ours.
async fn pins_no_wal(ends: &Ends) {
    ends.source.psql("postgres", "create database busy").unwrap();
    ends.source.psql("busy", "create table noise (n int, v text)").unwrap();
    let from = ends.source.psql("app", "select pg_current_wal_lsn()").unwrap();
    let begun = Instant::now();
    for _ in 0..6 {
        ends.source.psql("busy", NOISE).unwrap();
        keeps_little(&ends.source).await;
    }
    assert!(begun.elapsed() < Duration::from_secs(60), "{:?}", begun.elapsed());
    let written = format!("select pg_wal_lsn_diff(pg_current_wal_lsn(), '{from}') > 100000000");
    assert_eq!(ends.source.psql("app", &written).unwrap(), "t");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_database_beside_a_busy_one_pins_no_wal_and_its_lag_is_measured() {
    let ends = idle((15, 15));
    let run = following(&ends, &["--heartbeat", "200ms"]).await;
    pins_no_wal(&ends).await;

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
    let major = std::env::var("WALFERRY_MAJOR").map_or(15, |major| major.parse().unwrap());
    let ends = idle((major, major));
    ends.source.psql("postgres", "create database busy").unwrap();
    let uri = ends.source.uri("busy");
    let pgbench = Server::default_bin().unwrap().join("pgbench");
    let made = Command::new(&pgbench).args(["-i", "-q", "-s", "10", &uri]).output().unwrap();
    assert!(made.status.success(), "{made:?}");
    // Its tables are there before: making them writes twice the bar within a second or two.
    let run = following(&ends, &[]).await;
    let arguments = ["-n", "-c", "4", "-T", &seconds, &uri];
    let mut bench = Command::new(&pgbench).args(arguments).spawn().unwrap();
    let (begun, mut most) = (Instant::now(), 0);
    while bench.try_wait().unwrap().is_none() {
        most = most.max(retained(&ends.source));
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
    println!(
        "PostgreSQL {major}: {:?} of pgbench, at most {most} bytes of WAL retained",
        begun.elapsed()
    );
    assert!(most < RETAINED_MAX, "{most}");
    stop(run).await;
}

/// A slot that its reader is level with, and what is kept for it.
fn level(server: &Server) -> i64 {
    // Twice: a candidate that was found by the first is confirmed by the second.
    for _ in 0..2 {
        server.psql("app", "insert into item values (default)").unwrap();
        let advance = "select pg_replication_slot_advance('kept', pg_current_wal_lsn())";
        server.psql("app", advance).unwrap();
    }
    let sql = RETAINED.replace("walferry_main_forward", "kept");
    server.psql("app", &sql).unwrap().parse().unwrap()
}

/// By the function, by a temporary slot, beside somebody's open transaction, and where neither can
/// be had.
#[tokio::test]
async fn wal_that_is_confirmed_is_let_go_where_the_server_lets_us() {
    for (major, role, may) in
        [(15, "postgres", true), (18, "postgres", true), (18, "mover", true), (15, "bare", false)]
    {
        let server = Server::start(&Server::bin_of(major).unwrap(), &[]).unwrap();
        server.psql("postgres", "create database app").unwrap();
        server
            .psql("postgres", "create role mover login replication; create role bare login")
            .unwrap();
        let made = "create table item (id serial primary key); create table noise (n int, v text)";
        server.psql("app", made).unwrap();
        let slot = "select pg_create_logical_replication_slot('kept', 'pgoutput')";
        server.psql("app", slot).unwrap();
        let mut session = crate::support::session_as(&server, role, "app").await;
        let mut nudge = Nudge::new("kept", "pgoutput");
        assert_eq!(nudge.look(&mut session).await.unwrap(), Nudged::No);
        server.psql("app", NOISE).unwrap();
        level(&server);
        let mut open = crate::support::session(&server, "app").await;
        open.execute("begin; insert into public.item values (default)").await.unwrap();
        let begun = Instant::now();
        let nudged = nudge.look(&mut session).await.unwrap();
        assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
        if !may {
            assert!(matches!(&nudged, Nudged::Refused(why) if why.contains("42501")), "{nudged:?}");
            assert_eq!(nudge.look(&mut session).await.unwrap(), Nudged::No);
            continue;
        }
        assert_eq!(nudged, Nudged::Yes, "{major} {role}");
        assert_eq!(nudge.look(&mut session).await.unwrap(), Nudged::No);
        open.execute("rollback").await.unwrap();
        server.psql("app", NOISE).unwrap();
        level(&server);
        assert_eq!(nudge.look(&mut session).await.unwrap(), Nudged::Yes);
        let kept = level(&server);
        assert!(kept < 1 << 20, "{major} {role}: {kept} bytes are kept");
        let slots = server.psql("app", "select count(*) from pg_replication_slots").unwrap();
        assert_eq!(slots, "1");
    }
}
