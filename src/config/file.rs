//! `walferry.toml`.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::Error;
use crate::map::{Section, Shard};
use crate::secret::SecretString;

/// All that may stand in the file; names are those of the options.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
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
    /// `--tables-only`.
    pub tables_only: bool,
    /// `--large-objects`.
    pub large_objects: Option<String>,
    /// `--initial-copy`.
    pub initial_copy: Option<String>,
    /// `--from-lsn`.
    pub from_lsn: Option<String>,
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
    /// `--failover`.
    pub failover: Option<String>,
    /// `--after-failover`.
    pub after_failover: Option<String>,
    /// `--standby`.
    pub standby: Vec<String>,
    /// `--decode-from`.
    pub decode_from: Option<String>,
    /// `--two-way`.
    pub two_way: bool,
    /// `--on-conflict`.
    pub on_conflict: Option<String>,
    /// `--apply`.
    pub apply: Option<String>,
    /// `--on-row-error`.
    pub on_row_error: Option<String>,
    /// `--ddl`.
    pub ddl: Option<String>,
    /// `--heartbeat`.
    pub heartbeat: Option<String>,
    /// `--heartbeat-sql`.
    pub heartbeat_sql: Option<String>,
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
    /// `[[map]]`.
    pub map: Vec<Section>,
    /// Of reshard: the URIs of all sources.
    pub sources: Vec<String>,
    /// Of reshard: the URIs of all targets.
    pub targets: Vec<String>,
    /// Of reshard: `[[shard]]`.
    pub shard: Vec<Shard>,
    /// Of reshard: tables that go to every target whole.
    pub reference: Vec<String>,
    /// A file that holds the key of hash masks, where WALFERRY_MAP_KEY does not.
    pub map_key_file: Option<PathBuf>,
    /// `--one-way`.
    pub one_way: bool,
    /// `[cutover]`.
    pub cutover: Cutover,
    /// `[tuning]`.
    pub tuning: Tuning,
    /// `[kafka]`.
    pub kafka: Kafka,
}

/// `[kafka]`: settings of librdkafka, as `kafka.security.protocol = "SASL_SSL"`. May hold
/// passwords.
#[derive(Clone, Default, PartialEq, Deserialize)]
#[serde(transparent)]
pub struct Kafka(toml::Table);

