//! The stages of a run: embed → neighbors → groups → flag, each reading the tables before it and publishing exactly one, and the record
//! of the run at the end, with what [`drift`] found.
//!
//! Every stage names what it is about to write by a **run id**, a fingerprint of all that the rows depend on. Rows of that id are
//! live already: nothing to do. So a changed threshold runs `flag` alone, a changed `k` runs `neighbors` alone, and a changed model
//! runs everything.
//!
//! Order of the commits: `latents` by partition, then `neighbors` by partition, then `anomalies` by partition, then `runs`. Between
//! two of them a reader may join new latents with the lists or flags of the rows before; `run_id` columns tell. A partition listed
//! in `runs` is complete in all tables.

pub mod drift;
pub mod embed;
pub mod flag;
pub mod groups;
pub mod neighbors;
pub mod packages;
pub mod record;

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::sync::{Arc, OnceLock};

use serde::{Deserialize, Serialize};
use url::Url;

use crate::config::Pipeline;
use crate::context::Context;
use crate::error::Error;
use crate::hash::Fingerprint;
use crate::model::{Contract, Decoder, Model, Provider, Runtime};
use crate::pass::Pass;
use crate::reference::{Reference, ReferenceError};
use crate::schema::{self, TableName};
use crate::source::{PartitionValues, Selection, Source, SourcePartition};
use crate::store::Store;
use crate::table::{Live, Presence, Table, TableError, fingerprint};
use packages::Packages;

/// Raised whenever the same inputs and settings would give other values, so that rows computed by older rules are not taken for
/// today's.
const SCORING_VERSION: u32 = 3;

/// Rounds of a stage that reads all of `latents` while others keep publishing there, before giving up.
const SETTLE_ROUNDS: u32 = 20;

/// Footer value that names the model package.
pub const MODEL_FOOTER: &str = "model_sha256";

/// What a run takes up, beyond what the pipeline file says. No part of what rows are: a partition that was backfilled is up to date for
/// every later run.
#[derive(Debug, Clone, Default)]
pub struct Backfill {
    /// The partitions of the source that are looked at.
    pub selection: Selection,
    /// Which of them are embedded.
    pub redo: Redo,
    /// Where files were added to a partition, whether the rows of its other files are carried over instead of embedded again.
    pub added_only: bool,
}

/// Which partitions are embedded.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Redo {
    /// Those whose rows are not live, or are not what they would be now.
    #[default]
    Changed,
    /// Those without any rows; what is there stays, however old.
    Missing,
    /// Those that changed; and of the others, the rows that could not be used.
    Rejected,
    /// All.
    All,
}

/// What the stages of one run share.
#[derive(Debug)]
pub struct Job<'a> {
    /// The process.
    pub context: &'a Context,
    /// The settings.
    pub pipeline: &'a Pipeline,
    /// The source, cut into units.
    pub source: Source,
    /// What is taken up.
    pub backfill: Backfill,
    /// Where the tables are.
    pub output: Store,
    /// The model's contract.
    pub contract: Contract,
    /// What stands for the model package, and for the encoder's beside it.
    pub model_sha256: String,
    /// The packages.
    pub packages: Packages,
    model: OnceLock<Arc<Model>>,
    /// The reference that the pipeline names, once it is read.
    named_reference: OnceLock<Arc<Reference>>,
    /// The `latents` table.
    pub latents: Table,
    /// The `neighbors` table.
    pub neighbors: Table,
    /// The `groups` table.
    pub groups: Table,
    /// The `anomalies` table.
    pub anomalies: Table,
    /// The `runs` table.
    pub runs: Table,
    presence: Presence,
}

impl<'a> Job<'a> {
    /// Reads the source's footers and the model's contract, and checks that they fit; writes nothing.
    pub fn prepare(context: &'a Context, pipeline: &'a Pipeline, backfill: &Backfill) -> Result<Self, Error> {
        let unit_rows = pipeline.execution.unit_rows.get() as u64;
        let source = Source::discover(&context.stores, &pipeline.source, unit_rows, &backfill.selection);
        Self::over(context, pipeline, context.block_on(source)?, backfill)
    }

    /// The same for stages that read no image: of the source, only the columns are found out.
    pub fn prepare_after_embed(context: &'a Context, pipeline: &'a Pipeline) -> Result<Self, Error> {
        let source = context.block_on(Source::describe(&context.stores, &pipeline.source))?;
        Self::over(context, pipeline, source, &Backfill::default())
    }

