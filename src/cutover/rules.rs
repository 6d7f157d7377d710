//! Triggers, rules and foreign keys around a switch, on a side whose role cannot keep them from
//! acting on applied rows (see `schema::aside`). The side that becomes live gets its own back
//! before the switch, the side that will be written by the stream has its set aside in the fence's
//! own transaction, and undoing turns both round.

use std::time::Duration;

use tokio::sync::watch;

use super::Result;
use crate::catalog::{self, Selection};
use crate::id::{QualifiedName, Stream};
use crate::lsn::Lsn;
use crate::pg::{Config, Session};
use crate::route::Context;
use crate::schema::{self, Acting, Dump};

/// A reader that keeps a foreign key from being dropped is waited for so long.
const READER_WAIT: Duration = Duration::from_secs(3);

/// What a flip has to do about them. Nothing, where whole databases move and both roles may set the
/// replica role.
#[derive(Clone, Debug, Default)]
pub struct Rules {
    /// Those of the live side that have to be set aside before the stream writes there.
    pub live: Acting,
    /// Those of the other side that are set aside, or not built yet.
    pub dest: Acting,
    /// The job they are noted under.
    pub job: String,
    /// Its tables.
    pub selection: Selection,
    /// Where those that are not built yet are found.
    pub dump: Option<Dump>,
    /// Holds the stream that writes to the other side.
    pub brake: Option<watch::Sender<Option<Lsn>>>,
}

impl Rules {
    /// The statements after which everything acts on `dest` as its owner wants it, to be run
    /// together once the stream has ended. Foreign keys are validated later.
    pub(super) async fn waking(&self, dest: &mut Session) -> Result<Vec<String>> {
        if self.dest == Acting::Nothing {
            return Ok(Vec::new());
        }
        let mut statements = schema::restoring(dest, &self.job).await?;
        if let Some(dump) = &self.dump {
            statements.extend(schema::building_acting(dest, dump, &self.job).await?);
        }
        Ok(statements)
    }

    /// The statements after which nothing acts on the live side any more, as it is now.
    pub(super) async fn silencing_live(
        &self,
        live: &mut Session,
        tables: &[QualifiedName],
    ) -> Result<Vec<String>> {
        Ok(schema::setting_aside(live, &self.job, tables, self.live).await?)
    }

    /// The stream goes on writing to the other side: nothing may act there. It is held from the
    /// beginning, and for good if this fails or is given up.
    pub async fn silence_dest(&self, context: &Context) -> Result<()> {
        let dest = match context.flip {
            Stream::Forward => &context.target,
            Stream::Reverse => &context.source,
        };
        if self.dest == Acting::Nothing {
            return Ok(());
        }
        let hold = |lsn| self.brake.as_ref().map(|brake| brake.send_replace(lsn));
        hold(Some(Lsn::ZERO));
        silence(dest, self).await?;
        hold(None);
        Ok(())
    }

    /// Applications go on writing to the live side.
    pub(super) async fn wake_live(&self, live: &Config) -> Result<()> {
        if self.live != Acting::Nothing {
            let mut session = Session::control(live).await?;
            schema::restore(&mut session, &self.job).await?;
        }
        Ok(())
    }
}

/// Sets aside what would act on rows that a stream writes to this side.
async fn silence(side: &Config, rules: &Rules) -> Result<()> {
    let mut session = Session::control(side).await?;
    session.execute(&format!("set lock_timeout = {}", READER_WAIT.as_millis())).await?;
    let tables = catalog::tables(&mut session, &rules.selection).await?;
    let tables: Vec<QualifiedName> = tables.into_iter().map(|table| table.name).collect();
    schema::set_aside(&mut session, &rules.job, &tables, rules.dest).await?;
    Ok(())
}
