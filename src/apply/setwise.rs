//! SQL text of the statements that write sets of rows of one table. Pure.
//!
//! Every column is one array parameter; the rows are `v`, their columns `c0`, `c1` by their place
//! in the relation. As for single rows, a count that is not the expected one is an error on the
//! server, so that the batch travels in one round trip. Rows of a COPY travel as its data.

use super::encode::Carrier;
use super::statement::{GUARD_PREFIX, Mapping};
use super::target::Column;
use crate::id::quote_ident;

/// INSERT of rows with every column that may be written, of which there must be one.
pub(super) fn insert(mapping: &Mapping) -> String {
    let columns: Vec<usize> = mapping.written().collect();
    let target = mapping.table.name.quoted();
    let names = list(&columns, |c| name(mapping, c));
    let (values, rows) = (values(mapping, &columns), rows(mapping, &columns, false));
    let insert = format!(
        "insert into {target} ({names}) overriding system value select {values} from {rows}"
    );
    match mapping.table.counts_inserts {
        true => format!("with u as ({insert} returning 1) {}", guard(columns.len(), false)),
        false => insert,
    }
}

/// COPY of rows with every column that may be written, in binary if all of them can. Their number
/// is the command tag's.
pub(super) fn copy(mapping: &Mapping) -> String {
    let columns: Vec<usize> = mapping.written().collect();
    let names = list(&columns, |c| name(mapping, c));
    let form = if mapping.natives().is_some() { " (format binary)" } else { "" };
    format!("copy {} ({names}) from stdin{form}", mapping.table.name.quoted())
}

/// DELETE of the rows with these keys, each of one row. Of many rows, without a guard of its own
/// where they are [`counted`].
pub(super) fn delete(mapping: &Mapping, keys: &[usize], counted: bool) -> String {
    let (only, table) = (mapping.table.only(), mapping.table.name.quoted());
    if let Some(found) = among(mapping, keys) {
        let delete = format!("delete from {only}{table} as t where {found}");
        return match counted {
            true => delete,
            false => format!("with u as ({delete} returning 1) {}", guard(1, false)),
        };
    }
    let several = !is_unique(mapping, keys);
    let (found, rows) = (found(mapping, keys), rows(mapping, keys, several));
    let (guard, each) = (guard(keys.len(), several), each(several));
    format!(
        "with u as (delete from {only}{table} as t using {rows} where {found} returning {each}) \
         {guard}"
    )
}

/// Whether the server's statistics tell how many rows [`delete`] met. Those of a partitioned table
/// are its partitions'.
pub(super) fn counts(mapping: &Mapping, keys: &[usize]) -> bool {
    let table = &mapping.table;
    table.counts_by_server && !table.is_partitioned() && among(mapping, keys).is_some()
}

/// What stands before and behind DELETEs that have no guard: the second gives 1 if as many rows as
/// its parameter says have gone since the first, by what the server counts of this transaction,
/// undone parts included. To give back each row and count those is a tenth of what a large
/// DELETE takes, or more.
///
/// <https://www.postgresql.org/docs/current/monitoring-stats.html> (pg_stat_xact_user_tables)
pub(super) fn counted(mapping: &Mapping) -> (String, String) {
    let table = crate::id::quote_literal(&mapping.table.name.quoted());
    let deleted =
        format!("pg_catalog.pg_stat_get_xact_tuples_deleted({table}::pg_catalog.regclass)");
    let met = format!("{deleted} - pg_catalog.current_setting('walferry.deleted')::int8");
    (
        format!("select pg_catalog.set_config('walferry.deleted', {deleted}::text, true)"),
        format!(
            "select case when {met} = $1::int8 then 1 \
             else pg_catalog.concat('{GUARD_PREFIX}', {met})::int end"
        ),
    )
}

/// UPDATE of the rows with these keys, each of one row; the parameters are the keys, then what is
/// set. With nothing to set, the rows must only be there.
pub(super) fn update(mapping: &Mapping, keys: &[usize], set: &[usize]) -> String {
    let columns = [keys, set].concat();
    let (only, table) = (mapping.table.only(), mapping.table.name.quoted());
    let several = !is_unique(mapping, keys);
    let (found, rows) = (found(mapping, keys), rows(mapping, &columns, several));
    let (guard, each) = (guard(columns.len(), several), each(several));
    let update = if set.is_empty() {
        format!("select {each} from {only}{table} as t, {rows} where {found}")
    } else {
        let assignments =
            list(set, |c| format!("{} = v.c{c}::{}", name(mapping, c), type_name(mapping, c)));
        format!(
            "update {only}{table} as t set {assignments} from {rows} where {found} returning {each}"
        )
    };
    format!("with u as ({update}) {guard}")
}

