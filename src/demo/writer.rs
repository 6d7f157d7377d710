//! An application at work: connections that write mixed transactions, and know what became of each.
//!
//! Any URI will do, also that of a pooler in transaction mode: no session state is used, and only
//! the simple protocol and unnamed statements. A statement's *stall* is the time from sending it to
//! its answer; where a connection is lost, the time from then until the next statement succeeds.
//! Connections are made again for as long as the writer runs.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use fastrand::Rng;
use tokio::sync::{RwLock, watch};
use tokio::task::JoinHandle;

pub use super::dataset::{broken_invariants, create_schema, create_schema_for};
use super::ledger::{Account, Ledger};
use super::stalls::Stalls;
use super::transactions::{self, Kind, Plan, Turn, World};
use crate::pg::{Config, Error, Purpose, Result, Session};

/// How the writer writes.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where; [`create_schema`] must have been there.
    pub uri: String,
    /// All connections together; `None` is as fast as it goes. What a stall has made late is not
    /// caught up with.
    pub tx_per_second: Option<f64>,
    /// How many write at once.
    pub connections: usize,
    /// The same seed gives the same transactions on each connection (not the same interleaving).
    pub seed: u64,
    /// Number of the first connection in bank.ledger. Two writers at once need ranges of their own.
    pub first_writer: i32,
    /// A statement that takes longer is given up, its connection with it, as if the network had
    /// gone.
    pub patience: Duration,
}

impl Options {
    /// 4 connections, flat out, seed 1, numbers from 1, a minute of patience.
    pub fn new(uri: &str) -> Options {
        Options {
            uri: uri.to_string(),
            tx_per_second: None,
            connections: 4,
            seed: 1,
            first_writer: 1,
            patience: Duration::from_secs(60),
        }
    }
}

/// What the writer did and saw since it started (stalls: since [`Writer::reset_stalls`]).
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Transactions whose COMMIT was acknowledged.
    pub committed: u64,
    /// Transactions rolled back on purpose.
    pub rolled_back: u64,
    /// Transactions whose COMMIT was not answered: only the database knows.
    pub unknown: u64,
    /// Statements that were answered with an error, or not at all.
    pub failed_statements: u64,
    /// Attempts to connect that failed.
    pub failed_connects: u64,
    /// How often each error came: by SQLSTATE and message, or `connection lost`, or `connect: ...`.
    pub errors: BTreeMap<String, u64>,
    /// Committed transactions by kind.
    pub kinds: BTreeMap<Kind, u64>,
    /// The longest stall, exactly.
    pub longest_stall: Duration,
    /// What stalled that long.
    pub longest_stall_statement: String,
    /// Half of all statements stayed within this, to 6 %.
    pub stall_p50: Duration,
    /// 99 of 100 statements stayed within this, to 6 %.
    pub stall_p99: Duration,
    /// Time since the start.
    pub elapsed: Duration,
    /// Which transactions must be found again: for [`super::ledger::check`].
    pub ledger: Ledger,
}

#[derive(Debug, Default)]
struct Stats {
    report: Report,
    stalls: Stalls,
}

/// What the connections are told.
#[derive(Clone, Debug)]
struct Orders {
    config: Config,
    /// Counts URIs: a session of an older one is closed before its next transaction.
    generation: u64,
    paused: bool,
    stopped: bool,
}

/// A running writer, on the present runtime: a caller that blocks its only thread (on a server's
/// restart) holds the writer up too. Dropped, it stops at once, transactions half done.
#[derive(Debug)]
pub struct Writer {
    orders: watch::Sender<Orders>,
    stats: Arc<Mutex<Stats>>,
    /// Held for reading by every transaction under way.
    turns: Arc<RwLock<()>>,
    tasks: Vec<JoinHandle<()>>,
    started: Instant,
}

