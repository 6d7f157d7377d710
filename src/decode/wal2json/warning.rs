//! WARNINGs by which wal2json says that it has left out a change, and goes on.

use crate::id::QualifiedName;

/// How they begin, in each version from 1.0 to 2.6. They are never translated.
const DROPPED: [&str; 3] = ["no tuple identifier for ", "no tuple data for ", "no old tuple data "];

/// The table of which the plugin says that it has left out a change, if that is what the notice
/// says: of UPDATE and DELETE it does, where the table has no replica identity.
///
/// Names are printed between quotes that are not doubled inside, so that one with `"."` in it may
/// be read in several ways: all of them. Format 1 prints no schema, and the list is then empty.
pub fn dropped(notice: &str) -> Option<Vec<QualifiedName>> {
    let nothing = notice.ends_with("without primary key or replica identity is nothing");
    if !nothing && !DROPPED.iter().any(|text| notice.starts_with(text)) {
        return None;
    }
    let table = notice.split_once(" in table \"").and_then(|(_, rest)| rest.strip_suffix('"'));
    let Some(table) = table else { return Some(Vec::new()) };
    let readings = table.match_indices("\".\"").filter_map(|(at, dot)| {
        Some(QualifiedName::new(table.get(..at)?, table.get(at + dot.len()..)?))
    });
    Some(readings.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_a_dropped_change_is_told() {
        let name = |schema: &str, name: &str| QualifiedName::new(schema, name);
        let told = dropped("no tuple identifier for UPDATE in table \"public\".\"Odd \"q\" name\"");
        assert_eq!(told, Some(vec![name("public", "Odd \"q\" name")]));
        let told = dropped("no old tuple data for DELETE in table \"a\".\"b\".\"c\"");
        assert_eq!(told, Some(vec![name("a", "b\".\"c"), name("a\".\"b", "c")]));
        for first in [
            "table \"t\" without primary key or replica identity is nothing",
            "no tuple data for INSERT in table \"t\"",
        ] {
            assert_eq!(dropped(first), Some(Vec::new()), "{first}");
        }
        assert_eq!(dropped("there is already a transaction in progress"), None);
    }
}
