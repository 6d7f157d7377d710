//! An open session: queries, pipelines, COPY, notifications, and how each of them ends badly.

use std::time::Duration;

use futures_util::FutureExt;
use walferry::demo::server::StopMode;
use walferry::fault::{Fault, Faulty};
use walferry::pg::{CopyChunk, Error, Filled, Pipeline, Reply};

use super::support;

const LONG: Duration = Duration::from_secs(30);

#[tokio::test]
async fn a_session_asks_and_is_answered() {
    let server = support::server();
    let mut session = support::session(&server, "postgres").await;
    let rows = session.query("select 1, null, 'x'; select 2, 'y', null").await.unwrap();
    assert_eq!(rows.len(), 2);
    assert_eq!(rows[0].str(2).unwrap(), "x");
    let row = session.query_one("select $1::int + 1, $2::text", &[Some("4"), None]).await.unwrap();
    assert_eq!(row.parse::<i32>(0).unwrap(), 5);
    assert_eq!(row.opt(1).unwrap(), None);
    let error = session.query("select * from nowhere").await.unwrap_err();
    assert_eq!(error.code(), Some("42P01"));
    assert_eq!(session.major_version(), 15);
    session.execute("create table public.t (a int, b text)").await.unwrap();
    let mut copy = session.copy_in("copy public.t from stdin").await.unwrap();
    copy.write(b"1\tx\n2\ty\n").await.unwrap();
    assert_eq!(copy.finish().await.unwrap(), [2]);
}

#[tokio::test]
async fn a_request_dropped_half_way_makes_the_next_call_say_so() {
    let server = support::server();
    let mut session = support::session(&server, "postgres").await;
    assert!(session.query("select pg_catalog.pg_sleep(10)").now_or_never().is_none());
    let error = session.query("select 1").await.unwrap_err();
    assert!(matches!(error, Error::Abandoned { .. }), "{error}");
    assert!(error.to_string().contains("dropped half way"), "{error}");
    assert!(error.is_closed());
    assert!(session.notification(LONG).await.is_err());

    let mut session = support::session(&server, "postgres").await;
    let mut pipeline = Pipeline::new();
    pipeline.once("select pg_catalog.pg_sleep(10)");
    assert!(session.exchange(pipeline, |_| {}).now_or_never().is_none());
    let error = session.exchange(Pipeline::new(), |_| {}).await.unwrap_err();
    assert!(matches!(error, Error::Abandoned { .. }), "{error}");
}

#[tokio::test]
async fn pgcopydb_880_a_pipeline_of_100_mb_each_way_does_not_deadlock() {
    let server = support::server();
    let mut session = support::session(&server, "postgres").await;
    let piece = vec![b'x'; 1 << 20];
    let mut pipeline = Pipeline::new();
    pipeline.parse("echo", "select $1::text", &[25]);
    for _ in 0..100 {
        pipeline.run("echo", std::iter::once(Some(&piece[..])));
    }
    let (mut rows, mut bytes) = (0, 0);
    let exchange = session.exchange(pipeline, |reply| {
        if let Reply::Row(row) = reply {
            rows += 1;
            bytes += row.bytes(0).unwrap().len();
        }
    });
    tokio::time::timeout(LONG, exchange).await.expect("a deadlock").unwrap();
    assert_eq!((rows, bytes), (100, 100 << 20));
    assert!(!session.in_transaction());
}

#[tokio::test]
async fn the_first_error_of_a_pipeline_is_given_and_the_session_goes_on() {
    let server = support::server();
    let mut session = support::session(&server, "postgres").await;
    let mut pipeline = Pipeline::new();
    pipeline.once("select 1");
    pipeline.once("select 1/0");
    pipeline.once("select * from nowhere");
    let mut tags = Vec::new();
    let exchange = session.exchange(pipeline, |reply| {
        if let Reply::Done(tag) = reply {
            tags.push(tag);
        }
    });
    assert_eq!(exchange.await.unwrap_err().code(), Some("22012"));
    assert_eq!(tags, ["SELECT 1"]);
    assert_eq!(session.query("select 2").await.unwrap().len(), 1);
}

#[tokio::test]
async fn requests_sent_together_are_transactions_of_their_own() {
    let server = support::server();
    let mut session = support::session(&server, "postgres").await;
    let ask = |sql: &str, params: &[Option<&str>]| {
        let mut pipeline = Pipeline::new();
        pipeline.once("create table if not exists t (a text)");
        pipeline.ask(sql, params);
        pipeline
    };
    let asked = [
        ask("insert into t values ($1), ($2) returning a", &[Some("a"), None]),
        ask("insert into t select 'b' where 1 / $1::int > 0", &[Some("0")]),
        Pipeline::new(),
        ask("select count(*) from t", &[]),
    ];
    session.execute("set search_path = public").await.unwrap();
    let [first, second, third, last] = session.exchange_each(asked).await.unwrap();
    let first = first.unwrap();
    let values: Vec<_> = first.iter().map(|row| row.opt(0).unwrap()).collect();
    assert_eq!(values, [Some("a"), None]);
    assert_eq!(second.unwrap_err().code(), Some("22012"));
    assert!(third.unwrap().is_empty());
    assert_eq!(last.unwrap()[0].str(0).unwrap(), "2");
    assert!(!session.in_transaction());
    assert_eq!(session.query("select 2").await.unwrap().len(), 1);
}

