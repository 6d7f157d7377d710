//! SQL text of the statements that write rows. Pure.
//!
//! Every parameter is cast to its column's type, so that none is ever guessed. What must touch
//! exactly one row is wrapped so that any other count is an error on the server: the batch travels
//! in one round trip, COMMIT included, and nobody could look at a row count before that.

use super::encode::Carrier;
use super::target::Table;
use crate::change::{Relation, ReplicaIdentity};
use crate::id::quote_ident;

/// What the guard's error message starts with, and ends with; the count stands between.
pub(super) const GUARD_PREFIX: &str = "walferry rows: ";

/// Gives 1 if `u` has one row; any other count is cast to an integer in vain (22P02), and told.
const GUARD: &str = "select case when pg_catalog.count(*) = 1 then 1 \
     else pg_catalog.concat('walferry rows: ', pg_catalog.count(*))::int end from u";

/// Where a parameter's value comes from: a column of the relation, by place, in the new or old row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Bind {
    /// From the row afterwards.
    New(usize),
    /// From the row that identifies.
    Old(usize),
}

/// A statement and what its parameters are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Statement {
    /// With `$1`, `$2`, ...
    pub sql: String,
    /// One for each parameter.
    pub binds: Vec<Bind>,
}

/// How the row of an UPDATE or DELETE is found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Locator {
    /// By these columns of the relation, which are unique and not NULL.
    Key(Vec<usize>),
    /// By all columns, one row of those that are equal (REPLICA IDENTITY FULL, no key).
    Whole,
    /// Not at all: the stream carries no old columns.
    None,
}

/// A relation of the stream laid over a table of the target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Mapping {
    /// The table.
    pub table: Table,
    /// The place of each of the relation's columns among the table's.
    pub places: Vec<usize>,
    /// How rows are found.
    pub locator: Locator,
}

/// The column of a relation that the target's table lacks.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct MissingColumn(pub String);

/// Whether an UPDATE changes the column that is GENERATED ALWAYS AS IDENTITY.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum IdentityChange {
    /// There is no such column, or it stays as it was.
    Same,
    /// It changes.
    Changed,
    /// The stream does not say: only the target can tell.
    Unknown,
}

impl Mapping {
    /// Matches columns by name; order and extra columns of the target do not matter.
    pub fn new(relation: &Relation, table: Table) -> Result<Mapping, MissingColumn> {
        let mut places = Vec::with_capacity(relation.columns.len());
        for column in &relation.columns {
            let found = table.column(&column.name);
            places.push(found.ok_or_else(|| MissingColumn(column.name.clone()))?.0);
        }
        let locator = locator(relation, &table);
        Ok(Mapping { table, places, locator })
    }

    /// Whether a column of the relation may be written.
    pub fn is_written(&self, column: usize) -> bool {
        self.target(column).is_some_and(|c| !c.generated)
    }

