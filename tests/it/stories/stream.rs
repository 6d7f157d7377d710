//! Large, long, interleaved and refused transactions, and streams that fall behind.

use std::time::Duration;

use super::*;
use crate::support::{until, until_within};

const ROWS: &str = "create table row_of (id int primary key, v text); \
    insert into row_of select i, 'row ' || i from generate_series(1, 100) i";

/// The body of a large transaction was cut off.
#[tokio::test(flavor = "multi_thread")]
async fn pgcopydb_495_large_transactions_are_whole() {
    told(
        "pgcopydb_495",
        ROWS,
        "begin; insert into row_of select i, repeat(md5(i::text), 20) \
             from generate_series(1000, 40000) i; update row_of set v = v || '!' where id % 7 = 0; \
         delete from row_of where id % 5 = 0; \
         insert into row_of values (-1, repeat('long ', 4000000)); commit",
        "begin; update row_of set v = reverse(v) where id > 1000; delete from row_of where id < \
            50; \
         commit",
    )
    .await;
}

/// Transactions that run beside each other were told apart by file, and resumed wrongly. Killed
/// while they are open and while they come over, the run goes on from where the target is.
#[tokio::test(flavor = "multi_thread")]
async fn pgcopydb_394_interleaved_transactions_survive_kills() {
    let story = Story::copied("pgcopydb_394", ROWS).await;
    let mut writers = Vec::new();
    for _ in 0..3 {
        writers.push(session(story.source, &story.name).await);
    }
    for round in 0..4 {
        let run = story.spawn(&["run"]);
        for writer in &mut writers {
            writer.execute("begin").await.unwrap();
        }
        for step in 0..40 {
            for (i, writer) in writers.iter_mut().enumerate() {
                let id = 10_000 + (round * 3 + i) * 1000 + step;
                let sql = format!(
                    "insert into public.row_of values ({id}, repeat('x', 900)); \
                    update public.row_of set v = v || '{i}' where id = {id} - {step} % 3"
                );
                writer.execute(&sql).await.unwrap();
            }
        }
        let ends = if round == 2 { ["commit", "rollback", "commit"] } else { ["commit"; 3] };
        for (writer, end) in writers.iter_mut().zip(ends) {
            writer.execute(end).await.unwrap();
        }
        run.kill9_after(Duration::from_millis(fastrand::u64(100..900))).await;
    }
    story.follows("").await;
    assert_eq!(story.target("select count(*) from row_of where id >= 10000"), "440");
}

/// What a savepoint took back came over.
#[tokio::test(flavor = "multi_thread")]
async fn pgcopydb_555_savepoints_rolled_back_stay_away() {
    told(
        "pgcopydb_555",
        ROWS,
        "begin; insert into row_of values (200, 'kept'); savepoint a; \
         insert into row_of values (201, 'gone'); update row_of set v = 'gone' where id = 200; \
         savepoint b; delete from row_of; rollback to b; release b; rollback to a; \
         update row_of set v = 'kept too' where id = 1; commit; \
         begin; truncate row_of; rollback; \
         begin; savepoint c; insert into row_of select i, 'gone' from generate_series(300, 9000) \
             i; \
         rollback to c; insert into row_of values (300, 'kept'); commit",
        "do $$ begin for i in 1..300 loop begin insert into public.row_of values (i, 'again'); \
            exception when unique_violation then \
               update public.row_of set v = v || '+' where id = i; end; end loop; end $$",
    )
    .await;
}

/// The same, taken up again in the middle: a transaction of before the stop, and its savepoints.
#[tokio::test(flavor = "multi_thread")]
async fn pgcopydb_682_a_transaction_open_across_a_restart_comes_once() {
    let story = Story::copied("pgcopydb_682", ROWS).await;
    let mut open = session(story.source, &story.name).await;
    open.execute("set search_path = public; begin; insert into row_of values (500, 'early')")
        .await
        .unwrap();
    story.follows("update row_of set v = 'between' where id = 2").await;
    open.execute(
        "savepoint s; update row_of set v = 'gone' where id = 500; rollback to s; \
        update row_of set v = 'late' where id = 3",
    )
    .await
    .unwrap();
    let mut run = story.spawn(&["run"]);
    story.arrived(&mut run).await;
    open.execute("delete from row_of where id = 4; commit").await.unwrap();
    story.arrived(&mut run).await;
    story.same().await;
    assert_eq!(story.target("select v from row_of where id = 500"), "early");
    run.signal("INT");
    run.ended().await.expect_success();
}

