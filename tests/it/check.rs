//! Tests of the check: each finding is provoked on a real server, and where it prints SQL that
//! mends it, that SQL is run and the finding is gone.

use std::time::Duration;

use walferry::catalog::Selection;
use walferry::demo::server::{Server, StopMode};
use walferry::job::check::{CheckOptions, Finding, Level, Report, Side, run};
use walferry::pg::{Config, Purpose, Session};

use crate::support::{self, until};

/// A source and a target that are separate servers.
struct World {
    source: Server,
    target: Server,
    options: CheckOptions,
    role: String,
}

impl World {
    fn new(source: &[&str], target: &[&str]) -> World {
        let bin = Server::default_bin().unwrap();
        let mut options = CheckOptions::new("shop".parse().unwrap());
        options.wal_sample = Duration::from_millis(1);
        World {
            source: Server::start(&bin, source).unwrap(),
            target: Server::start(&bin, target).unwrap(),
            options,
            role: "postgres".to_string(),
        }
    }

    fn config(&self, side: Side, dbname: &str) -> Config {
        let server = if side == Side::Source { &self.source } else { &self.target };
        let mut config = Config::parse(&server.uri(dbname)).unwrap();
        config.user = self.role.clone();
        config
    }

    async fn check(&self) -> Report {
        let (source, target) =
            (self.config(Side::Source, "postgres"), self.config(Side::Target, "postgres"));
        run(&source, &target, self.options.clone()).await.unwrap()
    }

    /// Runs SQL as the superuser.
    async fn sql(&self, side: Side, sql: &str) {
        let server = if side == Side::Source { &self.source } else { &self.target };
        support::session(server, "postgres").await.execute(sql).await.unwrap();
    }

    /// Runs what a finding prints as psql would: a statement at a time, comments skipped.
    async fn mend(&self, finding: &Finding) {
        let fix = finding.fix.as_ref().unwrap_or_else(|| panic!("no fix: {finding:?}"));
        let server = if finding.side == Side::Source { &self.source } else { &self.target };
        let mut session = support::session(server, "postgres").await;
        for line in fix.lines().filter(|line| !line.starts_with("--")) {
            session.execute(line).await.unwrap_or_else(|e| panic!("{e}: {finding:?}"));
        }
    }

    /// Expects the finding, at that level, runs its fix, and expects it gone.
    async fn finds_and_mends(&self, level: Level, code: &str, object: &str) -> Finding {
        let finding = find(&self.check().await, code, object).clone();
        assert_eq!(finding.level, level, "{finding:?}");
        self.mend(&finding).await;
        let report = self.check().await;
        let left = report.findings.iter().find(|f| f.code == code && f.object == finding.object);
        assert_eq!(left.filter(|f| f.level == level && f.side == finding.side), None);
        finding
    }
}

fn find<'a>(report: &'a Report, code: &str, object: &str) -> &'a Finding {
    let found = report.findings.iter().find(|f| f.code == code && f.object.contains(object));
    found.unwrap_or_else(|| panic!("no {code} of {object}: {:#?}", report.findings))
}

fn codes(report: &Report, level: Level) -> Vec<String> {
    let found = report.findings.iter().filter(|f| f.level == level);
    found.map(|f| format!("{} {} {}", f.side, f.code, f.object)).collect()
}

use Level::{Error, Info, Warning};
use Side::{Source, Target};

