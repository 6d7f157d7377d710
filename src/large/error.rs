//! What can go wrong with large objects.

use crate::fault::{Fault, Faulty};
use crate::pg;

/// Errors of this room.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A server, or the way to it.
    #[error(transparent)]
    Pg(#[from] pg::Error),
    /// The role may not read some.
    #[error("{peer}: {count} large objects may not be read: run \"{fix}\"")]
    Unreadable {
        /// Which server.
        peer: String,
        /// How many.
        count: usize,
        /// What mends it.
        fix: String,
    },
    /// The other side has large objects that nobody of ours put there.
    #[error(
        "{peer} already has {count} large objects, and this job did not copy them: remove them \
         (\"select lo_unlink(oid) from pg_largeobject_metadata\"), or leave the source's behind \
         with --large-objects leave"
    )]
    NotEmpty {
        /// Which server.
        peer: String,
        /// How many.
        count: u64,
    },
    /// The other side refused an object.
    #[error("a large object, of {first} to {last}, was refused: {error}")]
    Refused {
        /// The first of those under way.
        first: u32,
        /// The last.
        last: u32,
        /// What the server said; it names the object where it is one of rights.
        error: Box<pg::Error>,
    },
}

impl Faulty for Error {
    fn fault(&self) -> Fault {
        match self {
            Error::Pg(error) => error.fault(),
            Error::Refused { error, .. } => error.fault(),
            Error::Unreadable { .. } | Error::NotEmpty { .. } => Fault::Stop,
        }
    }
}
