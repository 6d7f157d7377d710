//! Failure stories of other tools that need the whole cycle to be told: values, keys, partitions,
//! views, triggers and rights under one move there and back.

use super::*;

const SCHEMA: &str = r#"
create type grade as enum ('low', 'high');
alter type grade add value 'middle' after 'low';
commit;
create collation backwards (provider = icu, locale = 'en-u-kf-upper');
create table "Mixed Case" ("The Key" grade, "n" int, tags grade[], primary key ("The Key", "n"));
create table word (w text collate backwards primary key, n int);
create table toasted (id int primary key, big text, n int);
alter table toasted alter big set storage external;
create table numbered (id int generated always as identity primary key, n int,
    twice int generated always as (n * 2) stored);
create table full_row (a int, b text);
alter table full_row replica identity full;
create table exact (id int primary key, f float8, n numeric, d date, t timestamptz, b bytea, j jsonb,
    v varchar(20));
create table pair (a int, b text, c int, u int unique, primary key (a, b));
create table parent (id int primary key);
create table child (id int primary key, parent int references parent on delete cascade);
create table fired (n int);
alter table fired replica identity full;
create function fire() returns trigger language plpgsql as
    $$ begin insert into public.fired values (1); return new; end $$;
create trigger fire after insert on parent for each row execute function fire();
create table part (id int, at date, note text, primary key (id, at)) partition by range (at);
create table part_1 partition of part for values from ('2024-01-01') to ('2024-07-01');
create table part_2 partition of part for values from ('2024-07-01') to ('2025-01-01');
create materialized view summary as select count(*) as rows, 1 as one from part;
create unique index on summary (one);
insert into "Mixed Case" values ('low', 1, '{high,low}'), ('high', 2, '{}'), ('middle', 3, null);
insert into word values ('a', 1), ('A', 2), ('b', 3);
insert into toasted select i, repeat(md5(i::text), 300), 0 from generate_series(1, 5) i;
insert into numbered (n) values (1), (2);
insert into full_row values (1, null), (1, null), (2, 'x');
insert into parent values (1), (2); insert into child values (1, 1), (2, 2);
insert into part values (1, '2024-02-02', 'a'), (2, '2024-08-08', 'b');
insert into pair select i, 'k' || i, i, i from generate_series(1, 2000) i;
"#;

/// One transaction for each story; after it both sides must be the same.
const STORIES: &[(&str, &str)] = &[
    ("pgcopydb_710 unchanged TOAST", "update toasted set n = n + 1"),
    (
        "pgdog toasted migration: a key change with unchanged TOAST",
        "update toasted set id = id + 100 where id <= 3",
    ),
    (
        "ingestr_805 insert and update in one batch",
        "insert into toasted values (50, repeat('y', 9000), 0); update toasted set n = 9 where id = 50",
    ),
    (
        "pgcopydb_976 identity always and generated columns",
        "insert into numbered (n) values (7); update numbered set n = 70 where n = 7; \
         update numbered set n = n where n = 1",
    ),
    (
        "pgcopydb_706 nulls under a full identity, pgdog: one duplicate only",
        "delete from full_row where ctid = (select min(ctid) from full_row); \
         update full_row set a = a where a = 2; update full_row set b = null where a = 2",
    ),
    (
        "estuary and sequin_2149 enum keys",
        "update \"Mixed Case\" set tags = '{middle}' \
         where \"The Key\" >= 'middle'; delete from \"Mixed Case\" where \"The Key\" = 'low'; \
         insert into \"Mixed Case\" values ('low', 9, '{low,middle,high}')",
    ),
    (
        "vitess_9715 keys under another collation",
        "update word set n = 20 where w = 'A'; delete from word where w = 'a'; \
         insert into word values ('B', 4)",
    ),
    (
        "pgcopydb_980 and peerdb_1226 exact numbers, infinite dates",
        "insert into exact values (1, 0.1::float8 + 0.2, 'NaN', 'infinity', '-infinity', '\\xdeadbeef', \
         '{\"a\": \"\\\\u00e9\"}', 'it''s \"q\"'), (2, 'NaN', 1e-20, '12024-01-01', \
         '0044-03-15 BC', '', 'null', ''), (3, '-Infinity', 123456789012345678901234567890.5, \
         '-infinity', '2024-10-27 02:30:00.123456+02', null, '[]', E'back\\\\slash')",
    ),
    ("pgstream_1024 thousands of deletes by a composite key", "delete from pair where a <= 1500"),
    (
        "peerdb_4169 another unique key moves within a batch",
        "update pair set u = -u where a > 1500; update pair set u = -u + 1 where a > 1500",
    ),
    (
        "peerdb_4219 cascades",
        "delete from parent where id = 1; insert into parent values (10); \
         insert into child values (10, 10)",
    ),
    (
        "pgdog_b8bade1c every partition, and a row that moves between two",
        "update part set at = '2024-09-09' where id = 1; insert into part values (3, '2024-03-03', 'c')",
    ),
    (
        "pgcopydb_949 truncate of a partitioned table",
        "truncate part; insert into part values (4, '2024-04-04', 'd')",
    ),
    (
        "truncate of one partition",
        "insert into part values (5, '2024-08-08', 'e'); truncate part_2",
    ),
    (
        "pgcopydb_555 savepoints rolled back",
        "savepoint a; insert into word values ('gone', 0); \
         rollback to a; insert into word values ('kept', 0)",
    ),
];

