//! Routes that are gone in mid-switch, and their passwords.

use std::time::Duration;

use walferry::demo::pgbouncer::PgBouncer;
use walferry::demo::server::Server;
use walferry::pg::{Config, Purpose, Session};

use super::{Hook, Stage};
use crate::route::sqlmed::{lead_by_fdw, lead_by_plproxy};
use crate::support::job::{Ends, route_of};
use crate::support::{self, Walferry};

const WRITE: &str = "insert into public.side select coalesce(max(id), 0) + 1, 'w' from public.side";

/// Status shows that clients wait, for what, and what to do.
async fn waits(ends: &Ends, phase: &str) {
    let shown = async || {
        let status = ends.status().await;
        let said = status["error"].as_str().unwrap_or_default().to_string();
        status["phase"] == phase && status["held_clients"] == true && said.contains("--skip-route")
    };
    support::until("status tells what is waited for", shown).await;
}

async fn arrives(from: &Server, to: &str) {
    from.psql("app", WRITE).unwrap();
    let count = from.psql("app", "select count(*) from public.side").unwrap();
    let mut there = super::session(to).await;
    support::until_sql(&mut there, &format!("select count(*) = {count} from public.side")).await;
}

/// The pooler had been switched when its host went, and the switch was not made.
#[tokio::test(flavor = "multi_thread")]
async fn a_pooler_that_is_gone_before_the_point_of_no_return_can_be_left_out() {
    let mut stage = Stage::start().await;
    let pooler = PgBouncer::start(&stage.ends.source, &["app"]).unwrap();
    let hook = Hook::new(&stage, None);
    hook.stop_at("switch");
    hook.fail_after_stop("switch");
    let (first, second) = (route_of(&pooler), hook.route());
    let cutover = stage.ends.spawn(&["cutover", "--route", &first, "--route", &second]);
    hook.reached().await;
    drop(pooler);
    hook.go();
    let ended = cutover.ended().await;
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(ended.err.contains("undoing failed"), "{}", ended.err);
    assert!(ended.err.contains("--skip-route"), "{}", ended.err);
    // Nothing but the route is behind: applications write to the source, and it is followed.
    let ends = &stage.ends;
    waits(ends, "cutting_over").await;
    arrives(&ends.source, &ends.target_uri()).await;
    hook.on("switch", "");
    for (command, said) in [
        (&["cutover"][..], "one that was begun has to be undone first"),
        (&["cancel"], "--skip-route"),
        (&["run", "--skip-route", "nothing"], "it waits for pgbouncer"),
    ] {
        let ended = ends.walferry(command).await;
        assert_eq!(ended.code, Some(1), "{command:?}: {ended:?}");
        assert!(ended.err.contains(said), "{command:?}: {}", ended.err);
    }
    // A run that is started anew waits in the same way, and one that should end somewhere says why
    // it does not get there.
    stage.run.kill9().await;
    let ended =
        stage.ends.walferry(&["run", "--until", "following", "--schema-only", "public.log"]);
    let ended = ended.await;
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(ended.err.contains("--skip-route"), "{}", ended.err);
    stage.run = stage.ends.spawn(&["run", "--schema-only", "public.log"]);
    let ends = &stage.ends;
    waits(ends, "cutting_over").await;
    arrives(&ends.source, &ends.target_uri()).await;

    let ended = ends.done(&["run", "--skip-route", "pgbouncer"]).await;
    let line = format!("line \"app\") have host=127.0.0.1 port={} dbname=app", ends.source.port());
    assert!(ended.out.contains(&line) && ended.out.contains("RESUME app"), "{}", ended.out);
    assert!(ended.err.contains("goes on without it"), "{}", ended.err);
    stage.until_phase("following").await;
    assert!(
        stage.journal().iter().any(|s| s.starts_with("skip pgbouncer")),
        "{:?}",
        stage.journal()
    );
    let ends = &stage.ends;
    assert_eq!(ends.status().await["held_clients"], false);
    assert_eq!(ends.status().await["error"], serde_json::Value::Null);
    // Whoever the lost pooler still leads to the target is refused there.
    let refused = ends.target.psql("app", WRITE).unwrap_err().to_string();
    assert!(refused.contains("this database has moved"), "{refused}");
    arrives(&ends.source, &ends.target_uri()).await;
    let ended = ends.walferry(&["run", "--skip-route", "pgbouncer"]).await;
    assert!(ended.code == Some(1) && ended.err.contains("in following"), "{ended:?}");
    ends.done(&["cutover", "--route", &second]).await;
    arrives(&ends.target, &ends.source_uri()).await;
    ends.done(&["verify"]).await;
    ends.done(&["finish"]).await;
    stage.run.ended().await.expect_success();
}

