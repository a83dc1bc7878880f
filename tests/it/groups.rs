use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow::array::{ArrayRef, AsArray as _, BinaryArray, RecordBatch, StringArray};
use arrow::datatypes::{Float32Type, Int64Type};
use image::ImageFormat;
use image::imageops::FilterType;
use lookalike::schema::TableName;
use serde_json::Value;

use crate::support::{Ran, batches, folder, lookalike, parquet_file, picture, run_ids, write};

/// Largest cosine distance of images that are to be one: above that of a picture and its enlargement, below that of two pictures.
const MAX_DISTANCE: f64 = 0.05;

/// A picture at twice its size.
fn enlarged(seed: i64) -> Vec<u8> {
    let picture = image::load_from_memory(&picture(seed)).unwrap();
    let larger = picture.resize_exact(2 * picture.width(), 2 * picture.height(), FilterType::Triangle);
    let mut png = std::io::Cursor::new(Vec::new());
    larger.write_to(&mut png, ImageFormat::Png).unwrap();
    png.into_inner()
}

fn put(folder: &Path, day: &str, rows: &[(&str, Vec<u8>)]) {
    let table = RecordBatch::try_from_iter([
        ("image_id", Arc::new(StringArray::from_iter_values(rows.iter().map(|row| row.0))) as ArrayRef),
        ("image", Arc::new(BinaryArray::from_iter_values(rows.iter().map(|row| &row.1)))),
    ]);
    let file = folder.join(format!("images/ds={day}/x.parquet"));
    std::fs::create_dir_all(file.parent().unwrap()).unwrap();
    #[expect(clippy::disallowed_methods, reason = "a test writes its own files")]
    std::fs::write(file, parquet_file(&table.unwrap(), None)).unwrap();
}

fn set(folder: &Path, neighbors: &str) {
    let text = "[pipeline]\nname = \"p\"\n[source]\ntable = \"images\"\n[model]\npackage = \"model\"\n[output]\ntable = \"out\"\n\
                [limits]\nmax_rejected_fraction = 0.5\n[neighbors]\n";
    write(&folder.join("p.toml"), &format!("{text}{neighbors}"));
}

/// Two days of pictures, some of them more than once, and a model fitted to them.
fn prepared() -> (tempfile::TempDir, PathBuf) {
    let folder = folder();
    let path = folder.path();
    put(path, "1", &[("a", picture(1)), ("b", picture(2)), ("c", picture(3)), ("d", picture(4)), ("no", picture(-1))]);
    put(path, "2", &[("a", picture(1)), ("b", enlarged(2)), ("e", picture(3)), ("f", picture(5)), ("g", picture(6))]);
    set(path, &format!("k = 3\nduplicate_distance = {MAX_DISTANCE}\n"));
    lookalike(path, &["fit", "p.toml", "--latent-dim", "4", "--height", "8", "--width", "8"]).expect(0);
    let out = path.join("out");
    (folder, out)
}

fn run(folder: &Path) -> (Value, Ran) {
    let ran = lookalike(folder, &["run", "p.toml"]).expect(0);
    (ran.summary(), ran)
}

/// Representative, size of the group, and distance of each image; images by partition and id.
fn groups(out: &Path) -> BTreeMap<String, (String, i64, f32)> {
    let mut groups = BTreeMap::new();
    let mut ids: BTreeMap<String, String> = BTreeMap::new();
    for (partition, rows) in batches(out, TableName::Groups) {
        let text = |name: &str| rows.column_by_name(name).unwrap().as_string::<i32>();
        let distances = rows.column_by_name("distance_to_representative").unwrap().as_primitive::<Float32Type>();
        let sizes = rows.column_by_name("group_size").unwrap().as_primitive::<Int64Type>();
        for row in 0..rows.num_rows() {
            let head =
                format!("{} {}", text("representative_partition").value(row), text("representative_id").value(row));
            let group_id = text("group_id").value(row);
            assert_eq!(
                (group_id.len(), ids.entry(head.clone()).or_insert(group_id.to_owned()).as_str()),
                (32, group_id)
            );
            let image = format!("{partition} {}", text("image_id").value(row));
            groups.insert(image, (head, sizes.value(row), distances.value(row)));
        }
    }
    let distinct: std::collections::BTreeSet<_> = ids.values().collect();
    assert_eq!(distinct.len(), ids.len(), "one id for each group");
    groups
}

