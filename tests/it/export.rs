use std::path::Path;

use arrow::array::AsArray as _;

use crate::support::{folder, image_table, lookalike, parquet_rows, picture, python, write};

const FORMATS: [&str; 4] = ["numpy", "clip-retrieval", "embedding-atlas", "fiftyone"];

fn set(folder: &Path, source: &str, neighbors: &str) {
    let text = format!(
        "[pipeline]\nname = \"p\"\n[source]\ntable = \"images\"\n{source}\n[model]\npackage = \"model\"\n[output]\ntable = \"out\"\n\
         [limits]\nmax_rejected_fraction = 0.5\n[anomaly]\nthreshold = {{ quantile = 0.9 }}\n[neighbors]\n{neighbors}\n"
    );
    write(&folder.join("p.toml"), &text);
}

fn fit_and_run(folder: &Path, latent_dim: &str) {
    lookalike(folder, &["fit", "p.toml", "--latent-dim", latent_dim, "--height", "8", "--width", "8"]).expect(0);
    lookalike(folder, &["run", "p.toml"]).expect(0);
}

/// Two days of pictures with ids in common, some pictures twice, and one that is none.
fn prepared() -> tempfile::TempDir {
    let folder = folder();
    let path = folder.path();
    let days: [&[(&str, i64)]; 2] = [
        &[("a/1", 1), ("b", 2), ("no", -1), ("c", 3), ("d", 4), ("e", 5), ("f", 6)],
        &[("z", 7), ("b", 8), ("a/1", 9), ("c", 3), ("é", 10), ("g", 2)],
    ];
    for (day, rows) in (1..).zip(days) {
        image_table(&path.join(format!("images/ds={day}/x.parquet")), rows);
    }
    set(path, "columns = [\"label\"]", "k = 4\nduplicate_distance = 1e-6");
    fit_and_run(path, "4");
    folder
}

fn export(folder: &Path, format: &str, to: &str, code: i32) -> crate::support::Ran {
    lookalike(folder, &["export", "p.toml", "--format", format, "--to", to]).expect(code)
}

#[test]
fn every_form_holds_what_the_tables_hold() {
    let folder = prepared();
    let path = folder.path();
    for format in FORMATS {
        let ran = export(path, format, &format!("exports/{format}"), 0);
        let summary = ran.summary();
        assert_eq!((summary["rows"].as_u64(), summary["rows_left_out"].as_u64()), (Some(12), Some(1)), "{summary}");
        assert_eq!((summary["format"].as_str(), summary["dim"].as_u64()), (Some(format), Some(4)), "{summary}");
        assert!(ran.stderr.contains("12 rows") && ran.stderr.contains("1 rows without a vector"), "{}", ran.stderr);
    }
    python("exports_open.py", &[&path.join("out"), &path.join("exports"), &path.join("images")]);
}

#[test]
fn a_folder_that_holds_something_is_not_written_to() {
    let folder = prepared();
    write(&folder.path().join("taken/notes.txt"), "mine");
    let ran = export(folder.path(), "numpy", "taken", 2);
    assert!(ran.stderr.contains("there are files at") && ran.stderr.contains("--to"), "{}", ran.stderr);
    assert_eq!(std::fs::read_dir(folder.path().join("taken")).unwrap().count(), 1);
}

#[test]
fn tables_that_are_not_of_one_run_are_refused_and_the_run_mends_it() {
    let folder = prepared();
    let path = folder.path();
    let refused = |format: &str, table: &str| {
        let ran = export(path, format, "refused", 2);
        assert!(ran.stderr.contains(&format!("out/{table}/ is not up to date")), "{}", ran.stderr);
        assert!(ran.stderr.contains("lookalike run"), "{}", ran.stderr);
        assert!(!path.join("refused").exists());
    };
    // Other settings.
    set(path, "columns = [\"label\"]", "k = 3\nduplicate_distance = 1e-6");
    refused("embedding-atlas", "neighbors");
    set(path, "columns = [\"label\"]", "k = 4\nduplicate_distance = 1e-5");
    refused("numpy", "groups");
    set(path, "columns = [\"label\"]", "k = 4\nduplicate_distance = 1e-6");
    // Other latents: an image has gone, and its neighbors do not know yet.
    image_table(&path.join("images/ds=1/x.parquet"), &[("a/1", 1), ("b", 2), ("no", -1), ("c", 3), ("d", 4), ("e", 5)]);
    lookalike(path, &["embed", "p.toml"]).expect(0);
    refused("numpy", "anomalies");
    lookalike(path, &["run", "p.toml"]).expect(0);
    assert_eq!(export(path, "embedding-atlas", "exported", 0).summary()["rows"], 11);
}

