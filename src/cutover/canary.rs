//! The proof of both streams: a row written on one side arrives on the other, and another comes
//! back.
//!
//! The canary table is in both publications. A canary that arrives has passed slot, decoding,
//! rights, triggers and origin of its direction, so a way back that lacks a right is found before
//! the switch and not after (vitess#16794).

use std::time::Duration;

use super::{Error, Result};
use crate::clock::Deadline;
use crate::id::{JobName, Stream};
use crate::pg::{Config, Session};

/// The job's canary table, on both sides.
pub fn ddl(job: &JobName) -> String {
    let table = job.canary().quoted();
    format!("create table if not exists {table} (leg text primary key, token text not null)")
}

/// Sends a canary from `live` to `dest` along `flip`, and one back. Each must arrive within `wait`.
pub async fn prove(
    job: &JobName,
    flip: Stream,
    live: &Config,
    dest: &Config,
    wait: Duration,
) -> Result<()> {
    let mut live = Session::control(live).await?;
    let mut dest = Session::control(dest).await?;
    send(job, flip, &mut live, &mut dest, wait).await?;
    send(job, flip.opposite(), &mut dest, &mut live, wait).await
}

async fn send(
    job: &JobName,
    leg: Stream,
    from: &mut Session,
    to: &mut Session,
    wait: Duration,
) -> Result<()> {
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
    let deadline = Deadline::after(wait);
    loop {
        let arrived = to
            .query_opt(
                &format!("select 1 from {table} where leg = $1 and token = $2"),
                &[Some(leg.as_str()), Some(&token)],
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
