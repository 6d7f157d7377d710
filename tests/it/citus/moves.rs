//! One group there and back again.

use std::time::{Duration, Instant};

use walferry::demo::server::Server;

use super::{Cluster, Load, Move};
use crate::support::{self, Walferry};

/// Clients of the coordinator and of every worker.
fn uris(cluster: &Cluster) -> Vec<String> {
    cluster.servers().map(|server| server.uri("postgres")).collect()
}

/// What a node's catalogs say of the group's relations, but for what is of one server only.
fn described(cluster: &Cluster, port: u16, shards: &[String]) -> String {
    let list: Vec<String> = shards.iter().map(|shard| format!("'{shard}'")).collect();
    let sql = format!(
        "set citus.override_table_visibility = off; \
         with t as (select to_regclass(n)::oid as oid, n from unnest(array[{}]) n) \
         select string_agg(d, e'\\n' order by d) from ( \
         select n || ' ' || attname || ' ' || format_type(atttypid, atttypmod) || attnotnull \
            || attidentity::text || coalesce(pg_get_expr(adbin, adrelid), '') as d from t \
            join pg_attribute a on attrelid = t.oid and attnum > 0 and not attisdropped \
            left join pg_attrdef f on f.adrelid = t.oid and f.adnum = a.attnum \
         union all select n || ' ' || conname || pg_get_constraintdef(c.oid) || convalidated \
            from t join pg_constraint c on conrelid = t.oid \
         union all select n || ' ' || pg_get_indexdef(indexrelid) || indisreplident \
            from t join pg_index on indrelid = t.oid \
         union all select n || ' ' || relreplident::text || coalesce(relacl::text, '') \
            || pg_get_userbyid(relowner) || coalesce(obj_description(t.oid, 'pg_class'), '') \
            || coalesce(pg_get_expr(relpartbound, t.oid), '') from t \
            join pg_class c on c.oid = t.oid \
         union all select n || ' ' || pg_get_triggerdef(g.oid) || tgenabled::text from t \
            join pg_trigger g on tgrelid = t.oid and not tgisinternal \
            and tgname not like 'walferry%' \
         union all select n || ' part of ' || inhparent::regclass::text \
            from t join pg_inherits on inhrelid = t.oid) q",
        list.join(", ")
    );
    cluster.worker(port).psql("postgres", &sql).unwrap()
}

/// Of a cutover, as it is by default.
const LOCK_TIMEOUT: Duration = Duration::from_millis(200);

