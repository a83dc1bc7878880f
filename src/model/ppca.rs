//! Probabilistic PCA: the linear variational autoencoder, learned in closed form and exported as ONNX.
//!
//! M. E. Tipping and C. M. Bishop, "Probabilistic Principal Component Analysis", Journal of the Royal Statistical
//! Society B 61(3), 1999 ("T&B" below), model a row `x` of `dim` values by `latent_dim` latents `z`:
//!
//! ```text
//! z ~ N(0, I)        x | z ~ N(W z + mean, σ² I)
//! ```
//!
//! Maximum likelihood (T&B, section 3.2; the rotation R is I) takes the eigenvalues λ and orthonormal eigenvectors U of
//! the covariance matrix: σ² is the mean of the `dim - latent_dim` smallest eigenvalues, and
//!
//! ```text
//! W = U (Λ - σ² I)^½                                   U: dim x latent_dim, Λ = diag(λ), largest first
//! M = Wᵀ W + σ² I = Λ
//! z | x ~ N(mu(x), σ² M⁻¹)    mu(x) = M⁻¹ Wᵀ (x - mean)    logvar_i = ln(σ² / λ_i), the same for every x
//! reconstruction(x) = W (Wᵀ W)⁻¹ M mu(x) + mean = U Uᵀ (x - mean) + mean                (T&B, section 3.3)
//! ```
//!
//! The reconstruction is the one with the least squared error, the orthogonal projection that PCA calls by this name.
//! It is not `W mu(x) + mean`: the posterior mean is drawn toward zero. [`Ppca::decoder_onnx`] is `W z + mean`, the mean
//! of `x` given `z`, which is what sampling needs.
//!
//! Variances divide by `num_rows - 1`, as scikit-learn's `PCA` does; T&B divide by `num_rows`. With fewer rows than
//! values in a row (`n < dim`) scikit-learn's `noise_variance_` is larger than ours: it takes the mean over the
//! `n - latent_dim` eigenvalues that its SVD yields, T&B over all `dim - latent_dim`.
//!
//! This file knows rows of numbers. How an image, or features, become a row is the preprocessing's matter, and running the exported
//! model is the session's.

use std::iter;

use faer::diag::Diag;
use faer::dyn_stack::{MemBuffer, MemStack, StackReq};
use faer::linalg::evd::{self, ComputeEigenvectors};
use faer::linalg::householder;
use faer::linalg::matmul::matmul;
use faer::linalg::matmul::triangular::{self, BlockStructure};
use faer::linalg::qr::no_pivoting::factor as qr;
use faer::prelude::{Reborrow, ReborrowMut};
use faer::{Accum, Col, ColMut, Conj, Mat, MatMut, MatRef, Par, Spec};
use prost::Message;

use super::onnx_proto::{GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto};
use crate::features::shape_text;
use crate::random::SplitMix64;

/// Longest row that is accepted, for example 128x128 gray: its covariance matrix takes 2 GiB.
pub const MAX_DIM: usize = 16_384;

/// Rows that go into the covariance matrix at a time. Enough for the matrix product to run at full speed; 50 MB at a
/// dim of 12,288 (64x64 RGB).
const ROWS_PER_BLOCK: usize = 512;

/// Up to this dim all eigenpairs are computed, which then takes less than a second; beyond it only those wanted.
const MAX_DENSE_DIM: usize = 1024;

/// Vectors that go through the covariance matrix at a time in [`block_lanczos`]. Fewer converge in fewer products of a
/// vector; more make better use of each reading of the matrix from memory.
const LANCZOS_BLOCK: usize = 64;

/// Least number of blocks by which [`block_lanczos`] grows its basis between restarts.
const MIN_LANCZOS_STEPS: usize = 8;

/// Restarts after which [`block_lanczos`] gives up. Images of up to 64x64 RGB took at most 3, white noise of that size 9.
const MAX_LANCZOS_RESTARTS: usize = 100;

/// Largest `‖C u - λ u‖ / λ_1` of an eigenpair that counts as converged: three digits above rounding. The angle to the
/// true subspace is at most about this times `λ_1 / (λ_k - λ_k+1)`, which on images is 10⁴ to 10⁶ for 32 to 256
/// components.
const RESIDUAL_TOLERANCE: f64 = 1e-12;

/// How the small dense factorizations run. faer's QR and eigendecomposition round differently with another number of
/// threads; its matrix products, where the time goes, do not.
const SEQUENTIAL: Par = Par::Seq;

/// Why a model could not be learned or exported.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PpcaError {
    /// Rows are empty or too long for a covariance matrix in memory.
    #[error(
        "rows of {dim} values cannot be learned: the covariance matrix of {dim} x {dim} is kept in memory, so that 1 to \
         {MAX_DIM} values are accepted; resize images to fewer pixels, such as 64x64, or give fewer features"
    )]
    Dim {
        /// Values in a row.
        dim: usize,
    },
    /// A slice that is not a whole number of rows was pushed.
    #[error("{num_values} values are not a whole number of rows of {dim} values")]
    PartialRow {
        /// Values pushed.
        num_values: usize,
        /// Values in a row.
        dim: usize,
    },
    /// A value is NaN or infinite.
    #[error("value {column} of row {row} is {value}, not a finite number; leave this row out")]
    NonFinite {
        /// Row, counted from 0 over all rows pushed.
        row: usize,
        /// Place in the row, counted from 0.
        column: usize,
        /// The value.
        value: f32,
    },
    /// The rows are too few for any component and some noise.
    #[error("{num_rows} rows of {dim} values are too few: at least 3 rows of 2 values are needed")]
    TooFewRows {
        /// Rows pushed.
        num_rows: usize,
        /// Values in a row.
        dim: usize,
    },
    /// No such number of components can be told from noise.
    #[error(
        "latent_dim {latent_dim} cannot be learned from {num_rows} rows of {dim} values: 1 to {largest} can, since \
         centered rows span at most min(dim, num_rows - 1) directions and one must be left for the noise; lower \
         latent_dim or give more rows"
    )]
    LatentDim {
        /// Components asked for.
        latent_dim: usize,
        /// Rows pushed.
        num_rows: usize,
        /// Values in a row.
        dim: usize,
        /// Most components that can be learned.
        largest: usize,
    },
    /// All rows are the same.
    #[error(
        "all {num_rows} rows are the same: there is no variance to learn from; check the source and its preprocessing"
    )]
    NoVariance {
        /// Rows pushed.
        num_rows: usize,
    },
    /// The components explain the rows without remainder, so that σ² would be zero.
    #[error("{latent_dim} components explain all variance of the rows and leave none for the noise; lower latent_dim")]
    NoNoise {
        /// Components asked for.
        latent_dim: usize,
    },
    /// The iteration for the eigenvectors did not reach its tolerance.
    #[error(
        "the first {latent_dim} eigenvectors of the covariance matrix did not converge: after {restarts} restarts the \
         largest residual is {residual:e} of the largest eigenvalue; try another latent_dim"
    )]
    NotConverged {
        /// Components asked for.
        latent_dim: usize,
        /// Restarts made.
        restarts: usize,
        /// Largest `‖C u - λ u‖ / λ_1` among the eigenpairs wanted.
        residual: f64,
    },
    /// The eigendecomposition of a small dense matrix failed.
    #[error("the eigendecomposition of a matrix of {dim} x {dim} did not converge; check the rows for extreme values")]
    Eigendecomposition {
        /// Rows of the matrix.
        dim: usize,
    },
    /// The shape does not hold as many values as a row.
    #[error("a tensor of {shape} does not have the {dim} values that the model was learned from")]
    Shape {
        /// The shape.
        shape: String,
        /// Values in a row.
        dim: usize,
    },
}

