//! Snapshots: shared, and exact about what they see.

use walferry::pg::Session;
use walferry::source::{Error, begin_with_snapshot, snapshot};

use super::rig::{Rig, make_slot};
use crate::support;

async fn count(session: &mut Session) -> String {
    session.query("select count(*) from public.t").await.unwrap()[0].string(0).unwrap()
}

#[tokio::test]
async fn an_exported_snapshot_sees_the_same_from_every_session_until_it_is_closed() {
    let server = support::server();
    let mut writer = support::session(&server, "postgres").await;
    let mut open = support::session(&server, "postgres").await;
    writer
        .execute("create table public.t (id int); insert into public.t values (1)")
        .await
        .unwrap();
    open.execute("begin; insert into public.t values (2)").await.unwrap();
    let open_xid = open.query("select txid_current()").await.unwrap()[0].parse::<u64>(0).unwrap();
    let exported = snapshot::export(support::session(&server, "postgres").await).await.unwrap();
    open.execute("commit").await.unwrap();
    let late = "begin; insert into public.t values (3); select txid_current(); commit";
    let late_xid: u64 = writer.query(late).await.unwrap()[0].parse(0).unwrap();
    let end_lsn =
        writer.query("select pg_current_wal_flush_lsn()").await.unwrap()[0].lsn(0).unwrap();
    assert!(exported.lsn < end_lsn);
    let mut reader = support::session(&server, "postgres").await;
    let seen = begin_with_snapshot(&mut reader, &exported.name).await.unwrap();
    assert_eq!(seen, exported.snapshot);
    assert_eq!(count(&mut reader).await, "1");
    assert!(!seen.sees(open_xid as u32) && !seen.sees(late_xid as u32));
    assert!(seen.sees(open_xid as u32 - 1));
    reader.execute("commit").await.unwrap();
    let name = exported.name.clone();
    let mut session = exported.close().await.unwrap();
    assert_eq!(count(&mut session).await, "3");
    let error = begin_with_snapshot(&mut reader, &name).await.unwrap_err();
    assert!(matches!(error, Error::SnapshotGone { .. }), "{error}");
    assert!(!reader.in_transaction());
}

#[tokio::test]
async fn a_slot_and_its_snapshot_meet_without_gap_or_overlap() {
    let mut rig = Rig::new(&[], "create table public.t (id int)", &["t"]).await;
    rig.sql.execute("alter table public.t replica identity full").await.unwrap();
    rig.sql.execute("insert into public.t values (1)").await.unwrap();
    let held = make_slot(&rig.config, &mut rig.sql, "s").await;
    rig.sql.execute("insert into public.t values (2)").await.unwrap();
    let mut reader = support::session(&rig.server, "postgres").await;
    begin_with_snapshot(&mut reader, &held.snapshot_name).await.unwrap();
    assert_eq!(count(&mut reader).await, "1");
    let mut options = rig.options();
    (options.slot, options.start_lsn) = ("s".to_string(), held.consistent_lsn);
    let mut stream = super::rig::Reader::start(&rig.config, options, 1 << 20).await;
    rig.mark().await;
    assert_eq!(super::rig::shown(&stream.until_mark().await), [["I t (2)"]]);
    stream.end().await.unwrap();
}
