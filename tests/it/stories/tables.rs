//! Partitions, views, foreign keys and triggers.

use super::*;

const PARTED: &str = "
    create table part (id int, at date, note text, primary key (id, at)) partition by range (at);
    create table part_1 partition of part for values from ('2024-01-01') to ('2024-07-01');
    create table part_2 partition of part for values from ('2024-07-01') to ('2025-01-01')
        partition by list (id);
    create table part_2_odd partition of part_2 for values in (1, 3, 5, 7, 9);
    create table part_2_rest partition of part_2 default;
    create index by_note on part (note);
    insert into part select i, '2024-03-03', 'spring' from generate_series(1, 6) i;
    insert into part select i, '2024-09-09', 'autumn' from generate_series(1, 6) i";

/// Only the first child's changes came.
#[tokio::test(flavor = "multi_thread")]
async fn pgdog_b8bade1c_every_partition_is_followed_and_rows_move_between_them() {
    let story = Story::copied("pgdog_b8bade1c", PARTED).await;
    story.source(
        "insert into part values (7, '2024-02-02', 'a'), (7, '2024-08-08', 'b'), \
         (8, '2024-08-08', 'c'); update part set at = '2024-10-10' where note = 'spring' and id \
             < 3; \
         update part set id = 20 where note = 'autumn' and id = 5",
    );
    story
        .follows(
            "update part set note = note || '!'; delete from part where id = 6; \
         update part set at = '2024-01-01' where id = 20",
        )
        .await;
    let leaves = "select string_agg(t || n, ' ' order by t) from (select \
        tableoid::regclass::text t, \
        count(*) n from part group by 1) x";
    assert_eq!(story.target(leaves), story.source(leaves));
    assert_eq!(story.target(leaves).split(' ').count(), 3);
}

/// An index was attached before it was there, and the parent's stayed invalid.
#[tokio::test(flavor = "multi_thread")]
async fn pgstream_1094_indexes_of_partitioned_tables_are_valid() {
    let story = Story::copied(
        "pgstream_1094",
        &format!(
            "{PARTED}; create unique index one on part (id, at, note); \
            create index on only part (at); \
            alter table part add constraint u unique (at, id)"
        ),
    )
    .await;
    let valid = "select string_agg(indexrelid::regclass || ':' || indisvalid, ' ' order by 1) \
        from pg_index where indrelid::regclass::text like 'part%'";
    let valid = valid.replace("order by 1", "order by indexrelid::regclass::text");
    assert_eq!(story.target(&valid), story.source(&valid));
    assert!(story.target(&valid).contains("by_note:t"), "{}", story.target(&valid));
    story.follows("update part set note = 'x' where id = 1").await;
}

/// TRUNCATE ONLY of a partitioned table is an error.
#[tokio::test(flavor = "multi_thread")]
async fn pgcopydb_949_a_partitioned_table_is_emptied_with_its_partitions() {
    told(
        "pgcopydb_949",
        PARTED,
        "truncate part; insert into part values (4, '2024-04-04', 'd')",
        "begin; insert into part values (5, '2024-08-08', 'e'); truncate part; \
         insert into part values (6, '2024-08-08', 'f'); commit",
    )
    .await;
}

/// Published through its root, the truncation of one leaf is in no stream.
#[tokio::test(flavor = "multi_thread")]
async fn etl_docs_truncate_of_one_leaf_is_followed() {
    let story = Story::copied("etl_docs_truncate", PARTED).await;
    story.source("insert into part values (9, '2024-08-08', 'e'); truncate part_2_odd");
    story
        .follows(
            "truncate part_1; insert into part values (1, '2024-01-01', 'new'); \
        truncate part_2",
        )
        .await;
    assert_eq!(story.target("select count(*) from part"), "1");
}

const VIEWED: &str = "
    create table sale (id int primary key, amount int);
    insert into sale select i, i from generate_series(1, 10) i;
    create materialized view total as select count(*) as rows, 1 as one from sale;
    create unique index on total (one);
    create materialized view \"Unfilled\" as select * from sale with no data";

/// REFRESH ... CONCURRENTLY is decoded as changes of the view, which nobody can write.
#[tokio::test(flavor = "multi_thread")]
async fn pgcopydb_981_a_view_refreshed_concurrently_stops_nothing() {
    told(
        "pgcopydb_981",
        VIEWED,
        "insert into sale values (11, 11); refresh materialized view concurrently total",
        "delete from sale where id < 5; refresh materialized view concurrently total; \
         refresh materialized view \"Unfilled\"; insert into sale values (12, 12); \
         refresh materialized view concurrently total",
    )
    .await;
}

/// A view with rows of before, or without any, was what applications found.
#[tokio::test(flavor = "multi_thread")]
async fn pgstream_633_materialized_views_are_filled_and_can_be_refreshed() {
    let story = Story::copied("pgstream_633", VIEWED).await;
    assert_eq!(story.target("select rows from total"), "10");
    let filled = "select relispopulated from pg_class where relname = 'Unfilled'";
    assert_eq!(story.target(filled), "f");
    story.source("insert into sale values (11, 11)");
    story.follows("delete from sale where id = 1; delete from sale where id = 2").await;
    story.target("refresh materialized view concurrently total");
    assert_eq!(story.target("select rows from total"), "9");
}

