//! The states of a job, as a pure function: `step(phase, event) -> (phase, commands)`.
//!
//! ```text
//! planned -> checked -> schema -> copying -> catching_up -> following
//!                                                            |    ^
//!                                                   cutover  v    | failed or undone
//!                                                        cutting_over -> switched <-> rolled_back
//!                                                            |    ^          ^             ^
//!                            a group, and others stay behind v    |          | the last    |
//!                                                            split ----------+-------------+
//! finished: from switched or rolled_back, and from split where that is said.
//! canceled: from anything before switched.
//! ```
//!
//! Every phase is stored in the home database before its work begins, so a run that died is taken
//! up by the phase's own entry command, which is why each command can be repeated. `error` is not a
//! phase of its own here: a job keeps the phase to resume in, and the error beside it.

use std::fmt;
use std::str::FromStr;

use crate::id::Stream;

/// Where a job stands. Stored in `walferry.job.phase`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Phase {
    /// Set when the job is first written down. Nothing exists on either side but schema walferry.
    Planned,
    /// Set when check found no error. A crash here repeats nothing that matters.
    Checked,
    /// Set before the publication and the slot are made. In it: publication, slot, pre-data. A
    /// crash finds what exists by name and goes on; the slot's snapshot is lost, the rows are then
    /// read under a fresh one with the exact visibility rule.
    Schema,
    /// Set when the target has its tables. Finished tables survive a crash, half-read ones are read
    /// again. In it too: indexes and constraints, each recorded in its own transaction.
    Copying,
    /// Set when all rows are there and the stream begins to be applied.
    CatchingUp,
    /// Set when the target was seen level with the source. Lag may grow again; the phase stays.
    Following,
    /// Set before a cutover or rollback touches anything. A crash undoes the attempt.
    CuttingOver,
    /// Set at the point of no return of a group's cutover or rollback, where applications belong on
    /// the target for some tables and on the source for others. `walferry.ownership` tells which.
    Split,
    /// Set at the point of no return of a cutover: applications belong on the target.
    Switched,
    /// Set at the point of no return of a rollback: applications belong on the source.
    RolledBack,
    /// All that walferry made is gone, or about to be.
    Finished,
    /// Given up before the switch; the source is as it was found.
    Canceled,
}

/// All phases with their stored names.
const NAMES: [(Phase, &str); 12] = [
    (Phase::Planned, "planned"),
    (Phase::Checked, "checked"),
    (Phase::Schema, "schema"),
    (Phase::Copying, "copying"),
    (Phase::CatchingUp, "catching_up"),
    (Phase::Following, "following"),
    (Phase::CuttingOver, "cutting_over"),
    (Phase::Split, "split"),
    (Phase::Switched, "switched"),
    (Phase::RolledBack, "rolled_back"),
    (Phase::Finished, "finished"),
    (Phase::Canceled, "canceled"),
];

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = NAMES.iter().find(|(phase, _)| phase == self).map_or("unknown", |(_, n)| n);
        f.write_str(name)
    }
}

impl FromStr for Phase {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let found = NAMES.iter().find(|(_, name)| *name == text).map(|(phase, _)| *phase);
        found.ok_or_else(|| format!("\"{text}\" is not a phase of this version of walferry"))
    }
}

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A run begins, for the first time or after a stop.
    Start,
    /// Check found nothing that stands in the way.
    CheckPassed,
    /// Publication, slot and tables exist.
    SchemaMade,
    /// All rows, indexes and constraints are there.
    CopyDone,
    /// The target was seen level with the source.
    CaughtUp,
    /// A cutover (`Forward`) or rollback (`Reverse`) is asked for.
    FlipAsked(Stream),
    /// It passed its point of no return.
    Flipped(Stream),
    /// That of a group did, and not all tables are on one side now.
    Parted,
    /// It was undone; applications go on where they were: in the phase it came from.
    FlipUndone(Phase),
    /// The end is asked for.
    FinishAsked,
    /// The end of a job that is split, each table staying where it is.
    FinishSplitAsked,
    /// Giving up is asked for.
    CancelAsked,
}

/// What to do, in order. Every command can be repeated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Look for what stands in the way.
    Check,
    /// Make publication, slot and tables.
    MakeSchema,
    /// Copy rows; build indexes and constraints.
    Copy,
    /// Stream and apply, forward.
    FollowForward,
    /// Stream and apply back, if the way back was armed.
    FollowReverse,
    /// Wait until the target is level.
    CatchUp,
    /// Undo a flip that a crash left half done.
    UndoFlip,
    /// Let clients through where a crash came after the point of no return.
    ReleaseClients,
    /// Run the choreography.
    Flip(Stream),
    /// Drop all that walferry made on both sides.
    CleanUp,
}

