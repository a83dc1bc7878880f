use std::path::Path;

use arrow::array::{Array as _, AsArray as _, RecordBatch};
use arrow::datatypes::Float32Type;
use lookalike::model;
use lookalike::schema::TableName;
use lookalike::store::{Store, Stores};
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use url::Url;

use crate::support::{batches, encoder_of, folder, image_table, lookalike, python, write};

const ROWS: [(&str, i64); 9] =
    [("a", 1), ("b", 2), ("broken", -1), ("c", 3), ("d", 4), ("e", 5), ("f", 6), ("g", 8), ("h", 12)];

/// A folder with a table of nine images, one of them none, a model with a decoder, and the tables of a run.
fn prepared(source: &str) -> tempfile::TempDir {
    let folder = folder();
    image_table(&folder.path().join("images/ds=1/x.parquet"), &ROWS[..6]);
    image_table(&folder.path().join("images/ds=2/x.parquet"), &ROWS[5..]);
    pipeline(folder.path(), "p.toml", "images", "model", source);
    let fit = ["fit", "p.toml", "--latent-dim", "3", "--height", "12", "--width", "16"];
    lookalike(folder.path(), &fit).expect(0);
    lookalike(folder.path(), &["run", "p.toml"]).expect(0);
    folder
}

fn pipeline(folder: &Path, file: &str, table: &str, model: &str, more: &str) {
    let text = format!(
        "[pipeline]\nname = \"p\"\n[source]\ntable = \"{table}\"\n{more}[model]\npackage = \"{model}\"\n\
         [output]\ntable = \"out\"\n[limits]\nmax_rejected_fraction = 0.5\n"
    );
    write(&folder.join(file), &text);
}

fn open(folder: &Path) -> Store {
    Stores::default().open(&Url::from_directory_path(folder).unwrap()).unwrap()
}

fn read_parquet(file: &Path) -> RecordBatch {
    let reader = ParquetRecordBatchReaderBuilder::try_new(std::fs::File::open(file).unwrap()).unwrap();
    let [rows] = reader.build().unwrap().collect::<Result<Vec<_>, _>>().unwrap().try_into().unwrap();
    rows
}

/// Ids, PNGs and latents of a generated table.
fn generated(folder: &Path) -> Vec<(String, Vec<u8>, Vec<f32>)> {
    let rows = read_parquet(&folder.join("images.parquet"));
    let (ids, images) = (rows["image_id"].as_string::<i32>(), rows["image"].as_binary::<i32>());
    let latents = rows["z"].as_list::<i32>();
    (0..rows.num_rows())
        .map(|row| {
            let z = latents.value(row).as_primitive::<Float32Type>().values().to_vec();
            (ids.value(row).to_owned(), images.value(row).to_vec(), z)
        })
        .collect()
}

#[test]
fn samples_are_those_of_their_seed_whatever_their_number_and_a_run_reads_them_as_a_source() {
    let folder = prepared("");
    let folder = folder.path();
    let generate = |args: &[&str]| lookalike(folder, &[&["generate", "p.toml"], args].concat());
    let ran = generate(&["--to", "made"]).expect(0);
    assert_eq!((ran.summary()["images"].as_u64(), ran.summary()["seed"].as_u64()), (Some(64), Some(0)));
    assert!(ran.stderr.contains("64 pictures of 16 x 12 pixels"), "{}", ran.stderr);
    let made = generated(&folder.join("made"));
    assert_eq!((made[0].0.as_str(), made[63].0.as_str()), ("sample-000000", "sample-000063"));
    let sheet = image::open(folder.join("made/sheet.png")).unwrap();
    // 8 x 8 cells, five times as large as the pictures, with gaps of four pixels.
    assert_eq!((sheet.width(), sheet.height()), (8 * (16 * 5 + 4) + 4, 8 * (12 * 5 + 4) + 4));

    generate(&["--to", "few", "--count", "5", "--seed", "0"]).expect(0);
    assert_eq!(generated(&folder.join("few")), made[..5]);
    generate(&["--to", "many", "--count", "300", "--seed", "0"]).expect(0);
    assert_eq!(generated(&folder.join("many"))[..64], made);
    generate(&["--to", "other", "--seed", "1"]).expect(0);
    assert!(generated(&folder.join("other")).iter().zip(&made).all(|(other, one)| other.2 != one.2));

    python("decoded.py", &[Path::new("generated"), &folder.join("model"), &folder.join("many")]);

    pipeline(folder, "again.toml", "made", "model", "");
    let summary = lookalike(folder, &["run", "again.toml", "--out", "again"]).expect(0).summary();
    assert_eq!((summary["rows_in"].as_u64(), summary["rows_ok"].as_u64()), (Some(64), Some(64)));

    let ran = generate(&["--to", "made"]).expect(2);
    assert!(ran.stderr.contains("there are files at") && ran.stderr.contains("name a new folder"), "{}", ran.stderr);
}

