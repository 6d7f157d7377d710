//! One workload read by pgoutput and by another decoder from slots beside each other.

use walferry::catalog::describe;
use walferry::change::{Change, Chunk, Item};
use walferry::decode::{Assembler, Decoder, Event, Result, Step};
use walferry::demo::server::Server;
use walferry::id::QualifiedName;
use walferry::lsn::Lsn;
use walferry::pg::Session;

use super::peek;
use crate::support;

/// A server with a database of this encoding, and a session there. WALFERRY_LIBRARY_PATH: where
/// plugins are looked for first, to try another version of one.
pub async fn database(settings: &[&str], encoding: &str) -> (Server, Session) {
    let libraries = std::env::var("WALFERRY_LIBRARY_PATH");
    let libraries = libraries.map(|dir| format!("dynamic_library_path = '{dir}:$libdir'"));
    let libraries = libraries.unwrap_or_default();
    let settings = &[settings, &[&*libraries]].concat();
    let server = Server::start(&Server::default_bin().unwrap(), settings).unwrap();
    let mut session = support::session(&server, "postgres").await;
    let sql = format!(
        "create database d template template0 encoding '{encoding}' lc_collate 'C' lc_ctype 'C'"
    );
    session.execute(&sql).await.unwrap();
    let session = support::session(&server, "d").await;
    (server, session)
}

/// A slot `s` of pgoutput with publication `p`, and a slot `other` of another plugin.
pub async fn slots(session: &mut Session, plugin: &str) {
    session.execute("create publication p for all tables").await.unwrap();
    for (slot, plugin) in [("s", "pgoutput"), ("other", plugin)] {
        let sql = format!("select pg_create_logical_replication_slot('{slot}', '{plugin}')");
        session.execute(&sql).await.unwrap();
    }
}

/// The transactions that hold changes, as pgoutput tells them.
pub async fn by_pgoutput(session: &mut Session) -> Vec<Chunk> {
    let (mut decoder, mut assembler) = (Decoder::new(), Assembler::new(Lsn(0)));
    let mut chunks = Vec::new();
    for (lsn, data) in peek(session, "'proto_version', '1', 'messages', 'true'").await {
        let event = decoder.decode(data, lsn).unwrap();
        keep(&mut assembler, event, &mut chunks);
    }
    chunks
}

fn keep(assembler: &mut Assembler, event: Event, chunks: &mut Vec<Chunk>) {
    if let Some(Item::Chunk(chunk)) = assembler.event(event).unwrap()
        && !chunk.changes.is_empty()
    {
        chunks.push(chunk);
    }
}

/// A textual decoder: what one message makes of it, and how it is told of a table.
pub trait Textual {
    fn decode(&mut self, data: bytes::Bytes, lsn: Lsn) -> Result<Step>;
    fn describe(&mut self, described: walferry::decode::Described);
    fn ignore(&mut self, table: &QualifiedName);
}

