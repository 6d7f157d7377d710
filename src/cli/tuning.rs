//! `[tuning]` of the file: sizes, and a switch for each optimisation.
//!
//! They are for measuring, and for trouble: what is turned off takes the path that is there as a
//! fallback anyway, or that everybody took before. `bench/README.md` has the list with the tests.

use std::time::Duration;

use crate::apply::{Mode, Tuning};
use crate::config::{self, File};
use crate::copy::{Format, Freeze};
use crate::job::Bulk;
use crate::source::BulkOptions;

/// All of it: how changes are applied, tables copied, and backlogs read. Pages are taken as it says
/// from here on.
pub(super) fn take(
    mode: Option<Mode>,
    file: &File,
) -> Result<(Tuning, Bulk, BulkOptions), config::Error> {
    take_small_pages(!file.tuning.huge_pages.unwrap_or(false));
    Ok((apply(mode, file)?, copy(&file.tuning), backlog(&file.tuning)))
}

/// What is said of applying, by `--apply` or in the file.
fn apply(mode: Option<Mode>, file: &File) -> Result<Tuning, config::Error> {
    let mut tuning = Tuning::default();
    let in_file = || {
        let parsed = file.apply.as_deref().map(str::parse).transpose();
        parsed.map_err(|message| config::Error::Value { option: "apply", message })
    };
    tuning.mode = match mode {
        Some(mode) => mode,
        None => in_file()?.unwrap_or_default(),
    };
    let sizes = file.tuning;
    // A size that was asked for does not grow.
    let (limits, most) = (&mut tuning.limits, &mut tuning.limits_max);
    if let Some(bytes) = sizes.batch_bytes {
        (limits.bytes, most.bytes) = (bytes.max(1), bytes.max(1));
    }
    if let Some(transactions) = sizes.batch_transactions {
        (limits.transactions, most.transactions) = (transactions.max(1), transactions.max(1));
    }
    tuning.sessions = sizes.apply_sessions.unwrap_or(tuning.sessions);
    tuning.copy_inserts = sizes.copy_inserts.unwrap_or(tuning.copy_inserts);
    tuning.binary_values = sizes.binary_values.unwrap_or(tuning.binary_values);
    tuning.eager = sizes.eager_batches.unwrap_or(tuning.eager);
    tuning.delete_by_array = sizes.delete_by_array.unwrap_or(tuning.delete_by_array);
    tuning.count_by_server = sizes.count_by_server.unwrap_or(tuning.count_by_server);
    tuning.set_rows = sizes.set_rows.unwrap_or(tuning.set_rows);
    tuning.async_commit = sizes.async_commit.unwrap_or(tuning.async_commit);
    tuning.unnest_in_select = sizes.unnest_in_select.unwrap_or(tuning.unnest_in_select);
    tuning.sort_keys = sizes.sort_keys.unwrap_or(tuning.sort_keys);
    tuning.ask_ahead = sizes.ask_ahead.unwrap_or(tuning.ask_ahead);
    tuning.keep_types = sizes.keep_types.unwrap_or(tuning.keep_types);
    let millis = |given: Option<u64>, default| given.map_or(default, Duration::from_millis);
    tuning.counters_interval = millis(sizes.counters_ms, tuning.counters_interval);
    tuning.position_interval = millis(sizes.positions_ms, tuning.position_interval);
    tuning.flush_after = millis(sizes.flush_ms, tuning.flush_after);
    tuning.in_flight_max = sizes.batches_in_flight.unwrap_or(tuning.in_flight_max).max(1);
    Ok(tuning)
}

/// What `[tuning]` says of the copy.
fn copy(tuning: &config::Tuning) -> Bulk {
    let default = Bulk::default();
    let freeze = match tuning.freeze {
        None => default.freeze,
        Some(true) => Freeze::Whole,
        Some(false) => Freeze::Never,
    };
    let bundle_tables = tuning.bundle_tables.unwrap_or(default.bundle_tables).max(1);
    let keys_beside = tuning.keys_beside.unwrap_or(default.keys_beside);
    let indexes_beside_copy = tuning.indexes_beside_copy.unwrap_or(default.indexes_beside_copy);
    let analyze_beside = tuning.analyze_beside.unwrap_or(default.analyze_beside);
    let memory = tuning.maintenance_work_mem.map(|megabytes| megabytes.saturating_mul(1 << 20));
    let maintenance_work_mem = memory.unwrap_or(default.maintenance_work_mem);
    let part_bytes = tuning.part_bytes.unwrap_or(default.part_bytes);
    let format = match tuning.binary_copy {
        Some(false) => Format::Text,
        _ => default.format,
    };
    Bulk {
        bundle_tables,
        freeze,
        keys_beside,
        indexes_beside_copy,
        analyze_beside,
        part_bytes,
        format,
        maintenance_work_mem,
    }
}

/// What `[tuning]` says of reading in bulk.
fn backlog(tuning: &config::Tuning) -> BulkOptions {
    let default = BulkOptions::default();
    let unless_zero =
        |said: Option<u64>, default: Option<u64>| said.or(default).filter(|bytes| *bytes > 0);
    BulkOptions {
        least_bytes: unless_zero(tuning.bulk_bytes, default.least_bytes),
        ahead: tuning.bulk_ahead.unwrap_or(default.ahead),
        transaction_bytes: tuning.bulk_transaction_bytes.unwrap_or(default.transaction_bytes),
        message_bytes: unless_zero(tuning.bulk_message_bytes, default.message_bytes),
        messages: tuning.chunk_messages.map(|count| count.clamp(1, i32::MAX as u32)),
    }
}

/// Memory in pages of 4 kB, or in whatever the kernel gives. A backlog takes 200 MB within a second
/// or two, and of huge pages each has to be zeroed, and often made by moving others, first: up to a
/// third of the time to catch up, where small ones cost a tenth of a second. What is started from
/// here (pg_dump, hooks) inherits it. To be called before much memory is taken, and again where the
/// file says otherwise.
///
/// <https://man7.org/linux/man-pages/man2/pr_set_thp_disable.2const.html>
pub fn take_small_pages(small: bool) {
    #[cfg(target_os = "linux")]
    // A kernel without huge pages has nothing to turn off.
    let _ = rustix::thread::disable_transparent_huge_pages(small);
    #[cfg(not(target_os = "linux"))]
    let _ = small;
}
