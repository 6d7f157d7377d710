//! A job between two servers, driven by the commands a user would type.

use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use serde_json::Value;
use walferry::demo::compare::compare;
use walferry::demo::kafka::Broker;
use walferry::demo::ledger;
use walferry::demo::pgbouncer::PgBouncer;
use walferry::demo::server::Server;
use walferry::demo::writer::{Options, Report, Writer, broken_invariants, create_schema};
use walferry::pg::{Config, Purpose, Session};

use super::binary::{Ended, Walferry};
use super::inventory::Inventory;

/// A source and a target, each with an empty database `app`.
pub struct Ends {
    pub source: Server,
    pub target: Server,
    /// Where walferry connects to; not the servers themselves where a proxy stands between.
    pub source_via: String,
    pub target_via: String,
    /// `--buffer` of every command; as the variable WALFERRY_TEST_BUFFER says: a spool, kafka or
    /// memory.
    pub buffer: Option<String>,
    /// Where spools of this job may be; removed with it.
    pub spool_dir: PathBuf,
}

impl Drop for Ends {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.spool_dir);
    }
}

impl Ends {
    /// Starts both, of these major versions.
    pub fn start(source_major: u32, target_major: u32) -> Ends {
        let start = |major| Server::start(&Server::bin_of(major).unwrap(), &[]).unwrap();
        Ends::of(start(source_major), start(target_major))
    }

    /// Of servers that run already.
    pub fn of(source: Server, target: Server) -> Ends {
        for server in [&source, &target] {
            server.psql("postgres", "create database app").unwrap();
        }
        Ends::between(source, target)
    }

    /// Of servers that have a database `app`.
    pub fn between(source: Server, target: Server) -> Ends {
        let (source_via, target_via) = (source.uri("app"), target.uri("app"));
        let name = format!("walferry-it-{}-{:x}", std::process::id(), fastrand::u64(..));
        let spool_dir = std::env::temp_dir().join(name);
        let ends = Ends { source, target, source_via, target_via, buffer: None, spool_dir };
        match std::env::var("WALFERRY_TEST_BUFFER").unwrap_or_default().as_str() {
            "spool" => ends.with_spool(),
            "kafka" => ends.with_kafka(&broker().address()),
            _ => ends,
        }
    }

    /// Every command from now on is given a topic of this job's own.
    pub fn with_kafka(mut self, brokers: &str) -> Ends {
        self.buffer = Some(format!("kafka:{brokers}/{}", topic()));
        self
    }

    /// Every command from now on is given a spool of this job's own.
    pub fn with_spool(mut self) -> Ends {
        self.buffer = Some(format!("spool:{}", self.spool_dir.display()));
        self
    }

    pub fn source_uri(&self) -> String {
        self.source.uri("app")
    }

    pub fn target_uri(&self) -> String {
        self.target.uri("app")
    }

    /// Starts a command.
    pub fn spawn(&self, arguments: &[&str]) -> Walferry {
        self.spawn_on(arguments, &[])
    }

    /// Starts a command with more variables.
    pub fn spawn_on(&self, arguments: &[&str], variables: &[(&str, &str)]) -> Walferry {
        let mut environment =
            vec![("WALFERRY_SOURCE", &*self.source_via), ("WALFERRY_TARGET", &*self.target_via)];
        environment.extend(self.buffer.as_deref().map(|buffer| ("WALFERRY_BUFFER", buffer)));
        environment.extend(variables);
        Walferry::spawn_with(arguments, &environment)
    }

    /// Runs a command to its end.
    pub async fn walferry(&self, arguments: &[&str]) -> Ended {
        self.spawn(arguments).ended().await
    }

    /// The same, and wants success.
    pub async fn done(&self, arguments: &[&str]) -> Ended {
        self.walferry(arguments).await.expect_success()
    }

    /// `status --json`; null while there is no job.
    pub async fn status(&self) -> Value {
        self.walferry(&["status", "--json"]).await.json_if_done()
    }

    /// Waits until the job is in the phase; panics after two minutes, or when no runner is left.
    pub async fn until_phase(&self, run: &mut Walferry, phase: &str) {
        until_phase(&self.target_uri(), "main", run, phase).await;
    }

    /// True where no runner may take up a flip any more that somebody asked for: a command of
    /// whoever was killed is fresh for six seconds. To be asked before the phase.
    pub fn nothing_is_asked(&self) -> bool {
        let sql = "select coalesce((flip ->> 'released')::bool, true) and not exists ( \
             select from walferry.command where state in ('running', 'queued') \
             and seen_at > clock_timestamp() - interval '6 s') from walferry.job";
        self.target.psql("app", sql).is_ok_and(|answer| answer == "t")
    }

