//! Options that most commands share.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use super::brought::{self, BroughtArgs};
use super::failover::FailoverArgs;
use super::{mapping, tuning};
use crate::apply::conflict::Policy as Settling;
use crate::apply::{Mode, OnRowError};
use crate::buffer::durable::KafkaProperties;
use crate::config::{self, File, parse_duration, parse_size};
use crate::decode::Plugin;
use crate::id::JobName;
use crate::job::opening::Half;
use crate::job::place::{Buffer, KafkaPlace};
use crate::job::reading::Wanted;
use crate::job::routes::RouteSecrets;
use crate::job::store::JobOptions;
use crate::job::{self, JobConfig};
use crate::pg::Config;
use crate::schema::policy::Policy;
use crate::secret::SecretString;

/// Name of a job that was not given one.
const DEFAULT_NAME: &str = "main";

/// Heads of the lists that a command's own options are followed by.
const WHICH: &str = "Which job";
pub(super) const MOVED: &str = "What is moved";
pub(super) const READ: &str = "How the source is read";
const KEPT: &str = "How changes are kept and written";

/// Which job.
#[derive(Clone, Debug, Default, Args)]
pub struct JobArgs {
    /// Where rows come from: a libpq URI or key=value string
    #[arg(long, value_name = "URI", env = "WALFERRY_SOURCE", hide_env_values = true,
        help_heading = WHICH)]
    pub source: Option<String>,
    /// Where they go; the job's own tables live there too, in schema walferry
    #[arg(long, value_name = "URI", env = "WALFERRY_TARGET", hide_env_values = true,
        help_heading = WHICH)]
    pub target: Option<String>,
    /// The job's name: part of the names of slot, publication and origin [default: main]
    #[arg(long, value_name = "NAME", env = "WALFERRY_NAME", help_heading = WHICH)]
    pub name: Option<String>,
    /// A file with these options [default: walferry.toml, if there is one]
    #[arg(short, long, value_name = "FILE", help_heading = WHICH)]
    pub config: Option<PathBuf>,
    /// Only these tables (schema.table, with * and ?); may be given again
    #[arg(long, value_name = "TABLE", help_heading = MOVED)]
    pub include: Vec<String>,
    /// Not these tables; may be given again
    #[arg(long, value_name = "TABLE", help_heading = MOVED)]
    pub exclude: Vec<String>,
    /// Create these tables and leave their rows behind; may be given again
    #[arg(long, value_name = "TABLE", help_heading = MOVED)]
    pub schema_only: Vec<String>,
    /// Only the tables of --include and what belongs to them (indexes, keys, triggers, grants, the
    /// sequences they own), into a database that has all else: shards of a cluster, for one
    #[arg(long, help_heading = MOVED)]
    pub tables_only: bool,
    /// Whether large objects move: copy or leave [default: copy, but leave with --include]
    #[arg(long, value_name = "WHAT", help_heading = MOVED)]
    pub large_objects: Option<String>,
    /// A copy that somebody else made.
    #[command(flatten)]
    pub own_copy: BroughtArgs,
    /// Tables copied, and indexes built, at the same time [default: 4]
    #[arg(short, long, value_name = "N", help_heading = KEPT)]
    pub jobs: Option<usize>,
    /// How changes are written: row (one by one), set (the net change of a batch), or auto
    /// [default: auto]
    #[arg(long, value_name = "ORDER", value_parser = str::parse::<Mode>, help_heading = KEPT)]
    pub apply: Option<Mode>,
    /// What becomes of a row that the target refuses: stop, or quarantine, which keeps it and all
    /// later changes of its table aside while other tables go on [default: stop]
    #[arg(long, value_name = "WHAT", value_parser = str::parse::<OnRowError>, help_heading = KEPT)]
    pub on_row_error: Option<OnRowError>,
    /// What is done on the target where a table of the source is altered: apply (at its place in
    /// the stream), hold (keep the table's changes until the SQL was run) or stop; or by class, as
    /// in hold,add-column=apply [default: what does not fit stops]
    #[arg(long, value_name = "POLICY", value_parser = str::parse::<Policy>, help_heading = KEPT)]
    pub ddl: Option<Policy>,
    /// Write something of ours into the source's log this often, and measure lag by it while nobody
    /// else writes [default: never]
    #[arg(long, value_name = "TIME", value_parser = parse_duration, help_heading = READ)]
    pub heartbeat: Option<Duration>,
    /// The statement for each beat, tables named with their schema [default: a logical message, or
    /// a row of our own; with this alone every 10s]
    #[arg(long, value_name = "SQL", help_heading = READ)]
    pub heartbeat_sql: Option<String>,
    /// Read the source by this publication, which an administrator made; its row filters, column
    /// lists and operations are what the job is of
    #[arg(long, value_name = "NAME", help_heading = READ)]
    pub publication: Option<String>,
    /// What decodes the source's log: pgoutput, wal2json, test_decoding or auto [default: auto]
    #[arg(long, value_name = "PLUGIN", help_heading = READ)]
    pub decoder: Option<String>,
    /// How it is read: stream (replication protocol), pull (SQL) or auto [default: auto]
    #[arg(long, value_name = "KIND", help_heading = READ)]
    pub transport: Option<String>,
    /// No column holds NaN or an infinity, which wal2json before 2.6 cannot tell from NULL
    #[arg(long, help_heading = READ)]
    pub no_nan: bool,
    /// There will be no way back: what a job whose walferry.toml has a [[map]] must be told, and
    /// its cutover once more
    #[arg(long, help_heading = MOVED)]
    pub one_way: bool,
    /// Leave owners and grants behind
    #[arg(long, help_heading = MOVED)]
    pub no_owner: bool,
    /// Where changes wait for the target: memory; spool, files on this host (in DIR, or
    /// ~/.local/state/walferry); or kafka, a topic of one partition (and TOPIC.reverse for the way
    /// back) [default: as the job had it, memory for a new one]
    #[arg(long, value_name = "memory|spool[:DIR]|kafka:BROKERS/TOPIC", env = "WALFERRY_BUFFER",
        help_heading = KEPT)]
    pub buffer: Option<String>,
    /// Limit of a stream's spool, or of what the target lacks of a topic; beyond, WAL stays on the
    /// source [default: 100GB]
    #[arg(long, value_name = "SIZE", help_heading = KEPT)]
    pub spool_limit: Option<String>,
    /// Until the source keeps so much WAL, it is told only what the target has; from half of it on,
    /// what the spool or topic has [default: a third of its max_slot_wal_keep_size, at most 10GB]
    #[arg(long, value_name = "SIZE", help_heading = KEPT)]
    pub wal_budget: Option<String>,
    /// Have the source send large transactions while they are in progress, on or off: 14 and newer,
    /// pgoutput by stream [default: off]
    #[arg(long, value_name = "on|off", help_heading = READ)]
    pub streaming: Option<String>,
    /// Disk that transactions in progress may take here; beyond, the source keeps them
    /// [default: 10GB]
    #[arg(long, value_name = "SIZE", help_heading = READ)]
    pub streaming_limit: Option<String>,
    /// Prepare on the target what is prepared on the source, on or off: 15 and newer, pgoutput by
    /// stream; a slot read so once is read so for ever [default: off, they arrive at their commit]
    #[arg(long, value_name = "on|off", help_heading = READ)]
    pub two_phase: Option<String>,
    /// Applications write to both sides from the moment that the target is level (phase following)
    #[arg(long, help_heading = KEPT)]
    pub two_way: bool,
    /// Who wins where both sides change a row at the same time: last-commit, source, target,
    /// greatest:COLUMN (the row with the greater value there; of tables without it
    /// greatest:COLUMN,last-commit or another), or error, which stops [default: as the job had it,
    /// last-commit for a new one]
    #[arg(long, value_name = "WHO", value_parser = str::parse::<Settling>, help_heading = KEPT)]
    pub on_conflict: Option<Settling>,
    #[command(flatten)]
    pub standbys: FailoverArgs,
}

