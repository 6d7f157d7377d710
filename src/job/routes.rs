//! The routes of a job's flips: stored without passwords, completed with what this process knows,
//! waited for where they cannot be reached, and left out when a person says that one is gone.
//!
//! A flip that was cut short is undone or finished by whatever process runs the job next, so its
//! routes are in the home database; their passwords are not. A runner has them from the command
//! that asked (in a letter sealed for that runner, see `secret::LetterBox`), from its own `--route`
//! or walferry.toml, from WALFERRY_ROUTE_PASSWORD, or as libpq would: PGPASSWORD, ~/.pgpass.
//!
//! A route that does not answer keeps its flip from being undone, and nobody but its owner knows
//! whether it still holds clients, or leads them to the side that is not live. So the job waits in
//! `cutting_over`, with its streams flowing, and asks it again every few seconds.
//! `run --skip-route` is the owner's word that it is gone: it gets one more try, the side that is
//! not live is sealed against whoever it might lead there after all, and what is to be done by hand
//! is said. After the point of no return only its release is waited for, in phase `switched`.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::request::{context_of, stream_of};
use super::run::{JobConfig, Notice, Runner};
use super::state::{Command, Event, Phase};
use super::store::{FlipRecord, Store};
use super::{Error, Result};
use crate::clock::{Backoff, Deadline};
use crate::cutover::{self, FenceKind, Rules};
use crate::fault::{Fault, Faulty};
use crate::id::Stream;
use crate::pg::{Config, Witness};
use crate::route::{self, Route};
use crate::secret::{ExposeSecret, LetterBox, SecretString, seal};

/// Between two tries of a route that could not be reached. Clients of a pooler wait meanwhile.
const AGAIN: Duration = Duration::from_secs(2);

/// A hook is a program of somebody's, which may do more than look: one that fails is called again
/// after [`AGAIN`], then after twice as long each time, up to this.
const HOOK_AGAIN_MAX: Duration = Duration::from_secs(60);

/// What a route that was given up may still take.
const SKIPPED_WAIT: Duration = Duration::from_secs(3);

/// [`Runner::lead`] is for [`Runner::lead_or_wait`] alone.
const NOT_LED: &str = "routes are led outside of a flip";

/// Passwords of routes, as far as this process knows them. Never stored; clones share them.
#[derive(Clone, Debug, Default)]
pub struct RouteSecrets {
    known: Arc<Mutex<HashMap<String, SecretString>>>,
    otherwise: Option<SecretString>,
    /// Told of the statements of routes that are made from here.
    witness: Option<Witness>,
}

impl RouteSecrets {
    /// Knows none yet; `otherwise` is for every route whose own is not known.
    pub fn new(otherwise: Option<SecretString>) -> RouteSecrets {
        RouteSecrets { otherwise, ..RouteSecrets::default() }
    }

    /// The same, sharing what is known, with somebody who is told of the statements of routes.
    pub fn with_witness(mut self, witness: Witness) -> RouteSecrets {
        self.witness = Some(witness);
        self
    }

    /// Reads `--route` as a person gives it, keeps its password, and gives it as it is stored.
    pub fn learn(&self, given: &str) -> route::Result<String> {
        let (stored, password) = Route::stored(given)?;
        if let Some(password) = password {
            self.keep(stored.clone(), password);
        }
        Ok(stored)
    }