/// DELETE of rows that read the same as those given, exactly one for each, by one pass over the
/// table. A row reads as `row(...)::text` does, which tells NULL from every text; rows that are
/// equal and read otherwise (1.0 and 1.00) are not met, and the guard says so.
pub(super) fn delete_whole(mapping: &Mapping) -> String {
    let columns: Vec<usize> = mapping.written().collect();
    let (only, table) = (mapping.table.only(), mapping.table.name.quoted());
    let rows = rows(mapping, &columns, false);
    let given = values(mapping, &columns);
    let there = list(&columns, |c| format!("t.{}", name(mapping, c)));
    let guard = guard(columns.len(), false);
    // One file's rows are fetched by their places; those of partitions take a second pass.
    let places = match mapping.table.is_partitioned() {
        true => "using s where d.ctid = s.i and d.tableoid = s.o and s.k <= s.m",
        false => "where d.ctid = any (array(select s.i from s where s.k <= s.m))",
    };
    // The order by which one of equals is chosen does not matter: they are equal.
    format!(
        "with w as (select row({given})::text as r, pg_catalog.count(*) as m from {rows} \
         group by 1), \
         s as (select t.tableoid as o, t.ctid as i, w.m, pg_catalog.row_number() over \
         (partition by w.r) as k from {only}{table} as t join w on row({there})::text = w.r), \
         u as (delete from {only}{table} as d {places} returning 1) {guard}"
    )
}

/// Whether no two rows of the target can have the same key.
pub(super) fn is_unique(mapping: &Mapping, keys: &[usize]) -> bool {
    let is_key = |unique: &String| {
        keys.iter().any(|c| mapping.target(*c).is_some_and(|column| column.name == *unique))
    };
    !mapping.table.key.is_empty() && mapping.table.key.iter().all(is_key)
}

/// Gives 1 if as many rows were met as the parameter after `columns` says, and each of `v` one
/// where several may have the same key.
fn guard(columns: usize, several: bool) -> String {
    let expected = format!("${}::int8", columns + 1);
    let each = match several {
        true => format!(" and pg_catalog.count(distinct u.n) = {expected}"),
        false => String::new(),
    };
    format!(
        "select case when pg_catalog.count(*) = {expected}{each} then 1 \
         else pg_catalog.concat('{GUARD_PREFIX}', pg_catalog.count(*))::int end from u"
    )
}

/// What is returned of each row that was met, where `v` has numbers or not.
fn each(several: bool) -> &'static str {
    if several { "v.n" } else { "1" }
}

/// The parameters as rows, one a column. Taken apart side by side in a list of columns, they are
/// kept nowhere; where each row needs its number, `n`, a function scan writes down each of them
/// first, which is a twentieth of the time of an UPDATE.
fn rows(mapping: &Mapping, columns: &[usize], numbered: bool) -> String {
    let array = |(place, column): (usize, &usize)| {
        let base = mapping.target(*column).map_or("text", |c| &c.base_type_name);
        match mapping.carrier(*column) {
            Carrier::Text => format!("${}::text[]", place + 1),
            Carrier::Literal | Carrier::Native(_) | Carrier::None => {
                format!("${}::{base}[]", place + 1)
            }
        }
    };
    let arrays = columns.iter().enumerate().map(array);
    if numbered || !mapping.table.unnests_in_select {
        let names = list(columns, |c| format!("c{c}"));
        let arrays = arrays.collect::<Vec<_>>().join(", ");
        return format!("unnest({arrays}) with ordinality as v({names}, n)");
    }
    let taken = arrays.zip(columns).map(|(array, c)| format!("unnest({array}) as c{c}"));
    format!("(select {}) as v", taken.collect::<Vec<_>>().join(", "))
}

/// That the one key column is among the values of the first parameter: one walk through its index,
/// half the work of a join. Several columns have no such condition, and of a column that is not
/// unique each value must meet one row, which a count does not say.
fn among(mapping: &Mapping, keys: &[usize]) -> Option<String> {
    let &[key] = keys else { return None };
    let target = mapping.target(key)?;
    let operator = target.equality.as_ref()?;
    if !mapping.table.deletes_by_array || !is_unique(mapping, keys) {
        return None;
    }
    let base = &target.base_type_name;
    let array = match mapping.carrier(key) {
        Carrier::Text => format!("$1::text[]::{base}[]"),
        Carrier::Literal | Carrier::Native(_) | Carrier::None => format!("$1::{base}[]"),
    };
    Some(format!("{} {operator} any ({array})", key_name(target)))
}

/// A key column of `t`. As for single rows: a polymorphic operator does not look through a domain.
fn key_name(target: &Column) -> String {
    let name = format!("t.{}", quote_ident(&target.name));
    let base = &target.base_type_name;
    if target.type_name == *base { name } else { format!("{name}::{base}") }
}

fn values(mapping: &Mapping, columns: &[usize]) -> String {
    list(columns, |c| format!("v.c{c}::{}", type_name(mapping, c)))
}

fn found(mapping: &Mapping, keys: &[usize]) -> String {
    let parts: Vec<String> = keys
        .iter()
        .filter_map(|c| {
            let target = mapping.target(*c)?;
            let (base, name) = (&target.base_type_name, key_name(target));
            Some(match &target.equality {
                Some(operator) => format!("{name} {operator} v.c{c}::{base}"),
                None => format!("{name}::text = v.c{c}::{base}::text"),
            })
        })
        .collect();
    parts.join(" and ")
}

fn list(columns: &[usize], text: impl Fn(usize) -> String) -> String {
    columns.iter().map(|c| text(*c)).collect::<Vec<_>>().join(", ")
}

fn name(mapping: &Mapping, column: usize) -> String {
    mapping.target(column).map_or_else(String::new, |c| quote_ident(&c.name))
}

fn type_name(mapping: &Mapping, column: usize) -> &str {
    mapping.target(column).map_or("text", |c| &c.type_name)
}
