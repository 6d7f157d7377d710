//! Back to before the flip, and forward past its point of no return. Both can be repeated, and both
//! work from stored facts alone, so that another process can do it after a crash.

use std::time::Duration;

use futures_util::future::{join, join_all};

use super::fence::{Fence, FenceKind};
use super::seal::{self, Sealing};
use super::{Error, Result, Rules};
use crate::clock::Deadline;
use crate::id::{QualifiedName, Stream};
use crate::pg::{Config, Session};
use crate::route::{Context, Route};

/// How long the live side may take to be opened before its clients are let go all the same.
const OPEN_WAIT: Duration = Duration::from_secs(5);

/// How long sealing the other side is tried, and one try of it.
const SEAL_WAIT: Duration = Duration::from_secs(10);
const LOCK_WAIT: Duration = Duration::from_millis(200);

/// Takes back a flip of this process: its fence, if one was prepared, then as [`undo`] does.
///
/// A fence whose session is broken may still have a commit under way in its server, which would
/// seal the tables after we looked: its backend is ended first.
pub async fn withdraw(
    live: &Config,
    fence: Option<Fence>,
    routes: &[Route],
    context: &Context,
    rules: &Rules,
) -> Result<()> {
    // Before writers go on, as what they write is carried there at once.
    let silenced = silence_dest(context, rules).await;
    let kind = fence.as_ref().map_or(FenceKind::None, Fence::kind);
    let lowered = async {
        match fence {
            Some(fence) => fence.abandon(live).await,
            None => Ok(()),
        }
    };
    let lowered = tokio::time::timeout(OPEN_WAIT, lowered).await;
    let undone = undo(live, kind, routes, context, rules, |_| {}).await;
    silenced?;
    lowered.map_err(|_| Error::NoAnswer { waited: OPEN_WAIT })??;
    undone
}

/// Undoes whatever a flip reached before its point of no return: routes go back, the live side's
/// seal opens, held clients are let through.
///
/// The fence's locks need no undoing: they belonged to a session that is gone. Routes are undone in
/// reverse order, and writers on the live side can write before clients are sent there again.
/// `led` is told the place in `routes` of each that is.
pub async fn undo(
    live: &Config,
    kind: FenceKind,
    routes: &[Route],
    context: &Context,
    rules: &Rules,
    mut led: impl FnMut(usize),
) -> Result<()> {
    let silenced = silence_dest(context, rules).await;
    let opened = async {
        rules.wake_live(live).await?;
        if kind != FenceKind::None {
            let mut session = Session::control(live).await?;
            seal::hasten(&mut session).await;
            seal::open(&mut session, &context.job, context.group()).await?;
        }
        Ok(())
    };
    // Clients must not stay held because the server is gone: undo the routes whatever happens.
    let opened: Result<()> = match tokio::time::timeout(OPEN_WAIT, opened).await {
        Ok(opened) => opened,
        Err(_) => Err(Error::NoAnswer { waited: OPEN_WAIT }),
    };
    // One route that cannot be undone must not keep the clients of another held.
    let mut undone = Ok(());
    for (place, route) in routes.iter().enumerate().rev() {
        let outcome = route.undo(context).await;
        if outcome.is_ok() {
            led(place);
        }
        undone = undone.and(outcome);
    }
    // Nor must the other side take writes while a route is waited for.
    let shut = shut_other(context).await;
    undone?;
    opened?;
    silenced?;
    shut
}

/// After an undoing that had to leave a route as it was: whoever that route still leads to the
/// other side is refused there, by triggers on `tables`, as after a flip the other way. Idempotent.
pub async fn seal_other(context: &Context, tables: &[QualifiedName]) -> Result<()> {
    let other = other_side(context);
    let sealing = Sealing { job: &context.job, tables, is_group: context.is_group };
    let mut fence = Fence::prepare(FenceKind::Lock, other, sealing, OPEN_WAIT).await?;
    let deadline = Deadline::after(SEAL_WAIT);
    while !fence.raise(LOCK_WAIT).await? {
        if deadline.passed() {
            let blockers = fence.blockers().await?;
            return Err(Error::Fence { waited: SEAL_WAIT, blockers });
        }
        tokio::time::sleep(LOCK_WAIT * 2).await;
    }
    fence.prepare_seal(&Rules::default(), tables).await?;
    fence.seal().await
}

async fn silence_dest(context: &Context, rules: &Rules) -> Result<()> {
    let silenced = tokio::time::timeout(OPEN_WAIT, rules.silence_dest(context)).await;
    silenced.unwrap_or(Err(Error::NoAnswer { waited: OPEN_WAIT }))
}

/// A flip opens the seal of the side it leads to, if an earlier one had shut it, whatever the fence
/// of this one: without the earlier one's triggers nothing is done here. That side is not
/// live again now: sessions that were connected to it since must not write there (vitess#9453).
async fn shut_other(context: &Context) -> Result<()> {
    let mut session = Session::control(other_side(context)).await?;
    seal::shut(&mut session, &context.job, context.group()).await
}

/// The side that the flip led to.
fn other_side(context: &Context) -> &Config {
    match context.flip {
        Stream::Forward => &context.target,
        Stream::Reverse => &context.source,
    }
}

/// Lets clients through, on whichever side the routes now point to. `led` is told the place in
/// `routes` of each that does.
pub async fn release(
    routes: &[Route],
    context: &Context,
    mut led: impl FnMut(usize),
) -> Result<()> {
    // Foreign servers beside each other and the rest: each is a matter of its own.
    let (beside, others): (Vec<_>, Vec<_>) =
        routes.iter().enumerate().partition(|(_, route)| matches!(route, Route::SqlMed(_)));
    let beside = beside.into_iter();
    let beside =
        join_all(beside.map(|(place, route)| async move { (place, route.release(context).await) }));
    let one_by_one = async {
        let mut outcomes = Vec::new();
        for (place, route) in others {
            outcomes.push((place, route.release(context).await));
        }
        outcomes
    };
    let (beside, others) = join(beside, one_by_one).await;
    let mut released = Ok(());
    for (place, outcome) in beside.into_iter().chain(others) {
        if outcome.is_ok() {
            led(place);
        }
        released = released.and(outcome);
    }
    Ok(released?)
}
