//! Tables of every make: partitioned, inheriting, without columns, with as many as there can be.

use super::*;

const PARTED: &str = "create table p (id int, at int, v text, primary key (id, at)) \
        partition by range (at); \
    create table p_1 partition of p for values from (0) to (10); \
    create table p_2 partition of p for values from (10) to (20); \
    create table p_rest partition of p default; \
    insert into p select i, i, 'v' || i from generate_series(1, 30) i";
const WRITES: &str = "update p set v = v || '!' where id % 2 = 0; delete from p where id % 7 = 0; \
    update p set at = at + 10 where id in (3, 15); insert into p values (100, 5, 'new')";

/// Rows of the whole table, whatever it is made of.
fn same_rows(story: &Story) {
    let rows = "select string_agg(concat_ws(',', id, at, v), ';' order by id, at) from p";
    assert_eq!(story.target(rows), story.source(rows));
}

/// The stream names partitions. Where the target's are plain tables of those names under one view
/// of them, or under other bounds, rows go where they are named.
#[tokio::test(flavor = "multi_thread")]
async fn partitions_that_are_plain_tables_on_the_target() {
    let story = Story::copied("parted_plain", PARTED).await;
    story.target(
        "alter table p detach partition p_1; alter table p detach partition p_2; \
         alter table p detach partition p_rest; drop table p; \
         create view p as select * from p_1 union all select * from p_2 union all \
            select * from p_rest",
    );
    story.source(WRITES);
    let mut run = story.spawn(&["run"]);
    story.arrived(&mut run).await;
    story.source("truncate p_2; insert into p values (200, 12, 'live')");
    story.arrived(&mut run).await;
    same_rows(&story);
    run.signal("INT");
    run.ended().await.expect_success();
}

/// A partition of the source is itself partitioned on the target, by something else.
#[tokio::test(flavor = "multi_thread")]
async fn partitions_that_are_partitioned_again_on_the_target() {
    let story = Story::copied("parted_again", PARTED).await;
    story.target(
        "alter table p detach partition p_1; alter table p_1 rename to old; \
         alter table old rename constraint p_1_pkey to old_pkey; \
         create table p_1 partition of p for values from (0) to (10) partition by hash (id); \
         create table p_1_a partition of p_1 for values with (modulus 2, remainder 0); \
         create table p_1_b partition of p_1 for values with (modulus 2, remainder 1); \
         insert into p_1 select * from old; drop table old",
    );
    story.source(WRITES);
    let mut run = story.spawn(&["run"]);
    story.arrived(&mut run).await;
    story.source(
        "alter table p_1 replica identity full; update p set v = 'x' where at < 5; \
        delete from p where at = 6; truncate p_rest",
    );
    story.arrived(&mut run).await;
    same_rows(&story);
    run.signal("INT");
    run.ended().await.expect_success();
}

/// Each table of a family holds rows of its own, and may have columns of its own.
#[tokio::test(flavor = "multi_thread")]
async fn inheritance_keeps_each_tables_rows_apart() {
    told(
        "inheritance",
        "create table person (id int primary key, name text); \
         create table worker (wage numeric, primary key (id)) inherits (person); \
         create table boss (car text, primary key (id)) inherits (worker); \
         insert into person values (1, 'p'); insert into worker values (1, 'w', 10); \
         insert into boss values (1, 'b', 20, 'red')",
        "update person set name = name || '!'; insert into boss values (2, 'bb', 1, null); \
         delete from only person where id = 1",
        "truncate only person; update worker set wage = wage + 1; delete from person where id = 2; \
         insert into person values (9, 'only me')",
    )
    .await;
}

/// Rows without a column can only be counted; under a full identity one goes at a time.
#[tokio::test(flavor = "multi_thread")]
async fn tables_without_columns_keep_their_number_of_rows() {
    let story = Story::copied(
        "no_columns",
        "create table nothing (); alter table nothing replica identity full; \
         insert into nothing select from generate_series(1, 5); \
         create table dropped (a int); insert into dropped values (1), (2); \
         alter table dropped drop column a",
    )
    .await;
    story.source("insert into nothing default values; insert into dropped default values");
    story
        .follows(
            "delete from nothing where ctid = (select min(ctid) from nothing); \
        insert into nothing select from generate_series(1, 3); insert into dropped default values",
        )
        .await;
    assert_eq!(
        story.target("select (select count(*) from nothing), (select count(*) from dropped)"),
        "8|4"
    );
}

