//! Which rows of which tables go where, and each pair as an ordinary job.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::Error;
use crate::catalog::{self, ForeignKey, Selection, TableKind};
use crate::copy::Freeze;
use crate::id::{JobName, QualifiedName, quote_ident};
use crate::job::lease;
use crate::job::store::JobOptions;
use crate::job::{self, JobConfig, Result};
use crate::map::{Map, Shard, Slice};
use crate::pg::{Config, Purpose, Session};

/// What is to be done, as walferry.toml says it.
#[derive(Clone, Debug)]
pub struct Reshard {
    /// Its name; pairs are called after it.
    pub name: JobName,
    /// Where rows come from; the first also gives schema and reference tables.
    pub sources: Vec<Config>,
    /// Where they go; the first is the home.
    pub targets: Vec<Config>,
    /// What all pairs have in common.
    pub base: JobConfig,
    /// `[[shard]]`.
    pub shards: Vec<Shard>,
    /// Tables that go to every target whole.
    pub reference: Vec<QualifiedName>,
    /// Patterns of tables that stay.
    pub exclude: Vec<String>,
}

/// What is done with a table: a slice for each target, or none where all rows go to all of them.
pub type Table = Option<Vec<Slice>>;

/// Tables as they are on the sources.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Layout(pub(super) BTreeMap<QualifiedName, Table>);

/// A source, a target, and their job.
#[derive(Clone, Debug)]
pub(super) struct Pair {
    /// From 0.
    pub source: usize,
    /// From 0.
    pub target: usize,
    pub config: JobConfig,
}

impl Reshard {
    /// Where its row is.
    pub(super) fn home(&self) -> Result<&Config> {
        let none = || unfit("targets is empty: list the targets' URIs".to_string());
        self.targets.first().ok_or_else(none)
    }

    /// A side as the runner's own sessions are told from all others.
    pub(super) fn named(&self, side: &Config) -> Config {
        side.clone().with_application_name(&lease::application_name(&self.name))
    }

    /// What is wrong with the file itself, whatever the servers have.
    ///
    /// # Errors
    /// All of it.
    pub fn refuse_nonsense(&self) -> Result<()> {
        let mut problems = Vec::new();
        let count = self.targets.len() as u32;
        if self.sources.is_empty() || self.targets.is_empty() {
            problems.push("list the URIs of sources and of targets".to_string());
        }
        if self.name.as_str().len() > 32 {
            problems.push("its name is longer than 32 characters".to_string());
        }
        if self.shards.is_empty() {
            problems.push("there is no [[shard]]: say how a table is shared out".to_string());
        }
        let mut names = BTreeSet::new();
        for shard in &self.shards {
            match shard.refuse_nonsense(count).and_then(|()| shard.name()) {
                Err(why) => problems.push(why),
                Ok(name) if !names.insert(name.clone()) || self.reference.contains(&name) => {
                    problems.push(format!("table {name} is named twice"));
                }
                Ok(_) => {}
            }
        }
        refuse(problems)
    }

    /// Looks at the sources' tables.
    ///
    /// # Errors
    /// What does not fit, all of it.
    pub(super) async fn layout(&self) -> Result<Layout> {
        self.refuse_nonsense()?;
        let mut problems = Vec::new();
        let mut layouts = Vec::new();
        let mut encodings = BTreeSet::new();
        for (place, source) in self.sources.iter().enumerate() {
            let mut session = Session::connect(source, Purpose::Sql).await?;
            let encoding = session.parameter("server_encoding").unwrap_or_default();
            encodings.insert(encoding.to_string());
            let layout = self.layout_of(&mut session, place, &mut problems).await?;
            if place == 0 {
                problems.extend(self.torn_keys(&mut session).await?);
            }
            layouts.push(layout);
        }
        if encodings.len() > 1 {
            let names: Vec<&str> = encodings.iter().map(String::as_str).collect();
            problems.push(format!(
                "the sources have different encodings ({}), and hashes of texts with them",
                names.join(", ")
            ));
        }
        let mut layouts = layouts.into_iter();
        let first = layouts.next().unwrap_or_default();
        for (place, other) in layouts.enumerate() {
            for (name, slices) in other {
                if first.get(&name).is_some_and(|of_first| *of_first != slices) {
                    problems.push(format!(
                        "the column by which {name} is shared out is of another type on source {} \
                         than on the first",
                        place + 2
                    ));
                }
            }
        }
        refuse(problems)?;
        let whole = self.reference.iter().map(|name| (name.clone(), None));
        Ok(Layout(first.into_iter().chain(whole).collect()))
    }

