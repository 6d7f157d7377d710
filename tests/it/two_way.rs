//! Both sides written at once.
//!
//! What happened is counted from outside, by triggers that fire for what is applied as well: each
//! version of a row has a name of its own and says of which version it was made. What was applied
//! over another version than that met a conflict, and so did what never arrived.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use walferry::demo::server::{Server, StopMode};

use crate::support::job::Ends;
use crate::support::{Walferry, until_within};

mod greatest;

const SCHEMA: &str = "create table item (id int primary key, v text not null default '', \
    base text not null default '', note text, filler text, rev int); \
    create table tagged (id int primary key, tag text not null unique, note text, rev int); \
    create table counted (id bigserial primary key, side text); \
    create sequence version; \
    insert into item (id, v) select i, 'copied-' || i from generate_series(1, 3000) i; \
    insert into tagged select i, 'tag-' || i, 'copied' from generate_series(1, 40) i; \
    insert into counted (side) select 'copied' from generate_series(1, 7)";

const AUDIT: &str = "create schema audit; \
    create table audit.log (n bigserial, op text, id int, v text, base text, was text, \
        applied bool); \
    create function audit.name() returns trigger language plpgsql as $$ begin \
        if tg_op = 'UPDATE' then new.base := old.v; end if; \
        new.v := '{side}-' || nextval('public.version'); \
        new.rev := random() * 1000; return new; end $$; \
    create function audit.note() returns trigger language plpgsql as $$ begin \
        insert into audit.log (op, id, v, base, was, applied) values (tg_op, \
            case when tg_op = 'DELETE' then old.id else new.id end, \
            case when tg_op <> 'DELETE' then new.v end, \
            case when tg_op <> 'DELETE' then new.base end, \
            case when tg_op <> 'INSERT' then old.v end, \
            current_setting('session_replication_role') = 'replica'); return null; end $$; \
    create trigger a before insert or update on item for each row execute procedure audit.name(); \
    create trigger b after insert or update or delete on item \
        for each row execute procedure audit.note(); \
    alter table item enable always trigger b";

/// Found from outside: applied over another version than it was made of, or never seen here.
const FOUND: &str =
    "select count(*) from audit.log where applied and op = 'UPDATE' and base <> was";

fn ends(majors: (u32, u32), settings: &[&str]) -> Ends {
    let start = |major| Server::start(&Server::bin_of(major).unwrap(), settings).unwrap();
    let ends = Ends::of(start(majors.0), start(majors.1));
    ends.source.psql("app", SCHEMA).unwrap();
    ends
}

fn audit(ends: &Ends) {
    for (server, side) in [(&ends.source, "s"), (&ends.target, "t")] {
        server.psql("app", &AUDIT.replace("{side}", side)).unwrap();
    }
}

async fn open(ends: &Ends, arguments: &[&str]) -> Walferry {
    let mut run = ends.spawn(&[&["run", "--two-way"], arguments].concat());
    ends.until_phase(&mut run, "following").await;
    run
}

/// Until all that was written by now on either side is on the other.
async fn drain(ends: &Ends, limit: Duration) {
    let end = "select pg_current_wal_insert_lsn()";
    let (source, target) =
        (ends.source.psql("app", end).unwrap(), ends.target.psql("app", end).unwrap());
    for (server, stream, lsn) in
        [(&ends.target, "forward", source), (&ends.source, "reverse", target)]
    {
        let passed = format!(
            "select end_lsn >= '{lsn}' from walferry.progress \
             where stream = 'walferry_main_{stream}'"
        );
        until_within(limit, &passed, async || server.psql("app", &passed).unwrap() == "t").await;
    }
}

fn both(ends: &Ends, sql: &str) -> (String, String) {
    (ends.source.psql("app", sql).unwrap(), ends.target.psql("app", sql).unwrap())
}

fn assert_equal(ends: &Ends) {
    for table in ["item", "tagged", "counted"] {
        let sql = format!("select md5(string_agg(r::text, ',' order by id)) from {table} r");
        let (source, target) = both(ends, &sql);
        if source != target {
            let sql = format!("select id, r from {table} r order by id");
            let (source, target) = both(ends, &sql);
            let rows = |text: &str| text.lines().map(str::to_string).collect::<Vec<_>>();
            let (source, target) = (rows(&source), rows(&target));
            let only = |a: &[String], b: &[String]| {
                a.iter().filter(|row| !b.contains(row)).take(5).cloned().collect::<Vec<_>>()
            };
            panic!("{table}: {:?} {:?}", only(&source, &target), only(&target, &source));
        }
    }
}

