//! The machine and the settings that figures belong to.

use std::process::Command;

use anyhow::Result;
use serde::{Deserialize, Serialize};
use walferry::demo::server::Server;

use crate::pair::{cores, settings};
use crate::process::run;

/// Everything a reader needs to judge a figure by.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Machine {
    pub cores: usize,
    pub cpu: String,
    pub memory_gb: f64,
    pub kernel: String,
    /// Load averages when the scenario began: a busy machine shows here.
    pub load: String,
    pub versions: Vec<String>,
    /// Of both servers alike.
    pub settings: Vec<String>,
}

impl Machine {
    /// Asks the machine.
    pub fn describe(smoke: bool) -> Result<Machine> {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let field = |text: &str, name: &str| {
            let line = text.lines().find(|line| line.starts_with(name)).unwrap_or_default();
            line.split_once(':').map_or(String::new(), |(_, value)| value.trim().to_string())
        };
        let kb: f64 = field(&read("/proc/meminfo"), "MemTotal")
            .split_whitespace()
            .next()
            .and_then(|word| word.parse().ok())
            .unwrap_or(0.0);
        let load: Vec<String> =
            read("/proc/loadavg").split_whitespace().take(3).map(ToString::to_string).collect();
        let postgres = Server::default_bin()?.join("postgres");
        let mut versions = vec![
            format!("walferry {}", env!("CARGO_PKG_VERSION")),
            run(Command::new(postgres).arg("--version"))?.trim().to_string(),
        ];
        {
            let package = "pgcopydb";
            let mut query = Command::new("dpkg-query");
            let asked = run(query.args(["-W", "-f", "${Package} ${Version}", package]));
            versions.push(asked.unwrap_or_else(|_| format!("{package}: not installed")));
        }
        let build = if cfg!(debug_assertions) { "debug build" } else { "release build" };
        versions.push(build.to_string());
        Ok(Machine {
            cores: cores(),
            cpu: field(&read("/proc/cpuinfo"), "model name"),
            memory_gb: kb / f64::from(1 << 20),
            kernel: read("/proc/sys/kernel/osrelease").trim().to_string(),
            load: load.join(" "),
            versions,
            settings: settings(smoke),
        })
    }

    /// One paragraph.
    pub fn text(&self) -> String {
        format!(
            "{} cores ({}), {:.0} GB, Linux {}, load {} at the beginning. {}. Both servers: {}.",
            self.cores,
            self.cpu,
            self.memory_gb,
            self.kernel,
            self.load,
            self.versions.join(", "),
            self.settings.join(", ")
        )
    }
}
