//! A database that is read-only for a time, and its clients: what `--fence read-only` is made of.

use std::time::Duration;

use super::{Error, Result};
use crate::catalog::CLIENT;
use crate::id::{JobName, quote_ident, quote_literal};
use crate::pg::Session;

/// Ends every client session. An application's own name may begin with ours.
const TERMINATE_CLIENTS: &str = "select pid, pg_catalog.pg_terminate_backend(pid) \
     from pg_catalog.pg_stat_activity where datname = pg_catalog.current_database() \
     and {CLIENT}";

/// Clients that pg_terminate_backend would refuse to end for us.
const UNENDABLE: &str = "select pid, coalesce(r.rolname, '?'), m.rolname \
     from pg_catalog.pg_stat_activity a \
     left join pg_catalog.pg_roles r on r.oid = a.usesysid \
     join pg_catalog.pg_roles m on m.rolname = current_user and not m.rolsuper \
     where datname = pg_catalog.current_database() and {CLIENT} \
     and (r.rolsuper or not pg_catalog.pg_has_role(usesysid, 'usage') \
        and not pg_catalog.pg_has_role('pg_signal_backend', 'usage')) order by pid limit 1";

/// Ends client sessions, those begun since a time (or just before, as a login takes a while) or
/// all: sessions that are open keep their own setting. False if some are still there after a
/// second.
pub(super) async fn end_clients(session: &mut Session, since: Option<&str>) -> Result<bool> {
    let mut sql = TERMINATE_CLIENTS.replace("{CLIENT}", CLIENT);
    if let Some(since) = since {
        let since = quote_literal(since);
        sql.push_str(&format!(
            " and coalesce(backend_start > {since}::timestamptz - interval '1 minute', true)"
        ));
    }
    // One that was just starting may show itself late, so it takes two looks that find none.
    let mut empty = 0;
    for _ in 0..200 {
        empty = if session.query(&sql).await?.is_empty() { empty + 1 } else { 0 };
        if empty == 2 {
            return Ok(true);
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    Ok(false)
}

/// Sessions that are open keep their own setting, so a read-only database stops only those that
/// can be ended.
pub(super) async fn refuse_unendable(session: &mut Session) -> Result<()> {
    let Some(row) = session.query_opt(&UNENDABLE.replace("{CLIENT}", CLIENT), &[]).await? else {
        return Ok(());
    };
    Err(Error::NotEnded { pid: row.string(0)?, role: row.string(1)?, own: row.string(2)? })
}

/// How long opening a database again may wait for another job that is at the same notes.
const NOTES_WAIT: Duration = Duration::from_secs(3);

/// Begins a transaction that alone changes the notes on a read-only database. Clients may be held:
/// it must not wait for ever.
fn lock_notes(wait: Duration) -> String {
    format!(
        "begin; set local lock_timeout = {}; lock table walferry.read_only in exclusive mode",
        wait.as_millis().max(1)
    )
}

/// Makes the database read-only and keeps what it had before, which another job may know already.
pub(super) async fn shut_database(
    session: &mut Session,
    job: &JobName,
    wait: Duration,
) -> Result<()> {
    let outcome = async {
        session.execute(&lock_notes(wait)).await?;
        let (database, now) = default_of(session).await?;
        session
            .query_params(
                "insert into walferry.read_only select $1, case \
                    when exists (select 1 from walferry.read_only where opened_at is null) \
                    then (select before from walferry.read_only where opened_at is null limit 1) \
                    else $2 end \
                 on conflict (job) do nothing",
                &[Some(job.as_str()), now.as_deref()],
            )
            .await?;
        let sql = format!("alter database {database} set default_transaction_read_only = on");
        session.execute(&format!("{sql}; commit")).await?;
        Ok(())
    };
    let outcome = outcome.await;
    tidy(session).await?;
    outcome
}

/// How a database is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Opening {
    /// The note goes.
    ForGood,
    /// By a flip that may be undone: the note stays, with the time, for [`shut_again`].
    ByFlip,
}

/// True if the job has a note on a read-only database here, of those that `which` allows.
pub(super) async fn noted(session: &mut Session, job: &JobName, which: &str) -> Result<bool> {
    let there = "select pg_catalog.to_regclass('walferry.read_only') is not null";
    if !session.query_one(there, &[]).await?.bool(0)? {
        return Ok(false);
    }
    let mine = format!("select exists (select 1 from walferry.read_only where job = $1 {which})");
    Ok(session.query_one(&mine, &[Some(job.as_str())]).await?.bool(0)?)
}

/// Gives the database the default back that it had before a read-only fence of the job, unless
/// another job's stands there. Idempotent.
pub(super) async fn open_database(
    session: &mut Session,
    job: &JobName,
    opening: Opening,
) -> Result<()> {
    // Before the lock, which somebody else may hold: usually there is nothing to give back.
    if !noted(session, job, "").await? {
        return Ok(());
    }
    let change = match opening {
        Opening::ForGood => "delete from walferry.read_only where job = $1",
        Opening::ByFlip => {
            "update walferry.read_only set opened_at = clock_timestamp() \
             where job = $1 and opened_at is null"
        }
    };
    // RETURNING sees the table as it was: the job's own note is counted if it shuts the database.
    let ours_alone = "(select count(*) = 1 and bool_or(job = $1) from walferry.read_only \
                      where opened_at is null)";
    let outcome = async {
        session.execute(&lock_notes(NOTES_WAIT)).await?;
        let sql = format!("{change} returning before, {ours_alone}");
        let kept = session.query_opt(&sql, &[Some(job.as_str())]).await?;
        if let Some(kept) = kept.filter(|kept| kept.bool(1).unwrap_or(true)) {
            let sql = match kept.opt(0)? {
                Some(before) => format!("set {SETTING} = {}", quote_literal(before)),
                None => format!("reset {SETTING}"),
            };
            let (database, _) = default_of(session).await?;
            session.execute(&format!("alter database {database} {sql}")).await?;
        }
        session.execute("commit").await?;
        Ok(())
    };
    let outcome = outcome.await;
    tidy(session).await?;
    outcome
}

/// Makes a database read-only again that a flip had opened and then was undone, and ends the
/// sessions that began in between. Idempotent.
pub(super) async fn shut_again(session: &mut Session, job: &JobName) -> Result<()> {
    if !noted(session, job, "and opened_at is not null").await? {
        return Ok(());
    }
    let outcome = async {
        session.execute(&lock_notes(NOTES_WAIT)).await?;
        let (database, _) = default_of(session).await?;
        session.execute(&format!("alter database {database} set {SETTING} = on; commit")).await?;
        let sql = "select opened_at from walferry.read_only where job = $1 \
                   and opened_at is not null";
        if let Some(row) = session.query_opt(sql, &[Some(job.as_str())]).await?
            && !end_clients(session, Some(row.str(0)?)).await?
        {
            return Err(Error::NotShut { peer: session.peer().to_string() });
        }
        // Last: whoever repeats this after a crash has to end those sessions too.
        let sql = "update walferry.read_only set opened_at = null where job = $1";
        session.query_params(sql, &[Some(job.as_str())]).await?;
        Ok(())
    };
    let outcome = outcome.await;
    tidy(session).await?;
    outcome
}

/// Forgets that a flip opened the database: it was made, and the side is live for good.
pub(super) async fn forget_opened(session: &mut Session, job: &JobName) -> Result<()> {
    if noted(session, job, "and opened_at is not null").await? {
        let sql = "delete from walferry.read_only where job = $1 and opened_at is not null";
        session.query_params(sql, &[Some(job.as_str())]).await?;
    }
    Ok(())
}

const SETTING: &str = "default_transaction_read_only";

/// The database's quoted name, and its own default of [`SETTING`] if it has one.
async fn default_of(session: &mut Session) -> Result<(String, Option<String>)> {
    let row = session
        .query_one(
            "select d.datname, (select pg_catalog.split_part(c.s, '=', 2) \
                from pg_catalog.pg_db_role_setting r, pg_catalog.unnest(r.setconfig) c(s) \
                where r.setdatabase = d.oid and r.setrole = 0 \
                and pg_catalog.split_part(c.s, '=', 1) = $1) \
             from pg_catalog.pg_database d where d.datname = pg_catalog.current_database()",
            &[Some(SETTING)],
        )
        .await?;
    Ok((quote_ident(row.str(0)?), row.opt(1)?.map(str::to_string)))
}

/// Ends a transaction that an error left open.
pub(super) async fn tidy(session: &mut Session) -> Result<()> {
    if session.in_transaction() {
        session.execute("rollback").await?;
    }
    Ok(())
}
