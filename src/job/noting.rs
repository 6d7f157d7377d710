//! Triggers of a job of two ways, on both sides: they note what no row tells any more, and refuse
//! TRUNCATE.
//!
//! A row that an application deleted, or whose key it changed, is noted by its key
//! (`walferry.two_way_deleted`). Where a column's values settle conflicts, so is the value that an
//! application lowers or deletes (`walferry.two_way_left`; why, says `apply::conflict`). Both are
//! notes of the transaction that does it, and are gone with it.
//!
//! What a stream writes is noted where its session may not switch triggers off; such notes are told
//! from others by their xid.

use std::collections::HashMap;

use super::Result;
use super::run::JobConfig;
use super::store::Store;
use super::two_way::TURN;
use crate::apply::conflict::{Weight, weights};
use crate::catalog::{Selection, Table, tables};
use crate::id::{JobName, QualifiedName, quote_ident, quote_literal};
use crate::pg::Session;

/// A lock that is needed for a trigger is asked for again rather than let writers queue behind it.
const LOCK_TRIES: u32 = 30;

/// Arguments are the key's columns; behind an empty one, the column whose values settle conflicts.
/// Settings are those of the sessions that look for what is noted.
const FUNCTION: &str = "create or replace function {function}() returns trigger language plpgsql \
     security definer set search_path = pg_catalog set timezone = 'UTC' set bytea_output = 'hex' \
     set extra_float_digits = 3 set intervalstyle = 'postgres' \
     as $two_way$ declare key jsonb := '{}'; was jsonb; gone boolean := tg_op = 'DELETE'; begin \
     if tg_op = 'TRUNCATE' then \
       raise exception 'TRUNCATE of %.% is refused while walferry writes it in two ways', \
         tg_table_schema, tg_table_name using errcode = 'object_not_in_prerequisite_state', \
         hint = 'Delete the rows, or end the job with walferry finish.'; \
     end if; \
     was := to_jsonb(old); \
     for i in 0 .. tg_nargs - 1 loop \
       exit when tg_argv[i] = ''; \
       key := key || jsonb_build_object(tg_argv[i], was ->> tg_argv[i]); \
       if tg_op = 'UPDATE' and not gone then \
         gone := was -> tg_argv[i] is distinct from to_jsonb(new) -> tg_argv[i]; \
       end if; \
     end loop; \
     if gone then \
       insert into walferry.two_way_deleted (relation, key) values (tg_relid, key); \
     end if; \
     if tg_nargs > 1 and tg_argv[tg_nargs - 2] = '' then \
       insert into walferry.two_way_left (relation, key, value, xid) \
         values (tg_relid, key, was ->> tg_argv[tg_nargs - 1], old.xmin); \
     end if; \
     return null; end $two_way$";

/// Makes the triggers of both sides anew if they are to note another column's values.
///
/// No stream may be running: what is written before the first of them is in no conflict.
pub(super) async fn settle(
    config: &JobConfig,
    store: &mut Store,
    source: &mut Session,
) -> Result<()> {
    let job = config.job.to_string();
    let sql = "select armed, coalesce(noted, '') from walferry.job where name = $1";
    let row = store.session.query_one(sql, &[Some(&job)]).await?;
    let wanted = column(config).unwrap_or_default();
    if !row.bool(0)? || row.str(1)? == wanted {
        return Ok(());
    }
    // From here on neither column is noted for certain.
    noted(store, &job, "").await?;
    let selection = config.options.selection(source).await?;
    guard_both(config, &selection).await?;
    noted(store, &job, wanted).await
}

/// Makes the triggers of both sides, and writes down which column's values they note.
pub(super) async fn begin(
    config: &JobConfig,
    store: &mut Store,
    selection: &Selection,
) -> Result<()> {
    guard_both(config, selection).await?;
    noted(store, config.job.as_str(), column(config).unwrap_or_default()).await
}

fn column(config: &JobConfig) -> Option<&str> {
    config.two_way.as_ref().and_then(|policy| policy.column())
}

async fn noted(store: &mut Store, job: &str, column: &str) -> Result<()> {
    let sql = "update walferry.job set noted = nullif($2, '') where name = $1";
    store.session.query_params(sql, &[Some(job), Some(column)]).await?;
    Ok(())
}

