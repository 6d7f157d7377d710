//! Whether the nodes have slots enough for what is to be run.
//!
//! A task takes a slot on its source, and for its way back one on its target; both stay until it
//! is finished. That they run out is told before anything begins, and not by the tenth task.

use std::collections::BTreeMap;

use super::setup::Setup;
use super::store::TaskRow;
use crate::cluster::TaskState;
use crate::cluster::schedule::Limits;
use crate::job::{Error, Result};
use crate::pg::Session;

/// Refuses tasks that need more slots than a node has left. A node that cannot be asked is passed
/// over: its tasks will say so.
pub(super) async fn refuse_short(
    setup: &Setup,
    tasks: &[TaskRow],
    limits: Limits,
    finish: bool,
) -> Result<()> {
    let mut needed: BTreeMap<&str, usize> = BTreeMap::new();
    for row in tasks.iter().filter(|row| row.state == TaskState::Init) {
        for node in [&row.errand.source, &row.errand.target] {
            *needed.entry(node).or_default() += 1;
        }
    }
    let mut short = Vec::new();
    for (node, count) in needed {
        let count = if finish { count.min(limits.per_node.max(1)) } else { count };
        let config = super::database::beside(&setup.layout.node(node)?);
        let Ok(mut session) = Session::control(&config).await else { continue };
        let sql = "select pg_catalog.current_setting('max_replication_slots')::int8 \
             - (select count(*) from pg_catalog.pg_replication_slots)";
        let free: i64 = session.query_one(sql, &[]).await?.parse(0)?;
        if free < count as i64 {
            short.push(format!("{node} has {free} of {count}"));
        }
    }
    if short.is_empty() {
        return Ok(());
    }
    Err(Error::SlotsShort { nodes: short })
}
