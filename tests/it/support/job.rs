//! A job between two servers, driven by the commands a user would type.

use std::time::Duration;

use serde_json::Value;
use walferry::demo::pgbouncer::PgBouncer;
use walferry::demo::server::Server;

use super::binary::{Ended, Walferry};
use super::inventory::Inventory;

/// A source and a target, each with an empty database `app`.
pub struct Ends {
    pub source: Server,
    pub target: Server,
    /// Where walferry connects to; not the servers themselves where a proxy stands between.
    pub source_via: String,
    pub target_via: String,
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
        let (source_via, target_via) = (source.uri("app"), target.uri("app"));
        Ends { source, target, source_via, target_via }
    }

    pub fn source_uri(&self) -> String {
        self.source.uri("app")
    }

    pub fn target_uri(&self) -> String {
        self.target.uri("app")
    }

    /// Starts a command.
    pub fn spawn(&self, arguments: &[&str]) -> Walferry {
        let environment =
            [("WALFERRY_SOURCE", &*self.source_via), ("WALFERRY_TARGET", &*self.target_via)];
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
        let ended = self.walferry(&["status", "--json"]).await;
        if ended.code == Some(0) { ended.json() } else { Value::Null }
    }

    /// Waits until status shows the phase; panics after two minutes, or when no runner is left.
    pub async fn until_phase(&self, run: &mut Walferry, phase: &str) {
        let mut last = Value::Null;
        for _ in 0..300 {
            last = self.status().await;
            if last["phase"] == phase {
                return;
            }
            assert!(!run.has_ended(), "the run ended: {last}\n{}", run.so_far());
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        panic!("not {phase} after two minutes: {last}\n{}", run.so_far());
    }

    /// What is on both sides.
    pub async fn inventories(&self) -> (Inventory, Inventory) {
        (Inventory::take(&self.source_uri()).await, Inventory::take(&self.target_uri()).await)
    }
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
