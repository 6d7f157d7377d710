//! Random transactions in progress, interleaved and with savepoints, held against a model that
//! knows what each of them comes to.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::io::ErrorKind;

use super::*;

/// Files in memory, that may refuse.
#[derive(Clone, Debug, Default)]
struct Memory {
    room: Option<usize>,
}

struct Pieces {
    pieces: Vec<Vec<Change>>,
    room: Option<usize>,
}

impl Spill for Memory {
    fn create(&self) -> io::Result<Box<dyn SpillFile>> {
        Ok(Box::new(Pieces { pieces: Vec::new(), room: self.room }))
    }
}

impl SpillFile for Pieces {
    fn append(&mut self, piece: &[Change]) -> io::Result<()> {
        if self.room.is_some_and(|room| self.pieces.len() >= room) {
            return Err(ErrorKind::StorageFull.into());
        }
        self.pieces.push(piece.to_vec());
        Ok(())
    }

    fn read(&mut self, index: usize) -> io::Result<Vec<Change>> {
        Ok(self.pieces[index].clone())
    }

    fn truncate(&mut self, count: usize) -> io::Result<()> {
        self.pieces.truncate(count);
        Ok(())
    }
}

fn streams() -> Streams {
    Streams::new("s", Some(Arc::new(Memory::default())))
}

fn change(number: u64) -> Change {
    let content = bytes::Bytes::from(number.to_string());
    Change::Message { transactional: true, lsn: Lsn(number), prefix: String::new(), content }
}

fn number(change: &Change) -> u64 {
    match change {
        Change::Message { lsn, .. } => lsn.0,
        _ => panic!("{change:?}"),
    }
}

fn commit_at(lsn: u64) -> Commit {
    Commit { commit_lsn: Lsn(lsn), end_lsn: Lsn(lsn + 1), commit_time: PgTimestamp(0) }
}

fn start(xid: u32, first: bool) -> Event {
    Event::StreamStart { xid, first }
}

fn row(subxid: u32, number: u64) -> Event {
    Event::Change { xid: Some(subxid), change: change(number) }
}

fn abort(xid: u32, subxid: u32) -> Event {
    Event::StreamAbort { xid, subxid, at: None }
}

async fn give(streams: &mut Streams, events: impl IntoIterator<Item = Event>) {
    for event in events {
        assert_eq!(streams.take(event).await.unwrap(), None);
    }
}

