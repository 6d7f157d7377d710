//! The results as one SVG: a group of bars for each scenario, its longest bar as wide as the page,
//! a whisker from the fastest to the slowest round.

use crate::report::{OURS, Outcome, RATE, quantile};

const WIDTH: f64 = 900.0;
const LABEL: f64 = 230.0;
const ROW: f64 = 20.0;

/// All outcomes, one below the other.
pub fn svg(outcomes: &[Outcome]) -> String {
    let mut body = String::new();
    let mut y = 10.0;
    for outcome in outcomes {
        y += 22.0;
        let smoke = if outcome.smoke { " (smoke run, no result)" } else { "" };
        let title = format!("{}: {}, {}{smoke}", outcome.scenario, outcome.title, outcome.unit);
        body.push_str(&format!(
            "<text x=\"10\" y=\"{y}\" font-weight=\"bold\">{}</text>\n",
            escaped(&title)
        ));
        y += 8.0;
        let entries = || outcome.entries.iter().filter(|entry| !entry.who.ends_with(RATE));
        let most = entries().filter_map(|entry| quantile(&entry.values, 1.0));
        let most = most.fold(f64::MIN_POSITIVE, f64::max);
        for entry in entries() {
            let name = escaped(&entry.who);
            body.push_str(&format!("<text x=\"10\" y=\"{}\">{name}</text>\n", y + 14.0));
            if let (Some(low), Some(median), Some(high)) =
                (quantile(&entry.values, 0.0), entry.median(), quantile(&entry.values, 1.0))
            {
                let colour = if entry.who.starts_with(OURS) { "#2b6cb0" } else { "#a0aec0" };
                body.push_str(&bar(y, colour, (low, median, high), most));
            } else {
                body.push_str(&format!("<text x=\"{LABEL}\" y=\"{}\">-</text>\n", y + 14.0));
            }
            y += ROW;
        }
    }
    let height = y + 20.0;
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n{body}</svg>\n"
    )
}

/// One bar with its whisker and its figure.
fn bar(y: f64, colour: &str, (low, median, high): (f64, f64, f64), most: f64) -> String {
    let wide = |value: f64| value / most * (WIDTH - LABEL - 90.0);
    let (from, to, middle) = (LABEL + wide(low), LABEL + wide(high), y + ROW / 2.0);
    format!(
        "<rect x=\"{LABEL}\" y=\"{}\" width=\"{:.1}\" height=\"{}\" fill=\"{colour}\"/>\n\
         <line x1=\"{from:.1}\" x2=\"{to:.1}\" y1=\"{middle}\" y2=\"{middle}\" \
         stroke=\"black\"/>\n<text x=\"{:.1}\" y=\"{}\">{median:.2}</text>\n",
        y + 3.0,
        wide(median).max(1.0),
        ROW - 6.0,
        to + 6.0,
        y + 14.0
    )
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
