//! A target that is a copy somebody else made (`--initial-copy none`): what has to be there, and
//! what came along with it and must not act.

use std::collections::HashMap;

use crate::id::{QualifiedName, Stream};
use crate::job::ability::Ability;
use crate::pg::{self, Session};
use crate::source::slot;

use super::finding::Level;
use super::tables::of_users;
use super::{Check, Finding, Side};

/// Columns by name, as their order may differ in a copy that was restored.
const COLUMNS: &str = concat!(
    "select n.nspname, c.relname, coalesce(pg_catalog.string_agg(pg_catalog.quote_ident(a.attname) \
         || ' ' || pg_catalog.format_type(a.atttypid, a.atttypmod), ', ' order by a.attname), '') \
     from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace \
     left join pg_catalog.pg_attribute a on a.attrelid = c.oid and a.attnum > 0 \
         and not a.attisdropped \
     where c.relkind in ('r', 'p') and c.relpersistence <> 't' and ",
    of_users!(),
    "group by 1, 2"
);

/// Of all databases: a slot for the way back waits for each of them.
const PREPARED: &str = "select gid, database::text, pg_catalog.quote_literal(gid) \
     from pg_catalog.pg_prepared_xacts order by prepared";

const SUBSCRIPTIONS: &str = "select s.subname, d.datname, pg_catalog.quote_ident(s.subname) \
     from pg_catalog.pg_subscription s join pg_catalog.pg_database d on d.oid = s.subdbid \
     where s.subenabled order by 1";

const SLOTS: &str = "select slot_name, pg_catalog.quote_literal(slot_name) \
     from pg_catalog.pg_replication_slots where not temporary and slot_name <> $1 order by 1";

impl Check<'_> {
    pub(super) async fn brought(&mut self) -> pg::Result<()> {
        if self.begun.is_some() {
            return Ok(());
        }
        if self.target.facts.in_recovery {
            let message = "still recovers: let it come to where it is to begin, and promote it \
                 (before 12, pg_ctl promote). Where it stands is read from its timeline then";
            let finding = Finding::error(Side::Target, "copy-recovers", "recovery", message);
            self.findings.push(finding.fix("SELECT pg_promote();"));
            return Ok(());
        }
        self.made_first().await?;
        self.same_columns().await?;
        if !Ability::probe(&mut self.target.session).await?.replica_role {
            let message = "the role may not set it, so triggers, rules and foreign keys of the \
                 copy would act on what the stream writes; the tables of a job that copies itself \
                 get them at the cutover";
            let role = crate::id::quote_ident(&self.target.facts.role);
            let fix = format!("GRANT SET ON PARAMETER session_replication_role TO {role};");
            let object = "session_replication_role";
            let finding = Finding::error(Side::Target, "copy-triggers-act", object, message);
            self.findings.push(finding.fix(fix));
        }
        let found = prepared(&mut self.target.session).await;
        self.take(Side::Target, "prepared transactions", found)?;
        let system = self.target.facts.system_identifier.clone();
        if system.is_some() && system == self.source.facts.system_identifier {
            let found = subscriptions(&mut self.target.session).await;
            self.take(Side::Target, "subscriptions", found)?;
            let ours = self.options.job.object(Stream::Forward);
            let found = slots(&mut self.target.session, &ours).await;
            self.take(Side::Target, "replication slots", found)?;
        }
        for side in [Side::Source, Side::Target] {
            let found = self.leftovers(side).await;
            self.take(side, "leftovers", found)?;
        }
        Ok(())
    }

    /// A slot that is made after the copy misses what came between.
    async fn made_first(&mut self) -> pg::Result<()> {
        let name = self.options.job.object(Stream::Forward);
        let status = match slot::status(&mut self.source.session, &name).await {
            Ok(status) => status,
            Err(crate::source::Error::Pg(error)) => return Err(error),
            Err(_) => None,
        };
        let message = match &status {
            None => "is not there, and has to be older than the copy: make it, and then the copy",
            Some(status) if status.lost_reason().is_some() => {
                "is lost: the server keeps no WAL for it any more. Drop it, make it again, and \
                 then another copy"
            }
            Some(_) => return Ok(()),
        };
        let object = format!("replication slot {name}");
        let finding = Finding::error(Side::Source, "copy-without-slot", object, message);
        let fix = format!("walferry slot create --name {}", self.options.job);
        self.findings.push(finding.fix(fix));
        Ok(())
    }

    async fn same_columns(&mut self) -> pg::Result<()> {
        let (ours, mut theirs) =
            (columns(&mut self.source.session).await?, columns(&mut self.target.session).await?);
        let mut ours: Vec<_> = ours.into_iter().collect();
        ours.sort();
        for (name, here) in ours {
            if !self.options.selection.has_rows(&name) {
                continue;
            }
            let there = theirs.remove(&name);
            if there.as_ref() == Some(&here) {
                continue;
            }
            let (code, what) = match there {
                None => ("copy-lacks-table", "is not in the copy".to_string()),
                Some(there) => {
                    let what = format!("has columns ({there}) in the copy, and ({here}) here");
                    ("copy-differs", what)
                }
            };
            let (level, so) = match self.options.alters {
                true => (Level::Warning, "the stream has to bring it, as --ddl says"),
                false => (Level::Error, "make it so on the target, or give --ddl"),
            };
            let object = format!("table {name}");
            let finding = Finding::error(Side::Target, code, object, format!("{what}: {so}"));
            self.findings.push(finding.at(level));
        }
        Ok(())
    }
}

