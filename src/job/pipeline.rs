//! One stream from slot to tables: source -> decode -> buffer -> apply, kept going.
//!
//! Reader and applier are two tasks with a bounded queue between them. Either may fail: then both
//! are stopped, and both begin again from the progress that the target holds. Faults that may mend
//! themselves (a restart, a cut network) are tried again for ever with growing pauses, and shown in
//! status meanwhile; any other ends the pipe and the job stops with its message.
//!
//! Through a spool the two ends are kept going apart: see `spooling`.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::ability::Ability;
use super::error::Error;
use super::failover::{is_loss, record_timeline};
use super::mapped;
use super::opening::{Half, SpoolOptions};
use super::{Result, decoding, nudging, spooling};
use crate::apply::altered::Alter;
use crate::apply::{self, Applied, Applier, Gate, OnRowError, Tuning};
use crate::buffer::memory;
use crate::buffer::spool::Spill;
use crate::change::{self, AllRead, Snapshot};
use crate::clock::Backoff;
use crate::cluster::shard;
use crate::decode::Plugin;
use crate::fault::{Fault, Faulty};
use crate::id::{JobName, QualifiedName, Stream};
use crate::limit;
use crate::lsn::Lsn;
use crate::map::Map;
use crate::pg::{Config, Session};
use crate::source::{self, BulkOptions, Followed, Positions, Recorded, StreamOptions, Transport};

/// Decides whether a table is part of the stream. Asked once for each description of it.
pub type TableFilter = Arc<dyn Fn(&QualifiedName) -> bool + Send + Sync>;

/// By table, what the copy read, and a position beyond which the snapshot is not asked.
pub type Visibility = HashMap<QualifiedName, (Snapshot, Lsn)>;

/// How a spool is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SpoolState {
    /// Exclusive: everything that commits below it is durable in the spool, or on the written side.
    pub spooled_lsn: Lsn,
    /// Bytes of its files.
    pub spool_bytes: u64,
    /// Bytes of WAL that the read side keeps for the slot.
    pub retained_bytes: Option<u64>,
}

/// What a pipe needs to know.
#[derive(Clone)]
pub struct PipeOptions {
    /// The job.
    pub job: JobName,
    /// Which way.
    pub stream: Stream,
    /// The side that is read.
    pub from: Config,
    /// A standby of it that has the slot; `None`: it has the slot itself.
    pub decode_from: Option<Config>,
    /// The side that is written.
    pub to: Config,
    /// They are tables alone, and may be shards of a Citus cluster.
    pub tables_only: bool,
    /// The tables that are read, where the decoder gives every table of the database.
    pub followed: Arc<Followed>,
    /// The publications that are read, where the decoder is pgoutput.
    pub publications: Vec<String>,
    /// See [`StreamOptions::plain_numbers`].
    pub plain_numbers: bool,
    /// How the slot is read.
    pub transport: Transport,
    /// The read side's server and slot, as recorded when the slot was made.
    pub recorded: Recorded,
    /// The timeline of the read side that was gone on with last; as recorded, unless a standby took
    /// over since.
    pub timeline: Arc<AtomicU32>,
    /// Where the job's tables are.
    pub home: Config,
    /// Which tables are applied.
    pub tables: TableFilter,
    /// Those of them that are known by name, if they are not too many to be asked about at once.
    pub expected: Vec<QualifiedName>,
    /// What the role may do on the side that is written.
    pub ability: Ability,
    /// Tables that were copied under a snapshot later than the slot's. `None`: nothing is applied
    /// until [`Pipe::begin_apply`]; for a spool only.
    pub visibility: Option<Visibility>,
    /// Where changes wait; `None` for memory.
    pub spool: Option<SpoolOptions>,
    /// Where transactions in progress wait for their end; `None` asks the server not to send them.
    pub streaming: Option<Arc<Spill>>,
    /// See [`StreamOptions::two_phase`].
    pub two_phase: bool,
    /// Which tables' changes are applied; `None`: all.
    pub gate: Option<Arc<Gate>>,
    /// How they are applied.
    pub tuning: Tuning,
    /// What becomes of a row that is refused.
    pub on_row_error: OnRowError,
    /// Who says what becomes of tables that are altered.
    pub alter: Option<Arc<dyn Alter>>,
    /// What becomes of the changes between the buffer and the applier.
    pub map: Option<Arc<Map>>,
    /// Applications write to both sides, and who wins a conflict.
    pub two_way: Option<apply::conflict::Policy>,
    /// What of a backlog is read in bulk.
    pub backlog: BulkOptions,
    /// By it the reader tells the applier that it is through with a backlog.
    pub all_read: AllRead,
}

