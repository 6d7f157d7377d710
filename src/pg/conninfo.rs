//! The text of a connection string, taken apart: URI or key=value, into parameters by name.
//!
//! Pure, and careful with what its errors repeat: a mistyped separator turns part of a password
//! into a host, a port or a key, so no error here shows a value.
//!
//! <https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-CONNSTRING>

use std::collections::HashMap;

use super::{Error, Result};

/// What becomes of a parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Use {
    /// Does what it does in libpq.
    Honoured,
    /// Accepted; the reason why it changes nothing here.
    Ignored(&'static str),
    /// Would promise something that is not kept; what to do instead.
    Refused(&'static str),
}

/// A parameter of libpq: its key, its environment variable, and what becomes of it.
pub(super) struct Key {
    pub name: &'static str,
    pub variable: Option<&'static str>,
    pub usage: Use,
}

const OWN_BOUNDS: Use = Use::Ignored("walferry sets its own bounds on silent connections");
const NO_GSS: Use = Use::Ignored("GSSAPI is not spoken");
const OAUTH: Use = Use::Refused("OAuth is not spoken; use a password, a certificate or trust");

const fn key(name: &'static str, variable: &'static str) -> Key {
    Key { name, variable: Some(variable), usage: Use::Honoured }
}

const fn other(name: &'static str, usage: Use) -> Key {
    Key { name, variable: None, usage }
}

/// Every parameter of libpq up to version 18.
pub(super) const KEYS: &[Key] = &[
    key("host", "PGHOST"),
    key("hostaddr", "PGHOSTADDR"),
    key("port", "PGPORT"),
    key("dbname", "PGDATABASE"),
    key("user", "PGUSER"),
    key("password", "PGPASSWORD"),
    key("passfile", "PGPASSFILE"),
    key("sslmode", "PGSSLMODE"),
    key("sslrootcert", "PGSSLROOTCERT"),
    key("sslcert", "PGSSLCERT"),
    key("sslkey", "PGSSLKEY"),
    key("sslsni", "PGSSLSNI"),
    key("sslnegotiation", "PGSSLNEGOTIATION"),
    key("sslcertmode", "PGSSLCERTMODE"),
    key("ssl_min_protocol_version", "PGSSLMINPROTOCOLVERSION"),
    key("ssl_max_protocol_version", "PGSSLMAXPROTOCOLVERSION"),
    key("gssencmode", "PGGSSENCMODE"),
    key("channel_binding", "PGCHANNELBINDING"),
    key("require_auth", "PGREQUIREAUTH"),
    key("target_session_attrs", "PGTARGETSESSIONATTRS"),
    key("load_balance_hosts", "PGLOADBALANCEHOSTS"),
    key("connect_timeout", "PGCONNECT_TIMEOUT"),
    key("options", "PGOPTIONS"),
    key("application_name", "PGAPPNAME"),
    other("fallback_application_name", Use::Honoured),
    other("client_encoding", Use::Ignored("sessions always talk UTF-8")),
    other("keepalives", OWN_BOUNDS),
    other("keepalives_idle", OWN_BOUNDS),
    other("keepalives_interval", OWN_BOUNDS),
    other("keepalives_count", OWN_BOUNDS),
    other("tcp_user_timeout", OWN_BOUNDS),
    other("krbsrvname", NO_GSS),
    other("gsslib", NO_GSS),
    other("gssdelegation", NO_GSS),
    other("sslcompression", Use::Ignored("TLS compression is never used")),
    other("sslkeylogfile", Use::Refused("keys are never written to a file; leave it out")),
    other("min_protocol_version", Use::Ignored("protocol 3.0 is all that is needed")),
    other("max_protocol_version", Use::Ignored("protocol 3.0 is all that is needed")),
    other("replication", Use::Ignored("walferry opens replication sessions itself")),
    other(
        "sslpassword",
        Use::Refused("encrypted keys cannot be read: decrypt the key into a file of mode 0600"),
    ),
    other("sslcrl", Use::Refused("revocation lists are not read; leave it out")),
    other("sslcrldir", Use::Refused("revocation lists are not read; leave it out")),
    other("requirepeer", Use::Refused("the peer of a Unix socket is not looked at; leave it out")),
    other(
        "service",
        Use::Refused("service files are not read; write the service's parameters out"),
    ),
    other("servicefile", Use::Refused("service files are not read; write the parameters out")),
    other("requiressl", Use::Refused("it is gone from libpq; use sslmode=require")),
    other("authtype", Use::Ignored("libpq ignores it too")),
    other("tty", Use::Ignored("libpq ignores it too")),
    other("scram_client_key", Use::Refused("give the password instead")),
    other("scram_server_key", Use::Refused("give the password instead")),
    other("oauth_issuer", OAUTH),
    other("oauth_client_id", OAUTH),
    other("oauth_client_secret", OAUTH),
    other("oauth_scope", OAUTH),
];

/// Parameters by key. The last of several with one key counts, as in libpq.
pub(super) type Parameters = HashMap<&'static str, String>;

/// Takes a connection string apart. Values are decoded but not understood.
pub(super) fn read(text: &str) -> Result<Parameters> {
    let text = text.trim();
    let uri = text.strip_prefix("postgresql://").or_else(|| text.strip_prefix("postgres://"));
    match uri {
        Some(rest) => read_uri(rest),
        None => read_pairs(text),
    }
}

/// The connection string without its password, which comes apart. Unchanged where it has none, else
/// as key=value pairs.
pub(super) fn split_password(text: &str) -> Result<(String, Option<String>)> {
    let mut parameters = read(text)?;
    let Some(password) = parameters.remove("password") else {
        return Ok((text.trim().to_string(), None));
    };
    let quoted = |value: &str| value.replace('\\', "\\\\").replace('\'', "\\'");
    let pair = |(key, value): (&&str, &String)| format!("{key}='{}'", quoted(value));
    let mut pairs: Vec<String> = parameters.iter().map(pair).collect();
    pairs.sort();
    Ok((pairs.join(" "), Some(password)))
}

fn refused(message: impl Into<String>) -> Error {
    Error::Config(format!("connection string: {}", message.into()))
}

/// Looks `name` up among the known keys and keeps the value. `shown` is false where the key could
/// be a piece of a secret.
fn store(parameters: &mut Parameters, name: &str, value: String, shown: bool) -> Result<()> {
    let Some(key) = KEYS.iter().find(|k| k.name == name) else {
        let word = name.len() <= 40
            && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-');
        if !shown || !word {
            return Err(refused("a key that does not exist (quote values that hold spaces)"));
        }
        let near = nearest(name, KEYS.iter().map(|k| k.name));
        let near = near.map(|n| format!("; did you mean \"{n}\"?")).unwrap_or_default();
        return Err(refused(format!("there is no key \"{name}\"{near}")));
    };
    match key.usage {
        Use::Refused(instead) => Err(refused(format!("{name} is not supported: {instead}"))),
        Use::Ignored(why) => {
            tracing::debug!(key = name, why, "connection parameter has no effect");
            Ok(())
        }
        Use::Honoured => {
            parameters.insert(key.name, value);
            Ok(())
        }
    }
}

/// `[user[:password]@][host][:port][,...][/dbname][?key=value[&...]]`, cut as libpq cuts it.
fn read_uri(rest: &str) -> Result<Parameters> {
    let mut parameters = Parameters::new();
    let rest = match rest.find(['@', '/']) {
        Some(at) if rest.get(at..=at) == Some("@") => {
            let (userinfo, rest) = rest.split_at(at);
            let (user, password) = match userinfo.split_once(':') {
                Some((user, password)) => (user, Some(password)),
                None => (userinfo, None),
            };
            insert_nonempty(&mut parameters, "user", decode(user, "the user")?);
            if let Some(password) = password {
                insert_nonempty(&mut parameters, "password", decode(password, "the password")?);
            }
            rest.strip_prefix('@').unwrap_or(rest)
        }
        _ => rest,
    };
    let (hosts, rest) = rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()));
    let (path, query) = match rest.split_once('?') {
        Some((path, query)) => (path, Some(query)),
        None => (rest, None),
    };
    read_hosts(&mut parameters, hosts)?;
    let dbname = decode(path.strip_prefix('/').unwrap_or(path), "the database name")?;
    insert_nonempty(&mut parameters, "dbname", dbname);
    for pair in query.unwrap_or_default().split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair
            .split_once('=')
            .ok_or_else(|| refused("after \"?\" there must be key=value pairs joined by \"&\""))?;
        let (key, value) = (decode(key, "a key")?, decode(value, "a value")?);
        // JDBC's spelling, which libpq takes too.
        if key == "ssl" && value == "true" {
            store(&mut parameters, "sslmode", "require".to_string(), true)?;
        } else {
            store(&mut parameters, &key, value, true)?;
        }
    }
    Ok(parameters)
}

