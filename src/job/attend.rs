//! What a runner does while its streams flow: hears commands, stores positions, notices that the
//! target is level.

use std::sync::atomic::Ordering;
use std::time::Duration;

use serde_json::{Value, json};

use super::align::PASSED;
use super::flip::FlipRequest;
use super::heartbeat::Heartbeat;
use super::left::outcome_value;
use super::pipeline::Pipe;
use super::run::{Notice, Runner, Until};
use super::state::{Event, Phase};
use super::store::StreamRow;
use super::{Error, Gone, Result, client};
use crate::clock::{Deadline, PgTimestamp};
use crate::cutover::{self, barrier};
use crate::id::Stream;
use crate::lsn::Lsn;
use crate::pg::{Config, Session};

/// Commands are announced by NOTIFY; this is how often the table is looked at all the same, and
/// positions are stored.
const TURN: Duration = Duration::from_millis(500);

/// What became of a flip that was asked for.
enum Flipping {
    /// It begins.
    Begin(Event),
    /// It does not, or was a dry run.
    Answer(std::result::Result<Value, String>),
}

/// Sessions that ask each side for its end of WAL, opened when needed and again after a loss.
#[derive(Default)]
struct Probes {
    source: Option<Session>,
    target: Option<Session>,
}

/// A loss that `--after-failover refill` does not mend.
const LIVE_ROWS: &str = ". After a switch no table is read again, as the rows of the live side are \
     those that count: walferry finish keeps them and ends the job, without a way back";

/// The same where each side has some of them.
const SPLIT_ROWS: &str = ". Of a job that is split no table is read again, as each side's rows \
     count where applications write to them: walferry finish --split keeps them so, and ends the \
     job";

impl Runner {
    /// Works until an event, or `None` when it is time to return.
    pub(super) async fn attend(&mut self, until: &Until) -> Result<Option<Event>> {
        let row = self.row().await?;
        client::settle(&mut self.store, &row, self.hold.as_deref()).await?;
        let phase = row.phase;
        if matches!(phase, Phase::Finished | Phase::Canceled) {
            return Ok(None);
        }
        if phase == Phase::Following {
            self.rejoin().await?;
        }
        self.reads_due = row.reads.is_some().then(|| Deadline::after(Duration::ZERO));
        self.keep_heartbeat(phase).await?;
        self.keep_standbys();
        self.keep_looking(phase).await?;
        self.validate_beside().await?;
        self.refresh_beside().await?;
        let mut probes = Probes::default();
        loop {
            if *self.stop.borrow() {
                return Ok(None);
            }
            if let Some(loss) = self.lost_stream().await? {
                return self.refill(loss).await.map(Some);
            }
            if phase == Phase::Following && self.may_join() {
                return self.join().await.map(Some);
            }
            // Whatever has become of the way back.
            self.keep_sealed(phase).await?;
            self.check_streams(phase)?;
            self.busy.store(false, Ordering::SeqCst);
            self.store_positions(&mut probes).await?;
            let led = self.lead_late().await?;
            self.settle_reads().await?;
            self.busy.store(true, Ordering::SeqCst);
            if led.is_some() {
                return Ok(led);
            }
            if phase == Phase::CatchingUp && self.is_level() {
                self.build_rest().await?;
                self.open_two_way().await?;
                return Ok(Some(Event::CaughtUp));
            }
            let due = match until {
                Until::Copied => phase >= Phase::CatchingUp,
                Until::Following => phase >= Phase::Following,
                Until::Told => false,
            };
            if due {
                return match &self.late {
                    Some(late) if late.keeps_phase() => Err(Error::Remote(late.said.clone())),
                    _ => Ok(None),
                };
            }
            if let Some(event) = self.hear().await? {
                return Ok(event);
            }
            let mut stop = self.stop.clone();
            self.busy.store(false, Ordering::SeqCst);
            tokio::select! {
                heard = self.listener.notification(self.turn(phase)) => {
                    if let (Some(_), Some(late)) = (heard?, &mut self.late) {
                        late.hurry();
                    }
                }
                _ = stop.wait_for(|stop| *stop) => return Ok(None),
            }
            self.busy.store(true, Ordering::SeqCst);
        }
    }

