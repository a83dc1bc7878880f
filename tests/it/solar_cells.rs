use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use lookalike::schema::TableName;

use crate::support::{cells, folder, lookalike, python, rows, write};

const NUM_CELLS: u64 = 2624;
const K: u64 = 10;

/// The tables of one full run over the cells: fitted to and calibrated on half of the sound ones.
struct Journey {
    folder: PathBuf,
}

impl Journey {
    fn tables(&self) -> PathBuf {
        self.folder.join("tables")
    }
}

/// The pipeline file; `anomaly` is its last section.
fn pipeline(anomaly: &str) -> String {
    format!(
        "[pipeline]\nname = \"cells\"\n[source]\ntable = \"{}\"\ncolumns = [\"defect\", \"split\"]\n[model]\npackage = \"model\"\n\
         [neighbors]\nk = {K}\n[output]\ntable = \"tables\"\n{anomaly}",
        cells().display(),
    )
}

const ANOMALY: &str =
    "[anomaly]\nrule = \"mean_squared_error\"\nreference = \"reference.json\"\nthreshold = { contamination = 0.05 }\n";

/// Runs the journey once for all tests.
fn journey() -> &'static Journey {
    static JOURNEY: OnceLock<Journey> = OnceLock::new();
    JOURNEY.get_or_init(|| {
        let folder = folder().keep();
        write(&folder.join("cells.toml"), &pipeline(ANOMALY));
        let sound_half = ["--where", "split = 'fit'"];
        let fit = ["fit", "cells.toml", "--color", "gray", "--latent-dim", "64"];
        lookalike(&folder, &[&fit[..], &sound_half].concat()).expect(0);
        lookalike(&folder, &[&["calibrate", "cells.toml"][..], &sound_half].concat()).expect(0);
        let ran = lookalike(&folder, &["run", "cells.toml"]).expect(0);
        let summary = ran.summary();
        assert_eq!(summary["status"], "committed");
        assert_eq!(summary["rows_in"], NUM_CELLS);
        assert_eq!(summary["rows_ok"], NUM_CELLS);
        assert_eq!(summary["neighbors"], NUM_CELLS * K);
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
        "latents": NUM_CELLS, "neighbors": NUM_CELLS * K, "anomalies": NUM_CELLS, "runs": 2, "k": K, "embedding_dim": 64,
    });
    write(&expected, &counts.to_string());
    python("readers.py", &[&journey.tables(), &expected]);
}

#[test]
fn the_numbers_are_those_of_numpy_onnxruntime_and_pillow() {
    let journey = journey();
    python("reference_scores.py", &[&cells(), &journey.folder.join("model"), &journey.tables().join("latents")]);
}

#[test]
fn fit_agrees_with_scikit_learn() {
    let journey = journey();
    python("pca_agrees.py", &[&cells(), &journey.folder.join("model"), Path::new("fit")]);
}

#[test]
fn reconstruction_error_separates_broken_monocrystalline_cells_from_sound_ones() {
    let journey = journey();
    let ran = lookalike(
        &journey.folder,
        &[
            "evaluate",
            "cells.toml",
            "--positive",
            "defect > 0.99",
            "--negative",
            "defect = 0 AND split = 'rest'",
            "--json",
        ],
    )
    .expect(0);
    let areas = ran.summary();
    let of = |partition: &str| {
        let found = areas.as_array().unwrap().iter().find(|row| {
            row["partition"] == partition && row["rule"] == "mean_squared_error"
        });
        found.unwrap_or_else(|| panic!("{partition} is not in {areas}"))["auroc"].as_f64().unwrap()
    };
    println!("AUROC: mono {:.4}, poly {:.4}, all {:.4}", of("module=mono"), of("module=poly"), of("all"));
    assert!(of("module=mono") >= 0.93, "{areas}");
}

