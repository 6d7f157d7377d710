//! wal2json beside pgoutput: the same transactions, byte for byte in values.

use bytes::Bytes;

use walferry::change::{Change, Chunk, Row, Value};
use walferry::decode::wal2json::{Decoder, Numbers, Plugin, options, table_list};
use walferry::decode::{Described, Error, Result, Step};
use walferry::id::QualifiedName;
use walferry::lsn::Lsn;
use walferry::pg::Session;

use super::beside::{self, Textual};

impl Textual for Decoder {
    fn decode(&mut self, data: Bytes, lsn: Lsn) -> Result<Step> {
        Decoder::decode(self, data, lsn)
    }
    fn describe(&mut self, described: Described) {
        Decoder::describe(self, described);
    }
    fn ignore(&mut self, table: &QualifiedName) {
        Decoder::ignore(self, table);
    }
}

const TRUNCATES: [&str; 3] = [
    "truncate public.keyless",
    "begin; truncate public.referred, public.referring; truncate public.every restart identity; \
     insert into public.keyless values ('after'); truncate public.keyless; commit",
    "truncate public.referred cascade",
];

/// What the server's wal2json is, found as a reader has to: by what it refuses.
async fn plugin(session: &mut Session) -> Plugin {
    let mut plugin = Plugin::V2_6;
    while let Err(error) = beside::messages(session, &options(plugin, &[1])).await {
        plugin = plugin.refused(&error.to_string()).unwrap_or_else(|| panic!("{error}"));
    }
    plugin
}

async fn worked(encoding: &str) -> (walferry::demo::server::Server, Session) {
    let (server, mut session) = beside::database(&[], encoding).await;
    session.execute(beside::TABLES).await.unwrap();
    beside::slots(&mut session, "wal2json").await;
    for sql in beside::WORK {
        session.execute(sql).await.unwrap_or_else(|e| panic!("{e}: {sql}"));
    }
    (server, session)
}

#[tokio::test]
async fn format_2_gives_what_pgoutput_gives() {
    let (_server, mut session) = worked("UTF8").await;
    for sql in TRUNCATES {
        session.execute(sql).await.unwrap();
    }
    let expected = beside::without_truncate_options(beside::by_pgoutput(&mut session).await);
    let plugin = plugin(&mut session).await;
    let mut decoder = Decoder::new(Numbers::Plain);
    let (found, _) = beside::by_text(&mut session, &mut decoder, &options(plugin, &[])).await;
    let changes = beside::assert_same(&expected, &found);
    println!("{plugin:?}: {} transactions, {changes} changes", found.len());
    assert!(changes > 90, "{changes}");
}

/// The values of the rows that changes give, NULL and unchanged ones by name.
fn rows(chunks: &[Chunk]) -> Vec<String> {
    let show = |row: &Row| {
        let values = row.values().map(|value| match value {
            Value::Null => "NULL".to_string(),
            Value::Unchanged => "unchanged".to_string(),
            other => String::from_utf8_lossy(other.bytes().unwrap()).to_string(),
        });
        values.collect::<Vec<_>>().join(" ")
    };
    let changes = chunks.iter().flat_map(|chunk| &chunk.changes);
    let rows = changes.map(|change| match change {
        Change::Insert { new, relation } | Change::Update { new, relation, .. } => {
            let names: Vec<_> = relation.columns.iter().map(|c| c.name.as_str()).collect();
            format!("({}) {}", names.join(" "), show(new))
        }
        Change::Delete { old, .. } => format!("delete {}", show(old.row())),
        other => format!("{other:?}"),
    });
    rows.collect()
}

