//! Tests of apply against real servers, fed with hand-made changes.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use walferry::apply::{
    Applied, Applier, BOOKS, DDL, Error, Limits, Mode, Options, ProgressKind, Result,
};
use walferry::change::{
    Begin, Change, Chunk, Column, Commit, Feed, Item, OldRow, Relation, ReplicaIdentity, Row,
    RowBuilder, Value,
};
use walferry::clock::PgTimestamp;
use walferry::demo::server::{Server, StopMode};
use walferry::fault::{Fault, Faulty};
use walferry::id::QualifiedName;
use walferry::lsn::Lsn;
use walferry::pg::{Config, Session};

use crate::support;

mod binary;
mod lanes;
mod random;
mod sets;

/// A column that TOAST left unchanged.
const U: &str = "\u{1}unchanged";
/// SQL NULL.
const N: &str = "\u{1}null";

const STREAM: &str = "walferry_test_forward";

fn row(values: &[&str]) -> Row {
    let mut builder = RowBuilder::new();
    for value in values {
        builder.push(match *value {
            U => Value::Unchanged,
            N => Value::Null,
            text => Value::Text(text.as_bytes()),
        });
    }
    builder.finish()
}

/// A relation of the stream, with the means to make its changes.
#[derive(Clone)]
struct Table(Arc<Relation>);

/// `columns` in stream order; those of the replica identity end in `*`.
fn table(name: &str, identity: ReplicaIdentity, columns: &[&str]) -> Table {
    table_in("public", name, identity, columns)
}

fn table_in(schema: &str, name: &str, identity: ReplicaIdentity, columns: &[&str]) -> Table {
    let columns = columns
        .iter()
        .map(|c| Column {
            name: c.trim_end_matches('*').to_string(),
            type_oid: 0,
            type_modifier: -1,
            key: c.ends_with('*') || identity == ReplicaIdentity::Full,
        })
        .collect();
    let name = QualifiedName::new(schema, name);
    Table(Arc::new(Relation { oid: 1, name, identity, columns }))
}

impl Table {
    fn insert(&self, new: &[&str]) -> Change {
        Change::Insert { relation: self.0.clone(), new: row(new) }
    }

    fn update(&self, new: &[&str]) -> Change {
        Change::Update { relation: self.0.clone(), old: None, new: row(new) }
    }

    fn update_key(&self, old: &[&str], new: &[&str]) -> Change {
        let old = Some(OldRow::Key(row(old)));
        Change::Update { relation: self.0.clone(), old, new: row(new) }
    }

    fn update_full(&self, old: &[&str], new: &[&str]) -> Change {
        let old = Some(OldRow::Full(row(old)));
        Change::Update { relation: self.0.clone(), old, new: row(new) }
    }

    fn delete(&self, old: &[&str]) -> Change {
        Change::Delete { relation: self.0.clone(), old: OldRow::Key(row(old)) }
    }

    fn delete_full(&self, old: &[&str]) -> Change {
        Change::Delete { relation: self.0.clone(), old: OldRow::Full(row(old)) }
    }
}

fn truncate(tables: &[&Table], restart_identity: bool) -> Change {
    let relations = tables.iter().map(|t| t.0.clone()).collect();
    Change::Truncate { relations, cascade: false, restart_identity }
}

/// One chunk of the transaction whose commit record is `at..at + 50`; its xid is `at`.
fn chunk(at: u64, number: u32, last: bool, changes: Vec<Change>) -> Item {
    let commit_time = PgTimestamp(at as i64 * 1_000_000);
    let ending = Default::default();
    let begin = Begin { xid: at as u32, commit_lsn: Lsn(at), commit_time, origin: None, ending };
    let commit = last.then_some(Commit { commit_lsn: Lsn(at), end_lsn: Lsn(at + 50), commit_time });
    let bytes = changes.iter().map(Change::bytes).sum();
    Item::Chunk(Chunk { begin: Arc::new(begin), number, changes, commit, bytes })
}

fn transaction(at: u64, changes: Vec<Change>) -> Item {
    chunk(at, 0, true, changes)
}

/// A feed from memory that ends after its last item.
struct Items(VecDeque<Item>);

impl Feed for Items {
    async fn pop(&mut self) -> Option<Item> {
        self.0.pop_front()
    }

    fn try_pop(&mut self) -> Option<Item> {
        self.0.pop_front()
    }
}

/// A feed that the test goes on filling.
struct Channel(mpsc::UnboundedReceiver<Item>);

impl Feed for Channel {
    async fn pop(&mut self) -> Option<Item> {
        self.0.recv().await
    }

    fn try_pop(&mut self) -> Option<Item> {
        self.0.try_recv().ok()
    }
}

/// An applier at work in a task.
struct Running {
    items: mpsc::UnboundedSender<Item>,
    positions: watch::Receiver<Applied>,
    hold: watch::Sender<Option<Lsn>>,
    shutdown: watch::Sender<bool>,
    task: JoinHandle<Result<()>>,
}

impl Running {
    fn start(mut applier: Applier) -> Running {
        let (items, feed) = mpsc::unbounded_channel();
        let (applied, positions) = watch::channel(Applied::default());
        let (hold, hold_seen) = watch::channel(None);
        let (shutdown, shutdown_seen) = watch::channel(false);
        let task = tokio::spawn(async move {
            applier.run(Channel(feed), &applied, hold_seen, shutdown_seen).await
        });
        Running { items, positions, hold, shutdown, task }
    }

    fn send(&self, item: Item) {
        self.items.send(item).unwrap();
    }

    async fn wait(&mut self, what: impl FnMut(&Applied) -> bool) -> Applied {
        let waited = tokio::time::timeout(Duration::from_secs(20), self.positions.wait_for(what));
        *waited.await.expect("positions stand still").expect("the applier stopped")
    }

    /// Ends the feed and gives the outcome.
    async fn end(self) -> Result<()> {
        drop(self.items);
        tokio::time::timeout(Duration::from_secs(20), self.task).await.unwrap().unwrap()
    }
}

/// WALFERRY_APPLY=row or set has these tests see that order only.
fn order() -> Mode {
    std::env::var("WALFERRY_APPLY").map_or(Mode::Auto, |order| order.parse().unwrap())
}

/// Everything of the stream.
fn options() -> Options {
    tuned(order(), None)
}

/// The same in one order, and with other bounds, which then do not grow.
fn tuned(mode: Mode, limits: Option<Limits>) -> Options {
    let mut options = Options::new(STREAM);
    options.tuning.mode = mode;
    if let Some(limits) = limits {
        (options.tuning.limits, options.tuning.limits_max) = (limits, limits);
    }
    options
}

fn config(server: &Server) -> Config {
    Config::parse(&server.uri("postgres")).unwrap().labelled("target")
}

async fn connect(server: &Server) -> Applier {
    Applier::connect(&config(server), options()).await.unwrap()
}

async fn apply_with(server: &Server, options: Options, items: Vec<Item>) -> Result<Applied> {
    let mut applier = Applier::connect(&config(server), options).await?;
    let (applied, positions) = watch::channel(Applied::default());
    let (_hold, hold) = watch::channel(None);
    let (_shutdown, shutdown) = watch::channel(false);
    applier.run(Items(items.into()), &applied, hold, shutdown).await?;
    let last = *positions.borrow();
    assert_eq!(last.applied_lsn, last.durable_lsn, "what ended is durable");
    Ok(last)
}

async fn apply(server: &Server, items: Vec<Item>) -> Result<Applied> {
    apply_with(server, options(), items).await
}

