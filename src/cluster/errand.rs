//! A task as an ordinary job: from which database to which, which tables, by which routes.
//!
//! An [`Errand`] is what is kept of a planned task; it holds names and no secrets. With the
//! cluster's [`Layout`], which knows how to reach its nodes, it becomes a [`Move`]: all that
//! `walferry run` and `walferry cutover` would be told. Here is the one place where kinds of
//! clusters differ in how they are moved.

use serde::{Deserialize, Serialize};

use super::plan::Task;
use super::read::{Address, Error, Found, Layout, Result};
use crate::id::QualifiedName;
use crate::pg::Config;
use crate::secret::{ExposeSecret, SecretString};

/// A planned task, as it is stored.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Errand {
    /// Co-location group.
    pub colocation: u32,
    /// The node it leaves.
    pub source: String,
    /// The node it goes to.
    pub target: String,
    /// The tables it is a part of, for people.
    pub tables: Vec<String>,
    /// Its shards.
    pub shards: Vec<u64>,
    /// Schema and name of each shard's relation on its node; empty where the task is a whole
    /// database.
    pub relations: Vec<(String, String)>,
    /// The database, where the task is a whole one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dbname: Option<String>,
    /// The option of the plproxy server that leads to it: `p16`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub partition: Option<String>,
    /// Bytes on disk when it was planned.
    pub bytes: u64,
    /// Rows, estimated then.
    pub rows: u64,
}

impl Errand {
    /// Of a task that was planned of this cluster.
    pub fn of(found: &Found, task: &Task) -> Errand {
        let relations = task.shards.iter().filter_map(|id| found.relations.get(id));
        let database = task.shards.first().and_then(|id| found.databases.get(id));
        Errand {
            colocation: task.colocation,
            source: task.source.clone(),
            target: task.target.clone(),
            tables: task.tables.clone(),
            shards: task.shards.clone(),
            relations: relations.map(|name| (name.schema.clone(), name.name.clone())).collect(),
            dbname: database.map(|database| database.dbname.clone()),
            partition: database.map(|database| database.option.clone()),
            bytes: task.bytes,
            rows: task.rows,
        }
    }

    /// The relations by name.
    pub fn names(&self) -> Vec<QualifiedName> {
        self.relations.iter().map(|(schema, name)| QualifiedName::new(schema, name)).collect()
    }

    /// Patterns that cover exactly its relations; none where it is a whole database.
    fn include(&self) -> Result<Vec<String>> {
        let special = |name: &str| name.contains(['"', '*', '?']);
        let pattern = |name: QualifiedName| {
            if special(&name.schema) || special(&name.name) {
                return Err(Error::Unmovable {
                    what: name.quoted(),
                    detail: "its name has one of \" * ?, which patterns of tables cannot tell \
                             from wildcards: rename it first"
                        .to_string(),
                });
            }
            Ok(name.quoted())
        };
        self.names().into_iter().map(pattern).collect()
    }
}

/// What an ordinary job is told of a task.
#[derive(Clone, Debug)]
pub struct Move {
    /// `--source`.
    pub source: Config,
    /// `--target`.
    pub target: Config,
    /// `--include`, one for each; none means the whole database.
    pub include: Vec<String>,
    /// `--route`, one for each; may hold passwords.
    pub routes: Vec<SecretString>,
    /// The target's database is the task's alone: made where it is missing, and dropped when what
    /// was begun is taken back, if it was made here.
    pub own_database: bool,
    /// `--tables-only`.
    pub tables_only: bool,
}

impl Move {
    /// What the errand means in this cluster. Reads nothing.
    ///
    /// `routers` are URIs of further databases that lead clients to the cluster as the one of its
    /// address does; they are led over with it.
    ///
    /// # Errors
    /// Where a node is not in the cluster any more, or a table's name cannot be told apart.
    pub fn of(
        address: &Address,
        layout: &Layout,
        errand: &Errand,
        routers: &[SecretString],
    ) -> Result<Move> {
        let source = layout.node(&errand.source)?.labelled(&errand.source);
        let target = layout.node(&errand.target)?.labelled(&errand.target);
        match address {
            Address::Citus { uri, .. } => Ok(Move {
                source,
                target,
                include: errand.include()?,
                routes: vec![SecretString::from(format!("citus:{}", uri.expose_secret()))],
                own_database: false,
                tables_only: true,
            }),
            Address::Plproxy { uri, cluster, .. } => {
                let missing = || Error::Unmovable {
                    what: errand.tables.join(", "),
                    detail: "it names no partition of a plproxy cluster: it was planned of \
                             another kind of cluster, so give the --cluster it was planned with"
                        .to_string(),
                };
                let dbname = errand.dbname.as_deref().ok_or_else(missing)?;
                let partition = errand.partition.as_deref().ok_or_else(missing)?;
                let route = |uri: &SecretString| {
                    let uri = uri.expose_secret();
                    SecretString::from(format!("plproxy:{uri},{cluster},{partition}"))
                };
                Ok(Move {
                    source: source.with_dbname(dbname),
                    target: target.with_dbname(dbname),
                    include: Vec::new(),
                    routes: std::iter::once(uri).chain(routers).map(route).collect(),
                    own_database: true,
                    tables_only: false,
                })
            }
            Address::File(_) => {
                let tables = errand.names();
                let routes = tables.iter().find_map(|table| layout.routes.get(table));
                Ok(Move {
                    source,
                    target,
                    include: errand.include()?,
                    routes: routes.cloned().unwrap_or_default(),
                    own_database: false,
                    tables_only: false,
                })
            }
        }
    }

