//! The one choreography, forward (cutover) and backward (rollback).
//!
//! Why it exists: every tool that lost data at the switch took the position before writers had
//! stopped, let a transaction live across the switch, or could not go back. So the order is fixed,
//! every step is journalled before it is done, and each has an undo until the one point of no
//! return.
//!
//! 1. *gates*: routes can be reached; a probe committed on the live side arrives within max-lag;
//!    the way back is proven by a canary row there and back (`canary`).
//! 2. *hold*: routes that can (pgbouncer) hold their clients; *fence*: writers are stopped on the
//!    live side (`fence`). Both within lock-timeout, else let go, pause, and try again: an open
//!    transaction delays the cutover, never the application.
//! 3. *barrier*: the end of WAL, read after the fence holds (vitess#16563). *drain*: the other side
//!    has applied up to it. What need not wait for that is done beside it (`held`).
//! 4. *rest*: what no stream carries, large objects by difference and unlogged tables (`rest`).
//!    *rules*: where a role may not set session_replication_role, what acts on written rows comes
//!    back on the side that becomes live (`rules`). *sequences*: set past every value handed out
//!    (`sequences`).
//! 5. *seal*: the fence is made to outlive our session, so that stragglers that were connected
//!    before cannot write to the old side afterwards (vitess#9453). The new side's own seal, if it
//!    had one from an earlier flip, is opened.
//! 6. *switch*: routes flip; those that hold clients first, hooks last.
//! 7. **The point of no return**: the new phase is committed in the home database.
//! 8. *release*: routes let clients through.
//!
//! What survives a crash: before 5, the fence is a transaction of our session and vanishes with it;
//! held clients are released by `undo`. From 5 to 7, `undo` opens the seal and flips routes back.
//! After 7, `release` is repeated. The journal says which; the job room asks for one or the other.
//!
//! Left out: killing transactions that hold the fence up. The application's work is not ours to
//! end.

pub mod barrier;
pub mod canary;
pub mod choreography;
mod database;
pub mod error;
pub mod fence;
mod held;
pub mod joint;
pub mod limits;
mod rest;
mod rules;
pub mod seal;
pub mod sequences;
pub mod undo;

pub use choreography::{Journal, Outcome, Plan, Step, run};
pub use error::Error;
pub use fence::FenceKind;
pub use joint::{Joint, JointJournal, Leaving, run_joint, undo_joint};
pub use limits::Limits;
pub use rest::{Large, Rest};
pub use rules::Rules;
pub use seal::Sealing;
pub use undo::{release, seal_other, undo};

/// Result with this room's error.
pub type Result<T> = std::result::Result<T, Error>;