#[tokio::test]
async fn two_fresh_servers_are_ready() {
    let world = World::new(&[], &[]);
    world
        .sql(Source, "create table public.t (id int primary key); insert into public.t values (1)")
        .await;
    let report = world.check().await;
    assert!(report.ready(), "{report:#?}");
    assert_eq!(codes(&report, Warning), Vec::<String>::new());
    assert!(find(&report, "profile", "role postgres").message.contains("superuser"));
    assert!(find(&report, "size", "database postgres").message.contains("1 tables"));
    find(&report, "wal-forecast", "max_slot_wal_keep_size");
    // The servers of a test are on this machine, and root may look at their files.
    if std::fs::read_dir(world.target.data_dir()).is_ok() {
        let dir = world.target.data_dir().display().to_string();
        let disk = find(&report, "disk", &dir);
        assert!(disk.side == Side::Target && disk.message.contains(" free, and the tables take"));
    }
    find(&report, "wal-sender-timeout", "wal_sender_timeout");
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!(json["ready"], true);
    assert_eq!(json["findings"][0]["level"], "info");
    // The same database, and a database beside it.
    let source = world.config(Source, "postgres");
    let report = run(&source, &source, world.options.clone()).await.unwrap();
    assert!(!report.ready());
    find(&report, "same-database", "postgres");
    let beside = world.config(Source, "template1");
    let report = run(&source, &beside, world.options.clone()).await.unwrap();
    assert_eq!(find(&report, "same-server", "template1").level, Warning);
    // A server that does not answer is a finding too.
    world.target.stop(StopMode::Fast).unwrap();
    let report = world.check().await;
    assert_eq!(codes(&report, Error), ["target unreachable target"]);
    assert_eq!(report.findings.len(), 1);
    world.target.resume().unwrap();
    let mut nowhere = world.config(Source, "nowhere");
    nowhere.label = "source".to_string();
    let target = world.config(Target, "postgres");
    let report = run(&nowhere, &target, world.options.clone()).await.unwrap();
    assert!(find(&report, "unreachable", "source").message.contains("nowhere"));
}

#[tokio::test]
async fn settings_that_refuse_a_stream_are_found_and_mended_by_a_restart() {
    let small = [
        "wal_level = replica",
        "max_replication_slots = 1",
        "max_wal_senders = 1",
        "max_connections = 15",
    ];
    let world = World::new(&small, &small);
    world.sql(Source, "select pg_replication_origin_create('another')").await;
    world.sql(Target, "select pg_replication_origin_create('another')").await;
    let report = world.check().await;
    assert!(!report.ready());
    for side in [Source, Target] {
        let of_side = |f: &&Finding| f.side == side && f.level == Error;
        let found: Vec<&Finding> = report.findings.iter().filter(of_side).collect();
        let codes: Vec<&str> = found.iter().map(|f| f.code).collect();
        assert_eq!(
            codes,
            [
                "few-connections",
                "no-free-origin",
                "no-free-slot",
                "no-free-wal-sender",
                "wal-level"
            ]
        );
        for finding in found {
            world.mend(finding).await;
        }
    }
    world.source.restart(StopMode::Fast).unwrap();
    world.target.restart(StopMode::Fast).unwrap();
    let report = world.check().await;
    assert!(report.ready(), "{report:#?}");
    // Without a way back the target needs none of it.
    let world = World::new(&[], &["wal_level = minimal", "max_wal_senders = 0"]);
    assert!(!world.check().await.ready());
    let mut one_way = CheckOptions::new("shop".parse().unwrap());
    one_way.reverse = false;
    let (source, target) = (world.config(Source, "postgres"), world.config(Target, "postgres"));
    let report = run(&source, &target, one_way).await.unwrap();
    assert!(report.ready(), "{report:#?}");
}

#[tokio::test]
async fn settings_that_surprise_later_are_found() {
    let world = World::new(&["max_prepared_transactions = 5"], &[]);
    // Wherever it is set, the statement printed takes it back.
    for set in [
        "alter system set default_transaction_read_only = on",
        "alter database postgres set default_transaction_read_only = on",
        "alter role postgres set default_transaction_read_only = on",
        "alter role postgres in database postgres set default_transaction_read_only = on",
    ] {
        let mut session = support::session(&world.target, "postgres").await;
        session.execute(set).await.unwrap();
        session.execute("select pg_reload_conf()").await.unwrap();
        reloaded(&world.target, "on").await;
        world.finds_and_mends(Error, "default-read-only", "default_transaction_read_only").await;
    }
    world.sql(Source, "alter role postgres set idle_session_timeout = '1h'").await;
    find(&world.check().await, "timeout-default", "idle_session_timeout");
    world.sql(Source, "alter role postgres set statement_timeout = '1h'").await;
    find(&world.check().await, "timeout-default", "statement_timeout");
}

