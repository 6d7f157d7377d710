//! `--ddl`: what is done on the target where a table of the source was altered.
//!
//! The applier finds that a description is another; `schema::altered` tells from it and from the
//! catalogs what was done; here both servers are asked, the policy is looked up, and what the
//! target has already is left out, so that whoever altered both sides is not in his own way.

use std::collections::HashMap;
use std::sync::Arc;

use super::Result;
use super::run::JobConfig;
use crate::apply::altered::{Alter, Answer, Verdict, Why};
use crate::change::{Captured, KnownColumn, Relation};
use crate::id::{QualifiedName, quote_ident};
use crate::map::Map;
use crate::pg::{self, Config, Session};
use crate::schema::altered::{self, Alteration, CatalogColumn, Target, Unclear};
use crate::schema::captured;
use crate::schema::policy::{Action, Class, Policy};

/// The source, and what is wanted. The target is asked by the session that writes.
#[derive(Clone, Debug)]
pub(super) struct Altering {
    source: Config,
    captures: Option<QualifiedName>,
    policy: Policy,
    map: Option<Arc<Map>>,
}

/// A table of the target.
struct There {
    /// The top of its tree of partitions; itself, if it is in none.
    top: QualifiedName,
    /// It inherits from a table that is not partitioned: a statement may be for the other.
    heir: bool,
    /// Names and types.
    columns: Vec<(String, String)>,
}

/// Something that was done on the source, and what does it on the target.
pub(super) struct Done {
    class: Class,
    what: String,
    pub(super) sql: std::result::Result<Vec<String>, Unclear>,
}

impl Altering {
    /// For the forward stream of a job; `None` where nothing is wanted.
    pub async fn open(config: &JobConfig) -> Result<Option<Altering>> {
        let Some(policy) = config.ddl else { return Ok(None) };
        let mut captures = None;
        if policy.captures() {
            let mut source = Session::control(&config.source).await?;
            let installed = captured::is_installed(&mut source, &config.job).await?;
            captures = installed.then(|| config.job.captured());
        }
        let map = config.map.clone();
        Ok(Some(Altering { source: config.source.clone(), captures, policy, map }))
    }

    async fn judge(
        &self,
        target: &mut Session,
        known: Option<&[KnownColumn]>,
        relation: &Relation,
    ) -> pg::Result<(Verdict, Vec<KnownColumn>)> {
        let mut source = Session::control(&self.source).await?;
        if self.map.as_ref().is_some_and(|map| map.may_fill(&relation.name)) {
            let verdict = self.judge_mapped(&mut source, target, relation).await?;
            return Ok((verdict, remembered(relation, &[], &[])));
        }
        let catalog = columns_of(&mut source, relation.oid).await?;
        let Some(there) = There::read(target, &relation.name).await? else {
            let done = vec![missing(&mut source, target, relation.oid, &relation.name).await?];
            let columns = remembered(relation, &[], &catalog);
            return Ok((self.verdict(done), columns));
        };
        let Some(known) = known else {
            return Ok((Verdict::Fits, remembered(relation, &[], &catalog)));
        };
        let columns = remembered(relation, known, &catalog);
        let told = altered::numbers(known, relation, &catalog).and_then(|numbers| {
            altered::alterations(known, relation, &numbers, &catalog).map(|list| (numbers, list))
        });
        let (numbers, alterations) = match told {
            Ok(told) => told,
            // What was captured was run here already; what is missing all the same is named.
            Err(_) if self.captures.is_some() => return Ok((Verdict::Fits, columns)),
            Err(unclear) => return Ok((self.unclear(&unclear), columns)),
        };
        let mut done = Vec::new();
        for alteration in &alterations {
            let place = place_of(alteration);
            let column = place.and_then(|place| relation.columns.get(place));
            let type_name = match column {
                Some(c) => type_name(&mut source, c.type_oid, c.type_modifier).await?,
                None => String::new(),
            };
            if there.has(alteration, relation, &type_name) {
                continue;
            }
            let number = place.and_then(|place| numbers.get(place));
            let now = catalog.iter().find(|c| Some(&c.attnum) == number);
            let on = Target { table: &there.top, type_name: &type_name };
            let sql = match there.heir {
                true => Err(Unclear("it inherits from another table".to_string())),
                false => altered::statements(alteration, relation, on, now),
            };
            done.push(Done { class: alteration.class(), what: told_of(alteration, relation), sql });
        }
        Ok((self.verdict(done), columns))
    }

