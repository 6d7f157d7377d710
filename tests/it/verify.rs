//! Tests of the comparison: what is equal is equal, and each single difference is found.

use std::sync::{Arc, Mutex};
use std::time::Instant;

use walferry::catalog::Selection;
use walferry::demo::server::Server;
use walferry::pg::{Config, Session};
use walferry::verify::{DifferenceKind, Error, Options, Progress, Report, Side, TableReport, run};

use crate::support;

fn side(server: &Server, dbname: &str) -> Side {
    Side { config: Config::parse(&server.uri(dbname)).unwrap(), snapshot: None }
}

fn options(source: Side, target: Side) -> Options {
    Options { parallelism: 2, ..Options::new(source, target) }
}

/// Databases `a` and `b` of one server.
async fn databases(server: &Server) -> (Session, Session) {
    let mut session = support::session(server, "postgres").await;
    session.execute("create database a template template0").await.unwrap();
    session.execute("create database b template template0").await.unwrap();
    (support::session(server, "a").await, support::session(server, "b").await)
}

async fn verify(server: &Server) -> Report {
    run(options(side(server, "a"), side(server, "b"))).await.unwrap()
}

fn table<'a>(report: &'a Report, name: &str) -> &'a TableReport {
    report.tables.iter().find(|t| t.name == name).unwrap_or_else(|| panic!("{name}: {report:?}"))
}

/// One table `public.t`, made and filled on each side; what the comparison says of it.
struct Case<'a> {
    server: &'a Server,
    a: Session,
    b: Session,
}

impl Case<'_> {
    async fn compare(&mut self, source: &str, target: &str) -> TableReport {
        for (session, sql) in [(&mut self.a, source), (&mut self.b, target)] {
            session.execute("drop schema public cascade; create schema public").await.unwrap();
            session.execute(sql).await.unwrap();
        }
        let report = verify(self.server).await;
        assert_eq!(report.equal, report.tables.iter().all(|t| t.equal));
        report.tables.into_iter().next().unwrap()
    }

    /// Same table, different rows: missing, extra, different, and the keys.
    async fn rows(&mut self, columns: &str, source: &str, target: &str) -> (u64, u64, u64, String) {
        let sql = |values: &str| {
            let insert = if values.is_empty() { "" } else { "insert into public.t values " };
            format!("create table public.t ({columns}); {insert}{values}")
        };
        let report = self.compare(&sql(source), &sql(target)).await;
        assert_eq!(report.equal, report.differing == 0, "{report:?}");
        assert_eq!(report.differing, report.missing + report.extra + report.different);
        let keys: Vec<String> = report.keys.iter().map(|d| d.key.clone()).collect();
        (report.missing, report.extra, report.different, keys.join("; "))
    }
}

fn found(missing: u64, extra: u64, different: u64, keys: &str) -> (u64, u64, u64, String) {
    (missing, extra, different, keys.to_string())
}

