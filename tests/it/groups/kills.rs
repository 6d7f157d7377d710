//! kill -9 of the runner, and of the command that asks it, at random moments while groups go one
//! after the other. WALFERRY_KILLS says how many.

use std::collections::BTreeSet;
use std::time::Duration;

use walferry::demo::server::Server;

use super::router::{Router, Writers};
use super::{assert_exact, finished, shut, tables};
use crate::support::Walferry;
use crate::support::job::Ends;

/// Kills in the short form.
const KILLS: usize = 4;

const PARTITIONS: usize = 16;

/// A series of groups takes about so long.
const WITHIN_MS: u64 = 3_000;

/// Waits until nothing is half done, by two looks that are some time apart; gives the phase. Starts
/// a runner where there is none.
async fn settled(ends: &Ends, run: &mut Option<Walferry>) -> String {
    let mut before = String::new();
    for _ in 0..200 {
        if run.as_mut().is_none_or(|run| run.has_ended()) {
            *run = Some(ends.spawn(&["run"]));
        }
        let status = ends.status().await;
        let phase = status["phase"].as_str().unwrap_or_default().to_string();
        let rests = phase != "cutting_over" && status["held_clients"] == false;
        let rests = rests && !status["runner"].is_null();
        if rests && phase == before {
            return phase;
        }
        before = if rests { phase } else { String::new() };
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    panic!("neither made nor undone: {}", ends.status().await);
}

/// Each table is shut on one side and open on the other, which is what the job says of it.
fn owned_once(ends: &Ends) -> (usize, usize) {
    let tables = |server: &Server, sql: &str| -> BTreeSet<String> {
        server.psql("app", sql).unwrap().lines().map(str::to_string).collect()
    };
    let all = tables(
        &ends.source,
        "select oid::regclass::text from pg_class \
         where relkind = 'r' and relnamespace = 'public'::regnamespace",
    );
    let owned = |there: bool| {
        let sql = format!(
            "select format('%I.%I', schema, name)::regclass::text from walferry.ownership \
             where on_target = {there}"
        );
        tables(&ends.target, &sql)
    };
    let (here, there) = (owned(false), owned(true));
    assert_eq!(here.union(&there).cloned().collect::<BTreeSet<_>>(), all);
    assert_eq!((shut(&ends.source), shut(&ends.target)), (there.clone(), here.clone()));
    (here.len(), there.len())
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_is_killed_between_and_inside_groups_each_table_has_one_owner() {
    let kills = std::env::var("WALFERRY_KILLS").ok().and_then(|text| text.parse().ok());
    let ends = Ends::start(15, 15);
    ends.source.psql("app", &tables(PARTITIONS, 1600)).unwrap();
    let mut run = ends.spawn(&["run"]);
    ends.until_phase(&mut run, "following").await;
    let mut run = Some(run);
    let router = Router::start(ends.source.dir(), PARTITIONS);
    let uris = [ends.source_uri(), ends.target_uri()];
    let writers = Writers::start(&router, uris, 3, Duration::from_millis(3));
    let hook = router.route();
    let mut left = kills.unwrap_or(KILLS);
    let mut flips = ["cutover", "rollback"].into_iter().cycle();
    let (mut command, mut tries, mut switches) = ("cutover", 0, 0);
    flips.next();
    while left > 0 || tries > 0 || switches % 2 == 0 {
        let goal = if command == "cutover" { "switched" } else { "rolled_back" };
        writers.more(20).await;
        let words = [command, "--groups", "4", "--lock-timeout", "100ms", "--route", &*hook];
        let mut asker = Some(ends.spawn(&words));
        if left > 0 {
            let wait = fastrand::u64(..WITHIN_MS);
            tokio::time::sleep(Duration::from_millis(wait)).await;
            let victim = if kills.is_some() { fastrand::usize(..3) } else { left % 3 };
            left -= 1;
            let killed = ["the runner", "the command", "both"][victim];
            for (spared, whom) in [(1, &mut run), (0, &mut asker)] {
                if let Some(whom) = whom.take_if(|_| victim != spared) {
                    whom.kill9().await;
                }
            }
            println!("{killed} killed {wait} ms after {command}");
        }
        // It goes on, gives up, or was done before.
        let ended = match asker {
            Some(asker) => Some(asker.ended().await),
            None => None,
        };
        let phase = settled(&ends, &mut run).await;
        tries += 1;
        if phase != "following" {
            let (here, there) = owned_once(&ends);
            println!("    {phase}: {here} on the source, {there} on the target");
        }
        assert!(tries < 20 + kills.unwrap_or(KILLS), "{command} does not end: {ended:?}");
        if phase == goal {
            (command, tries, switches) = (flips.next().unwrap(), 0, switches + 1);
        }
    }
    writers.more(60).await;
    let seen = writers.end().await;
    assert_eq!(seen.errors, Vec::<String>::new());
    ends.done(&["verify"]).await;
    assert_exact(&ends, &seen);
    assert_eq!(owned_once(&ends).0, 0, "all are on the target");
    println!("{} statements, {switches} series, longest {:?}", seen.statements, seen.longest(&[]));
    finished(&ends).await;
}
