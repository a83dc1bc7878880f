//! The neighbors stage: patched lists equal those of a search from nothing, whatever fits in memory; cells of the table; other tables.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::Arc;

use arrow::array::{ArrayRef, AsArray as _, Float32Builder, ListBuilder, RecordBatch, StringArray, new_null_array};
use arrow::datatypes::{DataType, Field, Int32Type, Schema};
use futures::TryStreamExt as _;
use lookalike::commands::fit::{FitSettings, fit};
use lookalike::config::{Overrides, Pipeline};
use lookalike::context::Context;
use lookalike::decode::Color;
use lookalike::schema::{TableName, column, data_schema};
use lookalike::source::PartitionValues;
use lookalike::stages::neighbors::shares::{SearchPlan, SortPlan, Step};
use lookalike::stages::neighbors::{Found, neighbors};
use lookalike::stages::{Backfill, Job};
use lookalike::store::Stores;
use lookalike::tasks::{PlanFolder, Share};
use object_store::memory::InMemory;
use object_store::{ObjectStore as _, ObjectStoreExt as _};
use url::Url;

use crate::support::{
    Ran, Random, batches, folder, image_file, image_table, lines, lookalike, peak_memory, rows, run_ids, write,
};

/// Histories of a table, each of several changes.
const HISTORIES: u64 = 500;

const METRICS: [&str; 3] = ["cosine", "l2", "inner_product"];

/// A row of `latents` as a history makes it: an id, and a vector or none.
type Row = (String, Option<Vec<f32>>);

/// Tables in memory, beside a model and a source that are there only because every run has them.
struct Lake {
    store: Arc<InMemory>,
    context: Context,
}

impl Lake {
    fn new() -> Self {
        let store = Arc::new(InMemory::new());
        let stores = Stores::default();
        stores.insert(&Url::parse("memory:///").unwrap(), Arc::clone(&store) as _);
        let context = Context::with_stores(stores, None, true).unwrap();
        let rows: Vec<(String, i64)> = (0..4).map(|row| (format!("{row}"), row)).collect();
        let rows: Vec<(&str, i64)> = rows.iter().map(|(id, seed)| (id.as_str(), *seed)).collect();
        let lake = Self { store, context };
        lake.put("images/ds=1/x.parquet", image_file(&rows, None));
        let settings = FitSettings {
            latent_dim: Some(2),
            height: Some(8),
            width: Some(8),
            color: Some(Color::Gray),
            ..FitSettings::default()
        };
        fit(&lake.context, &pipeline("out", ""), &settings).unwrap();
        lake
    }

    fn put(&self, path: &str, bytes: Vec<u8>) {
        self.context.block_on(self.store.put(&path.into(), bytes.into())).unwrap();
    }

    fn objects(&self, prefix: &str) -> Vec<object_store::path::Path> {
        let listed = self.store.list(Some(&prefix.into())).map_ok(|object| object.location);
        self.context.block_on(listed.try_collect()).unwrap()
    }

    /// Makes rows the whole content of a partition of `latents`.
    fn publish(&self, pipeline: &Pipeline, partition: &str, run_id: &str, rows: &[Row]) {
        let job = Job::prepare(&self.context, pipeline, &Backfill::default()).unwrap();
        job.ensure(&[TableName::Latents]).unwrap();
        let partition = PartitionValues::new(vec![("ds".to_owned(), Some(partition.to_owned()))]);
        self.context.block_on(async {
            let mut files = Vec::new();
            if !rows.is_empty() {
                let schema = data_schema(TableName::Latents, &Schema::empty());
                let footer = job.footer(run_id).unwrap();
                let file = job.latents.create_file(&partition, run_id, 0, schema, &footer);
                let mut file = file.await.unwrap();
                file.write(&latents(rows, run_id, &job.model_sha256)).await.unwrap();
                files.push(file.close().await.unwrap());
            }
            job.latents.replace_partition(&partition, run_id, &files).await.unwrap();
        });
    }

