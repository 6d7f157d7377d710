//! Large objects: copied, brought level by difference, told where they differ; there and back.

use std::time::Duration;

use super::*;
use crate::support::Walferry;

/// Oid, size and fingerprint, owner, grants, comment of every large object.
const ALL: &str = "select m.oid, length(lo_get(m.oid)), md5(lo_get(m.oid)), lomowner::regrole, \
     (select string_agg(x::text, ' ' order by x::text) \
         from unnest(coalesce(lomacl, acldefault('L', lomowner))) x), \
     obj_description(m.oid, 'pg_largeobject') \
     from pg_largeobject_metadata m order by 1";

fn same_large_objects(story: &Story) -> usize {
    let (ours, theirs) = (story.source(ALL), story.target(ALL));
    assert_eq!(ours, theirs, "{}", story.name);
    story.source("select count(*) from pg_largeobject_metadata").parse().unwrap()
}

/// An empty one, a sparse one, one of many pieces, one with the highest numbers.
const OBJECTS: &str = "select lo_from_bytea(0, convert_to(repeat(i::text, i * 37), 'UTF8')) \
     from generate_series(1, 40) i; \
     select lo_create(4000000000); select lo_create(7); select lo_put(7, 3000000, 'far'); \
     select lo_create(6); select lo_put(6, 5, 'a'); select lo_truncate(lo_open(6, 131072), 90000); \
     select lo_from_bytea(8, decode(repeat('00ff27', 500000), 'hex')); \
     select lo_from_bytea(9, 'nine'); select lo_from_bytea(10, 'ten'); \
     select lo_from_bytea(11, 'eleven'); select lo_from_bytea(12, repeat('12', 5000)::bytea); ";

#[tokio::test(flavor = "multi_thread")]
async fn large_objects_move_with_owners_grants_and_comments_there_and_back() {
    let (source, target) = servers(15, 15);
    for server in [source, target] {
        server.psql("postgres", "create role lo_owner; create role \"LO Reader\"").unwrap();
    }
    let story = Story::copied(
        "large_objects",
        &format!(
            "create table t (id int primary key, image oid); {OBJECTS} \
             alter large object 8 owner to lo_owner; comment on large object 9 is E'it''s\\nnine'; \
             grant select on large object 10 to public; \
             grant select, update on large object 10 to \"LO Reader\" with grant option; \
             alter large object 10 owner to lo_owner; \
             revoke all on large object 11 from postgres"
        ),
    )
    .await;
    let mut run = story.spawn(&["run"]);
    story.arrived(&mut run).await;
    assert_eq!(same_large_objects(&story), 48);

    // Every kind of change, some of which no page shows.
    story.source(
        "select lo_put(8, 1000000, 'changed'); select lo_unlink(9); select lo_create(9); \
         select lo_truncate(lo_open(12, 131072), 4096); select lo_unlink(10); \
         select lo_from_bytea(13, 'new'); comment on large object 13 is 'made since'; \
         grant select on large object 7 to lo_owner; insert into t values (1, 13)",
    );
    let report = story.done(&["verify", "--json"]).await.json();
    let pending = report["large_objects"]["pending"].as_array().unwrap();
    let pending: Vec<i64> = pending.iter().map(|oid| oid.as_i64().unwrap()).collect();
    assert_eq!(pending, [8, 9, 12, 13, 10], "{report}");
    assert_eq!(report["equal"], true);
    story.done(&["cutover"]).await;
    assert_eq!(same_large_objects(&story), 48);

    // And what is written on the new side comes back.
    story.target(
        "select lo_put(8, 0, 'back'); select lo_unlink(7); select lo_from_bytea(14, 'there'); \
         alter large object 12 owner to lo_owner; select lo_put(4000000000, 0, 'high')",
    );
    let report = story.done(&["verify", "--json"]).await.json();
    assert_eq!(report["large_objects"]["pending"].as_array().unwrap().len(), 4, "{report}");
    story.done(&["rollback"]).await;
    assert_eq!(same_large_objects(&story), 48);
    assert_eq!(story.source("select convert_from(lo_get(4000000000), 'UTF8')"), "high");
    story.done(&["finish"]).await;
    run.ended().await.expect_success();
}

