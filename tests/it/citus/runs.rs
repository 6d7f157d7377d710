//! kill -9 of whoever takes part in the run of a cluster's job, at random moments. WALFERRY_KILLS
//! says how many.

use std::time::Duration;

use serde_json::Value;
use walferry::demo::server::Server;

use super::kills::restart;
use super::{Cluster, Load};
use crate::support::{Ended, Walferry};

/// Kills in the short form: each of the four once.
const KILLS: usize = 4;

/// A run of two or three tasks takes about so long.
const WITHIN_MS: u64 = 4_000;

fn spawn(cluster: &Cluster, words: &[&str]) -> Walferry {
    let route = cluster.route();
    Walferry::spawn(&[&["cluster", "--cluster", &route, "--json"], words].concat())
}

async fn asked(cluster: &Cluster, words: &[&str]) -> Value {
    spawn(cluster, words).ended().await.expect_success().json()
}

/// Kills what the number says; gives its name.
async fn kill(cluster: &Cluster, victim: usize, run: Walferry) -> (&'static str, Option<Ended>) {
    match victim {
        0 => {
            run.kill9().await;
            return ("walferry", None);
        }
        1 => restart(&cluster.coordinator).await,
        _ => restart(&cluster.workers[victim - 2]).await,
    }
    let name = ["the coordinator", "worker 0", "worker 1", "worker 2"][victim - 1];
    (name, Some(run.ended().await))
}

/// Runs the job until all of its tasks are completed; as long as there are kills left, somebody is
/// killed in each run. Gives how many are left.
async fn driven(cluster: &Cluster, job: &str, mut left: usize, every: bool) -> usize {
    let mut last = None;
    for _ in 0..40 {
        let mut run = spawn(cluster, &["run", job]);
        let wait = fastrand::u64(..WITHIN_MS);
        tokio::time::sleep(Duration::from_millis(if left > 0 { wait } else { 0 })).await;
        last = if left == 0 || run.has_ended() {
            Some(run.ended().await)
        } else {
            left -= 1;
            let victim = if every { left % 4 } else { fastrand::usize(..5) };
            let (killed, ended) = kill(cluster, victim, run).await;
            println!("job {job}: {killed} killed after {wait} ms");
            ended
        };
        let tasks = asked(cluster, &["job", job]).await["tasks"].clone();
        let states: Vec<&str> =
            tasks.as_array().unwrap().iter().map(|t| t["state"].as_str().unwrap()).collect();
        if states.iter().all(|state| *state == "completed") && last.is_some() {
            return left;
        }
        if states.contains(&"error") {
            // What a person would do, having read why.
            println!("job {job}: reset after {last:?}");
            asked(cluster, &["reset", job]).await;
        }
    }
    panic!("job {job} does not end: {last:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_is_killed_while_a_job_runs_the_same_command_brings_it_to_its_end() {
    let kills = std::env::var("WALFERRY_KILLS").ok().and_then(|text| text.parse().ok());
    let Some(cluster) = Cluster::start(3) else { return };
    let cluster = cluster.with_tables();
    let uris = [cluster.coordinator.uri("postgres"), cluster.workers[0].uri("postgres")];
    let load = Load::start(&uris, Duration::from_millis(5));
    let mut left = kills.unwrap_or(KILLS);
    for drained in (0..3).cycle() {
        load.more(20).await;
        let worker: &Server = &cluster.workers[drained];
        let node = format!("127.0.0.1:{}", worker.port());
        let planned = asked(&cluster, &["drain", &node]).await;
        assert_eq!(planned["ready"], true, "{planned}");
        let job = planned["job"].to_string();
        left = driven(&cluster, &job, left, kills.is_none()).await;
        asked(&cluster, &["finish", &job]).await;
        assert!(cluster.groups().iter().all(|(port, _)| *port != worker.port()));
        assert_eq!(cluster.prepared(), "");
        cluster.placements();
        if left == 0 {
            break;
        }
    }
    load.more(20).await;
    let seen = load.end().await;
    let (orders, most) = (cluster.audit(), seen.acknowledged + seen.unknown);
    assert!((seen.acknowledged..=most).contains(&orders), "{orders} {} {most}", seen.acknowledged);
}
