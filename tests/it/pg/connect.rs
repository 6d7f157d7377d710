//! Being let in, and what is said when we are not.

use std::os::unix::fs::PermissionsExt;

use walferry::demo::server::StopMode;
use walferry::fault::{Fault, Faulty};
use walferry::pg::{Config, Purpose, Session};

use super::{config, connect, false_server, fatal, refusal, set_hba, support};

#[tokio::test]
async fn passwords_are_proven_by_md5_scram_and_in_the_clear() {
    let server = support::server();
    server
        .psql("postgres", "set password_encryption = 'md5'; create role m login password 'm w'")
        .unwrap();
    server
        .psql("postgres", "create role s login password 's%w'; create role c login password 'cw'")
        .unwrap();
    set_hba(&server, "host all m all md5\nhost all s all scram-sha-256\nhost all c all password\n");
    let at = format!("127.0.0.1:{}/postgres", server.port());
    for userinfo in ["m:m%20w", "s:s%25w", "c:cw"] {
        let mut session = connect(&format!("postgres://{userinfo}@{at}")).await.unwrap();
        assert_eq!(session.query("select 1").await.unwrap().len(), 1);
    }
    for user in ["m", "s", "c"] {
        let error = refusal(&format!("postgres://{user}:hush@{at}")).await;
        assert_eq!(error.code(), Some("28P01"), "{error}");
        assert_eq!(error.fault(), Fault::Stop);
        let said = error.to_string();
        assert!(
            said.contains("the password came from the connection string or PGPASSWORD"),
            "{said}"
        );
        assert!(!said.contains("hush"), "{said}");
        let said = refusal(&format!("postgres://{user}@{at}")).await.to_string();
        assert!(
            said.contains("asks for the password of role") && said.contains("~/.pgpass"),
            "{said}"
        );
    }
    let said = refusal(&format!("postgres://m:m%20w@{at}?require_auth=scram-sha-256")).await;
    assert!(said.to_string().contains("chose authentication by \"md5\""), "{said}");
    let said = refusal(&format!("postgres://postgres@{at}?require_auth=!none")).await;
    assert!(said.to_string().contains("\"none\""), "{said}");
    let said = refusal(&format!("postgres://m:m%20w@{at}?channel_binding=require")).await;
    assert!(said.to_string().contains("did not ask for SCRAM"), "{said}");
    let said = refusal(&format!("postgres://s:s%25w@{at}?channel_binding=require")).await;
    assert!(said.to_string().contains("no channel to bind to"), "{said}");
}

#[tokio::test]
async fn the_password_file_gives_each_host_its_own() {
    let server = support::server();
    server.psql("postgres", "create role s login password 'right:one'").unwrap();
    set_hba(&server, "host all s all scram-sha-256\n");
    let home = std::env::temp_dir().join(format!("walferry-home-{:016x}", fastrand::u64(..)));
    std::fs::create_dir(&home).unwrap();
    let file = home.join(".pgpass");
    let port = server.port();
    std::fs::write(
        &file,
        format!("localhost:*:*:s:wrong\n127.0.0.1:{port}:postgres:s:right\\:one\n"),
    )
    .unwrap();
    let open = |host: &str| {
        let home = home.display().to_string();
        let text = format!("host={host} port={port} user=s dbname=postgres");
        let config = Config::parse_with(&text, &|name| (name == "HOME").then(|| home.clone()));
        async move { Session::connect(&config.unwrap(), Purpose::Sql).await.map(|_| ()) }
    };
    std::fs::set_permissions(&file, PermissionsExt::from_mode(0o644)).unwrap();
    let said = open("127.0.0.1").await.unwrap_err().to_string();
    assert!(said.contains("chmod 0600"), "{said}");
    std::fs::set_permissions(&file, PermissionsExt::from_mode(0o600)).unwrap();
    open("127.0.0.1").await.unwrap();
    let said = open("localhost").await.unwrap_err().to_string();
    assert!(said.contains("the password came from") && said.contains(".pgpass"), "{said}");
    std::fs::remove_dir_all(&home).unwrap();
}

