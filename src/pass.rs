//! The pass over the images: decode, preprocess, infer, score. Its rows become `latents`; `fit` and `calibrate` use it too.
//! Features take the same way, without the first step.
//!
//! One thread reads ahead, as many workers as cores each take a whole batch from bytes to scores, and the caller receives the
//! scored batches in the order of the source. A worker decodes its images and runs a one-thread session by turns, so there is a busy thread for
//! each core, and none that is handed work by another. Units follow each other without a pause: while the last batches of one are worked on,
//! the next is read.
//!
//! What is under way is bounded by number and by bytes, from where a batch is read until the caller is done with it: memory holds a few
//! batches a worker, however large the table is, and the images of a batch however large these are. Workers keep their buffers from batch to
//! batch.
//!
//! A thread that panics is an error of the pass that names the unit, as is a batch that cannot be decoded to its end; what an image
//! is to blame for is a [`Reject`] of its row. Errors come in the order of the source too: what was read before is handed out first.

mod crew;

use std::collections::{BTreeMap, HashSet};
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use arrow::array::{
    Array, ArrayRef, AsArray as _, Float32Builder, Float64Array, Int32Array, Int64Array, ListBuilder, RecordBatch,
    StringArray, new_null_array,
};
use arrow::buffer::Buffer;
use arrow::compute::{concat, concat_batches};
use arrow::datatypes::{DataType, Field, SchemaRef};
use arrow::error::ArrowError;

pub use self::crew::{BatchError, MAX_ABANDONED};
use self::crew::{Crew, Decoding, Next, Order, Started};
use crate::caught::{caught, panic_message};
use crate::config::DEFAULT_BATCH_SIZE;
use crate::decode::{DecodeLimits, DecodeMode, DecodedBatch, PixelSpec, Pixels, Reject};
use crate::error::Error;
use crate::features::{FeatureNormalizer, Tensor};
use crate::hash::{Digest, hex};
use crate::model::{ImagePreparation, Latents, Model, ModelError, Role};
use crate::pixel_stats::{PixelStat, PixelStats};
use crate::redact::redact;
use crate::schema::{STATUS_OK, column};
use crate::score::elbo::row_seed;
use crate::score::{Rule, Scores, Tensors, score};
use crate::source::{Cells, ImageBatch, Read, ReadOptions, Slice, Source, SourcePartition, WorkUnit};
use crate::stop::Stop;

/// Bytes of the input tensors of an inference call on a CPU, where no batch size is asked for: with more, a network's activations leave the
/// caches. EfficientNet-Lite0 takes a third longer for an image of 224 x 224 in a batch of 32 than alone, and four times the memory; what a
/// call takes besides is felt by networks of small inputs, which get more of them.
const CPU_BATCH_BYTES: usize = 256 << 10;

/// Bytes of the input tensors of the rows that a worker is given at a time, and how many rows these are at least, however few go into an
/// inference call. What a turn takes besides is divided by them, threads that are woken above all; and at the end of a table a worker waits for
/// the others for half a turn.
const TURN_BYTES: usize = 512 << 10;
const MIN_TURN_ROWS: usize = 8;

/// Batches under way for each worker: the one it works on, and those that keep the workers busy while the reader waits for a store, or the
/// caller for a commit. More of them hold the blocks of a file that their images are parts of, and new ones are fetched meanwhile.
const BATCHES_PER_WORKER: usize = 3;

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
    // The pass ends.
    caught(work).unwrap_or_else(|said| Err(WorkError::Fault(PassFault::Panicked(said))))
}

/// How a pass runs.
#[derive(Debug, Clone)]
pub struct Pass<'a> {
    /// The table.
    pub source: &'a Source,
    /// What an image may cost.
    pub limits: DecodeLimits,
    /// How closely pixels follow those of the model's training.
    pub decode: DecodeMode,
    /// Images in an inference call; `None`: as many as suit the model.
    pub batch_size: Option<NonZeroUsize>,
    /// Threads.
    pub workers: usize,
    /// Bytes of what is under way, images and tensors, beyond which nothing more is read. A single batch may have more.
    pub max_bytes: u64,
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

