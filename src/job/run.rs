//! The runner: takes the lease, then steps and executes until it is told to stop.
//!
//! Any fault that may mend itself drops everything (sessions, streams, lease) and begins again from
//! the stored phase, which is the same as being killed and started again: one path, tested by both.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use tokio::sync::watch;

use super::admit::{admit, make_tables};
use super::capturing;
pub use super::config::JobConfig;
use super::flip::FlipRequest;
use super::heartbeat::Heartbeat;
use super::lease::{self, Holder};
use super::opening::Half;
use super::pipeline::{Pipe, Task};
use super::place::Chosen;
use super::probes::Probes;
use super::rest::Refreshing;
use super::routes::Late;
use super::silent::Silent;
use super::standbys::Standbys;
use super::state::{Command, Event, Phase, step};
use super::store::{JobRow, Store};
use super::streams::STREAM_PATIENCE;
use super::validating::Validating;
use super::vigil::Vigil;
use super::{Error, Result, client, decoding, two_way};
use crate::apply::{Applied, Gate};
use crate::catalog::{Selection, Table, tables};
use crate::clock::{Backoff, Deadline};
use crate::copy::CopyProgress;
use crate::fault::{Fault, Faulty};
use crate::id::{JobName, QualifiedName};
use crate::limit::CATALOG_WAIT;
use crate::lsn::Lsn;
use crate::pg::{Config, Session};
use crate::schema::Unrefreshed;
use crate::secret::LetterBox;
use crate::source::HeldSlot;

/// How long servers that were never reached are tried.
const FIRST_TRY: Duration = Duration::from_secs(10);

/// When the runner returns.
#[derive(Clone, Debug)]
pub enum Until {
    /// When all rows, indexes and constraints are on the target.
    Copied,
    /// When the target was level with the source once.
    Following,
    /// When told to by a command, a signal or the end of the job.
    Told,
}

/// What a runner tells whoever watches.
#[derive(Clone, Debug)]
pub enum Notice {
    /// A new phase.
    Phase(Phase),
    /// Something worth a line.
    Said(String),
    /// `finish` or `cancel` ends the job: there is nothing to go on with.
    Ended,
    /// Rows are being copied; look at the counters from time to time.
    Copying(Arc<CopyProgress>),
    /// All rows are copied.
    Copied,
    /// Indexes and constraints: done, total, what is being built. Also while rows are copied.
    Building(usize, usize, String),
    /// A fault that is being tried again.
    Trouble(String),
    /// The stream to the target has begun (anew: the one before is over), and how far it is.
    Flows(watch::Receiver<Applied>),
    /// How the stream flows.
    Lag {
        /// Bytes the target is behind.
        bytes: u64,
        /// Row changes written since the stream was opened, those of an open transaction included.
        rows: u64,
    },
}

/// Receives notices; must not block.
pub type Report = Arc<dyn Fn(Notice) + Send + Sync>;

/// One process's hold on a job.
pub struct Runner {
    pub(super) config: JobConfig,
    pub(super) report: Report,
    pub(super) stop: watch::Receiver<bool>,
    pub(super) store: Store,
    pub(super) listener: Session,
    pub(super) selection: Selection,
    /// Sessions with either side that are kept.
    pub(super) probes: Probes,
    pub(super) forward: Option<Pipe>,
    pub(super) reverse: Option<Pipe>,
    /// Forgets what a job of two ways needs no more.
    pub(super) keeper: Option<Task<()>>,
    /// Beats on the source while the forward stream flows.
    pub(super) heartbeat: Option<Heartbeat>,
    /// Keeps slots on standbys of the source.
    pub(super) standbys: Option<Standbys>,
    /// With the side that a flip of this direction has left, while that is known to be shut.
    pub(super) sealed: Option<(crate::id::Stream, Session)>,
    /// Looks at what no stream shows.
    pub(super) silent: Option<Silent>,
    /// What the reverse stream applies beside canaries: tables that applications write to on the
    /// target.
    pub(super) gate: Arc<Gate>,
    /// A flip, its undoing or its release is under way: not to be dropped in the middle.
    pub(super) flying: watch::Sender<bool>,
    /// The command whose flip is under way.
    pub(super) asked: Option<(String, FlipRequest)>,
    /// The slot made by this run, while its snapshot is needed.
    pub(super) slot: Option<HeldSlot>,
    pub(super) hold: Option<String>,
    /// The hold must not come too late.
    pub(super) hold_exact: bool,
    /// What could not be done yet because of a route.
    pub(super) late: Option<Late>,
    /// Readers are half way there or back: when it is looked after next.
    pub(super) reads_due: Option<Deadline>,
    /// Where the next asker's passwords go.
    pub(super) letters: Option<LetterBox>,
    pub(super) level_at: Option<Lsn>,
    /// See [`Vigil`].
    pub(super) busy: Arc<AtomicBool>,
    /// Foreign keys that are looked at after a flip.
    pub(super) validating: Option<Validating>,
    /// Materialized views that are refreshed after a flip.
    pub(super) refreshing: Option<Refreshing>,
    /// Those that could not be before it.
    pub(super) unrefreshed: Vec<Unrefreshed>,
    /// Check has passed in this session already, before the job was written down.
    pub(super) checked: bool,
    /// Where changes wait: a spool, or memory.
    pub(super) spool: Chosen,
}

