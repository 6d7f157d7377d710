//! `walferry cutover`, and what it shares with rollback.

use std::process::ExitCode;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::watch;

use super::limits::LimitArgs;
use super::options::{JobArgs, learn};
use super::run::stop_on_signal;
use super::{print, reads};
use crate::config;
use crate::id::Stream;
use crate::job::ask::Asker;
use crate::job::groups::Part;
use crate::job::rest::{Refresh, Unlogged};
use crate::job::state::may_flip;
use crate::job::store::JobRow;
use crate::job::{self, FlipRequest, JobConfig, Phase};

/// How long arming, refreshing materialized views and looking for changed large objects may take
/// before writers are held. Whoever goes away meanwhile has asked for nothing.
const PREPARATION: Duration = Duration::from_secs(3600);

/// Options of cutover and rollback.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct FlipArgs {
    /// Lead only those who read, by routes of their own, ahead of the writes: nobody is fenced, and
    /// writes stay where they are. They are led back by rollback with the same option
    #[arg(long, conflicts_with_all =
        ["fence", "route", "no_route", "max_hold", "refresh", "unlogged", "leave_quarantined"])]
    pub reads: bool,
    /// Where those who read find the data, as --route says it; may be given again
    #[arg(long, value_name = "KIND:...", requires = "reads")]
    pub read_route: Vec<String>,
    /// Switch these tables alone (schema.table, * and ? as wildcards; a partitioned table stands
    /// for its partitions), and leave all others where they are; may be given again
    #[arg(long, value_name = "PATTERN", conflicts_with = "reads")]
    pub tables: Vec<String>,
    /// Switch all tables that are left, one after the other in so many groups
    #[arg(long, value_name = "N", conflicts_with_all = ["reads", "tables"],
        value_parser = clap::value_parser!(u32).range(1..))]
    pub groups: Option<u32>,
    /// What stops writers: lock, read-only or none [default: lock]
    #[arg(long, value_name = "KIND")]
    pub fence: Option<String>,
    /// Where clients find the data: hook:COMMAND, pgbouncer:ADMIN_URI,INI_PATH,DBNAME,
    /// fdw:URI,SERVER, plproxy:URI,CLUSTER,PARTITION[,read-only] (URI of the router's database) or
    /// citus:COORDINATOR_URI; may be given again [default: those of the last switch]
    #[arg(long, value_name = "KIND:...")]
    pub route: Vec<String>,
    /// Lead no clients: neither by the routes of the last switch nor by those of walferry.toml
    #[arg(long, conflicts_with = "route")]
    pub no_route: bool,
    /// How long it may take.
    #[command(flatten)]
    pub limits: LimitArgs,
    /// When materialized views are refreshed on the side to come: before (writers are held), after
    /// (once clients are there, beside their work) or never [default: before; of rollback: after]
    #[arg(long, value_name = "WHEN", value_parser = str::parse::<Refresh>)]
    pub refresh: Option<Refresh>,
    /// Rows of unlogged tables: copy (again, while writers are held), leave (as they were copied
    /// at first), or refuse to switch while there are any [default: copy]
    #[arg(long, value_name = "WHAT", value_parser = str::parse::<Unlogged>)]
    pub unlogged: Option<Unlogged>,
    /// Switch though changes are kept aside: they stay behind, and are not on the other side
    #[arg(long)]
    pub leave_quarantined: bool,
    /// Prove the way there and back, and change nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Print the result as JSON
    #[arg(long)]
    pub json: bool,
}

/// Options of the command.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    job: JobArgs,
    #[command(flatten)]
    flip: FlipArgs,
}

/// Switches applications to the target. 0 switched, 1 not.
pub async fn run(args: Args) -> anyhow::Result<ExitCode> {
    flip(Stream::Forward, &args.job, &args.flip).await
}

