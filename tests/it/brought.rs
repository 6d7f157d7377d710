//! `--initial-copy none`: the target is a copy that somebody else made, and the seam between it and
//! the stream is exact.

use std::process::Command;
use std::time::Duration;

use serde_json::Value;
use walferry::demo::compare::compare;
use walferry::demo::pgbouncer::PgBouncer;
use walferry::demo::server::{Server, StopMode};
use walferry::demo::writer::{Options, Writer, create_schema};
use walferry::pg::Session;

use crate::support::job::{Ends, route_of};
use crate::support::{Ended, Inventory, Walferry, session, until_within};

const NONE: &[&str] = &["run", "--initial-copy", "none"];

/// A source of this version, with a database `app`.
fn source(major: u32) -> Server {
    let source = Server::start(&Server::bin_of(major).unwrap(), &[]).unwrap();
    source.psql("postgres", "create database app").unwrap();
    source
}

async fn slot_create(source: &Server, arguments: &[&str]) -> Value {
    let uri = source.uri("app");
    let arguments = [&["slot", "create", "--json", "--source", &uri], arguments].concat();
    Walferry::run(&arguments).await.expect_success().json()
}

/// Has a copy of files recover, by the source's own log, in this way.
fn recovers(copy: &Server, source: &Server, signal: &str, settings: &[&str]) {
    let restore = format!("restore_command = 'cp {}/pg_wal/%f %p'", source.data_dir().display());
    let often = "wal_retrieve_retry_interval = '100ms'";
    let never = "max_standby_archive_delay = 0";
    copy.configure(&[&restore, often, never, "recovery_target_action = promote"]).unwrap();
    copy.configure(settings).unwrap();
    copy.write_data_file(signal, "").unwrap();
    copy.resume().unwrap();
}

/// Not waited for inside the statement: its snapshot would be in the way of replay, which comes
/// before.
async fn promote(copy: &Server) {
    until_within(Duration::from_secs(30), "pg_promote", async || {
        copy.psql("app", "select pg_promote(false)").is_ok_and(|said| said == "t")
    })
    .await;
    promoted(copy).await;
}

async fn promoted(copy: &Server) {
    until_within(Duration::from_secs(30), "the copy is promoted", async || {
        copy.psql("app", "select pg_is_in_recovery()").is_ok_and(|said| said == "f")
    })
    .await;
}

async fn same_rows(ends: &Ends) {
    let found = compare(&ends.source_uri(), &ends.target_uri()).await.unwrap();
    let rows = found.differences.iter().filter(|line| !line.starts_with("sequence "));
    assert_eq!(rows.collect::<Vec<_>>(), Vec::<&String>::new());
}

fn refused(ended: &Ended, said: &[&str]) {
    assert_eq!(ended.code, Some(1), "{ended:?}");
    for said in said {
        assert!(ended.err.contains(said), "{said}: {}", ended.err);
    }
}

async fn walferry(source: &Server, target: &Server, arguments: &[&str]) -> Ended {
    let (source, target) = (source.uri("app"), target.uri("app"));
    let sides = [("WALFERRY_SOURCE", &*source), ("WALFERRY_TARGET", &*target)];
    Walferry::spawn_with(arguments, &sides).ended().await
}

/// Waits until the copy has replayed all that the source has by now.
async fn arrived(source: &Server, copy: &Server) {
    let lsn = source.psql("app", "select pg_current_wal_flush_lsn()").unwrap();
    let replayed = format!("select pg_last_wal_replay_lsn() >= '{lsn}'");
    until_within(Duration::from_secs(30), "the copy replays", async || {
        copy.psql("app", &replayed).is_ok_and(|said| said == "t")
    })
    .await;
}

async fn insert_end(session: &mut Session) -> String {
    let row = session.query_one("select pg_current_wal_insert_lsn()", &[]).await.unwrap();
    row.string(0).unwrap()
}

/// Commits of two transactions one right behind the other, again and again. Gives the end of each.
async fn adjacent_commits(source: &Server) -> Vec<(i32, String)> {
    let (mut one, mut other) = (session(source, "app").await, session(source, "app").await);
    let mut asking = session(source, "app").await;
    let mut ends = Vec::new();
    for turn in 0..4 {
        for (session, id) in [(&mut one, 10 * turn + 1), (&mut other, 10 * turn + 2)] {
            let sql = format!("begin; insert into public.t values ({id}, 'a transaction')");
            session.execute(&sql).await.unwrap();
        }
        for (session, id) in [(&mut one, 10 * turn + 1), (&mut other, 10 * turn + 2)] {
            session.execute("commit").await.unwrap();
            ends.push((id, insert_end(&mut asking).await));
        }
    }
    ends
}

