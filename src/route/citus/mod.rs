//! The metadata of a Citus cluster: which node has a group of co-located shards.
//!
//! Source and target of the job are two workers, its tables the shards of one group. Whoever writes
//! to a shard through Citus holds the group's metadata lock, shared, until his transaction ends, on
//! the node that he is connected to; plain SELECT takes no such lock. Citus's own move takes it
//! exclusively on the coordinator and on all nodes with metadata while it swaps the placements, and
//! so does this route:
//!
//! - *hold*: one transaction on each of these nodes takes the lock, by Citus's own
//!   `lock_shard_metadata`, within the wait; reference tables that the shards refer to are locked
//!   like the shards, as writes to them would act on the shards. Where a transaction that has been
//!   open for longer than the wait holds the lock, nobody is made to queue behind us: it is left
//!   alone, and asked again later.
//! - *ready*: each of these transactions swaps the rows of `pg_dist_placement`.
//! - *switch*: each is prepared. From then on the locks and the swap outlive our sessions, and the
//!   servers.
//! - *release*, after the point of no return: COMMIT PREPARED on every node. Writers that waited
//!   plan again, and find the shards on the other node: none of their statements fails.
//! - *undo*: our sessions are ended, whatever they are at, then ROLLBACK PREPARED on every node.
//!
//! What survives a crash: the prepared transactions, and the job's phase, which tells what becomes
//! of them. So all nodes agree once the job was run again, and until then writers of this group
//! wait, and no one else. Their names hold the job, the flip, and a mark of the job's tables, as a
//! job's name is unique in its home only.
//!
//! Releases without `lock_shard_metadata` have the logical tables locked instead (EXCLUSIVE, which
//! lets SELECT pass), and so all their shards.
//!
//! Left out: shards with several placements, and moves by Citus itself beside ours: one that is
//! under way has changed the rows that the swap expects, which refuses it.
//!
//! <https://docs.citusdata.com/en/stable/develop/api_metadata.html>

mod node;
mod shards;

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::future::join_all;

use super::{Context, Error, Result};
use crate::clock::Deadline;
use crate::cluster::read::{elsewhere, understood};
use crate::pg::{Config, Host, Session, Witness};
use crate::secret::SecretString;
use node::{Ended, Node};
use shards::Group;

/// Transactions of ours on the nodes, and what they are about.
#[derive(Debug)]
struct Flight {
    /// The coordinator first.
    nodes: Vec<Node>,
    group: Group,
    /// The swap is prepared.
    prepared: bool,
}

/// A cluster by its coordinator's database.
#[derive(Clone, Debug)]
pub struct Citus {
    coordinator: Config,
    flight: Arc<Mutex<Option<Flight>>>,
}

/// How long a session of ours may take to be ended, and a prepared transaction to be free.
const END_WAIT: Duration = Duration::from_secs(5);

/// Between looks at that.
const LOOK: Duration = Duration::from_millis(5);

impl Citus {
    /// Reads the URI.
    pub(super) fn parse(uri: &str) -> Result<Citus> {
        if uri.trim().is_empty() {
            return Err(Error::Usage("citus needs the URI of the coordinator".to_string()));
        }
        let coordinator = Config::parse(uri).map_err(|e| Error::Usage(e.to_string()))?;
        Ok(Citus { coordinator: coordinator.labelled("coordinator"), flight: Arc::default() })
    }

    /// The URI as it may be stored, and the password.
    pub(super) fn stored(uri: &str) -> Result<(String, Option<SecretString>)> {
        let (uri, password) =
            Config::split_password(uri).map_err(|e| Error::Usage(e.to_string()))?;
        Ok((format!("citus:{uri}"), password))
    }

    pub(super) fn set_password(&mut self, password: SecretString) {
        self.coordinator.password = Some(password);
    }

    pub(super) fn set_witness(&mut self, witness: Witness) {
        self.coordinator.witness = Some(witness);
    }

    pub(super) fn password(&self) -> Option<SecretString> {
        self.coordinator.password_for(self.coordinator.hosts.first()?).cloned()
    }

    pub(super) fn by_hand(&self, context: &Context, switched: bool) -> String {
        let verb = if switched { "commit" } else { "rollback" };
        format!(
            "on the coordinator {} and on every node of its pg_dist_node that has metadata: \
             {verb} prepared, of the transaction in pg_prepared_xacts whose gid begins with {}",
            self.peer(),
            gid_of(context)
        )
    }

    fn peer(&self) -> String {
        self.coordinator.hosts.first().map(|h| self.coordinator.peer(h)).unwrap_or_default()
    }

    fn setup(&self, detail: impl Into<String>) -> Error {
        Error::Setup { peer: self.peer(), detail: detail.into() }
    }