#[tokio::test]
async fn each_refusal_says_what_to_do() {
    let server = support::server();
    server
        .psql(
            "postgres",
            "create role few login connection limit 0; create role plain login; create role shut",
        )
        .unwrap();
    let at = format!("127.0.0.1:{}", server.port());
    let said = |text: String| async move {
        let error = refusal(&text).await;
        (error.to_string(), error.code().unwrap_or_default().to_string(), error.fault())
    };
    let (text, code, fault) = said(format!("postgres://postgres@{at}/nowhere")).await;
    assert_eq!((code.as_str(), fault), ("3D000", Fault::Stop));
    assert!(text.contains("CREATE DATABASE \"nowhere\""), "{text}");
    let (text, code, fault) = said(format!("postgres://few@{at}/postgres")).await;
    assert_eq!((code.as_str(), fault), ("53300", Fault::Retry));
    assert!(text.contains("CONNECTION LIMIT"), "{text}");
    let (text, ..) = said(format!("postgres://shut@{at}/postgres")).await;
    assert!(text.contains("ALTER ROLE \"shut\" LOGIN"), "{text}");
    let plain = config(&format!("postgres://plain@{at}/postgres"));
    let replication = Session::connect(&plain, Purpose::Replication);
    let text = replication.await.map(|_| ()).unwrap_err().to_string();
    assert!(text.contains("ALTER ROLE \"plain\" REPLICATION"), "{text}");
    set_hba(&server, "host all plain all reject");
    let (text, code, _) = said(format!("postgres://plain@{at}/postgres")).await;
    assert_eq!(code, "28000");
    assert!(text.contains("plain ADDRESS scram-sha-256\" to pg_hba.conf"), "{text}");
    let (text, ..) = said(format!("postgres://postgres@{at}/postgres?sslmode=require")).await;
    assert!(text.contains("has no TLS and sslmode=require"), "{text}");
    server.stop(StopMode::Immediate).unwrap();
    let (text, _, fault) = said(format!("postgres://postgres@{at}/postgres")).await;
    assert_eq!(fault, Fault::Retry);
    assert!(text.contains("is the server running"), "{text}");
}

#[tokio::test]
async fn a_server_that_is_starting_up_is_tried_again_later() {
    let port = false_server(fatal("57P03", "the database system is starting up"));
    let error = refusal(&format!("postgres://u@127.0.0.1:{port}/d?sslmode=disable")).await;
    assert_eq!((error.code(), error.fault()), (Some("57P03"), Fault::Retry), "{error}");
}

#[tokio::test]
async fn what_is_no_postgresql_server_is_an_error_and_not_a_panic() {
    for answer in ["HTTP/1.1 400 Bad Request\r\n\r\n", "SSH-2.0-OpenSSH_9.2\r\n", "\0\0\0\0\0", "R"]
    {
        let port = false_server(answer.as_bytes().to_vec());
        for mode in ["disable", "prefer", "require"] {
            let text = format!("postgres://u@127.0.0.1:{port}/d?sslmode={mode}&connect_timeout=5");
            let error = refusal(&text).await;
            assert!(error.is_closed(), "{answer:?} {mode}: {error}");
        }
    }
}

#[tokio::test]
async fn every_host_that_was_tried_is_listed_with_its_reason() {
    let starting = false_server(fatal("57P03", "the database system is starting up"));
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let text = format!(
        "postgres://u@127.0.0.1:{closed},no-such-host.invalid:1,127.0.0.1:{starting}/d?sslmode=disable"
    );
    let error = Session::connect(&config(&text).labelled("source"), Purpose::Sql).await;
    let error = error.map(|_| ()).unwrap_err();
    let said = error.to_string();
    assert!(said.starts_with("cannot connect to any server of source"), "{said}");
    assert!(said.contains(&format!("127.0.0.1:{closed}/d: ")), "{said}");
    assert!(said.contains("\"no-such-host.invalid\" cannot be resolved"), "{said}");
    assert!(said.contains("starting up"), "{said}");
    assert_eq!(error.fault(), Fault::Retry);
    let server = support::server();
    let text =
        format!("postgres://postgres@127.0.0.1:{closed},localhost:{}/postgres", server.port());
    let session = connect(&text).await.unwrap();
    assert_eq!(session.host().port, server.port());
}

#[tokio::test]
async fn a_unix_socket_is_found_by_its_directory() {
    let server = support::server();
    let dir = server.data_dir().parent().unwrap().display().to_string();
    let text = format!("host={dir} port={} user=postgres dbname=postgres", server.port());
    let mut session = connect(&format!("{text} sslmode=require")).await.unwrap();
    assert!(!session.is_encrypted());
    assert_eq!(session.query("select 1").await.unwrap().len(), 1);
    let said = refusal(&format!("host={dir} port=1 user=postgres")).await.to_string();
    assert!(said.contains("no server has its socket there"), "{said}");
}

#[tokio::test]
async fn options_of_the_connection_string_come_after_our_own() {
    let server = support::server();
    let uri =
        format!("{}?options=-c%20lock_timeout%3D7s&application_name=me", server.uri("postgres"));
    let mut session = connect(&uri).await.unwrap();
    let sql = "select current_setting('lock_timeout'), current_setting('application_name'), \
               current_setting('search_path'), current_setting('TimeZone')";
    let row = session.query_one(sql, &[]).await.unwrap();
    let shown: Vec<&str> = (0..4).map(|i| row.str(i).unwrap()).collect();
    assert_eq!(shown, ["7s", "me", "", "UTC"]);
}
