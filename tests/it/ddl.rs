//! `--ddl`: tables of the source that are altered while they are followed.

use std::time::{Duration, Instant};

use serde_json::Value;
use walferry::demo::binaries::client;
use walferry::demo::compare::compare;
use walferry::demo::pgbouncer::PgBouncer;
use walferry::demo::server::Server;
use walferry::demo::writer::{Options, Writer, create_schema};

use crate::support::job::{Ends, conserved, route_of};
use crate::support::{Walferry, until_within};

const TABLES: &str = "create type mood as enum ('sad', 'glad'); \
    create table item (id int primary key, note varchar(20), amount int); \
    insert into item select i, 'row ' || i, i from generate_series(1, 100) i; \
    create table feel (id int primary key, mood mood); \
    create table log (id int, day int, primary key (id, day)) partition by range (day); \
    create table log_1 partition of log for values from (0) to (10); \
    insert into log values (1, 1); \
    create table other (n serial primary key)";

/// What a table is made of, on either side.
const SCHEMA: &str = "select string_agg(concat_ws(' ', table_name, column_name, data_type, \
      character_maximum_length, column_default, is_nullable), E'\n' order by table_name, \
      ordinal_position) from information_schema.columns where table_schema = 'public'";

async fn two_servers() -> Ends {
    let ends = Ends::start(15, 15);
    create_schema(&ends.source_uri(), 1).await.unwrap();
    ends.source.psql("app", TABLES).unwrap();
    ends
}

async fn following(ends: &Ends, arguments: &[&str]) -> Walferry {
    let mut run = ends.spawn(arguments);
    ends.until_phase(&mut run, "following").await;
    run
}

/// Waits until the target has all that the source has committed by now, of tables that go on.
async fn arrived(ends: &Ends, run: &mut Walferry) {
    let n = ends.source.psql("app", "insert into other default values returning n").unwrap();
    let sql = format!("select count(*) from other where n = {}", n.lines().next().unwrap());
    until_within(Duration::from_secs(40), "the other table goes on", || {
        assert!(!run.has_ended(), "the run ended: {}", run.so_far());
        std::future::ready(ends.target.psql("app", &sql).unwrap() == "1")
    })
    .await;
}

async fn parked(ends: &Ends) -> Value {
    let status = ends.status().await;
    conserved(&status["tables"]);
    status["parked"].clone()
}

async fn nothing_parked(ends: &Ends) {
    until_within(Duration::from_secs(40), "nothing is parked", async || {
        parked(ends).await.as_array().is_some_and(Vec::is_empty)
    })
    .await;
}

async fn same(ends: &Ends) {
    let found = compare(&ends.source_uri(), &ends.target_uri()).await.unwrap();
    let rows = found.differences.iter().filter(|line| !line.starts_with("sequence "));
    assert_eq!(rows.collect::<Vec<_>>(), Vec::<&String>::new());
    let schema = |server: &Server| server.psql("app", SCHEMA).unwrap();
    assert_eq!(schema(&ends.source), schema(&ends.target));
}

/// Each is run with what follows it in one transaction where it may be.
const ALTERED: &[&str] = &[
    "insert into item values (200, 'before', 1); alter table item add column c text; \
     insert into item values (201, 'behind', 1, 'c'); \
     alter table item add column d int not null default 7; \
     update item set c = 'all' where id <= 10; insert into item values (202, 'twice', 1, 'c', 9)",
    "alter table item rename note to remark; update item set remark = 'renamed' where id = 3",
    "alter table item alter amount type bigint; update item set amount = 9876543210 where id = 4",
    "alter table item alter remark type varchar(200), add column e numeric(4,1) default 1.5; \
     update item set remark = repeat('long ', 30) where id = 5",
    "alter table item drop column c; delete from item where id = 6",
    "create table log_2 partition of log for values from (10) to (20); \
     insert into log values (2, 15), (1, 2)",
    "alter table log add column note text default 'x'; insert into log values (3, 3), (4, 14)",
    "alter table item rename d to dd; alter table item add column f timestamptz default now(); \
     update item set dd = 3 where id = 7; truncate feel",
];