#[tokio::test]
async fn tables_altered_in_flight_are_read_as_they_were() {
    let (_server, mut session) = beside::database(&[], "UTF8").await;
    session.execute(beside::TABLES).await.unwrap();
    beside::slots(&mut session, "wal2json").await;
    for sql in [
        "insert into public.altered values (1, 2, 'ab', '\\x61'), (2, null, null, null)",
        "update public.altered set v = 3 where id = 1",
        "alter table public.altered alter v type bigint",
        "update public.altered set v = 30000000000 where id = 1",
        "alter table public.altered alter t type bytea using t::bytea, alter b type text using 'x'",
        "insert into public.altered values (3, 3, '\\x6162', 'ab')",
        "alter table public.altered drop v, add w bool default true",
        "insert into public.altered values (4, '\\x', 'b', false)",
        "update public.altered set w = null where id = 4",
        "delete from public.altered where id in (1, 4)",
        "insert into public.turned values (1, 'a'), (2, null)",
        "update public.turned set v = 'b' where id = 1",
        "alter table public.turned replica identity full",
        "update public.turned set v = 'c' where id = 2; delete from public.turned where id = 1",
        "alter table public.turned replica identity default",
        "update public.turned set id = 5",
        "insert into public.renamed values (1, 'a')",
        "update public.renamed set old_name = 'b'",
        "alter table public.renamed rename old_name to new_name",
        "update public.renamed set new_name = 'c', id = 2",
    ] {
        session.execute(sql).await.unwrap();
    }
    let expected = beside::by_pgoutput(&mut session).await;
    let mut decoder = Decoder::new(Numbers::Plain);
    let (found, asked) =
        beside::by_text(&mut session, &mut decoder, &options(Plugin::V2_3, &[])).await;
    // An UPDATE cannot tell a column that was not there yet from one that did not change.
    let mut told = rows(&found);
    assert_eq!(told.len(), 18);
    assert_eq!(told[3], "(id v t b w) 1 30000000000 ab \\x61 unchanged");
    told[3] = "(id v t b) 1 30000000000 ab \\x61".to_string();
    assert_eq!(rows(&expected), told);
    let kinds = |chunks: &[Chunk]| -> Vec<String> {
        let changes = chunks.iter().flat_map(|chunk| chunk.changes.clone());
        let old = changes.filter_map(|change| match change {
            Change::Update { old, .. } => Some(format!("{old:?}")),
            Change::Delete { old, .. } => Some(format!("{old:?}")),
            _ => None,
        });
        old.collect()
    };
    assert_eq!(kinds(&expected), kinds(&found));
    // Once a table, and again where it no longer fits; not once a row.
    assert!(asked < 14, "{asked}");
}

#[tokio::test]
async fn what_wal2json_2_5_cannot_say_is_an_error_and_not_null() {
    let (_server, mut session) = beside::database(&[], "UTF8").await;
    let sql = "create table public.n (id int primary key, f float8, d numeric not null, \
         v int)";
    session.execute(sql).await.unwrap();
    beside::slots(&mut session, "wal2json").await;
    let plugin = plugin(&mut session).await;
    assert_eq!(plugin, Plugin::V2_3, "Debian's wal2json is new: test what it can say now");
    let message = async |session: &mut Session, sql: &str| {
        session.execute(sql).await.unwrap();
        let mut all = beside::messages(session, &options(plugin, &[])).await.unwrap();
        let (lsn, data) = all.remove(all.len() - 2);
        (data, lsn)
    };
    let table = QualifiedName::new("public", "n");
    let described = walferry::catalog::describe(&mut session, &table).await.unwrap().unwrap();
    let lost = |numbers: Numbers, (data, lsn): &(Bytes, Lsn)| {
        let mut decoder = Decoder::new(numbers);
        decoder.describe(described.clone());
        match decoder.decode(data.clone(), *lsn) {
            Err(Error::LostNumber { column, .. }) => column,
            other => format!("{}", other.is_ok()),
        }
    };
    let null = message(&mut session, "insert into public.n values (1, null, 1, null)").await;
    assert_eq!(lost(Numbers::Ambiguous, &null), "f");
    assert_eq!(lost(Numbers::Plain, &null), "true");
    let nan = message(&mut session, "insert into public.n values (2, 1, 'NaN', null)").await;
    assert_eq!(lost(Numbers::Ambiguous, &nan), "d");
    assert_eq!(lost(Numbers::Plain, &nan), "d");
    let infinite = message(&mut session, "insert into public.n values (3, '-inf', 1, 4)").await;
    assert_eq!(lost(Numbers::Ambiguous, &infinite), "f");
}

#[tokio::test]
async fn pgcopydb_874_bytes_of_a_sql_ascii_database_stay_as_they_are() {
    let (_server, mut session) = beside::database(&[], "SQL_ASCII").await;
    session.execute("set client_encoding = 'SQL_ASCII'").await.unwrap();
    session.execute("create table public.t (id int primary key, v text)").await.unwrap();
    beside::slots(&mut session, "wal2json").await;
    let sql = "insert into public.t values (1, E'\\xff\\xfe\\n\\xc3'); update public.t set v = E'\\x80\"'";
    session.execute(sql).await.unwrap();
    let expected = beside::by_pgoutput(&mut session).await;
    let mut decoder = Decoder::new(Numbers::Plain);
    let (found, _) = beside::by_text(&mut session, &mut decoder, &options(Plugin::V2_3, &[])).await;
    assert_eq!(beside::assert_same(&expected, &found), 2);
}

