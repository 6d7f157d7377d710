//! Whether a source that does not answer is dead or at work.

use std::future::Future;
use std::time::Duration;

use tokio::time::Instant;

use super::{Error, Result, StreamOptions, slot};
use crate::pg::{Config, Purpose, Session};

/// How long a source that is silent and at work is waited for: it decodes the whole chunk before it
/// says anything.
const PATIENCE: Duration = Duration::from_secs(1800);

/// What a pull goes by.
#[derive(Debug)]
pub(super) struct Link {
    config: Config,
    slot: String,
    silence: Duration,
}

impl Link {
    /// To the source of the slot that the options name.
    pub fn of(config: Config, options: &StreamOptions) -> Link {
        Link { config, slot: options.slot.clone(), silence: options.silence }
    }

    /// How the source is reached.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// A question that a server answers at once, if it is there.
    pub async fn bounded<T, E: Into<Error>>(
        &self,
        asking: impl Future<Output = std::result::Result<T, E>>,
    ) -> Result<T> {
        match tokio::time::timeout(self.silence * 2, asking).await {
            Ok(answer) => answer.map_err(E::into),
            Err(_) => Err(self.silent(self.silence * 2)),
        }
    }

    /// Ends when the server has been silent for too long and does not hold the slot for us either,
    /// as seen on another connection: then nobody decodes for us any more.
    ///
    /// The slot is let go once all is decoded, and the answer sent behind that. So a server that
    /// holds it no more is given as long again to be heard of.
    pub async fn until_dead(&self, pid: i32) -> Error {
        let begun = Instant::now();
        let mut held = true;
        loop {
            tokio::time::sleep(self.silence).await;
            let asking = tokio::time::timeout(self.silence, self.holds_slot(pid)).await;
            let holds = matches!(asking, Ok(Ok(true)));
            if begun.elapsed() > PATIENCE || !(holds || held) {
                return self.silent(begun.elapsed());
            }
            held = holds;
            tracing::info!(slot = self.slot, holds, "the source is silent, and at work");
        }
    }

    async fn holds_slot(&self, pid: i32) -> Result<bool> {
        let mut session = Session::connect(&self.config, Purpose::Sql).await?;
        let status = slot::status(&mut session, &self.slot).await?;
        Ok(status.and_then(|status| status.active_pid) == Some(pid))
    }

    fn silent(&self, silence: Duration) -> Error {
        let peer = self.config.hosts.first().map(|host| self.config.peer(host));
        Error::Silent { peer: peer.unwrap_or_default(), seconds: silence.as_secs_f64() }
    }
}
