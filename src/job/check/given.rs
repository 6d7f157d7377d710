//! A source whose tables belong to others and whose database lets the role make nothing: what an
//! administrator gives it once. Schema walferry, a publication of just what the job would publish,
//! and the right to write to the tables on the way back.
//!
//! Left out: the fence of locks. Its seal is a trigger, and only a table's owner can take one away
//! again; clients are held by a route instead.

use crate::cutover::canary;
use crate::id::{QualifiedName, Stream, quote_ident, quote_literal};
use crate::pg;

use super::super::{ability, admit, reading};
use super::end::End;
use super::finding::some;
use super::{Check, Finding, Side};
use crate::catalog::Table;

/// How a role that owns nothing stands with the source's tables.
pub(super) struct Given {
    /// Triggers, rules or foreign keys would act on what the way back writes, and only owners could
    /// set them aside.
    pub acting: Vec<String>,
    /// The publication that the job would make is there, made by somebody else or an earlier run.
    pub published: bool,
    /// Schema walferry is there, and tables can be made in it.
    pub schema: bool,
}

impl Check<'_> {
    /// Looks at what there is. `oids`: the job's tables.
    pub(super) async fn given(&mut self, oids: &str) -> pg::Result<Given> {
        let name = self.options.job.object(Stream::Forward);
        let session = &mut self.source.session;
        let sql = "select coalesce((select pg_catalog.has_schema_privilege(oid, 'create, usage') \
             from pg_catalog.pg_namespace where nspname = 'walferry'), false)";
        let schema = session.query_one(sql, &[]).await?.bool(0)?;
        let sql = format!(
            "select exists (select from pg_catalog.pg_publication where pubname = {})",
            quote_literal(&name)
        );
        let published = session.query_one(&sql, &[]).await?.bool(0)?;
        let mut acting = Vec::new();
        if self.options.reverse && !may_be_replica(&mut self.source).await? {
            let sql = format!(
                "select distinct c.oid::regclass::text from pg_catalog.pg_class c \
                 where c.oid in ({oids}) and ( \
                 exists (select from pg_catalog.pg_trigger g where g.tgrelid = c.oid \
                    and g.tgenabled = 'O' and g.tgname not like 'walferry\\_%') \
                 or exists (select from pg_catalog.pg_rewrite w where w.ev_class = c.oid \
                    and w.ev_enabled = 'O' and w.rulename <> '_RETURN')) order by 1"
            );
            for row in self.source.session.query(&sql).await? {
                acting.push(row.string(0)?);
            }
        }
        Ok(Given { acting, published, schema })
    }

    /// What is to be given where the tables belong to others.
    pub(super) async fn not_given(&mut self, given: &Given) -> pg::Result<Vec<Finding>> {
        let mut findings = Vec::new();
        if !(given.schema && given.published) {
            findings.push(self.publication(given));
        }
        if self.options.reverse {
            findings.extend(self.writable().await?);
        }
        findings.push(no_lock(self.source.side));
        Ok(findings)
    }

    /// True if the source will be read by a decoder that needs no publication, so that SELECT and
    /// slots are all that following takes.
    pub(super) async fn reads_text(&self) -> bool {
        let rows = |table: &&Table| self.options.selection.has_rows(&table.name) && !table.unlogged;
        let tables: Vec<_> = self.tables.iter().filter(rows).map(|t| t.name.clone()).collect();
        let (side, job, wanted) = (&self.source.config, &self.options.job, &self.options.wanted);
        let decoder = reading::choose_decoder(side, job, Stream::Forward, &tables, wanted).await;
        decoder.is_ok_and(|(decoder, _)| decoder.is_textual())
    }

    /// What the way back takes of a source that is followed without: no errors, as arming it looks
    /// again.
    pub(super) async fn way_back(
        &mut self,
        not_owned: Vec<Finding>,
        given: &Given,
    ) -> pg::Result<Vec<Finding>> {
        let mut findings = Vec::new();
        if !self.options.reverse {
            return Ok(findings);
        }
        let (side, role) = (self.source.side, self.source.facts.role.clone());
        if !admit::may_have_tables(&mut self.source.session).await? {
            let message = "its place on this side is schema walferry, which the role may not make: \
                 a cutover will be refused";
            let object = format!("role {role}");
            let finding = Finding::warning(side, "schema-right", object, message);
            findings.push(finding.fix(admit::schema_grant(&role)));
        }
        if not_owned.is_empty() {
            return Ok(findings);
        }
        if !given.acting.is_empty() {
            findings.push(self.acting(not_owned, given));
        }
        findings.extend(self.writable().await?);
        findings.push(no_lock(side));
        Ok(findings)
    }

    /// Triggers and the like of others' tables.
    fn acting(&self, not_owned: Vec<Finding>, given: &Given) -> Finding {
        let message = format!(
            "what acts on rows of {} would act on what the way back writes there, and only their \
             owner can set it aside: a cutover will fail. (A job keeps to what it found when it \
             was made, so before `walferry run`.)",
            some(&given.acting)
        );
        let role = quote_ident(&self.source.facts.role);
        let fix = match self.source.major_version() {
            0..15 => not_owned.into_iter().filter_map(|f| f.fix).collect::<Vec<_>>().join("\n"),
            _ => format!("GRANT SET ON PARAMETER session_replication_role TO {role};"),
        };
        let object = format!("role {}", self.source.facts.role);
        Finding::warning(self.source.side, "acting-right", object, message).fix(fix)
    }

    fn publication(&self, given: &Given) -> Finding {
        let name = self.options.job.object(Stream::Forward);
        let mut fix = Vec::new();
        if !given.schema {
            fix.extend(self.own_tables_ddl(false));
        }
        if !given.published {
            let names = self.tables.iter().filter(|table| !table.unlogged).map(|t| t.name.clone());
            let own = [self.options.job.canary(), QualifiedName::new("walferry", "progress")];
            let names = names.chain(own).map(|name| format!("ONLY {}", name.quoted()));
            let names: Vec<String> = names.collect();
            let with = match self.source.major_version() {
                0..11 => "publish = 'insert, update, delete'",
                _ => "publish = 'insert, update, delete, truncate'",
            };
            let name = quote_ident(&name);
            let names = names.join(", ");
            fix.push(format!("CREATE PUBLICATION {name} FOR TABLE {names} WITH ({with});"));
        }
        let message = format!(
            "role {} may make neither schema walferry nor a publication of tables that it does not \
             own: an administrator makes them once",
            self.source.facts.role
        );
        let object = format!("publication {name}");
        Finding::error(self.source.side, "publication-right", object, message).fix(fix.join("\n"))
    }

    /// Schema walferry, unless it is there, and what of it a publication shows.
    pub(super) fn own_tables_ddl(&self, there: bool) -> Vec<String> {
        let role = quote_ident(&self.source.facts.role);
        let schema = (!there).then(|| format!("CREATE SCHEMA walferry AUTHORIZATION {role};"));
        let tables = format!(
            "SET ROLE {role};\n{};\nCREATE TABLE IF NOT EXISTS walferry.progress \
             (stream text PRIMARY KEY, end_lsn pg_lsn NOT NULL, counts text);\nRESET ROLE;",
            canary::ddl(&self.options.job)
        );
        schema.into_iter().chain([tables]).collect()
    }

    /// No error, as following needs none of it; arming the way back does.
    async fn writable(&mut self) -> pg::Result<Option<Finding>> {
        let names: Vec<QualifiedName> = self.tables.iter().map(|t| t.name.clone()).collect();
        let grants = ability::missing_grants(&mut self.source.session, &names).await?;
        if grants.is_empty() {
            return Ok(None);
        }
        let message = "may not write to all tables and sequences, as the way back does: a cutover \
             will be refused";
        let object = format!("role {}", self.source.facts.role);
        let finding = Finding::warning(self.source.side, "write-right", object, message);
        Ok(Some(finding.fix(grants.join("\n"))))
    }
}

fn no_lock(side: Side) -> Finding {
    let message = "its seal is a trigger, which only owners of the tables can open again: give \
         cutover a route that holds clients, and --fence none";
    Finding::warning(side, "fence-lock", "--fence lock", message)
}

async fn may_be_replica(end: &mut End) -> pg::Result<bool> {
    Ok(ability::Ability::probe(&mut end.session).await?.replica_role)
}
