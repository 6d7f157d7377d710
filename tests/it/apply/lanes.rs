//! Two sessions that write: what one begins while the other works ends as if one had done it all.

use std::time::Instant;

use walferry::apply::OnRowError;
use walferry::id::{JobName, Stream};

use super::sets::fallbacks;
use super::*;

/// Batches of so many transactions, as sets, in both sessions.
fn beside(transactions: usize) -> Options {
    tuned(Mode::Sets, Some(Limits { bytes: 1 << 20, transactions }))
}

#[tokio::test]
async fn batches_begun_ahead_are_committed_in_the_order_of_the_stream() {
    let (server, mut session) = target(
        "create table public.a (id int primary key, v int); create table public.log (id int); \
         create table public.hot (id int primary key, n int); \
         create table public.t (k text, n int, primary key (k, n)); \
         insert into public.hot values (1, 0), (2, 0);",
    )
    .await;
    let (a, log) = (table("a", ByKey, &["id*", "v"]), table("log", Nothing, &["id"]));
    let (hot, t) = (table("hot", ByKey, &["id*", "n"]), table("t", ByKey, &["k*", "n*"]));
    const LAST: u64 = 3000;
    let each = |n: u64| {
        let (id, odd) = (n.to_string(), (n % 2 + 1).to_string());
        let mut changes = vec![a.insert(&[&id, "0"]), log.insert(&[&id]), t.insert(&["x", &id])];
        changes.push(hot.update(&[&odd, &id]));
        if n > 100 {
            // Some of a batch that is under way, some of one that has landed.
            let (near, far) = ((n - 7).to_string(), (n - 100).to_string());
            changes.extend([a.update(&[&near, &id]), t.delete(&["x", &far])]);
        }
        transaction(n * 100, changes)
    };
    let slot = "select pg_create_logical_replication_slot('back', 'test_decoding')";
    session.query(slot).await.unwrap();
    let reader = support::session(&server, "postgres").await;
    let (stop, stopped) = watch::channel(false);
    let looking = tokio::spawn(look(reader, stopped));
    let applied = apply_with(&server, beside(20), (1..=LAST).map(each).collect()).await.unwrap();
    stop.send(true).unwrap();
    let seen = looking.await.unwrap();
    println!("{} ahead of 150 batches, {seen} states seen", applied.ahead);
    assert!(applied.ahead > 50 && seen > 10, "{} ahead, {seen} seen", applied.ahead);
    assert_eq!((applied.fallbacks, applied.transactions), (0, LAST));
    let sums = "select (select count(*) from public.log), (select count(*) from public.t), \
         (select sum(n) from public.hot), (select count(*) from public.a where v = id + 7)";
    let hot = LAST + LAST - 1;
    let wanted = format!("{LAST}|100|{hot}|{}", LAST - 100);
    assert_eq!(rows(&mut session, sums).await, wanted);
    assert_eq!(counts(&mut session, "a").await, format!("{}/0", LAST + LAST - 100));
    // The way back can tell the rows of both sessions from an application's.
    let decoded = "select count(*) > 10000, count(*) filter (where data like 'table public.%') \
         from pg_logical_slot_peek_changes('back', null, null";
    let [all, local] = ["", ", 'only-local', '1'"].map(|option| format!("{decoded}{option})"));
    assert!(rows(&mut session, &all).await.starts_with("t|"));
    assert_eq!(rows(&mut session, &local).await, "f|0");
    session.query("select pg_drop_replication_slot('back')").await.unwrap();
    let origins = "select string_agg(roname, ' ' order by roname) from pg_replication_origin";
    let both = "test".parse::<JobName>().unwrap().origins(Stream::Forward).join(" ");
    assert_eq!(rows(&mut session, origins).await, both);
    // And both go with the stream, once their sessions have.
    let begun = Instant::now();
    while let Err(error) = walferry::apply::forget(&mut session, STREAM).await {
        assert!(begun.elapsed().as_secs() < 10, "{error}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(rows(&mut session, origins).await, "-");
}

/// Looks at states of the target until told to stop: of transactions 1 to n each has all it wrote,
/// and no later one anything. Gives how many there were.
async fn look(mut session: Session, stopped: watch::Receiver<bool>) -> usize {
    let sql = "select (select count(*) from public.a), (select coalesce(max(id), 0) from public.a), \
         (select count(*) from public.log), (select greatest(max(n), 0) from public.hot), \
         (select coalesce(max(n), 0) from public.t)";
    let mut seen = std::collections::HashSet::new();
    while !*stopped.borrow() {
        let row = session.query_one(sql, &[]).await.unwrap();
        let found: Vec<&str> = (0..5).map(|at| row.str(at).unwrap()).collect();
        assert!(
            found.iter().all(|number| *number == found[0]),
            "no state of the source: {found:?}"
        );
        seen.insert(found[0].to_string());
    }
    seen.len()
}

/// Both sessions write at once where the source is known to have nothing left to do.
#[tokio::test]
async fn a_target_that_alone_is_waited_for_has_both_sessions_at_once() {
    let (server, mut session) = target(
        "create function public.slow(int) returns boolean language plpgsql as \
         $$ begin if $1 % 1000 = 0 then perform pg_sleep(0.025); end if; return true; end $$; \
         create table public.s (id int primary key check (public.slow(id)));",
    )
    .await;
    let s = table("s", ByKey, &["id*"]);
    let batch = |at: u64| {
        let rows = at * 2500..(at + 1) * 2500;
        transaction(at * 100 + 100, rows.map(|id| s.insert(&[&id.to_string()])).collect())
    };
    for all_read in [false, true] {
        session.execute("truncate public.s").await.unwrap();
        let options = tuned(Mode::Auto, Some(Limits { bytes: 8 << 20, transactions: 1 }));
        options.all_read.set(all_read);
        let begun = Instant::now();
        // The stream of the second round begins behind the first.
        let first = if all_read { 8 } else { 0 };
        let items = (first..first + 8).map(batch).collect();
        let applied = apply_with(&server, options, items).await.unwrap();
        println!("all read {all_read}: {} ahead, {:?}", applied.ahead, begun.elapsed());
        match all_read {
            true => assert!(applied.ahead > 0),
            // On a machine that slow the target was behind for long.
            false => assert!(applied.ahead == 0 || begun.elapsed() > Duration::from_secs(1)),
        }
        assert_eq!(rows(&mut session, "select count(*) from public.s").await, "20000");
    }
}

#[tokio::test]
async fn what_is_begun_ahead_gives_way_to_a_batch_that_waits_for_its_locks() {
    let (server, mut session) = target(
        "create function public.slow(int) returns boolean language plpgsql as \
         $$ begin perform pg_sleep(0.02); return true; end $$; \
         create table public.a (id int primary key, v int); \
         create table public.s (id int primary key check (public.slow(id)));",
    )
    .await;
    let (a, s) = (table("a", ByKey, &["id*", "v"]), table("s", ByKey, &["id*"]));
    // The first batch opens the session, the second is slow before it comes to `a`, where the third
    // has been by then.
    let row = |id: u64| id.to_string();
    let mut items = Vec::new();
    for at in 1..=3u64 {
        items.push(transaction(at * 100, vec![a.insert(&[&row(at), "0"])]));
    }
    let mut slow: Vec<Change> = (1..=100).map(|id| s.insert(&[&row(id)])).collect();
    slow.push(a.insert(&["10", "0"]));
    items.push(transaction(400, slow));
    items.push(transaction(500, vec![a.insert(&["11", "0"])]));
    items.push(transaction(600, vec![a.update(&["11", "1"])]));
    let mut other = support::session(&server, "postgres").await;
    let locking = tokio::spawn(async move {
        let held = "select count(*) from pg_locks where relation = 'public.a'::regclass \
             and granted and mode = 'RowExclusiveLock'";
        let deadline = Instant::now() + Duration::from_secs(20);
        let slow = "select count(*) from pg_stat_activity where wait_event = 'PgSleep'";
        loop {
            assert!(Instant::now() < deadline, "nothing was begun ahead");
            let (held, slow) = (rows(&mut other, held).await, rows(&mut other, slow).await);
            if held != "0" && slow != "0" {
                break;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        other.execute("begin; lock table public.a in access exclusive mode; commit").await.unwrap();
    });
    let applying = apply_with(&server, beside(1), items);
    let applied = tokio::time::timeout(Duration::from_secs(30), applying).await;
    let applied = applied.expect("both wait for ever").unwrap();
    locking.await.unwrap();
    assert_eq!((applied.transactions, applied.fallbacks), (6, 0));
    let all = rows(&mut session, "select * from public.a order by 1").await;
    assert_eq!(all, "1|0\n2|0\n3|0\n10|0\n11|1");
    assert_eq!(rows(&mut session, "select count(*) from public.s").await, "100");
}

#[tokio::test]
async fn a_set_that_is_refused_in_either_session_is_written_in_row_order() {
    let (server, mut session) = target(
        "create table public.u (id int primary key, v text unique); \
         create table public.w (id int primary key); \
         insert into public.u values (1, 'a'), (2, 'b');",
    )
    .await;
    let (u, w) = (table("u", ByKey, &["id*", "v"]), table("w", ByKey, &["id*"]));
    let swap = |even: bool| {
        let (one, two) = if even { ("b", "a") } else { ("a", "b") };
        vec![u.update(&["1", "held"]), u.update(&["2", two]), u.update(&["1", one])]
    };
    // Every fifth is refused: in the one session, then in the other.
    let items = (1..=100u64).map(|n| match n % 5 {
        0 => transaction(n * 100, swap(n / 5 % 2 == 1)),
        _ => transaction(n * 100, vec![w.insert(&[&n.to_string()])]),
    });
    let applied = apply_with(&server, beside(1), items.collect()).await.unwrap();
    println!("{} ahead, {} fallbacks", applied.ahead, applied.fallbacks);
    assert_eq!((applied.fallbacks, applied.transactions), (20, 100));
    assert!(applied.ahead > 20, "{} ahead", applied.ahead);
    assert_eq!(rows(&mut session, "select * from public.u order by 1").await, "1|a\n2|b");
    assert_eq!(rows(&mut session, "select count(*) from public.w").await, "80");
    assert_eq!(fallbacks(&mut session).await, "20");
}

#[tokio::test]
async fn rows_that_are_refused_in_either_session_wait_with_their_tables() {
    // One of each table's rows; no two tables have it at the same time.
    const REFUSED: [u64; 4] = [40, 57, 74, 91];
    const LAST: u64 = 200;
    let mut sql = "create table public.o (id int primary key);".to_string();
    for (of, id) in REFUSED.iter().enumerate() {
        sql += &format!("create table public.t{of} (id int primary key check (id <> {id}));");
    }
    let (server, mut session) = target(&sql).await;
    let tables = [0, 1, 2, 3].map(|of| table(&format!("t{of}"), ByKey, &["id*"]));
    let o = table("o", ByKey, &["id*"]);
    // Half of the transactions are of a table of which nothing is kept, so that there always are
    // some to begin ahead.
    let items = || -> Vec<Item> {
        let of = |n: u64| tables.get(n as usize % 8).unwrap_or(&o);
        (1..=LAST).map(|n| transaction(n * 100, vec![of(n).insert(&[&n.to_string()])])).collect()
    };
    let mut refused = 0;
    let applied = loop {
        let wish = Options { on_row_error: OnRowError::Quarantine, ..beside(1) };
        match apply_with(&server, wish, items()).await {
            Ok(applied) => break applied,
            Err(error) => assert_eq!(error.fault(), Fault::Retry, "{error}"),
        }
        refused += 1;
        assert!(refused <= REFUSED.len(), "a row is refused twice");
    };
    println!("{} ahead after the last of {refused}", applied.ahead);
    assert_eq!(refused, REFUSED.len());
    assert!(applied.ahead > 5, "{} ahead", applied.ahead);
    let mut kept = 0;
    for (of, id) in REFUSED.iter().enumerate() {
        let own = |from: u64, to: u64| (from..to).filter(|n| *n as usize % 8 == of).count();
        let count = rows(&mut session, &format!("select count(*) from public.t{of}")).await;
        assert_eq!(count, own(1, *id).to_string(), "t{of}");
        kept += own(*id, LAST + 1);
    }
    assert_eq!(rows(&mut session, "select count(*) from public.o").await, "100");
    let parked = "select count(*), count(distinct name) from walferry.parked_change";
    assert_eq!(rows(&mut session, parked).await, format!("{kept}|4"));
}

#[tokio::test]
async fn the_end_of_either_session_ends_both_and_nothing_is_half_done() {
    let (server, mut session) = target("create table public.a (id int primary key, v int);").await;
    let a = table("a", ByKey, &["id*", "v"]);
    const LAST: u64 = 12_000;
    let items = || -> Vec<Item> {
        let each = |n: u64| transaction(n * 100, vec![a.insert(&[&n.to_string(), "0"])]);
        (1..=LAST).map(each).collect()
    };
    let mut ends = 0;
    for round in 0..200 {
        let applying = apply_with(&server, beside(10), items());
        let ending = async {
            let named = "from pg_stat_activity where application_name = 'walferry apply'";
            let both = format!("select count(*) = 2 {named}");
            let begun = Instant::now();
            while rows(&mut session, &both).await != "t" && begun.elapsed().as_secs() < 2 {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            tokio::time::sleep(Duration::from_millis(20 + round % 7 * 5)).await;
            let last = if round % 2 == 0 { "" } else { " desc" };
            let end = "select pg_terminate_backend(pid)";
            session.execute(&format!("{end} {named} order by backend_start{last} limit 1")).await
        };
        let (applied, ended) = tokio::join!(applying, ending);
        ended.unwrap();
        let state = rows(&mut session, "select count(*), coalesce(max(id), 0) from public.a").await;
        let (count, last) = state.split_once('|').unwrap();
        assert_eq!(count, last, "round {round}: a transaction is missing");
        match applied {
            Ok(_) => break,
            Err(error) => {
                assert_eq!(error.fault(), Fault::Retry, "{error}");
                ends += 1;
            }
        }
    }
    assert!(ends > 1, "{ends} sessions were ended");
    assert_eq!(rows(&mut session, "select count(*) from public.a").await, LAST.to_string());
    assert_eq!(counts(&mut session, "a").await, format!("{LAST}/0"));
}

#[tokio::test]
async fn the_second_session_comes_once_the_target_has_been_behind_for_a_while() {
    let (server, mut session) = target(
        "create function public.slow(int) returns boolean language plpgsql as \
         $$ begin perform pg_catalog.count(*) from pg_catalog.generate_series(1, 500); \
         return true; end $$; create table public.s (id int primary key check (public.slow(id)));",
    )
    .await;
    let s = table("s", ByKey, &["id*"]);
    let each = |n: u64| {
        let rows = (n * 2000..n * 2000 + 2000).map(|id| s.insert(&[&id.to_string()]));
        transaction(n * 100, rows.collect())
    };
    let applied = |sessions, transactions| {
        let mut wish = tuned(Mode::Auto, Some(Limits { bytes: 1 << 30, transactions: 1 }));
        wish.tuning.sessions = sessions;
        apply_with(&server, wish, (1..=transactions).map(each).collect())
    };
    let begun = Instant::now();
    let two = applied(2, 20).await.unwrap();
    println!("{} of 20 ahead, {:.1} s", two.ahead, begun.elapsed().as_secs_f64());
    assert_eq!(rows(&mut session, "select count(*), max(id) from public.s").await, "40000|41999");
    session.execute("truncate public.s; delete from walferry.progress").await.unwrap();
    // Two batches are over before that.
    let (short, one) = (applied(2, 2).await.unwrap(), applied(1, 8).await.unwrap());
    assert_eq!((short.ahead, one.ahead, one.transactions), (0, 0, 6));
    assert!(two.ahead > 3, "{} ahead", two.ahead);
}
