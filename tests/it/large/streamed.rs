//! What a reader gives of transactions that it was sent in progress, held against what it gives of
//! the same log at their commit: every byte of every change.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use walferry::buffer::spool::Spill;
use walferry::change::{Chunk, Ending, Item, Spill as _};
use walferry::demo::binaries::is_installed;
use walferry::demo::server::Server;
use walferry::lsn::Lsn;
use walferry::pg::{Config, Purpose, Session};
use walferry::source::{self, Recorded, StreamOptions, publication, slot};

use super::work::{self, Work};
use crate::source::contract::exact;
use crate::source::rig::{Reader, create_options, is_mark, names, soon};

/// Everything of a transaction but how it was cut into chunks.
#[derive(Clone, Debug, PartialEq)]
struct Transaction {
    xid: u32,
    commit_lsn: Lsn,
    end_lsn: Lsn,
    origin: Option<String>,
    ending: Ending,
    changes: Vec<String>,
}

/// Takes a transaction's chunks, up to its commit.
#[derive(Default)]
struct Collected {
    open: Vec<String>,
    done: Vec<Transaction>,
}

impl Collected {
    fn take(&mut self, chunk: &Chunk) {
        self.open.extend(chunk.changes.iter().map(exact));
        let Some(commit) = chunk.commit else { return };
        let changes = std::mem::take(&mut self.open);
        // A server before 15 sends empty transactions at their commit and not in progress, and
        // any does the opposite where all was rolled back to a savepoint.
        if !changes.is_empty() || chunk.begin.ending != Ending::Commit {
            let ending = chunk.begin.ending.clone();
            let (xid, origin) = (chunk.begin.xid, chunk.begin.origin.clone());
            let (commit_lsn, end_lsn) = (chunk.begin.commit_lsn, commit.end_lsn);
            self.done.push(Transaction { xid, commit_lsn, end_lsn, origin, ending, changes });
        }
    }
}

