//! Routes: where clients find the data, and how they are led to the other side.
//!
//! A cutover holds clients where it can, stops writers, waits for the target, and then flips every
//! route. Each route has the same steps, and each step may be repeated, because walferry may
//! die between any two of them:
//!
//! ```text
//! check ──▶ hold ──▶ switch ──▶ release        check changes nothing
//!             │         │          │
//!             └────▶ undo ◀────────┘           back to before hold, from wherever we are
//! ```
//!
//! Between hold and switch a part of the latter may be done ahead ([`Route::ready`]).
//!
//! - **hook** runs a command of the user's with the phase in its environment: DNS, a load balancer,
//!   a secret store, an orchestrator. It cannot hold clients.
//! - **pgbouncer** holds clients with PAUSE, rewrites host, port and dbname of one line of
//!   pgbouncer.ini, has it read with RELOAD, and lets clients go with RESUME. They see a delay and
//!   no error. PAUSE waits for every open transaction while all other clients queue behind it, so
//!   one forgotten transaction would stop the application: [`Route::hold`] gives up after its wait
//!   and resumes.
//! - **citus** swaps placements in the metadata of a Citus cluster. It holds writers of the moving
//!   shards and no others (`citus` says how), and has the swap prepared in `switch`, committed in
//!   `release`.
//! - for a group of tables, the hook is told which, and an fdw server must lead to them alone
//!   (`foreign`).
//! - **fdw** and **plproxy** change a foreign server in a router's database by ALTER SERVER. They
//!   cannot hold clients, and let them through in `release`, not in `switch` (`sqlmed` says why).
//!   Clients of a plproxy partition may be made to read only meanwhile (`read_only`).
//!
//! What survives a crash: the line in pgbouncer.ini as it was, in a file beside it
//! (`pgbouncer.ini.walferry_<job>_<dbname>`, written before the first change, same owner, mode
//! 0600; undo and [`Route::forget`] remove it), so that undo and rollback restore it byte for byte,
//! host aliases included. A paused
//! pgbouncer stays paused until [`Route::release`] or [`Route::undo`]; a pgbouncer that restarts
//! forgets that it was paused.
//!
//! A foreign server's options as they were are in its comment, and change with it.
//!
//! Left out: several pgbouncers behind one address (give one route each), and rewriting what a
//! `%include` brings in (give the included file's path).

mod citus;
mod connstr;
mod file;
mod foreign;
mod hook;
mod ini;
mod mapping;
mod note;
mod pgbouncer;
mod place;
mod read_only;
mod sqlmed;

use std::path::PathBuf;
use std::time::Duration;

pub use citus::Citus;
pub use hook::Hook;
pub use pgbouncer::Pgbouncer;
pub use sqlmed::SqlMed;

use crate::fault::{Fault, Faulty};
use crate::id::{QualifiedName, Stream};
use crate::pg::{self, Config, Witness};
use crate::secret::{SecretString, holds_secret};

/// Result with this room's error.
pub type Result<T> = std::result::Result<T, Error>;

/// What [`Route::kind`] gives, for sentences.
pub const KINDS: &str = "hook, pgbouncer, fdw, plproxy or citus";

/// What a step of a route is about.
#[derive(Clone, Debug)]
pub struct Context {
    /// The job's name.
    pub job: crate::id::JobName,
    /// `Forward` is the cutover to the target, `Reverse` the rollback to the source.
    pub flip: Stream,
    /// Where rows come from in the forward direction.
    pub source: Config,
    /// Where they go.
    pub target: Config,
    /// What of the source moves, as the job was asked for: the same text as long as the job lives.
    pub scope: String,
    /// The tables that move, partitioned ones included; known for check and hold only, those of a
    /// group always.
    pub tables: Vec<QualifiedName>,
    /// They are a group, and others of the job stay where they are.
    pub is_group: bool,
    /// Clients that only read are led, ahead of the writes.
    pub reads: bool,
}

