//! One topic: is it there, is it ours, what is in it. Everything here blocks.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::{Message, Offset, TopicPartitionList};

use super::Options;
use super::envelope::v1::{Envelope, envelope::Content};
use super::envelope::{self, Unreadable};
use super::error::{Error, Result, is_refusal, said};
use super::follower::Follower;
use super::properties::{Said, property};
use crate::lsn::Lsn;

/// An answer of a broker takes no longer than this, or it counts as away.
const PATIENCE: Duration = Duration::from_secs(5);

/// Between looks at whether to go on waiting.
const POLL: Duration = Duration::from_millis(50);

/// How many records from its end are looked at to see where a topic ends: more than any two writers
/// leave beside each other. If it turns out too few, all are.
const TAIL: i64 = 64;

/// A topic, by a connection of its own.
pub(super) struct Topic {
    options: Options,
    looks: BaseConsumer<Said>,
}

/// One record.
pub(super) struct Record {
    pub offset: i64,
    pub envelope: Envelope,
}

/// Which records a topic has: offsets, `high` exclusive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Extent {
    pub low: i64,
    pub high: i64,
}

impl Topic {
    /// Does not wait for a broker.
    pub fn new(options: &Options) -> Result<Topic> {
        let looks = options.properties.consumer(&options.brokers, true)?;
        Ok(Topic { options: options.clone(), looks })
    }

    /// Its records now; `None` if there is no such topic. Error: it has more than one partition.
    pub fn extent(&self) -> Result<Option<Extent>> {
        let topic = &*self.options.topic;
        let metadata = self.looks.fetch_metadata(Some(topic), PATIENCE);
        let metadata = metadata.map_err(|e| self.failed("ask", &e))?;
        let Some(found) = metadata.topics().iter().find(|found| found.name() == topic) else {
            return Ok(None);
        };
        match found.error().map(RDKafkaErrorCode::from) {
            None => {}
            Some(RDKafkaErrorCode::UnknownTopicOrPartition) => return Ok(None),
            Some(code) => return Err(self.failed("ask", &KafkaError::MetadataFetch(code))),
        }
        if found.partitions().len() != 1 {
            let count = found.partitions().len();
            return Err(Error::Partitions { topic: topic.to_string(), count });
        }
        let marks = self.looks.fetch_watermarks(topic, 0, PATIENCE);
        let (low, high) = marks.map_err(|e| self.failed("ask", &e))?;
        Ok(Some(Extent { low, high }))
    }

    /// Makes the topic: one partition, as many replicas and such a retention as the brokers give.
    pub fn create(&self) -> Result<()> {
        let Options { topic, brokers, properties, .. } = &self.options;
        let admin = properties.common(brokers).create::<AdminClient<DefaultClientContext>>();
        let admin = admin.map_err(|e| property(&e))?;
        let new = NewTopic::new(topic, 1, TopicReplication::Fixed(-1));
        let new = [new.set("cleanup.policy", "delete")];
        let options = AdminOptions::new().operation_timeout(Some(PATIENCE));
        let options = options.request_timeout(Some(PATIENCE));
        let made = wait(admin.create_topics(&new, &options));
        let made = made.map_err(|e| self.failed("create", &e))?;
        for topic in made {
            match topic {
                Ok(_) | Err((_, RDKafkaErrorCode::TopicAlreadyExists)) => {}
                Err((_, code)) => return Err(self.failed("create", &KafkaError::AdminOp(code))),
            }
        }
        // It is there, but may not have a leader yet.
        let begun = Instant::now();
        loop {
            match self.extent() {
                Ok(Some(_)) => return Ok(()),
                Err(error) if begun.elapsed() > PATIENCE => return Err(error),
                _ if begun.elapsed() > PATIENCE => {
                    return Err(self.failed("create", &KafkaError::NoMessageReceived));
                }
                _ => std::thread::sleep(POLL),
            }
        }
    }

    /// The record at an offset, or the first after it.
    pub fn record(&self, offset: i64) -> Result<Record> {
        assign(&self.looks, &self.options.topic, offset)?;
        let begun = Instant::now();
        loop {
            match self.looks.poll(POLL) {
                Some(Ok(message)) => return open(&self.options, &message),
                Some(Err(error)) => self.options.passing(error, offset)?,
                None => {}
            }
            if begun.elapsed() > PATIENCE {
                return Err(self.failed("read", &KafkaError::NoMessageReceived));
            }
        }
    }

