//! A side dies while the switch is made, and while the way back is open.

use std::time::Duration;

use walferry::demo::server::Server;
use walferry::demo::writer::{Writer, create_schema};

use super::{
    SLOT, SYNCS_SLOTS, assert_kept, assert_same, cut_off, followed_by_a_standby, level, of_both,
    start_writer, stop,
};
use crate::support::job::Ends;
use crate::support::{Walferry, until_within};

/// A side with a standby that has all that its primary has acknowledged, and its slots.
struct Pair {
    standby: Server,
    uri: String,
}

async fn pair(primary: &Server) -> Pair {
    primary.psql("postgres", SLOT).unwrap();
    let standby = primary.standby(&SYNCS_SLOTS).unwrap();
    let waits = ["synchronous_standby_names = '*'", "synchronized_standby_slots = 'standby'"];
    primary.configure(&waits).unwrap();
    primary.reload().unwrap();
    until_within(Duration::from_secs(20), "synchronous commit", || async {
        let sql = "select count(*) from pg_stat_replication where sync_state = 'sync'";
        primary.psql("app", sql).unwrap() == "1"
    })
    .await;
    Pair { uri: of_both(primary, &standby), standby }
}

/// Waits until the standby has a copy of the slot that could be gone on with.
async fn has_slot(standby: &Server, stream: &str) {
    let slot = format!(
        "select count(*) from pg_replication_slots \
         where slot_name = 'walferry_main_{stream}' and synced and not temporary"
    );
    until_within(Duration::from_secs(60), "the slot's copy", || async {
        standby.reload().unwrap();
        standby.psql("app", &slot).unwrap() == "1"
    })
    .await;
}

