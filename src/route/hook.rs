//! A command of the user's, run once for each phase.

use std::collections::VecDeque;
use std::fmt;
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::Command;

use super::{Context, Error, Result};
use crate::id::Stream;
use crate::pg::Config;
use crate::secret::{ExposeSecret, redact};

/// A hook that has not ended by then is killed: it stands between the fence and the switch, and
/// nothing that takes longer belongs there.
const LIMIT: Duration = Duration::from_secs(30);

/// How much of a hook's stderr is shown: its end, where the reason is.
const SAID_BYTES: usize = 2048;

/// A command run with `sh -c`.
///
/// In its environment: `WALFERRY_PHASE` (check, hold, switch, release, undo), `WALFERRY_JOB`,
/// `WALFERRY_FLIP` (cutover, rollback), `WALFERRY_CLIENTS` (all, or readers, where only those are
/// led), `WALFERRY_TABLES` (where a group of tables is led: `schema.table` as SQL writes it, one a
/// line), `WALFERRY_WAIT_MS` in phase hold, and `WALFERRY_SOURCE_`
/// and `WALFERRY_TARGET_` `HOST`, `PORT`, `DBNAME`, `USER` (of several hosts a list, as libpq has
/// it). No passwords. Any phase may come twice; exit 0 for a phase that means nothing to it.
#[derive(Clone, Debug)]
pub struct Hook {
    command: String,
    limit: Duration,
}

impl Hook {
    pub(super) fn parse(command: &str) -> Result<Hook> {
        if command.trim().is_empty() {
            return Err(Error::Usage("the hook has no command".to_string()));
        }
        Ok(Hook { command: command.to_string(), limit: LIMIT })
    }

    /// The same with another time limit than 30 s.
    pub fn with_limit(mut self, limit: Duration) -> Hook {
        self.limit = limit;
        self
    }

    pub(super) fn by_hand(&self, context: &Context, switched: bool) -> String {
        let phase = if switched { "release" } else { "undo" };
        let variables = environment(phase, context, None);
        let variables: Vec<String> = variables.iter().map(shown).collect();
        let command = cleaned(&self.command, context);
        format!("do what the hook does in phase {phase}: {} {command}", variables.join(" "))
    }

    /// Runs one phase; an exit status other than 0 is an error, and so is taking too long.
    pub(super) async fn run(
        &self,
        phase: &'static str,
        context: &Context,
        wait: Option<Duration>,
    ) -> Result<()> {
        let failed = |outcome: String, said: String| Error::Hook {
            command: cleaned(&self.command, context),
            phase,
            outcome,
            said,
        };
        let mut command = Command::new("sh");
        command.arg("-c").arg(&self.command).envs(environment(phase, context, wait));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        command.process_group(0).kill_on_drop(true);
        let spawned = command.spawn();
        let mut child =
            spawned.map_err(|e| failed(format!("cannot run sh: {e}"), String::new()))?;
        let mut group = Group(child.id());
        let tail = Arc::new(Mutex::new(VecDeque::new()));
        let reading = tokio::spawn(keep_tail(child.stderr.take(), tail.clone()));
        let ended = tokio::time::timeout(self.limit, child.wait()).await;
        if ended.is_err() {
            group.kill();
            let _ = child.wait().await;
        }
        // Ended by itself: what it left running on purpose may go on.
        group.0 = None;
        // What it said is in the pipe by now; a child of its own may keep the pipe open for ever.
        let _ = tokio::time::timeout(Duration::from_millis(200), reading).await;
        let said = said(&tail, context);
        match ended {
            Ok(Ok(status)) if status.success() => Ok(()),
            Ok(Ok(status)) => Err(failed(format!("failed ({status})"), said)),
            Ok(Err(error)) => Err(failed(error.to_string(), said)),
            Err(_) => {
                let limit = self.limit.as_secs_f64();
                Err(failed(format!("did not end within {limit} s and was killed"), said))
            }
        }
    }
}

impl fmt::Display for Hook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "hook {}", redact(&self.command))
    }
}

