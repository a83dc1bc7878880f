//! A run as tasks: on many machines, by whatever starts processes there.
//!
//! A **plan** is a folder in a store. `lookalike plan --plan` writes into it, once, what a run would do; tasks read it, do their share of a step, and
//! leave what they made beside the others'; a commit publishes what the tasks of a stage have made, and says what the next one
//! consists of. Nothing else is shared, and nobody waits for anybody: an engine (Airflow, Ray, Kubernetes, a shell) starts the steps
//! one after the other, and each step's tasks in any order.
//!
//! ```text
//! plan ─► embed ×n ─► commit embed ─► sort ×n ─► commit sort ─► probe ×n ─► join ×n ─► merge ×n ─► commit neighbors ─► flag ×n ─► commit flag
//! ```
//!
//! - What a step consists of depends on the plan and the tables, not on how many tasks there are. Task `i` of `n` does a contiguous
//!   share of it ([`Share`]), so 1, 3 or 1,000 tasks make the same rows.
//! - A task that is started twice, or again, finds what is done and does the rest; two at once do some work twice and nothing wrong.
//! - A task or commit that comes too early says so and fails with the exit code for "again later". One whose plan no longer fits the
//!   source or the tables says so and fails for good: a new plan is made in no time.
//!
//! Documents of a plan's folder: `plan.json`, by `plan`; `sort.json`, `neighbors.json` and `flag.json`, each by the commit before the
//! step; `embed.done.json` and so on, by the commits, with what they published; `shuffle/`, on its way between the steps of the
//! neighbors, taken away by their commit; `reference.parquet`, where rows are flagged by all of them.

pub mod documents;
pub mod steps;

use std::ffi::OsString;
use std::num::NonZeroUsize;
use std::ops::Range;

use crate::error::{Error, ExitStatus};

pub use documents::{Plan, PlanFolder};

/// Units named in the error about missing ones.
const EXAMPLES_NAMED: usize = 8;

/// Where the index of a task comes from, in the order in which they are looked at: the variables of Kubernetes (an indexed job), AWS
/// Batch, Cloud Run, Slurm and Google Batch. With each: that of the number of tasks, and that of the first index, where there are such.
const VARIABLES: [Variables; 5] = [
    Variables { index: "JOB_COMPLETION_INDEX", count: None, first: None },
    Variables { index: "AWS_BATCH_JOB_ARRAY_INDEX", count: Some("AWS_BATCH_JOB_ARRAY_SIZE"), first: None },
    Variables { index: "CLOUD_RUN_TASK_INDEX", count: Some("CLOUD_RUN_TASK_COUNT"), first: None },
    Variables {
        index: "SLURM_ARRAY_TASK_ID",
        count: Some("SLURM_ARRAY_TASK_COUNT"),
        first: Some("SLURM_ARRAY_TASK_MIN"),
    },
    Variables { index: "BATCH_TASK_INDEX", count: Some("BATCH_TASK_COUNT"), first: None },
];

struct Variables {
    index: &'static str,
    count: Option<&'static str>,
    first: Option<&'static str>,
}

/// Task `index` of `count`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    index: usize,
    count: NonZeroUsize,
}

impl Share {
    /// All of it.
    pub const WHOLE: Self = Self { index: 0, count: NonZeroUsize::MIN };

