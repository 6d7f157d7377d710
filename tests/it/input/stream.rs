//! Slots, systems and progress that are not what they were.

use super::*;

const SLOT: &str = "walferry_main_forward";

#[tokio::test(flavor = "multi_thread")]
async fn etl_935_a_slot_dropped_while_stopped_stops_the_job() {
    let ends = small();
    ends.done(&["run", "--until", "following"]).await;
    source(&ends, &format!("select pg_drop_replication_slot('{SLOT}')"));
    source(&ends, "insert into item values (1000)");
    let texts = [SLOT, "does not exist", "walferry cancel"];
    fails(&ends, &["run"], &texts).await;
    // Asked again it says the same, once and in plain text, and has made no slot; so does a cutover.
    fails(&ends, &["run"], &texts).await;
    let ended = ends.walferry(&["run"]).await;
    assert_eq!(ended.err.matches("does not exist").count(), 1, "{}", ended.err);
    assert!(!ended.err.contains('\u{1b}'), "{}", ended.err);
    fails(&ends, &["cutover"], &texts).await;
    let slots = ends.source.psql("app", "select count(*) from pg_replication_slots").unwrap();
    assert_eq!(slots.trim(), "0");
    let status = ends.status().await;
    assert!(status["error"].as_str().unwrap().contains(SLOT), "{status}");
    ends.done(&["cancel"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn etl_935_a_slot_dropped_while_following_stops_the_job() {
    let ends = small();
    let run = following(&ends).await;
    let drop = format!(
        "do $$ begin loop \
           perform pg_terminate_backend(active_pid) from pg_replication_slots \
             where slot_name = '{SLOT}' and active; \
           begin perform pg_drop_replication_slot('{SLOT}'); exit; \
           exception when object_in_use then null; end; \
         end loop; end $$"
    );
    source(&ends, &drop);
    let ended = run.ended().await;
    assert_eq!(ended.code, Some(1), "{}", ended.err);
    assert!(ended.err.contains(SLOT) && ended.err.contains("does not exist"), "{}", ended.err);
}

#[tokio::test(flavor = "multi_thread")]
async fn debezium_3970_a_slot_made_again_by_someone_is_not_followed() {
    let ends = small();
    ends.done(&["run", "--until", "following"]).await;
    source(&ends, &format!("select pg_drop_replication_slot('{SLOT}')"));
    source(&ends, "insert into item values (1000)");
    source(&ends, &format!("select pg_create_logical_replication_slot('{SLOT}', 'pgoutput')"));
    fails(&ends, &["run"], &[SLOT, "made again", "walferry cancel"]).await;
    let lost = ends.target.psql("app", "select count(*) from item where id = 1000").unwrap();
    assert_eq!(lost.trim(), "0");
    ends.done(&["cancel"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn another_system_at_the_sources_address_is_refused_and_left_alone() {
    let ends = small();
    let other = Ends::start(15, 15);
    ends.done(&["run", "--until", "following"]).await;
    let before = other.inventories().await;
    let mut moved = Ends::of_uris(&ends);
    moved.source_via = other.source_uri();
    let texts = ["--source", "another system", "walferry cancel --source-is-gone"];
    for command in ["run", "cancel"] {
        fails_at(&moved, &[command], &texts).await;
    }
    // The same with the target: another one has no such job, and nothing is made there.
    let mut moved = Ends::of_uris(&ends);
    moved.target_via = other.target_uri();
    fails_at(&moved, &["cutover"], &["there is no job"]).await;
    let after = other.inventories().await;
    assert_eq!(before.0.diff(&after.0), Vec::<String>::new());
    assert_eq!(before.1.diff(&after.1), Vec::<String>::new());
    // The right addresses go on with it.
    source(&ends, "insert into item values (1000)");
    let run = following(&ends).await;
    arrives(&ends, "select exists (select from item where id = 1000)").await;
    stop(run).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn another_system_at_the_sources_address_stops_a_run_that_follows() {
    let mut ends = small();
    let other = Ends::start(15, 15);
    let proxy = Proxy::start(ends.source.port()).unwrap();
    ends.source_via = proxy.uri(&ends.source_uri());
    let run = following(&ends).await;
    proxy.lead_to(other.source.port());
    proxy.cut();
    proxy.restore();
    let ended = run.ended().await;
    assert_eq!(ended.code, Some(1), "{}", ended.err);
    assert!(ended.err.contains("another system"), "{}", ended.err);
    let made = "select count(*) from pg_namespace where nspname = 'walferry'";
    assert_eq!(other.source.psql("app", made).unwrap().trim(), "0");
}

#[tokio::test(flavor = "multi_thread")]
async fn law_4_a_target_restored_from_an_older_state_is_an_error_that_names_both_positions() {
    let ends = small();
    ends.done(&["run", "--until", "following"]).await;
    ends.target.stop(StopMode::Fast).unwrap();
    let (data, saved) = (ends.target.data_dir(), ends.target.dir().join("saved"));
    let copy = |from: &std::path::Path, to: &std::path::Path| {
        let status = std::process::Command::new("cp").arg("-a").arg(from).arg(to).status();
        assert!(status.unwrap().success());
    };
    copy(&data, &saved);
    ends.target.resume().unwrap();
    let run = following(&ends).await;
    source(&ends, "insert into item values (1000)");
    arrives(&ends, "select exists (select from item where id = 1000)").await;
    let lsn = ends.source.psql("app", "select pg_current_wal_insert_lsn()").unwrap();
    let told =
        format!("select confirmed_flush_lsn >= '{lsn}' from pg_catalog.pg_replication_slots");
    until_sql(&mut session(&ends.source, "app").await, &told).await;
    stop(run).await;
    // The slot will not send it again, and the restored target has never heard of it.
    ends.target.stop(StopMode::Fast).unwrap();
    std::fs::remove_dir_all(&data).unwrap();
    copy(&saved, &data);
    ends.target.resume().unwrap();
    let err = fails(&ends, &["run"], &[SLOT, "confirmed up to", "walferry cancel"]).await;
    assert!(err.matches("0/").count() >= 2, "{err}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_is_gone_for_good_does_not_keep_the_job() {
    let ends = small();
    ends.done(&["run", "--until", "following"]).await;
    ends.source.stop(StopMode::Fast).unwrap();
    fails(&ends, &["cancel"], &["cannot connect to source"]).await;
    let ended = ends.done(&["cancel", "--source-is-gone"]).await;
    assert!(ended.out.contains("source was left alone"), "{}", ended.out);
    let left = "select count(*) from pg_namespace where nspname = 'walferry'";
    assert_eq!(ends.target.psql("app", left).unwrap().trim(), "0");
}

/// [`fails`], for ends without servers of their own.
async fn fails_at(ends: &Addresses, arguments: &[&str], texts: &[&str]) {
    let environment =
        [("WALFERRY_SOURCE", &*ends.source_via), ("WALFERRY_TARGET", &*ends.target_via)];
    let ended = Walferry::spawn_with(arguments, &environment).ended().await;
    assert_eq!(ended.code, Some(1), "{arguments:?}: {}", ended.err);
    for text in texts {
        assert!(ended.err.contains(text), "no \"{text}\" in: {}", ended.err);
    }
}

struct Addresses {
    source_via: String,
    target_via: String,
}

impl Ends {
    fn of_uris(ends: &Ends) -> Addresses {
        Addresses { source_via: ends.source_via.clone(), target_via: ends.target_via.clone() }
    }
}
