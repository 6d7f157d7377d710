//! Where a job's changes wait: in memory, in a spool or in Kafka's topics, whose place the home
//! database remembers.
//!
//! A spool is the one thing of a job that is not in a table. So the home database says where it is,
//! a run elsewhere is refused, and leaving it is refused while the slot has been told of what only
//! the spool has. The same goes for topics, which every host can reach.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::run::JobConfig;
use super::store::{JobRow, Store};
use super::{Error, Result};
use crate::apply;
use crate::buffer::durable::KafkaProperties;
use crate::buffer::spool;
use crate::id::Stream;
use crate::lsn::Lsn;
use crate::pg::Session;
use crate::source::slot;

/// A spool holds so much unless told otherwise: hours of a busy source, and a fraction of any disk
/// that a database's copy fits on.
pub const SPOOL_BYTES: u64 = 100 << 30;

/// `--buffer`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Buffer {
    /// In this process.
    Memory,
    /// On this host's disk; below this directory each stream has one of its own.
    Spool(PathBuf),
    /// In topics of these brokers.
    Kafka(KafkaPlace),
}

/// `--buffer` and what goes with it.
#[derive(Clone, Debug)]
pub struct BufferOptions {
    /// `None`: as the job had it last, and memory for a new one.
    pub kind: Option<Buffer>,
    /// Limit of each stream's spool, in bytes.
    pub spool_bytes: u64,
    /// Bytes of WAL that the read side may keep for the slot before it is told what only the spool
    /// has. `None`: a third of its max_slot_wal_keep_size, or 10 GB.
    pub wal_budget_bytes: Option<u64>,
    /// `kafka.*` settings.
    pub kafka: KafkaProperties,
}

impl Default for BufferOptions {
    fn default() -> Self {
        BufferOptions {
            kind: None,
            spool_bytes: SPOOL_BYTES,
            wal_budget_bytes: None,
            kafka: KafkaProperties::default(),
        }
    }
}

/// `--streaming on` and what goes with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamingOptions {
    /// Limit of each stream's files of transactions in progress, in bytes.
    pub limit_bytes: u64,
}

/// Transactions in progress may take so much disk unless told otherwise: beyond, the server is
/// asked to keep them on its own.
pub const STREAMING_BYTES: u64 = 10 << 30;

/// `walferry.job.spool`: where the job's changes wait, if not in memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Place {
    /// On a host's disk.
    Spool(SpoolPlace),
    /// In topics.
    Kafka(KafkaPlace),
}

impl Place {
    /// What `--buffer` is given for it.
    pub fn option(&self) -> String {
        match self {
            Place::Spool(spool) => format!("spool:{}", spool.dir),
            Place::Kafka(kafka) => format!("kafka:{}/{}", kafka.brokers, kafka.topic),
        }
    }

    /// For sentences.
    fn shown(&self) -> String {
        match self {
            Place::Spool(spool) => format!("the spool on host {}, in {},", spool.host, spool.dir),
            Place::Kafka(kafka) => format!("topic {} of {}", kafka.topic, kafka.brokers),
        }
    }

    /// True where this process can get at it.
    fn is_here(&self) -> bool {
        match self {
            Place::Spool(spool) => spool.is_here(),
            Place::Kafka(_) => true,
        }
    }
}

/// Topics of a job.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KafkaPlace {
    /// Host and port of brokers, with commas between.
    pub brokers: String,
    /// The forward stream's topic.
    pub topic: String,
}

impl KafkaPlace {
    /// The topic of one stream.
    pub fn of(&self, stream: Stream) -> String {
        match stream {
            Stream::Forward => self.topic.clone(),
            Stream::Reverse => format!("{}.reverse", self.topic),
        }
    }
}

/// Where a job's spool is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SpoolPlace {
    /// Name of the host.
    pub host: String,
    /// Directory on it, absolute.
    pub dir: String,
}

impl SpoolPlace {
    /// The directory of one stream.
    pub fn of(&self, name: &str) -> PathBuf {
        PathBuf::from(&self.dir).join(name)
    }

    /// True on the host where it is.
    pub fn is_here(&self) -> bool {
        self.host == this_host()
    }
}

/// What a run puts its streams' changes into.
pub(super) type Chosen = Option<Place>;

/// This host's name. `WALFERRY_HOST` where the system's changes, as a container's does while its
/// volume stays.
pub fn this_host() -> String {
    let named = std::env::var("WALFERRY_HOST").ok();
    let system = || std::fs::read_to_string("/proc/sys/kernel/hostname").ok();
    let called = || {
        let output = std::process::Command::new("uname").arg("-n").output().ok()?;
        String::from_utf8(output.stdout).ok()
    };
    let name = named.or_else(system).or_else(called).unwrap_or_default();
    let name = name.trim();
    if name.is_empty() { "unknown".to_string() } else { name.to_string() }
}

