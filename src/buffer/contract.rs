//! The obligations of a buffer as checks that any implementation can run.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use super::{Make, MakeDurable};
use crate::change::Feed;
use crate::change::{Begin, Change, Chunk, Commit, Item, Sink};
#[cfg(test)]
use crate::change::{Column, Ending, OldRow, Relation, ReplicaIdentity, RowBuilder, Value};
#[cfg(test)]
use crate::id::QualifiedName;
use crate::lsn::Lsn;

/// A check that should pass at once is given up after this.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long something that must wait is watched waiting.
const WATCH: Duration = Duration::from_millis(30);

/// Runs every check on fresh buffers; an error says which obligation is broken.
///
/// `#[tokio::test]` with one thread and with several are both worth it.
pub async fn check<M: Make>(make: &M) -> Result<(), String> {
    order_is_kept(make).await?;
    bytes_are_bounded(make).await?;
    full_blocks_and_unblocks(make).await?;
    a_large_item_is_let_in_alone(make).await?;
    nothing_is_lost_when_the_sender_closes(make).await?;
    a_waiting_pop_ends_when_the_sender_closes(make).await?;
    push_fails_when_the_receiver_closes(make).await?;
    pop_is_cancel_safe(make).await
}

/// Runs every check of a durable buffer beyond [`check`].
pub async fn check_durable<M: MakeDurable>(make: &M) -> Result<(), String> {
    what_is_durable_is_there_after_opening_again(make).await?;
    a_feed_begins_at_its_position(make).await?;
    what_is_pushed_again_is_dropped(make).await?;
    a_push_needs_no_reader(make).await
}

async fn until_durable<M: MakeDurable>(
    make: &M,
    buffer: &M::Buffer,
    number: u64,
) -> Result<(), String> {
    let mut durable = make.durable(buffer);
    let waiting = durable.wait_for(|lsn| lsn.0 > number * 2);
    soon("durability", waiting).await?.map(|_| ()).map_err(|e| e.to_string())
}

async fn fill<M: MakeDurable>(
    make: &M,
    buffer: &M::Buffer,
    numbers: std::ops::RangeInclusive<u64>,
) -> Result<M::Sink, String> {
    let (mut sink, last) = (make.sink(buffer), *numbers.end());
    for number in numbers {
        soon("room", sink.push(item(number, 100))).await?.map_err(|e| e.to_string())?;
    }
    until_durable(make, buffer, last).await?;
    Ok(sink)
}

async fn expect<F: Feed>(
    feed: &mut F,
    numbers: std::ops::RangeInclusive<u64>,
    obligation: &str,
) -> Result<(), String> {
    for number in numbers {
        ensure(soon(obligation, feed.pop()).await? == Some(item(number, 100)), obligation)?;
    }
    Ok(())
}

async fn what_is_durable_is_there_after_opening_again<M: MakeDurable>(
    make: &M,
) -> Result<(), String> {
    let place = make.place();
    for round in 0..3 {
        let buffer = make.open(&place);
        let mut feed = make.feed(&buffer, Lsn::ZERO);
        expect(&mut feed, 1..=round * 100, "what was durable is there, in order").await?;
        let sink = fill(make, &buffer, round * 100 + 1..=(round + 1) * 100).await?;
        expect(&mut feed, round * 100 + 1..=(round + 1) * 100, "and goes on").await?;
        drop(sink);
        ensure(soon("the end", feed.pop()).await?.is_none(), "nothing comes twice")?;
        make.close(buffer).await;
    }
    Ok(())
}

async fn a_feed_begins_at_its_position<M: MakeDurable>(make: &M) -> Result<(), String> {
    let place = make.place();
    let buffer = make.open(&place);
    let sink = fill(make, &buffer, 1..=300).await?;
    for number in [250, 17, 299, 100] {
        // One after another, also back to what was not released.
        let mut feed = make.feed(&buffer, Lsn(number * 2 + 1));
        expect(&mut feed, number + 1..=300, "a feed begins behind its position").await?;
    }
    make.release(&buffer, Lsn(201));
    let mut feed = make.feed(&buffer, Lsn(201));
    expect(&mut feed, 101..=300, "a release takes nothing beyond its position").await?;
    drop(sink);
    make.close(buffer).await;
    let buffer = make.open(&place);
    let mut feed = make.feed(&buffer, Lsn(401));
    expect(&mut feed, 201..=300, "nor does opening again").await?;
    make.close(buffer).await;
    Ok(())
}

