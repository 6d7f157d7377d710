//! The stream: what comes out, and what the server is told meanwhile.

use std::time::{Duration, Instant};

use walferry::change::{Chunk, Item};
use walferry::fault::{Fault, Faulty};
use walferry::limit::{CHUNK_BYTES, CHUNK_CHANGES};
use walferry::pg::{Config, Purpose, Session};
use walferry::source::{BulkOptions, End, Error, Stream, StreamOptions};

use super::rig::{Proxy, Reader, Rig, SLOT, is_mark, shown, soon};

const BUFFER: usize = 16 << 20;

#[tokio::test]
async fn a_mixed_workload_comes_out_change_by_change() {
    let ddl = "create table public.a (id int primary key, v text, big text); \
        alter table public.a alter big set storage external; \
        create table public.full_one (x int, y text); \
        alter table public.full_one replica identity full; \
        create table public.child (id int primary key, a int references public.a);";
    let mut rig = Rig::new(&[], ddl, &["a", "full_one", "child"]).await;
    let mut reader = rig.follow(BUFFER).await;
    for sql in [
        "begin; insert into public.a values (1, 'one', repeat('x', 9000)), (2, null, 'small'); \
         savepoint s; insert into public.a values (3, 'gone', ''); rollback to s; \
         insert into public.a values (4, 'four', null); commit",
        "update public.a set v = 'uno' where id = 1",
        "update public.a set id = 20 where id = 2",
        "delete from public.a where id = 4",
        "begin; insert into public.a values (9, 'aborted', ''); rollback",
        "insert into public.full_one values (1, null), (1, null)",
        "update public.full_one set y = 'z' where ctid = '(0,1)'",
        "delete from public.full_one where y is null",
        "insert into public.child values (1, 1)",
        "truncate public.a restart identity cascade",
        "select pg_logical_emit_message(true, 'p', 'tx')",
        "select pg_logical_emit_message(false, 'p', 'at once')",
    ] {
        rig.sql.execute(sql).await.unwrap();
    }
    rig.mark().await;
    let chunks = reader.until_mark().await;
    let mut shown = shown(&chunks);
    let version = rig.sql.major_version();
    if version >= 14 {
        let messages = shown.split_off(shown.len() - 2);
        assert_eq!(messages, [["M true p tx"], ["M false p at once"]]);
    }
    if version >= 11 {
        assert_eq!(shown.pop().unwrap(), ["T a+child true true"]);
    }
    assert_eq!(
        shown,
        [
            vec!["I a (1,one,xxxxxxxxxxxx)", "I a (2,-,small)", "I a (4,four,-)"],
            vec!["U a (1,uno,~)"],
            vec!["U a K(2,-,-) (20,-,small)"],
            vec!["D a K(4,-,-)"],
            vec!["I full_one (1,-)", "I full_one (1,-)"],
            vec!["U full_one O(1,-) (1,z)"],
            vec!["D full_one O(1,-)"],
            vec!["I child (1,1)"],
        ]
    );
    let ends: Vec<_> = chunks.iter().map(|c| c.commit.unwrap().end_lsn).collect();
    assert!(ends.is_sorted(), "{ends:?}");
    assert!(chunks.iter().all(|c| c.begin.commit_lsn < c.commit.unwrap().end_lsn));
    assert_eq!(reader.end().await.unwrap(), End::Stopped);
}

#[tokio::test]
async fn what_is_durable_does_not_come_again_and_the_rest_does() {
    let mut rig = Rig::new(&[], "create table public.t (id int primary key)", &["t"]).await;
    let mut reader = rig.follow(BUFFER).await;
    rig.sql.execute("insert into public.t values (1)").await.unwrap();
    rig.sql.execute("insert into public.t values (2)").await.unwrap();
    rig.mark().await;
    let chunks = reader.until_mark().await;
    let durable_lsn = chunks[0].commit.unwrap().end_lsn;
    reader.durable.send(durable_lsn).unwrap();
    assert_eq!(reader.end().await.unwrap(), End::Stopped);
    // The last words of a reader that was stopped.
    rig.wait_for(
        &format!("select confirmed_flush_lsn from pg_replication_slots where slot_name = '{SLOT}'"),
        &durable_lsn.to_string(),
    )
    .await;
    let options = StreamOptions { start_lsn: durable_lsn, ..rig.options() };
    let mut reader = Reader::start(&rig.config, options, BUFFER).await;
    assert_eq!(shown(&reader.until_mark().await), [["I t (2)"]]);
    reader.end().await.unwrap();
}

