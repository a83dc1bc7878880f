//! The pass over the images: decode, preprocess, infer, score. Its rows become `latents`; `fit` and `calibrate` use it too.
//!
//! One thread reads, as many workers as cores each take a whole batch from bytes to scores, and the caller receives the scored
//! batches in the order of the source. A worker runs decoding and a one-thread session by turns, so the cores are busy with
//! whichever is due, and there are never more busy threads than cores. All queues are bounded: memory holds a few batches
//! a worker, however large the table is.

use std::collections::BTreeMap;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};

use arrow::array::{ArrayRef, Float32Builder, Float64Array, Int32Array, ListBuilder, RecordBatch, StringArray};
use arrow::datatypes::{DataType, Field, SchemaRef};
use arrow::error::ArrowError;

use crate::decode::{self, DecodeLimits, PixelSpec, Pixels, Reject};
use crate::error::Error;
use crate::model::{Latents, Model, Role};
use crate::schema::{STATUS_OK, column};
use crate::score::{Rule, Scores, Tensors, score};
use crate::source::{ImageBatch, ReadOptions, Source, SourcePartition, WorkUnit};

/// Batches that wait between the reader and each worker.
const BATCHES_WAITING_PER_WORKER: usize = 2;

/// How a pass runs.
#[derive(Debug, Clone)]
pub struct Pass<'a> {
    /// The table.
    pub source: &'a Source,
    /// What an image may cost.
    pub limits: DecodeLimits,
    /// Images in an inference call.
    pub batch_size: usize,
    /// Threads.
    pub workers: usize,
    /// Runs the reader's requests.
    pub runtime: tokio::runtime::Handle,
}

/// Rows with their pixels, as `fit` wants them.
#[derive(Debug)]
pub struct PixelBatch {
    /// Compressed image of each row that has one.
    pub images: Vec<Option<arrow::buffer::Buffer>>,
    /// Pixels of each row, or why there are none.
    pub pixels: Vec<Result<Pixels, Reject>>,
}

/// Rows with their vectors and scores.
#[derive(Debug)]
pub struct ScoredBatch {
    ids: StringArray,
    kept: RecordBatch,
    rows: Vec<ScoredRow>,
    /// Vectors of the rows that have them, one after the other, by role.
    vectors: BTreeMap<&'static str, Vec<f32>>,
}

#[derive(Debug)]
struct ScoredRow {
    content_sha256: Option<String>,
    outcome: Result<Outcome, Reject>,
}

#[derive(Debug, Clone, Copy)]
struct Outcome {
    width: u32,
    height: u32,
    scores: Scores,
}

