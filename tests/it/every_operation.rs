//! Each trial starts from a copy of a store in memory that holds a source and a model, runs the pipeline once with a fault, and again
//! without. Whatever the first run came to, the second leaves what a run without faults leaves.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path as LocalPath;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Mutex};

use arrow::array::{ArrayRef, BinaryArray, RecordBatch, StringArray};
use bytes::Bytes;
use futures::TryStreamExt as _;
use lookalike::commands::calibrate::calibrate;
use lookalike::commands::fit::{FitSettings, fit};
use lookalike::commands::run::run;
use lookalike::config::{Overrides, Pipeline};
use lookalike::context::Context;
use lookalike::error::{Error, ExitStatus};
use lookalike::metrics::RunMetrics;
use lookalike::schema::TableName;
use lookalike::stages::Backfill;
use lookalike::store::Stores;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt as _};
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use serde_json::Value;
use url::Url;

use crate::fault_store::{Cause, Fault, FaultStore, Operation, Plan};
use crate::support::{image_file, lines, parquet_file, picture};

/// Columns that tell when and how fast a run was, and what it loaded for that; a run that goes on where another ended differs in them.
pub(crate) const MAY_DIFFER: [&str; 6] =
    ["started_at", "finished_at", "embed_secs", "neighbors_secs", "flag_secs", "onnxruntime_version"];

/// Runs that a store with faults by chance may take until one gets through.
const SOAK_ATTEMPTS: usize = 300;

/// Times that a day of the source is replaced before the run that is disturbed. Each adds three versions to `neighbors` and
/// `anomalies`, and each tenth version is summed up.
const REPLACEMENTS: i64 = 3;

/// Seeds of the faults by chance.
const SOAK_SEEDS: u64 = 60;

const SELF_REFERENCE: &str = "";
/// Goes on in the table of the neighbors' settings: the pipeline has groups too.
const NAMED_REFERENCE: &str = "duplicate_distance = 0.3\n[anomaly]\nreference = \"memory:///reference.parquet\"\nthreshold = { contamination = 0.2 }\n";
const BY_CELLS: &str = "search = \"ivf\"\ncells = 3\nrecall = 0.8\n";
const PARQUET: &str = "[output]\npublish = \"parquet\"\n";

const DAYS: [(&str, &[(&str, i64)]); 3] = [
    ("1", &[("a", 1), ("b", 2), ("c", 3), ("d", 4)]),
    ("2", &[("e", 5), ("f", -1), ("g", 7), ("h", 8)]),
    ("3", &[("i", 9), ("j", 10), ("k", 11), ("l", 12)]),
];

/// Rows of a row group of the source, and of a unit: a day is two units, or three.
const UNIT_ROWS: usize = 2;

/// The rows of each table as text, sorted.
type Tables = BTreeMap<&'static str, Vec<String>>;

/// A run that is to be disturbed.
struct World {
    name: &'static str,
    pipeline: Pipeline,
    backfill: Backfill,
    /// The store before the run.
    before: InMemory,
    /// What an undisturbed run leaves.
    clean: Tables,
    /// Number and rows of each unit that has a receipt then.
    receipts: BTreeMap<String, (u64, u64)>,
    /// So many units come first that are carried over from live files and not embedded.
    num_carried: u64,
    /// What an undisturbed run asks of the store.
    operations: Vec<(Operation, Path)>,
}

impl Debug for World {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name)
    }
}

impl World {
    fn new(name: &'static str, pipeline: Pipeline, backfill: Backfill, before: InMemory, num_carried: u64) -> Self {
        let store = FaultStore::new(Arc::new(before.fork()), Plan::Never);
        let ran = Ran::once(&store, &pipeline, &backfill);
        assert_eq!(ran.status(), ExitStatus::Success, "{name}: {:?}", ran.result);
        assert_eq!(ran.summary["status"], "committed", "{name}");
        let (clean, receipts) = (audit(store.inner()), receipts(store.inner()));
        let world = Self { name, pipeline, backfill, before, clean, receipts, num_carried, operations: store.seen() };
        assert_eq!(ran.summary["rows_embedded"], world.rows_to_embed(&world.before), "{name}");
        world
    }

