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
