//! Everything a job could leave behind on a server, by catalog queries: taken before and after, the
//! difference must be nothing.

use std::collections::BTreeSet;

use walferry::pg::{Config, Purpose, Session};

/// What a server and one of its databases hold besides rows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inventory {
    things: BTreeSet<String>,
}

/// Each gives a kind and what identifies one thing of it. to_jsonb and concat_ws, which takes any
/// type, keep them good for 10 to 18.
const QUERIES: &[&str] = &[
    "'slot', slot_name, database from pg_replication_slots",
    "'publication', pubname, to_jsonb(p) - 'oid' from pg_publication p",
    "'published', pubname, schemaname, tablename from pg_publication_tables",
    "'subscription', subname from pg_subscription",
    "'origin', roname from pg_replication_origin",
    "'schema', nspname, nspacl from pg_namespace where nspname !~ '^pg_(toast_)?temp_'",
    "'relation', c.oid::regclass, c.relkind, 'identity', c.relreplident, c.relpersistence, \
     c.relowner::regrole, c.relacl, c.reloptions \
     from pg_class c join pg_namespace n on n.oid = c.relnamespace \
     where n.nspname not in ('pg_catalog', 'information_schema', 'pg_toast') \
     and c.relpersistence <> 't'",
    "'trigger', tgrelid::regclass, tgname, tgenabled from pg_trigger where not tgisinternal",
    "'internal trigger', tgrelid::regclass, tgfoid::regproc, tgtype, tgenabled from pg_trigger \
     where tgisinternal",
    "'rule', ev_class::regclass, rulename, ev_enabled from pg_rewrite where rulename <> '_RETURN'",
    "'event trigger', evtname, evtenabled from pg_event_trigger",
    "'constraint', conrelid::regclass, conname, convalidated from pg_constraint \
     where conrelid <> 0",
    "'function', p.oid::regprocedure, md5(p.prosrc) from pg_proc p \
     join pg_namespace n on n.oid = p.pronamespace \
     where n.nspname not in ('pg_catalog', 'information_schema')",
    "'type', t.oid::regtype from pg_type t join pg_namespace n on n.oid = t.typnamespace \
     where n.nspname not in ('pg_catalog', 'information_schema', 'pg_toast') \
     and n.nspname !~ '^pg_temp_'",
    "'policy', polrelid::regclass, polname from pg_policy",
    "'extension', extname, extversion from pg_extension",
    "'role', rolname, to_jsonb(r) - 'oid' - 'rolpassword' from pg_roles r",
    "'member', roleid::regrole, member::regrole from pg_auth_members",
    "'database', datname, datallowconn, datconnlimit, datacl from pg_database",
    "'setting', d.datname, r.rolname, s.setconfig from pg_db_role_setting s \
     left join pg_database d on d.oid = s.setdatabase left join pg_roles r on r.oid = s.setrole",
    "'file setting', name, setting from pg_file_settings",
    "'default acl', to_jsonb(a) - 'oid' from pg_default_acl a",
    "'large object', oid from pg_largeobject_metadata",
    "'prepared transaction', gid from pg_prepared_xacts",
    "'advisory lock', classid, objid from pg_locks where locktype = 'advisory'",
    "'session', application_name from pg_stat_activity \
     where application_name like 'walferry%' and application_name <> 'walferry writer' and pid <> pg_backend_pid()",
];

impl Inventory {
    /// Lists what is there, once sessions that were closed a moment ago have ended: a server takes
    /// its time for that. What is still there after ten seconds is listed. As superuser.
    pub async fn take(uri: &str) -> Inventory {
        Self::once_gone(uri, "walferry%").await
    }

    /// The same in the middle of a job, whose runner's sessions stay.
    pub async fn take_beside_runner(uri: &str) -> Inventory {
        Self::once_gone(uri, "walferry").await
    }

    /// Once no session has a name like this.
    async fn once_gone(uri: &str, name: &str) -> Inventory {
        let config = Config::parse(uri).unwrap().with_application_name("inventory");
        let mut session = Session::connect(&config, Purpose::Sql).await.unwrap();
        let sql = format!(
            "select 1 from pg_stat_activity where application_name like '{name}' \
             and application_name <> 'walferry writer'"
        );
        for _ in 0..200 {
            if session.query(&sql).await.unwrap().is_empty() {
                break;
            }
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
        Inventory::now(uri).await
    }

    /// Lists what is there now, in the middle of a job too. As superuser.
    pub async fn now(uri: &str) -> Inventory {
        let config = Config::parse(uri).unwrap().with_application_name("inventory");
        let mut session = Session::connect(&config, Purpose::Sql).await.unwrap();
        let mut things = BTreeSet::new();
        for query in QUERIES {
            let (columns, from) = query.split_once(" from ").unwrap();
            let sql = format!("select concat_ws(' ', {columns}) from {from}");
            for row in session.query(&sql).await.unwrap() {
                things.insert(row.string(0).unwrap());
            }
        }
        Inventory { things }
    }

    /// What `after` has that this has not (`+`), and the other way round (`-`).
    pub fn diff(&self, after: &Inventory) -> Vec<String> {
        let gone = self.things.difference(&after.things).map(|thing| format!("- {thing}"));
        let come = after.things.difference(&self.things).map(|thing| format!("+ {thing}"));
        gone.chain(come).collect()
    }

    /// What acts on rows as they are written: triggers, a foreign key's own among them, and
    /// constraints. The same on both sides of a move. (18 has constraints for NOT NULL.)
    fn acting(&self) -> BTreeSet<&str> {
        let kinds = ["rule ", "trigger ", "internal trigger ", "constraint "];
        let things = self.things.iter().map(String::as_str);
        let acting = things.filter(|thing| kinds.iter().any(|kind| thing.starts_with(kind)));
        acting.filter(|t| !t.starts_with("constraint pg_") && !t.ends_with("_not_null t")).collect()
    }

    /// Where `other` differs in what acts, walferry's own (its tables, a fence's seal) left out.
    pub fn acts_unlike(&self, other: &Inventory) -> Vec<String> {
        let (ours, theirs) = (self.acting(), other.acting());
        let differ = ours.symmetric_difference(&theirs);
        differ.filter(|t| !t.contains("walferry")).map(ToString::to_string).collect()
    }

    /// What a job may leave on a target: without the moved tables and their kin, which are the
    /// point. Only what names walferry, and whatever belongs to the whole server.
    pub fn leftovers(&self, after: &Inventory) -> Vec<String> {
        let moved =
            ["relation", "rule", "trigger", "internal", "constraint", "function", "type", "schema"];
        let mut found = self.diff(after);
        found.retain(|thing| {
            let kind = thing.split(' ').nth(1).unwrap_or_default();
            thing.contains("walferry") || !moved.contains(&kind)
        });
        found
    }
}
