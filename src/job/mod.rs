//! The job: what walferry does from `run` to `finish`, across crashes and hosts.
//!
//! Why it exists: rooms below do one thing each and know nothing of each other. This room wires
//! them, keeps the job's state in the home database (the target), and sees to it that exactly one
//! process runs it.
//!
//! - `state`: the pure step function. `store`, `ddl`, `options`: its tables. `lease`: one runner at
//!   a time.
//! - `admit`: who may run it. `place`: where changes wait. `run`: the runner, a loop of step and
//!   execute. `prepare`: check, publication, slot, tables. `copying`: rows, then
//!   indexes and constraints; `building`: those, also beside rows; `analyzing`: what the planner is
//!   told. `streams`: starting and stopping them. `pipeline`: one stream, kept going;
//!   `spooling`: one through a spool. `attend`: what a runner does while it follows: commands,
//!   `positions`. `vigil`: the lease, and servers that fall silent. `flip`: arming the way back,
//!   and the choreography; `request`: as it is asked for; `journal`: its journal.
//!   `routes`: its routes, and those that are gone.
//!   `reads`: clients that only read, led before the writes. `groups`: tables switched group by
//!   group; `owners`: which side each is on. `sealing`: whether the side that was left is still
//!   shut.
//!   `cleanup`: finish and cancel; `recycle`: where the old side's tables go; `remains`: cleaning
//!   one side where the other is gone.
//! - `ability`: what the roles may do, and so how each side is written. `alone`: tables without the
//!   rest of their database. `reading`: how each side is read; `published`: by which publication of
//!   others. `heartbeat`: lag while nobody writes. `validating`: foreign keys that came back at a
//!   switch. `rest`: what no stream carries. `left`: what is left behind at a flip.
//! - `altering`: tables that are altered meanwhile; `silent`: what of that no stream shows.
//!   `quarantine`: what is kept aside, and what becomes of it. `nudging`: WAL that is let go.
//! - `brought`: a target that is a copy of somebody else's; `reserve`: what is made before it, and
//!   `seam`: where it stands.
//! - `decoding`: the source read from a standby of it.
//! - `two_way`: both sides written at once; `noting`: triggers for it. `failover`: a source, or a
//!   target, whose standby took over; `standbys`: slots that are kept there for it,
//!   `standby_status`: how those are. `gone`: what is said of runners and servers that are.
//! - `client`: commands from other processes; `ask`: the same, with a runner of one's own where
//!   none is alive; `ending`: finish and cancel, whoever runs the job. `align`: both sides held at
//!   one point; `comparing`: and compared there. `status`: what people and scripts see.
//! - `cluster`: jobs of many tasks, each of which is an ordinary job of this room. `reshard`: N
//!   sources to M targets, each pair an ordinary job.
//!
//! What survives a crash: everything that is in a table, and what a spool has synced; without one
//! there are no local files. A runner that dies is replaced by any other; each phase begins by
//! looking at what is there.

pub mod ability;
mod admit;
pub mod align;
mod alone;
mod altering;
mod analyzing;
pub mod ask;
mod attend;
mod brought;
mod building;
pub mod capturing;
pub mod check;
pub mod cleanup;
pub mod client;
pub mod cluster;
pub mod comparing;
pub mod config;
mod copying;
mod ddl;
mod decoding;
pub mod ending;
pub mod error;
pub mod failover;
mod faults;
mod flip;
mod gone;
pub mod groups;
pub mod heartbeat;
mod joining;
mod journal;
pub mod lease;
mod left;
mod mapped;
mod newcomers;
mod noting;
mod nudging;
pub mod opening;
mod options;
pub mod owners;
pub mod pipeline;
pub mod place;
mod positions;
mod prepare;
mod probes;
mod published;
pub mod quarantine;
pub mod reading;
pub mod reads;
pub mod recycle;
pub mod remains;
mod request;
pub mod reserve;
pub mod reshard;
pub mod rest;
pub mod routes;
pub mod run;
mod sealing;
mod seam;
mod silent;
mod spooling;
pub mod standby_status;
pub mod standbys;
pub mod state;
pub mod status;
pub mod store;
mod streams;
mod two_way;
mod validating;
mod vigil;

pub use config::JobConfig;
pub use copying::Bulk;
pub use error::Error;
pub use flip::FlipRequest;
pub use gone::Gone;
pub use run::{Notice, Runner, Until};
pub use seam::Seam;
pub use state::Phase;

/// Result with this room's error.
pub type Result<T> = std::result::Result<T, Error>;
