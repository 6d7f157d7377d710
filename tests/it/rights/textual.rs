//! A managed cloud's role without any publication: slots and SELECT, by the textual decoders.

use std::time::Duration;

use walferry::demo::pgbouncer::PgBouncer;
use walferry::demo::server::Server;
use walferry::demo::writer::{Options, Report, Writer};

use super::{moved_on, roles};
use crate::support::job::{Ends, route_of};
use crate::support::{Inventory, Walferry};

/// What is asked for with each command. Debian's wal2json is 2.5, which cannot tell the NaN that
/// the writer writes into schema shop.
fn asked(decoder: &'static str, transport: &'static str) -> Vec<&'static str> {
    let mut asked = vec!["--decoder", decoder, "--transport", transport];
    if decoder == "wal2json" {
        asked.extend(["--no-nan", "--include=bank.*"]);
    }
    asked
}

fn with(command: &[&'static str], asked: &[&'static str]) -> Vec<&'static str> {
    [command, asked].concat()
}

/// Nothing of walferry's is on the source but its slot.
fn source_is_bare(ends: &Ends) {
    let sql = "select (select count(*) from pg_namespace where nspname = 'walferry'), \
        (select count(*) from pg_publication), (select count(*) from pg_replication_slots)";
    assert_eq!(ends.source.psql("app", sql).unwrap(), "0|0|1");
}

