//! Tests of the wire against real servers, and against false ones where a real server is too good.

mod connect;
mod session;
mod standby;
mod tls;

use std::io::{Read, Write};
use std::net::TcpListener;

use walferry::demo::server::Server;
use walferry::pg::{Config, Error, Purpose, Session};

use crate::support;

/// A connection string read without this process's environment.
fn config(text: &str) -> Config {
    Config::parse_with(text, &|_| None).unwrap()
}

async fn connect(text: &str) -> Result<Session, Error> {
    Session::connect(&config(text), Purpose::Sql).await
}

async fn refusal(text: &str) -> Error {
    connect(text).await.map(|_| ()).unwrap_err()
}

/// Puts `lines` before the server's own pg_hba.conf and has it read.
fn set_hba(server: &Server, lines: &str) {
    let path = server.data_dir().join("pg_hba.conf");
    std::fs::write(&path, format!("{lines}\nlocal all all trust\nhost all postgres all trust\n"))
        .unwrap();
    assert_eq!(server.psql("postgres", "select pg_reload_conf()").unwrap(), "t");
    let sql = "select count(*) from pg_hba_file_rules where error is not null";
    assert_eq!(server.psql("postgres", sql).unwrap(), "0", "pg_hba.conf");
}

/// A port that takes one connection after the other, reads what comes, and says `answer`.
fn false_server(answer: Vec<u8>) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let mut stream = stream;
            let _ = stream.read(&mut [0; 1024]);
            let _ = stream.write_all(&answer);
        }
    });
    port
}

/// An ErrorResponse of severity FATAL.
fn fatal(code: &str, message: &str) -> Vec<u8> {
    let body = format!("SFATAL\0VFATAL\0C{code}\0M{message}\0\0");
    let mut bytes = vec![b'E'];
    bytes.extend_from_slice(&(body.len() as u32 + 4).to_be_bytes());
    bytes.extend_from_slice(body.as_bytes());
    bytes
}
