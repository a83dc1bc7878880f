//! The pass over the images: decode, preprocess, infer, score. Its rows become `latents`; `fit` and `calibrate` use it too.
//! Features take the same way, without the first step.
//!
//! One thread reads, as many workers as cores each take a whole batch from bytes to scores, and the caller receives the scored
//! batches in the order of the source. A worker waits for the thread that decodes its images ([`decode_batch`]) and runs a one-thread
//! session by turns, so the cores are busy with whichever is due, and there are hardly ever more busy threads than cores. All queues
//! are bounded: memory holds a few batches a worker, however large the table is.
//!
//! A thread that panics is an error of the pass that names the unit, as is a batch that cannot be decoded to its end; what an image
//! is to blame for is a [`Reject`] of its row.

use std::collections::{BTreeMap, HashSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arrow::array::{
    Array as _, ArrayRef, Float32Builder, Float64Array, Int32Array, Int64Array, ListBuilder, RecordBatch, StringArray,
    new_null_array,
};
use arrow::buffer::Buffer;
use arrow::datatypes::{DataType, Field, SchemaRef};
use arrow::error::ArrowError;

use crate::decode::{BatchError, DecodeLimits, PixelSpec, Pixels, Reject, decode_batch, panic_message};
use crate::error::Error;
use crate::features::{FeatureNormalizer, Tensor};
use crate::model::{ImagePreparation, Latents, Model, ModelError, Role};
use crate::pixel_stats::{PixelStat, PixelStats};
use crate::redact::redact;
use crate::schema::{STATUS_OK, column};
use crate::score::elbo::row_seed;
use crate::score::{Rule, Scores, Tensors, score};
use crate::source::{Cells, ImageBatch, ReadOptions, Source, SourcePartition, WorkUnit};
use crate::stop::Stop;

/// Batches that wait between the reader and each worker.
const BATCHES_WAITING_PER_WORKER: usize = 2;

/// How long a pass waits for a result before it looks whether it was told to stop.
const STOP_CHECK_EVERY: Duration = Duration::from_millis(200);

/// A pass that ended for no fault of the data: a defect of this program, or a machine that has no more to give.
#[derive(Debug, thiserror::Error)]
#[error("cannot process unit {unit} of {partition}")]
pub struct PassError {
    /// The partition, or what stands for a table without.
    pub partition: String,
    /// Number of the unit within it.
    pub unit: usize,
    /// What happened.
    pub source: PassFault,
}

/// What ended a pass.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PassFault {
    /// A defect of this program.
    #[error("a worker panicked: {0}")]
    Panicked(String),
    /// A batch was not decoded to its end.
    #[error(transparent)]
    Batch(#[from] BatchError),
    /// A defect of this program: [`crate::model::Input::check`] comes before any pass.
    #[error("the source does not hold what the model takes")]
    OtherInput,
}

/// What goes wrong in a thread: an error that says where, or one whose place is added by the pass.
enum WorkError {
    Error(Error),
    Fault(PassFault),
}

impl<E: Into<Error>> From<E> for WorkError {
    fn from(error: E) -> Self {
        Self::Error(error.into())
    }
}

/// Runs `work`, of which a panic is a fault.
fn guarded<T>(work: impl FnOnce() -> Result<T, WorkError>) -> Result<T, WorkError> {
    // Nothing that `work` could leave half done is looked at after a panic: the pass ends.
    catch_unwind(AssertUnwindSafe(work))
        .unwrap_or_else(|panic| Err(WorkError::Fault(PassFault::Panicked(panic_message(&*panic)))))
}

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
    /// The rows to read, by id; `None`: all.
    pub only_ids: Option<Arc<HashSet<String>>>,
    /// Runs the reader's requests.
    pub runtime: tokio::runtime::Handle,
    /// Ends the pass between two batches.
    pub stop: Stop,
}

/// Rows with their pixels.
#[derive(Debug)]
pub struct PixelBatch {
    /// Keys, one a row.
    pub ids: StringArray,
    /// Compressed image of each row that has one.
    pub images: Vec<Option<Buffer>>,
    /// Pixels of each row, or why there are none.
    pub pixels: Vec<Result<Pixels, Reject>>,
}

/// An image with its vector.
#[derive(Debug, Clone, PartialEq)]
pub struct EmbeddedImage {
    /// Width of the source image, in pixels.
    pub width: u32,
    /// Height of the source image, in pixels.
    pub height: u32,
    /// Size of the compressed image.
    pub num_bytes: usize,
    /// Hash of the compressed image.
    pub content_sha256: String,
    /// The vector.
    pub embedding: Vec<f32>,
}

