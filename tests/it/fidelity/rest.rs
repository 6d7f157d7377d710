//! Unlogged tables and materialized views, whose rows are in no stream, at a switch.

use super::*;

const CACHES: &str = "create unlogged table cache (id int primary key, b bytea, \
     g int generated always as (id * 2) stored, n numeric); \
     create unlogged table child (id int references cache); \
     insert into cache (id, b, n) select i, '\\x00ff', i / 7.0 from generate_series(1, 20) i; \
     insert into child select 3; create table t (id int primary key)";

const CACHED: &str = "select cache, (select array_agg(child) from child) from cache order by id";

/// Copied again while writers are held: what was written, changed and removed since is there, both
/// ways.
#[tokio::test(flavor = "multi_thread")]
async fn unlogged_tables_are_as_they_are_at_the_switch() {
    let story = Story::copied("unlogged_switch", CACHES).await;
    let change = "update cache set n = -n where id < 5; delete from child; \
         delete from cache where id > 15; insert into cache values (99, null, default, 'NaN'); \
         insert into child values (99)";
    let mut run = story.spawn(&["run"]);
    story.source(change);
    story.arrived(&mut run).await;
    assert_ne!(story.target(CACHED), story.source(CACHED));
    let told = story.done(&["cutover", "--json"]).await.json();
    assert_eq!(told["not_carried"], serde_json::json!([]), "{told}");
    assert_eq!(story.target(CACHED), story.source(CACHED));
    let kept = story.target("select relpersistence from pg_class where relname = 'cache'");
    assert_eq!(kept, "u");
    story.target("delete from child; truncate cache, child; insert into cache values (5, 'five')");
    story.done(&["rollback"]).await;
    assert_eq!(story.target(CACHED), story.source(CACHED));
    run.signal("INT");
    run.ended().await.expect_success();
}

/// `--unlogged refuse` and a table too large for the hold switch nothing; `leave` says so.
#[tokio::test(flavor = "multi_thread")]
async fn unlogged_tables_are_refused_or_left_as_asked() {
    let story = Story::copied("unlogged_policy", CACHES).await;
    let refused = story.spawn(&["cutover", "--unlogged", "refuse"]).ended().await;
    assert_eq!(refused.code, Some(1));
    assert!(refused.err.contains("public.cache, public.child"), "{}", refused.err);
    let wide = "insert into cache (id, b) select i, decode(repeat(md5(i::text), 60), 'hex') \
         from generate_series(1000, 3000) i";
    story.source(wide);
    let slow = story.spawn(&["cutover", "--max-hold", "60ms"]).ended().await;
    assert_eq!(slow.code, Some(1));
    assert!(slow.err.contains("--unlogged leave"), "{}", slow.err);
    assert_eq!(story.target("select count(*) from cache"), "20");
    let told = story.done(&["cutover", "--unlogged", "leave", "--json"]).await.json();
    let told = told["not_carried"].as_array().unwrap();
    let names: Vec<&str> = told.iter().map(|left| left["object"].as_str().unwrap()).collect();
    assert_eq!(names, ["table public.cache", "table public.child"]);
    assert_eq!(story.target("select count(*) from cache"), "20");
}

const VIEWS: &str = "create schema a; create table t (id int primary key, v int); \
     insert into t values (1, 10), (2, 20); \
     create materialized view z_total as select sum(v) total from t; \
     create view between_them as select total * 2 twice from z_total; \
     create materialized view a.first_by_name as select twice + 1 more from between_them; \
     create unique index on a.first_by_name (more); \
     create materialized view hollow as select 1 one with no data; \
     create materialized view emptied as select 2 two";

const FILLED: &str = "select (select total from z_total), (select more from a.first_by_name)";

