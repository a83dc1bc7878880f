//! `bench`: how fast a model runs here, by which settings, and what decoding costs beside it.
//!
//! Decoding alone and the network alone, each on all cores, bound what a run can do: the floor of its time is the sum of both. What a run
//! takes beyond it is this program's.

use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use bytes::Bytes;
use serde_json::json;

use super::load_pipeline;
use crate::config::{DEFAULT_BATCH_SIZE, Device, MAX_BATCH_SIZE, MAX_WORKERS, Overrides, Pipeline};
use crate::context::Context;
use crate::decode::{DecodeLimits, DecodeMode, Decoder, PixelSpec};
use crate::error::{Error, ExitStatus};
use crate::model::{self, Compute, Model, ModelError, Preparation, Runtime};
use crate::pass::batch_size_for;
use crate::report::align;
use crate::source::{Cells, ReadOptions, Selection, Source};
use crate::stages::packages::Packages;
use crate::store::Store;

/// Images in an inference call that are tried.
const BATCH_SIZES: [usize; 7] = [1, 2, 4, 8, 16, 32, 64];

/// Bytes of the input of a call at most, beyond the first image.
const MAX_INPUT_BYTES: usize = 32 << 20;

/// Rows of the source that are measured at most.
const NUM_ROWS: usize = 4096;

/// Bytes of them, beyond which there are no more: so many are in no cache when their turn comes again, as those of a table never are.
const MAX_BYTES: usize = 128 << 20;

/// How long each setting is tried.
const TRIAL: Duration = Duration::from_millis(600);

/// Settings that are measured anew, those of the workers and threads of the fastest alone: what made one the fastest of many was luck too.
const FINALISTS: usize = 3;

/// How often they, and decoding, are measured in the end, by turns. A machine is not equally fast at all times, and a run meets
/// its slow moments as it meets the others: it is the mean of all rounds that bounds it.
const ROUNDS: usize = 5;

/// A file name that ends so is a pipeline's; all else is where a model package is.
const PIPELINE_ENDING: &str = "toml";

/// Workers, and threads of ONNX Runtime for each, and images in a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Setting {
    workers: usize,
    threads: usize,
    batch_size: usize,
}

/// What is measured.
struct Subject {
    name: String,
    networks: Networks,
    decode: DecodeMode,
    /// Images, or features, as the source has them.
    contents: Vec<Bytes>,
}

/// Where the networks are named.
enum Networks {
    Pipeline(Box<(Pipeline, Packages)>),
    Package(Store, Device),
}

/// How many workers, and threads for each.
type Layout = (usize, usize);

