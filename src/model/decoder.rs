//! The decoder of a package: latents in, pictures out. Loaded only by what needs it.

use std::sync::{Mutex, PoisonError};

use ort::session::builder::PrepackedWeights;

use super::engine::{Engine, Place, Tensors};
use super::package::Golden;
use super::{ModelError, Network, Role, max_difference};

/// Images in an inference call of [`Decoder::decode`] at most, so that memory does not grow with what is asked for.
pub const MAX_BATCH: usize = 64;

/// Its tensors, in errors.
pub(super) const KINDS: (&str, &str) = ("decoder input", "decoder output");

/// What is compared when a decoder is proven, in errors.
pub(super) const GOLDEN: &str = "what the decoder makes of mu";

/// A decoder, proven on the golden images; the threads of a process share it.
#[derive(Debug)]
pub struct Decoder {
    /// Values of a latent vector.
    pub latent_dim: usize,
    /// Values of a picture, in units and layout of the model's input tensor.
    pub num_values: usize,
    package: String,
    engines: Vec<Mutex<Engine>>,
}

impl Decoder {
    /// Gives the network to ONNX Runtime, once for each of the threads, and checks its tensors. `latent_dim` is the length of the model's
    /// `mu`.
    pub(super) fn open(
        place: Place<'_>,
        network: &Network,
        latent_dim: usize,
        num_values: usize,
    ) -> Result<Self, ModelError> {
        let weights = PrepackedWeights::new();
        let tensors =
            Tensors { input: None, row: Some(vec![latent_dim]), rows: "latents", kinds: KINDS, outputs: None };
        let engines = (0..place.compute.num_sessions(place.provider))
            .map(|_| Engine::open(place, network, &tensors, &weights).map(Mutex::new))
            .collect::<Result<Vec<_>, _>>()?;
        Ok(Self { latent_dim, num_values, package: place.package.to_owned(), engines })
    }

    /// Makes pictures of latents that lie one after the other in `z`, with the session of one of the threads, and hands them to
    /// `then` in order, up to [`MAX_BATCH`] at a time, one after the other: [`Decoder::num_values`] values each, in units and
    /// layout of the model's input tensor. What is no whole latent at the end of `z` is left out.
    pub fn decode(&self, thread: usize, z: &[f32], mut then: impl FnMut(&[f32])) -> Result<(), ModelError> {
        let inference = |source| ModelError::Inference { package: self.package.clone(), source };
        let mut engine = self.engines[thread % self.engines.len()].lock().unwrap_or_else(PoisonError::into_inner);
        let whole = z.len() - z.len() % self.latent_dim;
        for z in z[..whole].chunks(MAX_BATCH * self.latent_dim) {
            let batch = z.len() / self.latent_dim;
            let ran = engine.run(z, batch, |outputs| {
                let [output] = outputs else { return Err("none".to_owned()) };
                if !output.has_rows(batch) || output.values.len() != batch * self.num_values {
                    return Err(output.shape());
                }
                then(&output.values);
                Ok(())
            });
            ran.map_err(inference)?.map_err(|shape| ModelError::OutputShape {
                package: self.package.clone(),
                role: Role::Reconstruction,
                name: "of the decoder".to_owned(),
                shape,
                batch,
            })?;
        }
        Ok(())
    }

    /// Decodes the mu of each golden image, which must give what the main graph reconstructs, if it reconstructs.
    ///
    /// A network's reconstruction is the decoder of mu. That of a linear model may be the projection instead, which is nearer to
    /// the image: the decoder of mu without its pull toward the prior. With the posterior `z | x ~ N(mu, σ² M⁻¹)` of
    /// probabilistic PCA, `1 - e^logvar` is the factor by which the prior pulls each latent, so there it is the decoder of
    /// `mu / (1 - e^logvar)` ([`super::ppca`]). One of the two must hold for all golden images.
    pub(super) fn replay(&self, golden: &Golden, tolerance: f32) -> Result<(), ModelError> {
        let differs = |latents: fn(&[f32], Option<&[f32]>) -> Vec<f32>| -> Result<Option<(usize, f32)>, ModelError> {
            for (number, image) in golden.images.iter().enumerate() {
                let output =
                    |role| image.outputs.iter().find(|(other, _)| *other == role).map(|(_, values)| values.as_slice());
                let z = latents(output(Role::Mu).unwrap_or_default(), output(Role::Logvar));
                let mut difference = f32::NAN;
                self.decode(0, &z, |found| {
                    // Without a reconstruction to compare with, the numbers must be numbers.
                    let expected = output(Role::Reconstruction).unwrap_or(found);
                    difference = max_difference(found, expected, |golden| 1.0 + golden.abs());
                })?;
                if difference.is_nan() || difference > tolerance {
                    return Ok(Some((number, difference)));
                }
            }
            Ok(None)
        };
        let Some((image, difference)) = differs(|mu, _| mu.to_vec())? else { return Ok(()) };
        if differs(without_pull)?.is_none() {
            return Ok(());
        }
        Err(ModelError::GoldenDiffers { package: self.package.clone(), image, what: GOLDEN, difference, tolerance })
    }
}

/// `mu / (1 - e^logvar)`; zero for a latent that is all prior.
fn without_pull(mu: &[f32], logvar: Option<&[f32]>) -> Vec<f32> {
    let Some(logvar) = logvar else { return mu.to_vec() };
    mu.iter()
        .zip(logvar)
        .map(|(mu, logvar)| {
            let factor = -f64::from(*logvar).exp_m1();
            #[expect(clippy::cast_possible_truncation, reason = "rounded to the latents' own precision")]
            let unpulled = (f64::from(*mu) / factor) as f32;
            if unpulled.is_finite() { unpulled } else { 0.0 }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_latent_that_the_prior_has_pulled_halfway_is_twice_as_far_without_it() {
        let half = 0.5_f32.ln();
        let found = without_pull(&[3.0, -1.0, 0.0], Some(&[half, f32::NEG_INFINITY, 0.0]));
        assert!((found[0] - 6.0).abs() < 1e-5 && found[1..] == [-1.0, 0.0], "{found:?}");
        assert_eq!(without_pull(&[3.0], None), [3.0]);
    }
}
