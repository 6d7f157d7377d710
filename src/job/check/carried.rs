//! What a job does not carry, or not as rows are carried: told by check, and again at every flip.

use crate::catalog::{self, Selection, TableKind};
use crate::id::{QualifiedName, quote_ident, quote_literal};
use crate::large;
use crate::pg::{self, Session};

use super::finding::{bytes, some};
use super::tables::of_users;
use super::{Check, Finding, Side, or_unreadable};

const BY_KIND: &str = concat!(
    "select c.relkind, n.nspname, c.relname from pg_catalog.pg_class c \
     join pg_catalog.pg_namespace n on n.oid = c.relnamespace \
     where c.relkind in ('m', 'f') and ",
    of_users!(),
    "order by n.nspname, c.relname"
);

/// Tables of extensions that hold rows of users, as the extension says itself.
const OF_EXTENSIONS: &str = "select n.nspname, c.relname, e.extname \
     from pg_catalog.pg_extension e \
     join pg_catalog.pg_class c on c.oid = any (e.extconfig) and c.relkind in ('r', 'p') \
     join pg_catalog.pg_namespace n on n.oid = c.relnamespace \
     where pg_catalog.pg_table_size(c.oid) > 0 order by 1, 2";

/// Settings of this database, and of roles in it: pg_dump leaves them to pg_dumpall.
const SETTINGS: &str = "select pg_catalog.current_database(), r.rolname, c.setting \
     from pg_catalog.pg_db_role_setting s \
     join pg_catalog.pg_database d on d.oid = s.setdatabase \
        and d.datname = pg_catalog.current_database() \
     left join pg_catalog.pg_roles r on r.oid = s.setrole, \
     pg_catalog.unnest(s.setconfig) with ordinality c(setting, n) \
     where pg_catalog.split_part(c.setting, '=', 1) <> 'default_transaction_read_only' \
     order by r.rolname nulls first, c.n";

/// Their values are lists, stored as they have to be written.
const LISTS: [&str; 4] =
    ["search_path", "temp_tablespaces", "session_preload_libraries", "local_preload_libraries"];

/// Lists it: foreign tables' rows, materialized views, unlogged tables, tables made without rows,
/// rows of extensions, settings of the database, large objects (`moves_large` tells whether the job
/// takes them along), publications and subscriptions. The same codes whoever asks.
pub async fn not_carried(
    session: &mut Session,
    side: Side,
    selection: &Selection,
    moves_large: bool,
) -> pg::Result<Vec<Finding>> {
    let mut found = by_kind(session, side, selection).await?;
    found.extend(tables(session, side, selection).await?);
    if selection.tables_only {
        return Ok(found);
    }
    let rows = of_extensions(session, side).await;
    found.extend(or_unreadable(side, "extensions' rows", rows)?);
    let settings = settings(session, side).await;
    found.extend(or_unreadable(side, "settings of the database", settings)?);
    let large = large_objects(session, side, moves_large).await;
    found.extend(or_unreadable(side, "large objects", large)?);
    let publications = publications(session, side).await;
    found.extend(or_unreadable(side, "publications", publications)?);
    Ok(found)
}

async fn of_extensions(session: &mut Session, side: Side) -> pg::Result<Vec<Finding>> {
    let mut found = Vec::new();
    for row in session.query(OF_EXTENSIONS).await? {
        let name = QualifiedName::new(row.str(0)?, row.str(1)?);
        let message = format!(
            "belongs to extension {}, which makes it on the other side; rows that were put into \
             it here stay behind: carry them with COPY, or by the extension's own means",
            row.str(2)?
        );
        found.push(Finding::warning(side, "extension-rows", format!("table {name}"), message));
    }
    Ok(found)
}

async fn by_kind(
    session: &mut Session,
    side: Side,
    selection: &Selection,
) -> pg::Result<Vec<Finding>> {
    let mut found = Vec::new();
    for row in session.query(BY_KIND).await? {
        let name = QualifiedName::new(row.str(1)?, row.str(2)?);
        if !selection.has_schema(&name) {
            continue;
        }
        found.push(if row.str(0)? == "f" {
            let message = "its definition moves, its rows stay where they are; check that the \
                 other side's server reaches them, and the password of its user mapping";
            Finding::warning(side, "foreign-table", format!("foreign table {name}"), message)
        } else {
            let message = "is filled after the copy and not followed: it is refreshed at a switch, \
                 before writers are held, or as --refresh says";
            let object = format!("materialized view {name}");
            Finding::info(side, "materialized-view", object, message)
        });
    }
    Ok(found)
}

async fn tables(
    session: &mut Session,
    side: Side,
    selection: &Selection,
) -> pg::Result<Vec<Finding>> {
    let mut found = Vec::new();
    let mut empty = Vec::new();
    for table in catalog::tables(session, selection).await? {
        if !selection.has_rows(&table.name) {
            empty.push(table.name.to_string());
        } else if table.unlogged && table.kind == TableKind::Plain {
            let message = format!(
                "its changes are in no log: its rows are copied at first, and again while writers \
                 are held at a switch ({}), unless --unlogged says otherwise",
                bytes(table.bytes)
            );
            let fix = format!("ALTER TABLE {} SET LOGGED;", table.name.quoted());
            let object = format!("table {}", table.name);
            found.push(Finding::warning(side, "unlogged-table", object, message).fix(fix));
        }
    }
    if !empty.is_empty() {
        let message = format!("{}: made on the other side, rows stay behind", some(&empty));
        found.push(Finding::info(side, "schema-only", "tables of --schema-only", message));
    }
    Ok(found)
}

