//! Recorded messages, printed ones read back, and bytes that are no messages.

use bytes::Bytes;

use super::*;
use crate::change::{Change, Chunk, Item, OldRow, ReplicaIdentity, Row, Value};
use crate::decode::{Assembler, DescribedColumn};
use crate::limit::CHUNK_CHANGES;

/// `id k` is a key column, `v n` is NOT NULL, `g g` is generated, `v` is neither.
pub(super) fn described(name: &str, identity: ReplicaIdentity, columns: &[&str]) -> Described {
    let columns = columns.iter().enumerate().map(|(index, column)| {
        let (name, flag) = column.rsplit_once(' ').unwrap_or((column, ""));
        DescribedColumn {
            name: name.to_string(),
            type_oid: 100 + index as u32,
            type_modifier: -1,
            type_name: "text".to_string(),
            key: flag == "k" && identity != ReplicaIdentity::Full,
            not_null: flag == "k" || flag == "n",
            generated: flag == "g",
        }
    });
    let name = QualifiedName::new("public", name);
    Described { oid: 7, name, identity, columns: columns.collect() }
}

pub(super) fn knowing(identity: ReplicaIdentity, columns: &[&str]) -> Decoder {
    let mut decoder = Decoder::new();
    decoder.describe(described("t", identity, columns));
    decoder
}

fn step(decoder: &mut Decoder, text: &str) -> Step {
    decoder.decode(Bytes::copy_from_slice(text.as_bytes()), Lsn(100)).unwrap()
}

pub(super) fn change(decoder: &mut Decoder, text: &str) -> Change {
    match step(decoder, text) {
        Step::Event(Event::Change { xid: None, change }) => change,
        other => panic!("{text}: {other:?}"),
    }
}

fn asks(decoder: &mut Decoder, text: &str) -> bool {
    matches!(step(decoder, text), Step::Describe(_))
}

fn error(decoder: &mut Decoder, text: &str) -> Error {
    decoder.decode(Bytes::copy_from_slice(text.as_bytes()), Lsn(100)).unwrap_err()
}

fn show(row: &Row) -> String {
    let values = row.values().map(|value| match value {
        Value::Null => "-".to_string(),
        Value::Unchanged => "~".to_string(),
        Value::Text(text) => format!("<{}>", String::from_utf8_lossy(text)),
        Value::Binary(_) => "binary".to_string(),
    });
    values.collect::<Vec<_>>().join(" ")
}

fn told(change: &Change) -> String {
    let old = |old: &OldRow| match old {
        OldRow::Key(row) => format!("key {}", show(row)),
        OldRow::Full(row) => format!("full {}", show(row)),
    };
    match change {
        Change::Insert { new, .. } => format!("insert {}", show(new)),
        Change::Update { old: None, new, .. } => format!("update {}", show(new)),
        Change::Update { old: Some(o), new, .. } => format!("update {} to {}", old(o), show(new)),
        Change::Delete { old: o, .. } => format!("delete {}", old(o)),
        other => format!("{other:?}"),
    }
}

fn columns(change: &Change) -> String {
    let (Change::Insert { relation, .. }
    | Change::Update { relation, .. }
    | Change::Delete { relation, .. }) = change
    else {
        panic!("{change:?}")
    };
    let columns = relation.columns.iter().map(|c| format!("{}:{}", c.name, c.type_oid));
    columns.collect::<Vec<_>>().join(" ")
}

pub(super) const PLAIN: [&str; 3] = ["id k", "b", "v"];

