//! Several jobs on one database, and settings and files that were there before.

use walferry::demo::pgbouncer::PgBouncer;

use super::TABLES;
use crate::support::Walferry;
use crate::support::job::{Ends, route_of};

const PHASE: &str = "select phase from walferry.job where name = ";

/// A job of its own for one table, followed.
async fn job(ends: &Ends, name: &str, table: &str) -> Walferry {
    let mut run = ends.spawn(&["run", "--name", name, "--include", table]);
    let begun = std::time::Instant::now();
    let sql = format!("{PHASE}'{name}'");
    while ends.target.psql("app", &sql).ok().as_deref() != Some("following") {
        assert!(!run.has_ended() && begun.elapsed().as_secs() < 60, "{}", run.so_far());
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    run
}

/// A write to a table is refused by its seal.
fn sealed(ends: &Ends, table: &str) -> bool {
    let outcome = ends.source.psql("app", &format!("delete from {table}"));
    if let Err(error) = &outcome {
        assert!(error.to_string().contains("takes no writes here any more"), "{error}");
    }
    outcome.is_err()
}

#[tokio::test(flavor = "multi_thread")]
async fn two_jobs_of_one_database_leave_each_others_fences_alone() {
    let ends = Ends::start(15, 15);
    ends.source.psql("app", TABLES).unwrap();
    let before = ends.inventories().await;
    let one = job(&ends, "one", "public.t").await;
    let two = job(&ends, "two", "public.side").await;
    ends.done(&["cutover", "--name", "one"]).await;
    assert!(sealed(&ends, "public.t") && !sealed(&ends, "public.side"));
    ends.done(&["cutover", "--name", "two"]).await;
    assert!(sealed(&ends, "public.t") && sealed(&ends, "public.side"));
    ends.done(&["rollback", "--name", "two"]).await;
    assert!(sealed(&ends, "public.t"), "the rollback of two opened the seal of one");
    assert!(!sealed(&ends, "public.side"));
    // An undone flip opens only what is its own, too.
    let failed = ["cutover", "--name", "two", "--route", "hook:test $WALFERRY_PHASE != switch"];
    assert_eq!(ends.walferry(&failed).await.code, Some(1));
    assert!(sealed(&ends, "public.t") && !sealed(&ends, "public.side"));
    ends.done(&["finish", "--name", "two"]).await;
    assert!(sealed(&ends, "public.t"), "the end of two opened the seal of one");
    ends.done(&["rollback", "--name", "one"]).await;
    assert!(!sealed(&ends, "public.t"));
    ends.done(&["finish", "--name", "one"]).await;
    one.ended().await.expect_success();
    two.ended().await.expect_success();
    let after = ends.inventories().await;
    assert_eq!(before.0.diff(&after.0), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_only_fence_gives_back_what_the_database_had() {
    let ends = Ends::start(15, 15);
    ends.source.psql("app", TABLES).unwrap();
    let own = "alter database app set default_transaction_read_only = 'on'";
    ends.source.psql("app", own).unwrap();
    let setting = "select coalesce((select string_agg(setconfig::text, ' ') \
                   from pg_db_role_setting), 'none')";
    let before = ends.source.psql("app", setting).unwrap();
    let one = job(&ends, "one", "public.t").await;
    let two = job(&ends, "two", "public.side").await;
    for name in ["one", "two"] {
        ends.done(&["cutover", "--fence", "read-only", "--name", name]).await;
    }
    ends.done(&["rollback", "--fence", "read-only", "--name", "one"]).await;
    let shut = "{default_transaction_read_only=on}";
    assert_eq!(ends.source.psql("app", setting).unwrap(), shut);
    assert_eq!(ends.target.psql("app", setting).unwrap(), shut);
    ends.done(&["rollback", "--fence", "read-only", "--name", "two"]).await;
    assert_eq!(ends.source.psql("app", setting).unwrap(), before);
    for name in ["one", "two"] {
        ends.done(&["finish", "--name", name]).await;
    }
    assert_eq!(ends.source.psql("app", setting).unwrap(), before);
    assert_eq!(ends.target.psql("app", setting).unwrap(), "none");
    // The neighbour's fence may have ended a session of theirs just before their job went away.
    one.ended().await;
    two.ended().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_any_route_kept_is_gone_after_finish() {
    let ends = Ends::start(15, 15);
    ends.source.psql("app", TABLES).unwrap();
    let pooler = PgBouncer::start(&ends.source, &["app"]).unwrap();
    let dir = pooler.ini_path().parent().unwrap().to_path_buf();
    let kept = || {
        let entries = std::fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().file_name());
        entries.filter(|name| name.to_string_lossy().contains("walferry_main")).count()
    };
    let mut run = ends.spawn(&["run"]);
    ends.until_phase(&mut run, "following").await;
    ends.done(&["cutover", "--route", &route_of(&pooler)]).await;
    assert_eq!(kept(), 1);
    // Another route, or none, on the way back: the first one's file is still ours.
    ends.done(&["rollback", "--route", "hook:true"]).await;
    ends.done(&["cutover"]).await;
    ends.done(&["finish"]).await;
    assert_eq!(kept(), 0);
    run.ended().await.expect_success();
}

#[tokio::test(flavor = "multi_thread")]
async fn verify_is_not_misled_by_a_table_that_is_truncated_and_filled_all_the_time() {
    let ends = Ends::start(15, 15);
    ends.source.psql("app", TABLES).unwrap();
    let fill = "begin; truncate public.t; \
                insert into public.t select g, 'x' from generate_series(1, 2000) g; commit";
    ends.source.psql("app", fill).unwrap();
    let mut run = ends.spawn(&["run"]);
    ends.until_phase(&mut run, "following").await;
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let (stopped, mut client) = (stop.clone(), super::session(&ends.source_uri()).await);
    let filling = tokio::spawn(async move {
        while !stopped.load(std::sync::atomic::Ordering::SeqCst) {
            client.execute(fill).await.unwrap();
            tokio::time::sleep(std::time::Duration::from_millis(1500)).await;
        }
    });
    for _ in 0..4 {
        let ended = ends.walferry(&["verify", "--json"]).await;
        assert_eq!(ended.json()["equal"], true, "{}", ended.json());
        assert_eq!(ended.json()["tables"].as_array().unwrap().len(), 5);
    }
    stop.store(true, std::sync::atomic::Ordering::SeqCst);
    filling.await.unwrap();
    run.signal("INT");
    run.ended().await.expect_success();
}

/// The pause of a pooler outlives us: whoever looks next ends it.
#[tokio::test(flavor = "multi_thread")]
async fn run_lets_the_clients_of_a_killed_cutover_go_on() {
    let ends = Ends::start(15, 15);
    ends.source.psql("app", TABLES).unwrap();
    let pooler = PgBouncer::start(&ends.source, &["app"]).unwrap();
    let mut run = ends.spawn(&["run"]);
    ends.until_phase(&mut run, "following").await;
    // Its home alone is enough to show where a job stands.
    let alone = [("WALFERRY_TARGET", &*ends.target_via)];
    let shown = Walferry::spawn_with(&["status", "--json"], &alone).ended().await;
    assert_eq!(shown.expect_success().json()["phase"], "following");
    let dir = ends.source.dir().join("held");
    let hook = format!(
        "hook:if [ $WALFERRY_PHASE = switch ] && [ ! -e {0} ]; then touch {0}; sleep 20; fi",
        dir.display()
    );
    let route = route_of(&pooler);
    let cutover =
        ends.spawn(&["cutover", "--route", &route, "--route", &hook, "--max-hold", "25s"]);
    let there = async || dir.exists();
    crate::support::until("the switch", there).await;
    let mut client = std::process::Command::new("psql")
        .args(["-c", "select 1", &pooler.uri("app")])
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    tokio::time::sleep(std::time::Duration::from_millis(500)).await;
    run.signal("KILL");
    cutover.signal("KILL");
    assert!(client.try_wait().unwrap().is_none(), "the client was not held");
    assert_eq!(ends.status().await["held_clients"], true);
    let begun = std::time::Instant::now();
    let mut run = ends.spawn(&["run"]);
    ends.until_phase(&mut run, "following").await;
    assert!(client.wait().unwrap().success());
    assert!(begun.elapsed().as_secs() < 15, "{:?}", begun.elapsed());
    assert_eq!(ends.status().await["held_clients"], false);
    ends.done(&["cancel"]).await;
    let ended = run.ended().await.expect_success();
    assert!(!ended.err.contains("goes on from here"), "{}", ended.err);
    assert!(ended.err.contains("ended by finish or cancel"), "{}", ended.err);
}
