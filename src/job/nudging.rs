//! Beside a stream: has its slot let go of WAL that is confirmed ([`crate::source::nudge`]).
//!
//! A session of its own, as a server that is slow to answer here must hold up neither commands nor
//! the stream. What goes wrong is tried again with a new session; that the server cannot be reached
//! is the stream's to say.

use std::time::Duration;

use super::pipeline::{PipeOptions, Task};
use crate::pg::{self, Config, Session};
use crate::source::nudge::{Nudge, Nudged};

/// Between two looks.
const TURN: Duration = Duration::from_millis(500);

/// Begins to look after the slot of a stream, until the task is dropped. Does not wait for a
/// connection.
pub(super) fn start(options: &PipeOptions) -> Task<()> {
    let (from, standby) = (options.from.clone(), options.decode_from.clone());
    let name = options.job.object(options.stream);
    let mut nudge = Nudge::new(&name, &options.recorded.plugin);
    Task(tokio::spawn(async move {
        let mut sessions = Sessions::default();
        let mut turn = tokio::time::interval(TURN);
        turn.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            turn.tick().await;
            match look(&mut nudge, &from, standby.as_ref(), &mut sessions).await {
                Ok(Nudged::No) => {}
                Ok(Nudged::Yes) => {
                    tracing::debug!(slot = %name, "had a record of running transactions logged");
                }
                Ok(Nudged::Refused(reason)) => tracing::warn!(
                    slot = %name, reason,
                    "the slot keeps more WAL than it needs to, as the server logs running \
                     transactions only now and then; from 16 on, let the role have it log them: \
                     grant execute on function pg_log_standby_snapshot() to ...; before, leave \
                     one of max_replication_slots free"
                ),
                Err(error) => {
                    tracing::debug!(slot = %name, %error, "its WAL could not be looked at");
                    sessions = Sessions::default();
                }
            }
        }
    }))
}

/// With the server that writes the log, and with its standby, where that has the slot.
#[derive(Default)]
struct Sessions {
    from: Option<Session>,
    standby: Option<Session>,
}

async fn look(
    nudge: &mut Nudge,
    from: &Config,
    standby: Option<&Config>,
    sessions: &mut Sessions,
) -> pg::Result<Nudged> {
    let from = opened(&mut sessions.from, from).await?;
    match standby {
        Some(standby) => {
            let standby = opened(&mut sessions.standby, standby).await?;
            nudge.look_from(standby, from).await
        }
        None => nudge.look(from).await,
    }
}

async fn opened<'a>(
    session: &'a mut Option<Session>,
    config: &Config,
) -> pg::Result<&'a mut Session> {
    Ok(match session {
        Some(open) => open,
        None => session.insert(Session::control(config).await?),
    })
}
