//! The other fences: the whole way there and back, and nothing left.

use walferry::demo::pgbouncer::PgBouncer;
use walferry::demo::writer::{Options, Writer, create_schema};

use crate::support::job::{Ends, route_of};

async fn there_and_back_through_pgbouncer(fence: &str, times: usize) {
    let ends = Ends::start(15, 15);
    create_schema(&ends.source_uri(), 1).await.unwrap();
    let pooler = PgBouncer::start(&ends.source, &["app"]).unwrap();
    let before = ends.inventories().await;
    let ini = std::fs::read_to_string(pooler.ini_path()).unwrap();
    let options = Options { tx_per_second: Some(100.0), ..Options::new(&pooler.uri("app")) };
    let writer = Writer::start(options).await.unwrap();
    let mut run = ends.spawn(&["run"]);
    ends.until_phase(&mut run, "following").await;
    let route = route_of(&pooler);
    let settings = "select count(*) from pg_db_role_setting";
    let both = [("cutover", &ends.source, &ends.target), ("rollback", &ends.target, &ends.source)];
    for (command, old, live) in both.into_iter().cycle().take(2 * times) {
        ends.done(&[command, "--fence", fence, "--route", &route]).await;
        assert!(writer.committed_more(30).await, "the writer is stuck");
        let closed = if fence == "read-only" { "1" } else { "0" };
        assert_eq!(old.psql("app", settings).unwrap(), closed);
        assert_eq!(live.psql("app", settings).unwrap(), "0");
        let written = old.psql("app", "delete from shop.audit where ctid is null");
        assert_eq!(written.is_err(), fence == "read-only", "{written:?}");
        ends.done(&["verify"]).await;
    }
    let report = writer.stop().await;
    assert_eq!((report.failed_statements, report.failed_connects), (0, 0), "{:?}", report.errors);
    // Neither the streams nor the runner were taken for clients.
    assert!(!run.so_far().contains("trying again"), "{}", run.so_far());
    ends.done(&["verify"]).await;
    ends.done(&["finish"]).await;
    run.ended().await.expect_success();
    let after = ends.inventories().await;
    assert_eq!(before.0.diff(&after.0), Vec::<String>::new());
    assert_eq!(before.1.leftovers(&after.1), Vec::<String>::new());
    assert_eq!(std::fs::read_to_string(pooler.ini_path()).unwrap(), ini);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_only_fence_goes_there_and_back_and_leaves_no_setting() {
    there_and_back_through_pgbouncer("read-only", 2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pgbouncer_alone_is_fence_enough() {
    there_and_back_through_pgbouncer("none", 1).await;
}
