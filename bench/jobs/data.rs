//! What is copied, and what is written afterwards. Everything comes from generate_series or from
//! pgbench with a fixed seed.

use std::process::Command;

use anyhow::Result;
use walferry::demo::binaries;

use crate::options::Options;
use crate::pair::{DATABASE, Pair, cores};
use crate::process::run;

/// pgbench's tables, a scale of 1 being 100,000 accounts (15 MB).
pub fn pgbench_tables(pair: &Pair, scale: u64) -> Result<()> {
    let mut command = Command::new(binaries::client("pgbench")?);
    command.args(["-i", "-q", "-I", "dtGvp", "-s", &scale.to_string(), &pair.source_uri()]);
    run(&mut command)?;
    Ok(())
}

/// A table of json, arrays and bytea, some 1 kB a row, with a GIN index.
pub fn documents(rows: u64) -> String {
    format!(
        "create table documents (id bigint primary key, body jsonb not null, tags text[], \
             numbers numeric[], blob bytea, seen timestamptz not null);
         insert into documents select g, jsonb_build_object('id', g, 'name', md5(g::text), \
             'nested', jsonb_build_object('a', g % 1000, 'b', array[g, g + 1], 'c', md5('x' || g))), \
             array[md5('t' || g % 5000), 'tag' || g % 100], array[g * 1.25, g / 3.0], \
             decode(repeat(md5('b' || g), 20), 'hex'), \
             timestamptz '2026-01-01 00:00+00' + g * interval '1 second' \
         from generate_series(1, {rows}) g;
         create index on documents using gin (tags);
         create index on documents (seen);"
    )
}

/// So many tables of 100 rows with a key and an index, and a table of partitions beside them.
pub fn many_tables(pair: &Pair, tables: u64, partitions: u64) -> Result<()> {
    // Some hundred at a time: each is locked until its transaction ends.
    for first in (1..=tables).step_by(512) {
        let last = (first + 511).min(tables);
        let sql = format!(
            "do $$ begin for t in {first}..{last} loop \
                 execute format('create table small_%s (id int primary key, note text)', t); \
                 execute format('insert into small_%s select g, md5(g::text) \
                     from generate_series(1, 100) g', t); \
                 execute format('create index on small_%s (note)', t); end loop; end $$"
        );
        pair.source.psql(DATABASE, &sql)?;
    }
    let mut sql = "create table parted (id int, note text, primary key (id)) \
         partition by range (id);"
        .to_string();
    for part in 0..partitions {
        let (from, to) = (part * 100 + 1, part * 100 + 101);
        sql.push_str(&format!(
            "create table parted_{part} partition of parted for values from ({from}) to ({to});"
        ));
    }
    let last = partitions * 100;
    sql.push_str(&format!(
        "insert into parted select g, md5(g::text) from generate_series(1, {last}) g"
    ));
    pair.source.psql(DATABASE, &sql)?;
    Ok(())
}

/// Tables before, and transactions that pile up behind the slots.
pub struct Backlog {
    pub name: &'static str,
    /// pgbench's own tables at this scale; 0 for none.
    pub pgbench_scale: u64,
    /// Further tables with their rows.
    pub tables: String,
    /// pgbench scripts with their weights; empty for pgbench's own transaction.
    pub scripts: Vec<(String, u32)>,
    /// Writers at a time; 1 where more would wait for each other's rows.
    pub clients: u64,
    /// Source transactions.
    pub transactions: u64,
    /// Row changes of one transaction.
    pub changes_each: u64,
}

impl Backlog {
    /// Row changes of all.
    pub fn changes(&self) -> u64 {
        self.transactions * self.changes_each
    }

    /// Writes it all, seed 7, and then says so in `bench_mark`.
    pub fn write(&self, pair: &Pair) -> Result<()> {
        let clients = self.clients.min(self.transactions);
        let mut command = Command::new(binaries::client("pgbench")?);
        command.env("PGOPTIONS", "-c synchronous_commit=off");
        command.args(["-n", "--random-seed=7", "-M", "prepared", "-D", "i=0"]);
        command.args(["-c", &clients.to_string(), "-j", &clients.min(cores() as u64).to_string()]);
        command.args(["-t", &(self.transactions / clients).to_string()]);
        for (number, (script, weight)) in self.scripts.iter().enumerate() {
            let path = pair.scratch.join(format!("{}-{number}.sql", self.name));
            std::fs::write(&path, script)?;
            command.arg("-f").arg(format!("{}@{weight}", path.display()));
        }
        run(command.arg(pair.source_uri()))?;
        pair.source.psql(DATABASE, "update bench_mark set done = true")?;
        Ok(())
    }
}

