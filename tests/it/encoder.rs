use std::path::{Path, PathBuf};

use arrow::array::{Array as _, AsArray as _};
use arrow::datatypes::Int64Type;
use lookalike::schema::TableName;

use crate::support::{Ran, batches, encoder_of, folder, image_table, lookalike, picture, rows, write};

const ROWS: [(&str, i64); 6] = [("a", 1), ("b", 2), ("broken", -1), ("c", 3), ("d", 4), ("e", 5)];

/// A folder with a table of six images, one of them none, and an encoder; `more` goes into its pipeline file.
fn prepared(more: &str) -> (tempfile::TempDir, PathBuf) {
    let folder = folder();
    image_table(&folder.path().join("images/ds=1/x.parquet"), &ROWS);
    let pipeline = |model: &str, more: &str| {
        format!(
            "[pipeline]\nname = \"e\"\n[source]\ntable = \"images\"\ncolumns = [\"label\"]\n[model]\npackage = \"{model}\"\n\
             [output]\ntable = \"out\"\n[limits]\nmax_rejected_fraction = 0.5\n{more}"
        )
    };
    write(&folder.path().join("vae.toml"), &pipeline("vae", ""));
    write(&folder.path().join("e.toml"), &pipeline("encoder", more));
    lookalike(folder.path(), &["fit", "vae.toml", "--latent-dim", "3", "--height", "8", "--width", "8"]).expect(0);
    encoder_of(&folder.path().join("vae"), &folder.path().join("encoder"));
    let out = folder.path().join("out");
    (folder, out)
}

fn run(folder: &Path, args: &[&str]) -> Ran {
    lookalike(folder, &[&["run", "e.toml"], args].concat())
}

#[test]
fn an_encoder_without_reconstruction_goes_through_the_whole_journey_without_flags() {
    let (folder, out) = prepared("[anomaly]\nenabled = false\n");
    let folder = folder.path();
    let planned = |stage: &str| {
        let planned = lookalike(folder, &["plan", "e.toml", "--json"]).expect(0).summary();
        planned["partitions"][0][stage].as_str().unwrap().to_owned()
    };
    assert_eq!((planned("embed").as_str(), planned("flag").as_str()), ("append", "-"));
    lookalike(folder, &["check", "e.toml"]).expect(0);

    let ran = run(folder, &[]).expect(0);
    let summary = ran.summary();
    assert_eq!((summary["status"].as_str(), summary["rows_ok"].as_u64()), (Some("committed"), Some(5)));
    assert!(summary["rows_flagged"].is_null() && summary["reference_id"].is_null(), "{summary}");
    assert!(ran.stderr.contains("6 images in, 5 embedded, 1 rejected"), "{}", ran.stderr);
    assert!(ran.stderr.contains("flag not asked for") && ran.stderr.contains("most alike"), "{}", ran.stderr);

    let [(_, latents)] = batches(&out, TableName::Latents).try_into().unwrap();
    for score in lookalike::score::Rule::OF_IMAGE {
        let scores = latents.column_by_name(score.name()).unwrap();
        assert_eq!(scores.null_count(), ROWS.len(), "{}", score.name());
    }
    let vectors = latents.column_by_name("embedding").unwrap().as_list::<i32>();
    assert!((0..ROWS.len()).all(|row| vectors.is_valid(row) == (ROWS[row].1 >= 0)));
    assert_eq!(vectors.value(0).len(), 3);
    for empty in ["mu", "logvar"] {
        assert_eq!(latents.column_by_name(empty).unwrap().null_count(), ROWS.len());
    }
    assert_eq!(rows(&out, TableName::Neighbors, &[]).len(), 5 * 4);
    let [recorded] = rows(&out, TableName::Runs, &[]).try_into().unwrap();
    for null in ["run_id", "rows_flagged", "reference_id"] {
        assert!(recorded.contains(&format!(" {null}=NULL")), "{null} in {recorded}");
    }
    assert!(!out.join("anomalies").exists());

    assert_eq!(run(folder, &[]).expect(0).summary()["status"], "nothing_to_do");
    assert_eq!((planned("embed").as_str(), planned("flag").as_str()), ("up to date", "-"));
    let told = lookalike(folder, &["explain", "e.toml", "a"]).expect(0).stdout;
    assert!(told.contains("content_sha256") && told.contains("neighbors") && !told.contains("anomalies"), "{told}");
    for verb in [&["flag", "e.toml"][..], &["calibrate", "e.toml", "--to", "r.json"]] {
        let ran = lookalike(folder, verb).expect(2);
        assert!(ran.stderr.contains("set enabled = true in [anomaly]"), "{}", ran.stderr);
    }
    let evaluate = ["evaluate", "e.toml", "--positive", "label > 3", "--negative", "label < 3"];
    let ran = lookalike(folder, &evaluate).expect(2);
    assert!(ran.stderr.contains("gives no score that could be evaluated"), "{}", ran.stderr);
}

