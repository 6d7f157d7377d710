//! Running pg_dump.
//!
//! <https://www.postgresql.org/docs/current/app-pgdump.html>

use std::path::{Path, PathBuf};
use std::process::Stdio;

use tokio::process::Command;

use super::depend::Views;
use super::lex::Cursor;
use super::{Error, Result, plan, script};
use crate::catalog::Selection;
use crate::id::{QualifiedName, quote_ident};
use crate::pg::{Config, Purpose, Session};

/// What of the schema stays behind.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Leave owners behind: everything belongs to the role that runs this.
    pub no_owner: bool,
    /// Leave GRANTs behind.
    pub no_privileges: bool,
    /// Keep tablespaces; they have to exist on the target.
    pub tablespaces: bool,
}

/// The schema as SQL in UTF-8. Whoever resumes has to use the very same texts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dump {
    /// What comes before the rows.
    pub pre: String,
    /// What comes after the rows.
    pub post: String,
}

/// A pg_dump on this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
struct PgDump {
    path: PathBuf,
    major: u32,
}

/// Reads the schema of the tables in `selection`, and everything that is not a table unless it is
/// of tables alone: then foreign keys to tables that stay are kept, as those are on the target too.
///
/// Views that read from a table left out are left out too, and so are foreign keys and partition
/// links to one. Both halves come from one snapshot. Waits up to 30 s for each table lock that
/// pg_dump wants (ACCESS SHARE). Errors name the package to install where no pg_dump will do.
pub async fn dump(config: &Config, selection: &Selection, options: &Options) -> Result<Dump> {
    let mut session = Session::connect(config, Purpose::Sql).await?;
    let major = session.major_version();
    let program = find(major).await?;
    session.execute("begin isolation level repeatable read read only").await?;
    let row = session.query_one("select pg_catalog.pg_export_snapshot()", &[]).await?;
    let snapshot = row.string(0)?;
    let views = Views::read(&mut session).await?;
    let left_out = views.left_out(|name| selection.has_schema(name));
    let indexes = indexes(&mut session, &left_out).await?;
    let named = match selection.tables_only {
        true => Named::Only(views.kept(|name| selection.has_schema(name))),
        false => Named::AllBut(left_out.clone()),
    };
    let arguments = arguments(program.major, options, &snapshot, &named);
    let (pre, post) = halves(&program, config, session.peer(), &arguments).await?;
    session.execute("rollback").await?;
    let gone = [left_out.clone(), indexes].concat();
    let mut post = without_ours(without(&post, &gone, selection.tables_only)?)?;
    let is_read = |view: &&QualifiedName| !selection.tables_only && !left_out.contains(view);
    for view in views.populated().iter().filter(is_read) {
        post.push_str(&format!("\nREFRESH MATERIALIZED VIEW {};\n", view.quoted()));
    }
    Ok(Dump { pre: without(&without_column_versions(pre)?, &left_out, false)?, post })
}

/// Reads how these tables are made, with what belongs to them: links to others stay, as those are
/// on the target. Locks and errors as of [`dump`].
pub async fn dump_tables(
    config: &Config,
    tables: &[QualifiedName],
    options: &Options,
) -> Result<Dump> {
    let mut session = Session::connect(config, Purpose::Sql).await?;
    let program = find(session.major_version()).await?;
    session.execute("begin isolation level repeatable read read only").await?;
    let row = session.query_one("select pg_catalog.pg_export_snapshot()", &[]).await?;
    let named = Named::Only(tables.to_vec());
    let arguments = arguments(program.major, options, row.str(0)?, &named);
    let (pre, post) = halves(&program, config, session.peer(), &arguments).await?;
    session.execute("rollback").await?;
    Ok(Dump { pre: without_column_versions(pre)?, post })
}

/// Pre-data and post-data.
async fn halves(
    program: &PgDump,
    config: &Config,
    peer: &str,
    arguments: &[String],
) -> Result<(String, String)> {
    tokio::try_join!(
        run(&program.path, config, peer, arguments, "pre-data"),
        run(&program.path, config, peer, arguments, "post-data")
    )
}

/// What pg_dump is told of tables.
enum Named {
    AllBut(Vec<QualifiedName>),
    /// These and what belongs to them, and nothing that is not a table.
    Only(Vec<QualifiedName>),
}

/// Indexes of these tables.
async fn indexes(session: &mut Session, tables: &[QualifiedName]) -> Result<Vec<QualifiedName>> {
    if tables.is_empty() {
        return Ok(Vec::new());
    }
    let sql = "select n.nspname, c.relname, xn.nspname, x.relname from pg_catalog.pg_index i \
         join pg_catalog.pg_class c on c.oid = i.indrelid \
         join pg_catalog.pg_namespace n on n.oid = c.relnamespace \
         join pg_catalog.pg_class x on x.oid = i.indexrelid \
         join pg_catalog.pg_namespace xn on xn.oid = x.relnamespace";
    let mut indexes = Vec::new();
    for row in session.query(sql).await? {
        if tables.contains(&QualifiedName::new(row.str(0)?, row.str(1)?)) {
            indexes.push(QualifiedName::new(row.str(2)?, row.str(3)?));
        }
    }
    Ok(indexes)
}

