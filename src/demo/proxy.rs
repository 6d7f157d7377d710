//! A network that can be cut, stalled, delayed and throttled: a TCP proxy on loopback.
//!
//! It has a thread and a runtime of its own, so that a caller who blocks (on a server that stops,
//! and for that waits for its walsenders to be read) does not hold up the bytes as well.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::clock::Deadline;

/// Read at a time, and the grain of throttling.
const READ_BYTES: usize = 16 << 10;

/// Reads on their way in one direction: with READ_BYTES a megabyte, which bounds what a delay
/// holds.
const READS_IN_FLIGHT: usize = 64;

/// A change of rules takes effect within this, or its caller goes on without.
const PATIENCE: Duration = Duration::from_secs(5);

/// What is done to connections now.
#[derive(Clone, Debug, Default)]
struct Rules {
    /// Counts changes, so that one who made a change can see it done.
    version: u64,
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
    /// Version of the rules that the listener and all connections follow.
    version: AtomicU64,
    /// Where new connections lead.
    server_port: AtomicU16,
}

/// A running proxy. Dropped, it closes everything.
#[derive(Debug)]
pub struct Proxy {
    port: u16,
    _port_claim: std::net::TcpListener,
    server_port: u16,
    /// Without it the thread ends.
    rules: Option<watch::Sender<Rules>>,
    counters: Arc<Counters>,
    thread: Option<JoinHandle<()>>,
}

impl Proxy {
    /// A proxy on a free port of 127.0.0.1 in front of another port there.
    pub fn start(server_port: u16) -> io::Result<Proxy> {
        let (port, claim) = super::server::free_port()?;
        let listener = std::net::TcpListener::bind(("127.0.0.1", port))?;
        listener.set_nonblocking(true)?;
        let (rules, receiver) = watch::channel(Rules::default());
        let counters = Arc::new(Counters::default());
        counters.server_port.store(server_port, Ordering::Relaxed);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let shared = counters.clone();
        let thread = std::thread::Builder::new().name("proxy".to_string()).spawn(move || {
            runtime.block_on(async {
                if let Ok(listener) = TcpListener::from_std(listener) {
                    accept(listener, receiver, shared).await;
                }
            });
        })?;
        let (_port_claim, thread) = (claim, Some(thread));
        Ok(Proxy { port, _port_claim, server_port, rules: Some(rules), counters, thread })
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

    /// New connections lead to another server: one that took this one's address.
    pub fn lead_to(&self, server_port: u16) {
        self.counters.server_port.store(server_port, Ordering::Relaxed);
    }

    /// Closes all connections and refuses new ones, as a server that is down.
    pub fn cut(&self) {
        self.change(|rules| rules.refusing = true);
    }

    /// Swallows every byte and says nothing, as a firewall that forgot us. New connections are
    /// taken and get no answer. Those that saw it stay dead after [`Proxy::restore`].
    pub fn cut_silently(&self) {
        self.change(|rules| {
            rules.holes += 1;
            rules.in_hole = true;
        });
    }

    /// Holds every byte back until [`Proxy::restore`], which delivers them.
    pub fn stall(&self) {
        self.change(|rules| rules.stalled = true);
    }

    /// Adds this to every round trip.
    pub fn delay(&self, round_trip: Duration) {
        self.change(|rules| rules.delay = round_trip / 2);
    }

    /// Lets this many bytes a second through, on each connection in each direction.
    pub fn throttle(&self, bytes_per_second: u64) {
        self.change(|rules| rules.rate = Some(bytes_per_second.max(1)));
    }

    /// A good network again.
    pub fn restore(&self) {
        self.change(|rules| {
            *rules = Rules { holes: rules.holes, ..Rules::default() };
        });
    }

    /// Blocks until it is done, for a moment: what a caller sends next meets the new rules.
    fn change(&self, how: impl FnOnce(&mut Rules)) {
        let Some(rules) = &self.rules else { return };
        let mut version = 0;
        rules.send_modify(|rules| {
            version = rules.version + 1;
            how(rules);
            rules.version = version;
        });
        let deadline = Deadline::after(PATIENCE);
        while self.counters.version.load(Ordering::Acquire) < version && !deadline.passed() {
            std::thread::sleep(Duration::from_micros(200));
        }
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
        self.rules = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Takes connections. While refusing there is no listener: clients see what a dead server shows.
async fn accept(listener: TcpListener, mut rules: watch::Receiver<Rules>, counters: Arc<Counters>) {
    let port = listener.local_addr().map(|a| a.port()).unwrap_or_default();
    let mut listener = Some(listener);
    let mut connections = JoinSet::new();
    loop {
        let Rules { refusing, version, .. } = rules.borrow_and_update().clone();
        if refusing {
            listener = None;
            connections.shutdown().await;
        } else if listener.is_none() {
            listener = TcpListener::bind(("127.0.0.1", port)).await.ok();
        }
        counters.version.store(version, Ordering::Release);
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
                    let server_port = counters.server_port.load(Ordering::Relaxed);
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
            // Counted first: who has received a byte finds it counted.
            count.fetch_add(bytes.len() as u64, Ordering::Relaxed);
            if bytes.is_empty() || to.write_all(&bytes).await.is_err() {
                break;
            }
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