/// Both ways of keeping a stream going, through memory and through a spool, open their ends by
/// these.
impl PipeOptions {
    /// Connects to the written side, and reads its progress.
    pub(super) async fn open_applier(&self, visibility: Visibility) -> Result<Applier> {
        let (tables, visibility) = match &self.map {
            Some(map) => mapped::applied(map, &self.tables, visibility),
            None => (self.tables.clone(), visibility),
        };
        let wanted = apply::Options {
            tables: Some(tables),
            expected: match &self.map {
                Some(_) => Vec::new(),
                None => self.expected.clone(),
            },
            visibility,
            gate: self.gate.clone(),
            tuning: self.tuning,
            all_read: self.all_read.clone(),
            on_row_error: self.on_row_error,
            alter: self.alter.clone(),
            progress: self.ability.progress(),
            replica_role: self.ability.replica_role,
            two_way: self.two_way.clone().map(|policy| apply::conflict::TwoWay {
                policy,
                stream: self.stream,
                opposite: self.job.object(self.stream.opposite()),
                other: self.from.clone(),
            }),
            ..apply::Options::new(self.job.object(self.stream).as_str())
        };
        Ok(Applier::connect(&self.to, wanted).await?)
    }

    /// The server that has the slot.
    pub(super) fn read_at(&self) -> &Config {
        self.decode_from.as_ref().unwrap_or(&self.from)
    }

    /// Reads, for as long as a standby that is decoded from goes with the source.
    pub(super) async fn read<S: change::Sink>(
        &self,
        reader: source::Reader,
        sink: &mut S,
        durable: watch::Receiver<Lsn>,
        positions: &watch::Sender<Positions>,
        stop: watch::Receiver<bool>,
    ) -> Result<source::End> {
        tokio::select! {
            ended = reader.run(sink, durable, positions, stop) => Ok(ended?),
            error = decoding::parted(self) => Err(error),
        }
    }

    /// True if the slot must have been told all that is in hand before it is read again: by SQL it
    /// gives everything since, and test_decoding does not say in time where that commits.
    pub(super) fn settles_first(&self) -> bool {
        let plugin = self.recorded.plugin.parse::<Plugin>();
        self.transport == Transport::Pull && plugin.is_ok_and(|p| !p.tells_commit_first())
    }

    /// The place for transactions in progress. Not for a reader that is opened because there was no
    /// room: then the server keeps them, until that reader ends.
    fn spill(&self) -> Option<Arc<dyn change::Spill>> {
        let spill = self.streaming.clone().filter(|_| self.transport == Transport::Stream)?;
        if spill.take_refused() { None } else { Some(spill) }
    }

    /// Opens the slot to be read from `start_lsn` on, all below which is in hand already; the slot
    /// is told `confirmed_lsn` and nothing beyond.
    pub(super) async fn open_reader(
        &self,
        start_lsn: Lsn,
        confirmed_lsn: Lsn,
    ) -> Result<source::Reader> {
        // Somebody may have turned it on since, and changes would be left out without a word.
        if self.tables_only && shard::is_captured(&self.from).await? {
            return Err(Error::ShardsCaptured { side: self.from.label.clone() });
        }
        let name = self.job.object(self.stream);
        let opposite = self.job.object(self.stream.opposite());
        let before = self.timeline.load(Ordering::SeqCst);
        let recorded = Recorded { timeline: before, ..self.recorded.clone() };
        let recorded = match &self.decode_from {
            Some(standby) => decoding::in_step(&self.from, standby, &recorded, start_lsn).await?,
            None => recorded,
        };
        let wanted = StreamOptions {
            // Not origin 'none' at the server: an application's own transactions may carry an
            // origin (it may itself be fed by a subscription), and would be left out without a
            // trace.
            skip_origins: self.job.origins(self.stream.opposite()).to_vec(),
            skip_markers: vec![opposite],
            followed: self.followed.clone(),
            publications: self.publications.clone(),
            plain_numbers: self.plain_numbers,
            confirmed_lsn,
            bulk: self.backlog,
            all_read: self.all_read.clone(),
            spill: self.spill(),
            two_phase: self.two_phase && self.transport == Transport::Stream,
            ..StreamOptions::new(&name, &name, start_lsn, recorded)
        };
        let reader = source::Reader::open(self.read_at(), self.transport, wanted).await?;
        let timeline = reader.timeline();
        if timeline != before {
            let mut home = Session::control(&self.home).await?;
            record_timeline(&mut home, &self.job, &self.stream.to_string(), timeline).await?;
            self.timeline.store(timeline, Ordering::SeqCst);
            tracing::info!(stream = %self.stream, timeline, "a standby has taken over");
        }
        Ok(reader)
    }
}

