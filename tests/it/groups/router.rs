//! An application that sends each statement to the side that owns its partition: a router that a
//! hook tells, and writers that ask it.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::runtime::Handle;
use tokio::sync::{OwnedRwLockWriteGuard, RwLock};
use walferry::pg::{Config, Purpose, Session};

/// Where a partition's statements go: true for the target. Whoever sends one holds it for reading,
/// so that a partition is held once its statements have ended.
type Place = Arc<RwLock<bool>>;

/// Leads the partitions `items_NNNN` as its hook is told.
pub struct Router {
    dir: PathBuf,
    pub places: Vec<Place>,
    stop: Arc<Stop>,
}

/// Lets the next hook in phase switch wait for a moment.
#[derive(Debug, Default)]
struct Stop {
    wanted: AtomicBool,
    there: AtomicBool,
}

impl Router {
    /// Of so many partitions, all on the source.
    pub fn start(dir: &std::path::Path, partitions: usize) -> Router {
        let dir = dir.join(format!("router-{:08x}", fastrand::u32(..)));
        std::fs::create_dir(&dir).unwrap();
        let asked = dir.join("asked");
        let made = std::process::Command::new("mkfifo").arg(&asked).status().unwrap();
        assert!(made.success());
        // Both ends, so that there is never no writer.
        let asked = OpenOptions::new().read(true).write(true).open(&asked).unwrap();
        let places: Vec<Place> = (0..partitions).map(|_| Place::default()).collect();
        let (led, answers, runtime) = (places.clone(), dir.clone(), Handle::current());
        let stop = Arc::<Stop>::default();
        let stopping = stop.clone();
        std::thread::spawn(move || lead(asked, &led, &answers, &runtime, &stopping));
        Router { dir, places, stop }
    }

    /// Waits until the next group is at its switch, which takes half a second then.
    pub async fn in_a_switch(&self) {
        self.stop.wanted.store(true, Ordering::SeqCst);
        crate::support::until("a group's switch", async || self.stop.there.load(Ordering::SeqCst))
            .await;
    }

    /// The route. The hook waits until the router has done what it was told.
    pub fn route(&self) -> String {
        format!(
            "hook:cd {} && mkfifo done.$$ && echo $$ $WALFERRY_PHASE $WALFERRY_FLIP \
             $WALFERRY_TABLES > asked && read said < done.$$ && rm done.$$",
            self.dir.display()
        )
    }
}

/// The router's thread, until it is told `end`. Every phase may come twice.
fn lead(asked: File, places: &[Place], dir: &std::path::Path, runtime: &Handle, stop: &Stop) {
    let mut held: HashMap<usize, OwnedRwLockWriteGuard<bool>> = HashMap::new();
    let mut answered: Vec<File> = Vec::new();
    for line in BufReader::new(asked).lines() {
        let line = line.unwrap();
        let words: Vec<&str> = line.split(' ').collect();
        let &[pid, phase, flip, ..] = &words[..] else { return };
        let bucket = |table: &&str| table.strip_prefix("public.items_")?.parse::<usize>().ok();
        let buckets: Vec<usize> = words[3..].iter().filter_map(bucket).collect();
        for bucket in buckets {
            let hold = || runtime.block_on(places[bucket].clone().write_owned());
            match phase {
                "hold" => {
                    held.entry(bucket).or_insert_with(hold);
                }
                "switch" => **held.entry(bucket).or_insert_with(hold) = flip == "cutover",
                "undo" => **held.entry(bucket).or_insert_with(hold) = flip == "rollback",
                _ => {}
            }
            if matches!(phase, "release" | "undo") {
                held.remove(&bucket);
            }
        }
        if phase == "switch" && stop.wanted.swap(false, Ordering::SeqCst) {
            stop.there.store(true, Ordering::SeqCst);
            std::thread::sleep(Duration::from_millis(500));
        }
        // Kept for a while: what is written to a pipe that nobody has open is gone.
        let mut done = OpenOptions::new()
            .read(true)
            .write(true)
            .open(dir.join(format!("done.{pid}")))
            .unwrap();
        done.write_all(b"done\n").unwrap();
        answered.push(done);
        if answered.len() > 8 {
            answered.remove(0);
        }
    }
}

impl Drop for Router {
    fn drop(&mut self) {
        let asked = OpenOptions::new().read(true).write(true).open(self.dir.join("asked"));
        let _ = asked.unwrap().write_all(b"end end\n");
    }
}

