//! The doubling of a plproxy cluster, under clients that call its functions. `make stalls` measures
//! how long the writers of each database are held, with the release binary.

use std::collections::BTreeSet;
use std::time::Duration;

use serde_json::Value;
use walferry::demo::server::{Server, StopMode};

use super::load::{Load, kills};
use super::{asked, cluster, refused};
use crate::support::{self, Walferry, until_within};

/// `WALFERRY_PARTITIONS`: 16 for the doubling that the design speaks of.
fn partitions() -> usize {
    let given = std::env::var("WALFERRY_PARTITIONS").ok();
    given.and_then(|text| text.parse().ok()).unwrap_or(4)
}

/// How long writers of a database may be held, where it is measured on purpose.
const BAR_MS: f64 = 150.0;

/// Two servers with the partitions' databases, two more that are empty, and two proxy databases.
struct Stage {
    old: [Server; 2],
    new: [Server; 2],
    proxy: Server,
}

impl Stage {
    fn new() -> Stage {
        let old: [Server; 2] = std::array::from_fn(|_| support::server());
        let (new, proxy): ([Server; 2], Server) =
            (std::array::from_fn(|_| support::server()), support::server());
        let settings =
            ["max_replication_slots = 40", "max_wal_senders = 60", "max_connections = 400"];
        for server in old.iter().chain(&new) {
            server.configure(&settings).unwrap();
            server.restart(StopMode::Fast).unwrap();
        }
        let mut options = Vec::new();
        for part in 0..partitions() {
            let server = &old[part % 2];
            server.psql("postgres", &format!("create database part{part}")).unwrap();
            for sql in [
                "create table t (id bigint primary key, v int not null)",
                "create sequence called",
                "create function put(i bigint) returns bigint language sql as \
                 $$ select nextval('public.called'); \
                 insert into public.t values (i, 1) returning id $$",
                "insert into t select -i, 1 from generate_series(1, 20000) i",
            ] {
                server.psql(&format!("part{part}"), sql).unwrap();
            }
            options.push(format!(
                "p{part} 'dbname=part{part} host=127.0.0.1 port={} user=postgres keepalives_idle=30'",
                server.port()
            ));
        }
        for dbname in ["proxy", "second"] {
            proxy.psql("postgres", &format!("create database {dbname}")).unwrap();
            for sql in [
                "create extension plproxy".to_string(),
                format!(
                    "create server shop foreign data wrapper plproxy options \
                     (connection_lifetime '1800', {})",
                    options.join(", ")
                ),
                "comment on server shop is 'of the shop'".to_string(),
                "create user mapping for public server shop".to_string(),
                "create function put(i bigint) returns bigint language plproxy as \
                 $$ cluster 'shop'; run on hashtext(i::text); $$"
                    .to_string(),
            ] {
                proxy.psql(dbname, &sql).unwrap();
            }
        }
        Stage { old, new, proxy }
    }

    fn address(&self) -> String {
        let new: Vec<String> = self.new.iter().map(name).collect();
        format!("plproxy:{},shop,{}", self.proxy.uri("proxy"), new.join(","))
    }

    fn servers(&self) -> impl Iterator<Item = &Server> {
        self.old.iter().chain(&self.new)
    }

    /// The server that a proxy database leads a partition's clients to.
    fn live(&self, dbname: &str, part: usize) -> &Server {
        let sql = format!(
            "select option_value from pg_foreign_server, pg_options_to_table(srvoptions) \
             where srvname = 'shop' and option_name = 'p{part}'"
        );
        let text = self.proxy.psql(dbname, &sql).unwrap();
        let port = |server: &&Server| text.contains(&format!("port={} ", server.port()));
        assert!(text.ends_with("user=postgres keepalives_idle=30"), "{text}");
        self.servers().find(port).unwrap()
    }
}

fn name(server: &Server) -> String {
    format!("127.0.0.1:{}", server.port())
}

