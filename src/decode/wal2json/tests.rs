//! Recorded and made-up messages, whole, cut and spoilt.

use bytes::Bytes;
use proptest::prelude::*;

use super::{Decoder, Numbers, Plugin, options};
use crate::change::{Change, OldRow, ReplicaIdentity, Row, Value};
use crate::clock::PgTimestamp;
use crate::decode::{Described, DescribedColumn, Error, Event, Step};
use crate::id::QualifiedName;
use crate::lsn::Lsn;

const BEGIN: &str = concat!(
    r#"{"action":"B","xid":731,"timestamp":"2026-11-21 04:18:20.123456+00","origin":0,"#,
    r#""lsn":"0/1A0","nextlsn":"0/1D0"}"#,
);
const COMMIT: &str = concat!(
    r#"{"action":"C","xid":731,"timestamp":"2026-11-21 04:18:20.123456+00","origin":0,"#,
    r#""lsn":"0/1A0","nextlsn":"0/1D0"}"#,
);
const INSERT: &str = concat!(
    r#"{"action":"I","xid":731,"timestamp":"2026-11-21 04:18:20.123456+00","origin":0,"#,
    r#""lsn":"0/190","schema":"public","table":"t","columns":[{"name":"id","typeoid":23,"#,
    r#""value":1},{"name":"b","typeoid":17,"value":"00ff"},{"name":"ok","typeoid":16,"#,
    r#""value":true},{"name":"n","typeoid":1700,"value":"NaN"},{"name":"v","typeoid":25,"#,
    r#""value":"a\"\u0001\n"}]}"#,
);
const UPDATE: &str = concat!(
    r#"{"action":"U","schema":"public","table":"t","columns":[{"name":"id","typeoid":23,"#,
    r#""value":2},{"name":"ok","typeoid":16,"value":null},{"name":"n","typeoid":1700,"#,
    r#""value":null},{"name":"v","typeoid":25,"value":""}],"identity":[{"name":"id","#,
    r#""typeoid":23,"value":1}],"pk":[{"name":"id","type":"integer"}]}"#,
);
const DELETE: &str = concat!(
    r#"{"action":"D","schema":"public","table":"t","identity":[{"name":"id","typeoid":23,"#,
    r#""value":1}]}"#,
);
const TRUNCATE: &str = r#"{"action":"T","xid":731,"lsn":"0/180","schema":"public","table":"t"}"#;
const MESSAGE: &str = concat!(
    r#"{"action":"M","xid":null,"timestamp":null,"origin":null,"lsn":"0/1C0","#,
    r#""transactional":false,"prefix":"p","content":"a\"b"}"#,
);
const EVERY: [&str; 7] = [BEGIN, COMMIT, INSERT, UPDATE, DELETE, TRUNCATE, MESSAGE];

fn table() -> Described {
    let column = |name: &str, type_oid: u32| DescribedColumn {
        name: name.to_string(),
        type_oid,
        type_modifier: -1,
        type_name: String::new(),
        key: name == "id",
        not_null: false,
        generated: false,
    };
    let columns =
        [("id", 23), ("b", 17), ("ok", 16), ("n", 1700), ("v", 25)].map(|(n, t)| column(n, t));
    let name = QualifiedName::new("public", "t");
    Described { oid: 7, name, identity: ReplicaIdentity::Default, columns: columns.into() }
}

fn knowing(numbers: Numbers) -> Decoder {
    let mut decoder = Decoder::new(numbers);
    decoder.describe(table());
    decoder
}

fn step(decoder: &mut Decoder, message: &str) -> Step {
    let bytes = Bytes::copy_from_slice(message.as_bytes());
    decoder.decode(bytes, Lsn(0x1D0)).unwrap_or_else(|e| panic!("{e}: {message}"))
}

fn refused(decoder: &mut Decoder, message: &str) -> Error {
    let bytes = Bytes::copy_from_slice(message.as_bytes());
    decoder.decode(bytes, Lsn(1)).expect_err(message)
}

fn change(step: Step) -> Change {
    match step {
        Step::Event(Event::Change { change, .. }) | Step::Before(Event::Change { change, .. }) => {
            change
        }
        other => panic!("not a change: {other:?}"),
    }
}

fn show(row: &Row) -> Vec<String> {
    let text = |value: Value<'_>| match value {
        Value::Null => "NULL".to_string(),
        Value::Unchanged => "unchanged".to_string(),
        other => String::from_utf8(other.bytes().unwrap().to_vec()).unwrap(),
    };
    row.values().map(text).collect()
}

