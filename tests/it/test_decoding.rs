//! test_decoding beside pgoutput: the same work read from two slots, compared value by value.

use bytes::Bytes;

use walferry::catalog;
use walferry::change::{Change, Chunk, Item};
use walferry::decode::{Assembler, Decoder, Event, Step, test_decoding};
use walferry::demo::binaries;
use walferry::demo::server::Server;
use walferry::lsn::Lsn;
use walferry::pg::{Config, Purpose, ReplicationMessage, Session};

use crate::support;

/// Every kind of column that is printed in a way of its own, and names that look like syntax.
const TABLES: &str = r#"
    create schema "S p.a:c[e";
    create type public.mood as enum ('happy', 'it''s "so-so"');
    create type "S p.a:c[e"."My ""Type]" as (a int, "B b" text);
    create domain public.flag as boolean;
    create domain public.bits as bit varying check (length(value) < 99);
    create table public.wide (
        id bigint primary key, i2 smallint, i4 integer, o oid, f4 real, f8 double precision,
        n numeric, n2 numeric(10,2), b boolean, bi bit(3), bv bit varying, d1 public.flag,
        d2 public.bits, t text, v varchar(40), c char(6), "c1" "char", nm name, by bytea,
        j json, jb jsonb, x xml, u uuid, d date, ti time, tz timestamptz(3), ts timestamp(0),
        iv interval, m money, ip inet, mac macaddr, pt point, r int4range, tv tsvector,
        mo public.mood, mos public.mood[], co "S p.a:c[e"."My ""Type]",
        cos "S p.a:c[e"."My ""Type]"[], ia integer[], ta text[], va varchar(3)[], ba bit(2)[],
        tsa timestamp without time zone[]);
    create table "S p.a:c[e"."new-tuple: ""q"", x" (
        "old-key:" int, "a[text]:'x'" text, "select" text, "Up" text, "dot.ted" text,
        "new
line" text, "🐋" text, "q""uo" text, "null" text, primary key ("old-key:", "q""uo"));
    create table public.toasted (k text primary key, big text, small text);
    alter table public.toasted alter k set storage external, alter big set storage external;
    create table public.full_one (id int, big text, n text);
    alter table public.full_one alter big set storage external;
    alter table public.full_one replica identity full;
    create table public.by_index (a int, b int not null, c int not null, gone int, d text);
    create unique index by_index_u on public.by_index (c, b);
    alter table public.by_index replica identity using index by_index_u;
    alter table public.by_index drop column gone;
    create table public.keyless (v text);
    create table public.nothing (v int primary key);
    alter table public.nothing replica identity nothing;
    create table public.bare ();
    create table public.parent (id int primary key, v text);
    create table public.child (extra int, primary key (id)) inherits (public.parent);
    create table public.parted (id int, v text) partition by list (id);
    create table public.parted_1 partition of public.parted for values in (1);
    create table public.parted_2 partition of public.parted for values in (2);
    alter table public.parted_2 replica identity full
"#;

const WORK: [&str; 22] = [
    r#"insert into public.wide values (1, -2, 3, 4000000000, 1.1, 0.1, 123456789012345678.90123,
        1.5, true, '101', '0110', false, '1', E'it''s a \\ "t"\n new-tuple: id[integer]:1', 'v v',
        'c', 'q', 'a name', '\x00ff27', '{"a": "''"}', '{"b": [1, null]}', '<a>''</a>',
        '8c1c9d6e-3b0e-4c57-8a3a-111111111111', 'infinity', '24:00', '-infinity',
        '9999-12-31 23:59:59', '1 year -2 days 03:04:05.000006', 12.34, '10.0.0.0/8',
        '08:00:2b:01:02:03', '(1.5,-2)', '[1,5)', 'a:1 ''b c'':2', 'it''s "so-so"',
        '{happy,"it''s \"so-so\""}', row(1, 'x"y'), array[row(null, ''), null]::"S p.a:c[e"."My ""Type]"[],
        '{1,NULL,3}', array['a,b', 'c"d', 'e\f', null, ''], '{abc}', '{10,01}',
        '[0:1]={2020-01-01,"2020-01-02 03:04:05.6"}')"#,
    "insert into public.wide (id, f4, f8, n) values (2, 'NaN', '-Infinity', 'NaN'), \
        (3, 'Infinity', '1.7976931348623157e308', 1e-20), (4, '1e-45', '-0', 0.000)",
    "insert into public.wide (id, t, v, bi, b) values (5, 'null', '', '000', false), \
        (6, 'unchanged-toast-datum', '''', null, null), (7, E'\\t\\r\\n', ' ', '111', true)",
    "update public.wide set t = t || '''', b = not b",
    "update public.wide set id = id + 100 where id in (1, 6)",
    "delete from public.wide where id > 5",
    r#"insert into "S p.a:c[e"."new-tuple: ""q"", x" select i, ' b[text]:''y''', ': INSERT:', null,
        '.', E'\n', '🐋', 'q"''', 'null' from generate_series(1, 5) i"#,
    r#"update "S p.a:c[e"."new-tuple: ""q"", x" set "old-key:" = -"old-key:" where "old-key:" > 3"#,
    r#"delete from "S p.a:c[e"."new-tuple: ""q"", x" where "old-key:" in (1, -4)"#,
    "insert into public.toasted select 'k' || i, string_agg(md5(i::text || j), ''), 's' \
        from generate_series(1, 3) i, generate_series(1, 400) j group by i",
    "update public.toasted set small = 'only this'",
    "update public.toasted set k = 'new ' || k where k <> 'k1'",
    "begin; insert into public.full_one select i, (select string_agg(md5(j::text || i), '') \
        from generate_series(1, 400) j), nullif(i, 2)::text from generate_series(1, 3) i; \
        insert into public.full_one values (null, null, null), (4, '', null); commit",
    "update public.full_one set n = 'x' where id is null or id = 1",
    "delete from public.full_one where id is distinct from 3",
    "begin; insert into public.by_index select i, i, i, null from generate_series(1, 4) i; \
        savepoint s; insert into public.by_index values (9, 9, 9, 'gone'); rollback to s; \
        update public.by_index set d = 'x' where a = 1; update public.by_index set b = 8 where a = 2; \
        delete from public.by_index where a = 3; commit",
    "insert into public.keyless values (null), ('a'); insert into public.nothing values (1); \
        insert into public.bare default values",
    "insert into public.parent values (1, 'p'); insert into public.child values (2, 'c', 3); \
        update public.parent set v = 'both'; delete from only public.parent",
    "insert into public.parted values (1, 'a'), (2, 'b'); delete from public.parted where id = 2",
    "select pg_logical_emit_message(true, 'a prefix', 'it''s, sz: 3 content:x'), \
        pg_logical_emit_message(false, '', E'two\nlines')",
    "begin; select pg_logical_emit_message(true, 'p', ''); insert into public.keyless \
        select 'many' || i from generate_series(1, 9000) i; commit",
    "insert into public.wide (id, t) values (999, repeat('''', 100000))",
];