impl JobArgs {
    /// The options file.
    pub fn file(&self) -> Result<File, config::Error> {
        config::load(self.config.as_deref())
    }

    /// The job, its home, and the source if it is given: what status needs.
    pub fn home(&self) -> anyhow::Result<(JobName, Config, Option<Config>)> {
        let (job, source, target) = self.sides()?;
        let missing = missing("the target", "target", "WALFERRY_TARGET");
        Ok((job, target.ok_or(missing)?, source))
    }

    /// The job, its source, and the target if it is given: what is needed where that is gone.
    pub fn source_first(&self) -> anyhow::Result<(JobName, Config, Option<Config>)> {
        let (job, source, target) = self.sides()?;
        let missing = missing("the source", "source", "WALFERRY_SOURCE");
        Ok((job, source.ok_or(missing)?, target))
    }

    fn sides(&self) -> anyhow::Result<(JobName, Option<Config>, Option<Config>)> {
        let file = self.file()?;
        let side = |given: Option<String>, label| {
            let config = given.map(|text| Config::parse(&text)).transpose();
            config.map(|config| config.map(|config| config.labelled(label)))
        };
        let source = side(self.source.clone().or(file.source), "source")?;
        let target = side(self.target.clone().or(file.target), "target")?;
        Ok((self.job_name(file.name)?, source, target))
    }

