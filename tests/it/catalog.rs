//! Tests of the catalog queries against real servers.

use walferry::catalog::{Selection, TableKind, describe, sequences, tables};
use walferry::change::ReplicaIdentity;
use walferry::demo::binaries;
use walferry::demo::server::Server;
use walferry::id::QualifiedName;

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
             create table public.late (k int primary key deferrable); \
             create table public.p (k int primary key) partition by range (k); \
             create table public.p1 partition of public.p for values from (0) to (10); \
             create sequence public.s increment -2 cache 5; select nextval('public.s');",
        )
        .await
        .unwrap();
    let tables = tables(&mut session, &Selection::default()).await.unwrap();
    let find = |name: &str| tables.iter().find(|t| t.name.name == name).unwrap();
    assert_eq!(tables.len(), 7);
    let b = find("b");
    assert_eq!(b.key, ["x"]);
    assert!(b.identity_columns.is_empty() && !b.is_identified());
    // A deferrable key is no identity, though it is the primary key.
    assert!(find("late").identity_columns.is_empty() && !find("late").is_identified());
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

/// A table's identity, and for each column its name, type, modifier and what it is besides.
async fn told(session: &mut walferry::pg::Session, schema: &str, name: &str) -> String {
    let name = QualifiedName::new(schema, name);
    let Some(table) = describe(session, &name).await.unwrap() else { return "none".to_string() };
    assert_eq!(table.name, name);
    let columns = table.columns.iter().map(|c| {
        let flag = |set: bool, letter: &'static str| if set { letter } else { "" };
        let (key, not_null) = (flag(c.key, "k"), flag(c.not_null, "n"));
        let flags = format!("{key}{not_null}{}", flag(c.generated, "g"));
        format!("{} {} {} {flags}", c.name, c.type_name, c.type_modifier)
    });
    let columns: Vec<_> = columns.collect();
    format!("{:?}: {}", table.identity, columns.join("; "))
}

#[tokio::test]
async fn a_table_is_described_as_the_decoders_need_it_on_every_server() {
    for major in (10..=18).filter(|major| binaries::is_installed(*major)) {
        let server = Server::start(&Server::bin_of(major).unwrap(), &[]).unwrap();
        let mut session = support::session(&server, "postgres").await;
        let sql = "create schema \"S x\"; create type \"S x\".\"Mood\" as enum ('a'); \
             create table public.plain (gone int, \"I d\" int, n numeric(10,2), b text not null, \
                m \"S x\".\"Mood\"[], primary key (b, \"I d\")); \
             alter table public.plain drop column gone; \
             create table public.deferred (id int primary key deferrable); \
             create table public.keyless (v varchar(5)); \
             create table public.every (id int primary key, v text); \
             alter table public.every replica identity full; \
             create table \"S x\".\"T.y\" (a int not null, b int not null); \
             create unique index u on \"S x\".\"T.y\" (b); \
             alter table \"S x\".\"T.y\" replica identity using index u; \
             create table public.empty ()";
        session.execute(sql).await.unwrap();
        let s = &mut session;
        assert_eq!(
            told(s, "public", "plain").await,
            "Default: I d integer -1 kn; n numeric(10,2) 655366 ; b text -1 kn; \
             m \"S x\".\"Mood\"[] -1 "
        );
        assert_eq!(told(s, "public", "deferred").await, "Default: id integer -1 n");
        assert_eq!(told(s, "public", "keyless").await, "Default: v character varying(5) 9 ");
        assert_eq!(told(s, "public", "every").await, "Full: id integer -1 n; v text -1 ");
        assert_eq!(told(s, "S x", "T.y").await, "Index: a integer -1 n; b integer -1 kn");
        assert_eq!(told(s, "public", "empty").await, "Default: ");
        assert_eq!(told(s, "public", "missing").await, "none");
        if s.major_version() >= 12 {
            let sql = "create table public.g (id int, d int generated always as (id) stored)";
            s.execute(sql).await.unwrap();
            assert_eq!(told(s, "public", "g").await, "Default: id integer -1 ; d integer -1 g");
        }
        if s.major_version() >= 11 {
            let sql = "create table public.i (id int, v int, primary key (id) include (v))";
            s.execute(sql).await.unwrap();
            assert_eq!(told(s, "public", "i").await, "Default: id integer -1 kn; v integer -1 ");
        }
    }
}
