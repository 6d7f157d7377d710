//! How long a run will take, said before it begins. From runs on two cores; another machine is
//! another matter, but minutes are told from hours.

use crate::options::Options;

/// Seconds at full scale: the stage, then a round of all contestants.
const SECONDS: [(&str, f64, f64); 9] = [
    ("copy", 60.0, 110.0),
    ("tables", 200.0, 330.0),
    ("catchup", 90.0, 55.0),
    ("shapes", 200.0, 220.0),
    ("large", 60.0, 170.0),
    ("follow", 30.0, 110.0),
    ("far", 80.0, 50.0),
    ("cost", 150.0, 45.0),
    ("growth", 120.0, 45.0),
];

/// What does not shrink with the scale: servers that start, stop and are put back, connections.
const FIXED: (f64, f64) = (8.0, 10.0);

/// `about 12 min: copy 9, follow 3`.
pub fn text(options: &Options) -> String {
    let of = |scenario: &String| -> Option<(&str, f64)> {
        let (name, stage, round) = SECONDS.iter().find(|(name, ..)| name == scenario)?;
        let rounds = options.rounds as f64;
        let scaled = (stage + round * rounds) * options.scale;
        Some((name, scaled + FIXED.0 + FIXED.1 * rounds))
    };
    let each: Vec<(&str, f64)> = options.only.iter().filter_map(of).collect();
    let all: f64 = each.iter().map(|(_, seconds)| seconds).sum();
    let each: Vec<String> = each.iter().map(|(name, s)| format!("{name} {}", time(*s))).collect();
    format!("expected to take about {}: {}", time(all), each.join(", "))
}

fn time(seconds: f64) -> String {
    if seconds < 90.0 { format!("{seconds:.0} s") } else { format!("{:.0} min", seconds / 60.0) }
}
