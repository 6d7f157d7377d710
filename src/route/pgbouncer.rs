//! A database of a pgbouncer: PAUSE, rewrite, RELOAD, RESUME.
//!
//! <https://www.pgbouncer.org/usage.html#process-controlling-commands>

use std::fmt;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::ini::{self, Words};
use super::{Context, Error, Result};
use crate::id::{Stream, quote_ident};
use crate::pg::{Config, Purpose, Session};

/// One database of one pgbouncer, its admin console, and the file that says where it leads.
#[derive(Clone, Debug)]
pub struct Pgbouncer {
    admin: Config,
    ini: PathBuf,
    dbname: String,
}

/// One of the two ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Source,
    Target,
}

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
        Ok(Pgbouncer { admin, ini: PathBuf::from(ini.trim()), dbname: dbname.trim().to_string() })
    }

    async fn console(&self) -> Result<Session> {
        let session = Session::connect(&self.admin, Purpose::PoolerAdmin).await;
        session.map_err(|source| Error::Console { doing: "opening its console".into(), source })
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
        let pairs = |row: &crate::pg::Row| {
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
        file.lead_to(&self.words_of(context, destination(context)).await?)?;
        file.replaceable()
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
        let mut console = self.console().await?;
        // The console that said PAUSE hears nothing else until it is complete. The one that will
        // RESUME is open before, so that it cannot be refused when it matters.
        let mut rescue = self.console().await?;
        let pause = self.on_database("PAUSE");
        let outcome = match tokio::time::timeout(wait, self.command(&mut console, &pause)).await {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(error)) => error,
            Err(_) => self.busy(wait, &mut rescue).await,
        };
        self.resume(&mut rescue).await?;
        Err(outcome)
    }

    async fn busy(&self, wait: Duration, rescue: &mut Session) -> Error {
        // Let go first: asking for the pool mode can wait, clients cannot.
        if let Err(error) = self.resume(rescue).await {
            return error;
        }
        let mode = match self.running(rescue).await.ok().and_then(|r| r.pool_mode) {
            Some(mode) => mode,
            None => self.setting(rescue, "pool_mode").await.unwrap_or_default(),
        };
        let reason = match mode.as_str() {
            "session" => "in pool_mode=session PAUSE waits until clients disconnect",
            _ => "PAUSE waits for open transactions",
        };
        Error::Busy {
            peer: rescue.peer().to_string(),
            dbname: self.dbname.clone(),
            wait_ms: wait.as_millis(),
            reason,
        }
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
        let to = self.words_of(context, destination(context)).await?;
        let file = File::read(&self.ini, &self.dbname)?;
        let line = match (destination(context), self.kept(context)?) {
            (Side::Source, Some(kept)) => self.restored(&file, &kept, context).await?,
            _ => file.lead_to(&to)?,
        };
        if line != file.line()? {
            if destination(context) == Side::Target {
                let kept = format!("{}\n", file.line()?);
                self.keep_file(context).write(kept.as_bytes(), 0o600)?;
            }
            file.with_line(&line)?;
        }
        self.reload(&mut console, &line).await
    }

    /// Has the file read, has connections to the old place closed, and believes it only when seen.
    async fn reload(&self, console: &mut Session, line: &str) -> Result<()> {
        self.command(console, "RELOAD").await?;
        let reconnect = self.command(console, &self.on_database("RECONNECT")).await;
        if let Err(error @ Error::Console { .. }) = reconnect {
            // Before 1.10 there is no RECONNECT; a changed host closes connections there as well.
            tracing::debug!(%error, "no RECONNECT");
        }
        let wanted = ini::words(line).map(|words| words.resolved(&self.dbname));
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

    pub(super) async fn release(&self, context: &Context) -> Result<()> {
        let mut console = self.console().await?;
        self.resume(&mut console).await?;
        // Rolled back, the line is as it was: there is nothing left to restore.
        let line = File::read(&self.ini, &self.dbname)?.line()?.to_string();
        if context.flip == Stream::Reverse && self.kept(context)?.as_deref() == Some(&line) {
            self.forget(context)?;
        }
        Ok(())
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
        let leads_to = self.running(&mut console).await?.leads_to;
        if ini::words(&line).map(|words| words.resolved(&self.dbname)) != Some(leads_to) {
            self.reload(&mut console, &line).await?;
        }
        self.resume(&mut console).await?;
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

    /// Where clients must go for this side. Of several hosts, the one that takes our connection
    /// now: pgbouncer knows no target_session_attrs.
    async fn words_of(&self, context: &Context, side: Side) -> Result<Words> {
        let config = match side {
            Side::Source => &context.source,
            Side::Target => &context.target,
        };
        let host = match config.hosts.as_slice() {
            [host] => host.clone(),
            _ => {
                let session = Session::connect(config, Purpose::Sql).await;
                session.map_err(Error::Destination)?.host().clone()
            }
        };
        Ok(Words {
            host: Some(host.host),
            port: Some(host.port.to_string()),
            dbname: Some(config.dbname.clone()),
        })
    }
}

fn destination(context: &Context) -> Side {
    match context.flip {
        Stream::Forward => Side::Target,
        Stream::Reverse => Side::Source,
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

/// pgbouncer.ini as read, with the place of the one line.
struct File {
    place: Replaced,
    text: Vec<u8>,
    range: std::ops::Range<usize>,
    name: String,
}

impl File {
    fn read(path: &Path, name: &str) -> Result<File> {
        let wrong = |detail: String| Error::File { path: path.to_path_buf(), detail };
        let path = path.canonicalize().map_err(|e| wrong(format!("{e}; is it the right path?")))?;
        let text = std::fs::read(&path).map_err(|e| wrong(e.to_string()))?;
        let Some(range) = ini::find(&text, name) else {
            let more = match ini::has_include(&text) {
                true => "; if it is in a file that %include brings in, give that file's path",
                false => "; add one (a \"*\" line cannot be switched)",
            };
            return Err(wrong(format!("[databases] has no line for \"{name}\"{more}")));
        };
        let place = Replaced { path: path.clone(), owner_of: path };
        Ok(File { place, text, range, name: name.to_string() })
    }

    fn wrong(&self, detail: &str) -> Error {
        let detail = format!("the line of \"{}\" {detail}", self.name);
        Error::File { path: self.place.path.clone(), detail }
    }

    fn line(&self) -> Result<&str> {
        let line = self.text.get(self.range.clone()).and_then(|l| std::str::from_utf8(l).ok());
        line.ok_or_else(|| self.wrong("is not UTF-8"))
    }

    fn words(&self) -> Result<Words> {
        let words = ini::words(self.line()?);
        words.ok_or_else(|| self.wrong("is not key=value pairs; put it right"))
    }

    fn lead_to(&self, to: &Words) -> Result<String> {
        let line = ini::lead_to(self.line()?, &self.name, to);
        line.ok_or_else(|| self.wrong("is not key=value pairs; put it right"))
    }

    fn with_line(&self, line: &str) -> Result<()> {
        let mut text = self.text.clone();
        text.splice(self.range.clone(), line.bytes());
        let mode = std::fs::metadata(&self.place.path).map_or(0o600, |m| m.mode() & 0o7777);
        self.place.write(&text, mode)
    }

    /// Makes the temporary file that a change would need, and takes it away again.
    fn replaceable(&self) -> Result<()> {
        let temporary = self.place.temporary();
        let made = self.place.prepare(&temporary, b"", 0o600);
        let _ = std::fs::remove_file(&temporary);
        made.map_err(|error| self.place.failed(error))
    }
}

/// A file written whole or not at all, with the owner of another.
struct Replaced {
    path: PathBuf,
    owner_of: PathBuf,
}

impl Replaced {
    fn write(&self, text: &[u8], mode: u32) -> Result<()> {
        let temporary = self.temporary();
        let replace = || {
            self.prepare(&temporary, text, mode)?;
            std::fs::rename(&temporary, &self.path)?;
            let dir = self.path.parent().unwrap_or(Path::new("/"));
            std::fs::File::open(dir)?.sync_all()
        };
        replace().map_err(|error| {
            let _ = std::fs::remove_file(&temporary);
            self.failed(error)
        })
    }

    fn temporary(&self) -> PathBuf {
        let mut name = std::ffi::OsString::from(".");
        name.push(self.path.file_name().unwrap_or_default());
        name.push(format!(".{:016x}", fastrand::u64(..)));
        self.path.with_file_name(name)
    }

    /// Never more open than `mode`, also while it is being written: it may hold passwords.
    fn prepare(&self, temporary: &Path, text: &[u8], mode: u32) -> std::io::Result<()> {
        let owner = std::fs::metadata(&self.owner_of)?;
        let mut options = std::fs::OpenOptions::new();
        let mut file = options.write(true).create_new(true).mode(0o600).open(temporary)?;
        let made = file.metadata()?;
        if (made.uid(), made.gid()) != (owner.uid(), owner.gid()) {
            chown(temporary, Some(owner.uid()), Some(owner.gid()))?;
        }
        file.set_permissions(PermissionsExt::from_mode(mode))?;
        file.write_all(text)?;
        file.sync_all()
    }

    fn failed(&self, error: std::io::Error) -> Error {
        let detail = format!(
            "cannot be replaced: {error}; run walferry as the file's owner or as root, with its \
             directory writable (in a container mount the directory, not the file)"
        );
        Error::File { path: self.path.clone(), detail }
    }
}
