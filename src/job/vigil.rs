//! Asked all the time beside a runner's work: is the lease still ours, does the source answer?
//!
//! A network that swallows packets gives no error. TCP notices a dead peer in seconds, but not a
//! dead stretch behind a proxy that is itself alive, so the questions are asked in SQL and have
//! a deadline. Without an answer everything is dropped and begun again, which is always safe; work
//! that waits on the dead connections ends with it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::watch;

use super::lease::Lease;
use super::run::JobConfig;
use super::{Error, Result};
use crate::id::JobName;
use crate::limit::SILENCE;
use crate::pg::{self, Config, Purpose, Session};

/// Between two questions.
const TURN: Duration = Duration::from_secs(1);

/// Watches over one life of a runner; holds its leases.
pub(super) struct Vigil {
    leases: Vec<Lease>,
    source: Config,
    probe: Option<Session>,
    /// The runner works on something that needs the source, and would wait for it without a limit.
    /// Otherwise only streams do, which notice silence themselves and keep on beside other work.
    busy: Arc<AtomicBool>,
    job: JobName,
    /// Clients are being led: not to be left in the middle.
    flying: watch::Receiver<bool>,
}

impl Vigil {
    pub fn new(
        leases: Vec<Lease>,
        config: &JobConfig,
        busy: Arc<AtomicBool>,
        flying: watch::Receiver<bool>,
    ) -> Vigil {
        let (source, job) = (config.source.clone(), config.job.clone());
        Vigil { leases, source, probe: None, busy, job, flying }
    }

    /// Returns why the runner has to begin again.
    pub async fn keep(&mut self) -> Error {
        loop {
            for lease in &mut self.leases {
                if let Err(error) = lease.check().await {
                    return error;
                }
            }
            if let Err(error) = self.hear_stop().await {
                return error;
            }
            if self.busy.load(Ordering::SeqCst)
                && let Err(error) = self.ask_source().await
            {
                return error;
            }
            tokio::time::sleep(TURN).await;
        }
    }

    /// Finish and cancel do not wait for the end of a copy, or of an index.
    async fn hear_stop(&mut self) -> Result<()> {
        if *self.flying.borrow() {
            return Ok(());
        }
        // The first is the runner's.
        let Some(lease) = self.leases.first_mut() else { return Ok(()) };
        if lease.stop_asked(&self.job).await? { Err(Error::Ended) } else { Ok(()) }
    }

    /// An error only for silence: whoever works there meets any other himself.
    async fn ask_source(&mut self) -> Result<()> {
        let asking = async {
            let session = match self.probe.take() {
                Some(session) => self.probe.insert(session),
                None => self.probe.insert(Session::connect(&self.source, Purpose::Sql).await?),
            };
            session.query("select 1").await
        };
        match tokio::time::timeout(SILENCE, asking).await {
            Ok(Ok(_)) => return Ok(()),
            Ok(Err(pg::Error::Timeout { .. })) | Err(_) => {}
            Ok(Err(_)) => {
                self.probe = None;
                return Ok(());
            }
        }
        let peer = self.source.hosts.first().map(|host| self.source.peer(host)).unwrap_or_default();
        let (doing, seconds) = ("a sign of life".to_string(), SILENCE.as_secs());
        Err(pg::Error::Timeout { peer, doing, seconds }.into())
    }
}
