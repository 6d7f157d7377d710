//! What moves, by the coordinator's catalogs.

use std::collections::BTreeSet;

use super::{Error, Result, first_host};
use crate::id::{QualifiedName, quote_literal};
use crate::pg::{Config, Row, Session};
use crate::route::Context;
use crate::route::place::{Side, identity};

/// A shard's name ends in its number; of the table's name at least so many characters are left
/// before it, however long it was.
const NAME_CHARS: usize = 5;

/// A group of co-located shards on its way.
#[derive(Debug)]
pub(super) struct Group {
    /// Their numbers, ascending.
    pub(super) shards: Vec<u64>,
    /// Shards of the reference tables that they refer to.
    references: Vec<u64>,
    /// The logical tables of all of them, quoted.
    pub(super) tables: Vec<String>,
    /// Group of the node that has them.
    pub(super) from: i32,
    /// Group of the node that gets them.
    pub(super) to: i32,
    /// What their metadata lock goes by: place among the table's shards, and co-location id. `None`
    /// where shards are locked one by one.
    pub(super) lock: Option<(u64, u32)>,
    /// Their co-location group, and the least of their hash values: what they have in common.
    kin: (u32, Option<String>),
}

/// A shard as the coordinator has it.
struct Found {
    id: u64,
    table: QualifiedName,
    colocation: u32,
    least: Option<String>,
    placed: Vec<i32>,
}

const SHARDS: &str = "select s.shardid, n.nspname, c.relname, p.colocationid, s.shardminvalue, \
     (select pg_catalog.string_agg(l.groupid::text, ',') from pg_catalog.pg_dist_placement l \
        where l.shardid = s.shardid and l.shardstate <> 4) \
     from pg_catalog.pg_dist_shard s \
     join pg_catalog.pg_dist_partition p on p.logicalrelid = s.logicalrelid \
     join pg_catalog.pg_class c on c.oid = s.logicalrelid \
     join pg_catalog.pg_namespace n on n.oid = c.relnamespace where ";

impl Group {
    /// The job's tables as shards: all of one group, all on the live side.
    pub(super) async fn find(coordinator: &mut Session, context: &Context) -> Result<Group> {
        let peer = coordinator.peer().to_string();
        let setup = |detail: String| Error::Setup { peer: peer.clone(), detail };
        let found = named(coordinator, &context.tables).await?;
        let Some(first) = found.first() else {
            return Err(setup("the job has no tables, and so no shards to move".to_string()));
        };
        let (colocation, least) = (first.colocation, first.least.clone());
        if let Some(other) = found.iter().find(|s| (s.colocation, &s.least) != (colocation, &least))
        {
            return Err(setup(format!(
                "shards {} of {} and {} of {} are not of one group of co-located shards: give \
                 each group a job of its own",
                first.id, first.table, other.id, other.table
            )));
        }
        let shards: Vec<u64> =
            found.iter().map(|s| s.id).collect::<BTreeSet<_>>().into_iter().collect();
        let live = Side::live(context);
        let from = group_of(coordinator, live.config(context)).await?;
        let to = group_of(coordinator, Side::destination(context).config(context)).await?;
        if let Some(shard) = found.iter().find(|shard| shard.placed != [from]) {
            return Err(setup(format!(
                "shard {} of {} is placed on {:?}, and the job has it on the node of group {from}",
                shard.id, shard.table, shard.placed
            )));
        }
        takes_shards(coordinator, to, live == Side::Source).await?;
        let (references, mut tables) = references(coordinator, &shards).await?;
        tables.extend(found.iter().map(|shard| shard.table.quoted()));
        let lock = match colocation {
            0 => None,
            _ => Some((index_of(coordinator, first).await?, colocation)),
        };
        let kin = (colocation, least);
        let group = Group { shards, references, tables, from, to, lock, kin };
        group.is_whole(coordinator).await?;
        Ok(group)
    }

    /// Co-located shards stay together: all of them are in the job.
    async fn is_whole(&self, coordinator: &mut Session) -> Result<()> {
        let rows = coordinator.query(&self.strangers()).await.map_err(wrong)?;
        self.refuse_strangers(coordinator.peer(), &rows)
    }

    /// Asks for shards that are co-located with these and not of them.
    pub(super) fn strangers(&self) -> String {
        let (colocation, least) = &self.kin;
        let least = least.as_deref().map_or("null".to_string(), quote_literal);
        format!(
            "{SHARDS} p.colocationid = {colocation} and p.colocationid <> 0 \
             and s.shardminvalue is not distinct from {least} \
             and s.shardid <> all ({}) order by s.shardid",
            self.array()
        )
    }

