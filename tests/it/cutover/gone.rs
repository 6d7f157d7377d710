//! Runners, askers and servers that are gone, and do not come back.

use std::time::{Duration, Instant};

use walferry::demo::server::StopMode;

use super::{Stage, TABLES, refused, session};
use crate::support::{self, Inventory, job::Ends};

/// Waits until the runner is at this command.
async fn at(stage: &Stage, verb: &str) {
    let mut home = session(&stage.ends.target_uri()).await;
    let sql = format!(
        "select exists (select 1 from walferry.command where verb = '{verb}' and state = 'running')"
    );
    support::until_sql(&mut home, &sql).await;
}

/// Whoever compares is not left waiting for a runner that has died: it goes on by one of its own.
#[tokio::test(flavor = "multi_thread")]
async fn verify_goes_on_by_itself_where_the_runner_dies() {
    let stage = Stage::start().await;
    let mut target = session(&stage.ends.target_uri()).await;
    target.execute("begin; lock table public.t in access exclusive mode").await.unwrap();
    stage.ends.source.psql("app", "insert into public.t values (1, 'held up')").unwrap();
    let mut verify = stage.ends.spawn(&["verify"]);
    at(&stage, "hold").await;
    stage.run.kill9().await;
    let begun = Instant::now();
    target.execute("rollback").await.unwrap();
    verify.says("equal").await;
    println!("compared {:?} after the end of its runner", begun.elapsed());
    assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
    verify.ended().await.expect_success();
    // With nobody left, it is not waited for either.
    let ended = stage.ends.done(&["verify", "--json"]).await;
    assert_eq!(ended.json()["equal"], true);
}

/// Before 14 no setting ends an idle session, and so the lease of a runner that hangs.
#[tokio::test(flavor = "multi_thread")]
async fn a_runner_that_hangs_is_left_behind_on_a_target_of_12() {
    let mut stage = Stage::of(Ends::start(12, 12)).await;
    let mut target = session(&stage.ends.target_uri()).await;
    // What waits there for its end holds nothing up.
    let holder = "select state = 'idle in transaction' and backend_xid is null \
        and backend_xmin is null and xact_start > now() - interval '5s' \
        from pg_stat_activity where pid = (select pid from pg_locks \
            where locktype = 'advisory' and classid = 2002873446)";
    support::until_sql(&mut target, holder).await;
    stage.run.signal("STOP");
    let begun = Instant::now();
    stage.ends.source.psql("app", "insert into public.t values (1, 'while it hung')").unwrap();
    stage.ends.done(&["cutover"]).await;
    println!("switched {:?} after the runner began to hang", begun.elapsed());
    assert!(begun.elapsed() < Duration::from_secs(60), "{:?}", begun.elapsed());
    stage.run.signal("CONT");
    let runs = "select exists (select from pg_locks \
        where locktype = 'advisory' and classid = 2002873446)";
    support::until_sql(&mut target, runs).await;
    stage.ends.target.psql("app", "insert into public.t values (2, 'after it')").unwrap();
    stage.ends.done(&["rollback"]).await;
    // Whoever of the two had the lease then.
    stage.until_phase("rolled_back").await;
    let ends = stage.end().await;
    let rows = "select string_agg(id::text, ',' order by id) from public.t";
    assert_eq!(ends.source.psql("app", rows).unwrap(), "1,2");
}

/// What takes long before writers are held is done for somebody. Once he has gone, the runner is
/// there for others.
#[tokio::test(flavor = "multi_thread")]
async fn a_cutover_that_nobody_waits_for_is_dropped_while_it_prepares() {
    let ends = Ends::start(15, 15);
    let view = "create function public.slow() returns int language sql as 'select 1'; \
        create materialized view public.late as select public.slow() as a";
    ends.source.psql("app", view).unwrap();
    let stage = Stage::of(ends).await;
    let slow = "create or replace function public.slow() returns int language plpgsql as \
        'begin perform pg_catalog.pg_sleep(100); return 1; end'";
    stage.ends.target.psql("app", slow).unwrap();
    let mut cutover = stage.ends.spawn(&["cutover"]);
    at(&stage, "flip").await;
    let mut target = session(&stage.ends.target_uri()).await;
    let refreshing = "select exists (select 1 from pg_stat_activity where state = 'active' \
        and query like 'refresh materialized view%')";
    support::until_sql(&mut target, refreshing).await;
    cutover.signal("INT");
    cutover.says("no longer waiting").await;
    assert_eq!(cutover.ended().await.code, Some(1));
    let begun = Instant::now();
    stage.ends.done(&["verify"]).await;
    println!("free for others after {:?}", begun.elapsed());
    assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
    assert_eq!(stage.phase().await, "following");
    let end = "select count(pg_terminate_backend(pid)) from pg_stat_activity \
        where query like 'refresh materialized view%'";
    target.query(end).await.unwrap();
    stage.ends.done(&["cutover", "--refresh", "never"]).await;
    stage.end().await;
}

