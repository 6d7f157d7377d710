//! A job switched group by group: each group of its tables is fenced, drained and switched by
//! itself, while applications go on writing to all others, on whichever side these are.
//!
//! # Who owns a table
//! At any moment applications write to a table on one side, its owner, which is a row of
//! `walferry.ownership`: it changes, with the position of the barrier, in the very commit that is
//! the point of no return. A job whose tables are on both sides is in the phase `split`; the last
//! group to go leads to `switched`, the last to come back to `rolled_back`.
//!
//! # Why nothing is lost or written twice
//! - Each table is *sealed* on the side that does not own it, from before the first group's fence
//!   ([`Runner::part`]): a client that is led wrong gets an error, never two histories. Both sides
//!   are sealed between a fence and its switch, neither ever but while a switch is being undone.
//! - Both streams run all the time, as they do in any job whose way back is armed, and drop by
//!   origin what the other wrote. So neither needs to know where a table belongs: from the barrier
//!   on, the log of the side that does not own it has nothing of an application's. The reverse
//!   stream has a gate besides, open for the tables that are on the target; it turns while its
//!   table is sealed on both sides and drained, and is set from the stored owners at each start.
//! - A switch and its undoing are those of a whole job, with the locks, seals, sequences and routes
//!   of one group (`route::Context::group`). A crash between groups finds nothing half done; inside
//!   one, that group is undone, or finished past its point of no return.
//! - Before the first group is switched the job still follows, and where that group is refused, or
//!   the runner dies, nothing stays sealed ([`Runner::rejoin`]). A source whose standby took over
//!   is shut again where its tables have gone (`sealing`). Should a stream then be lost for good,
//!   `finish --split` ends the job with each table where it is.
//!
//! # What applications must expect
//! A transaction that touches tables on both sides cannot be made on one of them: the other's are
//! sealed there, and it fails as a whole with SQLSTATE 25006. Only the router can make it, as two
//! transactions, with what two-phase commit it has. A reader of one side sees the other side's
//! tables as far as the stream has come.
//!
//! # What is refused, by name
//! Foreign keys across owners (each side checks only what it has), routes that lead whole databases
//! (pgbouncer, plproxy, Citus, whose groups are jobs of their own), fences that shut a whole
//! database, roles that may not set session_replication_role, unlogged tables and large objects,
//! which no stream carries. Sequences that tables of several groups share are given twice their
//! increment, the sides taking turns, until the job ends; those owned by a table go with it.
//! Materialized views are not refreshed.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::flip::FlipRequest;
use super::owners::{Owners, is_on_target, side_name};
use super::run::Runner;
use super::state::{Event, Phase, step};
use super::store::JobRow;
use super::{Result, rest};
use crate::catalog::{self, ForeignKey, Selection, TableKind};
use crate::cutover::FenceKind;
use crate::decode::Plugin;
use crate::id::{QualifiedName, Stream};
use crate::large;
use crate::pg::{Config, Session};

/// A hook gets the names of its tables in one variable, of which Linux takes 128 KiB.
const NAMES_BYTES_LIMIT: usize = 100 << 10;

/// For so long the names of a side's tables are those that were read.
const NAMED_FOR: Duration = Duration::from_secs(10);

/// What of a job a flip is asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    /// All that is not on the other side yet.
    #[default]
    All,
    /// Tables by patterns, partitions under their partitioned table's as well.
    Tables(Vec<String>),
    /// Of so many groups, about equal in number of tables, the next: its number, from 1 on, and how
    /// many there are in all. Tables that foreign keys join are in one.
    Share(usize, usize),
}

/// Tables that are switched as one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Group {
    /// As it was asked for.
    pub label: String,
    /// Those that hold rows: partitioned ones have none of their own.
    pub tables: Vec<QualifiedName>,
}

