//! Changes that wait in a topic, with Apache Kafka itself.

mod contract;
mod errors;
mod halves;
mod moving;
mod outside;
mod secure;

pub use crate::support::job::{broker, topic};