/// Kinds and outcomes on record on a side since the record `after`.
fn recorded(server: &Server, after: &str) -> String {
    let sql = format!(
        "select string_agg(kind || ' ' || outcome, ', ' order by kind, outcome) \
         from walferry.conflict where id > {after}"
    );
    server.psql("app", &sql).unwrap()
}

fn last_record(server: &Server) -> String {
    server.psql("app", "select coalesce(max(id), 0) from walferry.conflict").unwrap()
}

/// Writes of one side, five in a hundred to keys that the other side writes as well.
fn writer(ends: &Ends, server: &Server, own: (u32, u32), seconds: u64, rate: u32) -> Child {
    let script = format!(
        "\\set hot random(1, 3)\n\\set own random({}, {})\n\\set pick random(1, 100)\n\
         \\if :pick <= 5\nupdate item set note = :'client_id' || :pick where id = :hot;\n\\else\n\
         update item set note = :'client_id' || :pick where id = :own;\n\\endif\n",
        own.0, own.1
    );
    let script = script.replace(":'client_id'", "'c'");
    let path = ends.source.dir().join(format!("two_way_{}.sql", own.0));
    std::fs::write(&path, script).unwrap();
    let pgbench = Server::default_bin().unwrap().join("pgbench");
    Command::new(pgbench)
        .args(["-n", "-c", "2", "-T", &seconds.to_string(), "-R", &rate.to_string()])
        .args(["-f", path.to_str().unwrap(), &server.uri("app")])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

/// Counted from outside on the side written by a stream: `read` is the side it reads.
fn found(read: &Server, written: &Server) -> i64 {
    let over: i64 = written.psql("app", FOUND).unwrap().parse().unwrap();
    let versions = |server: &Server, applied: bool| {
        let sql = format!("select v from audit.log where op = 'UPDATE' and applied = {applied}");
        let text = server.psql("app", &sql).unwrap();
        text.lines().map(str::to_string).collect::<std::collections::HashSet<_>>()
    };
    let never = versions(read, false).difference(&versions(written, true)).count();
    over + never as i64
}

/// Both sides equal, each conflict on record, and nothing came back.
async fn settled(ends: &Ends) {
    assert_equal(ends);
    let status = ends.status().await;
    for (read, written, stream) in
        [(&ends.source, &ends.target, &status), (&ends.target, &ends.source, &status["reverse"])]
    {
        let recorded = "select count(*) from walferry.conflict where kind = 'update_update' \
             and name = 'item' and id > (select coalesce(max(id), 0) from walferry.conflict \
                 where name <> 'item')";
        let recorded: i64 = written.psql("app", recorded).unwrap().parse().unwrap();
        assert_eq!(recorded, found(read, written), "{status}");
        let own = "select count(*) from audit.log where not applied";
        let own: i64 = read.psql("app", own).unwrap().parse().unwrap();
        let item = table(stream, "public.item");
        assert!(own > 0, "{item}");
        assert_eq!(item["decoded"].as_i64().unwrap(), own, "{item}");
        let n = |key: &str| item[key].as_i64().unwrap();
        assert_eq!(n("decoded"), n("applied") + n("filtered") + n("lost"), "{item}");
    }
}

fn table<'a>(stream: &'a Value, name: &str) -> &'a Value {
    let tables = stream["tables"].as_array().unwrap();
    tables.iter().find(|table| table["name"] == name).unwrap()
}

async fn written_on_both_sides(ends: &Ends, run: Walferry, kills: u32, seconds: u64, rate: u32) {
    let mut run = run;
    let begun = Instant::now();
    let mut writers = [
        writer(ends, &ends.source, (1000, 1999), seconds, rate),
        writer(ends, &ends.target, (2000, 2999), seconds, rate),
    ];
    for kill in 1..=kills {
        let at = Duration::from_secs(seconds) * kill / (kills + 1);
        tokio::time::sleep(at.saturating_sub(begun.elapsed())).await;
        run.kill9().await;
        run = open(ends, &[]).await;
    }
    let wait = Duration::from_secs(seconds) + Duration::from_secs(60);
    for writer in &mut writers {
        let ended = || {
            let ended = matches!(writer.try_wait(), Ok(Some(status)) if status.success());
            async move { ended }
        };
        until_within(wait, "a writer", ended).await;
    }
    drain(ends, wait).await;
    settled(ends).await;
    run.signal("INT");
    run.ended().await.expect_success();
}