/// The same where each is alone: a textual decoder tells columns by the catalog, and so what is
/// altered in the middle of a transaction too late.
const ALONE: &[&str] = &[
    "alter table item add column c text",
    "insert into item values (201, 'behind', 1, 'c')",
    "alter table item add column d int not null default 7",
    "update item set c = 'all' where id <= 10",
    "insert into item values (202, 'twice', 1, 'c', 9)",
    "alter table item rename note to remark",
    "update item set remark = 'renamed' where id = 3",
    "alter table item alter amount type bigint",
    "update item set amount = 9876543210 where id = 4",
    "alter table item alter remark type varchar(200), add column e numeric(4,1) default 1.5",
    "update item set remark = repeat('long ', 30) where id = 5",
    "alter table item drop column c",
    "delete from item where id = 6",
    "create table log_2 partition of log for values from (10) to (20)",
    "insert into log values (2, 15), (1, 2)",
    "alter table log add column note text default 'x'",
    "insert into log values (3, 3), (4, 14)",
    "alter table item rename d to dd",
    "alter table item add column f timestamptz default now()",
    "update item set dd = 3 where id = 7",
];

/// What no row shows.
const SILENT: &[&str] = &[
    "create index item_amount on item (amount)",
    "create unique index concurrently item_remark on item (remark, id)",
    "alter table item add constraint positive check (amount >= 0) not valid",
    "alter table item validate constraint positive",
    "alter table item add constraint item_pair unique (id, amount)",
    "alter table item alter remark set default 'none', alter amount set default 5",
    "alter table item alter remark set not null",
    "create index on log (day)",
    "alter table feel add constraint feel_item foreign key (id) references item (id) not valid",
    "alter table log add constraint log_day check (day >= 0)",
    "create index item_expr on item (lower(remark)) where amount > 5",
    "alter table feel add constraint feel_one exclude using btree (id with =)",
    "drop index item_amount",
    "alter table item drop constraint item_pair",
    "create table log_3 partition of log for values from (20) to (30)",
    "alter table other add constraint other_big check (n < 1000000)",
    "alter table item drop constraint positive, add constraint positive check (amount > -5)",
    "alter table item add column brief int not null default 5",
    "update item set brief = 6 where id = 1",
    "alter table item alter brief drop default, alter brief drop not null",
    "create table made (id serial primary key, feeling mood, item int references item (id), \
         note text); create index made_note on made (note); \
     insert into made (feeling, item) values ('sad', 1), ('glad', null)",
    "create table parted (id int, day int, v text, primary key (id, day)) \
         partition by range (day); \
     create table parted_1 partition of parted for values from (0) to (10); \
     create table parted_2 partition of parted for values from (10) to (20); \
     insert into parted select i, i % 20, 'v' from generate_series(1, 100) i",
    "insert into made (note) values ('later'); update parted set v = 'w' where day = 3; \
     delete from made where feeling = 'sad'",
];