/// Why a group is not switched.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    /// Nothing is left of it where the flip would lead it from.
    #[error(
        "no table of \"{label}\" is on the {side} to be switched from there: walferry status \
             shows where each group is"
    )]
    Nothing {
        /// The label.
        label: String,
        /// Where they were looked for.
        side: &'static str,
    },
    /// Keys across owners.
    #[error(
        "these foreign keys would be between tables on different servers, and none of them checks \
         that: {}. Switch both ends in one group, or drop the keys for the time", .0.join("; ")
    )]
    Crossing(Vec<String>),
    /// A route that leads whole databases.
    #[error(
        "{0} leads whole databases, and a group of tables cannot be led by it: use hook:COMMAND, \
         or fdw:URI,SERVER with a foreign server for each group"
    )]
    WholeRoute(String),
    /// A fence that shuts whole databases.
    #[error("--fence {0} is about a whole database: a group is fenced by its locks, --fence lock")]
    WholeFence(String),
    /// An option or a right of the job that does not go with it.
    #[error("tables cannot be switched group by group here: {0}")]
    Unfit(&'static str),
    /// Tables that no stream carries.
    #[error(
        "no stream carries the unlogged tables {}, and they belong to no group: --unlogged leave \
         leaves their rows as they were copied", .0.join(", ")
    )]
    Unlogged(Vec<String>),
    /// Tables that one side or the publication lacks.
    #[error(
        "the group cannot be switched: {}. Tables that were made since the job began are in no \
         stream; end the job, or leave them out by --tables", .0.join("; ")
    )]
    NotFollowed(Vec<String>),
    /// Tables that could not be compared with the other side.
    #[error(
        "these tables were switched or rewritten each time they were to be compared: {}. Run \
             walferry verify again while no group is being switched", .0.join(", ")
    )]
    Moving(Vec<String>),
    /// Names that a hook cannot be told.
    #[error(
        "the names of {0} tables are too long a list for a hook's environment: make more groups of \
         them"
    )]
    TooMany(usize),
}

impl Runner {
    /// Finds the tables of a flip that is asked for by group, and refuses what cannot be switched
    /// so. Changes nothing; gives the job's row.
    pub(super) async fn choose_group(&mut self, request: &mut FlipRequest) -> Result<JobRow> {
        let row = self.row().await?;
        let flip = request.stream();
        if request.part == Part::All && row.phase != Phase::Split {
            return Ok(row);
        }
        step(row.phase, Event::FlipAsked(flip))?;
        self.refuse_unfit(request, &row).await?;
        // The last of a series is to leave nothing behind.
        let last = match &request.part {
            Part::All => true,
            Part::Tables(_) => false,
            Part::Share(number, of) => number >= of,
        };
        let named = self.named_lately(flip, !last).await?;
        if request.unlogged != rest::Unlogged::Leave {
            let unlogged = named.iter().filter(|t| t.unlogged).map(|t| t.name.to_string());
            let unlogged: Vec<String> = unlogged.collect();
            if !unlogged.is_empty() {
                return Err(Refused::Unlogged(unlogged).into());
            }
        }
        let owners = self.owners(&row, &named).await?;
        let from = is_on_target(flip);
        let here = owners.iter().filter(|(_, there)| **there == from);
        let mut here: Vec<&QualifiedName> = here.map(|(table, _)| *table).collect();
        here.sort();
        let mut live = self.borrow(flip).await?;
        let keys = catalog::foreign_keys(&mut live).await?;
        let (label, tables) = chosen(&request.part, &here, &keys, &mut live).await?;
        if tables.is_empty() {
            return Err(Refused::Nothing { label, side: side_name(from) }.into());
        }
        let bytes: usize = tables.iter().map(|table| table.to_string().len() + 1).sum();
        if bytes > NAMES_BYTES_LIMIT && request.routes.iter().any(|r| r.starts_with("hook:")) {
            return Err(Refused::TooMany(tables.len()).into());
        }
        refuse_crossing(&keys, &owners, &tables, from)?;
        self.refuse_unfollowed(flip, &tables, &mut live).await?;
        self.give_back(flip, live);
        request.refresh = rest::Refresh::Never;
        request.group = Some(Group { label, tables });
        Ok(row)
    }

