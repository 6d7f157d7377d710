//! Every optimisation on, and each of them off: one workload, and the same end.
//!
//! One source, one target with a database for each way. Each way's job copies what is there, is
//! stopped, and goes on behind a backlog of every kind of change; a few transactions come while it
//! follows. Then both sides are compared row by row, and the books looked at. That what was turned
//! off was off is read from what both servers were asked, or from what the applier counted: a
//! switch that is not connected fails.
//!
//! The stages do not meet: rows are copied, then a backlog is read, and applied. So a way turns off
//! one switch of each. `make switches` gives every switch a way of its own.
//!
//! Not here: `bulk-transaction-bytes`, which needs more log than a test is worth, has
//! `source::flow::a_large_transaction_read_in_bulk_is_the_one_that_is_streamed`; and
//! `bulk-message-bytes`, as nothing else of a backlog is read in bulk with it,
//! `source::flow::a_backlog_of_large_rows_is_streamed_behind_its_first_chunk`.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::{Duration, Instant};

use walferry::apply::BOOKS;
use walferry::demo::compare::compare;
use walferry::demo::server::Server;
use walferry::pg::Session;

use crate::support::{Ended, Walferry, session};

/// Sizes at which a workload of seconds goes every way that is on. As shipped they are larger, and
/// times by which nothing would be seen shorter.
const SIZES: &[(&str, &str)] = &[
    ("bulk-bytes", "1000000"),
    ("bulk-message-bytes", "0"),
    ("chunk-messages", "1000"),
    ("set-rows", "50"),
    ("part-bytes", "3000000"),
    ("counters-ms", "3600000"),
    ("positions-ms", "3600000"),
    ("flush-ms", "1000"),
];

/// Jobs at work at the same time.
const AT_ONCE: usize = 3;

/// A backlog takes no longer.
const PATIENCE: Duration = Duration::from_secs(90);

/// What turns an optimisation off, and how that is seen.
struct Switch {
    /// Options of `[tuning]`; `apply` stands above it.
    off: &'static [(&'static str, &'static str)],
    /// How often the path was taken that it is about.
    path: fn(&Trace) -> u64,
    /// What becomes of that when it is off.
    effect: Effect,
    /// It is compared with the way of this switch, which is off with it; else with all on.
    beside: Option<&'static str>,
}

#[derive(Clone, Copy, Debug)]
enum Effect {
    /// It was taken, and is not any more.
    Goes,
    /// It was not taken, and is.
    Comes,
    /// It is taken more often, or less.
    More,
    Less,
}
use Effect::{Comes, Goes, Less, More};

impl Switch {
    const fn new(
        off: &'static [(&'static str, &'static str)],
        effect: Effect,
        path: fn(&Trace) -> u64,
    ) -> Switch {
        Switch { off, path, effect, beside: None }
    }

    fn name(&self) -> &'static str {
        self.off[0].0
    }

    fn assert_is_off(&self, on: &Trace, off: &Trace) {
        let (on, off) = ((self.path)(on), (self.path)(off));
        let is_so = match self.effect {
            Goes => on > 0 && off == 0,
            Comes => on == 0 && off > 0,
            More => on < off,
            Less => on > off,
        };
        assert!(is_so, "{}: on {on}, off {off}, {:?}", self.name(), self.effect);
    }
}

static COPYING: &[Switch] = &[
    Switch::new(&[("bundle-tables", "1")], Goes, |t| {
        let several = |line: &&String| line.matches(" from stdin with (").count() > 1;
        t.target.iter().filter(several).count() as u64
    }),
    Switch::new(&[("freeze", "false")], Goes, |t| t.on_target(", freeze)")),
    Switch::new(&[("keys-beside", "false")], Goes, |t| t.on_target("PRIMARY KEY USING INDEX ")),
    Switch::new(&[("indexes-beside-copy", "true")], Comes, Trace::indexes_before_the_last_rows),
    Switch::new(&[("analyze-beside", "false")], Goes, Trace::analyzed_before_the_last_key),
    Switch::new(&[("maintenance-work-mem", "0")], Comes, |t| {
        t.on_target("set_config(name, '0', false)")
    }),
    Switch::new(&[("part-bytes", "0")], Goes, |t| t.on_source("ctid >= '(")),
    Switch::new(&[("binary-copy", "false")], Goes, |t| {
        t.on_source("to stdout with (format binary)")
    }),
    Switch::new(&[("async-commit", "false")], Goes, Trace::builders_that_do_not_wait),
];

