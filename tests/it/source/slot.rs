//! Slots: made without hanging, recognised, dropped.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use walferry::demo::server::{Server, StopMode};
use walferry::fault::{Fault, Faulty};
use walferry::lsn::Lsn;
use walferry::pg::{Config, Purpose, Session};
use walferry::source::{Blocker, Error, Recorded, Stream, StreamOptions, check_continuity, slot};

use super::rig::{PATIENCE, Reader, Rig, SLOT, create_options, make_slot, soon};

const TABLE: &str = "create table public.t (id int primary key)";
const NO_SLOT: &str = "select count(*) from pg_replication_slots where slot_name = 's'";
const NO_WALSENDER: &str = "select count(*) from pg_stat_activity where backend_type = 'walsender'";

async fn replication(config: &Config) -> Session {
    Session::connect(config, Purpose::Replication).await.unwrap()
}

#[tokio::test]
async fn pgcopydb_819_creation_names_who_it_waits_for_and_can_be_given_up() {
    let mut rig = Rig::new(&["max_prepared_transactions = 5"], TABLE, &["t"]).await;
    let mut writer = Session::connect(&rig.config, Purpose::Sql).await.unwrap();
    writer.execute("begin; insert into public.t values (1)").await.unwrap();
    rig.sql
        .execute("begin; insert into public.t values (2); prepare transaction 'it''s'")
        .await
        .unwrap();
    let told: Arc<Mutex<Vec<Blocker>>> = Arc::default();
    let tell = |blockers: &[Blocker]| *told.lock().unwrap() = blockers.to_vec();
    let session = replication(&rig.config).await;
    let options = create_options("s", Duration::from_millis(1200));
    let error = slot::create(session, &mut rig.sql, &options, tell).await.unwrap_err();
    let text = error.to_string();
    assert_eq!(error.fault(), Fault::Retry);
    let Error::Blocked { blockers, .. } = error else { panic!("{text}") };
    assert_eq!(*told.lock().unwrap(), blockers);
    let by_pid = blockers.iter().find(|b| b.pid == Some(writer.process_id())).unwrap();
    let xid: u32 = writer.query("select txid_current()").await.unwrap()[0].parse(0).unwrap();
    assert_eq!(by_pid.xid, xid);
    assert_eq!(by_pid.state.as_deref(), Some("idle in transaction"));
    assert!(by_pid.query.as_deref().unwrap().contains("insert into public.t"), "{by_pid:?}");
    assert!(by_pid.age.unwrap() > Duration::from_millis(500));
    assert!(blockers.iter().any(|b| b.gid.as_deref() == Some("it's")), "{blockers:?}");
    assert_eq!(blockers.iter().filter(|b| b.waited_for).count(), 1);
    assert!(blockers[0].waited_for);
    assert!(text.contains("rollback prepared 'it''s'"), "{text}");
    assert!(text.contains(&format!("pg_terminate_backend({})", writer.process_id())), "{text}");
    assert_eq!(rig.sql.query(NO_SLOT).await.unwrap()[0].str(0).unwrap(), "0");
    rig.wait_for(NO_WALSENDER, "0").await;
}

#[tokio::test]
async fn mono_5874_a_caller_that_goes_away_leaves_neither_slot_nor_walsender() {
    let mut rig = Rig::new(&[], TABLE, &["t"]).await;
    let mut writer = Session::connect(&rig.config, Purpose::Sql).await.unwrap();
    writer.execute("begin; insert into public.t values (1)").await.unwrap();
    let session = replication(&rig.config).await;
    let mut watcher = Session::connect(&rig.config, Purpose::Sql).await.unwrap();
    let (told, mut hears) = tokio::sync::watch::channel(false);
    let task = tokio::spawn(async move {
        let tell = move |_: &[Blocker]| told.send_modify(|told| *told = true);
        slot::create(session, &mut watcher, &create_options("s", PATIENCE), tell).await.is_ok()
    });
    soon("the wait to be told", hears.wait_for(|told| *told)).await.unwrap();
    rig.wait_for(NO_WALSENDER, "1").await;
    task.abort();
    rig.wait_for(NO_WALSENDER, "0").await;
    rig.wait_for(NO_SLOT, "0").await;
    writer.execute("commit").await.unwrap();
    let held = make_slot(&rig.config, &mut rig.sql, "s").await;
    assert!(held.consistent_lsn > rig.start_lsn);
    rig.wait_for(NO_SLOT, "1").await;
}

