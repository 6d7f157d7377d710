//! Indexes built while rows are copied: with it, without it, and over whatever ends one of both.

use std::path::PathBuf;
use std::time::Duration;

use walferry::pg::Session;

use crate::support::job::Ends;
use crate::support::walk::{hold, let_go};
use crate::support::{Walferry, session, until_sql};

/// Copied in this order, largest first: `large`, a partition, `late`, `after`, and the small one.
const TABLES: &str = "create function public.slow(int) returns int immutable language plpgsql as \
        $$ begin perform pg_catalog.pg_advisory_xact_lock_shared(2); return $1; end $$; \
    create table public.large (id int primary key, n int, v text); \
    create index large_slow on public.large (public.slow(n)); \
    create table public.p (id int primary key, v text) partition by range (id); \
    create table public.p1 partition of public.p for values from (0) to (1000000); \
    create index on public.p (v); \
    create table public.late (id int primary key, v text); \
    create table public.after (id int primary key, v text unique); \
    create table public.few (id int primary key, v text unique); \
    insert into public.large select i, i, repeat(md5(i::text), 5) from generate_series(1, 40000) i; \
    insert into public.p select i, repeat(md5(i::text), 5) from generate_series(1, 20000) i; \
    insert into public.late select i, repeat(md5(i::text), 5) from generate_series(1, 10000) i; \
    insert into public.after select i, repeat(md5(i::text), 5) from generate_series(1, 8000) i; \
    insert into public.few select i, 'few ' || i from generate_series(1, 10) i";

/// All that is said of indexes and constraints.
const INDEXES: &str = "select string_agg(d, E'\\n' order by d) from ( \
    select pg_get_indexdef(i.indexrelid) || i.indisvalid || i.indisprimary as d from pg_index i \
      join pg_class c on c.oid = i.indrelid where c.relnamespace = 'public'::regnamespace \
    union all select conrelid::regclass || ' ' || conname || ' ' || pg_get_constraintdef(oid) \
      from pg_constraint where connamespace = 'public'::regnamespace) i";

/// A job whose copy ends when it is let, and whose index `large_slow` is built when it is let.
struct Held {
    ends: Ends,
    settings: PathBuf,
    /// Holds what is waited for.
    blocker: Session,
    target: Session,
}

impl Drop for Held {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.settings);
    }
}

impl Held {
    /// The run comes to the last row of `late`, and no further; `locks` of 1 and 2 are held.
    async fn start(tuning: &str, locks: &[u32]) -> (Held, Walferry) {
        let ends = Ends::start(15, 15);
        ends.source.psql("app", TABLES).unwrap();
        let name = format!("walferry-building-{:016x}.toml", fastrand::u64(..));
        let settings = std::env::temp_dir().join(name);
        std::fs::write(&settings, format!("jobs = 1\n[tuning]\n{tuning}\n")).unwrap();
        let (mut blocker, target) =
            (session(&ends.target, "app").await, session(&ends.target, "app").await);
        for lock in locks {
            blocker.execute(&format!("select pg_advisory_lock({lock})")).await.unwrap();
        }
        let mut held = Held { ends, settings, blocker, target };
        // Until this is let go there is no slot; the job's tables are there by then.
        hold(&held.ends.source, "slot", "insert into public.few values (0, 'few 0')");
        let run = held.run();
        let there = "select to_regclass('walferry.table_copy') is not null";
        until_sql(&mut held.target, there).await;
        let waits = "create function walferry.wait() returns trigger language plpgsql as $$ begin \
               perform pg_catalog.pg_advisory_xact_lock_shared(1); return new; end $$; \
             create trigger wait before update on walferry.table_copy for each row \
               when (new.name = 'late' and new.state = 'done') execute function walferry.wait(); \
             alter table walferry.table_copy enable always trigger wait";
        held.target.execute(waits).await.unwrap();
        let_go(&held.ends.source, "slot");
        held.waits_for(1).await;
        (held, run)
    }

    fn run(&self) -> Walferry {
        self.ends.spawn(&["run", "--config", self.settings.to_str().unwrap()])
    }

    /// Somebody waits for the lock.
    async fn waits_for(&mut self, lock: u32) {
        let waits = format!(
            "select exists (select from pg_locks where locktype = 'advisory' and objid = {lock} \
             and classid = 0 and not granted)"
        );
        until_sql(&mut self.target, &waits).await;
    }

    async fn unlock(&mut self, lock: u32) {
        self.blocker.execute(&format!("select pg_advisory_unlock({lock})")).await.unwrap();
    }

    fn on_target(&self, sql: &str) -> String {
        self.ends.target.psql("app", sql).unwrap()
    }

    /// Indexes, and those that are constraints, of what was copied before.
    fn built(&self) -> String {
        self.on_target(
            "select count(*), count(k.oid) from pg_index i \
             left join pg_constraint k on k.conindid = i.indexrelid \
             where i.indrelid in ('public.large'::regclass, 'public.p1'::regclass)",
        )
    }

