//! Triggers, rules and foreign keys on a side whose role may not set session_replication_role: each
//! acts once, where the application wrote, and is as it was when all is over.

use std::time::Duration;

use walferry::demo::compare::compare;
use walferry::demo::server::Server;

use super::roles::{self, ROLE};
use crate::support::job::Ends;
use crate::support::{Inventory, until};

/// Everything that acts on rows: cascades of each kind, a key to its own table, a key that is not
/// valid, one with a comment, triggers enabled and not, and a rule.
const SCHEMA: &str = "create schema story; \
     create table story.parent (id int primary key, n int not null default 0); \
     create table story.tree (id int primary key, up int references story.tree); \
     create table story.child (id int primary key, parent int \
         references story.parent on update cascade on delete cascade); \
     create table story.guest (id int primary key, host int \
         references story.parent on update cascade on delete set null); \
     create table story.late (id int primary key, parent int); \
     insert into story.late values (1, 99); \
     alter table story.late add constraint \"late's key\" foreign key (parent) \
         references story.parent deferrable initially deferred not valid; \
     comment on constraint \"late's key\" on story.late is 'from 2019'; \
     create table story.log (id serial primary key, what text); \
     create table story.ruled (id int primary key); \
     create rule note as on insert to story.ruled \
         do also insert into story.log (what) values ('ruled'); \
     create function story.note() returns trigger language plpgsql as $$ begin \
         insert into story.log (what) values (tg_op || ' ' || new.id); \
         new.n = new.n + 1; return new; end $$; \
     create trigger note before insert or update on story.parent \
         for each row execute procedure story.note(); \
     create trigger off before insert on story.parent \
         for each row execute procedure story.note(); \
     alter table story.parent disable trigger off";

/// Rows from `base` on that every cascade, the trigger and the rule act upon, in statements that
/// touch many rows in an order that no foreign key would bear row by row.
fn work(server: &Server, base: i32) {
    let sql = format!(
        "insert into story.parent select {base} + g from generate_series(0, 9) g; \
         insert into story.tree select {base} + g, {base} + 9 - (9 - g) / 2 \
             from generate_series(0, 9) g; \
         insert into story.child select {base} + g, {base} + g from generate_series(0, 9) g; \
         insert into story.guest select {base} + g, {base} + g from generate_series(0, 9) g; \
         insert into story.ruled values ({base}); \
         update story.parent set n = 5 where id = {base} + 1; \
         update story.parent set id = {base} + 50 where id = {base} + 2; \
         delete from story.parent where id in ({base} + 3, {base} + 4); \
         delete from story.tree where id >= {base} and id < {base} + 9; \
         begin; insert into story.late values ({base}, {base} + 60); \
         insert into story.parent values ({base} + 60); commit"
    );
    server.psql("app", &format!("set role {ROLE}; {sql}")).unwrap();
}

async fn assert_equal(ends: &Ends) {
    let found = compare(&ends.source_uri(), &ends.target_uri()).await.unwrap();
    let rows: Vec<_> = found.differences.iter().filter(|d| !d.starts_with("sequence ")).collect();
    assert_eq!(rows, Vec::<&String>::new());
}

async fn story(majors: (u32, u32)) -> Ends {
    let ends = roles::owner_of(majors, SCHEMA).await;
    let needed = roles::printed_by(&ends, &["--decoder", "pgoutput"], &["error"], &[]).await;
    roles::grant(&ends, &needed);
    work(&ends.source, 1000);
    ends
}

/// Waits until what was validated before is so again, on the side that is live.
async fn until_valid(server: &Server) {
    until("foreign keys are validated", || async {
        let count = "select count(*) from pg_constraint where contype = 'f' and not convalidated";
        server.psql("app", count).unwrap() == "1"
    })
    .await;
}

