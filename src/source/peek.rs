//! What a puller asks: the statements, where the log ends, and how much at a time.

use std::time::Duration;

use crate::decode::Plugin;
use crate::id::quote_literal;
use crate::lsn::Lsn;
use crate::pg::{self, CancelHandle, Session};

/// The statements that read and advance one slot.
#[derive(Clone, Debug)]
pub(super) struct Peeks {
    slot: String,
    binary: &'static str,
    options: String,
    /// 10 has no pg_replication_slot_advance.
    by_reading: bool,
}

impl Peeks {
    /// For a slot of this plugin, on a server of this major version.
    pub fn new(slot: &str, plugin: Plugin, major: u32, options: &[(&str, String)]) -> Peeks {
        let texts = options.iter().flat_map(|(name, value)| [*name, value.as_str()]);
        let texts: Vec<String> = texts.map(quote_literal).collect();
        Peeks {
            slot: quote_literal(slot),
            binary: if plugin.is_textual() { "" } else { "binary_" },
            options: format!("variadic array[{}]::text[]", texts.join(", ")),
            by_reading: major < 11,
        }
    }

    /// Reads from the slot's confirmed position up to `upto_lsn`, or to the end of the transaction
    /// that brings the number of messages to `limit`.
    pub fn sql(&self, upto_lsn: Lsn, limit: u32) -> String {
        let Peeks { slot, binary, options, .. } = self;
        format!(
            "copy (select lsn, xid, data from pg_catalog.pg_logical_slot_peek_{binary}changes(\
             {slot}, '{upto_lsn}', {limit}, {options})) to stdout (format binary)"
        )
    }

    /// The same, the messages alone, and makes what was read the slot's confirmed position.
    pub fn taking(&self, upto_lsn: Lsn, limit: u32) -> String {
        let Peeks { slot, binary, options, .. } = self;
        format!(
            "copy (select data from pg_catalog.pg_logical_slot_get_{binary}changes(\
             {slot}, '{upto_lsn}', {limit}, {options})) to stdout (format binary)"
        )
    }

    /// Reads one record, so that the plugin has looked at its options.
    pub fn first(&self) -> String {
        let Peeks { slot, binary, options, .. } = self;
        format!(
            "select count(*) from pg_catalog.pg_logical_slot_peek_{binary}changes(\
             {slot}, '0/1', 1, {options})"
        )
    }

    /// Whether the first change of a row that the slot has, of wal2json, tells a type. No row if
    /// there is no change.
    pub fn tells_types(&self) -> String {
        let Peeks { slot, binary, options, .. } = self;
        // Within values and names, quotes have backslashes before them.
        format!(
            "select data like '%,\"typeoid\":%' \
             from pg_catalog.pg_logical_slot_peek_{binary}changes({slot}, null, 10000, {options}) \
             where data ~ '^{{\"action\":\"[IUD]\"' and data like '%{{\"name\":%' limit 1"
        )
    }

    /// Which transactions the slot has up to `upto_lsn`: id and exclusive end, in no order. (There
    /// is no max(pg_lsn) before 13.)
    pub fn commits(&self, upto_lsn: Lsn) -> String {
        let Peeks { slot, binary, options, .. } = self;
        format!(
            "select distinct on (xid::text) xid, lsn \
             from pg_catalog.pg_logical_slot_peek_{binary}changes(\
             {slot}, '{upto_lsn}', null, {options}) order by xid::text, lsn desc"
        )
    }

    /// True if advancing starts the plugin.
    pub fn advances_by_reading(&self) -> bool {
        self.by_reading
    }

    /// Makes `lsn` the slot's confirmed position. It must be the end of a record on 10, where the
    /// slot is advanced by reading it: the server stops after the first record that ends at or
    /// after the position, and confirms that record's end.
    pub fn advance(&self, lsn: Lsn) -> String {
        let Peeks { slot, binary, options, .. } = self;
        if self.by_reading {
            return format!(
                "select count(*) from pg_catalog.pg_logical_slot_get_{binary}changes(\
                 {slot}, '{lsn}', null, {options})"
            );
        }
        format!("select pg_catalog.pg_replication_slot_advance({slot}, '{lsn}')")
    }
}

