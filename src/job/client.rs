//! Commands to a runner that may be alive on any host: a row in the home database, and NOTIFY.
//!
//! The asker keeps its row fresh; a runner ignores rows whose asker is gone, so that a cutover asked
//! for by a process that was killed does not happen an hour later.

use std::time::Duration;

use serde_json::Value;

use super::Result;
use super::error::Error;
use super::state::Phase;
use crate::clock::Deadline;
use crate::id::JobName;
use crate::pg::{Config, Purpose, Session};

/// A row whose asker was silent for so many seconds is not acted on.
pub const STALE_SECONDS: u32 = 5;

/// A command taken from the table.
#[derive(Clone, Debug)]
pub struct Asked {
    /// Its row.
    pub id: String,
    /// `flip`, `hold`, `release`, `stop`.
    pub verb: String,
    /// Its arguments.
    pub args: Value,
}

/// The asking side.
#[derive(Debug)]
pub struct Client {
    session: Session,
    job: JobName,
}

impl Client {
    /// Connects to the home database.
    pub async fn connect(home: &Config, job: &JobName) -> Result<Client> {
        let session = Session::connect(home, Purpose::Sql).await?;
        Ok(Client { session, job: job.clone() })
    }

    /// Writes the command down and wakes the runner. Gives its id.
    pub async fn post(&mut self, verb: &str, args: &Value) -> Result<String> {
        let row = self
            .session
            .query_one(
                "insert into walferry.command (job, verb, args) values ($1, $2, $3::jsonb) \
                 returning id",
                &[Some(self.job.as_str()), Some(verb), Some(&args.to_string())],
            )
            .await?;
        self.session
            .query_params("select pg_catalog.pg_notify($1, '')", &[Some(&self.job.channel())])
            .await?;
        Ok(row.string(0)?)
    }

    /// The command's outcome, if it has one; keeps the row fresh otherwise.
    pub async fn poll(&mut self, id: &str) -> Result<Option<Value>> {
        let row = self
            .session
            .query_opt(
                "update walferry.command set seen_at = clock_timestamp() where id = $1 \
                 returning state, result, error",
                &[Some(id)],
            )
            .await?;
        let Some(row) = row else { return Ok(Some(Value::Null)) };
        match row.str(0)? {
            "done" => {
                let text = row.opt(1)?.unwrap_or("null");
                serde_json::from_str(text).map(Some).map_err(|e| Error::State(e.to_string()))
            }
            "failed" => Err(Error::Remote(row.opt(2)?.unwrap_or("failed").to_string())),
            _ => Ok(None),
        }
    }

    /// Asks and waits up to `wait`.
    pub async fn ask(&mut self, verb: &str, args: &Value, wait: Duration) -> Result<Value> {
        let id = self.post(verb, args).await?;
        let deadline = Deadline::after(wait);
        loop {
            if let Some(result) = self.poll(&id).await? {
                return Ok(result);
            }
            if deadline.passed() {
                return Err(Error::NoAnswer { verb: verb.to_string(), wait });
            }
            tokio::time::sleep(Duration::from_millis(25)).await;
        }
    }

    /// The session, for questions about the same home database.
    pub fn session(&mut self) -> &mut Session {
        &mut self.session
    }
}

/// Takes the oldest command that waits and whose asker lives; marks it running. The runner's side.
pub async fn take(session: &mut Session, job: &JobName) -> Result<Option<Asked>> {
    let row = session
        .query_opt(
            &format!(
                "update walferry.command set state = 'running' where id = (\
                 select id from walferry.command where job = $1 and state = 'queued' \
                 and seen_at > clock_timestamp() - interval '{STALE_SECONDS} seconds' \
                 order by id limit 1) returning id, verb, args"
            ),
            &[Some(job.as_str())],
        )
        .await?;
    let Some(row) = row else { return Ok(None) };
    let args = serde_json::from_str(row.str(2)?).map_err(|e| Error::State(e.to_string()))?;
    Ok(Some(Asked { id: row.string(0)?, verb: row.string(1)?, args }))
}

/// Answers what a runner had taken and took with it when it died.
pub async fn fail_orphans(session: &mut Session, job: &JobName, phase: Phase) -> Result<()> {
    let said = match phase {
        Phase::CuttingOver => {
            "the runner ended in the middle of it; what it had begun is being undone, ask again"
                .to_string()
        }
        phase => format!("the runner ended before it could answer; the job is in phase {phase}"),
    };
    session
        .query_params(
            "update walferry.command set state = 'failed', error = $2 \
             where job = $1 and state = 'running'",
            &[Some(job.as_str()), Some(&said)],
        )
        .await?;
    Ok(())
}

/// Answers a command.
pub async fn answer(
    session: &mut Session,
    id: &str,
    outcome: std::result::Result<Value, String>,
) -> Result<()> {
    let (state, result, error) = match outcome {
        Ok(value) => ("done", Some(value.to_string()), None),
        Err(message) => ("failed", None, Some(message)),
    };
    session
        .query_params(
            "update walferry.command set state = $2, result = $3::jsonb, error = $4 where id = $1",
            &[Some(id), Some(state), result.as_deref(), error.as_deref()],
        )
        .await?;
    Ok(())
}

/// True if the asker of a command has been silent for longer than [`STALE_SECONDS`].
pub async fn asker_gone(session: &mut Session, id: &str) -> Result<bool> {
    let row = session
        .query_opt(
            &format!(
                "select 1 from walferry.command where id = $1 and \
                 seen_at > clock_timestamp() - interval '{STALE_SECONDS} seconds'"
            ),
            &[Some(id)],
        )
        .await?;
    Ok(row.is_none())
}
