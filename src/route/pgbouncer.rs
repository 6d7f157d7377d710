//! A database of a pgbouncer: PAUSE, rewrite, RELOAD, RESUME.
//!
//! <https://www.pgbouncer.org/usage.html#process-controlling-commands>

use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::file::{File, Replaced};
use super::ini::{self, Words};
use super::place::{Place, Side};
use super::{Context, Error, Result};
use crate::clock::Deadline;
use crate::id::{Stream, quote_ident};
use crate::limit::CONSOLE_WAIT;
use crate::pg::{self, Config, Purpose, Session};
use crate::secret::SecretString;

/// One database of one pgbouncer, its admin console, and the file that says where it leads.
#[derive(Clone, Debug)]
pub struct Pgbouncer {
    admin: Config,
    ini: PathBuf,
    dbname: String,
    /// Consoles between two steps: opening one while clients wait would take longer than the step.
    idle: Arc<Mutex<Vec<Session>>>,
}

/// How many server connections a database may have; 0 is no limit.
const LIMIT: &str = "max_db_connections";

/// Between two looks at the console; it answers in a tenth of that.
const POLL: Duration = Duration::from_millis(1);

/// A login that takes longer than this is not waited for: its server is in trouble anyway.
const LOGIN_WAIT: Duration = Duration::from_secs(1);

/// What the running pgbouncer says of the database.
struct Running {
    leads_to: (String, String, String),
    paused: bool,
    pool_mode: Option<String>,
}

impl Pgbouncer {
    /// Reads `ADMIN_URI,INI_PATH,DBNAME`; the URI's database is always `pgbouncer`.
    pub(super) fn parse(text: &str) -> Result<Pgbouncer> {
        let usage = |what: &str| Error::Usage(what.to_string());
        let mut parts = text.rsplitn(3, ',');
        let (dbname, ini, admin) = (parts.next(), parts.next(), parts.next());
        let (Some(dbname), Some(ini), Some(admin)) = (dbname, ini, admin) else {
            return Err(usage("pgbouncer needs three parts joined by commas"));
        };
        if dbname.trim().is_empty() || ini.trim().is_empty() {
            return Err(usage("pgbouncer's INI_PATH and DBNAME must not be empty"));
        }
        let admin = Config::parse(admin).map_err(|e| usage(&e.to_string()))?;
        let admin = admin.with_dbname("pgbouncer").labelled("pgbouncer");
        let (ini, dbname) = (PathBuf::from(ini.trim()), dbname.trim().to_string());
        Ok(Pgbouncer { admin, ini, dbname, idle: Arc::default() })
    }

    /// `ADMIN_URI,INI_PATH,DBNAME` without the password, and that.
    pub(super) fn stored(text: &str) -> Result<(String, Option<SecretString>)> {
        let pooler = Pgbouncer::parse(text)?;
        let admin = text.rsplitn(3, ',').nth(2).unwrap_or_default();
        let (admin, password) =
            Config::split_password(admin).map_err(|e| Error::Usage(e.to_string()))?;
        let ini = std::path::absolute(&pooler.ini).unwrap_or_else(|_| pooler.ini.clone());
        Ok((format!("pgbouncer:{admin},{},{}", ini.display(), pooler.dbname), password))
    }

    pub(super) fn set_password(&mut self, password: SecretString) {
        self.admin.password = Some(password);
    }

    pub(super) fn password(&self) -> Option<SecretString> {
        let host = self.admin.hosts.first()?;
        self.admin.password_for(host).cloned()
    }