/// A target with walferry's tables and those of `sql`.
async fn target(sql: &str) -> (Server, Session) {
    let server = support::server();
    let mut session = support::session(&server, "postgres").await;
    session.execute(DDL).await.unwrap();
    session.execute(sql).await.unwrap();
    (server, session)
}

/// All rows as `a|b`, one a line, NULL as `-`.
async fn rows(session: &mut Session, sql: &str) -> String {
    let rows = session.query(sql).await.unwrap();
    let lines: Vec<String> = rows
        .iter()
        .map(|row| {
            let columns: Vec<&str> =
                (0..row.len()).map(|i| row.opt(i).unwrap().unwrap_or("-")).collect();
            columns.join("|")
        })
        .collect();
    lines.join("\n")
}

/// `applied/filtered` of a table, having checked that the books balance.
async fn counts(session: &mut Session, name: &str) -> String {
    let sql = format!(
        "select decoded = applied + filtered + quarantined, applied, filtered from ({BOOKS}) as b \
         where name = '{name}'"
    );
    let row = session.query_one(&sql, &[Some(STREAM)]).await.unwrap();
    assert!(row.bool(0).unwrap(), "the books of {name} do not balance");
    format!("{}/{}", row.str(1).unwrap(), row.str(2).unwrap())
}

use ReplicaIdentity::{Default as ByKey, Full, Index, Nothing};

#[tokio::test]
async fn every_operation_is_applied_for_every_replica_identity() {
    let (server, mut session) = target(
        "create table public.k (id int primary key, v text); \
         create table public.i (a int not null unique, b text, id int primary key); \
         create table public.f (a int, b text); \
         create table public.fk (id int primary key, v text); \
         create table public.n (a int);",
    )
    .await;
    let k = table("k", ByKey, &["id*", "v"]);
    let i = table("i", Index, &["a*", "b", "id"]);
    let f = table("f", Full, &["a", "b"]);
    let fk = table("fk", Full, &["id", "v"]);
    let n = table("n", Nothing, &["a"]);
    let applied = apply(
        &server,
        vec![
            transaction(
                100,
                vec![
                    k.insert(&["1", "one"]),
                    k.insert(&["2", "two"]),
                    k.insert(&["3", N]),
                    i.insert(&["1", "x", "7"]),
                    i.insert(&["2", "y", "8"]),
                    f.insert(&["1", "x"]),
                    f.insert(&[N, "y"]),
                    f.insert(&[N, N]),
                    fk.insert(&["1", "x"]),
                    fk.insert(&["2", "y"]),
                    n.insert(&["1"]),
                    n.insert(&["1"]),
                ],
            ),
            transaction(
                200,
                vec![
                    k.update(&["1", "uno"]),
                    k.update_key(&["2", N], &["20", "two"]),
                    k.delete(&["3", N]),
                    i.update(&["1", "xx", "70"]),
                    i.delete(&["2", N, N]),
                    f.update_full(&["1", "x"], &["1", N]),
                    f.update_full(&[N, "y"], &["5", "z"]),
                    f.delete_full(&[N, N]),
                    fk.update_full(&["1", "x"], &["10", "xx"]),
                    fk.delete_full(&["2", "y"]),
                ],
            ),
        ],
    )
    .await
    .unwrap();
    assert_eq!((applied.rows, applied.transactions, applied.applied_lsn), (22, 2, Lsn(250)));
    assert_eq!(applied.commit_time, Some(PgTimestamp(200_000_000)));
    assert_eq!(rows(&mut session, "select * from public.k order by 1").await, "1|uno\n20|two");
    assert_eq!(rows(&mut session, "select * from public.i").await, "1|xx|70");
    assert_eq!(rows(&mut session, "select * from public.f order by 1").await, "1|-\n5|z");
    assert_eq!(rows(&mut session, "select * from public.fk").await, "10|xx");
    assert_eq!(rows(&mut session, "select * from public.n").await, "1\n1");
    assert_eq!(counts(&mut session, "k").await, "6/0");
    assert_eq!(counts(&mut session, "n").await, "2/0");
}

#[tokio::test]
async fn names_are_quoted_and_columns_matched_by_name() {
    let (server, mut session) = target(
        "create schema \"S \"\"x\"; \
         create table \"S \"\"x\".\"T.y\" (extra text default 'made here', \"select\" text, \
             gen text generated always as (upper(\"select\")) stored, \"Id$\" int primary key);",
    )
    .await;
    let t = table_in("S \"x", "T.y", ByKey, &["Id$*", "select"]);
    let with_generated = table_in("S \"x", "T.y", ByKey, &["Id$*", "select", "gen"]);
    apply(
        &server,
        vec![
            transaction(100, vec![t.insert(&["1", "a'\\b"]), t.insert(&["2", "b"])]),
            transaction(
                200,
                vec![
                    t.update(&["2", "c"]),
                    with_generated.insert(&["3", "d", "D"]),
                    with_generated.update(&["3", "e", "E"]),
                ],
            ),
        ],
    )
    .await
    .unwrap();
    assert_eq!(
        rows(&mut session, "select * from \"S \"\"x\".\"T.y\" order by 4").await,
        "made here|a'\\b|A'\\B|1\nmade here|c|C|2\nmade here|e|E|3"
    );
    assert_eq!(counts(&mut session, "T.y").await, "5/0");
}

#[tokio::test]
async fn pgcopydb_710_unchanged_toast_is_not_written() {
    let (server, mut session) = target(
        "create table public.t (id int primary key, big text, n int); \
         insert into public.t select i, repeat('x', 10000), 0 from generate_series(1, 3) i;",
    )
    .await;
    let t = table("t", ByKey, &["id*", "big", "n"]);
    let change = vec![
        t.update(&["1", U, "1"]),
        // Key change with unchanged TOAST: in place.
        t.update_key(&["2", N, N], &["20", U, "2"]),
        t.update(&["3", N, "3"]),
    ];
    apply(&server, vec![transaction(100, change)]).await.unwrap();
    assert_eq!(
        rows(&mut session, "select id, length(big), n from public.t order by 1").await,
        "1|10000|1\n3|-|3\n20|10000|2"
    );
}

#[tokio::test]
async fn pgcopydb_883_an_update_that_sets_nothing_is_counted_and_must_find_its_row() {
    let (server, mut session) = target(
        "create table public.k (id int primary key); insert into public.k values (1); \
         create table public.f (a text, g text generated always as (a) stored); \
         insert into public.f values ('x'), ('x');",
    )
    .await;
    let k = table("k", ByKey, &["id*"]);
    let f = table("f", Full, &["a"]);
    let change = vec![k.update(&["1"]), f.update_full(&["x"], &["x"])];
    let applied = apply(&server, vec![transaction(100, change)]).await.unwrap();
    assert_eq!(applied.rows, 2);
    assert_eq!(counts(&mut session, "k").await, "1/0");
    let error = apply(&server, vec![transaction(200, vec![k.update(&["2"])])]).await.unwrap_err();
    assert!(matches!(error, Error::RowMissing { .. }), "{error}");
}

