//! Rows of `COPY (select lsn, xid, data ...) TO STDOUT (FORMAT binary)`, or of `select data`, cut
//! from the pieces that arrive. Pure.
//!
//! <https://www.postgresql.org/docs/current/sql-copy.html#id-1.9.3.55.9.4>

use bytes::{Buf, Bytes, BytesMut};

use crate::lsn::Lsn;
use crate::pg;

/// What a binary COPY begins with, before flags and the length of an extension, four bytes each.
const SIGNATURE: &[u8] = b"PGCOPY\n\xff\r\n\0";

/// One message of the plugin.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Message {
    /// Where it stands; `None` where that was not asked for.
    pub lsn: Option<Lsn>,
    /// The plugin's bytes; not copied.
    pub data: Bytes,
}

/// Cuts rows. A server sends one a piece, but does not promise it.
#[derive(Debug, Default)]
pub(super) struct Rows {
    left: Bytes,
    /// There is no other column.
    data_only: bool,
    begun: bool,
    ended: bool,
}

impl Rows {
    /// Of messages alone.
    pub fn data() -> Rows {
        Rows { data_only: true, ..Rows::default() }
    }

    /// Adds what has arrived.
    pub fn feed(&mut self, piece: Bytes) {
        if self.left.is_empty() {
            self.left = piece;
            return;
        }
        let mut joined = BytesMut::from(&*self.left);
        joined.extend_from_slice(&piece);
        self.left = joined.freeze();
    }

    /// True once the trailer has been seen: nothing is missing.
    pub fn is_complete(&self) -> bool {
        self.ended && self.left.is_empty()
    }

    /// The next whole row, `None` if more must arrive. Errors for bytes that are no such COPY.
    pub fn next(&mut self) -> pg::Result<Option<Message>> {
        if !self.begun && !self.header()? {
            return Ok(None);
        }
        if self.ended {
            return if self.left.is_empty() { Ok(None) } else { Err(malformed()) };
        }
        let Some(fields) = self.left.first_chunk::<2>() else { return Ok(None) };
        match i16::from_be_bytes(*fields) {
            -1 => {
                self.left.advance(2);
                self.ended = true;
                self.next()
            }
            1 if self.data_only => self.data_row(),
            3 if !self.data_only => self.row(),
            _ => Err(malformed()),
        }
    }

    fn header(&mut self) -> pg::Result<bool> {
        let len = SIGNATURE.len() + 8;
        if self.left.len() < len {
            return Ok(false);
        }
        let header = self.left.split_to(len);
        // No flag and no extension has been given a meaning that we could read.
        if !header.starts_with(SIGNATURE) || !header.ends_with(&[0; 8]) {
            return Err(malformed());
        }
        self.begun = true;
        Ok(true)
    }

    /// lsn: 8 bytes; xid: 4; data: any. Each after its length.
    fn row(&mut self) -> pg::Result<Option<Message>> {
        const HEAD: usize = 2 + 4 + 8 + 4 + 4 + 4;
        let Some(mut head) = self.left.get(..HEAD) else { return Ok(None) };
        head.advance(2);
        let (lsn_len, lsn) = (head.get_i32(), Lsn(head.get_u64()));
        let (xid_len, _xid) = (head.get_i32(), head.get_u32());
        let len = usize::try_from(head.get_i32()).map_err(|_| malformed())?;
        if lsn_len != 8 || xid_len != 4 {
            return Err(malformed());
        }
        if self.left.len() - HEAD < len {
            return Ok(None);
        }
        self.left.advance(HEAD);
        Ok(Some(Message { lsn: Some(lsn), data: self.left.split_to(len) }))
    }

    /// data: any, after its length.
    fn data_row(&mut self) -> pg::Result<Option<Message>> {
        const HEAD: usize = 2 + 4;
        let Some(mut head) = self.left.get(..HEAD) else { return Ok(None) };
        head.advance(2);
        let len = usize::try_from(head.get_i32()).map_err(|_| malformed())?;
        if self.left.len() - HEAD < len {
            return Ok(None);
        }
        self.left.advance(HEAD);
        Ok(Some(Message { lsn: None, data: self.left.split_to(len) }))
    }
}

fn malformed() -> pg::Error {
    pg::Error::Result("the answer to a peek at the slot is not what COPY sends".to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::BufMut;
    use proptest::prelude::*;

    fn copy(messages: &[(u64, &[u8])], data_only: bool) -> Bytes {
        let mut out = BytesMut::from(SIGNATURE);
        out.put_u64(0);
        for (lsn, data) in messages {
            out.put_i16(if data_only { 1 } else { 3 });
            if !data_only {
                out.put_i32(8);
                out.put_u64(*lsn);
                out.put_i32(4);
                out.put_u32(7);
            }
            out.put_i32(data.len() as i32);
            out.put_slice(data);
        }
        out.put_i16(-1);
        out.freeze()
    }

    fn read(rows: &mut Rows) -> Vec<(u64, Vec<u8>)> {
        let next = || rows.next().unwrap().map(|m| (m.lsn.map_or(0, |l| l.0), m.data.to_vec()));
        std::iter::from_fn(next).collect()
    }

    #[test]
    fn rows_come_out_wherever_the_pieces_are_cut() {
        let messages: [(u64, &[u8]); 3] = [(16, b"one"), (32, b""), (48, b"three")];
        for data_only in [false, true] {
            let whole = copy(&messages, data_only);
            for cut in 0..=whole.len() {
                let mut rows = Rows { data_only, ..Rows::default() };
                rows.feed(whole.slice(..cut));
                let mut seen = read(&mut rows);
                assert_eq!(rows.is_complete(), cut == whole.len(), "{cut}");
                rows.feed(whole.slice(cut..));
                seen.extend(read(&mut rows));
                let lsn = |lsn: u64| if data_only { 0 } else { lsn };
                let wanted: Vec<_> = messages.iter().map(|(l, d)| (lsn(*l), d.to_vec())).collect();
                assert_eq!(seen, wanted, "{cut}");
                assert!(rows.is_complete());
            }
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_rows_or_refused(
            begun in any::<bool>(),
            data_only in any::<bool>(),
            data in proptest::collection::vec(any::<u8>(), 0..200),
        ) {
            let mut rows = Rows { begun, data_only, ..Rows::default() };
            rows.feed(Bytes::from(data));
            while let Ok(Some(_)) = rows.next() {}
        }
    }
}
