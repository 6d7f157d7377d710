//! The whole job through a topic, by the built program.

use std::time::Duration;

use walferry::demo::kafka::Broker;
use walferry::demo::ledger;
use walferry::demo::server::StopMode;
use walferry::demo::writer::{Options, Writer};

use super::broker;
use crate::spool::{caught_up, number, outage};
use crate::support::job::{Ends, conserved};
use crate::support::until_within;

pub async fn moving(brokers: &str, rate: f64) -> (Ends, Writer) {
    let ends = Ends::start(15, 15).with_kafka(brokers);
    let writer = ends.writer(rate).await;
    (ends, writer)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_move_through_a_topic_there_and_back_ends_exact() {
    let (ends, writer) = moving(&broker().address(), 150.0).await;
    let mut run = ends.spawn(&["run"]);
    ends.until_phase(&mut run, "following").await;
    assert!(writer.committed_more(200).await, "the writer is stuck");
    ends.done(&["verify"]).await;
    let text = ends.done(&["status"]).await.out;
    assert!(text.contains("kafka    topic it-") && text.contains("cost nothing"), "{text}");
    ends.done(&["cutover"]).await;
    let report = writer.stop().await;
    ends.done(&["verify"]).await;
    ends.assert_exact(&report).await;
    // What is written there goes back by the other topic.
    let more = Writer::start(Options::new(&ends.target_uri())).await.unwrap();
    assert!(more.committed_more(200).await, "the writer is stuck");
    let report = more.stop().await;
    ends.done(&["verify"]).await;
    let check = ledger::check(&ends.source_uri(), &report.ledger).await.unwrap();
    assert!(check.is_exact(), "{check:?}");
    conserved(&ends.status().await["tables"]);
    ends.done(&["rollback"]).await;
    let finished = ends.done(&["finish"]).await;
    run.ended().await.expect_success();
    assert!(finished.err.contains("topic it-"), "{}", finished.err);
    assert!(finished.err.contains(".reverse"), "{}", finished.err);
}

/// Of walferry, the broker, the source and the target: one dies at a time, at random moments, each
/// once.
/// `WALFERRY_KILLS` says how often; `WALFERRY_SEED` repeats a run.
#[tokio::test(flavor = "multi_thread")]
async fn kill_9_of_walferry_broker_and_servers_at_random_moments_ends_exact() {
    let broker = Broker::start(&[]).unwrap();
    let (ends, writer) = moving(&broker.address(), 100.0).await;
    let read = |name| std::env::var(name).ok().and_then(|n| n.parse().ok());
    let seed = read("WALFERRY_SEED").unwrap_or_else(|| fastrand::u64(..));
    let kills = read("WALFERRY_KILLS").unwrap_or(4);
    println!("WALFERRY_SEED={seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let mut run = ends.spawn(&["run"]);
    // A broker or server that never answered is an error, as it may be a mistake in its name.
    until_within(Duration::from_secs(60), "the job", async || {
        !ends.status().await["spool"].is_null()
    })
    .await;
    for turn in 0..kills {
        tokio::time::sleep(Duration::from_millis(random.u64(20..1500))).await;
        match turn % 4 {
            0 => {
                broker.kill9().unwrap();
                tokio::time::sleep(Duration::from_millis(random.u64(0..500))).await;
                broker.resume().unwrap();
            }
            1 => ends.source.restart(StopMode::Immediate).unwrap(),
            2 => ends.target.restart(StopMode::Immediate).unwrap(),
            _ => {
                run.signal("KILL");
                let ended = run.ended().await;
                assert_eq!(ended.code, None, "a run ended by itself: {}", ended.err);
                run = ends.spawn(&["run"]);
            }
        }
        assert!(!run.has_ended(), "the run ended:\n{}", run.so_far());
    }
    ends.until_phase(&mut run, "following").await;
    ends.switch_exactly(writer).await;
    ends.done(&["finish"]).await;
    run.ended().await.expect_success();
}

/// `WALFERRY_OUTAGE` says for how many seconds the target is away.
#[tokio::test(flavor = "multi_thread")]
async fn a_target_outage_goes_into_the_topic() {
    let (ends, writer) = moving(&broker().address(), 50.0).await;
    ends.source.psql("app", "create table spool_load (i int, t text)").unwrap();
    ends.source.psql("app", "alter table spool_load replica identity full").unwrap();
    let mut run = ends.spawn(&["run", "--wal-budget", "48MB"]);
    ends.until_phase(&mut run, "following").await;
    let position = "select pg_current_wal_insert_lsn() - '0/0'";
    let begun = number(&ends.source, position);
    let seconds: Option<usize> =
        std::env::var("WALFERRY_OUTAGE").ok().map(|seconds| seconds.parse().unwrap());
    let rounds = seconds.map_or(9, |seconds| seconds * 4 / 5);
    let most = outage(&ends, &mut run, rounds).await;
    let written = number(&ends.source, position) - begun;
    println!("{} MB written, at most {} MB kept", written >> 20, most >> 20);
    assert!(written > 48 << 20, "too little was written: {written}");
    assert!(most < 48 << 20, "{most} bytes of WAL were kept");
    // The runner dies as well; another goes on from the topic.
    run.kill9().await;
    ends.target.resume().unwrap();
    let run = ends.spawn(&["run"]);
    let report = writer.stop().await;
    caught_up(&ends, rounds).await;
    ends.done(&["verify"]).await;
    ends.assert_exact(&report).await;
    conserved(&ends.status().await["tables"]);
    run.signal("INT");
    run.ended().await.expect_success();
}
