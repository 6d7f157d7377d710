//! What was asked for: by `make bench` in variables, as cargo hands its own arguments through.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};

/// Every scenario, in the order of the table.
pub const SCENARIOS: [&str; 9] =
    ["copy", "tables", "catchup", "shapes", "large", "follow", "far", "cost", "growth"];

/// How large everything is, how often, and where results go.
#[derive(Clone, Debug)]
pub struct Options {
    /// 1 is the size of the table in the README; sizes are multiplied by it.
    pub scale: f64,
    /// How often each contestant is timed.
    pub rounds: usize,
    /// Which scenarios run.
    pub only: Vec<String>,
    /// Which of the shapes; empty means all.
    pub shapes: Vec<String>,
    /// Which peers run beside walferry; empty means all that are installed.
    pub peers: Vec<String>,
    /// A short run that shows that the bench works: bars are not judged, nothing is kept.
    pub smoke: bool,
    /// Where results are written.
    pub results: PathBuf,
}

impl Options {
    /// From the environment. Without cargo's `--bench` this is an ordinary test run, and short.
    pub fn read() -> Result<Options> {
        let is_bench = std::env::args().any(|argument| argument == "--bench");
        let scale = variable("SCALE")?.unwrap_or(if is_bench { 1.0 } else { 0.01 });
        let rounds = variable("ROUNDS")?.unwrap_or(if is_bench { 5 } else { 1 });
        if scale <= 0.0 || rounds == 0 {
            bail!("SCALE and ROUNDS are above 0");
        }
        let mut only = list("ONLY");
        if only.is_empty() {
            let all: &[&str] = if is_bench { &SCENARIOS } else { &["copy", "catchup", "follow"] };
            only = all.iter().map(ToString::to_string).collect();
        }
        let shapes = shapes_of(&mut only);
        if let Some(unknown) = only.iter().find(|name| !SCENARIOS.contains(&name.as_str())) {
            bail!("no scenario {unknown:?}: ONLY takes {}", SCENARIOS.join(", "));
        }
        let smoke = scale < 0.5;
        let kept = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("bench/results");
        let passing = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("bench");
        let results = if smoke { passing } else { kept };
        Ok(Options { scale, rounds, only, shapes, peers: list("PEERS"), smoke, results })
    }

    /// True if a shape of this name is wanted.
    pub fn wants_shape(&self, shape: &str) -> bool {
        self.shapes.is_empty() || self.shapes.iter().any(|wanted| wanted == shape)
    }

    /// `full` at this scale, at least `least`.
    pub fn sized(&self, full: u64, least: u64) -> u64 {
        ((full as f64 * self.scale).round() as u64).max(least)
    }

    /// True if a peer of this name is wanted. `native, binary` goes by its first word.
    pub fn wants(&self, peer: &str) -> bool {
        let name = peer.split([',', ' ']).next().unwrap_or(peer);
        self.peers.is_empty() || self.peers.iter().any(|wanted| wanted == name)
    }
}

/// `shapes-deletes` is the scenario `shapes`, once, with deletes alone.
fn shapes_of(only: &mut Vec<String>) -> Vec<String> {
    let mut shapes = Vec::new();
    only.retain_mut(|name| {
        let Some(shape) = name.strip_prefix("shapes-").map(str::to_string) else { return true };
        shapes.push(shape);
        *name = "shapes".to_string();
        shapes.len() == 1
    });
    shapes
}

fn variable<T>(name: &str) -> Result<Option<T>>
where
    T: std::str::FromStr<Err: std::error::Error + Send + Sync + 'static>,
{
    match std::env::var(name) {
        Ok(text) if !text.is_empty() => {
            Ok(Some(text.parse().with_context(|| format!("{name}={text} is no number"))?))
        }
        _ => Ok(None),
    }
}

fn list(name: &str) -> Vec<String> {
    let text = std::env::var(name).unwrap_or_default();
    text.split([',', ' ']).filter(|word| !word.is_empty()).map(ToString::to_string).collect()
}