    /// Where a record begins.
    fn previous_lsn(&self, offset: i64) -> Result<Lsn> {
        Ok(Lsn(self.record(offset)?.envelope.previous_lsn))
    }

    /// Where the topic begins.
    pub fn first_lsn(&self, extent: Extent) -> Result<Lsn> {
        self.previous_lsn(extent.low)
    }

    /// Where whole transactions end, by the last records alone.
    pub fn tail_lsn(&self, extent: Extent) -> Result<Lsn> {
        let first = extent.low.max(extent.high - TAIL);
        let mut follower = Follower::new(self.previous_lsn(first)?);
        self.follow(&mut follower, Extent { low: first, high: extent.high }, true)?;
        Ok(follower.position())
    }

    /// Where whole transactions end that go on from `from_lsn` without a gap; `from_lsn` itself if
    /// there are none. Reads everything.
    pub fn end_lsn(&self, extent: Extent, from_lsn: Lsn) -> Result<Lsn> {
        let mut follower = Follower::new(from_lsn);
        self.follow(&mut follower, extent, false)?;
        Ok(follower.position())
    }

    fn follow(&self, follower: &mut Follower, extent: Extent, jump: bool) -> Result<()> {
        let reader = Reader::open(&self.options, extent.low)?;
        while reader.next() < extent.high {
            let record = match reader.read(&AtomicBool::new(false), PATIENCE)? {
                Some(record) => record,
                None => return Err(self.failed("read", &KafkaError::NoMessageReceived)),
            };
            let offset = record.offset;
            let again = jump.then(|| record.envelope.clone());
            self.options.readable(follower.take(record.envelope), offset)?;
            if let (Some(envelope), Some(_)) = (again, follower.gap()) {
                follower.jump();
                self.options.readable(follower.take(envelope), offset)?;
            }
        }
        Ok(())
    }

    /// The offset from which to read so that nothing that commits at or after `from_lsn` is missed;
    /// found by halving. Where writers have overlapped it may be too late a one, and then there is
    /// a gap behind it that reading from `extent.low` on does not have.
    pub fn locate(&self, extent: Extent, from_lsn: Lsn) -> Result<i64> {
        let last_below = self.partition_point(extent, |lsn| lsn < from_lsn)? - 1;
        if last_below <= extent.low {
            return Ok(extent.low);
        }
        // The transaction that goes on beyond `from_lsn` may have begun many records before.
        let begin_lsn = self.previous_lsn(last_below)?;
        self.partition_point(Extent { low: extent.low, high: last_below }, |lsn| lsn < begin_lsn)
    }

