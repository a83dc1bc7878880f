use std::path::{Path, PathBuf};

use image::ImageFormat;
use serde_json::Value;

use crate::servers::s3;
use crate::support::{Ran, folder, image_table, lookalike, picture, write};

const PIPELINE: &str = "[pipeline]\nname = \"p\"\n[source]\ntable = \"images\"\n[model]\npackage = \"model\"\n\
                        [neighbors]\nmetric = \"l2\"\nk = 2\n[output]\ntable = \"out\"\n";

/// The same picture as a JPEG file.
fn jpeg(seed: i64) -> Vec<u8> {
    let mut bytes = std::io::Cursor::new(Vec::new());
    image::load_from_memory(&picture(seed)).unwrap().write_to(&mut bytes, ImageFormat::Jpeg).unwrap();
    bytes.into_inner()
}

fn save(path: &Path, bytes: &[u8]) {
    #[expect(clippy::disallowed_methods, reason = "a test writes its own files")]
    std::fs::write(path, bytes).unwrap();
}

/// A model, the tables of ten pictures, and the pictures 1 and 2 as files of their own.
fn prepared() -> (tempfile::TempDir, PathBuf) {
    let folder = folder();
    let path = folder.path().to_owned();
    let ids: Vec<String> = (0..10).map(|seed| format!("{seed}")).collect();
    let rows: Vec<(&str, i64)> = ids.iter().map(String::as_str).zip(0..).collect();
    image_table(&path.join("images/ds=1/x.parquet"), &rows[..5]);
    image_table(&path.join("images/ds=2/x.parquet"), &rows[5..]);
    write(&path.join("p.toml"), PIPELINE);
    lookalike(&path, &["fit", "p.toml", "--latent-dim", "4", "--height", "8", "--width", "8"]).expect(0);
    for (name, bytes) in
        [("one.png", picture(1)), ("copy.png", picture(1)), ("one.jpg", jpeg(1)), ("two.png", picture(2))]
    {
        save(&path.join(name), &bytes);
    }
    (folder, path)
}

fn compare(folder: &Path, args: &[&str]) -> Ran {
    lookalike(folder, &[&["compare", "--model", "model"], args].concat())
}

fn pairs(ran: Ran) -> Vec<Value> {
    ran.expect(0).summary()["pairs"].as_array().unwrap().clone()
}

fn pairs_of<const N: usize>(ran: Ran) -> [Value; N] {
    pairs(ran).try_into().unwrap()
}

#[test]
fn a_picture_its_copy_its_jpeg_and_another_one_are_told_apart() {
    let (_folder, path) = prepared();
    lookalike(&path, &["run", "p.toml"]).expect(0);
    let images = ["one.png", "copy.png", "one.jpg", "two.png"];
    let told = compare(&path, &[&images[..], &["--table", "out", "--format", "json"]].concat()).expect(0).summary();
    assert_eq!((told["metric"].as_str(), told["table"]["images"].as_u64()), (Some("l2"), Some(10)));
    let first = &told["images"][0];
    assert_eq!(
        (&first["width"], &first["height"], first["bytes"].as_u64()),
        (&24.into(), &16.into(), Some(picture(1).len() as u64))
    );
    let all = told["pairs"].as_array().unwrap();
    assert_eq!(all.len(), 6);
    let of = |a: &str, b: &str| all.iter().find(|pair| pair["a"] == a && pair["b"] == b).unwrap();
    let copy = of("one.png", "copy.png");
    assert_eq!((copy["verdict"].as_str(), copy["distance"].as_f64()), (Some("same_file"), Some(0.0)));
    assert_eq!((&copy["identical_bytes"], &copy["identical_embedding"]), (&true.into(), &true.into()));
    let jpeg = of("copy.png", "one.jpg");
    assert_eq!((jpeg["verdict"].as_str(), &jpeg["identical_bytes"]), (Some("alike"), &false.into()), "{told:#}");
    let other = of("one.jpg", "two.png");
    let number = |pair: &Value, name: &str| pair[name].as_f64().unwrap();
    assert!(number(jpeg, "distance") > 0.0 && number(jpeg, "distance") < number(other, "distance"), "{told:#}");
    assert!(number(jpeg, "percentile") < 50.0 && number(jpeg, "percentile") <= number(other, "percentile"));

    // The nearest neighbor that the table has of a picture is as far from it here.
    let rows = crate::support::rows(&path.join("out"), lookalike::schema::TableName::Neighbors, &[]);
    let nearest = rows.iter().find(|row| row.contains(" image_id=1 rank=1 ")).unwrap();
    let value = |name: &str| nearest.split(&format!(" {name}=")).nth(1).unwrap().split(' ').next().unwrap();
    save(&path.join("nearest.png"), &picture(value("neighbor_id").parse().unwrap()));
    let [pair] = pairs_of(compare(&path, &["one.png", "nearest.png", "--metric", "l2", "--format", "json"]));
    let published: f32 = value("distance").parse().unwrap();
    assert_eq!((number(&pair, "distance") as f32).to_bits(), published.to_bits(), "{nearest}");

    let text = compare(&path, &["one.png", "one.jpg", "--table", "out"]).expect(0);
    for words in ["one.png: 24 x 16 pixels", "one.png and one.jpg", "(l2)", "percentile", "verdict     alike"] {
        assert!(text.stdout.contains(words), "{words} is not in {}", text.stdout);
    }
}

