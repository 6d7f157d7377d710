//! TLS as libpq means it: what each sslmode looks at, and the channel binding data.
//!
//! `require` looks at nothing, not even the certificate's form, unless a file of authorities
//! exists, then it is `verify-ca`; `verify-ca` follows the certificate's chain and ignores its
//! names; `verify-full` compares the host name too, with the certificate's common name where it has
//! no subjectAltName.
//!
//! <https://www.postgresql.org/docs/current/libpq-ssl.html>

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{verify_server_cert_signed_by_trust_anchor, verify_server_name};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, PeerMisbehaved, RootCertStore,
    SignatureScheme,
};
use sha2::{Digest, Sha256, Sha384, Sha512};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use x509_cert::Certificate;
use x509_cert::der::{Decode, Encode};

use super::config::SslMode;
use super::{Config, Error, Host, Result};

/// Where Debian, Alpine and Fedora keep the authorities that `sslrootcert=system` means.
const SYSTEM_ROOTS: [&str; 3] =
    ["/etc/ssl/certs/ca-certificates.crt", "/etc/ssl/cert.pem", "/etc/pki/tls/certs/ca-bundle.crt"];

/// Runs the TLS handshake on a connection whose server agreed to it.
///
/// Nothing has been read from `stream` beyond that one byte of agreement, so bytes that an
/// attacker put in behind it become garbage to the handshake rather than a trusted reply
/// (CVE-2021-23222).
pub async fn handshake(
    stream: TcpStream,
    config: &Config,
    host: &Host,
    peer: &str,
) -> Result<TlsStream<TcpStream>> {
    let client = client_config(config, host)?;
    let name = match ServerName::try_from(host.host.clone()) {
        Ok(name) => name,
        Err(_) if config.ssl_mode == SslMode::VerifyFull => {
            let detail = format!(
                "\"{}\" is no host name that a certificate could be made out to",
                host.host
            );
            return Err(Error::refused(peer, detail));
        }
        // Never sent (it is no name) and, below verify-full, never compared.
        Err(_) => ServerName::from(stream.peer_addr().map_or([0, 0, 0, 0].into(), |a| a.ip())),
    };
    let connecting = TlsConnector::from(Arc::new(client)).connect(name, stream);
    connecting.await.map_err(|error| explain(error, config, host, peer))
}

fn explain(error: std::io::Error, config: &Config, host: &Host, peer: &str) -> Error {
    let inner = error.get_ref().and_then(|e| e.downcast_ref::<rustls::Error>());
    let Some(rustls::Error::InvalidCertificate(reason)) = inner else {
        return Error::Connect {
            peer: peer.to_string(),
            detail: format!("TLS handshake: {error}"),
            // A certificate or version dispute stays; a connection that broke may come back.
            transient: inner.is_none() && error.kind() != std::io::ErrorKind::InvalidData,
            server: None,
        };
    };
    let advice = match reason {
        CertificateError::UnknownIssuer => {
            "it is not signed by an authority of sslrootcert; give the file that holds it"
                .to_string()
        }
        CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
            format!(
                "it is not made out to \"{}\"; connect by a name it holds, or use \
                 sslmode=verify-ca",
                host.host
            )
        }
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
            "renew it on the server".to_string()
        }
        _ => "it must be X.509 version 3; make it with subjectAltName".to_string(),
    };
    let detail = format!(
        "the server's certificate is refused under sslmode={}: {reason}; {advice}",
        config.ssl_mode
    );
    Error::refused(peer, detail)
}

fn client_config(config: &Config, host: &Host) -> Result<ClientConfig> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let versions: &[&rustls::SupportedProtocolVersion] = match &config.ssl {
        ssl if ssl.only_tls13 => &[&rustls::version::TLS13],
        ssl if ssl.only_tls12 => &[&rustls::version::TLS12],
        _ => rustls::DEFAULT_VERSIONS,
    };
    let verifier = Arc::new(Verifier::new(config, host, provider.clone())?);
    let builder = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(versions)
        .map_err(|e| Error::Config(format!("TLS: {e}")))?
        .dangerous()
        .with_custom_certificate_verifier(verifier);
    let mut client = match client_certificate(config)? {
        Some((chain, key, file)) => builder
            .with_client_auth_cert(chain, key)
            .map_err(|e| Error::Config(format!("sslcert {}: {e}", file.display())))?,
        None => builder.with_no_client_auth(),
    };
    client.enable_sni = config.ssl.sni;
    if config.ssl.direct {
        client.alpn_protocols = vec![b"postgresql".to_vec()];
    }
    Ok(client)
}

