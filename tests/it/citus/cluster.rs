//! A real cluster, and clients of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use walferry::demo::server::{Server, StopMode};
use walferry::pg::{Config, Purpose, Session};

use crate::support;

/// Accounts, their orders, and their events by month, on the same shards, and regions on every node.
const TABLES: &[&str] = &[
    "set citus.shard_count = 6",
    "create table regions (id int primary key, name text not null)",
    "select create_reference_table('regions')",
    "insert into regions select i, 'region ' || i from generate_series(1, 5) i",
    "create table accounts (id bigint primary key, region int not null references regions, \
     balance bigint not null default 0, note text)",
    "set citus.shard_count = 6; select create_distributed_table('accounts', 'id')",
    "create table orders (account bigint not null references accounts, id bigint not null, \
     amount bigint not null check (amount <> 0), primary key (account, id))",
    "select create_distributed_table('orders', 'account', colocate_with => 'accounts')",
    "create index orders_amount on orders (amount)",
    "create table events (account bigint not null, at date not null, what text, \
     region int) partition by range (at); \
     create table events_01 partition of events for values from ('2026-01-01') to ('2026-02-01'); \
     create table events_02 partition of events for values from ('2026-02-01') to ('2026-03-01')",
    "select create_distributed_table('events', 'account', colocate_with => 'accounts')",
    "alter table events add constraint events_region foreign key (region) references regions",
    "alter table events_01 replica identity full",
    "alter table events_02 replica identity full",
    "create table tickets (account bigint not null, no bigserial, what text default 'new', \
     primary key (account, no))",
    "select create_distributed_table('tickets', 'account', colocate_with => 'accounts')",
    "insert into tickets (account) select i from generate_series(1, 600) i",
    "grant select on accounts to clerk",
    "comment on table accounts is 'who owes what'",
    "insert into accounts select i, 1 + i % 5 from generate_series(1, 600) i",
];

/// What distributed tables can have from 11 on.
const LATER: &[&str] = &[
    "create table badges (account bigint not null, no bigint generated always as identity, \
     primary key (account, no)); \
     select create_distributed_table('badges', 'account', colocate_with => 'accounts')",
    "insert into badges (account) select i from generate_series(1, 600) i",
    "create function stamp() returns trigger language plpgsql as \
     $$ begin new.what := 'stamped'; return new; end $$",
    "alter database postgres set citus.enable_unsafe_triggers = on",
    "create trigger stamps before insert on tickets for each row execute function stamp()",
];

/// A coordinator and workers.
pub struct Cluster {
    pub coordinator: Server,
    pub workers: Vec<Server>,
    /// Of Citus.
    pub major: u32,
}

impl Cluster {
    /// `None`, and a word on why, where the server's packages do not offer Citus.
    pub fn start(workers: usize) -> Option<Cluster> {
        let first = support::server();
        let sql = "select count(*) from pg_available_extensions where name = 'citus'";
        if first.psql("postgres", sql).unwrap() == "0" {
            eprintln!("skipped: the PostgreSQL of this machine offers no Citus");
            return None;
        }
        let coordinator = prepared(first);
        let sql = "select split_part(extversion, '.', 1) from pg_extension where extname = 'citus'";
        let major = coordinator.psql("postgres", sql).unwrap().parse().unwrap();
        let mut cluster = Cluster { coordinator, workers: Vec::new(), major };
        let add = match major {
            10.. => "select citus_set_coordinator_host('127.0.0.1', PORT)",
            _ => "select master_add_node('127.0.0.1', PORT, 0)",
        };
        cluster.sql(&add.replace("PORT", &cluster.coordinator.port().to_string()));
        for _ in 0..workers {
            cluster.add_worker();
        }
        Some(cluster)
    }

    pub fn add_worker(&mut self) {
        let worker = prepared(support::server());
        let add = if self.major < 10 { "master_add_node" } else { "citus_add_node" };
        self.sql(&format!("select {add}('127.0.0.1', {})", worker.port()));
        if self.major < 11 {
            // Clients of workers are what these releases call MX, and nothing that is by itself.
            let sync = "select start_metadata_sync_to_node('127.0.0.1', PORT)";
            self.sql(&sync.replace("PORT", &worker.port().to_string()));
        }
        self.workers.push(worker);
    }

