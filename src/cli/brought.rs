//! Options of jobs whose target is a copy that somebody else made.

use clap::Args;

use super::options::{JobArgs, MOVED};
use crate::config::{self, File};
use crate::job::JobConfig;
use crate::job::store::JobOptions;
use crate::lsn::{Lsn, ParseLsnError};

impl JobArgs {
    /// The job where there is no target yet; its source stands in for it.
    pub(super) fn without_target(&self) -> anyhow::Result<JobConfig> {
        let (_, source, _) = self.source_first()?;
        self.between(self.file()?, source.clone(), source)
    }
}

/// Whether walferry copies, and from where it goes on where it does not.
#[derive(Clone, Debug, Default, Args)]
pub struct BroughtArgs {
    /// copy, or none: the target is a copy that somebody else made after walferry slot create, a
    /// physical clone or a dump [default: copy]
    #[arg(long, value_name = "WHAT", help_heading = MOVED)]
    pub initial_copy: Option<String>,
    /// With --initial-copy none: exclusive end of what the copy has of the source's log, where the
    /// copy does not tell itself
    #[arg(long, value_name = "LSN", help_heading = MOVED)]
    pub from_lsn: Option<String>,
}

impl BroughtArgs {
    /// Reads both: true for none, and the position.
    pub(super) fn read(&self, file: &File) -> Result<(bool, Option<Lsn>), config::Error> {
        let value = |option, message| config::Error::Value { option, message };
        let none = match self.initial_copy.as_ref().or(file.initial_copy.as_ref()) {
            None => false,
            Some(text) if text == "copy" => false,
            Some(text) if text == "none" => true,
            Some(other) => {
                let message = format!("\"{other}\" is neither copy nor none");
                return Err(value("--initial-copy", message));
            }
        };
        let Some(text) = self.from_lsn.as_ref().or(file.from_lsn.as_ref()) else {
            return Ok((none, None));
        };
        if !none {
            return Err(value("--from-lsn", "goes with --initial-copy none".to_string()));
        }
        let lsn = text.parse();
        Ok((none, Some(lsn.map_err(|e: ParseLsnError| value("--from-lsn", e.to_string()))?)))
    }
}

/// What a job whose target is somebody else's copy cannot be: all of it is in the copy, as it is.
pub(super) fn refuse_others(options: &JobOptions) -> Result<(), config::Error> {
    let other = match (options.tables_only, &options.publication, &options.map) {
        _ if !options.brought => return Ok(()),
        (true, ..) => "--tables-only",
        (_, Some(_), _) => "--publication",
        (_, _, Some(_)) => "[[map]]",
        _ if options.two_way => "--two-way",
        _ => return Ok(()),
    };
    let message = "does not go together with --initial-copy none".to_string();
    Err(config::Error::Value { option: other, message })
}
