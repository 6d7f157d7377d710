//! What must hold before anybody is stopped.

use super::{Load, Stage, assert_all_there, session};
use crate::support::Inventory;

/// pgdog#1121, #1201: a lag that was not yet known looked like none.
#[tokio::test(flavor = "multi_thread")]
async fn pgdog_1121_and_1201_a_stream_that_is_behind_is_not_switched() {
    let mut stage = Stage::start().await;
    let load = Load::start(&stage.ends.source, &stage.ends.source_uri()).await;
    load.more(5).await;
    // What is applied waits for this lock, and the runner is new: it has measured nothing yet.
    let mut brake = session(&stage.ends.target_uri()).await;
    stage.run.kill9().await;
    brake.execute("begin; lock table public.t in share mode").await.unwrap();
    load.more(20).await;
    stage.run = stage.ends.spawn(&["run", "--schema-only", "public.log"]);
    let alive = async || stage.ends.status().await["runner"].is_string();
    crate::support::until("the runner is there", alive).await;
    let ended = stage.ends.walferry(&["cutover", "--max-lag", "300ms"]).await;
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(ended.err.contains("not proven") || ended.err.contains("behind"), "{}", ended.err);
    load.more(5).await;
    brake.execute("rollback").await.unwrap();
    stage.ends.done(&["cutover"]).await;
    let seen = load.stop().await;
    assert_all_there(&stage.ends.target, &seen, 0);
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dry_run_changes_nothing_and_what_is_in_the_way_is_named() {
    let mut stage = Stage::start().await;
    // What one dry run makes (the armed way back) is all that any makes.
    let ready = stage.ends.done(&["cutover", "--dry-run", "--json"]).await.json();
    assert_eq!(ready["switched_lsn"], "0/0");
    assert_eq!(ready["fenced_ms"], 0.0);
    stage.until_phase("following").await;
    let inventories = async || {
        let uris = [stage.ends.source_uri(), stage.ends.target_uri()];
        let source = Inventory::take_beside_runner(&uris[0]).await;
        (source, Inventory::take_beside_runner(&uris[1]).await)
    };
    let before = inventories().await;
    stage.ends.done(&["cutover", "--dry-run"]).await;
    assert_eq!(stage.phase().await, "following");
    let after = inventories().await;
    assert_eq!(before.0.diff(&after.0), Vec::<String>::new());
    assert_eq!(before.1.diff(&after.1), Vec::<String>::new());
    stage.ends.source.psql("app", "insert into public.t values (1, 'still mine')").unwrap();

    // Made since: its rows would stay behind.
    let new = "create table public.late (a int primary key); insert into public.late values (1)";
    stage.ends.source.psql("app", new).unwrap();
    let part =
        "create table public.parts_top partition of public.parts for values from (200) to (300)";
    stage.ends.source.psql("app", part).unwrap();
    let ended = stage.ends.walferry(&["cutover"]).await;
    assert_eq!(ended.code, Some(1), "{ended:?}");
    for part in ["public.late", "publication", "public.parts_top", "not on the target", "drop"] {
        assert!(ended.err.contains(part), "{part}: {}", ended.err);
    }
    stage.ends.source.psql("app", "drop table public.late").unwrap();
    stage.ends.target.psql("app", part).unwrap();

    // A table of the target alone would refuse the way back, when it is too late.
    stage.ends.target.psql("app", "create table public.alone (a int)").unwrap();
    let ended = stage.ends.walferry(&["cutover"]).await;
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(ended.err.contains("public.alone is not on the source"), "{}", ended.err);
    stage.ends.target.psql("app", "drop table public.alone").unwrap();

    // Somebody else writes to the target.
    stage.ends.done(&["cutover", "--dry-run"]).await;
    stage.ends.target.psql("app", "insert into public.side values (7, 'rogue')").unwrap();
    let ended = stage.ends.walferry(&["cutover"]).await;
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(ended.err.contains("public.side"), "{}", ended.err);
    assert!(ended.err.contains("something else than walferry"), "{}", ended.err);
    stage.until_phase("following").await;
    stage.ends.done(&["cancel"]).await;
    stage.run.ended().await.expect_success();
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_cutovers_at_once_one_switches_and_the_other_is_told() {
    let stage = Stage::start().await;
    // With a runner, then without one.
    let mut run = Some(stage.run);
    for command in ["cutover", "rollback"] {
        let arguments = [command, "--json"];
        let (a, b) = tokio::join!(stage.ends.walferry(&arguments), stage.ends.walferry(&arguments));
        let (won, lost) = if a.code == Some(0) { (a, b) } else { (b, a) };
        assert_eq!((won.code, lost.code), (Some(0), Some(1)), "{won:?} {lost:?}");
        assert!(lost.err.contains("has been made already"), "{lost:?}");
        let outcome = won.json();
        let steps: Vec<_> = outcome["steps"].as_array().unwrap().iter().collect();
        let names: Vec<_> = steps.iter().map(|step| step["name"].as_str().unwrap()).collect();
        let expected = [
            "check routes",
            "canary",
            "lag",
            "fence",
            "barrier",
            "drain",
            "sequences",
            // The data has an unlogged table.
            "rest",
            "seal",
            "switch",
            "point of no return",
            "release",
        ];
        assert_eq!(names, expected);
        assert!(steps.iter().all(|step| step["ms"].as_f64().unwrap() >= 0.0));
        assert!(outcome["fenced_ms"].as_f64().unwrap() > 0.0);
        assert!(outcome["switched_lsn"].as_str().unwrap().contains('/'));
        if let Some(run) = run.take() {
            run.signal("INT");
            run.ended().await.expect_success();
        }
    }
    assert_eq!(stage.ends.status().await["phase"], "rolled_back");
}

const SEQUENCES: &str = "create sequence public.plain; create sequence public.cached cache 50; \
    create sequence public.down increment -3 minvalue -100000; \
    create sequence public.round maxvalue 10 cycle; \
    create sequence public.little as smallint maxvalue 100; \
    create table public.ident (id int generated always as identity primary key, v text)";

/// What a sequence has handed out in a session of its own.
async fn take(uri: &str, name: &str, times: u32) -> Vec<i64> {
    let mut session = session(uri).await;
    let sql = format!("select nextval('public.{name}') from generate_series(1, {times})");
    session.query(&sql).await.unwrap().iter().map(|row| row.parse(0).unwrap()).collect()
}

/// akingundogdu.com: sequences of a billing system were found behind two days before the switch.
#[tokio::test(flavor = "multi_thread")]
async fn akingundogdu_no_sequence_gives_a_value_twice() {
    let ends = super::Ends::start(15, 15);
    ends.source.psql("app", SEQUENCES).unwrap();
    let stage = Stage::of(ends).await;
    let source = stage.ends.source_uri();
    let names = ["plain", "cached", "down", "little"];
    let mut taken: std::collections::BTreeMap<&str, Vec<i64>> = Default::default();
    for name in names {
        taken.entry(name).or_default().extend(take(&source, name, 90).await);
    }
    take(&source, "round", 8).await;
    stage.ends.source.psql("app", "insert into public.ident (v) values ('a'), ('b')").unwrap();
    let uris = [stage.ends.target_uri(), source.clone(), stage.ends.target_uri()];
    for (command, uri) in ["cutover", "rollback", "cutover"].iter().zip(&uris) {
        // Clients that only take numbers: no fence holds them.
        let live = if *uri == source { stage.ends.target_uri() } else { source.clone() };
        let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        let (stopped, mut client) = (stop.clone(), session(&live).await);
        let counting = tokio::spawn(async move {
            let mut taken = Vec::new();
            while !stopped.load(std::sync::atomic::Ordering::SeqCst) {
                let rows = client.query("select nextval('public.plain')").await.unwrap();
                taken.push(rows[0].parse::<i64>(0).unwrap());
            }
            taken
        });
        stage.ends.done(&[command]).await;
        stop.store(true, std::sync::atomic::Ordering::SeqCst);
        taken.entry("plain").or_default().extend(counting.await.unwrap());
        for name in names {
            taken.entry(name).or_default().extend(take(uri, name, 3).await);
        }
        let sql = "insert into public.ident (v) values ('c') returning id";
        session(uri).await.query(sql).await.unwrap();
    }
    for (name, mut values) in taken {
        let count = values.len();
        values.sort();
        values.dedup();
        assert_eq!(values.len(), count, "{name} gave a value twice");
    }
    // A cycling sequence goes on where it was.
    assert_eq!(take(&stage.ends.target_uri(), "round", 4).await, [9, 10, 1, 2]);
    stage.end().await;
}

/// Clients that only take values are held by no fence; those of a large CACHE take a block each.
#[tokio::test(flavor = "multi_thread")]
async fn sequences_are_past_every_value_taken_during_a_long_switch() {
    let ends = super::Ends::start(15, 15);
    let sequences = "create sequence public.busy; create sequence public.blocks cache 5000";
    ends.source.psql("app", sequences).unwrap();
    let stage = Stage::of(ends).await;
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let mut clients = Vec::new();
    for name in ["busy", "busy", "blocks", "blocks"] {
        let (stopped, mut client) = (stop.clone(), session(&stage.ends.source_uri()).await);
        let sql = format!("select max(nextval('public.{name}')) from generate_series(1, 100)");
        clients.push(tokio::spawn(async move {
            let mut last = 0_i64;
            while !stopped.load(std::sync::atomic::Ordering::SeqCst) {
                last = client.query(&sql).await.unwrap()[0].parse(0).unwrap();
                tokio::time::sleep(std::time::Duration::from_millis(5)).await;
            }
            (name, last)
        }));
    }
    tokio::time::sleep(std::time::Duration::from_millis(300)).await;
    let hook = "hook:if [ $WALFERRY_PHASE = switch ]; then sleep 1; fi";
    stage.ends.done(&["cutover", "--route", hook]).await;
    stop.store(true, std::sync::atomic::Ordering::SeqCst);
    let mut last: std::collections::BTreeMap<&str, i64> = Default::default();
    for client in clients {
        let (name, value) = client.await.unwrap();
        last.entry(name).and_modify(|last| *last = value.max(*last)).or_insert(value);
    }
    for (name, last) in last {
        let next = take(&stage.ends.target_uri(), name, 1).await[0];
        assert!(next > last, "{name}: the source gave {last}, the target {next}");
    }
    stage.end().await;
}

/// Sequences are set while the last changes still arrive, one of which restarted one on the source.
#[tokio::test(flavor = "multi_thread")]
async fn a_sequence_restarted_by_the_last_change_stays_past_every_value() {
    let ends = super::Ends::start(15, 15);
    let table =
        "create table public.z (id int generated by default as identity primary key, v int)";
    ends.source.psql("app", table).unwrap();
    let stage = Stage::of(ends).await;
    stage.ends.done(&["cutover", "--dry-run"]).await;
    let mut client = session(&stage.ends.source_uri()).await;
    // The fence waits for this transaction at the first of its tables, and what is applied of it
    // for a lock.
    client.execute("begin; insert into public.t values (1, 'x')").await.unwrap();
    let mut brake = session(&stage.ends.target_uri()).await;
    brake.execute("begin; lock table public.z in share mode").await.unwrap();
    let cutover = stage.ends.spawn(&["cutover", "--max-hold", "20s"]);
    let fences = "select count(*) from pg_locks where not granted";
    let fenced = async || stage.ends.source.psql("app", fences).unwrap() != "0";
    crate::support::until("the fence waits", fenced).await;
    let last = "truncate public.z restart identity; insert into public.z (v) values (1), (2), (3)";
    client.execute(&format!("{last}; commit")).await.unwrap();
    let value = "select last_value > 1000 from public.z_id_seq";
    let is_set = async || stage.ends.target.psql("app", value).unwrap() == "t";
    crate::support::until("the sequence is set", is_set).await;
    assert_ne!(stage.ends.target.psql("app", fences).unwrap(), "0", "it was applied already");
    brake.execute("rollback").await.unwrap();
    cutover.ended().await.expect_success();
    let rows = stage.ends.target.psql("app", "select count(*) from public.z").unwrap();
    assert_eq!(rows, "3");
    assert!(take(&stage.ends.target_uri(), "z_id_seq", 1).await[0] > 1000);
    stage.end().await;
}
