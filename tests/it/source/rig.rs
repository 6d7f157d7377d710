//! A server with a table, a publication and a slot; a reader on it; a proxy that stalls.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use walferry::buffer::memory::{self, Receiver};
use walferry::change::{Change, Chunk, Item, Relation};
use walferry::demo::server::Server;
use walferry::id::QualifiedName;
use walferry::lsn::Lsn;
use walferry::pg::{Config, Purpose, Session, SlotKind};
use walferry::source::{
    self, Blocker, CreateOptions, End, HeldSlot, Positions, Recorded, StreamOptions, Transport,
    publication, slot,
};

pub const SLOT: &str = "walferry_shop_forward";

/// A test that waits longer than this for something has failed.
pub const PATIENCE: Duration = Duration::from_secs(30);

pub async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(PATIENCE, future).await {
        Ok(value) => value,
        Err(_) => panic!("waited in vain for {what}"),
    }
}

pub fn names(list: &[&str]) -> Vec<QualifiedName> {
    list.iter().map(|name| QualifiedName::new("public", *name)).collect()
}

pub struct Rig {
    pub server: Server,
    pub config: Config,
    pub sql: Session,
    pub recorded: Recorded,
    pub start_lsn: Lsn,
}

impl Rig {
    /// Runs `ddl`, publishes `tables`, makes the slot.
    pub async fn new(settings: &[&str], ddl: &str, tables: &[&str]) -> Rig {
        let server = Server::start(&Server::default_bin().unwrap(), settings).unwrap();
        Rig::on(server, ddl, tables).await
    }

    /// The same on a server that runs.
    pub async fn on(server: Server, ddl: &str, tables: &[&str]) -> Rig {
        let config = Config::parse(&server.uri("postgres")).unwrap().labelled("source");
        let mut sql = Session::connect(&config, Purpose::Sql).await.unwrap();
        sql.execute(ddl).await.unwrap();
        sql.execute("create table public.mark (x int)").await.unwrap();
        let tables = [tables, &["mark"]].concat();
        publication::ensure(&mut sql, SLOT, &names(&tables)).await.unwrap();
        let mut held = make_slot(&config, &mut sql, SLOT).await.release();
        let system = source::identify(&mut held).await.unwrap();
        let status = slot::status(&mut sql, SLOT).await.unwrap().unwrap();
        Rig {
            server,
            config,
            sql,
            recorded: Recorded {
                system_identifier: system.system_identifier,
                timeline: system.timeline,
                database: "postgres".to_string(),
                plugin: "pgoutput".to_string(),
            },
            start_lsn: status.confirmed_flush_lsn.unwrap(),
        }
    }

    pub fn options(&self) -> StreamOptions {
        StreamOptions::new(SLOT, SLOT, self.start_lsn, self.recorded.clone())
    }

    pub async fn follow(&self, buffer_bytes: usize) -> Reader {
        Reader::start(&self.config, self.options(), buffer_bytes).await
    }

    /// Writes a row that [`Reader::until_mark`] waits for.
    pub async fn mark(&mut self) {
        self.sql.execute("insert into public.mark values (1)").await.unwrap();
    }