/// Mean and covariance of a stream of rows.
///
/// Rows are buffered to blocks of a fixed size, so the result depends on the rows and their order, not on how many come
/// with a push. Nor does the number of threads matter; another kind of processor may round differently.
///
/// Sums are of 64-bit floats about the mean of the first block, so that nearly equal large numbers are not subtracted
/// (T. F. Chan, G. H. Golub and R. J. `LeVeque`, "Algorithms for Computing the Sample Variance", The American
/// Statistician 37(3), 1983: shifted data).
///
/// # Memory
/// `8 dim²` bytes for the matrix, of which one triangle is filled, and `8 dim` bytes for each of 512 buffered rows: for
/// 64x64 RGB (dim 12,288) 1.21 GB and 50 MB. The number of rows has no influence.
#[derive(Debug)]
pub struct MomentAccumulator {
    dim: usize,
    num_rows: usize,
    /// Mean of the first block; empty before that.
    shift: Vec<f64>,
    /// Sum of `x - shift`.
    sum: Col<f64>,
    /// Lower triangle of the sum of `(x - shift)(x - shift)ᵀ`.
    scatter: Mat<f64>,
    /// Rows of the block that is being filled, row-major.
    pending: Vec<f64>,
}

impl MomentAccumulator {
    /// An accumulator of no rows yet, for rows of `dim` values (1 to [`MAX_DIM`]).
    pub fn new(dim: usize) -> Result<Self, PpcaError> {
        if !(1..=MAX_DIM).contains(&dim) {
            return Err(PpcaError::Dim { dim });
        }
        Ok(Self {
            dim,
            num_rows: 0,
            shift: Vec::new(),
            sum: Col::zeros(dim),
            scatter: Mat::zeros(dim, dim),
            pending: Vec::with_capacity(ROWS_PER_BLOCK * dim),
        })
    }

    /// Adds rows: any number of them, each of `dim` values, one after the other.
    ///
    /// When a value is not finite, or the last row is not whole, none of the rows is added.
    pub fn push(&mut self, rows: &[f32]) -> Result<(), PpcaError> {
        if !rows.len().is_multiple_of(self.dim) {
            return Err(PpcaError::PartialRow { num_values: rows.len(), dim: self.dim });
        }
        if let Some(place) = rows.iter().position(|value| !value.is_finite()) {
            let (row, column) = (self.num_rows + place / self.dim, place % self.dim);
            return Err(PpcaError::NonFinite { row, column, value: rows[place] });
        }
        for row in rows.chunks_exact(self.dim) {
            self.pending.extend(row.iter().copied().map(f64::from));
            self.num_rows += 1;
            if self.num_rows.is_multiple_of(ROWS_PER_BLOCK) {
                self.add_pending();
            }
        }
        Ok(())
    }

    /// Rows added so far.
    pub fn num_rows(&self) -> usize {
        self.num_rows
    }

    /// Divides what the rows deviate from their mean by the standard deviation of each value, and returns the means and the deviations: the
    /// moments are then those of `(x - mean) / std`. Needs at least one row, and is the last that happens to the rows before [`fit`].
    ///
    /// The sum of squares is divided by the number of rows, as `StandardScaler` of scikit-learn does it; and as there, a value that is the same
    /// in all rows, but for rounding, keeps its unit. Means and deviations are rounded to 32 bits first, so that whoever applies them gets
    /// what was learned.
    pub fn standardize(&mut self) -> Vec<(f32, f32)> {
        if !self.pending.is_empty() {
            self.add_pending();
        }
        let num_rows = self.num_rows as f64;
        // Of a constant, all that deviates is rounding, and is left out.
        let mut factors = vec![0.0; self.dim];
        let moments: Vec<(f32, f32)> = (0..self.dim)
            .map(|column| {
                let mean_from_shift = self.sum[column] / num_rows;
                let mean = self.shift[column] + mean_from_shift;
                let variance = self.scatter[(column, column)] / num_rows - mean_from_shift * mean_from_shift;
                let rounding = num_rows * f64::EPSILON;
                let is_constant = variance <= rounding * variance + (rounding * mean).powi(2);
                #[expect(clippy::cast_possible_truncation, reason = "the network's input is of 32-bit floats")]
                let (mean, std) = (mean as f32, variance.sqrt() as f32);
                // Too small, or too large, for 32 bits is no unit either.
                if is_constant || !std.is_normal() {
                    return (mean, 1.0);
                }
                factors[column] = 1.0 / f64::from(std);
                (mean, std)
            })
            .collect();
        for (j, (mean, std)) in moments.iter().enumerate() {
            self.shift[j] = (self.shift[j] - f64::from(*mean)) / f64::from(*std);
            self.sum[j] *= factors[j];
            for i in j..self.dim {
                self.scatter[(i, j)] *= factors[i] * factors[j];
            }
        }
        moments
    }

    fn add_pending(&mut self) {
        let num_pending = self.pending.len() / self.dim;
        if self.shift.is_empty() {
            self.shift = vec![0.0; self.dim];
            for row in self.pending.chunks_exact(self.dim) {
                self.shift.iter_mut().zip(row).for_each(|(shift, value)| *shift += value / num_pending as f64);
            }
        }
        for row in self.pending.chunks_exact_mut(self.dim) {
            for ((value, shift), sum) in row.iter_mut().zip(&self.shift).zip(self.sum.iter_mut()) {
                *value -= shift;
                *sum += *value;
            }
        }
        let block = MatRef::from_row_major_slice(&self.pending, num_pending, self.dim);
        triangular::matmul(
            &mut self.scatter,
            BlockStructure::TriangularLower,
            Accum::Add,
            block.transpose(),
            BlockStructure::Rectangular,
            block,
            BlockStructure::Rectangular,
            1.0,
            Par::rayon(0),
        );
        self.pending.clear();
    }

