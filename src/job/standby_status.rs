//! What is known of slots on standbys, and what becomes of them at a job's end (see `standbys`).

use std::time::Duration;

use serde::Serialize;

use super::Result;
use super::admit::{identifier, system_of};
use super::run::JobConfig;
use super::standbys::place;
use super::store::{JobRow, Store};
use crate::id::{JobName, Stream, quote_literal};
use crate::pg::{Config, Session};
use crate::source::slot;

/// What a clean-up waits for each standby.
const DROP_WAIT: Duration = Duration::from_secs(10);

/// One standby, as `status` shows it.
#[derive(Clone, Debug, Serialize)]
pub struct StandbyStatus {
    /// Host, port and database.
    pub standby: String,
    /// `ready`, `ahead`, `unheard`, `making`, `unfit` or `away`.
    pub state: String,
    /// Exclusive: what its slot was told last.
    pub slot_lsn: Option<String>,
    /// Why it is so, and what mends it.
    pub said: Option<String>,
    /// Seconds since it was looked at.
    pub age_seconds: f64,
}

/// The standbys of a job, as they were looked at last.
pub(super) async fn load(home: &mut Session, job: &JobName) -> Result<Vec<StandbyStatus>> {
    let there = "select pg_catalog.to_regclass('walferry.standby') is not null";
    if !home.query_one(there, &[]).await?.bool(0)? {
        return Ok(Vec::new());
    }
    let sql = "select standby, state, slot_lsn, said, \
         extract(epoch from clock_timestamp() - looked_at) \
         from walferry.standby where job = $1 order by standby";
    let rows = home.query_params(sql, &[Some(job.as_str())]).await?;
    rows.iter()
        .map(|row| {
            Ok(StandbyStatus {
                standby: row.string(0)?,
                state: row.string(1)?,
                slot_lsn: row.opt(2)?.map(str::to_string),
                said: row.opt(3)?.map(str::to_string),
                age_seconds: row.parse(4)?,
            })
        })
        .collect()
}

/// Drops the slots on standbys that are given. One that cannot be asked, and one that the job knows
/// and that is not given, is named in `left` with the statement.
pub(super) async fn clean_up(
    config: &JobConfig,
    row: &JobRow,
    store: &mut Store,
    dropped: &mut Vec<String>,
    left: &mut Vec<String>,
) -> Result<()> {
    let name = config.job.object(Stream::Forward);
    let by_hand = format!("select pg_drop_replication_slot({});", quote_literal(&name));
    let mut places = Vec::new();
    for standby in config.standbys.iter().chain(&config.decode_from) {
        let place = place(standby);
        let dropping = drop_on(standby, &name, row.source_system.as_deref());
        match tokio::time::timeout(DROP_WAIT, dropping).await {
            Ok(Ok(true)) => dropped.push(format!("replication slot {name} on standby {place}")),
            Ok(Ok(false)) => {}
            Ok(Err(error)) => {
                left.push(format!("standby {place} may still have the slot ({error}): {by_hand}"));
            }
            Err(_) => left.push(format!(
                "standby {place} may still have the slot (no answer within {} s): {by_hand}",
                DROP_WAIT.as_secs()
            )),
        }
        places.push(place);
    }
    let decoded_at = store.load_readings().await?.decoded_at;
    let known =
        load(&mut store.session, &config.job).await?.into_iter().map(|s| (s.standby, "--standby"));
    let decoded = decoded_at.into_iter().map(|standby| (standby, "--decode-from"));
    for (standby, option) in known.chain(decoded) {
        if !places.contains(&standby) {
            left.push(format!(
                "standby {standby} may still have the slot, as it was not given by {option}: \
                 {by_hand}"
            ));
        }
    }
    Ok(())
}

async fn drop_on(standby: &Config, name: &str, system: Option<&str>) -> Result<bool> {
    let mut session = Session::control(&standby.clone().labelled("standby")).await?;
    let found = system_of(&mut session).await?;
    // The slot of that name on another server is another job's.
    if system.is_some_and(|system| identifier(system) != identifier(&found)) {
        return Ok(false);
    }
    Ok(slot::drop(&mut session, name).await?)
}
