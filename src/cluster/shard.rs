//! How a node's shards are reached by who is no part of Citus.
//!
//! Citus hides shards from catalog queries, refuses writes to them, and hands statements that make
//! objects on to all nodes (or refuses them on workers): each by a setting of the session, and not
//! in every release. Where the server knows such a setting, it is given in the start-up packet, so
//! that every session of ours has it, pg_dump's too. A server without Citus knows none of them.
//!
//! <https://docs.citusdata.com/en/stable/develop/api_guc.html>

use crate::pg::{Config, Result, Session};

/// What we need of a node: shards are seen, may be written to, and what is made stays here.
const SETTINGS: [(&str, &str); 3] = [
    ("citus.override_table_visibility", "off"),
    ("citus.enable_manual_changes_to_shards", "on"),
    ("citus.enable_ddl_propagation", "off"),
];

/// With this on, Citus has decoders of PostgreSQL's names, before them on the path, that give
/// shards their table's name. It sets the path above what a client asks for.
const CAPTURE: &str = "citus.enable_change_data_capture";

/// The same server, with its shards in reach. One short session.
pub async fn reach(config: &Config) -> Result<Config> {
    let mut session = Session::control(config).await?;
    let mut config = config.clone();
    for (name, value) in SETTINGS {
        // pg_settings does not show them.
        let known = "select pg_catalog.current_setting($1, true) is not null";
        if session.query_one(known, &[Some(name)]).await?.bool(0)? {
            config = config.with_setting(name, value);
        }
    }
    Ok(config)
}

/// Whether changes of shards come under the name of their table, which no publication of ours has:
/// they would be left out without a word.
pub async fn is_captured(config: &Config) -> Result<bool> {
    let mut session = Session::control(config).await?;
    let sql = "select coalesce(pg_catalog.current_setting($1, true), 'off') = 'on'";
    session.query_one(sql, &[Some(CAPTURE)]).await?.bool(0)
}
