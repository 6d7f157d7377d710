//! A job whose tables are switched group by group, while writers send each statement to the side
//! that owns its partition.

mod cells;
mod kills;
mod router;

use std::collections::{BTreeSet, HashMap};
use std::time::{Duration, Instant};

use serde_json::Value;
use walferry::demo::server::Server;
use walferry::pg::{Config, Purpose, Session};

use crate::support::{self, job::Ends};
use router::{Router, Seen, Writers};

/// Partitions by bucket, with a sequence that all share; two tables with a key between them.
fn tables(partitions: usize, rows: usize) -> String {
    format!(
        "create table public.items (bucket int, id bigserial, n bigint not null default 0, \
             v text not null default repeat('x', 60), primary key (bucket, id)) \
             partition by list (bucket); \
         do $$ begin for b in 0 .. {last} loop execute format('create table public.items_%s \
             partition of public.items for values in (%s)', lpad(b::text, 4, '0'), b); \
             end loop; end $$; \
         insert into public.items (bucket, n) select g % {partitions}, -1 \
             from generate_series(1, {rows}) g; \
         create table public.people (id serial primary key); \
         create table public.pets (id serial primary key, owner int references public.people)",
        last = partitions - 1
    )
}

async fn refused(ends: &Ends, arguments: &[&str], said: &str) {
    let ended = ends.walferry(arguments).await;
    assert_eq!(ended.code, Some(1), "{arguments:?}: {ended:?}");
    assert!(ended.err.contains(said), "{arguments:?}: {}", ended.err);
}

/// A router's database, with a foreign server that leads to one partition of the first group and to
/// one of another.
fn foreign_router(ends: &Ends) {
    ends.source.psql("postgres", "create database router").unwrap();
    let sql = format!(
        "create extension postgres_fdw; create server g foreign data wrapper postgres_fdw \
             options (host '127.0.0.1', port '{}', dbname 'app'); \
         create user mapping for public server g options (user 'postgres'); \
         create foreign table first (bucket int, id bigint) server g \
             options (schema_name 'public', table_name 'items_0000'); \
         create foreign table public.items_0020 (bucket int) server g",
        ends.source.port()
    );
    ends.source.psql("router", &sql).unwrap();
}

/// The port that its foreign server leads to.
fn foreign_port(ends: &Ends) -> String {
    let sql = "select option_value from pg_foreign_server, pg_options_to_table(srvoptions) \
         where option_name = 'port'";
    ends.source.psql("router", sql).unwrap()
}

/// The error of a statement that a seal must refuse.
async fn sealed(uri: &str, sql: &str) {
    let mut session = Session::connect(&Config::parse(uri).unwrap(), Purpose::Sql).await.unwrap();
    let error = session.execute(sql).await.expect_err(sql);
    assert_eq!(error.code(), Some("25006"), "{sql}: {error}");
    assert!(error.to_string().contains("is on the other server"), "{error}");
}

/// Tables that are shut on a server.
fn shut(server: &Server) -> BTreeSet<String> {
    let sql = "select distinct tgrelid::regclass::text from pg_trigger \
         where tgname like 'walferry_seal%' and tgenabled <> 'D'";
    server.psql("app", sql).unwrap().lines().map(str::to_string).collect()
}

/// What the sequence that all partitions share goes on by.
fn step(server: &Server) -> String {
    let sql = "select increment_by from pg_sequences where sequencename = 'items_id_seq'";
    server.psql("app", sql).unwrap()
}

/// The job ends, and nothing of it is left.
async fn finished(ends: &Ends) {
    ends.done(&["finish"]).await;
    let left = "select count(*) from pg_trigger where tgname like 'walferry%'";
    for server in [&ends.source, &ends.target] {
        assert_eq!(server.psql("app", left).unwrap(), "0");
        assert_eq!(step(server), "1");
    }
}