    fn partition_point(&self, extent: Extent, below: impl Fn(Lsn) -> bool) -> Result<i64> {
        let (mut low, mut high) = (extent.low, extent.high);
        while low < high {
            let middle = low + (high - low) / 2;
            if below(self.previous_lsn(middle)?) {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        Ok(low)
    }

    fn failed(&self, doing: &str, error: &KafkaError) -> Error {
        self.options.failed(doing, error, self.looks.client().context())
    }
}

impl Options {
    /// What a failed call means.
    pub(super) fn failed(&self, doing: &str, error: &KafkaError, context: &Said) -> Error {
        let refusal = error.rdkafka_error_code().is_some_and(is_refusal)
            || matches!(error, KafkaError::AdminOp(code) if is_refusal(*code));
        if refusal {
            let (topic, message) = (self.topic.clone(), said(error));
            return Error::Refused { doing: doing.to_string(), topic, message };
        }
        Error::Broker {
            doing: format!("{doing} topic {}", self.topic),
            brokers: self.brokers.clone(),
            message: context.beside(error),
        }
    }

    /// What a reader is told beside records: nothing that matters, or an error.
    fn passing(&self, error: KafkaError, offset: i64) -> Result<()> {
        let topic = self.topic.clone();
        match error.rdkafka_error_code() {
            Some(
                RDKafkaErrorCode::AutoOffsetReset
                | RDKafkaErrorCode::OffsetOutOfRange
                | RDKafkaErrorCode::UnknownTopicOrPartition
                | RDKafkaErrorCode::UnknownTopic
                | RDKafkaErrorCode::UnknownPartition
                | RDKafkaErrorCode::UnknownTopicId,
            ) => Err(Error::Gone { topic, offset }),
            Some(code) if is_refusal(code) => {
                Err(Error::Refused { doing: "read".to_string(), topic, message: said(&error) })
            }
            // The client connects again by itself.
            _ => Ok(()),
        }
    }

    pub(super) fn readable<T>(
        &self,
        read: std::result::Result<T, Unreadable>,
        offset: i64,
    ) -> Result<T> {
        let topic = self.topic.clone();
        read.map_err(|unreadable| match unreadable {
            Unreadable::Version(found) => {
                Error::Version { topic, offset, found, known: envelope::VERSION }
            }
            Unreadable::Detail(detail) => Error::Corrupt { topic, offset, detail },
        })
    }
}

/// Reads records one after another.
pub(super) struct Reader {
    options: Options,
    consumer: BaseConsumer<Said>,
    next: Mutex<i64>,
}

impl Reader {
    /// Begins with the record at `offset`. Does not wait for a broker.
    pub fn open(options: &Options, offset: i64) -> Result<Reader> {
        let consumer = options.properties.consumer(&options.brokers, false)?;
        assign(&consumer, &options.topic, offset)?;
        Ok(Reader { options: options.clone(), consumer, next: Mutex::new(offset) })
    }

    /// The offset after the last record that was read.
    pub fn next(&self) -> i64 {
        *self.next.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// The next record, waiting for it for so long, or until `stop`.
    pub fn read(&self, stop: &AtomicBool, patience: Duration) -> Result<Option<Record>> {
        let begun = Instant::now();
        loop {
            let next = self.next();
            match self.consumer.poll(POLL.min(patience)) {
                Some(Ok(message)) => {
                    if message.offset() != next {
                        return Err(Error::Gone {
                            topic: self.options.topic.clone(),
                            offset: next,
                        });
                    }
                    let record = open(&self.options, &message)?;
                    *self.next.lock().unwrap_or_else(std::sync::PoisonError::into_inner) += 1;
                    return Ok(Some(record));
                }
                Some(Err(error)) => self.options.passing(error, next)?,
                None => {}
            }
            if begun.elapsed() >= patience || stop.load(Ordering::SeqCst) {
                return Ok(None);
            }
        }
    }
}

fn assign(consumer: &BaseConsumer<Said>, topic: &str, offset: i64) -> Result<()> {
    let mut list = TopicPartitionList::new();
    let added = list.add_partition_offset(topic, 0, Offset::Offset(offset));
    added.and_then(|()| consumer.assign(&list)).map_err(|e| property(&e))
}

/// Reads a record and checks that it is of the stream.
fn open(options: &Options, message: &impl Message) -> Result<Record> {
    let offset = message.offset();
    let bytes = Bytes::copy_from_slice(message.payload().unwrap_or_default());
    let envelope = options.readable(envelope::read(bytes), offset)?;
    if envelope.stream_id != options.stream_id() {
        let whose = match &envelope.content {
            Some(Content::Opening(opening)) => {
                format!(" ({} of job {}, slot {})", opening.stream, opening.job, opening.slot)
            }
            _ => String::new(),
        };
        let expected = format!("slot {} of job {}", options.identity.slot, options.identity.job);
        return Err(Error::Foreign { topic: options.topic.clone(), whose, expected });
    }
    Ok(Record { offset, envelope })
}

/// Waits for a future of the client library, which needs no runtime of its own.
fn wait<T: Send>(future: impl Future<Output = T> + Send) -> T {
    let work = || {
        let runtime = tokio::runtime::Builder::new_current_thread().build();
        runtime.expect("a runtime without I/O takes nothing that can lack").block_on(future)
    };
    // On a thread of its own, as the caller's may belong to a runtime.
    std::thread::scope(|scope| match scope.spawn(work).join() {
        Ok(done) => done,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}
