use std::path::Path;

use lookalike::schema::TableName;

use crate::support::{Ran, command, folder, image_table, lookalike, python, rows, write};

const PIPELINE: &str = "[pipeline]\nname = \"p\"\n[source]\ntable = \"images\"\n[model]\npackage = \"model\"\n\
                        [neighbors]\nk = 2\nduplicate_distance = 0.1\n[output]\ntable = \"out\"\n";

/// A source of three partitions, two of them with names that paths cannot hold, and a model fitted to it.
fn source() -> tempfile::TempDir {
    let folder = folder();
    write(&folder.path().join("p.toml"), &format!("{PIPELINE}publish = \"parquet\"\n"));
    for (number, name) in ["a", "b%2Fc d", "__HIVE_DEFAULT_PARTITION__"].into_iter().enumerate() {
        let ids = ["1", "2", "3"].map(|id| format!("{number}-{id}"));
        let rows: Vec<(&str, i64)> =
            ids.iter().map(String::as_str).zip(i64::try_from(number).unwrap() * 10..).collect();
        image_table(&folder.path().join(format!("images/kind={name}/x.parquet")), &rows);
    }
    lookalike(folder.path(), &["fit", "p.toml", "--latent-dim", "3", "--height", "8", "--width", "8"]).expect(0);
    folder
}

fn run(folder: &Path, flags: &[&str]) -> serde_json::Value {
    lookalike(folder, &[&["run", "p.toml"], flags].concat()).expect(0).summary()
}

fn manifests(folder: &Path, table: &str) -> Vec<serde_json::Value> {
    let folder = folder.join("out").join(table).join("_manifests");
    let mut names: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    names.sort();
    names.iter().map(|name| serde_json::from_slice(&std::fs::read(name).unwrap()).unwrap()).collect()
}

#[test]
fn plain_parquet_has_the_rows_that_delta_has() {
    let folder = source();
    let folder = folder.path();
    assert_eq!(run(folder, &[])["status"], "committed");
    assert_eq!(run(folder, &[])["status"], "nothing_to_do");
    let plain: Vec<_> =
        TableName::ALL.map(|table| rows(&folder.join("out"), table, &["started_at", "finished_at"])).into();
    python("manifest_readers.py", &[&folder.join("out")]);
    std::fs::rename(folder.join("out"), folder.join("plain")).unwrap();
    write(&folder.join("p.toml"), PIPELINE);
    run(folder, &[]);
    for (table, plain) in TableName::ALL.iter().zip(&plain).filter(|(table, _)| **table != TableName::Runs) {
        assert_eq!(&rows(&folder.join("out"), *table, &[]), plain, "{}", table.name());
    }
    // One place is published in one way.
    write(&folder.join("p.toml"), &format!("{PIPELINE}publish = \"parquet\"\n"));
    let refused = lookalike(folder, &["run", "p.toml"]).expect(4);
    assert!(refused.stderr.contains("published as delta"), "{}", refused.stderr);
}

#[test]
fn every_run_has_a_prefix_of_its_own_and_the_newest_manifest_names_one_run_a_partition() {
    let folder = source();
    let folder = folder.path();
    run(folder, &[]);
    image_table(&folder.join("images/kind=a/x.parquet"), &[("new", 77)]);
    run(folder, &[]);
    let all = manifests(folder, "latents");
    // Version 0, a version for each partition, and one for the replacement.
    assert_eq!(all.len(), 5);
    for (number, manifest) in all.iter().enumerate() {
        assert_eq!(manifest["version"], number);
        // Files that were named once stay where they are, for who reads by an older manifest.
        for file in manifest["files"].as_array().unwrap() {
            let url = url::Url::from_directory_path(folder.join("out/latents")).unwrap();
            let path = url.join(file["path"].as_str().unwrap()).unwrap().to_file_path().unwrap();
            assert_eq!(std::fs::metadata(&path).unwrap().len(), file["size_bytes"], "{}", path.display());
        }
    }
    let prefixes = |manifest: &serde_json::Value| -> Vec<String> {
        let files = manifest["files"].as_array().unwrap();
        files.iter().map(|file| file["path"].as_str().unwrap().split('/').nth(1).unwrap().to_owned()).collect()
    };
    let (old, new) = (prefixes(&all[3]), prefixes(&all[4]));
    assert_eq!(old.iter().filter(|prefix| new.contains(prefix)).count(), 2);
    assert_eq!((all[3]["num_rows"].as_u64(), all[4]["num_rows"].as_u64()), (Some(9), Some(7)));
    python("manifest_readers.py", &[&folder.join("out")]);
}

#[test]
fn processes_at_once_publish_every_row_once() {
    let folder = source();
    let folder = folder.path();
    let processes: Vec<_> = (0..4)
        .map(|_| {
            let mut command = command(folder, &["run", "p.toml"]);
            command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped()).spawn().unwrap()
        })
        .collect();
    for process in processes {
        Ran::from(process.wait_with_output().unwrap()).expect(0);
    }
    for (table, expected) in
        [(TableName::Latents, 9), (TableName::Neighbors, 18), (TableName::Anomalies, 9), (TableName::Runs, 3)]
    {
        assert_eq!(rows(&folder.join("out"), table, &[]).len(), expected, "{}", table.name());
    }
}
