//! `--on-row-error quarantine`: a row that the target refuses waits with its table, in order, while
//! everything else goes on; mended, nothing is lost.

use std::time::Duration;

use serde_json::Value;
use walferry::demo::compare::compare;
use walferry::demo::ledger;
use walferry::demo::server::Server;
use walferry::demo::writer::{Options, Writer, broken_invariants, create_schema};

use crate::support::job::{Ends, conserved};
use crate::support::{Walferry, until_within};

const RUN: &[&str] = &["run", "--on-row-error", "quarantine"];

/// One whose rows the target will refuse, and one that goes on.
const ITEM: &str = "create table item (id int primary key, note text, amount int); \
    insert into item select i, 'row ' || i, i from generate_series(1, 100) i; \
    create table other (id int primary key)";

/// An application's tables, and these.
async fn two_servers() -> Ends {
    let ends = Ends::start(15, 15);
    create_schema(&ends.source_uri(), 1).await.unwrap();
    ends.source.psql("app", ITEM).unwrap();
    ends
}

async fn following(ends: &Ends) -> Walferry {
    let mut run = ends.spawn(RUN);
    ends.until_phase(&mut run, "following").await;
    run
}

/// Waits until the target has all that the source has committed by now, of tables that go on.
async fn arrived(ends: &Ends, n: u32) {
    ends.source.psql("app", &format!("insert into other values ({n})")).unwrap();
    let sql = format!("select count(*) from other where id = {n}");
    until_within(Duration::from_secs(30), "the other table goes on", async || {
        ends.target.psql("app", &sql).unwrap() == "1"
    })
    .await;
}

async fn list(ends: &Ends) -> Value {
    ends.done(&["quarantine", "list", "--json"]).await.json()["tables"].clone()
}

async fn same_rows(ends: &Ends) {
    let found = compare(&ends.source_uri(), &ends.target_uri()).await.unwrap();
    let rows = found.differences.iter().filter(|line| !line.starts_with("sequence "));
    assert_eq!(rows.collect::<Vec<_>>(), Vec::<&String>::new());
}

async fn quarantined(ends: &Ends) -> i64 {
    let status = ends.status().await;
    conserved(&status["tables"]);
    let tables = status["tables"].as_array().unwrap().iter();
    tables.map(|table| table["quarantined"].as_i64().unwrap()).sum()
}

