//! `--decode-from`: the forward stream's slot is on a standby of the source, and decoded there.
//!
//! From 16 on a standby may have logical slots and walsenders of its own, which takes decoding and
//! sending off the primary. All else stays with the primary: the publication, rows (a snapshot on a
//! standby does not list what was running, on which exact visibility rests), heartbeats, fence,
//! barrier and seal.
//!
//! 1. The publication is made on the primary, and the standby waited for until it has replayed it.
//! 2. The slot is made on the standby, by the records of running transactions that the primary is
//!    asked for ([`make_slot`]). The copy then reads under a snapshot of its own, as beside a slot
//!    that is made by SQL.
//! 3. The stream is opened once standby and primary are seen to be of one history ([`in_step`]),
//!    and opened again as soon as either is on another timeline ([`parted`]). The slot is told what
//!    is durable, by the stream, as on a primary (law 1).
//! 4. A cutover asks once more behind the barrier: what a standby gave that was promoted under our
//!    hands is not the source's (`cutover::held`).
//!
//! # What a timeline tells
//! A standby goes on to another timeline while its walsenders keep sending, so that the target may
//! have more than the fork before we know of it. It is the source's all the same: a standby replays
//! one history, and one that was rewound has lost its slots (pg_rewind removes them). So where the
//! standby has our slot and is on the source's timeline, all that it gave is of the source's
//! history; where it is behind on an older one, all that the target has must be from before the
//! fork. That goes for the standby which the stream was read from before; another one is held
//! against the recorded timeline ([`settle`]).
//!
//! A standby that is promoted itself takes its slot along: the stream goes on, once `--source`
//! leads to it. What survives a crash is the slot, and in `walferry.job.reading` where it is.
//!
//! Left out: two phases, and reading by SQL.
//!
//! <https://www.postgresql.org/docs/16/logicaldecoding-explanation.html#LOGICALDECODING-REPLICATION-SLOTS>

use std::time::Duration;

use super::admit::recorded;
use super::config::JobConfig;
use super::failover::AfterFailover;
use super::opening::Half;
use super::pipeline::PipeOptions;
use super::run::{Notice, Runner};
use super::standbys::place;
use super::store::Store;
use super::{Error, Result};
use crate::clock::Deadline;
use crate::cutover::barrier;
use crate::id::Stream;
use crate::lsn::Lsn;
use crate::pg::{Config, Purpose, Session};
use crate::source::continuity::{
    Recorded, check_slot, check_system, check_system_by_sql, identify, identify_by_sql,
};
use crate::source::nudge::Nudge;
use crate::source::slot::{self, Blocker, CreateOptions};
use crate::{apply, source};

/// Between two records of running transactions that are asked for. A slot takes up to three.
const RECORD_INTERVAL: Duration = Duration::from_millis(300);

/// Between two looks at timelines.
const TURN: Duration = Duration::from_secs(1);

/// Between two looks at how far a standby has replayed.
const REPLAY_STEP: Duration = Duration::from_millis(50);

impl JobConfig {
    /// The server that a stream's slot is on.
    pub(super) fn read_at(&self, stream: Stream) -> &Config {
        match (stream, &self.decode_from) {
            (Stream::Forward, Some(standby)) => standby,
            (Stream::Forward, None) => &self.source,
            (Stream::Reverse, _) => &self.target,
        }
    }

    /// Where the forward slot is, if that is not the source.
    fn decoded_at(&self) -> Option<String> {
        self.decode_from.as_ref().map(place)
    }
}

impl Runner {
    /// The forward slot on the standby, and its consistent point.
    pub(super) async fn make_slot_there(
        &mut self,
        source: &mut Session,
        standby: &Config,
        options: &CreateOptions,
    ) -> Result<Lsn> {
        // Of an earlier run that read elsewhere.
        slot::drop(source, &options.name).await?;
        let mut there = Session::control(standby).await?;
        let lsn = barrier::mark(source, "standby").await?;
        self.say(Notice::Said(format!("waiting for standby {} to replay {lsn}", place(standby))));
        replayed(&mut there, lsn, options.wait).await?;
        let waiting = self.tell_blockers();
        make_slot(standby, &self.config.source, options, waiting).await
    }

    /// Remembers where the forward slot is.
    pub(super) async fn keep_place(&mut self) -> Result<()> {
        let mut readings = self.store.load_readings().await?;
        readings.decoded_at = self.config.decoded_at();
        self.store.save_readings(&readings).await
    }
}

/// Waits until the standby has all before `lsn`, which `there` is a session of.
async fn replayed(there: &mut Session, lsn: Lsn, wait: Duration) -> Result<()> {
    let sql = format!(
        "select not pg_catalog.pg_is_in_recovery() \
           or pg_catalog.pg_last_wal_replay_lsn() >= '{lsn}'::pg_lsn, \
         coalesce(pg_catalog.pg_last_wal_replay_lsn(), '0/0')"
    );
    let deadline = Deadline::after(wait);
    loop {
        let row = there.query_one(&sql, &[]).await?;
        if row.bool(0)? {
            return Ok(());
        }
        if deadline.passed() {
            let (peer, replay_lsn) = (there.peer().to_string(), row.lsn(1)?);
            return Err(source::Error::StandbyBehind { peer, replay_lsn, wanted_lsn: lsn }.into());
        }
        tokio::time::sleep(REPLAY_STEP).await;
    }
}