#[tokio::test]
async fn transactions_of_a_skipped_origin_leave_only_their_position() {
    let mut rig = Rig::new(&[], "create table public.t (id int primary key)", &["t"]).await;
    let options =
        StreamOptions { skip_origins: vec!["walferry_shop_reverse".to_string()], ..rig.options() };
    let counters = options.counters.clone();
    let mut reader = Reader::start(&rig.config, options, BUFFER).await;
    rig.sql.execute("insert into public.t values (1)").await.unwrap();
    for (origin, id) in [("walferry_shop_reverse", 2), ("elsewhere", 3)] {
        let sql = format!(
            "select pg_replication_origin_create('{origin}'); \
             select pg_replication_origin_session_setup('{origin}')"
        );
        rig.sql.execute(&sql).await.unwrap();
        rig.sql.execute(&format!("insert into public.t values ({id}), ({id}0)")).await.unwrap();
        rig.sql.execute("select pg_replication_origin_session_reset()").await.unwrap();
    }
    rig.mark().await;
    let mut lines = Vec::new();
    let mut last = rig.start_lsn;
    loop {
        let item = reader.pop().await;
        let end_lsn = item.end_lsn().unwrap();
        assert!(end_lsn > last, "positions grow");
        last = end_lsn;
        let Item::Chunk(chunk) = item else { continue };
        match chunk.changes.first() {
            Some(change) if is_mark(change) => break,
            Some(_) => {}
            None => continue,
        }
        lines.push((chunk.begin.origin.clone(), chunk.changes.len()));
    }
    assert_eq!(lines, [(None, 1), (Some("elsewhere".to_string()), 2)]);
    let table = counters.tables()[&walferry::id::QualifiedName::new("public", "t")];
    assert_eq!((table.decoded, table.filtered), (5, 2));
    reader.end().await.unwrap();
}

#[tokio::test]
async fn etl_429_the_slot_moves_on_while_only_unpublished_tables_change() {
    let ddl = "create table public.t (id int primary key); create table public.other (id int)";
    let mut rig = Rig::new(&[], ddl, &["t"]).await;
    let mut reader = rig.follow(BUFFER).await;
    rig.sql.execute("insert into public.other select generate_series(1, 1000)").await.unwrap();
    let written_lsn = rig.lsn("select pg_current_wal_flush_lsn()").await;
    // The applier acknowledges whatever comes, in order.
    let moved = async {
        loop {
            let end_lsn = reader.pop().await.end_lsn().unwrap();
            reader.durable.send(end_lsn).unwrap();
            if rig.confirmed().await >= written_lsn {
                return;
            }
        }
    };
    soon("the slot to move", moved).await;
    reader.end().await.unwrap();
}

#[tokio::test]
async fn pgcopydb_1033_the_slot_stands_still_while_something_received_is_not_durable() {
    let ddl = "create table public.t (id int primary key); create table public.other (id int)";
    let mut rig = Rig::new(&[], ddl, &["t"]).await;
    let mut reader = rig.follow(BUFFER).await;
    rig.sql.execute("insert into public.t values (1)").await.unwrap();
    rig.sql.execute("insert into public.other values (1)").await.unwrap();
    let written_lsn = rig.lsn("select pg_current_wal_flush_lsn()").await;
    let mut positions = reader.positions.clone();
    // Keepalives have told us of everything, and the server knows that we know.
    soon("keepalives", positions.wait_for(|p| p.buffered_lsn >= written_lsn)).await.unwrap();
    rig.wait_for(&format!("select write_lsn >= '{written_lsn}' from pg_stat_replication"), "t")
        .await;
    assert_eq!(rig.confirmed().await, rig.start_lsn);
    assert_eq!(positions.borrow().confirmed_lsn, rig.start_lsn);
    let insert = reader.pop().await;
    assert!(matches!(insert, Item::Chunk(_)), "{insert:?}");
    reader.durable.send(insert.end_lsn().unwrap()).unwrap();
    rig.wait_for(
        "select confirmed_flush_lsn from pg_replication_slots",
        &insert.end_lsn().unwrap().to_string(),
    )
    .await;
    reader.end().await.unwrap();
}

