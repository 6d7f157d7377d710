//! What a side lets us read with: looked at, or tried where trying leaves nothing behind.

use std::time::Duration;

use super::Result;
use crate::decode::Plugin;
use crate::id::{JobName, QualifiedName, Stream, quote_literal};
use crate::pg::{Config, Purpose, Session};

/// A server loads a plugin before it waits for open transactions, so that one which is missing is
/// known at once; what takes longer than this is a plugin that is there.
const PROBE: Duration = Duration::from_millis(500);

/// SQLSTATEs: no such file; canceled.
const UNDEFINED_FILE: &str = "58P01";
const CANCELED: &str = "57014";

/// Why no replication connection is let in; `None` if one is.
pub async fn refused_replication(config: &Config) -> Option<String> {
    let opened = async {
        let mut session = Session::connect(config, Purpose::Replication).await?;
        session.query("IDENTIFY_SYSTEM").await
    };
    opened.await.err().map(|error| error.to_string())
}

/// Why no slot can be made with the plugin, tried with a temporary one that is dropped at once;
/// `None` if one can.
///
/// Errors: what else keeps a slot from being made, such as a missing right.
pub async fn refused_plugin(config: &Config, plugin: Plugin) -> Result<Option<String>> {
    if plugin == Plugin::Pgoutput {
        return Ok(None); // PostgreSQL's own, in each version from 10 on.
    }
    let mut session = Session::connect(config, Purpose::Sql).await?;
    let name = quote_literal(&format!("walferry_probe_{:08x}", fastrand::u32(..)));
    session.execute(&format!("set statement_timeout = {}", PROBE.as_millis())).await?;
    let sql = format!(
        "select pg_catalog.pg_create_logical_replication_slot({name}, {}, true)",
        quote_literal(plugin.as_str())
    );
    match session.query(&sql).await {
        Ok(_) => {
            session.query(&format!("select pg_catalog.pg_drop_replication_slot({name})")).await?;
            Ok(None)
        }
        Err(error) if error.code() == Some(CANCELED) => Ok(None),
        Err(error) if error.code() == Some(UNDEFINED_FILE) => {
            Ok(Some(format!("the server does not have {plugin}")))
        }
        Err(error) => match not_approved(&mut session, plugin).await? {
            Some(reason) => Ok(Some(reason)),
            None => Err(error.into()),
        },
    }
}

/// Recent minor releases let only the libraries of a list decode. A right that is missing has the
/// same SQLSTATE, so the list is looked at.
async fn not_approved(session: &mut Session, plugin: Plugin) -> Result<Option<String>> {
    let sql = "select pg_catalog.current_setting('output_plugin_libraries', true)";
    let list = session.query_one(sql, &[]).await?.opt(0)?.map(str::to_string);
    let Some(list) = list.filter(|list| !list.is_empty()) else { return Ok(None) };
    let listed = list.split(',').any(|one| one.trim().trim_matches('"') == plugin.as_str());
    Ok((!listed).then(|| {
        format!(
            "the server lets only {list} decode: as a superuser, \"ALTER SYSTEM SET \
             output_plugin_libraries = {list}, {plugin}; SELECT pg_reload_conf();\""
        )
    }))
}

/// A replication origin that is not this job's, if there is one: test_decoding leaves out whatever
/// has an origin, and so what a subscription, another program or another job brings in by it.
pub async fn foreign_origin(config: &Config, job: &JobName) -> Result<Option<String>> {
    let mut session = Session::connect(config, Purpose::Sql).await?;
    let sql = "select roname from pg_catalog.pg_replication_origin \
         where roname <> $1 and roname <> $2 order by roname limit 1";
    let (forward, reverse) = (job.object(Stream::Forward), job.object(Stream::Reverse));
    let row = session.query_opt(sql, &[Some(&forward), Some(&reverse)]).await?;
    Ok(row.map(|row| row.string(0)).transpose()?)
}

/// Why the role may not publish these tables; `None` if it may.
pub async fn refused_publication(
    session: &mut Session,
    tables: &[QualifiedName],
) -> Result<Option<String>> {
    let sql = "select pg_catalog.has_database_privilege(pg_catalog.current_database(), 'create'), \
         current_user, pg_catalog.current_database()";
    let row = session.query_one(sql, &[]).await?;
    if !row.bool(0)? {
        let (role, database) = (row.str(1)?, row.str(2)?);
        return Ok(Some(format!("role {role} may not create anything in database {database}")));
    }
    let names: Vec<String> = tables.iter().map(|t| quote_literal(&t.quoted())).collect();
    let sql = format!(
        "select n.nspname, c.relname, pg_catalog.pg_get_userbyid(c.relowner) \
         from pg_catalog.unnest(array[{}]::text[]) t(name) \
         join pg_catalog.pg_class c on c.oid = pg_catalog.to_regclass(t.name) \
         join pg_catalog.pg_namespace n on n.oid = c.relnamespace \
         where not pg_catalog.pg_has_role(c.relowner, 'usage') limit 1",
        names.join(", ")
    );
    let Some(row) = session.query_opt(&sql, &[]).await? else { return Ok(None) };
    let (schema, table, owner) = (row.str(0)?, row.str(1)?, row.str(2)?);
    Ok(Some(format!("table {schema}.{table} belongs to {owner}")))
}
