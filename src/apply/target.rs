//! What the target says of a table that is written: columns, key, and how to compare them.
//!
//! How values of a type are written and compared takes ten times as long to ask as which columns
//! there are, and of thousands of tables the types are few. So the server's own are kept
//! ([`Types`]): of them only casts could be made meanwhile, which tables that are known would not
//! hear of either. Others may be altered at any time.

use std::collections::HashMap;

use super::encode::Carrier;
use super::native::Native;
use crate::id::QualifiedName;
use crate::pg::{self, Row, Session};

/// A table on the target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Table {
    /// Schema and name.
    pub name: QualifiedName,
    /// `pg_class.relkind`.
    pub kind: String,
    /// Rows must be counted on INSERT too: a trigger or rule could swallow one.
    pub counts_inserts: bool,
    /// Rows may come by COPY: nothing filters them by policies.
    pub takes_copy: bool,
    /// Rows that go by one unique column are looked up by the array of its values.
    pub deletes_by_array: bool,
    /// Rows that went by such an array are counted by the server's statistics of the transaction.
    pub counts_by_server: bool,
    /// Arrays of rows are taken apart in a list of columns.
    pub unnests_in_select: bool,
    /// A trigger or rule fires in this session on a change of the table or a partition: it may
    /// depend on the order of changes.
    pub acts: bool,
    /// The role may do what only its owner may.
    pub owned: bool,
    /// Names of the columns of the primary key, or else of the smallest unique index over NOT NULL
    /// columns; empty if there is neither.
    pub key: Vec<String>,
    /// How many of its indexes allow each value but once, or exclude others otherwise.
    pub unique_indexes: usize,
    /// In attnum order.
    pub columns: Vec<Column>,
}

/// A column of a table on the target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Column {
    /// Its name, unquoted.
    pub name: String,
    /// Its type for a cast, without length or precision.
    pub type_name: String,
    /// The same without domains, so that comparing checks no constraint.
    pub base_type_name: String,
    /// `operator(schema.=)` of the base type; `None` where it has no equality (json, xml, point).
    pub equality: Option<String>,
    /// How its values travel in sets.
    pub carrier: Carrier,
    /// How they do where a value has no binary form.
    pub plain_carrier: Carrier,
    /// The type, if it is one whose values may travel in binary.
    pub native: Option<Native>,
    /// GENERATED ALWAYS AS (...): never written.
    pub generated: bool,
    /// GENERATED ALWAYS AS IDENTITY: INSERT must override it, UPDATE cannot set it.
    pub identity_always: bool,
    /// No collation holds different texts equal.
    pub deterministic: bool,
}

impl Table {
    /// True for a partitioned parent, whose rows are in its partitions.
    pub fn is_partitioned(&self) -> bool {
        self.kind == "p"
    }

    /// `only ` where the name would also mean tables that inherit from it: their rows come as
    /// changes of their own. A partitioned table has no rows but its partitions'.
    pub fn only(&self) -> &'static str {
        if self.is_partitioned() { "" } else { "only " }
    }

    /// The column with that name, and its place.
    pub fn column(&self, name: &str) -> Option<(usize, &Column)> {
        self.columns.iter().enumerate().find(|(_, c)| c.name == name)
    }

    /// Asks the target about tables; those of which nothing is there are left out. Two round trips,
    /// and one more where they have types that are not among `types`, which come to be there.
    ///
    /// Values of the server's own types, where no domain is over them, travel in binary if that is
    /// wanted.
    pub async fn load(
        session: &mut Session,
        names: &[QualifiedName],
        types: &mut Types,
        binary_values: bool,
    ) -> pg::Result<Vec<Table>> {
        let names: Vec<[&str; 2]> = names.iter().map(|n| [&*n.schema, &*n.name]).collect();
        let names = serde_json::json!(names).to_string();
        let rows = session.query_params(TABLE, &[Some(&names)]).await?;
        let oids: Vec<&str> = rows.iter().map(|row| row.str(0)).collect::<pg::Result<_>>()?;
        let oids = format!("{{{}}}", oids.join(","));
        let mut columns = HashMap::<String, Vec<Column>>::new();
        let found = session.query_params(COLUMNS, &[Some(&oids)]).await?;
        types.learn(session, &found).await?;
        for row in &found {
            let column = Column::read(row, types, binary_values)?;
            columns.entry(row.string(4)?).or_default().push(column);
        }
        rows.iter().map(|row| Table::read(row, &mut columns)).collect()
    }

    fn read(row: &Row, columns: &mut HashMap<String, Vec<Column>>) -> pg::Result<Table> {
        let name = QualifiedName::new(row.str(7)?, row.str(8)?);
        let key = match row.opt(3)? {
            None => Vec::new(),
            Some(json) => serde_json::from_str(json)
                .map_err(|e| pg::Error::Result(format!("key of {name}: {e}")))?,
        };
        Ok(Table {
            name,
            kind: row.string(1)?,
            counts_inserts: row.bool(2)?,
            acts: row.bool(4)?,
            owned: row.bool(5)?,
            takes_copy: row.bool(6)?,
            deletes_by_array: true,
            counts_by_server: row.bool(9)?,
            unnests_in_select: true,
            unique_indexes: row.parse(10)?,
            key,
            columns: columns.remove(row.str(0)?).unwrap_or_default(),
        })
    }
}

