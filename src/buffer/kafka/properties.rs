//! `kafka.*` settings, and the clients made from them.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use rdkafka::ClientContext;
use rdkafka::config::{ClientConfig, RDKafkaLogLevel};
use rdkafka::consumer::{BaseConsumer, ConsumerContext};
use rdkafka::error::KafkaError;

use super::error::{Error, Result, said};
use crate::secret::{ExposeSecret, SecretString};

/// A larger record is cut; the default limit of brokers, less what a batch takes itself.
const MESSAGE_BYTES: usize = 1_000_000;

/// Settings of librdkafka that the laws depend on. Whoever sets one is told.
const OWN: &[(&str, &str)] = &[
    ("bootstrap.servers", "the brokers stand in --buffer kafka:BROKERS/TOPIC"),
    ("metadata.broker.list", "the brokers stand in --buffer kafka:BROKERS/TOPIC"),
    ("acks", "always all, or a slot would be told what a broker may lose"),
    ("request.required.acks", "always all, or a slot would be told what a broker may lose"),
    ("enable.idempotence", "always true, or a retry could write twice or out of order"),
    ("transactional.id", "exactly once comes from the target's progress"),
    ("message.timeout.ms", "none: what the broker does not take yet waits"),
    ("delivery.timeout.ms", "none: what the broker does not take yet waits"),
    ("max.in.flight", "what idempotence takes"),
    ("max.in.flight.requests.per.connection", "what idempotence takes"),
    ("enable.auto.commit", "the target's progress is where reading goes on"),
    ("auto.offset.reset", "missing records are an error"),
    ("auto.commit.enable", "the target's progress is where reading goes on"),
];

/// Settings for librdkafka as they stand in walferry.toml, `kafka.` cut off. Some are passwords:
/// only the names are ever shown.
///
/// <https://github.com/confluentinc/librdkafka/blob/master/CONFIGURATION.md>
#[derive(Clone, Default)]
pub struct Properties(BTreeMap<String, SecretString>);

impl fmt::Debug for Properties {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

impl Properties {
    /// Takes names and values. Error: a name that is walferry's own to set, or that librdkafka
    /// does not know.
    pub fn new(pairs: impl IntoIterator<Item = (String, SecretString)>) -> Result<Properties> {
        let properties = Properties(pairs.into_iter().collect());
        for key in properties.0.keys() {
            if let Some((_, reason)) = OWN.iter().find(|(own, _)| own == key) {
                let message = format!("is not to be set: {reason}");
                return Err(Error::Property { key: key.clone(), message });
            }
        }
        // Values are checked when they are used first; names and forms already here.
        properties.config("").create_native_config().map_err(|e| property(&e))?;
        Ok(properties)
    }

    /// Bytes of a record, its envelope included.
    pub(super) fn message_bytes(&self) -> usize {
        let given = self.0.get("message.max.bytes").map(|v| v.expose_secret().parse());
        given.and_then(std::result::Result::ok).unwrap_or(MESSAGE_BYTES)
    }

    fn config(&self, brokers: &str) -> ClientConfig {
        let mut config = ClientConfig::new();
        // A broker that comes back is waited for.
        config.set("client.id", "walferry").set("reconnect.backoff.max.ms", "1000");
        config.set_log_level(RDKafkaLogLevel::Warning);
        for (key, value) in &self.0 {
            config.set(key, value.expose_secret());
        }
        config.set("bootstrap.servers", brokers);
        config
    }

    /// For any client, without what only one kind of them takes.
    pub(super) fn common(&self, brokers: &str) -> ClientConfig {
        let mut config = self.config(brokers);
        config.set("message.max.bytes", self.message_bytes().to_string());
        config
    }

    /// For a producer.
    pub(super) fn producer(&self, brokers: &str) -> ClientConfig {
        let mut config = self.common(brokers);
        // Ours only where nothing was given.
        for (key, value) in [("compression.codec", "lz4"), ("linger.ms", "1")] {
            if !self.0.contains_key(key) {
                config.set(key, value);
            }
        }
        config
            .set("enable.idempotence", "true")
            .set("acks", "all")
            .set("message.timeout.ms", "0")
            // Bounded by us, in bytes; see `writer::QUEUE_BYTES`.
            .set("queue.buffering.max.messages", "1000000");
        config
    }

    /// A reader of single partitions from given offsets. Does not wait for a broker.
    pub(super) fn consumer(&self, brokers: &str, quick: bool) -> Result<BaseConsumer<Said>> {
        let mut config = self.common(brokers);
        // No group is joined, nor anything committed; the library wants a name all the same.
        if !self.0.contains_key("group.id") {
            config.set("group.id", "walferry");
        }
        config
            .set("enable.auto.commit", "false")
            .set("enable.auto.offset.store", "false")
            .set("auto.offset.reset", "error")
            .set("fetch.error.backoff.ms", "100")
            // The library would rest for a second where its queue is full.
            .set("fetch.queue.backoff.ms", "2")
            .set("queued.max.messages.kbytes", "16384");
        if quick {
            // A look at one record should neither fetch a megabyte of those behind it, nor wait for
            // the fetch before it to give up waiting for more.
            config.set("fetch.message.max.bytes", "65536").set("queued.min.messages", "1");
            config.set("fetch.wait.max.ms", "5");
        }
        config.create_with_context(Said::default()).map_err(|e| property(&e))
    }
}

/// A refused setting, without its value.
pub(super) fn property(error: &KafkaError) -> Error {
    match error {
        KafkaError::ClientConfig(_, message, key, _) => {
            Error::Property { key: key.clone(), message: message.clone() }
        }
        other => Error::Property { key: "*".to_string(), message: said(other) },
    }
}

/// What a client's threads said last of their connections.
#[derive(Clone, Default)]
pub(super) struct Said(Arc<Mutex<Option<String>>>);

impl Said {
    /// For an error that the library only calls a timeout.
    pub fn last(&self) -> Option<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// With what was said of connections, if anything was.
    pub fn beside(&self, error: &KafkaError) -> String {
        match self.last() {
            Some(last) => format!("{}: {last}", said(error)),
            None => said(error),
        }
    }

    pub fn note(&self, reason: &str) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(reason.to_string());
    }
}

impl ClientContext for Said {
    fn log(&self, _level: RDKafkaLogLevel, facility: &str, message: &str) {
        tracing::debug!(facility, message, "librdkafka");
    }

    fn error(&self, error: KafkaError, reason: &str) {
        tracing::debug!(%error, reason, "librdkafka");
        self.note(reason);
    }
}

impl ConsumerContext for Said {}
