//! What stands in the way, of all sides: each source and each target is looked at in one pair.

use std::collections::BTreeSet;

use super::Reshard;
use crate::job::Result;
use crate::job::check::{self, CheckOptions, Finding};
use crate::pg::{Purpose, Session};

/// Findings with the pair that each is of first, as `source 1 to target 2`; what is found of one
/// side again is left out. Writes nothing.
///
/// # Errors
/// Where tables and sections do not fit each other, all of it.
pub async fn check(reshard: &Reshard) -> Result<Vec<(String, Finding)>> {
    let layout = reshard.layout().await?;
    let mut seen = BTreeSet::new();
    let mut found = Vec::new();
    for pair in reshard.pairs(&layout)? {
        if pair.source > 0 && pair.target > 0 {
            continue;
        }
        let config = &pair.config;
        let mut source = Session::connect(&config.source, Purpose::Sql).await?;
        let selection = config.options.selection(&mut source).await?;
        let mut options = CheckOptions::of(config, selection);
        options.sample_only_for_limit = true;
        let report = check::run(&config.source, &config.target, options).await?;
        let name = format!("source {} to target {}", pair.source + 1, pair.target + 1);
        for finding in report.findings {
            let side = match finding.side {
                check::Side::Source => format!("source {}", pair.source),
                check::Side::Target => format!("target {}", pair.target),
                check::Side::Here => "here".to_string(),
            };
            // Names of jobs are in some, and say nothing else.
            let message = finding.message.replace(config.job.as_str(), "");
            if seen.insert((side, finding.code, finding.object.clone(), message)) {
                found.push((name.clone(), finding));
            }
        }
    }
    Ok(found)
}