    /// The rows of the units that have no receipt yet and are to be embedded.
    fn rows_to_embed(&self, store: &InMemory) -> u64 {
        let done = receipts(store);
        let missing = self.receipts.iter().filter(|(unit, _)| !done.contains_key(*unit)).map(|(_, receipt)| receipt);
        missing.filter(|(number, _)| *number >= self.num_carried).map(|(_, rows)| rows).sum()
    }

    /// The operations that a fault can befall.
    fn candidates(&self, fault: Fault) -> Vec<&(Operation, Path)> {
        self.operations.iter().filter(|(operation, _)| fault.can_befall(*operation)).collect()
    }
}

/// What a run came to.
struct Ran {
    result: Result<ExitStatus, Error>,
    summary: Value,
}

impl Ran {
    fn once<T: ObjectStore>(store: &FaultStore<T>, pipeline: &Pipeline, backfill: &Backfill) -> Self {
        let output = Printed::default();
        let context = context(Arc::new(store.clone()), &output);
        let result = run(&context, pipeline, backfill, &mut RunMetrics::start());
        let printed = output.0.lock().unwrap();
        let line = printed.split(|byte| *byte == b'\n').next().unwrap_or_default();
        Self { result, summary: serde_json::from_slice(line).unwrap_or_default() }
    }

    fn status(&self) -> ExitStatus {
        match &self.result {
            Ok(ExitStatus::NothingToDo) => ExitStatus::Success,
            Ok(status) => *status,
            Err(error) => error.exit_status(),
        }
    }
}

