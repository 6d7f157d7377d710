//! Sizes, and what makes applying fast, each with a value that turns it off.

use std::time::Duration;

use super::growth::Limits;
use crate::limit;

/// In which order a batch is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// One statement a change, in the order of the stream.
    Rows,
    /// The net change as sets, however small the batch.
    Sets,
    /// Sets where there is enough for them.
    #[default]
    Auto,
}

impl std::str::FromStr for Mode {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Mode, String> {
        match text {
            "row" => Ok(Mode::Rows),
            "set" => Ok(Mode::Sets),
            "auto" => Ok(Mode::Auto),
            other => Err(format!("\"{other}\" is not an order of applying: use row, set or auto")),
        }
    }
}

/// What may be turned off or sized, for measuring and in trouble; the defaults are for everybody.
#[derive(Clone, Copy, Debug)]
pub struct Tuning {
    /// In which order a batch is written.
    pub mode: Mode,
    /// Bounds of a batch at first, and at least.
    pub limits: Limits,
    /// How far they may grow while the target is quick with full batches; not at all where this is
    /// no more than `limits`.
    pub limits_max: Limits,
    /// How many batches may be on their way to the target at once; at least 1. The second is made
    /// and sent while the server works on the first.
    pub in_flight_max: usize,
    /// How many sessions write at once under a backlog: 1 or 2. With two, what of a batch nobody
    /// before it writes is begun in the one while the other works on the batch before.
    pub sessions: usize,
    /// Sets of new rows go in by COPY, where the target's table takes one.
    pub copy_inserts: bool,
    /// Values of sets travel in their binary form, where they have one.
    pub binary_values: bool,
    /// A small batch is sent behind another that is under way, not only a full one.
    pub eager: bool,
    /// Rows of a set that go by one unique column are looked up by the array of its values, not by
    /// a join.
    pub delete_by_array: bool,
    /// Rows that went by such an array are counted by the server's statistics of the transaction,
    /// not by giving back each of them. Where the server keeps none, they are given back.
    pub count_by_server: bool,
    /// Of a set so many rows, and a megabyte of them, go to the target in one execution; 0 for all.
    pub set_rows: usize,
    /// For how long counts may wait beside progress before they are entered in their table; zero
    /// writes that with every batch.
    pub counters_interval: Duration,
    /// How often the target is asked where its log stands; zero asks with every batch.
    pub position_interval: Duration,
    /// With nothing to do for so long after a batch, the target is made to flush its log; zero has
    /// it flush as soon as there is nothing to do.
    pub flush_after: Duration,
    /// Commits do not wait for the target's disk, of which is asked apart. Without it they wait for
    /// what the target waits for by itself.
    pub async_commit: bool,
    /// Arrays are taken apart in a list of columns where that will do, not in FROM.
    pub unnest_in_select: bool,
    /// Rows of a set that are there already are written in the order of their keys, and not of
    /// their first mention.
    pub sort_keys: bool,
    /// The target is asked about several tables at once, and before their changes wait for it.
    pub ask_ahead: bool,
    /// What the target says of its own types is asked once, and not for each table.
    pub keep_types: bool,
}

impl Default for Tuning {
    fn default() -> Self {
        Tuning {
            mode: Mode::default(),
            limits: Limits::default(),
            limits_max: Limits {
                bytes: limit::BATCH_BYTES_MAX,
                transactions: limit::BATCH_TRANSACTIONS_MAX,
            },
            in_flight_max: limit::BATCHES_IN_FLIGHT,
            sessions: limit::APPLY_SESSIONS,
            copy_inserts: true,
            binary_values: true,
            eager: true,
            delete_by_array: true,
            count_by_server: true,
            set_rows: limit::SET_ROWS,
            counters_interval: limit::COUNTERS_INTERVAL,
            position_interval: limit::POSITION_INTERVAL,
            flush_after: limit::FLUSH_AFTER,
            async_commit: true,
            unnest_in_select: true,
            sort_keys: true,
            ask_ahead: true,
            keep_types: true,
        }
    }
}
