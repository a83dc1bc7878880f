//! The images of a batch, decoded in a thread that can be left behind.
//!
//! A decoder is given no more bytes after `max_decode` ([`super::deadline`]), and ends. Should one not end, for a defect that nobody
//! knows of yet, then the thread that it runs in is abandoned: the image is a row with a status, the batch is decoded once more without it
//! in another thread, and the job is not held up. An abandoned thread keeps its core and its memory busy until it ends or the process
//! does, so there may be [`MAX_ABANDONED`] of them and no more.
//!
//! Nothing is allocated for an image once the buffers have grown to the size of the images: the thread keeps its working memory from batch
//! to batch, and the pixels lie in buffers that go back and forth.

use std::any::Any;
use std::ops::Deref;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use super::{DecodeLimits, DecodeMode, Decoder, PixelSpec, Reject, Size};

/// Abandoned threads in this process at most.
pub const MAX_ABANDONED: usize = 4;

/// Time beyond `max_decode` that a decoder gets: it then has its last bytes, and up to `max_pixels` pixels to make of them.
const GRACE: Duration = Duration::from_secs(10);

/// The threads that did not come back.
static ABANDONED: Mutex<Vec<JoinHandle<()>>> = Mutex::new(Vec::new());

/// Why a batch was not decoded to its end. What an image can cause is a [`Reject`] instead.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BatchError {
    /// There is no thread to be had.
    #[error("cannot start a thread")]
    Thread(#[from] std::io::Error),
    /// A defect of this program.
    #[error("decoding panicked: {0}")]
    Panicked(String),
    /// One more thread did not come back than may be left behind.
    #[error("{count} images keep their decoders busy long after max_decode_secs")]
    Stuck {
        /// Threads that were left behind.
        count: usize,
    },
}

/// Images that share their bytes with whoever reads them.
pub type SharedImages<Bytes> = Arc<Vec<Result<Bytes, Reject>>>;

/// The pixels of a batch, for each of the specs that were asked for.
#[derive(Debug, Default)]
pub struct DecodedBatch {
    /// The size of each image of the batch, or why there are no pixels of it.
    rows: Vec<Result<Size, Reject>>,
    /// For each spec, the samples of those that have pixels, one image after the other.
    samples: Vec<Vec<u8>>,
}

/// The pixels of one image of a batch.
#[derive(Debug, Clone, Copy)]
pub struct DecodedImage<'a> {
    /// The size that it had.
    pub size: Size,
    batch: &'a DecodedBatch,
    /// Its number among the images with pixels, and how many these are.
    place: (usize, usize),
}

impl<'a> DecodedImage<'a> {
    /// The samples for one of the specs, in height, width, channel order.
    pub fn samples(&self, spec: usize) -> &'a [u8] {
        let all = &self.batch.samples[spec];
        let (place, count) = self.place;
        let each = all.len() / count;
        &all[place * each..(place + 1) * each]
    }
}

impl DecodedBatch {
    /// The images in their order.
    pub fn images(&self) -> impl Iterator<Item = Result<DecodedImage<'_>, &Reject>> {
        let count = self.num_decoded();
        let mut next = 0;
        self.rows.iter().map(move |row| {
            row.as_ref().map(|size| {
                next += 1;
                DecodedImage { size: *size, batch: self, place: (next - 1, count) }
            })
        })
    }

    /// Images that have pixels.
    pub fn num_decoded(&self) -> usize {
        self.rows.iter().filter(|row| row.is_ok()).count()
    }
}

/// Decodes batches, one after the other, in a thread of its own.
#[derive(Debug)]
pub struct BatchDecoder<Bytes: 'static> {
    specs: Arc<[PixelSpec]>,
    mode: DecodeMode,
    limits: DecodeLimits,
    /// How long an image may keep the thread busy.
    patience: Duration,
    thread: Option<Watched<Job<Bytes>, DecodedBatch>>,
}

#[derive(Debug)]
struct Job<Bytes> {
    images: SharedImages<Bytes>,
    /// Those that kept a thread busy for too long.
    late: Vec<usize>,
    /// Buffers to use again.
    batch: DecodedBatch,
}