/// Lines that would have gone to standard output.
#[derive(Debug, Clone, Default)]
struct Printed(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Printed {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn context(store: Arc<dyn ObjectStore>, output: &Printed) -> Context {
    let stores = Stores::default();
    stores.insert(&Url::parse("memory:///").unwrap(), store);
    Context::with_stores(stores, None, true).unwrap().printing_to(output.clone())
}

fn pipeline(more: &str) -> Pipeline {
    // A report reads all of the tables once more, which takes as long as the rest of a run here.
    let report = if more.contains("[report]") { "" } else { "[report]\nenabled = false\n" };
    let text = format!(
        "[pipeline]\nname = \"p\"\n[source]\ntable = \"memory:///images\"\ncolumns = [\"label\"]\n\
         [model]\npackage = \"memory:///model\"\n[execution]\nworkers = 2\nunit_rows = {UNIT_ROWS}\n\
         [limits]\nmax_rejected_fraction = 0.5\n{report}[neighbors]\nk = 3\n{more}"
    );
    let overrides = Overrides { output_table: Some("memory:///out".to_owned()), ..Overrides::default() };
    Pipeline::load_str_with(&text, "p.toml", LocalPath::new("/"), &overrides).unwrap()
}

/// Waits for a store in memory, which never waits.
fn wait<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
}

fn put(store: &InMemory, path: &str, bytes: Vec<u8>) {
    wait(store.put(&path.into(), bytes.into())).unwrap();
}

/// A source of three days, a model fitted to it, and a reference calibrated on it.
static SOURCE: LazyLock<InMemory> = LazyLock::new(|| {
    let store = InMemory::new();
    for (day, rows) in DAYS {
        put(&store, &format!("images/ds={day}/x.parquet"), image_file(rows, Some(UNIT_ROWS)));
    }
    prepare(&store);
    store
});

/// Fits a model to the source, and calibrates a reference on it.
fn prepare(store: &InMemory) {
    let shared = FaultStore::new(Arc::new(store.fork()), Plan::Never);
    let context = context(Arc::new(shared.clone()), &Printed::default());
    let settings = FitSettings { latent_dim: Some(2), height: Some(8), width: Some(8), ..FitSettings::default() };
    fit(&context, &pipeline(SELF_REFERENCE), &settings).unwrap();
    calibrate(&context, &pipeline(NAMED_REFERENCE), None, None).unwrap();
    for (operation, path) in shared.seen() {
        if operation.is_change() {
            let bytes = wait(async { shared.inner().get(&path).await.unwrap().bytes().await.unwrap() });
            put(store, path.as_ref(), bytes.to_vec());
        }
    }
}

fn first_run(name: &'static str, more: &str) -> World {
    World::new(name, pipeline(more), Backfill::default(), SOURCE.fork(), 0)
}

/// Tables that are published, and then a day of the source that is replaced, for the last time of several: so long a log is summed
/// up in a checkpoint.
fn replacement_run(name: &'static str, more: &str) -> World {
    let store = FaultStore::new(Arc::new(SOURCE.fork()), Plan::Never);
    for round in 1..=REPLACEMENTS {
        assert_eq!(Ran::once(&store, &pipeline(more), &Backfill::default()).status(), ExitStatus::Success);
        let rows = [("e", 20 + round), ("f", 22), ("g", -1), ("new", 24), ("newer", 25 + round)];
        put(store.inner(), "images/ds=2/x.parquet", image_file(&rows, Some(UNIT_ROWS)));
    }
    World::new(name, pipeline(more), Backfill::default(), store.inner().fork(), 0)
}

/// Tables that are published, and then a day that gets another file, whose rows alone are embedded: the others are carried over.
fn addition_run(name: &'static str, more: &str) -> World {
    let store = FaultStore::new(Arc::new(SOURCE.fork()), Plan::Never);
    assert_eq!(Ran::once(&store, &pipeline(more), &Backfill::default()).status(), ExitStatus::Success);
    let rows = [("e2", 31), ("f2", 32), ("g2", 33)];
    put(store.inner(), "images/ds=2/y.parquet", image_file(&rows, Some(UNIT_ROWS)));
    let backfill = Backfill { added_only: true, ..Backfill::default() };
    World::new(name, pipeline(more), backfill, store.inner().fork(), 2)
}

/// All objects of the output.
fn objects(store: &InMemory) -> BTreeMap<String, Bytes> {
    wait(async {
        let mut objects = BTreeMap::new();
        for meta in store.list(Some(&"out".into())).try_collect::<Vec<_>>().await.unwrap() {
            let bytes = store.get(&meta.location).await.unwrap().bytes().await.unwrap();
            objects.insert(meta.location.to_string(), bytes);
        }
        objects
    })
}

/// Where the receipts of units lie.
const RECEIPTS: &str = "out/_lookalike/receipts/latents/";

/// Number and rows of each unit that has a receipt.
fn receipts(store: &InMemory) -> BTreeMap<String, (u64, u64)> {
    let receipts = objects(store).into_iter().filter(|(path, _)| path.starts_with(RECEIPTS));
    let receipts = receipts.map(|(path, receipt)| (path, json(&receipt)));
    let number = |receipt: &Value, name: &str| receipt[name].as_u64().unwrap();
    receipts.map(|(path, receipt)| (path, (number(&receipt, "unit"), number(&receipt, "num_read")))).collect()
}

/// A live data file, as a log tells of it.
struct Named {
    size: Value,
    num_rows: Value,
    partition: String,
}

/// What lies in the tables, read without the program: the logs as text, and the files that are live by them. What a log may never
/// say is an error: a version left out, a file twice, a file that is not there or has another size or other rows, latents that no
/// receipt names unless they were sorted since.
fn audit(store: &InMemory) -> Tables {
    let objects = objects(store);
    let receipts = objects.iter().filter(|(path, _)| path.starts_with(RECEIPTS));
    let receipts: BTreeSet<String> = receipts.map(|(_, receipt)| text(&json(receipt)["file"]["path"])).collect();
    TableName::ALL
        .map(TableName::name)
        .into_iter()
        .filter_map(|table| {
            let entries = |folder: &str| -> Vec<&Bytes> {
                let log = format!("out/{table}/{folder}/");
                let entries = objects.iter().filter(|(path, _)| path.starts_with(&log) && path.ends_with(".json"));
                let numbered = entries.enumerate().map(|(version, (path, entry))| {
                    assert_eq!(*path, format!("{log}{version:020}.json"));
                    entry
                });
                numbered.collect()
            };
            let (delta, manifests) = (entries("_delta_log"), entries("_manifests"));
            if table == TableName::Groups.name() && delta.is_empty() && manifests.is_empty() {
                return None;
            }
            assert!(delta.is_empty() != manifests.is_empty(), "{table} has one log");
            let live = if delta.is_empty() { live_by_manifests(&manifests) } else { live_by_delta(&delta) };
            let mut rows = Vec::new();
            for (path, named) in live {
                // A file that is sorted by cells was made of one that has a receipt.
                let is_sorted = objects.keys().any(|object| object.starts_with("out/_lookalike/cells/"));
                assert!(
                    table != "latents" || receipts.contains(&path) || is_sorted,
                    "{path} is live without a receipt"
                );
                let bytes =
                    objects.get(&format!("out/{table}/{path}")).unwrap_or_else(|| panic!("{path} is not there"));
                assert_eq!(named.size, bytes.len(), "{path}");
                let before = rows.len();
                for batch in ParquetRecordBatchReaderBuilder::try_new(bytes.clone()).unwrap().build().unwrap() {
                    rows.extend(lines(&named.partition, &batch.unwrap(), &MAY_DIFFER));
                }
                assert_eq!(named.num_rows, rows.len() - before, "{path}");
            }
            rows.sort();
            Some((table, rows))
        })
        .collect()
}

fn json(bytes: &[u8]) -> Value {
    serde_json::from_slice(bytes).unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(bytes)))
}

