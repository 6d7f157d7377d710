//! One side, and what its server says of itself.

use std::collections::HashMap;

use crate::limit::CATALOG_WAIT;
use crate::pg::{self, Config, Purpose, Session};

use super::Side;

/// A side with an open session.
pub(super) struct End {
    pub side: Side,
    pub config: Config,
    pub session: Session,
    pub facts: Facts,
    /// Settings as a session of the application finds them (walferry's own overrides some).
    pub settings: HashMap<String, String>,
}

/// What one row of questions tells.
#[derive(Clone, Debug)]
pub(super) struct Facts {
    pub dbname: String,
    pub in_recovery: bool,
    pub slots_used: i64,
    pub wal_senders_used: i64,
    pub origins_used: i64,
    pub connections_used: i64,
    pub system_identifier: Option<String>,
    pub started_at: String,
    pub database_bytes: u64,
    pub encoding: String,
    pub collate: String,
    pub ctype: String,
    /// `c` (libc), `i` (ICU) or `b` (built in).
    pub provider: String,
    pub locale: Option<String>,
    pub role: String,
    pub superuser: bool,
    pub replication: bool,
    /// Roles of managed services that this role is a member of.
    pub cloud_roles: Vec<String>,
    /// Roles of managed services that exist here.
    pub cloud_roles_known: Vec<String>,
}

const FACTS: &str = "select pg_catalog.current_database(), pg_catalog.pg_is_in_recovery(), \
     (select count(*) from pg_catalog.pg_replication_slots), \
     (select count(*) from pg_catalog.pg_stat_replication), \
     (select count(*) from pg_catalog.pg_replication_origin), \
     (select count(*) from pg_catalog.pg_stat_activity where backend_type = 'client backend'), \
     pg_catalog.pg_postmaster_start_time()::text, \
     pg_catalog.pg_database_size(d.oid), pg_catalog.pg_encoding_to_char(d.encoding), \
     d.datcollate, d.datctype, coalesce(pg_catalog.to_jsonb(d) ->> 'datlocprovider', 'c'), \
     coalesce(pg_catalog.to_jsonb(d) ->> 'datlocale', pg_catalog.to_jsonb(d) ->> 'daticulocale'), \
     r.rolname, r.rolsuper, r.rolreplication, \
     (select coalesce(pg_catalog.json_agg(c.rolname order by c.rolname), '[]') \
        from pg_catalog.pg_roles c where c.rolname = any (array['rds_superuser', \
        'rds_replication', 'cloudsqlsuperuser', 'azure_pg_admin', 'alloydbsuperuser']) \
        and pg_catalog.pg_has_role(r.oid, c.oid, 'member')), \
     (select coalesce(pg_catalog.json_agg(c.rolname order by c.rolname), '[]') \
        from pg_catalog.pg_roles c where c.rolname = any (array['rds_superuser', \
        'rds_replication', 'cloudsqlsuperuser', 'azure_pg_admin', 'alloydbsuperuser'])) \
     from pg_catalog.pg_database d, pg_catalog.pg_roles r \
     where d.datname = pg_catalog.current_database() and r.rolname = current_user";

impl End {
    /// Connects and asks the first questions.
    pub async fn open(side: Side, config: &Config) -> pg::Result<End> {
        let session = Session::connect(config, Purpose::Sql).await?;
        let mut session = session.with_patience(CATALOG_WAIT);
        let facts = Facts::read(&mut session).await?;
        let settings = settings(config, &mut session).await?;
        Ok(End { side, config: config.clone(), session, facts, settings })
    }

    /// A setting as text in its base unit, `None` where this version does not have it.
    pub fn setting(&self, name: &str) -> Option<&str> {
        self.settings.get(name).map(String::as_str)
    }

    /// A numeric setting; 0 where it is absent.
    pub fn number(&self, name: &str) -> i64 {
        self.setting(name).and_then(|s| s.parse().ok()).unwrap_or(0)
    }

    pub fn major_version(&self) -> u32 {
        self.session.major_version()
    }
}

impl Facts {
    async fn read(session: &mut Session) -> pg::Result<Facts> {
        let row = session.query_one(FACTS, &[]).await?;
        let names = |index| -> pg::Result<Vec<String>> {
            serde_json::from_str(row.str(index)?).map_err(|e| pg::Error::Result(e.to_string()))
        };
        let mut facts = Facts {
            dbname: row.string(0)?,
            in_recovery: row.bool(1)?,
            slots_used: row.parse(2)?,
            wal_senders_used: row.parse(3)?,
            origins_used: row.parse(4)?,
            connections_used: row.parse(5)?,
            system_identifier: None,
            started_at: row.string(6)?,
            database_bytes: row.parse(7)?,
            encoding: row.string(8)?,
            collate: row.string(9)?,
            ctype: row.string(10)?,
            provider: row.string(11)?,
            locale: row.opt(12)?.map(str::to_string),
            role: row.string(13)?,
            superuser: row.bool(14)?,
            replication: row.bool(15)?,
            cloud_roles: names(16)?,
            cloud_roles_known: names(17)?,
        };
        // Some managed services take the right to this function away.
        let sql = "select system_identifier::text from pg_catalog.pg_control_system()";
        if let Ok(row) = session.query_one(sql, &[]).await {
            facts.system_identifier = row.opt(0)?.map(str::to_string);
        }
        Ok(facts)
    }
}

/// Settings of a session that overrides none; of ours, where such a session cannot be had.
async fn settings(config: &Config, session: &mut Session) -> pg::Result<HashMap<String, String>> {
    let sql = "select name, setting from pg_catalog.pg_settings";
    let bare = match Session::connect(config, Purpose::PoolerAdmin).await {
        // Its own defaults may end it before it is asked.
        Ok(mut bare) => bare.query(sql).await.ok(),
        Err(_) => None,
    };
    let rows = match bare {
        Some(rows) => rows,
        None => session.query(sql).await?,
    };
    let mut settings = HashMap::new();
    for row in rows {
        settings.insert(row.string(0)?, row.opt(1)?.unwrap_or_default().to_string());
    }
    Ok(settings)
}
