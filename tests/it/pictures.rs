use std::path::Path;

use arrow::array::{Array as _, AsArray as _, RecordBatch};
use arrow::datatypes::{Float32Type, Float64Type};
use bytes::Bytes;
use lookalike::model::onnx_proto::{
    GraphProto, ModelProto, NodeProto, OperatorSetIdProto, TensorProto, ValueInfoProto,
};
use lookalike::model::package::{Golden, GoldenImage};
use lookalike::model::{self, Role};
use lookalike::schema::TableName;
use lookalike::store::{Store, Stores};
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use prost::Message as _;
use url::Url;

use crate::support::{batches, encoder_of, folder, image_table, lookalike, parquet_rows, python, write};

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
    // Even steps on a straight line.
    for (step, (_, _, z)) in way.iter().enumerate() {
        for (dim, value) in z.iter().enumerate() {
            let expected = way[0].2[dim] + (way[4].2[dim] - way[0].2[dim]) * step as f32 / 4.0;
            assert!((value - expected).abs() < 1e-5, "{step} {dim}");
        }
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
    assert!(ran.stderr.contains("f32, f16 or u8 of latents x 3"), "{}", ran.stderr);

    with_decoder(&package, fit("smaller", "3", "8", "16"), &folder.join("small"));
    assert!(generate("small").stderr.contains("does not fit the role reconstruction"));

    with_decoder(&package, std::fs::read(package.join("vae.onnx")).unwrap(), &folder.join("encodes"));
    let ran = generate("encodes");
    assert!(ran.stderr.contains("must have one decoder output, and has 3"), "{}", ran.stderr);

    with_decoder(&package, b"no network".to_vec(), &folder.join("broken"));
    assert!(generate("broken").stderr.contains("decoder.onnx is not an ONNX model"));

    // A file that was changed after it was listed.
    let bytes = std::fs::read(package.join("golden.parquet")).unwrap();
    #[expect(clippy::disallowed_methods, reason = "a test writes its own files")]
    std::fs::write(folder.join("others/decoder.onnx"), bytes).unwrap();
    assert!(generate("others").stderr.contains("decoder.onnx has sha256"));
}

/// Writes the package of a VAE whose latents are the values of the image, 4 x 4 pixels of RGB, channels last; the decoder adds `bias`.
fn identity(folder: &Path, bias: f32) {
    let shape = [4, 4, 3];
    let network = |graph: GraphProto| {
        let opset = OperatorSetIdProto { domain: String::new(), version: 17 };
        let network =
            ModelProto { ir_version: 8, graph: Some(graph), opset_import: vec![opset], ..ModelProto::default() };
        Bytes::from(network.encode_to_vec())
    };
    let main = network(GraphProto {
        name: "main".to_owned(),
        node: vec![
            NodeProto::new("Flatten", &["image"], &["mu"]),
            NodeProto::new("Sub", &["mu", "mu"], &["logvar"]),
            NodeProto::new("Identity", &["image"], &["reconstruction"]),
        ],
        input: vec![ValueInfoProto::float_batch("image", "batch", &shape)],
        output: vec![
            ValueInfoProto::float_batch("mu", "batch", &[48]),
            ValueInfoProto::float_batch("logvar", "batch", &[48]),
            ValueInfoProto::float_batch("reconstruction", "batch", &shape),
        ],
        ..GraphProto::default()
    });
    let decoder = network(GraphProto {
        name: "decoder".to_owned(),
        node: vec![
            NodeProto::new("Add", &["latents", "bias"], &["row"]),
            NodeProto::new("Reshape", &["row", "shape"], &["picture"]),
        ],
        initializer: vec![
            TensorProto::float("bias", &[1], [bias]),
            TensorProto::int64_vector("shape", &[0, shape[0], shape[1], shape[2]]),
        ],
        input: vec![ValueInfoProto::float_batch("latents", "batch", &[48])],
        output: vec![ValueInfoProto::float_batch("picture", "batch", &shape)],
        ..GraphProto::default()
    });
    let pixels: Vec<u8> = (0..48).map(|value| value * 5).collect();
    let mut image = std::io::Cursor::new(Vec::new());
    image::RgbImage::from_raw(4, 4, pixels.clone()).unwrap().write_to(&mut image, image::ImageFormat::Png).unwrap();
    let values: Vec<f32> = pixels.iter().map(|value| (f32::from(*value) * 0.5 - 20.0) / 4.0).collect();
    let outputs =
        vec![(Role::Mu, values.clone()), (Role::Logvar, vec![0.0; 48]), (Role::Reconstruction, values.clone())];
    let golden = Golden { images: vec![GoldenImage { image: image.into_inner(), input: values, outputs }] };
    let contract = "format_version = 1\nname = \"identity\"\n[graph]\nmain = \"main.onnx\"\ndecoder = \"decoder.onnx\"\n\
        [input]\ntensor = \"image\"\nheight = 4\nwidth = 4\ncolor = \"rgb\"\nlayout = \"nhwc\"\nfilter = \"bilinear\"\n\
        fit = \"stretch\"\nscale = 0.5\nmean = [20.0, 20.0, 20.0]\nstd = [4.0, 4.0, 4.0]\n\
        [outputs]\nmu = \"mu\"\nlogvar = \"logvar\"\nreconstruction = \"reconstruction\"\n\
        [golden]\nfile = \"golden.parquet\"\n[files]\n";
    let files = [("main.onnx", main), ("decoder.onnx", decoder), ("golden.parquet", golden.write().unwrap())];
    let listed = files.iter().map(|(name, _)| format!("\"{name}\" = \"{}\"\n", "0".repeat(64)));
    let contract = format!("{contract}{}", listed.collect::<String>());
    let contract = model::Contract::parse("", contract.as_bytes()).unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let files = files.map(|(name, bytes)| (name.to_owned(), bytes)).into();
    runtime.block_on(model::package::write(&open(folder), contract, files)).unwrap();
}

