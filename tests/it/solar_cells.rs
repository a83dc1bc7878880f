use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use lookalike::schema::TableName;

use crate::support::{cells, folder, lookalike, python, rows, write};

const NUM_CELLS: u64 = 2624;
const K: u64 = 10;

/// The kinds of cells. Each has a model of its own, as their sound cells look different; all are in the same tables.
const MODULES: [&str; 2] = ["mono", "poly"];

/// The tables of full runs over all cells, each kind's model fitted to some of its sound cells, and its reference taken from sound
/// cells that the model has not seen.
pub(crate) struct Journey {
    folder: PathBuf,
}

impl Journey {
    fn tables(&self) -> PathBuf {
        self.folder.join("tables")
    }

    pub(crate) fn model(&self, module: &str) -> PathBuf {
        self.folder.join(format!("model-{module}"))
    }
}

const ANOMALY: &str = "rule = \"top_1pct_squared_error\"\nthreshold = { contamination = 0.05 }\n";

/// The pipeline file of one kind of cells.
fn pipeline(module: &str, anomaly: &str) -> String {
    format!(
        "[pipeline]\nname = \"cells-{module}\"\n[source]\ntable = \"{}\"\ncolumns = [\"defect\", \"split\"]\n\
         where = \"module = '{module}'\"\n[model]\npackage = \"model-{module}\"\n[neighbors]\nk = {K}\n\
         [output]\ntable = \"tables\"\n[anomaly]\nreference = \"reference-{module}.parquet\"\n{anomaly}",
        cells().display(),
    )
}

/// Runs the journey once for all tests.
pub(crate) fn journey() -> &'static Journey {
    static JOURNEY: OnceLock<Journey> = OnceLock::new();
    JOURNEY.get_or_init(|| {
        let folder = folder().keep();
        let mut num_rows = 0;
        for module in MODULES {
            let file = format!("{module}.toml");
            write(&folder.join(&file), &pipeline(module, ANOMALY));
            let learned = format!("module = '{module}' AND split = 'fit'");
            let fit = ["fit", &file, "--color", "gray", "--latent-dim", "128", "--where", &learned];
            lookalike(&folder, &fit).expect(0);
            let unseen = format!("module = '{module}' AND split = 'calibrate'");
            lookalike(&folder, &["calibrate", &file, "--where", &unseen]).expect(0);
            let summary = lookalike(&folder, &["run", &file]).expect(0).summary();
            assert_eq!(summary["status"], "committed");
            assert_eq!(summary["rows_ok"], summary["rows_in"]);
            let rows = summary["rows_in"].as_u64().unwrap();
            assert_eq!(summary["neighbors_written"], rows * K);
            num_rows += rows;
        }
        assert_eq!(num_rows, NUM_CELLS);
        Journey { folder }
    })
}

#[test]
fn every_cell_is_in_every_table() {
    let tables = journey().tables();
    assert_eq!(rows(&tables, TableName::Latents, &[]).len() as u64, NUM_CELLS);
    assert_eq!(rows(&tables, TableName::Anomalies, &[]).len() as u64, NUM_CELLS);
    assert_eq!(rows(&tables, TableName::Neighbors, &[]).len() as u64, NUM_CELLS * K);
    assert_eq!(rows(&tables, TableName::Runs, &[]).len(), 2, "one row for each partition");
}

#[test]
fn other_peoples_readers_see_the_same_rows() {
    let journey = journey();
    let expected = journey.folder.join("expected.json");
    let counts = serde_json::json!({
        "latents": NUM_CELLS, "neighbors": NUM_CELLS * K, "anomalies": NUM_CELLS, "runs": 2, "k": K, "embedding_dim": 128,
    });
    write(&expected, &counts.to_string());
    python("readers.py", &[&journey.tables(), &expected]);
}

#[test]
fn the_numbers_are_those_of_numpy_onnxruntime_and_pillow() {
    let journey = journey();
    for module in MODULES {
        python("reference_scores.py", &[&cells(), &journey.model(module), &journey.tables().join("latents")]);
    }
}

#[test]
fn fit_agrees_with_scikit_learn() {
    let journey = journey();
    for module in MODULES {
        let images = cells().join(format!("module={module}"));
        python("pca_agrees.py", &[&images, &journey.model(module), Path::new("fit")]);
    }
}

#[test]
fn reconstruction_error_separates_broken_monocrystalline_cells_from_sound_ones() {
    let journey = journey();
    let area = |module: &str| {
        let file = format!("{module}.toml");
        let classes = ["--positive", "defect > 0.99", "--negative", "defect = 0 AND split = 'rest'", "--json"];
        let areas = lookalike(&journey.folder, &[&["evaluate", &file][..], &classes].concat()).expect(0).summary();
        let row = areas["rules"]
            .as_array()
            .unwrap()
            .iter()
            .find(|row| row["rule"] == "complexity_adjusted_error")
            .unwrap()
            .clone();
        assert_eq!(row["partition"], format!("module={module}"));
        row["auroc"].as_f64().unwrap()
    };
    let (mono, poly) = (area("mono"), area("poly"));
    println!("AUROC: mono {mono:.4}, poly {poly:.4}");
    assert!(mono >= 0.93, "{mono}");
    assert!(poly >= 0.6, "{poly}");
}

