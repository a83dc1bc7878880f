use std::path::Path;
use std::sync::Arc;

use arrow::array::{ArrayRef, RecordBatch, StringArray};
use lookalike::schema::TableName;

use crate::support::{Ran, command, folder, image_table, lookalike, picture, rows, write};

const PIPELINE: &str = "[pipeline]\nname = \"p\"\n[source]\ntable = \"images\"\n[model]\npackage = \"model\"\n\
                        [neighbors]\nk = 2\n[output]\ntable = \"out\"\n[limits]\nmax_rejected_fraction = 0.9\n";

/// Five rows of one day; the pictures differ from day to day.
fn day(folder: &Path, number: i64) {
    let ids: Vec<String> = (0..5).map(|row| format!("d{number}-{row}")).collect();
    let rows: Vec<(&str, i64)> = ids.iter().map(String::as_str).zip(number * 10..).collect();
    image_table(&folder.join(format!("images/ds=2026-11-0{number}/x.parquet")), &rows);
}

/// A source of four days, and a model fitted to it.
fn four_days() -> tempfile::TempDir {
    let folder = folder();
    write(&folder.path().join("p.toml"), PIPELINE);
    (1..=4).for_each(|number| day(folder.path(), number));
    fit(folder.path());
    folder
}

fn fit(folder: &Path) {
    let fit = ["fit", "p.toml", "--latent-dim", "3", "--height", "8", "--width", "8"];
    lookalike(folder, &fit).expect(0);
}

fn run(folder: &Path, flags: &[&str]) -> Ran {
    lookalike(folder, &[&["run", "p.toml"], flags].concat())
}

/// Runs, and returns the rows embedded.
#[track_caller]
fn embedded(folder: &Path, flags: &[&str]) -> u64 {
    run(folder, flags).expect(0).summary()["rows_embedded"].as_u64().unwrap()
}

fn latents(folder: &Path) -> Vec<String> {
    rows(&folder.join("out"), TableName::Latents, &["run_id"])
}

/// The partitions of a table with the run ids of their rows.
fn run_ids(folder: &Path, table: TableName) -> Vec<(String, String)> {
    let mut ids: Vec<(String, String)> = rows(&folder.join("out"), table, &[])
        .iter()
        .map(|row| {
            let run_id = row.rsplit("run_id=").next().unwrap().split(' ').next().unwrap();
            (row.split(' ').next().unwrap().to_owned(), run_id.to_owned())
        })
        .collect();
    ids.dedup();
    ids
}

#[test]
fn a_range_of_dates_is_embedded_and_the_rest_is_left_for_later() {
    let folder = four_days();
    let folder = folder.path();
    assert_eq!(embedded(folder, &["--from", "2026-11-02", "--to", "2026-11-03"]), 10);
    let days: Vec<String> = run_ids(folder, TableName::Latents).into_iter().map(|(day, _)| day).collect();
    assert_eq!(days, ["ds=2026-11-02", "ds=2026-11-03"]);
    assert_eq!(embedded(folder, &["--partition", "ds=2026-11-01", "--partition", "ds=2026-11-02"]), 5);
    // What was backfilled is up to date for a run over all.
    assert_eq!(embedded(folder, &[]), 5);
    assert_eq!(latents(folder).len(), 20);
    assert_eq!(run(folder, &[]).expect(0).summary()["status"], "nothing_to_do");
}

#[test]
fn a_partition_that_is_done_is_skipped_and_a_forced_one_is_replaced() {
    let folder = four_days();
    let folder = folder.path();
    run(folder, &[]).expect(0);
    let (before, ids) = (latents(folder), run_ids(folder, TableName::Latents));
    let one = ["--partition", "ds=2026-11-02"];
    assert_eq!(run(folder, &one).expect(0).summary()["status"], "nothing_to_do");
    assert_eq!(embedded(folder, &[&one[..], &["--force"]].concat()), 5);
    assert_eq!(latents(folder), before);
    let forced = run_ids(folder, TableName::Latents);
    assert_eq!(forced[1].1, format!("{}r1", ids[1].1));
    assert_eq!((&forced[0], &forced[2..]), (&ids[0], &ids[2..]));
    // Forced rows are what a run would make: nothing is left to do.
    assert_eq!(run(folder, &[]).expect(0).summary()["status"], "nothing_to_do");
    assert_eq!(embedded(folder, &[&one[..], &["--force"]].concat()), 5);
    assert_eq!(run_ids(folder, TableName::Latents)[1].1, format!("{}r2", ids[1].1));
}

