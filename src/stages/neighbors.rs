//! The neighbors stage: `latents` → `neighbors`.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use arrow::array::{Array as _, AsArray as _, Float32Array, Int32Array, RecordBatch, StringArray};
use arrow::datatypes::{Float32Type, Schema};
use ndarray::ArrayView2;

use super::{Job, StageReport};
use crate::config::{NeighborScope, Neighbors};
use crate::error::Error;
use crate::hash::Fingerprint;
use crate::neighbors::exact::self_join;
use crate::neighbors::topk::NeighborLists;
use crate::schema::{TableName, column, data_schema};
use crate::source::PartitionValues;
use crate::table::{Live, Published};

/// Rows of `neighbors` put together at a time.
const ROWS_A_BATCH: usize = 65_536;

/// The vectors of the rows that have one, ordered by id (and partition), with what names them.
struct Corpus {
    dim: usize,
    vectors: Vec<f32>,
    /// Id, and number of the partition, of each vector.
    names: Vec<(String, usize)>,
}

/// Finds the nearest neighbors of every row of `latents`, and publishes every partition whose lists may have changed.
pub fn neighbors(job: &Job<'_>, settings: &Neighbors) -> Result<StageReport, Error> {
    let started = Instant::now();
    let mut report = StageReport::default();
    job.settle(&mut report, |latents, report| find(job, settings, latents, report))?;
    report.secs = started.elapsed().as_secs_f64();
    Ok(report)
}

fn find(job: &Job<'_>, settings: &Neighbors, latents: &Live, report: &mut StageReport) -> Result<(), Error> {
    let live = job.context.block_on(job.neighbors.live())?;
    job.remove_vanished(&job.neighbors, &live)?;
    let partitions = latents.partitions();
    report.partitions.retain(|partition, _| partitions.contains(partition));
    let mut due = Vec::new();
    for partition in &partitions {
        let run_id = run_id(settings, latents, partition);
        if live.run_of(partition) != Some(run_id.as_str()) {
            due.push(partition.clone());
        }
        let entry = report.partitions.entry(partition.clone()).or_default();
        entry.run_id = run_id;
    }
    let scopes: Vec<Vec<PartitionValues>> = match settings.scope {
        NeighborScope::Corpus => vec![partitions],
        NeighborScope::Partition => partitions.into_iter().map(|partition| vec![partition]).collect(),
    };
    for scope in scopes {
        if scope.iter().any(|partition| due.contains(partition)) {
            join(job, settings, latents, &scope, &due, report)?;
        }
    }
    Ok(())
}

/// The run id of a partition's lists: they depend on every row that was searched.
pub fn run_id(settings: &Neighbors, latents: &Live, partition: &PartitionValues) -> String {
    let mut fingerprint = Fingerprint::new("neighbors")
        .with("schema", &crate::schema::VERSION.to_string())
        .with("k", &settings.k.to_string())
        .with("metric", settings.metric.name())
        .with("partition", &partition.to_string());
    for searched in latents.partitions() {
        if settings.scope == NeighborScope::Corpus || searched == *partition {
            fingerprint = fingerprint.with(&searched.to_string(), latents.run_of(&searched).unwrap_or_default());
        }
    }
    fingerprint.short()
}

/// Joins the vectors of `scope` with themselves and publishes those of its partitions that are `due`.
fn join(
    job: &Job<'_>,
    settings: &Neighbors,
    latents: &Live,
    scope: &[PartitionValues],
    due: &[PartitionValues],
    report: &mut StageReport,
) -> Result<(), Error> {
    let corpus = read_corpus(job, latents, scope)?;
    let view = ArrayView2::from_shape((corpus.names.len(), corpus.dim), &corpus.vectors).map_err(|e| Error::Rows {
        table: TableName::Latents.name(),
        source: arrow::error::ArrowError::from_external_error(Box::new(e)),
    })?;
    let lists = self_join(&view, settings.metric, settings.k.get())?;
    let mut rows_of: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for (row, (_, partition)) in corpus.names.iter().enumerate() {
        rows_of.entry(*partition).or_default().push(row);
    }
    for (number, partition) in scope.iter().enumerate() {
        job.context.stop.check()?;
        let Some(entry) = report.partitions.get_mut(partition).filter(|_| due.contains(partition)) else { continue };
        let rows = rows_of.get(&number).map(Vec::as_slice).unwrap_or_default();
        let (published, num_rows) = publish(job, &corpus, &lists, scope, number, rows, &entry.run_id)?;
        entry.written |= published != Published::Unchanged;
        entry.num_rows = num_rows;
    }
    Ok(())
}