#[test]
fn evaluation_agrees_with_scikit_learn_and_a_baseline_fitted_as_the_model_was_is_as_good() {
    let journey = journey();
    let folder = folder();
    let (rules, models) = (folder.path().join("rules.parquet"), folder.path().join("models.json"));
    let question = ["--positive", "defect > 0.99", "--negative", "defect = 0 AND split <> 'fit'", "--label", "defect"];
    let evaluate = [&["evaluate", "mono.toml", "--baseline", "split = 'fit'"][..], &question].concat();
    let to_files = [&evaluate[..], &["--json", "--to", rules.to_str().unwrap()]].concat();
    write(&models, &lookalike(&journey.folder, &to_files).expect(0).stdout);
    python(
        "measures_agree.py",
        &[&cells().join("module=mono"), &journey.model("mono"), &journey.tables(), &rules, &models],
    );

    let told = lookalike(&journey.folder, &evaluate).expect(0).stdout;
    assert!(told.lines().all(|line| line.len() <= 100), "{told}");
    let rows = |text: &str| told.lines().filter(|line| line.contains(text)).count();
    assert_eq!(
        (rows("  model  "), rows("  baseline  ")),
        (11, 9),
        "nine rules and two headers, and nine rules: {told}"
    );
    for expected in ["module=mono", "explained variance", "128 of 128", "label of 5 neighbors is right"] {
        assert_eq!(rows(expected), 1, "{expected} is not in:\n{told}");
    }

    let unknown = [&["evaluate", "mono.toml"][..], &question[..4], &["--label", "colour"]].concat();
    let ran = lookalike(&journey.folder, &unknown).expect(2);
    assert!(ran.stderr.contains("has no column `colour`"), "{}", ran.stderr);
    let few = [&["evaluate", "mono.toml", "--baseline", "split = 'none'"][..], &question].concat();
    let ran = lookalike(&journey.folder, &few).expect(4);
    assert!(ran.stderr.contains("only 0 rows"), "{}", ran.stderr);
}

#[test]
fn a_second_run_has_nothing_to_do_and_a_changed_threshold_changes_flags_alone() {
    let journey = journey();
    // A copy, because other tests read the tables of the journey.
    let folder = folder();
    let copy = std::process::Command::new("cp").arg("-r").arg(&journey.folder).arg(folder.path().join("copy")).status();
    assert!(copy.unwrap().success());
    let folder = folder.path().join("copy");
    let again = lookalike(&folder, &["run", "mono.toml"]).expect(0).summary();
    // The copied source is the same folder, so its files are the same; only the tables moved.
    assert_eq!(again["status"], "nothing_to_do", "{again}");
    let before = rows(&folder.join("tables"), TableName::Latents, &[]);

    write(&folder.join("mono.toml"), &pipeline("mono", &ANOMALY.replace("0.05", "0.2")));
    let changed = lookalike(&folder, &["run", "mono.toml"]).expect(0).summary();
    assert_eq!(changed["status"], "committed");
    assert!(changed["rows_flagged"].as_u64().unwrap() > 100, "{changed}");
    assert_eq!(changed["provider"], serde_json::Value::Null, "the model was loaded for a change of flags: {changed}");
    assert_eq!(rows(&folder.join("tables"), TableName::Latents, &[]), before);
    assert_eq!(rows(&folder.join("tables"), TableName::Runs, &[]).len(), 3);
}

#[test]
fn plan_says_what_a_run_would_do_and_writes_nothing() {
    let journey = journey();
    let planned = |args: &[&str]| {
        let all = [&["plan", "mono.toml", "--json"][..], args].concat();
        let planned = lookalike(&journey.folder, &all).expect(0).summary();
        let [partition] = planned["partitions"].as_array().unwrap().as_slice() else { panic!("{planned}") };
        assert_eq!((partition["partition"].as_str(), partition["rows"].as_u64()), (Some("module=mono"), Some(1074)));
        ["embed", "neighbors", "flag"].map(|stage| partition[stage].as_str().unwrap().to_owned())
    };
    assert_eq!(planned(&["--out", "elsewhere"]), ["append", "append", "append"]);
    assert!(!journey.folder.join("elsewhere").exists());
    assert_eq!(planned(&[]), ["up to date", "up to date", "up to date"]);
    assert_eq!(planned(&["--where", "module = 'mono' AND defect = 0"]), ["replace", "replace", "replace"]);

    write(&journey.folder.join("changed.toml"), &pipeline("mono", &ANOMALY.replace("0.05", "0.3")));
    let changed = lookalike(&journey.folder, &["plan", "changed.toml"]).expect(0).stdout;
    assert!(changed.contains("up to date  up to date  -           replace"), "{changed}");
}

