//! TLS with certificates made on the spot.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use walferry::clock::Deadline;
use walferry::demo::server::Server;
use walferry::pg::{Pipeline, Reply};

use super::{connect, false_server, refusal, set_hba, support};

struct Certificates(PathBuf);

impl Certificates {
    fn new() -> Certificates {
        let dir = std::env::temp_dir().join(format!("walferry-tls-{:016x}", fastrand::u64(..)));
        std::fs::create_dir(&dir).unwrap();
        Certificates(dir)
    }

    fn path(&self, name: &str) -> String {
        self.0.join(name).display().to_string()
    }

    fn openssl(&self, arguments: &str) {
        let status = Command::new("openssl")
            .args(arguments.split(' '))
            .current_dir(&self.0)
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .status();
        assert!(status.unwrap().success(), "openssl {arguments}");
    }

    /// `name.crt` and `name.key`, an authority or a self-signed certificate.
    fn authority(&self, name: &str) {
        self.openssl(&format!(
            "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 \
             -keyout {name}.key -out {name}.crt -subj /CN={name}"
        ));
    }

    /// `name.crt` and `name.key`, signed by `ca`.
    fn issue(&self, ca: &str, name: &str, extension: &str, hash: &str) {
        let file = format!("{name}.ext");
        std::fs::write(self.0.join(&file), extension).unwrap();
        self.openssl(&format!(
            "req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes \
             -keyout {name}.key -out {name}.csr -subj /CN={name}"
        ));
        self.openssl(&format!(
            "x509 -req -days 2 -{hash} -in {name}.csr -CA {ca}.crt -CAkey {ca}.key \
             -CAcreateserial -extfile {file} -out {name}.crt"
        ));
        std::fs::set_permissions(
            self.0.join(format!("{name}.key")),
            PermissionsExt::from_mode(0o600),
        )
        .unwrap();
    }

    /// `name.crt` and `name.key`, signed by itself, of X.509 version 1, as Citus makes its own.
    fn old(&self, name: &str, key: &str) {
        self.openssl(&format!(
            "req {key} -nodes -keyout {name}.key -out {name}.csr -subj /CN={name}"
        ));
        self.openssl(&format!(
            "x509 -req -days 2 -in {name}.csr -signkey {name}.key -out {name}.crt"
        ));
    }

    fn install(&self, server: &Server, name: &str) {
        let data = server.data_dir();
        let owner = std::fs::metadata(&data).unwrap();
        for (from, to) in [
            (format!("{name}.crt"), "server.crt"),
            (format!("{name}.key"), "server.key"),
            ("ca.crt".to_string(), "root.crt"),
        ] {
            let to = data.join(to);
            std::fs::copy(self.0.join(from), &to).unwrap();
            std::os::unix::fs::chown(&to, Some(owner.uid()), Some(owner.gid())).unwrap();
            std::fs::set_permissions(&to, PermissionsExt::from_mode(0o600)).unwrap();
        }
        server.psql("postgres", "alter system set ssl = on").unwrap();
        server.psql("postgres", "alter system set ssl_ca_file = 'root.crt'").unwrap();
        server.psql("postgres", "select pg_reload_conf()").unwrap();
        let shown = |path: &Path| std::fs::read(path).unwrap();
        assert!(!shown(&data.join("server.crt")).is_empty());
    }
}

