//! SQL expressions that turn a value into text that is equal exactly where the values are, on any
//! version, in any encoding and under any collation.
//!
//! A row becomes `concat(v1, ',', v2, ',', ...)`. That is unambiguous because of what stands for a
//! value: for types whose text is never empty and holds no comma, that text (concat() uses the
//! type's own output function, so no cast a user made comes in between); for everything else a hash
//! of its text. NULL is nothing at all, and '' hashes to something. Hashing long values by
//! themselves also keeps rows clear of the limit of 1 GB a text has.
//!
//! Measured beside `ROW(...)::text`, whose quoting looks at every character: a third less time.
//!
//! By type:
//! - float4, float8: bytes of the send function, in hex. Their text is the shortest exact one from
//!   12 on, and 17 digits before. NaN by name, as processors make NaNs with different bits.
//! - arrays, composites, ranges, domains and geometric types with floats inside: taken apart, but
//!   only where the two servers are on different sides of 12; as text otherwise.
//! - bytea: md5 of the bytes, not of the hex text that is twice as long.
//! - char(n): the padded form (a cast to text would cut trailing blanks that char without a length
//!   keeps). "char": its byte, since 16 prints the upper half differently.
//! - reg*: names, as COPY has them; numbers differ per cluster. Sessions have an empty search_path,
//!   so names are qualified alike. oid itself is a number, and moves as one.
//! - enum: the label; its number and its order are each cluster's own.
//! - money, dates, intervals: text under the settings every session fixes.
//! - json and xml: text as stored. jsonb, tsvector, numeric, hstore, citext: stable text.
//!
//! <https://www.postgresql.org/docs/current/runtime-config-client.html#GUC-EXTRA-FLOAT-DIGITS>

use std::collections::HashMap;

use crate::id::quote_ident;
use crate::pg::{self, Session};

/// How both sides hash, agreed between them, and the conversion this side needs for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Dialect {
    /// hashtextextended() instead of md5().
    pub fast: bool,
    /// Name of the encoding to hash texts in; `None` if both sides store the same bytes.
    pub encoding: Option<&'static str>,
    /// One side prints floats in the form before 12, the other does not.
    pub floats_differ: bool,
}

impl Dialect {
    /// A hash of a text expression, as an expression whose own text has no comma.
    pub fn hash(&self, text: &str) -> String {
        match (self.fast, self.encoding) {
            (true, _) => format!("hashtextextended({text} collate \"C\", 0)"),
            (false, Some(encoding)) => format!("md5(convert_to({text}, '{encoding}'))"),
            (false, None) => format!("md5({text})"),
        }
    }

    /// A hash of an expression made by [`Types::concat`] (ASCII only), as int8.
    pub fn hash_int8(&self, concat: &str) -> String {
        if self.fast {
            format!("hashtextextended({concat} collate \"C\", 0)")
        } else {
            format!("('x' || left(md5({concat}), 16))::bit(64)::int8")
        }
    }
}

/// What is known of a type.
#[derive(Clone, Debug)]
struct Type {
    kind: Kind,
    /// A cast to text by function exists, which `::text` would use instead of the output function.
    text_cast: bool,
}

#[derive(Clone, Debug)]
enum Kind {
    /// Nothing inside that we look at.
    Plain,
    Domain {
        base: u32,
        base_name: String,
    },
    Array {
        element: u32,
    },
    Composite {
        fields: Vec<(String, u32)>,
    },
    Range {
        bound: u32,
    },
}

/// The types of one database.
#[derive(Clone, Debug, Default)]
pub(super) struct Types(HashMap<u32, Type>);

