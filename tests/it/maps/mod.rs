//! `[[map]]`: tables under other names, with fewer columns, fewer rows and masked values, copied and
//! followed. What is due is always the map applied to the source by SQL of the test's own.

mod random;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use ring::hmac;
use walferry::demo::server::Server;
use walferry::pg::{Config, Purpose, Session};

use crate::support::Walferry;
use crate::support::job::{Ends, conserved};

/// Of hash masks.
pub(super) const KEY: &str = "a key that nobody is to see";

/// A walferry.toml of this test's own, gone with it.
pub(super) struct Toml(PathBuf);

impl Toml {
    pub fn of(ends: &Ends, text: &str) -> Toml {
        std::fs::create_dir_all(&ends.spool_dir).unwrap();
        let path = ends.spool_dir.join(format!("{:016x}.toml", fastrand::u64(..)));
        std::fs::write(&path, text).unwrap();
        Toml(path)
    }

    /// The command with this file.
    pub fn with<'a>(&'a self, arguments: &[&'a str]) -> Vec<&'a str> {
        [arguments, &["--config", self.0.to_str().unwrap()]].concat()
    }
}

pub(super) const VARIABLES: &[(&str, &str)] = &[("WALFERRY_MAP_KEY", KEY)];

pub(super) async fn done(ends: &Ends, toml: &Toml, arguments: &[&str]) -> crate::support::Ended {
    ends.spawn_on(&toml.with(arguments), VARIABLES).ended().await.expect_success()
}

/// The hash of a text, in hex, as SQL with the key in it: what RFC 2104 says.
pub(super) fn hashed(text: &str) -> String {
    let pad = |with: u8| -> String {
        let bytes = KEY.bytes().chain(std::iter::repeat(0)).take(64);
        bytes.map(|byte| format!("{:02x}", byte ^ with)).collect()
    };
    format!(
        "encode(sha256(decode('{}', 'hex') || sha256(decode('{}', 'hex') \
         || convert_to({text}, 'UTF8'))), 'hex')",
        pad(0x5c),
        pad(0x36)
    )
}

/// The rows of a query, sorted.
pub(super) fn rows(server: &Server, sql: &str) -> Vec<String> {
    let sql = format!("select r::text from ({sql}) r order by r::text collate \"C\"");
    server.psql("app", &sql).unwrap().lines().map(str::to_string).collect()
}

const TABLES: &str = "create schema shop; \
    create table shop.customer (id bigint primary key, email text not null unique, \
        phone varchar(20), region text, ssn text, full_name text, big text, \
        born date, twice int generated always as (length(phone)) stored); \
    alter table shop.customer replica identity full; \
    create table shop.buys (id int primary key, email text not null, amount numeric(8,2), \
        big text, note text); \
    create table shop.nokey (a int, b text); alter table shop.nokey replica identity full; \
    create table plain (id int primary key, t text); \
    insert into shop.customer select i, 'c' || i || '@example.com', '+49 30 ' || i, \
        (array['eu', 'us', null])[i % 3 + 1], 'secret-ssn-' || i, 'Name ' || i, \
        (select string_agg(md5(i || ':' || j), '') from generate_series(1, 300) j), \
        date '1990-01-01' + i from generate_series(1, 300) i; \
    insert into shop.buys select i, 'c' || (i % 300 + 1) || '@example.com', i / 7.0, \
        (select string_agg(md5(i || '-' || j), '') from generate_series(1, 200) j), 'note ' || i \
        from generate_series(1, 600) i; \
    insert into shop.nokey select i % 7, 'b' from generate_series(1, 50) i; \
    insert into plain select i, 't' from generate_series(1, 50) i";

const MAP: &str = "one-way = true\n\
    [[map]]\ntable = \"shop.*\"\nto = \"crm.*\"\n\
    [[map]]\ntable = \"shop.customer\"\nto = \"crm.person\"\nexclude-columns = [\"ssn\"]\n\
    where = \"region = 'eu' or born > '1990-09-01'\"\nrename = { full_name = \"name\" }\n\
    mask = { email = \"hash\", phone = \"partial:3,2\", \
             full_name = \"sql:left(full_name, 1) || coalesce(region, '?')\" }\n\
    [[map]]\ntable = \"shop.buys\"\nmask = { email = \"hash\", note = \"constant:it's gone\", \
             big = \"sql:upper(big)\" }\n\
    [[map]]\ntable = \"shop.nokey\"\nwhere = \"a <> 3\"\nmask = { b = \"null\" }\n";

/// The map by SQL, and where it is on the target.
fn due() -> [(String, &'static str); 4] {
    let phone = "case when length(phone) <= 5 then repeat('*', length(phone)) else \
                 left(phone, 3) || repeat('*', length(phone) - 5) || right(phone, 2) end";
    [
        (
            format!(
                "select id, {} as email, ({phone})::varchar(20) as phone, region, \
                 left(full_name, 1) || coalesce(region, '?') as name, big, born \
                 from shop.customer where region = 'eu' or born > '1990-09-01'",
                hashed("email")
            ),
            "select id, email, phone, region, name, big, born from crm.person",
        ),
        (
            format!(
                "select id, {} as email, amount, upper(big), 'it''s gone'::text \
                 from shop.buys",
                hashed("email")
            ),
            "select id, email, amount, big, note from crm.buys",
        ),
        (
            "select a, null::text as b from shop.nokey where a <> 3".to_string(),
            "select a, b from crm.nokey",
        ),
        ("select * from plain".to_string(), "select * from plain"),
    ]
}

fn assert_mapped(ends: &Ends) {
    for (source, target) in due() {
        let (due, is) = (rows(&ends.source, &source), rows(&ends.target, target));
        assert!(due == is, "{target}: {} due, {} there", due.len(), is.len());
    }
}

/// Writes to all tables until told to stop: rows cross the filter, keys change, long values stay.
async fn write(uri: String, stop: Arc<AtomicBool>) -> u64 {
    let config = Config::parse(&uri).unwrap();
    let mut session = Session::connect(&config, Purpose::Sql).await.unwrap();
    let mut turn = 0;
    while !stop.load(Ordering::SeqCst) {
        turn += 1;
        let (any, new) = (fastrand::u32(1..400), 1000 + turn);
        let region = ["'eu'", "'us'", "null"][fastrand::usize(0..3)];
        let sql = match fastrand::u32(0..10) {
            0 => format!(
                "insert into shop.customer (id, email, phone, region, ssn, full_name, big, born) \
                 values ({new}, 'n{new}', '1', {region}, 'secret-ssn-x', 'New', repeat('x', 9000), \
                 '1989-01-01'); insert into shop.buys values ({new}, 'n{new}', 1, 'b', 'n')"
            ),
            1 => format!("delete from shop.customer where id = {any}"),
            2 | 3 => format!(
                "update shop.customer set region = {region} where id between {any} and {any} + 9"
            ),
            4 => {
                format!("update shop.customer set phone = '{any} {new}' where id % 50 = {any} % 50")
            }
            5 => format!("update shop.customer set id = {new} where id = {any}"),
            6 => format!("update shop.buys set note = 'x', amount = {any} where id > {any} + 300"),
            7 => format!("update shop.nokey set a = (a + 1) % 7 where a = {any} % 7"),
            8 => format!(
                "insert into shop.nokey values ({any} % 7, null); \
                          delete from shop.nokey where ctid = \
                          (select min(ctid) from shop.nokey where a = {new} % 7)"
            ),
            _ => format!(
                "update public.plain set t = '{new}' where id = {any} % 50; \
                          update shop.buys set email = 'moved' || id where id = {any}"
            ),
        };
        session.execute(&format!("begin; {sql}; commit")).await.unwrap();
        tokio::time::sleep(Duration::from_millis(3)).await;
    }
    turn
}

async fn killed_at_random(ends: &Ends, toml: &Toml, mut run: Walferry, times: u32) -> Walferry {
    for _ in 0..times {
        tokio::time::sleep(Duration::from_millis(fastrand::u64(100..900))).await;
        run.kill9().await;
        run = ends.spawn_on(&toml.with(&["run"]), VARIABLES);
    }
    run
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mapped_job_under_a_writer_and_kills_gives_the_map_applied_by_sql() {
    let ends = Ends::start(15, 15);
    for server in [&ends.source, &ends.target] {
        server.configure(&["log_statement = all"]).unwrap();
        server.reload().unwrap();
    }
    ends.source.psql("app", TABLES).unwrap();
    let toml = Toml::of(&ends, MAP);
    done(&ends, &toml, &["check"]).await;
    let stop = Arc::new(AtomicBool::new(false));
    let writer = tokio::spawn(write(ends.source_uri(), stop.clone()));
    let run = ends.spawn_on(&toml.with(&["run"]), VARIABLES);
    let mut run = killed_at_random(&ends, &toml, run, 3).await;
    ends.until_phase(&mut run, "following").await;
    // While both sides live.
    done(&ends, &toml, &["verify"]).await;
    let run = killed_at_random(&ends, &toml, run, 3).await;
    stop.store(true, Ordering::SeqCst);
    assert!(writer.await.unwrap() > 100);
    let verified = done(&ends, &toml, &["verify", "--json"]).await.json();
    assert_eq!(verified["equal"], true, "{verified}");
    // Before the test's own statements are in the logs, which hold the key.
    secrets(&ends);
    assert_mapped(&ends);

    let mac = hmac::Key::new(hmac::HMAC_SHA256, KEY.as_bytes());
    let tag = hmac::sign(&mac, b"walferry");
    let hex: String = tag.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
    let sql = format!("select {}", hashed("'walferry'"));
    assert_eq!(ends.source.psql("app", &sql).unwrap(), hex, "what the test holds for HMAC");
    let join = "select count(*) from shop.customer c join shop.buys b using (email) \
                where region = 'eu' or born > '1990-09-01'";
    let there = "select count(*) from crm.person join crm.buys using (email)";
    let joined = ends.source.psql("app", join).unwrap();
    assert_eq!(joined, ends.target.psql("app", there).unwrap(), "joins hold");

    let status = ends.status().await;
    conserved(&status["tables"]);
    // The source leaves out by itself what both filters leave out.
    let pushed = "select count(*) from pg_publication_rel where prqual is not null";
    assert_eq!(ends.source.psql("app", pushed).unwrap(), "2");
    refusals(&ends, &toml).await;
    done(&ends, &toml, &["cancel"]).await;
    let _ = run.ended().await;
}

/// What a job with a map does not do, and what verify sees.
async fn refusals(ends: &Ends, toml: &Toml) {
    let refused = ends.spawn_on(&toml.with(&["cutover"]), VARIABLES).ended().await;
    assert_ne!(refused.code, Some(0));
    assert!(refused.err.contains("--one-way"), "{refused:?}");
    let other = Toml::of(ends, &MAP.replace("partial:3,2", "partial:3,3"));
    for command in ["run", "verify"] {
        let refused = ends.spawn_on(&other.with(&[command]), VARIABLES).ended().await;
        assert_ne!(refused.code, Some(0), "{refused:?}");
    }
    let other_key = [("WALFERRY_MAP_KEY", "another key of some length")];
    let refused = ends.spawn_on(&toml.with(&["verify"]), &other_key).ended().await;
    assert!(refused.err.contains("digest"), "{refused:?}");
    let forged =
        "update crm.person set name = 'forged' where id = (select min(id) from crm.person)";
    ends.target.psql("app", forged).unwrap();
    let verified = ends.spawn_on(&toml.with(&["verify", "--json"]), VARIABLES).ended().await;
    assert_eq!(verified.code, Some(1), "{verified:?}");
    let tables = verified.json()["tables"].clone();
    let differing: Vec<_> =
        tables.as_array().unwrap().iter().filter(|table| table["equal"] == false).collect();
    assert_eq!(differing.len(), 1, "{differing:?}");
    assert_eq!(
        (&differing[0]["name"], &differing[0]["differing"]),
        (&"crm.person".into(), &1.into())
    );
}

/// The key is in no log and no table; what a column that stays behind holds is not on the target.
fn secrets(ends: &Ends) {
    let inner: String = KEY.bytes().map(|byte| format!("{:02x}", byte ^ 0x36)).collect();
    for server in [&ends.source, &ends.target] {
        let log = server.log();
        assert!(log.contains("statement: "), "statements are logged");
        assert!(!log.contains(KEY) && !log.contains(&inner), "the key is in a log");
    }
    let job = ends.target.psql("app", "select j::text from walferry.job j").unwrap();
    assert!(!job.contains(KEY) && !job.contains(&inner), "{job}");
    assert!(!ends.target.log().contains("secret-ssn"), "a column that stays behind was sent");
    assert!(!ends.target.log().contains("c7@example.com"), "a masked value was sent");
}

const CHECKED: &str = "create table a (id int primary key, n int not null, t text, \
        g int generated always as (n * 2) stored, e text); \
    create table b (id int primary key, v varchar(8), d date); \
    create table c (id int primary key, t text, u text); \
    create table d (id int primary key, t text); create table e (id int primary key, t text); \
    create table f (id int primary key) partition by range (id); \
    create table f1 partition of f for values from (0) to (9); \
    create table h (id text primary key, t text); alter table h replica identity full; \
    create function later(text) returns text language plpgsql stable \
    as 'begin return $1; end'";

#[tokio::test(flavor = "multi_thread")]
async fn check_names_what_a_map_cannot_do_with_what_mends_it() {
    let ends = Ends::start(15, 15);
    ends.source.psql("app", CHECKED).unwrap();
    ends.target.psql("app", "create table h (id text, t int)").unwrap();
    let toml = Toml::of(
        &ends,
        "[[map]]\ntable = 'public.a'\nexclude-columns = ['id', 'gone']\n\
         [[map]]\ntable = 'public.b'\nmask = { id = 'hash', d = 'hash', v = 'partial:1,1' }\n\
         [[map]]\ntable = 'public.c'\nwhere = \"t > 'a'\"\nmask = { u = 'sql:t || u' }\n\
         [[map]]\ntable = 'public.d'\nto = 'public.e'\n\
         [[map]]\ntable = 'public.e'\nto = 'public.e'\nmask = { t = 'sql:public.later(t)' }\n\
         [[map]]\ntable = 'public.f'\n[[map]]\ntable = 'public.nothing'\n\
         [[map]]\ntable = 'public.h'\n\
         mask = { t = 'sql:(select max(t) from public.c)' }\n",
    );
    let checked = ends.spawn_on(&toml.with(&["check", "--json"]), VARIABLES).ended().await;
    assert_eq!(checked.code, Some(1), "{checked:?}");
    let findings = checked.json()["findings"].clone();
    let find = |code: &str, object: &str, word: &str| {
        let found = findings.as_array().unwrap().iter().find(|finding| {
            finding["code"] == code
                && finding["object"].as_str().unwrap() == object
                && finding["message"].as_str().unwrap().contains(word)
        });
        let found = found.unwrap_or_else(|| panic!("{code} {object} {word}: {findings:#}"));
        found["fix"].as_str().unwrap_or_default().to_string()
    };
    find("no-way-back", "map", "--one-way");
    find("map-column", "table public.a", "gone");
    find("map-needs-identity", "table public.a", "column id identifies");
    find("map-key", "table public.b", "integer is too short");
    find("map-mask", "table public.b", "column d is date");
    let full = find("map-needs-identity", "table public.c", "its filter speaks of t");
    assert_eq!(full, "ALTER TABLE \"public\".\"c\" REPLICA IDENTITY FULL;");
    find("map-needs-identity", "table public.c", "the mask of u needs t, u");
    find("map-name-taken", "table public.e", "public.d and public.e");
    find("map-expression", "table public.e", "IMMUTABLE");
    find("map-kind", "table public.f", "is partitioned");
    find("map-matches-nothing", "table public.nothing", "not among the tables");
    let make = find("map-target", "table public.h", "has integer for column");
    assert!(make.contains("PRIMARY KEY (\"id\")"), "{make}");
    let left = "select count(*) from pg_class where relname like 'walferry%'";
    assert_eq!(ends.source.psql("app", left).unwrap(), "0", "nothing is left of the trial");

    ends.target.psql("app", "drop table h").unwrap();
    let toml = Toml::of(
        &ends,
        "one-way = true\n[[map]]\ntable = 'public.h'\n\
         mask = { t = 'sql:(select max(t) from public.c)' }\n",
    );
    let checked = ends.spawn_on(&toml.with(&["check"]), VARIABLES).ended().await;
    assert!(checked.out.contains("cannot use subquery"), "{checked:?}");
    let without = ends.spawn_on(&Toml::of(&ends, MAP).with(&["check"]), &[]).ended().await;
    assert!(without.err.contains("WALFERRY_MAP_KEY"), "{without:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_column_that_is_new_in_a_mapped_table_waits_and_one_that_is_gone_stops() {
    let ends = Ends::start(15, 15);
    let tables = "create table a (id int primary key, t text); insert into a values (1, 'x')";
    ends.source.psql("app", tables).unwrap();
    let text = "one-way = true\n[[map]]\ntable = 'public.a'\nto = 'm.a'\nmask = { t = 'null' }\n";
    let toml = Toml::of(&ends, text);
    let arguments = toml.with(&["run", "--ddl", "apply"]);
    let mut run = ends.spawn(&arguments);
    ends.until_phase(&mut run, "following").await;
    let alter = "alter table a add column n int; insert into a values (2, 'y', 7)";
    ends.source.psql("app", alter).unwrap();
    crate::support::until_within(Duration::from_secs(30), "the table is parked", async || {
        let parked = ends.status().await["parked"].to_string();
        parked.contains("m.a") && parked.contains("ADD COLUMN")
    })
    .await;
    ends.target.psql("app", "alter table m.a add column n integer").unwrap();
    crate::support::until_within(Duration::from_secs(30), "the table goes on", async || {
        ends.status().await["parked"].as_array().is_some_and(Vec::is_empty)
    })
    .await;
    done(&ends, &toml, &["verify"]).await;
    assert_eq!(rows(&ends.target, "select * from m.a"), ["(1,,)", "(2,,7)"]);
    let rename = "alter table a rename t to u; insert into a values (3, 'secret', 8)";
    ends.source.psql("app", rename).unwrap();
    let ended = run.ended().await;
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(ended.err.contains("no column t any more"), "{ended:?}");
    assert_eq!(rows(&ends.target, "select * from m.a").len(), 2);
}

const MOVED: &str = "create schema shop; \
    create table shop.customer (id bigserial primary key, name text, secret text); \
    create table plain (id serial primary key, t text); \
    insert into shop.customer (name) select 'n' || i from generate_series(1, 100) i; \
    insert into plain (t) select 't' from generate_series(1, 100)";

#[tokio::test(flavor = "multi_thread")]
async fn a_mapped_job_cuts_over_where_it_is_told_twice_and_never_comes_back() {
    let ends = Ends::start(15, 15);
    ends.source.psql("app", MOVED).unwrap();
    let own = "create schema crm; \
               create table crm.person (id bigint generated by default as identity primary key, \
               name text); create index on crm.person (name)";
    ends.target.psql("app", own).unwrap();
    let toml = Toml::of(
        &ends,
        "one-way = true\n[[map]]\ntable = 'shop.customer'\nto = 'crm.person'\n\
         exclude-columns = ['secret']\n",
    );
    done(&ends, &toml, &["check"]).await;
    let mut run = ends.spawn(&toml.with(&["run"]));
    ends.until_phase(&mut run, "following").await;
    let more = "insert into shop.customer (name) values ('last'); update plain set t = 'u'";
    ends.source.psql("app", more).unwrap();
    for arguments in [&["cutover"][..], &["cutover", "--dry-run"]] {
        let refused = ends.spawn(&toml.with(arguments)).ended().await;
        assert_ne!(refused.code, Some(0));
        assert!(refused.err.contains("--one-way"), "{refused:?}");
    }
    let dry = done(&ends, &toml, &["cutover", "--one-way", "--dry-run"]).await;
    assert!(dry.out.contains("no way back"), "{dry:?}");
    let stop = Arc::new(AtomicBool::new(false));
    let (uri, stopped) = (ends.source_uri(), stop.clone());
    let writer = tokio::spawn(async move {
        let config = Config::parse(&uri).unwrap();
        let mut session = Session::connect(&config, Purpose::Sql).await.unwrap();
        let mut written = 0;
        while !stopped.load(Ordering::SeqCst) {
            let sql = "begin; insert into shop.customer (name) values ('w'); \
                       insert into public.plain (t) values ('w'); commit";
            match session.execute(sql).await {
                Ok(_) => written += 1,
                Err(_) => break,
            }
        }
        written
    });
    tokio::time::sleep(Duration::from_millis(300)).await;
    done(&ends, &toml, &["cutover", "--one-way"]).await;
    stop.store(true, Ordering::SeqCst);
    let written: u32 = writer.await.unwrap();
    assert!(written > 10, "{written}");
    let count = |server: &Server, table: &str| {
        server.psql("app", &format!("select count(*) from {table}")).unwrap()
    };
    let due = (101 + written).to_string();
    assert_eq!(count(&ends.target, "crm.person"), due);
    assert_eq!(count(&ends.target, "plain"), (100 + written).to_string());
    assert!(ends.source.psql("app", "insert into shop.customer (name) values ('late')").is_err());
    let new = "insert into crm.person (name) values ('new'); insert into plain (t) values ('new')";
    ends.target.psql("app", new).unwrap();
    let refused = ends.spawn(&toml.with(&["rollback"])).ended().await;
    assert!(refused.err.contains("no way back"), "{refused:?}");
    assert_eq!(count(&ends.source, "shop.customer"), due);
    done(&ends, &toml, &["finish"]).await;
    let _ = run.ended().await;
    let left = "select count(*) from pg_namespace where nspname = 'walferry'";
    let slots = "select count(*) from pg_replication_slots";
    assert_eq!(ends.source.psql("app", slots).unwrap(), "0");
    assert_eq!(ends.source.psql("app", left).unwrap(), "0");
}

/// A map of names alone is turned back: led over, written under the other names, led back under
/// writers, and over again; each time equal to the map applied by SQL.
#[tokio::test(flavor = "multi_thread")]
async fn a_map_of_names_alone_is_led_back_through_them() {
    let ends = Ends::start(15, 15);
    let tables = "create schema shop; create schema old; \
        create table shop.customer (id int primary key, full_name text, big text); \
        create table shop.buys (id serial primary key, v int); \
        create table old.note (n int primary key, t text); \
        create table plain (id int primary key, t text); \
        insert into shop.customer select i, 'n' || i, repeat(md5(i::text), 200) \
            from generate_series(1, 100) i; \
        insert into shop.buys (v) select i from generate_series(1, 100) i; \
        insert into old.note select i, 't' from generate_series(1, 100) i; \
        insert into plain select i, 't' from generate_series(1, 100) i";
    ends.source.psql("app", tables).unwrap();
    let own = "create schema crm; create table crm.buys (id serial primary key, v int)";
    ends.target.psql("app", own).unwrap();
    let map = "[[map]]\ntable = 'shop.*'\nto = 'crm.*'\n\
        [[map]]\ntable = 'shop.customer'\nto = 'crm.person'\nrename = { full_name = 'name' }\n\
        [[map]]\ntable = 'old.note'\nto = 'public.remark'\n";
    let toml = Toml::of(&ends, map);
    done(&ends, &toml, &["check"]).await;
    let masked = Toml::of(&ends, &format!("{map}mask = {{ t = 'null' }}\n"));
    let refused = ends.spawn(&masked.with(&["check"])).ended().await;
    assert!(refused.code == Some(1) && refused.out.contains("column t is masked"), "{refused:?}");
    let mut run = ends.spawn(&toml.with(&["run"]));
    ends.until_phase(&mut run, "following").await;
    let equal = async || {
        for (here, there) in [
            (
                "select id, full_name, big from shop.customer",
                "select id, name, big from crm.person",
            ),
            ("select id, v from shop.buys", "select id, v from crm.buys"),
            ("select n, t from old.note", "select n, t from public.remark"),
            ("select id, t from plain", "select id, t from plain"),
        ] {
            let mut both = (Vec::new(), Vec::new());
            for _ in 0..50 {
                both = (rows(&ends.source, here), rows(&ends.target, there));
                if both.0 == both.1 {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            assert!(
                both.0 == both.1 && both.0.len() > 90,
                "{here}: {} {}",
                both.0.len(),
                both.1.len()
            );
        }
    };
    let write = |server: &Server, names: [&str; 4], turn: u32| {
        let [customer, name, buys, note] = names;
        let sql = format!(
            "insert into {customer} (id, {name}) values ({turn}, 'new {turn}'); \
             update {customer} set {name} = 'at {turn}' where id = {turn} % 90; \
             update {customer} set id = id + 10000 where id = {turn} % 90 + 1; \
             insert into {buys} (v) values ({turn}); delete from {note} where n = {turn} % 100; \
             insert into {note} values ({turn}, 'x'); update plain set t = '{turn}' where id = 1"
        );
        server.psql("app", &format!("begin; {sql}; commit")).unwrap();
    };
    let here = ["shop.customer", "full_name", "shop.buys", "old.note"];
    let there = ["crm.person", "name", "crm.buys", "public.remark"];
    let mut turn = 1000;
    for round in 0..2 {
        for _ in 0..20 {
            turn += 1;
            write(&ends.source, here, turn);
        }
        done(&ends, &toml, &["cutover"]).await;
        assert!(ends.source.psql("app", "delete from shop.buys where false").is_err());
        for _ in 0..20 {
            turn += 1;
            write(&ends.target, there, turn);
        }
        equal().await;
        done(&ends, &toml, &["verify"]).await;
        if round == 0 {
            run.kill9().await;
            run = ends.spawn(&toml.with(&["run"]));
        }
        done(&ends, &toml, &["rollback", "--max-lag", "10s"]).await;
        assert!(ends.target.psql("app", "delete from crm.buys where false").is_err());
        equal().await;
    }
    run.signal("TERM");
    run.ended().await.expect_success();
    done(&ends, &toml, &["finish"]).await;
    for server in [&ends.source, &ends.target] {
        let left = "select (select count(*) from pg_replication_slots), \
            (select count(*) from pg_publication), to_regnamespace('walferry') is null";
        assert_eq!(server.psql("app", left).unwrap(), "0|0|t");
    }
}

/// The source leaves out what a filter leaves out where it can; where it refuses the condition, we
/// do. Both give the same rows.
#[tokio::test(flavor = "multi_thread")]
async fn a_filter_is_applied_by_the_source_where_it_can_be_and_here_where_not() {
    let ends = Ends::start(16, 16);
    let table = "create function odd(i int) returns bool immutable language sql \
            as 'select i % 2 = 1'; \
        create table own (id int, n int, v int, primary key (id, n)); \
        create table theirs (id int, n int, v int, primary key (id, n)); \
        insert into own select i, i % 7, 0 from generate_series(1, 100) i; \
        insert into theirs select * from own";
    ends.source.psql("app", table).unwrap();
    let toml = Toml::of(
        &ends,
        "one-way = true\n\
         [[map]]\ntable = 'public.own'\nwhere = 'n % 2 = 1 -- odd'\n\
         [[map]]\ntable = 'public.theirs'\nwhere = 'public.odd(n)'\n",
    );
    let mut run = ends.spawn(&toml.with(&["run"]));
    ends.until_phase(&mut run, "following").await;
    assert!(run.so_far().contains("the source leaves out rows of public.own by itself"));
    assert!(!run.so_far().contains("rows of public.theirs by itself"), "{}", run.so_far());
    let filtered = "select string_agg(prrelid::regclass || ' ' || (prqual is not null), ', ' \
        order by prrelid::regclass::text) from pg_publication_rel where prrelid::regclass::text in ('own', 'theirs')";
    assert_eq!(ends.source.psql("app", filtered).unwrap(), "own true, theirs false");
    for change in [
        "update {t} set n = n + 1 where id % 3 = 0",
        "update {t} set v = 5 where id % 5 = 0",
        "insert into {t} select i, i % 4, 1 from generate_series(200, 260) i",
        "delete from {t} where id % 11 = 0",
        "update {t} set id = id + 1000, n = n + 1 where id % 13 = 0",
        "begin; insert into {t} values (9001, 1, 7); update {t} set n = 2 where id = 9001; \
         update {t} set n = 3 where id = 9001; delete from {t} where id = 9001; commit",
    ] {
        for table in ["own", "theirs"] {
            ends.source.psql("app", &change.replace("{t}", table)).unwrap();
        }
    }
    let there = |table: &str| rows(&ends.target, &format!("select * from {table}"));
    for table in ["own", "theirs"] {
        let due = format!("select * from {table} where n % 2 = 1");
        let due = rows(&ends.source, &due);
        for _ in 0..50 {
            if there(table) == due {
                break;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        assert!(there(table) == due && due.len() > 50, "{table}: {}", due.len());
    }
    done(&ends, &toml, &["verify"]).await;
    let status = ends.status().await;
    let decoded = |name: &str| -> i64 {
        let tables = status["tables"].as_array().unwrap().iter();
        tables
            .filter(|t| t["name"].as_str().unwrap().starts_with(name))
            .map(|t| t["decoded"].as_i64().unwrap())
            .sum()
    };
    assert!(decoded("public.own") < decoded("public.theirs"), "{status}");
    assert!(status["tables"].to_string().contains("theirs (left out by the map)"), "{status}");
    conserved(&status["tables"]);
    run.signal("TERM");
    run.ended().await.expect_success();
}