/// The script without foreign keys to, partitions of, tables and indexes left out: pg_dump does
/// not look at the other end of those. Foreign keys stay where `keys` says so.
fn without(script: &str, left_out: &[QualifiedName], keys: bool) -> Result<String> {
    if left_out.is_empty() {
        return Ok(script.to_string());
    }
    let mut out = String::with_capacity(script.len());
    for sql in script::split(script)? {
        let is_left_out = |table: &QualifiedName| left_out.contains(table);
        if (keys && plan::acts(sql)) || !plan::other_tables(sql).iter().any(is_left_out) {
            out.push_str(sql);
            out.push_str(";\n");
        }
    }
    Ok(out)
}

/// The script without event triggers of ours: their function is in a schema that is not dumped.
fn without_ours(text: String) -> Result<String> {
    if !text.contains("EVENT TRIGGER walferry_") {
        return Ok(text);
    }
    let ours = |sql: &&str| {
        let mut cursor = Cursor::new(sql);
        let event = cursor.find("event") && cursor.eat("trigger");
        event && cursor.ident().is_some_and(|name| name.starts_with("walferry_"))
    };
    let kept = script::split(&text)?.into_iter().filter(|sql| !ours(sql));
    Ok(kept.map(|sql| format!("{sql};\n")).collect())
}

/// The script without `pg_attver` of columns, see [`script::without_column_version`].
fn without_column_versions(text: String) -> Result<String> {
    if !text.contains("pg_attver=") {
        return Ok(text);
    }
    let mut out = String::with_capacity(text.len());
    for sql in script::split(&text)? {
        let kept = if Cursor::new(sql).eat("alter table") {
            script::without_column_version(sql)
        } else {
            Some(sql.to_string())
        };
        if let Some(sql) = kept {
            out.push_str(&sql);
            out.push_str(";\n");
        }
    }
    Ok(out)
}

/// Arguments but for the section; nothing secret is among them.
fn arguments(dump_major: u32, options: &Options, snapshot: &str, named: &Named) -> Vec<String> {
    let mut arguments: Vec<String> =
        ["--schema-only", "--no-password", "--encoding=UTF8", "--exclude-schema=walferry"]
            .map(String::from)
            .to_vec();
    // A lock held by someone else must not hold up the job without a word.
    arguments.push("--lock-wait-timeout=30s".to_string());
    arguments.push("--no-subscriptions".to_string());
    arguments.push(format!("--snapshot={snapshot}"));
    let mut flag = |wanted: bool, name: &str| {
        if wanted {
            arguments.push(name.to_string());
        }
    };
    flag(dump_major >= 11, "--no-publications");
    flag(dump_major >= 18, "--no-statistics");
    flag(options.no_owner, "--no-owner");
    flag(options.no_privileges, "--no-privileges");
    flag(!options.tablespaces, "--no-tablespaces");
    let (option, names) = match named {
        Named::AllBut(names) => ("--exclude-table", names),
        Named::Only(names) => ("--table", names),
    };
    arguments.extend(names.iter().map(|name| format!("{option}={}", pattern(name))));
    arguments
}

/// A pattern for exactly this table: inside double quotes every character stands for itself.
///
/// <https://www.postgresql.org/docs/current/app-psql.html#APP-PSQL-PATTERNS>
fn pattern(name: &QualifiedName) -> String {
    format!("{}.{}", quote_ident(&name.schema), quote_ident(&name.name))
}

async fn run(
    program: &Path,
    config: &Config,
    peer: &str,
    arguments: &[String],
    section: &str,
) -> Result<String> {
    let failed = |status: String, stderr: String| Error::PgDump {
        program: program.display().to_string(),
        peer: peer.to_string(),
        status,
        stderr,
    };
    let mut command = Command::new(program);
    command.args(arguments).arg(format!("--section={section}"));
    // Settings of whoever runs us must not lead pg_dump elsewhere.
    for name in ["PGSERVICE", "PGSERVICEFILE"] {
        command.env_remove(name);
    }
    for (name, value) in config.to_env() {
        if value.is_empty() {
            command.env_remove(name)
        } else {
            command.env(name, value)
        };
    }
    // Strings in the script are read by script.rs, which knows one kind of plain quotes.
    let options = config.options.as_deref().unwrap_or_default();
    let options =
        format!("{options} -c standard_conforming_strings=on -c quote_all_identifiers=off");
    command.env("PGOPTIONS", options.trim()).stdin(Stdio::null()).kill_on_drop(true);
    let output = command
        .output()
        .await
        .map_err(|e| failed("it does not start".to_string(), e.to_string()))?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr).trim().to_string();
        return Err(failed(output.status.to_string(), crate::secret::redact(&stderr)));
    }
    String::from_utf8(output.stdout).map_err(|e| {
        let detail = format!("its output is not UTF-8: {}", e.utf8_error());
        failed(output.status.to_string(), detail)
    })
}

