//! What is in no stream (large objects, unlogged tables, materialized views) between servers of
//! several versions, as a role that is superuser on neither.

use crate::support::job::Ends;

use super::roles::{self, ROLE};

const SCHEMA: &str = "create schema s; create table s.t (id int primary key, image oid); \
     insert into s.t select i, lo_from_bytea(0, convert_to(repeat(i::text, i * 90), 'UTF8')) \
         from generate_series(1, 40) i; \
     insert into s.t values (41, lo_create(0)); \
     create unlogged table s.cache (id int primary key, v numeric, b bytea); \
     insert into s.cache select i, i / 7.0, '\\x00ff' from generate_series(1, 50) i; \
     create materialized view s.total as select count(*) n, sum(id) of_ids from s.t";

/// Contents, owners, grants and comments of large objects; rows of the unlogged table.
const LARGE: &str = "select m.oid, md5(lo_get(m.oid)), lomowner::regrole, \
     (select string_agg(x::text, ' ' order by x::text) \
         from unnest(coalesce(lomacl, acldefault('L', lomowner))) x), \
     obj_description(m.oid, 'pg_largeobject') from pg_largeobject_metadata m order by 1";
const CACHE: &str = "select * from s.cache order by id";
const TOTAL: &str = "select * from s.total";

fn same(ends: &Ends, questions: &[&str]) {
    for sql in questions {
        let (here, there) = (ends.source.psql("app", sql), ends.target.psql("app", sql));
        assert_eq!(here.unwrap(), there.unwrap(), "{sql}");
    }
}

/// Changes of every kind to large objects, and others of the unlogged table, from row `n` on.
fn work(n: i32) -> String {
    let image = |of: i32| format!("(select image from s.t where id = {n} + {of})");
    format!(
        "set role {ROLE}; select lo_put({0}, 30, 'changed'); select lo_unlink({1}); \
         update s.t set image = null where id = {n} + 2; select lo_put({2}, 200000, 'far'); \
         comment on large object 4242 is 'from {n}'; grant select on large object 4242 to public; \
         insert into s.t values ({n} + 1000, lo_from_bytea(0, 'new')); \
         delete from s.cache where id between {n} and {n} + 3; \
         insert into s.cache values ({n} + 1000, 'NaN', ''); update s.cache set v = v + 1 where id > 45",
        image(1),
        image(2),
        image(3)
    )
}

/// Large objects that the next switch carries, as verify tells them. It calls the sides different, as
/// the unlogged table is.
async fn pending(ends: &Ends) -> usize {
    let verified = ends.walferry(&["verify", "--json"]).await;
    assert_eq!(verified.code, Some(1), "{verified:?}");
    let report = verified.json();
    assert_eq!(report["large_objects"]["differing"], serde_json::json!([]), "{report}");
    report["large_objects"]["pending"].as_array().unwrap().len()
}

async fn there_and_back(majors: (u32, u32)) {
    let ends = roles::owner_of(majors, SCHEMA).await;
    let own = format!("set role {ROLE}; select lo_from_bytea(4242, 'known')");
    ends.source.psql("app", &own).unwrap();
    let needed = roles::printed_by(&ends, &["--decoder", "pgoutput"], &["error"], &[]).await;
    roles::grant(&ends, &needed);
    let before = ends.inventories().await;
    let mut run = ends.spawn(&["run"]);
    ends.until_phase(&mut run, "following").await;
    same(&ends, &[LARGE, CACHE, TOTAL]);
    ends.source.psql("app", &work(1)).unwrap();
    assert_eq!(pending(&ends).await, 4);
    let told = ends.done(&["cutover", "--json"]).await.json();
    assert_eq!(told["not_carried"], serde_json::json!([]), "{told}");
    same(&ends, &[LARGE, CACHE]);
    assert_eq!(ends.target.psql("app", TOTAL).unwrap(), "42|1862");
    ends.target.psql("app", &work(10)).unwrap();
    assert_eq!(pending(&ends).await, 4);
    ends.done(&["rollback"]).await;
    same(&ends, &[LARGE, CACHE]);
    ends.done(&["finish"]).await;
    run.ended().await.expect_success();
    let after = ends.inventories().await;
    let but_objects = |mut lines: Vec<String>| {
        lines.retain(|line| !line.contains("large object"));
        lines
    };
    assert_eq!(but_objects(before.0.diff(&after.0)), Vec::<String>::new());
    assert_eq!(but_objects(before.1.leftovers(&after.1)), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_in_no_stream_moves_from_10_to_17_without_superusers() {
    there_and_back((10, 17)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_in_no_stream_moves_from_18_to_14_without_superusers() {
    there_and_back((18, 14)).await;
}
