//! Random changes of tables of every kind, applied in both orders and held against a model of the
//! source that knows nothing of either.

use std::collections::BTreeMap;

use fastrand::Rng;

use super::*;

const DDL_TABLES: &str = "create table public.k (id int primary key, v text, w text, n numeric); \
    create table public.c (a text, v text, b int, w text, primary key (b, a)); \
    create table public.i (id int primary key, v text not null unique, w text); \
    create table public.u (id int primary key, v text unique deferrable, w text unique); \
    create table public.f (a int, v text, w text); \
    create table public.g (id int primary key, v text, w text); \
    create table public.p (id int, v text, w text) partition by range (id); \
    create table public.p1 partition of public.p for values from (minvalue) to (6); \
    create table public.p2 partition of public.p for values from (6) to (maxvalue); \
    alter table public.p add primary key (id); \
    create table public.n (a int);";

/// How a table of the workload is identified, and which of its columns are key and TOAST.
struct Kind {
    name: &'static str,
    identity: ReplicaIdentity,
    columns: &'static [&'static str],
    keys: &'static [usize],
    toast: Option<usize>,
    unique: Option<usize>,
}

const KINDS: &[Kind] = &[
    kind("k", ByKey, &["id*", "v", "w", "n"], &[0], Some(2), None),
    kind("c", ByKey, &["a*", "v", "b*", "w"], &[0, 2], Some(3), None),
    kind("i", Index, &["id", "v*", "w"], &[1], Some(2), Some(0)),
    kind("u", ByKey, &["id*", "v", "w"], &[0], None, Some(2)),
    kind("f", Full, &["a", "v", "w"], &[], Some(2), None),
    kind("g", Full, &["id", "v", "w"], &[0], Some(2), None),
    kind("p", ByKey, &["id*", "v", "w"], &[0], Some(2), None),
    kind("n", Nothing, &["a"], &[], None, None),
];

const fn kind(
    name: &'static str,
    identity: ReplicaIdentity,
    columns: &'static [&'static str],
    keys: &'static [usize],
    toast: Option<usize>,
    unique: Option<usize>,
) -> Kind {
    Kind { name, identity, columns, keys, toast, unique }
}

/// The source: its rows, as lists of texts.
struct Model {
    rng: Rng,
    tables: Vec<Table>,
    rows: Vec<Vec<Vec<String>>>,
    /// Makes unique values that swap hands.
    fresh: u32,
}

impl Model {
    fn new(seed: u64) -> Model {
        let tables = KINDS.iter().map(|k| table(k.name, k.identity, k.columns)).collect();
        Model { rng: Rng::with_seed(seed), tables, rows: vec![Vec::new(); KINDS.len()], fresh: 0 }
    }

    fn text(&mut self, kind: &Kind, column: usize) -> String {
        let texts = ["", "x", "a,\"b\"\\{}", "null", "NULL", "é\n"];
        match kind.columns[column].trim_end_matches('*') {
            "id" | "b" => self.rng.u32(0..12).to_string(),
            "a" => self.rng.u32(0..5).to_string(),
            "n" => ["1.0", "1.00", "2"][self.rng.usize(0..3)].to_string(),
            _ if kind.keys.contains(&column) => format!("key {}", self.rng.u32(0..8)),
            _ if kind.unique == Some(column) => format!("one of {}", self.rng.u32(0..10)),
            _ if kind.name == "u" => {
                self.fresh += 1;
                self.fresh.to_string()
            }
            _ if self.rng.u32(0..5) == 0 => N.to_string(),
            _ => texts[self.rng.usize(0..texts.len())].to_string(),
        }
    }

    /// Whether the row may stand beside the others, but for the one at `at`.
    fn fits(&self, t: usize, row: &[String], at: Option<usize>) -> bool {
        let kind = &KINDS[t];
        let mut others = self.rows[t].iter().enumerate().filter(|(i, _)| Some(*i) != at);
        !others.any(|(_, other)| {
            let same_key = !kind.keys.is_empty() && kind.keys.iter().all(|k| other[*k] == row[*k]);
            same_key || kind.unique.is_some_and(|u| other[u] == row[u])
        })
    }

