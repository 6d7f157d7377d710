//! By which decoder and transport each side would be read, and why.

use crate::catalog::Table;
use crate::id::{QualifiedName, Stream};
use crate::pg::{self, Config};

use super::super::Error;
use super::super::reading::{Chosen, Wanted, choose};
use super::finding::Level;
use super::{Check, Finding, Side};

impl Check<'_> {
    /// The choice is made when a slot is; a job that has begun has made it.
    pub(super) async fn reading(&mut self) -> pg::Result<()> {
        if self.begun.is_some() {
            return Ok(());
        }
        let rows = |table: &&Table| self.options.selection.has_rows(&table.name) && !table.unlogged;
        let tables: Vec<_> = self.tables.iter().filter(rows).map(|t| t.name.clone()).collect();
        let source = self.source.config.clone();
        self.choice(Side::Source, &source, &tables, self.options.wanted.clone()).await?;
        if self.options.reverse {
            // What was asked for is for the source; nothing is on the target yet.
            let (target, wanted) = (self.target.config.clone(), self.options.wanted.clone());
            let wanted = Wanted { decoder: None, ..wanted };
            self.choice(Side::Target, &target, &[], wanted).await?;
        }
        Ok(())
    }

    async fn choice(
        &mut self,
        side: Side,
        config: &Config,
        tables: &[QualifiedName],
        wanted: Wanted,
    ) -> pg::Result<()> {
        let stream = if side == Side::Source { Stream::Forward } else { Stream::Reverse };
        let job = self.options.job.clone();
        let chosen = match choose(config, &job, stream, tables, &wanted).await {
            Ok(chosen) => chosen,
            Err(Error::Pg(error)) if error.is_closed() => return Err(error),
            // Who may not replicate has been told so; all else follows from it.
            Err(_) if self.is_refused(side) => return Ok(()),
            Err(error) => {
                let message = error.to_string();
                self.findings.push(Finding::error(side, "no-decoder", "decoder", message));
                return Ok(());
            }
        };
        if chosen.reading.transport == "pull" {
            self.forgive(side);
        }
        let major = self.end(side).major_version();
        let large = self.options.streaming.then(|| large(&chosen, major));
        let message = format!("{chosen}{}", large.unwrap_or_default());
        let object = format!("stream from the {}", side.as_str());
        self.findings.push(Finding::info(side, "reading", object, message));
        Ok(())
    }

    fn is_refused(&self, side: Side) -> bool {
        self.findings.iter().any(|f| f.side == side && f.code == "replication-right")
    }

    /// A pull needs no replication connection.
    fn forgive(&mut self, side: Side) {
        for finding in &mut self.findings {
            let walsender = ["replication-connection", "no-free-wal-sender"];
            if finding.side == side && walsender.contains(&finding.code) {
                finding.level = Level::Info;
            }
        }
    }
}

/// What `--streaming on` comes to.
fn large(chosen: &Chosen, major: u32) -> &'static str {
    match (&*chosen.reading.decoder, &*chosen.reading.transport) {
        ("pgoutput", "stream") if major >= 14 => "; large transactions are sent while in progress",
        ("pgoutput", "stream") => {
            "; a server before 14 sends no transaction in progress: it keeps large ones on its disk"
        }
        _ => {
            "; transactions in progress are sent by pgoutput over stream only: large ones are sent \
             once they commit"
        }
    }
}