static READING: &[Switch] = &[
    Switch::new(&[("bulk-bytes", "0")], Goes, |t| t.on_source("get_binary_changes(")),
    Switch::new(&[("bulk-ahead", "false")], Less, |t| {
        t.on_source("pg_copy_logical_replication_slot(")
    }),
    Switch::new(&[("chunk-messages", "300")], More, |t| t.on_source("get_binary_changes(")),
    Switch::new(&[("huge-pages", "true")], Comes, |t| t.huge_pages),
];

static APPLYING: &[Switch] = &[
    Switch::new(&[("unnest-in-select", "false")], Goes, |t| t.on_target("(select unnest(")),
    Switch::new(&[("copy-inserts", "false")], Goes, |t| {
        t.on_target(") from stdin") - t.on_target(") from stdin with (")
    }),
    Switch::new(&[("binary-values", "false")], Goes, |t| t.on_target("unnest($1::integer[])")),
    Switch::new(&[("eager-batches", "false")], Goes, |t| t.said("closely")),
    Switch::new(&[("batches-in-flight", "1")], Goes, |t| t.said("behind")),
    // Small batches, each as sets, are begun ahead however quick the target is.
    Switch::new(
        &[("batch-transactions", "10"), ("batch-bytes", "100000"), ("apply", "\"set\"")],
        Less,
        |t| t.said("transactions_max"),
    ),
    Switch {
        beside: Some("batch-transactions"),
        ..Switch::new(
            &[
                ("apply-sessions", "1"),
                ("batch-transactions", "10"),
                ("batch-bytes", "100000"),
                ("apply", "\"set\""),
            ],
            Goes,
            |t| t.said("ahead"),
        )
    },
    Switch::new(&[("delete-by-array", "false")], Goes, |t| t.on_target(" any ($1::integer[])")),
    Switch::new(&[("count-by-server", "false")], Goes, |t| {
        t.on_target("pg_stat_get_xact_tuples_deleted")
    }),
    // Only what is written as a set: a batch that has also what sets cannot do is written in rows.
    Switch::new(&[("set-rows", "0")], Less, |t| {
        let of_big = |line: &&String| line.contains("update only \"public\".\"big\"");
        let is_set = |line: &&String| line.contains("unnest(");
        t.target.iter().filter(of_big).filter(is_set).count() as u64
    }),
    Switch::new(&[("counters-ms", "0")], More, |t| t.on_target("execute walferry_counts:")),
    Switch::new(&[("positions-ms", "0")], More, |t| t.on_target("execute walferry_position:")),
    Switch::new(&[("flush-ms", "0")], More, |t| {
        t.on_target("set local synchronous_commit = local")
    }),
    Switch::new(&[("async-commit", "false")], Goes, |t| {
        t.on_target("set synchronous_commit = off")
    }),
    Switch::new(&[("sort-keys", "false")], Goes, |t| t.in_order),
    Switch::new(&[("ask-ahead", "false")], More, |t| {
        t.on_target("jsonb_array_elements($1::jsonb) w(name)")
    }),
    // Tables that are asked about together have their types in one question all the same.
    Switch {
        beside: Some("ask-ahead"),
        ..Switch::new(&[("keep-types", "false"), ("ask-ahead", "false")], More, |t| {
            t.on_target("with recursive base(own, oid")
        })
    },
    // The last: where all are off, it is in force.
    Switch::new(&[("apply", "\"row\"")], Goes, |t| t.said("as_sets")),
];