    pub(super) fn by_hand(&self, context: &Context, switched: bool) -> String {
        let target = (context.flip == Stream::Forward) == switched;
        let side = if target { &context.target } else { &context.source };
        let (hosts, ports): (Vec<&str>, Vec<String>) =
            side.hosts.iter().map(|h| (h.host.as_str(), h.port.to_string())).unzip();
        let (name, ini) = (&self.dbname, self.ini.display());
        let mut text = format!(
            "in {ini} (section [databases], line \"{name}\") have host={} port={} dbname={}, as \
             clients must find the {} there; then RELOAD and RESUME {name} on its console, or \
             restart it",
            hosts.join("|"),
            ports.join("|"),
            side.dbname,
            if target { "target" } else { "source" },
        );
        let kept = self.keep_file(context).path;
        if !target && kept.exists() {
            text.push_str(&format!("; the whole line as it was is in {}", kept.display()));
        }
        text
    }

    /// A console that an earlier step has left, if that is still there, or a new one.
    async fn console(&self) -> Result<Session> {
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        if let Some(mut console) = idle
            && console.query("SHOW VERSION").await.is_ok()
        {
            return Ok(console);
        }
        self.open_console().await
    }

    /// Keeps it for the next step.
    fn keep(&self, console: Session) {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(console);
    }

    async fn open_console(&self) -> Result<Session> {
        let session = Session::connect(&self.admin, Purpose::PoolerAdmin).await;
        let session = session.map(|session| session.with_patience(CONSOLE_WAIT));
        session.map_err(|source| {
            let refused = matches!(source, pg::Error::Connect { transient: false, .. });
            let doing = match refused && self.password().is_none() {
                true => {
                    "opening its console without a password (WALFERRY_ROUTE_PASSWORD may give it)"
                }
                false => "opening its console",
            };
            Error::Console { doing: doing.to_string(), source }
        })
    }

    async fn command(&self, console: &mut Session, command: &str) -> Result<()> {
        tracing::debug!(pooler = console.peer(), command, "pgbouncer console");
        let done = console.execute(command).await;
        done.map(|_| ()).map_err(|source| Error::Console { doing: command.to_string(), source })
    }

    fn on_database(&self, command: &str) -> String {
        format!("{command} {}", quote_ident(&self.dbname))
    }

    fn setup(&self, detail: impl Into<String>) -> Error {
        let hosts = self.admin.hosts.first().map(|h| self.admin.peer(h)).unwrap_or_default();
        Error::Setup { peer: hosts, detail: detail.into() }
    }

    async fn running(&self, console: &mut Session) -> Result<Running> {
        let rows = self.show(console, "SHOW DATABASES").await?;
        let get = |row: &Vec<(String, String)>, key: &str| {
            row.iter().find(|(name, _)| name == key).map(|(_, value)| value.clone())
        };
        let row = rows.iter().find(|row| get(row, "name").as_deref() == Some(&self.dbname));
        let Some(row) = row else {
            return Err(self.setup(format!(
                "it has no database \"{}\"; name one that SHOW DATABASES lists",
                self.dbname
            )));
        };
        let text = |key: &str| get(row, key).unwrap_or_default();
        Ok(Running {
            leads_to: (text("host"), text("port"), text("database")),
            paused: text("paused") == "1",
            pool_mode: get(row, "pool_mode").filter(|mode| !mode.is_empty()),
        })
    }

    /// A SHOW's rows as pairs of column and value; NULL is the empty text.
    async fn show(&self, console: &mut Session, what: &str) -> Result<Vec<Vec<(String, String)>>> {
        let answer = console.query_with_columns(what).await;
        let (columns, rows) =
            answer.map_err(|source| Error::Console { doing: what.to_string(), source })?;
        let pairs = |row: &pg::Row| {
            let value = |index| row.opt(index).ok().flatten().unwrap_or_default().to_string();
            columns.iter().enumerate().map(|(i, name)| (name.clone(), value(i))).collect()
        };
        Ok(rows.iter().map(pairs).collect())
    }

    async fn setting(&self, console: &mut Session, key: &str) -> Result<String> {
        let rows = self.show(console, "SHOW CONFIG").await?;
        let holds = |row: &&Vec<(String, String)>| row.iter().any(|(c, v)| c == "key" && v == key);
        let value = rows.iter().find(holds).and_then(|row| row.iter().find(|(c, _)| c == "value"));
        Ok(value.map(|(_, value)| value.clone()).unwrap_or_default())
    }