const FAMILY: &str = "
    create table parent (id int primary key);
    create table child (id int primary key, parent int references parent on delete cascade);
    create table grandchild (id int primary key, child int references child on delete set null);
    create table fired (n int, what text);
    alter table fired replica identity full;
    create function fire() returns trigger language plpgsql as
        $$ begin insert into public.fired values (1, tg_op); return null; end $$;
    create trigger fire after insert or update or delete on parent
        for each row execute function fire();
    create function change() returns trigger language plpgsql as
        $$ begin new.id := new.id + 1000; return new; end $$;
    create trigger change before insert on grandchild for each row execute function change();
    insert into parent select i from generate_series(1, 5) i;
    insert into child select i, i from generate_series(1, 5) i;
    insert into grandchild select i, i from generate_series(1, 5) i";

/// What a foreign key does to other rows was done twice, and triggers wrote rows of their own.
#[tokio::test(flavor = "multi_thread")]
async fn peerdb_4219_triggers_and_cascades_act_once() {
    let story = Story::copied("peerdb_4219", FAMILY).await;
    story.source(
        "delete from parent where id = 1; insert into parent values (10); \
         insert into child values (10, 10); insert into grandchild values (10, 10)",
    );
    story
        .follows(
            "update parent set id = 20 where id = 4 and false; delete from child where id = 2; \
        delete from parent where id = 2; insert into grandchild values (11, 3)",
        )
        .await;
    assert_eq!(story.target("select count(*) from fired"), "8");
    assert_eq!(story.target("select count(*) from grandchild where id > 2000"), "0");
}

/// Alibaba DTS notes that cascades diverge while the target checks no keys: rows whose parent went
/// on the source must go, and the keys must hold at the end.
#[tokio::test(flavor = "multi_thread")]
async fn alibaba_dts_cascades_do_not_diverge_and_keys_hold_in_the_end() {
    let story = Story::copied("alibaba_dts", FAMILY).await;
    story.source(
        "begin; insert into child values (30, 3); delete from parent where id = 3; commit; \
         insert into parent values (3); insert into child values (30, 3); \
         begin; delete from parent; insert into parent values (50); commit",
    );
    story
        .follows(
            "insert into child values (50, 50); delete from parent; \
        insert into parent values (60); insert into child values (60, 60)",
        )
        .await;
    let orphans = "select count(*) from child c where not exists \
        (select from parent p where p.id = c.parent)";
    assert_eq!(story.target(orphans), "0");
    assert_eq!(
        story.target("select bool_and(convalidated) from pg_constraint where contype = 'f'"),
        "t"
    );
    let refused = story.target.psql(&story.name, "insert into child values (70, 70)").unwrap_err();
    assert!(refused.to_string().contains("violates foreign key"), "{refused}");
}

/// Made with its index and again as a constraint.
#[tokio::test(flavor = "multi_thread")]
async fn pgcopydb_965_exclusion_constraints_are_made_once_and_hold() {
    let story = Story::copied(
        "pgcopydb_965",
        "create table room (id int, during tsrange, exclude using gist (during with &&)); \
         alter table room replica identity full; \
         insert into room select i, tsrange('2024-01-01'::timestamp + i * interval '1 hour', \
             '2024-01-01'::timestamp + (i + 1) * interval '1 hour') from generate_series(1, 20) i",
    )
    .await;
    story.source(
        "update room set during = during - tsrange(lower(during), lower(during) + \
        interval '10 minutes') where id < 5",
    );
    story
        .follows(
            "delete from room where id = 7; update room set during = \
        tsrange(lower(during), upper(during) + interval '1 hour') where id = 6",
        )
        .await;
    assert_eq!(story.target("select count(*) from pg_constraint where contype = 'x'"), "1");
    let refused = story.target.psql(&story.name, "insert into room select * from room limit 1");
    assert!(refused.unwrap_err().to_string().contains("exclusion constraint"));
}

/// Two days before the switch of a billing system, sequences were found where they stood before the
/// copy.
#[tokio::test(flavor = "multi_thread")]
async fn akingundogdu_sequences_are_past_every_value_after_the_switch() {
    let story = Story::copied(
        "akingundogdu",
        "create table bill (id serial primary key, n int); create sequence loose increment -3 \
             minvalue -1000000 maxvalue 0 start 0; create sequence cached cache 50; \
         create sequence \"Odd Seq\" start 77; select setval('cached', 10)",
    )
    .await;
    story.source(
        "insert into bill (n) select 1 from generate_series(1, 200); \
        select nextval('loose') from generate_series(1, 10); select nextval('cached')",
    );
    let mut run = story.spawn(&["run"]);
    story.arrived(&mut run).await;
    let given = |server: &str| match server {
        "source" => {
            story.source("select nextval('loose'), nextval('cached'), nextval('\"Odd Seq\"')")
        }
        _ => story.target("select nextval('loose'), nextval('cached'), nextval('\"Odd Seq\"')"),
    };
    let numbers =
        |text: String| -> Vec<i64> { text.split('|').map(|n| n.parse().unwrap()).collect() };
    let before = numbers(given("source"));
    story.done(&["cutover"]).await;
    story.target("insert into bill (n) values (2)");
    assert_eq!(story.target("select id > 200 from bill where n = 2"), "t");
    let after = numbers(given("target"));
    assert!(after[0] < before[0] && after[1] > before[1] && after[2] > before[2], "{after:?}");
    story.done(&["rollback"]).await;
    story.same().await;
    story.source("insert into bill (n) values (3)");
    let past = "select (select id from bill where n = 3) > (select id from bill where n = 2)";
    assert_eq!(story.source(past), "t");
    story.done(&["finish"]).await;
    run.ended().await.expect_success();
}
