//! Sizes as people and PostgreSQL write them.

/// Reads `512MB`, `10GB`, `1.5TB`, `64kB`; a bare number is bytes. Units are PostgreSQL's: powers
/// of 1024.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let number: f64 = number
        .parse()
        .map_err(|_| format!("\"{text}\" is not a size: use a number and kB, MB, GB or TB"))?;
    let power = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" => 10,
        "m" | "mb" => 20,
        "g" | "gb" => 30,
        "t" | "tb" => 40,
        other => return Err(format!("\"{other}\" is not a unit of size: use kB, MB, GB or TB")),
    };
    let bytes = number * (1_u64 << power) as f64;
    if bytes > 1e18 { Err(format!("\"{text}\" is too large")) } else { Ok(bytes as u64) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_with_their_units() {
        assert_eq!(parse_size("64kB"), Ok(65536));
        assert_eq!(parse_size("1.5 MB"), Ok(1_572_864));
        assert_eq!(parse_size("10GB"), Ok(10 << 30));
        assert_eq!(parse_size("7"), Ok(7));
        for bad in ["", "MB", "1x", "-1MB", "99999999TB"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }
}
