//! Programs walferry runs on this machine.

use super::{Check, Finding, Side};

impl Check<'_> {
    /// A pg_dump that can read the source: of the same major version or newer.
    pub(super) async fn tools(&mut self) {
        let source = self.source.major_version();
        let versions = crate::schema::pg_dump_versions(source).await;
        self.findings.extend(judge(&versions, source));
    }
}

fn judge(versions: &[u32], source: u32) -> Option<Finding> {
    let fix = format!("apt-get install postgresql-client-{source}");
    if versions.is_empty() {
        let message = "is not on this machine: it reads the schema of the source";
        return Some(Finding::error(Side::Here, "pg-dump-missing", "pg_dump", message).fix(fix));
    }
    if versions.iter().any(|version| *version >= source) {
        return None;
    }
    let list: Vec<String> = versions.iter().map(u32::to_string).collect();
    let message = format!(
        "is of version {} here, and cannot read a source of version {source}",
        list.join(", ")
    );
    Some(Finding::error(Side::Here, "pg-dump-old", "pg_dump", message).fix(fix))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pg_dump_has_to_be_as_new_as_the_source() {
        assert_eq!(judge(&[15], 15), None);
        assert_eq!(judge(&[13, 17], 15), None);
        assert_eq!(judge(&[14], 15).unwrap().code, "pg-dump-old");
        let missing = judge(&[], 17).unwrap();
        assert_eq!(missing.code, "pg-dump-missing");
        assert!(missing.fix.unwrap().ends_with("postgresql-client-17"));
    }
}
