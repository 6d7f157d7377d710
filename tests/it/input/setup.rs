//! Servers, roles and addresses that will not do: said before anything is made.

use super::*;

/// Runs with these addresses, wants exit code 1, all of these texts, and both servers untouched.
async fn refused_untouched(ends: &Ends, source: &str, target: &str, texts: &[&str]) {
    let before = ends.inventories().await;
    let environment = [("WALFERRY_SOURCE", source), ("WALFERRY_TARGET", target)];
    let ended = Walferry::spawn_with(&["run"], &environment).ended().await;
    assert_eq!(ended.code, Some(1), "{}", ended.err);
    for text in texts {
        assert!(ended.err.contains(text), "no \"{text}\" in: {}", ended.err);
    }
    let after = ends.inventories().await;
    assert_eq!(before.0.diff(&after.0), Vec::<String>::new());
    assert_eq!(before.1.diff(&after.1), Vec::<String>::new());
}

async fn sql(server: &Server, sql: &str) {
    session(server, "app").await.execute(sql).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn missing_rights_and_wrong_passwords_leave_both_sides_untouched() {
    let ends = small();
    for server in [&ends.source, &ends.target] {
        let roles = "create role mover login; create role checked login superuser password 'right'";
        sql(server, roles).await;
        let hba = "host all checked all scram-sha-256\nhost all all all trust\n\
                   host replication all all trust\nlocal all all trust\n";
        server.write_data_file("pg_hba.conf", hba).unwrap();
        server.reload().unwrap();
    }
    let mover = (ends.source.uri_as("mover", "app"), ends.target.uri_as("mover", "app"));
    let texts = ["ALTER ROLE \"mover\" REPLICATION", "walferry check"];
    refused_untouched(&ends, &mover.0, &ends.target_uri(), &texts).await;
    // Origins are no must any more: without them a marker tells whose a transaction is.
    let texts = ["GRANT CREATE ON DATABASE", "ALTER ROLE \"mover\" REPLICATION"];
    refused_untouched(&ends, &ends.source_uri(), &mover.1, &texts).await;

    let wrong = ends.source.uri_as("checked:wr0ng", "app");
    let texts = ["source", "password authentication failed", "the password came from"];
    refused_untouched(&ends, &wrong, &ends.target_uri(), &texts).await;
    let none = ends.target.uri_as("checked", "app");
    refused_untouched(&ends, &ends.source_uri(), &none, &["target", "password"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn addresses_that_lead_nowhere_are_named_and_given_up() {
    let ends = small();
    let nowhere = ends.source.uri("nowhere");
    let texts = ["\"nowhere\" does not exist", "CREATE DATABASE \"nowhere\""];
    refused_untouched(&ends, &nowhere, &ends.target_uri(), &texts).await;
    let same = ends.source_uri();
    let texts = ["source and target are the same database"];
    refused_untouched(&ends, &same, &same, &texts).await;
    // A server never reached is tried for some seconds only: it may be a mistake.
    let refused = "postgres://postgres@127.0.0.1:1/app";
    let texts = ["127.0.0.1:1", "refused", "is the server running"];
    refused_untouched(&ends, refused, &ends.target_uri(), &texts).await;
    let unknown = "postgres://postgres@no-such-host.invalid/app";
    refused_untouched(&ends, &ends.source_uri(), unknown, &["no-such-host.invalid"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn servers_that_cannot_stream_are_told_with_the_setting_that_mends_it() {
    let bin = Server::bin_of(15).unwrap();
    let start = |settings: &[&str]| Server::start(&bin, settings).unwrap();
    let good = Ends::of(start(&[]), start(&["wal_level=replica"]));
    let texts = ["wal_level", "for the way back", "ALTER SYSTEM SET wal_level = 'logical'"];
    refused_untouched(&good, &good.source_uri(), &good.target_uri(), &texts).await;
    let tight = Ends::of(
        start(&["wal_level=logical", "max_replication_slots=1", "max_wal_senders=1"]),
        start(&[]),
    );
    let texts = ["ALTER SYSTEM SET max_replication_slots", "ALTER SYSTEM SET max_wal_senders"];
    refused_untouched(&tight, &tight.source_uri(), &tight.target_uri(), &texts).await;
    let standby = good.source.standby(&[]).unwrap();
    let uri = standby.uri("app");
    let texts = ["is a standby", "target_session_attrs=read-write"];
    refused_untouched(&tight, &uri, &tight.target_uri(), &texts).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_with_tables_or_rows_is_refused() {
    let ends = small();
    target(&ends, "create table item (id int primary key)");
    let texts = ["item", "exists already", "DROP TABLE"];
    refused_untouched(&ends, &ends.source_uri(), &ends.target_uri(), &texts).await;
    target(&ends, "insert into item values (1)");
    let texts = ["item", "exists already, with rows", "exclude the table"];
    refused_untouched(&ends, &ends.source_uri(), &ends.target_uri(), &texts).await;
    let rows = ends.target.psql("app", "select count(*) from item").unwrap();
    assert_eq!(rows, "1");
}

#[tokio::test(flavor = "multi_thread")]
async fn patterns_that_match_nothing_and_programs_that_are_missing_are_named() {
    let ends = small();
    let before = ends.inventories().await;
    for option in ["--include", "--exclude", "--schema-only"] {
        let texts = ["pattern public.itme", "matches no table"];
        fails(&ends, &["run", option, "public.itme"], &texts).await;
    }
    let run = |environment: &[(&str, &str)]| {
        let (source, target) = (ends.source_uri(), ends.target_uri());
        let mut all = vec![("WALFERRY_SOURCE", &*source), ("WALFERRY_TARGET", &*target)];
        all.extend(environment);
        Walferry::spawn_with(&["run"], &all)
    };
    let missing = run(&[("WALFERRY_PG_DUMP", "/nowhere/pg_dump")]).ended().await;
    assert_eq!(missing.code, Some(1));
    assert!(missing.err.contains("apt-get install postgresql-client-15"), "{}", missing.err);
    let old = ends.source.dir().join("old_pg_dump");
    std::fs::write(&old, "#!/bin/sh\necho 'pg_dump (PostgreSQL) 12.3'\n").unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(&old, mode).unwrap();
    let old = run(&[("WALFERRY_PG_DUMP", old.to_str().unwrap())]).ended().await;
    assert_eq!(old.code, Some(1));
    assert!(old.err.contains("is of version 12"), "{}", old.err);
    assert!(old.err.contains("apt-get install postgresql-client-15"), "{}", old.err);
    let after = ends.inventories().await;
    assert_eq!(before.0.diff(&after.0), Vec::<String>::new());
    assert_eq!(before.1.diff(&after.1), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_is_not_run_twice_nor_with_other_tables_nor_after_its_end() {
    let ends = small();
    let run = following(&ends).await;
    fails(&ends, &["run"], &["job main is being run", "walferry status"]).await;
    stop(run).await;
    let texts = ["planned with other table options (none)", "another --name"];
    fails(&ends, &["run", "--exclude", "item"], &texts).await;
    let texts = ["finish is not possible in phase following", "use cancel"];
    fails(&ends, &["finish"], &texts).await;
    fails(&ends, &["rollback"], &["rollback is not possible in phase following"]).await;
    ends.done(&["cutover"]).await;
    fails(&ends, &["cancel"], &["cancel is not possible in phase switched"]).await;
    fails(&ends, &["cutover"], &["cutover is not possible in phase switched"]).await;
    ends.done(&["finish", "--keep-history"]).await;
    let texts = ["run is not possible in phase finished", "another --name"];
    fails(&ends, &["run"], &texts).await;
    fails(&ends, &["check"], &[]).await;
    let out = ends.walferry(&["check"]).await.out;
    assert!(out.contains("job main") && out.contains("another --name"), "{out}");
}

#[tokio::test(flavor = "multi_thread")]
async fn two_jobs_share_a_target_and_end_apart() {
    let ends = small();
    source(&ends, "create table other (id int primary key); insert into other values (1)");
    ends.done(&["run", "--until", "following", "--name", "one", "--include", "item"]).await;
    ends.done(&["run", "--until", "following", "--name", "two", "--include", "other"]).await;
    ends.done(&["cancel", "--name", "one"]).await;
    let mut two = ends.spawn(&["run", "--name", "two", "--include", "other"]);
    two.says("following").await;
    source(&ends, "insert into other values (2)");
    arrives(&ends, "select exists (select from other where id = 2)").await;
    stop(two).await;
    ends.done(&["cancel", "--name", "two"]).await;
    let left = "select (select count(*) from pg_replication_slots) \
                + (select count(*) from pg_namespace where nspname = 'walferry')";
    assert_eq!(ends.source.psql("app", left).unwrap(), "0");
    assert_eq!(ends.target.psql("app", left).unwrap(), "0");
}