    /// To the end: both sides are equal in rows, indexes and constraints.
    async fn assert_exact(&self, mut run: Walferry) {
        self.ends.until_phase(&mut run, "following").await;
        self.ends.done(&["verify"]).await;
        assert_eq!(self.on_target(INDEXES), self.ends.source.psql("app", INDEXES).unwrap());
        let plain = "select count(*) from pg_stats where schemaname = 'public' \
                     and tablename in ('large', 'p', 'p1', 'late', 'after', 'few') \
                     and attname = 'id'";
        assert_eq!(self.on_target(plain), "6", "tables with statistics");
        self.ends.done(&["cancel"]).await;
        run.ended().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn indexes_are_built_beside_the_copy_or_after_it_and_are_the_same() {
    for (tuning, built) in [
        ("indexes-beside-copy = true", "4|0"),
        ("indexes-beside-copy = true\nanalyze-beside = false", "4|0"),
        ("indexes-beside-copy = false", "0|0"),
    ] {
        let (mut held, run) = Held::start(tuning, &[1]).await;
        if built == "4|0" {
            // All of both tables, constraints later.
            let all = "select count(*) = 4 from pg_index \
                 where indrelid in ('public.large'::regclass, 'public.p1'::regclass)";
            until_sql(&mut held.target, all).await;
        }
        let analyzed = "select count(*) > 0 from pg_stats where tablename = 'large'";
        if tuning == "indexes-beside-copy = true" {
            until_sql(&mut held.target, analyzed).await;
        } else {
            tokio::time::sleep(Duration::from_millis(500)).await;
            assert_eq!(held.on_target(analyzed), "f", "{tuning}");
        }
        assert_eq!(held.built(), built, "{tuning}");
        let others = "select count(*) from pg_index i join pg_class c on c.oid = i.indrelid \
             where c.relname in ('p', 'late', 'after', 'few')";
        assert_eq!(held.on_target(others), "0", "{tuning}");
        held.unlock(1).await;
        held.assert_exact(run).await;
    }
}

/// A run that is killed while it copies and builds, then one whose snapshot is lost: what was there
/// stays, what was under way comes again, and the index goes on.
#[tokio::test(flavor = "multi_thread")]
async fn a_kill_and_a_lost_snapshot_while_an_index_is_built_beside_the_copy() {
    let (mut held, run) = Held::start("indexes-beside-copy = true", &[1, 2]).await;
    held.waits_for(2).await;
    let copied = "select string_agg(name || done_at, ' ' order by name) from walferry.table_copy \
                  where state = 'done' and name in ('large', 'p1')";
    let (before, steps) = (held.on_target(copied), "select id from walferry.schema_step");
    let steps_before = held.on_target(steps);
    let waiting = "select pid from pg_stat_activity where wait_event = 'advisory' \
                   and application_name like 'walferry run%'";
    let killed = held.on_target(waiting).replace('\n', ", ");
    run.kill9().await;
    // What changes now is not in the rows that were read before, and in those read from now on.
    let change = "update public.large set n = -n where id % 3 = 0; \
                  update public.late set v = v || '!' where id % 3 = 0";
    held.ends.source.psql("app", change).unwrap();

    let mut run = held.run();
    let both =
        format!("select count(*) = 2 and bool_and(pid not in ({killed})) from ({waiting}) waiting");
    until_sql(&mut held.target, &both).await;
    assert_eq!(held.on_target(copied), before, "a table that was there is copied again");
    for step in steps_before.lines() {
        assert!(held.on_target(steps).lines().any(|line| line == step), "{step}");
    }

    let builds = "select pid from pg_stat_activity where wait_event = 'advisory' \
                  and query ~* 'create index large_slow'";
    let builder = held.on_target(builds);
    assert_ne!(builder, "");
    let lose = "select count(pg_terminate_backend(pid)) from pg_stat_activity \
                where application_name like 'walferry run%' and state like 'idle in transaction%'";
    let lost = held.ends.source.psql("app", lose).unwrap();
    assert_eq!(lost, "2", "the snapshot's holder, and who reads under it");
    held.ends.source.psql("app", change).unwrap();
    held.unlock(1).await;
    run.says("copying goes on under a fresh one").await;
    let all = "select bool_and(state = 'done') from walferry.table_copy";
    until_sql(&mut held.target, all).await;
    assert_eq!(held.on_target(builds), builder, "the index is built on");
    assert_eq!(held.on_target(copied), before, "a table that was there is copied again");
    held.unlock(2).await;
    held.assert_exact(run).await;
}

/// What one side is refused ends the other, and is told as it is.
#[tokio::test(flavor = "multi_thread")]
async fn a_refused_row_cancels_an_index_and_a_refused_index_the_copy() {
    let (mut held, run) = Held::start("indexes-beside-copy = true", &[1, 2]).await;
    held.waits_for(2).await;
    let refuse = "alter table public.after add constraint few check (id < 5)";
    held.target.execute(refuse).await.unwrap();
    held.unlock(1).await;
    let ended = run.ended().await;
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(ended.err.contains("table public.after") && ended.err.contains("\"few\""), "{ended:?}");
    // The lock that is waited for there is still held.
    let canceled = "select count(*) = 0 from pg_stat_activity where query ~* 'large_slow' \
                    and application_name like 'walferry run%'";
    until_sql(&mut held.target, canceled).await;
    held.target.execute("alter table public.after drop constraint few").await.unwrap();

    // `late` waits again, with other rows; an index that cannot be made ends that.
    let again = "update walferry.table_copy set state = 'todo', begun_at = now() \
                 where name = 'late'; create or replace function public.slow(int) returns int \
                 immutable language plpgsql as $$ begin raise exception 'not now'; end $$; \
                 select pg_advisory_unlock_all()";
    held.blocker.execute("select pg_advisory_lock(1)").await.unwrap();
    held.target.execute(again).await.unwrap();
    let ended = held.run().ended().await;
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(ended.err.contains("not now") && ended.err.contains("large_slow"), "{ended:?}");
    let late = "select string_agg(state, '') from walferry.table_copy where name = 'late'";
    assert_eq!(held.on_target(late), "todo");
    let mend = "create or replace function public.slow(int) returns int immutable \
                language sql as 'select $1'";
    held.target.execute(mend).await.unwrap();
    held.unlock(1).await;
    held.unlock(2).await;
    let run = held.run();
    held.assert_exact(run).await;
}
