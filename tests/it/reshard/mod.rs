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
    async fn until_ready(&self, run: &mut Walferry) {
        let mut said = String::new();
        for _ in 0..60 {
            assert!(!run.has_ended(), "the run ended: {}", run.so_far());
            let ended = self.walferry(&["cutover", "--dry-run"]).await;
            if ended.code == Some(0) {
                return;
            }
            said = ended.err;
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        panic!("no cutover could be made: {said}\n{}\n{}", self.status().await, run.so_far());
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

    /// Every row of all sources, under writers: equal, and what is not is named.
    async fn compares(&self) {
        let equal = self.walferry(&["--json", "verify"]).await;
        if equal.code != Some(0) {
            panic!("{equal:?}: {}", self.status().await);
        }
        let equal = equal.json();
        let rows: u64 = (equal["targets"].as_array().unwrap().iter())
            .flat_map(|target| target["tables"].as_array().unwrap())
            .map(|table| table["rows"].as_u64().unwrap())
            .sum();
        assert!(equal["equal"] == true && rows > 10_000, "{rows}: {equal}");
        let (first, second) = (&self.targets[0], &self.targets[1]);
        let newest = first.psql("app", "select max(id) from customer").unwrap();
        let was = format!("select name from customer where id = {newest}");
        let was = first.psql("app", &was).unwrap();
        let rename =
            |name: &str| format!("update customer set name = '{name}' where id = {newest}");
        second.psql("app", "insert into tag values ('alien', 1)").unwrap();
        first.psql("app", &rename("another")).unwrap();
        let found = self.walferry(&["verify"]).await;
        assert_eq!(found.code, Some(1), "{found:?}");
        for part in [
            "target 2: public.tag: 0 rows missing, 1 too many, 0 different",
            "key=alien",
            "target 1: public.customer: 0 rows missing, 0 too many, 1 different",
            "not equal",
        ] {
            assert!(found.out.contains(part), "{part}: {found:?}");
        }
        second.psql("app", "delete from tag where key = 'alien'").unwrap();
        first.psql("app", &rename(&was)).unwrap();
        self.walferry(&["verify"]).await.expect_success();
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
    // Drawn from on the target already, further than on any source.
    stage.targets[2].psql("app", "select setval('ticket', 50000)").unwrap();
    // A refusal leaves the runner at work.
    let refused = stage.walferry(&["finish"]).await;
    assert!(refused.code == Some(1) && refused.err.contains("use cutover first"), "{refused:?}");
    let refused = stage.walferry(&["cutover"]).await;
    assert!(refused.code == Some(2) && refused.err.contains("--one-way"), "{refused:?}");
    stage.targets[1].kill9().unwrap();
    load.more().await;
    stage.targets[1].resume().unwrap();
    load.more().await;
    stage.until_ready(&mut run).await;
    stage.compares().await;
    let held = stage.cut_over(run, None).await;
    let stalls = load.end().await;
    println!("writers held for {held:.0} ms; longest statement {stalls:?}");
    stage.assert_exact();
    for (target, past) in stage.targets.iter().zip([900, 900, 50_000]) {
        let next = target.psql("app", "select nextval('ticket')").unwrap();
        assert!(next.parse::<i64>().unwrap() > past, "{next}");
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
    for beside in [
        "[[map]]\ntable = \"public.tag\"\nto = \"public.tags\"",
        "ddl = \"apply\"",
        "on-row-error = \"quarantine\"",
        "after-failover = \"refill\"",
        "decode-from = \"postgres://nowhere/app\"",
        "standby = [\"postgres://nowhere/app\"]",
    ] {
        // Keys of the file come before its tables.
        let (keys, tables) = if beside.starts_with('[') { ("", beside) } else { (beside, "") };
        stage.say(&format!("{keys}\n{TOML}\n{tables}\n"));
        let ended = stage.walferry(&["check"]).await;
        let word = beside.trim_start_matches("[[").split([' ', ']']).next().unwrap();
        let named = ended.err.contains(word) && ended.err.contains("does not go together");
        assert!(ended.code == Some(2) && named, "{beside}: {ended:?}");
    }
    let parted = "create table parted (id int, n int, primary key (id)) partition by range (id); \
        create table parted_1 partition of parted for values from (0) to (9)";
    stage.sources[0].psql("app", parted).unwrap();
    let body = "[[shard]]\ntable = \"public.parted\"\ncolumn = \"id\"\nby = \"mod\"\n";
    refused(body, &["table public.parted is partitioned, which cannot be shared out"]).await;
    stage.sources[0].psql("app", "drop table parted").unwrap();
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

/// Keys that change and long values that do not: told beforehand, then by name; DDL beside.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shard_key_that_changes_beside_a_long_value_is_told_by_name() {
    let stage = Stage::start(1, 2, 0);
    let table = "create table note (id int primary key, v text); \
        alter table note alter v set storage external; \
        insert into note select i, repeat(md5(i::text), 100) from generate_series(1, 20) i";
    stage.sources[0].psql("app", table).unwrap();
    let others = "\"public.c*\", \"public.orders\", \"public.place\", \"public.tag\", \
        \"public.stays\", \"public.loose\", \"public.heavy\"";
    stage.say(&format!(
        "exclude = [{others}]\n\
         [[shard]]\ntable = \"public.note\"\ncolumn = \"id\"\nby = \"mod\"\n"
    ));
    let checked = stage.walferry(&["check"]).await.expect_success();
    assert!(checked.out.contains("\"note\" REPLICA IDENTITY FULL"), "{checked:?}");
    let mut run = stage.spawn(&["run"]);
    stage.until_following(&mut run).await;
    // To the same target, it does not matter.
    stage.sources[0].psql("app", "update note set id = 102 where id = 2").unwrap();
    stage.sources[0].psql("app", "update note set id = 103 where id = 2 + 2").unwrap();
    let ended = run.ended().await;
    assert_eq!(ended.code, Some(1), "{ended:?}");
    for part in ["public.note does not carry", "replica identity full"] {
        assert!(ended.err.contains(part), "{part}: {ended:?}");
    }
    stage.walferry(&["cancel"]).await.expect_success();
    for target in &stage.targets {
        target.psql("app", "drop schema public cascade").unwrap();
        target.psql("app", "create schema public").unwrap();
    }
    // As it is advised.
    stage.sources[0].psql("app", "alter table note replica identity full").unwrap();
    let mut run = stage.spawn(&["run"]);
    stage.until_following(&mut run).await;
    stage.sources[0].psql("app", "update note set id = 205 where id = 6").unwrap();
    stage.until_ready(&mut run).await;
    stage.walferry(&["verify"]).await.expect_success();
    let there = "select count(*) from note where id = 205 and length(v) = 3200";
    assert_eq!(stage.targets[1].psql("app", there).unwrap(), "1");
    // No policy goes beside it: what does not fit stops, and says so.
    stage.sources[0].psql("app", "alter table note add extra int default 1").unwrap();
    stage.sources[0].psql("app", "insert into note values (301, 'x', 2)").unwrap();
    let ended = run.ended().await;
    assert!(ended.code == Some(1) && ended.err.contains("extra"), "{ended:?}");
    assert!(ended.err.contains("public.note"), "{ended:?}");
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
