//! Views of the source: which read from which, so that what is left out takes its readers along,
//! and materialized views are filled in the right order. pg_dump tells neither.

use std::collections::{HashMap, HashSet};

use crate::id::QualifiedName;
use crate::pg::{Result, Session};

/// A table or view.
#[derive(Clone, Debug)]
struct Relation {
    name: QualifiedName,
    /// A materialized view.
    materialized: bool,
    /// One that has been filled.
    populated: bool,
    table: bool,
}

/// Tables, views, and what reads what.
#[derive(Debug, Default)]
pub struct Views {
    relations: HashMap<u32, Relation>,
    /// Reader to what it reads, in oid order.
    reads: HashMap<u32, Vec<u32>>,
}

impl Views {
    /// Asks the source, in two round trips.
    pub async fn read(session: &mut Session) -> Result<Views> {
        let mut views = Views::default();
        let relations = session
            .query(
                "select c.oid, n.nspname, c.relname, c.relkind = 'm' and c.relispopulated, \
                 c.relkind in ('r', 'p', 'f'), c.relkind = 'm' \
                 from pg_catalog.pg_class c \
                 join pg_catalog.pg_namespace n on n.oid = c.relnamespace \
                 where c.relkind in ('r', 'p', 'f', 'v', 'm') and c.relpersistence <> 't' \
                 and n.nspname not in ('pg_catalog', 'information_schema', 'walferry') \
                 and n.nspname !~ '^pg_(toast|temp)' \
                 and not exists (select 1 from pg_catalog.pg_depend d where d.objid = c.oid \
                    and d.classid = 'pg_catalog.pg_class'::pg_catalog.regclass \
                    and d.deptype = 'e') order by 2, 3",
            )
            .await?;
        for row in &relations {
            let name = QualifiedName::new(row.str(1)?, row.str(2)?);
            let (populated, table, materialized) = (row.bool(3)?, row.bool(4)?, row.bool(5)?);
            let relation = Relation { name, materialized, populated, table };
            views.relations.insert(row.parse(0)?, relation);
        }
        let reads = session
            .query(
                "select distinct r.ev_class, d.refobjid from pg_catalog.pg_rewrite r \
                 join pg_catalog.pg_class c on c.oid = r.ev_class and c.relkind in ('v', 'm') \
                 join pg_catalog.pg_depend d on d.objid = r.oid \
                    and d.classid = 'pg_catalog.pg_rewrite'::pg_catalog.regclass \
                    and d.refclassid = 'pg_catalog.pg_class'::pg_catalog.regclass \
                    and d.refobjid <> r.ev_class \
                 where r.rulename = '_RETURN' order by 1, 2",
            )
            .await?;
        for row in &reads {
            views.reads.entry(row.parse(0)?).or_default().push(row.parse(1)?);
        }
        Ok(views)
    }

    /// Tables (foreign ones included) that `keep` does not want, and the views that read from
    /// them at any distance: what pg_dump has to be told to leave out. Ordered by name.
    pub fn left_out(&self, keep: impl Fn(&QualifiedName) -> bool) -> Vec<QualifiedName> {
        let mut out: HashSet<u32> = self
            .relations
            .iter()
            .filter(|(_, relation)| relation.table && !keep(&relation.name))
            .map(|(oid, _)| *oid)
            .collect();
        loop {
            let readers: Vec<u32> = self
                .reads
                .iter()
                .filter(|(reader, reads)| {
                    !out.contains(reader) && reads.iter().any(|oid| out.contains(oid))
                })
                .map(|(reader, _)| *reader)
                .collect();
            if readers.is_empty() {
                break;
            }
            out.extend(readers);
        }
        let mut names: Vec<QualifiedName> =
            out.iter().filter_map(|oid| self.relations.get(oid)).map(|r| r.name.clone()).collect();
        names.sort();
        names
    }

    /// Tables (foreign ones included) that `keep` wants. Ordered by name.
    pub fn kept(&self, keep: impl Fn(&QualifiedName) -> bool) -> Vec<QualifiedName> {
        let tables = self.relations.values().filter(|relation| relation.table);
        let mut names: Vec<QualifiedName> =
            tables.map(|relation| relation.name.clone()).filter(|name| keep(name)).collect();
        names.sort();
        names
    }

    /// Materialized views that are filled, each after those it reads from.
    pub fn populated(&self) -> Vec<QualifiedName> {
        let filled = self.materialized().into_iter().filter(|(_, populated)| *populated);
        filled.map(|(name, _)| name).collect()
    }

    /// Materialized views, each after those it reads from, and whether it is filled.
    pub fn materialized(&self) -> Vec<(QualifiedName, bool)> {
        let mut oids: Vec<u32> = self.relations.keys().copied().collect();
        oids.sort_unstable();
        let mut seen = HashSet::new();
        let mut order = Vec::new();
        // A stack of our own: chains of views can be longer than ours should be.
        for oid in oids {
            let mut stack = vec![(oid, false)];
            while let Some((oid, read)) = stack.pop() {
                if read {
                    order.extend(self.relations.get(&oid).filter(|r| r.materialized));
                } else if seen.insert(oid) {
                    stack.push((oid, true));
                    let reads = self.reads.get(&oid).into_iter().flatten();
                    stack.extend(reads.map(|oid| (*oid, false)));
                }
            }
        }
        order.into_iter().map(|relation| (relation.name.clone(), relation.populated)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn views(relations: &[(u32, &str, bool)], reads: &[(u32, &[u32])]) -> Views {
        Views {
            relations: relations
                .iter()
                .map(|(oid, name, table)| {
                    let name = QualifiedName::new("s", *name);
                    let materialized = !table;
                    (*oid, Relation { name, materialized, populated: materialized, table: *table })
                })
                .collect(),
            reads: reads.iter().map(|(oid, reads)| (*oid, reads.to_vec())).collect(),
        }
    }

    fn names(list: &[QualifiedName]) -> Vec<&str> {
        list.iter().map(|name| name.name.as_str()).collect()
    }

    #[test]
    fn a_table_left_out_takes_its_readers_along() {
        let views = views(
            &[(1, "t", true), (2, "u", true), (3, "v", false), (4, "w", false), (5, "x", false)],
            &[(4, &[3]), (3, &[1, 2]), (5, &[2])],
        );
        assert_eq!(names(&views.left_out(|name| name.name != "t")), ["t", "v", "w"]);
        assert!(views.left_out(|_| true).is_empty());
    }

    #[test]
    fn materialized_views_are_filled_after_what_they_read() {
        let views = views(
            &[(1, "top", false), (2, "middle", false), (3, "low", false), (4, "t", true)],
            &[(1, &[2]), (2, &[3]), (3, &[4])],
        );
        assert_eq!(names(&views.populated()), ["low", "middle", "top"]);
    }
}
