use std::path::Path;

use serde_json::Value;

use crate::support::{Ran, folder, image_table, lookalike, python, write};

const PIPELINE: &str = "[pipeline]\nname = \"cells\"\n[source]\ntable = \"images\"\n[model]\npackage = \"model\"\n\
     [output]\ntable = \"out\"\n[limits]\nmax_rejected_fraction = 0.3\n";

/// A pipeline with a small model, and 10 rows of which 2 are no pictures.
fn prepared() -> tempfile::TempDir {
    let folder = folder();
    write(&folder.path().join("cells.toml"), PIPELINE);
    let ids: Vec<String> = (0..10).map(|number| format!("row{number}")).collect();
    let rows: Vec<(&str, i64)> =
        ids.iter().zip([1, 2, 3, 4, 5, 6, 7, 8, -1, -1]).map(|(id, seed)| (id.as_str(), seed)).collect();
    image_table(&folder.path().join("images/ds=2026-11-21/cells.parquet"), &rows);
    lookalike(folder.path(), &["fit", "cells.toml", "--height", "8", "--width", "8"]).expect(0);
    folder
}

fn run(folder: &Path, file: &str) -> Ran {
    lookalike(folder, &["run", file, "--metrics-file", "cells.prom"])
}

/// The samples of the file as both parsers read them.
fn samples(folder: &Path) -> Value {
    let printed = python("metrics.py", &[&folder.join("cells.prom")]);
    serde_json::from_str(&printed).unwrap()
}

#[test]
fn the_metrics_file_tells_what_an_operator_alerts_on_and_keeps_the_last_success() {
    let folder = prepared();
    let folder = folder.path();
    let summary = run(folder, "cells.toml").expect(0).summary();
    let first = samples(folder);
    assert_eq!(first["pipeline"], "cells");
    for (sample, expected) in [
        ("lookalike_exit_code", 0.0),
        ("lookalike_rows_in", 10.0),
        ("lookalike_rows status=ok", 8.0),
        ("lookalike_rows status=unknown_format", 2.0),
        ("lookalike_rows_embedded", 10.0),
        ("lookalike_rows_flagged", summary["rows_flagged"].as_f64().unwrap()),
        ("lookalike_partitions_written", 1.0),
        (concat!("lookalike_build_info version=", env!("CARGO_PKG_VERSION")), 1.0),
    ] {
        assert_eq!(first[sample].as_f64(), Some(expected), "{sample} in {first:#}");
    }
    let time = |samples: &Value, name: &str| samples[format!("lookalike_{name}_seconds")].as_f64();
    let (start, finish) = (time(&first, "start_timestamp").unwrap(), time(&first, "finish_timestamp").unwrap());
    let newest = time(&first, "source_newest_timestamp").unwrap();
    let on_disk = std::fs::metadata(folder.join("images/ds=2026-11-21/cells.parquet")).unwrap().modified().unwrap();
    let on_disk = on_disk.duration_since(std::time::UNIX_EPOCH).unwrap().as_secs_f64();
    assert!((newest - on_disk).abs() < 0.01 && newest <= start && start <= finish, "{first:#}");
    assert!((time(&first, "source_lag").unwrap() - (finish - newest)).abs() < 0.01, "{first:#}");
    assert_eq!(time(&first, "last_success_timestamp"), Some(finish));
    for stage in ["embed", "neighbors", "flag"] {
        assert!(first[format!("lookalike_stage_duration_seconds stage={stage}")].as_f64().unwrap() > 0.0);
    }

    // Nothing to do is a success, and tells of the same rows.
    run(folder, "cells.toml").expect(0);
    let second = samples(folder);
    assert!(time(&second, "last_success_timestamp") > Some(finish));
    assert_eq!(second["lookalike_rows_in"], first["lookalike_rows_in"]);
    for sample in ["lookalike_rows_embedded", "lookalike_partitions_written"] {
        assert_eq!(second[sample].as_f64(), Some(0.0), "{sample}");
    }

    // A failure keeps the time of the success before it, and says nothing of rows it has not seen.
    let last_success = time(&second, "last_success_timestamp");
    std::fs::rename(folder.join("images"), folder.join("gone")).unwrap();
    run(folder, "cells.toml").expect(4);
    let failed = samples(folder);
    assert_eq!(failed["lookalike_exit_code"].as_f64(), Some(4.0));
    assert_eq!(time(&failed, "last_success_timestamp"), last_success);
    assert!(failed.get("lookalike_rows_in").is_none(), "{failed:#}");
    // So does a pipeline file that cannot be read, twice.
    write(&folder.join("cells.toml"), "[pipeline]\nname = 7\n");
    for _ in 0..2 {
        run(folder, "cells.toml").expect(2);
        let failed = samples(folder);
        assert_eq!((failed["pipeline"].as_str(), failed["lookalike_exit_code"].as_f64()), (Some("cells"), Some(2.0)));
        assert_eq!(time(&failed, "last_success_timestamp"), last_success);
    }
    // Committed with too many rejects is not what an operator calls a success.
    std::fs::rename(folder.join("gone"), folder.join("images")).unwrap();
    write(&folder.join("cells.toml"), &PIPELINE.replace("0.3", "0.1").replace("\"out\"", "\"out2\""));
    run(folder, "cells.toml").expect(3);
    let rejects = samples(folder);
    assert_eq!(
        (rejects["lookalike_exit_code"].as_f64(), rejects["lookalike_rows_in"].as_f64()),
        (Some(3.0), Some(10.0))
    );
    assert_eq!(time(&rejects, "last_success_timestamp"), last_success);

    // Nothing is left beside the file.
    let files = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    assert!(files.filter(|name| name.contains("cells.prom")).eq(["cells.prom"]));
}

#[test]
fn a_pipeline_file_that_never_could_be_read_has_metrics_under_its_own_name() {
    let folder = folder();
    write(&folder.path().join("Night \"1\".toml"), "no toml");
    run(folder.path(), "Night \"1\".toml").expect(2);
    let failed = samples(folder.path());
    assert_eq!((failed["pipeline"].as_str(), failed["lookalike_exit_code"].as_f64()), (Some("night__1_"), Some(2.0)));
    assert!(failed.get("lookalike_last_success_timestamp_seconds").is_none(), "{failed:#}");
}

#[test]
fn a_metrics_file_that_cannot_be_written_is_told_and_an_error_of_the_run_goes_before_it() {
    let folder = prepared();
    let run = |file: &str| lookalike(folder.path(), &["run", file, "--metrics-file", "nowhere/cells.prom"]);
    let ran = run("cells.toml").expect(6);
    assert!(ran.stderr.contains("cannot write the metrics file nowhere/cells.prom"), "{}", ran.stderr);
    assert_eq!(ran.summary()["status"], "committed");
    let ran = run("missing.toml").expect(2);
    assert!(
        ran.stderr.contains("cannot write the metrics file") && ran.stderr.contains("missing.toml"),
        "{}",
        ran.stderr
    );
}