/// Each group that status shows, with its owner and number of tables.
fn groups(status: &Value) -> Vec<(String, String, i64)> {
    let text = |value: &Value| value.as_str().unwrap_or("-").to_string();
    let mut groups: Vec<_> = status["groups"]
        .as_array()
        .map_or(&[][..], Vec::as_slice)
        .iter()
        .map(|g| (text(&g["group"]), text(&g["owner"]), g["tables"].as_i64().unwrap()))
        .collect();
    groups.sort();
    groups
}

/// What both sides have of what writers wrote, which is what they saw, to the last update.
fn assert_exact(ends: &Ends, seen: &Seen) {
    let read = |server: &Server| -> HashMap<(usize, i64), i64> {
        let rows = server.psql("app", "select bucket, id, n from public.items where n >= 0");
        let rows = rows.unwrap();
        let row = |line: &str| {
            let mut values = line.split('|').map(|value| value.parse::<i64>().unwrap());
            let mut next = || values.next().unwrap();
            ((next() as usize, next()), next())
        };
        rows.lines().map(row).collect()
    };
    for server in [&ends.source, &ends.target] {
        let rows = read(server);
        let lost: Vec<_> = seen.rows.iter().filter(|(at, n)| rows.get(at) != Some(n)).collect();
        assert!(lost.is_empty(), "lost or changed: {:?}", &lost[..lost.len().min(10)]);
        assert_eq!(rows.len(), seen.rows.len(), "rows that nobody wrote");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn partitions_are_switched_group_by_group_and_each_has_one_owner_through_a_kill_9() {
    let ends = Ends::start(15, 15);
    ends.source.psql("app", &tables(64, 6400)).unwrap();
    let mut run = ends.spawn(&["run"]);
    ends.until_phase(&mut run, "following").await;
    let router = Router::start(ends.source.dir(), 64);
    let uris = [ends.source_uri(), ends.target_uri()];
    let writers = Writers::start(&router, uris, 4, Duration::from_millis(2));
    let hook = router.route();
    let route = ["--route", &*hook];
    let first = ["--tables", "public.items_000?"];
    foreign_router(&ends);
    let foreign = format!("fdw:{},g", ends.source.uri("router"));
    let both = ["--route", &*hook, "--route", &*foreign];
    let with = |command: &[&'static str]| [command, &first[..], &both[..]].concat();

    // What cannot be switched so is refused by name, and nothing has begun.
    refused(&ends, &["cutover", "--tables", "pets"], "pets to public.people").await;
    refused(&ends, &["cutover", "--tables", "nothing"], "no table of \"nothing\"").await;
    let fence = [&["cutover", "--fence", "read-only"], &first[..]].concat();
    refused(&ends, &fence, "--fence lock").await;
    let whole = [&["cutover"], &first[..], &["--route", "plproxy:postgres://h/d,c,p1"]].concat();
    refused(&ends, &whole, "leads whole databases").await;
    refused(
        &ends,
        &with(&["cutover"]),
        "not in the group: public.items_0020 (as public.items_0020)",
    )
    .await;
    // The first group's refusal leaves nothing of groups.
    support::until("nothing is sealed", async || groups(&ends.status().await).is_empty()).await;
    for server in [&ends.source, &ends.target] {
        assert_eq!((shut(server), step(server)), (BTreeSet::new(), "1".to_string()));
    }
    ends.source.psql("router", "drop foreign table items_0020").unwrap();
    assert_eq!(ends.status().await["phase"], "following");

    // One group goes, and every other table stays.
    ends.done(&with(&["cutover", "--dry-run"])).await;
    ends.done(&with(&["cutover"])).await;
    assert_eq!(foreign_port(&ends), ends.target.port().to_string());
    let status = ends.status().await;
    assert_eq!(status["phase"], "split");
    let label = "public.items_000?".to_string();
    let there = (label.clone(), "target".to_string(), 10);
    let stay = ("-".to_string(), "source".to_string(), 56);
    assert_eq!(groups(&status), [stay.clone(), there]);
    writers.more(200).await;
    for (uri, owned, other) in [(ends.source_uri(), 20, 3), (ends.target_uri(), 3, 20)] {
        for table in ["public.items".to_string(), format!("public.items_{other:04}")] {
            sealed(&uri, &format!("insert into {table} (bucket) values ({other})")).await;
            sealed(&uri, &format!("update {table} set n = 7 where bucket = {other}")).await;
        }
        sealed(&uri, &format!("truncate public.items_{other:04}")).await;
        // A transaction across owners fails as a whole.
        let both = format!(
            "begin; update public.items set n = 7 where bucket = {owned} and n = -1; \
             update public.items set n = 7 where bucket = {other} and n = -1; commit"
        );
        sealed(&uri, &both).await;
    }
    refused(&ends, &["finish"], "on either side").await;
    refused(&ends, &["cancel"], "rollback leads them back").await;
    ends.done(&["verify"]).await;
    refused(&ends, &with(&["cutover"]), "no table of").await;

    // It comes back alone.
    ends.done(&with(&["rollback"])).await;
    assert_eq!(ends.status().await["phase"], "rolled_back");
    assert_eq!(foreign_port(&ends), ends.source.port().to_string());
    writers.more(100).await;

    // All of them, with the runner killed inside a group.
    let mut moving =
        ends.spawn(&["cutover", "--groups", "8", "--lock-timeout", "100ms", "--route", &hook]);
    moving.says("3 of 8").await;
    router.in_a_switch().await;
    let killed = Instant::now();
    run.kill9().await;
    let cut_short = moving.ended().await;
    let mut run = ends.spawn(&["run"]);
    let waits = Instant::now();
    while ends.status().await["held_clients"] == true {
        assert!(waits.elapsed().as_secs() < 30 && !run.has_ended(), "{}", run.so_far());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let resumed = Instant::now();
    writers.more(100).await;
    // That group is where it was, and those before it stay switched.
    assert!(cut_short.err.contains("those before it are switched"), "{cut_short:?}");
    let left: i64 =
        groups(&ends.status().await).iter().filter(|g| g.1 == "source").map(|g| g.2).sum();
    assert!((1..66).contains(&left), "{left} tables are left");
    let rest = ["cutover", "--groups", "4", "--route", &hook, "--json"];
    let rest = ends.done(&rest).await.json();
    assert_eq!(rest["phase"], "switched", "{rest}");
    assert_eq!(ends.status().await["phase"], "switched");
    writers.more(100).await;

    // One of a job that is switched, and what is left of it, however it is asked for.
    ends.done(&[&["rollback", "--tables", "public.items_006?"], &route[..]].concat()).await;
    assert_eq!(ends.status().await["phase"], "split");
    writers.more(100).await;
    ends.done(&[&["cutover"], &route[..]].concat()).await;
    assert_eq!(ends.status().await["phase"], "switched");
    writers.more(100).await;
    let seen = writers.end().await;
    assert_eq!(seen.errors, Vec::<String>::new());
    ends.done(&["verify"]).await;
    assert_exact(&ends, &seen);
    println!(
        "{} statements, the longest {:?} beside the kill and {:?} over it",
        seen.statements,
        seen.longest(&[(killed, resumed)]),
        seen.longest(&[]),
    );
    assert!(seen.longest(&[(killed, resumed)]) < Duration::from_secs(2));

    finished(&ends).await;
    ends.target.psql("app", "insert into public.items (bucket) values (1)").unwrap();
}

/// The measure that the issue names: partitions moved a group at a time, and at once.
///
/// `WALFERRY_PARTITIONS`: how many; `WALFERRY_GROUPS`: in how many groups, else 64 in each.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "minutes; make partitions"]
async fn thousands_of_partitions_stall_no_statement_for_long() {
    let number = |name: &str| std::env::var(name).ok().and_then(|n| n.parse::<usize>().ok());
    let partitions = number("WALFERRY_PARTITIONS").unwrap_or(8192);
    let groups = number("WALFERRY_GROUPS").unwrap_or(partitions.div_ceil(64));
    let (bulk, bulk_longest) = moved(partitions, None).await;
    let (by_group, longest) = moved(partitions, Some(groups)).await;
    let times = by_group.as_secs_f64() / bulk.as_secs_f64();
    println!(
        "{partitions} partitions in {groups} groups: {by_group:.1?}, longest statement \
         {longest:.0?}; at once {bulk:.1?}, longest {bulk_longest:.0?}: {times:.2} times"
    );
    assert!(longest <= Duration::from_millis(150), "a statement waited for {longest:?}");
    assert!(times <= 1.3, "{times:.2} times as long as at once");
}

/// How long a move takes from `run` to `switched`, and the longest wait of a statement.
async fn moved(partitions: usize, in_groups: Option<usize>) -> (Duration, Duration) {
    let bin = Server::bin_of(15).unwrap();
    let settings = ["max_locks_per_transaction = 1024", "shared_buffers = 256MB"];
    let start = || Server::start(&bin, &settings).unwrap();
    let ends = Ends::of(start(), start());
    ends.source.psql("app", &tables(partitions, partitions * 50)).unwrap();
    let router = Router::start(ends.source.dir(), partitions);
    let uris = [ends.source_uri(), ends.target_uri()];
    let writers = Writers::start(&router, uris, 4, Duration::from_millis(5));
    let (begun, hook) = (Instant::now(), router.route());
    let mut run = ends.spawn(&["run"]);
    let phase = "select phase from walferry.job";
    while ends.target.psql("app", phase).ok().as_deref() != Some("following") {
        assert!(!run.has_ended(), "{}", run.so_far());
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    let (following, many) = (begun.elapsed(), in_groups.unwrap_or(1).to_string());
    let mut command = vec!["cutover", "--json", "--lock-timeout", "50ms", "--route", &hook];
    if in_groups.is_some() {
        command.extend(["--groups", &many]);
    } else {
        command.extend(["--max-hold", "60s", "--timeout", "120s"]);
    }
    // The stream meets most tables for the first time just then.
    let ready = [&command[..], &["--dry-run"]].concat();
    for tries in 1.. {
        let ended = ends.walferry(&ready).await;
        if ended.code == Some(0) {
            break;
        }
        assert!(tries < 60 && ended.err.contains("behind"), "{ended:?}");
    }
    let outcome = ends.done(&command).await.json();
    let took = begun.elapsed();
    println!("following after {following:.1?}, switched after {took:.1?}");
    assert_eq!(outcome["phase"], "switched");
    if in_groups.is_none() {
        // The whole job's hook is told no tables: its clients are led by hand.
        println!("held for {} ms", outcome["fenced_ms"]);
    }
    if let Some(groups) = outcome["groups"].as_array() {
        let mut held: Vec<f64> = groups.iter().map(|g| g["fenced_ms"].as_f64().unwrap()).collect();
        held.sort_by(f64::total_cmp);
        let retries: i64 = groups.iter().map(|g| g["retries"].as_i64().unwrap()).sum();
        println!("held for {:.0} ms in the median, {retries} tries again", held[held.len() / 2]);
    }
    let seen = writers.end().await;
    if in_groups.is_some() {
        assert_eq!(seen.errors, Vec::<String>::new());
        ends.done(&["verify"]).await;
        assert_exact(&ends, &seen);
    }
    let slow = seen.slow.iter().map(|(ended, took)| {
        format!("{took:.0?} at {:.1?}", ended.duration_since(begun).saturating_sub(*took))
    });
    let slow: Vec<String> = slow.collect();
    println!("{} statements, over 50 ms: {}", seen.statements, slow.join(", "));
    (took, seen.longest(&[]))
}
