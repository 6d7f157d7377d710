//! Sequences of the other side set past every value handed out.

use super::{Error, Result};
use crate::catalog::Sequence;
use crate::id::quote_literal;
use crate::pg::Session;

/// Sets each sequence on this session's server to where `sequences` stood, and up to `margin` of it
/// increments further, in its own direction: no more than a 64th of what it has left, so that one
/// that is nearly used up still gives its last values. Cycling ones exactly, as nothing lies past
/// every value there.
///
/// The margin is for values that may be handed out after the position was read; 0 where that cannot
/// happen. Not transactional, may be repeated, one round trip. If any is missing, none is set and
/// all missing ones are named.
///
/// <https://www.postgresql.org/docs/current/functions-sequence.html>
pub async fn set_sequences(
    session: &mut Session,
    sequences: &[Sequence],
    margin: impl Fn(&Sequence) -> u64,
) -> Result<()> {
    if sequences.is_empty() {
        return Ok(());
    }
    let values: Vec<String> = sequences
        .iter()
        .map(|sequence| {
            format!(
                "({}::pg_catalog.text, ({})::pg_catalog.int8, {})",
                quote_literal(&sequence.name.quoted()),
                position(sequence, margin(sequence)),
                sequence.is_called
            )
        })
        .collect();
    // The window looks at all rows before the first setval is evaluated.
    let sql = format!(
        "select s.name, s.missing, case when not pg_catalog.bool_or(s.missing) over () \
         then pg_catalog.setval(pg_catalog.to_regclass(s.name), s.value, s.called) end \
         from (select v.name, v.value, v.called, c.oid is null as missing \
             from (values {}) v(name, value, called) \
             left join pg_catalog.pg_class c on c.oid = pg_catalog.to_regclass(v.name) \
                and c.relkind = 'S' offset 0) s",
        values.join(", ")
    );
    let rows = session.query(&sql).await?;
    let mut names = Vec::new();
    for row in &rows {
        if row.bool(1)? {
            names.push(row.string(0)?);
        }
    }
    if names.is_empty() {
        return Ok(());
    }
    Err(Error::NoSequences { peer: session.peer().to_string(), names })
}

/// `last_value` moved on by up to `margin` increments and no more than a 64th of the way to the
/// bound.
fn position(sequence: &Sequence, margin: u64) -> i64 {
    if sequence.cycle || sequence.increment == 0 {
        return sequence.last_value;
    }
    let bound = if sequence.increment > 0 { sequence.max_value } else { sequence.min_value };
    // i128: the distance between two bigints does not fit in one.
    let (last, increment) = (i128::from(sequence.last_value), i128::from(sequence.increment));
    let room = ((i128::from(bound) - last) / increment).max(0);
    let moved = last + increment * i128::from(margin).min(room / 64);
    i64::try_from(moved).unwrap_or(sequence.last_value)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::id::QualifiedName;

    fn sequence(last_value: i64, increment: i64, min_value: i64, max_value: i64) -> Sequence {
        Sequence {
            name: QualifiedName::new("s", "q"),
            last_value,
            is_called: true,
            increment,
            min_value,
            max_value,
            cache: 1,
            cycle: false,
            owner: None,
        }
    }

    #[test]
    fn positions_move_in_the_direction_of_the_sequence_and_stay_in_bounds() {
        assert_eq!(position(&sequence(7, 1, 1, i64::MAX), 0), 7);
        assert_eq!(position(&sequence(7, 5, 1, i64::MAX), 10), 57);
        assert_eq!(position(&sequence(-7, -2, i64::MIN, -1), 3), -13);
        assert_eq!(position(&sequence(0, 1, 1, 640), 1000), 10);
        assert_eq!(position(&sequence(7, 5, 1, 20), 10), 7);
        assert_eq!(position(&sequence(-7, -5, -15, -1), 10), -7);
        assert_eq!(position(&sequence(i64::MAX - 1, 1, 1, i64::MAX), 1000), i64::MAX - 1);
        let cycling = Sequence { cycle: true, ..sequence(7, 1, 1, 9) };
        assert_eq!(position(&cycling, 10), 7);
    }

    proptest! {
        #[test]
        fn positions_are_ones_that_the_sequence_can_reach(
            last in any::<i64>(), increment in any::<i64>(), margin in any::<u64>()
        ) {
            prop_assume!(increment != 0);
            let moved = position(&sequence(last, increment, i64::MIN, i64::MAX), margin);
            let distance = i128::from(moved) - i128::from(last);
            prop_assert_eq!(distance % i128::from(increment), 0);
            prop_assert!(distance == 0 || (distance > 0) == (increment > 0));
        }
    }
}
