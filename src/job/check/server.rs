//! Versions and settings of the two servers.

use crate::id::{quote_ident, quote_literal};
use crate::pg;

use super::end::End;
use super::finding::Level;
use super::{Check, CheckOptions, Finding, Side};

/// Oldest and newest major version this is tested with.
const VERSIONS: (u32, u32) = (10, 18);

/// Slots: one for the stream, one for the snapshot of a verify.
const SLOTS_NEEDED: i64 = 2;

/// Walsenders: the stream, and the session that makes a slot for a verify.
const WAL_SENDERS_NEEDED: i64 = 2;

/// Connections besides the copy's: state, applier, verify, cutover.
const CONNECTIONS_NEEDED: i64 = 8;

pub(super) fn unreachable(side: Side, error: &pg::Error) -> Finding {
    Finding::error(side, "unreachable", side.as_str(), error.to_string())
}

impl Check<'_> {
    pub(super) async fn servers(&mut self) -> pg::Result<()> {
        self.pair();
        for end in [&self.source, &self.target] {
            self.findings.extend(version(end));
            // A job that has begun has its slot, walsender, origin and connections already.
            let begun = self.begun.is_some();
            let room = capacity(end, self.options).into_iter();
            self.findings.extend(room.filter(|f| !begun || f.code == "wal-level"));
            self.findings.extend(timeouts(end));
            self.findings.extend(truncate(end, self.options.reverse));
            // A copy that still recovers has a finding of its own.
            if end.facts.in_recovery && !(self.options.brought && end.side == Side::Target) {
                let message = "is a standby: connect to the primary (add \
                     target_session_attrs=read-write to the connection string to find it)";
                let name = end.facts.dbname.clone();
                self.findings.push(Finding::error(end.side, "standby", name, message));
            }
        }
        let found = read_only(&mut self.source).await;
        self.take(Side::Source, "default_transaction_read_only", found)?;
        let found = read_only(&mut self.target).await;
        self.take(Side::Target, "default_transaction_read_only", found)
    }

    /// What the two are to each other.
    fn pair(&mut self) {
        let (source, target) = (&self.source.facts, &self.target.facts);
        let versions = (self.source.major_version(), self.target.major_version());
        // The identifier alone would call a restored copy of the source the source itself.
        let same_server = source.system_identifier == target.system_identifier
            && source.started_at == target.started_at;
        if same_server && source.dbname == target.dbname {
            self.findings.push(Finding::error(
                Side::Target,
                "same-database",
                target.dbname.clone(),
                "source and target are the same database of the same server: give another --target",
            ));
        } else if same_server {
            self.findings.push(Finding::warning(
                Side::Target,
                "same-server",
                target.dbname.clone(),
                "source and target are databases of one server: good for a trial only, as they \
                 share slots, roles and disks",
            ));
        }
        if versions.1 < versions.0 {
            self.findings.push(Finding::warning(
                Side::Target,
                "target-older",
                format!("PostgreSQL {}", versions.1),
                format!(
                    "the target is older than the source (PostgreSQL {}): what is known to be new \
                     there is listed as too-new or left-out",
                    versions.0
                ),
            ));
        }
    }
}

fn version(end: &End) -> Option<Finding> {
    let major = end.major_version();
    let name = format!("PostgreSQL {major}");
    if major < VERSIONS.0 {
        let message = format!("is too old: {} is the oldest with logical decoding", VERSIONS.0);
        return Some(Finding::error(end.side, "version-unsupported", name, message));
    }
    (major > VERSIONS.1).then(|| {
        let message = format!("is newer than {}, the newest this was tested with", VERSIONS.1);
        Finding::warning(end.side, "version-untested", name, message)
    })
}

/// Logical decoding leaves TRUNCATE out before 11, whichever plugin prints it.
fn truncate(end: &End, reverse: bool) -> Option<Finding> {
    let decodes = end.side == Side::Source || reverse;
    if end.major_version() >= 11 || !decodes {
        return None;
    }
    let (when, other) = match end.side {
        Side::Target => ("here after the cutover", "source"),
        _ => ("while the job runs", "target"),
    };
    let message = format!(
        "is not decoded by PostgreSQL {}: rows that it removes {when} stay on the {other}, and no \
         one is told. Use DELETE instead; `walferry verify` names the rows of one that happened",
        end.major_version()
    );
    Some(Finding::warning(end.side, "truncate-not-decoded", "TRUNCATE", message))
}