#[tokio::test]
async fn creation_goes_on_by_itself_when_the_last_blocker_ends() {
    let mut rig = Rig::new(&[], TABLE, &["t"]).await;
    let mut writer = Session::connect(&rig.config, Purpose::Sql).await.unwrap();
    writer.execute("begin; insert into public.t values (1)").await.unwrap();
    let (told, mut hears) = tokio::sync::watch::channel(false);
    let ender = async {
        soon("the wait to be told", hears.wait_for(|told| *told)).await.unwrap();
        writer.execute("commit").await.unwrap();
    };
    let mut plain = Session::connect(&rig.config, Purpose::Sql).await.unwrap();
    let options = create_options("s", PATIENCE);
    let tell = |_: &[Blocker]| told.send_modify(|told| *told = true);
    let making = slot::create_plain(&mut plain, &mut rig.sql, &options, tell);
    let (made, ()) = tokio::join!(making, ender);
    let consistent_lsn = made.unwrap();
    let status = slot::status(&mut rig.sql, "s").await.unwrap().unwrap();
    assert_eq!(status.confirmed_flush_lsn, Some(consistent_lsn));
    assert_eq!((status.plugin.as_str(), status.database.as_str()), ("pgoutput", "postgres"));
    let wal_status = (rig.sql.major_version() >= 13).then_some("reserved");
    assert_eq!((status.wal_status.as_deref(), status.active_pid), (wal_status, None));
    assert!(status.restart_lsn.unwrap() < consistent_lsn);
    let again = slot::create_plain(&mut plain, &mut rig.sql, &options, |_| {}).await.unwrap_err();
    assert!(matches!(&again, Error::SlotExists { slot } if slot == "s"), "{again}");
}

#[tokio::test]
async fn dropping_takes_the_slot_from_our_own_reader_and_can_be_repeated() {
    let mut rig = Rig::new(&[], TABLE, &["t"]).await;
    make_slot(&rig.config, &mut rig.sql, "walferry_shopxforward").await;
    let reader = rig.follow(1 << 20).await;
    assert!(slot::drop(&mut rig.sql, SLOT).await.unwrap());
    assert!(!slot::drop(&mut rig.sql, SLOT).await.unwrap());
    assert!(soon("the reader's end", reader.task).await.unwrap().is_err());
    // etl#679: a name is no pattern.
    assert!(slot::status(&mut rig.sql, "walferry_shopxforward").await.unwrap().is_some());
    assert!(slot::status(&mut rig.sql, SLOT).await.unwrap().is_none());
    let foreign = rig.config.clone().with_application_name("debezium");
    let mut other = replication(&foreign).await;
    let wanted = [("proto_version", "1"), ("publication_names", "x")];
    other.start_replication("walferry_shopxforward", Lsn(0), &wanted).await.unwrap();
    let error = slot::drop(&mut rig.sql, "walferry_shopxforward").await.unwrap_err();
    assert!(matches!(error, Error::SlotInUse { .. }), "{error}");
}

async fn refused(rig: &Rig, options: StreamOptions) -> Error {
    let error = Stream::open(&rig.config, options).await.unwrap_err();
    assert_eq!(error.fault(), Fault::Stop, "{error}");
    error
}

#[tokio::test]
async fn etl_935_debezium_3970_a_slot_made_again_behind_our_back_is_refused() {
    let mut rig = Rig::new(&[], TABLE, &["t"]).await;
    slot::drop(&mut rig.sql, SLOT).await.unwrap();
    let error = refused(&rig, rig.options()).await;
    assert!(matches!(error, Error::SlotMissing { .. }), "{error}");
    rig.sql.execute("insert into public.t values (1)").await.unwrap();
    make_slot(&rig.config, &mut rig.sql, SLOT).await;
    let error = refused(&rig, rig.options()).await;
    let Error::SlotAhead { confirmed_lsn, progress_lsn, .. } = error else { panic!("{error}") };
    assert_eq!(progress_lsn, rig.start_lsn);
    assert_eq!(confirmed_lsn, rig.confirmed().await);
    slot::drop(&mut rig.sql, SLOT).await.unwrap();
    let sql = format!("select pg_create_logical_replication_slot('{SLOT}', 'test_decoding')");
    rig.sql.execute(&sql).await.unwrap();
    let error = refused(&rig, rig.options()).await;
    assert!(matches!(error, Error::SlotForeign { what: "plugin", .. }), "{error}");
}

