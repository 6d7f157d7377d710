//! What a role may not do with large objects.

use crate::id::quote_ident;
use crate::pg::{self, Session};

/// Objects that a role has no right to, and the statement that gives it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// How many.
    pub count: usize,
    /// For a superuser, or the objects' owner.
    pub fix: String,
}

/// More than so many are granted by a loop instead of a list.
const LISTED: usize = 20;

/// Those the role may not read; `None` if there are none.
pub async fn unreadable(session: &mut Session) -> pg::Result<Option<Refusal>> {
    lacking(session, "SELECT").await
}

/// Those the role may not write; `None` if there are none.
pub async fn unwritable(session: &mut Session) -> pg::Result<Option<Refusal>> {
    lacking(session, "UPDATE").await
}

/// True if a fence may lock their catalogs, which stops whoever writes to them: superusers only, as
/// nobody else has rights on catalogs beyond reading.
pub async fn are_lockable(session: &mut Session) -> pg::Result<bool> {
    let sql = "select rolsuper from pg_catalog.pg_roles where rolname = current_user";
    session.query_one(sql, &[]).await?.bool(0)
}

async fn lacking(session: &mut Session, right: &str) -> pg::Result<Option<Refusal>> {
    let sql = format!(
        "select m.oid, r.rolname from pg_catalog.pg_largeobject_metadata m, pg_catalog.pg_roles r \
         where r.rolname = current_user and not r.rolsuper \
         and pg_catalog.current_setting('lo_compat_privileges') <> 'on' \
         and not pg_catalog.pg_has_role(m.lomowner, 'usage') \
         and not exists (select 1 from pg_catalog.aclexplode(m.lomacl) x \
             where x.privilege_type = '{right}' and case when x.grantee = 0 then true \
             else pg_catalog.pg_has_role(x.grantee, 'usage') end) order by 1"
    );
    let rows = session.query(&sql).await?;
    let Some(row) = rows.first() else { return Ok(None) };
    let role = quote_ident(row.str(1)?);
    let fix = if rows.len() <= LISTED {
        let oids = rows.iter().map(|row| row.str(0)).collect::<pg::Result<Vec<_>>>()?;
        format!("GRANT {right} ON LARGE OBJECT {} TO {role};", oids.join(", "))
    } else {
        format!(
            "DO $$ DECLARE o oid; BEGIN FOR o IN SELECT oid FROM pg_largeobject_metadata LOOP \
             EXECUTE format('GRANT {right} ON LARGE OBJECT %s TO {role}', o); END LOOP; END $$;"
        )
    };
    Ok(Some(Refusal { count: rows.len(), fix }))
}
