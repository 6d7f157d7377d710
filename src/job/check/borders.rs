//! Foreign keys between tables that move alone and tables that stay: a moved table's key needs the
//! other table on the target, and no table that stays may point at one that goes.

use crate::catalog;
use crate::id::{QualifiedName, quote_ident};
use crate::pg;

use super::{Check, Finding, Side};

impl Check<'_> {
    pub(super) async fn borders(&mut self) -> pg::Result<()> {
        let mut needed = Vec::new();
        for found in catalog::foreign_keys(&mut self.source.session).await? {
            let (key, table, other) = (found.name, found.table, found.other);
            let selection = &self.options.selection;
            match (selection.has_schema(&table), selection.has_schema(&other)) {
                (true, false) => needed.push((key, table, other)),
                (false, true) => {
                    let message = format!(
                        "its foreign key {} refers to {other}, which would move without it: move \
                         both, or drop the key",
                        quote_ident(&key)
                    );
                    let object = format!("table {table}");
                    let found = Finding::error(Side::Source, "referred-from", object, message);
                    let drop = format!(
                        "ALTER TABLE {} DROP CONSTRAINT {};",
                        table.quoted(),
                        quote_ident(&key)
                    );
                    self.findings.push(found.fix(drop));
                }
                _ => {}
            }
        }
        let others: Vec<QualifiedName> = needed.iter().map(|(_, _, o)| o.clone()).collect();
        let there = catalog::oids(&mut self.target.session, &others).await?;
        for (key, table, other) in needed.iter().filter(|(_, _, o)| !there.contains_key(o)) {
            let message = format!(
                "is not here, and foreign key {} of {table} refers to it: make it, with its rows",
                quote_ident(key)
            );
            let object = format!("table {other}");
            self.findings.push(Finding::error(Side::Target, "not-there", object, message));
        }
        Ok(())
    }
}