#[test]
fn a_decoder_gives_the_reconstruction_of_mu_and_pictures_lose_nothing_but_the_code() {
    let folder = folder();
    let folder = folder.path();
    image_table(&folder.join("images/ds=1/x.parquet"), &[("a", 1), ("b", 2), ("c", 3)]);
    identity(&folder.join("model"), 0.0);
    identity(&folder.join("biased"), 0.5);
    pipeline(folder, "p.toml", "images", "model", "");
    lookalike(folder, &["run", "p.toml"]).expect(0);
    let summary = lookalike(folder, &["reconstruct", "p.toml", "--to", "codes"]).expect(0).summary();
    // With mu itself, not a level is lost; codes are off by half a step at most, of 127 for what may be 107.5 / 4.
    assert!(summary["float"]["mean_psnr"].is_null(), "{summary}");
    assert_eq!(summary["float"]["mean_ssim"], 1.0);
    assert!(summary["int8"]["mean_psnr"].as_f64().unwrap() > 48.0, "{summary}");
    let ran = lookalike(folder, &["generate", "p.toml", "--model", "biased", "--to", "no"]).expect(4);
    assert!(ran.stderr.contains("what the decoder makes of mu differs by"), "{}", ran.stderr);
    // It has no likelihood to average.
    sampled(folder, "8");
    let ran = lookalike(folder, &["run", "s.toml"]).expect(4);
    assert!(ran.stderr.contains("elbo_samples needs a [likelihood]"), "{}", ran.stderr);
}

/// Rows of the files that `reconstruct` writes in a folder, with the partition of each.
fn reconstructed(folder: &Path) -> Vec<(String, RecordBatch)> {
    let partitions = ["ds=1", "ds=2"].into_iter().filter(|partition| folder.join(partition).exists());
    partitions
        .map(|partition| (partition.to_owned(), read_parquet(&folder.join(partition).join("images.parquet"))))
        .collect()
}