/// The switch was made, and the pooler's host goes before it is told to let clients go on.
#[tokio::test(flavor = "multi_thread")]
async fn a_pooler_that_is_gone_after_the_point_of_no_return_is_told_and_can_be_left_out() {
    let mut stage = Stage::start().await;
    let pooler = PgBouncer::start(&stage.ends.source, &["app"]).unwrap();
    let hook = Hook::new(&stage, None);
    hook.stop_at("switch");
    let (first, second) = (route_of(&pooler), hook.route());
    let cutover = stage.ends.spawn(&["cutover", "--json", "--route", &first, "--route", &second]);
    hook.reached().await;
    drop(pooler);
    hook.go();
    let ended = cutover.ended().await;
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(ended.err.contains("switched, but clients are not let through"), "{}", ended.err);
    assert_eq!(ended.json()["released"], false, "{}", ended.out);
    assert!(ended.json()["unreleased"].as_str().unwrap().contains("pgbouncer"), "{}", ended.out);
    hook.on("switch", "");
    // One route that is gone keeps no other from its release.
    assert_eq!(hook.log().last().unwrap(), "cutover release");
    for _ in 0..2 {
        waits(&stage.ends, "switched").await;
        arrives(&stage.ends.target, &stage.ends.source_uri()).await;
        assert!(stage.ends.source.psql("app", WRITE).is_err());
        // It must be so for a runner that begins here, too.
        stage.run.kill9().await;
        stage.run = stage.ends.spawn(&["run", "--schema-only", "public.log"]);
    }
    waits(&stage.ends, "switched").await;
    let ended = stage.ends.done(&["run", "--skip-route", "pgbouncer"]).await;
    let port = format!("port={} dbname=app", stage.ends.target.port());
    assert!(ended.out.contains(&port), "{}", ended.out);
    let released = async || stage.ends.status().await["held_clients"] == false;
    support::until("nobody is waited for", released).await;
    // Clients that were led over are led back, but by the route that is gone.
    let ended = stage.ends.done(&["rollback"]).await;
    assert!(ended.err.contains("by the route of the last switch: hook"), "{}", ended.err);
    assert!(!ended.err.contains("pgbouncer"), "{}", ended.err);
    assert_eq!(hook.log().last().unwrap(), "rollback release");
    stage.ends.done(&["cutover", "--no-route"]).await;
    assert_eq!(hook.log().last().unwrap(), "rollback release");
    stage.until_phase("switched").await;
    stage.ends.done(&["finish"]).await;
    stage.run.ended().await.expect_success();
}

