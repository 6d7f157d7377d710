//! Foreign servers as routes: real postgres_fdw and plproxy.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use walferry::demo::server::Server;
use walferry::id::Stream;
use walferry::pg::{Config, Purpose, Session};
use walferry::route::{Context, Route};

use super::context;
use crate::support::{self, Walferry, job::Ends};

/// Two sides that know who they are, and routers that lead to the first.
struct Stage {
    source: Server,
    target: Server,
    router: Server,
}

const PUT: &str = "create function put(i bigint) returns bigint language sql as \
     $$ insert into public.t values (i, 1) returning id $$";

impl Stage {
    fn new() -> Stage {
        let [source, target, router] = std::array::from_fn(|_| support::server());
        for (server, name) in [(&source, "source"), (&target, "target")] {
            let sql = format!("create table side (name text); insert into side values ('{name}')");
            server.psql("postgres", &sql).unwrap();
            let who = "create function who() returns text language sql as 'select name from side'";
            server.psql("postgres", who).unwrap();
        }
        lead_by_fdw(&router, &source, "postgres", "side (name text)");
        lead_by_plproxy(&router, &source, "postgres");
        let who = "create function who() returns text language plproxy as \
             $$ cluster 'shop'; run on 0; $$";
        router.psql("postgres", who).unwrap();
        Stage { source, target, router }
    }

    fn context(&self, flip: Stream) -> Context {
        context(flip, &self.source.uri("postgres"), &self.target.uri("postgres"))
    }

    fn routes(&self) -> [Route; 2] {
        let uri = self.router.uri("postgres");
        [format!("fdw:{uri},live"), format!("plproxy:{uri},shop,p0")]
            .map(|t| Route::parse(&t).unwrap())
    }

    /// What a client of the fdw and one of plproxy reach.
    fn reached(&self) -> String {
        self.router.psql("postgres", "select name || ' ' || who() from side").unwrap()
    }

    fn options(&self) -> String {
        let sql = "select string_agg(srvname || (select string_agg(o, ' ' order by o) \
             from unnest(srvoptions) o) || coalesce(obj_description(oid, 'pg_foreign_server'), '-'), \
             ' ' order by srvname) from pg_foreign_server";
        self.router.psql("postgres", sql).unwrap()
    }
}

pub fn lead_by_fdw(router: &Server, to: &Server, dbname: &str, table: &str) {
    for sql in [
        "create extension if not exists postgres_fdw".to_string(),
        format!(
            "create server live foreign data wrapper postgres_fdw options (host '127.0.0.1', \
             hostaddr '127.0.0.1', fetch_size '7', port '{}', dbname '{dbname}')",
            to.port()
        ),
        "comment on server live is 'the shop''s own'".to_string(),
        "create user mapping for public server live options (user 'postgres')".to_string(),
        format!("create foreign table {table} server live options (schema_name 'public')"),
    ] {
        router.psql("postgres", &sql).unwrap();
    }
}