type ClientCertificate = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>, PathBuf);

/// sslcert and sslkey, or `~/.postgresql/postgresql.crt` and `.key` where they exist.
fn client_certificate(config: &Config) -> Result<Option<ClientCertificate>> {
    if config.ssl.no_client_cert {
        return Ok(None);
    }
    let in_dir = |name: &str| config.ssl.dir.as_ref().map(|dir| dir.join(name));
    let cert = match &config.ssl_cert {
        Some(path) => PathBuf::from(path),
        None => match in_dir("postgresql.crt").filter(|path| path.exists()) {
            Some(path) => path,
            None => return Ok(None),
        },
    };
    let key = config.ssl_key.as_ref().map(PathBuf::from).or_else(|| in_dir("postgresql.key"));
    let key = key.ok_or_else(|| Error::Config("sslcert without sslkey".to_string()))?;
    let chain = read_certificates(&cert, "sslcert")?;
    let key_wrong = |detail: String| Error::Config(format!("sslkey {}: {detail}", key.display()));
    let metadata = std::fs::metadata(&key).map_err(|e| key_wrong(e.to_string()))?;
    // Root's own key may be readable by a group, as libpq allows.
    let open_to = if metadata.uid() == 0 { 0o037 } else { 0o077 };
    if metadata.mode() & open_to != 0 {
        return Err(key_wrong("is open to others: chmod 0600 it".to_string()));
    }
    let pem = std::fs::read(&key).map_err(|e| key_wrong(e.to_string()))?;
    if pem.windows(9).any(|w| w == b"ENCRYPTED") {
        let detail = "is encrypted, which cannot be read: decrypt it into a file of mode 0600";
        return Err(key_wrong(detail.to_string()));
    }
    let private = PrivateKeyDer::from_pem_slice(&pem)
        .map_err(|_| key_wrong("holds no private key in PEM".to_string()))?;
    Ok(Some((chain, private, cert)))
}

fn read_certificates(path: &Path, what: &str) -> Result<Vec<CertificateDer<'static>>> {
    let wrong = |detail: String| Error::Config(format!("{what} {}: {detail}", path.display()));
    let pem = std::fs::read(path).map_err(|e| wrong(e.to_string()))?;
    let certificates: std::result::Result<Vec<_>, _> =
        CertificateDer::pem_slice_iter(&pem).collect();
    match certificates {
        Ok(list) if !list.is_empty() => Ok(list),
        Ok(_) => Err(wrong("holds no certificate in PEM".to_string())),
        Err(error) => Err(wrong(format!("is not PEM: {error}"))),
    }
}

/// How much of the server's certificate is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Look {
    Nothing,
    Chain,
    ChainAndName,
}

#[derive(Debug)]
struct Verifier {
    look: Look,
    host: String,
    roots: RootCertStore,
    /// The same authorities, byte for byte.
    trusted: Vec<CertificateDer<'static>>,
    provider: Arc<CryptoProvider>,
}

impl Verifier {
    fn new(config: &Config, host: &Host, provider: Arc<CryptoProvider>) -> Result<Verifier> {
        let (look, file) = Self::look(config)?;
        let mut roots = RootCertStore::empty();
        let mut trusted = Vec::new();
        if let Some(path) = file {
            trusted = read_certificates(&path, "sslrootcert")?;
            roots.add_parsable_certificates(trusted.iter().cloned());
        }
        Ok(Verifier { look, host: host.host.clone(), roots, trusted, provider })
    }

    fn look(config: &Config) -> Result<(Look, Option<PathBuf>)> {
        let full = config.ssl_mode == SslMode::VerifyFull;
        let look = if full { Look::ChainAndName } else { Look::Chain };
        if config.ssl_root_cert.as_deref() == Some("system") {
            let file = SYSTEM_ROOTS.iter().map(PathBuf::from).find(|path| path.exists());
            let file = file.ok_or_else(|| {
                Error::Config(
                    "sslrootcert=system: this machine has no authorities' certificates; \
                     install the package ca-certificates, or name a file"
                        .to_string(),
                )
            })?;
            return Ok((look, Some(file)));
        }
        let given = config.ssl_root_cert.as_ref().map(PathBuf::from);
        let usual = config.ssl.dir.as_ref().map(|dir| dir.join("root.crt"));
        match (given.or(usual), config.ssl_mode) {
            (Some(path), mode) if path.exists() && mode >= SslMode::Require => {
                Ok((look, Some(path)))
            }
            (path, SslMode::VerifyCa | SslMode::VerifyFull) => {
                let path =
                    path.map_or("~/.postgresql/root.crt".into(), |p| p.display().to_string());
                Err(Error::Config(format!(
                    "sslmode={} needs the authorities' certificates and {path} does not exist: \
                     give sslrootcert=FILE, or sslrootcert=system for the public ones",
                    config.ssl_mode
                )))
            }
            _ => Ok((Look::Nothing, None)),
        }
    }

