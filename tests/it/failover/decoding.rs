//! `--decode-from`: the slot is on a standby, which decodes.

use std::time::Duration;

use walferry::demo::server::{Server, StopMode};
use walferry::demo::writer::create_schema;

use super::{
    SLOT, assert_equal, assert_kept, assert_same, cut_off, level, of_both, start_writer, stop,
};
use crate::support::job::{Ends, broker};
use crate::support::{Walferry, until_within};

const FED: [&str; 3] = [
    "primary_slot_name = 'standby'",
    "wal_receiver_status_interval = 1",
    "hot_standby_feedback = on",
];
const OURS: &str = "select count(*) from pg_replication_slots \
     where slot_name = 'walferry_main_forward'";

fn slots(server: &Server) -> String {
    server.psql("app", OURS).unwrap()
}

/// A source with its standby, which is decoded from, and a target.
fn decoded(major: u32) -> (Ends, Server) {
    let mut ends = Ends::start(major, major);
    ends.source.psql("postgres", SLOT).unwrap();
    let standby = ends.source.standby(&FED).unwrap();
    ends.source_via = of_both(&ends.source, &standby);
    (ends, standby)
}

/// Waits until the job has applied something more.
async fn flows(ends: &Ends, run: &mut Walferry) {
    let applied = async || {
        let sql = "select end_lsn from walferry.progress where stream = 'walferry_main_forward'";
        ends.target.psql("app", sql).unwrap_or_default()
    };
    let before = applied().await;
    for _ in 0..150 {
        if applied().await != before {
            return;
        }
        assert!(!run.has_ended(), "the run ended: {}", run.so_far());
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    panic!("nothing comes: {}\n{}", ends.status().await, run.so_far());
}

/// Flips in whose middle the runner, or the standby that is decoded from, is killed: each is made or
/// undone, and the job goes on. The source is live afterwards.
async fn flips_cut_short(ends: &Ends, standby: &Server, mut run: Walferry) -> Walferry {
    let uri = standby.uri("app");
    let how = ["--decode-from", &*uri, "--max-lag", "10s"];
    for turn in 0..4 {
        let route = ["cutover", "--route", "hook:sleep 0.05"];
        let asked = ends.spawn(&[&route[..], &how].concat());
        tokio::time::sleep(Duration::from_millis(fastrand::u64(50..900))).await;
        if turn % 2 == 0 {
            standby.kill9().unwrap();
            tokio::time::sleep(Duration::from_millis(fastrand::u64(0..600))).await;
            standby.resume().unwrap();
            asked.ended().await;
        } else {
            run.kill9().await;
            drop(asked);
            run = ends.spawn(&["run", "--decode-from", &uri]);
        }
        let phase = || ends.target.psql("app", "select phase from walferry.job").unwrap();
        until_within(Duration::from_secs(60), "the flip is settled", || {
            assert!(!run.has_ended(), "the run ended: {}", run.so_far());
            let quiet = ends.nothing_is_asked();
            let stands = ["following", "switched", "rolled_back"].contains(&&*phase());
            std::future::ready(quiet && stands)
        })
        .await;
        let was = phase();
        println!("{} killed: {was}", if turn % 2 == 0 { "standby" } else { "runner" });
        if was == "switched" {
            flows_back(ends, &mut run).await;
            ends.done(&[&["rollback"][..], &how].concat()).await;
        }
    }
    run
}

/// Waits until the way back has brought something to the source.
async fn flows_back(ends: &Ends, run: &mut Walferry) {
    let sql =
        "insert into backlog select coalesce(max(id), 0) + 1, 'back' from backlog returning id";
    let id = ends.target.psql("app", sql).unwrap();
    let there = format!("select count(*) from backlog where id = {}", id.lines().next().unwrap());
    until_within(Duration::from_secs(30), "the way back", || {
        assert!(!run.has_ended(), "the run ended: {}", run.so_far());
        std::future::ready(ends.source.psql("app", &there).unwrap() == "1")
    })
    .await;
}

/// Copied, followed, switched and led back under writers, while run and standby are killed.
#[tokio::test(flavor = "multi_thread")]
async fn a_job_is_decoded_from_a_standby_of_16_through_kills_and_back() {
    let (ends, standby) = decoded(16);
    create_schema(&ends.source_uri(), 1).await.unwrap();
    ends.source.psql("app", "create table backlog (id int primary key, v text)").unwrap();
    let uri = standby.uri("app");
    let with = ["run", "--decode-from", &*uri];
    for (others, said) in [
        (&["--standby", &*uri][..], "does not go with --standby"),
        (&["--transport", "pull"][..], "does not go with --transport pull"),
        (&["--two-phase", "on"][..], "does not go with --two-phase"),
    ] {
        let refused = ends.walferry(&[&["check"][..], &with[1..], others].concat()).await;
        assert!(refused.code == Some(2) && refused.err.contains(said), "{}", refused.err);
    }
    let other = ends.walferry(&["check", "--decode-from", &ends.target_uri()]).await;
    assert!(other.code == Some(1) && other.out.contains("is no standby"), "{}", other.out);
    ends.done(&["check", "--decode-from", &uri]).await;
    let writer = start_writer(&ends.source_uri(), 1).await;
    let mut run = ends.spawn(&with);
    run.says("copying").await;
    run.kill9().await;
    let mut run = ends.spawn(&with);
    ends.until_phase(&mut run, "following").await;
    assert_eq!((slots(&ends.source), slots(&standby)), ("0".to_string(), "1".to_string()));
    assert!(ends.status().await["decoded_at"].as_str().unwrap().ends_with("/app"));
    run.kill9().await;
    let elsewhere = ends.walferry(&["run"]).await;
    assert!(elsewhere.code == Some(1) && elsewhere.err.contains("give --decode-from the standby"));
    // A backlog is read in bulk from there, too.
    let backlog = "do $$ begin for i in 1..3000 loop \
        insert into backlog values (i, repeat(md5(i::text), 9)); commit; end loop; end $$";
    ends.source.psql("app", backlog).unwrap();
    let toml = standby.dir().join("decode.toml");
    std::fs::write(&toml, format!("decode-from = \"{uri}\"\n[tuning]\nbulk-bytes = 500000\n"))
        .unwrap();
    let mut run = ends.spawn(&["run", "-vv", "--config", toml.to_str().unwrap()]);
    flows(&ends, &mut run).await;
    assert!(run.so_far().contains("reading in bulk"), "{}", run.so_far());
    for _ in 0..2 {
        standby.kill9().unwrap();
        assert!(writer.committed_more(60).await);
        standby.resume().unwrap();
        flows(&ends, &mut run).await;
    }
    // Law 1: asked in this order, the slot has been told no more than what is there.
    let sql = "select confirmed_flush_lsn from pg_replication_slots \
         where slot_name = 'walferry_main_forward'";
    for _ in 0..20 {
        let told = standby.psql("app", sql).unwrap();
        let has = format!("select end_lsn >= '{told}' from walferry.progress");
        assert_eq!(ends.target.psql("app", &has).unwrap(), "t");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    ends.done(&["verify"]).await;
    let mut run = flips_cut_short(&ends, &standby, run).await;
    ends.done(&["cutover", "--decode-from", &uri, "--max-lag", "10s"]).await;
    let report = writer.stop().await;
    ends.done(&["verify"]).await;
    let back = start_writer(&ends.target_uri(), 11).await;
    assert!(back.committed_more(50).await);
    ends.done(&["rollback", "--decode-from", &uri, "--max-lag", "10s"]).await;
    let second = back.stop().await;
    assert_same(&ends.source_uri(), &ends.target_uri(), &mut run).await;
    for server in [&ends.source, &ends.target] {
        assert_kept(server, &report).await;
        assert_kept(server, &second).await;
    }
    stop(run).await;
    let ended = ends.done(&["finish", "--decode-from", &uri]).await;
    assert!(ended.out.contains("on standby"), "{}", ended.out);
    assert_eq!((slots(&ends.source), slots(&standby)), ("0".to_string(), "0".to_string()));
}

/// The standby that is decoded from is promoted: its slot goes on, and nothing is read again.
#[tokio::test(flavor = "multi_thread")]
async fn a_standby_that_is_decoded_from_is_promoted_and_goes_on() {
    let (ends, standby) = decoded(17);
    create_schema(&ends.source_uri(), 1).await.unwrap();
    let uri = standby.uri("app");
    let ends = ends.with_spool();
    let with = ["run", "--decode-from", &*uri, "--after-failover", "refill"];
    let mut run = ends.spawn(&with);
    let writer = start_writer(&ends.source_via, 1).await;
    ends.until_phase(&mut run, "following").await;
    assert!(writer.committed_more(50).await);
    ends.source.stop(StopMode::Fast).unwrap();
    standby.promote().unwrap();
    assert!(writer.committed_more(200).await);
    flows(&ends, &mut run).await;
    // What came since is of the new timeline: the next runner is not to take it for lost.
    run.kill9().await;
    let mut run = ends.spawn(&["run", "--after-failover", "refill"]);
    flows(&ends, &mut run).await;
    assert!(writer.committed_more(50).await);
    let report = writer.stop().await;
    assert_equal(&standby, &ends.target, &mut run).await;
    for server in [&standby, &ends.target] {
        assert_kept(server, &report).await;
    }
    assert!(!run.so_far().contains("comparing every table"), "{}", run.so_far());
    ends.done(&["cutover"]).await;
    ends.done(&["verify"]).await;
    ends.done(&["finish"]).await;
    assert_eq!(slots(&standby), "0");
}

/// Another standby takes over. The one that is decoded from follows it, and so does the stream,
/// also where the target has more than the fork before anybody has looked. One that is ahead of the
/// new primary cannot follow: what the target has alone is named, and read again.
#[tokio::test(flavor = "multi_thread")]
async fn another_standby_takes_over_and_the_one_that_is_decoded_from_follows() {
    let (mut ends, decoder) = decoded(16);
    create_schema(&ends.source_uri(), 1).await.unwrap();
    let heir = ends.source.standby(&[]).unwrap();
    ends.source_via = of_both(&ends.source, &heir);
    let uri = decoder.uri("app");
    let with = ["run", "--decode-from", &*uri];
    let refilling = [&with[..], &["--after-failover", "refill"]].concat();
    let mut run = ends.spawn(&refilling);
    let writer = start_writer(&ends.source_via, 1).await;
    ends.until_phase(&mut run, "following").await;
    assert!(writer.committed_more(50).await);
    ends.source.stop(StopMode::Fast).unwrap();
    heir.promote().unwrap();
    heir.psql("postgres", SLOT).unwrap();
    let from_heir = format!("host=127.0.0.1 port={} user=postgres", heir.port());
    decoder.follow(&from_heir).unwrap();
    decoder.reload().unwrap();
    assert!(writer.committed_more(150).await);
    flows(&ends, &mut run).await;
    // Until it has heard of that standby, the new primary may remove what its slot needs.
    let gone = decoder.log().contains("invalidating obsolete replication slot");
    let again = run.so_far().contains("comparing every table");
    assert!(gone || !again, "{}", run.so_far());
    ends.until_phase(&mut run, "following").await;
    run.kill9().await;
    let mut run = ends.spawn(&with);
    flows(&ends, &mut run).await;
    let report = writer.stop().await;
    assert_equal(&heir, &ends.target, &mut run).await;
    for server in [&heir, &ends.target] {
        assert_kept(server, &report).await;
    }
    // Now the decoder gets what the next primary does not.
    ends.source.rejoin(&heir, &[]).unwrap();
    level(&heir, &ends.source).await;
    cut_off(&ends.source);
    let writer = start_writer(&heir.uri("app"), 11).await;
    assert!(writer.committed_more(80).await);
    writer.stop().await;
    assert_equal(&heir, &ends.target, &mut run).await;
    heir.kill9().unwrap();
    ends.source.promote().unwrap();
    let ended = run.ended().await;
    assert!(ended.code == Some(1) && ended.err.contains("forked at"), "{}", ended.err);
    ends.source.psql("postgres", SLOT).unwrap();
    decoder.stop(StopMode::Immediate).unwrap();
    decoder.rejoin(&ends.source, &FED).unwrap();
    let mut run = ends.spawn(&refilling);
    until_within(Duration::from_secs(30), "the comparing", || async {
        run.so_far().contains("comparing every table")
    })
    .await;
    ends.until_phase(&mut run, "following").await;
    let writer = start_writer(&ends.source_uri(), 21).await;
    assert!(writer.committed_more(50).await);
    let report = writer.stop().await;
    assert_equal(&ends.source, &ends.target, &mut run).await;
    assert_kept(&ends.target, &report).await;
}

/// Both halves through a topic, each killed, and the standby that one of them reads, by a textual
/// decoder.
#[tokio::test(flavor = "multi_thread")]
async fn halves_through_a_topic_are_decoded_from_a_standby() {
    let (mut ends, standby) = decoded(16);
    ends.source_via = ends.source_uri();
    let ends = ends.with_kafka(&broker().address());
    create_schema(&ends.source_uri(), 1).await.unwrap();
    let uri = standby.uri("app");
    let how = ["--take-over", "--decode-from", &*uri, "--decoder", "test_decoding"];
    let start = |half: &str| ends.spawn(&[&[half][..], &how].concat());
    let writer = start_writer(&ends.source_uri(), 1).await;
    let (mut capture, mut apply) = (start("capture"), start("apply"));
    ends.until_phase(&mut apply, "following").await;
    assert_eq!((slots(&ends.source), slots(&standby)), ("0".to_string(), "1".to_string()));
    for turn in 0..4 {
        assert!(writer.committed_more(30).await);
        match turn {
            0 => {
                capture.kill9().await;
                capture = start("capture");
            }
            1 => {
                apply.kill9().await;
                apply = start("apply");
            }
            _ => {
                standby.kill9().unwrap();
                tokio::time::sleep(Duration::from_millis(fastrand::u64(0..600))).await;
                standby.resume().unwrap();
            }
        }
        flows(&ends, &mut apply).await;
        assert!(!capture.has_ended(), "capture ended: {}", capture.so_far());
    }
    ends.done(&["verify"]).await;
    ends.done(&["cutover", "--decode-from", &uri, "--max-lag", "10s"]).await;
    let report = writer.stop().await;
    ends.done(&["verify"]).await;
    for server in [&ends.source, &ends.target] {
        assert_kept(server, &report).await;
    }
    ends.done(&["finish", "--decode-from", &uri]).await;
    apply.ended().await.expect_success();
    capture.ended().await.expect_success();
    assert_eq!(slots(&standby), "0");
}

/// Promotions at random moments beside a standby that is decoded from: it follows whoever takes
/// over, or is made anew where it has more than that one. Gives how often the target was filled
/// again.
pub(super) async fn promoted_beside(turns: u64, rng: &mut fastrand::Rng) -> usize {
    let (mut ends, decoder) = decoded(*rng.choice(&[16, 17]).unwrap());
    create_schema(&ends.source_uri(), 1).await.unwrap();
    let heir = ends.source.standby(&[]).unwrap();
    ends.source_via = of_both(&ends.source, &heir);
    let uri = decoder.uri("app");
    let with = ["run", "--decode-from", &*uri, "--after-failover", "refill"];
    let writer = start_writer(&ends.source_via, 1).await;
    let mut run = ends.spawn(&with);
    let (mut primary, mut other) = (&ends.source, &heir);
    for turn in 0..turns {
        tokio::time::sleep(Duration::from_millis(rng.u64(0..2500))).await;
        if rng.bool() {
            cut_off(other);
            tokio::time::sleep(Duration::from_millis(rng.u64(0..400))).await;
        }
        primary.kill9().unwrap();
        other.promote().unwrap();
        (primary, other) = (other, primary);
        primary.psql("postgres", SLOT).unwrap();
        other.rejoin(primary, &[]).unwrap();
        let anew = led_to(primary, &decoder).await;
        println!("turn {turn}: the decoder {}", if anew { "is made anew" } else { "follows" });
        assert!(!run.has_ended(), "the run ended in turn {turn}: {}", run.so_far());
        if rng.u8(..) < 64 {
            println!("{}", run.so_far());
            run.kill9().await;
            run = ends.spawn(&with);
        }
    }
    ends.until_phase(&mut run, "following").await;
    assert!(writer.committed_more(30).await);
    writer.stop().await;
    assert_equal(primary, &ends.target, &mut run).await;
    println!("{}", run.so_far());
    let refills = run.so_far().matches("comparing every table").count();
    ends.done(&["cutover", "--decode-from", &uri, "--max-lag", "10s"]).await;
    ends.done(&["verify"]).await;
    refills
}

/// Has a standby follow another primary; true if it had to be made anew.
async fn led_to(primary: &Server, standby: &Server) -> bool {
    let conninfo = format!("host=127.0.0.1 port={} user=postgres", primary.port());
    standby.follow(&conninfo).unwrap();
    standby.reload().unwrap();
    let lsn = primary.psql("app", "select pg_current_wal_lsn()").unwrap();
    let level = format!(
        "select pg_last_wal_replay_lsn() >= '{lsn}' and exists (select from pg_stat_wal_receiver \
         where status = 'streaming' and sender_port = {})",
        primary.port()
    );
    for _ in 0..70 {
        if standby.psql("app", &level).is_ok_and(|level| level == "t") {
            return false;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    standby.stop(StopMode::Immediate).unwrap();
    standby.rejoin(primary, &FED).unwrap();
    true
}

/// Without feedback the primary removes what the slot needs: said with what mends it.
#[tokio::test(flavor = "multi_thread")]
async fn a_slot_that_its_standby_lost_to_a_vacuum_is_named_and_made_anew() {
    let (mut ends, standby) = decoded(16);
    ends.source_via = ends.source_uri();
    create_schema(&ends.source_uri(), 1).await.unwrap();
    standby.configure(&["hot_standby_feedback = off"]).unwrap();
    standby.reload().unwrap();
    let uri = standby.uri("app");
    let with = ["run", "--decode-from", &*uri];
    let checked = ends.done(&["check", "--decode-from", &uri]).await;
    assert!(checked.out.contains("hot_standby_feedback = on"), "{}", checked.out);
    let mut run = ends.spawn(&with);
    ends.until_phase(&mut run, "following").await;
    let vacuum = "create table gone (a int); drop table gone; \
        vacuum pg_class, pg_attribute, pg_type, pg_depend";
    for part in vacuum.split("; ") {
        ends.source.psql("app", part).unwrap();
    }
    let ended = run.ended().await;
    assert!(ended.code == Some(1), "{}", ended.err);
    for part in ["conflicting", "primary_slot_name", "--after-failover refill"] {
        assert!(ended.err.contains(part), "{part}: {}", ended.err);
    }
    standby.configure(&["hot_standby_feedback = on"]).unwrap();
    standby.reload().unwrap();
    let writer = start_writer(&ends.source_uri(), 1).await;
    let mut run = ends.spawn(&[&with[..], &["--after-failover", "refill"]].concat());
    run.says("comparing every table").await;
    ends.until_phase(&mut run, "following").await;
    assert!(writer.committed_more(50).await);
    let report = writer.stop().await;
    assert_equal(&ends.source, &ends.target, &mut run).await;
    assert_kept(&ends.target, &report).await;
    ends.done(&["cancel", "--decode-from", &uri]).await;
    assert_eq!(slots(&standby), "0");
}