/// A decoder that holds a transaction whole grows with it. The most that `run` ever held stays
/// below what one transaction writes.
#[tokio::test(flavor = "multi_thread")]
async fn posthog_65908_memory_does_not_grow_with_a_transaction() {
    let story = Story::copied("posthog_65908", ROWS).await;
    story.source(
        "insert into row_of select i, repeat(md5(i::text), 120) \
        from generate_series(1000, 180000) i",
    );
    assert_eq!(story.source("select sum(length(v)) > 680000000 from row_of"), "t");
    let mut run = story.spawn(&["run"]);
    story.arrived(&mut run).await;
    let peak_kb = peak_memory_kb(&run);
    assert!(peak_kb < 450_000, "{peak_kb} kB at its most");
    run.signal("INT");
    run.ended().await.expect_success();
    story.same().await;
}

/// Updates of very many rows ended for want of memory, and again after every restart.
#[tokio::test(flavor = "multi_thread")]
async fn pglogical_169_updates_of_all_rows_fit_in_memory() {
    let story = Story::copied(
        "pglogical_169",
        "create table row_of (id int primary key, v text); \
         insert into row_of select i, 'v' from generate_series(1, 20000) i",
    )
    .await;
    // Three times 230 MB as the stream carries them, of which TOAST makes little on disk.
    story.source(
        "do $$ begin for i in 1..3 loop \
        update public.row_of set v = repeat(i::text, 11500), id = -id; end loop; end $$",
    );
    let mut run = story.spawn(&["run"]);
    story.arrived(&mut run).await;
    let peak_kb = peak_memory_kb(&run);
    assert!(peak_kb < 450_000, "{peak_kb} kB at its most");
    run.signal("INT");
    run.ended().await.expect_success();
    story.same().await;
}

/// The most memory that a living run ever had.
fn peak_memory_kb(run: &Walferry) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", run.pid().unwrap())).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// One transaction that the target refuses, and the next one, which was healthy, went with it.
#[tokio::test(flavor = "multi_thread")]
async fn spock_580_a_refused_transaction_takes_no_other_along() {
    let story = Story::copied("spock_580", ROWS).await;
    story.target("alter table row_of add constraint short check (length(v) < 20)");
    story.source("insert into row_of values (200, 'before')");
    story.source(
        "begin; insert into row_of values (201, repeat('x', 30)); \
        update row_of set v = 'with it' where id = 1; commit",
    );
    story.source("insert into row_of values (202, 'after'); delete from row_of where id = 2");
    for _ in 0..2 {
        let ended = story.spawn(&["run"]).ended().await;
        assert_eq!(ended.code, Some(1), "{}", ended.err);
        assert!(ended.err.contains("(201)") && ended.err.contains("short"), "{}", ended.err);
    }
    assert_eq!(story.target("select count(*) from row_of where id > 200 or v = 'with it'"), "0");
    story.target("alter table row_of drop constraint short");
    story.follows("insert into row_of values (203, 'live')").await;
    assert_eq!(story.target("select count(*) from row_of where id >= 200"), "4");
}

/// A lock that somebody holds on a table of the source ended the whole copy.
#[tokio::test(flavor = "multi_thread")]
async fn pgcopydb_875_a_locked_table_delays_the_copy_and_does_not_end_it() {
    let story = Story::of(
        "pgcopydb_875",
        &format!(
            "{ROWS}; create table other (id int primary key); \
        insert into other select i from generate_series(1, 5000) i"
        ),
    );
    let mut run = story.spawn(&["run", "--until", "following"]);
    // As soon as the slot is there the schema is dumped; the copy is what waits.
    let slot = format!(
        "select exists (select from pg_replication_slots where database = '{}' \
        and not temporary and confirmed_flush_lsn is not null)",
        story.name
    );
    until_within(Duration::from_secs(30), "a slot", || async { story.source(&slot) == "t" }).await;
    let mut holder = session(story.source, &story.name).await;
    holder.execute("begin; lock table public.row_of in access exclusive mode").await.unwrap();
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert!(!run.has_ended(), "{}", run.so_far());
    holder
        .execute("insert into public.row_of values (900, 'under the lock'); commit")
        .await
        .unwrap();
    run.ended().await.expect_success();
    story.follows("update row_of set v = 'x' where id = 900").await;
}

