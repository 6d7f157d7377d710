//! Tests of copy against real servers.

use std::process::{Command, Stdio};
use std::time::Instant;

use walferry::catalog::{Selection, Table, tables};
use walferry::copy::{
    self, CopyProgress, DDL, Error, Format, Freeze, Options, SnapshotSource, export_snapshot,
    visibility,
};
use walferry::demo::server::Server;
use walferry::fault::{Fault, Faulty};
use walferry::pg::{Config, Purpose, Session, SlotKind};

use crate::support;

/// One server with databases `source` and `target`, the same tables in both.
struct Pair {
    server: Server,
}

impl Pair {
    fn new(schema: &str) -> Pair {
        let server = support::server();
        for dbname in ["source", "target"] {
            server.psql("postgres", &format!("create database {dbname}")).unwrap();
            server.psql(dbname, schema).unwrap();
        }
        let pair = Pair { server };
        pair.target("create schema walferry");
        pair.target(DDL);
        pair
    }

    fn source(&self, sql: &str) -> String {
        self.server.psql("source", sql).unwrap()
    }

    fn target(&self, sql: &str) -> String {
        self.server.psql("target", sql).unwrap()
    }

    fn config(&self, dbname: &str) -> Config {
        Config::parse(&self.server.uri(dbname)).unwrap().labelled(dbname)
    }

    fn options(&self, part_bytes: u64) -> Options {
        let mut options = Options::new(self.config("source"), self.config("target"), "j");
        options.part_bytes = part_bytes;
        options
    }

    async fn tables(&self) -> Vec<Table> {
        let mut session = support::session(&self.server, "source").await;
        tables(&mut session, &Selection::default()).await.unwrap()
    }

    /// A session that holds a fresh snapshot.
    async fn holder(&self) -> (Session, SnapshotSource) {
        let mut session = support::session(&self.server, "source").await;
        let snapshot = export_snapshot(&mut session).await.unwrap();
        (session, snapshot)
    }

    async fn run(&self, options: &Options, snapshot: &SnapshotSource) -> Result<(), Error> {
        let tables = self.tables().await;
        copy::run(options, &tables, snapshot, &CopyProgress::new(&tables)).await
    }

    fn same(&self, table: &str) {
        let sql = format!("select t::text from only {table} t order by 1");
        assert_eq!(self.source(&sql), self.target(&sql), "{table}");
    }
}

const TYPES: &str = r#"
create type public.mood as enum ('sad', 'it''s', 'a\b');
create type public.pair as (a int, b text);
create domain public.small as int check (value < 100);
create schema "Odd S";
create table public.kinds (
  id bigint generated always as identity primary key,
  i2 int2, i4 int4, r real, d double precision, n numeric, m money, b bool, c char(5), v varchar(9),
  t text, by bytea, da date, ti time, tt timetz, ts timestamp, tz timestamptz, iv interval, u uuid,
  j json, jb jsonb, ip inet, ci cidr, ma macaddr, bi bit(3), bv bit varying, p point, pg polygon,
  x xml, tv tsvector, tq tsquery, ar int[], ta text[], mo public.mood, ma2 public.mood[], pa
  public.pair,
  paa public.pair[], sm public.small, ra int4range, mr int4multirange, ls pg_lsn, o oid,
  g int generated always as (i4 / 2) stored);
create table public.plain (a int, b bigint, c text, d double precision, e timestamptz, f bytea, g
  uuid, h numeric);
create table "Odd S"."T.""x""
" ("C d
" int, "select" text);
create table public.nothing ();
create table public.made_only (g int generated always as (1) stored);
create table public.empty (a int);
create table public.part (k int, v text) partition by range (k);
create table public.part_1 partition of public.part for values from (0) to (10);
create table public.part_2 (v text, dropped int, k int);
alter table public.part_2 drop column dropped;
alter table public.part attach partition public.part_2 for values from (10) to (20);
create table public.old (a int); create table public.old_child (b int) inherits (public.old);
create table public.log (a int);
"#;

const ROWS: &str = r#"
insert into public.kinds (i2) values (null);
insert into public.kinds (i2, i4, r, d, n, m, b, c, v, t, by, da, ti, tt, ts, tz, iv, u, j, jb, ip,
  ci, ma,
  bi, bv, p, pg, x, tv, tq, ar, ta, mo, ma2, pa, paa, sm, ra, mr, ls, o)
