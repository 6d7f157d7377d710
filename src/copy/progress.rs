//! Counters that workers write and others read. Nothing is printed here.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::parts::{SMALL_BYTES, order, weight};
use crate::catalog::Table;
use crate::id::QualifiedName;

/// Shared counters of one copy; clones count into the same place.
#[derive(Clone, Debug)]
pub struct CopyProgress {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    started: Instant,
    tables: Vec<Counters>,
    index: HashMap<QualifiedName, usize>,
    /// Told of each table that gets its last part, small ones left out.
    whole: watch::Sender<()>,
}

#[derive(Debug, Default)]
struct Counters {
    name: Option<QualifiedName>,
    rows_estimate: u64,
    /// Size on the source, TOAST included.
    weight: u64,
    parts: AtomicU64,
    parts_done: AtomicU64,
    /// Those of an earlier run among them.
    rows: AtomicU64,
    bytes: AtomicU64,
    /// Bytes of an earlier run: they say nothing of the speed of this one.
    bytes_before: AtomicU64,
    rows_before: AtomicU64,
}

/// How far one table is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TableProgress {
    /// Which table.
    pub name: QualifiedName,
    /// Rows copied, those under way included.
    pub rows: u64,
    /// What the planner believes it holds; 0 where it was never analyzed.
    pub rows_estimate: u64,
    /// Bytes of COPY data, those under way included.
    pub bytes: u64,
    /// Bytes it takes on the source.
    pub weight: u64,
    /// Parts done.
    pub parts_done: u64,
    /// Parts; 0 before the copy has planned them.
    pub parts: u64,
}

impl TableProgress {
    /// True when all of it is on the target.
    pub fn is_done(&self) -> bool {
        self.parts > 0 && self.parts_done >= self.parts
    }
}

/// How far the copy is, at one moment.
#[derive(Clone, Debug)]
pub struct ProgressSnapshot {
    /// Rows copied, those of earlier runs included.
    pub rows: u64,
    /// Bytes of COPY data, those of earlier runs included.
    pub bytes: u64,
    /// Rows a second, on average since this run began.
    pub rows_per_second: f64,
    /// Bytes a second, likewise.
    pub bytes_per_second: f64,
    /// 0 to 1, by the size of tables on the source.
    pub fraction: f64,
    /// Time left at this speed; `None` while nothing can be said.
    pub left: Option<Duration>,
    /// Largest first.
    pub tables: Vec<TableProgress>,
}

impl CopyProgress {
    /// For a copy of these tables; the clock starts now.
    pub fn new(tables: &[Table]) -> Self {
        let tables: Vec<Counters> = order(tables)
            .into_iter()
            .map(|table| Counters {
                name: Some(table.name.clone()),
                rows_estimate: table.rows_estimate.max(0.0) as u64,
                weight: weight(table),
                ..Counters::default()
            })
            .collect();
        let index = tables
            .iter()
            .enumerate()
            .filter_map(|(at, table)| table.name.clone().map(|name| (name, at)))
            .collect();
        let whole = watch::Sender::new(());
        CopyProgress { inner: Arc::new(Inner { started: Instant::now(), tables, index, whole }) }
    }

    /// Changes whenever another table that is not small may be there wholly: see [`super::whole`].
    pub fn whole(&self) -> watch::Receiver<()> {
        self.inner.whole.subscribe()
    }

    fn counters(&self, table: &QualifiedName) -> Option<&Counters> {
        self.inner.index.get(table).and_then(|at| self.inner.tables.get(*at))
    }

    /// Sets what a table has from earlier runs.
    pub(super) fn resume(
        &self,
        table: &QualifiedName,
        parts: u64,
        done: u64,
        rows: u64,
        bytes: u64,
    ) {
        if let Some(counters) = self.counters(table) {
            counters.parts.store(parts, Ordering::Relaxed);
            counters.parts_done.store(done, Ordering::Relaxed);
            for (counter, value) in [
                (&counters.rows, rows),
                (&counters.rows_before, rows),
                (&counters.bytes, bytes),
                (&counters.bytes_before, bytes),
            ] {
                counter.store(value, Ordering::Relaxed);
            }
            self.tell(counters);
        }
    }

    /// Counts rows and bytes under way.
    pub(super) fn add(&self, table: &QualifiedName, rows: u64, bytes: u64) {
        if let Some(counters) = self.counters(table) {
            counters.rows.fetch_add(rows, Ordering::Relaxed);
            counters.bytes.fetch_add(bytes, Ordering::Relaxed);
        }
    }