/// A running stream. Dropping it stops it at once; [`Pipe::stop`] at a batch boundary.
#[derive(Debug)]
pub struct Pipe {
    /// How far the written side is.
    pub applied: watch::Receiver<Applied>,
    /// How far the reader is.
    pub positions: watch::Receiver<Positions>,
    /// Set to stop applying at a position; `None` lets it run.
    pub hold: watch::Sender<Option<Lsn>>,
    /// A fault that is being tried again.
    pub trouble: watch::Receiver<Option<String>>,
    /// How the spool is doing; `None` without one.
    pub spool: Option<watch::Receiver<SpoolState>>,
    /// Which ends are in this process.
    pub half: Half,
    allowed: watch::Sender<Option<Visibility>>,
    fatal: watch::Receiver<Option<Fatal>>,
    stop: watch::Sender<bool>,
    task: Task<()>,
    _nudging: Option<Task<()>>,
}

/// What ended a stream.
#[derive(Clone, Debug)]
struct Fatal {
    message: String,
    /// Something is lost, which a refill mends.
    loss: bool,
}

/// A task that ends with whoever holds this.
#[derive(Debug)]
pub(super) struct Task<T>(pub JoinHandle<T>);

impl<T> Drop for Task<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// The pipe's side of what its owner watches and sets.
pub(super) struct Ends {
    pub applied: watch::Sender<Applied>,
    pub positions: watch::Sender<Positions>,
    pub hold: watch::Receiver<Option<Lsn>>,
    pub trouble: watch::Sender<Option<String>>,
    pub stop: watch::Receiver<bool>,
    pub allowed: watch::Receiver<Option<Visibility>>,
    pub spool: watch::Sender<SpoolState>,
}

impl Pipe {
    /// Starts the stream in tasks of its own. Does not wait for it to connect.
    pub fn start(options: PipeOptions) -> Pipe {
        let (applied_tx, applied) = watch::channel(Applied::default());
        let (positions_tx, positions) = watch::channel(Positions::default());
        let (hold, hold_rx) = watch::channel(None);
        let (trouble_tx, trouble) = watch::channel(None);
        let (fatal_tx, fatal) = watch::channel(None);
        let (stop, stop_rx) = watch::channel(false);
        let (allowed, allowed_rx) = watch::channel(options.visibility.clone());
        let (spool_tx, spool) = watch::channel(SpoolState::default());
        let spool = options.spool.is_some().then_some(spool);
        let half = options.spool.as_ref().map_or(Half::Both, |spool| spool.half);
        let _nudging = (half != Half::Apply).then(|| nudging::start(&options));
        let ends = Ends {
            applied: applied_tx,
            positions: positions_tx,
            hold: hold_rx,
            trouble: trouble_tx,
            stop: stop_rx,
            allowed: allowed_rx,
            spool: spool_tx,
        };
        let task = Task(tokio::spawn(async move {
            let outcome = match &options.spool {
                Some(_) => spooling::run(&options, ends).await,
                None => supervise(&options, ends).await,
            };
            if let Err(error) = outcome {
                // Told by whoever looks after the stream.
                tracing::info!(stream = %options.stream, %error, "stream stopped");
                let loss = is_loss(&error);
                let _ = fatal_tx.send(Some(Fatal { message: error.to_string(), loss }));
            }
        }));
        Pipe {
            applied,
            positions,
            hold,
            trouble,
            spool,
            half,
            allowed,
            fatal,
            stop,
            task,
            _nudging,
        }
    }

    /// Lets a pipe with a spool apply, from where the written side stands. Nothing changes if it
    /// does already.
    pub fn begin_apply(&self, visibility: Visibility) {
        self.allowed.send_if_modified(|allowed| {
            let modified = allowed.is_none();
            allowed.get_or_insert(visibility);
            modified
        });
    }

