//! Two sides that write one row, and two streams between them, in any order: both end alike.
//!
//! A model of what the database keeps, with the true `judge`: who wrote a version, which of the
//! other side's transactions a change knew, the values that versions left.

use proptest::prelude::*;

use super::judge::{Act, Incoming, Local, Op, Rival, judge};
use super::policy::Rule;
use crate::clock::PgTimestamp;
use crate::id::Stream;

/// What a side did, in the order in which it did it.
#[derive(Clone, Copy, Debug)]
struct Sent {
    op: Op,
    value: Option<i64>,
    /// Its place among what its side did, from 1 on.
    n: u32,
    /// How many of the other side's had come there.
    knew: u32,
    time: i64,
}

/// A version of the row. The last writer is a local transaction, or the stream.
#[derive(Clone, Copy, Debug)]
struct Version {
    value: Option<i64>,
    /// Which side's transaction made it, which tells versions apart.
    made: (Stream, u32),
    local: Option<(u32, i64)>,
}

struct Side {
    /// The stream that brings what the other side does.
    written_by: Stream,
    row: Option<Version>,
    left: Vec<Version>,
    gone: Option<(u32, i64)>,
    sent: Vec<Sent>,
    come: u32,
}

impl Side {
    fn new(written_by: Stream, row: Option<Version>) -> Side {
        Side { written_by, row, left: Vec::new(), gone: None, sent: Vec::new(), come: 0 }
    }

    /// An application writes: a row that is there is deleted or updated, another is inserted.
    fn write(&mut self, deletes: bool, value: Option<i64>, time: i64) {
        let n = self.sent.len() as u32 + 1;
        let op = match (&self.row, deletes) {
            (None, _) => Op::Insert,
            (Some(_), true) => Op::Delete,
            (Some(_), false) => Op::Update,
        };
        let falls = self.row.is_some_and(|row| op == Op::Delete || value < row.value);
        self.left.extend(self.row.filter(|_| falls));
        let made = (self.written_by.opposite(), n);
        self.row = (op != Op::Delete).then_some(Version { value, made, local: Some((n, time)) });
        if op == Op::Delete {
            self.gone = Some((n, time));
        }
        self.sent.push(Sent { op, value, n, knew: self.come, time });
    }

    fn rival(&self, local: Option<(u32, i64)>, sent: &Sent) -> Option<Rival> {
        let (n, time) = local.filter(|(n, _)| *n > sent.knew)?;
        let versions = self.left.iter().chain(&self.row);
        let mut unknown = versions.filter(|v| v.local.is_some_and(|(n, _)| n > sent.knew));
        let outweighed = sent.op != Op::Delete
            && unknown.all(|version| match self.written_by {
                Stream::Forward => sent.value >= version.value,
                Stream::Reverse => sent.value > version.value,
            });
        Some(Rival { xid: n, commit_time: PgTimestamp(time), outweighed })
    }

    /// The stream brings a change.
    fn meet(&mut self, sent: &Sent, rule: Option<Rule>) {
        self.come += 1;
        let local = match (&self.row, self.gone) {
            (Some(row), _) => Local::Row(self.rival(row.local, sent)),
            (None, Some(gone)) => Local::Gone(self.rival(Some(gone), sent)),
            (None, None) => Local::Missing,
        };
        let commit_time = PgTimestamp(sent.time);
        let incoming = Incoming { rule, stream: self.written_by, commit_time };
        let verdict = judge(sent.op, local, &incoming);
        if verdict.act == Act::Nothing {
            return;
        }
        if verdict.rival.is_some() {
            self.left.clear();
        }
        let made = (self.written_by, sent.n);
        self.row =
            (sent.op != Op::Delete).then_some(Version { value: sent.value, made, local: None });
    }
}

/// What happens next.
#[derive(Clone, Debug)]
enum Happens {
    Write { on_source: bool, deletes: bool, value: Option<i64> },
    Comes { to_source: bool },
}

fn happens() -> impl Strategy<Value = Happens> {
    let value = prop_oneof![1 => Just(None), 5 => (0..4i64).prop_map(Some)];
    prop_oneof![
        3 => (any::<bool>(), prop::bool::weighted(0.3), value).prop_map(
            |(on_source, deletes, value)| Happens::Write { on_source, deletes, value }
        ),
        2 => any::<bool>().prop_map(|to_source| Happens::Comes { to_source }),
    ]
}

fn played(begins: bool, all: &[Happens], rule: Option<Rule>) -> [Option<(Stream, u32)>; 2] {
    let row = Version { value: Some(2), made: (Stream::Forward, 0), local: None };
    let row = begins.then_some(row);
    let mut source = Side::new(Stream::Reverse, row);
    let mut target = Side::new(Stream::Forward, row);
    let come = |to: &mut Side, from: &Side| {
        let sent = from.sent.get(to.come as usize).copied();
        sent.map(|sent| to.meet(&sent, rule)).is_some()
    };
    for (time, one) in all.iter().enumerate() {
        match one {
            Happens::Write { on_source, deletes, value } => {
                let side = if *on_source { &mut source } else { &mut target };
                side.write(*deletes, *value, time as i64);
            }
            Happens::Comes { to_source: true } => drop(come(&mut source, &target)),
            Happens::Comes { to_source: false } => drop(come(&mut target, &source)),
        }
    }
    while come(&mut source, &target) || come(&mut target, &source) {}
    [source.row.map(|row| row.made), target.row.map(|row| row.made)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn both_sides_end_alike_whatever_is_written_and_whenever_it_comes(
        begins: bool,
        all in prop::collection::vec(happens(), 2..12),
    ) {
        let rules = [None, Some(Rule::LastCommit), Some(Rule::Source), Some(Rule::Target)];
        for rule in rules {
            let [source, target] = played(begins, &all, rule);
            prop_assert_eq!(source, target, "{:?}", rule);
        }
    }
}

/// What needs notes: a row that won by a value that it has no more.
#[test]
fn a_row_that_won_and_then_fell_stays_the_winner_on_both_sides() {
    let write = |on_source, value| Happens::Write { on_source, deletes: false, value };
    let all = [write(true, Some(9)), write(false, Some(3)), write(true, Some(1))];
    let won = Some((Stream::Forward, 2));
    assert_eq!(played(true, &all, None), [won, won]);
    let gone = Happens::Write { on_source: true, deletes: true, value: None };
    let all = [write(true, Some(9)), write(false, Some(3)), gone];
    assert_eq!(played(true, &all, None), [None, None]);
}
