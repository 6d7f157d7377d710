//! Which tables are copied, and in which pieces. Pure.

use crate::catalog::{Table, TableKind};
use crate::id::{QualifiedName, quote_ident};

/// Bytes of a block. The server could have been built with another size; then parts are merely
/// larger or smaller than asked for.
const BLOCK_BYTES: u64 = 8192;

/// Parts of a table hold so many bytes at most: large enough that starting one costs nothing, small
/// enough that one lost is soon read again.
pub const PART_BYTES: u64 = 256 << 20;

/// Tables up to this size, in bytes, are copied with others in one transaction. A larger one is
/// worth a transaction of its own: what it takes then is small beside its rows.
pub const SMALL_BYTES: u64 = 1 << 20;

/// What is copied in one transaction holds at most so many bytes: what a failure costs.
const BUNDLE_BYTES: u64 = 8 << 20;

/// A piece of a table that one worker copies in one transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// Which table.
    pub table: QualifiedName,
    /// Which piece of it, from 1.
    pub part: u32,
    /// How many pieces there are.
    pub parts: u32,
    /// First block, inclusive.
    pub lo_block: u64,
    /// End, exclusive; `None` is the end of the table, wherever it is by then.
    pub hi_block: Option<u64>,
}

/// The parts of a table of these sizes. `part_bytes` is what a part should hold at most, TOAST
/// included. `source_major` decides whether ranges of ctid can be scanned without reading the
/// whole table, which PostgreSQL 14 was the first to do.
///
/// <https://www.postgresql.org/docs/14/release-14.html> (TID range scans)
pub fn parts(table: &Table, part_bytes: u64, source_major: u32) -> Vec<Part> {
    let count = if source_major >= 14 { table.bytes.div_ceil(part_bytes.max(1)) } else { 1 };
    // No part without a block, and never so many that bookkeeping is what takes the time.
    let count = count.clamp(1, table.blocks.clamp(1, 10_000));
    let edge = |n: u64| u128::from(table.blocks) * u128::from(n) / u128::from(count);
    let edge = |n: u64| u64::try_from(edge(n)).unwrap_or(u64::MAX);
    (0..count)
        .map(|n| Part {
            table: table.name.clone(),
            part: n as u32 + 1,
            parts: count as u32,
            lo_block: edge(n),
            hi_block: (n + 1 < count).then(|| edge(n + 1)),
        })
        .collect()
}

/// What a part of a table should hold at most: `limit`, or less where tables have to be cut finer
/// for all workers to be busy to the end. With four parts' worth of work for each worker, the last
/// one to end is late by a quarter of its time at most, and by less the more tables there are; a
/// part below 64 MiB is done in about a second, and a table left whole can be written frozen.
/// With a limit of 0 all are left whole.
pub fn part_bytes(tables: &[&Table], jobs: usize, limit: u64) -> u64 {
    if limit == 0 {
        return u64::MAX;
    }
    let total: u64 = tables.iter().map(|table| weight(table)).sum();
    let even = total / (4 * jobs.max(1) as u64);
    even.max(64 << 20).min(limit).max(1)
}

/// Consecutive small ones are put together: at most `count`, of at most [`BUNDLE_BYTES`]; so few
/// that each of `jobs` workers has several. Whatever is not small stays alone.
pub fn bundle<T>(
    items: Vec<T>,
    small_bytes: impl Fn(&T) -> Option<u64>,
    (count, jobs): (usize, usize),
) -> Vec<Vec<T>> {
    let small = items.iter().filter(|item| small_bytes(item).is_some()).count();
    let count = count.min(small.div_ceil(4 * jobs.max(1))).max(1);
    let mut bundles: Vec<Vec<T>> = Vec::new();
    let mut open = 0;
    for item in items {
        let bytes = small_bytes(&item);
        match (bytes, bundles.last_mut()) {
            (Some(bytes), Some(bundle))
                if open > 0 && bundle.len() < count && open + bytes <= BUNDLE_BYTES =>
            {
                open += bytes;
                bundle.push(item);
            }
            _ => {
                open = bytes.map_or(0, |bytes| bytes.max(1));
                bundles.push(vec![item]);
            }
        }
    }
    bundles
}

/// Bytes of a table's rows, without TOAST.
pub fn heap_bytes(table: &Table) -> u64 {
    table.blocks * BLOCK_BYTES
}