/// What the job had is held against what is given: where it is decoded, who wins a conflict.
async fn take_over(
    config: &mut JobConfig,
    store: &mut Store,
    source: &mut Session,
    report: &Report,
) -> Result<()> {
    decoding::settle(config, store).await?;
    two_way::settle(config, store, source, report).await
}

/// What one life of a runner leaves to the next.
#[derive(Default)]
struct Left {
    /// The lease it had.
    holder: Option<Holder>,
    /// It got as far as to run.
    opened: bool,
    /// A stream with a spool goes on reading while the target is away.
    forward: Option<Pipe>,
}

impl Runner {
    /// Runs the job until `until`, `stop`, or an error that a person must mend. Gives the phase
    /// reached. The error is stored with the job too, so that status shows it.
    pub async fn run(
        config: JobConfig,
        until: Until,
        report: Report,
        mut stop: watch::Receiver<bool>,
    ) -> Result<Phase> {
        let fresh = || Backoff::new(Duration::from_millis(200), Duration::from_secs(2));
        let mut backoff = fresh();
        let begun = tokio::time::Instant::now();
        let mut left = Left::default();
        loop {
            let started = tokio::time::Instant::now();
            let outcome = Self::session(&config, &until, &report, &stop, &mut left).await;
            let passing = |error: &Error| error.fault() == Fault::Retry;
            if (*stop.borrow() || !outcome.as_ref().err().is_some_and(passing))
                && let Some(pipe) = left.forward.take()
            {
                pipe.stop(STREAM_PATIENCE).await;
            }
            match outcome {
                // A server never seen may be a mistake in its name: trying for ever tells nobody.
                Err(error) if !left.opened && begun.elapsed() > FIRST_TRY => return Err(error),
                Err(error) if error.fault() == Fault::Retry && !*stop.borrow() => {
                    tracing::warn!(%error, "trying again");
                    report(Notice::Trouble(error.to_string()));
                    let storing = store_trouble(&config, &error, &left.holder);
                    let _ = tokio::time::timeout(Duration::from_secs(1), storing).await;
                }
                // A command that found us away drives the job meanwhile; we had it, and wait for
                // it.
                Err(error @ Error::Busy { .. }) if left.holder.is_some() && !*stop.borrow() => {
                    report(Notice::Trouble(error.to_string()));
                }
                // What broke while stopping is met again by the next run.
                Err(error) if error.fault() == Fault::Retry => return Err(Error::Interrupted),
                other => return other,
            }
            if started.elapsed() > Duration::from_secs(5) {
                backoff = fresh();
            }
            tokio::select! {
                () = tokio::time::sleep(backoff.step()) => {}
                () = stopped(&mut stop) => {
                    if let Some(pipe) = left.forward.take() {
                        pipe.stop(STREAM_PATIENCE).await;
                    }
                    return Err(Error::Interrupted);
                }
            }
        }
    }

    async fn session(
        config: &JobConfig,
        until: &Until,
        report: &Report,
        stop: &watch::Receiver<bool>,
        left: &mut Left,
    ) -> Result<Phase> {
        let mut stopping = stop.clone();
        let (mut runner, mut vigil) = tokio::select! {
            runner = Self::open(config, report, stop, left) => runner?,
            _ = stopping.wait_for(|stop| *stop) => return Err(Error::Interrupted),
        };
        left.opened = true;
        runner.forward = left.forward.take();
        let (mut stopping, mut flying) = (stop.clone(), runner.flying.subscribe());
        let outcome = tokio::select! {
            outcome = runner.drive(until) => outcome,
            error = vigil.keep() => Err(error),
            // Long statements (an index build) are abandoned: their server rolls them back.
            _ = wait_and_linger(&mut stopping, &mut flying) => Err(Error::Interrupted),
        };
        if let Err(error) = &outcome
            && error.fault() != Fault::Retry
            && !matches!(error, Error::Interrupted | Error::Ended)
        {
            let _ = runner.store.set_error(Some(&error.to_string())).await;
        }
        if matches!(&outcome, Err(error) if error.fault() == Fault::Retry) {
            left.forward = runner.forward.take_if(|pipe| pipe.spool.is_some());
        }
        if let Some(pipe) = &left.forward {
            // Without the lease nothing is applied; reading goes on.
            pipe.only_capture();
        }
        runner.stop_streams().await;
        if matches!(outcome, Err(Error::Ended)) {
            report(Notice::Ended);
            // Not on the runner's own session, on which a request may have been dropped half way.
            let home = Session::control(&config.target).await?;
            return Ok(Store::new(home, config.job.clone()).load_existing().await?.phase);
        }
        outcome
    }

