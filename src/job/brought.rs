//! `--initial-copy none`: a job whose target is a copy that somebody else made, a physical clone, a
//! restored backup, a storage snapshot or a dump.
//!
//! 1. `walferry slot create` makes publication and slot (`reserve`), and then the copy is made.
//! 2. Here, in place of schema and rows: the slot is found, what came along with the copy and is
//!    not meant for it is taken away, and progress begins where the copy stands (`seam`).
//! 3. Large objects, which have no positions, are compared in full and brought level; unlogged
//!    tables, which are empty in a physical copy, are copied.
//! 4. From there on it is a job like any other. `walferry verify` proves the seam.
//!
//! What survives a crash: the position is stored last, and found again by the same way before. The
//! copy's own schema walferry came along with the source's and is used as it is.

use super::prepare::publish;
use super::reading::{Reading, Wanted};
use super::run::{Notice, Runner, published};
use super::seam::{self, Seam};
use super::state::Event;
use super::{Error, Result, altering};
use crate::decode::Plugin;
use crate::id::{QualifiedName, Stream};
use crate::pg::{Purpose, Session};
use crate::source::{SlotStatus, publication, slot};
use crate::{apply, schema};

impl Runner {
    /// In place of slot, schema and pre-data.
    pub(super) async fn take_copy(&mut self) -> Result<Event> {
        // Written last: all else is there then.
        if self.row().await?.slot_lsn.is_some() {
            return Ok(Event::SchemaMade);
        }
        let name = self.config.job.object(Stream::Forward);
        let mut source = Session::connect(&self.config.source, Purpose::Sql).await?;
        let mut target = Session::connect(&self.config.target, Purpose::Sql).await?;
        let status = slot::status(&mut source, &name).await?;
        let status = status.ok_or_else(|| Seam::NoSlot { slot: name.clone() })?;
        if status.database != self.config.source.dbname {
            let (database, source_database) = (status.database, self.config.source.dbname.clone());
            return Err(Seam::ForeignSlot { slot: name, database, source_database }.into());
        }
        let copy_lsn = seam::find(&self.config, &mut source, &mut target, &status).await?;
        let reading = self.take_reading(&mut source, &status).await?;
        // Attributes keep their numbers in a copy of files; what was restored has the source's
        // tables as they are now, or check would have said so.
        let physical = seam::is_physical(&mut source, &mut target).await?;
        let described = match physical {
            true => altering::describe_all(&mut target).await?,
            false => altering::describe_all(&mut source).await?,
        };
        self.leave_behind(&mut target, &name, physical).await?;
        if self.may_capture(&mut source).await? {
            self.capture_ddl(&mut source, &name, &reading).await?;
        }
        // All of it is in the copy.
        self.store.save_dump("", "").await?;
        let kind = self.row().await?.abilities.target.progress();
        apply::begin_at(&mut self.store.session, &name, kind, copy_lsn).await?;
        apply::altered::remember(&mut self.store.session, &name, &described).await?;
        self.remember_objects(&mut target).await?;
        self.store.set_slot_lsn(copy_lsn).await?;
        self.say(Notice::Said(format!(
            "the copy stands at {copy_lsn} of the source's log; the stream begins there"
        )));
        Ok(Event::SchemaMade)
    }

    /// The decoder is the slot's. What was made since the slot is not in its publication, and part
    /// of it may be in the copy and part in the log: refused. Our own tables are.
    async fn take_reading(&mut self, source: &mut Session, status: &SlotStatus) -> Result<Reading> {
        let name = status.name.clone();
        let bound: Plugin = status.plugin.parse().map_err(|unknown| {
            Error::Source(crate::source::Error::Plugin { slot: name.clone(), unknown })
        })?;
        let wanted = self.config.wanted.clone();
        if let Some(decoder) = wanted.decoder.filter(|decoder| *decoder != bound) {
            let (decoder, bound) = (decoder.to_string(), bound.to_string());
            return Err(Error::OtherDecoder { decoder, bound });
        }
        let tables = self.tables(&self.config.source).await?;
        let marked = !self.row().await?.abilities.source.origin;
        let mut followed = published(&self.config.job, &tables, marked);
        if bound == Plugin::Pgoutput {
            let users: Vec<QualifiedName> = tables.into_iter().map(|table| table.name).collect();
            let missing = publication::missing(source, &name, &users).await?;
            if !missing.is_empty() {
                let tables: Vec<String> = missing.iter().map(QualifiedName::to_string).collect();
                return Err(
                    Seam::Unpublished { publication: name, tables: tables.join(", ") }.into()
                );
            }
        }
        if self.may_capture(source).await? {
            schema::captured::make_table(source, &self.config.job).await?;
            followed.push(self.config.job.captured());
        }
        self.config.wanted = Wanted { decoder: Some(bound), ..wanted.clone() };
        let chosen = self.choose_reading(Stream::Forward, &followed).await;
        self.config.wanted = wanted;
        let reading = chosen?;
        publish(source, &name, &followed, &reading).await?;
        Ok(reading)
    }

    /// Takes away what the copy has of the source's end of this job. Slots are a server's, and two
    /// databases of one server have the same.
    async fn leave_behind(
        &mut self,
        target: &mut Session,
        name: &str,
        physical: bool,
    ) -> Result<()> {
        if physical && slot::drop(target, name).await? {
            self.say(Notice::Said(format!("slot {name} came along with the copy, and is dropped")));
        }
        schema::captured::remove(target, &self.config.job).await?;
        publication::drop(target, name).await?;
        Ok(())
    }
}
