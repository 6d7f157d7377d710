//! Several sources led to several targets: each row in exactly one, the right, target.

mod hashes;
mod load;

use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;
use walferry::demo::server::Server;

use crate::support::{Ended, Walferry};
use load::{Load, place_of};

pub(super) const TABLES: &str = "create table customer (id bigint primary key, name text, n int); \
    create table orders (customer_id bigint references customer on delete cascade, id int, v text, \
        primary key (customer_id, id)); create index on orders (v); \
    create table tag (key text primary key, v int); \
    create table heavy (id int primary key, n int, v text); \
    alter table heavy replica identity full; alter table heavy alter v set storage external; \
    create table place (region text, id int, v int, primary key (region, id)); \
    create table loose (id int primary key, k int, v text); \
    alter table loose replica identity full; \
    create table country (code text primary key, name text); \
    create table stays (id int); create sequence ticket";

const TOML: &str = "reference = [\"public.country\"]\nexclude = [\"public.stays\"]\n\
    [[shard]]\ntable = \"public.customer\"\ncolumn = \"id\"\nby = \"citus\"\n\
    [[shard]]\ntable = \"public.orders\"\ncolumn = \"customer_id\"\nby = \"citus\"\n\
    [[shard]]\ntable = \"public.tag\"\ncolumn = \"key\"\nby = \"hashtext-mod\"\n\
    [[shard]]\ntable = \"public.heavy\"\ncolumn = \"id\"\nby = \"mod\"\n\
    [[shard]]\ntable = \"public.place\"\ncolumn = \"region\"\nby = \"lookup\"\n\
    lookup = { eu = 2, us = 3 }\notherwise = 1\n\
    [[shard]]\ntable = \"public.loose\"\ncolumn = \"k\"\nby = \"citus\"\n";

/// Sources with rows, empty targets, and the file that says what goes where.
struct Stage {
    sources: Vec<Server>,
    targets: Vec<Server>,
    toml: PathBuf,
}

impl Stage {
    fn start(sources: usize, targets: usize, rows: u32) -> Stage {
        let bin = Server::default_bin().unwrap();
        let settings = ["max_replication_slots = 30", "max_wal_senders = 30"];
        let start = |_| Server::start(&bin, &settings).unwrap();
        let sources: Vec<Server> = (0..sources).map(start).collect();
        let targets: Vec<Server> = (0..targets).map(start).collect();
        for server in sources.iter().chain(&targets) {
            server.psql("postgres", "create database app").unwrap();
        }
        for (place, source) in sources.iter().enumerate() {
            source.psql("app", TABLES).unwrap();
            source.psql("app", &load::first_rows(place, sources.len(), rows)).unwrap();
        }
        let toml = sources[0].dir().join("reshard.toml");
        let stage = Stage { sources, targets, toml };
        stage.say(TOML);
        stage
    }

    /// What goes where.
    fn say(&self, body: &str) {
        let uris = |servers: &[Server]| {
            servers.iter().map(|s| format!("\"{}\"", s.uri("app"))).collect::<Vec<_>>().join(", ")
        };
        let (from, to) = (uris(&self.sources), uris(&self.targets));
        let text = format!("sources = [{from}]\ntargets = [{to}]\n{body}");
        std::fs::write(&self.toml, text).unwrap();
    }

    fn spawn(&self, arguments: &[&str]) -> Walferry {
        Walferry::spawn(&[&["reshard", "-c", self.toml.to_str().unwrap()], arguments].concat())
    }

    async fn walferry(&self, arguments: &[&str]) -> Ended {
        self.spawn(arguments).ended().await
    }

    async fn status(&self) -> Value {
        self.walferry(&["--json", "status"]).await.json_if_done()
    }

    /// Waits until every pair is following.
    async fn until_following(&self, run: &mut Walferry) {
        let count = self.sources.len() * self.targets.len();
        let mut status = Value::Null;
        for _ in 0..400 {
            status = self.status().await;
            let pairs = status["pairs"].as_array().cloned().unwrap_or_default();
            if pairs.len() == count && pairs.iter().all(|pair| pair["phase"] == "following") {
                return;
            }
            assert!(!run.has_ended(), "the run ended: {status}\n{}", run.so_far());
            tokio::time::sleep(Duration::from_millis(250)).await;
        }
        panic!("not following: {status}\n{}", run.so_far());
    }

