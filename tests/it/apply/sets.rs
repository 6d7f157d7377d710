//! Set order against row order: the same end state, and back to row order where it will not do.

use super::*;

async fn in_order(server: &Server, mode: Mode, items: Vec<Item>) -> Result<Applied> {
    apply_with(server, tuned(mode, None), items).await
}

pub(super) async fn fallbacks(session: &mut Session) -> String {
    rows(session, "select batches from walferry.stream_fallback").await
}

#[tokio::test]
async fn a_unique_value_that_changes_hands_is_written_in_row_order() {
    let (server, mut session) = target(
        "create table public.u (id int primary key, v text unique); \
         create table public.k (id int primary key, v text); \
         insert into public.u values (1, 'a'), (2, 'b');",
    )
    .await;
    let (u, k) = (table("u", ByKey, &["id*", "v"]), table("k", ByKey, &["id*", "v"]));
    let swap = vec![
        k.insert(&["1", "x"]),
        u.update(&["1", "held"]),
        u.update(&["2", "a"]),
        u.update(&["1", "b"]),
    ];
    let items = vec![transaction(100, swap), transaction(200, vec![k.update(&["1", "y"])])];
    let applied = in_order(&server, Mode::Sets, items).await.unwrap();
    assert_eq!((applied.fallbacks, applied.rows, applied.transactions), (1, 5, 2));
    assert_eq!(rows(&mut session, "select * from public.u order by 1").await, "1|b\n2|a");
    assert_eq!(rows(&mut session, "select * from public.k").await, "1|y");
    assert_eq!(
        (counts(&mut session, "u").await, counts(&mut session, "k").await),
        ("3/0".to_string(), "2/0".to_string())
    );
    assert_eq!(fallbacks(&mut session).await, "1");
    // The session goes on with statements made anew.
    let more = vec![transaction(300, vec![u.update(&["1", "c"]), u.insert(&["3", "b"])])];
    let applied = in_order(&server, Mode::Sets, more).await.unwrap();
    assert_eq!(applied.fallbacks, 0);
    assert_eq!(rows(&mut session, "select * from public.u order by 1").await, "1|c\n2|a\n3|b");
}

#[tokio::test]
async fn a_session_that_fell_back_goes_on_in_set_order() {
    let (server, mut session) = target(
        "create table public.u (id int primary key, v text unique); \
         insert into public.u select i, i::text from generate_series(1, 20) i;",
    )
    .await;
    let u = table("u", ByKey, &["id*", "v"]);
    let mut items = Vec::new();
    for at in 1..=9u64 {
        let (a, b) = ((2 * at).to_string(), (2 * at + 1).to_string());
        let swap =
            |x: &str, y: &str| vec![u.update(&[x, "held"]), u.update(&[y, x]), u.update(&[x, y])];
        let quiet = vec![u.delete(&["1", N]), u.insert(&["1", "one"])];
        items.push(transaction(at * 100, if at % 2 == 0 { swap(&a, &b) } else { quiet }));
    }
    let limits = Limits { bytes: 1 << 20, transactions: 1 };
    let wanted = tuned(Mode::Sets, Some(limits));
    let applied = apply_with(&server, wanted, items).await.unwrap();
    assert_eq!((applied.fallbacks, applied.transactions), (4, 9));
    let swapped = "select count(*) from public.u where v <> id::text and id > 1";
    assert_eq!(rows(&mut session, swapped).await, "8");
    assert_eq!(fallbacks(&mut session).await, "4");
}

#[tokio::test]
async fn deferrable_unique_constraints_are_met_with_and_without_the_replica_role() {
    let (server, mut session) = target(
        "create table public.u (id int primary key, v text unique deferrable initially deferred); \
         insert into public.u values (1, 'a'), (2, 'b');",
    )
    .await;
    let u = table("u", ByKey, &["id*", "v"]);
    for (at, replica_role, end) in [(100, true, "1|b\n2|a"), (200, false, "1|a\n2|b")] {
        let (one, two) = if replica_role { ("b", "a") } else { ("a", "b") };
        let swap = vec![u.update(&["1", one]), u.update(&["2", two])];
        let wanted = Options { replica_role, ..tuned(Mode::Sets, None) };
        apply_with(&server, wanted, vec![transaction(at, swap)]).await.unwrap();
        assert_eq!(rows(&mut session, "select * from public.u order by 1").await, end);
    }
}

