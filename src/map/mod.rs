//! What a job's `[[map]]` sections make of its tables: other names, fewer columns, fewer rows,
//! masked values.
//!
//! Why it is a room of its own: copy, stream, compare and check must give one result, and may not
//! import each other. So they share words and SQL from here, and do no thinking of their own.
//!
//! One semantics: whatever has to be computed (a mask, a row filter) is an SQL expression over one
//! row, and PostgreSQL on the source computes it, always. The copy and the comparison put it into
//! the SELECT that reads the table, the stream sends a change's values to a session on the source
//! and has them selected from. Neither its versions of functions nor its collations can differ
//! between the two, and what a mask hides never leaves the source's side for the target. The row is
//! called [`ROW`] everywhere, so that an expression that means more than its columns (the whole
//! row, the table's name) is refused everywhere alike.
//!
//! Steps: [`Map::read`] takes the sections apart (pure, no server); [`Map::of`] gives what becomes
//! of one table, [`TableMap`]; `mask` writes the expressions; `words` tells which columns an
//! expression may speak of.
//!
//! Secrets: the key of `hash` masks is in no statement. It travels as a setting in the start-up
//! packet of sessions on the source ([`Map::secret_settings`]), which no server logs, and only a
//! digest of it is stored, so that another key is noticed.
//!
//! Where rows are shared out among several targets, a table has a [`Slice`] beside its filter: the
//! one thing that is computed here as well, as every row of the stream would cost a question, and
//! as it is one of PostgreSQL's own functions, which tests hold against servers.
//!
//! Nothing is stored here, nothing survives a crash: the map is read again at each start, and held
//! against the digest that the job was made with.

mod hash;
mod mask;
mod section;
mod slice;
mod words;

use std::collections::BTreeMap;

use ring::digest;
use ring::hmac;

use crate::id::{QualifiedName, quote_ident};
use crate::secret::{ExposeSecret, SecretString};

pub use mask::{Mask, Typed};
pub use section::Section;
pub use section::table_name;
pub use slice::{Shard, Slice};
pub use words::mentions;

/// What an expression's row is called in every statement.
pub const ROW: &str = "walferry_row";

/// The shortest key for `hash`, in bytes.
const KEY_BYTES_MIN: usize = 16;

/// The settings that hold the two halves of the key, in hex: HMAC's inner and outer pad.
const INNER: &str = "walferry.mask_inner";
const OUTER: &str = "walferry.mask_outer";

/// Bytes of a block of SHA-256, to which HMAC pads its key.
const BLOCK_BYTES: usize = 64;

/// Behind the name of a table, that of the line which counts what its filter left out.
const LEFT_OUT: &str = " (left out by the map)";

/// All sections of a job, read.
#[derive(Debug)]
pub struct Map {
    /// Of single tables.
    tables: BTreeMap<QualifiedName, TableMap>,
    /// Schemas that are called otherwise.
    schemas: BTreeMap<String, String>,
    key: Option<SecretString>,
    digest: String,
}

/// What becomes of one table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TableMap {
    /// Its name on the source.
    pub source: QualifiedName,
    /// Its name on the target.
    pub target: QualifiedName,
    /// The columns that go along; all if empty.
    include: Vec<String>,
    /// Those that do not.
    exclude: Vec<String>,
    /// Names on the source and on the target.
    rename: BTreeMap<String, String>,
    /// By the column's name on the source.
    masks: BTreeMap<String, Mask>,
    /// The rows that go along, as SQL over the row's columns.
    pub filter: Option<String>,
    /// Of these, the ones that go to this target, where there are several.
    pub slice: Option<Slice>,
    /// Rows of other sources are in the target's table as well.
    pub shared: bool,
}

