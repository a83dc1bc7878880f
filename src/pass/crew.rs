//! The threads of a pass, each of which takes whole batches from compressed images to results, and can be left behind.
//!
//! A thread for each core that has all its work to do itself is never without work, and the system has no reason to move it. It is left behind
//! when a decoder keeps it: a decoder is given no more bytes after `max_decode` ([`crate::decode`]), and ends. Should one not end, for a defect
//! that nobody knows of yet, then the thread that it runs in is abandoned: the image is a row with a status, another thread takes over the
//! batch without it, and the job is not held up. An abandoned thread keeps its core and its memory busy until it ends or the process does, so
//! there may be [`MAX_ABANDONED`] of them and no more.
//!
//! What a thread might take with it lies in its [`Post`] while it decodes, where whoever leaves it behind takes it. So these threads borrow
//! nothing from those that started them.

use std::ops::Deref;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::caught::caught;
use crate::decode::{BatchDecoder, DecodeLimits, DecodeMode, DecodedBatch, PixelSpec, Reject};

/// Abandoned threads in this process at most.
pub const MAX_ABANDONED: usize = 4;

/// Time beyond `max_decode` that a decoder gets: it then has its last bytes, and up to `max_pixels` pixels to make of them.
const GRACE: Duration = Duration::from_secs(10);

/// The threads that did not come back.
static ABANDONED: Mutex<Vec<JoinHandle<()>>> = Mutex::new(Vec::new());

/// Why a batch was not decoded to its end. What an image can cause is a [`crate::decode::Reject`] instead.
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

/// How images are decoded.
#[derive(Debug, Clone)]
pub(super) struct Decoding {
    /// The pixels to make of each; none where nothing is to be decoded.
    pub(super) specs: Arc<[PixelSpec]>,
    pub(super) mode: DecodeMode,
    pub(super) limits: DecodeLimits,
    /// How long an image may keep its thread busy.
    pub(super) patience: Duration,
}

impl Decoding {
    pub(super) fn new(specs: Vec<PixelSpec>, mode: DecodeMode, limits: DecodeLimits) -> Self {
        Self { specs: specs.into(), mode, limits, patience: limits.max_decode.saturating_add(GRACE) }
    }
}

/// Images that share their bytes with whoever reads them.
pub(super) type SharedImages<Bytes> = Arc<Vec<Result<Bytes, Reject>>>;

/// A batch on its way to a thread.
#[derive(Debug)]
pub(super) struct Order<Bytes, More> {
    images: SharedImages<Bytes>,
    /// Numbers of those that kept a thread for too long.
    late: Vec<usize>,
    more: More,
}

impl<Bytes, More> Order<Bytes, More> {
    /// Images to decode, and what else there is of their batch.
    pub(super) fn new(images: SharedImages<Bytes>, more: More) -> Self {
        Self { images, late: Vec::new(), more }
    }
}

/// What a thread does with a batch whose images are decoded.
pub(super) type Work<Bytes, More, Made> =
    Box<dyn FnMut(&SharedImages<Bytes>, Result<&DecodedBatch, BatchError>, More) -> Made>;

/// Makes the work of a thread by its number, in that thread.
type Hire<Bytes, More, Made> = dyn Fn(usize) -> Work<Bytes, More, Made> + Send + Sync;

/// What all threads know.
struct Shared<Bytes, More, Made> {
    decoding: Decoding,
    orders: Mutex<Receiver<Order<Bytes, More>>>,
    hire: Box<Hire<Bytes, More, Made>>,
    /// Nobody wants further results.
    is_closed: AtomicBool,
}

/// A batch whose images are being decoded, and where the result goes.
type InHand<Bytes, More, Made> = (Order<Bytes, More>, Sender<Made>);

/// A place at which a thread works.
struct Post<Bytes, More, Made> {
    /// What it decodes, and has no more if others take it.
    in_hand: Mutex<Option<InHand<Bytes, More, Made>>>,
    /// Images of the batch that are done.
    done: AtomicUsize,
    /// Batches that were begun.
    begun: AtomicUsize,
}