/// A cutover that meets a transaction which is left open on the moving shards: it gives up, and
/// names it. Gives when that was.
async fn behind_an_open_transaction(
    cluster: &Cluster,
    job: &Move,
    shards: &[String],
) -> (Instant, Instant) {
    let moving: Vec<&str> = shards.iter().filter_map(|s| s.rsplit('_').next()).collect();
    // A row that no client writes.
    let id = cluster.sql(&format!(
        "select min(i) from generate_series(1001, 2000) i \
         where get_shard_id_for_distribution_column('accounts', i) in ({})",
        moving.join(", ")
    ));
    let mut open = support::session(&cluster.coordinator, "postgres").await;
    open.execute(&format!("begin; insert into public.accounts values ({id}, 1)")).await.unwrap();
    let pid = open.process_id();
    tokio::time::sleep(LOCK_TIMEOUT * 2).await;
    let from = Instant::now();
    let ended = job.command(&["cutover", "--timeout", "3s"]).await;
    assert!(ended.code == Some(1) && ended.err.contains(&format!("pid {pid} ")), "{ended:?}");
    open.execute("rollback").await.unwrap();
    (from, Instant::now())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_goes_there_and_back_under_writers_on_every_node() {
    let Some(cluster) = Cluster::start(3) else { return };
    let cluster = cluster.with_tables();
    let (port, shards) = cluster.groups().remove(0);
    let target = cluster.workers.iter().find(|worker| worker.port() != port).unwrap();
    let before = described(&cluster, port, &shards);
    assert!(before.contains("REFERENCES") && before.contains("part of"), "{before}");
    assert!(cluster.major < 11 || before.contains("EXECUTE FUNCTION stamp()"), "{before}");
    let first = cluster.placements();
    let load = Load::start(&uris(&cluster), Duration::from_millis(2));
    load.more(100).await;
    let job = Move::new("walk", cluster.worker(port), target, &cluster.route(), &shards);
    let run = job.follow().await;
    job.done(&["cutover", "--dry-run"]).await;
    assert_eq!(cluster.placements(), first);
    load.more(100).await;
    let waited = behind_an_open_transaction(&cluster, &job, &shards).await;
    assert_eq!(cluster.placements(), first);
    job.done(&["cutover"]).await;
    let moved = cluster.placements();
    assert_ne!(moved, first);
    assert_eq!(cluster.groups().iter().find(|(_, s)| *s == shards).unwrap().0, target.port());
    load.more(200).await;
    job.done(&["verify"]).await;
    support::until("keys are validated", async || {
        described(&cluster, target.port(), &shards) == before
    })
    .await;
    job.done(&["rollback"]).await;
    assert_eq!(cluster.placements(), first);
    load.more(200).await;
    job.done(&["verify"]).await;
    job.done(&["cutover"]).await;
    load.more(200).await;
    let seen = load.end().await;
    assert_eq!(seen.errors, Vec::<String>::new());
    let longest = seen.longest(waited.0, waited.1);
    println!("beside a transaction that was left open, the longest write took {longest:?}");
    assert!(longest < LOCK_TIMEOUT + Duration::from_secs(1), "{longest:?}");
    job.done(&["verify"]).await;
    assert_eq!(cluster.audit(), seen.acknowledged);
    assert_eq!((cluster.placements(), cluster.prepared().as_str()), (moved, ""));
    job.done(&["finish"]).await;
    run.ended().await.expect_success();
    assert_eq!(cluster.audit(), seen.acknowledged);
    // Citus itself finds the cluster as it wants it.
    cluster.sql("update accounts set note = 'x' where id = 1");
    cluster.sql("alter table orders add column extra int");
    cluster.sql("delete from regions where id = 77");
    // Numbers go on where they were, and triggers act.
    let inserted = cluster.sql(
        "with i as (insert into tickets (account) select i from generate_series(1, 600) i \
         returning what) select count(*) || ' ' || count(*) filter (where what = 'stamped') from i",
    );
    assert_eq!(inserted, if cluster.major < 11 { "600 0" } else { "600 600" });
    let twice = "select count(*) - count(distinct no) from tickets";
    assert_eq!(cluster.sql(twice), "0");
}

/// `walferry cluster` of this cluster.
async fn asked(cluster: &Cluster, words: &[&str]) -> serde_json::Value {
    let route = cluster.route();
    let given = [&["cluster", "--cluster", &route, "--json"], words].concat();
    Walferry::run(&given).await.expect_success().json()
}

/// Plans, runs and finishes a job.
async fn run(cluster: &Cluster, plan: &[&str]) {
    let planned = asked(cluster, plan).await;
    assert_eq!(planned["ready"], true, "{planned}");
    let job = planned["job"].to_string();
    asked(cluster, &["run", &job]).await;
    asked(cluster, &["finish", &job]).await;
}

/// How many groups each worker has.
fn counts(cluster: &Cluster) -> Vec<usize> {
    let groups = cluster.groups();
    let of = |worker: &Server| groups.iter().filter(|(port, _)| *port == worker.port()).count();
    cluster.workers.iter().map(of).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_grows_is_drained_and_a_node_replaced_under_writers() {
    let Some(cluster) = Cluster::start(2) else { return };
    let mut cluster = cluster.with_tables();
    assert_eq!(counts(&cluster), [3, 3]);
    let load = Load::start(&uris(&cluster), Duration::from_millis(5));
    cluster.add_worker();
    cluster.replicate_reference_tables();
    let node =
        |cluster: &Cluster, worker: usize| format!("127.0.0.1:{}", cluster.workers[worker].port());
    run(&cluster, &["rebalance", "--by", "count"]).await;
    assert_eq!(counts(&cluster), [2, 2, 2]);
    load.more(50).await;
    run(&cluster, &["drain", &node(&cluster, 0)]).await;
    assert_eq!(counts(&cluster), [0, 3, 3]);
    run(&cluster, &["replace", &node(&cluster, 1), &node(&cluster, 0)]).await;
    assert_eq!(counts(&cluster), [3, 0, 3]);
    load.more(50).await;
    let seen = load.end().await;
    assert_eq!(seen.errors, Vec::<String>::new());
    assert_eq!(cluster.audit(), seen.acknowledged);
    cluster.placements();
    assert_eq!(cluster.prepared(), "");
    let kept = asked(&cluster, &["recycle", "list"]).await;
    let dropped = asked(&cluster, &["recycle", "empty"]).await;
    assert_eq!(dropped.as_array().unwrap(), kept["recycled"].as_array().unwrap());
    let (_, shards) = cluster.groups().remove(0);
    assert_eq!(dropped.as_array().unwrap().len(), 7 * shards.len(), "{dropped}");
    // Nothing is in the way of Citus's own moves of the same shards, which 9 does not offer.
    if cluster.major > 9 {
        let drain = "select citus_drain_node('127.0.0.1', PORT, 'block_writes')";
        cluster.sql(&drain.replace("PORT", &cluster.workers[2].port().to_string()));
    }
    assert_eq!(cluster.audit(), seen.acknowledged);
}
