//! Tables that no stream carries because they came after it: a cutover without their rows would
//! lose them without a word, so it is refused by name. Where `--ddl` takes them in: `joining`.

use std::collections::HashSet;

use super::reading::Readings;
use super::run::Runner;
use super::{Result, published};
use crate::catalog::Table;
use crate::cutover;
use crate::decode::Plugin;
use crate::id::{QualifiedName, Stream};
use crate::pg::Session;
use crate::source::{Followed, publication};

impl Readings {
    /// Has the forward stream carry these as well.
    pub(super) fn follow_more(&mut self, tables: &[Table]) {
        self.forward_oids.resize(self.forward_tables.len(), 0);
        for table in tables {
            if self.forward_oids.contains(&table.oid) {
                continue;
            }
            self.forward_tables.push((table.name.schema.clone(), table.name.name.clone()));
            self.forward_oids.push(table.oid);
        }
    }
}

impl Runner {
    /// A table that was made after the job began is in no publication: its rows would stay behind
    /// and nothing would say so. A new partition of an old table is published with its parent, and
    /// must be on the other side.
    pub(super) async fn refuse_new_tables(&mut self, flip: Stream) -> Result<()> {
        let reading = self.reading(flip).await?;
        let unfollowed = self.unfollowed(flip).await?;
        let (live, dest, names) = match flip {
            Stream::Forward => (&self.config.source, &self.config.target, ("source", "target")),
            Stream::Reverse => (&self.config.target, &self.config.source, ("target", "source")),
        };
        let publication = self.config.job.object(flip);
        let tables = self.tables(live).await?;
        let given = self.config.options.publication.clone().filter(|_| flip == Stream::Forward);
        let publication = given.clone().unwrap_or(publication);
        let unpublished = match reading.plugin()? {
            Plugin::Pgoutput if given.is_some() => {
                published::unpublished(live, &publication, &tables).await?
            }
            Plugin::Pgoutput => {
                let tables: Vec<_> = tables.into_iter().map(|t| t.name).collect();
                let mut session = Session::control(live).await?;
                publication::missing(&mut session, &publication, &tables).await?
            }
            _ => unfollowed,
        };
        let there = self.all_tables(dest).await?;
        let here = self.fenced_tables(live).await?;
        let mut wrong: Vec<String> = unpublished
            .iter()
            .map(|t| format!("{t} is not in the {}'s publication {publication}", names.0))
            .collect();
        let is_there = |table: &QualifiedName| match &self.config.map {
            Some(map) if flip == Stream::Forward => there.contains(&map.target_of(table)),
            Some(map) => map.source_of(table).is_some_and(|source| there.contains(&source)),
            None => there.contains(table),
        };
        let absent = here.iter().filter(|t| !is_there(t) && !unpublished.contains(t));
        wrong.extend(absent.map(|t| format!("{t} is not on the {}", names.1)));
        if flip == Stream::Forward && self.config.map.is_none() {
            wrong.extend(self.barred(&here).await?);
        }
        if wrong.is_empty() {
            return Ok(());
        }
        Err(cutover::Error::NotFollowed { tables: wrong }.into())
    }

    /// What would refuse the way back once the switch is made. A target that is partitioned in
    /// another way is no obstacle: its rows come back through the root.
    async fn barred(&self, source: &[QualifiedName]) -> Result<Vec<String>> {
        let mut tables = self.tables(&self.config.target).await?;
        tables.retain(|t| t.partition_of.is_none() && !source.contains(&t.name));
        Ok(tables.iter().map(|t| format!("{} is not on the source", t.name)).collect())
    }

    /// Tables that a decoder without a publication passes over: made since, be it under an old
    /// name, and no partition of one that takes part.
    async fn unfollowed(&mut self, flip: Stream) -> Result<Vec<QualifiedName>> {
        let live = match flip {
            Stream::Forward => self.config.source.clone(),
            Stream::Reverse => self.config.target.clone(),
        };
        let followed = self.store.load_readings().await?.tables(flip);
        Ok(unfollowed(&followed, &self.tables(&live).await?))
    }
}

/// Of `tables`, those that are neither followed themselves nor partitions of one that is.
pub(super) fn unfollowed(followed: &Followed, tables: &[Table]) -> Vec<QualifiedName> {
    let this = |table: &&Table| followed.contains(table.oid, &table.name);
    let mut names: HashSet<QualifiedName> =
        tables.iter().filter(this).map(|table| table.name.clone()).collect();
    let mut unfollowed = tables.len();
    loop {
        for table in tables {
            let parent = table.partition_of.as_ref();
            if parent.is_some_and(|parent| names.contains(parent)) {
                names.insert(table.name.clone());
            }
        }
        let left = tables.iter().map(|t| &t.name).filter(|name| !names.contains(name));
        let left: Vec<QualifiedName> = left.cloned().collect();
        // A partition of a partition may have been looked at before its parent.
        if left.is_empty() || left.len() == unfollowed {
            return left;
        }
        unfollowed = left.len();
    }
}
