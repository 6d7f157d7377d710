//! Groups by each way of reading, through each buffer, and between versions.

use std::time::Duration;

use super::router::{Router, Writers};
use super::{assert_exact, finished, groups, refused, tables};
use crate::support::job::{Ends, broker};

/// What runs with every change: textual decoders, pull, a spool, ways up and down.
const CHOSEN: &str = "15-15/test_decoding/pull 15-15/wal2json/stream/spool 12-17/pgoutput/stream 18-14/pgoutput/pull";

/// Partitions of a cell's table.
const PARTITIONS: usize = 8;

/// `12-17/pgoutput/stream`, or with a buffer `15-15/wal2json/stream/spool`.
async fn cell(name: &str) {
    let parts: Vec<&str> = name.split('/').collect();
    let (source, target) = parts[0].split_once('-').unwrap();
    let ends = Ends::start(source.parse().unwrap(), target.parse().unwrap());
    let ends = match parts.get(3) {
        Some(&"spool") => ends.with_spool(),
        Some(&"kafka") => ends.with_kafka(&broker().address()),
        _ => ends,
    };
    let read = ["--decoder", parts[1], "--transport", parts[2]];
    let with = |command: &[&'static str]| [command, &read[..]].concat();
    ends.source.psql("app", &tables(PARTITIONS, 800)).unwrap();
    let mut run = ends.spawn(&with(&["run"]));
    ends.until_phase(&mut run, "following").await;
    let router = Router::start(ends.source.dir(), PARTITIONS);
    let uris = [ends.source_uri(), ends.target_uri()];
    let writers = Writers::start(&router, uris, 2, Duration::from_millis(3));
    let hook = router.route();
    let route = ["--route", &*hook];
    let flip = |command: &[&'static str]| [&with(command)[..], &route[..]].concat();

    // All go, some come back, and the rest after them; a job ends on either side.
    ends.done(&flip(&["cutover", "--groups", "2"])).await;
    assert_eq!(ends.status().await["phase"], "switched");
    writers.more(60).await;
    let some = ["rollback", "--tables", "public.items_0002", "--tables", "public.items_0005"];
    ends.done(&flip(&some)).await;
    assert_eq!(ends.status().await["phase"], "split");
    assert!(groups(&ends.status().await).iter().any(|g| (&*g.1, g.2) == ("source", 2)));
    writers.more(60).await;
    // Each table is compared along the stream from its owner, which carries nothing of this back.
    ends.done(&with(&["verify"])).await;
    let written = |from: i64, to: i64| {
        let sql = format!(
            "set session_replication_role = replica; \
             update public.items_0002 set n = {to} where n = {from}"
        );
        ends.target.psql("app", &sql).unwrap();
    };
    written(-1, -2);
    let differs = ends.walferry(&with(&["verify"])).await;
    assert_eq!(differs.code, Some(1), "{differs:?}");
    let differing = differs.out.lines().filter(|line| line.contains(" differing"));
    let differing: Vec<&str> = differing.map(|line| line.split(' ').next().unwrap()).collect();
    assert_eq!(differing, ["public.items_0002"], "{differs:?}");
    written(-2, -1);
    refused(&ends, &with(&["finish"]), "on either side").await;
    ends.done(&flip(&["rollback"])).await;
    assert_eq!(ends.status().await["phase"], "rolled_back");
    writers.more(60).await;
    let seen = writers.end().await;
    assert_eq!(seen.errors, Vec::<String>::new(), "{name}");
    ends.done(&with(&["verify"])).await;
    assert_exact(&ends, &seen);
    finished(&ends).await;
    ends.source.psql("app", "insert into public.items (bucket) values (1)").unwrap();
    println!("{name}: {} statements, the longest {:?}", seen.statements, seen.longest(&[]));
}

/// `WALFERRY_CELLS="12-17/pgoutput/stream ..."`: others than the chosen ones.
#[tokio::test(flavor = "multi_thread")]
async fn groups_go_and_come_by_every_way_of_reading_and_between_versions() {
    let text = std::env::var("WALFERRY_CELLS").unwrap_or_else(|_| CHOSEN.to_string());
    let names: Vec<String> = text.split_whitespace().map(str::to_string).collect();
    assert!(!names.is_empty());
    // Two at a time: what they wait for is mostly not the processor.
    for pair in names.chunks(2) {
        let beside: Vec<_> = pair
            .iter()
            .cloned()
            .map(|name| tokio::spawn(async move { cell(&name).await }))
            .collect();
        for task in beside {
            task.await.unwrap();
        }
    }
}
