//! Those who read are led to the target ahead of the writes, and back.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::Value;
use walferry::demo::pgbouncer::PgBouncer;
use walferry::demo::server::Server;

use super::{Hook, Load, Stage, assert_all_there, session};
use crate::route::sqlmed::{lead_by_fdw, lead_by_plproxy};
use crate::support::job::route_of;
use crate::support::{self, server};

/// Clients of a pooler that only read.
struct Readers {
    stop: Arc<AtomicBool>,
    tasks: Vec<tokio::task::JoinHandle<Vec<String>>>,
}

impl Readers {
    fn start(pooler: &PgBouncer) -> Readers {
        let stop = Arc::new(AtomicBool::new(false));
        let read = |_| {
            let (uri, stop) = (pooler.uri("app"), stop.clone());
            tokio::spawn(async move {
                let (mut session, mut errors) = (session(&uri).await, Vec::new());
                while !stop.load(Ordering::Relaxed) {
                    let sql = "select count(*) from public.t";
                    errors.extend(session.query(sql).await.err().map(|e| e.to_string()));
                    tokio::time::sleep(Duration::from_millis(3)).await;
                }
                errors
            })
        };
        let tasks = (0..3).map(read).collect();
        Readers { stop, tasks }
    }

    async fn end(self) {
        self.stop.store(true, Ordering::Relaxed);
        for task in self.tasks {
            assert_eq!(task.await.unwrap(), Vec::<String>::new());
        }
    }
}

/// The port of the server that a pooler's clients read.
pub(super) async fn read_at(pooler: &PgBouncer) -> u16 {
    let mut session = session(&pooler.uri("app")).await;
    session.query("select current_setting('port')").await.unwrap()[0].parse(0).unwrap()
}