/// How often a session may start the plugin still. pgoutput asks for a callback on relations at
/// each start, and a session has room for ten, which other parts of the server share: then it is an
/// error ("out of relcache_callback_list slots"). 11.19, 12.14, 13.10, 14.7 and 15.2 mended that,
/// and no release of 10 did.
#[derive(Debug)]
pub(super) struct Starts {
    left: Option<u32>,
}

/// Four of the ten are others'.
const STARTS: u32 = 5;

impl Starts {
    /// Of a new session.
    pub fn of(session: &Session, plugin: Plugin) -> Starts {
        let version = session.parameter("server_version").unwrap_or_default();
        let wears = plugin == Plugin::Pgoutput && wears_out(version);
        Starts { left: wears.then_some(STARTS) }
    }

    /// True if there is none left.
    pub fn are_spent(&self) -> bool {
        self.left == Some(0)
    }

    /// Takes one; false if there is none left.
    pub fn take(&mut self) -> bool {
        match &mut self.left {
            None => true,
            Some(0) => false,
            Some(left) => {
                *left -= 1;
                true
            }
        }
    }
}

/// Of `10.23`, `15beta1`, `15.20 (Debian 15.20-1)`.
fn wears_out(version: &str) -> bool {
    let mut numbers = version.split(|c: char| !c.is_ascii_digit()).map(|n| n.parse::<u32>());
    let mut next = || numbers.next().and_then(Result::ok).unwrap_or(0);
    let (major, minor) = (next(), next());
    let mended = match major {
        ..11 => return true,
        11 => 19,
        12 => 14,
        13 => 10,
        14 => 7,
        15 => 2,
        _ => 0,
    };
    minor < mended
}

/// Where the log ends: a position on disk, asked for before a peek.
#[derive(Debug, Default)]
pub(super) struct LogEnd {
    /// On 10: the end of a record, not known to be on disk yet.
    mark_lsn: Option<Lsn>,
    segment_bytes: u64,
}

impl LogEnd {
    /// `None` where it is not known now, and may be next time.
    pub async fn ask(&mut self, session: &mut Session) -> pg::Result<Option<Lsn>> {
        if session.major_version() >= 11 {
            let sql = "select pg_catalog.pg_current_wal_flush_lsn()";
            return Ok(Some(session.query_one(sql, &[]).await?.lsn(0)?));
        }
        let sql = "select pg_catalog.pg_current_wal_insert_lsn(), \
             pg_catalog.pg_current_wal_flush_lsn(), \
             pg_catalog.pg_size_bytes(pg_catalog.current_setting('wal_segment_size'))";
        let row = session.query_one(sql, &[]).await?;
        self.segment_bytes = row.parse(2)?;
        Ok(self.record_end(row.lsn(0)?, row.lsn(1)?))
    }

    /// 10 advances a slot by reading, to the end of a record only. The flush position may lie in
    /// the middle of one; the insert position does not, but is not on disk yet. So it is kept, and
    /// used once it is.
    fn record_end(&mut self, insert_lsn: Lsn, flush_lsn: Lsn) -> Option<Lsn> {
        let insert_lsn = without_header(insert_lsn, self.segment_bytes);
        let marked = self.mark_lsn.filter(|mark| *mark <= flush_lsn);
        if insert_lsn <= flush_lsn {
            self.mark_lsn = None;
            return Some(insert_lsn);
        }
        if marked.is_some() || self.mark_lsn.is_none() {
            self.mark_lsn = Some(insert_lsn);
        }
        marked
    }
}

/// The insert position is where the next record goes: behind the page's header, where the last one
/// ended with the page before. A long header begins each segment.
fn without_header(lsn: Lsn, segment_bytes: u64) -> Lsn {
    const PAGE_BYTES: u64 = 8192;
    let (page, segment) = (lsn.0 % PAGE_BYTES, lsn.0 % segment_bytes.max(PAGE_BYTES));
    match (page, segment) {
        (24, _) => Lsn(lsn.0 - 24),
        (_, 40) => Lsn(lsn.0 - 40),
        _ => lsn,
    }
}

