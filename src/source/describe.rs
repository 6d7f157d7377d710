//! What the textual decoders must ask of the source while they read: tables, and names of origins.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use super::{Error, Result};
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
     select nspname, relname, relkind from up order by level";

/// How long the source may take to answer.
const ANSWER: Duration = Duration::from_secs(60);

/// Asks on a connection of its own, opened at the first question.
#[derive(Debug)]
pub(super) struct Describer {
    config: Config,
    session: Option<Session>,
    followed: Arc<HashSet<QualifiedName>>,
}

impl Describer {
    /// Of the tables `followed`, and what is a partition of them.
    pub fn new(config: &Config, followed: Arc<HashSet<QualifiedName>>) -> Describer {
        Describer { config: config.clone(), session: None, followed }
    }

    /// The table as it is now; `None` if its changes are not to be read: it does not take part, is
    /// gone, or holds no rows of its own (a partitioned table), or none of anybody's (a
    /// materialized view; a table being rewritten, before 11).
    pub async fn table(&mut self, name: &QualifiedName) -> Result<Option<Described>> {
        let followed = self.followed.clone();
        self.ask(async |session: &mut Session| {
            let named = [Some(name.schema.as_str()), Some(name.name.as_str())];
            let lineage = session.query_params(LINEAGE, &named).await?;
            let Some(first) = lineage.first() else { return Ok(None) };
            let mut takes_part = false;
            for row in &lineage {
                takes_part |= followed.contains(&QualifiedName::new(row.str(0)?, row.str(1)?));
            }
            if !takes_part || first.str(2)? != "r" {
                return Ok(None);
            }
            catalog::describe(session, name).await
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
