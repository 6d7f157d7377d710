//! What `--two-phase on` takes: a source that tells of PREPARE, a target that has room for it, and
//! a writer that may tag what it prepares.

use super::finding::Finding;
use super::{Check, Side};
use crate::id::Stream;
use crate::job::reading::choose;
use crate::pg;

const CODE: &str = "two-phase";
const OBJECT: &str = "prepared transactions";

impl Check<'_> {
    /// Nothing where it is not asked for.
    pub(super) async fn two_phase(&mut self) -> pg::Result<()> {
        if !self.options.two_phase {
            return Ok(());
        }
        let mut found = Vec::new();
        let major = self.source.major_version();
        if major < 15 {
            let message = format!(
                "the source's release {major} does not tell of PREPARE TRANSACTION; 15 is the first"
            );
            found.push(Finding::error(Side::Source, CODE, OBJECT, message).fix("--two-phase off"));
        } else if let Some(other) = self.other_reading().await {
            let message = format!(
                "it is read by {other}, and prepared transactions come as such by pgoutput over \
                 stream only"
            );
            found.push(Finding::error(Side::Source, CODE, OBJECT, message).fix("--two-phase off"));
        }
        let most = |setting: Option<&str>| setting.and_then(|s| s.parse::<u32>().ok()).unwrap_or(0);
        let here = most(self.source.setting("max_prepared_transactions"));
        let there = most(self.target.setting("max_prepared_transactions"));
        if there < here {
            let message = format!(
                "max_prepared_transactions is {there} on the target and {here} on the source: the \
                 stream stops at the first transaction that finds no room"
            );
            let fix = format!(
                "ALTER SYSTEM SET max_prepared_transactions = {here};\n-- and restart the target"
            );
            found.push(Finding::error(Side::Target, CODE, OBJECT, message).fix(fix));
        }
        let sql = "select pg_catalog.has_function_privilege( \
             'pg_catalog.pg_replication_origin_session_setup(text)', 'execute')";
        if !self.target.session.query_one(sql, &[]).await?.bool(0)? {
            let message = "the role may not use replication origins, without which what it \
                 prepares cannot be told from an application's own"
                .to_string();
            found.push(Finding::error(Side::Target, CODE, OBJECT, message).fix("--two-phase off"));
        }
        self.findings.append(&mut found);
        Ok(())
    }

    /// How the source would be read, if that is not by pgoutput over stream.
    async fn other_reading(&mut self) -> Option<String> {
        let (config, job) = (self.source.config.clone(), self.options.job.clone());
        let wanted = &self.options.wanted;
        let tables: Vec<_> = self.tables.iter().map(|table| table.name.clone()).collect();
        // What keeps it from being read at all has been told already.
        let chosen = choose(&config, &job, Stream::Forward, &tables, wanted).await.ok()?;
        let reading = chosen.reading;
        let other = reading.decoder != "pgoutput" || reading.transport != "stream";
        other.then(|| format!("{} over {}", reading.decoder, reading.transport))
    }
}
