//! What a cluster is made of, asked of the cluster itself.
//!
//! `citus` asks the coordinator's catalogs, `plproxy` the SQL/MED definition of a proxy database,
//! `file` a file that lists nodes and groups. Each then asks every node for sizes. Nothing is
//! written, and no transaction stays open.

mod citus;
mod file;
mod plproxy;
mod sizes;

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Serialize;

use super::errand::Errand;
use super::model::Cluster;
use crate::id::QualifiedName;
pub use citus::understood;

use crate::pg::{self, Config, Host};
use crate::secret::SecretString;

/// Where a cluster is described.
#[derive(Clone, Debug)]
pub enum Address {
    /// A Citus coordinator's database.
    Citus {
        /// How to reach it.
        coordinator: Config,
        /// The same as it was given, for routes.
        uri: SecretString,
    },
    /// A proxy database and the name of a plproxy cluster in it, and nodes that are not in its
    /// definition yet.
    Plproxy {
        /// The proxy database.
        proxy: Config,
        /// The same as it was given, for routes.
        uri: SecretString,
        /// `pg_foreign_server.srvname`.
        cluster: String,
        /// Each `host:port`: servers that partitions may be moved to.
        new_nodes: Vec<String>,
    },
    /// A TOML file of nodes and groups.
    File(PathBuf),
}

impl Address {
    /// Reads `citus:URI`, `plproxy:URI,CLUSTER[,HOST:PORT...]` or `file:PATH`.
    ///
    /// # Errors
    /// Of usage; a connection string that cannot be read is named without its password.
    pub fn parse(text: &str) -> Result<Address> {
        let usage = |what: &str| Error::Usage(what.to_string());
        match text.split_once(':') {
            Some(("citus", uri)) if !uri.is_empty() => Ok(Address::Citus {
                coordinator: Config::parse(uri)?.labelled("coordinator"),
                uri: SecretString::from(uri),
            }),
            Some(("plproxy", rest)) => {
                // Commas after the last slash only: a URI may list several hosts.
                let from = rest.rfind('/').unwrap_or_default();
                let comma = rest.get(from..).and_then(|tail| tail.find(',')).map(|at| from + at);
                let parts = comma.and_then(|at| Some((rest.get(..at)?, rest.get(at + 1..)?)));
                let (uri, rest) =
                    parts.ok_or_else(|| usage("the plproxy cluster's name is missing"))?;
                let mut words = rest.split(',').map(|word| word.trim().to_string());
                let cluster = words.next().filter(|name| !name.is_empty());
                Ok(Address::Plproxy {
                    proxy: Config::parse(uri)?.labelled("proxy"),
                    uri: SecretString::from(uri),
                    cluster: cluster
                        .ok_or_else(|| usage("the plproxy cluster's name is missing"))?,
                    new_nodes: words.collect(),
                })
            }
            Some(("file", path)) if !path.is_empty() => Ok(Address::File(PathBuf::from(path))),
            _ => Err(usage("there is no such kind of cluster")),
        }
    }

    /// True if a job that was planned of a cluster, [`Address::shown`] like that, is of one like
    /// this. Hosts may have other names elsewhere, and a file another path.
    pub fn is_like(&self, shown: &str) -> bool {
        let kind = shown.split(' ').next().unwrap_or_default();
        match self {
            Address::Citus { .. } => kind == "citus",
            Address::Plproxy { cluster, .. } => {
                kind == "plproxy" && shown.ends_with(&format!(", {cluster}"))
            }
            Address::File(_) => kind == "file",
        }
    }

    /// What of it may be stored and shown: what tells one kind and place from another.
    pub fn shown(&self) -> String {
        let place = |config: &Config| {
            let hosts: Vec<String> = config.hosts.iter().map(|h| config.peer(h)).collect();
            hosts.join(",")
        };
        match self {
            Address::Citus { coordinator, .. } => format!("citus {}", place(coordinator)),
            Address::Plproxy { proxy, cluster, .. } => {
                format!("plproxy {}, {cluster}", place(proxy))
            }
            Address::File(path) => format!("file {}", path.display()),
        }
    }
}

/// A whole database as a shard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Database {
    /// Its name.
    pub dbname: String,
    /// The option of the plproxy server that leads to it: `p16`.
    pub option: String,
}

/// How to reach what a cluster is made of, by its own word: its nodes are not asked.
#[derive(Clone, Debug)]
pub struct Layout {
    /// Each node by its name.
    pub nodes: BTreeMap<String, Config>,
    /// Where jobs are kept; none where a file names no `home`.
    pub home: Option<Config>,
    /// Routes by which clients find a group, by each of its tables. They may hold passwords.
    pub routes: BTreeMap<QualifiedName, Vec<SecretString>>,
    /// How a node is reached that the cluster does not name any more; its name is `host:port`.
    pub template: Option<Config>,
}

impl Layout {
    /// How to reach the node.
    ///
    /// # Errors
    /// The cluster has no such node.
    pub fn node(&self, name: &str) -> Result<Config> {
        if let Some(config) = self.nodes.get(name) {
            return Ok(config.clone());
        }
        let place = name.rsplit_once(':').and_then(|(host, port)| Some((host, port.parse().ok()?)));
        match (&self.template, place) {
            (Some(template), Some((host, port))) => Ok(elsewhere(template, host, port)),
            _ => Err(Error::Unmovable {
                what: format!("node {name}"),
                detail: format!(
                    "the cluster does not have it any more; it has {}",
                    self.nodes.keys().cloned().collect::<Vec<_>>().join(", ")
                ),
            }),
        }
    }
}