    /// A table that the map fills: what it lacks waits or stops, as what is to be seen of a new
    /// column on the target is for a person to say.
    async fn judge_mapped(
        &self,
        source: &mut Session,
        target: &mut Session,
        relation: &Relation,
    ) -> pg::Result<Verdict> {
        let there = There::read(target, &relation.name).await?;
        let columns = there.map(|there| there.columns).unwrap_or_default();
        let (mut names, mut sql) = (Vec::new(), Vec::new());
        for column in &relation.columns {
            if columns.iter().any(|(name, _)| *name == column.name) {
                continue;
            }
            let type_name = type_name(source, column.type_oid, column.type_modifier).await?;
            let (table, name) = (relation.name.quoted(), quote_ident(&column.name));
            names.push(column.name.clone());
            sql.push(format!("ALTER TABLE {table} ADD COLUMN {name} {type_name}"));
        }
        if names.is_empty() {
            return Ok(Verdict::Fits);
        }
        let altered = format!(
            "the job's map has it, and the target's table lacks {}: whether its values may be \
             there is yours to say",
            names.join(", ")
        );
        let why = Why { altered, sql: sql.join("; ") };
        Ok(match self.policy.of(Class::AddColumn) {
            Action::Stop => Verdict::Stop(why),
            Action::Apply | Action::Hold => Verdict::Hold(why),
        })
    }

    /// The strictest of what is wanted; what is not certain is never applied.
    fn verdict(&self, done: Vec<Done>) -> Verdict {
        let action = |done: &Done| match (self.policy.of(done.class), &done.sql) {
            (Action::Apply, Err(_)) => Action::Hold,
            (action, _) => action,
        };
        let Some(action) = done.iter().map(action).max() else { return Verdict::Fits };
        let words = done.iter().map(|done| match &done.sql {
            Ok(_) => done.what.clone(),
            Err(why) => format!("{}, but {why}", done.what),
        });
        let altered = words.collect::<Vec<_>>().join("; ");
        let statements: Vec<String> = done.into_iter().flat_map(|d| d.sql.ok()).flatten().collect();
        let why = Why { altered, sql: statements.join("; ") };
        match action {
            Action::Apply => Verdict::Apply(statements),
            Action::Hold => Verdict::Hold(why),
            Action::Stop => Verdict::Stop(why),
        }
    }

    /// Nothing is guessed: it is as strict as columns may be, and waits at least.
    fn unclear(&self, unclear: &Unclear) -> Verdict {
        let classes = [Class::AddColumn, Class::DropColumn, Class::RenameColumn, Class::ColumnType];
        let strictest = classes.iter().map(|class| self.policy.of(*class)).max();
        let altered = format!("what became of its columns cannot be told: {unclear}");
        let why = Why { altered, sql: String::new() };
        match strictest {
            Some(Action::Stop) => Verdict::Stop(why),
            _ => Verdict::Hold(why),
        }
    }

    async fn enums(&self, target: &mut Session, relation: &Relation) -> pg::Result<Verdict> {
        let mut source = Session::control(&self.source).await?;
        let mut statements = Vec::new();
        for (name, labels) in enums_of(&mut source, relation.oid).await? {
            let there = labels_of(target, &name).await?;
            statements.extend(altered::labels(&name, &labels, &there));
        }
        if statements.is_empty() {
            return Ok(Verdict::Fits);
        }
        let (class, what) = (Class::EnumLabel, "an enum has new labels".to_string());
        Ok(self.verdict(vec![Done { class, what, sql: Ok(statements) }]))
    }
}