impl Column {
    fn read(row: &Row, types: &Types, binary_values: bool) -> pg::Result<Column> {
        let (name, oid) = (row.string(0)?, row.str(1)?);
        let gone = || pg::Error::Result(format!("column {name}: its type {oid} is not there"));
        let known = types.0.get(oid).cloned();
        let Type { type_name, base_type_name, equality, carrier, native } =
            known.ok_or_else(gone)?;
        let native = native.filter(|_| binary_values);
        let own = native.filter(|native| native.element_oid().is_some());
        Ok(Column {
            name,
            type_name,
            base_type_name,
            equality,
            generated: row.bool(2)?,
            identity_always: row.bool(3)?,
            deterministic: row.bool(5)?,
            carrier: own.map_or(carrier, Carrier::Native),
            plain_carrier: carrier,
            native,
        })
    }
}

/// From here on oids are of what somebody has made.
///
/// <https://www.postgresql.org/docs/current/system-catalog-initial-data.html#SYSTEM-CATALOG-OID-ASSIGNMENT>
const FIRST_NORMAL_OBJECT_ID: u32 = 16384;

/// What the target has said of types, by oid.
#[derive(Debug, Default)]
pub(super) struct Types(HashMap<String, Type>);

/// What a column is by its type alone; see [`Column`].
#[derive(Clone, Debug)]
struct Type {
    type_name: String,
    base_type_name: String,
    equality: Option<String>,
    carrier: Carrier,
    native: Option<Native>,
}

impl Types {
    /// Asks about those of the columns' types, rows of [`COLUMNS`], that are not known. The
    /// server's own stay known; another's may be altered at any time, and is asked about for each
    /// batch's new tables.
    async fn learn(&mut self, session: &mut Session, columns: &[Row]) -> pg::Result<()> {
        let own = |oid: &str| oid.parse::<u32>().is_ok_and(|oid| oid < FIRST_NORMAL_OBJECT_ID);
        self.0.retain(|oid, _| own(oid));
        let mut fresh = Vec::new();
        for row in columns {
            let oid = row.str(1)?;
            if !self.0.contains_key(oid) && !fresh.contains(&oid) {
                fresh.push(oid);
            }
        }
        if fresh.is_empty() {
            return Ok(());
        }
        let oids = format!("{{{}}}", fresh.join(","));
        for row in session.query_params(TYPES, &[Some(&oids)]).await? {
            let known = Type {
                type_name: row.string(1)?,
                base_type_name: row.string(2)?,
                equality: row.opt(3)?.map(str::to_string),
                carrier: carrier(row.str(4)?),
                native: row.opt(5)?.and_then(Native::named),
            };
            self.0.insert(row.string(0)?, known);
        }
        Ok(())
    }
}

fn carrier(named: &str) -> Carrier {
    match named {
        "text" => Carrier::Text,
        "literal" => Carrier::Literal,
        _ => Carrier::None,
    }
}

/// Oid, kind, whether INSERT may lose rows, key, whether something acts on changes, whether it is
/// ours, whether it has no row security, its name, whether the server counts what is done to it,
/// and how many indexes exclude rows. For the second a partition's own triggers are not looked for,
/// so inserts into partitioned tables are always counted.
const TABLE: &str = "select c.oid, c.relkind, \
     c.relhasrules or c.relkind = 'p' or exists (select from pg_catalog.pg_trigger g \
         where g.tgrelid = c.oid and not g.tgisinternal and g.tgenabled <> 'D'), \
     (select pg_catalog.json_agg(a.attname order by k.n) from (select i.indrelid, i.indkey, \
             coalesce((pg_catalog.to_jsonb(i) ->> 'indnkeyatts')::int, i.indnatts) as width \
             from pg_catalog.pg_index i \
             where i.indrelid = c.oid and i.indisunique and i.indisvalid and i.indimmediate \
             and i.indpred is null and i.indexprs is null \
             and not exists (select from pg_catalog.unnest(i.indkey::int2[]) u(n) \
                 join pg_catalog.pg_attribute b on b.attnum = u.n and b.attrelid = c.oid \
                 where not b.attnotnull) \
             order by i.indisprimary desc, i.indnatts, i.indexrelid limit 1) i, \
         pg_catalog.unnest(i.indkey::int2[]) with ordinality k(attnum, n) \
         join pg_catalog.pg_attribute a on a.attnum = k.attnum \
         where a.attrelid = c.oid and k.n <= i.width), \
     exists (with recursive tree(oid) as (select c.oid union all select i.inhrelid \
             from pg_catalog.pg_inherits i join tree on i.inhparent = tree.oid), \
         on_here(letter) as (select 'A' union all select \
             case pg_catalog.current_setting('session_replication_role') \
             when 'replica' then 'R' else 'O' end) \
         select from pg_catalog.pg_trigger g join tree on g.tgrelid = tree.oid \
             join on_here on g.tgenabled::text = letter \
         union all select from pg_catalog.pg_rewrite r join tree on r.ev_class = tree.oid \
             join on_here on r.ev_enabled::text = letter where r.ev_type <> '1'), \
     pg_catalog.pg_has_role(c.relowner, 'usage'), not c.relrowsecurity, n.nspname, \
     c.relname, pg_catalog.current_setting('track_counts') = 'on', \
     (select pg_catalog.count(*) from pg_catalog.pg_index i where i.indrelid = c.oid \
         and (i.indisunique or i.indisexclusion)) \
     from pg_catalog.jsonb_array_elements($1::jsonb) w(name) \
     join pg_catalog.pg_namespace n on n.nspname = w.name ->> 0 \
     join pg_catalog.pg_class c on c.relnamespace = n.oid and c.relname = w.name ->> 1";

