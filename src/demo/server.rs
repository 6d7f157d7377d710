//! A PostgreSQL server of one's own: in a temporary directory, on a free port, gone when dropped.
//!
//! PostgreSQL will not run as root, so under root the server runs as user `postgres`.

use std::io;
use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

/// How a server is stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopMode {
    /// Sessions are ended, the shutdown checkpoint is written.
    Fast,
    /// Like a power cut: recovery on the next start.
    Immediate,
}

impl StopMode {
    fn as_str(self) -> &'static str {
        match self {
            StopMode::Fast => "fast",
            StopMode::Immediate => "immediate",
        }
    }
}

/// A running (or stopped) throw-away server. Stopped and deleted when dropped.
#[derive(Debug)]
pub struct Server {
    bin: PathBuf,
    dir: PathBuf,
    port: u16,
}

impl Server {
    /// Makes a cluster with the binaries in `bin` (a directory holding initdb and pg_ctl) and
    /// starts it with wal_level=logical and `settings` (`name = value` lines). Blocks until it
    /// takes connections. Superuser `postgres`, trust authentication on loopback.
    pub fn start(bin: &Path, settings: &[&str]) -> io::Result<Server> {
        let dir = std::env::temp_dir().join(format!("walferry-{:016x}", fastrand::u64(..)));
        std::fs::create_dir_all(&dir)?;
        own(&dir)?;
        let server = Server { bin: bin.to_path_buf(), dir, port: free_port()? };
        let data = server.data_dir();
        server.run("initdb", |c| {
            c.args(["-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C.UTF-8", "-N", "-D"]);
            c.arg(&data);
        })?;
        let mut conf = format!(
            "port = {}\nlisten_addresses = '127.0.0.1'\nunix_socket_directories = '{}'\n\
             wal_level = logical\nmax_wal_senders = 20\nmax_replication_slots = 20\n\
             max_connections = 200\nfsync = off\nshared_buffers = 128MB\nmax_wal_size = 4GB\n\
             logging_collector = off\n",
            server.port,
            server.dir.display()
        );
        for line in settings {
            conf.push_str(line);
            conf.push('\n');
        }
        let path = data.join("postgresql.conf");
        let text = std::fs::read_to_string(&path)? + "\n" + &conf;
        std::fs::write(&path, text)?;
        server.resume()?;
        Ok(server)
    }

    /// The newest installed server, or the one in `WALFERRY_PG_BIN`.
    pub fn default_bin() -> io::Result<PathBuf> {
        if let Some(bin) = std::env::var_os("WALFERRY_PG_BIN") {
            return Ok(PathBuf::from(bin));
        }
        Self::bin_of(15)
    }

    /// The binaries of one major version, where Debian puts them.
    pub fn bin_of(major: u32) -> io::Result<PathBuf> {
        let bin = PathBuf::from(format!("/usr/lib/postgresql/{major}/bin"));
        if bin.join("initdb").exists() {
            return Ok(bin);
        }
        let message =
            format!("PostgreSQL {major} is not installed: apt-get install postgresql-{major}");
        Err(io::Error::new(io::ErrorKind::NotFound, message))
    }

    /// The port on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
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
        format!("postgres://postgres@127.0.0.1:{}/{dbname}", self.port)
    }

    /// Stops the server; blocks until it is down.
    pub fn stop(&self, mode: StopMode) -> io::Result<()> {
        let data = self.data_dir();
        self.run("pg_ctl", |c| {
            c.args(["stop", "-w", "-m", mode.as_str(), "-D"]).arg(&data);
        })
    }

    /// Starts it again after [`Server::stop`]; blocks until it takes connections.
    pub fn resume(&self) -> io::Result<()> {
        let data = self.data_dir();
        let log = self.dir.join("log");
        self.run("pg_ctl", |c| {
            c.args(["start", "-w", "-t", "60", "-l"]).arg(&log).arg("-D").arg(&data);
        })
    }

    /// Stop and start.
    pub fn restart(&self, mode: StopMode) -> io::Result<()> {
        self.stop(mode)?;
        self.resume()
    }

    /// Runs SQL with psql as the superuser and gives its unaligned output. Blocks.
    pub fn psql(&self, dbname: &str, sql: &str) -> io::Result<String> {
        let output = Command::new("psql")
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

    fn run(&self, program: &str, arguments: impl Fn(&mut Command)) -> io::Result<()> {
        let mut command = Command::new(self.bin.join(program));
        arguments(&mut command);
        command.current_dir(&self.dir).stdin(Stdio::null());
        command.stdout(Stdio::null()).stderr(Stdio::piped());
        if let Some((uid, gid)) = postgres_ids()? {
            command.uid(uid).gid(gid);
        }
        // The postmaster inherits stderr; a pipe held open by it would make output() wait forever.
        let log = std::fs::File::create(self.dir.join(format!("{program}.err")))?;
        let status = command.stderr(log).status()?;
        if status.success() {
            return Ok(());
        }
        let said = std::fs::read_to_string(self.dir.join(format!("{program}.err")))?;
        let log = std::fs::read_to_string(self.dir.join("log")).unwrap_or_default();
        let tail: Vec<&str> = log.lines().rev().take(5).collect();
        Err(io::Error::other(format!("{program} failed: {said} {}", tail.join("; "))))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.stop(StopMode::Immediate);
        std::thread::sleep(Duration::from_millis(10));
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

fn free_port() -> io::Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

/// User and group of `postgres` when we are root, `None` when we are not.
fn postgres_ids() -> io::Result<Option<(u32, u32)>> {
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

fn own(path: &Path) -> io::Result<()> {
    match postgres_ids()? {
        Some((uid, gid)) => std::os::unix::fs::chown(path, Some(uid), Some(gid)),
        None => Ok(()),
    }
}
