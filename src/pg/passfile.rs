//! The password file, `~/.pgpass` unless PGPASSFILE or passfile names another.
//!
//! <https://www.postgresql.org/docs/current/libpq-pgpass.html>

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::secret::SecretString;

/// A password file as it was when the connection string was read.
#[derive(Clone, Debug)]
pub struct PassFile {
    path: PathBuf,
    entries: Vec<Entry>,
    problem: Option<String>,
}

#[derive(Clone, Debug)]
struct Entry {
    /// Host, port, database, user; `None` is the wildcard `*`.
    fields: [Option<String>; 4],
    password: SecretString,
}

impl PassFile {
    /// Reads the file; one that is not there or may not be used is remembered as empty, with the
    /// reason in [`PassFile::problem`], because most connections need no password. Blocks shortly.
    pub fn read(path: &Path, explicit: bool) -> PassFile {
        let mut file = PassFile { path: path.to_path_buf(), entries: Vec::new(), problem: None };
        match Self::contents(path) {
            Ok(Some(text)) => file.entries = text.lines().filter_map(Entry::read).collect(),
            Ok(None) if explicit => {
                file.problem = Some(format!("password file {} does not exist", path.display()));
            }
            Ok(None) => {}
            Err(problem) => file.problem = Some(problem),
        }
        file
    }

    fn contents(path: &Path) -> Result<Option<String>, String> {
        let shown = path.display();
        let metadata = match std::fs::metadata(path) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(format!("password file {shown} cannot be used: {error}")),
        };
        if !metadata.is_file() {
            return Err(format!("password file {shown} is not a plain file"));
        }
        if metadata.mode() & 0o077 != 0 {
            return Err(format!(
                "password file {shown} is open to group or others and therefore not used: \
                 chmod 0600 {shown}"
            ));
        }
        let text = std::fs::read(path);
        let text = text.map_err(|e| format!("password file {shown} cannot be read: {e}"))?;
        Ok(Some(String::from_utf8_lossy(&text).into_owned()))
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Why the file was not used, if it was there or asked for and was not.
    pub fn problem(&self) -> Option<&str> {
        self.problem.as_deref()
    }

    /// The password of the first line that matches. A directory of Unix sockets that is the
    /// usual one also matches `localhost`.
    pub fn find(&self, host: &str, port: u16, dbname: &str, user: &str) -> Option<&SecretString> {
        let port = port.to_string();
        let local = matches!(host, "/var/run/postgresql" | "/run/postgresql" | "/tmp");
        let matches = |entry: &&Entry| {
            let [in_host, in_port, in_dbname, in_user] = &entry.fields;
            let is =
                |field: &Option<String>, value: &str| field.as_deref().is_none_or(|f| f == value);
            (is(in_host, host) || (local && is(in_host, "localhost")))
                && is(in_port, &port)
                && is(in_dbname, dbname)
                && is(in_user, user)
        };
        self.entries.iter().find(matches).map(|entry| &entry.password)
    }
}

impl Entry {
    /// `host:port:database:user:password`, with `\:` and `\\` escaped; `None` for anything else.
    fn read(line: &str) -> Option<Entry> {
        if line.starts_with('#') {
            return None;
        }
        let mut rest = line;
        let mut fields = [const { None }; 4];
        for field in &mut fields {
            let (text, tail) = cut(rest)?;
            let wild = rest.starts_with("*:");
            *field = (!wild).then_some(text);
            rest = tail;
        }
        let mut password = String::new();
        let mut chars = rest.chars();
        while let Some(c) = chars.next() {
            password.extend(if c == '\\' { chars.next() } else { Some(c) });
        }
        // An empty password is none, as in libpq.
        (!password.is_empty()).then(|| Entry { fields, password: SecretString::from(password) })
    }
}

/// The unescaped text up to the next plain `:`, and what follows it.
fn cut(text: &str) -> Option<(String, &str)> {
    let mut field = String::new();
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '\\' => field.extend(chars.next().map(|(_, escaped)| escaped)),
            ':' => return Some((field, text.get(at + 1..)?)),
            c => field.push(c),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::secret::ExposeSecret;

    fn file(text: &str) -> PassFile {
        let entries = text.lines().filter_map(Entry::read).collect();
        PassFile { path: PathBuf::from("x"), entries, problem: None }
    }

    #[test]
    fn the_first_matching_line_counts() {
        let file = file("# h:1:d:u:no\nh:1:d:u:exact\n\nh:*:*:u:wild\nlocalhost:*:*:*:local\n");
        let find = |h, p, d, u| file.find(h, p, d, u).map(|s| s.expose_secret().to_string());
        assert_eq!(find("h", 1, "d", "u").as_deref(), Some("exact"));
        assert_eq!(find("h", 2, "d", "u").as_deref(), Some("wild"));
        assert_eq!(find("/var/run/postgresql", 2, "d", "x").as_deref(), Some("local"));
        assert_eq!(find("other", 1, "d", "u"), None);
    }

    #[test]
    fn escapes_stand_for_the_character_itself() {
        let file = file("\\:\\:1:5:\\*:u\\\\v:p\\:w\\\\x:y");
        assert_eq!(file.find("::1", 5, "d", "u\\v").map(|_| ()), None);
        let found = file.find("::1", 5, "*", "u\\v").unwrap();
        assert_eq!(found.expose_secret(), "p:w\\x:y");
    }

    #[test]
    fn lines_that_are_not_entries_are_passed_over() {
        assert!(file("garbage\na:b:c\nh:1:d:u:\n").find("h", 1, "d", "u").is_none());
    }
}