/// Row order writes no sets, whose switches then make no difference.
const WITHOUT_SETS: &str = "apply";

/// What a job did, and what shows it.
#[derive(Debug, Default)]
struct Trace {
    /// What both servers were asked.
    source: Vec<String>,
    target: Vec<String>,
    /// The second run's own words.
    said: String,
    /// The kernel may give it huge pages.
    huge_pages: u64,
    /// Rows that one transaction had changed in descending order lie in ascending order.
    in_order: u64,
}

impl Trace {
    fn on_source(&self, what: &str) -> u64 {
        self.source.iter().filter(|line| line.contains(what)).count() as u64
    }

    fn on_target(&self, what: &str) -> u64 {
        self.target.iter().filter(|line| line.contains(what)).count() as u64
    }

    /// Sessions that build indexes and whose commits do not wait for the disk.
    fn builders_that_do_not_wait(&self) -> u64 {
        let of = |what: &str| -> HashSet<&str> {
            let lines = self.target.iter().filter(|line| line.contains(what));
            lines.filter_map(|line| line.split('|').nth(2)).collect()
        };
        let build = of(": CREATE INDEX ");
        build.intersection(&of("set synchronous_commit = off")).count() as u64
    }

    /// Indexes whose building began before the last COPY ended.
    fn indexes_before_the_last_rows(&self) -> u64 {
        let last = self.target.iter().rposition(|line| line.contains("c set state = 'done'"));
        let before = self.target.iter().take(last.unwrap_or_default());
        let is_index = |line: &&String| {
            line.contains(": CREATE INDEX ") || line.contains(": CREATE UNIQUE INDEX ")
        };
        before.filter(is_index).count() as u64
    }

    /// Tables analyzed before the last key was there.
    fn analyzed_before_the_last_key(&self) -> u64 {
        let last = self.target.iter().rposition(|line| line.contains("ADD CONSTRAINT "));
        let before = self.target.iter().take(last.unwrap_or_default());
        before.filter(|line| line.contains("analyze \"")).count() as u64
    }

    /// The largest number that the applier told of `field`.
    fn said(&self, field: &str) -> u64 {
        let told = self.said.lines().filter(|line| line.contains("batches sent to the target"));
        let field = format!("{field}=");
        let numbers = told
            .flat_map(|line| line.split(' '))
            .filter_map(|word| word.strip_prefix(&*field).and_then(|number| number.parse().ok()));
        numbers.max().expect("the applier tells how batches were sent")
    }
}

/// A job with some switches off.
struct Way {
    /// Of the job and of its database.
    name: String,
    off: Vec<&'static Switch>,
}

impl Way {
    /// walferry.toml.
    fn settings(&self) -> String {
        let mut tuning: BTreeMap<&str, &str> = SIZES.iter().copied().collect();
        tuning.extend(self.off.iter().flat_map(|switch| switch.off).copied());
        let apply = tuning.remove("apply").unwrap_or("\"auto\"");
        let lines = tuning.iter().map(|(name, value)| format!("{name} = {value}\n"));
        format!("apply = {apply}\njobs = 1\n[tuning]\n{}", lines.collect::<String>())
    }
}

/// All on, then some off, then all but row order, then everything.
fn ways() -> Vec<Way> {
    let stages = [COPYING, READING, APPLYING];
    // Not every kernel tells.
    let tells = |switch: &&Switch| {
        switch.name() != "huge-pages" || huge_pages(std::process::id()).is_some()
    };
    let all = || stages.iter().copied().flatten().filter(tells);
    let mut ways: Vec<Vec<&Switch>> = vec![Vec::new()];
    if std::env::var("WALFERRY_SWITCHES").is_ok() {
        ways.extend(all().map(|switch| vec![switch]));
    } else {
        let most = stages.iter().map(|stage| stage.len()).max().unwrap();
        let nth = |at| stages.iter().filter_map(move |stage| stage.get(at)).filter(tells);
        ways.extend((0..most).map(|at| nth(at).collect()));
    }
    ways.push(all().filter(|switch| switch.name() != WITHOUT_SETS).collect());
    ways.push(all().collect());
    let named = |(at, off)| Way { name: format!("way{at}"), off };
    ways.into_iter().enumerate().map(named).collect()
}

