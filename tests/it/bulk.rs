//! Backlogs that are read in bulk, through a whole job: killed in the middle of the reading and
//! where the stream takes over, cut off from the source, then gone through, switched, and compared.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use walferry::demo::proxy::Proxy;

use crate::support::job::{Ends, conserved};
use crate::support::{self, Walferry, session};

/// Transactions of one backlog: three new rows, one changed, one gone in each.
const TRANSACTIONS: u32 = 3000;

/// Where a run is killed.
#[derive(Clone, Copy, Debug)]
enum Strike {
    /// The source has been asked for a chunk, and decodes it or sends it.
    Reading,
    /// Some of the backlog is on the target, and more is to come.
    Applying,
    /// So long after the reading mark is gone: the slot is nobody's, then a walsender's.
    HandingOver(Duration),
}

struct Backlogs {
    ends: Ends,
    net: Proxy,
    settings: PathBuf,
    round: u32,
}

impl Backlogs {
    async fn start() -> Backlogs {
        let mut ends = Ends::start(15, 15);
        let net = Proxy::start(ends.source.port()).unwrap();
        ends.source_via = net.uri(&ends.source_uri());
        let table = "create table backlog (id int primary key, n int not null, text text)";
        ends.source.psql("app", table).unwrap();
        let name = format!("walferry-bulk-{:016x}.toml", fastrand::u64(..));
        let settings = std::env::temp_dir().join(name);
        std::fs::write(&settings, "[tuning]\nbulk-bytes = 500000\n").unwrap();
        Backlogs { ends, net, settings, round: 0 }
    }

    fn run(&self) -> Walferry {
        self.ends.spawn(&["run", "-vv", "--config", self.settings.to_str().unwrap()])
    }

    /// Writes a backlog; nobody reads meanwhile.
    fn pile_up(&mut self) {
        self.round += 1;
        let first = self.round * 10_000_000;
        let sql = format!(
            "do $$ begin for i in 1..{TRANSACTIONS} loop \
               insert into backlog select {first} + i * 10 + k, 0, md5(k::text) \
                 from generate_series(1, 3) k; \
               update backlog set n = n + i where id = {first} + i * 10 - 8; \
               delete from backlog where id = {first} + i * 10 + 3; \
               commit; end loop; end $$"
        );
        self.ends.source.psql("app", &sql).unwrap();
    }

    /// Runs into the backlog and kills the run there.
    async fn struck(&mut self, strike: Strike) {
        self.pile_up();
        let mut source = session(&self.ends.source, "app").await;
        let mut target = session(&self.ends.target, "app").await;
        let marked = "select count(*) > 0 from pg_replication_slots where temporary";
        let unmarked = "select count(*) = 0 from pg_replication_slots where temporary";
        match strike {
            // Some 2 MB of messages, so that a busy machine has time to strike before their end.
            Strike::Reading | Strike::Applying => self.net.throttle(500_000),
            Strike::HandingOver(_) => self.net.delay(Duration::from_millis(60)),
        }
        let mut run = self.run();
        run.says("reading in bulk").await;
        support::until_sql(&mut source, marked).await;
        match strike {
            Strike::Reading => {}
            Strike::Applying => self.has_some().await,
            Strike::HandingOver(after) => {
                support::until_sql(&mut source, unmarked).await;
                tokio::time::sleep(after).await;
            }
        }
        assert!(!run.has_ended(), "{}", run.so_far());
        let stays = !matches!(strike, Strike::HandingOver(_));
        let late = run.so_far().contains("streaming what is left");
        assert!(!(stays && late), "{strike:?} came too late");
        run.kill9().await;
        self.net.restore();
        // What was made for reading goes with its session, and the slot knows nothing of it (law 1).
        support::until_sql(&mut source, unmarked).await;
        let told = "select confirmed_flush_lsn from pg_replication_slots \
                    where slot_name = 'walferry_main_forward'";
        let told = source.query_one(told, &[]).await.unwrap().string(0).unwrap();
        let kept = format!(
            "select end_lsn >= '{told}' from walferry.progress \
             where stream = 'walferry_main_forward'"
        );
        assert!(target.query_one(&kept, &[]).await.unwrap().bool(0).unwrap(), "{told} was told");
    }

