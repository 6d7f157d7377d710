//! What a flip leaves behind, told with its outcome.

use serde_json::Value;

use super::Result;
use super::check::{self, Finding};
use super::flip::FlipRequest;
use super::rest::{Refresh, Unlogged};
use super::run::Runner;
use super::silent;
use crate::cutover::{self, Plan};
use crate::id::Stream;
use crate::limit::CATALOG_WAIT;
use crate::pg::Session;

impl Runner {
    /// What the flip does not carry: as check lists it, but for what is done about.
    pub(super) async fn left_behind(
        &mut self,
        plan: &Plan,
        request: &FlipRequest,
    ) -> Result<Vec<Finding>> {
        let mut live = Session::control(&plan.live).await?.with_patience(CATALOG_WAIT);
        let side = match plan.flip {
            Stream::Forward => check::Side::Source,
            Stream::Reverse => check::Side::Target,
        };
        let moves = self.config.options.moves_large_objects();
        let mut left = check::not_carried(&mut live, side, &self.selection, moves).await?;
        let denied: Vec<String> = std::mem::take(&mut self.unrefreshed)
            .iter()
            .map(|failed| format!("materialized view {}", failed.view))
            .collect();
        left.retain(|finding| match finding.code {
            "materialized-view" => {
                request.refresh == Refresh::Never || denied.contains(&finding.object)
            }
            "unlogged-table" => request.unlogged == Unlogged::Leave,
            "large-objects" => !moves,
            _ => true,
        });
        if plan.flip == Stream::Forward {
            let home = &mut self.store.session;
            for sql in silent::awaited(home, self.config.job.as_str()).await? {
                let message =
                    "the source has it, the stream is silent about it, and it was not made";
                left.push(Finding::awaited(message, sql));
            }
        }
        Ok(left)
    }
}

/// A flip's outcome, and what it has not carried.
pub(super) fn outcome_value(outcome: &cutover::Outcome, left: &[Finding]) -> Value {
    let mut value = serde_json::to_value(outcome).unwrap_or(Value::Null);
    if let Some(object) = value.as_object_mut() {
        let left = serde_json::to_value(left).unwrap_or(Value::Null);
        object.insert("not_carried".to_string(), left);
    }
    value
}
