//! A statement that an event trigger on the source wrote down, as a row of the stream.

use super::{Relation, Row};

/// What a client of the source sent, and which statement of it is meant.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Captured {
    /// Its number.
    pub id: i64,
    /// Its command tag, `ALTER TABLE`.
    pub tag: String,
    /// How many statements that fire event triggers came before it in the text.
    pub place: usize,
    /// All that the client sent.
    pub text: String,
    /// The session's search_path.
    pub search_path: String,
    /// Who ran it.
    pub role: String,
    /// `pg_event_trigger_table_rewrite_reason()`, 0 where no table was rewritten.
    pub rewrite: u32,
}

impl Captured {
    /// From a row of the table that the event trigger writes; `None` for another row.
    pub fn from_row(relation: &Relation, row: &Row) -> Option<Captured> {
        let text = |name: &str| {
            let column = relation.columns.iter().position(|column| column.name == name)?;
            let bytes = row.values().nth(column)?.bytes()?;
            Some(String::from_utf8_lossy(bytes).into_owned())
        };
        Some(Captured {
            id: text("id")?.parse().ok()?,
            tag: text("tag")?,
            place: text("place")?.parse().ok()?,
            text: text("text")?,
            search_path: text("search_path")?,
            role: text("role")?,
            rewrite: text("rewrite")?.parse().ok()?,
        })
    }
}