async fn what_is_pushed_again_is_dropped<M: MakeDurable>(make: &M) -> Result<(), String> {
    let place = make.place();
    let buffer = make.open(&place);
    drop(fill(make, &buffer, 1..=20).await?);
    make.close(buffer).await;
    let buffer = make.open(&place);
    let sink = fill(make, &buffer, 11..=30).await?;
    let mut feed = make.feed(&buffer, Lsn::ZERO);
    expect(&mut feed, 1..=30, "what is pushed again comes once").await?;
    drop(sink);
    ensure(soon("the end", feed.pop()).await?.is_none(), "nothing comes twice")?;
    make.close(buffer).await;
    Ok(())
}

async fn a_push_needs_no_reader<M: MakeDurable>(make: &M) -> Result<(), String> {
    let place = make.place();
    let buffer = make.open(&place);
    let sink = fill(make, &buffer, 1..=10).await?;
    drop(make.feed(&buffer, Lsn::ZERO));
    drop(sink);
    let sink = fill(make, &buffer, 11..=20).await?;
    let mut feed = make.feed(&buffer, Lsn::ZERO);
    expect(&mut feed, 1..=20, "a reader that comes finds everything").await?;
    drop(sink);
    make.close(buffer).await;
    Ok(())
}

/// A transaction of one message of `bytes` bytes, ending at `number`.
pub fn item(number: u64, bytes: usize) -> Item {
    let change = Change::Message {
        transactional: true,
        lsn: Lsn(number),
        prefix: "contract".to_string(),
        content: Bytes::from(vec![b'x'; bytes]),
    };
    let commit_time = Default::default();
    let (commit_lsn, end_lsn) = (Lsn(number * 2), Lsn(number * 2 + 1));
    Item::Chunk(Chunk {
        begin: Arc::new(Begin {
            xid: number as u32,
            commit_lsn,
            commit_time,
            origin: None,
            ending: Default::default(),
        }),
        number: 0,
        bytes: change.bytes(),
        changes: vec![change],
        commit: Some(Commit { commit_lsn, end_lsn, commit_time }),
    })
}

/// Items of every kind, with relations, in transactions of one chunk and of several, and idle
/// positions between them.
#[cfg(test)]
pub(super) fn samples(random: &mut fastrand::Rng, count: usize) -> Vec<Item> {
    let (mut items, mut lsn, mut relations) = (Vec::new(), 10, vec![relation(random)]);
    while items.len() < count {
        lsn += random.u64(2..30);
        if random.u8(0..8) == 0 {
            items.push(Item::Idle { lsn: Lsn(lsn) });
            continue;
        }
        if random.u8(0..6) == 0 {
            relations.push(relation(random));
        }
        let (commit_lsn, end_lsn) = (Lsn(lsn), Lsn(lsn + 1));
        let origin = random.bool().then(|| "elsewhere".to_string());
        let commit_time = crate::clock::PgTimestamp(lsn as i64);
        let gid = || lsn.to_string();
        let ending = match random.u8(0..12) {
            0 => Ending::Prepare(gid()),
            1 => Ending::CommitPrepared(gid()),
            2 => Ending::RollbackPrepared(gid()),
            _ => Ending::Commit,
        };
        let begin = Arc::new(Begin { xid: lsn as u32, commit_lsn, commit_time, origin, ending });
        let last = if random.u8(0..5) == 0 { random.u32(1..4) } else { 0 };
        for number in 0..=last {
            let kinds = 0..random.usize(0..6);
            let changes: Vec<Change> = kinds.map(|_| change(random, &relations)).collect();
            items.push(Item::Chunk(Chunk {
                begin: begin.clone(),
                number,
                bytes: changes.iter().map(Change::bytes).sum(),
                changes,
                commit: (number == last).then_some(Commit { commit_lsn, end_lsn, commit_time }),
            }));
        }
        lsn += 1;
    }
    items
}

