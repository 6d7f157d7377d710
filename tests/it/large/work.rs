//! Clients at work that a reader finds hard: savepoints in savepoints, most of them rolled back,
//! transactions of many thousand rows beside small ones, tables altered and emptied in the middle.

use std::time::Duration;

use fastrand::Rng;
use walferry::pg::{Config, Purpose, Session};

/// Clients at once. Each has a table of its own, so that none waits for another.
pub const CLIENTS: usize = 4;

/// What they write to.
pub fn ddl() -> String {
    let own: Vec<String> = (0..CLIENTS)
        .map(|client| {
            format!(
                "create table public.own_{client} (id bigint primary key, v text, big text); \
                 alter table public.own_{client} alter big set storage external; \
                 create table public.shape_{client} (id bigint primary key, v varchar(100)); "
            )
        })
        .collect();
    format!(
        "{} create table public.all_of_them (id bigint primary key, client int, v text); \
         create table public.whole (a int, b text); alter table public.whole replica identity full;",
        own.concat()
    )
}

/// Their names.
pub fn tables() -> Vec<String> {
    let own = (0..CLIENTS).flat_map(|n| [format!("own_{n}"), format!("shape_{n}")]);
    own.chain(["all_of_them".to_string(), "whole".to_string()]).collect()
}

/// One client's way through its transactions: the same for the same seed.
pub struct Client {
    number: usize,
    random: Rng,
    /// Rows that are there, of its own table.
    next_id: i64,
    columns: u32,
    /// Tables change their shape, too, which a job does not carry.
    alters: bool,
    /// Some transactions are prepared, and ended a while later.
    prepares: bool,
    /// Tables are emptied by TRUNCATE, too.
    truncates: bool,
    /// So many rows are the most of one statement.
    rows_max: i64,
}

impl Client {
    pub fn new(number: usize, seed: u64, work: Work) -> Client {
        let Work { rows_max, alters, prepares, truncates, .. } = work;
        let random = Rng::with_seed(seed.wrapping_mul(31).wrapping_add(number as u64));
        Client { number, random, next_id: 1, columns: 0, alters, prepares, truncates, rows_max }
    }

    /// The statements of the next transaction, and whether it commits.
    pub fn transaction(&mut self) -> (Vec<String>, bool) {
        let mut statements = Vec::new();
        let mut open = Vec::new();
        for _ in 0..self.random.usize(1..14) {
            match self.random.u32(0..10) {
                0..3 => {
                    let name = format!("s{}", open.len());
                    statements.push(format!("savepoint {name}"));
                    open.push(name);
                }
                3 => self.end(&mut open, "release savepoint", &mut statements),
                4 | 5 => self.end(&mut open, "rollback to savepoint", &mut statements),
                _ => statements.push(self.statement()),
            }
        }
        (statements, self.random.u32(0..6) > 0)
    }

    /// The statements that end it; what a client that is prepared waits before the last.
    pub fn ending(&mut self, index: usize, commits: bool) -> (Vec<String>, Duration) {
        let word = if commits { "commit" } else { "rollback" };
        if !self.prepares || self.random.u32(0..3) > 0 {
            return (vec![word.to_string()], Duration::ZERO);
        }
        let gid = format!("'it''s {} of {}'", index, self.number);
        let wait = Duration::from_millis(self.random.u64(0..400));
        (vec![format!("prepare transaction {gid}"), format!("{word} prepared {gid}")], wait)
    }

    fn end(&mut self, open: &mut Vec<String>, how: &str, statements: &mut Vec<String>) {
        if open.is_empty() {
            return;
        }
        let at = self.random.usize(0..open.len());
        statements.push(format!("{how} {}", open[at]));
        // A savepoint that was rolled back to is still there.
        open.truncate(if how.starts_with("rollback") { at + 1 } else { at });
    }

    fn statement(&mut self) -> String {
        let (me, first) = (self.number, self.next_id);
        let many = self.random.i64(1..=self.rows_max);
        let last = first + many - 1;
        match self.random.u32(0..12) {
            0..4 => {
                self.next_id = last + 1;
                format!(
                    "insert into public.own_{me} select i, md5(i::text), \
                     case when i % 50 = 0 then repeat('x', 3000) end \
                     from generate_series({first}, {last}) i"
                )
            }
            4 | 5 => format!(
                "update public.own_{me} set v = v || '{}' where id % {} = 0",
                self.random.u32(0..10),
                self.random.u32(2..9)
            ),
            6 => format!("delete from public.own_{me} where id % 7 = {}", self.random.u32(0..7)),
            7 => {
                self.next_id = last + 1;
                format!(
                    "insert into public.all_of_them select i * {CLIENTS} + {me}, {me}, 'v' || i \
                     from generate_series({first}, {last}) i"
                )
            }
            8 => format!(
                "insert into public.whole select {me}, 'w' || i from \
                          generate_series(1, {}) i",
                self.random.u32(1..40)
            ),
            9 => format!(
                "delete from public.whole where a = {me} and b = 'w{}'",
                self.random.u32(1..40)
            ),
            // PostgreSQL (seen on 15.20) cannot decode what gives a table a new file, was prepared,
            // and then rolled back, from a slot with two phases: "could not map filenode", again and
            // again. For the same reason no ALTER here rewrites a table.
            10 if self.truncates => format!("truncate public.own_{me}"),
            10 => format!("delete from public.own_{me}"),
            _ if !self.alters => {
                self.next_id += 1;
                format!("insert into public.shape_{me} values ({first}, null)")
            }
            _ => {
                self.columns += 1;
                self.next_id += 1;
                format!(
                    "alter table public.shape_{me} alter v type varchar({}); \
                     insert into public.shape_{me} values ({first}, 'of {}')",
                    100 + self.columns,
                    self.columns
                )
            }
        }
    }
}

/// What they do.
#[derive(Clone, Copy)]
pub struct Work {
    /// Of each client.
    pub transactions: usize,
    /// So many rows are the most of one statement.
    pub rows_max: i64,
    /// Tables change their shape, too, which a job does not carry.
    pub alters: bool,
    /// Some transactions are prepared, and ended a while later.
    pub prepares: bool,
    /// Tables are emptied by TRUNCATE, too.
    pub truncates: bool,
}

/// All clients work to the end.
pub async fn write(config: &Config, seed: u64, work: Work) {
    let clients = (0..CLIENTS).map(|number| {
        let config = config.clone();
        tokio::spawn(async move {
            let mut session = Session::connect(&config, Purpose::Sql).await.unwrap();
            let mut client = Client::new(number, seed, work);
            for index in 0..work.transactions {
                let (statements, commits) = client.transaction();
                session.execute("begin").await.unwrap();
                for sql in &statements {
                    session.execute(sql).await.unwrap_or_else(|e| panic!("{sql}: {e}"));
                    // So that transactions of several clients come between each other.
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
                let (endings, wait) = client.ending(index, commits);
                for (at, sql) in endings.iter().enumerate() {
                    let wait = if at > 0 { wait } else { Duration::ZERO };
                    tokio::time::sleep(wait).await;
                    session.execute(sql).await.unwrap_or_else(|e| panic!("{sql}: {e}"));
                }
            }
        })
    });
    for client in clients.collect::<Vec<_>>() {
        client.await.unwrap();
    }
}
