//! What every decoder owes by every transport: from one workload the same transactions, byte for
//! byte, wherever readers and servers stop in between.
//!
//! Each way reads a slot of its own, made before the workload, so that all of them see one log.

use std::sync::Arc;
use std::time::Duration;

use walferry::change::{Change, Chunk, Item, OldRow, Relation, Row, Value};
use walferry::decode::Plugin;
use walferry::demo::server::{Server, StopMode};
use walferry::limit::CHUNK_BYTES;
use walferry::lsn::Lsn;
use walferry::pg::{Config, Purpose, Session, SlotKind};
use walferry::source::{
    self, BulkOptions, CreateOptions, Recorded, StreamOptions, Transport, publication, slot,
};

use super::rig::{PATIENCE, Reader, is_mark, names, soon};

/// A decoder by a transport.
type Way = (Plugin, Transport);

fn ways() -> Vec<Way> {
    let transports = [Transport::Stream, Transport::Pull];
    Plugin::ALL.iter().flat_map(|plugin| transports.map(|transport| (*plugin, transport))).collect()
}

fn slot_of((plugin, transport): Way) -> String {
    format!("walferry_{plugin}_{transport}")
}

const DDL: &str = "
    create table public.a (id int primary key, v text, big text);
    alter table public.a alter big set storage external;
    create table public.full_one (x int, y text);
    alter table public.full_one replica identity full;
    create table public.child (id int primary key, a int references public.a);
    create table public.\"Odd \"\"name\" (\"a b\" int primary key, \"c,d\" text, n numeric, \
        f float8, b bytea, t timestamptz, i int[], j jsonb, o bool);
    create table public.wide (k1 int, k2 text, v text, primary key (k1, k2));
    create table public.indexed (u int not null, v text);
    create unique index indexed_u on public.indexed (u);
    alter table public.indexed replica identity using index indexed_u;
    create table public.mark (x int);";

const TABLES: &[&str] = &["a", "full_one", "child", "Odd \"name", "wide", "indexed", "mark"];

/// All kinds of changes that every decoder can tell; each line is one transaction or none.
const CHANGES: &[&str] = &[
    "begin; insert into public.a values (1, 'one', repeat('x', 9000)), (2, null, 'small'); \
     savepoint s; insert into public.a values (3, 'gone', ''); rollback to s; \
     savepoint t; insert into public.a values (4, 'four', null); release t; commit",
    "update public.a set v = 'uno' where id = 1",
    "update public.a set id = 20 where id = 2",
    "update public.a set id = 10 where id = 1",
    "delete from public.a where id = 4",
    "begin; insert into public.a values (9, 'aborted', ''); rollback",
    "insert into public.full_one values (1, null), (1, null), (2, 'it''s \"x\", a\nb\\ \u{e9} \u{1}')",
    "update public.full_one set y = 'z' where ctid = '(0,1)'",
    "delete from public.full_one where y is null",
    "insert into public.child values (1, 10)",
    "insert into public.\"Odd \"\"name\" values \
     (1, E'tab\\t ''q'' \"d\" {} [] \\\\ nl\\n end', '7.10', '1e100', '\\x00ff27', \
      '2024-02-29 12:00:00.5+02', '{{1,null},{3,4}}', '{\"a\": [1, null, \"x''y\"]}', true), \
     (-2, '', 12345678901234567890.0123456789, '-0', '', 'infinity', '{}', 'null', false), \
     (3, 'null', null, null, null, null, null, null, null)",
    "update public.\"Odd \"\"name\" set \"c,d\" = null, n = -1.50, f = 1e-300 where \"a b\" = 1",
    "delete from public.\"Odd \"\"name\" where \"a b\" < 2",
    "insert into public.wide values (1, 'a', 'v'), (2, 'b c', 'w')",
    "update public.wide set v = 'x' where k1 = 1",
    "update public.wide set k2 = 'new' where k1 = 2",
    "delete from public.wide where k1 = 1",
    "insert into public.indexed values (1, 'a'), (2, 'b')",
    "update public.indexed set u = 3 where u = 1",
    "delete from public.indexed where u = 2",
    "begin; insert into public.a values (50, 'x', repeat('y', 9000)); \
     update public.a set v = 'y' where id = 50; delete from public.a where id = 50; commit",
    // Messages; transactions prepared, committed and rolled back later; one of an origin.
    "begin; insert into public.wide values (7, 'm', 'before'); \
     select pg_logical_emit_message(true, 'walferry, test', E'con\\ttent \u{e9}'); \
     insert into public.wide values (7, 'n', 'after'); commit",
    "begin; insert into public.wide values (8, 'p', 'prepared'); prepare transaction 'contract'",
    "insert into public.wide values (8, 'q', 'between')",
    "commit prepared 'contract'",
    "begin; insert into public.wide values (8, 'r', 'never'); prepare transaction 'rolled'",
    "rollback prepared 'rolled'",
    "select pg_replication_origin_create('contract_origin')",
    "select pg_replication_origin_session_setup('contract_origin')",
    "insert into public.wide values (9, 'o', 'of an origin')",
    "select pg_replication_origin_session_reset()",
    // Every control character, and what follows them.
    "insert into public.wide select 100 + i, 'c', 'a' || chr(i) || 'b' from generate_series(1, 31) i",
    "update public.wide set v = chr(127) || chr(133) || v || chr(8232) where k2 = 'c'",
    // A key that changes over an unchanged value in TOAST, then a value that changes.
    "insert into public.a values (60, 'x', repeat('z', 9000))",
    "update public.a set id = 61 where id = 60; update public.a set big = repeat('w', 9000) \
     where id = 61",
    "truncate public.a, public.child",
];

