//! Feature vectors and tensors: rows that are numbers already, so that nothing is decoded.
//!
//! A [`Tensor`] is what a row of a list column holds. [`FeatureNormalizer`] judges whether it is what a model takes, and makes the numbers of
//! the model's input tensor of it, as [`crate::decode::Normalizer`] does of pixels.

use arrow::buffer::Buffer;

use crate::decode::{NormalizeError, Reject};

/// The numbers of one row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tensor {
    /// Lengths of the lists that the numbers lay in, outermost first.
    pub shape: Vec<usize>,
    /// The numbers in order, the last axis fastest, as little-endian 32-bit floats. They are the row's content: what is hashed, and what a
    /// golden row of a model package holds.
    pub bytes: Buffer,
}

impl Tensor {
    /// Puts numbers into a row.
    pub fn new(shape: Vec<usize>, values: &[f32]) -> Self {
        let mut bytes = Vec::with_capacity(size_of_val(values));
        for value in values {
            bytes.extend_from_slice(&value.to_le_bytes());
        }
        Self { shape, bytes: bytes.into() }
    }

    /// Numbers that lie one after the other. Bytes at the end that make no whole number count as one, so that no length fits by chance.
    pub fn flat(bytes: Buffer) -> Self {
        Self { shape: vec![bytes.len().div_ceil(size_of::<f32>())], bytes }
    }

    /// The numbers.
    pub fn values(&self) -> impl Iterator<Item = f32> {
        self.bytes.as_chunks().0.iter().copied().map(f32::from_le_bytes)
    }
}

/// A shape as people write it: `8 x 8`.
pub fn shape_text(shape: &[usize]) -> String {
    shape.iter().map(usize::to_string).collect::<Vec<_>>().join(" x ")
}

/// Whether rows whose lists have the lengths `found` can be what a model of this shape takes. `None` is a length that differs from row to row.
///
/// A flat list is taken in order, the last axis fastest. Lists of lists must have the model's axes, of which those of length 1, such as the
/// one channel of a spectrogram, may be left out.
pub fn fits(shape: &[usize], found: &[Option<usize>]) -> bool {
    if let [len] = found {
        return len.is_none_or(|len| len == shape.iter().product::<usize>());
    }
    let wide: Vec<usize> = shape.iter().copied().filter(|len| *len != 1).collect();
    let are = |axes: &[usize]| {
        axes.len() == found.len() && axes.iter().zip(found).all(|(axis, found)| found.is_none_or(|len| len == *axis))
    };
    are(shape) || are(&wide)
}

/// Makes the numbers of an input tensor of a row's: `(value * scale - mean) / std`, each step rounded to `f32`, as numpy does it with `f32`
/// operands.
#[derive(Clone, Debug, PartialEq)]
pub struct FeatureNormalizer {
    shape: Vec<usize>,
    scale: f32,
    mean: Vec<f32>,
    std: Vec<f32>,
}

impl FeatureNormalizer {
    /// A normalizer of rows of this shape; `mean` and `std` hold one number, or one for each value of a row, on the scale after `scale`.
    ///
    /// # Errors
    /// A list has another length, a number is not finite, or a deviation is zero.
    pub fn new(shape: &[usize], scale: f32, mean: &[f32], std: &[f32]) -> Result<Self, NormalizeError> {
        let num_values = shape.iter().product();
        for (name, values) in [("mean", mean), ("std", std)] {
            if values.len() != 1 && values.len() != num_values {
                return Err(NormalizeError::Values { name, found: values.len(), num_values });
            }
        }
        NormalizeError::check_values(scale, mean, std)?;
        Ok(Self { shape: shape.to_vec(), scale, mean: mean.to_vec(), std: std.to_vec() })
    }

    /// Appends the input tensor of a row; nothing, where the row is not what the model takes.
    pub fn push_tensor(&self, row: &Tensor, tensors: &mut Vec<f32>) -> Result<(), Reject> {
        let lengths: Vec<Option<usize>> = row.shape.iter().copied().map(Some).collect();
        let num_values: usize = self.shape.iter().product();
        if !fits(&self.shape, &lengths) || row.bytes.len() != num_values * size_of::<f32>() {
            return Err(Reject::WrongShape { found: shape_text(&row.shape), expected: shape_text(&self.shape) });
        }
        let start = tensors.len();
        let moments = self.mean.iter().cycle().zip(self.std.iter().cycle());
        tensors.extend(row.values().zip(moments).map(|(value, (mean, std))| (value * self.scale - mean) / std));
        if let Some(place) = tensors[start..].iter().position(|value| !value.is_finite()) {
            tensors.truncate(start);
            let value = row.values().nth(place).unwrap_or(f32::NAN).to_string();
            return Err(Reject::NonFiniteInput { place, value });
        }
        Ok(())
    }

