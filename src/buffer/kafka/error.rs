//! What can go wrong with a topic, and what to do then.

use rdkafka::error::{KafkaError, RDKafkaErrorCode};

use crate::fault::{Fault, Faulty};
use crate::lsn::Lsn;

/// Result with the topic's error.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a topic cannot be used. Cheap to clone, as several tasks are told of one failure.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// Not reached, or no answer in time.
    #[error("kafka: cannot {doing} at {brokers}: {message}")]
    Broker {
        /// What was tried.
        doing: String,
        /// Where.
        brokers: String,
        /// The client library's word.
        message: String,
    },
    /// A `kafka.*` setting that is walferry's own, or that librdkafka does not take.
    #[error("kafka.{key}: {message}")]
    Property {
        /// Which.
        key: String,
        /// Why, without its value.
        message: String,
    },
    /// The broker refuses, and will again.
    #[error(
        "kafka: the broker refuses to {doing} of topic {topic}: {message}; walferry needs to \
         describe, read and write it, and to create it if it is not there"
    )]
    Refused {
        /// What was tried.
        doing: String,
        /// The topic.
        topic: String,
        /// The broker's word.
        message: String,
    },
    /// A record that is larger than the broker takes.
    #[error(
        "kafka: topic {topic} does not take a record of {bytes} bytes: set kafka.message.max.bytes \
         in walferry.toml to what its max.message.bytes allows, or raise that"
    )]
    TooLarge {
        /// The topic.
        topic: String,
        /// Of the record.
        bytes: usize,
    },
    /// More than one partition.
    #[error(
        "kafka: topic {topic} has {count} partitions, and order is kept within one only: give \
         another topic in --buffer, or make it anew with one partition (kafka-topics.sh --delete \
         --topic {topic}, then walferry makes it)"
    )]
    Partitions {
        /// The topic.
        topic: String,
        /// How many.
        count: usize,
    },
    /// Records that another version wrote.
    #[error(
        "kafka: the record at offset {offset} of topic {topic} has envelope version {found}, this \
         walferry knows {known}: finish reading the topic with the walferry that wrote it"
    )]
    Version {
        /// The topic.
        topic: String,
        /// Of the record.
        offset: i64,
        /// Its version.
        found: u32,
        /// Ours.
        known: u32,
    },
    /// Records of another stream.
    #[error(
        "kafka: topic {topic} holds another stream{whose}, not {expected}: give another topic in \
         --buffer, or, if nobody needs it any more: kafka-topics.sh --delete --topic {topic}"
    )]
    Foreign {
        /// The topic.
        topic: String,
        /// As far as the record at hand says.
        whose: String,
        /// The stream that was looked for.
        expected: String,
    },
    /// A record that is no envelope.
    #[error(
        "kafka: the record at offset {offset} of topic {topic} is not walferry's: {detail}. Give \
         another topic in --buffer; nothing else may write into it"
    )]
    Corrupt {
        /// The topic.
        topic: String,
        /// Of the record.
        offset: i64,
        /// What does not check.
        detail: String,
    },
    /// Positions between the target's and the first of the topic are gone.
    #[error(
        "kafka: topic {topic} continues at {first_lsn}, but {progress_lsn} is what was reached: \
         what lies between was deleted from it. Its retention is too short for this target: \
         kafka-configs.sh --alter --topic {topic} --add-config retention.ms=-1,retention.bytes=-1"
    )]
    Gap {
        /// The topic.
        topic: String,
        /// Where it continues.
        first_lsn: Lsn,
        /// From where it was to be read.
        progress_lsn: Lsn,
    },
    /// The records where the reader stood are not there any more.
    #[error(
        "kafka: topic {topic} has no record at offset {offset} any more: it was made anew, or \
         retention deleted what was not read yet"
    )]
    Gone {
        /// The topic.
        topic: String,
        /// Where the reader stood.
        offset: i64,
    },
    /// Something else wrote between our records, or the topic is another.
    #[error(
        "kafka: a record went to offset {found} of topic {topic} instead of {expected}: another \
         writer is at work, or the topic was made anew"
    )]
    OtherWriter {
        /// The topic.
        topic: String,
        /// Where the record is.
        found: i64,
        /// Where it should be.
        expected: i64,
    },
}

impl Faulty for Error {
    fn fault(&self) -> Fault {
        match self {
            // For Gap, Gone and OtherWriter the stream is opened anew, which looks whether the
            // source still has what the topic lacks.
            Error::Broker { .. }
            | Error::Gap { .. }
            | Error::Gone { .. }
            | Error::OtherWriter { .. } => Fault::Retry,
            _ => Fault::Stop,
        }
    }
}

/// True for what a person must mend: trying again gives the same.
pub(super) fn is_refusal(code: RDKafkaErrorCode) -> bool {
    matches!(
        code,
        RDKafkaErrorCode::TopicAuthorizationFailed
            | RDKafkaErrorCode::ClusterAuthorizationFailed
            | RDKafkaErrorCode::PolicyViolation
            | RDKafkaErrorCode::InvalidTopic
            | RDKafkaErrorCode::InvalidConfig
            | RDKafkaErrorCode::InvalidReplicationFactor
    )
}

/// An error's code as words.
pub(super) fn said(error: &KafkaError) -> String {
    match (error.rdkafka_error_code(), error) {
        // The library's own text has the value, which may be a password.
        (_, KafkaError::ClientConfig(_, message, _, _)) => message.clone(),
        (Some(code), _) => code.to_string(),
        _ => error.to_string(),
    }
}
