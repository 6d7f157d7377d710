//! Runs the benchmarks in a child, and holds what divan prints against the bars.

use std::collections::BTreeMap;
use std::process::{Command, Stdio};

/// Set for the child.
const CHILD: &str = "WALFERRY_DECODE_BENCH";

/// pgoutput, 8 columns, in nanoseconds.
const PGOUTPUT_NS_MAX: f64 = 60.0;

/// A textual decoder to pgoutput, 8 columns.
const RATIO_MAX: f64 = 15.0;

/// Medians of one benchmark.
#[derive(Clone, Copy, Debug, Default)]
struct Measured {
    ns: f64,
    allocations: Option<f64>,
}

/// True in the child.
pub fn is_child() -> bool {
    std::env::var_os(CHILD).is_some()
}

/// Runs and judges; true if every bar is held. Those of benchmarks that were not asked for are not.
pub fn run() -> bool {
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(std::env::args().skip(1)).env(CHILD, "1").stderr(Stdio::inherit());
    let output = child.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    println!("{text}");
    let measured = read(&text);
    assert!(output.status.success() && !measured.is_empty(), "nothing was measured");
    let mut held = true;
    let mut judge = |what: String, within: bool| {
        println!("{}  {what}", if within { "held  " } else { "MISSED" });
        held &= within;
    };
    let of = |decoder: &str, columns: &str| measured.get(&format!("{decoder}/{columns}")).copied();
    let first = of("pgoutput", "8");
    if let Some(Measured { ns, .. }) = first {
        let what = format!("pgoutput, 8 columns: {ns:.1} ns (under {PGOUTPUT_NS_MAX})");
        judge(what, ns < PGOUTPUT_NS_MAX);
    }
    for decoder in ["wal2json", "test_decoding"] {
        if let (Some(first), Some(other)) = (first, of(decoder, "8")) {
            let ratio = other.ns / first.ns;
            let what = format!("{decoder}, 8 columns: {:.0} ns, {ratio:.1} times", other.ns);
            judge(format!("{what} (at most {RATIO_MAX})"), ratio <= RATIO_MAX);
        }
    }
    for decoder in ["pgoutput", "wal2json", "test_decoding"] {
        if let (Some(few), Some(many)) = (of(decoder, "8"), of(decoder, "32")) {
            let counts = (few.allocations.unwrap_or(0.0), many.allocations.unwrap_or(0.0));
            let what = format!("{decoder}, allocations: {} and {} (equal)", counts.0, counts.1);
            judge(what, counts.0 == counts.1);
        }
    }
    held
}

/// Medians by `group/argument`, from divan's table: `├─ 8  fastest │ slowest │ median │ ...`, under
/// each a line `alloc:` and one with the counts.
fn read(text: &str) -> BTreeMap<String, Measured> {
    let mut measured: BTreeMap<String, Measured> = BTreeMap::new();
    let (mut group, mut leaf, mut allocs) = (String::new(), String::new(), false);
    for line in text.lines() {
        let cells: Vec<&str> = line.rsplitn(6, '│').collect();
        let [_, _, _, median, _, head] = cells.as_slice() else { continue };
        let tree = |c: char| "│├╰─ \u{a0}".contains(c);
        let words: Vec<&str> = head.trim_matches(tree).split_whitespace().collect();
        match (words.as_slice(), time(median)) {
            (["alloc:"], _) => allocs = true,
            ([name, ..], Some(ns)) => {
                leaf = format!("{group}/{name}");
                measured.entry(leaf.clone()).or_default().ns = ns;
            }
            ([_count], None) if allocs => {
                allocs = false;
                if let Some(measured) = measured.get_mut(&leaf) {
                    measured.allocations = median.trim().parse().ok();
                }
            }
            ([name], None) if median.trim().is_empty() && !name.ends_with(':') => {
                group = name.to_string();
            }
            _ => {}
        }
    }
    measured
}

/// `45.1 ns` or `1.2 µs`, in nanoseconds.
fn time(cell: &str) -> Option<f64> {
    let (number, unit) = cell.trim().split_once(' ')?;
    let factor = match unit {
        "ps" => 1e-3,
        "ns" => 1.0,
        "µs" => 1e3,
        "ms" => 1e6,
        _ => return None,
    };
    number.parse::<f64>().ok().map(|number| number * factor)
}
