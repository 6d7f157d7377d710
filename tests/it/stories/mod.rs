//! Failure stories of other tools, each told again under its tool's name and the number of its
//! report: through the built binary and two servers, to a comparison row by row.
//!
//! A story has a database and a job of its own on a pair of servers that all of them share, so it
//! fails alone. What it writes while nobody reads comes over in one batch, what it writes while the
//! run lives comes in batches as they fall.

use std::collections::HashMap;
use std::sync::{Mutex, OnceLock};

use walferry::demo::compare::compare;
use walferry::demo::server::Server;

use crate::support::{Ended, Walferry, session};

mod keys;
mod names;
mod rights;
mod slots;
mod stream;
mod tables;
mod toast;
mod values;

/// Every job takes a slot or two, and stories run beside each other.
const ROOM: &[&str] =
    &["max_replication_slots = 200", "max_wal_senders = 200", "max_connections = 300"];

/// The servers of all stories of these major versions. They go with the process: their guards see
/// to it.
pub fn servers(source_major: u32, target_major: u32) -> (&'static Server, &'static Server) {
    static RUNNING: OnceLock<Mutex<HashMap<(u32, bool), &'static Server>>> = OnceLock::new();
    let mut running = RUNNING.get_or_init(Mutex::default).lock().unwrap();
    let mut of = |major, is_source| -> &'static Server {
        running.entry((major, is_source)).or_insert_with(|| {
            let bin = Server::bin_of(major).unwrap();
            Box::leak(Box::new(Server::start(&bin, ROOM).unwrap()))
        })
    };
    (of(source_major, true), of(target_major, false))
}

/// Servers that no other story uses, of these major versions.
pub fn alone(majors: (u32, u32)) -> (&'static Server, &'static Server) {
    let start = |major| -> &'static Server {
        Box::leak(Box::new(Server::start(&Server::bin_of(major).unwrap(), ROOM).unwrap()))
    };
    (start(majors.0), start(majors.1))
}

/// One story: a database on both sides, and a job between them.
pub struct Story {
    pub source: &'static Server,
    pub target: &'static Server,
    pub name: String,
    role: &'static str,
    /// The last mark written; the target has everything once it has that.
    mark: std::cell::Cell<i32>,
}

impl Story {
    /// Databases made by the same statement on both sides, and these tables on the source.
    pub fn of(name: &str, schema: &str) -> Story {
        Story::made(name, "", schema)
    }

    /// The same with options of CREATE DATABASE.
    pub fn made(name: &str, options: &str, schema: &str) -> Story {
        Story::between(servers(15, 15), name, options, schema)
    }

    /// The same between servers of one's own.
    pub fn between(
        (source, target): (&'static Server, &'static Server),
        name: &str,
        options: &str,
        schema: &str,
    ) -> Story {
        for server in [source, target] {
            server.psql("postgres", &format!("create database {name} {options}")).unwrap();
        }
        let story = Story::there((source, target), name);
        story.source("create table mark (n int primary key)");
        story.source(schema);
        story
    }

    /// Of databases that are there already; the source needs a table `mark (n int primary key)`.
    pub fn there((source, target): (&'static Server, &'static Server), name: &str) -> Story {
        let mark = std::cell::Cell::new(0);
        Story { source, target, name: name.to_string(), role: "postgres", mark }
    }

    /// The tables are there, their rows are over, and no runner lives.
    pub async fn copied(name: &str, schema: &str) -> Story {
        let story = Story::of(name, schema);
        story.done(&["run", "--until", "following"]).await;
        story
    }

    pub fn source(&self, sql: &str) -> String {
        self.source.psql(&self.name, sql).unwrap_or_else(|e| panic!("{}: {e}", self.name))
    }

    pub fn target(&self, sql: &str) -> String {
        self.target.psql(&self.name, sql).unwrap_or_else(|e| panic!("{}: {e}", self.name))
    }

    pub fn uris(&self) -> (String, String) {
        let of = |server: &Server| server.uri_as(self.role, &self.name);
        (of(self.source), of(self.target))
    }

    pub fn spawn(&self, arguments: &[&str]) -> Walferry {
        let (source, target) = self.uris();
        let environment = [
            ("WALFERRY_SOURCE", &*source),
            ("WALFERRY_TARGET", &*target),
            ("WALFERRY_NAME", &*self.name),
        ];
        Walferry::spawn_with(arguments, &environment)
    }

    pub async fn done(&self, arguments: &[&str]) -> Ended {
        self.spawn(arguments).ended().await.expect_success()
    }

    /// Waits until the target has all that the source has committed by now.
    pub async fn arrived(&self, run: &mut Walferry) {
        self.mark.set(self.mark.get() + 1);
        let mark = self.mark.get();
        self.source(&format!("insert into public.mark values ({mark})"));
        let mut target = session(self.target, &self.name).await;
        let sql = format!("select n = {mark} from public.mark order by n desc limit 1");
        for _ in 0..3000 {
            let rows = target.query(&sql).await.unwrap();
            if rows.first().is_some_and(|row| row.opt(0).unwrap() == Some("t")) {
                return;
            }
            assert!(!run.has_ended(), "{}: the run ended:\n{}", self.name, run.so_far());
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        panic!("{}: not over after 30 s:\n{}", self.name, run.so_far());
    }

    /// Lets a runner carry over what was written while none lived, writes `live` while it does, and
    /// wants the same rows on both sides.
    pub async fn follows(&self, live: &str) {
        let mut run = self.spawn(&["run"]);
        self.arrived(&mut run).await;
        self.same().await;
        if !live.is_empty() {
            self.source(live);
            self.arrived(&mut run).await;
            self.same().await;
        }
        run.signal("INT");
        run.ended().await.expect_success();
    }

    /// The same rows on both sides, whatever sequences say: those are set at the cutover.
    pub async fn same(&self) {
        let uris = (self.source.uri(&self.name), self.target.uri(&self.name));
        let found = compare(&uris.0, &uris.1).await.unwrap();
        let rows = found.differences.iter().filter(|line| !line.starts_with("sequence "));
        assert_eq!(rows.collect::<Vec<_>>(), Vec::<&String>::new(), "{}", self.name);
        assert!(found.tables.len() > 1, "{}: nothing was compared", self.name);
    }
}

/// The whole of most stories: tables, what is written at once, what is written while following.
pub async fn told(name: &str, schema: &str, at_once: &str, live: &str) {
    let story = Story::copied(name, schema).await;
    story.source(at_once);
    story.follows(live).await;
}
