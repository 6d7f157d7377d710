//! kill -9 of whoever takes part in a switch, at random moments. WALFERRY_KILLS says how many.

use std::time::Duration;

use walferry::demo::server::Server;

use super::{Cluster, Load, Move};
use crate::support::Walferry;

/// Kills in the short form.
const KILLS: usize = 4;

/// A flip takes about a second from its command to its end, most of it before writers are held.
const WITHIN_MS: u64 = 1500;

/// Kills a server and starts it again.
pub async fn restart(server: &Server) {
    server.kill9().unwrap();
    tokio::time::sleep(Duration::from_millis(200)).await;
    server.resume().unwrap();
}

/// Kills what the number says; gives its name.
async fn kill(cluster: &Cluster, victim: usize, driver: Walferry) -> &'static str {
    match victim {
        0 => {
            driver.kill9().await;
            return "walferry";
        }
        1 => restart(&cluster.workers[0]).await,
        2 => restart(&cluster.workers[1]).await,
        _ => restart(&cluster.coordinator).await,
    }
    // It goes on, gives up, or was done before.
    driver.ended().await;
    ["source", "target", "coordinator"][victim - 1]
}

/// Gives the command again until the job is where it should be.
async fn brought_to(job: &Move, command: &str, goal: &str) {
    for _ in 0..20 {
        if job.status().await["phase"] == goal {
            // Clients may be still to be let through.
            job.done(&["run", "--until", "following"]).await;
            return;
        }
        job.command(&[command]).await;
    }
    panic!("not {goal}: {}", job.status().await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_is_killed_no_row_is_lost_and_no_shard_has_two_owners() {
    let kills = std::env::var("WALFERRY_KILLS").ok().and_then(|text| text.parse().ok());
    let Some(cluster) = Cluster::start(2) else { return };
    let cluster = cluster.with_tables();
    let port = cluster.workers[0].port();
    let (_, shards) = cluster.groups().into_iter().find(|(on, _)| *on == port).unwrap();
    let (source, target) = (&cluster.workers[0], &cluster.workers[1]);
    let job = Move::new("kills", source, target, &cluster.route(), &shards);
    let uris = [cluster.coordinator.uri("postgres"), target.uri("postgres")];
    let load = Load::start(&uris, Duration::from_millis(5));
    job.done(&["run", "--until", "following"]).await;
    let first = cluster.placements();
    for round in 0..kills.unwrap_or(KILLS) {
        let (command, goal) =
            if round % 2 == 0 { ("cutover", "switched") } else { ("rollback", "rolled_back") };
        load.more(20).await;
        let driver = job.spawn(&[command]);
        let wait = fastrand::u64(..WITHIN_MS);
        tokio::time::sleep(Duration::from_millis(wait)).await;
        let victim = if kills.is_some() { fastrand::usize(..4) } else { round % 4 };
        let killed = kill(&cluster, victim, driver).await;
        brought_to(&job, command, goal).await;
        println!("{round}: {killed} killed {wait} ms after {command}");
        assert_eq!(cluster.prepared(), "", "{killed} after {wait} ms of {command}");
        assert_eq!(cluster.placements() == first, command == "rollback");
    }
    load.more(20).await;
    let seen = load.end().await;
    job.done(&["verify"]).await;
    let orders = cluster.audit();
    let most = seen.acknowledged + seen.unknown;
    assert!((seen.acknowledged..=most).contains(&orders), "{orders} {} {most}", seen.acknowledged);
    job.done(&["finish"]).await;
    assert_eq!(cluster.audit(), orders);
}