impl Map {
    /// Reads the sections. `None` where there are none.
    ///
    /// # Errors
    /// What is wrong with which section, and what it should be.
    pub fn read(sections: &[Section], key: Option<SecretString>) -> Result<Option<Map>, String> {
        if sections.is_empty() {
            return Ok(None);
        }
        let mut map =
            Map { tables: BTreeMap::new(), schemas: BTreeMap::new(), key, digest: String::new() };
        for section in sections {
            map.add(section)?;
        }
        for table in map.tables.values_mut() {
            if table.target == table.source
                && let Some(schema) = map.schemas.get(&table.source.schema)
            {
                table.target.schema.clone_from(schema);
            }
        }
        if map.hashes() {
            let bytes = map.key.as_ref().map(|key| key.expose_secret().len());
            if bytes.is_none_or(|bytes| bytes < KEY_BYTES_MIN) {
                return Err(format!(
                    "a hash mask needs a key of {KEY_BYTES_MIN} bytes or more: set \
                     WALFERRY_MAP_KEY, or name a file that holds it with map-key-file"
                ));
            }
        } else {
            map.key = None;
        }
        map.digest = map.digested(sections);
        Ok(Some(map))
    }

    /// The map of a job that brings rows of a source to one of several targets: of each table its
    /// slice, or all of its rows. `shared`: other sources write the same tables.
    pub fn sliced(tables: &BTreeMap<QualifiedName, Option<Slice>>, shared: bool) -> Map {
        let mut text = format!("shared {shared}");
        let mut mapped = BTreeMap::new();
        for (name, slice) in tables {
            let json = serde_json::to_string(slice).unwrap_or_default();
            text.push_str(&format!("\n{} {json}", name.quoted()));
            let plain = TableMap::renamed(name.clone(), name.clone());
            mapped.insert(name.clone(), TableMap { slice: slice.clone(), shared, ..plain });
        }
        let digest = short_digest(text.as_bytes());
        Map { tables: mapped, schemas: BTreeMap::new(), key: None, digest }
    }

    fn add(&mut self, section: &Section) -> Result<(), String> {
        match section.read()? {
            section::Read::Schema(from, to) => {
                if self.schemas.insert(from.clone(), to).is_some() {
                    return Err(format!("schema {from} is mapped twice: make it one section"));
                }
            }
            section::Read::Table(table) => {
                let name = table.source.clone();
                if self.tables.insert(name.clone(), *table).is_some() {
                    return Err(format!("table {name} is mapped twice: make it one section"));
                }
            }
        }
        Ok(())
    }

    /// What becomes of a table; `None` for one that no section is about.
    pub fn of(&self, table: &QualifiedName) -> Option<TableMap> {
        if let Some(map) = self.tables.get(table) {
            return Some(map.clone());
        }
        let schema = self.schemas.get(&table.schema)?;
        let target = QualifiedName::new(schema, &table.name);
        Some(TableMap::renamed(table.clone(), target))
    }

    /// Where rows of a table of the source are on the target.
    pub fn target_of(&self, table: &QualifiedName) -> QualifiedName {
        self.of(table).map_or_else(|| table.clone(), |map| map.target)
    }

    /// The map from the target's names back to the source's, where it changes nothing but names.
    pub fn inverse(&self) -> Option<Map> {
        let mut tables = BTreeMap::new();
        for table in self.tables.values() {
            if !table.one_way().is_empty() || table.shared {
                return None;
            }
            let back = TableMap {
                rename: table.rename.iter().map(|(from, to)| (to.clone(), from.clone())).collect(),
                ..TableMap::renamed(table.target.clone(), table.source.clone())
            };
            tables.insert(table.target.clone(), back);
        }
        let schemas: BTreeMap<String, String> =
            self.schemas.iter().map(|(from, to)| (to.clone(), from.clone())).collect();
        let whole = tables.len() == self.tables.len() && schemas.len() == self.schemas.len();
        whole.then(|| Map { tables, schemas, key: None, digest: self.digest.clone() })
    }

