//! Conflicts settled by the greater value in a column, in both directions: every pair of changes
//! once with the greater value on the source and once on the target, which is written first and so
//! would lose by commit time.

use std::time::Duration;

use walferry::demo::server::Server;

use super::{assert_equal, both, drain, ends, last_record, open, until_within};
use crate::support::Walferry;
use crate::support::job::Ends;

/// Types whose order is not that of their text, and a value that is out of line.
const TYPED: &[(&str, &str, &str, &str)] = &[
    ("stamped", "timestamptz", "9999-01-01 00:00+00", "10000-01-01 00:00+00"),
    ("numbered", "numeric", "9.5", "10"),
    ("ranked", "positive", "9", "10"),
    ("labelled", "mood", "low", "high"),
    ("named", "text", "B", "a"),
];

/// Tables that the column does not settle, each for another reason.
const UNFIT: &str = "create table placed (id int primary key, rev point); \
    create table listed (id int primary key, rev int[]); \
    create table made (id int primary key, rev int generated always as (id + 1) stored); \
    create table hidden (id int primary key, rev text)";

fn typed(ends: &Ends) {
    let types = "create type mood as enum ('low', 'high'); \
         create domain positive as int check (value > 0)";
    ends.source.psql("app", types).unwrap();
    for (table, of, less, _) in TYPED {
        let sql = format!(
            "create table {table} (id int primary key, rev {of}, note text, filler text); \
             insert into {table} select i, '{less}', 'copied' from generate_series(1, 8) i"
        );
        ends.source.psql("app", &sql).unwrap();
    }
    let named = "alter table named replica identity full; \
         alter table named alter rev set storage external; \
         update named set rev = repeat('m', 5000) where id in (3, 4)";
    ends.source.psql("app", named).unwrap();
}

/// Both sides write, and know nothing of each other. `first` has the greater values.
fn differ(first: &Server, second: &Server, base: u32) {
    let key = |n: u32| base + n;
    let set = |server: &Server, n: u32, rev: &str| {
        let sql = format!("update tagged set note = 'new', rev = {rev} where id = {}", key(n));
        server.psql("app", &sql).unwrap();
    };
    let insert = |server: &Server, n: u32, tag: &str, rev: &str| {
        let sql = format!("insert into tagged values ({}, '{tag}-{base}', 'new', {rev})", key(n));
        server.psql("app", &sql).unwrap();
    };
    let delete = |server: &Server, n: u32| {
        server.psql("app", &format!("delete from tagged where id = {}", key(n))).unwrap();
    };
    set(first, 1, "10");
    set(first, 2, "1");
    set(first, 3, "7");
    delete(first, 4);
    set(first, 5, "null");
    delete(first, 6);
    insert(first, 1000, "insert", "10");
    insert(first, 1001, "same", "10");
    // What won falls, goes, or comes again.
    set(first, 7, "10");
    set(first, 7, "1");
    set(first, 8, "10");
    delete(first, 8);
    delete(first, 9);
    insert(first, 9, "again", "1");
    set(first, 10, "10");
    set(first, 10, "null");

    set(second, 1, "9");
    set(second, 2, "null");
    set(second, 3, "7");
    set(second, 4, "null");
    delete(second, 5);
    delete(second, 6);
    insert(second, 1000, "insert", "9");
    insert(second, 1002, "same", "9");
    set(second, 7, "3");
    set(second, 8, "3");
    set(second, 9, "3");
    set(second, 10, "3");
}

/// What both sides have after [`differ`]: by whom each row is.
fn expected(first: &str, second: &str, base: u32) -> String {
    let mut rows = Vec::new();
    for (n, rev, who) in [
        (1, "10", first),
        (2, "1", first),
        (3, "7", "source"),
        (4, "null", second),
        (5, "null", first),
        (7, "1", first),
        (9, "3", second),
        (10, "null", first),
        (1000, "10", first),
        (1001, "10", first),
    ] {
        rows.push(format!("{} {rev} {who}", base + n));
    }
    rows.join(", ")
}

/// Notes say who wrote a row, without a trigger of ours having to know.
const AUTHOR: &str = "create function author() returns trigger language plpgsql as $$ begin \
    new.note := '{side}'; return new; end $$; \
    create trigger author before insert or update on tagged for each row \
    execute procedure author()";

fn rows(base: u32) -> String {
    format!(
        "select string_agg(id || ' ' || coalesce(rev::text, 'null') || ' ' || note, ', ' \
         order by id) from tagged where id between {base} + 1 and {base} + 10 \
         or id between {base} + 1000 and {base} + 1002"
    )
}

