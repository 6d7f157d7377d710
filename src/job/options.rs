//! What a job was planned with, as it is stored with it.

use serde::{Deserialize, Serialize};

use super::Result;
use crate::catalog::{PatternError, Selection};
use crate::pg::Session;

/// What a job was planned with; a resume must not silently differ.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobOptions {
    /// `--include`.
    pub include: Vec<String>,
    /// `--exclude`.
    pub exclude: Vec<String>,
    /// `--schema-only`.
    pub schema_only: Vec<String>,
    /// `--large-objects leave`.
    #[serde(default)]
    pub leave_large_objects: bool,
    /// `--publication`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub publication: Option<String>,
    /// `--tables-only`.
    #[serde(default)]
    pub tables_only: bool,
    /// `--initial-copy none`: the target is a copy that somebody else made.
    #[serde(default)]
    pub brought: bool,
    /// `--two-way`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub two_way: bool,
    /// Other jobs write the same tables of the target, which are there: nothing is made and nothing
    /// emptied.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub shared: bool,
    /// What tells its map from any other, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub map: Option<String>,
}

impl JobOptions {
    /// They belong to no table: like pg_dump, a job of some tables only does not take them along.
    pub fn moves_large_objects(&self) -> bool {
        self.include.is_empty() && !self.leave_large_objects
    }

    /// The tables meant, as far as their names tell.
    pub fn patterns(&self) -> std::result::Result<Selection, PatternError> {
        let mut selection = Selection::parse(&self.include, &self.exclude, &self.schema_only)?;
        selection.tables_only = self.tables_only;
        Ok(selection)
    }

    /// The tables meant, knowing the partitions on this session's server.
    pub async fn selection(&self, session: &mut Session) -> Result<Selection> {
        Ok(self.patterns()?.with_partitions(session).await?)
    }
}

/// As on the command line.
impl std::fmt::Display for JobOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let lists = [
            ("--include", &self.include),
            ("--exclude", &self.exclude),
            ("--schema-only", &self.schema_only),
        ];
        let given = lists.iter().flat_map(|(option, list)| list.iter().map(move |p| (option, p)));
        let mut given: Vec<String> = given.map(|(option, p)| format!("{option} '{p}'")).collect();
        if self.leave_large_objects {
            given.push("--large-objects leave".to_string());
        }
        if self.tables_only {
            given.push("--tables-only".to_string());
        }
        if self.brought {
            given.push("--initial-copy none".to_string());
        }
        if self.two_way {
            given.push("--two-way".to_string());
        }
        if self.shared {
            given.push("tables that other jobs write as well".to_string());
        }
        given.extend(self.publication.iter().map(|name| format!("--publication '{name}'")));
        given.extend(self.map.iter().map(|digest| format!("the [[map]] of digest {digest}")));
        f.write_str(if given.is_empty() { "none" } else { "" })?;
        f.write_str(&given.join(" "))
    }
}
