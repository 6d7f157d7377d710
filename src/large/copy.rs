//! Contents, piece by piece: bounded memory for objects of any size.

use std::collections::HashSet;

use super::find::{PAGE, array, sees_pages, sizes};
use super::{Error, Result};
use crate::pg::{self, Pipeline, Session};

/// One lo_put.
const PIECE_BYTES: u64 = 256 << 10;

/// Bytes of one transaction on the other side, and of what is in memory, doubled by hex.
const BATCH_BYTES: u64 = 4 << 20;

/// Objects of one transaction.
const BATCH_OBJECTS: usize = 1_000;

/// Objects to begin, and pieces to put.
#[derive(Default)]
struct Batch {
    /// Whether it has to be made, or emptied.
    begun: Vec<(u32, bool)>,
    /// Oid, first byte, number of bytes.
    pieces: Vec<(u32, u64, u64)>,
    /// Those whose last piece is among these, with their sizes.
    ended: Vec<(u32, u64)>,
    bytes: u64,
    /// Read from pg_largeobject, else by lo_get.
    by_page: bool,
}

impl Batch {
    fn is_full(&self) -> bool {
        self.bytes >= BATCH_BYTES || self.begun.len() >= BATCH_OBJECTS
    }

    /// Asks for the pieces: oid, position, bytes. From pages, those that follow each other without
    /// a hole come together.
    fn read_sql(&self) -> String {
        let pieces = self.pieces.iter();
        let list: Vec<String> =
            pieces.map(|(oid, at, length)| format!("({oid}, {at}, {length})")).collect();
        let list = list.join(", ");
        if !self.by_page {
            return format!(
                "select p.oid, p.at, pg_catalog.lo_get(p.oid::oid, p.at::int8, p.length::int4) \
                 from (values {list}) p(oid, at, length)"
            );
        }
        format!(
            "select s.loid, pg_catalog.min(s.pageno) * {PAGE}, \
             pg_catalog.string_agg(s.data, '' order by s.pageno) \
             from (select l.loid, l.pageno, l.data, p.at, \
                 l.pageno - pg_catalog.row_number() over w as island, \
                 count(*) filter (where pg_catalog.length(l.data) < {PAGE}) \
                     over (w rows between unbounded preceding and 1 preceding) as short \
                 from (values {list}) p(oid, at, length) join pg_catalog.pg_largeobject l \
                     on l.loid = p.oid::oid and l.pageno >= (p.at / {PAGE})::int4 \
                     and l.pageno < ((p.at + p.length - 1) / {PAGE} + 1)::int4 \
                 window w as (partition by l.loid order by l.pageno)) s \
             group by s.loid, s.at, s.island, s.short order by 1, 2"
        )
    }

    fn refused(&self, error: pg::Error) -> Error {
        if error.server().is_none() || error.is_closed() {
            return Error::Pg(error);
        }
        let oids = self.begun.iter().map(|begun| begun.0);
        let oids = oids.chain(self.pieces.iter().map(|piece| piece.0));
        let (first, last) = oids.fold((u32::MAX, 0), |(a, b), oid| (a.min(oid), b.max(oid)));
        Error::Refused { first, last, error: Box::new(error) }
    }
}

/// Writes these objects anew; gives how many, and their bytes.
pub(super) async fn copy(
    live: &mut Session,
    dest: &mut Session,
    oids: &[u32],
) -> Result<(u64, u64)> {
    let mut total = 0;
    let sees_pages = !oids.is_empty() && sees_pages(live).await?;
    for asked in oids.chunks(BATCH_OBJECTS) {
        let there = existing(dest, asked).await?;
        let mut batch = Batch { by_page: sees_pages, ..Batch::default() };
        for (oid, size) in sizes(live, asked, sees_pages).await? {
            batch.begun.push((oid, !there.contains(&oid)));
            total += size;
            let mut at = 0;
            while at < size {
                let length = PIECE_BYTES.min(size - at);
                batch.pieces.push((oid, at, length));
                batch.bytes += length;
                at += length;
                if at == size {
                    batch.ended.push((oid, size));
                }
                if batch.is_full() {
                    let full = Batch { by_page: sees_pages, ..Batch::default() };
                    put(live, dest, std::mem::replace(&mut batch, full)).await?;
                }
            }
        }
        put(live, dest, batch).await?;
    }
    Ok((oids.len() as u64, total))
}

async fn existing(dest: &mut Session, oids: &[u32]) -> pg::Result<HashSet<u32>> {
    let sql = format!(
        "select oid from pg_catalog.pg_largeobject_metadata where oid = any ({})",
        array(oids)
    );
    dest.query(&sql).await?.iter().map(|row| row.parse(0)).collect()
}

async fn put(live: &mut Session, dest: &mut Session, batch: Batch) -> Result<()> {
    let mut request = Pipeline::new();
    request.once("begin");
    // What makes a switch durable comes later, and takes this along.
    request.once("set local synchronous_commit = off");
    for (oid, is_new) in &batch.begun {
        request.once(&match is_new {
            true => format!("select pg_catalog.lo_create({oid})"),
            false => truncate(*oid, 0),
        });
    }
    if !batch.pieces.is_empty() {
        // oid, int8, bytea; given as the text that they came as.
        request.parse("put", "select pg_catalog.lo_put($1, $2, $3)", &[26, 20, 17]);
        for row in live.query(&batch.read_sql()).await? {
            request.run("put", (0..3).map(|index| row.bytes(index).map(AsRef::as_ref)));
        }
        request.close("put");
    }
    // What ends in a hole: no piece reaches its end.
    for (oid, size) in &batch.ended {
        request.once(&truncate(*oid, *size));
    }
    request.once("commit");
    dest.exchange(request, |_| {}).await.map_err(|error| batch.refused(error))
}

/// Makes the object as long as this, shorter or longer.
fn truncate(oid: u32, size: u64) -> String {
    format!("select pg_catalog.lo_truncate64(pg_catalog.lo_open({oid}, 131072), {size})")
}

/// Removes these objects; gives how many, and by name those that only their owner may remove.
pub(super) async fn remove(dest: &mut Session, oids: &[u32]) -> Result<(u64, Vec<String>)> {
    let mut removed = 0;
    let mut left = Vec::new();
    for asked in oids.chunks(BATCH_OBJECTS) {
        let sql = format!(
            "select m.oid, case when m.ours then pg_catalog.lo_unlink(m.oid) end from ( \
                 select m.oid, r.rolsuper or pg_catalog.pg_has_role(m.lomowner, 'usage') ours \
                 from pg_catalog.pg_largeobject_metadata m, pg_catalog.pg_roles r \
                 where r.rolname = current_user and m.oid = any ({}) offset 0) m",
            array(asked)
        );
        for row in dest.query(&sql).await? {
            match row.opt(1)? {
                Some(_) => removed += 1,
                None => left.push(format!(
                    "large object {} is gone on the other side, and only its owner may remove it \
                     here",
                    row.str(0)?
                )),
            }
        }
    }
    Ok((removed, left))
}
