//! What can go wrong with a schema.

use super::lex::LexError;
use super::older::TooNew;
use crate::fault::{Fault, Faulty};
use crate::pg;

/// Errors of this room.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A server, or the way to it.
    #[error(transparent)]
    Pg(#[from] pg::Error),
    /// No pg_dump on this machine can read the source.
    #[error(
        "no pg_dump here can read PostgreSQL {major} (found: {found}): install it with \
         \"apt-get install postgresql-client-{major}\" or a later version, or name one in \
         WALFERRY_PG_DUMP"
    )]
    NoPgDump {
        /// The source's major version.
        major: u32,
        /// What was found, with versions.
        found: String,
    },
    /// pg_dump did not do it.
    #[error("{program} on {peer} failed ({status}): {stderr}")]
    PgDump {
        /// Which one.
        program: String,
        /// The server it read.
        peer: String,
        /// How it ended.
        status: String,
        /// What it said.
        stderr: String,
    },
    /// The copy beside which indexes were built was given up.
    #[error("indexes were to be built beside a copy, which was given up")]
    NotCopied,
    /// pg_dump's output cannot be read.
    #[error("cannot read the output of pg_dump: {0}; this is a bug of walferry, please report it")]
    Script(#[from] LexError),
    /// A statement of the schema was refused. Nothing of it is left behind.
    #[error("{error}; the statement was:\n{statement}")]
    Statement {
        /// The whole statement, with the place the server means marked.
        statement: String,
        /// What the server said.
        error: Box<pg::Error>,
    },
    /// Roles that own things or have rights are not there.
    #[error(
        "{peer} lacks roles that the schema names: {}; make them ({}), or leave owners and \
         privileges behind with --no-owner --no-privileges",
        roles.join(", "),
        create_roles(roles)
    )]
    Roles {
        /// Which server.
        peer: String,
        /// Their names.
        roles: Vec<String>,
    },
    /// The target is too old for something that means something.
    #[error(
        "{peer} is PostgreSQL {major} and does not know: {}; give them up on the source, or move \
         to a later version",
        list(objects)
    )]
    TooNew {
        /// Which server.
        peer: String,
        /// Its major version.
        major: u32,
        /// What it lacks.
        objects: Vec<TooNew>,
    },
    /// Sequences that are not there, so that none was set.
    #[error(
        "{peer} lacks sequences: {}; none was set. Create them there as they are on the other \
         side (\"create sequence ...\"), then try again",
        names.join(", ")
    )]
    NoSequences {
        /// Which server.
        peer: String,
        /// Their names.
        names: Vec<String>,
    },
    /// An invariant of ours does not hold.
    #[error("{0}; this is a bug of walferry, please report it")]
    Bug(String),
}

fn create_roles(roles: &[String]) -> String {
    let list: Vec<String> =
        roles.iter().map(|role| format!("create role {};", crate::id::quote_ident(role))).collect();
    list.join(" ")
}

fn list(objects: &[TooNew]) -> String {
    let list: Vec<String> =
        objects.iter().map(|o| format!("{} of {} (since {})", o.what, o.object, o.since)).collect();
    list.join(", ")
}

impl Error {
    /// The statement with the server's position marked under its line.
    pub(super) fn statement(sql: &str, error: pg::Error) -> Error {
        if error.server().is_none() {
            return Error::Pg(error);
        }
        let position = error.server().and_then(|e| e.position);
        Error::Statement { statement: mark(sql, position), error: Box::new(error) }
    }
}

/// Puts `^ here` under the character the server counted to, 1-based.
fn mark(sql: &str, position: Option<usize>) -> String {
    let Some(position) = position.filter(|p| *p > 0) else { return sql.to_string() };
    let mut before = 0;
    let mut out = String::with_capacity(sql.len() + 80);
    let mut marked = false;
    for line in sql.split_inclusive('\n') {
        let length = line.chars().count();
        out.push_str(line);
        if !marked && position <= before + length {
            if !line.ends_with('\n') {
                out.push('\n');
            }
            out.push_str(&" ".repeat(position - before - 1));
            out.push_str("^ here\n");
            marked = true;
        }
        before += length;
    }
    out.trim_end_matches('\n').to_string()
}

impl Faulty for Error {
    fn fault(&self) -> Fault {
        match self {
            Error::Pg(error) => error.fault(),
            Error::Statement { error, .. } => error.fault(),
            // libpq's own words; pg_dump has no exit code for them.
            Error::PgDump { stderr, .. }
                if stderr.contains("server closed the connection")
                    || stderr.contains("connection to server")
                    || stderr.contains("due to lock timeout") =>
            {
                Fault::Retry
            }
            Error::NotCopied => Fault::Retry,
            Error::NoPgDump { .. }
            | Error::PgDump { .. }
            | Error::Roles { .. }
            | Error::TooNew { .. }
            | Error::NoSequences { .. } => Fault::Stop,
            Error::Script(_) | Error::Bug(_) => Fault::Bug,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_place_the_server_means_is_marked() {
        assert_eq!(mark("select\nnö x,\n y", Some(11)), "select\nnö x,\n   ^ here\n y");
        assert_eq!(mark("ab", Some(2)), "ab\n ^ here");
        assert_eq!(mark("ab", None), "ab");
        assert_eq!(mark("ab", Some(99)), "ab");
    }
}
