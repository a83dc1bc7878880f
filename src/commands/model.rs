//! `model`: looks into a network that came without a contract, and makes a model package of it.

use std::collections::BTreeMap;

use bytes::Bytes;
use serde_json::json;

use super::fit::{FitError, publish};
use crate::config::Device;
use crate::context::Context;
use crate::decode::{self, DecodeLimits};
use crate::error::{Error, ExitStatus};
use crate::model::inspect::{self, Inspected, Preset, Proposal};
use crate::model::package::{self, WriteError};
use crate::model::{self, Compute, Contract, Model, Runtime};
use crate::store::{Store, StoreError};

/// Golden images of a package: of several shapes, if the pictures are.
const GOLDEN_IMAGES: usize = 4;

/// Digits of a hash that is not known yet.
const NO_SHA256: &str = "0000000000000000000000000000000000000000000000000000000000000000";

/// A network, as the command line names it.
#[derive(Debug, Clone)]
pub struct NetworkFile {
    /// Location of the ONNX file.
    pub file: String,
    /// Location of a second one, from latents to pictures, in the same folder.
    pub decoder: Option<String>,
    /// How pictures are prepared, where it is not to be guessed.
    pub preset: Option<Preset>,
}

/// What is made of it.
#[derive(Debug, Clone)]
pub struct Packaging {
    /// Location of the contract; `None`: as proposed.
    pub contract: Option<String>,
    /// Location of the folder of pictures.
    pub images: String,
    /// Location of the package.
    pub to: String,
}

/// Both networks with a contract for them.
struct Draft {
    main: Inspected,
    decoder: Option<Inspected>,
    proposal: Proposal,
    runtime: Runtime,
}

impl Draft {
    fn of(context: &Context, network: &NetworkFile) -> Result<Self, Error> {
        let runtime = Runtime::load(context.onnxruntime.as_deref())?;
        let (store, main) = open(context, "FILE", &network.file)?;
        let main = context.block_on(inspect::inspect(&store, &main, &runtime))?;
        let decoder = match &network.decoder {
            Some(file) => {
                let (folder, file) = open(context, "--decoder", file)?;
                if folder.url() != store.url() {
                    return Err(Error::Usage {
                        message: format!("{} and {} are not in one folder", folder.url_of(&file), network.file),
                        hint: "a package is one folder: put both networks into it".to_owned(),
                    });
                }
                Some(context.block_on(inspect::inspect(&store, &file, &runtime))?)
            }
            None => None,
        };
        let proposal = inspect::propose(&main, decoder.as_ref(), network.preset, store.url().as_str())?;
        Ok(Self { main, decoder, proposal, runtime })
    }

    fn networks(&self) -> impl Iterator<Item = &Inspected> {
        std::iter::once(&self.main).chain(&self.decoder)
    }
}

fn open(context: &Context, option: &str, location: &str) -> Result<(Store, String), Error> {
    context.open_file(&context.locate(option, location)?)
}

/// Prints what is in a network, and the contract proposed for it.
pub fn inspect(context: &Context, network: &NetworkFile, as_json: bool) -> Result<ExitStatus, Error> {
    let draft = Draft::of(context, network)?;
    let Proposal { contract, preset, guesses } = &draft.proposal;
    if as_json {
        let told = json!({
            "network": draft.main,
            "decoder": draft.decoder,
            "preset": preset,
            "guesses": guesses,
            "contract": contract,
        });
        context.print(&told.to_string())?;
        return Ok(ExitStatus::Success);
    }
    for network in draft.networks() {
        describe(network).iter().try_for_each(|line| context.print(&format!("# {line}")))?;
    }
    context.print("#")?;
    context.print("# Proposed. Guessed, so please check:")?;
    guesses.iter().try_for_each(|guess| context.print(&format!("# - {guess}")))?;
    context.print("")?;
    // In one line each, the lists are easier to correct.
    let text = toml::to_string(contract).map_err(WriteError::from);
    let text = text.map_err(|source| FitError::Write { url: draft.main.file.clone(), source })?;
    context.print(text.trim_end())?;
    Ok(ExitStatus::Success)
}

/// What is in a network, line by line.
fn describe(network: &Inspected) -> Vec<String> {
    let by = if network.producer.is_empty() { String::new() } else { format!(", by {}", network.producer) };
    let mut lines = vec![format!(
        "{}: {:.1} MB, opset {}, format {}{by}",
        network.file,
        network.num_bytes as f64 / 1e6,
        network.opset,
        network.ir_version
    )];
    lines.extend(network.files.keys().filter(|file| **file != network.file).map(|file| format!("weights  {file}")));
    lines.extend(network.metadata.iter().map(|(key, value)| format!("metadata {key} = {value}")));
    lines.extend(network.inputs.iter().map(|tensor| format!("input    {}", tensor.told())));
    lines.extend(network.outputs.iter().map(|tensor| format!("output   {}", tensor.told())));
    lines.extend(network.within.iter().map(|tensor| format!("within   {}", tensor.told())));
    let mut operators: Vec<_> = network.operators.iter().collect();
    operators.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
    let operators: Vec<String> = operators.iter().map(|(name, count)| format!("{count} {name}")).collect();
    lines.push(format!("operators: {}", operators.join(", ")));
    lines
}

