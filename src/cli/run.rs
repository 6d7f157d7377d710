//! `walferry run`.

use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use super::options::{JobArgs, learn};
use super::print;
use crate::copy::CopyProgress;
use crate::job::opening::Half;
use crate::job::store::Store;
use crate::job::{self, JobConfig, Notice, Runner, Until, lease};
use crate::pg::Session;

/// Where `--until` ends a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum UntilArg {
    /// All rows, indexes and constraints are on the target
    Copied,
    /// The target was level with the source once
    Following,
}

/// Options of the command.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    job: JobArgs,
    /// Return there, for scripts; otherwise run until stopped
    #[arg(long, value_name = "PHASE")]
    until: Option<UntilArg>,
    /// A route of a switch that was cut short, with the password that is nowhere else
    #[arg(long, value_name = "KIND:...")]
    route: Vec<String>,
    /// A route that is gone for good (hook, pgbouncer, fdw, plproxy, or the whole of it): a switch
    /// that it keeps from being undone or finished goes on without it
    #[arg(long, value_name = "KIND")]
    skip_route: Vec<String>,
}

/// Runs the job. 0 when `--until` was reached, it was stopped by hand, or the job ended; 1 on an
/// error.
pub async fn run(args: Args) -> anyhow::Result<ExitCode> {
    run_half(args, Half::Both, false).await
}

/// The same of one half of it. On `standby` it waits while another process runs the job.
pub(super) async fn run_half(args: Args, half: Half, standby: bool) -> anyhow::Result<ExitCode> {
    let config = JobConfig { half, ..args.job.job()? };
    learn(&config.secrets, "--route", &args.route)?;
    if !args.skip_route.is_empty() && skip_routes(&config, &args.skip_route).await? {
        return Ok(ExitCode::SUCCESS);
    }
    let (stop, stopping) = watch::channel(false);
    tokio::spawn(stop_on_signal(stop));
    let until = match args.until {
        Some(UntilArg::Copied) => Until::Copied,
        Some(UntilArg::Following) => Until::Following,
        None => Until::Told,
    };
    let screen = Arc::new(Screen::default());
    let shown = screen.clone();
    let report = Arc::new(move |notice: Notice| shown.show(notice));
    let outcome = loop {
        let running = Runner::run(config.clone(), until.clone(), report.clone(), stopping.clone());
        match running.await {
            Err(error @ job::Error::Busy { .. }) if standby && !*stopping.borrow() => {
                screen.show(Notice::Trouble(error.to_string()));
                tokio::time::sleep(STANDBY_TURN).await;
            }
            outcome => break outcome,
        }
    };
    screen.clear();
    match outcome {
        Ok(phase) => {
            let over = screen.ended.load(Ordering::SeqCst);
            if args.until.is_none() && !over {
                eprintln!("stopped in phase {phase}; the same command goes on from here");
            }
            Ok(ExitCode::SUCCESS)
        }
        Err(job::Error::Interrupted) => {
            eprintln!("stopped; the same command goes on from here");
            Ok(ExitCode::SUCCESS)
        }
        Err(error) => Err(error.into()),
    }
}

/// Takes routes out of a switch that waits for them. True if a runner is alive, which goes on
/// without them.
async fn skip_routes(config: &JobConfig, routes: &[String]) -> anyhow::Result<bool> {
    let home = Session::control(&config.target).await?;
    let mut store = Store::new(home, config.job.clone());
    for route in routes {
        for line in job::routes::skip(&mut store, config, route).await? {
            println!("left out {line}");
        }
    }
    let alive = lease::holder(&mut store.session, &config.job).await?;
    if let Some(pid) = &alive {
        eprintln!("the runner that is alive (backend {pid} on the target) goes on without it");
    }
    Ok(alive.is_some())
}

