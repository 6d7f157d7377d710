//! What one description of a table becomes, and what has to be computed for its rows.

use std::sync::Arc;

use super::{Error, Result};
use crate::change::{Relation, ReplicaIdentity, Value};
use crate::id::quote_ident;
use crate::map::{ROW, Slice, TableMap, Typed};
use crate::pg::Session;

/// Which columns of a row there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Kind {
    /// All of them.
    Whole,
    /// Those of the replica identity.
    Key,
}

/// A value that is computed.
#[derive(Debug)]
pub(super) struct Output {
    expression: String,
    /// Places among the source's columns.
    pub depends: Vec<usize>,
}

/// What is asked of the source for rows of one kind.
#[derive(Debug, Default)]
pub(super) struct Query {
    /// `$1` are numbers from 0, the others texts of the inputs, all arrays of one length. Each
    /// row of the answer has the filter, if it is computed, then the outputs.
    pub sql: String,
    /// The source's columns that are its inputs, by place.
    pub inputs: Vec<usize>,
    /// For each output of the outline, its place in the answer.
    places: Vec<Option<usize>>,
}

/// A description of the source's table laid beside that of the target's.
#[derive(Debug)]
pub(super) struct Outline {
    pub from: Arc<Relation>,
    pub to: Arc<Relation>,
    /// Where changes are counted that are left out.
    pub left_out: Arc<Relation>,
    /// For each column of `to`, its place in `from`, and its output if it is masked.
    pub kept: Vec<(usize, Option<usize>)>,
    pub outputs: Vec<Output>,
    pub filter: Option<Output>,
    /// What chooses rows and need not be asked for: the column's place, and which of its values.
    slice: Option<(usize, Slice)>,
    /// Rows of other sources are in the target's table.
    pub shared: bool,
    whole: Query,
    key: Query,
}

/// A column's type as the source writes it, and its collation where that is not the type's own.
pub(super) struct Type {
    pub name: String,
    pub collation: String,
}

impl Outline {
    /// Asks the source for the types of the table's columns, one round trip, where something has to
    /// be computed.
    ///
    /// # Errors
    /// Where the table is not one that the section can be about any more.
    pub async fn draw(
        session: &mut Session,
        from: &Arc<Relation>,
        table: TableMap,
    ) -> Result<Outline> {
        // Hashes are of bytes in the server's own encoding.
        let own = table.unsliced();
        let own = own.filter(|_| session.parameter("server_encoding") == Some("UTF8"));
        let (table, slice) = match own {
            Some((table, slice)) => (table, Some(slice)),
            None => (table, None),
        };
        let types = match table.computes() {
            true => types(session, from).await?,
            false => Vec::new(),
        };
        let outline = Outline::of(from, &table, &types)?;
        match slice {
            Some(slice) => outline.sliced(slice),
            None => Ok(outline),
        }
    }

    /// The same of the rows of one slice alone, which is told here.
    pub fn sliced(mut self, slice: Slice) -> Result<Outline> {
        let place = self.from.columns.iter().position(|column| column.name == slice.column);
        let Some(place) = place else {
            return Err(Error::Gone { table: self.from.name.clone(), column: slice.column });
        };
        self.slice = Some((place, slice));
        Ok(self)
    }

    /// The same of known types, which nobody looks at where nothing is computed.
    pub fn of(from: &Arc<Relation>, table: &TableMap, types: &[Type]) -> Result<Outline> {
        let named = |name: &str| from.columns.iter().any(|column| column.name == name);
        if let Some(column) = table.named_columns().find(|column| !named(column)) {
            let (table, column) = (from.name.clone(), column.clone());
            return Err(Error::Gone { table, column });
        }
        let mut outline = Outline::plain(from, table);
        if table.computes() {
            outline.compute(table, types)?;
            outline.whole = outline.query(Kind::Whole, types);
            outline.key = outline.query(Kind::Key, types);
        }
        Ok(outline)
    }

