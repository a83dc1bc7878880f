//! The expected loss of the evidence lower bound by Monte Carlo: -log p(x|z) averaged over samples of q(z|x), instead of taken at
//! its mean.
//!
//! ```text
//! z_s = mu + e^(logvar / 2) · ε_s,  ε_s ~ N(0, I)        E_q[-log p(x|z)] ≈ 1/S Σ_s -log p(x|z_s)
//! ```
//!
//! (the reparameterization of D. P. Kingma and M. Welling, "Auto-Encoding Variational Bayes", ICLR 2014, section 2.4). The ε of a
//! row come from a generator seeded by the row's key and the number of the sample, and the samples of a row go through the
//! decoder by themselves. So a row has one score, whatever the batch it comes in, the worker, and the order of the rows.

use super::negative_log_likelihood;
use crate::hash::Fingerprint;
use crate::model::{Decoder, Likelihood, ModelError};
use crate::random::SplitMix64;

/// Draws the samples of rows and takes their mean loss.
#[derive(Debug)]
pub struct Sampler {
    /// What makes reconstructions of samples.
    pub decoder: Decoder,
    /// The model's p(x|z).
    pub likelihood: Likelihood,
    /// Samples of a row.
    pub num_samples: usize,
}

/// The seed of a row's samples: 64 bits of the SHA-256 of its partition and its id.
pub fn row_seed(partition: &str, image_id: &str) -> u64 {
    Fingerprint::new("elbo").with("partition", partition).with("image_id", image_id).number()
}

impl Sampler {
    /// The mean of -log p(x|z) over the samples of a row, in nats, with the decoder's session of one of the threads.
    pub fn expected_loss(
        &self,
        thread: usize,
        seed: u64,
        input: &[f32],
        mu: &[f32],
        logvar: &[f32],
    ) -> Result<f64, ModelError> {
        let mut sum = 0.0;
        self.decoder.decode(thread, &samples(seed, self.num_samples, mu, logvar), |reconstructions| {
            for reconstruction in reconstructions.chunks_exact(self.decoder.num_values) {
                sum += negative_log_likelihood(input, reconstruction, self.likelihood);
            }
        })?;
        Ok(sum / self.num_samples as f64)
    }
}

/// Samples of q(z|x), one after the other.
fn samples(seed: u64, num_samples: usize, mu: &[f32], logvar: &[f32]) -> Vec<f32> {
    let mut z = vec![0.0; num_samples * mu.len()];
    for (number, z) in (0..).zip(z.chunks_exact_mut(mu.len().max(1))) {
        SplitMix64::stream(seed, number).fill_normal(z);
        for ((z, mu), logvar) in z.iter_mut().zip(mu).zip(logvar) {
            let deviation = (0.5 * f64::from(*logvar)).exp() * f64::from(*z);
            #[expect(clippy::cast_possible_truncation, reason = "rounded to the latents' own precision")]
            let sample = (f64::from(*mu) + deviation) as f32;
            *z = sample;
        }
    }
    z
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_have_the_moments_of_the_posterior() {
        let (mu, logvar) = ([3.0, -1.0], [0.0, (0.25_f32).ln()]);
        let count = 20_000;
        let z = samples(row_seed("ds=1", "a"), count, &mu, &logvar);
        for (dim, (mean, variance)) in [(3.0, 1.0), (-1.0, 0.25)].into_iter().enumerate() {
            let values: Vec<f64> = z.iter().skip(dim).step_by(2).map(|value| f64::from(*value)).collect();
            let found = values.iter().sum::<f64>() / count as f64;
            // Four standard errors.
            assert!((found - mean).abs() < 4.0 * (variance / count as f64).sqrt(), "{found}");
            let spread = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / count as f64;
            assert!((spread - variance).abs() < 4.0 * variance * (2.0 / count as f64).sqrt(), "{spread}");
        }
    }

    #[test]
    fn more_samples_begin_with_the_fewer_and_rows_have_samples_of_their_own() {
        let of = |seed, count| samples(seed, count, &[0.5; 3], &[0.1; 3]);
        let seed = row_seed("ds=1", "a");
        assert_eq!(of(seed, 4), of(seed, 9)[..12]);
        for (partition, id) in [("ds=2", "a"), ("ds=1", "b"), ("ds=1a", ""), ("", "ds=1a")] {
            assert_ne!(of(row_seed(partition, id), 1), of(seed, 1), "{partition} {id}");
        }
    }
}
