//! No server outlives its maker.
//!
//! A test that is killed runs no destructors, and the usual answer (PR_SET_PDEATHSIG) takes unsafe
//! code. So beside each server a shell waits on a pipe that only this process holds: when the
//! process goes, however it goes, the pipe closes, and the shell stops the server and removes its
//! directory. It is a process group of its own, so that Ctrl-C or a kill of our group misses it.

use std::io;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// The pid is believed only while that process runs in our directory: numbers are used again.
const SCRIPT: &str = r#"
cd / && read -r _
pid=$(head -n 1 "$1/$2" 2>/dev/null)
ours() { [ -n "$pid" ] && tr '\0' ' ' <"/proc/$pid/cmdline" 2>/dev/null | grep -qF "$1"; }
if ours "$1"; then
    kill -s "$3" "$pid"
    tries=0
    while ours "$1" && [ $tries -lt 100 ]; do sleep 0.05; tries=$((tries + 1)); done
    if ours "$1"; then kill -s KILL "$pid"; fi
fi
rm -rf "$1"
"#;

/// Watches over one directory and the server in it.
#[derive(Debug)]
pub struct Guard {
    shell: Child,
}

impl Guard {
    /// Once this process is gone, stops what `dir/pid_file` names (SIGQUIT, then SIGKILL) if `dir`
    /// is on its command line, and removes `dir`.
    pub fn watch(dir: &Path, pid_file: &str) -> io::Result<Guard> {
        Self::watch_by(dir, pid_file, "QUIT")
    }

    /// The same by another first signal: a Java only tells its threads on SIGQUIT.
    pub fn watch_by(dir: &Path, pid_file: &str, signal: &str) -> io::Result<Guard> {
        let shell = Command::new("sh")
            .args(["-c", SCRIPT, "walferry-guard"])
            .arg(dir)
            .args([pid_file, signal])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()?;
        Ok(Guard { shell })
    }
}

impl Drop for Guard {
    /// Lets the guard do its work now, and waits for it.
    fn drop(&mut self) {
        drop(self.shell.stdin.take());
        let _ = self.shell.wait();
    }
}
