//! The main job through the commands of the command line, on real servers, under a writer.

use walferry::demo::compare::compare;
use walferry::demo::ledger;
use walferry::demo::writer::{Options, Report, Writer, broken_invariants, create_schema_for};

use crate::support::job::{Ends, conserved};

/// Both servers, the data, and a writer on the source.
async fn moving(majors: (u32, u32), rate: f64) -> (Ends, Writer) {
    let ends = Ends::start(majors.0, majors.1);
    create_schema_for(&ends.source_uri(), 1, majors.1).await.unwrap();
    let writer = writer(&ends.source_uri(), rate, 1).await;
    (ends, writer)
}

pub async fn writer(uri: &str, rate: f64, first_writer: i32) -> Writer {
    let options = Options { tx_per_second: Some(rate), first_writer, ..Options::new(uri) };
    Writer::start(options).await.unwrap()
}

/// Both sides are the same row by row, the application's own promises hold, and each acknowledged
/// transaction is there once. Gives the number of rows compared.
pub async fn assert_exact(ends: &Ends, reports: &[&Report]) -> u64 {
    let comparison = compare(&ends.source_uri(), &ends.target_uri()).await.unwrap();
    // Sequences are set at a flip; until then, and after one, the idle side's are behind.
    let rows = comparison.differences.iter().filter(|line| !line.starts_with("sequence "));
    assert_eq!(rows.collect::<Vec<_>>(), Vec::<&String>::new());
    assert!(comparison.rows() > 1000);
    for uri in [ends.source_uri(), ends.target_uri()] {
        assert_eq!(broken_invariants(&uri).await.unwrap(), Vec::<String>::new());
        for report in reports {
            let check = ledger::check(&uri, &report.ledger).await.unwrap();
            assert!(check.is_exact(), "{check:?}");
        }
    }
    comparison.rows()
}

/// No sequence of `live` gives a value that `old` has given.
pub async fn sequences_are_past(old: &str, live: &str) {
    let comparison = compare(old, live).await.unwrap();
    let behind = comparison.differences.iter().filter(|line| line.starts_with("sequence "));
    assert_eq!(behind.collect::<Vec<_>>(), Vec::<&String>::new());
}

/// What a whole job has shown.
#[derive(Debug)]
pub struct Figures {
    /// Rows compared, those of one side counted.
    pub rows: u64,
    /// Transactions committed, on either side.
    pub transactions: u64,
}

/// The job is read as it was asked to be, and a table that takes no part is written to, which
/// decoders of text give all the same.
async fn read_as_asked(ends: &Ends, how: &[&str]) {
    let fill = "insert into public.left_out select generate_series(1, 500)";
    ends.source.psql("app", fill).unwrap();
    let status = ends.status().await;
    for (option, key) in [("--decoder", "decoder"), ("--transport", "transport")] {
        let at = how.iter().position(|word| *word == option);
        assert!(at.is_none_or(|at| status[key] == how[at + 1]), "{how:?}: {status}");
    }
}

/// The whole job between servers of two major versions, everything that a user may want of it.
/// `how`: options of every command, such as the decoder.
pub async fn there_and_back(majors: (u32, u32), how: &[&str]) -> Figures {
    let (ends, first) = moving(majors, 200.0).await;
    let plain = how.is_empty();
    let apart: &[&str] = if plain { &[] } else { &["--exclude", "public.left_out"] };
    let how = [how, apart].concat();
    let with = |command: &[&'static str]| -> Vec<String> {
        command.iter().chain(&how).map(|word| word.to_string()).collect()
    };
    let done = async |command: &[&'static str]| {
        let words = with(command);
        ends.done(&words.iter().map(String::as_str).collect::<Vec<_>>()).await
    };
    let before = ends.inventories().await;
    if !plain {
        ends.source.psql("app", "create table public.left_out (id int primary key)").unwrap();
    }
    done(&["check"]).await;
    let words = with(&["run"]);
    let mut run = ends.spawn(&words.iter().map(String::as_str).collect::<Vec<_>>());
    ends.until_phase(&mut run, "following").await;
    if !plain {
        read_as_asked(&ends, &how).await;
    }
    done(&["verify"]).await;

    // A machine at work on much else is no reason to refuse here.
    let outcome = done(&["cutover", "--json", "--max-lag", "10s"]).await.json();
    assert!(outcome["fenced_ms"].as_f64().unwrap() < 5000.0, "{outcome}");
    assert_ne!(outcome["switched_lsn"], "0/0");
    let first = first.stop().await;
    assert!(first.committed > 0);
    sequences_are_past(&ends.source_uri(), &ends.target_uri()).await;
    // vitess#9453: who was connected before cannot write to the old side.
    let refused = ends.source.psql("app", "delete from bank.ledger").unwrap_err().to_string();
    assert!(refused.contains("this database has moved"), "{refused}");

    let second = writer(&ends.target_uri(), 200.0, 100).await;
    assert!(second.committed_more(100).await, "the writer is stuck");
    done(&["verify"]).await;
    done(&["rollback", "--max-lag", "10s"]).await;
    let second = second.stop().await;
    assert!(second.committed > 100);
    done(&["verify"]).await;
    if !plain {
        ends.source.psql("app", "drop table public.left_out").unwrap();
    }
    let rows = assert_exact(&ends, &[&first, &second]).await;
    sequences_are_past(&ends.target_uri(), &ends.source_uri()).await;
    let status = ends.status().await;
    assert_eq!(status["phase"], "rolled_back");
    conserved(&status["tables"]);
    conserved(&status["reverse"]["tables"]);

    done(&["finish"]).await;
    run.ended().await.expect_success();
    let after = ends.inventories().await;
    assert_eq!(before.0.diff(&after.0), Vec::<String>::new());
    assert_eq!(before.1.leftovers(&after.1), Vec::<String>::new());
    Figures { rows, transactions: first.committed + second.committed }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_moves_under_a_writer_switches_and_comes_back() {
    there_and_back((15, 15), &[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_moves_from_14_to_17_and_comes_back() {
    there_and_back((14, 17), &[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cancel_leaves_the_source_as_it_was_found() {
    let (ends, writer) = moving((15, 15), 100.0).await;
    let before = ends.inventories().await;
    ends.done(&["run", "--until", "following"]).await;
    let ended = ends.done(&["cancel", "--json"]).await.json();
    assert_eq!((&ended["state"], &ended["tables_stay"]), (&"canceled".into(), &true.into()));
    assert_eq!(ended["cleaned"], serde_json::json!(["source", "target"]));
    assert!(ended["dropped"].to_string().contains("replication slot walferry_"), "{ended}");
    writer.stop().await;
    let after = ends.inventories().await;
    assert_eq!(before.0.diff(&after.0), Vec::<String>::new());
    assert_eq!(before.1.leftovers(&after.1), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_without_a_job_says_so() {
    let ends = Ends::start(15, 15);
    for command in ["status", "verify", "cutover", "rollback", "finish", "cancel"] {
        let ended = ends.walferry(&[command]).await;
        assert_eq!(ended.code, Some(1), "{command}");
        assert!(ended.err.contains("there is no job"), "{command}: {}", ended.err);
    }
}