#[tokio::test]
async fn each_kind_of_difference_is_found_and_nothing_else() {
    let server = support::server();
    let (a, b) = databases(&server).await;
    let mut case = Case { server: &server, a, b };
    let kv = "id int primary key, v text, w text";
    let equal = found(0, 0, 0, "");
    let one = found(0, 0, 1, "id=1");
    // Nothing differs, in another physical order, and where nothing is.
    let order = ("(1,'a','b'),(2,null,'')", "(2,null,''),(1,'a','b')");
    assert_eq!(case.rows(kv, order.0, order.1).await, equal);
    assert_eq!(case.rows(kv, "", "").await, equal);
    // Values.
    assert_eq!(case.rows(kv, "(1,'a','b')", "(1,'a','c')").await, one);
    assert_eq!(case.rows(kv, "(1,null,'b')", "(1,'','b')").await, one);
    assert_eq!(case.rows(kv, "(1,'a','b')", "(1,'ab','')").await, one);
    assert_eq!(case.rows(kv, "(1,'a','')", "(1,'','a')").await, one);
    assert_eq!(case.rows(kv, "(1,'a',null)", "(1,null,'a')").await, one);
    assert_eq!(case.rows(kv, "(1,'a','b')", "(1,'a ','b')").await, one);
    assert_eq!(case.rows(kv, "(1,'a','b')", "(1,E'a\\n','b')").await, one);
    assert_eq!(case.rows(kv, "(1,'NULL','b')", "(1,null,'b')").await, one);
    assert_eq!(case.rows(kv, "(1,'a,b','c')", "(1,'a','b,c')").await, one);
    assert_eq!(case.rows(kv, "(1,'\"','b')", "(1,'\"\"','b')").await, one);
    assert_eq!(case.rows(kv, "(1,'ä','b')", "(1,'Ä','b')").await, one);
    let swapped = ("(1,'a','x'),(2,'b','y')", "(1,'b','x'),(2,'a','y')");
    assert_eq!(case.rows(kv, swapped.0, swapped.1).await, found(0, 0, 2, "id=1; id=2"));
    let swapped = ("(1,'a','x'),(2,'b','y')", "(1,'a','y'),(2,'b','x')");
    assert_eq!(case.rows(kv, swapped.0, swapped.1).await, found(0, 0, 2, "id=1; id=2"));
    // Rows.
    let (two, first) = ("(1,'a','b'),(2,'c','d')", "(1,'a','b')");
    assert_eq!(case.rows(kv, two, first).await, found(1, 0, 0, "id=2"));
    assert_eq!(case.rows(kv, first, two).await, found(0, 1, 0, "id=2"));
    assert_eq!(case.rows(kv, "(1,'a','b')", "(2,'a','b')").await, found(1, 1, 0, "id=1; id=2"));
    assert_eq!(case.rows(kv, two, "").await, found(2, 0, 0, "id=1; id=2"));
    // Numbers: what COPY prints, not what = says.
    let number = "id int primary key, v float8, n numeric, r real";
    assert_eq!(case.rows(number, "(1,0,1,1)", "(1,'-0',1,1)").await, one);
    assert_eq!(case.rows(number, "(1,0,1.0,1)", "(1,0,1.00,1)").await, one);
    assert_eq!(case.rows(number, "(1,0.1,1,1)", "(1,0.10000000000000002,1,1)").await, one);
    let nan = ("(1,'NaN','NaN','-inf')", "(1,'inf'::float8 - 'inf','NaN','-inf')");
    assert_eq!(case.rows(number, nan.0, nan.1).await, equal);
    // Blanks that the type ignores, and those it keeps.
    let padded = "id int primary key, v char(5), w bpchar";
    assert_eq!(case.rows(padded, "(1,'a','b')", "(1,'a ','b')").await, equal);
    assert_eq!(case.rows(padded, "(1,'a','b')", "(1,'a','b ')").await, one);
    // Composite and odd keys.
    let pair = "a text, b int, v int, primary key (b, a)";
    assert_eq!(
        case.rows(pair, "('x',1,1),('y',1,1)", "('x',1,1),('y',1,2)").await,
        found(0, 0, 1, "b=1, a=y")
    );
    let odd = "\"K \"\"x\" text primary key, \"select\" int";
    assert_eq!(
        case.rows(odd, "(E'tab\\there\\\\',1)", "(E'tab\\there\\\\',2)").await,
        found(0, 0, 1, "K \"x=tab\there\\")
    );
    // Without a key: multisets.
    let keyless = "a int, b text";
    assert_eq!(case.rows(keyless, "(1,'x'),(1,'x')", "(1,'x'),(1,'x')").await, equal);
    assert_eq!(
        case.rows(keyless, "(1,'x'),(1,'x'),(2,null)", "(1,'x'),(2,null),(1,'x'),(1,'x')").await,
        found(0, 1, 0, "(1,x)")
    );
    assert_eq!(case.rows(keyless, "(1,'x'),(1,'x')", "").await, found(2, 0, 0, "(1,x)"));
    assert_eq!(case.rows(keyless, "(1,'x')", "(1,'y')").await, found(1, 1, 0, "(1,x); (1,y)"));
    // No columns at all: rows still count.
    let report = case
        .compare(
            "create table public.t (); insert into public.t default values;",
            "create table public.t (); insert into public.t default values; \
             insert into public.t default values",
        )
        .await;
    assert_eq!((report.rows, report.rows_target, report.extra), (1, 2, 1));
}