    /// Runs the stage.
    fn search(&self, pipeline: &Pipeline) -> Option<Found> {
        let job = Job::prepare(&self.context, pipeline, &Backfill::default()).unwrap();
        job.ensure(&[TableName::Neighbors]).unwrap();
        neighbors(&job, pipeline.neighbors.as_ref().unwrap()).unwrap().found
    }

    /// Runs the stage as so many tasks a step, in any order and some twice. Returns how many rows travelled, and how many were to.
    fn search_as_tasks(&self, pipeline: &Pipeline, num_tasks: usize, random: &mut Random) -> (u64, u64) {
        let settings = pipeline.neighbors.as_ref().unwrap();
        let folder = format!("{}-plan/", pipeline.output.table.as_str().trim_end_matches('/'));
        let folder = PlanFolder::open(&self.context, &Url::parse(&folder).unwrap()).unwrap();
        let job = Job::prepare_after_embed(&self.context, pipeline).unwrap();
        job.ensure(&[TableName::Latents, TableName::Neighbors]).unwrap();
        let sort = SortPlan::make(&job, settings).unwrap();
        for share in shares(num_tasks, random) {
            sort.sort(&job, settings, share).unwrap();
        }
        let search = SearchPlan::make(&job, settings).unwrap();
        let mut num_travelled = 0;
        for step in [Step::Probe, Step::Join, Step::Merge] {
            for share in shares(num_tasks, random) {
                let worked = search.work(&job, settings, &folder, step, share).unwrap();
                num_travelled += if step == Step::Probe { worked.moved.rows_written } else { 0 };
            }
        }
        let report = search.publish(&job, settings, &folder).unwrap();
        assert!(report.partitions.values().all(|entry| entry.written));
        assert!(self.objects(&folder.store.url().path()[1..]).is_empty(), "what travelled is gone");
        // To the stage on one machine, nothing is left to do.
        assert_eq!(self.search(pipeline).unwrap().rows_searched, 0);
        (num_travelled, search.rows_to_travel())
    }

    /// The rows of `neighbors` in their order, without the run id.
    fn lists(&self, pipeline: &Pipeline) -> Vec<String> {
        let job = Job::prepare(&self.context, pipeline, &Backfill::default()).unwrap();
        let columns: Vec<String> = data_schema(TableName::Neighbors, &Schema::empty())
            .fields()
            .iter()
            .map(|field| field.name().clone())
            .filter(|name| name != column::RUN_ID)
            .collect();
        let columns: Vec<&str> = columns.iter().map(String::as_str).collect();
        let read = async { job.neighbors.read(job.neighbors.live().await.unwrap().files, &columns).await.unwrap() };
        let batches = self.context.block_on(read);
        batches.iter().flat_map(|(file, batch)| lines(&file.partition.to_string(), batch, &[])).collect()
    }

    /// Copies `latents` to another output, where nothing was ever searched.
    fn copy_latents(&self, from: &str, to: &str) {
        for path in self.objects(&format!("{from}/latents")) {
            let copy = path.as_ref().replacen(from, to, 1);
            self.context.block_on(self.store.copy(&path, &copy.into())).unwrap();
        }
    }
}

fn pipeline(output: &str, more: &str) -> Pipeline {
    let text = format!(
        "[pipeline]\nname = \"p\"\n[source]\ntable = \"memory:///images\"\n[model]\npackage = \"memory:///model\"\n\
         [output]\npublish = \"parquet\"\n[neighbors]\n{more}"
    );
    let overrides = Overrides { output_table: Some(format!("memory:///{output}")), ..Overrides::default() };
    Pipeline::load_str_with(&text, "p.toml", Path::new("/"), &overrides).unwrap()
}

