//! What the roles may do, and the GRANT for each thing they may not.
//!
//! What cannot be done without is an error. Replication origins and session_replication_role can:
//! then what is written is marked by a row, and triggers and foreign keys are set aside by their
//! owner, of which this tells.
//!
//! Three profiles (see the design's table of rights): superuser; owner with REPLICATION; a managed
//! service's role that is neither. Since the way back is armed before the switch, each side needs
//! the rights of both ends of a stream.

use std::collections::BTreeMap;

use crate::id::{quote_ident, quote_literal};
use crate::pg::{self, Purpose, Session};

use super::end::End;
use super::finding::some;
use super::{Check, Finding, Side};

/// Functions a stream's writer calls to tag what it writes. Before 14 only superusers may, whatever
/// is granted.
///
/// <https://www.postgresql.org/docs/current/functions-admin.html#FUNCTIONS-REPLICATION>
const ORIGIN_FUNCTIONS: &[&str] = &[
    "pg_replication_origin_create(text)",
    "pg_replication_origin_drop(text)",
    "pg_replication_origin_oid(text)",
    "pg_replication_origin_advance(text, pg_lsn)",
    "pg_replication_origin_progress(text, boolean)",
    "pg_replication_origin_session_setup(text)",
    "pg_replication_origin_session_reset()",
    "pg_replication_origin_session_is_setup()",
    "pg_replication_origin_session_progress(boolean)",
    "pg_replication_origin_xact_setup(pg_lsn, timestamp with time zone)",
    "pg_replication_origin_xact_reset()",
];

impl Check<'_> {
    pub(super) async fn rights(&mut self) -> pg::Result<()> {
        self.findings.push(profile(&self.source));
        self.findings.push(profile(&self.target));
        let reverse = self.options.reverse;
        if self.source.setting("wal_level") == Some("logical") {
            self.findings.extend(replication(&self.source).await);
        }
        if reverse && self.target.setting("wal_level") == Some("logical") {
            self.findings.extend(replication(&self.target).await);
        }
        for side in [Side::Source, Side::Target] {
            let end = self.end(side);
            let mut found = Vec::new();
            // The one that writes: the target, and the source on the way back.
            if side == Side::Target || reverse {
                found.extend(replica_role(end).await?);
                found.extend(origins(end).await?);
            }
            self.findings.extend(found);
        }
        let names: Vec<String> =
            self.tables.iter().map(|t| quote_literal(&t.oid.to_string())).collect();
        let oids = names.join(",");
        let found = self.source_objects(&oids).await;
        self.take(Side::Source, "rights on tables", found)?;
        let found = self.forced(&oids).await;
        self.take(Side::Source, "row-level security", found)?;
        let found = database(&mut self.target).await;
        self.take(Side::Target, "rights on the database", found)?;
        if !self.source.facts.superuser {
            let found = sequences(&mut self.source).await;
            self.take(Side::Source, "rights on sequences", found)?;
            let found = statistics(&mut self.source).await;
            self.take(Side::Source, "pg_stat_activity", found)?;
        }
        Ok(())
    }

    /// Publication and schema walferry, by the role's own rights where it owns the tables, given by
    /// an administrator where it does not.
    async fn source_objects(&mut self, oids: &str) -> pg::Result<Vec<Finding>> {
        if self.source.facts.superuser {
            return Ok(Vec::new());
        }
        let reverse = self.options.reverse;
        let oids = if oids.is_empty() { "null" } else { oids };
        let (not_owned, mut findings) = tables(&mut self.source, oids, reverse).await?;
        let given = self.given(oids).await?;
        if self.options.wanted.publication.is_some() || self.reads_text().await {
            findings.extend(self.way_back(not_owned, &given).await?);
            return Ok(findings);
        }
        // Only their owners can set aside what would act on the way back's rows.
        let owns = not_owned.is_empty();
        if owns || !given.acting.is_empty() {
            findings.extend(not_owned);
            if !(given.schema && given.published) {
                findings.extend(database(&mut self.source).await?);
            }
        } else {
            findings.extend(self.not_given(&given).await?);
        }
        Ok(findings)
    }

    /// Tables whose policies hold for their owners too: who owns them on the target is refused when
    /// it writes there.
    async fn forced(&mut self, oids: &str) -> pg::Result<Vec<Finding>> {
        let sql = "select rolsuper or rolbypassrls from pg_catalog.pg_roles \
             where rolname = current_user";
        if oids.is_empty() || self.target.session.query_one(sql, &[]).await?.bool(0)? {
            return Ok(Vec::new());
        }
        let sql = format!(
            "select n.nspname, c.relname from pg_catalog.pg_class c \
             join pg_catalog.pg_namespace n on n.oid = c.relnamespace \
             where c.relrowsecurity and c.relforcerowsecurity and c.oid in ({oids}) order by 1, 2"
        );
        let rows = self.source.session.query(&sql).await?;
        let names = rows
            .iter()
            .map(|row| Ok(crate::id::QualifiedName::new(row.str(0)?, row.str(1)?).to_string()));
        let names = names.collect::<pg::Result<Vec<_>>>()?;
        if names.is_empty() {
            return Ok(Vec::new());
        }
        let role = quote_ident(&self.target.facts.role);
        let message = format!(
            "{} have FORCE ROW LEVEL SECURITY, which holds for role {role} there too: applying \
             changes to them would be refused",
            some(&names)
        );
        let fix = format!("ALTER ROLE {role} BYPASSRLS;");
        let object = "row-level security";
        Ok(vec![Finding::error(Side::Target, "row-security", object, message).fix(fix)])
    }

    pub(super) fn end(&mut self, side: Side) -> &mut End {
        if side == Side::Target { &mut self.target } else { &mut self.source }
    }
}

