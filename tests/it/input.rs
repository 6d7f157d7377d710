//! Bad input, and what people and servers do behind a job's back: every case ends in a message that
//! says what and what next, the right exit code, and nothing changed or lost.

use walferry::demo::compare::compare;
use walferry::demo::proxy::Proxy;
use walferry::demo::server::{Server, StopMode};

use crate::support::job::Ends;
use crate::support::{Walferry, session, until_sql};

mod refused;
mod selection;
mod settings;
mod setup;
mod stories;
mod stream;

/// A source with a few rows, and an empty target.
fn small() -> Ends {
    let ends = Ends::start(15, 15);
    ends.source
        .psql(
            "app",
            "create table item (id int primary key, note text, amount int); \
             insert into item select i, 'row ' || i, i from generate_series(1, 100) i",
        )
        .unwrap();
    ends
}

fn source(ends: &Ends, sql: &str) {
    ends.source.psql("app", sql).unwrap();
}

fn target(ends: &Ends, sql: &str) {
    ends.target.psql("app", sql).unwrap();
}

/// Runs the command, wants exit code 1 and all of these in its standard error.
async fn fails(ends: &Ends, arguments: &[&str], texts: &[&str]) -> String {
    let ended = ends.walferry(arguments).await;
    assert_eq!(ended.code, Some(1), "{arguments:?}: {}\n{}", ended.out, ended.err);
    for text in texts {
        assert!(ended.err.contains(text), "no \"{text}\" in: {}", ended.err);
    }
    ended.err
}

/// Waits until the query gives `t` on the target.
async fn arrives(ends: &Ends, sql: &str) {
    let mut session = session(&ends.target, "app").await;
    session.execute("set search_path = public").await.unwrap();
    until_sql(&mut session, sql).await;
}

async fn same_rows(ends: &Ends) {
    let comparison = compare(&ends.source_uri(), &ends.target_uri()).await.unwrap();
    let differing = comparison.differences.iter().filter(|line| !line.starts_with("sequence "));
    assert_eq!(differing.collect::<Vec<_>>(), Vec::<&String>::new());
}

/// A run that follows; stopped by INT with exit code 0.
async fn following(ends: &Ends) -> Walferry {
    let mut run = ends.spawn(&["run"]);
    ends.until_phase(&mut run, "following").await;
    run
}

async fn stop(run: Walferry) {
    run.signal("INT");
    run.ended().await.expect_success();
}
