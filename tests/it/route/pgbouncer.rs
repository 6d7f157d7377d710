//! pgbouncer: clients are held, led over and let go, and notice nothing but a delay.

use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use walferry::clock::Deadline;
use walferry::demo::server::Server;
use walferry::fault::{Fault, Faulty};
use walferry::id::Stream;
use walferry::pg::{Config, Purpose, Session};
use walferry::route::{Context, Error, Route};

use super::{context, support};

const WAIT: Duration = Duration::from_secs(5);

/// Two servers and a pgbouncer whose database `shop` leads to the first.
struct Stage {
    source: Server,
    target: Server,
    pooler: Child,
    port: u16,
    ini: PathBuf,
    /// pgbouncer.ini as it was.
    text: String,
}

impl Stage {
    async fn new() -> Stage {
        let (source, target) = (support::server(), support::server());
        for server in [&source, &target] {
            server.psql("postgres", "create table public.t (a int)").unwrap();
        }
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let dir = source.data_dir().parent().unwrap().join("pgbouncer");
        let owner = std::fs::metadata(source.data_dir()).unwrap();
        std::fs::create_dir(&dir).unwrap();
        let text = format!(
            "; Ours; \u{00e4}nderungen nur mit R\u{00fc}cksprache.\n[databases]\n;shop = host=old\n\
             other = host=127.0.0.1 port=1\n\
             shop  =  user=postgres host=127.0.0.1 port={}   dbname=postgres pool_size=10  \r\n\n\
             [users]\n\n[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\n\
             unix_socket_dir =\nauth_type = trust\nauth_file = {dir}/users.txt\n\
             admin_users = admin, root\nstats_users = stats\npool_mode = transaction\n\
             logfile = {dir}/log\n# The end.",
            source.port(),
            dir = dir.display(),
        );
        let ini = dir.join("pgbouncer.ini");
        std::fs::write(&ini, &text).unwrap();
        let users = "\"admin\" \"x\"\n\"stats\" \"x\"\n\"app\" \"x\"\n";
        std::fs::write(dir.join("users.txt"), users).unwrap();
        std::fs::set_permissions(&ini, PermissionsExt::from_mode(0o640)).unwrap();
        for path in [&dir, &ini, &dir.join("users.txt")] {
            chown(path, Some(owner.uid()), Some(owner.gid())).unwrap();
        }
        let mut command = Command::new("pgbouncer");
        command.arg("-q").arg(&ini).current_dir(&dir);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        if std::fs::metadata("/proc/self").unwrap().uid() == 0 {
            command.uid(owner.uid()).gid(owner.gid());
        }
        let pooler = command.spawn().unwrap();
        let stage = Stage { source, target, pooler, port, ini, text };
        let deadline = Deadline::after(Duration::from_secs(20));
        while stage.client("shop").await.is_err() {
            assert!(!deadline.passed(), "pgbouncer did not come up");
            tokio::task::yield_now().await;
        }
        stage
    }

    /// A session through the pooler, by the simple protocol alone.
    async fn client(&self, dbname: &str) -> Result<Session, walferry::pg::Error> {
        client(self.port, dbname).await
    }

    fn route_as(&self, user: &str) -> Route {
        let (port, ini) = (self.port, self.ini.display());
        Route::parse(&format!("pgbouncer:postgres://{user}@127.0.0.1:{port},{ini},shop")).unwrap()
    }

    fn route(&self) -> Route {
        self.route_as("admin")
    }

    fn context(&self, flip: Stream) -> Context {
        // The file names the source by another name than we do, and must do so again at the end.
        let source = self.source.uri("postgres").replace("127.0.0.1", "localhost");
        context(flip, &source, &self.target.uri("postgres"))
    }

    fn ini(&self) -> String {
        std::fs::read_to_string(&self.ini).unwrap()
    }