impl Writer {
    /// Looks at what is there, then starts writing. Errors if the place cannot be reached or holds
    /// no schema of [`create_schema`].
    pub async fn start(options: Options) -> Result<Writer> {
        let config = Config::parse(&options.uri)?.with_application_name("walferry writer");
        let (world, accounts) = survey(&config, &options).await?;
        let orders = Orders { config, generation: 0, paused: false, stopped: false };
        let (orders, receiver) = watch::channel(orders);
        let mut stats = Stats::default();
        stats.report.ledger.accounts = accounts;
        let stats = Arc::new(Mutex::new(stats));
        let turns = Arc::new(RwLock::new(()));
        let tasks = (0..options.connections).map(|index| {
            let connection = Connection::new(&options, index, &world, &stats);
            tokio::spawn(connection.run(receiver.clone(), turns.clone()))
        });
        let tasks = tasks.collect();
        Ok(Writer { orders, stats, turns, tasks, started: Instant::now() })
    }

    /// Sends every connection elsewhere, each before its next transaction. The text must be a URI.
    pub fn set_uri(&self, uri: &str) -> Result<()> {
        let config = Config::parse(uri)?.with_application_name("walferry writer");
        self.orders.send_modify(|orders| {
            orders.config = config;
            orders.generation += 1;
        });
        Ok(())
    }

    /// Returns once no transaction is under way; none begins until [`Writer::resume`]. Connections
    /// stay open.
    pub async fn pause(&self) {
        self.orders.send_modify(|orders| orders.paused = true);
        let _none = self.turns.write().await;
    }

    /// Goes on after [`Writer::pause`].
    pub fn resume(&self) {
        self.orders.send_modify(|orders| orders.paused = false);
    }

    /// What was done so far. The ledger in it is exact only while paused.
    pub fn report_now(&self) -> Report {
        let stats = lock(&self.stats);
        Report {
            longest_stall: stats.stalls.longest(),
            longest_stall_statement: stats.stalls.longest_statement().to_string(),
            stall_p50: stats.stalls.percentile(0.5),
            stall_p99: stats.stalls.percentile(0.99),
            elapsed: self.started.elapsed(),
            ..stats.report.clone()
        }
    }

