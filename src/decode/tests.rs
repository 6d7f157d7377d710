//! Hand-made byte streams through decoder and assembler.

use std::sync::Arc;

use bytes::{BufMut, Bytes, BytesMut};
use proptest::prelude::*;

use super::{Assembler, Decoder, Error, Event};
use crate::change::{Change, Chunk, Ending, Item, OldRow, ReplicaIdentity, Value};
use crate::limit::{CHUNK_BYTES, CHUNK_CHANGES};
use crate::lsn::Lsn;

/// Writes messages the way the server does.
struct Wire(BytesMut);

fn wire(kind: u8) -> Wire {
    let mut bytes = BytesMut::new();
    bytes.put_u8(kind);
    Wire(bytes)
}

impl Wire {
    fn u8(mut self, value: u8) -> Self {
        self.0.put_u8(value);
        self
    }
    fn u16(mut self, value: u16) -> Self {
        self.0.put_u16(value);
        self
    }
    fn u32(mut self, value: u32) -> Self {
        self.0.put_u32(value);
        self
    }
    fn u64(mut self, value: u64) -> Self {
        self.0.put_u64(value);
        self
    }
    fn text(mut self, value: &str) -> Self {
        self.0.put_slice(value.as_bytes());
        self.0.put_u8(0);
        self
    }
    fn row(mut self, part: u8, values: &[Option<&str>]) -> Self {
        self.0.put_u8(part);
        self.0.put_u16(values.len() as u16);
        for value in values {
            match value {
                None => self.0.put_u8(b'n'),
                Some("<unchanged>") => self.0.put_u8(b'u'),
                Some(text) => {
                    self.0.put_u8(b't');
                    self.0.put_u32(text.len() as u32);
                    self.0.put_slice(text.as_bytes());
                }
            }
        }
        self
    }
    fn end(self) -> Bytes {
        self.0.freeze()
    }
}

fn begin(commit_lsn: u64, xid: u32) -> Bytes {
    wire(b'B').u64(commit_lsn).u64(77).u32(xid).end()
}

fn commit(commit_lsn: u64, end_lsn: u64) -> Bytes {
    wire(b'C').u8(0).u64(commit_lsn).u64(end_lsn).u64(77).end()
}

fn relation(xid: Option<u32>) -> Bytes {
    let message = match xid {
        Some(xid) => wire(b'R').u32(xid),
        None => wire(b'R'),
    };
    let message = message.u32(16385).text("public").text("t").u8(b'd').u16(2);
    message.u8(1).text("id").u32(23).u32(u32::MAX).u8(0).text("body").u32(25).u32(u32::MAX).end()
}

fn insert(id: &str) -> Bytes {
    wire(b'I').u32(16385).row(b'N', &[Some(id), None]).end()
}

/// One well-formed message of each kind that protocols 1 to 4 have, outside a streamed block.
fn every_kind() -> Vec<Bytes> {
    let prepared = |kind: u8, flagged: bool| {
        let message = if flagged { wire(kind).u8(0) } else { wire(kind) };
        message.u64(10).u64(20).u64(30).u32(7).text("gid").end()
    };
    vec![
        begin(100, 7),
        commit(100, 120),
        wire(b'O').u64(5).text("elsewhere").end(),
        relation(None),
        wire(b'Y').u32(99).text("public").text("mood").end(),
        insert("1"),
        wire(b'U').u32(16385).row(b'N', &[Some("1"), Some("<unchanged>")]).end(),
        wire(b'U').u32(16385).row(b'K', &[Some("1"), None]).row(b'N', &[Some("2"), None]).end(),
        wire(b'U').u32(16385).row(b'O', &[Some("1"), None]).row(b'N', &[Some("2"), None]).end(),
        wire(b'D').u32(16385).row(b'K', &[Some("1"), None]).end(),
        wire(b'D').u32(16385).row(b'O', &[Some("1"), Some("x")]).end(),
        wire(b'T').u32(1).u8(3).u32(16385).end(),
        wire(b'M').u8(1).u64(9).text("prefix").u32(2).u16(0x6869).end(),
        wire(b'S').u32(7).u8(1).end(),
        wire(b'E').end(),
        wire(b'c').u32(7).u8(0).u64(1).u64(2).u64(3).end(),
        wire(b'A').u32(7).u32(8).end(),
        wire(b'A').u32(7).u32(8).u64(1).u64(2).end(),
        prepared(b'b', false),
        prepared(b'P', true),
        prepared(b'K', true),
        wire(b'r').u8(0).u64(1).u64(2).u64(3).u64(4).u32(7).text("gid").end(),
        prepared(b'p', true),
    ]
}