impl std::fmt::Debug for Kafka {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

impl Kafka {
    /// Names and values. TOML reads the dots of a name as tables in tables; here they are dots
    /// again.
    pub fn pairs(&self) -> Result<Vec<(String, SecretString)>, Error> {
        let mut pairs = Vec::new();
        flatten("", &self.0, &mut pairs)?;
        Ok(pairs)
    }
}

fn flatten(
    prefix: &str,
    table: &toml::Table,
    pairs: &mut Vec<(String, SecretString)>,
) -> Result<(), Error> {
    for (key, value) in table {
        let name = format!("{prefix}{key}");
        let text = match value {
            toml::Value::Table(inner) => {
                flatten(&format!("{name}."), inner, pairs)?;
                continue;
            }
            toml::Value::String(text) => text.clone(),
            toml::Value::Integer(number) => number.to_string(),
            toml::Value::Float(number) => number.to_string(),
            toml::Value::Boolean(yes) => yes.to_string(),
            toml::Value::Array(_) | toml::Value::Datetime(_) => {
                let message = format!("kafka.{name} is neither a text nor a number");
                return Err(Error::Value { option: "walferry.toml", message });
            }
        };
        pairs.push((name, SecretString::from(text)));
    }
    Ok(())
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
    /// So many sessions write to the target under a backlog: 1 or 2.
    pub apply_sessions: Option<usize>,
    /// Sets of new rows go into the target by COPY.
    pub copy_inserts: Option<bool>,
    /// Values of sets travel in their binary form, where they have one.
    pub binary_values: Option<bool>,
    /// A small batch is sent behind another that is under way, not only a full one.
    pub eager_batches: Option<bool>,
    /// Rows of a set that go by one unique column are looked up by the array of its values.
    pub delete_by_array: Option<bool>,
    /// Rows that went so are counted by the server's statistics of the transaction.
    pub count_by_server: Option<bool>,
    /// Of a set so many rows go to the target in one execution; 0 for all.
    pub set_rows: Option<usize>,
    /// For so many milliseconds counts of a stream may wait in the row of its progress; 0 writes
    /// their table with every batch.
    pub counters_ms: Option<u64>,
    /// The target is asked every so many milliseconds where its log stands; 0 with every batch.
    pub positions_ms: Option<u64>,
    /// After so many milliseconds without a batch the target is made to flush its log; 0 as soon as
    /// there is nothing to do.
    pub flush_ms: Option<u64>,
    /// Commits of the applier and of the copy do not wait for the target's disk.
    pub async_commit: Option<bool>,
    /// Arrays of sets are taken apart in a list of columns, not in FROM.
    pub unnest_in_select: Option<bool>,
    /// Rows of a set are written in the order of their keys.
    pub sort_keys: Option<bool>,
    /// The target is asked about its tables, and for the job's row, at once and beforehand.
    pub ask_ahead: Option<bool>,
    /// What the target says of its own types is asked once.
    pub keep_types: Option<bool>,
    /// The kernel may give the process huge pages.
    pub huge_pages: Option<bool>,
    /// A backlog of so many bytes of log is read in bulk before it is streamed; 0 for never.
    pub bulk_bytes: Option<u64>,
    /// The source decodes a chunk of a backlog while the one before is taken.
    pub bulk_ahead: Option<bool>,
    /// A committed transaction of up to so many bytes of log is read in bulk; 0 leaves large ones
    /// to the stream.
    pub bulk_transaction_bytes: Option<u64>,
    /// A backlog whose messages have more bytes on average is streamed; 0 for never.
    pub bulk_message_bytes: Option<u64>,
    /// Messages of each chunk of a backlog, or of what is pulled, which grow otherwise.
    pub chunk_messages: Option<u32>,
    /// Small tables that are copied, given indexes and analyzed together; 1 is each by itself.
    pub bundle_tables: Option<usize>,
    /// Tables that are larger are copied in parts of so many bytes at most; 0 is each in one.
    pub part_bytes: Option<u64>,
    /// Rows are copied in binary where both sides read that alike.
    pub binary_copy: Option<bool>,
    /// Whether tables copied whole are written frozen.
    pub freeze: Option<bool>,
    /// Whether keys of large tables are built beside their other indexes.
    pub keys_beside: Option<bool>,
    /// Whether a table gets its indexes while others are still copied.
    pub indexes_beside_copy: Option<bool>,
    /// Whether a table that has its indexes is analyzed while others get theirs.
    pub analyze_beside: Option<bool>,
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
    /// `--read-route`.
    pub read_route: Vec<String>,
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
        // Of a key or a value that is not one of ours, the message says what may be there.
        let form = match toml::from_str::<toml::Table>(&text) {
            Ok(_) => "",
            Err(_) => " (the file is TOML: source = \"postgres://admin@old/shop\")",
        };
        Error::Parse { path: shown, message: format!("{line}{}{form}", error.message()) }
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

    #[test]
    fn a_file_of_another_form_is_told_what_it_should_be() {
        let dir = std::env::temp_dir().join(format!("walferry-yaml-{}", std::process::id()));
        let told = |text: &str| {
            std::fs::write(&dir, text).unwrap();
            load(Some(&dir)).unwrap_err().to_string()
        };
        assert!(told("source: yaml").contains("line 1") && told("{\"a\": 1}").contains("is TOML"));
        assert!(!told("jobs = \"many\"").contains("is TOML"));
        std::fs::remove_file(&dir).unwrap();
    }

    #[test]
    fn names_of_kafka_settings_may_be_written_with_dots_and_values_are_not_shown() {
        let text = "kafka.sasl.password = \"secret\"\nkafka.\"api.version.request\" = true\n\
                    [kafka.ssl]\nca.location = \"/etc/ca.pem\"\n";
        let file: File = toml::from_str(text).unwrap();
        let names = file.kafka.pairs().unwrap().into_iter().map(|(name, _)| name);
        let names: Vec<String> = names.collect();
        assert_eq!(names, ["api.version.request", "sasl.password", "ssl.ca.location"]);
        assert!(!format!("{file:?}").contains("secret"), "{file:?}");
        let list: File = toml::from_str("kafka.debug = [\"all\"]").unwrap();
        assert!(list.kafka.pairs().unwrap_err().to_string().contains("kafka.debug"));
    }
}