#[tokio::test]
async fn tables_are_matched_by_name_whatever_their_shape() {
    let server = support::server();
    let (a, b) = databases(&server).await;
    let mut case = Case { server: &server, a, b };
    // Column order, dropped columns, generated columns.
    let report = case
        .compare(
            "create table public.t (id int primary key, x int, a text, b text, \
                g int generated always as (length(a)) stored); \
             alter table public.t drop column x; insert into public.t values (1, 'a', 'b')",
            "create table public.t (b text, a text, id int primary key, \
                g int generated always as (length(b) + 1) stored); \
             insert into public.t values ('b', 'a', 1)",
        )
        .await;
    assert!(report.equal, "{report:?}");
    // A unique index instead of a primary key; no index at all on the target yet.
    let report = case
        .compare(
            "create table public.t (id int not null unique, v int); \
             insert into public.t values (1, 1), (2, 2)",
            "create table public.t (id int not null, v int); \
             insert into public.t values (1, 1), (2, 2), (2, 2)",
        )
        .await;
    assert_eq!((report.extra, report.keys[0].key.as_str()), (1, "id=2"));
    assert_eq!(report.keys[0].kind, DifferenceKind::ExtraOnTarget);
    // Columns that are not there.
    let report = case
        .compare("create table public.t (a int, b int)", "create table public.t (a int, c int)")
        .await;
    assert_eq!(
        report.problems,
        ["column \"b\" is missing on the target", "column \"c\" is missing on the source"]
    );
    assert!(!report.equal);
    // Tables that are not there, either way.
    for (source, target, side) in [
        ("create table public.t as select 1 as x", "", "target"),
        ("", "create table public.t as select 1 as x", "source"),
    ] {
        let report = case.compare(source, target).await;
        assert_eq!(report.problems, [format!("the table is missing on the {side}")]);
        assert_eq!((report.equal, report.differing), (false, 1));
    }
    // A type that changed is told, and its values are compared as text.
    let report = case
        .compare(
            "create table public.t (a int primary key); insert into public.t values (5)",
            "create table public.t (a bigint primary key); insert into public.t values (5)",
        )
        .await;
    assert!(report.equal && report.notes[0].contains("bigint"), "{report:?}");
    // Inheritance: each table's own rows.
    let report = case
        .compare(
            "create table public.t (a int primary key); \
             create table public.u () inherits (public.t); \
             insert into public.t values (1); insert into public.u values (2)",
            "create table public.t (a int primary key); \
             create table public.u () inherits (public.t); \
             insert into public.t values (1), (2)",
        )
        .await;
    assert_eq!((report.extra, report.keys[0].key.as_str()), (1, "a=2"));
}

#[tokio::test]
async fn partitioned_tables_are_judged_as_a_whole() {
    let server = support::server();
    let (a, b) = databases(&server).await;
    let mut case = Case { server: &server, a, b };
    let by_range = "create table public.t (id int primary key, v int) partition by range (id); \
         create table public.t1 partition of public.t for values from (0) to (500); \
         create table public.t2 partition of public.t for values from (500) to (1000); \
         create table public.t3 partition of public.t for values from (1000) to (2000) \
            partition by range (id); \
         create table public.t3a partition of public.t3 for values from (1000) to (1500); \
         insert into public.t select g, g from generate_series(0, 1499) g;";
    // Other partitions, other rows in them, and no partitions at all.
    let by_hash = "create table public.t (id int primary key, v int) partition by hash (id); \
         create table public.t1 partition of public.t for values with (modulus 2, remainder 0); \
         create table public.t2 partition of public.t for values with (modulus 2, remainder 1); \
         insert into public.t select g, g from generate_series(0, 1499) g;";
    let plain = "create table public.t (id int primary key, v int); \
         insert into public.t select g, g from generate_series(0, 1499) g;";
    for (source, target) in [(by_range, by_range), (by_range, by_hash), (plain, by_range)] {
        let report = case.compare(source, target).await;
        assert!(report.equal && report.rows == 1500, "{report:?}");
        let changed = format!("{target} update public.t set v = 0 where id in (7, 1234)");
        let report = case.compare(source, &changed).await;
        assert_eq!((report.differing, report.different), (2, 2));
        assert_eq!(report.keys[1].key, "id=1234");
    }
    // A partition by its own name.
    let mut only = options(side(&server, "a"), side(&server, "b"));
    case.compare(by_range, &format!("{by_range} delete from public.t where id = 3")).await;
    only.tables = Some(vec![walferry::id::QualifiedName::new("public", "t2")]);
    let report = run(only).await.unwrap();
    assert!(report.equal && report.tables.len() == 1 && report.tables[0].rows == 500);
    // No partitions.
    let empty = "create table public.t (id int) partition by range (id)";
    assert!(case.compare(empty, empty).await.equal);
}