    /// Each row is on exactly one target, the right one; reference tables are on all.
    fn assert_exact(&self) {
        let rows = |server: &Server, sql: &str| -> Vec<String> {
            let sql = format!("select r::text from ({sql}) r");
            server.psql("app", &sql).unwrap().lines().map(str::to_string).collect()
        };
        for (table, place) in place_of(self.targets.len()) {
            let columns = if table == "heavy" { "id, n, md5(v)" } else { "*" };
            let mut all = 0;
            for (number, target) in self.targets.iter().enumerate() {
                let due = format!("select {columns} from {table} where {place} = {number}");
                let mut due: Vec<String> =
                    self.sources.iter().flat_map(|source| rows(source, &due)).collect();
                let there = format!("select {columns} from {table} where {}", load::before(table));
                let mut there = rows(target, &there);
                due.sort();
                there.sort();
                let (one, other) = (due.len(), there.len());
                let odd = due.iter().find(|row| !there.contains(row));
                let alien = there.iter().find(|row| !due.contains(row));
                assert!(
                    due == there,
                    "{table} on {number}: {one} due, {other} there, {odd:?} {alien:?}"
                );
                all += due.len();
            }
            assert!(all > 100, "{table}: {all} rows prove nothing");
        }
        let due = rows(&self.sources[0], "select * from country order by 1");
        for target in &self.targets {
            assert_eq!(rows(target, "select * from country order by 1"), due);
            let indexes = target.psql(
                "app",
                "select count(*) from pg_indexes \
                where schemaname = 'public' and tablename = 'orders'",
            );
            assert_eq!(indexes.unwrap(), "2");
        }
    }