/// From PostgreSQL 11.
const TRUNCATES: [&str; 3] = [
    "truncate public.keyless",
    "truncate public.toasted, \"S p.a:c[e\".\"new-tuple: \"\"q\"\", x\" restart identity",
    "truncate public.parent, public.nothing cascade",
];

const GENERATED: &str = "create table public.computed (id int primary key, \
    g int generated always as (id * 2) stored, v text); \
    insert into public.computed (id, v) values (1, 'x'); \
    update public.computed set id = 2; delete from public.computed";

/// Up to 17; from 18 the server refuses the update.
const GENERATED_FULL: &str = "insert into public.computed (id, v) values (1, 'x'); \
    alter table public.computed replica identity full; \
    update public.computed set v = null; delete from public.computed";

/// Up to 11.
const WITH_OIDS: &str = "create table public.numbered (id int primary key, v text) with oids; \
    insert into public.numbered values (1, 'x'); update public.numbered set id = 2; \
    update public.numbered set v = 'y'; delete from public.numbered";

const VIRTUAL: &str = "create table public.virtual (id int primary key, \
    g int generated always as (id * 2), v text); insert into public.virtual (id) values (1); \
    update public.virtual set id = 2; delete from public.virtual";

async fn prepared(major: u32) -> (Server, Session) {
    let settings = ["max_prepared_transactions = 5"];
    let server = Server::start(&Server::bin_of(major).unwrap(), &settings).unwrap();
    let mut session = support::session(&server, "postgres").await;
    session.execute(TABLES).await.unwrap();
    session.execute("create publication p for all tables").await.unwrap();
    for (slot, plugin) in [("pg", "pgoutput"), ("td", "test_decoding")] {
        let sql = format!("select pg_create_logical_replication_slot('{slot}', '{plugin}')");
        session.execute(&sql).await.unwrap();
    }
    (server, session)
}

fn majors() -> impl Iterator<Item = u32> {
    (10..=18).filter(|major| binaries::is_installed(*major))
}

fn unhex(text: &str) -> Bytes {
    let digits = text.strip_prefix("\\x").unwrap();
    let byte = |at: usize| u8::from_str_radix(&digits[at..at + 2], 16).unwrap();
    (0..digits.len()).step_by(2).map(byte).collect()
}

