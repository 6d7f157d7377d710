//! The whole job between servers of two major versions, for every pair that is asked for.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::job::{Figures, there_and_back};

/// What runs with every change: the longest way, both ends of the range, neighbours, a way down.
const CHOSEN: &str = "10-18 10-14 14-15 17-18 18-14";

/// Cells at a time: what they wait for is mostly not the processor.
const BESIDE: usize = 2;

/// A cell that takes longer has failed.
const PATIENCE: Duration = Duration::from_secs(240);

/// What became of a cell.
type Cell = (String, Duration, Result<Figures, String>);

fn pairs(text: &str) -> VecDeque<(u32, u32)> {
    text.split_whitespace()
        .map(|pair| {
            let (source, target) = pair.split_once('-').unwrap();
            (source.parse().unwrap(), target.parse().unwrap())
        })
        .collect()
}

/// One failing cell does not hide the others.
async fn cells(queue: Arc<Mutex<VecDeque<(u32, u32)>>>, done: Arc<Mutex<Vec<Cell>>>) {
    loop {
        let next = queue.lock().unwrap().pop_front();
        let Some((source, target)) = next else { return };
        let begun = Instant::now();
        let task = tokio::spawn(there_and_back((source, target)));
        let abort = task.abort_handle();
        let outcome = match tokio::time::timeout(PATIENCE, task).await {
            Ok(Ok(figures)) => Ok(figures),
            // The panic's own text is on stderr already.
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err(format!("not done after {PATIENCE:?}")),
        };
        abort.abort();
        let name = format!("{source}-{target}");
        println!("matrix: {name} {:.1?}: {outcome:?}", begun.elapsed());
        done.lock().unwrap().push((name, begun.elapsed(), outcome));
    }
}

/// `WALFERRY_PAIRS="10-18 18-13"`: others than the chosen ones; `make matrix` runs all.
#[tokio::test(flavor = "multi_thread")]
async fn every_pair_of_versions_goes_there_and_back() {
    let text = std::env::var("WALFERRY_PAIRS").unwrap_or_else(|_| CHOSEN.to_string());
    let begun = Instant::now();
    let (queue, done) = (Arc::new(Mutex::new(pairs(&text))), Arc::new(Mutex::new(Vec::new())));
    let workers = (0..BESIDE).map(|_| tokio::spawn(cells(queue.clone(), done.clone())));
    for worker in workers.collect::<Vec<_>>() {
        worker.await.unwrap();
    }
    let done = done.lock().unwrap();
    let good: Vec<&Figures> = done.iter().filter_map(|cell| cell.2.as_ref().ok()).collect();
    println!(
        "matrix: {} of {} cells exact in {:.0?}, {} transactions, {} rows compared, longest {:.1?}",
        good.len(),
        done.len(),
        begun.elapsed(),
        good.iter().map(|figures| figures.transactions).sum::<u64>(),
        good.iter().map(|figures| figures.rows).sum::<u64>(),
        done.iter().map(|cell| cell.1).max().unwrap_or_default()
    );
    let bad: Vec<&Cell> = done.iter().filter(|cell| cell.2.is_err()).collect();
    assert!(!done.is_empty() && bad.is_empty(), "{bad:?}");
}
