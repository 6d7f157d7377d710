//! Changes that wait in a topic, with Apache Kafka itself.

mod contract;
mod errors;
mod halves;
mod moving;
mod outside;
mod secure;

use std::sync::OnceLock;

use walferry::demo::kafka::Broker;

/// A broker that the tests share; each has topics of its own. Its guard ends it with this process.
pub fn broker() -> &'static Broker {
    static BROKER: OnceLock<Broker> = OnceLock::new();
    BROKER.get_or_init(|| Broker::start(&[]).unwrap())
}

/// A topic's name that no other test uses.
pub fn topic() -> String {
    format!("it-{:016x}", fastrand::u64(..))
}