    /// Names and places alone.
    fn plain(from: &Arc<Relation>, table: &TableMap) -> Outline {
        let mut to = Relation { name: table.target.clone(), ..Relation::clone(from) };
        let mut kept = Vec::new();
        to.columns.clear();
        for (place, column) in from.columns.iter().enumerate() {
            if table.keeps(&column.name) {
                let mut column = column.clone();
                column.name = table.written(&column.name).to_string();
                to.columns.push(column);
                kept.push((place, None));
            }
        }
        let left_out = Relation { name: table.left_out(), columns: Vec::new(), ..to.clone() };
        Outline {
            from: from.clone(),
            to: Arc::new(to),
            left_out: Arc::new(left_out),
            kept,
            outputs: Vec::new(),
            filter: None,
            slice: None,
            shared: table.shared,
            whole: Query::default(),
            key: Query::default(),
        }
    }

    fn compute(&mut self, table: &TableMap, types: &[Type]) -> Result<()> {
        let names: Vec<&str> = self.from.columns.iter().map(|c| c.name.as_str()).collect();
        let places = |depends: Vec<&str>| -> Vec<usize> {
            depends.iter().filter_map(|name| names.iter().position(|n| n == name)).collect()
        };
        for (place, output) in &mut self.kept {
            let (Some(column), Some(of)) = (self.from.columns.get(*place), types.get(*place))
            else {
                return Err(Error::Broken(format!("no type of column {place}")));
            };
            if table.mask(&column.name).is_none() {
                continue;
            }
            let typed =
                Typed { name: &column.name, type_name: &of.name, type_oid: column.type_oid };
            let expression = table
                .expression(&typed)
                .map_err(|why| Error::Mask { table: self.from.name.clone(), why })?;
            let depends = places(table.depends(&column.name, &names));
            *output = Some(self.outputs.len());
            self.outputs.push(Output { expression, depends });
        }
        self.filter = table
            .condition()
            .map(|expression| Output { expression, depends: places(table.filter_depends(&names)) });
        Ok(())
    }

    fn is_key(&self, place: usize) -> bool {
        self.from.columns.get(place).is_some_and(|column| column.key)
    }

    /// True if not all rows go along.
    pub fn chooses(&self) -> bool {
        self.filter.is_some() || self.slice.is_some()
    }

    /// Places of the columns by which rows are chosen.
    pub fn chooses_by(&self) -> Vec<usize> {
        let filter = self.filter.iter().flat_map(|filter| filter.depends.iter().copied());
        filter.chain(self.slice.iter().map(|(place, _)| *place)).collect()
    }

    /// True if the row before an UPDATE or DELETE is enough to tell whether it was in.
    pub fn sees_old(&self) -> bool {
        self.from.identity == ReplicaIdentity::Full
            || self.chooses_by().into_iter().all(|place| self.is_key(place))
    }

