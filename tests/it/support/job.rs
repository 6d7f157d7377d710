//! The walferry binary as a user runs it, between two servers.

use std::process::Stdio;
use std::time::Duration;

use serde_json::Value;
use tokio::process::{Child, Command};
use walferry::demo::server::Server;

use super::inventory::Inventory;

/// A source and a target, each with an empty database `app`.
pub struct Ends {
    pub source: Server,
    pub target: Server,
}

/// What walferry could leave behind, on both sides.
pub struct Inventories {
    pub source: Inventory,
    pub target: Inventory,
}

impl Ends {
    /// Starts both.
    pub fn start(source_major: u32, target_major: u32) -> Ends {
        let start = |major| Server::start(&Server::bin_of(major).unwrap(), &[]).unwrap();
        let ends = Ends { source: start(source_major), target: start(target_major) };
        for server in [&ends.source, &ends.target] {
            server.psql("postgres", "create database app").unwrap();
        }
        ends
    }

    pub fn source_uri(&self) -> String {
        self.source.uri("app")
    }

    pub fn target_uri(&self) -> String {
        self.target.uri("app")
    }

    /// Runs a command to its end.
    pub fn walferry(&self, args: &[&str]) -> Output {
        walferry(&[args, &["--source", &self.source_uri(), "--target", &self.target_uri()]].concat())
    }

    pub async fn inventory(&self) -> Inventories {
        Inventories {
            source: Inventory::take(&self.source_uri()).await.unwrap(),
            target: Inventory::take(&self.target_uri()).await.unwrap(),
        }
    }
}

/// What a command said.
#[derive(Debug)]
pub struct Output {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Output {
    /// Panics with what it said unless it succeeded.
    #[track_caller]
    pub fn success(self) -> Output {
        assert_eq!(self.code, 0, "stdout: {}\nstderr: {}", self.stdout, self.stderr);
        self
    }

    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap()
    }
}

/// Runs walferry to its end, at most two minutes.
pub fn walferry(args: &[&str]) -> Output {
    let output = std::process::Command::new("timeout")
        .args(["-k", "5", "120", env!("CARGO_BIN_EXE_walferry")])
        .args(args)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    Output {
        code: output.status.code().unwrap_or(-1),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// A `walferry run` in the background.
pub struct Run<'a> {
    ends: &'a Ends,
    child: Child,
}

impl<'a> Run<'a> {
    /// Starts it; its messages go to the test's standard error.
    pub fn start(ends: &'a Ends, args: &[&str]) -> Run<'a> {
        let child = Command::new(env!("CARGO_BIN_EXE_walferry"))
            .arg("run")
            .args(["--source", &ends.source_uri(), "--target", &ends.target_uri()])
            .args(args)
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        Run { ends, child }
    }

    /// Waits until status shows the phase; panics after a minute, or when the run has ended in error.
    pub async fn until_phase(&self, phase: &str) {
        let mut last = String::new();
        for _ in 0..300 {
            let output = self.ends.walferry(&["status", "--json"]);
            if output.code == 0 {
                last = output.json()["phase"].as_str().unwrap().to_string();
                if last == phase {
                    return;
                }
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        panic!("still in phase {last:?} and not {phase} after a minute");
    }

    /// As sudden as it gets.
    pub async fn kill9(mut self) {
        self.child.kill().await.unwrap();
    }

    /// Waits until it ends by itself, and wants success.
    pub async fn ended(mut self) {
        let ended = tokio::time::timeout(Duration::from_secs(60), self.child.wait()).await;
        assert!(ended.expect("the run did not end").unwrap().success());
    }

    /// Ctrl-C, and wants success.
    pub async fn stop(self) {
        let pid = self.child.id().unwrap();
        std::process::Command::new("kill").args(["-INT", &pid.to_string()]).status().unwrap();
        self.ended().await;
    }
}
