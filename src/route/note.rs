//! What jobs write into the comment of a foreign server while they lead it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// How our comment on a server begins.
const MARK: &str = "walferry: ";

/// Options of a server, by their names.
pub(super) type Options = BTreeMap<String, String>;

/// Our comment while jobs lead a server.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Notes {
    /// The comment as it was.
    pub comment: Option<String>,
    /// By partition; a server of postgres_fdw has one, under an empty name.
    pub led: BTreeMap<String, Note>,
}

/// What one job keeps of what it leads.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Note {
    pub job: String,
    /// The flip that release is to do.
    pub armed: Option<String>,
    /// Our options as they were.
    pub kept: Options,
    /// As they are to be again once clients may write: see `read_only`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<Options>,
}

impl Notes {
    /// What a server's comment says.
    pub(super) fn read(comment: Option<&str>) -> serde_json::Result<Notes> {
        match comment.and_then(|text| text.strip_prefix(MARK)) {
            Some(text) => serde_json::from_str(text),
            None => Ok(Notes { comment: comment.map(str::to_string), ..Notes::default() }),
        }
    }

    /// The comment that says this; none where there was none before.
    pub(super) fn text(&self) -> serde_json::Result<Option<String>> {
        if self.led.is_empty() {
            return Ok(self.comment.clone());
        }
        Ok(Some(format!("{MARK}{}", serde_json::to_string(self)?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_of_several_jobs_come_and_go_and_the_comment_stays() {
        for comment in [None, Some("the shop's own")] {
            let mut notes = Notes::read(comment).unwrap();
            for (partition, job) in [("p0", "one"), ("p1", "two")] {
                let kept = Options::from([(partition.to_string(), "host=a".to_string())]);
                let (job, armed, before) = (job.to_string(), None, None);
                let note = Note { job, armed, kept, before };
                notes.led.insert(partition.to_string(), note);
                notes = Notes::read(notes.text().unwrap().as_deref()).unwrap();
            }
            assert_eq!(notes.led.len(), 2);
            notes.led.clear();
            assert_eq!(notes.text().unwrap().as_deref(), comment);
        }
        assert!(Notes::read(Some("walferry: {")).is_err());
    }
}
