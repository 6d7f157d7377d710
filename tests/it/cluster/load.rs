//! Clients that put rows into a cluster; what was answered for must be found again.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use walferry::pg::{Config, Purpose, Session};

use crate::support;

/// When to kill a run: as often as `WALFERRY_KILLS` says, or so often, at random moments.
pub fn kills(default: usize) -> Vec<Duration> {
    let count = std::env::var("WALFERRY_KILLS").ok().and_then(|text| text.parse().ok());
    let waits: Vec<Duration> = (0..count.unwrap_or(default))
        .map(|_| Duration::from_millis(fastrand::u64(50..2_000)))
        .collect();
    println!("killed after {waits:?}");
    waits
}

/// Clients at work, each with its own range of numbers.
pub struct Load {
    stop: Arc<AtomicBool>,
    put: Arc<AtomicU64>,
    clients: Vec<tokio::task::JoinHandle<Put>>,
}

/// What one client did.
#[derive(Debug, Default)]
pub struct Put {
    /// Numbers that were answered for.
    pub answered: BTreeSet<u64>,
    /// Statements that were refused because their table has moved.
    pub moved: usize,
    /// All other errors.
    pub failed: Vec<String>,
    /// From the first try of a number to its answer, at most.
    pub longest: Duration,
}

impl Load {
    /// Each client puts numbers by its statement, `$1` being one, on the first of its servers; told
    /// that the table has moved, on the next. The clients' numbers begin with their place times a
    /// million.
    pub fn start(clients: Vec<(Vec<String>, String)>) -> Load {
        let (stop, put) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let clients = (1..).zip(clients).map(|(place, (uris, sql))| {
            let (stop, put) = (stop.clone(), put.clone());
            tokio::spawn(client(place, uris, sql, stop, put))
        });
        let clients = clients.collect();
        Load { stop, put, clients }
    }

    /// Returns when clients have put some more.
    pub async fn more(&self) {
        let before = self.put.load(Ordering::Relaxed);
        support::until("clients are stuck", || {
            std::future::ready(self.put.load(Ordering::Relaxed) > before + 30)
        })
        .await;
    }

    /// What each of them did.
    pub async fn end(self) -> Vec<Put> {
        self.stop.store(true, Ordering::Relaxed);
        let mut ended = Vec::new();
        for client in self.clients {
            ended.push(client.await.unwrap());
        }
        ended
    }
}

async fn client(
    place: u64,
    uris: Vec<String>,
    sql: String,
    stop: Arc<AtomicBool>,
    count: Arc<AtomicU64>,
) -> Put {
    let open = async |at: usize| {
        let config = Config::parse_with(&uris[at % uris.len()], &|_| None).unwrap();
        loop {
            if let Ok(mut session) = Session::connect(&config, Purpose::Sql).await
                && session.execute("set search_path = public").await.is_ok()
            {
                return session;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let (mut at, mut put) = (0, Put::default());
    let mut session = open(at).await;
    for number in place * 1_000_000.. {
        let begun = Instant::now();
        while !stop.load(Ordering::Relaxed) {
            match session.query(&sql.replace("$1", &number.to_string())).await {
                Ok(_) => {
                    put.answered.insert(number);
                    count.fetch_add(1, Ordering::Relaxed);
                    break;
                }
                Err(error) if error.to_string().contains("this database has moved") => {
                    put.moved += 1;
                    at += 1;
                    session = open(at).await;
                }
                Err(error) => {
                    put.failed.push(error.to_string());
                    if error.is_closed() {
                        session = open(at).await;
                    }
                    break;
                }
            }
        }
        if stop.load(Ordering::Relaxed) {
            return put;
        }
        put.longest = put.longest.max(begun.elapsed());
        tokio::time::sleep(Duration::from_millis(4)).await;
    }
    put
}