impl Context {
    /// The tables, if they are a group.
    pub fn group(&self) -> Option<&[QualifiedName]> {
        self.is_group.then_some(&*self.tables)
    }
}

/// One way by which clients find the data.
#[derive(Clone, Debug)]
pub enum Route {
    /// A command of the user's.
    Hook(Hook),
    /// A database of a pgbouncer.
    Pgbouncer(Box<Pgbouncer>),
    /// A foreign server in a router's database.
    SqlMed(Box<SqlMed>),
    /// The metadata of a Citus cluster.
    Citus(Box<Citus>),
}

/// Why a step was not done.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The text is not a route.
    #[error(
        "{0}; a route is hook:COMMAND, pgbouncer:ADMIN_URI,INI_PATH,DBNAME, fdw:URI,SERVER, \
         plproxy:URI,CLUSTER,PARTITION[,read-only] or citus:COORDINATOR_URI"
    )]
    Usage(String),
    /// Clients could not be held in time. They have been let go again.
    #[error(
        "database \"{dbname}\" of {peer} was still in use after {wait_ms} ms of PAUSE, so clients \
         were let go on: {reason}; end the longest transaction there, or try again with more time"
    )]
    Busy {
        /// The pooler.
        peer: String,
        /// Its database.
        dbname: String,
        /// How long was waited.
        wait_ms: u128,
        /// What PAUSE waits for in this pool mode.
        reason: &'static str,
    },
    /// Writers could not be held in time. They have been let go again.
    #[error("{peer}: writers to the moving shards are not held: {blockers}")]
    Held {
        /// Where.
        peer: String,
        /// Who is in the way.
        blockers: String,
    },
    /// The command failed, or took too long and was killed with all its children.
    #[error("hook \"{command}\" in phase {phase}: {outcome}{said}")]
    Hook {
        /// The command, cleaned of secrets.
        command: String,
        /// `check`, `hold`, `switch`, `release` or `undo`.
        phase: &'static str,
        /// Exit status or time-out.
        outcome: String,
        /// The end of its stderr, cleaned of secrets; empty or beginning with `: `.
        said: String,
    },
    /// pgbouncer.ini, or the copy beside it, cannot be used.
    #[error("{}: {detail}", path.display())]
    File {
        /// Which file.
        path: PathBuf,
        /// What is wrong, and what to do.
        detail: String,
    },
    /// A pooler or router is not set up so that this route can work.
    #[error("{peer}: {detail}")]
    Setup {
        /// The pooler or router.
        peer: String,
        /// What is wrong, and what to do.
        detail: String,
    },
    /// The admin console failed.
    #[error("pgbouncer, {doing}: {source}")]
    Console {
        /// The command.
        doing: String,
        /// How.
        source: pg::Error,
    },
    /// A router's database failed.
    #[error("{doing}: {source}")]
    Router {
        /// What was being done.
        doing: String,
        /// How.
        source: pg::Error,
    },
    /// The server that clients should be led to cannot be found.
    #[error("choosing the host that clients shall use: {0}")]
    Destination(pg::Error),
}

impl Faulty for Error {
    fn fault(&self) -> Fault {
        match self {
            Error::Busy { .. } | Error::Held { .. } => Fault::Retry,
            Error::Console { source, .. }
            | Error::Router { source, .. }
            | Error::Destination(source) => source.fault(),
            _ => Fault::Stop,
        }
    }
}

impl Route {
    /// Reads `hook:COMMAND`, `pgbouncer:ADMIN_URI,INI_PATH,DBNAME`, `fdw:URI,SERVER`,
    /// `plproxy:URI,CLUSTER,PARTITION` or `citus:COORDINATOR_URI`.
    pub fn parse(text: &str) -> Result<Route> {
        match text.split_once(':') {
            Some(("hook", command)) => Hook::parse(command).map(Route::Hook),
            Some(("pgbouncer", rest)) => {
                Pgbouncer::parse(rest).map(|p| Route::Pgbouncer(Box::new(p)))
            }
            Some(("fdw", rest)) => SqlMed::parse_fdw(rest).map(|s| Route::SqlMed(Box::new(s))),
            Some(("plproxy", rest)) => {
                SqlMed::parse_plproxy(rest).map(|s| Route::SqlMed(Box::new(s)))
            }
            Some(("citus", uri)) => Citus::parse(uri).map(|c| Route::Citus(Box::new(c))),
            _ => Err(Error::Usage("there is no such kind of route".to_string())),
        }
    }

