//! `walferry cutover --reads` and `walferry rollback --reads`.

use std::process::ExitCode;
use std::time::Duration;

use serde_json::Value;

use super::cutover::{FlipArgs, letter};
use super::options::{JobArgs, learn};
use super::print;
use crate::config;
use crate::id::Stream;
use crate::job::ask::Asker;
use crate::job::reads::ReadRequest;
use crate::job::store::JobRow;

/// How long the runner may be at something else, and the routes take, beside the times given.
const SLACK: Duration = Duration::from_secs(120);

/// Leads readers to the target or back. 0 done, 1 not.
pub async fn lead(stream: Stream, job: &JobArgs, args: &FlipArgs) -> anyhow::Result<ExitCode> {
    let config = job.job()?;
    let file = job.file()?.cutover;
    let there = stream == Stream::Forward;
    let given = match args.read_route.as_slice() {
        [] if there => file.read_route.clone(),
        given => given.to_vec(),
    };
    let mut request = ReadRequest {
        there,
        attempt: format!("{:016x}", fastrand::u64(..)),
        routes: learn(&config.secrets, "--read-route", &given)?,
        letter: None,
        limits: args.limits.limits(&file)?,
        dry_run: args.dry_run,
    };
    if there && request.routes.is_empty() {
        let message = "readers need a route of their own: add --read-route KIND:...".to_string();
        return Err(config::Error::Value { option: "--reads", message }.into());
    }
    let known = |_: &JobRow| Ok(());
    let mut asker = Asker::connect_if(&config, print::sayings(), known).await?;
    let routes = match (there, &asker.row.reads) {
        (false, Some(reads)) => reads.routes.clone(),
        _ => request.routes.clone(),
    };
    request.letter = letter(&mut asker, &routes).await?;
    let wait = [request.limits.timeout, request.limits.max_lag, SLACK];
    let wait = wait.into_iter().fold(Duration::ZERO, Duration::saturating_add);
    let answer = asker.ask("reads", &serde_json::to_value(&request)?, wait).await;
    let own = asker.is_own();
    let closed = asker.close().await;
    let outcome = answer?;
    if args.json {
        print::json(&outcome)?;
    } else {
        show(args.dry_run, &outcome);
    }
    if own && there && !args.dry_run {
        eprintln!(
            "no runner was alive, so this command drove the job and has ended: start \
             `walferry run` at once, as readers on the target see what it applies"
        );
    }
    closed?;
    Ok(ExitCode::SUCCESS)
}

fn show(dry_run: bool, outcome: &Value) {
    for route in print::list(outcome, "/routes") {
        println!("    {}", route.as_str().unwrap_or_default());
    }
    if dry_run {
        println!("ready: the routes can be led, and the other side is near enough");
        return;
    }
    println!(
        "readers are on the {}; they waited for {:.1} ms",
        print::text(outcome, "/reads"),
        print::number(outcome, "/held_ms")
    );
}