/// Decodes and embeds one batch of images as a pass does it, in a thread of its own.
pub fn embed_images(
    batch: ImageBatch,
    model: &Arc<Model>,
    limits: &DecodeLimits,
) -> Result<Vec<Result<EmbeddedImage, Reject>>, Error> {
    let failed = |source| PassError { partition: "the images named".to_owned(), unit: 0, source };
    let decoding = Decoding::new(model.pixel_specs(), DecodeMode::Exact, *limits);
    let score = scoring(model, batch_size_for(model));
    let task = Task { place: 0, slice: 0, partition: Arc::from(""), batch, permit: None };
    let Started { mut crew, orders, results } = start(1, decoding, score).map_err(|error| failed(error.into()))?;
    // The worker ends after it, or has ended already, which is found out below.
    drop(orders.send(task.into_order(true)));
    drop((orders, results));
    let mut images = Vec::new();
    let take = &mut |_, passed| {
        if let Passed::Batch(scored) = passed {
            images = ScoredBatch::into_images(scored);
        }
        Ok(())
    };
    let outcome = in_order(&mut crew, &Stop::default(), take);
    crew.end();
    match outcome {
        Ok(()) => Ok(images),
        Err((_, WorkError::Error(error))) => Err(error),
        Err((_, WorkError::Fault(fault))) => Err(failed(fault).into()),
    }
}

/// What comes of a pass over slices.
#[derive(Debug)]
pub enum Passed<T> {
    /// What was made of a batch.
    Batch(T),
    /// All batches of the slice have been handed out.
    End {
        /// Rows that the source gave, counted where they are read.
        num_rows: u64,
    },
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
    content: Option<(usize, Digest)>,
    outcome: Result<Made, Reject>,
}

