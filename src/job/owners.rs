//! Which side each table of a job that is split belongs to: where that is stored, how it begins,
//! and how it changes hands. `groups` says why.
//!
//! Of thousands of tables they are read once and known from then on: only who holds the lease
//! writes them, and whoever takes it next ends his predecessor's sessions before it does anything.
//! So they are what was read or written last, unless nobody knows what has become of a commit; then
//! they are read again.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use serde::Serialize;

use super::request::stream_of;
use super::run::{Notice, Runner};
use super::state::Phase;
use super::store::{FlipRecord, JobRow, Store, ensure, json};
use super::{Error, Result, two_way};
use crate::apply::{self, Open};
use crate::catalog::{self, TableKind};
use crate::cutover::Sealing;
use crate::id::{JobName, QualifiedName, Stream, quote_literal};
use crate::lsn::Lsn;
use crate::pg::Session;

/// By table, true where applications write to it on the target.
pub(super) type Owners = Arc<HashMap<QualifiedName, bool>>;

/// By table of one side, since when that owns it: text that differs after each switch.
pub(super) type Since = HashMap<QualifiedName, String>;

/// Tables of a group that is on one side.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct GroupStatus {
    /// The label it was switched by last; `None` for those that never were.
    pub group: Option<String>,
    /// `source` or `target`: where applications write to them.
    pub owner: String,
    /// Number of tables.
    pub tables: i64,
    /// The barrier of its last switch, in the log of the side that it left.
    pub switched_lsn: Option<String>,
}

impl Store {
    /// Of all tables that a group was ever made of.
    pub(super) async fn owners(&mut self) -> Result<Owners> {
        if let Some(known) = &self.known_owners {
            return Ok(known.clone());
        }
        let sql = "select schema, name, on_target from walferry.ownership where job = $1";
        let job = self.job().as_str().to_string();
        let rows = self.session.query_params(sql, &[Some(&job)]).await?;
        let owners =
            rows.iter().map(|row| Ok((QualifiedName::new(row.str(0)?, row.str(1)?), row.bool(2)?)));
        let owners = Arc::new(owners.collect::<Result<_>>()?);
        self.known_owners = Some(Arc::clone(&owners));
        Ok(owners)
    }

    /// The point of no return: stores phase and flip, and who owns the flip's tables from its
    /// barrier on, in one commit.
    pub async fn pass(&mut self, phase: Phase, flip: &FlipRecord) -> Result<()> {
        let handed = hand_over(self.job(), flip)?;
        let sql = format!(
            "with handed as ({handed}) update walferry.job set phase = $2, flip = $3::jsonb, \
             error = null, updated_at = now() where name = $1"
        );
        let (job, phase, record) = (self.job().to_string(), phase.to_string(), json(flip)?);
        self.forget();
        let known = self.known_owners.take();
        self.session.query_params(&sql, &[Some(&job), Some(&phase), Some(&record)]).await?;
        self.known_owners = known.map(|owners| handed_over(owners, flip));
        Ok(())
    }

    /// Notes the owner of tables that have none on record, or of all.
    async fn note_owners(&mut self, tables: &[QualifiedName], on_target: bool) -> Result<()> {
        let names = serde_json::to_string(tables).map_err(|e| Error::State(e.to_string()))?;
        let sql = "insert into walferry.ownership (job, schema, name, on_target) \
             select $1, t.schema, t.name, $3::bool \
             from pg_catalog.jsonb_to_recordset($2::jsonb) t(schema text, name text) \
             on conflict (job, schema, name) do update set on_target = excluded.on_target";
        let job = self.job().as_str().to_string();
        let on_target = on_target.to_string();
        self.known_owners = None;
        self.session.query_params(sql, &[Some(&job), Some(&names), Some(&on_target)]).await?;
        Ok(())
    }

    async fn forget_owners(&mut self) -> Result<()> {
        let job = self.job().as_str().to_string();
        let sql = "delete from walferry.ownership where job = $1";
        self.known_owners = None;
        self.session.query_params(sql, &[Some(&job)]).await?;
        Ok(())
    }

    /// The tables of one side, as it is now.
    pub(super) async fn owned_since(&mut self, on_target: bool) -> Result<Since> {
        let sql = "select schema, name, changed_at from walferry.ownership \
             where job = $1 and on_target = $2::bool";
        let params = [self.job().to_string(), on_target.to_string()];
        let rows = self.session.query_params(sql, &params.each_ref().map(|p| Some(&**p))).await?;
        let owned = rows.iter();
        owned.map(|r| Ok((QualifiedName::new(r.str(0)?, r.str(1)?), r.string(2)?))).collect()
    }

