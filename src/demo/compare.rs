//! Are two databases the same? Reads all rows of both and trusts no part of walferry above `pg`.
//!
//! Both sides stream every table as text; the rows' hashes are summed up, so memory is fixed and no
//! order is needed. Only a table whose sums differ is read again, sorted by the servers in byte
//! order, to name the first rows that differ. Nothing may write meanwhile.

use std::collections::BTreeMap;

use crate::id::{QualifiedName, quote_ident};
use crate::pg::{Config, CopyOut, Purpose, Result, Session};
use crate::schema::script;

/// So many differing rows of a table are named.
const LISTED: usize = 3;

/// Characters shown of a row.
const SHOWN: usize = 200;

/// What [`compare`] found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Comparison {
    /// Every table of either side with the rows of the source and whether the target has the same.
    /// A table that one side lacks is not equal.
    pub tables: Vec<(QualifiedName, u64, bool)>,
    /// What differs, in sentences: tables, rows, sequences. Empty means the same.
    pub differences: Vec<String>,
}

impl Comparison {
    /// True if nothing differs.
    pub fn is_equal(&self) -> bool {
        self.differences.is_empty()
    }

    /// Rows of all tables of the source.
    pub fn rows(&self) -> u64 {
        self.tables.iter().map(|(_, rows, _)| rows).sum()
    }
}

/// Name and type of a table's columns, in order.
type Columns = Vec<(String, String)>;

/// Compares all user tables that hold rows (partitions one by one; neither unlogged nor foreign
/// tables, nor what extensions or schema walferry own) and checks that every sequence of the source
/// exists on the target and stands no earlier. Streams both databases whole.
pub async fn compare(source_uri: &str, target_uri: &str) -> Result<Comparison> {
    compare_without(source_uri, target_uri, &[]).await
}

/// The same without the rows of some tables, given as `schema.name` unquoted: those that a job
/// leaves behind on purpose.
pub async fn compare_without(
    source_uri: &str,
    target_uri: &str,
    left_out: &[&str],
) -> Result<Comparison> {
    let mut source = open(source_uri, "source").await?;
    let mut target = open(target_uri, "target").await?;
    let ours = tables(&mut source).await?;
    let mut theirs = tables(&mut target).await?;
    let mut comparison = Comparison::default();
    for (name, columns) in ours {
        if left_out.contains(&format!("{}.{}", name.schema, name.name).as_str()) {
            theirs.remove(&name);
            continue;
        }
        let difference = match theirs.remove(&name) {
            None => Some((0, vec![format!("{name}: not on the target")])),
            Some(other) if sorted(&other) != sorted(&columns) => {
                Some((0, vec![format!("{name}: columns {columns:?} became {other:?}")]))
            }
            Some(_) => None,
        };
        let (rows, found) = match difference {
            Some(difference) => difference,
            None => compare_table(&mut source, &mut target, &name, &columns).await?,
        };
        comparison.tables.push((name, rows, found.is_empty()));
        comparison.differences.extend(found);
    }
    for (name, _) in theirs {
        comparison.differences.push(format!("{name}: on the target only"));
        comparison.tables.push((name, 0, false));
    }
    comparison.differences.extend(compare_sequences(&mut source, &mut target).await?);
    Ok(comparison)
}

async fn open(uri: &str, label: &str) -> Result<Session> {
    let config = Config::parse(uri)?.labelled(label).with_application_name("walferry compare");
    let mut session = Session::connect(&config, Purpose::Sql).await?;
    session.pass_unknown_bytes().await?;
    Ok(session)
}

async fn tables(session: &mut Session) -> Result<BTreeMap<QualifiedName, Columns>> {
    let rows = session
        .query(
            "select n.nspname, c.relname, a.attname, format_type(a.atttypid, a.atttypmod) \
             from pg_class c join pg_namespace n on n.oid = c.relnamespace \
             left join pg_attribute a on a.attrelid = c.oid and a.attnum > 0 \
                 and not a.attisdropped \
             where c.relkind = 'r' and c.relpersistence = 'p' \
             and n.nspname not in ('pg_catalog', 'information_schema', 'walferry') \
             and n.nspname !~ '^pg_(toast|temp)' \
             and not exists (select 1 from pg_depend d where d.objid = c.oid \
                 and d.classid = 'pg_class'::regclass and d.deptype = 'e') \
             order by c.oid, a.attnum",
        )
        .await?;
    let mut tables: BTreeMap<QualifiedName, Columns> = BTreeMap::new();
    for row in &rows {
        let columns = tables.entry(QualifiedName::new(row.str(0)?, row.str(1)?)).or_default();
        if let (Some(name), Some(type_name)) = (row.opt(2)?, row.opt(3)?) {
            columns.push((name.to_string(), type_name.to_string()));
        }
    }
    Ok(tables)
}

