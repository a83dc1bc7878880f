//! Being told to stop: SIGTERM (a scheduler) and SIGINT (Ctrl+C) end a run within seconds.
//!
//! Whoever works looks at a [`Stop`] between two pieces of work and gives up what is unfinished; nothing of it is visible to anybody,
//! and what has a receipt is taken up by the next run. Who does not look in time (a store that does not answer, a long matrix
//! product) is not waited for: the process ends all the same, which is as safe as a crash.

use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::{Duration, Instant};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::error::{Error, ExitStatus};

/// Time from SIGTERM to the end of the process at most. Schedulers wait ten seconds before they kill.
const TERMINATE_GRACE: Duration = Duration::from_secs(8);

/// The same from SIGINT: somebody sits there.
const INTERRUPT_GRACE: Duration = Duration::from_secs(3);

/// Time between two looks for a second signal.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// The signals that end a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signal {
    /// Ctrl+C.
    Interrupt,
    /// What schedulers send.
    Terminate,
}

impl Signal {
    fn of(number: i32) -> Option<Self> {
        match number {
            SIGINT => Some(Self::Interrupt),
            SIGTERM => Some(Self::Terminate),
            _ => None,
        }
    }

    /// The signal's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Interrupt => "SIGINT",
            Self::Terminate => "SIGTERM",
        }
    }

    fn number(self) -> i32 {
        match self {
            Self::Interrupt => SIGINT,
            Self::Terminate => SIGTERM,
        }
    }

    fn grace(self) -> Duration {
        match self {
            Self::Interrupt => INTERRUPT_GRACE,
            Self::Terminate => TERMINATE_GRACE,
        }
    }

    /// The exit code: 128 and the signal's number.
    pub fn exit_status(self) -> ExitStatus {
        match self {
            Self::Interrupt => ExitStatus::Interrupted,
            Self::Terminate => ExitStatus::Terminated,
        }
    }
}

/// Whether this process has been told to stop. Clones look at the same signal.
#[derive(Debug, Clone, Default)]
pub struct Stop(Arc<AtomicI32>);

impl Stop {
    /// Listens for signals from now on. After the first one, `last_words` is called if the process is still there when the time is
    /// up or a second signal comes, and then the process ends.
    pub fn listen(&self, last_words: impl Fn(Signal) + Send + 'static) -> std::io::Result<()> {
        let mut signals = Signals::new([SIGINT, SIGTERM])?;
        let received = Arc::clone(&self.0);
        std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
            let Some(signal) = signals.forever().find_map(Signal::of) else { return };
            received.store(signal.number(), Ordering::SeqCst);
            tracing::info!(signal = signal.name(), "stopping");
            let deadline = Instant::now() + signal.grace();
            // Who asks twice does not want to wait.
            while Instant::now() < deadline && signals.pending().next().is_none() {
                std::thread::sleep(LOOK_EVERY);
            }
            last_words(signal);
            // Somebody does not come to an end, and the scheduler would kill us.
            std::process::exit(signal.exit_status() as i32);
        })?;
        Ok(())
    }

    /// The signal, if one came.
    pub fn signal(&self) -> Option<Signal> {
        Signal::of(self.0.load(Ordering::SeqCst))
    }

    /// Fails once a signal came.
    pub fn check(&self) -> Result<(), Error> {
        self.signal().map_or(Ok(()), |signal| Err(Error::Stopped { signal }))
    }
}