fn knowing() -> Decoder {
    let mut decoder = Decoder::new();
    decoder.decode(relation(None), Lsn(1)).unwrap();
    decoder
}

fn change(event: Event) -> Change {
    match event {
        Event::Change { change, .. } => change,
        other => panic!("not a change: {other:?}"),
    }
}

fn run(assembler: &mut Assembler, decoder: &mut Decoder, messages: &[Bytes]) -> Vec<Item> {
    let mut items = Vec::new();
    for message in messages {
        let event = decoder.decode(message.clone(), Lsn(1)).unwrap();
        items.extend(assembler.event(event).unwrap());
    }
    items
}

fn chunk(item: &Item) -> &Chunk {
    match item {
        Item::Chunk(chunk) => chunk,
        other => panic!("not a chunk: {other:?}"),
    }
}

#[test]
fn every_message_of_protocols_1_to_4_is_decoded() {
    for message in every_kind() {
        let mut decoder = knowing();
        decoder.decode(message.clone(), Lsn(1)).unwrap_or_else(|e| panic!("{message:?}: {e}"));
    }
}

#[test]
fn messages_in_a_streamed_block_carry_their_transaction() {
    let mut decoder = Decoder::new();
    decoder.decode(wire(b'S').u32(7).u8(1).end(), Lsn(1)).unwrap();
    decoder.decode(relation(Some(8)), Lsn(1)).unwrap();
    let insert = wire(b'I').u32(8).u32(16385).row(b'N', &[Some("1"), None]).end();
    match decoder.decode(insert, Lsn(1)).unwrap() {
        Event::Change { xid, change: Change::Insert { .. } } => assert_eq!(xid, Some(8)),
        other => panic!("{other:?}"),
    }
    decoder.decode(wire(b'E').end(), Lsn(1)).unwrap();
    assert!(matches!(
        decoder.decode(self::insert("2"), Lsn(1)).unwrap(),
        Event::Change { xid: None, .. }
    ));
}