#[tokio::test(flavor = "multi_thread")]
async fn both_sides_are_written_at_once_and_every_conflict_is_on_record() {
    let ends = ends((15, 15), &[]);
    let checked = ends.walferry(&["check", "--two-way"]).await;
    assert_eq!(checked.out.matches("track_commit_timestamp: is off").count(), 2, "{checked:?}");
    for server in [&ends.source, &ends.target] {
        server.configure(&["track_commit_timestamp = on"]).unwrap();
        server.restart(StopMode::Fast).unwrap();
    }
    let before = ends.inventories().await.0;
    let run = open(&ends, &[]).await;
    audit(&ends);
    for server in [&ends.source, &ends.target] {
        let refused = server.psql("app", "truncate tagged").unwrap_err().to_string();
        assert!(refused.contains("is refused while walferry"), "{refused}");
        server
            .psql("app", "insert into counted (side) select 'x' from generate_series(1, 50)")
            .unwrap();
    }
    drain(&ends, Duration::from_secs(30)).await;
    assert_equal(&ends);
    assert_eq!(both(&ends, "select count(*) from counted").0, "107");
    run.kill9().await;

    by_policy(&ends).await;

    let run = open(&ends, &["--on-conflict", "last-commit"]).await;
    written_on_both_sides(&ends, run, 2, 8, 150).await;

    let refused = ends.walferry(&["cutover", "--two-way"]).await;
    assert!(refused.err.contains("walferry finish"), "{refused:?}");
    ends.done(&["finish"]).await;
    let drop = "drop schema audit cascade";
    both(&ends, drop);
    let increments = "select string_agg(distinct increment_by::text, ',') from pg_sequences";
    assert_eq!(both(&ends, increments), ("1".to_string(), "1".to_string()));
    let after = ends.inventories().await.0;
    assert_eq!(before.leftovers(&after), Vec::<String>::new());
}

/// Changes that know nothing of each other, as no stream flows; the target's are the later ones.
fn collide(ends: &Ends, round: u32) {
    let n = |k: u32| 1000 + round * 100 + k;
    let at = |server: &Server, tag: &str, updated: u32, deleted: u32| {
        let sql = format!(
            "update tagged set note = '{tag}{round}' where id = {both}; \
             insert into tagged values ({}, '{tag}-ins-{round}', '{tag}'); \
             update tagged set note = '{tag}{round}' where id = {updated}; \
             delete from tagged where id = {deleted}; delete from tagged where id = {gone}; \
             insert into tagged values ({}, 'same-{round}', '{tag}')",
            n(1),
            n(if tag == "s" { 2 } else { 3 }),
            both = 5 * round + 1,
            gone = 5 * round + 4,
        );
        for sql in sql.split(';') {
            server.psql("app", sql).unwrap();
        }
    };
    at(&ends.source, "s", 5 * round + 2, 5 * round + 3);
    at(&ends.target, "t", 5 * round + 3, 5 * round + 2);
}

