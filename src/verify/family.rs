//! Which tables are compared with which, in what pieces, by what key.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use crate::catalog::{Column, Table, TableKind};
use crate::id::QualifiedName;

use super::{End, Options};

/// Rows a bucket should hold: few enough that reading one again is nothing, many enough that
/// thousands of buckets do not slow the scan.
const BUCKET_ROWS: f64 = 2000.0;

/// The most buckets of a family; the result of a scan stays under 200 kB.
const BUCKETS_MAX: u64 = 4096;

/// What is known of one database's tables.
pub(super) struct Catalog {
    tables: HashMap<QualifiedName, Table>,
}

/// The tables that hold a family's rows on one side.
#[derive(Clone, Debug)]
pub(super) struct Half {
    /// The table the family is named after.
    pub table: Table,
    /// Where the rows are: the table itself, or its partitions.
    pub leaves: Vec<Table>,
    /// Of leaves that a map makes others of, what follows FROM to read them as these.
    pub rows: HashMap<QualifiedName, String>,
}

/// A table, or a partitioned table with all its partitions.
#[derive(Clone, Debug)]
pub(super) struct Family {
    pub name: QualifiedName,
    pub source: Option<Half>,
    pub target: Option<Half>,
    /// Column names in the one order used on both sides.
    pub columns: Vec<String>,
    /// Names of the key's columns; empty for a multiset.
    pub key: Vec<String>,
    /// A power of two.
    pub buckets: u64,
    pub problems: Vec<String>,
    pub notes: Vec<String>,
}

/// Rows of one table, or of a ctid range of it.
#[derive(Clone, Debug)]
pub(super) struct Scan {
    pub table: QualifiedName,
    /// What stands for it after FROM, where a map makes other rows of its rows.
    pub rows: Option<String>,
    /// First block (inclusive) and last block (exclusive), each `None` where open.
    pub blocks: (Option<u64>, Option<u64>),
    /// The rows that are compared; all if `None`.
    pub filter: Option<String>,
    pub bytes: u64,
}

/// Work for one pair of sessions: a scan of each side.
#[derive(Clone, Debug)]
pub(super) struct Piece {
    /// Index of the family.
    pub family: usize,
    pub source: Option<Scan>,
    pub target: Option<Scan>,
}

impl Family {
    pub fn half(&self, end: End) -> Option<&Half> {
        match end {
            End::Source => self.source.as_ref(),
            End::Target => self.target.as_ref(),
        }
    }
}

impl Half {
    /// A column of the family by name.
    pub fn column(&self, name: &str) -> Option<&Column> {
        self.table.columns.iter().find(|c| c.name == name)
    }

    /// The table's key, or the one all partitions share where the parent has none. It need not be
    /// unique over the partitions: rows of one key are compared as a multiset.
    fn key(&self) -> Vec<String> {
        if !self.table.key.is_empty() {
            return self.table.key.clone();
        }
        let first = self.leaves.first().map(|leaf| leaf.key.clone()).unwrap_or_default();
        if self.leaves.iter().all(|leaf| leaf.key == first) { first } else { Vec::new() }
    }

    fn rows_estimate(&self) -> f64 {
        // 50 rows a block where the table was never analyzed.
        self.leaves
            .iter()
            .map(|l| if l.rows_estimate > 0.0 { l.rows_estimate } else { l.blocks as f64 * 50.0 })
            .sum()
    }

    pub fn scans(&self, piece_blocks: u64) -> Vec<Scan> {
        self.leaves
            .iter()
            .flat_map(|leaf| scans(leaf, self.rows.get(&leaf.name), piece_blocks))
            .collect()
    }

    /// What a leaf's rows are read from.
    pub fn from(&self, leaf: &Table) -> String {
        let rows = self.rows.get(&leaf.name).cloned();
        rows.unwrap_or_else(|| format!("only {}", leaf.name.quoted()))
    }
}

