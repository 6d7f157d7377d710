//! The same route against servers that have catalogs of Citus's shape and not Citus: a client that
//! finds its shard as Citus would stands in for it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use walferry::demo::server::Server;
use walferry::id::{QualifiedName, Stream};
use walferry::pg::{Config, Purpose, Session};
use walferry::route::{Context, Route};

use super::Move;
use crate::support;
use crate::support::citus::Citus;

/// Two co-located tables of two shards on the first worker, one of them with a key to a reference
/// table; the second worker is empty.
pub(super) struct Stage {
    pub(super) citus: Citus,
    /// Of the first group: one of `orders`, one of `items`.
    pub(super) shards: [u64; 2],
}

/// The reference table's only shard.
pub(super) const REGIONS: u64 = 55;

impl Stage {
    pub(super) fn new() -> Stage {
        let mut citus = Citus::start(2);
        citus.everywhere(&format!(
            "create table regions (id int primary key); \
             insert into pg_dist_partition (logicalrelid, partmethod, colocationid, repmodel) \
             values ('regions', 'n', 9, 't'); \
             insert into pg_dist_shard values ('regions', {REGIONS}, 't', null, null); \
             insert into pg_dist_placement (shardid, groupid) values ({REGIONS}, 1), ({REGIONS}, 2)"
        ));
        for worker in &citus.workers {
            let sql = format!(
                "create table regions_{REGIONS} (id int primary key); \
                 insert into regions_{REGIONS} select generate_series(1, 9)"
            );
            worker.psql("postgres", &sql).unwrap();
        }
        let orders = citus.distribute("orders", "id bigint primary key, region int", 1, 2, &[0]);
        let items = citus.distribute("items", "id bigint primary key, what text", 1, 2, &[0]);
        citus.everywhere("alter table orders add foreign key (region) references regions");
        for shard in &orders {
            let key = format!(
                "alter table orders_{shard} add foreign key (region) references regions_{REGIONS}"
            );
            citus.workers[0].psql("postgres", &key).unwrap();
        }
        Stage { citus, shards: [orders[0], items[0]] }
    }

    fn relations(&self) -> Vec<String> {
        vec![
            format!("public.orders_{}", self.shards[0]),
            format!("public.items_{}", self.shards[1]),
        ]
    }

    fn route(&self) -> String {
        format!("citus:{}", self.citus.uri())
    }

    fn job(&self) -> Move {
        let [source, target] = [0, 1].map(|worker| &self.citus.workers[worker]);
        Move::new("plain", source, target, &self.route(), &self.relations())
    }

    fn context(&self, flip: Stream) -> Context {
        let config = |worker: usize| {
            let uri = self.citus.workers[worker].uri("postgres");
            Config::parse_with(&uri, &|_| None).unwrap()
        };
        let name = |relation: &String| {
            let (schema, name) = relation.split_once('.').unwrap();
            QualifiedName::new(schema, name)
        };
        Context {
            job: "plain".parse().unwrap(),
            flip,
            source: config(0),
            target: config(1),
            scope: "these".to_string(),
            tables: self.relations().iter().map(name).collect(),
            reads: false,
            is_group: false,
        }
    }

    fn servers(&self) -> impl Iterator<Item = &Server> {
        std::iter::once(&self.citus.coordinator).chain(&self.citus.workers)
    }

    /// Group of the moving shards, by every node.
    pub(super) fn placed(&self) -> String {
        let all: Vec<String> = self.servers().map(Citus::placements).collect();
        assert!(all.iter().all(|placements| *placements == all[0]), "{all:?}");
        let of = |shard: u64| {
            let mut words = all[0].split(' ');
            let word = words.find(|word| word.starts_with(&format!("{shard}:"))).unwrap();
            word.split_once(':').unwrap().1.to_string()
        };
        assert_eq!(of(self.shards[0]), of(self.shards[1]));
        of(self.shards[0])
    }

    /// How many of the three nodes have a transaction of ours prepared.
    pub(super) fn prepared(&self) -> usize {
        let sql = "select count(*) from pg_prepared_xacts where gid like 'walferry\\_%'";
        self.servers().filter(|server| server.psql("postgres", sql).unwrap() == "1").count()
    }
}