/// Tries a model with different settings, and prints what comes of it, with the lines for the pipeline file.
pub fn bench(context: &Context, target: &str, overrides: &Overrides, as_json: bool) -> Result<ExitStatus, Error> {
    let runtime = Runtime::load(context.onnxruntime.as_deref())?;
    let workers = given("--workers", overrides.workers, MAX_WORKERS)?;
    let batch_size = given("--batch-size", overrides.batch_size, MAX_BATCH_SIZE)?;
    let subject = Subject::find(context, target, overrides)?;
    let cores = context.cores();
    let load = |layout: Layout| Ok::<_, Error>((layout, subject.load(context, &runtime, layout)?));
    // The sessions of one layout at a time, for those of a large model fill the memory.
    let at = |layout: Layout, loaded: (Layout, Model)| {
        if loaded.0 == layout {
            return Ok(loaded);
        }
        drop(loaded);
        load(layout)
    };
    let first = workers.unwrap_or(cores);
    let mut loaded = load((first, threads_beside(cores, first)))?;
    let (provider, default_batch_size) = (loaded.1.provider, batch_size_for(&loaded.1));
    let batch_sizes = batch_size.map_or_else(|| batch_sizes(&loaded.1), |batch_size| vec![batch_size]);
    let tensors = subject.tensors(&loaded.1, batch_sizes.iter().copied().max().unwrap_or(1))?;
    let mut tried: Vec<(Setting, f64)> = Vec::new();
    for layout in layouts(cores, provider.is_gpu(), workers) {
        loaded = at(layout, loaded)?;
        let (workers, threads) = layout;
        for batch_size in &batch_sizes {
            context.stop.check()?;
            let setting = Setting { workers, threads, batch_size: *batch_size };
            tried.push((setting, infer_rate(&loaded.1, &tensors, setting)?));
        }
    }
    let Some((fastest, _)) = tried.iter().copied().max_by(|a, b| a.1.total_cmp(&b.1)) else {
        return Ok(ExitStatus::Success);
    };
    let (_, model) = at((fastest.workers, fastest.threads), loaded)?;
    let mut finalists: Vec<(Setting, f64)> = tried
        .iter()
        .filter(|(setting, _)| (setting.workers, setting.threads) == (fastest.workers, fastest.threads))
        .copied()
        .collect();
    finalists.sort_by(|a, b| b.1.total_cmp(&a.1));
    finalists.truncate(FINALISTS);
    let mut infer = vec![Vec::new(); finalists.len()];
    let mut decode = Vec::new();
    for _ in 0..ROUNDS {
        decode.push(subject.decode_rate(&model, cores)?);
        for ((setting, _), rates) in finalists.iter().zip(&mut infer) {
            context.stop.check()?;
            rates.push(infer_rate(&model, &tensors, *setting)?);
        }
    }
    let measured = finalists.iter().zip(&infer).map(|((setting, _), rates)| (*setting, mean(rates)));
    let (fastest, infer) = measured.max_by(|a, b| a.1.total_cmp(&b.1)).unwrap_or((fastest, f64::NAN));
    let decode = mean(&decode);
    let floor = 1.0 / (1.0 / decode + 1.0 / infer);
    if as_json {
        let row = |(setting, rate): &(Setting, f64)| json!({"workers": setting.workers, "threads": setting.threads, "batch_size": setting.batch_size, "images_per_sec": rate});
        let line = json!({
            "model": subject.name,
            "provider": provider.name(),
            "runtime": runtime.version,
            "cores": cores,
            "decode": subject.decode.name(),
            "default_batch_size": default_batch_size,
            "sweep": tried.iter().map(row).collect::<Vec<_>>(),
            "fastest": row(&(fastest, infer)),
            "decode_images_per_sec": decode,
            "infer_images_per_sec": infer,
            "floor_images_per_sec": floor,
        });
        context.print(&line.to_string())?;
        return Ok(ExitStatus::Success);
    }
    let cells = |setting: &Setting, rate: f64| {
        [setting.workers, setting.threads, setting.batch_size]
            .map(|number| number.to_string())
            .into_iter()
            .chain([format!("{rate:.0}")])
            .collect()
    };
    let header = ["workers", "threads", "batch_size", "images/s"].map(str::to_owned).to_vec();
    let table: Vec<Vec<String>> =
        std::iter::once(header).chain(tried.iter().map(|(setting, rate)| cells(setting, *rate))).collect();
    context.print(&format!(
        "{} on {}, {cores} cores, ONNX Runtime {}",
        subject.name,
        provider.name(),
        runtime.version
    ))?;
    for line in align(&table) {
        context.print(&format!("  {line}"))?;
    }
    context.print(&format!(
        "decoding alone {decode:.0} images/s, the network alone {infer:.0}; together at most {floor:.0} images/s"
    ))?;
    context.print(&format!(
        "\n[execution]\nworkers = {}\nthreads = {}\nbatch_size = {}",
        fastest.workers, fastest.threads, fastest.batch_size
    ))?;
    Ok(ExitStatus::Success)
}

/// The number that an option gives, where it does: within the bounds that it has for a pipeline.
fn given(option: &str, number: Option<u32>, most: NonZeroUsize) -> Result<Option<usize>, Error> {
    let Some(number) = number else { return Ok(None) };
    match usize::try_from(number) {
        Ok(number) if (1..=most.get()).contains(&number) => Ok(Some(number)),
        _ => Err(Error::Usage {
            message: format!("`{option}` is {number}, outside of 1 to {most}"),
            hint: format!("give a number in 1 to {most}"),
        }),
    }
}

/// Threads for each of so many workers, such that no core is idle.
fn threads_beside(cores: usize, workers: usize) -> usize {
    (cores / workers).max(1)
}

