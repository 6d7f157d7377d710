//! `--standby`: on 16 a standby's slot is made and kept by walferry.

use std::time::Duration;

use serde_json::Value;
use walferry::demo::server::{Server, StopMode};
use walferry::demo::writer::create_schema;

use super::{SLOT, assert_equal, assert_kept, level, of_both, start_writer, stop};
use crate::support::job::Ends;
use crate::support::{Walferry, until_within};

const FED: [&str; 2] = ["primary_slot_name = 'standby'", "wal_receiver_status_interval = 1"];
const FEEDBACK: &str = "hot_standby_feedback = on";
const OURS: &str = "select count(*) from pg_replication_slots \
     where slot_name = 'walferry_main_forward'";

async fn standby_of(ends: &Ends) -> Value {
    ends.status().await["standbys"][0].clone()
}

/// Status may still be of the standby before this one, so the slot has to be there as well.
async fn until_ready(ends: &Ends, standby: &Server, run: &mut Walferry) {
    for _ in 0..150 {
        let made = standby.psql("app", OURS).unwrap() == "1";
        if made && standby_of(ends).await["state"] == "ready" {
            return;
        }
        assert!(!run.has_ended(), "the run ended: {}", run.so_far());
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    panic!("no slot after 30 s: {}\n{}", standby_of(ends).await, run.so_far());
}

/// The primary goes down in order, so that its standby has all, and that takes over.
fn switch_over(primary: &Server, standby: &Server) {
    primary.stop(StopMode::Fast).unwrap();
    standby.promote().unwrap();
    standby.psql("postgres", SLOT).unwrap();
    primary.rejoin(standby, &[&FED[..], &[FEEDBACK]].concat()).unwrap();
}

/// Loses the WAL that its slot needs.
async fn lose_wal(primary: &Server, standby: &Server) {
    standby.configure(&["max_slot_wal_keep_size = 1MB"]).unwrap();
    standby.reload().unwrap();
    for turn in 0..4 {
        let sql = format!("create table public.filler_{turn} as select generate_series(1, 9) a");
        primary.psql("app", &sql).unwrap();
        primary.psql("app", &format!("drop table public.filler_{turn}")).unwrap();
        primary.psql("app", "select pg_switch_wal()").unwrap();
    }
    primary.psql("app", "checkpoint").unwrap();
    level(primary, standby).await;
    standby.psql("app", "checkpoint").unwrap();
    standby.configure(&["max_slot_wal_keep_size = -1"]).unwrap();
    standby.reload().unwrap();
}

/// Twice, the second time to the first primary, made a standby meanwhile: the stream goes on without
/// a gap and without reading anything again. A slot that its standby has lost is made anew.
#[tokio::test(flavor = "multi_thread")]
async fn a_promoted_standby_of_16_is_followed_from_the_slot_that_was_kept_there() {
    let mut ends = Ends::start(16, 16);
    ends.source.psql("postgres", SLOT).unwrap();
    create_schema(&ends.source_uri(), 1).await.unwrap();
    let standby = ends.source.standby(&FED).unwrap();
    ends.source_via = of_both(&ends.source, &standby);
    let given = ends.source_via.replace("read-write", "standby");
    let named = ends.walferry(&["check", "--json", "--standby", &given]).await;
    assert!(named.out.contains("hot_standby_feedback = on"), "{}", named.out);
    let other = ends.walferry(&["check", "--json", "--standby", &ends.target_uri()]).await;
    assert!(other.out.contains("is no standby"), "{}", other.out);
    standby.configure(&[FEEDBACK]).unwrap();
    standby.reload().unwrap();
    let run_with = ["run", "--standby", &*given];
    let mut run = ends.spawn(&run_with);
    let writer = start_writer(&ends.source_via, 1).await;
    ends.until_phase(&mut run, "following").await;
    until_ready(&ends, &standby, &mut run).await;
    switch_over(&ends.source, &standby);
    assert!(writer.committed_more(100).await);
    until_ready(&ends, &ends.source, &mut run).await;
    // A runner that was away finds what became of the slot meanwhile.
    run.kill9().await;
    lose_wal(&standby, &ends.source).await;
    let lost = "select wal_status from pg_replication_slots \
         where slot_name = 'walferry_main_forward'";
    assert_eq!(ends.source.psql("app", lost).unwrap(), "lost");
    let mut run = ends.spawn(&run_with);
    until_within(Duration::from_secs(30), "the slot made anew", || async {
        let found = standby_of(&ends).await;
        let said = found["said"].as_str().unwrap_or_default();
        found["state"] == "ready" && said.contains("invalidated")
    })
    .await;
    switch_over(&standby, &ends.source);
    assert!(writer.committed_more(100).await);
    let report = writer.stop().await;
    assert_equal(&ends.source, &ends.target, &mut run).await;
    for server in [&ends.source, &ends.target] {
        assert_kept(server, &report).await;
    }
    until_ready(&ends, &standby, &mut run).await;
    assert!(!run.so_far().contains("refill"), "{}", run.so_far());
    ends.done(&["cutover"]).await;
    ends.done(&["verify"]).await;
    stop(run).await;
    assert_eq!(standby.psql("app", OURS).unwrap(), "1");
    let ended = ends.done(&["finish", "--standby", &given]).await;
    assert!(ended.out.contains("on standby"), "{}", ended.out);
    assert_eq!(standby.psql("app", OURS).unwrap(), "0");
}

/// What stands in the way is said by check and status, with what mends it; what is left at the end
/// is named.
#[tokio::test(flavor = "multi_thread")]
async fn a_standby_that_cannot_have_a_slot_says_so() {
    let ends = Ends::start(17, 17);
    ends.source.psql("app", "create table public.t (a int primary key)").unwrap();
    let standby = ends.source.standby(&[FEEDBACK, "wal_receiver_status_interval = 0"]).unwrap();
    let uri = standby.uri("app");
    let both = ends.walferry(&["check", "--standby", &uri]).await;
    assert!(both.out.contains("leave --standby out"), "{}", both.out);
    // Not the server's own slots: ours, which another's of the same name is in the way of.
    let other =
        "select pg_create_logical_replication_slot('walferry_main_forward', 'test_decoding')";
    std::thread::scope(|scope| {
        let making = scope.spawn(|| standby.psql("app", other).unwrap());
        while !making.is_finished() {
            ends.source.psql("app", "select pg_log_standby_snapshot()").unwrap();
            std::thread::sleep(Duration::from_millis(50));
        }
    });
    let with = ["run", "--failover", "off", "--standby", &*uri];
    let mut run = ends.spawn(&with);
    ends.until_phase(&mut run, "following").await;
    until_within(Duration::from_secs(20), "what status says", || async {
        let found = standby_of(&ends).await;
        let said = found["said"].as_str().unwrap_or_default();
        found["state"] == "unfit" && said.contains("select pg_drop_replication_slot")
    })
    .await;
    standby.psql("app", "select pg_drop_replication_slot('walferry_main_forward')").unwrap();
    // A source that was never told what the slot needs does not keep it.
    until_within(Duration::from_secs(20), "what the source has not heard", || async {
        let found = standby_of(&ends).await;
        assert_ne!(found["state"], "ready", "{found}");
        let said = found["said"].as_str().unwrap_or_default();
        found["state"] == "unheard" && said.contains("wal_receiver_status_interval")
    })
    .await;
    standby.configure(&["wal_receiver_status_interval = 1"]).unwrap();
    standby.reload().unwrap();
    until_ready(&ends, &standby, &mut run).await;
    let ended = ends.done(&["cancel"]).await;
    assert!(ended.err.contains("was not given by --standby"), "{}", ended.err);
    assert_eq!(standby.psql("app", OURS).unwrap(), "1");
}
