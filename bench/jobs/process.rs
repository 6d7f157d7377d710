//! A program that is run and measured: wall time, CPU seconds, peak memory.
//!
//! All from /proc: a process that has ended keeps its CPU time there until its parent waits for
//! it, and VmHWM is a high-water mark, so that looking every few milliseconds misses little.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// Between looks at a running process.
const LOOK: Duration = Duration::from_millis(2);

/// USER_HZ, which is 100 on every Linux that Debian makes.
const TICKS_PER_SECOND: f64 = 100.0;

/// What a program took, its ended children counted in as far as CPU goes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Usage {
    /// From its start to its end, in seconds.
    pub seconds: f64,
    /// User and system time, in seconds, to 10 ms.
    pub cpu: f64,
    /// Peak resident memory of the process itself, in bytes.
    pub peak_rss: u64,
}

/// A program under way. Dropped, it is killed.
pub struct Watched {
    child: Child,
    name: String,
    log: PathBuf,
    started: Instant,
    ended: Arc<AtomicBool>,
    peak_kb: Arc<AtomicU64>,
    watcher: Option<JoinHandle<(Instant, f64)>>,
}

impl Watched {
    /// Starts it; what it says goes to `log`.
    pub fn start(command: &mut Command, log: &Path) -> Result<Watched> {
        let name = command.get_program().to_string_lossy().into_owned();
        let out = File::create(log).with_context(|| log.display().to_string())?;
        command.stdin(Stdio::null()).stdout(out.try_clone()?).stderr(out);
        let started = Instant::now();
        let child = command.spawn().with_context(|| name.clone())?;
        let (ended, peak_kb) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let (pid, end, peak) = (child.id(), ended.clone(), peak_kb.clone());
        let watcher = std::thread::spawn(move || {
            while state(pid).is_some_and(|s| s != 'Z') {
                peak.fetch_max(high_water(pid).unwrap_or(0), Ordering::Relaxed);
                std::thread::sleep(LOOK);
            }
            end.store(true, Ordering::SeqCst);
            (Instant::now(), cpu_seconds(pid).unwrap_or(0.0))
        });
        let (log, watcher) = (log.to_path_buf(), Some(watcher));
        Ok(Watched { child, name, log, started, ended, peak_kb, watcher })
    }

    /// True once it is no longer running.
    pub fn has_ended(&self) -> bool {
        self.ended.load(Ordering::SeqCst)
    }

    /// What it has said so far.
    pub fn said(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// Asks it to stop in order, and waits. Any exit code will do.
    pub fn stop(mut self, patience: Duration) -> Result<Usage> {
        let pid = self.child.id().to_string();
        Command::new("kill").args(["-s", "TERM", &pid]).stderr(Stdio::null()).status()?;
        self.end(patience).map(|(usage, _)| usage)
    }

    /// Waits for its end, which must be a good one.
    pub fn finish(mut self, patience: Duration) -> Result<Usage> {
        let (usage, good) = self.end(patience)?;
        if !good {
            let said = self.said();
            let tail: Vec<&str> = said.lines().rev().take(15).collect();
            let tail: Vec<&str> = tail.into_iter().rev().collect();
            bail!("{} failed; the end of what it said:\n{}", self.name, tail.join("\n"));
        }
        Ok(usage)
    }

    fn end(&mut self, patience: Duration) -> Result<(Usage, bool)> {
        let begun = Instant::now();
        while !self.has_ended() {
            if begun.elapsed() > patience {
                bail!("{} did not end within {} s", self.name, patience.as_secs());
            }
            std::thread::sleep(LOOK);
        }
        let joined = self.watcher.take().map(JoinHandle::join);
        let Some(Ok((at, cpu))) = joined else { bail!("the watcher of {} is gone", self.name) };
        let usage = Usage {
            seconds: (at - self.started).as_secs_f64(),
            cpu,
            peak_rss: self.peak_kb.load(Ordering::Relaxed) << 10,
        };
        Ok((usage, self.child.wait()?.success()))
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs a program whose time does not count; what it said on standard output.
pub fn run(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.stdin(Stdio::null()).output().with_context(|| name.clone())?;
    if !output.status.success() {
        bail!("{name} failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn stat(pid: u32) -> Option<Vec<String>> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let rest = text.rsplit_once(')')?.1;
    Some(rest.split_whitespace().map(ToString::to_string).collect())
}

fn state(pid: u32) -> Option<char> {
    stat(pid)?.first()?.chars().next()
}

/// utime, stime, cutime and cstime: fields 14 to 17 of proc(5), of which two come before ours.
fn cpu_seconds(pid: u32) -> Option<f64> {
    let fields = stat(pid)?;
    let ticks: u64 = fields.get(11..15)?.iter().filter_map(|f| f.parse::<u64>().ok()).sum();
    Some(ticks as f64 / TICKS_PER_SECOND)
}

fn high_water(pid: u32) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.split_whitespace().next()?.parse().ok()
}
