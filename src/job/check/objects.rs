//! What has to be on the target before the schema can be made there, and what does not move.

use std::collections::HashMap;

use crate::id::{QualifiedName, quote_ident, quote_literal};
use crate::pg::{self, Row, Session};

use super::end::End;
use super::finding::Level;
use super::tables::of_users;
use super::{Check, Finding, Side};

impl Check<'_> {
    pub(super) async fn objects(&mut self) -> pg::Result<()> {
        self.encodings();
        let found = extensions(&mut self.source.session, &mut self.target.session).await;
        self.take(Side::Target, "extensions", found)?;
        let found = collations(&mut self.source.session, &mut self.target.session).await;
        self.take(Side::Target, "collations", found)?;
        for side in [Side::Source, Side::Target] {
            let found = collation_versions(self.end(side)).await;
            self.take(side, "collation versions", found)?;
            let found = event_triggers(self.end(side)).await;
            self.take(side, "event triggers", found)?;
        }
        let found = tablespaces(&mut self.source.session, &mut self.target.session).await;
        self.take(Side::Target, "tablespaces", found)?;
        let found = roles(&mut self.source.session, &mut self.target).await;
        self.take(Side::Target, "roles", found)
    }

    fn encodings(&mut self) {
        let (source, target) = (&self.source.facts, &self.target.facts);
        let object = format!("database {}", target.dbname);
        if source.encoding != target.encoding {
            let message =
                format!("its encoding is {}, the source's is {}", target.encoding, source.encoding);
            // From anything known to UTF8 every character has a place to go; otherwise not.
            let (level, more) = match (source.encoding.as_str(), target.encoding.as_str()) {
                ("SQL_ASCII", _) => (
                    Level::Error,
                    "; SQL_ASCII is bytes of unknown meaning, which the target may refuse \
                     (pgcopydb#874)",
                ),
                (_, "UTF8") => (Level::Warning, "; values are converted"),
                _ => (Level::Error, "; characters it does not have are refused"),
            };
            let fix = format!(
                "DROP DATABASE {0};\nCREATE DATABASE {0} ENCODING {1} LC_COLLATE {2} LC_CTYPE {3} \
                 TEMPLATE template0;",
                quote_ident(&target.dbname),
                quote_literal(&source.encoding),
                quote_literal(&source.collate),
                quote_literal(&source.ctype)
            );
            let finding =
                Finding::error(Side::Target, "encoding-mismatch", object.clone(), message + more);
            self.findings.push(finding.at(level).fix(fix));
        }
        let locale = |f: &super::end::Facts| {
            let provider = match f.provider.as_str() {
                "i" => "icu",
                "b" => "builtin",
                _ => "libc",
            };
            let name = f.locale.clone().unwrap_or_else(|| f.collate.clone());
            (provider, name, f.collate.clone(), f.ctype.clone())
        };
        let (ours, theirs) = (locale(source), locale(target));
        if ours != theirs {
            let message = format!(
                "sorts by {} \"{}\" (ctype {}), the source by {} \"{}\" (ctype {}): ORDER BY and \
                 text ranges may change",
                theirs.0, theirs.1, theirs.3, ours.0, ours.1, ours.3
            );
            self.findings.push(Finding::warning(
                Side::Target,
                "collation-mismatch",
                object,
                message,
            ));
        }
    }
}

async fn extensions(source: &mut Session, target: &mut Session) -> pg::Result<Vec<Finding>> {
    let installed =
        source.query("select extname, extversion from pg_catalog.pg_extension order by 1").await?;
    // What is installed is there, whatever became of the files it was installed from.
    let available = target
        .query(
            "select name, version from pg_catalog.pg_available_extension_versions \
             union select extname, extversion from pg_catalog.pg_extension",
        )
        .await?;
    let mut versions: HashMap<&str, Vec<&str>> = HashMap::new();
    for row in &available {
        versions.entry(row.str(0)?).or_default().push(row.str(1)?);
    }
    let mut findings = Vec::new();
    for row in &installed {
        let (name, version) = (row.str(0)?, row.str(1)?);
        let object = format!("extension {name}");
        match versions.get(name) {
            None => {
                let message = format!(
                    "is used on the source (version {version}) and not available here: install its \
                     package on the target, or leave its objects out with --exclude"
                );
                findings.push(Finding::error(Side::Target, "extension-missing", object, message));
            }
            Some(known) if !known.contains(&version) => {
                let message = format!(
                    "version {version} of the source is not among those here: {}",
                    known.join(", ")
                );
                findings.push(Finding::info(Side::Target, "extension-version", object, message));
            }
            Some(_) => {}
        }
    }
    Ok(findings)
}