const TABLES: &str = "create type mood as enum ('low', 'high'); \
    create domain few as int check (value < 1000000); \
    create table k (id int primary key, v text, w text, n numeric(12, 4), at timestamptz, \
        gen text generated always as (upper(v)) stored); \
    alter table k alter w set storage external; \
    create table c (a text, b int, v text, w text, primary key (b, a)); \
    create table ix (id int primary key, v text not null unique, w text); \
    alter table ix replica identity using index ix_v_key; \
    create table u (id int primary key, v text unique deferrable initially deferred, \
        x text unique); \
    create table e (id int primary key, r int4range, exclude using gist (r with &&)); \
    create table f (a int, v text, w text); alter table f replica identity full; \
    create table g (id int generated always as identity primary key, v text); \
    create table p (id int, region text, v text, primary key (id, region)) \
        partition by list (region); \
    create table pa partition of p for values in ('a'); \
    create table pb partition of p for values in ('b'); \
    create table ty (id bigint primary key, m mood, d few, arr int[], j jsonb, b bytea, o boolean, \
        u uuid, x double precision, dt date, ts timestamp, iv interval); \
    create table tr (id int primary key, v text); \
    create table hot (id int primary key, n int); \
    create table descending (id int primary key, n int); \
    create table big (id int primary key, v text, n int); create index on big (n); \
    create table wide (id int primary key, v text); \
    create table mark (id serial primary key);";

const ROWS: &str = "insert into k select i, 'row ' || i, repeat(md5(i::text), i % 2 * 90 + 1), \
        i / 7.0, '2026-01-01'::timestamptz + i * interval '1 hour' from generate_series(1, 400) i; \
    insert into c select 'key ' || i % 7, i, 'v', md5(i::text) from generate_series(1, 200) i; \
    insert into ix select i, 'ix ' || i, null from generate_series(1, 200) i; \
    insert into u select i, 'v' || i, 'x' || i from generate_series(1, 200) i; \
    insert into e select i, int4range(i * 10, i * 10 + 10) from generate_series(1, 60) i; \
    insert into f select i % 20, 'v' || i, null from generate_series(1, 300) i; \
    insert into g (v) select md5(i::text) from generate_series(1, 100) i; \
    insert into p select i, case i % 2 when 0 then 'a' else 'b' end, 'v' \
        from generate_series(1, 200) i; \
    insert into ty select i, (array['low', 'high'])[i % 2 + 1]::mood, i, array[i, null, -i], \
        jsonb_build_object('i', i), decode(md5(i::text), 'hex'), i % 3 = 0, md5(i::text)::uuid, \
        i / 3.0::double precision, '2026-01-01'::date + i, '2026-01-01'::timestamp, '1 day' \
        from generate_series(1, 150) i; \
    insert into tr select i, 'before' from generate_series(1, 100) i; \
    insert into hot select i, 0 from generate_series(1, 50) i; \
    insert into descending select i, 0 from generate_series(1, 200) i; \
    insert into big select i, repeat(md5(i::text), 31), 0 from generate_series(1, 4000) i; \
    insert into wide select i, repeat(md5(i::text), 31) from generate_series(1, 1600) i;";

