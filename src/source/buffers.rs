//! Memory for the bytes of a file, used again.
//!
//! A table of images is megabytes that come and go by the second. Memory of that size is the system's, which hands it out page by page, each
//! cleared and each a fault, and takes longer for that than reading takes. So what was given back is kept for a moment: whoever reads ahead
//! asks for as much again at once.

use std::ops::{Deref, DerefMut, RangeInclusive};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;

use crate::memory::LARGE_BYTES;

/// Bytes that are kept at most while nobody has them: two blocks of the largest kind.
const KEPT_BYTES: usize = 32 << 20;

/// Bytes of a buffer that is kept.
const KEPT_SIZES: RangeInclusive<usize> = LARGE_BYTES..=KEPT_BYTES;

/// Buffers that were given back. Clones share them.
#[derive(Debug, Clone, Default)]
pub(super) struct Buffers(Arc<Mutex<Vec<Memory>>>);

/// Bytes that can be written as long as nobody reads them; their memory goes back to where it is from.
#[derive(Debug)]
pub(super) struct Buffer {
    memory: Memory,
    len: usize,
    home: Buffers,
}

/// Memory; where it is kept, of a size that is a power of two, so that blocks of about the same length fit into each other's.
#[derive(Debug, Default)]
struct Memory {
    bytes: Vec<u8>,
    /// Bytes that may have been written to. The system has not given those behind them yet.
    used: usize,
}

impl Buffers {
    /// A buffer of so many bytes, whatever these are.
    pub(super) fn take(&self, len: usize) -> Buffer {
        // Others are the allocator's affair.
        let size = if KEPT_SIZES.contains(&len) { len.next_power_of_two() } else { len };
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let fitting = kept.iter().rposition(|memory| memory.bytes.len() == size).map(|number| kept.remove(number));
        drop(kept);
        let mut memory = fitting.unwrap_or_else(|| Memory { bytes: vec![0; size], used: 0 });
        memory.used = memory.used.max(len);
        Buffer { memory, len, home: self.clone() }
    }
}

impl Buffer {
    /// Leaves away what comes after so many bytes.
    pub(super) fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Bytes to be shared and read.
    pub(super) fn freeze(self) -> Bytes {
        Bytes::from_owner(self)
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.memory.bytes[..self.len]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory.bytes[..self.len]
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let memory = std::mem::take(&mut self.memory);
        if !KEPT_SIZES.contains(&memory.bytes.len()) {
            return;
        }
        let mut kept = self.home.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.push(memory);
        // What was not asked for again is the oldest.
        let mut num_bytes: usize = kept.iter().map(|memory| memory.used).sum();
        let mut surplus = 0;
        while num_bytes > KEPT_BYTES {
            num_bytes -= kept[surplus].used;
            surplus += 1;
        }
        kept.drain(..surplus);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(buffers: &Buffers) -> Vec<usize> {
        buffers.0.lock().unwrap().iter().map(|memory| memory.used).collect()
    }

    #[test]
    fn memory_is_used_again_by_what_fits_into_it() {
        let buffers = Buffers::default();
        let mut first = buffers.take(5 << 20);
        first.fill(7);
        let bytes = first.freeze();
        let (place, slice) = (bytes.as_ptr(), bytes.slice(1000..2000));
        drop(bytes);
        assert!(kept(&buffers).is_empty(), "a part of it is read");
        assert!(slice.iter().all(|byte| *byte == 7) && slice.len() == 1000);
        drop(slice);
        assert_eq!(kept(&buffers), [5 << 20]);

        // Too large for it, too small for it, and a little larger and smaller than what was in it.
        drop((buffers.take(KEPT_BYTES + 1), buffers.take(4 << 20), buffers.take(10)));
        assert_eq!(buffers.take(10).len(), 10);
        let larger = buffers.take((5 << 20) + 5);
        assert_eq!((larger.as_ptr(), larger.len()), (place, (5 << 20) + 5));
        drop(larger);
        let mut smaller = buffers.take((5 << 20) - 5);
        assert_eq!((smaller.as_ptr(), smaller.len()), (place, (5 << 20) - 5));
        smaller.truncate(3);
        assert_eq!(smaller.freeze().len(), 3);
        assert_eq!(kept(&buffers).last(), Some(&((5 << 20) + 5)));
    }

    #[test]
    fn what_is_kept_is_bounded_and_the_newest() {
        let buffers = Buffers::default();
        drop((buffers.take(LARGE_BYTES - 1), buffers.take(KEPT_BYTES + 1)));
        assert!(kept(&buffers).is_empty());
        let sizes = [10 << 20, 8 << 20, 16 << 20, 12 << 20];
        let taken = sizes.map(|size| buffers.take(size));
        drop(taken);
        assert_eq!(kept(&buffers), [16 << 20, 12 << 20]);
    }
}
