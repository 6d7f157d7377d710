//! What a check finds, in the shape `check --json` prints.

use std::fmt;

use serde::Serialize;

pub use crate::fault::Level;

/// Where the object is, and where the fix is to be run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Side {
    /// On the source.
    Source,
    /// On the target.
    Target,
    /// On the machine walferry runs on.
    Here,
}

impl Side {
    /// `source`, `target` or `here`.
    pub fn as_str(self) -> &'static str {
        match self {
            Side::Source => "source",
            Side::Target => "target",
            Side::Here => "here",
        }
    }
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// One thing found.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Finding {
    /// How much it matters.
    pub level: Level,
    /// Where it is.
    pub side: Side,
    /// What kind of thing it is: kebab-case, the same in every release.
    pub code: &'static str,
    /// The object concerned.
    pub object: String,
    /// What is the matter with it.
    pub message: String,
    /// What mends it, ready to paste: statements for psql, one a line, as a superuser or the
    /// object's owner on `side`; a shell command where the side is here.
    pub fix: Option<String>,
}

/// One line, what mends it included.
impl std::fmt::Display for Finding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.place(), self.message)?;
        match &self.fix {
            Some(fix) => write!(f, " (mend it with: {})", fix.replace('\n', " ")),
            None => Ok(()),
        }
    }
}

impl Finding {
    /// The object with its side: both servers have a database, and a role, of the same name.
    pub fn place(&self) -> String {
        match self.side {
            Side::Here => self.object.clone(),
            side if self.object == side.as_str() => self.object.clone(),
            side => format!("{side}: {}", self.object),
        }
    }

    fn new(
        level: Level,
        side: Side,
        code: &'static str,
        object: impl Into<String>,
        message: impl Into<String>,
    ) -> Finding {
        let (object, message) = (object.into(), message.into());
        Finding { level, side, code, object, message, fix: None }
    }

    /// A statement that is to be run on the target.
    pub(in crate::job) fn awaited(message: &str, sql: String) -> Finding {
        Finding::warning(Side::Target, "awaited", "catalogs", message).fix(sql)
    }

    pub(super) fn error(
        side: Side,
        code: &'static str,
        object: impl Into<String>,
        message: impl Into<String>,
    ) -> Finding {
        Finding::new(Level::Error, side, code, object, message)
    }

    pub(super) fn warning(
        side: Side,
        code: &'static str,
        object: impl Into<String>,
        message: impl Into<String>,
    ) -> Finding {
        Finding::new(Level::Warning, side, code, object, message)
    }

    pub(super) fn info(
        side: Side,
        code: &'static str,
        object: impl Into<String>,
        message: impl Into<String>,
    ) -> Finding {
        Finding::new(Level::Info, side, code, object, message)
    }

    pub(super) fn fix(mut self, fix: impl Into<String>) -> Finding {
        self.fix = Some(fix.into());
        self
    }

    pub(super) fn at(mut self, level: Level) -> Finding {
        self.level = level;
        self
    }
}

/// Everything found, worst first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    /// No finding is an error.
    pub ready: bool,
    /// By level, side, code and object.
    pub findings: Vec<Finding>,
}

impl Report {
    pub(super) fn new(mut findings: Vec<Finding>) -> Report {
        findings.sort();
        findings.dedup();
        let ready = findings.iter().all(|f| f.level != Level::Error);
        Report { ready, findings }
    }

    /// True if no finding is an error.
    pub fn ready(&self) -> bool {
        self.ready
    }
}

/// The first few of many names, for a message.
pub(super) fn some(names: &[String]) -> String {
    const SHOWN: usize = 5;
    let shown = names.iter().take(SHOWN).cloned().collect::<Vec<_>>().join(", ");
    match names.len().saturating_sub(SHOWN) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

/// Bytes for people.
pub(super) fn bytes(bytes: u64) -> String {
    const UNITS: [(&str, u64); 4] =
        [("TB", 1 << 40), ("GB", 1 << 30), ("MB", 1 << 20), ("kB", 1 << 10)];
    for (unit, size) in UNITS {
        if bytes >= 10 * size || (bytes >= size && unit == "kB") {
            return format!("{} {unit}", bytes / size);
        }
        if bytes >= size {
            return format!("{:.1} {unit}", bytes as f64 / size as f64);
        }
    }
    format!("{bytes} B")
}

/// Seconds for people.
pub(super) fn seconds(seconds: f64) -> String {
    match seconds {
        s if s < 120.0 => format!("{s:.0} s"),
        s if s < 7200.0 => format!("{:.0} min", s / 60.0),
        s => format!("{:.1} h", s / 3600.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_times_read_well() {
        assert_eq!(bytes(512), "512 B");
        assert_eq!(bytes(2048), "2 kB");
        assert_eq!(bytes(3 << 29), "1.5 GB");
        assert_eq!(bytes(300 << 20), "300 MB");
        assert_eq!(seconds(5.2), "5 s");
        assert_eq!(seconds(600.0), "10 min");
        assert_eq!(seconds(9000.0), "2.5 h");
    }

    #[test]
    fn a_report_is_ready_unless_there_is_an_error() {
        let warning = Finding::warning(Side::Source, "w", "b", "");
        assert!(Report::new(vec![warning.clone()]).ready());
        let error = Finding::error(Side::Target, "e", "a", "");
        let report = Report::new(vec![warning, error]);
        assert!(!report.ready() && report.findings[0].code == "e");
    }
}