    /// Of the answer to that.
    pub(super) fn refuse_strangers(&self, peer: &str, rows: &[Row]) -> Result<()> {
        let others = rows.iter().map(read).collect::<crate::pg::Result<Vec<_>>>().map_err(wrong)?;
        if others.is_empty() {
            return Ok(());
        }
        let names: Vec<String> =
            others.iter().map(|shard| format!("{} of {}", shard.id, shard.table)).collect();
        Err(Error::Setup {
            peer: peer.to_string(),
            detail: format!(
                "shards {} are co-located with those of the job and not in it (made since, or \
                 left out): they have to move together, so begin a new job with all of them",
                names.join(", ")
            ),
        })
    }

    /// The shards as an SQL array.
    pub(super) fn array(&self) -> String {
        array(&self.shards)
    }

    /// All that are locked, in the order in which Citus locks them.
    pub(super) fn locked(&self) -> String {
        array(&[self.references.as_slice(), self.shards.as_slice()].concat())
    }
}

fn array(shards: &[u64]) -> String {
    let list: Vec<String> = shards.iter().map(u64::to_string).collect();
    format!("array[{}]::int8[]", list.join(", "))
}

fn wrong(source: crate::pg::Error) -> Error {
    Error::Router { doing: "reading pg_dist_shard".to_string(), source }
}

fn read(row: &Row) -> crate::pg::Result<Found> {
    let placed = row.opt(5)?.unwrap_or_default();
    Ok(Found {
        id: row.parse(0)?,
        table: QualifiedName::new(row.str(1)?, row.str(2)?),
        colocation: row.parse(3)?,
        least: row.opt(4)?.map(str::to_string),
        placed: placed.split(',').filter_map(|text| text.parse().ok()).collect(),
    })
}

/// The shards that relations are, by their names. One that is none is an error.
async fn named(coordinator: &mut Session, tables: &[QualifiedName]) -> Result<Vec<Found>> {
    let number = |table: &QualifiedName| -> Option<u64> {
        table.name.rsplit_once('_').and_then(|(_, digits)| digits.parse().ok())
    };
    let ids: Vec<u64> = tables.iter().filter_map(number).collect();
    let sql = format!("{SHARDS} s.shardid = any ({}) order by s.shardid", array(&ids));
    let rows = coordinator.query(&sql).await.map_err(wrong)?;
    let found = rows.iter().map(read).collect::<crate::pg::Result<Vec<_>>>().map_err(wrong)?;
    let is_it = |table: &QualifiedName, shard: &Found| {
        let begins: String = shard.table.name.chars().take(NAME_CHARS).collect();
        number(table) == Some(shard.id)
            && shard.table.schema == table.schema
            && table.name.starts_with(&begins)
    };
    match tables.iter().find(|table| !found.iter().any(|shard| is_it(table, shard))) {
        Some(table) => Err(Error::Setup {
            peer: coordinator.peer().to_string(),
            detail: format!(
                "{table} is no shard that this cluster knows: include the shards of one group, \
                 such as public.orders_102008, and nothing else"
            ),
        }),
        None => Ok(found),
    }
}

/// The group of the node that a side is.
async fn group_of(coordinator: &mut Session, side: &Config) -> Result<i32> {
    let sql = "select n.groupid, n.nodename, n.nodeport from pg_catalog.pg_dist_node n \
         where n.noderole = 'primary'";
    let rows = coordinator.query(sql).await.map_err(wrong)?;
    let local = local_group(side).await?;
    let is_named = |row: &Row| {
        side.hosts.iter().any(|host| {
            row.str(1).is_ok_and(|name| name == host.host)
                && row.parse::<u16>(2).is_ok_and(|port| port == host.port)
        })
    };
    let is_local = |row: &Row| row.parse::<i32>(0).is_ok_and(|group| Some(group) == local);
    let row = rows.iter().find(|row| is_named(row)).or(rows.iter().find(|row| is_local(row)));
    let peer = first_host(side).map(|host| side.peer(host)).unwrap_or_default();
    let setup = |detail: String| Error::Setup { peer: peer.clone(), detail };
    let Some(row) = row else {
        return Err(setup(format!(
            "is no node of the cluster of {}: see its pg_dist_node",
            coordinator.peer()
        )));
    };
    let (name, port): (String, u16) = (row.string(1).map_err(wrong)?, row.parse(2).map_err(wrong)?);
    if !is_named(row) {
        // A group's number says which node, not of which cluster.
        let there = crate::cluster::read::elsewhere(side, &name, port);
        let (here, there) = (identity(side).await, identity(&there).await);
        if here.map_err(wrong)? != there.map_err(wrong)? {
            return Err(setup(format!(
                "says that it is the node of group {}, and that is {name}:{port}",
                row.str(0).map_err(wrong)?
            )));
        }
    }
    row.parse(0).map_err(wrong)
}

