//! Figures to tables: contestants take turns, medians are compared with the bars, and all of it is
//! printed, and written as JSON and markdown.

use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::machine::Machine;
use crate::options::Options;
use crate::process::Usage;

/// The contestant whose failure ends the bench; a peer's is written down.
pub const OURS: &str = "walferry";

/// A part that is no time: it says whether the load was what was asked for, and is in the table
/// alone.
pub const RATE: &str = "transactions a second";

/// One run of one contestant.
#[derive(Clone, Debug, Default)]
pub struct Sample {
    /// Seconds, or what the outcome's unit says.
    pub value: f64,
    /// Of the contestant's own process, where it has one.
    pub usage: Usage,
    /// Further figures of the same run, as entries of their own.
    pub parts: Vec<(String, f64)>,
}

impl Sample {
    /// One that has no process of its own beside the servers.
    pub fn of(value: f64) -> Sample {
        Sample { value, ..Sample::default() }
    }
}

/// A name, and what does the job once and gives its figure after the end states were compared.
pub type Contestant<'a> = (String, Box<dyn FnMut() -> Result<Sample> + 'a>);

/// All figures of one contestant.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct Entry {
    pub who: String,
    pub values: Vec<f64>,
    /// CPU seconds of its process.
    pub cpu: Vec<f64>,
    /// Peak memory of its process in megabytes.
    pub peak_mb: Vec<f64>,
    /// Why it has no (more) figures.
    pub failed: Option<String>,
}

impl Entry {
    /// The median of the figures, `None` if there is none.
    pub fn median(&self) -> Option<f64> {
        quantile(&self.values, 0.5)
    }
}

/// One promise: `measured` is not above `limit`.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Bar {
    pub promise: String,
    /// `None` if one of the figures is missing.
    pub measured: Option<f64>,
    pub limit: f64,
    pub stretch: Option<f64>,
}

impl Bar {
    /// `None` where nothing can be said.
    pub fn is_met(&self) -> Option<bool> {
        self.measured.map(|measured| measured <= self.limit)
    }

    fn text(&self) -> String {
        let verdict = match self.is_met() {
            None => "not judged, a figure is missing",
            Some(false) => "MISSED",
            Some(true) if self.stretch.is_some_and(|s| self.measured <= Some(s)) => {
                "met, and the stretch too"
            }
            Some(true) => "met",
        };
        let measured = self.measured.map_or("-".to_string(), |m| format!("{m:.2}"));
        let stretch = self.stretch.map_or(String::new(), |s| format!(", stretch {s:.2}"));
        let (promise, limit) = (&self.promise, self.limit);
        format!("{promise}: {measured}, bar {limit:.2}{stretch}: {verdict}")
    }
}

/// One scenario's result.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Outcome {
    pub scenario: String,
    pub title: String,
    pub unit: String,
    pub scale: f64,
    pub rounds: usize,
    /// Too small, or too hasty, to be told to anyone.
    pub smoke: bool,
    pub entries: Vec<Entry>,
    pub bars: Vec<Bar>,
    pub machine: Machine,
}

impl Outcome {
    /// Without bars yet.
    pub fn new(
        options: &Options,
        machine: &Machine,
        name: &str,
        title: String,
        unit: &str,
    ) -> Outcome {
        Outcome {
            scenario: name.to_string(),
            title,
            unit: unit.to_string(),
            scale: options.scale,
            rounds: options.rounds,
            smoke: options.smoke,
            entries: Vec::new(),
            bars: Vec::new(),
            machine: machine.clone(),
        }
    }

    /// The median of one contestant.
    pub fn median(&self, who: &str) -> Option<f64> {
        self.entries.iter().find(|entry| entry.who == who)?.median()
    }

    /// The smallest median of those whose names begin so.
    pub fn best(&self, prefixes: &[&str]) -> Option<f64> {
        let is_one = |e: &&Entry| prefixes.iter().any(|prefix| e.who.starts_with(prefix));
        let medians = self.entries.iter().filter(is_one).filter_map(Entry::median);
        medians.min_by(f64::total_cmp)
    }

    /// Adds a promise.
    pub fn bar(&mut self, promise: &str, measured: Option<f64>, limit: f64, stretch: Option<f64>) {
        self.bars.push(Bar { promise: promise.to_string(), measured, limit, stretch });
    }

    /// Adds a promise about the ratio of two figures.
    pub fn ratio(
        &mut self,
        promise: &str,
        figures: (Option<f64>, Option<f64>),
        limit: f64,
        stretch: Option<f64>,
    ) {
        let measured = figures.0.zip(figures.1).map(|(ours, theirs)| ours / theirs);
        self.bar(promise, measured, limit, stretch);
    }

