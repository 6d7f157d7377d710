//! A job that can be held in each of its phases, for faults to strike there.
//!
//! Holds are prepared transactions with locks: they outlive restarts of their server.

use std::time::Duration;

use walferry::demo::compare::compare;
use walferry::demo::ledger;
use walferry::demo::proxy::Proxy;
use walferry::demo::server::Server;
use walferry::demo::writer::{Options, Report, Writer, broken_invariants, create_schema};

use super::job::Ends;
use super::{Walferry, until_within};

/// Tables beside the writer's: one large, one that nobody ever writes, one to hold the stream by.
const TABLES: &str = "create schema faults; \
    create table faults.bulk (id int primary key, text text not null, n int not null); \
    create index on faults.bulk (n); create index on faults.bulk (text); \
    insert into faults.bulk select i, repeat(md5(i::text), 5), i % 1000 \
        from generate_series(1, $ROWS) i; \
    create table faults.still (id int primary key, n int not null); \
    create index on faults.still (n); \
    insert into faults.still select i, i from generate_series(1, 5000) i; \
    create table faults.tick (id int primary key)";

/// Both servers behind proxies, and an application at work on the source.
pub struct Move {
    pub ends: Ends,
    pub source_net: Proxy,
    pub target_net: Proxy,
    writer: Option<Writer>,
    on_target: bool,
}

impl Move {
    /// Servers of the default version with these settings, data with `rows` rows in the large
    /// table, and a writer of `rate` transactions a second.
    pub async fn start(settings: &[&str], rows: u32, rate: f64) -> Move {
        let bin = Server::default_bin().unwrap();
        let server = || Server::start(&bin, settings).unwrap();
        let mut ends = Ends::of(server(), server());
        let source_net = Proxy::start(ends.source.port()).unwrap();
        let target_net = Proxy::start(ends.target.port()).unwrap();
        ends.source_via = source_net.uri(&ends.source_uri());
        ends.target_via = target_net.uri(&ends.target_uri());
        create_schema(&ends.source_uri(), 1).await.unwrap();
        ends.source.psql("app", &TABLES.replace("$ROWS", &rows.to_string())).unwrap();
        let options = Options { tx_per_second: Some(rate), ..Options::new(&ends.source_uri()) };
        let writer = Writer::start(options).await.unwrap();
        Move { ends, source_net, target_net, writer: Some(writer), on_target: false }
    }

    /// The application.
    pub fn writer(&self) -> &Writer {
        self.writer.as_ref().unwrap()
    }

    /// The phase as the home database has it; empty where it cannot be asked.
    pub fn phase(&self) -> String {
        self.ends.target.psql("app", "select phase from walferry.job").unwrap_or_default()
    }

    /// Waits for a phase without walferry's help; panics when the run ends or after a minute.
    pub async fn until(&self, run: &mut Walferry, phase: &str) {
        until_within(Duration::from_secs(60), phase, || {
            let now = self.phase();
            assert!(!run.has_ended(), "the run ended in {now}:\n{}", run.so_far());
            std::future::ready(now == phase)
        })
        .await;
    }

    /// Waits for a query on a server to give `t`; errors count as no.
    pub async fn until_true(&self, server: &Server, sql: &str) {
        until_within(Duration::from_secs(60), sql, || {
            std::future::ready(server.psql("app", sql).is_ok_and(|answer| answer == "t"))
        })
        .await;
    }

    /// Sends the application where the job's phase says it belongs.
    pub fn send_writer(&mut self) {
        let phase = self.phase();
        let on_target = phase == "switched";
        assert!(matches!(&*phase, "following" | "switched" | "rolled_back"), "{phase}");
        if on_target != self.on_target {
            let ends = &self.ends;
            let uri = if on_target { ends.target_uri() } else { ends.source_uri() };
            self.writer().set_uri(&uri).unwrap();
            self.on_target = on_target;
        }
    }

    /// Tables whose copy is finished, with the time of it.
    pub fn finished_tables(&self) -> Vec<String> {
        let sql = "select schema || '.' || name || ' ' || max(done_at) from walferry.table_copy \
                   group by schema, name having bool_and(state = 'done') order by 1";
        let text = self.ends.target.psql("app", sql).unwrap_or_default();
        text.lines().map(str::to_string).collect()
    }

    /// The table that nobody writes was written by one transaction.
    pub fn still_table_was_copied_once(&self) {
        let sql = "select count(distinct xmin::text) from faults.still";
        assert_eq!(self.ends.target.psql("app", sql).unwrap(), "1");
    }

    /// Stops the writer, waits until the stream has passed it, and compares both sides.
    pub async fn assert_exact(&mut self, run: &Walferry) -> Report {
        let report = self.writer.take().unwrap().stop().await;
        let ends = &self.ends;
        let verified = ends.walferry(&["verify"]).await;
        assert_eq!(verified.code, Some(0), "{}\n{}\n{}", verified.out, verified.err, run.so_far());
        let comparison = compare(&ends.source_uri(), &ends.target_uri()).await.unwrap();
        let rows = comparison.differences.iter().filter(|line| !line.starts_with("sequence "));
        assert_eq!(rows.collect::<Vec<_>>(), Vec::<&String>::new());
        for uri in [ends.source_uri(), ends.target_uri()] {
            assert_eq!(broken_invariants(&uri).await.unwrap(), Vec::<String>::new());
            let check = ledger::check(&uri, &report.ledger).await.unwrap();
            assert!(check.is_exact(), "{check:?}");
        }
        report
    }
}

/// Takes locks that stay until [`let_go`].
pub fn hold(server: &Server, name: &str, statements: &str) {
    let sql = format!("begin; {statements}; prepare transaction '{name}'");
    server.psql("app", &sql).unwrap();
}

/// Ends a hold that has written.
pub fn undo(server: &Server, name: &str) {
    server.psql("app", &format!("rollback prepared '{name}'")).unwrap();
}

/// Ends a hold.
pub fn let_go(server: &Server, name: &str) {
    server.psql("app", &format!("commit prepared '{name}'")).unwrap();
}