    fn job_name(&self, in_file: Option<String>) -> Result<JobName, config::Error> {
        let name = self.name.clone().or(in_file).unwrap_or_else(|| DEFAULT_NAME.to_string());
        name.parse().map_err(|e| config::Error::Value { option: "--name", message: format!("{e}") })
    }

    /// Everything put together; a missing source or target is an error of usage.
    pub fn job(&self) -> anyhow::Result<JobConfig> {
        let file = self.file()?;
        if !file.shard.is_empty() {
            let message = "is of several sources and targets: use walferry reshard".to_string();
            return Err(config::Error::Value { option: "[[shard]]", message }.into());
        }
        let source = self.source.clone().or(file.source.clone());
        let source = source.ok_or_else(|| missing("the source", "source", "WALFERRY_SOURCE"))?;
        let target = self.target.clone().or(file.target.clone());
        let target = target.ok_or_else(|| missing("the target", "target", "WALFERRY_TARGET"))?;
        let (in_file, decode_from) = (file.standby.clone(), file.decode_from.clone());
        let mut job = self.between(file, Config::parse(&source)?, Config::parse(&target)?)?;
        job.standbys = self.standbys.standbys(in_file, job.two_phase)?;
        self.standbys.decode(decode_from, &mut job)?;
        Ok(job)
    }