/// Such a one is a trigger of the server's own, so where triggers act its table is written in row
/// order from the start: one set after the other would break it. Under the replica role nobody
/// looks, and sets are right in the end.
#[tokio::test]
async fn a_deferrable_constraint_that_sets_would_break_is_met_in_row_order() {
    let (server, mut session) = target(
        "create table public.u (id int primary key, v text unique deferrable, w text); \
         insert into public.u values (1, 'a', 'long'), (2, 'b', 'long');",
    )
    .await;
    let u = table("u", ByKey, &["id*", "v", "w"]);
    // Of the first row w is unchanged TOAST: its set is another, and comes first.
    let moved = vec![u.update(&["2", "c", "short"]), u.update(&["1", "b", U])];
    let wanted = Options { replica_role: false, ..tuned(Mode::Sets, None) };
    let applied = apply_with(&server, wanted, vec![transaction(100, moved)]).await.unwrap();
    assert_eq!(applied.fallbacks, 0, "sets would have fallen back");
    let end = rows(&mut session, "select * from public.u order by 1").await;
    assert_eq!(end, "1|b|long\n2|c|short");
    let moved = vec![u.update(&["2", "d", "new"]), u.update(&["1", "c", U])];
    let applied = in_order(&server, Mode::Sets, vec![transaction(200, moved)]).await.unwrap();
    assert_eq!(applied.fallbacks, 0);
    let end = rows(&mut session, "select * from public.u order by 1").await;
    assert_eq!(end, "1|c|long\n2|d|new");
}

#[tokio::test]
async fn an_exclusion_constraint_that_sets_would_break_is_met_in_row_order() {
    let (server, mut session) = target(
        "create table public.e (id int primary key, r int4range, exclude using gist (r with &&)); \
         insert into public.e values (1, '[1,5)'), (2, '[5,9)');",
    )
    .await;
    let e = table("e", ByKey, &["id*", "r"]);
    let swap =
        vec![e.update(&["1", "[100,200)"]), e.update(&["2", "[1,5)"]), e.update(&["1", "[5,9)"])];
    let applied = in_order(&server, Mode::Sets, vec![transaction(100, swap)]).await.unwrap();
    assert_eq!(applied.fallbacks, 1);
    assert_eq!(rows(&mut session, "select * from public.e order by 1").await, "1|[5,9)\n2|[1,5)");
}

#[tokio::test]
async fn rows_move_between_partitions_as_sets_and_one_by_one_where_that_fails() {
    let (server, mut session) = target(
        "create table public.p (id int, region text, v text) partition by list (region); \
         create table public.pa partition of public.p for values in ('a'); \
         create table public.pb partition of public.p for values in ('b'); \
         create unique index on public.pa (v); create unique index on public.pb (v); \
         insert into public.p select i, 'a', i::text from generate_series(1, 6) i;",
    )
    .await;
    let p = table("p", ByKey, &["id*", "region", "v"]);
    let moves = ["1", "2", "3"].map(|id| p.update(&[id, "b", id]));
    let applied =
        in_order(&server, Mode::Sets, vec![transaction(100, moves.to_vec())]).await.unwrap();
    assert_eq!(applied.fallbacks, 0);
    let tables = "select tableoid::regclass, id, v from public.p order by id";
    let ids = "public.pb|1|1\npublic.pb|2|2\npublic.pb|3|3\n";
    let rest = "public.pa|4|4\npublic.pa|5|5\npublic.pa|6|6";
    assert_eq!(rows(&mut session, tables).await, format!("{ids}{rest}"));
    // Two rows change places, and their value with them.
    let swap =
        vec![p.update(&["1", "b", "held"]), p.update(&["4", "b", "1"]), p.update(&["1", "a", "4"])];
    let applied = in_order(&server, Mode::Sets, vec![transaction(200, swap)]).await.unwrap();
    let ids = "public.pa|1|4\npublic.pb|2|2\npublic.pb|3|3\npublic.pb|4|1\n";
    let rest = "public.pa|5|5\npublic.pa|6|6";
    assert_eq!(rows(&mut session, tables).await, format!("{ids}{rest}"));
    assert!(applied.fallbacks <= 1);
    let swap = vec![
        p.update(&["2", "b", "held"]),
        p.update(&["3", "b", "2"]),
        p.update(&["2", "b", "3"]),
        p.update(&["5", "b", "5"]),
    ];
    let applied = in_order(&server, Mode::Sets, vec![transaction(300, swap)]).await.unwrap();
    assert_eq!(applied.fallbacks, 1);
    let ids = "public.pa|1|4\npublic.pb|2|3\npublic.pb|3|2\npublic.pb|4|1\n";
    let rest = "public.pb|5|5\npublic.pa|6|6";
    assert_eq!(rows(&mut session, tables).await, format!("{ids}{rest}"));
}