/// Commits, and gives the changes that the transaction comes to.
async fn commit(streams: &mut Streams, xid: u32, lsn: u64) -> Vec<u64> {
    give(streams, [Event::StreamCommit { xid, commit: commit_at(lsn) }]).await;
    let Some(Event::Begin(begin)) = streams.next().await.unwrap() else { panic!("no BEGIN") };
    assert_eq!((begin.xid, begin.commit_lsn), (xid, Lsn(lsn)));
    let mut numbers = Vec::new();
    loop {
        match streams.next().await.unwrap() {
            Some(Event::Change { xid: None, change }) => numbers.push(number(&change)),
            Some(Event::Commit(commit)) => {
                assert_eq!(commit, commit_at(lsn));
                assert!(streams.next().await.unwrap().is_none());
                return numbers;
            }
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn what_is_rolled_back_goes_and_what_comes_between_passes() {
    let mut streams = streams();
    let stop = || Event::StreamStop;
    give(&mut streams, [start(700, true), row(700, 1), row(701, 2), row(702, 3), stop()]).await;
    let begin = Event::Begin(Begin {
        xid: 705,
        commit_lsn: Lsn(9),
        commit_time: PgTimestamp(0),
        origin: None,
        ending: Default::default(),
    });
    assert_eq!(streams.take(begin.clone()).await.unwrap(), Some(begin));
    give(&mut streams, [start(800, true), row(800, 4), stop()]).await;
    give(&mut streams, [abort(700, 701), abort(700, 702)]).await;
    give(&mut streams, [start(700, false), row(703, 5), row(700, 6), stop()]).await;
    give(&mut streams, [start(900, true), row(900, 7), stop(), abort(900, 900)]).await;
    give(&mut streams, [abort(900, 901), abort(950, 951), abort(950, 950)]).await;
    assert_eq!(commit(&mut streams, 800, 20).await, [4]);
    assert_eq!(commit(&mut streams, 700, 30).await, [1, 5, 6]);
    assert!(streams.under_way.is_empty());
}

#[tokio::test]
async fn an_origin_is_told_before_the_first_change() {
    let mut streams = streams();
    let origin = Event::Origin { lsn: Lsn(0), name: "elsewhere".to_string() };
    give(&mut streams, [start(1, true), origin, row(1, 1), Event::StreamStop]).await;
    give(&mut streams, [Event::StreamCommit { xid: 1, commit: commit_at(5) }]).await;
    let Some(Event::Begin(begin)) = streams.next().await.unwrap() else { panic!("no BEGIN") };
    assert_eq!(begin.origin.as_deref(), Some("elsewhere"));
}

#[tokio::test]
async fn messages_out_of_place_are_errors() {
    let bad: &[&[Event]] = &[
        &[start(1, false)],
        &[start(1, true), start(2, true)],
        &[start(1, true), Event::StreamStop, start(1, true)],
        &[Event::StreamCommit { xid: 1, commit: commit_at(1) }],
        &[start(1, true), Event::StreamCommit { xid: 1, commit: commit_at(1) }],
        &[start(1, true), Event::Change { xid: None, change: change(1) }],
    ];
    for events in bad {
        let mut streams = streams();
        let (last, before) = events.split_last().unwrap();
        give(&mut streams, before.iter().cloned()).await;
        let error = streams.take(last.clone()).await.unwrap_err().to_string();
        assert!(error.contains("--streaming off"), "{error}");
    }
    let mut none = Streams::new("s", None);
    assert_eq!(none.take(start(1, true)).await.unwrap(), Some(start(1, true)));
}

#[tokio::test]
async fn no_room_is_told_and_may_be_tried_again() {
    use crate::fault::{Fault, Faulty};
    let mut streams = Streams::new("s", Some(Arc::new(Memory { room: Some(1) })));
    let once = || [start(1, true), row(1, 1), Event::StreamStop];
    give(&mut streams, once()).await;
    give(&mut streams, [start(1, false), row(1, 2)]).await;
    let error = streams.take(Event::StreamStop).await.unwrap_err();
    assert_eq!(error.fault(), Fault::Retry);
    assert!(error.to_string().contains("--streaming-limit"), "{error}");
}

/// A transaction of the model: what it would commit, what was sent of it, and its savepoints.
struct Model {
    xid: u32,
    /// Changes that are still part of it, with who made them; how many of them were sent.
    changes: Vec<(u32, u64)>,
    sent: usize,
    begun: bool,
    /// Open subtransactions: xid, and where they begin in `changes`.
    open: Vec<(u32, usize)>,
    /// Ended ones that were kept, and how many open ones they are below.
    kept: Vec<(u32, usize)>,
    /// Something was sent since these began to write.
    streamed: Vec<u32>,
}

impl Model {
    fn current(&self) -> u32 {
        self.open.last().map_or(self.xid, |(xid, _)| *xid)
    }

    /// A block of all that was not sent.
    fn block(&mut self) -> Vec<Event> {
        let mut events = vec![start(self.xid, !self.begun)];
        events.extend(self.changes[self.sent..].iter().map(|(xid, n)| row(*xid, *n)));
        events.push(Event::StreamStop);
        (self.begun, self.sent) = (true, self.changes.len());
        self.streamed = self.open.iter().chain(&self.kept).map(|(xid, _)| *xid).collect();
        events
    }

    /// Rolls back to the last savepoint.
    fn rollback(&mut self) -> Vec<Event> {
        let Some((xid, from)) = self.open.pop() else { return Vec::new() };
        let depth = self.open.len();
        let mut gone: Vec<u32> =
            self.kept.iter().filter(|(_, d)| *d > depth).map(|(xid, _)| *xid).collect();
        self.kept.retain(|(_, d)| *d <= depth);
        gone.push(xid);
        gone.retain(|xid| self.streamed.contains(xid));
        self.changes.truncate(from);
        self.sent = self.sent.min(from);
        gone.into_iter().map(|subxid| abort(self.xid, subxid)).collect()
    }

    fn release(&mut self) {
        if let Some((xid, _)) = self.open.pop() {
            let depth = self.open.len();
            self.kept.push((xid, depth));
            // What was kept below it is now kept with it.
            for (_, d) in &mut self.kept {
                *d = (*d).min(depth);
            }
        }
    }
}

#[tokio::test]
async fn random_transactions_come_to_what_they_would_without_streaming() {
    for seed in 0..400 {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut streams = streams();
        let (mut next_xid, mut next, mut lsn) = (10, 0, 100);
        let mut models: Vec<Model> = Vec::new();
        for _ in 0..300 {
            if models.len() < 3 {
                next_xid += 1;
                models.push(Model {
                    xid: next_xid,
                    changes: Vec::new(),
                    sent: 0,
                    begun: false,
                    open: Vec::new(),
                    kept: Vec::new(),
                    streamed: Vec::new(),
                });
            }
            let at = random.usize(0..models.len());
            let model = &mut models[at];
            match random.u32(0..100) {
                0..50 => {
                    next += 1;
                    model.changes.push((model.current(), next));
                }
                50..62 => {
                    next_xid += 1;
                    model.open.push((next_xid, model.changes.len()));
                }
                62..70 => model.release(),
                70..80 => give(&mut streams, model.rollback()).await,
                80..94 => give(&mut streams, model.block()).await,
                94..98 if model.begun => {
                    give(&mut streams, model.block()).await;
                    let model = models.swap_remove(at);
                    lsn += 10;
                    let expected: Vec<u64> = model.changes.iter().map(|(_, n)| *n).collect();
                    assert_eq!(commit(&mut streams, model.xid, lsn).await, expected, "{seed}");
                }
                98.. if model.begun => {
                    let model = models.swap_remove(at);
                    give(&mut streams, [abort(model.xid, model.xid)]).await;
                }
                _ => {}
            }
        }
    }
}