    /// Short while something is about to happen, so that scripts do not wait for the turn's end.
    fn turn(&self, phase: Phase) -> Duration {
        if phase == Phase::CatchingUp || self.hold.is_some() { TURN / 20 } else { TURN }
    }

    fn check_streams(&mut self, phase: Phase) -> Result<()> {
        // A way back that does not work yet is no reason to stop following: the next cutover
        // starts it again, and is refused for as long as it does not work.
        let idle = self.gate.is_shut();
        if let Some(message) = self.reverse.as_ref().and_then(Pipe::fatal)
            && idle
        {
            self.reverse = None;
            self.say(Notice::Said(format!("the way back stopped: {message}")));
        }
        for (stream, pipe) in [(Stream::Forward, &self.forward), (Stream::Reverse, &self.reverse)] {
            let Some(pipe) = pipe else { continue };
            if let Some(mut message) = pipe.fatal() {
                let rows = match phase {
                    Phase::Split => SPLIT_ROWS,
                    Phase::Switched | Phase::RolledBack => LIVE_ROWS,
                    _ => "",
                };
                if pipe.lost().is_some() {
                    message.push_str(rows);
                }
                return Err(Error::Stream { stream: stream.to_string(), message });
            }
        }
        Ok(())
    }

    /// Takes waiting commands. `Some(None)`: return from the run.
    async fn hear(&mut self) -> Result<Option<Option<Event>>> {
        self.drop_stale_hold().await?;
        while let Some(asked) = client::take(&mut self.store.session, &self.config.job).await? {
            let outcome = match asked.verb.as_str() {
                "stop" => {
                    self.say(Notice::Ended);
                    client::answer(&mut self.store.session, &asked.id, Ok(Value::Null)).await?;
                    return Ok(Some(None));
                }
                "ping" => Ok(Value::Null),
                "letter_box" => self.letter_box(),
                "reads" => self.hear_reads(&asked).await?,
                "flip" => match self.hear_flip(&asked).await? {
                    Flipping::Begin(event) => return Ok(Some(Some(event))),
                    Flipping::Answer(outcome) => outcome,
                },
                "hold" => self.hold(&asked.id, &asked.args).await?,
                "let_go" => {
                    self.let_go();
                    Ok(Value::Null)
                }
                other => Err(format!("the runner does not know the command {other}")),
            };
            if asked.verb != "hold" || outcome.is_err() {
                client::answer(&mut self.store.session, &asked.id, outcome).await?;
            }
        }
        self.answer_hold().await?;
        Ok(None)
    }

    /// A cutover or rollback is asked for: what has to be so before it begins.
    async fn hear_flip(&mut self, asked: &client::Asked) -> Result<Flipping> {
        let mut request: FlipRequest =
            serde_json::from_value(asked.args.clone()).map_err(|e| Error::State(e.to_string()))?;
        self.take_letter(request.letter.as_deref());
        match self.choose_group(&mut request).await {
            Err(error) if keeps_running(&error) => {
                return Ok(Flipping::Answer(Err(error.to_string())));
            }
            chosen => chosen?,
        }
        // Arming may wait for long transactions, and views take long to be refreshed.
        let home = self.config.target.clone();
        let armed = tokio::select! {
            armed = self.arm(&request) => armed,
            () = client::until_gone(&home, &asked.id) => Err(Gone::Asker.into()),
        };
        if matches!(armed, Err(Error::Gone(Gone::Asker))) {
            self.renew_home().await?;
        }
        match armed {
            Ok(_) if client::asker_gone(&mut self.store.session, &asked.id).await? => {
                if self.row().await?.phase == Phase::Following {
                    self.rejoin().await?;
                }
                Ok(Flipping::Answer(Err(Gone::Asker.to_string())))
            }
            // Proofs only: neither the phase nor the record of the last flip changes.
            Ok(_) if request.dry_run => {
                self.let_go();
                let proven = self.fly(request.stream(), &request).await;
                let phase = self.row().await?.phase;
                self.keep_looking(phase).await?;
                let proven = proven.map(|(outcome, left)| outcome_value(&outcome, &left));
                Ok(Flipping::Answer(proven.map_err(|error| error.to_string())))
            }
            Ok(event) => {
                // A verify that lines up would keep the canary from arriving.
                self.let_go();
                self.asked = Some((asked.id.clone(), request));
                Ok(Flipping::Begin(event))
            }
            Err(error) if keeps_running(&error) => {
                let error = self.because_of_streams(error).await;
                let said = Err(error.to_string());
                if matches!(error, Error::Cutover(cutover::Error::Broken { .. })) {
                    // A runner that ends with its command stores what stopped the stream first.
                    client::answer(&mut self.store.session, &asked.id, said.clone()).await?;
                    let phase = self.row().await?.phase;
                    self.check_streams(phase)?;
                }
                Ok(Flipping::Answer(said))
            }
            Err(error) => {
                let said = Err(error.to_string());
                client::answer(&mut self.store.session, &asked.id, said).await?;
                Err(error)
            }
        }
    }