/// Who we are here, and what that means.
fn profile(end: &End) -> Finding {
    let facts = &end.facts;
    let replicates = facts.replication || facts.cloud_roles.iter().any(|r| r == "rds_replication");
    let what = match (facts.superuser, replicates) {
        (true, _) => "superuser",
        (false, true) => "owner with REPLICATION",
        (false, false) => "neither superuser nor REPLICATION",
    };
    let member = match facts.cloud_roles.as_slice() {
        [] => String::new(),
        roles => format!(", member of {}", roles.join(", ")),
    };
    let message = format!("profile: {what}{member}");
    Finding::info(end.side, "profile", format!("role {}", facts.role), message)
}

/// Opens a replication connection as the stream will.
async fn replication(end: &End) -> Option<Finding> {
    let opened = async {
        let mut session = Session::connect(&end.config, Purpose::Replication).await?;
        session.query("IDENTIFY_SYSTEM").await
    };
    let error = opened.await.err()?;
    let facts = &end.facts;
    let role = quote_ident(&facts.role);
    let rds = facts.cloud_roles_known.iter().any(|r| r == "rds_replication");
    let entitled = facts.superuser
        || facts.replication
        || facts.cloud_roles.iter().any(|r| r == "rds_replication");
    let (code, fix) = match (entitled, rds) {
        (false, true) => ("replication-right", Some(format!("GRANT rds_replication TO {role};"))),
        (false, false) => ("replication-right", Some(format!("ALTER ROLE {role} REPLICATION;"))),
        (true, _) => ("replication-connection", None),
    };
    let object = format!("role {}", facts.role);
    let message = if entitled {
        format!(
            "may replicate, but no replication connection is let in (max_wal_senders, a pooler in \
             between, or pg_hba.conf, whose line must name the database): {error}"
        )
    } else {
        format!("may not open a replication connection: {error}")
    };
    let finding = Finding::error(end.side, code, object, message);
    Some(match fix {
        Some(fix) => finding.fix(fix),
        None => finding,
    })
}

/// For schema `walferry`, the moved schemas on the target, a publication on the source.
async fn database(end: &mut End) -> pg::Result<Vec<Finding>> {
    let sql = "select pg_catalog.has_database_privilege(pg_catalog.current_database(), 'create')";
    if end.session.query_one(sql, &[]).await?.bool(0)? {
        return Ok(Vec::new());
    }
    let (dbname, role) = (&end.facts.dbname, &end.facts.role);
    let message = format!("role {role} may not create schemas or publications in it");
    let fix = format!("GRANT CREATE ON DATABASE {} TO {};", quote_ident(dbname), quote_ident(role));
    let finding =
        Finding::error(end.side, "create-right", format!("database {dbname}"), message).fix(fix);
    Ok(vec![finding])
}

