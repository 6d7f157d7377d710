//! The applier's loop.

use std::future::{Future, pending};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::batch::{Batch, Work};
use super::error::Result;
use super::release::TURN;
use super::{Applied, Applier, POSITION};
use crate::change::{Commit, Ending, Feed};
use crate::clock::PgTimestamp;
use crate::lsn::Lsn;
use crate::pg::{Pipeline, Reply};

/// With nothing to do, how often the target is asked how much of its log is flushed.
const FLUSH_POLL: Duration = Duration::from_millis(50);

/// After so many questions the flush is asked for. The target's WAL writer runs every 200 ms, and
/// may stop just short of the position noted if somebody else's open transaction wrote the last of
/// it.
const FLUSH_POLLS_MAX: u32 = 6;

/// How often progress is recorded for idleness alone. The slot advances no sooner, so an idle table
/// beside a busy one pins a second of WAL more, for one small commit a second.
const RECORD_INTERVAL: Duration = Duration::from_secs(1);

/// Commits not known to be durable; beyond that the flush is asked for even when busy.
const PENDING_MAX: usize = 1024;

/// A statement that is under way when shutdown is asked for gets so long before it is canceled: it
/// may be waiting for a lock.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(5);

impl Applier {
    /// Applies what `feed` gives until it ends, `shutdown` turns true (both `Ok`), or an error.
    /// After an error or shutdown the applier is to be dropped; [`Applier::connect`] resumes from
    /// what the target has. Ends at a batch boundary: a transaction written in part is rolled back.
    ///
    /// The feed is consumed, as what was taken from it and not applied is lost with this call: the
    /// stream must be read again from its slot, never gone on with behind the same feed.
    ///
    /// `positions` is told after every batch. While `hold` has a position, transactions whose
    /// commit record starts at or after it are not applied; [`Applied::held`] answers.
    pub async fn run<F: Feed>(
        &mut self,
        mut feed: F,
        positions: &watch::Sender<Applied>,
        mut hold: watch::Receiver<Option<Lsn>>,
        mut shutdown: watch::Receiver<bool>,
    ) -> Result<()> {
        self.publish(positions);
        let mut ended = false;
        let mut polls = 0;
        loop {
            let (stopping, under_way) = (*shutdown.borrow_and_update(), self.writer.in_flight());
            if stopping && under_way == 0 {
                break;
            }
            let hold_lsn = *hold.borrow_and_update();
            if self.applied.held != hold_lsn {
                self.applied.held = None;
            }
            self.fill(&mut feed)?;
            if self.parks_are_due() && !stopping {
                self.land_all().await?;
                self.try_parked().await?;
            }
            // While a batch is under way only a full one is sent after it: whatever is less may as
            // well grow.
            let room = match under_way {
                0 => true,
                count => count < self.in_flight_max && !self.batcher.wants_more(),
            };
            let work = if room && !stopping { self.batcher.take(hold_lsn) } else { None };
            if work.is_some() || under_way > 0 {
                let stopped = match self.work(work, &mut shutdown).await {
                    Ok(stopped) => stopped,
                    Err(error) => return Err(self.park_row(error).await),
                };
                self.publish(positions);
                polls = 0;
                if stopped {
                    break;
                }
                continue;
            }
            self.record_passed(false).await?;
            self.note_hold(hold_lsn).await?;
            self.publish(positions);
            if ended && !self.batcher.is_held(hold_lsn) {
                break;
            }
            tokio::select! {
                item = feed.pop(), if !ended && self.batcher.wants_more() => match item {
                    Some(item) => self.batcher.push(item)?,
                    None => ended = true,
                },
                () = changed(&mut hold) => {}
                () = changed(&mut shutdown) => {}
                () = tokio::time::sleep(FLUSH_POLL), if self.durable.pending() > 0 => {
                    polls += 1;
                    self.poll_flush(polls).await?;
                }
                () = tokio::time::sleep(RECORD_INTERVAL), if self.has_passed() => {}
                () = tokio::time::sleep(TURN), if self.has_parks() => {}
            }
        }
        self.finish(positions).await
    }

    /// Takes what is there, without waiting.
    fn fill<F: Feed>(&mut self, feed: &mut F) -> Result<()> {
        while self.batcher.wants_more() {
            let Some(item) = feed.try_pop() else { break };
            self.batcher.push(item)?;
        }
        Ok(())
    }

