//! What to ask of the plugin.

use crate::id::QualifiedName;

use super::Numbers;

/// How new a server's wal2json is, as far as its options show: it has no version to ask for before
/// PostgreSQL 18, and refuses options that it does not know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Plugin {
    /// 1.0: format 1 only, without origins; TRUNCATE is not told.
    V1,
    /// 2.0: format 2.
    V2,
    /// 2.3, the 2.5 of Debian 12 too: origins can be filtered.
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
            () if about("filter-origins") => Plugin::V2,
            () if about("format-version") || about("include-origin") => Plugin::V1,
            () => return None,
        };
        (found < self).then_some(found)
    }

    /// What a `null` number of its messages means, unless whoever runs the job knows more.
    pub fn numbers(self) -> Numbers {
        if self >= Plugin::V2_6 { Numbers::Text } else { Numbers::Ambiguous }
    }

    /// True if TRUNCATE is told (by servers from 11 on). Elsewhere it passes without a trace.
    pub fn tells_truncate(self) -> bool {
        self >= Plugin::V2
    }
}

/// The plugin's options, for START_REPLICATION and for `pg_logical_slot_peek_changes` alike.
/// Transactions of `skip_origins` (numbers of `pg_replication_origin`) are not sent, where the
/// plugin can leave them out.
///
/// Every table is asked for. `add-tables` would make old versions leak memory (wal2json#146), and
/// a table made later would be missed; what is of no interest is passed over by the decoder. Types
/// are asked for by number: by name, wal2json writes invalid JSON for some quoted ones.
pub fn options(plugin: Plugin, skip_origins: &[u32]) -> Vec<(&'static str, String)> {
    let on = |name: &'static str| (name, "1".to_string());
    let mut options = vec![on("include-xids"), on("include-timestamp"), on("include-lsn")];
    options.extend([("include-types", "0".to_string()), on("include-type-oids")]);
    if plugin == Plugin::V1 {
        options.extend([on("write-in-chunks"), ("include-unchanged-toast", "0".to_string())]);
        return options;
    }
    options.extend([("format-version", "2".to_string()), on("include-origin")]);
    if plugin >= Plugin::V2_3 && !skip_origins.is_empty() {
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