/// Waits until a new session sees the setting.
async fn reloaded(server: &Server, value: &str) {
    let config = Config::parse(&server.uri("postgres")).unwrap();
    loop {
        let mut bare = Session::connect(&config, Purpose::PoolerAdmin).await.unwrap();
        let rows = bare.query("show default_transaction_read_only").await.unwrap();
        if rows[0].str(0).unwrap() == value {
            return;
        }
    }
}

#[tokio::test]
async fn every_missing_right_is_found_with_its_grant() {
    let mut world = World::new(&[], &[]);
    world
        .sql(
            Source,
            "create role owner; create role mover login; create schema app authorization owner; \
             set role owner; create table app.t (id serial primary key); \
             insert into app.t default values; \
             alter table app.t enable row level security; \
             alter table app.t force row level security",
        )
        .await;
    world.sql(Target, "create role mover login; create role owner").await;
    world.role = "mover".to_string();
    let report = world.check().await;
    assert!(!report.ready());
    for side in [Source, Target] {
        let mut errors: Vec<&str> = report
            .findings
            .iter()
            .filter(|f| f.side == side && f.level == Error)
            .map(|f| f.code)
            .collect();
        errors.sort_unstable();
        let mut expected = vec!["create-right", "replication-right", "row-security"];
        if side == Source {
            expected = vec!["publication-right", "replication-right", "row-security"];
            expected.extend(["select-right", "sequence-right"]);
        }
        expected.sort_unstable();
        assert_eq!(errors, expected, "{side}");
    }
    let profile = find(&report, "profile", "role mover").message.clone();
    assert!(profile.contains("neither"), "{profile}");
    find(&report, "stats-right", "pg_read_all_stats");
    find(&report, "write-right", "role mover");
    // Everything printed, run once, makes it ready.
    for finding in report.findings.iter().filter(|f| f.fix.is_some() && f.side != Side::Here) {
        world.mend(finding).await;
    }
    let report = world.check().await;
    assert!(report.ready(), "{report:#?}");
    assert!(report.findings.iter().all(|f| !f.code.ends_with("-right")), "{report:#?}");
    let profile = &find(&report, "profile", "role mover").message;
    assert!(profile.contains("owner with REPLICATION"), "{profile}");
}

#[tokio::test]
async fn peerdb_1118_a_refused_replication_connection_is_told_from_a_missing_right() {
    let world = World::new(&[], &[]);
    // All walsenders taken.
    let config = world.config(Source, "postgres");
    let mut senders = Vec::new();
    world.sql(Source, "alter system set max_wal_senders = 1").await;
    world.source.restart(StopMode::Fast).unwrap();
    senders.push(Session::connect(&config, Purpose::Replication).await.unwrap());
    let report = world.check().await;
    find(&report, "no-free-wal-sender", "max_wal_senders");
    assert!(find(&report, "replication-connection", "role postgres").message.contains("pg_hba"));
    // Where a managed service has a role for it, that is what is granted (PeerDB#1118).
    world.sql(Source, "create role mover login; create role rds_replication").await;
    let mut config = config;
    config.user = "mover".to_string();
    let target = world.config(Target, "postgres");
    let report = run(&config, &target, world.options.clone()).await.unwrap();
    let fix = find(&report, "replication-right", "role mover").fix.clone();
    assert_eq!(fix.as_deref(), Some("GRANT rds_replication TO \"mover\";"));
}