#[tokio::test]
async fn wal2json_270_a_transaction_of_a_table_without_interest_asks_once_and_gives_nothing() {
    let (_server, mut session) = beside::database(&[], "UTF8").await;
    session.execute("create table public.t (id int primary key)").await.unwrap();
    beside::slots(&mut session, "wal2json").await;
    let sql = "create table public.repack (id int); \
         insert into public.repack select generate_series(1, 5000); drop table public.repack; \
         insert into public.t values (1)";
    session.execute(sql).await.unwrap();
    let mut decoder = Decoder::new(Numbers::Plain);
    let (found, asked) =
        beside::by_text(&mut session, &mut decoder, &options(Plugin::V2_3, &[])).await;
    assert_eq!((rows(&found), asked), (vec!["(id) 1".to_string()], 2));
}

#[tokio::test]
async fn wal2json_146_lists_of_tables_with_odd_names_are_understood() {
    let (_server, mut session) = beside::database(&[], "UTF8").await;
    let names = ["plain", "a b", "a,b", "a.b", "a\\b", "*", "tab\tx", "Ünï \"q\"", " ", "it's"];
    let quoted = |name: &str| QualifiedName::new("S. ,*", name);
    session.execute("create schema \"S. ,*\"").await.unwrap();
    for name in names {
        let sql = format!("create table {} (id int primary key)", quoted(name).quoted());
        session.execute(&sql).await.unwrap();
    }
    beside::slots(&mut session, "wal2json").await;
    for name in names {
        let sql = format!("insert into {} values (1)", quoted(name).quoted());
        session.execute(&sql).await.unwrap();
    }
    let all: Vec<_> = names.iter().map(|name| quoted(name)).collect();
    for (option, tables, left) in [
        ("filter-tables", &all[..], 0),
        ("add-tables", &all[..], 10),
        ("add-tables", &all[5..6], 1),
    ] {
        let mut asked = options(Plugin::V2_3, &[]);
        asked.push((option, table_list(tables).replace('\'', "''")));
        let mut decoder = Decoder::new(Numbers::Plain);
        let (found, _) = beside::by_text(&mut session, &mut decoder, &asked).await;
        assert_eq!(found.len(), left, "{option}");
    }
}

#[tokio::test]
async fn origins_are_named_or_left_out() {
    let (_server, mut session) = beside::database(&[], "UTF8").await;
    let sql = "create table public.t (id int primary key)";
    session.execute(sql).await.unwrap();
    // Before the slots: after a transaction that makes an origin, names would be asked for.
    session.execute("select pg_replication_origin_create('elsewhere')").await.unwrap();
    beside::slots(&mut session, "wal2json").await;
    for sql in [
        "select pg_replication_origin_session_setup('elsewhere')",
        "insert into public.t values (1)",
        "select pg_replication_origin_session_reset()",
        "insert into public.t values (2)",
    ] {
        session.execute(sql).await.unwrap();
    }
    let sql = "select roident from pg_replication_origin";
    let id: u32 = session.query(sql).await.unwrap()[0].parse(0).unwrap();
    let expected = beside::by_pgoutput(&mut session).await;
    assert_eq!(expected[0].begin.origin.as_deref(), Some("elsewhere"));
    let mut decoder = Decoder::new(Numbers::Plain);
    decoder.name_origin(id, "elsewhere");
    let (found, _) = beside::by_text(&mut session, &mut decoder, &options(Plugin::V2_3, &[])).await;
    beside::assert_same(&expected, &found);
    let mut stranger = Decoder::new(Numbers::Plain);
    let (found, _) =
        beside::by_text(&mut session, &mut stranger, &options(Plugin::V2_3, &[])).await;
    assert_eq!(found[0].begin.origin.as_deref(), Some(""));
    let mut decoder = Decoder::new(Numbers::Plain);
    let (found, _) =
        beside::by_text(&mut session, &mut decoder, &options(Plugin::V2_3, &[id])).await;
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].begin.origin, None);
}
