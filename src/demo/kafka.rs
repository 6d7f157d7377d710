//! An Apache Kafka of one's own: one node, broker and controller at once (KRaft), on loopback, gone
//! when dropped.
//!
//! The jars come from Maven Central, once, into the cache. No tool of Kafka's is run to format the
//! directory: what that writes is one small file, and a Java more would cost two seconds.

use std::io;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use super::binaries::cache_dir;
use super::guard::Guard;
use super::server::{free_port, signal};
use crate::clock::Deadline;

/// The version of docker-compose.yml.
pub const VERSION: &str = "3.9.1";

/// Fetches the jars; see its head.
const INSTALLER: &str = include_str!("kafka.sh");

/// A start takes some five seconds of processor time, and there may be few of those.
const PATIENCE: Duration = Duration::from_secs(120);

/// Between looks at the log.
const POLL: Duration = Duration::from_millis(50);

/// Said once a broker takes requests.
const STARTED: &str = "Kafka Server started";

/// What every broker is started with; lines given by the caller follow, and the last one wins. One
/// that was killed is let in again only once its session has timed out, by default after nine
/// seconds.
const SETTINGS: &str = "process.roles=broker,controller\nnode.id=1\n\
    controller.listener.names=CONTROLLER\nnum.network.threads=2\nnum.io.threads=2\n\
    background.threads=2\nlog.cleaner.dedupe.buffer.size=4194304\nauto.create.topics.enable=false\n\
    offsets.topic.num.partitions=1\noffsets.topic.replication.factor=1\n\
    transaction.state.log.num.partitions=1\ntransaction.state.log.replication.factor=1\n\
    transaction.state.log.min.isr=1\ngroup.initial.rebalance.delay.ms=0\n\
    log.initial.task.delay.ms=500\nbroker.heartbeat.interval.ms=500\n\
    broker.session.timeout.ms=4000\n";

const LOGGING: &str = "log4j.rootLogger=WARN, out\n\
    log4j.logger.kafka.server.KafkaRaftServer=INFO\n\
    log4j.appender.out=org.apache.log4j.ConsoleAppender\n\
    log4j.appender.out.layout=org.apache.log4j.PatternLayout\n\
    log4j.appender.out.layout.ConversionPattern=%d %p %c %m%n\n";

/// A running (or killed) throw-away broker. Stopped and deleted when dropped, and when this process
/// is killed.
#[derive(Debug)]
pub struct Broker {
    jars: PathBuf,
    dir: PathBuf,
    port: u16,
    /// Hold the ports for us while the broker is down.
    _port_claims: [TcpListener; 2],
    java: Mutex<Option<Child>>,
    _guard: Guard,
}

impl Broker {
    /// Starts one with `settings` (`name=value` lines of server.properties). Blocks until it takes
    /// requests, for some seconds; on the first time also for the fetching of 46 MB.
    pub fn start(settings: &[&str]) -> io::Result<Broker> {
        Self::start_listening("PLAINTEXT", settings)
    }

    /// The same where clients connect by another security protocol than `PLAINTEXT`.
    pub fn start_listening(protocol: &str, settings: &[&str]) -> io::Result<Broker> {
        let jars = jars()?;
        let dir = std::env::temp_dir().join(format!("walferry-kafka-{:016x}", fastrand::u64(..)));
        std::fs::create_dir_all(dir.join("data"))?;
        let guard = Guard::watch_by(&dir, "broker.pid", "KILL")?;
        let ((port, claim), (controller, other_claim)) = (free_port()?, free_port()?);
        let data = dir.join("data");
        let mut properties = format!(
            "{SETTINGS}listeners=CLIENT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}\n\
             advertised.listeners=CLIENT://127.0.0.1:{port}\n\
             listener.security.protocol.map=CLIENT:{protocol},CONTROLLER:PLAINTEXT\n\
             inter.broker.listener.name=CLIENT\n\
             controller.quorum.voters=1@127.0.0.1:{controller}\nlog.dirs={}\n",
            data.display()
        );
        for line in settings {
            properties.push_str(line);
            properties.push('\n');
        }
        std::fs::write(dir.join("server.properties"), properties)?;
        std::fs::write(dir.join("log4j.properties"), LOGGING)?;
        // What kafka-storage.sh format writes. An id is 16 bytes as base64 for URLs, so that its
        // 22nd letter has four bits that are not used.
        let id = || (0..21).map(|_| fastrand::alphanumeric()).collect::<String>();
        let meta = format!("version=1\ncluster.id={}A\nnode.id=1\ndirectory.id={}A\n", id(), id());
        std::fs::write(data.join("meta.properties"), meta)?;
        let java = Mutex::new(None);
        let _port_claims = [claim, other_claim];
        let broker = Broker { jars, dir, port, _port_claims, java, _guard: guard };
        broker.resume()?;
        Ok(broker)
    }