/// The event does not fit the phase.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{asked} is not possible in phase {phase}: {why}")]
pub struct Refused {
    /// Where the job stands.
    pub phase: Phase,
    /// What was asked.
    pub asked: &'static str,
    /// What to do instead.
    pub why: &'static str,
}

/// The one transition function. Does nothing itself.
pub fn step(phase: Phase, event: Event) -> Result<(Phase, Vec<Command>), Refused> {
    use Command::{
        CatchUp, Check, CleanUp, Copy, FollowForward, FollowReverse, MakeSchema, ReleaseClients,
        UndoFlip,
    };
    let refuse = |asked, why| Err(Refused { phase, asked, why });
    let streams = || vec![FollowForward, FollowReverse];
    Ok(match (phase, event) {
        (Phase::Finished, event) => {
            return refuse(asked(event), "the job has ended; give a new one another --name");
        }
        (Phase::Canceled, Event::CancelAsked) => (Phase::Canceled, vec![CleanUp]),
        (Phase::Canceled, event) => {
            return refuse(asked(event), "the job was given up; give a new one another --name");
        }

        (Phase::Planned, Event::Start) => (Phase::Planned, vec![Check]),
        (Phase::Checked, Event::Start) => (Phase::Schema, vec![MakeSchema]),
        (Phase::Schema, Event::Start) => (Phase::Schema, vec![MakeSchema]),
        (Phase::Copying, Event::Start) => (Phase::Copying, vec![Copy]),
        (Phase::CatchingUp, Event::Start) => (phase, vec![FollowForward, CatchUp]),
        (Phase::Following, Event::Start) => (phase, streams()),
        (Phase::CuttingOver, Event::Start) => (phase, vec![FollowForward, FollowReverse, UndoFlip]),
        (Phase::Split | Phase::Switched | Phase::RolledBack, Event::Start) => {
            (phase, vec![FollowForward, FollowReverse, ReleaseClients])
        }

        (Phase::Planned, Event::CheckPassed) => (Phase::Checked, vec![]),
        (Phase::Schema, Event::SchemaMade) => (Phase::Copying, vec![Copy]),
        (Phase::Copying, Event::CopyDone) => (Phase::CatchingUp, vec![FollowForward, CatchUp]),
        (Phase::CatchingUp, Event::CaughtUp) => (Phase::Following, vec![]),

        (phase, event) if is_flip(event) => step_flip(phase, event)?,

        (Phase::Switched | Phase::RolledBack, Event::FinishAsked) => {
            (Phase::Finished, vec![CleanUp])
        }
        (Phase::CuttingOver, Event::FinishAsked | Event::FinishSplitAsked | Event::CancelAsked) => {
            return refuse(asked(event), NOT_UNDONE);
        }
        (Phase::Split, Event::FinishSplitAsked) => (Phase::Finished, vec![CleanUp]),
        (_, Event::FinishSplitAsked) => {
            return refuse("finish --split", "it ends a job whose tables are on both sides");
        }
        (Phase::Split, Event::FinishAsked) => {
            return refuse(
                "finish",
                "some tables are on either side: cutover or rollback the rest, or leave each \
                 where it is by finish --split",
            );
        }
        (Phase::Split, Event::CancelAsked) => {
            return refuse("cancel", "some tables have been switched: rollback leads them back");
        }
        (_, Event::FinishAsked) => {
            return refuse("finish", "it ends a job that was switched or rolled back; use cancel");
        }
        (Phase::Switched, Event::CancelAsked) => {
            return refuse("cancel", "the switch has been made; use rollback or finish");
        }
        (_, Event::CancelAsked) => (Phase::Canceled, vec![CleanUp]),
        (phase, event) => unexpected(phase, event)?,
    })
}

fn is_flip(event: Event) -> bool {
    matches!(event, Event::FlipAsked(_) | Event::Flipped(_) | Event::Parted | Event::FlipUndone(_))
}

