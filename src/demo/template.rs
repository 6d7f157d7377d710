//! initdb once per version, then copies.
//!
//! initdb takes about a second of processor time and a copy of its result a tenth of that. A copy
//! would have the same system identifier as every other, and walferry tells servers apart by it,
//! so each copy is given one of its own: in pg_control (whose checksum follows) and in the headers
//! of the WAL segments, which the server compares with it when it starts.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{SystemTime, UNIX_EPOCH};

use super::binaries::cache_dir;
use super::server::{own, run_as_postgres};

/// `XLogLongPageHeaderData.xlp_sysid`, after the 24 bytes of the short header.
const WAL_SYSTEM_IDENTIFIER_AT: usize = 24;

/// Makes the cluster directory `data` with the binaries in `bin`. Superuser `postgres`, trust
/// authentication, UTF8, C.UTF-8. Blocks.
pub fn create(bin: &Path, data: &Path) -> io::Result<()> {
    let template = template(bin)?;
    let copied = Command::new("cp")
        .args(["-a", "--reflink=auto"])
        .args([&template, data])
        .stdin(Stdio::null())
        .output()?;
    if !copied.status.success() {
        let said = String::from_utf8_lossy(&copied.stderr).into_owned();
        return Err(io::Error::other(format!("copying {}: {said}", template.display())));
    }
    set_system_identifier(data)
}

/// The directory that initdb made for these binaries; made now if it is not there.
fn template(bin: &Path) -> io::Result<PathBuf> {
    let postgres = bin.join("postgres");
    let about = std::fs::metadata(&postgres)?;
    let mut hasher = DefaultHasher::new();
    (postgres, about.len(), about.modified()?).hash(&mut hasher);
    let templates = cache_dir()?.join("template");
    std::fs::create_dir_all(&templates)?;
    let template = templates.join(format!("{:016x}", hasher.finish()));
    if template.exists() {
        return Ok(template);
    }
    // Made aside and renamed, so that nobody copies half a template.
    let aside = templates.join(format!(".{:016x}", fastrand::u64(..)));
    std::fs::create_dir(&aside)?;
    own(&aside)?;
    run_as_postgres(&bin.join("initdb"), &aside, |c| {
        c.args(["-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C.UTF-8", "-N", "-D"]);
        c.arg(aside.join("data"));
    })?;
    // Another process may have been quicker; its template is as good.
    let renamed = std::fs::rename(aside.join("data"), &template);
    std::fs::remove_dir_all(&aside)?;
    if template.exists() { Ok(template) } else { renamed.map(|()| template) }
}

/// Gives a cluster that is shut down an identifier as initdb would: seconds since 1970 in the upper
/// half, chance in the lower.
fn set_system_identifier(data: &Path) -> io::Result<()> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let identifier = ((now.as_secs() << 32) | u64::from(fastrand::u32(..))).to_ne_bytes();
    let path = data.join("global/pg_control");
    let mut control = std::fs::read(&path)?;
    // Where the checksum stands differs between versions: it is the word that fits what is
    // before it.
    let crc_at = (64..512)
        .step_by(4)
        .find(|at| {
            let crc = control.get(*at..*at + 4).and_then(|b| b.try_into().ok());
            control.get(..*at).map(crc32c) == crc.map(u32::from_ne_bytes)
        })
        .ok_or_else(|| io::Error::other(format!("no checksum in {}", path.display())))?;
    put(&mut control, 0, &identifier)?;
    let crc = crc32c(control.get(..crc_at).unwrap_or_default());
    put(&mut control, crc_at, &crc.to_ne_bytes())?;
    std::fs::write(&path, control)?;
    for entry in std::fs::read_dir(data.join("pg_wal"))? {
        let entry = entry?;
        if entry.file_type()?.is_file() {
            let mut segment = std::fs::read(entry.path())?;
            put(&mut segment, WAL_SYSTEM_IDENTIFIER_AT, &identifier)?;
            std::fs::write(entry.path(), segment)?;
        }
    }
    Ok(())
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) -> io::Result<()> {
    let place = bytes.get_mut(at..at + value.len());
    place.ok_or_else(|| io::Error::other("file too short"))?.copy_from_slice(value);
    Ok(())
}

/// CRC-32C (Castagnoli), bit by bit: it runs over 300 bytes.
fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            (crc >> 1) ^ (if crc & 1 == 1 { 0x82f6_3b78 } else { 0 })
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crc32c_gives_the_check_value_of_its_definition() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    }
}