/// The phase that a cut-short switch came to, once a runner has settled it.
async fn settled(ends: &Ends, run: &mut Walferry) -> String {
    for _ in 0..150 {
        let status = ends.status().await;
        let phase = status["phase"].as_str().unwrap_or_default().to_string();
        if matches!(&*phase, "following" | "switched") && status["held_clients"] == false {
            return phase;
        }
        assert!(!run.has_ended(), "the run ended: {}", run.so_far());
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    panic!("not settled: {}\n{}", ends.status().await, run.so_far());
}

/// Either side's primary dies at a random moment of a cutover, in which its standby has all: the
/// switch is undone or made, nothing that was acknowledged is lost, and one side alone takes writes.
/// Then the other side's dies under the reverse stream, which goes on, and leads back.
#[tokio::test(flavor = "multi_thread")]
async fn a_primary_that_dies_in_a_cutover_leaves_one_owner() {
    // Each has four servers: one by chance in the short form.
    let both = std::env::var("WALFERRY_PROMOTIONS").is_ok();
    let sides = if both { vec![true, false] } else { vec![fastrand::bool()] };
    for source_first in sides {
        let mut ends = Ends::start(17, 17);
        create_schema(&ends.source_uri(), 1).await.unwrap();
        let (source, target) = (pair(&ends.source).await, pair(&ends.target).await);
        (ends.source_via, ends.target_via) = (source.uri.clone(), target.uri.clone());
        let mut run = ends.spawn(&["run"]);
        ends.until_phase(&mut run, "following").await;
        let writer = start_writer(&ends.source_via, 1).await;
        has_slot(&source.standby, "forward").await;
        // Arms the way back, whose slot takes a moment to get there.
        ends.done(&["cutover", "--dry-run"]).await;
        has_slot(&target.standby, "reverse").await;
        let (dying, standby) = match source_first {
            true => (&ends.source, &source.standby),
            false => (&ends.target, &target.standby),
        };
        let cutover = ends.spawn(&["cutover"]);
        tokio::time::sleep(Duration::from_millis(fastrand::u64(100..500))).await;
        dying.kill9().unwrap();
        standby.promote().unwrap();
        let ended = cutover.ended().await;
        let mut phase = settled(&ends, &mut run).await;
        println!("source first {source_first}: {phase}, exit {:?}: {}", ended.code, ended.err);
        if phase == "following" {
            assert!(writer.committed_more(30).await, "{}", run.so_far());
            // The slot of the way back may be one that had not got there.
            ends.done(&["cutover", "--max-lag", "20s"]).await;
            phase = settled(&ends, &mut run).await;
        }
        assert_eq!(phase, "switched", "{}", run.so_far());
        let first = writer.stop().await;
        refuses_writers(&source.uri).await;
        let back = start_writer(&ends.target_via, 11).await;
        assert!(back.committed_more(30).await);
        // The side that is left: its primary dies under the reverse stream's writes.
        if !source_first {
            ends.source.kill9().unwrap();
            source.standby.promote().unwrap();
        }
        assert!(back.committed_more(60).await);
        led_back(&ends, &mut run, back, &[first]).await;
        stop(run).await;
    }
}

/// A writer there is refused.
async fn refuses_writers(uri: &str) {
    let mut session = walferry::pg::Session::connect(
        &walferry::pg::Config::parse(uri).unwrap(),
        walferry::pg::Purpose::Sql,
    )
    .await
    .unwrap();
    let sql = "delete from shop.orders where false";
    let error = session.execute(sql).await.unwrap_err().to_string();
    assert!(error.contains("has moved"), "{error}");
}

/// Rolls back, and compares both sides row by row, and with what was acknowledged.
async fn led_back(
    ends: &Ends,
    run: &mut Walferry,
    writer: Writer,
    earlier: &[walferry::demo::writer::Report],
) {
    until_within(Duration::from_secs(60), "the way back", async || {
        let lag = ends.status().await["reverse"]["lag_bytes"].as_u64();
        lag.is_some_and(|lag| lag < 1 << 20)
    })
    .await;
    ends.done(&["rollback", "--max-lag", "20s"]).await;
    let report = writer.stop().await;
    ends.done(&["verify"]).await;
    assert_same(&ends.source_via, &ends.target_via, run).await;
    for report in earlier.iter().chain([&report]) {
        for uri in [&ends.source_via, &ends.target_via] {
            assert_kept_at(uri, report).await;
        }
    }
}

async fn assert_kept_at(uri: &str, report: &walferry::demo::writer::Report) {
    let found = walferry::demo::ledger::check(uri, &report.ledger).await.unwrap();
    assert!(found.is_exact(), "{found:?}");
}

/// Without synchronous commit a standby of the side that was left may come up without the seal: it
/// is shut again, and said. Where it also lacks what the way back was told, that is refused by name.
#[tokio::test(flavor = "multi_thread")]
async fn a_promoted_standby_of_the_side_that_was_left_is_shut_again() {
    let mut ends = Ends::start(15, 15);
    create_schema(&ends.source_uri(), 1).await.unwrap();
    let standby = ends.source.standby(&[]).unwrap();
    ends.source_via = of_both(&ends.source, &standby);
    let mut run = ends.spawn(&["run"]);
    ends.until_phase(&mut run, "following").await;
    let writer = start_writer(&ends.source_uri(), 1).await;
    assert!(writer.committed_more(50).await);
    ends.done(&["cutover", "--dry-run"]).await;
    let report = writer.stop().await;
    level(&ends.source, &standby).await;
    cut_off(&standby);
    ends.done(&["cutover"]).await;
    ends.source.kill9().unwrap();
    standby.promote().unwrap();
    until_within(Duration::from_secs(20), "the seal", || async {
        run.so_far().contains("has lost its seal")
    })
    .await;
    until_within(Duration::from_secs(10), "a shut source", || async {
        let tried = standby.psql("app", "delete from shop.orders where false");
        tried.is_err_and(|error| error.to_string().contains("has moved"))
    })
    .await;
    assert_kept(&ends.target, &report).await;
    // The way back goes on from what the promoted server has, or is refused with what is lost.
    let ended = ends.walferry(&["rollback", "--max-lag", "20s"]).await;
    match ended.code {
        Some(0) => {
            assert_same(&ends.source_via, &ends.target_via, &mut run).await;
        }
        _ => {
            let said = run.ended().await.err;
            assert!(said.contains("forked at") || said.contains("durably has only"), "{said}");
            assert!(said.contains("walferry finish keeps them"), "{said}");
        }
    }
}

/// The target is the live side, and its standby takes over without the last of what it wrote, which
/// the source has by the way back. Applications go on; the way back ends, and says what it lacks.
#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_lost_live_rows_in_its_promotion_ends_the_way_back_by_name() {
    let mut ends = Ends::start(15, 15);
    create_schema(&ends.source_uri(), 1).await.unwrap();
    let (mut run, standby) = followed_by_a_standby(&mut ends).await;
    ends.done(&["cutover"]).await;
    let kept = start_writer(&ends.target_uri(), 1).await;
    assert!(kept.committed_more(50).await);
    let kept = kept.stop().await;
    level(&ends.target, &standby).await;
    cut_off(&standby);
    let lost = start_writer(&ends.target_uri(), 11).await;
    assert!(lost.committed_more(50).await);
    lost.stop().await;
    assert_same(&ends.source_via, &ends.target_uri(), &mut run).await;
    ends.target.kill9().unwrap();
    standby.promote().unwrap();
    let ended = run.ended().await;
    assert_eq!(ended.code, Some(1), "{}", ended.out);
    // Either stream may be the first to say so.
    let said = ["forked at", "does not exist", "durably has only"];
    assert!(said.iter().any(|said| ended.err.contains(said)), "{}", ended.err);
    assert!(ended.err.contains("walferry finish keeps them"), "{}", ended.err);
    // Not filled again from the side that was left, whatever is asked for.
    let refill = ends.walferry(&["run", "--after-failover", "refill"]).await;
    assert!(refill.code == Some(1) && refill.err.contains("walferry finish"), "{}", refill.err);
    let refused = ends.walferry(&["rollback"]).await;
    assert_eq!(refused.code, Some(1), "{}", refused.err);
    let live = start_writer(&standby.uri("app"), 21).await;
    assert!(live.committed_more(30).await);
    let live = live.stop().await;
    for report in [&kept, &live] {
        assert_kept(&standby, report).await;
    }
    refuses_writers(&ends.source_uri()).await;
    ends.done(&["finish"]).await;
}