/// The port that the router's foreign server of postgres_fdw leads to, and that server's comment;
/// its partition of plproxy leads there too.
pub(super) fn led_to(router: &Server) -> String {
    let sql = "select (select option_value from pg_options_to_table(srvoptions) \
         where option_name = 'port') || ' ' || obj_description(oid, 'pg_foreign_server') \
         from pg_foreign_server where srvname = 'live'";
    let live = router.psql("postgres", sql).unwrap();
    let sql = "select substring(option_value from 'port=([0-9]+)') from pg_foreign_server, \
         pg_options_to_table(srvoptions) where srvname = 'shop' and option_name = 'p0'";
    let partition = router.psql("postgres", sql).unwrap();
    assert_eq!(live.split(' ').next(), Some(&*partition));
    live
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_are_led_ahead_of_the_writes_and_back_and_never_to_a_side_that_is_behind() {
    let mut stage = Stage::start().await;
    let load = Load::start(&stage.ends.source, &stage.ends.source_uri()).await;
    let pooler = PgBouncer::start(&stage.ends.source, &["app"]).unwrap();
    let router = server();
    lead_by_fdw(&router, &stage.ends.source, "app", "t (id bigint, v text)");
    lead_by_plproxy(&router, &stage.ends.source, "app");
    let readers = Readers::start(&pooler);
    let partition = format!("plproxy:{},shop,p0", router.uri("postgres"));
    let (pool, fdw) = (route_of(&pooler), format!("fdw:{},live", router.uri("postgres")));
    let hook = Hook::new(&stage, None);
    let script = hook.route();
    let there = [
        "cutover",
        "--reads",
        "--read-route",
        &pool,
        "--read-route",
        &fdw,
        "--read-route",
        &partition,
        "--read-route",
        &script,
    ];
    let (source, target) = (stage.ends.source.port(), stage.ends.target.port());
    let at_source = format!("{source} the shop's own");
    let ini = std::fs::read_to_string(pooler.ini_path()).unwrap();
    load.more(5).await;

    // A target that is behind is no place to read from.
    let mut lock = session(&stage.ends.target_uri()).await;
    lock.execute("begin; lock table public.t in access exclusive mode").await.unwrap();
    load.more(5).await;
    let behind = [&there[..], &["--max-lag", "300ms"]].concat();
    let ended = stage.ends.walferry(&behind).await;
    assert!(ended.code == Some(1) && ended.err.contains("behind"), "{ended:?}");
    lock.execute("rollback").await.unwrap();
    // Nor is one that a route fails on the way to: all others are led back.
    hook.on("switch", "exit 3\n");
    let ended = stage.ends.walferry(&there).await;
    assert!(ended.code == Some(1) && ended.err.contains("in phase switch"), "{ended:?}");
    assert_eq!((read_at(&pooler).await, led_to(&router)), (source, at_source.clone()));
    assert_eq!(stage.ends.status().await["reads"], Value::Null);
    hook.on("switch", "");

    stage.ends.done(&[&there[..], &["--dry-run"]].concat()).await;
    assert_eq!(read_at(&pooler).await, source);
    stage.ends.done(&there).await;
    assert_eq!(read_at(&pooler).await, target);
    assert!(led_to(&router).starts_with(&format!("{target} walferry")), "{}", led_to(&router));
    assert!(hook.environment("switch").contains("WALFERRY_CLIENTS=readers"));
    assert_eq!(stage.ends.status().await["reads"]["state"], "led");
    assert_eq!(stage.phase().await, "following");
    load.more(5).await;
    for (words, said) in [
        (&there[..], "on the target already"),
        (&["cancel"], "rollback --reads first"),
        (&["cutover", "--route", &pool], "lead readers and writers alike"),
        (&["cutover", "--reads"], "add --read-route"),
        (&["cutover", "--reads", "--fence", "none"], "cannot be used with"),
    ] {
        let ended = stage.ends.walferry(words).await;
        assert!(ended.code != Some(0) && ended.err.contains(said), "{words:?}: {ended:?}");
    }

    // The writes come and go, and readers stay where they are, which is current either way.
    let writes = Hook::new(&stage, Some(&load));
    let route = writes.route();
    for (command, live) in [("cutover", "switched"), ("rollback", "rolled_back")] {
        stage.ends.done(&[command, "--route", &route]).await;
        load.more(5).await;
        assert_eq!((stage.phase().await.as_str(), read_at(&pooler).await), (live, target));
    }
    let ended = stage.ends.walferry(&["finish"]).await;
    assert!(ended.code == Some(1) && ended.err.contains("rollback --reads first"), "{ended:?}");
    stage.ends.done(&["rollback", "--reads"]).await;
    assert_eq!((read_at(&pooler).await, led_to(&router)), (source, at_source.clone()));
    assert_eq!(std::fs::read_to_string(pooler.ini_path()).unwrap(), ini);
    let ended = stage.ends.walferry(&["rollback", "--reads"]).await;
    assert!(ended.code == Some(1) && ended.err.contains("readers are on the source"), "{ended:?}");

    // Whoever drives it is killed half way: the next run leads them back.
    for phase in ["hold", "switch", "release"] {
        hook.stop_at(phase);
        let asker = stage.ends.spawn(&there);
        hook.reached().await;
        stage.run.kill9().await;
        asker.kill9().await;
        hook.go();
        hook.on(phase, "");
        stage.run = stage.ends.spawn(&["run", "--schema-only", "public.log"]);
        let back = async || stage.ends.status().await["reads"] == Value::Null;
        support::until("readers are led back", back).await;
        assert_eq!((read_at(&pooler).await, led_to(&router)), (source, at_source.clone()));
    }
    stage.ends.done(&there).await;
    stage.ends.done(&["cutover", "--route", &route]).await;
    load.more(5).await;
    assert_eq!(read_at(&pooler).await, target);
    readers.end().await;
    let seen = load.stop().await;
    stage.ends.done(&["verify"]).await;
    assert_all_there(&stage.ends.target, &seen, 0);
    stage.ends.done(&["finish"]).await;
    assert_eq!(led_to(&router), format!("{target} the shop's own"));
    stage.run.ended().await.expect_success();
}
