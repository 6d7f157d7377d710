//! Tables that change their name, their place or themselves under a decoder that tells names only.

use std::time::Duration;

use walferry::demo::compare::compare;

use crate::support::job::Ends;

const DECODERS: [&str; 2] = ["test_decoding", "wal2json"];

/// Two plain tables and a partitioned one, followed.
async fn followed(decoder: &'static str) -> (Ends, [&'static str; 3]) {
    let ends = Ends::start(15, 15);
    let ddl = "create table public.t (id int primary key, v text); \
         create table public.parted (id int primary key, v text) partition by range (id); \
         create table public.leaf partition of public.parted for values from (0) to (1000); \
         insert into public.t values (1, 'one'); insert into public.parted values (1, 'one')";
    ends.source.psql("app", ddl).unwrap();
    (ends, ["run", "--decoder", decoder])
}

async fn until_there(ends: &Ends, sql: &str, wanted: &str) {
    let mut found = String::new();
    for _ in 0..150 {
        found = ends.target.psql("app", sql).unwrap();
        if found.trim() == wanted {
            return;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("{sql}: {found} and not {wanted}");
}

/// What was seen and passed over while it took no part is read from the moment that it does.
#[tokio::test(flavor = "multi_thread")]
async fn a_table_attached_after_its_first_rows_is_read_from_then_on() {
    for decoder in DECODERS {
        let (ends, run) = followed(decoder).await;
        let mut run = ends.spawn(&run);
        ends.until_phase(&mut run, "following").await;
        ends.target
            .psql(
                "app",
                "create table public.late partition of public.parted \
                 for values from (1000) to (2000)",
            )
            .unwrap();
        ends.source
            .psql("app", "create table public.late (like public.parted including all)")
            .unwrap();
        ends.source.psql("app", "insert into public.late values (1000, 'before')").unwrap();
        ends.source.psql("app", "insert into public.t values (2, 'passed it')").unwrap();
        until_there(&ends, "select count(*) from public.t", "2").await;
        ends.source.psql("app", "delete from public.late").unwrap();
        let attach = "alter table public.parted attach partition public.late \
             for values from (1000) to (2000)";
        ends.source.psql("app", attach).unwrap();
        ends.source.psql("app", "insert into public.late values (1001, 'after')").unwrap();
        until_there(&ends, "select string_agg(v, ',') from public.late", "after").await;
        let comparison = compare(&ends.source_uri(), &ends.target_uri()).await.unwrap();
        assert_eq!(comparison.differences, Vec::<String>::new(), "{decoder}");
        run.signal("INT");
        run.ended().await.expect_success();
    }
}

/// Rows printed under a name that is gone are not passed over; once it is back they are read.
#[tokio::test(flavor = "multi_thread")]
async fn a_table_renamed_before_its_rows_are_read_stops_the_job_and_loses_nothing() {
    for decoder in DECODERS {
        let (ends, run) = followed(decoder).await;
        let mut first = ends.spawn(&run);
        ends.until_phase(&mut first, "following").await;
        first.signal("INT");
        first.ended().await.expect_success();
        ends.source.psql("app", "insert into public.t values (2, 'two')").unwrap();
        ends.source.psql("app", "alter table public.t rename to t2").unwrap();
        let ended = ends.walferry(&run).await;
        assert_eq!(ended.code, Some(1), "{decoder}: {ended:?}");
        let said = format!("{ended:?}");
        assert!(said.contains("public.t ") && said.contains("rename it back"), "{said}");
        ends.source.psql("app", "alter table public.t2 rename to t").unwrap();
        let again = ends.spawn(&run);
        until_there(&ends, "select string_agg(v, ',' order by id) from public.t", "one,two").await;
        again.signal("INT");
        again.ended().await.expect_success();
    }
}

/// The new table of an old name is not the one whose rows were copied.
#[tokio::test(flavor = "multi_thread")]
async fn a_table_dropped_and_made_anew_refuses_the_cutover_and_its_rows_stop_the_job() {
    for decoder in DECODERS {
        let (ends, run) = followed(decoder).await;
        let mut run = ends.spawn(&run);
        ends.until_phase(&mut run, "following").await;
        let anew = "drop table public.t; create table public.t (id int primary key, v text)";
        ends.source.psql("app", anew).unwrap();
        let refused = ends.walferry(&["cutover"]).await;
        let said = format!("{refused:?}");
        assert!(refused.code != Some(0) && said.contains("public.t "), "{decoder}: {said}");
        ends.source.psql("app", "insert into public.t values (3, 'another')").unwrap();
        let said = format!("{:?}", run.ended().await);
        assert!(said.contains("public.t is another table"), "{decoder}: {said}");
    }
}
