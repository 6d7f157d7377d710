//! Who may come by a foreign server of postgres_fdw.

use super::place::Side;
use super::sqlmed::SqlMed;
use super::{Context, Error, Result};
use crate::id::quote_ident;
use crate::pg::Session;

impl SqlMed {
    /// Every role that a user mapping goes to may log in on the new side. Options of others'
    /// mappings are hidden from all but superusers; those are passed over.
    pub(super) async fn check_mappings(
        &self,
        session: &mut Session,
        context: &Context,
    ) -> Result<()> {
        let wrong = |source| Error::Router { doing: "reading user mappings".into(), source };
        let sql = "select coalesce((select o.option_value from \
             pg_catalog.pg_options_to_table(m.umoptions) o where o.option_name = 'user'), \
             nullif(m.usename, 'public')) from pg_catalog.pg_user_mappings m where m.srvname = $1 \
             and (m.umoptions is not null or m.usename in ('public', current_user) \
             or pg_catalog.current_setting('is_superuser') = 'on')";
        let rows = session.query_params(sql, &[Some(&self.server)]).await.map_err(wrong)?;
        let any = "select 1 from pg_catalog.pg_user_mappings where srvname = $1 limit 1";
        if session.query_opt(any, &[Some(&self.server)]).await.map_err(wrong)?.is_none() {
            return Err(self.setup(format!(
                "has no user mapping, so nobody can use it: create user mapping for ROLE server {} \
                 options (user '...', password '...')",
                quote_ident(&self.server)
            )));
        }
        let config = Side::destination(context).config(context);
        let there = Session::control(config).await;
        let mut there = there.map_err(Error::Destination)?;
        for row in rows {
            let Some(role) = row.opt(0).map_err(wrong)? else { continue };
            let sql = "select 1 from pg_catalog.pg_roles where rolname = $1 and rolcanlogin";
            let found = there.query_opt(sql, &[Some(role)]).await.map_err(Error::Destination)?;
            if found.is_none() {
                return Err(self.setup(format!(
                    "has a user mapping to role \"{role}\", which may not log in on {}: create \
                     it there first",
                    there.peer()
                )));
            }
        }
        Ok(())
    }
}