/// vitess#9715: with another collation an ordered diff reports every row.
#[tokio::test]
async fn vitess_9715_a_changed_collation_or_encoding_changes_nothing() {
    let server = support::server();
    let mut session = support::session(&server, "postgres").await;
    let databases = [
        ("utf8", "encoding 'UTF8' locale 'C.UTF-8'"),
        ("icu", "encoding 'UTF8' locale_provider icu icu_locale 'de' locale 'C.UTF-8'"),
        ("latin1", "encoding 'LATIN1' locale 'C'"),
        ("ascii", "encoding 'SQL_ASCII' locale 'C'"),
    ];
    for (name, with) in databases {
        let sql = format!("create database {name} template template0 {with}");
        session.execute(&sql).await.unwrap();
        let mut session = support::session(&server, name).await;
        session
            .execute(
                "create table public.t (k text primary key, v text[], e varchar); \
                 insert into public.t values ('a', '{ä,\"b c\",null}', 'ö'), ('B', '{}', ''), \
                 ('ä', null, ' '), ('_', '{ß}', 'é''\"\\');",
            )
            .await
            .unwrap();
    }
    for (source, target) in [("utf8", "icu"), ("icu", "latin1"), ("latin1", "utf8")] {
        let report = run(options(side(&server, source), side(&server, target))).await.unwrap();
        assert!(report.equal, "{source} {target}: {report:?}");
    }
    // SQL_ASCII holds the bytes it was sent, UTF8 here.
    let report = run(options(side(&server, "ascii"), side(&server, "utf8"))).await.unwrap();
    assert!(report.equal, "{report:?}");
    let mut latin1 = support::session(&server, "latin1").await;
    latin1.execute("update public.t set e = 'e' where k = 'ä'").await.unwrap();
    let report = run(options(side(&server, "utf8"), side(&server, "latin1"))).await.unwrap();
    assert_eq!(report.tables[0].keys[0].key, "k=ä");
    // Bytes that are no text in UTF8 can be compared and shown too.
    let mut ascii = support::session(&server, "ascii").await;
    ascii
        .execute(
            "set client_encoding = 'SQL_ASCII'; update public.t set k = E'\\xe4' where k = '_'",
        )
        .await
        .unwrap();
    let report = run(options(side(&server, "ascii"), side(&server, "utf8"))).await.unwrap();
    assert_eq!((report.tables[0].missing, report.tables[0].extra), (1, 1));
}