values (-32768, 2147483647, 1.1754944e-38, 0.1 + 0.2, 'NaN', '-1.23', true, 'ab',
  'é"', E'\\N\t\n\r\b\\.',
  '\x00ff5c', 'infinity', '24:00', '01:02+03', '-infinity', '2024-01-01 00:00:00.000001+14',
  '-1 year 2 mons -3 days 04:05:06.7', '00000000-0000-0000-0000-000000000001', '{"a" :  1}',
  '{"a": [null]}',
  '::1/64', '10/8', '08:00:2b:01:02:03', '101', '', '(1e300,-0)', '((0,0),(1,1),(2,0))',
  '<a>&amp;</a>',
  'a:1A b', 'a & !b', '{{1,NULL},{3,4}}', array['NULL', null,
  'a"b,{', ''], 'a\b', '{sad,"it''s",NULL}',
  (1, 'x,"(y')::public.pair, array[(1, null)::public.pair], 99,
  '[1,5)', '{[1,2),[5,)}', 'FF/1', 4294967295),
  (0, 0, 'Infinity', '-Infinity', 1e-200, 0, false, '', '', '', '', '4713-01-01 BC', '00:00',
  '00:00-15',
  '294276-12-31 23:59:59.999999', '4713-01-01 BC', '0', 'ffffffff-ffff-ffff-ffff-ffffffffffff',
  'null', '"\u00e9"',
  '1.2.3.4', '::/0', 'ff:ff:ff:ff:ff:ff', '000', '1', '(NaN,0)', '((0,0))', '', '', '', '{}', '{}',
  'sad', '{}',
  (null, null)::public.pair, '{}', -5, 'empty', '{}', '0/0', 0);
insert into public.plain select i, i::bigint << 32, repeat(chr(9 + i % 300), i % 50), i / 3.0,
  now(),
  decode(md5(i::text), 'hex'), md5(i::text)::uuid, i / 7.0 from generate_series(1, 1000) i;
insert into public.plain (a, b, c) values (null, null, null), (null, 1, null), (1, null, '');
insert into "Odd S"."T.""x""
" values (1, E'a\tb'), (null, null);
insert into public.nothing default values; insert into public.nothing default values;
insert into public.made_only default values; insert into public.made_only default values;
insert into public.part values (1, 'a'), (11, 'b'), (12, null);
insert into public.old values (1); insert into public.old_child values (2, 3), (4, null);
insert into public.log values (1);
"#;

#[tokio::test]
async fn every_kind_of_row_arrives_as_it_was() {
    let names = [
        "public.kinds",
        "public.plain",
        "\"Odd S\".\"T.\"\"x\"\"\n\"",
        "public.nothing",
        "public.made_only",
        "public.empty",
        "public.part_1",
        "public.part_2",
        "public.old",
        "public.old_child",
    ];
    for (format, part_bytes) in [(Format::Text, 8192), (Format::Binary, 1 << 30)] {
        let pair = Pair::new(TYPES);
        pair.source(ROWS);
        let (_holder, snapshot) = pair.holder().await;
        pair.source("insert into public.plain values (-1)"); // after the snapshot
        let options = Options { format, ..pair.options(part_bytes) };
        let selection = Selection::parse(&[], &[], &["public.log".to_string()]).unwrap();
        let mut tables = pair.tables().await;
        tables.retain(|table| selection.has_rows(&table.name));
        let progress = CopyProgress::new(&tables);
        copy::run(&options, &tables, &snapshot, &progress).await.unwrap();
        pair.source("delete from public.plain where a = -1");
        for name in names {
            pair.same(name);
        }
        assert_eq!(pair.target("select count(*) from public.log"), "0");
        let seen = progress.snapshot();
        assert_eq!(seen.rows, 3 + 1003 + 2 + 2 + 2 + 3 + 3, "{seen:?}");
        assert_eq!(seen.fraction, 1.0);
        assert!(seen.tables.iter().all(|table| table.is_done()), "{seen:?}");
        let rows = pair.target("select sum(rows) from walferry.table_copy where state = 'done'");
        assert_eq!(rows, seen.rows.to_string());
    }
}

const WIDE: &str = "create table public.wide (id int primary key, n int, pad text)";

fn fill(pair: &Pair, rows: u32) {
    pair.source(&format!(
        "alter table public.wide alter pad set storage plain; \
         insert into public.wide select i, 0, repeat('x', 500) from generate_series(1, {rows}) i"
    ));
}

