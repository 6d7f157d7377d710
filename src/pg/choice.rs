//! Connection parameters whose value is one word of a few.

use std::fmt;

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

/// libpq's `require_auth`: which ways of proving who we are the server may ask for.
///
/// <https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-CONNECT-REQUIRE-AUTH>
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct RequireAuth {
    pub(super) methods: Vec<String>,
    pub(super) negated: bool,
}

impl RequireAuth {
    /// True if `method` (`none`, `password`, `md5`, `scram-sha-256`) will do.
    pub fn allows(&self, method: &str) -> bool {
        self.methods.is_empty() || self.methods.iter().any(|m| m == method) != self.negated
    }
}

impl fmt::Display for RequireAuth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sign = if self.negated { "!" } else { "" };
        let methods: Vec<String> = self.methods.iter().map(|m| format!("{sign}{m}")).collect();
        f.write_str(&methods.join(","))
    }
}

/// Words and what they mean.
pub(super) type Choices<T> = &'static [(&'static str, T)];

pub(super) const SSL_MODES: Choices<SslMode> = &[
    ("disable", SslMode::Disable),
    ("allow", SslMode::Allow),
    ("prefer", SslMode::Prefer),
    ("require", SslMode::Require),
    ("verify-ca", SslMode::VerifyCa),
    ("verify-full", SslMode::VerifyFull),
];

pub(super) const CHANNEL_BINDINGS: Choices<ChannelBinding> = &[
    ("disable", ChannelBinding::Disable),
    ("prefer", ChannelBinding::Prefer),
    ("require", ChannelBinding::Require),
];

pub(super) const TARGET_SESSION_ATTRS: Choices<TargetSessionAttrs> = &[
    ("any", TargetSessionAttrs::Any),
    ("read-write", TargetSessionAttrs::ReadWrite),
    ("read-only", TargetSessionAttrs::ReadOnly),
    ("primary", TargetSessionAttrs::Primary),
    ("standby", TargetSessionAttrs::Standby),
    ("prefer-standby", TargetSessionAttrs::PreferStandby),
];

pub(super) fn word_of<T: PartialEq>(choices: &[(&'static str, T)], value: T) -> &'static str {
    choices.iter().find(|(_, v)| *v == value).map_or("", |(word, _)| word)
}

impl fmt::Display for TargetSessionAttrs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(word_of(TARGET_SESSION_ATTRS, *self))
    }
}

impl fmt::Display for SslMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(word_of(SSL_MODES, *self))
    }
}