/// Cutover and rollback alike.
pub async fn flip(stream: Stream, job: &JobArgs, args: &FlipArgs) -> anyhow::Result<ExitCode> {
    if args.reads {
        return reads::lead(stream, job, args).await;
    }
    let config = job.job()?;
    let mut request = request(stream, job, args, &config)?;
    let fits = |row: &JobRow| may_flip(row.phase, stream).map_err(job::Error::from);
    let mut asker = Asker::connect_if(&config, print::sayings(), fits).await?;
    choose_routes(&mut request, args, &asker)?;
    tell_passwords(&mut request, args, &mut asker).await?;
    let (stop, mut stopping) = watch::channel(false);
    tokio::spawn(stop_on_signal(stop));
    let routeless = request.routes.is_empty();
    let answer = match args.groups {
        Some(groups) => ask_groups(groups, args, &request, &mut asker, &mut stopping).await,
        None => ask(&request, &mut asker, &mut stopping).await,
    };
    let own = asker.is_own();
    let closed = asker.close().await;
    let outcome = answer?;
    if args.json {
        print::json(&outcome)?;
    } else {
        show(stream, args.dry_run, config.is_one_way(), &outcome);
        if routeless && !args.dry_run {
            let (to, from) = ends_of(stream);
            eprintln!(
                "no route was given: point applications to the {to} now; the {from} takes no more \
                 writes"
            );
        }
        if own && !args.dry_run {
            eprintln!(
                "no runner was alive, so this command drove the job and has ended; start `walferry \
                 run` again to keep the other side current"
            );
        }
    }
    closed?;
    if outcome.pointer("/released") == Some(&Value::Bool(false)) {
        let why = print::text(&outcome, "/unreleased");
        eprintln!(
            "walferry: switched, but clients are not let through on every route: {why}. \
             `walferry run` tries again every few seconds; its --skip-route leaves out one that is \
             gone"
        );
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}

/// Has the runner make one flip.
async fn ask(
    request: &FlipRequest,
    asker: &mut Asker,
    stopping: &mut watch::Receiver<bool>,
) -> anyhow::Result<Value> {
    let wait = request.limits.together().saturating_add(PREPARATION);
    let request = serde_json::to_value(request)?;
    let answer = tokio::select! {
        answer = asker.ask("flip", &request, wait) => answer.map_err(anyhow::Error::from),
        _ = stopping.wait_for(|stop| *stop) => Err(anyhow::anyhow!(STOPPED)),
    };
    match answer {
        Err(error) if *stopping.borrow() => Err(match (asker.is_own(), asker.withdraw().await) {
            (true, _) => error,
            (false, true) => anyhow::anyhow!("stopped; the runner had not begun it"),
            (false, false) => anyhow::anyhow!(NOT_WAITING),
        }),
        answer => answer,
    }
}

/// The same for one group after the other; gives the last one's outcome, with those of all. Groups
/// before one that cannot be switched stay switched.
async fn ask_groups(
    groups: u32,
    args: &FlipArgs,
    request: &FlipRequest,
    asker: &mut Asker,
    stopping: &mut watch::Receiver<bool>,
) -> anyhow::Result<Value> {
    let groups = groups as usize;
    let (mut outcomes, mut last) = (Vec::new(), Value::Null);
    for number in 1..=groups {
        let request = FlipRequest {
            attempt: format!("{:016x}", fastrand::u64(..)),
            part: Part::Share(number, groups),
            letter: letter(asker, &request.routes).await?,
            ..request.clone()
        };
        last = ask(&request, asker, stopping).await.map_err(|error| match number {
            1 => error,
            _ => error.context(format!("group {number} of {groups}; those before it are switched")),
        })?;
        let of = |key: &str| last.get(key).cloned().unwrap_or_default();
        let outcome = json!({ "group": number, "fenced_ms": of("fenced_ms"),
            "switched_lsn": of("switched_lsn"), "retries": of("retries"),
            "tables": of("tables"), "phase": of("phase") });
        if !args.json {
            let held = print::number(&outcome, "/fenced_ms");
            let tables = print::number(&outcome, "/tables");
            println!("{number:>6} of {groups}  {tables:>6} tables  {held:>8.1} ms");
        }
        let is_last = of("phase") != json!("split");
        outcomes.push(outcome);
        if is_last || args.dry_run {
            break;
        }
    }
    if let Some(object) = last.as_object_mut() {
        object.insert("groups".to_string(), Value::Array(outcomes));
    }
    Ok(last)
}

/// What a person who gives up is told.
const STOPPED: &str = "stopped; walferry status tells where the job stands";
const NOT_WAITING: &str =
    "no longer waiting: the runner goes on with it; walferry status tells how far";

/// Gives the routes' passwords to a runner elsewhere, and says which of them nobody else will have.
async fn tell_passwords(
    request: &mut FlipRequest,
    args: &FlipArgs,
    asker: &mut Asker,
) -> anyhow::Result<()> {
    let secrets = asker.config().secrets.clone();
    let given = !args.route.is_empty();
    for route in secrets.known_here_only(&request.routes).iter().filter(|_| given) {
        eprintln!(
            "the password of {route} is not stored: should this switch be cut short, \
             `walferry run` can undo it with a line in ~/.pgpass, WALFERRY_ROUTE_PASSWORD, or this \
             --route again"
        );
    }
    request.letter = letter(asker, &request.routes).await?;
    Ok(())
}

/// The routes' passwords for a runner elsewhere, readable by it alone.
pub async fn letter(asker: &mut Asker, routes: &[String]) -> anyhow::Result<Option<String>> {
    let secrets = asker.config().secrets.clone();
    if asker.is_own() || !secrets.any(routes)? {
        return Ok(None);
    }
    let letters = asker.ask("letter_box", &Value::Null, LETTER_WAIT).await?;
    Ok(secrets.letter(routes, print::text(&letters, "/address"))?)
}

/// A runner that is alive answers at its next turn.
const LETTER_WAIT: Duration = Duration::from_secs(60);

/// Clients that were led over by a route are led back by it, unless others are given.
fn choose_routes(
    request: &mut FlipRequest,
    args: &FlipArgs,
    asker: &Asker,
) -> Result<(), config::Error> {
    let flipped = matches!(asker.row.phase, Phase::Switched | Phase::RolledBack);
    if let Some(last) = asker.row.flip.as_ref().filter(|_| flipped)
        && request.routes.is_empty()
        && !args.no_route
    {
        request.routes = last.waiting();
        for route in asker.config().secrets.routes(&request.routes).iter().flatten() {
            eprintln!("by the route of the last switch: {route} (--no-route: by none)");
        }
    }
    if request.fence == "none" && request.routes.is_empty() {
        let message = "with none, only a route stops writers: add --route, or use --fence lock";
        return Err(config::Error::Value { option: "--fence", message: message.to_string() });
    }
    Ok(())
}

fn request(
    stream: Stream,
    job: &JobArgs,
    args: &FlipArgs,
    config: &JobConfig,
) -> anyhow::Result<FlipRequest> {
    let file = job.file()?.cutover;
    let limits = args.limits.limits(&file)?;
    let given = match (args.route.as_slice(), args.no_route) {
        ([], true) => Vec::new(),
        ([], false) => file.route,
        (given, _) => given.to_vec(),
    };
    let routes = learn(&config.secrets, "--route", &given)?;
    let value = |option, e: String| config::Error::Value { option, message: e };
    let fence = args.fence.clone().or(file.fence).unwrap_or_else(|| "lock".to_string());
    fence.parse::<crate::cutover::FenceKind>().map_err(|e| value("--fence", e.to_string()))?;
    let refresh = match (args.refresh, file.refresh) {
        (Some(own), _) => own,
        (None, Some(text)) => text.parse().map_err(|e| value("--refresh", e))?,
        // Whoever goes back is in a hurry, and finds views there that were in use.
        (None, None) if stream == Stream::Reverse => Refresh::After,
        (None, None) => Refresh::Before,
    };
    let unlogged = match (args.unlogged, file.unlogged) {
        (Some(own), _) => own,
        (None, Some(text)) => text.parse().map_err(|e| value("--unlogged", e))?,
        (None, None) => Unlogged::default(),
    };
    Ok(FlipRequest {
        flip: stream.to_string(),
        attempt: format!("{:016x}", fastrand::u64(..)),
        fence,
        routes,
        letter: None,
        limits,
        refresh,
        unlogged,
        leave_quarantined: args.leave_quarantined,
        dry_run: args.dry_run,
        // Asked for each time, not once and for all by the file.
        one_way: job.one_way,
        part: match args.tables.is_empty() {
            true => Part::All,
            false => Part::Tables(args.tables.clone()),
        },
        group: None,
        mark: None,
    })
}

/// Where a flip leads to, and from.
fn ends_of(stream: Stream) -> (&'static str, &'static str) {
    match stream {
        Stream::Forward => ("target", "source"),
        Stream::Reverse => ("source", "target"),
    }
}

fn show(stream: Stream, dry_run: bool, one_way: bool, outcome: &Value) {
    print::steps(outcome);
    let left = print::list(outcome, "/not_carried");
    if !left.is_empty() {
        println!("not carried by this:");
    }
    for finding in left {
        println!("    {}: {}", print::text(finding, "/object"), print::text(finding, "/message"));
        for line in print::text(finding, "/fix").lines() {
            println!("        {line}");
        }
    }
    let (side, _) = ends_of(stream);
    if dry_run && one_way {
        println!("ready, and there will be no way back; nothing was changed");
        return;
    }
    if dry_run {
        println!("ready: the way there and back is proven; nothing was changed");
        return;
    }
    println!(
        "switched to the {side} at {}; writers were held for {:.1} ms",
        print::text(outcome, "/switched_lsn"),
        print::number(outcome, "/fenced_ms")
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cutover::Limits;

    #[test]
    fn max_hold_and_no_owner_may_stand_in_the_file_and_options_come_first() {
        let path = std::env::temp_dir().join(format!("walferry-flip-{}.toml", std::process::id()));
        let text = "source = \"postgres://a/a\"\ntarget = \"postgres://b/b\"\nno-owner = true\n\
                    [cutover]\nmax-hold = \"7s\"\n";
        std::fs::write(&path, text).unwrap();
        let job = JobArgs { config: Some(path.clone()), ..JobArgs::default() };
        let mut flip = FlipArgs::default();
        let config = job.job().unwrap();
        let asked = request(Stream::Forward, &job, &flip, &config).unwrap();
        let limits = Limits { max_hold: Duration::from_secs(7), ..Limits::default() };
        assert_eq!(asked.limits, limits);
        flip.limits.max_hold = Some(Duration::from_secs(2));
        let asked = request(Stream::Forward, &job, &flip, &config).unwrap();
        assert_eq!(asked.limits.max_hold, Duration::from_secs(2));
        assert!(!config.owners);
        std::fs::remove_file(&path).unwrap();
    }
}