#[tokio::test]
async fn a_table_split_by_ctid_is_exact_while_its_rows_move() {
    let pair = Pair::new(WIDE);
    fill(&pair, 20_000);
    let (mut holder, snapshot) = pair.holder().await;
    let mut writer = support::session(&pair.server, "source").await;
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let writing = tokio::spawn(async move {
        let mut rounds = 0;
        while !*stopped.borrow() {
            writer.execute("update public.wide set n = n + 1 where id % 50 = 0").await.unwrap();
            writer.execute("vacuum public.wide").await.unwrap();
            rounds += 1;
        }
        rounds
    });
    pair.run(&pair.options(1 << 20), &snapshot).await.unwrap();
    stop.send(true).unwrap();
    assert!(writing.await.unwrap() > 0);
    let sum = "select count(*), sum(hashtext(t::text)::bigint) from public.wide t";
    let row = holder.query_one(sum, &[]).await.unwrap();
    let expected = format!("{}|{}", row.str(0).unwrap(), row.str(1).unwrap());
    assert_eq!(pair.target(sum), expected);
    let parts = pair.target("select count(*) from walferry.table_copy where state = 'done'");
    assert!(parts.parse::<u32>().unwrap() > 8, "{parts}");
}

/// Kills a backend of the copy's in the middle of its data, once; gives how often it was seen.
async fn kill_copy(server: &Server, dbname: &str) -> u64 {
    let mut watcher = support::session(server, dbname).await;
    let sql = "select pg_catalog.pg_terminate_backend(pid) from pg_catalog.pg_stat_progress_copy \
               where tuples_processed > 10 and datname = current_database() limit 1";
    loop {
        let killed = watcher.query(sql).await.unwrap();
        if !killed.is_empty() {
            return killed.len() as u64;
        }
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_killed_backend_costs_one_part_and_finished_tables_are_not_touched() {
    for side in ["source", "target"] {
        let pair = Pair::new(&format!("{WIDE}; create table public.small (a int)"));
        fill(&pair, 60_000);
        pair.source("insert into public.small values (1), (2)");
        let (_holder, snapshot) = pair.holder().await;
        // The small table first, so that it is finished before.
        let small: Vec<Table> =
            pair.tables().await.into_iter().filter(|t| t.name.name == "small").collect();
        let options = pair.options(1 << 30);
        copy::run(&options, &small, &snapshot, &CopyProgress::new(&small)).await.unwrap();
        let before = pair.target("select xmin, ctid from public.small");
        let run = pair.run(&options, &snapshot);
        let (outcome, killed) = tokio::join!(run, kill_copy(&pair.server, side));
        outcome.unwrap();
        assert_eq!(killed, 1);
        pair.same("public.wide");
        assert_eq!(pair.target("select xmin, ctid from public.small"), before, "{side}");
        // Nothing is left to do, whatever the snapshot.
        let gone = SnapshotSource::Slot { name: "00000000-00000000-1".to_string() };
        pair.run(&options, &gone).await.unwrap();
        assert_eq!(pair.target("select xmin, ctid from public.small"), before, "{side}");
        let dead = pair.target("select pg_relation_size('public.wide') < 60 * 1024 * 1024");
        assert_eq!(dead, "t", "dead rows of the first attempt are gone");
    }
}

/// Forty small tables of some rows each, one of them empty.
fn small_tables() -> (String, String) {
    let (mut schema, mut rows) = (String::new(), String::new());
    for t in 0..40 {
        schema.push_str(&format!("create table public.t{t} (a int, b text[], c text);"));
        rows.push_str(&format!(
            "insert into public.t{t} select g, array['x', null, g::text], repeat('y', g) \
             from generate_series(1, {}) g;",
            t * 7
        ));
    }
    (schema, rows)
}

const SMALL_DONE: &str = "select count(*) filter (where state = 'done'), count(distinct xmin::text) \
                          from walferry.table_copy";

#[tokio::test]
async fn small_tables_are_copied_together_or_one_by_one() {
    for (bundle_tables, commits) in [(64, 8), (1, 40)] {
        let (schema, rows) = small_tables();
        let pair = Pair::new(&schema);
        pair.source(&rows);
        let (_holder, snapshot) = pair.holder().await;
        let options = Options { bundle_tables, jobs: 2, ..pair.options(1 << 30) };
        let tables = pair.tables().await;
        let progress = CopyProgress::new(&tables);
        copy::run(&options, &tables, &snapshot, &progress).await.unwrap();
        assert_eq!(pair.target(SMALL_DONE), format!("40|{commits}"));
        let now = progress.snapshot();
        assert_eq!(now.rows, (0..40).map(|t| t * 7).sum::<u64>());
        assert!(now.tables.iter().all(|table| table.is_done()), "{:?}", now.tables);
        for t in 0..40 {
            pair.same(&format!("public.t{t}"));
        }
    }
}

#[tokio::test]
async fn a_table_refused_in_a_bundle_is_named_and_costs_no_finished_one() {
    let (schema, rows) = small_tables();
    let pair = Pair::new(&schema);
    pair.source(&rows);
    pair.target("alter table public.t17 add constraint few check (a < 100)");
    let (_holder, snapshot) = pair.holder().await;
    let options = Options { jobs: 1, ..pair.options(1 << 30) };
    let error = pair.run(&options, &snapshot).await.unwrap_err();
    assert_eq!(error.fault(), Fault::Stop);
    let text = error.to_string();
    assert!(text.contains("table public.t17:") && text.contains("\"few\""), "{text}");
    let done = "select name, xmin from walferry.table_copy where state = 'done' order by 1";
    let before = pair.target(done);
    let count = before.lines().count();
    assert!(count > 8 && count < 40 && !before.contains("t17|"), "{before}");
    pair.target("alter table public.t17 drop constraint few");
    pair.run(&options, &snapshot).await.unwrap();
    let after = pair.target(done);
    assert!(before.lines().all(|line| after.lines().any(|other| other == line)), "{after}");
    for t in 0..40 {
        pair.same(&format!("public.t{t}"));
    }
}

/// Its rows and its marks are one transaction: after a loss all of it comes again, and only it.
#[tokio::test]
async fn a_bundle_whose_backend_dies_is_copied_again_and_no_other() {
    for side in ["source", "target"] {
        let (schema, rows) = small_tables();
        let pair = Pair::new(&schema);
        pair.source(&rows);
        let mut blocker = support::session(&pair.server, "target").await;
        // Held up before its end, with the rows of all its tables written.
        blocker
            .execute(
                "create function public.wait() returns trigger language plpgsql as $$ begin \
                 if new.name = 't2' and new.state = 'done' then \
                 perform pg_catalog.pg_advisory_xact_lock(1); end if; return new; end $$; \
                 create trigger wait before update on walferry.table_copy for each row \
                 execute function public.wait(); \
                 alter table walferry.table_copy enable always trigger wait; \
                 select pg_catalog.pg_advisory_lock(1)",
            )
            .await
            .unwrap();
        let (_holder, snapshot) = pair.holder().await;
        let options = Options { jobs: 1, ..pair.options(1 << 30) };
        let marks = "select name, xmin from walferry.table_copy where state = 'done' order by 1";
        let killing = async {
            let mut watcher = support::session(&pair.server, "target").await;
            let waits = "select 1 from pg_stat_activity where wait_event_type = 'Lock' \
                         and query ~ 'table_copy c set state'";
            while watcher.query(waits).await.unwrap().is_empty() {
                tokio::task::yield_now().await;
            }
            let before = pair.target(marks);
            let rest = match side {
                "source" => "and state = 'idle in transaction' and query !~ 'export'",
                _ => "and query ~ 'table_copy c set state'",
            };
            let killed = pair.target(&format!(
                "select count(pg_terminate_backend(pid)) from pg_stat_activity \
                 where datname = '{side}' and pid <> pg_backend_pid() \
                 and application_name like 'walferry%' {rest}"
            ));
            assert_ne!(killed, "0");
            blocker.execute("select pg_catalog.pg_advisory_unlock(1)").await.unwrap();
            before
        };
        let (outcome, before) = tokio::join!(pair.run(&options, &snapshot), killing);
        outcome.unwrap();
        let after = pair.target(marks);
        assert!(before.lines().all(|line| after.lines().any(|other| other == line)), "{after}");
        assert!(before.lines().count() < after.lines().count());
        assert_eq!(after.lines().count(), 40);
        for t in 0..40 {
            pair.same(&format!("public.t{t}"));
        }
    }
}

#[tokio::test]
async fn whole_tables_are_written_frozen_or_not_and_hold_the_same() {
    for (freeze, frozen) in [(Freeze::Whole, true), (Freeze::Never, false)] {
        let pair = Pair::new(&format!("{WIDE}; create table public.small (a int)"));
        fill(&pair, 4_000);
        pair.source("insert into public.small values (1)");
        pair.target("create extension pg_visibility");
        let (_holder, snapshot) = pair.holder().await;
        let options = Options { freeze, ..pair.options(1 << 30) };
        pair.run(&options, &snapshot).await.unwrap();
        pair.same("public.wide");
        pair.same("public.small");
        let pages = "select all_frozen > 0, all_frozen * 8192 = pg_relation_size('public.wide') \
                     from pg_visibility_map_summary('public.wide')";
        let expected = if frozen { "t|t" } else { "f|f" };
        assert_eq!(pair.target(pages), expected, "{freeze:?}");
        // To truncate it would take longer than the rows.
        let small = "select all_frozen from pg_visibility_map_summary('public.small')";
        assert_eq!(pair.target(small), "0", "{freeze:?}");
    }
}

/// Between the look and the copy somebody wrote to the target: that is not thrown away.
#[tokio::test]
async fn rows_that_came_to_the_target_meanwhile_are_not_truncated() {
    let pair = Pair::new(WIDE);
    fill(&pair, 4_000);
    let gone = SnapshotSource::Slot { name: "00000000-00000000-1".to_string() };
    let options = pair.options(1 << 30);
    let error = pair.run(&options, &gone).await.unwrap_err();
    assert!(matches!(error, Error::SnapshotLost { .. }), "{error}");
    pair.target("insert into public.wide values (0, 0, 'theirs')");
    let (_holder, snapshot) = pair.holder().await;
    pair.run(&options, &snapshot).await.unwrap();
    let theirs = "select count(*), count(*) filter (where pad = 'theirs') from public.wide";
    assert_eq!(pair.target(theirs), "4001|1");
}

/// Waits until a worker stands before the part that `blocker` holds locked.
async fn wait_for_worker(pair: &Pair) {
    let mut watcher = support::session(&pair.server, "target").await;
    let sql = "select 1 from pg_stat_activity where wait_event_type = 'Lock' \
               and query ~ 'table_copy set begun_at'";
    while watcher.query(sql).await.unwrap().is_empty() {
        tokio::task::yield_now().await;
    }
}

/// PeerDB#1750, pgcopydb#720: the snapshot's holder dies in the middle of a split table.
#[tokio::test]
async fn peerdb_1750_and_pgcopydb_720_a_lost_snapshot_costs_no_finished_table_and_mixes_nothing() {
    let pair = Pair::new(&format!("{WIDE}; create table public.whole (a int)"));
    fill(&pair, 6_000);
    pair.source("insert into public.whole select generate_series(1, 200000)");
    let mut slot = Session::connect(&pair.config("source"), Purpose::Replication).await.unwrap();
    let made = slot.create_slot("s", "test_decoding", SlotKind::Temporary).await.unwrap();
    let snapshot = SnapshotSource::Slot { name: made.snapshot_name.clone() };
    let mut options = pair.options(1 << 20);
    options.jobs = 1;
    let whole: Vec<Table> =
        pair.tables().await.into_iter().filter(|t| t.name.name == "whole").collect();
    copy::run(&options, &whole, &snapshot, &CopyProgress::new(&whole)).await.unwrap();
    let before = pair.target("select min(xmin::text), max(xmin::text) from public.whole");
    pair.source(
        "update public.wide set n = 1 where id % 7 = 0; insert into public.whole values (0)",
    );

    // Three parts of `wide` get done; before the fourth, the holder and the worker die.
    let mut wide = pair.tables().await;
    wide.retain(|t| t.name.name == "wide");
    let parts = walferry::copy::parts::parts(&wide[0], 1 << 20, 15);
    assert!(parts.len() > 3);
    let mut blocker = support::session(&pair.server, "target").await;
    let progress = CopyProgress::new(&wide);
    blocker
        .execute(
            "create function public.wait() returns trigger language plpgsql as $$ begin \
             if new.part = 4 then perform pg_catalog.pg_advisory_xact_lock(1); end if; return new; \
              end $$; \
             create trigger wait before update on walferry.table_copy for each row \
             execute function public.wait(); \
             alter table walferry.table_copy enable always trigger wait; \
             select pg_catalog.pg_advisory_lock(1)",
        )
        .await
        .unwrap();
    let run = copy::run(&options, &wide, &snapshot, &progress);
    let killing = async {
        wait_for_worker(&pair).await;
        drop(slot);
        pair.source(
            "select pg_terminate_backend(pid) from pg_stat_activity \
             where pid <> pg_backend_pid() and datname = 'source'",
        );
        blocker.execute("select pg_catalog.pg_advisory_unlock(1)").await.unwrap();
    };
    let (outcome, ()) = tokio::join!(run, killing);
    let error = outcome.unwrap_err();
    assert!(matches!(error, Error::SnapshotLost { .. }), "{error}");
    assert_eq!(error.fault(), Fault::Retry);
    let done = "select count(*) from walferry.table_copy where name = 'wide' and state = 'done'";
    assert_eq!(pair.target(done), "3");

    pair.source("update public.wide set n = 2 where id % 5 = 0");
    let (mut holder, fresh) = pair.holder().await;
    pair.source("update public.wide set n = 3 where id % 3 = 0");
    pair.run(&options, &fresh).await.unwrap();
    let sum = "select count(*), sum(hashtext(t::text)::bigint) from public.wide t";
    let row = holder.query_one(sum, &[]).await.unwrap();
    let expected = format!("{}|{}", row.str(0).unwrap(), row.str(1).unwrap());
    assert_eq!(pair.target(sum), expected);
    let after = pair.target("select min(xmin::text), max(xmin::text) from public.whole");
    assert_eq!(after, before, "a finished table was touched");
    let mut target = support::session(&pair.server, "target").await;
    let seen = visibility(&mut target, "j").await.unwrap();
    let SnapshotSource::Fresh { snapshot, lsn, .. } = fresh else { panic!("not fresh") };
    let names: Vec<&str> = seen.keys().map(|name| name.name.as_str()).collect();
    assert_eq!(names, ["wide"]);
    assert!(seen.values().all(|value| *value == (snapshot.clone(), lsn)));
}

/// As long as one worker holds the snapshot, the death of its exporter costs nothing.
#[tokio::test]
async fn workers_go_on_without_the_snapshots_holder() {
    let pair = Pair::new(WIDE);
    fill(&pair, 6_000);
    let (holder, snapshot) = pair.holder().await;
    let mut options = pair.options(1 << 20);
    options.jobs = 1;
    let mut blocker = support::session(&pair.server, "target").await;
    blocker.execute("begin; lock table public.wide in share mode").await.unwrap();
    let mut watcher = support::session(&pair.server, "target").await;
    let release = async {
        let sql =
            "select 1 from pg_stat_activity where wait_event_type = 'Lock' and query ~ '^copy'";
        while watcher.query(sql).await.unwrap().is_empty() {
            tokio::task::yield_now().await;
        }
        drop(holder);
        pair.source("update public.wide set n = 9");
        blocker.execute("rollback").await.unwrap();
    };
    let (outcome, ()) = tokio::join!(pair.run(&options, &snapshot), release);
    outcome.unwrap();
    assert_eq!(pair.target("select count(*), max(n) from public.wide"), "6000|0");
}

#[tokio::test]
async fn a_table_rewritten_between_two_parts_is_read_again_whole() {
    let pair = Pair::new(WIDE);
    fill(&pair, 6_000);
    let (_holder, snapshot) = pair.holder().await;
    let options = pair.options(1 << 20);
    pair.run(&options, &snapshot).await.unwrap();
    // As if the worker of part 2 had died, and VACUUM FULL had moved the rows before the next one.
    pair.target(
        "update walferry.table_copy set state = 'todo' where part = 2; delete from public.wide \
         where id % 3 = 0",
    );
    pair.source("delete from public.wide where id < 2000");
    pair.source("vacuum full public.wide");
    let error = pair.run(&options, &snapshot).await.unwrap_err();
    assert!(matches!(error, Error::Rewritten { .. }), "{error}");
    let (_fresh, snapshot) = pair.holder().await;
    pair.run(&options, &snapshot).await.unwrap();
    assert_eq!(pair.target("select count(*), count(distinct id) from public.wide"), "4001|4001");
}

/// A snapshot older than a rewrite or a TRUNCATE sees nothing in the new file, and COPY gives no rows
/// and no error.
#[tokio::test]
async fn a_table_rewritten_or_truncated_after_the_snapshot_is_not_copied_empty() {
    for change in ["alter table public.t alter id type bigint", "truncate public.t"] {
        let pair = Pair::new("create table public.t (id bigint)");
        pair.source("alter table public.t alter id type int");
        pair.source("insert into public.t select generate_series(1, 1000)");
        let (_holder, snapshot) = pair.holder().await;
        let options = pair.options(1 << 30);
        pair.source(change);
        let error = pair.run(&options, &snapshot).await.unwrap_err();
        assert!(matches!(error, Error::Rewritten { .. }), "{error}");
        assert_eq!(pair.target("select state from walferry.table_copy"), "todo");
        let (_fresh, snapshot) = pair.holder().await;
        pair.run(&options, &snapshot).await.unwrap();
        let rows = pair.source("select count(*) from public.t");
        assert_eq!(pair.target("select count(*) from public.t"), rows);
    }
}

#[tokio::test]
async fn a_refused_row_is_told_with_its_table_and_line() {
    let pair = Pair::new("create table public.t (a int)");
    pair.source("insert into public.t values (1), (2), (-3)");
    pair.target("alter table public.t add constraint positive check (a > 0)");
    let (_holder, snapshot) = pair.holder().await;
    let options = Options { format: Format::Text, ..pair.options(1 << 30) };
    let error = pair.run(&options, &snapshot).await.unwrap_err();
    assert_eq!(error.fault(), Fault::Stop);
    let text = error.to_string();
    assert!(text.contains("table public.t:") && text.contains("\"positive\""), "{text}");
    assert!(text.contains("COPY t, line 3: \"-3\""), "{text}");
    assert_eq!(pair.target("select count(*) from public.t"), "0");
    pair.target("alter table public.t drop constraint positive");
    pair.run(&options, &snapshot).await.unwrap();
    assert_eq!(pair.target("select count(*) from public.t"), "3");
}

#[tokio::test]
async fn a_target_that_does_not_fit_is_refused_before_anything_is_copied() {
    let pair = Pair::new("create table public.a (x int); create table public.b (x int, y int)");
    pair.source("insert into public.a values (1)");
    let (_holder, snapshot) = pair.holder().await;
    let options = pair.options(1 << 30);
    pair.target("insert into public.b values (7, 7)");
    let error = pair.run(&options, &snapshot).await.unwrap_err();
    assert!(matches!(&error, Error::NotEmpty { table } if table.name == "b"), "{error}");
    pair.target("delete from public.b; alter table public.b drop column y");
    let error = pair.run(&options, &snapshot).await.unwrap_err();
    assert!(
        error.to_string().contains("table public.b on the target has no column \"y\""),
        "{error}"
    );
    pair.target("drop table public.b");
    let error = pair.run(&options, &snapshot).await.unwrap_err();
    assert!(error.to_string().contains("table public.b on the target does not exist"), "{error}");
    assert_eq!(pair.target("select count(*) from public.a"), "0");
}

#[tokio::test]
async fn triggers_stay_quiet_or_the_copy_does_not_begin() {
    let pair = Pair::new("create table public.t (a int)");
    pair.source("insert into public.t values (1)");
    pair.target(
        "create function public.f() returns trigger language plpgsql as \
         $$ begin raise exception 'fired'; end $$; \
         create trigger g before insert on public.t for each row execute function public.f(); \
         create role weak login; grant all on all tables in schema public, walferry to weak; \
         grant usage on schema walferry to weak",
    );
    let (_holder, snapshot) = pair.holder().await;
    let mut options = pair.options(1 << 30);
    options.target.user = "weak".to_string();
    let error = pair.run(&options, &snapshot).await.unwrap_err();
    assert!(matches!(error, Error::Triggers { .. }), "{error}");
    pair.run(&pair.options(1 << 30), &snapshot).await.unwrap();
    assert_eq!(pair.target("select count(*) from public.t"), "1");
}

/// A plain table into a partitioned one, emptied and read again under a second snapshot.
#[tokio::test]
async fn pgcopydb_949_a_partitioned_target_is_emptied_with_its_partitions() {
    let pair = Pair::new("");
    pair.source(WIDE);
    pair.target(
        "create table public.wide (id int primary key, n int, pad text) partition by hash (id); \
         create table public.w0 partition of public.wide for values with (modulus 2, remainder 0); \
         create table public.w1 partition of public.wide for values with (modulus 2, remainder 1)",
    );
    fill(&pair, 4_000);
    let tables = pair.tables().await;
    let options = pair.options(1 << 20);
    let (_holder, snapshot) = pair.holder().await;
    copy::run(&options, &tables, &snapshot, &CopyProgress::new(&tables)).await.unwrap();
    pair.target("update walferry.table_copy set state = 'todo' where part = 1");
    pair.source("insert into public.wide values (0, 0, '')");
    let (_holder, snapshot) = pair.holder().await;
    copy::run(&options, &tables, &snapshot, &CopyProgress::new(&tables)).await.unwrap();
    assert_eq!(pair.target("select count(*), count(distinct id) from public.wide"), "4001|4001");
}

/// Rows of a SQL_ASCII database are bytes; they go through unchanged or are refused, never bent.
#[tokio::test]
async fn pgcopydb_874_bytes_of_sql_ascii_are_passed_on_or_refused() {
    let pair = Pair::new("");
    pair.server
        .psql(
            "postgres",
            "create database ascii encoding 'SQL_ASCII' lc_collate 'C' lc_ctype 'C' \
         template template0",
        )
        .unwrap();
    pair.server
        .psql(
            "postgres",
            "create database ascii2 encoding 'SQL_ASCII' lc_collate 'C' lc_ctype 'C' \
         template template0",
        )
        .unwrap();
    for dbname in ["ascii", "ascii2", "target"] {
        pair.server.psql(dbname, "create table public.t (a text)").unwrap();
    }
    pair.server.psql("ascii", "insert into public.t values (E'caf\\xe9')").unwrap();
    pair.server.psql("ascii2", "create schema walferry").unwrap();
    pair.server.psql("ascii2", DDL).unwrap();
    let mut holder = support::session(&pair.server, "ascii").await;
    let found = tables(&mut holder, &Selection::default()).await.unwrap();
    let snapshot = export_snapshot(&mut holder).await.unwrap();
    let same = Options::new(pair.config("ascii"), pair.config("ascii2"), "j");
    copy::run(&same, &found, &snapshot, &CopyProgress::new(&found)).await.unwrap();
    let bytes = pair.server.psql("ascii2", "select a::bytea from public.t").unwrap();
    assert_eq!(bytes, "\\x636166e9");
    let other = Options::new(pair.config("ascii"), pair.config("target"), "j");
    let error = copy::run(&other, &found, &snapshot, &CopyProgress::new(&found)).await.unwrap_err();
    let text = error.to_string();
    assert!(text.contains("invalid byte sequence") && text.contains("public.t"), "{text}");
    assert!(text.contains("with the source's encoding"), "{text}");
}

/// Informational: `cargo test --test it copy::throughput -- --ignored --nocapture`.
#[tokio::test]
#[ignore = "prints speeds, proves nothing"]
async fn throughput_beside_psql() {
    let table = "create table public.rows (id bigint, a int, b int, t timestamptz, f float8, name \
     text, pad text)";
    let pair = Pair::new(table);
    pair.source(
        "insert into public.rows select i, i % 1000, i % 7, now() + i * interval '1 s', i / 3.0, \
         md5(i::text), repeat(md5(i::text), 2) from generate_series(1, 1100000) i",
    );
    let bytes: f64 = pair.source("select pg_table_size('public.rows')").parse().unwrap();
    let print = |name: &str, started: Instant| {
        let seconds = started.elapsed().as_secs_f64();
        println!("{name:<24} {seconds:6.2} s {:7.1} MB/s of heap", bytes / 1e6 / seconds);
        pair.target("truncate public.rows; delete from walferry.table_copy; checkpoint");
    };
    for round in 0..2 {
        let started = Instant::now();
        let mut read = Command::new("psql")
            .args([
                "-X",
                "-q",
                "-d",
                &pair.server.uri("source"),
                "-c",
                "copy public.rows to stdout",
            ])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let write = Command::new("psql")
            .args([
                "-X",
                "-q",
                "-d",
                &pair.server.uri("target"),
                "-c",
                "copy public.rows from stdin",
            ])
            .stdin(read.stdout.take().unwrap())
            .status()
            .unwrap();
        assert!(read.wait().unwrap().success() && write.success());
        print(&format!("psql | psql, round {round}"), started);
        for (format, jobs, part) in [
            (Format::Text, 1, 1 << 40),
            (Format::Binary, 1, 1 << 40),
            (Format::Text, 2, 32 << 20),
            (Format::Binary, 2, 32 << 20),
        ] {
            let (_holder, snapshot) = pair.holder().await;
            let mut options = Options { format, ..pair.options(part) };
            options.jobs = jobs;
            let started = Instant::now();
            pair.run(&options, &snapshot).await.unwrap();
            print(&format!("{format:?} x{jobs}, round {round}"), started);
        }
    }
}