/// Decodes and embeds one batch of images as a pass does it, in the calling thread.
pub fn embed_images(
    batch: ImageBatch,
    model: &Model,
    limits: &DecodeLimits,
) -> Result<Vec<Result<EmbeddedImage, Reject>>, Error> {
    match guarded(|| score_batch(0, "", batch, model, limits)) {
        Ok((scored, _)) => Ok(scored.into_images()),
        Err(WorkError::Error(error)) => Err(error),
        Err(WorkError::Fault(source)) => {
            Err(PassError { partition: "the images named".to_owned(), unit: 0, source }.into())
        }
    }
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
    /// Size and hash of the compressed image, or of the features, where there are any.
    content: Option<(usize, String)>,
    outcome: Result<Outcome, Reject>,
}

#[derive(Debug, Clone, Copy)]
struct Outcome {
    /// What is known of an image and not of features.
    image: Option<SeenImage>,
    scores: Scores,
}

#[derive(Debug, Clone, Copy)]
struct SeenImage {
    width: u32,
    height: u32,
    pixel_stats: PixelStats,
}

impl Pass<'_> {
    /// Hands all rows of a unit to `sink` in order, as the source has them. Returns how many it gave.
    pub fn read_unit(
        &self,
        partition: &SourcePartition,
        unit: &WorkUnit,
        sink: impl FnMut(ImageBatch) -> Result<(), Error>,
    ) -> Result<u64, Error> {
        self.run(partition, unit, |_, batch| Ok(batch), sink)
    }

    /// Decodes all rows of a unit and hands them to `sink` in order. Returns how many the source gave.
    pub fn decode_unit(
        &self,
        partition: &SourcePartition,
        unit: &WorkUnit,
        spec: &PixelSpec,
        sink: impl FnMut(PixelBatch) -> Result<(), Error>,
    ) -> Result<u64, Error> {
        self.map_unit(partition, unit, spec, |_, batch| Ok(batch), sink)
    }

    /// Decodes all rows of a unit, runs `work` on each batch, on all workers by their numbers, and hands what comes of it to
    /// `sink` in order. Returns how many rows the source gave.
    pub fn map_unit<T: Send>(
        &self,
        partition: &SourcePartition,
        unit: &WorkUnit,
        spec: &PixelSpec,
        work: impl Fn(usize, PixelBatch) -> Result<T, Error> + Sync,
        sink: impl FnMut(T) -> Result<(), Error>,
    ) -> Result<u64, Error> {
        let decode_and_work = |worker: usize, batch: ImageBatch| {
            let Cells::Images(images) = batch.cells else {
                return Err(WorkError::Fault(PassFault::OtherInput));
            };
            let images = Arc::new(images);
            let mut pixels = Vec::with_capacity(images.len());
            decode(&images, std::slice::from_ref(spec), &self.limits, |outcome| {
                pixels.push(outcome.map(|mut each| each.remove(0)));
            })?;
            let images = images.iter().map(|image| image.as_ref().ok().cloned()).collect();
            Ok(work(worker, PixelBatch { ids: batch.ids, images, pixels })?)
        };
        self.run(partition, unit, decode_and_work, sink)
    }

    /// Decodes, infers and scores all rows of a unit and hands them to `sink` in order. Returns how many the source gave, counted
    /// where they are read.
    pub fn score_unit(
        &self,
        partition: &SourcePartition,
        unit: &WorkUnit,
        model: &Model,
        sink: impl FnMut(ScoredBatch) -> Result<(), Error>,
    ) -> Result<u64, Error> {
        let name = partition.values.to_string();
        let work = |worker: usize, batch: ImageBatch| Ok(score_batch(worker, &name, batch, model, &self.limits)?.0);
        self.run(partition, unit, work, sink)
    }

    /// The same, and hands out the input tensors beside the rows, which takes memory for those of all batches under way. See
    /// [`ScoredBatch::inputs`].
    pub fn score_unit_with_tensors(
        &self,
        partition: &SourcePartition,
        unit: &WorkUnit,
        model: &Model,
        mut sink: impl FnMut(ScoredBatch, Vec<f32>) -> Result<(), Error>,
    ) -> Result<u64, Error> {
        let name = partition.values.to_string();
        let work = |worker: usize, batch: ImageBatch| score_batch(worker, &name, batch, model, &self.limits);
        self.run(partition, unit, work, |(scored, tensors)| sink(scored, tensors))
    }

    /// Runs `work` on all batches of a unit, on all workers, and hands the results to `sink` in the order of the rows.
    ///
    /// The only place that spawns threads for images. The first error ends the pass, whoever has it.
    fn run<T: Send>(
        &self,
        partition: &SourcePartition,
        unit: &WorkUnit,
        work: impl Fn(usize, ImageBatch) -> Result<T, WorkError> + Sync,
        mut sink: impl FnMut(T) -> Result<(), Error>,
    ) -> Result<u64, Error> {
        let options = ReadOptions {
            batch_rows: self.batch_size,
            max_image_bytes: self.limits.max_image_bytes,
            only_ids: self.only_ids.clone(),
        };
        let waiting = self.workers * BATCHES_WAITING_PER_WORKER;
        let (batch_sender, batch_receiver) = sync_channel::<(usize, ImageBatch)>(waiting);
        let (result_sender, result_receiver) = sync_channel::<(usize, Result<T, WorkError>)>(waiting);
        let batches = Mutex::new(batch_receiver);
        std::thread::scope(|scope| {
            let reader = scope.spawn(move || {
                let mut number = 0;
                guarded(|| {
                    Ok(self.runtime.block_on(self.source.read_unit(partition, unit, &options, |batch| {
                        let sent = batch_sender.send((number, batch)).is_ok();
                        number += 1;
                        sent
                    }))?)
                })
            });
            for worker in 0..self.workers {
                let (work, batches, results) = (&work, &batches, result_sender.clone());
                scope.spawn(move || work_off(worker, batches, &results, work));
            }
            drop(result_sender);
            let outcome = in_order(&result_receiver, &self.stop, &mut sink);
            // Whoever still waits for room in a queue must learn that nobody takes anything out of it any more.
            drop(result_receiver);
            drop(std::mem::replace(&mut *batches.lock().unwrap_or_else(PoisonError::into_inner), sync_channel(0).1));
            let read = reader
                .join()
                .unwrap_or_else(|panic| Err(WorkError::Fault(PassFault::Panicked(panic_message(&*panic)))));
            outcome.and(read)
        })
        .map_err(|error| match error {
            WorkError::Error(error) => error,
            WorkError::Fault(source) => {
                PassError { partition: partition.values.name(), unit: unit.index, source }.into()
            }
        })
    }
}

