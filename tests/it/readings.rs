//! The main job by each decoder and transport: there, back, and over kills.

use std::time::Duration;

use walferry::demo::writer::{Report, create_schema};

use crate::job::{assert_exact, sequences_are_past, writer};
use crate::support::job::{Ends, conserved};

async fn write_to_bank(ends: &Ends) {
    for i in 0..50 {
        let sql = format!("update bank.accounts set abalance = abalance + {i} where aid = {i} + 1");
        ends.target.psql("app", &sql).unwrap();
    }
}

/// Run, cutover, rollback and finish under a writer; nothing lost, nothing left behind.
async fn there_and_back(majors: (u32, u32), decoder: &'static str, transport: &'static str) {
    let ends = Ends::start(majors.0, majors.1);
    create_schema(&ends.source_uri(), 1).await.unwrap();
    // Tables that take no part, changed all the time.
    ends.source.psql("app", "create table public.left_out (id int primary key)").unwrap();
    let first = writer(&ends.source_uri(), 150.0, 1).await;
    let before = ends.inventories().await;
    // Debian's wal2json is 2.5, which cannot tell the NaN that the writer writes into schema shop.
    let left_out = match decoder {
        "wal2json" => ["--no-nan", "--include=bank.*"],
        _ => ["--exclude", "public.left_out"],
    };
    let asked = [["--decoder", decoder], ["--transport", transport], left_out].concat();
    let with = |command: &[&'static str]| [command, &asked].concat();
    ends.done(&with(&["check"])).await;
    let mut run = ends.spawn(&with(&["run"]));
    ends.until_phase(&mut run, "following").await;
    ends.source.psql("app", "insert into public.left_out select generate_series(1, 500)").unwrap();
    ends.done(&with(&["verify"])).await;
    let status = ends.status().await;
    assert_eq!(status["decoder"], decoder, "{status}");
    assert_eq!(status["transport"], transport, "{status}");

    ends.done(&with(&["cutover"])).await;
    let first = first.stop().await;
    if decoder != "wal2json" {
        sequences_are_past(&ends.source_uri(), &ends.target_uri()).await;
    }
    let second = match decoder {
        // The writer needs the tables that stayed.
        "wal2json" => None,
        _ => Some(writer(&ends.target_uri(), 150.0, 100).await),
    };
    match &second {
        Some(second) => assert!(second.committed_more(100).await, "the writer is stuck"),
        None => write_to_bank(&ends).await,
    }
    ends.done(&with(&["rollback"])).await;
    let mut reports = vec![first];
    if let Some(second) = second {
        reports.push(second.stop().await);
    }
    let reports: Vec<&Report> = reports.iter().collect();
    ends.done(&with(&["verify"])).await;
    ends.source.psql("app", "drop table public.left_out").unwrap();
    match decoder {
        "wal2json" => ends.assert_exact_in("bank.", &reports).await,
        _ => drop(assert_exact(&ends, &reports).await),
    }
    let status = ends.status().await;
    assert_eq!(status["phase"], "rolled_back");
    conserved(&status["tables"]);
    conserved(&status["reverse"]["tables"]);

    ends.done(&with(&["finish"])).await;
    run.ended().await.expect_success();
    let after = ends.inventories().await;
    let left_out = |line: &String| !line.contains("left_out");
    let lost: Vec<_> = before.0.diff(&after.0).into_iter().filter(left_out).collect();
    assert_eq!(lost, Vec::<String>::new());
    assert_eq!(before.1.leftovers(&after.1), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_moves_and_comes_back_by_pgoutput_and_pull() {
    there_and_back((15, 15), "pgoutput", "pull").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_moves_and_comes_back_by_wal2json_and_stream() {
    there_and_back((15, 15), "wal2json", "stream").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_moves_and_comes_back_by_wal2json_and_pull() {
    there_and_back((15, 15), "wal2json", "pull").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_moves_and_comes_back_by_test_decoding_and_stream() {
    there_and_back((15, 15), "test_decoding", "stream").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_moves_and_comes_back_by_test_decoding_and_pull() {
    there_and_back((15, 15), "test_decoding", "pull").await;
}

/// Between kills the transport changes; the slot is the same, and nothing is lost or doubled.
async fn killed(decoder: &str, transports: &[&str]) {
    let ends = Ends::start(15, 15);
    create_schema(&ends.source_uri(), 1).await.unwrap();
    let writer = writer(&ends.source_uri(), 150.0, 1).await;
    let seed = std::env::var("WALFERRY_SEED").ok().and_then(|n| n.parse().ok());
    let seed = seed.unwrap_or_else(|| fastrand::u64(..));
    println!("WALFERRY_SEED={seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let with = |transport| ["run", "--decoder", decoder, "--transport", transport];
    for transport in transports.iter().cycle().take(10) {
        let wait = Duration::from_millis(random.u64(50..1500));
        ends.spawn(&with(transport)).kill9_after(wait).await;
    }
    let mut run = ends.spawn(&with(transports[0]));
    ends.until_phase(&mut run, "following").await;
    assert!(writer.committed_more(100).await, "the writer is stuck");
    let report = writer.stop().await;
    ends.done(&["verify"]).await;
    assert_exact(&ends, &[&report]).await;
    conserved(&ends.status().await["tables"]);
    run.signal("INT");
    run.ended().await.expect_success();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_killed_at_random_moments_ends_exact() {
    killed("pgoutput", &["pull"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_changes_its_transport_between_kills_and_ends_exact() {
    killed("pgoutput", &["stream", "pull"]).await;
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
    ends.done(&with).await;
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