    /// One value as text, asked again until it is what is wanted.
    pub async fn wait_for(&mut self, sql: &str, wanted: &str) {
        let mut last = String::new();
        for _ in 0..1500 {
            let rows = self.sql.query(sql).await.unwrap();
            last = rows.first().and_then(|r| r.opt(0).unwrap()).unwrap_or("NULL").to_string();
            if last == wanted {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("{sql}: {last} and not {wanted}");
    }

    pub async fn lsn(&mut self, sql: &str) -> Lsn {
        self.sql.query(sql).await.unwrap()[0].lsn(0).unwrap()
    }

    pub async fn confirmed(&mut self) -> Lsn {
        let status = slot::status(&mut self.sql, SLOT).await.unwrap().unwrap();
        status.confirmed_flush_lsn.unwrap()
    }
}

pub fn create_options(name: &str, wait: Duration) -> CreateOptions {
    let (name, plugin) = (name.to_string(), "pgoutput".to_string());
    CreateOptions { name, plugin, kind: SlotKind::Permanent, wait }
}

pub async fn make_slot(config: &Config, watcher: &mut Session, name: &str) -> HeldSlot {
    let session = Session::connect(config, Purpose::Replication).await.unwrap();
    let ignore = |_: &[Blocker]| {};
    slot::create(session, watcher, &create_options(name, PATIENCE), ignore).await.unwrap()
}

/// A running reader with both ends in the test's hands.
pub struct Reader {
    pub items: Receiver,
    pub durable: watch::Sender<Lsn>,
    pub positions: watch::Receiver<Positions>,
    pub stop: watch::Sender<bool>,
    pub task: JoinHandle<source::Result<End>>,
}

impl Reader {
    pub async fn start(config: &Config, options: StreamOptions, buffer_bytes: usize) -> Reader {
        Reader::start_by(config, Transport::Stream, options, buffer_bytes).await
    }

    pub async fn start_by(
        config: &Config,
        transport: Transport,
        options: StreamOptions,
        buffer_bytes: usize,
    ) -> Reader {
        let (durable, durable_seen) = watch::channel(options.confirmed_lsn);
        let (positions, positions_seen) = watch::channel(Positions::default());
        let (stop, stop_seen) = watch::channel(false);
        let (mut sink, items) = memory::queue(buffer_bytes);
        let stream = source::Reader::open(config, transport, options).await.unwrap();
        let task = tokio::spawn(async move {
            stream.run(&mut sink, durable_seen, &positions, stop_seen).await
        });
        Reader { items, durable, positions: positions_seen, stop, task }
    }

    pub async fn pop(&mut self) -> Item {
        match soon("an item", self.items.pop()).await {
            Some(item) => item,
            None => panic!("the stream ended early: {:?}", (&mut self.task).await),
        }
    }

    /// All chunks up to the next mark; its transaction and empty ones (up to 14) are left out.
    pub async fn until_mark(&mut self) -> Vec<Chunk> {
        let mut chunks = Vec::new();
        loop {
            let Item::Chunk(chunk) = self.pop().await else { continue };
            match chunk.changes.first() {
                Some(change) if is_mark(change) => return chunks,
                Some(_) => chunks.push(chunk),
                None => {}
            }
        }
    }

    pub async fn end(self) -> source::Result<End> {
        let _ = self.stop.send(true);
        soon("the reader's end", self.task).await.unwrap()
    }
}

pub fn is_mark(change: &Change) -> bool {
    matches!(change, Change::Insert { relation, .. } if relation.name.name == "mark")
}

/// A change on one line: `I t (1,a)`; NULL is `-`, unchanged TOAST is `~`.
pub fn show(change: &Change) -> String {
    let row = |row: &walferry::change::Row| {
        let values: Vec<String> = row
            .values()
            .map(|value| match value {
                walferry::change::Value::Null => "-".to_string(),
                walferry::change::Value::Unchanged => "~".to_string(),
                value => {
                    let text = String::from_utf8_lossy(value.bytes().unwrap()).into_owned();
                    text.chars().take(12).collect()
                }
            })
            .collect();
        format!("({})", values.join(","))
    };
    let old = |old: &walferry::change::OldRow| match old {
        walferry::change::OldRow::Key(key) => format!("K{}", row(key)),
        walferry::change::OldRow::Full(full) => format!("O{}", row(full)),
    };
    let name = |relation: &Relation| relation.name.name.clone();
    match change {
        Change::Insert { relation, new } => format!("I {} {}", name(relation), row(new)),
        Change::Update { relation, old: Some(before), new } => {
            format!("U {} {} {}", name(relation), old(before), row(new))
        }
        Change::Update { relation, old: None, new } => format!("U {} {}", name(relation), row(new)),
        Change::Delete { relation, old: before } => format!("D {} {}", name(relation), old(before)),
        Change::Truncate { relations, cascade, restart_identity } => {
            let mut tables: Vec<String> = relations.iter().map(|r| name(r)).collect();
            tables.sort();
            format!("T {} {cascade} {restart_identity}", tables.join("+"))
        }
        Change::Message { transactional, prefix, content, .. } => {
            format!("M {transactional} {prefix} {}", String::from_utf8_lossy(content))
        }
    }
}

pub fn shown(chunks: &[Chunk]) -> Vec<Vec<String>> {
    chunks.iter().map(|chunk| chunk.changes.iter().map(show).collect()).collect()
}

/// Passes bytes to a server on 127.0.0.1, until told to hold them back without closing anything.
pub struct Proxy {
    pub port: u16,
    pub stalled: watch::Sender<bool>,
}

impl Proxy {
    pub async fn start(server_port: u16) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (stalled, seen) = watch::channel(false);
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let server = TcpStream::connect(("127.0.0.1", server_port)).await.unwrap();
                let (client_read, client_write) = client.into_split();
                let (server_read, server_write) = server.into_split();
                tokio::spawn(pass(client_read, server_write, seen.clone()));
                tokio::spawn(pass(server_read, client_write, seen.clone()));
            }
        });
        Proxy { port, stalled }
    }
}

async fn pass(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    mut stalled: watch::Receiver<bool>,
) {
    let mut buffer = vec![0; 1 << 16];
    loop {
        let count = match from.read(&mut buffer).await {
            Ok(0) | Err(_) => return,
            Ok(count) => count,
        };
        if stalled.wait_for(|stalled| !stalled).await.is_err() {
            return;
        }
        if to.write_all(&buffer[..count]).await.is_err() {
            return;
        }
    }
}