/// Refreshed before writers are held, each after those it reads; what is not filled stays so, what
/// was emptied is emptied.
#[tokio::test(flavor = "multi_thread")]
async fn materialized_views_are_refreshed_before_a_switch() {
    let story = Story::copied("refreshed", VIEWS).await;
    assert_eq!(story.target(FILLED), "30|61");
    story.source("insert into t values (3, 70); refresh materialized view emptied with no data");
    let mut run = story.spawn(&["run"]);
    story.arrived(&mut run).await;
    assert_eq!(story.target(FILLED), "30|61");
    // A dry run changes nothing.
    story.done(&["cutover", "--dry-run"]).await;
    assert_eq!(story.target(FILLED), "30|61");
    story.done(&["cutover"]).await;
    assert_eq!(story.target(FILLED), "100|201");
    let unfilled = "select string_agg(relname, ',' order by relname) from pg_class \
         where relkind = 'm' and not relispopulated";
    assert_eq!(story.target(unfilled), "emptied,hollow");
    story.target("insert into t values (4, 400)");
    story.done(&["rollback"]).await;
    // By then somebody reads them: they are refreshed beside.
    let filled = || story.source(FILLED) == "500|1001";
    for _ in 0..600 {
        if filled() {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    assert!(filled(), "{}", run.so_far());
    story.same().await;
    run.signal("INT");
    run.ended().await.expect_success();
}

/// One whose query fails keeps the switch from being made, by name; asked for, it is left, and
/// told.
#[tokio::test(flavor = "multi_thread")]
async fn a_materialized_view_that_fails_refuses_the_switch() {
    let story = Story::copied(
        "unrefreshable",
        "create table t (id int primary key, v int); insert into t values (1, 1); \
         create materialized view inverse as select 1 / v i from t",
    )
    .await;
    story.source("update t set v = 0");
    let mut run = story.spawn(&["run"]);
    story.arrived(&mut run).await;
    let refused = story.spawn(&["cutover"]).ended().await;
    assert_eq!(refused.code, Some(1));
    assert!(refused.err.contains("public.inverse"), "{}", refused.err);
    assert!(refused.err.contains("--refresh after"), "{}", refused.err);
    let told = story.done(&["cutover", "--refresh", "never"]).await;
    assert!(told.out.contains("materialized view public.inverse"), "{}", told.out);
    run.signal("INT");
    run.ended().await.expect_success();
}

/// With `--refresh after` the runner does it, and a runner that was killed meanwhile does it when
/// it comes back.
#[tokio::test(flavor = "multi_thread")]
async fn materialized_views_are_refreshed_after_a_switch() {
    let story = Story::copied("refreshed_after", VIEWS).await;
    story.source("update t set v = v + 1");
    story.done(&["cutover", "--refresh", "after"]).await;
    story.done(&["run", "--until", "following"]).await;
    let run = story.spawn(&["run"]);
    for _ in 0..600 {
        if story.target(FILLED) == "32|65" {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    assert_eq!(story.target(FILLED), "32|65", "{}", run.so_far());
    let due =
        format!("select flip ->> 'refresh_due' from walferry.job where name = '{}'", story.name);
    crate::support::until("the refreshing is over", async || story.target(&due) == "false").await;
    run.signal("INT");
    run.ended().await.expect_success();
}

/// Settings of the database, rows of extensions and of foreign tables, tables without rows: in the
/// list of check, and in that of the switch.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_carried_is_told_at_the_switch_too() {
    let story = Story::copied(
        "told_at_switch",
        "create table t (id int primary key); create foreign data wrapper nobody; \
         create server far foreign data wrapper nobody; \
         create foreign table elsewhere (n int) server far; \
         alter database told_at_switch set search_path = public, \"A b\"; \
         alter role postgres in database told_at_switch set work_mem = '5MB'",
    )
    .await;
    let listed = ["foreign table public.elsewhere", "setting search_path of \"told_at_switch\""];
    let check = story.done(&["check", "--json"]).await.json();
    for arguments in [&["cutover", "--dry-run", "--json"][..], &["cutover", "--json"]] {
        let told = story.done(arguments).await.json();
        let told = told["not_carried"].as_array().unwrap();
        for object in listed {
            assert!(told.iter().any(|left| left["object"] == object), "{object}: {told:?}");
            let found = check["findings"].as_array().unwrap();
            assert!(found.iter().any(|f| f["object"] == object), "{object}");
        }
        let of = |name: &str| told.iter().find(|l| l["object"].as_str().unwrap().contains(name));
        let fix = of("search_path").unwrap()["fix"].as_str().unwrap();
        assert_eq!(
            fix,
            "ALTER DATABASE \"told_at_switch\" SET \"search_path\" TO public, \"A b\";"
        );
        story.target(fix);
        story.target(of("work_mem").unwrap()["fix"].as_str().unwrap());
    }
}
