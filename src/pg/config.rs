//! Where and how to connect: libpq's parameters, from the text, PG* variables, and its defaults.
//!
//! <https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-PARAMKEYWORDS>
//! <https://www.postgresql.org/docs/current/libpq-envars.html>

use std::fmt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::choice::{CHANNEL_BINDINGS, SSL_MODES, TARGET_SESSION_ATTRS, word_of};
pub use super::choice::{ChannelBinding, RequireAuth, SslMode, TargetSessionAttrs};
use super::conninfo::{self, KEYS, Parameters};
use super::passfile::PassFile;
use super::witness::Witness;
use super::{Error, Result};
use crate::secret::{ExposeSecret, SecretString};

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

/// The rarer half of libpq's `ssl*` parameters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SslOptions {
    /// `sslsni`: the host's name is sent in the clear so that a proxy can route by it.
    pub sni: bool,
    /// `sslnegotiation=direct`: TLS from the first byte (PostgreSQL 17 and later).
    pub direct: bool,
    /// `sslcertmode=disable`: never send a certificate of ours.
    pub no_client_cert: bool,
    /// `ssl_min_protocol_version=TLSv1.3`.
    pub only_tls13: bool,
    /// `ssl_max_protocol_version=TLSv1.2`.
    pub only_tls12: bool,
    /// `~/.postgresql`, where root.crt, postgresql.crt and postgresql.key are looked for.
    pub dir: Option<PathBuf>,
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
    /// The password, if one was given in the text or in PGPASSWORD. See [`Config::password_for`].
    pub password: Option<SecretString>,
    /// The password file, asked when no password was given.
    pub passfile: Option<PassFile>,
    /// TLS or not.
    pub ssl_mode: SslMode,
    /// A file of authorities' certificates in PEM, or `system`.
    pub ssl_root_cert: Option<String>,
    /// A file with our certificate in PEM.
    pub ssl_cert: Option<String>,
    /// A file with its key in PEM.
    pub ssl_key: Option<String>,
    /// The rest of TLS.
    pub ssl: SslOptions,
    /// SCRAM channel binding.
    pub channel_binding: ChannelBinding,
    /// Ways of authentication that will do.
    pub require_auth: RequireAuth,
    /// Which of several hosts will do.
    pub target_session_attrs: TargetSessionAttrs,
    /// `load_balance_hosts=random`: the hosts are tried in random order.
    pub load_balance: bool,
    /// Limit of one connection attempt, name look-up to ReadyForQuery.
    pub connect_timeout: Duration,
    /// Shown in pg_stat_activity.
    pub application_name: Option<String>,
    /// Run-time settings sent in the start-up packet, `-c` style.
    pub options: Option<String>,
    /// More of them, which nobody is to see: not in an error, not in a child's environment.
    pub secret_options: Option<SecretString>,
    /// Told of every statement that sessions send.
    pub witness: Option<Witness>,
}

/// No limit was asked for (`connect_timeout=0`): a year, which every clock can count.
const NO_TIMEOUT: Duration = Duration::from_secs(365 * 24 * 3600);

impl Config {
    /// Reads a URI or a key=value string; PG* variables of this process fill the gaps. Reads the
    /// password file, so it blocks shortly.
    pub fn parse(text: &str) -> Result<Config> {
        Self::parse_with(text, &|name| std::env::var(name).ok())
    }

    /// [`Config::parse`] with an environment of the caller's.
    pub fn parse_with(text: &str, environment: &impl Fn(&str) -> Option<String>) -> Result<Config> {
        let given = Given { text: conninfo::read(text)?, environment };
        if environment("PGSERVICE").is_some_and(|service| !service.is_empty())
            && given.get("host").is_none()
        {
            let detail = "PGSERVICE is set, and service files are not read: unset it, and write \
                          the service's parameters out";
            return Err(Error::Config(detail.to_string()));
        }
        let home = environment("HOME").filter(|home| !home.is_empty()).map(PathBuf::from);
        let user = match given.get("user") {
            Some(user) => user,
            None => os_user(environment)?,
        };
        let ssl_root_cert = given.get("sslrootcert");
        let passfile = match given.get("passfile") {
            Some(path) => Some(PassFile::read(path.as_ref(), true)),
            None => home.as_ref().map(|home| PassFile::read(&home.join(".pgpass"), false)),
        };
        Ok(Config {
            label: String::new(),
            hosts: given.hosts()?,
            dbname: given.get("dbname").unwrap_or_else(|| user.clone()),
            user,
            password: given.get("password").map(SecretString::from),
            passfile,
            ssl_mode: given.ssl_mode(ssl_root_cert.as_deref())?,
            ssl_root_cert,
            ssl_cert: given.get("sslcert"),
            ssl_key: given.get("sslkey"),
            ssl: given.ssl_options(home)?,
            channel_binding: given.choice("channel_binding", CHANNEL_BINDINGS)?.unwrap_or_default(),
            require_auth: given.require_auth()?,
            target_session_attrs: given
                .choice("target_session_attrs", TARGET_SESSION_ATTRS)?
                .unwrap_or_default(),
            load_balance: given
                .choice("load_balance_hosts", &[("disable", false), ("random", true)])?
                .unwrap_or(false),
            connect_timeout: given.connect_timeout()?,
            application_name: given
                .get("application_name")
                .or_else(|| given.get("fallback_application_name")),
            options: given.get("options"),
            secret_options: None,
            witness: None,
        })
    }

