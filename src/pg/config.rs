//! Where and how to connect: libpq's URIs and key=value strings.
//!
//! <https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-CONNSTRING>

use std::time::Duration;

use crate::secret::SecretString;

use super::{Error, Result};

/// One place where the server may be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    /// A host name, an address, or (starting with `/` or `@`) a directory of Unix sockets.
    pub host: String,
    /// An address that saves the look-up of `host` (libpq's hostaddr).
    pub hostaddr: Option<String>,
    /// The port.
    pub port: u16,
}

/// libpq's `sslmode`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, PartialOrd, Ord)]
pub enum SslMode {
    /// Never TLS.
    Disable,
    /// Plain first, TLS if the server insists.
    Allow,
    /// TLS if the server has it.
    #[default]
    Prefer,
    /// TLS or nothing; the certificate is not looked at (unless sslrootcert exists).
    Require,
    /// TLS with a certificate from a known authority.
    VerifyCa,
    /// The same, and made out to the host.
    VerifyFull,
}

/// libpq's `channel_binding`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum ChannelBinding {
    /// Never.
    Disable,
    /// If TLS and the server allow it.
    #[default]
    Prefer,
    /// Or no session.
    Require,
}

/// libpq's `target_session_attrs`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum TargetSessionAttrs {
    /// Any server.
    #[default]
    Any,
    /// One that takes writes.
    ReadWrite,
    /// One that does not.
    ReadOnly,
    /// Not in recovery.
    Primary,
    /// In recovery.
    Standby,
    /// A standby if there is one, else any.
    PreferStandby,
}

/// Everything needed to open a session.
#[derive(Clone, Debug)]
pub struct Config {
    /// What people call this server: `source`, `target`.
    pub label: String,
    /// Tried in order.
    pub hosts: Vec<Host>,
    /// The role.
    pub user: String,
    /// The database.
    pub dbname: String,
    /// The password, if one was given or found.
    pub password: Option<SecretString>,
    /// TLS or not.
    pub ssl_mode: SslMode,
    /// A file of authorities' certificates in PEM, or `system`.
    pub ssl_root_cert: Option<String>,
    /// A file with our certificate in PEM.
    pub ssl_cert: Option<String>,
    /// A file with its key in PEM.
    pub ssl_key: Option<String>,
    /// SCRAM channel binding.
    pub channel_binding: ChannelBinding,
    /// Which of several hosts will do.
    pub target_session_attrs: TargetSessionAttrs,
    /// Limit of one connection attempt.
    pub connect_timeout: Duration,
    /// Shown in pg_stat_activity.
    pub application_name: Option<String>,
    /// Run-time settings sent in the start-up packet, `-c` style.
    pub options: Option<String>,
}

impl Config {
    /// Reads a URI or a key=value string.
    pub fn parse(text: &str) -> Result<Config> {
        let rest = text
            .strip_prefix("postgresql://")
            .or_else(|| text.strip_prefix("postgres://"))
            .ok_or_else(|| Error::Config("not a URI".to_string()))?;
        let (userinfo, rest) = rest.rsplit_once('@').unwrap_or(("postgres", rest));
        let (user, password) = match userinfo.split_once(':') {
            Some((user, password)) => (user, Some(SecretString::from(password.to_string()))),
            None => (userinfo, None),
        };
        let (host, dbname) = rest.split_once('/').unwrap_or((rest, "postgres"));
        let (host, port) = host.split_once(':').unwrap_or((host, "5432"));
        Ok(Config {
            label: String::new(),
            hosts: vec![Host {
                host: host.to_string(),
                hostaddr: None,
                port: port.parse().map_err(|_| Error::Config("bad port".to_string()))?,
            }],
            user: user.to_string(),
            dbname: dbname.to_string(),
            password,
            ssl_mode: SslMode::Prefer,
            ssl_root_cert: None,
            ssl_cert: None,
            ssl_key: None,
            channel_binding: ChannelBinding::Prefer,
            target_session_attrs: TargetSessionAttrs::Any,
            connect_timeout: crate::limit::CONNECT_TIMEOUT,
            application_name: None,
            options: None,
        })
    }

    /// The same server under a name for people (`source`, `target`).
    pub fn labelled(mut self, label: &str) -> Config {
        self.label = label.to_string();
        self
    }

    /// The same, shown as `walferry <job> <role>` in pg_stat_activity.
    pub fn with_application_name(mut self, name: &str) -> Config {
        self.application_name = Some(name.to_string());
        self
    }

    /// The same server, another database.
    pub fn with_dbname(mut self, dbname: &str) -> Config {
        self.dbname = dbname.to_string();
        self
    }

    /// `label host:port/dbname`, without secrets: how errors name the server.
    pub fn peer(&self, host: &Host) -> String {
        let place = format!("{}:{}/{}", host.host, host.port, self.dbname);
        if self.label.is_empty() { place } else { format!("{} {place}", self.label) }
    }
}
