//! Opening a session: hosts, addresses, TLS or not, which server will do, and what to tell a
//! person when none does.

use std::net::SocketAddr;
use std::path::PathBuf;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};

use super::auth::{Greeting, Handshake};
use super::config::{SslMode, TargetSessionAttrs};
use super::frame::FrameReader;
use super::session::Purpose;
use super::socket::{self, Socket};
use super::{Config, Error, Host, Pipeline, Result, ServerError, Session, tls};
use crate::secret::ExposeSecret;

/// SSLRequest: length 8, code 80877103.
const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x2f];

/// Settings that make values come out and go in the same on every server, whatever is set for the
/// role or the database. The same that PostgreSQL's own subscriber sends, and those of pg_dump.
const SETTINGS: &str = "-c DateStyle=ISO -c IntervalStyle=postgres -c extra_float_digits=3 \
     -c bytea_output=hex -c array_nulls=on -c xmloption=content -c TimeZone=UTC \
     -c lc_monetary=C -c statement_timeout=0 -c lock_timeout=0 \
     -c idle_in_transaction_session_timeout=0 -c default_transaction_read_only=off \
     -c default_transaction_isolation=read\\ committed -c row_security=off \
     -c standard_conforming_strings=on -c quote_all_identifiers=off \
     -c exit_on_error=off -c client_min_messages=warning -c search_path= \
     -c tcp_keepalives_idle=10 -c tcp_keepalives_interval=5 -c tcp_keepalives_count=3";

/// How often a server looks, in the middle of a statement, whether we are still there. With the
/// keepalives above, locks of a client that vanished are held for half a minute and not for hours.
const CHECK_EVERY: &str = "set client_connection_check_interval = '5s'";

/// One place behind a host's name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Address {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

/// A session's end of the line, kept so that a cancel request reaches the same server the same way.
#[derive(Clone, Debug)]
pub(super) struct Place {
    pub config: Config,
    pub host: Host,
    pub address: Address,
    pub encrypted: bool,
}

/// A connection that has been let in.
pub(super) struct Opened {
    pub reader: FrameReader,
    pub writer: tokio::io::WriteHalf<Socket>,
    pub peer: String,
    pub place: Place,
    pub greeting: Greeting,
}

/// What was tried and why it did not do.
#[derive(Default)]
struct Tried {
    failures: Vec<Error>,
}

/// Opens a session on the first server of `config` that will do.
pub(super) async fn open(config: &Config, purpose: Purpose) -> Result<Session> {
    let mut hosts = config.hosts.clone();
    if config.load_balance {
        fastrand::shuffle(&mut hosts);
    }
    // A pooler's console knows no SQL to ask its state with.
    let wanted = match purpose {
        Purpose::PoolerAdmin => TargetSessionAttrs::Any,
        _ => config.target_session_attrs,
    };
    let mut tried = Tried::default();
    let passes: &[TargetSessionAttrs] = match wanted {
        TargetSessionAttrs::PreferStandby => {
            &[TargetSessionAttrs::Standby, TargetSessionAttrs::Any]
        }
        _ => std::slice::from_ref(&wanted),
    };
    for pass in passes {
        tried.failures.clear();
        for host in &hosts {
            if let Some(session) = try_host(config, host, purpose, *pass, &mut tried).await? {
                return Ok(session);
            }
        }
    }
    Err(tried.error(config))
}

/// `Ok(None)` where the next host may do better; an `Err` ends the search, as in libpq: a server
/// that answered and refused the role or the database would be asked again under another name.
async fn try_host(
    config: &Config,
    host: &Host,
    purpose: Purpose,
    wanted: TargetSessionAttrs,
    tried: &mut Tried,
) -> Result<Option<Session>> {
    let peer = config.peer(host);
    let looking = tokio::time::timeout(config.connect_timeout, addresses(host, &peer));
    let places = match looking.await.unwrap_or_else(|_| Err(too_slow(config, &peer))) {
        Ok(places) => places,
        Err(error) => {
            tried.failures.push(error);
            return Ok(None);
        }
    };
    for address in places {
        let opening = open_wanted(config, host, &address, purpose, wanted);
        let outcome = tokio::time::timeout(config.connect_timeout, opening).await;
        match outcome.unwrap_or_else(|_| Err(too_slow(config, &peer))) {
            Ok(session) => return Ok(Some(session)),
            Err(error) if is_final(&error) => return Err(error),
            Err(error) => tried.failures.push(error),
        }
    }
    Ok(None)
}