    fn keep(&self, stored: String, password: SecretString) {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).insert(stored, password);
    }

    fn known(&self, stored: &str) -> Option<SecretString> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).get(stored).cloned()
    }

    /// Stored routes, ready to be used.
    pub fn routes(&self, stored: &[String]) -> Result<Vec<Route>> {
        let read = |text: &String| {
            let mut route = Route::parse(text)?;
            if let Some(password) = self.known(text).or_else(|| self.otherwise.clone()) {
                route = route.with_password(password);
            }
            Ok(match &self.witness {
                Some(witness) => route.with_witness(witness.clone()),
                None => route,
            })
        };
        let routes: route::Result<Vec<Route>> = stored.iter().map(read).collect();
        Ok(routes.map_err(cutover::Error::from)?)
    }

    /// Those of the stored routes whose password another process would look for in vain.
    pub fn known_here_only(&self, stored: &[String]) -> Vec<Route> {
        let found = |text: &String| {
            let route = Route::parse(text).ok()?;
            let here_only = self.known(text).is_some()
                && self.otherwise.is_none()
                && route.password().is_none();
            here_only.then_some(route)
        };
        stored.iter().filter_map(found).collect()
    }

    /// The passwords of these routes for a runner's letter box; `None` if they have none.
    pub fn letter(&self, stored: &[String], address: &str) -> Result<Option<String>> {
        let Some(passwords) = self.passwords(stored)? else { return Ok(None) };
        let text = serde_json::to_string(&passwords).map_err(|e| Error::State(e.to_string()))?;
        Ok(seal(&SecretString::from(text), address))
    }

    /// True if these routes have passwords that a runner elsewhere has to be told.
    pub fn any(&self, stored: &[String]) -> Result<bool> {
        Ok(self.passwords(stored)?.is_some())
    }

    fn passwords(&self, stored: &[String]) -> Result<Option<HashMap<String, String>>> {
        let routes = self.routes(stored)?;
        let passwords: HashMap<String, String> = stored
            .iter()
            .zip(&routes)
            .filter_map(|(text, route)| {
                Some((text.clone(), route.password()?.expose_secret().to_string()))
            })
            .collect();
        Ok((!passwords.is_empty()).then_some(passwords))
    }

    /// Learns what a letter says. One for another runner tells nothing: this process then has to
    /// know by itself.
    fn read_letter(&self, letter_box: LetterBox, letter: &str) {
        let text = letter_box.open(letter);
        let passwords = text.and_then(|text| {
            serde_json::from_str::<HashMap<String, String>>(text.expose_secret()).ok()
        });
        for (stored, password) in passwords.into_iter().flatten() {
            self.keep(stored, SecretString::from(password));
        }
    }
}

/// What has still to be done to clients, where a route kept it from being done at once.
#[derive(Clone, Debug)]
pub(super) struct Late {
    /// UndoFlip or ReleaseClients.
    command: Command,
    /// When it is tried again.
    again: Deadline,
    /// When hooks are called again that failed, unless nothing else is waited for.
    hooks: Deadline,
    pace: Backoff,
    /// Routes that have done their part; they are not asked again.
    led: HashSet<String>,
    /// Why it was not done; empty before the first try.
    pub said: String,
}

/// How the live side of a flip is opened again.
struct Undoing {
    live: Config,
    fence: FenceKind,
    rules: Rules,
}

impl Late {
    fn new(command: Command) -> Late {
        let now = Deadline::after(Duration::ZERO);
        let (led, said) = (HashSet::new(), String::new());
        Late {
            command,
            again: now,
            hooks: now,
            pace: Backoff::new(AGAIN, HOOK_AGAIN_MAX),
            led,
            said,
        }
    }

    /// To be tried at once.
    pub fn release() -> Late {
        Late::new(Command::ReleaseClients)
    }

    /// The job cannot leave the phase before it is done.
    pub fn keeps_phase(&self) -> bool {
        self.command == Command::UndoFlip
    }

    /// Something was said to the runner: it may be that a route was given up.
    pub fn hurry(&mut self) {
        self.again = Deadline::after(Duration::ZERO);
    }

    /// Those of the routes that have not done their part, and those of them to be asked now.
    fn due(&self, waiting: &[String]) -> (Vec<String>, Vec<String>) {
        let pending = waiting.iter().filter(|route| !self.led.contains(*route));
        let pending: Vec<String> = pending.cloned().collect();
        let others: Vec<String> = pending.iter().filter(|route| !is_hook(route)).cloned().collect();
        let all = others.is_empty() || self.hooks.passed();
        (pending.clone(), if all { pending } else { others })
    }

