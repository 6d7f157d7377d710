//! Which transactions our own other direction wrote (law 6). Pure, and the same for every decoder:
//! it looks at changes, not at a plugin's bytes.

use crate::change::{Change, Chunk, Relation, Row};

/// True if the transaction that `first` begins is tagged with one of `origins`, or if its first
/// change is to the row of one of the streams `markers` in `walferry.progress`.
///
/// That row alone decides: a transaction that touches it later on is somebody's own.
pub(super) fn is_from(first: &Chunk, origins: &[String], markers: &[String]) -> bool {
    if let Some(origin) = &first.begin.origin
        && origins.contains(origin)
    {
        return true;
    }
    let stream = first.changes.first().and_then(stream_of);
    stream.is_some_and(|stream| markers.iter().any(|marker| marker.as_bytes() == stream))
}

/// The stream whose progress a change is to.
fn stream_of(change: &Change) -> Option<&[u8]> {
    match change {
        Change::Insert { relation, new } | Change::Update { relation, new, .. } => {
            stream_in(relation, new)
        }
        Change::Delete { relation, old } => stream_in(relation, old.row()),
        Change::Truncate { .. } | Change::Message { .. } => None,
    }
}

fn stream_in<'a>(relation: &Relation, row: &'a Row) -> Option<&'a [u8]> {
    if relation.name.schema != "walferry" || relation.name.name != "progress" {
        return None;
    }
    let column = relation.columns.iter().position(|column| column.name == "stream")?;
    row.values().nth(column)?.bytes()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::change::{Begin, Column, OldRow, ReplicaIdentity, RowBuilder, Value};
    use crate::clock::PgTimestamp;
    use crate::id::QualifiedName;
    use crate::lsn::Lsn;

    fn relation(schema: &str, name: &str) -> Arc<Relation> {
        let column = |name: &str, key| Column {
            name: name.to_string(),
            type_oid: 25,
            type_modifier: -1,
            key,
        };
        Arc::new(Relation {
            oid: 1,
            name: QualifiedName::new(schema, name),
            identity: ReplicaIdentity::Default,
            columns: vec![column("end_lsn", false), column("stream", true)],
        })
    }

    fn row(stream: &str) -> Row {
        let mut builder = RowBuilder::new();
        builder.push(Value::Text(b"0/1"));
        builder.push(Value::Text(stream.as_bytes()));
        builder.finish()
    }

    fn chunk(origin: Option<&str>, changes: Vec<Change>) -> Chunk {
        let begin = Begin {
            xid: 1,
            commit_lsn: Lsn(1),
            commit_time: PgTimestamp(0),
            origin: origin.map(str::to_string),
            ending: Default::default(),
        };
        Chunk { begin: Arc::new(begin), number: 0, changes, commit: None, bytes: 0 }
    }

    fn update(table: &str, stream: &str) -> Change {
        Change::Update { relation: relation("walferry", table), old: None, new: row(stream) }
    }

    fn is_back(chunk: &Chunk) -> bool {
        is_from(chunk, &["back".to_string()], &["back".to_string()])
    }

    #[test]
    fn the_first_change_tells_whose_a_transaction_is() {
        assert!(is_back(&chunk(None, vec![update("progress", "back")])));
        assert!(is_back(&chunk(Some("back"), vec![])));
        let insert =
            Change::Insert { relation: relation("walferry", "progress"), new: row("back") };
        assert!(is_back(&chunk(None, vec![insert])));
        let old = OldRow::Key(row("back"));
        let delete = Change::Delete { relation: relation("walferry", "progress"), old };
        assert!(is_back(&chunk(None, vec![delete])));
    }

    #[test]
    fn other_streams_other_tables_and_later_rows_are_not_ours() {
        assert!(!is_back(&chunk(None, vec![update("progress", "forth")])));
        assert!(!is_back(&chunk(Some("forth"), vec![update("canary", "back")])));
        assert!(!is_back(&chunk(None, vec![update("canary", "x"), update("progress", "back")])));
        let elsewhere = Change::Insert { relation: relation("app", "progress"), new: row("back") };
        assert!(!is_back(&chunk(None, vec![elsewhere])));
        assert!(!is_back(&chunk(None, vec![])));
    }
}
