//! A foreign server in a router's database: of postgres_fdw, or a partition of a plproxy cluster.
//!
//! Clients cannot be held here, and are let through by the ALTER SERVER itself. So `switch` only
//! tries it and arms the server: it writes down, in the server's comment, what is to be done and
//! what was there before; `release`, which comes after the point of no return, does it. Whatever
//! fails before that leaves nothing to take back but a comment, and no client was on the new side.
//!
//! The comment is the one place that a server's owner may always write to, and that a crash of ours
//! or of the router leaves in step with the options: both change in one transaction. It is given
//! back by undo and forget. Partitions of one cluster may be led by several jobs at once: each has
//! its own note in the comment, and an advisory lock keeps one from writing over another's. Options
//! of a server are readable by all in pg_foreign_server already.
//!
//! postgres_fdw drops cached connections at the next transaction, plproxy at the next call: what is
//! under way ends on the old side, where the fence and the seal stand.
//!
//! <https://www.postgresql.org/docs/current/sql-alterserver.html>

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use super::note::{Note, Notes, Options};
use super::place::{Place, Side, identity};
use super::{Context, Error, Result, connstr, foreign};
use crate::id::{Stream, quote_ident, quote_literal};
use crate::pg::{Config, Host, Session, Witness};
use crate::secret::SecretString;

/// Options of a postgres_fdw server that say where it leads.
const LEADING: [&str; 4] = ["host", "hostaddr", "port", "dbname"];

/// A foreign server, or one partition of it.
#[derive(Clone, Debug)]
pub struct SqlMed {
    router: Config,
    pub(super) server: String,
    /// `pNN` of a plproxy cluster.
    partition: Option<String>,
    /// Its clients may only read while writers are stopped: `read_only` says how.
    pub(super) read_only: bool,
    /// A session between two steps: making one while writers wait would take longer than the step.
    idle: Arc<Mutex<Option<Session>>>,
    /// The flip that the server is armed for, as far as this process knows.
    armed: Arc<Mutex<Option<Stream>>>,
}

/// A server as it is.
pub(super) struct Found {
    wrapper: String,
    owned: bool,
    notes: Notes,
    /// Our own of them.
    pub(super) note: Option<Note>,
    /// All of them, ours as they are when clients may write.
    pub(super) options: Options,
    /// Ours as they are now.
    now: Options,
}

/// How the text of a route ends whose clients are to be read-only for a time.
const READ_ONLY: &str = ",read-only";

/// Locks out other jobs that lead partitions of the same server, until the transaction's end. The
/// class is the one of our leases; names of servers are not names of jobs.
const LOCK: &str = "select pg_catalog.pg_advisory_xact_lock(2002873446, \
     pg_catalog.hashtext('server ' || ";

impl SqlMed {
    /// Reads `URI,SERVER`.
    pub(super) fn parse_fdw(text: &str) -> Result<SqlMed> {
        let parts = text.rsplit_once(',').map(|(uri, server)| (uri, server.trim()));
        match parts.filter(|(uri, server)| !uri.is_empty() && !server.is_empty()) {
            Some((uri, server)) => SqlMed::new(uri, server, None),
            None => Err(Error::Usage("fdw needs two parts joined by a comma".to_string())),
        }
    }

    /// Reads `URI,CLUSTER,PARTITION[,read-only]`.
    pub(super) fn parse_plproxy(text: &str) -> Result<SqlMed> {
        let (text, read_only) =
            text.strip_suffix(READ_ONLY).map_or((text, false), |text| (text, true));
        let mut parts = text.rsplitn(3, ',').map(str::trim);
        let (partition, cluster, uri) = (parts.next(), parts.next(), parts.next());
        let is_partition = |text: &str| {
            let digits = text.strip_prefix("partition_").or_else(|| text.strip_prefix('p'));
            digits.is_some_and(|d| !d.is_empty() && d.bytes().all(|b| b.is_ascii_digit()))
        };
        match (uri, cluster, partition) {
            (Some(uri), Some(cluster), Some(partition))
                if !uri.is_empty() && !cluster.is_empty() && is_partition(partition) =>
            {
                let route = SqlMed::new(uri, cluster, Some(partition.to_string()))?;
                Ok(SqlMed { read_only, ..route })
            }
            _ => Err(Error::Usage(
                "plproxy needs three parts joined by commas, the last such as p16".to_string(),
            )),
        }
    }