fn rows(server: &Server, part: usize) -> BTreeSet<u64> {
    let rows = server.psql(&format!("part{part}"), "select id from t where id > 0").unwrap();
    rows.lines().map(|line| line.parse().unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_plproxy_cluster_is_doubled_in_one_job_and_any_database_led_back() {
    let stage = Stage::new();
    let address = stage.address();
    let planned = asked(&address, &["rebalance", "--by", "count"]).await;
    let tasks = planned["tasks"].as_array().unwrap();
    let halves = partitions() / 2;
    assert_eq!((tasks.len(), &planned["job"]), (halves, &Value::from(1)), "{planned}");
    let (proxy, second) = (stage.proxy.uri("proxy"), stage.proxy.uri("second"));
    let put = "select put($1)".to_string();
    let load = Load::start(vec![
        (vec![proxy.clone()], put.clone()),
        (vec![proxy.clone()], put.clone()),
        (vec![second.clone()], put),
    ]);
    load.more().await;
    let run = |more: &[&str]| {
        Walferry::spawn(&[&["cluster", "--cluster", &address, "run", "1"], more].concat())
    };
    // Killed once both are under way; the next run knows of the second proxy by itself.
    let mut first = run(&["--router", &second]);
    // Tasks of other nodes do not wait for each other.
    let beside = (2..).zip(&tasks[1..]).find(|(_, other)| {
        other["source"] != tasks[0]["source"] && other["target"] != tasks[0]["target"]
    });
    let (number, _) = beside.unwrap();
    first.says("task 1: copying").await;
    first.says(&format!("task {number}: copying")).await;
    first.kill9().await;
    // Where it is measured, nobody kills.
    let measured = std::env::var("WALFERRY_STALLS").is_ok();
    for wait in kills(if measured { 0 } else { 3 }) {
        run(&[]).kill9_after(wait).await;
    }
    run(&[]).ended().await.expect_success();
    load.more().await;
    let job = asked(&address, &["job", "1"]).await;
    let tasks = job["tasks"].as_array().unwrap();
    let moved = |task: &Value| -> usize {
        task["partition"].as_str().unwrap().trim_start_matches('p').parse().unwrap()
    };
    let mut held = Vec::new();
    for task in tasks {
        assert_eq!(task["state"], "completed", "{job}");
        println!("task {}: writers held for {} ms", task["task"], task["held_ms"]);
        if measured {
            let target = stage.servers().find(|server| name(server) == task["target"]).unwrap();
            let sql = "select string_agg(step || ' ' || round(ms::numeric, 1), ', ' order by id) \
                 from walferry.journal";
            println!("    {}", target.psql(&format!("part{}", moved(task)), sql).unwrap());
            held.push(task["held_ms"].as_f64().unwrap());
        }
        for dbname in ["proxy", "second"] {
            assert_eq!(name(stage.live(dbname, moved(task))), task["target"], "{dbname}");
        }
    }
    assert!(held.iter().all(|ms| *ms < BAR_MS), "{held:?}");
    let shown = asked(&address, &["show"]).await;
    let groups = shown["balance"]["nodes"].as_array().unwrap();
    assert!(groups.len() == 4 && groups.iter().all(|node| node["groups"] == halves / 2), "{shown}");

    // One of them is led back, and everything that was written there since comes along.
    let (back, stays) = (moved(&tasks[0]), moved(&tasks[1]));
    cluster(&address, &["rollback", "1", "--tasks", "1"]).await.expect_success();
    load.more().await;
    for dbname in ["proxy", "second"] {
        assert_eq!(name(stage.live(dbname, back)), tasks[0]["source"], "{dbname}");
        assert_eq!(name(stage.live(dbname, stays)), tasks[1]["target"], "{dbname}");
    }
    let puts = load.end().await;
    let mut put = BTreeSet::new();
    for client in &puts {
        let longest = client.longest.as_millis();
        println!("{} put, {} refused, longest {longest} ms", client.answered.len(), client.moved);
        assert_eq!(client.failed, Vec::<String>::new());
        put.extend(client.answered.iter().copied());
    }
    let live = |part: usize| rows(stage.live("proxy", part), part);
    let found: BTreeSet<u64> = (0..partitions()).flat_map(live).collect();
    assert_eq!(put.difference(&found).count(), 0, "of {}", put.len());
    assert_eq!(found.difference(&put).count(), 0, "of {}", found.len());

    // Both ways are current to the last row; then nothing is left of the job.
    let mut stay = run(&["--stay"]);
    for task in &tasks[1..] {
        let ends = [&task["source"], &task["target"]]
            .map(|node| stage.servers().find(|server| name(server) == *node).unwrap());
        let part = moved(task);
        until_within(Duration::from_secs(60), "the old side is not current", || {
            std::future::ready(rows(ends[0], part) == rows(ends[1], part))
        })
        .await;
    }
    stay.signal("INT");
    stay.says("stopped").await;
    stay.ended().await.expect_success();
    cluster(&address, &["finish", "1"]).await.expect_success();
    cluster(&address, &["reset", "1", "--tasks", "1"]).await.expect_success();
    for dbname in ["proxy", "second"] {
        let sql = "select obj_description(oid, 'pg_foreign_server') from pg_foreign_server";
        assert_eq!(stage.proxy.psql(dbname, sql).unwrap(), "of the shop", "{dbname}");
    }
    for server in stage.servers() {
        let sql = "select count(*) from pg_replication_slots";
        assert_eq!(server.psql("postgres", sql).unwrap(), "0");
    }
    let target = stage.servers().find(|server| name(server) == tasks[0]["target"]).unwrap();
    let made = || {
        let sql = format!("select count(*) from pg_database where datname = 'part{back}'");
        target.psql("postgres", &sql).unwrap()
    };
    assert_eq!(made(), "0", "the database made for it is dropped");

    // A node is lost in the middle of a task: what was begun is taken back on the other.
    let (shard, node) = (back.to_string(), name(target));
    asked(&address, &["move", "--shard", &shard, "--to", &node]).await;
    let mut lost = Walferry::spawn(&["cluster", "--cluster", &address, "run", "2"]);
    lost.says("task 1: copying").await;
    lost.kill9().await;
    assert_eq!(made(), "1");
    stage.servers().find(|server| name(server) == tasks[0]["source"]).unwrap().kill9().unwrap();
    let said = refused(&address, &["cancel", "2"]).await;
    assert!(said.contains("is the server running"), "{said}");
    cluster(&address, &["cancel", "2", "--source-is-gone"]).await.expect_success();
    assert_eq!(made(), "0");
    assert_eq!(asked(&address, &["job", "2"]).await["state"], "canceled");
}
