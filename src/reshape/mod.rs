//! The job's map applied to the stream: changes of the source's tables become changes of the
//! tables that the map makes of them.
//!
//! Why it stands between buffer and applier: what is behind it (net change, sets, COPY, parking,
//! quarantine) sees a stream like any other, of tables that happen to be called as on the target,
//! and needs to know of no map. What is before it (spool, topic) keeps the source's rows as they
//! were. A job without a map has no such stage at all.
//!
//! # Steps
//! 1. `outline`: for each description of a mapped table, its description on the target, which
//!    column goes where, and which expressions have to be computed from which columns.
//! 2. [`Reshaper::run`] takes what the feed has, up to [`GATHER_BYTES`], and collects every row
//!    that something is computed of (`images`). A session on the source computes all of one table
//!    in one SELECT: the same expressions, on the same server, as in the copy.
//! 3. `change`: with the answers, each change becomes exactly one change again, so that places in a
//!    transaction stay what they are: an insert, an update, a delete, or, of rows that the filter
//!    leaves out, a change of a table that nobody writes ([`map::TableMap::left_out`]) and that the
//!    applier counts as filtered.
//!
//! Where rows are shared out among several targets and nothing else chooses, [`map::Slice`] says
//! which are this one's, and nobody is asked.
//!
//! An update takes part in the filter twice, as PostgreSQL's own row filters do:
//! ```text
//! row before   row after
//! in           in           update
//! in           out          delete of the row before
//! out          in           insert of the row after
//! out          out          left out
//! ```
//! <https://www.postgresql.org/docs/current/logical-replication-row-filter.html>
//!
//! # What the stream does not say
//! An unchanged TOAST value is not there. Under REPLICA IDENTITY FULL the row before has it.
//! Otherwise a mask of columns that are all unchanged is unchanged too; anything else is an error
//! that names the statement which mends it, and that check gives before there is a job.
//!
//! # What survives a crash
//! Nothing is kept: what was not applied comes again, and is computed again with the same result,
//! as expressions are immutable.
//!
//! Left out: handing filters to the publication, and computing in the target's statement, where an
//! expression could see another version's functions, and the target unmasked values.

mod change;
mod error;
mod images;
mod outline;

use std::collections::HashMap;
use std::sync::Arc;

use crate::change::{Change, Chunk, Feed, Item, Relation, Sink};
use crate::map::Map;
use crate::pg::{Config, Purpose, Session};

pub use error::Error;

use change::{Reshaped, reshape};
use images::Images;
use outline::Outline;

/// Result with this room's error.
pub type Result<T> = std::result::Result<T, Error>;

/// Bytes of changes that are computed together at most, one item more or less: what a round trip
/// to the source is shared by, held twice for a moment.
const GATHER_BYTES: usize = 1 << 20;

/// Descriptions that are remembered; beyond, all are drawn anew as they come.
const DESCRIPTIONS_MAX: usize = 1000;

/// Applies a map to one stream.
#[derive(Debug)]
pub struct Reshaper {
    session: Session,
    map: Arc<Map>,
    /// By the address of the source's description, which is kept in it.
    outlines: HashMap<usize, Option<Arc<Outline>>>,
    /// Descriptions whose addresses are keys above.
    seen: Vec<Arc<Relation>>,
}

impl Reshaper {
    /// Opens a session on the source, of which [`Map::secret_settings`] must be part.
    pub async fn connect(source: &Config, map: Arc<Map>) -> Result<Reshaper> {
        let mut session = Session::connect(source, Purpose::Sql).await?;
        session.pass_unknown_bytes().await?;
        Ok(Reshaper { session, map, outlines: HashMap::new(), seen: Vec::new() })
    }

