//! A node with metadata, and our transaction there.

use std::time::Duration;

use super::shards::Group;
use super::{END_WAIT, Error, LOOK, Result};
use crate::clock::Deadline;
use crate::id::quote_literal;
use crate::pg::{self, Row, Session};

/// Longer than any flip holds writers; should our host fall silent before the swap is prepared, the
/// server lets them go on after it.
const SILENCE_MS: u64 = 30_000;

/// What becomes of a prepared transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ended {
    Committed,
    RolledBack,
}

/// The coordinator, or a worker with metadata.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) session: Session,
    gid: String,
    /// The group's shards that this node knows: all, or none where the tables are not synced here.
    known: bool,
    /// `lock_shard_metadata` is there.
    has_locks: bool,
    /// The rows are swapped in the transaction that is open.
    swapped: bool,
}

impl Node {
    pub(super) fn new(group: i32, session: Session, gid: String) -> Node {
        let gid = format!("{gid}_{group}");
        Node { session, gid, known: true, has_locks: true, swapped: false }
    }

    fn wrong(&self, doing: &str) -> impl Fn(pg::Error) -> Error + use<> {
        let doing = doing.to_string();
        move |source| Error::Router { doing: doing.clone(), source }
    }

    fn setup(&self, detail: String) -> Error {
        Error::Setup { peer: self.session.peer().to_string(), detail }
    }

    /// Group, host and port of the primary workers that have metadata.
    pub(super) async fn others(&mut self) -> Result<Vec<(i32, String, u16)>> {
        let wrong = self.wrong("reading pg_dist_node");
        let sql = "select n.groupid, n.nodename, n.nodeport, \
             coalesce((pg_catalog.to_jsonb(n) ->> 'metadatasynced')::bool, true) \
             from pg_catalog.pg_dist_node n \
             where n.noderole = 'primary' and n.isactive and n.groupid <> 0 \
             and coalesce((pg_catalog.to_jsonb(n) ->> 'hasmetadata')::bool, false) \
             order by n.groupid";
        let mut others = Vec::new();
        for row in self.session.query(sql).await.map_err(&wrong)? {
            let (host, port) = (row.string(1).map_err(&wrong)?, row.parse(2).map_err(&wrong)?);
            if !row.bool(3).map_err(&wrong)? {
                return Err(self.setup(format!(
                    "the metadata of node {host}:{port} is not in step with the coordinator's: \
                     select start_metadata_sync_to_node({}, {port}) there, and see that it ends",
                    quote_literal(&host)
                )));
            }
            others.push((row.parse(0).map_err(&wrong)?, host, port));
        }
        Ok(others)
    }

    /// The node can take part: its rows are those of the coordinator, nothing of an earlier flip is
    /// left, and transactions may be prepared.
    pub(super) async fn expect(&mut self, group: &Group) -> Result<()> {
        let wrong = self.wrong("reading placements");
        let sql = format!(
            "select count(*) filter (where l.groupid = {}), count(*), \
             pg_catalog.to_regprocedure('pg_catalog.lock_shard_metadata(integer,bigint[])') \
                is not null, \
             pg_catalog.current_setting('max_prepared_transactions')::int, \
             (select min(gid) from pg_catalog.pg_prepared_xacts where gid = {}), \
             pg_catalog.has_table_privilege('pg_catalog.pg_dist_placement', 'update'), \
             current_user \
             from pg_catalog.pg_dist_placement l where l.shardstate <> 4 and l.shardid = any ({})",
            group.from,
            quote_literal(&self.gid),
            group.array()
        );
        let row = self.session.query_one(&sql, &[]).await.map_err(&wrong)?;
        let (right, all): (usize, usize) =
            (row.parse(0).map_err(&wrong)?, row.parse(1).map_err(&wrong)?);
        self.known = all > 0;
        self.has_locks = row.bool(2).map_err(&wrong)?;
        if self.known && (right, all) != (group.shards.len(), group.shards.len()) {
            return Err(self.setup(format!(
                "its pg_dist_placement has {right} of the {} shards on group {}, and the \
                 coordinator all: bring the metadata in step first (start_metadata_sync_to_node)",
                group.shards.len(),
                group.from
            )));
        }
        if row.parse::<i64>(3).map_err(&wrong)? == 0 {
            return Err(self.setup(
                "no transaction can be prepared here: alter system set max_prepared_transactions \
                 = 100; -- and restart the server"
                    .to_string(),
            ));
        }
        if !row.bool(5).map_err(&wrong)? {
            return Err(self.setup(format!(
                "role \"{}\" may not update pg_dist_placement: give the route a superuser's URI",
                row.str(6).map_err(&wrong)?
            )));
        }
        match row.opt(4).map_err(&wrong)? {
            Some(gid) => Err(self.setup(format!(
                "transaction {gid} of an earlier switch is still prepared: let walferry run end it"
            ))),
            None => Ok(()),
        }
    }