/// One server with the tables, a publication, and a slot for each way.
struct Rig {
    server: Server,
    config: Config,
    sql: Session,
    recorded: Recorded,
    starts: Vec<(Way, Lsn)>,
}

impl Rig {
    async fn new() -> Rig {
        let settings = ["max_replication_slots = 20", "max_wal_senders = 20", "work_mem = '64kB'"];
        let server = Server::start(&Server::default_bin().unwrap(), &settings).unwrap();
        let config = Config::parse(&server.uri("postgres")).unwrap().labelled("source");
        let mut sql = Session::connect(&config, Purpose::Sql).await.unwrap();
        sql.execute(DDL).await.unwrap();
        publication::ensure(&mut sql, "walferry_contract", &names(TABLES)).await.unwrap();
        let mut maker = Session::connect(&config, Purpose::Sql).await.unwrap();
        let mut starts = Vec::new();
        for way in ways() {
            let options = CreateOptions {
                name: slot_of(way),
                plugin: way.0.to_string(),
                kind: SlotKind::Permanent,
                wait: PATIENCE,
            };
            let made = slot::create_plain(&mut maker, &mut sql, &options, |_| {}).await;
            starts.push((way, made.unwrap()));
        }
        let system = source::identify_by_sql(&mut sql).await.unwrap();
        let recorded = Recorded {
            system_identifier: system.system_identifier,
            timeline: system.timeline,
            database: "postgres".to_string(),
            plugin: String::new(),
        };
        Rig { server, config, sql, recorded, starts }
    }

    async fn execute(&mut self, sql: &str) {
        self.sql.execute(sql).await.unwrap();
    }

    async fn mark(&mut self) {
        self.execute("insert into public.mark values (1)").await;
    }

    fn options(&self, way: Way, start_lsn: Lsn) -> StreamOptions {
        let recorded = Recorded { plugin: way.0.to_string(), ..self.recorded.clone() };
        let slot = slot_of(way);
        StreamOptions {
            bulk: BulkOptions { messages: Some(40), ..BulkOptions::default() },
            plain_numbers: true,
            followed: Arc::new(names(TABLES).into_iter().collect()),
            ..StreamOptions::new(&slot, "walferry_contract", start_lsn, recorded)
        }
    }