    /// The share that the command line names; what it leaves open is taken from the variables of the engine that started this process,
    /// and without any, there is one task. Returns what the share was found by, too.
    pub fn find(
        index: Option<usize>,
        count: Option<NonZeroUsize>,
        variable: impl Fn(&str) -> Option<OsString>,
    ) -> Result<(Self, String), Error> {
        let number = |name: &str| -> Result<Option<usize>, Error> {
            let Some(text) = variable(name) else { return Ok(None) };
            let text = text.to_string_lossy().into_owned();
            text.trim().parse().map(Some).map_err(|_| Error::Usage {
                message: format!("the variable {name} is `{text}`, which is no number of a task"),
                hint: "set --task-index and --task-count".to_owned(),
            })
        };
        let mut found = (index, count, "--task-index".to_owned());
        if index.is_none() {
            for variables in &VARIABLES {
                let Some(index) = number(variables.index)? else { continue };
                let first = variables.first.map(number).transpose()?.flatten().unwrap_or(0);
                let counted = variables.count.map(number).transpose()?.flatten().and_then(NonZeroUsize::new);
                found = (Some(index.saturating_sub(first)), count.or(counted), variables.index.to_owned());
                break;
            }
        }
        let (index, count, found_by) = match found {
            (Some(index), Some(count), found_by) => (index, count, found_by),
            (None, None, _) => (0, NonZeroUsize::MIN, "there is one task".to_owned()),
            (Some(_), None, found_by) => {
                return Err(Error::Usage {
                    message: format!("{found_by} gives the number of this task, and nothing says how many there are"),
                    hint: "set --task-count".to_owned(),
                });
            }
            (None, Some(_), _) => {
                let names: Vec<&str> = VARIABLES.iter().map(|variables| variables.index).collect();
                return Err(Error::Usage {
                    message: "--task-count is given, and nothing says which task this is".to_owned(),
                    hint: format!("set --task-index, or one of the variables {}", names.join(", ")),
                });
            }
        };
        if index >= count.get() {
            return Err(Error::Usage {
                message: format!("there is no task {index} of {count} (by {found_by}): the first one is 0"),
                hint: "set --task-index from 0 on, below --task-count".to_owned(),
            });
        }
        Ok((Self { index, count }, found_by))
    }

    /// Number of this task, from 0.
    pub fn index(self) -> usize {
        self.index
    }

    /// Number of tasks.
    pub fn count(self) -> usize {
        self.count.get()
    }

    /// The share of so many units. The shares of all tasks are apart, and together all units.
    pub fn of(self, num_units: usize) -> Range<usize> {
        let bound = |index: usize| {
            // As a product of two numbers of units may be larger than one.
            let bound = index as u128 * num_units as u128 / self.count.get() as u128;
            usize::try_from(bound).unwrap_or(num_units)
        };
        bound(self.index)..bound(self.index + 1)
    }
}

/// A plan that cannot be worked on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TaskError {
    /// There is no such document.
    #[error("there is no {url}")]
    NotThere {
        /// The document.
        url: String,
        /// What makes it.
        made_by: &'static str,
        /// Whether it may come yet.
        may_come: bool,
    },
    /// A document is not what we write.
    #[error("cannot read or write {url}")]
    Document {
        /// The document.
        url: String,
        /// Why.
        source: serde_json::Error,
    },
    /// The plan is of another version of the program, whose rows may be others.
    #[error("the plan {url} was made by lookalike {found}, and this is {own}")]
    OtherVersion {
        /// The plan.
        url: String,
        /// The version that made it.
        found: String,
        /// Our version.
        own: &'static str,
    },
    /// Another plan lies there.
    #[error("there is another plan at {url}")]
    OtherPlan {
        /// The plan.
        url: String,
    },
    /// The source, or a table, is not as the plan has it.
    #[error("{what} has changed since the plan was made")]
    Changed {
        /// What.
        what: String,
    },
    /// Some of what comes before is not done yet.
    #[error("{what} is not complete: {num_missing} missing, among them {examples}")]
    Incomplete {
        /// What.
        what: String,
        /// How many are missing.
        num_missing: usize,
        /// Numbers of some of them.
        examples: String,
    },
}

impl TaskError {
    /// Says what is missing, of a step's units by number.
    pub fn incomplete(what: &str, missing: &[usize]) -> Self {
        let named: Vec<String> = missing.iter().take(EXAMPLES_NAMED).map(|number| format!("unit {number}")).collect();
        Self::Incomplete { what: what.to_owned(), num_missing: missing.len(), examples: named.join(", ") }
    }

