//! What it takes that a slot can be kept on a standby that was given by `--standby` or
//! `--decode-from`; and Patroni, which drops slots that it does not know.
//!
//! <https://www.postgresql.org/docs/16/logicaldecoding-explanation.html#LOGICALDECODING-REPLICATION-SLOTS>,
//! <https://patroni.readthedocs.io/en/latest/dynamic_configuration.html>

use super::finding::{Finding, Level};
use super::{Check, Side};
use crate::id::Stream;
use crate::job::failover::{FAILOVER_SLOTS, Failover};
use crate::job::standbys::{STANDBY_SLOTS, SYNCHRONIZED, place, too_old};
use crate::pg::{self, Config, Purpose, Session};

const CODE: &str = "standby-slot";

impl Check<'_> {
    /// Each standby that was given.
    pub(super) async fn standbys(&mut self) -> pg::Result<()> {
        let (options, major) = (self.options, self.source.major_version());
        let failover = options.failover.kind(major, options.two_phase);
        for standby in &options.standbys {
            let object = format!("standby {}", place(standby));
            if major >= FAILOVER_SLOTS && failover == pg::SlotKind::Failover {
                self.findings.push(Finding::error(Side::Source, CODE, object, SYNCHRONIZED));
                continue;
            }
            if major < STANDBY_SLOTS {
                let fix = "leave --standby out";
                let found = Finding::error(Side::Source, CODE, object, too_old(major)).fix(fix);
                self.findings.push(found);
                continue;
            }
            let system = self.source.facts.system_identifier.clone();
            match look(standby, &object, system.as_deref()).await {
                Ok(found) => self.findings.extend(found),
                Err(error) => {
                    let message = format!("cannot be asked: {error}");
                    self.findings.push(Finding::error(Side::Source, CODE, object, message));
                }
            }
        }
        self.decoded_from(major).await?;
        let hint = options.decode_from.is_none()
            && options.standbys.is_empty()
            && options.failover != Failover::Off;
        if hint && major < FAILOVER_SLOTS {
            self.standbys_seen(major).await?;
        }
        let found = patroni(&mut self.source.session, &options.job.object(Stream::Forward)).await;
        self.take(Side::Source, "Patroni", found)
    }

    /// The standby that is to have the slot, and to send.
    async fn decoded_from(&mut self, major: u32) -> pg::Result<()> {
        let (options, begun) = (self.options, self.begun.is_some());
        let Some(standby) = &options.decode_from else { return Ok(()) };
        let object = format!("standby {}", place(standby));
        if major < STANDBY_SLOTS {
            let message = format!(
                "standbys of release {major} do not decode, {STANDBY_SLOTS} is the first: leave \
                 --decode-from out"
            );
            self.findings.push(Finding::error(Side::Source, CODE, object, message));
            return Ok(());
        }
        let system = self.source.facts.system_identifier.clone();
        let looked = async {
            let mut found = look(standby, &object, system.as_deref()).await?;
            if begun {
                // It has its slot, or was promoted with it: the stream tells.
                found.retain(|finding| finding.level != Level::Error);
            }
            Session::connect(standby, Purpose::Replication).await?;
            Ok::<_, pg::Error>(found)
        };
        match looked.await {
            Ok(found) => self.findings.extend(found),
            Err(error) => {
                let message = format!("cannot be decoded from: {error}");
                self.findings.push(Finding::error(Side::Source, CODE, object, message));
            }
        }
        Ok(())
    }

    /// Before 17 nobody keeps the slot on a standby by itself.
    async fn standbys_seen(&mut self, major: u32) -> pg::Result<()> {
        let sql = "select pg_catalog.count(*) from pg_catalog.pg_stat_replication r \
             where r.state = 'streaming' and not exists (select \
               from pg_catalog.pg_replication_slots s \
               where s.active_pid = r.pid and s.slot_type = 'logical')";
        let seen: i64 = match self.source.session.query_one(sql, &[]).await {
            Ok(row) => row.parse(0)?,
            Err(error) if error.is_closed() => return Err(error),
            Err(_) => return Ok(()),
        };
        if seen == 0 {
            return Ok(());
        }
        let what = match major {
            STANDBY_SLOTS.. => "--standby URI keeps one there",
            _ => {
                "its release cannot: what a failover loses is found, and read again by \
                 --after-failover refill"
            }
        };
        let message = format!("a standby that is promoted has no slot of the job; {what}");
        self.findings.push(Finding::info(Side::Source, CODE, "standbys", message));
        Ok(())
    }
}

