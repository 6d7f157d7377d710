//! Changes that wait on disk: kills, outages, a spool that is gone, full, or another's.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::Value;
use walferry::demo::server::{Server, StopMode};
use walferry::demo::writer::Writer;
use walferry::lsn::Lsn;

use crate::support::job::{Ends, conserved};
use crate::support::{Walferry, until_within};

async fn moving(rate: f64) -> (Ends, Writer) {
    let ends = Ends::start(15, 15).with_spool();
    let writer = ends.writer(rate).await;
    (ends, writer)
}

fn variable(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|text| text.parse().ok())
}

fn segments(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir.join("walferry_main_forward")).into_iter().flatten();
    let paths = entries.map(|entry| entry.unwrap().path());
    paths.filter(|path| path.extension().is_some_and(|e| e == "seg")).collect()
}

pub fn number(server: &Server, sql: &str) -> i64 {
    server.psql("app", sql).unwrap().parse().unwrap()
}

const RETAINED: &str = "select pg_current_wal_insert_lsn() - restart_lsn \
                        from pg_replication_slots where slot_name = 'walferry_main_forward'";

/// With WALFERRY_SPOOL_KILLS=200, the long form, each server goes down 50 times, and as often again
/// in a job that holds its changes in memory.
#[tokio::test(flavor = "multi_thread")]
async fn a_move_through_a_spool_with_kills_and_restarts_ends_exact() {
    let long = variable("WALFERRY_SPOOL_KILLS");
    kill_all(Ends::start(15, 15).with_spool(), long.unwrap_or(8)).await;
    if let Some(turns) = long {
        let mut ends = Ends::start(15, 15);
        ends.buffer = Some("memory".to_string());
        kill_all(ends, turns).await;
    }
}

/// The run, the source and the target each go down at random moments, in so many turns.
async fn kill_all(ends: Ends, turns: u64) {
    let writer = ends.writer(150.0).await;
    let seed = std::env::var("WALFERRY_SEED").ok().and_then(|n| n.parse().ok());
    let seed = seed.unwrap_or_else(|| fastrand::u64(..));
    println!("{:?}, {turns} turns, WALFERRY_SEED={seed}", ends.buffer);
    let mut random = fastrand::Rng::with_seed(seed);
    for turn in 0..turns {
        let wait = Duration::from_millis(random.u64(20..1500));
        let run = ends.spawn(&["run"]);
        if turn % 4 >= 2 {
            let server = if turn % 4 == 2 { &ends.source } else { &ends.target };
            tokio::time::sleep(wait / 2).await;
            server.restart(StopMode::Immediate).unwrap();
        }
        tokio::time::sleep(wait).await;
        run.signal("KILL");
        let ended = run.ended().await;
        assert_eq!(ended.code, None, "a run ended by itself: {}", ended.err);
    }
    let mut run = ends.spawn(&["run"]);
    ends.until_phase(&mut run, "following").await;
    for server in [&ends.target, &ends.source] {
        assert!(writer.committed_more(50).await, "the writer is stuck");
        server.restart(StopMode::Immediate).unwrap();
    }
    ends.switch_exactly(writer).await;
    let spools = ends.buffer.as_ref().is_some_and(|buffer| buffer.starts_with("spool"));
    assert_eq!(ends.spool_dir.join("walferry_main_forward").exists(), spools);
    let finished = ends.done(&["finish"]).await;
    run.ended().await.expect_success();
    assert_eq!(finished.out.contains("dropped spool"), spools, "{}", finished.out);
    assert!(!ends.spool_dir.join("walferry_main_forward").exists());
    assert!(!ends.spool_dir.join("walferry_main_reverse").exists());
}

/// Writes some 8 MB of WAL and lets the source let go of what it need not keep.
fn load(ends: &Ends) {
    let sql = "insert into spool_load select i, repeat(md5(random()::text), 8) \
               from generate_series(1, 20000) i";
    ends.source.psql("app", sql).unwrap();
    ends.source.psql("app", "checkpoint").unwrap();
}

