//! One test binary: every part against real PostgreSQL servers.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod apply;
mod catalog;
mod check;
mod copy;
mod decode;
mod job;
mod pg;
mod pooler;
mod route;
mod schema;
mod source;
mod support;
mod support_works;
mod verify;