#[test]
fn a_second_run_has_nothing_to_do_and_a_changed_threshold_changes_flags_alone() {
    let journey = journey();
    // A copy, because other tests read the tables of the journey.
    let folder = folder();
    let copy = std::process::Command::new("cp").arg("-r").arg(&journey.folder).arg(folder.path().join("copy")).status();
    assert!(copy.unwrap().success());
    let folder = folder.path().join("copy");
    let again = lookalike(&folder, &["run", "cells.toml"]).expect(0).summary();
    // The copied source is the same folder, so its files are the same; only the tables moved.
    assert_eq!(again["status"], "nothing_to_do", "{again}");
    let before = rows(&folder.join("tables"), TableName::Latents, &[]);

    let anomaly = ANOMALY.replace("0.05", "0.2");
    write(&folder.join("cells.toml"), &pipeline(&anomaly));
    let changed = lookalike(&folder, &["run", "cells.toml"]).expect(0).summary();
    assert_eq!(changed["status"], "committed");
    assert!(changed["rows_flagged"].as_u64().unwrap() > 100, "{changed}");
    assert_eq!(changed["device"], serde_json::Value::Null, "the model was loaded for a change of flags: {changed}");
    assert_eq!(rows(&folder.join("tables"), TableName::Latents, &[]), before);
    assert_eq!(rows(&folder.join("tables"), TableName::Runs, &[]).len(), 4);
}

#[test]
fn plan_says_what_a_run_would_do_and_writes_nothing() {
    let journey = journey();
    let planned = lookalike(&journey.folder, &["plan", "cells.toml", "--out", "elsewhere", "--json"]).expect(0).summary();
    let partitions = planned["partitions"].as_array().unwrap();
    assert_eq!(partitions.len(), 2);
    assert!(partitions.iter().all(|partition| partition["action"] == "append"), "{planned}");
    assert_eq!(partitions.iter().map(|partition| partition["rows"].as_u64().unwrap()).sum::<u64>(), NUM_CELLS);
    assert!(!journey.folder.join("elsewhere").exists());
    let planned = lookalike(&journey.folder, &["plan", "cells.toml"]).expect(0);
    assert_eq!(planned.stdout.matches("up to date").count(), 2, "{}", planned.stdout);
}

#[test]
fn explain_prints_the_scores_and_the_neighbors_of_a_cell() {
    let journey = journey();
    let id = rows(&journey.tables(), TableName::Latents, &[])[0]
        .split("image_id=")
        .nth(1)
        .and_then(|rest| rest.split(' ').next())
        .unwrap()
        .to_owned();
    let told = lookalike(&journey.folder, &["explain", "cells.toml", &id]).expect(0).stdout;
    for expected in ["mean_squared_error", "severity_percentile", "neighbors", &id] {
        assert!(told.contains(expected), "{expected} is not in:\n{told}");
    }
    assert_eq!(told.lines().skip_while(|line| *line != "neighbors").count() as u64, 1 + K, "{told}");
    lookalike(&journey.folder, &["explain", "cells.toml", "no such cell"]).expect(2);
}

#[test]
fn cuda_with_the_cpu_runtime_is_an_error_and_not_a_slow_success() {
    let journey = journey();
    let ran = lookalike(&journey.folder, &["run", "cells.toml", "--out", "gpu", "--device", "cuda"]).expect(6);
    assert!(ran.stderr.contains("onnxruntime-gpu"), "{}", ran.stderr);
    let auto = lookalike(&journey.folder, &["plan", "cells.toml", "--device", "auto"]).expect(0);
    assert_eq!(auto.stdout.matches("up to date").count(), 2, "{}", auto.stdout);
}

#[test]
fn a_package_with_a_changed_byte_is_refused_and_so_is_another_than_the_pinned_one() {
    let journey = journey();
    let folder = folder();
    let package = folder.path().join("model");
    let copy = std::process::Command::new("cp").arg("-r").arg(journey.folder.join("model")).arg(&package).status();
    assert!(copy.unwrap().success());
    let mut network = std::fs::read(package.join("vae.onnx")).unwrap();
    let middle = network.len() / 2;
    network[middle] ^= 1;
    #[expect(clippy::disallowed_methods, reason = "a test writes its own files")]
    std::fs::write(package.join("vae.onnx"), network).unwrap();
    let ran = lookalike(
        &journey.folder,
        &["run", "cells.toml", "--out", "refused", "--model", package.to_str().unwrap()],
    )
    .expect(4);
    assert!(ran.stderr.contains("vae.onnx has sha256"), "{}", ran.stderr);

    let pinned = pipeline(ANOMALY).replace("package = \"model\"", &format!("package = \"model\"\nsha256 = \"{}\"", "0".repeat(64)));
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
    let text = pipeline("").replace(&cells().display().to_string(), "images");
    write(&folder.path().join("cells.toml"), &text);
    let model = journey().folder.join("model");
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
