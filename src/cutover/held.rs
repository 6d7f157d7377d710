//! From the barrier to the switch, while writers wait.
//!
//! What has to come after something else does, and everything else is done beside it: what can be
//! made ready is made ready before anybody is held ([`Ready`]); what only looks, or is undone with
//! the fence's transaction, is done while the other side catches up. The journal is written beside
//! it too, for all steps of a stretch in one commit, always before the first of them that changes
//! anything.
//!
//! ```text
//! barrier ──▶ drain ───────────────────▶ rest, rules, flush ─▶ seal ─▶ switch ─▶ no return
//!             unaltered, sequences       kept aside?
//!             (again behind the drain, if one of the last changes restarted some)
//!             routes made ready
//!             triggers of the seal
//! ```

use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::choreography::{Flight, Journal, Plan, refuse_parked, timed};
use super::fence::Fence;
use super::seal::{self, Shut};
use super::sequences::{self, Stood};
use super::{Error, Result, barrier};
use crate::apply::Applied;
use crate::catalog;
use crate::id::{QualifiedName, Stream};
use crate::lsn::Lsn;
use crate::pg::{Purpose, Session};
use crate::route::{self, Route};
use crate::schema;

/// Sessions with both sides for short questions.
pub(super) struct Ends {
    pub(super) live: Session,
    pub(super) dest: Session,
}

impl Ends {
    pub(super) async fn open(plan: &Plan) -> Result<Ends> {
        let opening = (Session::control(&plan.live), Session::control(&plan.dest));
        let (live, dest) = tokio::try_join!(opening.0, opening.1)?;
        Ok(Ends { live, dest })
    }
}

/// What is made before anybody is held.
pub(super) struct Ready {
    pub(super) live: Session,
    dest: Session,
    /// Another session with the other side, for what is asked beside something else.
    look: Session,
    /// A replication session with the standby that the live side is decoded from.
    decoder: Option<Session>,
    /// After which triggers, rules and foreign keys act on the other side.
    waking: Vec<String>,
    /// The other side's seal, if an earlier flip has shut it.
    shut: Shut,
}

impl Ready {
    pub(super) async fn make(plan: &Plan, ends: Ends) -> Result<Ready> {
        let Ends { live, mut dest } = ends;
        let look = Session::control(&plan.dest).await?;
        let decoder = match &plan.decoded_at {
            Some(standby) => Some(Session::connect(standby, Purpose::Replication).await?),
            None => None,
        };
        let group = plan.context.group();
        seal::clear_way(&mut dest, &plan.job, group).await?;
        let waking = plan.rules.waking(&mut dest).await?;
        let shut = Shut::find(&mut dest, &plan.job, group).await?;
        Ok(Ready { live, dest, look, decoder, waking, shut })
    }
}