    /// Takes the lease, ends what a dead predecessor left, makes the job's tables.
    async fn open(
        config: &JobConfig,
        report: &Report,
        stop: &watch::Receiver<bool>,
        left: &mut Left,
    ) -> Result<(Runner, Vigil)> {
        let mut config = config.clone().with_runner_name().reaching_shards().await?;
        let (lease, sessions) = lease::take_with_sessions(&config, left.holder.as_ref()).await?;
        left.holder = Some(lease.holder().clone());
        let [home, mut listener, mut source] = sessions?;
        let mut store = Store::holding(home, config.job.clone(), config.tuning.ask_ahead).await?;
        if left.opened && store.load().await?.is_none() {
            // It was finished or canceled while we were away: nothing is to be made anew.
            return Err(store.no_job().await);
        }
        let selection = config.options.selection(&mut source).await?;
        let checked = admit(&config, &selection, &mut source, &mut store, report).await?;
        lease::end_predecessors(&mut source, &config.job, &[]).await?;
        let listen = format!("listen {}", crate::id::quote_ident(&config.job.channel()));
        let listening = async { Ok(listener.execute(&listen).await?) };
        tokio::try_join!(make_tables(&config, &mut store, &mut source), listening)?;
        take_over(&mut config, &mut store, &mut source, report).await?;
        let spool = super::place::choose(&config, &mut store, &mut source).await?;
        let capture = capturing::settle_half(&mut config, spool.as_ref()).await?;
        if config.half == Half::Apply
            && let Some(pipe) = left.forward.take_if(|pipe| pipe.half != Half::Apply)
        {
            // Another reads the source since.
            pipe.stop(STREAM_PATIENCE).await;
        }
        store.forget_error().await?;
        let (busy, flying) = (Arc::new(AtomicBool::new(true)), watch::channel(false).0);
        let leases = std::iter::once(lease).chain(capture).collect();
        let vigil = Vigil::new(leases, &config, busy.clone(), flying.subscribe());
        let runner = Runner {
            config,
            report: report.clone(),
            stop: stop.clone(),
            store,
            listener,
            selection,
            probes: Probes::default(),
            forward: None,
            reverse: None,
            keeper: None,
            heartbeat: None,
            standbys: None,
            sealed: None,
            silent: None,
            gate: Arc::default(),
            flying,
            asked: None,
            slot: None,
            hold: None,
            hold_exact: false,
            late: None,
            reads_due: None,
            letters: None,
            level_at: None,
            busy,
            validating: None,
            refreshing: None,
            unrefreshed: Vec::new(),
            checked,
            spool,
        };
        Ok((runner, vigil))
    }

    async fn drive(&mut self, until: &Until) -> Result<Phase> {
        let mut event = Event::Start;
        loop {
            let row = self.row().await?;
            let phase = row.phase;
            let (next, commands) = match step(phase, event) {
                Ok(stepped) => stepped,
                Err(refused) => {
                    self.answer_flip(Err(refused.to_string())).await?;
                    return Err(refused.into());
                }
            };
            if next != phase {
                self.enter(&row, next).await?;
            }
            let mut following = None;
            for command in commands {
                if let Some(event) = self.execute(command).await? {
                    following = Some(event);
                }
            }
            event = match following {
                Some(event) => event,
                None if next == Phase::Checked => Event::Start,
                None => match self.attend(until).await? {
                    Some(event) => event,
                    None => return Ok(self.row().await?.phase),
                },
            };
        }
    }

    /// Stores a phase. One that begins a flip is stored with the flip's record.
    async fn enter(&mut self, from: &JobRow, phase: Phase) -> Result<()> {
        match (self.asked.clone(), phase) {
            (Some((_, request)), Phase::CuttingOver) => {
                let record = request.record(from.phase, from.flip.as_ref());
                self.store.set_phase_and_flip(phase, &record).await?;
            }
            _ => self.store.set_phase(phase).await?,
        }
        self.say(Notice::Phase(phase));
        Ok(())
    }