/// By PostgreSQL's own rule the record that begins at an inclusive target is replayed, so what is
/// given as the end of one commit takes the next one along. Rows have no key: a transaction that
/// comes twice, or not at all, shows.
#[tokio::test(flavor = "multi_thread")]
async fn the_seam_is_exact_to_the_transaction_however_recovery_was_stopped() {
    let source = source(15);
    let made = "create table t (id int, note text); alter table t replica identity full";
    source.psql("app", made).unwrap();
    let names = ["upto", "beyond", "between", "restored", "all"];
    for name in names {
        slot_create(&source, &["--name", name]).await;
    }
    let backup = source.base_backup(&["-X", "none"]).unwrap();
    let commits = adjacent_commits(&source).await;
    source.psql("app", "select pg_create_restore_point('here')").unwrap();
    source.psql("app", "insert into t values (100, 'behind the point')").unwrap();
    let (id, lsn) = &commits[4];
    let xid = source.psql("app", &format!("select xmin from t where id = {id}")).unwrap();
    let target = format!("recovery_target_lsn = '{lsn}'");
    let ways: [&[&str]; 5] = [
        &[&target, "recovery_target_inclusive = off"],
        &[&target],
        &[&format!("recovery_target_xid = '{xid}'")],
        &["recovery_target_name = here"],
        &[],
    ];
    let mut ends = Vec::new();
    let mut counts = Vec::new();
    for (name, way) in names.iter().zip(ways) {
        let copy = backup.copy().unwrap();
        let signal = if way.is_empty() { "standby.signal" } else { "recovery.signal" };
        recovers(&copy, &source, signal, way);
        if way.is_empty() {
            arrived(&source, &copy).await;
            let unpromoted = walferry(&source, &copy, &[NONE, &["--name", name]].concat()).await;
            refused(&unpromoted, &["still recovers", "pg_promote"]);
            promote(&copy).await;
        }
        promoted(&copy).await;
        counts.push(copy.psql("app", "select count(*) from t").unwrap().parse::<u32>().unwrap());
        ends.push((name, copy));
    }
    // The edge: what is asked for as the end of the fifth commit has the sixth with it.
    assert_eq!(counts, [5, 6, 5, 8, 9]);
    source
        .psql("app", "insert into t values (200, 'last'); update t set note = note || '!'")
        .unwrap();
    let rows = "select count(*), count(distinct id), sum(id), min(note), max(note) from t";
    for (name, copy) in ends {
        let arguments = [NONE, &["--name", name, "--until", "following"]].concat();
        let ran = walferry(&source, &copy, &arguments).await.expect_success();
        assert!(ran.err.contains("the copy stands at"), "{}", ran.err);
        assert_eq!(copy.psql("app", rows).unwrap(), source.psql("app", rows).unwrap(), "{name}");
    }
}

/// A base backup that follows the source for a while, and is promoted.
#[tokio::test(flavor = "multi_thread")]
async fn a_promoted_clone_goes_on_under_a_writer_and_there_and_back_through_kills() {
    let source = source(15);
    create_schema(&source.uri("app"), 1).await.unwrap();
    let more = "create unlogged table scratch (id int primary key); \
        insert into scratch select generate_series(1, 50); create sequence counter; \
        select nextval('counter'), lo_from_bytea(0, 'large') is not null";
    source.psql("app", more).unwrap();
    let before = Inventory::take(&source.uri("app")).await;
    let pooler = PgBouncer::start(&source, &["app"]).unwrap();
    let options = Options { tx_per_second: Some(100.0), ..Options::new(&pooler.uri("app")) };
    let writer = Writer::start(options).await.unwrap();
    slot_create(&source, &[]).await;
    let again = Walferry::run(&["slot", "create", "--source", &source.uri("app")]).await;
    refused(&again, &["walferry_main_forward exists already"]);
    let copy = source.base_backup(&["-X", "stream"]).unwrap();
    recovers(&copy, &source, "standby.signal", &[]);
    assert!(writer.committed_more(50).await);
    arrived(&source, &copy).await;
    promote(&copy).await;
    assert_eq!(copy.psql("app", "select pubname from pg_publication").unwrap(), FORWARD);
    let ends = Ends::between(source, copy);
    for _ in 0..4 {
        let run = ends.spawn(NONE);
        run.kill9_after(Duration::from_millis(fastrand::u64(100..900))).await;
    }
    let mut run = ends.spawn(NONE);
    ends.until_phase(&mut run, "following").await;
    assert_eq!(ends.target.psql("app", "select count(*) from pg_publication").unwrap(), "0");
    ends.done(&["verify"]).await;
    ends.source.psql("app", "select lo_from_bytea(0, 'later'), nextval('counter')").unwrap();
    for command in ["cutover", "rollback"] {
        ends.done(&[command, "--route", &route_of(&pooler)]).await;
        assert!(writer.committed_more(30).await, "the writer is stuck");
        ends.done(&["verify"]).await;
    }
    let rest = "select (select count(*) from scratch), (select count(*) from \
         pg_largeobject_metadata), (select last_value >= 2 from counter)";
    assert_eq!(ends.target.psql("app", rest).unwrap(), "50|2|t");
    let report = writer.stop().await;
    assert_eq!((report.failed_statements, report.failed_connects), (0, 0), "{:?}", report.errors);
    ends.done(&["verify"]).await;
    ends.done(&["finish"]).await;
    run.ended().await.expect_success();
    ends.assert_exact(&report).await;
    let after = Inventory::take(&ends.source_uri()).await;
    // One large object was made here.
    let ours = |line: &String| !line.starts_with("+ large object");
    assert_eq!(before.diff(&after).into_iter().filter(ours).collect::<Vec<_>>(), [""; 0]);
}

