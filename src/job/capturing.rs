//! `walferry capture`: the half of a job that reads the source's slot into a topic, in a process
//! of its own, mostly on a host near the source. The other half, `walferry apply`, is the runner.
//!
//! The two share no more than the home database and the topic. Capture makes nothing on either
//! side: it waits until the runner has made the slot, reads it while the job lives, and ends with
//! the job. It has a lease of its own, beside the runner's: who holds it reads the forward slot. So
//! a lost capture is taken over by another that waits for the lease; and a `run`, which does both,
//! holds both leases, or only applies where a capture is alive.
//!
//! What survives a crash is in the topic; where reading goes on is seen from its end. While the
//! home database is away, which is on the target, reading goes on without the lease, until another
//! has it. One that takes a question and falls silent is away, too: each has its limit.
//!
//! Left out: reading the reverse slot, which the runner does, being near the target.

use std::time::Duration;

use tokio::sync::watch;

use super::lease::{self, Lease};
use super::opening::Half;
use super::pipeline::{Pipe, PipeOptions};
use super::place::Place;
use super::published::unchanged;
use super::run::{JobConfig, Notice, Report};
use super::state::Phase;
use super::store::{JobRow, Store};
use super::streams::{STREAM_PATIENCE, pipe_options};
use super::{Error, Result, decoding};
use crate::clock::Backoff;
use crate::fault::{Fault, Faulty};
use crate::id::Stream;
use crate::lsn::Lsn;
use crate::pg::Session;

/// Between two looks at the job.
const TURN: Duration = Duration::from_millis(500);

/// A home that was never reached may be a mistake in its name.
const FIRST_TRY: Duration = Duration::from_secs(10);

/// Settles which half a runner does, and takes the lease of who reads the source if it is its own
/// to take. Errors: [`Error::NoTopic`] for `walferry apply` without one.
pub(super) async fn settle_half(
    config: &mut JobConfig,
    place: Option<&Place>,
) -> Result<Option<Lease>> {
    let topic = matches!(place, Some(Place::Kafka(_)));
    match config.half {
        Half::Apply if topic => Ok(None),
        Half::Apply | Half::Capture => Err(Error::NoTopic),
        Half::Both if !topic => Ok(None),
        Half::Both => {
            let name = lease::capture_name(&config.job);
            let lease = Lease::try_take_named(&config.target, &name).await?;
            if lease.is_none() {
                config.half = Half::Apply;
            }
            Ok(lease)
        }
    }
}

/// A stream that is being read, and the slot it is read from.
struct Running {
    pipe: Pipe,
    slot_lsn: Option<Lsn>,
}

/// How one holding of the lease ended.
enum End {
    /// The job has ended.
    Over,
    /// Told to stop.
    Stopped,
}

/// Reads the job's forward slot into its topic until the job ends or `stop`. With `standby` it
/// waits while another process does.
///
/// Errors: [`Error::Busy`] without `standby`; what a person must mend.
pub async fn capture(
    config: JobConfig,
    standby: bool,
    report: Report,
    mut stop: watch::Receiver<bool>,
) -> Result<()> {
    let mut config = config;
    let name = lease::capture_application_name(&config.job);
    config.half = Half::Capture;
    config.source = config.source.labelled("source").with_application_name(&name);
    config.target = config.target.labelled("target").with_application_name(&name);
    config.decode_from = config.decode_from.map(|standby| standby.with_application_name(&name));
    let begun = tokio::time::Instant::now();
    let (mut running, mut had, mut said) = (None, false, String::new());
    let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(2));
    loop {
        let ended = tokio::select! {
            ended = hold(&config, &report, &mut running, &mut had) => ended,
            _ = stop.wait_for(|stop| *stop) => Ok(End::Stopped),
        };
        let error = match ended {
            Ok(end) => {
                finish(&mut running).await;
                if matches!(end, End::Over) {
                    report(Notice::Ended);
                }
                return Ok(());
            }
            Err(error) => error,
        };
        match &error {
            Error::Busy { .. } => {
                // Whoever has the lease reads the slot.
                finish(&mut running).await;
                if !standby && !had {
                    return Err(error);
                }
            }
            _ if error.fault() != Fault::Retry || !had && begun.elapsed() > FIRST_TRY => {
                finish(&mut running).await;
                return Err(error);
            }
            _ => {}
        }
        if said != error.to_string() {
            said = error.to_string();
            report(Notice::Trouble(said.clone()));
        }
        tokio::select! {
            () = tokio::time::sleep(backoff.step()) => {}
            _ = stop.wait_for(|stop| *stop) => {}
        }
    }
}

