//! What the tests share: running the program and the Python scripts, and reading tables.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;

use arrow::array::{ArrayRef, AsArray as _, RecordBatch};
use arrow::util::display::{ArrayFormatter, FormatOptions};
use lookalike::config::Publish;
use lookalike::model::package::Golden;
use lookalike::model::{self, Outputs, Role};
use lookalike::schema::TableName;
use lookalike::store::Stores;
use lookalike::table::{LiveFile, Presence, Table};
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

/// Runs the program in `folder`, which must end with `code`; also returns its largest resident set, in KiB.
#[track_caller]
pub(crate) fn peak_memory(folder: &Path, args: &[&str], code: i32) -> (Ran, u64) {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/python/peak_memory.py");
    let mut command = Command::new(needed("LOOKALIKE_TEST_PYTHON"));
    command.current_dir(folder).arg(script).arg(env!("CARGO_BIN_EXE_lookalike")).args(args);
    let ran = Ran::from(command.output().unwrap()).expect(code);
    let resident_kib = ran.stdout.lines().last().unwrap().parse().unwrap();
    (ran, resident_kib)
}

/// Writes an image table of small pictures, one for each id; the seed decides what they show. A negative one is no picture.
pub(crate) fn image_table(path: &Path, rows: &[(&str, i64)]) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    #[expect(clippy::disallowed_methods, reason = "a test writes its own files")]
    std::fs::write(path, image_file(rows, None)).unwrap();
}

/// A Parquet file of such an image table, with row groups of so many rows.
pub(crate) fn image_file(rows: &[(&str, i64)], row_group_rows: Option<usize>) -> Vec<u8> {
    use arrow::array::{BinaryArray, Int64Array, StringArray};
    let pictures = rows.iter().map(|(_, seed)| picture(*seed));
    let rows = RecordBatch::try_from_iter([
        ("image_id", Arc::new(rows.iter().map(|(id, _)| Some(*id)).collect::<StringArray>()) as ArrayRef),
        ("image", Arc::new(BinaryArray::from_iter_values(pictures))),
        ("label", Arc::new(rows.iter().map(|(_, seed)| Some(*seed)).collect::<Int64Array>())),
    ])
    .unwrap();
    parquet_file(&rows, row_group_rows)
}

/// Rows as a Parquet file, with row groups of so many rows.
pub(crate) fn parquet_file(rows: &RecordBatch, row_group_rows: Option<usize>) -> Vec<u8> {
    let properties = parquet::file::properties::WriterProperties::builder().set_max_row_group_row_count(row_group_rows);
    let mut bytes = Vec::new();
    let mut writer = parquet::arrow::ArrowWriter::try_new(&mut bytes, rows.schema(), Some(properties.build())).unwrap();
    writer.write(rows).unwrap();
    writer.close().unwrap();
    bytes
}

/// The rows of a Parquet file.
pub(crate) fn parquet_rows(path: &Path) -> Vec<RecordBatch> {
    let file = std::fs::File::open(path).unwrap();
    let reader = parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder::try_new(file).unwrap();
    reader.build().unwrap().map(Result::unwrap).collect()
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

/// Makes an encoder of a model package with `mu`: the same network, which gives an embedding and nothing else.
pub(crate) fn encoder_of(package: &Path, to: &Path) {
    let open = |folder: &Path| Stores::default().open(&Url::from_directory_path(folder).unwrap()).unwrap();
    let (from, to) = (open(package), open(to));
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let (mut contract, _) = model::read_contract(&from).await.unwrap();
        let golden = from.get(&contract.golden.file).await.unwrap();
        let mut golden =
            Golden::read(golden, contract.input.num_values(), &contract.roles().collect::<Vec<_>>()).unwrap();
        for image in &mut golden.images {
            image.outputs.retain(|(role, _)| *role == Role::Mu);
            image.outputs[0].0 = Role::Embedding;
        }
        let network = from.get(&contract.graph.main).await.unwrap();
        let files = [(contract.graph.main.clone(), network), (contract.golden.file.clone(), golden.write().unwrap())];
        contract.outputs = Outputs { embedding: contract.outputs.mu, ..Outputs::default() };
        (contract.graph.decoder, contract.likelihood) = (None, None);
        model::package::write(&to, contract, files.into()).await.unwrap();
    });
}

/// Runs a script of `tests/python`, which must succeed, and returns what it printed.
#[track_caller]
pub(crate) fn python(script: &str, args: &[&Path]) -> String {
    let ran = Ran::from(python_with(script, args).output().unwrap()).expect(0);
    println!("{script}: {}", ran.stdout.trim());
    ran.stdout
}

/// Numbers that look random and are the same every time (`SplitMix64`).
pub(crate) struct Random(u64);

