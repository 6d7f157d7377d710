//! Foreign keys, triggers and rules that must not act on applied rows, where the role may not set
//! `session_replication_role`.
//!
//! With that setting the server itself leaves them alone. Without it they would act twice: the
//! stream carries what a trigger or a cascade did on the other side (PeerDB#4219). Nor would plain
//! foreign keys hold still: a statement of many rows is checked at its end over there, and row by
//! row here. So on a side that is being written they are *set aside*: triggers and rules disabled
//! by their owner, foreign keys dropped (only a superuser may disable theirs), and *restored*
//! before applications write there.
//!
//! What was set aside is written to `walferry.set_aside` of the very database, in the same
//! transaction, so whatever is killed, the catalog and the note agree. A foreign key comes back NOT
//! VALID, which takes no look at the rows and so no time while writers are held, and [`validate`]
//! looks at them afterwards, with writers at work. The name, the definition, the comment and the
//! mark of validity are as they were; the oid is not.
//!
//! Of tables that move alone, the foreign keys to tables that stay (a shard's to a reference table,
//! which its cluster writes on every node at once) must not act on the side that is written either,
//! whatever the role: a row that is deleted there may still have referrers here that the stream is
//! about to delete, and the application would get the error. They are made in the fence like the
//! others, and then what they do at the other table is disabled by its superuser.
//!
//! Left alone: triggers that are disabled, or enabled ALWAYS or REPLICA (their owner has said what
//! he wants of applied rows), foreign keys whose triggers a superuser has disabled.

use super::plan::{self, PostPhase};
use super::pre::{known_settings, record, set_local, texts, transaction};
use super::{Dump, Error, Result};
use crate::catalog::Selection;
use crate::id::{QualifiedName, quote_ident, quote_literal};
use crate::pg::{Pipeline, Reply, Session};

/// What must not act on a side while a stream writes to it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Acting {
    /// Nothing is in the way: the role can keep it from acting.
    #[default]
    Nothing,
    /// Foreign keys to tables that stay.
    Borders,
    /// All foreign keys, triggers, and rules: the role cannot.
    Everything,
}

impl Acting {
    /// True if this statement of post-data makes some of it.
    pub(super) fn covers(self, sql: &str, selection: &Selection) -> bool {
        match self {
            Acting::Nothing => false,
            Acting::Borders => plan::crosses(sql, |table| selection.has_schema(table)),
            Acting::Everything => plan::acts(sql),
        }
    }
}

/// The table of what is set aside; schema `walferry` has to exist. May be run again.
pub const ASIDE_DDL: &str = "create table if not exists walferry.set_aside (\
     job text not null, kind text not null, relation text not null, name text not null, \
     definition text not null, note text, later boolean not null, aside boolean not null, \
     primary key (job, kind, relation, name))";

/// The tables; followed by one or more of the queries below.
const TABLES: &str = "with t as (select c.oid, c.relkind from pg_catalog.pg_class c \
     join pg_catalog.pg_namespace n on n.oid = c.relnamespace \
     where (n.nspname, c.relname) in (values {tables})) ";

/// Their foreign keys that act, but for parts of a tree's, which go with it.
const KEYS: &str = "select 'foreign key', k.conrelid::regclass::text, k.conname, \
         pg_catalog.pg_get_constraintdef(k.oid), \
         pg_catalog.obj_description(k.oid, 'pg_constraint'), \
         k.convalidated and r.relkind <> 'p' \
           and coalesce((pg_catalog.to_jsonb(k) ->> 'conenforced')::bool, true) \
     from pg_catalog.pg_constraint k join pg_catalog.pg_class r on r.oid = k.conrelid \
     where k.contype = 'f' and coalesce(pg_catalog.to_jsonb(k) ->> 'conparentid', '0') = '0' \
       and not exists (select from pg_catalog.pg_trigger g \
         where g.tgconstraint = k.oid and g.tgenabled in ('D', 'R')) ";

/// Of [`KEYS`], those from the tables or to them.
const OWN_KEYS: &str =
    "and (k.conrelid in (select oid from t) or k.confrelid in (select oid from t)) ";

/// Of [`KEYS`], those to tables that stay, for roles that may not disable what they do there.
const BORDER_KEYS: &str =
    "and k.conrelid in (select oid from t) and k.confrelid not in (select oid from t) ";

/// Rows before 15 of partitions' copies of a trigger are internal, and only a superuser may disable
/// those: there the trigger of the whole tree is dropped.
const TRIGGERS_AND_RULES: &str = "select case when t.relkind = 'p' and {major} < 15 \
         and g.tgtype & 1 = 1 then 'tree trigger' else 'trigger' end, t.oid::regclass::text, \
         g.tgname, pg_catalog.pg_get_triggerdef(g.oid), \
         pg_catalog.obj_description(g.oid, 'pg_trigger'), false \
     from pg_catalog.pg_trigger g join t on t.oid = g.tgrelid \
     where not g.tgisinternal and g.tgenabled = 'O' and g.tgname not like 'walferry\\_%' \
     union all select 'rule', t.oid::regclass::text, w.rulename, '', null, false \
     from pg_catalog.pg_rewrite w join t on t.oid = w.ev_class \
     where w.ev_enabled = 'O' and w.rulename <> '_RETURN' ";

