//! Jobs of a cluster that a file describes: run, killed, resumed, watched, undone.

use std::collections::BTreeSet;
use std::time::Duration;

use serde_json::Value;
use walferry::demo::compare::compare;
use walferry::demo::server::Server;
use walferry::id::Stream;
use walferry::job::FlipRequest;
use walferry::job::client::Client;
use walferry::job::cluster::Flip;
use walferry::pg::Config;

use super::load::{Load, kills};
use super::{asked, cluster, refused};
use crate::support::{self, Inventory, Walferry, session, until, until_within};

/// Two nodes, a home for jobs, and on the first node two groups of tables.
struct Stage {
    a: Server,
    b: Server,
    address: String,
}

impl Stage {
    /// Jobs are kept in this database of `a`.
    fn new(rows: u32, home: &str) -> Stage {
        let [a, b] = std::array::from_fn(|_| support::server());
        for server in [&a, &b] {
            server.psql("postgres", "create database app").unwrap();
        }
        if home != "app" {
            a.psql("postgres", &format!("create database {home}")).unwrap();
        }
        for table in ["t_0", "u_0", "t_1"] {
            let sql = format!(
                "create table {table} (id bigint primary key, v text, at timestamptz default now()); \
                 insert into {table} select i, repeat('x', 50) from generate_series(1, {rows}) i; \
                 vacuum analyze {table}"
            );
            for statement in sql.split("; ") {
                a.psql("app", statement).unwrap();
            }
        }
        let path = a.dir().join("nodes.toml");
        let (home, uris) = (a.uri(home), [a.uri("app"), b.uri("app")]);
        let text = format!(
            "home = \"{home}\"\n[[node]]\nname = \"a\"\nuri = \"{}\"\n[[node]]\nname = \"b\"\n\
             uri = \"{}\"\n[[group]]\nnode = \"a\"\ntables = [\"public.t_0\", \"public.u_0\"]\n\
             [[group]]\nnode = \"a\"\ntables = [\"public.t_1\"]\n",
            uris[0], uris[1]
        );
        std::fs::write(&path, text).unwrap();
        let address = format!("file:{}", path.display());
        Stage { a, b, address }
    }

    /// A client of each table.
    fn load(&self) -> Load {
        let client = |table: &str| {
            let uris = vec![self.a.uri("app"), self.b.uri("app")];
            (uris, format!("insert into {table} values ($1, 'put')"))
        };
        Load::start(["t_0", "u_0", "t_1"].map(client).into())
    }

    fn run(&self, more: &[&str]) -> Walferry {
        Walferry::spawn(&[&["cluster", "--cluster", &self.address, "run"], more].concat())
    }

    async fn job(&self, job: &str) -> Value {
        asked(&self.address, &["job", job]).await
    }

    /// Numbers of rows that clients put into a table.
    fn put(&self, server: &Server, table: &str) -> BTreeSet<u64> {
        let sql = format!("select id from {table} where v = 'put'");
        let rows = server.psql("app", &sql).unwrap();
        rows.lines().map(|line| line.parse().unwrap()).collect()
    }
}

