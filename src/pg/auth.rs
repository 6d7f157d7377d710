//! The start of a session: start-up packet, password, SCRAM, and the settings the server reports.

use std::collections::HashMap;

use bytes::BytesMut;
use fallible_iterator::FallibleIterator;
use postgres_protocol::authentication::md5_hash;
use postgres_protocol::authentication::sasl::{self, ScramSha256};
use postgres_protocol::message::backend::Message;
use postgres_protocol::message::frontend;
use tokio::io::{AsyncWriteExt, WriteHalf};

use super::config::ChannelBinding;
use super::frame::{Frame, FrameReader};
use super::socket::Socket;
use super::{Config, Error, Host, Result, ServerError};
use crate::secret::ExposeSecret;

/// What the server told while the session began.
#[derive(Debug, Default)]
pub struct Greeting {
    /// ParameterStatus values: server_version, server_encoding, ...
    pub parameters: HashMap<String, String>,
    /// Process id of the backend.
    pub process_id: i32,
    /// Secret for cancel requests.
    pub secret_key: i32,
}

/// The two halves of a connection that is being set up.
pub struct Handshake<'a> {
    /// Reading half.
    pub reader: &'a mut FrameReader,
    /// Writing half.
    pub writer: &'a mut WriteHalf<Socket>,
    /// Who we talk to, for errors.
    pub peer: &'a str,
    /// The host among the config's: passwords differ per host.
    pub host: &'a Host,
    /// RFC 5929 tls-server-end-point data, when the connection is TLS and the certificate gives it.
    pub channel_binding: Option<Vec<u8>>,
}