async fn guard_both(config: &JobConfig, selection: &Selection) -> Result<()> {
    for side in [&config.source, &config.target] {
        let mut session = Session::control(side).await?;
        let mut tables = tables(&mut session, selection).await?;
        tables.retain(|table| selection.has_rows(&table.name) && !table.unlogged);
        guard(&mut session, &config.job, &tables, column(config)).await?;
    }
    Ok(())
}

/// Makes the triggers of one side.
async fn guard(
    session: &mut Session,
    job: &JobName,
    tables: &[Table],
    column: Option<&str>,
) -> Result<()> {
    let function = function(job);
    session.execute(&FUNCTION.replace("{function}", &function)).await?;
    let names: Vec<QualifiedName> = tables.iter().map(|table| table.name.clone()).collect();
    let weights = match column {
        Some(column) => weights(session, &names, column).await?,
        None => HashMap::new(),
    };
    for table in tables.iter().filter(|table| !table.key.is_empty()) {
        let falls = column.zip(weights.get(&table.name));
        insist(session, &triggers(job, table, falls)).await?;
    }
    Ok(())
}

/// The transaction that makes a table's triggers. `column`: the one whose values settle its
/// conflicts.
fn triggers(job: &JobName, table: &Table, column: Option<(&str, &Weight)>) -> String {
    let function = function(job);
    let name = |what: &str| quote_ident(&format!("walferry_{job}_{what}"));
    let (gone, moved, truncated) = (name("gone"), name("moved"), name("truncated"));
    let (fell, on) = (name("fell"), table.name.quoted());
    let mut arguments: Vec<String> = table.key.iter().map(|k| quote_literal(k)).collect();
    arguments.extend(column.iter().flat_map(|(c, _)| ["''".to_string(), quote_literal(c)]));
    let row = |of: &str| {
        let columns = table.key.iter().map(|k| format!("{of}.{}", quote_ident(k)));
        columns.collect::<Vec<_>>().join(", ")
    };
    let (arguments, old, new) = (arguments.join(", "), row("old"), row("new"));
    let falls = column.and_then(|(column, weight)| weight.falls(column));
    let falls = falls.map_or(String::new(), |falls| {
        format!(
            "create trigger {fell} after update on {on} for each row \
             when (({old}) is not distinct from ({new}) and ({falls})) \
             execute procedure {function}({arguments}); "
        )
    });
    format!(
        "begin; set local lock_timeout = '1s'; set local client_min_messages = error; \
         drop trigger if exists {gone} on {on}; drop trigger if exists {moved} on {on}; \
         drop trigger if exists {truncated} on {on}; drop trigger if exists {fell} on {on}; \
         create trigger {gone} after delete on {on} for each row \
         execute procedure {function}({arguments}); \
         create trigger {moved} after update on {on} for each row \
         when (({old}) is distinct from ({new})) execute procedure {function}({arguments}); \
         {falls}create trigger {truncated} before truncate on {on} for each statement \
         execute procedure {function}(); commit"
    )
}

/// Runs a transaction that asks for a lock, again and again where somebody holds it.
pub(super) async fn insist(session: &mut Session, sql: &str) -> Result<()> {
    for tries in 1.. {
        let Err(error) = session.execute(sql).await else { return Ok(()) };
        if session.in_transaction() {
            session.execute("rollback").await?;
        }
        if error.code() != Some("55P03") || tries >= LOCK_TRIES {
            return Err(error.into());
        }
        tokio::time::sleep(TURN / 5).await;
    }
    Ok(())
}

/// Takes the function from a side, and the triggers with it. Harmless if there is none.
pub(super) async fn remove(session: &mut Session, job: &JobName) -> Result<()> {
    let sql = format!(
        "begin; set local lock_timeout = '1s'; set local client_min_messages = error; \
         drop function if exists {}() cascade; commit",
        function(job)
    );
    let schema = "select pg_catalog.to_regnamespace('walferry') is not null";
    if session.query_one(schema, &[]).await?.bool(0)? {
        insist(session, &sql).await?;
    }
    Ok(())
}

fn function(job: &JobName) -> String {
    format!("walferry.{}", quote_ident(&format!("two_way_{job}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_function_is_the_jobs_own_and_its_text_has_one_place_for_it() {
        let job: JobName = "a_b".parse().unwrap();
        assert_eq!(function(&job), "walferry.\"two_way_a_b\"");
        assert_eq!(FUNCTION.matches("{function}").count(), 1);
    }
}