/// A value of each type that is greater, and less by its text; and one that stays out of line.
fn type_by_type(ends: &Ends) {
    for (table, _, less, greater) in TYPED {
        for (id, first, second) in
            [(1, &ends.source, &ends.target), (2, &ends.target, &ends.source)]
        {
            let update = |rev: &str, note: &str| {
                format!("update {table} set rev = '{rev}', note = '{note}' where id = {id}")
            };
            first.psql("app", &update(greater, "wins")).unwrap();
            second.psql("app", &update(less, "loses")).unwrap();
        }
    }
    let stays = "update named set note = 'wins' where id = 3";
    ends.source.psql("app", stays).unwrap();
    ends.target.psql("app", "update named set rev = 'a', note = 'loses' where id = 3").unwrap();
    ends.source.psql("app", "update named set note = 'loses' where id = 4").unwrap();
    ends.target.psql("app", "update named set rev = 'z', note = 'wins' where id = 4").unwrap();
}

/// One side changes a row's key, and the other deletes the row or updates it later: rows `from` to
/// `from` + 3, the last two of which stay with what was updated.
fn move_keys(ends: &Ends, table: &str, note: &str, from: u32) {
    let sides = [(&ends.source, &ends.target), (&ends.target, &ends.source)];
    for (n, (moves, other)) in (0u32..).zip(sides) {
        let run = |server: &Server, set: &str, id: u32| {
            server.psql("app", &format!("{set} where id = {id}")).unwrap();
        };
        for id in [from + n, from + 2 + n] {
            run(moves, &format!("update {table} set id = id + 100, {note} = 'moved'"), id);
        }
        run(other, &format!("delete from {table}"), from + n);
        run(other, &format!("update {table} set {note} = 'stayed'"), from + 2 + n);
    }
}

fn assert_moved(ends: &Ends, table: &str, note: &str, from: u32) {
    let sql = format!(
        "select string_agg(id - {from} || {note}, ',' order by id) from {table} \
         where id between {from} and {from} + 103 and {note} in ('moved', 'stayed')"
    );
    let rows = "2stayed,3stayed,100moved,101moved,102moved,103moved".to_string();
    assert_eq!(both(ends, &sql), (rows.clone(), rows), "{table}");
}

async fn stopped(mut run: Walferry) -> String {
    let stops = || {
        let stops = run.has_ended();
        async move { stops }
    };
    until_within(Duration::from_secs(30), "it stops", stops).await;
    run.ended().await.err
}

async fn refused_where_it_does_not_fit(ends: &Ends) {
    ends.source.psql("app", UNFIT).unwrap();
    let checked = ends.walferry(&["check", "--two-way", "--on-conflict", "greatest:rev"]).await;
    for part in [
        "public.counted: there is no column rev",
        "--on-conflict greatest:rev,last-commit",
        "public.listed, public.placed: two values of column rev have no order",
        "public.made: the stream does not bring column rev",
        "public.hidden: a value of column rev may be out of line",
        "ALTER TABLE \"public\".\"hidden\" REPLICA IDENTITY FULL;",
    ] {
        assert!(checked.out.contains(part), "{part}: {checked:?}");
    }
    ends.source.psql("app", "drop table placed, listed, made, hidden").unwrap();
    let refused = ends.walferry(&["run", "--two-way", "--on-conflict", "greatest:rev"]).await;
    assert!(refused.err.contains("public.counted: there is no column rev"), "{refused:?}");
    let checked =
        ends.walferry(&["check", "--two-way", "--on-conflict", "greatest:rev,last-commit"]).await;
    assert!(!checked.out.contains("column rev"), "{checked:?}");
}

async fn told_when_it_changes(ends: &Ends) {
    let fell = "select count(*) from pg_trigger where tgname = 'walferry_main_fell'";
    let noted = both(ends, fell);
    assert_eq!(noted, ("7".to_string(), "7".to_string()));
    let refused = ends.walferry(&["run", "--two-way", "--on-conflict", "greatest:other"]).await;
    assert!(refused.err.contains("there is no column other"), "{refused:?}");
    assert_eq!(ends.status().await["on_conflict"], "greatest:rev,last-commit");
    let run = open(ends, &["--on-conflict", "target"]).await;
    drain(ends, Duration::from_secs(30)).await;
    let said = "settled by target from now on, and were by greatest:rev,last-commit";
    assert!(run.so_far().contains(said), "{}", run.so_far());
    assert_eq!(both(ends, fell), ("0".to_string(), "0".to_string()));
    run.kill9().await;
    let run = open(ends, &["--on-conflict", "greatest:rev,last-commit"]).await;
    until_within(Duration::from_secs(30), "triggers", async || both(ends, fell) == noted).await;
    run.kill9().await;
}