fn item(server: &Server, id: u32) -> String {
    server.psql("app", &format!("select note, amount from item where id = {id}")).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_row_waits_with_its_table_through_kills_and_goes_in_order_once_it_can() {
    let ends = two_servers().await;
    let mut run = following(&ends).await;
    let options = Options { tx_per_second: Some(100.0), ..Options::new(&ends.source_uri()) };
    let writer = Writer::start(options).await.unwrap();
    ends.target.psql("app", "insert into item values (1000, 'rogue', 1)").unwrap();
    let refused = "begin; update item set amount = 0 where id = 50; insert into other values (1); \
                   insert into item values (1000, 'ours', 2); delete from item where id = 51; \
                   insert into other values (2); commit";
    ends.source.psql("app", refused).unwrap();
    for n in 10..14 {
        tokio::time::sleep(Duration::from_millis(fastrand::u64(50..700))).await;
        run.kill9().await;
        run = ends.spawn(RUN);
        let more = format!(
            "update item set note = 'then {n}' where id in (50, 1000); \
             insert into item values ({n}000, null, {n}); truncate other"
        );
        ends.source.psql("app", &more).unwrap();
    }
    arrived(&ends, 100).await;
    // What came before the refused one in its transaction is there, what came behind it is not.
    assert_eq!(item(&ends.target, 50), "row 50|0");
    assert_eq!(item(&ends.target, 51), "row 51|51");
    assert_eq!(item(&ends.target, 1000), "rogue|1");
    let kept = quarantined(&ends).await;
    assert_eq!(kept, 2 + 4 * 3, "two of the first transaction, three each of the others");
    let tables = list(&ends).await;
    let (table, first) = (&tables[0], &tables[0]["rows"][0]);
    assert_eq!(
        (table["table"].as_str(), table["changes"].as_i64()),
        (Some("public.item"), Some(kept))
    );
    assert!(table["error"].as_str().unwrap().contains("(1000)"), "{table}");
    assert_eq!(first["new"], serde_json::json!({"id": "1000", "note": "ours", "amount": "2"}));
    assert_eq!((first["operation"].as_str(), first["ordinal"].as_i64()), (Some("INSERT"), Some(2)));
    assert!(first["xid"].as_i64().unwrap() > 0 && first["commit_lsn"].as_str().unwrap() != "0/0");

    // Named where it matters, and in the way of a switch.
    let verified = ends.walferry(&["verify", "--json"]).await;
    assert_eq!(
        (verified.code, &verified.json()["quarantined"][0]["table"]),
        (Some(1), &table["table"])
    );
    let refused = ends.walferry(&["cutover", "--dry-run", "--max-lag", "10s"]).await;
    assert_eq!(refused.code, Some(1));
    for said in ["public.item", "quarantine list", "--leave-quarantined"] {
        assert!(refused.err.contains(said), "{}", refused.err);
    }

    // Not mended, it stays; mended, it goes.
    let stays = ends.walferry(&["quarantine", "retry"]).await;
    assert_eq!(stays.code, Some(1), "{stays:?}");
    assert!(stays.out.contains("(1000)") && stays.out.contains("stay"), "{}", stays.out);
    ends.target.psql("app", "delete from item where id = 1000").unwrap();
    let wrong = ends.walferry(&["quarantine", "retry", "public.other"]).await;
    assert!(wrong.err.contains("public.other, but of public.item"), "{}", wrong.err);
    ends.done(&["quarantine", "retry", "public.item"]).await;
    let report = writer.stop().await;
    arrived(&ends, 101).await;
    ends.done(&["verify"]).await;
    same_rows(&ends).await;
    assert_eq!(quarantined(&ends).await, 0);
    for uri in [ends.source_uri(), ends.target_uri()] {
        assert_eq!(broken_invariants(&uri).await.unwrap(), Vec::<String>::new());
        assert!(ledger::check(&uri, &report.ledger).await.unwrap().is_exact());
    }
    ends.done(&["cancel"]).await;
    let _ = run.ended().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_kept_is_dropped_one_by_one_or_whole_and_a_switch_may_leave_it() {
    let ends = two_servers().await;
    let run = following(&ends).await;
    ends.target.psql("app", "alter table item add constraint small check (amount < 500)").unwrap();
    // More than one goes into a piece, and sets are refused as well.
    let many = "insert into item values (200, 'large', 501); \
                insert into item select i, 'later', 1 from generate_series(1001, 3500) i; \
                update item set note = 'last' where id between 1001 and 3500; \
                insert into item values (201, 'large', 502)";
    ends.source.psql("app", many).unwrap();
    arrived(&ends, 1).await;
    assert_eq!(quarantined(&ends).await, 5002);
    let id = |tables: &Value| tables[0]["rows"][0]["id"].as_i64().unwrap().to_string();
    let first = id(&list(&ends).await);
    ends.done(&["quarantine", "drop", "--id", &first]).await;
    // All but the last is written, and that one is named.
    let stays = ends.walferry(&["quarantine", "retry", "--json"]).await;
    assert_eq!(stays.code, Some(1), "{stays:?}");
    assert_eq!(stays.json()["tables"][0]["changes"], 1);
    assert_eq!(
        ends.target.psql("app", "select count(*) from item where note = 'last'").unwrap(),
        "2500"
    );
    let second = list(&ends).await;
    assert_eq!(second[0]["rows"][0]["new"]["id"], "201", "{second}");
    assert!(second[0]["rows"][0]["error"].as_str().unwrap().contains("small"), "{second}");
    let gone = ends.walferry(&["quarantine", "drop", "--id", &first]).await;
    assert!(gone.err.contains("no change"), "{}", gone.err);
    assert_eq!(ends.walferry(&["quarantine", "drop"]).await.code, Some(2));
    let dropped = ends.done(&["quarantine", "drop", "public.item"]).await;
    assert!(dropped.out.contains("1 changes dropped"), "{}", dropped.out);
    assert_eq!(quarantined(&ends).await, 0);
    ends.source.psql("app", "delete from item where id in (200, 201)").unwrap();
    // Nor are there rows to delete: the table waits again, and is left behind.
    until_within(Duration::from_secs(30), "the deletes are kept", async || {
        quarantined(&ends).await == 2
    })
    .await;
    let switched = ends.done(&["cutover", "--leave-quarantined", "--max-lag", "10s"]).await;
    assert!(switched.out.contains("switched"), "{}", switched.out);
    let refused = ends.walferry(&["quarantine", "retry"]).await;
    assert!(refused.err.contains("does not flow now"), "{}", refused.err);
    ends.done(&["finish"]).await;
    let _ = run.ended().await;
    let two_phase = ["run", "--on-row-error", "quarantine", "--two-phase", "on"];
    assert_eq!(ends.walferry(&two_phase).await.code, Some(2));
}

/// Kept through a kill, and written once it can be, in whatever way changes come and are marked.
async fn is_kept_and_goes_once_it_can(ends: &Ends, arguments: &[&str]) {
    let mut run = ends.spawn(arguments);
    ends.until_phase(&mut run, "following").await;
    ends.target.psql("app", "insert into item values (1000, 'rogue', 1)").unwrap();
    let refused = "begin; update item set amount = 0 where id = 50; insert into other values (1); \
                   insert into item values (1000, 'ours', 2); delete from item where id = 51; commit";
    ends.source.psql("app", refused).unwrap();
    arrived(ends, 90).await;
    run.kill9().await;
    let run = ends.spawn(arguments);
    let more = "update item set note = 'then' where id in (50, 1000); insert into other values (2)";
    ends.source.psql("app", more).unwrap();
    arrived(ends, 100).await;
    let there = [50, 51, 1000].map(|id| item(&ends.target, id));
    assert_eq!(there, ["row 50|0", "row 51|51", "rogue|1"]);
    assert_eq!(quarantined(ends).await, 4);
    let tables = list(ends).await;
    assert_eq!(tables[0]["rows"][0]["new"]["note"], "ours", "{tables}");
    ends.target.psql("app", "delete from item where id = 1000").unwrap();
    ends.done(&["quarantine", "retry", "public.item"]).await;
    arrived(ends, 101).await;
    assert_eq!(quarantined(ends).await, 0);
    ends.done(&["verify"]).await;
    same_rows(ends).await;
    ends.done(&["cancel"]).await;
    let _ = run.ended().await;
}

#[cfg(feature = "kafka")]
#[tokio::test(flavor = "multi_thread")]
async fn a_refused_row_that_came_through_a_topic_is_kept_and_goes_once_it_can() {
    let ends = Ends::start(15, 15).with_kafka(&crate::support::job::broker().address());
    ends.source.psql("app", ITEM).unwrap();
    is_kept_and_goes_once_it_can(&ends, RUN).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_row_of_a_managed_source_is_kept_and_goes_once_it_can() {
    let ends = crate::rights::roles::managed((15, 15)).await;
    let given = format!("{ITEM}; grant select on item, other to mover");
    ends.source.psql("app", &given).unwrap();
    is_kept_and_goes_once_it_can(&ends, &[RUN, &["--no-owner"]].concat()).await;
}
