//! Tables that change their name, their place or themselves under a decoder that tells names only.

use std::time::Duration;

use walferry::demo::compare::compare;

use crate::support::job::Ends;
use crate::support::{Walferry, session, until};

/// Two plain tables and a partitioned one.
const TABLES: &str = "create table public.t (id int primary key, v text); \
    create table public.parted (id int primary key, v text) partition by range (id); \
    create table public.leaf partition of public.parted for values from (0) to (1000); \
    insert into public.t values (1, 'one'); insert into public.parted values (1, 'one')";

async fn until_there(ends: &Ends, sql: &str, wanted: &str) {
    until(sql, async || ends.target.psql("app", sql).unwrap().trim() == wanted).await;
}

/// What was seen and passed over while it took no part is read from the moment that it does.
async fn a_table_attached_after_its_first_rows_is_read_from_then_on(ends: &Ends) {
    let late = "create table public.late partition of public.parted \
         for values from (1000) to (2000)";
    ends.target.psql("app", late).unwrap();
    let alike = "create table public.late (like public.parted including all)";
    ends.source.psql("app", alike).unwrap();
    ends.source.psql("app", "insert into public.late values (1000, 'before')").unwrap();
    ends.source.psql("app", "insert into public.t values (2, 'two')").unwrap();
    until_there(ends, "select count(*) from public.t", "2").await;
    ends.source.psql("app", "delete from public.late").unwrap();
    let attach = "alter table public.parted attach partition public.late \
         for values from (1000) to (2000)";
    ends.source.psql("app", attach).unwrap();
    ends.source.psql("app", "insert into public.late values (1001, 'after')").unwrap();
    until_there(ends, "select string_agg(v, ',') from public.late", "after").await;
    let comparison = compare(&ends.source_uri(), &ends.target_uri()).await.unwrap();
    assert_eq!(comparison.differences, Vec::<String>::new());
}

/// A commit that waits for a standby is decoded while nobody else sees it: what it has altered is
/// asked for until it is seen.
async fn what_a_commit_has_altered_that_is_not_seen_yet_is_waited_for(ends: &Ends) {
    let waits_for = |standby: &str| {
        let names = format!("synchronous_standby_names = '{standby}'");
        ends.source.configure(&[&names]).unwrap();
        ends.source.reload().unwrap();
    };
    waits_for("nobody");
    tokio::time::sleep(Duration::from_millis(300)).await;
    let mut writer = session(&ends.source, "app").await;
    let altered = "alter table public.t replica identity full; \
        update public.t set v = 'TWO' where id = 2";
    let released = async {
        tokio::time::sleep(Duration::from_millis(700)).await;
        waits_for("");
    };
    let (written, ()) = tokio::join!(writer.execute(altered), released);
    written.unwrap();
    until_there(ends, "select v from public.t where id = 2", "TWO").await;
    let back = "alter table public.t replica identity default; \
        update public.t set v = 'two' where id = 2";
    ends.source.psql("app", back).unwrap();
    until_there(ends, "select v from public.t where id = 2", "two").await;
}

/// Rows printed under a name that is gone are not passed over; once it is back they are read.
async fn a_table_renamed_before_its_rows_are_read_stops_the_job_and_loses_nothing(
    ends: &Ends,
    run: &[&str],
) {
    ends.source.psql("app", "insert into public.t values (3, 'three')").unwrap();
    ends.source.psql("app", "alter table public.t rename to t2").unwrap();
    let said = format!("{:?}", ends.walferry(run).await);
    assert!(said.contains("code: Some(1)"), "{said}");
    assert!(said.contains("public.t ") && said.contains("rename it back"), "{said}");
    ends.source.psql("app", "alter table public.t2 rename to t").unwrap();
}

/// The new table of an old name is not the one whose rows were copied.
async fn a_table_made_anew_refuses_the_cutover_and_its_rows_stop_the_job(
    ends: &Ends,
    run: Walferry,
) {
    let anew = "drop table public.t; create table public.t (id int primary key, v text)";
    ends.source.psql("app", anew).unwrap();
    let refused = ends.walferry(&["cutover"]).await;
    let said = format!("{refused:?}");
    assert!(refused.code != Some(0) && said.contains("public.t "), "{said}");
    ends.source.psql("app", "insert into public.t values (3, 'another')").unwrap();
    let said = format!("{:?}", run.ended().await);
    assert!(said.contains("public.t is another table"), "{said}");
}

async fn told_apart_by(decoder: &str) {
    let ends = Ends::start(15, 15);
    ends.source.psql("app", TABLES).unwrap();
    let arguments = ["run", "--decoder", decoder];
    let mut run = ends.spawn(&arguments);
    ends.until_phase(&mut run, "following").await;
    a_table_attached_after_its_first_rows_is_read_from_then_on(&ends).await;
    what_a_commit_has_altered_that_is_not_seen_yet_is_waited_for(&ends).await;
    run.signal("INT");
    run.ended().await.expect_success();
    a_table_renamed_before_its_rows_are_read_stops_the_job_and_loses_nothing(&ends, &arguments)
        .await;
    let run = ends.spawn(&arguments);
    let there = "select string_agg(v, ',' order by id) from public.t";
    until_there(&ends, there, "one,two,three").await;
    a_table_made_anew_refuses_the_cutover_and_its_rows_stop_the_job(&ends, run).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tables_attached_renamed_and_made_anew_are_told_apart_by_test_decoding() {
    told_apart_by("test_decoding").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tables_attached_renamed_and_made_anew_are_told_apart_by_wal2json() {
    told_apart_by("wal2json").await;
}
