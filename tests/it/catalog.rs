//! Tests of the catalog queries against real servers.

use walferry::catalog::{Selection, TableKind, sequences, tables};
use walferry::change::ReplicaIdentity;

use crate::support;

#[tokio::test]
async fn tables_tell_their_keys_columns_and_partitions() {
    let server = support::server();
    let mut session = support::session(&server, "postgres").await;
    session
        .execute(
            "create schema \"S x\"; \
             create table public.a (id int, b text, c int generated always as (1) stored, \
                z int, primary key (b, id) include (z)); \
              \
             create table public.b (x int not null unique, y int unique); \
             create table public.full_one (x int); alter table public.full_one replica identity full; \
             create table \"S x\".\"T.y\" (id bigint generated always as identity primary key); \
             create table public.p (k int primary key) partition by range (k); \
             create table public.p1 partition of public.p for values from (0) to (10); \
             create sequence public.s increment -2 cache 5; select nextval('public.s');",
        )
        .await
        .unwrap();
    let tables = tables(&mut session, &Selection::default()).await.unwrap();
    let find = |name: &str| tables.iter().find(|t| t.name.name == name).unwrap();
    assert_eq!(tables.len(), 6);
    let b = find("b");
    assert_eq!(b.key, ["x"]);
    assert!(b.identity_columns.is_empty() && !b.is_identified());
    assert_eq!(find("full_one").identity, ReplicaIdentity::Full);
    assert!(find("T.y").columns[0].identity_always);
    assert_eq!(find("p").kind, TableKind::Partitioned);
    assert_eq!(find("p1").partition_of.as_ref().unwrap().name, "p");
    assert_eq!(find("p1").identity_columns, ["k"]);
    let a = find("a");
    assert!(a.columns.iter().any(|c| c.generated));
    assert_eq!(a.stored_columns().count(), 3);
    assert_eq!(a.identity_columns, ["b", "id"]);
    let sequences = sequences(&mut session).await.unwrap();
    let s = sequences.iter().find(|s| s.name.name == "s").unwrap();
    assert_eq!((s.last_value, s.is_called, s.increment, s.cache), (-9, true, -2, 5));
}