    fn over(context: &'a Context, pipeline: &'a Pipeline, source: Source, backfill: &Backfill) -> Result<Self, Error> {
        let stores = &context.stores;
        let packages = Packages::find(context, pipeline)?;
        packages.check_source(&source)?;
        let url = &pipeline.output.table;
        if url.to_file_path().is_ok_and(|path| path.to_string_lossy().contains('%')) {
            return Err(Error::Usage {
                message: format!("the path of [output] table contains a percent sign: {url}"),
                hint: "the Delta log spells paths with percent signs, and readers of local tables take this one for such; choose another folder"
                    .to_owned(),
            });
        }
        let output = stores.open(url)?;
        let presence = Presence::new(&output, context.handle());
        let publish = pipeline.output.publish;
        let table = |name| Table::new(&output, name, &source.partition_keys, publish, &presence, context.handle());
        Ok(Self {
            latents: table(TableName::Latents)?,
            neighbors: table(TableName::Neighbors)?,
            groups: table(TableName::Groups)?,
            anomalies: table(TableName::Anomalies)?,
            runs: table(TableName::Runs)?,
            presence,
            context,
            pipeline,
            source,
            backfill: backfill.clone(),
            output,
            contract: packages.model.contract.clone(),
            model_sha256: packages.sha256(),
            packages,
            model: OnceLock::new(),
            named_reference: OnceLock::new(),
        })
    }

    /// The model, loaded and replayed on first use: a run with nothing to do does not load it.
    pub fn model(&self) -> Result<&Arc<Model>, Error> {
        if let Some(model) = self.model.get() {
            return Ok(model);
        }
        let runtime = Runtime::load(self.context.onnxruntime.as_deref())?;
        let workers = self.context.workers(self.pipeline);
        let loaded = self.packages.load(self.context, self.pipeline, &runtime, workers)?;
        Ok(self.model.get_or_init(|| Arc::new(loaded)))
    }

    /// The model's decoder, for as many threads as work on images.
    pub fn decoder(&self) -> Result<Decoder, Error> {
        let model = self.model()?;
        Ok(self.context.block_on(model.decoder(&self.packages.model.store))?)
    }

    /// Regions of the image that the embedding consists of, one after the other.
    pub fn embedding_regions(&self) -> usize {
        self.packages.encoder_contract().outputs.regions.map_or(1, NonZeroUsize::get)
    }