#[tokio::test]
async fn pgcopydb_706_full_identity_finds_rows_with_nulls_and_pgdog_duplicates_lose_one_row() {
    let (server, mut session) = target(
        "create table public.f (a int, b json, c point, d numeric, e text[], f xml); \
         create table public.p (a int, b text) partition by range (a); \
         create table public.p1 partition of public.p for values from (0) to (10); \
         create table public.p2 partition of public.p for values from (10) to (20);",
    )
    .await;
    let f = table("f", Full, &["a", "b", "c", "d", "e", "f"]);
    let p = table("p", Full, &["a", "b"]);
    let twin = ["1", "{\"k\":  1}", "(1,2)", "1.0", "{a,NULL}", "<a/>"];
    let other = ["1", "{\"k\":  1}", "(1,2)", "1.00", "{a,NULL}", "<a/>"];
    let empty = [N, N, N, N, N, N];
    let setup = vec![
        f.insert(&twin),
        f.insert(&other),
        f.insert(&twin),
        f.insert(&empty),
        f.insert(&empty),
        // The first row of both partitions has the same ctid.
        p.insert(&["1", "x"]),
        p.insert(&["1", "x"]),
        p.insert(&["11", "x"]),
        p.insert(&["11", "x"]),
    ];
    let change = vec![
        // Equal to all three rows, and reads like one.
        f.update_full(&other, &["2", "[]", N, "5", "{}", N]),
        f.delete_full(&twin),
        f.delete_full(&empty),
        p.delete_full(&["11", "x"]),
        p.update_full(&["1", "x"], &["12", "moved"]),
    ];
    apply(&server, vec![transaction(100, setup), transaction(200, change)]).await.unwrap();
    assert_eq!(
        rows(&mut session, "select a, b, d, e from public.f order by a, d nulls last").await,
        "1|{\"k\":  1}|1.0|{a,NULL}\n2|[]|5|{}\n-|-|-|-"
    );
    assert_eq!(
        rows(&mut session, "select tableoid::regclass, * from public.p order by 2").await,
        "public.p1|1|x\npublic.p2|11|x\npublic.p2|12|moved"
    );
}

#[tokio::test]
async fn pgcopydb_976_identity_always_columns_are_inserted_kept_and_changed() {
    let (server, mut session) = target(
        "create table public.k (id int generated always as identity primary key, v text, \
             extra text default 'kept'); \
         create table public.s (id int primary key, s int generated always as identity, big text, \
             g int generated always as (id * 2) stored); \
         create table public.f (s int generated always as identity, v text);",
    )
    .await;
    let k = table("k", ByKey, &["id*", "v"]);
    let s = table("s", ByKey, &["id*", "s", "big"]);
    let f = table("f", Full, &["s", "v"]);
    let setup = vec![
        k.insert(&["5", "a"]),
        k.insert(&["6", "b"]),
        s.insert(&["1", "10", "toasted"]),
        s.insert(&["2", "20", "toasted"]),
        f.insert(&["1", "a"]),
        f.insert(&["1", "a"]),
    ];
    let change = vec![
        k.update(&["5", "aa"]),
        k.update_key(&["6", N], &["60", "bb"]),
        // The stream does not say whether the identity column changed; only the target can tell.
        s.update(&["1", "10", "same"]),
        s.update(&["2", "21", U]),
        s.update_key(&["1", N, N], &["11", "10", U]),
        f.update_full(&["1", "a"], &["1", "b"]),
        f.update_full(&["1", "a"], &["2", "a"]),
    ];
    session.execute("update public.k set extra = 'x'").await.unwrap();
    apply(&server, vec![transaction(100, setup)]).await.unwrap();
    session.execute("update public.k set extra = 'mine' where id = 6").await.unwrap();
    apply(&server, vec![transaction(200, change)]).await.unwrap();
    assert_eq!(
        rows(&mut session, "select * from public.k order by 1").await,
        "5|aa|kept\n60|bb|mine"
    );
    assert_eq!(
        rows(&mut session, "select * from public.s order by 1").await,
        "2|21|toasted|4\n11|10|same|22"
    );
    assert_eq!(rows(&mut session, "select * from public.f order by 1").await, "1|b\n2|a");
    let gone = transaction(300, vec![s.update(&["99", "1", "x"])]);
    assert!(matches!(apply(&server, vec![gone]).await, Err(Error::RowMissing { .. })));
}

#[tokio::test]
async fn pgcopydb_981_a_materialized_view_is_never_touched() {
    let (server, mut session) = target(
        "create materialized view public.m as select 1 as a; create view public.v as select 1 a;",
    )
    .await;
    let m = table("m", ByKey, &["a*"]);
    let change = vec![m.insert(&["2"]), m.delete(&["1"])];
    apply(&server, vec![transaction(100, change)]).await.unwrap();
    assert_eq!(rows(&mut session, "select * from public.m").await, "1");
    assert_eq!(counts(&mut session, "m").await, "0/2");
    let v = transaction(200, vec![table("v", ByKey, &["a*"]).insert(&["2"])]);
    let error = apply(&server, vec![v]).await.unwrap_err();
    assert!(error.to_string().contains("public.v is not a table"), "{error}");
}

#[tokio::test]
async fn triggers_and_foreign_keys_do_not_act() {
    let (server, mut session) = target(
        "create table public.t (id int primary key, parent int references public.t on delete \
             cascade, v text); \
         create table public.log (v text); \
         create function public.f() returns trigger language plpgsql as $$ begin \
             insert into public.log values (tg_op); return null; end $$; \
         create trigger g before insert or update on public.t for each row \
             execute function public.f();",
    )
    .await;
    let t = table("t", ByKey, &["id*", "parent", "v"]);
    let change = vec![
        t.insert(&["2", "1", "child first"]),
        t.insert(&["1", N, "root"]),
        t.insert(&["3", "1", "child"]),
        t.update(&["3", "1", "new"]),
        // The source sends the cascaded deletes as well.
        t.delete(&["1", N, N]),
        t.delete(&["2", N, N]),
    ];
    apply(&server, vec![transaction(100, change)]).await.unwrap();
    assert_eq!(rows(&mut session, "select * from public.t").await, "3|1|new");
    assert_eq!(rows(&mut session, "select * from public.log").await, "");
    // A trigger that does act, and swallows the row, is noticed before COMMIT.
    session.execute("alter table public.t enable always trigger g").await.unwrap();
    let lost = transaction(200, vec![t.insert(&["9", N, "x"])]);
    let error = apply(&server, vec![lost]).await.unwrap_err();
    assert!(error.to_string().contains("INSERT of public.t key (id)=(9)"), "{error}");
    assert_eq!(rows(&mut session, "select * from public.log").await, "");
}

#[tokio::test]
async fn truncate_empties_tables_linked_by_foreign_keys_and_only_those_of_the_job() {
    let (server, mut session) = target(
        "create table public.a (id int generated by default as identity primary key); \
         create table public.b (id int primary key references public.a); \
         create table public.parent (x int); create table public.child () inherits (public.parent); \
         create table public.part (x int) partition by list (x); \
         create table public.part1 partition of public.part default; \
         create table public.outside (x int); \
         insert into public.a default values; insert into public.b values (1); \
         insert into public.child values (1); insert into public.part values (1); \
         insert into public.outside values (1);",
    )
    .await;
    let [a, b] = ["a", "b"].map(|n| table(n, ByKey, &["id*"]));
    let [parent, part, outside] = ["parent", "part", "outside"].map(|n| table(n, Nothing, &["x"]));
    let options =
        Options { tables: Some(Arc::new(|t: &QualifiedName| t.name != "outside")), ..options() };
    let change = vec![truncate(&[&a, &b, &outside], true), truncate(&[&parent, &part], false)];
    apply_with(&server, options, vec![transaction(100, change)]).await.unwrap();
    assert_eq!(rows(&mut session, "select * from public.b, public.a, public.part").await, "");
    assert_eq!(rows(&mut session, "select * from public.child, public.outside").await, "1|1");
    assert_eq!(rows(&mut session, "select nextval('public.a_id_seq')").await, "1");
    assert_eq!(counts(&mut session, "outside").await, "0/1");
    let error = apply(&server, vec![transaction(200, vec![truncate(&[&a], false)])]).await;
    let message = error.unwrap_err().to_string();
    assert!(message.contains("TRUNCATE of public.a") && message.contains("0A000"), "{message}");
}