    async fn reader(&self, way: Way, start_lsn: Lsn, buffer_bytes: usize) -> Reader {
        let options = self.options(way, start_lsn);
        Reader::start_by(&self.config, way.1, options, buffer_bytes).await
    }

    async fn confirmed(&mut self, way: Way) -> Lsn {
        let status = slot::status(&mut self.sql, &slot_of(way)).await.unwrap().unwrap();
        status.confirmed_flush_lsn.unwrap()
    }

    /// The transactions up to the next mark, confirmed as they come, by each way.
    async fn read_all(&mut self) -> Vec<(Way, Vec<Transaction>)> {
        let mut all = Vec::new();
        for (way, start_lsn) in self.starts.clone() {
            let mut reader = self.reader(way, start_lsn, 4 * CHUNK_BYTES).await;
            all.push((way, until_mark(&mut reader, u32::MAX).await.0));
            soon("the end", reader.end()).await.unwrap();
        }
        all
    }
}

/// A transaction, with nothing left out but what differs by how the reader cut it.
#[derive(Clone, Debug, PartialEq)]
struct Transaction {
    xid: u32,
    end_lsn: Lsn,
    changes: Vec<String>,
}

/// Transactions up to the next mark or up to `most`; whether the mark was reached.
async fn until_mark(reader: &mut Reader, most: u32) -> (Vec<Transaction>, bool) {
    let mut done = Vec::new();
    let mut open: Vec<String> = Vec::new();
    loop {
        let item = reader.pop().await;
        let end_lsn = item.end_lsn();
        if let Item::Chunk(chunk) = item {
            if chunk.changes.first().is_some_and(is_mark) {
                reader.durable.send_replace(chunk.commit.unwrap().end_lsn);
                return (done, true);
            }
            open.extend(chunk.changes.iter().map(exact));
            if let Some(commit) = chunk.commit {
                let changes = std::mem::take(&mut open);
                if !changes.is_empty() {
                    done.push(transaction(&chunk, commit.end_lsn, changes));
                }
            }
        }
        if let Some(end_lsn) = end_lsn {
            reader.durable.send_replace(end_lsn);
        }
        if done.len() as u32 >= most {
            return (done, false);
        }
    }
}

fn transaction(chunk: &Chunk, end_lsn: Lsn, changes: Vec<String>) -> Transaction {
    Transaction { xid: chunk.begin.xid, end_lsn, changes }
}

/// Every byte of a change, with its table's description.
pub fn exact(change: &Change) -> String {
    let table = |r: &Relation| {
        let columns: Vec<_> = r.columns.iter().map(|c| (&c.name, c.type_oid, c.key)).collect();
        format!("{:?} {:?} {:?} {columns:?}", r.oid, r.name, r.identity)
    };
    let row = |row: &Row| {
        let values = row.values().map(|value| match value {
            Value::Null => "NULL".to_string(),
            Value::Unchanged => "UNCHANGED".to_string(),
            value => format!("{:?}", String::from_utf8_lossy(value.bytes().unwrap())),
        });
        values.collect::<Vec<_>>().join(", ")
    };
    let before = |old: &OldRow| match old {
        OldRow::Key(key) => format!("key {}", row(key)),
        OldRow::Full(full) => format!("full {}", row(full)),
    };
    match change {
        Change::Insert { relation, new } => format!("insert {} {}", table(relation), row(new)),
        Change::Update { relation, old, new } => {
            let old = old.as_ref().map(before);
            format!("update {} {old:?} {}", table(relation), row(new))
        }
        Change::Delete { relation, old } => format!("delete {} {}", table(relation), before(old)),
        Change::Truncate { relations, cascade, restart_identity } => {
            let mut tables: Vec<String> = relations.iter().map(|r| table(r)).collect();
            tables.sort();
            format!("truncate {tables:?} {cascade} {restart_identity}")
        }
        Change::Message { transactional, prefix, content, .. } => {
            format!("message {transactional} {prefix} {content:?}")
        }
    }
}