    /// The live side's tables, as they were a moment ago if that `will_do`: a series of groups asks
    /// again and again, and thousands take long to read. What was made since is found a bit later.
    pub(super) async fn named_lately(
        &mut self,
        flip: Stream,
        will_do: bool,
    ) -> Result<Arc<Vec<catalog::Named>>> {
        if let Some((at, side, named)) = &self.probes.named
            && will_do
            && *side == flip
            && at.elapsed() < NAMED_FOR
        {
            return Ok(named.clone());
        }
        let mut live = self.borrow(flip).await?;
        let named = Arc::new(catalog::named(&mut live, &self.selection).await?);
        self.give_back(flip, live);
        self.probes.named = Some((Instant::now(), flip, named.clone()));
        Ok(named)
    }

    pub(super) fn live(&self, flip: Stream) -> &Config {
        match flip {
            Stream::Forward => &self.config.source,
            Stream::Reverse => &self.config.target,
        }
    }

    /// Every table that holds rows, with its owner: as stored, in a job that is split, else the
    /// side that the phase says.
    pub(super) async fn owners<'a>(
        &mut self,
        row: &JobRow,
        named: &'a [catalog::Named],
    ) -> Result<HashMap<&'a QualifiedName, bool>> {
        let stored = match row.phase {
            Phase::Split => self.store.owners().await?,
            _ => Owners::default(),
        };
        let whole = row.phase == Phase::Switched;
        let plain = named.iter().filter(|t| t.kind == TableKind::Plain && !t.unlogged);
        let owner = |name: &QualifiedName| stored.get(name).copied().unwrap_or(whole);
        Ok(plain.map(|table| (&table.name, owner(&table.name))).collect())
    }

    async fn refuse_unfit(&mut self, request: &FlipRequest, row: &JobRow) -> Result<()> {
        if request.fence.parse::<FenceKind>()? != FenceKind::Lock {
            return Err(Refused::WholeFence(request.fence.clone()).into());
        }
        for route in self.config.secrets.routes(&request.routes)? {
            if !matches!(route.kind(), "hook" | "fdw") {
                return Err(Refused::WholeRoute(route.to_string()).into());
            }
        }
        let unfit = |why| Err(Refused::Unfit(why).into());
        if self.config.map.is_some() {
            return unfit("what a map changes has no way back");
        }
        if self.config.options.publication.is_some() {
            return unfit(
                "an administrator's publication may show other tables than those that \
                          hold the rows; start the job without --publication",
            );
        }
        let (source, target) = (row.abilities.source, row.abilities.target);
        if !source.replica_role || !target.replica_role {
            return unfit(
                "a stream writes beside applications, and its role may not set \
                          session_replication_role on both sides (superusers may; from PostgreSQL \
                          15 on GRANT SET ON PARAMETER session_replication_role)",
            );
        }
        if rest::moves_large_objects(&mut self.store.session, &self.config).await? {
            let mut source = self.borrow(Stream::Forward).await?;
            let large = large::count(&mut source).await?;
            self.give_back(Stream::Forward, source);
            if large > 0 {
                return unfit(
                    "large objects belong to no table; start the job with \
                              --large-objects leave and carry them yourself",
                );
            }
        }
        Ok(())
    }

    /// Tables that the stream from the live side would not carry.
    async fn refuse_unfollowed(
        &mut self,
        flip: Stream,
        tables: &[QualifiedName],
        live: &mut Session,
    ) -> Result<()> {
        let reading = self.reading(flip).await?;
        let is_published = reading.plugin()? == Plugin::Pgoutput;
        let publication = self.config.job.object(flip);
        let showing = async {
            match is_published {
                true => catalog::published_of(live, &publication, tables).await,
                false => Ok(HashSet::new()),
            }
        };
        let mut other = self.borrow(flip.opposite()).await?;
        let (there, shown) = tokio::try_join!(catalog::plain_of(&mut other, tables), showing)?;
        self.give_back(flip.opposite(), other);
        let dest = &self.live(flip.opposite()).label;
        let absent = tables.iter().filter(|table| !there.contains(table));
        let mut wrong: Vec<String> =
            absent.map(|t| format!("{t} is no plain table on the {dest}")).collect();
        if is_published {
            let missing =
                tables.iter().filter(|t| self.selection.has_rows(t) && !shown.contains(*t));
            wrong.extend(missing.map(|t| format!("{t} is not in publication {publication}")));
        } else {
            let oids = catalog::oids(live, tables).await?;
            let followed = self.store.load_readings().await?.tables(flip);
            let missing = oids
                .iter()
                .filter(|(t, oid)| self.selection.has_rows(t) && !followed.contains(**oid, t));
            wrong.extend(missing.map(|(t, _)| format!("{t} is followed by no stream")));
        }
        if wrong.is_empty() { Ok(()) } else { Err(Refused::NotFollowed(wrong).into()) }
    }
}