    async fn execute(&mut self, command: Command) -> Result<Option<Event>> {
        Ok(match command {
            Command::Check => Some(self.check().await?),
            Command::MakeSchema => Some(self.make_schema().await?),
            Command::Copy => {
                self.keep_standbys();
                Some(self.copy().await?)
            }
            Command::FollowForward => {
                if let Some(event) = self.unbroken(false).await? {
                    return Ok(Some(event));
                }
                self.silence_written().await?;
                self.follow_forward().await?
            }
            Command::FollowReverse => self.follow_reverse().await?,
            Command::CatchUp => self.measure_level().await?,
            Command::UndoFlip | Command::ReleaseClients => self.lead_or_wait(command).await?,
            Command::Flip(_) => {
                let _ = self.flying.send_replace(true);
                let outcome = self.lead_clients(command).await;
                let _ = self.flying.send_replace(false);
                outcome?
            }
            // Finish and cancel run without a runner: see `cleanup`.
            Command::CleanUp => None,
        })
    }

    pub(super) async fn lead_clients(&mut self, command: Command) -> Result<Option<Event>> {
        Ok(match command {
            Command::Flip(flip) => Some(self.flip(flip).await?),
            Command::UndoFlip => Some(self.undo_flip().await?),
            _ => self.release_clients().await?,
        })
    }

    /// A flip that was cut short may have left triggers and foreign keys at work on the side that
    /// the streams, which start before it is undone, go on writing to.
    async fn silence_written(&mut self) -> Result<()> {
        let row = self.row().await?;
        if row.phase == Phase::CuttingOver
            && let Some(record) = row.flip
        {
            let flip = super::request::stream_of(&record.flip);
            let context = super::request::context_of(&self.config, &record);
            self.rules(flip, &row.abilities).await?.silence_dest(&context).await?;
        }
        Ok(())
    }

    /// The job's row.
    pub(super) async fn row(&mut self) -> Result<JobRow> {
        self.store.load_existing().await
    }

    /// Tells the watcher.
    pub(super) fn say(&self, notice: Notice) {
        (self.report)(notice);
    }

    /// Tables of a side whose rows are followed, parents included.
    pub(super) async fn tables(&self, side: &Config) -> Result<Vec<Table>> {
        let mut tables = self.tables_with_rows(side).await?;
        tables.retain(|table| !table.unlogged);
        Ok(tables)
    }

    /// The same and unlogged ones, which are copied and cannot be followed.
    pub(super) async fn tables_with_rows(&self, side: &Config) -> Result<Vec<Table>> {
        let mut session = Session::control(side).await?;
        session.set_patience(CATALOG_WAIT);
        let selection = self.selection_on(side);
        let mut all = tables(&mut session, &selection).await?;
        all.retain(|table| selection.has_rows(&table.name));
        Ok(all)
    }

    pub(super) async fn answer_flip(
        &mut self,
        outcome: std::result::Result<serde_json::Value, String>,
    ) -> Result<()> {
        if let Some((id, _)) = self.asked.take() {
            client::answer(&mut self.store.session, &id, outcome).await?;
        }
        Ok(())
    }
}

/// Names of what is published: every table with rows, the canary, and where what the other stream
/// writes here is `marked` by it, the row that does so.
pub(super) fn published(job: &JobName, tables: &[Table], marked: bool) -> Vec<QualifiedName> {
    let names = tables.iter().map(|t| t.name.clone()).chain([job.canary()]);
    names.chain(marked.then(|| QualifiedName::new("walferry", "progress"))).collect()
}

async fn stopped(stop: &mut watch::Receiver<bool>) {
    let _ = stop.wait_for(|stop| *stop).await;
}

/// After a stop is asked for, what is under way gets a moment to end by itself; a flip gets the
/// time to be undone or finished, as clients may be held.
async fn wait_and_linger(stop: &mut watch::Receiver<bool>, flying: &mut watch::Receiver<bool>) {
    let _ = stop.wait_for(|stop| *stop).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let landed = flying.wait_for(|flying| !*flying);
    let _ = tokio::time::timeout(Duration::from_secs(60), landed).await;
}

/// Shows status what keeps the runner from its work, unless another runner has taken over.
async fn store_trouble(config: &JobConfig, error: &Error, last: &Option<Holder>) -> Result<()> {
    let session = Session::control(&config.target).await?;
    let mut store = Store::new(session, config.job.clone());
    let holder = lease::holder(&mut store.session, &config.job).await?;
    let ours = last.as_ref().map(|last| last.pid.to_string());
    if holder.is_none() || holder == ours {
        store.set_error(Some(&error.to_string())).await?;
    }
    Ok(())
}