/// Finds each of a series of random single differences in 100,000 rows.
#[tokio::test]
async fn every_single_injected_difference_is_found() {
    const ROWS: u64 = 100_000;
    let server = support::server();
    let (mut a, mut b) = databases(&server).await;
    let make = "create table public.t (id bigint primary key, name text, n numeric, d timestamptz, \
            f float8, b bool, j jsonb); \
         insert into public.t select g, 'name ' || g, g / 7.0, to_timestamp(g), g / 3.0::float8, \
            g % 2 = 0, json_build_object('k', g)::jsonb from generate_series(1, 100000) g; \
         create table public.keyless as select id % 1000 as a, name from public.t; analyze";
    a.execute(make).await.unwrap();
    b.execute(make).await.unwrap();
    let started = Instant::now();
    let report = verify(&server).await;
    let rate = (ROWS * 2) as f64 / started.elapsed().as_secs_f64();
    println!("verify: {rate:.0} rows/s compared");
    assert!(report.equal, "{report:?}");
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut rng = fastrand::Rng::with_seed(seed);
    let changes = [
        "update public.t set name = name || ' ' where id = $",
        "update public.t set name = null where id = $",
        "update public.t set n = n + 0.0000000001 where id = $",
        "update public.t set d = d + interval '1 us' where id = $",
        "update public.t set f = f + 1e-11 where id = $",
        "update public.t set b = not b where id = $",
        "update public.t set j = j || '{\"x\": null}' where id = $",
        "delete from public.t where id = $",
        "update public.t set id = -id where id = $",
    ];
    for change in changes {
        let id = rng.u64(1..=ROWS);
        assert_eq!(b.execute(&change.replace('$', &id.to_string())).await.unwrap(), 1);
        let report = verify(&server).await;
        let t = table(&report, "public.t");
        let moved = change.contains("-id");
        assert_eq!((report.equal, t.differing), (false, if moved { 2 } else { 1 }), "{change}");
        assert!(t.keys.iter().any(|d| d.key == format!("id={id}")), "{change} {id}: {t:?}");
        assert!(table(&report, "public.keyless").equal);
        let mend = format!(
            "delete from public.t where id in ({id}, -{id}::bigint); insert into public.t \
             select g, 'name ' || g, g / 7.0, to_timestamp(g), g / 3.0::float8, g % 2 = 0, \
             json_build_object('k', g)::jsonb from generate_series({id}, {id}) g"
        );
        b.execute(&mend).await.unwrap();
    }
    assert!(verify(&server).await.equal);
    b.execute("insert into public.keyless select * from public.keyless limit 1").await.unwrap();
    let report = verify(&server).await;
    let keyless = table(&report, "public.keyless");
    assert_eq!((keyless.extra, keyless.differing, keyless.keys.len()), (1, 1, 1));
}

#[tokio::test]
async fn counts_are_exact_where_everything_differs_and_the_list_is_cut() {
    let server = support::server();
    let (mut a, mut b) = databases(&server).await;
    let make = "create table public.t (id int primary key, v int); \
         insert into public.t select g, 1 from generate_series(1, 30000) g; analyze";
    a.execute(make).await.unwrap();
    b.execute(make).await.unwrap();
    b.execute("update public.t set v = 2; delete from public.t where id > 29990").await.unwrap();
    let report = verify(&server).await;
    let t = &report.tables[0];
    assert_eq!((t.rows, t.rows_target, t.keys.len()), (30000, 29990, 100));
    assert_eq!((t.differing, t.different, t.missing), (30000, 29990, 10));
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!(json["tables"][0]["differing"], 30000);
    assert_eq!(json["equal"], false);
    assert_eq!(json["tables"][0]["name"], "public.t");
}

/// Of both databases, with the sessions that keep them.
async fn snapshots(server: &Server) -> (Vec<Session>, Vec<Side>) {
    let (mut holders, mut sides) = (Vec::new(), Vec::new());
    for dbname in ["a", "b"] {
        let mut holder = support::session(server, dbname).await;
        holder.execute("begin isolation level repeatable read").await.unwrap();
        let row = holder.query_one("select pg_export_snapshot()", &[]).await.unwrap();
        let mut side = side(server, dbname);
        side.snapshot = Some(row.string(0).unwrap());
        sides.push(side);
        holders.push(holder);
    }
    (holders, sides)
}

#[tokio::test]
async fn snapshots_are_compared_while_both_sides_go_on() {
    let server = support::server();
    let (mut a, mut b) = databases(&server).await;
    let make = "create table public.t (id int primary key, v int); \
         create table public.u (id int primary key); \
         insert into public.t select g, 1 from generate_series(1, 5000) g";
    a.execute(make).await.unwrap();
    b.execute(make).await.unwrap();
    let (mut holders, mut sides) = snapshots(&server).await;
    a.execute("update public.t set v = 2 where id < 1000").await.unwrap();
    b.execute("delete from public.t where id > 1000; insert into public.u values (1)")
        .await
        .unwrap();
    let mut options = options(sides.remove(0), sides.remove(0));
    let seen: Arc<Mutex<Vec<Progress>>> = Arc::default();
    let progress = seen.clone();
    options.on_progress = Some(Arc::new(move |p| progress.lock().unwrap().push(p.clone())));
    let report = run(options.clone()).await.unwrap();
    assert!(report.equal && report.tables.len() == 2, "{report:?}");
    {
        let seen = seen.lock().unwrap();
        let last = seen.last().unwrap();
        assert_eq!((last.tables, last.tables_total, last.rows), (2, 2, 5000));
        assert_eq!(last.bytes, last.bytes_total);
    }
    assert!(!verify(&server).await.equal);
    // The snapshot ends with its transaction, and the message says so.
    holders[1].execute("rollback").await.unwrap();
    let error = run(options).await.unwrap_err();
    assert!(matches!(error, Error::Snapshot { .. }), "{error}");
    assert!(error.to_string().contains("of the target"), "{error}");
}

