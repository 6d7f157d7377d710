//! What can go wrong with files, and what to do then.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use crate::fault::{Fault, Faulty};
use crate::lsn::Lsn;

/// Result with the spool's error.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a spool cannot be used. Cheap to clone, as several tasks are told of one failure.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// A system call failed.
    #[error("spool: cannot {doing} {file}: {source}")]
    Io {
        /// What was tried.
        doing: &'static str,
        /// On which file.
        file: String,
        /// The system's answer.
        source: Arc<io::Error>,
    },
    /// The file system is full. What was written in part has been taken back.
    #[error(
        "spool: no space left for {file}: free some; the source keeps its WAL meanwhile, and \
         nothing is lost"
    )]
    NoSpace {
        /// Which file wanted to grow.
        file: String,
    },
    /// Bytes that were whole once do not check any more.
    #[error(
        "spool: {file} is damaged at offset {offset}: {detail}. If the source still has what it \
         held, removing the directory loses nothing, and walferry says if not: rm -r {dir}, then \
         start again"
    )]
    Corrupt {
        /// Which file.
        file: String,
        /// Where in it, in bytes.
        offset: u64,
        /// What does not check.
        detail: String,
        /// The spool's directory.
        dir: String,
    },
    /// A file between others is gone.
    #[error(
        "spool: {file} is missing between others: bring it back, or, if the source still has what \
         it held (walferry says if not): rm -r {dir}, then start again"
    )]
    Missing {
        /// Which.
        file: String,
        /// The spool's directory.
        dir: String,
    },
    /// A spool, but not this stream's.
    #[error(
        "spool: {file} belongs to another stream: its {what} is {found}, this one's is \
         {expected}. Give another --buffer spool:DIR, or, if nobody needs it any more: rm -r {dir}"
    )]
    Foreign {
        /// Which file.
        file: String,
        /// What differs.
        what: &'static str,
        /// What the file says.
        found: String,
        /// What it should say.
        expected: String,
        /// The spool's directory.
        dir: String,
    },
    /// Written by another version.
    #[error(
        "spool: {file} has format version {found}, this walferry knows {known}: finish reading it \
         with the walferry that wrote it"
    )]
    Version {
        /// Which file.
        file: String,
        /// Its version.
        found: u32,
        /// Ours.
        known: u32,
    },
    /// Another process has it open.
    #[error("spool: {dir} is in use by another process: stop it, or give another directory")]
    InUse {
        /// The directory.
        dir: String,
    },
    /// Positions between what is asked for and what is there cannot be had.
    #[error(
        "spool: {dir} begins at {first_lsn}, but the target has only {progress_lsn}: what lies \
         between is not in it"
    )]
    Gap {
        /// The directory.
        dir: String,
        /// Where it begins.
        first_lsn: Lsn,
        /// From where it was to be read.
        progress_lsn: Lsn,
    },
    /// An item that no file can hold.
    #[error("spool: one change of {bytes} bytes is more than a frame can hold")]
    TooLarge {
        /// Its size.
        bytes: usize,
    },
}

impl Error {
    /// Wraps the system's answer.
    pub(super) fn io(doing: &'static str, file: impl Into<String>, source: io::Error) -> Error {
        let file = file.into();
        if matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) {
            return Error::NoSpace { file };
        }
        Error::Io { doing, file, source: Arc::new(source) }
    }

    /// True if a file was not there.
    pub(super) fn is_gone(&self) -> bool {
        matches!(self, Error::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }
}

impl Faulty for Error {
    fn fault(&self) -> Fault {
        match self {
            // A predecessor that was just ended may still hold its lock.
            Error::NoSpace { .. } | Error::InUse { .. } => Fault::Retry,
            _ => Fault::Stop,
        }
    }
}

/// A place for people.
pub(super) fn shown(dir: &std::path::Path) -> String {
    PathBuf::from(dir).display().to_string()
}
