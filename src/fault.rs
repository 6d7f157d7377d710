//! What a caller can do about an error, the one question every room's error answers; and how much
//! something found matters.

use serde::Serialize;

/// The answer of an error to "what now?".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The world may mend itself: connect again and go on from durable state.
    Retry,
    /// A person must act; the message says how. Trying again as things are gives the same.
    Stop,
    /// walferry is wrong: an invariant of ours does not hold.
    Bug,
}

/// Implemented by the error of each room.
pub trait Faulty {
    /// What the caller can do.
    fn fault(&self) -> Fault;
}

/// How much a finding matters. Sorted worst first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// The job would fail.
    Error,
    /// The job may fail or surprise.
    Warning,
    /// Good to know.
    Info,
}