    /// The mean and the covariance matrix (divided by `num_rows - 1`, both triangles), made in place of the sums.
    fn finish(mut self) -> (Vec<f64>, Mat<f64>) {
        if !self.pending.is_empty() {
            self.add_pending();
        }
        let num_rows = self.num_rows as f64;
        let mut covariance = self.scatter;
        for j in 0..self.dim {
            for i in j..self.dim {
                let scatter = covariance[(i, j)] - self.sum[i] * self.sum[j] / num_rows;
                covariance[(i, j)] = scatter / (num_rows - 1.0);
                covariance[(j, i)] = covariance[(i, j)];
            }
        }
        let mean = self.shift.iter().zip(self.sum.iter()).map(|(shift, sum)| shift + sum / num_rows).collect();
        (mean, covariance)
    }
}

/// A learned model; see the head of this file for its formulas.
#[derive(Clone, Debug)]
pub struct Ppca {
    /// Values in a row.
    pub dim: usize,
    /// Number of components.
    pub latent_dim: usize,
    /// Rows that it was learned from.
    pub num_rows: usize,
    /// Mean of the rows; `dim` values.
    pub mean: Vec<f64>,
    /// Orthonormal components Uᵀ, `latent_dim` x `dim`, row-major, those of the largest variance first. The entry of the
    /// largest magnitude of each is positive, since the sign is otherwise open.
    pub components: Vec<f64>,
    /// Variance along each component, λ, largest first; `latent_dim` values.
    pub explained_variance: Vec<f64>,
    /// Variance of the noise in every direction, σ²; positive.
    pub noise_variance: f64,
    /// Sum of the variances of all `dim` values.
    pub total_variance: f64,
}

/// What a model makes of one row.
#[derive(Clone, Debug, PartialEq)]
pub struct Inferred {
    /// Mean of the latents' posterior; `latent_dim` values.
    pub mu: Vec<f32>,
    /// Its log-variance; `latent_dim` values.
    pub logvar: Vec<f32>,
    /// The orthogonal projection; `dim` values.
    pub reconstruction: Vec<f32>,
}

/// Learns the maximum-likelihood model of `latent_dim` components from the rows pushed so far.
///
/// `latent_dim` must be less than both `dim` and `num_rows - 1`, since σ² is what the components leave over. The eigenpairs
/// wanted come from a block Lanczos iteration, which needs about `8 dim` bytes for each of `3 latent_dim + 700` vectors
/// beside the covariance matrix. Up to a dim of 1024, or for components that are more than a quarter of `dim`, they are
/// taken from the complete decomposition: five times the memory of the covariance matrix in all, on one thread.
///
/// Runs on the current rayon pool and blocks until it is done.
pub fn fit(moments: MomentAccumulator, latent_dim: usize) -> Result<Ppca, PpcaError> {
    let (dim, num_rows) = (moments.dim, moments.num_rows);
    if num_rows < 3 || dim < 2 {
        return Err(PpcaError::TooFewRows { num_rows, dim });
    }
    let largest = dim.min(num_rows - 1) - 1;
    if !(1..=largest).contains(&latent_dim) {
        return Err(PpcaError::LatentDim { latent_dim, num_rows, dim, largest });
    }

    let (mean, covariance) = moments.finish();
    let total_variance: f64 = covariance.diagonal().column_vector().iter().sum();
    let squared_mean: f64 = mean.iter().map(|value| value * value).sum();
    if total_variance <= dim as f64 * f64::EPSILON.powi(2) * squared_mean {
        return Err(PpcaError::NoVariance { num_rows });
    }

    let Eigenpairs { values: explained_variance, vectors } = top_eigenpairs(covariance.as_ref(), latent_dim)?;
    let left_over = total_variance - explained_variance.iter().sum::<f64>();
    // What the subtraction rounds to when nothing is left.
    if left_over <= dim as f64 * f64::EPSILON * total_variance {
        return Err(PpcaError::NoNoise { latent_dim });
    }
    Ok(Ppca {
        dim,
        latent_dim,
        num_rows,
        mean,
        components: (0..latent_dim).flat_map(|i| with_fixed_sign(vectors.col_as_slice(i))).collect(),
        explained_variance,
        noise_variance: left_over / (dim - latent_dim) as f64,
        total_variance,
    })
}

/// The vector or its negative: the one whose entry of the largest magnitude (the first of several) is positive.
fn with_fixed_sign(vector: &[f64]) -> impl Iterator<Item = f64> {
    let largest =
        vector.iter().fold(0.0_f64, |largest, &value| if value.abs() > largest.abs() { value } else { largest });
    vector.iter().map(move |value| value * largest.signum())
}

impl Ppca {
    /// What the model makes of one row of `dim` values, by the formulas at the head of this file in double precision: the outputs
    /// that the network of [`Ppca::vae_onnx`] must give.
    pub fn infer(&self, row: &[f32]) -> Inferred {
        let centered: Vec<f64> = iter::zip(row, &self.mean).map(|(value, mean)| f64::from(*value) - mean).collect();
        let mut reconstruction = self.mean.clone();
        let mut mu = Vec::with_capacity(self.latent_dim);
        let variances = iter::zip(&self.explained_variance, self.signal_std());
        for (component, (variance, std)) in iter::zip(self.components.chunks_exact(self.dim), variances) {
            let projection: f64 = iter::zip(component, &centered).map(|(u, x)| u * x).sum();
            mu.push(projection * std / variance);
            for (value, u) in iter::zip(&mut reconstruction, component) {
                *value += projection * u;
            }
        }
        let logvar = self.explained_variance.iter().map(|variance| (self.noise_variance / variance).ln());
        Inferred {
            logvar: to_f32(logvar).collect(),
            mu: to_f32(mu.into_iter()).collect(),
            reconstruction: to_f32(reconstruction.into_iter()).collect(),
        }
    }

