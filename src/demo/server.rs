//! A PostgreSQL server of one's own: in a temporary directory, on a free port, gone when dropped.
//!
//! PostgreSQL will not run as root, so under root the server runs as user `postgres`. The
//! postmaster is our child: its pid is known, and its end can be waited for without polling files.

use std::io;
use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use super::guard::Guard;
use super::{binaries, template};
use crate::clock::Deadline;

/// How a server is stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopMode {
    /// Sessions are ended, the shutdown checkpoint is written.
    Fast,
    /// Like a power cut: recovery on the next start.
    Immediate,
}

impl StopMode {
    /// The postmaster's signal.
    /// <https://www.postgresql.org/docs/current/server-shutdown.html>
    fn signal(self) -> &'static str {
        match self {
            StopMode::Fast => "INT",
            StopMode::Immediate => "QUIT",
        }
    }
}

/// A start or stop takes no longer than this, even on a busy machine after a long recovery.
const PATIENCE: Duration = Duration::from_secs(60);

/// Between looks at something that cannot be waited for otherwise.
const POLL: Duration = Duration::from_millis(2);

/// What every server is started with; lines given by the caller follow, and the last one wins.
const SETTINGS: &str = "listen_addresses = '127.0.0.1'\nwal_level = logical\n\
     max_wal_senders = 20\nmax_replication_slots = 20\nmax_connections = 200\n\
     max_prepared_transactions = 10\nfsync = off\nshared_buffers = 128MB\nmax_wal_size = 4GB\n\
     logging_collector = off\n";

/// A running (or stopped) throw-away server. Stopped and deleted when dropped, and when this
/// process is killed.
#[derive(Debug)]
pub struct Server {
    pub(super) bin: PathBuf,
    pub(super) dir: PathBuf,
    port: u16,
    /// Holds the port for us while the server is down.
    _port_claim: TcpListener,
    postmaster: Mutex<Option<Child>>,
    _guard: Guard,
}

impl Server {
    /// Makes a cluster with the binaries in `bin` (a directory holding initdb and postgres) and
    /// starts it with wal_level=logical, fsync=off and `settings` (`name = value` lines; the last
    /// one of a name wins). Blocks until it takes connections, for a fraction of a
    /// second. Superuser `postgres`, trust authentication on loopback.
    pub fn start(bin: &Path, settings: &[&str]) -> io::Result<Server> {
        let server = Self::claim(bin)?;
        template::create(bin, &server.data_dir())?;
        server.configure(&[SETTINGS])?;
        server.configure_place()?;
        server.approve_plugins()?;
        server.configure(settings)?;
        server.resume()?;
        Ok(server)
    }

    /// Minor releases of 2026 let only listed plugins decode, of which wal2json is none by default;
    /// servers before those refuse to start with the setting. Those that know it name it in the
    /// file that initdb wrote.
    fn approve_plugins(&self) -> io::Result<()> {
        let text = std::fs::read_to_string(self.data_dir().join("postgresql.conf"))?;
        if !text.contains("output_plugin_libraries") {
            return Ok(());
        }
        self.configure(&["output_plugin_libraries = 'pgoutput, test_decoding, wal2json'"])
    }

    /// A directory, a port and a guard; no cluster yet.
    pub(super) fn claim(bin: &Path) -> io::Result<Server> {
        let dir = std::env::temp_dir().join(format!("walferry-{:016x}", fastrand::u64(..)));
        std::fs::create_dir_all(&dir)?;
        own(&dir)?;
        let guard = Guard::watch(&dir, "data/postmaster.pid")?;
        let (port, claim) = free_port()?;
        Ok(Server {
            bin: bin.to_path_buf(),
            dir,
            port,
            _port_claim: claim,
            postmaster: Mutex::new(None),
            _guard: guard,
        })
    }

