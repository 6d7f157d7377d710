//! Options about standbys that take over.

use crate::config;
use crate::job::failover::{AfterFailover, Failover};

/// What is done so that one may, and once one has.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct FailoverArgs {
    /// Have standbys of 17 and newer keep copies of our slots: on, off, or auto, where the server
    /// can [default: auto]
    #[arg(long, value_name = "auto|on|off", value_parser = str::parse::<Failover>)]
    failover: Option<Failover>,
    /// What is done where a promoted standby lacks what the stream needs: stop and say so, or
    /// refill, which makes a new slot, compares every table and reads again what differs
    /// [default: stop]
    #[arg(long, value_name = "stop|refill", value_parser = str::parse::<AfterFailover>)]
    after_failover: Option<AfterFailover>,
}

impl FailoverArgs {
    /// As given, or as in the file, or the default.
    pub fn failover(&self, in_file: Option<String>) -> Result<Failover, config::Error> {
        Ok(self.failover.or(read("--failover", in_file)?).unwrap_or_default())
    }

    /// The same.
    pub fn after(&self, in_file: Option<String>) -> Result<AfterFailover, config::Error> {
        Ok(self.after_failover.or(read("--after-failover", in_file)?).unwrap_or_default())
    }
}

fn read<T>(option: &'static str, in_file: Option<String>) -> Result<Option<T>, config::Error>
where
    T: std::str::FromStr<Err = String>,
{
    let read = in_file.map(|text| text.parse()).transpose();
    read.map_err(|message| config::Error::Value { option, message })
}
