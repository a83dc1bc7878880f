//! A small source of six days in the S3 bucket, a model and a reference for it, and pipelines that publish its tables.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use lookalike::schema::TableName;

use crate::servers::Bucket;
use crate::support::{Ran, folder, image_table, rows, write};

/// The days.
pub(crate) const DAYS: [&str; 6] = ["2026-11-01", "2026-11-02", "2026-11-03", "2026-11-04", "2026-11-05", "2026-11-06"];

/// Files of a day, each a unit.
const FILES: i64 = 3;

/// Rows of a file.
const FILE_ROWS: i64 = 8;

/// Rows of a day.
pub(crate) const DAY_ROWS: usize = (FILES * FILE_ROWS) as usize;

/// Rows of the source.
pub(crate) const ROWS: usize = DAYS.len() * DAY_ROWS;

/// Neighbors of each row.
pub(crate) const K: usize = 3;

/// What a run records of itself that no other run shares: its times, where it wrote, and whether it had to load the model.
const OF_ONE_RUN: [&str; 6] =
    ["started_at", "finished_at", "embed_secs", "neighbors_secs", "flag_secs", "onnxruntime_version"];

/// The settings name the output, which differs from pipeline to pipeline.
const SETTINGS: &str = "settings";

/// Within this time the server has done what it was asked by a process that is no more.
const SETTLING: Duration = Duration::from_millis(50);

/// The source in a bucket, and a folder with pipeline files.
pub(crate) struct Days {
    /// The bucket.
    pub(crate) bucket: Bucket,
    /// Everything of this test lies below this prefix of the bucket.
    pub(crate) prefix: String,
    folder: tempfile::TempDir,
}

/// The rows of the published tables as text, sorted, without what differs from run to run.
pub(crate) type Tables = BTreeMap<&'static str, Vec<String>>;

impl Days {
    /// Puts the source, the model and the reference below `prefix`.
    pub(crate) fn new(bucket: Bucket, prefix: &str) -> Self {
        let days = Self { bucket, prefix: prefix.to_owned(), folder: folder() };
        days.put_source("images", 0);
        write(&days.folder().join("fit.toml"), &days.pipeline("images", "none"));
        let fit = ["fit", "fit.toml", "--latent-dim", "4", "--height", "8", "--width", "8"];
        days.bucket.lookalike(days.folder(), &fit).expect(0);
        days.bucket.lookalike(days.folder(), &["calibrate", "fit.toml"]).expect(0);
        days
    }

    /// The folder in which commands are run.
    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Puts a source of the six days below the prefix; another seed gives other pictures with the same ids.
    pub(crate) fn put_source(&self, name: &str, seed: i64) {
        let source = self.folder().join(name);
        for (day, date) in (0..).zip(DAYS) {
            for file in 0..FILES {
                let first = (day * FILES + file) * FILE_ROWS;
                let ids: Vec<_> =
                    (first..first + FILE_ROWS).map(|row| (format!("image{row:03}"), row + seed)).collect();
                let rows: Vec<_> = ids.iter().map(|(id, seed)| (id.as_str(), *seed)).collect();
                image_table(&source.join(format!("ds={date}/{file}.parquet")), &rows);
            }
        }
        self.bucket.upload(&source, &format!("{}/{name}", self.prefix));
    }

    /// A pipeline from a source below the prefix to tables below the prefix.
    pub(crate) fn pipeline(&self, source: &str, out: &str) -> String {
        let base = format!("{}/{}", self.bucket.url, self.prefix);
        format!(
            "[pipeline]\nname = \"days\"\n[source]\ntable = \"{base}/{source}\"\ncolumns = [\"label\"]\n\
             [model]\npackage = \"{base}/model\"\n[execution]\nbatch_size = {FILE_ROWS}\nunit_rows = {FILE_ROWS}\n\
             [neighbors]\nk = {K}\nduplicate_distance = 0.1\n[anomaly]\nreference = \"{base}/reference.parquet\"\nthreshold = {{ contamination = 0.3 }}\n[output]\ntable = \"{base}/{out}\"\n"
        )
    }

