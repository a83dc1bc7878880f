//! The model packages of a pipeline: one that scores, and perhaps another whose vectors are searched.

use crate::config::Pipeline;
use crate::context::Context;
use crate::error::Error;
use crate::hash::Fingerprint;
use crate::model::{self, Compute, Contract, Model, ModelError, Runtime};
use crate::score::Rule;
use crate::source::Source;
use crate::store::Store;
use url::Url;

/// A model package that is not loaded.
#[derive(Debug)]
pub struct Package {
    /// Its folder.
    pub store: Store,
    /// How it is used.
    pub contract: Contract,
    /// What stands for all of its files.
    pub sha256: String,
}

impl Package {
    /// Finds a package, which must be the one that the pipeline file pins, if it pins one.
    fn find(context: &Context, package: &Url, pin: Option<&str>) -> Result<Self, Error> {
        let store = context.stores.open(package)?;
        let (contract, sha256) = context.block_on(model::read_contract(&store))?;
        match pin.filter(|pinned| *pinned != sha256) {
            Some(pinned) => {
                let (package, pinned) = (package.to_string(), pinned.to_owned());
                Err(ModelError::Pin { package, found: sha256, pinned }.into())
            }
            None => Ok(Self { store, contract, sha256 }),
        }
    }
}

/// The model packages of a pipeline.
#[derive(Debug)]
pub struct Packages {
    /// The one that scores, and whose vectors are searched if there is no other.
    pub model: Package,
    /// The one whose vectors are searched.
    pub encoder: Option<Package>,
    elbo_samples: usize,
}

impl Packages {
    /// Reads the contracts of the packages that a pipeline names, and loads nothing.
    pub fn find(context: &Context, pipeline: &Pipeline) -> Result<Self, Error> {
        let wanted = pipeline.require_model()?;
        let model = Package::find(context, &wanted.package, wanted.sha256.as_deref())?;
        // A model without a decoder is found out before any image is read.
        model.contract.sampled_likelihood(wanted.package.as_str(), wanted.elbo_samples)?;
        let find =
            |encoder: &crate::config::EncoderRef| Package::find(context, &encoder.package, encoder.sha256.as_deref());
        let encoder = pipeline.encoder.as_ref().map(find).transpose()?;
        Ok(Self { model, encoder, elbo_samples: wanted.elbo_samples })
    }

    /// Fails where the source does not hold what the models take.
    pub fn check_source(&self, source: &Source) -> Result<(), ModelError> {
        let mut each = std::iter::once(&self.model).chain(&self.encoder);
        each.try_for_each(|package| package.contract.input.check(package.store.url().as_str(), source))
    }

    /// That of the one package, or a fingerprint of both: vectors and scores compare where all packages are the same.
    pub fn sha256(&self) -> String {
        match &self.encoder {
            None => self.model.sha256.clone(),
            Some(encoder) => {
                Fingerprint::new("models").with("model", &self.model.sha256).with("encoder", &encoder.sha256).full()
            }
        }
    }

    /// Loads and replays all of them for `workers` threads.
    pub fn load(
        &self,
        context: &Context,
        pipeline: &Pipeline,
        runtime: &Runtime,
        workers: usize,
    ) -> Result<Model, Error> {
        let compute = Compute::new(&pipeline.execution, workers);
        let load = |package: &Package| {
            let loaded = Model::load(&package.store, Some(&package.sha256), runtime.clone(), &compute);
            context.block_on(loaded)
        };
        let mut loaded = load(&self.model)?;
        context.block_on(loaded.sample_elbo(&self.model.store, self.elbo_samples))?;
        loaded.encoder = self.encoder.as_ref().map(load).transpose()?.map(Box::new);
        loaded.check_vector()?;
        Ok(loaded)
    }

    /// The contract of the package whose vectors are searched.
    pub fn encoder_contract(&self) -> &Contract {
        &self.encoder.as_ref().unwrap_or(&self.model).contract
    }

    /// The names of the models, for people.
    pub fn names(&self) -> String {
        let encoder = self.encoder.as_ref().map(|encoder| format!(" + {}", encoder.contract.name));
        format!("{}{}", self.model.contract.name, encoder.unwrap_or_default())
    }

    /// Whether the packages give all that a rule needs.
    pub fn gives(&self, rule: Rule) -> bool {
        self.model.contract.gives(rule)
    }
}