/// Whole messages as servers wrote them, with what they say.
pub(super) const RECORDED: [(&str, &str); 13] = [
    ("table public.t: INSERT: id[integer]:1 b[boolean]:true v[text]:'x'", "insert <1> <t> <x>"),
    ("table public.t: INSERT: id[integer]:-1 b[boolean]:false v[text]:''", "insert <-1> <f> <>"),
    (
        "table public.t: INSERT: id[integer]:1 b[double precision]:-Infinity v[text]:null",
        "insert <1> <-Infinity> -",
    ),
    (
        "table public.t: INSERT: id[integer]:1 b[numeric]:NaN v[text]:'it''s ''\n'''",
        "insert <1> <NaN> <it's '\n'>",
    ),
    (
        "table public.t: INSERT: id[integer]:1 b[bit varying]:B'0101' v[text]:'null'",
        "insert <1> <0101> <null>",
    ),
    (
        "table public.t: INSERT: id[integer]:1 b[bit(3)[]]:'{101,B''1''}' v[text]:'a\\b\\'",
        "insert <1> <{101,B'1'}> <a\\b\\>",
    ),
    (
        "table public.t: INSERT: id[integer]:1 b[bit]:B'' v[text]:' v[text]:''x'' new-tuple:'",
        "insert <1> <> < v[text]:'x' new-tuple:>",
    ),
    (
        "table public.t: UPDATE: id[integer]:1 b[text]:unchanged-toast-datum v[text]:'y'",
        "update <1> ~ <y>",
    ),
    (
        "table public.t: UPDATE: id[integer]:1 b[text]:'unchanged-toast-datum' v[text]:'y'",
        "update <1> <unchanged-toast-datum> <y>",
    ),
    (
        "table public.t: UPDATE: old-key: id[integer]:1 new-tuple: id[integer]:2 \
         b[text]:unchanged-toast-datum v[text]:null",
        "update key <1> - - to <2> ~ -",
    ),
    ("table public.t: DELETE: id[integer]:2", "delete key <2> - -"),
    (
        "table \"public\".\"t\": INSERT: \"id\"[integer]:1 \"b\"[\"text\"]:'' \"v\"[\"text\"]:''",
        "insert <1> <> <>",
    ),
    (
        "table public.t: INSERT: id[integer]:1 b[public.\"we[ird\"]:'a' v[s.\"]:\"\"\"[]]:'b'",
        "insert <1> <a> <b>",
    ),
];

#[test]
fn recorded_messages_are_decoded() {
    for (text, expected) in RECORDED {
        let mut decoder = knowing(ReplicaIdentity::Default, &PLAIN);
        assert_eq!(told(&change(&mut decoder, text)), expected, "{text}");
        // Again, with what was learnt from the first.
        assert_eq!(told(&change(&mut decoder, text)), expected, "{text}");
    }
}

#[test]
fn pgcopydb_706_full_old_rows_have_their_nulls_back() {
    let mut decoder = knowing(ReplicaIdentity::Full, &["id", "old-key:", "g g", "v n"]);
    let delete = "table public.t: DELETE: v[text]:'x'";
    assert_eq!(told(&change(&mut decoder, delete)), "delete full - - <x>");
    let update = "table public.t: UPDATE: old-key: \"old-key:\"[text]:'o' g[integer]:4 \
                  v[text]:'x' new-tuple: id[integer]:1 \"old-key:\"[text]:null g[integer]:5 \
                  v[text]:'y'";
    assert_eq!(told(&change(&mut decoder, update)), "update full - <o> <x> to <1> - <y>");
    let Change::Update { relation, .. } = change(&mut decoder, update) else { panic!() };
    assert_eq!(relation.key_columns().collect::<Vec<_>>(), [0, 1, 2], "every column is a key");
    let mut decoder = knowing(ReplicaIdentity::Full, &["a", "b"]);
    assert_eq!(told(&change(&mut decoder, "table public.t: DELETE:")), "delete full - -");
    let update = "table public.t: UPDATE: old-key: new-tuple: a[text]:null b[text]:''";
    assert_eq!(told(&change(&mut decoder, update)), "update full - - to - <>");
}

#[test]
fn pgcopydb_710_unchanged_toast_is_neither_text_nor_null() {
    let mut decoder = knowing(ReplicaIdentity::Default, &PLAIN);
    let text = "table public.t: UPDATE: id[integer]:1 b[text]:unchanged-toast-datum v[text]:null";
    let Change::Update { new, .. } = change(&mut decoder, text) else { panic!() };
    assert_eq!(new.values().nth(1), Some(Value::Unchanged));
    assert_eq!(new.values().nth(2), Some(Value::Null));
}

#[test]
fn xtdb_5542_the_old_row_of_full_holds_what_the_new_one_lacks() {
    let mut decoder = knowing(ReplicaIdentity::Full, &["id k", "v"]);
    let text = "table public.t: UPDATE: old-key: id[integer]:1 v[text]:'long' new-tuple: \
                id[integer]:2 v[text]:unchanged-toast-datum";
    assert_eq!(told(&change(&mut decoder, text)), "update full <1> <long> to <2> ~");
}

#[test]
fn pgcopydb_979_quotes_are_not_lost() {
    let mut decoder = knowing(ReplicaIdentity::Default, &["id k", "v"]);
    let text = "table public.t: INSERT: id[integer]:1 v[character varying]:'''a'' \"b\" ''''c'''";
    assert_eq!(told(&change(&mut decoder, text)), "insert <1> <'a' \"b\" ''c'>");
}