#[test]
fn reconstructed_images_and_their_quality_are_those_of_numpy_and_scipy() {
    let folder = prepared("");
    let folder = folder.path();
    let reconstruct = |args: &[&str]| lookalike(folder, &[&["reconstruct", "p.toml"], args].concat());
    let ran = reconstruct(&["--to", "codes"]).expect(0);
    let summary = ran.summary();
    assert_eq!((summary["images"].as_u64(), summary["rejected"].as_u64()), (Some(9), Some(0)));
    assert_eq!((summary["code_bytes"].as_u64(), summary["input_bytes"].as_u64()), (Some(3), Some(12 * 16 * 3)));
    assert!(summary["int8"]["mean_psnr"].as_f64().unwrap() <= summary["float"]["mean_psnr"].as_f64().unwrap() + 0.5);
    assert!(ran.stderr.contains("3 as codes") && ran.stderr.contains("of mu itself"), "{}", ran.stderr);
    write(&folder.join("summary.json"), &summary.to_string());
    python(
        "decoded.py",
        &[
            Path::new("reconstructed"),
            &folder.join("model"),
            &folder.join("codes"),
            &folder.join("images"),
            &folder.join("out/latents"),
            &folder.join("summary.json"),
        ],
    );

    // One worker, other batches, and fewer rows: the same codes, and other bits of nothing.
    reconstruct(&["--to", "one", "--workers", "1", "--batch-size", "2"]).expect(0);
    let all = reconstructed(&folder.join("codes"));
    assert_eq!(all.iter().map(|(_, rows)| rows.num_rows()).collect::<Vec<_>>(), [5, 4]);
    assert_eq!(reconstructed(&folder.join("one")), all);
    reconstruct(&["--to", "some", "--where", "ds = '2' AND label <> 6"]).expect(0);
    let [(partition, some)] = reconstructed(&folder.join("some")).try_into().unwrap();
    assert_eq!(partition, "ds=2");
    let ids: Vec<_> = some["image_id"].as_string::<i32>().iter().flatten().collect();
    assert_eq!(ids, ["e", "g", "h"]);
    assert_eq!(some["code"].as_binary::<i32>().value(0), all[1].1["code"].as_binary::<i32>().value(0));
    assert_eq!(some["image"].as_binary::<i32>().value(1), all[1].1["image"].as_binary::<i32>().value(2));

    // What was written is a source.
    pipeline(folder, "again.toml", "codes", "model", "");
    let summary = lookalike(folder, &["run", "again.toml", "--out", "again"]).expect(0).summary();
    assert_eq!((summary["rows_in"].as_u64(), summary["rows_ok"].as_u64()), (Some(9), Some(9)));
}

#[test]
fn what_cannot_be_reconstructed_is_said() {
    let folder = prepared("");
    let folder = folder.path();
    let ran = lookalike(folder, &["reconstruct", "p.toml", "--to", "out"]).expect(2);
    assert!(ran.stderr.contains("there are files at"), "{}", ran.stderr);
    let ran = lookalike(folder, &["reconstruct", "p.toml", "--to", "no", "--out", "elsewhere"]).expect(2);
    assert!(ran.stderr.contains("there are no latents"), "{}", ran.stderr);
    let ran = lookalike(folder, &["reconstruct", "p.toml", "--to", "no", "--where", "label < 0"]).expect(2);
    assert!(ran.stderr.contains("no image of the source has latents of this model"), "{}", ran.stderr);
    encoder_of(&folder.join("model"), &folder.join("encoder"));
    let ran = lookalike(folder, &["reconstruct", "p.toml", "--model", "encoder", "--to", "no"]).expect(4);
    assert!(ran.stderr.contains("names no [graph] decoder"), "{}", ran.stderr);

    // A picture that was good when it was embedded, and is none now.
    image_table(&folder.join("images/ds=1/x.parquet"), &[("a", 1), ("b", -1), ("c", 3)]);
    let ran = lookalike(folder, &["reconstruct", "p.toml", "--to", "codes"]).expect(0);
    assert_eq!((ran.summary()["images"].as_u64(), ran.summary()["rejected"].as_u64()), (Some(6), Some(1)));
    assert!(ran.stderr.contains("1 images that have latents cannot be read any more"), "{}", ran.stderr);
}