/// The pg_dump to use for a source of this major version: the one in WALFERRY_PG_DUMP, else the
/// lowest version that is not below the source's. Lowest, because a later pg_dump may write what
/// an older target does not understand.
async fn find(major: u32) -> Result<PgDump> {
    let found = on_this_machine(|version| version == major).await;
    pick(&found, major).cloned().ok_or_else(|| {
        let list: Vec<String> =
            found.iter().map(|d| format!("{} {}", d.path.display(), d.major)).collect();
        let found = if list.is_empty() { "none".to_string() } else { list.join(", ") };
        Error::NoPgDump { major, found }
    })
}

/// Major versions of the pg_dump programs of this machine, ascending, each once; those after one
/// that can read a source of this major version are left out.
pub async fn pg_dump_versions(source_major: u32) -> Vec<u32> {
    let found = on_this_machine(|version| version >= source_major).await;
    let mut versions: Vec<u32> = found.iter().map(|d| d.major).collect();
    versions.sort_unstable();
    versions.dedup();
    versions
}

/// The one in WALFERRY_PG_DUMP alone, else Debian's and those on the PATH, up to the first whose
/// version will do: each is started to tell it, and a wrapper takes longer than the program.
async fn on_this_machine(will_do: impl Fn(u32) -> bool) -> Vec<PgDump> {
    let chosen = std::env::var_os("WALFERRY_PG_DUMP").map(PathBuf::from);
    let paths = match chosen {
        Some(path) => vec![path],
        None => candidates(),
    };
    let mut found = Vec::new();
    for path in paths {
        if let Some(major) = version_of(&path).await {
            found.push(PgDump { path, major });
            if will_do(major) {
                break;
            }
        }
    }
    found
}

/// Of equals the first: Debian's versioned directories come before the wrapper on the PATH, which
/// decides by itself which version to run.
fn pick(found: &[PgDump], major: u32) -> Option<&PgDump> {
    found.iter().filter(|d| d.major >= major).min_by_key(|d| d.major)
}

fn candidates() -> Vec<PathBuf> {
    let mut paths = Vec::new();
    if let Ok(entries) = std::fs::read_dir("/usr/lib/postgresql") {
        paths.extend(entries.flatten().map(|entry| entry.path().join("bin/pg_dump")));
    }
    paths.sort();
    if let Some(path) = std::env::var_os("PATH") {
        paths.extend(std::env::split_paths(&path).map(|dir| dir.join("pg_dump")));
    }
    paths.retain(|path| path.is_file());
    paths
}

async fn version_of(path: &Path) -> Option<u32> {
    let output = Command::new(path)
        .arg("--version")
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await
        .ok()?;
    parse_version(&String::from_utf8_lossy(&output.stdout))
}

/// `pg_dump (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)`, `... 18beta1`.
fn parse_version(text: &str) -> Option<u32> {
    let version = text.split_once("(PostgreSQL)")?.1.trim_start();
    let digits: String = version.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_columns_are_left_out_and_nothing_else() {
        let text = "SET a = b;\nCREATE FUNCTION f() RETURNS text LANGUAGE sql \
             AS $$ select 'pg_attver=1' $$;\n\
             ALTER TABLE ONLY t ALTER COLUMN a SET (pg_attver=12);\n\
             ALTER TABLE ONLY t ALTER COLUMN b SET (pg_attver=12, n_distinct=5);\n";
        let left = text
            .replace("ALTER TABLE ONLY t ALTER COLUMN a SET (pg_attver=12);\n", "")
            .replace("pg_attver=12, ", "");
        assert_eq!(without_column_versions(text.to_string()).unwrap(), left);
        assert_eq!(without_column_versions(left.clone()).unwrap(), left);
    }

    #[test]
    fn versions_are_read_as_pg_dump_writes_them() {
        let debian = "pg_dump (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)\n";
        assert_eq!(parse_version(debian), Some(15));
        assert_eq!(parse_version("pg_dump (PostgreSQL) 18beta1\n"), Some(18));
        assert_eq!(parse_version("something else 1"), None);
    }

    #[test]
    fn the_lowest_version_that_can_read_the_source_is_taken() {
        let found: Vec<PgDump> = [(17, "a"), (14, "b"), (15, "c"), (15, "d")]
            .map(|(major, path)| PgDump { path: path.into(), major })
            .to_vec();
        assert_eq!(pick(&found, 15).unwrap().path, PathBuf::from("c"));
        assert_eq!(pick(&found, 10).unwrap().path, PathBuf::from("b"));
        assert_eq!(pick(&found, 16).unwrap().path, PathBuf::from("a"));
        assert_eq!(pick(&found, 18), None);
    }

    #[test]
    fn passwords_are_not_among_the_arguments() {
        let named = Named::AllBut(Vec::new());
        let arguments = arguments(15, &Options::default(), "0-1-1", &named);
        assert!(!arguments.iter().any(|a| a.contains("s3cret")));
    }

    #[test]
    fn names_become_patterns_that_mean_only_them() {
        let name = QualifiedName::new("a.b", "c\"*?");
        assert_eq!(pattern(&name), "\"a.b\".\"c\"\"*?\"");
    }
}
