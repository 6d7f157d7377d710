//! One stream through a spool: reading and applying, each kept going by itself.
//!
//! The reader fills the spool whatever the target does, and the applier empties it whatever the
//! source does. Each begins again from where it stands after a fault that may mend itself: the
//! reader at the spool's end, the applier at the target's progress. What is said of a spool here
//! goes for a topic as well, where the two ends may be two processes: [`Half`]. The slot is told
//! what is
//! durable on the target; only when the source keeps too much WAL for it, what is durable in the
//! spool.
//!
//! A slot that is read by SQL gives again what it was not told of. So a pull rests after each full
//! chunk until the slot was told, and does not get further ahead of the target than the source's
//! budget of WAL makes it.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;

use super::Result;
use super::mapped;
use super::opening::{Half, SpoolOptions, not_lost, open_once};
use super::pipeline::{Ends, PipeOptions, SpoolState, Task, Visibility, flatten};
use super::place::wal_budget;
use crate::apply::{self, Applied};
use crate::buffer::durable::Durable;
use crate::clock::Backoff;
use crate::fault::{Fault, Faulty};
use crate::lsn::Lsn;
use crate::pg::{Purpose, Session};
use crate::source::{Positions, slot};

/// How often the read side is asked how much WAL it keeps.
const BUDGET_TURN: Duration = Duration::from_secs(1);

/// What is being tried again, at the reading end, at the writing end, and on the disk.
struct Troubles {
    slots: Mutex<[Option<String>; 3]>,
    out: watch::Sender<Option<String>>,
}

const READING: usize = 0;
const APPLYING: usize = 1;
const DISK: usize = 2;

impl Troubles {
    fn set(&self, which: usize, trouble: Option<String>) {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(slot) = slots.get_mut(which) {
            *slot = trouble;
        }
        let all: Vec<String> = slots.iter().flatten().cloned().collect();
        drop(slots);
        let all = (!all.is_empty()).then(|| all.join("; "));
        self.out.send_if_modified(|last| {
            let modified = *last != all;
            *last = all;
            modified
        });
    }
}

/// What the loops share.
#[derive(Clone)]
struct Joint {
    options: PipeOptions,
    spool: Arc<Durable>,
    troubles: Arc<Troubles>,
    stop: watch::Receiver<bool>,
}

/// Runs the stream until it is told to stop or meets what a person must mend.
pub(super) async fn run(options: &PipeOptions, mut ends: Ends) -> Result<()> {
    let Some(wanted) = options.spool.clone() else { return Ok(()) };
    let troubles = Troubles { slots: Mutex::default(), out: ends.trouble.clone() };
    let troubles = Arc::new(troubles);
    let mut pause = backoff();
    loop {
        let before = ends.applied.borrow().applied_lsn;
        let outcome = run_once(options, &wanted, &troubles, &mut ends).await;
        let Err(error) = outcome else { return Ok(()) };
        if error.fault() != Fault::Retry {
            return Err(error);
        }
        tracing::warn!(stream = %options.stream, %error, "opening again");
        troubles.set(READING, Some(error.to_string()));
        if ends.applied.borrow().applied_lsn > before {
            pause = backoff();
        }
        tokio::select! {
            () = tokio::time::sleep(pause.step()) => {}
            _ = ends.stop.wait_for(|stop| *stop) => return Ok(()),
        }
    }
}

/// The life of one opening of the spool.
async fn run_once(
    options: &PipeOptions,
    wanted: &SpoolOptions,
    troubles: &Arc<Troubles>,
    ends: &mut Ends,
) -> Result<()> {
    let Some((opened, told_lsn)) = open(options, wanted, troubles, ends).await? else {
        return Ok(());
    };
    troubles.set(READING, None);
    let spool = Arc::new(opened);
    let stop = ends.stop.clone();
    let troubles = troubles.clone();
    let joint = Joint { options: options.clone(), spool: spool.clone(), troubles, stop };
    let (told, telling) = watch::channel(told_lsn);
    let positions = ends.positions.clone();
    let shown = (ends.applied.subscribe(), ends.spool.clone());
    let mut reading = (wanted.half != Half::Apply)
        .then(|| Task(tokio::spawn(capture(joint.clone(), telling, positions))));
    let captured = async {
        match &mut reading {
            Some(task) => flatten((&mut task.0).await),
            None => Ok(()),
        }
    };
    let outcome = tokio::select! {
        outcome = async { tokio::try_join!(captured, write(&joint, wanted, ends)) } => {
            outcome.map(|_| ())
        }
        outcome = keep_budget(&joint, wanted, &told, shown), if wanted.half != Half::Apply => {
            outcome
        }
    };
    drop(reading);
    drop(joint);
    close(spool).await;
    outcome
}