#[test]
fn images_that_are_alike_are_in_one_group_with_the_largest_of_them_as_its_representative() {
    let (folder, out) = prepared();
    let folder = folder.path();
    let planned = || {
        let planned = lookalike(folder, &["plan", "p.toml", "--json"]).expect(0).summary();
        let of = |partition: &Value| partition["groups"].as_str().unwrap().to_owned();
        planned["partitions"].as_array().unwrap().iter().map(of).collect::<Vec<_>>()
    };
    assert_eq!(planned(), ["append", "append"]);
    let (summary, ran) = run(folder);
    assert_eq!((summary["groups"].as_u64(), summary["duplicates"].as_u64()), (Some(3), Some(3)), "{summary}");
    assert!(ran.stderr.contains("3 groups of near-duplicates"), "{}", ran.stderr);
    assert!(!ran.stderr.contains("raise k"), "{}", ran.stderr);
    let found = groups(&out);
    assert_eq!(found.len(), 9, "all but the one that is no picture: {found:#?}");
    let group = |image: &str| (found[image].0.as_str(), found[image].1);
    // The same bytes on two days: the earlier one; under two ids: the smaller one.
    for image in ["ds=1 a", "ds=2 a"] {
        assert_eq!(found[image], ("ds=1 a".to_owned(), 2, 0.0));
    }
    assert_eq!((group("ds=1 c"), group("ds=2 e")), (("ds=1 c", 2), ("ds=1 c", 2)));
    // The enlarged one has more pixels.
    assert_eq!((group("ds=1 b"), group("ds=2 b")), (("ds=2 b", 2), ("ds=2 b", 2)));
    assert!(found["ds=1 b"].2 > 0.0 && f64::from(found["ds=1 b"].2) <= MAX_DISTANCE, "{found:#?}");
    for image in ["ds=1 d", "ds=2 f", "ds=2 g"] {
        assert_eq!(found[image], (image.to_owned(), 1, 0.0));
    }
    let recorded = batches(&out, TableName::Runs);
    let [(_, recorded)] = recorded.as_slice() else { panic!("{recorded:?}") };
    let recorded = recorded.column_by_name("groups_run_id").unwrap().as_string::<i32>();
    let run_ids: Vec<_> = run_ids(&out, TableName::Groups).into_values().flatten().collect();
    assert!(recorded.iter().flatten().eq(&run_ids), "{recorded:?} {run_ids:?}");

    let (again, _) = run(folder);
    assert_eq!((again["status"].as_str(), &again["groups"]), (Some("nothing_to_do"), &summary["groups"]), "{again}");
    assert_eq!(again["duplicates"], summary["duplicates"]);
    assert_eq!(planned(), ["up to date", "up to date"]);
    let told = lookalike(folder, &["explain", "p.toml", "e"]).expect(0).stdout;
    assert!(told.contains("groups (ds=2)") && told.contains("representative_id          c"), "{told}");
}