/// A router with foreign servers of postgres_fdw and plproxy goes in mid-switch, twice: before the
/// point of no return, when its servers were only made ready, and after it. A hook that fails
/// beside it is not called every two seconds for that.
#[tokio::test(flavor = "multi_thread")]
async fn a_router_that_is_gone_can_be_left_out_before_and_after_the_point_of_no_return() {
    let mut stage = Stage::start().await;
    let routers = [support::server(), support::server()];
    for router in &routers {
        lead_by_fdw(router, &stage.ends.source, "app", "side (id int, v text)");
        lead_by_plproxy(router, &stage.ends.source, "app");
    }
    let [first, second] = routers;
    let routes_of = |router: &Server| {
        let uri = router.uri("postgres");
        [format!("fdw:{uri},live"), format!("plproxy:{uri},shop,p0")]
    };
    let ([fdw, plproxy], later) = (routes_of(&first), routes_of(&second));
    let hook = Hook::new(&stage, None);
    hook.stop_at("switch");
    hook.fail_after_stop("switch");
    hook.on("undo", "exit 1\n");
    let third = hook.route();
    let words = ["cutover", "--route", &fdw, "--route", &plproxy, "--route", &third];
    let cutover = stage.ends.spawn(&words);
    hook.reached().await;
    drop(first);
    hook.go();
    let ended = cutover.ended().await;
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(ended.err.contains("--skip-route"), "{}", ended.err);
    waits(&stage.ends, "cutting_over").await;
    let kinds = async || {
        let status = stage.ends.status().await;
        status["error"]
            .as_str()
            .is_some_and(|said| said.contains("pgbouncer, fdw, plproxy or citus"))
    };
    support::until("status names what may be skipped", kinds).await;
    arrives(&stage.ends.source, &stage.ends.target_uri()).await;
    let undone = || hook.log().iter().filter(|line| *line == "cutover undo").count();
    let before = undone();
    tokio::time::sleep(Duration::from_secs(7)).await;
    println!("a failing hook was called {} times in 7 s", undone() - before);
    assert!(undone() - before <= 2, "{:?}", hook.log());
    hook.on("switch", "");
    hook.on("undo", "");
    let ended = stage.ends.done(&["run", "--skip-route", "fdw"]).await;
    let port = stage.ends.source.port();
    let by_hand = format!("have server \"live\" lead to host=127.0.0.1 port={port} dbname=app");
    assert!(ended.out.contains(&by_hand), "{}", ended.out);
    waits(&stage.ends, "cutting_over").await;
    // The runner is told at once; nobody waits for the hook's next turn.
    let ended = stage.ends.done(&["run", "--skip-route", "plproxy"]).await;
    assert!(ended.out.contains("p0 of server \"shop\""), "{}", ended.out);
    stage.until_phase("following").await;
    let refused = stage.ends.target.psql("app", WRITE).unwrap_err().to_string();
    assert!(refused.contains("this database has moved"), "{refused}");
    arrives(&stage.ends.source, &stage.ends.target_uri()).await;

    hook.stop_at("switch");
    let words =
        ["cutover", "--json", "--route", &later[0], "--route", &later[1], "--route", &third];
    let cutover = stage.ends.spawn(&words);
    hook.reached().await;
    drop(second);
    hook.go();
    let ended = cutover.ended().await;
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert_eq!(ended.json()["released"], false, "{}", ended.out);
    waits(&stage.ends, "switched").await;
    arrives(&stage.ends.target, &stage.ends.source_uri()).await;
    for kind in ["plproxy", "fdw"] {
        stage.ends.done(&["run", "--skip-route", kind]).await;
    }
    let released = async || stage.ends.status().await["held_clients"] == false;
    support::until("nobody is waited for", released).await;
    // What a router that is gone keeps is told, and keeps no job from its end.
    let ended = stage.ends.done(&["finish"]).await;
    let told = |line: &&str| line.contains("keeps what was noted there for the way back");
    assert_eq!(ended.err.lines().filter(told).count(), 4, "{}", ended.err);
    stage.run.ended().await.expect_success();
}

/// Nobody is left to wait for it after the end of the job.
#[tokio::test(flavor = "multi_thread")]
async fn finish_names_a_pooler_that_may_still_hold_clients() {
    let stage = Stage::start().await;
    let pooler = PgBouncer::start(&stage.ends.source, &["app"]).unwrap();
    let hook = Hook::new(&stage, None);
    hook.stop_at("switch");
    let (first, second) = (route_of(&pooler), hook.route());
    let cutover = stage.ends.spawn(&["cutover", "--route", &first, "--route", &second]);
    hook.reached().await;
    drop(pooler);
    hook.go();
    assert_eq!(cutover.ended().await.code, Some(1));
    waits(&stage.ends, "switched").await;
    let ended = stage.ends.done(&["finish"]).await;
    let by_hand =
        ended.err.contains("may still be held by pgbouncer") && ended.err.contains("RESUME");
    assert!(by_hand, "{}", ended.err);
    stage.run.ended().await.expect_success();
}

/// From now on the pooler asks everybody for this password.
async fn lock(pooler: &PgBouncer, password: &str) {
    let mut config = Config::parse(&pooler.admin_uri()).unwrap();
    config.application_name = None;
    let mut console = Session::connect(&config, Purpose::PoolerAdmin).await.unwrap();
    let text = std::fs::read_to_string(pooler.ini_path()).unwrap();
    std::fs::write(pooler.ini_path(), text.replace("auth_type = trust", "auth_type = md5"))
        .unwrap();
    let users = pooler.ini_path().with_file_name("users");
    std::fs::write(users, format!("\"postgres\" \"{password}\"\n")).unwrap();
    console.execute("RELOAD").await.unwrap();
}

