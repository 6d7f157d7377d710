//! Starting and stopping a runner's two streams.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::time::Duration;

use super::Result;
use super::admit::recorded;
use super::altering::Altering;
use super::opening::{Half, SpoolOptions};
use super::pipeline::{Pipe, PipeOptions, TableFilter, Visibility};
use super::place::Place;
use super::prepare::stored_reading;
use super::run::{JobConfig, Notice, Runner};
use super::state::{Event, Phase};
use super::store::{JobRow, Store};
use crate::apply::altered::Alter;
use crate::apply::{OnRowError, Open};
use crate::buffer::spool::Spill;
use crate::catalog::{Selection, tables};
use crate::change::AllRead;
use crate::copy;
use crate::id::{QualifiedName, Stream};
use crate::limit::CATALOG_WAIT;
use crate::lsn::Lsn;
use crate::pg::{Config, Session};
use crate::source::Recorded;

/// A stream that has not reached a batch boundary by then is cut off, as a crash would.
pub(super) const STREAM_PATIENCE: Duration = Duration::from_millis(1500);

/// The target is asked about so many tables at once when a stream begins, whether they are written
/// soon or not.
const EXPECTED_MAX: usize = 200;

/// Where large files may lie for a while. Not /tmp if it can be helped, which is often in memory.
fn temporary() -> PathBuf {
    let given = std::env::var_os("TMPDIR").filter(|dir| !dir.is_empty()).map(PathBuf::from);
    let on_disk = || Some(PathBuf::from("/var/tmp")).filter(|dir| Path::is_dir(dir));
    given.or_else(on_disk).unwrap_or_else(std::env::temp_dir)
}

impl Runner {
    /// Applies from where the target stands; a stream that only filled its spool begins to.
    pub(super) async fn follow_forward(&mut self) -> Result<Option<Event>> {
        let visibility = self.visibility().await?;
        match &self.forward {
            Some(pipe) => pipe.begin_apply(visibility),
            None => self.forward = Some(self.pipe(Stream::Forward, Some(visibility)).await?),
        }
        if let Some(pipe) = &self.forward {
            self.say(Notice::Flows(pipe.applied.clone()));
        }
        Ok(None)
    }

    /// What the copy has of tables that were read later than under the slot's snapshot, by the
    /// names that their changes come under. All partitions that share one were
    /// read under one snapshot.
    async fn visibility(&mut self) -> Result<Visibility> {
        let job = self.config.job.as_str();
        let mut visibility = copy::visibility(&mut self.store.session, job).await?;
        let kept = self.store.load_readings().await?.publication;
        for shown in kept.iter().flat_map(|publication| &publication.shown) {
            let named = |(schema, name): &(String, String)| QualifiedName::new(schema, name);
            let (table, under) = (named(&shown.table), named(&shown.under));
            if table != under
                && let Some(seen) = visibility.get(&table).cloned()
            {
                visibility.insert(under, seen);
            }
        }
        Ok(visibility)
    }

    /// While rows are copied, changes already go into the spool, so that WAL does not pile up.
    pub(super) async fn capture_forward(&mut self) -> Result<()> {
        if self.forward.is_none() && self.spool.is_some() {
            self.forward = Some(self.pipe(Stream::Forward, None).await?);
        }
        Ok(())
    }

    pub(super) async fn follow_reverse(&mut self) -> Result<Option<Event>> {
        let row = self.row().await?;
        let open = self.gate_of_groups(&row).await?;
        let whole = match (row.phase, &row.flip) {
            (Phase::Switched, _) => true,
            (Phase::CuttingOver, Some(flip)) => {
                flip.flip == "reverse" || self.switch_had_begun(flip).await?
            }
            _ => self.config.two_way.is_some(),
        };
        let whole = if whole { Open::Everything } else { Open::Nothing };
        self.gate.set(open.unwrap_or(whole));
        if row.armed && self.reverse.is_none() {
            self.reverse = Some(self.pipe(Stream::Reverse, Some(HashMap::new())).await?);
        }
        self.keep_two_way().await?;
        Ok(None)
    }

    /// Starts one stream.
    pub(super) async fn pipe(
        &mut self,
        stream: Stream,
        visibility: Option<Visibility>,
    ) -> Result<Pipe> {
        if stream == Stream::Forward {
            self.unchanged_publication().await?;
        }
        let gate = (stream == Stream::Reverse).then(|| self.gate.clone());
        let options = pipe_options(&self.config, &mut self.store, &self.selection, stream).await?;
        let spool = options.spool.filter(|_| self.spool.is_some());
        // A stream stores the timeline that it goes on with.
        self.store.forget();
        Ok(Pipe::start(PipeOptions { visibility, gate, spool, ..options }))
    }