/// Makes a slot on a standby, while the primary logs what it waits for. `on_wait` as for
/// [`slot::create_plain`].
pub(super) async fn make_slot(
    standby: &Config,
    source: &Config,
    options: &CreateOptions,
    on_wait: impl FnMut(&[Blocker]),
) -> Result<Lsn> {
    let mut maker = Session::connect(standby, Purpose::Sql).await?;
    let mut watcher = Session::control(standby).await?;
    let making = slot::create_plain(&mut maker, &mut watcher, options, on_wait);
    tokio::pin!(making);
    let mut nudge = Nudge::new(&options.name, &options.plugin);
    let mut asked: Option<Session> = None;
    loop {
        tokio::select! {
            made = &mut making => return Ok(made?),
            () = tokio::time::sleep(RECORD_INTERVAL) => {}
        }
        // A primary that refuses or is away writes one by itself, sooner or later.
        let asking = async {
            let session = match &mut asked {
                Some(open) => open,
                None => asked.insert(Session::control(source).await?),
            };
            nudge.ask(session).await.map_err(Error::from)
        };
        if let Err(error) = asking.await {
            tracing::debug!(%error, "no record of running transactions was asked for");
            asked = None;
        }
    }
}

/// Holds where the forward slot is to be read against where it was last. Another place is taken
/// where it has the slot, at or before what the target has, and that is from before its fork.
///
/// Errors: `SlotElsewhere`, unless what differs may be read again; those of law 4.
pub(super) async fn settle(config: &JobConfig, store: &mut Store) -> Result<()> {
    let row = store.load_existing().await?;
    let mut readings = store.load_readings().await?;
    let (given, known) = (config.decoded_at(), readings.decoded_at.clone());
    if given == known || row.slot_lsn.is_none() || config.half == Half::Apply {
        return Ok(());
    }
    let name = config.job.object(Stream::Forward);
    let at = config.read_at(Stream::Forward);
    let mut session = Session::connect(at, Purpose::Replication).await?;
    let Some(status) = slot::status(&mut session, &name).await? else {
        if config.after_failover == AfterFailover::Refill {
            return Ok(());
        }
        let mend = match &known {
            Some(standby) => format!("give --decode-from the standby {standby}"),
            None => "leave --decode-from out".to_string(),
        };
        let peer = session.peer().to_string();
        return Err(Error::SlotElsewhere { slot: name, peer, mend });
    };
    let plugin = readings.forward.as_ref().map_or("", |reading| reading.decoder.as_str());
    let mut recorded = recorded(at, row.source_system.as_deref(), plugin);
    recorded.timeline = row.timelines.forward.unwrap_or(recorded.timeline);
    let progress_lsn = apply::durable_progress(&mut store.session, &name).await?;
    // The standby was promoted, and brought along the slot that it was read from. All that came of
    // it is of this history, also what came after the fork, before anybody had looked.
    let came_along = known.is_some() && given.is_none();
    if came_along {
        recorded.timeline = identify(&mut session).await?.timeline;
    }
    check_system(&mut session, &recorded, progress_lsn).await?;
    check_slot(&name, Some(&status), &recorded, progress_lsn)?;
    if came_along {
        store.record_timeline(Stream::Forward.as_str(), recorded.timeline).await?;
    }
    readings.decoded_at = given;
    store.save_readings(&readings).await
}

/// What the stream from `standby` is to find there, all up to `start_lsn` being in hand: its
/// timeline of now, as long as that is the source's, or was left by it behind `start_lsn`.
///
/// Errors: `AnotherTimeline` where the source's history lacks what is in hand; `SourceLeft`, to be
/// tried again, where the standby is on a timeline that the source is not on yet.
pub(super) async fn in_step(
    source: &Config,
    standby: &Config,
    recorded: &Recorded,
    start_lsn: Lsn,
) -> Result<Recorded> {
    let mut there = Session::connect(standby, Purpose::Replication).await?;
    let found = identify(&mut there).await?;
    let mut primary = Session::control(source).await?;
    let timeline = identify_by_sql(&mut primary).await?.timeline;
    if timeline < found.timeline {
        return Err(source::Error::SourceLeft {
            standby: there.peer().to_string(),
            peer: primary.peer().to_string(),
            found_timeline: found.timeline,
            timeline,
        }
        .into());
    }
    let expected = Recorded { timeline: found.timeline, ..recorded.clone() };
    check_system_by_sql(&mut primary, source, &expected, start_lsn).await?;
    Ok(expected)
}

/// Returns once the source or the standby is on another timeline than the stream was opened on: it
/// has to be opened again. Never where the source is read itself. Servers that do not answer are
/// asked again, as the stream says so itself.
pub(super) async fn parted(options: &PipeOptions) -> Error {
    let Some(standby) = &options.decode_from else { return std::future::pending().await };
    let mut sessions = None;
    loop {
        tokio::time::sleep(TURN).await;
        let expected = options.timeline.load(std::sync::atomic::Ordering::SeqCst);
        let looking = async {
            let (primary, there) = match &mut sessions {
                Some(open) => open,
                None => sessions.insert((
                    Session::control(&options.from).await?,
                    Session::connect(standby, Purpose::Replication).await?,
                )),
            };
            let at_source = identify_by_sql(primary).await?.timeline;
            Ok::<_, Error>((at_source, identify(there).await?.timeline))
        };
        let looked = tokio::time::timeout(TURN * 5, looking).await;
        match looked {
            Ok(Ok((source, standby))) if source != expected || standby != expected => {
                return source::Error::TimelineLeft { expected, source_timeline: source, standby }
                    .into();
            }
            Ok(Ok(_)) => {}
            Ok(Err(_)) | Err(_) => sessions = None,
        }
    }
}