fn insert_nonempty(parameters: &mut Parameters, key: &'static str, value: String) {
    if !value.is_empty() {
        parameters.insert(key, value);
    }
}

fn read_hosts(parameters: &mut Parameters, text: &str) -> Result<()> {
    if text.is_empty() {
        return Ok(());
    }
    const ESCAPE: &str =
        "write \"@\", \":\", \"/\" and \"?\" of a user name or password as %40, %3A, %2F and %3F";
    if text.contains('@') {
        return Err(refused(format!("the host part of the URI holds an \"@\": {ESCAPE}")));
    }
    let (mut hosts, mut ports) = (Vec::new(), Vec::new());
    for element in text.split(',') {
        let (host, port) = match element.strip_prefix('[') {
            Some(inner) => {
                let (host, after) = inner
                    .split_once(']')
                    .ok_or_else(|| refused("an IPv6 address in the URI has no closing \"]\""))?;
                let port = match after.strip_prefix(':') {
                    Some(port) => port,
                    None if after.is_empty() => "",
                    None => return Err(refused("after \"]\" only \":port\" may follow")),
                };
                (host, port)
            }
            None => element.split_once(':').unwrap_or((element, "")),
        };
        if port.contains(':') {
            return Err(refused(format!("write an IPv6 address as [address]; or {ESCAPE}")));
        }
        if !port.is_empty() && port.parse::<u16>().is_err() {
            return Err(refused(format!("the port in the URI is not 1 to 65535; or {ESCAPE}")));
        }
        hosts.push(decode(host, "the host")?);
        ports.push(port.to_string());
    }
    if hosts.iter().any(|host| !host.is_empty()) {
        parameters.insert("host", hosts.join(","));
    }
    if ports.iter().any(|port| !port.is_empty()) {
        parameters.insert("port", ports.join(","));
    }
    Ok(())
}