/// Settles where the changes wait, before anything is read. Remembers it in the home database.
pub(super) async fn choose(
    config: &JobConfig,
    store: &mut Store,
    source: &mut Session,
) -> Result<Chosen> {
    let row = store.load_existing().await?;
    let known = row.spool.clone();
    let wanted = match (&config.buffer.kind, &known) {
        (None, _) => known.clone(),
        (Some(Buffer::Memory), _) => None,
        (Some(Buffer::Spool(dir)), _) => Some(Place::Spool(here(dir)?)),
        (Some(Buffer::Kafka(place)), _) => Some(Place::Kafka(place.clone())),
    };
    match (&known, &wanted) {
        (Some(known), Some(wanted)) => {
            stays(known, wanted)?;
            // Brokers come and go; the topic stays.
            if known != wanted {
                store.set_spool(Some(wanted)).await?;
            }
        }
        (Some(known), None) => leave(config, &row, store, source, known).await?,
        (None, Some(wanted)) => {
            look(config, wanted).await?;
            store.set_spool(Some(wanted)).await?;
        }
        (None, None) => {}
    }
    Ok(wanted)
}

/// What a person must mend about a topic is told before anything is made.
#[cfg(feature = "kafka")]
async fn look(config: &JobConfig, wanted: &Place) -> Result<()> {
    let Place::Kafka(place) = wanted else { return Ok(()) };
    for stream in [Stream::Forward, Stream::Reverse] {
        let (brokers, topic) = (place.brokers.clone(), place.of(stream));
        let properties = config.buffer.kafka.clone();
        let looking = move || crate::buffer::kafka::look(&brokers, &topic, &properties);
        let looked = tokio::task::spawn_blocking(looking).await;
        looked.map_err(|e| Error::State(e.to_string()))??;
    }
    Ok(())
}

#[cfg(not(feature = "kafka"))]
async fn look(_: &JobConfig, _: &Place) -> Result<()> {
    Ok(())
}

fn here(dir: &std::path::Path) -> Result<SpoolPlace> {
    let absolute = std::path::absolute(dir)
        .map_err(|e| Error::State(format!("--buffer spool:{}: {e}", dir.display())))?;
    Ok(SpoolPlace { host: this_host(), dir: absolute.display().to_string() })
}

fn stays(known: &Place, wanted: &Place) -> Result<()> {
    match (known, wanted) {
        (Place::Spool(known), _) if !known.is_here() => {
            let (host, dir) = (known.host.clone(), known.dir.clone());
            Err(Error::OtherHost { host, dir, here: this_host() })
        }
        (Place::Spool(known), Place::Spool(wanted)) if known.dir == wanted.dir => Ok(()),
        (Place::Spool(known), _) => Err(Error::OtherDirectory { dir: known.dir.clone() }),
        (Place::Kafka(known), Place::Kafka(wanted)) if known.topic == wanted.topic => Ok(()),
        (Place::Kafka(kafka), _) => {
            Err(Error::OtherTopic { topic: kafka.topic.clone(), option: known.option() })
        }
    }
}

/// To memory: only where nothing is in the spool, or the topic, alone.
async fn leave(
    config: &JobConfig,
    row: &JobRow,
    store: &mut Store,
    source: &mut Session,
    known: &Place,
) -> Result<()> {
    for stream in [Stream::Forward, Stream::Reverse] {
        let name = config.job.object(stream);
        let exists = match stream {
            Stream::Forward => row.slot_lsn.is_some(),
            Stream::Reverse => row.armed,
        };
        if !exists {
            continue;
        }
        let to = match stream {
            Stream::Forward => &mut store.session,
            Stream::Reverse => &mut *source,
        };
        let mut there = Session::control(config.read_at(stream)).await?;
        let status = slot::status(&mut there, &name).await?;
        let confirmed_lsn = status.and_then(|s| s.confirmed_flush_lsn).unwrap_or(Lsn::ZERO);
        let progress_lsn = apply::durable_progress(to, &name).await?;
        if confirmed_lsn > progress_lsn {
            return Err(Error::SpoolNeeded {
                slot: name,
                confirmed_lsn,
                progress_lsn,
                place: known.shown(),
                option: known.option(),
            });
        }
    }
    if known.is_here() {
        for stream in [Stream::Forward, Stream::Reverse] {
            remove(known, &config.job.object(stream)).await?;
        }
    }
    store.set_spool(None).await
}

/// Removes a stream's spool; false if there was none. Topics stay: others may read them, and what
/// is written next goes on behind what is there.
pub(super) async fn remove(place: &Place, name: &str) -> Result<bool> {
    let Place::Spool(place) = place else { return Ok(false) };
    let dir = place.of(name);
    let removed = tokio::task::spawn_blocking(move || spool::remove(&dir)).await;
    Ok(removed.map_err(|e| Error::State(e.to_string()))??)
}

/// Bytes of WAL that the server may keep for a slot before the slot is told what only a spool has.
pub(super) async fn wal_budget(config: &crate::pg::Config, given: Option<u64>) -> Result<u64> {
    const DEFAULT: u64 = 10_000_000_000;
    if let Some(bytes) = given {
        return Ok(bytes);
    }
    let mut session = Session::control(config).await?;
    let sql = "select setting::int8 from pg_catalog.pg_settings \
               where name = 'max_slot_wal_keep_size' and setting::int8 >= 0";
    let limit_mb: Option<u64> =
        session.query_opt(sql, &[]).await?.map(|row| row.parse(0)).transpose()?;
    Ok(limit_mb.map_or(DEFAULT, |mb| DEFAULT.min((mb << 20) / 3)))
}
#[cfg(feature = "kafka")]
impl From<crate::buffer::kafka::Error> for Error {
    fn from(error: crate::buffer::kafka::Error) -> Self {
        Error::Buffer(error.into())
    }
}