/// [`step`], of a flip.
fn step_flip(phase: Phase, event: Event) -> Result<(Phase, Vec<Command>), Refused> {
    let begin = |flip| Ok((Phase::CuttingOver, vec![Command::Flip(flip)]));
    match (phase, event) {
        (
            Phase::Following | Phase::RolledBack | Phase::Split,
            Event::FlipAsked(Stream::Forward),
        ) => begin(Stream::Forward),
        (Phase::Switched | Phase::Split, Event::FlipAsked(Stream::Reverse)) => {
            begin(Stream::Reverse)
        }
        (phase, Event::FlipAsked(flip)) => {
            let (asked, why) = no_flip(phase, flip);
            Err(Refused { phase, asked, why })
        }
        // The choreography stores the new phase itself, at its point of no return.
        (Phase::CuttingOver | Phase::Switched, Event::Flipped(Stream::Forward)) => {
            Ok((Phase::Switched, vec![]))
        }
        (Phase::CuttingOver | Phase::RolledBack, Event::Flipped(Stream::Reverse)) => {
            Ok((Phase::RolledBack, vec![]))
        }
        (Phase::CuttingOver | Phase::Split, Event::Parted) => Ok((Phase::Split, vec![])),
        (
            Phase::CuttingOver,
            Event::FlipUndone(
                back @ (Phase::Following | Phase::RolledBack | Phase::Switched | Phase::Split),
            ),
        ) => Ok((back, vec![])),
        (phase, event) => unexpected(phase, event),
    }
}

/// Whether a flip may be asked of a job that is found in `phase`. Phases that a runner is about to
/// leave are left to it.
pub fn may_flip(phase: Phase, flip: Stream) -> Result<(), Refused> {
    match phase {
        Phase::CatchingUp | Phase::CuttingOver => Ok(()),
        phase => step(phase, Event::FlipAsked(flip)).map(|_| ()),
    }
}

/// The stream that keeps the other side current in `phase`, which is what a comparison needs.
pub fn flowing(phase: Phase) -> Result<Stream, Refused> {
    let why = match phase {
        Phase::CatchingUp | Phase::Following | Phase::RolledBack => return Ok(Stream::Forward),
        Phase::Switched => return Ok(Stream::Reverse),
        Phase::CuttingOver => {
            "a switch has been begun and has to be ended or undone first, which `walferry run` \
             does; then ask again"
        }
        Phase::Split => "each side has tables that applications write to",
        Phase::Finished | Phase::Canceled => "the job has ended, and no stream keeps both level",
        _ => {
            "it compares two sides that a stream keeps level; wait until `walferry run` is at \
             following"
        }
    };
    Err(Refused { phase, asked: "verify", why })
}

/// Whether both sides can be compared in `phase`: along the stream that is [`flowing`], or along
/// both, each for the tables of the side that it reads.
pub fn may_compare(phase: Phase) -> Result<(), Refused> {
    match phase {
        Phase::Split => Ok(()),
        phase => flowing(phase).map(|_| ()),
    }
}

/// What leads out of the phase `cutting_over`.
const NOT_UNDONE: &str = "a switch has been begun and has to be undone first: `walferry run` does \
    that, once both servers and every route of it can be reached (--skip-route leaves out one that \
    is gone for good); then ask again";

/// Why a flip cannot start in a phase.
fn no_flip(phase: Phase, flip: Stream) -> (&'static str, &'static str) {
    match (phase, flip) {
        (Phase::Switched, Stream::Forward) => {
            ("cutover", "it has been made already; rollback leads back")
        }
        (Phase::RolledBack, Stream::Reverse) => {
            ("rollback", "it has been made already; cutover leads over again")
        }
        (Phase::CuttingOver, _) => (
            if flip == Stream::Forward { "cutover" } else { "rollback" },
            "one that was begun has to be undone first; walferry status tells what it waits for",
        ),
        (_, Stream::Forward) => {
            ("cutover", "it starts from following; walferry status tells how far it is")
        }
        (_, Stream::Reverse) => {
            ("rollback", "it starts from switched; before that, cancel gives up")
        }
    }
}

/// What a person asked for by an event.
fn asked(event: Event) -> &'static str {
    match event {
        Event::Start => "run",
        Event::FlipAsked(Stream::Forward) => "cutover",
        Event::FlipAsked(Stream::Reverse) => "rollback",
        Event::FinishAsked => "finish",
        Event::FinishSplitAsked => "finish --split",
        Event::CancelAsked => "cancel",
        _ => "this",
    }
}

