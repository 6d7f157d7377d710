//! Topics that are not as they should be: each is told by name, and nothing is lost.

use std::time::Duration;

use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::config::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::producer::{BaseProducer, BaseRecord, Producer};
use walferry::demo::kafka::Broker;
use walferry::demo::server::StopMode;
use walferry::lsn::Lsn;

use super::moving::moving;
use super::{broker, topic};
use crate::support::job::{Ends, conserved};
use crate::support::{Walferry, until_within};

const PATIENCE: Duration = Duration::from_secs(10);

fn client(broker: &Broker) -> ClientConfig {
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", broker.address());
    config
}

fn admin(broker: &Broker) -> AdminClient<DefaultClientContext> {
    client(broker).create().unwrap()
}

async fn create(broker: &Broker, topic: &str, partitions: i32, settings: &[(&str, &str)]) {
    let new = NewTopic::new(topic, partitions, TopicReplication::Fixed(1));
    let new = settings.iter().fold(new, |new, (name, value)| new.set(name, value));
    let options = AdminOptions::new().operation_timeout(Some(PATIENCE));
    let made = admin(broker).create_topics(&[new], &options).await.unwrap();
    made.into_iter().for_each(|topic| drop(topic.unwrap()));
}

async fn delete(broker: &Broker, topic: &str) {
    let options = AdminOptions::new().operation_timeout(Some(PATIENCE));
    let gone = admin(broker).delete_topics(&[topic], &options).await.unwrap();
    gone.into_iter().for_each(|topic| drop(topic.unwrap()));
}

/// First offset, and the one after the last.
fn extent(broker: &Broker, topic: &str) -> (i64, i64) {
    let consumer: BaseConsumer = client(broker).create().unwrap();
    consumer.fetch_watermarks(topic, 0, PATIENCE).unwrap_or((-1, -1))
}

fn put(broker: &Broker, topic: &str, value: &[u8]) {
    let producer: BaseProducer = client(broker).create().unwrap();
    let record = BaseRecord::<(), [u8]>::to(topic).partition(0).payload(value);
    producer.send(record).map_err(|(error, _)| error).unwrap();
    producer.flush(PATIENCE).unwrap();
}

fn topic_of(ends: &Ends) -> String {
    let (_, topic) = ends.buffer.as_deref().unwrap().rsplit_once('/').unwrap();
    topic.to_string()
}

fn confirmed(ends: &Ends) -> Lsn {
    let sql = "select confirmed_flush_lsn from pg_replication_slots \
               where slot_name = 'walferry_main_forward'";
    ends.source.psql("app", sql).unwrap().trim().parse().unwrap()
}

