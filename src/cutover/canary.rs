//! The proof of both streams: a row written on one side arrives on the other, and another comes
//! back. Neither waits for the other.
//!
//! The canary table is in both publications. A canary that arrives has passed slot, decoding,
//! rights, triggers and origin of its direction, so a way back that lacks a right is found before
//! the switch and not after (vitess#16794).

use std::time::Duration;

use super::{Error, Result};
use crate::clock::Deadline;
use crate::id::{JobName, Stream};
use crate::pg::Session;

/// The job's canary table, on both sides.
pub fn ddl(job: &JobName) -> String {
    let table = job.canary().quoted();
    format!("create table if not exists {table} (leg text primary key, token text not null)")
}

/// Sends a canary from `live` to `dest` along `flip`, and one back. Each must arrive within `wait`.
pub async fn prove(
    job: &JobName,
    flip: Stream,
    live: &mut Session,
    dest: &mut Session,
    wait: Duration,
) -> Result<()> {
    let back = flip.opposite();
    let sent = tokio::try_join!(send(job, flip, live), send(job, back, dest))?;
    let deadline = Deadline::after(wait);
    tokio::try_join!(
        arrived(job, flip, &sent.0, dest, (deadline, wait)),
        arrived(job, back, &sent.1, live, (deadline, wait)),
    )?;
    Ok(())
}

/// Gives what tells this canary from those before it.
async fn send(job: &JobName, leg: Stream, from: &mut Session) -> Result<String> {
    let token = format!("{:016x}", fastrand::u64(..));
    let table = job.canary().quoted();
    from.query_params(
        &format!(
            "insert into {table} values ($1, $2) \
             on conflict (leg) do update set token = excluded.token"
        ),
        &[Some(leg.as_str()), Some(&token)],
    )
    .await?;
    Ok(token)
}

async fn arrived(
    job: &JobName,
    leg: Stream,
    token: &str,
    to: &mut Session,
    (deadline, wait): (Deadline, Duration),
) -> Result<()> {
    let table = job.canary().quoted();
    loop {
        let arrived = to
            .query_opt(
                &format!("select 1 from {table} where leg = $1 and token = $2"),
                &[Some(leg.as_str()), Some(token)],
            )
            .await?;
        if arrived.is_some() {
            return Ok(());
        }
        if deadline.passed() {
            return Err(Error::Canary { leg: leg.to_string(), wait });
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
