//! The main job by each decoder and transport: there, back, and over kills.

use std::time::Duration;

use walferry::demo::writer::create_schema;

use crate::job::{assert_exact, writer};
use crate::support::job::{Ends, conserved};

async fn write_to_bank(ends: &Ends) {
    for i in 0..50 {
        let sql = format!("update bank.accounts set abalance = abalance + {i} where aid = {i} + 1");
        ends.target.psql("app", &sql).unwrap();
    }
}

/// Run, cutover, rollback and finish under a writer; nothing lost, nothing left behind. Debian's
/// wal2json is 2.5, which cannot tell the NaN that the writer writes into schema shop, so that only
/// the bank moves. The other decoders and transports are cells of `matrix`.
async fn there_and_back_by_wal2json(transport: &'static str) {
    let ends = Ends::start(15, 15);
    create_schema(&ends.source_uri(), 1).await.unwrap();
    let first = writer(&ends.source_uri(), 150.0, 1).await;
    let before = ends.inventories().await;
    let asked = ["--decoder", "wal2json", "--no-nan", "--include=bank.*", "--transport", transport];
    let with = |command: &[&'static str]| [command, &asked].concat();
    ends.done(&with(&["check"])).await;
    let mut run = ends.spawn(&with(&["run"]));
    ends.until_phase(&mut run, "following").await;
    ends.done(&with(&["verify"])).await;
    let status = ends.status().await;
    assert_eq!(status["decoder"], "wal2json", "{status}");
    assert_eq!(status["transport"], transport, "{status}");

    ends.done(&with(&["cutover"])).await;
    let first = first.stop().await;
    // The writer needs the tables that stayed.
    write_to_bank(&ends).await;
    ends.done(&with(&["rollback"])).await;
    ends.done(&with(&["verify"])).await;
    ends.assert_exact_in("bank.", &[&first]).await;
    let status = ends.status().await;
    assert_eq!(status["phase"], "rolled_back");
    conserved(&status["tables"]);
    conserved(&status["reverse"]["tables"]);

    ends.done(&with(&["finish"])).await;
    run.ended().await.expect_success();
    let after = ends.inventories().await;
    assert_eq!(before.0.diff(&after.0), Vec::<String>::new());
    assert_eq!(before.1.leftovers(&after.1), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_moves_and_comes_back_by_wal2json_and_stream() {
    there_and_back_by_wal2json("stream").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_moves_and_comes_back_by_wal2json_and_pull() {
    there_and_back_by_wal2json("pull").await;
}

/// Between kills the transport changes; the slot is the same, and nothing is lost or doubled. Two
/// of three runs pull. `WALFERRY_KILLS` says how often, `WALFERRY_SEED` repeats a run.
#[tokio::test(flavor = "multi_thread")]
async fn a_pull_killed_at_random_moments_that_changes_its_transport_ends_exact() {
    let ends = Ends::start(15, 15);
    create_schema(&ends.source_uri(), 1).await.unwrap();
    let writer = writer(&ends.source_uri(), 150.0, 1).await;
    let read = |name| std::env::var(name).ok().and_then(|n| n.parse().ok());
    let seed = read("WALFERRY_SEED").unwrap_or_else(|| fastrand::u64(..));
    println!("WALFERRY_SEED={seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let with = |transport| ["run", "--transport", transport];
    let kills = read("WALFERRY_KILLS").unwrap_or(10) as usize;
    for transport in ["pull", "pull", "stream"].into_iter().cycle().take(kills) {
        let wait = Duration::from_millis(random.u64(50..1500));
        let killed = ends.spawn(&with(transport)).kill9_after(wait).await;
        assert!(killed, "a run ended by itself");
    }
    let mut run = ends.spawn(&with("pull"));
    ends.until_phase(&mut run, "following").await;
    assert!(writer.committed_more(100).await, "the writer is stuck");
    let report = writer.stop().await;
    ends.done(&["verify"]).await;
    assert_exact(&ends, &[&report]).await;
    conserved(&ends.status().await["tables"]);
    run.signal("INT");
    run.ended().await.expect_success();
}

/// A walsender sends a plugin's text in the database's encoding, whenever the transport is chosen.
#[tokio::test(flavor = "multi_thread")]
async fn a_later_run_may_not_stream_the_text_of_a_database_that_is_not_utf8() {
    let ends = Ends::start(15, 15);
    ends.source.psql("postgres", "drop database app").unwrap();
    let latin = "create database app template template0 encoding 'LATIN1' locale 'C'";
    ends.source.psql("postgres", latin).unwrap();
    ends.source.psql("app", "create table public.t (id int primary key, v text)").unwrap();
    let with = |transport| ["run", "--decoder", "test_decoding", "--transport", transport];
    let mut run = ends.spawn(&with("pull"));
    ends.until_phase(&mut run, "following").await;
    run.signal("INT");
    run.ended().await.expect_success();
    let refused = ends.walferry(&with("stream")).await;
    let said = format!("{refused:?}");
    assert!(refused.code == Some(1) && said.contains("LATIN1"), "{said}");
    // Nothing was stored, so that leaving the option out goes on as before.
    let mut again = ends.spawn(&["run"]);
    ends.until_phase(&mut again, "following").await;
    assert_eq!(ends.status().await["transport"], "pull");
    again.signal("INT");
    again.ended().await.expect_success();
}

/// What comes in by an origin made after the slot would be left out too, be it another job's.
#[tokio::test(flavor = "multi_thread")]
async fn test_decoding_is_refused_once_another_job_has_an_origin() {
    let ends = Ends::start(15, 15);
    ends.source.psql("app", "create table public.t (id int primary key, v text)").unwrap();
    let with = ["run", "--decoder", "test_decoding"];
    let mut run = ends.spawn(&with);
    ends.until_phase(&mut run, "following").await;
    let origin = "select pg_replication_origin_create('walferry_other_forward')";
    ends.source.psql("app", origin).unwrap();
    let refused = ends.walferry(&["cutover"]).await;
    let said = format!("{refused:?}");
    assert!(refused.code != Some(0) && said.contains("walferry_other_forward"), "{said}");
    run.signal("INT");
    run.ended().await;
    let said = format!("{:?}", ends.walferry(&with).await);
    assert!(said.contains("walferry_other_forward"), "{said}");
    let drop = "select pg_replication_origin_drop('walferry_other_forward')";
    ends.source.psql("app", drop).unwrap();
    let mut again = ends.spawn(&with);
    ends.until_phase(&mut again, "following").await;
    ends.done(&["cutover"]).await;
    again.signal("INT");
    again.ended().await.expect_success();
}

/// A source that answers connections and no questions does not keep status from what it knows.
#[tokio::test(flavor = "multi_thread")]
async fn status_is_told_though_the_source_does_not_answer() {
    let ends = Ends::start(15, 15);
    ends.source.psql("app", "create table public.t (id int primary key, v text)").unwrap();
    let mut run = ends.spawn(&["run"]);
    ends.until_phase(&mut run, "following").await;
    ends.done(&["cutover", "--dry-run"]).await;
    run.signal("INT");
    run.ended().await.expect_success();
    let mut holder = crate::support::session(&ends.source, "app").await;
    let lock = "begin; lock table walferry.stream_table in access exclusive mode";
    holder.execute(lock).await.unwrap();
    let told = tokio::time::timeout(Duration::from_secs(30), ends.status()).await.unwrap();
    assert_eq!(told["phase"], "following", "{told}");
    holder.execute("rollback; drop table walferry.stream_table cascade").await.unwrap();
    let told = ends.status().await;
    assert_eq!(told["phase"], "following", "{told}");
}

/// Minor releases of 2026 let only listed plugins decode; earlier ones do not know the list.
#[tokio::test(flavor = "multi_thread")]
async fn a_plugin_that_the_server_does_not_let_decode_is_told_with_what_lets_it() {
    let ends = Ends::start(15, 15);
    ends.source.psql("app", "create table public.t (id int primary key)").unwrap();
    let with = ["check", "--decoder", "wal2json", "--no-nan"];
    // Nobody writes, and 15 has none that tells too little.
    let ready = ends.done(&with).await;
    assert!(!ready.out.contains("older than 2.5"), "{ready:?}");
    if ends.source.psql("app", "show output_plugin_libraries").is_err() {
        return;
    }
    let only = "alter system set output_plugin_libraries = pgoutput";
    ends.source.psql("app", only).unwrap();
    ends.source.psql("app", "select pg_reload_conf(), pg_sleep(1)").unwrap();
    let refused = ends.walferry(&with).await;
    let fix = "ALTER SYSTEM SET output_plugin_libraries = pgoutput, wal2json;";
    assert!(refused.code == Some(1) && refused.out.contains(fix), "{refused:?}");
    ends.source.psql("app", fix).unwrap();
    ends.source.psql("app", "select pg_reload_conf(), pg_sleep(1)").unwrap();
    ends.done(&with).await;
}
