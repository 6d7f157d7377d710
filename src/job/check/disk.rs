//! Disk on this machine: whether a spool may be where it is wanted, and what is free under the
//! target's data directory, which SQL does not show: read where the target is
//! on this very machine and we may look, else left unsaid. A port of this machine may lead to a
//! container or through a tunnel, so the directory is believed only if its postmaster is the parent
//! of our own session's backend.

use std::path::Path;

use super::end::End;
use super::{Finding, Side, finding::bytes};

/// Room for the tables but not for their indexes and the WAL of writing them is too little too.
const SPARE: u64 = 2;

/// What the disk says of a target that has to hold so many bytes more; `None` if it is not here.
pub(super) async fn room(target: &End, needed: u64) -> Option<Finding> {
    let dir = target.setting("data_directory").filter(|dir| !dir.is_empty())?;
    // Tables go to another disk then.
    if target.setting("default_tablespace").is_some_and(|name| !name.is_empty()) {
        return None;
    }
    if !is_here(dir, target.session.process_id()) {
        return None;
    }
    let mut asking = tokio::process::Command::new("df");
    let output = asking.args(["-P", "-k", dir]).output().await.ok()?;
    let free = available(&String::from_utf8_lossy(&output.stdout))?;
    Some(judged(dir, free, needed))
}

/// Why a spool cannot be kept in this directory, which is made with it; tried by a file that goes
/// again at once.
pub(super) fn unfit_spool(dir: &Path) -> Option<Finding> {
    let there = dir.ancestors().find(|dir| dir.exists()).unwrap_or(dir);
    let probe = there.join(format!(".walferry-probe-{:016x}", fastrand::u64(..)));
    let error = std::fs::File::create_new(&probe).err();
    let _ = std::fs::remove_file(&probe);
    let message = format!(
        "the spool cannot be kept there, as nothing can be written to {}: {}; give --buffer \
         spool:DIR a directory that this user may write to",
        there.display(),
        error?
    );
    let object = format!("directory {}", dir.display());
    Some(Finding::error(Side::Here, "spool-directory", object, message))
}

fn judged(dir: &str, free: u64, needed: u64) -> Finding {
    let measured = format!("{} free, and the tables take {}", bytes(free), bytes(needed));
    if free >= needed.saturating_mul(SPARE) {
        return Finding::info(Side::Target, "disk", dir, measured);
    }
    let message = format!(
        "{measured}, without their indexes and the WAL of writing them: make room there, or leave \
         tables out"
    );
    // No error: single tables may have a tablespace of their own, and file systems compress.
    Finding::warning(Side::Target, "disk", dir, message)
}

/// The server whose data directory this is on this machine is the one we are talking to.
fn is_here(dir: &str, backend: i32) -> bool {
    let postmaster = || {
        let text = std::fs::read_to_string(Path::new(dir).join("postmaster.pid")).ok()?;
        text.lines().next()?.trim().parse::<i32>().ok()
    };
    let parent = || {
        let text = std::fs::read_to_string(format!("/proc/{backend}/stat")).ok()?;
        // The name, in parentheses, may hold anything; behind it: state, parent.
        text.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse::<i32>().ok()
    };
    postmaster().is_some_and(|postmaster| parent() == Some(postmaster))
}

/// Bytes that `df -P -k` calls available.
fn available(output: &str) -> Option<u64> {
    let kib: u64 = output.lines().nth(1)?.split_whitespace().nth(3)?.parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::super::Level;
    use super::*;

    #[test]
    fn a_directory_that_takes_no_spool_is_found_before_anything_is_made() {
        let dir = std::env::temp_dir().join(format!("walferry-fit-{:016x}", fastrand::u64(..)));
        assert_eq!(unfit_spool(&dir.join("a/b")), None);
        assert!(!dir.exists());
        std::fs::write(&dir, "").unwrap();
        let finding = unfit_spool(&dir).unwrap();
        std::fs::remove_file(&dir).unwrap();
        assert_eq!((finding.level, finding.side), (Level::Error, Side::Here));
        assert!(finding.message.contains("--buffer spool:DIR"), "{finding}");
        assert!(unfit_spool(Path::new("/proc/nowhere")).is_some());
    }

    #[test]
    fn what_df_says_is_read_and_judged() {
        let said = "Filesystem 1024-blocks Used Available Capacity Mounted on\n\
                    /dev/sda1 1000 900 100 90% /var\n";
        assert_eq!(available(said), Some(102_400));
        assert_eq!(available("df: no such file\n"), None);
        let level = |free, needed| judged("/d", free, needed).level;
        assert_eq!(level(199, 100), Level::Warning);
        assert_eq!(level(200, 100), Level::Info);
        let said = judged("/d", 1 << 20, 1 << 30).message;
        assert!(said.contains("make room"), "{said}");
    }
}
