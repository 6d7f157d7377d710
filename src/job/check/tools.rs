//! Programs walferry runs on this machine.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use super::{Check, Finding, Side};

impl Check<'_> {
    /// A pg_dump that can read the source: of the same major version or newer.
    pub(super) async fn tools(&mut self) {
        let source = self.source.major_version();
        let mut versions = Vec::new();
        for path in candidates() {
            versions.extend(version_of(&path).await);
        }
        versions.sort_unstable();
        versions.dedup();
        self.findings.extend(judge(&versions, source));
    }
}

fn judge(versions: &[u32], source: u32) -> Option<Finding> {
    let fix = format!("apt-get install postgresql-client-{source}");
    if versions.is_empty() {
        let message = "is not on this machine: it reads the schema of the source";
        return Some(Finding::error(Side::Here, "pg-dump-missing", "pg_dump", message).fix(fix));
    }
    if versions.iter().any(|version| *version >= source) {
        return None;
    }
    let list: Vec<String> = versions.iter().map(u32::to_string).collect();
    let message = format!(
        "is of version {} here, and cannot read a source of version {source}",
        list.join(", ")
    );
    Some(Finding::error(Side::Here, "pg-dump-old", "pg_dump", message).fix(fix))
}

/// The one in WALFERRY_PG_DUMP alone, else Debian's and those on the PATH.
fn candidates() -> Vec<PathBuf> {
    if let Some(path) = std::env::var_os("WALFERRY_PG_DUMP") {
        return vec![PathBuf::from(path)];
    }
    let mut paths = Vec::new();
    if let Ok(entries) = std::fs::read_dir("/usr/lib/postgresql") {
        paths.extend(entries.flatten().map(|entry| entry.path().join("bin/pg_dump")));
    }
    if let Some(path) = std::env::var_os("PATH") {
        paths.extend(std::env::split_paths(&path).map(|dir| dir.join("pg_dump")));
    }
    paths.retain(|path| path.is_file());
    paths
}

async fn version_of(path: &Path) -> Option<u32> {
    let output = tokio::process::Command::new(path)
        .arg("--version")
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await
        .ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let version = text.split_once("(PostgreSQL)")?.1.trim_start();
    version.chars().take_while(char::is_ascii_digit).collect::<String>().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pg_dump_has_to_be_as_new_as_the_source() {
        assert_eq!(judge(&[15], 15), None);
        assert_eq!(judge(&[13, 17], 15), None);
        assert_eq!(judge(&[14], 15).unwrap().code, "pg-dump-old");
        let missing = judge(&[], 17).unwrap();
        assert_eq!(missing.code, "pg-dump-missing");
        assert!(missing.fix.unwrap().ends_with("postgresql-client-17"));
    }
}