#[tokio::test]
async fn a_durable_position_reaches_the_slot_at_once() {
    let mut rig = Rig::new(&[], "create table public.t (id int primary key)", &["t"]).await;
    let mut reader = rig.follow(BUFFER).await;
    let mut took = Vec::new();
    for id in 0..5 {
        rig.sql.execute(&format!("insert into public.t values ({id})")).await.unwrap();
        let end_lsn = loop {
            if let item @ Item::Chunk(_) = reader.pop().await {
                break item.end_lsn().unwrap();
            }
        };
        let began = Instant::now();
        reader.durable.send(end_lsn).unwrap();
        let mut positions = reader.positions.clone();
        soon("feedback", positions.wait_for(|p| p.confirmed_lsn >= end_lsn)).await.unwrap();
        took.push(began.elapsed());
    }
    // At the interval's end each would have taken all of it; a busy machine delays one or two.
    took.sort();
    assert!(took[2] < Duration::from_millis(500), "{took:?}, though the interval is 1 s");
    reader.end().await.unwrap();
}

#[tokio::test]
async fn bdr_233_a_sink_that_is_full_longer_than_wal_sender_timeout_keeps_the_connection() {
    let ddl = "create table public.t (id int primary key, v text)";
    let mut rig = Rig::new(&["wal_sender_timeout = 1s"], ddl, &["t"]).await;
    let mut reader = rig.follow(1024).await;
    let rows = 60_000;
    rig.sql
        .execute(&format!(
            "insert into public.t select i, repeat('v', 200) from generate_series(1, {rows}) i"
        ))
        .await
        .unwrap();
    rig.mark().await;
    let walsender = "select pid from pg_stat_replication";
    let pid = rig.sql.query(walsender).await.unwrap()[0].string(0).unwrap();
    // Nothing to wait for but the time in which nothing may happen: more than the timeout twice over.
    tokio::time::sleep(Duration::from_millis(2500)).await;
    rig.wait_for(walsender, &pid).await;
    let mut count = 0;
    for chunk in reader.until_mark().await {
        count += chunk.changes.len();
    }
    assert_eq!(count, rows);
    rig.wait_for(walsender, &pid).await;
    reader.end().await.unwrap();
}

#[tokio::test]
async fn go_pq_cdc_20_a_source_gone_silent_is_noticed() {
    let rig = Rig::new(&[], "create table public.t (id int primary key)", &["t"]).await;
    let proxy = Proxy::start(rig.server.port()).await;
    let uri = format!("postgres://postgres@127.0.0.1:{}/postgres", proxy.port);
    let config = Config::parse(&uri).unwrap().labelled("source");
    // As long as a busy machine may take for an answer.
    let silence = Duration::from_secs(1);
    let options = StreamOptions { silence, ..rig.options() };
    let reader = Reader::start(&config, options, BUFFER).await;
    // Idle is not silent: while asked, the server answers.
    tokio::time::sleep(silence * 3).await;
    assert!(!reader.task.is_finished(), "an idle source was taken for a silent one");
    proxy.stalled.send(true).unwrap();
    let began = Instant::now();
    let error = soon("the silence to be noticed", reader.task).await.unwrap().unwrap_err();
    assert!(matches!(error, Error::Silent { .. }), "{error}");
    assert_eq!(error.fault(), Fault::Retry);
    assert!(began.elapsed() < silence * 10, "{:?}", began.elapsed());
}

#[tokio::test]
async fn a_server_that_shuts_down_ends_the_stream_for_a_retry() {
    let rig = Rig::new(&[], "create table public.t (id int primary key)", &["t"]).await;
    let mut reader = rig.follow(BUFFER).await;
    let server = rig.server;
    let stopping = tokio::task::spawn_blocking(move || {
        server.stop(walferry::demo::server::StopMode::Fast).unwrap();
        server
    });
    // A walsender lets the server go once all it sent is confirmed, so go on confirming.
    while let Some(item) = soon("the end", reader.items.pop()).await {
        reader.durable.send(item.end_lsn().unwrap()).unwrap();
    }
    match soon("the reader's end", reader.task).await.unwrap() {
        Ok(end) => assert_eq!(end, End::Source),
        Err(error) => assert_eq!(error.fault(), Fault::Retry, "{error}"),
    }
    soon("the server to stop", stopping).await.unwrap();
}