/// How many messages are asked for at a time: the more, the less often the source decodes the same
/// again, and the more it must keep for us.
#[derive(Debug)]
pub(super) struct Chunks {
    messages: u32,
    /// As many as take what a chunk may, being as large as those of the last one.
    most: u32,
    fixed: bool,
}

/// Fewest and most messages of a chunk. 20,000 are read in a tenth of a second; two million small
/// ones are 200 MB on the source. For each chunk it decodes again what committed since its last
/// record of running transactions, which a busy server logs every 15 s: a million messages or so.
const MESSAGES: (u32, u32) = (20_000, 2_000_000);

/// Where nothing is read ahead.
const FIRST_MESSAGES: u32 = 100_000;

/// Decoded in some 60 ms, in which the target has nothing to do yet.
const AHEAD_MESSAGES: u32 = 100_000;

/// Bytes that a chunk may take in the source's memory and temporary files, unless a single
/// transaction is larger.
const CHUNK_BYTES: u64 = 128 << 20;

/// What a chunk may take, the time in which the target was waited for included.
const CHUNK_TIME: Duration = Duration::from_secs(10);

impl Chunks {
    /// Always so many; by default 100,000 at first.
    pub fn of(messages: Option<u32>) -> Self {
        Chunks::first(messages, FIRST_MESSAGES)
    }

    /// The same for chunks that are asked for before the last one is through: the first is small,
    /// as nobody has anything to do before it comes.
    pub fn ahead(messages: Option<u32>) -> Self {
        Chunks::first(messages, AHEAD_MESSAGES)
    }

    fn first(asked: Option<u32>, ours: u32) -> Self {
        let messages = asked.unwrap_or(ours);
        Chunks { messages, most: MESSAGES.1, fixed: asked.is_some() }
    }

    /// What to ask for now; twice as many next time: for each chunk the source decodes again what
    /// came before it, and the last one is taken by a target that has both its sessions for it.
    /// Where that is too many, it is [learned](Chunks::learn) a chunk later.
    pub fn rise(&mut self) -> u32 {
        if self.fixed {
            return self.messages;
        }
        let messages = self.messages.min(self.most);
        self.messages = messages.saturating_mul(2);
        messages
    }

    /// The most messages to ask for now.
    pub fn messages(&self) -> u32 {
        self.messages
    }

    /// A chunk of that size, cut short or not, took so long and had so many messages and bytes.
    pub fn learn(&mut self, full: bool, took: Duration, (count, bytes): (u32, u64)) {
        if self.fixed {
            return;
        }
        if let Some(each) = bytes.checked_div(count.into()) {
            let most = CHUNK_BYTES * 2 / each.max(1);
            self.most = u32::try_from(most).unwrap_or(MESSAGES.1).clamp(MESSAGES.0, MESSAGES.1);
        }
        if took > CHUNK_TIME * 2 || bytes > CHUNK_BYTES * 2 {
            self.messages = (self.messages / 2).max(MESSAGES.0);
        } else if full && took < CHUNK_TIME / 2 && bytes < CHUNK_BYTES / 2 {
            let times = if bytes < CHUNK_BYTES / 4 { 4 } else { 2 };
            self.messages = (self.messages * times).min(self.most);
        }
    }
}

/// Cancels what a backend is doing when it is dropped while armed.
#[derive(Debug)]
pub(super) struct Canceled {
    handle: CancelHandle,
    armed: bool,
}

impl Canceled {
    /// Of this session's backend; not armed.
    pub fn of(session: &Session) -> Canceled {
        Canceled { handle: session.cancel_handle(), armed: false }
    }

    /// The backend is at work.
    pub fn arm(&mut self) {
        self.armed = true;
    }

    /// It is done.
    pub fn disarm(&mut self) {
        self.armed = false;
    }

    /// True while the backend is at work.
    pub fn is_armed(&self) -> bool {
        self.armed
    }
}