fn progress(ends: &Ends) -> Lsn {
    let sql = "select end_lsn from walferry.progress where stream = 'walferry_main_forward'";
    ends.target.psql("app", sql).unwrap().trim().parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_topic_of_several_partitions_is_refused_before_anything_is_made() {
    let ends = Ends::start(15, 15).with_kafka(&broker().address());
    ends.source.psql("app", "create table t (i int primary key)").unwrap();
    create(broker(), &topic_of(&ends), 2, &[]).await;
    let refused = ends.walferry(&["run"]).await;
    assert_eq!(refused.code, Some(1), "{refused:?}");
    assert!(refused.err.contains("has 2 partitions"), "{}", refused.err);
    let slots = ends.source.psql("app", "select count(*) from pg_replication_slots").unwrap();
    assert_eq!(slots.trim(), "0");
}

#[tokio::test(flavor = "multi_thread")]
async fn brokers_that_do_not_answer_and_names_that_are_none_are_told() {
    let ends = Ends::start(15, 15);
    ends.source.psql("app", "create table t (i int primary key)").unwrap();
    let refused = ends.walferry(&["run", "--buffer", "kafka:127.0.0.1:1/topic"]).await;
    assert_eq!(refused.code, Some(1), "{refused:?}");
    assert!(refused.err.contains("cannot ask topic topic at 127.0.0.1:1"), "{}", refused.err);
    for bad in ["kafka:", "kafka:host", "kafka:/topic", "kafka:a,,b/t", "kafka:host/to pic"] {
        let refused = ends.walferry(&["run", "--buffer", bad]).await;
        assert_eq!(refused.code, Some(2), "{bad}: {refused:?}");
        assert!(refused.err.contains("--buffer"), "{}", refused.err);
    }
}

/// A record of a version that is not there yet, among ours and before them.
#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_envelope_version_stops_the_stream_and_loses_nothing() {
    let (ends, writer) = moving(&broker().address(), 50.0).await;
    let mut run = ends.spawn(&["run"]);
    ends.until_phase(&mut run, "following").await;
    // version = 2, and a field nobody knows.
    put(broker(), &topic_of(&ends), b"\x08\x02\xfa\x3f\x02hi");
    let ended = tokio::time::timeout(PATIENCE * 3, run.ended()).await.unwrap();
    assert_eq!(ended.code, Some(1), "{ended:?}");
    for said in ["has envelope version 2", "knows 1", "with the walferry that wrote it"] {
        assert!(ended.err.contains(said), "{}", ended.err);
    }
    let again = ends.walferry(&["run"]).await;
    assert!(again.err.contains("has envelope version 2"), "{}", again.err);
    // Nothing is in the topic alone, so that it can be left.
    let mut ends = ends;
    ends.buffer = Some("memory".to_string());
    let run = ends.spawn(&["run"]);
    let report = writer.stop().await;
    ends.done(&["verify"]).await;
    ends.assert_exact(&report).await;
    run.signal("INT");
    run.ended().await.expect_success();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_topic_of_another_stream_and_of_other_writers_is_refused() {
    let mut ends = Ends::start(15, 15).with_kafka(&broker().address());
    ends.source.psql("app", "create table t (i int primary key)").unwrap();
    let first = [("WALFERRY_NAME", "first")];
    let run = ends.spawn_on(&["run", "--until", "following"], &first);
    run.ended().await.expect_success();
    ends.spawn_on(&["cancel"], &first).ended().await.expect_success();
    let json = topic();
    create(broker(), &json, 1, &[]).await;
    put(broker(), &json, b"{\"id\": 1}");
    let json = Some(format!("kafka:{}/{json}", broker().address()));
    let first = ends.buffer.clone();
    for (buffer, said) in [(first, "(forward of job first, slot"), (json, "is not walferry's")] {
        ends.target.psql("app", "drop table if exists t").unwrap();
        ends.buffer = buffer;
        let refused = ends.walferry(&["run"]).await;
        assert_eq!(refused.code, Some(1), "{refused:?}");
        assert!(refused.err.contains(said), "{}", refused.err);
        ends.done(&["cancel"]).await;
    }
}

/// Runs until the slot was told what only the topic has, and kills it.
async fn ahead(ends: &Ends) {
    let mut run = ends.spawn(&["run", "--wal-budget", "0"]);
    until_within(Duration::from_secs(60), "it to read", async || {
        let sql = "select count(*) from pg_replication_slots where active";
        ends.source.psql("app", sql).unwrap().trim() == "1"
    })
    .await;
    ends.target.stop(StopMode::Immediate).unwrap();
    let before = confirmed(ends);
    until_within(Duration::from_secs(30), "the slot to be told", async || {
        confirmed(ends).bytes_since(before) > 20_000
    })
    .await;
    assert!(!run.has_ended(), "{}", run.so_far());
    run.kill9().await;
    ends.target.resume().unwrap();
    assert!(confirmed(ends) > progress(ends));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_topic_made_anew_is_written_again_or_its_loss_is_told() {
    let (ends, writer) = moving(&broker().address(), 100.0).await;
    let name = topic_of(&ends);
    // The library believes for so long that a topic which is not there is about to be; its own
    // half a minute would be waited for below.
    std::fs::create_dir_all(&ends.spool_dir).unwrap();
    let config = ends.spool_dir.join("walferry.toml");
    std::fs::write(&config, "kafka.topic.metadata.propagation.max.ms = 1000\n").unwrap();
    let mut run = ends.spawn(&["run", "--config", config.to_str().unwrap()]);
    ends.until_phase(&mut run, "following").await;
    // In mid-stream; the source still has all of it.
    for partitions in [1, 0] {
        delete(broker(), &name).await;
        if partitions > 0 {
            create(broker(), &name, partitions, &[]).await;
        }
        assert!(writer.committed_more(150).await, "the writer is stuck");
        until_within(Duration::from_secs(60), "it to be written again", async || {
            extent(broker(), &name).1 > 20
        })
        .await;
        assert!(!run.has_ended(), "{}", run.so_far());
    }
    ends.done(&["verify"]).await;
    run.kill9().await;
    ahead(&ends).await;
    for exists in [false, true] {
        if exists {
            create(broker(), &name, 1, &[]).await;
        } else {
            delete(broker(), &name).await;
        }
        let refused = ends.walferry(&["run"]).await;
        assert_eq!(refused.code, Some(1), "{refused:?}");
        for said in ["was told", &name, "is empty", "copies every table again"] {
            assert!(refused.err.contains(said), "{}", refused.err);
        }
    }
    let mut ends = ends;
    ends.buffer = Some("memory".to_string());
    let refused = ends.walferry(&["run"]).await;
    assert!(refused.err.contains("has what the target"), "{}", refused.err);
    writer.stop().await;
}

/// A broker that deletes what is older than a moment, as often as it can.
fn forgetful() -> Broker {
    Broker::start(&["log.retention.check.interval.ms=300"]).unwrap()
}

async fn until_forgotten(broker: &Broker, topic: &str, run: &Walferry) {
    let high = extent(broker, topic).1;
    until_within(Duration::from_secs(60), "retention", async || extent(broker, topic).0 >= high)
        .await;
    drop(run.so_far());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_retention_that_is_too_short_is_mended_from_the_source_or_its_loss_is_told() {
    let broker = forgetful();
    let (ends, writer) = moving(&broker.address(), 100.0).await;
    let name = topic_of(&ends);
    create(&broker, &name, 1, &[("retention.ms", "1000"), ("segment.ms", "500")]).await;
    let mut run = ends.spawn(&["run"]);
    ends.until_phase(&mut run, "following").await;
    // The target is away for longer than the broker remembers; the source still has it all.
    ends.target.stop(StopMode::Fast).unwrap();
    assert!(writer.committed_more(100).await, "the writer is stuck");
    until_forgotten(&broker, &name, &run).await;
    ends.target.resume().unwrap();
    until_within(Duration::from_secs(60), "it to follow again", async || {
        let status = ends.status().await;
        status["lag_seconds"].as_f64().is_some_and(|lag| lag < 1.0) && status["error"].is_null()
    })
    .await;
    ends.done(&["verify"]).await;
    conserved(&ends.status().await["tables"]);
    run.kill9().await;
    // The slot was told of what the broker has forgotten.
    ahead(&ends).await;
    let until = extent(&broker, &name).1;
    until_within(Duration::from_secs(60), "retention", async || {
        extent(&broker, &name).0 >= until - 1
    })
    .await;
    let refused = ends.walferry(&["run"]).await;
    assert_eq!(refused.code, Some(1), "{refused:?}");
    for said in ["was told", "retention was too short", "copies every table again"] {
        assert!(refused.err.contains(said), "{}", refused.err);
    }
    writer.stop().await;
}