    /// The console answers, its user may PAUSE, the file's line is what pgbouncer runs with, and
    /// the file can be replaced.
    pub(super) async fn check(&self, context: &Context) -> Result<()> {
        let mut console = self.console().await?;
        self.may_pause(&mut console).await?;
        let running = self.running(&mut console).await?;
        let file = File::read(&self.ini, &self.dbname)?;
        let in_file = file.words()?.resolved(&self.dbname);
        if in_file != running.leads_to {
            return Err(self.setup(format!(
                "it runs with \"{}\" leading to {} and {} says {}; RELOAD it, or give the path of \
                 the file that it reads",
                self.dbname,
                shown(&running.leads_to),
                self.ini.display(),
                shown(&in_file)
            )));
        }
        if running.paused {
            return Err(
                self.setup(format!("database \"{0}\" is paused; RESUME {0} first", self.dbname))
            );
        }
        file.lead_to(&self.words_of(context, Side::destination(context)).await?)?;
        file.replaceable()?;
        // One for whoever says PAUSE, one to RESUME with.
        self.keep(console);
        self.keep(self.open_console().await?);
        Ok(())
    }

    async fn may_pause(&self, console: &mut Session) -> Result<()> {
        let admins = self.setting(console, "admin_users").await?;
        let listed = admins.split(',').any(|user| user.trim() == self.admin.user);
        let any = self.setting(console, "auth_type").await? == "any";
        // Over its Unix socket pgbouncer lets its own system user in under this name.
        if listed || any || self.admin.user == "pgbouncer" {
            return Ok(());
        }
        Err(self.setup(format!(
            "user \"{}\" may not PAUSE; add it to admin_users in {}",
            self.admin.user,
            self.ini.display()
        )))
    }

    /// PAUSE; not complete within `wait`, RESUME and Busy.
    pub(super) async fn hold(&self, wait: Duration) -> Result<()> {
        let deadline = Deadline::after(wait);
        let mut console = self.console().await?;
        console.set_patience(CONSOLE_WAIT + wait);
        // The console that said PAUSE hears nothing else until it is complete. The one that will
        // RESUME is open before, so that it cannot be refused when it matters.
        let mut rescue = self.console().await?;
        let limit = self.limit(&mut rescue).await?;
        let outcome = self.pause(&mut console, deadline).await;
        if let Ok(true) = outcome {
            self.set(&mut rescue, LIMIT, &limit).await?;
            self.keep(rescue);
            return Ok(());
        }
        // Clients first, everything else after.
        let resumed = self.resume(&mut rescue).await;
        self.set(&mut rescue, LIMIT, &limit).await?;
        resumed?;
        outcome?;
        Err(self.busy(wait, &mut rescue).await)
    }

    /// PAUSE; false if it was not complete by the deadline.
    async fn pause(&self, console: &mut Session, deadline: Deadline) -> Result<bool> {
        if !self.no_logins(console, deadline).await? {
            return Ok(false);
        }
        let pause = self.on_database("PAUSE");
        let pausing = self.command(console, &pause);
        match tokio::time::timeout(deadline.left(), pausing).await {
            Ok(done) => done.map(|()| true),
            Err(_) => Ok(false),
        }
    }

    /// Lets no new server connection begin (until [`LIMIT`] is set again) and waits for those that
    /// are logging in; false if some still are at the deadline.
    ///
    /// PAUSE and RELOAD hang up on connections that are just logging in, and pgbouncer takes that
    /// for a server that refuses logins: for server_login_retry (15 s) it then makes no connection
    /// and turns clients away with "server login has been failing" (seen with 1.18).
    async fn no_logins(&self, console: &mut Session, deadline: Deadline) -> Result<bool> {
        self.set(console, LIMIT, "1").await?;
        while self.count(console, "sv_login").await? > 0 {
            if deadline.passed() {
                return Ok(false);
            }
            tokio::time::sleep(POLL).await;
        }
        Ok(true)
    }

