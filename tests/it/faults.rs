//! What breaks while a job runs: its process, servers, networks, sessions. The end state is exact
//! each time.
//!
//! The defaults are short. `make kill` and `make faults` run the long forms: WALFERRY_KILLS is the
//! number of kills, WALFERRY_FAULTS=long has every kind of network fault in every phase.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use walferry::demo::server::{Server, StopMode};

use crate::support::job::conserved;
use crate::support::walk::{Move, hold, let_go, undo};
use crate::support::{Walferry, session, until_within};

const QUICK_SENDER: &str = "wal_sender_timeout = 2s";

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|text| text.parse().ok())
}

fn long() -> bool {
    std::env::var("WALFERRY_FAULTS").is_ok_and(|text| text == "long")
}

/// Ends the session that holds a lease.
const LEASE: &str = "select pg_terminate_backend(pid) from pg_locks \
                     where locktype = 'advisory' and classid = 2002873446";

/// What strikes.
#[derive(Clone, Copy, Debug)]
enum Strike {
    /// How the target goes down, and how the source does.
    Restart(StopMode, StopMode),
    Cut,
    CutSilently,
    Stall,
}

impl Strike {
    /// Strikes both sides. Returns when they are whole again.
    async fn on(self, job: &Move) {
        let nets = [&job.source_net, &job.target_net];
        match self {
            Strike::Restart(target, source) => {
                job.ends.target.restart(target).unwrap();
                job.ends.source.restart(source).unwrap();
                return;
            }
            Strike::Cut => nets.map(|net| net.cut()),
            Strike::CutSilently => nets.map(|net| net.cut_silently()),
            Strike::Stall => nets.map(|net| net.stall()),
        };
        // Longer than wal_sender_timeout, which is what the number stands for.
        tokio::time::sleep(Duration::from_secs(3)).await;
        for net in nets {
            net.restore();
        }
    }
}