    /// The same between these ends, without standbys, which are of one source.
    pub fn between(&self, file: File, source: Config, target: Config) -> anyhow::Result<JobConfig> {
        let (tuning, bulk, backlog) = tuning::take(self.apply, &file)?;
        let (map, kafka) = (mapping::read(&file)?, kafka_properties(&file)?);
        let (brought, from_lsn) = self.own_copy.read(&file)?;
        let (two_way, settles) = (self.two_way(&file)?, self.settles(&file));
        let job = self.job_name(file.name)?;
        let given = |own: &[String], file: Vec<String>| {
            if own.is_empty() { file } else { own.to_vec() }
        };
        let publication = self.publication.clone().or(file.publication);
        let options = JobOptions {
            publication: publication.clone(),
            two_way: two_way.is_some(),
            map: map.as_ref().map(|map| map.digest().to_string()),
            include: given(&self.include, file.include),
            exclude: given(&self.exclude, file.exclude),
            schema_only: given(&self.schema_only, file.schema_only),
            tables_only: self.tables_only || file.tables_only,
            leave_large_objects: leaves_large_objects(
                self.large_objects.clone().or(file.large_objects),
            )?,
            brought,
            shared: false,
        };
        refuse_typos(&options)?;
        let wanted = Wanted {
            decoder: choice("--decoder", self.decoder.clone().or(file.decoder))?,
            plain_numbers: self.no_nan || file.no_nan,
            transport: choice("--transport", self.transport.clone().or(file.transport))?,
            publication,
        };
        if wanted.publication.is_some() && wanted.decoder.is_some_and(Plugin::is_textual) {
            let message = "only pgoutput reads a publication: leave one of the two out".to_string();
            return Err(config::Error::Value { option: "--decoder", message }.into());
        }
        let two_phase = on_off("--two-phase", self.two_phase.clone().or(file.two_phase), false)?;
        let ddl = self.ddl(file.ddl, two_phase, options.publication.is_some())?;
        Ok(JobConfig {
            job,
            wanted,
            source: mapping::keyed(source.labelled("source"), map.as_deref()),
            target: target.labelled("target"),
            options,
            bin: None,
            jobs: self.jobs.or(file.jobs).unwrap_or(4).max(1),
            owners: !(self.no_owner || file.no_owner),
            slot_timeout: Duration::from_secs(3600),
            buffer: self.buffering((file.buffer, file.spool_limit, file.wal_budget), kafka)?,
            on_conflict: two_way.clone().filter(|_| settles),
            two_way,
            two_phase,
            on_row_error: self.on_row_error(file.on_row_error, two_phase)?,
            ddl,
            streaming: self.streaming(file.streaming, file.streaming_limit)?,
            tuning,
            heartbeat: self.heartbeat(file.heartbeat, file.heartbeat_sql)?,
            from_lsn,
            half: Half::Both,
            failover: self.standbys.failover(file.failover)?,
            standbys: Vec::new(),
            decode_from: None,
            after_failover: self.standbys.after(file.after_failover)?,
            secrets: secrets(&file.cutover.route)?,
            backlog,
            bulk,
            map,
            one_way: self.one_way || file.one_way,
            insert_only: false,
        })
    }
}

/// A typo is told before any server is asked.
fn refuse_typos(options: &JobOptions) -> anyhow::Result<()> {
    options.patterns().map_err(job::Error::from)?;
    if options.tables_only && options.include.is_empty() {
        let message = "needs --include: the tables that it is about".to_string();
        return Err(config::Error::Value { option: "--tables-only", message }.into());
    }
    mapping::refuse_others(options)?;
    Ok(brought::refuse_others(options)?)
}

pub(super) fn on_off(
    option: &'static str,
    given: Option<String>,
    default: bool,
) -> Result<bool, config::Error> {
    match given.as_deref() {
        None => Ok(default),
        Some("on") => Ok(true),
        Some("off") => Ok(false),
        Some(other) => {
            let message = format!("\"{other}\" is neither on nor off");
            Err(config::Error::Value { option, message })
        }
    }
}

/// Reads `--large-objects`.
fn leaves_large_objects(given: Option<String>) -> Result<bool, config::Error> {
    match given.as_deref() {
        None | Some("copy") => Ok(false),
        Some("leave") => Ok(true),
        Some(other) => Err(config::Error::Value {
            option: "--large-objects",
            message: format!("\"{other}\" is neither copy nor leave"),
        }),
    }
}

/// Reads `--buffer`.
pub(super) fn buffer(text: &str) -> Result<Buffer, config::Error> {
    match text.split_once(':') {
        None if text == "memory" => Ok(Buffer::Memory),
        None if text == "spool" => Ok(Buffer::Spool(state_dir())),
        Some(("spool", dir)) if !dir.is_empty() => Ok(Buffer::Spool(PathBuf::from(dir))),
        Some(("kafka", place)) => kafka_place(place).map(Buffer::Kafka),
        _ => Err(bad_buffer(format!(
            "\"{text}\" is not a buffer: use memory, spool, spool:DIR or kafka:BROKERS/TOPIC"
        ))),
    }
}

fn bad_buffer(message: String) -> config::Error {
    config::Error::Value { option: "--buffer", message }
}

/// Names that Kafka takes for topics, and room for `.reverse`.
/// <https://kafka.apache.org/documentation/#newtopicsconfigs>
const TOPIC_LENGTH_MAX: usize = 249 - ".reverse".len();