    /// `hold`: stop applying at a position, so that verify can line up snapshots. Answered once
    /// everything before it is applied.
    async fn hold(&mut self, id: &str, args: &Value) -> Result<std::result::Result<Value, String>> {
        let reverse = args.get("stream").and_then(Value::as_str) == Some("reverse");
        let stream = if reverse { &self.reverse } else { &self.forward };
        let Some(pipe) = stream else {
            return Ok(Err("the stream to hold is not running".to_string()));
        };
        let Some(lsn) = args.get("lsn").and_then(Value::as_str).and_then(|l| l.parse::<Lsn>().ok())
        else {
            return Ok(Err("hold needs a position".to_string()));
        };
        let _ = pipe.hold.send(Some(lsn));
        self.hold = Some(id.to_string());
        self.hold_exact = args.get("exact").and_then(Value::as_bool) == Some(true);
        Ok(Ok(Value::Null))
    }

    /// Answers a pending hold whose position has been reached.
    async fn answer_hold(&mut self) -> Result<()> {
        let Some(id) = self.hold.clone() else { return Ok(()) };
        for pipe in [&self.forward, &self.reverse].into_iter().flatten() {
            let Some(lsn) = *pipe.hold.borrow() else { continue };
            let applied_lsn = pipe.applied.borrow().applied_lsn;
            // The hold before this one may have been let go meanwhile, by a restart of the stream.
            if self.hold_exact && pipe.applied.borrow().last_end_lsn > lsn {
                let said = format!("the stream has passed {lsn} {PASSED}");
                client::answer(&mut self.store.session, &id, Err(said)).await?;
                continue;
            }
            if pipe.applied.borrow().held == Some(lsn) {
                let outcome = Ok(json!({ "applied_lsn": applied_lsn.to_string() }));
                client::answer(&mut self.store.session, &id, outcome).await?;
            }
        }
        Ok(())
    }

    fn let_go(&mut self) {
        self.hold = None;
        for pipe in [&self.forward, &self.reverse].into_iter().flatten() {
            let _ = pipe.hold.send(None);
        }
    }

    /// A verify that died must not hold the stream for ever.
    async fn drop_stale_hold(&mut self) -> Result<()> {
        let Some(id) = self.hold.clone() else { return Ok(()) };
        if client::asker_gone(&mut self.store.session, &id).await? {
            self.let_go();
        }
        Ok(())
    }

    /// Remembers where the source's WAL ends now; once the target is there it is level.
    pub(super) async fn measure_level(&mut self) -> Result<Option<Event>> {
        let mut session = Session::control(&self.config.source).await?;
        self.level_at = Some(barrier::mark(&mut session, "level").await?);
        Ok(None)
    }

    fn is_level(&self) -> bool {
        match (&self.forward, self.level_at) {
            (Some(pipe), Some(lsn)) => pipe.applied.borrow().applied_lsn >= lsn,
            _ => false,
        }
    }

