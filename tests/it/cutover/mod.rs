//! The cutover and the rollback hold what they promise: on real servers, through failures.

mod fence;
mod gates;
mod gone;
mod kills;
mod modes;
mod neighbours;
mod reads;
mod routes;
mod several;
mod silence;
mod stragglers;
mod undo;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use walferry::demo::server::Server;
use walferry::pg::{Config, Purpose, Session};

use crate::support::job::Ends;
use crate::support::{self, Walferry};

/// What most of these tests move: a table, a partitioned one, one whose rows stay behind.
const TABLES: &str = "create table public.t (id bigint primary key, v text); \
    create table public.side (id int primary key, v text); \
    create table public.parts (id int primary key) partition by range (id); \
    create table public.parts_low partition of public.parts for values from (0) to (100); \
    create table public.parts_high partition of public.parts for values from (100) to (200); \
    create unlogged table public.scratch (a int); \
    create table public.log (at timestamptz default now(), line text)";

/// A job that follows, and the run that drives it.
struct Stage {
    ends: Ends,
    run: Walferry,
}

impl Stage {
    async fn start() -> Stage {
        Stage::of(Ends::start(15, 15)).await
    }

    async fn of(ends: Ends) -> Stage {
        ends.source.psql("app", TABLES).unwrap();
        let mut run = ends.spawn(&["run", "--schema-only", "public.log"]);
        ends.until_phase(&mut run, "following").await;
        Stage { ends, run }
    }

    async fn phase(&self) -> String {
        let sql = "select phase from walferry.job";
        self.ends.target.psql("app", sql).unwrap()
    }

    async fn until_phase(&mut self, phase: &str) {
        self.ends.until_phase(&mut self.run, phase).await;
    }

    /// Steps of the newest attempt; those that were begun and not ended with a `!`.
    fn journal(&self) -> Vec<String> {
        let sql = "select step || case when ms is null then '!' else '' end from walferry.journal \
                   where attempt = (select attempt from walferry.journal order by id desc limit 1) \
                   order by id";
        self.ends.target.psql("app", sql).unwrap().lines().map(str::to_string).collect()
    }

    fn side(&self, command: &str) -> (&Server, &Server) {
        match command {
            "cutover" => (&self.ends.source, &self.ends.target),
            _ => (&self.ends.target, &self.ends.source),
        }
    }

    /// Stops the run in order.
    async fn end(self) -> Ends {
        self.run.signal("INT");
        self.run.ended().await.expect_success();
        self.ends
    }
}

async fn session(uri: &str) -> Session {
    let config = Config::parse(uri).unwrap().with_application_name("app");
    Session::connect(&config, Purpose::Sql).await.unwrap()
}

/// The message of a statement that must fail.
async fn refused(session: &mut Session, sql: &str) -> String {
    session.execute(sql).await.expect_err(sql).to_string()
}

/// A client that inserts into `public.t`, one row after the other, wherever its file says.
struct Load {
    place: PathBuf,
    stop: Arc<AtomicBool>,
    count: Arc<AtomicU64>,
    task: tokio::task::JoinHandle<Seen>,
}

/// What a [`Load`] saw.
#[derive(Debug, Default)]
struct Seen {
    /// Rows whose insert was acknowledged.
    acknowledged: Vec<i64>,
    errors: Vec<String>,
    longest: Duration,
}

impl Load {
    async fn start(dir: &Server, uri: &str) -> Load {
        let place = dir.dir().join(format!("place-{:08x}", fastrand::u32(..)));
        std::fs::write(&place, uri).unwrap();
        let (stop, count) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let task = tokio::spawn(insert(place.clone(), stop.clone(), count.clone()));
        Load { place, stop, count, task }
    }

    /// Waits until so many more rows are in; panics after 30 s.
    async fn more(&self, rows: u64) {
        let due = self.count.load(Ordering::SeqCst) + rows;
        let got = async || self.count.load(Ordering::SeqCst) >= due;
        support::until("the load goes on", got).await;
    }

    /// The same, and gives the time it took.
    async fn goes_on_after(&self) -> Duration {
        let begun = Instant::now();
        self.more(1).await;
        begun.elapsed()
    }

    async fn stop(self) -> Seen {
        self.stop.store(true, Ordering::SeqCst);
        self.task.await.unwrap()
    }
}

