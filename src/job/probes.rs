//! Sessions with either side that a runner keeps for short questions, and what they told lately.
//!
//! A new one costs its server a process that knows nothing of the catalogs yet, and of thousands
//! of tables that is much. Whoever asks borrows one and gives it back once all its answers are
//! there; one that met an error is not given back. So what is kept is idle and in no transaction.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Result;
use super::run::Runner;
use crate::catalog::Named;
use crate::id::Stream;
use crate::lsn::Lsn;
use crate::pg::{Config, Session};

/// One that does not answer by then is left for a new one. Commands wait meanwhile.
const PATIENCE: Duration = Duration::from_secs(2);

/// What is kept.
#[derive(Default)]
pub(super) struct Probes {
    source: Option<Session>,
    target: Option<Session>,
    /// The tables of the side that a stream reads, and when they were read.
    pub named: Option<(Instant, Stream, Arc<Vec<Named>>)>,
    /// When positions were stored last.
    pub stored_at: Option<Instant>,
}

impl Probes {
    /// The place of the side that a stream reads.
    fn of(&mut self, stream: Stream) -> &mut Option<Session> {
        match stream {
            Stream::Forward => &mut self.source,
            Stream::Reverse => &mut self.target,
        }
    }

    /// Ends of WAL, of those sides whose stream flows; `None` while one cannot be asked.
    pub async fn ends_of_wal(
        &mut self,
        (source, target): (Option<&Config>, Option<&Config>),
    ) -> [Option<Lsn>; 2] {
        let asking = (end_of_wal(source, &mut self.source), end_of_wal(target, &mut self.target));
        tokio::join!(asking.0, asking.1).into()
    }
}

impl Runner {
    /// A session with the side that a stream reads, for [`Runner::give_back`]: one that was kept
    /// and still answers, or a new one.
    pub(super) async fn borrow(&mut self, stream: Stream) -> Result<Session> {
        if let Some(mut kept) = self.probes.of(stream).take() {
            let asked = tokio::time::timeout(PATIENCE, kept.query("select 1")).await;
            if matches!(asked, Ok(Ok(_))) {
                return Ok(kept);
            }
        }
        Ok(Session::control(self.live(stream)).await?)
    }

    /// True if that was less than `lately` ago.
    pub(super) fn stored_within(&self, lately: Duration) -> bool {
        self.probes.stored_at.is_some_and(|at| at.elapsed() < lately)
    }

    /// Keeps it for who asks next.
    pub(super) fn give_back(&mut self, stream: Stream, session: Session) {
        if !session.in_transaction() {
            *self.probes.of(stream) = Some(session);
        }
    }
}

async fn end_of_wal(side: Option<&Config>, probe: &mut Option<Session>) -> Option<Lsn> {
    let asking = async {
        let side = side?;
        let mut session = match probe.take() {
            Some(session) => session,
            None => Session::control(side).await.ok()?,
        };
        let sql = "select pg_catalog.pg_current_wal_insert_lsn()";
        let row = session.query_one(sql, &[]).await.ok()?;
        *probe = Some(session);
        row.lsn(0).ok()
    };
    tokio::time::timeout(PATIENCE, asking).await.ok().flatten()
}