    /// Does the work, or waits for the oldest batch under way if there is none. True if shutdown
    /// cut it short.
    async fn work(
        &mut self,
        work: Option<Work>,
        shutdown: &mut watch::Receiver<bool>,
    ) -> Result<bool> {
        let batch = match work {
            Some(Work::Write(batch))
                if matches!(
                    batch.ending(),
                    Ending::CommitPrepared(_) | Ending::RollbackPrepared(_)
                ) =>
            {
                self.land_all().await?;
                self.end_prepared(&batch).await?;
                return Ok(false);
            }
            Some(Work::Write(batch)) => Some(batch),
            Some(Work::Abandon) => {
                self.land_all().await?;
                self.session.execute("rollback").await?;
                self.writer.abandon();
                self.reread_parks().await?;
                return Ok(false);
            }
            Some(Work::Idle(lsn)) => {
                self.land_all().await?;
                self.passed(lsn);
                if self.durable.pending() > 0 {
                    self.force_flush().await?;
                }
                self.record_passed(false).await?;
                return Ok(false);
            }
            None => None,
        };
        let cancel = self.session.cancel_handle();
        let write = self.write(batch);
        let mut stopping = shutdown.clone();
        let (outcome, canceled) = until(write, asked(&mut stopping), async {
            let _ = cancel.cancel().await;
        })
        .await;
        self.canceled |= canceled;
        match outcome {
            // The batch is not on the target; that is no error of anybody's. The cancel may have
            // met the batch behind.
            Err(_) if self.canceled => Ok(true),
            outcome => outcome.map(|()| false),
        }
    }

    /// Sends a batch, or waits for one.
    async fn write(&mut self, batch: Option<Batch>) -> Result<()> {
        let Some(mut batch) = batch else { return self.land().await };
        if self.settler.is_some() {
            return self.settle(batch).await;
        }
        // What is sent behind must not be taken back with it, nor find it half done.
        let alone = *batch.ending() != Ending::Commit;
        if alone {
            self.land_all().await?;
        }
        if !self.writer.knows(&batch) {
            self.land_all().await?;
            batch = self.meet(batch).await?;
        }
        let progress_lsn = self.progress_lsn;
        self.writer.launch(&mut self.session, &self.progress, progress_lsn, batch).await?;
        if alone {
            self.land_all().await?;
        }
        Ok(())
    }

    pub(super) async fn land_all(&mut self) -> Result<()> {
        while self.writer.in_flight() > 0 {
            self.land().await?;
        }
        Ok(())
    }

    async fn land(&mut self) -> Result<()> {
        let landed = self.writer.land(&mut self.session, &self.progress).await?;
        let Some(landed) = landed else { return Ok(()) };
        let took = self.landed_at.max(landed.sent_at).elapsed();
        self.landed_at = Instant::now();
        self.batcher.resize(self.growth.learn(landed.batch.full, took));
        self.applied.rows += landed.rows;
        self.applied.fallbacks += u64::from(landed.fell_back);
        let Some(commit) = landed.batch.commit else { return Ok(()) };
        match landed.position {
            None => self.passed(commit.end_lsn),
            Some((insert_lsn, flush_lsn)) => {
                self.progress_lsn = commit.end_lsn;
                self.applied.applied_lsn = commit.end_lsn;
                self.applied.last_end_lsn = commit.end_lsn;
                self.applied.commit_time = Some(commit.commit_time);
                self.applied.transactions += landed.batch.transactions();
                self.durable.committed(commit.end_lsn, insert_lsn);
                self.durable.flushed(flush_lsn);
            }
        }
        if let Some(hook) = &self.on_message {
            landed.messages.iter().for_each(|message| hook(message));
        }
        if self.durable.pending() > PENDING_MAX && self.writer.in_flight() == 0 {
            self.force_flush().await?;
        }
        Ok(())
    }

    /// Nothing is to be written below `lsn`.
    pub(super) fn passed(&mut self, lsn: Lsn) {
        self.applied.applied_lsn = lsn.max(self.applied.applied_lsn);
    }

    /// True if idleness is ahead of recorded progress.
    fn has_passed(&self) -> bool {
        self.applied.applied_lsn > self.progress_lsn && !self.batcher.is_open()
    }

