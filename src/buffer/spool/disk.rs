//! The few things a spool asks of a file system, as a trait, so that a test can stand in for it and
//! cut the power between any two of them.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// A directory of segment files. All calls block.
pub trait Disk: Send + Sync + 'static {
    /// An open file.
    type File: DiskFile;

    /// Names of the files there, in no order.
    fn list(&self) -> io::Result<Vec<String>>;

    /// Makes an empty file. Its name is durable after [`Disk::sync_dir`] only.
    fn create(&self, name: &str) -> io::Result<Self::File>;

    /// Opens a file that is there.
    fn open(&self, name: &str) -> io::Result<Self::File>;

    /// Removes a file. Durable after [`Disk::sync_dir`] only.
    fn remove(&self, name: &str) -> io::Result<()>;

    /// Makes names made and removed durable.
    fn sync_dir(&self) -> io::Result<()>;

    /// Where this is, for messages.
    fn place(&self) -> String;
}

/// One file, written at its end and read anywhere.
pub trait DiskFile: Send + 'static {
    /// Appends all of `bytes`. After an error part of them may be there.
    fn append(&mut self, bytes: &[u8]) -> io::Result<()>;

    /// Reads from `offset` on until `buffer` is full or the file ends; gives how many bytes.
    fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<usize>;

    /// Length in bytes.
    fn size(&mut self) -> io::Result<u64>;

    /// Cuts the file; what is appended next begins there.
    fn cut(&mut self, len: u64) -> io::Result<()>;

    /// Makes content and length durable.
    fn sync(&mut self) -> io::Result<()>;
}

/// A directory of the operating system, locked against other processes for as long as this lives.
#[derive(Debug)]
pub struct Directory {
    path: PathBuf,
    _lock: File,
}

/// Held while a process uses the directory.
const LOCK: &str = "lock";

impl Directory {
    /// Makes the directory if need be, and locks it; `None` if another process has it.
    pub fn open(path: &Path) -> io::Result<Option<Directory>> {
        fs::create_dir_all(path)?;
        let lock = OpenOptions::new().create(true).append(true).open(path.join(LOCK))?;
        match lock.try_lock() {
            Ok(()) => Ok(Some(Directory { path: path.to_path_buf(), _lock: lock })),
            Err(fs::TryLockError::WouldBlock) => Ok(None),
            Err(fs::TryLockError::Error(error)) => Err(error),
        }
    }
}

impl Disk for Directory {
    type File = File;

    fn list(&self) -> io::Result<Vec<String>> {
        let names = fs::read_dir(&self.path)?.map(|entry| Ok(entry?.file_name()));
        let names: io::Result<Vec<_>> = names.collect();
        Ok(names?.into_iter().filter_map(|name| name.into_string().ok()).collect())
    }

    fn create(&self, name: &str) -> io::Result<File> {
        // Readable too: one that could not be written whole is looked at again.
        OpenOptions::new().create_new(true).read(true).append(true).open(self.path.join(name))
    }

    fn open(&self, name: &str) -> io::Result<File> {
        OpenOptions::new().read(true).append(true).open(self.path.join(name))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        fs::remove_file(self.path.join(name))
    }

    fn sync_dir(&self) -> io::Result<()> {
        File::open(&self.path)?.sync_all()
    }

    fn place(&self) -> String {
        self.path.display().to_string()
    }
}

impl DiskFile for File {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.write_all(bytes)
    }

    fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        self.seek(SeekFrom::Start(offset))?;
        let mut filled = 0;
        while let Some(rest) = buffer.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            match self.read(rest) {
                Ok(0) => break,
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(filled)
    }

    fn size(&mut self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn cut(&mut self, len: u64) -> io::Result<()> {
        self.set_len(len)?;
        self.sync_all()
    }

    fn sync(&mut self) -> io::Result<()> {
        self.sync_data()
    }
}