/// Reads up to the mark, from a new connection after each `most` transactions.
async fn read(config: &Config, options: &StreamOptions, most: usize) -> Vec<Transaction> {
    let mut sql = Session::connect(config, Purpose::Sql).await.unwrap();
    let mut all = Vec::new();
    let mut start_lsn = options.start_lsn;
    loop {
        // A walsender that is in the middle of something notices late that nobody listens.
        let free = "select not active from pg_replication_slots where slot_name = 'walferry_large'";
        while !sql.query_one(free, &[]).await.unwrap().bool(0).unwrap() {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
        let options = StreamOptions { start_lsn, ..options.clone() };
        let mut reader = Reader::start(config, options, 1 << 20).await;
        let mut collected = Collected::default();
        let marked = loop {
            let item = reader.pop().await;
            if let Item::Chunk(chunk) = &item {
                if chunk.changes.first().is_some_and(is_mark) {
                    break true;
                }
                collected.take(chunk);
            }
            start_lsn = item.end_lsn().unwrap_or(start_lsn);
            // Nothing is told to the slot: what is read is read once more below.
            if item.end_lsn().is_some() && collected.done.len() >= most {
                break false;
            }
        };
        all.append(&mut collected.done);
        soon("the end", reader.end()).await.unwrap();
        if marked {
            return all;
        }
    }
}

async fn both_ways(major: u32, seed: u64) {
    println!("PostgreSQL {major}, seed {seed}");
    let settings = ["logical_decoding_work_mem = '64kB'", "max_prepared_transactions = 20"];
    let server = Server::start(&Server::bin_of(major).unwrap(), &settings).unwrap();
    let config = Config::parse(&server.uri("postgres")).unwrap().labelled("source");
    let mut sql = Session::connect(&config, Purpose::Sql).await.unwrap();
    sql.execute(&work::ddl()).await.unwrap();
    sql.execute("create table public.mark (x int)").await.unwrap();
    let mut tables = work::tables();
    tables.push("mark".to_string());
    let tables: Vec<&str> = tables.iter().map(String::as_str).collect();
    publication::ensure(&mut sql, "walferry_large", &names(&tables)).await.unwrap();
    let mut maker = Session::connect(&config, Purpose::Sql).await.unwrap();
    let create = create_options("walferry_large", std::time::Duration::from_secs(30));
    let start_lsn = slot::create_plain(&mut maker, &mut sql, &create, |_| {}).await.unwrap();
    let system = source::identify_by_sql(&mut sql).await.unwrap();
    let recorded = Recorded {
        system_identifier: system.system_identifier,
        timeline: system.timeline,
        database: "postgres".to_string(),
        plugin: "pgoutput".to_string(),
    };
    // Each new connection below reads from the slot's place again, so that time goes by the square.
    let work =
        Work { transactions: 14, rows_max: 1500, alters: true, prepares: true, truncates: false };
    work::write(&config, seed, work).await;
    sql.execute("insert into public.mark values (1)").await.unwrap();

    let name = "walferry_large";
    let at_commit = StreamOptions::new(name, name, start_lsn, recorded);
    let spill = Arc::new(Spill::new(std::env::temp_dir(), 1 << 30));
    let in_progress = StreamOptions { spill: Some(spill.clone()), ..at_commit.clone() };
    let expected = read(&config, &at_commit, usize::MAX).await;
    assert!(expected.len() > 15, "{} transactions only", expected.len());
    for most in [usize::MAX, 5] {
        let found = read(&config, &in_progress, most).await;
        same(&found, &expected);
    }
    assert_eq!(spill.bytes(), 0, "files are left");
    two_phase(&config, &at_commit, &in_progress, &expected, major).await;
    let streamed = "select stream_txns from pg_stat_replication_slots";
    let streamed: i64 = server.psql("postgres", streamed).unwrap().parse().unwrap();
    println!("{} transactions, {streamed} times in progress", expected.len());
    assert!(streamed > 10, "{streamed} were sent in progress");
}

/// The first difference, in short: whole transactions fill a screen.
fn same(found: &[Transaction], expected: &[Transaction]) {
    let short = |t: &Transaction| {
        (t.xid, t.commit_lsn, t.end_lsn, t.ending.clone(), t.origin.clone(), t.changes.len())
    };
    for (index, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert_eq!(short(found), short(expected), "transaction {index}");
        assert!(found.changes == expected.changes, "changes of transaction {}", found.xid);
    }
    assert_eq!(found.len(), expected.len());
}

/// The server stops in the middle of a prepared transaction that it finds to be rolled back by the
/// time it looks something up for it, and tells of PREPARE all the same; a server that has looked
/// it up before goes on. Nobody misses what is left out.
fn but_rolled_back(all: &[Transaction]) -> Vec<Transaction> {
    let gone: HashSet<u32> = all
        .iter()
        .filter(|t| matches!(t.ending, Ending::RollbackPrepared(_)))
        .map(|t| t.xid)
        .collect();
    all.iter()
        .map(|t| {
            let changes = if gone.contains(&t.xid) { Vec::new() } else { t.changes.clone() };
            Transaction { changes, ..t.clone() }
        })
        .collect()
}

/// With prepared transactions given as such: the same by both ways; and what was committed, put
/// together again, is what comes at the commits. The slot is of two phases from here on.
async fn two_phase(
    config: &Config,
    at_commit: &StreamOptions,
    in_progress: &StreamOptions,
    expected: &[Transaction],
    major: u32,
) {
    if major < 15 {
        return;
    }
    let two_phase = |options: &StreamOptions| StreamOptions { two_phase: true, ..options.clone() };
    let prepared = read(config, &two_phase(at_commit), usize::MAX).await;
    let endings = |of: fn(&Ending) -> bool| prepared.iter().filter(|t| of(&t.ending)).count();
    let begun = endings(|ending| matches!(ending, Ending::Prepare(_)));
    let ended =
        endings(|ending| matches!(ending, Ending::CommitPrepared(_) | Ending::RollbackPrepared(_)));
    println!("{begun} prepared");
    assert!(begun > 3 && begun == ended, "{begun} prepared, {ended} ended");
    let found = read(config, &two_phase(in_progress), 3).await;
    same(&but_rolled_back(&found), &but_rolled_back(&prepared));
    let mut waiting: HashMap<u32, Vec<String>> = HashMap::new();
    let mut committed = Vec::new();
    for mut transaction in prepared {
        match transaction.ending {
            Ending::Prepare(_) => {
                waiting.insert(transaction.xid, transaction.changes);
                continue;
            }
            Ending::RollbackPrepared(_) => {
                waiting.remove(&transaction.xid).expect("it was prepared");
                continue;
            }
            Ending::CommitPrepared(_) => {
                transaction.changes = waiting.remove(&transaction.xid).expect("it was prepared");
                transaction.ending = Ending::Commit;
            }
            Ending::Commit => {}
        }
        if !transaction.changes.is_empty() {
            committed.push(transaction);
        }
    }
    same(&committed, expected);
}

/// 14 is the first that can, 15 the first that has two phases, 16 the first that tells where a
/// transaction was rolled back. The seed chooses between the first two.
#[tokio::test(flavor = "multi_thread")]
async fn transactions_sent_in_progress_come_out_as_at_their_commit() {
    let seed = std::env::var("WALFERRY_SEED").ok().and_then(|n| n.parse().ok());
    let seed = seed.unwrap_or_else(|| fastrand::u64(..));
    println!("WALFERRY_SEED={seed}");
    let early = if seed.is_multiple_of(2) && is_installed(14) { 14 } else { 15 };
    both_ways(early, seed).await;
    if is_installed(18) {
        both_ways(18, seed).await;
    }
}

/// A reader that has no room gives up, and the next one is served by the server's own disk.
#[tokio::test(flavor = "multi_thread")]
async fn without_room_for_them_the_reader_gives_up_and_says_so() {
    let mut rig = crate::source::rig::Rig::new(
        &["logical_decoding_work_mem = '64kB'"],
        "create table public.a (id int primary key, v text)",
        &["a"],
    )
    .await;
    let spill = Arc::new(Spill::new(std::env::temp_dir(), 300_000));
    let options = StreamOptions { spill: Some(spill.clone()), ..rig.options() };
    let reader = Reader::start(&rig.config, options, 1 << 20).await;
    let insert = "insert into public.a select i, md5(i::text) || md5((i + 1)::text) \
                  from generate_series(1, 20000) i";
    rig.sql.execute(insert).await.unwrap();
    let error = soon("an error", reader.task).await.unwrap().unwrap_err().to_string();
    assert!(error.contains("limit of 300000 bytes") && error.contains("--streaming"), "{error}");
    assert!(spill.take_refused());
    assert_eq!(spill.bytes(), 0);
    assert!(spill.create().is_ok());
    let mut reader = rig.follow(1 << 20).await;
    rig.mark().await;
    let chunks = reader.until_mark().await;
    assert_eq!(chunks.iter().map(|chunk| chunk.changes.len()).sum::<usize>(), 20_000);
    soon("the end", reader.end()).await.unwrap();
}