impl Alter for Altering {
    fn captures(&self) -> Option<&QualifiedName> {
        self.captures.as_ref()
    }

    fn captured(&self, ddl: &Captured) -> std::result::Result<Option<(String, bool)>, Why> {
        if self.policy.skips(ddl.id) {
            return Ok(None);
        }
        if captured::fills(&ddl.tag) {
            let altered = "rows that it made are not in the stream".to_string();
            return Err(Why { altered, sql: String::new() });
        }
        let sql = captured::statement(ddl)
            .map_err(|unclear| Why { altered: unclear.to_string(), sql: String::new() })?;
        let before = captured::adds_label(&sql);
        Ok(Some((sql, before)))
    }

    fn altered<'a>(
        &'a self,
        target: &'a mut Session,
        known: Option<&'a [KnownColumn]>,
        relation: &'a Relation,
    ) -> Answer<'a> {
        Box::pin(async move { Ok(self.judge(target, known, relation).await?) })
    }

    fn relabelled<'a>(&'a self, target: &'a mut Session, relation: &'a Relation) -> Answer<'a> {
        Box::pin(async move { Ok((self.enums(target, relation).await?, Vec::new())) })
    }
}

fn place_of(alteration: &Alteration) -> Option<usize> {
    match alteration {
        Alteration::Drop(_) => None,
        Alteration::Add(place) | Alteration::Rename(_, place) | Alteration::Retype(place, _) => {
            Some(*place)
        }
    }
}

fn told_of(alteration: &Alteration, relation: &Relation) -> String {
    let name = |place: &usize| relation.columns.get(*place).map_or("", |c| c.name.as_str());
    match alteration {
        Alteration::Add(place) => format!("column {} was added", name(place)),
        Alteration::Drop(column) => format!("column {column} was dropped"),
        Alteration::Rename(before, place) => format!("column {before} is {} now", name(place)),
        Alteration::Retype(place, _) => format!("column {} has another type", name(place)),
    }
}

/// What a description is remembered by: numbers as they were, or as the catalog has them.
fn remembered(
    relation: &Relation,
    known: &[KnownColumn],
    catalog: &[CatalogColumn],
) -> Vec<KnownColumn> {
    let numbers = altered::numbers(known, relation, catalog).unwrap_or_default();
    let column = |(place, column): (usize, &crate::change::Column)| KnownColumn {
        attnum: numbers.get(place).copied().unwrap_or(0),
        name: column.name.clone(),
        type_oid: column.type_oid,
        type_modifier: column.type_modifier,
    };
    relation.columns.iter().enumerate().map(column).collect()
}

impl There {
    async fn read(target: &mut Session, name: &QualifiedName) -> pg::Result<Option<There>> {
        let sql = "with recursive up(oid, level) as ( \
               select c.oid, 0 from pg_catalog.pg_class c \
                 join pg_catalog.pg_namespace n on n.oid = c.relnamespace \
                 where n.nspname = $1 and c.relname = $2 and c.relkind in ('r', 'p') \
               union all select i.inhparent, up.level + 1 from up \
                 join pg_catalog.pg_class c on c.oid = up.oid and c.relispartition \
                 join pg_catalog.pg_inherits i on i.inhrelid = up.oid) \
             select n.nspname, c.relname, (select oid from up where level = 0), \
               exists (select from pg_catalog.pg_inherits i where i.inhrelid = c.oid) \
             from up join pg_catalog.pg_class c on c.oid = up.oid \
             join pg_catalog.pg_namespace n on n.oid = c.relnamespace \
             order by up.level desc limit 1";
        let Some(row) = target.query_opt(sql, &[Some(&name.schema), Some(&name.name)]).await?
        else {
            return Ok(None);
        };
        let columns = "select attname, pg_catalog.format_type(atttypid, atttypmod) \
             from pg_catalog.pg_attribute where attrelid = $1::oid and attnum > 0 \
             and not attisdropped";
        let rows = target.query_params(columns, &[Some(row.str(2)?)]).await?;
        let columns = rows.iter().map(|row| Ok((row.string(0)?, row.string(1)?)));
        Ok(Some(There {
            top: QualifiedName::new(row.str(0)?, row.str(1)?),
            heir: row.bool(3)?,
            columns: columns.collect::<pg::Result<_>>()?,
        }))
    }