/// Built-in collations that columns use and the target does not have: CREATE TABLE would fail.
async fn collations(source: &mut Session, target: &mut Session) -> pg::Result<Vec<Finding>> {
    let used = source
        .query(
            "select distinct l.collname from pg_catalog.pg_attribute a \
             join pg_catalog.pg_collation l on l.oid = a.attcollation \
             join pg_catalog.pg_namespace n on n.oid = l.collnamespace \
             where a.attrelid >= 16384 and a.attnum > 0 and n.nspname = 'pg_catalog' \
             and l.collname <> 'default' order by 1",
        )
        .await?;
    let known = names(
        &target
            .query(
                "select l.collname from pg_catalog.pg_collation l \
                 join pg_catalog.pg_namespace n on n.oid = l.collnamespace \
                 where n.nspname = 'pg_catalog'",
            )
            .await?,
    )?;
    let missing = names(&used)?.into_iter().filter(|name| !known.contains(name));
    let message = "is used by columns of the source and missing here: install the locale in the \
         target's operating system, then import it";
    let fix = "SELECT pg_catalog.pg_import_system_collations('pg_catalog');";
    Ok(missing
        .map(|name| {
            let object = format!("collation {name}");
            Finding::error(Side::Target, "collation-missing", object, message).fix(fix)
        })
        .collect())
}

/// Indexes over text built under another version of the locale library may be out of order.
async fn collation_versions(end: &mut End) -> pg::Result<Vec<Finding>> {
    let mut findings = Vec::new();
    let why = "unique indexes may hold duplicates and range queries may miss rows";
    if end.major_version() >= 15 {
        let sql = "select d.datname, d.datcollversion, \
             pg_catalog.pg_database_collation_actual_version(d.oid) \
             from pg_catalog.pg_database d where d.datname = pg_catalog.current_database() \
             and d.datcollversion <> pg_catalog.pg_database_collation_actual_version(d.oid)";
        for row in end.session.query(sql).await? {
            let name = quote_ident(row.str(0)?);
            let message = format!(
                "was made under version {} of its collation and the system has {}: {why}",
                row.str(1)?,
                row.str(2)?
            );
            let fix = format!(
                "REINDEX DATABASE {name};\nALTER DATABASE {name} REFRESH COLLATION VERSION;"
            );
            let object = format!("database {}", row.str(0)?);
            findings
                .push(Finding::warning(end.side, "collation-version", object, message).fix(fix));
        }
    }
    let sql = "select n.nspname, l.collname, l.collversion, \
         pg_catalog.pg_collation_actual_version(l.oid) from pg_catalog.pg_collation l \
         join pg_catalog.pg_namespace n on n.oid = l.collnamespace \
         where l.collversion <> pg_catalog.pg_collation_actual_version(l.oid) \
         and exists (select 1 from pg_catalog.pg_attribute a where a.attcollation = l.oid \
             and a.attrelid >= 16384) order by 1, 2";
    for row in end.session.query(sql).await? {
        let name = QualifiedName::new(row.str(0)?, row.str(1)?);
        let message = format!(
            "is recorded with version {} and the system has {}: {why}",
            row.str(2)?,
            row.str(3)?
        );
        let fix = format!(
            "REINDEX DATABASE {};\nALTER COLLATION {} REFRESH VERSION;",
            quote_ident(&end.facts.dbname),
            name.quoted()
        );
        let object = format!("collation {name}");
        findings.push(Finding::warning(end.side, "collation-version", object, message).fix(fix));
    }
    Ok(findings)
}

