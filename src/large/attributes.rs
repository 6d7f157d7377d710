//! Owners, grants and comments of large objects.

use std::collections::HashMap;

use super::Result;
use super::find::array;
use crate::id::{quote_ident, quote_literal};
use crate::pg::{self, Pipeline, Session};

/// Objects asked for, and changed in one transaction.
const BATCH_OBJECTS: usize = 1_000;

/// How many are named one by one, where the role may not.
const NAMED: usize = 20;

/// What an object has beside its contents.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Attributes {
    owner: String,
    /// Quoted role (`null` for the owner), privilege, with grant option.
    grants: Vec<(Option<String>, String, bool)>,
    comment: Option<String>,
}

/// Gives `dest`'s objects the attributes of `live`'s. Gives what `dest`'s role may not do, or has
/// no role for.
pub(super) async fn level(
    live: &mut Session,
    dest: &mut Session,
    oids: &[u32],
    owners: bool,
) -> Result<Vec<String>> {
    let mut left = Vec::new();
    for asked in oids.chunks(BATCH_OBJECTS) {
        let (here, there) = (read(live, asked).await?, read(dest, asked).await?);
        let mut changes = Vec::new();
        for oid in asked {
            let (Some(want), Some(have)) = (here.get(oid), there.get(oid)) else { continue };
            let statements = statements(*oid, want, have, owners);
            if !statements.is_empty() {
                changes.push((*oid, statements));
            }
        }
        if changes.is_empty() || run(dest, changes.iter().flat_map(|c| &c.1)).await?.is_none() {
            continue;
        }
        // Somewhere a right or a role is missing: one by one, so that the others arrive.
        for (oid, statements) in changes {
            for statement in &statements {
                if let Some(error) = run(dest, [statement].into_iter()).await? {
                    left.push(format!("large object {oid}: {error} ({statement})"));
                }
            }
        }
    }
    let more = left.len().saturating_sub(NAMED);
    if more > 0 {
        left.truncate(NAMED);
        left.push(format!("and {more} more owners, grants and comments of large objects"));
    }
    Ok(left)
}

async fn read(session: &mut Session, oids: &[u32]) -> pg::Result<HashMap<u32, Attributes>> {
    let sql = format!(
        "select m.oid, pg_catalog.pg_get_userbyid(m.lomowner), \
         (select coalesce(pg_catalog.json_agg(pg_catalog.json_build_array(x.role, \
                 x.privilege_type, x.is_grantable) order by x.role, x.privilege_type), '[]') \
             from (select case when a.grantee = m.lomowner then null when a.grantee = 0 \
                     then 'public' else pg_catalog.quote_ident( \
                         pg_catalog.pg_get_userbyid(a.grantee)::text) end as role, \
                     a.privilege_type, a.is_grantable \
                 from pg_catalog.aclexplode(coalesce(m.lomacl, \
                     pg_catalog.acldefault('L', m.lomowner))) a) x), \
         pg_catalog.obj_description(m.oid, 'pg_largeobject') \
         from pg_catalog.pg_largeobject_metadata m where m.oid = any ({})",
        array(oids)
    );
    let mut all = HashMap::new();
    for row in session.query(&sql).await? {
        let attributes = Attributes {
            owner: row.string(1)?,
            grants: serde_json::from_str(row.str(2)?)
                .map_err(|e| pg::Error::Result(format!("grants of a large object: {e}")))?,
            comment: row.opt(3)?.map(str::to_string),
        };
        all.insert(row.parse(0)?, attributes);
    }
    Ok(all)
}

/// What makes `have` into `want`. The owner comes first, as its grants then are the owner's own.
fn statements(oid: u32, want: &Attributes, have: &Attributes, owners: bool) -> Vec<String> {
    let mut out = Vec::new();
    let owner = quote_ident(&want.owner);
    if owners && want.owner != have.owner {
        out.push(format!("alter large object {oid} owner to {owner}"));
    }
    if owners && want.grants != have.grants {
        let name = |role: &Option<String>| role.clone().unwrap_or_else(|| owner.clone());
        let mut roles: Vec<String> = have.grants.iter().map(|grant| name(&grant.0)).collect();
        roles.dedup();
        out.extend(roles.iter().map(|r| format!("revoke all on large object {oid} from {r}")));
        for (role, privilege, grantable) in &want.grants {
            let option = if *grantable { " with grant option" } else { "" };
            let role = name(role);
            out.push(format!("grant {privilege} on large object {oid} to {role}{option}"));
        }
    }
    if want.comment != have.comment {
        let text = want.comment.as_deref().map_or("null".to_string(), quote_literal);
        out.push(format!("comment on large object {oid} is {text}"));
    }
    out
}

/// All of them in one transaction; what the server says where a right or a role is missing.
async fn run<'a>(
    dest: &mut Session,
    statements: impl Iterator<Item = &'a String>,
) -> pg::Result<Option<String>> {
    let mut request = Pipeline::new();
    request.once("begin");
    request.once("set local synchronous_commit = off");
    for statement in statements {
        request.once(statement);
    }
    request.once("commit");
    let outcome = dest.exchange(request, |_| {}).await;
    if dest.in_transaction() {
        dest.execute("rollback").await?;
    }
    match outcome {
        Ok(()) => Ok(None),
        Err(error) if matches!(error.code(), Some("42501" | "42704")) => {
            Ok(Some(error.server().map_or_else(|| error.to_string(), |s| s.message.clone())))
        }
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(owner: &str, grants: &[(Option<&str>, &str)], comment: Option<&str>) -> Attributes {
        let grant = |(role, privilege): &(Option<&str>, &str)| {
            (role.map(str::to_string), privilege.to_string(), false)
        };
        Attributes {
            owner: owner.to_string(),
            grants: grants.iter().map(grant).collect(),
            comment: comment.map(str::to_string),
        }
    }

    #[test]
    fn only_what_differs_is_changed() {
        let want = of("a B", &[(None, "SELECT"), (Some("c"), "SELECT")], Some("it's"));
        assert!(statements(7, &want, &want, true).is_empty());
        let have = of("us", &[(None, "SELECT")], None);
        assert_eq!(
            statements(7, &want, &have, true),
            [
                "alter large object 7 owner to \"a B\"",
                "revoke all on large object 7 from \"a B\"",
                "grant SELECT on large object 7 to \"a B\"",
                "grant SELECT on large object 7 to c",
                "comment on large object 7 is 'it''s'",
            ]
        );
        let comment = ["comment on large object 7 is 'it''s'"];
        assert_eq!(statements(7, &want, &have, false), comment);
    }
}