    /// Returns true once `count` more transactions were committed than when it was called, false if
    /// that has not happened within a minute.
    #[must_use = "false means that the writer is stuck"]
    pub async fn committed_more(&self, count: u64) -> bool {
        let due = lock(&self.stats).report.committed + count;
        let deadline = Instant::now() + Duration::from_secs(60);
        while lock(&self.stats).report.committed < due {
            if Instant::now() > deadline {
                return false;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        true
    }

    /// Forgets the stalls seen so far. One that is under way counts when it ends.
    pub fn reset_stalls(&self) {
        lock(&self.stats).stalls = Stalls::default();
    }

    /// Lets transactions under way end, closes the connections, and gives the final report.
    pub async fn stop(mut self) -> Report {
        self.orders.send_modify(|orders| orders.stopped = true);
        for task in std::mem::take(&mut self.tasks) {
            if let Err(error) = task.await {
                let mut stats = lock(&self.stats);
                *stats.report.errors.entry(format!("writer: {error}")).or_default() += 1;
                stats.report.failed_statements += 1;
            }
        }
        self.report_now()
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

fn lock(stats: &Mutex<Stats>) -> MutexGuard<'_, Stats> {
    stats.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What there is to write to, and where the numbers of earlier writers end.
async fn survey(config: &Config, options: &Options) -> Result<(World, BTreeMap<i32, Account>)> {
    let mut session = Session::connect(config, Purpose::Sql).await?;
    let row = session
        .query_one(
            "select coalesce((select max(bid) from bank.branches), 0), \
             coalesce((select max(aid) from bank.accounts), 0), \
             coalesce((select max(id) from shop.orders), 0), \
             coalesce((select max(id) from shop.documents where id < 1000000000), 0), \
             coalesce((select max(id) from shop.events), 0), \
             coalesce((select max(slot) from \"Odd \"\"Schema\".\"Key \"\"Changes\"\"\"), 0)",
            &[],
        )
        .await?;
    let world = World {
        branches: row.parse(0)?,
        accounts: row.parse(1)?,
        orders: row.parse(2)?,
        documents: row.parse(3)?,
        events: row.parse(4)?,
        slots: row.parse(5)?,
        truncates: session.major_version() >= 11,
    };
    let mut accounts = BTreeMap::new();
    for index in 0..options.connections {
        let writer = options.first_writer + index as i32;
        let sql = format!("select coalesce(max(seq), 0) from bank.ledger where writer = {writer}");
        let base = session.query_one(&sql, &[]).await?.parse(0)?;
        accounts.insert(writer, Account { base, ..Account::default() });
    }
    Ok((world, accounts))
}

/// How statements are sent.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Style {
    /// One message each, simple protocol.
    Simple,
    /// One exchange each, extended protocol with unnamed statements.
    Extended,
    /// The whole transaction as one message.
    Whole,
}

/// What became of a transaction.
enum Outcome {
    Committed,
    RolledBack,
    Failed,
    Unknown,
}

/// One connection and what it needs to plan.
struct Connection {
    rng: Rng,
    world: World,
    turn: Turn,
    interval: Option<Duration>,
    patience: Duration,
    stats: Arc<Mutex<Stats>>,
    session: Option<Session>,
    generation: u64,
    /// Since when nothing has succeeded.
    outage: Option<Instant>,
}

impl Connection {
    fn new(options: &Options, index: usize, world: &World, stats: &Arc<Mutex<Stats>>) -> Self {
        let writer = options.first_writer + index as i32;
        let base = lock(stats).report.ledger.accounts.get(&writer).map_or(0, |a| a.base);
        let (index, connections) = (index as i64, options.connections as i64);
        let share = |rate: f64| Duration::from_secs_f64(connections as f64 / rate.max(0.001));
        Connection {
            rng: Rng::with_seed(options.seed.wrapping_mul(1000).wrapping_add(index as u64)),
            world: world.clone(),
            turn: Turn { writer, index, connections, seq: base },
            interval: options.tx_per_second.map(share),
            patience: options.patience,
            stats: stats.clone(),
            session: None,
            generation: 0,
            outage: None,
        }
    }

    async fn run(mut self, mut orders: watch::Receiver<Orders>, turns: Arc<RwLock<()>>) {
        let mut clock = self.interval.map(|interval| {
            // Connections take turns within the interval rather than all at once.
            let offset = interval.mul_f64(self.turn.index as f64 / self.turn.connections as f64);
            let start = tokio::time::Instant::now() + offset;
            let mut clock = tokio::time::interval_at(start, interval);
            clock.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
            clock
        });
        loop {
            if let Some(clock) = &mut clock {
                clock.tick().await;
            }
            let turn = turns.read().await;
            let now = orders.borrow_and_update().clone();
            if now.stopped {
                break;
            }
            if now.paused {
                drop(turn);
                // An error means that the writer is gone; the next round ends as stopped would.
                if orders.changed().await.is_err() {
                    break;
                }
                continue;
            }
            if !self.connected(&now).await {
                drop(turn);
                tokio::time::sleep(Duration::from_millis(5)).await;
                continue;
            }
            self.transaction().await;
        }
        self.end_outage("no connection until the end");
    }

    /// Makes sure there is a session with the present URI.
    async fn connected(&mut self, orders: &Orders) -> bool {
        if self.generation != orders.generation {
            self.session = None;
            self.generation = orders.generation;
        }
        if self.session.is_some() {
            return true;
        }
        let begun = Instant::now();
        match Session::connect(&orders.config, Purpose::Sql).await {
            Ok(session) => {
                self.session = Some(session);
                true
            }
            Err(error) => {
                self.outage.get_or_insert(begun);
                let mut stats = lock(&self.stats);
                stats.report.failed_connects += 1;
                *stats.report.errors.entry(format!("connect: {}", brief(&error))).or_default() += 1;
                false
            }
        }
    }

    async fn transaction(&mut self) {
        self.turn.seq += 1;
        let plan = transactions::plan(&mut self.rng, &self.world, self.turn);
        let style = match self.rng.u32(0..10) {
            0..=4 => Style::Simple,
            5..=7 => Style::Extended,
            _ => Style::Whole,
        };
        let outcome = self.perform(&plan, style).await;
        let failed = matches!(outcome, Outcome::Failed | Outcome::Unknown);
        self.note(&plan, outcome);
        if failed {
            self.recover().await;
        }
    }

    fn note(&self, plan: &Plan, outcome: Outcome) {
        let mut stats = lock(&self.stats);
        let report = &mut stats.report;
        let Turn { writer, seq, .. } = self.turn;
        let account = report.ledger.accounts.entry(writer).or_default();
        match outcome {
            Outcome::Committed => {
                account.acknowledged.push(seq);
                report.committed += 1;
                *report.kinds.entry(plan.kind).or_default() += 1;
            }
            Outcome::Unknown => {
                account.unknown.push(seq);
                report.unknown += 1;
            }
            Outcome::RolledBack => report.rolled_back += 1,
            Outcome::Failed => {}
        }
    }

    async fn perform(&mut self, plan: &Plan, style: Style) -> Outcome {
        let end = if plan.commits { "commit" } else { "rollback" };
        if style == Style::Whole {
            let sql = format!("begin; {}; {end}", plan.statements.join("; "));
            let done = self.statement(&sql, Style::Simple).await;
            return self.outcome(plan, done.is_ok());
        }
        if self.statement("begin", style).await.is_err() {
            return Outcome::Failed;
        }
        for statement in &plan.statements {
            if self.statement(statement, style).await.is_err() {
                return Outcome::Failed;
            }
        }
        let done = self.statement(end, style).await;
        self.outcome(plan, done.is_ok())
    }

    /// After the message that held the end of the transaction. An error on a living session means
    /// that it did not commit; on a dead one that nobody knows.
    fn outcome(&self, plan: &Plan, done: bool) -> Outcome {
        match (done, plan.commits, self.session.is_some()) {
            (true, true, _) => Outcome::Committed,
            (true, false, _) => Outcome::RolledBack,
            (false, true, false) => Outcome::Unknown,
            (false, _, _) => Outcome::Failed,
        }
    }

    /// Runs one statement and accounts for it. A session that is lost is dropped.
    async fn statement(&mut self, sql: &str, style: Style) -> std::result::Result<(), ()> {
        let Some(session) = &mut self.session else { return Err(()) };
        let begun = Instant::now();
        let answer = async {
            match style {
                Style::Extended => session.query_params(sql, &[]).await.map(drop),
                _ => session.execute(sql).await.map(drop),
            }
        };
        let error = match tokio::time::timeout(self.patience, answer).await {
            Ok(Ok(())) => {
                if self.outage.is_some() {
                    self.end_outage(sql);
                } else {
                    lock(&self.stats).stalls.record(begun.elapsed(), sql);
                }
                return Ok(());
            }
            Ok(Err(error)) => Some(error),
            Err(_) => None,
        };
        let lost = error.as_ref().is_none_or(Error::is_closed);
        let name = error.as_ref().map_or("no answer".to_string(), brief);
        if lost {
            self.outage.get_or_insert(begun);
            self.session = None;
        }
        let mut stats = lock(&self.stats);
        stats.report.failed_statements += 1;
        *stats.report.errors.entry(name).or_default() += 1;
        Err(())
    }

    /// After a failure: out of the failed transaction, and no faster than needed into the next.
    async fn recover(&mut self) {
        if let Some(session) = &mut self.session
            && session.in_transaction()
        {
            let rollback = tokio::time::timeout(self.patience, session.execute("rollback"));
            if !matches!(rollback.await, Ok(Ok(_))) {
                self.session = None;
            }
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }

    fn end_outage(&mut self, sql: &str) {
        if let Some(since) = self.outage.take() {
            lock(&self.stats).stalls.record(since.elapsed(), sql);
        }
    }
}

/// Short enough to count by.
fn brief(error: &Error) -> String {
    match error.server() {
        Some(said) => format!("{} {}", said.code, said.message),
        None if error.is_closed() => "connection lost".to_string(),
        None => error.to_string(),
    }
}
