//! Text or binary.
//!
//! COPY's binary format is what each type's send and receive functions agree on. It may be used
//! only where both ends have the same type and its format has not changed since PostgreSQL 10;
//! arrays, composites and ranges carry OIDs or nest other types and are left to text.

use crate::catalog::Table;
use crate::pg::Session;

/// How rows travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Format {
    /// Binary where proven equal, else text.
    #[default]
    Auto,
    /// Always text.
    Text,
    /// Like Auto: asking for binary does not make it right where it is not proven.
    Binary,
}

/// `pg_type.oid` of types whose binary form is the same from 10 to 18: bool, bytea, "char", name,
/// int8, int2, int4, text, oid, json, float4, float8, bpchar, varchar, date, time, timestamp,
/// timestamptz, interval, timetz, numeric, uuid, jsonb.
const SAFE: [u32; 23] = [
    16, 17, 18, 19, 20, 21, 23, 25, 26, 114, 700, 701, 1042, 1043, 1082, 1083, 1114, 1184, 1186,
    1266, 1700, 2950, 3802,
];

/// COPY options for a table, for either side: the format, and for text the source's encoding.
///
/// The source then converts nothing, and the target checks every byte. It is also the only way for
/// rows of a SQL_ASCII database, which no client encoding would let out (pgcopydb#874).
pub fn options(format: Format, source: &Session, table: &Table, other: &Table) -> String {
    let encoding = source.parameter("server_encoding").unwrap_or("UTF8");
    // Binary text values are in the client's encoding, whatever the COPY says.
    if format != Format::Text && encoding == "UTF8" && is_binary_safe(table, other) {
        return "format binary".to_string();
    }
    format!("format text, encoding '{}'", encoding.replace('\'', "''"))
}

fn is_binary_safe(table: &Table, other: &Table) -> bool {
    table.stored_columns().all(|column| {
        SAFE.contains(&column.type_oid)
            && other.columns.iter().any(|o| o.name == column.name && o.type_oid == column.type_oid)
    })
}
