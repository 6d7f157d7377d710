//! Where copy and stream meet, what a slot holds back, and slots that are lost or left.

use std::time::Duration;

use super::*;
use crate::support::job::Ends;
use crate::support::until_within;

/// No key, so that a row that came twice is there twice.
const HEAPS: &str = "create table heap (n int, v text); alter table heap replica identity full; \
    create table tally (id int primary key, n int); insert into tally select i, 0 \
        from generate_series(1, 20) i; \
    insert into heap select i, repeat('x', 100) from generate_series(1, 20000) i";

/// Writes small transactions until told to stop; gives how many.
fn writing(story: &Story) -> (tokio::task::JoinHandle<i32>, tokio::sync::oneshot::Sender<()>) {
    let (stop, mut stopped) = tokio::sync::oneshot::channel();
    let (server, name) = (story.source, story.name.clone());
    let work = tokio::spawn(async move {
        let mut session = session(server, &name).await;
        session.execute("set search_path = public").await.unwrap();
        let mut n = 0;
        while stopped.try_recv() == Err(tokio::sync::oneshot::error::TryRecvError::Empty) {
            n += 1;
            let sql = format!(
                "begin; insert into heap values (-{n}, 'written'); \
                 update tally set n = n + 1 where id = {n} % 20 + 1; \
                 delete from heap where ctid = (select max(ctid) from heap where n = {n}); commit"
            );
            session.execute(&sql).await.unwrap();
        }
        n
    });
    (work, stop)
}

/// The stream began a transaction too late or too early, after a node was added under load (and
/// spock#392): every change of the seam is there once.
#[tokio::test(flavor = "multi_thread")]
async fn pgdog_874_between_copy_and_stream_nothing_is_lost_or_doubled() {
    let story = Story::of("pgdog_874", HEAPS);
    let (work, stop) = writing(&story);
    story.done(&["run", "--until", "following"]).await;
    stop.send(()).unwrap();
    assert!(work.await.unwrap() > 50);
    story.follows("update tally set n = n + 1").await;
    assert_eq!(
        story.target(
            "select count(*) from (select n from heap group by n \
        having count(*) > 1) x"
        ),
        "0"
    );
}

/// A snapshot that was not the slot's (and one taken up again after a kill): rows in between were
/// missing.
#[tokio::test(flavor = "multi_thread")]
async fn pgcopydb_263_a_copy_killed_and_resumed_under_writes_misses_no_row() {
    let story = Story::of("pgcopydb_263", HEAPS);
    let (work, stop) = writing(&story);
    for wait_ms in [400, 700, 900] {
        story.spawn(&["run"]).kill9_after(Duration::from_millis(wait_ms)).await;
    }
    story.done(&["run", "--until", "following"]).await;
    stop.send(()).unwrap();
    let written = work.await.unwrap();
    story.follows("").await;
    assert_eq!(story.target("select count(*) from heap where n < 0"), written.to_string());
    assert_eq!(story.target("select sum(n) from tally"), written.to_string());
}

/// Only tables that are not published change, and the slot holds all of their log back.
#[tokio::test(flavor = "multi_thread")]
async fn etl_429_the_slot_of_a_quiet_job_moves_on_while_others_write() {
    let story = Story::of("etl_429", HEAPS);
    story.source("create table noise (n int, v text)");
    story.done(&["run", "--exclude", "public.noise", "--until", "following"]).await;
    let mut run = story.spawn(&["run", "--exclude", "public.noise"]);
    story.arrived(&mut run).await;
    story.source("insert into noise select i, md5(i::text) from generate_series(1, 100000) i");
    let written = story.source("select pg_current_wal_lsn()");
    let moved = format!(
        "select confirmed_flush_lsn >= '{written}' from pg_replication_slots \
        where database = '{}'",
        story.name
    );
    until_within(Duration::from_secs(20), "the slot moves", || async {
        story.source(&moved) == "t"
    })
    .await;
    story.source("update tally set n = 5 where id = 3; drop table noise");
    story.arrived(&mut run).await;
    story.same().await;
    run.signal("INT");
    run.ended().await.expect_success();
}