fn text(value: &Value) -> String {
    value.as_str().unwrap().to_owned()
}

/// Replays a Delta log from its first version on, without its checkpoints.
fn live_by_delta(log: &[&Bytes]) -> BTreeMap<String, Named> {
    let mut live = BTreeMap::new();
    let mut added = BTreeSet::new();
    for entry in log {
        for action in entry.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
            let action = json(action);
            if let Some(remove) = action.get("remove") {
                assert!(live.remove(&text(&remove["path"])).is_some(), "removed, and was not there: {remove}");
            }
            if let Some(add) = action.get("add") {
                let path = text(&add["path"]);
                assert!(added.insert(path.clone()), "added again: {add}");
                let values = add["partitionValues"].as_object().unwrap().iter();
                let partition: Vec<String> = values.map(|(key, value)| format!("{key}={}", text(value))).collect();
                let num_rows = json(text(&add["stats"]).as_bytes())["numRecords"].clone();
                live.insert(path, Named { size: add["size"].clone(), num_rows, partition: partition.join("/") });
            }
        }
    }
    live
}

/// Reads the newest manifest; in those before it, no file that was gone comes back.
fn live_by_manifests(log: &[&Bytes]) -> BTreeMap<String, Named> {
    let mut gone = BTreeSet::new();
    let mut live = BTreeMap::new();
    for (version, manifest) in log.iter().enumerate() {
        let manifest = json(manifest);
        assert_eq!(manifest["version"], version);
        let mut named = BTreeMap::new();
        for file in manifest["files"].as_array().unwrap() {
            let keys = manifest["partition_keys"].as_array().unwrap().iter().zip(file["partition"].as_array().unwrap());
            let partition: Vec<String> = keys.map(|(key, value)| format!("{}={}", text(key), text(value))).collect();
            let (size, num_rows) = (file["size_bytes"].clone(), file["num_rows"].clone());
            let named = named.insert(text(&file["path"]), Named { size, num_rows, partition: partition.join("/") });
            assert!(named.is_none(), "named twice: {file}");
            assert!(!gone.contains(&text(&file["path"])), "was gone: {file}");
        }
        let num_rows: u64 = named.values().filter_map(|file: &Named| file.num_rows.as_u64()).sum();
        assert_eq!(manifest["num_rows"], num_rows);
        gone.extend(live.into_keys().filter(|path| !named.contains_key(path)));
        live = named;
    }
    live
}

/// Says the first difference instead of two whole tables.
fn assert_same(found: &Tables, clean: &Tables) {
    for (table, clean) in clean {
        let found = &found[table];
        let lost: Vec<_> = clean.iter().filter(|row| !found.contains(row)).take(3).collect();
        let added: Vec<_> = found.iter().filter(|row| !clean.contains(row)).take(3).collect();
        assert!(found == clean, "{table}: {} rows, not {}; lost {lost:#?}, added {added:#?}", found.len(), clean.len());
    }
}

/// The exit code that a passing fault may come to.
fn status_of(fault: Fault) -> ExitStatus {
    match fault {
        Fault::Before(Cause::Full) | Fault::After(Cause::Full) => ExitStatus::Resource,
        _ => ExitStatus::Transient,
    }
}

