//! What decoding one message costs, for each decoder: an INSERT of a row of eight columns.
//!
//! `cargo bench --bench decode`. The bars: pgoutput under 60 ns, the textual decoders within 15
//! times that; no allocation for each column (`alloc` tells: it counts them for one message).
#![allow(clippy::unwrap_used, reason = "a benchmark")]

use bytes::Bytes;
use divan::{AllocProfiler, Bencher, black_box};

use walferry::change::ReplicaIdentity;
use walferry::decode::wal2json::Numbers;
use walferry::decode::{self, Described, DescribedColumn, test_decoding, wal2json};
use walferry::id::QualifiedName;
use walferry::lsn::Lsn;

#[global_allocator]
static ALLOC: AllocProfiler = AllocProfiler::system();

fn main() {
    divan::main();
}

/// Name, type, and value of each column; `None` is NULL.
const COLUMNS: [(&str, u32, Option<&str>); 8] = [
    ("id", 20, Some("1234567")),
    ("account", 23, Some("4711")),
    ("created", 1184, Some("2026-11-21 04:18:20.123456+00")),
    ("amount", 1700, Some("1234.50")),
    ("open", 16, Some("t")),
    ("note", 25, Some("a few words of text")),
    ("reference", 2950, Some("a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11")),
    ("closed", 1184, None),
];

/// The table as the catalog has it.
fn table() -> Described {
    let column = |(name, type_oid, _): (&str, u32, Option<&str>)| DescribedColumn {
        name: name.to_string(),
        type_oid,
        type_modifier: -1,
        type_name: String::new(),
        key: name == "id",
        not_null: false,
        generated: false,
    };
    Described {
        oid: 16385,
        name: QualifiedName::new("public", "payments"),
        identity: ReplicaIdentity::Default,
        columns: COLUMNS.map(column).into(),
    }
}

fn pgoutput_messages() -> (Bytes, Bytes) {
    let mut relation = b"R\0\0\x40\x01public\0payments\0d\0\x08".to_vec();
    let mut insert = b"I\0\0\x40\x01N\0\x08".to_vec();
    for (name, type_oid, value) in COLUMNS {
        relation.push(u8::from(name == "id"));
        relation.extend_from_slice(name.as_bytes());
        relation.push(0);
        relation.extend_from_slice(&type_oid.to_be_bytes());
        relation.extend_from_slice(&u32::MAX.to_be_bytes());
        match value {
            None => insert.push(b'n'),
            Some(text) => {
                insert.push(b't');
                insert.extend_from_slice(&(text.len() as u32).to_be_bytes());
                insert.extend_from_slice(text.as_bytes());
            }
        }
    }
    (relation.into(), insert.into())
}

#[divan::bench]
fn pgoutput(bencher: Bencher<'_, '_>) {
    let (relation, insert) = pgoutput_messages();
    let mut decoder = decode::Decoder::new();
    decoder.decode(relation, Lsn(1)).unwrap();
    bencher.bench_local(|| decoder.decode(black_box(insert.clone()), Lsn(2)).unwrap());
}

fn wal2json_message() -> Bytes {
    let columns = COLUMNS.map(|(name, type_oid, value)| {
        let value = match (type_oid, value) {
            (_, None) => "null".to_string(),
            (16, Some(value)) => (value == "t").to_string(),
            (20 | 23 | 1700, Some(value)) => value.to_string(),
            (_, Some(value)) => format!("\"{value}\""),
        };
        format!("{{\"name\":\"{name}\",\"typeoid\":{type_oid},\"value\":{value}}}")
    });
    let head = "{\"action\":\"I\",\"xid\":731,\"timestamp\":\"2026-11-21 04:18:20.123456+00\",\
         \"origin\":0,\"lsn\":\"0/1A60C28\",\"schema\":\"public\",\"table\":\"payments\"";
    format!("{head},\"columns\":[{}]}}", columns.join(",")).into()
}

#[divan::bench]
fn wal2json(bencher: Bencher<'_, '_>) {
    let message = wal2json_message();
    let mut decoder = wal2json::Decoder::new(Numbers::Text);
    decoder.describe(table());
    bencher.bench_local(|| decoder.decode(black_box(message.clone()), Lsn(2)).unwrap());
}

fn test_decoding_message() -> Bytes {
    let columns = COLUMNS.map(|(name, type_oid, value)| match (type_oid, value) {
        (_, None) => format!(" {name}[timestamp with time zone]:null"),
        (16, Some(value)) => format!(" {name}[boolean]:{}", value == "t"),
        (20 | 23 | 1700, Some(value)) => format!(" {name}[numeric]:{value}"),
        (_, Some(value)) => format!(" {name}[timestamp with time zone]:'{value}'"),
    });
    format!("table public.payments: INSERT:{}", columns.concat()).into()
}

#[divan::bench]
fn test_decoding(bencher: Bencher<'_, '_>) {
    let message = test_decoding_message();
    let mut decoder = test_decoding::Decoder::new();
    decoder.describe(table());
    bencher.bench_local(|| decoder.decode(black_box(message.clone()), Lsn(2)).unwrap());
}
