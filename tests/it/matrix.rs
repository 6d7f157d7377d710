//! The whole job between servers of two major versions, for every pair that is asked for.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::job::{Figures, there_and_back};

/// What runs with every change: the longest way, neighbours, a way down, each kind of reading.
const CHOSEN: &str =
    "10-18 10-14/test_decoding/pull 14-15/pgoutput/pull 17-18/test_decoding/stream 18-12";

/// Cells at a time: what they wait for is mostly not the processor.
const BESIDE: usize = 2;

/// A cell that takes longer has failed.
const PATIENCE: Duration = Duration::from_secs(240);

/// Source, target, options.
type Cell = ((u32, u32), Vec<String>);

/// A cell's name, and what became of it.
type Outcome = (String, Duration, Result<Figures, String>);

/// `10-18`, or with decoder and transport `10-18/test_decoding/pull`.
fn cell(text: &str) -> Cell {
    let mut parts = text.split('/');
    let (source, target) = parts.next().unwrap().split_once('-').unwrap();
    let options = ["--decoder", "--transport"].into_iter().zip(parts);
    let options = options.flat_map(|(name, value)| [name.to_string(), value.to_string()]);
    ((source.parse().unwrap(), target.parse().unwrap()), options.collect())
}

/// One failing cell does not hide the others.
async fn cells(queue: Arc<Mutex<VecDeque<String>>>, done: Arc<Mutex<Vec<Outcome>>>) {
    loop {
        let next = queue.lock().unwrap().pop_front();
        let Some(name) = next else { return };
        let (majors, options) = cell(&name);
        let begun = Instant::now();
        let task = tokio::spawn(async move {
            let options: Vec<&str> = options.iter().map(String::as_str).collect();
            there_and_back(majors, &options).await
        });
        let abort = task.abort_handle();
        let outcome = match tokio::time::timeout(PATIENCE, task).await {
            Ok(Ok(figures)) => Ok(figures),
            // The panic's own text is on stderr already.
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err(format!("not done after {PATIENCE:?}")),
        };
        abort.abort();
        println!("matrix: {name} {:.1?}: {outcome:?}", begun.elapsed());
        done.lock().unwrap().push((name, begun.elapsed(), outcome));
    }
}

/// `WALFERRY_PAIRS="10-18 18-13"`: others than the chosen ones; `make matrix` runs all.
#[tokio::test(flavor = "multi_thread")]
async fn every_pair_of_versions_goes_there_and_back() {
    let text = std::env::var("WALFERRY_PAIRS").unwrap_or_else(|_| CHOSEN.to_string());
    let begun = Instant::now();
    let queue: VecDeque<String> = text.split_whitespace().map(str::to_string).collect();
    let (queue, done) = (Arc::new(Mutex::new(queue)), Arc::new(Mutex::new(Vec::new())));
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
    let bad: Vec<&Outcome> = done.iter().filter(|cell| cell.2.is_err()).collect();
    assert!(!done.is_empty() && bad.is_empty(), "{bad:?}");
}