/// The same of a job that is split, of the tables that have gone; others are left as they are.
#[tokio::test(flavor = "multi_thread")]
async fn a_promoted_source_of_a_split_job_is_shut_again_where_its_tables_have_gone() {
    let mut ends = Ends::start(15, 15);
    let tables = "create table public.gone (id int primary key); \
         create table public.stays (id int primary key); create table public.gone_before (id int)";
    ends.source.psql("app", tables).unwrap();
    let standby = ends.source.standby(&[]).unwrap();
    ends.source_via = of_both(&ends.source, &standby);
    let mut run = ends.spawn(&["run"]);
    ends.until_phase(&mut run, "following").await;
    ends.done(&["cutover", "--tables", "public.gone_before"]).await;
    level(&ends.source, &standby).await;
    cut_off(&standby);
    ends.done(&["cutover", "--tables", "public.gone"]).await;
    assert_eq!(ends.status().await["phase"], "split");
    ends.source.kill9().unwrap();
    standby.promote().unwrap();
    until_within(Duration::from_secs(20), "the seal", || async {
        run.so_far().contains("the source has lost its seal on 1 tables")
    })
    .await;
    let write =
        |table: &str| standby.psql("app", &format!("insert into public.{table} values (1)"));
    until_within(Duration::from_secs(10), "a shut table", || async {
        write("gone").is_err_and(|error| error.to_string().contains("is on the other server"))
    })
    .await;
    assert!(write("gone_before").is_err());
    write("stays").unwrap();
    // Without its slot the rest cannot be followed any more: each side keeps what it has.
    let said = run.ended().await.err;
    assert!(said.contains("walferry finish --split keeps them"), "{said}");
    let refused = ends.walferry(&["finish"]).await;
    assert!(refused.code == Some(1) && refused.err.contains("finish --split"), "{refused:?}");
    ends.done(&["finish", "--split"]).await;
    for (server, table) in [(&ends.target, "gone"), (&standby, "stays"), (&standby, "gone")] {
        server.psql("app", &format!("insert into public.{table} values (2)")).unwrap();
        let left = "select count(*) from pg_trigger where tgname like 'walferry%'";
        assert_eq!(server.psql("app", left).unwrap(), "0");
    }
}
