//! The names a job goes by on both servers, and PostgreSQL names with their quoting.
//!
//! Ids are born here, on the ground floor, so that no room has to import a room above it for one.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Which of the two slots of a job a thing belongs to.
///
/// `source` and `target` do not swap after a cutover, so `Reverse` always flows target to source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Stream {
    /// From the source to the target.
    Forward,
    /// From the target back to the source.
    Reverse,
}

impl Stream {
    /// `forward` or `reverse`, as stored in tables and printed.
    pub fn as_str(self) -> &'static str {
        match self {
            Stream::Forward => "forward",
            Stream::Reverse => "reverse",
        }
    }

    /// The stream that flows the other way.
    pub fn opposite(self) -> Stream {
        match self {
            Stream::Forward => Stream::Reverse,
            Stream::Reverse => Stream::Forward,
        }
    }
}

impl fmt::Display for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A job's name: 1 to 40 characters of `a-z`, `0-9` and `_`, so that every slot, publication and
/// origin name made from it is valid and under PostgreSQL's 63 bytes.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct JobName(String);

impl JobName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The origins by which a stream's changes are written.
    pub fn origins(&self, stream: Stream) -> [String; 2] {
        let name = self.object(stream);
        let second = second_origin(&name);
        [name, second]
    }

    /// Slot, publication and origin of one stream share this name: `walferry_<job>_forward`.
    pub fn object(&self, stream: Stream) -> String {
        format!("walferry_{}_{}", self.0, stream)
    }

    /// The job's canary table, on both sides. Each job has its own: a row of another's would travel
    /// along every stream between the two databases and arrive twice.
    pub fn canary(&self) -> QualifiedName {
        QualifiedName::new("walferry", format!("canary_{}", self.0))
    }

    /// Where an event trigger on the source writes DDL down.
    pub fn captured(&self) -> QualifiedName {
        QualifiedName::new("walferry", format!("ddl_{}", self.0))
    }

    /// The channel on which answers to commands are announced: 54 bytes at most.
    pub fn answers(&self) -> String {
        format!("walferry_answer_{}", self.0)
    }

    /// The channel on which commands are announced with NOTIFY.
    pub fn channel(&self) -> String {
        format!("walferry_{}", self.0)
    }
}

impl fmt::Display for JobName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The text was not a job name.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("\"{0}\" is not a job name: use 1 to 40 of a-z, 0-9 and _ (it becomes part of slot names)")]
pub struct JobNameError(pub String);

impl FromStr for JobName {
    type Err = JobNameError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let good = (1..=40).contains(&text.len())
            && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_');
        if good { Ok(JobName(text.to_string())) } else { Err(JobNameError(text.to_string())) }
    }
}

/// A relation's schema and name, unquoted, exactly as in `pg_namespace` and `pg_class`.
#[derive(Clone, PartialEq, Eq, Hash, Debug, PartialOrd, Ord, Serialize, Deserialize)]
pub struct QualifiedName {
    /// `pg_namespace.nspname`.
    pub schema: String,
    /// `pg_class.relname`.
    pub name: String,
}

impl QualifiedName {
    /// From the two unquoted parts.
    pub fn new(schema: impl Into<String>, name: impl Into<String>) -> Self {
        QualifiedName { schema: schema.into(), name: name.into() }
    }

    /// `"schema"."name"`, always quoted, for SQL.
    pub fn quoted(&self) -> String {
        format!("{}.{}", quote_ident(&self.schema), quote_ident(&self.name))
    }
}

/// `schema.name`, quoted only where PostgreSQL's reader would need it: for people.
impl fmt::Display for QualifiedName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", display_ident(&self.schema), display_ident(&self.name))
    }
}

fn display_ident(ident: &str) -> String {
    let plain = ident.starts_with(|c: char| c.is_ascii_lowercase() || c == '_')
        && ident.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_');
    if plain { ident.to_string() } else { quote_ident(ident) }
}

/// The origin of a second session that applies the stream whose first origin is this.
pub fn second_origin(origin: &str) -> String {
    format!("{origin}_2")
}

/// `"ident"` with inner double quotes doubled, as `quote_ident()` does when it must quote.
pub fn quote_ident(ident: &str) -> String {
    format!("\"{}\"", ident.replace('"', "\"\""))
}

/// `'text'` as a literal that is right whatever `standard_conforming_strings` says, as
/// `quote_literal()` gives it.
pub fn quote_literal(text: &str) -> String {
    let doubled = text.replace('\'', "''");
    if doubled.contains('\\') {
        format!(" E'{}'", doubled.replace('\\', "\\\\"))
    } else {
        format!("'{doubled}'")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_quoted_for_sql_and_plain_for_people() {
        let plain = QualifiedName::new("public", "accounts");
        assert_eq!(plain.quoted(), "\"public\".\"accounts\"");
        assert_eq!(plain.to_string(), "public.accounts");
        let odd = QualifiedName::new("My \"S\"", "a.b");
        assert_eq!(odd.quoted(), "\"My \"\"S\"\"\".\"a.b\"");
        assert_eq!(odd.to_string(), odd.quoted());
    }

    #[test]
    fn literals_survive_quotes_and_backslashes() {
        assert_eq!(quote_literal("it's"), "'it''s'");
        assert_eq!(quote_literal("a\\'b"), " E'a\\\\''b'");
    }

    #[test]
    fn job_names_make_valid_slot_names() {
        assert!("shop_2".parse::<JobName>().is_ok());
        for bad in ["", "Shop", "a-b", "a b", &"x".repeat(41)] {
            assert!(bad.parse::<JobName>().is_err(), "{bad}");
        }
        let longest: JobName = "x".repeat(40).parse().unwrap();
        assert!(longest.object(Stream::Forward).len() <= 63);
    }
}
