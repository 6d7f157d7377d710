//! A standby takes over: of the source, of the target; nothing is lost, or what is lost is named and
//! mended.

mod decoding;
mod patroni;
mod standby_slots;
mod switched;

use std::time::Duration;

use walferry::demo::compare::compare;
use walferry::demo::ledger;
use walferry::demo::server::Server;
use walferry::demo::writer::{Options, Report, Writer, broken_invariants, create_schema};

use crate::support::job::{Ends, broker};
use crate::support::{Walferry, until_within};

/// What a standby of 17 needs to keep copies of slots.
static SYNCS_SLOTS: [&str; 4] = [
    "primary_slot_name = 'standby'",
    "sync_replication_slots = on",
    "hot_standby_feedback = on",
    "wal_receiver_status_interval = 1",
];

const SLOT: &str = "select pg_create_physical_replication_slot('standby', true)";

/// The servers of one side, whichever of them is the primary.
fn of_both(a: &Server, b: &Server) -> String {
    format!(
        "postgres://postgres@127.0.0.1:{},127.0.0.1:{}/app?target_session_attrs=read-write",
        a.port(),
        b.port()
    )
}

/// Waits until the standby has replayed all that the primary has written by now.
async fn level(primary: &Server, standby: &Server) {
    let lsn = primary.psql("app", "select pg_current_wal_lsn()").unwrap();
    let there = format!("select pg_last_wal_replay_lsn() >= '{lsn}'::pg_lsn");
    until_within(Duration::from_secs(20), "the standby", || async {
        standby.psql("app", &there).unwrap() == "t"
    })
    .await;
}

/// The standby hears nothing any more of what its primary writes.
fn cut_off(standby: &Server) {
    standby.follow("host=127.0.0.1 port=1").unwrap();
    standby.reload().unwrap();
}

async fn start_writer(uri: &str, first_writer: i32) -> Writer {
    let options = Options { tx_per_second: Some(150.0), first_writer, ..Options::new(uri) };
    Writer::start(options).await.unwrap()
}

/// Waits until the target has what `source` has, and compares them.
async fn assert_equal(source: &Server, target: &Server, run: &mut Walferry) {
    assert_same(&source.uri("app"), &target.uri("app"), run).await;
}