async fn insert(place: PathBuf, stop: Arc<AtomicBool>, count: Arc<AtomicU64>) -> Seen {
    let mut seen = Seen::default();
    let (mut at, mut open): (String, Option<Session>) = (String::new(), None);
    for id in 1.. {
        if stop.load(Ordering::SeqCst) {
            break;
        }
        let now = std::fs::read_to_string(&place).unwrap();
        if now != at {
            (at, open) = (now, None);
        }
        let begun = Instant::now();
        let outcome = match &mut open {
            Some(session) => {
                session.execute(&format!("insert into public.t values ({id}, 'load')")).await
            }
            None => match Session::connect(&Config::parse(&at).unwrap(), Purpose::Sql).await {
                Ok(session) => {
                    open = Some(session);
                    continue;
                }
                Err(error) => Err(error),
            },
        };
        seen.longest = seen.longest.max(begun.elapsed());
        match outcome {
            Ok(_) => {
                seen.acknowledged.push(id);
                count.fetch_add(1, Ordering::SeqCst);
            }
            Err(error) => {
                if error.is_closed() {
                    open = None;
                }
                seen.errors.push(error.to_string());
            }
        }
        tokio::time::sleep(Duration::from_millis(3)).await;
    }
    seen
}

/// Every acknowledged row is on `server`, and no row that was refused.
fn assert_all_there(server: &Server, seen: &Seen, unknown: usize) {
    let rows = server.psql("app", "select id from public.t where v = 'load' order by id").unwrap();
    let rows: Vec<i64> = rows.lines().map(|id| id.parse().unwrap()).collect();
    let lost: Vec<_> = seen.acknowledged.iter().filter(|id| !rows.contains(id)).collect();
    let extra: Vec<_> = rows.iter().filter(|id| !seen.acknowledged.contains(id)).collect();
    assert!(lost.is_empty(), "lost: {lost:?}");
    assert!(extra.len() <= unknown, "never acknowledged: {extra:?}");
}

/// A hook whose script can be changed between phases. It logs every phase, runs what `phase.PHASE`
/// holds, and leads the load over.
struct Hook {
    dir: PathBuf,
}

impl Hook {
    fn new(stage: &Stage, load: Option<&Load>) -> Hook {
        let dir = stage.ends.source.dir().join(format!("hook-{:08x}", fastrand::u32(..)));
        std::fs::create_dir(&dir).unwrap();
        let place = load.map_or("/dev/null".to_string(), |load| load.place.display().to_string());
        let script = format!(
            "cd {dir} || exit 9\n\
             echo \"$WALFERRY_FLIP $WALFERRY_PHASE\" >> log\n\
             env | grep ^WALFERRY_ | sort > env.$WALFERRY_PHASE\n\
             if [ -e phase.$WALFERRY_PHASE ]; then . ./phase.$WALFERRY_PHASE; fi\n\
             case $WALFERRY_FLIP.$WALFERRY_PHASE in\n\
             cutover.switch|rollback.undo) uri='{target}' ;;\n\
             rollback.switch|cutover.undo) uri='{source}' ;;\n\
             *) exit 0 ;;\n\
             esac\n\
             printf %s \"$uri\" > place && cp place {place}.new && mv {place}.new {place}\n",
            dir = dir.display(),
            source = stage.ends.source_uri(),
            target = stage.ends.target_uri(),
        );
        let script = match load {
            Some(_) => script,
            None => script.replace("&& cp place /dev/null.new && mv /dev/null.new /dev/null", ""),
        };
        std::fs::write(dir.join("script"), script).unwrap();
        Hook { dir }
    }

    fn route(&self) -> String {
        format!("hook:sh {}/script", self.dir.display())
    }

    /// What to run in a phase from now on; nothing if empty.
    fn on(&self, phase: &str, script: &str) {
        let path = self.dir.join(format!("phase.{phase}"));
        if script.is_empty() {
            std::fs::remove_file(path).unwrap();
        } else {
            std::fs::write(path, script).unwrap();
        }
    }

    /// In a phase: say `here`, then wait until it is let go, or for ten seconds.
    fn stop_at(&self, phase: &str) {
        let _ = std::fs::remove_file(self.dir.join("go"));
        let _ = std::fs::remove_file(self.dir.join("here"));
        self.on(
            phase,
            "echo > here; n=0; while [ ! -e go ] && [ $n -lt 500 ]; do sleep 0.02; \
             n=$((n+1)); done\n",
        );
    }

    /// The same, and then it fails.
    fn fail_after_stop(&self, phase: &str) {
        let path = self.dir.join(format!("phase.{phase}"));
        let script = std::fs::read_to_string(&path).unwrap();
        std::fs::write(path, script + "exit 1\n").unwrap();
    }

    async fn reached(&self) {
        support::until("the hook's phase", async || self.dir.join("here").exists()).await;
    }

    fn go(&self) {
        std::fs::write(self.dir.join("go"), "").unwrap();
    }

    fn log(&self) -> Vec<String> {
        let text = std::fs::read_to_string(self.dir.join("log")).unwrap_or_default();
        text.lines().map(str::to_string).collect()
    }

    fn environment(&self, phase: &str) -> String {
        std::fs::read_to_string(self.dir.join(format!("env.{phase}"))).unwrap()
    }
}