/// What was made of a row.
#[derive(Debug, Clone, Copy)]
struct Made {
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
        self.run_unit(partition, unit, self.sizes(0), Vec::new(), |_, given| Ok(given.batch), sink)
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
    pub fn map_unit<T: Send + 'static>(
        &self,
        partition: &SourcePartition,
        unit: &WorkUnit,
        spec: &PixelSpec,
        work: impl Fn(usize, PixelBatch) -> Result<T, Error> + Send + Sync + 'static,
        sink: impl FnMut(T) -> Result<(), Error>,
    ) -> Result<u64, Error> {
        let work = move |worker: &mut Worker, given: Given<'_>| Ok(work(worker.number, given.into_pixels()?)?);
        self.run_unit(partition, unit, self.sizes(spec.num_samples()), vec![spec.clone()], work, sink)
    }

    /// Decodes, infers and scores all rows of a unit and hands them to `sink` in order. Returns how many the source gave, counted
    /// where they are read.
    pub fn score_unit(
        &self,
        partition: &SourcePartition,
        unit: &WorkUnit,
        model: &Arc<Model>,
        sink: impl FnMut(ScoredBatch) -> Result<(), Error>,
    ) -> Result<u64, Error> {
        let work = scoring(model, self.batch_size(model));
        self.run_unit(partition, unit, self.sizes_for(model), model.pixel_specs(), work, sink)
    }

    /// The same, and hands out the input tensors beside the rows, which takes memory for those of all batches under way. See
    /// [`ScoredBatch::inputs`].
    pub fn score_unit_with_tensors(
        &self,
        partition: &SourcePartition,
        unit: &WorkUnit,
        model: &Arc<Model>,
        mut sink: impl FnMut(ScoredBatch, Vec<f32>) -> Result<(), Error>,
    ) -> Result<u64, Error> {
        let score = scoring(model, self.batch_size(model));
        let work = move |worker: &mut Worker, given: Given<'_>| {
            let scored = score(worker, given)?;
            Ok((scored, worker.tensors[0].clone()))
        };
        let sink = |(scored, tensors)| sink(scored, tensors);
        self.run_unit(partition, unit, self.sizes_for(model), model.pixel_specs(), work, sink)
    }

    /// Decodes, infers and scores all rows of slices, which may be of several partitions, and hands them to `sink` in order, with the
    /// numbers of their slices.
    pub fn score(
        &self,
        slices: &[Slice<'_>],
        model: &Arc<Model>,
        sink: impl FnMut(usize, Passed<ScoredBatch>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let work = scoring(model, self.batch_size(model));
        self.run(slices, self.sizes_for(model), model.pixel_specs(), work, sink)
    }

    /// Of batches that go through no model.
    fn sizes(&self, row_bytes: usize) -> Sizes {
        let batch_rows = self.batch_size.unwrap_or(DEFAULT_BATCH_SIZE).get();
        Sizes { batch_rows, row_bytes }
    }

    /// Images in an inference call.
    fn batch_size(&self, model: &Model) -> usize {
        self.batch_size.map_or_else(|| batch_size_for(model), NonZeroUsize::get)
    }

    /// Of batches that go through a model, and through the encoder beside it.
    fn sizes_for(&self, model: &Model) -> Sizes {
        let num_values: usize = model.with_encoder().map(|model| model.contract.input.num_values()).sum();
        let batch_size = self.batch_size(model);
        let turn_rows = rows_of(TURN_BYTES, num_values).max(MIN_TURN_ROWS);
        Sizes {
            // Whole calls.
            batch_rows: turn_rows.div_ceil(batch_size) * batch_size,
            // Samples, and the values of input tensors.
            row_bytes: num_values * (size_of::<u8>() + size_of::<f32>()),
        }
    }

    fn run_unit<T: Send + 'static>(
        &self,
        partition: &SourcePartition,
        unit: &WorkUnit,
        sizes: Sizes,
        specs: Vec<PixelSpec>,
        work: impl Fn(&mut Worker, Given<'_>) -> Result<T, WorkError> + Send + Sync + 'static,
        mut sink: impl FnMut(T) -> Result<(), Error>,
    ) -> Result<u64, Error> {
        let slice = Slice { partition, unit, only_ids: self.only_ids.clone() };
        let mut num_read = 0;
        let take = |_, passed| match passed {
            Passed::Batch(batch) => sink(batch),
            Passed::End { num_rows } => {
                num_read += num_rows;
                Ok(())
            }
        };
        self.run(&[slice], sizes, specs, work, take)?;
        Ok(num_read)
    }

    /// Decodes the images of all batches of slices to pixels of some specs, runs `work` on them, on all workers, and hands the results to
    /// `sink` in the order of the rows.
    ///
    /// The only place that spawns threads for the images of a table.
    fn run<T: Send + 'static>(
        &self,
        slices: &[Slice<'_>],
        Sizes { batch_rows, row_bytes }: Sizes,
        specs: Vec<PixelSpec>,
        work: impl Fn(&mut Worker, Given<'_>) -> Result<T, WorkError> + Send + Sync + 'static,
        mut sink: impl FnMut(usize, Passed<T>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let told = |(slice, error): (usize, WorkError)| match error {
            WorkError::Error(error) => error,
            WorkError::Fault(source) => {
                let slice = slices.get(slice);
                let partition = slice.map(|slice| slice.partition.values.name()).unwrap_or_default();
                PassError { partition, unit: slice.map_or(0, |slice| slice.unit.index), source }.into()
            }
        };
        let options = ReadOptions { batch_rows, max_image_bytes: self.limits.max_image_bytes };
        let gate = Gate::new(self.workers * BATCHES_PER_WORKER, self.max_bytes);
        let decoding = Decoding::new(specs, self.decode, self.limits);
        let decodes = !decoding.specs.is_empty();
        let Started { mut crew, orders, results } =
            start(self.workers, decoding, work).map_err(|error| told((0, WorkError::Fault(error.into()))))?;
        // Of the slice that is being read.
        let reading = AtomicUsize::new(0);
        let outcome = std::thread::scope(|scope| {
            let (gate, reading) = (&gate, &reading);
            let reader = scope.spawn(move || {
                let names = slices.iter().map(|slice| slice.partition.values.to_string().into());
                let names: Vec<Arc<str>> = names.collect();
                let mut place = 0..;
                let emit = |slice: usize, read: Read| {
                    reading.store(slice, Ordering::Relaxed);
                    let place = place.next().unwrap_or(usize::MAX);
                    match read {
                        Read::Rows(batch) => {
                            let num_bytes = batch.num_bytes() + (batch.ids.len() * row_bytes) as u64;
                            let Some(permit) = gate.enter(num_bytes) else { return false };
                            let (partition, permit) = (Arc::clone(&names[slice]), Some(permit));
                            orders.send(Task { place, slice, partition, batch, permit }.into_order(decodes)).is_ok()
                        }
                        Read::End { num_rows } => {
                            let result = Ok((Passed::End { num_rows }, None));
                            results.send(Numbered { place, slice, result }).is_ok()
                        }
                    }
                };
                guarded(|| Ok(self.runtime.block_on(self.source.read(slices, &options, emit))?))
            });
            let outcome = in_order(&mut crew, &self.stop, &mut sink);
            // The reader may wait for room that nobody needs any more.
            gate.close();
            let read = reader
                .join()
                .unwrap_or_else(|panic| Err(WorkError::Fault(PassFault::Panicked(panic_message(&*panic)))));
            let read = read.map_err(|error| (reading.load(Ordering::Relaxed), error));
            outcome.and(read)
        });
        crew.end();
        outcome.map_err(told)
    }
}

/// A batch on its way to a worker, but for its images.
struct Task {
    /// Its place among all that is read.
    place: usize,
    /// Number of its slice.
    slice: usize,
    /// Its partition.
    partition: Arc<str>,
    batch: ImageBatch,
    permit: Option<Permit>,
}

impl Task {
    /// With its images taken out, if these are to be decoded.
    fn into_order(mut self, decodes: bool) -> Order<Buffer, Self> {
        let images = match &mut self.batch.cells {
            Cells::Images(images) if decodes => std::mem::take(images),
            Cells::Images(_) | Cells::Features(_) => Vec::new(),
        };
        Order::new(Arc::new(images), self)
    }
}

/// What a worker is given.
struct Given<'a> {
    partition: &'a str,
    /// Without the images that were decoded.
    batch: ImageBatch,
    images: &'a [Result<Buffer, Reject>],
    pixels: &'a DecodedBatch,
}

/// Workers that decode and work.
fn start<T: Send + 'static>(
    count: usize,
    decoding: Decoding,
    work: impl Fn(&mut Worker, Given<'_>) -> Result<T, WorkError> + Send + Sync + 'static,
) -> Result<Started<Buffer, Task, Numbered<Outcome<T>>>, BatchError> {
    let work = Arc::new(work);
    Crew::start(count, decoding, move |number| {
        let (work, mut worker) = (Arc::clone(&work), Worker::new(number));
        Box::new(move |images, decoded, Task { place, slice, partition, batch, permit }| {
            let made = guarded(|| {
                let pixels = decoded.map_err(|error| WorkError::Fault(error.into()))?;
                work(&mut worker, Given { partition: &partition, batch, images, pixels })
            });
            Numbered { place, slice, result: made.map(|made| (Passed::Batch(made), permit)) }
        })
    })
}

/// Takes batches to scores, with up to `batch_size` rows in an inference call.
fn scoring(
    model: &Arc<Model>,
    batch_size: usize,
) -> impl Fn(&mut Worker, Given<'_>) -> Result<ScoredBatch, WorkError> + Send + Sync + 'static {
    let model = Arc::clone(model);
    move |worker, given| worker.score(given, &model, batch_size)
}

/// Rows of a batch, and the bytes that a worker makes of each.
#[derive(Debug, Clone, Copy)]
struct Sizes {
    batch_rows: usize,
    row_bytes: usize,
}

/// Images in an inference call, where the number is not set.
pub fn batch_size_for(model: &Model) -> usize {
    if model.provider.is_gpu() {
        return DEFAULT_BATCH_SIZE.get();
    }
    let num_values = model.with_encoder().map(|model| model.contract.input.num_values());
    rows_of(CPU_BATCH_BYTES, num_values.max().unwrap_or_default())
}

/// Rows of so many values whose input tensors have so many bytes together: one at least, and as many as a batch has by default at most.
fn rows_of(num_bytes: usize, num_values: usize) -> usize {
    let most = DEFAULT_BATCH_SIZE.get();
    num_bytes.checked_div(num_values * size_of::<f32>()).unwrap_or(most).clamp(1, most)
}

/// What comes of a batch, or of the end of a slice, with its place among all.
struct Numbered<T> {
    place: usize,
    slice: usize,
    result: Result<T, WorkError>,
}

/// With the permit of the batch, which is given back when the caller is done with it.
type Outcome<T> = (Passed<T>, Option<Permit>);

/// Bounds what is under way.
struct Gate {
    max_batches: usize,
    max_bytes: u64,
    inside: Mutex<Inside>,
    left: Condvar,
}

#[derive(Default)]
struct Inside {
    batches: usize,
    bytes: u64,
    is_closed: bool,
}

/// The right of a batch to be under way.
struct Permit {
    gate: Arc<Gate>,
    bytes: u64,
}

impl Gate {
    fn new(max_batches: usize, max_bytes: u64) -> Arc<Self> {
        Arc::new(Self { max_batches, max_bytes, inside: Mutex::default(), left: Condvar::new() })
    }

    /// Waits for room for a batch; `None` when the gate is closed. There is always room for one.
    fn enter(self: &Arc<Self>, bytes: u64) -> Option<Permit> {
        let inside = self.inside.lock().unwrap_or_else(PoisonError::into_inner);
        let is_full = |inside: &mut Inside| {
            let is_beyond = inside.batches >= self.max_batches || inside.bytes.saturating_add(bytes) > self.max_bytes;
            !inside.is_closed && inside.batches > 0 && is_beyond
        };
        let mut inside = self.left.wait_while(inside, is_full).unwrap_or_else(PoisonError::into_inner);
        if inside.is_closed {
            return None;
        }
        inside.batches += 1;
        inside.bytes = inside.bytes.saturating_add(bytes);
        Some(Permit { gate: Arc::clone(self), bytes })
    }

    fn close(&self) {
        self.inside.lock().unwrap_or_else(PoisonError::into_inner).is_closed = true;
        self.left.notify_all();
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut inside = self.gate.inside.lock().unwrap_or_else(PoisonError::into_inner);
        inside.batches -= 1;
        inside.bytes -= self.bytes;
        self.gate.left.notify_all();
    }
}

impl Given<'_> {
    /// The images with their pixels.
    fn into_pixels(self) -> Result<PixelBatch, WorkError> {
        if !matches!(self.batch.cells, Cells::Images(_)) {
            return Err(WorkError::Fault(PassFault::OtherInput));
        }
        let pixels = self.pixels.images().map(|image| match image {
            Ok(image) => Ok(Pixels {
                data: image.samples(0).to_vec(),
                source_width: image.size.width,
                source_height: image.size.height,
            }),
            Err(reject) => Err(reject.clone()),
        });
        let images = self.images.iter().map(|image| image.as_ref().ok().cloned()).collect();
        Ok(PixelBatch { ids: self.batch.ids, images, pixels: pixels.collect() })
    }
}

/// What a thread of a pass keeps from batch to batch.
struct Worker {
    number: usize,
    /// The input tensors of a batch, for each model.
    tensors: Vec<Vec<f32>>,
    /// The squared errors of an image.
    squared: Vec<f32>,
}

impl Worker {
    fn new(number: usize) -> Self {
        Self { number, tensors: Vec::new(), squared: Vec::new() }
    }

    /// Takes a batch from pixels to scores, with up to `batch_size` rows in an inference call. The input tensors stay in the worker until the
    /// next one.
    fn score(&mut self, given: Given<'_>, model: &Model, batch_size: usize) -> Result<ScoredBatch, WorkError> {
        let Given { partition, batch, images, pixels } = given;
        let models: Vec<&Model> = model.with_encoder().collect();
        self.tensors.resize_with(models.len(), Vec::new);
        for (tensors, model) in self.tensors.iter_mut().zip(&models) {
            tensors.clear();
            tensors.reserve_exact(batch.ids.len() * model.contract.input.num_values());
        }
        let each = models.iter().copied();
        let rows = match batch.cells {
            Cells::Images(_) => {
                let preparations = each.map(|model| model.of_images("a source of images"));
                self.rows_of_images(images, pixels, &preparations.collect::<Result<Vec<_>, _>>()?)
            }
            Cells::Features(features) => {
                let normalizers = each.map(|model| model.of_features("a source of features"));
                rows_of_features(features, &normalizers.collect::<Result<Vec<_>, _>>()?, &mut self.tensors)
            }
        };
        let mut scored = ScoredBatch { ids: batch.ids, kept: batch.kept, rows, vectors: BTreeMap::new() };
        let Self { number, tensors, squared, .. } = self;
        let with_tensors: Vec<usize> =
            scored.rows.iter().enumerate().filter(|(_, row)| row.outcome.is_ok()).map(|(place, _)| place).collect();
        let mut done = 0;
        for places in with_tensors.chunks(batch_size) {
            let rows = done..done + places.len();
            done = rows.end;
            let input = |model: usize| {
                let values = models[model].contract.input.num_values();
                &tensors[model][rows.start * values..rows.end * values]
            };
            let encode = |encoder: &&Model| {
                encoder.session(*number).run(input(1), rows.len(), |latents| latents.embedding.to_vec())
            };
            let encoded = models.get(1).map(encode).transpose()?;
            model.session(*number).run(input(0), rows.len(), |latents| {
                let embedding = encoded.as_deref().unwrap_or(latents.embedding);
                let latents = Latents { embedding, ..latents };
                scored.fill(places, input(0), latents, model, (*number, partition), squared)
            })??;
        }
        Ok(scored)
    }

    /// Fills the input tensors of each of the models with decoded images.
    fn rows_of_images(
        &mut self,
        images: &[Result<Buffer, Reject>],
        pixels: &DecodedBatch,
        preparations: &[&ImagePreparation],
    ) -> Vec<ScoredRow> {
        let row = |(image, bytes): (Result<_, &Reject>, &Result<Buffer, Reject>)| {
            let outcome = image.map_err(Clone::clone).map(|image: crate::decode::DecodedImage<'_>| {
                for (model, (preparation, tensors)) in preparations.iter().zip(&mut self.tensors).enumerate() {
                    preparation.push_tensor(image.samples(model), tensors);
                }
                // The statistics are those of what the first model sees.
                let image = preparations.first().map(|preparation| SeenImage {
                    width: image.size.width,
                    height: image.size.height,
                    pixel_stats: PixelStats::of(
                        image.samples(0),
                        preparation.pixels.width as usize,
                        &preparation.units_per_level,
                    ),
                });
                Made { image, scores: Scores::default() }
            });
            ScoredRow { content: bytes.as_ref().ok().map(content), outcome }
        };
        pixels.images().zip(images.iter()).map(row).collect()
    }
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
            pushed.map(|()| Made { image: None, scores: Scores::default() })
        });
        ScoredRow { content, outcome }
    };
    features.into_iter().map(scored_row).collect()
}