/// What a node says of itself; none where it has no metadata.
async fn local_group(side: &Config) -> Result<Option<i32>> {
    let mut session = Session::control(side).await.map_err(super::connecting)?;
    let there = "select pg_catalog.to_regclass('pg_catalog.pg_dist_local_group') is not null";
    if !session.query_one(there, &[]).await.map_err(wrong)?.bool(0).map_err(wrong)? {
        return Ok(None);
    }
    let sql = "select groupid from pg_catalog.pg_dist_local_group where groupid > 0";
    let row = session.query_opt(sql, &[]).await.map_err(wrong)?;
    row.map(|row| row.parse(0)).transpose().map_err(wrong)
}

/// A node that is not active gets nothing; one that is to be emptied may get its own back.
async fn takes_shards(coordinator: &mut Session, group: i32, forward: bool) -> Result<()> {
    let sql = format!(
        "select n.nodename || ':' || n.nodeport, n.isactive, \
         coalesce((pg_catalog.to_jsonb(n) ->> 'shouldhaveshards')::bool, true) \
         from pg_catalog.pg_dist_node n where n.noderole = 'primary' and n.groupid = {group}"
    );
    let row = coordinator.query_one(&sql, &[]).await.map_err(wrong)?;
    let (active, should) = (row.bool(1).map_err(wrong)?, row.bool(2).map_err(wrong)?);
    if active && (should || !forward) {
        return Ok(());
    }
    Err(Error::Setup {
        peer: coordinator.peer().to_string(),
        detail: format!(
            "node {} takes no shards: it is {}",
            row.str(0).map_err(wrong)?,
            if active { "marked so (citus_set_node_property)" } else { "not active" }
        ),
    })
}

/// Reference tables that the shards' tables refer to, at any distance: their shards, and the tables
/// quoted.
async fn references(coordinator: &mut Session, shards: &[u64]) -> Result<(Vec<u64>, Vec<String>)> {
    let sql = format!(
        "with recursive r(oid) as (select logicalrelid::pg_catalog.oid \
            from pg_catalog.pg_dist_shard where shardid = any ({}) \
            union select k.confrelid from r join pg_catalog.pg_constraint k \
            on k.conrelid = r.oid and k.contype = 'f') \
         select s.shardid, n.nspname, c.relname from r \
         join pg_catalog.pg_dist_partition p on p.logicalrelid::pg_catalog.oid = r.oid \
            and p.partmethod = 'n' and p.repmodel = 't' \
         join pg_catalog.pg_dist_shard s on s.logicalrelid = p.logicalrelid \
         join pg_catalog.pg_class c on c.oid = r.oid \
         join pg_catalog.pg_namespace n on n.oid = c.relnamespace order by s.shardid",
        array(shards)
    );
    let (mut ids, mut tables) = (Vec::new(), Vec::new());
    for row in coordinator.query(&sql).await.map_err(wrong)? {
        ids.push(row.parse(0).map_err(wrong)?);
        let name = QualifiedName::new(row.str(1).map_err(wrong)?, row.str(2).map_err(wrong)?);
        tables.push(name.quoted());
    }
    Ok((ids, tables))
}

/// The shard's place among its table's shards, by their ranges.
async fn index_of(coordinator: &mut Session, shard: &Found) -> Result<u64> {
    let Some(least) = &shard.least else { return Ok(0) };
    let sql = format!(
        "select count(*) from pg_catalog.pg_dist_shard s where s.logicalrelid = \
         (select logicalrelid from pg_catalog.pg_dist_shard where shardid = {}) \
         and s.shardminvalue::int8 < {}::int8",
        shard.id,
        quote_literal(least)
    );
    coordinator.query_one(&sql, &[]).await.map_err(wrong)?.parse(0).map_err(wrong)
}