/// What writers saw.
#[derive(Debug, Default)]
pub struct Seen {
    /// By partition and id, how often the row was updated.
    pub rows: HashMap<(usize, i64), i64>,
    pub errors: Vec<String>,
    /// Statements that waited for longer than 50 ms, the router's wait included: when they ended,
    /// and how long it was.
    pub slow: Vec<(Instant, Duration)>,
    pub statements: u64,
}

impl Seen {
    /// The longest wait of a statement that was not under way within these times.
    pub fn longest(&self, but: &[(Instant, Instant)]) -> Duration {
        let beside = |&&(ended, took): &&(Instant, Duration)| {
            but.iter().all(|(from, to)| ended < *from || ended - took > *to)
        };
        self.slow.iter().filter(beside).map(|(_, took)| *took).max().unwrap_or_default()
    }
}

/// Writers under way.
pub struct Writers {
    stop: Arc<AtomicBool>,
    pub count: Arc<AtomicU64>,
    tasks: Vec<tokio::task::JoinHandle<Seen>>,
}

impl Writers {
    /// So many, each pausing for so long after a statement.
    pub fn start(router: &Router, uris: [String; 2], writers: usize, pause: Duration) -> Writers {
        let (stop, count) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let write = |_| {
            let (places, uris) = (router.places.clone(), uris.clone());
            tokio::spawn(write(places, uris, pause, stop.clone(), count.clone()))
        };
        let tasks = (0..writers).map(write).collect();
        Writers { stop, count, tasks }
    }

    /// Waits until so many more statements have been answered.
    pub async fn more(&self, statements: u64) {
        let due = self.count.load(Ordering::SeqCst) + statements;
        crate::support::until("the writers go on", async || {
            self.count.load(Ordering::SeqCst) >= due
        })
        .await;
    }

    /// Stops them, and gives what they saw, together; no id may have been drawn twice.
    pub async fn end(self) -> Seen {
        self.stop.store(true, Ordering::SeqCst);
        let mut all = Seen::default();
        let mut ids = std::collections::HashSet::new();
        for task in self.tasks {
            let seen = task.await.unwrap();
            for (row, updates) in seen.rows {
                assert!(ids.insert(row.1), "id {} was drawn twice", row.1);
                all.rows.insert(row, updates);
            }
            all.errors.extend(seen.errors);
            all.slow.extend(seen.slow);
            all.statements += seen.statements;
        }
        all
    }
}

async fn write(
    places: Vec<Place>,
    uris: [String; 2],
    pause: Duration,
    stop: Arc<AtomicBool>,
    count: Arc<AtomicU64>,
) -> Seen {
    let mut sessions = Vec::new();
    for uri in &uris {
        let config = Config::parse(uri).unwrap().with_application_name("app");
        sessions.push(Session::connect(&config, Purpose::Sql).await.unwrap());
    }
    // A session that meets thousands of partitions for the first time needs 100 ms and more for that
    // alone; nobody moves anything yet. Its first statement on the other side is counted.
    sessions[0].query("select from public.items where bucket = 0 and id = 0").await.unwrap();
    let mut seen = Seen::default();
    let mut known: Vec<Vec<i64>> = vec![Vec::new(); places.len()];
    while !stop.load(Ordering::SeqCst) {
        let bucket = fastrand::usize(..places.len());
        // By the partition's name, or by the table's.
        let named = format!("public.items_{bucket:04}");
        let table = if fastrand::bool() { &*named } else { "public.items" };
        let again = fastrand::choice(&known[bucket]).copied().filter(|_| fastrand::bool());
        let sql = match again {
            Some(id) => format!(
                "update {table} set n = n + 1 where bucket = {bucket} and id = {id} returning id"
            ),
            None => format!("insert into {table} (bucket) values ({bucket}) returning id"),
        };
        let begun = Instant::now();
        let place = places[bucket].read().await;
        let answered = sessions[usize::from(*place)].query(&sql).await;
        drop(place);
        let took = begun.elapsed();
        if took > Duration::from_millis(50) {
            seen.slow.push((Instant::now(), took));
        }
        match answered.map(|rows| rows.first().map(|row| row.parse::<i64>(0).unwrap())) {
            Ok(Some(id)) => {
                *seen.rows.entry((bucket, id)).or_insert(-1) += 1;
                if again.is_none() {
                    known[bucket].push(id);
                }
            }
            Ok(None) => seen.errors.push(format!("no row: {sql}")),
            Err(error) => seen.errors.push(format!("{sql}: {error}")),
        }
        seen.statements += 1;
        count.fetch_add(1, Ordering::SeqCst);
        tokio::time::sleep(pause).await;
    }
    seen
}