/// What foreign keys of the tables do at tables that stay.
const BORDERS: &str = "select 'key trigger', g.tgrelid::regclass::text, g.tgname, '', null, false \
     from pg_catalog.pg_trigger g join pg_catalog.pg_constraint k on k.oid = g.tgconstraint \
     where k.contype = 'f' and g.tgenabled = 'O' and k.conrelid in (select oid from t) \
       and g.tgrelid not in (select oid from t) ";

/// Sets aside whatever of `acting` would act on rows written to `tables`, inside the session's
/// transaction if one is open, else in one of its own. Idempotent.
///
/// Waits for readers of the tables, as dropping a foreign key does: set `lock_timeout` before.
/// [`ASIDE_DDL`] must have been run.
pub async fn set_aside(
    session: &mut Session,
    job: &str,
    tables: &[QualifiedName],
    acting: Acting,
) -> Result<()> {
    let statements = setting_aside(session, job, tables, acting).await?;
    together(session, &statements).await
}

/// The statements that [`set_aside`] runs, for whoever has them run by [`together`] at a moment of
/// his own. Takes no locks that anybody would wait for.
pub async fn setting_aside(
    session: &mut Session,
    job: &str,
    tables: &[QualifiedName],
    acting: Acting,
) -> Result<Vec<String>> {
    let is_superuser = session.parameter("is_superuser") == Some("on");
    let found = match acting {
        Acting::Everything => [KEYS, OWN_KEYS, "union all ", TRIGGERS_AND_RULES].concat(),
        Acting::Borders if is_superuser => BORDERS.to_string(),
        Acting::Borders => [KEYS, BORDER_KEYS].concat(),
        Acting::Nothing => return Ok(Vec::new()),
    };
    if tables.is_empty() {
        return Ok(Vec::new());
    }
    let names: Vec<String> = tables
        .iter()
        .map(|t| format!("({}, {})", quote_literal(&t.schema), quote_literal(&t.name)))
        .collect();
    let major = session.major_version().to_string();
    let sql = TABLES.replace("{tables}", &names.join(", "))
        + &found.replace("{major}", &major)
        + "order by 1, 2, 3";
    let mut sqls = Vec::new();
    let rows = session.query(&sql).await?;
    for row in &rows {
        let (kind, relation, name) = (row.str(0)?, row.str(1)?, row.str(2)?);
        let note = row.opt(4)?.map_or("null".to_string(), quote_literal);
        sqls.push(format!(
            "insert into walferry.set_aside as a values ({}, {}, {}, {}, {}, {note}, {}, true) \
             on conflict (job, kind, relation, name) do update set aside = true, \
             later = a.later or excluded.later, note = excluded.note",
            quote_literal(job),
            quote_literal(kind),
            quote_literal(relation),
            quote_literal(name),
            quote_literal(row.str(3)?),
            row.bool(5)?
        ));
        let name = quote_ident(name);
        sqls.push(match kind {
            "foreign key" => format!("alter table {relation} drop constraint {name}"),
            "rule" => format!("alter table {relation} disable rule {name}"),
            "tree trigger" => format!("drop trigger {name} on {relation}"),
            _ => format!("alter table only {relation} disable trigger {name}"),
        });
    }
    Ok(sqls)
}

/// Puts back what [`set_aside`] took, in one transaction: all of it or, on an error, nothing.
/// Foreign keys are not valid before [`validate`]. Idempotent.
pub async fn restore(session: &mut Session, job: &str) -> Result<()> {
    let statements = restoring(session, job).await?;
    together(session, &statements).await
}

/// The statements that [`restore`] runs, for whoever has them run by [`together`] at a moment of
/// his own. Nobody else may set aside or restore for this job meanwhile.
pub async fn restoring(session: &mut Session, job: &str) -> Result<Vec<String>> {
    if !is_known(session).await? {
        return Ok(Vec::new());
    }
    // The other table of a key may have been made anew, and its triggers with it.
    let sql = "select kind, relation, name, definition, note, later from walferry.set_aside \
         where job = $1 and aside and (kind <> 'key trigger' or exists (select \
             from pg_catalog.pg_trigger g where g.tgname = name \
             and g.tgrelid = pg_catalog.to_regclass(relation))) order by kind, relation, name";
    let mut sqls = Vec::new();
    for row in session.query_params(sql, &[Some(job)]).await? {
        let (kind, relation, plain) = (row.str(0)?, row.str(1)?, row.str(2)?);
        let (name, definition) = (quote_ident(plain), row.str(3)?);
        let note = row.opt(4)?.map(quote_literal);
        let later = row.bool(5)? && kind == "foreign key";
        match kind {
            "foreign key" => {
                let tail =
                    if later && !definition.ends_with(" NOT VALID") { " not valid" } else { "" };
                sqls.push(format!(
                    "alter table {relation} add constraint {name} {definition}{tail}"
                ));
                sqls.extend(
                    note.map(|n| format!("comment on constraint {name} on {relation} is {n}")),
                );
            }
            "rule" => sqls.push(format!("alter table {relation} enable rule {name}")),
            "tree trigger" => {
                sqls.push(definition.to_string());
                sqls.extend(
                    note.map(|n| format!("comment on trigger {name} on {relation} is {n}")),
                );
            }
            _ => sqls.push(format!("alter table only {relation} enable trigger {name}")),
        }
        let this = this_row(job, kind, relation, plain);
        sqls.push(if later {
            format!("update walferry.set_aside set aside = false where {this}")
        } else {
            format!("delete from walferry.set_aside where {this}")
        });
    }
    Ok(sqls)
}