pub fn lead_by_plproxy(router: &Server, to: &Server, dbname: &str) {
    let part = |n: u32, server: &Server| {
        format!(
            "p{n} 'host=127.0.0.1  dbname={dbname} port={} user=postgres application_name=''16 x'''",
            server.port()
        )
        .replace("''16 x'''", "''16 x'' '")
    };
    for sql in [
        "create extension if not exists plproxy".to_string(),
        format!(
            "create server shop foreign data wrapper plproxy options (connection_lifetime '1800', \
             {}, {})",
            part(0, to),
            part(1, to)
        ),
        "create user mapping for public server shop".to_string(),
    ] {
        router.psql("postgres", &sql).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn foreign_servers_go_there_and_back_and_keep_all_else() {
    let stage = Stage::new();
    let before = stage.options();
    assert_eq!(stage.reached(), "source source");
    for (flip, reached) in [(Stream::Forward, "target target"), (Stream::Reverse, "source source")]
    {
        let context = stage.context(flip);
        let was = stage.reached();
        for route in stage.routes() {
            route.check(&context).await.unwrap();
            route.hold(&context, Duration::from_secs(1)).await.unwrap();
            // As after a try that could not stop its writers.
            route.release(&context).await.unwrap();
            route.switch(&context).await.unwrap();
        }
        assert_eq!(stage.reached(), was, "nobody is led there before the release");
        for _ in 0..2 {
            for route in stage.routes() {
                route.release(&context).await.unwrap();
                route.switch(&context).await.unwrap();
            }
            assert_eq!(stage.reached(), reached);
        }
        if flip == Stream::Forward {
            let now = stage.options();
            let (old, new) = (stage.source.port().to_string(), stage.target.port().to_string());
            assert!(
                now.contains("fetch_size=7") && now.contains("connection_lifetime=1800"),
                "{now}"
            );
            let p0 = format!("p0=host=127.0.0.1  dbname=postgres port={new} user=postgres");
            assert!(now.contains(&p0) && now.contains("application_name='16 x'"), "{now}");
            let p1 = format!("p1=host=127.0.0.1  dbname=postgres port={old} ");
            assert!(now.contains(&p1), "the other partition stays: {now}");
        }
    }
    for route in stage.routes() {
        route.forget(&stage.context(Stream::Reverse)).await.unwrap();
    }
    assert_eq!(stage.options(), before, "rolled back, all is as it was, the comment too");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_foreign_server_is_undone_from_every_step() {
    let stage = Stage::new();
    let before = stage.options();
    let forward = stage.context(Stream::Forward);
    for steps in 0..3 {
        for route in stage.routes() {
            if steps > 0 {
                route.switch(&forward).await.unwrap();
            }
            if steps > 1 {
                route.release(&forward).await.unwrap();
            }
            for _ in 0..2 {
                route.undo(&forward).await.unwrap();
            }
        }
        assert_eq!((stage.reached().as_str(), stage.options()), ("source source", before.clone()));
    }
    // A rollback that is undone leaves clients on the target, and the way back known.
    let reverse = stage.context(Stream::Reverse);
    for route in stage.routes() {
        route.switch(&forward).await.unwrap();
        route.release(&forward).await.unwrap();
        route.switch(&reverse).await.unwrap();
        route.undo(&reverse).await.unwrap();
    }
    assert_eq!(stage.reached(), "target target");
    for route in stage.routes() {
        route.switch(&reverse).await.unwrap();
        route.release(&reverse).await.unwrap();
        route.forget(&reverse).await.unwrap();
    }
    assert_eq!((stage.reached().as_str(), stage.options()), ("source source", before));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn check_names_what_a_foreign_server_lacks_and_changes_nothing() {
    let stage = Stage::new();
    let context = stage.context(Stream::Forward);
    let before = stage.options();
    let said = |text: String| {
        let context = context.clone();
        async move { Route::parse(&text).unwrap().check(&context).await.unwrap_err().to_string() }
    };
    let uri = stage.router.uri("postgres");
    for (text, expected) in [
        (format!("fdw:{uri},nowhere"), "\"nowhere\" is not there"),
        (format!("fdw:{uri},shop"), "is one of plproxy, and this route is for postgres_fdw"),
        (format!("plproxy:{uri},shop,p7"), "has no option p7"),
        (format!("fdw:{},live", stage.router.uri("template1")), "is not there"),
    ] {
        let text = said(text).await;
        assert!(text.contains(expected), "{expected}: {text}");
    }
    stage
        .router
        .psql("postgres", "create role app login; grant all on schema public to app")
        .unwrap();
    let app = stage.router.uri_as("app", "postgres");
    let text = said(format!("fdw:{app},live")).await;
    assert!(text.contains("is not owned by \"app\": alter server \"live\" owner to"), "{text}");
    stage.router.psql("postgres", "create user mapping for app server live").unwrap();
    let text = said(format!("fdw:{uri},live")).await;
    assert!(text.contains("mapping to role \"app\", which may not log in on"), "{text}");
    stage.target.psql("postgres", "create role app login").unwrap();
    Route::parse(&format!("fdw:{uri},live")).unwrap().check(&context).await.unwrap();
    // Neither side: a third server.
    let other = format!("alter server live options (set port '{}')", stage.router.port());
    stage.router.psql("postgres", &other).unwrap();
    let text = said(format!("fdw:{uri},live")).await;
    assert!(
        text.contains("leads to 127.0.0.1:") && text.contains("clients should be on"),
        "{text}"
    );
    let back = format!("alter server live options (set port '{}')", stage.source.port());
    stage.router.psql("postgres", &back).unwrap();
    assert_eq!(stage.options(), before);
    // Another job has it.
    let mut other = context.clone();
    other.job = "other".parse().unwrap();
    Route::parse(&format!("fdw:{uri},live")).unwrap().switch(&other).await.unwrap();
    let text = said(format!("fdw:{uri},live")).await;
    assert!(text.contains("is being led by job other"), "{text}");
}

/// Clients that put rows in through a router; a row that was answered for must not be lost.
struct Load {
    stop: Arc<AtomicBool>,
    put: Arc<AtomicU64>,
    tasks: Vec<tokio::task::JoinHandle<(Vec<u64>, Vec<String>)>>,
}

impl Load {
    fn start(clients: Vec<(String, &'static str)>) -> Load {
        let (stop, put) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let client = |(number, (uri, sql)): (u64, (String, &'static str))| {
            let (stop, put) = (stop.clone(), put.clone());
            tokio::spawn(async move {
                let config = Config::parse_with(&uri, &|_| None).unwrap();
                let mut session = Session::connect(&config, Purpose::Sql).await.unwrap();
                session.execute("set search_path = public").await.unwrap();
                let (mut answered, mut failed) = (Vec::new(), Vec::new());
                for i in 0.. {
                    let id = number * 10_000_000 + i;
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    match session.query(&sql.replace("$1", &id.to_string())).await {
                        Ok(_) => {
                            answered.push(id);
                            put.fetch_add(1, Ordering::Relaxed);
                        }
                        Err(error) => failed.push(error.to_string()),
                    }
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                (answered, failed)
            })
        };
        let tasks = (1..).zip(clients).map(client).collect();
        Load { stop, put, tasks }
    }

    async fn more(&self) {
        let before = self.put.load(Ordering::Relaxed);
        support::until("clients are stuck", || {
            std::future::ready(self.put.load(Ordering::Relaxed) > before + 30)
        })
        .await;
    }

    async fn end(self) -> (Vec<u64>, Vec<String>) {
        self.stop.store(true, Ordering::Relaxed);
        let (mut answered, mut failed) = (Vec::new(), Vec::new());
        for task in self.tasks {
            let (rows, errors) = task.await.unwrap();
            answered.extend(rows);
            failed.extend(errors);
        }
        (answered, failed)
    }
}

/// Ends clients and job, which moved them three times: both sides are equal, and no row that was
/// put is missing. Gives what failed.
async fn put_and_kept(load: Load, ends: &Ends, run: Walferry) -> Vec<String> {
    let (answered, failed) = load.end().await;
    ends.done(&["verify"]).await;
    ends.done(&["finish"]).await;
    run.ended().await.expect_success();
    let rows = ends.target.psql("app", "select id from t order by 1").unwrap();
    let rows: std::collections::BTreeSet<u64> = rows.lines().map(|l| l.parse().unwrap()).collect();
    let lost = answered.iter().filter(|id| !rows.contains(id)).count();
    println!("{} rows put, {} statements failed at three switches", answered.len(), failed.len());
    assert_eq!(lost, 0, "of {} rows", answered.len());
    failed
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_leads_clients_of_two_fdw_routers_and_a_plproxy_there_and_back() {
    let ends = Ends::start(15, 15);
    ends.source.psql("app", "create table public.t (id bigint primary key, v int)").unwrap();
    ends.source.psql("app", PUT).unwrap();
    let routers = [support::server(), support::server()];
    for router in &routers {
        lead_by_fdw(router, &ends.source, "app", "t (id bigint, v int)");
    }
    lead_by_plproxy(&routers[1], &ends.source, "app");
    let put = "create function put(i bigint) returns bigint language plproxy as \
         $$ cluster 'shop'; run on 0; $$";
    routers[1].psql("postgres", put).unwrap();
    let uris = [0, 1].map(|i| routers[i].uri("postgres"));
    let insert = "insert into t values ($1, 1)";
    let load = Load::start(vec![
        (uris[0].clone(), insert),
        (uris[1].clone(), insert),
        (uris[1].clone(), "select put($1)"),
    ]);
    let mut run = ends.spawn(&["run"]);
    ends.until_phase(&mut run, "following").await;
    let routes = [
        format!("fdw:{},live", uris[0]),
        format!("fdw:{},live", uris[1]),
        format!("plproxy:{},shop,p0", uris[1]),
    ];
    let with_routes = |command: &str| {
        let mut words = vec![command.to_string()];
        words.extend(routes.iter().flat_map(|route| ["--route".to_string(), route.clone()]));
        words
    };
    for (command, live) in
        [("cutover", &ends.target), ("rollback", &ends.source), ("cutover", &ends.target)]
    {
        load.more().await;
        let words = with_routes(command);
        ends.done(&words.iter().map(String::as_str).collect::<Vec<_>>()).await;
        let count = || live.psql("app", "select count(*) from t").unwrap().parse::<u64>().unwrap();
        let before = count();
        load.more().await;
        assert!(count() > before, "{command}: nobody writes to the new side");
        ends.done(&["verify"]).await;
    }
    let failed = put_and_kept(load, &ends, run).await;
    // From the seal to the release the old side refuses writes by its trigger; nothing else fails.
    for error in &failed {
        assert!(error.contains("this database has moved"), "{error}");
    }
    for router in &routers {
        let sql = "select obj_description(oid, 'pg_foreign_server') from pg_foreign_server \
             where srvname = 'live'";
        assert_eq!(router.psql("postgres", sql).unwrap(), "the shop's own");
    }
}

/// A proxy's calls, and what becomes of them.
async fn called(proxy: &mut Session, sql: &str) -> String {
    match proxy.query(sql).await {
        Ok(rows) => rows[0].string(0).unwrap(),
        Err(error) => error.to_string(),
    }
}

/// The same of a proxy whose session may have been ended: it does not look before it calls.
async fn called_again(proxy: &mut Session, sql: &str) -> String {
    match called(proxy, sql).await {
        said if said.contains("terminating connection") => called(proxy, sql).await,
        said => said,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_of_a_partition_read_only_while_it_is_switched_where_that_is_asked_for() {
    let ends = Ends::start(15, 15);
    ends.source.psql("app", "create table public.t (id bigint primary key, v int)").unwrap();
    let nap = "create function nap() returns text language sql as \
         $$ select pg_sleep(20); select 'slept'::text $$";
    let port = "create function port() returns text language sql as \
         $$ select current_setting('port') $$";
    for sql in [PUT, nap, port] {
        ends.source.psql("app", sql).unwrap();
    }
    let router = support::server();
    lead_by_plproxy(&router, &ends.source, "app");
    for function in ["put(i bigint) returns bigint", "nap() returns text", "port() returns text"] {
        let sql = format!(
            "create function {function} language plproxy as $$ cluster 'shop'; run on 0; $$"
        );
        router.psql("postgres", &sql).unwrap();
    }
    let options = || {
        let sql = "select array_to_string(srvoptions, ' ') || \
             coalesce(obj_description(oid, 'pg_foreign_server'), '-') from pg_foreign_server";
        router.psql("postgres", sql).unwrap()
    };
    let (before, text) =
        (options(), format!("plproxy:{},shop,p0,read-only", router.uri("postgres")));
    let route = || Route::parse(&text).unwrap();
    let forward = context(Stream::Forward, &ends.source_uri(), &ends.target_uri());
    let mut proxy = support::session(&router, "postgres").await;
    proxy.execute("set search_path = public").await.unwrap();
    assert_eq!(called(&mut proxy, "select put(1)").await, "1");
    // Whoever does not end by himself is ended.
    let mut late = support::session(&router, "postgres").await;
    let napping = tokio::spawn(async move { called(&mut late, "select public.nap()").await });
    let mut there = support::session(&ends.source, "app").await;
    let asleep = "select exists (select from pg_stat_activity where query like '%nap%' \
         and state = 'active' and pid <> pg_backend_pid())";
    support::until_sql(&mut there, asleep).await;
    let first = route();
    first.check(&forward).await.unwrap();
    assert_eq!(options(), before);
    first.hold(&forward, Duration::from_millis(300)).await.unwrap();
    let ended = napping.await.unwrap();
    assert!(ended.contains("terminating connection"), "{ended}");
    let source = ends.source.port().to_string();
    for _ in 0..2 {
        let said = called(&mut proxy, "select put(2)").await;
        assert!(said.contains("read-only transaction"), "{said}");
        assert_eq!(called(&mut proxy, "select port()").await, source);
        first.hold(&forward, Duration::from_millis(300)).await.unwrap();
    }
    assert!(options().contains(" options='-c default_transaction_read_only=true'"));
    // A try that could not stop all writers, and one whose process is gone.
    first.release(&forward).await.unwrap();
    assert_eq!(
        (options(), called(&mut proxy, "select put(2)").await),
        (before.clone(), "2".into())
    );
    first.hold(&forward, Duration::from_millis(300)).await.unwrap();
    first.switch(&forward).await.unwrap();
    drop(first);
    route().undo(&forward).await.unwrap();
    assert_eq!(
        (options(), called(&mut proxy, "select put(3)").await),
        (before.clone(), "3".into())
    );

    let mut run = ends.spawn(&["run"]);
    ends.until_phase(&mut run, "following").await;
    let put = "select put($1)";
    let load = Load::start(vec![(router.uri("postgres"), put), (router.uri("postgres"), put)]);
    let mut live = ends.source.port().to_string();
    for (command, to) in
        [("cutover", &ends.target), ("rollback", &ends.source), ("cutover", &ends.target)]
    {
        load.more().await;
        ends.done(&[command, "--route", &text]).await;
        assert!(!options().contains("default_transaction_read_only"), "{}", options());
        let next = to.port().to_string();
        let port = called_again(&mut proxy, "select port()").await;
        assert_eq!((port, next != live), (next.clone(), true));
        live = next;
        load.more().await;
    }
    let failed = put_and_kept(load, &ends, run).await;
    let expected = ["read-only transaction", "terminating connection", "this database has moved"];
    for error in &failed {
        assert!(expected.iter().any(|said| error.contains(said)), "{error}");
    }
    assert!(options().ends_with('-'), "{}", options());
}