/// What pgoutput's slot holds.
async fn by_pgoutput(session: &mut Session) -> Vec<Chunk> {
    let messages = if session.major_version() >= 14 { ", 'messages', 'true'" } else { "" };
    let sql = format!(
        "select lsn, data from pg_logical_slot_peek_binary_changes('pg', null, null, \
         'proto_version', '1', 'publication_names', 'p'{messages})"
    );
    let (mut decoder, mut assembler) = (Decoder::new(), Assembler::new(Lsn::ZERO));
    let mut chunks = Vec::new();
    for row in session.query(&sql).await.unwrap() {
        let (lsn, data) = (row.lsn(0).unwrap(), unhex(row.str(1).unwrap()));
        let event = decoder.decode(data, lsn).unwrap();
        take(&mut assembler, event, &mut chunks);
    }
    chunks
}

fn options() -> String {
    let options = test_decoding::options(false).into_iter();
    options.map(|(name, value)| format!(", '{name}', '{value}'")).collect()
}

/// What test_decoding's slot holds, pulled as text.
async fn pulled(session: &mut Session) -> Vec<(Lsn, Bytes)> {
    let sql = format!(
        "select lsn, data from pg_logical_slot_peek_changes('td', null, null{})",
        options()
    );
    let rows = session.query(&sql).await.unwrap();
    let message = |row: &walferry::pg::Row| {
        (row.lsn(0).unwrap(), Bytes::copy_from_slice(row.str(1).unwrap().as_bytes()))
    };
    rows.iter().map(message).collect()
}

/// What test_decoding's slot holds, streamed, as many messages as were pulled.
async fn streamed(server: &Server, count: usize) -> Vec<(Lsn, Bytes)> {
    let config = Config::parse(&server.uri("postgres")).unwrap();
    let mut session = Session::connect(&config, Purpose::Replication).await.unwrap();
    let options = test_decoding::options(false);
    let options: Vec<_> = options.iter().map(|(name, value)| (*name, value.as_str())).collect();
    session.start_replication("td", Lsn::ZERO, &options).await.unwrap();
    let mut messages = Vec::new();
    while messages.len() < count {
        match session.replication_message().await.unwrap().unwrap() {
            ReplicationMessage::Data { start_lsn, data, .. } => messages.push((start_lsn, data)),
            ReplicationMessage::Keepalive { .. } => {}
        }
    }
    messages
}

fn take(assembler: &mut Assembler, event: Event, chunks: &mut Vec<Chunk>) {
    match assembler.event(event).unwrap() {
        Some(Item::Chunk(chunk)) => chunks.push(chunk),
        Some(idle) => panic!("{idle:?}"),
        None => {}
    }
}

/// Decodes as a reader would: asks the catalog when told to, and passes over partitioned tables.
async fn by_test_decoding(session: &mut Session, messages: &[(Lsn, Bytes)]) -> (Vec<Chunk>, usize) {
    let (mut decoder, mut assembler) = (test_decoding::Decoder::new(), Assembler::new(Lsn::ZERO));
    let (mut chunks, mut asked) = (Vec::new(), 0);
    for (lsn, data) in messages {
        loop {
            match decoder.decode(data.clone(), *lsn).unwrap_or_else(|e| panic!("{e}: {data:?}")) {
                Step::Event(event) => take(&mut assembler, event, &mut chunks),
                Step::Before(event) => panic!("{event:?}"),
                Step::Nothing => {}
                Step::Describe(name) if name.name == "parted" => {
                    decoder.ignore(&name);
                    continue;
                }
                Step::Describe(name) => {
                    asked += 1;
                    assert!(asked < 200, "asks for ever: {name}");
                    match catalog::describe(session, &name).await.unwrap() {
                        Some(described) => decoder.describe(described),
                        // Before 11 a table being rewritten is printed under a passing name.
                        None if name.name.starts_with("pg_temp_") => decoder.ignore(&name),
                        None => panic!("no table {name}"),
                    }
                    continue;
                }
            }
            break;
        }
    }
    (chunks, asked)
}

/// A transaction without what the decoders lawfully tell differently.
#[derive(Debug, PartialEq)]
struct Transaction {
    xid: u32,
    end_lsn: Lsn,
    commit_time: i64,
    changes: Vec<Change>,
}