/// By name: pg_dump itself moves the inherited columns of a child to the front, and rows are
/// compared in the source's order.
fn sorted(columns: &Columns) -> Columns {
    let mut columns = columns.clone();
    columns.sort();
    columns
}

/// The columns as they are compared: floating point by its bits, since releases before 12 print it
/// otherwise than later ones.
fn expressions(columns: &Columns) -> String {
    let expressions = columns.iter().map(|(name, type_name)| match type_name.as_str() {
        "real" => format!("float4send({})", quote_ident(name)),
        "double precision" => format!("float8send({})", quote_ident(name)),
        _ => quote_ident(name),
    });
    expressions.collect::<Vec<_>>().join(", ")
}

/// The sum of the hashes of a table's rows, and their number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Digest {
    rows: u64,
    sum: u64,
}

/// The rows of the source, and what differs.
async fn compare_table(
    source: &mut Session,
    target: &mut Session,
    name: &QualifiedName,
    columns: &Columns,
) -> Result<(u64, Vec<String>)> {
    let expressions = expressions(columns);
    let sql = format!("copy (select {expressions} from only {}) to stdout", name.quoted());
    let (ours, theirs) = tokio::try_join!(digest(source, &sql), digest(target, &sql))?;
    if ours == theirs {
        return Ok((ours.rows, Vec::new()));
    }
    let row = if expressions.is_empty() { "''".to_string() } else { format!("row({expressions})") };
    let sql = format!(
        "copy (select r from (select {row}::text as r from only {}) t order by r collate \"C\") \
         to stdout",
        name.quoted()
    );
    let (ours_sorted, theirs_sorted) = (source.copy_out(&sql).await?, target.copy_out(&sql).await?);
    let mut found = first_differences(ours_sorted, theirs_sorted, name).await?;
    found.insert(0, format!("{name}: {} rows became {}", ours.rows, theirs.rows));
    Ok((ours.rows, found))
}

async fn digest(session: &mut Session, sql: &str) -> Result<Digest> {
    let mut copy = session.copy_out(sql).await?;
    let mut digest = Digest::default();
    // The server sends each row as a message of its own.
    while let Some(line) = copy.next().await? {
        digest.rows += 1;
        digest.sum = digest.sum.wrapping_add(hash(&line));
    }
    Ok(digest)
}

/// Folded multiplication, eight bytes at a time; the length keeps trailing zeros apart. Against
/// mistakes, not malice.
fn hash(bytes: &[u8]) -> u64 {
    const K: u64 = 0x9e37_79b9_7f4a_7c15;
    let fold = |a: u64, b: u64| {
        let product = u128::from(a) * u128::from(b);
        (product >> 64) as u64 ^ product as u64
    };
    let mut chunks = bytes.chunks_exact(8);
    let mut state = fold(bytes.len() as u64 ^ K, 0xd6e8_feb8_6659_fd93);
    for chunk in &mut chunks {
        let word = chunk.try_into().map_or(0, u64::from_le_bytes);
        state = fold(state ^ word, K).rotate_left(29) ^ word;
    }
    let last = chunks.remainder().iter().fold(1, |word, byte| (word << 8) | u64::from(*byte));
    fold(fold(state ^ last, K) ^ K, 0xa076_1d64_78bd_642f)
}

/// Merges two sorted lists of rows and names the first that are in one only.
async fn first_differences(
    mut source: CopyOut<'_>,
    mut target: CopyOut<'_>,
    name: &QualifiedName,
) -> Result<Vec<String>> {
    let mut found = Vec::new();
    let (mut ours, mut theirs) = (next(&mut source).await?, next(&mut target).await?);
    loop {
        let ordering = match (&ours, &theirs) {
            (None, None) => return Ok(found),
            (Some(_), None) => std::cmp::Ordering::Less,
            (None, Some(_)) => std::cmp::Ordering::Greater,
            (Some(a), Some(b)) => a.cmp(b),
        };
        let (row, side) = if ordering.is_lt() { (&ours, "source") } else { (&theirs, "target") };
        if ordering.is_ne() && found.len() < LISTED {
            let row = String::from_utf8_lossy(row.as_deref().unwrap_or_default()).into_owned();
            let shown: String = row.chars().take(SHOWN).collect();
            found.push(format!("{name}: on the {side} only: {shown}"));
        }
        if ordering.is_le() {
            ours = next(&mut source).await?;
        }
        if ordering.is_ge() {
            theirs = next(&mut target).await?;
        }
    }
}

