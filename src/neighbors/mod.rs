//! Nearest neighbors: vectors in, lists of the nearest rows out. The mathematics alone; tables are read and written by
//! [`crate::stages::neighbors`].

pub mod buckets;
pub mod cells;
pub mod exact;
pub mod topk;

/// What the tests of the searches share.
#[cfg(test)]
mod testing {
    use ndarray::Array2;

    use super::exact::Metric;
    use crate::random::SplitMix64;

    pub(super) const METRICS: [Metric; 3] = [Metric::Cosine, Metric::L2, Metric::InnerProduct];

    /// Uniform in [-1, 1), the same on every machine.
    pub(super) fn random(num_rows: usize, dim: usize, seed: u64) -> Array2<f32> {
        let mut random = SplitMix64(seed);
        Array2::from_shape_simple_fn((num_rows, dim), || random.uniform())
    }
}