#[test]
fn latents_alone_are_recorded_once_and_again_when_they_change() {
    let (folder, out) = prepared("[anomaly]\nenabled = false\n[neighbors]\nenabled = false\n");
    for (status, num_recorded) in [("committed", 1), ("nothing_to_do", 1)] {
        assert_eq!(run(folder.path(), &[]).expect(0).summary()["status"], status);
        assert_eq!(rows(&out, TableName::Runs, &[]).len(), num_recorded);
    }
    image_table(&folder.path().join("images/ds=1/x.parquet"), &ROWS[..3]);
    image_table(&folder.path().join("images/ds=2/x.parquet"), &ROWS[3..]);
    for (status, num_recorded) in [("committed", 3), ("nothing_to_do", 3)] {
        assert_eq!(run(folder.path(), &[]).expect(0).summary()["status"], status);
        assert_eq!(rows(&out, TableName::Runs, &[]).len(), num_recorded);
    }
    assert!(!out.join("neighbors").exists() && !out.join("anomalies").exists());
    let ran = lookalike(folder.path(), &["neighbors", "e.toml"]).expect(2);
    assert!(ran.stderr.contains("set enabled = true in [neighbors]"), "{}", ran.stderr);
}

#[test]
fn a_rule_that_an_encoder_has_no_score_for_is_refused_with_the_way_out() {
    let (folder, out) = prepared("[anomaly]\nrule = \"mean_squared_error\"\n");
    let ran = run(folder.path(), &[]).expect(4);
    assert!(ran.stderr.contains("no scores for the rule mean_squared_error"), "{}", ran.stderr);
    assert!(ran.stderr.contains("`fused` takes whatever scores there are"), "{}", ran.stderr);
    assert!(!out.exists());
}

#[test]
fn the_size_of_an_image_is_told_whether_or_not_it_decodes_and_rows_that_are_carried_over_keep_it() {
    let (folder, out) = prepared("[anomaly]\nenabled = false\n");
    let sizes = || {
        let mut sizes: Vec<(String, Option<i64>)> = Vec::new();
        for (_, rows) in batches(&out, TableName::Latents) {
            let bytes = rows.column_by_name("image_bytes").unwrap().as_primitive::<Int64Type>();
            let ids = rows.column(0).as_string::<i32>().iter().flatten().map(str::to_owned);
            sizes.extend(ids.zip(bytes.iter()));
        }
        sizes.sort();
        sizes
    };
    let expected = ROWS.map(|(id, seed)| (id.to_owned(), Some(i64::try_from(picture(seed).len()).unwrap())));
    run(folder.path(), &[]).expect(0);
    assert_eq!(sizes(), expected);
    assert_eq!(run(folder.path(), &["--retry-rejected"]).expect(0).summary()["rows_embedded"], 1);
    assert_eq!(sizes(), expected);

    // A location at which there is nothing has no size.
    let gone = arrow::array::StringArray::from(vec!["gone.png"]);
    let gone: arrow::array::ArrayRef = std::sync::Arc::new(gone);
    let label: arrow::array::ArrayRef = std::sync::Arc::new(arrow::array::Int64Array::from(vec![0]));
    let table = [("image_id", std::sync::Arc::clone(&gone)), ("image", gone), ("label", label)];
    let table = arrow::array::RecordBatch::try_from_iter(table).unwrap();
    std::fs::create_dir(folder.path().join("images/ds=2")).unwrap();
    #[expect(clippy::disallowed_methods, reason = "a test writes its own files")]
    std::fs::write(folder.path().join("images/ds=2/x.parquet"), crate::support::parquet_file(&table, None)).unwrap();
    run(folder.path(), &[]).expect(0);
    assert!(sizes().contains(&("gone.png".to_owned(), None)));
}
