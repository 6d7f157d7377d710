//! What stands in the way of a plan, found before anything is made.
//!
//! Every node is asked for transactions that have been open for long: a slot waits for all of them
//! (pgcopydb#819). The nodes that a plan touches are asked for what moving needs, and every moving
//! shard for what identifies its rows. Nothing is written.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use serde::Serialize;

use super::plan::{Plan, Wish};
use super::read::{Fixed, Found};
use crate::fault::Level;
use crate::id::QualifiedName;
use crate::pg::{Config, Purpose, Result, Session};

/// Transactions that are open for longer are reported, unless told otherwise: cigration's own
/// threshold.
pub const TRANSACTION_AGE: Duration = Duration::from_secs(30 * 60);

/// What becomes of tables that have nothing to tell their rows by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WithoutIdentity {
    /// They keep a plan from being run.
    #[default]
    Refuse,
    /// They move. While a publication shows them, the server refuses UPDATE and DELETE on them, so
    /// nothing can be lost.
    InsertOnly,
}

impl std::str::FromStr for WithoutIdentity {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "refuse" => Ok(WithoutIdentity::Refuse),
            "insert-only" => Ok(WithoutIdentity::InsertOnly),
            _ => Err("is neither insert-only nor refuse".to_string()),
        }
    }
}

/// What is let pass.
#[derive(Clone, Copy, Debug)]
pub struct Allowed {
    /// Transactions that have been open for no longer.
    pub transaction_age: Duration,
    /// Tables without a replica identity.
    pub without_identity: WithoutIdentity,
}

impl Default for Allowed {
    fn default() -> Self {
        let without_identity = WithoutIdentity::default();
        Allowed { transaction_age: TRANSACTION_AGE, without_identity }
    }
}

/// One thing found.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Finding {
    /// How much it matters.
    pub level: Level,
    /// The node it is on; empty where it is of the whole cluster.
    pub node: String,
    /// What kind of thing it is: kebab-case, the same in every release.
    pub code: &'static str,
    /// The object concerned.
    pub object: String,
    /// What is the matter with it.
    pub message: String,
    /// What mends it, where a statement does.
    pub fix: Option<String>,
}

/// Everything found, worst first.
///
/// # Errors
/// Where a node cannot be asked.
pub async fn findings(
    found: &Found,
    wish: &Wish,
    plan: &Plan,
    allowed: Allowed,
) -> Result<Vec<Finding>> {
    let mut findings = fixed(found, plan);
    findings.extend(not_emptied(found, wish));
    for (node, config) in &found.nodes {
        let mut session = Session::connect(config, Purpose::Sql).await?;
        let mut at = At { node, session: &mut session, findings: &mut findings };
        at.transactions(allowed.transaction_age).await?;
        let gives = plan.tasks.iter().any(|task| task.source == *node);
        if gives || plan.tasks.iter().any(|task| task.target == *node) {
            at.settings().await?;
        }
        if gives {
            at.shards(&moving(found, plan, node), allowed.without_identity).await?;
        }
    }
    findings.sort();
    Ok(findings)
}

/// What stands in the way on one node that takes part in a task. `shards`: relation and table of
/// what leaves it; a node that only takes has none.
///
/// # Errors
/// Where it cannot be asked.
pub async fn on_node(
    node: &str,
    config: &Config,
    shards: Option<&BTreeMap<QualifiedName, String>>,
    allowed: Allowed,
) -> Result<Vec<Finding>> {
    let mut findings = Vec::new();
    let mut session = Session::connect(config, Purpose::Sql).await?;
    let mut at = At { node, session: &mut session, findings: &mut findings };
    at.transactions(allowed.transaction_age).await?;
    at.settings().await?;
    if let Some(shards) = shards {
        at.shards(shards, allowed.without_identity).await?;
    }
    findings.sort();
    Ok(findings)
}

/// Relation on the node and table of each shard that leaves it.
fn moving(found: &Found, plan: &Plan, node: &str) -> BTreeMap<QualifiedName, String> {
    let tasks = plan.tasks.iter().filter(|task| task.source == node);
    let shards = tasks.flat_map(|task| task.shards.iter().zip(&task.tables));
    let relation = |(id, table): (&u64, &String)| {
        found.relations.get(id).map(|relation| (relation.clone(), table.clone()))
    };
    shards.filter_map(relation).collect()
}

/// Tables that stay, and reference tables that a target lacks.
fn fixed(found: &Found, plan: &Plan) -> Vec<Finding> {
    let mut findings = Vec::new();
    let targets: BTreeSet<&String> = plan.tasks.iter().map(|task| &task.target).collect();
    for table in &found.fixed {
        findings.push(Finding {
            level: Level::Info,
            node: String::new(),
            code: table.kind,
            object: table.table.clone(),
            message: format!("stays where it is: {}", table.reason),
            fix: None,
        });
        for target in targets.iter().filter(|t| table.kind == "reference" && !table.on.contains(t))
        {
            findings.push(Finding {
                level: Level::Error,
                node: target.to_string(),
                code: "no-reference-table",
                object: table.table.clone(),
                message: "is a reference table that this node lacks, and queries that join it \
                     with a moved shard would fail"
                    .to_string(),
                fix: Some("select replicate_reference_tables();".to_string()),
            });
        }
    }
    findings
}