    /// True if the row is in the slice; without one every row is.
    pub fn has(&self, row: &[Value<'_>]) -> Result<bool> {
        let Some((place, slice)) = &self.slice else { return Ok(true) };
        let table = &self.from.name;
        let value = match row.get(*place) {
            Some(Value::Null) => None,
            Some(Value::Text(text)) => Some(*text),
            _ => {
                let column = &slice.column;
                return Err(Error::Broken(format!("no text of {column} in a row of {table}")));
            }
        };
        slice.has(value).map_err(|why| Error::Broken(format!("table {table}: {why}")))
    }

    /// What is asked for rows of this kind.
    pub fn asks(&self, kind: Kind) -> &Query {
        match kind {
            Kind::Whole => &self.whole,
            Kind::Key => &self.key,
        }
    }

    fn query(&self, kind: Kind, types: &[Type]) -> Query {
        let mut query = Query { places: vec![None; self.outputs.len()], ..Query::default() };
        let has = |output: &Output| {
            kind == Kind::Whole || output.depends.iter().all(|place| self.is_key(*place))
        };
        let filter = self.filter.as_ref().filter(|filter| has(filter));
        let mut wanted: Vec<String> = filter.iter().map(|f| f.expression.clone()).collect();
        let mut inputs: Vec<usize> = filter.iter().flat_map(|f| f.depends.clone()).collect();
        for (place, output) in &self.kept {
            let Some((at, output)) = output.and_then(|at| Some((at, self.outputs.get(at)?))) else {
                continue;
            };
            if kind == Kind::Key && !self.is_key(*place) {
                continue;
            }
            if let Some(slot) = query.places.get_mut(at) {
                *slot = Some(wanted.len());
            }
            // As the copy does: no mask is computed of a row that does not go along.
            wanted.push(match filter {
                Some(filter) => {
                    format!("case when {} then {} end", filter.expression, output.expression)
                }
                None => output.expression.clone(),
            });
            inputs.extend(&output.depends);
        }
        inputs.sort_unstable();
        inputs.dedup();
        if wanted.is_empty() {
            return query;
        }
        let (mut columns, mut arrays, mut names) = (String::new(), String::new(), String::new());
        for (number, place) in inputs.iter().enumerate() {
            let (Some(column), Some(of)) = (self.from.columns.get(*place), types.get(*place))
            else {
                continue;
            };
            let name = quote_ident(&column.name);
            columns.push_str(&format!(", v.c{number}::{}{} as {name}", of.name, of.collation));
            arrays.push_str(&format!(", ${}::text[]", number + 2));
            names.push_str(&format!(", c{number}"));
        }
        let mut number = "walferry n".to_string();
        while self.from.columns.iter().any(|column| column.name == number) {
            number.push('_');
        }
        let number = quote_ident(&number);
        query.sql = format!(
            "select {} from (select v.n as {number}{columns} \
             from unnest($1::int4[]{arrays}) as v(n{names})) as {ROW} \
             order by {ROW}.{number}",
            wanted.join(", ")
        );
        query.inputs = inputs;
        query
    }
}

impl Query {
    /// True if nothing is to be computed.
    pub fn is_empty(&self) -> bool {
        self.sql.is_empty()
    }

    /// Where an output is in the answer.
    pub fn place(&self, output: usize) -> Option<usize> {
        self.places.get(output).copied().flatten()
    }
}

/// Types of all columns: as the catalog has them, which knows modifiers that a textual decoder does
/// not, unless the table was altered since the change.
async fn types(session: &mut Session, relation: &Relation) -> Result<Vec<Type>> {
    let sql = "select pg_catalog.format_type(t.oid, \
             case when a.atttypid = t.oid then a.atttypmod else t.modifier end), \
         coalesce(' collate ' || pg_catalog.quote_ident(cn.nspname) || '.' \
             || pg_catalog.quote_ident(co.collname), '') \
         from unnest($1::oid[], $2::int4[], $3::text[]) \
             with ordinality as t(oid, modifier, name, n) \
         left join pg_catalog.pg_attribute a on a.attrelid = $4::oid \
             and a.attname = t.name::name and not a.attisdropped \
         left join pg_catalog.pg_type ty on ty.oid = a.atttypid and a.atttypid = t.oid \
         left join pg_catalog.pg_collation co on co.oid = a.attcollation \
             and a.attcollation <> ty.typcollation \
         left join pg_catalog.pg_namespace cn on cn.oid = co.collnamespace order by t.n";
    let list = |texts: Vec<String>| format!("{{{}}}", texts.join(","));
    let columns = || relation.columns.iter();
    let oids = list(columns().map(|c| c.type_oid.to_string()).collect());
    let modifiers = list(columns().map(|c| c.type_modifier.to_string()).collect());
    let names = list(columns().map(|c| super::images::element(c.name.as_bytes())).collect());
    let oid = relation.oid.to_string();
    let params = [oids.as_str(), &modifiers, &names, &oid].map(Some);
    let rows = session.query_params(sql, &params).await?;
    rows.iter().map(|row| Ok(Type { name: row.string(0)?, collation: row.string(1)? })).collect()
}
