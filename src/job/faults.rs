//! What a caller can do about each error of this room: most rooms below know it of their own.

use super::Error;
use crate::cluster;
use crate::fault::{Fault, Faulty};

impl Faulty for Error {
    fn fault(&self) -> Fault {
        match self {
            Error::Pg(error) => error.fault(),
            Error::Source(error) => error.fault(),
            Error::Apply(error) => error.fault(),
            Error::Spool(error) => error.fault(),
            Error::Buffer(error) => error.fault(),
            Error::Copy(error) => error.fault(),
            Error::Schema(error) => error.fault(),
            Error::Cutover(error) => error.fault(),
            Error::Verify(error) => error.fault(),
            Error::Mapped(error) => error.fault(),
            Error::Reshard(error) => error.fault(),
            Error::Large(error) => error.fault(),
            Error::Cluster(cluster::read::Error::Pg(error)) => error.fault(),
            Error::LeaseLost => Fault::Retry,
            _ => Fault::Stop,
        }
    }
}
