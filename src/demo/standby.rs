//! Standbys of throw-away servers: made, promoted, made again of what was the primary.

use std::io;
use std::path::Path;
use std::process::{Command, Stdio};

use super::binaries;
use super::server::{Server, run_as_postgres};

impl Server {
    /// A standby of this server, streaming from it, taking read-only sessions. Made by
    /// pg_basebackup where that is beside the server's binaries (Debian's packages have it), as a
    /// copy of the files otherwise, which takes 15 or newer. Blocks.
    pub fn standby(&self, settings: &[&str]) -> io::Result<Server> {
        let standby = Self::claim(&self.bin)?;
        self.feed(&standby, settings)?;
        Ok(standby)
    }

    /// Makes a server that is down a standby of `primary`, on its old port. What it had is gone.
    pub fn rejoin(&self, primary: &Server, settings: &[&str]) -> io::Result<()> {
        std::fs::remove_dir_all(self.data_dir())?;
        primary.feed(self, settings)
    }

    fn feed(&self, standby: &Server, settings: &[&str]) -> io::Result<()> {
        let program = self.bin.join("pg_basebackup");
        if program.exists() {
            run_as_postgres(&program, &standby.dir, |c| {
                c.args(["-R", "-X", "stream", "-c", "fast", "-N", "-d"]).arg(self.uri("postgres"));
                c.arg("-D").arg(standby.data_dir());
            })?;
        } else {
            self.copy_to(standby)?;
        }
        standby.configure_place()?;
        standby.configure(settings)?;
        standby.resume()
    }

    /// A base backup of this server with a port of its own, not started, made with these arguments
    /// of pg_basebackup, which has to be beside the server's binaries. Blocks.
    pub fn base_backup(&self, arguments: &[&str]) -> io::Result<Server> {
        let backup = Self::claim(&self.bin)?;
        run_as_postgres(&self.bin.join("pg_basebackup"), &backup.dir, |c| {
            c.args(arguments).args(["-c", "fast", "-N", "-d"]).arg(self.uri("postgres"));
            c.arg("-D").arg(backup.data_dir());
        })?;
        backup.configure_place()?;
        Ok(backup)
    }

    /// The files of this server, which has to be down, with a port of their own, not started: as a
    /// storage snapshot has them. Blocks.
    pub fn copy(&self) -> io::Result<Server> {
        let copy = Self::claim(&self.bin)?;
        run_as_postgres(Path::new("cp"), &copy.dir, |c| {
            c.arg("-a").args([self.data_dir(), copy.data_dir()]);
        })?;
        copy.configure_place()?;
        Ok(copy)
    }

    /// A base backup by hand, within one psql session, and what makes it a standby.
    ///
    /// <https://www.postgresql.org/docs/current/continuous-archiving.html#BACKUP-LOWLEVEL-BASE-BACKUP>
    fn copy_to(&self, standby: &Server) -> io::Result<()> {
        let (from, to) = (self.data_dir(), standby.data_dir());
        let label = standby.dir.join("label");
        let script = format!(
            "select pg_backup_start('standby', true);\n\\! cp -a {0} {1} 2>/dev/null; \
             rm -rf {1}/postmaster.* {1}/pg_replslot/*\n\\o {2}\n\
             select rtrim(labelfile, E'\\n') from pg_backup_stop(false);\n\\o\n",
            from.display(),
            to.display(),
            label.display()
        );
        let mut psql = Command::new(binaries::client("psql")?)
            .args(["-X", "-A", "-t", "-q", "-v", "ON_ERROR_STOP=1", "-d"])
            .arg(self.uri("postgres"))
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()?;
        if let Some(mut stdin) = psql.stdin.take() {
            io::Write::write_all(&mut stdin, script.as_bytes())?;
        }
        if !psql.wait()?.success() {
            return Err(io::Error::other("the base backup failed"));
        }
        standby.write_data_file("backup_label", &std::fs::read_to_string(label)?)?;
        standby.write_data_file("standby.signal", "")?;
        let uri = format!("host=127.0.0.1 port={} user=postgres dbname=postgres", self.port());
        standby.follow(&uri)
    }

    /// Where a standby gets its log from, once it has read its settings again. As pg_basebackup
    /// does, in the file that is read last.
    pub fn follow(&self, conninfo: &str) -> io::Result<()> {
        let path = self.data_dir().join("postgresql.auto.conf");
        let mut file = std::fs::OpenOptions::new().append(true).open(path)?;
        io::Write::write_all(&mut file, format!("primary_conninfo = '{conninfo}'\n").as_bytes())
    }

    /// Makes a standby a primary; blocks until it is.
    pub fn promote(&self) -> io::Result<()> {
        match self.psql("postgres", "select pg_promote(true, 60)")?.as_str() {
            "t" => Ok(()),
            _ => Err(self.failure("the standby was not promoted")),
        }
    }
}
