//! `--ddl`: what is wanted about DDL of each kind.

use std::str::FromStr;

/// What is done about DDL of one class.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Action {
    /// Run it on the target, at its place in the stream.
    Apply,
    /// Keep the table's changes until it was run there.
    Hold,
    /// Stop the stream.
    Stop,
}

/// Kinds of DDL that the stream shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// ADD COLUMN.
    AddColumn,
    /// DROP COLUMN.
    DropColumn,
    /// RENAME COLUMN.
    RenameColumn,
    /// ALTER COLUMN ... TYPE.
    ColumnType,
    /// CREATE TABLE ... PARTITION OF.
    NewPartition,
    /// A table that the target does not have, or not under this name.
    NewTable,
    /// ALTER TYPE ... ADD VALUE.
    EnumLabel,
    /// An index of a table that is followed.
    Index,
    /// A constraint of one, NOT NULL among them.
    Constraint,
    /// A column's default.
    Default,
}

/// As on the command line.
const CLASSES: [(&str, Class); 10] = [
    ("add-column", Class::AddColumn),
    ("drop-column", Class::DropColumn),
    ("rename-column", Class::RenameColumn),
    ("column-type", Class::ColumnType),
    ("new-partition", Class::NewPartition),
    ("new-table", Class::NewTable),
    ("enum-label", Class::EnumLabel),
    ("index", Class::Index),
    ("constraint", Class::Constraint),
    ("default", Class::Default),
];

/// `--ddl`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    actions: [Action; CLASSES.len()],
    capture: bool,
    skip: Option<i64>,
}

impl Policy {
    /// What is done about a class.
    pub fn of(&self, class: Class) -> Action {
        let mut actions = CLASSES.iter().zip(self.actions);
        actions.find(|((_, c), _)| *c == class).map_or(Action::Stop, |(_, action)| action)
    }

    /// True for the captured statement that was run by hand.
    pub fn skips(&self, id: i64) -> bool {
        self.skip == Some(id)
    }

    /// True if DDL of every kind is applied, so that it may be captured where it is run.
    pub fn captures(&self) -> bool {
        self.capture && self.actions == [Action::Apply; CLASSES.len()]
    }
}

/// `apply`, `hold`, `stop`, or a list such as `hold,add-column=apply`: later ones count. With
/// `no-capture` no event trigger is made, with `skip=17` that captured statement is not run.
impl FromStr for Policy {
    type Err = String;

    fn from_str(text: &str) -> Result<Policy, String> {
        let mut policy =
            Policy { actions: [Action::Stop; CLASSES.len()], capture: true, skip: None };
        for part in text.split(',').map(str::trim) {
            if let Some(id) = part.strip_prefix("skip=") {
                let id = id.parse().map_err(|_| format!("\"{id}\" is not a statement's number"));
                policy.skip = Some(id?);
                continue;
            }
            if part == "no-capture" {
                policy.capture = false;
                continue;
            }
            let (class, action) = part.split_once('=').map_or((None, part), |(c, a)| (Some(c), a));
            let action = match action {
                "apply" => Action::Apply,
                "hold" => Action::Hold,
                "stop" => Action::Stop,
                other => return Err(format!("\"{other}\" is not one of apply, hold, stop")),
            };
            let Some(class) = class else {
                policy.actions = [action; CLASSES.len()];
                continue;
            };
            let mut slots = CLASSES.iter().zip(&mut policy.actions);
            let Some((_, slot)) = slots.find(|((name, _), _)| *name == class) else {
                let names = CLASSES.map(|(name, _)| name).join(", ");
                return Err(format!("\"{class}\" is not one of {names}"));
            };
            *slot = action;
        }
        Ok(policy)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_is_for_all_classes_or_for_each() {
        let policy: Policy = "hold,add-column=apply".parse().unwrap();
        assert_eq!(policy.of(Class::AddColumn), Action::Apply);
        assert_eq!(policy.of(Class::NewTable), Action::Hold);
        assert!(!policy.captures() && "apply".parse::<Policy>().unwrap().captures());
        assert!("apply,skip=17".parse::<Policy>().unwrap().skips(17));
        assert!(!"apply,no-capture".parse::<Policy>().unwrap().captures());
        assert_eq!("enum-label=apply".parse::<Policy>().unwrap().of(Class::NewTable), Action::Stop);
        for bad in ["", "on", "skip=all", "column=apply", "add-column=maybe"] {
            assert!(bad.parse::<Policy>().is_err(), "{bad}");
        }
    }
}