fn text_of(contract: &Contract, url: &str) -> Result<String, Error> {
    let written = toml::to_string_pretty(contract).map_err(WriteError::from);
    Ok(written.map_err(|source| FitError::Write { url: url.to_owned(), source })?)
}

/// Makes a package: it is put together in memory and proven there, and then written.
pub fn package(context: &Context, network: &NetworkFile, packaging: &Packaging) -> Result<ExitStatus, Error> {
    let draft = Draft::of(context, network)?;
    let mut contract = match &packaging.contract {
        Some(location) => given_contract(context, location)?,
        None => draft.proposal.contract.clone(),
    };
    contract.graph.main.clone_from(&draft.main.file);
    contract.graph.decoder = draft.decoder.as_ref().map(|decoder| decoder.file.clone());
    let mut files: BTreeMap<String, Bytes> = draft
        .networks()
        .flat_map(|network| &network.files)
        .map(|(name, bytes)| (name.clone(), bytes.clone()))
        .collect();
    contract.files = files.iter().map(|(name, bytes)| (name.clone(), crate::hash::sha256(bytes))).collect();
    contract.files.insert(contract.golden.file.clone(), NO_SHA256.to_owned());

    let target = context.stores.open(&context.locate("--to", &packaging.to)?)?;
    let url = target.url().to_string();
    // All that can be wrong with the contract itself is told before anything is run.
    let contract = Contract::parse(&url, text_of(&contract, &url)?.as_bytes())?;
    let images = pictures(context, &packaging.images, &contract)?;
    let scratch =
        context.stores.open(&context.locate("the place of the new package", "memory:///lookalike/package/")?)?;
    for (name, bytes) in &files {
        context.block_on(scratch.put(name, bytes.clone()))?;
    }
    let golden = context.block_on(model::observe(&scratch, &contract, &draft.runtime, images))?;
    let golden_bytes = golden.write().map_err(|source| FitError::Golden { url: url.clone(), source })?;
    files.insert(contract.golden.file.clone(), golden_bytes);
    let written = context.block_on(package::write(&scratch, contract.clone(), files.clone()));
    let sha256 = written.map_err(|source| FitError::Write { url: url.clone(), source })?;
    let compute = Compute::on(Device::Cpu, 1);
    let proven = context.block_on(Model::load(&scratch, Some(&sha256), draft.runtime.clone(), &compute))?;
    publish(context, &target, contract.clone(), files)?;

    context.say(&format!("{} golden images, package {url}", golden.images.len()))?;
    if packaging.contract.is_none() {
        draft.proposal.guesses.iter().try_for_each(|guess| context.say(&format!("  guessed {guess}")))?;
    }
    let summary = json!({
        "package": url,
        "sha256": sha256,
        "name": proven.contract.name,
        "roles": contract.roles().map(model::Role::name).collect::<Vec<_>>(),
        "embedding_dim": proven.embedding_dim,
    });
    context.print(&summary.to_string())?;
    Ok(ExitStatus::Success)
}

fn given_contract(context: &Context, location: &str) -> Result<Contract, Error> {
    let (store, name) = open(context, "--contract", location)?;
    let bytes = context.block_on(store.get(&name))?;
    toml::from_slice(&bytes).map_err(|error| Error::Usage {
        message: format!("{} is no contract: {}", store.url_of(&name), error.to_string().trim_end()),
        hint: "begin with what `lookalike model inspect` prints".to_owned(),
    })
}

/// The first pictures of a folder that can be read.
fn pictures(context: &Context, location: &str, contract: &Contract) -> Result<Vec<Vec<u8>>, Error> {
    let store = context.stores.open(&context.locate("--images", location)?)?;
    let limits = DecodeLimits::default();
    let Some(image) = contract.input.image() else {
        return Err(Error::Usage {
            message: "the contract is of features, and a package is made here of pictures".to_owned(),
            hint: "export it with the module in models/, or leave out `kind` in [input]".to_owned(),
        });
    };
    let found = context.block_on(async {
        let mut names: Vec<String> = store
            .list("")
            .await?
            .into_iter()
            .filter(|object| object.size <= limits.max_image_bytes)
            .map(|object| store.relative(&object.location))
            .collect();
        names.sort();
        let mut found = Vec::new();
        for name in names {
            let bytes = store.get(&name).await?;
            if decode::decode(&bytes, &image.pixels, &limits).is_ok() {
                found.push(bytes.to_vec());
            }
            if found.len() == GOLDEN_IMAGES {
                break;
            }
        }
        Ok::<_, StoreError>(found)
    })?;
    if found.is_empty() {
        return Err(Error::Usage {
            message: format!("there is no picture that can be read in {}", store.url()),
            hint: "name a folder with at least one with --images".to_owned(),
        });
    }
    Ok(found)
}