const TYPES: &str = "select t.oid, t.typtype, \
     case when t.typtype = 'd' then t.typbasetype \
          when t.typtype = 'r' then (select r.rngsubtype from pg_catalog.pg_range r \
               where r.rngtypid = t.oid) \
          when t.typcategory = 'A' and t.typlen = -1 then t.typelem else 0 end, \
     pg_catalog.format_type(t.typbasetype, null), \
     exists (select 1 from pg_catalog.pg_cast c where c.castsource = t.oid \
          and c.casttarget = 'pg_catalog.text'::pg_catalog.regtype and c.castfunc <> 0), \
     case when t.typtype = 'c' then (select pg_catalog.json_agg( \
          pg_catalog.json_build_array(a.attname, a.atttypid::int8) order by a.attnum) \
          from pg_catalog.pg_attribute a where a.attrelid = t.typrelid and a.attnum > 0 \
          and not a.attisdropped) end \
     from pg_catalog.pg_type t where t.typtype in ('b', 'd', 'e', 'c', 'r', 'm')";

/// Arguments of one concat(): FUNC_MAX_ARGS is 100, and a comma stands between two values.
const CONCAT_VALUES: usize = 50;

/// How deep composites may nest before they are taken as text.
const DEPTH_MAX: usize = 8;

impl Types {
    /// Reads the types of the session's database. One round trip.
    pub async fn read(session: &mut Session) -> pg::Result<Types> {
        let mut types = HashMap::new();
        for row in session.query(TYPES).await? {
            let inner: Option<u32> = row.parse_opt(2)?;
            let inner = inner.unwrap_or(0);
            let kind = match (row.str(1)?, inner) {
                ("d", base) => Kind::Domain { base, base_name: row.string(3)? },
                ("r", bound) => Kind::Range { bound },
                ("c", _) => Kind::Composite { fields: fields(row.opt(5)?)? },
                (_, 0) => Kind::Plain,
                (_, element) => Kind::Array { element },
            };
            types.insert(row.parse(0)?, Type { kind, text_cast: row.bool(4)? });
        }
        Ok(Types(types))
    }

    /// The text of values of the given types side by side: ASCII, and equal only where all are.
    pub fn concat(&self, dialect: &Dialect, values: &[(String, u32)]) -> String {
        let rendered: Vec<String> =
            values.iter().map(|(e, oid)| self.render(dialect, e, *oid, 0)).collect();
        let groups: Vec<String> = rendered
            .chunks(CONCAT_VALUES)
            .map(|group| format!("concat({})", group.join(", ',', ")))
            .collect();
        match groups.as_slice() {
            [] => "''::text".to_string(),
            [one] => one.clone(),
            // 1,600 columns, the most a table can have, make 32 groups.
            many => format!("concat({})", many.join(", ',', ")),
        }
    }

    /// An expression for a value inside [`Types::concat`].
    fn render(&self, dialect: &Dialect, e: &str, oid: u32, depth: usize) -> String {
        if let Some(Kind::Domain { base, base_name }) = self.0.get(&oid).map(|t| &t.kind) {
            return self.render(dialect, &format!("({e})::{base_name}"), *base, depth);
        }
        match oid {
            // bool, int2, int4, int8, oid, xid, cid, date, time, timetz, timestamp, timestamptz,
            // interval, numeric, uuid, inet, cidr, macaddr, macaddr8, pg_lsn:
            // never empty, no comma.
            16 | 20 | 21 | 23 | 26 | 28 | 29 | 650 | 774 | 829 | 869 | 1082 | 1083 | 1114
            | 1184 | 1186 | 1266 | 1700 | 2950 | 3220 => e.to_string(),
            700 => float(e, "float4"),
            701 => float(e, "float8"),
            17 => format!("md5({e})"),
            18 => format!("encode(charsend({e}), 'hex')"),
            1042 => dialect.hash(&format!("textin(bpcharout({e}))")),
            _ if dialect.floats_differ && depth < DEPTH_MAX && self.has_float(oid, 0) => {
                self.take_apart(dialect, e, oid, depth + 1)
            }
            _ => dialect.hash(&self.text(e, oid)),
        }
    }