/// Runs with faults, until it gets through or for so many times; then checks everything.
fn trial(world: &World, plan: Plan, attempts: usize) -> Vec<(Fault, Operation, Path)> {
    let store = Arc::new(world.before.fork());
    let faulty = FaultStore::new(Arc::clone(&store), plan);
    let mut is_done = false;
    for _ in 0..attempts {
        let before = faulty.injected().len();
        let ran = Ran::once(&faulty, &world.pipeline, &world.backfill);
        match &ran.result {
            Ok(_) => {
                assert_eq!(ran.status(), ExitStatus::Success);
                assert_same(&audit(&store), &world.clean);
                is_done = true;
                break;
            }
            Err(error) => {
                let injected = &faulty.injected()[before..];
                let is_of_a_fault = injected.iter().any(|(fault, ..)| status_of(*fault) == error.exit_status());
                assert!(is_of_a_fault, "exit {:?} of {injected:?}: {error}, {error:?}", error.exit_status());
            }
        }
    }
    let undisturbed = FaultStore::new(Arc::clone(&store), Plan::Never);
    if !is_done {
        let rows_to_embed = world.rows_to_embed(&store);
        let ran = Ran::once(&undisturbed, &world.pipeline, &world.backfill);
        assert_eq!(ran.status(), ExitStatus::Success, "the run after: {:?}", ran.result);
        assert_eq!(ran.summary["rows_embedded"], rows_to_embed, "what has a receipt is not done again");
        assert_same(&audit(&store), &world.clean);
    }
    let num_seen = undisturbed.seen().len();
    let ran = Ran::once(&undisturbed, &world.pipeline, &world.backfill);
    assert_eq!(ran.status(), ExitStatus::Success, "the run again: {:?}", ran.result);
    assert_eq!(ran.summary["status"], "nothing_to_do");
    let changes: Vec<_> = undisturbed.seen().split_off(num_seen);
    // Its sign of life is all that a run may put which has nothing to do.
    let is_sign = |path: &Path| path.as_ref().starts_with("out/_lookalike/live/");
    let is_idle = |(operation, path): &(Operation, Path)| !operation.is_change() || is_sign(path);
    assert!(changes.iter().all(is_idle), "nothing to do, and yet: {changes:?}");
    faulty.injected()
}

/// Does all trials, on every core, and then says which failed.
fn all<T: Copy + Sync + Debug>(name: &str, trials: &[T], trial: impl Fn(T) + Sync) {
    let next = AtomicUsize::new(0);
    let failed = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().unwrap().get() {
            scope.spawn(|| {
                while let Some(this) = trials.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| trial(*this))) {
                        let words = panic.downcast_ref::<String>().cloned().unwrap_or_default();
                        failed.lock().unwrap().push(format!("{name}, {this:?}: {words}"));
                    }
                }
            });
        }
    });
    let failed = failed.into_inner().unwrap();
    assert!(failed.is_empty(), "{} of {} failed:\n{}", failed.len(), trials.len(), failed.join("\n\n"));
}

/// Lets a fault befall each `stride`-th operation that it can befall, one a trial; returns how many there were.
fn each_fails_once(world: &World, fault: Fault, stride: usize) -> usize {
    let candidates = world.candidates(fault);
    let trials: Vec<usize> = (1..=candidates.len()).step_by(stride).collect();
    all(&format!("{}, {fault:?}", world.name), &trials, |n| {
        let injected = trial(world, Plan::Once(n as u64, fault), 1);
        assert_eq!(injected.len(), 1, "of {} candidates", candidates.len());
    });
    println!("{}: {fault:?} at {} of {} operations", world.name, trials.len(), candidates.len());
    candidates.len()
}

/// Fails every operation of a run before it is done, and every one that changes something after it is done; to fail after a read
/// is to fail before it. There must be so many of them at least, for the run to be a real one.
fn every_operation_fails_once(world: &World, at_least: usize, changes_at_least: usize) {
    let before = each_fails_once(world, Fault::Before(Cause::Unavailable), 1);
    let after = each_fails_once(world, Fault::After(Cause::Unavailable), 1);
    println!("{}: each of {before} operations failed before, each of {after} changes failed after", world.name);
    assert!(before >= at_least && after >= changes_at_least, "{before} operations, {after} changes");
}

