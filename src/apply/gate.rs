//! Of which tables a stream's changes are applied, while those of others are filtered.
//!
//! The way back runs from before the switch, and has nothing to apply until applications are on the
//! side it reads. Where they go there group by group, it is open for the groups that are there.

use std::collections::HashSet;
use std::sync::{PoisonError, RwLock};

use crate::id::QualifiedName;

/// What it is open for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Open {
    /// For no table.
    #[default]
    Nothing,
    /// For every table.
    Everything,
    /// For these.
    Tables(HashSet<QualifiedName>),
}

/// Opened and shut by whoever leads clients; asked at each change. Tables in schema walferry always
/// pass.
#[derive(Debug, Default)]
pub struct Gate(RwLock<Open>);

impl Gate {
    /// Replaces what it is open for.
    pub fn set(&self, open: Open) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = open;
    }

    /// Opens it, or shuts it: for `group` alone, or for everything. A group is no part of a gate
    /// that is open for everything: whoever knows all tables sets those first.
    pub fn turn(&self, group: Option<&[QualifiedName]>, open: bool) {
        let mut held = self.0.write().unwrap_or_else(PoisonError::into_inner);
        match (group, open, &mut *held) {
            (None, true, _) => *held = Open::Everything,
            (None, false, _) => *held = Open::Nothing,
            (Some(group), true, Open::Tables(tables)) => tables.extend(group.iter().cloned()),
            (Some(group), true, Open::Nothing) => {
                *held = Open::Tables(group.iter().cloned().collect());
            }
            (Some(group), false, Open::Tables(tables)) => {
                tables.retain(|table| !group.contains(table));
            }
            (Some(_), true, Open::Everything) | (Some(_), false, _) => {}
        }
    }

    /// True if changes of the table are applied.
    pub fn lets(&self, table: &QualifiedName) -> bool {
        match &*self.0.read().unwrap_or_else(PoisonError::into_inner) {
            Open::Everything => true,
            _ if table.schema == "walferry" => true,
            Open::Nothing => false,
            Open::Tables(tables) => tables.contains(table),
        }
    }

    /// True if it is open for no table.
    pub fn is_shut(&self) -> bool {
        match &*self.0.read().unwrap_or_else(PoisonError::into_inner) {
            Open::Nothing => true,
            Open::Everything => false,
            Open::Tables(tables) => tables.is_empty(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_pass_one_by_one_and_what_is_ours_always_does() {
        let name = |name: &str| QualifiedName::new("public", name);
        let (first, second) = ([name("a"), name("b")], [name("c")]);
        let gate = Gate::default();
        let lets = |gate: &Gate| ["a", "b", "c"].map(|table| gate.lets(&name(table)));
        assert!(gate.is_shut() && gate.lets(&QualifiedName::new("walferry", "canary")));
        gate.turn(Some(&first), false);
        assert!(gate.is_shut());
        gate.turn(Some(&first), true);
        gate.turn(Some(&second), true);
        assert_eq!(lets(&gate), [true; 3]);
        gate.turn(Some(&first), false);
        assert_eq!(lets(&gate), [false, false, true]);
        gate.turn(Some(&second), false);
        assert!(gate.is_shut());
        gate.turn(None, true);
        gate.turn(Some(&first), true);
        assert_eq!(lets(&gate), [true; 3]);
        gate.turn(None, false);
        assert_eq!(lets(&gate), [false; 3]);
    }
}