    /// The route as it may be stored, and the password that was in it. A pgbouncer's file is made
    /// absolute, as another process will read it. Errors: not a route; a hook whose command holds a
    /// password.
    pub fn stored(text: &str) -> Result<(String, Option<SecretString>)> {
        Route::parse(text)?;
        match text.split_once(':') {
            Some(("pgbouncer", rest)) => Pgbouncer::stored(rest),
            Some((kind @ ("fdw" | "plproxy"), rest)) => SqlMed::stored(kind, rest),
            Some(("citus", uri)) => Citus::stored(uri),
            _ if holds_secret(text) => Err(Error::Usage(
                "the hook's command holds a password, and would be stored in the job's tables: \
                 have the command read it from a file or a variable"
                    .to_string(),
            )),
            _ => Ok((text.to_string(), None)),
        }
    }

    /// The same with a password for its console, instead of what PGPASSWORD or a password file say.
    pub fn with_password(mut self, password: SecretString) -> Route {
        match &mut self {
            Route::Hook(_) => {}
            Route::Pgbouncer(pooler) => pooler.set_password(password),
            Route::SqlMed(server) => server.set_password(password),
            Route::Citus(cluster) => cluster.set_password(password),
        }
        self
    }

    /// The same with somebody who is told of every statement it sends to a router's database.
    pub fn with_witness(mut self, witness: Witness) -> Route {
        match &mut self {
            Route::SqlMed(server) => server.set_witness(witness),
            Route::Citus(cluster) => cluster.set_witness(witness),
            Route::Hook(_) | Route::Pgbouncer(_) => {}
        }
        self
    }

    /// The password for its console, if one is known.
    pub fn password(&self) -> Option<SecretString> {
        match self {
            Route::Hook(_) => None,
            Route::Pgbouncer(pooler) => pooler.password(),
            Route::SqlMed(server) => server.password(),
            Route::Citus(cluster) => cluster.password(),
        }
    }