#[test]
fn only_missing_leaves_rows_alone_that_are_out_of_date() {
    let folder = four_days();
    let folder = folder.path();
    assert_eq!(embedded(folder, &["--to", "2026-11-03"]), 15);
    let before = latents(folder);
    image_table(&folder.join("images/ds=2026-11-01/x.parquet"), &[("new", 1)]);
    assert_eq!(embedded(folder, &["--only-missing"]), 5);
    assert!(before.iter().all(|row| latents(folder).contains(row)));
    assert_eq!(embedded(folder, &[]), 1);
    assert_eq!(latents(folder).len(), 16);
}

/// A table whose rows name their pictures.
fn table_of_uris(path: &Path, names: &[&str]) {
    let uris = names.iter().map(|name| format!("pictures/{name}.png"));
    let rows = RecordBatch::try_from_iter([
        ("image_id", Arc::new(StringArray::from(names.to_vec())) as ArrayRef),
        ("image", Arc::new(StringArray::from_iter_values(uris))),
    ])
    .unwrap();
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    let mut bytes = Vec::new();
    let mut writer = parquet::arrow::ArrowWriter::try_new(&mut bytes, rows.schema(), None).unwrap();
    writer.write(&rows).unwrap();
    writer.close().unwrap();
    #[expect(clippy::disallowed_methods, reason = "a test writes its own files")]
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn rejected_images_are_tried_again_and_the_others_are_carried_over() {
    let folder = four_days();
    let folder = folder.path();
    let names = ["a", "b", "c", "d", "e", "f"];
    std::fs::remove_dir_all(folder.join("images")).unwrap();
    table_of_uris(&folder.join("images/x.parquet"), &names);
    let paint = |name: &str, seed: i64| {
        let path = folder.join(format!("images/pictures/{name}.png"));
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        #[expect(clippy::disallowed_methods, reason = "a test writes its own files")]
        std::fs::write(path, picture(seed)).unwrap();
    };
    names.iter().zip(0..).filter(|(name, _)| !["b", "e"].contains(name)).for_each(|(name, seed)| paint(name, seed));
    let first = run(folder, &[]).expect(0).summary();
    assert_eq!(first["rejects"], serde_json::json!({"not_found": 2}));
    // The table is the same as before, so a plain run has nothing to do.
    paint("b", 1);
    assert_eq!(run(folder, &[]).expect(0).summary()["status"], "nothing_to_do");
    let again = run(folder, &["--retry-rejected"]).expect(0).summary();
    assert_eq!((&again["rows_embedded"], &again["rows_ok"]), (&2.into(), &5.into()), "{again}");
    paint("e", 4);
    assert_eq!(embedded(folder, &["--retry-rejected"]), 1);
    assert_eq!(run(folder, &["--retry-rejected"]).expect(0).summary()["status"], "nothing_to_do");
    assert_eq!(run(folder, &[]).expect(0).summary()["status"], "nothing_to_do");
    let retried = latents(folder);
    std::fs::rename(folder.join("out"), folder.join("old")).unwrap();
    run(folder, &[]).expect(0);
    assert_eq!(retried, latents(folder));
    assert_eq!(retried.len(), 6);
}

#[test]
fn of_a_grown_partition_only_the_added_files_are_read_when_asked_for() {
    let folder = four_days();
    let folder = folder.path();
    run(folder, &[]).expect(0);
    let added = "images/ds=2026-11-02/a.parquet";
    image_table(&folder.join(added), &[("added1", 71), ("added2", 72)]);
    image_table(&folder.join("images/ds=2026-11-05/x.parquet"), &[("new", 81)]);
    assert_eq!(embedded(folder, &["--changed-since-last-run"]), 3);
    // The rows are those that a run over everything makes, and it knows.
    assert_eq!(run(folder, &[]).expect(0).summary()["status"], "nothing_to_do");
    let grown = latents(folder);
    std::fs::rename(folder.join("out"), folder.join("old")).unwrap();
    assert_eq!(embedded(folder, &[]), 23);
    assert_eq!(grown, latents(folder));
    // A file that was there before has changed: all rows of the partition are made again.
    image_table(&folder.join(added), &[("added1", 73), ("added2", 72)]);
    assert_eq!(embedded(folder, &["--changed-since-last-run"]), 7);
}

#[test]
fn the_first_of_duplicate_ids_is_kept_when_asked_for() {
    let folder = four_days();
    let folder = folder.path();
    image_table(&folder.join("images/ds=2026-11-01/x.parquet"), &[("same", 1), ("b", 2), ("same", 3), ("c", 4)]);
    image_table(&folder.join("images/ds=2026-11-01/y.parquet"), &[("b", 5), ("d", 6), ("same", 7)]);
    // Ids of other partitions are others.
    image_table(&folder.join("images/ds=2026-11-02/x.parquet"), &[("same", 8)]);
    let one = ["--to", "2026-11-02"];
    let refused = run(folder, &one).expect(4);
    assert!(refused.stderr.contains("b, same") && refused.stderr.contains("keep_first"), "{}", refused.stderr);
    write(
        &folder.join("p.toml"),
        &PIPELINE.replace("[source]", "[source]\nduplicates = \"keep_first\"\ncolumns = [\"label\"]"),
    );
    // The refused run has made its tables, without that column.
    std::fs::remove_dir_all(folder.join("out")).unwrap();
    let summary = run(folder, &one).expect(0).summary();
    assert_eq!((&summary["rows_in"], &summary["rows_duplicate"]), (&5.into(), &3.into()), "{summary}");
    let rows = rows(&folder.join("out"), TableName::Latents, &[]);
    let kept: Vec<String> =
        rows.iter().map(|row| row.split(" status=").next().unwrap().replace("ds=2026-11-0", "")).collect();
    assert_eq!(
        kept,
        [
            "1 image_id=b label=2",
            "1 image_id=c label=4",
            "1 image_id=d label=6",
            "1 image_id=same label=1",
            "2 image_id=same label=8"
        ]
    );
    assert_eq!(run(folder, &one).expect(0).summary()["status"], "nothing_to_do");
}

#[test]
fn the_size_of_units_decides_what_is_lost_and_not_what_is_written() {
    let folder = four_days();
    let folder = folder.path();
    run(folder, &[]).expect(0);
    let before = latents(folder);
    write(&folder.join("p.toml"), &PIPELINE.replace("[output]", "[execution]\nunit_rows = 2\n[output]"));
    assert_eq!(run(folder, &[]).expect(0).summary()["status"], "nothing_to_do");
    std::fs::remove_dir_all(folder.join("out")).unwrap();
    run(folder, &[]).expect(0);
    assert_eq!(latents(folder), before);
}

#[test]
fn what_cannot_be_selected_is_told() {
    let folder = four_days();
    let folder = folder.path();
    let ran = run(folder, &["--partition", "ds=2026-11-9"]).expect(4);
    assert!(ran.stderr.contains("no partition ds=2026-11-9") && ran.stderr.contains("ds=2026-11-01"), "{}", ran.stderr);
    assert!(run(folder, &["--partition", "2026-11-01"]).expect(2).stderr.contains("KEY=VALUE"));
    assert!(run(folder, &["--from", "2026-11-03", "--to", "2026-11-01"]).expect(2).stderr.contains("later than"));
    run(folder, &["--force", "--only-missing"]).expect(2);
    assert!(!folder.join("out").exists());
    let empty = ["--from", "2027-01-01"];
    assert_eq!(run(folder, &empty).expect(0).summary()["status"], "nothing_to_do");
    run(folder, &[&empty[..], &["--skip-exit-code"]].concat()).expect(99);
    run(folder, &["--skip-exit-code"]).expect(0);
    run(folder, &["--skip-exit-code"]).expect(99);
    std::fs::rename(folder.join("images"), folder.join("days")).unwrap();
    image_table(&folder.join("images/module=mono/x.parquet"), &[("a", 1)]);
    assert!(run(folder, &["--from", "2026-11-03"]).expect(4).stderr.contains("module=mono has none"));
}

#[test]
fn the_plan_says_what_a_backfill_would_do() {
    let folder = four_days();
    let folder = folder.path();
    run(folder, &["--to", "2026-11-03"]).expect(0);
    let plan = |flags: &[&str]| -> Vec<(String, u64)> {
        let printed = lookalike(folder, &[&["plan", "p.toml", "--json"], flags].concat()).expect(0).summary();
        let partitions = printed["partitions"].as_array().unwrap().clone();
        partitions
            .iter()
            .map(|p| (p["embed"].as_str().unwrap().to_owned(), p["rows_to_embed"].as_u64().unwrap()))
            .collect()
    };
    let line = |action: &str, rows| (action.to_owned(), rows);
    assert_eq!(plan(&["--from", "2026-11-03"]), [line("up to date", 0), line("append", 5)]);
    assert_eq!(plan(&["--partition", "ds=2026-11-01", "--force"]), [line("replace", 5)]);
    image_table(&folder.join("images/ds=2026-11-03/more.parquet"), &[("more", 1)]);
    let one = ["--partition", "ds=2026-11-03"];
    assert_eq!(plan(&one), [line("replace", 6)]);
    assert_eq!(plan(&[&one[..], &["--changed-since-last-run"]].concat()), [line("replace", 1)]);
    assert_eq!(plan(&[&one[..], &["--only-missing"]].concat()), [line("up to date", 0)]);
}

#[test]
fn overlapping_backfills_leave_every_partition_to_one_run() {
    let folder = four_days();
    let folder = folder.path();
    let ranges: [&[&str]; 4] =
        [&["--to", "2026-11-03"], &["--from", "2026-11-02"], &["--partition", "ds=2026-11-02", "--force"], &[]];
    let processes: Vec<_> = ranges
        .iter()
        .map(|range| {
            let mut command = command(folder, &[&["run", "p.toml"], *range].concat());
            command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped()).spawn().unwrap()
        })
        .collect();
    for process in processes {
        Ran::from(process.wait_with_output().unwrap()).expect(0);
    }
    for table in [TableName::Latents, TableName::Neighbors, TableName::Anomalies] {
        let days: Vec<String> = run_ids(folder, table).into_iter().map(|(day, _)| day).collect();
        assert_eq!(days, ["ds=2026-11-01", "ds=2026-11-02", "ds=2026-11-03", "ds=2026-11-04"], "{}", table.name());
    }
    // Neighbors and flags are those of the latents that are there now.
    assert_eq!(run(folder, &[]).expect(0).summary()["status"], "nothing_to_do");
}

