use std::path::Path;

use arrow::array::{Array as _, AsArray as _};
use arrow::datatypes::{Float32Type, Float64Type};
use lookalike::schema::TableName;

use crate::support::{batches, folder, lookalike, python, rows};

/// The model's own last bits may differ between batch sizes, because ONNX Runtime sums in another order: relative to 1 + |value|.
const LAST_BITS: f64 = 1e-5;

fn run(folder: &Path, out: &str, args: &[&str]) {
    let all = [&["run", "--images", "pictures/folder", "--model", "model", "--out", out][..], args].concat();
    lookalike(folder, &all).expect(0);
}

#[test]
fn workers_and_batch_sizes_change_nothing_but_the_last_bits() {
    let folder = folder();
    python("source_shapes.py", &[&folder.path().join("pictures")]);
    lookalike(folder.path(), &["run", "--images", "pictures/folder", "--out", "first"]).expect(0);
    std::fs::rename(folder.path().join("first/model"), folder.path().join("model")).unwrap();

    run(folder.path(), "one", &["--workers", "1", "--batch-size", "7"]);
    run(folder.path(), "four", &["--workers", "4", "--batch-size", "7"]);
    for table in [TableName::Latents, TableName::Neighbors, TableName::Anomalies] {
        let one = rows(&folder.path().join("one"), table, &[]);
        assert_eq!(
            one,
            rows(&folder.path().join("four"), table, &[]),
            "the number of workers changes {}",
            table.name()
        );
    }
    // The order within the files is the source's too.
    let ids = |out: &str| -> Vec<String> {
        let batches = batches(&folder.path().join(out), TableName::Latents);
        batches
            .iter()
            .flat_map(|(_, rows)| {
                rows.column(0).as_string::<i32>().iter().flatten().map(str::to_owned).collect::<Vec<_>>()
            })
            .collect()
    };
    let sorted = {
        let mut ids = ids("one");
        ids.sort();
        ids
    };
    assert_eq!(ids("one"), sorted);
    assert_eq!(ids("four"), sorted);

    let reference = numbers(&folder.path().join("one"));
    for batch_size in ["1", "64"] {
        let out = format!("batch{batch_size}");
        run(folder.path(), &out, &["--workers", "2", "--batch-size", batch_size]);
        let found = numbers(&folder.path().join(&out));
        assert_eq!(found.len(), reference.len());
        let largest = found.iter().zip(&reference).map(|(a, b)| (a - b).abs() / (1.0 + b.abs())).fold(0.0, f64::max);
        println!("batch size {batch_size}: largest relative difference {largest:e}");
        assert!(largest <= LAST_BITS, "batch size {batch_size}: {largest:e}");
        let text = |out: &str| rows(&folder.path().join(out), TableName::Latents, &NUMBERS);
        assert_eq!(text(&out), text("one"));
    }
}

const NUMBERS: [&str; 8] = [
    "embedding",
    "mu",
    "logvar",
    "mean_squared_error",
    "mean_absolute_error",
    "top_1pct_squared_error",
    "kl_divergence",
    "negative_elbo",
];

/// All numbers of `latents` in order.
fn numbers(tables: &Path) -> Vec<f64> {
    let mut numbers = Vec::new();
    for (_, batch) in batches(tables, TableName::Latents) {
        for name in NUMBERS {
            let Some(column) = batch.column_by_name(name) else { continue };
            if let Some(list) = column.as_list_opt::<i32>() {
                if list.null_count() < list.len() {
                    numbers.extend(
                        list.values().as_primitive::<Float32Type>().values().iter().map(|value| f64::from(*value)),
                    );
                }
            } else {
                numbers.extend(column.as_primitive::<Float64Type>().iter().flatten());
            }
        }
    }
    numbers
}