/// What is asked for, of the tables that are `here`, with a name for it.
async fn chosen(
    part: &Part,
    here: &[&QualifiedName],
    keys: &[ForeignKey],
    live: &mut Session,
) -> Result<(String, Vec<QualifiedName>)> {
    let here_alone = here.iter().copied();
    Ok(match part {
        Part::All => ("the rest".to_string(), here_alone.cloned().collect()),
        Part::Share(number, of) => {
            let left = of.saturating_sub(*number).saturating_add(1).max(1);
            let take = here.len().div_ceil(left);
            (format!("{number} of {of}"), together(here, keys, take))
        }
        Part::Tables(patterns) => {
            let selection = Selection::parse(patterns, &[], &[])?.with_partitions(live).await?;
            let tables = here_alone.filter(|table| selection.has_schema(table));
            (patterns.join(" "), tables.cloned().collect())
        }
    })
}

/// The first of these tables, at least so many, each with all that keys join to it, at any
/// distance.
fn together(here: &[&QualifiedName], keys: &[ForeignKey], least: usize) -> Vec<QualifiedName> {
    let there: HashSet<&QualifiedName> = here.iter().copied().collect();
    let mut joined: HashMap<&QualifiedName, Vec<&QualifiedName>> = HashMap::new();
    for key in keys {
        for (one, other) in [(&key.table, &key.other), (&key.other, &key.table)] {
            joined.entry(one).or_default().push(other);
        }
    }
    let (mut chosen, mut seen) = (Vec::new(), HashSet::new());
    for &table in here {
        if chosen.len() >= least {
            break;
        }
        let mut reached = vec![table];
        while let Some(table) = reached.pop() {
            if there.contains(table) && seen.insert(table) {
                chosen.push(table.clone());
                reached.extend(joined.get(table).into_iter().flatten());
            }
        }
    }
    chosen
}

/// Foreign keys between a table of the group and one that would have another owner then.
fn refuse_crossing(
    keys: &[ForeignKey],
    owners: &HashMap<&QualifiedName, bool>,
    group: &[QualifiedName],
    from: bool,
) -> Result<()> {
    let group: HashSet<&QualifiedName> = group.iter().collect();
    let after = |table: &QualifiedName| {
        let owner = owners.get(table)?;
        Some(if group.contains(table) { !from } else { *owner })
    };
    let mut crossing = Vec::new();
    for ForeignKey { name, table, other, .. } in keys {
        let (Some(one), Some(two)) = (after(table), after(other)) else { continue };
        if one != two && (group.contains(table) || group.contains(other)) {
            crossing.push(format!("{table} to {other} ({name})"));
        }
    }
    if crossing.is_empty() { Ok(()) } else { Err(Refused::Crossing(crossing).into()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_that_keys_join_are_in_one_group_at_any_distance() {
        let name = |name: &str| QualifiedName::new("public", name);
        let key = |table: &str, other: &str| ForeignKey {
            name: "k".to_string(),
            table: name(table),
            other: name(other),
            columns: String::new(),
        };
        let keys = [key("a", "e"), key("c", "e"), key("b", "b"), key("d", "elsewhere")];
        let here = ["a", "b", "c", "d", "e"].map(name);
        let here: Vec<&QualifiedName> = here.iter().collect();
        let chosen = |least| -> String {
            let chosen = together(&here, &keys, least);
            chosen.iter().map(|table| table.name.as_str()).collect()
        };
        assert_eq!([1, 3, 4, 5].map(chosen), ["aec", "aec", "aecb", "aecbd"]);
        assert_eq!(together(&[], &keys, 1), Vec::<QualifiedName>::new());
    }
}