    /// A connection string without its password, and that: for what is to be stored.
    pub fn split_password(text: &str) -> Result<(String, Option<SecretString>)> {
        let (text, password) = conninfo::split_password(text)?;
        Ok((text, password.map(SecretString::from)))
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

    /// The same with a run-time setting in the start-up packet, unless one of this name is there.
    /// The value has no spaces or backslashes.
    pub fn with_setting(mut self, name: &str, value: &str) -> Config {
        let options = self.options.unwrap_or_default();
        let is_there = options.contains(&format!("{name}="));
        let more = if is_there { String::new() } else { format!(" -c {name}={value}") };
        self.options = Some(format!("{options}{more}").trim().to_string());
        self
    }

    /// The same with run-time settings in the start-up packet that nobody is to see.
    pub fn with_secret_options(mut self, options: Option<SecretString>) -> Config {
        self.secret_options = options;
        self
    }

    /// The same server, with somebody who is told of every statement.
    pub fn with_witness(mut self, witness: Witness) -> Config {
        self.witness = Some(witness);
        self
    }

    /// The same server, another database.
    pub fn with_dbname(mut self, dbname: &str) -> Config {
        self.dbname = dbname.to_string();
        self
    }

    /// `label host:port/dbname`, without secrets: how errors name the server.
    pub fn peer(&self, host: &Host) -> String {
        let v6 = host.host.contains(':');
        let name = if v6 { format!("[{}]", host.host) } else { host.host.clone() };
        let place = format!("{name}:{}/{}", host.port, self.dbname);
        if self.label.is_empty() { place } else { format!("{} {place}", self.label) }
    }

    /// The password for `host`: the one given, or else the password file's.
    pub fn password_for(&self, host: &Host) -> Option<&SecretString> {
        self.password.as_ref().or_else(|| {
            self.passfile.as_ref()?.find(&host.host, host.port, &self.dbname, &self.user)
        })
    }

    /// PG* variables that make libpq programs such as pg_dump connect as we do, so that no secret
    /// is on a command line. Set them over the inherited environment; an empty one unsets.
    pub fn to_env(&self) -> Vec<(String, String)> {
        let list =
            |of: &dyn Fn(&Host) -> String| self.hosts.iter().map(of).collect::<Vec<_>>().join(",");
        let addresses = self.hosts.iter().any(|h| h.hostaddr.is_some());
        let timeout = match self.connect_timeout {
            NO_TIMEOUT => 0,
            limit => limit.as_secs().max(2),
        };
        let hostaddr = list(&|h| h.hostaddr.clone().unwrap_or_default());
        let mut variables = vec![
            ("PGHOST", list(&|h| h.host.clone())),
            ("PGHOSTADDR", if addresses { hostaddr } else { String::new() }),
            ("PGPORT", list(&|h| h.port.to_string())),
            ("PGUSER", self.user.clone()),
            ("PGDATABASE", self.dbname.clone()),
            ("PGSSLMODE", word_of(SSL_MODES, self.ssl_mode).to_string()),
            ("PGSSLROOTCERT", self.ssl_root_cert.clone().unwrap_or_default()),
            ("PGSSLCERT", self.ssl_cert.clone().unwrap_or_default()),
            ("PGSSLKEY", self.ssl_key.clone().unwrap_or_default()),
            ("PGCHANNELBINDING", word_of(CHANNEL_BINDINGS, self.channel_binding).to_string()),
            ("PGREQUIREAUTH", self.require_auth.to_string()),
            (
                "PGTARGETSESSIONATTRS",
                word_of(TARGET_SESSION_ATTRS, self.target_session_attrs).to_string(),
            ),
            ("PGCONNECT_TIMEOUT", timeout.to_string()),
            ("PGOPTIONS", self.options.clone().unwrap_or_default()),
            ("PGAPPNAME", self.application_name.clone().unwrap_or_else(|| "walferry".to_string())),
        ];
        match (&self.password, &self.passfile) {
            (Some(password), _) => {
                variables.push(("PGPASSWORD", password.expose_secret().to_string()));
            }
            (None, Some(file)) => {
                variables.push(("PGPASSWORD", String::new()));
                variables.push(("PGPASSFILE", file.path().display().to_string()));
            }
            (None, None) => variables.push(("PGPASSWORD", String::new())),
        }
        variables.into_iter().map(|(name, value)| (name.to_string(), value)).collect()
    }
}

/// The connection as key=value pairs, the password as `***`.
impl fmt::Display for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let hosts: Vec<&str> = self.hosts.iter().map(|h| h.host.as_str()).collect();
        let ports: Vec<String> = self.hosts.iter().map(|h| h.port.to_string()).collect();
        write!(f, "host={} port={} ", hosts.join(","), ports.join(","))?;
        write!(f, "user={} dbname={} ", self.user, self.dbname)?;
        if self.password.is_some() {
            write!(f, "password=*** ")?;
        }
        write!(f, "sslmode={}", word_of(SSL_MODES, self.ssl_mode))
    }
}