fn too_slow(config: &Config, peer: &str) -> Error {
    Error::Timeout {
        peer: peer.to_string(),
        doing: "opening a connection (connect_timeout)".to_string(),
        seconds: config.connect_timeout.as_secs(),
    }
}

fn is_final(error: &Error) -> bool {
    match error {
        Error::Config(_) => true,
        Error::Connect { transient, server, .. } => server.is_some() && !transient,
        _ => false,
    }
}

impl Tried {
    /// The one failure, or one error that lists all of them.
    fn error(mut self, config: &Config) -> Error {
        let mut said: Vec<String> = Vec::new();
        for failure in &self.failures {
            let text = match failure {
                Error::Connect { peer, detail, .. } => format!("{peer}: {detail}"),
                other => other.to_string(),
            };
            if !said.contains(&text) {
                said.push(text);
            }
        }
        let transient = self.failures.iter().any(|f| {
            use crate::fault::{Fault, Faulty};
            f.fault() == Fault::Retry
        });
        if said.len() <= 1 {
            let only = self.failures.pop();
            return only.unwrap_or_else(|| Error::Config("no host to connect to".to_string()));
        }
        let server = self.failures.iter().find_map(|f| f.server().cloned().map(Box::new));
        let label = if config.label.is_empty() { "" } else { " of " };
        Error::Connect {
            peer: format!("any server{label}{}", config.label),
            detail: said.join("; "),
            transient,
            server,
        }
    }
}

async fn addresses(host: &Host, peer: &str) -> Result<Vec<Address>> {
    if host.hostaddr.is_none() && host.host.starts_with(['/', '@']) {
        let file = format!("{}/.s.PGSQL.{}", host.host, host.port);
        // libpq writes the zero byte of the abstract namespace as "@".
        let file = file.strip_prefix('@').map(|name| format!("\0{name}")).unwrap_or(file);
        return Ok(vec![Address::Unix(PathBuf::from(file))]);
    }
    let name = host.hostaddr.as_deref().unwrap_or(&host.host);
    let unknown = |reason: String| Error::Connect {
        peer: peer.to_string(),
        detail: format!("the name \"{name}\" cannot be resolved: {reason}; check its spelling"),
        transient: true,
        server: None,
    };
    let found = tokio::net::lookup_host((name, host.port)).await;
    let found: Vec<Address> =
        found.map_err(|e| unknown(e.to_string()))?.map(Address::Tcp).collect();
    if found.is_empty() { Err(unknown("no address".to_string())) } else { Ok(found) }
}

/// A session on this address, if the server is of the kind that is wanted.
async fn open_wanted(
    config: &Config,
    host: &Host,
    address: &Address,
    purpose: Purpose,
    wanted: TargetSessionAttrs,
) -> Result<Session> {
    let opened = open_by_mode(config, host, address, purpose).await?;
    let mut session = Session::from_opened(opened);
    settle(&mut session, purpose).await?;
    if wanted == TargetSessionAttrs::Any {
        return Ok(session);
    }
    let sql = "SELECT pg_catalog.pg_is_in_recovery(), \
               pg_catalog.current_setting('transaction_read_only')::pg_catalog.bool";
    let rows = session.query(sql).await?;
    let row = rows.first().ok_or_else(|| Error::Result("no answer about recovery".to_string()))?;
    let (standby, read_only) = (row.bool(0)?, row.bool(1)?);
    let will_do = match wanted {
        TargetSessionAttrs::Any | TargetSessionAttrs::PreferStandby => true,
        TargetSessionAttrs::ReadWrite => !read_only,
        TargetSessionAttrs::ReadOnly => read_only,
        TargetSessionAttrs::Primary => !standby,
        TargetSessionAttrs::Standby => standby,
    };
    if will_do {
        return Ok(session);
    }
    let is = if standby { "a standby" } else { "a primary" };
    Err(Error::Connect {
        peer: config.peer(host),
        detail: format!("the server is {is} and target_session_attrs={wanted}"),
        transient: true, // A failover may be under way.
        server: None,
    })
}