#[test]
fn explain_prints_the_scores_and_the_neighbors_of_a_cell() {
    let journey = journey();
    let told = lookalike(&journey.folder, &["explain", "mono.toml", "cell0002"]).expect(0).stdout;
    for expected in
        ["mean_squared_error", "severity_percentile", "neighbors", "cell0002", "defect                    1.0"]
    {
        assert!(told.contains(expected), "{expected} is not in:\n{told}");
    }
    assert_eq!(told.lines().skip_while(|line| *line != "neighbors").count() as u64, 1 + K, "{told}");
    lookalike(&journey.folder, &["explain", "mono.toml", "no such cell"]).expect(2);
}

#[test]
fn cuda_with_the_cpu_runtime_is_an_error_and_not_a_slow_success() {
    let journey = journey();
    let ran = lookalike(&journey.folder, &["run", "mono.toml", "--out", "gpu", "--device", "cuda"]).expect(6);
    assert!(ran.stderr.contains("onnxruntime-gpu"), "{}", ran.stderr);
    assert!(!journey.folder.join("gpu").exists(), "tables were made for a run that could not start");
    let auto = lookalike(&journey.folder, &["plan", "mono.toml", "--device", "auto"]).expect(0);
    assert_eq!(auto.stdout.matches("up to date").count(), 3, "{}", auto.stdout);
}

#[test]
fn a_package_with_a_changed_byte_is_refused_and_so_is_another_than_the_pinned_one() {
    let journey = journey();
    let folder = folder();
    let package = folder.path().join("model");
    let copy = std::process::Command::new("cp").arg("-r").arg(journey.model("mono")).arg(&package).status();
    assert!(copy.unwrap().success());
    let mut network = std::fs::read(package.join("vae.onnx")).unwrap();
    let middle = network.len() / 2;
    network[middle] ^= 1;
    #[expect(clippy::disallowed_methods, reason = "a test writes its own files")]
    std::fs::write(package.join("vae.onnx"), network).unwrap();
    let ran =
        lookalike(&journey.folder, &["run", "mono.toml", "--out", "refused", "--model", package.to_str().unwrap()])
            .expect(4);
    assert!(ran.stderr.contains("vae.onnx has sha256"), "{}", ran.stderr);

    let pin = format!("package = \"model-mono\"\nsha256 = \"{}\"", "0".repeat(64));
    let pinned = pipeline("mono", ANOMALY).replace("package = \"model-mono\"", &pin);
    write(&journey.folder.join("pinned.toml"), &pinned);
    let ran = lookalike(&journey.folder, &["run", "pinned.toml", "--out", "refused"]).expect(4);
    assert!(ran.stderr.contains("pins 0000"), "{}", ran.stderr);
}

#[test]
fn a_replaced_source_file_replaces_its_partition_and_leaves_the_other() {
    let folder = folder();
    for module in ["mono", "poly"] {
        let target = folder.path().join(format!("images/module={module}"));
        std::fs::create_dir_all(&target).unwrap();
        copy_folder(&cells().join(format!("module={module}")), &target);
    }
    write(
        &folder.path().join("cells.toml"),
        "[pipeline]\nname = \"cells\"\n[source]\ntable = \"images\"\n[model]\npackage = \"model\"\n[output]\ntable = \"tables\"\n",
    );
    let model = journey().model("mono");
    let run = |expected: &str| {
        let ran = lookalike(folder.path(), &["run", "cells.toml", "--model", model.to_str().unwrap()]).expect(0);
        let summary = ran.summary();
        assert_eq!(summary["status"], expected, "{summary}");
    };
    run("committed");
    let tables = folder.path().join("tables");
    let of = |module: &str| -> Vec<String> {
        let rows = rows(&tables, TableName::Latents, &[]);
        rows.into_iter().filter(|row| row.starts_with(&format!("module={module} "))).collect()
    };
    let (mono, poly) = (of("mono"), of("poly"));
    // Poly becomes a copy of mono.
    let target = folder.path().join("images/module=poly");
    std::fs::remove_dir_all(&target).unwrap();
    std::fs::create_dir(&target).unwrap();
    copy_folder(&cells().join("module=mono"), &target);
    run("committed");
    assert_eq!(of("mono"), mono);
    assert_eq!(of("poly").len(), mono.len());
    assert_ne!(of("poly"), poly);
    run("nothing_to_do");
}

fn copy_folder(from: &Path, to: &Path) {
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}
