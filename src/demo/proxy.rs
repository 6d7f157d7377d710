//! A network that can be cut, stalled, delayed and throttled: a TCP proxy on loopback.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::Instant;

/// Read at a time, and the grain of throttling.
const READ_BYTES: usize = 16 << 10;

/// Reads on their way in one direction: with READ_BYTES a megabyte, which bounds what a delay
/// holds.
const READS_IN_FLIGHT: usize = 64;

/// What is done to connections now.
#[derive(Clone, Debug, Default)]
struct Rules {
    /// Counts [`Proxy::cut_silently`]: connections made before the newest one, or while it lasts,
    /// never carry a byte again.
    holes: u64,
    in_hole: bool,
    stalled: bool,
    refusing: bool,
    /// Of each direction: half a round trip.
    delay: Duration,
    /// Bytes a second, of each connection and direction.
    rate: Option<u64>,
}

/// Bytes forwarded, and connections.
#[derive(Debug, Default)]
struct Counters {
    to_server: AtomicU64,
    from_server: AtomicU64,
    connections: AtomicU64,
}

/// A running proxy. Dropped, it closes everything.
#[derive(Debug)]
pub struct Proxy {
    port: u16,
    _port_claim: std::net::TcpListener,
    server_port: u16,
    rules: watch::Sender<Rules>,
    counters: Arc<Counters>,
    acceptor: JoinHandle<()>,
}

impl Proxy {
    /// A proxy on a free port of 127.0.0.1 in front of another port there. Runs on the present
    /// runtime.
    pub async fn start(server_port: u16) -> io::Result<Proxy> {
        let (port, claim) = super::server::free_port()?;
        let listener = TcpListener::bind(("127.0.0.1", port)).await?;
        let (rules, receiver) = watch::channel(Rules::default());
        let counters = Arc::new(Counters::default());
        let acceptor = tokio::spawn(accept(listener, server_port, receiver, counters.clone()));
        Ok(Proxy { port, _port_claim: claim, server_port, rules, counters, acceptor })
    }

    /// The port to connect to.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// A URI of the server behind, led through the proxy.
    pub fn uri(&self, uri: &str) -> String {
        let (there, here) = (format!(":{}", self.server_port), format!(":{}", self.port));
        uri.replacen(&there, &here, 1)
    }

    /// Closes all connections and refuses new ones, as a server that is down.
    pub fn cut(&self) {
        self.rules.send_modify(|rules| rules.refusing = true);
    }

    /// Swallows every byte and says nothing, as a firewall that forgot us. New connections are
    /// taken and get no answer. Those that saw it stay dead after [`Proxy::restore`].
    pub fn cut_silently(&self) {
        self.rules.send_modify(|rules| {
            rules.holes += 1;
            rules.in_hole = true;
        });
    }

    /// Holds every byte back until [`Proxy::restore`], which delivers them.
    pub fn stall(&self) {
        self.rules.send_modify(|rules| rules.stalled = true);
    }

    /// Adds this to every round trip.
    pub fn delay(&self, round_trip: Duration) {
        self.rules.send_modify(|rules| rules.delay = round_trip / 2);
    }

    /// Lets this many bytes a second through, on each connection in each direction.
    pub fn throttle(&self, bytes_per_second: u64) {
        self.rules.send_modify(|rules| rules.rate = Some(bytes_per_second.max(1)));
    }

    /// A good network again.
    pub fn restore(&self) {
        self.rules.send_modify(|rules| {
            *rules = Rules { holes: rules.holes, ..Rules::default() };
        });
    }

    /// Bytes forwarded to the server so far.
    pub fn bytes_to_server(&self) -> u64 {
        self.counters.to_server.load(Ordering::Relaxed)
    }

    /// Bytes forwarded from the server so far.
    pub fn bytes_from_server(&self) -> u64 {
        self.counters.from_server.load(Ordering::Relaxed)
    }