    fn change(&mut self) -> Option<Change> {
        let t = self.rng.usize(0..KINDS.len());
        let (kind, table) = (&KINDS[t], self.tables[t].clone());
        let fill = self.rows[t].len() < 3;
        let die = self.rng.u32(0..100);
        if die == 0 && self.rng.u32(0..4) == 0 {
            self.rows[t].clear();
            return Some(truncate(&[&table], false));
        }
        if fill || die < 35 {
            let new: Vec<String> = (0..kind.columns.len()).map(|c| self.text(kind, c)).collect();
            self.fits(t, &new, None).then_some(())?;
            self.rows[t].push(new.clone());
            return Some(table.insert(&borrowed(&new)));
        }
        if kind.identity == Nothing {
            return None;
        }
        let at = self.rng.usize(0..self.rows[t].len());
        let old = self.rows[t][at].clone();
        let sent: Vec<String> = match kind.identity {
            Full => old.clone(),
            _ => (0..old.len())
                .map(|c| if kind.keys.contains(&c) { old[c].clone() } else { N.to_string() })
                .collect(),
        };
        if die < 60 {
            self.rows[t].remove(at);
            return Some(match kind.identity {
                Full => table.delete_full(&borrowed(&sent)),
                _ => table.delete(&borrowed(&sent)),
            });
        }
        self.update(t, at, old, sent)
    }

    fn update(
        &mut self,
        t: usize,
        at: usize,
        old: Vec<String>,
        sent: Vec<String>,
    ) -> Option<Change> {
        let (kind, table) = (&KINDS[t], self.tables[t].clone());
        let moves = self.rng.u32(0..4) == 0;
        let mut new = old.clone();
        for (c, value) in new.iter_mut().enumerate() {
            if (moves || !kind.keys.contains(&c)) && self.rng.bool() {
                *value = self.text(kind, c);
            }
        }
        self.fits(t, &new, Some(at)).then_some(())?;
        let moved = kind.keys.iter().any(|k| old[*k] != new[*k]);
        self.rows[t][at] = new.clone();
        if let Some(toast) = kind.toast.filter(|c| new[*c] == old[*c] && old[*c] != N) {
            new[toast] = U.to_string();
        }
        Some(match (kind.identity, moved) {
            (Full, _) => table.update_full(&borrowed(&sent), &borrowed(&new)),
            (_, true) => table.update_key(&borrowed(&sent), &borrowed(&new)),
            (_, false) => table.update(&borrowed(&new)),
        })
    }

    /// Transactions of a few changes each, some of them in several chunks.
    fn items(&mut self, count: u64) -> Vec<Item> {
        let mut items = Vec::new();
        for at in 1..=count {
            let chunks = if self.rng.u32(0..6) == 0 { self.rng.u32(2..5) } else { 1 };
            for number in 0..chunks {
                let wanted = self.rng.usize(1..12);
                let changes: Vec<Change> = (0..wanted).filter_map(|_| self.change()).collect();
                items.push(chunk(at * 100, number, number + 1 == chunks, changes));
            }
        }
        items
    }

    /// What each table must hold, sorted.
    fn wanted(&self) -> BTreeMap<&'static str, Vec<String>> {
        let lines = |rows: &Vec<Vec<String>>| {
            let mut lines: Vec<String> = rows
                .iter()
                .map(|r| r.iter().map(|v| v.replace(N, "-")).collect::<Vec<_>>().join("|"))
                .collect();
            lines.sort();
            lines
        };
        KINDS.iter().zip(&self.rows).map(|(k, rows)| (k.name, lines(rows))).collect()
    }
}

fn borrowed(texts: &[String]) -> Vec<&str> {
    texts.iter().map(String::as_str).collect()
}