impl Random {
    /// The numbers of a seed, which is printed.
    pub(crate) fn new(seed: u64) -> Self {
        println!("seed {seed}");
        Self(seed)
    }

    /// A number from 0 to 1, without 1.
    pub(crate) fn fraction(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((bits ^ (bits >> 31)) >> 11) as f64 / (1_u64 << 53) as f64
    }
}

/// A script of `tests/python`, to be run.
pub(crate) fn python_with<S: AsRef<std::ffi::OsStr>>(script: &str, args: &[S]) -> Command {
    let mut command = Command::new(needed("LOOKALIKE_TEST_PYTHON"));
    command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/python").join(script)).args(args);
    command
}

/// Writes a pipeline file.
pub(crate) fn write(path: &Path, text: &str) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    #[expect(clippy::disallowed_methods, reason = "a test writes its own files")]
    std::fs::write(path, text).unwrap();
}

/// All rows of a published table as text, sorted, without the columns in `except`.
pub(crate) fn rows(tables: &Path, name: TableName, except: &[&str]) -> Vec<String> {
    let batches = batches(tables, name);
    let mut lines: Vec<String> =
        batches.iter().flat_map(|(partition, batch)| lines(partition, batch, except)).collect();
    lines.sort();
    lines
}

/// Rows of a partition as text, without the columns in `except`.
pub(crate) fn lines(partition: &str, batch: &RecordBatch, except: &[&str]) -> Vec<String> {
    let schema = batch.schema();
    let columns = schema.fields().iter().zip(batch.columns());
    let columns = columns.filter(|(field, _)| !except.contains(&field.name().as_str()));
    let options = FormatOptions::default().with_null("NULL");
    let columns: Vec<_> = columns
        .map(|(field, values)| (field.name(), ArrayFormatter::try_new(values.as_ref(), &options).unwrap()))
        .collect();
    let line = |row: usize| {
        let cells = columns.iter().map(|(name, values)| format!("{name}={}", values.value(row)));
        format!("{partition} {}", cells.collect::<Vec<_>>().join(" "))
    };
    (0..batch.num_rows()).map(line).collect()
}

/// The run ids of each partition of a published table: those in the names of its files and those in its rows.
pub(crate) fn run_ids(tables: &Path, name: TableName) -> BTreeMap<String, BTreeSet<String>> {
    let mut found: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for (file, batch) in files(tables, name) {
        let ids = found.entry(file.partition.to_string()).or_default();
        ids.insert(file.run_id().unwrap().to_owned());
        let column = batch.column_by_name("run_id").unwrap().as_string::<i32>();
        ids.extend(column.iter().map(|id| id.unwrap().to_owned()));
    }
    found
}

/// The live rows of a published table with the name of their partition.
pub(crate) fn batches(tables: &Path, name: TableName) -> Vec<(String, RecordBatch)> {
    files(tables, name).into_iter().map(|(file, batch)| (file.partition.to_string(), batch)).collect()
}

/// The live rows of a published table with their files.
fn files(tables: &Path, name: TableName) -> Vec<(LiveFile, RecordBatch)> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let output = Stores::default().open(&Url::from_directory_path(tables).unwrap()).unwrap();
    let manifests = tables.join(name.name()).join("_manifests");
    // A manifest says its own partition keys.
    let (publish, keys) = if manifests.exists() {
        (Publish::Parquet, Vec::new())
    } else {
        (Publish::Delta, partition_keys(tables, name))
    };
    let presence = Presence::new(&output, runtime.handle());
    let table = Table::new(&output, name, &keys, publish, &presence, runtime.handle()).unwrap();
    runtime.block_on(async {
        let live = table.live().await.unwrap();
        let first = live.files.first().expect("the table has files").clone();
        let columns = column_names(&table, &first).await;
        let columns: Vec<&str> = columns.iter().map(String::as_str).collect();
        table.read(live.files, &columns).await.unwrap()
    })
}

async fn column_names(table: &Table, file: &LiveFile) -> Vec<String> {
    let path = object_store::path::Path::from_url_path(file.url.path()).unwrap();
    let parquet = lookalike::parquet_file::ParquetFile::new(table.store().client().clone(), path, file.size_bytes);
    let metadata = parquet.metadata().await.unwrap();
    metadata.schema().fields().iter().map(|field| field.name().clone()).collect()
}

/// The partition keys, by the folders of the table's data files.
fn partition_keys(tables: &Path, name: TableName) -> Vec<String> {
    let mut keys = Vec::new();
    let mut folder = tables.join(name.name());
    loop {
        let mut folders =
            std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let Some(next) = folders.find(|name| name.contains('=')) else { return keys };
        keys.push(next.split('=').next().unwrap().to_owned());
        folder.push(next);
    }
}
