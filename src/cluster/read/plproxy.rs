//! A plproxy cluster, from the SQL/MED definition in a proxy database.
//!
//! Every partition is a whole database, and a group of its own; a node is a server. Clusters that
//! are defined by the functions plproxy.get_cluster_* cannot be changed by a statement and are
//! refused.
//!
//! <https://plproxy.github.io/config.html>

use std::collections::{BTreeMap, BTreeSet};

use super::{Database, Error, Found, Layout, Result, elsewhere, host_and_port, sizes};
use crate::cluster::model::{Cluster, Group, Node, Shard};
use crate::pg::{Config, Purpose, Session};

/// A partition by the cluster's definition.
struct Partition {
    id: u64,
    /// `p16`.
    option: String,
    /// The server it is on, as `host:port`.
    node: String,
    /// How we reach its database.
    config: Config,
}

pub(super) async fn read(proxy: &Config, cluster: &str, new_nodes: &[String]) -> Result<Found> {
    let partitions = partitions(proxy, cluster).await?;
    let nodes = nodes(&partitions, proxy, new_nodes)?;
    let (mut groups, mut databases) = (Vec::new(), BTreeMap::new());
    for Partition { id, option, node, config } in partitions {
        let (bytes, rows, load) = sizes::of_database(&config).await?;
        let table = format!("database {}", config.dbname);
        let shards = vec![Shard { id, table, bytes, rows, load }];
        groups.push(Group { colocation: 0, node, shards });
        databases.insert(id, Database { dbname: config.dbname, option });
    }
    let names: BTreeSet<&String> = nodes.keys().collect();
    let node = |name: &&String| Node { name: name.to_string(), takes_shards: true };
    let cluster = Cluster::new(names.iter().map(node).collect(), groups);
    Ok(Found {
        kind: "plproxy".to_string(),
        cluster,
        nodes,
        relations: BTreeMap::new(),
        databases,
        fixed: Vec::new(),
    })
}

pub(super) async fn layout(proxy: &Config, cluster: &str, new_nodes: &[String]) -> Result<Layout> {
    let partitions = partitions(proxy, cluster).await?;
    Ok(Layout {
        nodes: nodes(&partitions, proxy, new_nodes)?,
        home: Some(proxy.clone()),
        routes: BTreeMap::new(),
        template: Some(proxy.clone().with_dbname(EVERYWHERE)),
    })
}

/// A database that every server has; the proxy's is on its own server only.
const EVERYWHERE: &str = "postgres";

fn beside(proxy: &Config, host: &str, port: u16) -> Config {
    elsewhere(proxy, host, port).with_dbname(EVERYWHERE)
}

/// Every server of the definition, and those that are new, by their names.
fn nodes(
    partitions: &[Partition],
    proxy: &Config,
    new_nodes: &[String],
) -> Result<BTreeMap<String, Config>> {
    let mut nodes = BTreeMap::new();
    for partition in partitions {
        let config = || partition.config.clone().labelled("node");
        nodes.entry(partition.node.clone()).or_insert_with(config);
    }
    for name in new_nodes {
        let (host, port) = host_and_port(name)?;
        nodes.entry(name.clone()).or_insert_with(|| beside(proxy, host, port));
    }
    Ok(nodes)
}

/// What a connection string leaves out, libpq on the proxy's host would take from there; we take
/// the proxy's own host and role.
fn inherited(proxy: &Config) -> impl Fn(&str) -> Option<String> {
    let host = proxy.hosts.first().map(|host| host.host.clone());
    let user = proxy.user.clone();
    move |name| match name {
        "PGHOST" => host.clone(),
        "PGUSER" => Some(user.clone()),
        _ => None,
    }
}

/// In the order of their numbers.
async fn partitions(proxy: &Config, cluster: &str) -> Result<Vec<Partition>> {
    let mut session = Session::connect(proxy, Purpose::Sql).await?;
    let mut partitions = Vec::new();
    for (id, option, text) in options(&mut session, cluster).await? {
        let mut config = Config::parse_with(&text, &inherited(proxy))?;
        // The proxy's users are plproxy's business; we come as whoever we are to the proxy.
        config.user.clone_from(&proxy.user);
        config.password.clone_from(&proxy.password);
        config.passfile.clone_from(&proxy.passfile);
        let config = config.labelled("partition");
        let Some(host) = config.hosts.first() else { continue };
        let node = format!("{}:{}", host.host, host.port);
        partitions.push(Partition { id, option, node, config });
    }
    Ok(partitions)
}

/// Number, name and connection string of each partition.
async fn options(session: &mut Session, cluster: &str) -> Result<Vec<(u64, String, String)>> {
    let peer = session.peer().to_string();
    let other = |detail: String| Error::Other { peer: peer.clone(), detail };
    let sql = "select o.option_name, o.option_value from pg_catalog.pg_foreign_server s \
         join pg_catalog.pg_foreign_data_wrapper w on w.oid = s.srvfdw \
         cross join pg_catalog.pg_options_to_table(s.srvoptions) o \
         where s.srvname = $1 and w.fdwname = 'plproxy'";
    let mut partitions = Vec::new();
    for row in session.query_params(sql, &[Some(cluster)]).await? {
        let name = row.str(0)?;
        let digits = name.strip_prefix("partition_").or_else(|| name.strip_prefix('p'));
        if let Some(id) = digits.and_then(|digits| digits.parse().ok()) {
            partitions.push((id, name.to_string(), row.string(1)?));
        }
    }
    partitions.sort();
    if partitions.is_empty() {
        let sql = "select srvname from pg_catalog.pg_foreign_server s \
             join pg_catalog.pg_foreign_data_wrapper w on w.oid = s.srvfdw \
             where w.fdwname = 'plproxy' order by 1";
        let rows = session.query(sql).await?;
        let known: Vec<&str> = rows.iter().filter_map(|row| row.str(0).ok()).collect();
        let known = if known.is_empty() { "none".to_string() } else { known.join(", ") };
        return Err(other(format!(
            "there is no server \"{cluster}\" with partitions under the foreign data wrapper \
             plproxy (there is {known}). A cluster defined by functions plproxy.get_cluster_... \
             has to be turned into CREATE SERVER ... FOREIGN DATA WRAPPER plproxy first"
        )));
    }
    Ok(partitions)
}
