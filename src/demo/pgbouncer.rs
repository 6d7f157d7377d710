//! A pgbouncer of one's own in front of a server.

use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use super::guard::Guard;
use super::server::{Server, as_postgres, free_port, own};
use crate::clock::Deadline;

/// A start takes milliseconds; a busy machine some more.
const PATIENCE: Duration = Duration::from_secs(10);

/// A running pooler in transaction mode; its clients are let in without passwords. Stopped and
/// deleted when dropped, and when this process is killed.
#[derive(Debug)]
pub struct PgBouncer {
    dir: PathBuf,
    port: u16,
    _port_claim: TcpListener,
    child: Child,
    _guard: Guard,
}

impl PgBouncer {
    /// Starts a pooler that leads `dbnames` to databases of the same names on `server`. Role
    /// `postgres` is its admin and can use all of them. Blocks until it takes connections.
    pub fn start(server: &Server, dbnames: &[&str]) -> io::Result<PgBouncer> {
        let program = find()?;
        let dir = std::env::temp_dir().join(format!("walferry-{:016x}", fastrand::u64(..)));
        std::fs::create_dir_all(&dir)?;
        own(&dir)?;
        let guard = Guard::watch(&dir, "pgbouncer.pid")?;
        let (port, claim) = free_port()?;
        write_ini(&dir, port, server, dbnames)?;
        let log = std::fs::File::create(dir.join("log"))?;
        let mut command = Command::new(program);
        as_postgres(&mut command, &dir)?;
        command.arg(dir.join("pgbouncer.ini")).process_group(0);
        let child = command.stdout(Stdio::null()).stderr(log).spawn()?;
        let mut bouncer = PgBouncer { dir, port, _port_claim: claim, child, _guard: guard };
        let deadline = Deadline::after(PATIENCE);
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            if deadline.passed() || bouncer.child.try_wait()?.is_some() {
                return Err(io::Error::other(format!("pgbouncer: {}", bouncer.log())));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(bouncer)
    }

    /// The port on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// A connection string for role `postgres` through the pooler.
    pub fn uri(&self, dbname: &str) -> String {
        format!("postgres://postgres@127.0.0.1:{}/{dbname}", self.port)
    }

    /// A connection string of the admin console.
    pub fn admin_uri(&self) -> String {
        self.uri("pgbouncer")
    }

    /// The configuration file. Its `[databases]` lines are `name = host=... port=... dbname=...`.
    pub fn ini_path(&self) -> PathBuf {
        self.dir.join("pgbouncer.ini")
    }

    /// What it has logged so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.join("log")).unwrap_or_default()
    }
}

impl Drop for PgBouncer {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the log of pgbouncer on port {}:\n{}", self.port, self.log());
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Debian puts it where only root's PATH looks.
fn find() -> io::Result<PathBuf> {
    let found = super::binaries::client("pgbouncer").ok();
    let debian = || Some(PathBuf::from("/usr/sbin/pgbouncer")).filter(|path| path.exists());
    found.or_else(debian).ok_or_else(|| {
        let message = "pgbouncer is not installed: apt-get install pgbouncer";
        io::Error::new(io::ErrorKind::NotFound, message)
    })
}

fn write_ini(dir: &Path, port: u16, server: &Server, dbnames: &[&str]) -> io::Result<()> {
    let place = dir.display();
    let mut ini = "[databases]\n".to_string();
    for name in dbnames {
        let there = server.port();
        ini.push_str(&format!("{name} = host=127.0.0.1 port={there} dbname={name}\n"));
    }
    // Drivers send options and extra_float_digits at the start; the pooler would refuse them.
    ini.push_str(&format!(
        "\n[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir = {place}\n\
         pidfile = {place}/pgbouncer.pid\nauth_type = trust\nauth_file = {place}/users\n\
         admin_users = postgres\npool_mode = transaction\nmax_client_conn = 500\n\
         default_pool_size = 50\nserver_login_retry = 0.1\n\
         ignore_startup_parameters = options,extra_float_digits\n\
         log_connections = 0\nlog_disconnections = 0\n"
    ));
    std::fs::write(dir.join("users"), "\"postgres\" \"\"\n")?;
    std::fs::write(dir.join("pgbouncer.ini"), ini)?;
    own(&dir.join("users"))?;
    own(&dir.join("pgbouncer.ini"))
}