fn decode(
    images: &Arc<Vec<Result<Buffer, Reject>>>,
    specs: &[PixelSpec],
    limits: &DecodeLimits,
    sink: impl FnMut(Result<Vec<Pixels>, Reject>),
) -> Result<(), WorkError> {
    decode_batch(images, specs, limits, sink).map_err(|error| WorkError::Fault(error.into()))
}

/// Takes a batch of a partition from bytes to scores, with the sessions of one of the workers. Returns the input tensors too.
fn score_batch(
    worker: usize,
    partition: &str,
    batch: ImageBatch,
    model: &Model,
    limits: &DecodeLimits,
) -> Result<(ScoredBatch, Vec<f32>), WorkError> {
    let num_rows = batch.ids.len();
    let models: Vec<&Model> = std::iter::once(model).chain(model.encoder.as_deref()).collect();
    let room = |model: &&Model| Vec::with_capacity(num_rows * model.contract.input.num_values());
    let mut tensors: Vec<Vec<f32>> = models.iter().map(room).collect();
    let each = models.iter().copied();
    let rows = match batch.cells {
        Cells::Images(images) => {
            let preparations =
                each.map(|model| model.of_images("a source of images")).collect::<Result<Vec<_>, _>>()?;
            rows_of_images(images, &preparations, limits, &mut tensors)?
        }
        Cells::Features(features) => {
            let normalizers = each.map(|model| model.of_features("a source of features"));
            rows_of_features(features, &normalizers.collect::<Result<Vec<_>, _>>()?, &mut tensors)
        }
    };
    let mut scored = ScoredBatch { ids: batch.ids, kept: batch.kept, rows, vectors: BTreeMap::new() };
    let own = std::mem::take(&mut tensors[0]);
    if !own.is_empty() {
        let num_images = own.len() / model.contract.input.num_values();
        let encode = |(encoder, tensors): (&&Model, &Vec<f32>)| {
            encoder.session(worker).run(tensors, num_images, |latents| latents.embedding.to_vec())
        };
        let encoded = models.iter().zip(&tensors).nth(1).map(encode).transpose()?;
        model.session(worker).run(&own, num_images, |latents| {
            let embedding = encoded.as_deref().unwrap_or(latents.embedding);
            scored.fill(&own, Latents { embedding, ..latents }, model, (worker, partition))
        })??;
    }
    Ok((scored, own))
}