async fn settings(session: &mut Session, side: Side) -> pg::Result<Vec<Finding>> {
    let mut found = Vec::new();
    for row in session.query(SETTINGS).await? {
        let database = quote_ident(row.str(0)?);
        let Some((name, value)) = row.str(2)?.split_once('=') else { continue };
        let value = if LISTS.contains(&name) { value.to_string() } else { quote_literal(value) };
        let (object, of) = match row.opt(1)? {
            Some(role) => (
                format!("setting {name} of role {role} in {database}"),
                format!("ALTER ROLE {} IN DATABASE {database}", quote_ident(role)),
            ),
            None => (format!("setting {name} of {database}"), format!("ALTER DATABASE {database}")),
        };
        let message = "belongs to the server and is not carried: set it on the other side, where \
             applications need it (under that database's own name)";
        let name = quote_ident(name).replace("\".\"", ".");
        let fix = format!("{of} SET {name} TO {value};");
        found.push(Finding::warning(side, "database-setting", object, message).fix(fix));
    }
    Ok(found)
}

async fn large_objects(session: &mut Session, side: Side, moves: bool) -> pg::Result<Vec<Finding>> {
    let count = large::count(session).await?;
    if count == 0 {
        return Ok(Vec::new());
    }
    let object = "large objects";
    if !moves {
        let message = format!(
            "{count} in the database stay behind, as --large-objects leave or --include says"
        );
        return Ok(vec![Finding::warning(side, "large-objects", object, message)]);
    }
    let sql = "select pg_catalog.pg_relation_size('pg_catalog.pg_largeobject')";
    let size: u64 = session.query_one(sql, &[]).await?.parse(0)?;
    let fenced = match large::are_lockable(session).await? {
        true => "--fence lock stops who writes them",
        false => {
            "only a superuser's --fence lock stops who writes them: see to it that nobody does \
             during a switch"
        }
    };
    let message = format!(
        "{count} ({}) in the database: no decoder shows their changes, so they are copied after \
         the rows, and what has changed since is copied before a switch and while writers are \
         held; {fenced}",
        bytes(size)
    );
    let mut found = vec![Finding::info(side, "large-objects", object, message)];
    if let Some(refusal) = large::unreadable(session).await? {
        let message = format!(
            "the role may not read {} of {count}: grant it, or leave all behind with \
             --large-objects leave",
            refusal.count
        );
        let finding = Finding::error(side, "large-objects-unreadable", object, message);
        found.push(finding.fix(refusal.fix));
    }
    Ok(found)
}

async fn publications(session: &mut Session, side: Side) -> pg::Result<Vec<Finding>> {
    let mut findings = Vec::new();
    // walferry's own are reported as leftovers, where they are.
    let rows = session
        .query(
            "select pubname from pg_catalog.pg_publication \
             where pg_catalog.strpos(pubname, 'walferry_') <> 1 order by 1",
        )
        .await?;
    let list = rows.iter().map(|row| row.string(0)).collect::<pg::Result<Vec<_>>>()?;
    if !list.is_empty() {
        let message = format!(
            "{}: others may be subscribed; at the cutover they have to be pointed to the other \
             side",
            some(&list)
        );
        findings.push(Finding::info(side, "publications", "publications", message));
    }
    let rows = session
        .query(
            "select s.subname from pg_catalog.pg_subscription s \
             where s.subdbid = (select oid from pg_catalog.pg_database \
                 where datname = pg_catalog.current_database()) and s.subenabled order by 1",
        )
        .await?;
    for row in &rows {
        let name = row.str(0)?;
        let message = "brings rows in here, and goes on doing so after the cutover: they no \
             longer reach the application";
        let fix = format!("ALTER SUBSCRIPTION {} DISABLE;", quote_ident(name));
        let object = format!("subscription {name}");
        findings.push(Finding::warning(side, "subscription", object, message).fix(fix));
    }
    Ok(findings)
}

impl Check<'_> {
    pub(super) async fn carried(&mut self) -> pg::Result<()> {
        let (selection, moves) = (&self.options.selection, self.options.large_objects);
        let found = not_carried(&mut self.source.session, Side::Source, selection, moves).await;
        self.take(Side::Source, "what is not carried", found)?;
        if moves && self.begun.is_none() && !self.options.brought {
            let there = large::count(&mut self.target.session).await;
            let here = large::count(&mut self.source.session).await?;
            let found = there.map(|count| occupied(count, here).into_iter().collect());
            self.take(Side::Target, "large objects", found)?;
        }
        Ok(())
    }
}

/// Large objects keep their oids, so the target must have none of its own.
fn occupied(there: u64, here: u64) -> Option<Finding> {
    let message = format!(
        "{there} are in the database already, and those of the source keep their numbers: remove \
         them, or leave the source's behind with --large-objects leave"
    );
    let finding = Finding::error(Side::Target, "large-objects-there", "large objects", message);
    let fix = "SELECT lo_unlink(oid) FROM pg_largeobject_metadata;";
    (there > 0 && here > 0).then(|| finding.fix(fix))
}