    /// `hook`, `pgbouncer`, `fdw`, `plproxy` or `citus`.
    pub fn kind(&self) -> &'static str {
        match self {
            Route::Hook(_) => "hook",
            Route::Pgbouncer(_) => "pgbouncer",
            Route::SqlMed(server) => server.kind(),
            Route::Citus(_) => "citus",
        }
    }

    /// What a person has to do where this route is not there to be asked: for clients to be led to
    /// where the flip goes (`switched`), or to where they were.
    pub fn by_hand(&self, context: &Context, switched: bool) -> String {
        match self {
            Route::Hook(hook) => hook.by_hand(context, switched),
            Route::Pgbouncer(pooler) => pooler.by_hand(context, switched),
            Route::SqlMed(server) => server.by_hand(context, switched),
            Route::Citus(cluster) => cluster.by_hand(context, switched),
        }
    }

    /// True if clients can be held here. Such routes switch before others: whoever asks them
    /// waits, and finds everything else switched when let go.
    pub fn holds(&self) -> bool {
        matches!(self, Route::Pgbouncer(_) | Route::Citus(_))
    }

    /// Reachable, allowed, and what is to be changed found. Changes nothing.
    pub async fn check(&self, context: &Context) -> Result<()> {
        match self {
            Route::Hook(hook) => hook.run("check", context, None).await,
            Route::Pgbouncer(pooler) => pooler.check(context).await,
            Route::SqlMed(server) => server.check(context).await,
            Route::Citus(cluster) => cluster.check(context).await,
        }
    }

    /// Makes clients wait before their next transaction. Where that is not complete within
    /// `wait` they are let go, and the error is [`Error::Busy`] or [`Error::Held`]: nobody waits
    /// longer than about `wait`. Not cancel-safe: after dropping the future, and after any other
    /// error, call [`Route::undo`].
    pub async fn hold(&self, context: &Context, wait: Duration) -> Result<()> {
        match self {
            Route::Hook(hook) => hook.run("hold", context, Some(wait)).await,
            Route::Pgbouncer(pooler) => pooler.hold(wait).await,
            Route::SqlMed(server) => server.hold(context, wait).await,
            Route::Citus(cluster) => cluster.hold(context, wait).await,
        }
    }

    /// True if [`Route::ready`] does something.
    pub fn gets_ready(&self) -> bool {
        matches!(self, Route::SqlMed(_) | Route::Citus(_))
    }

    /// What of the switch leads nobody anywhere, done while the other side catches up: foreign
    /// servers are armed, placements swapped in a transaction that is not prepared yet. Repeating
    /// it does no harm, nor does leaving it out: [`Route::switch`] does it then.
    pub async fn ready(&self, context: &Context) -> Result<()> {
        match self {
            Route::Hook(_) | Route::Pgbouncer(_) => Ok(()),
            Route::SqlMed(server) => server.arm(context).await,
            Route::Citus(cluster) => cluster.swap().await,
        }
    }

    /// Leads clients to where the flip goes; foreign servers and placements are only made ready for
    /// it. Repeating it does no harm.
    pub async fn switch(&self, context: &Context) -> Result<()> {
        match self {
            Route::Hook(hook) => hook.run("switch", context, None).await,
            Route::Pgbouncer(pooler) => pooler.switch(context).await,
            Route::SqlMed(server) => server.switch(context).await,
            Route::Citus(cluster) => cluster.switch().await,
        }
    }

    /// Lets clients go, to where they were switched to if they were. Repeating it does no harm.
    pub async fn release(&self, context: &Context) -> Result<()> {
        match self {
            Route::Hook(hook) => hook.run("release", context, None).await,
            Route::Pgbouncer(pooler) => pooler.release().await,
            Route::SqlMed(server) => server.release(context).await,
            Route::Citus(cluster) => cluster.release(context).await,
        }
    }

    /// Back to before [`Route::hold`], whatever was reached, also after a crash of ours: clients
    /// are led where they were, then let go. Repeating it does no harm.
    pub async fn undo(&self, context: &Context) -> Result<()> {
        match self {
            Route::Hook(hook) => hook.run("undo", context, None).await,
            Route::Pgbouncer(pooler) => pooler.undo(context).await,
            Route::SqlMed(server) => server.undo(context).await,
            Route::Citus(cluster) => cluster.undo(context).await,
        }
    }

    /// Removes what was kept for a way back. For when there is none any more: finished, or rolled
    /// back for good.
    pub async fn forget(&self, context: &Context) -> Result<()> {
        match self {
            Route::Hook(_) | Route::Citus(_) => Ok(()),
            Route::Pgbouncer(pooler) => pooler.forget(context),
            Route::SqlMed(server) => server.forget(context).await,
        }
    }
}