/// Stops the target and writes until the slot was told what only the spool has. Gives the most that
/// the source had to keep.
pub async fn outage(ends: &Ends, run: &mut Walferry, rounds: usize) -> i64 {
    ends.target.stop(StopMode::Fast).unwrap();
    let mut most = 0;
    for _ in 0..rounds {
        load(ends);
        tokio::time::sleep(Duration::from_millis(1200)).await;
        assert!(!run.has_ended(), "the run ended:\n{}", run.so_far());
        most = most.max(number(&ends.source, RETAINED));
    }
    most
}

/// Waits until the target has what so many rounds of an outage brought.
pub async fn caught_up(ends: &Ends, rounds: usize) {
    let since = Instant::now();
    until_within(Duration::from_secs(60 + 3 * rounds as u64), "the target", async || {
        ends.status().await["lag_bytes"].as_u64().is_some_and(|lag| lag < 1 << 20)
    })
    .await;
    println!("caught up in {:.1} s", since.elapsed().as_secs_f64());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_outage_goes_into_the_spool_and_its_loss_is_refused() {
    let (mut ends, writer) = moving(50.0).await;
    ends.source.psql("app", "create table spool_load (i int, t text)").unwrap();
    ends.source.psql("app", "alter table spool_load replica identity full").unwrap();
    // WALFERRY_OUTAGE=600 for the long form: the target is away for so many seconds.
    let seconds = variable("WALFERRY_OUTAGE");
    let budget_mb = if seconds.is_some() { 96 } else { 64 };
    let rounds = seconds.map_or(12, |seconds| seconds as usize * 4 / 5);
    let budget = format!("{budget_mb}MB");
    let arguments = ["run", "--wal-budget", &*budget];
    let mut run = ends.spawn(&arguments);
    ends.until_phase(&mut run, "following").await;
    let status = ends.status().await;
    assert_eq!(status["spool"]["needed"], false, "{status}");
    let begun = number(&ends.source, "select pg_current_wal_insert_lsn() - '0/0'");
    let most = outage(&ends, &mut run, rounds).await;
    let written = number(&ends.source, "select pg_current_wal_insert_lsn() - '0/0'") - begun;
    println!("{} MB written, at most {} MB kept", written >> 20, most >> 20);
    assert!(written > budget_mb << 20, "too little was written: {written}");
    assert!(most < budget_mb << 20, "{most} bytes of WAL were kept");
    run.kill9().await;

    ends.target.resume().unwrap();
    let status = ends.status().await;
    assert_eq!(status["spool"]["needed"], true, "{status}");
    // What is spooled is not on the target.
    assert!(status["lag_bytes"].as_u64().unwrap() > 48 << 20, "{status}");
    let text = ends.done(&["status"]).await.out;
    assert!(text.contains("a new copy of every table"), "{text}");
    // Elsewhere.
    let elsewhere = ends.spawn_on(&arguments, &[("WALFERRY_HOST", "elsewhere")]).ended().await;
    assert_eq!(elsewhere.code, Some(1), "{elsewhere:?}");
    assert!(elsewhere.err.contains("and this is elsewhere"), "{}", elsewhere.err);
    // Without it.
    let spool = ends.buffer.replace("memory".to_string());
    let refused = ends.walferry(&["run"]).await;
    assert_eq!(refused.code, Some(1), "{refused:?}");
    assert!(refused.err.contains("has what the target"), "{}", refused.err);
    ends.buffer = Some("spool:elsewhere".to_string());
    let refused = ends.walferry(&["run"]).await;
    assert_eq!(refused.code, Some(1), "{refused:?}");
    assert!(refused.err.contains("the spool of this job is in"), "{}", refused.err);
    ends.buffer = spool;
    // Deleted behind our back.
    let (dir, away) = (ends.spool_dir.join("walferry_main_forward"), ends.spool_dir.join("away"));
    std::fs::rename(&dir, &away).unwrap();
    let refused = ends.walferry(&["run"]).await;
    assert_eq!(refused.code, Some(1), "{refused:?}");
    for said in ["was told", "is empty", "copies every table again"] {
        assert!(refused.err.contains(said), "{}", refused.err);
    }
    std::fs::remove_dir_all(&dir).unwrap();
    std::fs::rename(&away, &dir).unwrap();

    // The job knows where its spool is, so that the option need not be repeated.
    let spool = ends.buffer.take();
    let run = ends.spawn(&arguments);
    let report = writer.stop().await;
    caught_up(&ends, rounds).await;
    ends.done(&["verify"]).await;
    ends.assert_exact(&report).await;
    ends.buffer = spool;
    // What the spool held is on the target, and the spool is not needed any more.
    until_within(Duration::from_secs(20), "the slot to be told", async || {
        ends.status().await["spool"]["needed"] == false
    })
    .await;
    run.signal("INT");
    run.ended().await.expect_success();
    ends.buffer = Some("memory".to_string());
    let run = ends.spawn(&["run"]);
    until_within(Duration::from_secs(20), "it to be gone", async || !dir.exists()).await;
    run.signal("INT");
    run.ended().await.expect_success();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_spool_leaves_wal_on_the_source_and_goes_on() {
    let (ends, writer) = moving(50.0).await;
    ends.source.psql("app", "create table spool_load (i int, t text)").unwrap();
    ends.source.psql("app", "alter table spool_load replica identity full").unwrap();
    let limit_mb = 8;
    let limit = format!("{limit_mb}MB");
    let mut run = ends.spawn(&["run", "--spool-limit", &limit]);
    ends.until_phase(&mut run, "following").await;
    outage(&ends, &mut run, 5).await;
    let held: u64 = segments(&ends.spool_dir).iter().map(|p| p.metadata().unwrap().len()).sum();
    println!("{held} bytes held of {limit_mb} MB");
    assert!(held <= limit_mb << 20, "{held}");
    assert!(held > limit_mb << 19, "{held}");
    ends.target.resume().unwrap();
    let report = writer.stop().await;
    ends.done(&["verify"]).await;
    ends.assert_exact(&report).await;
    run.signal("INT");
    run.ended().await.expect_success();
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_are_spooled_while_rows_are_still_copied() {
    let (ends, writer) = moving(100.0).await;
    ends.source.psql("app", "create table big (i int primary key, t text)").unwrap();
    let fill = "insert into big select i, md5(i::text) from generate_series(1, 50000) i";
    ends.source.psql("app", fill).unwrap();
    // The copy waits for this table, and not for the slot.
    let mut run = ends.spawn(&["run", "--jobs", "1"]);
    until_within(Duration::from_secs(60), "the table", async || {
        let there = "select to_regclass('public.big') is not null";
        ends.target.psql("app", there).is_ok_and(|answer| answer == "t")
    })
    .await;
    let lock = "begin; lock table big in share mode; prepare transaction 'held'";
    ends.target.psql("app", lock).unwrap();
    let sent = "select confirmed_flush_lsn - '0/0' from pg_replication_slots \
                where slot_name = 'walferry_main_forward'";
    let size =
        || segments(&ends.spool_dir).iter().map(|p| p.metadata().unwrap().len()).sum::<u64>();
    until_within(Duration::from_secs(60), "a spool", async || size() > 0).await;
    let (before, phase) = (size(), "select phase from walferry.job");
    assert!(writer.committed_more(100).await, "the writer is stuck");
    until_within(Duration::from_secs(20), "it to grow", async || size() > before + 5000).await;
    assert_eq!(ends.target.psql("app", phase).unwrap(), "copying");
    println!("spooled {} bytes while copying, confirmed {}", size(), number(&ends.source, sent));
    ends.target.psql("app", "commit prepared 'held'").unwrap();
    ends.until_phase(&mut run, "following").await;
    let report = writer.stop().await;
    ends.done(&["verify"]).await;
    ends.assert_exact(&report).await;
    run.signal("INT");
    run.ended().await.expect_success();
}

/// What the spool has and the slot was not told comes again from a pull that begins anew: here while
/// nothing can be applied, in transactions of one chunk and of many.
async fn a_pull_begins_anew(decoder: &str) {
    let (ends, writer) = moving(50.0).await;
    ends.source.psql("app", "create table spool_load (i int, t text)").unwrap();
    ends.source.psql("app", "alter table spool_load replica identity full").unwrap();
    let arguments = ["run", "--decoder", decoder, "--transport", "pull", "--wal-budget", "4GB"];
    let mut run = ends.spawn(&arguments);
    ends.until_phase(&mut run, "following").await;
    let lock = "begin; lock table spool_load in share mode; prepare transaction 'held'";
    ends.target.psql("app", lock).unwrap();
    // One transaction: its commit is right behind the position that it saw.
    let sql = "insert into spool_load select i, repeat(md5(random()::text), 8) \
               from generate_series(1, 20000) i; select pg_current_wal_insert_lsn()";
    let load_lsn: Lsn = ends.source.psql("app", sql).unwrap().trim().parse().unwrap();
    let position = |status: &Value, key: &str| status[key].as_str()?.parse::<Lsn>().ok();
    until_within(Duration::from_secs(60), "the spool to be ahead", async || {
        let status = ends.status().await;
        position(&status, "spooled_lsn") > Some(load_lsn)
            && position(&status, "confirmed_lsn") < position(&status, "spooled_lsn")
    })
    .await;
    ends.source.restart(StopMode::Immediate).unwrap();
    assert!(writer.committed_more(20).await, "the writer is stuck");
    assert!(!run.has_ended(), "{}", run.so_far());
    run.kill9().await;
    let mut run = ends.spawn(&arguments);
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(!run.has_ended(), "{}", run.so_far());
    ends.target.psql("app", "commit prepared 'held'").unwrap();
    assert!(writer.committed_more(50).await, "the writer is stuck");
    let report = writer.stop().await;
    ends.done(&["verify"]).await;
    ends.assert_exact(&report).await;
    conserved(&ends.status().await["tables"]);
    run.signal("INT");
    run.ended().await.expect_success();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_by_pgoutput_begins_anew_behind_the_spool() {
    a_pull_begins_anew("pgoutput").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_by_test_decoding_begins_anew_once_the_slot_was_told() {
    a_pull_begins_anew("test_decoding").await;
}

/// The most memory a process has had, in bytes.
fn peak_memory(run: &Walferry) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", run.pid().unwrap())).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
}

#[tokio::test(flavor = "multi_thread")]
async fn one_transaction_of_many_rows_passes_in_fixed_memory_and_shows_its_progress() {
    // WALFERRY_ROWS=3000000 for the long form.
    let rows = std::env::var("WALFERRY_ROWS").ok().and_then(|n| n.parse().ok()).unwrap_or(300_000);
    let (ends, writer) = moving(20.0).await;
    ends.source.psql("app", "create table large (i int primary key, t text)").unwrap();
    let mut run = ends.spawn(&["run"]);
    ends.until_phase(&mut run, "following").await;
    let before = peak_memory(&run);
    let fill = "insert into large select i, repeat(md5(i::text), 3) from generate_series(1, $N) i";
    ends.source.psql("app", &fill.replace("$N", &rows.to_string())).unwrap();
    let (mut seen, begun) = (Vec::new(), Instant::now());
    while number(&ends.target, "select count(*) from large") == 0 {
        assert!(begun.elapsed() < Duration::from_secs(540), "{seen:?}\n{}", run.so_far());
        seen.push(ends.status().await["rows_written"].as_i64().unwrap_or(0));
        seen.dedup();
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(number(&ends.target, "select count(*) from large"), rows);
    let peak = peak_memory(&run);
    println!("{rows} rows: {} MB before, {} MB at most; shown: {seen:?}", before >> 20, peak >> 20);
    assert!(peak - before < 160 << 20, "{before} {peak}");
    assert!(seen.len() > 2, "no progress was shown: {seen:?}");
    let report = writer.stop().await;
    ends.done(&["verify"]).await;
    ends.assert_exact(&report).await;
    run.signal("INT");
    run.ended().await.expect_success();
}