/// Changes that a first run makes: the tables, three days of latents (data and receipt of two units, commit), neighbors and flags (data, commit), and
/// the record of the run.
const FIRST_CHANGES: usize = 4 + 3 * (2 * 2 + 1) + 2 * 3 * 2 + 2;

/// Changes that the groups make more: the table, and three days (data, commit).
const GROUPS_CHANGES: usize = 1 + 3 * 2;

/// Changes that a report makes more: the page, and the JSON.
const REPORT_CHANGES: usize = 2;

/// Changes that sorting by cells makes more: the centroids, and three days (data, commit).
const CELLS_CHANGES: usize = 1 + 3 * 2;

/// Creates that each run makes: three receipts, and the commits of one day of latents, three of neighbors, one of flags, and the record.
const MIN_CREATES: usize = 3 + 1 + 3 + 1 + 1;

/// Changes that a replacement makes: one day of latents, all of the neighbors and flags, and the record of the run.
const REPLACEMENT_CHANGES: usize = 3 * 2 + 1 + 2 * 3 * 2 + 2;

#[test]
fn an_undisturbed_run_is_complete() {
    let world = first_run("first run", SELF_REFERENCE);
    let latents = &world.clean["latents"];
    let ids: Vec<&str> = DAYS.iter().flat_map(|(_, rows)| rows.iter().map(|(id, _)| *id)).collect();
    assert_eq!(latents.len(), ids.len());
    for (day, rows) in DAYS {
        for (id, _) in rows {
            let row = format!("ds={day} image_id={id} ");
            assert_eq!(latents.iter().filter(|line| line.starts_with(&row)).count(), 1, "{row}");
        }
    }
    // One image is none, and has no neighbors.
    let (rows, readable) = (ids.len(), ids.len() - 1);
    let num_rows = world.clean.iter().map(|(table, rows)| (*table, rows.len()));
    let expected = [("anomalies", rows), ("latents", rows), ("neighbors", 3 * readable), ("runs", DAYS.len())];
    assert!(num_rows.eq(expected), "{:?}", world.clean);

    let world = first_run("named reference", NAMED_REFERENCE);
    let groups = &world.clean["groups"];
    assert_eq!(groups.len(), readable);
    let num_alone = groups.iter().filter(|row| row.contains(" group_size=1 ")).count();
    assert!((1..readable).contains(&num_alone), "some are alike, and some are not: {groups:#?}");
}

#[test]
fn every_operation_of_a_first_run_fails_once() {
    every_operation_fails_once(&first_run("first run", SELF_REFERENCE), 200, FIRST_CHANGES);
}

#[test]
fn every_operation_of_a_run_with_a_named_reference_fails_once() {
    let with_report = format!("{NAMED_REFERENCE}[report]\nenabled = true\n");
    every_operation_fails_once(
        &first_run("named reference", &with_report),
        250,
        FIRST_CHANGES + GROUPS_CHANGES + REPORT_CHANGES,
    );
}

#[test]
fn every_operation_of_a_replacement_fails_once() {
    let world = replacement_run("replacement", SELF_REFERENCE);
    let sums_up = |(_, path): &(Operation, Path)| path.as_ref().ends_with(".checkpoint.parquet");
    assert!(world.operations.iter().any(sums_up), "a checkpoint is among what is disturbed: {:?}", world.operations);
    // Two tables get a checkpoint each, which is two objects.
    every_operation_fails_once(&world, 400, REPLACEMENT_CHANGES + 2 * 2);
}

#[test]
fn every_operation_of_an_addition_fails_once() {
    // As a replacement, with four units and all that a file more lets be found out.
    every_operation_fails_once(&addition_run("addition", NAMED_REFERENCE), 150, 2 * 4 + 1 + 2 * (3 + 3 + 1) + 2);
}

#[test]
fn every_operation_of_a_first_run_to_plain_parquet_fails_once() {
    every_operation_fails_once(&first_run("first run, Parquet", PARQUET), 100, FIRST_CHANGES);
}

#[test]
fn every_operation_of_a_run_that_sorts_by_cells_fails_once() {
    let parquet = format!("{BY_CELLS}{PARQUET}");
    every_operation_fails_once(&first_run("by cells, Parquet", &parquet), 150, FIRST_CHANGES + CELLS_CHANGES);
}