    /// A writer of so many transactions a second on the source.
    pub async fn writer(&self, tx_per_second: f64) -> Writer {
        create_schema(&self.source_uri(), 1).await.unwrap();
        let options = Options::new(&self.source_uri());
        let options = Options { tx_per_second: Some(tx_per_second), ..options };
        Writer::start(options).await.unwrap()
    }

    /// Both sides hold the same rows, and each transaction that the writer saw committed, once.
    pub async fn assert_exact(&self, report: &Report) {
        let comparison = compare(&self.source_uri(), &self.target_uri()).await.unwrap();
        let rows = comparison.differences.iter().filter(|line| !line.starts_with("sequence "));
        assert_eq!(rows.collect::<Vec<_>>(), Vec::<&String>::new());
        for uri in [self.source_uri(), self.target_uri()] {
            assert_eq!(broken_invariants(&uri).await.unwrap(), Vec::<String>::new());
            let check = ledger::check(&uri, &report.ledger).await.unwrap();
            assert!(check.is_exact(), "{check:?}");
        }
    }

    /// The same, of the tables whose difference begins with `part`; `reports` of several writers.
    pub async fn assert_exact_in(&self, part: &str, reports: &[&Report]) {
        let comparison = compare(&self.source_uri(), &self.target_uri()).await.unwrap();
        let of_part = |line: &&String| line.contains(part) && !line.starts_with("sequence ");
        let different = comparison.differences.iter().filter(of_part);
        assert_eq!(different.collect::<Vec<_>>(), Vec::<&String>::new());
        assert!(comparison.rows() > 1000);
        for uri in [self.source_uri(), self.target_uri()] {
            for report in reports {
                let check = ledger::check(&uri, &report.ledger).await.unwrap();
                assert!(check.is_exact(), "{check:?}");
            }
        }
    }

    /// Once the writer goes on and the stream has caught up with it: switched, with everything it
    /// wrote on both sides.
    pub async fn switch_exactly(&self, writer: Writer) {
        assert!(writer.committed_more(50).await, "the writer is stuck");
        super::until_within(Duration::from_secs(60), "the stream", async || {
            self.status().await["lag_bytes"].as_u64().is_some_and(|lag| lag < 1 << 20)
        })
        .await;
        self.done(&["cutover"]).await;
        let report = writer.stop().await;
        self.done(&["verify"]).await;
        self.assert_exact(&report).await;
        conserved(&self.status().await["tables"]);
    }

    /// What is on both sides.
    pub async fn inventories(&self) -> (Inventory, Inventory) {
        (Inventory::take(&self.source_uri()).await, Inventory::take(&self.target_uri()).await)
    }
}

/// Waits until the job of this name is in the phase; panics after two minutes, or when no runner is
/// left. The home is asked in SQL, as a process for each look would take most of what is waited for.
pub async fn until_phase(home: &str, job: &str, run: &mut Walferry, phase: &str) {
    let (begun, config) = (Instant::now(), Config::parse(home).unwrap());
    let (config, mut session) = (config.with_application_name("phase"), None);
    loop {
        // A runner may come to the phase and then to its end between two looks.
        let is_over = run.has_ended() || begun.elapsed() > Duration::from_secs(120);
        let now = phase_now(&config, &mut session, job).await;
        if now.as_deref() == Some(phase) {
            return;
        }
        assert!(!is_over, "{:?}, in {now:?}, not {phase}\n{}", begun.elapsed(), run.so_far());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// By a session that is kept; none while there is no job, or the home does not answer.
async fn phase_now(home: &Config, kept: &mut Option<Session>, job: &str) -> Option<String> {
    let mut session = match kept.take() {
        Some(session) => session,
        None => Session::connect(home, Purpose::Sql).await.ok()?,
    };
    let sql = "select phase from walferry.job where name = $1";
    // Not there yet, or the session is gone.
    let rows = session.query_params(sql, &[Some(job)]).await.ok()?;
    let phase = rows.first().map(|row| row.str(0).unwrap().to_string());
    *kept = Some(session);
    phase
}

/// A broker that the tests share; each has topics of its own. Its guard ends it with this process.
pub fn broker() -> &'static Broker {
    static BROKER: OnceLock<Broker> = OnceLock::new();
    BROKER.get_or_init(|| Broker::start(&[]).unwrap())
}

/// A topic's name that no other test uses.
pub fn topic() -> String {
    format!("it-{:016x}", fastrand::u64(..))
}

/// `--route` for database `app` of a pooler.
pub fn route_of(pooler: &PgBouncer) -> String {
    format!("pgbouncer:{},{},app", pooler.admin_uri(), pooler.ini_path().display())
}

/// Law 10, as status shows it.
pub fn conserved(tables: &Value) {
    let tables = tables.as_array().unwrap();
    assert!(!tables.is_empty());
    for table in tables {
        let n = |key: &str| table[key].as_i64().unwrap();
        assert_eq!(n("decoded"), n("applied") + n("filtered") + n("quarantined"), "{table}");
    }
}