/// Nothing but the source could tell the value, and that may be another version's by now.
async fn a_value_that_no_stream_shows_stops_by_name(ends: &Ends) {
    for server in [&ends.source, &ends.target] {
        server.psql("app", "alter table named replica identity default").unwrap();
    }
    ends.target.psql("app", "update named set rev = repeat('n', 5000) where id = 3").unwrap();
    ends.source.psql("app", "update named set note = 'unseen' where id = 3").unwrap();
    let said = stopped(ends.spawn(&["run", "--two-way"])).await;
    assert!(said.contains("an UPDATE of public.named met"), "{said}");
    assert!(said.contains("end the job with walferry finish"), "{said}");
}

/// Kinds and outcomes on record on a side since the record `after`, with how many.
fn counted_records(server: &Server, after: &str) -> String {
    let sql = format!(
        "select string_agg(kind || ' ' || outcome || ' ' || n, ', ' order by kind, outcome) from ( \
         select kind, outcome, count(*) as n from walferry.conflict where id > {after} \
         group by 1, 2) c"
    );
    server.psql("app", &sql).unwrap()
}

/// Of both rounds of [`differ`], alike on both sides but for equal values, which the source wins,
/// and the table that goes by commit time; four rows of two tables change their keys.
fn recorded(applied: &str, kept: &str) -> String {
    format!(
        "delete_missing kept 4, delete_update kept 3, insert_insert applied 1, \
         insert_insert kept 2, unique applied 1, unique kept 1, update_delete applied 4, \
         update_delete kept 3, update_update applied {applied}, update_update kept {kept}"
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn the_greater_value_in_a_column_wins_on_both_sides() {
    let ends = ends((15, 15), &["track_commit_timestamp=on"]);
    typed(&ends);
    refused_where_it_does_not_fit(&ends).await;
    let run = open(&ends, &["--on-conflict", "greatest:rev,last-commit"]).await;
    for (server, side) in [(&ends.source, "source"), (&ends.target, "target")] {
        server.psql("app", &AUTHOR.replace("{side}", side)).unwrap();
    }
    run.kill9().await;

    let after = (last_record(&ends.source), last_record(&ends.target));
    differ(&ends.source, &ends.target, 0);
    differ(&ends.target, &ends.source, 10);
    type_by_type(&ends);
    move_keys(&ends, "numbered", "note", 5);
    // By commit time.
    move_keys(&ends, "counted", "side", 2);
    for (server, note) in [(&ends.source, "first"), (&ends.target, "second")] {
        let sql = format!("update counted set side = '{note}' where id = 1");
        server.psql("app", &sql).unwrap();
    }
    let run = open(&ends, &[]).await;
    drain(&ends, Duration::from_secs(30)).await;
    assert_equal(&ends);
    for (base, first, second) in [(0, "source", "target"), (10, "target", "source")] {
        let expected = expected(first, second, base);
        assert_eq!(both(&ends, &rows(base)), (expected.clone(), expected));
    }
    for (table, ..) in TYPED {
        let sql = format!("select string_agg(note, ',' order by id) from {table} where id < 3");
        assert_eq!(
            both(&ends, &sql),
            ("wins,wins".to_string(), "wins,wins".to_string()),
            "{table}"
        );
    }
    let stayed =
        "select string_agg(note || left(rev, 1), ',' order by id) from named where id in (3, 4)";
    assert_eq!(both(&ends, stayed), ("winsm,winsz".to_string(), "winsm,winsz".to_string()));
    assert_moved(&ends, "numbered", "note", 5);
    assert_moved(&ends, "counted", "side", 2);
    let counted = "select side from counted where id = 1";
    assert_eq!(both(&ends, counted), ("second".to_string(), "second".to_string()));

    assert_eq!(counted_records(&ends.target, &after.1), recorded("14", "13"));
    assert_eq!(counted_records(&ends.source, &after.0), recorded("13", "14"));
    let by = "select string_agg(distinct policy || ' ' || name, ', ') from walferry.conflict \
         where name in ('counted', 'stamped', 'tagged')";
    let named = "greatest:rev stamped, greatest:rev tagged, last-commit counted".to_string();
    assert_eq!(both(&ends, by), (named.clone(), named));
    let both_rows = "select incoming ->> 'rev', local ->> 'rev', outcome from walferry.conflict \
         where kind = 'update_update' and incoming ->> 'id' = '1' and name = 'tagged'";
    assert_eq!(both(&ends, both_rows), ("9|10|kept".to_string(), "10|9|applied".to_string()));
    run.kill9().await;

    told_when_it_changes(&ends).await;
    a_value_that_no_stream_shows_stops_by_name(&ends).await;
    ends.done(&["finish"]).await;
}