impl Pass<'_> {
    /// Decodes all rows of a unit and hands them to `sink` in order.
    pub fn decode_unit(
        &self,
        partition: &SourcePartition,
        unit: &WorkUnit,
        spec: &PixelSpec,
        sink: impl FnMut(PixelBatch) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let work = |_: usize, batch: ImageBatch| {
            let pixels = batch.images.iter().map(|image| self.decode_row(image, spec)).collect();
            let images = batch.images.into_iter().map(Result::ok).collect();
            Ok(PixelBatch { images, pixels })
        };
        self.run(partition, unit, work, sink)
    }

    /// Decodes, infers and scores all rows of a unit and hands them to `sink` in order.
    pub fn score_unit(
        &self,
        partition: &SourcePartition,
        unit: &WorkUnit,
        model: &Model,
        sink: impl FnMut(ScoredBatch) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let work = |worker: usize, batch: ImageBatch| self.score_batch(worker, batch, model);
        self.run(partition, unit, work, sink)
    }

    /// Runs `work` on all batches of a unit, on all workers, and hands the results to `sink` in the order of the rows.
    ///
    /// The only place that spawns threads for images. The first error ends the pass, whoever has it.
    fn run<T: Send>(
        &self,
        partition: &SourcePartition,
        unit: &WorkUnit,
        work: impl Fn(usize, ImageBatch) -> Result<T, Error> + Sync,
        mut sink: impl FnMut(T) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let options = ReadOptions { batch_rows: self.batch_size, max_image_bytes: self.limits.max_image_bytes };
        let waiting = self.workers * BATCHES_WAITING_PER_WORKER;
        let (batch_sender, batch_receiver) = sync_channel::<(usize, ImageBatch)>(waiting);
        let (result_sender, result_receiver) = sync_channel::<(usize, Result<T, Error>)>(waiting);
        let batches = Mutex::new(batch_receiver);
        std::thread::scope(|scope| {
            let reader = scope.spawn(move || {
                let mut number = 0;
                self.runtime.block_on(self.source.read_unit(&partition.values, unit, options, |batch| {
                    let sent = batch_sender.send((number, batch)).is_ok();
                    number += 1;
                    sent
                }))
            });
            for worker in 0..self.workers {
                let (work, batches, results) = (&work, &batches, result_sender.clone());
                scope.spawn(move || work_off(worker, batches, &results, work));
            }
            drop(result_sender);
            let outcome = in_order(&result_receiver, &mut sink);
            // Whoever still waits for room in a queue must learn that nobody takes anything out of it any more.
            drop(result_receiver);
            drop(std::mem::replace(&mut *batches.lock().unwrap_or_else(PoisonError::into_inner), sync_channel(0).1));
            let read = reader.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            outcome?;
            read.map_err(Error::from)
        })
    }

    fn decode_row(&self, image: &Result<arrow::buffer::Buffer, Reject>, spec: &PixelSpec) -> Result<Pixels, Reject> {
        match image {
            Ok(bytes) => decode::decode(bytes, spec, &self.limits),
            Err(reject) => Err(reject.clone()),
        }
    }

    fn score_batch(&self, worker: usize, batch: ImageBatch, model: &Model) -> Result<ScoredBatch, Error> {
        let spec = model.contract.input.pixel_spec();
        let num_values = model.contract.input.num_values();
        let mut tensors = Vec::with_capacity(batch.images.len() * num_values);
        let mut rows = Vec::with_capacity(batch.images.len());
        for image in &batch.images {
            let content_sha256 = image.as_ref().ok().map(|bytes| crate::hash::sha256(bytes));
            let outcome = self.decode_row(image, &spec).map(|pixels| {
                let start = tensors.len();
                tensors.resize(start + num_values, 0.0);
                model.to_tensor(&pixels.data, &mut tensors[start..]);
                Outcome { width: pixels.source_width, height: pixels.source_height, scores: Scores::default() }
            });
            rows.push(ScoredRow { content_sha256, outcome });
        }
        let mut scored = ScoredBatch { ids: batch.ids, kept: batch.kept, rows, vectors: BTreeMap::new() };
        if !tensors.is_empty() {
            let num_images = tensors.len() / num_values;
            model.session(worker).run(&tensors, num_images, |latents| scored.fill(&tensors, latents, model))?;
        }
        Ok(scored)
    }
}

/// Takes batches until there are none, and sends the results; ends when nobody wants them.
fn work_off<T>(
    worker: usize,
    batches: &Mutex<Receiver<(usize, ImageBatch)>>,
    results: &SyncSender<(usize, Result<T, Error>)>,
    work: impl Fn(usize, ImageBatch) -> Result<T, Error>,
) {
    loop {
        let next = batches.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok((number, batch)) = next else { return };
        if results.send((number, work(worker, batch))).is_err() {
            return;
        }
    }
}

/// Hands results to the sink by their numbers, so that the order is the source's whichever worker was faster.
fn in_order<T>(
    results: &Receiver<(usize, Result<T, Error>)>,
    sink: &mut impl FnMut(T) -> Result<(), Error>,
) -> Result<(), Error> {
    let mut early = BTreeMap::new();
    let mut next = 0;
    for (number, result) in results {
        early.insert(number, result?);
        while let Some(result) = early.remove(&next) {
            sink(result)?;
            next += 1;
        }
    }
    Ok(())
}

impl ScoredBatch {
    /// Scores the images of the batch that were decoded, and takes over their vectors. An image for which the model gives no finite
    /// numbers is rejected.
    fn fill(&mut self, tensors: &[f32], latents: Latents<'_>, model: &Model) {
        let likelihood = model.contract.likelihood;
        let mut squared = Vec::new();
        let mut image = 0;
        for row in &mut self.rows {
            let Ok(outcome) = &mut row.outcome else { continue };
            let number = image;
            image += 1;
            let slice = |role: Role| {
                let values = latents.of(role)?;
                let dim = values.len() / latents.batch;
                values.get(number * dim..(number + 1) * dim)
            };
            let num_values = tensors.len() / latents.batch;
            let input = &tensors[number * num_values..(number + 1) * num_values];
            let (mu, logvar) = (slice(Role::Mu), slice(Role::Logvar));
            let scores = score(
                Tensors { input, reconstruction: slice(Role::Reconstruction), mu, logvar },
                likelihood,
                &mut squared,
            );
            let embedding = slice(Role::Embedding).unwrap_or_default();
            let finite = [Some(embedding), mu, logvar].into_iter().flatten().flatten().all(|value| value.is_finite())
                && Rule::ALL.into_iter().filter_map(|rule| scores.get(rule)).all(f64::is_finite);
            if !finite {
                row.outcome = Err(Reject::NonFiniteOutput);
                continue;
            }
            outcome.scores = scores;
            let has_embedding = model.contract.outputs.embedding.is_some();
            let published = [
                (column::EMBEDDING, Some(embedding)),
                // Without a separate embedding, `mu` is the embedding and is not stored twice.
                (column::MU, mu.filter(|_| has_embedding)),
                (column::LOGVAR, logvar),
            ];
            for (name, vector) in published {
                if let Some(vector) = vector {
                    self.vectors.entry(name).or_default().extend_from_slice(vector);
                }
            }
        }
    }