#[tokio::test]
async fn every_type_travels_as_its_text() {
    let types = [
        ("b", "bool", "true"),
        ("by", "bytea", "'\\x00ff5c27'"),
        ("c1", "\"char\"", "'x'"),
        ("nm", "name", "'Nm'"),
        ("i8", "int8", "-9223372036854775808"),
        ("i2", "int2", "-32768"),
        ("i4", "int4", "2147483647"),
        ("t", "text", "'\u{e4}\u{1f600} '' \\ \" ,{}'"),
        ("oi", "oid", "4294967295"),
        ("js", "json", "'{\"a\":  1, \"a\":2}'"),
        ("jb", "jsonb", "'{\"k\": [1.10, null]}'"),
        ("jp", "jsonpath", "'$.a[*] ? (@ > 1)'"),
        ("x", "xml", "'<a b=\"1\">t</a>'"),
        ("pt", "point", "'(0.1,1e300)'"),
        ("ls", "lseg", "'[(1,2),(3,4)]'"),
        ("pa", "path", "'[(1,2),(3,4)]'"),
        ("bx", "box", "'(3,4),(1,2)'"),
        ("po", "polygon", "'((1,2),(3,4))'"),
        ("li", "line", "'{1,-1,0}'"),
        ("ci", "circle", "'<(1,2),0.3>'"),
        ("f4", "float4", "0.1"),
        ("f8", "float8", "0.1::float8 + 0.2"),
        ("fn", "float8", "'NaN'"),
        ("fz", "float8", "'-0'"),
        ("mo", "money", "12.34"),
        ("ma", "macaddr", "'08:00:2b:01:02:03'"),
        ("m8", "macaddr8", "'08:00:2b:01:02:03:04:05'"),
        ("ine", "inet", "'10.1.2.3/8'"),
        ("cid", "cidr", "'10.0.0.0/8'"),
        ("bp", "char(5)", "'ab'"),
        ("vc", "varchar(5)", "'abcde'"),
        ("d", "date", "'-infinity'"),
        ("d5", "date", "'12345-06-07'"),
        ("bc", "date", "'0044-03-15 BC'"),
        ("ti", "time(3)", "'24:00:00'"),
        ("ts", "timestamp", "'infinity'"),
        ("tz", "timestamptz", "'2001-02-03 04:05:06.789012+09'"),
        ("iv", "interval", "'-1 mons +30 days -00:00:01.5'"),
        ("tt", "timetz", "'01:02:03.4-05:30'"),
        ("bi", "bit(3)", "B'101'"),
        ("vb", "varbit", "B'10101'"),
        ("nu", "numeric(20,5)", "'1234567890.10000'"),
        ("nn", "numeric", "'NaN'"),
        ("ni", "numeric", "'Infinity'"),
        ("uu", "uuid", "'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11'"),
        ("tv", "tsvector", "'''a b'':1A c:2'"),
        ("tq", "tsquery", "'a & !b:*'"),
        ("ps", "pg_snapshot", "'10:20:10,14'"),
        ("pl", "pg_lsn", "'16/B374D848'"),
        ("rc", "regclass", "'pg_catalog.pg_class'"),
        ("ir", "int4range", "'[1,5)'"),
        ("er", "int4range", "'empty'"),
        ("tr", "tstzrange", "'[2001-01-01 00:00+00,)'"),
        ("mr", "int4multirange", "'{[1,2),[5,9)}'"),
        ("en", "public.\"Mo od\"", "'so \"so\"'"),
        ("dm", "public.dom", "'Abc'"),
        ("d2", "public.dom2", "'Abc'"),
        ("co", "public.comp", "row(1, 'a,b\"c', array['x','y'])"),
        ("ia", "int[]", "'[0:1]={1,NULL}'"),
        ("ta", "text[]", "array['NULL', NULL, '', 'a\"b', '{}']"),
        ("i2d", "int[]", "'{{1,2},{3,4}}'"),
        ("ea", "public.\"Mo od\"[]", "array['ok']::public.\"Mo od\"[]"),
        ("da", "public.dom[]", "array['x','y']::public.dom[]"),
        ("ca", "public.comp[]", "array[row(1,'z',null)]::public.comp[]"),
        ("ra", "int4range[]", "array['[1,2)']::int4range[]"),
        ("ja", "json[]", "array['{\"a\": 1}']::json[]"),
        ("iv2", "int2vector", "'1 2'"),
        ("ov", "oidvector", "'1 2'"),
    ];
    let columns: Vec<String> = types.iter().map(|t| format!("\"{}\" {}", t.0, t.1)).collect();
    let values: Vec<String> = types.iter().map(|t| format!("({})::{}", t.2, t.1)).collect();
    let (server, mut session) = target(&format!(
        "create type public.\"Mo od\" as enum ('ok', 'so \"so\"'); \
         create domain public.dom as varchar(10) check (value <> 'bad'); \
         create domain public.dom2 as public.dom not null default ''; \
         create type public.comp as (a int, b text, c text[]); \
         create table public.f ({columns}); create table public.k (id int primary key, {columns}); \
         create table public.origin ({columns}); insert into public.origin values ({})",
        values.join(", "),
        columns = columns.join(", "),
    ))
    .await;
    let texts: Vec<String> = types.iter().map(|t| format!("\"{}\"::text", t.0)).collect();
    let sql = format!("select {} from public.origin", texts.join(", "));
    let source = session.query_one(&sql, &[]).await.unwrap();
    let values: Vec<&str> = (0..types.len()).map(|i| source.str(i).unwrap()).collect();
    let names: Vec<&str> = types.iter().map(|t| t.0).collect();
    let f = table("f", Full, &names);
    let k = table("k", ByKey, &[vec!["id*"], names.clone()].concat());
    let key =
        |id, rest: &[&'static str]| -> Vec<&'static str> { [vec![id], rest.to_vec()].concat() };
    let null: Vec<&str> = names.iter().map(|n| if *n == "d2" { "x" } else { N }).collect();
    let given = [vec!["1"], values.clone()].concat();
    apply(
        &server,
        vec![
            transaction(100, vec![f.insert(&values), f.insert(&null), k.insert(&key("1", &null))]),
            transaction(200, vec![k.update(&given), f.update_full(&null, &values)]),
            // Found by every column at once, whatever its type.
            transaction(300, vec![f.delete_full(&values)]),
        ],
    )
    .await
    .unwrap();
    for table in ["f", "k"] {
        let same: Vec<String> = names
            .iter()
            .map(|n| format!("a.\"{n}\"::text is not distinct from b.\"{n}\"::text as \"{n}\""))
            .collect();
        let sql = format!("select {} from public.{table} a, public.origin b", same.join(", "));
        let row = session.query_one(&sql, &[]).await.unwrap();
        for (index, name) in names.iter().enumerate() {
            assert_eq!(row.str(index).unwrap(), "t", "column {name} of {table}");
        }
    }
}

#[tokio::test]
async fn restart_from_any_confirmed_position_applies_nothing_twice() {
    for kind in [ProgressKind::Origin, ProgressKind::Table] {
        let (server, mut session) = target("create table public.t (id int, n int)").await;
        let t = table("t", Nothing, &["id", "n"]);
        let stream: Vec<Item> =
            (1..=6).map(|n| transaction(n * 100, vec![t.insert(&[&n.to_string(), "0"])])).collect();
        let options = || Options { progress: kind, ..options() };
        for (from, to) in [(0, 2), (0, 2), (1, 4), (4, 4), (0, 6), (5, 6)] {
            apply_with(&server, options(), stream[from..to].to_vec()).await.unwrap();
        }
        assert_eq!(rows(&mut session, "select id from public.t").await, "1\n2\n3\n4\n5\n6");
        assert_eq!(counts(&mut session, "t").await, "6/0");
        let applier = Applier::connect(&config(&server), options()).await.unwrap();
        assert_eq!(applier.progress(), Lsn(650));
    }
}

#[tokio::test]
async fn a_table_described_anew_within_a_batch_is_written_by_both_descriptions() {
    let (server, mut session) =
        target("create table public.t (id int primary key, a int default 7, b int)").await;
    let before = table("t", ByKey, &["id*", "b"]);
    let after = table("t", ByKey, &["id*", "a", "b"]);
    let stream = vec![
        transaction(100, vec![before.insert(&["1", "1"]), before.update(&["1", "2"])]),
        transaction(200, vec![after.insert(&["2", "3", "4"]), after.update(&["1", "5", "6"])]),
        transaction(300, vec![table("t", ByKey, &["id*", "b"]).update(&["2", "9"])]),
    ];
    apply(&server, stream).await.unwrap();
    assert_eq!(rows(&mut session, "select * from public.t order by 1").await, "1|5|6\n2|3|9");
    assert_eq!(counts(&mut session, "t").await, "5/0");
    let unknown = table("t", ByKey, &["id*", "New C"]);
    let error = apply(&server, vec![transaction(400, vec![unknown.insert(&["3", "1"])])]).await;
    let message = error.unwrap_err().to_string();
    assert!(message.contains("add column \"New C\""), "{message}");
    let nowhere = table("nowhere", ByKey, &["id*"]);
    let error = apply(&server, vec![transaction(400, vec![nowhere.insert(&["3"])])]).await;
    assert!(matches!(error, Err(Error::NoTable { .. })));
}

#[tokio::test]
async fn changes_that_the_copy_read_are_filtered_exactly() {
    let (server, mut session) =
        target("create table public.a (id int); create table public.b (id int)").await;
    let [a, b] = ["a", "b"].map(|n| table(n, Nothing, &["id"]));
    let options = Options {
        visibility: HashMap::from([(
            QualifiedName::new("public", "a"),
            ("150:300:200".parse().unwrap(), Lsn(1000)),
        )]),
        ..options()
    };
    let stream = (1..=4)
        .map(|n| {
            let id = n.to_string();
            transaction(n * 100, vec![a.insert(&[&id]), b.insert(&[&id])])
        })
        .collect();
    let applied = apply_with(&server, options, stream).await.unwrap();
    assert_eq!(applied.rows, 7);
    assert_eq!(rows(&mut session, "select id from public.a").await, "2\n3\n4");
    assert_eq!(counts(&mut session, "a").await, "3/1");
    assert_eq!(counts(&mut session, "b").await, "4/0");
}

/// Ids come round again after 2^32; what commits beyond the snapshot's position is never in the copy.
#[tokio::test]
async fn a_snapshot_is_not_asked_beyond_its_position() {
    let (server, mut session) = target("create table public.a (id int)").await;
    let a = table("a", Nothing, &["id"]);
    let options = Options {
        visibility: HashMap::from([(
            QualifiedName::new("public", "a"),
            ("150:300:200".parse().unwrap(), Lsn(100)),
        )]),
        ..options()
    };
    apply_with(&server, options, vec![transaction(100, vec![a.insert(&["1"])])]).await.unwrap();
    assert_eq!(rows(&mut session, "select id from public.a").await, "1");
}

/// The gate is asked for every change, also of tables that the stream has met while it was shut.
#[tokio::test]
async fn a_gate_that_opens_lets_known_tables_through() {
    let (server, mut session) = target("create table public.a (id int)").await;
    let a = table("a", Nothing, &["id"]);
    let gate = Arc::new(walferry::apply::Gate::default());
    let options = Options { gate: Some(gate.clone()), ..options() };
    let mut running = Running::start(Applier::connect(&config(&server), options).await.unwrap());
    running.send(transaction(100, vec![a.insert(&["1"])]));
    running.wait(|seen| seen.applied_lsn >= Lsn(150)).await;
    gate.turn(None, true);
    running.send(transaction(200, vec![a.insert(&["2"])]));
    running.wait(|seen| seen.applied_lsn >= Lsn(250)).await;
    running.end().await.unwrap();
    assert_eq!(rows(&mut session, "select id from public.a").await, "2");
    assert_eq!(counts(&mut session, "a").await, "1/1");
}

#[tokio::test]
async fn a_refused_row_names_table_key_and_position_and_leaves_nothing() {
    let (server, mut session) =
        target("create table public.t (id int primary key, v varchar(3), n int check (n > 0))")
            .await;
    let t = table("t", ByKey, &["id*", "v", "n"]);
    let good = transaction(100, vec![t.insert(&["1", "a", "1"])]);
    let cases = [
        (t.insert(&["2", "secret", "1"]), "INSERT", "(id)=(2)", "22001"),
        (t.insert(&["2", "abc", "-42"]), "INSERT", "(id)=(2)", "23514"),
        (t.insert(&["1", "abc", "1"]), "INSERT", "(id)=(1)", "23505"),
        (t.update(&["1", "a", "x42"]), "UPDATE", "(id)=(1)", "22P02"),
    ];
    for (change, operation, key, code) in cases {
        let bad = transaction(200, vec![t.insert(&["9", "b", "1"]), change]);
        let error = apply(&server, vec![good.clone(), bad]).await.unwrap_err();
        assert_eq!(error.fault(), Fault::Stop);
        let message = error.to_string();
        for part in [operation, key, code, "public.t", "0/C8", "transaction 200"] {
            assert!(message.contains(part), "{part} in {message}");
        }
        assert!(!message.contains("secret") && !message.contains("-42"), "{message}");
        assert_eq!(rows(&mut session, "select * from public.t").await, "");
    }
    let missing = transaction(200, vec![t.delete(&["404", N, N])]);
    let error = apply(&server, vec![good.clone(), missing]).await.unwrap_err();
    let message = error.to_string();
    for part in ["DELETE", "(id)=(404)", "met 0 rows", "walferry verify"] {
        assert!(message.contains(part), "{part} in {message}");
    }
    assert_eq!(rows(&mut session, "select * from public.t").await, "");
    let nothing = table("t", Nothing, &["id", "v", "n"]);
    let unidentified = transaction(200, vec![nothing.update(&["1", "a", "1"])]);
    let error = apply(&server, vec![unidentified]).await.unwrap_err();
    assert!(error.to_string().contains("replica identity full"), "{error}");
}

#[tokio::test]
async fn a_transaction_larger_than_a_batch_is_invisible_until_its_commit() {
    let (server, mut session) = target("create table public.t (id int primary key)").await;
    let t = table("t", ByKey, &["id*"]);
    let options = tuned(order(), Some(Limits { bytes: 256 << 10, transactions: 100 }));
    let mut running = Running::start(Applier::connect(&config(&server), options).await.unwrap());
    let rows_of = |number: u32| -> Vec<Change> {
        (0..10_000).map(|i| t.insert(&[&(number * 10_000 + i).to_string()])).collect()
    };
    for number in 0..9 {
        running.send(chunk(1000, number, false, rows_of(number)));
    }
    let seen = running.wait(|a| a.rows >= 90_000).await;
    assert_eq!((seen.applied_lsn, seen.transactions), (Lsn(0), 0));
    assert_eq!(rows(&mut session, "select count(*) from public.t").await, "0");
    running.send(chunk(1000, 9, true, rows_of(9)));
    let seen = running.wait(|a| a.durable_lsn == Lsn(1050)).await;
    assert_eq!((seen.rows, seen.transactions), (100_000, 1));
    assert_eq!(rows(&mut session, "select count(*) from public.t").await, "100000");
    assert_eq!(counts(&mut session, "t").await, "100000/0");

    // Cut off by shutdown: rolled back, and comes again from its first chunk.
    running.send(chunk(2000, 0, false, vec![truncate(&[&t], false)]));
    let more = (0..5_000).map(|i| t.insert(&[&i.to_string()])).collect();
    running.send(chunk(2000, 1, false, more));
    running.wait(|a| a.rows >= 105_001).await;
    running.shutdown.send(true).unwrap();
    running.task.await.unwrap().unwrap();
    assert_eq!(rows(&mut session, "select count(*) from public.t").await, "100000");
    let again =
        vec![chunk(2000, 0, false, vec![truncate(&[&t], false)]), chunk(2000, 1, true, vec![])];
    apply(&server, again).await.unwrap();
    assert_eq!(rows(&mut session, "select count(*) from public.t").await, "0");
}

#[tokio::test]
async fn a_stream_that_begins_again_inside_an_open_transaction_is_exact() {
    let (server, mut session) = target("create table public.t (id int primary key)").await;
    let t = table("t", ByKey, &["id*"]);
    let options = tuned(order(), Some(Limits { bytes: 1, transactions: 100 }));
    let mut running = Running::start(Applier::connect(&config(&server), options).await.unwrap());
    running.send(transaction(100, vec![t.insert(&["1"])]));
    running.send(chunk(200, 0, false, vec![t.insert(&["2"])]));
    running.wait(|a| a.rows == 2).await;
    for item in [
        transaction(100, vec![t.insert(&["1"])]),
        chunk(200, 0, false, vec![t.insert(&["2"])]),
        chunk(200, 1, true, vec![t.insert(&["3"])]),
    ] {
        running.send(item);
    }
    running.wait(|a| a.applied_lsn == Lsn(250)).await;
    assert_eq!(rows(&mut session, "select id from public.t").await, "1\n2\n3");
    assert_eq!(counts(&mut session, "t").await, "3/0");
    running.end().await.unwrap();
}

#[tokio::test]
async fn a_backend_killed_in_mid_batch_is_a_retry_and_exact_after_it() {
    let (server, mut session) = target("create table public.t (id int primary key)").await;
    let t = table("t", ByKey, &["id*"]);
    let stream: Vec<Item> =
        (1..=5).map(|n| transaction(n * 100, vec![t.insert(&[&n.to_string()])])).collect();
    let mut running = Running::start(connect(&server).await);
    running.send(stream[0].clone());
    running.wait(|a| a.applied_lsn == Lsn(150)).await;
    // A lock stops the next batch in its middle.
    session.execute("begin; lock table public.t").await.unwrap();
    stream[1..].iter().for_each(|i| running.send(i.clone()));
    let waiting = "select pid from pg_locks where not granted and locktype = 'relation'";
    let pid = loop {
        if let Some(row) = session.query_opt(waiting, &[]).await.unwrap() {
            break row.string(0).unwrap();
        }
        tokio::task::yield_now().await;
    };
    session.query_params("select pg_terminate_backend($1)", &[Some(&pid)]).await.unwrap();
    let error = running.end().await.unwrap_err();
    assert_eq!(error.fault(), Fault::Retry, "{error}");
    session.execute("rollback").await.unwrap();
    apply(&server, stream).await.unwrap();
    assert_eq!(rows(&mut session, "select id from public.t").await, "1\n2\n3\n4\n5");
    assert_eq!(counts(&mut session, "t").await, "5/0");
}

#[tokio::test]
async fn progress_is_never_ahead_of_rows_after_a_crash_of_the_target() {
    for kind in [ProgressKind::Origin, ProgressKind::Table] {
        // No WAL writer to help: what is not asked for is lost.
        let settings = ["fsync = on", "wal_writer_delay = 10s", "wal_writer_flush_after = 0"];
        let server = Server::start(&Server::default_bin().unwrap(), &settings).unwrap();
        let mut session = support::session(&server, "postgres").await;
        session.execute(DDL).await.unwrap();
        session.execute("create table public.t (id int)").await.unwrap();
        let t = table("t", Nothing, &["id"]);
        let stream: Vec<Item> =
            (1..=500).map(|n| transaction(n * 100, vec![t.insert(&[&n.to_string()])])).collect();
        let options = || Options {
            progress: kind,
            ..tuned(order(), Some(Limits { bytes: 1, transactions: 1 }))
        };
        let applier = Applier::connect(&config(&server), options()).await.unwrap();
        let mut running = Running::start(applier);
        stream.iter().take(100).for_each(|i| running.send(i.clone()));
        running.wait(|a| a.durable_lsn >= Lsn(10_050)).await;
        stream.iter().skip(100).for_each(|i| running.send(i.clone()));
        running.wait(|a| a.applied_lsn >= Lsn(40_050)).await;
        server.stop(StopMode::Immediate).unwrap();
        let told = running.positions.borrow().durable_lsn;
        assert_eq!(running.end().await.unwrap_err().fault(), Fault::Retry);
        server.resume().unwrap();

        let applier = Applier::connect(&config(&server), options()).await.unwrap();
        let progress = applier.progress();
        drop(applier);
        assert!(progress >= told, "{progress} was told to the slot as {told}");
        let mut session = support::session(&server, "postgres").await;
        let there = rows(&mut session, "select count(*), max(id) * 100 + 50 from public.t").await;
        assert_eq!(there, format!("{}|{}", progress.0 / 100, progress.0));
        apply_with(&server, options(), stream).await.unwrap();
        let all = "select count(*), count(distinct id) from public.t";
        assert_eq!(rows(&mut session, all).await, "500|500");
        assert_eq!(counts(&mut session, "t").await, "500/0");
    }
}

#[tokio::test]
async fn what_is_written_carries_the_origin_and_stays_out_of_a_local_stream() {
    let (server, mut session) = target("create table public.t (id int primary key)").await;
    session.query("select pg_create_logical_replication_slot('s', 'test_decoding')").await.unwrap();
    let t = table("t", ByKey, &["id*"]);
    // Apart, as together they come to nothing.
    for (at, change) in
        [(100, t.insert(&["1"])), (200, t.update_key(&["1"], &["2"])), (300, t.delete(&["2"]))]
    {
        apply(&server, vec![transaction(at, vec![change])]).await.unwrap();
    }
    session.execute("insert into public.t values (7)").await.unwrap();
    let decode = |local: u8| {
        format!(
            "select data from pg_logical_slot_peek_changes('s', null, null, 'only-local', \
             '{local}', 'skip-empty-xacts', '1', 'include-xids', '0') where data like 'table public%'"
        )
    };
    // A key that changes is one row, or one that goes and one that comes.
    assert!(session.query(&decode(0)).await.unwrap().len() >= 4);
    assert_eq!(rows(&mut session, &decode(1)).await, "table public.t: INSERT: id[integer]:7");
}

/// The slot is told durable positions, and must never be beyond recorded progress: on the next start
/// it would look like one that somebody replaced.
#[tokio::test]
async fn idleness_is_recorded_before_the_slot_may_be_told() {
    let (server, mut session) = target("create table public.t (id int primary key)").await;
    let t = table("t", ByKey, &["id*"]);
    let mut running = Running::start(connect(&server).await);
    running.send(Item::Idle { lsn: Lsn(50) });
    running.wait(|a| a.durable_lsn == Lsn(50)).await;
    running.send(transaction(100, vec![t.insert(&["1"])]));
    running.send(Item::Idle { lsn: Lsn(500) });
    let seen = running.wait(|a| a.durable_lsn == Lsn(500)).await;
    assert_eq!((seen.applied_lsn, seen.last_end_lsn), (Lsn(500), Lsn(150)));
    // Empty transactions, and those with messages only, are the same: not one commit each.
    let before: u64 = rows(&mut session, "select txid_current()").await.parse().unwrap();
    for n in 6..100 {
        running.send(transaction(n * 100, vec![]));
    }
    let seen = running.wait(|a| a.durable_lsn == Lsn(9950)).await;
    assert_eq!((seen.applied_lsn, seen.transactions), (Lsn(9950), 1));
    let after: u64 = rows(&mut session, "select txid_current()").await.parse().unwrap();
    assert!((before + 2..before + 6).contains(&after), "{before} to {after}");
    // Killed here, not ended: what was told is what the next one finds.
    drop(running);
    assert!(connect(&server).await.progress() >= Lsn(9950));
}

#[tokio::test]
async fn commits_become_durable_on_their_own() {
    let settings = ["fsync = on", "wal_writer_delay = 10s"];
    let server = Server::start(&Server::default_bin().unwrap(), &settings).unwrap();
    let mut session = support::session(&server, "postgres").await;
    session.execute(DDL).await.unwrap();
    session.execute("create table public.t (id int primary key)").await.unwrap();
    let t = table("t", ByKey, &["id*"]);
    let mut running = Running::start(connect(&server).await);
    running.send(transaction(100, vec![t.insert(&["1"])]));
    running.wait(|a| a.durable_lsn == Lsn(150)).await;
    running.end().await.unwrap();
}

#[tokio::test]
async fn a_hold_stops_exactly_at_its_position_and_is_released() {
    let (server, mut session) = target("create table public.t (id int primary key)").await;
    let t = table("t", ByKey, &["id*"]);
    let mut running = Running::start(connect(&server).await);
    running.hold.send(Some(Lsn(300))).unwrap();
    for n in 1..=5_u64 {
        running.send(transaction(n * 100, vec![t.insert(&[&n.to_string()])]));
    }
    let seen = running.wait(|a| a.held.is_some()).await;
    assert_eq!(
        (seen.held, seen.applied_lsn, seen.durable_lsn),
        (Some(Lsn(300)), Lsn(250), Lsn(250))
    );
    assert_eq!(rows(&mut session, "select id from public.t").await, "1\n2");
    running.hold.send(Some(Lsn(400))).unwrap();
    let seen = running.wait(|a| a.held == Some(Lsn(400))).await;
    assert_eq!(seen.applied_lsn, Lsn(350));
    running.hold.send(None).unwrap();
    running.wait(|a| a.held.is_none() && a.applied_lsn == Lsn(550)).await;
    // Nothing is waiting, but the source says that it has nothing below.
    running.hold.send(Some(Lsn(1000))).unwrap();
    running.send(Item::Idle { lsn: Lsn(1000) });
    running.wait(|a| a.held == Some(Lsn(1000))).await;
    running.send(Item::Idle { lsn: Lsn(1100) });
    let seen = running.wait(|a| a.applied_lsn == Lsn(1100)).await;
    assert_eq!(seen.held, Some(Lsn(1000)), "idleness does not shake a hold");
    running.end().await.unwrap();
}

#[tokio::test]
async fn shutdown_ends_a_wait_for_a_lock() {
    let (server, mut session) = target("create table public.t (id int primary key)").await;
    let t = table("t", ByKey, &["id*"]);
    let running = Running::start(connect(&server).await);
    session.execute("begin; lock table public.t").await.unwrap();
    running.send(transaction(100, vec![t.insert(&["1"])]));
    let waiting = "select 1 from pg_locks where not granted and locktype = 'relation'";
    while session.query_opt(waiting, &[]).await.unwrap().is_none() {
        tokio::task::yield_now().await;
    }
    running.shutdown.send(true).unwrap();
    running.end().await.unwrap();
    session.execute("rollback").await.unwrap();
    assert_eq!(rows(&mut session, "select * from public.t").await, "");
}

#[tokio::test]
async fn messages_are_handed_on_after_their_commit() {
    let (server, _session) = target("create table public.t (id int primary key)").await;
    let t = table("t", ByKey, &["id*"]);
    let seen = Arc::new(Mutex::new(Vec::new()));
    let record = seen.clone();
    let options = Options {
        on_message: Some(Arc::new(move |m: &walferry::apply::Message| {
            record.lock().unwrap().push((m.prefix.clone(), m.content.to_vec(), m.lsn));
        })),
        ..options()
    };
    let message = |prefix: &str, lsn| Change::Message {
        transactional: true,
        lsn: Lsn(lsn),
        prefix: prefix.to_string(),
        content: bytes::Bytes::from_static(b"hi"),
    };
    let stream = vec![
        transaction(100, vec![message("walferry_a", 1), t.insert(&["1"]), message("other", 2)]),
        transaction(200, vec![message("walferry_b", 3)]),
    ];
    apply_with(&server, options.clone(), stream).await.unwrap();
    let refused = vec![transaction(300, vec![message("walferry_c", 4), t.insert(&["1"])])];
    assert!(apply_with(&server, options, refused).await.is_err());
    let hi = b"hi".to_vec();
    assert_eq!(
        *seen.lock().unwrap(),
        [("walferry_a".to_string(), hi.clone(), Lsn(1)), ("walferry_b".to_string(), hi, Lsn(3))]
    );
}

#[tokio::test]
async fn an_origin_in_use_is_waited_for_and_then_its_holder_named() {
    let (server, mut session) = target("create table public.t (id int primary key)").await;
    let holder = connect(&server).await;
    let options = || Options { busy_wait: Duration::ZERO, ..options() };
    let Err(error) = Applier::connect(&config(&server), options()).await else { panic!() };
    let pid = rows(
        &mut session,
        "select pid from pg_stat_activity where application_name = 'walferry apply' \
         order by backend_start limit 1",
    )
    .await;
    assert!(error.to_string().contains(&format!("pid {pid} ")), "{error}");
    assert_eq!(error.fault(), Fault::Stop);
    let waiting = tokio::spawn({
        let config = config(&server);
        async move { Applier::connect(&config, options()).await.map(|_| ()) }
    });
    drop(holder);
    waiting.await.unwrap().unwrap();
}

#[tokio::test]
async fn progress_is_moved_by_one_applier_only() {
    let (server, mut session) = target("create table public.t (id int)").await;
    let t = table("t", Nothing, &["id"]);
    let options = || Options { progress: ProgressKind::Table, ..options() };
    let first = Applier::connect(&config(&server), options()).await.unwrap();
    let item = transaction(100, vec![t.insert(&["1"])]);
    apply_with(&server, options(), vec![item.clone()]).await.unwrap();
    let running = Running::start(first);
    running.send(item.clone());
    let error = running.end().await.unwrap_err();
    assert!(matches!(error, Error::ProgressMoved { .. }), "{error}");
    assert_eq!(rows(&mut session, "select * from public.t").await, "1");
    // With an origin or without, progress is the same row.
    assert_eq!(apply(&server, vec![item]).await.unwrap().rows, 0);
}

/// From 16 on an aborted transaction moves the origin that was set up for it; the row does not move.
#[tokio::test]
async fn a_commit_that_is_refused_leaves_progress_where_it_was() {
    for major in [15, 17] {
        let server = Server::start(&Server::bin_of(major).unwrap(), &[]).unwrap();
        let mut session = support::session(&server, "postgres").await;
        session.execute(DDL).await.unwrap();
        session
            .execute(
                "create table public.t (id int primary key); \
                 create function public.no() returns trigger language plpgsql as \
                 $$ begin raise exception 'no'; end $$; \
                 create constraint trigger no after insert on public.t deferrable \
                 initially deferred for each row execute function public.no(); \
                 alter table public.t enable always trigger no",
            )
            .await
            .unwrap();
        let t = table("t", ByKey, &["id*"]);
        let item = transaction(100, vec![t.insert(&["1"])]);
        apply(&server, vec![item.clone()]).await.unwrap_err();
        assert_eq!(connect(&server).await.progress(), Lsn::ZERO);
        session.execute("alter table public.t disable trigger no").await.unwrap();
        apply(&server, vec![item]).await.unwrap();
        assert_eq!(rows(&mut session, "select id from public.t").await, "1");
    }
}

#[tokio::test]
async fn missing_rights_and_tables_are_named_with_what_mends_them() {
    let server = support::server();
    let mut session = support::session(&server, "postgres").await;
    session.execute("create role \"Mover\" login").await.unwrap();
    let mut config = config(&server);
    config.user = "Mover".to_string();
    let Err(error) = Applier::connect(&config, options()).await else { panic!() };
    let grant = "grant set on parameter session_replication_role to \"Mover\"";
    assert!(error.to_string().contains(grant), "{error}");
    session.execute(grant).await.unwrap();
    let Err(error) = Applier::connect(&config, options()).await else { panic!() };
    let message = error.to_string();
    let start = message.find("grant execute").unwrap();
    let end = message.find(" (as a superuser").unwrap();
    session.execute(&message[start..end]).await.unwrap();
    let Err(error) = Applier::connect(&config, options()).await else { panic!() };
    assert!(error.to_string().contains("create schema walferry;"), "{error}");
    session.execute(DDL).await.unwrap();
    session
        .execute(
            "grant usage on schema walferry to \"Mover\"; \
             grant all on all tables in schema walferry to \"Mover\"; \
             create table public.t (id int primary key);",
        )
        .await
        .unwrap();
    let change = vec![table("t", ByKey, &["id*"]).insert(&["1"])];
    let mut applier = Applier::connect(&config, options()).await.unwrap();
    let (positions, _) = watch::channel(Applied::default());
    let (_hold, hold) = watch::channel(None);
    let (_shutdown, shutdown) = watch::channel(false);
    let items = Items(VecDeque::from([transaction(100, change)]));
    let error = applier.run(items, &positions, hold, shutdown).await.unwrap_err();
    assert!(error.to_string().contains("grant the role"), "{error}");
}

#[tokio::test]
async fn statements_beyond_the_limit_are_dropped_and_made_again() {
    let columns: Vec<String> = (0..11).map(|i| format!("c{i}")).collect();
    let names: Vec<&str> = columns.iter().map(String::as_str).collect();
    let (server, mut session) = target(&format!(
        "create table public.f ({})",
        columns.iter().map(|c| format!("{c} int")).collect::<Vec<_>>().join(", ")
    ))
    .await;
    let f = table("f", Full, &names);
    let values = |mask: u32| -> Vec<&str> {
        (0..11).map(|i| if mask >> i & 1 == 1 { "1" } else { N }).collect()
    };
    let options = tuned(order(), Some(Limits { bytes: 1, transactions: 1 }));
    let mut stream = vec![transaction(50, vec![f.insert(&values(0))])];
    for mask in 0..1100_u32 {
        let change = f.update_full(&values(mask), &values(mask + 1));
        stream.push(transaction(u64::from(mask + 1) * 100, vec![change]));
    }
    apply_with(&server, options, stream).await.unwrap();
    assert_eq!(rows(&mut session, "select c10, c6, c3, c2, c1 from public.f").await, "1|1|1|1|-");
    assert_eq!(counts(&mut session, "f").await, "1101/0");
}

/// The server's own types are asked about once in a session; those that somebody made may be called
/// otherwise when the next table with one of them is met.
#[tokio::test]
async fn a_type_that_was_renamed_is_met_by_its_new_name() {
    let tables = "create type public.mood as enum ('a', 'b'); \
         create table public.t (id int primary key, m public.mood); \
         create table public.u (id int primary key, m public.mood)";
    let (server, mut session) = target(tables).await;
    let [t, u] = ["t", "u"].map(|name| table(name, ByKey, &["id*", "m"]));
    let mut running = Running::start(connect(&server).await);
    running.send(transaction(100, vec![t.insert(&["1", "a"])]));
    running.wait(|applied| applied.transactions == 1).await;
    session.execute("alter type public.mood rename to temper").await.unwrap();
    running.send(transaction(200, vec![u.insert(&["1", "b"])]));
    running.wait(|applied| applied.transactions == 2).await;
    running.end().await.unwrap();
    let both = "select m from public.t union all select m from public.u order by 1";
    assert_eq!(rows(&mut session, both).await, "a\nb");
}

#[tokio::test]
async fn the_equality_of_a_user_defined_type_is_found_without_a_search_path() {
    let (server, mut session) = target(
        "create type public.ci; \
         create function public.ci_in(cstring) returns public.ci language internal immutable \
             strict as 'textin'; \
         create function public.ci_out(public.ci) returns cstring language internal immutable \
             strict as 'textout'; \
         create type public.ci (input = public.ci_in, output = public.ci_out, like = text, \
             collatable = true); \
         create cast (public.ci as text) without function as implicit; \
         create function public.ci_eq(public.ci, public.ci) returns bool language sql immutable \
             as 'select lower($1::text) = lower($2::text)'; \
         create function public.ci_hash(public.ci) returns int language sql immutable \
             as 'select hashtext(lower($1::text))'; \
         create operator public.= (leftarg = public.ci, rightarg = public.ci, \
             function = public.ci_eq); \
         create operator class public.ci_ops default for type public.ci using hash \
             as operator 1 public.=, function 1 public.ci_hash(public.ci); \
         create table public.t (v public.ci, n int); \
         insert into public.t values ('ABC', 1), ('abc', 1), ('abd', 1);",
    )
    .await;
    let t = table("t", Full, &["v", "n"]);
    // Of two equal rows the one that reads the same goes first, then the other.
    let change = vec![t.update_full(&["abc", "1"], &["first", N]), t.delete_full(&["aBc", "1"])];
    apply(&server, vec![transaction(100, change)]).await.unwrap();
    assert_eq!(
        rows(&mut session, "select * from public.t order by v::text").await,
        "abd|1\nfirst|-"
    );
}

#[tokio::test]
async fn without_the_replica_role_triggers_act_and_may_not_swallow_rows() {
    let (server, mut session) = target(
        "create table public.t (id int primary key); create table public.log (id int); \
         create function public.f() returns trigger language plpgsql as $$ begin \
             insert into public.log values (new.id); \
             if new.id = 3 then return null; end if; return new; end $$; \
         create trigger g before insert on public.t for each row execute function public.f();",
    )
    .await;
    let t = table("t", ByKey, &["id*"]);
    let options = || Options { replica_role: false, ..options() };
    let first = transaction(100, vec![t.insert(&["1"])]);
    apply_with(&server, options(), vec![first]).await.unwrap();
    let swallowed = transaction(200, vec![t.insert(&["2"]), t.insert(&["3"])]);
    let error = apply_with(&server, options(), vec![swallowed]).await.unwrap_err();
    assert!(error.to_string().contains("(id)=(3)"), "{error}");
    assert_eq!(rows(&mut session, "select * from public.t, public.log").await, "1|1");
}