/// Decodes images, each once, and appends the input tensors of each of the models to its own of `tensors`.
fn rows_of_images(
    images: Vec<Result<Buffer, Reject>>,
    preparations: &[&ImagePreparation],
    limits: &DecodeLimits,
    tensors: &mut [Vec<f32>],
) -> Result<Vec<ScoredRow>, WorkError> {
    let specs: Vec<PixelSpec> = preparations.iter().map(|preparation| preparation.pixels.clone()).collect();
    let mut rows = Vec::with_capacity(images.len());
    let images = Arc::new(images);
    let mut contents = images.iter().map(|image| image.as_ref().ok().map(content));
    decode(&images, &specs, limits, |pixels| {
        let outcome = pixels.map(|each| {
            for ((preparation, pixels), tensors) in preparations.iter().zip(&each).zip(tensors.iter_mut()) {
                preparation.push_tensor(pixels, tensors);
            }
            // The statistics are those of what the first model sees.
            let image = each.first().zip(preparations.first()).map(|(pixels, preparation)| SeenImage {
                width: pixels.source_width,
                height: pixels.source_height,
                pixel_stats: PixelStats::of(
                    &pixels.data,
                    preparation.pixels.width as usize,
                    &preparation.units_per_level,
                ),
            });
            Outcome { image, scores: Scores::default() }
        });
        rows.push(ScoredRow { content: contents.next().flatten(), outcome });
    })?;
    Ok(rows)
}

/// Appends the input tensors that each of the models makes of features to its own of `tensors`.
fn rows_of_features(
    features: Vec<Result<Tensor, Reject>>,
    normalizers: &[&FeatureNormalizer],
    tensors: &mut [Vec<f32>],
) -> Vec<ScoredRow> {
    let scored_row = |row: Result<Tensor, Reject>| {
        let content = row.as_ref().ok().map(|row| content(&row.bytes));
        let outcome = row.and_then(|row| {
            let lengths: Vec<usize> = tensors.iter().map(Vec::len).collect();
            let mut each = normalizers.iter().zip(tensors.iter_mut());
            let pushed = each.try_for_each(|(normalizer, tensors)| normalizer.push_tensor(&row, tensors));
            if pushed.is_err() {
                // What one model takes and the other does not is in the tensors of neither.
                tensors.iter_mut().zip(lengths).for_each(|(tensors, length)| tensors.truncate(length));
            }
            pushed.map(|()| Outcome { image: None, scores: Scores::default() })
        });
        ScoredRow { content, outcome }
    };
    features.into_iter().map(scored_row).collect()
}

/// Size and hash of what a cell holds.
fn content(bytes: &Buffer) -> (usize, String) {
    (bytes.len(), crate::hash::sha256(bytes))
}

/// Takes batches until there are none, and sends the results; ends when nobody wants them.
fn work_off<T>(
    worker: usize,
    batches: &Mutex<Receiver<(usize, ImageBatch)>>,
    results: &SyncSender<(usize, Result<T, WorkError>)>,
    work: impl Fn(usize, ImageBatch) -> Result<T, WorkError>,
) {
    loop {
        let next = batches.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok((number, batch)) = next else { return };
        if results.send((number, guarded(|| work(worker, batch)))).is_err() {
            return;
        }
    }
}

/// Hands results to the sink by their numbers, so that the order is the source's whichever worker was faster.
fn in_order<T>(
    results: &Receiver<(usize, Result<T, WorkError>)>,
    stop: &Stop,
    sink: &mut impl FnMut(T) -> Result<(), Error>,
) -> Result<(), WorkError> {
    let mut early = BTreeMap::new();
    let mut next = 0;
    loop {
        stop.check()?;
        let (number, result) = match results.recv_timeout(STOP_CHECK_EVERY) {
            Ok(result) => result,
            Err(RecvTimeoutError::Timeout) => continue,
            Err(RecvTimeoutError::Disconnected) => return Ok(()),
        };
        early.insert(number, result?);
        while let Some(result) = early.remove(&next) {
            sink(result)?;
            next += 1;
        }
    }
}

