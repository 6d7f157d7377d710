//! Runners, askers and servers that are gone, and what is said of those that are not.

use std::time::Duration;

use super::state::Phase;

/// Who is gone, or is not though he should be.
#[derive(Debug, thiserror::Error)]
pub enum Gone {
    /// `--target-is-gone` where it is not.
    #[error(
        "the target answers and has job {job} in phase {phase}: walferry {command} without \
         --target-is-gone cleans both sides"
    )]
    NotGone {
        /// The job.
        job: String,
        /// Where it stands.
        phase: Phase,
        /// The command to give.
        command: &'static str,
    },
    /// A session of a job on a side that is to be cleaned alone.
    #[error(
        "{peer} has a session of job {job} (backend {pid}, from {host}, since {since}): a runner \
         is alive there, or its host is gone and the server has not noticed. Stop it, or end it \
         (select pg_terminate_backend({pid});), and give the same command again"
    )]
    StillThere {
        /// The job.
        job: String,
        /// Which server.
        peer: String,
        /// Which backend.
        pid: String,
        /// Where it was connected from.
        host: String,
        /// When it was started.
        since: String,
    },
    /// Nothing bears the job's name.
    #[error(
        "nothing of a job \"{job}\" is on {peer}{}; give the right --name and URI",
        if slots.is_empty() { String::new() } else { format!(" (slots there: {slots})") }
    )]
    NothingLeft {
        /// The name asked for.
        job: String,
        /// Where it was looked for.
        peer: String,
        /// Slots of walferry's that are there.
        slots: String,
    },
    /// A runner that was asked to stop did not.
    #[error("the runner did not stop within {wait:?}.{}", hung(pid))]
    Unstopped {
        /// How long was waited.
        wait: Duration,
        /// The backend that holds the lease.
        pid: String,
    },
    /// Nobody waits for the answer any more.
    #[error("whoever asked for it has gone")]
    Asker,
    /// Whoever ran the job has died or was stopped.
    #[error(
        "the runner that was asked for `{verb}` is gone; `walferry run` goes on with the job, and \
         the same command drives it by itself where nobody else does"
    )]
    Runner {
        /// The command.
        verb: String,
    },
    /// The stream did not come to where both sides can be compared.
    #[error(
        "{detail} within {wait:?}, so there is no point at which both sides could be compared: \
         walferry status shows how far the stream is and what keeps it; ask again once it is \
         level, or with a longer --timeout"
    )]
    NotAligned {
        /// What did not happen.
        detail: String,
        /// How long was waited.
        wait: Duration,
    },
}

/// What to do about a runner that holds the lease and does nothing.
pub(super) fn hung(pid: &str) -> String {
    if pid.is_empty() {
        return String::new();
    }
    format!(
        " If its process hangs or its host is gone, end its lease on the target (select \
         pg_terminate_backend({pid});) and give the same command again, which does the work itself \
         where nobody else does"
    )
}