#[test]
fn updates_keep_the_kind_of_their_old_row_and_unchanged_values() {
    let mut decoder = knowing();
    let plain = wire(b'U').u32(16385).row(b'N', &[Some("1"), Some("<unchanged>")]).end();
    match change(decoder.decode(plain, Lsn(1)).unwrap()) {
        Change::Update { old: None, new, relation } => {
            assert_eq!(new.values().nth(1), Some(Value::Unchanged));
            assert_eq!(relation.identity, ReplicaIdentity::Default);
            assert_eq!(relation.key_columns().collect::<Vec<_>>(), [0]);
        }
        other => panic!("{other:?}"),
    }
    for (part, full) in [(b'K', false), (b'O', true)] {
        let old = [Some("1"), None];
        let bytes = wire(b'U').u32(16385).row(part, &old).row(b'N', &[Some("2"), None]).end();
        match change(decoder.decode(bytes, Lsn(1)).unwrap()) {
            Change::Update { old: Some(old), .. } => {
                assert_eq!(matches!(old, OldRow::Full(_)), full);
                assert_eq!(old.row().values().next(), Some(Value::Text(b"1")));
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn rows_are_slices_of_the_message() {
    let bytes = insert("a long enough value to be told from a copy");
    let within = bytes.as_ptr_range();
    match change(knowing().decode(bytes.clone(), Lsn(1)).unwrap()) {
        Change::Insert { new, .. } => {
            assert!(within.contains(&new.as_bytes().as_ptr()), "the row was copied");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_description_that_comes_again_keeps_its_arc_until_it_changes() {
    let mut decoder = knowing();
    let first = decoder.relation(16385).unwrap().clone();
    decoder.decode(relation(None), Lsn(1)).unwrap();
    assert!(Arc::ptr_eq(&first, decoder.relation(16385).unwrap()));
    let renamed = wire(b'R').u32(16385).text("public").text("t2").u8(b'f').u16(0).end();
    decoder.decode(renamed, Lsn(1)).unwrap();
    assert_eq!(decoder.relation(16385).unwrap().name.name, "t2");
    let in_catalog = wire(b'R').u32(5).text("").text("x").u8(b'n').u16(0).end();
    decoder.decode(in_catalog, Lsn(1)).unwrap();
    assert_eq!(decoder.relation(5).unwrap().name.schema, "pg_catalog");
}

#[test]
fn errors_name_what_is_wrong() {
    let lsn = Lsn(0x16B3748);
    let unknown = Decoder::new().decode(insert("1"), lsn).unwrap_err();
    assert_eq!(unknown, Error::UnknownRelation { message: 'I', lsn, oid: 16385 });
    assert!(unknown.to_string().contains("relation 16385"), "{unknown}");
    let wide = wire(b'I').u32(16385).row(b'N', &[None, None, None]).end();
    let error = knowing().decode(wide, lsn).unwrap_err();
    assert!(error.to_string().contains("public.t at 0/16B3748 has 3 columns"), "{error}");
    let mut long = BytesMut::from(&insert("1")[..]);
    long.put_u8(0);
    assert!(matches!(
        knowing().decode(long.freeze(), lsn),
        Err(Error::Trailing { message: 'I', bytes: 1, .. })
    ));
    let odd = wire(b'D').u32(16385).row(b'N', &[None, None]).end();
    assert!(matches!(knowing().decode(odd, lsn), Err(Error::Field { value: b'N', .. })));
    let kind = wire(b'?').end();
    assert_eq!(knowing().decode(kind, lsn), Err(Error::UnknownMessage { kind: b'?', lsn }));
    let letter = wire(b'R').u32(1).text("a").text("b").u8(b'x').u16(0).end();
    assert!(matches!(knowing().decode(letter, lsn), Err(Error::Field { value: b'x', .. })));
    let name = wire(b'Y').u32(1).u8(0xff).u8(0).text("b").end();
    assert!(matches!(knowing().decode(name, lsn), Err(Error::NotUtf8 { message: 'Y', .. })));
}

#[test]
fn every_message_cut_at_every_byte_is_an_error() {
    for message in every_kind() {
        for len in 1..message.len() {
            let cut = message.slice(..len);
            let outcome = knowing().decode(cut, Lsn(1));
            // A Stream Abort may lawfully lack its last two fields.
            if message[0] == b'A' && len == 9 {
                continue;
            }
            assert!(outcome.is_err(), "{message:?} cut at {len}: {outcome:?}");
        }
    }
}

#[test]
fn a_message_cut_short_leaves_no_relation_behind() {
    let mut decoder = Decoder::new();
    let mut long = BytesMut::from(&relation(None)[..]);
    long.put_u8(1);
    decoder.decode(long.freeze(), Lsn(1)).unwrap_err();
    assert!(decoder.relation(16385).is_none());
}

proptest! {
    #[test]
    fn any_bytes_give_an_event_or_an_error(data in proptest::collection::vec(any::<u8>(), 0..300)) {
        let mut decoder = knowing();
        let mut assembler = Assembler::new(Lsn(0));
        if let Ok(event) = decoder.decode(Bytes::from(data), Lsn(1)) {
            let _ = assembler.event(event);
        }
    }

    #[test]
    fn a_stream_with_any_byte_changed_gives_events_or_errors(
        at in 0usize..100, to in any::<u8>(), which in 0usize..23, streaming in any::<bool>()
    ) {
        let mut decoder = knowing();
        let mut assembler = Assembler::new(Lsn(0));
        if streaming {
            decoder.decode(wire(b'S').u32(7).u8(1).end(), Lsn(1)).unwrap();
        }
        for (index, message) in every_kind().into_iter().enumerate() {
            let mut bytes = BytesMut::from(&message[..]);
            let at = at % bytes.len();
            if index == which {
                bytes[at] = to;
            }
            if let Ok(event) = decoder.decode(bytes.freeze(), Lsn(1)) {
                let _ = assembler.event(event);
            }
        }
    }
}

#[test]
fn mutated_messages_give_an_event_or_an_error() {
    let seeds = every_kind();
    let seeds: Vec<&[u8]> = seeds.iter().map(|seed| &seed[..]).collect();
    super::mutate::each(&seeds, |data| {
        let mut assembler = Assembler::new(Lsn(0));
        if let Ok(event) = knowing().decode(Bytes::copy_from_slice(data), Lsn(1)) {
            let _ = assembler.event(event);
        }
    });
}

#[test]
fn a_small_transaction_is_one_chunk_with_its_origin() {
    let (mut assembler, mut decoder) = (Assembler::new(Lsn(50)), Decoder::new());
    let origin = wire(b'O').u64(5).text("walferry_shop_reverse").end();
    let messages =
        [begin(100, 7), origin, relation(None), insert("1"), insert("2"), commit(100, 120)];
    let items = run(&mut assembler, &mut decoder, &messages);
    assert_eq!(items.len(), 1);
    let chunk = chunk(&items[0]);
    assert_eq!(chunk.begin.origin.as_deref(), Some("walferry_shop_reverse"));
    assert_eq!((chunk.begin.xid, chunk.begin.commit_lsn, chunk.number), (7, Lsn(100), 0));
    assert_eq!(chunk.changes.len(), 2);
    assert_eq!(chunk.bytes, chunk.changes.iter().map(Change::bytes).sum::<usize>());
    assert_eq!(items[0].end_lsn(), Some(Lsn(120)));
    assert_eq!(assembler.decoded_lsn(), Lsn(120));
}

#[test]
fn an_origin_whose_name_is_lost_is_still_an_origin() {
    let (mut assembler, mut decoder) = (Assembler::new(Lsn(0)), knowing());
    let messages = [begin(100, 7), Bytes::new(), insert("1"), commit(100, 120)];
    let items = run(&mut assembler, &mut decoder, &messages);
    assert_eq!(chunk(&items[0]).begin.origin.as_deref(), Some(""));
    assert_eq!(decoder.decode(Bytes::new(), Lsn(1)).unwrap(), Event::UnknownOrigin);
}

#[test]
fn an_empty_transaction_still_moves_the_position() {
    let (mut assembler, mut decoder) = (Assembler::new(Lsn(0)), Decoder::new());
    let items = run(&mut assembler, &mut decoder, &[begin(100, 7), commit(100, 120)]);
    assert_eq!(items[0].end_lsn(), Some(Lsn(120)));
    assert!(chunk(&items[0]).changes.is_empty());
}

#[test]
fn a_large_transaction_passes_in_numbered_chunks_sharing_one_begin() {
    let (mut assembler, mut decoder) = (Assembler::new(Lsn(0)), knowing());
    let mut messages = vec![begin(100, 7)];
    messages.extend(std::iter::repeat_n(insert("1"), CHUNK_CHANGES * 2 + 5));
    messages.push(commit(100, 120));
    let items = run(&mut assembler, &mut decoder, &messages);
    assert_eq!(items.len(), 3);
    let sizes: Vec<_> = items.iter().map(|i| chunk(i).changes.len()).collect();
    assert_eq!(sizes, [CHUNK_CHANGES, CHUNK_CHANGES, 5]);
    for (number, item) in items.iter().enumerate() {
        assert_eq!(chunk(item).number as usize, number);
        assert!(Arc::ptr_eq(&chunk(item).begin, &chunk(&items[0]).begin));
        assert_eq!(item.end_lsn().is_some(), number == 2);
    }
}

#[test]
fn chunks_are_bounded_in_bytes_by_one_change_more() {
    let (mut assembler, mut decoder) = (Assembler::new(Lsn(0)), knowing());
    let value = "x".repeat(CHUNK_BYTES / 3);
    let mut messages = vec![begin(100, 7)];
    messages.extend(std::iter::repeat_n(insert(&value), 10));
    let items = run(&mut assembler, &mut decoder, &messages);
    assert_eq!(items.len(), 3);
    let most = items.iter().map(|i| chunk(i).bytes).max().unwrap();
    assert!(most < CHUNK_BYTES + value.len() + 1000, "{most}");
}

#[test]
fn pgcopydb_1033_a_keepalive_inside_a_transaction_gives_no_position() {
    let (mut assembler, mut decoder) = (Assembler::new(Lsn(0)), knowing());
    run(&mut assembler, &mut decoder, &[begin(100, 7), insert("1")]);
    assert_eq!(assembler.keepalive(Lsn(500)), None);
    assert_eq!(assembler.decoded_lsn(), Lsn(0));
    run(&mut assembler, &mut decoder, &[commit(100, 120)]);
    assert_eq!(assembler.keepalive(Lsn(120)), None, "nothing new");
    assert_eq!(assembler.keepalive(Lsn(500)), Some(Item::Idle { lsn: Lsn(500) }));
    assert_eq!(assembler.keepalive(Lsn(500)), None, "once");
}

#[test]
fn a_message_outside_a_transaction_is_one_of_its_own() {
    let (mut assembler, mut decoder) = (Assembler::new(Lsn(0)), knowing());
    let lone = wire(b'M').u8(0).u64(300).text("p").u32(0).end();
    let items = run(&mut assembler, &mut decoder, std::slice::from_ref(&lone));
    assert_eq!(items[0].end_lsn(), Some(Lsn(300)));
    assert_eq!(chunk(&items[0]).begin.commit_lsn, Lsn(299), "before a commit that starts at 300");
    assert_eq!(chunk(&items[0]).begin.xid, 0);
    assert!(run(&mut assembler, &mut decoder, &[lone]).is_empty(), "not twice");
    let stray = wire(b'M').u8(1).u64(400).text("p").u32(0).end();
    let event = decoder.decode(stray, Lsn(1)).unwrap();
    assert!(matches!(assembler.event(event), Err(Error::OutOfPlace { .. })));
}

#[test]
fn events_out_of_place_are_refused() {
    let refused = |before: &[Bytes], last: Bytes| {
        let (mut assembler, mut decoder) = (Assembler::new(Lsn(110)), knowing());
        run(&mut assembler, &mut decoder, before);
        let event = decoder.decode(last, Lsn(1)).unwrap();
        assembler.event(event).unwrap_err()
    };
    let origin = wire(b'O').u64(5).text("o").end();
    let out_of_place = |error: Error| assert!(matches!(error, Error::OutOfPlace { .. }), "{error}");
    out_of_place(refused(&[], insert("1")));
    out_of_place(refused(&[], commit(200, 220)));
    out_of_place(refused(&[], origin.clone()));
    out_of_place(refused(&[begin(200, 7)], begin(200, 7)));
    out_of_place(refused(&[begin(200, 7), insert("1")], origin));
    assert!(matches!(refused(&[begin(200, 7)], commit(201, 220)), Error::WrongCommit { .. }));
    assert!(matches!(refused(&[begin(100, 7)], commit(100, 110)), Error::Disorder { .. }));
    let streamed = refused(&[], wire(b'S').u32(7).u8(1).end());
    assert_eq!(streamed, Error::NotAskedFor { event: "Stream Start" });
    let prepared = wire(b'P').u8(0).u64(10).u64(20).u64(30).u32(7).text("gid").end();
    let refused = refused(&[], prepared);
    assert!(matches!(refused, Error::OutOfPlace { event: "COMMIT", .. }), "{refused}");
}

fn prepared(kind: u8, lsn: u64) -> Bytes {
    let message = wire(kind);
    let message = if kind == b'b' { message } else { message.u8(0) };
    message.u64(lsn).u64(lsn + 10).u64(0).u32(7).text("gid").end()
}

#[test]
fn a_prepared_transaction_is_its_changes_and_later_what_became_of_it() {
    let (mut assembler, mut decoder) = (Assembler::new(Lsn(110)), knowing());
    let rolled_back = wire(b'r').u8(0).u64(310).u64(420).u64(0).u64(0).u32(7).text("gid").end();
    let messages = [
        [prepared(b'b', 200), insert("1"), prepared(b'P', 200), prepared(b'K', 250)],
        [prepared(b'b', 300), insert("2"), prepared(b'P', 300), rolled_back],
    ];
    let items = run(&mut assembler, &mut decoder, &messages.concat());
    let told: Vec<_> = items
        .iter()
        .map(chunk)
        .map(|c| (c.begin.ending.clone(), c.changes.len(), c.commit.unwrap().end_lsn.0))
        .collect();
    let gid = || "gid".to_string();
    let expected = [
        (Ending::Prepare(gid()), 1, 210),
        (Ending::CommitPrepared(gid()), 0, 260),
        (Ending::Prepare(gid()), 1, 310),
        (Ending::RollbackPrepared(gid()), 0, 420),
    ];
    assert_eq!(told, expected);
}

#[test]
fn what_was_prepared_before_the_stream_began_is_a_transaction_like_any() {
    let (mut assembler, mut decoder) = (Assembler::new(Lsn(210)), knowing());
    let messages = [prepared(b'b', 200), insert("1"), prepared(b'P', 200), prepared(b'K', 250)];
    let items = run(&mut assembler, &mut decoder, &messages);
    let [item] = &*items else { panic!("{items:?}") };
    let chunk = chunk(item);
    assert_eq!((&chunk.begin.ending, chunk.changes.len()), (&Ending::Commit, 1));
    assert_eq!((chunk.begin.commit_lsn, item.end_lsn()), (Lsn(250), Some(Lsn(260))));
    assert_eq!(assembler.decoded_lsn(), Lsn(260));
}
