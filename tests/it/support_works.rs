//! Tests of what the other tests stand on.

use std::time::{Duration, Instant};

use tokio::time::timeout;
use walferry::demo::compare::{self, compare};
use walferry::demo::pgbouncer::PgBouncer;
use walferry::demo::proxy::Proxy;
use walferry::demo::server::{Server, StopMode};
use walferry::demo::writer::{self, Writer};
use walferry::demo::{binaries, ledger};
use walferry::pg::{Config, Purpose, Session};

use crate::support::{self, Inventory, Walferry, until};

#[tokio::test]
async fn a_server_survives_stops_and_kills_on_the_same_port() {
    let server = support::server();
    let port = server.port();
    server.psql("postgres", "create table t as select 1 as a; checkpoint").unwrap();
    for how in ["fast", "immediate", "kill9"] {
        match how {
            "fast" => server.stop(StopMode::Fast).unwrap(),
            "immediate" => server.stop(StopMode::Immediate).unwrap(),
            _ => server.kill9().unwrap(),
        }
        assert!(server.pid().is_none() && server.psql("postgres", "select 1").is_err(), "{how}");
        server.resume().unwrap();
        assert_eq!(server.psql("postgres", "select count(*) from t").unwrap(), "1", "{how}");
    }
    assert_eq!(server.port(), port);
}

#[tokio::test]
async fn two_servers_have_different_system_identifiers() {
    let (one, two) = (support::server(), support::server());
    let ask = "select system_identifier from pg_control_system()";
    assert_ne!(one.psql("postgres", ask).unwrap(), two.psql("postgres", ask).unwrap());
}

#[tokio::test]
async fn every_installed_major_starts_and_takes_the_writer() {
    let installed = (10..=18).filter(|major| binaries::is_installed(*major));
    futures_util::future::join_all(installed.map(starts_and_takes_the_writer)).await;
}

async fn starts_and_takes_the_writer(major: u32) {
    let settings = ["fsync = on", "synchronous_commit = off"];
    let server = Server::start(&Server::bin_of(major).unwrap(), &settings).unwrap();
    let mut session = support::session(&server, "postgres").await;
    assert_eq!(session.major_version(), major);
    let row = session.query_one("show fsync", &[]).await.unwrap();
    assert_eq!(row.str(0).unwrap(), "on");
    let uri = server.uri("postgres");
    writer::create_schema(&uri, 1).await.unwrap();
    let writer = Writer::start(writer::Options::new(&uri)).await.unwrap();
    assert!(writer.committed_more(300).await);
    let report = writer.stop().await;
    assert_eq!(report.errors, Default::default(), "PostgreSQL {major}");
    let inventory = Inventory::take(&uri).await;
    assert_eq!(inventory.diff(&Inventory::take(&uri).await), Vec::<String>::new());
}

#[tokio::test]
async fn a_standby_follows_its_primary() {
    let server = support::server();
    let standby = server.standby(&[]).unwrap();
    assert_eq!(standby.psql("postgres", "select pg_is_in_recovery()").unwrap(), "t");
}

#[test]
fn a_dropped_server_leaves_nothing() {
    let server = support::server();
    let (dir, pid) = (server.dir().to_path_buf(), server.pid().unwrap());
    drop(server);
    assert!(!dir.exists());
    assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists());
}

/// Not a test by itself: what the next one runs and kills.
#[test]
#[ignore = "run by no_server_outlives_a_killed_process"]
fn holds_a_server_until_killed() {
    let server = support::server();
    println!("\nholding {} {}", server.dir().display(), server.pid().unwrap());
    std::thread::sleep(std::time::Duration::from_secs(60));
}