async fn look(standby: &Config, object: &str, system: Option<&str>) -> pg::Result<Vec<Finding>> {
    let config = standby.clone().labelled("standby");
    let mut session = Session::connect(&config, Purpose::Sql).await?;
    let sql = "select pg_catalog.pg_is_in_recovery(), \
         pg_catalog.current_setting('wal_level') = 'logical', \
         pg_catalog.current_setting('hot_standby_feedback') = 'on', \
         pg_catalog.current_setting('primary_slot_name') <> '', \
         pg_catalog.current_setting('max_replication_slots')::int > \
           (select count(*) from pg_catalog.pg_replication_slots), \
         (select s.system_identifier::text from pg_catalog.pg_control_system() s)";
    let row = session.query_one(sql, &[]).await?;
    let (error, warning) = (
        |message: &str| Finding::error(Side::Source, CODE, object, message),
        |message: &str| Finding::warning(Side::Source, CODE, object, message),
    );
    if !row.bool(0)? {
        return Ok(vec![error("is no standby: give those of now")]);
    }
    if system.is_some_and(|system| row.opt(5).ok().flatten() != Some(system)) {
        return Ok(vec![error("is a standby of another server than the source")]);
    }
    let mut found = Vec::new();
    if !row.bool(1)? {
        let fix = "-- on the standby, then restart it:\nALTER SYSTEM SET wal_level = logical;";
        found.push(error("has wal_level below logical, and can have no logical slot").fix(fix));
    }
    if !row.bool(4)? {
        let fix = "-- on the standby: raise max_replication_slots, and restart it";
        found.push(error("has no replication slot free").fix(fix));
    }
    let reload = "\nSELECT pg_reload_conf();";
    if !row.bool(2)? {
        let fix = "-- on the standby:\nALTER SYSTEM SET hot_standby_feedback = on;".to_string();
        let message = "the source does not hear what rows its slot needs: it would be invalidated";
        found.push(warning(message).fix(fix + reload));
    }
    if !row.bool(3)? {
        let fix = "-- on the standby:\nALTER SYSTEM SET primary_slot_name = 'SLOT'; -- one made on \
             the source by pg_create_physical_replication_slot('SLOT')";
        let message = "is fed without a slot of the source: while it is away, rows that its slot \
             needs are removed, and it is invalidated";
        found.push(warning(message).fix(fix.to_string() + reload));
    }
    Ok(found)
}

/// Patroni drops slots that nobody reads and that its configuration does not name: ours, whenever
/// the runner is away.
async fn patroni(source: &mut Session, slot: &str) -> pg::Result<Vec<Finding>> {
    let sql = "select exists (select from pg_catalog.pg_stat_activity \
         where application_name like 'Patroni%'), pg_catalog.current_database(), \
         (select s.plugin from pg_catalog.pg_replication_slots s where s.slot_name = $1)";
    let row = source.query_one(sql, &[Some(slot)]).await?;
    if !row.bool(0)? {
        return Ok(Vec::new());
    }
    let (database, plugin) = (row.str(1)?, row.opt(2)?.unwrap_or("pgoutput"));
    let message = "drops replication slots that its configuration does not name, at the first \
         moment that nobody reads them; named as a permanent one, it also keeps the slot on \
         standbys (from 11 on)";
    let fix = format!(
        "-- patronictl edit-config, before the job begins:\n\
         ignore_slots:\n- name: {slot}\n\
         -- once the job is copying, in its place:\n\
         slots:\n  {slot}: {{type: logical, database: {database}, plugin: {plugin}}}"
    );
    Ok(vec![Finding::info(Side::Source, "patroni", "Patroni", message).fix(fix)])
}