/// The parameters of the text, over those of the environment.
struct Given<'e, E> {
    text: Parameters,
    environment: &'e E,
}

impl<E: Fn(&str) -> Option<String>> Given<'_, E> {
    /// The parameter's value; an empty one is none, as in libpq.
    fn get(&self, name: &str) -> Option<String> {
        if let Some(value) = self.text.get(name) {
            return (!value.is_empty()).then(|| value.clone());
        }
        // An address in the environment must not redirect a host named in the text.
        if name == "hostaddr" && self.text.contains_key("host") {
            return None;
        }
        self.variable(name).and_then(self.environment).filter(|value| !value.is_empty())
    }

    fn variable(&self, name: &str) -> Option<&'static str> {
        KEYS.iter().find(|k| k.name == name).and_then(|k| k.variable)
    }

    /// How errors name the parameter: by its key, or by the variable it came from.
    fn origin(&self, name: &str) -> String {
        match self.variable(name) {
            Some(variable) if !self.text.contains_key(name) => variable.to_string(),
            _ => format!("connection string: {name}"),
        }
    }

    fn wrong(&self, name: &str, detail: String) -> Error {
        Error::Config(format!("{} {detail}", self.origin(name)))
    }

    fn choice<T: Copy>(&self, name: &str, choices: &[(&'static str, T)]) -> Result<Option<T>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        if let Some((_, found)) = choices.iter().find(|(word, _)| *word == value) {
            return Ok(Some(*found));
        }
        let words: Vec<&str> = choices.iter().map(|(word, _)| *word).collect();
        let near = conninfo::nearest(&value, words.iter().copied());
        let near = near.map(|n| format!("; did you mean \"{n}\"?")).unwrap_or_default();
        Err(self.wrong(name, format!("must be one of {}{near}", words.join(", "))))
    }

    fn hosts(&self) -> Result<Vec<Host>> {
        let list = |name| -> Vec<String> {
            let value = self.get(name).unwrap_or_default();
            value.split(',').map(|item| item.trim().to_string()).collect()
        };
        let (names, addresses, ports) = (list("host"), list("hostaddr"), list("port"));
        let count = names.len().max(addresses.len());
        if names.len() > 1 && addresses.len() > 1 && names.len() != addresses.len() {
            let detail = format!("has {} entries and host has {count}", addresses.len());
            return Err(self.wrong("hostaddr", detail));
        }
        if ports.len() != 1 && ports.len() != count {
            let detail = format!("has {} entries for {count} hosts", ports.len());
            return Err(self.wrong("port", detail));
        }
        let at = |list: &[String], index: usize| {
            list.get(index).filter(|item| !item.is_empty()).cloned()
        };
        let mut hosts = Vec::new();
        for index in 0..count {
            let port = at(&ports, if ports.len() == 1 { 0 } else { index });
            let port = match port.as_deref().map(str::parse::<u16>) {
                None => 5432,
                Some(Ok(port)) if port > 0 => port,
                _ => return Err(self.wrong("port", "is not a number from 1 to 65535".to_string())),
            };
            let hostaddr = at(&addresses, index);
            let host = at(&names, index).or_else(|| hostaddr.clone());
            let host = host.unwrap_or_else(|| default_host(port, &SOCKET_DIRS));
            hosts.push(Host { host, hostaddr, port });
        }
        Ok(hosts)
    }

    fn ssl_mode(&self, root_cert: Option<&str>) -> Result<SslMode> {
        let mode = self.choice("sslmode", SSL_MODES)?;
        match (root_cert, mode) {
            (Some("system"), None) => Ok(SslMode::VerifyFull),
            (Some("system"), Some(mode)) if mode < SslMode::VerifyFull => {
                let detail = "is too weak for sslrootcert=system, under which anyone can get a \
                              certificate for a name of their own: use sslmode=verify-full";
                Err(self.wrong("sslmode", detail.to_string()))
            }
            (_, mode) => Ok(mode.unwrap_or_default()),
        }
    }

    fn ssl_options(&self, home: Option<PathBuf>) -> Result<SslOptions> {
        const VERSIONS: &[(&str, u8)] =
            &[("TLSv1", 10), ("TLSv1.1", 11), ("TLSv1.2", 12), ("TLSv1.3", 13)];
        let lowest = self.choice("ssl_min_protocol_version", VERSIONS)?;
        let highest = self.choice("ssl_max_protocol_version", VERSIONS)?;
        if highest.is_some_and(|v| v < 12 || v < lowest.unwrap_or(12)) {
            let detail = "leaves no version: walferry speaks TLSv1.2 and TLSv1.3";
            return Err(self.wrong("ssl_max_protocol_version", detail.to_string()));
        }
        let gss = [("disable", false), ("prefer", false), ("require", true)];
        if self.choice("gssencmode", &gss)? == Some(true) {
            let detail = "=require is not supported: GSSAPI is not spoken; use TLS";
            return Err(self.wrong("gssencmode", detail.to_string()));
        }
        let cert_modes = [("disable", true), ("allow", false), ("require", false)];
        Ok(SslOptions {
            sni: self.choice("sslsni", &[("0", false), ("1", true)])?.unwrap_or(true),
            direct: self
                .choice("sslnegotiation", &[("postgres", false), ("direct", true)])?
                .unwrap_or(false),
            no_client_cert: self.choice("sslcertmode", &cert_modes)?.unwrap_or(false),
            only_tls13: lowest == Some(13),
            only_tls12: highest == Some(12),
            dir: home.map(|home| home.join(".postgresql")),
        })
    }

    fn require_auth(&self) -> Result<RequireAuth> {
        const METHODS: [&str; 7] =
            ["password", "md5", "gss", "sspi", "scram-sha-256", "oauth", "none"];
        let Some(value) = self.get("require_auth") else { return Ok(RequireAuth::default()) };
        let words: Vec<&str> = value.split(',').map(str::trim).collect();
        let negated = words.iter().filter(|word| word.starts_with('!')).count();
        let methods: Vec<String> =
            words.iter().map(|word| word.trim_start_matches('!').to_string()).collect();
        let known = methods.iter().all(|m| METHODS.contains(&m.as_str()));
        if !known || (negated != 0 && negated != words.len()) {
            let detail =
                format!("must list some of {}, all or none with \"!\"", METHODS.join(", "));
            return Err(self.wrong("require_auth", detail));
        }
        Ok(RequireAuth { methods, negated: negated > 0 })
    }

    fn connect_timeout(&self) -> Result<Duration> {
        let Some(value) = self.get("connect_timeout") else {
            return Ok(crate::limit::CONNECT_TIMEOUT);
        };
        match value.trim().parse::<i32>() {
            Ok(seconds) if seconds <= 0 => Ok(NO_TIMEOUT),
            Ok(seconds) => Ok(Duration::from_secs(seconds.unsigned_abs().into())),
            Err(_) => {
                Err(self.wrong("connect_timeout", "is not a whole number of seconds".to_string()))
            }
        }
    }
}

