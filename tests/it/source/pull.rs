//! What only a pull can run into.

use std::time::Duration;

use walferry::change::{Chunk, Ending, Item};
use walferry::demo::server::Server;
use walferry::pg::{Purpose, Session};
use walferry::source::{self, BulkOptions, StreamOptions, Transport, slot};

use super::rig::{Reader, Rig, is_mark, soon};

const BUFFER: usize = 16 << 20;

/// The changes up to the next mark, confirmed as they come.
async fn until_mark(reader: &mut Reader) -> usize {
    let mut changes = 0;
    loop {
        let item = reader.pop().await;
        if let Some(end_lsn) = item.end_lsn() {
            reader.durable.send_replace(end_lsn);
        }
        let Item::Chunk(chunk) = item else { continue };
        if chunk.changes.first().is_some_and(is_mark) {
            return changes;
        }
        changes += chunk.changes.len();
    }
}

/// A session of PostgreSQL 10 can start pgoutput a few times; a pull starts it with each chunk, and
/// there each time it tells the slot what is durable.
#[tokio::test]
async fn a_pull_outlives_what_a_session_of_an_old_server_bears() {
    let server = Server::start(&Server::bin_of(10).unwrap(), &[]).unwrap();
    let mut rig = Rig::on(server, "create table public.t (id int primary key)", &["t"]).await;
    let bulk = BulkOptions { messages: Some(10), ..BulkOptions::default() };
    let options = StreamOptions { bulk, ..rig.options() };
    let mut reader = Reader::start_by(&rig.config, Transport::Pull, options, BUFFER).await;
    let mut backends = std::collections::HashSet::new();
    for round in 0..30 {
        for part in 0..3 {
            let from = round * 12 + part * 4;
            let sql =
                format!("insert into public.t select {from} + i from generate_series(0, 3) i");
            rig.sql.execute(&sql).await.unwrap();
        }
        rig.mark().await;
        assert_eq!(until_mark(&mut reader).await, 12, "{round}");
        let sql = "select pid from pg_stat_activity where datname = current_database() \
             and backend_type = 'client backend' and pid <> pg_backend_pid()";
        backends.extend(rig.sql.query(sql).await.unwrap().iter().map(|r| r.string(0).unwrap()));
    }
    assert!(backends.len() > 5, "{backends:?}");
    soon("the end", reader.end()).await.unwrap();
}

/// The server answers a peek once it has decoded all of it, and not even the beginning of the COPY
/// is heard of before: while it holds the slot for us, it is at work.
#[tokio::test]
async fn a_pull_waits_for_a_source_that_decodes_for_longer_than_the_silence_it_bears() {
    let ddl = "create table public.t (id int primary key)";
    let mut rig = Rig::new(&[], ddl, &["t"]).await;
    rig.sql.execute("insert into public.t values (1)").await.unwrap();
    rig.mark().await;
    // What pgoutput has to look at for the row; a look at the slot needs none of it.
    let mut lock = Session::connect(&rig.config, Purpose::Sql).await.unwrap();
    let held = "begin; lock table pg_catalog.pg_publication_rel in access exclusive mode";
    lock.execute(held).await.unwrap();
    // Long enough for a connection of a busy machine.
    let silence = Duration::from_millis(1500);
    let options = StreamOptions { silence, ..rig.options() };
    let begun = std::time::Instant::now();
    let mut reader = Reader::start_by(&rig.config, Transport::Pull, options, BUFFER).await;
    let letting_go = async {
        tokio::time::sleep(silence * 2 + silence / 4).await;
        let waits = "select count(*) from pg_stat_activity \
             where wait_event = 'relation' and query like 'copy%peek%'";
        assert_eq!(lock.query(waits).await.unwrap()[0].str(0).unwrap(), "1");
        lock.execute("commit").await.unwrap();
        begun.elapsed()
    };
    let (let_go, changes) = tokio::join!(letting_go, until_mark(&mut reader));
    assert_eq!(changes, 1);
    assert!(begun.elapsed() > let_go && let_go > silence * 2, "{let_go:?}");
    soon("the end", reader.end()).await.unwrap();
}

/// A peek gives again what came and is not durable yet: of a PREPARE that could not be told from one
/// that nobody has seen, and its rows would come twice. Nor is a backlog read in bulk: a copy of the
/// slot knows nothing of PREPARE, and what was prepared in the bulk and ends behind it would be lost.
#[tokio::test]
async fn a_slot_that_tells_of_prepare_is_streamed_and_nothing_else() {
    let ddl = "create table public.t (id int primary key)";
    let mut rig = Rig::new(&["max_prepared_transactions = 5"], ddl, &["t"]).await;
    let mut sql = Session::connect(&rig.config, Purpose::Sql).await.unwrap();
    let made = "select pg_create_logical_replication_slot('two', 'pgoutput', false, true)";
    sql.query(made).await.unwrap();
    let made = slot::status(&mut sql, "two").await.unwrap().unwrap();
    let start_lsn = made.confirmed_flush_lsn.unwrap();
    let options = StreamOptions {
        slot: "two".to_string(),
        start_lsn,
        confirmed_lsn: start_lsn,
        bulk: BulkOptions { least_bytes: Some(1), ..BulkOptions::default() },
        ..rig.options()
    };
    let refused = source::Reader::open(&rig.config, Transport::Pull, options.clone()).await;
    let told = refused.unwrap_err().to_string();
    assert!(told.contains("slot two ") && told.contains("--transport stream"), "{told}");
    rig.sql
        .execute("begin; insert into public.t values (1); prepare transaction 'x'")
        .await
        .unwrap();
    rig.sql.execute("insert into public.t values (2)").await.unwrap();
    rig.mark().await;
    // From an earlier run: two phases are not asked for now.
    let mut reader = Reader::start(&rig.config, options, BUFFER).await;
    let before = endings(&reader.until_mark().await);
    assert_eq!(before, [(Ending::Prepare("x".to_string()), 1), (Ending::Commit, 1)]);
    rig.sql.execute("commit prepared 'x'").await.unwrap();
    rig.mark().await;
    let mut after = Vec::new();
    loop {
        let Item::Chunk(chunk) = reader.pop().await else { continue };
        if chunk.changes.first().is_some_and(is_mark) {
            break;
        }
        after.extend(endings(&[chunk]));
    }
    assert_eq!(after, [(Ending::CommitPrepared("x".to_string()), 0)]);
    soon("the end", reader.end()).await.unwrap();
}

/// How transactions end, and how many changes they have.
fn endings(chunks: &[Chunk]) -> Vec<(Ending, usize)> {
    chunks.iter().map(|chunk| (chunk.begin.ending.clone(), chunk.changes.len())).collect()
}
