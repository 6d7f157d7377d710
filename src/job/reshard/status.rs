//! Where it stands, by what is stored.

use serde::Serialize;
use serde_json::Value;

use super::Reshard;
use super::store::Store;
use crate::job::{Result, lease};
use crate::pg::Session;

/// All of it.
#[derive(Clone, Debug, Serialize)]
pub struct Status {
    /// Its name.
    pub name: String,
    /// `running`, `cutting_over` or `switched`.
    pub stage: String,
    /// What stopped it last.
    pub error: Option<String>,
    /// The backend on the home that holds its lease, while a runner is alive.
    pub runner: Option<String>,
    /// The last cutover: barriers and how long writers were held, once it was made.
    pub flip: Option<Value>,
    /// Each pair that has begun.
    pub pairs: Vec<PairStatus>,
}

/// One pair.
#[derive(Clone, Debug, Serialize)]
pub struct PairStatus {
    /// Its job.
    pub job: String,
    /// Its phase.
    pub phase: String,
    /// Bytes of log between the source's end and what is applied.
    pub lag_bytes: Option<i64>,
    /// What keeps it.
    pub error: Option<String>,
    /// Rows copied so far.
    pub copied_rows: i64,
}

/// Reads it. Asks the targets only.
///
/// # Errors
/// Where there is none of that name, or a target cannot be reached.
pub async fn status(reshard: &Reshard) -> Result<Status> {
    let mut store = Store::new(Session::control(reshard.home()?).await?, reshard.name.clone());
    let row = store.load_existing().await?;
    let runner = lease::holder(&mut store.session, &reshard.name).await?;
    let mut pairs = Vec::new();
    for target in &reshard.targets {
        let mut session = Session::control(target).await?;
        let sql = "select j.name, j.phase, s.lag_bytes, coalesce(j.error, s.error), \
             (select coalesce(sum(rows), 0) from walferry.table_copy c where c.job = j.name) \
             from walferry.job j left join walferry.stream s on s.job = j.name \
                 and s.stream = 'forward' \
             where j.name ~ ('^' || $1::text || '_[0-9]+_[0-9]+$') order by j.created_at, j.name";
        let rows = match session.query_params(sql, &[Some(reshard.name.as_str())]).await {
            // Not begun there.
            Err(error) if matches!(error.code(), Some("42P01" | "3F000")) => continue,
            rows => rows?,
        };
        for row in &rows {
            pairs.push(PairStatus {
                job: row.string(0)?,
                phase: row.string(1)?,
                lag_bytes: row.parse_opt(2)?,
                error: row.opt(3)?.map(str::to_string),
                copied_rows: row.parse(4)?,
            });
        }
    }
    let stage = row.stage.to_string();
    let name = reshard.name.to_string();
    Ok(Status { name, stage, error: row.error, runner, flip: row.flip, pairs })
}
