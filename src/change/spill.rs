//! Where changes wait that do not fit into memory and are not wanted yet, as a trait: who collects
//! them and who has a disk are two rooms.

use std::fmt;
use std::io;

use super::Change;

/// Makes files for changes that nobody misses after a crash. All calls of this and of
/// [`SpillFile`] block.
pub trait Spill: fmt::Debug + Send + Sync {
    /// A fresh, empty file, gone when it is dropped or the process ends, however that ends.
    fn create(&self) -> io::Result<Box<dyn SpillFile>>;
}

/// Pieces of one transaction, in order.
pub trait SpillFile: Send + Sync {
    /// Appends a piece. [`io::ErrorKind::StorageFull`] if there is no room for it, on the disk or
    /// within the limit; nothing of it is there then.
    fn append(&mut self, piece: &[Change]) -> io::Result<()>;

    /// The piece at `index`, counted from 0.
    fn read(&mut self, index: usize) -> io::Result<Vec<Change>>;

    /// Forgets all pieces but the first `count`.
    fn truncate(&mut self, count: usize) -> io::Result<()>;
}
