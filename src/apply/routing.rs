//! Which target table a relation of the stream goes to, remembered between batches.

use std::collections::HashMap;
use std::sync::Arc;

use super::count::Counts;
use super::error::{Error, Result};
use super::statement::{Bind, Mapping, MissingColumn};
use super::target::Table;
use super::{Options, TableFilter};
use crate::change::{Relation, Snapshot};
use crate::id::{QualifiedName, quote_ident};
use crate::pg::Session;

/// A statement prepared on the server.
#[derive(Debug)]
pub(super) struct Prepared {
    /// Its name there.
    pub name: String,
    /// What its parameters are.
    pub binds: Vec<Bind>,
}

/// A table of the stream, and what becomes of its changes.
#[derive(Debug)]
pub(super) struct Route {
    /// Kept so that its address stays its own.
    pub relation: Arc<Relation>,
    /// `None`: every change of the table is filtered.
    pub mapping: Option<Mapping>,
    /// What the copy read already.
    pub snapshot: Option<Snapshot>,
    /// Names of prepared statements, by what makes them differ.
    pub statements: HashMap<Vec<u8>, Prepared>,
    /// Of the target transaction under way.
    pub counts: Counts,
}

/// All routes of a session: one for each table the stream has mentioned.
#[derive(Default)]
pub(super) struct Routes {
    routes: Vec<Route>,
    /// Place in `routes`, by the address of the relation. The stream gives a new one whenever the
    /// source describes the table anew, and the target is then asked again.
    by_address: HashMap<usize, usize>,
    tables: Option<TableFilter>,
    visibility: HashMap<QualifiedName, Snapshot>,
    /// Names of prepared statements that no route uses any more.
    pub discarded: Vec<String>,
}

impl Routes {
    /// No table is known yet.
    pub fn new(options: &Options) -> Self {
        Routes {
            tables: options.tables.clone(),
            visibility: options.visibility.clone(),
            ..Routes::default()
        }
    }

    /// The relation's place, if it is known.
    pub fn find(&self, relation: &Arc<Relation>) -> Option<usize> {
        self.by_address.get(&address(relation)).copied()
    }

    /// The route at a place that [`Routes::find`] or [`Routes::ensure`] gave.
    pub fn get(&self, place: usize) -> Option<&Route> {
        self.routes.get(place)
    }

    /// The same, to change.
    pub fn get_mut(&mut self, place: usize) -> Option<&mut Route> {
        self.routes.get_mut(place)
    }

    /// All routes.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut Route> {
        self.routes.iter_mut()
    }

    /// All routes.
    pub fn iter(&self) -> impl Iterator<Item = &Route> {
        self.routes.iter()
    }

    /// Gets to know the relation, asking the target about its table if it is new.
    pub async fn ensure(&mut self, session: &mut Session, relation: &Arc<Relation>) -> Result<()> {
        if self.find(relation).is_some() {
            return Ok(());
        }
        let mapping = self.map(session, relation).await?;
        let known = self.routes.iter().position(|r| r.relation.name == relation.name);
        let Some((place, route)) = known.and_then(|p| self.routes.get_mut(p).map(|r| (p, r)))
        else {
            self.by_address.insert(address(relation), self.routes.len());
            self.routes.push(Route {
                relation: relation.clone(),
                mapping,
                snapshot: self.visibility.get(&relation.name).cloned(),
                statements: HashMap::new(),
                counts: Counts::default(),
            });
            return Ok(());
        };
        self.by_address.remove(&address(&route.relation));
        self.by_address.insert(address(relation), place);
        if route.mapping != mapping || route.relation.columns != relation.columns {
            self.discarded.extend(route.statements.drain().map(|(_, prepared)| prepared.name));
        }
        route.relation = relation.clone();
        route.mapping = mapping;
        Ok(())
    }

    async fn map(&self, session: &mut Session, relation: &Relation) -> Result<Option<Mapping>> {
        let name = &relation.name;
        if self.tables.as_ref().is_some_and(|contains| !contains(name)) {
            return Ok(None);
        }
        let Some(table) = Table::load(session, name).await? else {
            return Err(Error::NoTable { table: name.clone() });
        };
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
