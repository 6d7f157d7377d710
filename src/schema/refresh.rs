//! Materialized views, filled again from the tables that have been followed meanwhile.
//!
//! <https://www.postgresql.org/docs/current/sql-refreshmaterializedview.html>

use std::collections::HashMap;

use super::Result;
use super::depend::Views;
use crate::id::QualifiedName;
use crate::pg::{self, Config, Purpose, Session};

/// A materialized view that could not be brought to the state it has on the live side.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unrefreshed {
    /// Which one.
    pub view: QualifiedName,
    /// What the server said.
    pub error: String,
    /// The role lacks the right to.
    pub denied: bool,
}

/// Materialized views of the live side, each after those it reads from, and whether it is filled.
pub async fn materialized(live: &mut Session) -> Result<Vec<(QualifiedName, bool)>> {
    Ok(Views::read(live).await?.materialized())
}

/// Brings `dest`'s to the state that they have on the live side, in this order: filled anew, or
/// emptied. Those that `dest` does not have are passed over. `in_use`: somebody may be reading
/// them, so those that can be are refreshed CONCURRENTLY.
///
/// Runs under the settings that a session of the role's own would have, as a query may depend on
/// time zone or search_path; without a limit of time but for locks, behind which readers would
/// queue. One that fails does not keep the others from being refreshed; it is given back.
pub async fn refresh(
    dest: &Config,
    wanted: &[(QualifiedName, bool)],
    in_use: bool,
    mut report: impl FnMut(&QualifiedName) + Send,
) -> Result<Vec<Unrefreshed>> {
    if wanted.is_empty() {
        return Ok(Vec::new());
    }
    let mut session = Session::connect(dest, Purpose::PoolerAdmin).await?;
    let limits = "set statement_timeout = 0; set default_transaction_read_only = off; \
         set idle_in_transaction_session_timeout = 0; set lock_timeout = '10s'";
    session.execute(limits).await?;
    let there = states(&mut session).await?;
    let mut failed = Vec::new();
    for (view, populated) in wanted {
        let Some(state) = there.get(view) else { continue };
        let name = view.quoted();
        let sql = match (populated, state.populated) {
            (true, true) if in_use && state.is_unique => {
                format!("refresh materialized view concurrently {name}")
            }
            (true, _) => format!("refresh materialized view {name}"),
            (false, true) => format!("refresh materialized view {name} with no data"),
            (false, false) => continue,
        };
        report(view);
        match session.execute(&sql).await {
            Ok(_) => {}
            Err(error) if error.is_closed() || error.code().is_none() => return Err(error.into()),
            Err(error) => {
                let denied = error.code() == Some("42501");
                failed.push(Unrefreshed { view: view.clone(), error: error.to_string(), denied });
            }
        }
    }
    Ok(failed)
}

/// What a materialized view is on the side where it is to be refreshed.
struct State {
    populated: bool,
    /// It has an index that lets it be refreshed CONCURRENTLY.
    is_unique: bool,
}

async fn states(session: &mut Session) -> pg::Result<HashMap<QualifiedName, State>> {
    let rows = session
        .query(
            "select n.nspname, c.relname, c.relispopulated, \
             exists (select 1 from pg_catalog.pg_index i where i.indrelid = c.oid \
                and i.indisunique and i.indisvalid and i.indpred is null and i.indexprs is null) \
             from pg_catalog.pg_class c \
             join pg_catalog.pg_namespace n on n.oid = c.relnamespace where c.relkind = 'm'",
        )
        .await?;
    let mut states = HashMap::new();
    for row in &rows {
        let name = QualifiedName::new(row.str(0)?, row.str(1)?);
        states.insert(name, State { populated: row.bool(2)?, is_unique: row.bool(3)? });
    }
    Ok(states)
}
