//! What somebody alters or adds while a group moves.

use super::Cluster;
use crate::support::{self, Walferry};

fn spawn(cluster: &Cluster, words: &[&str]) -> Walferry {
    let route = cluster.route();
    Walferry::spawn(&[&["cluster", "--cluster", &route, "--json"], words].concat())
}

/// Plans a job that moves the group of this shard; gives the job's number.
async fn planned(cluster: &Cluster, shard: &str) -> String {
    let planned = spawn(cluster, &["move", "--shard", shard]).ended().await;
    planned.expect_success().json()["job"].to_string()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_altered_or_comes_to_a_group_in_the_middle_keeps_it_where_it_is() {
    let Some(cluster) = Cluster::start(2) else { return };
    let cluster = cluster.with_tables();
    let (port, shards) = cluster.groups().remove(0);
    let shard = shards[0].rsplit('_').next().unwrap();
    // Whoever writes has this lock; it holds the switch up, and no slot.
    let mut open = support::session(&cluster.coordinator, "postgres").await;
    for (ddl, said) in [
        ("alter table events add column extra int", " is altered: its columns"),
        (
            "create table events_03 partition of events \
             for values from ('2026-03-01') to ('2026-04-01')",
            "events_03 is co-located with it since (shard ",
        ),
        (
            "create table tags (account bigint primary key, tag text); \
             select create_distributed_table('tags', 'account', colocate_with => 'accounts')",
            "tags is co-located with it since (shard ",
        ),
    ] {
        let job = planned(&cluster, shard).await;
        let lock = format!("begin; select lock_shard_metadata(5, array[{shard}]::bigint[])");
        open.query(&lock).await.unwrap();
        let words = ["run", &job, "--timeout", "1s", "--tries", "50", "--no-verify"];
        let mut run = spawn(&cluster, &words);
        run.says("not switched, trying again").await;
        cluster.sql(ddl);
        let ended = run.ended().await;
        assert!(ended.code == Some(1) && ended.err.contains(said), "{ddl}: {ended:?}");
        open.execute("rollback").await.unwrap();
        // Another run of what lacks a table does not even begin to make anything.
        if said.contains("co-located") {
            spawn(&cluster, &["reset", &job]).ended().await.expect_success();
            let ended = spawn(&cluster, &["run", &job]).ended().await;
            assert!(ended.code == Some(1) && ended.err.contains(said), "{ddl}: {ended:?}");
            assert!(!ended.err.contains("task 1: schema"), "{}", ended.err);
        }
        spawn(&cluster, &["cancel", &job]).ended().await.expect_success();
        if said.contains("events_03") {
            cluster.sql("alter table events_03 replica identity full");
        }
        assert_eq!(cluster.groups()[0].0, port, "{ddl}");
    }
    let job = planned(&cluster, shard).await;
    spawn(&cluster, &["run", &job, "--finish"]).ended().await.expect_success();
    let (now, moved) = cluster.groups().remove(0);
    assert!(now != port && moved.len() == shards.len() + 2, "{moved:?}");
    cluster.placements();
    assert_eq!((cluster.audit(), cluster.prepared().as_str()), (0, ""));
}
