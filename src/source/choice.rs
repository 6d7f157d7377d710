//! What a side lets us read with: looked at, or tried where trying leaves nothing behind.

use std::time::Duration;

use super::Result;
use super::peek::Peeks;
use crate::decode::{Plugin, wal2json};
use crate::id::{JobName, QualifiedName, Stream, quote_literal};
use crate::pg::{self, Config, Purpose, Session};

/// A server loads a plugin before it waits for open transactions, so that one which is missing is
/// known at once; what takes longer than this is a plugin that is there.
const PROBE: Duration = Duration::from_millis(500);

/// How often a change is looked for that shows what a plugin tells, and the time between.
const LOOKS: u32 = 5;
const LOOK: Duration = Duration::from_millis(200);

/// From this major on no wal2json before 2.5 can be built: a transaction's commit time has another
/// place there than those read it from (ReorderBufferTXN).
const BUILDS_FROM_2_5: u32 = 15;

/// Said of wal2json 2.3 and 2.4.
const UNTYPED: &str = "the server's wal2json is older than 2.5, and does not tell the types of \
     columns: install 2.5 or newer";

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

/// What trying a plugin has shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Tried {
    /// It can be read.
    Fit,
    /// It can, unless it is older than it looks; what that means, to follow a reason.
    Unsure(&'static str),
    /// It cannot, and why.
    Unfit(String),
}

/// Whether a slot can be made with the plugin, tried with a temporary one that is dropped at once,
/// and whether what it tells is enough. Takes two seconds at most.
///
/// Errors: what else keeps a slot from being made, such as a missing right.
pub async fn try_plugin(config: &Config, plugin: Plugin) -> Result<Tried> {
    if plugin == Plugin::Pgoutput {
        return Ok(Tried::Fit); // PostgreSQL's own, in each version from 10 on.
    }
    let mut session = Session::connect(config, Purpose::Sql).await?;
    let probe = Probe { name: format!("walferry_probe_{:08x}", fastrand::u32(..)), plugin };
    session.execute(&format!("set statement_timeout = {}", PROBE.as_millis())).await?;
    let tried = match session.query(&probe.make()).await {
        Ok(_) if plugin == Plugin::Wal2json => probe.tells_types(&mut session).await,
        Ok(_) => Ok(Tried::Fit),
        Err(error) => Err(error),
    };
    match tried {
        // Dropped by the server where the last statement failed.
        Ok(tried) => {
            session.query(&probe.remove()).await?;
            Ok(tried)
        }
        Err(error) if error.code() == Some(CANCELED) => Ok(Tried::Fit),
        Err(error) if error.code() == Some(UNDEFINED_FILE) => {
            Ok(Tried::Unfit(format!("the server does not have {plugin}")))
        }
        Err(error) => match not_approved(&mut session, plugin).await? {
            Some(reason) => Ok(Tried::Unfit(reason)),
            None => Err(error.into()),
        },
    }
}

/// A temporary slot.
struct Probe {
    name: String,
    plugin: Plugin,
}

impl Probe {
    fn make(&self) -> String {
        let (name, plugin) = (quote_literal(&self.name), quote_literal(self.plugin.as_str()));
        format!("select pg_catalog.pg_create_logical_replication_slot({name}, {plugin}, true)")
    }

    fn remove(&self) -> String {
        format!(
            "select pg_catalog.pg_drop_replication_slot(slot_name) \
             from pg_catalog.pg_replication_slots where slot_name = {}",
            quote_literal(&self.name)
        )
    }

    /// Whether this wal2json is 2.5 or newer. 2.3 and 2.4 take the same options, so that before 15
    /// only a change tells them apart: one that is written while we look.
    async fn tells_types(&self, session: &mut Session) -> pg::Result<Tried> {
        let mut version = wal2json::Plugin::V2_6;
        let peeks = loop {
            let options = wal2json::options(version, &[]);
            let peeks = Peeks::new(&self.name, self.plugin, session.major_version(), &options);
            let Err(error) = session.query(&peeks.first()).await else { break peeks };
            let said = error.server().map(|said| said.message.as_str()).unwrap_or_default();
            match version.refused(said) {
                Some(wal2json::Plugin::Older) => {
                    let reason = format!("the server's {}", wal2json::TOO_OLD);
                    return Ok(Tried::Unfit(reason));
                }
                Some(older) => version = older,
                None => return Err(error),
            }
            // The error has dropped it.
            session.query(&self.make()).await?;
        };
        if version == wal2json::Plugin::V2_6 || session.major_version() >= BUILDS_FROM_2_5 {
            return Ok(Tried::Fit);
        }
        for _ in 0..LOOKS {
            if let Some(row) = session.query(&peeks.tells_types()).await?.first() {
                return Ok(if row.bool(0)? { Tried::Fit } else { Tried::Unfit(UNTYPED.into()) });
            }
            tokio::time::sleep(LOOK).await;
        }
        Ok(Tried::Unsure(
            "if its wal2json is older than 2.5, which no change has shown within a second, the \
             first one will stop the stream: check again while rows are written",
        ))
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
         where roname not in ($1, $2, $3, $4) order by roname limit 1";
    let ours = [job.origins(Stream::Forward), job.origins(Stream::Reverse)];
    let ours: Vec<Option<&str>> = ours.as_flattened().iter().map(|name| Some(&**name)).collect();
    let row = session.query_opt(sql, &ours).await?;
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