/// What the server has room for. The target needs all of it too once there is a way back.
fn capacity(end: &End, options: &CheckOptions) -> Vec<Finding> {
    let mut findings = Vec::new();
    let decodes = end.side == Side::Source || options.reverse;
    let way_back = if end.side == Side::Target { " (for the way back)" } else { "" };
    if decodes && end.setting("wal_level") != Some("logical") {
        let level = end.setting("wal_level").unwrap_or("unknown");
        let message = format!("is {level}, and has to be logical{way_back}; needs a restart");
        let fix = "ALTER SYSTEM SET wal_level = 'logical';\n-- then restart the server";
        findings.push(Finding::error(end.side, "wal-level", "wal_level", message).fix(fix));
    }
    // Until 17 the number of origins was bound by the number of slots.
    let origins_setting = if end.setting("max_active_replication_origins").is_some() {
        "max_active_replication_origins"
    } else {
        "max_replication_slots"
    };
    let (slots, origins) = (end.facts.slots_used, end.facts.origins_used);
    let slots_wanted = match origins_setting {
        "max_replication_slots" => (slots + SLOTS_NEEDED).max(origins + 1),
        _ => slots + SLOTS_NEEDED,
    };
    let mut room = |code, setting: &str, used: i64, needed: i64, wanted: i64, what: &str| {
        let limit = end.number(setting);
        if limit - used < needed {
            let message = format!(
                "is {limit}, {used} in use: {needed} more needed for {what}{way_back}; needs a \
                 restart"
            );
            let fix = format!("ALTER SYSTEM SET {setting} = {wanted};\n-- then restart the server");
            findings.push(Finding::error(end.side, code, setting, message).fix(fix));
        }
    };
    let streams = "the stream and a verify";
    if decodes {
        let (code, setting) = ("no-free-slot", "max_replication_slots");
        room(code, setting, slots, SLOTS_NEEDED, slots_wanted, streams);
        let (code, setting) = ("no-free-wal-sender", "max_wal_senders");
        let used = end.facts.wal_senders_used;
        room(code, setting, used, WAL_SENDERS_NEEDED, used + WAL_SENDERS_NEEDED, streams);
    }
    if end.side == Side::Target || options.reverse {
        let shared = origins_setting == "max_replication_slots";
        let wanted = if shared { slots_wanted } else { origins + 1 };
        room("no-free-origin", origins_setting, origins, 1, wanted, "the replication origin");
    }
    let used = end.facts.connections_used + end.number("superuser_reserved_connections");
    let beside = if end.side == Side::Target { options.index_jobs } else { 0 };
    let needed = CONNECTIONS_NEEDED + (options.copy_jobs + beside) as i64;
    let what = "the copy and the streams";
    room("few-connections", "max_connections", used, needed, used + needed, what);
    findings
}

/// Timeouts that would act on walferry's sessions, or that walferry lives with.
fn timeouts(end: &End) -> Vec<Finding> {
    let mut findings = Vec::new();
    let value = end.number("idle_replication_slot_timeout");
    if value > 0 {
        let message = format!("is {value} s: a job paused for longer loses its slot");
        let fix = "ALTER SYSTEM SET idle_replication_slot_timeout = 0;\nSELECT pg_reload_conf();";
        let name = "idle_replication_slot_timeout";
        findings.push(Finding::warning(end.side, "timeout", name, message).fix(fix));
    }
    let value = end.number("wal_sender_timeout");
    let message = format!("is {value} ms; walferry answers every second, whatever it is doing");
    let name = "wal_sender_timeout";
    findings.push(Finding::info(end.side, "wal-sender-timeout", name, message));
    for name in [
        "statement_timeout",
        "lock_timeout",
        "idle_in_transaction_session_timeout",
        "idle_session_timeout",
        "transaction_timeout",
    ] {
        let value = end.number(name);
        if value > 0 {
            let message = format!("is {value} ms by default; walferry's own sessions are exempt");
            findings.push(Finding::info(end.side, "timeout-default", name, message));
        }
    }
    findings
}

/// A database that is read-only by default lets walferry write and the application not.
async fn read_only(end: &mut End) -> pg::Result<Vec<Finding>> {
    if end.setting("default_transaction_read_only") != Some("on") {
        return Ok(Vec::new());
    }
    let level = if end.side == Side::Target { Level::Error } else { Level::Warning };
    let message = "is on: the application could not write here, before or after the cutover";
    let fix = reset(end, "default_transaction_read_only").await?;
    let name = "default_transaction_read_only";
    let finding = Finding::error(end.side, "default-read-only", name, message);
    Ok(vec![finding.at(level).fix(fix)])
}

/// What takes a setting back from where it is set: the most specific place wins, as in the server.
async fn reset(end: &mut End, setting: &str) -> pg::Result<String> {
    let sql = format!(
        "select s.setdatabase <> 0, s.setrole <> 0 from pg_catalog.pg_db_role_setting s \
         where s.setdatabase in (0, (select oid from pg_catalog.pg_database \
             where datname = pg_catalog.current_database())) \
         and s.setrole in (0, (select oid from pg_catalog.pg_roles \
             where rolname = current_user)) \
         and exists (select 1 from pg_catalog.unnest(s.setconfig) u(c) \
             where pg_catalog.split_part(u.c, '=', 1) = {}) \
         order by s.setrole <> 0 and s.setdatabase <> 0 desc, s.setrole <> 0 desc limit 1",
        quote_literal(setting)
    );
    let rows = end.session.query(&sql).await?;
    let (role, dbname) = (quote_ident(&end.facts.role), quote_ident(&end.facts.dbname));
    Ok(match rows.first().map(|row| Ok((row.bool(0)?, row.bool(1)?))).transpose()? {
        Some((true, true)) => format!("ALTER ROLE {role} IN DATABASE {dbname} RESET {setting};"),
        Some((false, true)) => format!("ALTER ROLE {role} RESET {setting};"),
        Some((true, false)) => format!("ALTER DATABASE {dbname} RESET {setting};"),
        _ => format!("ALTER SYSTEM RESET {setting};\nSELECT pg_reload_conf();"),
    })
}
