//! Servers that take a statement and say nothing more, and commands that meet a runner at work.

use std::time::{Duration, Instant};

use walferry::fault::{Fault, Faulty};
use walferry::pg::{Config, Session};

use super::{Stage, TABLES, session};
use crate::support::job::Ends;
use crate::support::{self, Walferry};

#[tokio::test]
async fn a_statement_without_an_answer_is_named_with_its_server() {
    let server = support::server();
    let config = Config::parse(&server.uri("postgres")).unwrap().labelled("target");
    let mut session = Session::control(&config).await.unwrap();
    session.set_patience(Duration::from_millis(200));
    assert_eq!(session.query("select 1").await.unwrap().len(), 1);
    let begun = Instant::now();
    let error = session.query("select  'slow',\n pg_catalog.pg_sleep(20)").await.unwrap_err();
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    let said = error.to_string();
    for part in ["target 127.0.0.1:", "select 'slow', pg_catalog.pg_sleep(20)", "did not answer"] {
        assert!(said.contains(part), "{part}: {said}");
    }
    assert_eq!(error.fault(), Fault::Retry);
    // Answers to come must not be taken for those of the next statement.
    let after = session.query_one("select 2", &[]).await.unwrap_err();
    assert!(after.is_closed(), "{after}");
}

/// Every command that asks the home database has an end, and says where it hangs.
#[tokio::test(flavor = "multi_thread")]
async fn a_home_database_that_hangs_keeps_no_command_for_ever() {
    let mut stage = Stage::start().await;
    let mut hanging = session(&stage.ends.target_uri()).await;
    hanging.execute("begin; lock table walferry.job in access exclusive mode").await.unwrap();
    let (status, finish, cutover) = tokio::join!(
        stage.ends.walferry(&["status"]),
        stage.ends.walferry(&["finish"]),
        stage.ends.walferry(&["cutover"]),
    );
    for ended in [status, finish, cutover] {
        assert_eq!(ended.code, Some(1), "{ended:?}");
        for part in ["did not answer within 30 s", "walferry.job", "target 127.0.0.1:"] {
            assert!(ended.err.contains(part), "{part}: {}", ended.err);
        }
    }
    hanging.execute("rollback").await.unwrap();
    stage.until_phase("following").await;
    stage.ends.done(&["cutover"]).await;
    stage.end().await;
}