#[tokio::test]
async fn tables_whose_updates_would_fail_once_published_are_found() {
    let world = World::new(&[], &[]);
    world
        .sql(
            Source,
            "create table public.bare (a int); insert into public.bare values (1); \
             create table public.inserted (a int); insert into public.inserted values (1); \
             create table public.indexed (a int not null, b int); \
             create unique index \"Odd Index\" on public.indexed (a); \
             create unique index nullable on public.indexed (b); \
             insert into public.indexed values (1, 1); \
             create table public.partial (a int not null); \
             create unique index on public.partial (a) where a > 0; \
             insert into public.partial values (1); \
             create table public.late (a int primary key deferrable); \
             insert into public.late values (1); \
             create table public.nothing (a int primary key); \
             alter table public.nothing replica identity nothing; \
             insert into public.nothing values (1); \
             create table public.doubled (a int, b int generated always as (a * 2) stored \
                 primary key, c int not null generated always as (a * 3) stored unique); \
             insert into public.doubled values (1); \
             create table public.included (a int primary key, \
                 b int generated always as (a * 2) stored, unique (a) include (b)); \
             create table public.fine (a int primary key); \
             create table public.full_row (a int); \
             alter table public.full_row replica identity full; \
             create table public.parent (a int) partition by range (a); \
             create table public.part partition of public.parent for values from (0) to (10); \
             create table public.left_out (a int); insert into public.left_out values (1)",
        )
        .await;
    world
        .sql(
            Source,
            "update public.bare set a = 2; update public.indexed set b = 2; \
             update public.partial set a = 2; delete from public.late; \
             update public.nothing set a = 2; update public.doubled set a = 2; delete from public.left_out; \
             insert into public.parent values (1); update public.parent set a = 2; \
             select pg_stat_force_next_flush()",
        )
        .await;
    let mut world = world;
    let left_out = ["public.left_out".to_string()];
    world.options.selection = Selection::parse(&[], &[], &left_out).unwrap();
    let code = "no-replica-identity";
    let report = world.check().await;
    for absent in
        ["public.fine", "public.included", "public.full_row", "public.left_out", "public.parent"]
    {
        let object = format!("table {absent}");
        assert!(report.findings.iter().all(|f| f.object != object), "{absent}");
    }
    let fix = |f: Finding| f.fix.unwrap();
    let bare = world.finds_and_mends(Error, code, "public.bare").await;
    assert!(fix(bare).ends_with("REPLICA IDENTITY FULL;"));
    let indexed = world.finds_and_mends(Error, code, "public.indexed").await;
    assert!(fix(indexed).ends_with("USING INDEX \"Odd Index\";"));
    assert!(fix(world.finds_and_mends(Error, code, "public.partial").await).ends_with("FULL;"));
    assert!(fix(world.finds_and_mends(Error, code, "public.nothing").await).ends_with("DEFAULT;"));
    world.finds_and_mends(Error, code, "public.part").await;
    // Found by PostgreSQL's regression suite (gtest23p): such a key is in no pgoutput message.
    let doubled = world.finds_and_mends(Error, "generated-key", "public.doubled").await;
    assert!(fix(doubled).ends_with("FULL;"));
    world.finds_and_mends(Error, "deferrable-primary-key", "public.late").await;
    world.finds_and_mends(Warning, code, "public.inserted").await;
    assert!(world.check().await.ready());
}