    /// The column of `latents` that has what the decoder decodes: mu.
    pub fn code_column(&self) -> &'static str {
        let has_embedding = self.packages.encoder.is_some() || self.contract.outputs.embedding.is_some();
        if has_embedding { schema::column::MU } else { schema::column::EMBEDDING }
    }

    /// The model if a stage has loaded it.
    pub fn loaded_model(&self) -> Option<&Model> {
        self.model.get().map(|model| &**model)
    }

    /// What computes: as set, or for `auto` what the model was loaded on.
    pub fn provider(&self) -> Result<Provider, Error> {
        match Provider::of(self.pipeline.execution.device) {
            Some(provider) => Ok(provider),
            None => Ok(self.model()?.provider),
        }
    }

    /// What computes, with how many threads a session, and with rounded factors or not: two that differ here give other values.
    fn precision(&self) -> Result<String, Error> {
        let provider = self.provider()?;
        let execution = &self.pipeline.execution;
        let threads = match execution.threads.get() {
            1 => String::new(),
            threads => format!(" threads={threads}"),
        };
        let rounded = if execution.tf32 && provider.is_gpu() { " tf32" } else { "" };
        Ok(format!("{}{threads}{rounded}", provider.name()))
    }

    /// The settings of a pass over the images.
    pub fn pass(&self) -> Pass<'_> {
        self.context.pass(self.pipeline, &self.source)
    }

    /// Fingerprint of a partition of `latents`: of the files it is made of, and of all else that its rows depend on. The run id of rows
    /// that were made once is this; rows that were made again on demand have the number of the revision after it.
    pub fn latents_run_id(&self, partition: &SourcePartition) -> Result<String, Error> {
        Ok(Fingerprint::new("latents")
            .with("settings", &self.latents_settings()?)
            .with("partition", &partition.values.to_string())
            .with("source", &partition.identity)
            .short())
    }

    /// Fingerprint of all that the rows of `latents` depend on, but for the source's files.
    pub fn latents_settings(&self) -> Result<String, Error> {
        let source = &self.pipeline.source;
        let limits = &self.pipeline.limits;
        Ok(Fingerprint::new("latents settings")
            .with("schema", &schema::VERSION.to_string())
            .with("scoring", &SCORING_VERSION.to_string())
            .with("format", source.format.name())
            .with("id", &source.id)
            .with("image", &source.image)
            .with("columns", &source.columns.join("\0"))
            .with("where", &self.source.predicate_text().unwrap_or_default())
            .with("duplicates", source.duplicates.name())
            .with("model", &self.model_sha256)
            .with("provider", &self.precision()?)
            .with("elbo_samples", &self.pipeline.require_model()?.elbo_samples.to_string())
            .with("decode", self.pipeline.execution.decode.name())
            .with("max_image_bytes", &limits.max_image_bytes.to_string())
            .with("max_pixels", &limits.max_pixels.to_string())
            .with("max_decode_secs", &limits.max_decode_secs.to_string())
            .full())
    }

    /// Finds out what would fail in the flag stage: a rule that the model has no output for, a reference of another model.
    pub fn check_rule(&self) -> Result<(), Error> {
        let Some(settings) = &self.pipeline.anomaly else { return Ok(()) };
        let rule = settings.rule;
        if !self.packages.gives(rule) {
            let url = self.packages.model.store.url().to_string();
            return Err(ReferenceError::NoScores { url, rule }.into());
        }
        flag::check_segment(self, settings)?;
        flag::named_reference(self, settings)?;
        Ok(())
    }

    /// Loads the model if there is something to embed, so that one which does not load is found out before a table is made.
    pub fn check_model(&self) -> Result<(), Error> {
        let live = self.context.block_on(self.latents.live())?;
        for partition in &self.source.partitions {
            if embed::decide(self, &live, partition)?.work != embed::Work::Nothing {
                self.model()?;
                break;
            }
        }
        Ok(())
    }

    /// Fails where there is nothing to find neighbors of, or to flag.
    pub fn require_latents(&self) -> Result<(), Error> {
        if self.context.block_on(self.latents.live())?.files.is_empty() {
            return Err(Error::Usage {
                message: format!("there are no latents at {}", self.latents.store().url()),
                hint: "run `lookalike embed` or `lookalike run` first".to_owned(),
            });
        }
        Ok(())
    }

    /// The tables that a run of the pipeline writes.
    pub fn tables(&self) -> Vec<TableName> {
        tables_of(self.pipeline)
    }

    /// Makes ready to write: says that this run is under way, creates those of the tables that are missing, and checks the columns of
    /// those that are there.
    pub fn ensure(&self, tables: &[TableName]) -> Result<(), Error> {
        self.context.block_on(self.presence.announce(&self.pipeline.name))?;
        for table in [&self.latents, &self.neighbors, &self.groups, &self.anomalies, &self.runs] {
            if tables.contains(&table.name()) {
                let schema = schema::table_schema(table.name(), &self.source.kept_schema, &self.source.partition_keys);
                self.context.block_on(table.ensure(&schema))?;
            }
        }
        Ok(())
    }

    /// The live files of `latents` that were made by this model. Vectors and scores of different models do not compare, so the
    /// partitions of other models keep their neighbors and flags until a run embeds them anew.
    pub fn comparable_latents(&self) -> Result<Live, Error> {
        let live = self.context.block_on(self.latents.live())?;
        self.of_this_model(&self.latents, live)
    }

    /// Those of the live files of a `latents` table that were made by this model.
    pub fn of_this_model(&self, latents: &Table, mut live: Live) -> Result<Live, Error> {
        for partition in live.partitions() {
            let Some(file) = live.of(&partition).next() else { continue };
            let model = self.context.block_on(latents.footer_value(file, MODEL_FOOTER))?;
            if model.as_deref() != Some(self.model_sha256.as_str()) {
                tracing::debug!(partition = partition.name(), model, "left as it is: latents of another model");
                live.files.retain(|file| file.partition != partition);
            }
        }
        Ok(live)
    }

    /// Runs a stage that reads all of `latents`, and runs it again where another run published latents meanwhile: what the stage
    /// published may have replaced what that run made of the newer ones. Of two runs, the one that publishes last looks last.
    pub fn settle(
        &self,
        report: &mut StageReport,
        mut stage: impl FnMut(&Live, &mut StageReport) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.settle_over(
            || Ok(self.context.block_on(self.latents.live())?),
            |latents| stage(&self.of_this_model(&self.latents, latents.clone())?, report),
        )
    }

    /// The same for a stage that reads what `read` gives.
    fn settle_over<T: PartialEq>(
        &self,
        read: impl Fn() -> Result<T, Error>,
        mut stage: impl FnMut(&T) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let mut seen = read()?;
        for _ in 0..SETTLE_ROUNDS {
            self.context.stop.check()?;
            stage(&seen)?;
            let now = read()?;
            if now == seen {
                return Ok(());
            }
            tracing::info!("latents or neighbors have changed meanwhile; looking at them too");
            seen = now;
        }
        let table = self.latents.store().url().to_string();
        Err(TableError::Contention { table, partition: "all partitions".to_owned() }.into())
    }

    /// A table of another run, which is published below `output`.
    pub fn find_table(&self, output: &Url, name: TableName) -> Result<Table, Error> {
        let store = self.context.stores.open(output)?;
        let presence = Presence::new(&store, self.context.handle());
        let found = self.context.block_on(Table::find(&store, name, &presence, self.context.handle()))?;
        found.ok_or_else(|| Error::Usage {
            message: format!("there is no table {} at {output}", name.name()),
            hint: "name the [output] table of a run that has ended".to_owned(),
        })
    }

    /// Takes the rows of partitions that `latents` does not hold any more out of a table. `live` must have been read before this call:
    /// a partition that another process adds now is in `latents` first.
    pub fn remove_vanished(&self, table: &Table, live: &Live) -> Result<(), Error> {
        let latents = self.context.block_on(self.latents.live())?.partitions();
        for partition in live.partitions().iter().filter(|partition| !latents.contains(partition)) {
            self.context.block_on(table.replace_partition(partition, "", &[]))?;
        }
        Ok(())
    }

    /// What goes into the footer of every data file, beside the run's id.
    pub fn footer(&self, run_id: &str) -> Result<Vec<(&'static str, String)>, Error> {
        let metric = self.pipeline.neighbors.as_ref().map(|neighbors| neighbors.metric.name().to_owned());
        Ok(vec![
            ("version", env!("CARGO_PKG_VERSION").to_owned()),
            ("schema_version", schema::VERSION.to_string()),
            ("run_id", run_id.to_owned()),
            (MODEL_FOOTER, self.model_sha256.clone()),
            ("settings_sha256", crate::hash::sha256(self.pipeline.settings_json().to_string().as_bytes())),
            ("device", self.provider()?.name().to_owned()),
            ("metric", metric.unwrap_or_default()),
        ])
    }
}