fn states(job: &Value) -> Vec<String> {
    let tasks = job["tasks"].as_array().unwrap();
    tasks.iter().map(|task| task["state"].as_str().unwrap().to_string()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_is_killed_resumed_by_the_same_command_completed_and_led_back() {
    let stage = Stage::new(60_000, "app");
    let planned = asked(&stage.address, &["replace", "a", "b", "--dry-run"]).await;
    assert_eq!((&planned["job"], planned["tasks"].as_array().unwrap().len()), (&Value::Null, 2));
    assert_eq!(asked(&stage.address, &["jobs"]).await, serde_json::json!([]));
    let said = refused(&stage.address, &["run", "1"]).await;
    assert!(said.contains("the cluster has no job 1; it has none"), "{said}");
    let planned = asked(&stage.address, &["replace", "a", "b"]).await;
    assert_eq!(planned["job"], 1, "{planned}");
    assert_eq!(states(&stage.job("1").await), ["init", "init"]);
    let load = stage.load();
    load.more().await;

    // Killed in the copy, and again when the first task has been switched.
    let mut run = stage.run(&["1"]);
    run.says("task 1: copying").await;
    run.kill9().await;
    // The server may take a moment to see that its client is gone.
    until("the runner is missed", || async { stage.job("1").await["runner"] == Value::Null }).await;
    let job = stage.job("1").await;
    assert_eq!(states(&job)[0], "running", "{job}");
    let mut run = stage.run(&["1"]);
    run.says("task 1: completed").await;
    let said = refused(&stage.address, &["run", "1"]).await;
    assert!(said.contains("is being run by another process (backend"), "{said}");
    run.kill9().await;
    // And at random moments.
    for wait in kills(3) {
        stage.run(&["1"]).kill9_after(wait).await;
    }
    let ended = stage.run(&["1"]).ended().await.expect_success();
    assert!(ended.out.contains("2 of 2 tasks are completed"), "{ended:?}");
    assert!(ended.err.contains("the group of public.t_1 is on node b now"), "{ended:?}");
    load.more().await;

    let job = stage.job("1").await;
    assert_eq!((states(&job), &job["state"]), (vec!["completed".into(); 2], &"completed".into()));
    assert_eq!(job["processed_bytes"], job["total_bytes"]);
    assert!(job["tasks"][1]["held_ms"].as_f64().unwrap() > 0.0, "{job}");
    let history = job["history"].as_array().unwrap();
    let at = |task: u32, state: &str| {
        let line = history.iter().find(|l| l["task"] == task && l["state"] == state);
        line.unwrap_or_else(|| panic!("{task} {state}: {job}"))["at"].as_str().unwrap().to_string()
    };
    // Each node takes part in one task at a time.
    assert!(at(1, "completed") < at(2, "running"), "{job}");
    let text = cluster(&stage.address, &["job", "1"]).await.expect_success().out;
    assert!(text.contains("2 of 2 tasks") && text.contains("100.0 %"), "{text}");
    let text = cluster(&stage.address, &["jobs"]).await.expect_success().out;
    assert!(text.contains("job 1") && text.contains("replace a b"), "{text}");

    // The log has what was done to either node, with what came of it.
    let log = asked(&stage.address, &["log", "1"]).await;
    let sent = |node: &str, sql: &str| {
        let is = |l: &&Value| {
            let has = |key: &str, text: &str| l[key].as_str().unwrap().contains(text);
            has("node", node) && has("sql", sql)
        };
        log.as_array().unwrap().iter().filter(is).count()
    };
    for (node, sql) in [
        ("source", "CREATE_REPLICATION_SLOT"),
        ("source", "START_REPLICATION"),
        ("source", "copy"),
        ("target", "CREATE TABLE public.t_1"),
        ("source", "create trigger walferry_seal_c1t2_"),
        ("target", "update walferry.job set phase"),
    ] {
        assert!(sent(node, sql) > 0, "{node} {sql}");
    }

    // The first task alone is led back, with what was written since.
    let out = cluster(&stage.address, &["rollback", "1", "--tasks", "1"]).await;
    assert!(out.expect_success().out.contains("task 1 is rolled back"));
    load.more().await;
    let puts = load.end().await;
    assert_eq!(states(&stage.job("1").await), ["canceled", "completed"]);
    // The ways back are current once a run has looked after them.
    let mut run = stage.run(&["1", "--stay"]);
    let tables = [("t_0", &stage.a), ("u_0", &stage.a), ("t_1", &stage.b)];
    for (put, (table, live)) in puts.iter().zip(tables) {
        assert_eq!((&put.failed, put.moved > 0), (&Vec::new(), true), "{table}");
        assert_eq!(stage.put(live, table), put.answered, "{table}");
        assert!(put.answered.len() > 50, "{table}: {}", put.answered.len());
    }
    let (a, b) = (stage.a.uri("app"), stage.b.uri("app"));
    until_within(Duration::from_secs(60), "t_1 on the old node", || {
        let same = stage.put(&stage.a, "t_1") == puts[2].answered;
        std::future::ready(same)
    })
    .await;
    run.signal("INT");
    run.says("stopped; the same command goes on from here").await;
    run.ended().await.expect_success();

    // Taken back, nothing of the first task is left on the target; the second is finished.
    cluster(&stage.address, &["finish", "1", "--tasks", "2"]).await.expect_success();
    cluster(&stage.address, &["reset", "1", "--tasks", "1"]).await.expect_success();
    assert_eq!(states(&stage.job("1").await), ["init", "completed"]);
    for server in [&stage.a, &stage.b] {
        let slots = server.psql("postgres", "select count(*) from pg_replication_slots").unwrap();
        assert_eq!(slots, "0");
    }
    let there = "select string_agg(relname, ' ' order by relname) from pg_class \
         where relkind = 'r' and relnamespace = 'public'::regnamespace";
    assert_eq!(stage.b.psql("app", there).unwrap(), "t_1");
    let ended = stage.run(&["1", "--finish"]).ended().await.expect_success();
    assert!(ended.err.contains("task 1: finished"), "{ended:?}");
    let compared = compare(&a, &b).await.unwrap();
    assert_eq!(compared.differences, Vec::<String>::new());
    assert!(compared.rows() > 180_000);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ddl_in_the_middle_and_a_long_transaction_put_a_task_into_error_and_reset_cleans_up() {
    let stage = Stage::new(2_000, "home");
    let before =
        [Inventory::take(&stage.a.uri("app")).await, Inventory::take(&stage.b.uri("app")).await];
    asked(&stage.address, &["move", "--shard", "1"]).await;
    asked(&stage.address, &["move", "--shard", "3"]).await;
    let mut open = session(&stage.a, "app").await;
    open.execute("begin; insert into public.t_0 values (-1, 'open')").await.unwrap();
    tokio::time::sleep(Duration::from_millis(1100)).await;
    let ended = stage.run(&["1", "--transaction-age", "1s"]).ended().await;
    assert_eq!(ended.code, Some(1));
    let pid = open.process_id();
    assert!(ended.err.contains(&format!("backend {pid} on a a transaction of")), "{}", ended.err);
    assert_eq!(states(&stage.job("1").await), ["error"]);
    open.execute("rollback").await.unwrap();
    cluster(&stage.address, &["reset", "1"]).await.expect_success();

    // A writer that does not end holds the cutover up, and meanwhile somebody makes an index.
    let mut run = stage.run(&["1", "--timeout", "1s", "--tries", "100", "--no-verify"]);
    run.says("task 1: following").await;
    open.execute("begin; insert into public.t_0 values (-1, 'open')").await.unwrap();
    run.says("not switched, trying again").await;
    stage.a.psql("app", "create index on u_0 (v)").unwrap();
    let ended = run.ended().await;
    let said = "public.u_0 is altered: its indexes";
    assert!(ended.code == Some(1) && ended.err.contains(said), "{}", ended.err);
    drop(open);
    let job = stage.job("1").await;
    assert_eq!(states(&job), ["error"]);
    assert!(job["tasks"][0]["error"].as_str().unwrap().contains(said), "{job}");
    // What failed is in the log with its error, by the task that it was sent for.
    let log = asked(&stage.address, &["log", "1", "--task", "1"]).await;
    let failed = log.as_array().unwrap().iter().find(|line| {
        let error = line["error"].as_str().unwrap_or_default();
        error.contains("timeout") && line["node"].as_str().unwrap().starts_with("source")
    });
    let failed = failed.unwrap_or_else(|| panic!("{log}"));
    assert!(failed["sql"].as_str().unwrap().to_lowercase().contains("lock table"), "{failed}");
    assert!(failed["times"].as_u64() > Some(0) && failed["ms"].as_f64() > Some(0.0), "{failed}");
    let none = asked(&stage.address, &["log", "1", "--task", "2"]).await;
    assert_eq!(none, serde_json::json!([]));
    // The other job is not touched by it; a run of the first does nothing.
    let ended = stage.run(&["1"]).ended().await;
    assert_eq!(ended.code, Some(1), "{ended:?}");
    let said = refused(&stage.address, &["reset", "1", "--tasks", "7"]).await;
    assert!(said.contains("has no task 7"), "{said}");
    cluster(&stage.address, &["reset", "1"]).await.expect_success();
    stage.a.psql("app", "drop index u_0_v_idx").unwrap();

    // Canceled in the copy by another process, while its runner lives.
    let mut run = stage.run(&["1"]);
    run.says("task 1: schema").await;
    cluster(&stage.address, &["cancel", "1"]).await.expect_success();
    let ended = run.ended().await;
    assert!(ended.code == Some(1) && ended.err.contains("job 1 of the cluster is canceled"));
    let said = refused(&stage.address, &["run", "1"]).await;
    assert!(said.contains("is canceled; walferry cluster reset 1"), "{said}");
    assert_eq!(states(&stage.job("1").await), ["canceled"]);
    assert_eq!(states(&stage.job("2").await), ["init"]);
    for (server, before) in [&stage.a, &stage.b].into_iter().zip(&before) {
        let after = Inventory::take(&server.uri("app")).await;
        assert_eq!(before.diff(&after), Vec::<String>::new());
    }
    // The second job. The home is lost when it is switched; its way back goes on all the same.
    let mut run = stage.run(&["2", "--stay"]);
    run.says("task 1: completed").await;
    asked(&stage.address, &["move", "--shard", "3"]).await;
    let ended = stage.run(&["3"]).ended().await;
    let said = "the same is moved by task 1 of job 2 (completed, and not finished)";
    assert!(ended.code == Some(1) && ended.err.contains(said), "{ended:?}");
    stage.a.kill9().unwrap();
    stage.a.resume().unwrap();
    run.says("trying again").await;
    stage.b.psql("app", "insert into t_1 values (-1, 'late')").unwrap();
    until_within(Duration::from_secs(60), "the way back does not flow", || {
        let sql = "select count(*) from t_1 where v = 'late'";
        std::future::ready(stage.a.psql("app", sql).is_ok_and(|count| count == "1"))
    })
    .await;
    // A table that is altered between the look at it and the fence keeps its flip from being made.
    let name = stage.job("2").await["tasks"][0]["name"].as_str().unwrap().parse().unwrap();
    let home = Config::parse_with(&stage.b.uri("app"), &|_| None).unwrap();
    let mut client = Client::connect(&home, &name).await.unwrap();
    let request = Flip::default().request(Stream::Reverse, Vec::new());
    let request = FlipRequest { mark: Some("of other days".to_string()), ..request };
    let request = serde_json::to_value(&request).unwrap();
    let refused = client.ask("flip", &request, Duration::from_secs(60)).await.unwrap_err();
    assert!(refused.to_string().contains("a table was altered while"), "{refused}");
    run.signal("INT");
    run.ended().await.expect_success();
    cluster(&stage.address, &["finish", "2"]).await.expect_success();
    let job = stage.job("2").await;
    let states: Vec<&str> = job["history"]
        .as_array()
        .unwrap()
        .iter()
        .map(|line| line["state"].as_str().unwrap())
        .collect();
    assert_eq!(states, ["init", "running", "completed"]);
    assert_eq!(job["tasks"][0]["phase"], "finished");
}

/// Of a table that has nothing to tell its rows by, INSERT alone can be followed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_without_identity_is_refused_or_moves_with_inserts_alone() {
    let stage = Stage::new(500, "home");
    stage.a.psql("app", "alter table t_1 drop constraint t_1_pkey").unwrap();
    stage.a.psql("app", "update t_1 set v = 'once' where id = 1").unwrap();
    stage.a.psql("app", "select pg_stat_force_next_flush()").unwrap();
    let planned = asked(&stage.address, &["move", "--shard", "3"]).await;
    assert_eq!(planned["ready"], false, "{planned}");
    assert!(planned["findings"].to_string().contains("--without-identity insert-only"));
    let ended = stage.run(&["1"]).ended().await;
    assert!(ended.code == Some(1) && ended.err.contains("no replica identity"), "{ended:?}");
    assert_eq!(states(&stage.job("1").await), ["error"]);
    cluster(&stage.address, &["reset", "1"]).await.expect_success();

    let insert_only = ["--without-identity", "insert-only"];
    let planned = [&["move", "--shard", "3", "--dry-run"], &insert_only[..]].concat();
    assert_eq!(asked(&stage.address, &planned).await["ready"], true);
    let uris = vec![stage.a.uri("app"), stage.b.uri("app")];
    let put = "insert into t_1 values ($1, 'put')".to_string();
    let load = Load::start(vec![(uris.clone(), put.clone()), (uris, put)]);
    let mut run = stage.run(&[&["1", "--stay"], &insert_only[..]].concat());
    run.says("task 1: following").await;
    let update = |server: &Server| {
        let done = server.psql("app", "update t_1 set v = 'twice' where id = 1");
        done.map_err(|error| error.to_string())
    };
    let said = update(&stage.a).unwrap_err();
    assert!(said.contains("does not have a replica identity"), "{said}");
    run.says("task 1: completed").await;
    load.more().await;
    let said = update(&stage.b).unwrap_err();
    assert!(said.contains("does not have a replica identity"), "{said}");
    cluster(&stage.address, &["rollback", "1", "--tasks", "1"]).await.expect_success();
    load.more().await;
    let puts = load.end().await;
    let put: BTreeSet<u64> = puts.iter().flat_map(|put| put.answered.clone()).collect();
    for client in &puts {
        assert_eq!((&client.failed, client.moved > 0), (&Vec::new(), true));
    }
    assert_eq!(stage.put(&stage.a, "t_1"), put);
    // Each row once, on both sides.
    until_within(Duration::from_secs(60), "t_1 on the other node", || {
        std::future::ready(stage.put(&stage.b, "t_1") == put)
    })
    .await;
    for server in [&stage.a, &stage.b] {
        let sql = "select count(*) from t_1";
        assert_eq!(server.psql("app", sql).unwrap(), (put.len() + 500).to_string());
    }
    run.signal("INT");
    run.ended().await.expect_success();

    // A job that is just making its tables there keeps them.
    let mut making = session(&stage.b, "app").await;
    making.execute("select pg_advisory_lock_shared(7823, 1)").await.unwrap();
    let finish = Walferry::spawn(&["cluster", "--cluster", &stage.address, "finish", "1"]);
    let slots = "select count(*) from pg_replication_slots";
    until_within(Duration::from_secs(60), "slots are dropped", || {
        std::future::ready(stage.b.psql("app", slots).unwrap() == "0")
    })
    .await;
    making.execute("create table walferry.canary_other (id int)").await.unwrap();
    making.execute("select pg_advisory_unlock_shared(7823, 1)").await.unwrap();
    finish.ended().await.expect_success();
    let there = "select to_regclass('walferry.canary_other') is not null";
    assert_eq!(stage.b.psql("app", there).unwrap(), "t");
    update(&stage.a).unwrap();
}
