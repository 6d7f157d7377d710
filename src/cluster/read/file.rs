//! A cluster from a file, for whatever has no catalog of its own.
//!
//! ```toml
//! home = "postgres://admin@c/walferry"   # where jobs are kept; without it plans are only printed
//!
//! [[node]]
//! name = "a"
//! uri = "postgres://admin@a/shop"
//! takes-shards = true     # the default
//!
//! [[group]]               # of tables that stay together
//! node = "a"
//! colocation = 1          # groups of one number are evened together by count; 0 by default
//! tables = ["public.orders_0", "public.lines_0"]
//! route = ["fdw:postgres://admin@r/app,orders_0"]   # as --route of cutover, led over with it
//! ```
//!
//! A file is its owner's: that a group has moved is told, and written there by hand.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;

use super::{Error, Found, Layout, Result, sizes};
use crate::cluster::model::{Cluster, Group, Node, Shard};
use crate::id::QualifiedName;
use crate::pg::Config;
use crate::secret::SecretString;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Listed {
    home: Option<String>,
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
    #[serde(default)]
    route: Vec<String>,
}

impl ListedGroup {
    /// Its tables by name.
    fn names(&self, path: &Path) -> Result<Vec<QualifiedName>> {
        let tables: Option<Vec<QualifiedName>> =
            self.tables.iter().map(|name| qualified(name)).collect();
        tables.filter(|tables| !tables.is_empty()).ok_or_else(|| {
            let detail = "a group's tables are a list of schema.table, one at the least";
            wrong(path, detail.to_string())
        })
    }
}

fn yes() -> bool {
    true
}

fn wrong(path: &Path, detail: String) -> Error {
    Error::File { path: path.display().to_string(), detail }
}

/// The file, and how its nodes are reached.
fn listed(path: &Path) -> Result<(Listed, BTreeMap<String, Config>)> {
    let text = std::fs::read_to_string(path);
    let text = text.map_err(|e| wrong(path, format!("cannot be read: {e}")))?;
    let listed: Listed = toml::from_str(&text).map_err(|e| wrong(path, e.message().to_string()))?;
    let mut configs = BTreeMap::new();
    for node in &listed.node {
        let config = Config::parse(&node.uri)?.labelled(&node.name);
        if configs.insert(node.name.clone(), config).is_some() {
            return Err(wrong(path, format!("node \"{}\" is there twice", node.name)));
        }
    }
    Ok((listed, configs))
}

pub(super) async fn read(path: &Path) -> Result<Found> {
    let (listed, configs) = listed(path)?;
    let node = |node: ListedNode| Node { name: node.name, takes_shards: node.takes_shards };
    let nodes = listed.node.into_iter().map(node).collect();
    let (mut groups, mut relations) = (Vec::new(), BTreeMap::new());
    for group in listed.group {
        let tables = group.names(path)?;
        let Some(config) = configs.get(&group.node) else {
            let detail = format!("there is no [[node]] with name = \"{}\"", group.node);
            return Err(wrong(path, detail));
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
        databases: BTreeMap::new(),
        fixed: Vec::new(),
    })
}

pub(super) fn layout(path: &Path) -> Result<Layout> {
    let (listed, nodes) = listed(path)?;
    let mut routes: BTreeMap<QualifiedName, Vec<SecretString>> = BTreeMap::new();
    for group in &listed.group {
        for table in group.names(path)? {
            let given = group.route.iter().map(|route| SecretString::from(route.as_str()));
            routes.insert(table, given.collect());
        }
    }
    let home = listed.home.map(|uri| Config::parse(&uri)).transpose()?;
    let home = home.map(|home| home.labelled("home"));
    Ok(Layout { nodes, home, routes, template: None })
}

/// `schema.table`, taken as it is written.
fn qualified(name: &str) -> Option<QualifiedName> {
    let (schema, table) = name.split_once('.')?;
    let good = !schema.is_empty() && !table.is_empty();
    good.then(|| QualifiedName::new(schema, table))
}