/// Tried rather than looked up: managed services let roles set it whom the catalogs do not name.
async fn replica_role(end: &mut End) -> pg::Result<Option<Finding>> {
    let tried = end
        .session
        .execute("begin; set local session_replication_role = 'replica'; rollback")
        .await;
    let error = match tried {
        Ok(_) => return Ok(None),
        Err(error) if error.is_closed() => return Err(error),
        Err(error) => error,
    };
    end.session.execute("rollback").await?;
    let role = quote_ident(&end.facts.role);
    // So that they do not act on applied changes.
    let how = match end.side {
        Side::Source => {
            "from the cutover on, and for as long as it is the old side, triggers and rules of \
             tables that the role owns are disabled and their foreign keys dropped; rollback and \
             finish bring them back as they were. Those of other owners' tables it cannot set \
             aside, and then leads no way back to them"
        }
        _ => "triggers, rules and foreign keys are made there in the cutover only",
    };
    let message = format!("role {} may not set it ({error}): {how}", end.facts.role);
    let name = "session_replication_role";
    let finding = Finding::info(end.side, "replica-role-right", name, message);
    Ok(Some(if end.major_version() >= 15 {
        finding.fix(format!("GRANT SET ON PARAMETER session_replication_role TO {role};"))
    } else {
        finding
    }))
}

async fn origins(end: &mut End) -> pg::Result<Option<Finding>> {
    if end.facts.superuser {
        return Ok(None);
    }
    let role = quote_ident(&end.facts.role);
    let object = "replication origin functions";
    let message = format!(
        "role {} may not use them: what walferry writes is told from what applications write by a \
         row of walferry.progress at the head of each transaction",
        end.facts.role
    );
    let finding = Finding::info(end.side, "origin-right", object, message);
    if end.major_version() < 14 {
        return Ok(Some(finding));
    }
    let list: Vec<String> = ORIGIN_FUNCTIONS.iter().map(|f| quote_literal(f)).collect();
    let sql = format!(
        "select f from pg_catalog.unnest(array[{}]) f \
         where not pg_catalog.has_function_privilege( \
             pg_catalog.to_regprocedure('pg_catalog.' || f)::oid, 'execute')",
        list.join(",")
    );
    let mut grants = Vec::new();
    for row in end.session.query(&sql).await? {
        let function = row.str(0)?;
        grants.push(format!("GRANT EXECUTE ON FUNCTION pg_catalog.{function} TO {role};"));
    }
    Ok((!grants.is_empty()).then(|| finding.fix(grants.join("\n"))))
}

/// Publishing a table takes its owner's rights, copying it SELECT. What is missing of the first,
/// and of the second.
async fn tables(
    end: &mut End,
    oids: &str,
    reverse: bool,
) -> pg::Result<(Vec<Finding>, Vec<Finding>)> {
    let sql = format!(
        "select n.nspname, c.relname, o.rolname, pg_catalog.pg_has_role(c.relowner, 'usage'), \
         pg_catalog.has_schema_privilege(n.oid, 'usage') \
             and pg_catalog.has_table_privilege(c.oid, 'select'), \
         c.relrowsecurity and not r.rolbypassrls \
             and (c.relforcerowsecurity or not pg_catalog.pg_has_role(c.relowner, 'usage')) \
         from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace \
         join pg_catalog.pg_roles o on o.oid = c.relowner, pg_catalog.pg_roles r \
         where r.rolname = current_user and c.oid in ({oids}) \
         order by n.nspname, c.relname"
    );
    let mut not_owned = BTreeMap::new();
    let mut not_read = BTreeMap::new();
    let mut hidden = Vec::new();
    for row in end.session.query(&sql).await? {
        let name = crate::id::QualifiedName::new(row.str(0)?, row.str(1)?).to_string();
        if !row.bool(3)? {
            not_owned.entry(row.string(2)?).or_insert_with(Vec::new).push(name.clone());
        }
        if !row.bool(4)? {
            not_read.entry(row.string(0)?).or_insert_with(Vec::new).push(name.clone());
        }
        if row.bool(5)? {
            hidden.push(name);
        }
    }
    Ok((judge_owners(end, &not_owned, reverse), judge_tables(end, &not_read, &hidden)))
}