/// Follows and is verified with SELECT and slots only; then what check printed is granted, and
/// nothing else. Gives what is on the source then, while the job
/// runs.
async fn follow(ends: &Ends, asked: &[&'static str], writer: &Writer) -> (Walferry, Inventory) {
    assert_eq!(roles::printed_by(ends, asked, &["error"], &[]).await, []);
    let codes = ["schema-right", "write-right"];
    let needed = roles::printed_by(ends, asked, &["warning"], &codes).await;
    let mut run = ends.spawn(&with(&["run", "--no-owner"], asked));
    ends.until_phase(&mut run, "following").await;
    source_is_bare(ends);
    assert!(writer.committed_more(50).await, "the writer is stuck");
    ends.done(&with(&["verify"], asked)).await;
    source_is_bare(ends);
    let refused =
        ends.walferry(&with(&["cutover", "--fence", "none", "--route", "hook:true"], asked)).await;
    assert_eq!(refused.code, Some(1));
    assert_eq!(needed.len(), 2, "{needed:?}");
    for (_, fix) in &needed {
        for line in fix.lines() {
            assert!(refused.err.contains(line), "{line}: {refused:?}");
        }
    }
    roles::grant(ends, &needed);
    (run, Inventory::now(&ends.source_uri()).await)
}

/// Of a job of these options.
async fn assert_exact(ends: &Ends, asked: &[&str], reports: &[&Report]) {
    let part = if asked.contains(&"--include=bank.*") { "bank." } else { "" };
    ends.assert_exact_in(part, reports).await;
}

/// A transaction of more changes than any chunk has, written on the target by applications and
/// brought to the source by the way back in a transaction with a marker: it must not come again,
/// whole or in part.
async fn nothing_loops(ends: &Ends) {
    let rows = 30_000;
    let insert = format!(
        "insert into bank.accounts (aid, bid, abalance) \
         select 5000000 + i, 1, 0 from generate_series(1, {rows}) i"
    );
    ends.target.psql("app", &insert).unwrap();
    let count = "select count(*) from bank.accounts where aid > 5000000";
    for _ in 0..300 {
        if ends.source.psql("app", count).unwrap() == rows.to_string() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(ends.source.psql("app", count).unwrap(), rows.to_string());
    let before = applied_forward(ends).await;
    ends.target.psql("app", "delete from bank.accounts where aid > 5000000").unwrap();
    for _ in 0..300 {
        if ends.source.psql("app", count).unwrap() == "0" {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(ends.source.psql("app", count).unwrap(), "0");
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(applied_forward(ends).await, before, "what the way back wrote came again");
}

/// Changes of bank.accounts that the forward stream has applied, and those it has filtered are more
/// than the large transaction has.
async fn applied_forward(ends: &Ends) -> i64 {
    let status = ends.status().await;
    let tables = status["tables"].as_array().unwrap().clone();
    let accounts = tables
        .iter()
        .find(|table| table["name"] == "bank.accounts" || table["table"] == "bank.accounts");
    accounts.unwrap_or_else(|| panic!("{status}"))["applied"].as_i64().unwrap()
}

async fn ended(ends: &Ends, asked: &[&'static str], run: Walferry, before: &Inventory) {
    ends.done(&with(&["finish"], asked)).await;
    run.ended().await.expect_success();
    let after = Inventory::take(&ends.source_uri()).await;
    let ours = ["- session walferry", "- slot walferry_main_forward"];
    let changed = before.diff(&after).into_iter();
    let changed: Vec<_> = changed.filter(|l| !ours.iter().any(|o| l.starts_with(o))).collect();
    assert_eq!(changed, Vec::<String>::new());
    let left = "select count(*) from pg_replication_slots";
    for server in [&ends.source, &ends.target] {
        assert_eq!(server.psql("app", left).unwrap(), "0");
    }
    let left = "select count(*) from pg_namespace where nspname = 'walferry'";
    assert_eq!(ends.target.psql("app", left).unwrap(), "0");
}

/// With everything, over a pooler that holds clients, under one writer that notices nothing; so many
/// times there and back.
async fn all_by_test_decoding(ends: Ends, transport: &'static str, times: usize) {
    let asked = asked("test_decoding", transport);
    let pooler = PgBouncer::start(&ends.source, &["app"]).unwrap();
    let options = Options { tx_per_second: Some(100.0), ..Options::new(&pooler.uri("app")) };
    let writer = Writer::start(options).await.unwrap();
    let (run, before) = follow(&ends, &asked, &writer).await;
    for round in 0..times {
        for command in ["cutover", "rollback"] {
            moved_on(&writer).await;
            let route = route_of(&pooler);
            ends.done(&[&*asked, &[command, "--fence", "none", "--route", &route]].concat()).await;
            moved_on(&writer).await;
            ends.done(&with(&["verify"], &asked)).await;
            if round == 0 && command == "cutover" {
                nothing_loops(&ends).await;
            }
        }
    }
    let report = writer.stop().await;
    assert_eq!((report.failed_statements, report.failed_connects), (0, 0), "{:?}", report.errors);
    ends.done(&with(&["verify"], &asked)).await;
    assert_exact(&ends, &asked, &[&report]).await;
    ended(&ends, &asked, run, &before).await;
}

/// Schema bank only, whose writers stop for the switch.
async fn bank_by_wal2json(ends: Ends, transport: &'static str) {
    let asked = asked("wal2json", transport);
    let owner = ends.source.uri_as("owner", "app");
    let first = crate::job::writer(&owner, 100.0, 1).await;
    let (run, before) = follow(&ends, &asked, &first).await;
    let first = first.stop().await;
    ends.done(&with(&["cutover", "--fence", "none", "--route", "hook:true"], &asked)).await;
    nothing_loops(&ends).await;
    for i in 0..50 {
        let sql = format!("update bank.accounts set abalance = abalance + {i} where aid = {i} + 1");
        ends.target.psql("app", &sql).unwrap();
    }
    ends.done(&with(&["verify"], &asked)).await;
    ends.done(&with(&["rollback", "--fence", "none", "--route", "hook:true"], &asked)).await;
    let second = crate::job::writer(&owner, 100.0, 100).await;
    assert!(second.committed_more(50).await, "the writer is stuck");
    ends.done(&with(&["verify"], &asked)).await;
    let second = second.stop().await;
    ends.done(&with(&["verify"], &asked)).await;
    assert_exact(&ends, &asked, &[&first, &second]).await;
    ended(&ends, &asked, run, &before).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_role_with_slots_and_select_moves_a_database_by_test_decoding_and_stream() {
    all_by_test_decoding(roles::managed((15, 15)).await, "stream", 2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_role_with_slots_and_select_moves_a_database_by_wal2json_and_stream() {
    bank_by_wal2json(roles::managed((15, 15)).await, "stream").await;
}

/// No replication connection is let in by either server, for anybody: they have no place for one.
async fn no_walsender() -> Ends {
    let bin = Server::bin_of(15).unwrap();
    let start = || Server::start(&bin, &["max_wal_senders=0"]).unwrap();
    roles::managed_of(Ends::of(start(), start())).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_moves_by_test_decoding_where_no_replication_connection_is_let_in() {
    all_by_test_decoding(no_walsender().await, "auto", 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_moves_by_wal2json_where_no_replication_connection_is_let_in() {
    bank_by_wal2json(no_walsender().await, "auto").await;
}
