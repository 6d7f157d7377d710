//! Where options come from: the command line, then WALFERRY_* variables, then `walferry.toml`.
//!
//! This room only maps; every option's meaning, default and type belong to the room that uses it.
//! The file is read from `-c FILE`, or `walferry.toml` in the working directory if there is one. An
//! unknown key is an error, so that a typo does not become a silent default. Nothing is written,
//! and connection strings are never printed as they were given: they may hold passwords.

pub mod duration;
pub mod file;
pub mod size;

pub use duration::parse_duration;
pub use file::{File, Tuning, load};
pub use size::parse_size;

/// The options could not be put together; exit code 2.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file could not be read.
    #[error("cannot read {path}")]
    Read {
        /// Which file.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not what it should be.
    #[error("{path}: {message}")]
    Parse {
        /// Which file.
        path: String,
        /// What and where, without the line's text: it may hold a password.
        message: String,
    },
    /// Something that must be given was not.
    #[error("{what} is missing: give --{option}, set {variable}, or write it into walferry.toml")]
    Missing {
        /// For people.
        what: &'static str,
        /// The option's name.
        option: &'static str,
        /// The variable's name.
        variable: &'static str,
    },
    /// A value that cannot be used.
    #[error("{option}: {message}")]
    Value {
        /// Which option.
        option: &'static str,
        /// Why.
        message: String,
    },
}
