//! What is seen of tasks while they run: for people, and stored for whoever asks elsewhere.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::store::TaskRow;
use crate::cluster::TaskState;
use crate::copy::CopyProgress;
use crate::job::{Notice, Phase};

/// One task under way. Written by its runner, read by the cluster's.
#[derive(Debug, Default)]
pub(super) struct View {
    seen: Mutex<Seen>,
}

#[derive(Debug, Default)]
struct Seen {
    phase: Option<Phase>,
    copy: Option<Arc<CopyProgress>>,
    /// What it is at, or waits for.
    note: Option<String>,
}

impl View {
    /// Takes in what the task's runner says. Gives what is worth a line.
    pub(super) fn notice(&self, notice: Notice) -> Option<String> {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        match notice {
            Notice::Phase(phase) => {
                seen.phase = Some(phase);
                seen.note = None;
                Some(phase.to_string())
            }
            Notice::Copying(progress) => {
                seen.copy = Some(progress);
                None
            }
            Notice::Building(done, total, _) => {
                seen.note = Some(format!("building {done} of {total} indexes and constraints"));
                None
            }
            Notice::Trouble(text) => {
                let new = seen.note.as_deref() != Some(&text);
                seen.note = Some(text.clone());
                new.then(|| format!("trying again: {text}"))
            }
            Notice::Said(text) => Some(text),
            Notice::Copied | Notice::Lag { .. } | Notice::Flows(_) => None,
            Notice::Ended => Some("ended by finish or cancel".to_string()),
        }
    }

    /// What it is at.
    pub(super) fn note(&self, note: &str) {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).note = Some(note.to_string());
    }

    /// The phase was seen to be this.
    pub(super) fn phase(&self, phase: Phase) {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).phase = Some(phase);
    }

    /// As [`super::ClusterStore::save_views`] takes it, of a task with so many bytes.
    pub(super) fn row(&self, task: u32, bytes: u64) -> Value {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let copied = seen.phase.is_some_and(|phase| phase >= Phase::CatchingUp);
        let copy = seen.copy.as_ref().map(|copy| copy.snapshot());
        let fraction = if copied { 1.0 } else { copy.as_ref().map_or(0.0, |copy| copy.fraction) };
        let left = copy.filter(|_| !copied).and_then(|copy| copy.left);
        json!({
            "task": task,
            "phase": seen.phase.map(|phase| phase.to_string()),
            "note": seen.note,
            "processed": (fraction * bytes as f64) as u64,
            "left_seconds": left.map(|left| left.as_secs_f64()),
        })
    }
}

/// How far a job is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Overview {
    /// Bytes of its tasks, canceled ones left out.
    pub total_bytes: u64,
    /// Bytes of them that are on the target.
    pub processed_bytes: u64,
    /// Tasks that are completed.
    pub completed: usize,
    /// Tasks, canceled ones left out.
    pub tasks: usize,
    /// Time left at the speed since the run began; `None` while nothing can be said.
    pub left: Option<Duration>,
}

impl Overview {
    /// Of these tasks. `begun`: when the run began, and what was processed then.
    pub fn of(tasks: &[TaskRow], begun: Option<(Instant, u64)>) -> Overview {
        let counted = || tasks.iter().filter(|task| task.state != TaskState::Canceled);
        let processed = |task: &TaskRow| match task.state {
            TaskState::Completed => task.errand.bytes,
            _ => task.processed_bytes.min(task.errand.bytes),
        };
        let total_bytes: u64 = counted().map(|task| task.errand.bytes).sum();
        let processed_bytes: u64 = counted().map(processed).sum();
        let left = begun.and_then(|(since, before)| {
            let done = processed_bytes.checked_sub(before).filter(|done| *done > 0)?;
            let speed = done as f64 / since.elapsed().as_secs_f64().max(1e-3);
            let left = total_bytes.saturating_sub(processed_bytes) as f64 / speed;
            Duration::try_from_secs_f64(left).ok()
        });
        let completed = counted().filter(|task| task.state == TaskState::Completed).count();
        Overview { total_bytes, processed_bytes, completed, tasks: counted().count(), left }
    }

    /// 0 to 100.
    pub fn percent(&self) -> f64 {
        match self.total_bytes {
            0 if self.completed == self.tasks => 100.0,
            0 => 0.0,
            total => self.processed_bytes as f64 / total as f64 * 100.0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::Errand;

    fn row(state: TaskState, bytes: u64, processed_bytes: u64) -> TaskRow {
        TaskRow {
            task: 1,
            name: "c1t1_a".to_string(),
            state,
            errand: Errand { bytes, ..Errand::default() },
            shape: None,
            made_database: false,
            way_back: false,
            phase: None,
            note: None,
            error: None,
            processed_bytes,
            left_seconds: None,
            held_ms: None,
            started_at: None,
            ended_at: None,
        }
    }

    #[test]
    fn what_is_left_is_told_by_the_speed_of_this_run_alone() {
        use TaskState::{Canceled, Completed, Running};
        let tasks = [row(Completed, 100, 0), row(Running, 300, 50), row(Canceled, 999, 999)];
        let all = Overview::of(&tasks, None);
        assert_eq!((all.total_bytes, all.processed_bytes, all.left), (400, 150, None));
        assert_eq!((all.completed, all.tasks, all.percent()), (1, 2, 37.5));
        let begun = Instant::now().checked_sub(Duration::from_secs(10)).unwrap();
        let left = Overview::of(&tasks, Some((begun, 100))).left.unwrap();
        assert!((45..60).contains(&left.as_secs()), "50 bytes in 10 s, 250 are left: {left:?}");
        assert_eq!(Overview::of(&tasks, Some((begun, 150))).left, None, "nothing has moved yet");
        assert_eq!(Overview::of(&[], None).percent(), 100.0);
    }

    #[test]
    fn a_copy_that_is_over_is_whole_whatever_was_counted() {
        let view = View::default();
        assert_eq!(view.row(7, 100)["processed"], 0);
        assert_eq!(view.notice(Notice::Phase(Phase::Copying)).as_deref(), Some("copying"));
        let said = view.notice(Notice::Trouble("gone".to_string()));
        assert_eq!(said.as_deref(), Some("trying again: gone"));
        assert_eq!(view.notice(Notice::Trouble("gone".to_string())), None, "once is enough");
        assert_eq!(view.row(7, 100)["note"], "gone");
        view.notice(Notice::Phase(Phase::CatchingUp));
        let row = view.row(7, 100);
        assert_eq!(
            (&row["task"], &row["processed"], &row["note"]),
            (&7.into(), &100.into(), &Value::Null)
        );
    }
}
