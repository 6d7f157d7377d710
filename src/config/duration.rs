//! Durations as people write them.

use std::time::Duration;

/// Nothing here lasts longer, and every clock can count it.
const LONGEST: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// Reads `200ms`, `1s`, `1.5s`, `2m`, `1h`, `7d`; a bare number is seconds. Ten years at the most.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let text = text.trim();
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let number: f64 = number
        .parse()
        .map_err(|_| format!("\"{text}\" is not a duration: use a number and ms, s, m, h or d"))?;
    let seconds = match unit.trim() {
        "ms" => number / 1000.0,
        "" | "s" => number,
        "m" | "min" => number * 60.0,
        "h" => number * 3600.0,
        "d" => number * 24.0 * 3600.0,
        other => return Err(format!("\"{other}\" is not a unit of time: use ms, s, m, h or d")),
    };
    match Duration::try_from_secs_f64(seconds) {
        Ok(duration) if duration <= LONGEST => Ok(duration),
        _ => Err(format!("\"{text}\" is too long: ten years are the most")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_with_their_units() {
        assert_eq!(parse_duration("200ms"), Ok(Duration::from_millis(200)));
        assert_eq!(parse_duration("1.5s"), Ok(Duration::from_millis(1500)));
        assert_eq!(parse_duration("30"), Ok(Duration::from_secs(30)));
        assert_eq!(parse_duration("2m"), Ok(Duration::from_secs(120)));
        assert_eq!(parse_duration("7d"), Ok(Duration::from_secs(604_800)));
        for bad in
            ["", "s", "1x", "-1s", "1e99h", "4000d", "99999999999999999999d", "1.2.3s", "1 2"]
        {
            assert!(parse_duration(bad).is_err(), "{bad}");
        }
    }
}