#[test]
fn the_page_and_the_montage_of_an_image_show_what_the_model_sees() {
    let folder = prepared("columns = [\"label\"]\n");
    let folder = folder.path();
    let explain = |args: &[&str]| lookalike(folder, &[&["explain", "p.toml"], args].concat());
    let plain = explain(&["g"]).expect(0).stdout;
    let ran = explain(&["g", "--html", "g.html", "--png", "g.png"]).expect(0);
    assert_eq!(ran.stdout, plain);
    assert!(ran.stderr.contains("written to file://") && ran.stderr.contains("/g.png"), "{}", ran.stderr);
    let page = std::fs::read_to_string(folder.join("g.html")).unwrap();
    // The image, what the model sees, the reconstruction, the error map and its scale, and eight neighbors.
    assert_eq!(page.matches("src=\"data:image/png;base64,").count(), 5 + 8);
    assert_eq!(page.matches("src=").count(), 5 + 8, "nothing is fetched");
    for expected in ["as the model sees it", "its reconstruction", "squared units of the input tensor", "negative_elbo"]
    {
        assert!(page.contains(expected), "{expected}");
    }
    assert!(page.contains("of all rows of latents that this model made") && page.contains("ds=2"), "{page}");
    assert!(!page.contains("<script") && page.contains("default-src 'none'"));
    for line in plain.lines().filter(|line| line.starts_with("  ")) {
        let value = line.split_whitespace().nth(1).unwrap();
        assert!(page.contains(value), "{line}");
    }
    // Three panels of 16 x 12 and five neighbors, five times as large, with gaps of four.
    let montage = image::open(folder.join("g.png")).unwrap().into_rgb8();
    let neighbors_side = (24, 16);
    let (width, height) = (24 * 4, 16 * 4);
    assert_eq!(montage.dimensions(), (8 * (width + 4) + 4, height + 8), "{neighbors_side:?}");
}

#[test]
fn ids_cannot_leave_their_place_on_a_page_and_an_id_of_two_partitions_is_asked_about() {
    let folder = folder();
    let folder = folder.path();
    let hostile = "<script>alert(1)</script>\"><img src=x onerror='f()'>&amp;";
    image_table(&folder.join("images/ds=1/x.parquet"), &[(hostile, 1), ("b", 2), ("none", -1), ("d", 4), ("e", 5)]);
    image_table(&folder.join("images/ds=2/x.parquet"), &[("b", 6), ("c", 3)]);
    pipeline(folder, "p.toml", "images", "model", "");
    lookalike(folder, &["fit", "p.toml", "--latent-dim", "2", "--height", "8", "--width", "8"]).expect(0);
    lookalike(folder, &["run", "p.toml"]).expect(0);
    let explain = |args: &[&str]| lookalike(folder, &[&["explain", "p.toml"], args].concat());

    // As the image itself, and as a neighbor of another one.
    for id in [hostile, "d"] {
        explain(&[id, "--html", "page.html"]).expect(0);
        let page = std::fs::read_to_string(folder.join("page.html")).unwrap();
        assert!(!page.contains("<script") && !page.contains("<img src=x") && !page.contains("onerror='"), "{page}");
        assert!(page.contains("&lt;script&gt;alert(1)&lt;/script&gt;&quot;&gt;&lt;img src=x"), "{page}");
        assert!(page.contains("onerror=&#39;f()&#39;&gt;&amp;amp;"), "{page}");
        assert_eq!(page.matches("<img ").count(), 5 + 5);
    }

    let ran = explain(&["b", "--png", "b.png"]).expect(2);
    assert!(ran.stderr.contains("in 2 partitions") && ran.stderr.contains("ds=1/b, ds=2/b"), "{}", ran.stderr);
    explain(&["ds=2/b", "--png", "b.png"]).expect(0);
    assert!(!explain(&["ds=2/b"]).expect(0).stdout.contains("(ds=1)"));

    // An image that could not be read has a page, which says so, and no montage.
    explain(&["none", "--html", "none.html"]).expect(0);
    let page = std::fs::read_to_string(folder.join("none.html")).unwrap();
    assert!(page.contains("could not be used (unknown_format)") && !page.contains("<img"), "{page}");
    let ran = explain(&["none", "--png", "none.png"]).expect(2);
    assert!(ran.stderr.contains("cannot be read from the source"), "{}", ran.stderr);

    // Another image under the id, and none.
    image_table(&folder.join("images/ds=1/x.parquet"), &[("d", 1)]);
    explain(&["d", "--html", "d.html"]).expect(0);
    let page = std::fs::read_to_string(folder.join("d.html")).unwrap();
    assert!(page.contains("another image under this id now") && page.contains("(not in the source)"), "{page}");
    explain(&["e", "--html", "e.html"]).expect(0);
    let page = std::fs::read_to_string(folder.join("e.html")).unwrap();
    assert!(page.contains("does not have this image any more"), "{page}");
}

