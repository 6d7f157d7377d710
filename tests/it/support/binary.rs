//! The built walferry as a child process: run, watched, killed.

use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::process::{Child, Command};
use walferry::demo::binaries;

/// A walferry under way. Dropped, it is killed.
#[derive(Debug)]
pub struct Walferry {
    child: Child,
    lines: Lines,
    readers: Vec<tokio::task::JoinHandle<()>>,
}

/// What it has written, stdout and stderr apart.
#[derive(Clone, Debug, Default)]
struct Lines {
    out: Arc<Mutex<Vec<String>>>,
    err: Arc<Mutex<Vec<String>>>,
}

/// How it ended.
#[derive(Clone, Debug)]
pub struct Ended {
    /// The exit code; `None` after a signal.
    pub code: Option<i32>,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
}

impl Walferry {
    /// Starts it with these arguments.
    pub fn spawn(arguments: &[&str]) -> Walferry {
        Self::spawn_with(arguments, &[])
    }

    /// Starts it with these arguments and environment variables; libpq's and walferry's own are
    /// not inherited.
    pub fn spawn_with(arguments: &[&str], environment: &[(&str, &str)]) -> Walferry {
        // WALFERRY_BINARY: another build of it, for measuring.
        let built = std::env::var("WALFERRY_BINARY");
        let mut command = Command::new(built.as_deref().unwrap_or(env!("CARGO_BIN_EXE_walferry")));
        for (name, _) in std::env::vars() {
            if name.starts_with("PG") || name.starts_with("WALFERRY_") {
                command.env_remove(name);
            }
        }
        // pg_dump 18 beside Debian's 15: walferry takes the lowest that can read the source.
        let path = std::env::var_os("PATH").unwrap_or_default();
        let dirs = std::env::split_paths(&path).chain(binaries::client_dirs());
        command.env("PATH", std::env::join_paths(dirs).unwrap());
        command.args(arguments).envs(environment.iter().copied()).kill_on_drop(true);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let lines = Lines::default();
        let readers = vec![
            collect(child.stdout.take().unwrap(), lines.out.clone()),
            collect(child.stderr.take().unwrap(), lines.err.clone()),
        ];
        Walferry { child, lines, readers }
    }

    /// Runs it to its end.
    pub async fn run(arguments: &[&str]) -> Ended {
        Self::spawn(arguments).ended().await
    }

    /// Waits for its end, two minutes at most, or as many seconds as WALFERRY_PATIENCE says.
    pub async fn ended(mut self) -> Ended {
        let patience = std::env::var("WALFERRY_PATIENCE").ok().and_then(|s| s.parse().ok());
        let limit = Duration::from_secs(patience.unwrap_or(120));
        let Ok(status) = tokio::time::timeout(limit, self.child.wait()).await else {
            panic!("still running after {limit:?}:\n{}", self.so_far());
        };
        for reader in self.readers.drain(..) {
            reader.await.unwrap();
        }
        let code = status.unwrap().code();
        let [out, err] = [&self.lines.out, &self.lines.err].map(|l| l.lock().unwrap().join("\n"));
        Ended { code, out, err }
    }

    /// True once it has ended.
    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    /// The process id, while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    /// Everything written so far.
    pub fn so_far(&self) -> String {
        let [out, err] = [&self.lines.out, &self.lines.err].map(|l| l.lock().unwrap().join("\n"));
        format!("{out}\n{err}")
    }

    /// Waits until a line of either output contains `text`; panics if it ends without.
    pub async fn says(&mut self, text: &str) {
        super::until_within(Duration::from_secs(60), text, || {
            let said = self.so_far();
            let ended = self.child.try_wait().unwrap().is_some();
            assert!(!ended || said.contains(text), "ended without \"{text}\":\n{said}");
            std::future::ready(said.contains(text))
        })
        .await;
    }

    /// kill -9, now. Returns when it is gone.
    pub async fn kill9(mut self) {
        let _ = self.child.kill().await;
    }

    /// kill -9 after some time; true if it was still running then, else it ended on its own.
    pub async fn kill9_after(mut self, wait: Duration) -> bool {
        let ended = tokio::time::timeout(wait, self.child.wait()).await.is_ok();
        let _ = self.child.kill().await;
        !ended
    }

    /// Sends a signal such as `INT`.
    pub fn signal(&self, name: &str) {
        let pid = self.child.id().unwrap().to_string();
        let script = "kill -s \"$1\" \"$2\"";
        let status = std::process::Command::new("sh").args(["-c", script, "", name, &pid]).status();
        assert!(status.unwrap().success());
    }
}

impl Ended {
    /// Standard output as JSON; panics with all output if it is none.
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.out).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }

    /// The same if it ended well, else null.
    pub fn json_if_done(&self) -> serde_json::Value {
        if self.code == Some(0) { self.json() } else { serde_json::Value::Null }
    }

    /// Panics with all output unless it ended well.
    pub fn expect_success(self) -> Ended {
        assert_eq!(self.code, Some(0), "stdout:\n{}\nstderr:\n{}", self.out, self.err);
        self
    }
}

fn collect(
    from: impl AsyncRead + Unpin + Send + 'static,
    into: Arc<Mutex<Vec<String>>>,
) -> tokio::task::JoinHandle<()> {
    tokio::spawn(async move {
        let mut lines = BufReader::new(from).lines();
        while let Ok(Some(line)) = lines.next_line().await {
            into.lock().unwrap().push(line);
        }
    })
}