    /// The output function's text of a value, NULL for NULL.
    pub fn text(&self, e: &str, oid: u32) -> String {
        match self.0.get(&oid) {
            // Built-in casts by function (bool, inet, char(n), ...) lose nothing that a hash needs,
            // but for char(n), seen to above. A user's may.
            Some(Type { text_cast: true, .. }) if oid >= FIRST_USER_OID => {
                format!("(case when {e} is distinct from null then concat({e}) end)")
            }
            Some(Type { kind: Kind::Domain { base, base_name }, .. }) => {
                self.text(&format!("({e})::{base_name}"), *base)
            }
            _ if oid == 1042 => format!("textin(bpcharout({e}))"),
            _ => format!("({e})::text"),
        }
    }

    /// True if a value of the type prints floats.
    fn has_float(&self, oid: u32, depth: usize) -> bool {
        if matches!(oid, 700 | 701 | 600..=604 | 628 | 718) {
            return true;
        }
        let Some(Type { kind, .. }) = self.0.get(&oid) else { return false };
        if depth > DEPTH_MAX {
            return false;
        }
        match kind {
            Kind::Plain => false,
            Kind::Domain { base: inner, .. }
            | Kind::Array { element: inner }
            | Kind::Range { bound: inner } => self.has_float(*inner, depth + 1),
            Kind::Composite { fields } => {
                fields.iter().any(|(_, oid)| self.has_float(*oid, depth + 1))
            }
        }
    }

    /// A value with floats inside, floats rendered as such; NULL for NULL.
    fn take_apart(&self, dialect: &Dialect, e: &str, oid: u32, depth: usize) -> String {
        let geometric = match oid {
            600 => Some("point_send"),
            601 => Some("lseg_send"),
            602 => Some("path_send"),
            603 => Some("box_send"),
            604 => Some("poly_send"),
            628 => Some("line_send"),
            718 => Some("circle_send"),
            _ => None,
        };
        if let Some(send) = geometric {
            return format!("encode({send}({e}), 'hex')");
        }
        let inner = match self.0.get(&oid).map(|t| &t.kind) {
            Some(Kind::Array { element }) => {
                let name = format!("u{depth}");
                let element = self.render(dialect, &format!("{name}.e"), *element, depth);
                // A NULL element must count: concat() makes '' of it, the comma keeps its place.
                format!(
                    "concat(array_dims({e}), ':', (select string_agg(concat({element}), ',') \
                     from (select unnest({e}) as e) {name}))"
                )
            }
            Some(Kind::Composite { fields }) => {
                let fields: Vec<(String, u32)> = fields
                    .iter()
                    .map(|(name, oid)| (format!("({e}).{}", quote_ident(name)), *oid))
                    .collect();
                self.concat(dialect, &fields)
            }
            Some(Kind::Range { bound }) => {
                let lower = self.render(dialect, &format!("lower({e})"), *bound, depth);
                let upper = self.render(dialect, &format!("upper({e})"), *bound, depth);
                format!(
                    "concat(isempty({e}), lower_inc({e}), upper_inc({e}), {lower}, ',', {upper})"
                )
            }
            _ => return dialect.hash(&self.text(e, oid)),
        };
        // Hashed, as it holds commas.
        format!("(case when {e} is distinct from null then {} end)", dialect.hash(&inner))
    }
}

/// `FirstNormalObjectId`: oids below are the same in every cluster.
const FIRST_USER_OID: u32 = 16384;

fn float(e: &str, name: &str) -> String {
    format!("(case when {e} = 'NaN' then 'NaN' else encode({name}send({e}), 'hex') end)")
}

fn fields(text: Option<&str>) -> pg::Result<Vec<(String, u32)>> {
    let Some(text) = text else { return Ok(Vec::new()) };
    serde_json::from_str(text)
        .map_err(|e| pg::Error::Result(format!("fields of a composite type \"{text}\": {e}")))
}