/// Rows of `latents` of which only ids, statuses and vectors matter.
fn latents(rows: &[Row], run_id: &str, model_sha256: &str) -> RecordBatch {
    let schema = data_schema(TableName::Latents, &Schema::empty());
    let mut vectors =
        ListBuilder::new(Float32Builder::new()).with_field(Arc::new(Field::new("element", DataType::Float32, false)));
    for (_, vector) in rows {
        match vector {
            Some(vector) => {
                vectors.values().append_slice(vector);
                vectors.append(true);
            }
            None => vectors.append(false),
        }
    }
    let vectors: ArrayRef = Arc::new(vectors.finish());
    let text = |value: &dyn Fn(&Row) -> String| -> ArrayRef {
        Arc::new(StringArray::from_iter_values(rows.iter().map(value)))
    };
    let columns = schema.fields().iter().map(|field| match field.name().as_str() {
        column::IMAGE_ID => text(&|row| row.0.clone()),
        column::STATUS => text(&|row| if row.1.is_some() { "ok" } else { "truncated" }.to_owned()),
        column::EMBEDDING => Arc::clone(&vectors),
        column::RUN_ID => text(&|_| run_id.to_owned()),
        column::MODEL_SHA256 => text(&|_| model_sha256.to_owned()),
        _ => new_null_array(field.data_type(), rows.len()),
    });
    RecordBatch::try_new(Arc::clone(&schema), columns.collect()).unwrap()
}

fn below(random: &mut Random, end: usize) -> usize {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a small number")]
    let number = (random.fraction() * end as f64) as usize;
    number
}

/// Rows with few different vectors and ids, so that there are ties, equal rows and equal ids in several partitions.
fn some_rows(random: &mut Random, most: usize) -> Vec<Row> {
    let num_rows = below(random, most + 1);
    let ids: BTreeSet<usize> = (0..num_rows).map(|_| below(random, 40)).collect();
    let mut rows: Vec<Row> = ids
        .into_iter()
        .map(|id| {
            let vector = (below(random, 10) > 0).then(|| (0..3).map(|_| below(random, 5) as f32 - 2.0).collect());
            (format!("id{id}"), vector)
        })
        .collect();
    // Not in the order of the ids.
    rows.sort_by_key(|(id, _)| id.bytes().rev().collect::<Vec<_>>());
    rows
}

#[test]
fn patched_lists_are_those_of_a_search_from_nothing() {
    let lake = Lake::new();
    let mut random = Random::new(4);
    let (mut num_patched, mut num_searched) = (0, 0);
    for history in 0..HISTORIES {
        let k = 1 + below(&mut random, 5);
        let metric = METRICS[below(&mut random, METRICS.len())];
        let settings = format!("k = {k}\nmetric = \"{metric}\"\n");
        let (grown, anew) = (format!("h{history}"), format!("h{history}-anew"));
        let (pipeline, pipeline_anew) = (pipeline(&grown, &settings), pipeline(&anew, &settings));
        for partition in 0..4 {
            lake.publish(&pipeline, &partition.to_string(), "0", &some_rows(&mut random, 12));
        }
        lake.search(&pipeline);
        for change in 1..=4 {
            // One partition is added, replaced or removed; now and then several.
            for _ in 0..=below(&mut random, 5) / 4 {
                let partition = below(&mut random, 7).to_string();
                let most = if below(&mut random, 4) == 0 { 0 } else { 6 };
                let run_id = format!("{change}r{}", below(&mut random, 1000));
                lake.publish(&pipeline, &partition, &run_id, &some_rows(&mut random, most));
            }
            let found = lake.search(&pipeline);
            lake.copy_latents(&grown, &anew);
            let found_anew = lake.search(&pipeline_anew);
            assert_eq!(
                lake.lists(&pipeline),
                lake.lists(&pipeline_anew),
                "history {history}, change {change}: {settings}"
            );
            if let (Some(found), Some(found_anew)) = (found, found_anew) {
                num_searched += 1;
                num_patched += usize::from(found.rows_searched < found_anew.rows_searched);
            }
            for path in lake.objects(&anew) {
                lake.context.block_on(lake.store.delete(&path)).unwrap();
            }
        }
        for path in lake.objects(&grown) {
            lake.context.block_on(lake.store.delete(&path)).unwrap();
        }
    }
    println!(
        "{HISTORIES} histories: {num_searched} searches after a change, of which {num_patched} patched what was there"
    );
    assert!(
        num_patched * 4 > num_searched,
        "the histories change too much to be patched: {num_patched} of {num_searched}"
    );
}