    /// The ONNX model `input` -> `mu`, `logvar`, `reconstruction`, for tensors of a shape, such as channels, height and width of images.
    ///
    /// All are 32-bit floats with a dynamic first dimension `batch`: the input and its reconstruction `[batch, shape…]`, the others
    /// `[batch, latent_dim]`. The shape is that from which the rows were flattened.
    pub fn vae_onnx(&self, input: &str, shape: &[usize]) -> Result<Vec<u8>, PpcaError> {
        self.check_shape(shape)?;
        let latent_shape = [self.latent_dim];
        let posterior_gain =
            iter::zip(&self.explained_variance, self.signal_std()).map(|(variance, std)| std / variance);
        let logvar = self.explained_variance.iter().map(|variance| (self.noise_variance / variance).ln());
        let graph = GraphProto {
            name: "ppca_vae".to_owned(),
            node: vec![
                NodeProto::new("Flatten", &[input], &["row"]),
                // Folded into the bias of the Gemm this would be 5 % faster, and round off twice as much.
                NodeProto::new("Sub", &["row", "mean"], &["centered"]),
                // Uᵀ (x - mean), which is both what mu is scaled from and what the reconstruction is made of.
                NodeProto::new("Gemm", &["centered", "components"], &["projection"]).with_int("transB", 1),
                NodeProto::new("Mul", &["projection", "posterior_gain"], &["mu"]),
                NodeProto::new("Shape", &["mu"], &["latent_shape"]),
                NodeProto::new("Expand", &["posterior_logvar", "latent_shape"], &["logvar"]),
                NodeProto::new("Gemm", &["projection", "components", "mean"], &["reconstructed_row"]),
                NodeProto::new("Reshape", &["reconstructed_row", "image_shape"], &["reconstruction"]),
            ],
            initializer: vec![
                TensorProto::float("mean", &[self.dim], to_f32(self.mean.iter().copied())),
                TensorProto::float("components", &[self.latent_dim, self.dim], to_f32(self.components.iter().copied())),
                TensorProto::float("posterior_gain", &latent_shape, to_f32(posterior_gain)),
                TensorProto::float("posterior_logvar", &[1, self.latent_dim], to_f32(logvar)),
                shape_tensor(shape),
            ],
            input: vec![ValueInfoProto::float_batch(input, "batch", shape)],
            output: vec![
                ValueInfoProto::float_batch("mu", "batch", &latent_shape),
                ValueInfoProto::float_batch("logvar", "batch", &latent_shape),
                ValueInfoProto::float_batch("reconstruction", "batch", shape),
            ],
            ..GraphProto::default()
        };
        Ok(self.model_bytes(graph))
    }

    /// The ONNX model `z` -> `reconstruction`: `W z + mean`, the mean of the rows whose latents are `z`.
    ///
    /// Shapes and types are those of [`Ppca::vae_onnx`], with `z` as `mu`. For `z` drawn from N(0, I), rows of the learned
    /// distribution are the result plus noise of variance σ² in every value.
    pub fn decoder_onnx(&self, shape: &[usize]) -> Result<Vec<u8>, PpcaError> {
        self.check_shape(shape)?;
        let weights = iter::zip(self.components.chunks_exact(self.dim), self.signal_std())
            .flat_map(|(component, std)| component.iter().map(move |value| value * std));
        let graph = GraphProto {
            name: "ppca_decoder".to_owned(),
            node: vec![
                NodeProto::new("Gemm", &["z", "weights", "mean"], &["reconstructed_row"]),
                NodeProto::new("Reshape", &["reconstructed_row", "image_shape"], &["reconstruction"]),
            ],
            initializer: vec![
                TensorProto::float("weights", &[self.latent_dim, self.dim], to_f32(weights)),
                TensorProto::float("mean", &[self.dim], to_f32(self.mean.iter().copied())),
                shape_tensor(shape),
            ],
            input: vec![ValueInfoProto::float_batch("z", "batch", &[self.latent_dim])],
            output: vec![ValueInfoProto::float_batch("reconstruction", "batch", shape)],
            ..GraphProto::default()
        };
        Ok(self.model_bytes(graph))
    }

    /// `(λ_i - σ²)^½`, the length of column i of W. σ² is a mean of eigenvalues that are at most `λ_i`; when all are equal,
    /// rounding may make the difference negative, and the column is zero.
    fn signal_std(&self) -> impl Iterator<Item = f64> {
        self.explained_variance.iter().map(|variance| (variance - self.noise_variance).max(0.0).sqrt())
    }

    fn check_shape(&self, shape: &[usize]) -> Result<(), PpcaError> {
        let num_values = shape.iter().try_fold(1, |size: usize, len| size.checked_mul(*len));
        if num_values != Some(self.dim) {
            return Err(PpcaError::Shape { shape: shape_text(shape), dim: self.dim });
        }
        Ok(())
    }

    fn model_bytes(&self, graph: GraphProto) -> Vec<u8> {
        let model = ModelProto {
            producer_name: env!("CARGO_PKG_NAME").to_owned(),
            producer_version: env!("CARGO_PKG_VERSION").to_owned(),
            doc_string: format!(
                "Probabilistic PCA (Tipping and Bishop, 1999): {} components of {} values, learned from {} rows; they \
                 explain {:.2} % of the variance, noise variance {:e}",
                self.latent_dim,
                self.dim,
                self.num_rows,
                100.0 * self.explained_variance.iter().sum::<f64>() / self.total_variance,
                self.noise_variance,
            ),
            ..ModelProto::of(graph)
        };
        model.encode_to_vec()
    }
}

/// The target of a Reshape from rows to tensors; 0 keeps the first dimension, so that an empty batch works too.
fn shape_tensor(shape: &[usize]) -> TensorProto {
    TensorProto::int64_vector("image_shape", &[&[0], shape].concat())
}

#[expect(clippy::cast_possible_truncation, reason = "the exported model computes with 32-bit floats")]
fn to_f32(values: impl Iterator<Item = f64>) -> impl Iterator<Item = f32> {
    values.map(|value| value as f32)
}

/// Eigenvalues, largest first, and their orthonormal eigenvectors as columns.
pub(crate) struct Eigenpairs {
    values: Vec<f64>,
    pub(crate) vectors: Mat<f64>,
}

/// The eigenpairs of the `num_pairs` largest eigenvalues of a symmetric positive semidefinite matrix.
fn top_eigenpairs(matrix: MatRef<'_, f64>, num_pairs: usize) -> Result<Eigenpairs, PpcaError> {
    let dim = matrix.nrows();
    if dim <= MAX_DENSE_DIM || 4 * num_pairs > dim {
        dense_eigenpairs(matrix, num_pairs)
    } else {
        block_lanczos(matrix, num_pairs, LANCZOS_BLOCK)
    }
}

/// The eigenpairs of the `num_pairs` largest eigenvalues, from the complete decomposition of a symmetric matrix, of which only the lower
/// triangle is read.
pub(crate) fn dense_eigenpairs(matrix: MatRef<'_, f64>, num_pairs: usize) -> Result<Eigenpairs, PpcaError> {
    let dim = matrix.nrows();
    let mut ascending = Diag::zeros(dim);
    let mut vectors = Mat::zeros(dim, dim);
    let params = Spec::default();
    let scratch = evd::self_adjoint_evd_scratch::<f64>(dim, ComputeEigenvectors::Yes, SEQUENTIAL, params);
    let mut memory = MemBuffer::new(scratch);
    let stack = MemStack::new(&mut memory);
    evd::self_adjoint_evd(matrix, ascending.as_mut(), Some(vectors.as_mut()), SEQUENTIAL, stack, params)
        .map_err(|_| PpcaError::Eigendecomposition { dim })?;
    Ok(Eigenpairs {
        values: ascending.column_vector().iter().rev().take(num_pairs).copied().collect(),
        vectors: vectors.reverse_cols().subcols(0, num_pairs).to_owned(),
    })
}

