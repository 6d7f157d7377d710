//! Its row in the home database, by which commands reach the runner too.

use std::fmt;
use std::str::FromStr;

use serde_json::{Value, json};

use super::Error;
use crate::id::JobName;
use crate::job::store::DDL_BOTH;
use crate::job::{self, Result};
use crate::pg::Session;

/// In schema `walferry` of the first target.
pub(super) const DDL: &str = "create table if not exists walferry.reshard (\
     name text primary key, stage text not null, plan text not null, error text, \
     flip jsonb, request jsonb, asked_at timestamptz, answer jsonb, \
     created_at timestamptz not null default now(), \
     updated_at timestamptz not null default now())";

/// Whoever asks keeps the request fresh; one that is older, in seconds, is nobody's any more.
const FRESH_SECONDS: u32 = 3;

/// Where it stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Pairs copy and follow.
    Running,
    /// A cutover has begun: whoever finds this, and holds the lease, undoes it.
    CuttingOver,
    /// Past the point of no return.
    Switched,
}

const NAMES: [(Stage, &str); 3] = [
    (Stage::Running, "running"),
    (Stage::CuttingOver, "cutting_over"),
    (Stage::Switched, "switched"),
];

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = NAMES.iter().find(|(stage, _)| stage == self).map_or("unknown", |(_, n)| n);
        f.write_str(name)
    }
}

impl FromStr for Stage {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, Self::Err> {
        let found = NAMES.iter().find(|(_, name)| *name == text).map(|(stage, _)| *stage);
        found.ok_or_else(|| format!("\"{text}\" is not a stage of this version of walferry"))
    }
}

/// Its row.
#[derive(Clone, Debug)]
pub(super) struct Row {
    pub stage: Stage,
    pub plan: String,
    pub error: Option<String>,
    /// Of the last cutover: its request, and once it is past the point of no return what it did.
    pub flip: Option<Value>,
    /// What somebody waits for.
    pub request: Option<Value>,
    pub answer: Option<Value>,
}

/// A session with the home database.
pub(super) struct Store {
    pub session: Session,
    name: JobName,
}

impl Store {
    pub fn new(session: Session, name: JobName) -> Store {
        Store { session, name }
    }

    pub async fn ensure(&mut self) -> Result<()> {
        job::store::ensure(&mut self.session, &[DDL_BOTH, DDL]).await
    }

    /// Writes it down. Harmless if it is there.
    pub async fn create(&mut self, plan: &str) -> Result<()> {
        let sql = "insert into walferry.reshard (name, stage, plan) values ($1, 'running', $2) \
             on conflict (name) do nothing";
        self.session.query_params(sql, &[Some(self.name.as_str()), Some(plan)]).await?;
        Ok(())
    }

    /// `None` where there is none.
    pub async fn load(&mut self) -> Result<Option<Row>> {
        let sql = format!(
            "select stage, plan, error, flip, case when asked_at > pg_catalog.clock_timestamp() \
                 - interval '{FRESH_SECONDS} s' then request end, answer \
             from walferry.reshard where name = $1"
        );
        let row = match self.session.query_opt(&sql, &[Some(self.name.as_str())]).await {
            Err(error) if matches!(error.code(), Some("42P01" | "3F000")) => return Ok(None),
            row => row?,
        };
        let Some(row) = row else { return Ok(None) };
        let read = |at: usize| -> Result<Option<Value>> {
            let value = row.opt(at)?.map(serde_json::from_str).transpose();
            value.map_err(|e| job::Error::State(format!("walferry.reshard: {e}")))
        };
        Ok(Some(Row {
            stage: row.str(0)?.parse().map_err(job::Error::State)?,
            plan: row.string(1)?,
            error: row.opt(2)?.map(str::to_string),
            flip: read(3)?,
            request: read(4)?,
            answer: read(5)?,
        }))
    }

    pub async fn load_existing(&mut self) -> Result<Row> {
        match self.load().await? {
            Some(row) => Ok(row),
            None => {
                let (name, peer) = (self.name.to_string(), self.session.peer().to_string());
                Err(Error::Unknown { name, peer }.into())
            }
        }
    }

    async fn set(&mut self, columns: &str, value: Option<&str>) -> Result<()> {
        let sql =
            format!("update walferry.reshard set {columns}, updated_at = now() where name = $1");
        self.session.query_params(&sql, &[Some(self.name.as_str()), value]).await?;
        Ok(())
    }

    /// One commit, which waits for the disk: that of stage switched is the point of no return.
    pub async fn set_stage(&mut self, stage: Stage, flip: &Value) -> Result<()> {
        let sql = "update walferry.reshard set stage = $2, flip = $3::jsonb, error = null, \
             updated_at = now() where name = $1";
        let (stage, flip) = (stage.to_string(), flip.to_string());
        let params = [Some(self.name.as_str()), Some(&*stage), Some(&*flip)];
        self.session.query_params(sql, &params).await?;
        Ok(())
    }

    pub async fn set_error(&mut self, error: Option<&str>) -> Result<()> {
        self.set("error = $2", error).await
    }

    /// A line for each step before it is done, one commit.
    pub async fn note(&mut self, attempt: &str, steps: &[&str]) -> Result<()> {
        let sql = "insert into walferry.journal (job, attempt, flip, step) \
             select $1, $2, 'forward', s from pg_catalog.jsonb_array_elements_text($3::jsonb) s";
        let steps = json!(steps).to_string();
        let params = [Some(self.name.as_str()), Some(attempt), Some(&*steps)];
        self.session.query_params(sql, &params).await?;
        Ok(())
    }

    /// Asks the runner, or says that one still waits; nothing once this attempt was answered.
    pub async fn ask(&mut self, request: &Value) -> Result<()> {
        let sql = "update walferry.reshard set request = $2::jsonb, \
             asked_at = pg_catalog.clock_timestamp() where name = $1 \
             and (answer ->> 'attempt' is null \
                 or answer ->> 'attempt' is distinct from $2::jsonb ->> 'attempt')";
        let params = [Some(self.name.as_str()), Some(&*request.to_string())];
        self.session.query_params(sql, &params).await?;
        Ok(())
    }

    /// Nobody waits any more.
    pub async fn forget(&mut self) -> Result<()> {
        self.set("request = $2::jsonb", None).await
    }

    pub async fn answer(&mut self, answer: &Value) -> Result<()> {
        self.set("request = null, answer = $2::jsonb", Some(&answer.to_string())).await
    }

    pub async fn delete(&mut self) -> Result<()> {
        let sql = "delete from walferry.reshard where name = $1";
        match self.session.query_params(sql, &[Some(self.name.as_str())]).await {
            // It went with the schema.
            Err(error) if matches!(error.code(), Some("42P01" | "3F000")) => Ok(()),
            deleted => Ok(deleted.map(|_| ())?),
        }
    }
}