    /// Brings recorded progress up to what idleness has passed, by a transaction without rows, so
    /// that the slot may be told. The slot must never be beyond recorded progress: that is how a
    /// slot that was replaced behind our back is told from ours (law 4). Not more often than
    /// [`RECORD_INTERVAL`], unless it is `due` now.
    async fn record_passed(&mut self, due: bool) -> Result<()> {
        let end_lsn = self.applied.applied_lsn;
        let early = !due && self.recorded_at.elapsed() < RECORD_INTERVAL;
        if end_lsn <= self.progress_lsn || early || self.batcher.is_open() {
            return Ok(());
        }
        self.recorded_at = Instant::now();
        let commit_time = self.applied.commit_time.unwrap_or_else(PgTimestamp::now);
        let commit = Commit { commit_lsn: end_lsn, end_lsn, commit_time };
        let mut pipeline = Pipeline::new();
        pipeline.once("begin");
        self.commit_progress(pipeline, &commit).await
    }

    /// Ends the transaction that `pipeline` begins with progress at `commit`, and notes how much of
    /// the log has to be flushed for it. Nothing else may be under way.
    pub(super) async fn commit_progress(
        &mut self,
        mut pipeline: Pipeline,
        commit: &Commit,
    ) -> Result<()> {
        self.progress.record(&mut pipeline, self.progress_lsn, commit);
        pipeline.once("commit");
        pipeline.once(POSITION);
        let mut position = None;
        self.session
            .exchange(pipeline, |reply| {
                if let Reply::Row(row) = reply {
                    position = row.lsn(0).ok().zip(row.lsn(1).ok()).or(position);
                }
            })
            .await?;
        self.progress_lsn = commit.end_lsn;
        let (insert_lsn, flush_lsn) = position.unwrap_or((Lsn(u64::MAX), Lsn::ZERO));
        self.durable.committed(commit.end_lsn, insert_lsn);
        self.durable.flushed(flush_lsn);
        Ok(())
    }

    /// Answers a hold once everything below it is applied, and makes that durable.
    async fn note_hold(&mut self, hold_lsn: Option<Lsn>) -> Result<()> {
        let reached = hold_lsn
            .is_some_and(|lsn| self.applied.applied_lsn >= lsn || self.batcher.is_held(hold_lsn));
        if reached {
            self.record_passed(true).await?;
        }
        if reached && self.durable.pending() > 0 {
            self.force_flush().await?;
        }
        self.applied.held = hold_lsn.filter(|_| reached && !self.batcher.is_open());
        Ok(())
    }

    async fn poll_flush(&mut self, polls: u32) -> Result<()> {
        // Inside an open transaction the answer is as good.
        if polls >= FLUSH_POLLS_MAX {
            return self.force_flush().await;
        }
        let row = self.session.query_one(POSITION, &[]).await?;
        self.durable.flushed(row.lsn(1)?);
        Ok(())
    }

    async fn force_flush(&mut self) -> Result<()> {
        // Keeping progress in a table, the flush is a commit, which an open transaction has no room
        // for; what is pending stays so until that transaction ends.
        if !self.batcher.is_open() {
            self.progress.flush(&mut self.session).await?;
            self.durable.flushed_all();
        }
        Ok(())
    }

    /// Rolls back what is written in part, and makes the rest durable.
    async fn finish(&mut self, positions: &watch::Sender<Applied>) -> Result<()> {
        self.writer.drain(&mut self.session).await?;
        if self.session.in_transaction() {
            self.session.execute("rollback").await?;
            self.writer.abandon();
        }
        self.record_passed(true).await?;
        self.progress.flush(&mut self.session).await?;
        self.durable.flushed_all();
        self.publish(positions);
        Ok(())
    }

    fn publish(&mut self, positions: &watch::Sender<Applied>) {
        self.applied.durable_lsn = self.durable.durable_lsn();
        let applied = self.applied;
        positions.send_if_modified(|last| {
            let modified = *last != applied;
            *last = applied;
            modified
        });
    }
}

/// Ready when the value changes; never, once nobody can change it.
async fn changed<T>(receiver: &mut watch::Receiver<T>) {
    if receiver.changed().await.is_err() {
        pending::<()>().await;
    }
}

/// Ready some time after shutdown is asked for.
async fn asked(shutdown: &mut watch::Receiver<bool>) {
    if shutdown.wait_for(|asked| *asked).await.is_err() {
        pending::<()>().await;
    }
    tokio::time::sleep(SHUTDOWN_GRACE).await;
}

/// Runs `work` to its end, calling `cancel` if `stop` comes first. True if it did.
async fn until<T>(
    work: impl Future<Output = T>,
    stop: impl Future<Output = ()>,
    cancel: impl Future<Output = ()>,
) -> (T, bool) {
    tokio::pin!(work);
    tokio::select! {
        biased;
        outcome = &mut work => return (outcome, false),
        () = stop => {}
    }
    cancel.await;
    (work.await, true)
}
