//! Where a job's changes wait: in memory, or in a spool whose host and directory the home database
//! remembers.
//!
//! A spool is the one thing of a job that is not in a table. So the home database says where it is,
//! a run elsewhere is refused, and leaving it is refused while the slot has been told of what only
//! the spool has.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::run::JobConfig;
use super::store::{JobRow, Store};
use super::{Error, Result};
use crate::apply;
use crate::buffer::spool;
use crate::id::Stream;
use crate::lsn::Lsn;
use crate::pg::{Purpose, Session};
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
}

/// `--buffer` and what goes with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BufferOptions {
    /// `None`: as the job had it last, and memory for a new one.
    pub kind: Option<Buffer>,
    /// Limit of each stream's spool, in bytes.
    pub spool_bytes: u64,
    /// Bytes of WAL that the read side may keep for the slot before it is told what only the spool
    /// has. `None`: a third of its max_slot_wal_keep_size, or 10 GB.
    pub wal_budget_bytes: Option<u64>,
}

impl Default for BufferOptions {
    fn default() -> Self {
        BufferOptions { kind: None, spool_bytes: SPOOL_BYTES, wal_budget_bytes: None }
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

/// `walferry.job.spool`: where the job's spool is.
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
pub(super) type Chosen = Option<SpoolPlace>;

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
        (Some(Buffer::Spool(dir)), _) => Some(here(dir)?),
    };
    match (&known, &wanted) {
        (Some(known), Some(wanted)) => stays(known, wanted)?,
        (Some(known), None) => leave(config, &row, store, source, known).await?,
        (None, Some(wanted)) => store.set_spool(Some(wanted)).await?,
        (None, None) => {}
    }
    Ok(wanted)
}

fn here(dir: &std::path::Path) -> Result<SpoolPlace> {
    let absolute = std::path::absolute(dir)
        .map_err(|e| Error::State(format!("--buffer spool:{}: {e}", dir.display())))?;
    Ok(SpoolPlace { host: this_host(), dir: absolute.display().to_string() })
}

fn stays(known: &SpoolPlace, wanted: &SpoolPlace) -> Result<()> {
    let (host, dir) = (known.host.clone(), known.dir.clone());
    let here = this_host();
    if known.host != here {
        return Err(Error::OtherHost { host, dir, here });
    }
    if known.dir != wanted.dir {
        return Err(Error::OtherDirectory { dir });
    }
    Ok(())
}

/// From spool to memory: only where nothing is in the spool alone.
async fn leave(
    config: &JobConfig,
    row: &JobRow,
    store: &mut Store,
    source: &mut Session,
    known: &SpoolPlace,
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
        let (from, to) = match stream {
            Stream::Forward => (&mut *source, &mut store.session),
            Stream::Reverse => (&mut store.session, &mut *source),
        };
        let status = slot::status(from, &name).await?;
        let confirmed_lsn = status.and_then(|s| s.confirmed_flush_lsn).unwrap_or(Lsn::ZERO);
        let progress_lsn = apply::durable_progress(to, &name).await?;
        if confirmed_lsn > progress_lsn {
            return Err(Error::SpoolNeeded {
                slot: name,
                confirmed_lsn,
                progress_lsn,
                host: known.host.clone(),
                dir: known.dir.clone(),
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

/// Removes a stream's spool; false if there was none.
pub(super) async fn remove(place: &SpoolPlace, name: &str) -> Result<bool> {
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
    let mut session = Session::connect(config, Purpose::Sql).await?;
    let sql = "select setting::int8 from pg_catalog.pg_settings \
               where name = 'max_slot_wal_keep_size' and setting::int8 >= 0";
    let limit_mb: Option<u64> =
        session.query_opt(sql, &[]).await?.map(|row| row.parse(0)).transpose()?;
    Ok(limit_mb.map_or(DEFAULT, |mb| DEFAULT.min((mb << 20) / 3)))
}
