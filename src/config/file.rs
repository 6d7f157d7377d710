//! `walferry.toml`.

use std::path::Path;

use serde::Deserialize;

use super::Error;

/// All that may stand in the file; names are those of the options.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct File {
    /// `--name`.
    pub name: Option<String>,
    /// `--source`.
    pub source: Option<String>,
    /// `--target`.
    pub target: Option<String>,
    /// `--include`.
    pub include: Vec<String>,
    /// `--exclude`.
    pub exclude: Vec<String>,
    /// `--schema-only`.
    pub schema_only: Vec<String>,
    /// `--large-objects`.
    pub large_objects: Option<String>,
    /// `--jobs`.
    pub jobs: Option<usize>,
    /// `--buffer`.
    pub buffer: Option<String>,
    /// `--spool-limit`.
    pub spool_limit: Option<String>,
    /// `--wal-budget`.
    pub wal_budget: Option<String>,
    /// `--streaming`.
    pub streaming: Option<String>,
    /// `--streaming-limit`.
    pub streaming_limit: Option<String>,
    /// `--two-phase`.
    pub two_phase: Option<String>,
    /// `--apply`.
    pub apply: Option<String>,
    /// `--publication`.
    pub publication: Option<String>,
    /// `--decoder`.
    pub decoder: Option<String>,
    /// `--transport`.
    pub transport: Option<String>,
    /// `--no-nan`.
    pub no_nan: bool,
    /// `--no-owner`.
    pub no_owner: bool,
    /// `[cutover]`.
    pub cutover: Cutover,
    /// `[tuning]`.
    pub tuning: Tuning,
}

/// `[tuning]`: sizes that have good defaults, for measuring.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Tuning {
    /// A batch closes at so many bytes of changes.
    pub batch_bytes: Option<usize>,
    /// A batch closes at so many source transactions.
    pub batch_transactions: Option<usize>,
    /// So many batches may be on their way to the target.
    pub batches_in_flight: Option<usize>,
    /// Sets of new rows go into the target by COPY.
    pub copy_inserts: Option<bool>,
    /// Integers of sets travel in their binary form.
    pub binary_integers: Option<bool>,
    /// A streaming reader lets messages gather under a backlog.
    pub gather_messages: Option<bool>,
    /// Small tables that are copied, given indexes and analyzed together; 1 is each by itself.
    pub bundle_tables: Option<usize>,
    /// Whether tables copied whole are written frozen.
    pub freeze: Option<bool>,
    /// Whether keys of large tables are built beside their other indexes.
    pub keys_beside: Option<bool>,
    /// maintenance_work_mem of sessions that build indexes, in megabytes, where the target's own is
    /// less; 0 leaves it to the target.
    pub maintenance_work_mem: Option<u64>,
}

/// `[cutover]`: defaults for cutover and rollback.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Cutover {
    /// `--fence`.
    pub fence: Option<String>,
    /// `--refresh`.
    pub refresh: Option<String>,
    /// `--unlogged`.
    pub unlogged: Option<String>,
    /// `--route`.
    pub route: Vec<String>,
    /// `--max-lag`.
    pub max_lag: Option<String>,
    /// `--timeout`.
    pub timeout: Option<String>,
    /// `--lock-timeout`.
    pub lock_timeout: Option<String>,
    /// `--max-hold`.
    pub max_hold: Option<String>,
}

/// Reads `path`, or `walferry.toml` here if `path` is not given and it exists.
pub fn load(path: Option<&Path>) -> Result<File, Error> {
    let default = Path::new("walferry.toml");
    let path = match path {
        Some(path) => path,
        None if default.exists() => default,
        None => return Ok(File::default()),
    };
    let shown = path.display().to_string();
    let text = std::fs::read_to_string(path)
        .map_err(|source| Error::Read { path: shown.clone(), source })?;
    toml::from_str(&text).map_err(|error| {
        let line = error.span().map(|span| {
            1 + text.as_bytes().iter().take(span.start).filter(|b| **b == b'\n').count()
        });
        let line = line.map_or(String::new(), |line| format!("line {line}: "));
        Error::Parse { path: shown, message: format!("{line}{}", error.message()) }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_typo_in_the_file_is_named_with_its_line_and_no_secret() {
        let dir = std::env::temp_dir().join(format!("walferry-toml-{}", std::process::id()));
        std::fs::write(&dir, "source = \"postgres://u:secret@h/d\"\ntargett = \"x\"\n").unwrap();
        let error = load(Some(&dir)).unwrap_err().to_string();
        std::fs::remove_file(&dir).unwrap();
        assert!(error.contains("line 2") && error.contains("targett"), "{error}");
        assert!(!error.contains("secret"), "{error}");
    }
}