/// Tables not owned, by owner.
fn judge_owners(
    end: &End,
    not_owned: &BTreeMap<String, Vec<String>>,
    reverse: bool,
) -> Vec<Finding> {
    let role = quote_ident(&end.facts.role);
    let mut findings = Vec::new();
    for (owner, names) in not_owned {
        let back = if reverse { ", and writing to them on the way back" } else { "" };
        let message = format!("owns {}: publishing them takes its rights{back}", some(names));
        let fix = format!("GRANT {} TO {role};", quote_ident(owner));
        let object = format!("role {owner}");
        findings.push(Finding::error(end.side, "owner-right", object, message).fix(fix));
    }
    findings
}

/// Tables not readable by schema, and tables with rows hidden.
fn judge_tables(
    end: &End,
    not_read: &BTreeMap<String, Vec<String>>,
    hidden: &[String],
) -> Vec<Finding> {
    let role = quote_ident(&end.facts.role);
    let mut findings = Vec::new();
    for (schema, names) in not_read {
        let message = format!("no SELECT on {}", some(names));
        let schema_quoted = quote_ident(schema);
        let fix = format!(
            "GRANT USAGE ON SCHEMA {schema_quoted} TO {role};\n\
             GRANT SELECT ON ALL TABLES IN SCHEMA {schema_quoted} TO {role};"
        );
        let object = format!("schema {schema}");
        findings.push(Finding::error(end.side, "select-right", object, message).fix(fix));
    }
    if !hidden.is_empty() {
        let message = format!("would hide rows of {} from the copy", some(hidden));
        let fix = format!("ALTER ROLE {role} BYPASSRLS;");
        let object = "row-level security";
        findings.push(Finding::error(end.side, "row-security", object, message).fix(fix));
    }
    findings
}

async fn sequences(end: &mut End) -> pg::Result<Vec<Finding>> {
    let sql = "select n.nspname, pg_catalog.json_agg(c.relname order by c.relname) \
         from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace \
         where c.relkind = 'S' and c.relpersistence <> 't' \
         and n.nspname not in ('pg_catalog', 'information_schema', 'walferry') \
         and not (pg_catalog.has_schema_privilege(n.oid, 'usage') \
             and pg_catalog.has_sequence_privilege(c.oid, 'select')) \
         group by n.nspname order by n.nspname";
    let mut findings = Vec::new();
    for row in end.session.query(sql).await? {
        let schema = row.str(0)?;
        let names: Vec<String> = serde_json::from_str(row.str(1)?).unwrap_or_default();
        let (quoted, role) = (quote_ident(schema), quote_ident(&end.facts.role));
        let fix = format!(
            "GRANT USAGE ON SCHEMA {quoted} TO {role};\n\
             GRANT SELECT ON ALL SEQUENCES IN SCHEMA {quoted} TO {role};"
        );
        let message =
            format!("no SELECT on sequences {}: their values cannot be read", some(&names));
        let object = format!("schema {schema}");
        findings.push(Finding::error(end.side, "sequence-right", object, message).fix(fix));
    }
    Ok(findings)
}

/// Without it, transactions in the way are seen without their age and query.
async fn statistics(end: &mut End) -> pg::Result<Vec<Finding>> {
    let sql = "select pg_catalog.pg_has_role('pg_read_all_stats', 'usage')";
    if end.session.query_one(sql, &[]).await?.bool(0)? {
        return Ok(Vec::new());
    }
    let role = &end.facts.role;
    let message = format!(
        "role {role} does not have it: what others run is hidden, so a transaction that holds slot \
         creation up is told without its query"
    );
    let fix = format!("GRANT pg_read_all_stats TO {};", quote_ident(role));
    let object = "role pg_read_all_stats";
    Ok(vec![Finding::info(end.side, "stats-right", object, message).fix(fix)])
}