fn same_everywhere(all: &[(Way, Vec<Transaction>)]) {
    let (first, wanted) = &all[0];
    assert!(!wanted.is_empty());
    for (way, seen) in all {
        for (a, b) in wanted.iter().zip(seen) {
            assert_eq!(a, b, "{first:?} and {way:?}");
        }
        assert_eq!(wanted.len(), seen.len(), "{first:?} and {way:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn all_kinds_of_changes_are_the_same_by_every_way() {
    let mut rig = Rig::new().await;
    for sql in CHANGES {
        if rig.sql.major_version() >= 11 || !sql.starts_with("truncate") {
            rig.execute(sql).await;
        }
    }
    rig.mark().await;
    let all = rig.read_all().await;
    same_everywhere(&all);
    assert!(all[0].1.len() >= CHANGES.len() - 8);
}

/// wal2json before 2.6 cannot tell these from NULL.
#[tokio::test(flavor = "multi_thread")]
async fn nan_and_infinities_are_the_same_by_every_way_that_tells_them() {
    let mut rig = Rig::new().await;
    let odd = "public.\"Odd \"\"name\"";
    for (id, number, float) in
        [(1, "NaN", "NaN"), (2, "1", "Infinity"), (3, "2", "-Infinity"), (4, "-0.00", "-0")]
    {
        let sql = format!("insert into {odd} (\"a b\", n, f) values ({id}, '{number}', '{float}')");
        rig.execute(&sql).await;
    }
    rig.execute(&format!("update {odd} set n = 'NaN', f = '-Infinity' where \"a b\" = 4")).await;
    rig.mark().await;
    let mut all = rig.read_all().await;
    all.retain(|(way, _)| way.0 != Plugin::Wal2json);
    same_everywhere(&all);
    let shown = format!("{all:?}");
    assert!(
        shown.contains("NaN") && shown.contains("-Infinity") && shown.contains("-0"),
        "{shown}"
    );
}

/// Committed in another order than begun, with subtransactions, from several sessions at once.
#[tokio::test(flavor = "multi_thread")]
async fn interleaved_transactions_come_in_commit_order_by_every_way() {
    let mut rig = Rig::new().await;
    let mut sessions = Vec::new();
    for _ in 0..4 {
        sessions.push(Session::connect(&rig.config, Purpose::Sql).await.unwrap());
    }
    for round in 0..30 {
        for (i, session) in sessions.iter_mut().enumerate() {
            let id = round * 10 + i;
            let sql = format!(
                "begin; insert into public.a values ({id}, 'r', null); savepoint s; \
                 update public.a set v = 's' where id = {id}"
            );
            session.execute(&sql).await.unwrap();
        }
        let order = if round % 2 == 0 { [3, 1, 0, 2] } else { [0, 2, 1, 3] };
        for i in order {
            let end = if (round + i) % 5 == 0 { "rollback to s; commit" } else { "commit" };
            sessions[i].execute(end).await.unwrap();
        }
    }
    rig.mark().await;
    let all = rig.read_all().await;
    same_everywhere(&all);
    assert_eq!(all[0].1.len(), 120);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_transaction_between_small_ones_is_the_same_by_every_way() {
    let mut rig = Rig::new().await;
    rig.execute("insert into public.a values (0, 'before', null)").await;
    rig.execute(
        "insert into public.a select i, 'row ' || i, null from generate_series(1, 30000) i",
    )
    .await;
    rig.execute("insert into public.a values (30001, 'after', null)").await;
    rig.mark().await;
    let all = rig.read_all().await;
    same_everywhere(&all);
    assert_eq!(all[0].1[1].changes.len(), 30_000);
}

/// Readers are stopped, or dropped, after every few transactions, and the server restarts twice;
/// each reader begins where the target is, which is at or behind what it has seen.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_lost_or_doubled_over_restarts_by_any_way() {
    let mut rig = Rig::new().await;
    for i in 0..300 {
        rig.execute(&format!(
            "insert into public.a values ({i}, 'v', null), (1000 + {i}, 'w', null)"
        ))
        .await;
    }
    rig.mark().await;
    for (way, start_lsn) in rig.starts.clone() {
        let (mut seen, mut progress_lsn, mut turn) = (Vec::new(), start_lsn, 0);
        loop {
            let mut reader = rig.reader(way, progress_lsn, 4 * CHUNK_BYTES).await;
            let (some, marked) = until_mark(&mut reader, 37).await;
            progress_lsn = *reader.durable.borrow();
            seen.extend(some);
            match turn % 2 {
                0 => drop(reader.end().await.unwrap()),
                _ => reader.task.abort(),
            }
            if turn == 2 || turn == 4 {
                let mode = if turn == 2 { StopMode::Fast } else { StopMode::Immediate };
                rig.server.restart(mode).unwrap();
                rig.sql = Session::connect(&rig.config, Purpose::Sql).await.unwrap();
            }
            turn += 1;
            if marked {
                break;
            }
        }
        assert_eq!(seen.len(), 300, "{way:?}");
        assert!(seen.windows(2).all(|w| w[0].end_lsn < w[1].end_lsn), "{way:?}");
        assert!(seen.iter().all(|t| t.changes.len() == 2), "{way:?}");
        assert!(rig.confirmed(way).await <= progress_lsn, "{way:?}: past what is durable");
    }
}

/// Law 1: a slot is told what is durable, however much more was received, and moves on over what
/// nobody reads.
#[tokio::test(flavor = "multi_thread")]
async fn a_slot_is_told_what_is_durable_and_no_more_by_every_way() {
    let mut rig = Rig::new().await;
    rig.execute("create table public.unread (x int)").await;
    for (way, start_lsn) in rig.starts.clone() {
        let mut reader = rig.reader(way, start_lsn, 4 * CHUNK_BYTES).await;
        rig.execute("insert into public.a values (1, 'a', null)").await;
        rig.execute("insert into public.a values (2, 'b', null)").await;
        rig.execute("delete from public.a").await;
        let mut ends = Vec::new();
        while ends.len() < 3 {
            let item = reader.pop().await;
            let wanted =
                matches!(&item, Item::Chunk(c) if !c.changes.is_empty() && c.commit.is_some());
            if wanted && item.end_lsn() > Some(rig.confirmed(way).await) {
                ends.push(item.end_lsn().unwrap());
            } else if !wanted && ends.is_empty() {
                reader.durable.send_replace(item.end_lsn().unwrap());
            }
        }
        reader.durable.send_replace(ends[0]);
        tokio::time::sleep(Duration::from_millis(1500)).await;
        assert_eq!(rig.confirmed(way).await, ends[0], "{way:?}");
        assert!(reader.positions.borrow().received_lsn >= ends[2], "{way:?}");
        reader.durable.send_replace(ends[2]);
        let written = rig.sql.query(
            "insert into public.unread select generate_series(1, 100); \
             select pg_current_wal_insert_lsn()",
        );
        let unread_lsn = written.await.unwrap()[0].lsn(0).unwrap();
        let passed = async {
            while rig.confirmed(way).await < unread_lsn {
                if let Ok(item) =
                    tokio::time::timeout(Duration::from_millis(50), reader.pop()).await
                    && let Some(end_lsn) = item.end_lsn()
                {
                    reader.durable.send_replace(end_lsn);
                }
            }
        };
        soon("the slot to move", passed).await;
        soon("the end", reader.end()).await.unwrap();
    }
}