/// The workers and threads that share so many cores; with so many workers, where that is given.
fn layouts(cores: usize, is_gpu: bool, workers: Option<usize>) -> Vec<Layout> {
    let mut layouts = match (workers, is_gpu) {
        (Some(workers), true) => vec![(workers, 1)],
        (Some(workers), false) => vec![(workers, threads_beside(cores, workers))],
        (None, true) => vec![(1, 1), (2, 1)],
        (None, false) => vec![(cores, 1), (cores / 2, 2), (1, cores)],
    };
    layouts.retain(|(workers, _)| *workers > 0);
    layouts.dedup();
    layouts
}

/// The batch sizes to try with a model.
fn batch_sizes(model: &Model) -> Vec<usize> {
    let row_bytes = model.contract.input.num_values() * size_of::<f32>();
    let suits = |batch: &usize| *batch == 1 || batch.saturating_mul(row_bytes) <= MAX_INPUT_BYTES;
    BATCH_SIZES.into_iter().filter(suits).collect()
}

/// The mean of rates that were measured for equal times.
fn mean(rates: &[f64]) -> f64 {
    rates.iter().sum::<f64>() / rates.len() as f64
}

impl Subject {
    /// A pipeline with rows of its source, or a package with its golden rows.
    fn find(context: &Context, target: &str, overrides: &Overrides) -> Result<Self, Error> {
        if Path::new(target).extension().is_some_and(|ending| ending == PIPELINE_ENDING) {
            let pipeline = load_pipeline(context, Path::new(target), overrides)?;
            let packages = Packages::find(context, &pipeline)?;
            let contents = rows(context, &pipeline, &packages)?;
            let (decode, name) = (pipeline.execution.decode, packages.names());
            return Ok(Self { name, networks: Networks::Pipeline(Box::new((pipeline, packages))), decode, contents });
        }
        let store = context.stores.open(&context.locate("MODEL", target)?)?;
        let (contract, _) = context.block_on(model::read_contract(&store))?;
        let golden = context.block_on(model::read_golden(&store, &contract))?;
        Ok(Self {
            name: contract.name,
            networks: Networks::Package(store, overrides.device.unwrap_or(Device::Cpu)),
            decode: DecodeMode::Exact,
            contents: golden.images.into_iter().map(|image| image.image.into()).collect(),
        })
    }

    fn load(&self, context: &Context, runtime: &Runtime, (workers, threads): Layout) -> Result<Model, Error> {
        match &self.networks {
            Networks::Pipeline(named) => {
                let (mut pipeline, packages) = (named.0.clone(), &named.1);
                pipeline.execution.threads = threads.try_into().unwrap_or(NonZeroUsize::MIN);
                packages.load(context, &pipeline, runtime, workers)
            }
            Networks::Package(store, device) => {
                let compute = Compute { threads, ..Compute::on(*device, workers) };
                Ok(context.block_on(Model::load(store, None, runtime.clone(), &compute))?)
            }
        }
    }

    /// Rows a second that become input tensors on so many cores.
    fn decode_rate(&self, model: &Model, cores: usize) -> Result<f64, Error> {
        on_threads(cores, |thread| {
            let mut inputs = Inputs::new(model, self.decode);
            let mut place = thread;
            Box::new(move || {
                place += cores;
                inputs.clear();
                inputs.push(&self.contents[place % self.contents.len()]);
                Ok(1)
            })
        })
    }

    /// The input tensors of each of the models, of so many rows.
    fn tensors(&self, model: &Model, most: usize) -> Result<Vec<Vec<f32>>, Error> {
        let mut inputs = Inputs::new(model, self.decode);
        let mut num_rows = 0;
        for content in self.contents.iter().cycle().take(most * self.contents.len().max(1)) {
            if num_rows == most {
                return Ok(inputs.tensors);
            }
            num_rows += usize::from(inputs.push(content));
        }
        Err(Error::Usage {
            message: format!("none of the first {} rows of the source can be read", self.contents.len()),
            hint: "run the pipeline, and look at the status of its rows".to_owned(),
        })
    }
}

/// The input tensors of rows.
struct Inputs<'a> {
    preparations: Vec<&'a Preparation>,
    specs: Vec<PixelSpec>,
    decode: DecodeMode,
    decoder: Decoder,
    samples: Vec<Vec<u8>>,
    tensors: Vec<Vec<f32>>,
}

