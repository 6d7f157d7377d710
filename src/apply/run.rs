//! The applier's loop.

use std::future::{Future, pending};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::batch::{Batch, Work};
use super::count::Entry;
use super::error::Result;
use super::release::TURN;
use super::standby::POSITION;
use super::{Applied, Applier};
use crate::change::{Commit, Ending, Feed};
use crate::clock::PgTimestamp;
use crate::lsn::Lsn;
use crate::pg::{Pipeline, Reply};

/// The target is made to flush its log, for want of something to do, no more often than this.
const FLUSH_GAP: Duration = Duration::from_millis(50);

/// How often progress is recorded for idleness alone. The slot advances no sooner, so an idle table
/// beside a busy one pins a second of WAL more, for one small commit a second.
const RECORD_INTERVAL: Duration = Duration::from_secs(1);

/// So many changes under way, and more, are not followed closely.
const SMALL_STEPS: usize = 64;

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
        let expected = std::mem::take(&mut self.expected);
        self.writer.routes.foresee(&mut self.session, expected).await?;
        let mut ended = false;
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
            self.look_after(stopping).await?;
            let work = if stopping { None } else { self.next_work(hold_lsn) };
            if work.is_none() && under_way > 0 && !stopping {
                let landed = self.arrived_or_fed(&mut feed, &mut ended, &mut shutdown).await?;
                if !landed {
                    continue;
                }
            }
            if work.is_some() || under_way > 0 {
                let stopped = match self.work(work, &mut shutdown).await {
                    Ok(stopped) => stopped,
                    Err(error) => return Err(self.park_row(error).await),
                };
                self.publish(positions);
                if stopped {
                    break;
                }
                continue;
            }
            self.record_passed(false).await?;
            self.enter_counts(false).await?;
            self.note_hold(hold_lsn).await?;
            if self.flush_due().is_some_and(|due| due <= Instant::now()) {
                self.see_flushed().await?;
            }
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
                () = at(self.flush_due()) => {}
                () = tokio::time::sleep(RECORD_INTERVAL),
                    if self.has_passed() || self.writer.books.is_waiting() => {}
                () = tokio::time::sleep(TURN), if self.has_parks() => {}
            }
        }
        self.finish(positions).await
    }

    /// What has its time beside the stream.
    async fn look_after(&mut self, stopping: bool) -> Result<()> {
        if self.writer.looks_at().is_some_and(|due| due <= Instant::now()) {
            self.writer.give_way(&mut self.session, &self.progress).await?;
        }
        if self.parks_are_due() && !stopping {
            self.land_all().await?;
            self.try_parked().await?;
        }
        Ok(())
    }

    /// What is to be done now, if anything is. Behind a batch under way another is sent if it is
    /// full, or follows closely; idleness waits its turn.
    fn next_work(&mut self, hold_lsn: Option<Lsn>) -> Option<Work> {
        let room = match self.writer.in_flight() {
            0 => true,
            count if count >= self.in_flight_max() || self.batcher.is_empty() => false,
            _ => self.follows_closely() || self.is_worth_sending() || !self.batcher.wants_more(),
        };
        if room { self.batcher.take(hold_lsn) } else { None }
    }

    /// Waits until the oldest batch under way is over, and gives true; or, where another may be
    /// sent behind it, until there is more for that.
    async fn arrived_or_fed<F: Feed>(
        &mut self,
        feed: &mut F,
        ended: &mut bool,
        shutdown: &mut watch::Receiver<bool>,
    ) -> Result<bool> {
        let room = self.writer.in_flight() < self.in_flight_max() && self.batcher.wants_more();
        let listens = room && !*ended && self.eager;
        let look = self.writer.looks_at();
        tokio::select! {
            biased;
            item = feed.pop(), if listens => {
                match item {
                    Some(item) => self.batcher.push(item)?,
                    None => *ended = true,
                }
                Ok(false)
            }
            arrived = self.writer.arrived(&mut self.session) => arrived.map(|()| true),
            () = changed(shutdown) => Ok(false),
            () = at(look) => Ok(false),
        }
    }

    /// With two sessions, the one that waits for the other has the next batch to go on with.
    fn in_flight_max(&self) -> usize {
        self.in_flight_max + usize::from(self.writer.second.is_at_work())
    }

    /// True where batches are so small that the next is sent at once, and the server need not wait
    /// for us between them. Larger ones may as well grow meanwhile: they cost less the fewer.
    fn follows_closely(&self) -> bool {
        self.eager && self.writer.in_flight_steps() < SMALL_STEPS && !self.batcher.is_open()
    }

    /// True if as much is gathered as is under way: the target is to find it when it is done, and
    /// not wait while it is put together. Were less sent, batches would become smaller and smaller.
    /// What is gathered for longer is less to write where rows are written again and again.
    fn is_worth_sending(&self) -> bool {
        self.eager && self.batcher.bytes() >= self.writer.in_flight_bytes() * self.growth.folds()
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
                // A busy source tells after each transaction how far its log is. What was written
                // is not flushed for that: the next transaction would wait for it.
                self.land_all().await?;
                self.passed(lsn);
                self.record_passed(false).await?;
                return Ok(false);
            }
            None => None,
        };
        let cancel = [Some(self.session.cancel_handle()), self.writer.second.cancel_handle()];
        let write = self.write(batch);
        let mut stopping = shutdown.clone();
        let (outcome, canceled) = until(write, asked(&mut stopping), async {
            for session in cancel.iter().flatten() {
                let _ = session.cancel().await;
            }
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
        self.batcher.resize(self.growth.learn(landed.batch.full, took, landed.folds));
        self.applied.rows += landed.rows;
        self.applied.fallbacks += u64::from(landed.fell_back);
        self.applied.ahead += u64::from(landed.ahead);
        self.restarting |= landed.restarts;
        let Some(commit) = landed.batch.commit else { return Ok(()) };
        self.restarted |= std::mem::take(&mut self.restarting);
        match landed.committed {
            false => self.passed(commit.end_lsn),
            true => {
                self.progress_lsn = commit.end_lsn;
                self.applied.applied_lsn = commit.end_lsn;
                self.applied.last_end_lsn = commit.end_lsn;
                self.applied.commit_time = Some(commit.commit_time);
                self.applied.transactions += landed.batch.transactions();
                self.durable.committed(commit.end_lsn);
                if let Some((insert_lsn, flush_lsn)) = landed.position {
                    self.durable.stands(insert_lsn, flush_lsn);
                }
            }
        }
        if let Some(hook) = &self.on_message {
            landed.messages.iter().for_each(|message| hook(message));
        }
        let many = self.durable.pending() > PENDING_MAX && self.flushed_at.elapsed() >= FLUSH_GAP;
        if many && self.writer.in_flight() == 0 {
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
        let end_lsn = commit.end_lsn;
        self.progress.record(&mut pipeline, self.progress_lsn, end_lsn, &Entry::Nothing);
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
        self.durable.committed(end_lsn);
        if let Some((insert_lsn, flush_lsn)) = position {
            self.durable.stands(insert_lsn, flush_lsn);
        }
        Ok(())
    }

    /// Enters what is counted beside progress in its table, if it has waited long enough or is
    /// `due` now. Nothing may be under way.
    async fn enter_counts(&mut self, due: bool) -> Result<()> {
        let books = &mut self.writer.books;
        if !(due || books.is_due()) || !books.is_waiting() || self.batcher.is_open() {
            return Ok(());
        }
        let entry = books.close();
        let mut pipeline = Pipeline::new();
        pipeline.once("begin");
        self.progress.record(&mut pipeline, self.progress_lsn, self.progress_lsn, &entry);
        self.writer.count(&mut pipeline, &entry);
        pipeline.once("commit");
        Ok(self.session.exchange(pipeline, |_| {}).await?)
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

    /// When the target is to be made to flush, if all goes on being quiet.
    fn flush_due(&self) -> Option<Instant> {
        let due = match self.flush_after.is_zero() {
            true => self.landed_at,
            false => (self.landed_at + self.flush_after).max(self.flushed_at + FLUSH_GAP),
        };
        (self.durable.pending() > 0).then_some(due)
    }

    /// Has the target flush what is committed. Keeping progress in a table, a flush is a commit,
    /// which an open transaction has no room for; then it is asked how far its WAL writer is. A
    /// buffer that is full waits for nothing else, maybe with the rest of this transaction.
    pub(super) async fn see_flushed(&mut self) -> Result<()> {
        if !self.batcher.is_open() {
            return self.force_flush().await;
        }
        let row = self.session.query_one(POSITION, &[]).await?;
        self.durable.stands(row.lsn(0)?, row.lsn(1)?);
        self.flushed_at = Instant::now();
        Ok(())
    }

    async fn force_flush(&mut self) -> Result<()> {
        if !self.batcher.is_open() {
            self.flush().await?;
        }
        Ok(())
    }

    /// Has the target flush its log. What its standbys have to flush too may not be durable yet.
    async fn flush(&mut self) -> Result<()> {
        self.progress.flush(&mut self.session).await?;
        let row = self.session.query_one(POSITION, &[]).await?;
        match row.bool(2)? {
            true => self.durable.flushed_all(),
            false => self.durable.stands(row.lsn(0)?, row.lsn(1)?),
        }
        self.flushed_at = Instant::now();
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
        // Not after a batch that was cut off, which is among what is counted: the next applier
        // enters what waits.
        if !self.canceled {
            self.enter_counts(true).await?;
        }
        self.flush().await?;
        self.wait_for_standbys().await?;
        self.publish(positions);
        self.writer.sent.tell(&self.writer.stream);
        Ok(())
    }

    fn publish(&mut self, positions: &watch::Sender<Applied>) {
        self.applied.durable_lsn = self.durable.durable_lsn();
        if std::mem::take(&mut self.restarted) {
            self.applied.restarted_lsn = self.applied.applied_lsn;
        }
        positions.send_if_modified(|last| std::mem::replace(last, self.applied) != self.applied);
    }
}

/// Ready when the value changes; never, once nobody can change it.
async fn changed<T>(receiver: &mut watch::Receiver<T>) {
    if receiver.changed().await.is_err() {
        pending::<()>().await;
    }
}

/// Ready then; never for `None`.
pub(super) async fn at(due: Option<Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due.into()).await,
        None => pending().await,
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