#[test]
fn pgcopydb_980_numbers_keep_every_digit() {
    let mut decoder = knowing(ReplicaIdentity::Default, &["id k", "v"]);
    for number in ["0.1", "1.7976931348623157e+308", "-0", "12345678901234567890.123456789000"] {
        let text = format!("table public.t: INSERT: id[bigint]:1 v[numeric]:{number}");
        assert_eq!(told(&change(&mut decoder, &text)), format!("insert <1> <{number}>"));
    }
}

#[test]
fn pgcopydb_852_quoted_names_are_names() {
    let odd = ["new-tuple:", "a \"b\".[c]:'d'", "\u{1F40B}\n", "null", "table", "A"];
    let mut decoder = knowing(ReplicaIdentity::Nothing, &odd);
    let label = |name: &str| format!(" \"{}\"[text]:'v'", name.replace('"', "\"\""));
    let row: String = odd.iter().map(|name| label(name)).collect();
    let text = format!("table public.t: INSERT:{row}");
    assert_eq!(told(&change(&mut decoder, &text)), "insert <v> <v> <v> <v> <v> <v>");
    let name = QualifiedName::new("My \"S\": INSERT:", "a.b, c");
    let text = "table \"My \"\"S\"\": INSERT:\".\"a.b, c\": INSERT: a[integer]:1";
    assert_eq!(step(&mut decoder, text), Step::Describe(name.clone()));
    decoder.describe(Described { name, ..described("", ReplicaIdentity::Default, &["a k"]) });
    assert_eq!(told(&change(&mut decoder, text)), "insert <1>");
}

