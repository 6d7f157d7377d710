//! Sequences and where they stand.

use crate::id::QualifiedName;
use crate::pg::{Result, Session};

/// A sequence with its parameters and position.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sequence {
    /// Schema and name.
    pub name: QualifiedName,
    /// Last value handed out (or, while `is_called` is false, the next one).
    pub last_value: i64,
    /// Whether `last_value` has been handed out.
    pub is_called: bool,
    /// INCREMENT BY; negative for descending ones.
    pub increment: i64,
    /// MINVALUE.
    pub min_value: i64,
    /// MAXVALUE.
    pub max_value: i64,
    /// CACHE.
    pub cache: i64,
    /// CYCLE.
    pub cycle: bool,
    /// The table that owns it (OWNED BY, serial, identity): the two stay or go together.
    pub owner: Option<QualifiedName>,
}

/// Every sequence of the database but those in system schemas, `walferry`, and extensions, with its
/// position now. Positions are not transactional: any snapshot sees the newest.
///
/// Two round trips however many there are. Errors if one may not be read (42501).
pub async fn sequences(session: &mut Session) -> Result<Vec<Sequence>> {
    // The limits keep a planner without statistics from reading all of pg_depend for a few.
    let parameters = session
        .query(
            "select n.nspname, c.relname, s.seqincrement, s.seqmin, s.seqmax, s.seqcache, \
                s.seqcycle, tn.nspname, t.relname \
             from pg_catalog.pg_sequence s join pg_catalog.pg_class c on c.oid = s.seqrelid \
             join pg_catalog.pg_namespace n on n.oid = c.relnamespace \
             left join lateral (select d.refobjid from pg_catalog.pg_depend d \
                where d.classid = 'pg_catalog.pg_class'::pg_catalog.regclass and d.objid = c.oid \
                and d.objsubid = 0 and d.deptype in ('a', 'i') \
                and d.refclassid = 'pg_catalog.pg_class'::pg_catalog.regclass limit 1) o on true \
             left join pg_catalog.pg_class t on t.oid = o.refobjid \
             left join pg_catalog.pg_namespace tn on tn.oid = t.relnamespace \
             where c.relpersistence <> 't' \
             and n.nspname not in ('pg_catalog', 'information_schema', 'walferry') \
             and n.nspname !~ '^pg_(toast|temp)' \
             and (select d.objid from pg_catalog.pg_depend d where d.objid = c.oid \
                 and d.classid = 'pg_catalog.pg_class'::pg_catalog.regclass and d.deptype = 'e' \
                 limit 1) is null \
             order by n.nspname, c.relname",
        )
        .await?;
    let mut sequences = Vec::with_capacity(parameters.len());
    for row in &parameters {
        sequences.push(Sequence {
            name: QualifiedName::new(row.str(0)?, row.str(1)?),
            last_value: 0,
            is_called: false,
            increment: row.parse(2)?,
            min_value: row.parse(3)?,
            max_value: row.parse(4)?,
            cache: row.parse(5)?,
            cycle: row.bool(6)?,
            owner: match (row.opt(7)?, row.opt(8)?) {
                (Some(schema), Some(name)) => Some(QualifiedName::new(schema, name)),
                _ => None,
            },
        });
    }
    if sequences.is_empty() {
        return Ok(sequences);
    }
    let selects: Vec<String> = sequences
        .iter()
        .map(|s| format!("select last_value, is_called from {}", s.name.quoted()))
        .collect();
    let positions = session.query(&selects.join(";")).await?;
    for (sequence, row) in sequences.iter_mut().zip(&positions) {
        sequence.last_value = row.parse(0)?;
        sequence.is_called = row.bool(1)?;
    }
    Ok(sequences)
}
