//! Cutover and rollback as a runner does them: arming the way back, the choreography with its
//! journal in the home database, and picking up what a crash left.

use std::collections::HashMap;
use std::time::Duration;

use super::ability::{Abilities, Ability};
use super::check::Finding;
use super::groups::Group;
use super::journal::HomeJournal;
use super::left::outcome_value;
use super::pipeline::Pipe;
use super::prepare::publish;
pub use super::request::FlipRequest;
use super::request::{context, stream_of};
use super::routes::Late;
use super::run::{Notice, Runner, published};
use super::state::{Event, Phase};
use super::store::{FlipRecord, JobRow};
use super::{Error, Result, admit, mapped};
use crate::catalog::{self, Table};
use crate::cutover::{self, FenceKind, Plan, Rules, barrier};
use crate::id::{QualifiedName, Stream};
use crate::pg::{Config, Purpose, Session};
use crate::route;
use crate::schema::Acting;
use crate::source::slot;
use crate::{apply, large};

/// How long what was written during an undone flip may take to come home.
const HOME_DRAIN: Duration = Duration::from_secs(60);

/// How long the home database may take to answer before the runner begins anew.
const HOME_WAIT: Duration = Duration::from_secs(5);

/// The phase to go back to when the flip is undone.
fn origin(record: &FlipRecord) -> Phase {
    let known = record.from.parse().ok();
    known.unwrap_or(match stream_of(&record.flip) {
        Stream::Forward => Phase::Following,
        Stream::Reverse => Phase::Switched,
    })
}

impl Runner {
    /// Checks that the flip fits the phase, and makes the way back: publication, slot and origin of
    /// the reverse stream, which then runs (canaries only) from before the switch.
    pub(super) async fn arm(&mut self, request: &FlipRequest, row: &JobRow) -> Result<Event> {
        let event = Event::FlipAsked(request.stream());
        super::state::step(row.phase, event)?;
        self.refuse_switch(row.phase)?;
        self.config.secrets.routes(&request.routes)?;
        super::reads::refuse_shared(row.reads.as_ref(), &request.routes)?;
        request.fence.parse::<FenceKind>()?;
        // Somebody may have turned on since what garbles the names of shards.
        self.config.clone().reaching_shards().await?;
        let one_way = self.flies_one_way(request)?;
        // A rollback rests on the reverse stream's own publication.
        if request.stream() == Stream::Forward {
            self.refuse_partial().await?;
        }
        if one_way {
            self.gate(request).await?;
        } else if !row.armed {
            // A stream that stands still would keep the slot from being made, and says less then.
            self.gate(request).await?;
            self.say(Notice::Said("arming the way back".to_string()));
            self.make_reverse(request.limits.timeout).await?;
            self.store.set_armed(true).await?;
        }
        if !one_way {
            self.follow_reverse_now().await?;
        }
        self.refreshing = None;
        match &request.group {
            Some(_) if request.dry_run => {}
            Some(_) => self.part(request.stream(), row).await?,
            None => self.approach(request).await?,
        }
        Ok(event)
    }

    async fn gate(&mut self, request: &FlipRequest) -> Result<()> {
        let carry = self.forward.as_ref().map(|pipe| pipe.applied.clone());
        let mut carry = carry.ok_or(cutover::Error::StreamStopped)?;
        let mut source = Session::control(&self.config.source).await?;
        // Nor could the slot be made before they end, where they are carried as prepared.
        let tables = self.fenced_tables(&self.config.source).await?;
        barrier::refuse_left_prepared(&mut source, self.own(&tables)).await?;
        // Streams of a runner that has just begun are still connecting.
        let max_lag = request.limits.max_lag.max(HOME_WAIT);
        Ok(barrier::gate(&mut source, &mut carry, max_lag).await?)
    }

