//! After a switch: the side that was left is still shut, whichever server that is by now.
//!
//! The seal is in that side's own log. A standby of it that is promoted without the log's end has
//! no seal: whoever still connects there writes to a database that has moved, and nothing carries
//! that anywhere. So the side is looked at whenever a connection to it is new, as every promotion
//! ends them all, and shut again. What was written there in between nobody can tell; that is said.
//!
//! In a job that is split this is the source, of the tables that are on the target. What the target
//! has shut, for the source, needs no look: it is in the same log as the owners themselves, and
//! before them.

use std::time::Duration;

use super::request::context;
use super::run::{Notice, Runner};
use super::state::Phase;
use super::{Error, Result};
use crate::cutover::{self, seal};
use crate::id::Stream;
use crate::pg::Session;
use crate::route;

/// Commands wait meanwhile, so a silent server gets little time.
const PATIENCE: Duration = Duration::from_secs(2);

impl Runner {
    /// Looks whether the side that is not live is shut, and shuts it where it is not. A side that
    /// cannot be reached is asked again.
    ///
    /// Error: it has writers that do not let it be shut.
    pub(super) async fn keep_sealed(&mut self, phase: Phase) -> Result<()> {
        let (flip, side) = match phase {
            Phase::Switched | Phase::Split => (Stream::Forward, self.config.source.clone()),
            Phase::RolledBack => (Stream::Reverse, self.config.target.clone()),
            _ => return Ok(()),
        };
        if let Some((_, open)) = self.sealed.as_mut().filter(|(left, _)| *left == flip) {
            let asked = tokio::time::timeout(PATIENCE, open.query("select 1")).await;
            if matches!(asked, Ok(Ok(_))) {
                return Ok(());
            }
        }
        self.sealed = None;
        let fence = self.row().await?.flip.map(|record| record.fence);
        if fence.as_deref() == Some("none") {
            return Ok(());
        }
        let group = self.shut_by_group(flip).await?;
        let job = &self.config.job;
        let looking = async {
            let mut session = Session::control(&side).await?;
            let open = match group.is_empty() {
                true if seal::is_shut(&mut session, job).await? => None,
                true => Some(Vec::new()),
                false => Some(seal::unsealed(&mut session, job, &group).await?)
                    .filter(|open| !open.is_empty()),
            };
            Ok::<_, Error>((open, session))
        };
        let open = match tokio::time::timeout(PATIENCE, looking).await {
            Ok(Ok((None, session))) => {
                self.sealed = Some((flip, session));
                return Ok(());
            }
            Ok(Ok((Some(open), _))) => open,
            Ok(Err(error)) => {
                tracing::debug!(%error, side = %side.label, "it was not asked for its seal");
                return Ok(());
            }
            Err(_) => return Ok(()),
        };
        let is_group = !open.is_empty();
        let tables = if is_group { open } else { self.fenced_tables(&side).await? };
        if tables.is_empty() {
            return Ok(());
        }
        self.say(Notice::Said(format!(
            "warning: the {} has lost its seal on {} tables, as a standby that takes over without \
             the end of the log has: they are shut again. What was written there since is not on \
             the live side: see walferry verify",
            side.label,
            tables.len()
        )));
        // Whichever side the flip led to is the other one for that which leads back.
        let back = context(&self.config, flip.opposite());
        let back = route::Context { is_group, tables: tables.clone(), ..back };
        match cutover::seal_other(&back, &tables).await {
            Err(error @ cutover::Error::NotOwned { .. }) => {
                self.say(Notice::Said(format!("warning: see that nobody writes there: {error}")));
                Ok(())
            }
            sealed => Ok(sealed?),
        }
    }
}
