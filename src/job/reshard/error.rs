//! Why several sources are not led to several targets.

use crate::fault::{Fault, Faulty};
use crate::id::QualifiedName;

/// Errors of N to M.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Tables and sections do not fit each other.
    #[error("cannot be resharded: {}", problems.join("; "))]
    Unfit {
        /// Each in a sentence.
        problems: Vec<String>,
    },
    /// It was begun otherwise.
    #[error(
        "{name} was begun with other sources, targets, [[shard]] or reference than walferry.toml \
         has now ({planned}): give it the same file, or another --name"
    )]
    OtherPlan {
        /// Its name.
        name: String,
        /// What it was begun with.
        planned: String,
    },
    /// There is none of that name.
    #[error("{peer} knows of no reshard {name}: walferry reshard run begins one")]
    Unknown {
        /// Its name.
        name: String,
        /// The first target.
        peer: String,
    },
    /// The command does not fit the stage.
    #[error("{asked} is not possible: {name} is {stage}. {why}")]
    Refused {
        /// The command.
        asked: &'static str,
        /// Its name.
        name: String,
        /// Where it stands.
        stage: String,
        /// What to do instead.
        why: &'static str,
    },
    /// Streams are to be held, and nobody runs them.
    #[error("nobody runs reshard {name}: both sides are held by walferry reshard run, so start it")]
    NotRun {
        /// Its name.
        name: String,
    },
    /// A pair stopped.
    #[error("from source {source_number} to target {target_number}: {cause}")]
    Pair {
        /// From 1.
        source_number: usize,
        /// From 1.
        target_number: usize,
        /// Why.
        cause: Box<crate::job::Error>,
    },
    /// A pair's job was led somewhere by another command.
    #[error(
        "job {job} is in phase {phase}, where another command than walferry reshard has brought it"
    )]
    Strayed {
        /// The pair's job.
        job: String,
        /// Its phase.
        phase: String,
    },
    /// Not all pairs are level.
    #[error(
        "not every pair is following yet ({}): walferry reshard status shows how far they are; \
         nothing was switched", waiting.join(", ")
    )]
    NotFollowing {
        /// Jobs and their phases.
        waiting: Vec<String>,
    },
    /// Tables of a target are not as they have to be.
    #[error("on target {number} ({peer}): {what}")]
    Target {
        /// From 1.
        number: usize,
        /// The server.
        peer: String,
        /// In words.
        what: String,
    },
    /// A table has rows before it begins.
    #[error(
        "on target {number} ({peer}): table {table} has rows, and nobody could tell them from \
         those that are brought: empty it, or reshard to another database"
    )]
    HasRows {
        /// From 1.
        number: usize,
        /// The server.
        peer: String,
        /// Which.
        table: QualifiedName,
    },
    /// The runner said no.
    #[error("{0}")]
    Answer(String),
    /// Nobody answered.
    #[error(
        "the runner did not answer within {seconds} s: walferry reshard status shows where it \
         stands"
    )]
    Silent {
        /// How long was waited.
        seconds: u64,
    },
}

impl Faulty for Error {
    fn fault(&self) -> Fault {
        match self {
            Error::Pair { cause, .. } => match &**cause {
                // A predecessor's session may take its server a moment to end.
                crate::job::Error::Busy { .. } => Fault::Retry,
                cause => cause.fault(),
            },
            _ => Fault::Stop,
        }
    }
}