    /// A new slot never meets old progress (law 4): both are made here, after both were dropped.
    pub(super) async fn make_reverse(&mut self, wait: Duration) -> Result<()> {
        let name = self.config.job.object(Stream::Reverse);
        let tables = self.tables(&self.config.target).await?;
        // Publishing may wait for locks.
        let mut target = Session::connect(&self.config.target, Purpose::Sql).await?;
        let mut source = Session::control(&self.config.source).await?;
        // A canary proves the way, not the right to every table (law 8).
        let names = self.names_back(&tables)?;
        let mut grants = super::ability::missing_grants(&mut source, &names).await?;
        if !admit::may_have_tables(&mut source).await? {
            let row = source.query_one("select current_user", &[]).await?;
            grants.insert(0, admit::schema_grant(row.str(0)?));
        }
        if self.config.options.moves_large_objects() {
            let refusal = large::unwritable(&mut source).await?;
            grants.extend(refusal.map(|refusal| refusal.fix));
        }
        if !grants.is_empty() {
            return Err(Error::NoWayBack { grants });
        }
        admit::make_source_tables(&self.config, &mut source).await?;
        slot::drop(&mut target, &name).await?;
        if let Some(place) = &self.spool {
            super::place::remove(place, &name).await?;
        }
        let marked = !self.row().await?.abilities.target.origin;
        let tables = published(&self.config.job, &tables, marked);
        let reading = self.choose_reading(Stream::Reverse, &tables).await?;
        publish(&mut target, &name, &tables, &reading).await?;
        let mut maker = Session::connect(&self.config.target, Purpose::Sql).await?;
        let options = slot::CreateOptions { wait, ..self.slot_options(&name, &reading, &target) };
        let waiting = self.tell_blockers();
        let lsn = slot::create_plain(&mut maker, &mut target, &options, waiting).await?;
        let kind = self.row().await?.abilities.source.progress();
        apply::begin_at(&mut source, &name, kind, lsn).await?;
        self.store.set_system(Stream::Reverse, &admit::system_of(&mut target).await?).await?;
        Ok(())
    }

    /// What the target's tables are called on the source.
    fn names_back(&self, tables: &[Table]) -> Result<Vec<QualifiedName>> {
        let names = tables.iter().map(|table| table.name.clone());
        let (Some(map), Some(back)) = (&self.config.map, self.config.map_back()) else {
            return Ok(names.collect());
        };
        names
            .map(|name| match map.source_of(&name) {
                Some(source) if back.target_of(&name) == source => Ok(source),
                _ => Err(mapped::Error::NamesTorn { table: name }.into()),
            })
            .collect()
    }

    pub(super) async fn follow_reverse_now(&mut self) -> Result<()> {
        if self.reverse.is_none() && !self.config.is_one_way() {
            let pipe = self.pipe(Stream::Reverse, Some(HashMap::new())).await?;
            self.reverse = Some(pipe);
        }
        Ok(())
    }

    /// Runs the choreography and answers whoever asked.
    pub(super) async fn flip(&mut self, flip: Stream) -> Result<Event> {
        let Some((_, request)) = self.asked.clone() else {
            return Err(Error::State("a flip without a request".to_string()));
        };
        let outcome = self.fly(flip, &request).await;
        match outcome {
            Ok((outcome, left)) => {
                let row = self.row().await?;
                let mut value = outcome_value(&outcome, &left);
                if let Some(object) = value.as_object_mut() {
                    let tables = request.group.as_ref().map(|group| group.tables.len());
                    object.insert("phase".to_string(), row.phase.to_string().into());
                    object.insert("tables".to_string(), tables.into());
                }
                self.answer_flip(Ok(value)).await?;
                if !request.dry_run {
                    self.say(Notice::Phase(row.phase));
                }
                self.late = row.flip.filter(|flip| !flip.released).map(|_| Late::release());
                match row.phase {
                    Phase::Split => Ok(Event::Parted),
                    _ => Ok(Event::Flipped(flip)),
                }
            }
            // Answered once it is known.
            Err(error @ Error::Cutover(cutover::Error::Unknown { .. })) => Err(error),
            Err(error @ Error::Cutover(cutover::Error::NotUndone { .. })) => {
                self.renew_home().await?;
                self.answer_flip(Err(error.to_string())).await?;
                Err(error)
            }
            Err(error) => {
                self.renew_home().await?;
                let error = self.because_of_streams(error).await;
                if let Some(record) = self.row().await?.flip
                    && self.switch_had_begun(&record).await?
                {
                    self.bring_home(flip).await?;
                }
                self.turn_back(flip, request.group.as_ref());
                let back = self.note_undone().await?;
                self.answer_flip(Err(error.to_string())).await?;
                if !request.dry_run {
                    self.say(Notice::Phase(back));
                }
                Ok(Event::FlipUndone(back))
            }
        }
    }

    /// A step that was cut off leaves the home session in the middle of an answer.
    pub(super) async fn renew_home(&mut self) -> Result<()> {
        let asked = tokio::time::timeout(HOME_WAIT, self.store.session.query("select 1"));
        if matches!(asked.await, Ok(Ok(_))) {
            return Ok(());
        }
        let opened = tokio::time::timeout(HOME_WAIT, Session::control(&self.config.target)).await;
        self.store.session = opened.map_err(|_| Error::LeaseLost)??;
        Ok(())
    }