#[tokio::test]
async fn a_table_rewritten_since_its_snapshot_is_handed_back_and_not_called_different() {
    let server = support::server();
    let (mut a, mut b) = databases(&server).await;
    let make = "create table public.t (id int primary key, v int); \
         create table public.u (id int primary key); \
         create table public.p (id int) partition by range (id); \
         create table public.p1 partition of public.p for values from (0) to (10000); \
         insert into public.t select g, 1 from generate_series(1, 5000) g; \
         insert into public.u select g from generate_series(1, 100) g; \
         insert into public.p select g from generate_series(1, 100) g";
    a.execute(make).await.unwrap();
    b.execute(make).await.unwrap();
    let (_holders, mut sides) = snapshots(&server).await;
    // Both see the same rows still, if they look at the right file.
    a.execute("truncate public.t").await.unwrap();
    b.execute("truncate public.p1").await.unwrap();
    let report = run(options(sides.remove(0), sides.remove(0))).await.unwrap();
    let handed_back: Vec<String> = report.rewritten.iter().map(ToString::to_string).collect();
    assert_eq!(handed_back, ["public.p", "public.t"], "{report:?}");
    let compared: Vec<_> = report.tables.iter().map(|t| (&*t.name, t.equal)).collect();
    assert_eq!(compared, [("public.u", true)]);
    assert!(!report.equal);
    let again = walferry::verify::Report::clone(&report);
    assert_eq!(report.amend(again).rewritten.len(), 2);
}

#[tokio::test]
async fn a_table_that_may_not_be_read_is_named_with_its_grant() {
    let server = support::server();
    let (mut a, mut b) = databases(&server).await;
    a.execute("create role reader login").await.unwrap();
    let make = "create table public.t (id int primary key); insert into public.t values (1)";
    a.execute(make).await.unwrap();
    b.execute(make).await.unwrap();
    let mut source = side(&server, "a");
    source.config.user = "reader".to_string();
    let options = options(source, side(&server, "b"));
    let error = run(options.clone()).await.unwrap_err().to_string();
    assert!(error.contains("public.t") && error.contains("GRANT SELECT"), "{error}");
    a.execute("grant select on public.t to reader").await.unwrap();
    assert!(run(options.clone()).await.unwrap().equal);
    // Row-level security hides rows: refused, never compared in part.
    a.execute("alter table public.t enable row level security").await.unwrap();
    let error = run(options).await.unwrap_err().to_string();
    assert!(error.contains("public.t") && error.contains("BYPASSRLS"), "{error}");
}