/// Slots of a move given up stayed, and kept the log until the disk was full.
#[tokio::test(flavor = "multi_thread")]
async fn citus_7896_and_pgdog_1592_a_killed_and_cancelled_job_leaves_no_slot() {
    let story = Story::of("citus_7896", HEAPS);
    for wait_ms in [300, 900] {
        story.spawn(&["run"]).kill9_after(Duration::from_millis(wait_ms)).await;
        let ended = story.spawn(&["cancel"]).ended().await;
        // Killed before there was a job, there is nothing to cancel.
        assert!(ended.code == Some(0) || ended.err.contains("there is no job"), "{}", ended.err);
        let left = format!(
            "select (select count(*) from pg_replication_slots where database = \
            '{}'), (select count(*) from pg_publication)",
            story.name
        );
        until_within(Duration::from_secs(20), "no slot", || async { story.source(&left) == "0|0" })
            .await;
        story.target("drop table if exists mark, heap, tally cascade");
    }
    story.done(&["run", "--until", "following"]).await;
    story.follows("update tally set n = 1").await;
}

/// Cancelled after the point of no return, the forward stream could be started again over the rows
/// written on the new side.
#[tokio::test(flavor = "multi_thread")]
async fn vitess_19680_after_the_switch_nothing_starts_the_forward_stream_again() {
    let story = Story::copied("vitess_19680", HEAPS).await;
    let mut run = story.spawn(&["run"]);
    story.arrived(&mut run).await;
    story.done(&["cutover"]).await;
    let ended = story.spawn(&["cancel"]).ended().await;
    assert_eq!(ended.code, Some(1), "{}", ended.out);
    assert!(ended.err.contains("rollback"), "{}", ended.err);
    story.target("update tally set n = 77; insert into heap values (77, 'new side')");
    run.signal("INT");
    run.ended().await.expect_success();
    let again = story.spawn(&["run"]);
    let arrived = "select count(*) = 20 from tally where n = 77";
    until_within(Duration::from_secs(20), "the way back", || async {
        story.source(arrived) == "t"
    })
    .await;
    assert_eq!(story.target("select count(*) from tally where n = 77"), "20");
    story.done(&["rollback"]).await;
    story.same().await;
    story.done(&["finish"]).await;
    again.ended().await.expect_success();
}

/// The standby that took over has no slot, or one that stands elsewhere: following on from there
/// would lose what was written between (and patroni#1749, pg_failover_slots#25).
#[tokio::test(flavor = "multi_thread")]
async fn patroni_1056_a_standby_that_took_over_without_the_slot_is_not_followed() {
    let ends = Ends::start(15, 15);
    ends.source.psql("app", HEAPS).unwrap();
    ends.done(&["run", "--until", "following"]).await;
    let standby = ends.source.standby(&[]).unwrap();
    ends.source.psql("app", "update tally set n = 4 where id = 4").unwrap();
    let caught_up = "select pg_last_wal_replay_lsn() >= '{}'::pg_lsn";
    let lsn = ends.source.psql("app", "select pg_current_wal_lsn()").unwrap();
    let caught_up = caught_up.replace("{}", &lsn);
    until_within(Duration::from_secs(20), "the standby", || async {
        standby.psql("app", &caught_up).unwrap() == "t"
    })
    .await;
    ends.source.kill9().unwrap();
    standby.psql("app", "select pg_promote()").unwrap();
    standby.psql("app", "update tally set n = 5 where id = 5").unwrap();
    let promoted = standby.uri("app");
    let environment = [("WALFERRY_SOURCE", &*promoted), ("WALFERRY_TARGET", &*ends.target_via)];
    let ended = Walferry::spawn_with(&["run"], &environment).ended().await;
    assert_eq!(ended.code, Some(1), "{}", ended.out);
    assert!(ended.err.contains("slot"), "{}", ended.err);
    assert_eq!(ends.target.psql("app", "select sum(n) from tally").unwrap(), "0");
    // The old primary, back, is gone on with.
    ends.source.resume().unwrap();
    let mut run = ends.spawn(&["run"]);
    ends.until_phase(&mut run, "following").await;
    until_within(Duration::from_secs(20), "the update", || async {
        ends.target.psql("app", "select n from tally where id = 4").unwrap() == "4"
    })
    .await;
    let found = compare(&ends.source_uri(), &ends.target_uri()).await.unwrap();
    assert_eq!(found.differences, Vec::<String>::new());
}
