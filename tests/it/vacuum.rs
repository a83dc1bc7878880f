use std::path::{Path, PathBuf};

use lookalike::schema::TableName;

use crate::support::{Ran, folder, image_table, lookalike, rows, write};

const PIPELINE: &str = "[pipeline]\nname = \"p\"\n[source]\ntable = \"images\"\n[model]\npackage = \"model\"\n\
                        [neighbors]\nk = 2\nduplicate_distance = 0.1\n[output]\ntable = \"out\"\n";

const ALL: [TableName; 5] = TableName::ALL;

/// A published table whose only partition was replaced once.
fn replaced_once(publish: &str) -> tempfile::TempDir {
    let folder = folder();
    write(&folder.path().join("p.toml"), &format!("{PIPELINE}publish = \"{publish}\"\n"));
    image_table(&folder.path().join("images/ds=1/x.parquet"), &[("a", 1), ("b", 2), ("c", 3), ("d", 4)]);
    lookalike(folder.path(), &["fit", "p.toml", "--latent-dim", "2", "--height", "8", "--width", "8"]).expect(0);
    run(folder.path(), &[]);
    run(folder.path(), &["--force"]);
    folder
}

fn run(folder: &Path, flags: &[&str]) -> serde_json::Value {
    lookalike(folder, &[&["run", "p.toml"], flags].concat()).expect(0).summary()
}

fn vacuum(folder: &Path, flags: &[&str]) -> Ran {
    lookalike(folder, &[&["vacuum", "p.toml"], flags].concat())
}

/// All files below a folder, relative to it.
fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(next) = folders.pop() {
        for entry in std::fs::read_dir(next).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() { folders.push(path) } else { found.push(path.strip_prefix(folder).unwrap().to_owned()) }
        }
    }
    found.sort();
    found
}

fn data_files(folder: &Path) -> usize {
    let is_data = |path: &PathBuf| {
        path.extension().is_some_and(|ending| ending == "parquet") && !path.to_string_lossy().contains("_delta_log")
    };
    files(&folder.join("out")).iter().filter(|path| is_data(path)).count()
}

fn all_rows(folder: &Path) -> Vec<Vec<String>> {
    ALL.iter().map(|table| rows(&folder.join("out"), *table, &[])).collect()
}

#[test]
fn what_is_left_over_is_listed_and_goes_only_when_told() {
    for publish in ["delta", "parquet"] {
        let folder = replaced_once(publish);
        let folder = folder.path();
        // What a crash leaves: a data file that no receipt names, and a file that was never finished.
        let live = files(&folder.join("out"))
            .into_iter()
            .find(|path| path.to_string_lossy().starts_with("latents/") && path.extension() == Some("parquet".as_ref()))
            .unwrap();
        let orphan =
            folder.join("out").join(live.parent().unwrap()).join("part-00009-0123456789abcdef-01234567.parquet");
        write(&orphan, "half a file");
        let unfinished = orphan.with_extension("parquet#1");
        write(&unfinished, "half a file");
        // Not ours.
        let foreign = folder.join("out/latents/README.parquet");
        write(&foreign, "a file of somebody else");
        let (before, rows_before) = (files(folder), all_rows(folder));

        assert_eq!(vacuum(folder, &[]).expect(0).stdout, "", "{publish}: nothing is a week old");
        let listed = vacuum(folder, &["--older-than-days", "0"]).expect(0);
        assert_eq!(files(folder), before, "{publish}: listing deletes nothing");
        // Replaced rows of three tables, for the neighbors came out as they were; the orphan, the upload, and the receipts of two runs.
        let count = |what: &str| listed.stdout.lines().filter(|line| line.starts_with(what)).count();
        assert_eq!((count("data file"), count("unfinished upload"), count("receipt")), (4, 1, 2), "{}", listed.stdout);

        let num_before = data_files(folder);
        let deleted = vacuum(folder, &["--older-than-days", "0", "--delete"]).expect(0);
        assert_eq!(deleted.stdout, listed.stdout);
        assert_eq!(data_files(folder), num_before - 4);
        assert!(!orphan.exists() && !unfinished.exists() && foreign.exists());
        assert_eq!(all_rows(folder), rows_before, "{publish}");
        assert_eq!(vacuum(folder, &["--older-than-days", "0"]).expect(0).stdout, "");
        assert_eq!(run(folder, &[])["status"], "nothing_to_do");
    }
}