/// Every built-in type and every way a user can build on them.
const TYPES: &str = "
create schema \"My S\";
create type \"My S\".color as enum ('red', 'Green', 'b l u e');
create domain \"My S\".amount as float8 check (value < 1e300);
create domain \"My S\".amounts as float8[];
create type \"My S\".pair as (n int, \"F x\" float8, c \"My S\".color, t text);
create type \"My S\".nested as (p \"My S\".pair, ps \"My S\".pair[]);
create type \"My S\".frange as range (subtype = float8);
create function public.shout(\"My S\".color) returns text language sql immutable
  as 'select ''same''::text';
create cast (\"My S\".color as text) with function public.shout(\"My S\".color);
create table \"My S\".\"All types\" (
  id int primary key, a bool, b int2, c int4, d int8, e float4, f float8, g numeric,
  h numeric(10,2),
  i money, j text, k varchar(10), l char(8), m bpchar, n name, o \"char\", p bytea,
  q date, r time, s timetz, t timestamp, u timestamptz, v interval,
  w uuid, x inet, y cidr, z macaddr, aa macaddr8, ab bit(3), ac varbit, ad json, ae jsonb, af xml,
  ag tsvector, ah tsquery, ai point, aj line, ak lseg, al box, am path, an polygon, ao circle,
  ap int4range, aq numrange, ar tstzrange, au oid, av regclass, aw regtype, ax regproc, ay pg_lsn,
  az xid, ba tid, bb int[], bc text[][], bd float8[], be numeric[], bf \"My S\".color,
  bg \"My S\".color[], bh \"My S\".amount, bi \"My S\".amounts, bj \"My S\".pair,
  bk \"My S\".nested,
  bl \"My S\".frange, bm timestamptz[], bn point[], bo txid_snapshot, bp regrole, bq int2vector,
  br oidvector, bs \"My S\".pair[]
);
insert into \"My S\".\"All types\" (id) values (0);
insert into \"My S\".\"All types\" values (1, true, -1, 2, 3, 0.1, 1e-7, 'NaN', 1.50,
  '-1234.5', E'a,\"b''\\\\', 'é', 'pad', 'pad  ', 'a name', 'x', '\\x00ff',
  'infinity', '23:59:59.999999', '12:00+05:30', '4000-01-01 BC', '-infinity',
  '1 year 2 mons -3 days 04:05:06.7',
  'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11', '10.0.0.1', '10.0.0.0/8', '08:00:2b:01:02:03',
  '08:00:2b:01:02:03:04:05', '101', '', '{\"b\": 1, \"a\":  2.0}', '{\"b\": 1, \"a\": 2.0,
  \"c\": 1e3}', '<a>ä</a>',
  'fat:2 cat:1A', 'fat & (rat | cat)', '(0.1,1e20)', '{1,-1,0.3}', '[(0,0.1),(1,1)]',
  '(1,1),(0,0.1)',
  '[(0.1,0),(1,1)]', '((0.1,0),(1,1))', '<(0.1,0),2.3>',
  '[1,5)', 'empty', '[2020-01-01,)', 4294967295, 'pg_catalog.pg_class', '\"My S\".color',
  'pg_catalog.now', '16/B374D848',
  '42', '(0,1)', '[0:1]={1,null}', '{{a,\"b c\"},{null,\"NULL\"}}', '{0.1,null,NaN,-0,1e-7}',
  '{1.0,NaN}', 'b l u e',
  '{red,\"b l u e\",null}', 0.1, '{0.1,2}', '(1,0.1,Green,\"a \"\"b\")',
  '(\"(1,0.1,red,)\",\"{\"\"(1,0.3,red,x)\"\",\"\"(,,,)\"\",NULL}\")', '[0.1,0.3)',
  '{2020-01-01 00:00+00}',
  '{\"(0.1,0.2)\",null}', '10:20:10,14,15', 'postgres', '1 2', '3 4', '{\"(1,0.1,red,y)\",null}');
insert into \"My S\".\"All types\" (id, f, bd) values (2, 'inf'::float8 - 'inf',
  array['inf'::float8 - 'inf']);
";

/// Changes that must each be seen, in types that are hard to print alike.
const TYPE_CHANGES: &[(&str, &str)] = &[
    ("e", "'-0.1'"),
    ("f", "1.0000000000000002e-7"),
    ("l", "'pad2'"),
    ("m", "'pad'"),
    ("o", "'y'"),
    ("p", "'\\x00fe'"),
    ("ac", "null"),
    ("ad", "'{\"b\": 1, \"a\": 2.0}'"),
    ("ai", "'(0.1,1.0000000000000002e20)'"),
    ("ao", "'<(0.1,0),2.3000000000000003>'"),
    ("bb", "'{1,null}'"),
    ("bc", "'{{a,\"b c\"},{null,null}}'"),
    ("bd", "'{0.1,null,NaN,0,1e-7}'"),
    ("bd", "'{0.1,NaN,null,-0,1e-7}'"),
    ("bf", "'red'"),
    ("bh", "0.10000000000000002"),
    ("bi", "'{0.1,2.0000000000000004}'"),
    ("bj", "'(1,0.10000000000000002,Green,\"a \"\"b\")'"),
    ("bj", "'(1,0.1,red,\"a \"\"b\")'"),
    ("bk", "'(\"(1,0.1,red,)\",\"{\"\"(1,0.3,red,x)\"\",NULL,\"\"(,,,)\"\"}\")'"),
    ("bl", "'[0.1,0.3]'"),
    ("bl", "'[0.10000000000000002,0.3)'"),
    ("bn", "'{\"(0.1,0.20000000000000004)\",null}'"),
    ("bs", "'{\"(1,0.1,red,y)\"}'"),
];