/// Percent-decoding; `what` names the part in errors.
fn decode(text: &str, what: &str) -> Result<String> {
    let mut rest = text;
    while let Some((_, after)) = rest.split_once('%') {
        let hex = after.get(..2).filter(|h| h.bytes().all(|b| b.is_ascii_hexdigit()));
        match hex {
            Some("00") => return Err(refused(format!("{what} holds a zero byte (%00)"))),
            Some(_) => {}
            None => {
                return Err(refused(format!(
                    "in {what}, \"%\" must be followed by two hex digits (a plain \"%\" is %25)"
                )));
            }
        }
        rest = after.get(2..).unwrap_or_default();
    }
    let decoded = percent_encoding::percent_decode_str(text).decode_utf8();
    decoded.map(|t| t.into_owned()).map_err(|_| refused(format!("{what} is not UTF-8")))
}

/// `key = value` pairs; values with spaces in single quotes; `\` takes the next character as it is.
fn read_pairs(text: &str) -> Result<Parameters> {
    let mut parameters = Parameters::new();
    let mut rest = text;
    let mut before: Option<String> = None;
    while !rest.is_empty() {
        let end = rest.find(|c: char| c == '=' || c.is_whitespace()).unwrap_or(rest.len());
        let (name, tail) = rest.split_at(end);
        let Some(tail) = tail.trim_start().strip_prefix('=') else {
            return Err(no_equals(text, before.as_deref()));
        };
        let (value, tail) = read_value(tail.trim_start(), name)?;
        let secret = before.as_deref().is_some_and(|b| b.contains("password"));
        store(&mut parameters, name, value, !secret)?;
        before = Some(name.to_string());
        rest = tail.trim_start();
    }
    Ok(parameters)
}

/// The error for a word without `=`. The word is not shown: it may be half a password.
fn no_equals(text: &str, before: Option<&str>) -> Error {
    match before {
        None if text.contains("//") => {
            refused("a URI must begin with postgres:// or postgresql://")
        }
        None => refused(
            "neither a URI (postgres://user@host/dbname) nor key=value pairs \
             (host=... dbname=... user=...)",
        ),
        Some(key) => refused(format!(
            "a word without \"=\" follows the value of {key}; a value with spaces needs single \
             quotes: {key}='...'"
        )),
    }
}

fn read_value<'t>(text: &'t str, name: &str) -> Result<(String, &'t str)> {
    let mut value = String::new();
    let quoted = text.strip_prefix('\'');
    let body = quoted.unwrap_or(text);
    let mut chars = body.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '\\' => {
                if let Some((_, escaped)) = chars.next() {
                    value.push(escaped);
                }
            }
            '\'' if quoted.is_some() => return Ok((value, body.get(at + 1..).unwrap_or_default())),
            c if quoted.is_none() && c.is_whitespace() => {
                return Ok((value, body.get(at..).unwrap_or_default()));
            }
            c => value.push(c),
        }
    }
    match quoted {
        Some(_) => Err(refused(format!("the quoted value of {name} has no closing quote"))),
        None => Ok((value, "")),
    }
}

