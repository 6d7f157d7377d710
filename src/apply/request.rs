//! One request to the target: its bytes, what each statement in it is for, and what came back.

use std::sync::Arc;

use super::claims::Claims;
use super::error::{Error, Result};
use super::lanes::Lane;
use crate::id::QualifiedName;
use crate::lsn::Lsn;
use crate::pg::{self, Pipeline, Reply};

/// What a statement of a request is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// BEGIN, savepoints, settings, counters.
    Aside,
    /// One step of the batch, by its place; `bare` is an INSERT whose tag must say 1.
    Step {
        /// Place among the steps.
        at: usize,
        /// The command tag is to be looked at.
        bare: bool,
    },
    /// A set of rows; a bare INSERT of so many, whose tag must say so.
    Set {
        /// How many rows the tag must tell.
        bare: Option<usize>,
    },
    /// Progress.
    Progress,
    /// PREPARE TRANSACTION.
    Prepare,
    /// COMMIT.
    Commit,
    /// The question where the log stands.
    Position,
}

/// Statements being collected, in one order of writing.
#[derive(Debug, Default)]
pub(super) struct Request {
    /// Their bytes.
    pub pipeline: Pipeline,
    /// One for each statement that answers.
    pub roles: Vec<Role>,
    /// Rows that it writes: fewer than there are changes, where they were folded.
    pub rows: usize,
    /// Prepared statements that it drops.
    pub closed: Vec<String>,
    /// In which session.
    pub lane: Lane,
    /// What it writes, where somebody may want to begin beside it.
    pub claims: Option<Claims>,
    /// What those before it write that are in the other session.
    pub others: Vec<Arc<Claims>>,
    /// What is sent once all those have landed; `None` where all is sent at once.
    pub late: Option<Box<Request>>,
}

impl Request {
    /// Adds a statement without parameters whose answer does not matter.
    pub fn aside(&mut self, sql: &str) {
        self.pipeline.once(sql);
        self.roles.push(Role::Aside);
    }

    /// Itself, or what is sent later of it.
    pub fn part(&mut self, late: bool) -> &mut Request {
        match late && self.late.is_some() {
            true => self.late.get_or_insert_default(),
            false => self,
        }
    }

    /// True if one of those before it, in the other session, writes to the table.
    pub fn meets(&self, table: &QualifiedName) -> bool {
        self.others.iter().any(|claims| claims.touches(table))
    }

    /// Adds a prepared statement without parameters.
    pub fn run(&mut self, name: &str, role: Role) {
        self.pipeline.run(name, std::iter::empty());
        self.roles.push(role);
    }
}

/// What came back.
#[derive(Debug, Default)]
pub(super) struct Replies {
    done: usize,
    prepare_tag: Option<String>,
    commit_tag: Option<String>,
    position: Option<pg::Row>,
    /// The first bare INSERT whose tag was not what it had to be.
    odd: Option<usize>,
}

impl Replies {
    /// Takes the next reply.
    pub fn take(&mut self, roles: &[Role], reply: Reply) {
        let role = roles.get(self.done);
        match reply {
            Reply::Row(row) => {
                if role == Some(&Role::Position) {
                    self.position = Some(row);
                }
            }
            Reply::Done(tag) => {
                let rows = match role {
                    Some(Role::Step { bare: true, .. }) => Some(1),
                    Some(Role::Set { bare }) => *bare,
                    _ => None,
                };
                let told = || tag.rsplit(' ').next().and_then(|n| n.parse().ok());
                if rows.is_some_and(|rows| told() != Some(rows)) {
                    self.odd = self.odd.or(Some(self.done));
                }
                match role {
                    Some(Role::Prepare) => self.prepare_tag = Some(tag),
                    Some(Role::Commit) => self.commit_tag = Some(tag),
                    _ => {}
                }
                self.done += 1;
            }
        }
    }

    /// The role of the statement that has not been answered: the one that failed.
    pub fn failed(&self, roles: &[Role]) -> Option<Role> {
        roles.get(self.done).copied()
    }

    /// The role of a bare INSERT that inserted another number of rows.
    pub fn odd(&self, roles: &[Role]) -> Option<Role> {
        roles.get(self.odd?).copied()
    }

    /// Where the log stands after COMMIT; `None` if the request did not commit. An error if COMMIT
    /// did not commit, or replies are missing.
    pub fn settle(self, roles: &[Role], end_lsn: Lsn) -> Result<Option<(Lsn, Lsn)>> {
        if roles.contains(&Role::Prepare) {
            let tag = self.prepare_tag.unwrap_or_default();
            if tag != "PREPARE TRANSACTION" {
                return Err(Error::NotCommitted { tag, end_lsn });
            }
        }
        if roles.contains(&Role::Commit) {
            let tag = self.commit_tag.unwrap_or_default();
            if tag != "COMMIT" {
                return Err(Error::NotCommitted { tag, end_lsn });
            }
        }
        if self.done != roles.len() {
            let (done, due) = (self.done, roles.len());
            return Err(Error::Broken(format!("{done} replies where {due} are due")));
        }
        match self.position {
            Some(row) => Ok(Some((row.lsn(0)?, row.lsn(1)?))),
            None => Ok(None),
        }
    }
}