#[test]
fn the_way_between_two_images_begins_and_ends_at_their_latents() {
    let folder = prepared("");
    let folder = folder.path();
    let latents = |wanted: &str| -> Vec<f32> {
        let of_batch = |batch: &RecordBatch| {
            let ids = batch["image_id"].as_string::<i32>();
            let row = (0..ids.len()).find(|row| ids.value(*row) == wanted)?;
            Some(batch["embedding"].as_list::<i32>().value(row).as_primitive::<Float32Type>().values().to_vec())
        };
        batches(&folder.join("out"), TableName::Latents).iter().find_map(|(_, batch)| of_batch(batch)).unwrap()
    };
    let generate = |args: &[&str]| lookalike(folder, &[&["generate", "p.toml"], args].concat());
    let summary = generate(&["--to", "way", "--interpolate", "b", "g", "--steps", "5"]).expect(0).summary();
    assert_eq!(summary["images"], 5);
    let way = generated(&folder.join("way"));
    let ids: Vec<&str> = way.iter().map(|row| row.0.as_str()).collect();
    assert_eq!(ids, ["b..g-00", "b..g-01", "b..g-02", "b..g-03", "b..g-04"]);
    assert_eq!((&way[0].2, &way[4].2), (&latents("b"), &latents("g")));
    // Even steps in angle.
    let angle = |a: &[f32], b: &[f32]| {
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
        (dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()).acos()
    };
    let whole = angle(&way[0].2, &way[4].2);
    for step in way.windows(2) {
        assert!((angle(&step[0].2, &step[1].2) - whole / 4.0).abs() < 1e-3);
    }

    // `e` is in both partitions.
    let ran = generate(&["--to", "no", "--interpolate", "e", "g"]).expect(2);
    assert!(ran.stderr.contains("in 2 partitions") && ran.stderr.contains("ds=1/e, ds=2/e"), "{}", ran.stderr);
    generate(&["--to", "named", "--interpolate", "ds=2/e", "ds=1/e"]).expect(0);
    let ran = generate(&["--to", "no", "--interpolate", "b", "nobody"]).expect(2);
    assert!(ran.stderr.contains("no image `nobody` of this model"), "{}", ran.stderr);
    let ran = generate(&["--to", "no", "--interpolate", "broken", "b"]).expect(2);
    assert!(ran.stderr.contains("has no latents: its status in"), "{}", ran.stderr);
    assert!(!folder.join("no").exists());
}

#[test]
fn an_encoder_makes_no_pictures_and_says_what_would() {
    let folder = prepared("");
    let folder = folder.path();
    encoder_of(&folder.join("model"), &folder.join("encoder"));
    let ran = lookalike(folder, &["generate", "p.toml", "--model", "encoder", "--to", "made"]).expect(4);
    assert!(ran.stderr.contains("model.toml names no [graph] decoder"), "{}", ran.stderr);
    assert!(ran.stderr.contains("`lookalike fit`"), "{}", ran.stderr);
}

/// Copies a package with another decoder, listed with its hash.
fn with_decoder(package: &Path, decoder: Vec<u8>, to: &Path) {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let (from, to) = (open(package), open(to));
    runtime.block_on(async {
        let (contract, _) = model::read_contract(&from).await.unwrap();
        let mut files = std::collections::BTreeMap::new();
        for name in contract.files.keys() {
            files.insert(name.clone(), from.get(name).await.unwrap());
        }
        files.insert("decoder.onnx".to_owned(), decoder.into());
        model::package::write(&to, contract, files).await.unwrap();
    });
}

#[test]
fn a_decoder_that_is_not_the_models_is_refused_before_it_makes_a_picture() {
    let folder = prepared("");
    let folder = folder.path();
    let generate = |model: &str| lookalike(folder, &["generate", "p.toml", "--model", model, "--to", "no"]).expect(4);
    let fit = |model: &str, latent_dim: &str, height: &str, width: &str| {
        let args =
            ["fit", "p.toml", "--model", model, "--latent-dim", latent_dim, "--height", height, "--width", width];
        lookalike(folder, &[&args[..], &["--where", "label > 1"]].concat()).expect(0);
        std::fs::read(folder.join(model).join("decoder.onnx")).unwrap()
    };
    let package = folder.join("model");

    with_decoder(&package, fit("rotated", "3", "12", "16"), &folder.join("others"));
    let ran = generate("others");
    assert!(ran.stderr.contains("what the decoder makes of mu differs by"), "{}", ran.stderr);
    assert!(ran.stderr.contains("export the decoder and the main graph from one network"), "{}", ran.stderr);

    with_decoder(&package, fit("wider", "4", "12", "16"), &folder.join("wide"));
    let ran = generate("wide");
    assert!(ran.stderr.contains("the decoder input `z` of"), "{}", ran.stderr);
    assert!(ran.stderr.contains("f32 of any number of latents x 3"), "{}", ran.stderr);

    with_decoder(&package, fit("smaller", "3", "8", "16"), &folder.join("small"));
    assert!(generate("small").stderr.contains("does not fit the role reconstruction"));

    with_decoder(&package, std::fs::read(package.join("vae.onnx")).unwrap(), &folder.join("encodes"));
    let ran = generate("encodes");
    assert!(ran.stderr.contains("must have one output, and has 3"), "{}", ran.stderr);

    with_decoder(&package, b"no network".to_vec(), &folder.join("broken"));
    assert!(generate("broken").stderr.contains("decoder.onnx is not an ONNX model"));

    // A file that was changed after it was listed.
    let bytes = std::fs::read(package.join("golden.parquet")).unwrap();
    #[expect(clippy::disallowed_methods, reason = "a test writes its own files")]
    std::fs::write(folder.join("others/decoder.onnx"), bytes).unwrap();
    assert!(generate("others").stderr.contains("decoder.onnx has sha256"));
}
