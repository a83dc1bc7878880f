//! The images of a batch, decoded in a thread that can be left behind.
//!
//! A decoder is given no more bytes after `max_decode` ([`super::deadline`]), and ends. Should one not end, for a defect that nobody
//! knows of yet, then the thread that it runs in is abandoned: the image is a row with a status, the rest of the batch goes on in
//! another thread, and the job is not held up. An abandoned thread keeps its core and its memory busy until it ends or the process
//! does, so there may be [`MAX_ABANDONED`] of them and no more.

use std::any::Any;
use std::ops::Deref;
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use super::{DecodeLimits, PixelSpec, Pixels, Reject, decode_each};

/// Abandoned threads in this process at most.
pub const MAX_ABANDONED: usize = 4;

/// Time beyond `max_decode` that a decoder gets: it then has its last bytes, and up to `max_pixels` pixels to make of them.
const GRACE: Duration = Duration::from_secs(10);

/// Decoded images that wait to be taken over.
const RESULTS_WAITING: usize = 4;

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

/// Decodes images, each once, and hands each result to `sink` in the order of the images: the pixels of each of the specs. What is
/// rejected already stays so.
pub fn decode_batch<Bytes>(
    images: &Arc<Vec<Result<Bytes, Reject>>>,
    specs: &[PixelSpec],
    limits: &DecodeLimits,
    sink: impl FnMut(Result<Vec<Pixels>, Reject>),
) -> Result<(), BatchError>
where
    Bytes: Deref<Target = [u8]> + Send + Sync + 'static,
{
    let count = images.len();
    let (images, specs, limits) = (Arc::clone(images), specs.to_vec(), *limits);
    let work = move |image: usize| match &images[image] {
        Ok(bytes) => decode_each(bytes, &specs, &limits),
        Err(reject) => Err(reject.clone()),
    };
    let late = || Err(Reject::TimedOut { limit: limits.max_decode });
    supervise(count, limits.max_decode.saturating_add(GRACE), work, late, sink)
}

/// Calls `work` with 0 to `count - 1` in a thread of its own and hands the results to `sink`. A call that takes longer than
/// `patience` is left behind with its thread, and has the result `late`.
fn supervise<T: Send + 'static>(
    count: usize,
    patience: Duration,
    work: impl Fn(usize) -> T + Send + Sync + 'static,
    late: impl Fn() -> T,
    mut sink: impl FnMut(T),
) -> Result<(), BatchError> {
    let work = Arc::new(work);
    let mut next = 0;
    while next < count {
        let (sender, results) = sync_channel(RESULTS_WAITING);
        let work = Arc::clone(&work);
        let thread = std::thread::Builder::new().name("decode".to_owned()).spawn(move || {
            for item in next..count {
                // Nobody waits for what was left behind.
                if sender.send(work(item)).is_err() {
                    return;
                }
            }
        })?;
        loop {
            // While we wait, the thread works on one item and nothing else, so this is a lower bound of the item's own time.
            match results.recv_timeout(patience) {
                Ok(result) => {
                    sink(result);
                    next += 1;
                }
                Err(RecvTimeoutError::Timeout) => {
                    sink(late());
                    next += 1;
                    abandon(thread)?;
                    break;
                }
                Err(RecvTimeoutError::Disconnected) => {
                    thread.join().map_err(|panic| BatchError::Panicked(panic_message(&*panic)))?;
                    break;
                }
            }
        }
    }
    Ok(())
}

/// Leaves a thread behind, if there are not too many.
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
    use std::sync::mpsc::{Sender, channel};

    use super::*;

    /// Longer than a thread ever waits for its turn, and no longer than the test may take.
    const PATIENCE: Duration = Duration::from_millis(500);

    /// Numbers doubled in order, where some never come back until the sender is dropped.
    fn doubled(stuck: &'static [usize]) -> (Result<Vec<Option<usize>>, BatchError>, Sender<()>) {
        let (release, released) = channel::<()>();
        let released = Mutex::new(released);
        let work = move |item: usize| {
            if stuck.contains(&item) {
                let _ = released.lock().unwrap_or_else(PoisonError::into_inner).recv();
            }
            Some(2 * item)
        };
        let mut results = Vec::new();
        let outcome = supervise(6, PATIENCE, work, || None, |result| results.push(result));
        (outcome.map(|()| results), release)
    }

    // One test, for the threads left behind are counted by process.
    #[test]
    fn what_does_not_come_back_is_left_behind_and_the_rest_goes_on() {
        let (results, release) = doubled(&[1, 4]);
        assert_eq!(results.unwrap(), [Some(0), None, Some(4), Some(6), None, Some(10)]);
        assert_eq!(ABANDONED.lock().unwrap().len(), 2);

        // Two are left behind already, and at the third of these that is one too many.
        let (results, release_more) = doubled(&[0, 1, 2, 3]);
        let error = results.unwrap_err();
        assert!(matches!(error, BatchError::Stuck { count } if count == MAX_ABANDONED + 1), "{error}");

        // Those that come back after all make room again.
        drop((release, release_more));
        while !ABANDONED.lock().unwrap().iter().all(JoinHandle::is_finished) {
            std::thread::yield_now();
        }
        let (results, _release) = doubled(&[5]);
        assert_eq!(results.unwrap().last(), Some(&None));
        assert_eq!(ABANDONED.lock().unwrap().len(), 1);
    }

    #[test]
    fn a_panic_is_an_error_with_its_words() {
        let work = |item: usize| assert!(item < 2, "item {item} is not one of ours");
        let mut count = 0;
        let error = supervise(3, GRACE, work, || (), |()| count += 1).unwrap_err();
        assert_eq!(error.to_string(), "decoding panicked: item 2 is not one of ours");
        assert_eq!(count, 2);
    }
}