/// The route for people, without secrets.
impl std::fmt::Display for Route {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Route::Hook(hook) => write!(f, "{hook}"),
            Route::Pgbouncer(pooler) => write!(f, "{pooler}"),
            Route::SqlMed(server) => write!(f, "{server}"),
            Route::Citus(cluster) => write!(f, "{cluster}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_route_that_cannot_be_read_shows_the_form_and_no_secret() {
        for text in [
            "",
            "hook",
            "hook: ",
            "dns:x",
            "pgbouncer:postgres://u:hush@h/",
            "pgbouncer:postgres://u:hush@h/,pgbouncer.ini",
            "pgbouncer:postgres://u:hush@h/,,db",
            "pgbouncer:postgres://u:hush@h:x/,/p.ini,db",
            "pgbouncer:postgres://u:hu,sh@h/?bad=1,/p.ini,db",
            "fdw:postgres://u:hush@h/d",
            "fdw:postgres://u:hush@h:x/d,s",
            "plproxy:postgres://u:hush@h/d,c",
            "plproxy:postgres://u:hush@h/d,c,16",
            "plproxy:postgres://u:hush@h/d,c,read-only",
            "plproxy:postgres://u:hush@h/d,c,p16,readonly",
            "citus:",
            "citus:postgres://u:hush@h:x/d",
        ] {
            let said = Route::parse(text).map(|_| ()).unwrap_err().to_string();
            assert!(said.contains("pgbouncer:ADMIN_URI,INI_PATH,DBNAME"), "{text}: {said}");
            assert!(!said.contains("hush"), "{text}: {said}");
        }
    }

    #[test]
    fn every_kind_of_route_is_named_where_one_is_to_be_chosen() {
        let uri = "postgres://u@h/d";
        for text in [
            "hook:true".to_string(),
            format!("pgbouncer:{uri},/p.ini,shop"),
            format!("fdw:{uri},srv"),
            format!("plproxy:{uri},cluster,p16"),
            format!("citus:{uri}"),
        ] {
            let kind = Route::parse(&text).unwrap().kind();
            assert!(KINDS.split([',', ' ']).any(|word| word == kind), "{kind}");
        }
    }

    #[test]
    fn a_route_shown_to_people_has_no_password() {
        let route = Route::parse("pgbouncer:postgres://u:hush@h:6432/,/etc/p.ini,shop").unwrap();
        assert!(route.holds());
        assert_eq!(route.to_string(), "pgbouncer h:6432, /etc/p.ini, shop");
        let (stored, password) =
            Route::stored("pgbouncer:postgres://u:hu%2Csh@h:6432/?sslmode=require,p.ini,shop")
                .unwrap();
        assert!(!stored.contains("sh@") && stored.contains("/p.ini,shop"), "{stored}");
        assert_eq!(crate::secret::ExposeSecret::expose_secret(&password.unwrap()), "hu,sh");
        let shown = Route::parse(&stored).unwrap().to_string();
        assert!(shown.starts_with("pgbouncer h:6432, /"), "{shown}");
        for (given, tail) in [
            ("fdw:postgres://u:hush@h/d,srv", ",srv"),
            ("plproxy:postgres://u:hush@h/d,cluster,p16", ",cluster,p16"),
            ("plproxy:postgres://u:hush@h/d,cluster,p16,read-only", ",cluster,p16,read-only"),
            ("citus:postgres://u:hush@h:1,g:2/d", " user='u'"),
        ] {
            let (stored, password) = Route::stored(given).unwrap();
            assert!(password.is_some() && !stored.contains("hush"), "{stored}");
            assert!(stored.ends_with(tail) && Route::parse(&stored).is_ok(), "{stored}");
        }
        let said = Route::stored("hook:./flip.sh --password=hush").unwrap_err().to_string();
        assert!(said.contains("from a file or a variable") && !said.contains("hush"), "{said}");
        let route = Route::parse("hook:./flip.sh --password=hush postgres://u:hush@h/d").unwrap();
        assert!(!route.holds());
        assert!(!route.to_string().contains("hush"), "{route}");
        let route = Route::parse("fdw:postgres://u:hush@h:1/d,shard_7").unwrap();
        assert_eq!(route.to_string(), "fdw router h:1/d, shard_7");
        let route = Route::parse("plproxy:postgres://u:hush@h:1,g:2/d,shop,p16").unwrap();
        assert_eq!(route.to_string(), "plproxy router h:1/d, shop, p16");
        let route = Route::parse("citus:postgres://u:hush@h:1/d").unwrap();
        assert!(route.holds());
        assert_eq!(route.to_string(), "citus coordinator h:1/d");
    }
}