    /// For `--buffer kafka:` and clients: host and port.
    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// What the broker has said since it was started last.
    pub fn log(&self) -> String {
        let bytes = std::fs::read(self.dir.join("log")).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The directory of its log segments.
    pub fn data_dir(&self) -> PathBuf {
        self.dir.join("data")
    }

    /// kill -9. Nothing happens if it is down already.
    pub fn kill9(&self) -> io::Result<()> {
        let mut java = self.lock();
        if let Some(child) = java.as_mut() {
            child.kill()?;
            child.wait()?;
        }
        *java = None;
        Ok(())
    }

    /// Stops its process where it stands, as a machine that hangs; [`Broker::thaw`] lets it go on.
    pub fn freeze(&self) -> io::Result<()> {
        self.signal("STOP")
    }

    /// See [`Broker::freeze`].
    pub fn thaw(&self) -> io::Result<()> {
        self.signal("CONT")
    }

    fn signal(&self, name: &str) -> io::Result<()> {
        match self.lock().as_ref() {
            Some(child) => signal(name, &[child.id()]),
            None => Err(io::Error::other("the broker is down")),
        }
    }

    /// Starts it again after [`Broker::kill9`], on the same port and with the same data. Blocks
    /// until it takes requests.
    pub fn resume(&self) -> io::Result<()> {
        let mut java = self.lock();
        if java.is_some() {
            return Ok(());
        }
        let log = std::fs::File::create(self.dir.join("log"))?;
        let child = Command::new("java")
            .args(["-Xms64m", "-Xmx256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"])
            .arg(format!("-Dlog4j.configuration=file:{}/log4j.properties", self.dir.display()))
            // Libraries that it unpacks would outlive a kill -9 in /tmp.
            .arg(format!("-Djava.io.tmpdir={}", self.dir.display()))
            .arg("-cp")
            .arg(self.jars.join("*"))
            .arg("kafka.Kafka")
            .arg(self.dir.join("server.properties"))
            .current_dir(&self.dir)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()?;
        std::fs::write(self.dir.join("broker.pid"), format!("{}\n", child.id()))?;
        let child = java.insert(child);
        let deadline = Deadline::after(PATIENCE);
        while !self.log().contains(STARTED) {
            if let Some(status) = child.try_wait()? {
                *java = None;
                let log = self.log();
                return Err(io::Error::other(format!("kafka ended with {status}: {log}")));
            }
            if deadline.passed() {
                return Err(io::Error::other(format!("kafka does not start: {}", self.log())));
            }
            std::thread::sleep(POLL);
        }
        Ok(())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Child>> {
        self.java.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        let _ = self.kill9();
    }
}

/// The directory of the jars, fetched if need be. Blocks.
fn jars() -> io::Result<PathBuf> {
    let kafka = cache_dir()?.join("kafka");
    let jars = kafka.join(VERSION).join("jars");
    if jars.exists() {
        return Ok(jars);
    }
    install(&kafka)?;
    Ok(jars)
}

fn install(kafka: &Path) -> io::Result<()> {
    let output = Command::new("sh")
        .args(["-c", INSTALLER, "kafka.sh"])
        .arg(kafka)
        .arg(VERSION)
        .stdin(Stdio::null())
        .output()?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_string();
    let message = format!("Apache Kafka {VERSION} is not here and could not be fetched: {said}");
    Err(io::Error::new(io::ErrorKind::NotFound, message))
}
