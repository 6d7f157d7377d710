//! Law 5 through a whole job: at no moment does a reader of the target see a state that the source
//! never had. Each transaction moves money in three tables and writes a line of a fourth, as
//! pgbench's do, with its writer's own number. So at every snapshot the four sums are equal, and of
//! each writer the lines are the first so many.
//!
//! The runner is killed on the way, and what waits then is read in bulk. One life has sizes and
//! times as shipped, the next those by which everything is in bulk, counts are never due, and all
//! is sets, in two sessions at once. Its books (law 10) are held against the rows while nobody runs.
//! `make states` takes a million transactions.

use std::process::{Child, Command};
use std::time::{Duration, Instant};

use walferry::demo::binaries;
use walferry::demo::compare::compare;
use walferry::demo::server::Server;
use walferry::pg::Session;

use crate::support::job::{Ends, conserved};
use crate::support::{session, until_sql};

const TABLES: &str = "create table account (id int primary key, balance int not null); \
    create table teller (id int primary key, balance int not null); \
    create table branch (id int primary key, balance int not null); \
    create table history (client int, n int, delta int, filler text); \
    insert into account select i, 0 from generate_series(1, 1000) i; \
    insert into teller select i, 0 from generate_series(1, 20) i; \
    insert into branch select i, 0 from generate_series(1, 4) i;";

const SCRIPT: &str = "\\set n :n + 1\n\\set a random(1, 1000)\n\\set t random(1, 20)\n\
    \\set b random(1, 4)\n\\set delta random(-5000, 5000)\n\
    begin;\nupdate account set balance = balance + :delta where id = :a;\n\
    update teller set balance = balance + :delta where id = :t;\n\
    update branch set balance = balance + :delta where id = :b;\n\
    insert into history values (:client_id, :n, :delta, 'filler');\nend;\n";

/// Sums of the four tables, the lines of history, and those that they would be if none of any
/// client were missing before another.
const STATE: &str = "select (select sum(balance) from public.account), \
    (select sum(balance) from public.teller), (select sum(balance) from public.branch), coalesce(sum(of), 0), \
    coalesce(sum(lines), 0), coalesce(sum(last), 0) from (select sum(delta) as of, \
    count(*) as lines, max(n) as last from public.history group by client) h";

const CLIENTS: u64 = 4;

/// Transactions on the source, by pgbench. Dropped, it is killed.
struct Writers(Child);

impl Writers {
    fn start(source: &Server, transactions: u64, per_second: Option<u64>) -> Writers {
        let script = source.dir().join("states.sql");
        std::fs::write(&script, SCRIPT).unwrap();
        let mut command = Command::new(binaries::client("pgbench").unwrap());
        command.args(["-n", "-M", "prepared", "-D", "n=0", "-j", "2", "-f"]).arg(script);
        command.args(["-c", &CLIENTS.to_string(), "-t", &(transactions / CLIENTS).to_string()]);
        command.args(per_second.iter().flat_map(|n| ["-R".to_string(), n.to_string()]));
        Writers(command.arg(source.uri("app")).spawn().unwrap())
    }
}

impl Drop for Writers {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Looks at the target until it has so many lines of history. Gives how many states it saw.
async fn watched(target: &mut Session, seen: &mut u64, until: u64) -> u64 {
    let (mut states, mut since) = (0, Instant::now());
    while *seen < until {
        let row = target.query_one(STATE, &[]).await.unwrap();
        let sum = row.str(0).unwrap();
        for other in 1..4 {
            assert_eq!(row.str(other).unwrap(), sum, "sums after {seen} transactions: {row:?}");
        }
        let lines: u64 = row.parse(4).unwrap();
        assert_eq!(row.parse::<u64>(5).unwrap(), lines, "a line is missing before another");
        assert!(lines >= *seen, "{lines} lines after {seen}");
        if lines > *seen {
            (states, since) = (states + 1, Instant::now());
        }
        assert!(since.elapsed() < Duration::from_secs(120), "no more than {lines} of {until}");
        *seen = lines;
    }
    states
}

/// What status says was applied of history, with nobody at work: as much as is there.
async fn books_are_exact(ends: &Ends, target: &mut Session) {
    let gone = "select count(*) = 0 from pg_stat_activity \
        where application_name like 'walferry%' and datname = 'app' and pid <> pg_backend_pid()";
    until_sql(target, gone).await;
    let tables = ends.status().await["tables"].clone();
    conserved(&tables);
    let history = tables.as_array().unwrap().iter().find(|t| t["name"] == "public.history");
    let row = target.query_one("select count(*) from public.history", &[]).await.unwrap();
    assert_eq!(history.unwrap()["applied"].to_string(), row.string(0).unwrap(), "{tables}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_of_the_target_sees_only_states_of_the_source_while_runners_die() {
    let asked = std::env::var("WALFERRY_TRANSACTIONS").ok();
    let transactions: u64 = asked.as_ref().map_or(4000, |n| n.parse().unwrap());
    let (kills, per_second) = if asked.is_some() { (20, None) } else { (2, Some(2000)) };
    let start = || Server::start(&Server::default_bin().unwrap(), &["max_wal_size = 4GB"]).unwrap();
    let ends = Ends::of(start(), start());
    ends.source.psql("app", TABLES).unwrap();
    let config = ends.source.dir().join("walferry.toml");
    let mut settings =
        "apply = \"set\"\n[tuning]\nbulk-bytes = 1\ncounters-ms = 3600000\n".to_string();
    if asked.is_none() {
        // A short life may be over in one batch, with nothing to begin ahead.
        settings.push_str("batch-transactions = 20\n");
    }
    std::fs::write(&config, settings).unwrap();
    let lives = [vec!["run"], vec!["run", "-c", config.to_str().unwrap()]];
    let mut lives = lives.iter().cycle();
    let mut run = || ends.spawn(lives.next().unwrap());

    let mut runner = run();
    ends.until_phase(&mut runner, "following").await;
    let mut target = session(&ends.target, "app").await;
    let (begun, writers) = (Instant::now(), Writers::start(&ends.source, transactions, per_second));
    let (mut seen, mut states) = (0, 0);
    for kill in 1..=kills {
        states += watched(&mut target, &mut seen, transactions * kill / (kills + 1)).await;
        runner.kill9().await;
        books_are_exact(&ends, &mut target).await;
        runner = run();
    }
    states += watched(&mut target, &mut seen, transactions).await;
    println!(
        "{transactions} transactions and {kills} kills in {:.1} s: {states} states seen",
        begun.elapsed().as_secs_f64()
    );
    assert!(states > kills, "only {states} states were seen");
    let second = "select count(*) = 1 from pg_replication_origin where roname like '%forward_2'";
    until_sql(&mut target, second).await;
    drop(writers);
    let comparison = compare(&ends.source_uri(), &ends.target_uri()).await.unwrap();
    assert_eq!(comparison.differences, Vec::<String>::new());
    let rows: u64 = comparison.tables.iter().map(|(_, rows, _)| rows).sum();
    assert_eq!(rows, transactions + 1024);
}