    /// Writes the pipeline that publishes `out`, and returns its file's name.
    pub(crate) fn pipeline_to(&self, out: &str) -> String {
        let name = format!("{out}.toml");
        write(&self.folder().join(&name), &self.pipeline("images", out));
        name
    }

    /// Runs the pipeline that publishes `out`.
    pub(crate) fn run(&self, out: &str, args: &[&str]) -> Ran {
        let file = self.pipeline_to(out);
        self.bucket.lookalike(self.folder(), &[&["run", file.as_str()], args].concat())
    }

    /// The published tables, copied to this machine.
    pub(crate) fn download(&self, out: &str) -> PathBuf {
        let target = self.folder().join("copies").join(out);
        if target.exists() {
            std::fs::remove_dir_all(&target).unwrap();
        }
        self.bucket.download(&format!("{}/{out}", self.prefix), &target);
        target
    }

    /// The rows that are published in `out`.
    pub(crate) fn tables(&self, out: &str) -> Tables {
        let copy = self.download(out);
        let except = [OF_ONE_RUN.as_slice(), &[SETTINGS]].concat();
        TableName::ALL
            .into_iter()
            .map(|name| (name.name(), rows(&copy, name, if name == TableName::Runs { &except } else { &[] })))
            .collect()
    }

    /// The tables of a run that nothing disturbs, which must hold every row once.
    pub(crate) fn undisturbed(&self) -> Tables {
        let summary = self.run("undisturbed", &[]).expect(0).summary();
        assert_eq!(summary["status"], "committed", "{summary}");
        let tables = self.tables("undisturbed");
        let counts: Vec<_> = tables.iter().map(|(name, rows)| (*name, rows.len())).collect();
        assert_eq!(
            counts,
            [("anomalies", ROWS), ("groups", ROWS), ("latents", ROWS), ("neighbors", K * ROWS), ("runs", DAYS.len())],
            "{tables:?}"
        );
        tables
    }

    /// The names of the receipts in `out`, once the server has done all that it was asked.
    fn receipts(&self, out: &str) -> Vec<String> {
        let list = || self.bucket.list(&format!("{}/{out}/_lookalike/receipts/latents", self.prefix));
        let mut seen = list();
        loop {
            std::thread::sleep(SETTLING);
            let again = list();
            if again == seen {
                return seen;
            }
            seen = again;
        }
    }

    /// Rows that receipts in `out` say are embedded.
    pub(crate) fn receipted_rows(&self, out: &str) -> usize {
        let rows = self.receipts(out).into_iter().map(|name| {
            let receipt: serde_json::Value = serde_json::from_slice(&self.bucket.get(&name)).unwrap();
            receipt["file"]["num_rows"].as_u64().unwrap()
        });
        usize::try_from(rows.sum::<u64>()).unwrap()
    }

    /// Runs the pipeline that publishes `out` once more, after something went wrong with it: the tables are now those of an undisturbed
    /// run, and no unit with a receipt was embedded again.
    #[track_caller]
    pub(crate) fn finish(&self, out: &str, expected: &Tables) {
        let receipted = self.receipted_rows(out);
        let summary = self.run(out, &[]).expect(0).summary();
        assert_eq!(summary["rows_embedded"].as_u64(), Some((ROWS - receipted) as u64), "{out}: {summary}");
        assert_same(&self.tables(out), expected, out);
    }
}

/// Fails with the first row that differs.
#[track_caller]
pub(crate) fn assert_same(found: &Tables, expected: &Tables, what: &str) {
    for (name, rows) in expected {
        for number in 0..rows.len().max(found[name].len()) {
            assert_eq!(found[name].get(number), rows.get(number), "{what}: row {number} of {name}");
        }
    }
}
