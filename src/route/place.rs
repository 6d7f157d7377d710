//! Where clients must go for a side.

use super::{Context, Error, Result};
use crate::id::Stream;
use crate::pg::{Config, Host, Purpose, Session};

/// One of the two ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    Source,
    Target,
}

impl Side {
    /// Where the flip goes.
    pub(super) fn destination(context: &Context) -> Side {
        match context.flip {
            Stream::Forward => Side::Target,
            Stream::Reverse => Side::Source,
        }
    }

    /// Where clients are before it.
    pub(super) fn live(context: &Context) -> Side {
        match context.flip {
            Stream::Forward => Side::Source,
            Stream::Reverse => Side::Target,
        }
    }

    pub(super) fn config(self, context: &Context) -> &Config {
        match self {
            Side::Source => &context.source,
            Side::Target => &context.target,
        }
    }
}

/// A server's address and a database there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub host: String,
    pub port: String,
    pub dbname: String,
}

impl Place {
    /// Where clients of this side go.
    pub(super) async fn of(context: &Context, side: Side) -> Result<Place> {
        let config = side.config(context);
        let host = host_of(config).await?;
        let (port, dbname) = (host.port.to_string(), config.dbname.clone());
        Ok(Place { host: host.host, port, dbname })
    }
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}/{}", self.host, self.port, self.dbname)
    }
}

/// What tells a database from any other.
pub(super) async fn identity(config: &Config) -> crate::pg::Result<(String, String)> {
    let mut session = Session::control(config).await?;
    let sql = "select system_identifier, pg_catalog.current_database() \
         from pg_catalog.pg_control_system()";
    let row = session.query_one(sql, &[]).await?;
    Ok((row.string(0)?, row.string(1)?))
}

/// The host of a side; of several, the one that takes our connection now, as those who are led
/// there may know no target_session_attrs.
pub(super) async fn host_of(config: &Config) -> Result<Host> {
    match config.hosts.as_slice() {
        [host] => Ok(host.clone()),
        _ => {
            let session = Session::connect(config, Purpose::Sql).await;
            Ok(session.map_err(Error::Destination)?.host().clone())
        }
    }
}
