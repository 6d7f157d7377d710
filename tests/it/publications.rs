//! `--publication`: a publication that an administrator made, whole or of a part, respected by the
//! copy, the stream and verify, and left alone.

use walferry::demo::writer::create_schema;

use crate::job::{assert_exact, writer};
use crate::support::job::Ends;

const WITH: [&str; 2] = ["--publication", "given"];

fn with<'a>(command: &[&'a str]) -> Vec<&'a str> {
    [command, &WITH].concat()
}

/// What the publication says of itself, to see that nobody touched it.
fn definition(ends: &Ends) -> String {
    let sql = "select string_agg(p::text || coalesce(t::text, ''), E'\\n' order by t::text) \
         from pg_publication p left join pg_publication_tables t using (pubname) \
         where pubname = 'given' and t.schemaname is distinct from 'walferry'";
    ends.source.psql("app", sql).unwrap()
}

/// The whole job by a publication that leaves nothing out.
async fn there_and_back(majors: (u32, u32), publication: &str) {
    let ends = Ends::start(majors.0, majors.1);
    create_schema(&ends.source_uri(), 1).await.unwrap();
    ends.source.psql("app", publication).unwrap();
    let before = ends.inventories().await;
    let defined = definition(&ends);
    let first = writer(&ends.source_uri(), 100.0, 1).await;
    let checked = ends.done(&with(&["check"])).await;
    assert!(checked.out.contains("publication given"), "{checked:?}");
    assert!(!checked.out.contains("no way back"), "{checked:?}");
    let mut run = ends.spawn(&with(&["run"]));
    ends.until_phase(&mut run, "following").await;
    ends.done(&with(&["verify"])).await;
    ends.done(&with(&["cutover"])).await;
    let first = first.stop().await;
    let second = writer(&ends.target_uri(), 100.0, 100).await;
    assert!(second.committed_more(100).await, "the writer is stuck");
    ends.done(&with(&["verify"])).await;
    ends.done(&with(&["rollback"])).await;
    let second = second.stop().await;
    ends.done(&with(&["verify"])).await;
    assert_exact(&ends, &[&first, &second]).await;
    ends.done(&with(&["finish"])).await;
    run.ended().await.expect_success();
    let after = ends.inventories().await;
    assert_eq!(before.0.diff(&after.0), Vec::<String>::new());
    assert_eq!(before.1.leftovers(&after.1), Vec::<String>::new());
    assert_eq!(definition(&ends), defined);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_moves_by_a_publication_for_all_tables_of_10() {
    there_and_back((10, 15), "create publication given for all tables").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_moves_by_a_publication_for_all_tables_as_their_roots() {
    let sql = "create publication given for all tables with (publish_via_partition_root = true)";
    there_and_back((14, 17), sql).await;
}

/// Walferry's own tables are then shown by one of its own, beside it.
#[tokio::test(flavor = "multi_thread")]
async fn a_database_moves_by_a_publication_of_schemas() {
    let sql = "create publication given for tables in schema bank, shop, \"Odd \"\"Schema\"";
    there_and_back((18, 18), sql).await;
}

const PARTS: &str = "
    create table public.whole (id int primary key, v text);
    create table public.some_rows (region text, id int, v text, primary key (region, id));
    create table public.some_columns (id int primary key, shown text, secret text default 'none');
    create table public.grown (id int, d text, primary key (id, d)) partition by list (d);
    create table public.grown_a partition of public.grown for values in ('a');
    create table public.grown_b partition of public.grown for values in ('b');
    insert into public.whole select i, 'w' || i from generate_series(1, 500) i;
    insert into public.some_rows select (array['eu', 'us'])[i % 2 + 1], i, 'r' || i
        from generate_series(1, 500) i;
    insert into public.some_columns select i, 's' || i, 'secret ' || i from generate_series(1, 500) i;
    insert into public.grown select i, (array['a', 'b'])[i % 2 + 1] from generate_series(1, 500) i;
    create publication given for table public.whole, public.some_rows where (region = 'eu'),
        public.some_columns (id, shown), public.grown where (id > 100)
        with (publish_via_partition_root = true);";

/// In and out of the filter, by every operation.
const CHANGES: &str = "
    insert into public.some_rows values ('eu', 1001, 'in'), ('us', 1002, 'out');
    update public.some_rows set region = 'us' where region = 'eu' and id in (2, 4);
    update public.some_rows set region = 'eu' where region = 'us' and id in (1, 3);
    update public.some_rows set v = 'changed' where id between 5 and 20;
    delete from public.some_rows where id between 30 and 40;
    insert into public.some_columns values (1001, 'new', 'unseen');
    update public.some_columns set secret = 'again' where id < 10;
    update public.some_columns set shown = 'other', secret = 'x' where id between 10 and 19;
    delete from public.some_columns where id between 20 and 29;
    insert into public.grown values (2001, 'a'), (2, 'b'), (2002, 'b');
    update public.grown set id = id + 10000 where id between 300 and 320;
    update public.grown set id = id - 1000 where id between 450 and 460;
    update public.grown set id = id + 20000 where id between 40 and 50;
    delete from public.grown where id between 90 and 110;
    update public.whole set v = 'x' where id < 50; delete from public.whole where id > 450;";

async fn a_part(majors: (u32, u32)) {
    let ends = Ends::start(majors.0, majors.1);
    ends.source.psql("app", PARTS).unwrap();
    let defined = definition(&ends);
    let checked = ends.done(&with(&["check"])).await;
    for told in [
        "shows 5 of the job's 5 tables, all operations, partitions as their root",
        "leaves out rows that are not (region = 'eu'::text)",
        "leaves out columns secret",
        "leaves out rows that are not (id > 100)",
        "there is no way back, and cutover is refused",
        "not a TRUNCATE of one partition",
    ] {
        assert!(checked.out.contains(told), "{told}: {checked:?}");
    }
    let mut run = ends.spawn(&with(&["run"]));
    ends.until_phase(&mut run, "following").await;
    let count = |sql: &str| ends.target.psql("app", sql).unwrap();
    assert_eq!(count("select count(*) from public.some_rows"), "250");
    assert_eq!(count("select count(*) from public.some_rows where region <> 'eu'"), "0");
    assert_eq!(count("select count(*) from public.some_columns where secret <> 'none'"), "0");
    assert_eq!(count("select count(*), min(id) from public.grown"), "400|101");
    for change in CHANGES.split_inclusive(';') {
        ends.source.psql("app", change).unwrap();
    }
    let verified = ends.done(&with(&["verify"])).await;
    assert!(verified.out.contains("not published: columns secret"), "{verified:?}");
    let source = |sql: &str| ends.source.psql("app", sql).unwrap();
    for (table, columns, filter) in [
        ("whole", "*", "true"),
        ("some_rows", "*", "region = 'eu'"),
        ("some_columns", "id, shown", "true"),
        ("grown", "*", "id > 100"),
    ] {
        let sum = |filter: &str| {
            format!(
                "select count(*), md5(string_agg(t::text, ' ' order by t::text)) \
                 from (select {columns} from public.{table} where {filter}) t"
            )
        };
        assert_eq!(source(&sum(filter)), count(&sum("true")), "{table}");
    }
    assert_eq!(count("select count(*) from public.some_columns where secret <> 'none'"), "0");
    // A row too many, too few, or other than it should be is seen.
    ends.target.psql("app", "update public.some_rows set v = 'wrong' where id = 1001").unwrap();
    ends.target.psql("app", "delete from public.grown where id = 2001").unwrap();
    ends.target.psql("app", "insert into public.whole values (9999, '')").unwrap();
    let differs = ends.walferry(&with(&["verify"])).await;
    assert_eq!(differs.code, Some(1), "{differs:?}");
    for told in ["region=eu, id=1001: different", "id=2001, d=a: missing", "id=9999: only"] {
        assert!(differs.out.contains(told), "{told}: {differs:?}");
    }
    let refused = ends.walferry(&with(&["cutover"])).await;
    let said = format!("{refused:?}");
    assert!(refused.code == Some(1) && said.contains("no way back"), "{said}");
    assert!(said.contains("public.some_columns: columns secret"), "{said}");
    ends.done(&with(&["cancel"])).await;
    run.ended().await;
    assert_eq!(definition(&ends), defined);
    assert_eq!(source("select count(*) from pg_replication_slots"), "0");
    assert_eq!(count("select count(*) > 0 from public.some_rows"), "t");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_publication_of_a_part_is_copied_followed_and_compared_from_15() {
    a_part((15, 15)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_publication_of_a_part_is_copied_followed_and_compared_from_18() {
    a_part((18, 17)).await;
}

/// Partitions that are published as one are read under one snapshot, wherever a copy is cut short.
#[tokio::test(flavor = "multi_thread")]
async fn partitions_published_as_their_root_are_exact_over_kills_while_copying() {
    let ends = Ends::start(15, 15);
    let sql = "create table public.p (id bigint generated always as identity, k int, v text) \
           partition by hash (k); \
         alter table public.p replica identity full; \
         create table public.p0 partition of public.p for values with (modulus 3, remainder 0); \
         create table public.p1 partition of public.p for values with (modulus 3, remainder 1); \
         create table public.p2 partition of public.p for values with (modulus 3, remainder 2); \
         alter table public.p0 replica identity full; alter table public.p1 replica identity full; \
         alter table public.p2 replica identity full; \
         insert into public.p (k, v) select i, repeat('x', 200) from generate_series(1, 150000) i; \
         create publication given for table public.p with (publish_via_partition_root = true)";
    ends.source.psql("app", sql).unwrap();
    let seed = std::env::var("WALFERRY_SEED").ok().and_then(|n| n.parse().ok());
    let seed = seed.unwrap_or_else(|| fastrand::u64(..));
    println!("WALFERRY_SEED={seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let mut copied = 0;
    for round in 0..8 {
        let wait = std::time::Duration::from_millis(random.u64(700..1800));
        ends.spawn(&with(&["run", "--jobs", "1"])).kill9_after(wait).await;
        // Without a key: what was copied and came again would be there twice.
        let sql = format!(
            "insert into public.p (k, v) select i, '{round}' from generate_series(1, 99) i"
        );
        ends.source.psql("app", &sql).unwrap();
        let sql =
            "select count(distinct snapshot_id) from walferry.table_copy where state = 'done'";
        let snapshots = ends.target.psql("app", sql).unwrap_or_default();
        copied = snapshots.parse::<u32>().unwrap_or(0).max(copied);
    }
    println!("{copied} snapshots at most were seen beside each other");
    let mut run = ends.spawn(&with(&["run"]));
    ends.until_phase(&mut run, "following").await;
    ends.done(&with(&["verify"])).await;
    let sql = "select count(distinct snapshot_id), count(*) from walferry.table_copy";
    assert_eq!(ends.target.psql("app", sql).unwrap(), "1|3");
    run.signal("INT");
    run.ended().await.expect_success();
}

/// Each refusal names the statement that mends it, and that one does.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_publication_lacks_is_an_error_with_the_statement_that_adds_it() {
    let ends = Ends::start(15, 15);
    let sql = "create table public.a (id int primary key); \
         create table public.p (id int primary key) partition by range (id); \
         create table public.p1 partition of public.p for values from (0) to (100); \
         create table public.c (id int primary key, must int not null)";
    ends.source.psql("app", sql).unwrap();
    let not_ready = async |told: &str| {
        let checked = ends.walferry(&with(&["check"])).await;
        assert!(checked.code == Some(1) && checked.out.contains(told), "{told}: {checked:?}");
        let ran = ends.walferry(&with(&["run"])).await;
        assert_eq!(ran.code, Some(1), "{ran:?}");
    };
    not_ready("CREATE PUBLICATION \"given\" FOR ALL TABLES;").await;
    ends.source.psql("app", "create publication given for table public.a, public.c (id)").unwrap();
    not_ready("publication given leaves out must, which must have a value").await;
    let add = "ALTER PUBLICATION \"given\" ADD TABLE ONLY \"public\".\"p\";";
    not_ready(add).await;
    ends.source.psql("app", add).unwrap();
    ends.source.psql("app", "alter table public.c alter must set default 7").unwrap();
    ends.done(&with(&["check"])).await;
    // The root's name stands for all its partitions.
    ends.source.psql("app", "alter publication given set (publish_via_partition_root)").unwrap();
    let alone = [&with(&["check"])[..], &["--include", "public.p1"]].concat();
    let mixed = ends.walferry(&alone).await;
    assert!(mixed.code == Some(1) && mixed.out.contains("take part in the job"), "{mixed:?}");
    let other = ends.walferry(&with(&["check", "--decoder", "wal2json"])).await;
    assert!(other.err.contains("only pgoutput reads a publication"), "{other:?}");
}

/// A publication altered while the job runs: told at the next start, and before a cutover.
#[tokio::test(flavor = "multi_thread")]
async fn a_publication_altered_in_mid_job_is_told() {
    let ends = Ends::start(15, 15);
    let sql = "create table public.a (id int primary key, v text); \
         create table public.b (id int primary key, v text); \
         create publication given for table public.a, public.b";
    ends.source.psql("app", sql).unwrap();
    let mut run = ends.spawn(&with(&["run"]));
    ends.until_phase(&mut run, "following").await;
    ends.done(&with(&["cutover", "--dry-run"])).await;
    for (alter, told, back) in [
        ("drop table public.b", "public.b is not in it any more", "add table public.b"),
        (
            "set table public.a where (id > 5), public.b",
            "row filter of public.a was none and is (id > 5)",
            "set table public.a, public.b",
        ),
        (
            "set table public.a (id), public.b",
            "columns of public.a were all and are id",
            "set table public.a, public.b",
        ),
        (
            "set (publish = 'insert, update')",
            "leaves out delete, truncate now",
            "set (publish = 'insert, update, delete, truncate')",
        ),
    ] {
        ends.source.psql("app", &format!("alter publication given {alter}")).unwrap();
        let refused = ends.walferry(&with(&["cutover", "--dry-run"])).await;
        assert!(refused.code == Some(1) && refused.err.contains(told), "{told}: {refused:?}");
        assert!(!run.has_ended(), "{}", run.so_far());
        ends.source.psql("app", &format!("alter publication given {back}")).unwrap();
    }
    // Taken out and added again: what was written meanwhile is in no stream.
    let refused = ends.walferry(&with(&["cutover", "--dry-run"])).await;
    assert!(refused.err.contains("public.b was taken out of it and added again"), "{refused:?}");
    run.signal("INT");
    run.ended().await.expect_success();
    let again = ends.walferry(&with(&["run"])).await;
    assert!(again.code == Some(1) && again.err.contains("was altered since"), "{again:?}");
    let other = ends.walferry(&["run"]).await;
    assert!(other.err.contains("--publication 'given'"), "{other:?}");
    ends.done(&with(&["cancel"])).await;
}

/// PostgreSQL 18 goes on without a publication that is gone, with a WARNING; 17 and before refuse.
#[tokio::test(flavor = "multi_thread")]
async fn a_publication_dropped_in_mid_stream_stops_it_on_15_and_18() {
    for (major, transport) in [(15, "stream"), (18, "stream"), (18, "pull")] {
        let ends = Ends::start(major, 18);
        let sql =
            "create table public.a (id int primary key); create publication given for all tables";
        ends.source.psql("app", sql).unwrap();
        let mut run = ends.spawn(&with(&["run", "--transport", transport]));
        ends.until_phase(&mut run, "following").await;
        ends.source.psql("app", "drop publication given; insert into public.a values (1)").unwrap();
        let ended = run.ended().await;
        assert_eq!(ended.code, Some(1), "{major} {transport}: {ended:?}");
        assert!(ended.err.contains("publication"), "{major} {transport}: {ended:?}");
        assert_eq!(ends.target.psql("app", "select count(*) from public.a").unwrap(), "0");
    }
}

/// wal2json says by a WARNING alone that it has left out a change.
#[tokio::test(flavor = "multi_thread")]
async fn a_change_that_wal2json_leaves_out_stops_the_stream_by_either_transport() {
    for transport in ["stream", "pull"] {
        let ends = Ends::start(15, 15);
        let sql = "create schema \"Odd \"\"S\"; create table \"Odd \"\"S\".\"k.l\" (v int); \
             create table public.left_out (v int); create table public.t (id int primary key); \
             insert into \"Odd \"\"S\".\"k.l\" values (1); insert into public.left_out values (1)";
        ends.source.psql("app", sql).unwrap();
        // However little the role wants to hear.
        ends.source.psql("app", "alter database app set client_min_messages = 'error'").unwrap();
        let with =
            ["--decoder", "wal2json", "--transport", transport, "--exclude", "public.left_out"];
        let mut run = ends.spawn(&[&["run"][..], &with].concat());
        ends.until_phase(&mut run, "following").await;
        // Of a table that takes no part it may leave out what it likes.
        ends.source.psql("app", "update public.left_out set v = 2").unwrap();
        ends.source.psql("app", "insert into public.t values (1)").unwrap();
        ends.done(&[&["verify"][..], &with].concat()).await;
        assert!(!run.has_ended(), "{}", run.so_far());
        let sql =
            "begin; insert into public.t values (2); delete from \"Odd \"\"S\".\"k.l\"; commit";
        ends.source.psql("app", sql).unwrap();
        let ended = run.ended().await;
        assert_eq!(ended.code, Some(1), "{ended:?}");
        let named = "ALTER TABLE \"Odd \"\"S\".\"k.l\" REPLICA IDENTITY FULL;";
        assert!(ended.err.contains(named), "{transport}: {ended:?}");
        // Nothing of its transaction was taken.
        assert_eq!(ends.target.psql("app", "select max(id) from public.t").unwrap(), "1");
        let again = ends.walferry(&[&["run"][..], &with].concat()).await;
        assert!(again.code == Some(1) && again.err.contains(named), "{again:?}");
    }
}