/// Size and hash of what a cell holds.
fn content(bytes: &Buffer) -> (usize, Digest) {
    (bytes.len(), crate::hash::digest(bytes))
}

/// Hands results to the sink by their places, so that the order is the source's whichever worker was faster. An error comes with the number
/// of the slice that has it.
fn in_order<T: Send + 'static>(
    crew: &mut Crew<Buffer, Task, Numbered<Outcome<T>>>,
    stop: &Stop,
    sink: &mut impl FnMut(usize, Passed<T>) -> Result<(), Error>,
) -> Result<(), (usize, WorkError)> {
    let mut early = BTreeMap::new();
    let (mut next, mut at) = (0, 0);
    loop {
        stop.check().map_err(|error| (at, error.into()))?;
        let numbered = match crew.next(STOP_CHECK_EVERY) {
            Ok(Next::Made(numbered)) => numbered,
            Ok(Next::NotYet) => continue,
            Ok(Next::Ended) => return Ok(()),
            Err(error) => return Err((at, WorkError::Fault(error.into()))),
        };
        early.insert(numbered.place, numbered);
        while let Some(Numbered { slice, result, .. }) = early.remove(&next) {
            at = slice;
            let (passed, permit) = result.map_err(|error| (slice, error))?;
            sink(slice, passed).map_err(|error| (slice, error.into()))?;
            drop(permit);
            next += 1;
        }
    }
}