    /// The files in pgbouncer's directory that were not there before.
    fn leftovers(&self) -> Vec<String> {
        let files = std::fs::read_dir(self.ini.parent().unwrap()).unwrap();
        let names = files.map(|f| f.unwrap().file_name().into_string().unwrap());
        let ours = ["pgbouncer.ini", "users.txt", "log"];
        names.filter(|name| !ours.contains(&name.as_str())).collect()
    }

    /// The port of the server that a statement through the pooler reaches.
    async fn reached(&self) -> u16 {
        let mut client = self.client("shop").await.unwrap();
        port_of(&mut client).await.unwrap()
    }

    fn rows(&self, server: &Server) -> u64 {
        server.psql("postgres", "select count(*) from public.t").unwrap().parse().unwrap()
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        let _ = self.pooler.kill();
        let _ = self.pooler.wait();
    }
}

async fn client(port: u16, dbname: &str) -> Result<Session, walferry::pg::Error> {
    let text = format!("postgres://app@127.0.0.1:{port}/{dbname}?connect_timeout=30");
    let config = Config::parse_with(&text, &|_| None).unwrap();
    Session::connect(&config, Purpose::PoolerAdmin).await
}

async fn port_of(client: &mut Session) -> Result<u16, walferry::pg::Error> {
    client.query("select pg_catalog.inet_server_port()").await?[0].parse(0)
}

/// What a client of the load saw.
#[derive(Default)]
struct Seen {
    statements: u64,
    failures: Vec<String>,
    longest: Duration,
}

/// Clients that write without pause, alone and in transactions, until told to stop.
struct Load {
    stop: Arc<AtomicBool>,
    clients: Vec<tokio::task::JoinHandle<Seen>>,
}

impl Load {
    fn start(port: u16, count: usize) -> Load {
        let stop = Arc::new(AtomicBool::new(false));
        let run = |_| tokio::spawn(Self::client(port, stop.clone()));
        Load { clients: (0..count).map(run).collect(), stop }
    }

    async fn client(port: u16, stop: Arc<AtomicBool>) -> Seen {
        let mut seen = Seen::default();
        let mut session = client(port, "shop").await.unwrap();
        while !stop.load(Ordering::Relaxed) {
            for sql in [
                "insert into public.t values (1)",
                "begin",
                "insert into public.t values (2)",
                "select count(*) from public.t",
                "commit",
            ] {
                let began = Instant::now();
                seen.statements += 1;
                if let Err(error) = session.query(sql).await {
                    seen.failures.push(error.to_string());
                    return seen;
                }
                seen.longest = seen.longest.max(began.elapsed());
            }
        }
        seen
    }

    async fn finish(self) -> Seen {
        self.stop.store(true, Ordering::Relaxed);
        let mut total = Seen::default();
        for client in self.clients {
            let seen = client.await.unwrap();
            total.statements += seen.statements;
            total.failures.extend(seen.failures);
            total.longest = total.longest.max(seen.longest);
        }
        total
    }
}