/// A statement that waits for transactions of the writer, which may be this very thread's to go on
/// with.
fn run_on(server: &Server, sql: &str) {
    let ran = tokio::task::block_in_place(|| server.psql("app", sql));
    ran.unwrap_or_else(|e| panic!("{sql}: {e}"));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_altered_is_applied_at_its_place_once_through_kills() {
    let ends = two_servers().await;
    let arguments = ["run", "--ddl", "apply,no-capture"];
    let mut run = following(&ends, &arguments).await;
    let options = Options { tx_per_second: Some(100.0), ..Options::new(&ends.source_uri()) };
    let writer = Writer::start(options).await.unwrap();
    for (turn, sql) in ALTERED.iter().enumerate() {
        run_on(&ends.source, sql);
        if turn % 2 == 0 {
            tokio::time::sleep(Duration::from_millis(fastrand::u64(0..300))).await;
            run.kill9().await;
            run = ends.spawn(&arguments);
        }
        // Some alone, some behind each other in one batch.
        if turn % 3 == 1 {
            arrived(&ends, &mut run).await;
        }
    }
    ends.source.psql("app", "alter type mood add value 'odd' before 'glad'").unwrap();
    ends.source.psql("app", "insert into feel values (1, 'odd'), (2, 'glad')").unwrap();
    arrived(&ends, &mut run).await;
    writer.stop().await;
    arrived(&ends, &mut run).await;
    same(&ends).await;
    ends.done(&["verify"]).await;
    let once = "select count(*) = count(distinct sql) and count(*) >= 12 from walferry.altered";
    assert_eq!(ends.target.psql("app", once).unwrap(), "t");
    let labels = "select enum_range(null::mood)";
    assert_eq!(ends.target.psql("app", labels).unwrap(), "{sad,odd,glad}");
    assert!(parked(&ends).await.as_array().unwrap().is_empty());
    ends.done(&["cancel"]).await;
    let _ = run.ended().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_waits_for_the_sql_that_is_named_and_all_others_go_on() {
    let ends = two_servers().await;
    let mut run = following(&ends, &["run", "--ddl", "hold"]).await;
    // Enough for sets, and old rows before new ones in one transaction.
    let first = "begin; update item set amount = 0 where id = 1; delete from item where id = 2; \
                 alter table item add column c text default 'filled'; \
                 insert into item select i, 'new', i, 'c' from generate_series(200, 500) i; \
                 update item set c = 'one' where id = 1; commit";
    ends.source.psql("app", first).unwrap();
    let second = "alter table item rename note to remark; \
                  update item set remark = 'renamed' where id < 300";
    ends.source.psql("app", second).unwrap();
    arrived(&ends, &mut run).await;
    let before = "select count(*), min(amount) from item where id < 100";
    assert_eq!(ends.target.psql("app", before).unwrap(), "98|0");
    for awaited in
        ["add column \"c\" text default 'filled'", "rename column \"note\" to \"remark\""]
    {
        run.kill9().await;
        run = ends.spawn(&["run", "--ddl", "hold"]);
        until_within(Duration::from_secs(30), awaited, async || {
            let parked = parked(&ends).await;
            parked[0]["awaited"].as_str().is_some_and(|sql| sql.contains(awaited))
        })
        .await;
        let parked = parked(&ends).await;
        assert_eq!(
            (&parked[0]["table"], parked[0]["reason"].as_str()),
            (&"public.item".into(), Some("ddl"))
        );
        let sql = parked[0]["awaited"].as_str().unwrap();
        ends.target.psql("app", sql).unwrap();
    }
    nothing_parked(&ends).await;
    arrived(&ends, &mut run).await;
    same(&ends).await;

    // An enum's label is missed by the first row that has it; a type with USING is not guessed.
    let odd = "alter type mood add value 'odd' before 'glad'; ";
    ends.source.psql("app", odd).unwrap();
    ends.source
        .psql("app", "insert into feel values (1, 'sad'); insert into feel values (2, 'odd')")
        .unwrap();
    let using = "alter table item alter amount type text using 'n' || amount; \
                 update item set amount = 'text' where id = 1";
    ends.source.psql("app", using).unwrap();
    arrived(&ends, &mut run).await;
    until_within(Duration::from_secs(30), "both are parked", async || {
        parked(&ends).await.as_array().is_some_and(|parked| parked.len() == 2)
    })
    .await;
    let listed = ends.done(&["quarantine", "list"]).await.out;
    assert!(listed.contains("add value if not exists 'odd' after 'sad'"), "{listed}");
    assert!(listed.contains("amount was rewritten as text"), "{listed}");
    ends.target.psql("app", "alter type mood add value 'odd' before 'glad'").unwrap();
    let mended = "alter table item alter amount type text using 'n' || amount";
    ends.target.psql("app", mended).unwrap();
    nothing_parked(&ends).await;
    arrived(&ends, &mut run).await;
    same(&ends).await;
    // What no stream shows is told only: by status, and by a cutover.
    ends.source.psql("app", "create index item_told on item (id)").unwrap();
    until_within(Duration::from_secs(40), "the index is named", async || {
        ends.status().await["awaited"].to_string().contains("item_told")
    })
    .await;
    let ready = ends.done(&["cutover", "--dry-run"]).await.out;
    assert!(ready.contains("silent about it") && ready.contains("item_told"), "{ready}");
    ends.target.psql("app", "create index item_told on item (id)").unwrap();
    until_within(Duration::from_secs(40), "nothing is awaited", async || {
        ends.status().await["awaited"].as_array().is_some_and(Vec::is_empty)
    })
    .await;
    run.signal("INT");
    run.ended().await.expect_success();

    // Stopped, the SQL is in the error; applied by the next run, it goes on.
    ends.source
        .psql("app", "alter table item drop column c; insert into item values (9000)")
        .unwrap();
    let stopped = ends.walferry(&["run", "--ddl", "hold,drop-column=stop"]).await;
    assert_eq!(stopped.code, Some(1), "{stopped:?}");
    assert!(stopped.err.contains("drop column \"c\""), "{}", stopped.err);
    let mut run = ends.spawn(&["run", "--ddl", "apply"]);
    ends.until_phase(&mut run, "following").await;
    arrived(&ends, &mut run).await;
    same(&ends).await;
    for bad in [["--ddl", "maybe"], ["--two-phase", "on"]] {
        let refused = ends.walferry(&[&["run", "--ddl", "hold"][..], &bad].concat()).await;
        assert_eq!(refused.code, Some(2), "{refused:?}");
    }
}

/// Statements of every class, as clients send them: alone, several in a text, with rows between.
const CAPTURED: &[&str] = &[
    "alter table item add column c text; insert into item values (200, 'x', 1, 'c'); \
     alter table item alter c set default 'd'; insert into item values (201, 'y', 1)",
    "alter table item alter note set not null, alter note type varchar(99)",
    "create index item_amount on item (amount)",
    "create unique index concurrently item_note on item (note, id)",
    "alter table item add constraint positive check (amount >= 0) not valid",
    "begin; create table made (id int primary key, v text); insert into made values (1, 'a'); \
     update made set v = 'b'; commit",
    "insert into made values (2, 'c'); delete from made where id = 1",
    "create schema extra; create table extra.t (id serial primary key, m mood); \
     insert into extra.t (m) values ('sad')",
    "create view item_view as select id, note from item",
    "create function twice(n int) returns int language sql as $$ select 2 * n; $$",
    "comment on table item is 'it''s; a thing'",
    "create type pair as (a int, b text); alter table made add p pair; \
     insert into made values (3, 'p', row(1, 'x'))",
    "alter type mood add value 'odd' before 'glad'",
    "insert into feel values (1, 'odd'), (2, 'glad')",
    "alter table item alter amount type bigint using amount + 1",
    "update item set amount = 1 where id = 1",
    "alter table item rename to thing; insert into thing values (300, 'thing', 3)",
    "alter table thing rename column note to remark; update thing set remark = 'r' where id = 2",
    "create table log_3 partition of log for values from (20) to (30); insert into log values (3, 25)",
    "alter table log add column note text default 'x'; insert into log values (4, 4), (5, 26)",
    "create sequence counter; alter sequence counter increment by 5",
    "create function stamp() returns trigger language plpgsql as \
       $$ begin new.remark := 'stamped'; return new; end $$; \
     create trigger stamp before insert on thing for each row execute function stamp()",
    "insert into thing values (301, 'z', 3)",
    "alter table feel add foreign key (id) references made (id) not valid",
    "grant select on thing to public; revoke select on made from public",
    "create materialized view counted as select count(*) from made",
    "set search_path = extra; create table found (id int primary key); insert into found values (1); \
     reset search_path",
    "create temp table passing (a int); alter table made add column w int; drop table passing; \
     insert into made values (4, 'w', null, 4)",
    "alter table made drop column v; insert into made values (5, null, 5)",
    "drop view item_view; drop function twice(int); drop index item_amount",
    "alter table extra.found set schema public; insert into found values (2)",
    "create table brief (id int primary key); insert into brief values (1); drop table brief",
    "create domain small as int check (value < 100); create table sized (id int primary key, s small)",
    "insert into sized values (1, 99); alter table thing disable trigger stamp",
];

/// pg_dump's word on a side, without what is ours and what it makes up each time.
fn dumped(server: &Server) -> String {
    let own = server.bin_dir().join("pg_dump");
    // Which reads servers of all versions.
    let newest = || client("pg_dump").unwrap();
    let dump = std::process::Command::new(if own.exists() { own } else { newest() })
        .args(["--schema-only", "--exclude-schema=walferry", "--no-publications"])
        .arg(server.uri("app"))
        .output()
        .unwrap();
    assert!(dump.status.success(), "{dump:?}");
    let text = String::from_utf8(dump.stdout).unwrap();
    let ours = |line: &&str| {
        !line.starts_with('\\')
            && !line.starts_with("--")
            && !line.contains("walferry_")
            && !line.contains("capture_main")
            && !line.starts_with("SET ")
            && !line.starts_with("SELECT pg_catalog.set_config")
    };
    text.lines().filter(ours).filter(|l| !l.trim().is_empty()).collect::<Vec<_>>().join("\n")
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_event_trigger_captures_is_run_at_its_place_once_through_kills() {
    let ends = two_servers().await;
    let before = ends.inventories().await;
    let arguments = ["run", "--ddl", "apply"];
    let mut run = following(&ends, &arguments).await;
    assert!(run.so_far().contains("captured by an event trigger"), "{}", run.so_far());
    let options = Options { tx_per_second: Some(100.0), ..Options::new(&ends.source_uri()) };
    let writer = Writer::start(options).await.unwrap();
    for (turn, sql) in CAPTURED.iter().enumerate() {
        run_on(&ends.source, sql);
        if turn % 6 == 0 {
            tokio::time::sleep(Duration::from_millis(fastrand::u64(0..400))).await;
            run.kill9().await;
            run = ends.spawn(&arguments);
        }
    }
    arrived(&ends, &mut run).await;
    writer.stop().await;
    arrived(&ends, &mut run).await;
    let found = compare(&ends.source_uri(), &ends.target_uri()).await.unwrap();
    let rows = found.differences.iter().filter(|line| !line.starts_with("sequence "));
    assert_eq!(rows.collect::<Vec<_>>(), Vec::<&String>::new());
    let (source, target) = (dumped(&ends.source), dumped(&ends.target));
    let differing = source.lines().zip(target.lines()).find(|(a, b)| a != b);
    assert_eq!(differing, None);
    assert_eq!(source, target);
    conserved(&ends.status().await["tables"]);

    // What the source made up for each row, or ran out of sight, is named and stops.
    for (sql, said) in [
        ("create table filled as select 1 as id", "CREATE TABLE AS"),
        ("do $$ begin create table hidden (id int); end $$", "DO block"),
        ("alter table made add column u uuid default gen_random_uuid()", "the source made"),
    ] {
        run.signal("INT");
        run.ended().await.expect_success();
        ends.source.psql("app", sql).unwrap();
        let stopped = ends.walferry(&arguments).await;
        assert_eq!(stopped.code, Some(1), "{stopped:?}");
        assert!(stopped.err.contains(said), "{}", stopped.err);
        let by_hand =
            sql.replace("create table filled as select 1 as id", "create table filled (id int)");
        ends.target.psql("app", &by_hand).unwrap();
        let id = stopped.err.split("skip=").nth(1).unwrap().split_whitespace().next().unwrap();
        let skipping = format!("apply,skip={id}");
        run = ends.spawn(&["run", "--ddl", &skipping]);
        ends.until_phase(&mut run, "following").await;
        arrived(&ends, &mut run).await;
    }
    ends.source.psql("app", "drop table filled, hidden; alter table made drop column u").unwrap();
    arrived(&ends, &mut run).await;
    ends.done(&["cancel"]).await;
    let _ = run.ended().await;
    let after = ends.inventories().await;
    let ours = |line: &String| line.contains("walferry");
    assert_eq!(
        before.0.diff(&after.0).into_iter().filter(ours).collect::<Vec<_>>(),
        Vec::<String>::new()
    );
}

/// Both sides hold the same rows of the tables that are followed, and pg_dump says the same of them.
async fn equal(ends: &Ends) {
    let found = compare(&ends.source_uri(), &ends.target_uri()).await.unwrap();
    let rows = found.differences.iter().filter(|line| !line.starts_with("sequence "));
    assert_eq!(rows.collect::<Vec<_>>(), Vec::<&String>::new());
    let (source, target) = (dumped(&ends.source), dumped(&ends.target));
    let differing = source.lines().zip(target.lines()).find(|(a, b)| a != b);
    assert_eq!(differing, None);
    assert_eq!(source.lines().count(), target.lines().count());
}

/// Waits until the target has the rows of a table on which nobody works.
async fn taken_in(ends: &Ends, run: &mut Walferry, table: &str) {
    let sql = format!("select md5(string_agg(r::text, ',' order by r::text)) from {table} r");
    let rows = ends.source.psql("app", &sql).unwrap();
    until_within(ALIKE, table, || {
        assert!(!run.has_ended(), "the run ended: {}", run.so_far());
        std::future::ready(ends.target.psql("app", &sql).is_ok_and(|there| there == rows))
    })
    .await;
}

/// Without event triggers: a table is made while the job follows, and written by whoever was at work
/// before, and all the time while it is taken in and the run is killed.
#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_is_new_is_made_read_and_followed_through_kills() {
    let ends = two_servers().await.with_spool();
    let arguments = ["run", "--ddl", "apply,no-capture"];
    let mut run = following(&ends, &arguments).await;
    let mut long = crate::support::session(&ends.source, "app").await;
    long.execute("begin; insert into public.other default values").await.unwrap();
    let made = "create table made (id serial primary key, feeling mood, note text); \
        create unique index made_twice on made (id, note); alter table made replica identity full; \
        insert into made (note) select 'first' from generate_series(1, 20000)";
    ends.source.psql("app", made).unwrap();
    long.execute("insert into public.made (note) values ('of before')").await.unwrap();
    let script = "\\set id random(1, 3000)\ninsert into made (note) values ('new');\n\
        update made set note = 'changed' where id = :id;\ndelete from made where id = :id - 1;\n";
    let path = ends.source.dir().join("made.sql");
    std::fs::write(&path, script).unwrap();
    let mut bench = std::process::Command::new(Server::default_bin().unwrap().join("pgbench"))
        .args(["-n", "-c", "3", "-T", "9", "-R", "150", "-f"])
        .args([path.to_str().unwrap(), &ends.source.uri("app")])
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    // It is made at once, and not taken in before that transaction is over.
    let there = "select to_regclass('public.made_twice') is not null";
    until_within(ALIKE, "the table", async || ends.target.psql("app", there).unwrap() == "t").await;
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert!(!run.so_far().contains("are taken in"), "{}", run.so_far());
    long.execute("insert into public.made (note) values ('of before, too'); commit").await.unwrap();
    until_within(ALIKE, "it is taken in", async || run.so_far().contains("are taken in")).await;
    for _ in 0..3 {
        tokio::time::sleep(Duration::from_millis(fastrand::u64(0..700))).await;
        run.kill9().await;
        run = ends.spawn(&arguments);
    }
    assert!(bench.wait().unwrap().success());
    taken_in(&ends, &mut run, "made").await;
    same(&ends).await;
    run.kill9().await;

    // Held, its SQL is named, and it is followed once that was run.
    let mut run = following(&ends, &["run", "--ddl", "apply,no-capture,new-table=hold"]).await;
    ends.target
        .psql("app", "create table taken (id int primary key); insert into taken values (5)")
        .unwrap();
    let held = "create table held (id int primary key, v text default 'x'); \
        create index on held (v); insert into held values (1); \
        create table taken (id int primary key); insert into taken values (7); \
        create table log_9 partition of log for values from (90) to (99)";
    ends.source.psql("app", held).unwrap();
    let named = "create table public.held";
    let awaited = async || {
        let awaited = ends.status().await["awaited"].clone();
        let all: Vec<String> = serde_json::from_value(awaited).unwrap_or_default();
        all.into_iter().find(|sql| sql.to_lowercase().contains(named))
    };
    until_within(ALIKE, "the SQL", async || awaited().await.is_some()).await;
    until_within(ALIKE, "the rows", async || run.so_far().contains("has rows on the target")).await;
    let refused = ends.walferry(&["cutover", "--dry-run"]).await;
    assert!(refused.code == Some(1) && refused.err.contains("public.held"), "{refused:?}");
    ends.target.psql("app", &awaited().await.unwrap()).unwrap();
    ends.target.psql("app", "truncate taken").unwrap();
    ends.source.psql("app", "update held set v = 'y'; insert into taken values (8)").unwrap();
    for table in ["held", "taken"] {
        taken_in(&ends, &mut run, table).await;
    }
    // No row tells of a partition that is empty, and without it there would be no cutover.
    let there = "select to_regclass('public.log_9') is not null";
    assert_eq!(ends.target.psql("app", there).unwrap(), "t");
    // Another table by an old name is as new as any.
    let anew = "drop table taken; create table taken (w text, id bigint primary key)";
    ends.source.psql("app", &format!("{anew}; insert into taken values ('w', 1)")).unwrap();
    ends.target.psql("app", anew).unwrap();
    taken_in(&ends, &mut run, "taken").await;
    ends.source.psql("app", "delete from held; update taken set w = 'v'").unwrap();
    arrived(&ends, &mut run).await;
    same(&ends).await;
    conserved(&ends.status().await["tables"]);
    ends.until_phase(&mut run, "following").await;
    ends.done(&["cutover"]).await;
    ends.done(&["verify"]).await;
    ends.done(&["finish"]).await;
    let _ = run.ended().await;
}

/// What is found by comparing catalogs is found within two looks, a few seconds apart.
const ALIKE: Duration = Duration::from_secs(60);

/// A cell: everything is altered under a writer and kill -9, and then the job goes there and back.
async fn goes_there_and_back(major: u32, decoder: &str, capture: bool) {
    let ends = Ends::start(major, major);
    create_schema(&ends.source_uri(), 1).await.unwrap();
    ends.source.psql("app", TABLES).unwrap();
    let pooler = PgBouncer::start(&ends.source, &["app"]).unwrap();
    let policy = if capture { "apply" } else { "apply,no-capture" };
    let arguments = ["run", "--ddl", policy, "--decoder", decoder];
    let mut run = following(&ends, &arguments).await;
    let options = Options { tx_per_second: Some(60.0), ..Options::new(&pooler.uri("app")) };
    let writer = Writer::start(options).await.unwrap();
    let mut texts: Vec<&str> = match (capture, decoder) {
        (true, _) => CAPTURED.to_vec(),
        (false, "pgoutput") => ALTERED.iter().chain(SILENT).copied().collect(),
        _ => ALONE.iter().chain(SILENT).copied().collect(),
    };
    if !capture {
        texts.extend([
            "alter type mood add value 'odd' before 'glad'",
            "insert into feel values (1, 'odd'), (2, 'glad')",
            "insert into log (id, day) values (9, 9), (8, 12), (7, 25)",
        ]);
    }
    for (turn, sql) in texts.iter().enumerate() {
        run_on(&ends.source, sql);
        if turn % 8 == 3 {
            tokio::time::sleep(Duration::from_millis(fastrand::u64(0..400))).await;
            run.kill9().await;
            run = ends.spawn(&arguments);
        }
        // What is altered again before its first row has come through cannot be told any more.
        if !capture {
            arrived(&ends, &mut run).await;
        }
    }
    arrived(&ends, &mut run).await;
    let begun = Instant::now();
    loop {
        assert!(!run.has_ended(), "the run ended: {}", run.so_far());
        let (source, target) = (dumped(&ends.source), dumped(&ends.target));
        if source == target {
            break;
        }
        let differing = source.lines().zip(target.lines()).find(|(a, b)| a != b);
        assert!(begun.elapsed() < ALIKE, "{differing:?}\n{}", run.so_far());
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    if !capture {
        for table in ["made", "parted", "log"] {
            taken_in(&ends, &mut run, table).await;
        }
        ends.until_phase(&mut run, "following").await;
    }
    nothing_parked(&ends).await;
    for command in ["cutover", "rollback"] {
        ends.done(&[command, "--route", &route_of(&pooler)]).await;
        assert!(writer.committed_more(20).await, "the writer is stuck");
        ends.done(&["verify"]).await;
    }
    let report = writer.stop().await;
    assert_eq!((report.failed_statements, report.failed_connects), (0, 0), "{:?}", report.errors);
    ends.done(&["verify"]).await;
    ends.done(&["finish"]).await;
    let _ = run.ended().await;
    equal(&ends).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn on_18_and_without_event_triggers_the_rest_is_found_by_comparing_catalogs() {
    goes_there_and_back(18, "pgoutput", false).await;
}

/// `make ddl`: every version and decoder, both ways.
#[ignore = "three versions, two decoders, both ways"]
#[tokio::test(flavor = "multi_thread")]
async fn every_version_and_decoder_carries_every_class_both_ways() {
    let majors = std::env::var("WALFERRY_DDL").unwrap_or("12 15 18".to_string());
    let mut failed = Vec::new();
    for major in majors.split_whitespace().map(|major| major.parse::<u32>().unwrap()) {
        // Event triggers go with pgoutput only.
        for (decoder, captures) in
            [("pgoutput", &[false, true][..]), ("test_decoding", &[false][..])]
        {
            for capture in captures.iter().copied() {
                let begun = Instant::now();
                let cell =
                    format!("{major} {decoder} {}", if capture { "captured" } else { "told" });
                let task = tokio::spawn(goes_there_and_back(major, decoder, capture));
                let outcome = task.await.map_err(|error| error.to_string());
                println!("ddl: {cell} {:.1?}: {outcome:?}", begun.elapsed());
                failed.extend(outcome.err().map(|_| cell));
            }
        }
    }
    assert_eq!(failed, Vec::<String>::new());
}

/// Whoever may alter a table of his own must not get to run anything as the owner of the event
/// trigger's function, whatever lies in his search_path: types (the function is compiled under it),
/// operators, functions, tables.
#[tokio::test(flavor = "multi_thread")]
async fn what_lies_in_the_search_path_is_not_run_by_the_event_trigger() {
    let ends = two_servers().await;
    let mut run = following(&ends, &["run", "--ddl", "apply"]).await;
    let evil = "create role mallory login; create schema evil authorization mallory; \
        create table public.taken (by_whom text, what text); \
        grant insert on public.taken to public; create table evil.mine (id int primary key); \
        alter table evil.mine owner to mallory";
    // Roles are a server's.
    ends.target.psql("app", "create role mallory").unwrap();
    ends.source.psql("app", evil).unwrap();
    let mut mallory = crate::support::session_as(&ends.source, "mallory", "app").await;
    let grab = |returns: &str, arguments: &str, gives: &str, name: &str| {
        format!(
            "create function evil.{name}({arguments}) returns {returns} language plpgsql as $f$ \
             begin if current_user <> 'mallory' then \
               insert into public.taken values (current_user, '{name}'); end if; \
             return {gives}; end $f$"
        )
    };
    let text = "pg_catalog.text";
    for sql in [
        grab("pg_catalog.bool", "v pg_catalog.text", "true", "checked"),
        format!("create domain evil.text as {text} check (evil.checked(value))"),
        format!("create domain evil.record as {text} check (evil.checked(value))"),
        "create domain evil.int4 as pg_catalog.int4 check (evil.checked(value::pg_catalog.text))".to_string(),
        grab(text, "v pg_catalog.text", "pg_catalog.current_setting(v)", "current_setting"),
        grab(
            text,
            "a pg_catalog.text, b pg_catalog.text, c pg_catalog.bool",
            "pg_catalog.set_config(a, b, c)",
            "set_config",
        ),
        grab("pg_catalog.bool", "a pg_catalog.text, b pg_catalog.text", "a operator(pg_catalog.=) b", "same"),
        "create operator evil.= (leftarg = pg_catalog.text, rightarg = pg_catalog.text, function = evil.same)".to_string(),
        "create operator evil.~~ (leftarg = pg_catalog.text, rightarg = pg_catalog.text, function = evil.same)".to_string(),
        "create temp table pg_class (oid oid, relpersistence \"char\", relispartition bool)".to_string(),
    ] {
        mallory.execute(&sql).await.unwrap_or_else(|e| panic!("{sql}: {e}"));
    }
    // A session that has not called the function yet compiles it under this path.
    let mut mallory = crate::support::session_as(&ends.source, "mallory", "app").await;
    for sql in [
        // What walferry itself alters is not captured.
        "set application_name = 'mallory'",
        "set search_path = evil, pg_temp, pg_catalog",
        "alter table evil.mine add column a pg_catalog.int4",
        "create table evil.more (id pg_catalog.int8)",
        "drop table evil.more",
        "insert into evil.mine values (1, 2)",
    ] {
        mallory.execute(sql).await.unwrap_or_else(|e| panic!("{sql}: {e}"));
    }
    let path = mallory.query("show search_path").await.unwrap();
    assert_eq!(path[0].str(0).unwrap(), "evil, pg_temp, pg_catalog");
    assert_eq!(ends.source.psql("app", "select * from taken").unwrap(), "");
    arrived(&ends, &mut run).await;
    assert_eq!(ends.target.psql("app", "select * from evil.mine").unwrap(), "1|2");
    assert_eq!(ends.target.psql("app", "select * from taken").unwrap(), "");
}