/// Reads `HOST:PORT,HOST:PORT/TOPIC`.
fn kafka_place(text: &str) -> Result<KafkaPlace, config::Error> {
    if cfg!(not(feature = "kafka")) {
        return Err(bad_buffer("this walferry was built without its feature kafka".to_string()));
    }
    let known = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    match text.split_once('/') {
        Some((brokers, _)) if brokers.is_empty() || brokers.split(',').any(str::is_empty) => {
            Err(bad_buffer(format!("\"{text}\" names no broker: use HOST:PORT,HOST:PORT/TOPIC")))
        }
        Some((_, topic))
            if topic.is_empty()
                || matches!(topic, "." | "..")
                || topic.len() > TOPIC_LENGTH_MAX
                || !topic.chars().all(known) =>
        {
            Err(bad_buffer(format!(
                "\"{topic}\" is not a topic: use 1 to {TOPIC_LENGTH_MAX} of a-z, A-Z, 0-9, \
                 \".\", \"_\" and \"-\""
            )))
        }
        Some((brokers, topic)) => {
            Ok(KafkaPlace { brokers: brokers.to_string(), topic: topic.to_string() })
        }
        None => Err(bad_buffer(format!("\"{text}\" names no topic: use BROKERS/TOPIC"))),
    }
}

#[cfg(feature = "kafka")]
fn kafka_properties(file: &File) -> Result<KafkaProperties, config::Error> {
    let value = |e: crate::buffer::kafka::Error| config::Error::Value {
        option: "walferry.toml",
        message: e.to_string(),
    };
    KafkaProperties::new(file.kafka.pairs()?).map_err(value)
}

#[cfg(not(feature = "kafka"))]
fn kafka_properties(file: &File) -> Result<KafkaProperties, config::Error> {
    if file.kafka.pairs()?.is_empty() {
        return Ok(KafkaProperties::default());
    }
    let message = "has kafka.* settings, and this walferry was built without its feature kafka";
    Err(config::Error::Value { option: "walferry.toml", message: message.to_string() })
}

/// Where programs keep what must outlive them.
fn state_dir() -> PathBuf {
    let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".local/state"));
    let given = std::env::var_os("XDG_STATE_HOME").filter(|dir| !dir.is_empty()).map(PathBuf::from);
    given.or_else(home).unwrap_or_default().join("walferry")
}

pub(super) fn size(
    option: &'static str,
    text: Option<String>,
) -> Result<Option<u64>, config::Error> {
    let read = text.map(|text| parse_size(&text)).transpose();
    read.map_err(|message| config::Error::Value { option, message })
}

/// `None` for `auto`, or for nothing given.
fn choice<T>(option: &'static str, given: Option<String>) -> Result<Option<T>, config::Error>
where
    T: std::str::FromStr<Err: std::fmt::Display>,
{
    let given = given.filter(|text| text != "auto").map(|text| text.parse());
    let value = |e: T::Err| config::Error::Value { option, message: format!("{e} or auto") };
    given.transpose().map_err(value)
}

fn missing(what: &'static str, option: &'static str, variable: &'static str) -> config::Error {
    config::Error::Missing { what, option, variable }
}

/// Passwords of routes: those in the file's routes, and the one in WALFERRY_ROUTE_PASSWORD.
fn secrets(routes: &[String]) -> Result<RouteSecrets, config::Error> {
    let variable = std::env::var("WALFERRY_ROUTE_PASSWORD").ok().filter(|text| !text.is_empty());
    let secrets = RouteSecrets::new(variable.map(SecretString::from));
    learn(&secrets, "[cutover] route", routes)?;
    Ok(secrets)
}

/// Routes as they are stored; their passwords are kept for this process.
pub fn learn(
    secrets: &RouteSecrets,
    option: &'static str,
    routes: &[String],
) -> Result<Vec<String>, config::Error> {
    let learnt: Result<_, _> = routes.iter().map(|route| secrets.learn(route)).collect();
    learnt.map_err(|e| config::Error::Value { option, message: e.to_string() })
}