    /// Where each group is, the largest first.
    pub(super) async fn groups(&mut self) -> Result<Vec<GroupStatus>> {
        let sql = "select switched_by, on_target, count(*), max(lsn::text) \
             from walferry.ownership where job = $1 group by switched_by, on_target, lsn \
             order by min(changed_at), 1";
        let there = "select pg_catalog.to_regclass('walferry.ownership') is not null";
        if !self.session.query_one(there, &[]).await?.bool(0)? {
            return Ok(Vec::new());
        }
        let job = self.job().as_str().to_string();
        let rows = self.session.query_params(sql, &[Some(&job)]).await?;
        let read = rows.iter().map(|row| {
            Ok(GroupStatus {
                group: row.opt(0)?.map(str::to_string),
                owner: side_name(row.bool(1)?).to_string(),
                tables: row.parse(2)?,
                switched_lsn: row.opt(3)?.map(str::to_string),
            })
        });
        read.collect()
    }
}

/// An owner's name.
pub(super) fn side_name(on_target: bool) -> &'static str {
    if on_target { "target" } else { "source" }
}

/// The side that a flip leads from, as an owner.
pub(super) fn is_on_target(flip: Stream) -> bool {
    flip == Stream::Reverse
}

impl Runner {
    /// Makes the job one whose tables have owners of their own, before its first group: notes where
    /// they are, and seals each on the other side. Tables that came since are taken up as well.
    /// Every step may be repeated.
    pub(super) async fn part(&mut self, flip: Stream, row: &JobRow) -> Result<()> {
        let named = self.named_lately(flip, true).await?;
        let owners = self.owners(row, &named).await?;
        let known = match row.phase {
            Phase::Split => self.store.owners().await?,
            _ => Owners::default(),
        };
        let fresh = owners.keys().filter(|table| !known.contains_key(**table));
        let mut fresh: Vec<QualifiedName> = fresh.map(|table| (*table).clone()).collect();
        if row.phase == Phase::Split && fresh.is_empty() {
            // The gate is as the last group has left it.
            return Ok(());
        }
        if !fresh.is_empty() {
            fresh.sort();
            let on_target = row.phase == Phase::Switched;
            let other = if on_target { Stream::Forward } else { Stream::Reverse };
            self.say(Notice::Said(format!(
                "sealing {} tables on the {}, which does not own them yet",
                fresh.len(),
                side_name(!on_target)
            )));
            // What is on record is taken for sealed in a job that is split; in one that is not, it
            // tells `rejoin` what there is to be opened.
            if row.phase != Phase::Split {
                self.store.note_owners(&fresh, on_target).await?;
            }
            let side = self.live(other).clone();
            let mut session = Session::control(&side).await?;
            let job = self.config.job.clone();
            Sealing { job: &job, tables: &fresh, is_group: true }.shut(&mut session).await?;
            if row.phase == Phase::Split {
                self.store.note_owners(&fresh, on_target).await?;
            } else {
                self.unseal_parents(&named).await?;
                self.disjoin_shared(on_target, &owners).await?;
            }
        }
        let owners = self.store.owners().await?;
        self.gate.set(Open::Tables(on_target(&owners)));
        Ok(())
    }

    /// A job that still follows has no table on the target. Where its first group was refused, or
    /// its runner killed before that was switched, seals and stretched sequences are taken away, as
    /// if it had never been asked for. Every step may be repeated.
    pub(super) async fn rejoin(&mut self) -> Result<()> {
        let owners = self.store.owners().await?;
        if owners.is_empty() {
            return Ok(());
        }
        let tables: Vec<QualifiedName> = owners.keys().cloned().collect();
        self.say(Notice::Said(format!(
            "no group was switched: opening {} tables on the target",
            tables.len()
        )));
        let job = self.config.job.clone();
        let mut source = Session::control(&self.config.source).await?;
        let mut target = Session::control(&self.config.target).await?;
        Sealing { job: &job, tables: &tables, is_group: true }.open(&mut target).await?;
        two_way::part(Some(&mut source), &mut target, &job).await?;
        self.store.forget_owners().await
    }

    /// The tables that are shut, group by group, on the side that `flip` led away from; none in a
    /// job that never was switched so.
    pub(super) async fn shut_by_group(&mut self, flip: Stream) -> Result<Vec<QualifiedName>> {
        let gone = flip == Stream::Forward;
        let owners = self.store.owners().await?;
        let shut = owners.iter().filter(|(_, there)| **there == gone);
        let mut shut: Vec<QualifiedName> = shut.map(|(table, _)| table.clone()).collect();
        shut.sort();
        Ok(shut)
    }

    /// A statement by a partitioned parent may reach tables of either owner: the seal of each is
    /// what it meets.
    async fn unseal_parents(&mut self, named: &[catalog::Named]) -> Result<()> {
        let parents = named.iter().filter(|t| t.kind == TableKind::Partitioned);
        let parents: Vec<QualifiedName> = parents.map(|t| t.name.clone()).collect();
        let job = self.config.job.clone();
        for side in [&self.config.source, &self.config.target] {
            let mut session = Session::control(side).await?;
            Sealing { job: &job, tables: &parents, is_group: true }.open(&mut session).await?;
        }
        Ok(())
    }