impl<Bytes: Deref<Target = [u8]> + Send + Sync + 'static> BatchDecoder<Bytes> {
    /// A decoder for images of these specs; its thread starts with the first batch.
    pub fn new(specs: Vec<PixelSpec>, mode: DecodeMode, limits: DecodeLimits) -> Self {
        let patience = limits.max_decode.saturating_add(GRACE);
        Self { specs: specs.into(), mode, limits, patience, thread: None }
    }

    /// Decodes images, each once, in the buffers of an earlier batch. What is rejected already stays so.
    pub fn decode(&mut self, images: &SharedImages<Bytes>, earlier: DecodedBatch) -> Result<DecodedBatch, BatchError> {
        let mut job = Job { images: Arc::clone(images), late: Vec::new(), batch: earlier };
        loop {
            let thread = match self.thread.take() {
                Some(thread) => thread,
                None => self.start()?,
            };
            let late = job.late.clone();
            match thread.run(job, self.patience) {
                Outcome::Done(batch, thread) => {
                    self.thread = Some(thread);
                    return Ok(batch);
                }
                Outcome::Stuck { item, thread } => {
                    abandon(thread)?;
                    let late = late.into_iter().chain([item]).collect();
                    job = Job { images: Arc::clone(images), late, batch: DecodedBatch::default() };
                }
                Outcome::Panicked(message) => return Err(BatchError::Panicked(message)),
            }
        }
    }

    fn start(&self) -> Result<Watched<Job<Bytes>, DecodedBatch>, BatchError> {
        let (specs, mode, limits) = (Arc::clone(&self.specs), self.mode, self.limits);
        let mut decoder = Decoder::default();
        Ok(Watched::start("decode", move |job: Job<Bytes>, done| {
            let mut batch = job.batch;
            batch.rows.clear();
            batch.samples.resize_with(specs.len(), Vec::new);
            batch.samples.iter_mut().for_each(Vec::clear);
            for (number, image) in job.images.iter().enumerate() {
                let decoded = match image {
                    Err(reject) => Err(reject.clone()),
                    Ok(_) if job.late.contains(&number) => Err(Reject::TimedOut { limit: limits.max_decode }),
                    Ok(bytes) => decoder.decode(bytes, &specs, mode, &limits, &mut batch.samples),
                };
                batch.rows.push(decoded);
                done.store(number + 1, Ordering::Relaxed);
            }
            batch
        })?)
    }
}

/// A thread that works off jobs of several items each, and can be seen to make no progress.
#[derive(Debug)]
struct Watched<In, Out> {
    jobs: Sender<In>,
    results: Receiver<Out>,
    /// Items of the job that are done.
    done: Arc<AtomicUsize>,
    thread: JoinHandle<()>,
}

/// What became of a job.
#[derive(Debug)]
enum Outcome<In, Out> {
    Done(Out, Watched<In, Out>),
    /// No item was done for so long; this is the one that is worked on.
    Stuck {
        item: usize,
        thread: JoinHandle<()>,
    },
    Panicked(String),
}

impl<In: Send + 'static, Out: Send + 'static> Watched<In, Out> {
    /// Starts a thread that calls `work` for each job, which tells the number of items that are done.
    fn start(name: &str, mut work: impl FnMut(In, &AtomicUsize) -> Out + Send + 'static) -> std::io::Result<Self> {
        let (jobs, incoming) = channel::<In>();
        let (outgoing, results) = channel();
        let done = Arc::new(AtomicUsize::new(0));
        let told = Arc::clone(&done);
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            for job in incoming {
                // Nobody waits for what was left behind.
                if outgoing.send(work(job, &told)).is_err() {
                    return;
                }
            }
        })?;
        Ok(Self { jobs, results, done, thread })
    }

    /// Runs a job, as long as each item takes no longer than `patience`. (One may take up to twice that: what is looked at is whether an
    /// item has been done since the last look.)
    fn run(self, job: In, patience: Duration) -> Outcome<In, Out> {
        self.done.store(0, Ordering::Relaxed);
        // A thread that has ended is found out below.
        let _ = self.jobs.send(job);
        let mut seen = None;
        loop {
            match self.results.recv_timeout(patience) {
                Ok(result) => return Outcome::Done(result, self),
                Err(RecvTimeoutError::Timeout) => {
                    let item = self.done.load(Ordering::Relaxed);
                    if seen == Some(item) || (seen.is_none() && item == 0) {
                        return Outcome::Stuck { item, thread: self.thread };
                    }
                    seen = Some(item);
                }
                // Its thread has ended early.
                Err(RecvTimeoutError::Disconnected) => {
                    let message =
                        self.thread.join().map_or_else(|panic| panic_message(&*panic), |()| "no reason".to_owned());
                    return Outcome::Panicked(message);
                }
            }
        }
    }
}