    /// Goes on reading into the spool, and stops applying at the next batch boundary. What was to
    /// be held is forgotten.
    pub fn only_capture(&self) {
        let _ = self.allowed.send_replace(None);
        let _ = self.hold.send_replace(None);
    }

    /// The error that ended the stream, if one did.
    pub fn fatal(&self) -> Option<String> {
        self.fatal.borrow().as_ref().map(|fatal| fatal.message.clone())
    }

    /// The same, if it says what is lost.
    pub fn lost(&self) -> Option<String> {
        self.fatal.borrow().as_ref().filter(|fatal| fatal.loss).map(|f| f.message.clone())
    }

    /// Stops at the next batch boundary, or at once after `patience`: a server that is silent or a
    /// lock that is held must not keep a process from ending.
    pub async fn stop(mut self, patience: Duration) {
        let _ = self.stop.send(true);
        let _ = tokio::time::timeout(patience, &mut self.task.0).await;
    }
}

async fn supervise(options: &PipeOptions, mut ends: Ends) -> Result<()> {
    let fresh = || Backoff::new(Duration::from_millis(100), Duration::from_secs(2));
    let mut backoff = fresh();
    loop {
        let before = ends.applied.borrow().applied_lsn;
        match attempt(options, &mut ends).await {
            Ok(()) if *ends.stop.borrow() => return Ok(()),
            // The server ended the stream politely (shutdown): begin again.
            Ok(()) => {}
            Err(error) if error.fault() == Fault::Retry => {
                tracing::warn!(stream = %options.stream, %error, "stream broken, trying again");
                let _ = ends.trouble.send(Some(error.to_string()));
            }
            Err(error) => return Err(error),
        }
        if ends.applied.borrow().applied_lsn > before {
            backoff = fresh();
        }
        tokio::select! {
            () = tokio::time::sleep(backoff.step()) => {}
            _ = ends.stop.wait_for(|stop| *stop) => return Ok(()),
        }
    }
}

/// Connects both ends, checks that slot and progress fit, and runs until something ends.
async fn attempt(options: &PipeOptions, ends: &mut Ends) -> Result<()> {
    let mut applier = options.open_applier(options.visibility.clone().unwrap_or_default()).await?;
    if options.settles_first() {
        applier.await_durable().await?;
    }
    let told_lsn = applier.durable();
    let reader = options.open_reader(applier.progress(), told_lsn).await?;
    let _ = ends.trouble.send(None);
    let (mut queue, feed) = memory::queue(limit::BUFFER_BYTES);
    let (durable_tx, durable) = watch::channel(told_lsn);
    let (positions, stop) = (ends.positions.clone(), ends.stop.clone());
    let own = options.clone();
    let mut reading =
        Task(tokio::spawn(
            async move { own.read(reader, &mut queue, durable, &positions, stop).await },
        ));
    let (applied, hold, stop) = (ends.applied.clone(), ends.hold.clone(), ends.stop.clone());
    let map = options.map.clone().map(|map| (map, options.from.clone()));
    let mut applying = Task(tokio::spawn(async move {
        mapped::apply(map, &mut applier, feed, (&applied, hold, stop)).await
    }));
    let mut watching = ends.applied.subscribe();
    loop {
        tokio::select! {
            changed = watching.changed() => {
                let durable_lsn = watching.borrow_and_update().durable_lsn;
                durable_tx.send_if_modified(|last| {
                    let modified = durable_lsn > *last;
                    *last = durable_lsn.max(*last);
                    modified
                });
                if changed.is_err() { return Ok(()); }
            }
            done = &mut applying.0 => {
                let durable_lsn = ends.applied.borrow().durable_lsn;
                let _ = durable_tx.send(durable_lsn);
                drop(durable_tx);
                // The reader tells the slot once more, then finds nobody to read for.
                let _ = tokio::time::timeout(Duration::from_secs(2), &mut reading.0).await;
                return flatten(done);
            }
            done = &mut reading.0 => {
                // What was received is still applied; then both begin again.
                let read = flatten(done);
                flatten((&mut applying.0).await)?;
                return read.map(|_| ());
            }
        }
    }
}

/// A task's result; a panic in it is ours to pass on.
pub(super) fn flatten<T, E>(
    done: std::result::Result<std::result::Result<T, E>, tokio::task::JoinError>,
) -> std::result::Result<T, E> {
    match done {
        Ok(result) => result,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}