#[test]
fn the_page_of_an_encoders_image_has_no_reconstruction() {
    let folder = prepared("");
    let folder = folder.path();
    encoder_of(&folder.join("model"), &folder.join("encoder"));
    pipeline(folder, "e.toml", "images", "encoder", "");
    let anomaly = "[anomaly]\nenabled = false\n";
    let text = std::fs::read_to_string(folder.join("e.toml")).unwrap() + anomaly;
    write(&folder.join("e.toml"), &text);
    lookalike(folder, &["run", "e.toml", "--out", "vectors"]).expect(0);
    let args = ["explain", "e.toml", "g", "--out", "vectors", "--html", "g.html", "--png", "g.png"];
    let ran = lookalike(folder, &[&args[..], &["--model", "model"]].concat()).expect(2);
    assert!(ran.stderr.contains("the latents of `g` are of the model"), "{}", ran.stderr);
    lookalike(folder, &args).expect(0);
    let page = std::fs::read_to_string(folder.join("g.html")).unwrap();
    assert!(page.contains("as the model sees it") && !page.contains("reconstruction") && !page.contains("_error"));
    assert_eq!(page.matches("<img ").count(), 2 + 8);
    assert_eq!(image::open(folder.join("g.png")).unwrap().width(), (1 + 5) * (24 * 4 + 4) + 4);
}

#[test]
fn percentiles_on_a_page_are_those_among_the_reference() {
    let folder = prepared("");
    let folder = folder.path();
    let anomaly = "[anomaly]\nrule = \"mean_squared_error\"\nreference = \"reference.parquet\"\nthreshold = { contamination = 0.2 }\n";
    let text = std::fs::read_to_string(folder.join("p.toml")).unwrap() + anomaly;
    write(&folder.join("p.toml"), &text);
    lookalike(folder, &["calibrate", "p.toml", "--where", "ds = '1'"]).expect(0);
    lookalike(folder, &["run", "p.toml"]).expect(0);
    let told = lookalike(folder, &["explain", "p.toml", "h", "--html", "h.html"]).expect(0).stdout;
    let of_column = |name: &str| -> f64 {
        let line = told.lines().find(|line| line.trim_start().starts_with(name)).unwrap();
        line.split_whitespace().last().unwrap().parse().unwrap()
    };
    let page = std::fs::read_to_string(folder.join("h.html")).unwrap();
    assert!(page.contains("at or below the score: of the reference file://"), "{page}");
    let row = page.lines().find(|line| line.starts_with("<tr><td>mean_squared_error</td>")).unwrap();
    let expected =
        format!("<td class=\"number\">{:.1}</td><td class=\"number\">5</td>", of_column("severity_percentile"));
    assert!(row.contains(&expected), "{row}: {expected}");
}

/// A pipeline file whose negative ELBO is averaged over samples.
fn sampled(folder: &Path, samples: &str) {
    let text = std::fs::read_to_string(folder.join("p.toml")).unwrap();
    let text = text.replace("package = \"model\"\n", &format!("package = \"model\"\nelbo_samples = {samples}\n"));
    write(&folder.join("s.toml"), &text);
}

/// The negative ELBO of each image.
fn negative_elbos(tables: &Path) -> Vec<(String, Option<u64>)> {
    let mut found = Vec::new();
    for (partition, rows) in batches(tables, TableName::Latents) {
        let losses = rows["negative_elbo"].as_primitive::<Float64Type>();
        let ids = rows["image_id"].as_string::<i32>().iter().flatten().map(|id| format!("{partition}/{id}"));
        found.extend(ids.zip(losses.iter().map(|loss| loss.map(f64::to_bits))));
    }
    found.sort();
    found
}

