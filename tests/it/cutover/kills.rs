//! kill -9 of whoever drives, at every step there and back.

use std::time::Duration;

use walferry::demo::proxy::Proxy;

use super::{Ends, Hook, Load, Stage, assert_all_there, session};
use crate::support;

/// Steps that a kill can hit: those in which the hook waits, and those seen in the journal (a slow
/// network to the home database keeps each of them open for some time).
const STEPS: [&str; 12] = [
    "hook check",
    "hook hold",
    "barrier",
    "hook switch",
    "hook release",
    "canary",
    "fence",
    "drain",
    "rest",
    "sequences",
    "seal",
    "switch",
];

/// Of the latter those that are written down before others of their stretch begin.
const TOGETHER: [&str; 5] = ["drain", "rest", "sequences", "seal", "switch"];

/// What is killed at: each step there and back, or four steps in one direction each, by chance.
fn kills() -> Vec<(&'static str, &'static str)> {
    let ways = ["cutover", "rollback"];
    if std::env::var("WALFERRY_KILLS").is_ok() {
        return STEPS.iter().flat_map(|step| ways.map(|way| (*step, way))).collect();
    }
    let mut some = STEPS[1..5].to_vec();
    fastrand::shuffle(&mut some);
    some.into_iter().zip(ways.into_iter().cycle()).collect()
}

/// Waits until the step has begun, and no longer.
async fn until_step(stage: &Stage, hook: &Hook, step: &str, lines: &str) {
    if step.starts_with("hook ") {
        return hook.reached().await;
    }
    let mut home = session(&stage.ends.target_uri()).await;
    let sql = format!(
        "select exists (select 1 from walferry.journal where id > {lines} and step = '{step}')"
    );
    support::until_sql(&mut home, &sql).await;
    if TOGETHER.contains(&step) {
        tokio::time::sleep(Duration::from_millis(fastrand::u64(0..60))).await;
    }
}

async fn killed_and_repeated(stage: &Stage, load: &Load, hook: &Hook, command: &str, step: &str) {
    let route = hook.route();
    let arguments = [command, "--route", &*route];
    let goal = if command == "cutover" { "switched" } else { "rolled_back" };
    let lines = "select coalesce(max(id), 0) from walferry.journal";
    let lines = stage.ends.target.psql("app", lines).unwrap();
    let switches = hook.log().iter().filter(|line| line.ends_with("switch")).count();
    if let Some(phase) = step.strip_prefix("hook ") {
        hook.stop_at(phase);
    }
    let driver = stage.ends.spawn(&arguments);
    until_step(stage, hook, step, &lines).await;
    driver.kill9().await;
    if let Some(phase) = step.strip_prefix("hook ") {
        hook.go();
        hook.on(phase, "");
    }
    if ["hook check", "hook hold", "canary", "fence", "barrier"].contains(&step) {
        // Nothing is sealed yet: the fence went with its owner.
        let waited = load.goes_on_after().await;
        assert!(waited < Duration::from_secs(1), "{command} {step}: {waited:?}");
    }
    let again = stage.ends.walferry(&arguments).await;
    assert_eq!(stage.phase().await, goal, "{command} {step}: {again:?}");
    if again.code != Some(0) {
        assert!(again.err.contains("has been made already"), "{command} {step}: {again:?}");
        let after: Vec<_> = hook.log().into_iter().filter(|l| l.ends_with("switch")).collect();
        assert_eq!(after.len(), switches + 1, "switched twice: {:?}", hook.log());
    }
    assert_eq!(hook.log().last().unwrap(), &format!("{command} release"));
    load.more(10).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flip_killed_at_any_step_is_finished_by_the_same_command() {
    let mut ends = Ends::start(15, 15);
    let proxy = Proxy::start(ends.target.port()).unwrap();
    ends.target_via = proxy.uri(&ends.target_uri());
    let stage = Stage::of(ends).await;
    let load = Load::start(&stage.ends.source, &stage.ends.source_uri()).await;
    let hook = Hook::new(&stage, Some(&load));
    load.more(10).await;
    // No runner: the command drives the job itself, and is killed.
    stage.run.signal("INT");
    let Stage { ends, run } = stage;
    run.ended().await.expect_success();
    let stage = Stage { run: ends.spawn(&["status"]), ends };
    for (step, command) in kills() {
        let slow = if step.starts_with("hook ") { 0 } else { 15 };
        proxy.delay(Duration::from_millis(slow));
        killed_and_repeated(&stage, &load, &hook, command, step).await;
    }
    proxy.delay(Duration::ZERO);
    let seen = load.stop().await;
    stage.ends.done(&["verify"]).await;
    assert_all_there(&stage.ends.source, &seen, 0);
    assert_all_there(&stage.ends.target, &seen, 0);
}

/// The runner is killed with a cutover under way that was asked for elsewhere: whoever asked is told,
/// and drives the undoing.
#[tokio::test(flavor = "multi_thread")]
async fn whoever_asked_is_told_when_the_runner_dies() {
    let mut stage = Stage::start().await;
    let load = Load::start(&stage.ends.source, &stage.ends.source_uri()).await;
    let hook = Hook::new(&stage, Some(&load));
    let route = hook.route();
    for (phase, code, said) in [("hold", 1, "undone; the job is in following"), ("release", 0, "")]
    {
        load.more(5).await;
        hook.stop_at(phase);
        let asker = stage.ends.spawn(&["cutover", "--route", &route]);
        hook.reached().await;
        stage.run.kill9().await;
        hook.go();
        hook.on(phase, "");
        let ended = asker.ended().await;
        assert_eq!(ended.code, Some(code), "{ended:?}");
        assert!(ended.err.contains(said), "{ended:?}");
        stage.run = stage.ends.spawn(&["run", "--schema-only", "public.log"]);
    }
    stage.until_phase("switched").await;
    load.more(5).await;
    let seen = load.stop().await;
    assert_all_there(&stage.ends.target, &seen, 0);
    assert_eq!(hook.log().last().unwrap(), "cutover release");
    stage.end().await;
}
