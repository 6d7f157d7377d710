//! Clients of a plproxy partition that may only read, from when writers are to be stopped.
//!
//! A proxy cannot hold a call, and without this one that writes waits for the fence, and is refused
//! by the seal. Where a route asks for it (`,read-only` at its end), the partition's connection
//! string is given `options=-c default_transaction_read_only=true` before the fence: from the next
//! call on, each proxy comes with a new session, which refuses to write at once and goes on
//! reading. Sessions from before it that are at work have half of the wait to end by themselves;
//! then all of them are ended, whoever's they are. Where a try fails and clients may write again,
//! the next call of a proxy that was ended in the last two seconds fails, as plproxy looks at what
//! it has only after so long.
//!
//! Nothing rests on it: a session may say otherwise for itself, and one that was just being opened
//! may have missed it. The fence is what stops writers.
//!
//! The string as it was is in the server's comment (`Note::before`), and comes back with the
//! release, whether of a switch or of a try that failed, and with the undoing.
//!
//! <https://plproxy.github.io/config.html>

use std::time::{Duration, Instant};

use super::note::{Note, Options};
use super::place::Side;
use super::sqlmed::{Found, SqlMed};
use super::{Context, Error, Result, connstr};
use crate::catalog::CLIENT;
use crate::id::{Stream, quote_literal};
use crate::pg::{Config, Session};

/// Between looks at sessions that are to end.
const LOOK: Duration = Duration::from_millis(5);

/// How long sessions may take to be gone once they are ended.
const END_WAIT: Duration = Duration::from_secs(1);

impl SqlMed {
    /// Has clients only read, where that is asked for, and ends the sessions that do not know.
    pub(super) async fn hold(&self, context: &Context, wait: Duration) -> Result<()> {
        if !self.read_only || context.reads {
            return Ok(());
        }
        let begun = Instant::now();
        let (mut session, found) = self.find_locked().await?;
        let note = self.note(&found, context);
        if note.before.is_some() {
            // Those that are there now know.
            self.execute(&mut session, "rollback").await?;
            self.keep(session);
            return Ok(());
        }
        let before = self.ours(&found.options);
        let alter = self.alter(&found, &self.reading(&before)?);
        let note = self.comment(&found, Some(Note { before: Some(before), ..note }))?;
        self.execute(&mut session, &format!("{alter} {note} commit")).await?;
        self.keep(session);
        let left = wait.saturating_sub(begun.elapsed());
        end_stragglers(Side::live(context).config(context), left / 2).await
    }

    fn reading(&self, options: &Options) -> Result<Options> {
        let reading = |(partition, text): (&String, &String)| {
            let text = connstr::read_only(text).ok_or_else(|| self.unreadable(partition))?;
            Ok((partition.clone(), text))
        };
        options.iter().map(reading).collect()
    }

    /// SQL by which clients may write again where they are.
    pub(super) fn let_write(&self, found: &Found, context: &Context) -> Result<String> {
        let Some(note) = &found.note else { return Ok("rollback".to_string()) };
        let alter = note.before.as_ref().map(|before| self.alter(found, before));
        // Before the first switch there is no way back to be known.
        let led = context.flip == Stream::Reverse;
        let note = led.then(|| Note { before: None, ..note.clone() });
        Ok(format!("{} {} commit", alter.unwrap_or_default(), self.comment(found, note)?))
    }
}

/// Ends the client sessions there are now: those at work as soon as they are done, or after `wait`.
async fn end_stragglers(live: &Config, wait: Duration) -> Result<()> {
    let wrong = |source| Error::Router { doing: "ending sessions of proxies".into(), source };
    let mut session = Session::control(live).await.map_err(wrong)?;
    let row = session.query_one("select pg_catalog.clock_timestamp()::text", &[]).await;
    let since = quote_literal(row.map_err(wrong)?.str(0).map_err(wrong)?);
    let those = format!(
        "from pg_catalog.pg_stat_activity where datname = pg_catalog.current_database() \
         and {CLIENT} and coalesce(backend_start < {since}::timestamptz, false)"
    );
    let at_work = format!("select 1 {those} and state is distinct from 'idle' limit 1");
    let begun = Instant::now();
    while !session.query(&at_work).await.map_err(wrong)?.is_empty() && begun.elapsed() < wait {
        tokio::time::sleep(LOOK).await;
    }
    let end = format!("select pg_catalog.pg_terminate_backend(pid) {those}");
    let begun = Instant::now();
    loop {
        let ended = session.query(&end).await;
        match ended {
            Ok(left) if left.is_empty() => return Ok(()),
            Ok(_) if begun.elapsed() < END_WAIT => tokio::time::sleep(LOOK).await,
            Ok(left) => {
                let blockers = format!("{} sessions do not end", left.len());
                return Err(Error::Held { peer: session.peer().to_string(), blockers });
            }
            Err(error) if error.code() == Some("42501") => {
                return Err(Error::Setup {
                    peer: session.peer().to_string(),
                    detail: format!(
                        "role \"{}\" may not end the proxies' sessions: grant pg_signal_backend \
                         to it, or leave read-only out of the route",
                        live.user
                    ),
                });
            }
            Err(error) => return Err(wrong(error)),
        }
    }
}