#[tokio::test]
async fn a_row_missing_from_a_set_is_named_and_nothing_of_the_batch_stays() {
    let (server, mut session) = target(
        "create table public.k (id int primary key, v text); create table public.f (a int); \
         insert into public.k select i, 'x' from generate_series(1, 50) i where i <> 33; \
         insert into public.f values (1), (1);",
    )
    .await;
    let k = table("k", ByKey, &["id*", "v"]);
    let f = table("f", Full, &["a"]);
    let ids: Vec<String> = (1..=50).map(|i| i.to_string()).collect();
    let updates: Vec<Change> = ids.iter().map(|id| k.update(&[id, "y"])).collect();
    let deletes: Vec<Change> = ids.iter().map(|id| k.delete(&[id, N])).collect();
    let touches: Vec<Change> = ids.iter().map(|id| k.update(&[id, U])).collect();
    let thrice = vec![f.delete_full(&["1"]), f.delete_full(&["1"]), f.delete_full(&["1"])];
    for (changes, word) in [
        (updates, "UPDATE of public.k key (id)=(33)"),
        (deletes, "DELETE of public.k key (id)=(33)"),
        (touches, "UPDATE of public.k key (id)=(33)"),
        (thrice, "DELETE of public.f key"),
    ] {
        let before = rows(&mut session, "select v, count(*) from public.k group by 1").await;
        let error =
            in_order(&server, Mode::Sets, vec![transaction(100, changes)]).await.unwrap_err();
        assert!(matches!(error, Error::RowMissing { .. }), "{error}");
        assert!(error.to_string().contains(word), "{error}");
        let after = rows(&mut session, "select v, count(*) from public.k group by 1").await;
        assert_eq!(after, before);
    }
    assert_eq!(rows(&mut session, "select count(*) from public.f").await, "2");
    assert_eq!(rows(&mut session, "select count(*) from walferry.stream_table").await, "0");
}

/// By its statistics of the transaction; where it keeps none, and of partitions, by giving them back.
#[tokio::test]
async fn rows_that_go_are_counted_by_the_server_and_a_missing_one_is_named() {
    let (server, mut session) = target(
        "create table public.k (id int primary key, v text); \
         create table public.p (id int primary key, v text) partition by range (id); \
         create table public.pa partition of public.p for values from (1) to (1500); \
         create table public.pb partition of public.p for values from (1500) to (9999); \
         insert into public.k select i, 'x' from generate_series(1, 4000) i where i <> 1700; \
         insert into public.p select i, 'x' from generate_series(1, 4000) i where i <> 1700;",
    )
    .await;
    let tables = [table("k", ByKey, &["id*", "v"]), table("p", ByKey, &["id*", "v"])];
    let gone = |range: std::ops::Range<u32>| -> Vec<Change> {
        let ids = range.map(|id| id.to_string());
        ids.flat_map(|id| tables.each_ref().map(|table| table.delete(&[&id, N]))).collect()
    };
    let left = "select (select count(*) from public.k), (select count(*) from public.p)";
    for (at, counts, range, rest) in
        [(100, "on", 1..1001, "2999|2999"), (200, "off", 3001..4001, "1999|1999")]
    {
        let set = format!("alter database postgres set track_counts = {counts}");
        session.execute(&set).await.unwrap();
        let batch = vec![transaction(at, gone(range))];
        let applied = in_order(&server, Mode::Auto, batch).await.unwrap();
        assert_eq!((applied.rows, applied.fallbacks), (2000, 0), "track_counts = {counts}");
        assert_eq!(rows(&mut session, left).await, rest);
    }
    for counts in ["on", "off"] {
        let set = format!("alter database postgres set track_counts = {counts}");
        session.execute(&set).await.unwrap();
        let batch = vec![transaction(300, gone(1001..2001))];
        let error = in_order(&server, Mode::Auto, batch).await.unwrap_err();
        assert!(error.to_string().contains("DELETE of public.k key (id)=(1700)"), "{error}");
        assert_eq!(rows(&mut session, left).await, "1999|1999");
    }
}

