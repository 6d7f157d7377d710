//! Commands to a runner that may be alive on any host: a row in the home database, and NOTIFY,
//! both ways. The row is looked at from time to time all the same: what is notified may be lost.
//!
//! The asker keeps its row fresh; a runner ignores rows whose asker is gone, so that a cutover
//! asked for by a process that was killed does not happen an hour later.

use std::time::Duration;

use serde_json::{Value, json};

use super::error::Error;
use super::state::Phase;
use super::store::{JobRow, Store};
use super::{Gone, Result, lease};
use crate::clock::Deadline;
use crate::fault::{Fault, Faulty};
use crate::id::{JobName, quote_ident};
use crate::pg::{Config, Session};

/// A row whose asker was silent for so many seconds is not acted on.
pub const STALE_SECONDS: u32 = 5;

/// A home database that does not answer so simple a question by then is asked on a new connection.
const HOME_SILENCE: Duration = Duration::from_secs(5);

/// Between two looks at a command whose answer is not announced, and between two at the lease.
const POLL: Duration = Duration::from_millis(100);
const LEASE_LOOK: Duration = Duration::from_secs(1);

/// A runner that begins anew after a fault is without the lease for two seconds and a little.
const GONE_LOOKS: u32 = 5;

/// How the messages end by which a runner tells that the same may be asked again.
pub(super) const ASK_AGAIN: &str = "ask again";

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

/// Where a command is.
#[derive(Clone, Debug, PartialEq)]
pub enum Asking {
    /// Nobody has taken it yet.
    Queued,
    /// A runner is at it.
    Taken,
    /// Its outcome.
    Done(Value),
}

/// The asking side.
#[derive(Debug)]
pub struct Client {
    session: Session,
    home: Config,
    job: JobName,
    /// The command posted last.
    last: Option<String>,
    /// Do not wait for a runner that is gone.
    told_of_loss: bool,
}

impl Client {
    /// Connects to the home database.
    pub async fn connect(home: &Config, job: &JobName) -> Result<Client> {
        let session = hearing(home, job).await?;
        Ok(Client {
            session,
            home: home.clone(),
            job: job.clone(),
            last: None,
            told_of_loss: false,
        })
    }

    /// From now on [`Client::wait`] gives up once nobody has had the job's lease for some seconds:
    /// for whoever can run the job himself.
    pub fn tell_of_loss(&mut self) {
        self.told_of_loss = true;
    }

    /// Writes the command down and wakes the runner. Gives its id.
    pub async fn post(&mut self, verb: &str, args: &Value) -> Result<String> {
        let row = self
            .session
            .query_one(
                "with posted as (insert into walferry.command (job, verb, args) \
                   values ($1, $2, $3::jsonb) returning id) \
                 select id, pg_catalog.pg_notify($4, '') from posted",
                &[
                    Some(self.job.as_str()),
                    Some(verb),
                    Some(&args.to_string()),
                    Some(&self.job.channel()),
                ],
            )
            .await?;
        let id = row.string(0)?;
        self.last = Some(id.clone());
        Ok(id)
    }

    /// Where the command is; keeps its row fresh. A home database that is away for a while only
    /// delays the answer: what was asked may be done meanwhile. Errors: the runner's refusal; what
    /// a person must mend.
    pub async fn poll(&mut self, id: &str) -> Result<Asking> {
        let polled = tokio::time::timeout(HOME_SILENCE, self.poll_once(id)).await;
        match polled {
            Ok(Err(error)) if error.fault() == Fault::Retry => {}
            Ok(polled) => return polled,
            Err(_) => {}
        }
        if let Ok(session) = hearing(&self.home, &self.job).await {
            self.session = session;
        }
        Ok(Asking::Taken)
    }

    /// Waits until an answer is announced, a command's of this job, or it is time to look again.
    pub(super) async fn pause(&mut self) {
        if self.session.notification(POLL).await.is_err() {
            tokio::time::sleep(POLL).await;
        }
    }

    async fn poll_once(&mut self, id: &str) -> Result<Asking> {
        let row = self
            .session
            .query_opt(
                "update walferry.command set seen_at = clock_timestamp() where id = $1 \
                 returning state, result, error",
                &[Some(id)],
            )
            .await?;
        let Some(row) = row else { return Ok(Asking::Done(Value::Null)) };
        match row.str(0)? {
            "done" => {
                let text = row.opt(1)?.unwrap_or("null");
                let value = serde_json::from_str(text).map_err(|e| Error::State(e.to_string()))?;
                Ok(Asking::Done(value))
            }
            "failed" => Err(Error::Remote(row.opt(2)?.unwrap_or("failed").to_string())),
            "queued" => Ok(Asking::Queued),
            _ => Ok(Asking::Taken),
        }
    }

    /// Takes a command back that no runner has taken; false if one has.
    pub async fn withdraw(&mut self, id: &str) -> Result<bool> {
        let sql = "delete from walferry.command where id = $1 and state = 'queued' returning id";
        Ok(self.session.query_opt(sql, &[Some(id)]).await?.is_some())
    }

    /// The same of the last one, by a new session: for a caller that stopped waiting in the middle
    /// of a question.
    pub async fn withdraw_last(&mut self) -> Result<bool> {
        let Some(id) = self.last.clone() else { return Ok(false) };
        self.session = Session::control(&self.home).await?;
        self.withdraw(&id).await
    }

    /// Asks and waits up to `wait`, as [`Client::wait`] does.
    pub async fn ask(&mut self, verb: &str, args: &Value, wait: Duration) -> Result<Value> {
        let id = self.post(verb, args).await?;
        match self.wait(&id, verb, Deadline::after(wait)).await? {
            Some(value) => Ok(value),
            None => Err(self.no_answer(verb, wait).await),
        }
    }