/// What differs though the live side did not change it is a difference; and a switch does not hide
/// it behind what has changed.
#[tokio::test(flavor = "multi_thread")]
async fn verify_names_large_objects_that_differ() {
    let story = Story::copied("large_differ", OBJECTS).await;
    story.target("select lo_put(9, 0, 'NINE')");
    story.source("select lo_put(10, 0, 'TEN')");
    let report = story.spawn(&["verify", "--json"]).ended().await;
    assert_eq!(report.code, Some(1), "{}", report.out);
    let json = report.json();
    assert_eq!(json["large_objects"]["differing"], serde_json::json!([9]));
    assert_eq!(json["large_objects"]["pending"], serde_json::json!([10]));
    assert_eq!(json["equal"], false);
    let said = story.spawn(&["verify"]).ended().await;
    assert!(said.out.contains("9: different"), "{}", said.out);
}

/// A kill while they are copied costs what was under way; nothing is left half.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_copy_of_large_objects_goes_on() {
    let story = Story::of(
        "large_killed",
        "select lo_from_bytea(0, decode(repeat(md5(i::text), 30000), 'hex')) \
         from generate_series(1, 60) i",
    );
    let begun = "select count(*) from pg_largeobject_metadata";
    let mut killed = 0;
    for least in [1, 20, 40] {
        let mut run = story.spawn(&["run", "--until", "following"]);
        while story.target(begun).parse::<i64>().unwrap() < least {
            assert!(!run.has_ended(), "{}", run.so_far());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        killed += u32::from(run.kill9_after(Duration::ZERO).await);
    }
    assert!(killed > 0);
    story.done(&["run", "--until", "following"]).await;
    assert_eq!(same_large_objects(&story), 60);
}

/// Whoever writes a large object and a row in one transaction finds both on the new side, or
/// neither; what was acknowledged is there.
#[tokio::test(flavor = "multi_thread")]
async fn a_switch_loses_no_write_to_a_large_object() {
    let story = Story::copied(
        "large_written",
        "create table t (n int primary key); select lo_from_bytea(77, '0'); \
         select lo_from_bytea(0, repeat('x', 100000)::bytea) from generate_series(1, 50)",
    )
    .await;
    let mut run = story.spawn(&["run"]);
    story.arrived(&mut run).await;
    let mut writer = session(story.source, &story.name).await;
    let writing = tokio::spawn(async move {
        let mut acknowledged = 0;
        for n in 1.. {
            let sql = format!(
                "begin; select lo_put(77, 0, '{n}'); select lo_from_bytea({}, '{n}'); \
                 insert into public.t values ({n}); commit",
                100_000 + n
            );
            match writer.execute(&sql).await {
                Ok(_) => acknowledged = n,
                Err(error) => {
                    assert!(error.to_string().contains("this database has moved"), "{error}");
                    return acknowledged;
                }
            }
        }
        acknowledged
    });
    tokio::time::sleep(Duration::from_millis(500)).await;
    story.done(&["cutover"]).await;
    let acknowledged = writing.await.unwrap();
    assert!(acknowledged > 50, "{acknowledged}");
    assert_eq!(story.target("select max(n) from t"), acknowledged.to_string());
    let content = story.target("select convert_from(lo_get(77), 'UTF8')");
    assert_eq!(content, acknowledged.to_string());
    let lost = "select count(*) from t where convert_from(lo_get(100000 + n), 'UTF8') <> n::text";
    assert_eq!(story.target(lost), "0");
    let (here, there) = (story.source(ALL), story.target(ALL));
    assert_eq!(here, there);
    run.signal("INT");
    run.ended().await.expect_success();
}

