//! Hooks that work, fail, hang, and say too much.

use std::time::{Duration, Instant};

use walferry::id::Stream;
use walferry::route::{Context, Route};

use super::context;

fn sides(flip: Stream) -> Context {
    context(
        flip,
        "postgres://ann:s3cret@src:1,src2:2/a",
        "host=dst port=3 user=bob password='t op' dbname=b",
    )
}

fn route(command: &str) -> Route {
    Route::parse(&format!("hook:{command}")).unwrap()
}

#[tokio::test]
async fn a_hook_is_told_the_phase_the_job_and_both_ends() {
    let file = std::env::temp_dir().join(format!("walferry-hook-{:016x}", fastrand::u64(..)));
    let path = file.display();
    let hook = route(&format!(
        "echo $WALFERRY_PHASE $WALFERRY_JOB $WALFERRY_FLIP ${{WALFERRY_WAIT_MS-}} >> {path}; \
         env | grep -E '^WALFERRY_(SOURCE|TARGET)_' | sort > {path}.env"
    ));
    let forward = sides(Stream::Forward);
    hook.check(&forward).await.unwrap();
    hook.hold(&forward, Duration::from_millis(250)).await.unwrap();
    hook.switch(&forward).await.unwrap();
    hook.release(&forward).await.unwrap();
    hook.undo(&sides(Stream::Reverse)).await.unwrap();
    let said = std::fs::read_to_string(&file).unwrap();
    assert_eq!(
        said.lines().map(str::trim).collect::<Vec<_>>(),
        [
            "check shop cutover",
            "hold shop cutover 250",
            "switch shop cutover",
            "release shop cutover",
            "undo shop rollback",
        ]
    );
    let variables = std::fs::read_to_string(format!("{path}.env")).unwrap();
    assert_eq!(
        variables.lines().collect::<Vec<_>>(),
        [
            "WALFERRY_SOURCE_DBNAME=a",
            "WALFERRY_SOURCE_HOST=src,src2",
            "WALFERRY_SOURCE_PORT=1,2",
            "WALFERRY_SOURCE_USER=ann",
            "WALFERRY_TARGET_DBNAME=b",
            "WALFERRY_TARGET_HOST=dst",
            "WALFERRY_TARGET_PORT=3",
            "WALFERRY_TARGET_USER=bob",
        ]
    );
    let _ = std::fs::remove_file(&file);
    let _ = std::fs::remove_file(format!("{path}.env"));
}

#[tokio::test]
async fn a_hook_that_fails_shows_the_end_of_what_it_said() {
    let hook = route("seq 1 100000 >&2; echo the balancer said no >&2; exit 3");
    let error = hook.switch(&sides(Stream::Forward)).await.unwrap_err().to_string();
    assert!(error.contains("in phase switch: failed (exit status: 3)"), "{error}");
    assert!(error.ends_with("the balancer said no"), "{error}");
    assert!(error.len() < 3000, "{}", error.len());
    let error = route("no-such-command-anywhere").check(&sides(Stream::Forward)).await;
    assert!(error.unwrap_err().to_string().contains("not found"));
}

#[tokio::test]
async fn a_hook_that_prints_secrets_does_not_print_them_through_us() {
    let hook = route(
        "echo \"s3cret and t op, postgres://x:other@h/d password=third\" >&2; : s3cret; exit 1",
    );
    let error = hook.release(&sides(Stream::Forward)).await.unwrap_err().to_string();
    for secret in ["s3cret", "t op", "other", "third"] {
        assert!(!error.contains(secret), "{secret}: {error}");
    }
    assert!(error.contains("*** and ***"), "{error}");
}

#[tokio::test]
async fn a_hook_that_hangs_is_killed_with_all_it_started() {
    let file = std::env::temp_dir().join(format!("walferry-hook-{:016x}", fastrand::u64(..)));
    let command = format!(
        "trap '' TERM; echo working >&2; sleep 1000 & echo $! > {0}.new; mv {0}.new {0}; wait",
        file.display()
    );
    let Route::Hook(hook) = route(&command) else { panic!("not a hook") };
    let hook = Route::Hook(hook.with_limit(Duration::from_millis(500)));
    let began = Instant::now();
    let error = hook.hold(&sides(Stream::Forward), Duration::ZERO).await.unwrap_err().to_string();
    assert!(error.contains("did not end within 0.5 s and was killed: working"), "{error}");
    assert!(began.elapsed() < Duration::from_secs(10));
    let child = std::fs::read_to_string(&file).unwrap();
    let stat = format!("/proc/{}/stat", child.trim());
    // Gone, or a zombie that whoever adopted it has yet to reap.
    let gone = || std::fs::read_to_string(&stat).map_or(true, |s| s.contains(") Z "));
    while !gone() {
        assert!(began.elapsed() < Duration::from_secs(20), "the hook's child lives on");
        tokio::task::yield_now().await;
    }
    std::fs::remove_file(&file).unwrap();
}

#[tokio::test]
async fn a_hook_that_leaves_a_daemon_behind_does_not_hold_us_up() {
    let began = Instant::now();
    route("sleep 3 &").switch(&sides(Stream::Forward)).await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(2));
}

/// The time for a flip ran out in the middle of a hook: it must not switch clients after the undo.
#[tokio::test]
async fn a_hook_that_is_given_up_is_killed_with_all_it_started() {
    let file = std::env::temp_dir().join(format!("walferry-hook-{:016x}", fastrand::u64(..)));
    let command = format!("echo > {0}.begun; (sleep 2; echo > {0}) && true", file.display());
    let begun = file.with_extension("begun");
    let (hook, sides) = (route(&command), sides(Stream::Forward));
    tokio::select! {
        ended = hook.switch(&sides) => panic!("{ended:?}"),
        () = async { while !begun.exists() { tokio::task::yield_now().await } } => {}
    }
    tokio::time::sleep(Duration::from_secs(4)).await;
    assert!(!file.exists(), "the hook went on");
    std::fs::remove_file(begun).unwrap();
}