/// Each line is a transaction, but for what `do` commits by itself.
const BACKLOG: &[&str] = &[
    "do $$ begin for i in 1..500 loop \
        update hot set n = n + 1 where id = i % 50 + 1; \
        insert into k values (1000 + i, 'new ' || i, md5(i::text), -i, null); \
        update k set v = v || '.' where id = i % 400 + 1; \
        if i % 3 = 0 then delete from k where id = 1000 + i - 2; end if; \
        if i % 10 = 0 then update ty set m = 'high', arr = arr || i, x = x * 1.1, d = null \
            where id = i % 150 + 1; end if; \
        commit; end loop; end $$",
    "insert into k select i, 'many', null, 0.5, null from generate_series(5001, 5300) i",
    "delete from k where id between 5100 and 5250",
    "update k set id = id + 20000 where id % 10 = 3 and id < 2000",
    "update k set id = 9999999 where id = 1; update k set id = 1 where id = 2; \
     update k set id = 2 where id = 9999999",
    "update c set b = b + 1000, a = a || '!' where b % 4 = 0; update c set v = 'w' \
     where b % 5 = 0; delete from c where b % 11 = 0",
    "update ix set v = v || 'y', w = 'z' where id % 3 = 0; delete from ix where id % 7 = 0; \
     update ix set id = id + 500 where id % 5 = 0",
    // In set order a unique value would be there twice for a moment, and so would a range. Changes
    // are enough for sets, whatever else is in their batch.
    "update u set x = 'held' where id = 1; update u set x = 'x1' where id = 2; \
     update u set x = 'x2' where id = 1; update u set x = x || 'y' where id > 180; \
     insert into k select i, 'beside', null, 0, null from generate_series(6001, 6100) i",
    "update u set v = 'v4' where id = 3; \
     update u set v = 'v3' where id = 4; delete from u where id > 150; \
     insert into u select i, 'again' || i, 'x' || i from generate_series(151, 180) i",
    "update e set r = '[5000,5010)' where id = 1; update e set r = '[10,20)' where id = 2; \
     update e set r = '[20,30)' where id = 1; \
     update e set r = int4range(lower(r) + 90000, upper(r) + 90000) where id > 40; \
     update hot set n = n + 1; update hot set n = n + 1",
    "update p set region = 'b' where id % 3 = 0 and region = 'a'; update p set v = 'moved' \
     where id % 4 = 0; delete from p where id % 9 = 0; update p set id = id + 300, region = 'a' \
     where id % 10 = 7",
    "update f set v = v || 'x' where a < 5; delete from f where a = 7; update f set w = v \
     where a = 9; insert into f select 9, 'twice', null from generate_series(1, 3)",
    "insert into g (v) select 'new' from generate_series(1, 60); update g set v = v || '!' \
     where id % 2 = 0; delete from g where id % 5 = 0",
    "truncate tr; insert into tr select i, 'after' from generate_series(50, 120) i",
    "do $$ begin for i in reverse 200..1 loop update descending set n = n + 1 where id = i; \
     end loop; end $$",
    "begin; update big set n = n + 1 where id <= 2000; savepoint s; delete from big; \
     rollback to s; insert into big select i, 'new', 0 from generate_series(10001, 10400) i; \
     delete from big where id between 3001 and 3400; update big set id = -id where id between 2001 \
     and 2050; commit",
    "truncate tr, wide; insert into wide values (1, 'all that is left')",
];

/// So many at once, each in a transaction of its own, while jobs follow.
const BURST: &str = "do $$ begin for i in 1..60 loop \
    update hot set n = n + 1 where id = i % 50 + 1; commit; end loop; end $$";

/// Both sides of all jobs.
struct Rig {
    source: Server,
    target: Server,
}

impl Rig {
    fn start() -> Rig {
        let settings = [
            "log_statement = all",
            "log_line_prefix = '%d|%a|%p|'",
            "log_parameter_max_length = 0",
            "log_parameter_max_length_on_error = 0",
            "max_replication_slots = 120",
            "max_wal_senders = 120",
        ];
        let start = || Server::start(&Server::bin_of(15).unwrap(), &settings).unwrap();
        let rig = Rig { source: start(), target: start() };
        rig.source.psql("postgres", "create database app").unwrap();
        rig.source.psql("app", &format!("{TABLES} {ROWS}")).unwrap();
        rig
    }