    /// Both sides draw from sequences that no table of a group owns.
    async fn disjoin_shared(
        &mut self,
        on_target: bool,
        owners: &HashMap<&QualifiedName, bool>,
    ) -> Result<()> {
        let (source, target) = (self.config.source.clone(), self.config.target.clone());
        let (live, other) = if on_target { (&target, &source) } else { (&source, &target) };
        for side in [live, other] {
            let mut session = Session::control(side).await?;
            ensure(&mut session, &[apply::conflict::DDL]).await?;
        }
        let selection = self.selection.clone();
        let shared = |owner: Option<&QualifiedName>| {
            selection.has_sequence(owner) && owner.is_none_or(|owner| !owners.contains_key(&owner))
        };
        two_way::disjoin(&self.config.job, (live, other), shared).await
    }

    /// The phase that a flip of this record leads to.
    pub(super) async fn phase_after(&mut self, record: &FlipRecord) -> Result<Phase> {
        let flip = stream_of(&record.flip);
        let whole = if flip == Stream::Forward { Phase::Switched } else { Phase::RolledBack };
        let Some(group) = &record.group else { return Ok(whole) };
        let from = is_on_target(flip);
        let group: HashSet<&QualifiedName> = group.tables.iter().collect();
        let owners = self.store.owners().await?;
        let stays = owners.iter().any(|(table, there)| *there == from && !group.contains(table));
        Ok(if stays { Phase::Split } else { whole })
    }

    /// What the reverse stream is open for in a job that is split, or in the middle of a flip of
    /// one group.
    pub(super) async fn gate_of_groups(&mut self, row: &JobRow) -> Result<Option<Open>> {
        let record = match (row.phase, &row.flip) {
            (Phase::Split, _) => None,
            (Phase::CuttingOver, Some(flip)) if flip.group.is_some() => Some(flip.clone()),
            _ => return Ok(None),
        };
        let mut open = on_target(&*self.store.owners().await?);
        if let Some(record) = record
            && self.switch_had_begun(&record).await?
        {
            open.extend(record.group.into_iter().flat_map(|group| group.tables));
        }
        Ok(Some(Open::Tables(open)))
    }
}

fn on_target(owners: &HashMap<QualifiedName, bool>) -> HashSet<QualifiedName> {
    owners.iter().filter(|(_, there)| **there).map(|(table, _)| table.clone()).collect()
}

/// What [`hand_over`] makes of them.
fn handed_over(mut owners: Owners, record: &FlipRecord) -> Owners {
    let there = stream_of(&record.flip) == Stream::Forward;
    let all = Arc::make_mut(&mut owners);
    match &record.group {
        None => all.values_mut().for_each(|owner| *owner = there),
        Some(group) => {
            for table in &group.tables {
                if let Some(owner) = all.get_mut(table) {
                    *owner = there;
                }
            }
        }
    }
    owners
}

/// SQL, for the commit that is the point of no return, by which the group's tables, or all that
/// have owners, change hands at `lsn`.
fn hand_over(job: &JobName, record: &FlipRecord) -> Result<String> {
    let on_target = stream_of(&record.flip) == Stream::Forward;
    let lsn = record.switched_lsn.as_deref().map_or_else(|| Lsn::ZERO.to_string(), str::to_string);
    let (names, label) = match &record.group {
        None => ("null".to_string(), "null".to_string()),
        Some(group) => {
            let names = serde_json::to_string(&group.tables);
            let names = names.map_err(|e| Error::State(e.to_string()))?;
            (quote_literal(&names), quote_literal(&group.label))
        }
    };
    let job = quote_literal(job.as_str());
    Ok(format!(
        "update walferry.ownership o set on_target = {on_target}, lsn = '{lsn}', \
         switched_by = coalesce({label}, o.switched_by), changed_at = clock_timestamp() \
         where o.job = {job} and o.on_target <> {on_target} and ({names}::jsonb is null or \
         (o.schema, o.name) in (select t.schema, t.name from \
            pg_catalog.jsonb_to_recordset({names}::jsonb) t(schema text, name text)))"
    ))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn of_what_is_known_a_group_or_everything_changes_hands_and_nothing_else() {
        let name = |name: &str| QualifiedName::new("public", name);
        let record = |flip: &str, group: Option<[&str; 2]>| -> FlipRecord {
            let group = group.map(|tables| json!({"label": "g", "tables": tables.map(name)}));
            serde_json::from_value(json!({"attempt": "a", "flip": flip, "fence": "lock",
                "routes": [], "released": false, "group": group}))
            .unwrap()
        };
        let owners = Owners::new(["a", "b", "c"].map(|table| (name(table), false)).into());
        let there = |owners: &Owners| ["a", "b", "c"].map(|table| owners[&name(table)]);
        // One that is not on record is not put there.
        let parted = handed_over(owners.clone(), &record("forward", Some(["b", "new"])));
        assert_eq!((there(&parted), parted.len()), ([false, true, false], 3));
        assert_eq!(there(&owners), [false; 3]);
        let gone = handed_over(parted, &record("forward", None));
        assert_eq!(there(&gone), [true; 3]);
        assert_eq!(
            there(&handed_over(gone, &record("reverse", Some(["a", "c"])))),
            [false, true, false]
        );
    }
}
