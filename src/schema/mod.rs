//! The schema: read from the source by pg_dump, made on the target in two halves.
//!
//! pg_dump knows every kind of object of every version and the order they depend on each other in;
//! nothing here tries to know that again. What it writes is cut into statements, and only their
//! order and company is decided here.
//!
//! 1. `dump`: the lowest pg_dump that can read the source writes pre-data (types, functions,
//!    tables, defaults) and post-data (indexes, constraints, triggers), both under one exported
//!    snapshot. The caller keeps the two texts, so that a later run goes on with the same ones.
//! 2. `apply_pre`: all of pre-data in one transaction, in one round trip. It is all there or
//!    nothing is.
//! 3. The rows are copied, by others, into tables without indexes, keys and triggers.
//! 4. `apply_post` with [`PostPhase::Indexes`]: indexes and their constraints, in parallel, largest
//!    table first, those of small tables many to a transaction; then indexes of partitions are
//!    attached, replica identities set. It may begin while step 3 is under way, with the tables
//!    that are copied ([`Beside`]).
//! 5. `apply_post` with [`PostPhase::Rest`]: foreign keys, triggers, rules, policies, materialized
//!    views filled, event triggers last.
//! 6. `refresh` (materialized views) and `set_sequences` at the cutover.
//!
//! Where the role may not keep triggers and foreign keys from acting on applied rows, step 5 leaves
//! them out and `aside` makes them in the cutover.
//!
//! After a crash: every statement of post-data commits together with its row of
//! `walferry.schema_step`, and pre-data as a whole with another, so a run begun again leaves out
//! exactly what is done. An index half built is gone with its transaction.
//!
//! Timeline: run 1 builds 7 of 9 indexes and is killed in two. The server rolls both back. Run 2
//! reads 7 rows, builds 2 indexes, attaches, and answers.
//!
//! Left out: tablespaces unless asked for, roles (they are not of one database; missing ones are
//! named before anything is done), publications and subscriptions, changes of the schema while the
//! job runs beyond what `altered` can tell from the stream, indexes built CONCURRENTLY (nobody else
//! works on the target yet).
//!
//! - `lex`, `script`, `plan`, `pack`: pure; tokens, statements, order, company. `altered`: what
//!   became of a table that is followed, pure too. `captured`: DDL by an event trigger.
//!   `silent`: what no stream shows. `joining`: tables that are new.
//! - `depend`: views of the source.
//! - `dump`, `pre`, `post`, `aside`, `sequence`: the steps above. - `error`: what can go wrong.

pub mod altered;
pub mod aside;
pub mod captured;
pub mod depend;
pub mod dump;
pub mod error;
pub mod joining;
pub mod lex;
pub mod older;
pub mod pack;
pub mod plan;
pub mod policy;
pub mod post;
pub mod pre;
pub mod refresh;
pub mod script;
pub mod sequence;
pub mod silent;

pub use aside::{
    ASIDE_DDL, Acting, building_acting, restore, restoring, set_aside, setting_aside, together,
    validate,
};
pub use dump::{Dump, Options, dump, pg_dump_versions};
pub use error::Error;
pub use older::{Fitted, TooNew, fit};
pub use plan::PostPhase;
pub use post::{Beside, Copied, PostOptions, PostProgress, apply_post};
pub use pre::{apply_pre, drop_made, is_made};
pub use refresh::{Unrefreshed, materialized, refresh};
pub use sequence::set_sequences;

/// Result with this room's error.
pub type Result<T> = std::result::Result<T, Error>;

/// This room's tables in the home database; schema `walferry` has to exist. May be run again.
pub const DDL: &str = "create table if not exists walferry.schema_step (\
     job text not null, id text not null, \
     done_at timestamptz not null default pg_catalog.clock_timestamp(), \
     primary key (job, id)); \
     create table if not exists walferry.source_object (\
     job text, key text, definition text not null, primary key (job, key)); \
     create table if not exists walferry.awaited (\
     job text, key text, sql text not null, primary key (job, key))";