/// A client that writes to `orders` as Citus does: under the shared lock, wherever the placement
/// says.
pub(super) struct Load {
    stop: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
    task: tokio::task::JoinHandle<(Vec<u64>, Vec<String>, Duration)>,
}

impl Load {
    pub(super) fn start(stage: &Stage, number: u64) -> Load {
        let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let nodes = stage.servers().map(|server| server.uri("postgres")).collect();
        let task = tokio::spawn(put(nodes, number, stage.shards[0], stop.clone(), done.clone()));
        Load { stop, done, task }
    }

    pub(super) async fn more(&self) {
        let due = self.done.load(Ordering::SeqCst) + 30;
        support::until("clients go on", async || self.done.load(Ordering::SeqCst) >= due).await;
    }

    /// Ids that were acknowledged, and the longest wait.
    pub(super) async fn end(self) -> (Vec<u64>, Duration) {
        self.stop.store(true, Ordering::SeqCst);
        let (ids, errors, longest) = self.task.await.unwrap();
        assert_eq!(errors, Vec::<String>::new());
        (ids, longest)
    }
}

async fn put(
    nodes: Vec<String>,
    number: u64,
    shard: u64,
    stop: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
) -> (Vec<u64>, Vec<String>, Duration) {
    let mut sessions = Vec::new();
    for uri in nodes {
        let config = Config::parse_with(&uri, &|_| None).unwrap();
        sessions.push(Session::connect(&config, Purpose::Sql).await.unwrap());
    }
    let (mut ids, mut errors, mut longest) = (Vec::new(), Vec::new(), Duration::ZERO);
    for id in number * 1_000_000.. {
        if stop.load(Ordering::SeqCst) {
            break;
        }
        let begun = Instant::now();
        match once(&mut sessions, shard, id).await {
            Ok(()) => {
                ids.push(id);
                done.fetch_add(1, Ordering::SeqCst);
            }
            Err(error) => errors.push(error.to_string()),
        }
        longest = longest.max(begun.elapsed());
        tokio::time::sleep(Duration::from_millis(3)).await;
    }
    (ids, errors, longest)
}

