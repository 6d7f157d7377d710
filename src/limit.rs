//! Every bound of the program, with the reason for its number (law 9).

use std::time::Duration;

/// Decoded changes waiting for the target, in bytes. When full, reading from the source pauses
/// (feedback goes on) and WAL stays on the source. 8 MiB is some 50k small rows: what is read while
/// the applier puts a batch together. The largest batch gathers there, not here; with four times as
/// much nothing became faster.
pub const BUFFER_BYTES: usize = 8 << 20;

/// A transaction is handed on in chunks of at most about this many bytes, so that one of any size
/// passes through fixed memory. 1 MiB keeps per-chunk costs under a percent.
pub const CHUNK_BYTES: usize = 1 << 20;

/// The same bound in changes: many tiny changes cost more in bookkeeping than in bytes.
pub const CHUNK_CHANGES: usize = 8192;

/// A batch closes at this many bytes of changes; whole transactions only, so one larger
/// transaction still makes one batch.
pub const BATCH_BYTES: usize = 4 << 20;

/// A batch closes at this many source transactions, so that one failure repeats little work.
pub const BATCH_TRANSACTIONS: usize = 1000;

/// Bounds of a batch once it has grown under a backlog. A target's page that is written in several
/// batches is cleaned up in between: with 2 MiB a target took a fifth longer for a backlog, with 4
/// a tenth; 32 took as long as 8, three times the memory, and waited longer for their first bytes.
pub const BATCH_BYTES_MAX: usize = 8 << 20;

/// The same in source transactions.
pub const BATCH_TRANSACTIONS_MAX: usize = 64_000;

/// A transaction larger than a batch is written in parts of this many bytes: nothing is gained by
/// larger ones, and memory stays small.
pub const PART_BYTES: usize = 4 << 20;

/// Rows of a set that are written by one execution of its statement. More take the server longer
/// each, as they outgrow its processor's memory; fewer pay for starting it.
pub const SET_ROWS: usize = 8192;

/// For so long what is counted of a stream may wait in the row of progress; a small batch would
/// take twice as long with a statement for its counts.
pub const COUNTERS_INTERVAL: Duration = Duration::from_secs(1);

/// The target is asked no more often than this where its log stands: its WAL writer flushes every
/// 200 ms.
pub const POSITION_INTERVAL: Duration = Duration::from_millis(10);

/// With nothing to do for so long after a batch, the target is made to flush its log, so that the
/// slot may be told. Not at once, as the next transaction would wait for that; and while batches
/// come they ask how far the target's WAL writer is, which flushes every 200 ms.
pub const FLUSH_AFTER: Duration = Duration::from_millis(20);

/// Batches on their way to the target at once: one that the server works on, and one behind it, so
/// that neither side waits for the other. More would only be memory.
pub const BATCHES_IN_FLIGHT: usize = 2;

/// Sessions that write to a target at once under a backlog.
pub const APPLY_SESSIONS: usize = 2;

/// The largest protocol message taken from a server: PostgreSQL's own limit of 1 GiB a field, and
/// some room for the frame.
pub const MESSAGE_BYTES: usize = (1 << 30) + (1 << 20);

/// A backlog of so many bytes of log is worth a slot of its own, by which it is read in bulk;
/// below, a stream is through before that is made.
pub const BULK_BYTES: u64 = 16 << 20;

/// A transaction of so many bytes of log is read in bulk, if it has committed. What comes of it is
/// about as much again on the source's disk, beside what decoding puts there in any case.
pub const BULK_TRANSACTION_BYTES: u64 = 2 << 30;

/// A backlog whose messages are larger on average is streamed: what a walsender spends on each is
/// then less than what a chunk costs, whose bytes are put by before the first of them is sent.
pub const BULK_MESSAGE_BYTES: u64 = 512;

/// How often the slot is told how far we are, at least. A third of the smallest sensible
/// wal_sender_timeout (the default is 60 s), and often enough that retained WAL stays small.
pub const FEEDBACK_INTERVAL: Duration = Duration::from_secs(1);

/// A source that said nothing for so long is asked for a sign of life; silent for twice as long,
/// the connection is given up and made again (Trendyol/go-pq-cdc#20).
pub const SILENCE: Duration = Duration::from_secs(10);

/// Data sent to a peer that is not acknowledged for so long means the network is gone.
pub const TCP_USER_TIMEOUT: Duration = Duration::from_secs(20);

/// A connection attempt takes no longer than this unless connect_timeout says so.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// A statement of the control plane (the job's tables, positions, catalogs of one object) that has
/// no answer by then has a server that hangs. They take milliseconds; a commit may wait for a
/// standby, and a checkpoint for a slow disk.
pub const CONTROL_WAIT: Duration = Duration::from_secs(30);

/// The same for what looks at whole catalogs and sizes of all tables, as `check` does.
pub const CATALOG_WAIT: Duration = Duration::from_secs(600);

/// A pooler's console answers from memory.
pub const CONSOLE_WAIT: Duration = Duration::from_secs(10);