#[test]
fn nothing_goes_that_a_run_under_way_may_still_commit() {
    let folder = replaced_once("delta");
    let folder = folder.path();
    let num_files = data_files(folder);
    let sign = r#"{"pipeline":"nightly","started_at":"2026-11-22T03:00:00Z"}"#;
    write(&folder.join("out/_lookalike/live/0123.json"), sign);
    let refused = vacuum(folder, &["--older-than-days", "0", "--delete"]).expect(5);
    assert!(refused.stderr.contains("`nightly` since 2026-11-22 03:00"), "{}", refused.stderr);
    assert_eq!(data_files(folder), num_files);
    std::fs::remove_file(folder.join("out/_lookalike/live/0123.json")).unwrap();
    vacuum(folder, &["--older-than-days", "0", "--delete"]).expect(0);
    assert!(data_files(folder) < num_files);
    // No run leaves a sign of life behind.
    assert_eq!(files(&folder.join("out/_lookalike/live")), Vec::<PathBuf>::new());
}

#[test]
fn a_run_is_resumed_without_the_receipts_that_were_vacuumed() {
    let folder = replaced_once("delta");
    let folder = folder.path();
    let before = rows(&folder.join("out"), TableName::Latents, &["run_id"]);
    // A run that embedded and was killed before it published: its receipts and files are there, the table is older.
    image_table(&folder.join("images/ds=2/x.parquet"), &[("e", 5), ("f", 6)]);
    run(folder, &[]);
    std::fs::remove_dir_all(folder.join("out/latents/_delta_log")).unwrap();
    vacuum(folder, &["--older-than-days", "0", "--delete"]).expect(0);
    assert_eq!(run(folder, &[])["rows_embedded"], 6);
    assert_eq!(rows(&folder.join("out"), TableName::Latents, &["run_id"]).len(), before.len() + 2);
}

#[test]
fn the_log_is_summed_up_and_its_old_entries_go() {
    let folder = replaced_once("delta");
    let folder = folder.path();
    for _ in 0..10 {
        run(folder, &["--force"]);
    }
    let log = |table: &str| -> Vec<String> {
        let names = files(&folder.join("out").join(table).join("_delta_log"));
        names.into_iter().map(|path| path.to_string_lossy().into_owned()).collect()
    };
    let checkpoint = "00000000000000000010.checkpoint.parquet".to_owned();
    // Neighbors that come out as they are stay where they are.
    let replaced = || ALL.iter().filter(|table| **table != TableName::Neighbors);
    assert_eq!(log("neighbors").len(), 2, "{:?}", log("neighbors"));
    for table in replaced() {
        assert!(log(table.name()).contains(&checkpoint), "{}: {:?}", table.name(), log(table.name()));
    }
    let before = all_rows(folder);
    vacuum(folder, &["--older-than-days", "0", "--delete"]).expect(0);
    for table in replaced() {
        let names = log(table.name());
        assert!(names.contains(&checkpoint), "{}: {names:?}", table.name());
        assert!(!names.iter().any(|name| name.starts_with("0000000000000000000")), "{}: {names:?}", table.name());
    }
    assert_eq!(all_rows(folder), before);
    let counts = crate::support::python("count_rows.py", &[&folder.join("out")]);
    let counts: serde_json::Value = serde_json::from_str(&counts).unwrap();
    assert_eq!(counts, serde_json::json!({"latents": 4, "neighbors": 8, "groups": 4, "anomalies": 4, "runs": 12}));
    run(folder, &["--force"]);
    assert_eq!(run(folder, &[])["status"], "nothing_to_do");
}

#[test]
fn manifests_go_too() {
    let folder = replaced_once("parquet");
    let folder = folder.path();
    let before = all_rows(folder);
    vacuum(folder, &["--older-than-days", "0", "--delete"]).expect(0);
    for table in ALL {
        let manifests = files(&folder.join("out").join(table.name()).join("_manifests"));
        assert_eq!(manifests.len(), 1, "{}: {manifests:?}", table.name());
    }
    assert_eq!(all_rows(folder), before);
    run(folder, &["--force"]);
    assert_eq!(run(folder, &[])["status"], "nothing_to_do");
}
