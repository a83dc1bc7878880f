//! A bounded choice among rows that stream by, which is the same whatever their order: those whose keys have the smallest hashes.

use std::collections::BTreeMap;

use sha2::{Digest as _, Sha256};

/// Where a row stands.
type Place = (u64, String);

/// At most so many rows of those that were handed in, by key.
#[derive(Debug, Clone)]
pub struct KeyedSample<T> {
    max_rows: usize,
    rows: BTreeMap<Place, T>,
}

impl<T> KeyedSample<T> {
    /// A sample that keeps at most `max_rows` rows.
    pub fn new(max_rows: usize) -> Self {
        Self { max_rows, rows: BTreeMap::new() }
    }

    /// Hands in a row, by a key that no other row has. Of two samples of different size that were handed the same keys, the larger one
    /// begins with the rows of the smaller one.
    pub fn push(&mut self, key: &str, row: impl FnOnce() -> T) {
        let hash = Sha256::digest(key).iter().take(size_of::<u64>()).fold(0, |hash, byte| hash << 8 | u64::from(*byte));
        let place = (hash, key.to_owned());
        if self.rows.len() >= self.max_rows && self.rows.last_key_value().is_none_or(|(last, _)| place > *last) {
            return;
        }
        self.rows.insert(place, row());
        if self.rows.len() > self.max_rows {
            self.rows.pop_last();
        }
    }

    /// Rows kept.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether no row was kept.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// The rows, in an order that their keys alone determine.
    pub fn rows(&self) -> impl Iterator<Item = &T> {
        self.rows.values()
    }

    /// The same rows, given away.
    pub fn into_rows(self) -> impl Iterator<Item = T> {
        self.rows.into_values()
    }

    /// The hashes of the rows' keys, in the same order.
    pub fn hashes(&self) -> impl Iterator<Item = u64> {
        self.rows.keys().map(|(hash, _)| *hash)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampled(max_rows: usize, keys: impl Iterator<Item = u32>) -> Vec<u32> {
        let mut sample = KeyedSample::new(max_rows);
        keys.for_each(|key| sample.push(&key.to_string(), || key));
        assert_eq!(sample.hashes().count(), sample.len());
        sample.rows().copied().collect()
    }

    #[test]
    fn the_order_in_which_rows_come_changes_nothing() {
        let forwards = sampled(10, 0..1000);
        assert_eq!(forwards.len(), 10);
        assert_eq!(sampled(10, (0..1000).rev()), forwards);
        assert_ne!(sampled(10, 1..1001), (1..11).collect::<Vec<_>>());
    }

    #[test]
    fn a_larger_sample_begins_with_the_smaller_one() {
        let (small, large) = (sampled(10, 0..1000), sampled(100, 0..1000));
        assert_eq!(large[..10], small[..]);
        assert!(sampled(0, 0..5).is_empty());
        assert_eq!(sampled(10, 0..5).len(), 5);
    }
}
