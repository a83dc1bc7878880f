//! The time that one image may take: readers that give out no more bytes once it is over.
//!
//! No thread can be stopped from outside, so every decoder is given its bytes by a reader that looks at the clock. After the
//! deadline the bytes end, and the decoder with them. What it may still do then, with the bytes it holds, is one pass over
//! pixels whose number was checked before. [`Deadline::has_passed`] tells a deadline from an image that ends early.
//!
//! The decoder of JPEG takes no reader; what it may do is bounded beforehand, see [`super::jpeg`].

use std::cell::Cell;
use std::io::{self, BufRead, Cursor, ErrorKind, Read, Seek, SeekFrom};
use std::time::{Duration, Instant};

/// Reads between two looks at the clock, which costs as much as reading a few bytes.
const READS_A_LOOK: u32 = 8;

/// Bytes of a read at most, so that a look is due often enough: compressed bytes can mean a thousand times their number.
const MAX_BYTES_A_READ: usize = 8 << 10;

/// When an image must be decoded.
#[derive(Debug)]
pub(super) struct Deadline {
    /// `None`: later than the clock can say.
    end: Option<Instant>,
    has_passed: Cell<bool>,
}

impl Deadline {
    /// A deadline that far from now.
    pub(super) fn after(time: Duration) -> Self {
        Self { end: Instant::now().checked_add(time), has_passed: Cell::new(false) }
    }

    /// Whether a reader has refused bytes because of it. Once it has, it goes on doing so.
    pub(super) fn has_passed(&self) -> bool {
        self.has_passed.get()
    }

    /// Looks at the clock.
    pub(super) fn look(&self) -> bool {
        if !self.has_passed() && self.end.is_some_and(|end| Instant::now() >= end) {
            self.has_passed.set(true);
        }
        self.has_passed()
    }
}

/// Looks at the clock now and then: at the first read, and again after [`READS_A_LOOK`].
#[derive(Debug)]
struct Watch<'a> {
    deadline: &'a Deadline,
    reads_left: u32,
}

impl<'a> Watch<'a> {
    fn new(deadline: &'a Deadline) -> Self {
        Self { deadline, reads_left: 0 }
    }

    /// Counts a read, and says whether it comes too late.
    fn is_late(&mut self) -> bool {
        if let Some(left) = self.reads_left.checked_sub(1) {
            self.reads_left = left;
            return self.deadline.has_passed();
        }
        self.reads_left = READS_A_LOOK;
        self.deadline.look()
    }
}

/// The bytes of an image, for decoders that read from the traits of the standard library.
#[derive(Debug)]
pub(super) struct TimedReader<'a> {
    bytes: Cursor<&'a [u8]>,
    watch: Watch<'a>,
}

impl<'a> TimedReader<'a> {
    pub(super) fn new(bytes: &'a [u8], deadline: &'a Deadline) -> Self {
        Self { bytes: Cursor::new(bytes), watch: Watch::new(deadline) }
    }
}

impl Read for TimedReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.watch.is_late() {
            return Err(ErrorKind::TimedOut.into());
        }
        let len = buffer.len().min(MAX_BYTES_A_READ);
        self.bytes.read(&mut buffer[..len])
    }
}

impl BufRead for TimedReader<'_> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.watch.is_late() {
            return Err(ErrorKind::TimedOut.into());
        }
        let rest = self.bytes.fill_buf()?;
        Ok(&rest[..rest.len().min(MAX_BYTES_A_READ)])
    }

    fn consume(&mut self, amount: usize) {
        self.bytes.consume(amount);
    }
}

impl Seek for TimedReader<'_> {
    fn seek(&mut self, position: SeekFrom) -> io::Result<u64> {
        self.bytes.seek(position)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn after_the_deadline_the_bytes_end() {
        let bytes = [7; 100];
        let deadline = Deadline::after(Duration::ZERO);
        assert!(!deadline.has_passed(), "nobody was refused yet");
        let mut reader = TimedReader::new(&bytes, &deadline);
        assert_eq!(reader.fill_buf().unwrap_err().kind(), ErrorKind::TimedOut);
        assert_eq!(reader.read_to_end(&mut Vec::new()).unwrap_err().kind(), ErrorKind::TimedOut);
        assert!(deadline.has_passed());
    }

    #[test]
    fn before_the_deadline_all_bytes_are_read_in_pieces() {
        let bytes: Vec<u8> = (0..100_000_u32).map(|number| number.to_le_bytes()[0]).collect();
        for time in [Duration::from_hours(1), Duration::MAX] {
            let deadline = Deadline::after(time);
            let mut reader = TimedReader::new(&bytes, &deadline);
            assert_eq!(reader.fill_buf().unwrap().len(), MAX_BYTES_A_READ);
            let mut read = Vec::new();
            reader.read_to_end(&mut read).unwrap();
            assert!(read == bytes);
            assert!(!deadline.has_passed());
        }
    }
}