    /// The newest of what tests use by default, PostgreSQL 15, or the directory in
    /// `WALFERRY_PG_BIN`.
    pub fn default_bin() -> io::Result<PathBuf> {
        if let Some(bin) = std::env::var_os("WALFERRY_PG_BIN") {
            return Ok(PathBuf::from(bin));
        }
        Self::bin_of(15)
    }

    /// The binaries of one major version, fetched if need be: [`binaries::bin_of`].
    pub fn bin_of(major: u32) -> io::Result<PathBuf> {
        binaries::bin_of(major)
    }

    /// The port on 127.0.0.1; the same for as long as this value lives.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The directory that holds everything of this server and goes with it.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The data directory.
    pub fn data_dir(&self) -> PathBuf {
        self.dir.join("data")
    }

    /// The directory of the binaries.
    pub fn bin_dir(&self) -> &Path {
        &self.bin
    }

    /// A connection string for the superuser.
    pub fn uri(&self, dbname: &str) -> String {
        self.uri_as("postgres", dbname)
    }

    /// A connection string for any role.
    pub fn uri_as(&self, role: &str, dbname: &str) -> String {
        format!("postgres://{role}@127.0.0.1:{}/{dbname}", self.port)
    }

    /// What the server has logged so far.
    pub fn log(&self) -> String {
        let bytes = std::fs::read(self.dir.join("log")).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The postmaster's pid, `None` while the server is down.
    pub fn pid(&self) -> Option<u32> {
        self.lock().as_ref().map(Child::id)
    }

    /// Adds lines to postgresql.conf; the last line of a name wins. They count from the next
    /// [`Server::reload`] or restart on.
    pub fn configure(&self, lines: &[&str]) -> io::Result<()> {
        let path = self.data_dir().join("postgresql.conf");
        let mut text = std::fs::read_to_string(&path)?;
        for line in lines {
            text.push('\n');
            text.push_str(line);
        }
        text.push('\n');
        std::fs::write(&path, text)
    }

    pub(super) fn configure_place(&self) -> io::Result<()> {
        let sockets = self.dir.display();
        self.configure(&[
            &format!("port = {}", self.port),
            &format!("unix_socket_directories = '{sockets}'"),
        ])
    }

    /// Writes a file of the data directory (pg_hba.conf, server.key, ...) that only the server's
    /// user can read, as PostgreSQL demands of keys.
    pub fn write_data_file(&self, name: &str, text: &str) -> io::Result<()> {
        use std::os::unix::fs::PermissionsExt;
        let path = self.data_dir().join(name);
        std::fs::write(&path, text)?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
        own(&path)
    }

    /// Has the server read its configuration files again. Does not wait for it.
    pub fn reload(&self) -> io::Result<()> {
        match self.pid() {
            Some(pid) => signal("HUP", &[pid]),
            None => Err(io::Error::other("the server is down")),
        }
    }

    /// Stops the server; blocks until it is down. Nothing happens if it is down already.
    pub fn stop(&self, mode: StopMode) -> io::Result<()> {
        let mut postmaster = self.lock();
        let Some(child) = postmaster.as_mut() else { return Ok(()) };
        signal(mode.signal(), &[child.id()])?;
        let deadline = Deadline::after(PATIENCE);
        while child.try_wait()?.is_none() {
            if deadline.passed() {
                return Err(self.failure("the server did not stop"));
            }
            std::thread::sleep(POLL);
        }
        *postmaster = None;
        Ok(())
    }

    /// kill -9 of the postmaster and every process of its, as when the machine goes; blocks until
    /// all are gone. Recovery on the next [`Server::resume`].
    pub fn kill9(&self) -> io::Result<()> {
        let mut postmaster = self.lock();
        let Some(child) = postmaster.as_mut() else { return Ok(()) };
        // Held still first, or it would start children between the look and the blow.
        signal("STOP", &[child.id()])?;
        let mut pids = children(child.id())?;
        pids.push(child.id());
        // A child that ended meanwhile makes kill complain; what counts is that none is left.
        let _ = signal("KILL", &pids);
        child.wait()?;
        *postmaster = None;
        let deadline = Deadline::after(PATIENCE);
        while pids.iter().any(|pid| is_running(*pid)) {
            if deadline.passed() {
                return Err(io::Error::other(format!("processes of {pids:?} survive kill -9")));
            }
            std::thread::sleep(POLL);
        }
        Ok(())
    }

    /// Starts it again after [`Server::stop`] or [`Server::kill9`], on the same port; blocks until
    /// it takes connections. Nothing happens if it is running.
    pub fn resume(&self) -> io::Result<()> {
        let mut postmaster = self.lock();
        if postmaster.is_some() {
            return Ok(());
        }
        let log =
            std::fs::OpenOptions::new().create(true).append(true).open(self.dir.join("log"))?;
        let mut command = Command::new(self.bin.join("postgres"));
        as_postgres(&mut command, &self.dir)?;
        command.arg("-D").arg(self.data_dir());
        command.stdout(log.try_clone()?).stderr(log).process_group(0);
        let mut child = command.spawn()?;
        let deadline = Deadline::after(PATIENCE);
        while !self.is_ready(child.id()) {
            if let Some(status) = child.try_wait()? {
                return Err(self.failure(&format!("the server did not start ({status})")));
            }
            if deadline.passed() {
                let _ = child.kill();
                let _ = child.wait();
                return Err(self.failure("the server did not start in time"));
            }
            std::thread::sleep(POLL);
        }
        *postmaster = Some(child);
        Ok(())
    }

    /// Stop and start.
    pub fn restart(&self, mode: StopMode) -> io::Result<()> {
        self.stop(mode)?;
        self.resume()
    }

    /// Runs SQL with psql as the superuser and gives its unaligned output. Blocks.
    pub fn psql(&self, dbname: &str, sql: &str) -> io::Result<String> {
        let output = Command::new(binaries::client("psql")?)
            .args(["-X", "-A", "-t", "-q", "-v", "ON_ERROR_STOP=1", "-d"])
            .arg(self.uri(dbname))
            .args(["-c", sql])
            .stdin(Stdio::null())
            .output()?;
        if !output.status.success() {
            return Err(io::Error::other(String::from_utf8_lossy(&output.stderr).into_owned()));
        }
        Ok(String::from_utf8_lossy(&output.stdout).trim_end().to_string())
    }

    /// postmaster.pid names this very process in line 1 and its state in line 8 (the file of a
    /// killed server stays behind, and pids are used again). A standby says `standby` when it takes
    /// read-only sessions.
    fn is_ready(&self, pid: u32) -> bool {
        let text = std::fs::read_to_string(self.data_dir().join("postmaster.pid"));
        let text = text.unwrap_or_default();
        let mut lines = text.lines().map(str::trim);
        lines.next() == Some(&pid.to_string()) && matches!(lines.nth(6), Some("ready" | "standby"))
    }

    pub(super) fn failure(&self, what: &str) -> io::Error {
        let log = self.log();
        let tail: Vec<&str> = log.lines().rev().take(20).collect();
        let tail: Vec<&str> = tail.into_iter().rev().collect();
        io::Error::other(format!("{what}; the end of its log:\n{}", tail.join("\n")))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Child>> {
        self.postmaster.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.failure(&format!("the server on port {}", self.port)));
        }
        if self.stop(StopMode::Immediate).is_err() {
            let _ = self.kill9();
        }
        // The guard, dropped next, removes the directory.
    }
}