const FORWARD: &str = "walferry_main_forward";

/// What stands in JSON at the beginning of a command's output.
fn first_json(text: &str) -> Value {
    serde_json::Deserializer::from_str(text).into_iter().next().unwrap().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dump_under_the_slots_snapshot_is_followed_from_where_it_was_taken() {
    let (source, target) = (source(15), source(15));
    let ends = Ends::between(source, target);
    let writer = ends.writer(150.0).await;
    let uri = ends.source_uri();
    let mut slot = Walferry::spawn(&["slot", "create", "--hold", "--json", "--source", &uri]);
    slot.says("the snapshot is there until").await;
    let made = first_json(&slot.so_far());
    assert!(writer.committed_more(30).await);
    let script =
        "set -e; \"$0\" --snapshot \"$1\" -d \"$2\" | \"$3\" -q -X -v ON_ERROR_STOP=1 -d \"$4\"";
    let bin = |name| ends.source.bin_dir().join(name);
    let restored = Command::new("bash")
        .args(["-o", "pipefail", "-c", script])
        .arg(bin("pg_dump"))
        .args([made["snapshot"].as_str().unwrap(), &uri])
        .arg(bin("psql"))
        .arg(ends.target_uri())
        .output()
        .unwrap();
    assert!(restored.status.success(), "{restored:?}");
    slot.signal("INT");
    slot.ended().await.expect_success();
    let lsn = made["consistent_lsn"].as_str().unwrap();
    refused(&ends.walferry(NONE).await, &["another system", "--from-lsn"]);
    for (wrong, said) in [("0/1", "what lies between is nowhere"), ("FF/0", "beyond the end")] {
        let ended = ends.walferry(&[NONE, &["--from-lsn", wrong]].concat()).await;
        refused(&ended, &[wrong, said]);
    }
    let unread = ends.walferry(&[NONE, &["--from-lsn", "here"]].concat()).await;
    assert_eq!(unread.code, Some(2), "{unread:?}");
    let arguments = [NONE, &["--from-lsn", lsn]].concat();
    let mut run = ends.spawn(&arguments);
    ends.until_phase(&mut run, "following").await;
    ends.done(&["verify", "--initial-copy", "none"]).await;
    run.kill9().await;
    let moved = ends.walferry(&[NONE, &["--from-lsn", "0/FFFFFF"]].concat()).await;
    refused(&moved, &["has begun from", lsn]);
    let report = writer.stop().await;
    ends.done(&["verify", "--initial-copy", "none"]).await;
    ends.assert_exact(&report).await;
}

/// Of servers without pg_basebackup beside them: the files as they are after a crash, slots and all.
async fn a_storage_snapshot_is_followed_once_it_has_a_timeline_of_its_own(major: u32) {
    let source = source(major);
    source.psql("app", "create table t (id int primary key, note text)").unwrap();
    slot_create(&source, &[]).await;
    let prepared = "begin; insert into t values (2, 'prepared'); prepare transaction 'left'";
    source.psql("app", prepared).unwrap();
    let other = "select pg_create_physical_replication_slot('other', true)";
    source.psql("app", other).unwrap();
    source.psql("app", "insert into t values (1, 'there')").unwrap();
    source.stop(StopMode::Immediate).unwrap();
    let (same, copy) = (source.copy().unwrap(), source.copy().unwrap());
    source.resume().unwrap();
    source.psql("app", "insert into t select i, 'behind' from generate_series(10, 50) i").unwrap();

    // Recovered from its crash it goes on in the source's own numbers.
    same.resume().unwrap();
    let prepared = "rollback prepared 'left'";
    same.psql("app", prepared).unwrap();
    refused(
        &walferry(&source, &same, NONE).await,
        &["the source's own timeline", "standby.signal"],
    );
    drop(same);

    copy.write_data_file("standby.signal", "").unwrap();
    copy.resume().unwrap();
    promote(&copy).await;
    let ends = Ends::between(source, copy);
    let check = ends.walferry(&["check", "--initial-copy", "none", "--json"]).await;
    let found = check.json()["findings"].clone();
    let codes: Vec<_> = found.as_array().unwrap().iter().map(|f| f["code"].as_str()).collect();
    for code in ["copy-prepared", "copy-has-slot"] {
        assert!(codes.contains(&Some(code)), "{code}: {codes:?}");
    }
    let said = ends.walferry(NONE).await;
    refused(&said, &["ROLLBACK PREPARED 'left'"]);
    ends.target.psql("app", prepared).unwrap();
    let mut run = ends.spawn(NONE);
    ends.until_phase(&mut run, "following").await;
    ends.source.psql("app", "commit prepared 'left'").unwrap();
    ends.done(&["verify"]).await;
    let slots = "select string_agg(slot_name, ' ' order by 1) from pg_replication_slots";
    assert_eq!(ends.target.psql("app", slots).unwrap(), "other");
    ends.done(&["cutover"]).await;
    ends.target.psql("app", "update t set note = 'over'").unwrap();
    ends.done(&["rollback"]).await;
    ends.source.psql("app", "update t set note = 'back' where id = 1").unwrap();
    ends.done(&["verify"]).await;
    same_rows(&ends).await;
    let rows = "select count(*), count(*) filter (where note = 'over') from t";
    assert_eq!(ends.target.psql("app", rows).unwrap(), "43|42");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_storage_snapshot_of_14_is_followed() {
    a_storage_snapshot_is_followed_once_it_has_a_timeline_of_its_own(14).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_storage_snapshot_of_18_is_followed() {
    a_storage_snapshot_is_followed_once_it_has_a_timeline_of_its_own(18).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_copy_must_not_be_is_refused_by_name_and_nothing_stays() {
    let (source, target) = (source(15), source(15));
    source.psql("app", "create table t (id int primary key); create table u (id int)").unwrap();
    target.psql("app", "create table t (id int primary key, more text)").unwrap();
    let ends = Ends::between(source, target);
    let before = ends.inventories().await;
    let ended = ends.walferry(NONE).await;
    refused(
        &ended,
        &["slot create", "copy-lacks"].map(|s| if s == "copy-lacks" { "public.u" } else { s }),
    );
    for usage in [
        &["run", "--from-lsn", "0/1"][..],
        &["run", "--initial-copy", "some"],
        &["run", "--initial-copy", "none", "--publication", "p"],
        &["slot", "create", "--publication", "p"],
    ] {
        assert_eq!(ends.walferry(usage).await.code, Some(2), "{usage:?}");
    }
    slot_create(&ends.source, &["--exclude", "public.u"]).await;
    let differs = ends.walferry(&[NONE, &["--exclude", "public.u"]].concat()).await;
    refused(&differs, &["public.t", "more text"]);
    ends.target.psql("app", "alter table t drop more; create table u (id int)").unwrap();
    let arguments = [NONE, &["--from-lsn", "FF/0"]].concat();
    let ended = ends.walferry(&arguments).await;
    refused(&ended, &["beyond the end"]);
    let end = ends.source.psql("app", "select pg_current_wal_flush_lsn()").unwrap();
    let ended = ends.walferry(&[NONE, &["--from-lsn", &end]].concat()).await;
    refused(&ended, &["does not show public.u"]);
    ends.done(&["cancel", "--initial-copy", "none"]).await;
    slot_create(&ends.source, &[]).await;
    let clean = ["cancel", "--target-is-gone", "--source", &ends.source_uri()];
    Walferry::run(&clean).await.expect_success();
    let after = ends.inventories().await;
    assert_eq!(before.0.diff(&after.0), Vec::<String>::new());
}