#[tokio::test]
async fn a_server_killed_in_mid_query_is_a_reason_to_try_again() {
    for (mode, code) in [(StopMode::Immediate, "57P0"), (StopMode::Fast, "57P01")] {
        let server = support::server();
        let mut session = support::session(&server, "postgres").await;
        let watcher = support::session(&server, "postgres").await;
        let pid = session.process_id();
        let asking = session.query("select pg_catalog.pg_sleep(60)");
        let stopping = async move {
            until_active(watcher, pid).await;
            tokio::task::spawn_blocking(move || server.stop(mode)).await.unwrap().unwrap();
        };
        let (answer, ()) = tokio::join!(asking, stopping);
        let error = answer.unwrap_err();
        assert_eq!(error.fault(), Fault::Retry, "{error}");
        assert!(error.is_closed(), "{error}");
        assert!(error.code().is_some_and(|c| c.starts_with(code)), "last words: {error}");
        assert!(session.query("select 1").await.unwrap_err().is_closed());
    }
}

/// Waits until the backend `pid` runs a statement.
async fn until_active(mut watcher: walferry::pg::Session, pid: i32) {
    let sql = format!("select state from pg_catalog.pg_stat_activity where pid = {pid}");
    loop {
        let rows = watcher.query(&sql).await.unwrap();
        if rows.first().is_some_and(|r| r.opt(0).unwrap() == Some("active")) {
            return;
        }
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn what_a_server_said_before_it_closed_is_told_instead_of_broken_pipe() {
    let server = support::server();
    let mut session = support::session(&server, "postgres").await;
    let mut other = support::session(&server, "postgres").await;
    let pid = session.process_id();
    let sql = format!("select pg_catalog.pg_terminate_backend({pid}, 5000)");
    assert!(other.query(&sql).await.unwrap()[0].bool(0).unwrap());
    // Large enough that writing it fails before anything is read.
    let error = session.query(&format!("select '{}'", "x".repeat(8 << 20))).await.unwrap_err();
    assert_eq!(error.code(), Some("57P01"), "{error}");
}

#[tokio::test]
async fn a_row_refused_in_copy_is_reported_before_all_data_is_sent() {
    let server = support::server();
    let mut session = support::session(&server, "postgres").await;
    session.execute("create table public.t (a int)").await.unwrap();
    let mut copy = session.copy_in("copy public.t from stdin").await.unwrap();
    let mut lines = b"not a number\n".to_vec();
    lines.extend(b"1\n".repeat(100_000));
    let writing = async {
        loop {
            if let Err(error) = copy.write(&lines).await {
                return error;
            }
        }
    };
    let error = tokio::time::timeout(LONG, writing).await.expect("the error was never read");
    assert_eq!(error.code(), Some("22P02"));
    assert!(copy.finish().await.is_err());
    assert_eq!(
        session.query("select count(*) from public.t").await.unwrap()[0].str(0).unwrap(),
        "0"
    );

    let mut copy = session.copy_in("copy public.t from stdin").await.unwrap();
    copy.write(b"1\nx\n").await.unwrap();
    assert_eq!(copy.finish().await.unwrap_err().code(), Some("22P02"));
    let copy = session.copy_in("copy public.t from stdin").await.unwrap();
    copy.abort("changed our mind").await.unwrap();
    assert!(session.copy_in("copy public.nowhere from stdin").await.is_err());
    assert_eq!(session.query("select 1").await.unwrap().len(), 1);
}

#[tokio::test]
async fn a_failure_while_copying_out_leaves_the_session_usable() {
    let server = support::server();
    let mut session = support::session(&server, "postgres").await;
    let sql = "copy (select 1/(5-g) from pg_catalog.generate_series(1,10) g) to stdout";
    let mut copy = session.copy_out(sql).await.unwrap();
    let error = loop {
        match copy.next().await {
            Ok(Some(_)) => {}
            Ok(None) => panic!("no error"),
            Err(error) => break error,
        }
    };
    assert_eq!(error.code(), Some("22012"));
    assert_eq!(session.query("select 1").await.unwrap().len(), 1);
}

/// Both ways in one request each, and the first failure ends what comes after it.
#[tokio::test]
async fn several_copies_are_one_request() {
    let server = support::server();
    let mut source = support::session(&server, "postgres").await;
    let mut target = support::session(&server, "postgres").await;
    let tables = ["a", "b", "c"].map(|t| format!("create table public.{t} (n int)")).join("; ");
    source.execute(&tables).await.unwrap();
    let sql = "copy (select g from pg_catalog.generate_series(1, 50000) g) to stdout; \
               copy (select 1 where false) to stdout; copy (select 7) to stdout";
    let into = "copy public.a from stdin; copy public.b from stdin; copy public.c from stdin";
    let mut read = source.copy_out(sql).await.unwrap();
    let mut write = target.copy_in(into).await.unwrap();
    let mut rows = [0; 3];
    for (nth, count) in rows.iter_mut().enumerate() {
        loop {
            let mut chunk = CopyChunk::with_capacity(16);
            let (messages, filled) = read.fill(&mut chunk, 1000).await.unwrap();
            *count += messages;
            write.pass(chunk).await.unwrap();
            if filled == Filled::Copied {
                break;
            }
        }
        if nth < 2 {
            write.next();
        }
    }
    let mut rest = CopyChunk::with_capacity(0);
    assert_eq!(read.fill(&mut rest, 1).await.unwrap(), (0, Filled::Ready));
    assert_eq!(write.finish().await.unwrap(), [50_000, 0, 1]);
    assert_eq!(rows, [50_000, 0, 1]);
    let sum = "select (select sum(n) from public.a), (select n from public.c)";
    let row = source.query_one(sum, &[]).await.unwrap();
    assert_eq!((row.str(0).unwrap(), row.str(1).unwrap()), ("1250025000", "7"));

    let mut write = target.copy_in(into).await.unwrap();
    write.write(b"no number\n").await.unwrap();
    write.next();
    write.write(b"1\n").await.unwrap();
    write.next();
    assert_eq!(write.finish().await.unwrap_err().code(), Some("22P02"));
    let row = target.query_one("select count(*) from public.b", &[]).await.unwrap();
    assert_eq!(row.str(0).unwrap(), "0", "what came after it is thrown away");
}

#[tokio::test]
async fn notices_during_copy_do_not_hold_both_sides_up() {
    let server = support::server();
    let mut session = support::session(&server, "postgres").await;
    session
        .execute(
            "create table public.t (a int);
             create function public.shout() returns trigger language plpgsql as
             $$begin raise notice '%', pg_catalog.repeat('x', 8000); return new; end$$;
             create trigger shout before insert on public.t
             for each row execute function public.shout()",
        )
        .await
        .unwrap();
    let copying = async {
        let mut copy = session.copy_in("copy public.t from stdin").await.unwrap();
        for _ in 0..20 {
            copy.write(&b"1\n".repeat(1000)).await.unwrap();
        }
        // Far more than the sockets between us hold, while 160 MB of notices come back.
        for _ in 0..10 {
            copy.write(&b"2\n".repeat(100)).await.unwrap();
        }
        copy.finish().await.unwrap()
    };
    let rows = tokio::time::timeout(LONG, copying).await.expect("a deadlock");
    assert_eq!(rows, [21_000]);
}

#[tokio::test]
async fn notifications_come_when_idle_and_between_answers() {
    let server = support::server();
    let mut listener = support::session(&server, "postgres").await;
    let mut speaker = support::session(&server, "postgres").await;
    listener.execute("listen jobs").await.unwrap();
    assert_eq!(listener.notification(Duration::ZERO).await.unwrap(), None);
    speaker.execute("notify jobs, 'one'").await.unwrap();
    let heard = listener.notification(LONG).await.unwrap().unwrap();
    assert_eq!((heard.channel.as_str(), heard.payload.as_str()), ("jobs", "one"));
    speaker.execute("notify jobs, 'two'; notify jobs, 'three'").await.unwrap();
    listener.query("select 1").await.unwrap();
    assert_eq!(listener.notification(LONG).await.unwrap().unwrap().payload, "two");
    assert_eq!(listener.notification(LONG).await.unwrap().unwrap().payload, "three");
}

#[tokio::test]
async fn a_cancel_handle_ends_a_statement_and_not_the_session() {
    let server = support::server();
    let mut session = support::session(&server, "postgres").await;
    let watcher = support::session(&server, "postgres").await;
    let (handle, pid) = (session.cancel_handle(), session.process_id());
    let asking = session.query("select pg_catalog.pg_sleep(60)");
    let canceling = async {
        until_active(watcher, pid).await;
        handle.cancel().await.unwrap();
    };
    let (answer, ()) = tokio::join!(asking, canceling);
    assert_eq!(answer.unwrap_err().code(), Some("57014"));
    assert_eq!(session.query("select 1").await.unwrap().len(), 1);
}