fn read_corpus(job: &Job<'_>, latents: &Live, scope: &[PartitionValues]) -> Result<Corpus, Error> {
    let files = latents.files.iter().filter(|file| scope.contains(&file.partition)).cloned().collect();
    let batches = job.context.block_on(job.latents.read(files, &[column::IMAGE_ID, column::EMBEDDING]))?;
    let mut rows: Vec<(&str, usize, &[f32])> = Vec::new();
    for (file, batch) in &batches {
        let partition = scope.iter().position(|partition| *partition == file.partition).unwrap_or_default();
        let ids = batch.column(0).as_string::<i32>();
        let lists = batch.column(1).as_list::<i32>();
        let values = lists.values().as_primitive::<Float32Type>().values();
        for row in (0..batch.num_rows()).filter(|row| lists.is_valid(*row)) {
            let offsets = lists.value_offsets();
            let (start, end) = (offsets[row].unsigned_abs() as usize, offsets[row + 1].unsigned_abs() as usize);
            rows.push((ids.value(row), partition, &values[start..end]));
        }
    }
    // The kernel breaks ties by row number; so that ties go by id, rows are in the order of the ids.
    rows.sort_unstable_by(|a, b| (a.0, a.1).cmp(&(b.0, b.1)));
    let dim = rows.first().map_or(0, |(_, _, vector)| vector.len());
    let mut corpus =
        Corpus { dim, vectors: Vec::with_capacity(rows.len() * dim), names: Vec::with_capacity(rows.len()) };
    for (id, partition, vector) in rows {
        corpus.vectors.extend_from_slice(vector);
        corpus.names.push((id.to_owned(), partition));
    }
    Ok(corpus)
}

/// Writes the lists of one partition's rows and makes them its content; returns the number of rows too.
fn publish(
    job: &Job<'_>,
    corpus: &Corpus,
    lists: &NeighborLists,
    scope: &[PartitionValues],
    number: usize,
    rows: &[usize],
    run_id: &str,
) -> Result<(Published, u64), Error> {
    let partition = &scope[number];
    let schema = data_schema(TableName::Neighbors, &Schema::empty());
    let footer = job.footer(run_id)?;
    let mut file =
        job.context.block_on(job.neighbors.create_file(partition, run_id, 0, Arc::clone(&schema), &footer))?;
    let partition_names: Vec<String> = scope.iter().map(ToString::to_string).collect();
    let queries_a_batch = (ROWS_A_BATCH / lists.k().max(1)).max(1);
    for queries in rows.chunks(queries_a_batch) {
        let found: Vec<(usize, usize, usize, f32)> = queries
            .iter()
            .flat_map(|query| {
                let list = lists.get(*query).unwrap_or_default();
                list.iter().enumerate().map(|(place, near)| (*query, place + 1, near.row as usize, near.distance))
            })
            .collect();
        let names = |row: usize| corpus.names[row].0.as_str();
        let batch = RecordBatch::try_new(
            Arc::clone(&schema),
            vec![
                Arc::new(StringArray::from_iter_values(found.iter().map(|(query, ..)| names(*query)))),
                Arc::new(Int32Array::from_iter_values(
                    found.iter().map(|(_, rank, ..)| i32::try_from(*rank).unwrap_or(i32::MAX)),
                )),
                Arc::new(StringArray::from_iter_values(found.iter().map(|(_, _, near, _)| names(*near)))),
                Arc::new(Float32Array::from_iter_values(found.iter().map(|(.., distance)| *distance))),
                Arc::new(
                    found
                        .iter()
                        .map(|(_, _, near, _)| {
                            Some(partition_names[corpus.names[*near].1].as_str()).filter(|name| !name.is_empty())
                        })
                        .collect::<StringArray>(),
                ),
                Arc::new(StringArray::from(vec![run_id; found.len()])),
            ],
        )
        .map_err(|source| Error::Rows { table: TableName::Neighbors.name(), source })?;
        job.context.block_on(file.write(&batch))?;
    }
    let file = job.context.block_on(file.close())?;
    let num_rows = file.num_rows;
    tracing::debug!(partition = partition.name(), num_rows, "publishing neighbors");
    let published = job.context.block_on(job.neighbors.replace_partition(partition, run_id, &[file]))?;
    Ok((published, num_rows))
}