async fn there_and_back(majors: (u32, u32)) {
    let ends = story(majors).await;
    let before = ends.inventories().await;
    let mut run = ends.spawn(&["run"]);
    ends.until_phase(&mut run, "following").await;
    work(&ends.source, 2000);
    ends.done(&["verify"]).await;
    ends.done(&["cutover"]).await;
    until_valid(&ends.target).await;
    work(&ends.target, 3000);
    ends.done(&["verify"]).await;
    assert_equal(&ends).await;
    ends.done(&["rollback"]).await;
    until_valid(&ends.source).await;
    let now = Inventory::now(&ends.source_uri()).await;
    assert_eq!(before.0.acts_unlike(&now), Vec::<String>::new());
    work(&ends.source, 4000);
    ends.done(&["verify"]).await;
    ends.done(&["cutover"]).await;
    work(&ends.target, 5000);
    ends.done(&["verify"]).await;
    assert_equal(&ends).await;
    ends.done(&["finish"]).await;
    run.ended().await.expect_success();
    let after = ends.inventories().await;
    assert_eq!(before.0.diff(&after.0), Vec::<String>::new());
    assert_eq!(before.0.acts_unlike(&after.1), Vec::<String>::new());
    let comment = "select obj_description(oid, 'pg_constraint') from pg_constraint \
         where conname = 'late''s key'";
    for server in [&ends.source, &ends.target] {
        assert_eq!(server.psql("app", comment).unwrap(), "from 2019");
    }
}