    /// As markdown, with the bars below the table.
    pub fn markdown(&self) -> String {
        let unit = &self.unit;
        let mut text = format!("## {}: {}\n\n", self.scenario, self.title);
        if self.smoke {
            text.push_str("A smoke run: these figures say that the bench works, and no more.\n\n");
        }
        text.push_str(&format!(
            "| | median {unit} | min - max | rounds | own CPU s | own peak MB |\n\
             | --- | --- | --- | --- | --- | --- |\n"
        ));
        for entry in &self.entries {
            text.push_str(&row(entry));
        }
        text.push('\n');
        for bar in &self.bars {
            text.push_str(&format!("- {}\n", bar.text()));
        }
        text
    }
}

fn row(entry: &Entry) -> String {
    let of = |values: &[f64], at: f64, digits: usize| {
        quantile(values, at).map_or("-".to_string(), |value| format!("{value:.digits$}"))
    };
    let failed = entry.failed.as_deref().map(|why| format!(" ({why})")).unwrap_or_default();
    format!(
        "| {}{} | {} | {} - {} | {} | {} | {} |\n",
        entry.who,
        failed.replace(['\n', '|'], " "),
        of(&entry.values, 0.5, 3),
        of(&entry.values, 0.0, 3),
        of(&entry.values, 1.0, 3),
        entry.values.len(),
        of(&entry.cpu, 0.5, 2),
        of(&entry.peak_mb, 0.5, 1)
    )
}

/// The value that the share `at` (0 to 1) of all lies below; the mean of the two in the middle for
/// the median of an even number.
pub fn quantile(values: &[f64], at: f64) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let place = at * (sorted.len().checked_sub(1)?) as f64;
    let low = *sorted.get(place.floor() as usize)?;
    let high = *sorted.get(place.ceil() as usize)?;
    Some(low + (high - low) * place.fract())
}

/// Every contestant once a round, the first one of a round the second of the next. A peer that
/// fails is not asked again; walferry's failure is an error.
pub fn take_turns(options: &Options, mut contestants: Vec<Contestant<'_>>) -> Result<Vec<Entry>> {
    let mut entries: Vec<Entry> = Vec::new();
    let names: Vec<String> = contestants.iter().map(|(who, _)| who.clone()).collect();
    for who in &names {
        entries.push(Entry { who: who.clone(), ..Entry::default() });
    }
    for round in 0..options.rounds {
        for turn in 0..names.len() {
            let place = (turn + round) % names.len();
            let (Some((who, job)), Some(entry)) =
                (contestants.get_mut(place), entries.get_mut(place))
            else {
                continue;
            };
            if entry.failed.is_some() {
                continue;
            }
            match job() {
                Ok(sample) => {
                    println!("  round {} {who}: {:.3}", round + 1, sample.value);
                    add(&mut entries, place, &sample);
                }
                Err(error) if who.starts_with(OURS) => {
                    return Err(error).with_context(|| who.clone());
                }
                Err(error) => {
                    println!("  round {} {who} failed: {error:#}", round + 1);
                    let text = format!("{error:#}");
                    entry.failed = Some(text.chars().take(200).collect());
                }
            }
        }
    }
    Ok(entries)
}

fn add(entries: &mut Vec<Entry>, place: usize, sample: &Sample) {
    let Some(entry) = entries.get_mut(place) else { return };
    entry.values.push(sample.value);
    if sample.usage.peak_rss > 0 {
        entry.cpu.push(sample.usage.cpu);
        entry.peak_mb.push(sample.usage.peak_rss as f64 / f64::from(1 << 20));
    }
    let who = entry.who.clone();
    for (part, value) in &sample.parts {
        let name = format!("{who}: {part}");
        if !entries.iter().any(|entry| entry.who == name) {
            entries.push(Entry { who: name.clone(), ..Entry::default() });
        }
        for entry in entries.iter_mut().filter(|entry| entry.who == name) {
            entry.values.push(*value);
        }
    }
}

/// Writes a scenario's JSON, and the table and the plot of all that lie there.
pub fn write(outcome: &Outcome, results: &Path) -> Result<()> {
    std::fs::create_dir_all(results).with_context(|| results.display().to_string())?;
    let path = results.join(format!("{}.json", outcome.scenario));
    std::fs::write(&path, serde_json::to_string_pretty(outcome)? + "\n")?;
    let mut names: Vec<_> = std::fs::read_dir(results)?
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "json"))
        .collect();
    names.sort();
    let mut outcomes: Vec<Outcome> = Vec::new();
    for name in names {
        let text = std::fs::read_to_string(&name)?;
        outcomes.push(serde_json::from_str(&text).with_context(|| name.display().to_string())?);
    }
    let mut table = String::from("# Results\n\nWritten by `make bench`; see bench/README.md.\n");
    for outcome in &outcomes {
        table.push_str(&format!("\n{}\n{}\n", outcome.markdown(), outcome.machine.text()));
    }
    std::fs::write(results.join("table.md"), table)?;
    std::fs::write(results.join("plot.svg"), crate::plot::svg(&outcomes))?;
    Ok(())
}