/// All shares, in any order, and some of them twice.
fn shares(num_tasks: usize, random: &mut Random) -> Vec<Share> {
    let mut indexes: Vec<usize> = (0..num_tasks).chain((0..num_tasks).filter(|index| index % 2 == 0)).collect();
    for place in (1..indexes.len()).rev() {
        indexes.swap(place, below(random, place + 1));
    }
    let share = |index| Share::find(Some(index), NonZeroUsize::new(num_tasks), |_| None).unwrap().0;
    indexes.into_iter().map(share).collect()
}

/// Rows around some centers, of which the first has as many as all others, much alike: a cell of its own that no centroid parts.
fn clustered_rows(random: &mut Random, prefix: &str, num_rows: usize) -> Vec<Row> {
    let vector = |random: &mut Random| {
        let center = below(random, 24).saturating_sub(12);
        let coordinate = |place: usize, random: &mut Random| {
            let spread = if center == 0 { 0.0 } else { random.fraction() - 0.5 };
            ((center * 37 + place * 11) % 23) as f32 - 11.0 + spread as f32
        };
        (0..6).map(|place| coordinate(place, random)).collect::<Vec<f32>>()
    };
    let row = |number: usize, random: &mut Random| {
        let is_rejected = below(random, 40) == 0;
        (format!("{prefix}{:04}", number * 7919 % 10_007), (!is_rejected).then(|| vector(random)))
    };
    (0..num_rows).map(|number| row(number, random)).collect()
}

#[test]
fn tasks_find_what_one_machine_finds_list_for_list() {
    let lake = Lake::new();
    let mut random = Random::new(11);
    let searches = [
        "search = \"ivf\"\ncells = 20\nnprobe = 4\n",
        "search = \"ivf\"\nrecall = 0.9\n",
        "search = \"exact\"\n",
        "search = \"ivf\"\ncells = 6\nnprobe = 2\nscope = \"partition\"\n",
        "search = \"exact\"\nscope = \"partition\"\n",
        "scope = \"reference\"\nreference = \"memory:///other\"\n",
    ];
    let other = pipeline("other", "");
    lake.publish(&other, "0", "0", &clustered_rows(&mut random, "o", 200));
    let mut num_travelled = 0;
    for (number, (search, metric)) in
        searches.iter().flat_map(|search| METRICS.map(|metric| (search, metric))).enumerate()
    {
        let settings = format!("k = 4\nmetric = \"{metric}\"\n{search}[execution]\nunit_rows = 20\n");
        let one = format!("one{number}");
        let of_one = pipeline(&one, &settings);
        for partition in 0..3 {
            let rows = clustered_rows(&mut random, "r", 150 + 100 * partition);
            lake.publish(&of_one, &partition.to_string(), "0", &rows);
        }
        for num_tasks in [1, 3, 16] {
            let many = format!("many{number}-{num_tasks}");
            lake.copy_latents(&one, &many);
            let of_many = pipeline(&many, &settings);
            let (travelled, expected) = lake.search_as_tasks(&of_many, num_tasks, &mut random);
            num_travelled += travelled;
            // All rows are in the sample, so what is expected is what there was.
            assert_eq!(travelled, expected, "{settings}");
        }
        lake.search(&of_one);
        let expected = lake.lists(&of_one);
        assert!(expected.len() > 600 * 3, "{settings}: {}", expected.len());
        for num_tasks in [1, 3, 16] {
            let found = lake.lists(&pipeline(&format!("many{number}-{num_tasks}"), &settings));
            assert!(found == expected, "{settings}: {num_tasks} tasks find other lists");
        }
    }
    assert!(num_travelled > 0);
    println!("{num_travelled} rows travelled");
}