    /// A canary that does not come back, and a stream that gives no more positions, say only that;
    /// the stream knows why.
    pub(super) async fn because_of_streams(&self, error: Error) -> Error {
        let fatal = |pipe: &Option<Pipe>| pipe.as_ref().and_then(Pipe::fatal);
        let message = match &error {
            Error::Cutover(cutover::Error::Canary { .. }) => fatal(&self.reverse),
            Error::Cutover(cutover::Error::StreamStopped) => {
                // It is said just after the last position.
                tokio::time::sleep(Duration::from_millis(50)).await;
                fatal(&self.forward).or_else(|| fatal(&self.reverse))
            }
            _ => None,
        };
        match (error, message) {
            (Error::Cutover(cause), Some(message)) => {
                cutover::Error::Broken { cause: cause.to_string(), message }.into()
            }
            (error, _) => error,
        }
    }

    /// The choreography, up to its gates only for a dry run.
    pub(super) async fn fly(
        &mut self,
        flip: Stream,
        request: &FlipRequest,
    ) -> Result<(cutover::Outcome, Vec<Finding>)> {
        let one_way = self.flies_one_way(request)?;
        if flip == Stream::Forward && !one_way {
            self.refuse_rogue_writes(request.group.as_ref()).await?;
        }
        if request.group.is_none() {
            self.refuse_new_tables(flip).await?;
        }
        self.stop_validating().await;
        self.stop_looking().await;
        // It is another side that has to be shut then. What a group's own fence shuts needs no look
        // for as long as that server is there.
        if request.group.is_none() {
            self.sealed = None;
        }
        let row = self.row().await?;
        let mut plan = self.flight_plan(flip, request, &row).await?;
        let left = match request.group {
            None => self.left_behind(&plan, request).await?,
            Some(_) => Vec::new(),
        };
        let record = match row.flip {
            Some(record) if record.attempt == request.attempt => record,
            last => request.record(row.phase, last.as_ref()),
        };
        let phase = self.phase_after(&record).await?;
        let gate = self.gate.clone();
        let mut journal = HomeJournal::new(&mut self.store, record, phase, gate);
        let outcome = cutover::run(&mut plan, &mut journal).await?;
        if !request.dry_run {
            self.keep_marks(flip, &plan.rest).await?;
        }
        Ok((outcome, left))
    }

    async fn flight_plan(
        &mut self,
        flip: Stream,
        request: &FlipRequest,
        row: &JobRow,
    ) -> Result<Plan> {
        let (source, target) = (self.config.source.clone(), self.config.target.clone());
        let (live, dest, pipe) = match flip {
            Stream::Forward => (&source, &target, &self.forward),
            Stream::Reverse => (&target, &source, &self.reverse),
        };
        let carry = pipe.as_ref().map(|pipe| pipe.applied.clone());
        let carry = carry.ok_or(cutover::Error::StreamStopped)?;
        let group = request.group.as_ref();
        let tables = match group {
            Some(group) => group.tables.clone(),
            None => self.fenced_tables(live).await?,
        };
        let mut selection = self.selection_by_dump()?;
        if let Some(group) = group {
            selection = selection.of_group(&group.tables);
        }
        if let Some(map) = self.config.map.as_ref().filter(|_| flip == Stream::Reverse) {
            selection = selection.on_target(map);
        }
        let rest = match group {
            Some(_) => cutover::Rest::default(),
            None => self.rest(flip, request).await?,
        };
        Ok(Plan {
            flip,
            job: self.config.job.clone(),
            live: live.clone(),
            dest: dest.clone(),
            decoded_at: self.config.decode_from.clone().filter(|_| flip == Stream::Forward),
            tables: tables.clone(),
            selection,
            sequences: self.mapped_sequences(flip).await?,
            one_way: self.flies_one_way(request)?,
            fence: request.fence.parse()?,
            routes: self.config.secrets.routes(&request.routes)?,
            context: route::Context {
                tables,
                is_group: group.is_some(),
                ..context(&self.config, flip)
            },
            limits: request.limits,
            rules: self.rules(flip, &row.abilities).await?,
            rest,
            carry,
            leave_parked: request.leave_quarantined || flip == Stream::Reverse,
            dry_run: request.dry_run,
            mark: request.mark.clone(),
            stop: self.stop.clone(),
        })
    }

    /// What a flip has to do about triggers and foreign keys.
    pub(super) async fn rules(&mut self, flip: Stream, abilities: &Abilities) -> Result<Rules> {
        let (live, dest) = match flip {
            Stream::Forward => (abilities.source, abilities.target),
            Stream::Reverse => (abilities.target, abilities.source),
        };
        let acting = |ability: Ability| ability.acting(self.selection.tables_only);
        let (live, dest) = (acting(live), acting(dest));
        let unbuilt = flip == Stream::Forward && dest != Acting::Nothing;
        let dump = if unbuilt { Some(self.dump().await?) } else { None };
        let writing = if flip == Stream::Forward { &self.forward } else { &self.reverse };
        Ok(Rules {
            live,
            dest,
            job: self.config.job.to_string(),
            selection: self.selection_by_dump()?,
            dump,
            brake: writing.as_ref().map(|pipe| pipe.hold.clone()),
        })
    }

