//! Which of several targets a row goes to, by a column of it: as SQL for what reads the table, and
//! here for what the stream brings. Both give the same for every value, and a target for every
//! value: NULL goes where `lookup` sends what it does not name, and else to the first.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::mask::{Typed, oid};
use super::{QualifiedName, hash, section};
use crate::id::{quote_ident, quote_literal};

/// `[[shard]]` of walferry.toml: how the rows of a table are shared out among the targets.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Shard {
    /// The table on the sources, `schema.table`.
    pub table: String,
    /// The column that decides.
    pub column: String,
    /// `citus`, `hashtext-mod`, `mod` or `lookup`.
    pub by: String,
    /// Of `citus`: where the ranges of the second and each further target begin, inclusive. Without
    /// it the 2^32 values are split evenly, as Citus splits them into as many shards.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub bounds: Vec<i32>,
    /// Of `lookup`: values as the server prints them, and the numbers of their targets, from 1.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub lookup: BTreeMap<String, u32>,
    /// Of `lookup`: the target of all other values.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub otherwise: Option<u32>,
}

/// The rows of a table that go to one target.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Slice {
    /// The column that decides.
    pub column: String,
    function: Function,
    /// What the value is to the function.
    kind: Kind,
    /// How many targets there are.
    targets: u32,
    /// Which one it is, from 0.
    target: u32,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
enum Function {
    /// The type's hash function over ranges, each target's beginning at a bound.
    Citus { bounds: Vec<i32> },
    /// Of the value's text.
    HashtextMod,
    /// Of the value itself.
    Mod,
    /// A place for each value that is named.
    Lookup { places: BTreeMap<String, u32>, otherwise: u32 },
}

/// How values of a type are hashed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
enum Kind {
    Int2,
    Int4,
    Int8,
    Text,
    /// Blanks at the end do not count.
    Char,
    Uuid,
}

const TYPES: &str = "smallint, integer, bigint, text, varchar, char and uuid";

impl Kind {
    fn of(column: &Typed<'_>) -> Result<Kind, String> {
        Ok(match column.type_oid {
            oid::INT2 => Kind::Int2,
            oid::INT4 => Kind::Int4,
            oid::INT8 => Kind::Int8,
            oid::TEXT | oid::VARCHAR => Kind::Text,
            oid::BPCHAR => Kind::Char,
            oid::UUID => Kind::Uuid,
            _ => {
                return Err(format!(
                    "column {} is {}: rows are shared out by {TYPES}",
                    column.name, column.type_name
                ));
            }
        })
    }

    fn is_number(self) -> bool {
        matches!(self, Kind::Int2 | Kind::Int4 | Kind::Int8)
    }
}

impl Shard {
    /// The table's name.
    ///
    /// # Errors
    /// Where it is not `schema.table`.
    pub fn name(&self) -> Result<QualifiedName, String> {
        section::table_name(&self.table)
            .ok_or_else(|| format!("[[shard]] table = \"{}\": write schema.table", self.table))
    }

    /// What is wrong with the section itself, whatever the column's type.
    ///
    /// # Errors
    /// A sentence that names the table.
    pub fn refuse_nonsense(&self, targets: u32) -> Result<(), String> {
        self.name()?;
        if self.column.is_empty() {
            return Err(format!("[[shard]] of {}: column is missing", self.table));
        }
        self.function(targets).map(|_| ())
    }

    /// The rows that go to each target.
    ///
    /// # Errors
    /// Where the column's type does not fit, or the section is nonsense.
    pub fn slices(&self, column: &Typed<'_>, targets: u32) -> Result<Vec<Slice>, String> {
        let function = self.function(targets)?;
        let kind = Kind::of(column).map_err(|why| format!("[[shard]] of {}: {why}", self.table))?;
        if function == Function::Mod && !kind.is_number() {
            return Err(format!(
                "[[shard]] of {}: by = \"mod\" is for smallint, integer and bigint, and column {} \
                 is {}: use hashtext-mod",
                self.table, column.name, column.type_name
            ));
        }
        let slice = |target| Slice {
            column: self.column.clone(),
            function: function.clone(),
            kind,
            targets,
            target,
        };
        Ok((0..targets).map(slice).collect())
    }