    /// Waits for a command's outcome, `None` if there is none by then. Errors:
    /// [`Gone::Runner`], see [`Client::tell_of_loss`].
    pub async fn wait(
        &mut self,
        id: &str,
        verb: &str,
        deadline: Deadline,
    ) -> Result<Option<Value>> {
        let (mut look, mut gone) = (Deadline::after(LEASE_LOOK), 0);
        loop {
            if let Asking::Done(value) = self.poll(id).await? {
                return Ok(Some(value));
            }
            if deadline.passed() {
                return Ok(None);
            }
            if self.told_of_loss && look.passed() {
                look = Deadline::after(LEASE_LOOK);
                // A home database that cannot say is away, and not the runner.
                let held = !matches!(lease::holder(&mut self.session, &self.job).await, Ok(None));
                gone = if held { 0 } else { gone + 1 };
                if gone >= GONE_LOOKS {
                    return Err(Gone::Runner { verb: verb.to_string() }.into());
                }
            }
            self.pause().await;
        }
    }

    /// The error for a command that had no answer in time.
    pub async fn no_answer(&mut self, verb: &str, wait: Duration) -> Error {
        let pid = lease::holder(&mut self.session, &self.job).await.ok().flatten();
        Error::NoAnswer { verb: verb.to_string(), wait, pid: pid.unwrap_or_default() }
    }

    /// What keeps the runner from its work, if something does.
    pub async fn trouble(&mut self) -> Option<String> {
        let sql = "select error from walferry.job where name = $1";
        let row = self.session.query_opt(sql, &[Some(self.job.as_str())]).await.ok()??;
        row.opt(0).ok()?.map(str::to_string)
    }

    /// The session, for questions about the same home database.
    pub fn session(&mut self) -> &mut Session {
        &mut self.session
    }
}

/// A session that hears of answers.
async fn hearing(home: &Config, job: &JobName) -> Result<Session> {
    let mut session = Session::control(home).await?;
    session.execute(&format!("listen {}", quote_ident(&job.answers()))).await?;
    Ok(session)
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

/// Takes and answers a `stop`, whatever is before it in the queue.
pub(super) async fn take_stop(session: &mut Session, job: &JobName) -> Result<bool> {
    let sql = format!(
        "update walferry.command set state = 'done' where job = $1 and verb = 'stop' \
         and state = 'queued' \
         and seen_at > clock_timestamp() - interval '{STALE_SECONDS} seconds' returning id"
    );
    Ok(!session.query_params(&sql, &[Some(job.as_str())]).await?.is_empty())
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
            "with answered as (update walferry.command set state = $2, result = $3::jsonb, \
               error = $4 where id = $1 returning job) \
             select pg_catalog.pg_notify('walferry_answer_' || job, '') from answered",
            &[Some(id), Some(state), result.as_deref(), error.as_deref()],
        )
        .await?;
    Ok(())
}

/// Answers what a runner that is gone had taken and not answered; `own` is a command of ours that
/// is still under way. Called when whatever was begun has been undone or finished.
pub(super) async fn settle(store: &mut Store, row: &JobRow, own: Option<&str>) -> Result<()> {
    let job = store.job().clone();
    let left = store
        .session
        .query_params(
            "select id, verb, args ->> 'attempt' from walferry.command \
             where job = $1 and state = 'running' and id is distinct from $2::bigint",
            &[Some(job.as_str()), own],
        )
        .await?;
    for command in &left {
        let flip = row.flip.as_ref().filter(|f| command.opt(2).ok().flatten() == Some(&f.attempt));
        let reached = flip.filter(|flip| match row.phase {
            Phase::Switched => flip.flip == "forward",
            Phase::RolledBack => flip.flip == "reverse",
            Phase::Split => flip.switched_lsn.is_some(),
            _ => false,
        });
        let outcome = match reached {
            Some(flip) => {
                let mut steps = Vec::new();
                for line in store.journal(&flip.attempt).await? {
                    steps.push(json!({ "name": line.step, "ms": line.ms }));
                }
                let (lsn, held) = (&flip.switched_lsn, flip.fenced_ms);
                Ok({
                    let released = flip.released;
                    json!({ "switched_lsn": lsn, "fenced_ms": held, "steps": steps,
                        "released": released, "phase": row.phase.to_string(),
                        "tables": flip.group.as_ref().map(|group| group.tables.len()) })
                })
            }
            None if row.phase == Phase::CuttingOver => Err(format!(
                "the runner ended while it was at `{}`, and what it had begun is not undone yet{}",
                command.str(1)?,
                row.error.as_ref().map_or(String::new(), |error| format!(": {error}"))
            )),
            None => Err(format!(
                "the runner ended while it was at `{}`, and what it had begun has been undone; the \
                 job is in {}: {ASK_AGAIN}",
                command.str(1)?,
                row.phase
            )),
        };
        answer(&mut store.session, command.str(0)?, outcome).await?;
    }
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

/// Ready once the asker of a command is gone; asked over a session of its own. After a time in
/// which the home database answered nobody, its asker gets the time to say that it is there.
pub(super) async fn until_gone(home: &Config, id: &str) {
    let (mut session, mut gone) = (None, 0);
    while gone < 3 {
        tokio::time::sleep(LEASE_LOOK).await;
        let mut asking = match session.take() {
            Some(session) => session,
            None => match Session::control(home).await {
                Ok(session) => session,
                Err(_) => continue,
            },
        };
        match asker_gone(&mut asking, id).await {
            Ok(is_gone) => {
                gone = if is_gone { gone + 1 } else { 0 };
                session = Some(asking);
            }
            // A home database that cannot say is away; the runner notices that by itself.
            Err(_) => gone = 0,
        }
    }
}