    /// Number of rows.
    pub fn num_rows(&self) -> usize {
        self.rows.len()
    }

    /// The status of each row.
    pub fn statuses(&self) -> impl Iterator<Item = &'static str> {
        self.rows.iter().map(|row| row.outcome.as_ref().map_or_else(Reject::code, |_| STATUS_OK))
    }

    /// The scores of the rows that have them.
    pub fn scores(&self) -> impl Iterator<Item = &Scores> {
        self.rows.iter().filter_map(|row| row.outcome.as_ref().ok()).map(|outcome| &outcome.scores)
    }

    /// The rows as `latents` has them.
    pub fn to_record_batch(
        &self,
        schema: &SchemaRef,
        run_id: &str,
        model_sha256: &str,
    ) -> Result<RecordBatch, ArrowError> {
        let ok = |row: &ScoredRow| row.outcome.as_ref().ok().copied();
        let side = |value: u32| i32::try_from(value).ok();
        let columns = schema
            .fields()
            .iter()
            .map(|field| -> Result<ArrayRef, ArrowError> {
                Ok(match field.name().as_str() {
                    column::IMAGE_ID => Arc::new(self.ids.clone()),
                    column::STATUS => Arc::new(StringArray::from_iter_values(self.statuses())),
                    column::ERROR_MESSAGE => Arc::new(
                        self.rows
                            .iter()
                            .map(|row| row.outcome.as_ref().err().map(ToString::to_string))
                            .collect::<StringArray>(),
                    ),
                    column::WIDTH => Arc::new(
                        self.rows.iter().map(|row| ok(row).and_then(|row| side(row.width))).collect::<Int32Array>(),
                    ),
                    column::HEIGHT => Arc::new(
                        self.rows.iter().map(|row| ok(row).and_then(|row| side(row.height))).collect::<Int32Array>(),
                    ),
                    column::CONTENT_SHA256 => {
                        Arc::new(self.rows.iter().map(|row| row.content_sha256.as_deref()).collect::<StringArray>())
                    }
                    name @ (column::EMBEDDING | column::MU | column::LOGVAR) => self.vector_column(name),
                    column::RUN_ID => Arc::new(StringArray::from(vec![run_id; self.rows.len()])),
                    column::MODEL_SHA256 => Arc::new(StringArray::from(vec![model_sha256; self.rows.len()])),
                    name => match Rule::ALL.into_iter().find(|rule| rule.name() == name) {
                        Some(rule) => Arc::new(
                            self.rows
                                .iter()
                                .map(|row| ok(row).and_then(|row| row.scores.get(rule)))
                                .collect::<Float64Array>(),
                        ),
                        None => self
                            .kept
                            .column_by_name(name)
                            .cloned()
                            .ok_or_else(|| ArrowError::SchemaError(format!("no value for the column `{name}`")))?,
                    },
                })
            })
            .collect::<Result<Vec<_>, _>>()?;
        RecordBatch::try_new(Arc::clone(schema), columns)
    }

    fn vector_column(&self, name: &str) -> ArrayRef {
        let element = Arc::new(Field::new("element", DataType::Float32, false));
        let mut builder = ListBuilder::new(Float32Builder::new()).with_field(element);
        let num_ok = self.rows.iter().filter(|row| row.outcome.is_ok()).count();
        let values = self.vectors.get(name).map(Vec::as_slice).unwrap_or_default();
        let mut vectors = values.chunks(values.len().checked_div(num_ok).unwrap_or(1).max(1));
        for row in &self.rows {
            match row.outcome.as_ref().ok().and_then(|_| vectors.next()) {
                Some(vector) => {
                    builder.values().append_slice(vector);
                    builder.append(true);
                }
                None => builder.append(false),
            }
        }
        Arc::new(builder.finish())
    }
}