/// Takes back the newest commit of `latents`, as if the run had been killed before it: data files and receipts are there.
fn take_back_newest_commit(folder: &Path) {
    let entries = std::fs::read_dir(folder.join("out/latents/_delta_log")).unwrap();
    let newest = entries.map(|entry| entry.unwrap().path()).max().unwrap();
    std::fs::remove_file(newest).unwrap();
}

#[test]
fn a_killed_run_over_added_files_is_finished_by_a_run_over_all() {
    let folder = four_days();
    let folder = folder.path();
    let one = ["--partition", "ds=2026-11-02"];
    run(folder, &one).expect(0);
    image_table(&folder.join("images/ds=2026-11-02/a.parquet"), &[("added1", 71), ("added2", 72)]);
    run(folder, &[&one[..], &["--changed-since-last-run"]].concat()).expect(0);
    let grown = latents(folder);
    take_back_newest_commit(folder);
    assert_eq!(embedded(folder, &one), 7);
    assert_eq!(latents(folder), grown);
}

#[test]
fn a_killed_run_over_rejected_images_is_finished_by_a_forced_one() {
    let folder = four_days();
    let folder = folder.path();
    let broken = folder.join("images/ds=2026-11-02/x.parquet");
    image_table(&broken, &[("a", 1), ("broken", -1), ("c", 3), ("d", 4), ("e", 5)]);
    let one = ["--partition", "ds=2026-11-02"];
    run(folder, &one).expect(0);
    let before = latents(folder);
    assert_eq!(embedded(folder, &[&one[..], &["--retry-rejected"]].concat()), 1);
    take_back_newest_commit(folder);
    assert_eq!(embedded(folder, &[&one[..], &["--force"]].concat()), 5);
    assert_eq!(latents(folder), before);
}