/// A thread at its post, and what it was last seen to do: the batch, its images that were done, and since when that is so.
struct Member<Bytes, More, Made> {
    post: Arc<Post<Bytes, More, Made>>,
    thread: JoinHandle<()>,
    seen: Option<((usize, usize), Instant)>,
}

/// Threads that were started, where they get batches, and where their results go, for those that others add to them.
pub(super) struct Started<Bytes, More, Made> {
    pub(super) crew: Crew<Bytes, More, Made>,
    pub(super) orders: Sender<Order<Bytes, More>>,
    pub(super) results: Sender<Made>,
}

/// Threads that work off batches.
pub(super) struct Crew<Bytes, More, Made> {
    shared: Arc<Shared<Bytes, More, Made>>,
    members: Vec<Member<Bytes, More, Made>>,
    results: Receiver<Made>,
}

impl<Bytes, More, Made> Crew<Bytes, More, Made>
where
    Bytes: Deref<Target = [u8]> + Send + Sync + 'static,
    More: Send + 'static,
    Made: Send + 'static,
{
    /// Starts `count` threads, which take orders until that channel is closed.
    pub(super) fn start(
        count: usize,
        decoding: Decoding,
        hire: impl Fn(usize) -> Work<Bytes, More, Made> + Send + Sync + 'static,
    ) -> Result<Started<Bytes, More, Made>, BatchError> {
        let (orders, incoming) = channel();
        let (results, outgoing) = channel();
        let (hire, is_closed) = (Box::new(hire), AtomicBool::new(false));
        let shared = Arc::new(Shared { decoding, orders: Mutex::new(incoming), hire, is_closed });
        let mut crew = Self { shared, members: Vec::new(), results: outgoing };
        for number in 0..count {
            let member = crew.recruit(number, None, results.clone())?;
            crew.members.push(member);
        }
        Ok(Started { crew, orders, results })
    }

    /// A thread that begins with an order that another one left.
    fn recruit(
        &self,
        number: usize,
        first: Option<Order<Bytes, More>>,
        results: Sender<Made>,
    ) -> Result<Member<Bytes, More, Made>, BatchError> {
        let post = Arc::new(Post { in_hand: Mutex::new(None), done: AtomicUsize::new(0), begun: AtomicUsize::new(0) });
        let (shared, at) = (Arc::clone(&self.shared), Arc::clone(&post));
        let thread = std::thread::Builder::new()
            .name("worker".to_owned())
            .spawn(move || shared.serve(&at, number, first, results))?;
        Ok(Member { post, thread, seen: None })
    }

    /// Waits for a result for so long.
    pub(super) fn next(&mut self, wait: Duration) -> Result<Next<Made>, BatchError> {
        match self.results.recv_timeout(wait) {
            Ok(made) => Ok(Next::Made(made)),
            Err(RecvTimeoutError::Disconnected) => Ok(Next::Ended),
            Err(RecvTimeoutError::Timeout) => {
                // A thread that makes no progress holds up all others before long.
                self.look_after()?;
                Ok(Next::NotYet)
            }
        }
    }

    /// Replaces the threads that an image has kept for too long.
    fn look_after(&mut self) -> Result<(), BatchError> {
        for number in 0..self.members.len() {
            let member = &mut self.members[number];
            let mut in_hand = member.post.in_hand.lock().unwrap_or_else(PoisonError::into_inner);
            let item = member.post.done.load(Ordering::Relaxed);
            let state = (member.post.begun.load(Ordering::Relaxed), item);
            member.seen = match member.seen {
                _ if in_hand.is_none() => None,
                Some((seen, since)) if seen == state => Some((seen, since)),
                _ => Some((state, Instant::now())),
            };
            let is_stuck = member.seen.is_some_and(|(_, since)| since.elapsed() >= self.shared.decoding.patience);
            let Some((mut order, results)) = is_stuck.then(|| in_hand.take()).flatten() else { continue };
            drop(in_hand);
            order.late.push(item);
            let replacement = self.recruit(number, Some(order), results)?;
            let left = std::mem::replace(&mut self.members[number], replacement);
            abandon(left.thread)?;
        }
        Ok(())
    }

    /// Ends when all threads have, but for those left behind. What was not begun is not done.
    pub(super) fn end(mut self) {
        self.shared.is_closed.store(true, Ordering::Relaxed);
        let ended = loop {
            match self.next(super::STOP_CHECK_EVERY) {
                Ok(Next::Made(_) | Next::NotYet) => {}
                Ok(Next::Ended) => break true,
                // More of them are stuck than may be left behind.
                Err(_) => break false,
            }
        };
        if ended {
            // What panicked has been told.
            self.members.drain(..).for_each(|member| drop(member.thread.join()));
        }
        // Threads that were left behind know of this channel too.
        drop(std::mem::replace(&mut *self.shared.orders.lock().unwrap_or_else(PoisonError::into_inner), channel().1));
    }
}

