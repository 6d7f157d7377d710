//! The decoder against what real servers write, streamed and two-phase transactions included.

use std::collections::BTreeSet;

use bytes::Bytes;

use walferry::change::Change;
use walferry::decode::{Decoder, Event};
use walferry::demo::server::Server;
use walferry::lsn::Lsn;
use walferry::pg::Session;

use crate::support;

mod beside;
mod wal2json;

/// The messages a slot holds, as pgoutput gives them with these options.
async fn peek(session: &mut Session, options: &str) -> Vec<(Lsn, Bytes)> {
    let sql = format!(
        "select lsn, data from pg_logical_slot_peek_binary_changes('s', null, null, \
         'publication_names', 'p', {options})"
    );
    let rows = session.query(&sql).await.unwrap();
    rows.iter().map(|row| (row.lsn(0).unwrap(), unhex(row.str(1).unwrap()))).collect()
}

fn unhex(text: &str) -> Bytes {
    let digits = text.strip_prefix("\\x").unwrap();
    let byte = |at: usize| u8::from_str_radix(&digits[at..at + 2], 16).unwrap();
    (0..digits.len()).step_by(2).map(byte).collect()
}

const WORK: [&str; 12] = [
    "insert into public.t select i, 'small', '{happy}' from generate_series(1, 3) i",
    "update public.t set id = 100 where id = 1",
    "begin; insert into public.t select i, repeat('x', 100), null from generate_series(1000, 3000) i; \
     savepoint a; insert into public.t select i, repeat('y', 100), null from generate_series(4000, 6000) i; \
     rollback to a; truncate public.t; commit",
    "begin; insert into public.t select i, repeat('x', 100), null from generate_series(1000, 3000) i; \
     rollback",
    "begin; insert into public.t values (7, 'p', null); prepare transaction 'committed later'",
    "commit prepared 'committed later'",
    "begin; insert into public.t values (8, 'p', null); prepare transaction 'rolled back'",
    "rollback prepared 'rolled back'",
    "begin; insert into public.t select i, repeat('z', 100), null from generate_series(10000, 13000) i; \
     prepare transaction 'large'",
    "commit prepared 'large'",
    "select pg_logical_emit_message(true, 'p', 'in'), pg_logical_emit_message(false, 'p', 'out')",
    "delete from public.t where id < 100",
];

#[tokio::test]
async fn every_message_of_a_real_server_is_decoded_in_every_protocol() {
    let settings = ["logical_decoding_work_mem = 64kB", "max_prepared_transactions = 5"];
    let server = Server::start(&Server::default_bin().unwrap(), &settings).unwrap();
    let mut session = support::session(&server, "postgres").await;
    if session.major_version() < 15 {
        return; // Two-phase decoding by SQL function with every protocol up to 3 begins here.
    }
    session
        .execute(
            "create type public.mood as enum ('happy'); \
             create table public.t (id int primary key, v text, m public.mood[]); \
             create publication p for all tables",
        )
        .await
        .unwrap();
    let slot = "select pg_create_logical_replication_slot('s', 'pgoutput', false, true)";
    session.execute(slot).await.unwrap();
    for sql in WORK {
        // Each alone, as PREPARE TRANSACTION and its end do not share a message.
        session.execute(sql).await.unwrap();
    }
    for (options, kinds) in [
        ("'proto_version', '1'", "BCDIMRTUY"),
        ("'proto_version', '2', 'messages', 'true', 'streaming', 'true'", "ABCDEIMRSTUYc"),
        (
            "'proto_version', '3', 'messages', 'true', 'streaming', 'true', 'two_phase', 'true'",
            "ABCDEIKMPRSTUYbcpr",
        ),
    ] {
        let messages = peek(&mut session, options).await;
        let mut decoder = Decoder::new();
        let mut seen = BTreeSet::new();
        let mut inserted = 0;
        for (lsn, data) in &messages {
            let event = decoder.decode(data.clone(), *lsn).unwrap_or_else(|e| panic!("{e}"));
            seen.insert(char::from(data[0]));
            inserted +=
                usize::from(matches!(event, Event::Change { change: Change::Insert { .. }, .. }));
            // Cut short anywhere, it is an error or a shorter message, and never a panic.
            for len in 0..data.len().min(200) {
                let mut forgetful = Decoder::new();
                let _ = forgetful.decode(data.slice(..len), *lsn);
            }
        }
        let seen: String = seen.into_iter().collect();
        let missing: String = kinds.chars().filter(|k| !seen.contains(*k)).collect();
        println!("{options}: {} messages, {inserted} inserts, kinds {seen}", messages.len());
        assert!(missing.is_empty() || missing == "M" && options.contains("'1'"), "{missing}");
        assert!(inserted > 5000, "{inserted}");
    }
}
