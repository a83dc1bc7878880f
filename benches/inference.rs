//! How many images a model's sessions take in a second, on any device: tensors in, latents out, without decoding and tables.
//!
//! ```text
//! cargo bench --bench inference -- PACKAGE [DEVICE] [BATCH] [WORKERS] [SECS]
//! ```
//!
//! DEVICE is as in the pipeline file, cpu by default. The workers call sessions as those of a run do, each with the same random
//! tensors again and again. The last line is the number alone, for scripts.

#![expect(clippy::unwrap_used, reason = "what goes wrong here panics")]
#![expect(clippy::print_stdout, reason = "what it prints is what it is for")]

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use clap::ValueEnum as _;
use lookalike::config::Device;
use lookalike::context::Context;
use lookalike::model::{Compute, Model, Runtime};

/// Calls of each worker before the clock starts: memory is taken and algorithms are chosen in these.
const WARM_UP: usize = 3;

fn main() {
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| arg != "--bench").collect();
    let argument = |place: usize| args.get(place).map(String::as_str);
    let package = argument(0).expect("give PACKAGE [DEVICE] [BATCH] [WORKERS] [SECS]");
    let device = Device::from_str(argument(1).unwrap_or("cpu"), false).unwrap();
    let number = |place: usize, default: usize| argument(place).map_or(default, |text| text.parse().unwrap());
    let batch = number(2, 32);
    let workers = number(3, std::thread::available_parallelism().unwrap().get());
    let time = Duration::from_secs(number(4, 10) as u64);

    let context = Context::new(None, true).unwrap();
    let store = context.stores.open(&context.locate("PACKAGE", package).unwrap()).unwrap();
    let runtime = Runtime::load(None).unwrap();
    let compute = Compute::on(device, workers);
    let model = context.block_on(Model::load(&store, None, runtime, &compute)).unwrap();
    let values = batch * model.contract.input.num_values();
    let tensors: Vec<f32> = (0..values).map(|value| ((value * 2_654_435_761) % 1000) as f32 / 1000.0).collect();

    let num_images = AtomicUsize::new(0);
    let run = |worker: usize| model.session(worker).run(&tensors, batch, |latents| latents.embedding[0]).unwrap();
    for worker in 0..workers {
        for _ in 0..WARM_UP {
            std::hint::black_box(run(worker));
        }
    }
    let started = Instant::now();
    std::thread::scope(|scope| {
        for worker in 0..workers {
            let (run, num_images) = (&run, &num_images);
            scope.spawn(move || {
                while started.elapsed() < time {
                    std::hint::black_box(run(worker));
                    num_images.fetch_add(batch, Ordering::Relaxed);
                }
            });
        }
    });
    let per_sec = num_images.into_inner() as f64 / started.elapsed().as_secs_f64();
    println!("{}: {package}, batches of {batch}, {workers} workers, images a second:", model.provider.name());
    println!("{per_sec:.1}");
}