/// All that the slot `other` holds, by `pg_logical_slot_peek_changes` with these options.
pub async fn messages(
    session: &mut Session,
    options: &[(&'static str, String)],
) -> walferry::pg::Result<Vec<(Lsn, bytes::Bytes)>> {
    let list: String =
        options.iter().map(|(name, value)| format!(", '{name}', '{value}'")).collect();
    let sql =
        format!("select lsn, data from pg_logical_slot_peek_changes('other', null, null{list})");
    let rows = session.query(&sql).await?;
    Ok(rows.iter().map(|row| (row.lsn(0).unwrap(), row.bytes(1).unwrap().clone())).collect())
}

/// The same transactions, as a textual decoder tells them. Gives how often it asked, too.
pub async fn by_text(
    session: &mut Session,
    decoder: &mut impl Textual,
    options: &[(&'static str, String)],
) -> (Vec<Chunk>, usize) {
    let (mut assembler, mut asked) = (Assembler::new(Lsn(0)), 0);
    let mut chunks = Vec::new();
    for (lsn, data) in messages(session, options).await.unwrap() {
        loop {
            let step = decoder.decode(data.clone(), lsn);
            match step.unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&data))) {
                Step::Event(event) => keep(&mut assembler, event, &mut chunks),
                Step::Before(event) => {
                    keep(&mut assembler, event, &mut chunks);
                    continue;
                }
                Step::Describe(table) => {
                    asked += 1;
                    match describe(session, &table).await.unwrap() {
                        Some(described) => decoder.describe(described),
                        None => decoder.ignore(&table),
                    }
                    continue;
                }
                Step::Nothing => {}
            }
            break;
        }
    }
    (chunks, asked)
}

/// Compares them change by change, so that a failure shows the one that differs. Gives the number
/// of changes.
pub fn assert_same(left: &[Chunk], right: &[Chunk]) -> usize {
    for (one, other) in left.iter().zip(right) {
        for (a, b) in one.changes.iter().zip(&other.changes) {
            assert_eq!(a, b, "in transaction {:?}", one.begin);
        }
        assert_eq!(one, other);
    }
    assert_eq!(left.len(), right.len());
    left.iter().map(|chunk| chunk.changes.len()).sum()
}

/// Without what only pgoutput tells of a TRUNCATE.
pub fn without_truncate_options(mut chunks: Vec<Chunk>) -> Vec<Chunk> {
    for change in chunks.iter_mut().flat_map(|chunk| &mut chunk.changes) {
        if let Change::Truncate { cascade, restart_identity, .. } = change {
            (*cascade, *restart_identity) = (false, false);
        }
    }
    chunks
}

/// Tables of every difficult type, and every kind of identity.
pub const TABLES: &str = r#"
    create extension hstore schema public; create extension citext schema public;
    create extension ltree schema public;
    create schema "S ""x"; create type "S ""x"."Mood" as enum ('happy', 'so "so"', 'x\y');
    create domain public.dnum as numeric; create domain public.dbool as bool;
    create domain public.dbytea as bytea; create domain public.dd as public.dnum;
    create domain public.dfloat as float8; create domain public.dint as int;
    create type public.pair as (a int, b text, c bytea);
    create table public.every (
      id bigint primary key, a smallint, b int, c bigint, d numeric, e numeric(30,10), f real,
      g double precision, h oid, i bool, j bytea, k text, l varchar(20), m char(10), n "char",
      o name, p date, q time, r timetz, s timestamp, t timestamptz, u interval, v uuid, w json,
      x jsonb, y xml, z money, aa inet, ab cidr, ac macaddr, ad macaddr8, ae bit(5), af varbit,
      ag point, ah line, ai lseg, aj box, ak path, al polygon, am circle, an tsvector, ao tsquery,
      ap int4range, aq numrange, ar tstzrange, au int4multirange, av int[], aw text[][],
      ax "S ""x"."Mood", ay "S ""x"."Mood"[], az public.pair, ba public.pair[], bb public.dnum,
      bc public.dbool, bd public.dbytea, be public.dd, bf public.dfloat, bg public.dint,
      bh public.dnum[], bi bytea[], bj float8[], bk bool[], bl numeric[], bm public.hstore,
      bn public.citext, bo public.ltree, bp pg_lsn, bq regclass, br xid, bs int2vector,
      bt oidvector, bu cid, bv tid, bw txid_snapshot);
    create table "S ""x"."T.y, z\" ("I ""d\" int, "a,b" text, "tab	new
line" bool, "Ünï 😀" bytea, primary key ("I ""d\"));
    create table public.toasted (id int primary key, small int, big text, other bytea, tail int);
    alter table public.toasted alter big set storage external, alter other set storage external;
    create table public.key_toasted (k text primary key, v int);
    alter table public.key_toasted alter k set storage external;
    create table public.whole (a int, b text, c float8, d bytea);
    alter table public.whole replica identity full;
    create table public.whole_key (id int primary key, big text, v int);
    alter table public.whole_key alter big set storage external;
    alter table public.whole_key replica identity full;
    create table public.by_index (a int, b text not null, c bytea not null, v numeric);
    create unique index by_index_u on public.by_index (c, b);
    alter table public.by_index replica identity using index by_index_u;
    create table public.middle_key (v int, id int, w int, id2 text, x int, primary key (id2, id));
    create table public.all_key (a int, b text, primary key (a, b));
    create table public.generated (id int primary key, v int,
      g int generated always as (v * 2) stored, w text);
    create table public.generated_whole (id int, g text generated always as (id::text) stored, w int);
    alter table public.generated_whole replica identity full;
    create table public.identified (id int generated always as identity primary key, v serial);
    create table public.dropping (a int, gone1 text, id int primary key, gone2 int, z bool);
    alter table public.dropping drop gone1, drop gone2;
    create table public.parted (id int, v text, primary key (id)) partition by range (id);
    create table public.parted_1 partition of public.parted for values from (0) to (100);
    create table public.parted_2 (v text, gone int, id int not null);
    alter table public.parted_2 drop gone;
    alter table public.parted attach partition public.parted_2 for values from (100) to (200);
    create table public.parent (id int primary key); create table public.child (w int) inherits (public.parent);
    create table public.referred (id int primary key);
    create table public.referring (id int primary key references public.referred);
    create table public.keyless (v text);
    create table public.none ();
    create table public.altered (id int primary key, v int, t text, b bytea);
    create table public.turned (id int primary key, v text);
    create table public.renamed (id int primary key, old_name text);
"#;

/// What is done to them. Each line is sent alone, so each is a transaction unless it says begin.
pub const WORK: &[&str] = &[
    r#"insert into public.every values (1, -32768, -2147483648, -9223372036854775808,
      '-0.0000000000000000000000000000000000000000000000000000000000000000000001', 1234567890.0123456789,
      1.17549435e-38, 1.7976931348623157e308, 4294967295, true, '\x00ff5c22', E'a"b\\c/d\b\f\n\r\t\x01é€😀\x7f',
      'it''s', 'pad', 'x', 'na"me', '0044-03-15 BC', '24:00', '23:59:59.999999+15:59:59',
      '294276-12-31 23:59:59.999999', '4713-01-01 00:00:00+00 BC', '-178000000 years 11 mons -5 days 00:00:00.000001',
      'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11', '{"a": [1.10, null, "\u00e9\"\\"], "b":   {}}',
      '{"a": 1.10, "n": 12345678901234567890123}', '<a b="c">&lt;é</a>', '-92233720368547758.08', '::1/64',
      '10.0.0.0/8', '08:00:2b:01:02:03', '08:00:2b:01:02:03:04:05', B'10101', B'', '(1e300,-0)', '{1,-1,0}',
      '[(0,0),(1,1)]', '(1,1),(0,0)', '((0,0),(1,1))', '((0,0),(1,1),(2,0))', '<(0,0),1>', 'a:1A ''b\c'':2',
      'a & !b', '[1,5)', '(,1.10]', '[2020-01-01 00:00+00,infinity)', '{[1,3),[5,7)}', '[-2:0]={1,NULL,3}',
      '{{"a,b","c\"d"},{"NULL",NULL}}', 'so "so"', '{"x\\y",happy,NULL}', '(1,"a ""q"" \\ b","\\x00ff")',
      array[row(1,'x','\x01'), row(null,null,null)]::public.pair[], 'NaN', true, '\xdeadbeef', '1.500', '-Infinity', -1,
      '{NaN,1.0,NULL}', '{"\\xff",NULL}', '{NaN,Infinity,-Infinity,-0,1e-300}', '{t,f,NULL}', '{NaN,Infinity,1.00}',
      '"a\"b"=>"c\\d", e=>NULL', 'CiText', 'a.b_1.c', '16/B374D848', 'pg_class', '4294967295', '1 2 3', '4 5', '7',
      '(4294967295,65535)', '10:20:10,14,15')"#,
    "insert into public.every (id) values (2)",
    "insert into public.every (id, d, f, g, i, j, k, m, p, s, t, w, ae, aw, bc) values (3, 1e500, -0.0, -0.0, false, '', '', '',
      'infinity', '-infinity', 'infinity', 'null', B'00000', '{}', false), (4, 0.10, 1e-7, 1e15, null, '\\x5c78', 'null',
      'true', '-infinity', 'infinity', '-infinity', '\"x\"', B'11111', '{{a}}', null), (5, repeat('9', 1000)::numeric, 0.1, 0.1, true,
      decode(repeat('00ff', 1000), 'hex'), repeat('\\\"', 500), 'é', '99999-12-31', '10000-01-01', '2000-01-01 00:00:00.1+00', '[]',
      B'01010', null, null), (6, ('1.' || repeat('01', 500))::numeric, '3.4028235e38', 5e-324, null, null, chr(1) || chr(31) || chr(127),
      null, null, null, null, '123456789012345678901234567890', null, '{null}', null)",
    "update public.every set b = 7, d = 1.0 where id = 1",
    "update public.every set k = 'new', i = not i where id < 5",
    "update public.every set id = -id where id in (1, 3)",
    "delete from public.every where id in (-1, 2)",
    r#"insert into "S ""x"."T.y, z\" values (1, 'x', true, '\x01'), (2, null, null, null)"#,
    r#"update "S ""x"."T.y, z\" set "I ""d\" = 9, "a,b" = '"' where "I ""d\" = 1"#,
    r#"delete from "S ""x"."T.y, z\""#,
    "insert into public.toasted values (1, 1, repeat('a\"é', 5000), decode(repeat('00ff', 5000), 'hex'), 2)",
    "update public.toasted set small = 2",
    "update public.toasted set big = repeat('b', 10000), tail = null",
    "update public.toasted set id = 5",
    "update public.toasted set big = null, other = ''",
    "delete from public.toasted",
    "insert into public.key_toasted values (repeat('k', 2600), 1)",
    "update public.key_toasted set v = 2",
    "update public.key_toasted set k = repeat('m', 2500)",
    "delete from public.key_toasted",
    "insert into public.whole values (1, 'a', 1.5, '\\x01'), (1, 'a', 1.5, '\\x01'), (null, null, null, null), (2, '', -0.0, '')",
    "update public.whole set b = 'z' where a = 1",
    "update public.whole set a = 3 where a is null",
    "delete from public.whole",
    "insert into public.whole_key values (1, repeat('w', 9000), 1), (2, null, null)",
    "update public.whole_key set v = 5; delete from public.whole_key",
    "insert into public.by_index values (1, 'b', '\\xff', 1.10), (null, '', '', null)",
    "update public.by_index set v = 2.20; update public.by_index set b = 'new' where a = 1; delete from public.by_index",
    "insert into public.middle_key values (1, 2, 3, 'k', 5)",
    "update public.middle_key set w = null; update public.middle_key set id = 7; delete from public.middle_key",
    "insert into public.all_key values (1, 'x'); update public.all_key set b = 'y'; delete from public.all_key",
    "insert into public.generated values (1, 2, default, 'w'), (2, null, default, null)",
    "update public.generated set v = 5; update public.generated set id = 9 where id = 1; delete from public.generated",
    "insert into public.generated_whole values (1, default, 2); update public.generated_whole set w = 3; delete from public.generated_whole",
    "insert into public.identified default values; update public.identified set v = 5; delete from public.identified",
    "insert into public.dropping values (1, 2, true); update public.dropping set id = 3; delete from public.dropping",
    "insert into public.parted values (1, 'a'), (150, 'b'); update public.parted set id = 160 where id = 1; delete from public.parted",
    "insert into public.child values (1, 2); insert into public.parent values (3); update only public.parent set id = 4 where id = 3",
    "insert into public.keyless values ('a'), (null); insert into public.none default values",
    "insert into public.referred values (1), (2); insert into public.referring values (1)",
    "begin; insert into public.keyless values ('b'); savepoint a; insert into public.keyless values ('lost'); rollback to a;
      insert into public.keyless values ('c'); commit",
    "select pg_logical_emit_message(true, 'pre\"fix', E'in\\n\"é'), pg_logical_emit_message(false, 'other', 'out')",
    "begin; insert into public.keyless values ('m'); select pg_logical_emit_message(true, 'p', ''); commit",
];