    /// A try failed for which `tried` were asked.
    fn failed(&mut self, tried: &[String]) {
        let failed = |route: &&String| !self.led.contains(*route);
        let (hooks, others): (Vec<&String>, Vec<&String>) =
            tried.iter().filter(failed).partition(|route| is_hook(route));
        if !hooks.is_empty() {
            self.hooks = Deadline::after(self.pace.step());
        }
        let alone = others.is_empty() && !hooks.is_empty();
        self.again = if alone { self.hooks } else { Deadline::after(AGAIN) };
    }
}

fn is_hook(route: &str) -> bool {
    route.starts_with("hook:")
}

impl Runner {
    /// A letter box for the next asker's passwords.
    pub(super) fn letter_box(&mut self) -> std::result::Result<serde_json::Value, String> {
        let letter_box = LetterBox::new().ok_or("the system gives no random numbers")?;
        let address = letter_box.address();
        self.letters = Some(letter_box);
        Ok(serde_json::json!({ "address": address }))
    }

    /// Reads the letter that came with a request.
    pub(super) fn take_letter(&mut self, letter: Option<&str>) {
        if let (Some(letters), Some(letter)) = (self.letters.take(), letter) {
            self.config.secrets.read_letter(letters, letter);
        }
    }

    /// Undoes a flip, or lets clients through, or remembers that it has still to be done.
    pub(super) async fn lead_or_wait(&mut self, command: Command) -> Result<Option<Event>> {
        if self.late.as_ref().is_none_or(|late| late.command != command) {
            self.late = Some(Late::new(command));
        }
        let _ = self.flying.send_replace(true);
        let outcome = self.lead_clients(command).await;
        let _ = self.flying.send_replace(false);
        match outcome {
            Ok(event) => {
                if self.late.take().is_some_and(|late| !late.said.is_empty()) {
                    self.store.set_error(None).await?;
                }
                Ok(event)
            }
            Err(error @ Error::Cutover(_)) if error.fault() == Fault::Stop => {
                let undone = command == Command::UndoFlip;
                let todo = if undone { "undone" } else { "finished: clients are not let through" };
                let said = Error::RouteWaits { todo, cause: error.to_string() }.to_string();
                self.say(Notice::Trouble(said.clone()));
                self.store.set_error(Some(&said)).await?;
                if let Some(late) = &mut self.late {
                    late.said = said;
                    if late.again.passed() {
                        late.again = Deadline::after(AGAIN);
                    }
                }
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Asks the routes of a flip until all have done their part, or one has not: to lead clients
    /// back where `undoing` says how the live side is opened, to let them through otherwise. Those
    /// that have are remembered.
    async fn lead(&mut self, record: &FlipRecord, undoing: Option<&Undoing>) -> Result<()> {
        let context = context_of(&self.config, record);
        let waiting = record.waiting();
        loop {
            let late = self.late.as_ref().ok_or_else(|| Error::State(NOT_LED.to_string()))?;
            let (_, due) = late.due(&waiting);
            let (routes, mut led) = (self.config.secrets.routes(&due)?, Vec::new());
            let outcome = match undoing {
                Some(Undoing { live, fence, rules }) => {
                    let led = |place| led.push(place);
                    cutover::undo(live, *fence, &routes, &context, rules, led).await
                }
                None => cutover::release(&routes, &context, |place| led.push(place)).await,
            };
            let Some(late) = &mut self.late else { return Ok(outcome?) };
            late.led.extend(led.into_iter().filter_map(|place| due.get(place).cloned()));
            if outcome.is_err() {
                late.failed(&due);
            }
            outcome?;
            if late.due(&waiting).0.is_empty() {
                return Ok(());
            }
        }
    }

    /// What could not be done at once is done as soon as it can be.
    pub(super) async fn lead_late(&mut self) -> Result<Option<Event>> {
        match &self.late {
            Some(late) if late.again.passed() => {
                let command = late.command;
                self.lead_or_wait(command).await
            }
            _ => Ok(None),
        }
    }

    /// After a crash in the middle of a flip that had not passed its point of no return.
    pub(super) async fn undo_flip(&mut self) -> Result<Event> {
        let row = self.row().await?;
        let Some(record) = row.flip else {
            return Ok(Event::FlipUndone(Phase::Following));
        };
        if self.late.as_ref().is_none_or(|late| late.said.is_empty()) {
            self.say(Notice::Said(format!("undoing the {} flip that was cut short", record.flip)));
        }
        let flip = stream_of(&record.flip);
        let rules = self.rules(flip, &row.abilities).await?;
        let live = match flip {
            Stream::Forward => self.config.source.clone(),
            Stream::Reverse => self.config.target.clone(),
        };
        let undoing = Undoing { live, fence: record.fence.parse()?, rules };
        self.lead(&record, Some(&undoing)).await?;
        self.leave_skipped(&record, flip).await?;
        if self.switch_had_begun(&record).await? {
            self.bring_home(flip).await?;
        }
        self.turn_back(flip, record.group.as_ref());
        Ok(Event::FlipUndone(self.note_undone().await?))
    }

    /// Routes that were given up get one more try. Where one stays as it is, the side that is not
    /// live is sealed: whoever is led there is refused, and nothing is written on two sides.
    async fn leave_skipped(&mut self, record: &FlipRecord, flip: Stream) -> Result<()> {
        let context = context_of(&self.config, record);
        let mut left = false;
        for route in self.config.secrets.routes(&record.skipped)? {
            let tried = tokio::time::timeout(SKIPPED_WAIT, route.undo(&context)).await;
            if !matches!(tried, Ok(Ok(()))) {
                left = true;
                let by_hand = route.by_hand(&context, false);
                self.say(Notice::Said(format!("going on without {route}: by hand, {by_hand}")));
            }
        }
        if !left {
            return Ok(());
        }
        let other = match flip {
            Stream::Forward => &self.config.target,
            Stream::Reverse => &self.config.source,
        };
        let tables = match &record.group {
            Some(group) => group.tables.clone(),
            None => self.fenced_tables(other).await?,
        };
        match cutover::seal_other(&context, &tables).await {
            Err(error @ cutover::Error::NotOwned { .. }) => {
                self.say(Notice::Said(format!(
                    "warning: the {} cannot be sealed, see that nobody writes there: {error}",
                    other.label
                )));
                Ok(())
            }
            sealed => Ok(sealed?),
        }
    }

    /// After a crash between the point of no return and the release of clients.
    pub(super) async fn release_clients(&mut self) -> Result<Option<Event>> {
        let Some(mut record) = self.row().await?.flip.filter(|f| !f.released) else {
            return Ok(None);
        };
        let context = context_of(&self.config, &record);
        self.lead(&record, None).await?;
        for route in self.config.secrets.routes(&record.skipped)? {
            let tried = tokio::time::timeout(SKIPPED_WAIT, route.release(&context)).await;
            if !matches!(tried, Ok(Ok(()))) {
                let by_hand = route.by_hand(&context, true);
                self.say(Notice::Said(format!("going on without {route}: by hand, {by_hand}")));
            }
        }
        record.released = true;
        self.store.set_flip(&record).await?;
        Ok(None)
    }
}

/// Takes routes out of a flip that cannot be undone or finished because of them; `wanted` is a kind
/// or a whole route. Gives what is to be done by hand for each. Whoever runs the job goes on
/// without them from its next try on.
///
/// Errors: no flip waits, or it has no such route.
pub async fn skip(store: &mut Store, config: &JobConfig, wanted: &str) -> Result<Vec<String>> {
    let row = store.load_existing().await?;
    let left = super::reads::skip(store, config, &row, wanted).await?;
    if !left.is_empty() {
        return Ok(left);
    }
    let undoing = row.phase == Phase::CuttingOver;
    let Some(mut record) = row.flip.filter(|flip| undoing || !flip.released) else {
        return Err(Error::NothingToSkip { detail: format!("the job is in {}", row.phase) });
    };
    let stored = Route::stored(wanted).map(|(stored, _)| stored).unwrap_or_default();
    let context = context_of(config, &record);
    let mut by_hand = Vec::new();
    for text in record.waiting() {
        let route = Route::parse(&text).map_err(cutover::Error::from)?;
        if route.kind() == wanted || text == stored {
            by_hand.push(format!("{route}: {}", route.by_hand(&context, !undoing)));
            let step = format!("skip {route}");
            let lines = store.journal_begin(&record, &[&step], &[]).await?;
            store
                .journal_end(&lines.into_iter().map(|line| (line, 0.0)).collect::<Vec<_>>())
                .await?;
            record.skipped.push(text);
        }
    }
    if by_hand.is_empty() {
        let routes = config.secrets.routes(&record.waiting())?;
        let routes: Vec<String> = routes.iter().map(ToString::to_string).collect();
        return Err(Error::NothingToSkip {
            detail: format!("it waits for {}, not for {}", routes.join("; "), kind_of(wanted)),
        });
    }
    store.set_skipped(&record).await?;
    // A runner that waits for them need not wait until it would ask them again.
    let channel = config.job.channel();
    store.session.query_params("select pg_catalog.pg_notify($1, '')", &[Some(&channel)]).await?;
    Ok(by_hand)
}

/// For messages: never the whole of what was typed, which may hold a password.
fn kind_of(wanted: &str) -> &str {
    wanted.split(':').next().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hook_that_fails_is_asked_ever_less_often_and_keeps_nobody_else_waiting() {
        let [hook, pooler, router] =
            ["hook:true", "pgbouncer:postgres://h:1/,/p.ini,a", "fdw:postgres://h/d,s"]
                .map(String::from);
        let waiting = [hook.clone(), pooler.clone(), router.clone()];
        let mut late = Late::new(Command::UndoFlip);
        assert_eq!(late.due(&waiting).1, waiting);
        // One that has done its part is not asked again, and one that has not soon.
        late.led.insert(router);
        late.failed(&waiting);
        assert!(late.again.left() <= AGAIN && !late.again.passed());
        assert_eq!(late.due(&waiting), (vec![hook.clone(), pooler.clone()], vec![pooler.clone()]));
        late.hurry();
        assert!(late.again.passed());
        // Alone it is asked when something is said, and by itself at its own pace.
        late.led.insert(pooler);
        let mut waits = Vec::new();
        for _ in 0..8 {
            let (pending, due) = late.due(&waiting);
            assert_eq!((&pending, &due), (&vec![hook.clone()], &vec![hook.clone()]));
            late.failed(&due);
            waits.push(late.again.left());
        }
        assert!(waits[0] > AGAIN && waits[7] > HOOK_AGAIN_MAX.mul_f64(0.7), "{waits:?}");
        assert!(waits[7] < HOOK_AGAIN_MAX.mul_f64(1.3), "{waits:?}");
        late.led.insert(hook);
        assert!(late.due(&waiting).0.is_empty());
    }

    #[test]
    fn a_letter_carries_the_passwords_of_its_routes_and_nothing_else() {
        let asker = RouteSecrets::new(None);
        let one = asker.learn("pgbouncer:postgres://u:hush@h:1/,/p.ini,a").unwrap();
        let other = asker.learn("pgbouncer:postgres://u:silence@h:2/,/p.ini,b").unwrap();
        let hook = asker.learn("hook:true").unwrap();
        assert!(!format!("{asker:?} {one} {other}").contains("hush"));
        let letters = LetterBox::new().unwrap();
        let letter = asker.letter(&[one.clone(), hook.clone()], &letters.address()).unwrap();
        let runner = RouteSecrets::new(None);
        runner.read_letter(letters, &letter.unwrap());
        assert_eq!(runner.known(&one).unwrap().expose_secret(), "hush");
        assert!(runner.known(&other).is_none());
        assert!(asker.letter(&[hook], &LetterBox::new().unwrap().address()).unwrap().is_none());
        let told = runner.routes(&[one]).unwrap().pop().unwrap();
        assert_eq!(told.password().unwrap().expose_secret(), "hush");
        let otherwise = RouteSecrets::new(Some(SecretString::from("shared")));
        let route = otherwise.routes(&[other]).unwrap().pop().unwrap();
        assert_eq!(route.password().unwrap().expose_secret(), "shared");
    }
}