#[test]
fn a_transaction_of_format_2_is_told_as_pgoutput_tells_it() {
    let mut decoder = knowing(Numbers::Text);
    let Step::Event(Event::Begin(begin)) = step(&mut decoder, BEGIN) else { panic!() };
    let time = PgTimestamp::from_iso("2026-11-21 04:18:20.123456+00").unwrap();
    assert_eq!((begin.xid, begin.commit_lsn, begin.commit_time), (731, Lsn(0x1A0), time));
    assert_eq!(begin.origin, None);
    let Change::Insert { new, .. } = change(step(&mut decoder, INSERT)) else { panic!() };
    assert_eq!(show(&new), ["1", "\\x00ff", "t", "NaN", "a\"\u{1}\n"]);
    let Change::Update { old, new, .. } = change(step(&mut decoder, UPDATE)) else { panic!() };
    assert_eq!(show(&new), ["2", "unchanged", "NULL", "NULL", ""]);
    assert_eq!(show(old.unwrap().row()), ["1", "NULL", "NULL", "NULL", "NULL"]);
    let same_key = UPDATE.replace("\"value\":2", "\"value\":1");
    let Change::Update { old, .. } = change(step(&mut decoder, &same_key)) else { panic!() };
    assert_eq!(old, None, "the key did not change");
    let Change::Delete { old: OldRow::Key(old), .. } = change(step(&mut decoder, DELETE)) else {
        panic!()
    };
    assert_eq!(show(&old)[0], "1");
    let Step::Event(Event::Commit(commit)) = step(&mut decoder, COMMIT) else { panic!() };
    assert_eq!((commit.commit_lsn, commit.end_lsn), (Lsn(0x1A0), Lsn(0x1D0)));
    // Before 2.3 the end is told by the transport only.
    let old = COMMIT.replace(",\"nextlsn\":\"0/1D0\"", "");
    assert_eq!(step(&mut decoder, &old), Step::Event(Event::Commit(commit)));
}

/// The one is written as the digits of the other.
#[test]
fn a_column_without_the_number_of_its_type_is_refused_and_never_guessed() {
    for message in [INSERT, UPDATE, DELETE] {
        for oid in [23, 17, 16, 1700, 25] {
            let older = message.replace(&format!("\"typeoid\":{oid},"), "");
            let mut decoder = knowing(Numbers::Plain);
            if older == message {
                continue;
            }
            let error = refused(&mut decoder, &older);
            assert!(matches!(error, Error::NoTypes { .. }), "{error}: {older}");
            let text = error.to_string();
            for told in ["public.t", "2.5", "--decoder test_decoding"] {
                assert!(text.contains(told), "{told}: {text}");
            }
            // Of a table that takes no part it may tell what it likes.
            decoder.ignore(&QualifiedName::new("public", "t"));
            assert_eq!(step(&mut decoder, &older), Step::Nothing);
        }
    }
}

#[test]
fn wal2json_46_format_1_is_not_read() {
    let head = r#"{"xid":731,"nextlsn":"0/1D0","timestamp":"2026-11-21 04:18:20+00","change":["#;
    for message in [head, r#",{"kind":"insert","schema":"public","table":"t"}"#, "]}", "{}", ""] {
        let error = refused(&mut knowing(Numbers::Text), message).to_string();
        assert!(error.contains("a message of format 2"), "{error}");
    }
}

#[test]
fn the_number_of_an_origin_is_another_s_once_origins_were_made_or_dropped() {
    let mut decoder = knowing(Numbers::Text);
    let begin = BEGIN.replace("\"origin\":0", "\"origin\":3");
    let origin = |decoder: &mut Decoder| match step(decoder, &begin) {
        Step::Event(Event::Begin(begin)) => begin.origin,
        other => panic!("{other:?}"),
    };
    assert_eq!(origin(&mut decoder).as_deref(), Some(""));
    decoder.name_origin(3, "elsewhere");
    assert_eq!(origin(&mut decoder).as_deref(), Some("elsewhere"));
    step(&mut decoder, INSERT);
    step(&mut decoder, COMMIT);
    assert_eq!(origin(&mut decoder).as_deref(), Some("elsewhere"));
    step(&mut decoder, COMMIT);
    assert_eq!(origin(&mut decoder).as_deref(), Some(""), "to be asked for again");
}

