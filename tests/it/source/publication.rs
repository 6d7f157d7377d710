//! The publication: exactly the job's tables.

use walferry::id::QualifiedName;
use walferry::pg::{Config, Purpose, Session};
use walferry::source::{Error, publication};

use super::rig::names;
use crate::support;

const P: &str = "walferry_shop_forward";

#[tokio::test]
async fn a_publication_covers_exactly_its_tables_and_can_be_ensured_again() {
    let server = support::server();
    let mut session = support::session(&server, "postgres").await;
    session
        .execute(
            "create table public.a (id int primary key); create table public.b (id int); \
             create table public.b_child () inherits (public.b); \
             create table public.\"T.x\" (id int); create table public.left_out (id int); \
             create table public.p (k int) partition by range (k); \
             create table public.p1 partition of public.p for values from (0) to (10) \
               partition by range (k); \
             create table public.p11 partition of public.p1 for values from (0) to (5);",
        )
        .await
        .unwrap();
    let first =
        publication::ensure(&mut session, P, &names(&["a", "p", "p1", "p11"])).await.unwrap();
    assert!(first.created);
    // The top of the tree stands for the rest, also for what is attached later; before 13, leaves.
    let tree = names(if session.major_version() >= 13 { &["p"] } else { &["p11"] });
    let listed = publication::list(&mut session, P).await.unwrap().unwrap();
    assert_eq!(listed, [names(&["a"]), tree.clone()].concat());
    let wanted = names(&["a", "b", "T.x", "p11"]);
    let second = publication::ensure(&mut session, P, &wanted).await.unwrap();
    assert!(!second.created);
    let (added, removed) = if tree == names(&["p"]) {
        (names(&["T.x", "b", "p11"]), tree)
    } else {
        (names(&["T.x", "b"]), vec![])
    };
    assert_eq!((second.added, second.removed), (added, removed));
    let third = publication::ensure(&mut session, P, &wanted).await.unwrap();
    assert_eq!(third, Default::default());
    // An inheritance child is not part of its parent.
    let listed = publication::list(&mut session, P).await.unwrap().unwrap();
    assert_eq!(listed, names(&["T.x", "a", "b", "p11"]));
    let emptied = publication::ensure(&mut session, P, &[]).await.unwrap();
    assert_eq!(emptied.removed.len(), 4);
    assert!(publication::drop(&mut session, P).await.unwrap());
    assert!(!publication::drop(&mut session, P).await.unwrap());
    assert_eq!(publication::list(&mut session, P).await.unwrap(), None);
}

#[tokio::test]
async fn a_publication_changed_behind_our_back_is_mended() {
    let server = support::server();
    let mut session = support::session(&server, "postgres").await;
    if session.major_version() < 15 {
        return; // No row filters and column lists.
    }
    session
        .execute(&format!(
            "create table public.a (id int primary key, v int); \
             create publication {P} for table public.a (id) where (id > 5) \
               with (publish = 'insert', publish_via_partition_root = true)"
        ))
        .await
        .unwrap();
    let mended = publication::ensure(&mut session, P, &names(&["a"])).await.unwrap();
    assert_eq!(mended.added, names(&["a"]));
    let row = session
        .query(
            "select pubinsert and pubupdate and pubdelete and pubtruncate and not pubviaroot, \
               (select prqual is null and prattrs is null from pg_publication_rel) \
             from pg_publication",
        )
        .await
        .unwrap()
        .remove(0);
    assert!(row.bool(0).unwrap() && row.bool(1).unwrap());
    let again = publication::ensure(&mut session, P, &names(&["a"])).await.unwrap();
    assert_eq!(again, Default::default());
}

#[tokio::test]
async fn what_cannot_be_published_is_refused_before_anything_is_changed() {
    let server = support::server();
    let mut session = support::session(&server, "postgres").await;
    session
        .execute(
            "create table public.a (id int); create unlogged table public.u (id int); \
             create table public.p (k int) partition by range (k); \
             create unlogged table public.p1 partition of public.p for values from (0) to (9); \
             create publication everything for all tables; \
             create role weak login; grant create on database postgres to weak",
        )
        .await
        .unwrap();
    let error = publication::ensure(&mut session, P, &names(&["a", "u", "p"])).await.unwrap_err();
    let Error::Unlogged { tables } = &error else { panic!("{error}") };
    assert_eq!(*tables, names(&["p1", "u"]));
    assert!(error.to_string().contains("alter table \"public\".\"u\" set logged"), "{error}");
    let error = publication::ensure(&mut session, P, &names(&["nowhere"])).await.unwrap_err();
    assert!(matches!(error, Error::TablesMissing { .. }), "{error}");
    let error = publication::ensure(&mut session, "everything", &names(&["a"])).await.unwrap_err();
    assert!(matches!(error, Error::PublicationForeign { .. }), "{error}");
    assert_eq!(publication::list(&mut session, P).await.unwrap(), None);
    let uri = server.uri("postgres").replace("postgres@", "weak@");
    let mut weak = Session::connect(&Config::parse(&uri).unwrap(), Purpose::Sql).await.unwrap();
    let tables = [QualifiedName::new("public", "a")];
    let error = publication::ensure(&mut weak, P, &tables).await.unwrap_err();
    assert!(matches!(error, Error::PublicationRefused { .. }), "{error}");
}