#[tokio::test]
async fn tables_that_move_in_a_special_way_are_told() {
    let world = World::new(&[], &[]);
    world
        .sql(
            Source,
            "create unlogged table public.u (a int primary key); \
             create function public.f() returns trigger language plpgsql \
                as 'begin return new; end'; \
             create table public.t (a int primary key); \
             create trigger \"on A\" before insert on public.t execute function public.f(); \
             create trigger on_b before insert on public.t execute function public.f(); \
             create trigger plain before insert on public.t execute function public.f(); \
             alter table public.t enable always trigger \"on A\"; \
             alter table public.t enable replica trigger on_b; \
             create foreign data wrapper w; create server s foreign data wrapper w; \
             create foreign table public.remote (a int) server s; \
             create materialized view public.m as select 1 as a; \
             create table public.p (a int primary key) partition by range (a); \
             create table public.p1 partition of public.p for values from (0) to (10); \
             create table public.child () inherits (public.t); \
             alter table public.child add primary key (a); \
             create function public.e() returns event_trigger language plpgsql as 'begin end'; \
             create event trigger watch on ddl_command_end execute function public.e(); \
             select lo_create(0); create publication others for table public.t",
        )
        .await;
    world
        .sql(
            Target,
            "create schema x; \
             create function x.e() returns event_trigger language plpgsql as 'begin end'; \
             create event trigger guard on ddl_command_end execute function x.e()",
        )
        .await;
    let mut holder = support::session(&world.source, "postgres").await;
    holder.execute("create temporary table held (a int)").await.unwrap();
    let report = world.check().await;
    assert!(report.ready(), "{report:#?}");
    for (code, object) in [
        ("materialized-view", "public.m"),
        ("partitioned-tables", "partitioned tables"),
        ("inherited-tables", "inherited tables"),
        ("temporary-tables", "temporary tables"),
        ("publications", "publications"),
        ("large-objects", "large objects"),
        ("event-trigger", "event trigger watch"),
    ] {
        assert_eq!(find(&report, code, object).level, Info, "{code}");
    }
    assert_eq!(find(&report, "foreign-table", "public.remote").level, Warning);
    world.finds_and_mends(Warning, "unlogged-table", "public.u").await;
    world.finds_and_mends(Warning, "event-trigger", "guard").await;
    let fires = "trigger-fires-on-apply";
    for name in ["\"on A\"", "on_b"] {
        let report = world.check().await;
        let finding = report.findings.iter().find(|f| f.code == fires && f.message.contains(name));
        world.mend(finding.unwrap()).await;
    }
    assert!(world.check().await.findings.iter().all(|f| f.code != fires));
}

#[tokio::test]
async fn a_subscription_on_the_source_is_found() {
    let world = World::new(&[], &[]);
    world
        .sql(
            Source,
            "create subscription feed connection 'host=localhost dbname=nowhere' \
             publication p with (connect = false)",
        )
        .await;
    // Made without connecting it is disabled, and then it brings nothing.
    assert!(world.check().await.findings.iter().all(|f| f.code != "subscription"));
    world.sql(Source, "alter subscription feed enable").await;
    world.finds_and_mends(Warning, "subscription", "feed").await;
}

#[tokio::test]
async fn what_the_target_lacks_is_found() {
    let world = World::new(&[], &[]);
    let space = world.source.data_dir().parent().unwrap().join("space");
    world
        .sql(
            Source,
            &format!(
                "copy (select 1) to program 'cat >/dev/null && mkdir {0}'; create role \"App Owner\" login; \
                 create role reader; create table public.t (a int primary key); \
                 alter table public.t owner to \"App Owner\"; \
                 grant select on public.t to reader",
                space.display()
            ),
        )
        .await;
    let mut session = support::session(&world.source, "postgres").await;
    let create = format!("create tablespace fast location '{}'", space.display());
    session.execute(&create).await.unwrap();
    session.execute("create index on public.t (a) tablespace fast").await.unwrap();
    // An extension and a collation that only one side knows: stand-ins in the catalogs.
    session
        .execute(
            "set allow_system_table_mods = on; \
             insert into pg_catalog.pg_extension (oid, extname, extowner, extnamespace, \
                extrelocatable, extversion) \
             values (99999, 'no_such', 10, 11, false, '1.0'); \
             update pg_catalog.pg_extension set extversion = '0.1' where extname = 'plpgsql'; \
             create collation pg_catalog.\"xx_XX\" (locale = 'C'); \
             create table public.c (a text collate \"xx_XX\" primary key)",
        )
        .await
        .unwrap();
    let report = world.check().await;
    assert_eq!(
        codes(&report, Error),
        ["target collation-missing collation xx_XX", "target extension-missing extension no_such"]
    );
    assert_eq!(find(&report, "extension-version", "plpgsql").level, Info);
    let missing = find(&report, "tablespace-missing", "tablespace fast");
    assert!(missing.fix.as_ref().unwrap().starts_with("CREATE TABLESPACE \"fast\" LOCATION"));
    let owner = world.finds_and_mends(Warning, "role-missing", "App Owner").await;
    assert!(owner.fix.unwrap().contains("LOGIN"));
    let reader = world.finds_and_mends(Warning, "role-missing", "reader").await;
    assert!(!reader.fix.unwrap().contains("LOGIN"));
}

