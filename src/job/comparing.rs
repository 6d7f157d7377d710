//! Both sides compared while a runner keeps them level, as verify does, and a task before it
//! cuts over.
//!
//! Of a job whose tables are on both sides each is compared along the stream that comes from its
//! owner: first those of the source, then those of the target. One that changes hands while the
//! snapshots are taken is in neither, and is compared in the next round.

use std::collections::HashSet;
use std::time::Duration;

use serde_json::Value;

use super::client::Client;
use super::groups::Refused;
use super::owners::{Since, is_on_target};
use super::state::Phase;
use super::store::Store;
use super::{JobConfig, Result, align, rest, state};
use crate::id::{QualifiedName, Stream};
use crate::large;
use crate::pg::{Config, Purpose, Session};
use crate::verify::{self, Report, Side};

/// How often tables that are truncated or rewritten while they are compared are tried again.
const ROUNDS: usize = 10;

/// Compares all rows through a runner that is alive. Both sides must be lined up within `timeout`.
///
/// # Errors
/// In a phase without a stream that keeps the sides level. A difference is none: see the report.
pub async fn compare(client: &mut Client, config: &JobConfig, timeout: Duration) -> Result<Report> {
    let config = &config.clone().reaching_shards().await?;
    let stream = flowing(config).await?;
    // A runner that has just begun may still be connecting its streams.
    client.ask("ping", &Value::Null, Duration::from_secs(60)).await?;
    let Some(stream) = stream else { return compare_split(client, config, timeout).await };
    let aligned = aligned(client, config, stream, timeout).await?;
    let mut report = compare_once(config, stream, &aligned, None).await?;
    drop(aligned);
    for _ in 0..ROUNDS {
        if report.rewritten.is_empty() {
            return Ok(report);
        }
        let tables = report.rewritten.clone();
        let aligned = self::aligned(client, config, stream, timeout).await?;
        let again = compare_once(config, stream, &aligned, Some(tables)).await?;
        report = report.amend(again);
    }
    Err(verify::Error::Rewritten { tables: report.rewritten }.into())
}

/// Compares each table of a job that is split along the stream from its owner.
async fn compare_split(
    client: &mut Client,
    config: &JobConfig,
    timeout: Duration,
) -> Result<Report> {
    let (mut compared, mut left) = (HashSet::new(), Vec::new());
    let mut report: Option<Report> = None;
    for _ in 0..ROUNDS {
        for stream in [Stream::Forward, Stream::Reverse] {
            let mut owned = owned(config, stream).await?;
            owned.retain(|table, _| !compared.contains(table));
            if owned.is_empty() {
                continue;
            }
            let aligned = aligned(client, config, stream, timeout).await?;
            let still = self::owned(config, stream).await?;
            let stays = |table: &QualifiedName| still.get(table) == owned.get(table);
            let tables: Vec<_> = owned.keys().filter(|table| stays(table)).cloned().collect();
            let part = compare_once(config, stream, &aligned, Some(tables.clone())).await?;
            compared.extend(tables.into_iter().filter(|table| !part.rewritten.contains(table)));
            report = Some(match report.take() {
                Some(report) => report.amend(part),
                None => part,
            });
        }
        let home = Session::control(&config.target).await?;
        let all = Store::new(home, config.job.clone()).owners().await?;
        let missed = all.keys().filter(|table| !compared.contains(*table));
        left = missed.map(ToString::to_string).collect();
        if let Some(report) = report.take_if(|_| left.is_empty()) {
            return Ok(report);
        }
    }
    Err(Refused::Moving(left).into())
}

/// The tables whose rows a stream carries, as they are written on the side that it reads.
async fn owned(config: &JobConfig, stream: Stream) -> Result<Since> {
    let home = Session::control(&config.target).await?;
    Store::new(home, config.job.clone()).owned_since(is_on_target(stream)).await
}

/// Both ends of a stream at one point.
async fn aligned(
    client: &mut Client,
    config: &JobConfig,
    stream: Stream,
    timeout: Duration,
) -> Result<align::Aligned> {
    let (from, to) = match stream {
        Stream::Forward => (&config.source, &config.target),
        Stream::Reverse => (&config.target, &config.source),
    };
    let line = line(config, stream, from, to).await?;
    align::align(client, &line, timeout).await
}

/// Compares `tables`, or all, at one point of the stream.
async fn compare_once(
    config: &JobConfig,
    stream: Stream,
    aligned: &align::Aligned,
    tables: Option<Vec<QualifiedName>>,
) -> Result<Report> {
    let (from, to) = match stream {
        Stream::Forward => (&config.source, &config.target),
        Stream::Reverse => (&config.target, &config.source),
    };
    let options = &config.options;
    let mut source = Session::connect(&config.source, Purpose::Sql).await?;
    let selection = options.selection(&mut source).await?;
    let side = |config: &Config, snapshot: &str| Side {
        config: config.clone(),
        snapshot: Some(snapshot.to_string()),
    };
    // Source and target keep their names whichever way the rows flow.
    let (from, to) = (side(from, &aligned.from_snapshot), side(to, &aligned.to_snapshot));
    let mut wanted = match stream {
        Stream::Forward => verify::Options::new(from, to),
        Stream::Reverse => verify::Options::new(to, from),
    };
    wanted.selection = selection;
    wanted.map = config.map.clone();
    wanted.tables = tables;
    let home = Session::connect(&config.target, Purpose::Sql).await?;
    let mut store = Store::new(home, config.job.clone());
    wanted.publication = store.load_readings().await?.publication;
    wanted.parallelism = config.jobs;
    Ok(verify::run(wanted).await?)
}

async fn line(
    config: &JobConfig,
    stream: Stream,
    from: &Config,
    to: &Config,
) -> Result<align::Line> {
    let home = Session::control(&config.target).await?;
    let mut readings = Store::new(home, config.job.clone()).load_readings().await?;
    Ok(align::Line {
        stream,
        publications: readings.publications(stream, &config.job.object(stream)),
        reading: readings.of(stream).clone().unwrap_or_default(),
        from: from.clone(),
        to: to.clone(),
    })
}

/// The stream that keeps the other side current now; `None` where both do, each for some tables.
async fn flowing(config: &JobConfig) -> Result<Option<Stream>> {
    let home = Session::control(&config.target).await?;
    let row = Store::new(home, config.job.clone()).load_existing().await?;
    match row.phase {
        Phase::Split => Ok(None),
        phase => Ok(Some(state::flowing(phase)?)),
    }
}

/// Large objects, if they move. They are carried at a switch and not while following, so what the
/// live side has changed since is no difference, but told.
pub async fn large_objects(config: &JobConfig) -> Result<Option<large::Comparison>> {
    // A job of which there are any is not switched group by group.
    let Some(stream) = flowing(config).await? else { return Ok(None) };
    let (live, dest, side) = match stream {
        Stream::Forward => (&config.source, &config.target, "source"),
        Stream::Reverse => (&config.target, &config.source, "target"),
    };
    let mut home = Session::connect(&config.target, Purpose::Sql).await?;
    if !rest::moves_large_objects(&mut home, config).await? {
        return Ok(None);
    }
    let since = rest::load_mark(&mut home, config.job.as_str(), side).await?;
    let mut live = Session::connect(live, Purpose::Sql).await?;
    let mut dest = Session::connect(dest, Purpose::Sql).await?;
    Ok(Some(large::compare(&mut live, &mut dest, since).await?))
}
