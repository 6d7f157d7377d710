//! Options about standbys that take over.

use super::options::READ;
use crate::config;
use crate::job::JobConfig;
use crate::job::failover::{AfterFailover, Failover};
use crate::pg::Config;
use crate::source::Transport;

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
    /// A standby of the source, of 16 or newer, to make the slot on and to decode from; all else
    /// stays with the source. Later commands need it too [default: the source decodes]
    #[arg(long, value_name = "URI", env = "WALFERRY_DECODE_FROM", hide_env_values = true,
        help_heading = READ)]
    decode_from: Option<String>,
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

    /// Has `job` decode from a standby, where one is given.
    pub fn decode(&self, in_file: Option<String>, job: &mut JobConfig) -> anyhow::Result<()> {
        let Some(text) = self.decode_from.clone().or(in_file) else { return Ok(()) };
        let standby = Config::parse(&text)?.labelled("standby");
        if standby.hosts.len() > 1 {
            let message = "has several hosts: a slot is on one server".to_string();
            return Err(config::Error::Value { option: "--decode-from", message }.into());
        }
        if standby.dbname != job.source.dbname {
            let (theirs, ours) = (&standby.dbname, &job.source.dbname);
            let message = format!("is of database {theirs}, and --source of {ours}");
            return Err(config::Error::Value { option: "--decode-from", message }.into());
        }
        refuse_others(job)?;
        job.wanted.transport = Some(Transport::Stream);
        job.decode_from = Some(standby);
        Ok(())
    }
}

/// What does not go with a slot on a standby, by name.
fn refuse_others(job: &JobConfig) -> Result<(), config::Error> {
    let given = [
        (job.two_phase, "--two-phase on"),
        (job.two_way.is_some(), "--two-way"),
        (job.options.brought, "--initial-copy none"),
        (job.wanted.transport == Some(Transport::Pull), "--transport pull"),
        (
            !job.standbys.is_empty(),
            "--standby: a promoted standby that is decoded from has the slot",
        ),
        (job.failover == Failover::On, "--failover on: servers copy slots of the primary only"),
    ];
    match given.iter().find(|(given, _)| *given) {
        Some((_, other)) => {
            let message = format!("does not go with {other}");
            Err(config::Error::Value { option: "--decode-from", message })
        }
        None => Ok(()),
    }
}

fn read<T>(option: &'static str, in_file: Option<String>) -> Result<Option<T>, config::Error>
where
    T: std::str::FromStr<Err = String>,
{
    let read = in_file.map(|text| text.parse()).transpose();
    read.map_err(|message| config::Error::Value { option, message })
}