#[tokio::test]
async fn encodings_and_collations_that_differ_are_found() {
    let world = World::new(&[], &[]);
    let target = |name: &'static str| {
        let (source, target) = (world.config(Source, "postgres"), world.config(Target, name));
        let options = world.options.clone();
        async move { run(&source, &target, options).await.unwrap() }
    };
    world
        .sql(Target, "create database latin template template0 encoding 'LATIN1' locale 'C'")
        .await;
    let report = target("latin").await;
    let finding = find(&report, "encoding-mismatch", "latin");
    assert_eq!(finding.level, Error);
    find(&report, "collation-mismatch", "latin");
    // The fix makes the database anew, like the source's.
    world.mend(finding).await;
    let report = target("latin").await;
    assert!(report.findings.iter().all(|f| !f.code.ends_with("-mismatch")), "{report:#?}");
    world
        .sql(
            Target,
            "create database icu template template0 encoding 'UTF8' locale_provider icu \
             icu_locale 'en' locale 'C.UTF-8'",
        )
        .await;
    assert_eq!(find(&target("icu").await, "collation-mismatch", "icu").level, Warning);
    // A converted database, and one whose bytes mean nothing.
    world
        .sql(Source, "create database latin template template0 encoding 'LATIN1' locale 'C'")
        .await;
    world
        .sql(Source, "create database raw template template0 encoding 'SQL_ASCII' locale 'C'")
        .await;
    for (name, level) in [("latin", Warning), ("raw", Error)] {
        let (source, target) = (world.config(Source, name), world.config(Target, "postgres"));
        let report = run(&source, &target, world.options.clone()).await.unwrap();
        assert_eq!(find(&report, "encoding-mismatch", "postgres").level, level);
    }
}

#[tokio::test]
async fn recorded_collation_versions_that_are_not_the_systems_are_found() {
    let world = World::new(&[], &[]);
    let mut session = support::session(&world.source, "postgres").await;
    session
        .execute(
            "create database sorted template template0 encoding 'UTF8' locale_provider icu \
             icu_locale 'en' locale 'C.UTF-8'",
        )
        .await
        .unwrap();
    let mut sorted = support::session(&world.source, "sorted").await;
    sorted
        .execute(
            "create table public.t (a text collate \"de-x-icu\" primary key); \
             set allow_system_table_mods = on; \
             update pg_catalog.pg_collation set collversion = '1' where collname like 'de%-x-icu'; \
             update pg_catalog.pg_database set datcollversion = '1' where datname = 'sorted'",
        )
        .await
        .unwrap();
    let check = || async {
        let (source, target) = (world.config(Source, "sorted"), world.config(Target, "postgres"));
        run(&source, &target, world.options.clone()).await.unwrap()
    };
    let report = check().await;
    let code = "collation-version";
    for object in ["database sorted", "collation pg_catalog.\"de-x-icu\""] {
        let finding = find(&report, code, object);
        assert_eq!(finding.level, Warning);
        for line in finding.fix.as_ref().unwrap().lines() {
            sorted.execute(line).await.unwrap();
        }
    }
    assert!(check().await.findings.iter().all(|f| f.code != code));
}