/// Statements prepared once met a table that had changed since: on the target, where a column
/// grows, one is added, an index goes.
#[tokio::test(flavor = "multi_thread")]
async fn pgbouncer_1038_a_schema_changed_under_prepared_statements() {
    let story =
        Story::copied("pgbouncer_1038", "create table n (id int primary key, v int, w text)").await;
    let mut run = story.spawn(&["run"]);
    story.source("insert into n values (1, 1, 'a'); update n set v = 2 where id = 1");
    story.arrived(&mut run).await;
    story.target(
        "alter table n alter v type bigint; alter table n add extra int default 5; \
        alter table n alter id type bigint",
    );
    story.source(
        "insert into n values (2, 2147483647, 'b'); update n set v = -1 where id = 1; \
        delete from n where id = 2; insert into n values (3, 3, null)",
    );
    story.arrived(&mut run).await;
    story.source("alter table n alter v type bigint; alter table n alter id type bigint");
    story.source(
        "insert into n values (30000000000, 30000000000, 'c'); \
        update n set v = 50000000000 where id = 1; delete from n where id = 3",
    );
    story.arrived(&mut run).await;
    assert_eq!(
        story.target(
            "select string_agg(concat_ws('/', id, v, w, extra), ' ' order by id) \
        from n"
        ),
        "1/50000000000/a/5 30000000000/30000000000/c/5"
    );
    story.target("alter table n drop extra");
    story.same().await;
    run.signal("INT");
    run.ended().await.expect_success();
}

/// Helpers that are idle for long were ended by idle_session_timeout, and the work with them.
#[tokio::test(flavor = "multi_thread")]
async fn peerdb_4589_timeouts_of_idle_sessions_end_nothing() {
    let story = Story::of("peerdb_4589", ROWS);
    for server in [story.source, story.target] {
        for name in ["idle_session_timeout", "idle_in_transaction_session_timeout"] {
            let sql = format!("alter database {} set {name} = '150ms'", story.name);
            server.psql("postgres", &sql).unwrap();
        }
    }
    let mut run = story.spawn(&["run"]);
    run.says("following").await;
    tokio::time::sleep(Duration::from_millis(800)).await;
    story.source("update row_of set v = 'after idleness' where id = 1");
    story.arrived(&mut run).await;
    story.done(&["verify"]).await;
    // That the settings are not carried is told, by their names.
    let said = run.so_far();
    let ended =
        |line: &&str| line.contains("timeout") && !line.starts_with("warning: source: setting");
    assert_eq!(said.lines().find(ended), None, "{said}");
    story.same().await;
    run.signal("INT");
    run.ended().await.expect_success();
}

/// A decoder or a target that cannot keep pace (wal2json#124, pglogical#162) fell behind unseen.
/// The lag is in status, grows while it grows, and is gone when it is caught up.
#[tokio::test(flavor = "multi_thread")]
async fn wal2json_124_a_stream_that_falls_behind_is_seen_to() {
    let story = Story::copied("wal2json_124", ROWS).await;
    let mut run = story.spawn(&["run"]);
    story.arrived(&mut run).await;
    let mut holder = session(story.target, &story.name).await;
    holder.execute("begin; lock table public.row_of in exclusive mode").await.unwrap();
    let last = std::cell::Cell::new(0);
    for step in 0..3 {
        story.source(&format!(
            "insert into row_of select i, repeat('x', 500) \
            from generate_series({}, {}) i",
            1000 + step * 1000,
            1999 + step * 1000
        ));
        let before = last.get();
        until("the lag grows", async || {
            let status = story.done(&["status", "--json"]).await.json();
            last.set(status["lag_bytes"].as_i64().unwrap());
            let seconds = status["lag_seconds"].as_f64().unwrap();
            last.get() > before + 400_000 && seconds > 0.5 + f64::from(step)
        })
        .await;
    }
    let ended = story.spawn(&["cutover", "--timeout", "3s"]).ended().await;
    assert_eq!(ended.code, Some(1), "{}", ended.out);
    assert!(ended.err.contains("behind"), "{}", ended.err);
    holder.execute("rollback").await.unwrap();
    story.arrived(&mut run).await;
    until("the lag is gone", async || {
        let status = story.done(&["status", "--json"]).await.json();
        status["lag_seconds"].as_f64().unwrap() < 0.5
            && status["lag_bytes"].as_i64().unwrap() < 100_000
    })
    .await;
    story.same().await;
    run.signal("INT");
    run.ended().await.expect_success();
}