/// Rows with whole numbers for vectors, so that distances are exact in any order of operations.
fn grid_rows(random: &mut Random, num_rows: usize, dim: usize) -> Vec<Row> {
    let mut vector = || (0..dim).map(|_| below(random, 60) as f32).collect();
    (0..num_rows).map(|row| (format!("{:06}", row * 7919 % 1_000_003), Some(vector()))).collect()
}

#[test]
fn a_search_in_little_memory_finds_what_one_in_plenty_finds() {
    let lake = Lake::new();
    let mut random = Random::new(5);
    let (one, two) = (grid_rows(&mut random, 3000, 8), grid_rows(&mut random, 1500, 8));
    let settings = "k = 3\nmetric = \"l2\"\n[execution]\nmemory_limit = ";
    let found = ["\"4MiB\"", "\"4GiB\""].map(|limit| {
        let pipeline = pipeline(&format!("m{}", &limit[1..3]), &format!("{settings}{limit}"));
        lake.publish(&pipeline, "1", "0", &one);
        lake.publish(&pipeline, "2", "0", &two);
        assert_eq!(lake.search(&pipeline).unwrap().rows_searched, 4500);
        lake.lists(&pipeline)
    });
    assert_eq!(found[0].len(), 3 * 4500);
    assert!(found[0] == found[1]);

    // What does not fit is said before anything is searched.
    let pipeline = pipeline("m1", &format!("{settings}\"1MiB\""));
    lake.publish(&pipeline, "1", "0", &one);
    let job = Job::prepare(&lake.context, &pipeline, &Backfill::default()).unwrap();
    job.ensure(&[TableName::Neighbors]).unwrap();
    let error = neighbors(&job, pipeline.neighbors.as_ref().unwrap()).unwrap_err();
    assert_eq!(error.exit_status(), lookalike::error::ExitStatus::Resource);
    assert!(error.to_string().contains("execution.memory_limit is 1048576"), "{error}");
    assert!(error.hint().unwrap().contains("raise memory_limit"));
}

#[test]
fn another_table_can_be_searched() {
    let lake = Lake::new();
    let mut random = Random::new(6);
    let train = pipeline("train", "k = 2\nmetric = \"l2\"\n");
    let (known, new) = (grid_rows(&mut random, 300, 2), grid_rows(&mut random, 200, 2));
    lake.publish(&train, "1", "0", &known[..100]);
    lake.publish(&train, "2", "0", &known[100..]);
    let test = pipeline("test", "k = 2\nmetric = \"l2\"\nscope = \"reference\"\nreference = \"memory:///train\"\n");
    lake.publish(&test, "9", "0", &new);
    assert_eq!(lake.search(&test).unwrap().rows_searched, 200);

    let mut expected = Vec::new();
    for (id, vector) in &new {
        let mut near: Vec<(f32, &str, usize)> = known
            .iter()
            .enumerate()
            .map(|(row, (id, other))| {
                let squares = vector.iter().flatten().zip(other.iter().flatten()).map(|(a, b)| (a - b).powi(2));
                (squares.sum::<f32>().sqrt(), id.as_str(), if row < 100 { 1 } else { 2 })
            })
            .collect();
        near.sort_by(|a, b| a.partial_cmp(b).unwrap());
        for (rank, (distance, near_id, ds)) in near[..2].iter().enumerate() {
            let rank = rank + 1;
            expected.push(format!(
                "ds=9 image_id={id} rank={rank} neighbor_id={near_id} distance={distance:?} neighbor_partition=ds={ds}"
            ));
        }
    }
    assert_eq!(lake.lists(&test), expected);
    assert_eq!(lake.search(&test).unwrap().rows_searched, 0, "the lists are up to date");

    // A row that the other table gets is found; nothing of this one has changed.
    lake.publish(&train, "3", "0", &[("twin".to_owned(), new[0].1.clone())]);
    lake.search(&test).unwrap();
    let twin = lake.lists(&test).into_iter().find(|line| line.contains("neighbor_id=twin")).unwrap();
    assert!(twin.contains(" rank=1 ") && twin.contains("distance=0.0"), "{twin}");
}

