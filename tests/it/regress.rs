//! PostgreSQL's own regression suite as the workload: what it leaves behind is moved, then changed
//! again while it is followed. `make regress` fetches the suite and runs these; figures are in
//! tests/ACCEPTANCE.md.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use walferry::demo::binaries;
use walferry::demo::compare::compare;
use walferry::demo::server::Server;

use crate::support::job::{Ends, conserved};
use crate::support::until_within;

/// The database that the suite's expected output names.
const DBNAME: &str = "regression";

/// What round two may take on a busy machine: most tables have no key, so that every change of them
/// reads a table.
const PATIENCE: Duration = Duration::from_secs(900);

/// The built suite, as tests/regress/fetch.sh leaves it.
fn suite() -> PathBuf {
    let place = std::env::var_os("WALFERRY_REGRESS");
    PathBuf::from(place.expect("WALFERRY_REGRESS is not set: run this by `make regress`"))
}

/// Both servers; the job is between the databases `regression`.
fn ends() -> Ends {
    let start = || Server::start(&Server::bin_of(15).unwrap(), &[]).unwrap();
    let mut ends = Ends::of(start(), start());
    ends.target.psql("postgres", &format!("create database {DBNAME}")).unwrap();
    ends.source_via = ends.source.uri(DBNAME);
    ends.target_via = ends.target.uri(DBNAME);
    ends
}

/// Runs the whole suite with its own driver; gives what the driver says at the end.
fn run_suite(source: &Server) -> String {
    let (suite, out) = (suite(), source.dir().join("suite"));
    // The server, another user under root, writes there too.
    for dir in [out.clone(), out.join("results")] {
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::set_permissions(&dir, std::fs::Permissions::from_mode(0o777)).unwrap();
    }
    let option = |name: &str, value: &Path| format!("--{name}={}", value.display());
    let output = Command::new(suite.join("pg_regress"))
        .args([option("bindir", source.bin_dir()), option("inputdir", &suite)])
        .args([option("outputdir", &out), option("dlpath", &suite)])
        .args([option("schedule", &suite.join("parallel_schedule"))])
        .args(["--host=127.0.0.1", "--user=postgres", "--max-connections=10"])
        .args([format!("--port={}", source.port()), format!("--dbname={DBNAME}")])
        .current_dir(&out)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let lines = said.lines().filter(|line| line.contains("FAILED") || line.contains(" tests "));
    lines.map(str::trim).collect::<Vec<_>>().join("; ")
}

/// Does what check says, as a user would; gives the findings that are left.
async fn mend(ends: &Ends) -> Vec<Value> {
    let findings = |json: Value| json["findings"].as_array().unwrap().clone();
    for finding in findings(ends.walferry(&["check", "--json"]).await.json()) {
        let about_keys = ["no-replica-identity", "deferrable-primary-key", "generated-key"];
        let others = ["trigger-fires-on-apply", "role-missing"];
        let code = finding["code"].as_str().unwrap();
        if finding["level"] == "error" || about_keys.contains(&code) || others.contains(&code) {
            let server = if finding["side"] == "target" { &ends.target } else { &ends.source };
            server.psql(DBNAME, finding["fix"].as_str().unwrap()).unwrap();
        }
    }
    let report = ends.done(&["check", "--json"]).await.json();
    assert_eq!(report["ready"], true, "{report}");
    findings(report)
}

/// Whatever has no rows of its own in the move is a finding of check.
fn left_out_is_named(source: &Server, findings: &[Value]) -> String {
    let sql = "select case when relkind = 'f' then 'foreign table ' when relkind = 'm' then \
                   'materialized view ' else 'table ' end || n.nspname || '.' || c.relname \
               from pg_class c join pg_namespace n on n.oid = c.relnamespace \
               where n.nspname !~ '^pg_' and n.nspname <> 'information_schema' \
               and (relkind in ('f', 'm') or relkind = 'r' and relpersistence = 'u') order by 1";
    let listed = source.psql(DBNAME, sql).unwrap();
    for object in listed.lines() {
        assert!(findings.iter().any(|f| f["object"] == object), "{object}: {findings:?}");
    }
    let large = source.psql(DBNAME, "select count(*) from pg_largeobject_metadata").unwrap();
    assert!(large == "0" || findings.iter().any(|f| f["code"] == "large-objects"));
    format!("{}; {large} large objects", listed.lines().collect::<Vec<_>>().join(", "))
}

/// psql over a file; what the server refuses is left out, as the suite's own scripts count on it.
fn script(server: &Server, file: &Path) {
    let status = Command::new(binaries::client("psql").unwrap())
        .args(["-X", "-q", "-d", &server.uri(DBNAME), "-f"])
        .arg(file)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .unwrap();
    assert!(status.success(), "{}", file.display());
}

/// The suite's own statements that change rows, from its scripts in the driver's order, as one script
/// of psql; and how many there are. Statements of every other kind are left out, as are the data of
/// COPY and what psql's own commands would do.
fn own_changes() -> (String, usize) {
    let schedule = std::fs::read_to_string(suite().join("parallel_schedule")).unwrap();
    let tests = schedule.lines().filter_map(|line| line.strip_prefix("test: "));
    let mut script = String::from("set statement_timeout = '20s';\n");
    let mut count = 0;
    for test in tests.flat_map(str::split_whitespace) {
        let path = suite().join("sql").join(format!("{test}.sql"));
        let text = std::fs::read(path).unwrap();
        // Scripts in other encodings are run by their own tests.
        let Ok(text) = String::from_utf8(text) else { continue };
        let Ok(statements) = walferry::schema::script::split(&sql_of(&text)).map(changes) else {
            continue;
        };
        count += statements.len();
        for statement in statements {
            script.push_str(&statement);
            script.push_str(";\n");
        }
    }
    (script, count)
}

