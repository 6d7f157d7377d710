//! target_session_attrs, with a primary and its standby.

use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

use walferry::demo::pgbouncer::PgBouncer;
use walferry::demo::server::Server;
use walferry::fault::{Fault, Faulty};
use walferry::pg::{Purpose, Session};

use super::{config, connect, refusal, support};
use crate::support::job::{Ends, route_of};

struct Standby {
    bin: PathBuf,
    data: PathBuf,
    port: u16,
    owner: (u32, u32),
}

impl Standby {
    fn of(primary: &Server) -> Standby {
        let metadata = std::fs::metadata(primary.data_dir()).unwrap();
        let standby = Standby {
            bin: primary.bin_dir().to_path_buf(),
            data: primary.data_dir().parent().unwrap().join("standby"),
            port: std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port(),
            owner: (metadata.uid(), metadata.gid()),
        };
        let data = standby.data.to_str().unwrap();
        let uri = primary.uri("postgres");
        standby.run("pg_basebackup", &["-R", "-X", "stream", "-c", "fast", "-D", data, "-d", &uri]);
        let log = format!("{data}.log");
        let options = format!("-p {}", standby.port);
        standby.run("pg_ctl", &["start", "-w", "-D", data, "-l", &log, "-o", &options]);
        standby
    }

    fn run(&self, program: &str, arguments: &[&str]) {
        let mut command = Command::new(self.bin.join(program));
        command.args(arguments).current_dir(self.data.parent().unwrap());
        command.stdin(std::process::Stdio::null()).stdout(std::process::Stdio::null());
        if std::fs::metadata("/proc/self").unwrap().uid() == 0 {
            command.uid(self.owner.0).gid(self.owner.1);
        }
        assert!(command.status().unwrap().success(), "{program}");
    }
}

impl Drop for Standby {
    fn drop(&mut self) {
        self.run("pg_ctl", &["stop", "-w", "-m", "immediate", "-D", self.data.to_str().unwrap()]);
    }
}

#[tokio::test]
async fn target_session_attrs_chooses_among_primary_and_standby() {
    let primary = support::server();
    let standby = Standby::of(&primary);
    let (p, s) = (primary.port(), standby.port);
    let both = |ports: [u16; 2], attrs: &str| {
        let [a, b] = ports;
        format!(
            "postgres://postgres@127.0.0.1:{a},127.0.0.1:{b}/postgres?target_session_attrs={attrs}"
        )
    };
    for (attrs, right) in
        [("primary", p), ("read-write", p), ("standby", s), ("read-only", s), ("prefer-standby", s)]
    {
        for ports in [[p, s], [s, p]] {
            let session = connect(&both(ports, attrs)).await.unwrap();
            assert_eq!(session.host().port, right, "{attrs}");
        }
    }
    assert_eq!(connect(&both([s, p], "any")).await.unwrap().host().port, s);
    assert_eq!(connect(&both([p, p], "prefer-standby")).await.unwrap().host().port, p);
    let error = refusal(&both([s, s], "primary")).await;
    assert!(error.to_string().contains("is a standby and target_session_attrs=primary"), "{error}");
    assert_eq!(error.fault(), Fault::Retry);
    let writable = config(&both([s, p], "read-write"));
    assert_eq!(Session::connect(&writable, Purpose::Replication).await.unwrap().host().port, p);
}

/// The whole job between servers that are each given as several hosts.
#[tokio::test(flavor = "multi_thread")]
async fn a_job_finds_its_servers_among_several_hosts() {
    let mut ends = Ends::start(15, 15);
    let standby = Standby::of(&ends.source);
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let several = |ports: &[u16], attrs: &str| {
        let hosts: Vec<String> = ports.iter().map(|port| format!("127.0.0.1:{port}")).collect();
        format!("postgres://postgres@{}/app?target_session_attrs={attrs}", hosts.join(","))
    };
    let (source, target) = (ends.source.port(), ends.target.port());
    ends.source.psql("app", "create table public.t (a int primary key)").unwrap();
    // A standby cannot be moved from: said by its name, and nothing is made.
    ends.source_via = several(&[closed, source, standby.port], "standby");
    let ended = ends.walferry(&["run"]).await;
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(ended.err.contains("standby"), "{}", ended.err);
    ends.source_via = several(&[closed, standby.port], "primary");
    let ended = ends.walferry(&["check"]).await;
    assert_eq!(ended.code, Some(1), "{ended:?}");
    for part in [&*format!("127.0.0.1:{closed}"), "is a standby and target_session_attrs=primary"] {
        assert!(format!("{}{}", ended.out, ended.err).contains(part), "{part}: {ended:?}");
    }
    ends.source_via = several(&[closed, standby.port, source], "read-write");
    ends.target_via = several(&[closed, target], "primary");
    let pooler = PgBouncer::start(&ends.source, &["app"]).unwrap();
    let mut run = ends.spawn(&["run"]);
    ends.until_phase(&mut run, "following").await;
    for (command, port) in [("cutover", target), ("rollback", source)] {
        ends.done(&[command, "--route", &route_of(&pooler)]).await;
        let ini = std::fs::read_to_string(pooler.ini_path()).unwrap();
        assert!(ini.contains(&format!("app = host=127.0.0.1 port={port} dbname=app")), "{ini}");
        ends.done(&["verify"]).await;
    }
    ends.done(&["finish"]).await;
    run.ended().await.expect_success();
}