    /// The columns of the relation that may be written, in order.
    pub fn written(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.places.len()).filter(|c| self.is_written(*c))
    }

    /// Whether the stream has every column that the target's rows hold.
    pub fn is_complete(&self) -> bool {
        let mut places = self.table.columns.iter().enumerate().filter(|(_, c)| !c.generated);
        places.all(|(place, _)| self.places.contains(&place))
    }

    /// The relation's column that is GENERATED ALWAYS AS IDENTITY on the target, if any. A table
    /// has one at most.
    pub fn identity_always(&self) -> Option<usize> {
        (0..self.places.len()).find(|i| self.target(*i).is_some_and(|c| c.identity_always))
    }

    /// How a column's values travel in sets.
    pub fn carrier(&self, column: usize) -> Carrier {
        self.target(column).map_or(Carrier::None, |c| c.carrier)
    }

    /// The target's column that a column of the relation is written to.
    pub fn target(&self, column: usize) -> Option<&super::target::Column> {
        self.places.get(column).and_then(|place| self.table.columns.get(*place))
    }

    /// INSERT of every column given.
    pub fn insert(&self) -> Statement {
        let mut writer = Writer::new(self);
        let (mut names, mut values) = (Vec::new(), Vec::new());
        for column in (0..self.places.len()).filter(|c| self.is_written(*c)) {
            names.push(writer.name(column));
            values.push(writer.value(Bind::New(column)));
        }
        let table = self.table.name.quoted();
        let insert = if names.is_empty() {
            format!("insert into {table} default values")
        } else {
            format!(
                "insert into {table} ({}) overriding system value values ({})",
                names.join(", "),
                values.join(", ")
            )
        };
        let sql = if self.table.counts_inserts {
            format!("with u as ({insert} returning 1) {GUARD}")
        } else {
            insert
        };
        writer.finish(sql)
    }

    /// DELETE of one row. `is_null` tells of each old column whether it is NULL.
    pub fn delete(&self, is_null: &dyn Fn(usize) -> bool, source: Source) -> Statement {
        let mut writer = Writer::new(self);
        let filter = writer.filter(source, is_null);
        let (only, table) = (self.table.only(), self.table.name.quoted());
        writer.finish(format!(
            "with u as (delete from {only}{table} as t where {filter} returning 1) {GUARD}"
        ))
    }

    /// UPDATE of one row: `set` lists the columns that get a new value. With none, the row must
    /// only be there.
    pub fn update(
        &self,
        set: &[usize],
        is_null: &dyn Fn(usize) -> bool,
        source: Source,
    ) -> Statement {
        let mut writer = Writer::new(self);
        let assignments = writer.assignments(set);
        let filter = writer.filter(source, is_null);
        let update = self.update_where(&assignments, &filter);
        writer.finish(format!("with u as ({update}) {GUARD}"))
    }

    fn update_where(&self, assignments: &str, filter: &str) -> String {
        let (only, table) = (self.table.only(), self.table.name.quoted());
        if assignments.is_empty() {
            format!("select 1 from {only}{table} as t where {filter}")
        } else {
            format!("update {only}{table} as t set {assignments} where {filter} returning 1")
        }
    }

    /// UPDATE that may change the GENERATED ALWAYS identity column, which SET cannot: the row is
    /// deleted and inserted again, with the columns that the stream lacks (unchanged TOAST, extra
    /// columns of the target) taken from the deleted one.
    pub fn replace(
        &self,
        set: &[usize],
        identity: usize,
        change: IdentityChange,
        is_null: &dyn Fn(usize) -> bool,
        source: Source,
    ) -> Statement {
        let mut writer = Writer::new(self);
        let filter = writer.filter(source, is_null);
        let mut same = String::new();
        let mut changed = String::new();
        if change == IdentityChange::Unknown {
            let assignments = writer.assignments(set);
            let value = writer.value(Bind::New(identity));
            let name = writer.name(identity);
            let kept = format!("{filter} and t.{name} = {value}");
            same = format!("k as ({}), ", self.update_where(&assignments, &kept));
            changed = format!(" and t.{name} <> {value}");
        }
        let given = |place| {
            let column = self.places.iter().position(|p| *p == place)?;
            (set.contains(&column) || column == identity).then_some(column)
        };
        let (mut names, mut values) = (Vec::new(), Vec::new());
        for (place, column) in self.table.columns.iter().enumerate().filter(|c| !c.1.generated) {
            let name = quote_ident(&column.name);
            values.push(match given(place) {
                Some(column) => writer.value(Bind::New(column)),
                None => format!("d.{name}"),
            });
            names.push(name);
        }
        let (only, table) = (self.table.only(), self.table.name.quoted());
        let union = if same.is_empty() { "" } else { "select 1 from k union all " };
        writer.finish(format!(
            "with {same}d as (delete from {only}{table} as t where {filter}{changed} \
             returning t.*), \
             i as (insert into {table} ({}) overriding system value select {} from d returning 1), \
             u as ({union}select 1 from i) {GUARD}",
            names.join(", "),
            values.join(", ")
        ))
    }
}

/// Which row of the change identifies the target's row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// The old row was sent.
    Old,
    /// It was not: the key is unchanged, and stands in the new row.
    New,
}

impl Source {
    /// Where that row's column is bound from.
    pub fn bind(self, column: usize) -> Bind {
        match self {
            Source::Old => Bind::Old(column),
            Source::New => Bind::New(column),
        }
    }
}

fn locator(relation: &Relation, table: &Table) -> Locator {
    if relation.identity != ReplicaIdentity::Full {
        let key: Vec<usize> = relation.key_columns().collect();
        return if key.is_empty() { Locator::None } else { Locator::Key(key) };
    }
    // Under FULL every old column is known, so the target's own key will do, and uses its index.
    let place = |name: &String| relation.columns.iter().position(|c| c.name == *name);
    let key: Option<Vec<usize>> = table.key.iter().map(place).collect();
    key.filter(|k| !k.is_empty()).map_or(Locator::Whole, Locator::Key)
}

/// Collects parameters while text is put together.
struct Writer<'a> {
    mapping: &'a Mapping,
    binds: Vec<Bind>,
    /// Parameters of values, by bind, so that one used twice is sent once.
    values: Vec<(Bind, String)>,
}

impl<'a> Writer<'a> {
    fn new(mapping: &'a Mapping) -> Self {
        Writer { mapping, binds: Vec::new(), values: Vec::new() }
    }

    fn finish(self, sql: String) -> Statement {
        Statement { sql, binds: self.binds }
    }

