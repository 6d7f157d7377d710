//! The database that is moved: an application's, with every awkward kind of table.

use crate::pg::{Config, Purpose, Result, Session};

const SQL: &str = include_str!("dataset.sql");

/// Creates the writer's schemas `bank`, `shop` and `Odd "Schema` in an existing database and fills
/// them on the server: about 5 MB for each unit of `scale` (1 for tests, 60 for the demo; 0 gives
/// tables with next to no rows). Fails if they exist. One transaction, then ANALYZE.
///
/// On PostgreSQL 10 the partitioned table is a plain one (its partitions could have no primary key
/// and its rows could not move), and below 12 the generated column is an ordinary one.
pub async fn create_schema(uri: &str, scale: u32) -> Result<()> {
    create_schema_for(uri, scale, u32::MAX).await
}

/// The same with nothing that a server of major version `oldest` does not know, for a move to one.
pub async fn create_schema_for(uri: &str, scale: u32, oldest: u32) -> Result<()> {
    let mut session = Session::connect(&Config::parse(uri)?, Purpose::Sql).await?;
    let major = session.major_version().min(oldest);
    let kept: Vec<String> = SQL.lines().filter_map(|line| for_version(line, major)).collect();
    // Few branches are locked by every transfer; ten at least keep eight connections busy.
    let branches = scale.clamp(10, 100);
    let sql = kept
        .join("\n")
        .replace(":scale", &scale.to_string())
        .replace(":branches", &branches.to_string());
    session.execute(&sql).await?;
    session.execute("analyze").await?;
    Ok(())
}

/// A line without its `-- from N` mark, or what an older server takes in its place.
fn for_version(line: &str, major: u32) -> Option<String> {
    let Some((sql, since)) = line.split_once(" -- from ") else { return Some(line.to_string()) };
    let since: u32 = since.trim().parse().unwrap_or(0);
    if major >= since {
        return Some(sql.to_string());
    }
    sql.split_once(" generated always").map(|(column, _)| format!("{column},"))
}

/// Checks what the application promises itself: the bank's four sums are equal, every item has its
/// order, and no index disagrees about a count. Gives what is wrong; nothing is good.
pub async fn broken_invariants(uri: &str) -> Result<Vec<String>> {
    let mut session = Session::connect(&Config::parse(uri)?, Purpose::Sql).await?;
    let row = session.query_one("select * from bank.totals", &[]).await?;
    let sums: Vec<String> = (0..row.len()).map(|i| row.string(i)).collect::<Result<_>>()?;
    let mut broken = Vec::new();
    if sums.iter().any(|sum| Some(sum) != sums.first()) {
        broken.push(format!(
            "bank: branches, tellers, accounts and history sum up to {}",
            sums.join(", ")
        ));
    }
    let orphans = "select count(*) from shop.items i \
         where not exists (select 1 from shop.orders o where o.id = i.order_id)";
    let row = session.query_one(orphans, &[]).await?;
    if row.str(0)? != "0" {
        broken.push(format!("shop: {} items without an order", row.str(0)?));
    }
    Ok(broken)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_servers_get_what_they_can_take() {
        let generated = "    total numeric generated always as (qty * price) stored, -- from 12";
        assert_eq!(for_version(generated, 11).unwrap(), "    total numeric,");
        assert!(for_version(generated, 12).unwrap().ends_with("stored,"));
        assert_eq!(for_version("partition by list (region) -- from 11", 10), None);
        assert_eq!(for_version("select 1;", 10).unwrap(), "select 1;");
    }
}