#[test]
fn no_server_outlives_a_killed_process() {
    use std::io::{BufRead, BufReader};
    let mut child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "--nocapture", "support_works::holds_a_server_until_killed"])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
    let line = lines.into_iter().find(|l| l.starts_with("holding ")).unwrap();
    let words: Vec<&str> = line.split(' ').collect();
    child.kill().unwrap();
    child.wait().unwrap();
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    let gone = || {
        let cmdline = std::fs::read(format!("/proc/{}/cmdline", words[2])).unwrap_or_default();
        cmdline.is_empty() && !std::path::Path::new(words[1]).exists()
    };
    while !gone() {
        assert!(std::time::Instant::now() < deadline, "{line}: still there");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

#[tokio::test]
async fn the_writer_fails_nothing_and_knows_what_it_did() {
    let server = support::server();
    let uri = server.uri("postgres");
    writer::create_schema(&uri, 1).await.unwrap();
    let writer = Writer::start(writer::Options::new(&uri)).await.unwrap();
    assert!(writer.committed_more(3000).await);
    let report = writer.stop().await;
    println!("{report:?}");
    assert_eq!(report.errors, Default::default());
    assert_eq!((report.failed_statements, report.unknown), (0, 0));
    assert_eq!(report.kinds.len(), 13, "{:?}", report.kinds);
    assert_eq!(report.ledger.acknowledged(), report.committed);
    let verdict = ledger::check(&uri, &report.ledger).await.unwrap();
    assert!(verdict.is_exact() && verdict.found == report.committed, "{verdict:?}");
    assert_eq!(writer::broken_invariants(&uri).await.unwrap(), Vec::<String>::new());

    // The checks can fail.
    server
        .psql(
            "postgres",
            "delete from bank.ledger where writer = 1 and seq = 1 + (select min(seq) from bank.ledger \
             where writer = 1 and seq > 10); \
             insert into bank.ledger select * from bank.ledger where writer = 2 order by seq limit 1; \
             insert into bank.ledger values (1, 1000000, 'x'); \
             update bank.tellers set tbalance = tbalance + 1 where tid = 3",
        )
        .unwrap();
    let verdict = ledger::check(&uri, &report.ledger).await.unwrap();
    assert_eq!((verdict.duplicated.len(), verdict.phantom.len()), (1, 1), "{verdict:?}");
    assert_eq!(writer::broken_invariants(&uri).await.unwrap().len(), 1);
}

#[tokio::test]
async fn the_comparison_names_what_differs() {
    let server = support::server();
    let (one, two) = (server.uri("one"), server.uri("two"));
    server.psql("postgres", "create database one").unwrap();
    writer::create_schema(&one, 1).await.unwrap();
    server.psql("one", "select nextval('shop.ticket')").unwrap();
    server.psql("postgres", "create database two template one").unwrap();
    let same = compare(&one, &two).await.unwrap();
    assert!(same.is_equal(), "{same:?}");
    assert!(same.rows() > 20_000 && same.tables.len() == 16, "{same:?}");
    assert_eq!(compare::schema_differences(&one, &two).unwrap(), Vec::<String>::new());

    let changes = [
        (
            "update bank.accounts set filler = 'x' where aid = 77",
            "accounts: on the source only: (77,",
        ),
        ("delete from shop.events where id = 8", "events_north: 1000 rows became 999"),
        ("insert into shop.audit select * from shop.audit limit 1", "audit: 1000 rows became 1001"),
        (
            "update shop.documents set body = body || ' ' where id = 5",
            "documents: on the target only",
        ),
        ("select setval('shop.ticket', 5)", "sequence shop.ticket"),
        ("create table shop.more (a int)", "shop.more: on the target only"),
        ("alter table shop.stock alter qty type bigint", "shop.stock: columns"),
        ("drop table shop.scratch", "shop.scratch: not on the target"),
    ];
    // Further on is no difference.
    server.psql("two", "select setval('shop.countdown', -1)").unwrap();
    for (sql, _) in changes {
        server.psql("two", sql).unwrap();
    }
    let found = compare(&one, &two).await.unwrap();
    for (sql, said) in changes {
        assert!(found.differences.iter().any(|d| d.contains(said)), "{sql}: {found:?}");
    }
    assert!(!found.differences.iter().any(|d| d.contains("countdown")), "{found:?}");
    assert_eq!(found.tables.iter().filter(|(_, _, equal)| !equal).count(), 7);
    assert!(!compare::schema_differences(&one, &two).unwrap().is_empty());
}

#[tokio::test]
async fn a_proxy_cuts_stalls_delays_and_throttles() {
    let server = support::server();
    let proxy = Proxy::start(server.port()).unwrap();
    let config = Config::parse(&proxy.uri(&server.uri("postgres"))).unwrap();
    let connect = || async { Session::connect(&config, Purpose::Sql).await };
    let quick = Duration::from_millis(300);

    let mut session = connect().await.unwrap();
    proxy.delay(Duration::from_millis(60));
    let begun = Instant::now();
    session.query("select 1").await.unwrap();
    assert!(begun.elapsed() >= Duration::from_millis(60));

    proxy.restore();
    proxy.throttle(100_000);
    let begun = Instant::now();
    session.query("select repeat('x', 50000)").await.unwrap();
    assert!(begun.elapsed() >= Duration::from_millis(300), "{:?}", begun.elapsed());
    assert!(proxy.bytes_from_server() > 50_000 && proxy.bytes_to_server() > 20);

    proxy.restore();
    proxy.stall();
    let mut answer = Box::pin(session.query("select 2"));
    assert!(timeout(quick, &mut answer).await.is_err());
    proxy.restore();
    assert_eq!(answer.await.unwrap()[0].str(0).unwrap(), "2");

    proxy.cut_silently();
    assert!(timeout(quick, connect()).await.is_err());
    proxy.restore();
    assert!(timeout(quick, session.query("select 3")).await.is_err());

    let mut session = connect().await.unwrap();
    proxy.cut();
    assert!(session.query("select 4").await.unwrap_err().is_closed());
    let refused = connect().await.unwrap_err();
    assert!(refused.to_string().contains("refused"), "{refused}");
    proxy.restore();
    until("the proxy listens again", || async { connect().await.is_ok() }).await;
    assert!(proxy.connections() >= 4);
}

#[tokio::test]
async fn the_writer_works_through_a_pooler_and_sees_its_pauses() {
    let server = support::server();
    writer::create_schema(&server.uri("postgres"), 1).await.unwrap();
    let bouncer = PgBouncer::start(&server, &["postgres"]).unwrap();
    let admin = Config::parse(&bouncer.admin_uri()).unwrap();
    let mut admin = Session::connect(&admin, Purpose::PoolerAdmin).await.unwrap();
    let options = writer::Options {
        tx_per_second: Some(500.0),
        connections: 8,
        ..writer::Options::new(&bouncer.uri("postgres"))
    };
    let writer = Writer::start(options).await.unwrap();
    assert!(writer.committed_more(200).await);
    admin.execute("pause postgres").await.unwrap();
    tokio::time::sleep(Duration::from_millis(1500)).await;
    admin.execute("resume postgres").await.unwrap();
    assert!(writer.committed_more(200).await);
    let report = writer.report_now();
    assert!(report.longest_stall >= Duration::from_millis(1490), "{report:?}");
    writer.reset_stalls();
    assert!(writer.committed_more(100).await);
    let report = writer.stop().await;
    assert!(report.longest_stall < Duration::from_millis(1490), "{report:?}");
    assert_eq!((report.errors, report.unknown), (Default::default(), 0));
}

#[tokio::test]
async fn the_writer_lives_through_crashes_and_moves_and_loses_nothing() {
    let server = support::server();
    let uri = server.uri("postgres");
    writer::create_schema(&uri, 1).await.unwrap();
    let proxy = Proxy::start(server.port()).unwrap();
    let writer = Writer::start(writer::Options::new(&proxy.uri(&uri))).await.unwrap();
    assert!(writer.committed_more(100).await);
    proxy.cut();
    until("connections fail", || async { writer.report_now().failed_connects > 3 }).await;
    proxy.restore();
    assert!(writer.committed_more(100).await);
    server.kill9().unwrap();
    server.resume().unwrap();
    assert!(writer.committed_more(100).await);
    writer.set_uri(&uri).unwrap();
    proxy.cut();
    assert!(writer.committed_more(100).await);

    writer.pause().await;
    let paused = writer.report_now();
    let verdict = ledger::check(&uri, &paused.ledger).await.unwrap();
    assert!(verdict.is_exact() && verdict.found == paused.committed, "{verdict:?}");
    assert_eq!(writer.report_now().committed, paused.committed);
    writer.resume();
    assert!(writer.committed_more(10).await);
    let report = writer.stop().await;
    assert!(report.failed_statements > 0 && report.errors.contains_key("connection lost"));
    let verdict = ledger::check(&uri, &report.ledger).await.unwrap();
    assert!(verdict.is_exact() && verdict.found == report.committed, "{verdict:?}");
    assert_eq!(writer::broken_invariants(&uri).await.unwrap(), Vec::<String>::new());
}

#[tokio::test]
async fn the_inventory_sees_what_a_job_could_leave() {
    let server = support::server();
    let uri = server.uri("postgres");
    writer::create_schema(&uri, 0).await.unwrap();
    let before = Inventory::take(&uri).await;
    assert_eq!(before.diff(&Inventory::take(&uri).await), Vec::<String>::new());
    let mut session = support::session(&server, "postgres").await;
    let changes = [
        (
            "select pg_create_logical_replication_slot('walferry_x', 'pgoutput')",
            "+ slot walferry_x",
        ),
        (
            "create publication walferry_x for table shop.orders",
            "+ published walferry_x shop orders",
        ),
        ("select pg_replication_origin_create('walferry_x')", "+ origin walferry_x"),
        ("create schema walferry; create table walferry.t ()", "+ relation walferry.t"),
        ("alter table shop.stock replica identity full", "+ relation shop.stock r identity f p"),
        ("alter table shop.orders disable trigger log_order", "+ trigger shop.orders log_order D"),
        ("create role walferry_r", "+ role walferry_r"),
        ("alter database postgres set default_transaction_read_only = on", "+ setting postgres"),
        ("revoke insert on shop.stock from postgres", "+ relation shop.stock"),
        ("alter system set work_mem = '5MB'", "+ file setting work_mem"),
        ("select pg_advisory_lock(7, 8)", "+ advisory lock 7 8"),
    ];
    for (sql, _) in changes {
        session.execute(sql).await.unwrap();
    }
    let diff = before.diff(&Inventory::take(&uri).await);
    for (sql, seen) in changes {
        assert!(diff.iter().any(|d| d.starts_with(seen)), "{sql}: {diff:#?}");
    }
}

#[tokio::test]
async fn the_binary_runs_and_its_end_is_seen() {
    let ended = Walferry::run(&[]).await;
    assert!(ended.code.is_some(), "{ended:?}");
}