async fn check_types(source: (&Server, &str), target: (&Server, &str)) {
    let mut a = support::session(source.0, source.1).await;
    let mut b = support::session(target.0, target.1).await;
    a.execute(TYPES).await.unwrap();
    // Other oids on the target.
    b.execute("create type public.filler as enum ('x'); create table public.f (a public.filler)")
        .await
        .unwrap();
    b.execute("drop table public.f; drop type public.filler").await.unwrap();
    b.execute(TYPES).await.unwrap();
    let options = options(side(source.0, source.1), side(target.0, target.1));
    let report = run(options.clone()).await.unwrap();
    assert!(report.equal && report.tables[0].rows == 3, "{report:?}");
    for (column, value) in TYPE_CHANGES {
        let table = "\"My S\".\"All types\"";
        b.execute(&format!(
            "create table public.kept as select {column} as c from {table} where id = 1; \
             update {table} set {column} = {value} where id = 1"
        ))
        .await
        .unwrap();
        let mut narrowed = options.clone();
        narrowed.selection = Selection::parse(&["My S.*".to_string()], &[], &[]).unwrap();
        let report = run(narrowed).await.unwrap();
        assert_eq!(report.tables[0].differing, 1, "{column} = {value}: {report:?}");
        b.execute(&format!(
            "update {table} set {column} = (select c from public.kept) where id = 1; \
             drop table public.kept"
        ))
        .await
        .unwrap();
    }
    assert!(run(options).await.unwrap().equal);
}

#[tokio::test]
async fn every_type_is_compared_as_copy_would_print_it() {
    let server = support::server();
    databases(&server).await;
    check_types((&server, "a"), (&server, "b")).await;
}

#[tokio::test]
async fn every_type_is_compared_across_versions() {
    for (old, new) in [(10, 18), (10, 10), (14, 17)] {
        let (Ok(old), Ok(new)) = (Server::bin_of(old), Server::bin_of(new)) else {
            println!("skipped: PostgreSQL {old} or {new} is not installed");
            continue;
        };
        let old = Server::start(&old, &[]).unwrap();
        let new = Server::start(&new, &[]).unwrap();
        check_types((&old, "postgres"), (&new, "postgres")).await;
    }
}

/// More values than one function call takes, and more than one scan of a table.
#[tokio::test]
async fn wide_and_large_tables_are_compared_in_pieces() {
    let server = support::server();
    let (mut a, mut b) = databases(&server).await;
    let columns: Vec<String> = (0..1200).map(|i| format!("c{i} int")).collect();
    let make = format!(
        "create table public.wide ({}); insert into public.wide (c0, c1199) values (1, 2), (3, 4)",
        columns.join(", ")
    );
    a.execute(&make).await.unwrap();
    b.execute(&make).await.unwrap();
    assert!(verify(&server).await.equal);
    b.execute("update public.wide set c1198 = c1199, c1199 = null where c0 = 3").await.unwrap();
    let report = verify(&server).await;
    assert_eq!((report.tables[0].missing, report.tables[0].extra), (1, 1));
    let make = "create table public.large (id int primary key, v text); \
         insert into public.large select g, repeat('x', 100) from generate_series(1, 20000) g";
    a.execute(make).await.unwrap();
    b.execute(make).await.unwrap();
    b.execute("delete from public.large where id = 1; insert into public.large values (1, '')")
        .await
        .unwrap();
    let mut options = options(side(&server, "a"), side(&server, "b"));
    options.piece_blocks = 10;
    let scans = Arc::new(Mutex::new(0));
    let counted = scans.clone();
    options.on_progress = Some(Arc::new(move |_| *counted.lock().unwrap() += 1));
    let report = run(options).await.unwrap();
    let large = table(&report, "public.large");
    assert_eq!((large.rows, large.rows_target, large.different), (20000, 20000, 1));
    assert!(*scans.lock().unwrap() > 30);
}