/// Bytes to be read for a table: what decides who comes first.
pub fn weight(table: &Table) -> u64 {
    table.bytes.max(heap_bytes(table))
}

/// Tables that hold rows, largest first: a partitioned parent has none of its own.
pub fn order(tables: &[Table]) -> Vec<&Table> {
    let mut order: Vec<&Table> = tables.iter().filter(|t| t.kind == TableKind::Plain).collect();
    order.sort_by(|a, b| weight(b).cmp(&weight(a)).then_with(|| a.name.cmp(&b.name)));
    order
}

/// `("a", "b")`, or nothing for a table without columns to copy: COPY then takes all there are,
/// which are none, as it never counts generated ones.
fn column_list(table: &Table) -> String {
    let columns: Vec<String> =
        table.stored_columns().map(|c| quote_ident(table.written(&c.name))).collect();
    if columns.is_empty() { String::new() } else { format!(" ({})", columns.join(", ")) }
}

/// COPY TO for the source. `with` is the list of COPY options.
///
/// # Errors
/// Where a mask of the job's map is not for its column's type: a sentence.
pub fn read_sql(table: &Table, part: &Part, with: &str) -> Result<String, String> {
    let among = among(part);
    if let Some(rows) = table.mapped_rows(among.as_deref()) {
        let columns: Vec<String> = table
            .stored_columns()
            .map(|column| format!("m.{}", quote_ident(table.written(&column.name))))
            .collect();
        let columns = columns.join(", ");
        return Ok(format!("copy (select {columns} from {} as m) to stdout with ({with})", rows?));
    }
    let name = table.name.quoted();
    let filter = table.published.filter.as_ref().map(|filter| format!("({filter})"));
    if part.parts == 1 && filter.is_none() {
        // COPY of a table by its name leaves out the rows of inheritance children, as ONLY does.
        return Ok(format!("copy {name}{} to stdout with ({with})", column_list(table)));
    }
    let columns: Vec<String> = table.stored_columns().map(|c| quote_ident(&c.name)).collect();
    let conditions: Vec<String> = among.into_iter().chain(filter).collect();
    Ok(format!(
        "copy (select {} from only {name} where {}) to stdout with ({with})",
        columns.join(", "),
        conditions.join(" and ")
    ))
}

/// The condition for the rows of a part; none for a whole table.
fn among(part: &Part) -> Option<String> {
    let from = format!("ctid >= '({},0)'::pg_catalog.tid", part.lo_block);
    let to = part.hi_block.map(|hi| format!(" and ctid < '({hi},0)'::pg_catalog.tid"));
    (part.parts > 1).then(|| from + &to.unwrap_or_default())
}