impl Handshake<'_> {
    /// Sends the start-up packet with `parameters`, authenticates, and reads up to ReadyForQuery.
    pub async fn run(&mut self, config: &Config, parameters: &[(&str, &str)]) -> Result<Greeting> {
        let mut out = BytesMut::new();
        frontend::startup_message(parameters.iter().copied(), &mut out)
            .map_err(|e| Error::Config(format!("start-up parameters: {e}")))?;
        self.send(out).await?;
        self.authenticate(config).await?;
        self.greeting().await
    }

    async fn send(&mut self, bytes: BytesMut) -> Result<()> {
        let sent = async {
            self.writer.write_all(&bytes).await?;
            self.writer.flush().await
        };
        sent.await.map_err(|source| Error::Io { peer: self.peer.to_string(), source })
    }

    async fn receive(&mut self) -> Result<Message> {
        let frame = self.reader.next().await;
        match frame.map_err(|source| Error::Io { peer: self.peer.to_string(), source })? {
            Frame::Message(Message::ErrorResponse(body)) => Err(Error::Server {
                peer: self.peer.to_string(),
                error: Box::new(ServerError::from_fields(body.fields())),
            }),
            Frame::Message(message) => Ok(message),
            Frame::CopyData(_) | Frame::CopyBoth => Err(self.protocol("COPY during start-up")),
        }
    }

    fn protocol(&self, detail: &str) -> Error {
        Error::Protocol { peer: self.peer.to_string(), detail: detail.to_string() }
    }

    fn refused(&self, detail: String) -> Error {
        Error::refused(self.peer, detail)
    }

    fn password<'c>(&self, config: &'c Config) -> Result<&'c [u8]> {
        if let Some(password) = config.password_for(self.host) {
            return Ok(password.expose_secret().as_bytes());
        }
        let file = config.passfile.as_ref();
        let problem = file.and_then(|f| f.problem()).map(|p| format!("; {p}")).unwrap_or_default();
        Err(self.refused(format!(
            "the server asks for the password of role \"{}\" and none was given; \
             put it in the URI, PGPASSWORD or ~/.pgpass{problem}",
            config.user
        )))
    }

    /// Refuses to go on where `require_auth` rules the server's choice out.
    fn allowed(&self, config: &Config, method: &str) -> Result<()> {
        if config.require_auth.allows(method) {
            return Ok(());
        }
        Err(self.refused(format!(
            "the server chose authentication by \"{method}\", which require_auth={} rules out",
            config.require_auth
        )))
    }

    async fn authenticate(&mut self, config: &Config) -> Result<()> {
        let mut asked = false;
        loop {
            match self.receive().await? {
                Message::AuthenticationOk if asked => return Ok(()),
                Message::AuthenticationOk => {
                    self.bound_by_scram(config)?;
                    return self.allowed(config, "none");
                }
                Message::AuthenticationCleartextPassword => {
                    self.allowed(config, "password")?;
                    self.bound_by_scram(config)?;
                    let password = self.password(config)?;
                    self.send_password(password).await?;
                }
                Message::AuthenticationMd5Password(body) => {
                    self.allowed(config, "md5")?;
                    self.bound_by_scram(config)?;
                    let password = self.password(config)?;
                    let hash = md5_hash(config.user.as_bytes(), password, body.salt());
                    self.send_password(hash.as_bytes()).await?;
                }
                Message::AuthenticationSasl(body) => {
                    self.allowed(config, "scram-sha-256")?;
                    let offered: Vec<String> =
                        body.mechanisms().map(|m| Ok(m.to_string())).collect().unwrap_or_default();
                    self.scram(config, &offered).await?;
                }
                _ => {
                    return Err(self.refused(
                        "the server wants an authentication method that walferry does not speak; \
                         allow scram-sha-256, md5, password, cert or trust in pg_hba.conf"
                            .to_string(),
                    ));
                }
            }
            asked = true;
        }
    }

    async fn send_password(&mut self, password: &[u8]) -> Result<()> {
        let mut out = BytesMut::new();
        let built = frontend::password_message(password, &mut out);
        built.map_err(|e| self.refused(e.to_string()))?;
        self.send(out).await
    }

    /// Only SCRAM binds the session to its TLS channel: under channel_binding=require a server
    /// (or someone posing as it) that asks for less gets nothing.
    fn bound_by_scram(&self, config: &Config) -> Result<()> {
        if config.channel_binding != ChannelBinding::Require {
            return Ok(());
        }
        Err(self.refused(
            "channel_binding=require, but the server did not ask for SCRAM; set the role's \
             password under password_encryption=scram-sha-256 and use scram-sha-256 in pg_hba.conf"
                .to_string(),
        ))
    }

    async fn scram(&mut self, config: &Config, offered: &[String]) -> Result<()> {
        let (mechanism, binding) = self.choose_mechanism(config, offered)?;
        let mut scram = ScramSha256::new(self.password(config)?, binding);
        let mut out = BytesMut::new();
        frontend::sasl_initial_response(mechanism, scram.message(), &mut out)
            .map_err(|e| self.refused(e.to_string()))?;
        self.send(out).await?;
        loop {
            match self.receive().await? {
                Message::AuthenticationSaslContinue(body) => {
                    scram.update(body.data()).map_err(|e| self.refused(format!("SCRAM: {e}")))?;
                    let mut out = BytesMut::new();
                    frontend::sasl_response(scram.message(), &mut out)
                        .map_err(|e| self.refused(e.to_string()))?;
                    self.send(out).await?;
                }
                Message::AuthenticationSaslFinal(body) => {
                    let done = scram.finish(body.data());
                    return done.map_err(|e| self.refused(format!("SCRAM: {e}")));
                }
                _ => return Err(self.protocol("a message that does not belong to SCRAM")),
            }
        }
    }

    fn choose_mechanism(
        &self,
        config: &Config,
        offered: &[String],
    ) -> Result<(&'static str, sasl::ChannelBinding)> {
        let plus = offered.iter().any(|m| m == sasl::SCRAM_SHA_256_PLUS);
        let plain = offered.iter().any(|m| m == sasl::SCRAM_SHA_256);
        let data = match config.channel_binding {
            ChannelBinding::Disable => None,
            _ => self.channel_binding.clone(),
        };
        match data {
            Some(data) if plus => {
                let binding = sasl::ChannelBinding::tls_server_end_point(data);
                Ok((sasl::SCRAM_SHA_256_PLUS, binding))
            }
            _ if config.channel_binding == ChannelBinding::Require => Err(self.refused(
                "channel_binding=require, but this connection has no channel to bind to \
                 (needs TLS and SCRAM-SHA-256-PLUS)"
                    .to_string(),
            )),
            Some(_) if plain => Ok((sasl::SCRAM_SHA_256, sasl::ChannelBinding::unrequested())),
            None if plain => Ok((sasl::SCRAM_SHA_256, sasl::ChannelBinding::unsupported())),
            _ => Err(self.refused("no SASL mechanism in common".to_string())),
        }
    }

    async fn greeting(&mut self) -> Result<Greeting> {
        let mut greeting = Greeting::default();
        loop {
            match self.receive().await? {
                Message::ParameterStatus(body) => {
                    if let (Ok(name), Ok(value)) = (body.name(), body.value()) {
                        greeting.parameters.insert(name.to_string(), value.to_string());
                    }
                }
                Message::BackendKeyData(body) => {
                    greeting.process_id = body.process_id();
                    greeting.secret_key = body.secret_key();
                }
                Message::ReadyForQuery(_) => return Ok(greeting),
                _ => {}
            }
        }
    }
}
