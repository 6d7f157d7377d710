//! The states of a task, and of the job that it is a part of.
//!
//! ```text
//! init ──▶ running ──▶ completed ──▶ canceled   rolled back
//!   ▲         │  ▲
//!   │reset    ▼  │ the same command takes a dead runner's tasks up again
//!   └────── error            init, running and error can be canceled
//! ```

use std::fmt;
use std::str::FromStr;

use serde::Serialize;

/// Where a task stands. Stored in `walferry.cluster_task.state`; each change of it is kept in
/// `walferry.cluster_history`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum TaskState {
    /// Set by planning, and by a reset. Nothing exists of it on any node.
    Init,
    /// Set by the runner before it makes anything. A crash leaves it so, and the next runner goes
    /// on with the task's own job from where that stands.
    Running,
    /// Set by the runner once clients are on the target, durably.
    Completed,
    /// Set by the runner with the reason. What was made is still there, until a reset.
    Error,
    /// Set by cancel, and by a rollback of what was completed. Nothing of it is left but, after a
    /// rollback, the target's rows.
    Canceled,
}

const ALL: [(TaskState, &str); 5] = [
    (TaskState::Init, "init"),
    (TaskState::Running, "running"),
    (TaskState::Completed, "completed"),
    (TaskState::Error, "error"),
    (TaskState::Canceled, "canceled"),
];

impl TaskState {
    /// As it is stored and printed.
    pub fn as_str(self) -> &'static str {
        ALL.iter().find(|(state, _)| *state == self).map_or("", |(_, name)| name)
    }

    /// The states that this one may follow.
    pub fn follows(self) -> &'static [TaskState] {
        use TaskState::{Canceled, Completed, Error, Init, Running};
        match self {
            Init => &[Error, Canceled],
            Running => &[Init, Running],
            // A runner that found its task switched when it looked again.
            Completed => &[Running],
            Error => &[Running],
            Canceled => &[Init, Running, Error, Completed],
        }
    }

    /// Nothing more is done about it unless somebody says so.
    pub fn is_over(self) -> bool {
        matches!(self, TaskState::Completed | TaskState::Error | TaskState::Canceled)
    }

    /// The state of a job with tasks in these states. An error anywhere shows, and so does work
    /// that is under way or left.
    pub fn of_job(states: &[TaskState]) -> TaskState {
        use TaskState::{Canceled, Completed, Error, Init, Running};
        let any = |state| states.contains(&state);
        match () {
            () if any(Error) => Error,
            () if any(Running) => Running,
            () if any(Init) && any(Completed) => Running,
            () if any(Init) => Init,
            () if any(Completed) => Completed,
            () => Canceled,
        }
    }
}

impl fmt::Display for TaskState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for TaskState {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let found = ALL.iter().find(|(_, name)| *name == text).map(|(state, _)| *state);
        found.ok_or_else(|| format!("\"{text}\" is not a task's state of this version of walferry"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_completed_task_is_never_run_again_without_having_been_rolled_back() {
        for (state, name) in ALL {
            assert_eq!(name.parse::<TaskState>().unwrap(), state);
        }
        assert!("done".parse::<TaskState>().is_err());
        assert!(!TaskState::Running.follows().contains(&TaskState::Completed));
        assert!(!TaskState::Init.follows().contains(&TaskState::Completed));
        // Nor is one whose leavings have not been taken away.
        assert!(!TaskState::Running.follows().contains(&TaskState::Error));
        assert!(!TaskState::Running.follows().contains(&TaskState::Canceled));
        // Every state can be reached from init, and init again from every end but completed.
        let leads =
            |from: TaskState| ALL.iter().filter(move |(to, _)| to.follows().contains(&from));
        let mut seen = vec![TaskState::Init];
        for at in 0..ALL.len() {
            let next: Vec<TaskState> =
                seen.get(at).into_iter().flat_map(|s| leads(*s)).map(|(s, _)| *s).collect();
            seen.extend(next.into_iter().filter(|s| !seen.contains(s)).collect::<Vec<_>>());
        }
        assert_eq!(seen.iter().collect::<std::collections::HashSet<_>>().len(), ALL.len());
    }

    #[test]
    fn a_job_shows_the_worst_of_its_tasks() {
        use TaskState::*;
        for (tasks, job) in [
            (vec![Init, Init], Init),
            (vec![Completed, Init], Running),
            (vec![Completed, Running], Running),
            (vec![Completed, Error, Running], Error),
            (vec![Completed, Completed], Completed),
            (vec![Completed, Canceled], Completed),
            (vec![Canceled, Canceled], Canceled),
        ] {
            assert_eq!(TaskState::of_job(&tasks), job, "{tasks:?}");
        }
    }
}
