//! Rows printed and read back, and bytes that are no messages.

use bytes::Bytes;
use proptest::prelude::*;

use super::tests::{PLAIN, RECORDED, change, described, knowing};
use super::*;
use crate::change::{Change, OldRow, ReplicaIdentity, Value};

/// How `quote_identifier()` prints, or would if the name were a keyword.
fn printed(name: &str, keyword: bool) -> String {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
    match name.chars().all(plain) && !name.starts_with(|c: char| c.is_ascii_digit()) && !keyword {
        true => name.to_string(),
        false => format!("\"{}\"", name.replace('"', "\"\"")),
    }
}

/// A value: how it is printed, and what it is.
fn value() -> impl Strategy<Value = (String, Option<String>)> {
    let quoted = |text: String| (format!("'{}'", text.replace('\'', "''")), Some(text));
    prop_oneof![
        Just(("null".to_string(), None)),
        Just(("unchanged-toast-datum".to_string(), Some("~".to_string()))),
        any::<bool>().prop_map(|b| (b.to_string(), Some(if b { "t" } else { "f" }.to_string()))),
        "[01]{0,9}".prop_map(|bits| (format!("B'{bits}'"), Some(bits))),
        any::<f64>().prop_map(|number| (number.to_string(), Some(number.to_string()))),
        "[^\0]{0,20}".prop_map(quoted),
        "[' \\[\\]:\"a\\\\\n]{0,12}".prop_map(quoted),
        "( new-tuple:| a\\[text\\]:'x'| old-key:|, ){1,3}".prop_map(quoted),
    ]
}

fn column() -> impl Strategy<Value = (String, bool, String, (String, Option<String>))> {
    let name = prop_oneof!["[^\0]{1,12}", "[a-z_][a-z0-9_]{0,9}", "[\"\\[\\]:. ]{1,6}"];
    let types = prop_oneof![
        "(character varying|timestamp\\(3\\) without time zone|bit)(\\[\\])?",
        "[^\0\"]{1,8}".prop_map(|name| format!("public.\"{name}\"")),
        "(\"\"|[\\[\\]: a]){1,6}".prop_map(|name| format!("\"{name}\"[]")),
    ];
    (name, any::<bool>(), types, value())
}

proptest! {
    #[test]
    fn rows_come_back_as_they_were_printed(
        table in "[^\0]{1,12}",
        columns in proptest::collection::vec(column(), 0..9),
        keyed in 0_usize..9,
    ) {
        let mut columns = columns;
        columns.sort_by(|a, b| a.0.cmp(&b.0));
        columns.dedup_by(|a, b| a.0 == b.0);
        let key = |index: usize, value: &Option<String>| {
            index == keyed && value.as_deref().is_some_and(|v| v != "~")
        };
        let names: Vec<String> = columns.iter().enumerate()
            .map(|(i, c)| format!("{}{}", c.0, if key(i, &c.3.1) { " k" } else { " -" }))
            .collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let mut decoder = Decoder::new();
        decoder.describe(described(&table, ReplicaIdentity::Default, &names));
        let one = |c: &(String, bool, String, (String, Option<String>))| {
            format!(" {}[{}]:{}", printed(&c.0, c.1), c.2, c.3.0)
        };
        let row: String = columns.iter().map(one).collect();
        let expected: Vec<Value<'_>> = columns.iter().map(|c| match c.3.1.as_deref() {
            None => Value::Null,
            Some("~") if c.3.0 != "'~'" => Value::Unchanged,
            Some(text) => Value::Text(text.as_bytes()),
        }).collect();
        let name = printed(&table, false);
        for _ in 0..2 {
            let text = format!("table public.{name}: INSERT:{row}");
            let Change::Insert { new, .. } = change(&mut decoder, &text) else { panic!() };
            prop_assert_eq!(new.values().collect::<Vec<_>>(), expected.clone());
        }
        let Some((index, found)) = columns.iter().enumerate().find(|(i, c)| key(*i, &c.3.1)) else {
            return Ok(());
        };
        let text = format!("table public.{name}: UPDATE: old-key:{} new-tuple:{row}", one(found));
        let Change::Update { old: Some(OldRow::Key(old)), new, .. } = change(&mut decoder, &text)
        else { panic!() };
        prop_assert_eq!(new.values().collect::<Vec<_>>(), expected.clone());
        for (at, value) in old.values().enumerate() {
            prop_assert_eq!(value, if at == index { expected[at] } else { Value::Null });
        }
    }

    #[test]
    fn any_bytes_give_a_step_or_an_error(
        data in proptest::collection::vec(any::<u8>(), 0..200), start in 0_usize..14
    ) {
        let starts = RECORDED.map(|(text, _)| text);
        let start = starts.get(start).map_or("", |text| &text[..text.len() / 2]);
        let mut decoder = knowing(ReplicaIdentity::Default, &PLAIN);
        let _ = decoder.decode(Bytes::from([start.as_bytes(), &data].concat()), Lsn(1));
    }
}

#[test]
fn every_message_cut_at_every_byte_is_an_error_or_another_row() {
    for (text, _) in RECORDED {
        for len in 0..text.len() {
            let mut decoder = knowing(ReplicaIdentity::Default, &PLAIN);
            let cut = Bytes::copy_from_slice(&text.as_bytes()[..len]);
            // A bare value cut short is a value; a row cut between columns is one of an older
            // table. Messages come whole: their length is not in the text.
            if let Ok(Step::Event(event)) = decoder.decode(cut, Lsn(1)) {
                let last = text.as_bytes()[len];
                let bare = text[..len].rsplit(':').next().unwrap_or("");
                let between = last == b' ';
                assert!(between || !bare.contains(' ') || bare.contains('\''), "{event:?}");
            }
        }
    }
    for text in ["BEGIN 7", "COMMIT 7 (at 2026-11-21 04:19:19.5+00)"] {
        for len in 0..text.len() {
            let cut = Bytes::copy_from_slice(&text.as_bytes()[..len]);
            assert!(Decoder::new().decode(cut, Lsn(1)).is_err(), "{text} cut at {len}");
        }
    }
}

#[test]
fn mutated_messages_give_a_step_or_an_error() {
    let others = [
        "BEGIN 7",
        "COMMIT 7 (at 2026-11-21 04:19:19.5+00)",
        "table public.t, \"a\".\"\"\"\": TRUNCATE: restart_seqs cascade",
        "message: transactional: 1 prefix: p, sz: 2 content:hi",
    ];
    let recorded = RECORDED.iter().map(|(text, _)| *text);
    let seeds: Vec<&[u8]> = recorded.chain(others).map(str::as_bytes).collect();
    let mut assembler = crate::decode::Assembler::new(Lsn(0));
    let (mut decoder, mut turn) = (Decoder::new(), 0);
    crate::decode::mutate::each(&seeds, |data| {
        // What is known of tables is kept on purpose, and is not a message's.
        turn += 1;
        if turn % 200 == 0 {
            (decoder, assembler) = Default::default();
        }
        let data = Bytes::copy_from_slice(data);
        // As a reader does: what is asked for is described, and the message given again.
        for _ in 0..50 {
            match decoder.decode(data.clone(), Lsn(1)) {
                Ok(Step::Event(event)) => drop(assembler.event(event)),
                Ok(Step::Describe(name)) => {
                    let table = described("t", ReplicaIdentity::Default, &PLAIN);
                    decoder.describe(Described { name, ..table });
                    continue;
                }
                Ok(_) | Err(_) => {}
            }
            return;
        }
        panic!("asks for ever: {data:?}");
    });
}
