//! What hides a value, as SQL.

use std::str::FromStr;

use super::{INNER, OUTER};
use crate::id::{quote_ident, quote_literal};

/// What hides the values of a column.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mask {
    /// NULL for every row.
    Null,
    /// The same text for every row, NULL or not before.
    Constant(String),
    /// HMAC-SHA256 of the value's text by the job's key, in as much of it as the type holds. Equal
    /// values of all tables stay equal, so that joins hold; NULL stays NULL.
    Hash,
    /// So many characters at the start and at the end stay, each between becomes `*`; of a value
    /// that is not longer, all do.
    Partial {
        /// At the start.
        first: u32,
        /// At the end.
        last: u32,
    },
    /// Any immutable expression over the row's columns.
    Sql(String),
}

/// A column as a server describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Typed<'a> {
    /// Its name on the source.
    pub name: &'a str,
    /// `format_type()`, modifiers included.
    pub type_name: &'a str,
    /// `atttypid`.
    pub type_oid: u32,
}

/// `pg_type.oid` of built-in types.
pub(super) mod oid {
    pub const BYTEA: u32 = 17;
    pub const INT8: u32 = 20;
    pub const INT2: u32 = 21;
    pub const INT4: u32 = 23;
    pub const TEXT: u32 = 25;
    pub const BPCHAR: u32 = 1042;
    pub const VARCHAR: u32 = 1043;
    pub const NUMERIC: u32 = 1700;
    pub const UUID: u32 = 2950;
}

/// Characters of the hash, in hex.
const HASH_CHARACTERS: u32 = 64;

/// Fewer characters of it are no key: with 32 (128 bits) two of a billion billions are equal.
const KEY_CHARACTERS_MIN: u32 = 32;

impl FromStr for Mask {
    type Err = String;

    fn from_str(text: &str) -> Result<Mask, String> {
        let unknown = || {
            format!(
                "\"{text}\" is not a mask: use null, constant:TEXT, hash, partial:FIRST,LAST or \
                 sql:EXPRESSION"
            )
        };
        match text.split_once(':') {
            None if text == "null" => Ok(Mask::Null),
            None if text == "hash" => Ok(Mask::Hash),
            Some(("constant", text)) => Ok(Mask::Constant(text.to_string())),
            Some(("sql", sql)) => Ok(Mask::Sql(sql.to_string())),
            Some(("partial", counts)) => {
                let (first, last) = counts.split_once(',').ok_or_else(unknown)?;
                let count = |text: &str| text.trim().parse::<u32>().map_err(|_| unknown());
                let (first, last) = (count(first)?, count(last)?);
                if first > 1_000_000 || last > 1_000_000 {
                    return Err(unknown());
                }
                Ok(Mask::Partial { first, last })
            }
            _ => Err(unknown()),
        }
    }
}

impl Mask {
    /// The value that is shown, not yet cast to the column's type.
    ///
    /// # Errors
    /// Where the mask is not for this type.
    pub(super) fn expression(&self, column: &Typed<'_>) -> Result<String, String> {
        let value = format!("{}::text", quote_ident(column.name));
        match self {
            Mask::Null => Ok("null".to_string()),
            Mask::Constant(text) => Ok(quote_literal(text)),
            Mask::Sql(sql) => Ok(format!("{sql}\n")),
            Mask::Hash => hash(column, &value),
            Mask::Partial { first, last } if is_text(column.type_oid) => Ok(format!(
                "case when length({value}) <= {both} then repeat('*', length({value})) \
                 else left({value}, {first}) || repeat('*', length({value}) - {both}) \
                 || right({value}, {last}) end",
                both = first + last
            )),
            Mask::Partial { .. } => Err(unfit(column, "partial", "text, varchar and char")),
        }
    }

    /// Why values of this type, masked so, may be no key any more.
    pub fn breaks_key(&self, column: &Typed<'_>) -> Option<String> {
        if *self != Mask::Hash {
            return Some("only a hash keeps different keys different".to_string());
        }
        let characters = limit(column.type_name).unwrap_or(HASH_CHARACTERS);
        let enough = match column.type_oid {
            oid::TEXT | oid::UUID | oid::BYTEA => true,
            oid::VARCHAR | oid::BPCHAR => characters >= KEY_CHARACTERS_MIN,
            // 63 bits: two of ten million keys are equal with a chance of one in 180,000.
            oid::INT8 | oid::NUMERIC => true,
            _ => false,
        };
        (!enough).then(|| {
            format!("{} is too short for a hash that keeps keys different", column.type_name)
        })
    }
}

fn is_text(type_oid: u32) -> bool {
    matches!(type_oid, oid::TEXT | oid::VARCHAR | oid::BPCHAR)
}

/// The `n` of `character varying(n)`.
fn limit(type_name: &str) -> Option<u32> {
    type_name.split_once('(')?.1.split_once(')')?.0.parse().ok()
}

/// HMAC by its definition (RFC 2104), as sha256() is built in from PostgreSQL 11 on and hmac() is
/// not. The settings hold the padded key.
fn hash(column: &Typed<'_>, value: &str) -> Result<String, String> {
    let pad = |name: &str| format!("decode(current_setting('{name}'), 'hex')");
    let digest =
        format!("sha256({} || sha256({} || convert_to({value}, 'UTF8')))", pad(OUTER), pad(INNER));
    let hex = format!("encode({digest}, 'hex')");
    let bits = |digits: u32, bits: u32| format!("('x' || left({hex}, {digits}))::bit({bits})");
    let int8 = || format!("{}::bigint & 9223372036854775807", bits(16, 64));
    Ok(match column.type_oid {
        oid::TEXT => hex,
        oid::VARCHAR | oid::BPCHAR => {
            let characters = limit(column.type_name).unwrap_or(HASH_CHARACTERS);
            format!("left({hex}, {})", characters.min(HASH_CHARACTERS))
        }
        oid::UUID => format!("left({hex}, 32)::uuid"),
        oid::BYTEA => digest,
        oid::INT8 => int8(),
        oid::INT4 => format!("{}::int & 2147483647", bits(8, 32)),
        oid::INT2 => format!("{}::int & 32767", bits(4, 16)),
        oid::NUMERIC if limit(column.type_name).is_none() && column.type_name == "numeric" => {
            int8()
        }
        _ => {
            let types = "text, varchar, char, uuid, bytea, the integers and numeric";
            return Err(unfit(column, "hash", types));
        }
    })
}

fn unfit(column: &Typed<'_>, mask: &str, types: &str) -> String {
    format!(
        "column {} is {}, and the mask {mask} is for {types}: use null, constant: or sql:",
        column.name, column.type_name
    )
}
