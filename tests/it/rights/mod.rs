//! The whole job as each kind of role, under a writer, and what it leaves behind.

mod aside;
mod managed;
mod objects;
pub mod roles;
mod textual;

use walferry::demo::writer::Writer;

use crate::job::{assert_exact, sequences_are_past, writer};
use crate::support::job::{Ends, conserved};

/// run, verify, cutover, writes on the new side, rollback, and over again to finish there. Gives
/// what is needed to be sure of what is left.
async fn whole_job(ends: &Ends) {
    let before = ends.inventories().await;
    let first = writer(&ends.source_via, 100.0, 1).await;
    ends.done(&["check"]).await;
    let mut run = ends.spawn(&["run"]);
    ends.until_phase(&mut run, "following").await;
    ends.done(&["verify"]).await;
    ends.done(&["cutover"]).await;
    let first = first.stop().await;
    sequences_are_past(&ends.source_uri(), &ends.target_uri()).await;
    // Who was connected before cannot write to the old side, though the stream can.
    let refused = ends.source.psql("app", "delete from bank.ledger").unwrap_err().to_string();
    assert!(refused.contains("this database has moved"), "{refused}");

    let second = writer(&ends.target_via, 100.0, 100).await;
    moved_on(&second).await;
    ends.done(&["verify"]).await;
    ends.done(&["rollback"]).await;
    let second = second.stop().await;
    let third = writer(&ends.source_via, 100.0, 200).await;
    moved_on(&third).await;
    ends.done(&["verify"]).await;
    ends.done(&["cutover"]).await;
    let third = third.stop().await;
    ends.done(&["verify"]).await;
    assert_exact(ends, &[&first, &second, &third]).await;
    let status = ends.status().await;
    conserved(&status["tables"]);
    conserved(&status["reverse"]["tables"]);

    ends.done(&["finish"]).await;
    run.ended().await.expect_success();
    let after = ends.inventories().await;
    assert_eq!(before.0.diff(&after.0), Vec::<String>::new());
    assert_eq!(before.1.leftovers(&after.1), Vec::<String>::new());
    // Keys, triggers and rules are as they were, there as here.
    assert_eq!(before.0.acts_unlike(&after.1), Vec::<String>::new());
}

async fn moved_on(writer: &Writer) {
    assert!(writer.committed_more(100).await, "the writer is stuck");
}

/// What a superuser has to grant an owner: one thing.
async fn needs_only_create(ends: &Ends) {
    let needed = roles::printed_by(ends, &["--decoder", "pgoutput"], &["error"], &[]).await;
    let create =
        ("source".to_string(), r#"GRANT CREATE ON DATABASE "app" TO "mover";"#.to_string());
    assert_eq!(needed, [create]);
    roles::grant(ends, &needed);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_owner_with_replication_moves_a_database_by_markers() {
    let ends = roles::owner((15, 15)).await;
    needs_only_create(&ends).await;
    whole_job(&ends).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_owner_with_the_printed_grants_moves_a_database_by_origins() {
    let ends = roles::owner((15, 17)).await;
    needs_only_create(&ends).await;
    let codes = ["origin-right", "replica-role-right"];
    let more = roles::printed(&ends, &["info"], &codes).await;
    assert_eq!(more.len(), 4, "{more:?}");
    roles::grant(&ends, &more);
    assert_eq!(roles::printed(&ends, &["info"], &codes).await, []);
    whole_job(&ends).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_owner_moves_a_database_from_14_to_18() {
    let ends = roles::owner((14, 18)).await;
    needs_only_create(&ends).await;
    whole_job(&ends).await;
}
