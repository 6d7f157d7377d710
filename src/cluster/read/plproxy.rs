//! A plproxy cluster, from the SQL/MED definition in a proxy database.
//!
//! Every partition is a whole database, and a group of its own; a node is a server. Clusters that
//! are defined by the functions plproxy.get_cluster_* cannot be changed by a statement and are
//! refused.
//!
//! <https://plproxy.github.io/config.html>

use std::collections::{BTreeMap, BTreeSet};

use super::{Error, Found, Result, elsewhere, sizes};
use crate::cluster::model::{Cluster, Group, Node, Shard};
use crate::pg::{Config, Purpose, Session};

pub(super) async fn read(proxy: &Config, cluster: &str, new_nodes: &[String]) -> Result<Found> {
    let mut session = Session::connect(proxy, Purpose::Sql).await?;
    let partitions = partitions(&mut session, cluster).await?;
    let (mut groups, mut nodes) = (Vec::new(), BTreeMap::new());
    for (id, text) in partitions {
        let mut config = Config::parse_with(&text, &inherited(proxy))?;
        // The proxy's users are plproxy's business; we come as whoever we are to the proxy.
        config.user.clone_from(&proxy.user);
        config.password.clone_from(&proxy.password);
        config.passfile.clone_from(&proxy.passfile);
        let config = config.labelled("partition");
        let Some(host) = config.hosts.first() else { continue };
        let name = format!("{}:{}", host.host, host.port);
        nodes.entry(name.clone()).or_insert_with(|| config.clone().labelled("node"));
        let (bytes, rows, load) = sizes::of_database(&config).await?;
        let table = format!("database {}", config.dbname);
        let shards = vec![Shard { id, table, bytes, rows, load }];
        groups.push(Group { colocation: 0, node: name, shards });
    }
    for name in new_nodes {
        let place = name.rsplit_once(':').and_then(|(host, port)| Some((host, port.parse().ok()?)));
        let Some((host, port)) = place else {
            return Err(Error::Usage(format!("\"{name}\" is not HOST:PORT")));
        };
        nodes.entry(name.clone()).or_insert_with(|| elsewhere(proxy, host, port));
    }
    let names: BTreeSet<&String> = nodes.keys().collect();
    let node = |name: &&String| Node { name: name.to_string(), takes_shards: true };
    let cluster = Cluster::new(names.iter().map(node).collect(), groups);
    Ok(Found {
        kind: "plproxy".to_string(),
        cluster,
        nodes,
        relations: BTreeMap::new(),
        fixed: Vec::new(),
    })
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

/// Number and connection string of each partition.
async fn partitions(session: &mut Session, cluster: &str) -> Result<Vec<(u64, String)>> {
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
            partitions.push((id, row.string(1)?));
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