async fn found(session: &mut Session) -> BTreeMap<&'static str, Vec<String>> {
    let mut found = BTreeMap::new();
    for kind in KINDS {
        let columns: Vec<&str> = kind.columns.iter().map(|c| c.trim_end_matches('*')).collect();
        let sql = format!("select {} from public.{}", columns.join(", "), kind.name);
        let mut lines = Vec::new();
        for row in session.query(&sql).await.unwrap() {
            let values: Vec<&str> =
                (0..row.len()).map(|i| row.opt(i).unwrap().unwrap_or("-")).collect();
            lines.push(values.join("|"));
        }
        lines.sort();
        found.insert(kind.name, lines);
    }
    found
}

/// WALFERRY_SEED repeats a run.
#[tokio::test]
async fn both_orders_leave_what_the_source_has() {
    let seed = std::env::var("WALFERRY_SEED").ok().and_then(|s| s.parse().ok());
    let seeds = seed.map_or_else(|| vec![1, fastrand::u64(..)], |seed| vec![seed]);
    let (server, mut session) = target(DDL_TABLES).await;
    let mut ahead = 0;
    for seed in seeds {
        println!("WALFERRY_SEED={seed}");
        let mut model = Model::new(seed);
        let items = model.items(300);
        let wanted = model.wanted();
        let changes: usize = items
            .iter()
            .map(|i| match i {
                Item::Chunk(chunk) => chunk.changes.len(),
                Item::Idle { .. } => 0,
            })
            .sum();
        let mut books = Vec::new();
        // Copy, integers, growth, and what a batch sends besides: each way must leave the same.
        let ways = [
            (Mode::Rows, true, true, false, true),
            (Mode::Sets, true, true, false, true),
            (Mode::Sets, false, true, true, false),
            (Mode::Sets, true, false, true, true),
            (Mode::Auto, true, true, true, true),
            (Mode::Auto, false, false, false, false),
        ];
        for (mode, copy_inserts, binary_values, grows, short) in ways {
            session
                .execute(
                    "truncate public.k, public.c, public.i, public.u, public.f, public.g, \
                public.p, public.n; delete from walferry.progress; \
                delete from walferry.stream_table",
                )
                .await
                .unwrap();
            let mut rng = Rng::with_seed(seed);
            let mut limits =
                Limits { bytes: rng.usize(200..40_000), transactions: rng.usize(1..100) };
            if mode == Mode::Sets && !grows {
                // Small ones, of which many are sets alone, and begun ahead.
                limits.transactions = rng.usize(1..10);
            }
            let mut wish = tuned(mode, Some(limits));
            wish.tuning.sessions = if grows { 1 } else { 2 };
            wish.tuning.copy_inserts = copy_inserts;
            wish.tuning.binary_values = binary_values;
            wish.tuning.eager = short;
            wish.tuning.delete_by_array = short;
            wish.tuning.count_by_server = copy_inserts;
            wish.tuning.set_rows = if short { 3 } else { 0 };
            wish.tuning.unnest_in_select = short;
            wish.tuning.sort_keys = short;
            wish.tuning.ask_ahead = short;
            wish.tuning.keep_types = short;
            wish.tuning.async_commit = short;
            if !short {
                wish.tuning.counters_interval = Duration::ZERO;
                wish.tuning.position_interval = Duration::ZERO;
                wish.tuning.flush_after = Duration::ZERO;
            }
            if grows {
                wish.tuning.limits_max = Limits::default();
            }
            let applied = apply_with(&server, wish, items.clone()).await.unwrap();
            println!(
                "{mode:?} {limits:?}: {} fallbacks, {} ahead, {changes} changes",
                applied.fallbacks, applied.ahead
            );
            ahead += applied.ahead;
            assert_eq!(found(&mut session).await, wanted, "seed {seed} {mode:?}");
            assert_eq!(applied.rows, changes as u64, "{mode:?}");
            // A batch of empty transactions alone is not written.
            assert!((290..=300).contains(&applied.transactions), "{mode:?} {applied:?}");
            books.push(
                rows(&mut session, "select * from walferry.stream_table order by 1, 2, 3").await,
            );
        }
        assert!(books.windows(2).all(|b| b[0] == b[1]), "books differ: {books:?}");
    }
    assert!(ahead > 0, "no batch was begun ahead");
}
