//! Whole jobs beside the peers: `make bench`, or `make bench-copy` and so on for one scenario.
//!
//! Why it exists: "faster than" is a promise, and this is the command that can fail it. Two servers
//! on this machine, every contestant given the same ones (`pair`, `stage`), the same tables and the
//! same writes (`data`), in turns within one run, so that a busy minute hits all alike. A time
//! counts once the end states were compared by `demo::compare`, which knows nothing of walferry.
//!
//! - `copying`: copy, tables, cost. `catchup`: catchup, shapes, large, far, growth. `follow`.
//! - `report`, `plot`, `machine`, `forecast`: medians beside bars; a table, a plot, the conditions,
//!   and how long it will take.
//!
//! Exit code 1 if a bar is missed, or cannot be judged because a peer is missing; 2 if a job failed
//! or an end state was wrong. Below half the full size it is a smoke run: only failures count. Not
//! a part of `make test` yet.
//! Left out: peers that need a server of their own, and networks other than a delay.

mod catchup;
mod copying;
mod data;
mod follow;
mod forecast;
mod machine;
mod options;
mod pair;
mod plot;
mod process;
mod report;
mod stage;

use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;

use crate::machine::Machine;
use crate::options::Options;
use crate::report::Outcome;

fn main() -> ExitCode {
    // `cargo test --all-targets` starts benches too, without this; the smoke run is not part of it yet.
    if !std::env::args().any(|argument| argument == "--bench") {
        return ExitCode::SUCCESS;
    }
    match bench() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::from(2)
        }
    }
}

/// True if every bar was met, or none was judged.
fn bench() -> Result<bool> {
    let options = Options::read()?;
    println!("scale {}, {} rounds; {}", options.scale, options.rounds, forecast::text(&options));
    let mut good = true;
    for scenario in &options.only {
        let (machine, begun) = (Machine::describe(options.smoke)?, Instant::now());
        for outcome in run(scenario, &options, &machine)? {
            println!("\n{}\n{}\n", outcome.markdown(), machine.text());
            report::write(&outcome, &options.results)?;
            good &= outcome.bars.iter().all(|bar| bar.is_met() == Some(true));
        }
        println!("{scenario} took {:.0} s", begun.elapsed().as_secs_f64());
    }
    println!("written to {}", options.results.display());
    if options.smoke {
        println!("a smoke run: bars were not judged");
    }
    Ok(good || options.smoke)
}

fn run(scenario: &str, options: &Options, machine: &Machine) -> Result<Vec<Outcome>> {
    match scenario {
        "copy" => copying::copy(options, machine),
        "tables" => copying::tables(options, machine),
        "catchup" => catchup::catchup(options, machine),
        "shapes" => catchup::shapes(options, machine),
        "large" => catchup::large(options, machine),
        "follow" => follow::follow(options, machine),
        "far" => catchup::far(options, machine),
        "cost" => copying::cost(options, machine),
        _ => catchup::growth(options, machine),
    }
}