/// Where a libpq of Debian looks for a server's socket, and one as PostgreSQL builds it.
const SOCKET_DIRS: [&str; 2] = ["/var/run/postgresql", "/tmp"];

/// A host that is not named is this one: by the server's socket if there is one, as peer
/// authentication asks for.
fn default_host(port: u16, dirs: &[&str]) -> String {
    let is_there = |dir: &&&str| Path::new(dir).join(format!(".s.PGSQL.{port}")).exists();
    dirs.iter().find(is_there).map_or("localhost", |dir| *dir).to_string()
}

/// Who runs this process: the name of its effective user.
fn os_user(environment: &impl Fn(&str) -> Option<String>) -> Result<String> {
    let named = || {
        let uid = std::fs::metadata("/proc/self").ok()?.uid().to_string();
        let passwd = std::fs::read_to_string("/etc/passwd").ok()?;
        passwd.lines().find_map(|line| {
            let mut fields = line.split(':');
            let name = fields.next()?;
            (fields.nth(1)? == uid).then(|| name.to_string())
        })
    };
    named()
        .or_else(|| environment("USER"))
        .or_else(|| environment("LOGNAME"))
        .filter(|name| !name.is_empty())
        .ok_or_else(|| Error::Config("no role to connect as: give user=... or PGUSER".to_string()))
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;