#[test]
fn a_table_is_asked_for_once_and_an_ignored_one_passed_over() {
    let mut decoder = Decoder::new();
    let text = "table public.t: INSERT: id[integer]:1";
    assert_eq!(step(&mut decoder, text), Step::Describe(QualifiedName::new("public", "t")));
    decoder.describe(described("t", ReplicaIdentity::Default, &["id k"]));
    assert_eq!(told(&change(&mut decoder, text)), "insert <1>");
    decoder.ignore(&QualifiedName::new("public", "u"));
    assert_eq!(step(&mut decoder, "table public.u: DELETE: (no-tuple-data)"), Step::Nothing);
    assert_eq!(step(&mut decoder, "table public.u: TRUNCATE: (no-flags)"), Step::Nothing);
    let text = "table public.u, public.t, public.w: TRUNCATE: restart_seqs cascade";
    assert_eq!(step(&mut decoder, text), Step::Describe(QualifiedName::new("public", "w")));
    decoder.describe(described("w", ReplicaIdentity::Default, &["id k"]));
    match change(&mut decoder, text) {
        Change::Truncate { relations, cascade: true, restart_identity: true } => {
            let names: Vec<_> = relations.iter().map(|r| r.name.name.as_str()).collect();
            assert_eq!(names, ["t", "w"]);
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_altered_table_is_described_again_and_its_rows_say_how_it_was() {
    let mut decoder = knowing(ReplicaIdentity::Default, &["id k", "v"]);
    let two = "table public.t: INSERT: id[integer]:1 v[text]:'x'";
    let three = "table public.t: INSERT: id[integer]:1 v[text]:'x' w[text]:'y'";
    let first = change(&mut decoder, two);
    assert!(asks(&mut decoder, three));
    decoder.describe(described("t", ReplicaIdentity::Default, &["id k", "v", "w"]));
    assert_eq!(columns(&change(&mut decoder, three)), "id:100 v:101 w:102");
    // An older row comes after: the catalog is ahead of the stream.
    assert!(asks(&mut decoder, two));
    decoder.describe(described("t", ReplicaIdentity::Default, &["id k", "v", "w"]));
    let again = change(&mut decoder, two);
    assert_eq!(columns(&again), "id:100 v:101");
    assert_eq!(again, first);
    // Dropped since, so the catalog knows neither type nor key of it.
    let dropped = "table public.t: UPDATE: id[integer]:1 gone[text]:'z' v[text]:'x'";
    assert!(asks(&mut decoder, dropped));
    decoder.describe(described("t", ReplicaIdentity::Default, &["id k", "v", "w"]));
    assert_eq!(columns(&change(&mut decoder, dropped)), "id:100 gone:0 v:101");
    // Another type: asked for again, so that the relation's is right.
    let retyped = "table public.t: INSERT: id[bigint]:1 gone[text]:'z' v[text]:'x'";
    assert!(asks(&mut decoder, retyped));
}

#[test]
fn a_changed_identity_is_seen_in_old_rows_and_never_guessed() {
    let key = "table public.t: DELETE: id[integer]:1";
    let full = "table public.t: DELETE: id[integer]:1 v[text]:'x'";
    let mut decoder = knowing(ReplicaIdentity::Default, &["id k", "v"]);
    assert_eq!(told(&change(&mut decoder, key)), "delete key <1> -");
    assert!(asks(&mut decoder, full));
    decoder.describe(described("t", ReplicaIdentity::Full, &["id k", "v"]));
    assert_eq!(told(&change(&mut decoder, full)), "delete full <1> <x>");
    let plain = "table public.t: UPDATE: id[integer]:1 v[text]:'x'";
    assert!(asks(&mut decoder, plain), "under FULL there is always an old row");
    decoder.describe(described("t", ReplicaIdentity::Full, &["id k", "v"]));
    let refused = error(&mut decoder, plain);
    assert!(matches!(refused, Error::Reshaped { .. }));
    assert!(refused.to_string().contains("REPLICA IDENTITY"), "{refused}");
    // A table's own columns tell too: one that is NOT NULL is missing.
    let mut decoder = knowing(ReplicaIdentity::Full, &["id k", "v n"]);
    change(&mut decoder, full);
    assert!(asks(&mut decoder, key));
    // The key is another now.
    let mut decoder = knowing(ReplicaIdentity::Default, &["id", "v k"]);
    assert!(matches!(error(&mut decoder, key), Error::Reshaped { .. }));
    assert!(matches!(error(&mut decoder, full), Error::Reshaped { .. }));
    let none = "table public.t: DELETE: (no-tuple-data)";
    let refused = error(&mut decoder, none);
    assert!(refused.to_string().contains("public.t at 0/64 carries no row"), "{refused}");
}

#[test]
fn the_oid_of_a_table_with_oids_is_no_column() {
    let text = "table public.t: UPDATE: old-key: oid[oid]:7 id[integer]:1 new-tuple: oid[oid]:7 \
                id[integer]:2 v[text]:'x'";
    let mut decoder = knowing(ReplicaIdentity::Default, &["id k", "v"]);
    assert_eq!(told(&change(&mut decoder, text)), "update key <1> - to <2> <x>");
    let mut decoder = knowing(ReplicaIdentity::Default, &["id k"]);
    assert_eq!(told(&change(&mut decoder, text)), "update key <1> - to <2> <x>");
    let mut decoder = knowing(ReplicaIdentity::Default, &["oid k", "id"]);
    let text = "table public.t: INSERT: oid[oid]:7 id[integer]:1";
    assert_eq!(told(&change(&mut decoder, text)), "insert <7> <1>");
}

#[test]
fn a_name_that_is_not_utf_8_is_an_error() {
    let text = Bytes::from_static(b"table public.\"\xe9\": INSERT: id[integer]:1");
    let refused = Decoder::new().decode(text, Lsn(100)).unwrap_err();
    assert_eq!(refused, Error::NameNotUtf8 { lsn: Lsn(100) });
}

#[test]
fn ddl_leaves_an_empty_transaction_and_descriptions_are_asked_for_again() {
    let mut decoder = knowing(ReplicaIdentity::Default, &["id k"]);
    let insert = "table public.t: INSERT: id[integer]:1";
    let end = "COMMIT 7 (at 2026-11-21 04:19:19.5+00)";
    for text in ["BEGIN 7", insert, end] {
        assert!(!asks(&mut decoder, text));
    }
    assert!(!asks(&mut decoder, insert));
    for text in ["BEGIN 7", end] {
        assert!(!asks(&mut decoder, text));
    }
    assert!(asks(&mut decoder, insert));
    assert!(asks(&mut decoder, "table public.t: TRUNCATE: (no-flags)"));
}

#[test]
fn commit_times_are_exact_in_every_zone() {
    for (text, micros) in [
        ("2000-01-01 00:00:00+00", 0),
        ("2000-01-01 05:30:00.000001+05:30", 1),
        ("1999-12-31 20:29:59.5-03:30:01", 500_000),
    ] {
        match step(&mut Decoder::new(), &format!("COMMIT 7 (at {text})")) {
            Step::Event(Event::Commit(commit)) => {
                assert_eq!(commit.commit_time.0, micros, "{text}");
                assert_eq!((commit.commit_lsn, commit.end_lsn), (Lsn(99), Lsn(100)));
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn logical_messages_are_split_by_their_size() {
    let mut decoder = Decoder::new();
    for (text, expected) in [
        ("1 prefix: p, sz: 2 content:hi", (true, "p", "hi")),
        ("0 prefix: , sz: 0 content:", (false, "", "")),
        ("1 prefix: a, sz: 9 content:b, sz: 1 content:c", (true, "a, sz: 9 content:b", "c")),
        ("1 prefix: a, sz: 18 content:b, sz: 1 content:c", (true, "a", "b, sz: 1 content:c")),
        ("1 prefix: p, sz: 9 content:cut", (true, "p", "cut")),
    ] {
        match change(&mut decoder, &format!("message: transactional: {text}")) {
            Change::Message { transactional, lsn, prefix, content } => {
                assert_eq!((transactional, prefix.as_str()), (expected.0, expected.1), "{text}");
                assert_eq!((content.as_ref(), lsn), (expected.2.as_bytes(), Lsn(100)), "{text}");
            }
            other => panic!("{other:?}"),
        }
    }
    let lost = error(&mut decoder, "message: transactional: 1 prefix: p, size: 1");
    assert!(matches!(lost, Error::Text { expected: "a logical message", .. }));
}

#[test]
fn what_was_not_asked_for_is_refused_by_name() {
    for text in [
        "PREPARE TRANSACTION 'x', txid 7",
        "COMMIT PREPARED 'x', txid 7",
        "opening a streamed block for transaction TXN 7",
        "streaming change for TXN 7",
    ] {
        let refused = error(&mut Decoder::new(), text);
        assert!(matches!(refused, Error::NotAskedFor { .. }), "{text}: {refused}");
    }
    for text in ["", "BEGIN", "BEGIN 7 ", "COMMIT 7", "hello", "{\"action\":\"B\"}"] {
        let refused = error(&mut Decoder::new(), text);
        assert!(refused.to_string().contains("check the slot's plugin"), "{text}: {refused}");
    }
    let mut decoder = Decoder::new();
    step(&mut decoder, "BEGIN 7");
    let other = error(&mut decoder, "COMMIT 8 (at 2026-11-21 04:19:19.5+00)");
    assert_eq!(other, Error::OtherCommit { xid: 8, lsn: Lsn(100) });
}

fn assemble(assembler: &mut Assembler, decoder: &mut Decoder, texts: &[(u64, &str)]) -> Vec<Chunk> {
    let mut chunks = Vec::new();
    for (lsn, text) in texts {
        let step = decoder.decode(Bytes::copy_from_slice(text.as_bytes()), Lsn(*lsn)).unwrap();
        let Step::Event(event) = step else { panic!("{text}: {step:?}") };
        match assembler.event(event).unwrap() {
            Some(Item::Chunk(chunk)) => chunks.push(chunk),
            Some(idle) => panic!("{idle:?}"),
            None => {}
        }
    }
    chunks
}

#[test]
fn a_transaction_is_placed_by_its_commit() {
    let (mut assembler, mut decoder) =
        (Assembler::new(Lsn(50)), knowing(ReplicaIdentity::Default, &["id k"]));
    let insert = (70, "table public.t: INSERT: id[integer]:1");
    let commit = |lsn| (lsn, "COMMIT 7 (at 2000-01-01 00:00:01+00)");
    let small = [(60, "BEGIN 7"), insert, commit(100)];
    let chunks = assemble(&mut assembler, &mut decoder, &small);
    let begin = &chunks[0].begin;
    assert_eq!((begin.xid, begin.commit_lsn, begin.commit_time.0), (7, Lsn(99), 1_000_000));
    assert_eq!(chunks[0].commit.unwrap().end_lsn, Lsn(100));
    // Begun before the other committed, and too large to wait for its own commit.
    let mut large = vec![(80, "BEGIN 7")];
    large.extend(std::iter::repeat_n(insert, CHUNK_CHANGES + 1));
    large.push(commit(200));
    let chunks = assemble(&mut assembler, &mut decoder, &large);
    assert_eq!(chunks.len(), 2);
    for chunk in &chunks {
        assert_eq!(chunk.begin.commit_lsn, Lsn(100), "not below what was seen, nor its commit");
    }
    assert_eq!(chunks[1].commit.unwrap().commit_lsn, Lsn(199));
    let mut again = vec![];
    for (lsn, text) in [(80, "BEGIN 7"), commit(200)] {
        let step = decoder.decode(Bytes::from(text), Lsn(lsn)).unwrap();
        let Step::Event(event) = step else { panic!() };
        again.push(assembler.event(event));
    }
    assert!(again[1].is_err(), "a commit that is not after the last one: {again:?}");
}