async fn event_triggers(end: &mut End) -> pg::Result<Vec<Finding>> {
    let sql = "select evtname, evtevent from pg_catalog.pg_event_trigger \
         where evtenabled <> 'D' and not exists (select 1 from pg_catalog.pg_depend d \
             where d.objid = pg_event_trigger.oid and d.deptype = 'e' \
             and d.classid = 'pg_catalog.pg_event_trigger'::pg_catalog.regclass) order by 1";
    let mut findings = Vec::new();
    for row in end.session.query(sql).await? {
        let (name, event) = (row.str(0)?, row.str(1)?);
        let message = if end.side == Side::Source {
            format!("acts on {event}: making it on the target takes a superuser")
        } else {
            format!("acts on {event}: it fires for the schema that walferry makes here")
        };
        let object = format!("event trigger {name}");
        let finding = Finding::warning(end.side, "event-trigger", object, message);
        findings.push(if end.side == Side::Target {
            finding.fix(format!("ALTER EVENT TRIGGER {} DISABLE;", quote_ident(name)))
        } else {
            finding.at(Level::Info)
        });
    }
    Ok(findings)
}

async fn tablespaces(source: &mut Session, target: &mut Session) -> pg::Result<Vec<Finding>> {
    let used = source
        .query(concat!(
            "select distinct s.spcname from pg_catalog.pg_class c \
             join pg_catalog.pg_namespace n on n.oid = c.relnamespace \
             join pg_catalog.pg_tablespace s on s.oid = c.reltablespace where ",
            of_users!(),
            "order by 1"
        ))
        .await?;
    let known = names(&target.query("select spcname from pg_catalog.pg_tablespace").await?)?;
    let missing = names(&used)?.into_iter().filter(|name| !known.contains(name));
    Ok(missing
        .map(|name| {
            let message = "holds tables or indexes of the source and does not exist here";
            let fix = format!(
                "CREATE TABLESPACE {} LOCATION '/a/directory/of/the/server';",
                quote_ident(&name)
            );
            let object = format!("tablespace {name}");
            Finding::warning(Side::Target, "tablespace-missing", object, message).fix(fix)
        })
        .collect())
}

/// Roles that own something or are granted something in the source's database.
async fn roles(source: &mut Session, target: &mut End) -> pg::Result<Vec<Finding>> {
    let used = source
        .query(
            "select r.rolname, bool_or(r.rolcanlogin), bool_or(u.owns) from \
             (select refobjid, deptype = 'o' as owns from pg_catalog.pg_shdepend \
              where refclassid = 'pg_catalog.pg_authid'::pg_catalog.regclass \
              and dbid = (select oid from pg_catalog.pg_database \
                  where datname = pg_catalog.current_database()) \
              and classid <> 'pg_catalog.pg_default_acl'::pg_catalog.regclass \
              union all \
              select relowner, true from pg_catalog.pg_class where oid >= 16384) u(refobjid, owns) \
             join pg_catalog.pg_roles r on r.oid = u.refobjid \
             where r.rolname !~ '^pg_' group by r.rolname order by r.rolname",
        )
        .await?;
    let known = target
        .session
        .query("select rolname, pg_catalog.pg_has_role(oid, 'member') from pg_catalog.pg_roles")
        .await?;
    let mut member: HashMap<&str, bool> = HashMap::new();
    for row in &known {
        member.insert(row.str(0)?, row.bool(1)?);
    }
    let mut findings = Vec::new();
    for row in &used {
        let (name, login, owns) = (row.str(0)?, row.bool(1)?, row.bool(2)?);
        let object = format!("role {name}");
        let what = if owns { "owns objects" } else { "has rights" };
        let quoted = quote_ident(name);
        match member.get(name) {
            None => {
                let login = if login { " LOGIN" } else { "" };
                let message = format!(
                    "{what} on the source and does not exist here; roles and passwords are a \
                     server's, not a database's (pg_dumpall --roles-only lists them whole)"
                );
                let fix = format!("CREATE ROLE {quoted}{login};");
                findings
                    .push(Finding::warning(Side::Target, "role-missing", object, message).fix(fix));
            }
            Some(false) if owns => {
                let message = format!(
                    "owns objects on the source; role {} is no member of it, and cannot give \
                     them to it here",
                    target.facts.role
                );
                let fix = format!("GRANT {quoted} TO {};", quote_ident(&target.facts.role));
                findings
                    .push(Finding::warning(Side::Target, "owner-right", object, message).fix(fix));
            }
            Some(_) => {}
        }
    }
    Ok(findings)
}

fn names(rows: &[Row]) -> pg::Result<Vec<String>> {
    rows.iter().map(|row| row.string(0)).collect()
}