async fn once(sessions: &mut [Session], shard: u64, id: u64) -> walferry::pg::Result<()> {
    let lock = format!("begin; select lock_shard_metadata(5, array[{shard}]::bigint[])");
    sessions[0].query(&lock).await?;
    let sql = format!("select groupid from pg_dist_placement where shardid = {shard}");
    let group: usize = sessions[0].query(&sql).await?[0].parse(0)?;
    let insert = format!("insert into public.orders_{shard} values ({id}, {})", 1 + id % 9);
    sessions[group].execute(&insert).await?;
    sessions[0].execute("commit").await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_goes_there_and_back_and_an_open_transaction_holds_up_the_switch_alone() {
    let stage = Stage::new();
    let (job, orders) = (stage.job(), stage.relations().remove(0));
    let load = Load::start(&stage, 1);
    for (value, said) in [("on", "citus.enable_change_data_capture is on"), ("off", "")] {
        let worker = &stage.citus.workers[1];
        worker.configure(&[&format!("citus.enable_change_data_capture = {value}")]).unwrap();
        worker.reload().unwrap();
        let mut session = support::session(worker, "postgres").await;
        let sql =
            format!("select current_setting('citus.enable_change_data_capture', true) = '{value}'");
        support::until_sql(&mut session, &sql).await;
        if value == "on" {
            for command in ["run", "check"] {
                let refused = job.command(&[command]).await;
                assert!(refused.err.contains(said), "{refused:?}");
            }
        }
    }
    // Given up, it leaves the target as it was found; shards would be in the way there.
    let run = job.follow().await;
    let canceled = job.done(&["cancel"]).await;
    assert!(canceled.out.contains("dropped table public.orders_"), "{canceled:?}");
    run.ended().await.expect_success();
    let left = format!("select to_regclass('{orders}')");
    assert_eq!(stage.citus.workers[1].psql("postgres", &left).unwrap(), "");
    // What is turned on later is seen as soon as the stream is opened again.
    let run = job.follow().await;
    let source = &stage.citus.workers[0];
    for value in ["on", "off"] {
        source.configure(&[&format!("citus.enable_change_data_capture = {value}")]).unwrap();
        source.reload().unwrap();
        if value == "on" {
            let cut = "select count(pg_terminate_backend(pid)) from pg_stat_replication";
            source.psql("postgres", cut).unwrap();
            support::until("the run has stopped", async || {
                let said = job.status().await["error"].as_str().unwrap_or_default().to_string();
                said.contains("citus.enable_change_data_capture is on")
            })
            .await;
        }
    }
    assert_eq!(run.ended().await.code, Some(1));
    let run = job.follow().await;
    let keys = format!(
        "select count(*) from pg_constraint where conrelid = '{orders}'::regclass \
         and contype = 'f' and convalidated"
    );
    let keys = |worker: usize| stage.citus.workers[worker].psql("postgres", &keys).unwrap();
    assert_eq!((keys(0).as_str(), keys(1).as_str()), ("1", "0"), "made at the switch");

    // Somebody forgets to commit: nothing is switched, and nobody else waits for long.
    let open = support::session(&stage.citus.coordinator, "postgres").await;
    let mut open = open;
    let lock =
        format!("begin; select lock_shard_metadata(5, array[{}]::bigint[])", stage.shards[0]);
    open.query(&lock).await.unwrap();
    let begun = Instant::now();
    let waiting = job.spawn(&["cutover", "--lock-timeout", "100ms", "--timeout", "20s"]);
    while begun.elapsed() < Duration::from_secs(2) {
        load.more().await;
    }
    assert_eq!(stage.placed(), "1");
    open.execute("commit").await.unwrap();
    waiting.ended().await.expect_success();
    assert_eq!((stage.placed().as_str(), stage.prepared()), ("2", 0));
    let (ids, longest) = load.end().await;
    assert!(longest < Duration::from_secs(1), "{longest:?}");

    let load = Load::start(&stage, 2);
    load.more().await;
    job.done(&["verify"]).await;
    support::until("the key is validated", async || keys(1) == "1").await;
    // What stays behind does not act on the reference table, whose rows the cluster deletes on all
    // nodes at once.
    let delete = format!("begin; delete from regions_{REGIONS} where id = 5; rollback");
    stage.citus.workers[0].psql("postgres", &delete).unwrap();
    let error = stage.citus.workers[1].psql("postgres", &delete).unwrap_err().to_string();
    assert!(error.contains("violates foreign key"), "{error}");
    job.done(&["rollback"]).await;
    assert_eq!(stage.placed(), "1");
    load.more().await;
    job.done(&["verify"]).await;
    stage.citus.workers[1].psql("postgres", &delete).unwrap();
    let error = stage.citus.workers[0].psql("postgres", &delete).unwrap_err().to_string();
    assert!(error.contains("violates foreign key"), "{error}");
    job.done(&["cutover"]).await;
    load.more().await;
    let (more, _) = load.end().await;
    job.done(&["verify"]).await;
    let count = stage.citus.workers[1].psql("postgres", &format!("select count(*) from {orders}"));
    assert_eq!(count.unwrap(), (ids.len() + more.len()).to_string());
    job.done(&["finish"]).await;
    run.ended().await.expect_success();
    assert_eq!((stage.placed().as_str(), stage.prepared()), ("2", 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_dies_between_the_steps_all_nodes_agree_afterwards() {
    let stage = Stage::new();
    let [forward, reverse] = [Stream::Forward, Stream::Reverse].map(|flip| stage.context(flip));
    let route = || Route::parse(&stage.route()).unwrap();
    let held = async |route: &Route, context: &Context| {
        route.check(context).await.unwrap();
        route.hold(context, Duration::from_secs(1)).await.unwrap();
    };
    // Held and let go again, held again: as in a try that could not stop its writers.
    let one = route();
    held(&one, &forward).await;
    one.release(&forward).await.unwrap();
    one.hold(&forward, Duration::from_secs(1)).await.unwrap();
    one.switch(&forward).await.unwrap();
    one.switch(&forward).await.unwrap();
    assert_eq!((stage.prepared(), stage.placed().as_str()), (3, "1"));
    // The process dies here; another one undoes it, twice.
    drop(one);
    for _ in 0..2 {
        route().undo(&forward).await.unwrap();
        assert_eq!((stage.prepared(), stage.placed().as_str()), (0, "1"));
    }
    // Nor does a session that is still at work outlive the undoing.
    let one = route();
    held(&one, &forward).await;
    route().undo(&forward).await.unwrap();
    assert!(one.switch(&forward).await.is_err());
    assert_eq!((stage.prepared(), stage.placed().as_str()), (0, "1"));
    // Past the point of no return another process ends it, with a node that was killed meanwhile.
    let one = route();
    held(&one, &forward).await;
    one.switch(&forward).await.unwrap();
    drop(one);
    stage.citus.workers[0].kill9().unwrap();
    assert!(route().release(&forward).await.is_err());
    stage.citus.workers[0].resume().unwrap();
    for _ in 0..2 {
        route().release(&forward).await.unwrap();
        assert_eq!((stage.prepared(), stage.placed().as_str()), (0, "2"));
    }
    // And back.
    let one = route();
    held(&one, &reverse).await;
    one.switch(&reverse).await.unwrap();
    one.release(&reverse).await.unwrap();
    assert_eq!((stage.prepared(), stage.placed().as_str()), (0, "1"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_not_one_whole_group_on_its_node_is_refused_by_name() {
    let stage = Stage::new();
    let refused = async |context: &Context| {
        let route = Route::parse(&stage.route()).unwrap();
        route.check(context).await.unwrap_err().to_string()
    };
    let whole = stage.context(Stream::Forward);
    let [orders, items] = stage.shards;
    let mut part = whole.clone();
    part.tables.pop();
    let said = refused(&part).await;
    assert!(said.contains(&format!("shards {items} of public.items are co-located")), "{said}");
    let mut other = whole.clone();
    other.tables.push(QualifiedName::new("public", format!("orders_{}", orders + 1)));
    let said = refused(&other).await;
    assert!(said.contains("are not of one group of co-located shards"), "{said}");
    other.tables = vec![QualifiedName::new("public", "regions_1")];
    let said = refused(&other).await;
    assert!(said.contains("public.regions_1 is no shard that this cluster knows"), "{said}");
    let said = refused(&stage.context(Stream::Reverse)).await;
    assert!(said.contains("is placed on [1], and the job has it on the node of group 2"), "{said}");
    stage.citus.everywhere("update pg_dist_node set shouldhaveshards = false where groupid = 2");
    let said = refused(&whole).await;
    assert!(said.contains("takes no shards: it is marked so"), "{said}");
    stage.citus.everywhere("update pg_dist_node set shouldhaveshards = true where groupid = 2");
    let swap = format!("update pg_dist_placement set groupid = 2 where shardid = {orders}");
    stage.citus.workers[1].psql("postgres", &swap).unwrap();
    let said = refused(&whole).await;
    assert!(said.contains("has 1 of the 2 shards on group 1"), "{said}");
    stage.citus.workers[1].psql("postgres", &swap.replace("= 2 ", "= 1 ")).unwrap();
    stage.citus.everywhere(
        "create role app login; grant select on pg_dist_node, pg_dist_partition, pg_dist_shard, \
         pg_dist_placement, pg_dist_local_group to app",
    );
    let route = format!("citus:{}", stage.citus.coordinator.uri_as("app", "postgres"));
    let said = Route::parse(&route).unwrap().check(&whole).await.unwrap_err().to_string();
    assert!(said.contains("give the route a superuser's URI"), "{said}");
    // Metadata on the coordinator alone, and no function for its locks: an older release.
    stage.citus.everywhere(
        "update pg_dist_node set hasmetadata = false; \
         drop function pg_catalog.lock_shard_metadata(int, bigint[])",
    );
    let route = Route::parse(&stage.route()).unwrap();
    route.check(&whole).await.unwrap();
    route.hold(&whole, Duration::from_secs(1)).await.unwrap();
    let mut other = support::session(&stage.citus.coordinator, "postgres").await;
    other.query("select * from public.orders").await.unwrap();
    other.execute("set lock_timeout = '50ms'").await.unwrap();
    let error = other.execute("delete from public.orders").await.unwrap_err();
    assert_eq!(error.code(), Some("55P03"));
    route.switch(&whole).await.unwrap();
    route.release(&whole).await.unwrap();
    let placements = Citus::placements(&stage.citus.coordinator);
    assert!(placements.contains(&format!("{orders}:2")), "{placements}");
    assert!(Citus::placements(&stage.citus.workers[0]).contains(&format!("{orders}:1")));
}