/// [`top_eigenpairs`] by the block Lanczos iteration with thick restarts and full reorthogonalization (K. Wu and H. Simon,
/// "Thick-Restart Lanczos Method for Large Symmetric Eigenvalue Problems", SIAM J. Matrix Anal. Appl. 22(2), 2000, here
/// with blocks of vectors in place of single ones).
///
/// With V the orthonormal basis so far, Q the next block and `E` the last columns of the identity, every step keeps
/// `C V = V T + Q R Eᵀ`. So for an eigenpair (θ, y) of the small matrix T, the residual `‖C V y - θ V y‖` is that of
/// `R Eᵀ y`. When the basis is full it is replaced by its best vectors V y, for which the relation holds as well.
fn block_lanczos(matrix: MatRef<'_, f64>, num_pairs: usize, block_size: usize) -> Result<Eigenpairs, PpcaError> {
    let num_blocks_wanted = num_pairs.div_ceil(block_size);
    let num_kept = block_size * (num_blocks_wanted + 1);
    let capacity = num_kept + block_size * num_blocks_wanted.max(MIN_LANCZOS_STEPS);

    let mut basis = Mat::zeros(matrix.nrows(), capacity + block_size);
    let mut projected = Mat::zeros(capacity, capacity);
    let mut random = splitmix64();
    basis.subcols_mut(0, block_size).col_iter_mut().flat_map(ColMut::iter_mut).for_each(|entry| *entry = random());
    orthonormalize(basis.subcols_mut(0, block_size), MatRef::from_row_major_slice(&[], matrix.nrows(), 0));

    let mut num_projected = 0;
    let mut residual = f64::INFINITY;
    for _ in 0..=MAX_LANCZOS_RESTARTS {
        let mut remainder = Mat::zeros(0, 0);
        while num_projected < capacity {
            let num_known = num_projected + block_size;
            let (known, mut next) = basis.split_at_col_mut(num_known);
            let mut next = next.rb_mut().subcols_mut(0, block_size);
            let last = known.rb().subcols(num_projected, block_size);
            matmul(next.rb_mut(), Accum::Replace, matrix, last, 1.0, Par::rayon(0));
            let coefficients;
            (coefficients, remainder) = orthonormalize(next, known.rb());
            // T is symmetric, and only its lower triangle is read.
            projected.submatrix_mut(num_projected, 0, block_size, num_known).copy_from(coefficients.transpose());
            num_projected = num_known;
        }

        let ritz = dense_eigenpairs(projected.as_ref(), num_kept)?;
        let residuals = &remainder * ritz.vectors.subrows(capacity - block_size, block_size);
        residual =
            residuals.subcols(0, num_pairs).col_iter().map(|col| col.norm_l2()).fold(0.0, f64::max) / ritz.values[0];
        let vectors = basis.subcols(0, capacity) * &ritz.vectors;
        if residual <= RESIDUAL_TOLERANCE {
            let values = ritz.values[..num_pairs].to_vec();
            return Ok(Eigenpairs { values, vectors: vectors.subcols(0, num_pairs).to_owned() });
        }

        let (mut known, next) = basis.split_at_col_mut(capacity);
        known.rb_mut().subcols_mut(0, num_kept).copy_from(vectors);
        known.subcols_mut(num_kept, block_size).copy_from(next);
        projected.fill(0.0);
        for (i, &value) in ritz.values.iter().enumerate() {
            projected[(i, i)] = value;
        }
        num_projected = num_kept;
    }
    Err(PpcaError::NotConverged { latent_dim: num_pairs, restarts: MAX_LANCZOS_RESTARTS, residual })
}

/// Replaces the columns of `block` by orthonormal ones, orthogonal to the orthonormal columns of `known`, and returns
/// (S, R) with `block before = known S + block after · R`.
///
/// Two rounds, since one leaves rounding errors that are large beside a small remainder ("twice is enough": B. N.
/// Parlett, "The Symmetric Eigenvalue Problem", section 6.9). Where columns depend on each other or on `known`, R has
/// zeros and the column is an arbitrary orthonormal one, which is how the iteration goes on in a fresh direction.
fn orthonormalize(mut block: MatMut<'_, f64>, known: MatRef<'_, f64>) -> (Mat<f64>, Mat<f64>) {
    let mut coefficients = Mat::zeros(known.ncols(), block.ncols());
    let mut remainder = Mat::identity(block.ncols(), block.ncols());
    for _ in 0..2 {
        let overlap = known.transpose() * block.rb();
        matmul(block.rb_mut(), Accum::Add, known, &overlap, -1.0, Par::rayon(0));
        coefficients += &overlap * &remainder;
        remainder = thin_qr(block.rb_mut()) * &remainder;
    }
    (coefficients, remainder)
}

/// Replaces `block` by the orthonormal factor Q of its QR decomposition (Householder) and returns the square factor R.
fn thin_qr(mut block: MatMut<'_, f64>) -> Mat<f64> {
    let (dim, num_cols) = block.shape();
    let reflectors_at_once = qr::recommended_block_size::<f64>(dim, num_cols);
    let mut factors = block.to_owned();
    let mut coefficients = Mat::zeros(reflectors_at_once, num_cols);
    let params = Spec::default();
    let mut memory = MemBuffer::new(StackReq::any_of(&[
        qr::qr_in_place_scratch::<f64>(dim, num_cols, reflectors_at_once, SEQUENTIAL, params),
        householder::apply_block_householder_sequence_on_the_left_in_place_scratch::<f64>(
            dim,
            reflectors_at_once,
            num_cols,
        ),
    ]));
    qr::qr_in_place(factors.as_mut(), coefficients.as_mut(), SEQUENTIAL, MemStack::new(&mut memory), params);

    block.fill(0.0);
    block.rb_mut().diagonal_mut().fill(1.0);
    householder::apply_block_householder_sequence_on_the_left_in_place_with_conj(
        factors.as_ref(),
        coefficients.as_ref(),
        Conj::No,
        block,
        SEQUENTIAL,
        MemStack::new(&mut memory),
    );
    Mat::from_fn(num_cols, num_cols, |i, j| if i <= j { factors[(i, j)] } else { 0.0 })
}