    /// What [`LIMIT`] is set to; if that is what we set it to, and may have left after a crash,
    /// what the file says.
    async fn limit(&self, console: &mut Session) -> Result<String> {
        let now = self.setting(console, LIMIT).await?;
        if now != "1" {
            return Ok(now);
        }
        let text = std::fs::read(&self.ini);
        let in_file = text.ok().and_then(|text| ini::setting(&text, LIMIT));
        Ok(in_file.unwrap_or_else(|| "0".to_string()))
    }

    async fn busy(&self, wait: Duration, console: &mut Session) -> Error {
        let mode = match self.running(console).await.ok().and_then(|r| r.pool_mode) {
            Some(mode) => mode,
            None => self.setting(console, "pool_mode").await.unwrap_or_default(),
        };
        let reason = match mode.as_str() {
            "session" => "in pool_mode=session PAUSE waits until clients disconnect",
            _ => "PAUSE waits for open transactions",
        };
        Error::Busy {
            peer: console.peer().to_string(),
            dbname: self.dbname.clone(),
            wait_ms: wait.as_millis(),
            reason,
        }
    }

    async fn set(&self, console: &mut Session, key: &str, value: &str) -> Result<()> {
        self.command(console, &format!("SET {key} = '{value}'")).await
    }

    /// A column of SHOW POOLS, summed over the database's pools.
    async fn count(&self, console: &mut Session, column: &str) -> Result<u64> {
        let rows = self.show(console, "SHOW POOLS").await?;
        let get = |row: &Vec<(String, String)>, key: &str| {
            row.iter().find(|(name, _)| name == key).map(|(_, value)| value.clone())
        };
        let ours = rows.iter().filter(|row| get(row, "database").as_deref() == Some(&self.dbname));
        Ok(ours.filter_map(|row| get(row, column)?.parse::<u64>().ok()).sum())
    }

    /// RESUME; that nothing was paused is fine.
    async fn resume(&self, console: &mut Session) -> Result<()> {
        let resumed = self.command(console, &self.on_database("RESUME")).await;
        match resumed {
            Ok(()) => Ok(()),
            Err(error) => match self.running(console).await {
                Ok(running) if !running.paused => Ok(()),
                _ => Err(error),
            },
        }
    }

    pub(super) async fn switch(&self, context: &Context) -> Result<()> {
        let mut console = self.console().await?;
        let to = self.words_of(context, Side::destination(context)).await?;
        let file = File::read(&self.ini, &self.dbname)?;
        let line = match (Side::destination(context), self.kept(context)?) {
            (Side::Source, Some(kept)) => self.restored(&file, &kept, context).await?,
            _ => file.lead_to(&to)?,
        };
        if line != file.line()? {
            if Side::destination(context) == Side::Target {
                let kept = format!("{}\n", file.line()?);
                self.keep_file(context).write(kept.as_bytes(), 0o600)?;
            }
            file.with_line(&line)?;
        }
        self.reload(&mut console, &line).await?;
        self.keep(console);
        Ok(())
    }

    /// Has the file read, and believes it only when seen. RELOAD closes every connection to the
    /// old place, one in use at the end of its transaction. No RECONNECT after it: that would
    /// only hit the connections that are already being made to the new place.
    async fn reload(&self, console: &mut Session, line: &str) -> Result<()> {
        let wanted = ini::words(line).map(|words| words.resolved(&self.dbname));
        if wanted.as_ref() == Some(&self.running(console).await?.leads_to) {
            return Ok(());
        }
        let limit = self.limit(console).await?;
        self.no_logins(console, Deadline::after(LOGIN_WAIT)).await?;
        let reloaded = self.command(console, "RELOAD").await;
        self.set(console, LIMIT, &limit).await?;
        reloaded?;
        let running = self.running(console).await?;
        if wanted.as_ref() == Some(&running.leads_to) {
            return Ok(());
        }
        Err(self.setup(format!(
            "after RELOAD \"{}\" still leads to {}; is {} the file that it reads?",
            self.dbname,
            shown(&running.leads_to),
            self.ini.display()
        )))
    }