/// Tables that stay on nodes that are to be emptied. Reference tables are on all others as well.
fn not_emptied(found: &Found, wish: &Wish) -> Vec<Finding> {
    let stays = |node: &&str| {
        let on = |table: &&Fixed| table.kind != "reference" && table.on.iter().any(|on| on == node);
        let finding = |table: &Fixed| Finding {
            level: Level::Warning,
            node: node.to_string(),
            code: "not-emptied",
            object: table.table.clone(),
            message: "stays on this node, which cannot be removed before it is gone".to_string(),
            fix: None,
        };
        found.fixed.iter().filter(on).map(finding).collect::<Vec<_>>()
    };
    wish.emptied().iter().flat_map(stays).collect()
}

/// A node that is being asked.
struct At<'a> {
    node: &'a str,
    session: &'a mut Session,
    findings: &'a mut Vec<Finding>,
}

impl At<'_> {
    fn add(
        &mut self,
        level: Level,
        code: &'static str,
        object: String,
        message: String,
        fix: Option<String>,
    ) {
        let node = self.node.to_string();
        self.findings.push(Finding { level, node, code, object, message, fix });
    }

    async fn transactions(&mut self, age: Duration) -> Result<()> {
        let seconds = age.as_secs_f64().to_string();
        let sql = "select 'backend ' || pid, coalesce(usename, ''), \
             extract(epoch from now() - xact_start)::int8, \
             'select pg_terminate_backend(' || pid || ');' from pg_catalog.pg_stat_activity \
             where now() - xact_start > $1::float8 * interval '1 second' \
             and (backend_xid is not null or backend_xmin is not null) \
             and pid <> pg_catalog.pg_backend_pid() \
             union all select 'prepared transaction ' || gid, owner, \
             extract(epoch from now() - prepared)::int8, \
             'rollback prepared ' || pg_catalog.quote_literal(gid) || ';' \
             from pg_catalog.pg_prepared_xacts \
             where now() - prepared > $1::float8 * interval '1 second'";
        for row in self.session.query_params(sql, &[Some(&seconds)]).await? {
            let (object, user, open) = (row.string(0)?, row.string(1)?, row.str(2)?);
            let message = format!(
                "a transaction of {user} has been open for {open} s; a slot waits until it ends"
            );
            self.add(Level::Error, "long-transaction", object, message, Some(row.string(3)?));
        }
        Ok(())
    }

    async fn settings(&mut self) -> Result<()> {
        let sql = "select pg_catalog.current_setting('wal_level'), \
             pg_catalog.current_setting('max_replication_slots')::int8 \
             - (select count(*) from pg_catalog.pg_replication_slots), \
             pg_catalog.current_setting('max_wal_senders')::int8 \
             - (select count(*) from pg_catalog.pg_stat_replication)";
        let row = self.session.query_one(sql, &[]).await?;
        if row.str(0)? != "logical" {
            let message = format!("is {}, and changes cannot be followed", row.str(0)?);
            let fix = "alter system set wal_level = logical; -- and restart the server".to_string();
            self.add(Level::Error, "wal-level", "wal_level".to_string(), message, Some(fix));
        }
        for (column, setting) in [(1, "max_replication_slots"), (2, "max_wal_senders")] {
            let free: i64 = row.parse(column)?;
            if free < 1 {
                let message = "leaves none free, and each task takes one".to_string();
                let fix = format!("alter system set {setting} = 20; -- and restart the server");
                self.add(Level::Error, "no-slot-left", setting.to_string(), message, Some(fix));
            }
        }
        Ok(())
    }

    /// What the stream needs of each shard, by the shard and not by its table: they can differ.
    async fn shards(
        &mut self,
        shards: &BTreeMap<QualifiedName, String>,
        without: WithoutIdentity,
    ) -> Result<()> {
        self.session.execute("set citus.override_table_visibility = off").await?;
        let sql = "select n.nspname, c.relname, c.relpersistence, c.relkind, \
             c.relreplident = 'f' or exists (select 1 from pg_catalog.pg_index i \
             where i.indrelid = c.oid and i.indisvalid and case c.relreplident \
             when 'd' then i.indisprimary and i.indimmediate \
             when 'i' then i.indisreplident else false end) \
             from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace \
             where n.nspname || '.' || c.relname = any ($1::text[])";
        let names: Vec<String> = shards
            .keys()
            .map(|name| array_item(&format!("{}.{}", name.schema, name.name)))
            .collect();
        let array = format!("{{{}}}", names.join(","));
        for row in self.session.query_params(sql, &[Some(&array)]).await? {
            let relation = QualifiedName::new(row.string(0)?, row.string(1)?);
            let Some(table) = shards.get(&relation) else { continue };
            let (persistence, kind) = (row.str(2)?, row.str(3)?);
            if persistence == "u" {
                let message = "is unlogged, and its changes are in no log".to_string();
                let fix = Some(format!("alter table {table} set logged;"));
                self.add(Level::Error, "unlogged", relation.to_string(), message, fix);
            }
            // A partitioned parent has no rows of its own.
            if kind == "r" && !row.bool(4)? {
                let (level, otherwise) = match without {
                    WithoutIdentity::Refuse => (
                        Level::Error,
                        " (--without-identity insert-only moves it all the same, for a table that \
                         sees INSERT alone)",
                    ),
                    WithoutIdentity::InsertOnly => (Level::Warning, ""),
                };
                let message = format!(
                    "has no replica identity: from when it moves until its way back is ended, \
                     UPDATE and DELETE on it fail{otherwise}"
                );
                let fix = Some(format!("alter table {table} replica identity full;"));
                self.add(level, "no-identity", relation.to_string(), message, fix);
            }
        }
        Ok(())
    }
}

/// An element of an array's text.
fn array_item(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
}