/// Numbers in [-1, 1) of a fixed sequence, for a start that does not favor any eigenvector.
fn splitmix64() -> impl FnMut() -> f64 {
    let mut random = SplitMix64(0);
    move || 2.0 * random.fraction() - 1.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::onnx_proto::{DataType, DimensionSize};

    const DIM: usize = 6;
    const LATENT_DIM: usize = 2;

    /// `num_rows` rows around `offset` whose values have different variances and are correlated.
    fn sample_rows(num_rows: usize, dim: usize, offset: f32) -> Vec<f32> {
        let mut random = splitmix64();
        let mut rows = Vec::new();
        for _ in 0..num_rows {
            let shared = random();
            let deviations = (0..dim).map(|j| shared * 2.0 + random() / (1.0 + j as f64));
            rows.extend(to_f32(deviations).map(|deviation| offset + deviation));
        }
        rows
    }

    fn moments_of(rows: &[f32], dim: usize) -> MomentAccumulator {
        let mut moments = MomentAccumulator::new(dim).unwrap();
        moments.push(rows).unwrap();
        moments
    }

    fn assert_close(actual: f64, expected: f64, tolerance: f64) {
        assert!((actual - expected).abs() <= tolerance, "{actual} is not {expected} within {tolerance}");
    }

    /// Values of a constant of an exported model.
    fn constant(graph: &GraphProto, name: &str) -> Vec<f64> {
        let tensor = graph.initializer.iter().find(|tensor| tensor.name == name).unwrap();
        assert_eq!(tensor.data_type(), DataType::Float);
        let values: Vec<f64> =
            tensor.raw_data.chunks(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap()).into()).collect();
        assert_eq!(tensor.dims.iter().product::<i64>(), i64::try_from(values.len()).unwrap());
        values
    }

    fn graph_of(bytes: &[u8]) -> GraphProto {
        ModelProto::decode(bytes).unwrap().graph.unwrap()
    }

    fn shapes(values: &[ValueInfoProto]) -> Vec<(String, String)> {
        let shape_of = |value: &ValueInfoProto| {
            let tensor_type = value.r#type.clone().unwrap().tensor_type.unwrap();
            assert_eq!(tensor_type.elem_type(), DataType::Float);
            let sizes = tensor_type.shape.unwrap().dim.into_iter().map(|dim| match dim.size.unwrap() {
                DimensionSize::Value(size) => size.to_string(),
                DimensionSize::Param(name) => name,
            });
            sizes.collect::<Vec<_>>().join(" ")
        };
        values.iter().map(|value| (value.name.clone(), shape_of(value))).collect()
    }

    #[test]
    fn mean_and_covariance_divide_by_the_number_of_rows_less_one() {
        let (mean, covariance) = moments_of(&[1.0, 0.0, 2.0, 4.0, 6.0, 2.0], 2).finish();
        assert_eq!(mean, [3.0, 2.0]);
        let expected = [[7.0, 1.0], [1.0, 4.0]];
        for (i, j) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
            assert_close(covariance[(i, j)], expected[i][j], 1e-15);
        }
    }

    #[test]
    fn a_known_covariance_gives_its_eigenvalues_and_the_noise_left_over() {
        // Deviations ±a_i along axis i only: variances 2 a_i² / (num_rows - 1).
        let deviations = [4.0_f32, 3.0, 2.0, 1.0];
        let mut rows = Vec::new();
        for (axis, deviation) in deviations.iter().enumerate() {
            for sign in [1.0, -1.0] {
                rows.extend((0..4).map(|j| 10.0 + if j == axis { sign * deviation } else { 0.0 }));
            }
        }
        let model = fit(moments_of(&rows, 4), 2).unwrap();
        assert_close(model.explained_variance[0], 32.0 / 7.0, 1e-14);
        assert_close(model.explained_variance[1], 18.0 / 7.0, 1e-14);
        assert_close(model.noise_variance, (8.0 + 2.0) / 7.0 / 2.0, 1e-14);
        assert_close(model.total_variance, 60.0 / 7.0, 1e-14);
        for (i, component) in model.components.iter().enumerate() {
            assert_close(*component, if i == 0 || i == 5 { 1.0 } else { 0.0 }, 1e-14);
        }
    }

    #[test]
    fn the_result_does_not_depend_on_how_many_rows_come_with_a_push() {
        let rows = sample_rows(2 * ROWS_PER_BLOCK + 77, DIM, 100.0);
        let at_once = fit(moments_of(&rows, DIM), LATENT_DIM).unwrap();
        for rows_per_push in [1, 33, ROWS_PER_BLOCK - 1, ROWS_PER_BLOCK + 1] {
            let mut moments = MomentAccumulator::new(DIM).unwrap();
            rows.chunks(rows_per_push * DIM).for_each(|chunk| moments.push(chunk).unwrap());
            assert_eq!(moments.num_rows(), at_once.num_rows);
            let model = fit(moments, LATENT_DIM).unwrap();
            assert_eq!((&model.mean, &model.components), (&at_once.mean, &at_once.components));
            assert_eq!(model.noise_variance.to_bits(), at_once.noise_variance.to_bits());
        }
    }

    #[test]
    fn a_large_offset_does_not_change_the_variances() {
        // Multiples of 1/64 are exact beside 2^16 in 32 bits, so that both sets of rows have the same deviations.
        let rounded = |offset: f32| -> Vec<f32> {
            sample_rows(700, DIM, 0.0).iter().map(|value| (value * 64.0).round() / 64.0 + offset).collect()
        };
        let near = fit(moments_of(&rounded(0.0), DIM), LATENT_DIM).unwrap();
        let far = fit(moments_of(&rounded(65_536.0), DIM), LATENT_DIM).unwrap();
        for (far, near) in far.explained_variance.iter().zip(&near.explained_variance) {
            assert_close(far / near, 1.0, 1e-12);
        }
        assert_close(far.noise_variance / near.noise_variance, 1.0, 1e-12);
    }

    #[test]
    fn standardized_moments_are_those_of_standardized_rows() {
        // Values of other units and places, more of them than a block has rows, and one that never changes.
        let units = [1.0, 1e4, 1e-4, 3.0, 50.0];
        let mut rows = sample_rows(ROWS_PER_BLOCK + 188, DIM, 5.0);
        for row in rows.chunks_exact_mut(DIM) {
            row.iter_mut().zip(units).for_each(|(value, unit)| *value *= unit);
            row[DIM - 1] = 0.1;
        }
        let num_rows = (rows.len() / DIM) as f64;
        let mut moments = moments_of(&rows, DIM);
        let given = moments.standardize();
        for (column, (mean, std)) in given.iter().enumerate() {
            let values: Vec<f64> = rows.iter().skip(column).step_by(DIM).map(|value| f64::from(*value)).collect();
            let expected = values.iter().sum::<f64>() / num_rows;
            assert_close(f64::from(*mean) / expected, 1.0, 1e-6);
            let variance = values.iter().map(|value| (value - expected).powi(2)).sum::<f64>() / num_rows;
            let expected = if column == DIM - 1 { 1.0 } else { variance.sqrt() };
            assert_close(f64::from(*std) / expected, 1.0, 1e-6);
        }
        let model = fit(moments, LATENT_DIM).unwrap();
        for row in rows.chunks_exact_mut(DIM) {
            row.iter_mut().zip(&given).for_each(|(value, (mean, std))| *value = (*value - mean) / std);
        }
        let expected = fit(moments_of(&rows, DIM), LATENT_DIM).unwrap();
        assert_close(model.total_variance, expected.total_variance, 1e-5);
        assert_close(model.total_variance, (DIM - 1) as f64 * num_rows / (num_rows - 1.0), 1e-5);
        assert_close(model.noise_variance, expected.noise_variance, 1e-5);
        for (found, expected) in model.components.iter().zip(&expected.components) {
            assert_close(*found, *expected, 1e-4);
        }
        for (found, expected) in model.mean.iter().zip(&expected.mean) {
            assert_close(*found, *expected, 1e-5);
        }
    }

    #[test]
    fn constants_have_no_variance_after_standardization_either() {
        let mut moments = moments_of(&[0.1, 7.0, -1e5].repeat(ROWS_PER_BLOCK + 5), 3);
        assert_eq!(
            moments.standardize().into_iter().map(|(_, std)| std.to_bits()).collect::<Vec<_>>(),
            [1.0_f32.to_bits(); 3]
        );
        assert!(matches!(fit(moments, 1), Err(PpcaError::NoVariance { .. })));
    }

    #[test]
    fn the_exported_encoder_is_the_posterior_of_the_exported_decoder() {
        let rows = sample_rows(900, DIM, 0.5);
        let model = fit(moments_of(&rows, DIM), LATENT_DIM).unwrap();
        let vae = graph_of(&model.vae_onnx("image", &[1, 2, 3]).unwrap());
        let decoder = graph_of(&model.decoder_onnx(&[1, 2, 3]).unwrap());

        // The closed form from W and σ² alone: M = WᵀW + σ²I, mu = M⁻¹ Wᵀ (x - mean), variance σ² M⁻¹. W is the transpose
        // of the decoder's weights.
        let weights_transposed = constant(&decoder, "weights");
        let weights = MatRef::from_row_major_slice(&weights_transposed, LATENT_DIM, DIM).transpose();
        let precision =
            weights.transpose() * weights + model.noise_variance * Mat::<f64>::identity(LATENT_DIM, LATENT_DIM);
        let mean = constant(&decoder, "mean");
        assert_eq!(constant(&vae, "mean"), mean);
        let centered = Col::from_fn(DIM, |j| f64::from(rows[j]) - mean[j]);
        let weighted = weights.transpose() * &centered;

        let components = constant(&vae, "components");
        let components = MatRef::from_row_major_slice(&components, LATENT_DIM, DIM);
        let gain = constant(&vae, "posterior_gain");
        let logvar = constant(&vae, "posterior_logvar");
        let projection = components * &centered;
        for i in 0..LATENT_DIM {
            assert_close(precision[(0, 1)], 0.0, 1e-6);
            assert_close(projection[i] * gain[i], weighted[i] / precision[(i, i)], 1e-6);
            assert_close(logvar[i], (model.noise_variance / precision[(i, i)]).ln(), 1e-6);
        }

        // The reconstruction leaves nothing in the plane of the components, and adds nothing outside of it.
        let reconstructed = components.transpose() * &projection;
        let error = &centered - &reconstructed;
        assert!((components * &error).norm_l2() < 1e-6 * centered.norm_l2());
        assert_close(reconstructed.norm_l2(), projection.norm_l2(), 1e-6);
    }

    #[test]
    fn exported_models_have_the_promised_inputs_and_outputs() {
        let model = fit(moments_of(&sample_rows(20, DIM, 0.0), DIM), LATENT_DIM).unwrap();
        let named = |pairs: &[(&str, &str)]| -> Vec<(String, String)> {
            pairs.iter().map(|(name, shape)| ((*name).to_owned(), (*shape).to_owned())).collect()
        };
        let bytes = model.vae_onnx("image", &[1, 2, 3]).unwrap();
        let vae = graph_of(&bytes);
        assert_eq!(shapes(&vae.input), named(&[("image", "batch 1 2 3")]));
        let outputs = [("mu", "batch 2"), ("logvar", "batch 2"), ("reconstruction", "batch 1 2 3")];
        assert_eq!(shapes(&vae.output), named(&outputs));
        let decoder = graph_of(&model.decoder_onnx(&[1, 2, 3]).unwrap());
        assert_eq!(shapes(&decoder.input), named(&[("z", "batch 2")]));
        assert_eq!(shapes(&decoder.output), named(&[("reconstruction", "batch 1 2 3")]));

        let header = ModelProto::decode(bytes.as_slice()).unwrap();
        assert_eq!((header.ir_version, header.opset_import[0].version), (8, 17));
        assert_eq!(header.opset_import[0].domain, "");
    }

    #[test]
    fn every_value_of_an_exported_graph_is_made_before_it_is_used() {
        let model = fit(moments_of(&sample_rows(20, DIM, 0.0), DIM), LATENT_DIM).unwrap();
        for bytes in [model.vae_onnx("image", &[1, 2, 3]).unwrap(), model.decoder_onnx(&[1, 2, 3]).unwrap()] {
            let graph = graph_of(&bytes);
            let mut made: Vec<&str> = graph.initializer.iter().map(|tensor| tensor.name.as_str()).collect();
            made.extend(graph.input.iter().map(|input| input.name.as_str()));
            for node in &graph.node {
                assert!(node.input.iter().all(|input| made.contains(&input.as_str())), "{node:?}");
                made.extend(node.output.iter().map(String::as_str));
            }
            assert!(graph.output.iter().all(|output| made.contains(&output.name.as_str())));
        }
    }

    #[test]
    fn equal_variances_export_a_zero_mu_and_a_zero_logvar_instead_of_nan() {
        // ± each axis: the covariance is a multiple of the identity, and λ = σ².
        let rows = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]].concat();
        let rows: Vec<f32> = rows.iter().copied().chain(rows.iter().map(|value: &f32| -value)).collect();
        let model = fit(moments_of(&rows, 3), 1).unwrap();
        let vae = graph_of(&model.vae_onnx("image", &[1, 1, 3]).unwrap());
        assert_close(constant(&vae, "posterior_gain")[0], 0.0, 1e-6);
        assert_close(constant(&vae, "posterior_logvar")[0], 0.0, 1e-6);
    }

    #[test]
    fn the_iteration_finds_the_same_eigenpairs_as_the_complete_decomposition() {
        // Eigenvalues 1 / i², three of them equal, in directions that a Householder reflection mixes.
        let dim = 150;
        let values = |i: usize| {
            if (3..6).contains(&i) { 1.0 / 16.0 } else { 1.0 / ((i + 1) * (i + 1)) as f64 }
        };
        let mut random = splitmix64();
        let normal = Col::from_fn(dim, |_| random());
        let reflection =
            Mat::<f64>::identity(dim, dim) - (2.0 / normal.squared_norm_l2()) * &normal * normal.transpose();
        let matrix = &reflection * Mat::from_fn(dim, dim, |i, j| if i == j { values(i) } else { 0.0 }) * &reflection;

        let num_pairs = 10;
        for block_size in [2, 4] {
            let found = block_lanczos(matrix.as_ref(), num_pairs, block_size).unwrap();
            for (i, &value) in found.values.iter().enumerate() {
                assert_close(value, values(i), 1e-13);
            }
            let residual = &matrix * &found.vectors
                - &found.vectors
                    * Mat::from_fn(num_pairs, num_pairs, |i, j| if i == j { found.values[i] } else { 0.0 });
            assert!(residual.norm_l2() < 1e-11, "{}", residual.norm_l2());
            let gram = found.vectors.transpose() * &found.vectors - Mat::<f64>::identity(num_pairs, num_pairs);
            assert!(gram.norm_l2() < 1e-13, "{}", gram.norm_l2());
        }
    }

    #[test]
    fn the_number_of_threads_does_not_change_a_bit() {
        let dim = 200;
        let rows = sample_rows(600, dim, 0.5);
        let bits_with = |num_threads: usize| -> Vec<u64> {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(num_threads).build().unwrap();
            let pairs = pool.install(|| {
                let (_, covariance) = moments_of(&rows, dim).finish();
                block_lanczos(covariance.as_ref(), 20, 16).unwrap()
            });
            let vectors = (0..20).flat_map(|i| pairs.vectors.col_as_slice(i));
            pairs.values.iter().chain(vectors).map(|value| value.to_bits()).collect()
        };
        assert_eq!(bits_with(1), bits_with(3));
    }

    #[test]
    fn the_iteration_survives_a_matrix_of_lower_rank_than_its_basis() {
        let (dim, rank) = (150, 12);
        let mut random = splitmix64();
        let factor = Mat::from_fn(dim, rank, |_, j| random() / (j + 1) as f64);
        let matrix = &factor * factor.transpose();
        let found = block_lanczos(matrix.as_ref(), rank - 1, 4).unwrap();
        let complete = dense_eigenpairs(matrix.as_ref(), rank - 1).unwrap();
        for (found, complete) in found.values.iter().zip(&complete.values) {
            assert_close(*found, *complete, 1e-12 * complete);
        }
    }

    #[test]
    fn the_largest_entry_of_a_component_is_positive() {
        let flipped: Vec<f64> = with_fixed_sign(&[0.5, -2.0, 1.0]).collect();
        assert_eq!(flipped, [-0.5, 2.0, -1.0]);
        let kept: Vec<f64> = with_fixed_sign(&[2.0, -2.0]).collect();
        assert_eq!(kept, [2.0, -2.0]);
    }

    #[test]
    fn a_value_that_is_not_finite_is_named_and_nothing_is_added() {
        let mut moments = moments_of(&[0.0; 3 * DIM], DIM);
        let mut rows = [0.0; 2 * DIM];
        rows[DIM + 4] = f32::NAN;
        let error = moments.push(&rows).unwrap_err();
        assert!(matches!(error, PpcaError::NonFinite { row: 4, column: 4, .. }), "{error}");
        assert_eq!(moments.num_rows(), 3);
    }

    #[test]
    fn a_row_that_is_not_whole_is_refused() {
        let error = MomentAccumulator::new(DIM).unwrap().push(&[0.0; DIM + 1]).unwrap_err();
        assert!(matches!(error, PpcaError::PartialRow { num_values: 7, dim: DIM }), "{error}");
    }

    #[test]
    fn rows_too_long_for_a_covariance_matrix_are_refused_before_memory_is_taken() {
        for dim in [0, 224 * 224 * 3] {
            assert!(matches!(MomentAccumulator::new(dim), Err(PpcaError::Dim { .. })));
        }
    }

    #[test]
    fn latent_dim_must_leave_a_direction_for_the_noise() {
        let few_rows = sample_rows(5, DIM, 0.0);
        assert!(fit(moments_of(&few_rows, DIM), 3).is_ok());
        let error = fit(moments_of(&few_rows, DIM), 4).unwrap_err();
        assert!(matches!(error, PpcaError::LatentDim { largest: 3, num_rows: 5, .. }), "{error}");

        let many_rows = sample_rows(50, DIM, 0.0);
        assert!(fit(moments_of(&many_rows, DIM), DIM - 1).is_ok());
        for latent_dim in [0, DIM] {
            let error = fit(moments_of(&many_rows, DIM), latent_dim).unwrap_err();
            assert!(matches!(error, PpcaError::LatentDim { largest: 5, .. }), "{error}");
        }
        let error = fit(moments_of(&few_rows[..2 * DIM], DIM), 1).unwrap_err();
        assert!(matches!(error, PpcaError::TooFewRows { num_rows: 2, .. }), "{error}");
    }

    #[test]
    fn constant_rows_have_no_variance() {
        for value in [0.0, 0.1, 1e30] {
            let error = fit(moments_of(&vec![value; 700 * DIM], DIM), 1).unwrap_err();
            assert!(matches!(error, PpcaError::NoVariance { num_rows: 700 }), "{error}");
        }
    }

    #[test]
    fn components_that_explain_everything_leave_no_noise() {
        // All values of a row are the same: one direction holds all variance.
        let rows: Vec<f32> = (0..40).flat_map(|row| [row as f32; DIM]).collect();
        let error = fit(moments_of(&rows, DIM), 1).unwrap_err();
        assert!(matches!(error, PpcaError::NoNoise { latent_dim: 1 }), "{error}");
    }

    #[test]
    fn an_image_shape_of_another_size_is_refused() {
        let model = fit(moments_of(&sample_rows(20, DIM, 0.0), DIM), LATENT_DIM).unwrap();
        assert!(matches!(model.vae_onnx("image", &[3, 2, 3]), Err(PpcaError::Shape { dim: DIM, .. })));
        assert!(matches!(model.decoder_onnx(&[usize::MAX, 2, 3]), Err(PpcaError::Shape { dim: DIM, .. })));
    }
}