fn scans(leaf: &Table, rows: Option<&String>, piece_blocks: u64) -> Vec<Scan> {
    let pieces = (leaf.blocks / piece_blocks.max(1)).max(1);
    (0..pieces)
        .map(|i| Scan {
            table: leaf.name.clone(),
            rows: rows.cloned(),
            blocks: (
                (i > 0).then_some(i * piece_blocks),
                (i + 1 < pieces).then_some((i + 1) * piece_blocks),
            ),
            filter: leaf.published.filter.clone(),
            bytes: leaf.bytes / pieces,
        })
        .collect()
}

impl Catalog {
    pub fn new(tables: Vec<Table>) -> Catalog {
        Catalog { tables: tables.into_iter().map(|t| (t.name.clone(), t)).collect() }
    }

    /// The families that take part, by name.
    ///
    /// # Errors
    /// Where a mask of the map is not for its column: a sentence.
    fn halves(&self, options: &Options) -> Result<BTreeMap<QualifiedName, Half>, String> {
        let mut halves: BTreeMap<QualifiedName, Half> = BTreeMap::new();
        for table in self.tables.values() {
            let Some(root) = self.root(table, options) else { continue };
            let half = halves.entry(root.written_name().clone()).or_insert_with(|| Half {
                table: as_written(root),
                leaves: Vec::new(),
                rows: HashMap::new(),
            });
            if table.kind == TableKind::Plain {
                half.leaves.push(table.clone());
            }
            if let Some(rows) = table.mapped_rows(None) {
                half.rows.insert(table.name.clone(), rows?);
            }
        }
        for half in halves.values_mut() {
            half.leaves.sort_by(|a, b| a.name.cmp(&b.name));
        }
        Ok(halves)
    }

    /// The topmost selected ancestor of a selected table (itself, if it is no partition).
    fn root<'a>(&'a self, table: &'a Table, options: &Options) -> Option<&'a Table> {
        let filled = |table: &Table| match &options.map {
            Some(map) => table.mapped.is_none() && map.may_fill(&table.name),
            None => false,
        };
        if !options.selection.has_rows(&table.name) && !filled(table) {
            return None;
        }
        let mut root = table;
        let mut listed = is_listed(table, options);
        while let Some(parent) = root.partition_of.as_ref().and_then(|p| self.tables.get(p)) {
            if !options.selection.has_rows(&parent.name) {
                break;
            }
            // A leaf asked for by name, without its parent, is a family of its own.
            if listed && !is_listed(parent, options) {
                break;
            }
            root = parent;
            listed = is_listed(parent, options);
        }
        listed.then_some(root)
    }
}

fn is_listed(table: &Table, options: &Options) -> bool {
    options.tables.as_ref().is_none_or(|names| names.contains(table.written_name()))
}

/// A table of the source with the names of the target.
fn as_written(table: &Table) -> Table {
    let mut written = table.clone();
    if let Some(mapped) = &table.mapped {
        let rename = |name: &mut String| *name = mapped.written(name).to_string();
        written.name = mapped.target.clone();
        written.key.retain(|name| mapped.keeps(name));
        if written.key.len() < table.key.len() {
            written.key.clear();
        }
        written.columns.iter_mut().map(|column| &mut column.name).for_each(rename);
        written.key.iter_mut().for_each(rename);
    }
    written
}

/// Pairs the tables of both sides by name.
///
/// # Errors
/// Where a mask of the map is not for its column: a sentence.
pub(super) fn families(
    source: &Catalog,
    target: &Catalog,
    options: &Options,
) -> Result<Vec<Family>, String> {
    let mut sources = source.halves(options)?;
    let mut targets = target.halves(options)?;
    let names: BTreeSet<QualifiedName> = sources.keys().chain(targets.keys()).cloned().collect();
    let paired = names.into_iter().map(|name| {
        let (source, target) = (sources.remove(&name), targets.remove(&name));
        family(name, source, target, options)
    });
    Ok(paired.collect())
}