/// Settings that cannot be in the start-up packet: those that older servers do not know would end
/// the session there, and one that is only wrong where it is off. One round trip.
async fn settle(session: &mut Session, purpose: Purpose) -> Result<()> {
    if purpose == Purpose::PoolerAdmin {
        return Ok(());
    }
    let mut settings = vec![
        "select pg_catalog.set_config('synchronous_commit', 'local', false) \
         where pg_catalog.current_setting('synchronous_commit') = 'off'",
    ];
    let major = session.major_version();
    settings.extend((major >= 14).then_some("set idle_session_timeout = 0"));
    settings.extend((major >= 17).then_some("set transaction_timeout = 0"));
    if purpose != Purpose::Sql {
        // A walsender takes simple queries alone.
        session.query(&settings.join("; ")).await?;
        return Ok(());
    }
    let mut wanted = Pipeline::new();
    settings.iter().for_each(|sql| wanted.once(sql));
    if major < 14 {
        return session.exchange(wanted, |_| {}).await;
    }
    let mut check = Pipeline::new();
    check.once(CHECK_EVERY);
    // Not every platform of a server can do the second, and refuses then.
    let [wanted, _] = session.exchange_each([wanted, check]).await?;
    wanted.map(|_| ())
}

/// Tries what sslmode allows, in its order.
async fn open_by_mode(
    config: &Config,
    host: &Host,
    address: &Address,
    purpose: Purpose,
) -> Result<Opened> {
    let attempt = |encrypted| open_once(config, host, address, purpose, encrypted);
    if matches!(address, Address::Unix(_)) {
        return attempt(false).await;
    }
    let (first, second) = match config.ssl_mode {
        SslMode::Disable => (false, None),
        SslMode::Allow => (false, Some(true)),
        SslMode::Prefer => (true, Some(false)),
        SslMode::Require | SslMode::VerifyCa | SslMode::VerifyFull => (true, None),
    };
    let error = match attempt(first).await {
        Ok(opened) => return Ok(opened),
        Err(error) => error,
    };
    // The other way only where pg_hba.conf (28000) or TLS itself stood in the way of this one.
    let other_way = match &error {
        Error::Connect { server: Some(said), .. } => said.code == "28000",
        Error::Connect { server: None, detail, .. } => detail.starts_with("TLS"),
        _ => false,
    };
    match second {
        Some(second) if other_way => attempt(second).await.map_err(|_| error),
        _ => Err(error),
    }
}

/// Opens the byte stream; with `encrypted` it is TLS, or plain where the server has none and
/// sslmode=prefer takes that.
pub(super) async fn connect_socket(
    config: &Config,
    host: &Host,
    address: &Address,
    encrypted: bool,
) -> Result<Socket> {
    let peer = config.peer(host);
    let failed = |error: std::io::Error| unreachable(&peer, address, error);
    let mut stream = match address {
        Address::Unix(path) => {
            return UnixStream::connect(path).await.map(Socket::Unix).map_err(failed);
        }
        Address::Tcp(address) => TcpStream::connect(address).await.map_err(failed)?,
    };
    socket::tune(&stream).map_err(failed)?;
    if !encrypted {
        return Ok(Socket::Tcp(stream));
    }
    if !config.ssl.direct {
        stream.write_all(&SSL_REQUEST).await.map_err(failed)?;
        let mut answer = [0u8];
        stream.read_exact(&mut answer).await.map_err(failed)?;
        match answer {
            [b'S'] => {}
            [b'N'] if config.ssl_mode == SslMode::Prefer => return Ok(Socket::Tcp(stream)),
            [b'N'] => {
                let detail = format!(
                    "the server has no TLS and sslmode={} insists on it: set ssl=on there, or \
                     sslmode=prefer here",
                    config.ssl_mode
                );
                return Err(Error::refused(&peer, detail));
            }
            _ => return Err(Error::refused(&peer, "TLS: the server's answer is no PostgreSQL's")),
        }
    }
    let stream = tls::handshake(stream, config, host, &peer).await?;
    Ok(Socket::Tls(Box::new(stream)))
}

fn unreachable(peer: &str, address: &Address, error: std::io::Error) -> Error {
    let (at, place) = match address {
        Address::Tcp(address) => (format!(" ({address})"), "host and port"),
        Address::Unix(_) => (String::new(), "the socket's directory and port"),
    };
    let advice = match error.kind() {
        std::io::ErrorKind::ConnectionRefused => format!(
            "; is the server running, and listening there (listen_addresses, port)? \
             If so check {place}"
        ),
        std::io::ErrorKind::NotFound => format!("; no server has its socket there: check {place}"),
        std::io::ErrorKind::UnexpectedEof => "; the server hung up at once".to_string(),
        _ => "; check the network and firewalls between".to_string(),
    };
    Error::Connect {
        peer: peer.to_string(),
        detail: format!("{error}{at}{advice}"),
        transient: true,
        server: None,
    }
}

