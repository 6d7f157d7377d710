//! A cluster from a file, for whatever has no catalog of its own.
//!
//! ```toml
//! [[node]]
//! name = "a"
//! uri = "postgres://admin@a/shop"
//! takes-shards = true     # the default
//!
//! [[group]]               # of tables that stay together
//! node = "a"
//! colocation = 1          # groups of one number are evened together by count; 0 by default
//! tables = ["public.orders_0", "public.lines_0"]
//! ```

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;

use super::{Error, Found, Result, sizes};
use crate::cluster::model::{Cluster, Group, Node, Shard};
use crate::id::QualifiedName;
use crate::pg::Config;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Listed {
    #[serde(default)]
    node: Vec<ListedNode>,
    #[serde(default)]
    group: Vec<ListedGroup>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct ListedNode {
    name: String,
    uri: String,
    #[serde(default = "yes")]
    takes_shards: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ListedGroup {
    node: String,
    #[serde(default)]
    colocation: u32,
    tables: Vec<String>,
}

fn yes() -> bool {
    true
}

pub(super) async fn read(path: &Path) -> Result<Found> {
    let wrong = |detail: String| Error::File { path: path.display().to_string(), detail };
    let text = std::fs::read_to_string(path).map_err(|e| wrong(format!("cannot be read: {e}")))?;
    let listed: Listed = toml::from_str(&text).map_err(|e| wrong(e.message().to_string()))?;
    let (mut nodes, mut configs) = (Vec::new(), BTreeMap::new());
    for node in listed.node {
        let config = Config::parse(&node.uri)?.labelled(&node.name);
        if configs.insert(node.name.clone(), config).is_some() {
            return Err(wrong(format!("node \"{}\" is there twice", node.name)));
        }
        nodes.push(Node { name: node.name, takes_shards: node.takes_shards });
    }
    let (mut groups, mut relations) = (Vec::new(), BTreeMap::new());
    for group in listed.group {
        let tables: Option<Vec<QualifiedName>> =
            group.tables.iter().map(|name| qualified(name)).collect();
        let tables = tables.filter(|tables| !tables.is_empty()).ok_or_else(|| {
            wrong("a group's tables are a list of schema.table, one at the least".to_string())
        })?;
        let Some(config) = configs.get(&group.node) else {
            return Err(wrong(format!("there is no [[node]] with name = \"{}\"", group.node)));
        };
        let sizes = sizes::of_tables(config, &tables).await?;
        let mut shards = Vec::new();
        for table in tables {
            let id = relations.len() as u64 + 1;
            let Some(sizes) = sizes.get(&table) else { continue };
            let (bytes, rows, load) = (sizes.bytes, sizes.rows, sizes.load);
            shards.push(Shard { id, table: table.to_string(), bytes, rows, load });
            relations.insert(id, table);
        }
        groups.push(Group { colocation: group.colocation, node: group.node, shards });
    }
    Ok(Found {
        kind: "file".to_string(),
        cluster: Cluster::new(nodes, groups),
        nodes: configs,
        relations,
        fixed: Vec::new(),
    })
}

/// `schema.table`, taken as it is written.
fn qualified(name: &str) -> Option<QualifiedName> {
    let (schema, table) = name.split_once('.')?;
    let good = !schema.is_empty() && !table.is_empty();
    good.then(|| QualifiedName::new(schema, table))
}
