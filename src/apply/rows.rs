//! One statement a change, in the order of the stream: always right, and what a batch falls back
//! to.

use super::admit::Step;
use super::batch::Batch;
use super::error::{Culprit, Error, Result};
use super::request::{Request, Role};
use super::routing::{Prepared, Route};
use super::shape::{Shape, Unfit, describe_key};
use super::statement;
use super::writer::Writer;
use crate::change::{Begin, Change};

impl Writer {
    /// Adds the statement of one step; `at` is its place among the steps.
    pub(super) fn step(
        &mut self,
        request: &mut Request,
        batch: &Batch,
        at: usize,
        step: &Step,
    ) -> Result<()> {
        let Some((chunk, change)) = step.of(batch) else { return Ok(()) };
        let bare = match step {
            Step::Row(..) => self.row(request, &chunk.begin, change)?,
            Step::Truncate(_, _, written) => {
                let mappings = written.iter().filter_map(|r| self.routes.get(r)?.mapping.as_ref());
                let tables: Vec<_> = mappings.map(|m| &m.table).collect();
                request.pipeline.once(&statement::truncate(&tables, change.restarts()));
                false
            }
        };
        request.roles.push(Role::Step { at, bare });
        Ok(())
    }

    /// Adds the statement of one change. True for a bare INSERT, whose tag must be looked at.
    pub(super) fn row(
        &mut self,
        request: &mut Request,
        begin: &Begin,
        change: &Change,
    ) -> Result<bool> {
        let route = change.relations().first().and_then(|r| self.routes.get_mut(r));
        let Some(route) = route else {
            return Err(Error::Broken("a change without a route".to_string()));
        };
        let Some(mapping) = &route.mapping else {
            return Err(Error::Broken("a filtered change is to be written".to_string()));
        };
        let unfit = |unfit| match unfit {
            Unfit::Broken(text) => Error::Broken(text),
            Unfit::NotIdentified => Error::NotIdentified {
                culprit: Box::new(culprit(route, begin, change, 0)),
                quoted: route.relation.name.quoted(),
            },
        };
        let Some(shape) = Shape::new(&route.relation, mapping, change).map_err(unfit)? else {
            return Err(Error::Broken("not a row change".to_string()));
        };
        let statements = route.statements.of_mut(request.lane);
        if !statements.contains_key(&shape.key) {
            let statement = shape.statement(mapping);
            let name = self.names.of_mut(request.lane).next();
            request.pipeline.parse(&name, &statement.sql, &[]);
            let prepared = Prepared { name, binds: statement.binds };
            statements.insert(shape.key.clone(), prepared);
        }
        if let Some(prepared) = statements.get(&shape.key) {
            let params = match shape.params(&route.relation, &prepared.binds) {
                Ok(params) => params,
                Err(Unfit::Broken(text)) => return Err(Error::Broken(text)),
                Err(Unfit::NotIdentified) => return Err(Error::Broken(String::new())),
            };
            request.pipeline.run(&prepared.name, params.into_iter());
        }
        Ok(matches!(change, Change::Insert { .. }) && !mapping.table.counts_inserts)
    }
}

/// What errors say of a change.
pub(super) fn culprit(route: &Route, begin: &Begin, change: &Change, ordinal: u64) -> Culprit {
    let operation = match change {
        Change::Insert { .. } => "INSERT",
        Change::Update { .. } => "UPDATE",
        Change::Delete { .. } => "DELETE",
        Change::Truncate { .. } => "TRUNCATE",
        Change::Message { .. } => "MESSAGE",
    };
    let key = match &route.mapping {
        Some(mapping) => describe_key(&route.relation, mapping, change),
        None => "(unknown)".to_string(),
    };
    Culprit {
        operation,
        table: route.relation.name.clone(),
        key,
        commit_lsn: begin.commit_lsn,
        xid: begin.xid,
        ordinal,
    }
}