/// One attempt: socket, TLS, start-up packet, authentication, up to ReadyForQuery.
async fn open_once(
    config: &Config,
    host: &Host,
    address: &Address,
    purpose: Purpose,
    encrypted: bool,
) -> Result<Opened> {
    let peer = config.peer(host);
    let socket = connect_socket(config, host, address, encrypted).await?;
    let encrypted = matches!(socket, Socket::Tls(_));
    let channel_binding = match &socket {
        Socket::Tls(stream) => tls::channel_binding(stream),
        _ => None,
    };
    let (read, mut writer) = tokio::io::split(socket);
    let mut reader = FrameReader::new(read);
    let mut options = match &config.options {
        Some(more) => format!("{SETTINGS} {more}"),
        None => SETTINGS.to_string(),
    };
    if let Some(secret) = &config.secret_options {
        options = format!("{options} {}", secret.expose_secret());
    }
    let mut parameters = vec![
        ("user", config.user.as_str()),
        ("database", config.dbname.as_str()),
        ("client_encoding", "UTF8"),
        ("application_name", config.application_name.as_deref().unwrap_or("walferry")),
    ];
    if purpose != Purpose::PoolerAdmin {
        parameters.push(("options", options.as_str()));
    }
    if purpose == Purpose::Replication {
        parameters.push(("replication", "database"));
    }
    let mut handshake =
        Handshake { reader: &mut reader, writer: &mut writer, peer: &peer, host, channel_binding };
    let greeting = match handshake.run(config, &parameters).await {
        Ok(greeting) => greeting,
        Err(Error::Server { error, .. }) => {
            return Err(let_in_refused(config, host, encrypted, *error));
        }
        Err(error) => return Err(error),
    };
    let place =
        Place { config: config.clone(), host: host.clone(), address: address.clone(), encrypted };
    Ok(Opened { reader, writer, peer, place, greeting })
}

/// The server's refusal, with what to do about it.
fn let_in_refused(config: &Config, host: &Host, encrypted: bool, error: ServerError) -> Error {
    let said = error.to_string();
    let transient = matches!(error.code.as_str(), "53300" | "57P03" | "57P01" | "57P02");
    let advice = advice(config, host, encrypted, &error);
    Error::Connect {
        peer: config.peer(host),
        detail: if advice.is_empty() { said } else { format!("{said}; {advice}") },
        transient,
        server: Some(Box::new(error)),
    }
}

fn advice(config: &Config, host: &Host, encrypted: bool, error: &ServerError) -> String {
    let role = crate::id::quote_ident(&config.user);
    match error.code.as_str() {
        "3D000" => format!(
            "correct the database's name, or CREATE DATABASE {}",
            crate::id::quote_ident(&config.dbname)
        ),
        "28P01" => {
            let from = match (&config.password, &config.passfile) {
                (Some(_), _) => "the connection string or PGPASSWORD".to_string(),
                (None, Some(file)) if config.password_for(host).is_some() => {
                    file.path().display().to_string()
                }
                _ => return format!("give the password of role {role}"),
            };
            format!("the password came from {from}")
        }
        "28000" if error.message.contains("pg_hba.conf") => {
            let kind = if encrypted { "hostssl" } else { "host" };
            format!(
                "add a line such as \"{kind} {} {} ADDRESS scram-sha-256\" to pg_hba.conf there, \
                 then SELECT pg_reload_conf()",
                config.dbname, config.user
            )
        }
        "28000" if error.message.contains("not permitted to log in") => {
            format!("ALTER ROLE {role} LOGIN")
        }
        "42501" if error.message.contains("walsender") || error.message.contains("replication") => {
            format!(
                "ALTER ROLE {role} REPLICATION (on a managed cloud: grant its replication role)"
            )
        }
        "53300" if error.message.contains("max_wal_senders") => {
            "raise max_wal_senders, or end a replication connection".to_string()
        }
        "53300" => "raise max_connections (or the role's or database's CONNECTION LIMIT), or end \
                    idle sessions"
            .to_string(),
        "57P03" => "it will be tried again".to_string(),
        "08P01" if error.message.contains("startup parameter") => {
            "this is a pooler: give the address of the PostgreSQL server itself".to_string()
        }
        _ => String::new(),
    }
}