async fn play(live: &Server, other: &Server, step: usize) {
    for (story, sql) in STORIES {
        let mark = step.to_string();
        live.psql("app", &format!("begin; {sql}; insert into mark values ({mark}); commit"))
            .unwrap_or_else(|e| panic!("{story}: {e}"));
    }
    // Decoded as changes of a table that is not one; must neither be applied nor stop anything.
    live.psql("app", "refresh materialized view concurrently summary").unwrap();
    live.psql("app", &format!("insert into mark values (-{step})")).unwrap();
    let mut session = session(other, "app").await;
    let sql = format!("select exists (select from public.mark where n = -{step})");
    until_sql(&mut session, &sql).await;
}

/// Includes pgcopydb_981: REFRESH MATERIALIZED VIEW CONCURRENTLY on the live side.
#[tokio::test(flavor = "multi_thread")]
async fn pgcopydb_981_and_other_stories_there_and_back() {
    let ends = Ends::start(15, 15);
    source(&ends, SCHEMA);
    source(&ends, "create table mark (n int); alter table mark replica identity full");
    let run = following(&ends).await;
    play(&ends.source, &ends.target, 1).await;
    ends.done(&["verify"]).await;
    ends.done(&["cutover"]).await;
    // What differs now differs by what the stories did before: put their ground back.
    target(
        &ends,
        "delete from exact; delete from pair where a > 0; delete from word where w in ('kept', 'B'); \
         insert into word values ('a', 1); delete from \"Mixed Case\" where n = 9; \
         insert into \"Mixed Case\" values ('low', 1, null); delete from toasted; \
         insert into toasted select i, repeat(md5(i::text), 300), 0 from generate_series(1, 5) i; \
         delete from child; delete from parent; insert into parent values (1), (2); \
         insert into pair select i, 'k' || i, i, i from generate_series(1, 2000) i; \
         delete from part; insert into part values (1, '2024-02-02', 'a')",
    );
    play(&ends.target, &ends.source, 2).await;
    ends.done(&["verify"]).await;
    ends.done(&["rollback"]).await;
    ends.done(&["verify"]).await;
    stop(run).await;
    same_rows(&ends).await;
    // Triggers fired once, where the application wrote.
    let fired = "select count(*) from fired";
    let (here, there) = (ends.source.psql("app", fired), ends.target.psql("app", fired));
    assert_eq!((here.unwrap(), there.unwrap()), ("6".to_string(), "6".to_string()));
}