/// The same of connection strings.
async fn assert_same(source: &str, target: &str, run: &mut Walferry) {
    let mut last = Vec::new();
    for _ in 0..100 {
        let found = compare(source, target).await.unwrap();
        last = found.differences.into_iter().filter(|d| !d.starts_with("sequence ")).collect();
        if last.is_empty() {
            return;
        }
        assert!(!run.has_ended(), "the run ended: {}", run.so_far());
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    panic!("{last:?}\n{}", run.so_far());
}

async fn stop(run: Walferry) {
    run.signal("TERM");
    run.ended().await.expect_success();
}

/// All that was acknowledged is on this server, once.
async fn assert_kept(server: &Server, report: &Report) {
    let found = ledger::check(&server.uri("app"), &report.ledger).await.unwrap();
    assert!(found.is_exact(), "{found:?}");
}

/// 17 and newer: the slot is on the standby, in sync, and the stream goes on from it.
#[tokio::test(flavor = "multi_thread")]
async fn a_promoted_standby_of_17_is_followed_from_its_copy_of_the_slot() {
    let mut ends = Ends::start(17, 17);
    ends.source.psql("postgres", SLOT).unwrap();
    create_schema(&ends.source_uri(), 1).await.unwrap();
    let standby = ends.source.standby(&["primary_slot_name = 'standby'"]).unwrap();
    ends.source_via = of_both(&ends.source, &standby);
    // Check says what the standby and its primary lack, and how it is set.
    let found = ends.walferry(&["check", "--json"]).await.json();
    let fixes = |found: &serde_json::Value| -> Vec<String> {
        let all = found["findings"].as_array().unwrap().clone();
        let ours = all.iter().filter(|f| f["code"] == "failover");
        ours.map(|f| f["fix"].as_str().unwrap_or_default().to_string()).collect()
    };
    let lacking = fixes(&found).join("\n");
    for part in ["synchronized_standby_slots = 'standby'", "sync_replication_slots", "feedback"] {
        assert!(lacking.contains(part), "{part}: {found:#}");
    }
    standby.configure(&SYNCS_SLOTS).unwrap();
    standby.reload().unwrap();
    ends.source.configure(&["synchronized_standby_slots = 'standby'"]).unwrap();
    ends.source.configure(&["synchronous_standby_names = '*'"]).unwrap();
    ends.source.reload().unwrap();
    until_within(Duration::from_secs(20), "the settings", || async {
        fixes(&ends.walferry(&["check", "--json"]).await.json()).is_empty()
    })
    .await;
    let writer = start_writer(&ends.source_via, 1).await;
    let mut run = ends.spawn(&["run"]);
    ends.until_phase(&mut run, "following").await;
    let slot = "select count(*) from pg_replication_slots \
         where slot_name = 'walferry_main_forward' and synced and not temporary and failover";
    // The worker that copies slots sleeps longer each time it finds nothing new, up to 30 s: a reload
    // wakes it (slotsync.c, wait_for_slot_activity).
    until_within(Duration::from_secs(60), "the slot's copy", || async {
        standby.reload().unwrap();
        standby.psql("app", slot).unwrap() == "1"
    })
    .await;
    assert!(writer.committed_more(100).await);
    ends.source.kill9().unwrap();
    standby.promote().unwrap();
    assert!(writer.committed_more(100).await);
    let report = writer.stop().await;
    assert_equal(&standby, &ends.target, &mut run).await;
    assert_kept(&standby, &report).await;
    assert_kept(&ends.target, &report).await;
    assert!(!run.so_far().contains("refill"), "{}", run.so_far());
    // Positions are the new timeline's now: what is begun again goes on, and so does the cutover.
    stop(run).await;
    let mut run = ends.spawn(&["run"]);
    standby.psql("app", "create table public.later (a int)").unwrap();
    standby.psql("app", "drop table public.later").unwrap();
    ends.until_phase(&mut run, "following").await;
    ends.done(&["cutover"]).await;
    ends.done(&["verify"]).await;
}

/// patroni#1749: a standby that was behind is promoted. What the target has and the source has not
/// goes, what nobody's slot gives any more comes, and both are named.
#[tokio::test(flavor = "multi_thread")]
async fn patroni_1749_what_an_asynchronous_promotion_loses_is_named_and_read_again() {
    let mut ends = Ends::start(15, 15);
    create_schema(&ends.source_uri(), 1).await.unwrap();
    ends.source.psql("app", "create table public.still as select generate_series(1, 9) a").unwrap();
    let standby = ends.source.standby(&[]).unwrap();
    ends.source_via = of_both(&ends.source, &standby);
    let given = ends.walferry(&["check", "--standby", &standby.uri("app")]).await;
    assert!(given.out.contains("standbys of release 15 can have no"), "{}", given.out);
    let found = ends.done(&["check", "--json"]).await.json().to_string();
    assert!(found.contains("what a failover loses is found"), "{found}");
    let mut run = ends.spawn(&["run", "--after-failover", "stop"]);
    ends.until_phase(&mut run, "following").await;
    level(&ends.source, &standby).await;
    let kept = ends.target.psql("app", "select xmin from public.still limit 1").unwrap();
    cut_off(&standby);
    let writer = start_writer(&ends.source_uri(), 1).await;
    assert!(writer.committed_more(150).await);
    let lost = writer.stop().await;
    assert_equal(&ends.source, &ends.target, &mut run).await;
    ends.source.kill9().unwrap();
    standby.promote().unwrap();
    let ended = run.ended().await;
    assert_eq!(ended.code, Some(1), "{}", ended.out);
    assert!(ended.err.contains("forked at") && ended.err.contains("refill"), "{}", ended.err);
    // While it is filled again the new source is written to, and the runner dies in the middle.
    let writer = start_writer(&standby.uri("app"), 11).await;
    let first = ends.spawn(&["run", "--after-failover", "refill"]);
    until_within(Duration::from_secs(30), "the comparing", || async {
        first.so_far().contains("comparing every table")
    })
    .await;
    tokio::time::sleep(Duration::from_millis(fastrand::u64(0..300))).await;
    let said = first.so_far();
    drop(first);
    let mut run = ends.spawn(&["run", "--after-failover", "refill"]);
    ends.until_phase(&mut run, "following").await;
    assert!(writer.committed_more(50).await);
    let report = writer.stop().await;
    assert_equal(&standby, &ends.target, &mut run).await;
    assert_kept(&ends.target, &report).await;
    let alone = "select coalesce(sum(extra + different), 0) from walferry.table_refill";
    let alone: u64 = ends.target.psql("app", alone).unwrap().parse().unwrap();
    assert!(alone > 0, "{lost:?}\n{said}{}", run.so_far());
    // A table without a difference keeps its rows.
    let still = ends.target.psql("app", "select xmin from public.still limit 1").unwrap();
    assert_eq!(still, kept);
    ends.done(&["cutover"]).await;
    ends.done(&["verify"]).await;
    ends.done(&["finish"]).await;
}

/// A standby that was cut off before the job began has nothing of it: neither its tables nor its
/// publication. Found by a run that goes on, and by one that begins.
#[tokio::test(flavor = "multi_thread")]
async fn what_walferry_made_on_the_source_may_be_among_what_is_lost() {
    for goes_on in [true, false] {
        let mut ends = Ends::start(15, 15);
        let sql = "create table t (id int primary key); insert into t select generate_series(1, 9)";
        ends.source.psql("app", sql).unwrap();
        let standby = ends.source.standby(&[]).unwrap();
        ends.source_via = of_both(&ends.source, &standby);
        level(&ends.source, &standby).await;
        cut_off(&standby);
        let refilling = ["run", "--after-failover", "refill"];
        let mut run = ends.spawn(&refilling);
        ends.until_phase(&mut run, "following").await;
        ends.source.psql("app", "insert into t values (10)").unwrap();
        assert_equal(&ends.source, &ends.target, &mut run).await;
        let run = match goes_on {
            true => Some(run),
            false => {
                run.kill9().await;
                None
            }
        };
        ends.source.kill9().unwrap();
        standby.promote().unwrap();
        standby.psql("app", "insert into t values (11)").unwrap();
        let mut run = run.unwrap_or_else(|| ends.spawn(&refilling));
        run.says("comparing every table").await;
        ends.until_phase(&mut run, "following").await;
        assert_equal(&standby, &ends.target, &mut run).await;
        ends.done(&["cutover"]).await;
        ends.done(&["verify"]).await;
    }
}

/// What a synchronous standby of the target has not flushed could be lost with the primary: rows are
/// there, and the slot is not told of them before the standby has them.
#[tokio::test(flavor = "multi_thread")]
async fn a_slot_is_not_told_what_a_synchronous_standby_of_the_target_lacks() {
    let ends = Ends::start(15, 15);
    ends.source.psql("app", "create table t (id int primary key)").unwrap();
    let standby = ends.target.standby(&[]).unwrap();
    ends.target.configure(&["synchronous_standby_names = '*'"]).unwrap();
    ends.target.reload().unwrap();
    let mut run = ends.spawn(&["run"]);
    ends.until_phase(&mut run, "following").await;
    let receiver = standby.psql("app", "select pid from pg_stat_wal_receiver").unwrap();
    let signal = |name: &str| {
        let sent = std::process::Command::new("kill").args([name, &receiver]).status();
        assert!(sent.unwrap().success());
    };
    signal("-STOP");
    ends.source.psql("app", "insert into t values (1)").unwrap();
    let written = ends.source.psql("app", "select pg_current_wal_insert_lsn()").unwrap();
    until_within(Duration::from_secs(10), "the row", || async {
        ends.target.psql("app", "select count(*) from t").unwrap() == "1"
    })
    .await;
    let told = format!(
        "select confirmed_flush_lsn >= '{written}' from pg_replication_slots \
         where slot_name = 'walferry_main_forward'"
    );
    for _ in 0..20 {
        assert_eq!(ends.source.psql("app", &told).unwrap(), "f", "{}", run.so_far());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    // Nor by the applier that comes next, which finds it on the target's own disk.
    let reader = "select coalesce(max(active_pid), 0) from pg_replication_slots";
    let first = ends.source.psql("app", reader).unwrap();
    ends.source.psql("app", &format!("select pg_terminate_backend({first})")).unwrap();
    until_within(Duration::from_secs(10), "the next reader", || async {
        let next = ends.source.psql("app", reader).unwrap();
        next != "0" && next != first
    })
    .await;
    for _ in 0..15 {
        assert_eq!(ends.source.psql("app", &told).unwrap(), "f", "{}", run.so_far());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    signal("-CONT");
    until_within(Duration::from_secs(20), "the slot", || async {
        ends.source.psql("app", &told).unwrap() == "t"
    })
    .await;
    stop(run).await;
}

/// A job that follows, and then goes on with a standby of its target beside that.
async fn followed_by_a_standby(ends: &mut Ends) -> (Walferry, Server) {
    let mut run = ends.spawn(&["run"]);
    ends.until_phase(&mut run, "following").await;
    let standby = ends.target.standby(&[]).unwrap();
    ends.target_via = of_both(&ends.target, &standby);
    stop(run).await;
    let mut run = ends.spawn(&["run"]);
    ends.until_phase(&mut run, "following").await;
    (run, standby)
}

/// The target's own standby takes over without what the slot was told. A spool or a topic gives it
/// again; without one it is named, and read again.
#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_came_back_behind_is_filled_from_what_is_kept_or_read_again() {
    for buffer in ["spool", "kafka", "memory"] {
        let ends = Ends::start(15, 15);
        let mut ends = match buffer {
            "spool" => ends.with_spool(),
            "kafka" => ends.with_kafka(&broker().address()),
            _ => ends,
        };
        let kept = buffer != "memory";
        create_schema(&ends.source_uri(), 1).await.unwrap();
        let (mut run, standby) = followed_by_a_standby(&mut ends).await;
        level(&ends.target, &standby).await;
        cut_off(&standby);
        let writer = start_writer(&ends.source_uri(), 1).await;
        assert!(writer.committed_more(150).await);
        let report = writer.stop().await;
        assert_equal(&ends.source, &ends.target, &mut run).await;
        // So that the slot has been told.
        tokio::time::sleep(Duration::from_millis(1500)).await;
        ends.target.kill9().unwrap();
        standby.promote().unwrap();
        if !kept {
            let ended = run.ended().await;
            assert_eq!(ended.code, Some(1), "{}", ended.out);
            assert!(ended.err.contains("durably has only"), "{}", ended.err);
            run = ends.spawn(&["run", "--after-failover", "refill"]);
        }
        assert_equal(&ends.source, &standby, &mut run).await;
        assert_kept(&standby, &report).await;
        assert_eq!(run.so_far().contains("comparing every table"), !kept, "{}", run.so_far());
    }
}

/// Promotions at random moments, from the copy on: with everything in sync the target ends with all
/// that was acknowledged; otherwise with all that the source has, and what was lost is named.
/// One job in four is decoded from another standby. WALFERRY_PROMOTIONS=50 for the long form,
/// WALFERRY_SEED for the same moments again.
#[tokio::test(flavor = "multi_thread")]
async fn promotions_at_random_moments_end_exact() {
    let number = |name: &str| std::env::var(name).ok().and_then(|n| n.parse().ok());
    let count: u64 = number("WALFERRY_PROMOTIONS").unwrap_or(2);
    let seed = number("WALFERRY_SEED").unwrap_or_else(|| fastrand::u64(..));
    let mut rng = fastrand::Rng::with_seed(seed);
    let (mut done, mut refills, which) = (0, 0, rng.u64(0..4));
    while done < count {
        let (major, synced) = (*rng.choice(&[15, 17]).unwrap(), rng.bool());
        let (turns, beside) = ((count - done).min(5), (done / 5) % 4 == which);
        println!("seed {seed}, {done} done: PostgreSQL {major}, synced {synced}, beside {beside}");
        refills += match beside {
            true => decoding::promoted_beside(turns, &mut rng).await,
            false => promote_again_and_again(major, synced, turns, &mut rng).await,
        };
        done += turns;
    }
    println!("{done} promotions, {refills} times read again");
}

/// One job from its beginning, through so many promotions, to a cutover. Gives how often it was
/// filled again.
async fn promote_again_and_again(
    major: u32,
    synced: bool,
    turns: u64,
    rng: &mut fastrand::Rng,
) -> usize {
    let mut ends = Ends::start(major, 15.max(major));
    create_schema(&ends.source_uri(), 1).await.unwrap();
    ends.source.psql("postgres", SLOT).unwrap();
    let settings = if major < 17 { &SYNCS_SLOTS[..1] } else { &SYNCS_SLOTS[..] };
    let standby = ends.source.standby(settings).unwrap();
    if synced {
        let waits = "synchronous_standby_names = '*'";
        let mut lines = vec![waits];
        lines.extend((major >= 17).then_some("synchronized_standby_slots = 'standby'"));
        for server in [&ends.source, &standby] {
            server.configure(&lines).unwrap();
            server.reload().unwrap();
        }
        until_within(Duration::from_secs(20), "synchronous commit", || async {
            let sql = "select count(*) from pg_stat_replication where sync_state = 'sync'";
            ends.source.psql("app", sql).unwrap() == "1"
        })
        .await;
    }
    ends.source_via = of_both(&ends.source, &standby);
    let writer = start_writer(&ends.source_via, 1).await;
    let refilling = ["run", "--after-failover", "refill"];
    let mut run = ends.spawn(&refilling);
    let (mut primary, mut other) = (&ends.source, &standby);
    for turn in 0..turns {
        tokio::time::sleep(Duration::from_millis(rng.u64(0..2500))).await;
        if !synced && rng.bool() {
            cut_off(other);
            tokio::time::sleep(Duration::from_millis(rng.u64(0..800))).await;
        }
        primary.kill9().unwrap();
        other.promote().unwrap();
        (primary, other) = (other, primary);
        tokio::time::sleep(Duration::from_millis(rng.u64(0..800))).await;
        primary.psql("postgres", SLOT).unwrap();
        other.rejoin(primary, settings).unwrap();
        assert!(!run.has_ended(), "the run ended in turn {turn}: {}", run.so_far());
        if rng.u8(..) < 64 {
            let said = run.so_far();
            run.kill9().await;
            println!("{said}");
            run = ends.spawn(&refilling);
        }
    }
    ends.until_phase(&mut run, "following").await;
    assert!(writer.committed_more(30).await);
    let report = writer.stop().await;
    assert_equal(primary, &ends.target, &mut run).await;
    assert_eq!(broken_invariants(&ends.target_uri()).await.unwrap(), Vec::<String>::new());
    if synced {
        assert_kept(&ends.target, &report).await;
    }
    println!("{}", run.so_far());
    let refills = run.so_far().matches("comparing every table").count();
    ends.done(&["cutover"]).await;
    ends.done(&["verify"]).await;
    refills
}
