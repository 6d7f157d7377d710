//! The tables of every target, made before any pair begins: as the first source has them, indexes,
//! constraints and triggers included. Tables that are there already are taken as they are, all of
//! them or none.
//!
//! What is made is remembered in `walferry.schema_step`, in the transactions that make it, so a
//! target that was away is gone on with.

use super::layout::{Layout, Reshard};
use super::{Error, Tell};
use crate::catalog::{self, Selection};
use crate::copy;
use crate::id::QualifiedName;
use crate::job::ability::Ability;
use crate::job::store::Store;
use crate::job::{self, Result};
use crate::pg::{Config, Purpose, Session};
use crate::schema::{self, Dump, PostOptions, PostPhase};
use crate::{apply, pg};

/// Makes what is missing on all targets. May be repeated.
pub(super) async fn make(reshard: &Reshard, layout: &Layout, tell: &Tell) -> Result<()> {
    let mut dump = None;
    for (place, target) in reshard.targets.iter().enumerate() {
        let session = Session::connect(&reshard.named(target), Purpose::Sql).await?;
        let mut store = Store::new(session, reshard.name.clone());
        store.ensure(&[apply::DDL, copy::DDL, schema::DDL, schema::ASIDE_DDL]).await?;
        let stored = match store.load_dump().await? {
            Some((pre, post)) => Dump { pre, post },
            None => {
                let number = place + 1;
                refuse_without_rights(&mut store.session, number).await?;
                let fresh = match are_there(layout, &mut store.session, number).await? {
                    true => Dump { pre: String::new(), post: String::new() },
                    false => {
                        tell(format!("making tables on target {number}"));
                        let dump = match &dump {
                            Some(dump) => dump,
                            None => dump.insert(read(reshard).await?),
                        };
                        fitted(dump, &store.session)?
                    }
                };
                store.save_dump(&fresh.pre, &fresh.post).await?;
                fresh
            }
        };
        complete(reshard, target, &mut store.session, &stored, tell).await?;
    }
    Ok(())
}

/// Triggers and foreign keys must keep still while rows are written.
async fn refuse_without_rights(session: &mut Session, number: usize) -> Result<()> {
    if Ability::probe(session).await?.replica_role {
        return Ok(());
    }
    let what = "the role may not set session_replication_role, and triggers and foreign keys \
                would act on rows that come: reshard as a superuser, or, from PostgreSQL 15 on, \
                GRANT SET ON PARAMETER session_replication_role TO the role"
        .to_string();
    Err(Error::Target { number, peer: session.peer().to_string(), what }.into())
}

/// True if the tables are there, empty; false if none is.
async fn are_there(layout: &Layout, session: &mut Session, number: usize) -> Result<bool> {
    let wanted: Vec<QualifiedName> = layout.0.keys().cloned().collect();
    let tables = catalog::tables(session, &Selection::default()).await?;
    let is_there = |name: &&QualifiedName| tables.iter().any(|table| table.name == **name);
    let (there, missing): (Vec<_>, Vec<_>) = wanted.iter().partition(is_there);
    if there.is_empty() {
        return Ok(false);
    }
    let peer = session.peer().to_string();
    if !missing.is_empty() {
        let names = |list: &[&QualifiedName]| {
            list.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
        };
        let what = format!(
            "{} is there and {} is not: make all of them, or none, which has them made",
            names(&there),
            names(&missing)
        );
        return Err(Error::Target { number, peer, what }.into());
    }
    for table in there {
        let sql = format!("select exists (select from only {})", table.quoted());
        if session.query_one(&sql, &[]).await?.bool(0)? {
            return Err(Error::HasRows { number, peer, table: table.clone() }.into());
        }
    }
    Ok(true)
}

async fn read(reshard: &Reshard) -> Result<Dump> {
    let Some(source) = reshard.sources.first() else {
        return Err(super::layout::unfit("sources is empty".to_string()));
    };
    let mut session = Session::connect(source, Purpose::Sql).await?;
    let selection = Selection::parse(&[], &reshard.exclude, &[]).map_err(job::Error::from)?;
    let selection = selection.with_partitions(&mut session).await?;
    let options = schema::Options {
        no_owner: !reshard.base.owners,
        no_privileges: !reshard.base.owners,
        ..schema::Options::default()
    };
    Ok(schema::dump(source, &selection, &options).await?)
}

/// The schema as the target can take it.
fn fitted(dump: &Dump, target: &Session) -> Result<Dump> {
    let major = target.major_version();
    let fitted = schema::fit(dump, major).map_err(schema::Error::Script)?;
    if fitted.refused.is_empty() {
        return Ok(fitted.dump);
    }
    let peer = target.peer().to_string();
    Err(schema::Error::TooNew { peer, major, objects: fitted.refused }.into())
}

/// Makes what is not made yet.
async fn complete(
    reshard: &Reshard,
    target: &Config,
    session: &mut Session,
    dump: &Dump,
    tell: &Tell,
) -> Result<()> {
    let name = reshard.name.as_str();
    for sql in schema::apply_pre(session, dump, name).await? {
        tell(format!("warning: the role may not, and it is left out: {sql}"));
    }
    for phase in [PostPhase::Indexes, PostPhase::Rest] {
        let options = PostOptions {
            parallel: reshard.base.jobs,
            bundle: reshard.base.bulk.bundle_tables,
            ..PostOptions::new(name, phase)
        };
        schema::apply_post(target, dump, &options, &mut |_| {}).await?;
    }
    Ok(())
}

/// The tables that a target has of those that are shared out.
pub(super) async fn is_made(session: &mut Session, reshard: &Reshard) -> pg::Result<bool> {
    let sql = "select pg_catalog.to_regclass('walferry.schema_dump') is not null";
    if !session.query_one(sql, &[]).await?.bool(0)? {
        return Ok(false);
    }
    let sql = "select exists (select from walferry.schema_dump where job = $1 and pre <> '')";
    session.query_one(sql, &[Some(reshard.name.as_str())]).await?.bool(0)
}
