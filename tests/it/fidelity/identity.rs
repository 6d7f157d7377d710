//! How rows are identified, and tables whose columns differ on the two sides.

use super::*;

/// USING INDEX over NOT NULL columns, beside a primary key and without one.
#[tokio::test(flavor = "multi_thread")]
async fn identity_by_an_index_finds_rows() {
    told(
        "identity_index",
        "create table t (id int primary key, k text not null, n int not null, v text); \
         create unique index \"the key\" on t (n, k) include (v); \
         alter table t replica identity using index \"the key\"; \
         create table u (k text not null unique, v text); \
         alter table u replica identity using index u_k_key; \
         insert into t select i, 'k' || i, i, 'v' from generate_series(1, 20) i; \
         insert into u select k, v from t",
        "update t set v = 'w' where id < 5; update t set id = id + 100 where id > 15; \
         update t set k = 'x' || k where n = 7; delete from t where n = 8; \
         update u set k = upper(k) where k like 'k1%'; delete from u where k = 'k2'",
        "update t set n = n + 1000, v = null where id > 100; update u set v = k; \
         delete from u where v = 'K1'",
    )
    .await;
}

/// NOTHING lets inserts through, and the source itself refuses the rest.
#[tokio::test(flavor = "multi_thread")]
async fn identity_nothing_is_for_inserts_only() {
    let story = Story::copied(
        "identity_nothing",
        "create table log (id int primary key, v text); alter table log replica identity nothing; \
         insert into log values (1, 'a')",
    )
    .await;
    story.source("insert into log select i, 'b' from generate_series(2, 50) i");
    let refused = story.source.psql(&story.name, "update log set v = 'c'").unwrap_err().to_string();
    assert!(refused.contains("replica identity"), "{refused}");
    story
        .follows("insert into log values (100, 'c'); truncate log; insert into log values (7, 'd')")
        .await;
    let check = story.spawn(&["check", "--json"]).ended().await;
    assert!(check.out.contains("replica identity is NOTHING"), "{}", check.out);
}

/// Each kind of identity after each other, in the middle of transactions and of a stopped stream.
#[tokio::test(flavor = "multi_thread")]
async fn identity_changes_in_flight() {
    let index = "alter table t replica identity using index t_k_key";
    told(
        "identity_in_flight",
        "create table t (id int primary key, k text not null unique, v text); \
         insert into t select i, 'k' || i, null from generate_series(1, 30) i",
        &format!(
            "update t set v = 'a' where id = 1; alter table t replica identity full; \
            update t set v = 'b', id = 101 where id = 2; delete from t where id = 3; {index}; \
            update t set v = 'c', id = 104 where id = 4; update t set k = 'x5' where id = 5; \
            delete from t where id = 6; begin; update t set v = 'd' where id = 7; \
            alter table t replica identity default; update t set v = 'e', id = 108 where id = 8; \
            delete from t where id = 9; commit; update t set k = 'x10' where id = 10"
        ),
        &format!(
            "begin; {index}; update t set k = 'y' || k where id = 11; \
            alter table t replica identity full; update t set v = 'f' where id = 12; \
            delete from t where id = 13; commit; delete from t where id = 14; \
            alter table t drop constraint t_pkey; update t set v = 'g', id = -id where id = 15; \
            alter table t add primary key (id); alter table t replica identity default; \
            update t set id = 116 where id = 16"
        ),
    )
    .await;
}

/// Columns are matched by name: another order, more of them, dropped ones on either side.
#[tokio::test(flavor = "multi_thread")]
async fn columns_in_another_order_and_more_of_them() {
    let story = Story::copied(
        "columns_order",
        "create table t (gone int, a int, b text, id int primary key, gone_too text, c numeric); \
         alter table t drop column gone, drop column gone_too; \
         insert into t select i, 'b' || i, i, i * 1.50 from generate_series(1, 20) i",
    )
    .await;
    story.target(
        "create table other (x int, c numeric, extra text default 'of the target', \
             id int primary key, stamp int generated always as (id * 2) stored, b text, a int, \
             serial bigserial); alter table other drop column x; \
         insert into other (c, id, b, a) select c, id, b, a from t; drop table t; \
         alter table other rename to t",
    );
    story.source(
        "insert into t values (21, 'new', 21, 0); update t set b = 'u' where id < 4; \
        update t set id = id + 100 where id = 5; delete from t where id = 6",
    );
    let mut run = story.spawn(&["run"]);
    story.arrived(&mut run).await;
    story.source(
        "alter table t replica identity full; update t set c = 9 where id = 7; \
        delete from t where id = 8; insert into t values (22, 'live', 22, 1)",
    );
    story.arrived(&mut run).await;
    let rows = "select string_agg(concat_ws(',', a, b, id, c), ';' order by id) from t";
    assert_eq!(story.target(rows), story.source(rows));
    let extra = "select count(distinct serial), count(*), bool_and(stamp = id * 2), \
        bool_and(extra = 'of the target') from t";
    assert_eq!(story.target(extra), "20|20|t|t");
    run.signal("INT");
    run.ended().await.expect_success();
}

/// Computed when read (18) or stored: never written, on whichever side it is computed.
#[tokio::test(flavor = "multi_thread")]
async fn generated_columns_of_the_target_are_computed_there() {
    let schema = "create table t (id int primary key, n int); \
        insert into t select i, i from generate_series(1, 10) i";
    let story = Story::between(servers(15, 18), "generated", "", schema);
    story.done(&["run", "--until", "following"]).await;
    story.target(
        "alter table t add twice int generated always as (n * 2) virtual, \
        add thrice int generated always as (n * 3) stored",
    );
    story.source("insert into t values (11, 11); update t set n = n + 100 where id < 3");
    let mut run = story.spawn(&["run"]);
    story.arrived(&mut run).await;
    story.source(
        "alter table t replica identity full; update t set n = 7 where id = 4; \
        delete from t where id = 5",
    );
    story.arrived(&mut run).await;
    let rows = "select string_agg(id || '/' || n, ' ' order by id) from t";
    assert_eq!(story.target(rows), story.source(rows));
    assert_eq!(story.target("select bool_and(twice = n * 2 and thrice = n * 3) from t"), "t");
    story.target("alter table t drop twice, drop thrice");
    story.source(
        "alter table t replica identity default; \
        alter table t add twice int generated always as (n * 2) stored",
    );
    story.target("alter table t add twice int generated always as (n * 2) virtual");
    story.source("update t set n = n + 1");
    story.arrived(&mut run).await;
    story.done(&["cutover"]).await;
    story.target(
        "update t set n = n + 1; insert into t values (50, 50); delete from t where id = 1",
    );
    story.done(&["rollback"]).await;
    let rows = "select string_agg(concat_ws('/', id, n, twice), ' ' order by id) from t";
    assert_eq!(story.target(rows), story.source(rows));
    story.done(&["finish"]).await;
    run.ended().await.expect_success();
}