    fn chain(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> std::result::Result<(), rustls::Error> {
        // A self-signed server certificate given as its own authority: webpki will not follow
        // such a chain of one, OpenSSL and the manual's first example do.
        if self.trusted.iter().any(|known| known == end_entity) {
            return in_its_time(end_entity, now);
        }
        verify_server_cert_signed_by_trust_anchor(
            &ParsedCertificate::try_from(end_entity)?,
            &self.roots,
            intermediates,
            now,
            self.provider.signature_verification_algorithms.all,
        )
    }

    fn name(
        &self,
        end_entity: &CertificateDer<'_>,
        name: &ServerName<'_>,
    ) -> std::result::Result<(), rustls::Error> {
        let refused = rustls::Error::InvalidCertificate(CertificateError::NotValidForName);
        let certificate = Certificate::from_der(end_entity);
        let certificate = certificate.map_err(|_| CertificateError::BadEncoding)?;
        if has_alternative_names(&certificate) {
            return verify_server_name(&ParsedCertificate::try_from(end_entity)?, name);
        }
        match certificate.tbs_certificate().subject().common_name() {
            Ok(Some(common)) if common_name_matches(&common.value(), &self.host) => Ok(()),
            _ => Err(refused),
        }
    }

    /// rustls reads certificates of X.509 version 3 only, and what a server makes for itself (Citus
    /// does) is of version 1. Where nothing of it is looked at, its form is of no matter either.
    fn takes_any_form(&self, certificate: &CertificateDer<'_>) -> bool {
        self.look == Look::Nothing && ParsedCertificate::try_from(certificate).is_err()
    }

    /// The handshake's signature by the key in a certificate that rustls does not read. Without it
    /// channel binding would mean nothing: anyone can show somebody else's certificate.
    fn by_its_key(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        let unread = |_| rustls::Error::InvalidCertificate(CertificateError::BadEncoding);
        let certificate = Certificate::from_der(certificate).map_err(unread)?;
        let key = certificate.tbs_certificate().subject_public_key_info();
        let algorithm = key.algorithm.to_der().map_err(unread)?;
        let schemes = self.provider.signature_verification_algorithms.mapping.iter();
        let mut known =
            schemes.filter(|(scheme, _)| *scheme == dss.scheme).flat_map(|(_, known)| *known);
        let is_valid = known.any(|known| {
            // What webpki names it by goes without the outer SEQUENCE's two bytes.
            algorithm.get(2..) == Some(known.public_key_alg_id().as_ref())
                && known
                    .verify_signature(key.subject_public_key.raw_bytes(), message, dss.signature())
                    .is_ok()
        });
        match is_valid {
            true => Ok(HandshakeSignatureValid::assertion()),
            false => Err(CertificateError::BadSignature.into()),
        }
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> std::result::Result<ServerCertVerified, rustls::Error> {
        if self.look != Look::Nothing {
            self.chain(end_entity, intermediates, now)?;
        }
        if self.look == Look::ChainAndName {
            self.name(end_entity, server_name)?;
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        if self.takes_any_form(cert) {
            return self.by_its_key(message, cert, dss);
        }
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls12_signature(message, cert, dss, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        if self.takes_any_form(cert) {
            // https://www.rfc-editor.org/rfc/rfc8446#section-4.2.3
            let pkcs1 = [
                SignatureScheme::RSA_PKCS1_SHA256,
                SignatureScheme::RSA_PKCS1_SHA384,
                SignatureScheme::RSA_PKCS1_SHA512,
            ];
            if pkcs1.contains(&dss.scheme) {
                let how = PeerMisbehaved::SignedHandshakeWithUnadvertisedSigScheme;
                return Err(rustls::Error::PeerMisbehaved(how));
            }
            return self.by_its_key(message, cert, dss);
        }
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

fn in_its_time(
    certificate: &CertificateDer<'_>,
    now: UnixTime,
) -> std::result::Result<(), rustls::Error> {
    let certificate =
        Certificate::from_der(certificate).map_err(|_| CertificateError::BadEncoding)?;
    let validity = certificate.tbs_certificate().validity();
    let now = now.as_secs();
    if now < validity.not_before.to_unix_duration().as_secs() {
        return Err(CertificateError::NotValidYet.into());
    }
    if now > validity.not_after.to_unix_duration().as_secs() {
        return Err(CertificateError::Expired.into());
    }
    Ok(())
}

/// id-ce-subjectAltName.
const SUBJECT_ALT_NAME: &str = "2.5.29.17";

fn has_alternative_names(certificate: &Certificate) -> bool {
    let extensions = certificate.tbs_certificate().extensions();
    extensions.is_some_and(|list| list.iter().any(|e| e.extn_id.to_string() == SUBJECT_ALT_NAME))
}

/// A leading `*.` stands for exactly one label, as in libpq.
fn common_name_matches(common: &str, host: &str) -> bool {
    match common.strip_prefix("*.") {
        Some(suffix) => {
            let rest = host.split_once('.').filter(|(label, _)| !label.is_empty());
            rest.is_some_and(|(_, rest)| rest.eq_ignore_ascii_case(suffix))
        }
        None => common.eq_ignore_ascii_case(host),
    }
}

/// tls-server-end-point: the certificate's hash, by the hash of its own signature, MD5 and SHA-1
/// raised to SHA-256. `None` where the signature has no hash that the server would know (Ed25519).
///
/// <https://www.rfc-editor.org/rfc/rfc5929#section-4.1>
pub fn channel_binding(stream: &TlsStream<TcpStream>) -> Option<Vec<u8>> {
    let (_, connection) = stream.get_ref();
    end_point(connection.peer_certificates()?.first()?)
}

fn end_point(der: &[u8]) -> Option<Vec<u8>> {
    let certificate = Certificate::from_der(der).ok()?;
    let algorithm = certificate.signature_algorithm();
    match algorithm.oid.to_string().as_str() {
        // MD5 and SHA-1 with RSA, SHA-1 with ECDSA; then SHA-256 with either.
        "1.2.840.113549.1.1.4"
        | "1.2.840.113549.1.1.5"
        | "1.2.840.10045.4.1"
        | "1.2.840.113549.1.1.11"
        | "1.2.840.10045.4.3.2" => Some(Sha256::digest(der).to_vec()),
        "1.2.840.113549.1.1.12" | "1.2.840.10045.4.3.3" => Some(Sha384::digest(der).to_vec()),
        "1.2.840.113549.1.1.13" | "1.2.840.10045.4.3.4" => Some(Sha512::digest(der).to_vec()),
        "1.2.840.113549.1.1.10" => pss(der, &algorithm.parameters.to_der().ok()?),
        _ => None,
    }
}

/// RSASSA-PSS names its hash in its parameters, first; without one it is SHA-1.
fn pss(der: &[u8], parameters: &[u8]) -> Option<Vec<u8>> {
    // 2.16.840.1.101.3.4.2.x, encoded: x is 1, 2, 3 for SHA-256, -384, -512.
    const SHA2: [u8; 10] = [6, 9, 0x60, 0x86, 0x48, 1, 0x65, 3, 4, 2];
    let at = parameters.windows(SHA2.len()).position(|w| w == SHA2);
    match at.map(|at| parameters.get(at + SHA2.len())) {
        None | Some(Some(1)) => Some(Sha256::digest(der).to_vec()),
        Some(Some(2)) => Some(Sha384::digest(der).to_vec()),
        Some(Some(3)) => Some(Sha512::digest(der).to_vec()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_star_stands_for_one_label() {
        assert!(common_name_matches("DB.example.com", "db.EXAMPLE.com"));
        assert!(common_name_matches("*.example.com", "db.example.com"));
        assert!(!common_name_matches("*.example.com", "a.db.example.com"));
        assert!(!common_name_matches("*.example.com", "example.com"));
        assert!(!common_name_matches("*.example.com", ".example.com"));
    }

    #[test]
    fn garbage_is_no_certificate() {
        assert_eq!(end_point(b""), None);
        assert_eq!(end_point(&[0x30, 0x82, 0xff, 0xff, 1, 2, 3]), None);
    }
}