impl<'a> Inputs<'a> {
    fn new(model: &'a Model, decode: DecodeMode) -> Self {
        let preparations: Vec<&Preparation> = model.with_encoder().map(|model| &model.preparation).collect();
        let specs = model.pixel_specs();
        let (samples, tensors) = (vec![Vec::new(); preparations.len()], vec![Vec::new(); preparations.len()]);
        Self { preparations, specs, decode, decoder: Decoder::default(), samples, tensors }
    }

    fn clear(&mut self) {
        self.tensors.iter_mut().for_each(Vec::clear);
    }

    /// Appends a row, and says whether it can be read.
    fn push(&mut self, content: &[u8]) -> bool {
        let limits = DecodeLimits::default();
        self.samples.iter_mut().for_each(Vec::clear);
        if !self.specs.is_empty()
            && self.decoder.decode(content, &self.specs, self.decode, &limits, &mut self.samples).is_err()
        {
            return false;
        }
        let each = self.preparations.iter().zip(&self.samples).zip(&mut self.tensors);
        each.into_iter().all(|((preparation, samples), tensors)| match preparation {
            Preparation::Image(image) => {
                image.push_tensor(samples, tensors);
                true
            }
            Preparation::Features(_) => preparation.push_content(content, tensors).is_ok(),
        })
    }
}

/// The first rows of a source.
fn rows(context: &Context, pipeline: &Pipeline, packages: &Packages) -> Result<Vec<Bytes>, Error> {
    let unit_rows = pipeline.execution.unit_rows.get() as u64;
    let all = Selection::default();
    let source = context.block_on(Source::discover(&context.stores, &pipeline.source, unit_rows, &all))?;
    packages.check_source(&source)?;
    let batch_rows = DEFAULT_BATCH_SIZE.get();
    let options = ReadOptions { batch_rows, max_image_bytes: pipeline.limits.max_image_bytes.get() };
    let mut contents: Vec<Bytes> = Vec::new();
    context.block_on(source.read_until(&options, |batch| {
        match batch.cells {
            Cells::Images(images) => contents.extend(images.into_iter().flatten().map(|image| image.to_vec().into())),
            Cells::Features(rows) => contents.extend(rows.into_iter().flatten().map(|row| row.bytes.to_vec().into())),
        }
        contents.len() < NUM_ROWS && contents.iter().map(Bytes::len).sum::<usize>() < MAX_BYTES
    }))?;
    if contents.is_empty() {
        return Err(Error::Usage {
            message: format!("there are no rows to read at {}", source.url()),
            hint: "check [source], and `where`".to_owned(),
        });
    }
    Ok(contents)
}

/// Rows a second that go through the networks. Calls take other rows by turns, as those of a run do.
fn infer_rate(model: &Model, tensors: &[Vec<f32>], setting: Setting) -> Result<f64, Error> {
    let models: Vec<&Model> = model.with_encoder().collect();
    on_threads(setting.workers, |worker| {
        let models = models.clone();
        let mut call = worker;
        Box::new(move || {
            for (model, tensors) in models.iter().zip(tensors) {
                let values = setting.batch_size * model.contract.input.num_values();
                let batches = tensors.len() / values;
                let rows = tensors.chunks_exact(values).nth(call % batches.max(1)).unwrap_or_default();
                model.session(worker).run(rows, setting.batch_size, |_| ())?;
            }
            call += setting.workers;
            Ok(setting.batch_size)
        })
    })
}

/// Does on so many threads, for the time of a trial and at least once, what `work` makes for each of them; the first time does not count.
/// Returns how many rows a second they do together.
fn on_threads<'a>(
    count: usize,
    work: impl Fn(usize) -> Box<dyn FnMut() -> Result<usize, ModelError> + 'a> + Sync,
) -> Result<f64, Error> {
    let rates = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for thread in 0..count {
            let (work, rates) = (&work, &rates);
            scope.spawn(move || {
                let mut work = work(thread);
                let mut measure = || -> Result<f64, ModelError> {
                    work()?;
                    let (started, mut rows) = (Instant::now(), 0);
                    while rows == 0 || started.elapsed() < TRIAL {
                        rows += work()?;
                    }
                    Ok(rows as f64 / started.elapsed().as_secs_f64())
                };
                let rate = measure();
                rates.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(rate);
            });
        }
    });
    let rates = rates.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    Ok(rates.into_iter().sum::<Result<f64, ModelError>>()?)
}
