//! Numbers and documents on standard output.

use std::sync::{Arc, Mutex, PoisonError};

use serde::Serialize;
use serde_json::Value;

use crate::job::Notice;
use crate::job::run::Report;

/// What a runner says goes to standard error, and what keeps it from its work, once; its progress
/// does not.
pub fn sayings() -> Report {
    let trouble = Mutex::new(String::new());
    Arc::new(move |notice| match notice {
        Notice::Said(text) => eprintln!("{text}"),
        Notice::Trouble(text) => {
            let mut last = trouble.lock().unwrap_or_else(PoisonError::into_inner);
            if *last != text {
                eprintln!("trying again: {text}");
                *last = text;
            }
        }
        _ => {}
    })
}

/// One JSON document and a newline on standard output.
pub fn json<T: Serialize>(value: &T) -> anyhow::Result<()> {
    println!("{}", serde_json::to_string_pretty(value)?);
    Ok(())
}

/// The text at a JSON pointer; empty where there is none.
pub fn text<'a>(value: &'a Value, pointer: &str) -> &'a str {
    value.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

/// The number at a JSON pointer; 0 where there is none.
pub fn number(value: &Value, pointer: &str) -> f64 {
    value.pointer(pointer).and_then(Value::as_f64).unwrap_or_default()
}

/// The list at a JSON pointer; empty where there is none.
pub fn list<'a>(value: &'a Value, pointer: &str) -> &'a [Value] {
    value.pointer(pointer).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default()
}

/// The steps of a flip's outcome, with their times.
pub fn steps(outcome: &Value) {
    for step in list(outcome, "/steps") {
        println!("{:>10.1} ms  {}", number(step, "/ms"), text(step, "/name"));
    }
}

/// Bytes for people: `1.2 GB`, in powers of 1000 as disks are sold.
pub fn bytes(count: u64) -> String {
    let units = ["B", "kB", "MB", "GB", "TB"];
    let mut value = count as f64;
    let mut unit = 0;
    while value >= 1000.0 && unit + 1 < units.len() {
        value /= 1000.0;
        unit += 1;
    }
    let name = units.get(unit).unwrap_or(&"B");
    if unit == 0 { format!("{count} B") } else { format!("{value:.1} {name}") }
}

/// A count with thin groups: `1,234,567`.
pub fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_grouped_and_scaled() {
        assert_eq!(count(0), "0");
        assert_eq!(count(1234567), "1,234,567");
        assert_eq!(bytes(999), "999 B");
        assert_eq!(bytes(1_250_000), "1.2 MB");
    }
}
