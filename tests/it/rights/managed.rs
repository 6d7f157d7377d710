//! The whole job as a role of a managed cloud: nothing on the source is its own.

use walferry::demo::compare::compare;
use walferry::demo::ledger;
use walferry::demo::pgbouncer::PgBouncer;
use walferry::demo::writer::{Options, Writer};

use super::{moved_on, roles};
use crate::job::writer;
use crate::support::job::route_of;

#[tokio::test(flavor = "multi_thread")]
async fn a_role_that_owns_nothing_moves_a_database_with_what_check_prints() {
    let ends = roles::managed((15, 15)).await;
    // Without being asked for pgoutput, check chooses a decoder that needs no publication.
    let asked = ["--decoder", "pgoutput"];
    let mut needed = roles::printed_by(&ends, &asked, &["error"], &[]).await;
    needed.extend(roles::printed_by(&ends, &asked, &["warning"], &["write-right"]).await);
    let sql: Vec<&str> = needed.iter().map(|(_, fix)| fix.as_str()).collect();
    let sql = sql.join("\n");
    assert!(needed.iter().all(|(side, _)| side == "source"), "{needed:?}");
    for given in ["CREATE SCHEMA walferry AUTHORIZATION", "CREATE PUBLICATION", "TRUNCATE ON"] {
        assert!(sql.contains(given), "{given}: {sql}");
    }
    for asked in ["GRANT CREATE ON DATABASE", "SUPERUSER", "GRANT \"owner\""] {
        assert!(!sql.contains(asked), "{asked}: {sql}");
    }
    roles::grant(&ends, &needed);
    ends.done(&["check"]).await;
    let before = ends.inventories().await;

    let pooler = PgBouncer::start(&ends.source, &["app"]).unwrap();
    let options = Options { tx_per_second: Some(100.0), ..Options::new(&pooler.uri("app")) };
    let writer = Writer::start(options).await.unwrap();
    let mut run = ends.spawn(&["run", "--no-owner"]);
    ends.until_phase(&mut run, "following").await;
    ends.done(&["verify"]).await;
    let refused = ends.walferry(&["cutover", "--route", &route_of(&pooler)]).await;
    assert!(refused.err.contains("--fence none"), "{refused:?}");
    for _ in 0..2 {
        for command in ["cutover", "rollback"] {
            moved_on(&writer).await;
            ends.done(&[command, "--fence", "none", "--route", &route_of(&pooler)]).await;
            moved_on(&writer).await;
            ends.done(&["verify"]).await;
        }
    }
    let report = writer.stop().await;
    assert_eq!((report.failed_statements, report.failed_connects), (0, 0), "{:?}", report.errors);
    ends.done(&["verify"]).await;
    // (The application's own promise of items with orders went with its foreign key.)
    let compared = compare(&ends.source_uri(), &ends.target_uri()).await.unwrap();
    let rows = compared.differences.iter().filter(|line| !line.starts_with("sequence "));
    assert_eq!(rows.collect::<Vec<_>>(), Vec::<&String>::new());
    for uri in [ends.source_uri(), ends.target_uri()] {
        let check = ledger::check(&uri, &report.ledger).await.unwrap();
        assert!(check.is_exact(), "{check:?}");
    }
    ends.done(&["finish"]).await;
    run.ended().await.expect_success();
    let after = ends.inventories().await;
    // The administrator's schema and publication stay as he made them.
    assert_eq!(before.0.diff(&after.0), Vec::<String>::new());
    assert_eq!(before.1.leftovers(&after.1), Vec::<String>::new());
    assert_eq!(ends.source.psql("app", "select count(*) from walferry.progress").unwrap(), "0");
}

/// With SELECT alone rows are copied, followed and compared; the cutover says what is missing.
#[tokio::test(flavor = "multi_thread")]
async fn a_role_with_select_alone_follows_and_is_told_what_a_cutover_needs() {
    let ends = roles::managed((15, 15)).await;
    let asked = ["--decoder", "pgoutput"];
    let needed = roles::printed_by(&ends, &asked, &["error"], &["publication-right"]).await;
    assert_eq!(needed.len(), 1);
    roles::grant(&ends, &needed);
    let first = writer(&ends.source.uri_as("owner", "app"), 100.0, 1).await;
    let mut run = ends.spawn(&["run", "--no-owner"]);
    ends.until_phase(&mut run, "following").await;
    ends.done(&["verify"]).await;
    let refused = ends.walferry(&["cutover", "--fence", "none", "--route", "hook:true"]).await;
    assert_eq!(refused.code, Some(1));
    let grant = "GRANT INSERT, UPDATE, DELETE, TRUNCATE ON bank.accounts TO mover;";
    assert!(refused.err.contains(grant), "{refused:?}");
    assert!(first.committed_more(50).await, "the writer is stuck");
    first.stop().await;
    ends.done(&["verify"]).await;
    ends.done(&["cancel"]).await;
    run.ended().await;
}
