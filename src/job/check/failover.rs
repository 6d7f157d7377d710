//! What it takes that a promoted standby of the source goes on with our slot: 17 and newer, and
//! four settings, three of them on the standby.
//!
//! <https://www.postgresql.org/docs/current/logical-replication-failover.html>

use super::finding::Finding;
use super::{Check, Side};
use crate::id::quote_literal;
use crate::job::failover::{FAILOVER_SLOTS, Failover};
use crate::pg::config::TargetSessionAttrs;
use crate::pg::{self, Purpose, Session};

const CODE: &str = "failover";

impl Check<'_> {
    /// Nothing where the source has no standby, as far as can be seen.
    pub(super) async fn failover(&mut self) -> pg::Result<()> {
        let (wanted, major) = (self.options.failover, self.source.major_version());
        if wanted == Failover::Off {
            return Ok(());
        }
        let object = "slots of standbys";
        if wanted == Failover::On && major < FAILOVER_SLOTS {
            let message = format!(
                "standbys of release {major} keep no logical slots, {FAILOVER_SLOTS} is the first: \
                 after a failover walferry run --after-failover refill goes on"
            );
            let found = Finding::error(Side::Source, CODE, object, message);
            self.findings.push(found.fix("--failover off"));
            return Ok(());
        }
        if major < FAILOVER_SLOTS {
            return Ok(());
        }
        let found = unsynchronized(&mut self.source.session).await;
        self.take(Side::Source, "standbys", found)?;
        if self.source.config.hosts.len() > 1 {
            let mut config = self.source.config.clone();
            config.target_session_attrs = TargetSessionAttrs::Standby;
            // Which of the hosts are standbys nobody promised.
            if let Ok(mut standby) = Session::connect(&config, Purpose::Sql).await {
                let found = standby_settings(&mut standby).await;
                self.take(Side::Source, "the standby", found)?;
            }
        }
        Ok(())
    }
}

/// Standbys that the server would not wait for before it sends a change.
async fn unsynchronized(source: &mut Session) -> pg::Result<Vec<Finding>> {
    let sql = "select pg_catalog.current_setting('synchronized_standby_slots'), \
         coalesce((select pg_catalog.string_agg(slot_name, ',' order by slot_name) \
           from pg_catalog.pg_replication_slots where slot_type = 'physical' and active), ''), \
         (select pg_catalog.count(*) from pg_catalog.pg_stat_replication r \
           where r.state = 'streaming' and not exists (select \
             from pg_catalog.pg_replication_slots s where s.active_pid = r.pid))";
    let row = source.query_one(sql, &[]).await?;
    let (waited, slots, without): (&str, &str, u64) = (row.str(0)?, row.str(1)?, row.parse(2)?);
    let mut found = Vec::new();
    // Names of slots need no quotes.
    let waited: Vec<&str> = waited.split(',').map(str::trim).filter(|s| !s.is_empty()).collect();
    let slots = slots.split(',').filter(|s| !s.is_empty());
    let missing: Vec<&str> = slots.filter(|slot| !waited.contains(slot)).collect();
    if !missing.is_empty() {
        let message = "changes are sent before this standby has them: were it promoted then, the \
             target would have what the source has lost (that is found, and mended with \
             --after-failover refill)";
        let all = [waited.as_slice(), missing.as_slice()].concat();
        let fix = format!(
            "ALTER SYSTEM SET synchronized_standby_slots = {};\nSELECT pg_reload_conf();",
            quote_literal(&all.join(", "))
        );
        let slot = missing.join(", ");
        found.push(Finding::warning(Side::Source, CODE, format!("slot {slot}"), message).fix(fix));
    }
    if without > 0 {
        let message = format!(
            "{without} walsender{} no slot: a standby that is fed so cannot synchronize slots",
            if without == 1 { " uses" } else { "s use" }
        );
        found.push(Finding::info(Side::Source, CODE, "standbys", message));
    }
    Ok(found)
}

/// What a standby needs so that the slot is there, and in sync, when it is promoted.
async fn standby_settings(standby: &mut Session) -> pg::Result<Vec<Finding>> {
    let sql = "select pg_catalog.current_setting('sync_replication_slots') = 'on', \
         pg_catalog.current_setting('hot_standby_feedback') = 'on', \
         pg_catalog.current_setting('primary_slot_name') <> '', \
         (select setting from pg_catalog.pg_settings where name = 'primary_conninfo')";
    let row = standby.query_one(sql, &[]).await?;
    let object = format!("standby {}", standby.peer());
    let mut found = Vec::new();
    let reload = "SELECT pg_reload_conf();";
    for (column, message, statement) in [
        (
            0,
            "it does not keep copies of the source's logical slots",
            "ALTER SYSTEM SET sync_replication_slots = on;",
        ),
        (
            1,
            "the source does not hear what rows its slots need: they would be invalidated",
            "ALTER SYSTEM SET hot_standby_feedback = on;",
        ),
        (
            2,
            "it is fed without a slot on the source, which synchronizing slots takes",
            "ALTER SYSTEM SET primary_slot_name = 'SLOT'; -- one made on the source by \
             pg_create_physical_replication_slot('SLOT')",
        ),
    ] {
        if !row.bool(column)? {
            let fix = format!("{statement}\n{reload}");
            found.push(Finding::warning(Side::Source, CODE, object.clone(), message).fix(fix));
        }
    }
    // Only superusers and members of pg_read_all_settings see it.
    if row.opt(3)?.is_some_and(|conninfo| !conninfo.is_empty() && !conninfo.contains("dbname")) {
        let message = "its primary_conninfo names no dbname, which synchronizing slots takes";
        let fix = "-- add dbname=postgres to primary_conninfo of the standby, then\n".to_string();
        found.push(Finding::warning(Side::Source, CODE, object, message).fix(fix + reload));
    }
    Ok(found)
}