impl<J: Journal> Flight<'_, J> {
    /// Gives the barrier.
    pub(super) async fn while_held(
        &mut self,
        fence: &mut Fence,
        ready: &mut Ready,
        held: Instant,
    ) -> Result<Lsn> {
        let barrier_lsn = self.barrier(ready).await?;
        self.catch_up(fence, ready, barrier_lsn, held).await?;
        self.complete(ready).await?;
        let sealing = timed("seal", async {
            fence.seal().await?;
            ready.shut.open_for_now(&mut ready.dest, &self.plan.job).await
        });
        let ((), sealed) = sealing.await?;
        self.steps.push(sealed);
        let ((), switched) = timed("switch", self.switch_routes()).await?;
        self.steps.push(switched);
        Ok(barrier_lsn)
    }

    /// The barrier is only read, beside the journal.
    async fn barrier(&mut self, ready: &mut Ready) -> Result<Lsn> {
        let mut names = vec!["barrier"];
        names.extend(self.plan.mark.as_ref().map(|_| "unaltered"));
        names.push("drain");
        names.extend(self.plan.routes.iter().any(Route::gets_ready).then_some("routes ready"));
        names.push("sequences");
        let marking = timed("barrier", barrier::mark(&mut ready.live, "barrier"));
        let noting = self.journal.begin(&names, &self.steps);
        let ((lsn, step), ()) = tokio::try_join!(marking, noting)?;
        self.steps.push(step);
        Ok(lsn)
    }

    /// Waits until the other side is level, and does meanwhile what need not wait for that.
    async fn catch_up(
        &mut self,
        fence: &mut Fence,
        ready: &mut Ready,
        barrier_lsn: Lsn,
        held: Instant,
    ) -> Result<()> {
        let mut names = Vec::new();
        names.extend(self.plan.rest.is_there().then_some("rest"));
        names.extend((!ready.waking.is_empty()).then_some("rules"));
        names.extend(["seal", "switch"]);
        let noting = self.journal.begin(&names, &self.steps);
        let (plan, stood) = (&mut *self.plan, &mut self.stood);
        let (live, dest, max_hold) = (&mut ready.live, &mut ready.dest, plan.limits.max_hold);
        let (rest, mark) = (&mut plan.rest, plan.mark.as_deref());
        let (selection, tables) = (&plan.selection, &*plan.tables);
        let those = (selection, &plan.sequences);
        let since_lsn = plan.carry.borrow().applied_lsn;
        let draining = timed("drain", drain(&mut plan.carry, barrier_lsn, held, max_hold));
        let looking = async {
            let own = selection.tables_only.then_some(tables);
            barrier::refuse_prepared(live, own).await?;
            let mut done = Vec::new();
            if let Some(mark) = mark {
                done.push(timed("unaltered", refuse_altered(live, tables, mark)).await?.1);
            }
            if !rest.is_there() {
                rest.carry(live, dest).await?;
            }
            let stood = match stood.take() {
                Some(stood) => stood,
                None => Stood::read(live, dest).await?,
            };
            let carrying = sequences::carry(live, dest, those, &stood, max_hold);
            done.push(timed("sequences", carrying).await?.1);
            Ok::<_, Error>((done, stood))
        };
        let readying = ready_routes(&plan.routes, &plan.context);
        let sealing = fence.prepare_seal(&plan.rules, tables);
        let (((), drained), (mut looked, stood), readied, (), ()) =
            tokio::try_join!(draining, looking, readying, sealing, noting)?;
        if barrier::restarted(&plan.carry, since_lsn) {
            // By one of the last changes, maybe behind the moment at which they were set.
            let again = timed("sequences", sequences::carry(live, dest, those, &stood, max_hold));
            looked.push(again.await?.1);
        }
        self.steps.push(drained);
        self.steps.extend(readied);
        self.steps.extend(looked);
        Ok(())
    }

    /// What the other side still needs now that it is level.
    async fn complete(&mut self, ready: &mut Ready) -> Result<()> {
        let plan = &mut *self.plan;
        let (flip, statements) = (plan.flip, &ready.waking);
        let (live, dest, look) = (&mut ready.live, &mut ready.dest, &mut ready.look);
        if let Some(decoder) = &mut ready.decoder {
            barrier::refuse_parted(live, decoder).await?;
        }
        let mut done = Vec::new();
        if plan.rest.is_there() {
            done.push(timed("rest", plan.rest.carry(live, dest)).await?.1);
        }
        let waking = async {
            let mut done = Vec::new();
            if !statements.is_empty() {
                let waking = async { Ok(schema::together(dest, statements).await?) };
                done.push(timed("rules", waking).await?.1);
            }
            // Forward, the point of no return is a commit there, which makes durable all that was
            // applied before it.
            if flip == Stream::Reverse {
                barrier::flush(dest).await?;
            }
            Ok::<_, Error>(done)
        };
        // What was refused on the last stretch would be left behind as well.
        let ((), woken) = tokio::try_join!(refuse_parked(plan, look), waking)?;
        done.extend(woken);
        self.steps.extend(done);
        Ok(())
    }

    async fn switch_routes(&self) -> Result<()> {
        for route in &self.plan.routes {
            route.switch(&self.plan.context).await?;
        }
        Ok(())
    }
}

async fn drain(
    carry: &mut watch::Receiver<Applied>,
    barrier_lsn: Lsn,
    held: Instant,
    max_hold: Duration,
) -> Result<()> {
    // A little less than the whole: the error that names both positions is the better one.
    let wait = max_hold.saturating_sub(held.elapsed()).mul_f64(0.95);
    if barrier::reached(carry, barrier_lsn, wait).await? {
        return Ok(());
    }
    let applied_lsn = carry.borrow().applied_lsn;
    Err(Error::Drain { barrier_lsn, applied_lsn, waited: max_hold })
}

/// The fence's locks keep tables as they are from here on.
async fn refuse_altered(live: &mut Session, tables: &[QualifiedName], mark: &str) -> Result<()> {
    match catalog::mark(live, tables).await? == mark {
        true => Ok(()),
        false => Err(Error::Altered),
    }
}

/// Beside each other, as none of them leads anybody anywhere by it.
async fn ready_routes(routes: &[Route], context: &route::Context) -> Result<Option<super::Step>> {
    if !routes.iter().any(Route::gets_ready) {
        return Ok(None);
    }
    let readying = async {
        let all = routes.iter().map(|route| route.ready(context));
        Ok(futures_util::future::try_join_all(all).await.map(|_| ())?)
    };
    Ok(Some(timed("routes ready", readying).await?.1))
}
