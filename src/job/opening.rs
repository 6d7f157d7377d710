//! Opening a stream's spool or topic: where it is, whose it must be, and what to say if it lacks
//! what the slot was told.
//!
//! Both servers are asked first: the target for its durable progress, the source for what its slot
//! was told. What lies between must be in the spool or topic, or it is lost (law 4).

use super::pipeline::PipeOptions;
use super::place::{BufferOptions, Place};
use super::{Error, Result};
use crate::apply;
use crate::buffer::durable::Durable;
#[cfg(feature = "kafka")]
use crate::buffer::kafka;
use crate::buffer::spool::{self, Coverage, Identity, Spool};
use crate::lsn::Lsn;
use crate::pg::Session;
use crate::source::slot;

/// Which ends of a stream are in this process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Half {
    /// It reads and applies.
    #[default]
    Both,
    /// It reads into a topic.
    Capture,
    /// It applies from a topic.
    Apply,
}

/// Where a stream's spool is.
#[derive(Clone, Debug)]
pub struct SpoolOptions {
    /// Host and directory, or topics.
    pub place: Place,
    /// Limits and settings.
    pub buffer: BufferOptions,
    /// What of it is done here.
    pub half: Half,
    /// The slot's consistent point, where it is known.
    pub made_lsn: Lsn,
}

/// Opens it at the target's progress; what of that a slot may be told is given too.
pub(super) async fn open_once(
    options: &PipeOptions,
    wanted: &SpoolOptions,
) -> Result<(Durable, Lsn)> {
    let name = options.job.object(options.stream);
    let identity = identity(options, wanted);
    if wanted.half == Half::Apply {
        return Ok((wanted.open_to_read(options, identity)?, Lsn::ZERO));
    }
    let mut to = Session::control(&options.to).await?;
    let (progress_lsn, told_lsn) = apply::told_progress(&mut to, &name).await?;
    if options.settles_first() && told_lsn < progress_lsn {
        return Err(apply::Error::standbys_lack(progress_lsn).into());
    }
    let mut from = Session::control(options.read_at()).await?;
    let status = slot::status(&mut from, &name).await?;
    let confirmed_lsn = status.and_then(|s| s.confirmed_flush_lsn).unwrap_or(Lsn::ZERO);
    let (asked, options) = (wanted.clone(), options.clone());
    let opening = move || asked.open_at(&options, identity, progress_lsn, confirmed_lsn);
    let opened = tokio::task::spawn_blocking(opening).await;
    Ok((opened.map_err(|e| Error::State(e.to_string()))??, told_lsn))
}

fn identity(options: &PipeOptions, wanted: &SpoolOptions) -> Identity {
    Identity {
        job: options.job.to_string(),
        stream: options.stream.to_string(),
        system: options.recorded.system_identifier.clone(),
        timeline: options.recorded.timeline,
        slot: options.job.object(options.stream),
        made_lsn: wanted.made_lsn,
    }
}

impl SpoolOptions {
    /// Opens what is there to be gone on with. Blocks.
    fn open_at(
        &self,
        options: &PipeOptions,
        identity: Identity,
        progress_lsn: Lsn,
        confirmed_lsn: Lsn,
    ) -> Result<Durable> {
        let slot = identity.slot.clone();
        let lost = |place: String, mend, held: Option<Coverage>| Error::SpoolLost {
            slot,
            confirmed_lsn,
            progress_lsn,
            place,
            held: match held {
                Some(Coverage { first_lsn, end_lsn }) => format!("holds {first_lsn} to {end_lsn}"),
                None => "is empty".to_string(),
            },
            mend,
        };
        match &self.place {
            Place::Spool(place) => {
                let dir = place.of(&identity.slot);
                let asked = spool::Options::new(&dir, identity, self.buffer.spool_bytes);
                match Spool::open_at(&asked, progress_lsn, confirmed_lsn)? {
                    spool::Opened::Open(spool) => Ok(Durable::Spool(spool)),
                    spool::Opened::Lost(held) => {
                        let place = format!("the spool in {}", dir.display());
                        Err(lost(place, "Bring the directory back", held))
                    }
                }
            }
            #[cfg(feature = "kafka")]
            Place::Kafka(place) => {
                let asked = self.topic(place, options.stream, identity);
                match kafka::Log::open_at(&asked, progress_lsn, confirmed_lsn)? {
                    kafka::Opened::Open(log) => Ok(Durable::Kafka(log)),
                    kafka::Opened::Lost(held) => {
                        let place = format!("topic {} of {}", asked.topic, asked.brokers);
                        Err(lost(place, TOPIC_LOST, held))
                    }
                }
            }
            #[cfg(not(feature = "kafka"))]
            Place::Kafka(_) => Err(no_kafka(options.stream)),
        }
    }

