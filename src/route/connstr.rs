//! A connection string of key=value pairs: where it leads, and the same leading elsewhere with
//! every other byte kept.
//!
//! <https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-CONNSTRING>

use super::place::Place;

/// A pair, by byte positions.
struct Pair {
    key: String,
    value: String,
    value_start: usize,
    end: usize,
}

/// The pairs; `None` if the text is not understood to its end, as a URI is not.
fn pairs(text: &str) -> Option<Vec<Pair>> {
    let mut pairs = Vec::new();
    let mut at = 0;
    loop {
        let rest = text.get(at..)?;
        let rest = rest.trim_start();
        if rest.is_empty() {
            return Some(pairs);
        }
        let (key, after) = rest.split_once('=')?;
        let key = key.trim_end();
        if key.is_empty() || !key.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_') {
            return None;
        }
        let value_start = text.len() - after.trim_start().len();
        let (value, length) = read_value(text.get(value_start..)?)?;
        at = value_start + length;
        pairs.push(Pair { key: key.to_string(), value, value_start, end: at });
    }
}

/// A value and the bytes it takes; a backslash takes the next character as it is.
fn read_value(text: &str) -> Option<(String, usize)> {
    let quoted = text.starts_with('\'');
    let mut value = String::new();
    let mut chars = text.char_indices().skip(usize::from(quoted));
    while let Some((at, c)) = chars.next() {
        match c {
            '\\' => value.push(chars.next()?.1),
            '\'' if quoted => return Some((value, at + 1)),
            c if !quoted && c.is_whitespace() => return Some((value, at)),
            c => value.push(c),
        }
    }
    (!quoted).then_some((value, text.len()))
}

fn quote(value: &str) -> String {
    let odd = |c: char| c.is_whitespace() || c == '\'' || c == '\\';
    if !value.is_empty() && !value.contains(odd) {
        return value.to_string();
    }
    format!("'{}'", value.replace('\\', "\\\\").replace('\'', "\\'"))
}

/// Where the text leads; a part that is not in it is empty.
pub(super) fn place(text: &str) -> Option<Place> {
    let pairs = pairs(text)?;
    let get = |key: &str| pairs.iter().rfind(|p| p.key == key).map(|p| p.value.clone());
    Some(Place {
        host: get("host").unwrap_or_default(),
        port: get("port").unwrap_or_default(),
        dbname: get("dbname").unwrap_or_default(),
    })
}

/// The text leading to `to`; a value that is right keeps its spelling. `hostaddr` would go before
/// host, so it is turned to nothing.
pub(super) fn lead_to(text: &str, to: &Place) -> Option<String> {
    let mut text = text.to_string();
    let wanted = [("host", &to.host), ("port", &to.port), ("dbname", &to.dbname)];
    for (key, value) in wanted {
        // libpq takes the last of several.
        match pairs(&text)?.into_iter().rfind(|pair| pair.key == key) {
            Some(pair) if pair.value == *value => {}
            Some(pair) => text.replace_range(pair.value_start..pair.end, &quote(value)),
            None if value.is_empty() => {}
            None => text.push_str(&format!(" {key}={}", quote(value))),
        }
    }
    if let Some(pair) = pairs(&text)?.into_iter().rfind(|pair| pair.key == "hostaddr") {
        text.replace_range(pair.value_start..pair.end, "''");
    }
    Some(text)
}

/// What makes sessions of a connection string read-only unless they say otherwise.
const READ_ONLY: &str = "-c default_transaction_read_only=true";

/// The text with sessions that only read; its other options stay.
pub(super) fn read_only(text: &str) -> Option<String> {
    let mut led = text.to_string();
    match pairs(text)?.into_iter().rfind(|pair| pair.key == "options") {
        Some(pair) => {
            let value = format!("{} {READ_ONLY}", pair.value);
            led.replace_range(pair.value_start..pair.end, &quote(value.trim_start()));
        }
        None => led.push_str(&format!(" options={}", quote(READ_ONLY))),
    }
    Some(led)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn to(host: &str, port: &str, dbname: &str) -> Place {
        let [host, port, dbname] = [host, port, dbname].map(str::to_string);
        Place { host, port, dbname }
    }

    #[test]
    fn other_options_are_kept_as_they_are_written() {
        let text = "host = old dbname='db 16' port=3433 user=d options='-c a=\\'b\\''";
        assert_eq!(place(text).unwrap(), to("old", "3433", "db 16"));
        let led = lead_to(text, &to("new", "5432", "db 16")).unwrap();
        assert_eq!(led, "host = new dbname='db 16' port=5432 user=d options='-c a=\\'b\\''");
        assert_eq!(lead_to("user=u", &to("h", "1", "d")).unwrap(), "user=u host=h port=1 dbname=d");
        assert_eq!(lead_to("hostaddr=1.2.3.4", &to("h", "", "")).unwrap(), "hostaddr='' host=h");
        for odd in ["postgres://h/d", "host='", "=x", "host=a\\", "port"] {
            assert_eq!(place(odd), None, "{odd}");
        }
    }

    #[test]
    fn sessions_are_made_read_only_beside_what_they_were() {
        let made = |text: &str| read_only(text).unwrap();
        assert_eq!(made("host=h"), format!("host=h options='{READ_ONLY}'"));
        assert_eq!(made("options='' host=h"), format!("options='{READ_ONLY}' host=h"));
        let led = made("options='-c a=\\'b\\'' port=1");
        assert_eq!(led, format!("options='-c a=\\'b\\' {READ_ONLY}' port=1"));
        assert_eq!(read_only("postgres://h/d"), None);
    }

    proptest! {
        #[test]
        fn whatever_it_led_to_it_leads_to_the_new_place(
            host in "[a-z' \\\\]{1,8}", dbname in "[a-zA-Z' \\\\]{1,8}", text in ".{0,30}"
        ) {
            let wanted = to(&host, "5433", &dbname);
            if let Some(led) = lead_to(&text, &wanted) {
                prop_assert_eq!(place(&led), Some(wanted));
            }
        }
    }
}