/// The writing end, as far as it is here.
async fn write(joint: &Joint, wanted: &SpoolOptions, ends: &mut Ends) -> Result<()> {
    match wanted.half {
        Half::Both => applying(joint, ends).await,
        Half::Capture => watch_target(joint, ends).await,
        Half::Apply => match applying(joint, ends).await {
            Err(error) if error.fault() == Fault::Retry => {
                not_lost(&joint.options, wanted).await?;
                Err(error)
            }
            outcome => outcome,
        },
    }
}

/// Where another process applies: what the target durably has, asked every second, until told to
/// stop.
async fn watch_target(joint: &Joint, ends: &mut Ends) -> Result<()> {
    let name = joint.options.job.object(joint.options.stream);
    let mut turn = tokio::time::interval(BUDGET_TURN);
    turn.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut session = None;
    loop {
        tokio::select! {
            _ = turn.tick() => {}
            _ = ends.stop.wait_for(|stop| *stop) => return Ok(()),
        }
        let asking = async {
            let mut to = match session.take() {
                Some(session) => session,
                None => Session::connect(&joint.options.to, Purpose::Sql).await?,
            };
            let lsns = apply::told_progress(&mut to, &name).await?;
            session = Some(to);
            Result::Ok(lsns)
        };
        let asked = tokio::time::timeout(Duration::from_secs(5), asking).await;
        // A target that is away is what the topic is for.
        let Ok(Ok((applied_lsn, told_lsn))) = asked else { continue };
        ends.applied.send_modify(|applied| {
            applied.applied_lsn = applied.applied_lsn.max(applied_lsn);
            applied.durable_lsn = applied.durable_lsn.max(told_lsn);
            // The other process may have restarted sequences on the way there.
            applied.restarted_lsn = applied.applied_lsn;
        });
    }
}

