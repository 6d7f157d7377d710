//! Applications of every source, which go on at the targets once theirs has moved.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use walferry::demo::server::Server;
use walferry::pg::{Config, Purpose, Session};

use crate::support;

/// Numbers from here on were written after the switch.
const AFTER: u64 = 1_000_000_000;

/// Of each table that is shared out, the target's place of a row, from 0, in words of the test's
/// own.
pub fn place_of(targets: usize) -> Vec<(&'static str, String)> {
    let (last, width) = (targets - 1, (1_u64 << 32) / targets as u64);
    // least() passes over NULL.
    let range =
        |hash: &str| format!("least(coalesce(({hash}::int8 + 2147483648) / {width}, 0), {last})");
    let mod_of = |number: &str| format!("(({number} % {targets}) + {targets}) % {targets}");
    vec![
        ("customer", range("hashint8(id)")),
        ("orders", range("hashint8(customer_id)")),
        ("tag", mod_of("hashtext(key)")),
        ("heavy", mod_of("id")),
        ("place", "case region when 'eu' then 1 when 'us' then 2 else 0 end".to_string()),
        ("loose", range("hashint4(k)")),
    ]
}

/// Rows of the time before the switch.
pub fn before(table: &str) -> String {
    match table {
        "customer" => format!("id < {AFTER}"),
        _ => "true".to_string(),
    }
}

/// What a source has to begin with; its numbers leave those of the others alone.
pub fn first_rows(place: usize, sources: usize, rows: u32) -> String {
    let id = format!("i * {sources} + {place}");
    format!(
        "insert into customer select {id}, 'name ' || i, i from generate_series(1, {rows}) i; \
         insert into orders select {id}, j, 'v' || i from generate_series(1, {rows}) i, \
             generate_series(1, 2) j; \
         insert into tag select 'schl\u{fc}ssel ' || {id}, i from generate_series(1, {rows}) i; \
         insert into heavy select ({id}) * (i % 2 * 2 - 1), i, repeat(md5(i::text), 100) \
             from generate_series(1, 300) i; \
         insert into place select (array['eu', 'us', 'asia', ''])[i % 4 + 1], {id}, i \
             from generate_series(1, {rows}) i; \
         insert into loose select {id}, nullif(i % 50, 7), 'loose' from generate_series(1, 500) i; \
         insert into country select 'c' || i, 'country' from generate_series(1, 20) i; \
         insert into stays values (1); select setval('ticket', 500 + {place} * 400)"
    )
}

/// One transaction of a source. `turn` counts up.
fn transaction(place: usize, sources: usize, turn: u64) -> String {
    let of = |i: u64| i * sources as u64 + place as u64;
    let (new, any) = (of(100_000 + turn), of(fastrand::u64(1..3000)));
    let small = of(fastrand::u64(1..300)) as i64 * if fastrand::bool() { 1 } else { -1 };
    let region = ["eu", "us", "asia", ""][fastrand::usize(0..4)];
    let sql = match fastrand::u32(0..10) {
        0 => format!(
            "insert into customer values ({new}, 'new', 0); \
             insert into orders select {new}, j, 'new' from generate_series(1, 3) j"
        ),
        1 => format!("update customer set n = n + 1 where id between {any} and {any} + 20"),
        2 => format!("delete from customer where id = {any}"),
        3 => {
            format!("update tag set key = 'moved ' || {new} where key = 'schl\u{fc}ssel ' || {any}")
        }
        4 => format!("update tag set v = v + 1 where v % 100 = {any} % 100"),
        5 => format!("update heavy set id = {new} where id = {small}"),
        6 => format!("update heavy set n = n + 1 where id = {small}"),
        7 => format!(
            "update place set region = '{region}' where id = {any}; \
             insert into place values ('{region}', {new}, 1)"
        ),
        8 => format!(
            "insert into loose values ({new}, nullif({any} % 50, 7), 'loose'), (-{new}, null, 'n'); \
             delete from loose where id = {any} % 500"
        ),
        _ if place == 0 => format!(
            "update country set name = 'at {turn}' where code = 'c' || ({any} % 20); \
             insert into country values ('new {new}', 'n')"
        ),
        _ => format!(
            "update loose set k = nullif({turn} % 50, 7) where id between {any} % 500 and 500"
        ),
    };
    format!("begin; {sql}; commit")
}

/// Writers at work, two for each source.
pub struct Load {
    stop: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
    writers: Vec<tokio::task::JoinHandle<Duration>>,
}

impl Load {
    pub fn start(sources: &[Server], targets: &[Server]) -> Load {
        let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let count = sources.len();
        let writers = sources.iter().enumerate().map(|(place, source)| {
            let uris = (source.uri("app"), targets[place % targets.len()].uri("app"));
            tokio::spawn(write(uris, (place, count), stop.clone(), done.clone()))
        });
        let writers = writers.collect();
        Load { stop, done, writers }
    }

    /// Returns when writers have done some more.
    pub async fn more(&self) {
        let before = self.done.load(Ordering::SeqCst);
        support::until("writers are stuck", || {
            std::future::ready(self.done.load(Ordering::SeqCst) > before + 60)
        })
        .await;
    }

    /// Ends them once they have moved; gives each one's longest wait, from the begin of a
    /// transaction to its commit, or to the first commit on a target.
    pub async fn end(self) -> Vec<Duration> {
        self.more().await;
        self.stop.store(true, Ordering::SeqCst);
        let mut longest = Vec::new();
        for writer in self.writers {
            longest.push(writer.await.unwrap());
        }
        longest
    }
}

async fn open(uri: &str) -> Session {
    let config = Config::parse(uri).unwrap();
    let mut session = Session::connect(&config, Purpose::Sql).await.unwrap();
    session.execute("set search_path = public").await.unwrap();
    session
}

async fn write(
    (source, target): (String, String),
    (place, sources): (usize, usize),
    stop: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
) -> Duration {
    let mut session = open(&source).await;
    let (mut moved, mut longest, mut turn) = (false, Duration::ZERO, 0);
    while !stop.load(Ordering::SeqCst) {
        turn += 1;
        let begun = Instant::now();
        if !moved {
            match session.execute(&transaction(place, sources, turn)).await {
                Ok(_) => {}
                Err(error) if error.to_string().contains("this database has moved") => {
                    moved = true;
                    session = open(&target).await;
                }
                // Two writes of one key; nothing has happened.
                Err(error) if matches!(error.code(), Some("23505" | "23503")) => {
                    session.execute("rollback").await.unwrap();
                }
                Err(error) => panic!("source {place}: {error}"),
            }
        }
        if moved {
            let id = AFTER + turn * 10 + place as u64;
            let sql = format!("insert into customer values ({id}, 'after', 0)");
            session.execute(&sql).await.unwrap();
        }
        longest = longest.max(begun.elapsed());
        done.fetch_add(1, Ordering::SeqCst);
        tokio::time::sleep(Duration::from_millis(4)).await;
    }
    assert!(moved, "the source of writer {place} has not moved");
    longest
}