/// Nobody who gives up wants to wait for the end of the copy.
#[tokio::test(flavor = "multi_thread")]
async fn cancel_stops_a_runner_in_the_middle_of_the_copy() {
    let mut ends = Ends::start(15, 15);
    ends.source.psql("app", TABLES).unwrap();
    // Each row of this table takes a minute to be written on the target.
    let slow = "create function public.slow(int) returns bool language sql as 'select true'; \
        create table public.late (id int primary key check (public.slow(id))); \
        insert into public.late values (1), (2); \
        create or replace function public.slow(int) returns bool language plpgsql as \
            'begin perform pg_catalog.pg_sleep(60); return true; end'";
    ends.source.psql("app", slow).unwrap();
    ends.buffer = None;
    let before = ends.inventories().await;
    let mut run = ends.spawn(&["run"]);
    ends.until_phase(&mut run, "copying").await;
    // Nor does anybody wait for that who asks for what comes later.
    let begun = Instant::now();
    for (command, said) in [("cutover", "starts from following"), ("verify", "keeps level")] {
        let ended = ends.walferry(&[command]).await;
        assert!(ended.code == Some(1) && ended.err.contains(said), "{command}: {ended:?}");
    }
    let ended = ends.done(&["cancel"]).await;
    assert!(ended.out.contains("canceled"), "{ended:?}");
    assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
    println!("canceled after {:?}", begun.elapsed());
    let over = run.ended().await.expect_success();
    assert!(over.err.contains("ended by finish or cancel"), "{}", over.err);
    let after = ends.inventories().await;
    assert_eq!(before.0.diff(&after.0), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_that_is_no_job_is_told_with_those_that_are() {
    let stage = Stage::start().await;
    for command in ["status", "cutover", "rollback", "verify", "finish", "cancel"] {
        let ended = stage.ends.walferry(&[command, "--name", "mian"]).await;
        assert_eq!(ended.code, Some(1), "{command}: {ended:?}");
        let said = ended.err.contains("no job \"mian\"") && ended.err.contains("there is main");
        assert!(said, "{command}: {}", ended.err);
    }
    stage.end().await;
}

/// The point of no return is durable whatever the database's own default is.
#[tokio::test(flavor = "multi_thread")]
async fn the_switch_is_durable_where_commits_usually_are_not() {
    let ends = Ends::start(15, 15);
    ends.target.psql("postgres", "alter database app set synchronous_commit = off").unwrap();
    let stage = Stage::of(ends).await;
    let note = "create table walferry.seen (phase text, setting text); \
        create function walferry.note() returns trigger language plpgsql as $$ begin \
            insert into walferry.seen values (new.phase, current_setting('synchronous_commit')); \
            return new; end $$; \
        create trigger note before update on walferry.job \
            for each row execute function walferry.note()";
    stage.ends.target.psql("app", note).unwrap();
    stage.ends.done(&["cutover"]).await;
    let seen = "select distinct setting from walferry.seen where phase = 'switched'";
    assert_eq!(stage.ends.target.psql("app", seen).unwrap(), "local");
    stage.end().await;
}

/// What a newcomer may type in the wrong order: each is refused with what to do instead, and
/// nothing is changed.
#[tokio::test(flavor = "multi_thread")]
async fn commands_in_the_wrong_order_are_told_what_comes_first() {
    let mut stage = Stage::start().await;
    let refused = async |ends: &Ends, commands: &[(&str, &str)]| {
        for (command, said) in commands {
            let arguments: Vec<&str> = command.split(' ').collect();
            let ended = ends.walferry(&arguments).await;
            assert_eq!(ended.code, Some(1), "{command}: {ended:?}");
            assert!(ended.err.contains(said), "{command}: {}", ended.err);
        }
    };
    refused(
        &stage.ends,
        &[
            ("rollback", "before that, cancel gives up"),
            ("finish", "use cancel"),
            ("run", "run by another process"),
            ("run --skip-route hook", "no switch waits for one"),
        ],
    )
    .await;
    stage.ends.done(&["cutover"]).await;
    refused(
        &stage.ends,
        &[("cutover", "rollback leads back"), ("cancel", "use rollback or finish")],
    )
    .await;
    stage.ends.done(&["rollback"]).await;
    refused(&stage.ends, &[("rollback", "cutover leads over again")]).await;
    let status = stage.ends.status().await;
    assert_eq!(status["phase"], "rolled_back");
    for key in [
        "job",
        "phase",
        "lag_bytes",
        "lag_seconds",
        "received_lsn",
        "decoded_lsn",
        "buffered_lsn",
        "applied_lsn",
        "durable_lsn",
        "confirmed_lsn",
        "tables",
        "reverse",
        "error",
    ] {
        assert!(status.get(key).is_some(), "{key}: {status}");
    }
    for key in [
        "name",
        "rows_copied",
        "bytes_copied",
        "copy_state",
        "decoded",
        "applied",
        "filtered",
        "quarantined",
    ] {
        assert!(status["tables"][0].get(key).is_some(), "{key}: {status}");
    }
    let outcome = stage.ends.done(&["cutover", "--json"]).await.json();
    for key in ["switched_lsn", "fenced_ms", "steps", "released"] {
        assert!(outcome.get(key).is_some(), "{key}: {outcome}");
    }
    assert!(outcome["steps"][0]["name"].is_string() && outcome["steps"][0]["ms"].is_number());
    let verified = stage.ends.done(&["verify", "--json"]).await.json();
    assert_eq!(verified["equal"], true);
    for key in ["name", "rows", "equal", "differing"] {
        assert!(verified["tables"][0].get(key).is_some(), "{key}: {verified}");
    }
    stage.until_phase("switched").await;
    stage.ends.done(&["finish", "--keep-history"]).await;
    stage.run.ended().await.expect_success();
    for command in ["run", "cutover", "rollback", "verify", "cancel"] {
        let ended = stage.ends.walferry(&[command]).await;
        assert_eq!(ended.code, Some(1), "{command}: {ended:?}");
        assert!(ended.err.contains("finished"), "{command}: {}", ended.err);
    }
    let ended = stage.ends.done(&["status"]).await;
    assert!(ended.out.contains("the job has ended"), "{}", ended.out);
    // Named once, the job is known; typed without its servers, it is usage.
    let ended = Walferry::run(&["status"]).await;
    assert_eq!(ended.code, Some(2), "{ended:?}");
}
