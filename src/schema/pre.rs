//! Pre-data on the target: all of it in one transaction, sent in one round trip.

use std::collections::HashSet;

use super::lex::Cursor;
use super::script::{self, Statement};
use super::{Dump, Error, Result};
use crate::id::{QualifiedName, quote_literal};
use crate::pg::{Pipeline, Reply, Session};

/// The row of `walferry.schema_step` that stands for pre-data.
const STEP: &str = "pre-data";

/// Makes everything that comes before the rows, and remembers that in the same transaction; does
/// nothing if an earlier call for this job did it.
///
/// Schemas that exist are used as they are, settings that the target does not know are left out,
/// and so are comments on extensions, and owners, grants and comments of schemas that were there,
/// where the role may not change them: those are given back, for someone to be told. Any other
/// refused statement is shown whole, and nothing of the dump is left behind. Missing roles are
/// named before anything is tried.
pub async fn apply_pre(session: &mut Session, dump: &Dump, job: &str) -> Result<Vec<String>> {
    let done = format!(
        "select 1 from walferry.schema_step where job = {} and id = {}",
        quote_literal(job),
        quote_literal(STEP)
    );
    if !session.query(&done).await?.is_empty() {
        return Ok(Vec::new());
    }
    check_roles(session, dump).await?;
    let known = known_settings(session).await?;
    let schemas = texts(session, "select nspname from pg_catalog.pg_namespace").await?;
    let mut statements = Vec::new();
    let mut courtesies = Vec::new();
    for statement in script::statements(&dump.pre)? {
        let mut cursor = Cursor::new(&statement.sql);
        if cursor.eat("create schema") && cursor.ident().is_some_and(|s| schemas.contains(&s)) {
            continue;
        }
        if is_courtesy(&statement.sql, &schemas) {
            courtesies.push(statement.sql);
        } else {
            statements.push(statement);
        }
    }
    let mut sqls = with_settings(statements, &known);
    sqls.push(record(job, std::iter::once(STEP)));
    transaction(session, &sqls).await?;
    let mut refused = Vec::new();
    for sql in courtesies {
        match session.execute(&sql).await {
            Err(error) if error.code() == Some("42501") => refused.push(sql),
            Err(error) => return Err(Error::statement(&sql, error)),
            Ok(_) => {}
        }
    }
    Ok(refused)
}

/// True if [`apply_pre`] has made the job's tables here, and they were not dropped since.
pub async fn is_made(session: &mut Session, job: &str) -> Result<bool> {
    let there = "select pg_catalog.to_regclass('walferry.schema_step') is not null";
    if !session.query_one(there, &[]).await?.bool(0)? {
        return Ok(false);
    }
    let sql = "select exists (select from walferry.schema_step where job = $1 and id = $2)";
    Ok(session.query_one(sql, &[Some(job), Some(STEP)]).await?.bool(0)?)
}

/// Drops tables that [`apply_pre`] made for the job, and forgets that it did: one transaction.
///
/// # Errors
/// Where others' objects depend on them; nothing is dropped then.
pub async fn drop_made(session: &mut Session, job: &str, tables: &[QualifiedName]) -> Result<()> {
    let names: Vec<String> = tables.iter().map(QualifiedName::quoted).collect();
    let mut sqls = Vec::new();
    if !names.is_empty() {
        sqls.push("set local client_min_messages = error".to_string());
        sqls.push(format!("drop table if exists {}", names.join(", ")));
    }
    sqls.push(format!(
        "delete from walferry.schema_step where job = {} and id = {}",
        quote_literal(job),
        quote_literal(STEP)
    ));
    transaction(session, &sqls).await
}

/// What is said of an extension, or of a schema that was there (`public`): nothing that is moved
/// depends on it, and owning those is too much to ask for it.
fn is_courtesy(sql: &str, schemas: &HashSet<String>) -> bool {
    let mut cursor = Cursor::new(sql);
    if cursor.eat("comment on extension") {
        return true;
    }
    let is_of_schema = if cursor.eat("grant") || cursor.eat("revoke") {
        cursor.find("on") && cursor.eat("schema")
    } else {
        cursor.eat("alter schema") || cursor.eat("comment on schema")
    };
    is_of_schema && cursor.ident().is_some_and(|schema| schemas.contains(&schema))
}

