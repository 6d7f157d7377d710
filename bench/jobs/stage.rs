//! Contestants on their marks: each has its slot on the source and its own copy of the target, set
//! up before anything is written, and all read the same source afterwards.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use walferry::demo::binaries;
use walferry::demo::proxy::Proxy;

use crate::data::{Backlog, pgbench_tables};
use crate::options::Options;
use crate::pair::{DATABASE, Pair, cores};
use crate::process::{Usage, Watched};
use crate::report::{OURS, Sample};

/// Nothing in the bench is given longer.
pub const PATIENCE: Duration = Duration::from_secs(3600);

/// A program that is told to stop does so within this.
const STOP: Duration = Duration::from_secs(60);

/// Committed last, so whoever shows it has everything.
const ARRIVED: &str = "select done from public.bench_mark";

/// Not FOR ALL TABLES: a subscription wants every published table on its side, and walferry puts a
/// schema of its own beside them.
const PUBLISH: &str = "do $$ begin execute (select 'create publication bench for table ' || \
     string_agg(format('%I', tablename), ', ') from pg_tables where schemaname = 'public'); end $$";

/// The round trip to a far place.
const FAR: Duration = Duration::from_millis(20);

/// Who does the job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    Walferry,
    /// The same behind 20 ms of round trip to the target.
    WalferryFar,
    /// A subscription, with these options.
    Native(&'static str),
    /// A subscription whose publisher is 20 ms away.
    NativeFar,
    /// Reads the stream and throws it away: what no one can be faster than by streaming.
    Receive,
}

impl Peer {
    /// As it is called in tables.
    pub fn name(self) -> String {
        match self {
            Peer::Walferry => OURS.to_string(),
            Peer::WalferryFar => format!("{OURS}, 20 ms away"),
            Peer::Native("") => "native".to_string(),
            Peer::Native(options) => format!("native, {options}"),
            Peer::NativeFar => "native, 20 ms away".to_string(),
            Peer::Receive => "pg_recvlogical".to_string(),
        }
    }

    /// For slots, subscriptions and saved targets.
    fn tag(self) -> String {
        let name = match self {
            Peer::WalferryFar => OURS.to_string(),
            _ => self.name(),
        };
        let plain = |c: char| if c.is_ascii_alphanumeric() { c } else { '_' };
        format!("bench_{}", name.chars().map(plain).collect::<String>())
    }
}

/// Two servers with everyone set up.
pub struct Stage {
    pub pair: Pair,
    pub peers: Vec<Peer>,
    /// To the target and to the source, with the delay of a far place.
    proxies: (Proxy, Proxy),
    /// Where the written log ends, for a reader that has to be told.
    end: String,
}

/// walferry's own command.
pub fn walferry(pair: &Pair, target: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_walferry"));
    command.current_dir(&pair.scratch).args(arguments);
    command.args(["--source", &pair.source_uri(), "--target", target]);
    command.args(["--jobs", &cores().to_string()]);
    if let Ok(tuning) = std::env::var("TUNING") {
        let path = pair.scratch.join("walferry.toml");
        // What cannot be written is missed by walferry, by name.
        let _ = std::fs::write(&path, format!("[tuning]\n{}\n", tuning.replace(',', "\n")));
        command.arg("-c").arg(path);
    }
    command
}

impl Stage {
    /// The tables that a backlog needs, on both sides, and each wanted peer ready to go.
    pub fn set(options: &Options, backlog: &Backlog, peers: &[Peer]) -> Result<Stage> {
        let pair = Pair::start(options.smoke)?;
        if backlog.pgbench_scale > 0 {
            pgbench_tables(&pair, backlog.pgbench_scale)?;
        }
        let sql = format!(
            "{}; create table bench_mark (id int primary key, done bool not null); \
             insert into bench_mark values (1, false); \
             create table bench_probe (id bigint primary key); {PUBLISH}",
            backlog.tables
        );
        pair.source.psql(DATABASE, sql.trim_start_matches("; "))?;
        let dump = pair.dump(false)?;
        let proxies = (Proxy::start(pair.target.port())?, Proxy::start(pair.source.port())?);
        proxies.0.delay(FAR);
        proxies.1.delay(FAR);
        let peers = peers.iter().copied().filter(|p| {
            matches!(p, Peer::Walferry | Peer::WalferryFar) || options.wants(&p.name())
        });
        let stage = Stage { pair, peers: peers.collect(), proxies, end: String::new() };
        for peer in stage.peers.clone() {
            stage.set_up(peer, &dump)?;
        }
        Ok(stage)
    }

    /// Writes the backlog and puts the source aside with it.
    pub fn pile_up(&mut self, backlog: &Backlog) -> Result<()> {
        backlog.write(&self.pair)?;
        self.end = self.pair.source.psql(DATABASE, "select pg_current_wal_insert_lsn()")?;
        self.put_aside()
    }