/// Without psql's own commands, without the data of COPY.
fn sql_of(text: &str) -> String {
    let mut out = String::new();
    let mut data = false;
    for line in text.lines() {
        let lower = line.to_ascii_lowercase();
        if data {
            data = line != "\\.";
        } else if lower.starts_with("copy ") && lower.contains("from stdin") {
            data = true;
        } else if !line.starts_with('\\') {
            out.push_str(line);
            out.push('\n');
        }
    }
    out
}

/// Those that insert, update, delete, merge or truncate, a WITH before it included.
fn changes(statements: Vec<&str>) -> Vec<String> {
    const VERBS: [&str; 5] = ["insert", "update", "delete", "merge", "truncate"];
    let kept = statements.into_iter().map(|statement| {
        let lines = statement
            .lines()
            .skip_while(|line| line.trim().is_empty() || line.trim_start().starts_with("--"));
        lines.collect::<Vec<_>>().join("\n")
    });
    let changes = |statement: &String| {
        // Variables of psql are set by commands that are left out.
        let lower = statement.trim_start().to_ascii_lowercase();
        let first = lower.split(|c: char| !c.is_ascii_alphabetic()).next().unwrap_or_default();
        let within = || lower.split(|c: char| !c.is_ascii_alphabetic()).any(|w| VERBS.contains(&w));
        (VERBS.contains(&first) || first == "with" && within()) && !lower.contains('\\')
    };
    kept.filter(changes).collect()
}

/// Runs them; gives how many the server took.
fn replay(source: &Server) -> (usize, usize) {
    let (script, count) = own_changes();
    let file = source.dir().join("own_changes.sql");
    std::fs::write(&file, script).unwrap();
    let output = Command::new(binaries::client("psql").unwrap())
        .args(["-X", "-q", "-d", &source.uri(DBNAME), "-f"])
        .arg(&file)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .output()
        .unwrap();
    assert!(output.status.success());
    let refused = String::from_utf8_lossy(&output.stderr);
    let refused = refused.lines().filter(|line| line.contains(": ERROR:  ")).count();
    (count, count.saturating_sub(refused))
}

/// The filter lets through what changes rows, and nothing else.
#[test]
fn changes_are_told_from_other_statements() {
    let text = "-- a; comment\nCREATE TABLE t (a int);\n\\d t\nCOPY t FROM stdin;\n1;2\n\\.\n\
        INSERT INTO t VALUES (1), (';');\nwith x as (select 1) select * from x;\n\
        -- another\nWITH x AS (SELECT 2) DELETE FROM t;\nselect 'insert';\ntruncate t;\n\
        do $$ begin update t set a = 1; end $$;\nUPDATE t SET a = 2;";
    let sql = sql_of(text);
    let found = changes(walferry::schema::script::split(&sql).unwrap());
    let wanted = [
        "INSERT INTO t VALUES (1), (';')",
        "WITH x AS (SELECT 2) DELETE FROM t",
        "truncate t",
        "UPDATE t SET a = 2",
    ];
    assert_eq!(found.iter().map(|s| s.trim()).collect::<Vec<_>>(), wanted);
}

#[tokio::test]
#[ignore = "downloads PostgreSQL's sources: make regress"]
async fn what_postgresqls_own_suite_leaves_is_moved_and_followed() {
    let ends = ends();
    let begun = Instant::now();
    let passed = run_suite(&ends.source);
    println!("the suite: {passed}; {:?}", begun.elapsed());
    assert!(passed.contains("217 tests "), "{passed}");
    let findings = mend(&ends).await;
    println!("without rows of their own: {}", left_out_is_named(&ends.source, &findings));
    let mut run = ends.spawn(&["run"]);
    ends.until_phase(&mut run, "following").await;
    let begun = Instant::now();
    script(&ends.source, Path::new("tests/regress/second_round.sql"));
    let (tried, taken) = replay(&ends.source);
    println!("the suite's own changes again: {taken} of {tried} statements taken");
    assert!(taken > 1000, "{taken} of {tried}");
    let end = ends.source.psql(DBNAME, "select pg_current_wal_lsn()").unwrap();
    let there = format!(
        "select confirmed_flush_lsn >= '{end}' from pg_replication_slots \
         where slot_name like 'walferry%'"
    );
    until_within(PATIENCE, "round two is there", || {
        assert!(!run.has_ended(), "{}", run.so_far());
        std::thread::sleep(Duration::from_millis(500));
        std::future::ready(ends.source.psql(DBNAME, &there).unwrap() == "t")
    })
    .await;
    let status = ends.status().await;
    conserved(&status["tables"]);
    let changes = status["tables"].as_array().unwrap().iter();
    let changes: i64 = changes.map(|table| table["applied"].as_i64().unwrap()).sum();
    let comparison = compare(&ends.source_via, &ends.target_via).await.unwrap();
    let differences = comparison.differences.iter().filter(|line| !line.starts_with("sequence "));
    assert_eq!(differences.collect::<Vec<_>>(), Vec::<&String>::new());
    println!(
        "{} tables, {} rows, {changes} changes followed in {:?}",
        comparison.tables.len(),
        comparison.rows(),
        begun.elapsed()
    );
    assert!(comparison.tables.len() > 500 && changes > 10_000, "{changes} changes");
}