    /// Has reference tables on nodes that were added since.
    pub fn replicate_reference_tables(&self) {
        let mode = if self.major < 11 { "" } else { "'block_writes'" };
        self.sql(&format!("select replicate_reference_tables({mode})"));
    }

    /// With tables and rows.
    pub fn with_tables(self) -> Cluster {
        if self.major < 10 {
            // Or shards are not of MX.
            self.sql("alter database postgres set citus.replication_model = 'streaming'");
        }
        // Which hands roles on since it knows all nodes' metadata.
        let alone = if self.major < 11 { self.workers.len() } else { 0 };
        for server in std::iter::once(&self.coordinator).chain(&self.workers[..alone]) {
            server.psql("postgres", "create role clerk login").unwrap();
        }
        let later = if self.major < 11 { &[] } else { LATER };
        for sql in TABLES.iter().chain(later) {
            self.sql(sql);
        }
        self
    }

    pub fn sql(&self, sql: &str) -> String {
        self.coordinator.psql("postgres", sql).unwrap_or_else(|e| panic!("{sql}: {e}"))
    }

    pub fn route(&self) -> String {
        format!("citus:{}", self.coordinator.uri("postgres"))
    }

    /// All servers, the coordinator first.
    pub fn servers(&self) -> impl Iterator<Item = &Server> {
        std::iter::once(&self.coordinator).chain(&self.workers)
    }

    /// The worker at this address.
    pub fn worker(&self, port: u16) -> &Server {
        self.workers.iter().find(|worker| worker.port() == port).unwrap()
    }

    /// Groups of co-located shards of `accounts`: the worker's port, and the shards' relations,
    /// in the order of their hash values.
    pub fn groups(&self) -> Vec<(u16, Vec<String>)> {
        let rows = self.sql(
            "select n.nodeport || ' ' || string_agg(quote_ident(ns.nspname) || '.' || \
             split_part(shard_name(s.logicalrelid, s.shardid), '.', \
                case when shard_name(s.logicalrelid, s.shardid) like '%.%' then 2 else 1 end), \
             ' ' order by s.shardid) \
             from pg_dist_shard s join pg_dist_partition p using (logicalrelid) \
             join pg_dist_placement l using (shardid) \
             join pg_dist_node n on n.groupid = l.groupid and n.noderole = 'primary' \
             join pg_class c on c.oid = s.logicalrelid \
             join pg_namespace ns on ns.oid = c.relnamespace \
             where p.colocationid = (select colocationid from pg_dist_partition \
                where logicalrelid = 'accounts'::regclass) \
             group by n.nodeport, s.shardminvalue order by s.shardminvalue::int",
        );
        let line = |line: &str| {
            let mut words = line.split(' ');
            let port = words.next().unwrap().parse().unwrap();
            (port, words.map(str::to_string).collect())
        };
        rows.lines().map(line).collect()
    }

    /// Where every shard is, by the metadata of each node: all the same.
    pub fn placements(&self) -> String {
        let sql = "select string_agg(shardid || ':' || groupid, ' ' order by shardid, groupid) \
             from pg_dist_placement";
        let all: Vec<String> =
            self.servers().map(|server| server.psql("postgres", sql).unwrap()).collect();
        for (server, placements) in self.servers().zip(&all) {
            assert_eq!(placements, &all[0], "metadata of port {}", server.port());
        }
        all[0].clone()
    }

    /// Prepared transactions of ours, on any node.
    pub fn prepared(&self) -> String {
        let sql = "select string_agg(gid, ' ') from pg_prepared_xacts where gid like 'walferry%'";
        let of = |server: &Server| server.psql("postgres", sql).unwrap();
        self.servers().map(of).collect::<Vec<_>>().join(" ").trim().to_string()
    }

    /// What the application wants of its rows: every account's balance is the sum of its orders,
    /// and every order has its event. Gives the number of orders.
    pub fn audit(&self) -> u64 {
        let wrong = self.sql(
            "select count(*) from (select a.id, a.balance, coalesce(sum(o.amount), 0) as sum \
             from accounts a left join orders o on o.account = a.id group by a.id, a.balance) q \
             where balance <> sum",
        );
        assert_eq!(wrong, "0", "accounts whose balance is not the sum of their orders");
        let events = self.sql("select count(*) from events");
        let orders = self.sql("select count(*) from orders");
        assert_eq!(events, orders, "events and orders");
        orders.parse().unwrap()
    }
}