/// Events that only walferry itself gives, in a phase where it never should.
fn unexpected(phase: Phase, event: Event) -> Result<(Phase, Vec<Command>), Refused> {
    let asked = match event {
        Event::Start => "start",
        Event::CheckPassed => "check passed",
        Event::SchemaMade => "schema made",
        Event::CopyDone => "copy done",
        Event::CaughtUp => "caught up",
        Event::Flipped(_) => "flipped",
        Event::Parted => "parted",
        Event::FlipUndone(_) => "flip undone",
        Event::FlipAsked(_) | Event::FinishAsked | Event::FinishSplitAsked | Event::CancelAsked => {
            "this"
        }
    };
    Err(Refused { phase, asked, why: "this is a fault of walferry itself; please report it" })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn run(events: &[Event]) -> Phase {
        events.iter().fold(Phase::Planned, |phase, event| step(phase, *event).unwrap().0)
    }

    #[test]
    fn the_usual_road_goes_there_and_back() {
        use Event::*;
        let road = [
            Start,
            CheckPassed,
            Start,
            SchemaMade,
            CopyDone,
            CaughtUp,
            FlipAsked(Stream::Forward),
            Flipped(Stream::Forward),
            FlipAsked(Stream::Reverse),
            Flipped(Stream::Reverse),
            FlipAsked(Stream::Forward),
            Flipped(Stream::Forward),
            FinishAsked,
        ];
        assert_eq!(run(&road), Phase::Finished);
    }

    #[test]
    fn names_round_trip() {
        for (phase, name) in NAMES {
            assert_eq!(name.parse::<Phase>().unwrap(), phase);
            assert_eq!(phase.to_string(), name);
        }
    }

    fn event() -> impl Strategy<Value = Event> {
        use Event::*;
        prop_oneof![
            Just(Start),
            Just(CheckPassed),
            Just(SchemaMade),
            Just(CopyDone),
            Just(CaughtUp),
            Just(FlipAsked(Stream::Forward)),
            Just(FlipAsked(Stream::Reverse)),
            Just(Flipped(Stream::Forward)),
            Just(Flipped(Stream::Reverse)),
            Just(Parted),
            Just(FlipUndone(Phase::Split)),
            Just(FlipUndone(Phase::Following)),
            Just(FlipUndone(Phase::RolledBack)),
            Just(FlipUndone(Phase::Switched)),
            Just(FlipUndone(Phase::Copying)),
            Just(FinishAsked),
            Just(FinishSplitAsked),
            Just(CancelAsked),
        ]
    }

    proptest! {
        /// vitess#19680: nothing restarts or cancels a job past its point of no return.
        #[test]
        fn vitess_19680_no_way_leads_from_switched_to_canceled(
            events in proptest::collection::vec(event(), 1..60)
        ) {
            let mut phase = Phase::Planned;
            let mut live = Stream::Forward; // direction in which a flip is due
            for event in events {
                let Ok((next, commands)) = step(phase, event) else { continue };
                if commands.contains(&Command::CleanUp) {
                    prop_assert!(matches!(next, Phase::Finished | Phase::Canceled));
                }
                if next == Phase::Canceled {
                    let gone = [Phase::Switched, Phase::CuttingOver, Phase::Split];
                    prop_assert!(!gone.contains(&phase));
                }
                if let Event::FlipAsked(flip) = event {
                    // A flip only ever starts towards a side that is not live for all tables.
                    prop_assert!(phase == Phase::Split || flip == live);
                }
                match (event, next) {
                    (Event::Flipped(Stream::Forward), _) => live = Stream::Reverse,
                    (Event::Flipped(Stream::Reverse), _) => live = Stream::Forward,
                    (Event::FlipUndone(Phase::Switched), _) => live = Stream::Reverse,
                    (Event::FlipUndone(_), _) => live = Stream::Forward,
                    _ => {}
                }
                if phase >= Phase::Finished {
                    prop_assert_eq!(phase, next);
                }
                phase = next;
            }
        }

        /// What is refused before a runner is asked, a runner would refuse as well.
        #[test]
        fn what_is_refused_in_advance_would_be_refused(index in 0_usize..12) {
            let phase = NAMES[index].0;
            for flip in [Stream::Forward, Stream::Reverse] {
                let (early, late) = (may_flip(phase, flip), step(phase, Event::FlipAsked(flip)));
                prop_assert!(early.is_ok() || early.err() == late.err());
            }
        }

        /// After any crash, Start has an answer in every phase that is not an end.
        #[test]
        fn a_run_can_start_in_every_open_phase(index in 0_usize..10) {
            let phase = NAMES[index].0;
            let (next, commands) = step(phase, Event::Start).unwrap();
            prop_assert!(!commands.is_empty());
            prop_assert!(next >= phase);
        }
    }
}
