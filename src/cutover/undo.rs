//! Back to before the flip, and forward past its point of no return. Both can be repeated, and both
//! work from stored facts alone, so that another process can do it after a crash.

use super::Result;
use super::fence::{self, FenceKind};
use crate::pg::{Config, Purpose, Session};
use crate::route::{Context, Route};

/// Undoes whatever a flip reached before its point of no return: routes go back, the live side's
/// seal opens, held clients are let through.
///
/// The fence's locks need no undoing: they belonged to a session that is gone. Routes are undone in
/// reverse order, and writers on the live side can write before clients are sent there again.
pub async fn undo(
    live: &Config,
    kind: FenceKind,
    routes: &[Route],
    context: &Context,
) -> Result<()> {
    let opened = async {
        if kind != FenceKind::None {
            let mut session = Session::connect(live, Purpose::Sql).await?;
            fence::open(&mut session).await?;
        }
        Ok(())
    };
    // Clients must not stay held because the server is gone: undo the routes whatever happens.
    let opened: Result<()> = opened.await;
    for route in routes.iter().rev() {
        route.undo(context).await?;
    }
    opened
}

/// Lets clients through, on whichever side the routes now point to.
pub async fn release(routes: &[Route], context: &Context) -> Result<()> {
    for route in routes {
        route.release(context).await?;
    }
    Ok(())
}
