//! Finish and cancel: nothing of walferry is left on any side.

use std::sync::Arc;
use std::time::Duration;

use super::layout::Pair;
use super::run::{self, Tell};
use super::store::{Stage, Store};
use super::{Error, Reshard, tables};
use crate::cutover::seal;
use crate::job::cleanup::{self, Ending};
use crate::job::pipeline::Task;
use crate::job::run::Report;
use crate::job::state::Event;
use crate::job::{self, Notice, Result, ending};
use crate::pg::Session;

/// A runner that is alive may take so long to stop all pairs.
const STOP_WAIT: Duration = Duration::from_secs(60);

/// What was ended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ended {
    /// What was dropped, one line each.
    pub dropped: Vec<String>,
    /// What a person has to do.
    pub left: Vec<String>,
    /// After a cancel: tables that were made on targets are still there.
    pub tables_stay: bool,
}

/// Ends it once it is switched. May be repeated.
pub async fn finish(reshard: &Reshard, tell: &Tell) -> Result<Ended> {
    end(reshard, tell, Event::FinishAsked).await
}

/// Gives it up before it is switched. May be repeated.
pub async fn cancel(reshard: &Reshard, tell: &Tell) -> Result<Ended> {
    end(reshard, tell, Event::CancelAsked).await
}

async fn end(reshard: &Reshard, tell: &Tell, event: Event) -> Result<Ended> {
    let layout = reshard.layout().await?;
    // The home last: that there is something to end is known there.
    let mut pairs = reshard.pairs(&layout)?;
    pairs.sort_by_key(|pair| std::cmp::Reverse(pair.target));
    // Before the runner is asked to stop, which would be for nothing.
    let session = Session::control(reshard.home()?).await?;
    let row = Store::new(session, reshard.name.clone()).load_existing().await?;
    refuse(reshard, row.stage, event)?;
    let (lease, mut store) = run::take_lease(reshard, STOP_WAIT).await?;
    let keeping = Task(tokio::spawn(run::keep(lease)));
    admit(reshard, &mut store, &pairs, event).await?;
    let mut ended = Ended::default();
    for source in &reshard.sources {
        let mut session = Session::control(source).await?;
        if is_there(&mut session).await? {
            seal::remove(&mut session, &reshard.name).await?;
        }
    }
    if event == Event::CancelAsked {
        for target in &reshard.targets {
            let mut session = Session::control(target).await?;
            ended.tables_stay |= tables::is_made(&mut session, reshard).await?;
        }
    }
    for target in &reshard.targets {
        // The last pair's clean-up would take it for that of a job in use, and leave the schema.
        let mut session = Session::control(target).await?;
        if is_there(&mut session).await? {
            let canary = reshard.name.canary().quoted();
            session.execute(&format!("drop table if exists {canary}")).await?;
        }
    }
    for pair in &pairs {
        end_pair(pair, event, tell, &mut ended).await?;
    }
    store.delete().await?;
    drop(keeping);
    for side in reshard.sources.iter().chain(&reshard.targets) {
        let mut session = Session::control(side).await?;
        if is_there(&mut session).await? {
            let dropped = &mut ended.dropped;
            cleanup::drop_schema(&mut session, &reshard.name, dropped, has_jobs(side).await?)
                .await?;
        }
    }
    Ok(ended)
}

/// What does not fit the stage.
fn refuse(reshard: &Reshard, stage: Stage, event: Event) -> Result<()> {
    let (asked, why) = match (stage, event) {
        (Stage::Switched, Event::FinishAsked) => return Ok(()),
        (Stage::Switched, _) => ("cancel", "walferry reshard finish ends it"),
        (_, Event::FinishAsked) => {
            ("finish", "It ends what was switched: use cutover first, or cancel")
        }
        _ => return Ok(()),
    };
    let (name, stage) = (reshard.name.to_string(), stage.to_string());
    Err(Error::Refused { asked, name, stage, why }.into())
}

/// Refuses what does not fit the stage, and brings that to where it can be ended.
async fn admit(reshard: &Reshard, store: &mut Store, pairs: &[Pair], event: Event) -> Result<()> {
    let row = store.load_existing().await?;
    refuse(reshard, row.stage, event)?;
    match row.stage {
        Stage::Switched if Reshard::settled(row.flip.clone()).is_some() => Ok(()),
        Stage::Switched => reshard.settle(store, pairs, row.flip).await,
        Stage::CuttingOver => reshard.undo(store, row.flip).await,
        Stage::Running => Ok(()),
    }
}

async fn end_pair(pair: &Pair, event: Event, tell: &Tell, ended: &mut Ended) -> Result<()> {
    let ending = Ending { event, keep_history: false, source_is_gone: false };
    let said = tell.clone();
    let report: Report = Arc::new(move |notice| {
        if let Notice::Said(text) = notice {
            said(text);
        }
    });
    let home = Session::control(&pair.config.target).await?;
    let mut own = job::store::Store::new(home, pair.config.job.clone());
    // Not begun yet, or ended before.
    if own.load().await?.is_none() {
        return Ok(());
    }
    drop(own);
    let done = ending::end(&pair.config, ending, &report).await?;
    ended.dropped.extend(done.dropped);
    ended.left.extend(done.left);
    Ok(())
}

async fn is_there(session: &mut Session) -> Result<bool> {
    let sql = "select pg_catalog.to_regclass('walferry.read_only') is not null";
    Ok(session.query_one(sql, &[]).await?.bool(0)?)
}

/// True if jobs of others have their state in the database.
async fn has_jobs(side: &crate::pg::Config) -> Result<bool> {
    let mut session = Session::control(side).await?;
    let sql = "select pg_catalog.to_regclass('walferry.job') is not null";
    if !session.query_one(sql, &[]).await?.bool(0)? {
        return Ok(false);
    }
    Ok(session.query_one("select exists (select from walferry.job)", &[]).await?.bool(0)?)
}
