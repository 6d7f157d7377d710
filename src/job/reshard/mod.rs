//! N to M: rows of several sources are shared out among several targets by a column of each table.
//!
//! Each source and target are a *pair*, and a pair is an ordinary job: own slot, own copy, own
//! progress in the target's transactions, so exactly once by what holds for any job. Its map has a
//! slice for each table (`map::Slice`): the rows that go to this target. What an UPDATE moves from
//! one target to another is a delete in one pair and an insert in the other, each in its place
//! among the source's commits. Tables named in `reference` go from the first source to every target
//! whole.
//!
//! What is in common is done here: the tables are made on every target before the pairs begin
//! (`tables`), all pairs are run in one process (`pairs`, `run`), and one cutover leads all of them
//! over (`flip`, by `cutover::joint`).
//!
//! # What is stored, and what survives a crash
//! A row of `walferry.reshard` in the home database, the first target's: which sources, targets and
//! tables, and the stage. The pairs' own rows are on their targets.
//! ```text
//! running ──▶ cutting_over ──▶ switched     pairs stay in phase following until the last
//!    ▲             │ undone
//!    └─────────────┘
//! ```
//! `cutting_over` is stored before any fence; whoever finds it opens all sources again. `switched`
//! is the point of no return; whoever finds it sets every pair to phase `switched` and lets clients
//! through. Commands reach the runner through the same row, and drive the pairs where there is
//! none.
//!
//! # What several writers of one table mean
//! A pair never empties a table: each is copied in one transaction, which brings all of its slice
//! or nothing. TRUNCATE on a source stops the job, as it would take other sources' rows. Nor is a
//! table read again after a failover of its source: which rows came from where, nobody can tell.
//!
//! Left out: a way back; decoding a source once for all targets, which now costs one walsender for
//! each; partitioned tables.

mod checks;
mod end;
mod error;
mod flip;
mod layout;
mod pairs;
mod run;
mod status;
mod store;
mod tables;
mod verify;

pub use checks::check;
pub use end::{Ended, cancel, finish};
pub use error::Error;
pub use flip::Wanted;
pub use layout::{Reshard, Table};
pub use run::{Tell, Until, lead_over, run};
pub use status::{PairStatus, Status, status};
pub use store::Stage;
pub use verify::verify;
