//! Databases that a task has for itself on its target: made like the source's, and dropped again
//! where what was begun is taken back.

use std::time::Duration;

use crate::clock::Deadline;
use crate::id::{quote_ident, quote_literal};
use crate::job::{Error, Result};
use crate::pg::{Config, Session};

/// Databases that are on every server: one is needed to make another.
const MAINTENANCE: [&str; 2] = ["postgres", "template1"];

/// How long sessions of a database that is dropped may take to end.
const DROP_WAIT: Duration = Duration::from_secs(30);

/// The config's server, in a database that is there.
pub(super) fn beside(config: &Config) -> Config {
    config.clone().with_dbname("postgres")
}

/// A session on the server, in another database than the config's.
async fn session_beside(config: &Config) -> Result<Session> {
    let [first, second] = MAINTENANCE.map(|dbname| config.clone().with_dbname(dbname));
    match Session::control(&first).await {
        // 3D000: there is no such database.
        Err(error) if error.code() == Some("3D000") => Ok(Session::control(&second).await?),
        session => Ok(session?),
    }
}

/// True if the config's database is on its server.
pub(super) async fn exists(config: &Config) -> Result<bool> {
    let mut session = session_beside(config).await?;
    let sql = "select 1 from pg_catalog.pg_database where datname = $1";
    Ok(session.query_opt(sql, &[Some(&config.dbname)]).await?.is_some())
}

/// The statement that makes the target's database like the source's: encoding, locale, owner.
/// Settings of the database come with the schema.
pub(super) async fn statement(source: &Config) -> Result<String> {
    let mut session = Session::control(source).await?;
    let sql = "select pg_catalog.pg_encoding_to_char(d.encoding), d.datcollate, d.datctype, \
         pg_catalog.pg_get_userbyid(d.datdba), coalesce(pg_catalog.to_jsonb(d) ->> \
         'datlocprovider', 'c'), coalesce(pg_catalog.to_jsonb(d) ->> 'datlocale', \
         pg_catalog.to_jsonb(d) ->> 'daticulocale') from pg_catalog.pg_database d \
         where d.datname = pg_catalog.current_database()";
    let row = session.query_one(sql, &[]).await?;
    let mut sql = format!(
        "create database {} template template0 encoding {} lc_collate {} lc_ctype {} owner {}",
        quote_ident(&source.dbname),
        quote_literal(row.str(0)?),
        quote_literal(row.str(1)?),
        quote_literal(row.str(2)?),
        quote_ident(row.str(3)?)
    );
    let (provider, locale) = (row.str(4)?, row.opt(5)?.unwrap_or_default());
    match provider {
        "i" => sql += &format!(" locale_provider icu icu_locale {}", quote_literal(locale)),
        "b" => sql += &format!(" locale_provider builtin builtin_locale {}", quote_literal(locale)),
        _ => {}
    }
    Ok(sql)
}

/// Makes it.
pub(super) async fn make(target: &Config, statement: &str) -> Result<()> {
    let mut session = session_beside(target).await?;
    // Copying a template takes longer than short statements do.
    session.set_patience(crate::limit::CATALOG_WAIT);
    session.execute(statement).await?;
    Ok(())
}

/// Drops it, with the sessions that are in it. Harmless where it is gone.
pub(super) async fn drop(target: &Config) -> Result<()> {
    let mut session = session_beside(target).await?;
    session.set_patience(crate::limit::CATALOG_WAIT);
    let deadline = Deadline::after(DROP_WAIT);
    let name = quote_ident(&target.dbname);
    loop {
        let end = "select pg_catalog.pg_terminate_backend(pid) from pg_catalog.pg_stat_activity \
             where datname = $1";
        session.query_params(end, &[Some(&target.dbname)]).await?;
        match session.execute(&format!("drop database if exists {name}")).await {
            Ok(_) => return Ok(()),
            // 55006: being accessed by other users.
            Err(error) if error.code() == Some("55006") && !deadline.passed() => {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            Err(error) => return Err(Error::Pg(error)),
        }
    }
}
