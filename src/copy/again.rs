//! Unlogged tables, copied a second time while writers are held.
//!
//! Their changes are in no log, so what was copied at first is as old as the job. The tables are
//! small as a rule (caches, queues), and what they hold has to be that of the moment of the switch:
//! so they are emptied and read again, all in one transaction of the other side.

use std::collections::HashMap;

use super::format::{self, Format, Wires};
use super::parts::{Part, read_sql, write_sql};
use super::run::check_target;
use super::transfer::connect_target;
use super::{Error, Result, store};
use crate::catalog::{Selection, Table, TableKind, tables};
use crate::id::QualifiedName;
use crate::pg::{Config, Purpose, Session};

/// Tables to be copied again, with the sessions for it: opened while nobody waits.
#[derive(Debug)]
pub struct Again {
    live: Session,
    dest: Session,
    items: Vec<Item>,
}

#[derive(Debug)]
struct Item {
    table: Table,
    with: Wires,
    /// `only `, or nothing where the other side's table is partitioned.
    only: &'static str,
}

impl Again {
    /// Looks whether `dest` can take these tables of `live`. Writes nothing.
    ///
    /// # Errors
    /// [`Error::Missing`] names a table or column that is not there; [`Error::Persistence`] a table
    /// that is logged there, as the rows would come back through the other direction's stream.
    pub async fn prepare(live: &Config, dest: &Config, unlogged: Vec<Table>) -> Result<Again> {
        let live = Session::connect(live, Purpose::Sql).await?;
        let (mut dest, replica) = connect_target(dest, true).await?;
        if !replica {
            // A seal that an earlier switch left lets such sessions pass.
            dest.execute("set walferry.applying = 'on'").await?;
        }
        let there = tables(&mut dest, &Selection::default()).await?;
        let there: HashMap<QualifiedName, Table> =
            there.into_iter().map(|table| (table.name.clone(), table)).collect();
        let encoding = |session: &Session| -> String {
            session.parameter("server_encoding").unwrap_or("UTF8").to_string()
        };
        let (from, into) = (encoding(&live), encoding(&dest));
        let mut items = Vec::with_capacity(unlogged.len());
        for table in unlogged {
            check_target(&there, &table)?;
            let Some(other) = there.get(&table.name) else { continue };
            if !other.unlogged && other.kind == TableKind::Plain {
                return Err(Error::Persistence { table: table.name });
            }
            let with = format::options(Format::Auto, (&from, &into), &table, other);
            let only = if other.kind == TableKind::Partitioned { "" } else { "only " };
            items.push(Item { table, with, only });
        }
        Ok(Again { live, dest, items })
    }

    /// How many tables.
    pub fn count(&self) -> usize {
        self.items.len()
    }

    /// Empties and fills them, in one transaction; gives the number of rows. May be repeated.
    pub async fn run(&mut self) -> Result<u64> {
        if self.items.is_empty() {
            return Ok(0);
        }
        self.dest.execute("begin").await?;
        let copied = self.fill().await;
        let end = if copied.is_ok() { "commit" } else { "rollback" };
        if self.dest.in_transaction() {
            self.dest.execute(end).await?;
        }
        copied
    }

    async fn fill(&mut self) -> Result<u64> {
        let mut rows = 0;
        // All before any: they may refer to each other.
        for item in &self.items {
            store::empty(&mut self.dest, &item.table.name, item.only).await?;
        }
        for item in &self.items {
            let whole = Part {
                table: item.table.name.clone(),
                part: 1,
                parts: 1,
                lo_block: 0,
                hi_block: None,
            };
            let sql = read_sql(&item.table, &whole, &item.with.read).map_err(Error::Mask)?;
            let mut read = self.live.copy_out(&sql).await?;
            let mut write = self.dest.copy_in(&write_sql(&item.table, &item.with.write)).await?;
            while let Some(data) = read.next().await? {
                write.write(&data).await?;
            }
            rows += write.finish().await?.iter().sum::<u64>();
        }
        Ok(rows)
    }
}
