//! Shard groups moved between the workers of a real Citus cluster, under writers that go through
//! Citus.
//!
//! Runs wherever the server's packages offer the extension, which Debian's do not: elsewhere each of
//! these tests says that it is skipped, and passes. What can be tested without Citus is in `plain`,
//! against servers with catalogs of its shape.

mod changes;
mod cluster;
mod kills;
mod moves;
mod plain;
mod plain_jobs;
mod runs;
mod stalls;

use serde_json::Value;
use walferry::demo::server::Server;

use crate::support::job::until_phase;
use crate::support::{Ended, Walferry};

pub use cluster::{Cluster, Load};

/// A job that moves one group of co-located shards.
pub struct Move {
    name: String,
    source: String,
    target: String,
    route: String,
    /// The shards' relations.
    pub shards: Vec<String>,
}

impl Move {
    /// Of these relations, between two databases; `route` leads their clients.
    pub fn new(
        name: &str,
        source: &Server,
        target: &Server,
        route: &str,
        shards: &[String],
    ) -> Move {
        Move {
            name: name.to_string(),
            source: source.uri("postgres"),
            target: target.uri("postgres"),
            route: route.to_string(),
            shards: shards.to_vec(),
        }
    }

    pub fn spawn(&self, arguments: &[&str]) -> Walferry {
        let mut words: Vec<&str> = arguments.to_vec();
        words.extend(["--tables-only", "--name", &self.name]);
        words.extend(self.shards.iter().flat_map(|shard| ["--include", shard.as_str()]));
        if matches!(arguments[0], "cutover" | "rollback") {
            words.extend(["--route", &self.route]);
        }
        let environment = [("WALFERRY_SOURCE", &*self.source), ("WALFERRY_TARGET", &*self.target)];
        Walferry::spawn_with(&words, &environment)
    }

    pub async fn command(&self, arguments: &[&str]) -> Ended {
        self.spawn(arguments).ended().await
    }

    pub async fn done(&self, arguments: &[&str]) -> Ended {
        self.command(arguments).await.expect_success()
    }

    pub async fn status(&self) -> Value {
        self.command(&["status", "--json"]).await.json_if_done()
    }

    /// Starts the run and waits until it follows.
    pub async fn follow(&self) -> Walferry {
        let mut run = self.spawn(&["run"]);
        self.until_phase(&mut run, "following").await;
        run
    }

    pub async fn until_phase(&self, run: &mut Walferry, phase: &str) {
        until_phase(&self.target, &self.name, run, phase).await;
    }
}