/// The candidate within a few typing mistakes of `word`, the nearest one.
pub(super) fn nearest<'c>(
    word: &str,
    candidates: impl Iterator<Item = &'c str>,
) -> Option<&'c str> {
    let word = word.to_ascii_lowercase().replace('-', "_");
    let scored = candidates.map(|c| (distance(&word, c), c));
    let (mistakes, best) = scored.min_by_key(|(mistakes, _)| *mistakes)?;
    (mistakes <= 1 + word.len() / 4).then_some(best)
}

/// Levenshtein's distance.
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = i;
        let mut left = i + 1;
        let mut next = vec![left];
        for (y, above) in b.bytes().zip(row.iter().skip(1)) {
            left = (diagonal + usize::from(x != y)).min(left + 1).min(above + 1);
            diagonal = *above;
            next.push(left);
        }
        row = next;
    }
    row.last().copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn get(text: &str) -> Vec<(&'static str, String)> {
        let mut pairs: Vec<_> = read(text).unwrap().into_iter().collect();
        pairs.sort();
        pairs
    }

    fn error(text: &str) -> String {
        read(text).unwrap_err().to_string()
    }

    #[test]
    fn uris_are_cut_as_libpq_cuts_them() {
        assert_eq!(get("postgres://"), []);
        assert_eq!(
            get("postgresql://a%20b:p%40%2F:x@h1:5433,h2,[::1]:77/my%2Fdb\
                 ?sslmode=require&options=-c%20a%3Db"),
            [
                ("dbname", "my/db".to_string()),
                ("host", "h1,h2,::1".to_string()),
                ("options", "-c a=b".to_string()),
                ("password", "p@/:x".to_string()),
                ("port", "5433,,77".to_string()),
                ("sslmode", "require".to_string()),
                ("user", "a b".to_string()),
            ]
        );
        assert_eq!(
            get("postgres://%2Fvar%2Frun/db"),
            [("dbname", "db".to_string()), ("host", "/var/run".to_string())]
        );
        assert_eq!(
            get("postgres:///db?host=/tmp&port=5"),
            [("dbname", "db".to_string()), ("host", "/tmp".to_string()), ("port", "5".to_string())]
        );
        assert_eq!(get("postgres://h?ssl=true")[1].1, "require");
    }

    #[test]
    fn pairs_take_quotes_escapes_and_spaces_around_the_equals_sign() {
        assert_eq!(
            get(r" host = 'a b\'c\\' user=x\ y  dbname='' "),
            [
                ("dbname", String::new()),
                ("host", r"a b'c\".to_string()),
                ("user", "x y".to_string())
            ]
        );
        assert_eq!(get("user=a user=b"), [("user", "b".to_string())]);
        assert_eq!(get("keepalives=1 tcp_user_timeout=3 krbsrvname=x"), []);
    }

    #[test]
    fn a_typo_is_named_with_the_nearest_key() {
        assert!(error("postgres://h/d?sslmod=require").contains("did you mean \"sslmode\"?"));
        assert!(error("hsot=h").contains("did you mean \"host\"?"));
        assert!(error("target-session-attr=any").contains("\"target_session_attrs\""));
        assert!(!error("zzzzzz=h").contains("did you mean"));
        assert!(error("service=x").contains("not supported"));
        assert!(error("mydb").contains("neither a URI"));
    }

    #[test]
    fn no_error_repeats_a_piece_of_a_password() {
        for text in [
            "postgres://u:sec@ret@h/db",
            "postgres://u:sec/ret@h/db",
            "postgres://u:%secret@h/db",
            "postgres://u:sec%ret@h/db",
            "postgres:/u:secret@h/db",
            "postgress://u:secret@h/db",
            "password=my secret user=u",
            "password=my secret=x user=u",
            "password='my secret user=u",
            "secret",
        ] {
            let said = error(text);
            assert!(!said.contains("sec") && !said.contains("ret@"), "{text}: {said}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in "(postgres://)?[ -~]{0,60}|\\PC{0,40}") {
            let _ = read(&text);
        }

        #[test]
        fn any_value_survives_quoting(value in "\\PC{0,30}") {
            let quoted = value.replace('\\', "\\\\").replace('\'', "\\'");
            let read = read(&format!("password='{quoted}'")).unwrap();
            prop_assert_eq!(read.get("password").unwrap(), &value);
        }
    }
}