    /// What the user can do about it.
    pub fn hint(&self) -> String {
        match self {
            Self::NotThere { made_by, .. } => format!("`{made_by}` writes it"),
            Self::Document { .. } | Self::OtherVersion { .. } | Self::Changed { .. } => {
                "make a new plan, in a new folder: what is published is not done again".to_owned()
            }
            Self::OtherPlan { .. } => "name a new folder with --plan".to_owned(),
            Self::Incomplete { .. } => "run this again when all tasks of the step before have ended well".to_owned(),
        }
    }

    /// The exit code where no store is to blame.
    pub fn exit_status(&self) -> ExitStatus {
        match self {
            Self::NotThere { may_come: true, .. } | Self::Incomplete { .. } => ExitStatus::Transient,
            Self::OtherPlan { .. } | Self::NotThere { .. } => ExitStatus::Usage,
            Self::Document { .. } | Self::OtherVersion { .. } | Self::Changed { .. } => ExitStatus::Contract,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(index: Option<usize>, count: Option<usize>, variables: &[(&str, &str)]) -> Result<(usize, usize), Error> {
        let variable = |name: &str| variables.iter().find(|pair| pair.0 == name).map(|pair| pair.1.into());
        let (share, _) = Share::find(index, count.and_then(NonZeroUsize::new), variable)?;
        Ok((share.index(), share.count()))
    }

    #[test]
    fn shares_are_apart_and_together_all() {
        for (num_units, num_tasks) in [(0, 3), (1, 3), (7, 3), (12, 4), (5, 16), (usize::MAX, 2)] {
            let count = NonZeroUsize::new(num_tasks).unwrap();
            let mut end = 0;
            for index in 0..num_tasks {
                let share = Share { index, count }.of(num_units);
                assert_eq!(share.start, end);
                assert!(share.len() <= num_units / num_tasks + 1);
                end = share.end;
            }
            assert_eq!(end, num_units);
        }
        assert_eq!(Share::WHOLE.of(9), 0..9);
    }

    #[test]
    fn a_task_knows_its_number_by_flags_then_by_the_variables_of_engines_in_order() {
        let kubernetes = ("JOB_COMPLETION_INDEX", "3");
        let batch = [("AWS_BATCH_JOB_ARRAY_INDEX", "5"), ("AWS_BATCH_JOB_ARRAY_SIZE", "6")];
        assert_eq!(find(None, None, &[]).unwrap(), (0, 1));
        assert_eq!(find(Some(1), Some(2), &[kubernetes]).unwrap(), (1, 2));
        assert_eq!(find(None, Some(4), &[kubernetes, batch[0], batch[1]]).unwrap(), (3, 4));
        assert_eq!(find(None, None, &batch).unwrap(), (5, 6));
        assert_eq!(find(None, Some(8), &batch).unwrap(), (5, 8));
        let run = [("CLOUD_RUN_TASK_INDEX", "0"), ("CLOUD_RUN_TASK_COUNT", "10")];
        assert_eq!(find(None, None, &run).unwrap(), (0, 10));
        let slurm = [("SLURM_ARRAY_TASK_ID", "4"), ("SLURM_ARRAY_TASK_COUNT", "4"), ("SLURM_ARRAY_TASK_MIN", "1")];
        assert_eq!(find(None, None, &slurm).unwrap(), (3, 4));
        let google = [("BATCH_TASK_INDEX", "2"), ("BATCH_TASK_COUNT", "3")];
        assert_eq!(find(None, None, &google).unwrap(), (2, 3));
    }

    #[test]
    fn half_a_share_is_no_share() {
        for (index, count, variables) in [
            (Some(0), None, &[][..]),
            (None, Some(2), &[]),
            (Some(2), Some(2), &[]),
            (None, None, &[("JOB_COMPLETION_INDEX", "1")]),
            (None, Some(3), &[("JOB_COMPLETION_INDEX", "three")]),
        ] {
            assert_eq!(find(index, count, variables).unwrap_err().exit_status(), ExitStatus::Usage);
        }
    }
}