#[test]
fn every_operation_of_a_replacement_in_plain_parquet_fails_once() {
    every_operation_fails_once(&replacement_run("replacement, Parquet", PARQUET), 100, REPLACEMENT_CHANGES);
}

#[test]
fn every_kind_of_fault_leaves_nothing_lost_and_nothing_twice() {
    let parquet = format!("{NAMED_REFERENCE}{PARQUET}");
    let worlds = [
        first_run("first run", NAMED_REFERENCE),
        first_run("first run, Parquet", &parquet),
        replacement_run("replacement", SELF_REFERENCE),
        replacement_run("replacement, Parquet", &parquet),
    ];
    for world in &worlds {
        for (fault, stride) in [
            // As when the store is unavailable, but for the error: some of them will do.
            (Fault::Before(Cause::Reset), 37),
            (Fault::Slow, 37),
            (Fault::Truncated, 11),
            (Fault::Before(Cause::Full), 1),
            (Fault::After(Cause::Reset), 1),
            (Fault::Conflict, 1),
            (Fault::ConflictWithItself, 1),
        ] {
            assert!(each_fails_once(world, fault, stride) >= MIN_CREATES, "{fault:?}");
        }
    }
}

#[test]
fn faults_by_chance_end_in_the_same_tables() {
    let worlds = [
        first_run("first run", SELF_REFERENCE),
        replacement_run("replacement", NAMED_REFERENCE),
        replacement_run("replacement, Parquet", PARQUET),
        addition_run("addition", SELF_REFERENCE),
    ];
    let trials: Vec<(u64, &World)> = (1..=SOAK_SEEDS).zip(worlds.iter().cycle()).collect();
    let num_faults = AtomicUsize::new(0);
    all("faults by seed", &trials, |(seed, world)| {
        let mut rng = fastrand::Rng::with_seed(seed);
        // From a fault in every other run to five in each, before it ends at the first.
        let rate = (0.5 + 4.5 * rng.f64()) / world.operations.len() as f64;
        let injected = trial(world, Plan::Random(rate, rng), SOAK_ATTEMPTS);
        num_faults.fetch_add(injected.len(), Ordering::Relaxed);
    });
    let num_faults = num_faults.into_inner();
    println!("{num_faults} faults by chance over {} seeds", trials.len());
    assert!(num_faults > 3 * trials.len(), "{num_faults} faults");
}

#[test]
fn every_request_of_an_upload_in_parts_fails_once() {
    let store = InMemory::new();
    let ids = ["a", "b", "c", "d"];
    let mut rng = fastrand::Rng::with_seed(1);
    // Files up to 10 MB are uploaded at once.
    let ballast = ids.map(|_| std::iter::repeat_with(|| rng.alphanumeric()).take(4 << 20).collect::<String>());
    let rows = RecordBatch::try_from_iter([
        ("image_id", Arc::new(StringArray::from_iter_values(ids)) as ArrayRef),
        ("image", Arc::new(BinaryArray::from_iter_values((1..).zip(ids).map(|(seed, _)| picture(seed))))),
        ("label", Arc::new(StringArray::from_iter_values(ballast))),
    ])
    .unwrap();
    put(&store, "images/x.parquet", parquet_file(&rows, Some(ids.len())));
    prepare(&store);
    let world = World::new("upload in parts", pipeline(SELF_REFERENCE), Backfill::default(), store, 0);
    let is_of_upload = |operation: Operation| {
        matches!(operation, Operation::StartMultipart | Operation::PutPart | Operation::CompleteMultipart)
    };
    for fault in [Fault::Before(Cause::Reset), Fault::After(Cause::Reset), Fault::Before(Cause::Full)] {
        let candidates = (1..).zip(world.candidates(fault));
        let uploads: Vec<u64> =
            candidates.filter(|(_, (operation, _))| is_of_upload(*operation)).map(|(n, _)| n).collect();
        println!("{}: {fault:?} at {} requests", world.name, uploads.len());
        assert!(uploads.len() >= 4, "start, two parts, end: {uploads:?}");
        all(world.name, &uploads, |n| {
            let injected = trial(&world, Plan::Once(n, fault), 1);
            assert!(matches!(injected.as_slice(), [(_, operation, _)] if is_of_upload(*operation)), "{injected:?}");
        });
    }
}
