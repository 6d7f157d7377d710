//! Sharded clusters: what is shown of them, and what is planned. Citus is not in Debian, so
//! servers with catalogs of its shape stand in for it; plproxy is the real one.

mod beside;
mod double;
mod jobs;
mod load;
mod ranges;
mod reading;

use serde_json::Value;
use walferry::cluster::read::siblings;
use walferry::cluster::{Address, Errand};
use walferry::demo::server::{Server, StopMode};

use crate::support::citus::Citus;
use crate::support::{Ended, Inventory, Walferry};

async fn cluster(address: &str, arguments: &[&str]) -> Ended {
    let with = [&["cluster", "--cluster", address], arguments].concat();
    Walferry::run(&with).await
}

async fn asked(address: &str, arguments: &[&str]) -> Value {
    cluster(address, &[arguments, &["--json"]].concat()).await.expect_success().json()
}

async fn refused(address: &str, arguments: &[&str]) -> String {
    let ended = cluster(address, arguments).await;
    assert!(matches!(ended.code, Some(1 | 2)), "{ended:?}");
    ended.err
}

/// Two co-located tables of 8 shards on two workers, others that stay, and an empty third worker.
fn stage() -> Citus {
    let mut citus = Citus::start(2);
    let first = citus.distribute("tb1", "c1 int primary key, c2 text", 1, 8, &[0, 1]);
    citus.distribute("tb2", "c1 int primary key, c2 int", 1, 8, &[0, 1]);
    citus.distribute("alone", "id int primary key", 2, 2, &[0, 1]);
    // The first shard is larger than all others together.
    let fill = format!(
        "insert into tb1_{} select i, repeat('x', 100) from generate_series(1, 20000) i; \
         vacuum analyze",
        first[0]
    );
    for statement in fill.split("; ") {
        citus.workers[0].psql("postgres", statement).unwrap();
    }
    citus.add_worker();
    citus.everywhere(
        "create table regions (id int primary key); create table log (id int); \
         create table twice (id int); create unlogged table fast (id int); \
         create table own (id int); create extension postgres_fdw; \
         create server far foreign data wrapper postgres_fdw; \
         create foreign table far (id int) server far; \
         insert into pg_dist_partition (logicalrelid, partmethod, colocationid, repmodel) values \
         ('far', 'h', 8, 's'), \
         ('regions', 'n', 3, 't'), ('log', 'a', 0, 'c'), ('twice', 'h', 4, 'c'), \
         ('fast', 'h', 5, 's'), ('own', 'n', 0, 's'); \
         insert into pg_dist_shard values ('regions', 1, 't', null, null), \
         ('twice', 2, 't', '-2147483648', '2147483647'), \
         ('fast', 3, 't', '-2147483648', '2147483647'); \
         insert into pg_dist_placement (shardid, groupid) \
         values (1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (3, 1)",
    );
    citus
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_citus_cluster_is_shown_and_planned_and_nothing_is_changed() {
    let citus = stage();
    let address = citus.address();
    let servers: Vec<&Server> = std::iter::once(&citus.coordinator).chain(&citus.workers).collect();
    let mut before = Vec::new();
    for server in &servers {
        before.push(Inventory::take(&server.uri("postgres")).await);
    }
    let shown = asked(&address, &["show"]).await;
    assert_eq!(shown["kind"], "citus 13.2-1");
    assert_eq!(shown["groups"].as_array().unwrap().len(), 10);
    let tables = |group: &Value| group["shards"].as_array().unwrap().len();
    let large = &shown["groups"][0];
    assert_eq!((tables(large), large["node"].as_str().unwrap()), (2, citus.node(0).as_str()));
    assert_eq!(large["shards"][0]["rows"], 20_000);
    assert!(large["shards"][0]["bytes"].as_u64().unwrap() > 2_000_000, "{large}");
    assert!(large["shards"][0]["load"].as_u64().unwrap() >= 20_000, "{large}");
    let fixed: Vec<(String, String)> = shown["fixed"]
        .as_array()
        .unwrap()
        .iter()
        .map(|f| (f["table"].as_str().unwrap().into(), f["kind"].as_str().unwrap().into()))
        .collect();
    let expected = [
        ("public.far", "foreign"),
        ("public.fast", "unlogged"),
        ("public.log", "append"),
        ("public.own", "local"),
        ("public.regions", "reference"),
        ("public.twice", "replicated"),
    ];
    assert_eq!(fixed, expected.map(|(table, kind)| (table.to_string(), kind.to_string())));

    // 4, 4, 0 of one co-location group and 1, 1, 0 of the other. Two tasks bring 3, 3, 2 of the
    // first, and in sum 4, 4, 2; a third makes that 4, 3, 3.
    let plan = asked(&address, &["rebalance", "--by", "count", "--dry-run"]).await;
    let tasks = plan["tasks"].as_array().unwrap();
    assert_eq!(tasks.len(), 3, "{plan}");
    for task in tasks {
        assert_eq!(task["target"], citus.node(2).as_str());
        assert_eq!(task["shards"].as_array().unwrap().len(), 2, "co-located shards move as one");
    }
    assert!(tasks.iter().all(|t| t["bytes"].as_u64() < large["shards"][0]["bytes"].as_u64()));
    for by in ["size", "load"] {
        let plan =
            asked(&address, &["rebalance", "--by", by, "--threshold", "0", "--dry-run"]).await;
        let deviation = |when: &str| plan[when]["deviation"].as_f64().unwrap();
        assert!(plan["by"] == by && deviation("after") <= deviation("before"), "{plan}");
    }
    let plan = asked(&address, &["drain", &citus.node(0), "--dry-run"]).await;
    assert_eq!(plan["tasks"].as_array().unwrap().len(), 5);
    let empty = plan["after"]["nodes"].as_array().unwrap();
    let of = |node: &str| empty.iter().find(|n| n["node"] == node).unwrap()["groups"].clone();
    assert_eq!(of(&citus.node(0)), 0);
    // What keeps the node from being removed all the same.
    let findings = plan["findings"].as_array().unwrap().iter();
    let kept = findings.filter(|f| f["code"] == "not-emptied" && f["node"] == *citus.node(0));
    let kept: Vec<&str> = kept.map(|f| f["object"].as_str().unwrap()).collect();
    assert_eq!(kept, ["public.fast", "public.twice"]);
    let plan = asked(&address, &["replace", &citus.node(0), &citus.node(2), "--dry-run"]).await;
    let targets = plan["tasks"].as_array().unwrap().iter().map(|t| t["target"].clone());
    assert!(targets.clone().count() == 5 && targets.into_iter().all(|t| t == citus.node(2)));
    let (from, to) = (format!("{},{}", citus.node(0), citus.node(1)), citus.node(2));
    let plan = asked(&address, &["move", "--from", &from, "--to", &to, "--dry-run"]).await;
    assert_eq!(plan["tasks"].as_array().unwrap().len(), 10);
    let plan = asked(&address, &["move", "--shard", "102016", "--to", &to, "--dry-run"]).await;
    assert_eq!(plan["tasks"][0]["shards"], serde_json::json!([102_008, 102_016]));
    let text = cluster(&address, &["rebalance", "--dry-run"]).await.expect_success().out;
    assert!(text.contains("shards 102010, 102018 of public.tb1, public.tb2"), "{text}");
    assert!(text.contains("nothing was moved") && text.contains("not stored"), "{text}");
    for (server, before) in servers.iter().zip(&before) {
        let after = Inventory::take(&server.uri("postgres")).await;
        assert_eq!(before.diff(&after), Vec::<String>::new());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_no_citus_coordinator_or_not_understood_is_refused_by_name() {
    let citus = stage();
    let address = citus.address();
    let said = refused(&address, &["drain", "nobody:5432"]).await;
    assert!(said.contains("no node \"nobody:5432\"; it has 127.0.0.1:"), "{said}");
    let worker = format!("citus:{}", citus.workers[0].uri("postgres"));
    let said = refused(&worker, &["show"]).await;
    assert!(said.contains("this is a worker (group 1): give the coordinator"), "{said}");
    let said = refused(&format!("citus:{}", citus.coordinator.uri("template1")), &["show"]).await;
    assert!(said.contains("this database has no extension citus"), "{said}");
    citus.everywhere("update pg_dist_node set shouldhaveshards = false where nodeid = 3");
    let said = refused(&address, &["replace", &citus.node(0), &citus.node(2)]).await;
    assert!(said.contains("takes no shards") && said.contains("citus_set_node_property"), "{said}");
    citus.workers[0].psql("postgres", "drop table tb1_102008").unwrap();
    let said = refused(&address, &["show"]).await;
    assert!(said.contains("shard 102008 of public.tb1 should be here and is not"), "{said}");
    citus.workers[1].stop(StopMode::Fast).unwrap();
    citus.workers[0].psql("postgres", "create table tb1_102008 (c1 int primary key)").unwrap();
    let said = refused(&address, &["show"]).await;
    assert!(said.contains(&citus.node(1)) && said.contains("is the server running"), "{said}");
    // An older release lacks columns that came later; one that is too old is not guessed at.
    citus.workers[1].resume().unwrap();
    citus.everywhere(
        "alter table pg_dist_node drop column shouldhaveshards, drop column metadatasynced, \
         drop column nodeisclone; alter table pg_dist_partition drop column autoconverted; \
         update pg_extension set extversion = '9.0-2' where extname = 'citus'",
    );
    assert_eq!(asked(&address, &["show"]).await["kind"], "citus 9.0-2");
    citus.everywhere("update pg_extension set extversion = '8.3-1' where extname = 'citus'");
    let said = refused(&address, &["show"]).await;
    assert!(said.contains("citus 8.3-1 is not understood: releases 9 to 13 are"), "{said}");
    let said = refused("ring:x", &["show"]).await;
    assert!(said.contains("a cluster is citus:URI, plproxy:URI,CLUSTER"), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_stands_in_the_way_of_a_plan_is_found_on_every_node() {
    let mut citus = stage();
    citus.distribute("nokey", "id int", 6, 1, &[0]);
    citus.distribute("part", "id int primary key", 7, 2, &[0, 1]);
    let address = citus.address();
    let move_all =
        ["replace", &citus.node(0), &citus.node(2), "--transaction-age", "1s", "--dry-run"];
    let codes = |plan: &Value| -> Vec<String> {
        let findings = plan["findings"].as_array().unwrap().iter();
        let errors = findings.filter(|f| f["level"] == "error");
        errors
            .map(|f| format!("{} {} {}", f["code"], f["object"], f["node"]).replace('"', ""))
            .collect()
    };
    let plan = asked(&address, &move_all).await;
    let shard = plan["tasks"].as_array().unwrap().iter().find(|t| t["colocation"] == 6).unwrap();
    let nokey = format!("no-identity public.nokey_{} {}", shard["shards"][0], citus.node(0));
    assert_eq!(codes(&plan), [nokey]);
    assert_eq!(plan["ready"], false);
    citus.workers[0]
        .psql(
            "postgres",
            &format!("alter table nokey_{} replica identity full", shard["shards"][0]),
        )
        .unwrap();
    assert_eq!(codes(&asked(&address, &move_all).await), Vec::<String>::new());
    // On a node that the plan does not touch, too.
    let mut open = crate::support::session(&citus.workers[1], "postgres").await;
    open.execute("begin; select pg_current_xact_id()").await.unwrap();
    tokio::time::sleep(std::time::Duration::from_millis(1100)).await;
    let plan = asked(&address, &move_all).await;
    let pid = open.process_id();
    assert_eq!(codes(&plan), [format!("long-transaction backend {pid} {}", citus.node(1))]);
    open.execute("prepare transaction 'gone'").await.unwrap();
    tokio::time::sleep(std::time::Duration::from_millis(1100)).await;
    let text = cluster(&address, &move_all).await.expect_success().out;
    assert!(text.contains("prepared transaction gone on") && text.contains("not ready"), "{text}");
    assert!(text.contains("rollback prepared 'gone';"), "{text}");
    open.execute("rollback prepared 'gone'").await.unwrap();
    // A reference table that the target lacks; a table that keeps those co-located with it.
    citus.everywhere(
        "delete from pg_dist_placement where shardid = 1 and groupid = 3; \
         create unlogged table swift (id int); \
         insert into pg_dist_partition (logicalrelid, partmethod, colocationid, repmodel) \
         values ('swift', 'h', 7, 's'); \
         insert into pg_dist_shard values ('swift', 9, 't', '-2147483648', '-1'); \
         insert into pg_dist_placement (shardid, groupid) values (9, 1)",
    );
    let plan = asked(&address, &move_all).await;
    let lacks = format!("no-reference-table public.regions {}", citus.node(2));
    assert_eq!(codes(&plan), [lacks]);
    let tables = plan["tasks"].to_string();
    assert!(tables.contains("public.tb1") && !tables.contains("public.part"), "{tables}");
    let part = plan["findings"].as_array().unwrap().iter().filter(|f| f["object"] == "public.part");
    let said: Vec<_> = part.map(|finding| finding["message"].as_str().unwrap()).collect();
    let joined = "co-located with public.swift, which cannot be moved";
    assert!(said.iter().any(|said| said.contains(joined)), "{said:?}");
    // A table that is distributed beside a group that moves already.
    let group = Errand { shards: vec![102_008, 102_016], ..Errand::default() };
    let place = Address::parse(&address).unwrap();
    assert_eq!(siblings(&place, &group).await.unwrap(), Vec::<String>::new());
    citus.distribute("tb3", "c1 int primary key", 1, 8, &[0, 1]);
    let new = siblings(&place, &group).await.unwrap();
    assert_eq!(new.len(), 1, "{new:?}");
    assert!(new[0].contains("tb3 is co-located with it since (shard "), "{new:?}");
    citus.workers[0].configure(&["wal_level = replica"]).unwrap();
    citus.workers[0].restart(StopMode::Fast).unwrap();
    let plan = asked(&address, &move_all).await;
    let wal_level = format!("wal-level wal_level {}", citus.node(0));
    assert!(codes(&plan).contains(&wal_level), "{plan}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_plproxy_cluster_is_planned_over_servers_that_are_new() {
    let bin = Server::default_bin().unwrap();
    let servers: Vec<Server> = (0..2).map(|_| Server::start(&bin, &[]).unwrap()).collect();
    let (old, new) = (&servers[0], &servers[1]);
    let mut options = Vec::new();
    for part in 0..4 {
        old.psql("postgres", &format!("create database part{part}")).unwrap();
        let rows = format!("create table t as select generate_series(1, {}) i", 1000 * (part + 1));
        old.psql(&format!("part{part}"), &rows).unwrap();
        options.push(format!("p{part} 'dbname=part{part} host=127.0.0.1 port={}'", old.port()));
    }
    old.psql("postgres", "create extension plproxy").unwrap();
    let define = format!(
        "create server shop foreign data wrapper plproxy options (connection_lifetime '1800', {})",
        options.join(", ")
    );
    old.psql("postgres", &define).unwrap();
    let address = format!("plproxy:{},shop", old.uri("postgres"));
    let shown = asked(&address, &["show"]).await;
    assert_eq!(shown["groups"].as_array().unwrap().len(), 4);
    assert_eq!(shown["groups"][3]["shards"][0]["table"], "database part3");
    assert!(shown["groups"][3]["shards"][0]["bytes"].as_u64().unwrap() > 5_000_000);
    let name = |server: &Server| format!("127.0.0.1:{}", server.port());
    let doubled = format!("{address},{}", name(new));
    let plan = asked(&doubled, &["rebalance"]).await;
    assert_eq!(plan["tasks"].as_array().unwrap().len(), 2, "{plan}");
    assert!(plan["after"]["deviation"].as_f64().unwrap() < 0.1);
    let said = refused(&format!("plproxy:{},mall", old.uri("postgres")), &["show"]).await;
    assert!(
        said.contains("there is no server \"mall\"") && said.contains("there is shop"),
        "{said}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_is_read_from_a_file() {
    let bin = Server::default_bin().unwrap();
    let servers: Vec<Server> = (0..2).map(|_| Server::start(&bin, &[]).unwrap()).collect();
    for shard in 0..4 {
        let sql = format!("create table t_{shard} as select generate_series(1, 5000) i");
        servers[0].psql("postgres", &sql).unwrap();
    }
    let path = servers[0].dir().join("nodes.toml");
    let mut text = String::new();
    for (name, server) in ["a", "b"].iter().zip(&servers) {
        let uri = server.uri("postgres");
        text += &format!("[[node]]\nname = \"{name}\"\nuri = \"{uri}\"\n");
    }
    for pair in ["\"public.t_0\", \"public.t_1\"", "\"public.t_2\", \"public.t_3\""] {
        text += &format!("[[group]]\nnode = \"a\"\ntables = [{pair}]\n");
    }
    std::fs::write(&path, &text).unwrap();
    let address = format!("file:{}", path.display());
    let plan = asked(&address, &["rebalance", "--dry-run"]).await;
    assert_eq!(plan["tasks"][0]["tables"].as_array().unwrap().len(), 2);
    assert_eq!(plan["tasks"][0]["target"], "b");
    assert_eq!(plan["tasks"].as_array().unwrap().len(), 1);
    for (from, to, said) in [
        ("node = \"a\"", "node = \"c\"", "there is no [[node]] with name = \"c\""),
        ("public.t_0", "public.none", "there is no table public.none"),
        ("public.t_0", "t_0", "a list of schema.table"),
        ("name = \"b\"", "name = \"a\"", "node \"a\" is there twice"),
        ("tables", "table", "unknown field"),
    ] {
        std::fs::write(&path, text.replacen(from, to, 1)).unwrap();
        let found = refused(&address, &["show"]).await;
        assert!(found.contains(said), "{said}: {found}");
    }
}
