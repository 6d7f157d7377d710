//! An administrator's publication (`--publication`): what it gives of the job's tables is found out
//! before the slot is made, kept with the job, and held against what there is whenever the stream
//! starts and before a cutover.
//!
//! Rows, columns and operations that it leaves out are neither copied nor followed nor compared.
//! Such a job has no way back, and so no cutover: the old side would keep rows that the target
//! never had, and a TRUNCATE or a key used again there would act on them.
//!
//! walferry's own tables (the canary, and the marker where there are no origins) are shown by a
//! publication of its own, read beside the other, or by the other where the role may make none.

use super::reading::Readings;
use super::run::{JobConfig, Notice, Report, Runner};
use super::store::Store;
use super::{Error, Result};
use crate::catalog::{Publication, Table};
use crate::id::{QualifiedName, Stream, quote_ident};
use crate::pg::{Config, Session};
use crate::source::publication;

/// As it is now. Error: `NoPublication`.
pub(super) async fn read(session: &mut Session, name: &str) -> Result<Publication> {
    let missing = || Error::NoPublication { publication: name.to_string() };
    Publication::read(session, name).await?.ok_or_else(missing)
}

/// The statement that adds tables to a publication.
pub(super) fn add_tables(name: &str, tables: &[QualifiedName]) -> String {
    let tables: Vec<String> = tables.iter().map(|t| format!("ONLY {}", t.quoted())).collect();
    format!("ALTER PUBLICATION {} ADD TABLE {};", quote_ident(name), tables.join(", "))
}

/// Tables with the publication's word on what is left out of them; empty if nothing is.
pub(super) fn partial(publication: &Publication, tables: &[Table]) -> Vec<(QualifiedName, String)> {
    let narrowed = publication.narrow(tables.to_vec()).into_iter();
    let partial = narrowed.filter(|t| publication.shows(&t.name) && !t.published.is_whole());
    partial.map(|table| (table.name, table.published.left_out())).collect()
}

impl Runner {
    /// Before the slot is made: what the publication of the job gives, if it has one, kept in
    /// `readings`. Makes walferry's own beside it where one is needed.
    ///
    /// Errors: it is not there, or does not show a table (`NotPublished`).
    pub(super) async fn take_publication(
        &mut self,
        source: &mut Session,
        readings: &mut Readings,
        tables: &[Table],
        own: &[QualifiedName],
    ) -> Result<()> {
        let Some(name) = self.config.options.publication.clone() else { return Ok(()) };
        let publication = read(source, &name).await?;
        let missing = publication.missing(tables);
        if !missing.is_empty() {
            let tables: Vec<QualifiedName> = missing.iter().map(|t| t.name.clone()).collect();
            let fix = add_tables(&name, &tables);
            return Err(Error::NotPublished { publication: name, tables, fix });
        }
        readings.publication = Some(publication.of(tables));
        readings.publications = vec![name.clone()];
        let needed: Vec<QualifiedName> =
            own.iter().filter(|table| !publication.shows(table)).cloned().collect();
        // Without a way back there is no canary.
        if needed.is_empty() || !partial(&publication, tables).is_empty() {
            return Ok(());
        }
        let ours = self.config.job.object(Stream::Forward);
        match publication::ensure(source, &ours, &needed).await {
            Ok(_) => readings.publications.push(ours),
            Err(crate::source::Error::PublicationRefused { .. }) => {
                let fix = add_tables(&name, &needed);
                return Err(Error::NotPublished { publication: name, tables: needed, fix });
            }
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }

    /// The publication as it was kept, once it was seen to be the same still; `None` for a job
    /// without one. Error: `PublicationChanged`.
    pub(super) async fn unchanged_publication(&mut self) -> Result<Option<Publication>> {
        unchanged(&self.config, &mut self.store, &self.report).await
    }

    /// Tables of the source whose rows are copied, with what the publication gives of them.
    pub(super) async fn copied_tables(&mut self) -> Result<Vec<Table>> {
        let tables = self.tables_with_rows(&self.config.source).await?;
        let map = self.config.map.clone();
        let tables = tables.into_iter().map(|table| table.mapped_by(map.as_deref())).collect();
        Ok(match self.unchanged_publication().await? {
            Some(publication) => publication.narrow(tables),
            None => tables,
        })
    }

    /// Refuses a flip of a job that is only of a part of its tables' rows.
    pub(super) async fn refuse_partial(&mut self) -> Result<()> {
        let Some(publication) = self.unchanged_publication().await? else { return Ok(()) };
        let tables = self.tables(&self.config.source).await?;
        let partial = partial(&publication, &tables);
        if partial.is_empty() {
            return Ok(());
        }
        let left_out = partial.iter().map(|(table, what)| format!("{table}: {what}")).collect();
        Err(Error::Partial { publication: publication.name, left_out })
    }
}

/// Tables of `side` that hold rows and that the job's publication does not show.
pub(super) async fn unpublished(
    side: &Config,
    name: &str,
    tables: &[Table],
) -> Result<Vec<QualifiedName>> {
    let mut session = Session::control(side).await?;
    let publication = read(&mut session, name).await?;
    Ok(publication.missing(tables).into_iter().map(|table| table.name.clone()).collect())
}

/// The publication that the forward stream is read by, if it is an administrator's: an error if it
/// is not as it was when the slot was made.
pub(super) async fn unchanged(
    config: &JobConfig,
    store: &mut Store,
    report: &Report,
) -> Result<Option<Publication>> {
    let Some(kept) = store.load_readings().await?.publication else { return Ok(None) };
    let mut source = Session::control(&config.source).await?;
    let now = read(&mut source, &kept.name).await?;
    let changes = now.changes(&kept);
    if !changes.is_empty() {
        return Err(Error::PublicationChanged { publication: kept.name, changes });
    }
    if now.was_touched(&kept) {
        report(Notice::Said(format!(
            "warning: publication {} was altered since the slot was made, and is now as it was \
             then; if it published less meanwhile, changes are missing: walferry verify tells",
            kept.name
        )));
    }
    Ok(Some(kept))
}