async fn columns(session: &mut Session) -> pg::Result<HashMap<QualifiedName, String>> {
    let rows = session.query(COLUMNS).await?;
    rows.iter()
        .map(|row| Ok((QualifiedName::new(row.str(0)?, row.str(1)?), row.string(2)?)))
        .collect()
}

async fn prepared(target: &mut Session) -> pg::Result<Vec<Finding>> {
    let rows = target.query(PREPARED).await?;
    let findings = rows.iter().map(|row| {
        let (gid, database, quoted) = (row.str(0)?, row.str(1)?, row.str(2)?);
        let message = format!(
            "came along with the copy, in database {database}, and holds what it has locked; \
             roll it back here, in its database: once the source commits its own, the stream \
             brings all of it"
        );
        let object = format!("prepared transaction {gid}");
        let finding = Finding::error(Side::Target, "copy-prepared", object, message);
        Ok(finding.fix(format!("ROLLBACK PREPARED {quoted};")))
    });
    findings.collect()
}

async fn subscriptions(target: &mut Session) -> pg::Result<Vec<Finding>> {
    let rows = target.query(SUBSCRIPTIONS).await?;
    let findings = rows.iter().map(|row| {
        let (name, database, quoted) = (row.str(0)?, row.str(1)?, row.str(2)?);
        let message = format!(
            "came along with the copy and is enabled: in database {database}, it takes from its \
             publisher what is meant for the source"
        );
        let object = format!("subscription {name}");
        let finding = Finding::error(Side::Target, "copy-subscribes", object, message);
        Ok(finding.fix(format!(
            "ALTER SUBSCRIPTION {quoted} DISABLE;\nALTER SUBSCRIPTION {quoted} SET (slot_name = \
             NONE);\nDROP SUBSCRIPTION {quoted};"
        )))
    });
    findings.collect()
}

/// A storage snapshot has the source's slots; pg_basebackup leaves them behind.
async fn slots(target: &mut Session, ours: &str) -> pg::Result<Vec<Finding>> {
    let rows = target.query_params(SLOTS, &[Some(ours)]).await?;
    let findings = rows.iter().map(|row| {
        let object = format!("replication slot {}", row.str(0)?);
        let message = "came along with the copy, and keeps WAL here for somebody who reads the \
             source";
        let finding = Finding::warning(Side::Target, "copy-has-slot", object, message);
        Ok(finding.fix(format!("SELECT pg_drop_replication_slot({});", row.str(1)?)))
    });
    findings.collect()
}