fn family(
    name: QualifiedName,
    source: Option<Half>,
    target: Option<Half>,
    options: &Options,
) -> Family {
    let mut family = Family {
        name,
        source,
        target,
        columns: Vec::new(),
        key: Vec::new(),
        buckets: 1,
        problems: Vec::new(),
        notes: Vec::new(),
    };
    match (family.source.clone(), family.target.clone()) {
        (Some(source), Some(target)) => pair_columns(&mut family, &source, &target, options),
        (Some(_), None) => family.problems.push("the table is missing on the target".to_string()),
        (None, _) => family.problems.push("the table is missing on the source".to_string()),
    }
    let halves = [&family.source, &family.target];
    let rows =
        halves.into_iter().flatten().map(Half::rows_estimate).fold(0.0, |a: f64, b| a.max(b));
    family.buckets = ((rows / BUCKET_ROWS) as u64).clamp(1, BUCKETS_MAX).next_power_of_two();
    let unlogged = |h: &Half| h.leaves.iter().any(|l| l.unlogged);
    if family.source.as_ref().is_some_and(unlogged) {
        family.notes.push("unlogged on the source: its changes are in no stream".to_string());
    }
    if let Some(half) = &family.source {
        let shown = [&half.table].into_iter().chain(&half.leaves).map(|table| &table.published);
        let left_out: BTreeSet<String> =
            shown.filter(|shown| !shown.is_whole()).map(|shown| shown.left_out()).collect();
        family.notes.extend(left_out.iter().map(|what| format!("not published: {what}")));
    }
    family
}

/// Matches columns by name, in the source's order.
fn pair_columns(family: &mut Family, source: &Half, target: &Half, options: &Options) {
    for column in &source.table.columns {
        let Some(other) = target.column(&column.name) else {
            family.problems.push(format!("column \"{}\" is missing on the target", column.name));
            continue;
        };
        if column.type_name != other.type_name {
            family.notes.push(format!(
                "column \"{}\" is {} on the source and {} on the target",
                column.name, column.type_name, other.type_name
            ));
        }
        if options.generated || !column.generated {
            family.columns.push(column.name.clone());
        }
    }
    for column in &target.table.columns {
        let published = &source.table.published;
        // What the target computes itself cannot come through a map.
        let computed = column.generated && source.table.mapped.is_some();
        if source.column(&column.name).is_none()
            && !computed
            && !published.columns_left_out.contains(&column.name)
        {
            family.problems.push(format!("column \"{}\" is missing on the source", column.name));
        }
    }
    let key = source.key();
    if key.iter().all(|name| source.column(name).is_some() && target.column(name).is_some()) {
        family.key = key;
    }
}

/// The scans of all families, the largest first, so that none is left alone at the end.
/// `piece_blocks` is of the source and the target.
pub(super) fn pieces(families: &[Family], piece_blocks: (u64, u64)) -> Vec<Piece> {
    let mut pieces = Vec::new();
    for (index, family) in families.iter().enumerate() {
        let mut targets = family
            .target
            .iter()
            .flat_map(|h| h.scans(piece_blocks.1))
            .collect::<Vec<_>>()
            .into_iter();
        let first = pieces.len();
        for source in family.source.iter().flat_map(|h| h.scans(piece_blocks.0)) {
            pieces.push(Piece { family: index, source: Some(source), target: targets.next() });
        }
        for target in targets {
            pieces.push(Piece { family: index, source: None, target: Some(target) });
        }
        if pieces.len() == first {
            // A partitioned table without partitions still has a line in the report.
            pieces.push(Piece { family: index, source: None, target: None });
        }
    }
    let bytes = |scan: &Option<Scan>| scan.as_ref().map_or(0, |s| s.bytes);
    pieces.sort_by_key(|p| std::cmp::Reverse(bytes(&p.source).max(bytes(&p.target))));
    pieces
}
