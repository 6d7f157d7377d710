//! Rows that the target refuses: named with table, key and position; mended, the same command goes
//! on with nothing lost.

use super::*;

/// Follows, spoils the target, writes on the source, and wants the run to end saying `texts`. Then
/// mends the target and wants the same command to bring everything over.
async fn refused_and_mended(spoil: &str, write: &str, texts: &[&str], mend: &str) {
    let ends = small();
    ends.done(&["run", "--until", "following"]).await;
    target(&ends, spoil);
    let before = ends.target.psql("app", "select count(*), sum(id) from item").unwrap();
    source(&ends, &format!("begin; update item set amount = 0 where id = 50; {write}; commit"));
    source(&ends, "insert into item values (2000, 'after', 1)");
    let err = fails(&ends, &["run"], texts).await;
    assert!(err.contains("0/"), "no position in: {err}");
    // The source transaction was refused as a whole, and so was what came after it.
    let after = ends.target.psql("app", "select count(*), sum(id) from item").unwrap();
    assert_eq!(before, after);
    let status = ends.status().await;
    assert!(status["error"].as_str().unwrap().contains(texts[0]), "{status}");
    target(&ends, mend);
    let run = following(&ends).await;
    arrives(&ends, "select exists (select from item where id = 2000)").await;
    assert!(ends.status().await["error"].is_null());
    stop(run).await;
    same_rows(&ends).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_unique_violation_by_somebody_elses_row_is_named_and_mended() {
    refused_and_mended(
        "insert into item values (1000, 'rogue', 1)",
        "insert into item values (1000, 'ours', 2)",
        &["item", "(1000)", "walferry verify", "who else"],
        "delete from item where id = 1000",
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_check_constraint_of_the_target_is_named_and_mended() {
    refused_and_mended(
        "alter table item add constraint small check (amount < 500)",
        "insert into item values (1000, 'large', 501)",
        &["item", "(1000)", "small", "drop it there"],
        "alter table item drop constraint small",
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_column_that_the_target_lost_is_named_and_mended() {
    let ends = small();
    ends.done(&["run", "--until", "following"]).await;
    target(&ends, "alter table item drop column amount");
    source(&ends, "insert into item (id, note) values (1000, 'x')");
    fails(&ends, &["run"], &["item", "amount", "add column"]).await;
    target(&ends, "alter table item add column amount int");
    let run = following(&ends).await;
    arrives(&ends, "select exists (select from item where id = 1000)").await;
    stop(run).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_type_too_narrow_on_the_target_is_named_and_mended() {
    refused_and_mended(
        "alter table item alter amount type smallint",
        "insert into item values (1000, 'large', 100000)",
        &["item", "(1000)", "type", "smallint"],
        "alter table item alter amount type int",
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_update_of_a_row_the_target_lost_is_named_and_mended() {
    refused_and_mended(
        "delete from item where id = 7",
        "update item set note = 'changed' where id = 7",
        &["item", "(7)", "walferry verify"],
        "insert into item values (7, 'row 7', 7)",
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_dropped_on_the_target_is_named_and_mended() {
    let ends = small();
    source(&ends, "create table other (id int primary key)");
    ends.done(&["run", "--until", "following"]).await;
    target(&ends, "drop table other");
    source(&ends, "insert into other values (1)");
    fails(&ends, &["run"], &["other", "does not exist on the target", "create it"]).await;
    target(&ends, "create table other (id int primary key)");
    let run = following(&ends).await;
    arrives(&ends, "select exists (select from other)").await;
    stop(run).await;
}

/// A table without identity is a warning if nothing changed it so far. When something does, its own
/// source refuses; nothing is lost, and the mending SQL of check works while the job runs.
#[tokio::test(flavor = "multi_thread")]
async fn a_table_without_identity_is_refused_by_the_source_itself() {
    let ends = small();
    source(&ends, "create table heap (note text)");
    let run = following(&ends).await;
    let said = run.so_far();
    assert!(said.contains("heap") && said.contains("REPLICA IDENTITY FULL"), "{said}");
    source(&ends, "insert into heap values ('a'), ('a'), (null)");
    let refused = ends.source.psql("app", "update heap set note = 'b'").unwrap_err().to_string();
    assert!(refused.contains("does not have a replica identity"), "{refused}");
    source(&ends, "alter table heap replica identity full");
    source(&ends, "update heap set note = 'b' where note is null");
    arrives(&ends, "select exists (select from heap where note = 'b')").await;
    stop(run).await;
    same_rows(&ends).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_without_identity_that_sees_updates_is_refused_before_anything_is_made() {
    let ends = small();
    source(&ends, "create table heap (note text); insert into heap values ('a')");
    source(&ends, "update heap set note = 'b'; select pg_stat_force_next_flush()");
    let before = ends.inventories().await;
    fails(&ends, &["run"], &["heap", "no primary key", "REPLICA IDENTITY FULL"]).await;
    let after = ends.inventories().await;
    assert_eq!(before.0.diff(&after.0), Vec::<String>::new());
    assert_eq!(before.1.diff(&after.1), Vec::<String>::new());
}
