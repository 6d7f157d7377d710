//! Foreign keys that came back at a switch without a look at the rows are validated beside the
//! job's other work, with applications writing. A flip ends it, as it needs the same locks; what is
//! not validated then is still noted, and taken up again afterwards, or by finish.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::task::JoinHandle;

use super::ability::Ability;
use super::run::{Notice, Report, Runner};
use super::state::Phase;
use super::store::JobRow;
use super::{Error, Result};
use crate::pg::{CancelHandle, Config, Purpose, Session};
use crate::schema::{self, Acting};

/// Validation under way.
#[derive(Debug)]
pub(super) struct Validating {
    task: JoinHandle<()>,
    statement: Arc<Mutex<Option<CancelHandle>>>,
}

impl Drop for Validating {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Validating {
    fn start(sides: Vec<Config>, job: String, report: Report) -> Validating {
        let statement = Arc::new(Mutex::new(None));
        let at_work = statement.clone();
        let task = tokio::spawn(async move {
            for side in sides {
                if let Err(error) = validate(&side, &job, &at_work).await {
                    let peer = &side.label;
                    report(Notice::Said(format!(
                        "warning: foreign keys on the {peer} are not validated yet: {error}"
                    )));
                }
            }
        });
        Validating { task, statement }
    }

    /// Ends it, in its server too, which would otherwise keep its locks until it is done.
    async fn stop(self) {
        let handle = self.statement.lock().unwrap_or_else(PoisonError::into_inner).take();
        self.task.abort();
        if let Some(handle) = handle {
            let _ = handle.cancel().await;
        }
    }
}

async fn validate(side: &Config, job: &str, at_work: &Mutex<Option<CancelHandle>>) -> Result<()> {
    let mut session = Session::connect(side, Purpose::Sql).await?;
    let handle = session.cancel_handle();
    *at_work.lock().unwrap_or_else(PoisonError::into_inner) = Some(handle);
    let outcome = schema::validate(&mut session, job).await;
    at_work.lock().unwrap_or_else(PoisonError::into_inner).take();
    outcome.map_err(Error::from)
}

impl Runner {
    /// Starts it where there may be something to validate.
    pub(super) async fn validate_beside(&mut self, row: &JobRow) -> Result<()> {
        let back = matches!(row.phase, Phase::Following | Phase::Switched | Phase::RolledBack);
        let sides = [
            (&self.config.source, row.abilities.source),
            (&self.config.target, row.abilities.target),
        ];
        let acting = |ability: Ability| ability.acting(self.selection.tables_only);
        let sides = sides.into_iter().filter(|(_, side)| acting(*side) != Acting::Nothing);
        let sides: Vec<Config> = sides.map(|(side, _)| side.clone()).collect();
        if back && !sides.is_empty() {
            let job = self.config.job.to_string();
            self.validating = Some(Validating::start(sides, job, self.report.clone()));
        }
        Ok(())
    }

    /// Before a flip.
    pub(super) async fn stop_validating(&mut self) {
        if let Some(validating) = self.validating.take() {
            validating.stop().await;
        }
    }
}