/// What comes of waiting for a result.
#[derive(Debug)]
pub(super) enum Next<Made> {
    Made(Made),
    NotYet,
    /// There are no more: all who could send one have ended.
    Ended,
}

impl<Bytes: Deref<Target = [u8]>, More, Made> Shared<Bytes, More, Made> {
    /// Works off orders until there are none, or until this thread is left behind.
    fn serve(
        &self,
        post: &Post<Bytes, More, Made>,
        number: usize,
        mut first: Option<Order<Bytes, More>>,
        mut results: Sender<Made>,
    ) {
        let Decoding { specs, mode, limits, .. } = &self.decoding;
        let mut decoder = BatchDecoder::new(Arc::clone(specs), *mode, *limits);
        let mut work = (self.hire)(number);
        while !self.is_closed.load(Ordering::Relaxed) {
            let next = || self.orders.lock().unwrap_or_else(PoisonError::into_inner).recv();
            let Ok(order) = first.take().map_or_else(next, Ok) else { return };
            let (images, late) = (&Arc::clone(&order.images), order.late.clone());
            post.done.store(0, Ordering::Relaxed);
            post.begun.fetch_add(1, Ordering::Relaxed);
            *post.in_hand.lock().unwrap_or_else(PoisonError::into_inner) = Some((order, results));
            // After a panic the pass ends, and nobody looks at what there is of the batch.
            let decoded = caught(|| decoder.decode(images, &late, &post.done));
            let decoded = decoded.map(|()| decoder.decoded()).map_err(BatchError::Panicked);
            let in_hand = post.in_hand.lock().unwrap_or_else(PoisonError::into_inner).take();
            let Some((order, sender)) = in_hand else { return };
            if sender.send(work(images, decoded, order.more)).is_err() {
                return;
            }
            results = sender;
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

#[cfg(test)]
mod tests {
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

    /// The codes of the rows of a batch, with its number and that of the thread that made them.
    type Codes = (usize, usize, Result<Vec<&'static str>, BatchError>);

    fn crew(count: usize) -> (Crew<Slow, usize, Codes>, Sender<Order<Slow, usize>>) {
        let spec = PixelSpec {
            height: 1,
            width: 1,
            color: Color::Gray,
            filter: Filter::Nearest,
            fit: Fit::Stretch,
            resize: None,
            exif_rotation: false,
        };
        let mut decoding = Decoding::new(vec![spec], DecodeMode::Exact, DecodeLimits::default());
        decoding.patience = PATIENCE;
        let Started { crew, orders, .. } = Crew::start(count, decoding, |thread| {
            Box::new(move |_, decoded, batch| {
                let codes = |decoded: &DecodedBatch| decoded.images().map(|row| row.unwrap_err().code()).collect();
                (batch, thread, decoded.map(codes))
            })
        })
        .unwrap();
        (crew, orders)
    }

    /// Six images, some of which are stuck, and what holds these.
    fn images(stuck: &[usize]) -> (SharedImages<Slow>, Vec<Sender<()>>) {
        let mut senders = Vec::new();
        let mut image = |number: usize| -> Result<Slow, Reject> {
            if !stuck.contains(&number) {
                return Ok(Slow::Here);
            }
            let (sender, receiver) = channel();
            senders.push(sender);
            Ok(Slow::Stuck(Mutex::new(receiver)))
        };
        let images = (0..6).map(&mut image).collect();
        (Arc::new(images), senders)
    }

    fn next(crew: &mut Crew<Slow, usize, Codes>) -> Result<Option<Codes>, BatchError> {
        loop {
            match crew.next(Duration::from_millis(10))? {
                Next::Made(codes) => return Ok(Some(codes)),
                Next::NotYet => {}
                Next::Ended => return Ok(None),
            }
        }
    }

    // One test, for the threads left behind are counted by process.
    #[test]
    fn what_does_not_come_back_is_left_behind_and_the_rest_goes_on() {
        const LATE: &str = "decode_timeout";
        let (mut one, orders) = crew(1);
        let ((stuck, release), (fine, _)) = (images(&[1, 4]), images(&[]));
        orders.send(Order::new(stuck, 0)).unwrap();
        orders.send(Order::new(fine, 1)).unwrap();
        drop(orders);
        let codes = next(&mut one).unwrap().unwrap();
        assert!(
            matches!(&codes, (0, 0, Ok(codes)) if *codes == ["empty", LATE, "empty", "empty", LATE, "empty"]),
            "{codes:?}"
        );
        let codes = next(&mut one).unwrap().unwrap();
        assert!(matches!(&codes, (1, 0, Ok(codes)) if *codes == ["empty"; 6]), "{codes:?}");
        assert!(next(&mut one).unwrap().is_none(), "threads that were left behind hold nothing up");
        one.end();
        assert_eq!(ABANDONED.lock().unwrap().len(), 2);

        // The other one goes on meanwhile. Two are left behind already, and at the third of these that is one too many.
        let (mut two, orders) = crew(2);
        let (stuck, release_more) = images(&[0, 1, 2, 3]);
        orders.send(Order::new(stuck, 0)).unwrap();
        for number in 1..5 {
            orders.send(Order::new(images(&[]).0, number)).unwrap();
        }
        for number in 1..5 {
            assert!(matches!(next(&mut two).unwrap(), Some((batch, _, Ok(_))) if batch == number));
        }
        let error = next(&mut two).unwrap_err();
        assert!(matches!(error, BatchError::Stuck { count } if count == MAX_ABANDONED + 1), "{error}");
        drop(orders);
        two.end();

        // Those that come back after all make room again.
        drop((release, release_more));
        while !ABANDONED.lock().unwrap().iter().all(JoinHandle::is_finished) {
            std::thread::yield_now();
        }
        let (mut one, orders) = crew(1);
        let (stuck, _release) = images(&[5]);
        orders.send(Order::new(stuck, 0)).unwrap();
        let codes = next(&mut one).unwrap().unwrap();
        assert!(
            matches!(&codes, (0, 0, Ok(codes)) if codes[..] == ["empty", "empty", "empty", "empty", "empty", LATE])
        );
        assert_eq!(ABANDONED.lock().unwrap().len(), 1);
        drop(orders);
        one.end();
    }

    #[test]
    fn a_panic_is_an_error_with_its_words() {
        let (mut one, orders) = crew(1);
        orders.send(Order::new(Arc::new(vec![Ok(Slow::Here), Ok(Slow::Broken)]), 0)).unwrap();
        let (.., codes) = next(&mut one).unwrap().unwrap();
        assert_eq!(codes.unwrap_err().to_string(), "decoding panicked: an image is not one of ours");
        drop(orders);
        one.end();
    }

    #[test]
    fn what_is_not_begun_when_nobody_wants_it_is_not_done() {
        let (crew, orders) = crew(1);
        let (stuck, release) = images(&[0]);
        orders.send(Order::new(stuck, 0)).unwrap();
        let (waiting, _) = images(&[]);
        orders.send(Order::new(Arc::clone(&waiting), 1)).unwrap();
        let ended = std::thread::spawn(move || crew.end());
        std::thread::sleep(Duration::from_millis(50));
        drop(release);
        drop(orders);
        ended.join().unwrap();
        assert_eq!(Arc::strong_count(&waiting), 1, "nobody has it");
    }
}
