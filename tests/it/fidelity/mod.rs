//! Whatever a table can hold or be arrives as it was: by copy, by insert, update and delete in the
//! stream, there and back, between versions.

use walferry::demo::binaries;
use walferry::demo::server::Server;

use crate::stories::{Story, alone, servers, told};
use crate::support::session;

mod identity;
mod large;
mod objects;
mod rest;
mod tables;
mod types;
mod values;
