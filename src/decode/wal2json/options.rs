//! What to ask of the plugin.

use crate::id::QualifiedName;

use super::Numbers;

/// What is wrong with [`Plugin::Older`], after "the server's".
pub const TOO_OLD: &str = "wal2json is older than 2.3, and does not tell the types of columns; 1.0 \
     tells neither TRUNCATE nor what came in by replication";

/// How new a server's wal2json is, as far as its options show: it has no version to ask for before
/// PostgreSQL 18, and refuses options that it does not know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Plugin {
    /// Before 2.3: refused. Of 1.0 nothing tells TRUNCATE and origins, of 2.0 to 2.2 nothing the
    /// types of columns.
    Older,
    /// 2.3 to 2.5, of which only 2.5 (Debian 12 has it) tells the numbers of types: its messages
    /// show it.
    V2_3,
    /// 2.6: NaN and infinities are told.
    V2_6,
}

impl Plugin {
    /// What the server has, given that it refused the options of `self` with an error of this text;
    /// `None` if the error is about something else.
    pub fn refused(self, message: &str) -> Option<Plugin> {
        let about = |option: &str| message.contains(&format!("option \"{option}\""));
        let found = match () {
            () if about("numeric-data-types-as-string") => Plugin::V2_3,
            () if about("include-default") || about("filter-origins") => Plugin::Older,
            () if about("format-version") || about("include-origin") => Plugin::Older,
            () => return None,
        };
        (found < self).then_some(found)
    }

    /// What a `null` number of its messages means, unless whoever runs the job knows more.
    pub fn numbers(self) -> Numbers {
        if self >= Plugin::V2_6 { Numbers::Text } else { Numbers::Ambiguous }
    }
}

/// The plugin's options, for START_REPLICATION and for `pg_logical_slot_peek_changes` alike.
/// Transactions of `skip_origins` (numbers of `pg_replication_origin`) are not sent.
///
/// Every table is asked for. `add-tables` would make old versions leak memory (wal2json#146), and
/// a table made later would be missed; what is of no interest is passed over by the decoder. Types
/// are asked for by number: by name, wal2json writes invalid JSON for some quoted ones.
/// include-default asks for nothing: whoever does not know it is older than 2.3.
pub fn options(plugin: Plugin, skip_origins: &[u32]) -> Vec<(&'static str, String)> {
    let on = |name: &'static str| (name, "1".to_string());
    let mut options = vec![on("include-xids"), on("include-timestamp"), on("include-lsn")];
    options.extend([("include-types", "0".to_string()), on("include-type-oids")]);
    options.extend([("format-version", "2".to_string()), on("include-origin")]);
    options.push(("include-default", "0".to_string()));
    if !skip_origins.is_empty() {
        let list: Vec<String> = skip_origins.iter().map(u32::to_string).collect();
        options.push(("filter-origins", list.join(",")));
    }
    if plugin >= Plugin::V2_6 {
        options.push(on("numeric-data-types-as-string"));
    }
    options
}

/// Tables as `filter-tables` and `add-tables` take them: whatever the plugin would read as
/// punctuation escaped with a backslash.
pub fn table_list(tables: &[QualifiedName]) -> String {
    let mut list = String::new();
    for table in tables {
        if !list.is_empty() {
            list.push(',');
        }
        for (part, end) in [(&table.schema, "."), (&table.name, "")] {
            for character in part.chars() {
                if character.is_ascii() && !character.is_ascii_alphanumeric() && character != '_' {
                    list.push('\\');
                }
                list.push(character);
            }
            list.push_str(end);
        }
    }
    list
}