    /// Refuses to queue behind a transaction that has been open for longer than `wait`, as others
    /// would then queue behind us for nothing.
    pub(super) async fn look_out(&mut self, group: &Group, wait: Duration) -> Result<()> {
        let Some((index, colocation)) = group.lock.filter(|_| self.has_locks && self.known) else {
            return Ok(());
        };
        let wrong = self.wrong("looking for open transactions");
        let sql = format!(
            "select pg_catalog.string_agg('pid ' || a.pid || ' (' || coalesce(a.usename, '?') \
             || ') in a transaction for ' || extract(epoch from pg_catalog.clock_timestamp() \
                - a.xact_start)::int8 || ' s', '; ') \
             from pg_catalog.pg_locks l join pg_catalog.pg_stat_activity a on a.pid = l.pid \
             where l.locktype = 'advisory' and l.granted and l.objsubid = 8 \
             and l.classid = {index} and l.objid = {colocation} \
             and l.database = (select oid from pg_catalog.pg_database \
                where datname = pg_catalog.current_database()) \
             and a.xact_start < pg_catalog.clock_timestamp() - interval '{} ms'",
            wait.as_millis()
        );
        let row = self.session.query_one(&sql, &[]).await.map_err(&wrong)?;
        match row.opt(0).map_err(&wrong)? {
            Some(blockers) => Err(self.held(blockers)),
            None => Ok(()),
        }
    }

    fn held(&self, blockers: &str) -> Error {
        let peer = self.session.peer().to_string();
        Error::Held { peer, blockers: blockers.to_string() }
    }

    /// Begins the transaction and takes the locks; gives what it answers to `then`, which is asked
    /// in the same message, once they are held.
    pub(super) async fn lock(
        &mut self,
        group: &Group,
        left: Duration,
        then: &str,
    ) -> Result<Vec<Row>> {
        if !self.known {
            return Ok(Vec::new());
        }
        let locks = match self.has_locks {
            // 7 is ExclusiveLock.
            true => format!("select pg_catalog.lock_shard_metadata(7, {})", group.locked()),
            false => format!("lock table {} in exclusive mode", group.tables.join(", ")),
        };
        let sql = format!(
            "begin; set local lock_timeout = {}; set local idle_in_transaction_session_timeout = \
             {SILENCE_MS}; {locks}; set local lock_timeout = 0; {then}",
            left.as_millis().max(1)
        );
        self.swapped = false;
        match self.session.query(&sql).await {
            // The function that locks answers too: one column.
            Ok(rows) => Ok(rows.into_iter().filter(|row| row.len() > 1).collect()),
            Err(error) if matches!(error.code(), Some("55P03" | "40P01")) => {
                Err(self.held("transactions that write to these shards"))
            }
            Err(error) => Err(self.wrong("locking the shards' metadata")(error)),
        }
    }

    /// Swaps the rows, which nobody sees yet.
    pub(super) async fn swap(&mut self, group: &Group) -> Result<()> {
        if !self.known || self.swapped {
            return Ok(());
        }
        let wrong = self.wrong("swapping placements");
        let sql = format!(
            "update pg_catalog.pg_dist_placement set groupid = {} \
             where groupid = {} and shardstate <> 4 and shardid = any ({})",
            group.to,
            group.from,
            group.array()
        );
        let count = self.session.execute(&sql).await.map_err(&wrong)?;
        if usize::try_from(count).ok() != Some(group.shards.len()) {
            return Err(self.setup(format!(
                "{count} placements of {} were on group {}: somebody else moves these shards",
                group.shards.len(),
                group.from
            )));
        }
        self.swapped = true;
        Ok(())
    }

    /// Prepares the transaction with the swap in it.
    pub(super) async fn prepare(&mut self, group: &Group) -> Result<()> {
        self.swap(group).await?;
        if self.known {
            let wrong = self.wrong("preparing the swap of placements");
            let prepare = format!("prepare transaction {}", quote_literal(&self.gid));
            self.session.execute(&prepare).await.map_err(&wrong)?;
        }
        Ok(())
    }

    /// Ends a transaction that is not prepared.
    pub(super) async fn let_go(&mut self) -> Result<()> {
        if self.session.in_transaction() {
            let wrong = self.wrong("letting writers go on");
            self.session.execute("rollback").await.map_err(wrong)?;
        }
        Ok(())
    }

    /// Ends the prepared transaction; nothing if there is none.
    pub(super) async fn end(&mut self, how: Ended) -> Result<()> {
        let verb = if how == Ended::Committed { "commit" } else { "rollback" };
        let sql = format!("{verb} prepared {}", quote_literal(&self.gid));
        let deadline = Deadline::after(END_WAIT);
        loop {
            match self.session.execute(&sql).await {
                Ok(_) => return Ok(()),
                // There is none, or no more.
                Err(error) if error.code() == Some("42704") => return Ok(()),
                // Another session is at it.
                Err(error) if error.code() == Some("55000") && !deadline.passed() => {
                    tokio::time::sleep(LOOK).await;
                }
                Err(error) => return Err(self.wrong(&sql)(error)),
            }
        }
    }

    /// Ends sessions of ours that were given up, in this process or one before it, and waits until
    /// they are gone: one of them may be about to prepare its transaction.
    pub(super) async fn end_predecessors(&mut self) -> Result<()> {
        let wrong = self.wrong("ending sessions of an earlier try");
        let sql = "select pg_catalog.pg_terminate_backend(pid) from pg_catalog.pg_stat_activity \
             where application_name = pg_catalog.current_setting('application_name') \
             and datname = pg_catalog.current_database() and pid <> pg_catalog.pg_backend_pid()";
        let deadline = Deadline::after(END_WAIT);
        while !self.session.query(sql).await.map_err(&wrong)?.is_empty() {
            if deadline.passed() {
                return Err(self.setup(
                    "sessions of an earlier try do not end; see application_name in \
                     pg_stat_activity"
                        .to_string(),
                ));
            }
            tokio::time::sleep(LOOK).await;
        }
        Ok(())
    }
}