#[test]
fn the_elbo_over_samples_is_that_of_numpy_and_converges_to_the_closed_form() {
    let folder = prepared("");
    let folder = folder.path();
    for samples in ["1", "100", "1024"] {
        sampled(folder, samples);
        let out = format!("out{samples}");
        lookalike(folder, &["run", "s.toml", "--out", &out]).expect(0);
        python(
            "decoded.py",
            &[
                Path::new("elbo"),
                &folder.join("model"),
                &folder.join("images"),
                &folder.join(&out).join("latents"),
                Path::new(samples),
            ],
        );
    }
    // The number of samples is part of what rows are.
    lookalike(folder, &["check", "s.toml"]).expect(0);
    let summary = lookalike(folder, &["run", "s.toml", "--out", "out100"]).expect(0).summary();
    assert_eq!((summary["status"].as_str(), summary["rows_embedded"].as_u64()), (Some("committed"), Some(10)));
    assert_eq!(negative_elbos(&folder.join("out100")), negative_elbos(&folder.join("out1024")));
}

#[test]
fn samples_belong_to_their_row_whatever_the_workers_the_batch_and_the_order() {
    let folder = prepared("");
    let folder = folder.path();
    sampled(folder, "70");
    let run = |out: &str, args: &[&str]| {
        lookalike(folder, &[&["run", "s.toml", "--out", out], args].concat()).expect(0);
        negative_elbos(&folder.join(out))
    };
    let all = run("all", &[]);
    assert_eq!(all.iter().filter(|(_, loss)| loss.is_some()).count(), 9);
    // The same id has other samples in another partition.
    let loss = |name: &str| all.iter().find(|(id, _)| id == name).unwrap().1;
    assert_ne!(loss("ds=1/e"), loss("ds=2/e"));
    for (number, workers) in ["1", "4"].into_iter().enumerate() {
        for batch_size in ["1", "7", "64"] {
            let out = format!("out{number}-{batch_size}");
            let found = run(&out, &["--workers", workers, "--batch-size", batch_size]);
            // The model's own last bits may differ between batch sizes.
            for ((id, found), (_, expected)) in found.iter().zip(&all) {
                let [found, expected] = [found, expected].map(|loss| loss.map(f64::from_bits));
                let is_near = |(found, expected): (f64, f64)| (found - expected).abs() <= 1e-5 * (1.0 + expected.abs());
                assert!(found.zip(expected).is_none_or(is_near), "{id}: {found:?} {expected:?}");
            }
            assert_eq!(found, run("again", &["--workers", workers, "--batch-size", batch_size, "--force"]));
        }
    }
    let mut shuffled = ROWS[..6].to_vec();
    shuffled.reverse();
    image_table(&folder.join("images/ds=1/x.parquet"), &shuffled);
    assert_eq!(run("shuffled", &[]), all);
    // Calibration scores as a run does.
    let anomaly =
        "[anomaly]\nrule = \"negative_elbo\"\nreference = \"reference.parquet\"\nthreshold = { contamination = 0.3 }\n";
    let text = std::fs::read_to_string(folder.join("s.toml")).unwrap() + anomaly;
    write(&folder.join("s.toml"), &text);
    lookalike(folder, &["calibrate", "s.toml"]).expect(0);
    let mut calibrated: Vec<u64> = parquet_rows(&folder.join("reference.parquet"))
        .iter()
        .flat_map(|rows| rows.column_by_name("negative_elbo").unwrap().as_primitive::<Float64Type>().values().to_vec())
        .map(f64::to_bits)
        .collect();
    let mut expected: Vec<u64> = all.iter().filter_map(|(_, loss)| *loss).collect();
    calibrated.sort_unstable();
    expected.sort_unstable();
    assert_eq!(calibrated, expected);
}

#[test]
fn a_model_that_cannot_be_sampled_is_refused_before_anything_is_read() {
    let folder = prepared("");
    let folder = folder.path();
    encoder_of(&folder.join("model"), &folder.join("encoder"));
    sampled(folder, "8");
    let ran = lookalike(folder, &["run", "s.toml", "--model", "encoder", "--out", "no"]).expect(4);
    assert!(ran.stderr.contains("elbo_samples needs a [graph] decoder"), "{}", ran.stderr);
    assert!(ran.stderr.contains("take elbo_samples out of [model]"), "{}", ran.stderr);
    assert!(!folder.join("no").exists());
    for wrong in ["-1", "1025"] {
        sampled(folder, wrong);
        let ran = lookalike(folder, &["run", "s.toml"]).expect(2);
        assert!(ran.stderr.contains("`model.elbo_samples` is") && ran.stderr.contains("0 to 1024"), "{}", ran.stderr);
    }
}