    /// Stops both streams, at a batch boundary where that does not take long.
    pub(super) async fn stop_streams(&mut self) {
        let stop = async |pipe: Option<Pipe>| {
            if let Some(pipe) = pipe {
                pipe.stop(STREAM_PATIENCE).await;
            }
        };
        tokio::join!(stop(self.forward.take()), stop(self.reverse.take()));
    }
}

/// What a stream's pipe needs to know, by the job's own tables; without what the copy read.
pub(super) async fn pipe_options(
    config: &JobConfig,
    store: &mut Store,
    selection: &Selection,
    stream: Stream,
) -> Result<PipeOptions> {
    let row = store.load_existing().await?;
    let reading = stored_reading(config, store, stream).await?;
    let readings = store.load_readings().await?;
    let (from, to, ability) = match stream {
        Stream::Forward => (&config.source, &config.target, row.abilities.target),
        Stream::Reverse => (&config.target, &config.source, row.abilities.source),
    };
    let (recorded, timeline) = server_of(config, &row, stream, &reading.decoder);
    // A partition made since is of a published table: only those known to be left out are not.
    let (left_out, expected) = parted(from, selection).await?;
    let canary = config.job.canary();
    let tables: TableFilter = Arc::new(move |table: &QualifiedName| match &*table.schema {
        "walferry" => *table == canary,
        _ => !left_out.contains(table),
    });
    Ok(PipeOptions {
        job: config.job.clone(),
        stream,
        from: from.clone(),
        decode_from: config.decode_from.clone().filter(|_| stream == Stream::Forward),
        to: to.clone(),
        tables_only: config.options.tables_only,
        transport: reading.transport()?,
        plain_numbers: config.wanted.plain_numbers,
        followed: Arc::new(readings.tables(stream)),
        publications: readings.publications(stream, &config.job.object(stream)),
        timeline: Arc::new(AtomicU32::new(timeline)),
        home: config.target.clone(),
        recorded,
        tables,
        expected,
        ability,
        visibility: None,
        streaming: config.streaming.as_ref().map(|streaming| {
            Arc::new(Spill::new(spill_dir(row.spool.as_ref()), streaming.limit_bytes))
        }),
        spool: row.spool.map(|place| SpoolOptions {
            place,
            half: match stream {
                Stream::Forward => config.half,
                Stream::Reverse => Half::Both,
            },
            buffer: config.buffer.clone(),
            made_lsn: row.slot_lsn.filter(|_| stream == Stream::Forward).unwrap_or(Lsn::ZERO),
        }),
        // Rows of the way back are marked in other ways than a prepared transaction can be.
        two_phase: config.two_phase && stream == Stream::Forward,
        gate: None,
        tuning: config.tuning,
        on_row_error: match stream {
            Stream::Forward => config.on_row_error,
            // What is kept would be on the side that is left, and out of sight.
            Stream::Reverse => OnRowError::Stop,
        },
        alter: alter(config, stream).await?,
        map: config.map_of(stream),
        two_way: config.two_way.clone(),
        backlog: config.backlog,
        all_read: AllRead::default(),
    })
}

/// Where transactions in progress wait for their end.
fn spill_dir(spool: Option<&Place>) -> PathBuf {
    match spool {
        Some(Place::Spool(place)) => PathBuf::from(&place.dir),
        _ => temporary(),
    }
}

/// The server that a stream reads as it was when the slot was made, and its timeline now.
fn server_of(config: &JobConfig, row: &JobRow, stream: Stream, decoder: &str) -> (Recorded, u32) {
    let (side, system, timeline) = match stream {
        Stream::Forward => (&config.source, &row.source_system, row.timelines.forward),
        Stream::Reverse => (&config.target, &row.target_system, row.timelines.reverse),
    };
    let recorded = recorded(side, system.as_deref(), decoder);
    let timeline = timeline.unwrap_or(recorded.timeline);
    (recorded, timeline)
}

/// On the way back nobody is asked: what does not fit stops it.
async fn alter(config: &JobConfig, stream: Stream) -> Result<Option<Arc<dyn Alter>>> {
    let altering = match stream {
        Stream::Forward => Altering::open(config).await?,
        Stream::Reverse => None,
    };
    Ok(altering.map(|altering| Arc::new(altering) as Arc<dyn Alter>))
}

/// Tables of a side whose rows take no part, and those that do, none if they are more than
/// [`EXPECTED_MAX`].
async fn parted(
    side: &Config,
    selection: &Selection,
) -> Result<(HashSet<QualifiedName>, Vec<QualifiedName>)> {
    let mut session = Session::control(side).await?.with_patience(CATALOG_WAIT);
    let all = tables(&mut session, &Selection::default()).await?;
    let names = all.into_iter().map(|t| t.name);
    let (mut expected, left_out): (Vec<_>, Vec<_>) =
        names.partition(|name| selection.has_rows(name));
    if expected.len() > EXPECTED_MAX {
        expected.clear();
    }
    Ok((left_out.into_iter().collect(), expected))
}