impl ScoredBatch {
    /// Scores the images at some places, which went through the model together, and takes over their vectors. An image for which the model
    /// gives no finite numbers is rejected.
    fn fill(
        &mut self,
        places: &[usize],
        tensors: &[f32],
        latents: Latents<'_>,
        model: &Model,
        (worker, partition): (usize, &str),
        squared: &mut Vec<f32>,
    ) -> Result<(), ModelError> {
        let likelihood = model.contract.likelihood;
        for (number, place) in places.iter().copied().enumerate() {
            let row = &mut self.rows[place];
            let Ok(outcome) = &mut row.outcome else { continue };
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
                squared,
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
            let (num_bytes, content_sha256) =
                row.content.map(|(size, digest)| (size, hex(&digest))).unwrap_or_default();
            let embedding = vectors.next().unwrap_or_default();
            // Features have no sides; these are cells with images.
            let (width, height) = image.map_or((0, 0), |image| (image.width, image.height));
            Ok(EmbeddedImage { width, height, num_bytes, content_sha256, embedding })
        };
        self.rows.into_iter().map(image).collect()
    }

    /// The rows of batches of one slice, one after the other.
    pub fn concat(batches: Vec<Self>) -> Result<Self, ArrowError> {
        let Some(first) = batches.first() else { return Err(ArrowError::InvalidArgumentError("no rows".to_owned())) };
        let ids: Vec<&dyn Array> = batches.iter().map(|batch| &batch.ids as &dyn Array).collect();
        let ids = concat(&ids)?.as_string::<i32>().clone();
        let kept = concat_batches(&first.kept.schema(), batches.iter().map(|batch| &batch.kept))?;
        let mut all = Self { ids, kept, rows: Vec::new(), vectors: BTreeMap::new() };
        for batch in batches {
            all.rows.extend(batch.rows);
            for (name, values) in batch.vectors {
                all.vectors.entry(name).or_default().extend(values);
            }
        }
        Ok(all)
    }