impl ScoredBatch {
    /// Scores the images of the batch that were decoded, and takes over their vectors. An image for which the model gives no finite
    /// numbers is rejected.
    fn fill(
        &mut self,
        tensors: &[f32],
        latents: Latents<'_>,
        model: &Model,
        (worker, partition): (usize, &str),
    ) -> Result<(), ModelError> {
        let likelihood = model.contract.likelihood;
        let mut squared = Vec::new();
        let mut image = 0;
        for (place, row) in self.rows.iter_mut().enumerate() {
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
            let mut scores = score(
                Tensors {
                    input,
                    reconstruction: slice(Role::Reconstruction),
                    mu,
                    logvar,
                    pred_score: slice(Role::PredScore),
                    anomaly_map: slice(Role::AnomalyMap),
                },
                likelihood,
                &mut squared,
            );
            let embedding = slice(Role::Embedding).unwrap_or_default();
            if let (Some(sampler), Some(mu), Some(logvar)) = (&model.elbo, mu, logvar) {
                let seed = row_seed(partition, self.ids.value(place));
                let loss = sampler.expected_loss(worker, seed, input, mu, logvar)?;
                scores.negative_elbo = scores.kl_divergence.map(|kl| loss + kl);
            }
            let finite = [Some(embedding), mu, logvar].into_iter().flatten().flatten().all(|value| value.is_finite())
                && Rule::OF_IMAGE.into_iter().filter_map(|rule| scores.get(rule)).all(f64::is_finite);
            if !finite {
                row.outcome = Err(Reject::NonFiniteOutput);
                continue;
            }
            outcome.scores = scores;
            let has_embedding = model.has_embedding();
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
        Ok(())
    }

    /// The images and their vectors, or why they have none.
    fn into_images(mut self) -> Vec<Result<EmbeddedImage, Reject>> {
        let num_ok = self.rows.iter().filter(|row| row.outcome.is_ok()).count();
        let values = self.vectors.remove(column::EMBEDDING).unwrap_or_default();
        let mut vectors = values.chunks(values.len().checked_div(num_ok).unwrap_or(1).max(1)).map(<[f32]>::to_vec);
        let image = |row: ScoredRow| {
            let image = row.outcome?.image;
            let (num_bytes, content_sha256) = row.content.unwrap_or_default();
            let embedding = vectors.next().unwrap_or_default();
            // Features have no sides; these are cells with images.
            let (width, height) = image.map_or((0, 0), |image| (image.width, image.height));
            Ok(EmbeddedImage { width, height, num_bytes, content_sha256, embedding })
        };
        self.rows.into_iter().map(image).collect()
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

    /// The rows that were decoded, by number, each with its part of the batch's input tensors.
    pub fn inputs<'a>(&'a self, tensors: &'a [f32]) -> impl Iterator<Item = (usize, &'a [f32])> {
        let is_decoded = |row: &ScoredRow| matches!(row.outcome, Ok(_) | Err(Reject::NonFiniteOutput));
        let num_decoded = self.rows.iter().filter(|row| is_decoded(row)).count();
        let num_values = tensors.len().checked_div(num_decoded).unwrap_or(0).max(1);
        let decoded = self.rows.iter().enumerate().filter(move |(_, row)| is_decoded(row));
        decoded.map(|(number, _)| number).zip(tensors.chunks_exact(num_values))
    }

    /// The rows as `latents` has them.
    pub fn to_record_batch(
        &self,
        schema: &SchemaRef,
        run_id: &str,
        model_sha256: &str,
    ) -> Result<RecordBatch, ArrowError> {
        let sides = |side: fn(&SeenImage) -> u32| {
            let image = |row: &ScoredRow| row.outcome.as_ref().ok().and_then(|outcome| outcome.image);
            let side = |row: &ScoredRow| image(row).and_then(|image| i32::try_from(side(&image)).ok());
            self.rows.iter().map(side).collect::<Int32Array>()
        };
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
                            // A cell may have named its image by a presigned URL.
                            .map(|row| {
                                row.outcome.as_ref().err().map(|reject| redact(&reject.to_string()).into_owned())
                            })
                            .collect::<StringArray>(),
                    ),
                    column::WIDTH => Arc::new(sides(|image| image.width)),
                    column::HEIGHT => Arc::new(sides(|image| image.height)),
                    column::IMAGE_BYTES => {
                        let bytes = |row: &ScoredRow| i64::try_from(row.content.as_ref()?.0).ok();
                        Arc::new(self.rows.iter().map(bytes).collect::<Int64Array>())
                    }
                    column::CONTENT_SHA256 => {
                        let hash = |row: &'_ ScoredRow| row.content.as_ref().map(|(_, hash)| hash.clone());
                        Arc::new(self.rows.iter().map(hash).collect::<StringArray>())
                    }
                    name @ (column::EMBEDDING | column::MU | column::LOGVAR) => self.vector_column(name),
                    // Cells are given to the rows of a whole partition at a time, when all are there.
                    column::CELL => new_null_array(field.data_type(), self.rows.len()),
                    column::RUN_ID => Arc::new(StringArray::from(vec![run_id; self.rows.len()])),
                    column::MODEL_SHA256 => Arc::new(StringArray::from(vec![model_sha256; self.rows.len()])),
                    name => match self.number_column(name) {
                        Some(numbers) => Arc::new(numbers),
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

    /// A column of scores or of pixel statistics; `None` where the name is no such column's.
    fn number_column(&self, name: &str) -> Option<Float64Array> {
        let rule = Rule::OF_IMAGE.into_iter().find(|rule| rule.name() == name);
        let stat = PixelStat::ALL.into_iter().find(|stat| stat.name() == name);
        let number = |outcome: &Outcome| match (rule, stat) {
            (Some(rule), _) => outcome.scores.get(rule),
            (None, stat) => stat.zip(outcome.image).map(|(stat, image)| image.pixel_stats.get(stat)),
        };
        (rule.is_some() || stat.is_some())
            .then(|| self.rows.iter().map(|row| row.outcome.as_ref().ok().and_then(number)).collect())
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

#[cfg(test)]
mod tests {
    use arrow::array::BinaryArray;
    use url::Url;

    use super::*;
    use crate::config::Pipeline;
    use crate::error::ExitStatus;
    use crate::source::Selection;
    use crate::store::Stores;

    /// A table of three rows in the partition `ds=1`, in memory.
    fn discover(runtime: &tokio::runtime::Runtime) -> Source {
        let stores = Stores::default();
        let rows = RecordBatch::try_from_iter([
            (column::IMAGE_ID, Arc::new(StringArray::from(vec!["a", "b", "c"])) as ArrayRef),
            ("image", Arc::new(BinaryArray::from_vec(vec![b"no image"; 3]))),
        ])
        .unwrap();
        let mut file = Vec::new();
        let mut writer = parquet::arrow::ArrowWriter::try_new(&mut file, rows.schema(), None).unwrap();
        writer.write(&rows).unwrap();
        writer.close().unwrap();
        let text = "[pipeline]\nname = \"p\"\n[source]\ntable = \"file:///images\"\n[output]\ntable = \"/out\"\n";
        let mut settings = Pipeline::load_str(text, "p.toml", std::path::Path::new("/")).unwrap().source;
        settings.table = Url::parse("memory:///images").unwrap();
        runtime.block_on(async {
            let store = stores.open(&settings.table).unwrap();
            store.put("ds=1/x.parquet", file.into()).await.unwrap();
            Source::discover(&stores, &settings, 32, &Selection::default()).await.unwrap()
        })
    }

    #[test]
    fn a_panic_in_a_worker_is_an_error_that_names_the_unit() {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let source = discover(&runtime);
        let limits = DecodeLimits { max_decode: Duration::from_mins(1), ..DecodeLimits::default() };
        let pass = Pass {
            source: &source,
            limits,
            batch_size: 1,
            workers: 2,
            only_ids: None,
            runtime: runtime.handle().clone(),
            stop: Stop::default(),
        };
        let (partition, unit) = (&source.partitions[0], &source.partitions[0].units[0]);

        let mut num_rows = 0;
        let count = |rows| {
            num_rows += rows;
            Ok(())
        };
        pass.run(partition, unit, |_, batch: ImageBatch| Ok(batch.ids.len()), count).unwrap();
        assert_eq!(num_rows, 3);

        let defect = |_, batch: ImageBatch| {
            assert_ne!(batch.ids.value(0), "b", "a defect of the worker");
            Ok(())
        };
        let error = pass.run(partition, unit, defect, |()| Ok(())).unwrap_err();
        assert_eq!(error.to_string(), "cannot process unit 0 of ds=1");
        let cause = std::error::Error::source(&error).unwrap().to_string();
        assert!(cause.starts_with("a worker panicked: ") && cause.contains("a defect of the worker"), "{cause}");
        assert_eq!(error.exit_status(), ExitStatus::Unexpected);
    }
}