/// Whole transactions that hold something; without messages if `messages` is not set.
fn transactions(chunks: Vec<Chunk>, messages: bool) -> Vec<Transaction> {
    let (mut done, mut open): (Vec<_>, Vec<Change>) = (Vec::new(), Vec::new());
    for chunk in chunks {
        open.extend(chunk.changes);
        let Some(commit) = chunk.commit else { continue };
        assert!(chunk.begin.commit_lsn <= commit.commit_lsn && commit.commit_lsn < commit.end_lsn);
        let mut changes = std::mem::take(&mut open);
        changes.retain(|change| match change {
            Change::Message { .. } => messages,
            Change::Insert { relation, .. } => !relation.name.name.starts_with("pg_temp_"),
            _ => true,
        });
        if !changes.is_empty() {
            done.push(Transaction {
                xid: chunk.begin.xid,
                end_lsn: commit.end_lsn,
                commit_time: commit.commit_time.0,
                changes,
            });
        }
    }
    assert!(open.is_empty());
    done
}

/// Compares change by change, so that a failure shows the one that differs.
fn compare(major: u32, expected: Vec<Transaction>, found: Vec<Transaction>) -> usize {
    assert_eq!(expected.len(), found.len(), "{major}: transactions");
    let mut compared = 0;
    for (expected, found) in expected.into_iter().zip(found) {
        for (expected, found) in expected.changes.iter().zip(&found.changes) {
            assert_eq!(expected, found, "{major}");
            compared += 1;
        }
        assert_eq!(expected, found, "{major}");
    }
    compared
}

#[tokio::test]
async fn test_decoding_tells_what_pgoutput_tells_on_every_server() {
    for major in majors() {
        let (server, mut session) = prepared(major).await;
        for sql in WORK {
            session.execute(sql).await.unwrap();
        }
        for sql in TRUNCATES.iter().filter(|_| major >= 11) {
            session.execute(sql).await.unwrap();
        }
        let messages = pulled(&mut session).await;
        let (chunks, asked) = by_test_decoding(&mut session, &messages).await;
        assert!(asked < 40, "{asked} descriptions asked for");
        let expected = transactions(by_pgoutput(&mut session).await, major >= 14);
        let compared = compare(major, expected, transactions(chunks, major >= 14));
        assert!(compared > 9000, "{compared}");
        let streamed = streamed(&server, messages.len()).await;
        assert_eq!(streamed, messages, "{major}: text and positions are those of the pull");
        println!("PostgreSQL {major}: {compared} changes equal, {asked} descriptions");
    }
}

/// Pulled after each statement, the catalog is never far ahead of the text.
#[tokio::test]
async fn identity_generated_columns_and_ddl_in_flight_are_told_as_pgoutput_does() {
    let work = [
        "create table public.live (id int primary key, v text, w int); \
         insert into public.live values (1, 'a', 1), (2, 'b', 2)",
        "update public.live set id = 3 where id = 1",
        "alter table public.live replica identity full",
        "update public.live set v = null where id = 3; delete from public.live where id = 2",
        "alter table public.live replica identity default",
        "delete from public.live where id = 3; insert into public.live values (4, 'c', 4)",
        "alter table public.live add column added int default 7",
        "insert into public.live values (5, 'd', 5, 5); update public.live set id = 6 where id = 4",
        "alter table public.live alter w type bigint, drop column v",
        "update public.live set w = w + 1; update public.live set id = 8 where id = 5",
        "alter table public.live drop constraint live_pkey; alter table public.live add primary key (w)",
        "update public.live set added = 1; update public.live set w = -w; delete from public.live",
        "alter table public.live rename to renamed; insert into public.renamed values (1, 2, 3)",
    ];
    for major in majors() {
        let (server, mut session) = prepared(major).await;
        let (mut told, mut expected) = (Vec::new(), Vec::new());
        let by_version = [
            (major < 12).then_some(WITH_OIDS),
            (major >= 12).then_some(GENERATED),
            (12..18).contains(&major).then_some(GENERATED_FULL),
            (major >= 18).then_some(VIRTUAL),
        ];
        for sql in work.into_iter().chain(by_version.into_iter().flatten()) {
            for sql in sql.split("; ") {
                session.execute(sql).await.unwrap();
                let messages = pulled(&mut session).await;
                told.extend(by_test_decoding(&mut session, &messages).await.0);
                // A session of its own: before 16 each call of pgoutput leaves a callback behind,
                // and the tenth or so ends the session ("out of relcache_callback_list slots").
                let mut session = support::session(&server, "postgres").await;
                expected.extend(by_pgoutput(&mut session).await);
                let advance = "select count(*) from pg_logical_slot_get_changes('td', null, null); \
                     select count(*) from pg_logical_slot_get_binary_changes('pg', null, null, \
                     'proto_version', '1', 'publication_names', 'p')";
                session.execute(advance).await.unwrap();
            }
        }
        let compared = compare(major, transactions(expected, false), transactions(told, false));
        assert!(compared >= 18, "{major}: {compared}");
        println!("PostgreSQL {major}: {compared} changes equal, with DDL between them");
    }
}