/// A port that nothing uses, and a claim on it. Below the range that outgoing connections are given
/// (32768 and up), or one of those could take it while the server is down. The claim is a listener
/// on another loopback address: other walferries on this machine see it, the server does not.
pub(super) fn free_port() -> io::Result<(u16, TcpListener)> {
    for _ in 0..1000 {
        let port = fastrand::u16(10_000..32_000);
        let Ok(claim) = TcpListener::bind(("127.0.0.2", port)) else { continue };
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return Ok((port, claim));
        }
    }
    Err(io::Error::other("no free port between 10000 and 32000"))
}

/// Runs a program in `dir` as the user that servers run as; what it says is in the error.
pub(super) fn run_as_postgres(
    program: &Path,
    dir: &Path,
    arguments: impl FnOnce(&mut Command),
) -> io::Result<()> {
    let mut command = Command::new(program);
    as_postgres(&mut command, dir)?;
    arguments(&mut command);
    let output = command
        .output()
        .map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", program.display())))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    Err(io::Error::other(format!("{} failed: {said}", program.display())))
}

/// Under root: as user `postgres`. In a directory which that user can enter.
pub(super) fn as_postgres(command: &mut Command, dir: &Path) -> io::Result<()> {
    command.current_dir(dir).stdin(Stdio::null());
    // libpq's variables are for walferry's own arguments; here they would only surprise.
    for name in ["PGDATA", "PGPORT", "PGHOST", "PGOPTIONS", "PGUSER", "PGDATABASE"] {
        command.env_remove(name);
    }
    if let Some((uid, gid)) = postgres_ids()? {
        command.uid(uid).gid(gid);
    }
    Ok(())
}