    /// True if it was done here already.
    fn has(&self, alteration: &Alteration, relation: &Relation, type_name: &str) -> bool {
        let has = |name: &str| self.columns.iter().any(|(column, _)| column == name);
        let named = |place: &usize| relation.columns.get(*place).map_or("", |c| c.name.as_str());
        let typed = |place: &usize| {
            let is = |(column, its): &(String, String)| column == named(place) && its == type_name;
            self.columns.iter().any(is)
        };
        match alteration {
            Alteration::Drop(name) => !has(name),
            Alteration::Rename(before, place) => has(named(place)) && !has(before),
            Alteration::Add(place) | Alteration::Retype(place, _) => typed(place),
        }
    }
}

/// A table that the target lacks: a partition is made as the source has it.
pub(super) async fn missing(
    source: &mut Session,
    target: &mut Session,
    oid: u32,
    table: &QualifiedName,
) -> pg::Result<Done> {
    let sql = "select n.nspname, p.relname, \
           pg_catalog.pg_get_expr(c.relpartbound, c.oid), \
           case when c.relkind = 'p' then pg_catalog.pg_get_partkeydef(c.oid) end \
         from pg_catalog.pg_class c join pg_catalog.pg_inherits i on i.inhrelid = c.oid \
         join pg_catalog.pg_class p on p.oid = i.inhparent \
         join pg_catalog.pg_namespace n on n.oid = p.relnamespace \
         where c.oid = $1::oid and c.relispartition";
    let class = Class::NewTable;
    let Some(row) = source.query_opt(sql, &[Some(&oid.to_string())]).await? else {
        let what = format!("table {table} is not on the target");
        let sql = Err(Unclear("how it was made is not in the stream".to_string()));
        return Ok(Done { class, what, sql });
    };
    let parent = QualifiedName::new(row.str(0)?, row.str(1)?);
    let what = format!("{table} is a new partition of {parent}");
    let class = Class::NewPartition;
    if There::read(target, &parent).await?.is_none() {
        let sql = Err(Unclear(format!("{parent} is not on the target")));
        return Ok(Done { class, what, sql });
    }
    let by = row.opt(3)?.map_or(String::new(), |key| format!(" partition by {key}"));
    let (table, parent, bound) = (table.quoted(), parent.quoted(), row.str(2)?);
    let sql = Ok(vec![format!("create table {table} partition of {parent} {bound}{by}")]);
    Ok(Done { class, what, sql })
}

async fn type_name(source: &mut Session, oid: u32, modifier: i32) -> pg::Result<String> {
    let sql = "select pg_catalog.format_type($1::oid, $2::int4)";
    let (oid, modifier) = (oid.to_string(), modifier.to_string());
    source.query_one(sql, &[Some(&oid), Some(&modifier)]).await?.string(0)
}

async fn columns_of(source: &mut Session, oid: u32) -> pg::Result<Vec<CatalogColumn>> {
    let fill = match source.major_version() {
        0..11 => "null",
        _ => "case when a.atthasmissing then (a.attmissingval::text::text[])[1] end",
    };
    let sql = format!(
        "select a.attnum, a.attname, a.attisdropped, a.attnotnull, a.attidentity <> '' \
             or coalesce(pg_catalog.to_jsonb(a) ->> 'attgenerated', '') <> '', \
           pg_catalog.pg_get_expr(d.adbin, d.adrelid), {fill} \
         from pg_catalog.pg_attribute a left join pg_catalog.pg_attrdef d \
         on d.adrelid = a.attrelid and d.adnum = a.attnum \
         where a.attrelid = $1::oid and a.attnum > 0 order by a.attnum"
    );
    let rows = source.query_params(&sql, &[Some(&oid.to_string())]).await?;
    rows.iter()
        .map(|row| {
            Ok(CatalogColumn {
                attnum: row.parse(0)?,
                name: row.string(1)?,
                dropped: row.bool(2)?,
                not_null: row.bool(3)?,
                made: row.bool(4)?,
                default: row.opt(5)?.map(str::to_string),
                fill: row.opt(6)?.map(str::to_string),
            })
        })
        .collect()
}