/// One job through all its phases, struck in each.
async fn struck_in_every_phase(strike: Strike) {
    let begun = Instant::now();
    let mut times = Vec::new();
    let mut job = Move::start(&[QUICK_SENDER], 60_000, 60.0).await;
    let before = job.ends.inventories().await;
    let mut phase_done = |phase: &str, since: Instant| {
        times.push(format!("{phase} {:.1}", since.elapsed().as_secs_f64()));
    };

    hold(&job.ends.source, "slot", "insert into faults.tick values (0)");
    let mut run = job.ends.spawn(&["run"]);
    let waits = "select count(*) > 0 from pg_replication_slots where slot_name like 'walferry%'";
    job.until_true(&job.ends.source, waits).await;
    job.until(&mut run, "schema").await;
    let since = Instant::now();
    strike.on(&job).await;
    job.source_net.throttle(200_000);
    let_go(&job.ends.source, "slot");
    job.until(&mut run, "copying").await;
    phase_done("schema", since);

    let copied = |table: &str| {
        format!("select state = 'done' from walferry.table_copy where name = '{table}'")
    };
    job.until_true(&job.ends.target, &copied("still")).await;
    job.until_true(&job.ends.target, &copied("tick")).await;
    let bulk = "select state = 'todo' from walferry.table_copy where name = 'bulk'";
    job.until_true(&job.ends.target, bulk).await;
    strike.on(&job).await;
    hold(&job.ends.target, "index", "lock table faults.still in row exclusive mode");
    job.source_net.restore();
    let since = Instant::now();
    let building = "select count(*) > 0 from pg_stat_activity where wait_event_type = 'Lock' \
                    and application_name like 'walferry run%'";
    job.until_true(&job.ends.target, building).await;
    phase_done("copying", since);

    let indexed = "select count(*) > 0 from pg_index where indrelid = 'faults.tick'::regclass";
    job.until_true(&job.ends.target, indexed).await;
    let since = Instant::now();
    strike.on(&job).await;
    // Builds are committed without waiting for the disk: a server that is lost may have lost it, and
    // it is built again, for which the row below would be in the way.
    job.until_true(&job.ends.target, indexed).await;
    // Not a lock of the table: it may be analyzed still.
    hold(&job.ends.target, "apply", "insert into faults.tick values (1)");
    job.ends.source.psql("app", "insert into faults.tick values (1)").unwrap();
    let_go(&job.ends.target, "index");
    job.until(&mut run, "catching_up").await;
    phase_done("index build", since);

    strike.on(&job).await;
    let since = Instant::now();
    undo(&job.ends.target, "apply");
    job.until(&mut run, "following").await;
    phase_done("catching_up", since);

    strike.on(&job).await;
    let since = Instant::now();
    flows(&job, &job.ends.source, &job.ends.target, 2).await;
    phase_done("following", since);

    let verify = job.ends.spawn(&["verify"]);
    strike.on(&job).await;
    let since = Instant::now();
    let _either = verify.ended().await;
    job.ends.done(&["verify"]).await;
    phase_done("verify", since);

    // Prepared only once the fence waits for it: before, it would be refused by name.
    let mut writer = session(&job.ends.source, "app").await;
    writer.execute("begin; insert into faults.tick values (3)").await.unwrap();
    let cutover = job.ends.spawn(&["cutover", "--timeout", "15s"]);
    let fencing = "select count(*) > 0 from walferry.journal where step = 'fence'";
    job.until_true(&job.ends.target, fencing).await;
    writer.execute("prepare transaction 'fence'").await.unwrap();
    // It names itself as walferry's sessions do, and would be found at the end.
    drop(writer);
    strike.on(&job).await;
    let since = Instant::now();
    let ended = cutover.ended().await;
    assert_eq!(ended.code, Some(1), "{ended:?}");
    job.until(&mut run, "following").await;
    let_go(&job.ends.source, "fence");
    no_fence(&job.ends.source);
    phase_done("cutting_over", since);

    until_within(Duration::from_secs(60), "a cutover", async || {
        job.ends.walferry(&["cutover"]).await.code == Some(0)
    })
    .await;
    job.send_writer();
    strike.on(&job).await;
    let since = Instant::now();
    flows(&job, &job.ends.target, &job.ends.source, 4).await;
    phase_done("switched", since);

    until_within(Duration::from_secs(60), "a rollback", async || {
        job.ends.walferry(&["rollback"]).await.code == Some(0)
    })
    .await;
    job.send_writer();
    strike.on(&job).await;
    let since = Instant::now();
    flows(&job, &job.ends.source, &job.ends.target, 5).await;
    phase_done("rolled_back", since);

    job.still_table_was_copied_once();
    println!("{strike:?}: seconds to go on: {}", times.join(", "));
    assert!(!run.has_ended(), "the run ended: {}", run.so_far());
    job.assert_exact(&run).await;
    let ends = &job.ends;
    conserved(&ends.status().await["tables"]);
    ends.done(&["finish"]).await;
    run.ended().await.expect_success();
    let after = ends.inventories().await;
    // A swallowed end of a command's session is unknown to its server: the proxy's side lives.
    let swallowed = matches!(strike, Strike::CutSilently | Strike::Stall);
    let stays = |thing: &String| !(swallowed && thing == "+ session walferry");
    let left = [before.0.diff(&after.0), before.1.leftovers(&after.1)].concat();
    let sessions = "select pid, backend_start, state, wait_event, query from pg_stat_activity \
         where application_name like 'walferry%'";
    for server in [&ends.source, &ends.target] {
        println!("sessions: {}", server.psql("app", sessions).unwrap());
    }
    assert_eq!(left.into_iter().filter(stays).collect::<Vec<_>>(), Vec::<String>::new());
    println!("{strike:?}: {:.1} s in all", begun.elapsed().as_secs_f64());
}

/// A row written on one side arrives on the other.
async fn flows(job: &Move, from: &Server, to: &Server, id: u32) {
    from.psql("app", &format!("insert into faults.tick values ({id})")).unwrap();
    let arrived = format!("select count(*) > 0 from faults.tick where id = {id}");
    job.until_true(to, &arrived).await;
}