#[test]
fn without_a_yardstick_there_is_no_verdict_and_what_is_missing_is_said() {
    let (_folder, path) = prepared();
    let ran = compare(&path, &["one.png", "two.png", "--format", "json"]).expect(0);
    let told = ran.summary();
    assert_eq!((told["metric"].as_str(), &told["pairs"][0]["verdict"]), (Some("cosine"), &Value::Null));
    assert_eq!(told["pairs"][0]["percentile"], Value::Null);
    let ran = compare(&path, &["one.png", "two.png"]).expect(0);
    assert!(!ran.stdout.contains("verdict"), "{}", ran.stdout);
    assert!(ran.stderr.contains("--table tells what is near"), "{}", ran.stderr);

    let judged = |distance: &str| {
        let found = pairs(compare(
            &path,
            &["one.png", "one.jpg", "copy.png", "--duplicate-distance", distance, "--format", "json"],
        ));
        found.iter().map(|pair| pair["verdict"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(judged("2"), ["near_duplicates", "same_file", "near_duplicates"]);
    assert_eq!(judged("0"), ["not_near_duplicates", "same_file", "not_near_duplicates"]);
}

#[test]
fn what_cannot_be_compared_is_an_error_that_names_it() {
    let (_folder, path) = prepared();
    save(&path.join("text.png"), b"no picture");
    for (image, why) in [("text.png", "cannot compare text.png"), ("gone.png", "there is no image at gone.png")] {
        let ran = compare(&path, &["one.png", image]).expect(4);
        assert!(ran.stderr.contains(why), "{}", ran.stderr);
        assert_eq!(ran.stdout, "");
    }
    compare(&path, &["one.png"]).expect(2);
    compare(&path, &["one.png", "two.png", "--duplicate-distance", "-1"]).expect(2);
    let ran = compare(&path, &["one.png", "two.png", "--table", "out"]).expect(2);
    assert!(ran.stderr.contains("there is no table `neighbors`"), "{}", ran.stderr);

    lookalike(&path, &["run", "p.toml"]).expect(0);
    let ran = compare(&path, &["one.png", "two.png", "--table", "out", "--metric", "cosine"]).expect(2);
    assert!(ran.stderr.contains("found by l2, not by cosine"), "{}", ran.stderr);
    let fit = ["fit", "p.toml", "--model", "other", "--latent-dim", "2", "--height", "8", "--width", "8"];
    lookalike(&path, &fit).expect(0);
    let ran = lookalike(&path, &["compare", "--model", "other", "one.png", "two.png", "--table", "out"]).expect(2);
    assert!(ran.stderr.contains("distances of different models do not compare"), "{}", ran.stderr);
}

#[test]
fn images_may_lie_in_different_stores() {
    let (_folder, path) = prepared();
    let bucket = s3();
    for name in ["one.png", "one.jpg"] {
        bucket.upload(&path.join(name), &format!("compare/a b/{name}"));
    }
    let remote = |name: &str| format!("{}/compare/a b/{name}", bucket.url);
    let compare = |images: [&str; 2]| {
        bucket.lookalike(&path, &[&["compare", "--model", "model", "--format", "json"], &images[..]].concat())
    };
    let found = pairs(compare(["one.png", &remote("one.png")]));
    assert_eq!((found.len(), found[0]["verdict"].as_str()), (1, Some("same_file")));
    let local = pairs(compare(["one.png", "one.jpg"]));
    let mixed = pairs(compare(["one.png", &remote("one.jpg")]));
    assert_eq!(mixed[0]["distance"], local[0]["distance"]);
    assert_eq!(mixed[0]["b"], remote("one.jpg").as_str());
    let file = url::Url::from_file_path(path.join("one.png")).unwrap();
    assert_eq!(pairs(compare([file.as_str(), &remote("one.jpg")]))[0]["distance"], local[0]["distance"]);
    let ran = compare(["one.png", &remote("gone.png")]).expect(4);
    assert!(ran.stderr.contains("gone.png"), "{}", ran.stderr);
    // A bucket that is not there is another error than an image that is not.
    let ran = compare(["one.png", "s3://no-such-bucket/one.png"]).expect(4);
    assert!(ran.stderr.contains("no-such-bucket"), "{}", ran.stderr);
}
