//! What no stream carries, carried while writers are held: large objects by what has changed since
//! both sides were level, unlogged tables whole. Both have been looked at before, so that what
//! takes longer than writers may wait is refused while they still go on.

use super::Result;
use crate::copy::Again;
use crate::large::{self, Mark};
use crate::pg::Session;

/// What is to be carried beside the stream.
#[derive(Debug, Default)]
pub struct Rest {
    /// Large objects, if they move.
    pub large: Option<Large>,
    /// Unlogged tables, if they are copied again.
    pub unlogged: Option<Again>,
}

/// Large objects that move with the database.
#[derive(Clone, Debug)]
pub struct Large {
    /// Where the live side stood when both were level.
    pub since: Option<Mark>,
    /// The role may read pg_largeobject, and so see what has changed.
    pub sees_pages: bool,
    /// The other side's mark from before the fence: nobody but us writes there.
    pub dest: Mark,
    /// Owners and grants move too.
    pub owners: bool,
    /// The live side's and the other side's, once both are level in the fence.
    pub level: Option<(Mark, Mark)>,
}

impl Large {
    async fn carry(&mut self, live: &mut Session, dest: &mut Session) -> Result<()> {
        let unchanged = match self.since {
            Some(since) => large::unchanged(live, since, self.sees_pages).await?,
            None => None,
        };
        if let Some(mark) = unchanged {
            self.level = Some((mark, self.dest));
            return Ok(());
        }
        let levelled = large::level(live, dest, self.since, self.owners).await?;
        for what in &levelled.left {
            tracing::warn!("{what}");
        }
        self.level = Some((levelled.mark, large::mark(dest).await?));
        Ok(())
    }
}

impl Rest {
    /// Whether the fence has to stop those who write large objects.
    pub(super) fn fences_large_objects(&self) -> bool {
        self.large.is_some()
    }

    /// Carries it. Writers are held; what is written is of no harm if they are let go after all.
    pub(super) async fn carry(&mut self, live: &mut Session, dest: &mut Session) -> Result<()> {
        if let Some(large) = &mut self.large {
            large.carry(live, dest).await?;
        }
        if let Some(unlogged) = &mut self.unlogged {
            unlogged.run().await?;
        }
        Ok(())
    }

    /// True if there is something that may take time. Else the question whether there is one large
    /// object by now is all that is left.
    pub(super) fn is_there(&self) -> bool {
        let some = |large: &Large| large.since.is_none_or(|since| since.count > 0);
        self.large.as_ref().is_some_and(some) || self.unlogged.is_some()
    }
}