/// Enums of a table's columns, arrays of them included, each with its labels in order.
async fn enums_of(source: &mut Session, oid: u32) -> pg::Result<Vec<(QualifiedName, Vec<String>)>> {
    let sql = "select n.nspname, e.typname, pg_catalog.json_agg(l.enumlabel order by \
           l.enumsortorder) from pg_catalog.pg_type e \
         join pg_catalog.pg_namespace n on n.oid = e.typnamespace \
         join pg_catalog.pg_enum l on l.enumtypid = e.oid \
         where e.oid in (with recursive used(oid) as ( \
             select atttypid from pg_catalog.pg_attribute \
               where attrelid = $1::oid and attnum > 0 and not attisdropped \
             union select x.oid from used join pg_catalog.pg_type t on t.oid = used.oid \
               cross join lateral (values (t.typelem), (t.typbasetype)) x(oid) \
               where x.oid <> 0) select oid from used) \
         group by 1, 2 order by 1, 2";
    let rows = source.query_params(sql, &[Some(&oid.to_string())]).await?;
    rows.iter()
        .map(|row| Ok((QualifiedName::new(row.str(0)?, row.str(1)?), json_texts(row.str(2)?)?)))
        .collect()
}

async fn labels_of(target: &mut Session, name: &QualifiedName) -> pg::Result<Vec<String>> {
    let sql = "select coalesce(pg_catalog.json_agg(l.enumlabel), '[]') from pg_catalog.pg_enum l \
         join pg_catalog.pg_type e on e.oid = l.enumtypid \
         join pg_catalog.pg_namespace n on n.oid = e.typnamespace \
         where n.nspname = $1 and e.typname = $2";
    let row = target.query_one(sql, &[Some(&name.schema), Some(&name.name)]).await?;
    json_texts(row.str(0)?)
}

fn json_texts(json: &str) -> pg::Result<Vec<String>> {
    serde_json::from_str(json).map_err(|e| pg::Error::Result(format!("enum labels: {e}")))
}

/// The source's tables as they are now, by which the first description of each in the stream is
/// judged. To be read before the slot is made: what is altered later is seen in the stream.
pub(super) async fn describe_all(
    source: &mut Session,
) -> Result<HashMap<QualifiedName, Vec<KnownColumn>>> {
    let generated = if source.major_version() < 12 { "" } else { "and a.attgenerated = ''" };
    let sql = format!(
        "select n.nspname, c.relname, a.attnum, a.attname, a.atttypid, a.atttypmod \
         from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace \
         join pg_catalog.pg_attribute a on a.attrelid = c.oid \
         where c.relkind in ('r', 'p') and c.relpersistence = 'p' and n.nspname not in \
           ('pg_catalog', 'information_schema', 'walferry') \
         and a.attnum > 0 and not a.attisdropped {generated} order by c.oid, a.attnum"
    );
    let mut tables = HashMap::<QualifiedName, Vec<KnownColumn>>::new();
    for row in source.query(&sql).await? {
        let table = QualifiedName::new(row.str(0)?, row.str(1)?);
        tables.entry(table).or_default().push(KnownColumn {
            attnum: row.parse(2)?,
            name: row.string(3)?,
            type_oid: row.parse(4)?,
            type_modifier: row.parse(5)?,
        });
    }
    Ok(tables)
}