    pub(super) async fn release(&self) -> Result<()> {
        let mut console = self.console().await?;
        self.resume(&mut console).await
    }

    pub(super) async fn undo(&self, context: &Context) -> Result<()> {
        let file = File::read(&self.ini, &self.dbname)?;
        let line = match (context.flip, self.kept(context)?) {
            (Stream::Forward, Some(kept)) => self.restored(&file, &kept, context).await?,
            // The line is kept before it is changed: not kept, not changed.
            (Stream::Forward, None) => file.line()?.to_string(),
            (Stream::Reverse, _) => file.lead_to(&self.words_of(context, Side::Target).await?)?,
        };
        if line != file.line()? {
            file.with_line(&line)?;
        }
        // Clients are let go only after pgbouncer leads them back: better waiting than writing to
        // the side that this flip abandons.
        let mut console = self.console().await?;
        self.reload(&mut console, &line).await?;
        self.resume(&mut console).await?;
        // A crash within hold left the limit that hold sets.
        let limit = self.limit(&mut console).await?;
        self.set(&mut console, LIMIT, &limit).await?;
        if context.flip == Stream::Forward {
            self.forget(context)?;
        }
        Ok(())
    }

    pub(super) fn forget(&self, context: &Context) -> Result<()> {
        let path = self.keep_file(context).path;
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::File { path, detail: format!("cannot be removed: {error}") })
            }
            _ => Ok(()),
        }
    }

    /// The source's line as kept if the line is still the one we wrote, else its three words in
    /// what somebody has made of the line since.
    async fn restored(&self, file: &File, kept: &str, context: &Context) -> Result<String> {
        let target = self.words_of(context, Side::Target).await?;
        if ini::lead_to(kept, &self.dbname, &target).as_deref() == Some(file.line()?) {
            return Ok(kept.to_string());
        }
        let words = ini::words(kept);
        file.lead_to(&words.ok_or_else(|| {
            let path = self.keep_file(context).path;
            Error::File { path, detail: "is damaged; put the line right by hand".to_string() }
        })?)
    }

    fn kept(&self, context: &Context) -> Result<Option<String>> {
        let path = self.keep_file(context).path;
        match std::fs::read_to_string(&path) {
            Ok(text) => Ok(Some(text.trim_end_matches('\n').to_string())),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::File { path, detail: format!("cannot be read: {error}") }),
        }
    }

    fn keep_file(&self, context: &Context) -> Replaced {
        let ini = self.ini.canonicalize().unwrap_or_else(|_| self.ini.clone());
        let plain = |c: char| if c.is_ascii_alphanumeric() { c } else { '_' };
        let dbname: String = self.dbname.chars().map(plain).collect();
        let mut name = ini.file_name().unwrap_or_default().to_os_string();
        name.push(format!(".walferry_{}_{dbname}", context.job));
        Replaced { path: ini.with_file_name(name), owner_of: ini }
    }

    /// Where clients must go for this side.
    async fn words_of(&self, context: &Context, side: Side) -> Result<Words> {
        let place = Place::of(context, side).await?;
        let (host, port, dbname) = (Some(place.host), Some(place.port), Some(place.dbname));
        Ok(Words { host, port, dbname })
    }
}

fn shown((host, port, dbname): &(String, String, String)) -> String {
    format!("{host}:{port}/{dbname}")
}

impl fmt::Display for Pgbouncer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let hosts: Vec<String> =
            self.admin.hosts.iter().map(|h| format!("{}:{}", h.host, h.port)).collect();
        write!(f, "pgbouncer {}, {}, {}", hosts.join(","), self.ini.display(), self.dbname)
    }
}
