//! Routes of every kind at once: all are ready before any leads anybody over, and one that fails has
//! all of them undone.

use walferry::demo::pgbouncer::PgBouncer;

use super::reads::{led_to, read_at};
use super::{Hook, Load, Stage, assert_all_there};
use crate::route::sqlmed::{lead_by_fdw, lead_by_plproxy};
use crate::support::job::route_of;
use crate::support::server;

#[tokio::test(flavor = "multi_thread")]
async fn routes_of_every_kind_are_ready_before_any_leads_and_one_that_fails_undoes_all() {
    let stage = Stage::start().await;
    let load = Load::start(&stage.ends.source, &stage.ends.source_uri()).await;
    let pooler = PgBouncer::start(&stage.ends.source, &["app"]).unwrap();
    let routers = [server(), server()];
    for router in &routers {
        lead_by_fdw(router, &stage.ends.source, "app", "t (id bigint, v text)");
        lead_by_plproxy(router, &stage.ends.source, "app");
    }
    let (leading, last) = (Hook::new(&stage, Some(&load)), Hook::new(&stage, None));
    let mut routes = vec![leading.route(), route_of(&pooler)];
    for router in &routers {
        let uri = router.uri("postgres");
        routes.extend([format!("fdw:{uri},live"), format!("plproxy:{uri},shop,p0")]);
    }
    routes.push(last.route());
    let words = |command: &'static str| {
        let given = routes.iter().flat_map(|route| ["--route", route.as_str()]);
        [command].into_iter().chain(given).collect::<Vec<&str>>()
    };
    let ini = std::fs::read_to_string(pooler.ini_path()).unwrap();
    let (source, target) = (stage.ends.source.port(), stage.ends.target.port());
    let mut kept: Vec<String> = routers.iter().map(led_to).collect();
    let mut live = source;
    for (command, to) in [("cutover", target), ("rollback", source)] {
        for phase in ["check", "hold", "switch"] {
            last.on(phase, "exit 3\n");
            let logged = leading.log().len();
            let ended = stage.ends.walferry(&words(command)).await;
            let said = format!("in phase {phase}");
            assert!(ended.code == Some(1) && ended.err.contains(&said), "{ended:?}");
            last.on(phase, "");
            let log = leading.log().split_off(logged);
            let was = |phase: &str| log.contains(&format!("{command} {phase}"));
            // The first is not asked to switch before the last is ready.
            assert_eq!((was("check"), was("switch")), (true, phase == "switch"), "{log:?}");
            assert_eq!(was("undo"), phase != "check", "{log:?}");
            assert_eq!(read_at(&pooler).await, live, "{command} {phase}");
            let led: Vec<String> = routers.iter().map(led_to).collect();
            assert_eq!(led, kept, "{command} {phase}");
            load.more(5).await;
        }
        stage.ends.done(&words(command)).await;
        live = to;
        assert_eq!(read_at(&pooler).await, live);
        kept = routers.iter().map(led_to).collect();
        assert!(kept.iter().all(|led| led.starts_with(&format!("{live} "))), "{kept:?}");
        load.more(5).await;
    }
    let seen = load.stop().await;
    stage.ends.done(&["verify"]).await;
    assert_all_there(&stage.ends.source, &seen, 0);
    let ended = stage.ends.done(&["finish", "--json"]).await.json();
    assert_eq!((&ended["state"], &ended["job"]), (&"finished".into(), &"main".into()));
    assert_eq!(ended["cleaned"], serde_json::json!(["source", "target"]));
    let dropped = ended["dropped"].to_string();
    assert!(dropped.contains("replication slot"), "{dropped}");
    stage.run.ended().await.expect_success();
    assert_eq!(std::fs::read_to_string(pooler.ini_path()).unwrap(), ini);
    for router in &routers {
        assert_eq!(led_to(router), format!("{source} the shop's own"));
    }
}