    async fn store_positions(&mut self, probes: &mut Probes) -> Result<()> {
        let sides = [
            (Stream::Forward, &self.forward, &self.config.source, &mut probes.source),
            (Stream::Reverse, &self.reverse, &self.config.target, &mut probes.target),
        ];
        let mut rows = Vec::new();
        for (stream, pipe, config, probe) in sides {
            if let Some(pipe) = pipe {
                let beat = self.heartbeat.as_ref().filter(|_| stream == Stream::Forward);
                let end_lsn = end_of_wal(config, probe).await;
                rows.push((stream, end_lsn, positions(pipe, end_lsn, beat)));
            }
        }
        for (stream, end_lsn, mut row) in rows {
            if row.applied_lsn.is_none() {
                // Not connected yet: what is known of it is what was stored last. The other side
                // has gone on since.
                let known = self.store.load_stream(stream).await?.unwrap_or_default();
                let lag_bytes = known.behind(end_lsn).or(known.lag_bytes);
                row = StreamRow { error: row.error, lag_bytes, ..known };
            }
            if stream == Stream::Forward {
                if let Some(bytes) = row.lag_bytes {
                    let rows = row.rows_written.unwrap_or(0).unsigned_abs();
                    self.say(Notice::Lag { bytes: bytes.unsigned_abs(), rows });
                }
                if let Some(trouble) = &row.error {
                    self.say(Notice::Trouble(trouble.clone()));
                }
            }
            self.store.save_stream(stream, &row).await?;
        }
        Ok(())
    }
}

/// A flip that could not begin for a reason outside the streams leaves them running.
pub(super) fn keeps_running(error: &Error) -> bool {
    use crate::fault::{Fault, Faulty};
    error.fault() != Fault::Bug && !matches!(error, Error::LeaseLost)
}

/// The side's end of WAL; `None` while it cannot be asked.
async fn end_of_wal(config: &Config, probe: &mut Option<Session>) -> Option<Lsn> {
    let asking = async {
        let mut session = match probe.take() {
            Some(session) => session,
            None => Session::control(config).await.ok()?,
        };
        let sql = "select pg_catalog.pg_current_wal_insert_lsn()";
        let row = session.query_one(sql, &[]).await.ok()?;
        *probe = Some(session);
        row.lsn(0).ok()
    };
    // Commands wait meanwhile, so a silent server gets little time.
    tokio::time::timeout(Duration::from_secs(2), asking).await.ok().flatten()
}

fn positions(pipe: &Pipe, end_lsn: Option<Lsn>, beat: Option<&Heartbeat>) -> StreamRow {
    let applied = *pipe.applied.borrow();
    let read = *pipe.positions.borrow();
    if !applied.applied_lsn.is_valid() {
        return StreamRow { error: pipe.trouble.borrow().clone(), ..StreamRow::default() };
    }
    let text = |lsn: Lsn| Some(lsn.to_string());
    let lag_bytes = end_lsn.map(|end| end.bytes_since(applied.applied_lsn) as i64);
    // Level to within one transaction: what age the last one has says nothing about lag, but a
    // heartbeat does.
    let level = read.received_lsn <= applied.applied_lsn;
    let age = applied.commit_time.map_or(0.0, PgTimestamp::seconds_ago);
    let measured = beat.and_then(Heartbeat::lag_seconds);
    let lag_seconds = measured.unwrap_or(if level { 0.0 } else { age });
    let spool = pipe.spool.as_ref().map(|spool| *spool.borrow());
    StreamRow {
        received_lsn: text(read.received_lsn.max(applied.applied_lsn)),
        decoded_lsn: text(read.decoded_lsn.max(applied.applied_lsn)),
        buffered_lsn: text(read.buffered_lsn.max(applied.applied_lsn)),
        applied_lsn: text(applied.applied_lsn),
        durable_lsn: text(applied.durable_lsn),
        confirmed_lsn: text(read.confirmed_lsn),
        lag_bytes,
        lag_seconds: Some(lag_seconds),
        error: pipe.trouble.borrow().clone(),
        age_seconds: None,
        spooled_lsn: spool.and_then(|s| text(s.spooled_lsn.max(applied.durable_lsn))),
        spool_bytes: spool.map(|s| s.spool_bytes as i64),
        retained_bytes: spool.and_then(|s| s.retained_bytes).map(|bytes| bytes as i64),
        rows_written: Some(applied.rows as i64),
    }
}