    /// The table of the source whose rows are in this one of the target; `None` for one that no
    /// table of that name on the source becomes. For a map with an inverse.
    pub fn source_of(&self, target: &QualifiedName) -> Option<QualifiedName> {
        if let Some(table) = self.tables.values().find(|table| table.target == *target) {
            return Some(table.source.clone());
        }
        let schema = self.schemas.iter().find(|(_, to)| **to == target.schema);
        let before = schema.map(|(from, _)| QualifiedName::new(from, &target.name));
        let source = before.unwrap_or_else(|| target.clone());
        (self.target_of(&source) == *target).then_some(source)
    }

    /// True if a table of this name on the target may be one that the map fills.
    pub fn may_fill(&self, target: &QualifiedName) -> bool {
        self.tables.values().any(|table| table.target == *target)
            || self.schemas.values().any(|schema| *schema == target.schema)
    }

    /// Tables that sections name, by themselves.
    pub fn named(&self) -> impl Iterator<Item = &TableMap> {
        self.tables.values()
    }

    /// Schemas that sections name, before and after.
    pub fn schemas(&self) -> impl Iterator<Item = (&String, &String)> {
        self.schemas.iter()
    }

    /// Patterns of all tables that sections are about, as `--exclude` takes them.
    pub fn patterns(&self) -> Vec<String> {
        let tables = self.tables.keys().map(QualifiedName::quoted);
        let schemas = self.schemas.keys().map(|schema| format!("{}.*", quote_ident(schema)));
        tables.chain(schemas).collect()
    }

    /// True if some mask is a hash.
    pub fn hashes(&self) -> bool {
        self.tables.values().any(|table| table.masks.values().any(|mask| *mask == Mask::Hash))
    }

    /// What tells this map from any other, and its key from any other, and gives neither away.
    pub fn digest(&self) -> &str {
        &self.digest
    }

    fn digested(&self, sections: &[Section]) -> String {
        let mut sorted: Vec<String> = sections
            .iter()
            .map(|section| serde_json::to_string(section).unwrap_or_default())
            .collect();
        sorted.sort();
        let mut bytes = sorted.join("\n").into_bytes();
        if let Some(key) = &self.key {
            let key = hmac::Key::new(hmac::HMAC_SHA256, key.expose_secret().as_bytes());
            bytes.extend_from_slice(hmac::sign(&key, b"walferry map").as_ref());
        }
        short_digest(&bytes)
    }

    /// Settings that sessions on the source need, as in a start-up packet's `options`: the key of
    /// hash masks. `None` if there is none.
    pub fn secret_settings(&self) -> Option<SecretString> {
        let key = self.key.as_ref()?.expose_secret().as_bytes();
        let hashed = digest::digest(&digest::SHA256, key);
        let key = if key.len() > BLOCK_BYTES { hashed.as_ref() } else { key };
        let pad = |with: u8| -> String {
            let bytes: Vec<u8> = key
                .iter()
                .copied()
                .chain(std::iter::repeat(0))
                .take(BLOCK_BYTES)
                .map(|byte| byte ^ with)
                .collect();
            hex(&bytes)
        };
        Some(format!("-c {INNER}={} -c {OUTER}={}", pad(0x36), pad(0x5c)).into())
    }
}

impl TableMap {
    fn renamed(source: QualifiedName, target: QualifiedName) -> TableMap {
        TableMap {
            source,
            target,
            include: Vec::new(),
            exclude: Vec::new(),
            rename: BTreeMap::new(),
            masks: BTreeMap::new(),
            filter: None,
            slice: None,
            shared: false,
        }
    }

    /// True if a column of the source goes along.
    pub fn keeps(&self, column: &str) -> bool {
        let named = |list: &[String]| list.iter().any(|name| name == column);
        (self.include.is_empty() || named(&self.include)) && !named(&self.exclude)
    }

    /// What a column of the source is called on the target.
    pub fn written<'a>(&'a self, column: &'a str) -> &'a str {
        self.rename.get(column).map_or(column, String::as_str)
    }

    /// What hides a column of the source.
    pub fn mask(&self, column: &str) -> Option<&Mask> {
        self.masks.get(column)
    }

