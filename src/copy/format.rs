//! Text or binary.
//!
//! COPY's binary format is what each type's send and receive functions agree on. It may be used
//! only where both ends have the same type and its format has not changed since PostgreSQL 10.
//! Arrays carry the OID of their elements' type, which for built-in types is the same everywhere;
//! composites and ranges nest other types, and are left to text with everything of users' own.
//!
//! Binary is preferred where it may be used: a table of bigint, two ints, timestamptz, float8 and
//! two texts (184 MB, 15 to 15, loopback, 2 cores) took 1.9-2.1 s in binary and 2.5-2.9 s in text,
//! with one worker or two; `psql | psql` took 2.6 s.

use crate::catalog::Table;
use crate::id::quote_literal;

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

/// Arrays of those, in the same order.
const SAFE_ARRAYS: [u32; 23] = [
    1000, 1001, 1002, 1003, 1016, 1005, 1007, 1009, 1028, 199, 1021, 1022, 1014, 1015, 1182, 1183,
    1115, 1185, 1187, 1270, 1231, 2951, 3807,
];

/// COPY options of both sides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wires {
    /// For COPY TO on the source.
    pub read: String,
    /// For COPY FROM on the target.
    pub write: String,
}

/// COPY options for a table: the format, and for text the encoding of the data, which is the
/// source's: the source then converts nothing, and the target converts and checks every byte.
///
/// It is also the only way for rows of a SQL_ASCII database, which no client encoding would let
/// out (pgcopydb#874). Those are read by the target as of its own encoding: told SQL_ASCII, it
/// would take any bytes unchecked into a UTF8 database.
pub fn options(
    format: Format,
    (source_encoding, target_encoding): (&str, &str),
    table: &Table,
    other: &Table,
) -> Wires {
    // Binary text values are in the client's encoding, whatever the COPY says.
    if format != Format::Text && source_encoding == "UTF8" && is_binary_safe(table, other) {
        let binary = "format binary".to_string();
        return Wires { read: binary.clone(), write: binary };
    }
    let text = |encoding: &str| format!("format text, encoding {}", quote_literal(encoding));
    let data = if source_encoding == "SQL_ASCII" { target_encoding } else { source_encoding };
    Wires { read: text(source_encoding), write: text(data) }
}

fn is_binary_safe(table: &Table, other: &Table) -> bool {
    table.stored_columns().all(|column| {
        (SAFE.contains(&column.type_oid) || SAFE_ARRAYS.contains(&column.type_oid))
            && other
                .columns
                .iter()
                .any(|o| o.name == table.written(&column.name) && o.type_oid == column.type_oid)
    })
}