    /// Connections taken so far.
    pub fn connections(&self) -> u64 {
        self.counters.connections.load(Ordering::Relaxed)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.acceptor.abort();
    }
}

/// Takes connections. While refusing there is no listener: clients see what a dead server shows.
async fn accept(
    listener: TcpListener,
    server_port: u16,
    mut rules: watch::Receiver<Rules>,
    counters: Arc<Counters>,
) {
    let port = listener.local_addr().map(|a| a.port()).unwrap_or_default();
    let mut listener = Some(listener);
    let mut connections = JoinSet::new();
    loop {
        let refusing = rules.borrow_and_update().refusing;
        if refusing {
            listener = None;
            connections.abort_all();
        } else if listener.is_none() {
            listener = TcpListener::bind(("127.0.0.1", port)).await.ok();
        }
        let incoming = async {
            match &listener {
                Some(listener) => listener.accept().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            changed = rules.changed() => if changed.is_err() { return },
            accepted = incoming => {
                if let Ok((client, _)) = accepted {
                    counters.connections.fetch_add(1, Ordering::Relaxed);
                    let connection = forward(client, server_port, rules.clone(), counters.clone());
                    connections.spawn(connection);
                }
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn forward(
    client: TcpStream,
    server_port: u16,
    rules: watch::Receiver<Rules>,
    counters: Arc<Counters>,
) {
    let now = rules.borrow().clone();
    if now.in_hole {
        let _held = client;
        return std::future::pending().await;
    }
    let Ok(server) = TcpStream::connect(("127.0.0.1", server_port)).await else { return };
    if client.set_nodelay(true).and(server.set_nodelay(true)).is_err() {
        return;
    }
    let (client_read, client_write) = client.into_split();
    let (server_read, server_write) = server.into_split();
    let there = pump(client_read, server_write, now.holes, rules.clone(), &counters.to_server);
    let back = pump(server_read, client_write, now.holes, rules, &counters.from_server);
    tokio::join!(there, back);
}

/// Carries one direction: reads are stamped with the time they are due, and written then.
async fn pump(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    holes: u64,
    mut rules: watch::Receiver<Rules>,
    count: &AtomicU64,
) {
    let (sender, mut receiver) = mpsc::channel::<(Instant, Vec<u8>)>(READS_IN_FLIGHT);
    let delays = rules.clone();
    let read = async move {
        loop {
            let mut buffer = Vec::with_capacity(READ_BYTES);
            // The end of the connection travels like any other news: an empty read.
            let end = !matches!(from.read_buf(&mut buffer).await, Ok(1..));
            let due = Instant::now() + delays.borrow().delay;
            if sender.send((due, buffer)).await.is_err() || end {
                return;
            }
        }
    };
    let write = async move {
        while let Some((due, bytes)) = receiver.recv().await {
            tokio::time::sleep_until(due).await;
            let rate = permission(&mut rules, holes).await;
            if bytes.is_empty() || to.write_all(&bytes).await.is_err() {
                break;
            }
            count.fetch_add(bytes.len() as u64, Ordering::Relaxed);
            if let Some(rate) = rate {
                tokio::time::sleep(Duration::from_secs_f64(bytes.len() as f64 / rate as f64)).await;
            }
        }
        let _ = to.shutdown().await;
    };
    // When writing has ended there is no one to read for.
    tokio::pin!(read);
    tokio::pin!(write);
    tokio::select! {
        () = &mut write => {}
        () = &mut read => write.await,
    }
}

/// Returns once bytes may pass, with the rate; never for a connection that fell into a hole.
async fn permission(rules: &mut watch::Receiver<Rules>, holes: u64) -> Option<u64> {
    loop {
        let now = rules.borrow_and_update().clone();
        if now.holes > holes {
            return std::future::pending().await;
        }
        if !now.stalled {
            return now.rate;
        }
        if rules.changed().await.is_err() {
            return None;
        }
    }
}