    /// All columns of the source that the section names.
    pub fn named_columns(&self) -> impl Iterator<Item = &String> {
        let lists = self.include.iter().chain(&self.exclude);
        let lists = lists.chain(self.rename.keys()).chain(self.masks.keys());
        lists.chain(self.slice.iter().map(|slice| &slice.column))
    }

    /// True if something has to be computed.
    pub fn computes(&self) -> bool {
        self.filter.is_some() || self.slice.is_some() || !self.masks.is_empty()
    }

    /// The same without its slice, for whoever tells that by itself. `None` where the source has to
    /// be asked about its rows anyway.
    pub fn unsliced(&self) -> Option<(TableMap, Slice)> {
        let slice = self.slice.clone().filter(|_| self.filter.is_none())?;
        Some((TableMap { slice: None, ..self.clone() }, slice))
    }

    /// Why what was written cannot be turned back into what was read; empty for names alone.
    pub fn one_way(&self) -> Vec<String> {
        let mut reasons = Vec::new();
        if self.filter.is_some() {
            reasons.push("rows are left out".to_string());
        }
        if self.slice.is_some() {
            reasons.push("its other rows are on other targets".to_string());
        }
        if !self.include.is_empty() || !self.exclude.is_empty() {
            reasons.push("columns are left out".to_string());
        }
        reasons.extend(self.masks.keys().map(|column| format!("column {column} is masked")));
        reasons
    }

    /// The columns, of those given, that a column's value on the target depends on.
    pub fn depends<'a>(&self, column: &'a str, all: &[&'a str]) -> Vec<&'a str> {
        match self.masks.get(column) {
            None | Some(Mask::Hash | Mask::Partial { .. }) => vec![column],
            Some(Mask::Null | Mask::Constant(_)) => Vec::new(),
            Some(Mask::Sql(sql)) => mentioned(sql, all),
        }
    }

    /// The columns, of those given, that the filter depends on.
    pub fn filter_depends<'a>(&self, all: &[&'a str]) -> Vec<&'a str> {
        let meant = |column: &str| {
            let by_slice = self.slice.as_ref().is_some_and(|slice| slice.column == column);
            by_slice || self.filter.as_ref().is_some_and(|filter| mentions(filter, column))
        };
        all.iter().copied().filter(|column| meant(column)).collect()
    }

    /// True if not all rows go along.
    pub fn chooses(&self) -> bool {
        self.filter.is_some() || self.slice.is_some()
    }

    /// What a column's value on the target is, over a row of the source.
    ///
    /// # Errors
    /// Where the mask is not for this type: a sentence without the table's name.
    pub fn expression(&self, column: &Typed<'_>) -> Result<String, String> {
        match self.masks.get(column.name) {
            None => Ok(quote_ident(column.name)),
            Some(mask) => {
                let expression = mask.expression(column)?;
                Ok(format!("({expression})::{}", column.type_name))
            }
        }
    }

    /// Filter and slice as a condition that is true or false, never NULL.
    pub fn condition(&self) -> Option<String> {
        // On a line of its own, so that a comment at its end ends there.
        let filter = self.filter.as_ref().map(|filter| format!("(({filter}\n) is true)"));
        match (filter, self.slice.as_ref().map(Slice::condition)) {
            (Some(filter), Some(slice)) => Some(format!("({filter} and {slice})")),
            (filter, slice) => filter.or(slice),
        }
    }

    /// The name under which changes are counted that the filter left out.
    pub fn left_out(&self) -> QualifiedName {
        QualifiedName::new(&self.target.schema, format!("{}{LEFT_OUT}", self.target.name))
    }
}

/// True for a name that [`TableMap::left_out`] gives.
pub fn is_left_out(table: &QualifiedName) -> bool {
    table.name.ends_with(LEFT_OUT)
}

fn mentioned<'a>(sql: &str, all: &[&'a str]) -> Vec<&'a str> {
    all.iter().copied().filter(|column| mentions(sql, column)).collect()
}

fn short_digest(bytes: &[u8]) -> String {
    hex(digest::digest(&digest::SHA256, bytes).as_ref()).chars().take(16).collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests;
