//! A Citus cluster, from its coordinator's catalogs.
//!
//! Releases 9 to 13 are understood by what their catalogs show: columns that came later are read
//! through to_jsonb, so that a release without them answers too. Shards are co-located when their
//! tables have the same colocationid and they the same range of hash values.
//!
//! <https://docs.citusdata.com/en/stable/develop/api_metadata.html>

use std::collections::{BTreeMap, BTreeSet};

use super::sizes::{self, Sizes};
use super::{Error, Fixed, Found, Layout, Result, elsewhere};
use crate::cluster::model::{Cluster, Group, Node, Shard};
use crate::cluster::shard;
use crate::id::QualifiedName;
use crate::pg::{Config, Purpose, Row, Session};

/// Releases whose catalogs are known.
const MAJORS: std::ops::RangeInclusive<u32> = 9..=13;

/// What is read, each with the columns that must be there.
const CATALOGS: &[(&str, &[&str])] = &[
    ("pg_dist_node", &["nodeid", "groupid", "nodename", "nodeport", "isactive", "noderole"]),
    ("pg_dist_partition", &["logicalrelid", "partmethod", "colocationid", "repmodel"]),
    ("pg_dist_shard", &["logicalrelid", "shardid", "shardminvalue", "shardmaxvalue"]),
    ("pg_dist_placement", &["placementid", "shardid", "shardstate", "groupid"]),
    ("pg_dist_local_group", &["groupid"]),
];

const NODES: &str = "select n.groupid, n.nodename, n.nodeport, \
     n.isactive and coalesce(to_jsonb(n) ->> 'shouldhaveshards', 'true')::bool \
     from pg_catalog.pg_dist_node n where n.noderole = 'primary' order by n.nodename, n.nodeport";

/// A line for each placement. State 4 marks a placement that is to be deleted.
const PLACEMENTS: &str = "select ns.nspname, c.relname, p.partmethod, p.repmodel, p.colocationid, \
     s.shardid, s.shardminvalue, s.shardmaxvalue, l.groupid, c.relpersistence, c.relkind \
     from pg_catalog.pg_dist_partition p \
     join pg_catalog.pg_class c on c.oid = p.logicalrelid \
     join pg_catalog.pg_namespace ns on ns.oid = c.relnamespace \
     left join pg_catalog.pg_dist_shard s on s.logicalrelid = p.logicalrelid \
     left join pg_catalog.pg_dist_placement l on l.shardid = s.shardid and l.shardstate <> 4 \
     order by ns.nspname, c.relname, s.shardid, l.groupid";

/// One shard of one table, as the catalogs have it.
struct Placed {
    table: QualifiedName,
    colocation: u32,
    id: u64,
    range: (Option<String>, Option<String>),
    /// Group ids of the nodes that have it.
    on: Vec<i32>,
}

pub(super) async fn read(config: &Config) -> Result<Found> {
    let mut session = Session::connect(config, Purpose::Sql).await?;
    let version = understood(&mut session).await?;
    let nodes = nodes(&mut session, config).await?;
    let (placed, fixed) = placements(&mut session, &nodes).await?;
    let mut by_group: BTreeMap<i32, Vec<&Placed>> = BTreeMap::new();
    for shard in &placed {
        by_group.entry(shard.on.first().copied().unwrap_or_default()).or_default().push(shard);
    }
    let mut sizes: BTreeMap<u64, Sizes> = BTreeMap::new();
    for (group, shards) in &by_group {
        let Some((_, config)) = nodes.get(group) else {
            let shard = shards.first().map_or(0, |s| s.id);
            return Err(Error::Other {
                peer: session.peer().to_string(),
                detail: format!(
                    "shard {shard} is placed on group {group}, which has no primary node in \
                     pg_dist_node; mend the metadata first"
                ),
            });
        };
        let names = shards.iter().map(|shard| (shard.id, shard.table.clone())).collect();
        sizes.extend(sizes::of_shards(config, &names).await?);
    }
    let groups = groups(&placed, &nodes, &sizes);
    let all = nodes.values().map(|(node, _)| node.clone()).collect();
    let relations = sizes.into_iter().map(|(id, sizes)| (id, sizes.relation)).collect();
    Ok(Found {
        kind: format!("citus {version}"),
        cluster: Cluster::new(all, groups),
        nodes: nodes.into_values().map(|(node, config)| (node.name, config)).collect(),
        relations,
        databases: BTreeMap::new(),
        fixed,
    })
}

pub(super) async fn layout(config: &Config) -> Result<Layout> {
    let mut session = Session::connect(config, Purpose::Sql).await?;
    understood(&mut session).await?;
    // What is made on a node, the coordinator too, is not for Citus to make on all of them.
    let config = shard::reach(config).await?;
    let nodes = nodes(&mut session, &config).await?;
    Ok(Layout {
        nodes: nodes.into_values().map(|(node, config)| (node.name, config)).collect(),
        home: Some(config),
        routes: BTreeMap::new(),
        template: None,
    })
}