#[tokio::test]
async fn what_is_already_on_the_target_is_found() {
    let world = World::new(&[], &[]);
    let make = "create table public.t (a int primary key); \
         create table public.filled (a int primary key); insert into public.filled values (1); \
         create view public.v as select 1 as a; create sequence public.s; \
         create type public.mood as enum ('ok'); \
         create function public.f(int) returns int language sql as 'select 1'; \
         create materialized view public.m as select 1 as a";
    world.sql(Source, make).await;
    world.sql(Target, &format!("{make}; create table public.unrelated (a int)")).await;
    let report = world.check().await;
    let filled = find(&report, "target-table-has-rows", "table public.filled");
    assert_eq!((filled.level, &filled.fix), (Error, &None));
    let alone = find(&report, "target-table-alone", "table public.unrelated");
    assert_eq!((alone.level, &alone.fix), (Error, &None));
    assert!(alone.message.contains("--exclude public.unrelated"), "{}", alone.message);
    world.finds_and_mends(Error, "target-table-exists", "table public.t").await;
    for object in
        ["view public.v", "sequence", "type public.mood", "function public.f", "materialized"]
    {
        world.finds_and_mends(Error, "target-object-exists", object).await;
    }
    assert_eq!(codes(&world.check().await, Error).len(), 2);
    // A table left out of the job may be there.
    let mut world = world;
    let exclude = ["public.filled".to_string(), "public.unrelated".to_string()];
    world.options.selection = Selection::parse(&[], &exclude, &[]).unwrap();
    assert!(world.check().await.ready());
}

#[tokio::test]
async fn leftovers_of_a_job_of_the_same_name_are_found_and_its_neighbours_left_alone() {
    let world = World::new(&[], &[]);
    for name in ["walferry_shop_forward", "walferry_shopxforward"] {
        world
            .sql(
                Source,
                &format!(
                    "select pg_create_logical_replication_slot('{name}', 'pgoutput'); \
                     create publication {name}; select pg_replication_origin_create('{name}')"
                ),
            )
            .await;
    }
    world.sql(Target, "select pg_replication_origin_create('walferry_shop_reverse')").await;
    let report = world.check().await;
    let left: Vec<String> =
        codes(&report, Error).into_iter().filter(|c| c.contains("leftover")).collect();
    assert_eq!(
        left,
        [
            "source leftover publication walferry_shop_forward",
            "source leftover replication origin walferry_shop_forward",
            "source leftover slot walferry_shop_forward",
            "target leftover replication origin walferry_shop_reverse",
        ]
    );
    for finding in report.findings.iter().filter(|f| f.code == "leftover") {
        assert!(finding.message.contains("walferry cancel"));
        world.mend(finding).await;
    }
    assert!(world.check().await.ready());
}

/// pgcopydb#819: slot creation hung on one old transaction for five hours.
#[tokio::test]
async fn pgcopydb_819_transactions_in_the_way_of_a_slot_are_found() {
    let mut world = World::new(&["max_prepared_transactions = 5"], &[]);
    // A slot waits for transactions of every database of the server.
    let mut idle = support::session(&world.source, "template1").await;
    idle.execute("begin; select txid_current()").await.unwrap();
    let pid = idle.process_id();
    world.sql(Source, "begin; select txid_current(); prepare transaction 'half ''done'").await;
    assert!(world.check().await.findings.iter().all(|f| f.code != "long-transaction"));
    world.options.transaction_age = Duration::ZERO;
    let found = find(&world.check().await, "long-transaction", &pid.to_string()).clone();
    assert_eq!(found.level, Warning);
    assert!(found.message.contains("txid_current") && found.message.contains("template1"));
    world.mend(&found).await;
    // The server needs a moment to end the session.
    while world.check().await.findings.iter().any(|f| f.code == "long-transaction") {}
    assert_eq!(find(&world.check().await, "prepared-transaction", "half").level, Warning);
    world.options.prepared_age = Duration::ZERO;
    world.finds_and_mends(Error, "prepared-transaction", "half 'done").await;
}