    /// Clients of a plproxy partition are to read only while they are led over.
    pub fn read_only(&mut self) {
        for route in &mut self.routes {
            let text = route.expose_secret();
            if text.starts_with("plproxy:") {
                *route = SecretString::from(format!("{text},read-only"));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn layout() -> Layout {
        let node = |text| Config::parse_with(text, &|_| None).unwrap();
        let nodes = BTreeMap::from([
            ("a:1".to_string(), node("postgres://u:hush@a:1/x")),
            ("b:2".to_string(), node("postgres://u@b:2/x")),
        ]);
        Layout { nodes, home: None, routes: BTreeMap::new(), template: None }
    }

    fn errand() -> Errand {
        let (source, target) = ("a:1".to_string(), "b:2".to_string());
        Errand { source, target, ..Errand::default() }
    }

    #[test]
    fn a_group_of_shards_is_tables_alone_and_the_coordinators_route() {
        let address = Address::parse("citus:postgres://u:pw@c/shop").unwrap();
        let relations = vec![("public".to_string(), "t_102008".to_string())];
        let errand = Errand { relations, ..errand() };
        let moved = Move::of(&address, &layout(), &errand, &[]).unwrap();
        assert!(moved.tables_only && !moved.own_database);
        assert_eq!(moved.include.len(), 1);
        assert_eq!(moved.routes[0].expose_secret(), "citus:postgres://u:pw@c/shop");
        assert!(!format!("{moved:?}").contains("pw@"));
    }

    #[test]
    fn a_partition_is_a_whole_database_and_a_route_for_each_router() {
        let address = Address::parse("plproxy:postgres://u:pw@p/proxy,shop").unwrap();
        let routers = [SecretString::from("postgres://u@q/proxy".to_string())];
        let (dbname, partition) = (Some("db16".to_string()), Some("p16".to_string()));
        let errand = Errand { dbname, partition, ..errand() };
        let moved = Move::of(&address, &layout(), &errand, &routers).unwrap();
        assert_eq!((moved.source.dbname.as_str(), moved.target.dbname.as_str()), ("db16", "db16"));
        assert!(moved.include.is_empty() && moved.own_database);
        let mut reading = moved.clone();
        reading.read_only();
        assert!(reading.routes[1].expose_secret().ends_with("q/proxy,shop,p16,read-only"));
        let routes: Vec<&str> = moved.routes.iter().map(|r| r.expose_secret()).collect();
        let expected =
            ["plproxy:postgres://u:pw@p/proxy,shop,p16", "plproxy:postgres://u@q/proxy,shop,p16"];
        assert_eq!(routes, expected);
        assert!(!format!("{moved:?} {address:?}").contains("hush"));
        assert!(!format!("{moved:?} {address:?}").contains("pw@"));
        // A server whose last partition has gone is not in the definition any more.
        let mut layout = layout();
        layout.nodes.remove("a:1");
        assert!(Move::of(&address, &layout, &errand, &[]).is_err());
        layout.template = Some(Config::parse_with("postgres://u@p/proxy", &|_| None).unwrap());
        let moved = Move::of(&address, &layout, &errand, &[]).unwrap();
        assert_eq!((moved.source.hosts[0].host.as_str(), moved.source.hosts[0].port), ("a", 1));
    }

    #[test]
    fn tables_of_a_file_are_named_exactly_or_refused() {
        let address = Address::parse("file:nodes.toml").unwrap();
        let relations = vec![("Odd.one".to_string(), "t 1".to_string())];
        let errand = Errand { relations, ..errand() };
        let moved = Move::of(&address, &layout(), &errand, &[]).unwrap();
        assert_eq!(moved.include, ["\"Odd.one\".\"t 1\""]);
        let pattern: crate::catalog::select::Pattern = moved.include[0].parse().unwrap();
        assert!(pattern.matches(&QualifiedName::new("Odd.one", "t 1")));
        let relations = vec![("s".to_string(), "a*".to_string())];
        let said = Move::of(&address, &layout(), &Errand { relations, ..errand }, &[]);
        assert!(said.unwrap_err().to_string().contains("rename it first"));
    }
}
