//! A disk in memory that remembers every call, and what a power cut can leave of them.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex};

use super::disk::{Disk, DiskFile};
use crate::lsn::Lsn;

/// One call that changes the disk, or a note of the test's own.
#[derive(Clone, Debug)]
pub enum Op {
    Create(String),
    Append(usize, Vec<u8>),
    Cut(usize, u64),
    Sync(usize),
    Remove(String),
    SyncDir,
    /// So many items were acknowledged as durable; everything below the position is released.
    Note {
        acknowledged: Lsn,
        released: Lsn,
    },
}

/// A file's content as programs see it, and what of it a power cut cannot take.
#[derive(Clone, Debug, Default)]
struct Inode {
    seen: Vec<u8>,
    durable: Vec<u8>,
}

#[derive(Clone, Debug, Default)]
pub struct World {
    inodes: Vec<Inode>,
    names: BTreeMap<String, usize>,
    durable_names: BTreeMap<String, usize>,
}

/// A power cut tears writes at these boundaries.
const SECTOR: usize = 512;

impl World {
    pub fn apply(&mut self, op: &Op) {
        match op {
            Op::Create(name) => {
                self.names.insert(name.clone(), self.inodes.len());
                self.inodes.push(Inode::default());
            }
            Op::Append(inode, bytes) => self.inodes[*inode].seen.extend_from_slice(bytes),
            Op::Cut(inode, len) => {
                let inode = &mut self.inodes[*inode];
                inode.seen.truncate(*len as usize);
                inode.durable = inode.seen.clone();
            }
            Op::Sync(inode) => {
                let inode = &mut self.inodes[*inode];
                inode.durable = inode.seen.clone();
            }
            Op::Remove(name) => {
                self.names.remove(name);
            }
            Op::SyncDir => self.durable_names = self.names.clone(),
            Op::Note { .. } => {}
        }
    }

    /// What a new process finds when only the process died.
    pub fn killed(&self) -> World {
        self.clone()
    }

    /// What is there after a power cut that took everything not durable.
    pub fn cut_hard(&self) -> World {
        let mut world = World { names: self.durable_names.clone(), ..self.clone() };
        for inode in &mut world.inodes {
            inode.seen = inode.durable.clone();
        }
        world
    }

    /// What is there after a power cut that took some of it: any of the sectors, any of the names.
    pub fn cut_at_random(&self, random: &mut fastrand::Rng) -> World {
        let mut world = self.clone();
        world.names.clear();
        let all = self.names.iter().chain(&self.durable_names);
        for (name, inode) in all {
            let sure = self.names.get(name) == self.durable_names.get(name);
            if sure || random.bool() {
                world.names.insert(name.clone(), *inode);
            }
        }
        for inode in &mut world.inodes {
            let len = random.usize(inode.durable.len()..=inode.seen.len());
            let len = if random.bool() { inode.seen.len() } else { len };
            let mut left = inode.seen[..len].to_vec();
            let mut at = inode.durable.len();
            while at < len {
                let end = ((at / SECTOR + 1) * SECTOR).min(len);
                match random.u8(0..6) {
                    0 => left[at..end].fill(0),
                    1 => left[at..end].iter_mut().for_each(|byte| *byte = random.u8(..)),
                    _ => {}
                }
                at = end;
            }
            left[..inode.durable.len()].copy_from_slice(&inode.durable);
            inode.seen = left;
        }
        world
    }

    /// Where every bit of a file can be flipped.
    pub fn file_mut(&mut self, name: &str) -> &mut Vec<u8> {
        &mut self.inodes[self.names[name]].seen
    }

    pub fn files(&self) -> Vec<String> {
        self.names.keys().cloned().collect()
    }
}

#[derive(Default)]
struct Inner {
    world: World,
    ops: Vec<Op>,
    /// Appends fail for want of space once so many bytes are there.
    room: Option<usize>,
    sync_fails: bool,
}

/// The disk. Clones are the same disk.
#[derive(Clone, Default)]
pub struct SimDisk {
    inner: Arc<Mutex<Inner>>,
}

impl SimDisk {
    /// After a crash.
    pub fn of(world: World) -> SimDisk {
        let durable: Vec<Inode> = world
            .inodes
            .iter()
            .map(|inode| Inode { seen: inode.seen.clone(), durable: inode.seen.clone() })
            .collect();
        let durable_names = world.names.clone();
        let world = World { inodes: durable, durable_names, ..world };
        SimDisk { inner: Arc::new(Mutex::new(Inner { world, ..Inner::default() })) }
    }

    pub fn ops(&self) -> Vec<Op> {
        self.inner.lock().unwrap().ops.clone()
    }

    pub fn world(&self) -> World {
        self.inner.lock().unwrap().world.clone()
    }

    pub fn note(&self, acknowledged: Lsn, released: Lsn) {
        self.act(Op::Note { acknowledged, released });
    }

    pub fn set_room(&self, bytes: Option<usize>) {
        self.inner.lock().unwrap().room = bytes;
    }

    pub fn fail_syncs(&self) {
        self.inner.lock().unwrap().sync_fails = true;
    }

    fn act(&self, op: Op) {
        let mut inner = self.inner.lock().unwrap();
        inner.world.apply(&op);
        inner.ops.push(op);
    }
}

pub struct SimFile {
    disk: SimDisk,
    inode: usize,
}

impl Disk for SimDisk {
    type File = SimFile;

    fn list(&self) -> io::Result<Vec<String>> {
        Ok(self.world().files())
    }

    fn create(&self, name: &str) -> io::Result<SimFile> {
        let inode = self.inner.lock().unwrap().world.inodes.len();
        assert!(!self.world().names.contains_key(name), "{name} is there already");
        self.act(Op::Create(name.to_string()));
        Ok(SimFile { disk: self.clone(), inode })
    }

    fn open(&self, name: &str) -> io::Result<SimFile> {
        let inode = self.inner.lock().unwrap().world.names.get(name).copied();
        let inode = inode.ok_or(io::ErrorKind::NotFound)?;
        Ok(SimFile { disk: self.clone(), inode })
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.act(Op::Remove(name.to_string()));
        Ok(())
    }

    fn sync_dir(&self) -> io::Result<()> {
        self.act(Op::SyncDir);
        Ok(())
    }

    fn place(&self) -> String {
        "sim".to_string()
    }
}

impl DiskFile for SimFile {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        let room = self.disk.inner.lock().unwrap().room;
        let world = self.disk.world();
        let used: usize = world.names.values().map(|inode| world.inodes[*inode].seen.len()).sum();
        if let Some(room) = room.filter(|room| used + bytes.len() > *room) {
            let part = bytes[..room.saturating_sub(used)].to_vec();
            self.disk.act(Op::Append(self.inode, part));
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.disk.act(Op::Append(self.inode, bytes.to_vec()));
        Ok(())
    }

    fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        let inner = self.disk.inner.lock().unwrap();
        let seen = &inner.world.inodes[self.inode].seen;
        let rest = seen.get(offset as usize..).unwrap_or_default();
        let count = rest.len().min(buffer.len());
        buffer[..count].copy_from_slice(&rest[..count]);
        Ok(count)
    }

    fn size(&mut self) -> io::Result<u64> {
        Ok(self.disk.inner.lock().unwrap().world.inodes[self.inode].seen.len() as u64)
    }

    fn cut(&mut self, len: u64) -> io::Result<()> {
        self.disk.act(Op::Cut(self.inode, len));
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        if self.disk.inner.lock().unwrap().sync_fails {
            return Err(io::Error::other("the disk says no"));
        }
        self.disk.act(Op::Sync(self.inode));
        Ok(())
    }
}