/// A nested loop would begin a scan for every row; the statistics count them.
#[tokio::test]
async fn rows_without_a_key_cost_one_scan_a_batch_and_not_one_each() {
    let (server, mut session) = target(
        "create table public.f (a int, v text); create table public.fresh (a int, v text); \
         create table public.p (a int, v text) partition by range (a); \
         create table public.pa partition of public.p for values from (1) to (500); \
         create table public.pb partition of public.p for values from (500) to (3001); \
         insert into public.f select i, md5(i::text) from generate_series(1, 3000) i; \
         insert into public.p select * from public.f; analyze public.f; analyze public.p; \
         insert into public.fresh select * from public.f;",
    )
    .await;
    let names = ["f", "fresh", "p"];
    let scans = "select relname, seq_scan + coalesce(idx_scan, 0) from pg_stat_user_tables \
         where relname in ('f', 'fresh', 'pa', 'pb') and n_tup_del > 0 order by 1";
    let mut texts = Vec::new();
    for row in session.query("select a, v from public.f").await.unwrap() {
        texts.push((row.string(0).unwrap(), row.string(1).unwrap()));
    }
    session.execute("select pg_stat_reset()").await.unwrap();
    for (at, name) in names.into_iter().enumerate() {
        let f = table(name, Full, &["a", "v"]);
        let changes: Vec<Change> =
            texts.iter().map(|(a, v)| f.update_full(&[a, v], &[a, "new"])).collect();
        let batch = vec![transaction(100 * (at as u64 + 1), changes)];
        let applied = in_order(&server, Mode::Auto, batch).await.unwrap();
        assert_eq!((applied.rows, applied.fallbacks), (3000, 0));
    }
    // What a session did is told at the latest when it ends.
    let mut told = String::new();
    for _ in 0..600 {
        told = rows(&mut session, scans).await;
        if told.lines().count() == 4 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(told, "f|1\nfresh|1\npa|2\npb|2");
    let left = "select count(*) from public.f where v <> 'new'";
    assert_eq!(rows(&mut session, left).await, "0");
}

#[tokio::test]
async fn duplicate_keys_on_the_target_are_not_mistaken_for_several_rows() {
    // Two rows have key 1 and none has key 2: as many rows as keys, and still wrong.
    let (server, mut session) = target(
        "create table public.k (id int, v text); insert into public.k values (1, 'x'), (1, 'x');",
    )
    .await;
    let k = table("k", ByKey, &["id*", "v"]);
    let both = [
        vec![k.update(&["1", "y"]), k.update(&["2", "y"])],
        vec![k.delete(&["1", N]), k.delete(&["2", N])],
    ];
    for changes in both {
        let error =
            in_order(&server, Mode::Sets, vec![transaction(100, changes)]).await.unwrap_err();
        assert!(matches!(&error, Error::RowMissing { rows, .. } if rows == "2"), "{error}");
    }
    assert_eq!(rows(&mut session, "select * from public.k").await, "1|x\n1|x");
}

#[tokio::test]
async fn a_part_of_a_large_transaction_falls_back_alone() {
    let (server, mut session) = target(
        "create table public.u (id int primary key, v text unique); \
         insert into public.u values (1, 'a'), (2, 'b');",
    )
    .await;
    let u = table("u", ByKey, &["id*", "v"]);
    let insert = |from: u64| (from..from + 5).map(|i| i.to_string());
    let inserts =
        |from: u64| insert(from).map(|i| u.insert(&[&i, &format!("v{i}")])).collect::<Vec<_>>();
    let swap = vec![u.update(&["1", "held"]), u.update(&["2", "a"]), u.update(&["1", "b"])];
    let items = vec![
        chunk(100, 0, false, inserts(10)),
        chunk(100, 1, false, swap),
        chunk(100, 2, false, inserts(20)),
        chunk(100, 3, true, inserts(30)),
    ];
    let limits = Limits { bytes: 1, transactions: 1 };
    let wanted = tuned(Mode::Sets, Some(limits));
    let applied = apply_with(&server, wanted, items).await.unwrap();
    assert_eq!((applied.fallbacks, applied.rows, applied.transactions), (1, 18, 1));
    assert_eq!(counts(&mut session, "u").await, "18/0");
    let wanted = "1|b\n2|a\n10|v10\n11|v11\n12|v12\n13|v13\n14|v14\n20|v20\n21|v21\n22|v22\n\
                  23|v23\n24|v24\n30|v30\n31|v31\n32|v32\n33|v33\n34|v34";
    assert_eq!(rows(&mut session, "select * from public.u order by 1").await, wanted);
}

#[tokio::test]
async fn triggers_that_fire_under_the_replica_role_see_every_change_in_order() {
    let (server, mut session) = target(
        "create table public.k (id int primary key, v text); \
         create table public.p (id int primary key, v text) partition by range (id); \
         create table public.p1 partition of public.p for values from (0) to (100); \
         create table public.seen (n serial, what text); \
         create function public.see() returns trigger language plpgsql as $$ begin \
             insert into public.seen (what) values (tg_op || coalesce(new.id, old.id)); \
             return null; end $$; \
         create trigger t after insert or update or delete on public.k for each row \
             execute function public.see(); \
         create trigger t after insert or update or delete on public.p1 for each row \
             execute function public.see(); \
         alter table public.k enable always trigger t; \
         alter table public.p1 enable replica trigger t;",
    )
    .await;
    for (at, name) in [(100, "k"), (200, "p")] {
        let t = table(name, ByKey, &["id*", "v"]);
        let changes = vec![
            t.insert(&["1", "a"]),
            t.insert(&["2", "a"]),
            t.update(&["1", "b"]),
            t.delete(&["2", N]),
        ];
        in_order(&server, Mode::Sets, vec![transaction(at, changes)]).await.unwrap();
        let seen = "select string_agg(what, ' ' order by n) from public.seen";
        assert_eq!(rows(&mut session, seen).await, "INSERT1 INSERT2 UPDATE1 DELETE2");
        session.execute("truncate public.seen").await.unwrap();
    }
}

#[tokio::test]
async fn a_cast_of_somebodys_own_does_not_stand_in_for_input() {
    let (server, mut session) = target(
        "create type public.mood as enum ('low', 'high', 'a\"b\\c,{}'); \
         create domain public.feeling as public.mood; \
         create function public.always_low(text) returns public.mood language sql immutable \
             as $$ select 'low'::public.mood $$; \
         create cast (text as public.mood) with function public.always_low(text); \
         create table public.m (id int primary key, m public.mood, f public.feeling, \
             c \"char\", n name, x xml);",
    )
    .await;
    let m = table("m", ByKey, &["id*", "m", "f", "c", "n", "x"]);
    let all = vec![
        m.insert(&["1", "high", "high", "q", "name", "<a>\"</a>"]),
        m.insert(&["2", "a\"b\\c,{}", "a\"b\\c,{}", "\"", "\\", "<b/>"]),
        m.insert(&["3", N, N, N, N, N]),
        m.insert(&["4", "low", "low", ",", "null", "x"]),
    ];
    let then = vec![m.update(&["1", "a\"b\\c,{}", N, "{", "NULL", N])];
    for mode in [Mode::Rows, Mode::Sets] {
        let (all, then) = (all.clone(), then.clone());
        let at = if mode == Mode::Rows { 100 } else { 300 };
        let items = vec![transaction(at, all), transaction(at + 100, then)];
        let limits = Limits { bytes: 1, transactions: 1 };
        let wanted = tuned(mode, Some(limits));
        let applied = apply_with(&server, wanted, items).await.unwrap();
        assert_eq!(applied.fallbacks, 0);
        let wanted = "1|a\"b\\c,{}|-|{|NULL|-\n2|a\"b\\c,{}|a\"b\\c,{}|\"|\\|<b/>\n\
                      3|-|-|-|-|-\n4|low|low|,|null|x";
        assert_eq!(rows(&mut session, "select * from public.m order by 1").await, wanted);
        session.execute("truncate public.m").await.unwrap();
    }
}

#[tokio::test]
async fn rows_without_a_key_go_exactly_as_often_as_they_should() {
    let (server, mut session) = target(
        "create table public.f (a int, b text, n numeric, j json); \
         insert into public.f select i % 10, nullif('v' || i % 3, 'v0'), 1.0, '{\"a\": 1}' \
             from generate_series(1, 3000) i; insert into public.f values (0, null, 1.00, null);",
    )
    .await;
    let f = table("f", Full, &["a", "b", "n", "j"]);
    let json = "{\"a\": 1}";
    let mut changes = Vec::new();
    for _ in 0..50 {
        changes.push(f.delete_full(&["0", N, "1.0", json]));
        changes.push(f.update_full(&["1", "v1", "1.0", json], &["1", "", "2.0", U]));
        changes.push(f.update_full(&["1", "", "2.0", json], &["11", N, "2", N]));
        changes.push(f.insert(&["12", "new", N, N]));
        changes.push(f.delete_full(&["12", "new", N, N]));
    }
    let applied = in_order(&server, Mode::Auto, vec![transaction(100, changes)]).await.unwrap();
    assert_eq!((applied.fallbacks, applied.rows), (0, 250));
    let by_kind = "select a, b, n, j, count(*) from public.f where a in (0, 1, 11, 12) \
                   group by 1, 2, 3, j::text, j order by 1, 2, 3";
    let by_kind = by_kind.replace(", j, count", ", j::text, count").replace("j::text, j ", "4 ");
    let wanted = format!(
        "0|v1|1.0|{json}|100\n0|v2|1.0|{json}|100\n0|-|1.0|{json}|50\n0|-|1.00|-|1\n\
         1|v1|1.0|{json}|50\n1|v2|1.0|{json}|100\n1|-|1.0|{json}|100\n11|-|2|-|50"
    );
    assert_eq!(rows(&mut session, &by_kind).await, wanted);
    // Equal but read otherwise: found by row order.
    let other =
        vec![f.delete_full(&["0", N, "1.000", N]), f.delete_full(&["5", "v1", "1.0", json])];
    let applied = in_order(&server, Mode::Sets, vec![transaction(200, other)]).await.unwrap();
    assert_eq!(applied.fallbacks, 1);
    assert_eq!(
        rows(&mut session, "select count(*) from public.f where n::text = '1.00'").await,
        "0"
    );
}

#[tokio::test]
async fn a_reader_of_the_target_sees_only_states_that_the_source_had() {
    let (server, mut session) = target(
        "create table public.branch (id int primary key, balance int not null); \
         create table public.teller (id int primary key, balance int not null); \
         create table public.history (n int, delta int); \
         insert into public.branch select i, 0 from generate_series(0, 4) i; \
         insert into public.teller select i, 0 from generate_series(0, 49) i;",
    )
    .await;
    let branch = table("branch", ByKey, &["id*", "balance"]);
    let teller = table("teller", ByKey, &["id*", "balance"]);
    let history = table("history", Nothing, &["n", "delta"]);
    let (mut branches, mut tellers) = ([0i32; 5], [0i32; 50]);
    let mut rng = fastrand::Rng::with_seed(5);
    let items: Vec<Item> = (1..=3000u64)
        .map(|n| {
            let (b, t, delta) = (rng.usize(0..5), rng.usize(0..50), rng.i32(-500..500));
            branches[b] += delta;
            tellers[t] += delta;
            let text = |n: i32| n.to_string();
            let changes = vec![
                branch.update(&[&text(b as i32), &text(branches[b])]),
                teller.update(&[&text(t as i32), &text(tellers[t])]),
                history.insert(&[&n.to_string(), &text(delta)]),
            ];
            transaction(n * 100, changes)
        })
        .collect();
    let mut wanted = tuned(Mode::Auto, Some(Limits { bytes: 1 << 20, transactions: 60 }));
    wanted.tuning.limits_max.transactions = 500;
    let mut running = Running::start(Applier::connect(&config(&server), wanted).await.unwrap());
    let sums = "select (select sum(balance) from public.branch), \
        (select sum(balance) from public.teller), \
        (select coalesce(sum(delta), 0) from public.history), \
        (select count(*) from public.history)";
    let (mut seen, mut states) = (0_usize, 0);
    let mut left = items.into_iter();
    left.by_ref().take(600).for_each(|item| running.send(item));
    while seen < 3000 {
        let row = session.query_one(sums, &[]).await.unwrap();
        let sum = row.str(0).unwrap();
        assert_eq!((row.str(1).unwrap(), row.str(2).unwrap()), (sum, sum), "after {seen}");
        let count = row.parse(3).unwrap();
        assert!(count >= seen);
        // As much follows as was seen to arrive, so that the applier is never done with all before
        // the next look, however slow the looks are.
        left.by_ref().take(count - seen).for_each(|item| running.send(item));
        states += usize::from(count != seen);
        seen = count;
    }
    assert!(states >= 5, "only {states} states were seen");
    running.wait(|a| a.transactions == 3000).await;
    running.end().await.unwrap();
}

#[tokio::test]
async fn batches_behind_one_that_is_refused_are_sent_again() {
    let (server, mut session) = target(
        "create table public.u (id int primary key, v text unique); \
         create table public.k (id int primary key, v text); \
         insert into public.u select i, 'v' || i from generate_series(1, 40) i;",
    )
    .await;
    let (u, k) = (table("u", ByKey, &["id*", "v"]), table("k", ByKey, &["id*", "v"]));
    // Every batch is full at once, so that two are under way; every third is refused as sets.
    let items: Vec<Item> = (1..=60u64)
        .map(|n| {
            let mut changes = vec![k.insert(&[&n.to_string(), "x"])];
            if n % 3 == 0 {
                let (a, b) = ((n % 39 + 1).to_string(), (n % 39 + 2).to_string());
                let held = |id: &str| format!("held {n} {id}");
                changes.push(u.update(&[&a, &held(&a)]));
                changes.push(u.update(&[&b, &held(&b)]));
                changes.push(u.update(&[&a, "passing"]));
                changes.push(u.update(&[&b, &held(&a)]));
                changes.push(u.update(&[&a, &held(&b)]));
            }
            transaction(n * 100, changes)
        })
        .collect();
    let swap = |x: &str, y: &str, at| {
        let passing =
            vec![u.update(&[x, "passing"]), u.update(&[y, "first"]), u.update(&[x, "second"])];
        transaction(at, passing)
    };
    let mut items = items;
    items.push(transaction(6100, vec![u.update(&["1", "first"]), u.update(&["2", "second"])]));
    items.push(swap("1", "2", 6200));
    items.push(transaction(6300, vec![k.update(&["1", "after"])]));
    items.push(swap("2", "1", 6400));
    items.push(transaction(6500, vec![k.delete(&["2", N])]));
    let wanted = tuned(Mode::Sets, Some(Limits { bytes: 1, transactions: 1 }));
    let applied = apply_with(&server, wanted, items).await.unwrap();
    assert_eq!((applied.fallbacks, applied.transactions), (2, 65));
    assert_eq!(counts(&mut session, "k").await, "62/0");
    assert_eq!(counts(&mut session, "u").await, "108/0");
    let first = "select id, v from public.u where id < 3 order by 1";
    assert_eq!(rows(&mut session, first).await, "1|first\n2|second");
    assert_eq!(rows(&mut session, "select v from public.k where id = 1").await, "after");
    assert_eq!(rows(&mut session, "select count(*) from public.k").await, "59");
}

/// Texts that a COPY must escape, and columns that it must leave to the server.
#[tokio::test]
async fn rows_that_come_by_copy_are_those_that_come_by_insert() {
    let (server, mut session) = target(
        "create domain public.small as int check (value < 100); \
         create table public.c (id bigint primary key, v text, s smallint, d public.small, \
             j json, g int generated always as (s * 2) stored, \
             i int generated always as identity, b bytea, n numeric(6, 2), a text[]); \
         create table public.one (v text);",
    )
    .await;
    let c = table("c", ByKey, &["id*", "v", "s", "d", "j", "i", "b", "n", "a"]);
    let one = table("one", Nothing, &["v"]);
    let texts =
        ["", "\\", "\\.", "\\N", "a\tb", "a\nb\r\n", "\\t", "\u{8}\u{b}", "\u{e9}\u{1f600}", N];
    let mut changes = Vec::new();
    for (at, text) in texts.iter().enumerate() {
        let (id, small) = ((i64::MAX - at as i64).to_string(), (at as i64 - 5).to_string());
        let json = "{\"a\\tb\": null}";
        let i = at.to_string();
        let array = "{a,NULL,\"b\\\\\"}";
        changes.push(c.insert(&[&id, text, &small, "99", json, &i, "\\x00ff", "1.50", array]));
        changes.push(one.insert(&[text]));
    }
    let all = "select *, v is null from public.c order by id";
    let ones = "select v, v is null, count(*) from public.one group by 1, 2 order by 1";
    let mut seen = Vec::new();
    for (at, mode, copy_inserts) in
        [(100, Mode::Sets, true), (300, Mode::Sets, false), (500, Mode::Rows, true)]
    {
        let mut wanted = tuned(mode, None);
        wanted.tuning.copy_inserts = copy_inserts;
        let (first, then) = changes.split_at(10);
        let items = vec![transaction(at, first.to_vec()), transaction(at + 100, then.to_vec())];
        let applied = apply_with(&server, wanted, items).await.unwrap();
        assert_eq!((applied.fallbacks, applied.rows), (0, 20), "{mode:?} {copy_inserts}");
        seen.push((rows(&mut session, all).await, rows(&mut session, ones).await));
        session.execute("truncate public.c, public.one").await.unwrap();
    }
    assert_eq!(seen[0], seen[1]);
    assert_eq!(seen[0], seen[2]);
    assert_eq!(seen[0].0.lines().count(), 12, "{}", seen[0].0);
}

#[tokio::test]
async fn what_a_copy_is_refused_is_written_in_row_order_and_names_the_row() {
    let (server, mut session) = target(
        "create table public.c (id int primary key, v text check (v <> 'bad')); \
         create table public.l (id int primary key, v text); \
         insert into public.c values (7, 'here');",
    )
    .await;
    let (c, l) = (table("c", ByKey, &["id*", "v"]), table("l", ByKey, &["id*", "v"]));
    // What follows the refused COPY in its request must not be taken for part of it.
    let mut changes: Vec<Change> = (1..=6).map(|i| c.insert(&[&i.to_string(), "x"])).collect();
    changes.push(l.insert(&["1", "behind"]));
    changes.push(c.insert(&["8", "bad"]));
    let error = in_order(&server, Mode::Sets, vec![transaction(100, changes.clone())]).await;
    let error = error.unwrap_err().to_string();
    assert!(error.contains("(id)=(8)") && error.contains("public.c"), "{error}");
    assert_eq!(rows(&mut session, "select count(*) from public.c").await, "1");
    changes.pop();
    changes.push(c.update(&["7", "there"]));
    let applied = in_order(&server, Mode::Sets, vec![transaction(200, changes)]).await.unwrap();
    assert_eq!((applied.fallbacks, applied.rows), (0, 8));
    assert_eq!(rows(&mut session, "select count(*), max(v) from public.c").await, "7|x");
    assert_eq!(rows(&mut session, "select * from public.l").await, "1|behind");
}

#[tokio::test]
async fn a_table_with_row_security_takes_sets_and_no_copy() {
    let (server, mut session) = target(
        "create table public.r (id int primary key, v text); \
         alter table public.r enable row level security; \
         alter table public.r force row level security;",
    )
    .await;
    let r = table("r", ByKey, &["id*", "v"]);
    let changes: Vec<Change> = (1..=50).map(|i| r.insert(&[&i.to_string(), "x"])).collect();
    let applied = in_order(&server, Mode::Sets, vec![transaction(100, changes)]).await.unwrap();
    assert_eq!(applied.fallbacks, 0);
    assert_eq!(rows(&mut session, "select count(*) from public.r").await, "50");
}

/// Integers as another type's text may have them: what is no plain number goes by row order.
#[tokio::test]
async fn integers_travel_in_binary_and_what_is_none_is_left_to_the_server() {
    let (server, mut session) = target(
        "create table public.n (id int primary key, s smallint, b bigint, f float8); \
         insert into public.n select i, 0, 0, 0 from generate_series(1, 4) i;",
    )
    .await;
    let n = table("n", ByKey, &["id*", "s", "b", "f"]);
    let plain = vec![
        n.update(&["1", "-32768", "9223372036854775807", "1e100"]),
        n.update(&["2", "32767", "-9223372036854775808", N]),
        n.update(&["3", N, "+7", "-0"]),
    ];
    let applied = in_order(&server, Mode::Sets, vec![transaction(100, plain)]).await.unwrap();
    assert_eq!(applied.fallbacks, 0);
    let odd = vec![n.update(&["4", " 5 ", "08", "1"]), n.update(&["3", "1", "2", "3"])];
    in_order(&server, Mode::Sets, vec![transaction(200, odd)]).await.unwrap();
    let wanted = "1|-32768|9223372036854775807|1e+100\n2|32767|-9223372036854775808|-\n\
                  3|1|2|3\n4|5|8|1";
    assert_eq!(rows(&mut session, "select * from public.n order by 1").await, wanted);
    let large = vec![n.update(&["4", "32768", "1", "1"])];
    let error = in_order(&server, Mode::Sets, vec![transaction(300, large)]).await.unwrap_err();
    assert!(error.to_string().contains("(id)=(4)"), "{error}");
}