    /// Waits until a cutover could be made: the streams of a target that was away have caught up.
    async fn until_ready(&self) {
        let mut said = String::new();
        for _ in 0..60 {
            let ended = self.walferry(&["cutover", "--dry-run"]).await;
            if ended.code == Some(0) {
                return;
            }
            said = ended.err;
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        panic!("no cutover could be made: {said}\n{}", self.status().await);
    }

    /// A cutover, again where it was cut short: in the first one the runner is killed, and a target
    /// if one is named. Gives how long writers were held, in milliseconds.
    async fn cut_over(&self, run: Walferry, target: Option<usize>) -> f64 {
        let mut run = Some(run);
        for _ in 0..10 {
            let first = self.spawn(&["--json", "cutover", "--one-way"]);
            if let Some(run) = run.take() {
                tokio::time::sleep(Duration::from_millis(fastrand::u64(20..500))).await;
                run.kill9().await;
                if let Some(target) = target {
                    self.targets[target].kill9().unwrap();
                    self.targets[target].resume().unwrap();
                }
                if fastrand::bool() {
                    // Whoever asked as well, which may be the runner by now.
                    first.kill9().await;
                    continue;
                }
            }
            let ended = first.ended().await;
            if ended.code == Some(0) {
                return ended.json()["fenced_ms"].as_f64().unwrap();
            }
            let status = self.status().await;
            if status["stage"] == "switched" {
                // The pairs may not know yet.
                self.walferry(&["run"]).await.expect_success();
                return status["flip"]["held_ms"].as_f64().unwrap();
            }
            println!("not switched: {}", ended.err.lines().last().unwrap_or_default());
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        panic!("no cutover: {}", self.status().await);
    }

    fn ends_clean(&self) {
        for server in self.sources.iter().chain(&self.targets) {
            let sql = "select (select count(*) from pg_replication_slots), \
                (select count(*) from pg_publication), to_regnamespace('walferry') is null, \
                (select count(*) from pg_trigger where tgname like 'walferry%')";
            assert_eq!(server.psql("app", sql).unwrap(), "0|0|t|0");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_sources_go_to_three_targets_under_writers_and_kills() {
    let stage = Stage::start(2, 3, 3000);
    let checked = stage.walferry(&["check"]).await.expect_success();
    assert!(checked.out.contains("ready"), "{checked:?}");
    let load = Load::start(&stage.sources, &stage.targets);
    let mut run = stage.spawn(&["run"]);
    run.says("copying").await;
    run.kill9().await;
    let mut run = stage.spawn(&["run"]);
    stage.until_following(&mut run).await;
    let refused = stage.walferry(&["finish"]).await;
    assert!(refused.code == Some(1) && refused.err.contains("use cutover first"), "{refused:?}");
    let refused = stage.walferry(&["cutover"]).await;
    assert!(refused.code == Some(2) && refused.err.contains("--one-way"), "{refused:?}");
    stage.targets[1].kill9().unwrap();
    load.more().await;
    stage.targets[1].resume().unwrap();
    load.more().await;
    stage.until_ready().await;
    let held = stage.cut_over(run, None).await;
    let stalls = load.end().await;
    println!("writers held for {held:.0} ms; longest statement {stalls:?}");
    stage.assert_exact();
    for target in &stage.targets {
        let next = target.psql("app", "select nextval('ticket')").unwrap();
        assert!(next.parse::<i64>().unwrap() > 900, "{next}");
    }
    stage.walferry(&["finish"]).await.expect_success();
    stage.ends_clean();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_shared_out_is_named_and_cancel_leaves_nothing() {
    let stage = Stage::start(2, 2, 300);
    let refused = async |body: &str, words: &[&str]| {
        stage.say(body);
        let ended = stage.walferry(&["check"]).await;
        assert_eq!(ended.code, Some(1), "{ended:?}");
        for word in words {
            assert!(ended.err.contains(word), "{word}: {ended:?}");
        }
    };
    refused(TOML, &["there is no target 3: they are 1 to 2"]).await;
    stage.sources[1].psql("app", "alter table tag drop constraint tag_pkey").unwrap();
    let torn = "[[shard]]\ntable = \"public.customer\"\ncolumn = \"id\"\nby = \"citus\"\n\
        [[shard]]\ntable = \"public.orders\"\ncolumn = \"id\"\nby = \"mod\"\n\
        [[shard]]\ntable = \"public.tag\"\ncolumn = \"key\"\nby = \"hashtext-mod\"\n\
        [[shard]]\ntable = \"public.gone\"\ncolumn = \"id\"\nby = \"mod\"\n";
    let words = [
        "foreign key \"orders_customer_id_fkey\" of public.orders leads to rows of public.customer",
        "nothing says where rows of public.heavy on source 1 go",
        "table public.tag has no key",
        "source 2 has no table public.gone",
    ];
    refused(torn, &words).await;

    stage.say(
        "exclude = [\"public.c*\", \"public.orders\", \"public.place\", \
         \"public.tag\", \"public.stays\", \"public.loose\"]\n\
         [[shard]]\ntable = \"public.heavy\"\ncolumn = \"id\"\nby = \"citus\"\nbounds = [1000000]\n",
    );
    let mut run = stage.spawn(&["run"]);
    stage.until_following(&mut run).await;
    let again = stage.walferry(&["run"]).await;
    assert!(again.code == Some(1) && again.err.contains("being run by another"), "{again:?}");
    stage.sources[1].psql("app", "truncate heavy").unwrap();
    let ended = run.ended().await;
    assert!(ended.code == Some(1) && ended.err.contains("TRUNCATE of table public.heavy"));
    let count = |server: &Server| server.psql("app", "select count(*) from heavy").unwrap();
    let there = stage.targets.iter().map(|target| count(target).parse::<u32>().unwrap());
    assert_eq!(there.sum::<u32>(), 600, "no row of the other source went");
    let canceled = stage.walferry(&["cancel"]).await.expect_success();
    assert!(canceled.out.contains("Tables that were made on targets are still there"));
    stage.ends_clean();
    let unknown = stage.walferry(&["status"]).await;
    assert!(unknown.err.contains("knows of no reshard main"), "{unknown:?}");
    let full = stage.walferry(&["run"]).await;
    assert!(full.code == Some(1) && full.err.contains("table public.heavy has rows"), "{full:?}");
    stage.walferry(&["cancel"]).await.expect_success();
    stage.ends_clean();
}

/// `make n-to-m`. WALFERRY_STALLS=1: fails where writers were held for longer than the bar.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes minutes"]
async fn three_sources_go_to_five_targets_with_kills_in_every_phase() {
    let stage = Stage::start(3, 5, 5000);
    let load = Load::start(&stage.sources, &stage.targets);
    let mut kills = 0;
    for (said, target) in
        [("making tables on target 3", 1), ("copying", 0), ("catching_up", 4), ("following", 2)]
    {
        for down_first in [true, false] {
            let mut run = stage.spawn(&["run"]);
            if kills == 0 || said != "making tables on target 3" {
                tokio::select! {
                    () = run.says(said) => {}
                    // Some phases were passed before the last kill.
                    () = tokio::time::sleep(Duration::from_secs(10)) => {}
                }
            }
            if down_first {
                stage.targets[target].kill9().unwrap();
                tokio::time::sleep(Duration::from_millis(fastrand::u64(0..700))).await;
                stage.targets[target].resume().unwrap();
            }
            run.kill9().await;
            kills += 1;
            load.more().await;
        }
    }
    let mut run = stage.spawn(&["run"]);
    stage.until_following(&mut run).await;
    stage.targets[3].kill9().unwrap();
    load.more().await;
    stage.targets[3].resume().unwrap();
    load.more().await;
    let held = stage.cut_over(run, Some(fastrand::usize(0..5))).await;
    let stalls = load.end().await;
    println!("{kills} kills before; held for {held:.0} ms; longest statements {stalls:?}");
    stage.assert_exact();
    stage.walferry(&["finish"]).await.expect_success();
    stage.ends_clean();
    assert!(std::env::var("WALFERRY_STALLS").is_err() || held < 300.0, "held for {held} ms");
}
