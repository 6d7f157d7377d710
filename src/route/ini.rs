//! pgbouncer.ini: one line of its `[databases]` found and rewritten, every other byte kept.
//!
//! <https://www.pgbouncer.org/config.html#section-databases>

/// Where a line of `[databases]` leads. `None`: the key is not in the line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Words {
    pub host: Option<String>,
    pub port: Option<String>,
    pub dbname: Option<String>,
}

impl Words {
    /// The same with pgbouncer's defaults filled in: host (empty: a Unix socket), port, database.
    pub(super) fn resolved(&self, name: &str) -> (String, String, String) {
        let or = |value: &Option<String>, default: &str| {
            value.clone().unwrap_or_else(|| default.to_string())
        };
        (or(&self.host, ""), or(&self.port, "5432"), or(&self.dbname, name))
    }
}

/// The byte range (without its line end) of the line of database `name`, the last one if there
/// are several: pgbouncer lets the last one win.
pub(super) fn find(text: &[u8], name: &str) -> Option<std::ops::Range<usize>> {
    let mut in_databases = false;
    let mut found = None;
    let mut start = 0;
    for line in text.split_inclusive(|b| *b == b'\n') {
        let end = start + line.trim_ascii_end().len();
        let body = line.trim_ascii();
        if body.starts_with(b"[") {
            in_databases = body == b"[databases]";
        } else if in_databases
            && std::str::from_utf8(body).is_ok_and(|body| name_of(body).as_deref() == Some(name))
        {
            found = Some(start..end);
        }
        start += line.len();
    }
    found
}

/// A setting of `[pgbouncer]`, the last one if it is there more than once.
pub(super) fn setting(text: &[u8], key: &str) -> Option<String> {
    let mut section = &b""[..];
    let mut found = None;
    for line in text.split(|b| *b == b'\n').map(|line| line.trim_ascii()) {
        if line.starts_with(b"[") {
            section = line;
        }
        let pair = std::str::from_utf8(line).ok().and_then(|line| line.split_once('='));
        if let (b"[pgbouncer]", Some((name, value))) = (section, pair)
            && name.trim() == key
        {
            found = Some(value.trim().to_string());
        }
    }
    found
}

/// True if the file brings in others.
pub(super) fn has_include(text: &[u8]) -> bool {
    text.split(|b| *b == b'\n').any(|line| line.trim_ascii().starts_with(b"%include"))
}

/// The database's name at the head of a trimmed line; `None` for comments and anything else.
fn name_of(line: &str) -> Option<String> {
    if line.starts_with([';', '#', '%']) {
        return None;
    }
    let (key, _) = line.split_at(equals(line)?);
    let key = key.trim();
    match key.strip_prefix('"').and_then(|k| k.strip_suffix('"')) {
        Some(quoted) => Some(quoted.replace("\"\"", "\"")),
        None => Some(key.to_string()),
    }
}

/// Where the `=` after the name stands; one inside a quoted name does not count.
fn equals(line: &str) -> Option<usize> {
    let mut quoted = false;
    line.bytes().position(|b| {
        quoted ^= b == b'"';
        b == b'=' && !quoted
    })
}

/// A `key=value` of the line's connection string, by byte positions in the line.
struct Pair {
    key: String,
    value: String,
    /// From the key's first byte to the value's end.
    start: usize,
    value_start: usize,
    end: usize,
}

/// The pairs of a line; `None` if it is not understood to its end.
fn pairs(line: &str) -> Option<Vec<Pair>> {
    let mut at = equals(line)? + 1;
    let mut pairs = Vec::new();
    loop {
        let rest = line.get(at..)?;
        at += rest.len() - rest.trim_start().len();
        let start = at;
        let rest = line.get(at..)?;
        if rest.is_empty() {
            return Some(pairs);
        }
        let (key, after) = rest.split_once('=')?;
        let key = key.trim();
        let value = after.trim_start();
        // An unquoted value that is empty would swallow whatever is put behind it.
        let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
        if key.is_empty() || !key.bytes().all(word) || value.is_empty() {
            return None;
        }
        let value_start = line.len() - value.len();
        let (value, len) = read_value(value)?;
        at = value_start + len;
        pairs.push(Pair { key: key.to_string(), value, start, value_start, end: at });
    }
}

/// A value and the bytes it takes: up to a space, or in single quotes with `''` for one of them.
fn read_value(text: &str) -> Option<(String, usize)> {
    let Some(body) = text.strip_prefix('\'') else {
        let end = text.find(char::is_whitespace).unwrap_or(text.len());
        return Some((text.get(..end)?.to_string(), end));
    };
    let mut value = String::new();
    let mut chars = body.char_indices().peekable();
    while let Some((at, c)) = chars.next() {
        if c != '\'' {
            value.push(c);
        } else if chars.next_if(|(_, next)| *next == '\'').is_some() {
            value.push('\'');
        } else {
            return Some((value, at + 2));
        }
    }
    None
}