/// Shards co-located with these and not among them: of tables that were distributed since, or of
/// partitions that were attached.
pub(super) async fn siblings(config: &Config, shards: &[u64]) -> Result<Vec<String>> {
    let mut session = Session::connect(config, Purpose::Sql).await?;
    let sql = "select distinct s.shardid, s.logicalrelid::regclass::text \
         from pg_catalog.pg_dist_shard o \
         join pg_catalog.pg_dist_partition op on op.logicalrelid = o.logicalrelid \
         join pg_catalog.pg_dist_partition p on p.colocationid = op.colocationid \
         join pg_catalog.pg_dist_shard s on s.logicalrelid = p.logicalrelid \
         and s.shardminvalue is not distinct from o.shardminvalue \
         and s.shardmaxvalue is not distinct from o.shardmaxvalue \
         where op.colocationid <> 0 and o.shardid = any ($1::bigint[]) \
         and s.shardid <> all ($1::bigint[]) order by 1";
    let list: Vec<String> = shards.iter().map(u64::to_string).collect();
    let array = format!("{{{}}}", list.join(","));
    let rows = session.query_params(sql, &[Some(&array)]).await?;
    let said = |row: &Row| {
        let (shard, table) = (row.str(0)?, row.str(1)?);
        Ok(format!("{table} is co-located with it since (shard {shard})"))
    };
    rows.iter().map(said).collect()
}

/// The extension's version, if this is a coordinator whose catalogs are known.
pub async fn understood(session: &mut Session) -> Result<String> {
    let peer = session.peer().to_string();
    let other = |detail: &str| Error::Other { peer: peer.clone(), detail: detail.to_string() };
    let sql = "select extversion from pg_catalog.pg_extension where extname = 'citus'";
    let Some(row) = session.query_opt(sql, &[]).await? else {
        return Err(other("this database has no extension citus; give the coordinator's database"));
    };
    let version = row.string(0)?;
    let major = version.split(['.', '-']).next().and_then(|text| text.parse().ok());
    let unknown = |detail: String| Error::Version {
        peer: peer.clone(),
        what: format!("citus {version}"),
        detail,
    };
    if !major.is_some_and(|major| MAJORS.contains(&major)) {
        return Err(unknown("releases 9 to 13 are".to_string()));
    }
    for (table, columns) in CATALOGS {
        let sql = "select attname from pg_catalog.pg_attribute where attnum > 0 and attrelid = \
             pg_catalog.to_regclass('pg_catalog.' || $1::text)";
        let rows = session.query_params(sql, &[Some(table)]).await?;
        let there: Vec<&str> = rows.iter().filter_map(|row| row.str(0).ok()).collect();
        if let Some(column) = columns.iter().find(|column| !there.contains(column)) {
            return Err(unknown(format!("its catalogs have no column {table}.{column}")));
        }
    }
    let sql = "select groupid from pg_catalog.pg_dist_local_group";
    let local: i32 = session.query_opt(sql, &[]).await?.map_or(Ok(0), |row| row.parse(0))?;
    if local != 0 {
        return Err(other(&format!(
            "this is a worker (group {local}): give the coordinator, whose group is 0"
        )));
    }
    Ok(version)
}

/// All primaries by their group id.
async fn nodes(session: &mut Session, config: &Config) -> Result<BTreeMap<i32, (Node, Config)>> {
    let mut nodes = BTreeMap::new();
    for row in session.query(NODES).await? {
        let (host, port): (String, u16) = (row.string(1)?, row.parse(2)?);
        let node = Node { name: format!("{host}:{port}"), takes_shards: row.bool(3)? };
        nodes.insert(row.parse(0)?, (node, elsewhere(config, &host, port)));
    }
    if nodes.is_empty() {
        return Err(Error::Other {
            peer: session.peer().to_string(),
            detail: "pg_dist_node lists no nodes; add them with citus_add_node".to_string(),
        });
    }
    Ok(nodes)
}

