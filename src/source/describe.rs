//! What the textual decoders must ask of the source while they read: tables, and names of origins.

use std::sync::Arc;
use std::time::Duration;

use super::{Error, Followed, Relative, Result};
use crate::catalog;
use crate::decode::Described;
use crate::id::QualifiedName;
use crate::pg::{self, Config, Purpose, Session};

/// A table and the partitioned tables above it, with their kinds, nearest first.
const LINEAGE: &str = "with recursive up as ( \
       select c.oid, n.nspname, c.relname, c.relkind, c.relispartition, 0 as level \
       from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace \
       where n.nspname = $1::text::name and c.relname = $2::text::name \
     union all \
       select c.oid, n.nspname, c.relname, c.relkind, c.relispartition, up.level + 1 \
       from up join pg_catalog.pg_inherits i on i.inhrelid = up.oid and up.relispartition \
       join pg_catalog.pg_class c on c.oid = i.inhparent \
       join pg_catalog.pg_namespace n on n.oid = c.relnamespace) \
     select nspname, relname, relkind, oid from up order by level";

/// How long the source may take to answer.
const ANSWER: Duration = Duration::from_secs(60);

/// Asks on a connection of its own, opened at the first question.
#[derive(Debug)]
pub(super) struct Describer {
    config: Config,
    session: Option<Session>,
    followed: Arc<Followed>,
}

impl Describer {
    /// Of the tables `followed`, and what is a partition of them.
    pub fn new(config: &Config, followed: Arc<Followed>) -> Describer {
        Describer { config: config.clone(), session: None, followed }
    }

    /// The table as it is now; `None` if its changes are not to be read: it does not take part, or
    /// holds no rows of its own (a partitioned table), or none of anybody's (a materialized view; a
    /// table being rewritten, before 11). Errors: see [`Followed::takes_part`].
    pub async fn table(&mut self, name: &QualifiedName) -> Result<Option<Described>> {
        let (lineage, holds_rows) = self.lineage(name).await?;
        if !self.followed.takes_part(name, &lineage)? || !holds_rows {
            return Ok(None);
        }
        let described = self.ask(async |session| catalog::describe(session, name).await).await?;
        match described {
            Some(described) if lineage.first().is_some_and(|t| t.oid == described.oid) => {
                Ok(Some(described))
            }
            // It was taken away between the two questions.
            _ => Err(Error::TableGone { table: name.clone() }),
        }
    }

    async fn lineage(&mut self, name: &QualifiedName) -> Result<(Vec<Relative>, bool)> {
        self.ask(async |session| {
            let named = [Some(name.schema.as_str()), Some(name.name.as_str())];
            let rows = session.query_params(LINEAGE, &named).await?;
            let holds_rows = rows.first().map(|row| Ok(row.str(2)? == "r")).transpose();
            let lineage = rows.iter().map(|row| {
                let name = QualifiedName::new(row.str(0)?, row.str(1)?);
                Ok(Relative { oid: row.parse(3)?, name })
            });
            Ok((lineage.collect::<pg::Result<_>>()?, holds_rows?.unwrap_or(false)))
        })
        .await
    }

    /// Names of the replication origins that there are, by number.
    pub async fn origins(&mut self) -> Result<Vec<(u32, String)>> {
        self.ask(async |session: &mut Session| {
            let sql = "select roident, roname from pg_catalog.pg_replication_origin";
            let rows = session.query(sql).await?;
            rows.iter().map(|row| Ok((row.parse(0)?, row.string(1)?))).collect()
        })
        .await
    }

    async fn ask<T>(
        &mut self,
        question: impl AsyncFnOnce(&mut Session) -> pg::Result<T>,
    ) -> Result<T> {
        let asking = async {
            if self.session.is_none() {
                self.session = Some(Session::connect(&self.config, Purpose::Sql).await?);
            }
            match &mut self.session {
                Some(session) => question(session).await,
                None => Err(pg::Error::Result("no session".to_string())),
            }
        };
        match tokio::time::timeout(ANSWER, asking).await {
            Ok(answer) => Ok(answer?),
            Err(_) => {
                let peer = self.config.hosts.first().map(|host| self.config.peer(host));
                let (peer, seconds) = (peer.unwrap_or_default(), ANSWER.as_secs_f64());
                Err(Error::Silent { peer, seconds })
            }
        }
    }
}
