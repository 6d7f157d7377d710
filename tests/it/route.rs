//! Routes against a real pgbouncer between two servers, real foreign servers, and real commands.

mod hook;
mod pgbouncer;
pub mod sqlmed;

use walferry::id::Stream;
use walferry::pg::Config;
use walferry::route::Context;

use crate::support;

fn context(flip: Stream, source: &str, target: &str) -> Context {
    let config = |text| Config::parse_with(text, &|_| None).unwrap();
    Context {
        job: "shop".parse().unwrap(),
        flip,
        source: config(source),
        target: config(target),
        scope: "none".to_string(),
        tables: Vec::new(),
        reads: false,
        is_group: false,
    }
}