/// Has the server look whether all rows meet the foreign keys that came back; readers and writers
/// go on meanwhile. Takes as long as reading the tables.
pub async fn validate(session: &mut Session, job: &str) -> Result<()> {
    if !is_known(session).await? {
        return Ok(());
    }
    let sql = "select relation, name from walferry.set_aside \
         where job = $1 and kind = 'foreign key' and later and not aside order by 1, 2";
    for row in session.query_params(sql, &[Some(job)]).await? {
        let (relation, name) = (row.str(0)?, row.str(1)?);
        let validate = format!("alter table {relation} validate constraint {}", quote_ident(name));
        let this = this_row(job, "foreign key", relation, name);
        let done = format!("delete from walferry.set_aside where {this}");
        together(session, &[validate, done]).await?;
    }
    Ok(())
}

/// Citus's way for its nodes not to look at rows that it knows to be right, as those of a shard are
/// that only moves.
const SKIP: &str = "citus.skip_constraint_validation";

/// What [`super::apply_post`] postponed, as statements for [`together`]: foreign keys not valid
/// before [`validate`], triggers, rules. Steps that are done are left out.
pub async fn building_acting(session: &mut Session, dump: &Dump, job: &str) -> Result<Vec<String>> {
    let done = format!("select id from walferry.schema_step where job = {}", quote_literal(job));
    let done = texts(session, &done).await?;
    let mut steps = plan::steps(&dump.post, &std::collections::HashMap::new())?;
    steps.retain(|step| {
        step.wave.phase() == PostPhase::Rest
            && plan::acts(&step.statement.sql)
            && !done.contains(&step.id)
    });
    if steps.is_empty() {
        return Ok(Vec::new());
    }
    let known = known_settings(session).await?;
    let skip = "select pg_catalog.current_setting($1, true) is not null";
    let may_skip = session.query_one(skip, &[Some(SKIP)]).await?.bool(0)?;
    let mut sqls = Vec::new();
    for step in steps {
        let settings = &step.statement.settings;
        sqls.extend(settings.iter().filter_map(|(name, value)| set_local(name, value, &known)));
        match plan::foreign_key(&step.statement.sql) {
            Some((table, name, definition)) => {
                sqls.push(format!("{} not valid", step.statement.sql));
                sqls.push(format!(
                    "insert into walferry.set_aside values ({}, 'foreign key', \
                     pg_catalog.to_regclass({})::text, {}, {}, null, true, false) \
                     on conflict do nothing",
                    quote_literal(job),
                    quote_literal(&table.quoted()),
                    quote_literal(&name),
                    quote_literal(definition)
                ));
            }
            // Of a partitioned table.
            None if may_skip => {
                sqls.push(format!("set local {SKIP} = on"));
                sqls.push(step.statement.sql);
                sqls.push(format!("set local {SKIP} = off"));
            }
            None => sqls.push(step.statement.sql),
        }
        sqls.push(record(job, std::iter::once(step.id.as_str())));
    }
    Ok(sqls)
}

fn this_row(job: &str, kind: &str, relation: &str, name: &str) -> String {
    format!(
        "job = {} and kind = {} and relation = {} and name = {}",
        quote_literal(job),
        quote_literal(kind),
        quote_literal(relation),
        quote_literal(name)
    )
}

async fn is_known(session: &mut Session) -> Result<bool> {
    let sql = "select pg_catalog.to_regclass('walferry.set_aside') is not null";
    Ok(session.query_one(sql, &[]).await?.bool(0)?)
}

/// All statements in the transaction that is open, or in one of their own; one round trip, as
/// writers may be waiting. An error names the statement that had it.
pub async fn together(session: &mut Session, sqls: &[String]) -> Result<()> {
    if sqls.is_empty() {
        return Ok(());
    }
    if !session.in_transaction() {
        return transaction(session, sqls).await;
    }
    let mut pipeline = Pipeline::new();
    sqls.iter().for_each(|sql| pipeline.once(sql));
    let mut done = 0;
    let outcome = session.exchange(pipeline, |reply| {
        done += usize::from(matches!(reply, Reply::Done(_)));
    });
    let Err(error) = outcome.await else { return Ok(()) };
    Err(Error::statement(sqls.get(done).map_or("", String::as_str), error))
}
