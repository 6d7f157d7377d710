//! Whatever fails before the point of no return leaves everything as it was: the same cutover
//! succeeds as soon as the cause is gone.

use std::time::Duration;

use walferry::demo::pgbouncer::PgBouncer;
use walferry::demo::proxy::Proxy;
use walferry::demo::server::StopMode;

use super::{Hook, Load, Stage, assert_all_there};
use crate::support::job::{Ends, route_of};

/// Longest time the load may stand still around a flip that failed: the default of --max-hold is
/// five seconds, and the tests give less.
const BRIEF: Duration = Duration::from_secs(3);

/// The flip fails with this message; the load goes on where it was, in the phase from before.
async fn fails(stage: &mut Stage, load: &Load, arguments: &[&str], message: &str) -> String {
    let before = stage.phase().await;
    let ended = stage.ends.walferry(arguments).await;
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(ended.err.contains(message), "{message}: {}", ended.err);
    load.more(5).await;
    let back = if before == "rolled_back" { "following" } else { &before };
    stage.until_phase(back).await;
    ended.err
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hook_that_fails_in_any_phase_leaves_everything_as_it_was() {
    let mut stage = Stage::start().await;
    let load = Load::start(&stage.ends.source, &stage.ends.source_uri()).await;
    let hook = Hook::new(&stage, Some(&load));
    let route = hook.route();
    load.more(5).await;
    for command in ["cutover", "rollback"] {
        let arguments = [command, "--route", &*route, "--max-hold", "2s"];
        for phase in ["check", "hold", "switch"] {
            hook.on(phase, "echo the disk is gone >&2; exit 3\n");
            let logged = hook.log().len();
            let said = fails(&mut stage, &load, &arguments, "the disk is gone").await;
            assert!(said.contains(&format!("in phase {phase}: failed (exit status: 3)")), "{said}");
            let undone = hook.log().split_off(logged).contains(&format!("{command} undo"));
            assert_eq!(undone, phase != "check", "{:?}", hook.log());
            let last = stage.journal().pop().unwrap();
            let step = match phase {
                "check" => "check routes!",
                "hold" => "fence!",
                _ => "switch!",
            };
            assert_eq!(last, step);
            hook.on(phase, "");
        }
        stage.ends.done(&arguments).await;
        load.more(5).await;
        assert!(stage.journal().iter().all(|step| !step.ends_with('!')), "{:?}", stage.journal());
    }
    let seen = load.stop().await;
    assert!(seen.longest < BRIEF, "{:?}", seen.longest);
    stage.ends.done(&["verify"]).await;
    assert_all_there(&stage.ends.source, &seen, 0);
    let environment = hook.environment("switch");
    for line in [
        "WALFERRY_PHASE=switch".to_string(),
        "WALFERRY_FLIP=rollback".to_string(),
        "WALFERRY_JOB=main".to_string(),
        format!("WALFERRY_SOURCE_PORT={}", stage.ends.source.port()),
        format!("WALFERRY_TARGET_PORT={}", stage.ends.target.port()),
        "WALFERRY_TARGET_DBNAME=app".to_string(),
        "WALFERRY_SOURCE_HOST=127.0.0.1".to_string(),
    ] {
        assert!(environment.lines().any(|found| found == line), "{line}: {environment}");
    }
    assert!(hook.environment("hold").contains("WALFERRY_WAIT_MS="));
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_dies_during_the_flip_leaves_writers_where_they_were() {
    let mut stage = Stage::start().await;
    let load = Load::start(&stage.ends.source, &stage.ends.source_uri()).await;
    let hook = Hook::new(&stage, Some(&load));
    let route = hook.route();
    let arguments = ["cutover", "--route", &*route, "--max-hold", "3s"];
    for (phase, target) in [("hold", true), ("hold", false), ("switch", true), ("switch", false)] {
        load.more(5).await;
        hook.stop_at(phase);
        if phase == "switch" {
            hook.fail_after_stop(phase);
        }
        let (ended, ()) = tokio::join!(stage.ends.walferry(&arguments), async {
            hook.reached().await;
            let server = if target { &stage.ends.target } else { &stage.ends.source };
            tokio::task::block_in_place(|| server.restart(StopMode::Immediate).unwrap());
            hook.go();
        });
        assert_eq!(ended.code, Some(1), "{phase} {target}: {ended:?}");
        hook.on(phase, "");
        stage.until_phase("following").await;
        load.more(5).await;
    }
    stage.ends.done(&["cutover", "--route", &*route]).await;
    load.more(5).await;
    let seen = load.stop().await;
    // What was under way at a crash may be in or not.
    assert_all_there(&stage.ends.target, &seen, 2);
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_stalls_lets_writers_go_on_after_max_hold() {
    let mut ends = Ends::start(15, 15);
    let proxy = Proxy::start(ends.target.port()).unwrap();
    ends.target_via = proxy.uri(&ends.target_uri());
    let mut stage = Stage::of(ends).await;
    let load = Load::start(&stage.ends.source, &stage.ends.source_uri()).await;
    let hook = Hook::new(&stage, Some(&load));
    let route = hook.route();
    load.more(5).await;
    hook.stop_at("hold");
    let arguments = ["cutover", "--route", &*route, "--max-hold", "1s"];
    let cutover = stage.ends.spawn(&arguments);
    hook.reached().await;
    proxy.stall();
    hook.go();
    // The fence goes up; nothing arrives; the fence goes down.
    tokio::time::sleep(Duration::from_millis(1500)).await;
    load.more(20).await;
    assert!(hook.log().contains(&"cutover undo".to_string()), "{:?}", hook.log());
    proxy.restore();
    let ended = cutover.ended().await;
    assert_eq!(ended.code, Some(1), "{ended:?}");
    stage.until_phase("following").await;
    hook.on("hold", "");
    stage.ends.done(&["cutover", "--route", &*route]).await;
    load.more(5).await;
    let seen = load.stop().await;
    assert!(seen.longest < BRIEF, "{:?}", seen.longest);
    assert_all_there(&stage.ends.target, &seen, 0);
    stage.end().await;
}

/// The network to the source goes while the fence is up, and nobody is told: the server itself ends
/// the fence.
#[tokio::test(flavor = "multi_thread")]
async fn a_fence_whose_owner_vanished_without_a_word_comes_down_by_itself() {
    let mut ends = Ends::start(15, 15);
    let proxy = Proxy::start(ends.source.port()).unwrap();
    ends.source_via = proxy.uri(&ends.source_uri());
    let mut stage = Stage::of(ends).await;
    let load = Load::start(&stage.ends.source, &stage.ends.source_uri()).await;
    let hook = Hook::new(&stage, None);
    let route = hook.route();
    load.more(5).await;
    // The target lags by a row that waits for a lock, so that the drain waits too.
    let mut brake = super::session(&stage.ends.target_uri()).await;
    hook.stop_at("hold");
    let arguments = ["cutover", "--route", &*route, "--max-hold", "1s"];
    let cutover = stage.ends.spawn(&arguments);
    hook.reached().await;
    brake.execute("begin; lock table public.t in access exclusive mode").await.unwrap();
    hook.go();
    let fenced =
        "select count(*) > 0 from pg_locks where mode = 'ShareRowExclusiveLock' and granted";
    let mut watching = super::session(&stage.ends.source_uri()).await;
    crate::support::until_sql(&mut watching, fenced).await;
    proxy.stall();
    let waited = load.goes_on_after().await;
    assert!(waited < BRIEF, "{waited:?}");
    proxy.restore();
    brake.execute("rollback").await.unwrap();
    assert_eq!(cutover.ended().await.code, Some(1));
    stage.until_phase("following").await;
    hook.on("hold", "");
    stage.ends.done(&["cutover"]).await;
    let seen = load.stop().await;
    assert_all_there(&stage.ends.target, &seen, 0);
    stage.end().await;
}

/// vitess#16794: the way back lacked a right, and that was found when it was needed.
#[tokio::test(flavor = "multi_thread")]
async fn vitess_16794_a_way_back_that_does_not_work_is_found_before_the_switch() {
    let mut stage = Stage::start().await;
    let load = Load::start(&stage.ends.source, &stage.ends.source_uri()).await;
    load.more(5).await;
    let refuse = "create function public.no() returns trigger language plpgsql as \
                  'begin raise exception ''may not''; end'; \
                  create trigger no before insert or update on walferry.canary_main \
                  for each row execute function public.no(); \
                  alter table walferry.canary_main enable replica trigger no";
    stage.ends.source.psql("app", refuse).unwrap();
    let said = fails(&mut stage, &load, &["cutover"], "the reverse stream is not proven").await;
    assert!(said.contains("walferry status"), "{said}");
    stage.ends.source.psql("app", "drop function public.no() cascade").unwrap();
    stage.ends.done(&["cutover"]).await;
    let seen = load.stop().await;
    assert_all_there(&stage.ends.target, &seen, 0);
    stage.end().await;
}

/// vitess#14276, #13218: a rollback that failed took the way back with it.
#[tokio::test(flavor = "multi_thread")]
async fn vitess_14276_a_rollback_that_fails_can_be_repeated() {
    let mut stage = Stage::start().await;
    stage.ends.done(&["cutover"]).await;
    let load = Load::start(&stage.ends.source, &stage.ends.target_uri()).await;
    let hook = Hook::new(&stage, Some(&load));
    let route = hook.route();
    hook.on("switch", "exit 1\n");
    for _ in 0..3 {
        fails(&mut stage, &load, &["rollback", "--route", &route], "in phase switch").await;
    }
    // vitess#19680: nothing but forward or back leads out of here.
    let ended = stage.ends.walferry(&["cancel"]).await;
    assert_eq!(ended.code, Some(1));
    assert!(ended.err.contains("use rollback or finish"), "{}", ended.err);
    assert_eq!(stage.phase().await, "switched");
    hook.on("switch", "");
    stage.ends.done(&["rollback", "--route", &route]).await;
    load.more(5).await;
    let seen = load.stop().await;
    assert_all_there(&stage.ends.source, &seen, 0);
    stage.ends.done(&["finish"]).await;
    stage.run.ended().await.expect_success();
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_held_by_a_pgbouncer_that_cannot_be_led_back_go_on_once_it_can() {
    let mut stage = Stage::start().await;
    let pooler = PgBouncer::start(&stage.ends.source, &["app"]).unwrap();
    let load = Load::start(&stage.ends.source, &pooler.uri("app")).await;
    load.more(5).await;
    let hook = Hook::new(&stage, None);
    // Where the line is to be kept there is a directory: neither switch nor undo can go on.
    let keep = format!("{}.walferry_main_app", pooler.ini_path().display());
    hook.on("hold", &format!("mkdir {keep}\n"));
    let (first, second) = (route_of(&pooler), hook.route());
    let arguments = ["cutover", "--route", &*first, "--route", &*second];
    let ended = stage.ends.walferry(&arguments).await;
    assert_eq!(ended.code, Some(1));
    assert!(ended.err.contains("undoing failed"), "{}", ended.err);
    std::fs::remove_dir(&keep).unwrap();
    hook.on("hold", "");
    load.more(5).await;
    stage.until_phase("following").await;
    stage.ends.done(&arguments).await;
    load.more(5).await;
    let seen = load.stop().await;
    assert_eq!(seen.errors, Vec::<String>::new());
    assert_all_there(&stage.ends.target, &seen, 0);
    stage.end().await;
}

/// Ctrl-C at the run while clients are held: they are let go.
#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_is_stopped_during_a_cutover_undoes_it_first() {
    let mut stage = Stage::start().await;
    let pooler = PgBouncer::start(&stage.ends.source, &["app"]).unwrap();
    let load = Load::start(&stage.ends.source, &pooler.uri("app")).await;
    load.more(5).await;
    let mut sitting = super::session(&stage.ends.source_uri()).await;
    sitting.execute("begin; insert into public.side values (1, 'x')").await.unwrap();
    let route = route_of(&pooler);
    let cutover = stage.ends.spawn(&["cutover", "--route", &route]);
    stage.until_phase("cutting_over").await;
    let ends = stage.end().await;
    load.more(20).await;
    cutover.signal("INT");
    assert_eq!(cutover.ended().await.code, Some(1));
    sitting.execute("commit").await.unwrap();
    ends.done(&["cutover", "--route", &route]).await;
    load.more(20).await;
    let seen = load.stop().await;
    assert_eq!(seen.errors, Vec::<String>::new());
    assert_all_there(&ends.target, &seen, 0);
}

/// The seal is that of an earlier flip, whatever the fence of this one.
#[tokio::test(flavor = "multi_thread")]
async fn a_rollback_without_a_fence_that_fails_leaves_the_old_side_shut() {
    let stage = Stage::start().await;
    stage.ends.done(&["cutover"]).await;
    let route = "hook:[ $WALFERRY_PHASE != switch ]";
    let ended = stage.ends.walferry(&["rollback", "--fence", "none", "--route", route]).await;
    assert!(ended.err.contains("in phase switch"), "{ended:?}");
    let refused = stage.ends.source.psql("app", "insert into public.t values (1, 'stray')");
    assert!(refused.unwrap_err().to_string().contains("this database has moved"));
    stage.end().await;
}

/// One hook lets clients through, the next fails: what they wrote comes home, with its numbers.
#[tokio::test(flavor = "multi_thread")]
async fn numbers_of_rows_that_came_home_are_not_given_again() {
    numbers_are_not_given_again("cutover").await;
}

/// The same on the way back: the target goes on past the numbers that the source gave meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn numbers_of_rows_written_during_a_rollback_that_failed_are_not_given_again() {
    numbers_are_not_given_again("rollback").await;
}

async fn numbers_are_not_given_again(command: &str) {
    let ends = Ends::start(15, 15);
    let table = "create table public.ident (id int generated always as identity \
        primary key, v int); \
        insert into public.ident (v) select 1 from generate_series(1, 10)";
    ends.source.psql("app", table).unwrap();
    let stage = Stage::of(ends).await;
    let (home, uri) = match command {
        "cutover" => (&stage.ends.source, stage.ends.target_uri()),
        _ => (&stage.ends.target, stage.ends.source_uri()),
    };
    if command == "rollback" {
        stage.ends.done(&["cutover"]).await;
    }
    let hook = Hook::new(&stage, None);
    let sql = "insert into public.ident (v) select 2 from generate_series(1, 5)";
    let psql = "/usr/lib/postgresql/15/bin/psql";
    hook.on("switch", &format!("{psql} -X '{uri}' -c '{sql}' && exit 1\nexit 3\n"));
    let ended = stage.ends.walferry(&[command, "--route", &hook.route()]).await;
    assert!(ended.err.contains("exit status: 1"), "{ended:?}");
    let number = |sql| home.psql("app", sql).unwrap().parse::<i64>().unwrap();
    let last = number("select max(id) from public.ident where v = 2");
    let next = number("select nextval('public.ident_id_seq')");
    assert!(next > last, "the live side gives {next}, and {last} is in use");
    stage.end().await;
}

/// A read-only database that a rollback had opened is shut again when the rollback is undone, for
/// new sessions and for those that came in between.
#[tokio::test(flavor = "multi_thread")]
async fn a_rollback_that_fails_leaves_a_read_only_side_read_only() {
    let stage = Stage::start().await;
    stage.ends.done(&["cutover", "--fence", "read-only"]).await;
    let hook = Hook::new(&stage, None);
    let route = hook.route();
    let write = "insert into public.side values (default, 'stray')";
    let write = write.replace("default", "(select coalesce(max(id), 0) + 1 from public.side)");
    let refused = || stage.ends.source.psql("app", &write).unwrap_err().to_string();
    let setting = "select coalesce(string_agg(setconfig::text, ' '), 'none') \
                   from pg_db_role_setting";
    let shut = "{default_transaction_read_only=on}";
    for fence in ["read-only", "lock"] {
        assert!(refused().contains("read-only transaction"), "{}", refused());
        hook.stop_at("switch");
        hook.fail_after_stop("switch");
        let arguments = ["rollback", "--fence", fence, "--route", &*route, "--max-hold", "20s"];
        let rollback = stage.ends.spawn(&arguments);
        hook.reached().await;
        // Nothing refuses writes there now: it is about to be live.
        let mut between = super::session(&stage.ends.source_uri()).await;
        between.execute(&write).await.unwrap();
        hook.go();
        let ended = rollback.ended().await;
        assert!(ended.err.contains("in phase switch"), "{ended:?}");
        assert!(refused().contains("read-only transaction"), "{fence}: {}", refused());
        assert!(between.execute(&write).await.unwrap_err().is_closed(), "{fence}");
        assert_eq!(stage.ends.source.psql("app", setting).unwrap(), shut, "{fence}");
        stage.ends.target.psql("app", &write).unwrap();
        hook.on("switch", "");
    }
    stage.ends.done(&["rollback", "--fence", "read-only", "--route", &route]).await;
    stage.ends.source.psql("app", &write).unwrap();
    assert_eq!(stage.ends.source.psql("app", setting).unwrap(), "none");
    // What was opened for good is not shut by another flip that fails.
    hook.on("switch", "exit 1\n");
    assert_eq!(stage.ends.walferry(&["cutover", "--route", &route]).await.code, Some(1));
    assert_eq!(stage.ends.source.psql("app", setting).unwrap(), "none");
    assert_eq!(stage.ends.target.psql("app", setting).unwrap(), shut);
    stage.ends.source.psql("app", &write).unwrap();
    stage.ends.done(&["verify"]).await;
    stage.ends.done(&["finish"]).await;
    assert_eq!(stage.ends.target.psql("app", setting).unwrap(), "none");
    stage.run.ended().await.expect_success();
}