#[test]
fn rows_far_from_all_others_leave_the_other_partitions_as_they_are() {
    let lake = Lake::new();
    let mut random = Random::new(7);
    let pipeline = pipeline("far", "k = 3\nmetric = \"l2\"\n");
    for partition in 0..5 {
        lake.publish(&pipeline, &partition.to_string(), "0", &grid_rows(&mut random, 50, 2));
    }
    lake.search(&pipeline);
    let run_ids = || {
        let job = Job::prepare(&lake.context, &pipeline, &Backfill::default()).unwrap();
        let live = lake.context.block_on(job.neighbors.live()).unwrap();
        live.partitions().iter().map(|partition| live.run_of(partition).unwrap().to_owned()).collect::<Vec<_>>()
    };
    let before = run_ids();
    let far: Vec<Row> = (0..5).map(|row| (format!("far{row}"), Some(vec![1e6, row as f32]))).collect();
    lake.publish(&pipeline, "5", "0", &far);
    assert_eq!(lake.search(&pipeline).unwrap().rows_searched, 5);
    assert_eq!(run_ids()[..5], before);
    assert_eq!(lake.search(&pipeline).unwrap().rows_searched, 0, "all lists were looked at");

    // One near the others is in their lists, and only partitions that have such a list are written.
    lake.publish(&pipeline, "6", "0", &[("near".to_owned(), vec![30.0, 30.0].into())]);
    assert_eq!(lake.search(&pipeline).unwrap().rows_searched, 1);
    let with_near: BTreeSet<String> = lake
        .lists(&pipeline)
        .iter()
        .filter(|line| line.contains("neighbor_id=near"))
        .map(|line| line.split(' ').next().unwrap().to_owned())
        .collect();
    let changed = run_ids().iter().zip(&before).filter(|(now, before)| now != before).count();
    assert_eq!(changed, with_near.len());
    assert!(changed > 0);
}

const BY_CELLS: &str = "[pipeline]\nname = \"p\"\n[source]\ntable = \"images\"\n[model]\npackage = \"model\"\n\
                        [limits]\nmax_rejected_fraction = 0.5\n";

/// Days of pictures, some of which are none, and a model fitted to them.
fn days_of_pictures(days: i64, num_rows: i64) -> tempfile::TempDir {
    let folder = folder();
    for number in 1..=days {
        day_of_pictures(folder.path(), number, num_rows);
    }
    write(&folder.path().join("p.toml"), BY_CELLS);
    let fit = ["fit", "p.toml", "--out", "out", "--latent-dim", "6", "--height", "8", "--width", "8"];
    lookalike(folder.path(), &fit).expect(0);
    folder
}

fn day_of_pictures(folder: &Path, number: i64, num_rows: i64) {
    let ids: Vec<String> = (0..num_rows).map(|row| format!("d{number}-{row}")).collect();
    let seeds = (0..num_rows).map(|row| if row == 3 { -1 } else { number * num_rows + row });
    let rows: Vec<(&str, i64)> = ids.iter().map(String::as_str).zip(seeds).collect();
    image_table(&folder.join(format!("images/ds={number}/x.parquet")), &rows);
}

fn run_by(folder: &Path, output: &str, neighbors: &str) -> Ran {
    let file = format!("{output}.toml");
    write(&folder.join(&file), &format!("{BY_CELLS}[output]\ntable = \"{output}\"\n[neighbors]\nk = 5\n{neighbors}"));
    lookalike(folder, &["run", &file])
}