    /// Waits until some of the last backlog is on the target.
    async fn has_some(&self) {
        let mut target = session(&self.ends.target, "app").await;
        let first = self.round * 10_000_000;
        let some = format!("select exists (select from public.backlog where id > {first})");
        support::until_sql(&mut target, &some).await;
    }

    /// Waits until the stream has caught up with what is written all the time.
    async fn caught_up(&self, run: &mut Walferry) {
        for _ in 0..300 {
            assert!(!run.has_ended(), "{}", run.so_far());
            let status = self.ends.status().await;
            if status["lag_bytes"].as_u64().is_some_and(|lag| lag < 100_000) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        panic!("not caught up after a minute:\n{}", run.so_far());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_killed_or_cut_off_while_it_reads_in_bulk_and_at_the_hand_over_ends_exact() {
    let mut job = Backlogs::start().await;
    let writer = job.ends.writer(100.0).await;
    let mut run = job.run();
    job.ends.until_phase(&mut run, "following").await;
    run.kill9().await;
    for strike in [
        Strike::Reading,
        Strike::Applying,
        Strike::HandingOver(Duration::ZERO),
        Strike::HandingOver(Duration::from_millis(fastrand::u64(50..300))),
    ] {
        job.struck(strike).await;
    }
    job.pile_up();
    job.net.throttle(500_000);
    let mut run = job.run();
    run.says("reading in bulk").await;
    job.has_some().await;
    assert!(!run.so_far().contains("streaming what is left"), "the cut came too late");
    job.net.cut();
    job.net.restore();
    run.says("streaming what is left").await;
    job.caught_up(&mut run).await;
    job.ends.done(&["verify"]).await;
    job.ends.done(&["cutover", "--max-lag", "10s"]).await;
    let report = writer.stop().await;
    job.ends.done(&["verify"]).await;
    job.ends.assert_exact(&report).await;
    conserved(&job.ends.status().await["tables"]);
    let rows = format!("select count(*) = {} from backlog", job.round * TRANSACTIONS * 2);
    assert_eq!(job.ends.target.psql("app", &rows).unwrap(), "t");
    let left = "select string_agg(slot_name, ' ') from pg_replication_slots where temporary";
    for server in [&job.ends.source, &job.ends.target] {
        assert_eq!(server.psql("app", left).unwrap(), "");
    }
    job.ends.done(&["finish"]).await;
    run.ended().await.expect_success();
    std::fs::remove_file(&job.settings).unwrap();
}

/// A target that is far is asked for much before the first change can go there: what a run asks
/// one after the other has a bound, and what it can ask at once it does.
#[tokio::test(flavor = "multi_thread")]
async fn a_run_for_a_target_that_is_far_begins_after_few_round_trips() {
    const ROUND_TRIP: Duration = Duration::from_millis(100);
    let mut ends = Ends::start(15, 15);
    let net = Proxy::start(ends.target.port()).unwrap();
    ends.target_via = net.uri(&ends.target_uri());
    ends.source.psql("app", "create table far (id int primary key)").unwrap();
    let mut run = ends.spawn(&["run"]);
    ends.until_phase(&mut run, "following").await;
    run.signal("INT");
    run.ended().await.expect_success();
    ends.source.psql("app", "insert into far select generate_series(1, 10)").unwrap();
    net.delay(ROUND_TRIP);
    let begun = Instant::now();
    let mut run = ends.spawn(&["run"]);
    while ends.target.psql("app", "select count(*) from far").unwrap() != "10" {
        assert!(!run.has_ended() && begun.elapsed() < Duration::from_secs(60), "{}", run.so_far());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let trips = begun.elapsed().as_secs_f64() / ROUND_TRIP.as_secs_f64();
    println!("the first change was there after {trips:.1} round trips");
    net.delay(Duration::ZERO);
    ends.done(&["cancel"]).await;
    run.ended().await;
    assert!(trips < 40.0, "{trips:.1}");
}