/// The tables that a run of a pipeline writes.
pub fn tables_of(pipeline: &Pipeline) -> Vec<TableName> {
    let is_written = |table: &TableName| match table {
        TableName::Latents | TableName::Runs => true,
        TableName::Neighbors => pipeline.neighbors.is_some(),
        TableName::Groups => pipeline.groups().is_some(),
        TableName::Anomalies => pipeline.anomaly.is_some(),
    };
    TableName::ALL.into_iter().filter(is_written).collect()
}

/// What a stage did with each partition.
#[derive(Debug, Default)]
pub struct StageReport {
    /// The run id of each partition, and whether this process wrote its rows.
    pub partitions: BTreeMap<PartitionValues, PartitionReport>,
    /// Rows that this process put through the model; none for stages without one.
    pub rows_embedded: u64,
    /// How neighbors were searched, where they were.
    pub found: Option<neighbors::Found>,
    /// Wall time of the stage, in seconds.
    pub secs: f64,
}

/// What a stage did with one partition.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PartitionReport {
    /// Id of the rows that are live now.
    pub run_id: String,
    /// Whether they were written now; otherwise they were there before.
    pub written: bool,
    /// Rows of the table.
    pub num_rows: u64,
    /// Rows by status (`embed`), or flagged and not (`flag`).
    pub counts: BTreeMap<String, u64>,
    /// Rows of the source that were dropped because an earlier one had their id (`embed`).
    pub num_duplicates: u64,
}

impl StageReport {
    /// Takes the runs of rows that were written once more since: sorting by cells does that.
    pub fn follow(&mut self, latents: &Live) {
        for (partition, entry) in &mut self.partitions {
            let run_id = latents.run_of(partition);
            if let Some(run_id) = run_id.filter(|run_id| fingerprint(run_id) == fingerprint(&entry.run_id)) {
                run_id.clone_into(&mut entry.run_id);
            }
        }
    }

    /// Whether anything was written.
    pub fn any_written(&self) -> bool {
        self.partitions.values().any(|partition| partition.written)
    }

    /// A count summed over the partitions.
    pub fn total(&self, count: &str) -> u64 {
        self.partitions.values().filter_map(|partition| partition.counts.get(count)).sum()
    }

    /// Rows of the partitions that were written now.
    pub fn rows_written(&self) -> u64 {
        self.partitions.values().filter(|partition| partition.written).map(|partition| partition.num_rows).sum()
    }

    /// Rows summed over the partitions.
    pub fn num_rows(&self) -> u64 {
        self.partitions.values().map(|partition| partition.num_rows).sum()
    }
}
