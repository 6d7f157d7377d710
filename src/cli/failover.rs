//! Options about standbys that take over.

use super::options::READ;
use crate::config;
use crate::job::failover::{AfterFailover, Failover};
use crate::pg::Config;

/// What is done so that one may, and once one has.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct FailoverArgs {
    /// Have standbys of 17 and newer keep copies of our slots: on, off, or auto, where the server
    /// can [default: auto]
    #[arg(long, value_name = "auto|on|off", value_parser = str::parse::<Failover>,
        help_heading = READ)]
    failover: Option<Failover>,
    /// What is done where a promoted standby lacks what the stream needs: stop and say so, or
    /// refill, which makes a new slot, compares every table and reads again what differs
    /// [default: stop]
    #[arg(long, value_name = "stop|refill", value_parser = str::parse::<AfterFailover>,
        help_heading = READ)]
    after_failover: Option<AfterFailover>,
    /// A standby of the source, of 16 or newer, on which a slot is kept for when it is promoted;
    /// may be given again. Of 17 and newer servers keep copies themselves (--failover)
    #[arg(long, value_name = "URI", env = "WALFERRY_STANDBY", hide_env_values = true,
        help_heading = READ)]
    standby: Vec<String>,
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

    /// The standbys, likewise. They do not go with `two_phase`: what was prepared before a slot was
    /// made comes from it at its commit, after it has come from another at its PREPARE.
    pub fn standbys(&self, in_file: Vec<String>, two_phase: bool) -> anyhow::Result<Vec<Config>> {
        let given = if self.standby.is_empty() { in_file } else { self.standby.clone() };
        if two_phase && !given.is_empty() {
            let message = "does not go with --two-phase on: after a promotion, what was prepared \
                 before its slot was made would come twice"
                .to_string();
            return Err(config::Error::Value { option: "--standby", message }.into());
        }
        let read = given.iter().map(|text| Ok(Config::parse(text)?.labelled("standby")));
        read.collect()
    }
}

fn read<T>(option: &'static str, in_file: Option<String>) -> Result<Option<T>, config::Error>
where
    T: std::str::FromStr<Err = String>,
{
    let read = in_file.map(|text| text.parse()).transpose();
    read.map_err(|message| config::Error::Value { option, message })
}
