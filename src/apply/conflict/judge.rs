//! What becomes of a change, by what the written side has in its place. Pure.

use super::policy::Rule;
use crate::clock::PgTimestamp;
use crate::id::Stream;

/// A change's operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Op {
    Insert,
    Update,
    Delete,
}

/// A local transaction that the change was made without knowing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Rival {
    /// The xid of it or of a part of it.
    pub xid: u32,
    /// When it committed, by the clock of the written side.
    pub commit_time: PgTimestamp,
    /// Where a column decides: whether the change has the greater value; see `greatest`.
    pub outweighed: bool,
}

/// What the written side has under the change's key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Local {
    /// A row; the rival that wrote it last, if one did.
    Row(Option<Rival>),
    /// None, and a local transaction deleted it; that one, if it is a rival.
    Gone(Option<Rival>),
    /// None, and no local transaction is known to have deleted it.
    Missing,
}

/// The name of a conflict: what came, and what it met.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    InsertInsert,
    InsertDelete,
    UpdateUpdate,
    UpdateDelete,
    UpdateMissing,
    DeleteUpdate,
    DeleteMissing,
    Unique,
}

impl Kind {
    /// As recorded.
    pub fn as_str(self) -> &'static str {
        match self {
            Kind::InsertInsert => "insert_insert",
            Kind::InsertDelete => "insert_delete",
            Kind::UpdateUpdate => "update_update",
            Kind::UpdateDelete => "update_delete",
            Kind::UpdateMissing => "update_missing",
            Kind::DeleteUpdate => "delete_update",
            Kind::DeleteMissing => "delete_missing",
            Kind::Unique => "unique",
        }
    }
}

/// How a change is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Act {
    /// As it came.
    Write,
    /// The row of an UPDATE is inserted.
    Insert,
    /// The row of an INSERT takes the place of the one that is there.
    Overwrite,
    /// Not at all.
    Nothing,
}

/// What becomes of a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Verdict {
    pub act: Act,
    pub conflict: Option<Kind>,
    pub rival: Option<Rival>,
}

/// The change that comes, as far as a policy looks at it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Incoming {
    /// What settles its table; `None`: a column's values.
    pub rule: Option<Rule>,
    /// The stream that brings it.
    pub stream: Stream,
    pub commit_time: PgTimestamp,
}

impl Incoming {
    /// Whether it wins; the other side, where the rival comes in, says the opposite.
    pub fn wins(&self, rival: Rival) -> bool {
        let of_source = self.stream == Stream::Forward;
        match self.rule {
            None => rival.outweighed,
            Some(Rule::Source) => of_source,
            Some(Rule::Target) => !of_source,
            Some(Rule::LastCommit | Rule::Error) => {
                (self.commit_time, of_source) > (rival.commit_time, !of_source)
            }
        }
    }
}

/// Decides about one change, other rows that stand in its way apart.
pub(super) fn judge(op: Op, local: Local, incoming: &Incoming) -> Verdict {
    let against = |kind, rival, act| Verdict {
        act: if incoming.wins(rival) { act } else { Act::Nothing },
        conflict: Some(kind),
        rival: Some(rival),
    };
    let plain = |act| Verdict { act, conflict: None, rival: None };
    let odd = |kind, act| Verdict { act, conflict: Some(kind), rival: None };
    match (op, local) {
        (Op::Insert, Local::Missing | Local::Gone(None)) => plain(Act::Write),
        (Op::Insert, Local::Gone(Some(rival))) => against(Kind::InsertDelete, rival, Act::Write),
        // Written here by this stream, or known over there, and then inserted there again.
        (Op::Insert, Local::Row(None)) => odd(Kind::InsertInsert, Act::Overwrite),
        (Op::Insert, Local::Row(Some(rival))) => against(Kind::InsertInsert, rival, Act::Overwrite),
        (Op::Update | Op::Delete, Local::Row(None)) => plain(Act::Write),
        (Op::Update, Local::Row(Some(rival))) => against(Kind::UpdateUpdate, rival, Act::Write),
        (Op::Update, Local::Gone(Some(rival))) => against(Kind::UpdateDelete, rival, Act::Insert),
        // The deletion lost over there, which is on record.
        (Op::Update, Local::Gone(None)) => plain(Act::Insert),
        // Its row was never let in, as one with the same unique value had won.
        (Op::Update, Local::Missing) => odd(Kind::UpdateMissing, Act::Insert),
        (Op::Delete, Local::Row(Some(rival))) => against(Kind::DeleteUpdate, rival, Act::Write),
        (Op::Delete, Local::Gone(rival)) => {
            Verdict { act: Act::Nothing, conflict: Some(Kind::DeleteMissing), rival }
        }
        (Op::Delete, Local::Missing) => odd(Kind::DeleteMissing, Act::Nothing),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(time: i64) -> Rival {
        Rival { xid: 7, commit_time: PgTimestamp(time), outweighed: false }
    }

    fn incoming(rule: Rule, stream: Stream, time: i64) -> Incoming {
        Incoming { rule: Some(rule), stream, commit_time: PgTimestamp(time) }
    }

    #[test]
    fn of_two_changes_exactly_one_wins_and_both_sides_say_which() {
        for rule in [Rule::LastCommit, Rule::Source, Rule::Target] {
            for (source_time, target_time) in [(5, 6), (6, 5), (5, 5)] {
                let there = incoming(rule, Stream::Forward, source_time).wins(at(target_time));
                let here = incoming(rule, Stream::Reverse, target_time).wins(at(source_time));
                assert_ne!(there, here, "{rule:?} {source_time} {target_time}");
            }
        }
        assert!(incoming(Rule::LastCommit, Stream::Forward, 5).wins(at(5)));
    }

    /// What one side has in the end of two changes of a row that both had, where its own was first.
    fn end(own: Op, other: Op, incoming: &Incoming, own_time: i64) -> &'static str {
        let local = match own {
            Op::Delete => Local::Gone(Some(at(own_time))),
            _ => Local::Row(Some(at(own_time))),
        };
        match (judge(other, local, incoming).act, own, other) {
            (Act::Nothing, Op::Delete, _) => "gone",
            (Act::Nothing, ..) => "own",
            (_, _, Op::Delete) => "gone",
            _ => "other",
        }
    }

    #[test]
    fn any_two_changes_of_a_row_end_alike_on_both_sides() {
        let pairs = [Op::Insert, Op::Update, Op::Delete];
        for rule in [Rule::LastCommit, Rule::Source, Rule::Target] {
            for (a, b) in pairs.iter().flat_map(|a| pairs.iter().map(move |b| (*a, *b))) {
                for (s, t) in [(1, 2), (2, 1), (1, 1)] {
                    let on_source = end(a, b, &incoming(rule, Stream::Reverse, t), s);
                    let on_target = end(b, a, &incoming(rule, Stream::Forward, s), t);
                    let same = match (on_source, on_target) {
                        ("gone", other) => other == "gone",
                        ("own", other) => other == "other",
                        (_, other) => other == "own",
                    };
                    assert!(same, "{rule:?} {a:?} {b:?} {s} {t}: {on_source} {on_target}");
                }
            }
        }
    }

    #[test]
    fn what_was_known_is_written_whatever_the_clocks_say() {
        let late = incoming(Rule::LastCommit, Stream::Reverse, 0);
        for op in [Op::Update, Op::Delete] {
            let verdict = judge(op, Local::Row(None), &late);
            assert_eq!((verdict.act, verdict.conflict), (Act::Write, None));
        }
        assert_eq!(judge(Op::Insert, Local::Gone(None), &late).act, Act::Write);
    }
}