#[tokio::test]
async fn a_stream_from_another_system_or_past_is_refused() {
    let rig = Rig::new(&[], TABLE, &["t"]).await;
    let recorded = Recorded { system_identifier: "7".to_string(), ..rig.recorded.clone() };
    let error = refused(&rig, StreamOptions { recorded, ..rig.options() }).await;
    assert!(matches!(&error, Error::AnotherSystem { expected, .. } if expected == "7"), "{error}");
    let ahead = StreamOptions { start_lsn: Lsn(rig.start_lsn.0 + (1 << 40)), ..rig.options() };
    let error = refused(&rig, ahead).await;
    assert!(matches!(error, Error::Behind { .. }), "{error}");
}

#[tokio::test]
async fn a_promotion_is_followed_if_it_lost_nothing_and_refused_if_it_did() {
    let mut rig = Rig::new(&[], TABLE, &["t"]).await;
    if rig.sql.major_version() < 12 {
        return; // Neither standby.signal nor pg_promote().
    }
    rig.sql.execute("insert into public.t values (1)").await.unwrap();
    promote(&rig.server);
    let mut session = replication(&rig.config).await;
    check_continuity(&mut session, SLOT, &rig.recorded, rig.start_lsn).await.unwrap();
    rig.sql = Session::connect(&rig.config, Purpose::Sql).await.unwrap();
    rig.sql.execute("insert into public.t values (2)").await.unwrap();
    let beyond = rig.lsn("select pg_current_wal_flush_lsn()").await;
    let error = check_continuity(&mut session, SLOT, &rig.recorded, beyond).await.unwrap_err();
    let Error::AnotherTimeline { fork_lsn, found_timeline: 2, .. } = error else {
        panic!("{error}")
    };
    assert!(rig.start_lsn < fork_lsn && fork_lsn < beyond);
    let mut reader = Reader::start(&rig.config, rig.options(), 1 << 20).await;
    rig.mark().await;
    assert_eq!(reader.until_mark().await.len(), 2);
    reader.end().await.unwrap();
}

/// Restarts the server as a standby of nobody and promotes it: the next timeline.
fn promote(server: &Server) {
    server.stop(StopMode::Fast).unwrap();
    std::fs::write(server.data_dir().join("standby.signal"), "").unwrap();
    server.resume().unwrap();
    assert_eq!(server.psql("postgres", "select pg_promote()").unwrap(), "t");
}

#[tokio::test]
async fn a_slot_whose_wal_was_removed_is_refused() {
    let mut rig = Rig::new(&[], TABLE, &["t"]).await;
    if rig.sql.major_version() < 13 {
        return; // Slots keep WAL without limit.
    }
    rig.sql.execute("alter system set max_slot_wal_keep_size = '1MB'").await.unwrap();
    rig.sql.execute("select pg_reload_conf()").await.unwrap();
    rig.wait_for("select setting from pg_settings where name = 'max_slot_wal_keep_size'", "1")
        .await;
    for _ in 0..3 {
        rig.sql.execute("insert into public.t select max(id) + 1 from public.t").await.ok();
        rig.sql.execute("select pg_logical_emit_message(true, 'x', 'x')").await.unwrap();
        rig.sql.execute("select pg_switch_wal()").await.unwrap();
    }
    rig.sql.execute("checkpoint").await.unwrap();
    let status = slot::status(&mut rig.sql, SLOT).await.unwrap().unwrap();
    assert_eq!(status.wal_status.as_deref(), Some("lost"), "{status:?}");
    let error = refused(&rig, rig.options()).await;
    assert!(matches!(error, Error::SlotLost { .. }), "{error}");
    assert!(error.to_string().contains("max_slot_wal_keep_size"), "{error}");
}