    fn new(uri: &str, server: &str, partition: Option<String>) -> Result<SqlMed> {
        let router = Config::parse(uri).map_err(|e| Error::Usage(e.to_string()))?;
        let (router, server) = (router.labelled("router"), server.to_string());
        let (idle, armed) = (Arc::default(), Arc::default());
        Ok(SqlMed { router, server, partition, read_only: false, idle, armed })
    }

    /// `URI,SERVER` or `URI,CLUSTER,PARTITION` as it may be stored, and the password.
    pub(super) fn stored(kind: &str, text: &str) -> Result<(String, Option<SecretString>)> {
        let names = if kind == "fdw" { 1 } else { 2 + usize::from(text.ends_with(READ_ONLY)) };
        let at = text.rmatch_indices(',').nth(names - 1).map_or(text.len(), |(at, _)| at);
        let (uri, names) = text.split_at(at);
        let (uri, password) =
            Config::split_password(uri).map_err(|e| Error::Usage(e.to_string()))?;
        Ok((format!("{kind}:{uri}{names}"), password))
    }

    pub(super) fn set_password(&mut self, password: SecretString) {
        self.router.password = Some(password);
    }

    pub(super) fn set_witness(&mut self, witness: Witness) {
        self.router.witness = Some(witness);
    }

    pub(super) fn password(&self) -> Option<SecretString> {
        self.router.password_for(self.router.hosts.first()?).cloned()
    }

