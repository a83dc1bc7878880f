//! The files of `pipelines/` for Airflow, Ray, Kubernetes and cron, each with what it is for: the tables are those of a single run.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::servers::{Bucket, s3};
use crate::support::{Ran, folder, needed, python_with};

const PROGRAM: &str = env!("CARGO_BIN_EXE_lookalike");

/// A source of three days in the bucket, with the tables of a single run over it, and the pipeline that an engine is to run.
struct ThreeDays {
    bucket: Bucket,
    prefix: String,
    folder: tempfile::TempDir,
}

impl ThreeDays {
    /// Puts the source below `prefix`; `lines` are added to `[neighbors]`.
    fn new(prefix: &str, lines: &[&str]) -> Self {
        let bucket = s3();
        let days = Self { prefix: format!("{}/{prefix}", bucket.url), bucket, folder: folder() };
        let mut args = vec![PROGRAM, days.prefix.as_str(), days.folder.path().to_str().unwrap()];
        args.extend(lines);
        days.run(python_with("three_days.py", &args));
        days
    }

    /// Has a script run the pipeline by an engine whose Python `variable` names, and compares the tables.
    fn agree_after(&self, script: &str, variable: &str) {
        let (engine, folder) = (needed(variable), self.folder.path());
        let args: [&OsStr; 4] = [PROGRAM.as_ref(), engine.as_ref(), self.prefix.as_ref(), folder.as_ref()];
        self.run(python_with(script, &args));
        let tables = ["expected", "tables"].map(|name| format!("{}/{name}", self.prefix));
        self.run(python_with("same_tables.py", &tables));
    }

    /// Runs a script with the bucket's settings, which must succeed.
    fn run(&self, mut script: Command) {
        script.envs(self.bucket.variables.iter().map(|(name, value)| (name, value)));
        let ran = Ran::from(script.output().unwrap()).expect(0);
        println!("{}", ran.stdout.trim());
    }
}

/// A program beside the Python of Airflow's environment.
fn beside_airflow(name: &str) -> PathBuf {
    needed("LOOKALIKE_TEST_AIRFLOW").with_file_name(name)
}

#[test]
fn airflow_backfills_days_and_tries_a_task_again_that_was_killed() {
    ThreeDays::new("airflow", &[]).agree_after("airflow_dag.py", "LOOKALIKE_TEST_AIRFLOW");
}

#[test]
fn ray_runs_a_task_again_on_another_node_when_its_own_is_lost() {
    let by_cells = ["search = \"ivf\"", "cells = 12"];
    ThreeDays::new("ray", &by_cells).agree_after("ray_cluster.py", "LOOKALIKE_TEST_RAY");
}

#[test]
fn kubernetes_runs_each_step_as_an_indexed_job() {
    let by_cells = ["search = \"ivf\"", "cells = 12"];
    ThreeDays::new("kubernetes", &by_cells).agree_after("kubernetes_jobs.py", "LOOKALIKE_TEST_AIRFLOW");
}

#[test]
fn manifests_and_pods_are_valid_and_exit_codes_are_understood() {
    let home = folder();
    let mut script = Command::new(needed("LOOKALIKE_TEST_AIRFLOW"));
    script.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/python/manifests.py")).arg(home.path());
    let ran = Ran::from(script.output().unwrap()).expect(0);
    println!("{}", ran.stdout.trim());
}

#[test]
fn cron_has_one_run_at_a_time_and_mails_what_a_person_should_see() {
    let (folder, shellcheck) = (folder(), beside_airflow("shellcheck"));
    let args: [&OsStr; 3] = [PROGRAM.as_ref(), shellcheck.as_ref(), folder.path().as_ref()];
    let ran = Ran::from(python_with("cron_wrapper.py", &args).output().unwrap()).expect(0);
    println!("{}", ran.stdout.trim());
}