async fn finish(running: &mut Option<Running>) {
    if let Some(Running { pipe, .. }) = running.take() {
        pipe.stop(STREAM_PATIENCE).await;
    }
}

/// Takes the lease and keeps the stream flowing. An error leaves the stream as it is.
async fn hold(
    config: &JobConfig,
    report: &Report,
    running: &mut Option<Running>,
    had: &mut bool,
) -> Result<End> {
    let mut lease = take(config).await?;
    let mut store = store(config).await?;
    if running.is_none() {
        let mut source = Session::control(&config.source).await?;
        let name = lease::capture_application_name(&config.job);
        lease::end_sessions(&mut source, &name, &[]).await?;
    }
    if !std::mem::replace(had, true) {
        report(Notice::Said(format!("job {}: the source is read here", config.job)));
    }
    loop {
        lease.check().await?;
        let row = store.load().await?;
        match &row {
            // Finished and forgotten, or not planned yet.
            None if running.is_some() => return Ok(End::Over),
            None => {}
            Some(row) if matches!(row.phase, Phase::Finished | Phase::Canceled) => {
                return Ok(End::Over);
            }
            Some(row) => keep_reading(config, report, &mut store, row, running).await?,
        }
        if let Some(Running { pipe, .. }) = running {
            if let Some(message) = pipe.fatal() {
                let stream = Stream::Forward.to_string();
                return Err(Error::Stream { stream, message });
            }
            if let Some(trouble) = pipe.trouble.borrow_and_update().clone() {
                report(Notice::Trouble(trouble));
            }
        }
        tokio::time::sleep(TURN).await;
    }
}

async fn take(config: &JobConfig) -> Result<Lease> {
    let name = lease::capture_name(&config.job);
    if let Some(lease) = Lease::try_take_named(&config.target, &name).await? {
        return Ok(lease);
    }
    let mut session = Session::control(&config.target).await?;
    let pid = lease::holder_of(&mut session, &name).await?.unwrap_or_default();
    Err(Error::Busy { job: name, pid })
}

async fn store(config: &JobConfig) -> Result<Store> {
    Ok(Store::new(Session::control(&config.target).await?, config.job.clone()))
}

/// Starts reading once there is a slot, and anew where that was made anew.
async fn keep_reading(
    config: &JobConfig,
    report: &Report,
    store: &mut Store,
    row: &JobRow,
    running: &mut Option<Running>,
) -> Result<()> {
    let ready = row.slot_lsn.is_some() && row.phase >= Phase::Copying;
    if running.as_ref().is_some_and(|running| running.slot_lsn != row.slot_lsn) {
        finish(running).await;
    }
    if !ready || running.is_some() {
        return Ok(());
    }
    if !matches!(row.spool, Some(Place::Kafka(_))) {
        return Err(Error::NoTopic);
    }
    unchanged(config, store, report).await?;
    decoding::settle(config, store).await?;
    let options = options(config, store, row).await?;
    *running = Some(Running { pipe: Pipe::start(options), slot_lsn: row.slot_lsn });
    Ok(())
}

/// By what the job was planned with, whatever this process was given.
async fn options(config: &JobConfig, store: &mut Store, row: &JobRow) -> Result<PipeOptions> {
    let mut source = Session::control(&config.source).await?;
    let selection = row.options.selection(&mut source).await?;
    pipe_options(config, store, &selection, Stream::Forward).await
}
