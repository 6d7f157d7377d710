//! Who wins a conflict: what `--on-conflict` says, and what of it holds for a table.

use std::fmt;
use std::str::FromStr;

/// Wins by side or by commit time, whatever is in the rows. Both sides compute the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Rule {
    /// The later commit; of two in one microsecond the source's.
    #[default]
    LastCommit,
    /// The source's change.
    Source,
    /// The target's change.
    Target,
    /// Nobody: the stream stops.
    Error,
}

impl Rule {
    const ALL: [Rule; 4] = [Rule::LastCommit, Rule::Source, Rule::Target, Rule::Error];

    /// As on the command line.
    pub fn as_str(self) -> &'static str {
        match self {
            Rule::LastCommit => "last-commit",
            Rule::Source => "source",
            Rule::Target => "target",
            Rule::Error => "error",
        }
    }

    fn named(text: &str) -> Option<Rule> {
        Rule::ALL.into_iter().find(|rule| rule.as_str() == text)
    }
}

/// Who wins, of all tables. Written and stored as on the command line: `last-commit`,
/// `greatest:updated_at`, `greatest:updated_at,last-commit`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Policy {
    /// The same for each table.
    Rule(Rule),
    /// The row with the greater value in a column; of two that are equal the source's. NULL is
    /// less than any value, and a deletion less than NULL.
    Greatest {
        /// The column's name, as in `pg_attribute`.
        column: String,
        /// What settles tables without that column; `None`: there must be none.
        others: Option<Rule>,
    },
}

impl Default for Policy {
    fn default() -> Policy {
        Policy::Rule(Rule::default())
    }
}

impl Policy {
    /// The column whose values decide, if they do.
    pub fn column(&self) -> Option<&str> {
        match self {
            Policy::Rule(_) => None,
            Policy::Greatest { column, .. } => Some(column),
        }
    }

    /// What settles a table without such a column; `None`: it takes no part.
    pub fn others(&self) -> Option<Rule> {
        match self {
            Policy::Rule(rule) => Some(*rule),
            Policy::Greatest { others, .. } => *others,
        }
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Policy::Rule(rule) => f.write_str(rule.as_str()),
            Policy::Greatest { column, others } => {
                write!(f, "greatest:{column}")?;
                others.map_or(Ok(()), |rule| write!(f, ",{}", rule.as_str()))
            }
        }
    }
}

impl FromStr for Policy {
    type Err = String;

    fn from_str(text: &str) -> Result<Policy, String> {
        let unknown = || {
            format!(
                "\"{text}\" settles no conflict: use last-commit, source, target, \
                 greatest:COLUMN, greatest:COLUMN,last-commit (for tables without that column) or \
                 error"
            )
        };
        let Some(rest) = text.strip_prefix("greatest:") else {
            return Rule::named(text).map(Policy::Rule).ok_or_else(unknown);
        };
        let (column, others) = match rest.split_once(',') {
            None => (rest, None),
            Some((column, rule)) => (column, Some(Rule::named(rule).ok_or_else(unknown)?)),
        };
        match column {
            "" => Err(unknown()),
            column => Ok(Policy::Greatest { column: column.to_string(), others }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_is_read_as_it_is_written() {
        for text in [
            "last-commit",
            "source",
            "target",
            "error",
            "greatest:updated_at",
            "greatest:Version No,last-commit",
            "greatest:n,error",
        ] {
            assert_eq!(text.parse::<Policy>().unwrap().to_string(), text);
        }
        let policy: Policy = "greatest:n,source".parse().unwrap();
        assert_eq!((policy.column(), policy.others()), (Some("n"), Some(Rule::Source)));
        let strict: Policy = "greatest:n".parse().unwrap();
        assert_eq!((strict.column(), strict.others()), (Some("n"), None));
        assert_eq!(Policy::default().others(), Some(Rule::LastCommit));
    }

    #[test]
    fn what_settles_nothing_is_refused_with_what_does() {
        for text in ["", "newest", "greatest", "greatest:", "greatest:,source", "greatest:n,m"] {
            let error = text.parse::<Policy>().unwrap_err();
            assert!(error.contains("greatest:COLUMN,last-commit"), "{text}: {error}");
        }
    }
}
