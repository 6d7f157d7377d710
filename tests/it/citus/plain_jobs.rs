//! Jobs of a cluster of plain servers with catalogs of Citus's shape: the flows that real Citus is
//! led through where there is one.

use serde_json::Value;

use super::plain::{Load, REGIONS, Stage};
use crate::support::citus::Citus;
use crate::support::{self, Walferry};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_of_the_cluster_moves_its_groups_and_old_shards_are_kept_restored_and_emptied() {
    let mut stage = Stage::new();
    let address = stage.citus.address();
    let asked = async |words: &[&str]| {
        let given = [&["cluster", "--cluster", &address, "--json"], words].concat();
        Walferry::run(&given).await.expect_success().json()
    };
    let load = Load::start(&stage, 1);
    load.more().await;
    let planned = asked(&["drain", &stage.citus.node(0)]).await;
    assert_eq!(planned["tasks"].as_array().unwrap().len(), 2, "{planned}");
    asked(&["run", "1"]).await;
    assert_eq!(stage.placed(), "2");
    load.more().await;
    // The log has what was sent to routers, too.
    let log = asked(&["log", "1"]).await;
    let coordinator = format!(":{}/", stage.citus.coordinator.port());
    let swaps = log.as_array().unwrap().iter().filter(|line| {
        let sql = line["sql"].as_str().unwrap();
        sql.contains("prepare transaction")
            && line["node"].as_str().unwrap().contains(&coordinator)
            && line["error"] == Value::Null
    });
    assert_eq!(swaps.count(), 2, "{log}");
    let kept = asked(&["recycle", "list"]).await;
    assert_eq!(kept["current"].as_array().unwrap().len(), 2, "{kept}");
    assert_eq!(kept["recycled"].as_array().unwrap().len(), 0, "{kept}");
    asked(&["recycle", "restore", "1"]).await;
    assert_eq!(stage.placed(), "1");
    load.more().await;
    asked(&["finish", "1", "--tasks", "1,2"]).await;
    let (ids, _) = load.end().await;
    let count = format!("select count(*) from orders_{}", stage.shards[0]);
    let count = stage.citus.workers[0].psql("postgres", &count).unwrap();
    assert_eq!(count, ids.len().to_string());
    // Of the task that was led back, the copy on the new node; of the other, what was left.
    let kept = asked(&["recycle", "list", "--job", "1"]).await;
    let nodes: Vec<&str> =
        kept["recycled"].as_array().unwrap().iter().map(|k| k["node"].as_str().unwrap()).collect();
    let [old, new] = [stage.citus.node(0), stage.citus.node(1)];
    let of = |node: &str| nodes.iter().filter(|on| **on == node).count();
    assert_eq!((of(&old), of(&new), nodes.len()), (2, 2, 4), "{kept}");
    let none = asked(&["recycle", "empty", "--older", "7d"]).await;
    assert_eq!(none.as_array().unwrap().len(), 0, "{none}");
    let eight = "update walferry_recycle_1.contents set recycled_at = now() - interval '8 days' \
         where name like 'items%'";
    stage.citus.workers[1].psql("postgres", eight).unwrap();
    let other = asked(&["recycle", "empty", "--job", "2", "--older", "7d"]).await;
    assert_eq!(other.as_array().unwrap().len(), 0, "{other}");
    let aged = asked(&["recycle", "empty", "--older", "7d"]).await;
    assert_eq!(aged.as_array().unwrap().len(), 1, "{aged}");
    assert!(aged[0]["node"] == new.as_str() && aged[0]["name"].to_string().contains("items"));
    let dropped = asked(&["recycle", "empty", "--job", "1"]).await;
    assert_eq!(dropped.as_array().unwrap().len(), 3, "{dropped}");
    for worker in &stage.citus.workers {
        let left = "select count(*) from pg_namespace where nspname like 'walferry%'";
        assert_eq!(worker.psql("postgres", left).unwrap(), "0");
    }
    let said = [&["cluster", "--cluster", &address], &["recycle", "restore", "2"][..]].concat();
    let said = Walferry::run(&said).await;
    assert!(said.err.contains("no job has a task 2 whose old shards"), "{said:?}");

    // A node is added, gets everything, and is relieved of half of it.
    stage.citus.add_worker();
    let regions = format!(
        "create table regions_{REGIONS} (id int primary key); \
         insert into regions_{REGIONS} select generate_series(1, 9)"
    );
    stage.citus.workers[2].psql("postgres", &regions).unwrap();
    let placed = format!("insert into pg_dist_placement (shardid, groupid) values ({REGIONS}, 3)");
    stage.citus.everywhere(&placed);
    let load = Load::start(&stage, 2);
    let (from, to) = (format!("{old},{new}"), stage.citus.node(2));
    let groups = |shown: &Value| -> Vec<u64> {
        let nodes = shown["balance"]["nodes"].as_array().unwrap().iter();
        let mut groups: Vec<u64> = nodes.map(|node| node["groups"].as_u64().unwrap()).collect();
        groups.sort_unstable();
        groups
    };
    for (plan, after) in [
        (&["move", "--from", &from, "--to", &to][..], [0, 0, 2]),
        (&["rebalance", "--by", "count"], [0, 1, 1]),
    ] {
        let planned = asked(plan).await;
        assert_eq!(planned["ready"], true, "{planned}");
        let job = planned["job"].to_string();
        asked(&["run", &job, "--per-node", "2", "--finish"]).await;
        assert_eq!(groups(&asked(&["show"]).await), after, "{plan:?}");
        load.more().await;
    }
    let (more, _) = load.end().await;
    let placements = Citus::placements(&stage.citus.coordinator);
    let group = placements.split(' ').find_map(|word| {
        word.strip_prefix(&format!("{}:", stage.shards[0]))?.parse::<usize>().ok()
    });
    let count = format!("select count(*) from orders_{}", stage.shards[0]);
    let count = stage.citus.workers[group.unwrap() - 1].psql("postgres", &count).unwrap();
    assert_eq!((count, stage.prepared()), ((ids.len() + more.len()).to_string(), 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_comes_to_a_group_in_the_middle_keeps_it_where_it_is_until_planned_anew() {
    let mut stage = Stage::new();
    let address = stage.citus.address();
    let spawn = |words: &[&str]| {
        Walferry::spawn(&[&["cluster", "--cluster", &address, "--json"], words].concat())
    };
    let shard = stage.shards[0].to_string();
    let plan = ["move", "--shard", &*shard];
    spawn(&plan).ended().await.expect_success();
    let mut open = support::session(&stage.citus.coordinator, "postgres").await;
    let lock = format!("begin; select lock_shard_metadata(5, array[{shard}]::bigint[])");
    open.query(&lock).await.unwrap();
    let mut run = spawn(&["run", "1", "--timeout", "1s", "--tries", "50", "--no-verify"]);
    run.says("not switched, trying again").await;
    stage.citus.distribute("late", "id bigint primary key", 1, 2, &[0]);
    let ended = run.ended().await;
    let said = "late is co-located with it since (shard ";
    assert!(ended.code == Some(1) && ended.err.contains(said), "{ended:?}");
    open.execute("rollback").await.unwrap();
    // No reset gives the task what it lacks, and nothing is made for it in vain.
    spawn(&["reset", "1"]).ended().await.expect_success();
    let ended = spawn(&["run", "1"]).ended().await;
    assert!(ended.code == Some(1) && ended.err.contains("plan a new job"), "{ended:?}");
    assert!(!ended.err.contains("has it begin again"), "{ended:?}");
    let job = spawn(&["job", "1"]).ended().await.expect_success().json();
    assert_eq!((&job["state"], &job["tasks"][0]["phase"]), (&"error".into(), &Value::Null));
    spawn(&["cancel", "1"]).ended().await.expect_success();
    let planned = spawn(&plan).ended().await.expect_success().json();
    assert_eq!(planned["tasks"][0]["tables"].as_array().unwrap().len(), 3, "{planned}");
    spawn(&["run", "2", "--finish"]).ended().await.expect_success();
    assert_eq!((stage.placed().as_str(), stage.prepared()), ("2", 0));
}