#[test]
fn tables_of_one_truncate_are_emptied_together() {
    let mut decoder = knowing(Numbers::Text);
    let mut second = table();
    second.name = QualifiedName::new("public", "u");
    decoder.describe(second);
    assert_eq!(step(&mut decoder, TRUNCATE), Step::Nothing);
    assert_eq!(step(&mut decoder, &TRUNCATE.replace("\"t\"", "\"u\"")), Step::Nothing);
    let next = TRUNCATE.replace("0/180", "0/188");
    let tables = |step: Step| match change(step) {
        Change::Truncate { relations, .. } => {
            relations.iter().map(|r| r.name.name.clone()).collect::<Vec<_>>()
        }
        other => panic!("{other:?}"),
    };
    assert_eq!(tables(step(&mut decoder, &next)), ["t", "u"]);
    assert_eq!(step(&mut decoder, &next), Step::Nothing);
    let before = step(&mut decoder, COMMIT);
    assert!(matches!(before, Step::Before(_)));
    assert_eq!(tables(before), ["t"]);
    assert!(matches!(step(&mut decoder, COMMIT), Step::Event(Event::Commit(_))));
}

#[test]
fn unknown_tables_are_asked_for_and_ignored_ones_passed_over() {
    let mut decoder = Decoder::new(Numbers::Text);
    let name = QualifiedName::new("public", "t");
    for message in [INSERT, UPDATE, DELETE, TRUNCATE] {
        assert_eq!(step(&mut decoder, message), Step::Describe(name.clone()), "{message}");
    }
    let odd = INSERT.replace("\"table\":\"t\"", r#""table":"a\"\\b\u00e9""#);
    assert_eq!(step(&mut decoder, &odd), Step::Describe(QualifiedName::new("public", "a\"\\bé")));
    decoder.ignore(&name);
    for message in [INSERT, UPDATE, DELETE, TRUNCATE] {
        assert_eq!(step(&mut decoder, message), Step::Nothing, "{message}");
    }
    // What was ignored may be described later, and the other way round.
    decoder.describe(table());
    change(step(&mut decoder, INSERT));
}

#[test]
fn a_description_that_comes_again_keeps_its_arc() {
    let mut decoder = knowing(Numbers::Text);
    let relation = |decoder: &mut Decoder| match change(step(decoder, INSERT)) {
        Change::Insert { relation, .. } => relation,
        other => panic!("{other:?}"),
    };
    let first = relation(&mut decoder);
    decoder.describe(table());
    assert!(std::sync::Arc::ptr_eq(&first, &relation(&mut decoder)));
}

#[test]
fn a_message_that_does_not_fit_asks_once_and_is_then_believed() {
    let mut decoder = knowing(Numbers::Text);
    change(step(&mut decoder, INSERT));
    let other = INSERT.replace("\"typeoid\":25", "\"typeoid\":1043").replace("\"b\"", "\"was\"");
    let name = QualifiedName::new("public", "t");
    assert_eq!(step(&mut decoder, &other), Step::Describe(name.clone()));
    decoder.describe(table());
    let Change::Insert { relation, .. } = change(step(&mut decoder, &other)) else { panic!() };
    let told: Vec<_> = relation.columns.iter().map(|c| (c.name.as_str(), c.type_oid)).collect();
    assert_eq!(told, [("id", 23), ("was", 17), ("ok", 16), ("n", 1700), ("v", 1043)]);
    assert_eq!(relation.key_columns().collect::<Vec<_>>(), [0]);
    // The next of that time fits; the first of the time after asks again.
    change(step(&mut decoder, &other));
    assert_eq!(step(&mut decoder, INSERT), Step::Describe(name));
    let twice = INSERT.replace("\"ok\"", "\"id\"");
    decoder.describe(table());
    assert!(matches!(refused(&mut decoder, &twice), Error::Unfitting { .. }));
}

#[test]
fn pgstream_1090_bytea_is_bytea_and_not_its_digits() {
    let mut decoder = knowing(Numbers::Text);
    let Change::Insert { new, .. } = change(step(&mut decoder, INSERT)) else { panic!() };
    assert_eq!(new.values().nth(1), Some(Value::Text(b"\\x00ff")));
    let empty = INSERT.replace("00ff", "");
    let Change::Insert { new, .. } = change(step(&mut decoder, &empty)) else { panic!() };
    assert_eq!(new.values().nth(1), Some(Value::Text(b"\\x")));
}

#[test]
fn etl_849_a_bytea_that_is_not_hexadecimal_is_an_error() {
    for odd in ["0", "0g", "é", "\\\\000"] {
        let message = INSERT.replace("00ff", odd);
        let error = refused(&mut knowing(Numbers::Text), &message);
        assert!(error.to_string().contains("bytea_output"), "{odd}: {error}");
    }
}

#[test]
fn pgcopydb_979_quotes_in_text_survive() {
    let message = INSERT.replace(r#""a\"\u0001\n""#, r#""\"'\\\"\\'\"""#);
    let Change::Insert { new, .. } = change(step(&mut knowing(Numbers::Text), &message)) else {
        panic!()
    };
    assert_eq!(new.values().last(), Some(Value::Text(br#""'\"\'""#)));
}

#[test]
fn a_number_keeps_a_thousand_digits() {
    let digits = format!("-{}.{}", "9".repeat(1000), "10".repeat(500));
    let message = INSERT.replace("\"NaN\"", &digits);
    let Change::Insert { new, .. } = change(step(&mut knowing(Numbers::Text), &message)) else {
        panic!()
    };
    assert_eq!(show(&new)[3], digits);
}

#[test]
fn wal2json_183_no_plugin_is_asked_for_a_whole_transaction_in_one_message() {
    for plugin in [Plugin::V2_3, Plugin::V2_6] {
        let options = options(plugin, &[3, 4]);
        let has = |name: &str, value: &str| options.contains(&(name, value.to_string()));
        assert!(has("format-version", "2") && has("filter-origins", "3,4"), "{plugin:?}");
        assert!(!options.iter().any(|(name, _)| *name == "add-tables"), "wal2json#146");
    }
    let refused = |plugin: Plugin, option: &str| {
        plugin.refused(&format!("127.0.0.1/d: option \"{option}\" = \"1\" is unknown"))
    };
    assert_eq!(refused(Plugin::V2_6, "numeric-data-types-as-string"), Some(Plugin::V2_3));
    assert_eq!(refused(Plugin::V2_3, "filter-origins"), Some(Plugin::Older));
    assert_eq!(refused(Plugin::V2_6, "format-version"), Some(Plugin::Older));
    assert_eq!(refused(Plugin::V2_3, "include-default"), Some(Plugin::Older));
    assert_eq!(refused(Plugin::Older, "include-origin"), None, "known already");
    assert_eq!(Plugin::V2_3.refused("slot \"option\" does not exist"), None);
}

#[test]
fn every_message_cut_at_every_byte_is_an_error() {
    for message in EVERY {
        for len in 0..message.len() {
            let mut decoder = knowing(Numbers::Text);
            let error = refused(&mut decoder, &message[..len]);
            assert!(matches!(error, Error::Json { .. }), "{error}");
        }
        let longer = format!("{message}x");
        refused(&mut knowing(Numbers::Text), &longer);
    }
}

#[test]
fn a_message_that_is_cut_or_spoilt_leaves_the_next_one_whole() {
    let mut decoder = knowing(Numbers::Text);
    refused(&mut decoder, &INSERT[..INSERT.len() - 40]);
    let Change::Insert { new, .. } = change(step(&mut decoder, INSERT)) else { panic!() };
    assert_eq!(show(&new).len(), 5);
}

#[test]
fn deep_and_endless_messages_are_refused() {
    let deep = format!("{{\"action\":\"I\",\"x\":{}", "[{\"a\":".repeat(200_000));
    refused(&mut knowing(Numbers::Text), &deep);
    let column = r#"{"name":"id","typeoid":23,"value":1},"#;
    let many = column.repeat(200_000);
    let many = format!(
        r#"{{"action":"I","schema":"public","table":"t","columns":[{}]}}"#,
        many.trim_end_matches(',')
    );
    let mut decoder = knowing(Numbers::Text);
    change(step(&mut decoder, INSERT));
    assert!(matches!(step(&mut decoder, &many), Step::Describe(_)));
    decoder.describe(table());
    assert!(matches!(refused(&mut decoder, &many), Error::Unfitting { .. }));
}

proptest! {
    #[test]
    fn any_bytes_give_a_step_or_an_error(data in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = knowing(Numbers::Ambiguous).decode(Bytes::from(data), Lsn(1));
    }
}

/// Messages with bytes changed, cut, repeated and swapped: none may panic or hang. A million of
/// them under `make fuzz`; `WALFERRY_SEED` repeats a run.
#[test]
fn mutated_messages_give_a_step_or_an_error() {
    super::super::mutate::each(&EVERY.map(str::as_bytes), |data| {
        let mut decoder = knowing(Numbers::Plain);
        decoder.ignore(&QualifiedName::new("public", "u"));
        let data = Bytes::copy_from_slice(data);
        if let Ok(Step::Describe(_)) = decoder.decode(data.clone(), Lsn(1)) {
            decoder.describe(table());
            let _ = decoder.decode(data, Lsn(1));
        }
    });
}
