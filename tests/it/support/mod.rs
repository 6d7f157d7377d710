//! What every test stands on.
#![allow(dead_code, unused_imports, reason = "each test uses what it needs")]

mod binary;
pub mod citus;
mod inventory;
pub mod job;
pub mod walk;

use std::time::{Duration, Instant};

use walferry::demo::server::Server;
use walferry::pg::{Config, Purpose, Session};

pub use binary::{Ended, Walferry};
pub use inventory::Inventory;

/// A fresh server of the default version.
pub fn server() -> Server {
    Server::start(&Server::default_bin().unwrap(), &[]).unwrap()
}

/// A session of the superuser.
pub async fn session(server: &Server, dbname: &str) -> Session {
    session_as(server, "postgres", dbname).await
}

/// A session of any role.
pub async fn session_as(server: &Server, role: &str, dbname: &str) -> Session {
    let config = Config::parse(&server.uri_as(role, dbname)).unwrap();
    Session::connect(&config, Purpose::Sql).await.unwrap()
}

/// Returns as soon as `condition` gives true; panics with `what` if it has not after 30 seconds.
pub async fn until<F: Future<Output = bool>>(what: &str, condition: impl FnMut() -> F) {
    until_within(Duration::from_secs(30), what, condition).await;
}

/// The same with a limit of one's own.
pub async fn until_within<F: Future<Output = bool>>(
    limit: Duration,
    what: &str,
    mut condition: impl FnMut() -> F,
) {
    let begun = Instant::now();
    while !condition().await {
        assert!(begun.elapsed() < limit, "not within {limit:?}: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Returns as soon as the query's first column is `t`.
pub async fn until_sql(session: &mut Session, sql: &str) {
    let begun = Instant::now();
    while session.query(sql).await.unwrap()[0].opt(0).unwrap() != Some("t") {
        assert!(begun.elapsed() < Duration::from_secs(30), "not within 30 s: {sql}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