impl Drop for Certificates {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[tokio::test]
async fn each_sslmode_looks_at_what_libpq_says_it_does() {
    let server = support::server();
    let certificates = Certificates::new();
    certificates.authority("ca");
    certificates.authority("other");
    certificates.issue("ca", "db", "subjectAltName=DNS:localhost", "sha256");
    certificates.install(&server, "db");
    let (ca, other) = (certificates.path("ca.crt"), certificates.path("other.crt"));
    let uri = |host: &str, rest: &str| {
        format!("postgres://postgres@{host}:{}/postgres?{rest}", server.port())
    };
    for rest in [
        "sslmode=prefer".to_string(),
        "sslmode=require".to_string(),
        "sslmode=require&sslrootcert=/nowhere.crt".to_string(),
        format!("sslmode=require&sslrootcert={ca}"),
        format!("sslmode=verify-ca&sslrootcert={ca}"),
        "sslmode=require&ssl_min_protocol_version=TLSv1.3&sslsni=0".to_string(),
        "sslmode=require&ssl_max_protocol_version=TLSv1.2".to_string(),
    ] {
        let session = connect(&uri("127.0.0.1", &rest)).await.unwrap();
        assert!(session.is_encrypted(), "{rest}");
    }
    let full = format!("sslmode=verify-full&sslrootcert={ca}");
    assert!(connect(&uri("localhost", &full)).await.unwrap().is_encrypted());
    assert!(!connect(&uri("127.0.0.1", "sslmode=disable")).await.unwrap().is_encrypted());
    assert!(!connect(&uri("127.0.0.1", "sslmode=allow")).await.unwrap().is_encrypted());
    for (host, rest, says) in [
        ("127.0.0.1", full.clone(), "it is not made out to \"127.0.0.1\""),
        (
            "localhost",
            format!("sslmode=verify-full&sslrootcert={other}"),
            "not signed by an authority",
        ),
        (
            "localhost",
            format!("sslmode=verify-ca&sslrootcert={other}"),
            "not signed by an authority",
        ),
        ("localhost", format!("sslmode=require&sslrootcert={other}"), "not signed by an authority"),
        ("localhost", "sslmode=verify-full".to_string(), "give sslrootcert=FILE"),
        (
            "localhost",
            "sslmode=verify-ca&sslrootcert=/nowhere.crt".to_string(),
            "/nowhere.crt does not exist",
        ),
        ("localhost", "sslrootcert=system".to_string(), "not signed by an authority"),
    ] {
        let said = refusal(&uri(host, &rest)).await.to_string();
        assert!(said.contains(says), "{rest}: {said}");
    }
}

#[tokio::test]
async fn a_self_signed_certificate_with_a_common_name_alone_can_be_trusted_by_itself() {
    let server = support::server();
    let certificates = Certificates::new();
    certificates.authority("ca");
    certificates.authority("localhost");
    certificates.install(&server, "localhost");
    let own = certificates.path("localhost.crt");
    let uri = |host: &str| {
        let port = server.port();
        format!("postgres://postgres@{host}:{port}/postgres?sslmode=verify-full&sslrootcert={own}")
    };
    assert!(connect(&uri("localhost")).await.unwrap().is_encrypted());
    let said = refusal(&uri("127.0.0.1")).await.to_string();
    assert!(said.contains("not made out to"), "{said}");
}

#[tokio::test]
async fn a_certificate_of_version_1_will_do_where_nothing_of_it_is_looked_at() {
    let server = support::server();
    server.psql("postgres", "create role s login password 'pw'").unwrap();
    let certificates = Certificates::new();
    certificates.authority("ca");
    let at = format!("127.0.0.1:{}/postgres", server.port());
    for (name, key) in
        [("rsa", "-newkey rsa:2048"), ("ec", "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1")]
    {
        certificates.old(name, key);
        certificates.install(&server, name);
        let own = certificates.path(&format!("{name}.crt"));
        let looked = format!("postgres://postgres@{at}?sslmode=verify-ca&sslrootcert={own}");
        let deadline = Deadline::after(std::time::Duration::from_secs(20));
        // A reload is not at once: until then another certificate is shown.
        while !refusal(&looked).await.to_string().contains("must be X.509 version 3") {
            assert!(!deadline.passed(), "{}", refusal(&looked).await);
            tokio::task::yield_now().await;
        }
        set_hba(&server, "hostssl all s all scram-sha-256\nhostnossl all s all reject");
        for rest in [
            "sslmode=prefer",
            "sslmode=require&channel_binding=require",
            "sslmode=require&ssl_max_protocol_version=TLSv1.2",
        ] {
            let session = connect(&format!("postgres://s:pw@{at}?{rest}")).await.unwrap();
            assert!(session.is_encrypted(), "{name} {rest}");
        }
    }
}

#[tokio::test]
async fn scram_is_bound_to_the_tls_channel_and_cancel_goes_through_it_too() {
    let server = support::server();
    server.psql("postgres", "create role s login password 'pw'; create role owner login").unwrap();
    let certificates = Certificates::new();
    certificates.authority("ca");
    certificates.issue("ca", "owner", "extendedKeyUsage=clientAuth", "sha256");
    // The binding's hash follows the certificate's own signature.
    for hash in ["sha256", "sha384", "sha512"] {
        certificates.issue("ca", hash, "subjectAltName=DNS:localhost", hash);
    }
    certificates.install(&server, "sha256");
    until_certificate_is(&server, &certificates.path("sha256.crt")).await;
    set_hba(
        &server,
        "hostssl all s all scram-sha-256\nhostssl all owner all cert\nhostnossl all s all reject",
    );
    let at = format!("127.0.0.1:{}/postgres", server.port());
    let bound = format!("postgres://s:pw@{at}?sslmode=require&channel_binding=require");
    for hash in ["sha256", "sha384", "sha512"] {
        certificates.install(&server, hash);
        until_certificate_is(&server, &certificates.path(&format!("{hash}.crt"))).await;
        let mut session = connect(&bound).await.unwrap();
        let sql = "select ssl from pg_catalog.pg_stat_ssl where pid = pg_catalog.pg_backend_pid()";
        assert!(session.query(sql).await.unwrap()[0].bool(0).unwrap(), "{hash}");
    }
    assert!(
        connect(&bound.replace("channel_binding=require", "channel_binding=disable")).await.is_ok()
    );
    // hostssl only: "allow" goes over to TLS, "disable" is told what is missing.
    assert!(connect(&format!("postgres://s:pw@{at}?sslmode=allow")).await.unwrap().is_encrypted());
    let said = refusal(&format!("postgres://s:pw@{at}?sslmode=disable")).await.to_string();
    assert!(said.contains("pg_hba.conf"), "{said}");

    let mut session = connect(&bound).await.unwrap();
    let handle = session.cancel_handle();
    let (answer, ()) = tokio::join!(session.query("select pg_catalog.pg_sleep(60)"), async {
        // Canceling before the statement has begun would cancel nothing, so go on until it ends.
        until_sleeping(&server).await;
        handle.cancel().await.unwrap();
    });
    assert_eq!(answer.unwrap_err().code(), Some("57014"));
    echo_20_mb(&mut session).await;

    let (cert, key) = (certificates.path("owner.crt"), certificates.path("owner.key"));
    let uri = format!("postgres://owner@{at}?sslmode=require&sslcert={cert}&sslkey={key}");
    assert!(connect(&uri).await.unwrap().is_encrypted());
    std::fs::set_permissions(&key, PermissionsExt::from_mode(0o644)).unwrap();
    let said = refusal(&uri).await.to_string();
    assert!(said.contains("chmod 0600"), "{said}");
    assert!(connect(&format!("postgres://owner@{at}?sslmode=require")).await.is_err());
}

/// Waits until new connections are shown this certificate; a reload is not at once.
async fn until_certificate_is(server: &Server, file: &str) {
    let deadline = Deadline::after(std::time::Duration::from_secs(20));
    loop {
        let uri = format!(
            "postgres://nobody@localhost:{}/postgres?sslmode=verify-full&sslrootcert={file}",
            server.port()
        );
        // Trusting exactly this certificate, the handshake works and only the role is refused.
        let error = refusal(&uri).await;
        if error.code().is_some() {
            return;
        }
        assert!(!deadline.passed(), "{error}");
        tokio::task::yield_now().await;
    }
}

async fn until_sleeping(server: &Server) {
    let sql = "select count(*) from pg_stat_activity where wait_event = 'PgSleep'";
    while server.psql("postgres", sql).unwrap() == "0" {
        tokio::task::yield_now().await;
    }
}

/// TLS holds records back until flushed, which must not stop reading (pgcopydb#880).
async fn echo_20_mb(session: &mut walferry::pg::Session) {
    let piece = vec![b'x'; 1 << 20];
    let mut pipeline = Pipeline::new();
    pipeline.parse("echo", "select $1::text", &[25]);
    for _ in 0..20 {
        pipeline.run("echo", std::iter::once(Some(&piece[..])));
    }
    let mut rows = 0;
    let exchange =
        session.exchange(pipeline, |reply| rows += usize::from(matches!(reply, Reply::Row(_))));
    tokio::time::timeout(std::time::Duration::from_secs(30), exchange).await.unwrap().unwrap();
    assert_eq!(rows, 20);
}

#[tokio::test]
async fn plain_bytes_behind_the_servers_agreement_are_not_believed() {
    // 'S', then a whole unencrypted AuthenticationOk and ReadyForQuery (CVE-2021-23222).
    let mut answer = b"S".to_vec();
    answer.extend_from_slice(b"R\0\0\0\x08\0\0\0\0Z\0\0\0\x05I");
    let port = false_server(answer);
    let error = refusal(&format!("postgres://u@127.0.0.1:{port}/d?sslmode=require")).await;
    assert!(error.to_string().contains("TLS"), "{error}");
}
