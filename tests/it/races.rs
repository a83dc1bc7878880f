use std::process::{Child, Stdio};

use lookalike::schema::TableName;

use crate::days::{DAY_ROWS, DAYS, Days, Tables, assert_same};
use crate::servers::s3;
use crate::support::{Ran, python_with, run_ids, write};

/// Reads of the table that is replaced all the while, by all readers together.
const READS: u32 = 10_000;

/// Readers at a time.
const READERS: u32 = 2;

/// Replacements that the readers must at least have lived through.
const REPLACEMENTS: u32 = 50;

/// Starts a run of a pipeline file.
fn start(days: &Days, file: &str, args: &[&str]) -> Child {
    let mut command = days.bucket.command(days.folder(), &[&["run", file], args].concat());
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// Waits for runs, which must all succeed, and tells what became of each.
fn all(runs: Vec<Child>) -> Vec<String> {
    let end = |run: Child| {
        let summary = Ran::from(run.wait_with_output().unwrap()).expect(0).summary();
        summary["status"].as_str().unwrap().to_owned()
    };
    runs.into_iter().map(end).collect()
}

/// Every partition of every table is of one run, which the names of its files and its rows agree on.
fn assert_whole(days: &Days, out: &str) {
    let copy = days.download(out);
    for name in [TableName::Latents, TableName::Neighbors, TableName::Anomalies] {
        for (partition, ids) in run_ids(&copy, name) {
            assert_eq!(ids.len(), 1, "{partition} of {}: {ids:?}", name.name());
        }
    }
}

/// The tables but for `runs`: a race may leave more of it than one run does.
fn without_runs(mut tables: Tables) -> Tables {
    tables.remove(TableName::Runs.name());
    tables
}

/// The rows without the run ids, which tell rows that were made again from those made once.
fn without_run_ids(tables: Tables) -> Tables {
    let of_row = |row: String| row.split(' ').filter(|cell| !cell.starts_with("run_id=")).collect::<Vec<_>>().join(" ");
    let of_table = |(name, rows): (_, Vec<String>)| (name, rows.into_iter().map(of_row).collect());
    without_runs(tables).into_iter().map(of_table).collect()
}

#[test]
fn eight_processes_at_once_come_to_one_result() {
    let days = Days::new(s3(), "eight");
    let expected = days.undisturbed();
    let file = days.pipeline_to("out");
    let statuses = all((0..8).map(|_| start(&days, &file, &[])).collect());
    assert!(statuses.iter().all(|status| status == "committed" || status == "nothing_to_do"), "{statuses:?}");
    assert!(statuses.iter().any(|status| status == "committed"), "{statuses:?}");
    assert_whole(&days, "out");
    assert_same(&days.tables("out"), &expected, "eight at once");
}

#[test]
fn overlapping_backfills_leave_whole_partitions_and_the_next_run_agrees() {
    let days = Days::new(s3(), "backfills");
    let expected = without_runs(days.undisturbed());
    let ranges: [[&[&str]; 2]; 2] = [
        [&["--from", DAYS[0], "--to", DAYS[3]], &["--from", DAYS[2], "--to", DAYS[5]]],
        [
            &["--partition", "ds=2026-11-01", "--partition", "ds=2026-11-02", "--partition", "ds=2026-11-03"],
            &["--partition", "ds=2026-11-03", "--partition", "ds=2026-11-02", "--partition", "ds=2026-11-06"],
        ],
    ];
    for (number, both) in ranges.into_iter().enumerate() {
        let out = format!("out{number}");
        let file = days.pipeline_to(&out);
        all(both.into_iter().map(|args| start(&days, &file, args)).collect());
        assert_whole(&days, &out);
        days.run(&out, &[]).expect(0);
        assert_whole(&days, &out);
        assert_same(&without_runs(days.tables(&out)), &expected, &out);
        assert_eq!(days.run(&out, &[]).expect(0).summary()["status"], "nothing_to_do");
    }
}

#[test]
fn a_forced_backfill_and_a_nightly_run_at_once_leave_whole_partitions_and_the_next_run_agrees() {
    let days = Days::new(s3(), "nightly");
    days.run("out", &[]).expect(0);
    // The pictures of all days are others now: both runs have something to do in the days of the backfill.
    days.put_source("images", 1000);
    let file = days.pipeline_to("out");
    let backfill = ["--force", "--from", DAYS[1], "--to", DAYS[3]];
    all(vec![start(&days, &file, &[]), start(&days, &file, &backfill)]);
    assert_whole(&days, "out");
    // Nothing has changed now, and it is done again all the same, beside a run that has nothing to do.
    all(vec![start(&days, &file, &backfill), start(&days, &file, &[])]);
    assert_whole(&days, "out");
    days.run("out", &[]).expect(0);
    let expected = without_run_ids(days.undisturbed());
    assert_same(&without_run_ids(days.tables("out")), &expected, "after the race");
    assert_eq!(days.run("out", &[]).expect(0).summary()["status"], "nothing_to_do");
}

#[test]
fn a_reader_sees_the_old_rows_of_a_partition_or_the_new_ones_and_never_a_part() {
    let days = Days::new(s3(), "readers");
    days.put_source("others", 500);
    let partition = format!("ds={}", DAYS[0]);
    let files = ["images", "others"].map(|source| {
        let file = format!("{source}.toml");
        write(&days.folder().join(&file), &days.pipeline(source, "out"));
        file
    });
    let replace = |number: u32| {
        let file = files[number as usize % 2].as_str();
        let ran = days.bucket.lookalike(days.folder(), &["embed", file, "--partition", &partition]).expect(0);
        assert_eq!(ran.summary()["status"], "committed", "{}", ran.stdout);
    };
    replace(0);
    replace(1);
    let table = format!("{}/{}/out/latents", days.bucket.url, days.prefix);
    let (reads, rows) = ((READS / READERS).to_string(), DAY_ROWS.to_string());
    let readers: Vec<_> = (0..READERS)
        .map(|_| {
            let mut reader = python_with("poll.py", &[&table, &reads, &rows]);
            reader.envs(days.bucket.variables.iter().map(|(name, value)| (*name, value)));
            reader.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
        })
        .collect();
    let mut readers: Vec<_> = readers.into_iter().map(Some).collect();
    let mut replacements = 2;
    let mut seen = Vec::new();
    while !readers.is_empty() {
        replace(replacements);
        replacements += 1;
        for reader in &mut readers {
            if reader.as_mut().unwrap().try_wait().unwrap().is_some() {
                let ended = reader.take().unwrap().wait_with_output().unwrap();
                seen.push(Ran::from(ended).expect(0).stdout);
            }
        }
        readers.retain(Option::is_some);
    }
    println!("{READS} reads during {replacements} replacements:\n{}", seen.concat());
    assert!(replacements >= REPLACEMENTS, "{replacements}");
}
