//! What is going on on the source: transactions in the way of a slot, sizes, and the WAL that will
//! wait for the copy to end.

use std::time::{Duration, Instant};

use crate::lsn::Lsn;
use crate::pg;

use super::end::End;
use super::finding::{Level, bytes, seconds};
use super::{Check, CheckOptions, Finding, Side};

/// A position of the source's log and when it was read. `None` on a standby.
pub(super) struct Sample {
    lsn: Option<Lsn>,
    at: Instant,
}

impl Sample {
    pub async fn take(source: &mut End) -> pg::Result<Sample> {
        let mut lsn = None;
        if !source.facts.in_recovery {
            let sql = "select pg_catalog.pg_current_wal_lsn()";
            lsn = Some(source.session.query_one(sql, &[]).await?.lsn(0)?);
        }
        Ok(Sample { lsn, at: Instant::now() })
    }

    /// Bytes a second from `self` to `later`.
    fn rate(&self, later: &Sample) -> f64 {
        let (Some(first), Some(last)) = (self.lsn, later.lsn) else { return 0.0 };
        let elapsed = later.at.duration_since(self.at).as_secs_f64().max(0.001);
        last.bytes_since(first) as f64 / elapsed
    }
}

impl Check<'_> {
    pub(super) async fn traffic(&mut self, start: Sample) -> pg::Result<()> {
        for side in [Side::Source, Side::Target] {
            if side == Side::Source || self.options.reverse {
                let options = self.options;
                let found = transactions(self.end(side), options).await;
                self.take(side, "transactions", found)?;
                if options.brought && side == Side::Target {
                    // What came along is to be ended in one way only.
                    continue;
                }
                let found = prepared(self.end(side), options).await;
                self.take(side, "prepared transactions", found)?;
            }
        }
        let has_limit = self.source.number("max_slot_wal_keep_size") >= 0
            && self.source.setting("max_slot_wal_keep_size").is_some();
        if has_limit || !self.options.sample_only_for_limit {
            let wait = self.options.wal_sample.saturating_sub(start.at.elapsed());
            tokio::time::sleep(wait).await;
        }
        let end = Sample::take(&mut self.source).await?;
        self.forecast(start.rate(&end));
        if self.begun.is_none() && !self.options.brought {
            let found = super::disk::room(&self.target, self.bytes_to_copy().1).await;
            self.findings.extend(found);
        }
        Ok(())
    }

    /// How many tables are to be copied, and their bytes.
    fn bytes_to_copy(&self) -> (u64, u64) {
        let selected = self.tables.iter().filter(|t| self.options.selection.has_rows(&t.name));
        selected.fold((0, 0), |(count, bytes), table| (count + 1, bytes + table.bytes))
    }

    /// Sizes, and whether the slot's WAL fits while the copy runs.
    fn forecast(&mut self, wal_per_second: f64) {
        let (count, total) = self.bytes_to_copy();
        let facts = &self.source.facts;
        let speed = self.options.copy_bytes_per_second.max(1);
        let copy_seconds = total as f64 / speed as f64;
        let message = format!(
            "{} in all; {count} tables of {} to copy, about {} at {} a second; the target needs as \
             much free disk, and the WAL of writing it",
            bytes(facts.database_bytes),
            bytes(total),
            seconds(copy_seconds),
            bytes(speed)
        );
        let object = format!("database {}", facts.dbname);
        self.findings.push(Finding::info(Side::Source, "size", object, message));
        let needed = (wal_per_second * copy_seconds) as u64;
        let limit_mb = self.source.number("max_slot_wal_keep_size");
        let has_limit = self.source.setting("max_slot_wal_keep_size").is_some() && limit_mb >= 0;
        let measured = format!(
            "{} of WAL a second now: the slot will hold about {} while the copy runs",
            bytes(wal_per_second as u64),
            bytes(needed)
        );
        let object = "max_slot_wal_keep_size";
        let limit = (limit_mb.max(0) as u64) << 20;
        // The copy's time is a guess and traffic has peaks: half the limit is too close.
        if !has_limit || needed.saturating_mul(2) <= limit {
            let message = format!("{measured}; that much disk must be free on the source");
            self.findings.push(Finding::info(Side::Source, "wal-forecast", object, message));
            return;
        }
        let level = if needed > limit { Level::Error } else { Level::Warning };
        let room = (needed.saturating_mul(3) >> 30) + 1;
        let message = format!("{measured}, and is invalidated at {}", bytes(limit));
        let fix = format!(
            "ALTER SYSTEM SET max_slot_wal_keep_size = '{room}GB';\nSELECT pg_reload_conf();"
        );
        let finding = Finding::error(Side::Source, "wal-forecast", object, message);
        self.findings.push(finding.at(level).fix(fix));
    }
}

/// Creating a slot waits for every transaction of the server that has an xid, of any database.
///
/// <https://www.postgresql.org/docs/current/logicaldecoding-explanation.html>
async fn transactions(end: &mut End, options: &CheckOptions) -> pg::Result<Vec<Finding>> {
    let sql = format!(
        "select pid, backend_xid, \
         coalesce(extract(epoch from pg_catalog.clock_timestamp() - xact_start), 0)::float8, \
         coalesce(datname::text, '?'), coalesce(usename::text, '?'), coalesce(state, '?'), \
         coalesce(query_start::text, '?'), pg_catalog.left(query, 200) \
         from pg_catalog.pg_stat_activity where backend_xid is not null \
         and pid <> pg_catalog.pg_backend_pid() \
         and (xact_start is null or xact_start < pg_catalog.clock_timestamp() - interval '{} ms') \
         order by xact_start",
        options.transaction_age.as_millis()
    );
    let mut findings = Vec::new();
    for row in end.session.query(&sql).await? {
        let (pid, xid) = (row.str(0)?, row.str(1)?);
        let message = format!(
            "transaction {xid} of {}@{}, {} old, {}, query since {}: {}; a slot cannot be made \
             before it ends",
            row.str(4)?,
            row.str(3)?,
            seconds(row.parse(2)?),
            row.str(5)?,
            row.str(6)?,
            row.opt(7)?.unwrap_or("?")
        );
        let fix = format!("SELECT pg_terminate_backend({pid});");
        let object = format!("process {pid}");
        findings.push(Finding::warning(end.side, "long-transaction", object, message).fix(fix));
    }
    Ok(findings)
}

async fn prepared(end: &mut End, options: &CheckOptions) -> pg::Result<Vec<Finding>> {
    let sql = "select gid, transaction::text, database::text, owner::text, \
         extract(epoch from pg_catalog.clock_timestamp() - prepared)::float8, \
         pg_catalog.quote_literal(gid) \
         from pg_catalog.pg_prepared_xacts order by prepared";
    let mut findings = Vec::new();
    for row in end.session.query(sql).await? {
        let age = Duration::from_secs_f64(row.parse::<f64>(4)?.max(0.0));
        let level = if age > options.prepared_age { Level::Error } else { Level::Warning };
        let message = format!(
            "transaction {} of {}@{}, prepared {} ago; a slot cannot be made before it is \
             committed or rolled back, in its database",
            row.str(1)?,
            row.str(3)?,
            row.str(2)?,
            seconds(age.as_secs_f64())
        );
        let fix = format!("ROLLBACK PREPARED {0};\n-- or: COMMIT PREPARED {0};", row.str(5)?);
        let object = format!("prepared transaction {}", row.str(0)?);
        let finding = Finding::warning(end.side, "prepared-transaction", object, message);
        findings.push(finding.at(level).fix(fix));
    }
    Ok(findings)
}
