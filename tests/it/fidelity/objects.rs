//! What belongs to tables and is no row: it arrives too, or check says that it does not.

use walferry::demo::compare::schema_differences;

use super::*;

/// pg_dump says the same of both sides.
#[tokio::test(flavor = "multi_thread")]
async fn comments_grants_policies_and_statistics_arrive() {
    let (source, target) = servers(15, 15);
    for server in [source, target] {
        server.psql("postgres", "create role reader_of_objects; create role \"Odd Role\"").unwrap();
    }
    let story = Story::of(
        "objects",
        "create schema s authorization \"Odd Role\"; \
         create table s.t (id int primary key, a int, b int, \"Secret\" text); \
         comment on table s.t is E'it''s a\\ncomment'; comment on column s.t.\"Secret\" is 'shh'; \
         comment on schema s is 'of mine'; comment on constraint t_pkey on s.t is 'the key'; \
         grant select (id, a), update (b) on s.t to reader_of_objects with grant option; \
         grant usage on schema s to public; revoke all on schema public from public; \
         alter default privileges in schema s grant select on tables to reader_of_objects; \
         alter table s.t enable row level security; alter table s.t force row level security; \
         create policy mine on s.t for select to reader_of_objects using (a > 0); \
         create policy other on s.t as restrictive using (true) with check (b < 100); \
         create statistics s.st (ndistinct, dependencies, mcv) on a, b from s.t; \
         create statistics s.ex on (a + b) from s.t; alter statistics s.st set statistics 77; \
         alter table s.t alter a set statistics 500, alter b set (n_distinct = 5); \
         alter table s.t set (fillfactor = 70, autovacuum_enabled = off); \
         create rule r as on delete to s.t where old.id < 0 do instead nothing; \
         create view s.v with (security_barrier) as select id from s.t where a > 1; \
         create trigger once after insert on s.t for each row when (new.a > 5) \
            execute function suppress_redundant_updates_trigger(); \
         alter table s.t disable trigger once; cluster s.t using t_pkey; \
         create index partial on s.t (lower(\"Secret\") text_pattern_ops desc) where a is not \
             null; \
         create aggregate s.total (int) (sfunc = int4pl, stype = int, initcond = '0'); \
         create operator s.=== (leftarg = int, rightarg = int, function = int4eq); \
         create text search configuration s.plain (copy = simple); \
         create collation s.backwards (provider = icu, locale = 'en-u-kf-upper'); \
         create sequence s.down increment -2 minvalue -9 maxvalue 9 start 9 cycle cache 3; \
         insert into s.t select i, i, i, 'x' from generate_series(1, 50) i",
    );
    story.done(&["run", "--until", "following"]).await;
    let (ours, theirs) = story.uris();
    let mut differing = schema_differences(&ours, &theirs).unwrap();
    // The one thing that a job makes outside of its own schema.
    differing.retain(|line| !line.contains("PUBLICATION walferry_objects_forward"));
    assert_eq!(differing, Vec::<String>::new());
    story.follows("update s.t set a = -1 where id = 1; delete from s.t where id = 2").await;
}

/// Descending, cycling, cached, of small types, owned and of identities: after the switch each goes
/// on past what was given, within its bounds.
#[tokio::test(flavor = "multi_thread")]
async fn sequences_of_every_make_go_on() {
    let names = ["down", "around", "cached", "tiny", "big", "untouched", "t_id_seq", "t_n_seq"];
    let story = Story::copied(
        "sequences",
        "create sequence down increment -5; create sequence around maxvalue 6 cycle; \
         create sequence cached cache 100; create sequence tiny as smallint; \
         create sequence big start 9000000000000000000; create sequence untouched start 42; \
         create table t (id serial primary key, n int generated always as identity (start 100))",
    )
    .await;
    story.source(
        "insert into t default values; insert into t default values; \
        select nextval('down') from generate_series(1, 7); \
        select nextval('around') from generate_series(1, 4); \
        select nextval('cached'), nextval('tiny'), nextval('big')",
    );
    let mut run = story.spawn(&["run"]);
    story.arrived(&mut run).await;
    story.done(&["cutover"]).await;
    for name in names {
        let last = format!("select last_value from {name}");
        let (was, is): (i64, i64) = (
            story.source(&last).parse().unwrap(),
            story.target(&format!("select nextval('{name}')")).parse().unwrap(),
        );
        match name {
            "down" => assert!(is < was, "{name}: {is} after {was}"),
            "around" => assert!((1..=6).contains(&is), "{name}: {is}"),
            "untouched" => assert!(is >= was, "{name}: {is} after {was}"),
            _ => assert!(is > was, "{name}: {is} after {was}"),
        }
    }
    let kind = "select string_agg(concat_ws(' ', seqrelid::regclass, seqtypid::regtype, \
        seqincrement, \
        seqmax, seqmin, seqcache, seqcycle), ';' order by seqrelid::regclass::text) from \
            pg_sequence \
        where seqrelid::regclass::text !~ '^walferry'";
    assert_eq!(story.target(kind), story.source(kind));
    run.signal("INT");
    run.ended().await.expect_success();
}

/// What does not come over is in check's list by name, each with what happens to it.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_carried_is_listed_by_check() {
    let story = Story::of(
        "not_carried",
        "create table t (id int primary key); create unlogged table cache (id int primary key); \
         insert into cache values (1), (2); \
         create materialized view summary as select count(*) from t; \
         create foreign data wrapper nobody; create server far foreign data wrapper nobody; \
         create foreign table elsewhere (n int) server far; select lo_from_bytea(0, 'large')",
    );
    let check = story.spawn(&["check", "--json"]).ended().await;
    let found = check.json();
    let said = |code: &str| -> String {
        let all = found["findings"].as_array().unwrap().iter();
        let of: Vec<String> = all.filter(|f| f["code"] == code).map(|f| f.to_string()).collect();
        assert_eq!(of.len(), 1, "{code}: {}", check.out);
        of.concat()
    };
    assert!(said("unlogged-table").contains("public.cache"));
    assert!(said("materialized-view").contains("public.summary"));
    assert!(said("foreign-table").contains("public.elsewhere"));
    assert!(said("large-objects").contains('1'));
}

/// The rows of an unlogged table at the time of the copy come over, and later ones do not.
#[tokio::test(flavor = "multi_thread")]
async fn unlogged_tables_are_copied_once() {
    let story = Story::copied(
        "unlogged",
        "create unlogged table cache (id int primary key); insert into cache values (1), (2); \
         create table t (id int primary key)",
    )
    .await;
    assert_eq!(story.target("select count(*) from cache"), "2");
    assert_eq!(story.target("select relpersistence from pg_class where relname = 'cache'"), "u");
    story.source("insert into cache values (3); insert into t values (1)");
    story.follows("delete from t").await;
    assert_eq!(story.target("select count(*) from cache"), "2");
}
