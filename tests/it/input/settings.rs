//! Settings of roles and databases that would change bytes or break the job.

use super::*;

/// Each is set for the database; they are read when a session starts. What the session itself sets
/// has to win.
const HOSTILE: &[(&str, &str, u32)] = &[
    ("datestyle", "'SQL, DMY'", 10),
    ("intervalstyle", "sql_standard", 10),
    ("extra_float_digits", "'-5'", 10),
    ("bytea_output", "escape", 10),
    ("timezone", "'Asia/Kathmandu'", 10),
    ("statement_timeout", "'200ms'", 10),
    ("lock_timeout", "'1ms'", 10),
    ("idle_in_transaction_session_timeout", "'200ms'", 10),
    ("idle_session_timeout", "'200ms'", 14),
    ("transaction_timeout", "'200ms'", 17),
    ("default_transaction_read_only", "on", 10),
    ("default_transaction_isolation", "serializable", 10),
    ("search_path", "'hostile, pg_temp'", 10),
    ("row_security", "on", 10),
    ("array_nulls", "off", 10),
    ("xmloption", "document", 10),
    ("standard_conforming_strings", "off", 10),
    ("quote_all_identifiers", "on", 10),
    ("exit_on_error", "on", 10),
    ("synchronous_commit", "off", 10),
    ("transform_null_equals", "on", 10),
    ("client_encoding", "latin1", 10),
    ("client_min_messages", "debug1", 10),
    ("enable_indexscan", "off", 10),
    ("check_function_bodies", "on", 10),
];

const SCHEMA: &str = r#"
create schema hostile;
create function hostile.count(anyelement) returns bigint language sql as 'select 0::bigint';
create type mood as enum ('sad', 'ok', 'glad');
create table public.value (
    id int primary key, f4 real, f8 double precision, n numeric, t timestamptz, d date, i interval,
    b bytea, x text, a text[], m mood, j jsonb, money money, q int4range, "Odd Name" text);
insert into public.value values
    (1, 0.1::real, 0.1::float8 + 0.2, 'NaN', '2024-03-04 05:06:07.123456+02', '2024-03-04',
     '1 year -2 days +03:04:05.678', '\x00ff5c27', E'back\\slash ''quote'' \u00e9', '{a,NULL,"NULL"}',
     'glad', '{"a": [1, null]}', 12.34, '[1,5)', 'odd'),
    (2, 'Infinity', '-Infinity', 1e-30, 'infinity', '-infinity', '-1 mons', '', '', '{}', 'sad', 'null',
     0, 'empty', null);
"#;

#[tokio::test(flavor = "multi_thread")]
async fn hostile_settings_on_both_sides_change_no_byte_and_break_nothing() {
    hostile(15, 15).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_settings_of_older_and_newer_versions_change_nothing_either() {
    hostile(14, 17).await;
}

async fn hostile(source_major: u32, target_major: u32) {
    let ends = Ends::start(source_major, target_major);
    source(&ends, SCHEMA);
    for (server, major) in [(&ends.source, source_major), (&ends.target, target_major)] {
        for (name, value, since) in HOSTILE {
            if major >= *since
                && (*name != "default_transaction_read_only" || server.port() == ends.source.port())
            {
                let sql = format!("alter database app set {name} = {value}");
                server.psql("postgres", &sql).unwrap();
            }
        }
    }
    // A read-only default is a finding (applications would meet it), not an obstacle.
    let mut run = ends.spawn(&["run"]);
    ends.until_phase(&mut run, "following").await;
    write(
        &ends.source,
        "insert into public.value select 10, f4, f8, n, t, d, i, b, x, a, m, j, \
         money, q, \"Odd Name\" from public.value where id = 1; \
         update public.value set a = a || null::text, x = x || E'\\\\' where id = 2",
    )
    .await;
    arrives(&ends, "select exists (select from public.value where id = 10)").await;
    ends.done(&["verify"]).await;
    ends.done(&["cutover"]).await;
    write(
        &ends.target,
        "insert into public.value select 20, f4, f8, n, t, d, i, b, x, a, m, j, \
         money, q, \"Odd Name\" from public.value where id = 2",
    )
    .await;
    ends.done(&["rollback"]).await;
    ends.done(&["verify"]).await;
    stop(run).await;
    same_rows(&ends).await;
    let rows = session(&ends.source, "app").await.query("select count(*) from public.value").await;
    assert_eq!(rows.unwrap()[0].str(0).unwrap(), "4");
}

/// As an application whose own session undoes the hostile defaults.
async fn write(server: &Server, sql: &str) {
    session(server, "app").await.execute(sql).await.unwrap();
}