/// A transaction that made an object and holds no lock any more is waited for.
#[tokio::test(flavor = "multi_thread")]
async fn an_object_made_in_an_open_transaction_is_waited_for() {
    let story =
        Story::copied("large_open", "create table t (n int primary key); select lo_create(5)")
            .await;
    let mut run = story.spawn(&["run"]);
    story.arrived(&mut run).await;
    let mut maker = session(story.source, &story.name).await;
    maker.execute("begin; select lo_create(6); select lo_unlink(5)").await.unwrap();
    let cutover = story.spawn(&["cutover", "--timeout", "20s"]);
    tokio::time::sleep(Duration::from_millis(800)).await;
    maker.execute("commit").await.unwrap();
    cutover.ended().await.expect_success();
    assert_eq!(same_large_objects(&story), 1);
    assert_eq!(story.target("select oid from pg_largeobject_metadata"), "6");
    run.signal("INT");
    run.ended().await.expect_success();
}

/// Left behind where that is asked for, or where only some tables move; told by check and at the
/// switch. A target that has some of its own is refused.
#[tokio::test(flavor = "multi_thread")]
async fn large_objects_may_be_left_and_are_not_mixed() {
    let story = Story::of("large_left", "create table t (n int primary key); select lo_create(5)");
    story.target("select lo_create(6)");
    let refused = story.spawn(&["run"]).ended().await;
    assert_eq!(refused.code, Some(1));
    assert!(refused.err.contains("--large-objects leave"), "{}", refused.err);
    let leave = ["--large-objects", "leave"];
    story.done(&[&["run", "--until", "following"], &leave[..]].concat()).await;
    let told = story.done(&["cutover", "--dry-run", "--json"]).await.json();
    let told = told["not_carried"].as_array().unwrap();
    assert!(told.iter().any(|left| left["code"] == "large-objects"), "{told:?}");
    story.done(&["cutover"]).await;
    assert_eq!(story.target("select oid from pg_largeobject_metadata"), "6");
}

/// Roles that may not read them hear so before the job, with what mends it; and then move them
/// without seeing pages.
#[tokio::test(flavor = "multi_thread")]
async fn large_objects_that_may_not_be_read_are_named_by_check() {
    let story = Story::of(
        "large_rights",
        "create role lo_mover login replication password 'x'; \
         grant select on all tables in schema public to lo_mover; \
         create table t (n int primary key); grant select on t to lo_mover; \
         select lo_from_bytea(n, n::text::bytea) from generate_series(21, 23) n; \
         grant select on large object 22 to public",
    );
    let source = story.source.uri_as("lo_mover", &story.name);
    let target = story.target.uri(&story.name);
    let spawn = |arguments: &[&str]| {
        let variables = [
            ("WALFERRY_SOURCE", source.as_str()),
            ("WALFERRY_TARGET", target.as_str()),
            ("WALFERRY_NAME", "large_rights"),
        ];
        Walferry::spawn_with(arguments, &variables)
    };
    let found = spawn(&["check", "--json"]).ended().await.json();
    let all = found["findings"].as_array().unwrap();
    let finding = all.iter().find(|f| f["code"] == "large-objects-unreadable").unwrap();
    assert_eq!(finding["level"], "error");
    let fix = finding["fix"].as_str().unwrap();
    assert_eq!(fix, "GRANT SELECT ON LARGE OBJECT 21, 23 TO \"lo_mover\";");
    story.source(fix);
    let run = ["run", "--until", "following", "--decoder", "wal2json", "--no-nan", "--no-owner"];
    spawn(&run).ended().await.expect_success();
    let contents = "select m.oid, lo_get(m.oid) from pg_largeobject_metadata m order by 1";
    assert_eq!(story.target(contents), story.source(contents));
    story.source("select lo_put(23, 0, 'changed')");
    let report = spawn(&["verify", "--json"]).ended().await.expect_success().json();
    assert_eq!(report["large_objects"]["pending"], serde_json::json!([23]));
}
