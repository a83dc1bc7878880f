use std::path::Path;

use lookalike::schema::TableName;

use crate::support::{command, folder, image_table, lookalike, picture, rows, write};

const PIPELINE: &str = "[pipeline]\nname = \"p\"\n[source]\ntable = \"images\"\ncolumns = [\"label\"]\n[model]\npackage = \"model\"\n\
                        [neighbors]\nk = 3\n[output]\ntable = \"out\"\n[limits]\nmax_rejected_fraction = 0.5\n";

const DAY_1: [(&str, i64); 6] = [("a", 1), ("b", 2), ("c", 3), ("d", 4), ("e", 5), ("f", 6)];
const DAY_2: [(&str, i64); 6] = [("g", 11), ("h", 12), ("i", 13), ("j", 14), ("k", 15), ("l", 16)];

/// A source of two days, and a model fitted to it.
fn two_days() -> tempfile::TempDir {
    let folder = folder();
    write(&folder.path().join("p.toml"), PIPELINE);
    image_table(&folder.path().join("images/ds=1/x.parquet"), &DAY_1);
    image_table(&folder.path().join("images/ds=2/x.parquet"), &DAY_2);
    let fit = ["fit", "p.toml", "--latent-dim", "3", "--height", "8", "--width", "8"];
    lookalike(folder.path(), &fit).expect(0);
    folder
}

fn run(folder: &Path) -> serde_json::Value {
    lookalike(folder, &["run", "p.toml"]).expect(0).summary()
}

fn count(folder: &Path, table: TableName, partition: &str) -> usize {
    rows(&folder.join("out"), table, &[]).iter().filter(|row| row.starts_with(&format!("{partition} "))).count()
}

#[test]
fn a_new_partition_renews_the_neighbors_of_the_old_ones_and_embeds_nothing_again() {
    let folder = two_days();
    let folder = folder.path();
    run(folder);
    let old = rows(&folder.join("out"), TableName::Latents, &[]);
    image_table(&folder.join("images/ds=3/x.parquet"), &[("z1", 1), ("z2", 99)]);
    assert_eq!(run(folder)["status"], "committed");
    let new = rows(&folder.join("out"), TableName::Latents, &[]);
    assert!(old.iter().all(|row| new.contains(row)));
    // z1 shows what a shows, so each is now the other's nearest, at distance 0.
    let neighbors = rows(&folder.join("out"), TableName::Neighbors, &["run_id"]);
    assert!(
        neighbors.contains(&"ds=1 image_id=a rank=1 neighbor_id=z1 distance=0.0 neighbor_partition=ds=3".to_owned())
    );
    assert!(
        neighbors.contains(&"ds=3 image_id=z1 rank=1 neighbor_id=a distance=0.0 neighbor_partition=ds=1".to_owned())
    );
    let runs = rows(&folder.join("out"), TableName::Runs, &[]);
    assert!(runs.iter().all(|row| !row.contains("rows_in=0")), "{runs:?}");
    assert_eq!(run(folder)["status"], "nothing_to_do");
}

#[test]
fn a_partition_that_becomes_empty_leaves_no_neighbors_and_no_flags() {
    let folder = two_days();
    let folder = folder.path();
    run(folder);
    image_table(&folder.join("images/ds=1/x.parquet"), &[]);
    run(folder);
    for table in [TableName::Latents, TableName::Neighbors, TableName::Anomalies] {
        assert_eq!(count(folder, table, "ds=1"), 0, "{}", table.name());
    }
    assert_eq!(count(folder, TableName::Anomalies, "ds=2"), 6);
    let neighbors = rows(&folder.join("out"), TableName::Neighbors, &[]);
    assert!(neighbors.iter().all(|row| !row.contains("neighbor_partition=ds=1")), "{neighbors:?}");
    assert_eq!(run(folder)["status"], "nothing_to_do");
}

#[test]
fn a_null_partition_is_replaced_like_any_other() {
    let folder = two_days();
    let folder = folder.path();
    for (empty, ids) in [("ds=", "m"), ("ds=__HIVE_DEFAULT_PARTITION__", "n")] {
        std::fs::remove_dir_all(folder.join("images")).unwrap();
        for seed in [1, 2] {
            image_table(&folder.join(format!("images/{empty}/x.parquet")), &[(ids, seed), ("o", 3), ("p", 4)]);
            run(folder);
            assert_eq!(count(folder, TableName::Latents, "ds=__HIVE_DEFAULT_PARTITION__"), 3, "{empty}");
        }
        assert_eq!(run(folder)["status"], "nothing_to_do");
    }
}