/// No table of the job's has the word in it.
fn nowhere(ends: &Ends, word: &str) {
    for table in ["job", "command", "journal", "stream"] {
        let sql = format!("select coalesce(string_agg(t::text, ' '), '') from walferry.{table} t");
        let text = ends.target.psql("app", &sql).unwrap();
        assert!(!text.contains(word), "{table}: {text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_routes_password_is_stored_nowhere_and_asked_for_where_it_is_missing() {
    let mut stage = Stage::start().await;
    let pooler = PgBouncer::start(&stage.ends.source, &["app"]).unwrap();
    let bare = route_of(&pooler);
    lock(&pooler, "hush").await;
    let route = bare.replace("postgres@", "postgres:hush@");
    // The runner that is alive knows no password: it is told this one, and nobody else is.
    let ended = stage.ends.done(&["cutover", "--route", &route]).await;
    assert!(ended.err.contains("is not stored") && !ended.err.contains("hush"), "{}", ended.err);
    nowhere(&stage.ends, "hush");
    // By the same route, for which this command has no password.
    let home = tempfile_home(&stage.ends);
    let nobody = [("HOME", &*home)];
    let ended = stage.ends.spawn_on(&["rollback"], &nobody).ended().await;
    // The runner still has it from the cutover.
    let ended = ended.expect_success();
    assert!(!ended.err.contains("is not stored"), "{}", ended.err);
    stage.run.kill9().await;
    stage.run = stage.ends.spawn_on(&["run", "--schema-only", "public.log"], &nobody);
    stage.until_phase("rolled_back").await;
    let ended = stage.ends.spawn_on(&["cutover"], &nobody).ended().await;
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(ended.err.contains("pgbouncer, opening its console"), "{}", ended.err);
    assert!(ended.err.contains("WALFERRY_ROUTE_PASSWORD"), "{}", ended.err);
    let told = [("HOME", &*home), ("WALFERRY_ROUTE_PASSWORD", "hush")];
    stage.ends.spawn_on(&["cutover"], &told).ended().await.expect_success();
    stage.ends.spawn_on(&["rollback"], &told).ended().await.expect_success();
    nowhere(&stage.ends, "hush");

    // Everything is killed in mid-switch; the next run may be on another host.
    let hook = Hook::new(&stage, None);
    for (arguments, variables) in [(vec!["--route", &*route], &nobody[..]), (vec![], &told[..])] {
        hook.stop_at("switch");
        let second = hook.route();
        let cutover = stage.ends.spawn(&["cutover", "--route", &route, "--route", &second]);
        hook.reached().await;
        stage.run.kill9().await;
        cutover.kill9().await;
        hook.go();
        hook.on("switch", "");
        nowhere(&stage.ends, "hush");
        let run = stage.ends.spawn_on(&["run", "--schema-only", "public.log"], &nobody);
        waits(&stage.ends, "cutting_over").await;
        let status = stage.ends.status().await;
        let said = status["error"].as_str().unwrap();
        assert!(said.contains("WALFERRY_ROUTE_PASSWORD") && said.contains("~/.pgpass"), "{said}");
        run.signal("INT");
        run.ended().await.expect_success();
        let arguments = [vec!["run", "--schema-only", "public.log"], arguments].concat();
        stage.run = stage.ends.spawn_on(&arguments, variables);
        stage.until_phase("rolled_back").await;
        let held = pooled(&pooler).await;
        assert!(held < Duration::from_secs(5), "{held:?}");
    }
    stage.ends.done(&["finish"]).await;
    stage.run.ended().await.expect_success();
}

/// A home without password files.
fn tempfile_home(ends: &Ends) -> String {
    let dir = ends.source.dir().join("nobody");
    std::fs::create_dir_all(&dir).unwrap();
    dir.display().to_string()
}

/// How long a statement through the pooler takes.
async fn pooled(pooler: &PgBouncer) -> Duration {
    let uri = pooler.uri("app").replace("postgres@", "postgres:hush@");
    let begun = std::time::Instant::now();
    let config = Config::parse(&uri).unwrap();
    let mut session = Session::connect(&config, Purpose::PoolerAdmin).await.unwrap();
    session.query("select 1").await.unwrap();
    begun.elapsed()
}

/// What a command line says is stored: a secret in it cannot be kept apart.
#[tokio::test(flavor = "multi_thread")]
async fn a_hook_with_a_password_in_its_command_is_refused() {
    let sides =
        ["--source", "postgres://u@127.0.0.1:1/a", "--target", "postgres://u@127.0.0.1:1/b"];
    let arguments = [&["cutover", "--route", "hook:./flip --password=hush"][..], &sides].concat();
    let ended = Walferry::run(&arguments).await;
    assert_eq!(ended.code, Some(2), "{ended:?}");
    assert!(ended.err.contains("a file or a variable") && !ended.err.contains("hush"), "{ended:?}");
}