    fn spawn(&self, way: &Way, more: &[&str]) -> Walferry {
        let config = self.source.dir().join(format!("{}.toml", way.name));
        std::fs::write(&config, way.settings()).unwrap();
        let mut arguments = vec!["-vv", "run", "-c", config.to_str().unwrap(), "--name", &way.name];
        arguments.extend(more);
        let (source, target) = (self.source.uri("app"), self.target.uri(&way.name));
        let variables = [("WALFERRY_SOURCE", &*source), ("WALFERRY_TARGET", &*target)];
        Walferry::spawn_with(&arguments, &variables)
    }

    /// The jobs copy what is there.
    async fn copy(&self, ways: &[Way]) {
        let mut home = session(&self.target, "postgres").await;
        for way in ways {
            home.execute(&format!("create database {}", way.name)).await.unwrap();
        }
        let copies: Vec<Walferry> =
            ways.iter().map(|way| self.spawn(way, &["--until", "copied"])).collect();
        for copy in copies {
            copy.ended().await.expect_success();
        }
    }

    /// The jobs go on behind the backlog and follow what comes, and both sides are compared.
    async fn follow(&self, ways: &[Way]) -> Vec<Trace> {
        let runs: Vec<Walferry> = ways.iter().map(|way| self.spawn(way, &[])).collect();
        let mut targets = Vec::new();
        for way in ways {
            targets.push(session(&self.target, &way.name).await);
        }
        for nth in 0..8 {
            if nth > 0 {
                self.source.psql("app", BURST).unwrap();
            }
            let mark = "insert into mark default values returning id";
            let mark = self.source.psql("app", mark).unwrap();
            let is_there = format!("select exists (select from public.mark where id = {mark})");
            for (target, run) in targets.iter_mut().zip(&runs) {
                let begun = Instant::now();
                while !target.query_one(&is_there, &[]).await.unwrap().bool(0).unwrap() {
                    assert!(begun.elapsed() < PATIENCE, "no mark {mark}:\n{}", run.so_far());
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            }
        }
        let mut traces = Vec::new();
        for run in runs {
            let huge_pages = huge_pages(run.pid().unwrap()).unwrap_or_default();
            run.signal("INT");
            let Ended { out, err, .. } = run.ended().await.expect_success();
            traces.push(Trace { said: format!("{out}\n{err}"), huge_pages, ..Trace::default() });
        }
        for ((way, target), trace) in ways.iter().zip(&mut targets).zip(&mut traces) {
            self.assert_exact(way, target).await;
            let order = "select bool_and(id > before)::int from (select id, \
                lag(id, 1, 0) over (order by ctid) as before from public.descending) d";
            trace.in_order = target.query_one(order, &[]).await.unwrap().parse(0).unwrap();
        }
        traces
    }

    /// Rows are equal, and what was decoded is what was applied.
    async fn assert_exact(&self, way: &Way, target: &mut Session) {
        let (source_uri, target_uri) = (self.source.uri("app"), self.target.uri(&way.name));
        let comparison = compare(&source_uri, &target_uri).await.unwrap();
        let rows = comparison.differences.iter().filter(|line| !line.starts_with("sequence "));
        let none = Vec::<&String>::new();
        assert_eq!(rows.collect::<Vec<_>>(), none, "{}:\n{}", way.name, way.settings());
        assert!(comparison.rows() > 5000, "{}", comparison.rows());
        let books = format!(
            "select bool_and(decoded = applied and filtered = 0), sum(applied) > 5000 \
             from ({BOOKS}) as b where schema = 'public'"
        );
        let stream = format!("walferry_{}_forward", way.name);
        let row = target.query_one(&books, &[Some(&stream)]).await.unwrap();
        assert_eq!((row.str(0).unwrap(), row.str(1).unwrap()), ("t", "t"), "{}", way.name);
    }
}

/// What a server was asked, by the column of its log's prefix that tells by which job.
fn asked(server: &Server, column: usize) -> HashMap<String, Vec<String>> {
    let mut asked = HashMap::<String, Vec<String>>::new();
    let mut by = String::new();
    for line in server.log().lines() {
        let continued = line.strip_prefix('\t');
        if continued.is_none() {
            by = line.split('|').nth(column).unwrap_or_default().to_string();
        }
        let lines = asked.entry(by.clone()).or_default();
        match (continued, lines.last_mut()) {
            (Some(more), Some(last)) => last.push_str(more),
            _ => lines.push(line.to_string()),
        }
    }
    asked
}

/// 1 if the kernel may give the process huge pages; nothing where it does not tell.
fn huge_pages(pid: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("THP_enabled:"))?;
    line.trim().parse().ok()
}