/// Restarted with the extension loaded and made.
fn prepared(server: Server) -> Server {
    server
        .configure(&[
            "shared_preload_libraries = 'citus'",
            "max_prepared_transactions = 100",
            // Half done transactions of a node that was killed are ended within seconds.
            "citus.recover_2pc_interval = '2s'",
            // Or Citus looks for a certificate in the home directory of whoever started the test.
            "citus.node_conninfo = 'sslmode=disable'",
        ])
        .unwrap();
    server.restart(StopMode::Fast).unwrap();
    server.psql("postgres", "create extension citus").unwrap();
    server
}

/// Clients that write through Citus, each a transaction on one account after the other.
pub struct Load {
    stop: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
    tasks: Vec<tokio::task::JoinHandle<Seen>>,
}

/// What clients saw.
#[derive(Debug, Default)]
pub struct Seen {
    /// Transactions whose COMMIT was answered.
    pub acknowledged: u64,
    /// Those whose end is not known, as the connection broke.
    pub unknown: u64,
    pub errors: Vec<String>,
    /// When each transaction began, and how long it took.
    pub times: Vec<(Instant, Duration)>,
}

impl Seen {
    /// The longest of those that were under way between two moments.
    pub fn longest(&self, from: Instant, to: Instant) -> Duration {
        let within = self.times.iter().filter(|(begun, took)| *begun < to && *begun + *took > from);
        within.map(|(_, took)| *took).max().unwrap_or_default()
    }
}

impl Load {
    /// One client for each URI, with a pause between its transactions; accounts up to 600.
    pub fn start(uris: &[String], pause: Duration) -> Load {
        let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let clients = (1u64..).zip(uris);
        let tasks = clients.map(|(number, uri)| {
            tokio::spawn(client(number, uri.clone(), pause, stop.clone(), done.clone()))
        });
        let tasks = tasks.collect();
        Load { stop, done, tasks }
    }

    pub fn count(&self) -> u64 {
        self.done.load(Ordering::SeqCst)
    }

    /// Waits until so many more transactions are in.
    pub async fn more(&self, transactions: u64) {
        let due = self.count() + transactions;
        support::until("clients go on", async || self.count() >= due).await;
    }

    pub async fn end(self) -> Seen {
        self.stop.store(true, Ordering::SeqCst);
        let mut all = Seen::default();
        for task in self.tasks {
            let seen = task.await.unwrap();
            all.acknowledged += seen.acknowledged;
            all.unknown += seen.unknown;
            all.errors.extend(seen.errors);
            all.times.extend(seen.times);
        }
        all
    }
}

async fn client(
    number: u64,
    uri: String,
    pause: Duration,
    stop: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
) -> Seen {
    let config = Config::parse_with(&uri, &|_| None).unwrap();
    let (mut seen, mut open) = (Seen::default(), None);
    for i in 0u64.. {
        if stop.load(Ordering::SeqCst) {
            break;
        }
        let session = match &mut open {
            Some(session) => session,
            None => match Session::connect(&config, Purpose::Sql).await {
                Ok(session) => open.insert(session),
                Err(error) => {
                    seen.errors.push(error.to_string());
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            },
        };
        let (account, amount) = (1 + fastrand::u64(..600), fastrand::u64(1..100));
        let id = number * 100_000_000 + i;
        let month = 1 + i % 2;
        let sql = format!(
            "begin; update public.accounts set balance = balance + {amount} where id = {account}; \
             insert into public.orders values ({account}, {id}, {amount}); \
             insert into public.events values ({account}, '2026-0{month}-07', 'order {id}', 1); \
             commit"
        );
        let begun = Instant::now();
        let outcome = session.execute(&sql).await;
        seen.times.push((begun, begun.elapsed()));
        match outcome {
            Ok(_) => {
                seen.acknowledged += 1;
                done.fetch_add(1, Ordering::SeqCst);
            }
            Err(error) if error.is_closed() => {
                seen.unknown += 1;
                seen.errors.push(error.to_string());
                open = None;
            }
            Err(error) => {
                seen.errors.push(error.to_string());
                if session.execute("rollback").await.is_err() {
                    open = None;
                }
            }
        }
        tokio::time::sleep(pause).await;
    }
    seen
}