/// Leaves a thread behind, as long as there are not too many. Those that have ended meanwhile do not count.
fn abandon(thread: JoinHandle<()>) -> Result<(), BatchError> {
    let mut abandoned = ABANDONED.lock().unwrap_or_else(PoisonError::into_inner);
    abandoned.retain(|thread| !thread.is_finished());
    abandoned.push(thread);
    let count = abandoned.len();
    if count > MAX_ABANDONED { Err(BatchError::Stuck { count }) } else { Ok(()) }
}

/// What a panic said.
pub(crate) fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "a panic without words".to_owned())
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;
    use crate::decode::{Color, Filter, Fit};

    /// Longer than a thread ever waits for its turn, and no longer than the test may take.
    const PATIENCE: Duration = Duration::from_millis(500);

    /// An image of no bytes, some of which never come until their sender is dropped.
    enum Slow {
        Here,
        Stuck(Mutex<Receiver<()>>),
        Broken,
    }

    impl Deref for Slow {
        type Target = [u8];

        fn deref(&self) -> &[u8] {
            match self {
                Self::Here => {}
                Self::Stuck(released) => drop(released.lock().unwrap_or_else(PoisonError::into_inner).recv()),
                Self::Broken => panic!("an image is not one of ours"),
            }
            &[]
        }
    }

    fn decoder() -> BatchDecoder<Slow> {
        let spec = PixelSpec {
            height: 1,
            width: 1,
            color: Color::Gray,
            filter: Filter::Nearest,
            fit: Fit::Stretch,
            resize: None,
            exif_rotation: false,
        };
        let mut decoder = BatchDecoder::new(vec![spec], DecodeMode::Exact, DecodeLimits::default());
        decoder.patience = PATIENCE;
        decoder
    }

    /// The codes of the rows of six images, and what holds those that are stuck.
    fn codes(
        decoder: &mut BatchDecoder<Slow>,
        stuck: &[usize],
    ) -> (Result<Vec<&'static str>, BatchError>, Vec<Sender<()>>) {
        let mut senders = Vec::new();
        let mut image = |number: usize| {
            if !stuck.contains(&number) {
                return Ok(Slow::Here);
            }
            let (sender, receiver) = channel();
            senders.push(sender);
            Ok(Slow::Stuck(Mutex::new(receiver)))
        };
        let images = Arc::new((0..6).map(&mut image).collect());
        let decoded = decoder.decode(&images, DecodedBatch::default());
        let codes = |batch: DecodedBatch| batch.rows.iter().map(|row| row.as_ref().unwrap_err().code()).collect();
        (decoded.map(codes), senders)
    }

    // One test, for the threads left behind are counted by process.
    #[test]
    fn what_does_not_come_back_is_left_behind_and_the_rest_goes_on() {
        const LATE: &str = "decode_timeout";
        let mut decoder = decoder();
        let (found, release) = codes(&mut decoder, &[1, 4]);
        assert_eq!(found.unwrap(), ["empty", LATE, "empty", "empty", LATE, "empty"]);
        assert_eq!(ABANDONED.lock().unwrap().len(), 2);

        // Two are left behind already, and at the third of these that is one too many.
        let (found, release_more) = codes(&mut decoder, &[0, 1, 2, 3]);
        let error = found.unwrap_err();
        assert!(matches!(error, BatchError::Stuck { count } if count == MAX_ABANDONED + 1), "{error}");

        // Those that come back after all make room again.
        drop((release, release_more));
        while !ABANDONED.lock().unwrap().iter().all(JoinHandle::is_finished) {
            std::thread::yield_now();
        }
        let (found, _release) = codes(&mut decoder, &[5]);
        assert_eq!(found.unwrap(), ["empty", "empty", "empty", "empty", "empty", LATE]);
        assert_eq!(ABANDONED.lock().unwrap().len(), 1);
    }

    #[test]
    fn a_panic_is_an_error_with_its_words() {
        let images = Arc::new(vec![Ok(Slow::Here), Ok(Slow::Broken)]);
        let error = decoder().decode(&images, DecodedBatch::default()).unwrap_err();
        assert_eq!(error.to_string(), "decoding panicked: an image is not one of ours");
    }
}