#[test]
fn a_predicate_that_no_partition_satisfies_changes_nothing() {
    let folder = two_days();
    let ran = lookalike(folder.path(), &["run", "p.toml", "--where", "ds = '7'"]).expect(4);
    assert!(ran.stderr.contains("no partition of"), "{}", ran.stderr);
    assert!(!folder.path().join("out").exists());
}

#[test]
fn what_would_fail_later_fails_before_a_table_is_made() {
    let folder = two_days();
    let other = format!("{PIPELINE}[anomaly]\nreference = \"none.json\"\n");
    write(&folder.path().join("reference.toml"), &other);
    let ran = lookalike(folder.path(), &["run", "reference.toml"]).expect(4);
    assert!(ran.stderr.contains("lookalike calibrate"), "{}", ran.stderr);
    lookalike(folder.path(), &["neighbors", "p.toml"]).expect(2);
    let missing = folder.path().join("libonnxruntime.so");
    lookalike(folder.path(), &["--onnxruntime", missing.to_str().unwrap(), "run", "p.toml"]).expect(6);
    assert!(!folder.path().join("out").exists());
}

#[test]
fn a_partition_without_a_readable_image_is_published_as_unknown() {
    let folder = two_days();
    let folder = folder.path();
    image_table(&folder.join("broken/x.parquet"), &[("a", -1), ("b", -1)]);
    write(&folder.join("p.toml"), &PIPELINE.replace("\"images\"", "\"broken\""));
    lookalike(folder, &["run", "p.toml"]).expect(3);
    // Running again has nothing to do, and nothing to complain of.
    lookalike(folder, &["run", "p.toml"]).expect(0);
    let flags = rows(&folder.join("out"), TableName::Anomalies, &[]);
    assert_eq!(flags.len(), 2);
    assert!(flags.iter().all(|row| row.contains("is_anomaly=NULL") && row.contains("p_value=NULL")), "{flags:?}");
    assert_eq!(rows(&folder.join("out"), TableName::Runs, &[]).len(), 1);
}

#[test]
fn duplicate_ids_are_named_and_nothing_is_published() {
    let folder = two_days();
    image_table(&folder.path().join("images/ds=2/x.parquet"), &[("same", 1), ("same", 2), ("other", 3)]);
    let ran = lookalike(folder.path(), &["run", "p.toml"]).expect(4);
    assert!(ran.stderr.contains("same") && ran.stderr.contains("ds=2"), "{}", ran.stderr);
}

#[test]
fn tables_can_be_moved_and_data_files_that_a_vacuum_took_are_made_again() {
    let folder = two_days();
    let folder = folder.path();
    run(folder);
    let before = rows(&folder.join("out"), TableName::Latents, &[]);
    // The receipts of the run stay, the table they speak of is gone.
    std::fs::rename(folder.join("out"), folder.join("moved")).unwrap();
    std::fs::remove_dir_all(folder.join("moved/latents")).unwrap();
    write(&folder.join("p.toml"), &PIPELINE.replace("\"out\"", "\"moved\""));
    run(folder);
    assert_eq!(rows(&folder.join("moved"), TableName::Latents, &[]), before);
}

#[test]
fn four_processes_at_once_publish_every_row_once() {
    let folder = two_days();
    let folder = folder.path();
    let processes: Vec<_> = (0..4)
        .map(|_| {
            let mut command = command(folder, &["run", "p.toml"]);
            command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped()).spawn().unwrap()
        })
        .collect();
    for process in processes {
        crate::support::Ran::from(process.wait_with_output().unwrap()).expect(0);
    }
    for (table, expected) in
        [(TableName::Latents, 12), (TableName::Neighbors, 36), (TableName::Anomalies, 12), (TableName::Runs, 2)]
    {
        assert_eq!(rows(&folder.join("out"), table, &[]).len(), expected, "{}", table.name());
    }
}

#[test]
fn pictures_with_odd_names_are_rows_too() {
    let folder = folder();
    let names = ["_DSC1.png", "a b.png", "c#1.png", "d%41.png", "e=f/ü.png", "[1].png", "g.PNG"];
    for (seed, name) in names.iter().enumerate() {
        let path = folder.path().join("pictures").join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        #[expect(clippy::disallowed_methods, reason = "a test writes its own files")]
        std::fs::write(path, picture(i64::try_from(seed).unwrap())).unwrap();
    }
    let summary = lookalike(folder.path(), &["run", "--images", "pictures", "--out", "out"]).expect(0).summary();
    assert_eq!(summary["rows_ok"].as_u64(), Some(names.len() as u64), "{summary}");
    let latents = rows(&folder.path().join("out"), TableName::Latents, &[]);
    for name in names {
        assert!(latents.iter().any(|row| row.contains(&format!("image_id={name} "))), "{name}: {latents:?}");
    }
}