/// Writers are not stopped on this side.
fn no_fence(server: &Server) {
    let seals =
        "select count(*) from pg_trigger where tgname ~ '^walferry_seal' and tgenabled <> 'D'";
    assert_eq!(server.psql("app", seals).unwrap(), "0");
    server
        .psql(
            "app",
            "begin; set local lock_timeout = '2s'; insert into faults.tick values (-1); \
                        rollback",
        )
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn both_servers_restart_in_every_phase() {
    use StopMode::{Fast, Immediate};
    if long() {
        struck_in_every_phase(Strike::Restart(Fast, Fast)).await;
        struck_in_every_phase(Strike::Restart(Immediate, Immediate)).await;
        struck_in_every_phase(Strike::Restart(Fast, Immediate)).await;
    }
    struck_in_every_phase(Strike::Restart(Immediate, Fast)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_network_is_cut_in_every_phase() {
    if long() {
        struck_in_every_phase(Strike::Cut).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_network_is_cut_silently_in_every_phase() {
    if long() {
        struck_in_every_phase(Strike::CutSilently).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_network_stalls_in_every_phase() {
    if long() {
        struck_in_every_phase(Strike::Stall).await;
    }
}

/// Where kills have hit.
#[derive(Default)]
struct Hits(BTreeMap<String, u32>);

impl Hits {
    /// Looks at what was under way.
    fn count(&mut self, job: &Move) {
        let mut at = job.phase();
        if at == "cutting_over" {
            let sql = "select flip || ' ' || step from walferry.journal order by id desc limit 1";
            at = job.ends.target.psql("app", sql).unwrap();
        } else if at == "copying" && job.finished_tables().iter().any(|t| t.contains("bulk")) {
            at = "index build".to_string();
        }
        *self.0.entry(at).or_default() += 1;
    }
}

/// Phases on the way to following, each of which is waited for before a kill.
const WAY: [&str; 5] = ["schema", "copying", "index build", "catching_up", "following"];

/// Steps of a flip, each of which is waited for before a kill.
const STEPS: [&str; 11] = [
    "check routes",
    "canary",
    "lag",
    "fence",
    "barrier",
    "drain",
    "rest",
    "sequences",
    "seal",
    "switch",
    "after",
];

/// Waits until the job has come to a phase, or beyond.
async fn on_the_way(job: &Move, phase: &str) {
    let at = |name: &str| WAY.iter().position(|phase| *phase == name);
    until_within(Duration::from_secs(30), phase, || {
        let now = job.phase();
        let built = "select count(*) > 0 from walferry.table_copy having bool_and(state = 'done')";
        let copied = now == "copying" && job.ends.target.psql("app", built).is_ok_and(|t| t == "t");
        let now = if copied { at("index build") } else { at(&now) };
        std::future::ready(now >= at(phase))
    })
    .await;
}

/// Waits until a new step of this name has begun, or until the flip is over.
async fn at_step(job: &Move, flip: &mut Walferry, step: &str, after: i64) {
    let sql =
        format!("select count(*) > 0 from walferry.journal where id > {after} and step = '{step}'");
    let over = "select count(*) > 0 from walferry.command where state in ('queued', 'running')";
    let mut home = crate::support::session(&job.ends.target, "app").await;
    let since = Instant::now();
    let mut asked = false;
    while since.elapsed() < Duration::from_secs(20) && !flip.has_ended() {
        if home.query(&sql).await.unwrap()[0].bool(0).unwrap() {
            return;
        }
        let waits = home.query(over).await.unwrap()[0].bool(0).unwrap();
        if asked && !waits {
            return;
        }
        asked |= waits;
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// One job under `kills` kills: a third on the way to following, the rest in cutovers and rollbacks.
async fn killed_again_and_again(kills: u64, random: &mut fastrand::Rng, hits: &mut Hits) {
    let mut job = Move::start(&[], 60_000, 100.0).await;
    // Steps that take a few round trips become long enough to be hit.
    job.source_net.delay(Duration::from_millis(2));
    let before = job.ends.inventories().await;
    let mut finished = Vec::new();
    let first = kills.div_ceil(3);
    for turn in 0..first {
        let run = job.ends.spawn(&["run"]);
        on_the_way(&job, WAY[(turn * 5 / first) as usize]).await;
        let wait = Duration::from_millis(random.u64(0..150));
        assert!(run.kill9_after(wait).await, "the run ended by itself");
        hits.count(&job);
        let now = job.finished_tables();
        assert!(finished.iter().all(|table| now.contains(table)), "{finished:?} {now:?}");
        finished = now;
    }
    let mut run = job.ends.spawn(&["run"]);
    job.until(&mut run, "following").await;
    settled(&job, &mut run).await;
    let mut step = random.usize(0..STEPS.len());
    for _ in 0..kills - first {
        job.send_writer();
        let verb = if job.phase() == "switched" { "rollback" } else { "cutover" };
        let journal = "select coalesce(max(id), 0) from walferry.journal";
        let after = job.ends.target.psql("app", journal).unwrap().parse().unwrap();
        let mut flip = job.ends.spawn(&[verb, "--route", "hook:sleep 0.02", "--timeout", "20s"]);
        step = (step + 1) % STEPS.len();
        at_step(&job, &mut flip, STEPS[step], after).await;
        tokio::time::sleep(Duration::from_micros(random.u64(0..20_000))).await;
        run.kill9().await;
        hits.count(&job);
        if random.u8(0..3) == 0 {
            // The command finds nobody, and drives the job itself.
            flip.ended().await;
        } else {
            flip.kill9().await;
        }
        run = job.ends.spawn(&["run"]);
        settled(&job, &mut run).await;
        let live = if job.phase() == "switched" { &job.ends.target } else { &job.ends.source };
        no_fence(live);
    }
    job.send_writer();
    let now = job.finished_tables();
    assert!(finished.iter().all(|table| now.contains(table)), "{finished:?} {now:?}");
    job.still_table_was_copied_once();
    if job.phase() == "following" {
        job.ends.done(&["cutover"]).await;
        job.send_writer();
    }
    let flows = job.writer().committed_more(20).await;
    assert!(flows, "the writer is stuck: {:?}", job.writer().report_now());
    job.assert_exact(&run).await;
    let ends = &job.ends;
    conserved(&ends.status().await["tables"]);
    ends.done(&["finish"]).await;
    run.ended().await.expect_success();
    let after = ends.inventories().await;
    assert_eq!(before.0.diff(&after.0), Vec::<String>::new());
    assert_eq!(before.1.leftovers(&after.1), Vec::<String>::new());
}

/// Waits until a runner has taken the job up and left no flip half done.
async fn settled(job: &Move, run: &mut Walferry) {
    let alive = "select count(*) > 0 from pg_stat_activity where query like 'listen%' \
                 or application_name like 'walferry run%' and state = 'idle'";
    let since = Instant::now();
    until_within(Duration::from_secs(60), "a phase to go on from", || {
        let quiet = job.ends.nothing_is_asked();
        let phase = job.phase();
        assert!(!run.has_ended(), "the run ended in {phase}:\n{}", run.so_far());
        assert!(since.elapsed() < Duration::from_secs(40), "{phase}:\n{}", run.so_far());
        let stands = matches!(&*phase, "following" | "switched" | "rolled_back");
        let alive = || job.ends.target.psql("app", alive).is_ok_and(|answer| answer == "t");
        std::future::ready(quiet && stands && alive())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn kill_9_at_random_moments_leaves_an_exact_end() {
    let begun = Instant::now();
    let seed = number("WALFERRY_SEED").unwrap_or_else(|| fastrand::u64(..));
    println!("WALFERRY_SEED={seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let (all, mut done) = (number("WALFERRY_KILLS").unwrap_or(15), 0);
    let mut hits = Hits::default();
    while done < all {
        let kills = (all - done).min(25);
        killed_again_and_again(kills, &mut random, &mut hits).await;
        done += kills;
    }
    let seconds = begun.elapsed().as_secs_f64();
    println!("{all} kills, exact each time, in {seconds:.0} s; hits: {:?}", hits.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_runners_one_runs_and_the_other_takes_over_at_once() {
    let mut job = Move::start(&[], 2000, 50.0).await;
    let mut runs = [job.ends.spawn(&["run"]), job.ends.spawn(&["run"])];
    until_within(Duration::from_secs(30), "one to give way", || {
        std::future::ready(runs.iter_mut().any(Walferry::has_ended))
    })
    .await;
    let loser = usize::from(!runs[0].has_ended());
    let [first, second] = runs;
    let (mut winner, loser) = if loser == 0 { (second, first) } else { (first, second) };
    let loser = loser.ended().await;
    assert_eq!(loser.code, Some(1), "{loser:?}");
    assert!(loser.err.contains("is being run by another process"), "{}", loser.err);
    job.until(&mut winner, "following").await;

    let since = Instant::now();
    winner.kill9().await;
    let mut next = job.ends.spawn(&["run"]);
    flows(&job, &job.ends.source, &job.ends.target, 1).await;
    println!("taken over in {:.1} s", since.elapsed().as_secs_f64());
    assert!(since.elapsed() < Duration::from_secs(5), "{:?}", since.elapsed());

    // The lease's backend is the one that holds the advisory lock.
    let ended = job.ends.target.psql("app", LEASE).unwrap();
    assert_eq!(ended, "t", "no lease was held");
    next.says("terminating connection").await;
    flows(&job, &job.ends.source, &job.ends.target, 2).await;
    job.assert_exact(&next).await;
    let ends = &job.ends;
    conserved(&ends.status().await["tables"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_terminated_at_random_while_copying_and_following() {
    let mut job = Move::start(&[], 60_000, 80.0).await;
    let seed = number("WALFERRY_SEED").unwrap_or_else(|| fastrand::u64(..));
    println!("WALFERRY_SEED={seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    job.source_net.throttle(4_000_000);
    let mut run = job.ends.spawn(&["run"]);
    let one = "select count(pg_terminate_backend(pid)) from (select pid from pg_stat_activity \
               where application_name like 'walferry run%' order by random() limit 1) a";
    let (mut copying, mut following) = (0, 0);
    while following < if long() { 25 } else { 12 } {
        tokio::time::sleep(Duration::from_millis(random.u64(20..300))).await;
        assert!(!run.has_ended(), "the run ended:\n{}", run.so_far());
        let server = if random.bool() { &job.ends.source } else { &job.ends.target };
        let count = match &*job.phase() {
            "copying" if copying < 8 => &mut copying,
            "following" => &mut following,
            _ => continue,
        };
        *count += server.psql("app", one).unwrap().parse::<u32>().unwrap();
        if copying >= 8 {
            job.source_net.restore();
        }
    }
    assert!(copying > 0, "nothing was hit while copying");
    job.still_table_was_copied_once();
    job.until(&mut run, "following").await;
    job.assert_exact(&run).await;
    let ends = &job.ends;
    conserved(&ends.status().await["tables"]);
    run.signal("INT");
    run.ended().await.expect_success();
}

#[tokio::test(flavor = "multi_thread")]
async fn ctrl_c_ends_in_three_seconds_in_every_phase() {
    let mut job = Move::start(&[], 60_000, 60.0).await;
    let stop = async |run: Walferry, phase: &str| {
        let since = Instant::now();
        run.signal("INT");
        let ended = run.ended().await;
        assert_eq!(ended.code, Some(0), "{phase}: {ended:?}");
        let took = since.elapsed();
        assert!(took < Duration::from_secs(3), "{phase}: {took:?}");
        println!("{phase}: stopped in {:.2} s", took.as_secs_f64());
    };
    hold(&job.ends.source, "slot", "insert into faults.tick values (0)");
    let mut run = job.ends.spawn(&["run"]);
    run.says("the slot waits for").await;
    stop(run, "schema").await;
    let_go(&job.ends.source, "slot");

    job.source_net.throttle(200_000);
    let mut run = job.ends.spawn(&["run"]);
    job.until(&mut run, "copying").await;
    let still = "select state = 'done' from walferry.table_copy where name = 'still'";
    job.until_true(&job.ends.target, still).await;
    stop(run, "copying").await;
    hold(&job.ends.target, "index", "lock table faults.still in row exclusive mode");
    job.source_net.restore();

    let run = job.ends.spawn(&["run"]);
    let building = "select count(*) > 0 from pg_stat_activity where wait_event_type = 'Lock' \
                    and application_name like 'walferry run%'";
    job.until_true(&job.ends.target, building).await;
    stop(run, "index build").await;
    job.ends.source.psql("app", "insert into faults.tick values (1)").unwrap();
    hold(&job.ends.target, "apply", "lock table faults.tick in row exclusive mode");
    let_go(&job.ends.target, "index");
    let_go(&job.ends.target, "apply");

    let mut run = job.ends.spawn(&["run"]);
    job.until(&mut run, "following").await;
    // An applier that waits for a lock.
    hold(&job.ends.target, "apply", "lock table faults.tick in share mode");
    job.ends.source.psql("app", "insert into faults.tick values (2)").unwrap();
    let waiting = "select count(*) > 0 from pg_locks where not granted";
    job.until_true(&job.ends.target, waiting).await;
    stop(run, "following, waiting for a lock").await;
    let_go(&job.ends.target, "apply");

    for (net, side) in [(&job.source_net, "source"), (&job.target_net, "target")] {
        let mut run = job.ends.spawn(&["run"]);
        job.until(&mut run, "following").await;
        flows(&job, &job.ends.source, &job.ends.target, 10 + side.len() as u32 + net.port() as u32)
            .await;
        net.cut_silently();
        stop(run, &format!("following, {side} silent")).await;
        let run = job.ends.spawn(&["run"]);
        tokio::time::sleep(Duration::from_millis(500)).await;
        stop(run, &format!("connecting, {side} silent")).await;
        net.restore();
        // Nobody could tell the server that the lease is free; it finds out after 30 s.
        job.ends.target.psql("app", LEASE).unwrap();
    }

    let mut run = job.ends.spawn(&["run"]);
    job.until(&mut run, "following").await;
    flows(&job, &job.ends.source, &job.ends.target, 9).await;
    let mut writer = session(&job.ends.source, "app").await;
    writer.execute("begin; insert into faults.tick values (8)").await.unwrap();
    let cutover = job.ends.spawn(&["cutover"]);
    job.until(&mut run, "cutting_over").await;
    stop(run, "cutting_over").await;
    writer.execute("commit").await.unwrap();
    // The command goes on by itself, and tells how it ended.
    let ended = cutover.ended().await;
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(ended.err.contains("nothing was switched"), "{ended:?}");
    no_fence(&job.ends.source);

    let mut run = job.ends.spawn(&["run"]);
    job.until(&mut run, "following").await;
    job.assert_exact(&run).await;
    let ends = &job.ends;
    ends.done(&["cancel"]).await;
    run.ended().await.expect_success();
}

#[tokio::test(flavor = "multi_thread")]
async fn status_tells_the_truth_while_the_target_is_down_and_after() {
    let mut job = Move::start(&[QUICK_SENDER], 2000, 100.0).await;
    let mut run = job.ends.spawn(&["run"]);
    job.until(&mut run, "following").await;
    assert_eq!(job.ends.status().await["error"], serde_json::Value::Null);

    job.ends.target.stop(StopMode::Fast).unwrap();
    assert!(job.writer().committed_more(300).await, "the writer is stuck");
    let ended = job.ends.walferry(&["status"]).await;
    assert_eq!(ended.code, Some(1));
    assert!(ended.err.contains("target"), "{}", ended.err);
    job.ends.target.resume().unwrap();
    let since = Instant::now();
    flows(&job, &job.ends.source, &job.ends.target, 1).await;
    println!("caught up {:.1} s after the target came back", since.elapsed().as_secs_f64());

    // With the source gone, the runner lives and says what is wrong.
    job.source_net.cut();
    let status = status_until(&job, "an error", |status| !status["error"].is_null()).await;
    assert_eq!(status["phase"], "following");
    assert!(status["error"].as_str().unwrap().contains("source"), "{status}");
    job.source_net.restore();
    status_until(&job, "no error", |status| status["error"].is_null()).await;

    // An applier that is held up shows as growing lag, and no error.
    hold(&job.ends.target, "apply", "lock table faults.tick in share mode");
    job.ends.source.psql("app", "insert into faults.tick values (2)").unwrap();
    let lag = |status: &serde_json::Value| status["lag_bytes"].as_i64().unwrap_or(0);
    let first = lag(&status_until(&job, "lag", |status| lag(status) > 10_000).await);
    status_until(&job, "more lag", |status| lag(status) > first * 2).await;
    let_go(&job.ends.target, "apply");
    status_until(&job, "less lag", |status| lag(status) < first).await;
    job.assert_exact(&run).await;
    let ends = &job.ends;

    // A runner that died leaves a slot that tells how far behind it is.
    run.kill9().await;
    let before = lag(&ends.status().await);
    ends.source
        .psql(
            "app",
            "insert into faults.bulk select i, repeat('x', 200), 1 \
                             from generate_series(100000, 102000) i",
        )
        .unwrap();
    let status = ends.status().await;
    assert!(lag(&status) > before + 400_000, "{before} {status}");
    assert_eq!(status["runner"], serde_json::Value::Null);
}

async fn status_until(
    job: &Move,
    what: &str,
    condition: impl Fn(&serde_json::Value) -> bool,
) -> serde_json::Value {
    let since = Instant::now();
    loop {
        let status = job.ends.status().await;
        if condition(&status) {
            return status;
        }
        assert!(since.elapsed() < Duration::from_secs(40), "no {what}: {status}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_network_is_noticed_and_left_behind() {
    let mut job = Move::start(&[QUICK_SENDER], 2000, 60.0).await;
    let mut run = job.ends.spawn(&["run"]);
    job.until(&mut run, "following").await;
    Strike::CutSilently.on(&job).await;
    let since = Instant::now();
    flows(&job, &job.ends.source, &job.ends.target, 1).await;
    println!("flowing again {:.1} s after the network came back", since.elapsed().as_secs_f64());
    assert!(since.elapsed() < Duration::from_secs(30), "{:?}", since.elapsed());
    assert!(!run.has_ended(), "the run ended:\n{}", run.so_far());
    job.assert_exact(&run).await;
    let ends = &job.ends;
    conserved(&ends.status().await["tables"]);
}

/// A small file system of its own, gone when dropped.
struct SmallDisk(std::path::PathBuf);

impl SmallDisk {
    /// `None` where we may not mount.
    fn mount(size: &str) -> Option<SmallDisk> {
        use std::os::unix::fs::PermissionsExt;
        let path = std::env::temp_dir().join(format!("walferry-disk-{:016x}", fastrand::u64(..)));
        std::fs::create_dir(&path).unwrap();
        let options = format!("size={size},mode=0777");
        let mounted = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", &options, "tmpfs"])
            .arg(&path)
            .output();
        if !mounted.is_ok_and(|output| output.status.success()) {
            std::fs::remove_dir(&path).unwrap();
            return None;
        }
        // tablespaces want a directory of the server's user; 0777 lets it be made by SQL's copy.
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o777)).unwrap();
        Some(SmallDisk(path))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg("-l").arg(&self.0).output();
        let _ = std::fs::remove_dir(&self.0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_target_disk_is_named_and_the_job_goes_on_once_there_is_room() {
    let Some(disk) = SmallDisk::mount("8m") else {
        println!("not run: this user may not mount a tmpfs");
        return;
    };
    let mut job = Move::start(&[], 60_000, 60.0).await;
    let place = disk.0.display();
    let target = &job.ends.target;
    let owner = std::fs::metadata(target.data_dir()).unwrap();
    use std::os::unix::fs::MetadataExt;
    std::os::unix::fs::chown(&disk.0, Some(owner.uid()), Some(owner.gid())).unwrap();
    target.psql("app", &format!("create tablespace small location '{place}'")).unwrap();
    target.psql("app", "alter database app set default_tablespace = small").unwrap();
    let ended = job.ends.walferry(&["run"]).await;
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(ended.err.contains("No space left on device"), "{}", ended.err);
    assert!(ended.err.contains("room on the target"), "{}", ended.err);
    let status = job.ends.status().await;
    assert!(status["error"].as_str().unwrap().contains("No space left"), "{status}");

    let grow =
        std::process::Command::new("mount").args(["-o", "remount,size=400m"]).arg(&disk.0).status();
    assert!(grow.unwrap().success());
    let mut run = job.ends.spawn(&["run"]);
    job.until(&mut run, "following").await;
    assert!(job.ends.status().await["error"].is_null());
    job.assert_exact(&run).await;
    let ends = &job.ends;
    conserved(&ends.status().await["tables"]);
    drop(job);
    drop(disk);
}
