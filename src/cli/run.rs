//! `walferry run`.

use std::process::ExitCode;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use super::options::JobArgs;
use super::print;
use crate::copy::CopyProgress;
use crate::job::{self, Notice, Phase, Runner, Until};

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
}

/// Runs the job. 0 when `--until` was reached, it was stopped by hand, or the job ended; 1 on an
/// error.
pub async fn run(args: Args) -> anyhow::Result<ExitCode> {
    let config = args.job.job()?;
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
    let outcome = Runner::run(config, until, report, stopping.clone()).await;
    screen.clear();
    match outcome {
        Ok(phase) => {
            if args.until.is_none() && !matches!(phase, Phase::Finished | Phase::Canceled) {
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

/// What a person sees: lines, and one bar for what is under way.
#[derive(Default)]
struct Screen {
    bar: Mutex<Option<ProgressBar>>,
    trouble: Mutex<String>,
}

impl Screen {
    fn show(&self, notice: Notice) {
        match notice {
            Notice::Phase(phase) => {
                self.clear();
                self.line(&format!("phase {phase}"));
            }
            Notice::Said(text) => self.line(&text),
            Notice::Copying(progress) => self.copying(progress),
            Notice::Building(done, total, statement) => {
                let bar = self.bar_of(total as u64, "{bar:30} {pos}/{len} {wide_msg}");
                bar.set_length(total as u64);
                bar.set_position(done as u64);
                bar.set_message(statement.split_whitespace().collect::<Vec<_>>().join(" "));
            }
            Notice::Trouble(text) => {
                let Ok(mut last) = self.trouble.lock() else { return };
                if *last != text {
                    *last = text.clone();
                    self.line(&format!("trying again: {text}"));
                }
            }
            Notice::Lag(bytes) => {
                if let Ok(mut last) = self.trouble.lock() {
                    last.clear();
                }
                let bar = self.bar_of(0, "{spinner} {wide_msg}");
                bar.set_message(format!("following, {} behind", print::bytes(bytes)));
            }
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

    fn clear(&self) {
        if let Some(bar) = self.bar.lock().ok().and_then(|mut bar| bar.take()) {
            bar.finish_and_clear();
        }
    }

    /// The copy's counters are looked at four times a second until the bar is cleared.
    fn copying(&self, progress: Arc<CopyProgress>) {
        self.clear();
        let bar = self.bar_of(0, "{bar:30} {percent:>3} % {wide_msg}");
        tokio::spawn(async move {
            while !bar.is_finished() {
                let now = progress.snapshot();
                bar.set_length(1000);
                bar.set_position((now.fraction * 1000.0) as u64);
                let left = now.left.map_or(String::new(), |s| format!(", {} s left", s.as_secs()));
                bar.set_message(format!(
                    "{} rows, {} rows/s, {}/s{left}",
                    print::count(now.rows),
                    print::count(now.rows_per_second as u64),
                    print::bytes(now.bytes_per_second as u64)
                ));
                tokio::time::sleep(Duration::from_millis(250)).await;
            }
        });
    }
}