    fn take(&self) -> Option<Flight> {
        self.flight.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn keep(&self, flight: Flight) {
        *self.flight.lock().unwrap_or_else(PoisonError::into_inner) = Some(flight);
    }

    /// Sessions with the coordinator and with all nodes that have metadata.
    async fn nodes(&self, context: &Context) -> Result<Vec<Node>> {
        let coordinator = self.coordinator.clone().with_application_name(&name_of(context));
        let session = Session::control(&coordinator).await.map_err(connecting)?;
        let mut first = Node::new(0, session, gid_of(context));
        let mut nodes = Vec::new();
        let others = first.others().await?;
        let opening = others.into_iter().map(|(group, host, port)| {
            let config = elsewhere(&coordinator, &host, port);
            async move {
                let session = Session::control(&config).await.map_err(connecting)?;
                Ok(Node::new(group, session, gid_of(context)))
            }
        });
        for node in join_all(opening).await {
            nodes.push(node?);
        }
        nodes.insert(0, first);
        Ok(nodes)
    }

    /// Everything that can be done while nobody is held.
    async fn prepare(&self, context: &Context) -> Result<Flight> {
        let mut nodes = self.nodes(context).await?;
        let Some(coordinator) = nodes.first_mut() else {
            return Err(self.setup("has no session"));
        };
        understood(&mut coordinator.session).await.map_err(|e| self.setup(e.to_string()))?;
        let group = Group::find(&mut coordinator.session, context).await?;
        for node in &mut nodes {
            node.expect(&group).await?;
        }
        Ok(Flight { nodes, group, prepared: false })
    }

    /// The shards are one whole group on the live side, all nodes say so, and each can take part.
    pub(super) async fn check(&self, context: &Context) -> Result<()> {
        // A try that was given up may have left its sessions.
        drop(self.take());
        let flight = self.prepare(context).await?;
        self.keep(flight);
        Ok(())
    }

    /// Stops whoever writes to these shards through Citus, within `wait`.
    pub(super) async fn hold(&self, context: &Context, wait: Duration) -> Result<()> {
        let mut flight = match self.take() {
            Some(flight) => flight,
            None => self.prepare(context).await?,
        };
        match flight.lock(wait).await {
            Ok(()) => {
                self.keep(flight);
                Ok(())
            }
            Err(held @ Error::Held { .. }) => {
                flight.let_go().await?;
                self.keep(flight);
                Err(held)
            }
            // Their servers roll back what the sessions had.
            Err(error) => Err(error),
        }
    }

    /// Swaps the placements in the transactions that hold the locks.
    pub(super) async fn swap(&self) -> Result<()> {
        let Some(mut flight) = self.take() else {
            return Err(self.setup("was not held, so nothing can be swapped there"));
        };
        if !flight.prepared {
            let (group, nodes) = (&flight.group, flight.nodes.iter_mut());
            all(nodes.map(|node| node.swap(group))).await?;
        }
        self.keep(flight);
        Ok(())
    }

    /// Swaps the placements, as far as to be prepared.
    pub(super) async fn switch(&self) -> Result<()> {
        let Some(mut flight) = self.take() else {
            return Err(self.setup("was not held, so nothing can be switched there"));
        };
        if !flight.prepared {
            let (group, nodes) = (&flight.group, flight.nodes.iter_mut());
            all(nodes.map(|node| node.prepare(group))).await?;
            flight.prepared = true;
        }
        self.keep(flight);
        Ok(())
    }

    /// Commits the swap if it was prepared; else lets go of what is held.
    pub(super) async fn release(&self, context: &Context) -> Result<()> {
        let mut flight = match self.take() {
            Some(mut flight) if !flight.prepared => {
                flight.let_go().await?;
                self.keep(flight);
                return Ok(());
            }
            Some(flight) => flight.nodes,
            None => self.nodes(context).await?,
        };
        all(flight.iter_mut().map(|node| node.end(Ended::Committed))).await
    }

    pub(super) async fn undo(&self, context: &Context) -> Result<()> {
        drop(self.take());
        let mut nodes = self.nodes(context).await?;
        let undone = nodes.iter_mut().map(|node| async move {
            node.end_predecessors().await?;
            node.end(Ended::RolledBack).await
        });
        all(undone).await
    }
}

impl Flight {
    async fn lock(&mut self, wait: Duration) -> Result<()> {
        let deadline = Deadline::after(wait);
        let group = &self.group;
        all(self.nodes.iter_mut().map(|node| node.look_out(group, wait))).await?;
        // On all nodes at once: no client has the lock on two of them, and of two moves of one
        // group that meet crosswise the one that has a limit gives up.
        let (left, strangers) = (deadline.left(), group.strangers());
        let locking = self.nodes.iter_mut().enumerate().map(|(place, node)| {
            // Whoever makes a co-located table or a partition takes the coordinator's lock as well.
            let then = if place == 0 { strangers.as_str() } else { "" };
            async move {
                let rows = node.lock(group, left, then).await?;
                group.refuse_strangers(node.session.peer(), &rows)
            }
        });
        all(locking).await
    }

    async fn let_go(&mut self) -> Result<()> {
        all(self.nodes.iter_mut().map(Node::let_go)).await
    }
}

/// Waits for all of them, and gives the first error: one node that is gone keeps no other from
/// being asked.
async fn all(work: impl Iterator<Item = impl Future<Output = Result<()>>>) -> Result<()> {
    join_all(work).await.into_iter().collect()
}

fn connecting(source: crate::pg::Error) -> Error {
    Error::Router { doing: "connecting".to_string(), source }
}

/// A mark of the job and its tables: a name of a job is unique in its home only, and two jobs of
/// one name may move groups of one cluster.
fn mark(context: &Context) -> u64 {
    let text = format!("{}\n{}", context.job, context.scope);
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// How our sessions are called in pg_stat_activity: within 63 bytes.
fn name_of(context: &Context) -> String {
    format!("walferry citus {:016x}", mark(context))
}

/// How the names of our prepared transactions begin; the node's group follows.
fn gid_of(context: &Context) -> String {
    format!("walferry_{}_{}_{:016x}", context.job, context.flip, mark(context))
}

/// The coordinator for people.
impl fmt::Display for Citus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "citus {}", self.peer())
    }
}

/// The host that a config leads to first.
fn first_host(config: &Config) -> Option<&Host> {
    config.hosts.first()
}