fn environment(phase: &str, context: &Context, wait: Option<Duration>) -> Vec<(String, String)> {
    let flip = match context.flip {
        Stream::Forward => "cutover",
        Stream::Reverse => "rollback",
    };
    let mut variables = vec![
        ("WALFERRY_PHASE".to_string(), phase.to_string()),
        ("WALFERRY_JOB".to_string(), context.job.to_string()),
        ("WALFERRY_FLIP".to_string(), flip.to_string()),
        ("WALFERRY_CLIENTS".to_string(), if context.reads { "readers" } else { "all" }.to_string()),
    ];
    if let Some(group) = context.group() {
        let tables: Vec<String> = group.iter().map(ToString::to_string).collect();
        variables.push(("WALFERRY_TABLES".to_string(), tables.join("\n")));
    }
    if let Some(wait) = wait {
        variables.push(("WALFERRY_WAIT_MS".to_string(), wait.as_millis().to_string()));
    }
    for (side, config) in [("SOURCE", &context.source), ("TARGET", &context.target)] {
        let hosts: Vec<&str> = config.hosts.iter().map(|h| h.host.as_str()).collect();
        let ports: Vec<String> = config.hosts.iter().map(|h| h.port.to_string()).collect();
        for (name, value) in [
            ("HOST", hosts.join(",")),
            ("PORT", ports.join(",")),
            ("DBNAME", config.dbname.clone()),
            ("USER", config.user.clone()),
        ] {
            variables.push((format!("WALFERRY_{side}_{name}"), value));
        }
    }
    variables
}

/// A variable as a shell takes it.
fn shown((name, value): &(String, String)) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_.,/:-".contains(c);
    match value.chars().all(plain) {
        true => format!("{name}={value}"),
        false => format!("{name}='{}'", value.replace('\'', "'\\''")),
    }
}

/// Reads to the end, keeping only the last bytes, so that a chatty hook neither blocks nor fills
/// our memory.
async fn keep_tail(pipe: Option<impl AsyncRead + Unpin>, tail: Arc<Mutex<VecDeque<u8>>>) {
    let Some(mut pipe) = pipe else { return };
    let mut piece = [0u8; 4096];
    while let Ok(count @ 1..) = pipe.read(&mut piece).await {
        let mut tail = tail.lock().unwrap_or_else(PoisonError::into_inner);
        tail.extend(piece.iter().take(count));
        let surplus = tail.len().saturating_sub(SAID_BYTES);
        tail.drain(..surplus);
    }
}

fn said(tail: &Mutex<VecDeque<u8>>, context: &Context) -> String {
    let mut tail = tail.lock().unwrap_or_else(PoisonError::into_inner);
    let text = String::from_utf8_lossy(tail.make_contiguous()).trim().to_string();
    if text.is_empty() { text } else { format!(": {}", cleaned(&text, context)) }
}

/// `text` without the passwords of either side, and without what looks like one.
fn cleaned(text: &str, context: &Context) -> String {
    let mut text = redact(text);
    let secrets = |config: &Config| -> Vec<String> {
        let found = config.hosts.iter().filter_map(|host| config.password_for(host));
        found.map(|secret| secret.expose_secret().to_string()).collect()
    };
    for secret in [secrets(&context.source), secrets(&context.target)].concat() {
        if !secret.is_empty() {
            text = text.replace(&secret, "***");
        }
    }
    text
}

/// A hook's process group. Dropping it, as when the time for a flip runs out in the middle of the
/// hook, kills what is in it: a command that lived on would switch clients after the undoing.
struct Group(Option<u32>);

impl Group {
    /// Kills the shell and everything it started, and returns once that is done. By the shell's own
    /// `kill`: the standard library has no call for a process group, and this is no reason for a
    /// crate. Blocks for milliseconds, as nothing may come between it and an undo.
    fn kill(&mut self) {
        let Some(group) = self.0.take() else { return };
        let mut command = std::process::Command::new("sh");
        command.args(["-c", "kill -s KILL -- \"-$0\"", &group.to_string()]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        if let Err(error) = command.status() {
            tracing::warn!(%error, group, "cannot kill a hook's process group");
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.kill();
    }
}
