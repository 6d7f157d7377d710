//! Which tables take part: `--include`, `--exclude` and `--schema-only` patterns.

use crate::id::QualifiedName;

/// A `schema.table` pattern: `*` stands for any characters, `?` for one, in either part. A part may
/// be double-quoted to hold a dot. A pattern without a dot means the table in any schema.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pattern {
    schema: String,
    name: String,
}

/// The text is not a pattern.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("\"{0}\" is not a table pattern: write schema.table, with * and ? as wildcards")]
pub struct PatternError(pub String);

impl std::str::FromStr for Pattern {
    type Err = PatternError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bad = || PatternError(text.to_string());
        let mut parts = vec![String::new()];
        let mut quoted = false;
        for c in text.chars() {
            match c {
                '"' => quoted = !quoted,
                '.' if !quoted => parts.push(String::new()),
                c => parts.last_mut().ok_or_else(bad)?.push(c),
            }
        }
        if quoted || parts.iter().any(String::is_empty) {
            return Err(bad());
        }
        let mut parts = parts.into_iter();
        match (parts.next(), parts.next(), parts.next()) {
            (Some(name), None, _) => Ok(Pattern { schema: "*".to_string(), name }),
            (Some(schema), Some(name), None) => Ok(Pattern { schema, name }),
            _ => Err(bad()),
        }
    }
}

impl Pattern {
    /// True if the pattern covers the table.
    pub fn matches(&self, table: &QualifiedName) -> bool {
        glob(&self.schema, &table.schema) && glob(&self.name, &table.name)
    }
}

/// Iterative glob match: on a mismatch after a `*`, let that star take one character more.
fn glob(pattern: &str, text: &str) -> bool {
    let pattern: Vec<char> = pattern.chars().collect();
    let text: Vec<char> = text.chars().collect();
    let (mut p, mut t) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while t < text.len() {
        match pattern.get(p) {
            Some('*') => {
                star = Some((p, t));
                p += 1;
            }
            Some(c) if *c == '?' || Some(c) == text.get(t) => {
                p += 1;
                t += 1;
            }
            _ => match star {
                Some((star_p, star_t)) => {
                    star = Some((star_p, star_t + 1));
                    p = star_p + 1;
                    t = star_t + 1;
                }
                None => return false,
            },
        }
    }
    pattern.iter().skip(p).all(|c| *c == '*')
}

/// The tables of a job.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selection {
    /// Empty means all.
    pub include: Vec<Pattern>,
    /// Taken away from what is included.
    pub exclude: Vec<Pattern>,
    /// Created on the target, rows left behind.
    pub schema_only: Vec<Pattern>,
}

impl Selection {
    /// Reads the three lists of patterns.
    pub fn parse(
        include: &[String],
        exclude: &[String],
        schema_only: &[String],
    ) -> Result<Selection, PatternError> {
        let read = |list: &[String]| -> Result<Vec<Pattern>, PatternError> {
            list.iter().map(|p| p.parse()).collect()
        };
        Ok(Selection {
            include: read(include)?,
            exclude: read(exclude)?,
            schema_only: read(schema_only)?,
        })
    }

    /// True if the table exists on both sides after the move.
    pub fn has_schema(&self, table: &QualifiedName) -> bool {
        let any = |list: &[Pattern]| list.iter().any(|p| p.matches(table));
        (self.include.is_empty() || any(&self.include) || any(&self.schema_only))
            && !any(&self.exclude)
    }

    /// True if the table's rows are copied, followed and verified.
    pub fn has_rows(&self, table: &QualifiedName) -> bool {
        self.has_schema(table) && !self.schema_only.iter().any(|p| p.matches(table))
    }

    /// True if no table is left out.
    pub fn is_everything(&self) -> bool {
        self.include.is_empty() && self.exclude.is_empty() && self.schema_only.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_cover_what_they_say() {
        let check = |pattern: &str, schema: &str, name: &str| {
            pattern.parse::<Pattern>().unwrap().matches(&QualifiedName::new(schema, name))
        };
        assert!(check("public.*", "public", "a"));
        assert!(!check("public.*", "other", "a"));
        assert!(check("*.log_??", "x", "log_01"));
        assert!(!check("*.log_??", "x", "log_001"));
        assert!(check("orders", "any", "orders"));
        assert!(check("\"a.b\".\"c.d\"", "a.b", "c.d"));
        assert!(check("a*b*c.t", "aXbXbXc", "t"));
        for bad in ["", ".", "a.", "a.b.c", "\"a"] {
            assert!(bad.parse::<Pattern>().is_err(), "{bad}");
        }
    }

    #[test]
    fn schema_only_tables_have_a_schema_and_no_rows() {
        let log = ["public.log".to_string()];
        let selection = Selection::parse(&[], &[], &log).unwrap();
        let name = QualifiedName::new("public", "log");
        assert!(selection.has_schema(&name) && !selection.has_rows(&name));
        assert!(selection.has_rows(&QualifiedName::new("public", "log2")));
    }
}
