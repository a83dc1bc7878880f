//! Memory for the bytes of a file, used again.
//!
//! A table of images is megabytes that come and go by the second. Memory of that size is the system's, which hands it out page by page, each
//! cleared and each a fault, and takes longer for that than reading takes. So what was given back is kept for a moment: whoever reads ahead
//! asks for as much again at once.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;

use crate::memory::LARGE_BYTES;

/// Bytes that are kept at most while nobody has them: a block of the largest kind.
const KEPT_BYTES: usize = 16 << 20;

/// Buffers that were given back. Clones share them.
#[derive(Debug, Clone, Default)]
pub(super) struct Buffers(Arc<Mutex<Vec<Vec<u8>>>>);

/// Bytes that can be written as long as nobody reads them; their memory goes back to where it is from.
#[derive(Debug)]
pub(super) struct Buffer {
    bytes: Vec<u8>,
    len: usize,
    home: Buffers,
}

impl Buffers {
    /// A buffer of so many bytes, whatever these are.
    pub(super) fn take(&self, len: usize) -> Buffer {
        // Smaller ones are the allocator's affair; of the others, those that differ by little fit into each other's memory.
        let size = if len < LARGE_BYTES { len } else { len.next_multiple_of(LARGE_BYTES) };
        let fits = |kept: &Vec<u8>| (size..=size.saturating_mul(2)).contains(&kept.len());
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let best = (0..kept.len()).filter(|number| fits(&kept[*number])).min_by_key(|number| kept[*number].len());
        let fitting = best.map(|number| kept.remove(number));
        drop(kept);
        let bytes = fitting.unwrap_or_else(|| vec![0; size]);
        Buffer { bytes, len, home: self.clone() }
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
        &self.bytes[..self.len]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[..self.len]
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let bytes = std::mem::take(&mut self.bytes);
        if bytes.len() < LARGE_BYTES || bytes.len() > KEPT_BYTES {
            return;
        }
        let mut kept = self.home.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.push(bytes);
        // What was not asked for again is the oldest.
        let mut num_bytes: usize = kept.iter().map(Vec::len).sum();
        let mut surplus = 0;
        while num_bytes > KEPT_BYTES {
            num_bytes -= kept[surplus].len();
            surplus += 1;
        }
        kept.drain(..surplus);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(buffers: &Buffers) -> Vec<usize> {
        buffers.0.lock().unwrap().iter().map(Vec::len).collect()
    }

    #[test]
    fn memory_is_used_again_by_what_fits_into_it() {
        let buffers = Buffers::default();
        let mut first = buffers.take(4 << 20);
        first.fill(7);
        let bytes = first.freeze();
        let (place, slice) = (bytes.as_ptr(), bytes.slice(1000..2000));
        drop(bytes);
        assert!(kept(&buffers).is_empty(), "a part of it is read");
        assert!(slice.iter().all(|byte| *byte == 7) && slice.len() == 1000);
        drop(slice);
        assert_eq!(kept(&buffers), [4 << 20]);

        // Too large for it, far too small for it, and a little smaller than it.
        drop((buffers.take((4 << 20) + 1), buffers.take(1 << 20), buffers.take(10)));
        assert_eq!(buffers.take(10).len(), 10);
        let mut again = buffers.take((4 << 20) - 5);
        assert_eq!((again.as_ptr(), again.len()), (place, (4 << 20) - 5));
        again.truncate(3);
        assert_eq!(again.freeze().len(), 3);
    }

    #[test]
    fn what_is_kept_is_bounded_and_the_newest() {
        let buffers = Buffers::default();
        drop((buffers.take(LARGE_BYTES - 1), buffers.take(KEPT_BYTES + 1)));
        assert!(kept(&buffers).is_empty());
        let sizes = [5 << 20, 4 << 20, 8 << 20, 6 << 20];
        let taken = sizes.map(|size| buffers.take(size));
        drop(taken);
        assert_eq!(kept(&buffers), [8 << 20, 6 << 20]);
    }
}
