//! TLS and SASL, given by `kafka.*` in walferry.toml.

use std::path::Path;
use std::process::{Command, Stdio};

use walferry::demo::kafka::Broker;

use crate::support::job::Ends;

const PASSWORD: &str = "pw-never-to-be-shown";

/// A key and a certificate for 127.0.0.1, signed by itself: `broker.key`, `broker.crt`.
fn certificate(dir: &Path) {
    std::fs::create_dir_all(dir).unwrap();
    let arguments = "req -x509 -newkey rsa:2048 -nodes -days 2 -keyout broker.key -out broker.crt \
                     -subj /CN=127.0.0.1 -addext subjectAltName=IP:127.0.0.1";
    let mut openssl = Command::new("openssl");
    openssl.args(arguments.split_whitespace()).current_dir(dir);
    assert!(openssl.stdin(Stdio::null()).stderr(Stdio::null()).status().unwrap().success());
    let read = |name| std::fs::read_to_string(dir.join(name)).unwrap();
    std::fs::write(dir.join("broker.pem"), read("broker.key") + &read("broker.crt")).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_and_a_password_pass_through_and_are_never_shown_or_stored() {
    let mut ends = Ends::start(15, 15);
    let dir = ends.spool_dir.clone();
    certificate(&dir);
    let login = "org.apache.kafka.common.security.plain.PlainLoginModule required";
    let broker = Broker::start_listening(
        "SASL_SSL",
        &[
            "ssl.keystore.type=PEM",
            &format!("ssl.keystore.location={}", dir.join("broker.pem").display()),
            "ssl.truststore.type=PEM",
            &format!("ssl.truststore.location={}", dir.join("broker.crt").display()),
            "sasl.enabled.mechanisms=PLAIN",
            "sasl.mechanism.inter.broker.protocol=PLAIN",
            &format!(
                "listener.name.client.plain.sasl.jaas.config={login} username=\"w\" \
                 password=\"{PASSWORD}\" user_w=\"{PASSWORD}\";"
            ),
        ],
    )
    .unwrap();
    ends.source.psql("app", "create table t (i int primary key)").unwrap();
    ends.buffer = Some(format!("kafka:{}/{}", broker.address(), super::topic()));
    let file = dir.join("walferry.toml");
    let write = |password: &str, more: &str| {
        let text = format!(
            "kafka.security.protocol = \"SASL_SSL\"\nkafka.sasl.mechanism = \"PLAIN\"\n\
             kafka.sasl.username = \"w\"\nkafka.sasl.password = \"{password}\"\n\
             kafka.ssl.ca.location = \"{}\"\n{more}",
            dir.join("broker.crt").display()
        );
        std::fs::write(&file, text).unwrap();
    };
    let config = file.display().to_string();
    let arguments = ["-v", "-v", "run", "--config", &*config];
    let mut shown = String::new();
    // Without, with another password, with what is ours to set, with what nobody knows.
    let bare = ends.walferry(&["run"]).await;
    assert_eq!(bare.code, Some(1), "{bare:?}");
    write("another-secret", "");
    let wrong = ends.walferry(&arguments).await;
    assert_eq!(wrong.code, Some(1), "{wrong:?}");
    assert!(wrong.err.contains("uthentication"), "{}", wrong.err);
    assert!(!wrong.err.contains("another-secret"), "{}", wrong.err);
    for (more, said) in [
        ("kafka.acks = 1\n", "kafka.acks: is not to be set: always all"),
        ("kafka.\"enable.idempotence\" = false\n", "kafka.enable.idempotence: is not to be set"),
        ("kafka.sasl.pasword = \"x\"\n", "kafka.sasl.pasword"),
    ] {
        write(PASSWORD, more);
        let refused = ends.walferry(&arguments).await;
        assert_eq!(refused.code, Some(2), "{refused:?}");
        assert!(refused.err.contains(said), "{}", refused.err);
        shown += &refused.err;
    }
    write(PASSWORD, "");
    let mut run = ends.spawn(&arguments);
    ends.until_phase(&mut run, "following").await;
    ends.source.psql("app", "insert into t select generate_series(1, 100)").unwrap();
    ends.done(&["verify", "--config", &config]).await;
    shown += &run.so_far();
    shown += &ends.done(&["status", "--json"]).await.out;
    run.signal("INT");
    let ended = run.ended().await.expect_success();
    shown += &(ended.out + &ended.err);
    assert!(shown.contains("stopped") && !shown.contains(PASSWORD), "{shown}");
    let rows = "select string_agg(j::text, '') from walferry.job j";
    let stored = ends.target.psql("app", rows).unwrap();
    assert!(stored.contains(&broker.address()) && !stored.contains(PASSWORD), "{stored}");
}