    /// Opens what another process writes.
    #[cfg_attr(not(feature = "kafka"), expect(unused_variables, reason = "are a topic's"))]
    fn open_to_read(&self, options: &PipeOptions, identity: Identity) -> Result<Durable> {
        match &self.place {
            Place::Spool(_) => Err(Error::State("a spool has one process".to_string())),
            #[cfg(feature = "kafka")]
            Place::Kafka(place) => {
                let asked = self.topic(place, options.stream, identity);
                Ok(Durable::Kafka(kafka::Log::open_to_read(&asked)))
            }
            #[cfg(not(feature = "kafka"))]
            Place::Kafka(_) => Err(no_kafka(options.stream)),
        }
    }

    /// An error if what the slot was told is neither on the target nor in the topic. Blocks.
    #[cfg_attr(not(feature = "kafka"), expect(unused_variables, reason = "are a topic's"))]
    fn covers(
        &self,
        options: &PipeOptions,
        identity: Identity,
        progress_lsn: Lsn,
        confirmed_lsn: Lsn,
    ) -> Result<()> {
        match &self.place {
            Place::Spool(_) => Ok(()),
            #[cfg(feature = "kafka")]
            Place::Kafka(place) => {
                let slot = identity.slot.clone();
                let asked = self.topic(place, options.stream, identity);
                let end_lsn = kafka::end_lsn(&asked, progress_lsn)?;
                if end_lsn >= confirmed_lsn {
                    return Ok(());
                }
                Err(Error::SpoolLost {
                    slot,
                    confirmed_lsn,
                    progress_lsn,
                    place: format!("topic {} of {}", asked.topic, asked.brokers),
                    held: format!("goes on without a gap to {end_lsn} only"),
                    mend: TOPIC_LOST,
                })
            }
            #[cfg(not(feature = "kafka"))]
            Place::Kafka(_) => Err(no_kafka(options.stream)),
        }
    }

    #[cfg(feature = "kafka")]
    fn topic(
        &self,
        place: &super::place::KafkaPlace,
        stream: crate::id::Stream,
        identity: Identity,
    ) -> kafka::Options {
        kafka::Options {
            brokers: place.brokers.clone(),
            topic: place.of(stream),
            properties: self.buffer.kafka.clone(),
            identity,
            limit_bytes: self.buffer.spool_bytes,
        }
    }
}

/// What can bring a topic's records back.
#[cfg(feature = "kafka")]
const TOPIC_LOST: &str = "Its retention was too short, or it was made anew: restore it";

#[cfg(not(feature = "kafka"))]
fn no_kafka(stream: crate::id::Stream) -> Error {
    Error::State(format!("the {stream} stream goes through Kafka, and this walferry has none"))
}

/// Nobody else looks whether what is missing from a topic is still with the source.
pub(super) async fn not_lost(options: &PipeOptions, wanted: &SpoolOptions) -> Result<()> {
    let name = options.job.object(options.stream);
    let mut to = Session::control(&options.to).await?;
    let progress_lsn = apply::durable_progress(&mut to, &name).await?;
    let mut from = Session::control(options.read_at()).await?;
    let status = slot::status(&mut from, &name).await?;
    let confirmed_lsn = status.and_then(|s| s.confirmed_flush_lsn).unwrap_or(Lsn::ZERO);
    if confirmed_lsn <= progress_lsn {
        return Ok(());
    }
    let asked = wanted.clone();
    let (options, identity) = (options.clone(), identity(options, wanted));
    let covers = move || asked.covers(&options, identity, progress_lsn, confirmed_lsn);
    let covers = tokio::task::spawn_blocking(covers).await;
    covers.map_err(|e| Error::State(e.to_string()))?
}