    /// Takes items until the feed has ended or the sink is closed, and hands them on in order.
    ///
    /// # Errors
    /// What was taken and not handed on is lost; it comes again when the stream is read again.
    pub async fn run(mut self, mut feed: impl Feed, mut sink: impl Sink) -> Result<()> {
        while let Some(first) = feed.pop().await {
            let mut bytes = first.bytes();
            let mut items = vec![first];
            while bytes < GATHER_BYTES
                && let Some(next) = feed.try_pop()
            {
                bytes += next.bytes();
                items.push(next);
            }
            for item in self.items(items).await? {
                if sink.push(item).await.is_err() {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    async fn items(&mut self, items: Vec<Item>) -> Result<Vec<Item>> {
        if self.seen.len() > DESCRIPTIONS_MAX {
            self.seen.clear();
            self.outlines.clear();
        }
        for item in &items {
            if let Item::Chunk(chunk) = item {
                for relation in chunk.changes.iter().flat_map(Change::relations) {
                    self.learn(relation).await?;
                }
            }
        }
        let mut images = Images::default();
        let mut reshaped = Vec::with_capacity(items.len());
        for item in items {
            reshaped.push(match item {
                Item::Chunk(chunk) => {
                    let changes: Result<Vec<Reshaped>> =
                        chunk.changes.iter().map(|c| self.change(c, &mut images)).collect();
                    (Item::Chunk(Chunk { changes: Vec::new(), ..chunk }), changes?)
                }
                idle => (idle, Vec::new()),
            });
        }
        let answers = images.compute(&mut self.session).await?;
        let finished = reshaped.into_iter().map(|(item, changes)| match item {
            Item::Chunk(mut chunk) => {
                let changes = changes.into_iter().map(|change| change.finish(&answers));
                chunk.changes = changes.collect::<Result<_>>()?;
                chunk.bytes = chunk.changes.iter().map(Change::bytes).sum();
                Ok(Item::Chunk(chunk))
            }
            idle => Ok(idle),
        });
        finished.collect()
    }

    /// A change whose tables are known, with the rows that have to be computed for it.
    fn change(&self, change: &Change, images: &mut Images) -> Result<Reshaped> {
        if let Change::Truncate { relations, cascade, restart_identity } = change {
            let shared = |relation: &&Arc<Relation>| {
                self.outline(relation).is_some_and(|outline| outline.shared)
            };
            if let Some(relation) = relations.iter().find(shared) {
                return Err(Error::Truncated { table: relation.name.clone() });
            }
            let relations = relations.iter().map(|relation| match self.outline(relation) {
                Some(outline) => outline.to.clone(),
                None => relation.clone(),
            });
            return Ok(Reshaped::Done(Change::Truncate {
                relations: relations.collect(),
                cascade: *cascade,
                restart_identity: *restart_identity,
            }));
        }
        let outline = change.relations().first().and_then(|relation| self.outline(relation));
        match outline {
            None => Ok(Reshaped::Done(change.clone())),
            Some(outline) => reshape(outline, change, images),
        }
    }

    fn outline(&self, relation: &Arc<Relation>) -> Option<&Arc<Outline>> {
        self.outlines.get(&address(relation))?.as_ref()
    }

    /// Gets to know a description, asking the source for the types of what is computed from.
    async fn learn(&mut self, relation: &Arc<Relation>) -> Result<()> {
        if self.outlines.contains_key(&address(relation)) {
            return Ok(());
        }
        // A spool and a topic describe a table again and again.
        if let Some(same) = self.seen.iter().find(|seen| ***seen == **relation)
            && let Some(outline) = self.outlines.get(&address(same)).cloned()
        {
            self.seen.push(relation.clone());
            self.outlines.insert(address(relation), outline);
            return Ok(());
        }
        let outline = match self.map.of(&relation.name) {
            Some(table) => Some(Arc::new(Outline::draw(&mut self.session, relation, table).await?)),
            None => None,
        };
        self.refuse_twins(relation, outline.as_deref())?;
        self.seen.push(relation.clone());
        self.outlines.insert(address(relation), outline);
        Ok(())
    }
}

impl Reshaper {
    /// Two tables of the source that would be one.
    fn refuse_twins(&self, relation: &Relation, outline: Option<&Outline>) -> Result<()> {
        let target = outline.map_or(&relation.name, |outline| &outline.to.name);
        let twin = self.seen.iter().find(|seen| {
            let to = self.outline(seen).map_or(&seen.name, |outline| &outline.to.name);
            to == target && seen.name != relation.name
        });
        match twin {
            None => Ok(()),
            Some(twin) => {
                let sources = format!("{} and {}", relation.name, twin.name);
                Err(Error::Taken { target: target.clone(), sources })
            }
        }
    }
}

fn address(relation: &Arc<Relation>) -> usize {
    Arc::as_ptr(relation).addr()
}