/// User and group of `postgres` when we are root, `None` when we are not.
pub(super) fn postgres_ids() -> io::Result<Option<(u32, u32)>> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let euid = status
        .lines()
        .find_map(|l| l.strip_prefix("Uid:"))
        .and_then(|l| l.split_whitespace().nth(1));
    if euid != Some("0") {
        return Ok(None);
    }
    let passwd = std::fs::read_to_string("/etc/passwd")?;
    let mut fields = passwd
        .lines()
        .find(|l| l.starts_with("postgres:"))
        .ok_or_else(|| {
            io::Error::other("running as root needs a user \"postgres\" to run servers as")
        })?
        .split(':');
    let uid = fields.nth(2).and_then(|f| f.parse().ok());
    let gid = fields.next().and_then(|f| f.parse().ok());
    match (uid, gid) {
        (Some(uid), Some(gid)) => Ok(Some((uid, gid))),
        _ => Err(io::Error::other("cannot read user \"postgres\" from /etc/passwd")),
    }
}

/// Gives a file or directory to the user that servers run as.
pub(super) fn own(path: &Path) -> io::Result<()> {
    match postgres_ids()? {
        Some((uid, gid)) => std::os::unix::fs::chown(path, Some(uid), Some(gid)),
        None => Ok(()),
    }
}

/// Sends a signal by the shell's own `kill`: the standard library has none but SIGKILL.
pub(super) fn signal(name: &str, pids: &[u32]) -> io::Result<()> {
    let mut command = Command::new("sh");
    command.args(["-c", "s=$1; shift; kill -s \"$s\" \"$@\"", "kill", name]);
    command.args(pids.iter().map(u32::to_string)).stderr(Stdio::null());
    match command.status()?.success() {
        true => Ok(()),
        false => Err(io::Error::other(format!("no process of {pids:?} to signal"))),
    }
}

/// The direct children of a process.
fn children(parent: u32) -> io::Result<Vec<u32>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse::<u32>().ok()) else {
            continue;
        };
        if stat(pid).is_some_and(|(_, of)| of == parent) {
            found.push(pid);
        }
    }
    Ok(found)
}

/// False also for a zombie: its memory and sockets are gone.
fn is_running(pid: u32) -> bool {
    stat(pid).is_some_and(|(state, _)| state != 'Z')
}

/// State and parent from `/proc/pid/stat`, whose second field may hold spaces and parentheses.
fn stat(pid: u32) -> Option<(char, u32)> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = text.rsplit_once(')')?.1.split_whitespace();
    Some((fields.next()?.chars().next()?, fields.next()?.parse().ok()?))
}