impl Drop for Canceled {
    fn drop(&mut self) {
        if !self.armed {
            return;
        }
        let handle = self.handle.clone();
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move { handle.cancel().await });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn on_10_an_end_is_a_records_and_on_disk() {
        let mut end = LogEnd { mark_lsn: None, segment_bytes: 16 << 20 };
        assert_eq!(end.record_end(Lsn(5000), Lsn(5000)), Some(Lsn(5000)));
        assert_eq!(end.record_end(Lsn(6000), Lsn(5500)), None);
        assert_eq!(end.record_end(Lsn(7000), Lsn(5900)), None);
        assert_eq!(end.record_end(Lsn(8000), Lsn(6100)), Some(Lsn(6000)));
        assert_eq!(end.record_end(Lsn(8100), Lsn(8050)), Some(Lsn(8000)));
    }

    #[test]
    fn a_position_behind_a_page_header_is_the_end_of_the_page_before() {
        let segment = 16 << 20;
        assert_eq!(without_header(Lsn(8192 * 3 + 24), segment), Lsn(8192 * 3));
        assert_eq!(without_header(Lsn(8192 * 3 + 40), segment), Lsn(8192 * 3 + 40));
        assert_eq!(without_header(Lsn(segment * 2 + 40), segment), Lsn(segment * 2));
        assert_eq!(without_header(Lsn(8192 * 3 + 32), segment), Lsn(8192 * 3 + 32));
    }

    #[test]
    fn a_session_of_an_old_server_starts_pgoutput_a_few_times_only() {
        for old in ["10.23", "10.0 (Debian)", "11.18", "12.13", "13.9", "14.6", "15.1", "15beta1"] {
            assert!(wears_out(old), "{old}");
        }
        for mended in
            ["11.19", "12.22", "13.10", "14.7", "15.2", "15.20 (Debian 1)", "16.0", "18beta1"]
        {
            assert!(!wears_out(mended), "{mended}");
        }
        let mut few = Starts { left: Some(2) };
        assert!(few.take() && !few.are_spent() && few.take() && few.are_spent() && !few.take());
        let mut any = Starts { left: None };
        assert!((0..100).all(|_| any.take() && !any.are_spent()));
    }

    #[test]
    fn chunks_grow_while_they_are_cheap_and_shrink_when_they_are_not() {
        let mut chunks = Chunks::of(None);
        let first = chunks.messages();
        let second = Duration::from_secs(1);
        chunks.learn(true, second, (first, 1 << 20));
        assert_eq!(chunks.messages(), first * 4);
        chunks.learn(false, second, (first, 1 << 20));
        assert_eq!(chunks.messages(), first * 4);
        for _ in 0..3 {
            chunks.learn(true, second, (first * 20, CHUNK_BYTES / 3));
        }
        assert_eq!(chunks.messages(), MESSAGES.1);
        for _ in 0..20 {
            chunks.learn(true, second, (first * 20, CHUNK_BYTES * 3));
        }
        assert_eq!(chunks.messages(), MESSAGES.0);
    }

    #[test]
    fn chunks_read_ahead_rise_by_themselves_as_far_as_their_bytes_may() {
        let mut chunks = Chunks::ahead(None);
        let asked: Vec<u32> = (0..6).map(|_| chunks.rise()).collect();
        assert_eq!(asked, [100_000, 200_000, 400_000, 800_000, 1_600_000, MESSAGES.1]);
        let second = Duration::from_secs(1);
        chunks.learn(false, second, (1_000_000, CHUNK_BYTES * 3));
        assert_eq!([chunks.rise(), chunks.rise()], [667_749, 667_749]);
        chunks.learn(false, second, (0, 0));
        assert_eq!(chunks.rise(), 667_749);
        let mut fixed = Chunks::ahead(Some(7));
        assert_eq!([fixed.rise(), fixed.rise()], [7, 7]);
    }

    #[test]
    fn a_slot_is_advanced_by_the_function_or_by_reading() {
        let options = [("proto_version", "1".to_string())];
        let advance = |major| Peeks::new("s", Plugin::Pgoutput, major, &options).advance(Lsn(16));
        assert!(advance(11).contains("pg_replication_slot_advance('s', '0/10')"));
        assert!(advance(10).contains("get_binary_changes('s', '0/10', null, variadic array["));
    }
}