    /// The tables of a job that is about tables alone.
    fn own<'a>(&self, tables: &'a [QualifiedName]) -> Option<&'a [QualifiedName]> {
        self.selection.tables_only.then_some(tables)
    }

    /// Every table that moves, those too whose rows stay behind: whoever writes to one on the old
    /// side after the switch is on the wrong server, and must be told.
    pub(super) async fn fenced_tables(&self, live: &Config) -> Result<Vec<QualifiedName>> {
        let mut session = Session::control(live).await?;
        let tables = catalog::tables(&mut session, &self.selection_on(live)).await?;
        Ok(tables.into_iter().map(|table| table.name).collect())
    }

    /// Before the switch the reverse stream applies canaries only and counts the rest as filtered:
    /// what it counted was written to the target by somebody else.
    async fn refuse_rogue_writes(&mut self, group: Option<&Group>) -> Result<()> {
        // All that was written there until now has been seen and counted.
        self.drain_home(Stream::Forward).await?;
        let mut source = self.borrow(Stream::Forward).await?;
        let sql = format!(
            "select sum(filtered) over (), schema || '.' || name from ({}) as books \
             where filtered > 0 and schema <> 'walferry' \
             and ($2::jsonb is null or (schema, name) in (select t.schema, t.name \
               from pg_catalog.jsonb_to_recordset($2::jsonb) t(schema text, name text))) limit 1",
            apply::BOOKS
        );
        let stream = self.config.job.object(Stream::Reverse);
        let group = group.map(|group| serde_json::to_string(&group.tables)).transpose();
        let group = group.map_err(|e| Error::State(e.to_string()))?;
        let row = source.query_opt(&sql, &[Some(&stream), group.as_deref()]).await?;
        self.give_back(Stream::Forward, source);
        let Some(row) = row else { return Ok(()) };
        Err(cutover::Error::RogueWrites { changes: row.parse(0)?, table: row.string(1)? }.into())
    }

    /// After a flip that was undone: the reverse stream applies what belongs on the target.
    pub(super) fn turn_back(&self, flip: Stream, group: Option<&Group>) {
        let group = group.map(|group| group.tables.as_slice());
        self.gate.turn(group, flip == Stream::Reverse);
    }

    /// Undoing has let clients through already; a later run must not tell routes to release them
    /// for a flip that was not made.
    /// Gives the phase the flip came from.
    pub(super) async fn note_undone(&mut self) -> Result<Phase> {
        let Some(mut record) = self.row().await?.flip else { return Ok(Phase::Following) };
        record.released = true;
        self.store.set_flip(&record).await?;
        Ok(origin(&record))
    }

    /// True if a route may have let clients through to the other side.
    pub(super) async fn switch_had_begun(&mut self, record: &FlipRecord) -> Result<bool> {
        let lines = self.store.journal(&record.attempt).await?;
        Ok(lines.iter().any(|line| line.step == "switch"))
    }

    /// Waits until what was written on the side that a flip led to has come to the live one.
    async fn drain_home(&mut self, flip: Stream) -> Result<()> {
        let pipe = match flip {
            Stream::Forward => &self.reverse,
            Stream::Reverse => &self.forward,
        };
        let Some(pipe) = pipe else { return Ok(()) };
        let mut carry = pipe.applied.clone();
        let mut away = self.borrow(flip.opposite()).await?;
        let lsn = barrier::mark(&mut away, "undo").await?;
        self.give_back(flip.opposite(), away);
        if barrier::reached(&mut carry, lsn, HOME_DRAIN).await? {
            return Ok(());
        }
        let applied_lsn = carry.borrow().applied_lsn;
        Err(cutover::Error::Drain { barrier_lsn: lsn, applied_lsn, waited: HOME_DRAIN }.into())
    }

    /// Brings home what clients wrote on the other side before their route was flipped back, and
    /// sets sequences past the numbers they had there.
    pub(super) async fn bring_home(&mut self, flip: Stream) -> Result<()> {
        self.drain_home(flip).await?;
        let (away, home) = match flip {
            Stream::Forward => (&self.config.target, &self.config.source),
            Stream::Reverse => (&self.config.source, &self.config.target),
        };
        let mut away = Session::control(away).await?;
        let mut home = Session::control(home).await?;
        let mut selection = self.selection_by_dump()?;
        if let Some(group) = self.row().await?.flip.and_then(|flip| flip.group) {
            selection = selection.of_group(&group.tables);
        }
        Ok(cutover::sequences::come_home(&mut away, &mut home, &selection).await?)
    }
}