/// Each option of `[tuning]` is turned off here, or has its reason not to be, and is in the list of
/// switches for people.
fn none_is_left_out() {
    let said = toml::from_str::<walferry::config::File>("tuning.x = 1").unwrap_err().to_string();
    let keys = said.split('`').skip(3).step_by(2);
    let list = include_str!("../../bench/README.md");
    let switches = || [COPYING, READING, APPLYING].into_iter().flatten().flat_map(|s| s.off);
    for key in keys {
        let elsewhere = ["bulk-transaction-bytes", "bulk-message-bytes"].contains(&key);
        let is_off = elsewhere || switches().any(|(name, _)| *name == key);
        assert!(is_off, "{key} is never turned off");
        assert!(list.contains(&format!("| `{key}")), "{key} is not in the list of bench/README.md");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_optimisation_off_leaves_the_same_rows() {
    none_is_left_out();
    let begun = Instant::now();
    let (rig, ways) = (Rig::start(), ways());
    for ways in ways.chunks(AT_ONCE) {
        rig.copy(ways).await;
    }
    println!("{} copies after {:.1} s", ways.len(), begun.elapsed().as_secs_f64());
    for transaction in BACKLOG {
        rig.source.psql("app", transaction).unwrap();
    }
    let mut traces = Vec::new();
    for ways in ways.chunks(AT_ONCE) {
        traces.append(&mut rig.follow(ways).await);
    }
    println!("all have followed after {:.1} s", begun.elapsed().as_secs_f64());
    let (mut by_job, mut by_database) = (asked(&rig.source, 1), asked(&rig.target, 0));
    for (way, trace) in ways.iter().zip(&mut traces) {
        trace.source = by_job.remove(&format!("walferry run {}", way.name)).unwrap();
        trace.target = by_database.remove(&way.name).unwrap();
    }
    let off_in = |name: &str| {
        let place = ways.iter().position(|way| way.off.iter().any(|s| s.name() == name));
        &traces[place.unwrap()]
    };
    let [.., all_but_rows, all] = traces.as_slice() else { panic!("two at least") };
    for (way, trace) in ways.iter().zip(&traces).take(ways.len() - 2) {
        for switch in &way.off {
            let on = switch.beside.map_or(&traces[0], off_in);
            println!("{}: {} -> {}", switch.name(), (switch.path)(on), (switch.path)(trace));
            switch.assert_is_off(on, trace);
        }
    }
    // What sets break is written in row order, with all on as with all off.
    let fell_back = |trace: &Trace| trace.on_target("execute walferry_fallback:");
    assert!(fell_back(&traces[0]) > 0 && fell_back(all_but_rows) > 0 && fell_back(all) == 0);
    assert!(all_but_rows.said("as_sets") > 0 && all.said("as_sets") == 0);
    println!("{} ways in {:.1} s", ways.len(), begun.elapsed().as_secs_f64());
}