    /// The tables of one source that are shared out.
    async fn layout_of(
        &self,
        session: &mut Session,
        place: usize,
        problems: &mut Vec<String>,
    ) -> Result<BTreeMap<QualifiedName, Table>> {
        let selection = Selection::parse(&[], &self.exclude, &[]).map_err(job::Error::from)?;
        let selection = selection.with_partitions(session).await?;
        let mut tables = catalog::tables(session, &selection).await?;
        let number = place + 1;
        let mut layout = BTreeMap::new();
        for shard in &self.shards {
            let name = shard.name().map_err(unfit)?;
            let Some(at) = tables.iter().position(|table| table.name == name) else {
                problems.push(format!("source {number} has no table {name}"));
                continue;
            };
            let table = tables.swap_remove(at);
            if table.kind == TableKind::Partitioned {
                problems.push(format!("table {name} is partitioned, which cannot be shared out"));
                continue;
            }
            if table.key.is_empty() && self.sources.len() > 1 {
                // Two pairs would each delete the same one of two equal rows.
                problems.push(format!(
                    "table {name} has no key, and equal rows of several sources could not be told \
                     apart: give it a primary key"
                ));
                continue;
            }
            let Some(column) = table.columns.iter().find(|c| c.name == shard.column) else {
                problems.push(format!("table {name} has no column {}", shard.column));
                continue;
            };
            match shard.slices(&column.typed(), self.targets.len() as u32) {
                Ok(slices) => drop(layout.insert(name, Some(slices))),
                Err(why) => problems.push(why),
            }
        }
        let is_whole = |name: &QualifiedName| self.reference.contains(name);
        for name in self.reference.iter().filter(|_| place == 0) {
            if !tables.iter().any(|table| table.name == *name) {
                problems.push(format!("source 1 has no table {name}, which reference names"));
            }
        }
        for table in tables.iter().filter(|table| !is_whole(&table.name)) {
            problems.push(format!(
                "nothing says where rows of {} on source {number} go: give it a [[shard]], name it \
                 in reference, or in exclude",
                table.name
            ));
        }
        Ok(layout)
    }

    /// Foreign keys whose rows would point to rows of another target, which nobody would notice.
    async fn torn_keys(&self, session: &mut Session) -> Result<Vec<String>> {
        let shard = |name: &QualifiedName| {
            self.shards.iter().find(|shard| shard.name().as_ref() == Ok(name))
        };
        let mut problems = Vec::new();
        for ForeignKey { name, table, other, columns } in catalog::foreign_keys(session).await? {
            let holds = match (shard(&table), shard(&other)) {
                (_, None) => true,
                (None, Some(_)) => !self.reference.contains(&table),
                (Some(here), Some(there)) => {
                    let both = format!("{}={}", here.column, there.column);
                    let same = Shard {
                        table: here.table.clone(),
                        column: here.column.clone(),
                        ..there.clone()
                    };
                    *here == same && columns.split(',').any(|pair| pair == both)
                }
            };
            if !holds {
                problems.push(format!(
                    "foreign key {} of {table} leads to rows of {other} that go to other targets: \
                     share both out by the columns of the key in the same way, make {other} a \
                     reference table, or drop the key",
                    quote_ident(&name)
                ));
            }
        }
        Ok(problems)
    }

    /// All pairs, by target, then by source.
    pub(super) fn pairs(&self, layout: &Layout) -> Result<Vec<Pair>> {
        let mut pairs = Vec::new();
        for target in 0..self.targets.len() {
            for source in 0..self.sources.len() {
                pairs.push(self.pair(layout, source, target)?);
            }
        }
        Ok(pairs)
    }

    fn pair(&self, layout: &Layout, source: usize, target: usize) -> Result<Pair> {
        let (Some(from), Some(to)) = (self.sources.get(source), self.targets.get(target)) else {
            return Err(unfit(format!("there is no pair {source}, {target}")));
        };
        let own = layout.0.iter().filter(|(_, slices)| slices.is_some() || source == 0);
        let tables: BTreeMap<QualifiedName, Option<Slice>> = own
            .map(|(name, slices)| {
                let slice = slices.as_ref().and_then(|slices| slices.get(target));
                (name.clone(), slice.cloned())
            })
            .collect();
        let shared = self.sources.len() > 1;
        let map = Arc::new(Map::sliced(&tables, shared));
        let name = format!("{}_{}_{}", self.name, source + 1, target + 1);
        let mut config = self.base.clone();
        config.job = name.parse().map_err(|e| unfit(format!("{e}")))?;
        config.source = from.clone().labelled(&format!("source {}", source + 1));
        config.target = to.clone().labelled(&format!("target {}", target + 1));
        config.options = JobOptions {
            include: tables.keys().map(QualifiedName::quoted).collect(),
            leave_large_objects: true,
            shared: true,
            map: Some(map.digest().to_string()),
            ..JobOptions::default()
        };
        config.map = Some(map);
        config.one_way = true;
        config.bulk.freeze = Freeze::Never;
        Ok(Pair { source, target, config })
    }

    /// Tells it from any other, and shows nothing secret.
    pub(super) fn digest(&self, pairs: &[Pair]) -> String {
        let maps: Vec<&str> =
            pairs.iter().filter_map(|pair| pair.config.options.map.as_deref()).collect();
        let (from, to) = (self.sources.len(), self.targets.len());
        format!("{from} sources, {to} targets, maps {}", maps.join(" "))
    }
}

pub(super) fn unfit(problem: String) -> job::Error {
    Error::Unfit { problems: vec![problem] }.into()
}

fn refuse(problems: Vec<String>) -> Result<()> {
    match problems.is_empty() {
        true => Ok(()),
        false => Err(Error::Unfit { problems }.into()),
    }
}
