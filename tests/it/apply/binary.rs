//! Values in binary against values as text: the same rows, whichever way they take.

use super::*;

const COLUMNS: &[&str] =
    &["id*", "b", "s", "i", "r", "d", "n", "n2", "day", "t", "z", "u", "x", "v", "c", "j", "jb"];

const DDL_ALL: &str = "create table public.w (id bigint primary key, b bool, s smallint, i int, \
    r real, d double precision, n numeric, n2 numeric(20, 4), day date, t timestamp, \
    z timestamptz, u uuid, x bytea, v varchar(40), c char(6), j json, jb jsonb)";

/// One row of texts as servers print them.
fn plain(id: i64, n: usize) -> Vec<String> {
    let days = ["2000-01-01", "1999-12-31", "2024-02-29", "0001-01-01", "9999-12-31", "infinity"];
    let times = ["2000-01-01 00:00:00", "1999-12-31 23:59:59.999999", "1582-10-15 12:00:00.5"];
    let numerics = ["0", "0.0000", "-1.50", "12345678901234567890.0123456789", "NaN"];
    let numerics = [&numerics[..], &["0.00001", "10000", "99999999.9999"][..]].concat();
    let floats = ["0", "-0", "1.5", "1e+100", "-2.2250738585072014e-308", "NaN", "-Infinity"];
    let reals = ["0", "-0", "1.5", "3.4028235e+38", "1e-45", "NaN", "Infinity"];
    let small = [&["0", "-1.5000", "9999999999999999.9999"][..]].concat();
    let texts = ["", "a\tb\n\\N", "\u{e9}\u{1f600}", "null"];
    let of = |list: &[&str]| list[n % list.len()].to_string();
    vec![
        id.to_string(),
        of(&["t", "f"]),
        of(&["-32768", "32767", "0"]),
        of(&["-2147483648", "2147483647"]),
        of(&reals),
        of(&floats),
        of(&numerics),
        of(&small),
        of(&days),
        of(&[&times[..], &["-infinity"][..]].concat()),
        format!("{}+00", of(&times)),
        of(&["a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11", "ffffffff-ffff-ffff-ffff-ffffffffffff"]),
        of(&["\\x", "\\x00ff5c27"]),
        of(&texts),
        of(&["", "abc", "\u{e9}"]),
        of(&["null", "{\"a\": [1, 2]}", " 1"]),
        of(&["null", "{\"a\": [1, 2.50]}", "\"\\u00e9\""]),
    ]
}

/// Rows that have no binary form here, and that a server prints.
fn odd(id: i64, n: usize) -> Vec<String> {
    let mut row = plain(id, n);
    let (column, text) = [
        (8, "0044-03-15 BC"),
        (9, "0044-03-15 12:00:00 BC"),
        (10, "10000-01-01 00:00:00+00"),
        (8, "20000-01-01"),
    ][n % 4];
    row[column] = text.to_string();
    row
}

fn changed(w: &Table, row: &[String]) -> Change {
    w.update(&row.iter().map(String::as_str).collect::<Vec<_>>())
}

fn new(w: &Table, row: &[String]) -> Change {
    w.insert(&row.iter().map(String::as_str).collect::<Vec<_>>())
}

#[tokio::test]
async fn values_in_binary_are_those_of_their_texts() {
    let (server, mut session) = target(DDL_ALL).await;
    let w = table("w", ByKey, COLUMNS);
    let nulls = |id: i64| {
        let mut row = vec![N.to_string(); COLUMNS.len()];
        row[0] = id.to_string();
        row
    };
    let mut first: Vec<Change> = (0..60).map(|n| new(&w, &plain(n, n as usize))).collect();
    first.extend((60..64).map(|id| new(&w, &nulls(id))));
    let then: Vec<Change> = (64..104).map(|n| new(&w, &odd(n, n as usize))).collect();
    let mut last: Vec<Change> = (0..40).map(|n| changed(&w, &plain(n, n as usize + 3))).collect();
    last.extend((40..50).map(|n| changed(&w, &nulls(n))));
    let odd_ones: Vec<Change> = (50..60).map(|n| changed(&w, &odd(n, n as usize))).collect();
    let batches = [first, then, last, odd_ones];
    let mut seen = Vec::new();
    let ways = [
        (Mode::Rows, true, true),
        (Mode::Sets, true, true),
        (Mode::Sets, false, true),
        (Mode::Sets, true, false),
        (Mode::Sets, false, false),
    ];
    for (turn, (mode, copy_inserts, binary_values)) in ways.into_iter().enumerate() {
        let limits = Limits { bytes: 1, transactions: 1 };
        let mut wanted = tuned(mode, Some(limits));
        wanted.tuning.copy_inserts = copy_inserts;
        wanted.tuning.binary_values = binary_values;
        let at = |n: usize| (turn * 1000 + 100 * (n + 1)) as u64;
        let items = batches.iter().enumerate().map(|(n, batch)| transaction(at(n), batch.clone()));
        let applied = apply_with(&server, wanted, items.collect()).await.unwrap();
        assert_eq!((applied.fallbacks, applied.transactions), (0, 4));
        // Floats by their bits: -0 and 0 print alike in older versions.
        let all = "select *, float8send(d), float4send(r) from public.w order by id";
        seen.push(rows(&mut session, all).await);
        assert_eq!(rows(&mut session, "select count(*) from public.w").await, "104");
        session.execute("truncate public.w").await.unwrap();
    }
    assert!(seen[0].contains("0044-03-15 BC") && seen[0].contains("20000-01-01"));
    for (way, all) in ways.iter().zip(&seen) {
        assert_eq!(*all, seen[0], "{way:?}");
    }
}
