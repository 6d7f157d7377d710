//! How each stream is read: the choice of decoder and transport, and where it is kept.
//!
//! The decoder is bound to the slot when that is made, and stays. The transport may change at any
//! start. What was not asked for is chosen by what the side lets us do, once, when its slot is
//! made.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use super::store::Store;
use super::{Error, Result};
use crate::catalog;
use crate::decode::Plugin;
use crate::id::{JobName, QualifiedName, Stream};
use crate::pg::{Config, Purpose, Row, Session};
use crate::source::choice::{self, Tried};
use crate::source::{Followed, Transport, publication};

/// What was asked for; `None` is `auto`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// `--decoder`.
    pub decoder: Option<Plugin>,
    /// `--transport`.
    pub transport: Option<Transport>,
    /// `--no-nan`.
    pub plain_numbers: bool,
    /// `--publication`: then the source's decoder is pgoutput.
    pub publication: Option<String>,
}

/// How one stream is read, as stored with the job.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reading {
    /// The slot's plugin.
    pub decoder: String,
    /// `stream` or `pull`.
    pub transport: String,
}

impl Default for Reading {
    fn default() -> Self {
        Reading::of(Plugin::Pgoutput, Transport::Stream)
    }
}

impl Reading {
    fn of(decoder: Plugin, transport: Transport) -> Reading {
        Reading { decoder: decoder.to_string(), transport: transport.to_string() }
    }

    /// The decoder.
    pub fn plugin(&self) -> Result<Plugin> {
        self.decoder.parse().map_err(|e| Error::State(format!("walferry.job.reading: {e}")))
    }

    /// The transport.
    pub fn transport(&self) -> Result<Transport> {
        self.transport.parse().map_err(|e| Error::State(format!("walferry.job.reading: {e}")))
    }

    /// What is asked for now, held against what the slot is bound to: true if the transport is
    /// another one now.
    pub fn follow(&mut self, wanted: &Wanted) -> Result<bool> {
        if let Some(decoder) = wanted.decoder.filter(|decoder| decoder.as_str() != self.decoder) {
            let (decoder, bound) = (decoder.to_string(), self.decoder.clone());
            return Err(Error::OtherDecoder { decoder, bound });
        }
        let Some(transport) = wanted.transport else { return Ok(false) };
        let changed = transport.as_str() != self.transport;
        self.transport = transport.to_string();
        Ok(changed)
    }
}

/// How the streams of a job are read; `None` for one whose slot has not been made.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Readings {
    /// From source to target.
    pub forward: Option<Reading>,
    /// From target to source.
    pub reverse: Option<Reading>,
    /// What a publication would list: schema and name of the forward stream's tables, from before
    /// its slot was made. A table made later is not one of them, and its changes are passed over.
    #[serde(default)]
    pub forward_tables: Vec<(String, String)>,
    /// Their oids in the same order, 0 where unknown: another table may take the name. Empty in
    /// jobs of an earlier version.
    #[serde(default)]
    pub forward_oids: Vec<u32>,
    /// The same of the reverse stream.
    #[serde(default)]
    pub reverse_tables: Vec<(String, String)>,
    /// The same of the reverse stream.
    #[serde(default)]
    pub reverse_oids: Vec<u32>,
    /// What the administrator's publication gave of the forward stream's tables before its slot was
    /// made.
    #[serde(default)]
    pub publication: Option<catalog::Publication>,
    /// The publications that the forward stream reads; none: one of its own name.
    #[serde(default)]
    pub publications: Vec<String>,
    /// The standby that has the forward slot, without secrets; `None`: the source has it.
    #[serde(default)]
    pub decoded_at: Option<String>,
}

impl Readings {
    /// Asks for what is stored of a job. Tables of an earlier version lack the column until the
    /// next run.
    pub(super) const LOAD: &'static str = "select \
         coalesce(pg_catalog.to_jsonb(j) ->> 'reading', '{}') \
         from walferry.job j where name = $1";

    /// What that gave.
    pub(super) fn read(row: Option<&Row>) -> Result<Readings> {
        let Some(row) = row else { return Ok(Readings::default()) };
        serde_json::from_str(row.str(0)?)
            .map_err(|e| Error::State(format!("walferry.job.reading: {e}")))
    }

    /// How a stream is read.
    pub fn of(&mut self, stream: Stream) -> &mut Option<Reading> {
        match stream {
            Stream::Forward => &mut self.forward,
            Stream::Reverse => &mut self.reverse,
        }
    }

