//! What decoding one message costs, for each decoder: an INSERT of a row of 8 columns, and of 32.
//!
//! `make decode-bench`, or `cargo bench --bench decode`. Fails (exit code 1) where a bar is missed:
//! for 8 columns pgoutput under 60 ns and the textual decoders within 15 times what it took, by
//! medians; and no allocation for a column, so as many for 32 as for 8. Wants a quiet machine.
//!
//! divan gives its figures to people only, so they are read from what it prints: the benchmarks run
//! in a child, whose output is shown and judged.
#![allow(clippy::unwrap_used, reason = "a benchmark")]

mod judge;

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
    // Without --bench, as in `cargo test`, each runs once and nothing is measured.
    if judge::is_child() || !std::env::args().any(|argument| argument == "--bench") {
        return divan::main();
    }
    if !judge::run() {
        std::process::exit(1);
    }
}

/// Name, type, and value of the first columns; the rest have the same again under other names.
/// `None` is NULL.
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

/// Of a row with so many columns: name, type and value.
fn columns(count: usize) -> Vec<(String, u32, Option<&'static str>)> {
    let named = |(index, (name, type_oid, value)): (usize, &(&str, u32, Option<&'static str>))| {
        let name = match index / COLUMNS.len() {
            0 => name.to_string(),
            again => format!("{name}_{again}"),
        };
        (name, *type_oid, *value)
    };
    COLUMNS.iter().cycle().take(count).enumerate().map(named).collect()
}

/// The table as the catalog has it.
fn table(count: usize) -> Described {
    let column = |(name, type_oid, _): (String, u32, Option<&str>)| DescribedColumn {
        key: name == "id",
        name,
        type_oid,
        type_modifier: -1,
        type_name: String::new(),
        not_null: false,
        generated: false,
    };
    Described {
        oid: 16385,
        name: QualifiedName::new("public", "payments"),
        identity: ReplicaIdentity::Default,
        columns: columns(count).into_iter().map(column).collect(),
    }
}

fn pgoutput_messages(count: usize) -> (Bytes, Bytes) {
    let mut relation = b"R\0\0\x40\x01public\0payments\0d".to_vec();
    let mut insert = b"I\0\0\x40\x01N".to_vec();
    for message in [&mut relation, &mut insert] {
        message.extend_from_slice(&(count as u16).to_be_bytes());
    }
    for (name, type_oid, value) in columns(count) {
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

#[divan::bench(args = [8, 32])]
fn pgoutput(bencher: Bencher<'_, '_>, count: usize) {
    let (relation, insert) = pgoutput_messages(count);
    let mut decoder = decode::Decoder::new();
    decoder.decode(relation, Lsn(1)).unwrap();
    bencher.bench_local(|| decoder.decode(black_box(insert.clone()), Lsn(2)).unwrap());
}

fn wal2json_message(count: usize) -> Bytes {
    let column = |(name, type_oid, value): (String, u32, Option<&str>)| {
        let value = match (type_oid, value) {
            (_, None) => "null".to_string(),
            (16, Some(value)) => (value == "t").to_string(),
            (20 | 23 | 1700, Some(value)) => value.to_string(),
            (_, Some(value)) => format!("\"{value}\""),
        };
        format!("{{\"name\":\"{name}\",\"typeoid\":{type_oid},\"value\":{value}}}")
    };
    let columns: Vec<String> = columns(count).into_iter().map(column).collect();
    let head = "{\"action\":\"I\",\"xid\":731,\"timestamp\":\"2026-11-21 04:18:20.123456+00\",\
         \"origin\":0,\"lsn\":\"0/1A60C28\",\"schema\":\"public\",\"table\":\"payments\"";
    format!("{head},\"columns\":[{}]}}", columns.join(",")).into()
}

#[divan::bench(args = [8, 32])]
fn wal2json(bencher: Bencher<'_, '_>, count: usize) {
    let message = wal2json_message(count);
    let mut decoder = wal2json::Decoder::new(Numbers::Text);
    decoder.describe(table(count));
    bencher.bench_local(|| decoder.decode(black_box(message.clone()), Lsn(2)).unwrap());
}

fn test_decoding_message(count: usize) -> Bytes {
    let column = |(name, type_oid, value): (String, u32, Option<&str>)| match (type_oid, value) {
        (_, None) => format!(" {name}[timestamp with time zone]:null"),
        (16, Some(value)) => format!(" {name}[boolean]:{}", value == "t"),
        (20 | 23 | 1700, Some(value)) => format!(" {name}[numeric]:{value}"),
        (_, Some(value)) => format!(" {name}[timestamp with time zone]:'{value}'"),
    };
    let columns: Vec<String> = columns(count).into_iter().map(column).collect();
    format!("table public.payments: INSERT:{}", columns.concat()).into()
}

#[divan::bench(args = [8, 32])]
fn test_decoding(bencher: Bencher<'_, '_>, count: usize) {
    let message = test_decoding_message(count);
    let mut decoder = test_decoding::Decoder::new();
    decoder.describe(table(count));
    bencher.bench_local(|| decoder.decode(black_box(message.clone()), Lsn(2)).unwrap());
}