/// COPY FROM for the target.
pub fn write_sql(table: &Table, with: &str) -> String {
    let name = table.written_name().quoted();
    format!("copy {name}{} from stdin with ({with})", column_list(table))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::catalog::{Column, Published};
    use crate::change::ReplicaIdentity;

    fn table(name: &str, blocks: u64, bytes: u64) -> Table {
        let column = |name: &str, generated| Column {
            name: name.to_string(),
            type_name: "integer".to_string(),
            type_oid: 23,
            not_null: false,
            generated,
            identity_always: false,
        };
        Table {
            oid: 1,
            name: QualifiedName::new("s", name),
            kind: TableKind::Plain,
            partition_of: None,
            unlogged: false,
            identity: ReplicaIdentity::Default,
            identity_columns: Vec::new(),
            key: Vec::new(),
            columns: vec![column("a\"b", false), column("g", true), column("c", false)],
            blocks,
            bytes,
            rows_estimate: -1.0,
            published: Published::default(),
            mapped: None,
        }
    }

    #[test]
    fn small_tables_are_one_part_and_old_sources_never_split() {
        assert_eq!(parts(&table("t", 0, 0), 100, 15).len(), 1);
        assert_eq!(parts(&table("t", 10, 81_920), 81_920, 15).len(), 1);
        assert_eq!(parts(&table("t", 1000, 8_192_000), 8192, 13).len(), 1);
        assert_eq!(parts(&table("t", 2, 1 << 40), 1, 15).len(), 2, "TOAST does not make blocks");
    }

    #[test]
    fn tables_come_largest_first_and_parents_not_at_all() {
        let mut parent = table("p", 0, 0);
        parent.kind = TableKind::Partitioned;
        let tables = [table("a", 1, 1), table("b", 9, 9), parent, table("c", 9, 9)];
        let names: Vec<&str> = order(&tables).iter().map(|t| t.name.name.as_str()).collect();
        assert_eq!(names, ["b", "c", "a"]);
    }

    #[test]
    fn statements_name_columns_and_leave_generated_ones_out() {
        let table = table("T", 4, 4 * 8192);
        let parts = parts(&table, 2 * 8192, 15);
        assert_eq!(
            read_sql(&table, &parts[0], "format text").unwrap(),
            "copy (select \"a\"\"b\", \"c\" from only \"s\".\"T\" where ctid >= \
             '(0,0)'::pg_catalog.tid and ctid < '(2,0)'::pg_catalog.tid) \
             to stdout with (format text)"
        );
        assert!(
            read_sql(&table, &parts[1], "x")
                .unwrap()
                .ends_with("'(2,0)'::pg_catalog.tid) to stdout with (x)")
        );
        assert_eq!(
            write_sql(&table, "x"),
            "copy \"s\".\"T\" (\"a\"\"b\", \"c\") from stdin with (x)"
        );
        let mut some = table.clone();
        some.published.filter = Some("(c > 3) or (c is null)".to_string());
        let second = read_sql(&some, &parts[1], "x").unwrap();
        assert!(second.ends_with("tid and ((c > 3) or (c is null))) to stdout with (x)"));
        some.columns.pop();
        let whole = self::parts(&some, u64::MAX, 15);
        assert_eq!(
            read_sql(&some, &whole[0], "x").unwrap(),
            "copy (select \"a\"\"b\" from only \"s\".\"T\" where ((c > 3) or (c is null))) \
             to stdout with (x)"
        );
    }

    #[test]
    fn parts_are_cut_so_that_all_workers_end_together() {
        let (one, ten) = (table("a", 1 << 17, 1 << 30), table("b", 1, 10 << 20));
        assert_eq!(part_bytes(&[&one], 2, 256 << 20), 128 << 20);
        assert_eq!(part_bytes(&[&one], 2, 32 << 20), 32 << 20, "the limit");
        assert_eq!(part_bytes(&[&ten], 2, 256 << 20), 64 << 20, "not too fine");
        assert_eq!(part_bytes(&[&one; 100], 4, 256 << 20), 256 << 20);
    }

    #[test]
    fn small_tables_travel_together_and_large_ones_alone() {
        let bundled = |sizes: &[u64], options| -> Vec<usize> {
            let small = |size: &u64| (*size <= SMALL_BYTES).then_some(*size);
            bundle(sizes.to_vec(), small, options).iter().map(Vec::len).collect()
        };
        let mut sizes = vec![9 << 20, 2 << 20];
        sizes.resize(102, 0);
        assert_eq!(bundled(&sizes, (64, 1)), [1, 1, 25, 25, 25, 25], "some for each worker");
        assert_eq!(bundled(&sizes, (10, 1))[..4], [1, 1, 10, 10]);
        assert_eq!(bundled(&sizes, (1, 1)).len(), 102, "switched off");
        assert_eq!(bundled(&[1 << 20; 80], (64, 2)), [8; 10], "no more than a failure may cost");
        assert!(bundled(&[], (64, 2)).is_empty());
    }

    proptest! {
        #[test]
        fn parts_cover_every_block_once_and_are_about_equal(
            blocks in 0..1_000_000_u64, toast in 0..1_u64 << 34, part_bytes in 1..1_u64 << 30
        ) {
            let parts = parts(&table("t", blocks, blocks * 8192 + toast), part_bytes, 17);
            let mut next = 0;
            for (index, part) in parts.iter().enumerate() {
                prop_assert_eq!(part.lo_block, next);
                prop_assert_eq!(part.part as usize, index + 1);
                prop_assert_eq!(part.parts as usize, parts.len());
                if let Some(hi) = part.hi_block {
                    prop_assert!(hi > part.lo_block);
                    let even = blocks / parts.len() as u64;
                    prop_assert!(hi - part.lo_block <= even + 1);
                    next = hi;
                } else {
                    prop_assert_eq!(index + 1, parts.len());
                }
            }
        }
    }
}