    /// The publications that a stream reads; `own` is the name of the job's.
    pub fn publications(&self, stream: Stream, own: &str) -> Vec<String> {
        match (stream, self.publications.as_slice()) {
            (Stream::Forward, given @ [_, ..]) => given.to_vec(),
            _ => vec![own.to_string()],
        }
    }

    /// A stream's tables.
    pub fn tables(&self, stream: Stream) -> Followed {
        let (tables, oids) = match stream {
            Stream::Forward => (&self.forward_tables, &self.forward_oids),
            Stream::Reverse => (&self.reverse_tables, &self.reverse_oids),
        };
        let oids = oids.iter().map(|oid| Some(*oid).filter(|oid| *oid != 0));
        let oids = oids.chain(std::iter::repeat(None));
        let names = tables.iter().map(|(schema, name)| QualifiedName::new(schema, name));
        names.zip(oids).collect()
    }

    /// Keeps a stream's tables, with their oids as far as they are known.
    pub fn follow_tables(
        &mut self,
        stream: Stream,
        tables: &[QualifiedName],
        oids: &HashMap<QualifiedName, u32>,
    ) {
        let names = tables.iter().map(|t| (t.schema.clone(), t.name.clone())).collect();
        let oids = tables.iter().map(|t| oids.get(t).copied().unwrap_or(0)).collect();
        match stream {
            Stream::Forward => (self.forward_tables, self.forward_oids) = (names, oids),
            Stream::Reverse => (self.reverse_tables, self.reverse_oids) = (names, oids),
        }
    }
}

impl Store {
    /// How the job's streams are read, as far as that has been chosen.
    pub async fn load_readings(&mut self) -> Result<Readings> {
        if let Some(held) = self.held_readings() {
            return Ok(held.clone());
        }
        let name = self.job().to_string();
        let rows = self.session.query_params(Readings::LOAD, &[Some(&name)]).await?;
        Readings::read(rows.first())
    }

    /// Stores how the job's streams are read.
    pub async fn save_readings(&mut self, readings: &Readings) -> Result<()> {
        self.forget();
        let readings = serde_json::to_string(readings).map_err(|e| Error::State(e.to_string()))?;
        let sql = "update walferry.job set reading = $2::jsonb, updated_at = now() where name = $1";
        let name = self.job().to_string();
        self.session.query_params(sql, &[Some(&name), Some(&readings)]).await?;
        Ok(())
    }
}

/// A choice and its reasons.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chosen {
    /// The choice.
    pub reading: Reading,
    /// Why this decoder.
    pub decoder_reason: String,
    /// Why this transport.
    pub transport_reason: String,
}

impl std::fmt::Display for Chosen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Reading { decoder, transport } = &self.reading;
        let (why_decoder, why_transport) = (&self.decoder_reason, &self.transport_reason);
        write!(f, "decoder {decoder} ({why_decoder}), transport {transport} ({why_transport})")
    }
}

/// Chooses for one side, whose `tables` are to be read, by publication `name` if by any. Looks and
/// tries; changes nothing.
///
/// Errors: `NoDecoder` where the side has none that may be used, or not the one asked for.
pub async fn choose(
    side: &Config,
    job: &JobName,
    stream: Stream,
    tables: &[QualifiedName],
    wanted: &Wanted,
) -> Result<Chosen> {
    let (decoder, decoder_reason) = choose_decoder(side, job, stream, tables, wanted).await?;
    let (transport, transport_reason) = match wanted.transport {
        Some(transport) => (transport, "asked for".to_string()),
        None => match choice::refused_replication(side).await {
            None => match garbled(side, decoder).await? {
                None => (Transport::Stream, "a replication connection is let in".to_string()),
                Some(reason) => (Transport::Pull, reason),
            },
            Some(refused) => {
                (Transport::Pull, format!("a replication connection is refused: {refused}"))
            }
        },
    };
    if wanted.transport == Some(Transport::Stream)
        && let Some(reason) = garbled(side, decoder).await?
    {
        return Err(Error::NoDecoder { decoder: decoder.to_string(), reason });
    }
    let reading = Reading::of(decoder, transport);
    Ok(Chosen { reading, decoder_reason, transport_reason })
}

/// What keeps a stream from being read as it is bound to be, asked whenever it is about to be
/// relied on: an origin may have been made since. Error: `NoDecoder`.
pub(super) async fn refuse_blind(side: &Config, job: &JobName, reading: &Reading) -> Result<()> {
    let decoder = reading.plugin()?;
    match blind(side, job, decoder).await? {
        Some(reason) => Err(Error::NoDecoder { decoder: decoder.to_string(), reason }),
        None => Ok(()),
    }
}

