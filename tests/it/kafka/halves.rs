//! `walferry capture` and `walferry apply`: two processes, either of which may die.

use std::time::Duration;

use walferry::demo::kafka::Broker;
use walferry::demo::server::StopMode;

use super::broker;
use super::moving::moving;
use crate::support::job::Ends;
use crate::support::{Walferry, until_within};

/// The backend that reads the forward slot; none while nobody does.
fn reader(ends: &Ends) -> Option<String> {
    let sql = "select active_pid from pg_replication_slots \
               where slot_name = 'walferry_main_forward' and active";
    ends.source.psql("app", sql).ok().map(|pid| pid.trim().to_string()).filter(|p| !p.is_empty())
}

/// Kills both halves, the broker and both servers in turn, at random moments.
#[tokio::test(flavor = "multi_thread")]
async fn kill_9_of_capture_apply_broker_and_servers_ends_exact() {
    let broker = Broker::start(&[]).unwrap();
    let (ends, writer) = moving(&broker.address(), 100.0).await;
    let read = |name| std::env::var(name).ok().and_then(|n| n.parse().ok());
    let seed = read("WALFERRY_SEED").unwrap_or_else(|| fastrand::u64(..));
    let kills = read("WALFERRY_KILLS").unwrap_or(5);
    println!("WALFERRY_SEED={seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let start = |half: &str| ends.spawn(&[half, "--take-over"]);
    let (mut capture, mut apply) = (start("capture"), start("apply"));
    until_within(Duration::from_secs(60), "the job", async || {
        !ends.status().await["spool"].is_null()
    })
    .await;
    for turn in 0..kills {
        tokio::time::sleep(Duration::from_millis(random.u64(20..1500))).await;
        match turn % 5 {
            0 => capture = killed(capture, start("capture")).await,
            1 => apply = killed(apply, start("apply")).await,
            2 => {
                broker.kill9().unwrap();
                broker.resume().unwrap();
            }
            3 => ends.source.restart(StopMode::Immediate).unwrap(),
            _ => ends.target.restart(StopMode::Immediate).unwrap(),
        }
        for half in [&mut capture, &mut apply] {
            assert!(!half.has_ended(), "a half ended:\n{}", half.so_far());
        }
    }
    ends.until_phase(&mut apply, "following").await;
    ends.switch_exactly(writer).await;
    ends.done(&["finish"]).await;
    apply.ended().await.expect_success();
    capture.ended().await.expect_success();
}

/// The one that was killed is replaced by one that may have begun to wait for its lease before.
async fn killed(half: Walferry, next: Walferry) -> Walferry {
    half.signal("KILL");
    let ended = half.ended().await;
    assert_eq!(ended.code, None, "a half ended by itself: {}", ended.err);
    next
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_capture_is_taken_over_and_a_second_one_is_refused() {
    let (ends, writer) = moving(&broker().address(), 50.0).await;
    let first = ends.spawn(&["capture"]);
    let mut apply = ends.spawn(&["apply"]);
    ends.until_phase(&mut apply, "following").await;
    let read_by = reader(&ends);
    assert!(read_by.is_some());
    let refused = ends.walferry(&["capture"]).await;
    assert_eq!(refused.code, Some(1), "{refused:?}");
    assert!(refused.err.contains("one runner at a time"), "{}", refused.err);
    let refused = ends.walferry(&["apply"]).await;
    assert_eq!(refused.code, Some(1), "{refused:?}");
    let second = ends.spawn(&["capture", "--take-over"]);
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(reader(&ends), read_by);
    first.signal("KILL");
    first.ended().await;
    until_within(Duration::from_secs(20), "the other to read", async || {
        reader(&ends).is_some_and(|pid| Some(pid) != read_by)
    })
    .await;
    assert!(writer.committed_more(50).await, "the writer is stuck");
    // A run in place of apply leaves the reading to the capture that is alive.
    apply.signal("INT");
    apply.ended().await.expect_success();
    let read_by = reader(&ends);
    let run = ends.spawn(&["run"]);
    let report = writer.stop().await;
    ends.done(&["verify"]).await;
    ends.assert_exact(&report).await;
    assert_eq!(reader(&ends), read_by);
    run.signal("INT");
    run.ended().await.expect_success();
    ends.done(&["cancel"]).await;
    second.ended().await.expect_success();
}

#[tokio::test(flavor = "multi_thread")]
async fn apply_without_a_topic_is_refused_with_what_to_do() {
    let ends = Ends::start(15, 15);
    ends.source.psql("app", "create table t (i int primary key)").unwrap();
    for buffer in ["memory", "spool"] {
        let refused = ends.walferry(&["apply", "--buffer", buffer]).await;
        assert_eq!(refused.code, Some(1), "{refused:?}");
        assert!(refused.err.contains("--buffer kafka:BROKERS/TOPIC"), "{}", refused.err);
        ends.done(&["cancel"]).await;
    }
}

/// Two jobs between the same servers, each by a pair of its own: streams do not mix.
#[tokio::test(flavor = "multi_thread")]
async fn streams_of_several_pairs_share_brokers() {
    let ends = Ends::start(15, 15);
    let mut halves = Vec::new();
    let names = ["a", "b", "c"];
    for name in names {
        ends.source.psql("app", &format!("create table {name} (i int primary key)")).unwrap();
        let buffer = format!("kafka:{}/{}", broker().address(), super::topic());
        let variables = [("WALFERRY_NAME", name), ("WALFERRY_BUFFER", &*buffer)];
        let include = format!("public.{name}");
        let apply = ends.spawn_on(&["apply", "--include", &include], &variables);
        halves.push(ends.spawn_on(&["capture"], &variables));
        // One after another, as all would make schema walferry.
        until_within(Duration::from_secs(60), "it to follow", async || {
            let sql = format!("select phase from walferry.job where name = '{name}'");
            ends.target.psql("app", &sql).is_ok_and(|phase| phase.trim() == "following")
        })
        .await;
        halves.push(apply);
    }
    for name in names {
        let sql = format!("insert into {name} select generate_series(1, 1000)");
        ends.source.psql("app", &sql).unwrap();
    }
    for name in names {
        until_within(Duration::from_secs(30), "rows", async || {
            let count = format!("select count(*) from {name}");
            ends.target.psql("app", &count).is_ok_and(|count| count.trim() == "1000")
        })
        .await;
    }
    for half in halves {
        half.signal("INT");
        half.ended().await.expect_success();
    }
}