    /// Puts the source aside as it is.
    pub fn put_aside(&self) -> Result<()> {
        self.pair.save(&self.pair.source, "source")
    }

    fn set_up(&self, peer: Peer, dump: &std::path::Path) -> Result<()> {
        let (pair, tag) = (&self.pair, peer.tag());
        if matches!(peer, Peer::WalferryFar | Peer::Receive) {
            return match peer {
                Peer::Receive => self.slot(&tag),
                _ => Ok(()),
            };
        }
        pair.empty_target()?;
        match peer {
            Peer::Walferry => {
                let arguments = ["run", "--until", "following"];
                let mut command = walferry(pair, &pair.target_uri(), &arguments);
                Watched::start(&mut command, &pair.log("set-up"))?.finish(PATIENCE)?;
            }
            Peer::Native(_) | Peer::NativeFar | Peer::WalferryFar | Peer::Receive => {
                pair.restore_dump(dump, None, 1)?;
                self.slot(&tag)?;
                let options = match peer {
                    Peer::Native("binary") => ", binary = true",
                    Peer::Native("streamed") => ", streaming = true",
                    _ => "",
                };
                let far = peer == Peer::NativeFar;
                let port = if far { self.proxies.1.port() } else { pair.source.port() };
                let sql = format!(
                    "create subscription {tag} connection '{}' publication bench with (copy_data \
                     = false, create_slot = false, enabled = false, slot_name = {tag}{options})",
                    pair.source_dsn(port)
                );
                pair.target.psql(DATABASE, &sql)?;
            }
        }
        pair.save(&pair.target, &tag)?;
        Ok(pair.target.resume()?)
    }

    fn slot(&self, name: &str) -> Result<()> {
        let sql = format!("select pg_create_logical_replication_slot('{name}', 'pgoutput')");
        self.pair.source.psql(DATABASE, &sql)?;
        Ok(())
    }

    /// Both servers as they were for this peer when the source was put aside.
    pub fn bring_back(&self, peer: Peer) -> Result<()> {
        self.pair.restore(&self.pair.source, "source")?;
        match peer {
            Peer::Receive => Ok(()),
            _ => self.pair.restore(&self.pair.target, &peer.tag()),
        }
    }

    /// Lets a peer go. What runs outside the servers is given back.
    pub fn go(&self, peer: Peer) -> Result<Option<Watched>> {
        let (pair, tag) = (&self.pair, peer.tag());
        let target = &pair.target;
        match peer {
            Peer::Walferry | Peer::WalferryFar => {
                let far = peer == Peer::WalferryFar;
                let uri = pair.target_uri();
                let uri = if far { self.proxies.0.uri(&uri) } else { uri };
                let mut command = walferry(pair, &uri, &["run"]);
                return Ok(Some(Watched::start(&mut command, &pair.log(OURS))?));
            }
            Peer::Native(_) | Peer::NativeFar => {
                target.psql(DATABASE, &format!("alter subscription {tag} enable"))?;
            }
            Peer::Receive => bail!("pg_recvlogical writes to no target"),
        }
        Ok(None)
    }

    /// Waits for the end of what was written; seconds since `since`.
    pub fn arrival(&self, since: Instant, worker: Option<&Watched>) -> Result<f64> {
        self.pair.wait_for(ARRIVED, since, PATIENCE, worker)
    }

    /// Ends what [`Stage::go`] gave back.
    pub fn halt(worker: Option<Watched>) -> Result<Usage> {
        worker.map_or(Ok(Usage::default()), |worker| worker.stop(STOP))
    }

    /// One timed run from the backlog to the exact end state.
    pub fn catch_up(&self, peer: Peer) -> Result<Sample> {
        self.bring_back(peer)?;
        if peer == Peer::Receive {
            return self.receive();
        }
        let since = Instant::now();
        let worker = self.go(peer)?;
        let value = self.arrival(since, worker.as_ref())?;
        let usage = Self::halt(worker)?;
        self.pair.check_equal(&peer.name())?;
        Ok(Sample { value, usage, parts: Vec::new() })
    }

    fn receive(&self) -> Result<Sample> {
        let mut command = Command::new(binaries::client("pg_recvlogical")?);
        command.args(["-d", &self.pair.source_uri(), "--slot", &Peer::Receive.tag(), "--start"]);
        command.args(["-f", "/dev/null", "-o", "proto_version=1", "-o", "publication_names=bench"]);
        command.args(["--no-loop", "-E", &self.end]);
        let watched = Watched::start(&mut command, &self.pair.log("receive"))?;
        let usage = watched.finish(PATIENCE)?;
        Ok(Sample { value: usage.seconds, usage, parts: Vec::new() })
    }
}