/// Where the line leads.
pub(super) fn words(line: &str) -> Option<Words> {
    let pairs = pairs(line)?;
    let get = |key: &str| pairs.iter().rfind(|p| p.key == key).map(|p| p.value.clone());
    Some(Words { host: get("host"), port: get("port"), dbname: get("dbname") })
}

/// The line leading to `to`, everything else in it kept as it is: user, pool_size, spacing.
/// Values that are right already keep their spelling, also where the default says the same.
pub(super) fn lead_to(line: &str, name: &str, to: &Words) -> Option<String> {
    let mut line = line.to_string();
    let (host, port, dbname) = to.resolved(name);
    for (key, wanted, resolved) in
        [("host", &to.host, host), ("port", &to.port, port), ("dbname", &to.dbname, dbname)]
    {
        let default = match key {
            "port" => "5432",
            "dbname" => name,
            _ => "",
        };
        let found: Vec<Pair> = pairs(&line)?.into_iter().filter(|p| p.key == key).collect();
        match (found.last(), wanted) {
            (Some(pair), _) if pair.value == resolved => {}
            (Some(pair), Some(value)) => {
                line.replace_range(pair.value_start..pair.end, &quote(value));
            }
            (Some(pair), None) => {
                let head = line.get(..pair.start)?.trim_end().len();
                line.replace_range(head..pair.end, "");
            }
            (None, _) if resolved == default => {}
            (None, _) => line.push_str(&format!(" {key}={}", quote(&resolved))),
        }
    }
    Some(line)
}

fn quote(value: &str) -> String {
    let plain = !value.is_empty() && !value.contains(|c: char| c.is_whitespace() || c == '\'');
    if plain { value.to_string() } else { format!("'{}'", value.replace('\'', "''")) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn to(host: &str, port: &str, dbname: &str) -> Words {
        let some = |text: &str| Some(text.to_string());
        Words { host: some(host), port: some(port), dbname: some(dbname) }
    }

    fn line_of<'t>(text: &'t str, name: &str) -> Option<&'t str> {
        find(text.as_bytes(), name).map(|range| &text[range])
    }

    #[test]
    fn the_line_is_found_in_its_section_only() {
        let text = "; shop = no\nshop = before\n[pgbouncer]\nshop = no\n[databases]\r\n\
                    # shop = no\nother = host=a\n  shop = host=b  \r\n\"we=ird \"\" db\" = host=c\n\
                    [users]\nshop = no";
        assert_eq!(line_of(text, "shop"), Some("  shop = host=b"));
        assert_eq!(line_of(text, "we=ird \" db"), Some("\"we=ird \"\" db\" = host=c"));
        assert_eq!(line_of(text, "none"), None);
        assert_eq!(line_of("[databases]\na = host=x\na = host=y", "a"), Some("a = host=y"));
    }

    #[test]
    fn settings_are_read_in_their_section_only() {
        let text = b"[databases]\nx = 1\n[pgbouncer]\n;x = 2\n x=3 \r\n[users]\nx = 4";
        assert_eq!(setting(text, "x").as_deref(), Some("3"));
        assert_eq!(setting(text, "y"), None);
    }

    #[test]
    fn only_host_port_and_dbname_change() {
        let new = to("10.0.0.2", "6000", "shop2");
        for (line, becomes) in [
            (
                "shop = host=a port=1  user=u password='p  w' dbname=shop pool_size=7",
                "shop = host=10.0.0.2 port=6000  user=u password='p  w' dbname=shop2 pool_size=7",
            ),
            ("shop=", "shop= host=10.0.0.2 port=6000 dbname=shop2"),
            (
                "shop = user='it''s host=x' host = 'a b'",
                "shop = user='it''s host=x' host = 10.0.0.2 port=6000 dbname=shop2",
            ),
        ] {
            assert_eq!(lead_to(line, "shop", &new).as_deref(), Some(becomes));
            assert_eq!(lead_to(becomes, "shop", &new).as_deref(), Some(becomes));
        }
        assert_eq!(
            lead_to("shop = host=a", "shop", &to("a", "5432", "shop")).unwrap(),
            "shop = host=a"
        );
        assert_eq!(lead_to("shop = host='open", "shop", &new), None);
        assert_eq!(lead_to("shop = garbage", "shop", &new), None);
    }

    #[test]
    fn what_was_not_in_the_line_is_taken_out_again() {
        let bare = words("shop = user=u").unwrap();
        let line = lead_to("shop = user=u", "shop", &to("h", "6", "d")).unwrap();
        assert_eq!(line, "shop = user=u host=h port=6 dbname=d");
        assert_eq!(lead_to(&line, "shop", &bare).unwrap(), "shop = user=u");
    }

    proptest! {
        #[test]
        fn any_host_survives_being_written(host in "[ -~]{1,12}", line in "db = [ -~]{0,40}") {
            if let Some(written) = lead_to(&line, "db", &to(&host, "1", "x")) {
                let read = words(&written).unwrap();
                prop_assert_eq!(read.host.as_deref(), Some(host.as_str()));
                prop_assert_eq!(read.port.as_deref(), Some("1"));
            }
        }
    }
}