    /// Number of rows.
    pub fn num_rows(&self) -> usize {
        self.rows.len()
    }

    /// Bytes of the vectors and of the kept columns.
    pub fn num_bytes(&self) -> usize {
        let vectors = self.vectors.values().map(|values| size_of_val(values.as_slice()));
        vectors.sum::<usize>() + self.kept.get_array_memory_size()
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
                        let hash = |row: &ScoredRow| row.content.as_ref().map(|(_, digest)| hex(digest));
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
        let number = |outcome: &Made| match (rule, stat) {
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
    use crate::schema::{TableName, data_schema};
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
            decode: DecodeMode::Exact,
            batch_size: Some(NonZeroUsize::MIN),
            workers: 2,
            max_bytes: u64::MAX,
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
        pass.run_unit(partition, unit, pass.sizes(0), Vec::new(), |_, given| Ok(given.batch.ids.len()), count).unwrap();
        assert_eq!(num_rows, 3);

        let defect = |_: &mut Worker, given: Given<'_>| {
            assert_ne!(given.batch.ids.value(0), "b", "a defect of the worker");
            Ok(())
        };
        let error = pass.run_unit(partition, unit, pass.sizes(0), Vec::new(), defect, |()| Ok(())).unwrap_err();
        assert_eq!(error.to_string(), "cannot process unit 0 of ds=1");
        let cause = std::error::Error::source(&error).unwrap().to_string();
        assert!(cause.starts_with("a worker panicked: ") && cause.contains("a defect of the worker"), "{cause}");
        assert_eq!(error.exit_status(), ExitStatus::Unexpected);
    }