#[tokio::test]
async fn a_large_transaction_passes_in_bounded_chunks() {
    let ddl = "create table public.t (id int primary key, v text)";
    let mut rig = Rig::new(&[], ddl, &["t"]).await;
    let limit_bytes = 4 * CHUNK_BYTES;
    let mut reader = rig.follow(limit_bytes).await;
    let gauge = reader.items.gauge();
    let rows = 200_000;
    rig.sql
        .execute(&format!(
            "insert into public.t select i, 'some value ' || i from generate_series(1, {rows}) i"
        ))
        .await
        .unwrap();
    rig.mark().await;
    let (mut count, mut number) = (0, 0);
    loop {
        let Item::Chunk(chunk) = reader.pop().await else { continue };
        assert!(gauge.bytes() <= limit_bytes);
        assert!(chunk.changes.len() <= CHUNK_CHANGES && chunk.bytes <= CHUNK_BYTES + 1024);
        assert_eq!(chunk.number, number);
        (count, number) = (count + chunk.changes.len(), number + 1);
        if chunk.commit.is_some() {
            break;
        }
    }
    assert_eq!(count, rows);
    assert!(number as usize >= rows / CHUNK_CHANGES);
    reader.end().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_small_transactions_stream_through() {
    let ddl = "create table public.t (id int primary key)";
    let settings = ["synchronous_commit = off", "autovacuum = off"];
    let mut rig = Rig::new(&settings, ddl, &["t"]).await;
    if rig.sql.major_version() < 11 {
        return; // No COMMIT in DO.
    }
    let count = 100_000;
    rig.sql
        .execute(&format!(
            "do $$ begin for i in 1..{count} loop \
               insert into public.t values (i); commit; end loop; end $$"
        ))
        .await
        .unwrap();
    let began = Instant::now();
    let mut reader = rig.follow(BUFFER).await;
    rig.mark().await;
    let chunks = reader.until_mark().await;
    let seconds = began.elapsed().as_secs_f64();
    assert_eq!(chunks.len(), count);
    assert!(chunks.iter().all(|c| c.changes.len() == 1 && c.commit.is_some()));
    println!("{count} transactions in {seconds:.2} s, {:.0} a second", count as f64 / seconds);
    reader.end().await.unwrap();
}

#[tokio::test]
async fn a_walsender_left_by_a_dead_runner_gives_the_slot_up() {
    let rig = Rig::new(&[], "create table public.t (id int primary key)", &["t"]).await;
    let left = rig.follow(BUFFER).await;
    let mut second = rig.follow(BUFFER).await;
    let error = soon("the first reader's end", left.task).await.unwrap().unwrap_err();
    assert_eq!(error.fault(), Fault::Retry, "{error}");
    let mut rig = rig;
    rig.mark().await;
    assert!(second.until_mark().await.is_empty());
    second.end().await.unwrap();
}

#[tokio::test]
async fn a_slot_read_by_another_program_is_left_alone() {
    let rig = Rig::new(&[], "create table public.t (id int primary key)", &["t"]).await;
    let foreign = rig.config.clone().with_application_name("debezium");
    let mut other = Session::connect(&foreign, Purpose::Replication).await.unwrap();
    let publication = format!("\"{SLOT}\"");
    let wanted = [("proto_version", "1"), ("publication_names", publication.as_str())];
    other.start_replication(SLOT, rig.start_lsn, &wanted).await.unwrap();
    let error = walferry::source::Stream::open(&rig.config, rig.options()).await.unwrap_err();
    assert!(matches!(&error, Error::SlotInUse { user, .. } if user == "debezium"), "{error}");
    assert_eq!(error.fault(), Fault::Retry);
}

/// A backlog that is read in bulk, in chunks of any size, is the one that is streamed.
#[tokio::test]
async fn what_is_read_in_bulk_is_what_is_streamed() {
    let ddl = "create table public.a (id int primary key, v text);";
    let mut rig = Rig::new(&[], ddl, &["a"]).await;
    if rig.sql.major_version() < 12 {
        return; // No copies of slots.
    }
    let write = "do $$ begin for i in 1..4000 loop insert into public.a \
         select i * 10 + k, 'row ' || k from generate_series(1, i % 7) k; \
         delete from public.a where id % 9 = i % 9; commit; end loop; end $$";
    rig.sql.execute(write).await.unwrap();
    rig.mark().await;
    let confirmed_lsn = rig.confirmed().await;
    let mut seen: Vec<Vec<Chunk>> = Vec::new();
    for (least_bytes, ahead, messages) in [
        (None, true, None),
        (Some(1), true, None),
        (Some(1), false, None),
        (Some(1), true, Some(100)),
        (Some(1), false, Some(500)),
        (Some(1 << 20), true, Some(3000)),
    ] {
        let bulk = BulkOptions { least_bytes, ahead, messages, ..BulkOptions::default() };
        let options = StreamOptions { bulk, ..rig.options() };
        let opened = Stream::open(&rig.config, options.clone()).await.unwrap();
        assert_eq!(opened.is_behind(), least_bytes.is_some());
        drop(opened);
        let mut reader = Reader::start(&rig.config, options, BUFFER).await;
        let begun = Instant::now();
        seen.push(reader.until_mark().await);
        println!("bulk {least_bytes:?}, ahead {ahead}: {:?}", begun.elapsed());
        reader.end().await.unwrap();
    }
    assert!(seen[0].len() > 3000, "{}", seen[0].len());
    assert!(seen.iter().all(|chunks| *chunks == seen[0]), "they differ");
    assert_eq!(rig.confirmed().await, confirmed_lsn, "nothing was durable");
    // What the target has already is passed over, though the slot has it.
    let end_lsn = |at: usize| seen[0][at].commit.unwrap().end_lsn;
    let start_lsn = end_lsn(1500);
    let bulk = BulkOptions { least_bytes: Some(1), messages: Some(500), ..Default::default() };
    let bulk = StreamOptions { bulk, ..rig.options() };
    let mut reader = Reader::start(&rig.config, StreamOptions { start_lsn, ..bulk }, BUFFER).await;
    assert_eq!(reader.until_mark().await, seen[0][1501..]);
    reader.end().await.unwrap();
    let left = "select count(*) from pg_replication_slots where temporary";
    rig.wait_for(left, "0").await;
}

/// A backlog of large messages is streamed behind its first chunk, or read in bulk where that is not
/// wanted, and is the same. That nothing is left to read is said until the stream begins.
#[tokio::test]
async fn a_backlog_of_large_rows_is_streamed_behind_its_first_chunk() {
    let ddl = "create table public.a (id serial primary key, v text)";
    let mut rig = Rig::new(&[], ddl, &["a"]).await;
    if rig.sql.major_version() < 12 {
        return; // No copies of slots.
    }
    let write = "do $$ begin for i in 1..570 loop insert into public.a (v) \
         select repeat('x', 1000) from generate_series(1, 5); commit; end loop; end $$";
    rig.sql.execute(write).await.unwrap();
    rig.mark().await;
    let streaming = "select count(*) > 0 from pg_stat_replication where state = 'streaming'";
    let mut seen: Vec<Vec<Chunk>> = Vec::new();
    for (message_bytes, is_streamed) in [(None, false), (Some(900), false), (Some(512), true)] {
        // A chunk is of 143 transactions, which have 0.7 MB.
        let (least_bytes, messages) = (Some(1), Some(1000));
        let bulk = BulkOptions { least_bytes, messages, message_bytes, ..Default::default() };
        let options = StreamOptions { bulk, ..rig.options() };
        let all_read = options.all_read.clone();
        let room = if is_streamed { 1 << 20 } else { 256 << 10 };
        let mut reader = Reader::start(&rig.config, options, room).await;
        let mut chunks = Vec::new();
        if is_streamed {
            rig.wait_for(streaming, "t").await;
        } else {
            // Of the last chunk there is more than has room anywhere.
            while chunks.len() < 3 * 143 + 1 {
                if chunks.len() == 200 {
                    assert!(!all_read.get());
                    rig.wait_for(streaming, "f").await;
                }
                if let Item::Chunk(chunk) = reader.pop().await {
                    chunks.extend((!chunk.changes.is_empty()).then_some(chunk));
                }
            }
            let said = async {
                while !all_read.get() {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            };
            soon("that all is read", said).await;
        }
        chunks.extend(reader.until_mark().await);
        rig.wait_for(streaming, "t").await;
        assert!(!all_read.get());
        seen.push(chunks);
        reader.end().await.unwrap();
    }
    assert_eq!(seen[0].len(), 570);
    assert!(seen.iter().all(|chunks| *chunks == seen[0]), "they differ");
}

/// The mark is dropped and the slot streamed while writers go on, and one of them is in the middle
/// of a transaction all the time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn between_bulk_and_stream_nothing_is_lost_and_nothing_comes_twice() {
    let ddl = "create table public.t (id serial, v text); create table public.slow (id int)";
    let mut rig = Rig::new(&[], ddl, &["t", "slow"]).await;
    if rig.sql.major_version() < 12 {
        return; // No copies of slots.
    }
    let mut slow = Session::connect(&rig.config, Purpose::Sql).await.unwrap();
    slow.execute("begin; insert into public.slow select generate_series(1, 50)").await.unwrap();
    let insert = "insert into public.t (v) values ('x')";
    let many = format!("do $$ begin for i in 1..3000 loop {insert}; commit; end loop; end $$");
    rig.sql.execute(&many).await.unwrap();
    let bulk = BulkOptions { least_bytes: Some(1000), messages: Some(300), ..Default::default() };
    let options = StreamOptions { bulk, ..rig.options() };
    let mut reader = Reader::start(&rig.config, options, BUFFER).await;
    let mut writer = Session::connect(&rig.config, Purpose::Sql).await.unwrap();
    let writing = tokio::spawn(async move {
        for _ in 0..1500 {
            writer.execute(insert).await.unwrap();
        }
    });
    let streaming = "select count(*) > 0 from pg_stat_replication where state = 'streaming'";
    writing.await.unwrap();
    slow.execute("commit").await.unwrap();
    rig.wait_for(streaming, "t").await;
    rig.mark().await;
    let chunks = reader.until_mark().await;
    let lines: Vec<String> = shown(&chunks).concat();
    let (slow, fast): (Vec<_>, Vec<_>) = lines.iter().partition(|l| l.starts_with("I slow"));
    assert_eq!(slow.len(), 50);
    let ids: Vec<String> = (1..=4500).map(|id| format!("I t ({id},x)")).collect();
    assert_eq!(fast, ids.iter().collect::<Vec<_>>());
    reader.end().await.unwrap();
}

/// One that has committed and is longer than any chunk is read in bulk all the same, or streamed where
/// that is not wanted, or where there is no room for it on the source.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_transaction_read_in_bulk_is_the_one_that_is_streamed() {
    let ddl = "create table public.t (id int primary key, v text)";
    let mut rig = Rig::new(&["autovacuum = off"], ddl, &["t"]).await;
    if rig.sql.major_version() < 12 {
        return; // No copies of slots.
    }
    // Some 75 MB of log, and more on the source than it keeps in memory.
    let write = "insert into public.t select i, repeat('x', 450) from generate_series(1, 150000) i";
    rig.sql.execute(write).await.unwrap();
    rig.sql.execute("delete from public.t where id <= 10").await.unwrap();
    rig.mark().await;
    let streaming = "select count(*) from pg_stat_replication where state <> 'startup'";
    let limits = [("-1", 2 << 30), ("-1", 0), ("1MB", 2 << 30)];
    let mut seen: Option<Vec<Chunk>> = None;
    for (temp_file_limit, transaction_bytes) in limits {
        let set = format!("alter role postgres set temp_file_limit = '{temp_file_limit}'");
        rig.sql.execute(&set).await.unwrap();
        let bulk = BulkOptions { least_bytes: Some(1), transaction_bytes, ..Default::default() };
        let options = StreamOptions { bulk, ..rig.options() };
        let mut reader = Reader::start(&rig.config, options, 1 << 20).await;
        let first = loop {
            match reader.pop().await {
                Item::Chunk(chunk) if !chunk.changes.is_empty() => break chunk,
                _ => {}
            }
        };
        let is_streamed = transaction_bytes == 0 || temp_file_limit != "-1";
        rig.wait_for(streaming, if is_streamed { "1" } else { "0" }).await;
        let mut chunks = vec![first];
        chunks.append(&mut reader.until_mark().await);
        if !is_streamed {
            // What is behind it has come along: a walsender would decode all of it once more.
            assert_eq!(rig.sql.query_one(streaming, &[]).await.unwrap().string(0).unwrap(), "0");
        }
        reader.end().await.unwrap();
        let changes: usize = chunks.iter().map(|chunk| chunk.changes.len()).sum();
        assert_eq!(changes, 150_010);
        assert!(*seen.get_or_insert_with(|| chunks.clone()) == chunks, "they differ");
    }
}
