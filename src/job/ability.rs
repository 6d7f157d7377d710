//! What the role may do on a side that a stream writes to; found out once, when the job is made,
//! and kept with it: how a side is written must not change under a stream that reads it.

use serde::{Deserialize, Serialize};

use crate::apply::ProgressKind;
use crate::id::QualifiedName;
use crate::pg::{self, Session};
use crate::schema::Acting;

/// Functions that applying calls. Before 14 only superusers may, whatever is granted.
const ORIGIN_FUNCTIONS: &str = "array['pg_replication_origin_create(text)', \
     'pg_replication_origin_drop(text)', 'pg_replication_origin_session_setup(text)']";

/// Of one side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ability {
    /// Use replication origins. Else what is written is marked by a row.
    pub origin: bool,
    /// Set session_replication_role. Else triggers, rules and foreign keys are set aside.
    pub replica_role: bool,
}

/// Of both.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Abilities {
    /// As the way back writes there.
    pub source: Ability,
    /// As the way there does.
    pub target: Ability,
}

impl Ability {
    /// Asks the server. Setting the role is tried rather than looked up, as managed services let
    /// roles do it whom the catalogs do not name.
    pub async fn probe(session: &mut Session) -> pg::Result<Ability> {
        let tried = session
            .execute("begin; set local session_replication_role = 'replica'; rollback")
            .await;
        let replica_role = match tried {
            Ok(_) => true,
            Err(error) if error.is_closed() => return Err(error),
            Err(_) => {
                session.execute("rollback").await?;
                false
            }
        };
        let sql = format!(
            "select r.rolsuper or ({} >= 14 and (select pg_catalog.bool_and( \
                 pg_catalog.has_function_privilege('pg_catalog.' || f, 'execute')) \
                 from pg_catalog.unnest({ORIGIN_FUNCTIONS}) f)) \
             from pg_catalog.pg_roles r where r.rolname = current_user",
            session.major_version()
        );
        let origin = session.query_one(&sql, &[]).await?.bool(0)?;
        Ok(Ability { origin, replica_role })
    }

    /// What must not act there while a stream writes; `tables_only` is the job's.
    pub fn acting(self, tables_only: bool) -> Acting {
        match (self.replica_role, tables_only) {
            (false, _) => Acting::Everything,
            (true, true) => Acting::Borders,
            (true, false) => Acting::Nothing,
        }
    }

    /// How progress is kept there, and what is written told apart.
    pub fn progress(self) -> ProgressKind {
        if self.origin { ProgressKind::Origin } else { ProgressKind::Table }
    }
}

/// What the role lacks to write to these tables, and to set every sequence: the GRANTs.
pub async fn missing_grants(
    session: &mut Session,
    tables: &[QualifiedName],
) -> pg::Result<Vec<String>> {
    let sql = "select case when c.relkind = 'S' then 'GRANT UPDATE ON SEQUENCE ' \
         else 'GRANT INSERT, UPDATE, DELETE, TRUNCATE ON ' end || c.oid::regclass || ' TO ' \
         || pg_catalog.quote_ident(current_user) || ';', c.relkind = 'S', n.nspname, c.relname \
         from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace \
         where c.relpersistence <> 't' \
         and n.nspname not in ('pg_catalog', 'information_schema', 'pg_toast', 'walferry') \
         and case when c.relkind = 'S' \
           then not pg_catalog.has_sequence_privilege(c.oid, 'update') \
           when c.relkind in ('r', 'p') then not (pg_catalog.has_table_privilege(c.oid, 'insert') \
             and pg_catalog.has_table_privilege(c.oid, 'update') \
             and pg_catalog.has_table_privilege(c.oid, 'delete') \
             and pg_catalog.has_table_privilege(c.oid, 'truncate')) else false end \
         order by 1";
    let mut grants = Vec::new();
    for row in session.query(sql).await? {
        let name = QualifiedName::new(row.str(2)?, row.str(3)?);
        if row.bool(1)? || tables.contains(&name) {
            grants.push(row.string(0)?);
        }
    }
    Ok(grants)
}