/// Shards that can move, and tables whose cannot. A table that cannot keeps all that are co-located
/// with it.
async fn placements(
    session: &mut Session,
    nodes: &BTreeMap<i32, (Node, Config)>,
) -> Result<(Vec<Placed>, Vec<Fixed>)> {
    let rows = session.query(PLACEMENTS).await?;
    let mut tables: BTreeMap<QualifiedName, Vec<&Row>> = BTreeMap::new();
    for row in &rows {
        tables.entry(QualifiedName::new(row.string(0)?, row.string(1)?)).or_default().push(row);
    }
    let (mut placed, mut fixed) = (Vec::new(), Vec::new());
    let mut keepers: BTreeMap<u32, String> = BTreeMap::new();
    for (table, rows) in tables {
        let mut shards: BTreeMap<u64, Placed> = BTreeMap::new();
        let (mut stays, mut colocation) = (None, 0);
        for row in rows {
            stays = stays.or(stays_of(row)?);
            colocation = row.parse(4)?;
            let Some(id) = row.parse_opt(5)? else { continue };
            let range = || Ok::<_, Error>((text(row, 6)?, text(row, 7)?));
            let shard = match shards.entry(id) {
                std::collections::btree_map::Entry::Occupied(entry) => entry.into_mut(),
                std::collections::btree_map::Entry::Vacant(entry) => entry.insert(Placed {
                    table: table.clone(),
                    colocation,
                    id,
                    range: range()?,
                    on: Vec::new(),
                }),
            };
            shard.on.extend(row.parse_opt::<i32>(8)?);
        }
        if shards.values().any(|shard| shard.on.len() != 1) {
            stays = stays.or(Some((
                "replicated",
                "its shards have several placements, or none: only tables with one placement a \
                 shard are moved; set citus.shard_replication_factor to 1 and make the table anew",
            )));
        }
        match stays {
            Some((kind, reason)) => {
                if colocation != 0 {
                    keepers.insert(colocation, table.to_string());
                }
                fixed.push(stay(&table, kind, reason.to_string(), shards.values(), nodes));
            }
            None => placed.extend(shards.into_values()),
        }
    }
    let (kept, placed): (Vec<Placed>, Vec<Placed>) =
        placed.into_iter().partition(|shard| keepers.contains_key(&shard.colocation));
    let mut by_table: BTreeMap<&QualifiedName, Vec<&Placed>> = BTreeMap::new();
    for shard in &kept {
        by_table.entry(&shard.table).or_default().push(shard);
    }
    for (table, shards) in by_table {
        let keeper = shards.first().and_then(|shard| keepers.get(&shard.colocation));
        let keeper = keeper.cloned().unwrap_or_default();
        let reason = format!("it is co-located with {keeper}, which cannot be moved");
        fixed.push(stay(table, "co-located", reason, shards.into_iter(), nodes));
    }
    fixed.sort();
    Ok((placed, fixed))
}

fn stay<'a>(
    table: &QualifiedName,
    kind: &'static str,
    reason: String,
    shards: impl Iterator<Item = &'a Placed>,
    nodes: &BTreeMap<i32, (Node, Config)>,
) -> Fixed {
    let groups: BTreeSet<i32> = shards.flat_map(|shard| shard.on.iter().copied()).collect();
    let names = groups.iter().filter_map(|group| nodes.get(group));
    let on = names.map(|(node, _)| node.name.clone()).collect();
    Fixed { table: table.to_string(), kind, reason, on }
}

fn text(row: &Row, column: usize) -> Result<Option<String>> {
    Ok(row.opt(column)?.map(str::to_string))
}

/// Why the table of this line stays where it is; none if it can move.
fn stays_of(row: &Row) -> Result<Option<(&'static str, &'static str)>> {
    let (method, model, colocation) = (row.str(2)?, row.str(3)?, row.parse::<u32>(4)?);
    let (persistence, kind) = (row.str(9)?, row.str(10)?);
    Ok(match (method, model) {
        ("n", "t") => Some(("reference", "a reference table is on every node already")),
        ("n", _) if colocation == 0 => {
            Some(("local", "a table of the coordinator's own has no shards on other nodes"))
        }
        ("a", _) => Some(("append", "an append-distributed table has no hash ranges to move by")),
        ("r", _) => Some(("range", "a range-distributed table has no hash ranges to move by")),
        ("h" | "n", _) if kind == "f" => {
            Some(("foreign", "a foreign table's rows are elsewhere: drop it or make it local"))
        }
        ("h" | "n", _) if persistence == "u" => Some((
            "unlogged",
            "changes of an unlogged table are in no log: ALTER TABLE ... SET LOGGED first",
        )),
        ("h" | "n", _) => None,
        _ => Some(("unknown", "its way of distribution is not known here")),
    })
}

/// Co-located shards together. A table without a colocation id is a group by itself.
fn groups(
    placed: &[Placed],
    nodes: &BTreeMap<i32, (Node, Config)>,
    sizes: &BTreeMap<u64, Sizes>,
) -> Vec<Group> {
    type Key<'a> = (u32, Option<&'a QualifiedName>, &'a (Option<String>, Option<String>), i32);
    let mut groups: BTreeMap<Key<'_>, Group> = BTreeMap::new();
    for shard in placed {
        let alone = (shard.colocation == 0).then_some(&shard.table);
        let on = shard.on.first().copied().unwrap_or_default();
        let node = nodes.get(&on).map(|(node, _)| node.name.clone()).unwrap_or_default();
        let group = groups.entry((shard.colocation, alone, &shard.range, on)).or_insert(Group {
            colocation: shard.colocation,
            node,
            shards: Vec::new(),
        });
        let sizes = sizes.get(&shard.id);
        group.shards.push(Shard {
            id: shard.id,
            table: shard.table.to_string(),
            bytes: sizes.map_or(0, |s| s.bytes),
            rows: sizes.map_or(0, |s| s.rows),
            load: sizes.map_or(0, |s| s.load),
        });
    }
    groups.into_values().collect()
}