/// The cells of each partition's rows, in the order of the rows.
fn cells_of(tables: &Path) -> BTreeMap<String, Vec<Option<i32>>> {
    let mut cells: BTreeMap<String, Vec<Option<i32>>> = BTreeMap::new();
    for (partition, batch) in batches(tables, TableName::Latents) {
        let column = batch.column_by_name(column::CELL).unwrap().as_primitive::<Int32Type>();
        cells.entry(partition).or_default().extend(column.iter());
    }
    cells
}

#[test]
fn the_table_is_its_own_index() {
    let folder = days_of_pictures(3, 150);
    let folder = folder.path();
    run_by(folder, "exact", "search = \"exact\"").expect(0);
    run_by(folder, "ivf", "search = \"ivf\"\ncells = 12\nrecall = 0.9").expect(0);
    run_by(folder, "all", "search = \"ivf\"\ncells = 12\nnprobe = 12").expect(0);

    // Sorted by cells, and otherwise the same rows.
    for rows in cells_of(&folder.join("ivf")).values() {
        assert_eq!(rows.len(), 150);
        assert_eq!(rows.iter().filter(|cell| cell.is_none()).count(), 1, "the picture that is none");
        let cells: Vec<i32> = rows.iter().map(|cell| cell.unwrap_or(i32::MAX)).collect();
        assert!(cells.is_sorted());
        assert!(cells.iter().collect::<BTreeSet<_>>().len() > 5);
    }
    assert!(cells_of(&folder.join("exact")).values().flatten().all(Option::is_none));
    let latents = |output: &str| rows(&folder.join(output), TableName::Latents, &["cell", "run_id"]);
    assert_eq!(latents("ivf"), latents("exact"));

    // All cells: the exact lists.
    let lists = |output: &str| rows(&folder.join(output), TableName::Neighbors, &["run_id"]);
    assert_eq!(lists("all"), lists("exact"));
    // Few cells: lists of which at least so many are right, as the run says of itself.
    let exact: BTreeSet<String> = lists("exact").iter().map(|line| without_rank(line)).collect();
    let found = lists("ivf").iter().filter(|line| exact.contains(&without_rank(line))).count();
    let recall = found as f64 / exact.len() as f64;
    let run = &rows(&folder.join("ivf"), TableName::Runs, &[])[0];
    let said = |name: &str| run.split(&format!("{name}=")).nth(1).unwrap().split(' ').next().unwrap();
    assert_eq!((said("neighbors_search"), said("neighbors_cells")), ("ivf", "12"));
    let nprobe: usize = said("neighbors_nprobe").parse().unwrap();
    assert!((1..12).contains(&nprobe), "{nprobe}");
    let measured: f64 = said("neighbors_recall").parse().unwrap();
    println!("nprobe {nprobe}: recall {recall:.4}, measured by the run {measured:.4}");
    assert!(recall >= 0.88 && (recall - measured).abs() < 0.05, "{recall} {measured}");
    let run = &rows(&folder.join("exact"), TableName::Runs, &[])[0];
    assert!(run.contains("neighbors_search=exact neighbors_cells=NULL neighbors_nprobe=NULL neighbors_recall=1.0"));

    // Nothing to do, and a day more is sorted by the same cells.
    assert_eq!(
        run_by(folder, "ivf", "search = \"ivf\"\ncells = 12\nrecall = 0.9").expect(0).summary()["status"],
        "nothing_to_do"
    );
    let before = run_ids(&folder.join("ivf"), TableName::Latents);
    day_of_pictures(folder, 4, 40);
    let summary = run_by(folder, "ivf", "search = \"ivf\"\ncells = 12\nrecall = 0.9").expect(0).summary();
    assert_eq!(summary["rows_embedded"], 40);
    let after = run_ids(&folder.join("ivf"), TableName::Latents);
    assert!(before.iter().all(|(partition, runs)| after[partition] == *runs));
    assert!(cells_of(&folder.join("ivf"))["ds=4"].iter().filter(|cell| cell.is_some()).count() == 39);
    assert_eq!(std::fs::read_dir(folder.join("ivf/_lookalike/cells")).unwrap().count(), 1);

    // A table that has outgrown its cells gets new ones, and nothing is embedded for that.
    day_of_pictures(folder, 5, 2000);
    let summary = run_by(folder, "ivf", "search = \"ivf\"\ncells = 12\nrecall = 0.9").expect(0).summary();
    assert_eq!(summary["rows_embedded"], 2000);
    let sets = std::fs::read_dir(folder.join("ivf/_lookalike/cells")).unwrap().next().unwrap().unwrap().path();
    assert_eq!(std::fs::read_dir(sets).unwrap().count(), 2);
    let summary = run_by(folder, "ivf", "search = \"exact\"").expect(0).summary();
    assert_eq!(summary["rows_embedded"], 0);
}