/// The first signal stops in order, the second at once; both are safe.
pub(super) async fn stop_on_signal(stop: watch::Sender<bool>) {
    let (Ok(mut interrupt), Ok(mut terminate)) =
        (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
    else {
        return;
    };
    for turn in 0.. {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
        if turn > 0 {
            std::process::exit(130);
        }
        eprintln!("stopping (once more to stop at once)");
        let _ = stop.send(true);
    }
}

/// Between tries of a runner that stands by.
const STANDBY_TURN: Duration = Duration::from_millis(500);

/// Between lines of progress where nobody watches a bar.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// What a person sees: lines, and one bar for what is under way. Where standard error is no
/// terminal the bar is a line every few seconds, for logs.
#[derive(Default)]
struct Screen {
    bar: Mutex<Option<ProgressBar>>,
    copy: Mutex<Option<(Arc<CopyProgress>, Instant)>>,
    said: Mutex<Said>,
    /// What is being built beside a copy: done, total, the statement.
    building: Mutex<Option<(usize, usize, String)>>,
    /// The job was ended by another command.
    ended: AtomicBool,
}

/// What was said last, so that it is not said again.
#[derive(Default)]
struct Said {
    trouble: String,
    lag_at: Option<Instant>,
}

impl Screen {
    fn show(self: &Arc<Self>, notice: Notice) {
        match notice {
            Notice::Phase(phase) => {
                self.clear();
                self.line(&format!("phase {phase}"));
            }
            Notice::Said(text) => self.line(&text),
            Notice::Ended => {
                self.ended.store(true, Ordering::SeqCst);
                self.line("stopped: the job is ended by finish or cancel");
            }
            Notice::Copying(progress) => self.copying(progress),
            Notice::Copied => self.copied(),
            Notice::Building(done, total, statement) => self.building(done, total, &statement),
            Notice::Trouble(text) => {
                let Ok(mut said) = self.said.lock() else { return };
                if said.trouble != text {
                    said.trouble = text.clone();
                    self.line(&format!("trying again: {text}"));
                }
            }
            Notice::Lag { bytes, rows } => self.lag(bytes, rows),
            Notice::Flows(_) => {}
        }
    }

    fn line(&self, text: &str) {
        let Ok(bar) = self.bar.lock() else { return };
        match &*bar {
            Some(bar) if !bar.is_hidden() => bar.println(text),
            _ => eprintln!("{text}"),
        }
    }

    fn bar_of(&self, length: u64, template: &str) -> ProgressBar {
        let Ok(mut slot) = self.bar.lock() else { return ProgressBar::hidden() };
        slot.get_or_insert_with(|| {
            let bar = ProgressBar::new(length);
            if let Ok(style) = ProgressStyle::with_template(template) {
                bar.set_style(style);
            }
            bar
        })
        .clone()
    }

    /// Ends what is under way; a copy is summed up.
    fn clear(&self) {
        if let Some(bar) = self.bar.lock().ok().and_then(|mut bar| bar.take()) {
            bar.finish_and_clear();
        }
        let copy = self.copy.lock().ok().and_then(|mut copy| copy.take());
        if let Some((progress, begun)) = copy {
            let (now, seconds) = (progress.snapshot(), begun.elapsed().as_secs_f64());
            let (rows, bytes) = (print::count(now.rows), print::bytes(now.bytes));
            self.line(&format!("copied {rows} rows, {bytes}, in {seconds:.1} s"));
        }
    }

    /// Beside a copy, whose bar stays, it is a word there.
    fn building(&self, done: usize, total: usize, statement: &str) {
        let text = statement.split_whitespace().collect::<Vec<_>>().join(" ");
        let is_copying = self.copy.lock().is_ok_and(|copy| copy.is_some());
        let is_hidden = match is_copying {
            true => {
                self.bar.lock().is_ok_and(|bar| bar.as_ref().is_none_or(ProgressBar::is_hidden))
            }
            false => self.building_bar(done, total, &text).is_hidden(),
        };
        if is_hidden && !text.is_empty() {
            let short: String = text.chars().take(100).collect();
            self.line(&format!("building {done}/{total}: {short}"));
        }
        if let Ok(mut building) = self.building.lock() {
            *building = is_copying.then_some((done, total, text));
        }
    }

    fn building_bar(&self, done: usize, total: usize, text: &str) -> ProgressBar {
        let bar = self.bar_of(total as u64, "{bar:30} {pos}/{len} {wide_msg}");
        bar.set_length(total as u64);
        bar.set_position(done as u64);
        bar.set_message(text.to_string());
        bar
    }

    /// The copy's bar makes room for that of what is built, if something is.
    fn copied(&self) {
        self.clear();
        let building = self.building.lock().ok().and_then(|mut building| building.take());
        if let Some((done, total, text)) = building.filter(|(done, total, _)| done < total) {
            self.building_bar(done, total, &text);
        }
    }

    fn lag(&self, bytes: u64, rows: u64) {
        // Of one large transaction the rows are all that moves until its end.
        let (behind, rows) = (print::bytes(bytes), print::count(rows));
        let text = format!("following, {behind} behind, {rows} changes written");
        let bar = self.bar_of(0, "{spinner} {wide_msg}");
        let Ok(mut said) = self.said.lock() else { return };
        said.trouble.clear();
        if bar.is_hidden() && said.lag_at.is_none_or(|at| at.elapsed() > 12 * LINE_EVERY) {
            said.lag_at = Some(Instant::now());
            self.line(&text);
        }
        bar.set_message(text);
    }

    /// The copy's counters are looked at four times a second until the bar is cleared.
    fn copying(self: &Arc<Self>, progress: Arc<CopyProgress>) {
        self.clear();
        if let Ok(mut building) = self.building.lock() {
            *building = None;
        }
        let bar = self.bar_of(0, "{bar:30} {percent:>3} % {wide_msg}");
        if let Ok(mut copy) = self.copy.lock() {
            *copy = Some((progress.clone(), Instant::now()));
        }
        let screen = self.clone();
        tokio::spawn(async move {
            let mut line_at = Instant::now();
            while !bar.is_finished() {
                let now = progress.snapshot();
                let left = now.left.map_or(String::new(), |s| format!(", {} left", time(s)));
                let building = screen.building.lock().ok().and_then(|building| building.clone());
                let building = building.filter(|(done, total, _)| done < total);
                let building = building
                    .map_or(String::new(), |(done, total, _)| format!(", building {done}/{total}"));
                let text = format!(
                    "{} rows, {} rows/s, {}/s{left}{building}",
                    print::count(now.rows),
                    print::count(now.rows_per_second as u64),
                    print::bytes(now.bytes_per_second as u64)
                );
                if bar.is_hidden() && line_at.elapsed() > LINE_EVERY {
                    line_at = Instant::now();
                    screen.line(&format!("copying, {:.0} %: {text}", now.fraction * 100.0));
                }
                bar.set_length(1000);
                bar.set_position((now.fraction * 1000.0) as u64);
                bar.set_message(text);
                tokio::time::sleep(Duration::from_millis(250)).await;
            }
        });
    }
}

/// `45 s`, `12 min`, `3.5 h`.
fn time(left: Duration) -> String {
    match left.as_secs() {
        s if s < 120 => format!("{s} s"),
        s if s < 7200 => format!("{} min", s / 60),
        s => format!("{:.1} h", s as f64 / 3600.0),
    }
}