/// Waits until the spool's threads have ended, so that its directory is free again.
async fn close(spool: Arc<Durable>) {
    let mut spool = spool;
    for _ in 0..100 {
        match Arc::try_unwrap(spool) {
            Ok(owned) => {
                let _ = tokio::task::spawn_blocking(move || owned.close()).await;
                return;
            }
            // The reading task holds it until it notices that it was ended.
            Err(shared) => spool = shared,
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Opens the spool at the target's progress, trying for as long as servers are away, and gives what
/// of that the slot may be told. `None` when told to stop.
async fn open(
    options: &PipeOptions,
    wanted: &SpoolOptions,
    troubles: &Troubles,
    ends: &mut Ends,
) -> Result<Option<(Durable, Lsn)>> {
    let mut backoff = backoff();
    loop {
        match open_once(options, wanted).await {
            Ok(opened) => return Ok(Some(opened)),
            Err(error) if error.fault() == Fault::Retry => {
                troubles.set(READING, Some(error.to_string()));
            }
            Err(error) => return Err(error),
        }
        tokio::select! {
            () = tokio::time::sleep(backoff.step()) => {}
            _ = ends.stop.wait_for(|stop| *stop) => return Ok(None),
        }
    }
}

fn backoff() -> Backoff {
    Backoff::new(Duration::from_millis(100), Duration::from_secs(2))
}

/// Reads into the spool until told to stop.
async fn capture(
    joint: Joint,
    told: watch::Receiver<Lsn>,
    positions: watch::Sender<Positions>,
) -> Result<()> {
    let Some(mut sink) = joint.spool.sink() else { return Ok(()) };
    let mut stop = joint.stop.clone();
    let mut pause = backoff();
    loop {
        let before = joint.spool.end_lsn();
        if joint.options.settles_first() {
            let mut told = told.clone();
            tokio::select! {
                settled = told.wait_for(|told| *told >= before) => {
                    if settled.is_err() { return Ok(()); }
                }
                _ = stop.wait_for(|stop| *stop) => return Ok(()),
            }
        }
        let confirmed_lsn = *told.borrow();
        let opened = joint.options.open_reader(joint.spool.end_lsn(), confirmed_lsn).await;
        let ended = match opened {
            Ok(reader) => {
                joint.troubles.set(READING, None);
                let (told, stop) = (told.clone(), stop.clone());
                joint.options.read(reader, &mut sink, told, &positions, stop).await
            }
            Err(error) => Err(error),
        };
        if let Some(failure) = joint.spool.failure() {
            return Err(failure.into());
        }
        match ended {
            Ok(_) if *stop.borrow() => return Ok(()),
            Ok(_) => {}
            Err(error) if error.fault() == Fault::Retry => {
                tracing::warn!(stream = %joint.options.stream, %error, "reading again");
                joint.troubles.set(READING, Some(error.to_string()));
            }
            Err(error) => return Err(error),
        }
        if joint.spool.end_lsn() > before {
            pause = backoff();
        }
        tokio::select! {
            () = tokio::time::sleep(pause.step()) => {}
            _ = stop.wait_for(|stop| *stop) => return Ok(()),
        }
    }
}

/// Applies from the spool, while it is allowed to, until told to stop.
async fn applying(joint: &Joint, ends: &mut Ends) -> Result<()> {
    let mut pause = backoff();
    loop {
        let visibility = tokio::select! {
            allowed = ends.allowed.wait_for(Option::is_some) => match allowed {
                Ok(allowed) => allowed.clone().unwrap_or_default(),
                Err(_) => return Ok(()),
            },
            _ = ends.stop.wait_for(|stop| *stop) => return Ok(()),
        };
        let before = ends.applied.borrow().applied_lsn;
        match apply_once(joint, ends, visibility).await {
            Ok(()) if *ends.stop.borrow() => return Ok(()),
            Ok(()) => {}
            Err(error) if error.fault() == Fault::Retry => {
                tracing::warn!(stream = %joint.options.stream, %error, "applying again");
                joint.troubles.set(APPLYING, Some(error.to_string()));
            }
            Err(error) => return Err(error),
        }
        if let Some(failure) = joint.spool.failure() {
            return Err(failure.into());
        }
        if ends.applied.borrow().applied_lsn > before {
            pause = backoff();
        }
        tokio::select! {
            () = tokio::time::sleep(pause.step()) => {}
            _ = ends.stop.wait_for(|stop| *stop) => return Ok(()),
        }
    }
}

async fn apply_once(joint: &Joint, ends: &mut Ends, visibility: Visibility) -> Result<()> {
    let options = &joint.options;
    let (halt, halted) = watch::channel(false);
    let mut allowed = ends.allowed.clone();
    let mut stop = ends.stop.clone();
    let (applied, hold) = (ends.applied.clone(), ends.hold.clone());
    let work = async {
        let mut applier = options.open_applier(visibility).await?;
        let feed = joint.spool.feed(applier.progress())?;
        joint.troubles.set(APPLYING, None);
        let map = options.map.clone().map(|map| (map, options.from.clone()));
        mapped::apply(map, &mut applier, feed, (&applied, hold, halted)).await
    };
    tokio::pin!(work);
    tokio::select! {
        ended = &mut work => return ended,
        _ = allowed.wait_for(Option::is_none) => {}
        _ = stop.wait_for(|stop| *stop) => {}
    }
    let _ = halt.send(true);
    // Not for longer than a server that is silent may keep a process from ending.
    tokio::time::timeout(Duration::from_secs(8), work).await.unwrap_or(Ok(()))
}

/// Tells the slot, and the spool what it may forget. Returns only for an error.
async fn keep_budget(
    joint: &Joint,
    wanted: &SpoolOptions,
    told: &watch::Sender<Lsn>,
    (mut applied, shown): (watch::Receiver<Applied>, watch::Sender<SpoolState>),
) -> Result<()> {
    let mut durable = joint.spool.durable();
    let (mut probe, mut budget, mut over) = (None, wanted.buffer.wal_budget_bytes, false);
    let mut turn = tokio::time::interval(BUDGET_TURN);
    turn.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = applied.changed() => {}
            _ = durable.changed(), if over => {}
            _ = turn.tick() => {
                let asking = retained(joint, &mut probe, &mut budget);
                // A source that is away keeps what it keeps; it is asked again.
                let asked = tokio::time::timeout(Duration::from_secs(5), asking).await;
                let kept = asked.ok().and_then(Result::ok);
                joint.troubles.set(DISK, joint.spool.trouble());
                if let (Some(bytes), Some(budget)) = (kept, budget) {
                    // The source lets go of WAL at checkpoints only: half is early enough.
                    over = bytes > budget / 2;
                }
                let bytes = joint.spool.bytes();
                shown.send_modify(|state| {
                    state.retained_bytes = kept.or(state.retained_bytes);
                    state.spool_bytes = bytes;
                });
            }
        }
        let (durable_lsn, spooled_lsn) = (applied.borrow().durable_lsn, *durable.borrow());
        joint.spool.release(durable_lsn);
        let tell_lsn = if over { durable_lsn.max(spooled_lsn) } else { durable_lsn };
        told.send_if_modified(|last| {
            let modified = tell_lsn > *last;
            *last = tell_lsn.max(*last);
            modified
        });
        shown.send_modify(|state| state.spooled_lsn = spooled_lsn);
    }
}

/// Bytes of WAL that the read side keeps for the slot.
async fn retained(
    joint: &Joint,
    probe: &mut Option<Session>,
    budget: &mut Option<u64>,
) -> Result<u64> {
    let options = &joint.options;
    if budget.is_none() {
        *budget = Some(wal_budget(options.read_at(), None).await?);
    }
    let mut session = match probe.take() {
        Some(session) => session,
        None => Session::connect(options.read_at(), Purpose::Sql).await?,
    };
    let status = slot::status(&mut session, &options.job.object(options.stream)).await?;
    *probe = Some(session);
    Ok(status.map_or(0, |status| status.retained_bytes))
}