    fn function(&self, targets: u32) -> Result<Function, String> {
        let wrong = |why: &str| Err(format!("[[shard]] of {}: {why}", self.table));
        let is_lookup = self.by == "lookup";
        if !is_lookup && (!self.lookup.is_empty() || self.otherwise.is_some()) {
            return wrong("lookup and otherwise are for by = \"lookup\"");
        }
        if self.by != "citus" && !self.bounds.is_empty() {
            return wrong("bounds are for by = \"citus\"");
        }
        match self.by.as_str() {
            "hashtext-mod" => Ok(Function::HashtextMod),
            "mod" => Ok(Function::Mod),
            "citus" if self.bounds.is_empty() => Ok(Function::Citus { bounds: even(targets) }),
            "citus" => {
                let ascending = self.bounds.is_sorted_by(|low, high| low < high);
                if self.bounds.len() + 1 != targets as usize || !ascending {
                    return wrong("bounds are one fewer than there are targets, and ascend");
                }
                Ok(Function::Citus { bounds: self.bounds.clone() })
            }
            "lookup" => {
                let place = |number: &u32| match number {
                    1.. if *number <= targets => Ok(number - 1),
                    _ => Err(format!(
                        "[[shard]] of {}: there is no target {number}: they are 1 to {targets}",
                        self.table
                    )),
                };
                let Some(otherwise) = &self.otherwise else {
                    return wrong("otherwise is missing: the target of values that are not named");
                };
                let places = self.lookup.iter().map(|(value, n)| Ok((value.clone(), place(n)?)));
                let places = places.collect::<Result<_, String>>()?;
                Ok(Function::Lookup { places, otherwise: place(otherwise)? })
            }
            other => wrong(&format!("by = \"{other}\": use citus, hashtext-mod, mod or lookup")),
        }
    }
}

/// Where the ranges of all targets but the first begin, as Citus makes so many shards: each of
/// 2^32 / n values, what is left over in the last.
fn even(targets: u32) -> Vec<i32> {
    let width = (1_i64 << 32) / i64::from(targets.max(1));
    (1..i64::from(targets)).map(|place| (i64::from(i32::MIN) + place * width) as i32).collect()
}

impl Slice {
    /// The rows, as a condition that is true or false, never NULL.
    pub(super) fn condition(&self) -> String {
        format!("({} = {})", self.place(), self.target)
    }

    /// The target's place of a row, from 0, as SQL.
    fn place(&self) -> String {
        let column = quote_ident(&self.column);
        // By its bytes: another collation's hash of it may change with a library.
        let text = format!("({column}::pg_catalog.text collate pg_catalog.\"C\")");
        let n = self.targets;
        match &self.function {
            Function::Citus { bounds } => {
                let hash = match self.kind {
                    Kind::Int2 => format!("pg_catalog.hashint2({column})"),
                    Kind::Int4 => format!("pg_catalog.hashint4({column})"),
                    Kind::Int8 => format!("pg_catalog.hashint8({column})"),
                    Kind::Text | Kind::Char => format!("pg_catalog.hashtext({text})"),
                    Kind::Uuid => format!("pg_catalog.uuid_hash({column})"),
                };
                let bounds: Vec<String> = bounds.iter().map(i32::to_string).collect();
                let bounds = format!("'{{{}}}'::pg_catalog.int4[]", bounds.join(","));
                format!("coalesce(pg_catalog.width_bucket({hash}, {bounds}), 0)")
            }
            Function::HashtextMod => {
                format!("coalesce((pg_catalog.hashtext({text}) % {n} + {n}) % {n}, 0)")
            }
            Function::Mod => format!("coalesce(({column} % {n} + {n}) % {n}, 0)"),
            Function::Lookup { places, otherwise } if places.is_empty() => otherwise.to_string(),
            Function::Lookup { places, otherwise } => {
                let whens = places
                    .iter()
                    .map(|(value, place)| format!(" when {} then {place}", quote_literal(value)));
                format!("(case {text}{} else {otherwise} end)", whens.collect::<String>())
            }
        }
    }

    /// True if a row with this value in the column, as the server prints it in UTF-8, is among
    /// them; for servers whose own encoding is UTF-8.
    ///
    /// # Errors
    /// A sentence, where it is no value of the column's type.
    pub fn has(&self, value: Option<&[u8]>) -> Result<bool, String> {
        let place = match (value, &self.function) {
            (None, Function::Lookup { otherwise, .. }) => *otherwise,
            (None, _) => 0,
            (Some(value), _) => self.place_of(value)?,
        };
        Ok(place == self.target)
    }

    fn place_of(&self, value: &[u8]) -> Result<u32, String> {
        let text = match self.kind {
            Kind::Char => without_blanks(value),
            _ => value,
        };
        let n = i64::from(self.targets);
        let place = match &self.function {
            Function::Citus { bounds } => {
                let hash = match self.kind {
                    Kind::Int2 | Kind::Int4 => hash::int4(self.number(value)?),
                    Kind::Int8 => hash::int8(self.number(value)?),
                    Kind::Text | Kind::Char => hash::bytes(text),
                    Kind::Uuid => hash::bytes(&self.uuid(value)?),
                };
                bounds.iter().filter(|bound| **bound <= hash).count() as i64
            }
            Function::HashtextMod => i64::from(hash::bytes(text)).rem_euclid(n),
            Function::Mod => self.number::<i64>(value)?.rem_euclid(n),
            Function::Lookup { places, otherwise } => {
                let named = std::str::from_utf8(text).ok().and_then(|text| places.get(text));
                i64::from(*named.unwrap_or(otherwise))
            }
        };
        Ok(place as u32)
    }

