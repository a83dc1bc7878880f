//! What the tests share: running the program and the Python scripts, and reading tables.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;

use arrow::array::{ArrayRef, RecordBatch};
use arrow::util::display::{ArrayFormatter, FormatOptions};
use lookalike::schema::TableName;
use lookalike::store::Stores;
use lookalike::table::Table;
use url::Url;

/// A fresh folder for one test, removed when dropped.
pub(crate) fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

/// A path that `make test` names.
pub(crate) fn needed(variable: &str) -> PathBuf {
    let value = std::env::vars().find(|(name, _)| name == variable).map(|(_, value)| value);
    PathBuf::from(value.unwrap_or_else(|| panic!("{variable} is not set: run the tests with `make test`")))
}

/// The hive-partitioned image table of solar cells.
pub(crate) fn cells() -> PathBuf {
    needed("LOOKALIKE_TEST_CELLS")
}

/// What a run of the program gave.
pub(crate) struct Ran {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Ran {
    /// The last line of standard output, which is JSON.
    pub(crate) fn summary(&self) -> serde_json::Value {
        let line = self.stdout.lines().last().unwrap_or_default();
        serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: last line is {line:?}; {}", self.stderr))
    }

    /// Panics unless the exit code is the one expected.
    #[track_caller]
    pub(crate) fn expect(self, code: i32) -> Self {
        assert_eq!(self.code, code, "stdout:\n{}\nstderr:\n{}", self.stdout, self.stderr);
        self
    }
}

impl From<Output> for Ran {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

/// The program, to be run in `folder`.
pub(crate) fn command(folder: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lookalike"));
    command.current_dir(folder).args(args).env("RUST_BACKTRACE", "1");
    command
}

/// Runs the program in `folder`.
pub(crate) fn lookalike(folder: &Path, args: &[&str]) -> Ran {
    command(folder, args).output().unwrap().into()
}

/// Writes an image table of small pictures, one for each id; the seed decides what they show. A negative one is no picture.
pub(crate) fn image_table(path: &Path, rows: &[(&str, i64)]) {
    use arrow::array::{BinaryArray, Int64Array, StringArray};
    let pictures = rows.iter().map(|(_, seed)| picture(*seed));
    let rows = RecordBatch::try_from_iter([
        ("image_id", Arc::new(rows.iter().map(|(id, _)| Some(*id)).collect::<StringArray>()) as ArrayRef),
        ("image", Arc::new(BinaryArray::from_iter_values(pictures))),
        ("label", Arc::new(rows.iter().map(|(_, seed)| Some(*seed)).collect::<Int64Array>())),
    ])
    .unwrap();
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    let mut bytes = Vec::new();
    let mut writer = parquet::arrow::ArrowWriter::try_new(&mut bytes, rows.schema(), None).unwrap();
    writer.write(&rows).unwrap();
    writer.close().unwrap();
    #[expect(clippy::disallowed_methods, reason = "a test writes its own files")]
    std::fs::write(path, bytes).unwrap();
}

/// A PNG whose pixels are a function of the seed.
pub(crate) fn picture(seed: i64) -> Vec<u8> {
    let Ok(seed) = u32::try_from(seed) else { return b"no picture".to_vec() };
    let picture = image::RgbImage::from_fn(24, 16, |x, y| {
        let wave = |step: u32| ((x * step + y * (seed % 7 + 1) + seed * 31) % 256) as u8;
        image::Rgb([wave(3 + seed % 5), wave(7), wave(11 + seed % 3)])
    });
    let mut png = std::io::Cursor::new(Vec::new());
    picture.write_to(&mut png, image::ImageFormat::Png).unwrap();
    png.into_inner()
}

/// Runs a script of `tests/python`, which must succeed, and returns what it printed.
#[track_caller]
pub(crate) fn python(script: &str, args: &[&Path]) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/python").join(script);
    let ran: Ran = Command::new(needed("LOOKALIKE_TEST_PYTHON")).arg(path).args(args).output().unwrap().into();
    let ran = ran.expect(0);
    println!("{script}: {}", ran.stdout.trim());
    ran.stdout
}

/// Writes a pipeline file.
pub(crate) fn write(path: &Path, text: &str) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    #[expect(clippy::disallowed_methods, reason = "a test writes its own files")]
    std::fs::write(path, text).unwrap();
}

/// All rows of a published table as text, sorted, without the columns in `except`.
pub(crate) fn rows(tables: &Path, name: TableName, except: &[&str]) -> Vec<String> {
    let mut lines: Vec<String> = batches(tables, name)
        .iter()
        .flat_map(|(partition, batch)| {
            (0..batch.num_rows()).map(move |row| {
                let schema = batch.schema();
                let cells = schema
                    .fields()
                    .iter()
                    .zip(batch.columns())
                    .filter(|(field, _)| !except.contains(&field.name().as_str()));
                let cells = cells.map(|(field, values)| format!("{}={}", field.name(), text(values, row)));
                format!("{partition} {}", cells.collect::<Vec<_>>().join(" "))
            })
        })
        .collect();
    lines.sort();
    lines
}

fn text(values: &dyn arrow::array::Array, row: usize) -> String {
    if values.is_null(row) {
        return "NULL".to_owned();
    }
    ArrayFormatter::try_new(values, &FormatOptions::default()).unwrap().value(row).to_string()
}

/// The live rows of a published table with the name of their partition.
pub(crate) fn batches(tables: &Path, name: TableName) -> Vec<(String, RecordBatch)> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let output = Stores::default().open(&Url::from_directory_path(tables).unwrap()).unwrap();
    let keys = partition_keys(tables, name);
    let table = Table::new(&output, name, &keys, runtime.handle()).unwrap();
    runtime.block_on(async {
        let live = table.live().await.unwrap();
        let first = live.files.first().expect("the table has files").clone();
        let columns = column_names(&table, &first).await;
        let columns: Vec<&str> = columns.iter().map(String::as_str).collect();
        let read = table.read(live.files, &columns).await.unwrap();
        read.into_iter().map(|(file, batch)| (file.partition.to_string(), batch)).collect()
    })
}

async fn column_names(table: &Table, file: &lookalike::table::LiveFile) -> Vec<String> {
    let path = object_store::path::Path::from_url_path(file.url.path()).unwrap();
    let parquet = lookalike::parquet_file::ParquetFile::new(table.store().client().clone(), path, file.size_bytes);
    let metadata = parquet.metadata().await.unwrap();
    metadata.schema().fields().iter().map(|field| field.name().clone()).collect()
}

/// The partition keys by the table's own log.
fn partition_keys(tables: &Path, name: TableName) -> Vec<String> {
    let log = tables.join(name.name()).join("_delta_log/00000000000000000000.json");
    let log = std::fs::read_to_string(&log).unwrap_or_else(|e| panic!("{}: {e}", log.display()));
    log.lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .find_map(|action| {
            let keys = action.get("metaData")?.get("partitionColumns")?.as_array()?.clone();
            Some(keys.iter().filter_map(|key| key.as_str().map(str::to_owned)).collect())
        })
        .unwrap()
}