/// As many columns as PostgreSQL lets a table have, by key and by everything.
#[tokio::test(flavor = "multi_thread")]
async fn tables_of_1600_columns_are_copied_and_followed() {
    let columns: Vec<String> = (2..=1600).map(|i| format!("c{i} int")).collect();
    let some = "c2 = c1 * 2, c800 = -c1, c1600 = 7";
    told(
        "columns_1600",
        &format!(
            "create table wide (c1 int primary key, {0}); \
            create table heap (c1 int, {0}); alter table heap replica identity full; \
            insert into wide (c1, c2, c1600) select i, i, i from generate_series(1, 10) i; \
            insert into heap (c1, c2, c1600) select i, i, i from generate_series(1, 10) i",
            columns.join(", ")
        ),
        &format!(
            "update wide set {some} where c1 < 5; update heap set {some} where c1 < 5; \
            delete from heap where c1 = 6; update wide set c1 = -c1 where c1 > 8"
        ),
        &format!(
            "insert into wide (c1, c1599) values (11, 11); update heap set {some}; \
            delete from wide where c1 = 7; update heap set c1 = null where c1 = 1"
        ),
    )
    .await;
}

/// Two databases of one server under two jobs, and into two databases of one other.
#[tokio::test(flavor = "multi_thread")]
async fn several_databases_of_one_server_move_beside_each_other() {
    let schema = "create table t (id int primary key, v text); insert into t values (1, 'x')";
    let (one, two) = (Story::of("of_several_1", schema), Story::of("of_several_2", schema));
    let (mut first, mut second) = (one.spawn(&["run"]), two.spawn(&["run"]));
    first.says("following").await;
    second.says("following").await;
    one.source("update t set v = 'one'");
    two.source("update t set v = 'two'; insert into t values (2, 'two')");
    one.arrived(&mut first).await;
    two.arrived(&mut second).await;
    one.done(&["cutover"]).await;
    two.source("update t set v = 'still here' where id = 2");
    two.arrived(&mut second).await;
    one.target("update t set v = 'over there'");
    one.done(&["rollback"]).await;
    one.done(&["finish"]).await;
    first.ended().await.expect_success();
    one.same().await;
    two.same().await;
    second.signal("INT");
    second.ended().await.expect_success();
}

/// What textual decoders print of tables of every make, they are asked for by name only.
#[tokio::test(flavor = "multi_thread")]
async fn tables_of_every_make_are_followed_by_textual_decoders() {
    let columns: Vec<String> = (2..=1600).map(|i| format!("c{i} int")).collect();
    let schema = format!(
        "{PARTED}; \
         create table person (id int primary key, name text); \
         create table worker (wage numeric, primary key (id)) inherits (person); \
         insert into person values (1, 'p'); insert into worker values (1, 'w', 10); \
         create table nothing (); alter table nothing replica identity full; \
         insert into nothing select from generate_series(1, 5); \
         create table wide (c1 int primary key, {0}); \
         insert into wide (c1, c2, c1600) select i, i, i from generate_series(1, 10) i; \
         create table made (gone text, id int generated always as identity primary key, \
             twice int generated always as (n * 2) stored, n int, big text); \
         alter table made drop gone, alter big set storage external; \
         insert into made (n, big) select i, repeat('x', 9000) from generate_series(1, 9) i",
        columns.join(", ")
    );
    let at_once = format!(
        "{WRITES}; update person set name = name || '!'; delete from only person where id = 1; \
         insert into nothing default values; update wide set c800 = -c1, c1599 = 5 where c1 < 6; \
         update wide set c1 = -c1 where c1 > 8; update made set n = -n where id < 4; \
         update made set id = default where id = 5; delete from made where id = 6"
    );
    let live = "truncate p_2; insert into p values (200, 12, 'live'); \
         alter table p attach partition later for values from (300) to (310); \
         insert into p values (301, 305, 'later'); update p set at = 1 where id = 301; \
         delete from nothing where ctid = (select min(ctid) from nothing); truncate only person; \
         insert into worker values (7, 'seven', 'NaN'); delete from wide where c1 = 7; \
         update made set big = big || 'y' where id = 1; update made set n = 0";
    let servers = alone((15, 15));
    for (decoder, transport) in [("test_decoding", "stream"), ("wal2json", "pull")] {
        let live = match decoder {
            // 2.5 has no NaN.
            "wal2json" => live.replace("'NaN'", "1.50"),
            _ => live.to_string(),
        };
        let name = format!("every_make_{decoder}");
        let schema = format!("{schema}; create table later (like p including all)");
        let story = Story::between(servers, &name, "", &schema);
        let how = ["--decoder", decoder, "--transport", transport, "--no-nan"];
        story.done(&[&["run", "--until", "following"], &how[..]].concat()).await;
        story.target("alter table p attach partition later for values from (300) to (310)");
        story.source(&at_once);
        let mut run = story.spawn(&["run", "--no-nan"]);
        story.arrived(&mut run).await;
        for sql in live.split("; ") {
            story.source(sql);
        }
        story.arrived(&mut run).await;
        story.same().await;
        run.signal("INT");
        run.ended().await.expect_success();
    }
}