#[test]
fn a_pipeline_without_neighbors_and_flags_exports_its_vectors() {
    let folder = folder();
    let path = folder.path();
    image_table(&path.join("images/x.parquet"), &[("a", 1), ("b", 2), ("c", 3), ("d", 4), ("e", 5)]);
    set(path, "columns = [\"label\"]", "enabled = false");
    let text = std::fs::read_to_string(path.join("p.toml")).unwrap();
    write(&path.join("p.toml"), &text.replace("threshold = { quantile = 0.9 }", "enabled = false"));
    fit_and_run(path, "2");
    let ran = export(path, "embedding-atlas", "atlas", 0);
    assert!(ran.stderr.contains("without neighbors"), "{}", ran.stderr);
    let rows = &parquet_rows(&path.join("atlas/atlas.parquet"))[0];
    let names: Vec<_> = rows.schema().fields().iter().map(|field| field.name().clone()).collect();
    assert_eq!(names, ["image_id", "partition", "label", "embedding"]);
    assert_eq!((rows.num_rows(), rows.column(1).null_count()), (5, 5));
}

#[test]
fn pictures_of_a_local_folder_are_named_where_they_lie() {
    let folder = folder();
    let path = folder.path();
    for name in ["a.png", "b c.png", "sub/c.png", "d.png", "no.png"] {
        let file = path.join("images").join(name);
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        let seed = if name == "no.png" { -1 } else { i64::from(name.as_bytes()[0]) };
        #[expect(clippy::disallowed_methods, reason = "a test writes its own files")]
        std::fs::write(file, picture(seed)).unwrap();
    }
    set(path, "format = \"directory\"", "k = 2");
    fit_and_run(path, "2");
    export(path, "fiftyone", "fiftyone", 0);
    let text = std::fs::read_to_string(path.join("fiftyone/samples.json")).unwrap();
    let dataset: serde_json::Value = serde_json::from_str(&text).unwrap();
    let samples = dataset["samples"].as_array().unwrap();
    assert_eq!((samples.len(), std::fs::read_dir(path.join("fiftyone")).unwrap().count()), (4, 1));
    for sample in samples {
        let (file, id) = (sample["filepath"].as_str().unwrap(), sample["image_id"].as_str().unwrap());
        assert!(Path::new(file).is_absolute() && file.ends_with(id), "{file}");
        assert_eq!(std::fs::read(file).unwrap(), std::fs::read(path.join("images").join(id)).unwrap());
    }
    export(path, "clip-retrieval", "clip", 0);
    let rows = &parquet_rows(&path.join("clip/metadata/metadata_0.parquet"))[0];
    let paths = rows.column_by_name("image_path").unwrap().as_string::<i32>();
    assert!(paths.iter().flatten().all(|path| Path::new(path).is_file()), "{paths:?}");
}

#[test]
fn pictures_that_the_source_has_no_more_are_left_out_and_counted() {
    let folder = prepared();
    let path = folder.path();
    image_table(&path.join("images/ds=1/x.parquet"), &[("a/1", 1), ("b", 2), ("no", -1), ("c", -1), ("d", 4)]);
    let ran = export(path, "fiftyone", "fiftyone", 0);
    assert_eq!((ran.summary()["rows"].as_u64(), ran.summary()["rows_left_out"].as_u64()), (Some(9), Some(4)));
    assert!(ran.stderr.contains("3 images that the source does not have any more"), "{}", ran.stderr);
    let text = std::fs::read_to_string(path.join("fiftyone/samples.json")).unwrap();
    let dataset: serde_json::Value = serde_json::from_str(&text).unwrap();
    let samples = dataset["samples"].as_array().unwrap();
    assert_eq!(samples.len(), 9);
    assert!(samples.iter().all(|sample| path.join("fiftyone").join(sample["filepath"].as_str().unwrap()).is_file()));
}
