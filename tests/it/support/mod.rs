//! What every test stands on.

use walferry::demo::server::Server;
use walferry::pg::{Config, Purpose, Session};

/// A fresh server of the default version.
pub fn server() -> Server {
    Server::start(&Server::default_bin().unwrap(), &[]).unwrap()
}

/// A session of the superuser.
pub async fn session(server: &Server, dbname: &str) -> Session {
    let config = Config::parse(&server.uri(dbname)).unwrap();
    Session::connect(&config, Purpose::Sql).await.unwrap()
}