/// Columns with their types' oids, of which table they are, and whether their collation tells all
/// texts apart, which it always did before 12.
const COLUMNS: &str = "select a.attname, a.atttypid, \
     coalesce(pg_catalog.to_jsonb(a) ->> 'attgenerated', '') <> '', a.attidentity = 'a', \
     a.attrelid, not exists (select from pg_catalog.pg_collation c where c.oid = a.attcollation \
         and pg_catalog.to_jsonb(c) ->> 'collisdeterministic' = 'false') \
     from pg_catalog.pg_attribute a where a.attrelid = any ($1::oid[]) \
     and a.attnum > 0 and not a.attisdropped order by a.attrelid, a.attnum";

/// Types with their base types and equality operators.
///
/// The operator is that of the default btree or hash operator class, of the type itself or of one
/// it is binary-coercible to (varchar to text). The session's search_path is empty and the type may
/// be an extension's, so the operator is named with its schema: a bare `=` on citext would silently
/// be that of text. Enums, ranges and arrays have pg_catalog's polymorphic operators; an array is
/// comparable if its elements are. Composite types are not said to be comparable: one may hold
/// json.
///
/// Values travel as text unless somebody may have made a cast from text that does not do what the
/// type's input function does.
const TYPES: &str = "with recursive base(own, oid, typbasetype) as ( \
       select t.oid, t.oid, t.typbasetype from pg_catalog.pg_type t where t.oid = any ($1::oid[]) \
       union all select b.own, t.oid, t.typbasetype from base b \
         join pg_catalog.pg_type t on t.oid = b.typbasetype), \
     compared(elemental) as ( \
       select distinct e.oid from base b join pg_catalog.pg_type t on t.oid = b.oid \
         cross join lateral (select t.oid union all select t.typelem \
             where t.typcategory = 'A' and t.typelem <> 0) e where b.typbasetype = 0), \
     equal(oid, operator) as ( \
       select distinct on (c.elemental) c.elemental, \
         pg_catalog.format('operator(%I.%s)', n.nspname, o.oprname) \
         from compared c \
         join pg_catalog.pg_opclass k on k.opcdefault and k.opcintype in (select c.elemental \
             union all select x.casttarget from pg_catalog.pg_cast x where x.castsource = \
             c.elemental and x.castmethod = 'b' and x.castcontext = 'i') \
         join pg_catalog.pg_am m on m.oid = k.opcmethod and m.amname in ('btree', 'hash') \
         join pg_catalog.pg_amop p on p.amopfamily = k.opcfamily \
             and p.amoplefttype = k.opcintype and p.amoprighttype = k.opcintype \
             and p.amopstrategy = case m.amname when 'btree' then 3 else 1 end \
         join pg_catalog.pg_operator o on o.oid = p.amopopr \
         join pg_catalog.pg_namespace n on n.oid = o.oprnamespace \
         order by c.elemental, k.opcintype = c.elemental desc, m.amname, o.oid) \
     select b.own, pg_catalog.format_type(b.own, -1), pg_catalog.format_type(b.oid, -1), \
       coalesce( \
         (select e.operator from equal e where e.oid = b.oid), \
         case when t.typtype in ('e', 'r', 'm') then 'operator(pg_catalog.=)' end, \
         case when t.typcategory = 'A' and ( \
             exists (select from equal e where e.oid = t.typelem) \
             or exists (select from pg_catalog.pg_type l where l.oid = t.typelem \
                 and l.typtype in ('e', 'r', 'm'))) then 'operator(pg_catalog.=)' end), \
       case when not exists (select from pg_catalog.pg_cast x where x.casttarget = b.oid \
             and x.castsource = 'pg_catalog.text'::pg_catalog.regtype \
             and (x.castmethod = 'f' or (x.castmethod = 'b' and x.oid >= 16384))) then 'text' \
         when t.typarray <> 0 then 'literal' else 'none' end, \
       case when b.own in (16, 17, 20, 21, 23, 25, 114, 700, 701, 1042, 1043, 1082, 1114, \
         1184, 1700, 2950, 3802) then t.typname end \
     from base b join pg_catalog.pg_type t on t.oid = b.oid where b.typbasetype = 0";
