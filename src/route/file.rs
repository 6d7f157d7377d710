//! pgbouncer.ini on disk: read, and replaced whole or not at all.

use std::io::Write;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use super::ini::{self, Words};
use super::{Error, Result};

/// pgbouncer.ini as read, with the place of the one line.
pub(super) struct File {
    place: Replaced,
    text: Vec<u8>,
    range: std::ops::Range<usize>,
    name: String,
}

impl File {
    /// Reads the file and finds the line of database `name`.
    pub(super) fn read(path: &Path, name: &str) -> Result<File> {
        let wrong = |detail: String| Error::File { path: path.to_path_buf(), detail };
        let path = path.canonicalize().map_err(|e| wrong(format!("{e}; is it the right path?")))?;
        let text = std::fs::read(&path).map_err(|e| wrong(e.to_string()))?;
        let Some(range) = ini::find(&text, name) else {
            let more = match ini::has_include(&text) {
                true => "; if it is in a file that %include brings in, give that file's path",
                false => "; add one (a \"*\" line cannot be switched)",
            };
            return Err(wrong(format!("[databases] has no line for \"{name}\"{more}")));
        };
        let place = Replaced { path: path.clone(), owner_of: path };
        Ok(File { place, text, range, name: name.to_string() })
    }

    fn wrong(&self, detail: &str) -> Error {
        let detail = format!("the line of \"{}\" {detail}", self.name);
        Error::File { path: self.place.path.clone(), detail }
    }

    pub(super) fn line(&self) -> Result<&str> {
        let line = self.text.get(self.range.clone()).and_then(|l| std::str::from_utf8(l).ok());
        line.ok_or_else(|| self.wrong("is not UTF-8"))
    }

    pub(super) fn words(&self) -> Result<Words> {
        let words = ini::words(self.line()?);
        words.ok_or_else(|| self.wrong("is not key=value pairs; put it right"))
    }

    pub(super) fn lead_to(&self, to: &Words) -> Result<String> {
        let line = ini::lead_to(self.line()?, &self.name, to);
        line.ok_or_else(|| self.wrong("is not key=value pairs; put it right"))
    }

    pub(super) fn with_line(&self, line: &str) -> Result<()> {
        let mut text = self.text.clone();
        text.splice(self.range.clone(), line.bytes());
        let mode = std::fs::metadata(&self.place.path).map_or(0o600, |m| m.mode() & 0o7777);
        self.place.write(&text, mode)
    }

    /// Makes the temporary file that a change would need, and takes it away again.
    pub(super) fn replaceable(&self) -> Result<()> {
        let temporary = self.place.temporary();
        let made = self.place.prepare(&temporary, b"", 0o600);
        let _ = std::fs::remove_file(&temporary);
        made.map_err(|error| self.place.failed(error))
    }
}

/// A file written whole or not at all, with the owner of another.
pub(super) struct Replaced {
    pub path: PathBuf,
    pub owner_of: PathBuf,
}

impl Replaced {
    pub(super) fn write(&self, text: &[u8], mode: u32) -> Result<()> {
        let temporary = self.temporary();
        let replace = || {
            self.prepare(&temporary, text, mode)?;
            std::fs::rename(&temporary, &self.path)?;
            let dir = self.path.parent().unwrap_or(Path::new("/"));
            std::fs::File::open(dir)?.sync_all()
        };
        replace().map_err(|error| {
            let _ = std::fs::remove_file(&temporary);
            self.failed(error)
        })
    }

    fn temporary(&self) -> PathBuf {
        let mut name = std::ffi::OsString::from(".");
        name.push(self.path.file_name().unwrap_or_default());
        name.push(format!(".{:016x}", fastrand::u64(..)));
        self.path.with_file_name(name)
    }

    /// Never more open than `mode`, also while it is being written: it may hold passwords.
    fn prepare(&self, temporary: &Path, text: &[u8], mode: u32) -> std::io::Result<()> {
        let owner = std::fs::metadata(&self.owner_of)?;
        let mut options = std::fs::OpenOptions::new();
        let mut file = options.write(true).create_new(true).mode(0o600).open(temporary)?;
        let made = file.metadata()?;
        if (made.uid(), made.gid()) != (owner.uid(), owner.gid()) {
            chown(temporary, Some(owner.uid()), Some(owner.gid()))?;
        }
        file.set_permissions(PermissionsExt::from_mode(mode))?;
        file.write_all(text)?;
        file.sync_all()
    }

    fn failed(&self, error: std::io::Error) -> Error {
        let detail = format!(
            "cannot be replaced: {error}; run walferry as the file's owner or as root, with its \
             directory writable (in a container mount the directory, not the file)"
        );
        Error::File { path: self.path.clone(), detail }
    }
}