/// PeerDB#4219: without the replica role, triggers and foreign keys acted on the target again.
#[tokio::test(flavor = "multi_thread")]
async fn peerdb_4219_triggers_and_cascades_act_once_without_the_replica_role() {
    there_and_back((15, 15)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn triggers_and_cascades_act_once_from_10_to_17() {
    there_and_back((10, 17)).await;
}

/// An undone cutover leaves both sides as they were before it: the source acting, the target not.
#[tokio::test(flavor = "multi_thread")]
async fn an_undone_cutover_turns_keys_and_triggers_back() {
    let ends = story((15, 15)).await;
    let before = ends.inventories().await.0;
    let mut run = ends.spawn(&["run"]);
    ends.until_phase(&mut run, "following").await;
    // The route's last step fails, when all is sealed and at work on the other side.
    let refused = "hook:test $WALFERRY_PHASE != switch";
    let ended = ends.walferry(&["cutover", "--route", refused]).await;
    assert_eq!(ended.code, Some(1), "{ended:?}");
    until_valid(&ends.source).await;
    let now = Inventory::now(&ends.source_uri()).await;
    assert_eq!(before.acts_unlike(&now), Vec::<String>::new());
    work(&ends.source, 2000);
    ends.done(&["verify"]).await;
    ends.done(&["cutover"]).await;
    work(&ends.target, 3000);
    ends.done(&["verify"]).await;
    assert_equal(&ends).await;
    ends.done(&["finish"]).await;
    run.ended().await.expect_success();
    let after = ends.inventories().await;
    assert_eq!(before.diff(&after.0), Vec::<String>::new());
    assert_eq!(before.acts_unlike(&after.1), Vec::<String>::new());
}

/// Killed in the middle of a flip, at whatever step.
#[tokio::test(flavor = "multi_thread")]
async fn a_kill_in_the_cutover_leaves_keys_and_triggers_where_they_belong() {
    let ends = story((15, 15)).await;
    let before = ends.inventories().await.0;
    let mut run = ends.spawn(&["run"]);
    ends.until_phase(&mut run, "following").await;
    for wait in [120, 160, 200, 240, 280, 320, 400] {
        let asked = ends.spawn(&["cutover"]);
        tokio::time::sleep(Duration::from_millis(wait)).await;
        run.kill9().await;
        drop(asked);
        run = ends.spawn(&["run"]);
        until("the flip is settled", || async {
            if !ends.nothing_is_asked() {
                return false;
            }
            let phase = ends.status().await["phase"].clone();
            phase == "following" || phase == "switched" || phase == "rolled_back"
        })
        .await;
        if ends.status().await["phase"] == "switched" {
            until_valid(&ends.target).await;
            work(&ends.target, wait as i32 * 1000);
            ends.done(&["rollback"]).await;
        }
        until_valid(&ends.source).await;
        let now = Inventory::now(&ends.source_uri()).await;
        assert_eq!(before.acts_unlike(&now), Vec::<String>::new());
        work(&ends.source, wait as i32 * 1000 + 500);
        ends.done(&["verify"]).await;
    }
    ends.done(&["cutover"]).await;
    ends.done(&["finish"]).await;
    run.ended().await.expect_success();
    assert_equal(&ends).await;
    let after = ends.inventories().await;
    assert_eq!(before.diff(&after.0), Vec::<String>::new());
    assert_eq!(before.acts_unlike(&after.1), Vec::<String>::new());
}

/// Dropping a foreign key waits for readers too: with one in the way the cutover says which.
#[tokio::test(flavor = "multi_thread")]
async fn a_reader_in_the_way_of_a_foreign_key_is_named() {
    let ends = story((15, 15)).await;
    let mut run = ends.spawn(&["run"]);
    ends.until_phase(&mut run, "following").await;
    let config = walferry::pg::Config::parse(&ends.source_uri()).unwrap();
    let config = config.with_application_name("report");
    let mut reader =
        walferry::pg::Session::connect(&config, walferry::pg::Purpose::Sql).await.unwrap();
    reader.execute("begin; select count(*) from story.child").await.unwrap();
    let ended = ends.walferry(&["cutover", "--max-hold", "2s"]).await;
    assert_eq!(ended.code, Some(1), "{ended:?}");
    let pid = format!("in its way: pid {} ", reader.process_id());
    for part in [&*pid, "(postgres, ", "writers go on"] {
        assert!(ended.err.contains(part), "{part}: {}", ended.err);
    }
    work(&ends.source, 2000);
    reader.execute("commit").await.unwrap();
    ends.done(&["cutover"]).await;
    ends.done(&["verify"]).await;
    ends.done(&["finish"]).await;
    run.ended().await.expect_success();
}

/// A reader keeps the target's foreign keys from being set aside again after a cutover that failed:
/// until they are, the stream waits, and nothing acts twice.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_acts_twice_while_an_undoing_waits_for_a_reader() {
    let ends = story((15, 15)).await;
    let mut run = ends.spawn(&["run"]);
    ends.until_phase(&mut run, "following").await;
    let config = walferry::pg::Config::parse(&ends.target_uri()).unwrap();
    let config = config.with_application_name("report");
    let mut reader =
        walferry::pg::Session::connect(&config, walferry::pg::Purpose::Sql).await.unwrap();
    // It begins once the foreign keys are there, and so does not keep them from coming.
    let here = ends.source.dir().join("here");
    let go = ends.source.dir().join("go");
    let hook = format!(
        "hook:if [ $WALFERRY_PHASE = switch ]; then touch {}; \
         while [ ! -e {} ]; do sleep 0.05; done; exit 1; fi",
        here.display(),
        go.display()
    );
    let cutover = ends.spawn(&["cutover", "--max-hold", "20s", "--route", &hook]);
    until("the switch", || async { here.exists() }).await;
    reader.execute("begin; select count(*) from story.parent, story.child").await.unwrap();
    std::fs::write(&go, "").unwrap();
    // Writers go on as soon as they may, and long before the reader is gone.
    let begun = std::time::Instant::now();
    let one = format!("set role {ROLE}; insert into story.parent values (7000)");
    while ends.source.psql("app", &one).is_err() {
        assert!(begun.elapsed() < Duration::from_secs(30), "writers are held");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    work(&ends.source, 8000);
    let ended = cutover.ended().await;
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(ended.err.contains("undoing failed"), "{}", ended.err);
    tokio::time::sleep(Duration::from_secs(1)).await;
    reader.execute("commit").await.unwrap();
    ends.until_phase(&mut run, "following").await;
    ends.done(&["verify"]).await;
    assert_equal(&ends).await;
    ends.done(&["cancel"]).await;
    run.ended().await.expect_success();
}