#[test]
fn another_threshold_groups_again_and_embeds_and_compares_nothing() {
    let (folder, out) = prepared();
    let folder = folder.path();
    run(folder);
    let neighbors = run_ids(&out, TableName::Neighbors);
    set(folder, "k = 3\nduplicate_distance = 0\n");
    let (summary, _) = run(folder);
    assert_eq!((summary["status"].as_str(), &summary["provider"]), (Some("committed"), &Value::Null), "{summary}");
    assert_eq!((summary["groups"].as_u64(), summary["duplicates"].as_u64()), (Some(2), Some(2)), "{summary}");
    assert_eq!(run_ids(&out, TableName::Neighbors), neighbors);
    assert_eq!(groups(&out)["ds=1 b"].0, "ds=1 b");

    // By itself, after the neighbors.
    set(folder, &format!("k = 3\nduplicate_distance = {MAX_DISTANCE}\n"));
    let ran = lookalike(folder, &["neighbors", "p.toml"]).expect(0);
    let lines: Vec<Value> = ran.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let said = |line: &Value| (line["table"].clone(), line["status"].clone());
    assert_eq!(
        lines.iter().map(said).collect::<Vec<_>>(),
        [("neighbors".into(), "nothing_to_do".into()), ("groups".into(), "committed".into())]
    );
    assert_eq!(groups(&out)["ds=1 b"].0, "ds=2 b");

    // Without the key there is no such stage, and the summary says so.
    set(folder, "k = 3\n");
    let (summary, _) = run(folder);
    assert_eq!((summary["groups"].clone(), summary["duplicates"].clone()), (Value::Null, Value::Null));
}

#[test]
fn groups_follow_what_comes_and_goes() {
    let (folder, out) = prepared();
    let folder = folder.path();
    run(folder);
    put(folder, "0", &[("z", enlarged(1)), ("y", enlarged(3))]);
    let (summary, _) = run(folder);
    assert_eq!((summary["groups"].as_u64(), summary["duplicates"].as_u64()), (Some(3), Some(5)), "{summary}");
    let found = groups(&out);
    assert_eq!((found["ds=2 a"].0.as_str(), found["ds=2 a"].1), ("ds=0 z", 3), "{found:#?}");
    // Replaced by something else.
    put(folder, "0", &[("z", picture(7))]);
    let (summary, _) = run(folder);
    assert_eq!((summary["groups"].as_u64(), summary["duplicates"].as_u64()), (Some(3), Some(3)), "{summary}");
    assert_eq!(groups(&out)["ds=2 a"].0, "ds=1 a");
}

#[test]
fn within_partitions_there_are_groups_of_one_partition_each() {
    let (folder, out) = prepared();
    let folder = folder.path();
    put(
        folder,
        "2",
        &[("a", picture(1)), ("b", enlarged(2)), ("b2", picture(2)), ("f", picture(5)), ("g", picture(6))],
    );
    set(folder, &format!("k = 3\nscope = \"partition\"\nduplicate_distance = {MAX_DISTANCE}\n"));
    let (summary, _) = run(folder);
    assert_eq!((summary["groups"].as_u64(), summary["duplicates"].as_u64()), (Some(1), Some(1)), "{summary}");
    let found = groups(&out);
    assert_eq!(found["ds=2 b2"].0, "ds=2 b");
    assert_eq!((found["ds=1 a"].0.as_str(), found["ds=2 a"].0.as_str()), ("ds=1 a", "ds=2 a"));
    // Of a partition that changed, the groups are made again; those of the other stay.
    let before = run_ids(&out, TableName::Groups);
    put(folder, "2", &[("a", picture(1)), ("b", enlarged(2))]);
    run(folder);
    let after = run_ids(&out, TableName::Groups);
    assert_eq!((&before["ds=1"], before["ds=2"] == after["ds=2"]), (&after["ds=1"], false));
}

#[test]
fn lists_that_may_hide_duplicates_are_told_with_what_to_do() {
    let (folder, _) = prepared();
    let folder = folder.path();
    put(folder, "3", &[("h", enlarged(1)), ("i", enlarged(3))]);
    set(folder, &format!("k = 1\nduplicate_distance = {MAX_DISTANCE}\n"));
    let (_, ran) = run(folder);
    let told = ran.stderr.lines().find(|line| line.contains("duplicate_distance")).unwrap_or_default();
    assert!(told.contains("all 1 neighbors of ") && told.contains("raise k in [neighbors]"), "{}", ran.stderr);
}