#[cfg(test)]
fn relation(random: &mut fastrand::Rng) -> Arc<Relation> {
    let column = |i: u32| Column {
        name: format!("c{i}"),
        type_oid: 20 + i,
        type_modifier: i as i32 - 1,
        key: i == 0,
    };
    Arc::new(Relation {
        oid: random.u32(..),
        name: QualifiedName::new("s", format!("t{}", random.u8(..))),
        identity: ReplicaIdentity::from_letter(*b"dnfi".get(random.usize(..4)).unwrap_or(&b'd'))
            .unwrap_or(ReplicaIdentity::Full),
        columns: (0..random.u32(1..4)).map(column).collect(),
    })
}

#[cfg(test)]
fn change(random: &mut fastrand::Rng, relations: &[Arc<Relation>]) -> Change {
    let relation = random.choice(relations).cloned().unwrap_or_else(|| unreachable!());
    let mut row = || {
        let mut builder = RowBuilder::new();
        builder.push(Value::Null);
        let text = "compressible ".repeat(random.usize(..80)).into_bytes();
        builder.push(if random.bool() { Value::Text(&text) } else { Value::Unchanged });
        builder.push(Value::Binary(&random.u64(..).to_be_bytes()));
        builder.finish()
    };
    let (old, new) = (row(), row());
    match random.u8(0..7) {
        0 => Change::Insert { relation, new },
        1 => Change::Update { relation, old: None, new },
        2 => Change::Update { relation, old: Some(OldRow::Key(old)), new },
        3 => Change::Update { relation, old: Some(OldRow::Full(old)), new },
        4 => Change::Delete { relation, old: OldRow::Full(old) },
        5 => Change::Truncate {
            relations: relations.to_vec(),
            cascade: random.bool(),
            restart_identity: random.bool(),
        },
        _ => Change::Message {
            transactional: random.bool(),
            lsn: Lsn(random.u64(..)),
            prefix: "p".to_string(),
            content: new.as_bytes().clone(),
        },
    }
}

fn ensure(condition: bool, obligation: &str) -> Result<(), String> {
    if condition { Ok(()) } else { Err(obligation.to_string()) }
}

async fn soon<T>(what: &str, future: impl Future<Output = T>) -> Result<T, String> {
    tokio::time::timeout(PATIENCE, future).await.map_err(|_| format!("{what}: never came"))
}

async fn order_is_kept<M: Make>(make: &M) -> Result<(), String> {
    let (mut sink, mut outlet) = make.make(4096);
    let writer = tokio::spawn(async move {
        for number in 1..=2000 {
            sink.push(item(number, (number % 500) as usize)).await?;
        }
        Ok::<_, crate::change::SinkClosed>(())
    });
    for number in 1..=2000 {
        // Both ways of reading give the same order.
        let got = match outlet.try_pop() {
            Some(got) => Some(got),
            None => soon("an item", outlet.pop()).await?,
        };
        ensure(got == Some(item(number, (number % 500) as usize)), "items keep their order")?;
    }
    ensure(soon("the end", outlet.pop()).await?.is_none(), "nothing comes twice")?;
    let pushed = writer.await.map_err(|e| e.to_string())?;
    ensure(pushed.is_ok(), "push succeeds while the receiver lives")
}

async fn bytes_are_bounded<M: Make>(make: &M) -> Result<(), String> {
    let limit_bytes = 8192;
    let (mut sink, mut outlet) = make.make(limit_bytes);
    let writer = tokio::spawn(async move {
        for number in 1..=500 {
            let _ = sink.push(item(number, 700)).await;
        }
    });
    let mut most = 0;
    loop {
        tokio::task::yield_now().await;
        most = most.max(make.bytes(&outlet));
        if soon("an item", outlet.pop()).await?.is_none() {
            break;
        }
    }
    writer.await.map_err(|e| e.to_string())?;
    drained(make, &outlet).await?;
    ensure(most > 0, "bytes held are counted")?;
    ensure(most <= limit_bytes, "bytes held never exceed the limit")
}