    fn name(&self, column: usize) -> String {
        self.mapping.target(column).map_or_else(String::new, |c| quote_ident(&c.name))
    }

    /// A parameter cast to the column's declared type.
    fn value(&mut self, bind: Bind) -> String {
        if let Some((_, text)) = self.values.iter().find(|(b, _)| *b == bind) {
            return text.clone();
        }
        let (Bind::New(column) | Bind::Old(column)) = bind;
        let type_name = self.mapping.target(column).map_or("text", |c| &c.type_name);
        self.binds.push(bind);
        let text = format!("${}::{type_name}", self.binds.len());
        self.values.push((bind, text.clone()));
        text
    }

    fn assignments(&mut self, set: &[usize]) -> String {
        let assignments: Vec<String> = set
            .iter()
            .map(|column| format!("{} = {}", self.name(*column), self.value(Bind::New(*column))))
            .collect();
        assignments.join(", ")
    }

    /// The condition that one row of `t` meets.
    fn filter(&mut self, source: Source, is_null: &dyn Fn(usize) -> bool) -> String {
        match &self.mapping.locator {
            Locator::Key(columns) => {
                let parts: Vec<String> =
                    columns.iter().map(|c| self.equal("t", source.bind(*c)).0).collect();
                parts.join(" and ")
            }
            Locator::Whole => self.whole(source, is_null),
            // Refused before a statement is asked for.
            Locator::None => "false".to_string(),
        }
    }

    /// One row of those that are equal, one that also reads the same if there is one: 1.0 and 1.00
    /// are equal and differ. NULL is told apart in the text, so that `=` can use any index.
    fn whole(&mut self, source: Source, is_null: &dyn Fn(usize) -> bool) -> String {
        let (mut parts, mut reads) = (Vec::new(), Vec::new());
        for column in (0..self.mapping.places.len()).filter(|c| self.mapping.is_written(*c)) {
            if is_null(column) {
                // IS NULL is also true of a composite value that holds nothing but NULLs. This is
                // not, and PostgreSQL makes the same test of it, which can use an index.
                parts.push(format!("s.{} is not distinct from null", self.name(column)));
                continue;
            }
            let (equal, text_equal) = self.equal("s", source.bind(column));
            if equal != text_equal {
                reads.push(text_equal);
            }
            parts.push(equal);
        }
        let condition = if parts.is_empty() { "true".to_string() } else { parts.join(" and ") };
        let order = match reads.is_empty() {
            true => String::new(),
            false => format!(" order by ({}) desc", reads.join(" and ")),
        };
        let (only, table) = (self.mapping.table.only(), self.mapping.table.name.quoted());
        // A ctid names a row of one partition only.
        let (left, right) = match self.mapping.table.is_partitioned() {
            true => ("(t.tableoid, t.ctid)", "s.tableoid, s.ctid"),
            false => ("t.ctid", "s.ctid"),
        };
        format!(
            "{left} = (select {right} from {only}{table} as s where {condition}{order} limit 1)"
        )
    }

    /// Two conditions: that the column equals a new parameter, and that both read the same.
    fn equal(&mut self, alias: &str, bind: Bind) -> (String, String) {
        let (Bind::New(column) | Bind::Old(column)) = bind;
        let Some(target) = self.mapping.target(column) else {
            return ("false".to_string(), "false".to_string());
        };
        self.binds.push(bind);
        let mut name = format!("{alias}.{}", quote_ident(&target.name));
        // A polymorphic operator (of enums) does not look through a domain. The cast costs no
        // index: it is a relabelling, which the planner sees through.
        if target.type_name != target.base_type_name {
            name = format!("{name}::{}", target.base_type_name);
        }
        let value = format!("${}::{}", self.binds.len(), target.base_type_name);
        let text_equal = format!("{name}::text = {value}::text");
        match &target.equality {
            Some(operator) => (format!("{name} {operator} {value}"), text_equal),
            None => (text_equal.clone(), text_equal),
        }
    }
}

/// One TRUNCATE of all tables, as the source's statement was. RESTRICT, as the source listed every
/// table that its CASCADE reached. Only an owner may restart sequences, and needs not: those of the
/// side that is written count for nothing until a flip sets them.
pub(super) fn truncate(tables: &[&Table], restart_identity: bool) -> String {
    let list: Vec<String> =
        tables.iter().map(|t| format!("{}{}", t.only(), t.name.quoted())).collect();
    let restarts = restart_identity && tables.iter().all(|table| table.owned);
    let identity = if restarts { "restart" } else { "continue" };
    format!("truncate {} {identity} identity restrict", list.join(", "))
}

#[cfg(test)]
mod tests;