/// pgdog#914: a slot at 2855 GB.
#[tokio::test]
async fn pgdog_914_wal_that_outgrows_its_limit_during_the_copy_is_forecast() {
    let mut world = World::new(&["max_slot_wal_keep_size = 32MB"], &[]);
    world
        .sql(
            Source,
            "create table public.t (id int primary key, v text); insert into public.t \
             select g, repeat('x', 100) from generate_series(1, 20000) g",
        )
        .await;
    // A writer at work, and a copy that would take most of an hour.
    let config = world.config(Source, "postgres");
    let mut writer = Session::connect(&config, Purpose::Sql).await.unwrap();
    let writing = tokio::spawn(async move {
        loop {
            if writer.execute("update public.t set v = v where id < 1000").await.is_err() {
                return;
            }
        }
    });
    world.options.wal_sample = Duration::from_millis(300);
    world.options.copy_bytes_per_second = 1000;
    let report = world.check().await;
    writing.abort();
    // Its last statement goes on for a moment.
    until("the writer is gone", || async {
        let sql = "select count(*) from pg_stat_activity where state = 'active' \
            and backend_type = 'client backend' and pid <> pg_backend_pid()";
        world.source.psql("postgres", sql).unwrap() == "0"
    })
    .await;
    let forecast = find(&report, "wal-forecast", "max_slot_wal_keep_size");
    assert_eq!(forecast.level, Error);
    assert!(forecast.message.contains("32 MB"), "{}", forecast.message);
    // With nobody writing it fits; so does it under the limit printed.
    world.options.wal_sample = Duration::from_millis(1);
    assert_eq!(find(&world.check().await, "wal-forecast", "max_slot").level, Info);
    world.mend(forecast).await;
    let limit = world.source.psql("postgres", "show max_slot_wal_keep_size").unwrap();
    assert!(limit.ends_with("GB"), "{limit}");
}

#[tokio::test]
async fn versions_are_compared() {
    let (Ok(old), Ok(new)) = (Server::bin_of(10), Server::bin_of(18)) else {
        println!("skipped: PostgreSQL 10 or 18 is not installed");
        return;
    };
    let mut options = CheckOptions::new("shop".parse().unwrap());
    options.wal_sample = Duration::from_millis(1);
    let old = Server::start(&old, &[]).unwrap();
    let new = Server::start(&new, &[]).unwrap();
    let (old, new) = (
        Config::parse(&old.uri("postgres")).unwrap(),
        Config::parse(&new.uri("postgres")).unwrap(),
    );
    let report = run(&old, &new, options.clone()).await.unwrap();
    assert!(report.findings.iter().all(|f| f.code != "target-older"));
    find(&report, "profile", "role postgres");
    let report = run(&new, &old, options).await.unwrap();
    assert_eq!(find(&report, "target-older", "PostgreSQL 10").level, Warning);
}

#[tokio::test]
async fn a_standby_is_refused() {
    let world = World::new(&[], &[]);
    let data = world.target.data_dir();
    world.target.stop(StopMode::Fast).unwrap();
    std::fs::write(data.join("standby.signal"), "").unwrap();
    world.target.resume().unwrap();
    let report = world.check().await;
    assert_eq!(find(&report, "standby", "postgres").level, Error);
    assert_eq!(find(&report, "standby", "postgres").side, Target);
}

#[tokio::test]
async fn what_a_role_may_not_ask_is_a_warning_and_not_the_end() {
    let mut world = World::new(&[], &[]);
    world
        .sql(
            Source,
            "create role mover login replication; grant create on database postgres to mover; \
             revoke select on pg_catalog.pg_prepared_xacts from public; \
             revoke select on pg_catalog.pg_subscription from public",
        )
        .await;
    world.sql(Target, "create role mover login superuser").await;
    world.role = "mover".to_string();
    let report = world.check().await;
    for what in ["prepared transactions", "publications"] {
        assert_eq!(find(&report, "unreadable", what).level, Warning);
    }
    find(&report, "wal-forecast", "max_slot_wal_keep_size");
}