async fn drained<M: Make>(make: &M, outlet: &M::Feed) -> Result<(), String> {
    let empty = async {
        while make.bytes(outlet) > 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    soon("an empty buffer holds no bytes", empty).await
}

async fn full_blocks_and_unblocks<M: Make>(make: &M) -> Result<(), String> {
    let bytes = make.cost(&item(1, 100));
    let (mut sink, mut outlet) = make.make(bytes * 2);
    soon("room", sink.push(item(1, 100))).await?.map_err(|e| e.to_string())?;
    soon("room", sink.push(item(2, 100))).await?.map_err(|e| e.to_string())?;
    let mut third = Box::pin(sink.push(item(3, 100)));
    let early = tokio::time::timeout(WATCH, &mut third).await;
    ensure(early.is_err(), "a full buffer makes push wait")?;
    ensure(make.bytes(&outlet) <= bytes * 2, "a waiting push holds nothing in the buffer")?;
    for number in 1..=2 {
        let got = soon("an item", outlet.pop()).await?;
        ensure(got == Some(item(number, 100)), "what waits does not overtake")?;
    }
    soon("room after pop", third).await?.map_err(|e| e.to_string())?;
    let got = soon("an item", outlet.pop()).await?;
    ensure(got == Some(item(3, 100)), "a push that waited arrives")
}

async fn a_large_item_is_let_in_alone<M: Make>(make: &M) -> Result<(), String> {
    let (mut sink, mut outlet) = make.make(512);
    soon("room for a large item", sink.push(item(1, 4096))).await?.map_err(|e| e.to_string())?;
    let mut second = Box::pin(sink.push(item(2, 1)));
    let early = tokio::time::timeout(WATCH, &mut second).await;
    ensure(early.is_err(), "nothing joins an item over the limit")?;
    let got = soon("the large item", outlet.pop()).await?;
    ensure(got == Some(item(1, 4096)), "an item over the limit passes")?;
    soon("room after it", second).await?.map_err(|e| e.to_string())
}

async fn nothing_is_lost_when_the_sender_closes<M: Make>(make: &M) -> Result<(), String> {
    let (mut sink, mut outlet) = make.make(1 << 16);
    for number in 1..=10 {
        soon("room", sink.push(item(number, 10))).await?.map_err(|e| e.to_string())?;
    }
    drop(sink);
    for number in 1..=10 {
        let got = soon("an item", outlet.pop()).await?;
        ensure(got == Some(item(number, 10)), "what was pushed comes out after a close")?;
    }
    ensure(soon("the end", outlet.pop()).await?.is_none(), "then None comes")?;
    ensure(soon("the end", outlet.pop()).await?.is_none(), "and None again")?;
    ensure(outlet.try_pop().is_none(), "also without waiting")
}

async fn a_waiting_pop_ends_when_the_sender_closes<M: Make>(make: &M) -> Result<(), String> {
    let (sink, mut outlet) = make.make(1 << 16);
    let mut waiting = Box::pin(outlet.pop());
    let early = tokio::time::timeout(WATCH, &mut waiting).await;
    ensure(early.is_err(), "an empty buffer makes pop wait")?;
    drop(sink);
    ensure(soon("the end", waiting).await?.is_none(), "a close ends a waiting pop")
}

async fn push_fails_when_the_receiver_closes<M: Make>(make: &M) -> Result<(), String> {
    let (mut sink, outlet) = make.make(make.cost(&item(1, 100)));
    soon("room", sink.push(item(1, 100))).await?.map_err(|e| e.to_string())?;
    let mut waiting = Box::pin(sink.push(item(2, 100)));
    let early = tokio::time::timeout(WATCH, &mut waiting).await;
    ensure(early.is_err(), "a full buffer makes push wait")?;
    drop(outlet);
    ensure(soon("the refusal", waiting).await?.is_err(), "a close ends a waiting push")?;
    let after = soon("the refusal", sink.push(item(3, 1))).await?;
    ensure(after.is_err(), "push fails after the receiver is gone")
}

async fn pop_is_cancel_safe<M: Make>(make: &M) -> Result<(), String> {
    let (mut sink, mut outlet) = make.make(2048);
    let writer = tokio::spawn(async move {
        for number in 1..=300 {
            let _ = sink.push(item(number, 50)).await;
            if number % 3 == 0 {
                tokio::task::yield_now().await;
            }
        }
    });
    let mut next = 1;
    while next <= 300 {
        // The future is dropped at its first wait, again and again.
        let got = tokio::select! {
            biased;
            got = outlet.pop() => got,
            () = tokio::task::yield_now() => continue,
        };
        ensure(got == Some(item(next, 50)), "a dropped pop loses nothing")?;
        next += 1;
    }
    writer.await.map_err(|e| e.to_string())?;
    ensure(soon("the end", outlet.pop()).await?.is_none(), "nothing comes twice")
}
