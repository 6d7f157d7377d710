//! Which target table a relation of the stream goes to, remembered between batches.

use std::collections::{self, BTreeMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use foldhash::HashMap;

use super::count::Counts;
use super::error::{Error, Result};
use super::lanes::{Lane, PerLane};
use super::parking::Parks;
use super::statement::{Bind, Mapping, MissingColumn};
use super::target::{Table, Types};
use super::{Gate, Options, TableFilter, Tuning};
use crate::change::{Relation, Snapshot};
use crate::id::{QualifiedName, quote_ident};
use crate::lsn::Lsn;
use crate::pg::Session;

/// A statement prepared on the server.
#[derive(Debug)]
pub(super) struct Prepared {
    /// Its name there.
    pub name: String,
    /// What its parameters are.
    pub binds: Vec<Bind>,
}

/// Prepared statements of a table.
pub(super) type Statements = HashMap<Vec<u8>, Prepared>;

/// Names of the prepared statements of a session.
#[derive(Debug, Default)]
pub(super) struct Names {
    /// How many are on the server.
    pub prepared: usize,
    given: u64,
}

impl Names {
    /// A name not used before in this session, for a statement that is prepared now.
    pub fn next(&mut self) -> String {
        self.prepared += 1;
        self.given += 1;
        format!("walferry_{}", self.given)
    }
}

/// A table of the stream, and what becomes of its changes.
#[derive(Debug)]
pub(super) struct Route {
    /// Kept so that its address stays its own.
    pub relation: Arc<Relation>,
    /// `None`: every change of the table is filtered.
    pub mapping: Option<Mapping>,
    /// What the copy read already, and the position from which on it need not be asked.
    pub copied: Option<(Snapshot, Lsn)>,
    /// Of each session, names of prepared statements, by what makes them differ.
    pub statements: PerLane<Statements>,
    /// Of the target transaction under way.
    pub counts: Counts,
}

/// All routes of a session: one for each table the stream has mentioned.
#[derive(Default)]
pub(super) struct Routes {
    /// By the address of the relation. The stream gives a new one whenever the source describes the
    /// table anew, and the target is then asked again.
    routes: HashMap<usize, Route>,
    /// Routes of relations that were described anew; the batch at hand may still use them.
    superseded: Vec<usize>,
    tables: Option<TableFilter>,
    visibility: collections::HashMap<QualifiedName, (Snapshot, Lsn)>,
    gate: Option<Arc<Gate>>,
    tuning: Tuning,
    /// Of each session, names of prepared statements that no route uses any more.
    pub discarded: PerLane<Vec<String>>,
    /// Tables whose changes are kept.
    pub parks: Parks,
    /// Counted under routes that are forgotten.
    left: BTreeMap<QualifiedName, Counts>,
    /// What the target said of tables before a change of theirs came, and until when it stands:
    /// they may be altered later.
    foreseen: HashMap<QualifiedName, Table>,
    foreseen_until: Option<Instant>,
    /// Those of the tables known.
    types: Types,
}

/// For so long what was asked ahead may be used. While a stream begins its first changes come
/// within this, and the target is not asked for each table then.
const FORESIGHT: Duration = Duration::from_secs(2);

impl Routes {
    /// No table is known yet, but which of them are parked.
    pub fn open(parks: Parks, options: &Options) -> Self {
        Routes {
            parks,
            tables: options.tables.clone(),
            visibility: options.visibility.clone(),
            gate: options.gate.clone(),
            tuning: options.tuning,
            ..Routes::default()
        }
    }

    /// The relation's route, once [`Routes::ensure`] has seen it.
    pub fn get(&self, relation: &Arc<Relation>) -> Option<&Route> {
        self.routes.get(&address(relation))
    }

    /// The same, to change.
    pub fn get_mut(&mut self, relation: &Arc<Relation>) -> Option<&mut Route> {
        self.routes.get_mut(&address(relation))
    }

    /// True while changes of this table are to be filtered, whatever its mapping.
    pub fn is_shut(&self, relation: &Relation) -> bool {
        self.gate.as_ref().is_some_and(|gate| !gate.lets(&relation.name))
    }

    /// What is counted so far, by table. A table described anew has two routes for a while.
    pub fn counts(&self) -> BTreeMap<&QualifiedName, Counts> {
        let mut counts = BTreeMap::<_, Counts>::new();
        let routes = self.routes.values().map(|route| (&route.relation.name, route.counts));
        let left = self.left.iter().map(|(name, counts)| (name, *counts));
        for (name, more) in routes.chain(left).filter(|(_, more)| *more != Counts::default()) {
            counts.entry(name).or_default().add(more);
        }
        counts
    }

    /// They are in the books, or of a transaction that was given up.
    pub fn reset_counts(&mut self) {
        self.routes.values_mut().for_each(|route| route.counts = Counts::default());
        self.left.clear();
    }

    /// All statements of a session are to be prepared anew.
    pub fn forget_statements(&mut self, lane: Lane) {
        let discarded = self.discarded.of_mut(lane);
        for route in self.routes.values_mut() {
            discarded.extend(route.statements.of_mut(lane).drain().map(|(_, p)| p.name));
        }
    }

    fn discard(&mut self, statements: PerLane<Statements>) {
        for (lane, statements) in statements.both() {
            self.discarded.of_mut(lane).extend(statements.into_values().map(|p| p.name));
        }
    }

    /// Forgets relations that were described anew. To be called between batches.
    pub fn retire(&mut self) {
        for address in std::mem::take(&mut self.superseded) {
            let Some(old) = self.routes.remove(&address) else { continue };
            self.discard(old.statements);
            let heir = self.routes.values_mut().find(|r| r.relation.name == old.relation.name);
            if let Some(heir) = heir {
                heir.counts.add(old.counts);
            }
        }
    }

    /// Forgets all that is known of a table, so that the target is asked again. To be called
    /// between target transactions.
    pub fn forget(&mut self, table: &QualifiedName) {
        let mut gone = Vec::new();
        self.routes.retain(|_, route| {
            let stays = route.relation.name != *table;
            if !stays {
                gone.push(std::mem::take(&mut route.statements));
            }
            stays
        });
        gone.into_iter().for_each(|statements| self.discard(statements));
        let routes = &self.routes;
        self.superseded.retain(|address| routes.contains_key(address));
    }

    /// Asks the target about all of these tables at once, of which [`Routes::ensure`] is to hear
    /// soon, unless that is turned off: then each is asked about when it is needed.
    pub async fn foresee(
        &mut self,
        session: &mut Session,
        names: impl IntoIterator<Item = QualifiedName>,
    ) -> Result<()> {
        match self.tuning.ask_ahead {
            true => self.ask(session, names).await,
            false => Ok(()),
        }
    }

    /// Two round trips, none if all of them were asked about just now.
    async fn ask(
        &mut self,
        session: &mut Session,
        names: impl IntoIterator<Item = QualifiedName>,
    ) -> Result<()> {
        if self.foreseen_until.is_some_and(|until| until < Instant::now()) {
            self.foresee_no_more();
        }
        let new = names.into_iter().filter(|name| !self.foreseen.contains_key(name));
        let names: Vec<QualifiedName> = new.collect();
        if names.is_empty() {
            return Ok(());
        }
        if !self.tuning.keep_types {
            self.types = Types::default();
        }
        let (types, binary_values) = (&mut self.types, self.tuning.binary_values);
        let tables = Table::load(session, &names, types, binary_values).await?;
        self.foreseen.extend(tables.into_iter().map(|table| (table.name.clone(), table)));
        self.foreseen_until.get_or_insert_with(|| Instant::now() + FORESIGHT);
        Ok(())
    }

    /// Tables may be altered from here on.
    pub fn foresee_no_more(&mut self) {
        self.foreseen.clear();
        self.foreseen_until = None;
    }

    /// True if the target will be asked about the relation's table.
    pub fn is_asked_of(&self, relation: &Arc<Relation>) -> bool {
        let name = &relation.name;
        self.get(relation).is_none() && !self.parks.keeps_all(name) && self.takes_part(name)
    }

    /// Gets to know the relation, asking the target about its table if it is new.
    pub async fn ensure(&mut self, session: &mut Session, relation: &Arc<Relation>) -> Result<()> {
        let mapping = match self.routes.contains_key(&address(relation)) {
            true => return Ok(()),
            // Whether it fits is asked once it is written again.
            false if self.parks.keeps_all(&relation.name) => None,
            false => self.map(session, relation).await?,
        };
        self.learn(relation, mapping);
        Ok(())
    }

    /// The relation's changes are written to a table as the target has it now.
    pub async fn renew(&mut self, session: &mut Session, relation: &Arc<Relation>) -> Result<()> {
        self.forget(&relation.name);
        self.foresee_no_more();
        let mapping = self.map(session, relation).await?;
        self.learn(relation, mapping);
        Ok(())
    }

    /// The relation's route; without a mapping its changes are kept or filtered.
    pub fn learn(&mut self, relation: &Arc<Relation>, mapping: Option<Mapping>) {
        let address = address(relation);
        let mut statements = PerLane::default();
        for (old_address, old) in &mut self.routes {
            if old.relation.name != relation.name || self.superseded.contains(old_address) {
                continue;
            }
            self.superseded.push(*old_address);
            if old.mapping == mapping && *old.relation == **relation {
                statements = std::mem::take(&mut old.statements);
            }
        }
        let route = Route {
            relation: relation.clone(),
            mapping,
            copied: self.visibility.get(&relation.name).cloned(),
            statements,
            counts: Counts::default(),
        };
        self.routes.insert(address, route);
    }

    /// True unless every change of the table is filtered.
    pub fn takes_part(&self, table: &QualifiedName) -> bool {
        self.tables.as_ref().is_none_or(|contains| contains(table))
    }

    /// A description of the table that is in force.
    pub fn relation(&self, table: &QualifiedName) -> Option<Arc<Relation>> {
        let routes = self.routes.iter().filter(|(at, _)| !self.superseded.contains(at));
        let mut relations = routes.map(|(_, route)| &route.relation);
        relations.find(|relation| relation.name == *table).cloned()
    }

    /// Forgets all tables, so that the target is asked again; what is counted stays.
    pub fn forget_all(&mut self) {
        self.forget_statements(Lane::Main);
        self.forget_statements(Lane::Second);
        self.types = Types::default();
        self.foresee_no_more();
        self.left = self.counts().into_iter().map(|(name, n)| (name.clone(), n)).collect();
        self.routes.clear();
        self.superseded.clear();
    }

    async fn map(&mut self, session: &mut Session, relation: &Relation) -> Result<Option<Mapping>> {
        let name = &relation.name;
        if self.tables.as_ref().is_some_and(|contains| !contains(name)) {
            return Ok(None);
        }
        self.ask(session, [name.clone()]).await?;
        let Some(mut table) = self.foreseen.remove(name) else {
            return Err(Error::NoTable { table: name.clone() });
        };
        table.takes_copy &= self.tuning.copy_inserts;
        table.deletes_by_array = self.tuning.delete_by_array;
        table.counts_by_server &= self.tuning.count_by_server;
        table.unnests_in_select = self.tuning.unnest_in_select;
        match table.kind.as_str() {
            "r" | "p" => {}
            // REFRESH MATERIALIZED VIEW CONCURRENTLY decodes as changes of the view
            // (pgcopydb#981); the target refreshes its own.
            "m" => return Ok(None),
            kind => {
                let kind = kind.to_string();
                return Err(Error::NotATable { table: name.clone(), kind });
            }
        }
        let mapping =
            Mapping::new(relation, table).map_err(|MissingColumn(column)| Error::NoColumn {
                table: name.clone(),
                quoted: name.quoted(),
                column: quote_ident(&column),
            })?;
        Ok(Some(mapping))
    }
}

fn address(relation: &Arc<Relation>) -> usize {
    Arc::as_ptr(relation).addr()
}