fn without_rank(line: &str) -> String {
    line.split(' ').filter(|part| !part.starts_with("rank=")).collect::<Vec<_>>().join(" ")
}

#[test]
fn the_memory_of_a_search_does_not_grow_with_the_table() {
    let folder = folder();
    let folder = folder.path();
    image_table(&folder.join("images/ds=1/x.parquet"), &[("a", 1), ("b", 2), ("c", 3)]);
    write(&folder.join("p.toml"), BY_CELLS);
    lookalike(folder, &["fit", "p.toml", "--out", "out", "--latent-dim", "1", "--height", "8", "--width", "8"])
        .expect(0);
    let peak = |num_rows: usize| {
        let name = format!("p{num_rows}.toml");
        let neighbors = "[neighbors]\nk = 2\nsearch = \"exact\"\n[execution]\nmemory_limit = \"32MiB\"\n";
        write(&folder.join(&name), &format!("{BY_CELLS}{neighbors}[output]\ntable = \"t{num_rows}\"\n"));
        let text = std::fs::read_to_string(folder.join(&name)).unwrap();
        let pipeline = Pipeline::load_str(&text, "p.toml", folder).unwrap();
        let context = Context::with_stores(Stores::default(), None, true).unwrap();
        let job = Job::prepare(&context, &pipeline, &Backfill::default()).unwrap();
        job.ensure(&[TableName::Latents]).unwrap();
        let mut random = Random::new(8);
        let partition = PartitionValues::new(vec![("ds".to_owned(), Some("1".to_owned()))]);
        let mut files = Vec::new();
        for unit in 0..num_rows / 10_000 {
            let rows: Vec<Row> = (0..10_000)
                .map(|row| {
                    let vector = (0..64).map(|_| random.fraction() as f32).collect();
                    (format!("{unit:03}{row:05}"), Some(vector))
                })
                .collect();
            let schema = data_schema(TableName::Latents, &Schema::empty());
            let footer = job.footer("0").unwrap();
            context.block_on(async {
                let file = job.latents.create_file(&partition, "0", unit, schema, &footer);
                let mut file = file.await.unwrap();
                file.write(&latents(&rows, "0", &job.model_sha256)).await.unwrap();
                files.push(file.close().await.unwrap());
            });
        }
        context.block_on(job.latents.replace_partition(&partition, "0", &files)).unwrap();
        let (_, resident_kib) = peak_memory(folder, &["neighbors", &name], 0);
        println!("{num_rows} rows: {resident_kib} KiB");
        resident_kib
    };
    // Both are more than is held at a time. The rest of the difference are ids, and a row group of the output that the smaller one does
    // not fill.
    let (small, large) = (peak(40_000), peak(80_000));
    assert!(large * 100 <= small * 115, "{small} KiB for 40,000 rows, {large} KiB for 80,000");
}