/// The next row with COPY's escapes undone, so that its bytes sort as the server sorted them.
async fn next(copy: &mut CopyOut<'_>) -> Result<Option<Vec<u8>>> {
    let Some(line) = copy.next().await? else { return Ok(None) };
    let mut row = Vec::with_capacity(line.len());
    let mut bytes = line.strip_suffix(b"\n").unwrap_or(&line).iter();
    while let Some(byte) = bytes.next() {
        row.push(match byte {
            b'\\' => match bytes.next() {
                Some(b'b') => 8,
                Some(b't') => b'\t',
                Some(b'n') => b'\n',
                Some(b'v') => 11,
                Some(b'f') => 12,
                Some(b'r') => b'\r',
                Some(other) => *other,
                None => b'\\',
            },
            byte => *byte,
        });
    }
    Ok(Some(row))
}

async fn compare_sequences(source: &mut Session, target: &mut Session) -> Result<Vec<String>> {
    let mut differences = Vec::new();
    let theirs = sequences(target).await?;
    for (name, (ours, increment)) in sequences(source).await? {
        match theirs.get(&name) {
            None => differences.push(format!("sequence {name}: not on the target")),
            Some((there, _)) => {
                let behind = if increment > 0 { *there < ours } else { *there > ours };
                if behind {
                    differences.push(format!(
                        "sequence {name}: gives {there} next on the target, {ours} on the source"
                    ));
                }
            }
        }
    }
    Ok(differences)
}

/// What each sequence gives next, and its increment.
async fn sequences(session: &mut Session) -> Result<BTreeMap<QualifiedName, (i128, i128)>> {
    let listed = session
        .query(
            "select n.nspname, c.relname, s.seqincrement \
             from pg_sequence s join pg_class c on c.oid = s.seqrelid \
             join pg_namespace n on n.oid = c.relnamespace \
             where c.relpersistence = 'p' and n.nspname <> 'walferry' \
             and not exists (select 1 from pg_depend d where d.objid = c.oid \
                 and d.classid = 'pg_class'::regclass and d.deptype = 'e') order by 1, 2",
        )
        .await?;
    let mut sequences = BTreeMap::new();
    for row in &listed {
        let name = QualifiedName::new(row.str(0)?, row.str(1)?);
        let increment: i128 = row.parse(2)?;
        let sql = format!("select last_value, is_called from {}", name.quoted());
        let at = session.query_one(&sql, &[]).await?;
        let step = if at.bool(1)? { increment } else { 0 };
        sequences.insert(name, (at.parse::<i128>(0)? + step, increment));
    }
    Ok(sequences)
}

/// Compares what pg_dump says of both schemas, line by line, and gives the lines of one side only,
/// marked `-` (source) and `+` (target). Takes a pg_dump that can read both servers; blocks.
///
/// Comments, SET lines and pg_dump's restrict keys are not compared, nor is schema walferry.
pub fn schema_differences(source_uri: &str, target_uri: &str) -> std::io::Result<Vec<String>> {
    let (ours, theirs) = (schema_lines(source_uri)?, schema_lines(target_uri)?);
    let mut differences = Vec::new();
    for (side, lines, others) in [("-", &ours, &theirs), ("+", &theirs, &ours)] {
        for (line, count) in lines {
            if others.get(line) != Some(count) {
                differences.push(format!("{side} {line}"));
            }
        }
    }
    Ok(differences)
}

fn schema_lines(uri: &str) -> std::io::Result<BTreeMap<String, usize>> {
    let output = std::process::Command::new(super::binaries::client("pg_dump")?)
        .args(["--schema-only", "--exclude-schema=walferry", "--dbname", uri])
        .stdin(std::process::Stdio::null())
        .output()?;
    if !output.status.success() {
        return Err(std::io::Error::other(String::from_utf8_lossy(&output.stderr).into_owned()));
    }
    let mut lines = BTreeMap::new();
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        let noise = ["--", "SET ", "SELECT pg_catalog.set_config", "\\restrict", "\\unrestrict"];
        if line.trim().is_empty() || noise.iter().any(|start| line.starts_with(start)) {
            continue;
        }
        if let Some(line) = script::without_column_version(line) {
            *lines.entry(line).or_default() += 1;
        }
    }
    Ok(lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_that_differ_little_hash_apart() {
        let rows: [&[u8]; 8] =
            [b"", b"\0", b"\0\0", b"1\t2", b"2\t1", b"aaaaaaaabbbbbbbb", b"bbbbbbbbaaaaaaaa", b"1"];
        for (i, a) in rows.iter().enumerate() {
            for b in rows.iter().skip(i + 1) {
                assert_ne!(hash(a), hash(b), "{a:?} {b:?}");
            }
        }
    }
}