/// Waits until the load has added a row to a server.
async fn until_grown(stage: &Stage, server: &Server) {
    let before = stage.rows(server);
    let deadline = Deadline::after(Duration::from_secs(20));
    while stage.rows(server) <= before {
        assert!(!deadline.passed(), "nothing is written to the side clients should be on");
        tokio::task::yield_now().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_under_load_go_there_and_back_without_one_failed_statement() {
    let stage = Stage::new().await;
    let route = stage.route();
    let load = Load::start(stage.port, 8);
    until_grown(&stage, &stage.source).await;
    for (flip, from, to) in [
        (Stream::Forward, &stage.source, &stage.target),
        (Stream::Reverse, &stage.target, &stage.source),
    ] {
        let context = stage.context(flip);
        route.check(&context).await.unwrap();
        route.hold(&context, WAIT).await.unwrap();
        let held = stage.rows(from);
        route.switch(&context).await.unwrap();
        assert_eq!(stage.rows(from), held, "a write while clients were held");
        route.release(&context).await.unwrap();
        until_grown(&stage, to).await;
        assert_eq!(stage.rows(from), held, "a write to the old side");
        assert_eq!(stage.reached().await, to.port());
        for step in 0..2 {
            // Every step may come again.
            route.switch(&context).await.unwrap();
            route.release(&context).await.unwrap();
            assert_eq!(stage.reached().await, to.port(), "{step}");
        }
    }
    let seen = load.finish().await;
    assert_eq!(seen.failures, Vec::<String>::new());
    assert!(seen.statements > 100);
    println!("{} statements, the longest took {:?}", seen.statements, seen.longest);
    assert_eq!(stage.ini(), stage.text, "rolled back, the file is as it was");
    route.forget(&stage.context(Stream::Reverse)).await.unwrap();
    assert_eq!(stage.leftovers(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_open_transaction_makes_hold_give_up_and_nobody_waits_longer() {
    let stage = Stage::new().await;
    let (route, context) = (stage.route(), stage.context(Stream::Forward));
    let mut idler = stage.client("shop").await.unwrap();
    idler.query("begin; insert into public.t values (0)").await.unwrap();
    let load = Load::start(stage.port, 4);
    until_grown(&stage, &stage.source).await;
    let wait = Duration::from_millis(300);
    let error = route.hold(&context, wait).await.unwrap_err();
    assert!(matches!(error, Error::Busy { wait_ms: 300, .. }), "{error}");
    assert_eq!(error.fault(), Fault::Retry);
    assert!(error.to_string().contains("PAUSE waits for open transactions"), "{error}");
    until_grown(&stage, &stage.source).await;
    let seen = load.finish().await;
    assert_eq!(seen.failures, Vec::<String>::new());
    assert!(seen.longest >= wait / 2, "clients were not held at all");
    assert!(seen.longest < wait * 4, "a client waited {:?}", seen.longest);
    idler.query("commit").await.unwrap();
    route.hold(&context, WAIT).await.unwrap();
    route.undo(&context).await.unwrap();
    assert_eq!(stage.reached().await, stage.source.port());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn undo_after_each_step_brings_clients_and_the_file_back() {
    let stage = Stage::new().await;
    let context = stage.context(Stream::Forward);
    let owner = std::fs::metadata(&stage.ini).unwrap();
    let load = Load::start(stage.port, 4);
    until_grown(&stage, &stage.source).await;
    for steps in 0..4 {
        let route = stage.route();
        if steps > 0 {
            route.hold(&context, WAIT).await.unwrap();
        }
        if steps > 1 {
            route.switch(&context).await.unwrap();
            let changed = stage.ini();
            assert_eq!(changed.lines().count(), stage.text.lines().count());
            let line = format!(
                "shop  =  user=postgres host=127.0.0.1 port={}   dbname=postgres pool_size=10  \r\n",
                stage.target.port()
            );
            assert!(changed.contains(&line), "{changed}");
            let now = std::fs::metadata(&stage.ini).unwrap();
            assert_eq!(
                (now.uid(), now.gid(), now.mode()),
                (owner.uid(), owner.gid(), owner.mode())
            );
            let kept = stage.ini.with_file_name("pgbouncer.ini.walferry_shop_shop");
            assert_eq!(std::fs::metadata(kept).unwrap().mode() & 0o777, 0o600);
        }
        if steps > 2 {
            route.release(&context).await.unwrap();
            assert_eq!(stage.reached().await, stage.target.port());
        }
        // As after a crash: nothing but the files and pgbouncer know how far it went.
        let route = stage.route();
        for _ in 0..2 {
            route.undo(&context).await.unwrap();
            assert_eq!(stage.reached().await, stage.source.port(), "after {steps} steps");
            assert_eq!(stage.ini(), stage.text, "after {steps} steps");
            assert_eq!(stage.leftovers(), Vec::<String>::new());
        }
    }
    assert_eq!(load.finish().await.failures, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rollback_that_is_undone_leads_to_the_target_again() {
    let stage = Stage::new().await;
    let (route, forward) = (stage.route(), stage.context(Stream::Forward));
    route.switch(&forward).await.unwrap();
    let switched = stage.ini();
    let reverse = stage.context(Stream::Reverse);
    route.hold(&reverse, WAIT).await.unwrap();
    route.switch(&reverse).await.unwrap();
    route.undo(&reverse).await.unwrap();
    assert_eq!(stage.reached().await, stage.target.port());
    assert_eq!(stage.ini(), switched);
    // Somebody edits the line in between: a rollback keeps that and changes the three words.
    let edited = switched.replace("pool_size=10", "pool_size=11");
    std::fs::write(&stage.ini, &edited).unwrap();
    route.switch(&reverse).await.unwrap();
    assert_eq!(stage.ini(), stage.text.replace("pool_size=10", "pool_size=11"));
    assert_eq!(stage.reached().await, stage.source.port());
    route.forget(&reverse).await.unwrap();
    assert_eq!(stage.leftovers(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn check_finds_what_stands_in_the_way_and_changes_nothing() {
    let stage = Stage::new().await;
    let context = stage.context(Stream::Forward);
    let said = |route: Route| {
        let context = context.clone();
        async move { route.check(&context).await.unwrap_err().to_string() }
    };
    let (port, ini) = (stage.port, stage.ini.display().to_string());
    let with = |port: u16, ini: &str, name: &str| {
        Route::parse(&format!("pgbouncer:postgres://admin@127.0.0.1:{port},{ini},{name}")).unwrap()
    };
    stage.route().check(&context).await.unwrap();
    let text = said(stage.route_as("stats")).await;
    assert!(text.contains("user \"stats\" may not PAUSE; add it to admin_users"), "{text}");
    let text = said(stage.route_as("app")).await;
    assert!(text.contains("opening its console"), "{text}");
    let text = said(with(port, &ini, "nowhere")).await;
    assert!(text.contains("has no database \"nowhere\""), "{text}");
    let text = said(with(port, "/nowhere.ini", "shop")).await;
    assert!(text.contains("is it the right path?"), "{text}");
    let text = said(with(1, &ini, "shop")).await;
    assert!(text.contains("is the server running"), "{text}");
    let copy = stage.ini.with_file_name("users.txt");
    let text = said(with(port, &copy.display().to_string(), "shop")).await;
    assert!(text.contains("[databases] has no line for \"shop\""), "{text}");
    let other = stage.text.replace("postgres host=127.0.0.1", "postgres host=elsewhere");
    std::fs::write(&copy, other).unwrap();
    let text = said(with(port, &copy.display().to_string(), "shop")).await;
    assert!(text.contains("leading to 127.0.0.1:") && text.contains("elsewhere:"), "{text}");
    // The wrong file again, but nobody checked: pgbouncer is asked whether it has understood.
    let blind = with(port, &copy.display().to_string(), "shop");
    let error = blind.switch(&context).await.unwrap_err().to_string();
    assert!(error.contains("is") && error.contains("the file that it reads?"), "{error}");
    assert_eq!(stage.ini(), stage.text);
    assert_eq!(stage.reached().await, stage.source.port());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pgbouncer_382_a_pooler_given_as_a_server_is_recognised() {
    let stage = Stage::new().await;
    for purpose in [Purpose::Sql, Purpose::Replication] {
        let text = format!("postgres://app@127.0.0.1:{}/shop", stage.port);
        let config = Config::parse_with(&text, &|_| None).unwrap();
        let error = Session::connect(&config, purpose).await.map(|_| ()).unwrap_err().to_string();
        assert!(error.contains("this is a pooler: give the address"), "{error}");
    }
}