    /// Takes them back: the part they were of has failed.
    pub(super) fn take_back(&self, table: &QualifiedName, rows: u64, bytes: u64) {
        if let Some(counters) = self.counters(table) {
            counters.rows.fetch_sub(rows, Ordering::Relaxed);
            counters.bytes.fetch_sub(bytes, Ordering::Relaxed);
        }
    }

    /// A part is committed.
    pub(super) fn part_done(&self, table: &QualifiedName) {
        if let Some(counters) = self.counters(table) {
            counters.parts_done.fetch_add(1, Ordering::Relaxed);
            self.tell(counters);
        }
    }

    fn tell(&self, counters: &Counters) {
        let (parts, done) = (&counters.parts, &counters.parts_done);
        let is_done = done.load(Ordering::Relaxed) >= parts.load(Ordering::Relaxed);
        if is_done && counters.weight > SMALL_BYTES {
            self.inner.whole.send_replace(());
        }
    }

    /// Where it stands now. Counters move on while they are read, so sums may be off by what is
    /// copied in that moment.
    pub fn snapshot(&self) -> ProgressSnapshot {
        let seconds = self.inner.started.elapsed().as_secs_f64().max(1e-3);
        let tables: Vec<TableProgress> = self.inner.tables.iter().filter_map(table).collect();
        let sum = |value: fn(&Counters) -> &AtomicU64| -> u64 {
            self.inner.tables.iter().map(|c| value(c).load(Ordering::Relaxed)).sum()
        };
        let (rows, bytes) = (sum(|c| &c.rows), sum(|c| &c.bytes));
        let rows_per_second = rows.saturating_sub(sum(|c| &c.rows_before)) as f64 / seconds;
        let bytes_now = bytes.saturating_sub(sum(|c| &c.bytes_before));
        let fraction = fraction(&tables);
        let before = sum(|c| &c.bytes_before) as f64 / (bytes as f64).max(1.0);
        let done_now = fraction * (1.0 - before);
        let left = (done_now > 0.0)
            .then(|| seconds / done_now * (1.0 - fraction))
            .and_then(|seconds| Duration::try_from_secs_f64(seconds.max(0.0)).ok());
        let bytes_per_second = bytes_now as f64 / seconds;
        ProgressSnapshot { rows, bytes, rows_per_second, bytes_per_second, fraction, left, tables }
    }
}

fn table(counters: &Counters) -> Option<TableProgress> {
    let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    Some(TableProgress {
        name: counters.name.clone()?,
        rows: load(&counters.rows),
        rows_estimate: counters.rows_estimate,
        bytes: load(&counters.bytes),
        weight: counters.weight,
        parts_done: load(&counters.parts_done),
        parts: load(&counters.parts),
    })
}

/// The share that is done, each table weighed by its size on the source. COPY data is smaller or
/// larger than that; how much is learned from the tables that are done.
fn fraction(tables: &[TableProgress]) -> f64 {
    let total: f64 = tables.iter().map(|t| t.weight as f64).sum();
    let done = || tables.iter().filter(|t| t.is_done());
    if total == 0.0 {
        return if done().count() == tables.len() { 1.0 } else { 0.0 };
    }
    let done_weight: f64 = done().map(|t| t.weight as f64).sum();
    let done_bytes: f64 = done().map(|t| t.bytes as f64).sum();
    let ratio = if done_bytes > 0.0 { (done_weight / done_bytes).clamp(0.2, 5.0) } else { 1.0 };
    let under_way: f64 = tables
        .iter()
        .filter(|t| !t.is_done())
        .map(|t| {
            let by_bytes = t.bytes as f64 * ratio;
            let by_rows = match t.rows_estimate {
                0 => by_bytes,
                rows => t.weight as f64 * (t.rows as f64 / rows as f64),
            };
            by_rows.min(t.weight as f64 * 0.99)
        })
        .sum();
    ((done_weight + under_way) / total).min(1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn progress(rows: u64, bytes: u64, done: bool) -> TableProgress {
        TableProgress {
            name: QualifiedName::new("s", "t"),
            rows,
            rows_estimate: 100,
            bytes,
            weight: 1000,
            parts_done: u64::from(done),
            parts: 1,
        }
    }

    #[test]
    fn the_share_done_is_weighed_by_size() {
        assert_eq!(fraction(&[]), 1.0);
        assert_eq!(fraction(&[progress(100, 500, true), progress(0, 0, false)]), 0.5);
        assert_eq!(fraction(&[progress(100, 500, true), progress(50, 9, false)]), 0.75);
        let unknown = TableProgress { rows_estimate: 0, ..progress(7, 250, false) };
        assert_eq!(fraction(&[progress(100, 500, true), unknown]), 0.75);
        let beyond = progress(1000, 9999, false);
        assert!(fraction(&[beyond]) < 1.0, "an estimate too low does not make it done");
    }
}
