//! A table hashed into partitions behind a router: groups of them move one after the other, each
//! fenced and switched alone, under writers of all of them. WALFERRY_RANGES says how many partitions
//! (8192 for the promise), WALFERRY_GROUPS how many groups.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use walferry::demo::server::{Server, StopMode};

use super::load::Load;
use super::{asked, cluster};
use crate::support;

/// Rows of each partition when it begins.
const ROWS: usize = 20;

/// What is asked for by a variable.
fn number(name: &str, default: usize) -> usize {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// Two nodes with plain tables, and a router whose partitions are foreign tables, with a foreign
/// server for each group.
struct Stage {
    nodes: [Server; 2],
    router: Server,
    partitions: usize,
    groups: usize,
}

impl Stage {
    fn new(partitions: usize, groups: usize) -> Stage {
        let nodes: [Server; 2] = std::array::from_fn(|_| support::server());
        let router = support::server();
        for server in nodes.iter().chain([&router]) {
            let settings = ["max_locks_per_transaction = 1024", "max_connections = 200"];
            server.configure(&settings).unwrap();
            server.restart(StopMode::Fast).unwrap();
            server.psql("postgres", "create database app").unwrap();
        }
        nodes[0].psql("postgres", "create database home").unwrap();
        let stage = Stage { nodes, router, partitions, groups };
        let [a, _] = &stage.nodes;
        let tables = format!(
            "do $$ begin for i in 0 .. {} loop execute format('create table part_%s \
             (id bigint primary key, v int)', i); end loop; end $$",
            partitions - 1
        );
        a.psql("app", &tables).unwrap();
        stage.router.psql("app", "create extension postgres_fdw").unwrap();
        for group in 0..groups {
            for sql in [
                format!(
                    "create server g{group} foreign data wrapper postgres_fdw options \
                     (host '127.0.0.1', port '{}', dbname 'app')",
                    a.port()
                ),
                format!("create user mapping for public server g{group} options (user 'postgres')"),
            ] {
                stage.router.psql("app", &sql).unwrap();
            }
        }
        let foreign = format!(
            "create table t (id bigint, v int) partition by hash (id); \
             do $$ begin for i in 0 .. {} loop execute format('create foreign table part_%s \
             partition of t for values with (modulus {partitions}, remainder %s) server g%s \
             options (schema_name ''public'')', i, i, i * {groups} / {partitions}); \
             end loop; end $$",
            partitions - 1
        );
        stage.router.psql("app", &foreign).unwrap();
        let rows = partitions * ROWS;
        let fill = format!("insert into t select -i, 0 from generate_series(1, {rows}) i");
        stage.router.psql("app", &fill).unwrap();
        a.psql("app", "vacuum analyze").unwrap();
        stage
    }

    /// The cluster as a file has it: everything on one node, in so many groups.
    fn address(&self, name: &str, on: &str, groups: usize) -> String {
        let [a, b] = &self.nodes;
        let mut text = format!(
            "home = \"{}\"\n[[node]]\nname = \"a\"\nuri = \"{}\"\n[[node]]\nname = \"b\"\n\
             uri = \"{}\"\n",
            a.uri("home"),
            a.uri("app"),
            b.uri("app")
        );
        let (partitions, routes) = (self.partitions / groups, self.groups / groups);
        for group in 0..groups {
            let tables: Vec<String> = (group * partitions..(group + 1) * partitions)
                .map(|i| format!("\"public.part_{i}\""))
                .collect();
            let routes: Vec<String> = (group * routes..(group + 1) * routes)
                .map(|i| format!("\"fdw:{},g{i}\"", self.router.uri("app")))
                .collect();
            text.push_str(&format!(
                "[[group]]\nnode = \"{on}\"\ntables = [{}]\nroute = [{}]\n",
                tables.join(", "),
                routes.join(", ")
            ));
        }
        let path = a.dir().join(format!("{name}.toml"));
        std::fs::write(&path, text).unwrap();
        format!("file:{}", path.display())
    }

    /// Moves everything; gives the time from the beginning of the run to its end.
    async fn moved(&self, address: &str, from: &str, to: &str) -> Duration {
        let planned = asked(address, &["replace", from, to]).await;
        let job = planned["job"].to_string();
        let begun = Instant::now();
        cluster(address, &["run", &job, "--finish"]).await.expect_success();
        let took = begun.elapsed();
        let shown = asked(address, &["job", &job]).await;
        let held = shown["tasks"].as_array().unwrap().iter().filter_map(|t| t["held_ms"].as_f64());
        println!("held for {:.1} ms at most", held.fold(0.0, f64::max));
        took
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn groups_of_partitions_are_switched_one_after_the_other_under_writers_of_all() {
    let (partitions, groups) = (number("WALFERRY_RANGES", 32), number("WALFERRY_GROUPS", 4));
    let stage = Stage::new(partitions, groups);
    let insert = "insert into public.t values ($1, 1)".to_string();
    let client = || (vec![stage.router.uri("app")], insert.clone());
    let load = Load::start(vec![client(), client(), client()]);
    load.more().await;
    let one_by_one = stage.moved(&stage.address("groups", "a", groups), "a", "b").await;
    let seen = load.end().await;
    let (mut put, mut longest) = (BTreeSet::new(), Duration::ZERO);
    for client in &seen {
        assert_eq!(client.failed, Vec::<String>::new());
        put.extend(client.answered.iter().copied());
        longest = longest.max(client.longest);
    }
    let found = stage.router.psql("app", "select id from t where id > 0").unwrap();
    let found: BTreeSet<u64> = found.lines().map(|id| id.parse().unwrap()).collect();
    assert_eq!(put, found);
    for group in 0..groups {
        let sql = format!(
            "select option_value from pg_foreign_server, pg_options_to_table(srvoptions) \
             where srvname = 'g{group}' and option_name = 'port'"
        );
        let port = stage.router.psql("app", &sql).unwrap();
        assert_eq!(port, stage.nodes[1].port().to_string());
    }
    if std::env::var("WALFERRY_RANGES").is_ok() {
        // The old tables of a listed cluster stay where they are.
        let drop = "do $$ declare t text; begin for t in select tablename from pg_tables \
             where schemaname = 'public' loop execute 'drop table public.' || t; end loop; end $$";
        stage.nodes[0].psql("app", drop).unwrap();
        let at_once = stage.moved(&stage.address("bulk", "b", 1), "b", "a").await;
        let times = one_by_one.as_secs_f64() / at_once.as_secs_f64();
        println!(
            "{partitions} partitions in {groups} groups {one_by_one:?}, at once {at_once:?}: \
             {times:.2} times"
        );
    }
    println!("longest statement, of {} rows put: {longest:?}", put.len());
}