async fn by_policy(ends: &Ends) {
    let all = |outcome: &str| {
        format!(
            "delete_missing kept, delete_update {outcome}, insert_insert {outcome}, \
             unique {outcome}, update_delete {outcome}, update_update {outcome}"
        )
    };
    // What became of what came to the target, and to the source.
    for (round, policy, target, source) in [
        (0, "last-commit", all("kept"), all("applied")),
        (1, "target", all("kept"), all("applied")),
        (2, "source", all("applied"), all("kept")),
        // A run that is not told goes on as the one before.
        (3, "", all("applied"), all("kept")),
    ] {
        let after = (last_record(&ends.source), last_record(&ends.target));
        collide(ends, round);
        if round == 1 {
            let mut run = ends.spawn(&["run", "--two-way", "--on-conflict", "error"]);
            let stops = || {
                let stops = run.has_ended();
                async move { stops }
            };
            until_within(Duration::from_secs(30), "it stops", stops).await;
            let ended = run.ended().await;
            assert!(ended.err.contains("conflict update_update: UPDATE"), "{ended:?}");
        }
        let given = if policy.is_empty() { &[][..] } else { &["--on-conflict", policy] };
        let run = open(ends, given).await;
        drain(ends, Duration::from_secs(30)).await;
        assert_equal(ends);
        let said = "conflicts are settled by source from now on, and were by target";
        assert_eq!(run.so_far().contains(said), policy == "source", "{}", run.so_far());
        assert_eq!(recorded(&ends.target, &after.1), target, "{policy} on the target");
        assert_eq!(recorded(&ends.source, &after.0), source, "{policy} on the source");
        run.kill9().await;
    }
    let rows = "select incoming ->> 'note', local ->> 'note', outcome from walferry.conflict \
         where kind = 'update_update' order by id limit 1";
    assert_eq!(ends.target.psql("app", rows).unwrap(), "s0|t0|kept");
    assert_eq!(ends.source.psql("app", rows).unwrap(), "t0|s0|applied");
}

#[tokio::test(flavor = "multi_thread")]
async fn other_versions_and_decoders_end_equal_as_well() {
    let oldest = if walferry::demo::binaries::is_installed(12) { 12 } else { 14 };
    let cell = async |majors, how: &[&str]| {
        let ends = ends(majors, &["track_commit_timestamp=on"]);
        let run = open(&ends, how).await;
        audit(&ends);
        written_on_both_sides(&ends, run, 1, 5, 80).await;
        ends.done(&["cancel"]).await;
    };
    // Where messages are not shown, where markers tell what is ours, and by pull.
    tokio::join!(
        // Of a random number, which falls as often as it grows.
        cell((10, 17), &["--on-conflict", "greatest:rev,last-commit"]),
        cell((oldest, 18), &["--decoder", "test_decoding"]),
        cell((15, 15), &["--decoder", "wal2json", "--transport", "pull"]),
    );
}

/// The bar of ten minutes, `make two-way`.
#[ignore = "ten minutes"]
#[tokio::test(flavor = "multi_thread")]
async fn ten_minutes_of_both_sides() {
    let seconds = std::env::var("WALFERRY_TWO_WAY").unwrap_or("600".to_string());
    let seconds: u64 = seconds.parse().unwrap();
    let policy = std::env::var("WALFERRY_ON_CONFLICT").unwrap_or("last-commit".to_string());
    let ends = ends((15, 15), &["track_commit_timestamp=on"]);
    let run = open(&ends, &["--on-conflict", &policy]).await;
    audit(&ends);
    written_on_both_sides(&ends, run, 3, seconds, 200).await;
    let settled =
        "select string_agg(distinct policy || ' ' || outcome, ', ') from walferry.conflict";
    println!("on source and target by {policy}: {:?}", both(&ends, settled));
    let counted = both(&ends, "select count(*) from walferry.conflict");
    println!("conflicts on record on source and target: {counted:?}");
}

/// A million transactions, each of which would come back if it could: `make two-way-loop`.
#[ignore = "many minutes"]
#[tokio::test(flavor = "multi_thread")]
async fn of_a_million_transactions_none_comes_back() {
    let wanted = std::env::var("WALFERRY_TRANSACTIONS").unwrap_or("1000000".to_string());
    let ends = ends((15, 15), &["track_commit_timestamp=on"]);
    let run = open(&ends, &[]).await;
    let sql = format!(
        "do $$ begin for i in 1 .. {wanted} loop \
         update item set note = i::text where id = 1 + i % 3000; commit; end loop; end $$"
    );
    let begun = Instant::now();
    ends.source.psql("app", &sql).unwrap();
    drain(&ends, Duration::from_secs(7200)).await;
    let status = ends.status().await;
    assert_eq!(table(&status, "public.item")["applied"].to_string(), wanted);
    assert_eq!(status["conflicts"], 0);
    let back = status["reverse"]["tables"].as_array().unwrap();
    assert!(back.iter().all(|table| table["decoded"] == 0), "{status}");
    assert_equal(&ends);
    println!("{wanted} transactions in {:?}, none came back", begun.elapsed());
    run.signal("INT");
    run.ended().await.expect_success();
}
