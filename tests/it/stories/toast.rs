//! Values too large for their row, which the stream leaves out where they did not change.

use super::*;

/// Out of line: external plain, external compressed, and of a domain and an array.
const LARGE: &str = "
    create domain note as text;
    create table doc (id int primary key, big text, j jsonb, b bytea, d note, a text[], n int);
    alter table doc alter big set storage external, alter b set storage external,
        alter d set storage external;
    insert into doc select i, repeat(md5(i::text), 300),
        (select jsonb_object_agg(k, md5(k::text)) from generate_series(i, i + 400) k),
        decode(repeat(md5(i::text), 300), 'hex'), repeat(md5(i::text), 200),
        array(select md5(k::text) from generate_series(1, 300) k), 0
        from generate_series(1, 8) i";

/// pgcopydb wrote the word for \"unchanged\" as the value.
#[tokio::test(flavor = "multi_thread")]
async fn pgcopydb_877_unchanged_toast_is_not_written_as_a_word() {
    told(
        "pgcopydb_877",
        LARGE,
        "update doc set n = n + 1; update doc set big = big || 'x' where id = 2; \
         update doc set b = '\\x00', n = 5 where id = 3; update doc set n = 7 where id in (2, 3)",
        "update doc set n = n + 1; update doc set j = '{}' where id = 4; \
         update doc set a = null, d = repeat('y', 5000) where id = 5; update doc set n = -n",
    )
    .await;
}

/// NULL was written where the value had not changed.
#[tokio::test(flavor = "multi_thread")]
async fn pgcopydb_710_unchanged_toast_does_not_become_null() {
    let story = Story::copied("pgcopydb_710", LARGE).await;
    story.source(
        "update doc set n = 1; update doc set big = null where id = 1; update doc set n = 2",
    );
    story.follows("").await;
    let kept = "select count(big), count(j), count(b), count(d), count(a) from doc";
    assert_eq!(story.target(kept), "7|8|8|8|8");
}

/// \"Set REPLICA IDENTITY FULL\" was the advice, and then only the new row was read, in which the
/// value is missing all the same.
#[tokio::test(flavor = "multi_thread")]
async fn xtdb_5542_under_full_identity_unchanged_toast_is_found_by_and_kept() {
    told(
        "xtdb_5542",
        &format!(
            "{LARGE}; alter table doc drop constraint doc_pkey; \
            alter table doc replica identity full; \
            create table keyed (id int primary key, big text, n int); \
            alter table keyed alter big set storage external; \
            alter table keyed replica identity full; \
            insert into keyed select i, repeat(md5(i::text), 300), 0 from generate_series(1, 4) i"
        ),
        "update doc set n = n + 1; update doc set id = id + 10 where id > 4; \
         update keyed set n = 1; update keyed set id = -id where id = 2; delete from doc where \
         id = 1",
        "update doc set n = n + 1 where id = 2; delete from doc where id = 11; \
         update keyed set n = 2; delete from keyed where id = 1",
    )
    .await;
}

/// Folded into one insert, the row lost its value.
#[tokio::test(flavor = "multi_thread")]
async fn ingestr_805_an_insert_and_its_update_in_one_batch_keep_the_value() {
    let insert = "insert into doc (id, big, n) values (50, repeat('y', 9000), 0)";
    told(
        "ingestr_805",
        LARGE,
        &format!(
            "begin; {insert}; update doc set n = 9 where id = 50; commit; \
             insert into doc (id, big, n) values (51, repeat('z', 9000), 0); \
             update doc set n = 1 where id = 51; update doc set n = 2 where id = 51; \
             delete from doc where id = 1; \
             insert into doc (id, big, n) values (1, repeat('w', 9000), 0); \
             update doc set n = 3 where id = 1; \
             update doc set big = repeat('v', 9000) where id = 2; update doc set n = 4 where id = 2"
        ),
        "update doc set big = repeat('u', 9000) where id = 50; update doc set n = 10 where id = \
            50; \
         begin; update doc set big = null where id = 51; update doc set n = 11 where id = 51; \
         commit",
    )
    .await;
}

/// PgDog: a changed key whose row has unchanged TOAST cannot be made a delete and an insert, as the
/// value is nowhere in the stream.
#[tokio::test(flavor = "multi_thread")]
async fn pgdog_toasted_row_migration_a_key_changes_over_unchanged_toast() {
    told(
        "pgdog_toasted_row_migration",
        &format!(
            "{LARGE}; create table part (k int, at int, big text, primary key (k, at)) \
            partition by range (at); \
            create table part_1 partition of part for values from (0) to (10); \
            create table part_2 partition of part for values from (10) to (20); \
            alter table part alter big set storage external; \
            insert into part select i, i, repeat(md5(i::text), 300) from generate_series(1, 15) i"
        ),
        "update doc set id = id + 100 where id <= 3; update doc set id = 1 where id = 102; \
         update doc set n = 5 where id = 1; update part set at = at + 10 where k < 5; \
         update part set k = -k where at > 10",
        "update doc set id = id + 1000, n = 9 where id > 5; \
         begin; update doc set id = 77 where id = 4; update doc set id = 78 where id = 77; commit; \
         update part set at = 3 where k = -12",
    )
    .await;
}