/// So many of pgbench's transactions of four row changes.
pub fn pgbench_backlog(options: &Options, full: u64) -> Backlog {
    Backlog {
        name: "pgbench",
        pgbench_scale: options.sized(10, 1),
        tables: String::new(),
        scripts: Vec::new(),
        clients: 4,
        transactions: options.sized(full, 40),
        changes_each: 4,
    }
}

/// One transaction of so many rows.
pub fn one_large(options: &Options) -> Backlog {
    let rows = options.sized(5_000_000, 1000);
    Backlog {
        name: "large",
        pgbench_scale: 0,
        tables: "create table large (id bigint primary key, note text, amount numeric, \
                 at timestamptz)"
            .to_string(),
        scripts: vec![(
            format!(
                "insert into large select g, md5(g::text), g * 1.5, \
                 timestamptz '2026-01-01 00:00+00' + g * interval '1 second' \
                 from generate_series(1, {rows}) g;\n"
            ),
            1,
        )],
        clients: 1,
        transactions: 1,
        changes_each: rows,
    }
}

/// The shapes that are hard in a way of their own. Each takes a subscription two seconds or more where
/// it can: below that it is starting up that is measured.
pub fn shapes(options: &Options) -> Vec<Backlog> {
    let backlog = |name, tables: &str, scripts: &[(&str, u32)], full, changes_each| Backlog {
        name,
        pgbench_scale: 0,
        tables: tables.to_string(),
        scripts: scripts.iter().map(|(text, weight)| (text.to_string(), *weight)).collect(),
        clients: 1,
        transactions: options.sized(full, 20),
        changes_each,
    };
    let deletes = options.sized(40_000, 20) * 50;
    vec![
        backlog(
            "insert-only",
            "create table events (id bigint generated always as identity primary key, n int, \
             note text, at timestamptz)",
            &[(
                "insert into events (n, note, at) select g, md5(g::text), now() \
                 from generate_series(1, 100) g;\n",
                1,
            )],
            10_000,
            100,
        ),
        backlog(
            "hot-updates",
            "create table hot (id int primary key, n int, note text) with (fillfactor = 50); \
             insert into hot select g, 0, md5(g::text) from generate_series(1, 1000) g",
            &[(
                "\\set k random_zipfian(1, 980, 1.2)\n\
                 update hot set n = n + 1 where id > :k and id <= :k + 20;\n",
                1,
            )],
            10_000,
            20,
        ),
        backlog(
            "deletes",
            &format!(
                "create table doomed (id int primary key, note text); \
                 insert into doomed select g, md5(g::text) from generate_series(1, {deletes}) g"
            ),
            &[(
                "\\set i :i + 1\n\
                 delete from doomed where id > (:i - 1) * 50 and id <= :i * 50;\n",
                1,
            )],
            40_000,
            50,
        ),
        backlog(
            "full-no-key",
            "create table keyless (id int, n int, note text); create index on keyless (id); \
             alter table keyless replica identity full; \
             insert into keyless select g, 0, md5(g::text) from generate_series(1, 10000) g",
            &[(
                "\\set k random(0, 9980)\n\
                 update keyless set n = n + 1 where id > :k and id <= :k + 20;\n",
                1,
            )],
            5_000,
            20,
        ),
        backlog(
            "wide-toast",
            "create table wide (id int primary key, n int, a text, b text, c text); \
             alter table wide alter a set storage external, alter b set storage external, \
                 alter c set storage external; \
             insert into wide select g, 0, repeat(md5('a' || g), 300), repeat(md5('b' || g), 300), \
                 repeat(md5('c' || g), 300) from generate_series(1, 2000) g",
            &[
                (
                    "\\set k random(0, 1990)\n\
                     update wide set n = n + 1 where id > :k and id <= :k + 10;\n",
                    9,
                ),
                (
                    "\\set k random(0, 1990)\n\
                     update wide set n = n + 1, b = repeat(md5(n::text), 300) \
                     where id > :k and id <= :k + 10;\n",
                    1,
                ),
            ],
            20_000,
            10,
        ),
    ]
}