    #[test]
    fn rows_put_together_are_those_of_their_batches() {
        let kept_schema: SchemaRef =
            Arc::new(arrow::datatypes::Schema::new(vec![Field::new("label", DataType::Utf8, true)]));
        let batch = |names: &[&str], vectors: &[f32], outcomes: &[bool]| {
            let names = StringArray::from(names.to_vec());
            let made =
                Made { image: None, scores: Scores { kl_divergence: Some(vectors.len() as f64), ..Scores::default() } };
            let row = |is_ok: &bool| ScoredRow {
                content: is_ok.then_some((7, [9; 32])),
                outcome: if *is_ok { Ok(made) } else { Err(Reject::NonFiniteOutput) },
            };
            ScoredBatch {
                kept: RecordBatch::try_new(Arc::clone(&kept_schema), vec![Arc::new(names.clone())]).unwrap(),
                ids: names,
                rows: outcomes.iter().map(row).collect(),
                vectors: BTreeMap::from([(column::EMBEDDING, vectors.to_vec())]),
            }
        };
        // The last one has no vector at all.
        let batches = || {
            vec![
                batch(&["a", "b"], &[1.0, 2.0], &[false, true]),
                batch(&["c", "d", "e"], &[3.0, 4.0, 5.0, 6.0], &[true, false, true]),
                ScoredBatch { vectors: BTreeMap::new(), ..batch(&["f"], &[], &[false]) },
            ]
        };
        let schema = data_schema(TableName::Latents, &kept_schema);
        let rows = |batch: &ScoredBatch| batch.to_record_batch(&schema, "run", "model").unwrap();
        let together = ScoredBatch::concat(batches()).unwrap();
        assert_eq!(together.num_rows(), 6);
        assert_eq!(together.num_bytes(), 6 * size_of::<f32>() + together.kept.get_array_memory_size());
        assert_eq!(rows(&together), concat_batches(&schema, &batches().iter().map(rows).collect::<Vec<_>>()).unwrap());
    }

    #[test]
    fn what_is_under_way_is_bounded_by_number_and_by_bytes_and_one_is_always_let_in() {
        let gate = Gate::new(3, 100);
        // Larger than allowed, and alone.
        let large = gate.enter(1000).unwrap();
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| gate.enter(60).map(|permit| permit.bytes));
            drop(large);
            assert_eq!(waits.join().unwrap(), Some(60));
        });
        let (first, second) = (gate.enter(60).unwrap(), gate.enter(40).unwrap());
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| gate.enter(1).is_some());
            std::thread::sleep(Duration::from_millis(20));
            assert!(!waits.is_finished(), "there are 100 bytes under way");
            drop(first);
            assert!(waits.join().unwrap());
        });
        let others = (gate.enter(1).unwrap(), gate.enter(1).unwrap());
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| gate.enter(0).is_some());
            std::thread::sleep(Duration::from_millis(20));
            assert!(!waits.is_finished(), "there are three batches under way");
            gate.close();
            assert!(!waits.join().unwrap(), "the gate is closed");
        });
        drop((second, others));
    }
}