/// `insert` that marks steps as done.
pub(super) fn record<'a>(job: &str, ids: impl Iterator<Item = &'a str>) -> String {
    let job = quote_literal(job);
    let values: Vec<String> = ids.map(|id| format!("({job}, {})", quote_literal(id))).collect();
    format!("insert into walferry.schema_step (job, id) values {}", values.join(", "))
}

/// Runs the statements between BEGIN and COMMIT in one round trip; on a failure, the session is
/// out of the transaction again and the error shows the statement.
pub(super) async fn transaction(session: &mut Session, sqls: &[String]) -> Result<()> {
    let mut pipeline = Pipeline::new();
    pipeline.once("begin");
    for sql in sqls {
        pipeline.once(sql);
    }
    pipeline.once("commit");
    let mut tags: Vec<String> = Vec::new();
    let outcome = session
        .exchange(pipeline, |reply| {
            if let Reply::Done(tag) = reply {
                tags.push(tag);
            }
        })
        .await;
    if let Err(error) = outcome {
        if !error.is_closed() {
            session.execute("rollback").await?;
        }
        // BEGIN answered first, so the number of answers is that of the statement after the last.
        let failed = tags.len().checked_sub(1).and_then(|index| sqls.get(index));
        return Err(Error::statement(failed.map_or("commit", String::as_str), error));
    }
    // COMMIT of a failed transaction answers ROLLBACK, and no error.
    match tags.last().map(String::as_str) {
        Some("COMMIT") => Ok(()),
        tag => Err(Error::Bug(format!("COMMIT of a schema statement answered {tag:?}"))),
    }
}

/// The statements, with a SET LOCAL before the ones that need a changed setting.
pub(super) fn with_settings(statements: Vec<Statement>, known: &HashSet<String>) -> Vec<String> {
    let mut sqls = Vec::new();
    let mut current: Vec<(String, String)> = Vec::new();
    for statement in statements {
        for (name, value) in statement.settings {
            match current.iter_mut().find(|(other, _)| *other == name) {
                Some((_, other)) if *other == value => continue,
                Some((_, other)) => other.clone_from(&value),
                None => current.push((name.clone(), value.clone())),
            }
            sqls.extend(set_local(&name, &value, known));
        }
        sqls.push(statement.sql);
    }
    sqls
}

/// `SET LOCAL`, unless the server does not know the setting: a later pg_dump sets what an earlier
/// server never heard of (transaction_timeout, default_table_access_method).
pub(super) fn set_local(name: &str, value: &str, known: &HashSet<String>) -> Option<String> {
    known.contains(name).then(|| format!("set local {name} = {value}"))
}

pub(super) async fn known_settings(session: &mut Session) -> Result<HashSet<String>> {
    texts(session, "select pg_catalog.lower(name) from pg_catalog.pg_settings").await
}

/// The first column of a query's rows.
pub(super) async fn texts(session: &mut Session, sql: &str) -> Result<HashSet<String>> {
    let mut texts = HashSet::new();
    for row in session.query(sql).await? {
        texts.insert(row.string(0)?);
    }
    Ok(texts)
}

pub(super) async fn check_roles(session: &mut Session, dump: &Dump) -> Result<()> {
    let present = texts(session, "select rolname from pg_catalog.pg_roles").await?;
    let mut missing: Vec<String> = Vec::new();
    for script in [&dump.pre, &dump.post] {
        for sql in script::split(script)? {
            missing.extend(script::roles(sql).into_iter().filter(|r| !present.contains(r)));
        }
    }
    missing.sort();
    missing.dedup();
    if missing.is_empty() {
        return Ok(());
    }
    Err(Error::Roles { peer: session.peer().to_string(), roles: missing })
}