    /// The numbers of a row from an input tensor: the inverse of [`FeatureNormalizer::push_tensor`], up to rounding.
    pub fn features(&self, tensor: &[f32]) -> Vec<f32> {
        let moments = self.mean.iter().cycle().zip(self.std.iter().cycle());
        tensor.iter().zip(moments).map(|(value, (mean, std))| (value * std + mean) / self.scale).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn normalizer(shape: &[usize]) -> FeatureNormalizer {
        FeatureNormalizer::new(shape, 1.0, &[0.0], &[1.0]).unwrap()
    }

    // numpy: `(x.astype(np.float32) * np.float32(0.1) - mean) / std` for x = 5, 7.7, -1.9, mean = 0.3, 0.2, 0.1 and std = 0.7, 0.5, 3.
    #[test]
    fn normalized_numbers_equal_those_of_numpy() {
        let normalizer = FeatureNormalizer::new(&[3], 0.1, &[0.3, 0.2, 0.1], &[0.7, 0.5, 3.0]).unwrap();
        let row = Tensor::new(vec![3], &[5.0, 7.7, -1.9]);
        let mut tensors = vec![9.0];
        normalizer.push_tensor(&row, &mut tensors).unwrap();
        assert_eq!(
            tensors[1..].iter().map(|value| value.to_bits()).collect::<Vec<_>>(),
            [0x3E92_4924, 0x3F91_EB85, 0xBDC5_F92C]
        );
        for (found, value) in normalizer.features(&tensors[1..]).into_iter().zip(row.values()) {
            assert!((found - value).abs() < 1e-5, "{found} is not {value}");
        }
    }

    #[test]
    fn one_mean_and_deviation_stand_for_all_values() {
        let one = FeatureNormalizer::new(&[2, 2], 2.0, &[1.0], &[4.0]).unwrap();
        let each = FeatureNormalizer::new(&[2, 2], 2.0, &[1.0; 4], &[4.0; 4]).unwrap();
        let row = Tensor::new(vec![4], &[0.5, 1.5, -2.0, 8.0]);
        let tensor = |normalizer: &FeatureNormalizer| {
            let mut tensor = Vec::new();
            normalizer.push_tensor(&row, &mut tensor).unwrap();
            tensor
        };
        assert_eq!(tensor(&one), [0.0, 0.5, -1.25, 3.75]);
        assert_eq!(tensor(&one), tensor(&each));
    }

    #[test]
    fn a_row_that_the_model_does_not_take_is_rejected_and_leaves_nothing_behind() {
        let normalizer = normalizer(&[2, 3]);
        let mut tensors = vec![7.0];
        let mut rejected = |row: Tensor| normalizer.push_tensor(&row, &mut tensors).unwrap_err();
        let wrong = rejected(Tensor::new(vec![5], &[0.0; 5]));
        assert_eq!(wrong.code(), "wrong_shape");
        assert_eq!(wrong.to_string(), "the row is of 5 values, and the model takes 2 x 3");
        // As many values, in other lists.
        assert_eq!(rejected(Tensor::new(vec![3, 2], &[0.0; 6])).code(), "wrong_shape");
        assert_eq!(rejected(Tensor::new(vec![0], &[])).code(), "wrong_shape");
        assert_eq!(rejected(Tensor::flat(Buffer::from(vec![0_u8; 23]))).code(), "wrong_shape");
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let reject = rejected(Tensor::new(vec![6], &[0.0, 0.0, 0.0, value, 0.0, 0.0]));
            assert_eq!(reject, Reject::NonFiniteInput { place: 3, value: value.to_string() });
        }
        assert_eq!(tensors, [7.0]);
        // Finite by itself, and not after the division.
        let steep = FeatureNormalizer::new(&[1], 1.0, &[0.0], &[1e-10]).unwrap();
        let reject = steep.push_tensor(&Tensor::new(vec![1], &[1e30]), &mut tensors).unwrap_err();
        assert_eq!(reject.code(), "non_finite_input");
    }

    #[test]
    fn lists_fit_by_their_axes_and_flat_lists_by_their_length() {
        let some = |lengths: &[usize]| lengths.iter().copied().map(Some).collect::<Vec<_>>();
        // With a model of 2 x 3, and with one of 1 x 2 x 3.
        for (found, of_two, of_three) in [
            (some(&[6]), true, true),
            (some(&[7]), false, false),
            (some(&[2, 3]), true, true),
            (some(&[3, 2]), false, false),
            (some(&[1, 6]), false, false),
            (some(&[1, 2, 3]), false, true),
            (some(&[2, 1, 3]), false, false),
            (vec![None], true, true),
            (vec![None, None], true, true),
            (vec![None, Some(3)], true, true),
            (vec![None, Some(4)], false, false),
            (vec![None, None, None], false, true),
            (vec![None; 4], false, false),
        ] {
            assert_eq!(fits(&[2, 3], &found), of_two, "{found:?}");
            assert_eq!(fits(&[1, 2, 3], &found), of_three, "{found:?}");
        }
        // A vector is no list of lists.
        assert!(fits(&[6], &[None]) && !fits(&[6], &some(&[2, 3])));
    }

    #[test]
    fn a_normalization_without_numbers_is_refused() {
        let new = |scale, mean: &[f32], std: &[f32]| FeatureNormalizer::new(&[2, 2], scale, mean, std).err();
        assert_eq!(new(1.0, &[0.0; 4], &[1.0]), None);
        assert_eq!(new(1.0, &[0.0; 2], &[1.0]), Some(NormalizeError::Values { name: "mean", found: 2, num_values: 4 }));
        assert_eq!(new(1.0, &[0.0], &[]), Some(NormalizeError::Values { name: "std", found: 0, num_values: 4 }));
        assert!(new(1.0, &[0.0], &[0.0]).is_some() && new(f32::NAN, &[0.0], &[1.0]).is_some());
    }
}
