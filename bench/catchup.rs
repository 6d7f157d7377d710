//! Time to apply a backlog, beside a native subscription on the same servers.
//!
//! `cargo bench --bench catchup -- SCENARIO [ROUNDS] [SCALE]`. A backlog is written once behind one
//! slot for each run; each run gets a copy of the empty target and is timed from its start until
//! the backlog's last row is there. Runs take turns. Scenarios: pgbench, insert, hot, delete, full,
//! toast, large (one transaction). Ways: rows, auto, sets, native; and `memory`, where the stream was decoded before the
//! clock starts.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a bench")]

use std::collections::VecDeque;
use std::process::Command;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use walferry::apply::{self, Applied, Applier, Mode, ProgressKind};
use walferry::buffer::memory;
use walferry::change::{Change, Feed, Item};
use walferry::demo::server::Server;
use walferry::limit;
use walferry::lsn::Lsn;
use walferry::pg::{Config, Purpose, Session};
use walferry::source::{self, Positions, Recorded, Stream, StreamOptions};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

struct Scenario {
    ddl: &'static str,
    /// `:n` is the scale.
    fill: &'static str,
    load: Load,
    tables: &'static [&'static str],
}

enum Load {
    Pgbench,
    Sql(&'static str),
    Script(&'static str),
}

fn scenario(name: &str) -> Scenario {
    let keyed = "create table t (id int primary key, v text, n int); \
                 create table mark (id int primary key)";
    let filled = "insert into t select i, md5(i::text), 0 from generate_series(1, :n) i";
    match name {
        "pgbench" => Scenario {
            ddl: "create table mark (id int primary key)",
            fill: "select 1",
            load: Load::Pgbench,
            tables: &["pgbench_accounts", "pgbench_branches", "pgbench_tellers", "pgbench_history"],
        },
        "insert" => Scenario {
            ddl: keyed,
            fill: "select 1",
            load: Load::Sql(
                "do $$ begin for k in 0..(:n / 100 - 1) loop insert into t select i, \
                 md5(i::text), 0 from generate_series(k * 100 + 1, k * 100 + 100) i; commit; \
                 end loop; end $$",
            ),
            tables: &["t"],
        },
        "hot" => Scenario {
            ddl: keyed,
            fill: "insert into t select i, md5(i::text), 0 from generate_series(1, 1000) i",
            load: Load::Script(
                "\\set a random(1, 1000)\n\\set b random(1, 1000)\n\
                 update t set n = n + 1 where id = :a;\nupdate t set n = n + 1 where id = :b;\n",
            ),
            tables: &["t"],
        },
        "delete" => Scenario {
            ddl: keyed,
            fill: filled,
            load: Load::Sql(
                "do $$ begin for k in 0..(:n / 100 - 1) loop delete from t \
                 where id between k * 100 + 1 and k * 100 + 100; commit; end loop; end $$",
            ),
            tables: &["t"],
        },
        "full" => Scenario {
            ddl: "create table t (a int, v text, n int); alter table t replica identity full; \
                  create table mark (id int primary key)",
            fill: "insert into t select i, md5(i::text), 0 from generate_series(1, :n) i",
            load: Load::Sql(
                "do $$ begin for k in 0..(:n / 1000 - 1) loop update t set n = 1 \
                 where a between k * 1000 + 1 and k * 1000 + 1000 and a % 20 = 0; commit; \
                 end loop; end $$",
            ),
            tables: &["t"],
        },
        "large" => Scenario {
            ddl: keyed,
            fill: "select 1",
            load: Load::Sql(
                "insert into t select i, md5(i::text), 0 from generate_series(1, :n) i",
            ),
            tables: &["t"],
        },
        "toast" => Scenario {
            ddl: "create table t (id int primary key, v text, n int); \
                  alter table t alter v set storage external; \
                  create table mark (id int primary key)",
            fill: "insert into t select i, repeat(md5(i::text), 100), 0 \
                   from generate_series(1, 10000) i",
            load: Load::Sql(
                "do $$ begin for k in 0..(:n / 100 - 1) loop update t set n = n + 1, \
                 v = case when id % 4 = 0 then v || 'x' else v end \
                 where id between k * 100 % 10000 + 1 and k * 100 % 10000 + 100; commit; \
                 end loop; end $$",
            ),
            tables: &["t"],
        },
        other => panic!("no scenario {other}"),
    }
}

/// A feed from memory.
struct Items(VecDeque<Item>);

impl Feed for Items {
    async fn pop(&mut self) -> Option<Item> {
        self.0.pop_front()
    }

    fn try_pop(&mut self) -> Option<Item> {
        self.0.pop_front()
    }
}

/// A server's connection strings, and what keeps it alive.
struct Side {
    uri: String,
    _server: Option<Server>,
}

impl Side {
    fn uri(&self, dbname: &str) -> String {
        format!("{}/{dbname}", self.uri.rsplit_once('/').unwrap().0)
    }
}

struct Bench {
    source: Side,
    target: Side,
    recorded: Recorded,
    start_lsn: Lsn,
}

async fn session(server: &Server, dbname: &str) -> Session {
    connected(&server.uri(dbname)).await
}

async fn connected(uri: &str) -> Session {
    let config = Config::parse(uri).unwrap();
    let mut session = Session::connect(&config, Purpose::Sql).await.unwrap();
    session.execute("set search_path = public").await.unwrap();
    session
}

fn pgbench(server: &Server, args: &[&str]) {
    let mut command = Command::new(server.bin_dir().join("pgbench"));
    let uri = server.uri("postgres");
    let done = command.args(args).arg(&uri).output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
}

const SLOT: &str = "bench_base";

/// A server with the backlog, and one with what was there before it.
async fn made(scenario: &Scenario, scale: u64) -> (Side, Side) {
    let bin = Server::default_bin().unwrap();
    let settings = [
        "max_replication_slots = 60",
        "max_wal_size = 16GB",
        "checkpoint_timeout = 1h",
        "autovacuum = off",
        "shared_buffers = 512MB",
    ];
    let source = Server::start(&bin, &settings).unwrap();
    let target = Server::start(&bin, &settings).unwrap();
    let fill = scenario.fill.replace(":n", &scale.to_string());
    for server in [&source, &target] {
        let mut sql = session(server, "postgres").await;
        sql.execute(scenario.ddl).await.unwrap();
        sql.execute(&fill).await.unwrap();
        if matches!(scenario.load, Load::Pgbench) {
            pgbench(server, &["-i", "-q", "-s", "10"]);
        }
        sql.execute("analyze").await.unwrap();
    }
    let mut sql = session(&source, "postgres").await;
    let tables = [scenario.tables, &["mark"]].concat().join(", ");
    sql.execute(&format!("create publication bench for table {tables}")).await.unwrap();
    let made = format!("select pg_create_logical_replication_slot('{SLOT}', 'pgoutput')");
    sql.execute(&made).await.unwrap();
    match &scenario.load {
        Load::Pgbench => {
            let each = (scale / 4).to_string();
            pgbench(&source, &["-n", "-c", "4", "-j", "1", "-M", "prepared", "-t", &each]);
        }
        Load::Script(script) => {
            let path = std::env::temp_dir().join("walferry-bench.sql");
            std::fs::write(&path, script).unwrap();
            let (each, path) = ((scale / 4).to_string(), path.display().to_string());
            pgbench(&source, &["-n", "-c", "4", "-M", "prepared", "-t", &each, "-f", &path]);
        }
        Load::Sql(load) => {
            sql.execute(&load.replace(":n", &scale.to_string())).await.unwrap();
        }
    }
    sql.execute("insert into mark values (1)").await.unwrap();
    let side = |server: Server| Side { uri: server.uri("postgres"), _server: Some(server) };
    (side(source), side(target))
}

impl Bench {
    /// Two servers of its own, or those that `BENCH_SOURCE` and `BENCH_TARGET` name: a slot
    /// `bench_base` with the backlog behind it and `mark` filled last, and the tables before it.
    async fn new(scenario: &Scenario, slots: &[String], scale: u64) -> Bench {
        let given = |name: &str| std::env::var(name).ok();
        let (source, target) = match (given("BENCH_SOURCE"), given("BENCH_TARGET")) {
            (Some(source), Some(target)) => {
                (Side { uri: source, _server: None }, Side { uri: target, _server: None })
            }
            _ => made(scenario, scale).await,
        };
        let mut sql = connected(&source.uri("postgres")).await;
        let asked = "select confirmed_flush_lsn from pg_replication_slots where slot_name = ";
        let start_lsn = sql.query(&format!("{asked}'{SLOT}'")).await.unwrap()[0].lsn(0).unwrap();
        for slot in slots {
            let drop = "select pg_drop_replication_slot(slot_name) from pg_replication_slots";
            sql.query(&format!("{drop} where slot_name = '{slot}'")).await.unwrap();
            let copy = format!("select pg_copy_logical_replication_slot('{SLOT}', '{slot}')");
            sql.execute(&copy).await.unwrap();
        }
        let config = Config::parse(&source.uri("postgres")).unwrap();
        let mut reading = Session::connect(&config, Purpose::Replication).await.unwrap();
        let system = source::identify(&mut reading).await.unwrap();
        let recorded = Recorded {
            system_identifier: system.system_identifier,
            timeline: system.timeline,
            database: "postgres".to_string(),
            plugin: "pgoutput".to_string(),
        };
        Bench { source, target, recorded, start_lsn }
    }

    async fn session(&self, dbname: &str) -> Session {
        connected(&self.target.uri(dbname)).await
    }

    async fn fresh(&self, name: &str) -> Session {
        let mut sql = self.session("template1").await;
        sql.execute(&format!("drop database if exists {name} with (force)")).await.unwrap();
        sql.execute(&format!("create database {name} template postgres")).await.unwrap();
        self.session(name).await
    }

    async fn finish(&self, mut sql: Session, name: &str) -> String {
        let sum = "select md5(string_agg(s, ',' order by s)) from (\
             select c.oid::regclass::text || (xpath('//t/text()', query_to_xml(format(\
             'select coalesce(sum((hashtextextended(x::text, 0) / 1000003)), 0) as t from %s x', \
             c.oid::regclass), true, true, '')))[1]::text as s from pg_class c \
             where relkind = 'r' and relnamespace = 'public'::regnamespace) q";
        let sum = sql.query(sum).await.unwrap()[0].string(0).unwrap();
        drop(sql);
        let mut sql = self.session("template1").await;
        sql.execute(&format!("drop database {name} with (force)")).await.unwrap();
        sum
    }

    async fn until_marked(&self, sql: &mut Session) {
        while sql.query("select 1 from public.mark").await.unwrap().is_empty() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    async fn native(&self, slot: &str) -> (Duration, f64, String) {
        let mut sql = self.fresh(slot).await;
        let begun = Instant::now();
        sql.execute(&format!(
            "create subscription s connection '{}' publication bench with (slot_name = '{slot}', \
             create_slot = false, copy_data = false)",
            self.source.uri("postgres")
        ))
        .await
        .unwrap();
        self.until_marked(&mut sql).await;
        let took = begun.elapsed();
        sql.execute("alter subscription s disable").await.unwrap();
        sql.execute("alter subscription s set (slot_name = none)").await.unwrap();
        sql.execute("drop subscription s").await.unwrap();
        (took, 0.0, self.finish(sql, slot).await)
    }

    async fn walferry(&self, slot: &str, way: &str) -> (Duration, f64, String) {
        let mut sql = self.fresh(slot).await;
        sql.execute(apply::DDL).await.unwrap();
        apply::begin_at(&mut sql, slot, ProgressKind::Origin, self.start_lsn).await.unwrap();
        let mut options = apply::Options::new(slot);
        let (mode, from_memory) = match way.strip_prefix("memory-") {
            Some(mode) => (mode, true),
            None => (way, false),
        };
        options.tuning.mode = match mode {
            "rows" => Mode::Rows,
            "sets" => Mode::Sets,
            _ => Mode::Auto,
        };
        // Sizes that are asked for do not grow.
        let tuning = &mut options.tuning;
        if let Some(bytes) = number("BATCH_BYTES") {
            (tuning.limits.bytes, tuning.limits_max.bytes) = (bytes, bytes);
        }
        if let Some(count) = number("BATCH_TRANSACTIONS") {
            (tuning.limits.transactions, tuning.limits_max.transactions) = (count, count);
        }
        tuning.copy_inserts = number("COPY_INSERTS") != Some(0);
        tuning.binary_values = number("BINARY_VALUES") != Some(0);
        if let Some(count) = number("IN_FLIGHT") {
            options.tuning.in_flight_max = count;
        }
        if let Some(count) = number("SESSIONS") {
            options.tuning.sessions = count;
        }
        let decoded = if from_memory { Some(self.decoded(slot).await) } else { None };
        let (own, begun) = (own_cpu(), Instant::now());
        let target = Config::parse(&self.target.uri(slot)).unwrap();
        let mut applier = Applier::connect(&target, options).await.unwrap();
        let (applied_tx, applied) = watch::channel(Applied::default());
        let (_hold, hold) = watch::channel(None);
        let (stop, stopping) = watch::channel(false);
        let took;
        if let Some(items) = decoded {
            applier.run(Items(items), &applied_tx, hold, stopping).await.unwrap();
            took = begun.elapsed();
            self.until_marked(&mut sql).await;
        } else {
            let (feed, reader) = self.reader(slot, stopping.clone()).await;
            let run = tokio::spawn(async move {
                applier.run(feed, &applied_tx, hold, stopping).await.unwrap();
            });
            self.until_marked(&mut sql).await;
            took = begun.elapsed();
            stop.send(true).unwrap();
            run.await.unwrap();
            reader.await.unwrap();
        }
        if applied.borrow().fallbacks > 0 {
            println!("  ({} fallbacks)", applied.borrow().fallbacks);
        }
        (took, own_cpu() - own, self.finish(sql, slot).await)
    }

    async fn reader(
        &self,
        slot: &str,
        stopping: watch::Receiver<bool>,
    ) -> (memory::Receiver, tokio::task::JoinHandle<()>) {
        let from = Config::parse(&self.source.uri("postgres")).unwrap();
        let mut options = StreamOptions::new(slot, "bench", self.start_lsn, self.recorded.clone());
        if std::env::var("BULK").is_ok_and(|v| v == "0") {
            options.bulk.least_bytes = None;
        }
        options.bulk.ahead = number("AHEAD") != Some(0);
        options.bulk.messages = number("PULL_MESSAGES").map(|count| count as u32);
        let stream = Stream::open(&from, options).await.unwrap();
        let (mut queue, feed) =
            memory::queue(number("BUFFER_BYTES").unwrap_or(limit::BUFFER_BYTES));
        let start_lsn = self.start_lsn;
        let reader = tokio::spawn(async move {
            let (positions, _) = watch::channel(Positions::default());
            let (_durable, durable) = watch::channel(start_lsn);
            let _ = stream.run(&mut queue, durable, &positions, stopping).await;
        });
        (feed, reader)
    }

    async fn decoded(&self, slot: &str) -> VecDeque<Item> {
        let (stop, stopping) = watch::channel(false);
        let (mut feed, reader) = self.reader(slot, stopping).await;
        let mut items = VecDeque::new();
        while let Some(item) = feed.pop().await {
            let marked = matches!(&item, Item::Chunk(c) if c.changes.iter().any(is_mark));
            items.push_back(item);
            if marked {
                break;
            }
        }
        stop.send(true).unwrap();
        drop(feed);
        reader.await.unwrap();
        items
    }
}

/// A variable of this bench.
fn number(name: &str) -> Option<usize> {
    std::env::var(name).ok().and_then(|v| v.parse().ok())
}

/// The row that ends every backlog.
fn is_mark(change: &Change) -> bool {
    matches!(change, Change::Insert { relation, .. } if relation.name.name == "mark")
}

/// From now on peak memory is counted anew, where the kernel can.
fn forget_peak() {
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}

/// Peak resident memory in MB.
fn peak_mb() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.split_whitespace().next().unwrap().parse::<u64>().unwrap() >> 10
}

/// CPU seconds of this process.
fn own_cpu() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    (fields[11].parse::<f64>().unwrap() + fields[12].parse::<f64>().unwrap()) / 100.0
}

#[tokio::main]
async fn main() {
    let args: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let Some(name) = args.first() else { return };
    let rounds: usize = args.get(1).map_or(3, |a| a.parse().unwrap());
    let scale: u64 = args.get(2).map_or(50_000, |a| a.parse().unwrap());
    let ways = std::env::var("WAYS").unwrap_or("native,rows,auto".to_string());
    let ways: Vec<&str> = ways.split(',').collect();
    let slot = |way: &str, round: usize| format!("b_{}_{round}", way.replace('-', "_"));
    let slots: Vec<String> =
        (0..rounds).flat_map(|r| ways.iter().map(move |w| slot(w, r))).collect();
    let bench = Bench::new(&scenario(name), &slots, scale).await;
    let mut times: Vec<Vec<(f64, f64)>> = vec![Vec::new(); ways.len()];
    let mut end = None;
    for round in 0..rounds {
        for (way, times) in ways.iter().zip(&mut times) {
            let slot = slot(way, round);
            forget_peak();
            let (took, cpu, sum) = match *way {
                "native" => bench.native(&slot).await,
                _ => bench.walferry(&slot, way).await,
            };
            let (seconds, peak) = (took.as_secs_f64(), peak_mb());
            println!("{name} {way} round {round}: {seconds:.2} s, cpu {cpu:.2}, peak {peak} MB");
            assert_eq!(end.get_or_insert(sum.clone()), &sum, "end states differ");
            times.push((took.as_secs_f64(), cpu));
        }
    }
    for (way, mut times) in ways.iter().zip(times) {
        times.sort_by(|a, b| a.0.total_cmp(&b.0));
        let (took, cpu) = times[times.len() / 2];
        println!("{name} x{scale} {way}: median {took:.2} s, own cpu {cpu:.2} s");
    }
}