/// A cluster as it was found.
#[derive(Clone, Debug)]
pub struct Found {
    /// `citus 13.2-1`, `plproxy`, `file`.
    pub kind: String,
    /// What can be planned with.
    pub cluster: Cluster,
    /// How to reach each node, by its name; the database included where all shards of a node are
    /// in one.
    pub nodes: BTreeMap<String, Config>,
    /// The relation of each shard on its node; none where a shard is a whole database.
    pub relations: BTreeMap<u64, QualifiedName>,
    /// The database of each shard that is one.
    pub databases: BTreeMap<u64, Database>,
    /// Tables that stay where they are, with the reason.
    pub fixed: Vec<Fixed>,
}

/// A table whose shards are not moved.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Fixed {
    /// The table.
    pub table: String,
    /// What it is: `reference`, `local`, `append`, `range`, `replicated`, ...
    pub kind: &'static str,
    /// Why it stays, and what could be done.
    pub reason: String,
    /// The nodes that have a placement of it.
    pub on: Vec<String>,
}

/// A cluster that cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The text is no address of a cluster.
    #[error("{0}; a cluster is citus:URI, plproxy:URI,CLUSTER[,HOST:PORT...] or file:PATH")]
    Usage(String),
    /// A server or a connection string.
    #[error(transparent)]
    Pg(#[from] pg::Error),
    /// The server is not what it was said to be.
    #[error("{peer}: {detail}")]
    Other {
        /// Which server.
        peer: String,
        /// What it is, and what to give instead.
        detail: String,
    },
    /// A version that is not understood.
    #[error("{peer}: {what} is not understood: {detail}")]
    Version {
        /// Which server.
        peer: String,
        /// Name and version of the extension.
        what: String,
        /// What would be.
        detail: String,
    },
    /// Something that was planned cannot be moved as things are.
    #[error("{what}: {detail}")]
    Unmovable {
        /// A node, or tables.
        what: String,
        /// Why, and what to do.
        detail: String,
    },
    /// The file cannot be used.
    #[error("{path}: {detail}")]
    File {
        /// Which.
        path: String,
        /// Why, without the text of the line: it may hold a password.
        detail: String,
    },
}

/// Result with this room's error.
pub type Result<T> = std::result::Result<T, Error>;

/// Asks the cluster and all its nodes. A node that does not answer is an error: sizes that are not
/// known would make a plan of guesses.
pub async fn read(address: &Address) -> Result<Found> {
    match address {
        Address::Citus { coordinator, .. } => citus::read(coordinator).await,
        Address::Plproxy { proxy, cluster, new_nodes, .. } => {
            plproxy::read(proxy, cluster, new_nodes).await
        }
        Address::File(path) => file::read(path).await,
    }
}

/// Asks the cluster's own catalog, or file, and none of its nodes: a node that is down stops only
/// the tasks it takes part in.
pub async fn layout(address: &Address) -> Result<Layout> {
    match address {
        Address::Citus { coordinator, .. } => citus::layout(coordinator).await,
        Address::Plproxy { proxy, cluster, new_nodes, .. } => {
            plproxy::layout(proxy, cluster, new_nodes).await
        }
        Address::File(path) => file::layout(path),
    }
}

/// Shards that belong to a task's group and were not there when it was planned, in sentences.
pub async fn siblings(address: &Address, errand: &Errand) -> Result<Vec<String>> {
    match address {
        Address::Citus { coordinator, .. } => citus::siblings(coordinator, &errand.shards).await,
        // A database moves whole, and a file's groups are what it says.
        Address::Plproxy { .. } | Address::File(_) => Ok(Vec::new()),
    }
}

/// `host:port` as `(host, port)`.
fn host_and_port(name: &str) -> Result<(&str, u16)> {
    let place = name.rsplit_once(':').and_then(|(host, port)| Some((host, port.parse().ok()?)));
    place.ok_or_else(|| Error::Usage(format!("\"{name}\" is not HOST:PORT")))
}

/// The same role, options and database on another server.
pub fn elsewhere(config: &Config, host: &str, port: u16) -> Config {
    let mut other = config.clone();
    other.hosts = vec![Host { host: host.to_string(), hostaddr: None, port }];
    other.labelled("node")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_mistakes_show_the_form_and_no_secret() {
        let Ok(Address::Citus { coordinator: config, .. }) =
            Address::parse("citus:postgres://u:hush@c:1/db")
        else {
            panic!("not read")
        };
        assert_eq!((config.hosts[0].port, config.dbname.as_str()), (1, "db"));
        let text = "plproxy:postgres://u@a:1,b:2/db,shop, h:5433";
        let Ok(Address::Plproxy { proxy, cluster, new_nodes, .. }) = Address::parse(text) else {
            panic!("not read")
        };
        assert_eq!((proxy.hosts.len(), cluster.as_str()), (2, "shop"));
        assert_eq!(new_nodes, ["h:5433"]);
        assert!(matches!(Address::parse("file:a/b.toml"), Ok(Address::File(_))));
        for text in ["", "citus", "citus:", "plproxy:postgres://u:hush@h/db", "ring:x", "file:"] {
            let said = Address::parse(text).unwrap_err().to_string();
            assert!(said.contains("citus:URI") && !said.contains("hush"), "{text}: {said}");
        }
    }
}