/// The same of a transport that was asked for after the slot was made.
pub(super) async fn refuse_garbled(side: &Config, reading: &Reading) -> Result<()> {
    let decoder = reading.plugin()?;
    if reading.transport()? == Transport::Pull {
        return Ok(());
    }
    match garbled(side, decoder).await? {
        Some(reason) => Err(Error::NoDecoder { decoder: decoder.to_string(), reason }),
        None => Ok(()),
    }
}

/// A walsender sends a plugin's text in the database's own encoding; the SQL functions convert it.
async fn garbled(side: &Config, decoder: Plugin) -> Result<Option<String>> {
    if !decoder.is_textual() {
        return Ok(None);
    }
    let session = Session::connect(side, Purpose::Sql).await?;
    let encoding = session.parameter("server_encoding").unwrap_or_default();
    let plain = matches!(encoding, "UTF8" | "SQL_ASCII");
    Ok((!plain).then(|| {
        format!("the stream carries {decoder}'s text in {encoding}; pull has it converted")
    }))
}

/// What test_decoding would leave out without a trace.
async fn blind(side: &Config, job: &JobName, decoder: Plugin) -> Result<Option<String>> {
    if decoder != Plugin::TestDecoding {
        return Ok(None);
    }
    let origin = choice::foreign_origin(side, job).await?;
    Ok(origin.map(|origin| {
        format!("it tells no origins apart, and leaves out what comes in by origin {origin}")
    }))
}

/// Why a decoder cannot be used; otherwise what is not sure of it, to follow a reason, or nothing.
async fn unfit(
    side: &Config,
    job: &JobName,
    decoder: Plugin,
) -> Result<std::result::Result<String, String>> {
    let unsure = match choice::try_plugin(side, decoder).await? {
        Tried::Fit => String::new(),
        Tried::Unsure(what) => format!("; {what}"),
        Tried::Unfit(reason) => return Ok(Err(reason)),
    };
    Ok(blind(side, job, decoder).await?.map_or(Ok(unsure), Err))
}

/// The decoder alone, and why.
pub(super) async fn choose_decoder(
    side: &Config,
    job: &JobName,
    stream: Stream,
    tables: &[QualifiedName],
    wanted: &Wanted,
) -> Result<(Plugin, String)> {
    if let Some(name) = wanted.publication.as_ref().filter(|_| stream == Stream::Forward) {
        return Ok((Plugin::Pgoutput, format!("publication {name} was asked for")));
    }
    if let Some(decoder) = wanted.decoder {
        let reason = match unfit(side, job, decoder).await? {
            Ok(unsure) => return Ok((decoder, format!("asked for{unsure}"))),
            Err(reason) => reason,
        };
        return Err(Error::NoDecoder { decoder: decoder.to_string(), reason });
    }
    let mut session = Session::connect(side, Purpose::Sql).await?;
    let Some(refused) = choice::refused_publication(&mut session, tables).await? else {
        return Ok((Plugin::Pgoutput, "a publication may be made".to_string()));
    };
    let name = &*job.object(stream);
    if publication::covers(&mut session, name, tables).await? {
        return Ok((Plugin::Pgoutput, format!("publication {name} is there")));
    }
    let mut reasons = vec![format!("no publication may be made ({refused})")];
    for decoder in Plugin::ALL.into_iter().filter(|plugin| plugin.is_textual()) {
        match unfit(side, job, decoder).await? {
            Ok(unsure) => {
                return Ok((decoder, format!("no publication may be made: {refused}{unsure}")));
            }
            Err(reason) => reasons.push(format!("{decoder}: {reason}")),
        }
    }
    let (decoder, reason) = (Plugin::Pgoutput.to_string(), reasons.join("; "));
    Err(Error::NoDecoder { decoder, reason })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_transport_may_change_and_the_decoder_may_not() {
        let mut reading = Reading::default();
        assert!(!reading.follow(&Wanted::default()).unwrap());
        let pull = Wanted { transport: Some(Transport::Pull), ..Wanted::default() };
        assert!(reading.follow(&pull).unwrap());
        assert!(!reading.follow(&pull).unwrap());
        assert_eq!(reading.transport().unwrap(), Transport::Pull);
        reading.decoder = "wal2json".to_string();
        let other = Wanted { decoder: Some(Plugin::Pgoutput), ..Wanted::default() };
        let refused = reading.follow(&other).unwrap_err().to_string();
        assert!(refused.contains("wal2json") && refused.contains("pgoutput"), "{refused}");
    }
}
