//! Inference: a batch of input tensors goes in, the tensors of the model's roles come out.
//!
//! One session serves one thread (ONNX Runtime is fastest on the CPU with as many sessions as cores, one thread each). A
//! [`Session`] checks the shapes of what comes out, so that its callers can index without looking.

use ort::session::builder::PrepackedWeights;

use super::engine::{Engine, Output, Place, Tensors};
use super::{Contract, ModelError, Network, Role, decoder};

/// A model loaded for one thread.
#[derive(Debug)]
pub struct Session {
    main: Engine,
    /// Makes the reconstruction from mu, for a model whose main graph does not.
    decoder: Option<Engine>,
    /// The roles of the main graph's outputs, in their order.
    roles: Vec<Role>,
    contract: Contract,
    package: String,
}

/// What a model made of a batch: for each role it has, the values of all images, one image after the other.
#[derive(Debug, Clone, Copy)]
pub struct Latents<'a> {
    /// Images in the batch.
    pub batch: usize,
    /// The vector to search by, `batch x embedding_dim`; for a VAE without a separate one, `mu`. Empty for a model that has neither.
    pub embedding: &'a [f32],
    /// Mean of the approximate posterior, `batch x latent_dim`.
    pub mu: Option<&'a [f32]>,
    /// Log-variance of the approximate posterior, `batch x latent_dim`.
    pub logvar: Option<&'a [f32]>,
    /// The model's picture of the input, in its shape and units.
    pub reconstruction: Option<&'a [f32]>,
    /// How strange the model itself finds each image, `batch` values.
    pub pred_score: Option<&'a [f32]>,
    /// How strange it finds each place, in a shape of its own.
    pub anomaly_map: Option<&'a [f32]>,
}

impl<'a> Latents<'a> {
    /// The values of all images, by role.
    pub fn of(&self, role: Role) -> Option<&'a [f32]> {
        match role {
            Role::Embedding => Some(self.embedding),
            Role::Mu => self.mu,
            Role::Logvar => self.logvar,
            Role::Reconstruction => self.reconstruction,
            Role::PredScore => self.pred_score,
            Role::AnomalyMap => self.anomaly_map,
        }
    }
}

impl Session {
    /// Builds a session of the model's main graph, and of the decoder where that is what reconstructs, with the weights that they share
    /// with the model's other sessions.
    pub(super) fn build(
        place: Place<'_>,
        contract: &Contract,
        (main, main_weights): (&Network, &PrepackedWeights),
        decoder: Option<(&Network, &PrepackedWeights)>,
    ) -> Result<Self, ModelError> {
        let (roles, names) = contract.outputs.roles().map(|(role, name)| (role, name.to_owned())).unzip();
        let tensors = Tensors {
            input: Some(contract.input.tensor.clone()),
            row: Some(contract.input.shape()),
            rows: if contract.input.image().is_some() { "images" } else { "rows" },
            kinds: ("input", "output"),
            outputs: Some(names),
        };
        let main = Engine::open(place, main, &tensors, main_weights)?;
        if main.takes_pixels() && !contract.input.is_identity() {
            return Err(ModelError::Invalid {
                package: place.package.to_owned(),
                key: "input.scale",
                reason: "with mean and std must leave pixels as they are (1, 0 and 1), for the network takes them as 8-bit numbers"
                    .to_owned(),
            });
        }
        let decoder = decoder.map(|(network, weights)| {
            // How many latents there are is known once mu is.
            let tensors = Tensors { input: None, row: None, rows: "latents", kinds: decoder::KINDS, outputs: None };
            Engine::open(place, network, &tensors, weights)
        });
        Ok(Self {
            main,
            decoder: decoder.transpose()?,
            roles,
            contract: contract.clone(),
            package: place.package.to_owned(),
        })
    }

    /// Runs `batch` images whose input tensors lie one after the other in `input`, and hands the outputs to `then`.
    pub fn run<T>(
        &mut self,
        input: &[f32],
        batch: usize,
        then: impl FnOnce(Latents<'_>) -> T,
    ) -> Result<T, ModelError> {
        let Self { main, decoder, roles, contract, package } = self;
        let inference = |source| ModelError::Inference { package: package.clone(), source };
        let shapes = Shapes { contract, package, batch, input_values: input.len() };
        let ran = main.run(input, batch, |outputs| {
            for (role, output) in roles.iter().zip(outputs) {
                shapes.check(*role, output)?;
            }
            let values = |role: Role| {
                let place = roles.iter().position(|other| *other == role)?;
                outputs.get(place).map(|output| &*output.values)
            };
            let (mu, logvar) = (values(Role::Mu), values(Role::Logvar));
            if let (Some(mu), Some(logvar)) = (mu, logvar)
                && mu.len() != logvar.len()
            {
                let shape = format!("{} values an image beside the {} of mu", logvar.len() / batch, mu.len() / batch);
                return Err(shapes.misshapen(Role::Logvar, shape));
            }
            let latents = Latents {
                batch,
                embedding: values(Role::Embedding).or(mu).unwrap_or_default(),
                mu,
                logvar,
                reconstruction: values(Role::Reconstruction),
                pred_score: values(Role::PredScore),
                anomaly_map: values(Role::AnomalyMap),
            };
            let (Some(decoder), Some(mu)) = (decoder, mu) else { return Ok(then(latents)) };
            let decoded = decoder.run(mu, batch, |outputs| {
                let [output] = outputs else { return Err(shapes.misshapen(Role::Reconstruction, "none".to_owned())) };
                shapes.check(Role::Reconstruction, output)?;
                Ok(then(Latents { reconstruction: Some(&output.values), ..latents }))
            });
            decoded.map_err(inference)?
        });
        ran.map_err(inference)?
    }
}

/// What shapes the outputs of a batch must have.
struct Shapes<'a> {
    contract: &'a Contract,
    package: &'a str,
    batch: usize,
    input_values: usize,
}

impl Shapes<'_> {
    fn check(&self, role: Role, output: &Output<'_>) -> Result<(), ModelError> {
        let expected = match role {
            Role::Reconstruction => Some(self.input_values),
            Role::PredScore => Some(self.batch),
            Role::Embedding | Role::Mu | Role::Logvar | Role::AnomalyMap => None,
        };
        let fits = output.has_rows(self.batch) && expected.is_none_or(|expected| expected == output.values.len());
        if fits { Ok(()) } else { Err(self.misshapen(role, output.shape())) }
    }

    fn misshapen(&self, role: Role, shape: String) -> ModelError {
        ModelError::OutputShape {
            package: self.package.to_owned(),
            role,
            name: self.contract.outputs.name(role).unwrap_or("of the decoder").to_owned(),
            shape,
            batch: self.batch,
        }
    }
}
