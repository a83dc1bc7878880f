use std::path::Path;

use crate::sql::tables;
use crate::support::{folder, image_table, lookalike, needed, python, python_with, write};

/// Bytes of a report that mail servers take.
const MAX_BYTES: u64 = 5_000_000;

fn json(file: &Path) -> serde_json::Value {
    serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap()
}

/// Opens a page in a browser, at two widths, light and dark, and clicks through it.
fn open(page: &Path) -> serde_json::Value {
    let (shots, browser) = (folder(), needed("LOOKALIKE_TEST_BROWSER"));
    let args = [page.as_os_str(), shots.path().as_os_str(), "--chromium".as_ref(), browser.as_os_str()];
    let ran = python_with("report_opens.py", &args).output().unwrap();
    let said = String::from_utf8_lossy(&ran.stdout).into_owned();
    assert!(ran.status.success(), "{said}{}", String::from_utf8_lossy(&ran.stderr));
    serde_json::from_str(said.lines().last().unwrap()).unwrap()
}

#[test]
fn the_report_of_six_days_says_what_the_tables_say_and_can_be_used_in_a_browser() {
    let source = tables();
    let out = folder();
    let (page, data) = (out.path().join("cells.html"), out.path().join("cells.json"));
    let days = ["2026-11-01", "2026-11-02", "2026-11-03", "2026-11-05", "2026-11-06"].map(|day| format!("ds={day}"));
    let mut args = vec!["report", "cells.toml", "--html", page.to_str().unwrap(), "--json", data.to_str().unwrap()];
    for day in &days {
        args.extend(["--partition", day]);
    }
    lookalike(source, &args).expect(0);
    let (tables, days) = (source.join("tables"), days.map(std::path::PathBuf::from));
    let partitions = days.iter().map(std::path::PathBuf::as_path);
    python("report_agrees.py", &[data.as_path(), &tables].into_iter().chain(partitions).collect::<Vec<_>>());

    let found = json(&data);
    assert!(found["answer"]["drifted_partitions"].as_u64().unwrap() > 0, "{}", found["answer"]);
    assert!(std::fs::metadata(&page).unwrap().len() < MAX_BYTES);
    let seen = open(&page);
    assert_eq!(seen["cards"], 24, "{seen}");
    assert!(seen["groups"].as_u64().unwrap() > 0, "{seen}");
}

/// A pipeline over a table of small pictures with two days.
fn prepared(more: &str) -> tempfile::TempDir {
    let folder = folder();
    image_table(&folder.path().join("images/ds=1/x.parquet"), &[("a", 1), ("broken", -1), ("b", 2), ("twin", 2)]);
    image_table(&folder.path().join("images/ds=2/x.parquet"), &[("c", 3), ("d", 4), ("e", 5), ("<img src=x>", 6)]);
    pipeline(folder.path(), more);
    lookalike(folder.path(), &["fit", "p.toml", "--latent-dim", "3", "--height", "12", "--width", "16"]).expect(0);
    folder
}

fn pipeline(folder: &Path, more: &str) {
    let text = format!(
        "[pipeline]\nname = \"p\"\n[source]\ntable = \"images\"\n[model]\npackage = \"model\"\n{more}\
         [output]\ntable = \"out\"\n[limits]\nmax_rejected_fraction = 0.5\n"
    );
    write(&folder.join("p.toml"), &text);
}

#[test]
fn a_run_writes_a_report_of_what_it_changed() {
    let folder = prepared("[neighbors]\nk = 2\nduplicate_distance = 0.001\n");
    let said = lookalike(folder.path(), &["run", "p.toml"]).expect(0).stderr;
    assert!(said.contains("report: reports/p.html"), "{said}");
    let (page, data) = (folder.path().join("out/reports/p.html"), folder.path().join("out/reports/p.json"));
    python("report_agrees.py", &[&data, &folder.path().join("out")]);
    let first = json(&data);
    assert_eq!(first["answer"]["partitions"], 2);
    assert_eq!(first["answer"]["duplicates"], 1);
    open(&page);

    // Nothing changed: the report stays.
    lookalike(folder.path(), &["run", "p.toml"]).expect(0);
    assert_eq!(json(&data), first);

    // One day changed. Its rows are the reference of all, so the flags of both days are new; the history has both runs.
    image_table(&folder.path().join("images/ds=2/x.parquet"), &[("c", 3), ("d", 4), ("e", 5)]);
    lookalike(folder.path(), &["run", "p.toml"]).expect(0);
    let second = json(&data);
    python("report_agrees.py", &[&data, &folder.path().join("out")]);
    assert_eq!(second["answer"]["rows_in"], 7);
    assert_eq!(second["history"].as_array().unwrap().len(), 4);

    // The history of the last run alone, of one day.
    let alone = folder.path().join("alone.json");
    let args = ["report", "p.toml", "--partition", "ds=1", "--runs", "1", "--json", "alone.json"];
    lookalike(folder.path(), &args).expect(0);
    assert_eq!(json(&alone)["answer"]["partitions"], 1);
    assert_eq!(json(&alone)["history"].as_array().unwrap().len(), 2);
    assert!(!folder.path().join("alone.html").exists());
}

#[test]
fn a_report_is_not_written_where_none_is_wanted_and_a_run_that_cannot_write_it_has_published_all_the_same() {
    let folder = prepared("[report]\nenabled = false\n");
    lookalike(folder.path(), &["run", "p.toml"]).expect(0);
    assert!(!folder.path().join("out/reports/p.html").exists());
    lookalike(folder.path(), &["report", "p.toml"]).expect(0);
    assert!(folder.path().join("out/reports/p.html").exists() && folder.path().join("out/reports/p.json").exists());

    // A folder stands in its way.
    pipeline(folder.path(), "");
    std::fs::remove_file(folder.path().join("out/reports/p.html")).unwrap();
    write(&folder.path().join("out/reports/p.html/x"), "");
    let ran = lookalike(folder.path(), &["run", "p.toml", "--force"]).expect(0);
    assert!(ran.stderr.contains("the report could not be written"), "{}", ran.stderr);
    assert_eq!(ran.summary()["status"], "committed");
    let refused = lookalike(folder.path(), &["report", "p.toml"]);
    assert_ne!(refused.code, 0);
}

#[test]
fn a_report_needs_a_run() {
    let folder = prepared("");
    let said = lookalike(folder.path(), &["report", "p.toml"]).expect(2).stderr;
    assert!(said.contains("no run of the pipeline p is recorded") && said.contains("lookalike run"), "{said}");
}

#[test]
fn features_without_flags_have_a_report_without_pictures() {
    let folder = folder();
    python("feature_tables.py", &[&folder.path().join("tables")]);
    let text = "[pipeline]\nname = \"p\"\n[source]\ntable = \"tables/fixed_float\"\nimage = \"features\"\n[model]\npackage = \"model\"\n\
                [neighbors]\nenabled = false\n[anomaly]\nenabled = false\n[output]\ntable = \"out\"\n";
    write(&folder.path().join("p.toml"), text);
    lookalike(folder.path(), &["fit", "p.toml", "--latent-dim", "3"]).expect(0);
    lookalike(folder.path(), &["run", "p.toml"]).expect(0);
    let found = json(&folder.path().join("out/reports/p.json"));
    assert_eq!(found["kind"], "features");
    assert!(found["scores"].is_null() && found["anomaly"].is_null() && found["answer"]["rows_flagged"].is_null());
    assert!(!found["map"]["x"].as_array().unwrap().is_empty() && found["map"]["sheet"].is_null());
    open(&folder.path().join("out/reports/p.html"));
}