    pub(super) fn kind(&self) -> &'static str {
        if self.partition.is_some() { "plproxy" } else { "fdw" }
    }

    pub(super) fn by_hand(&self, context: &Context, switched: bool) -> String {
        let target = (context.flip == Stream::Forward) == switched;
        let side = if target { &context.target } else { &context.source };
        let hosts: Vec<String> =
            side.hosts.iter().map(|h| format!("host={} port={}", h.host, h.port)).collect();
        let peer = self.router.hosts.first().map(|h| self.router.peer(h)).unwrap_or_default();
        let part = self.partition.as_ref().map_or(String::new(), |p| format!(" {p} of"));
        let writing = if self.read_only { " without default_transaction_read_only" } else { "" };
        format!(
            "on {peer}, have{part} server \"{}\" lead to {} dbname={} (ALTER SERVER ... OPTIONS \
             (SET ...)){writing}, and give it its comment back",
            self.server,
            hosts.join(" or "),
            side.dbname
        )
    }

    fn wrapper(&self) -> &'static str {
        if self.partition.is_some() { "plproxy" } else { "postgres_fdw" }
    }

    pub(super) fn setup(&self, detail: impl Into<String>) -> Error {
        let peer = self.router.hosts.first().map(|h| self.router.peer(h)).unwrap_or_default();
        Error::Setup { peer, detail: format!("server \"{}\" {}", self.server, detail.into()) }
    }

    async fn session(&self) -> Result<Session> {
        let session = Session::control(&self.router).await;
        session.map_err(|source| Error::Router { doing: "connecting".to_string(), source })
    }

    fn idle(&self) -> Option<Session> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn set_armed(&self, flip: Option<Stream>) {
        *self.armed.lock().unwrap_or_else(PoisonError::into_inner) = flip;
    }

    fn is_armed(&self, context: &Context) -> bool {
        *self.armed.lock().unwrap_or_else(PoisonError::into_inner) == Some(context.flip)
    }

    /// Keeps the session for the next step.
    pub(super) fn keep(&self, session: Session) {
        *self.idle.lock().unwrap_or_else(PoisonError::into_inner) = Some(session);
    }

    pub(super) async fn execute(&self, session: &mut Session, sql: &str) -> Result<()> {
        let done = session.execute(sql).await;
        let doing = format!("leading server \"{}\"", self.server);
        done.map(|_| ()).map_err(|source| Error::Router { doing, source })
    }

    /// Looks at the server; `first` is run before it in the same message, and must not fail.
    async fn find(&self, session: &mut Session, first: &str) -> Result<Found> {
        let wrong = |source| Error::Router { doing: "reading pg_foreign_server".into(), source };
        let sql = format!(
            "{first} select w.fdwname, pg_catalog.pg_has_role(s.srvowner, 'USAGE'), \
             pg_catalog.obj_description(s.oid, 'pg_foreign_server'), \
             coalesce((select pg_catalog.json_object_agg(o.option_name, o.option_value) \
             from pg_catalog.pg_options_to_table(s.srvoptions) o), '{{}}') \
             from pg_catalog.pg_foreign_server s \
             join pg_catalog.pg_foreign_data_wrapper w on w.oid = s.srvfdw where s.srvname = {}",
            quote_literal(&self.server)
        );
        // What comes first answers with one column, if at all.
        let mut rows = session.query(&sql).await.map_err(wrong)?;
        let Some(row) = rows.pop().filter(|row| row.len() > 1) else {
            return Err(self.setup("is not there; name one that \\des lists"));
        };
        let comment = row.opt(2).map_err(wrong)?;
        let options = serde_json::from_str::<Options>(row.str(3).map_err(wrong)?);
        let mut options =
            options.map_err(|e| self.setup(format!("has unreadable options: {e}")))?;
        let notes = Notes::read(comment);
        let notes = notes.map_err(|e| self.setup(format!("has a damaged note of ours: {e}")))?;
        let (note, now) = (notes.led.get(self.key()).cloned(), self.ours(&options));
        options.extend(note.iter().filter_map(|note| note.before.clone()).flatten());
        let (wrapper, owned) = (row.string(0).map_err(wrong)?, row.bool(1).map_err(wrong)?);
        Ok(Found { wrapper, owned, notes, note, options, now })
    }

    /// Begins a transaction in which no other job changes the server, and looks at it: by the
    /// session of the step before, if that is still there.
    pub(super) async fn find_locked(&self) -> Result<(Session, Found)> {
        let first = format!("begin; {LOCK}{}));", quote_literal(&self.server));
        if let Some(mut session) = self.idle() {
            match self.find(&mut session, &first).await {
                Err(Error::Router { source, .. }) if source.is_closed() => {}
                found => return Ok((session, found?)),
            }
        }
        let mut session = self.session().await?;
        let found = self.find(&mut session, &first).await?;
        Ok((session, found))
    }

    /// Under which of the notes ours is.
    fn key(&self) -> &str {
        self.partition.as_deref().unwrap_or_default()
    }

    /// Where these options lead.
    fn leads(&self, options: &Options) -> Result<Place> {
        let Some(partition) = &self.partition else {
            let get = |key: &str| options.get(key).cloned().unwrap_or_default();
            let host = Some(get("host")).filter(|host| !host.is_empty());
            let host = host.unwrap_or_else(|| get("hostaddr"));
            return Ok(Place { host, port: get("port"), dbname: get("dbname") });
        };
        let text = options.get(partition).ok_or_else(|| {
            self.setup(format!("has no option {partition}; name a partition that \\des+ lists"))
        })?;
        connstr::place(text).ok_or_else(|| self.unreadable(partition))
    }

    pub(super) fn unreadable(&self, partition: &str) -> Error {
        self.setup(format!(
            "has an option {partition} that is no list of key=value pairs; write it so that a part \
             of it can be changed"
        ))
    }

    /// Our options, of all of them.
    pub(super) fn ours(&self, options: &Options) -> Options {
        let is_ours = |key: &str| match &self.partition {
            Some(partition) => key == partition,
            None => LEADING.contains(&key),
        };
        let ours = options.iter().filter(|(key, _)| is_ours(key));
        ours.map(|(key, value)| (key.clone(), value.clone())).collect()
    }

    /// Our options leading there.
    fn leading_to(&self, options: &Options, to: &Place) -> Result<Options> {
        let Some(partition) = &self.partition else {
            let words = [("host", &to.host), ("port", &to.port), ("dbname", &to.dbname)];
            return Ok(words.map(|(key, value)| (key.to_string(), value.clone())).into());
        };
        let text = options.get(partition).map(String::as_str).unwrap_or_default();
        let text = connstr::lead_to(text, to).ok_or_else(|| self.unreadable(partition))?;
        Ok(Options::from([(partition.clone(), text)]))
    }

    /// What the options are to be after the flip. Back on the source they are as they were, but for
    /// what somebody has made of them since.
    async fn wanted(&self, found: &Found, context: &Context) -> Result<Options> {
        let to = Place::of(context, Side::destination(context)).await?;
        let kept = found.note.as_ref().map(|note| &note.kept);
        let (Stream::Reverse, Some(kept)) = (context.flip, kept) else {
            return self.leading_to(&found.options, &to);
        };
        let (now, target) = (self.ours(&found.options), Place::of(context, Side::Target).await?);
        if now == *kept || now == self.leading_to(kept, &target)? {
            return Ok(kept.clone());
        }
        self.leading_to(&found.options, &self.leads(kept)?)
    }

    /// ALTER SERVER from what is to what is wanted; nothing where that is the same.
    pub(super) fn alter(&self, found: &Found, wanted: &Options) -> String {
        let now = &found.now;
        let mut clauses = Vec::new();
        for (key, value) in wanted {
            let word = match now.get(key) {
                Some(same) if same == value => continue,
                Some(_) => "set",
                None => "add",
            };
            clauses.push(format!("{word} {} {}", quote_ident(key), quote_literal(value)));
        }
        let gone = now.keys().filter(|key| !wanted.contains_key(*key));
        clauses.extend(gone.map(|key| format!("drop {}", quote_ident(key))));
        if clauses.is_empty() {
            return String::new();
        }
        format!("alter server {} options ({});", quote_ident(&self.server), clauses.join(", "))
    }

    /// The comment with our note in it, or without; the others' stay.
    pub(super) fn comment(&self, found: &Found, note: Option<Note>) -> Result<String> {
        let mut notes = found.notes.clone();
        match note {
            Some(note) => notes.led.insert(self.key().to_string(), note),
            None => notes.led.remove(self.key()),
        };
        let text = notes.text().map_err(|e| self.setup(format!("cannot be noted: {e}")))?;
        let text = text.map_or("null".to_string(), |text| quote_literal(&text));
        Ok(format!("comment on server {} is {text};", quote_ident(&self.server)))
    }

    /// The server is there, ours to change, and leads to the live side; whoever is mapped to a role
    /// finds that role on the new side.
    pub(super) async fn check(&self, context: &Context) -> Result<()> {
        let mut session = self.session().await?;
        let found = self.find(&mut session, "").await?;
        if found.wrapper != self.wrapper() {
            let (has, wants) = (&found.wrapper, self.wrapper());
            return Err(self.setup(format!("is one of {has}, and this route is for {wants}")));
        }
        if !found.owned {
            let user = &self.router.user;
            return Err(self.setup(format!(
                "is not owned by \"{user}\": alter server {} owner to {}",
                quote_ident(&self.server),
                quote_ident(user)
            )));
        }
        if let Some(note) = found.note.as_ref().filter(|note| note.job != context.job.as_str()) {
            return Err(self.setup(format!(
                "is being led by job {} (its comment says so); finish or cancel that first",
                note.job
            )));
        }
        self.is_live(&self.leads(&found.options)?, context).await?;
        let wanted = self.wanted(&found, context).await?;
        let tried = format!("begin; {} rollback", self.alter(&found, &wanted));
        self.execute(&mut session, &tried).await?;
        if self.partition.is_none() {
            self.check_mappings(&mut session, context).await?;
        }
        if let Some(group) = context.group() {
            let stray = foreign::strangers(&mut session, &self.server, group).await?;
            if !stray.is_empty() {
                return Err(self.setup(foreign::said(&stray)));
            }
        }
        self.keep(session);
        Ok(())
    }

    /// That place is the live side: by its name, or because it says the same of itself.
    async fn is_live(&self, place: &Place, context: &Context) -> Result<()> {
        let config = Side::live(context).config(context);
        let port = if place.port.is_empty() { "5432" } else { &place.port };
        let named = |h: &Host| h.host == place.host && h.port.to_string() == port;
        if config.hosts.iter().any(named) && config.dbname == place.dbname {
            return Ok(());
        }
        let own = self.router.hosts.first().map(|h| h.host.clone()).unwrap_or_default();
        let host = if place.host.is_empty() { own } else { place.host.clone() };
        let mut there = config.clone().with_dbname(&place.dbname);
        there.hosts = vec![Host { host, hostaddr: None, port: port.parse().unwrap_or(5432) }];
        let (here, there) = (identity(config).await, identity(&there).await);
        match (here, there) {
            (Ok(here), Ok(there)) if here == there => Ok(()),
            (Err(error), _) => {
                Err(Error::Router { doing: "asking the live side".into(), source: error })
            }
            (_, other) => {
                let live = config.hosts.first().map(|h| config.peer(h)).unwrap_or_default();
                let why = other.err().map(|e| format!(" ({e})")).unwrap_or_default();
                Err(self.setup(format!("leads to {place}{why}, and clients should be on {live}")))
            }
        }
    }

    /// Arms the change, unless that was done ahead.
    pub(super) async fn switch(&self, context: &Context) -> Result<()> {
        if self.is_armed(context) { Ok(()) } else { self.arm(context).await }
    }

    /// Our note as it is, or a fresh one.
    pub(super) fn note(&self, found: &Found, context: &Context) -> Note {
        let kept = || self.ours(&found.options);
        let fresh =
            || Note { job: context.job.to_string(), armed: None, kept: kept(), before: None };
        found.note.clone().unwrap_or_else(fresh)
    }

    /// Tries the change and arms it; `release` does it.
    pub(super) async fn arm(&self, context: &Context) -> Result<()> {
        let (mut session, found) = self.find_locked().await?;
        let alter = self.alter(&found, &self.wanted(&found, context).await?);
        if alter.is_empty() {
            return self.execute(&mut session, "rollback").await;
        }
        let mut note = self.note(&found, context);
        note.armed = Some(context.flip.to_string());
        let note = self.comment(&found, Some(note))?;
        let sql = format!("savepoint tried; {alter} rollback to tried; {note} commit");
        self.execute(&mut session, &sql).await?;
        self.keep(session);
        self.set_armed(Some(context.flip));
        Ok(())
    }

    /// Leads clients to the new side, if that was armed. Called in every try of a flip that could
    /// not stop its writers, too.
    pub(super) async fn release(&self, context: &Context) -> Result<()> {
        self.set_armed(None);
        let (mut session, found) = self.find_locked().await?;
        let armed = |note: &&Note| note.armed.as_deref() == Some(context.flip.as_str());
        let Some(note) = found.note.as_ref().filter(armed) else {
            let sql = match found.note.as_ref().is_some_and(|note| note.before.is_some()) {
                true => self.let_write(&found, context)?,
                false => "rollback".to_string(),
            };
            self.execute(&mut session, &sql).await?;
            self.keep(session);
            return Ok(());
        };
        let alter = self.alter(&found, &self.wanted(&found, context).await?);
        let note = Note { armed: None, before: None, ..note.clone() };
        let note = self.comment(&found, Some(note))?;
        self.execute(&mut session, &format!("{alter} {note} commit")).await
    }

    pub(super) async fn undo(&self, context: &Context) -> Result<()> {
        self.set_armed(None);
        let (mut session, found) = self.find_locked().await?;
        let Some(note) = &found.note else {
            return self.execute(&mut session, "rollback").await;
        };
        let (alter, note) = match context.flip {
            Stream::Forward => {
                (self.alter(&found, note.before.as_ref().unwrap_or(&note.kept)), None)
            }
            Stream::Reverse => {
                let target = Place::of(context, Side::Target).await?;
                let wanted = self.leading_to(&found.options, &target)?;
                let note = Note { armed: None, before: None, ..note.clone() };
                (self.alter(&found, &wanted), Some(note))
            }
        };
        let note = self.comment(&found, note)?;
        self.execute(&mut session, &format!("{alter} {note} commit")).await
    }

    pub(super) async fn forget(&self, context: &Context) -> Result<()> {
        let (mut session, found) = self.find_locked().await?;
        let ours = |note: &Note| note.job == context.job.as_str();
        match found.note.as_ref().is_some_and(ours) {
            true => {
                let comment = self.comment(&found, None)?;
                self.execute(&mut session, &format!("{comment} commit")).await
            }
            false => self.execute(&mut session, "rollback").await,
        }
    }
}

impl fmt::Display for SqlMed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let peer = self.router.hosts.first().map(|h| self.router.peer(h)).unwrap_or_default();
        match &self.partition {
            Some(partition) => {
                let how = if self.read_only { ", read-only" } else { "" };
                write!(f, "plproxy {peer}, {}, {partition}{how}", self.server)
            }
            None => write!(f, "fdw {peer}, {}", self.server),
        }
    }
}