/// The job's state is on the target. Where that is lost, the source is cleaned by the job's name,
/// before a switch and after one, and the other way round.
#[tokio::test(flavor = "multi_thread")]
async fn either_side_is_cleaned_alone_where_the_other_is_lost() {
    let mut ends = Ends::start(15, 15);
    ends.buffer = None;
    ends.source.psql("app", TABLES).unwrap();
    let owned = "create table public.s (id int generated by default as identity primary key)";
    ends.source.psql("app", owned).unwrap();
    let before = Inventory::take(&ends.source_uri()).await;
    let run = ends.spawn(&["run", "--until", "following"]);
    run.ended().await.expect_success();
    let gone = ["cancel", "--target-is-gone"];
    let ended = ends.walferry(&gone).await;
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(ended.err.contains("the target answers and has job main"), "{}", ended.err);

    ends.target.stop(StopMode::Immediate).unwrap();
    let ended = ends.walferry(&["cancel"]).await;
    assert!(ended.code == Some(1) && ended.err.contains("--target-is-gone"), "{ended:?}");
    let ended = ends.walferry(&[&gone[..], &["--name", "mian"]].concat()).await;
    assert_eq!(ended.code, Some(1), "{ended:?}");
    let said = "nothing of a job \"mian\"";
    assert!(ended.err.contains(said) && ended.err.contains("main_forward"), "{}", ended.err);
    let mut other = walferry::pg::Config::parse(&ends.source_uri()).unwrap();
    other = other.with_application_name("walferry run main");
    let alive = walferry::pg::Session::control(&other).await.unwrap();
    let ended = ends.walferry(&gone).await;
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(ended.err.contains("pg_terminate_backend("), "{}", ended.err);
    drop(alive);
    let ended = ends.done(&gone).await;
    assert!(ended.out.contains("dropped replication slot walferry_main_forward"), "{}", ended.out);
    let after = Inventory::take(&ends.source_uri()).await;
    assert_eq!(before.diff(&after), Vec::<String>::new());

    // The home is there again, as a backup of before the job may bring it.
    ends.target.resume().unwrap();
    ends.target.psql("app", "drop schema walferry cascade").unwrap();
    let ended = ends.done(&["cancel", "--source-is-gone", "--json"]).await.json();
    assert_eq!((&ended["job"], &ended["cleaned"][0]), (&"main".into(), &"target".into()));
    assert_eq!(ends.target.psql("app", "select count(*) from pg_replication_origin").unwrap(), "0");
    let ended = ends.walferry(&["cancel", "--source-is-gone"]).await;
    assert!(ended.code == Some(1) && ended.err.contains("nothing of a job"), "{ended:?}");

    switched_and_lost(ends, &before).await;
}

/// A target that takes writes and is lost: the source takes them again, with what had come back.
async fn switched_and_lost(mut ends: Ends, before: &Inventory) {
    let lost = std::mem::replace(&mut ends.target, support::server());
    drop(lost);
    ends.target.psql("postgres", "create database app").unwrap();
    ends.target_via = ends.target_uri();
    let mut run = ends.spawn(&["run"]);
    ends.until_phase(&mut run, "following").await;
    ends.done(&["cutover"]).await;
    for _ in 0..3 {
        ends.target.psql("app", "insert into public.s default values").unwrap();
    }
    let mut source = session(&ends.source_uri()).await;
    support::until_sql(&mut source, "select count(*) = 3 from public.s").await;
    run.kill9().await;
    ends.target.stop(StopMode::Immediate).unwrap();
    let write = "insert into public.s default values";
    assert!(refused(&mut source, write).await.contains("this database has moved"));
    // Its walsender's peer is gone, and so are its sessions, in a moment.
    let mine = "select not exists (select 1 from pg_stat_activity \
        where application_name like 'walferry run%')";
    support::until_sql(&mut source, mine).await;
    let ended = ends.done(&["cancel", "--target-is-gone"]).await;
    for said in ["takes writes again", "sequence public.s_id_seq set to", "in its log"] {
        assert!(ended.err.contains(said), "{said}: {}", ended.err);
    }
    source.execute(write).await.unwrap();
    let after = Inventory::take(&ends.source_uri()).await;
    assert_eq!(before.diff(&after), Vec::<String>::new());
}