    fn number<T: std::str::FromStr>(&self, value: &[u8]) -> Result<T, String> {
        let number = std::str::from_utf8(value).ok().and_then(|text| text.parse().ok());
        number.ok_or_else(|| self.no_value("number"))
    }

    fn uuid(&self, value: &[u8]) -> Result<[u8; 16], String> {
        let text: String = String::from_utf8_lossy(value).chars().filter(|c| *c != '-').collect();
        let number = u128::from_str_radix(&text, 16).ok().filter(|_| text.len() == 32);
        number.map(u128::to_be_bytes).ok_or_else(|| self.no_value("uuid"))
    }

    fn no_value(&self, what: &str) -> String {
        format!("column {}, by which its rows are shared out, holds no {what}", self.column)
    }
}

/// What is left of a `character` when it becomes a text.
fn without_blanks(value: &[u8]) -> &[u8] {
    let kept = value.iter().rposition(|byte| *byte != b' ').map_or(0, |last| last + 1);
    value.split_at(kept).0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn typed(type_oid: u32) -> Typed<'static> {
        Typed { name: "k", type_name: "of a test", type_oid }
    }

    fn shard(toml: &str) -> Shard {
        toml::from_str(&format!("table = 'public.t'\ncolumn = 'k'\n{toml}")).unwrap()
    }

    #[test]
    fn a_row_goes_to_exactly_one_target_whatever_its_value() {
        let values: [Option<&[u8]>; 6] =
            [None, Some(b"0"), Some(b"-1"), Some(b"7"), Some(b"-2147483648"), Some(b"42")];
        for by in [
            "by = 'citus'",
            "by = 'hashtext-mod'",
            "by = 'mod'",
            "by = 'lookup'\n\
             lookup = { 7 = 2, '-1' = 5 }\notherwise = 3",
        ] {
            let slices = shard(by).slices(&typed(oid::INT4), 5).unwrap();
            for value in values {
                let among = slices.iter().filter(|slice| slice.has(value).unwrap()).count();
                assert_eq!(among, 1, "{by} {value:?}");
            }
        }
        let slices = shard("by = 'mod'").slices(&typed(oid::INT8), 3).unwrap();
        assert!(slices[2].has(Some(b"-4")).unwrap() && slices[0].has(None).unwrap());
        assert!(slices[0].has(Some(b"x")).is_err());
    }

    #[test]
    fn ranges_are_split_as_citus_splits_them() {
        assert_eq!(even(2), [0]);
        assert_eq!(even(1), [0_i32; 0]);
        // As create_distributed_table with shard_count = 3 has them.
        assert_eq!(even(3), [-715_827_883, 715_827_882]);
        let given = shard("by = 'citus'\nbounds = [-5, 100]");
        let slices = given.slices(&typed(oid::TEXT), 3).unwrap();
        // hashtext('') is -1477818771.
        assert!(slices[0].has(Some(b"")).unwrap());
    }

    #[test]
    fn nonsense_is_refused_by_the_tables_name() {
        for (toml, word) in [
            ("by = 'md5'", "use citus"),
            ("by = 'citus'\nbounds = [5, 1]", "ascend"),
            ("by = 'citus'\nbounds = [5]", "one fewer"),
            ("by = 'mod'\nbounds = [5, 9]", "by = \"citus\""),
            ("by = 'mod'\notherwise = 1", "for by = \"lookup\""),
            ("by = 'lookup'\nlookup = { a = 1 }", "otherwise is missing"),
            ("by = 'lookup'\nlookup = { a = 4 }\notherwise = 1", "no target 4"),
            ("by = 'lookup'\nlookup = { a = 0 }\notherwise = 1", "no target 0"),
        ] {
            let error = shard(toml).refuse_nonsense(3).unwrap_err();
            assert!(error.contains(word) && error.contains("public.t"), "{toml}: {error}");
        }
        let error = shard("by = 'mod'").slices(&typed(oid::TEXT), 3).unwrap_err();
        assert!(error.contains("hashtext-mod"), "{error}");
        let error = shard("by = 'citus'").slices(&typed(1184), 3).unwrap_err();
        assert!(error.contains("column k is of a test"), "{error}");
        let bare = Shard { table: "t".to_string(), ..Shard::default() };
        assert!(bare.refuse_nonsense(3).unwrap_err().contains("schema.table"));
    }
}
