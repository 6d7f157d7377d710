//! A plproxy cluster whose clients only read while a job leads them over (`run --read-only`).

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use walferry::demo::server::Server;
use walferry::pg::{Config, Purpose, Session};

use super::load::Load;
use super::{asked, cluster};
use crate::support::{self, Walferry};

/// A server with one partition, one that is new, and two proxy databases.
struct Stage {
    old: Server,
    new: Server,
    proxy: Server,
}

impl Stage {
    fn new() -> Stage {
        let [old, new, proxy] = std::array::from_fn(|_| support::server());
        old.psql("postgres", "create database part").unwrap();
        for sql in [
            "create table t (id bigint primary key, v int not null)",
            "insert into t select -i, 0 from generate_series(1, 500) i",
            "create function put(i bigint) returns bigint language sql as \
             $$ insert into public.t values (i, 1) returning id $$",
            "create function port() returns text language sql as \
             $$ select current_setting('port') $$",
        ] {
            old.psql("part", sql).unwrap();
        }
        for dbname in ["proxy", "second"] {
            proxy.psql("postgres", &format!("create database {dbname}")).unwrap();
            let define = format!(
                "create server shop foreign data wrapper plproxy options (connection_lifetime \
                 '1800', p0 'dbname=part host=127.0.0.1 port={} user=postgres options=''-c \
                 work_mem=1234kB''')",
                old.port()
            );
            for sql in [
                "create extension plproxy",
                &define,
                "create user mapping for public server shop",
                "create function put(i bigint) returns bigint language plproxy as \
                 $$ cluster 'shop'; run on 0; $$",
                "create function port() returns text language plproxy as \
                 $$ cluster 'shop'; run on 0; $$",
            ] {
                proxy.psql(dbname, sql).unwrap();
            }
        }
        Stage { old, new, proxy }
    }

    /// What the proxies say of the partition: both the same.
    fn defined(&self) -> String {
        let sql = "select array_to_string(srvoptions, ' ') || ' ' || \
             coalesce(obj_description(oid, 'pg_foreign_server'), '-') from pg_foreign_server";
        let [one, other] = ["proxy", "second"].map(|dbname| self.proxy.psql(dbname, sql).unwrap());
        assert_eq!(one, other);
        one
    }

    fn rows(&self, server: &Server) -> BTreeSet<u64> {
        let rows = server.psql("part", "select id from t where id > 0").unwrap();
        rows.lines().map(|line| line.parse().unwrap()).collect()
    }
}

/// What becomes of a call.
async fn called(session: &mut Session, sql: &str) -> String {
    match session.query(sql).await {
        Ok(rows) => rows[0].string(0).unwrap(),
        Err(error) => error.to_string(),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_of_a_partition_only_read_while_a_job_leads_them_over() {
    let stage = Stage::new();
    let uris = ["proxy", "second"].map(|dbname| stage.proxy.uri(dbname));
    let new = format!("127.0.0.1:{}", stage.new.port());
    let address = format!("plproxy:{},shop,{new}", uris[0]);
    let before = stage.defined();
    asked(&address, &["move", "--shard", "0", "--to", &new]).await;
    let put = "select put($1)".to_string();
    let load = Load::start(uris.iter().map(|uri| (vec![uri.clone()], put.clone())).collect());
    load.more().await;
    let words = ["run", "1", "--router", &uris[1], "--read-only", "--no-verify"];
    let words = [&words[..], &["--timeout", "2s", "--tries", "50"]].concat();
    // A writer that is not ended with the proxies' sessions, as it has our name: no fence beside it.
    let config = Config::parse_with(&stage.old.uri("part"), &|_| None).unwrap();
    let config = config.with_application_name("walferry");
    let mut open = Session::connect(&config, Purpose::Sql).await.unwrap();
    open.execute("begin; lock table public.t in row exclusive mode").await.unwrap();
    let mut run = Walferry::spawn(&[&["cluster", "--cluster", &address], &words[..]].concat());
    run.says("not switched, trying again").await;

    // In one of the next tries: on both proxies writes are refused at once, and reads go on.
    let mut proxies = Vec::new();
    for dbname in ["proxy", "second"] {
        let mut session = support::session(&stage.proxy, dbname).await;
        session.execute("set search_path = public").await.unwrap();
        proxies.push(session);
    }
    let old = stage.old.port().to_string();
    let begun = Instant::now();
    loop {
        let mut reading = true;
        for session in &mut proxies {
            let said = called(session, "select put(1)").await;
            reading &= said.contains("read-only transaction");
            reading &= called(session, "select port()").await == old;
        }
        if reading {
            break;
        }
        assert!(begun.elapsed() < Duration::from_secs(60), "nobody only reads");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    open.execute("rollback").await.unwrap();
    run.ended().await.expect_success();
    let led = before.replace(&format!("port={old} "), &format!("port={} ", stage.new.port()));
    let now = stage.defined();
    assert!(now.starts_with(led.trim_end_matches('-')), "{now} is not {led}");
    load.more().await;
    cluster(&address, &["rollback", "1", "--tasks", "1"]).await.expect_success();
    load.more().await;
    let (puts, mut put) = (load.end().await, BTreeSet::from([]));
    // The second and third are those whose session was ended.
    let expected = [
        "read-only transaction",
        "terminating connection",
        "server closed the connection",
        "this database has moved",
    ];
    for client in &puts {
        let other = |said: &&String| !expected.iter().any(|text| said.contains(text));
        assert_eq!(client.failed.iter().find(other), None);
        put.extend(client.answered.iter().copied());
    }
    let refused: usize = puts.iter().map(|client| client.failed.len()).sum();
    println!("{} put, {refused} refused", put.len());
    let mut found = stage.rows(&stage.old);
    found.remove(&1);
    assert_eq!(found, put);
    cluster(&address, &["finish", "1"]).await.expect_success();
    assert_eq!(stage.defined(), before);
}
