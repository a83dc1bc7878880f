//! Two tables compared: which images of one are in the other too.

use std::path::Path;

use arrow::array::{AsArray as _, RecordBatch};
use arrow::datatypes::{Float32Type, Int32Type};
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;

use crate::support::{folder, image_table, lookalike, write};

/// Two outputs of one model: 30 images in two partitions, and 6 others of which two are among the 30 under other names.
fn train_and_test() -> tempfile::TempDir {
    let folder = folder();
    let path = folder.path();
    let ids: Vec<String> = (0..15).map(|row| format!("train{row:02}")).collect();
    for (day, first) in [(1, 0), (2, 15)] {
        let rows: Vec<(&str, i64)> = ids.iter().map(String::as_str).zip(first..).collect();
        image_table(&path.join(format!("train-images/ds={day}/x.parquet")), &rows);
    }
    let test = [("new0", 100), ("leak0", 3), ("new1", 101), ("broken", -1), ("leak1", 20), ("new2", 102)];
    image_table(&path.join("test-images/x.parquet"), &test);
    for name in ["train", "test"] {
        let text = format!(
            "[pipeline]\nname = \"{name}\"\n[source]\ntable = \"{name}-images\"\n[model]\npackage = \"model\"\n\
             [output]\ntable = \"{name}\"\n[limits]\nmax_rejected_fraction = 0.5\n"
        );
        write(&path.join(format!("{name}.toml")), &text);
    }
    let fit = ["fit", "train.toml", "--latent-dim", "6", "--height", "8", "--width", "8"];
    lookalike(path, &fit).expect(0);
    for name in ["train.toml", "test.toml"] {
        lookalike(path, &["run", name]).expect(0);
    }
    folder
}

/// Id, partition, rank, id of the neighbor, distance, partition of the neighbor.
type Row = (String, Option<String>, i32, String, f32, Option<String>);

fn rows(file: &Path) -> Vec<Row> {
    let file = std::fs::File::open(file).unwrap();
    let batches: Vec<RecordBatch> =
        ParquetRecordBatchReaderBuilder::try_new(file).unwrap().build().unwrap().map(Result::unwrap).collect();
    let mut rows = Vec::new();
    for batch in batches {
        let text = |name: &str, row: usize| {
            let column = batch.column_by_name(name).unwrap().as_string::<i32>().clone();
            column.iter().nth(row).unwrap().map(str::to_owned)
        };
        for row in 0..batch.num_rows() {
            let rank = batch.column_by_name("rank").unwrap().as_primitive::<Int32Type>().value(row);
            let distance = batch.column_by_name("distance").unwrap().as_primitive::<Float32Type>().value(row);
            rows.push((
                text("image_id", row).unwrap(),
                text("partition", row),
                rank,
                text("neighbor_id", row).unwrap(),
                distance,
                text("neighbor_partition", row),
            ));
        }
    }
    rows
}

#[test]
fn images_that_another_table_has_too_are_found() {
    let folder = train_and_test();
    let folder = folder.path();
    let args = ["compare-tables", "test", "train", "--out", "leaks.parquet", "-k", "2", "--duplicate-distance", "1e-6"];
    let ran = lookalike(folder, &args).expect(0);
    let summary = ran.summary();
    assert_eq!((summary["rows_query"].as_u64(), summary["rows_reference"].as_u64()), (Some(5), Some(30)));
    assert_eq!((summary["duplicates"].as_u64(), summary["equal"].as_u64()), (Some(2), Some(2)));
    assert_eq!(summary["rows_written"], 10);
    assert_eq!(summary["nearest_distance"]["0"], 0.0);
    assert!(ran.stderr.contains("leak0  ds=1/train03"), "{}", ran.stderr);

    let rows = rows(&folder.join("leaks.parquet"));
    let ids: Vec<(&str, i32)> = rows.iter().map(|row| (row.0.as_str(), row.2)).collect();
    let expected = ["new0", "leak0", "new1", "leak1", "new2"].map(|id| [(id, 1), (id, 2)]).concat();
    assert_eq!(ids, expected, "the broken image has no vector and no row");
    let equal: Vec<_> = rows.iter().filter(|row| row.4 == 0.0).collect();
    let near = |row: &Row| format!("{} {}/{}", row.0, row.5.as_deref().unwrap(), row.3);
    assert_eq!(equal.iter().map(|row| near(row)).collect::<Vec<_>>(), ["leak0 ds=1/train03", "leak1 ds=2/train05"]);
    assert!(rows.iter().all(|row| row.1.is_none()), "the table asked about has no partitions");

    // The same by a pipeline of its own.
    let text = std::fs::read_to_string(folder.join("test.toml")).unwrap();
    let neighbors = "[neighbors]\nk = 2\nscope = \"reference\"\nreference = \"train\"\n";
    write(&folder.join("leaks.toml"), &format!("{text}{neighbors}"));
    lookalike(folder, &["neighbors", "leaks.toml"]).expect(0);
    let listed = crate::support::rows(&folder.join("test"), lookalike::schema::TableName::Neighbors, &["run_id"]);
    let mut expected: Vec<String> = rows
        .iter()
        .map(|(id, _, rank, near, distance, partition)| {
            let partition = partition.as_deref().unwrap();
            format!(
                " image_id={id} rank={rank} neighbor_id={near} distance={distance:?} neighbor_partition={partition}"
            )
        })
        .collect();
    expected.sort();
    assert_eq!(listed, expected);
}

#[test]
fn tables_that_are_not_there_or_of_another_model_are_refused() {
    let folder = train_and_test();
    let folder = folder.path();
    let ran = lookalike(folder, &["compare-tables", "test", "nowhere", "--out", "x.parquet"]).expect(2);
    assert!(ran.stderr.contains("there is no table latents below file://"), "{}", ran.stderr);
    lookalike(folder, &["fit", "test.toml", "--model", "model2", "--latent-dim", "2", "--height", "8", "--width", "8"])
        .expect(0);
    lookalike(folder, &["run", "test.toml", "--model", "model2"]).expect(0);
    let ran = lookalike(folder, &["compare-tables", "test", "train", "--out", "x.parquet"]).expect(2);
    assert!(ran.stderr.contains("was embedded with model"), "{}", ran.stderr);
    assert!(!folder.join("x.parquet").exists());
}
