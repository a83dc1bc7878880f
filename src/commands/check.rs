//! `check`: could a run do its work here? Settings, runtime, model, source, and the stores, tried out one after the other.
//!
//! Everything that does not depend on what failed is tried, so that one call tells all there is to mend. What is written on the way
//! lies below `_lookalike/check` of the output and is removed again.

use std::path::{Path, PathBuf};

use bytes::Bytes;
use chrono::{DateTime, TimeDelta, Utc};
use object_store::ObjectMeta;
use serde_json::json;

use super::load_pipeline;
use crate::config::{Device, Overrides, Pipeline};
use crate::context::Context;
use crate::decode::{self, Color, Filter, Fit, PixelSpec, Pixels};
use crate::error::{Error, ExitStatus};
use crate::features::{Tensor, shape_text};
use crate::model::provider::try_provider;
use crate::model::{Contract, Provider, Runtime};
use crate::reference::Reference;
use crate::source::{Cells, ReadOptions, Selection, Source};
use crate::stages::packages::Packages;
use crate::stages::{Backfill, Job};
use crate::store::{PutOutcome, Store};
use crate::table::Table;

/// Folder of the output below which the store is tried out.
const FOLDER: &str = "_lookalike/check";

/// What is tried out in the output once it can be listed.
const OUTPUT_TRIALS: [&str; 4] = ["output write", "output put-if-absent", "output delete", "clock"];

/// Writers that race for one object.
const WRITERS: usize = 8;

/// Objects they race for: one race may be won by luck.
const ROUNDS: usize = 3;

/// Largest difference between this machine's clock and a store's. S3 refuses requests that are a quarter of an hour off, and what is
/// older than some age is judged by both clocks.
const MAX_CLOCK_SKEW: TimeDelta = TimeDelta::minutes(5);

/// Least free space on the disk of a local output: a few data files, and the log of their commit.
const MIN_FREE_BYTES: u64 = 256 << 20;

/// Pixels that the first image is decoded to: enough to see that it can be.
const TRIAL_PIXELS: PixelSpec = PixelSpec {
    height: 8,
    width: 8,
    color: Color::Rgb,
    filter: Filter::Nearest,
    fit: Fit::Stretch,
    resize: None,
    exif_rotation: true,
};

/// A store or a machine that is not fit for a run, where no request failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckError {
    /// Several writers, or none, were told that they created an object.
    #[error("put-if-absent does not exclude: {winners} of {WRITERS} writers were told that they created {url}")]
    NotExclusive {
        /// The object.
        url: String,
        /// How many were told so.
        winners: usize,
    },
    /// The object is not what the winner wrote.
    #[error("put-if-absent does not protect: {url} has not the bytes of the writer that created it")]
    NotProtected {
        /// The object.
        url: String,
    },
    /// An object is not what was written.
    #[error("{url} was written, and something else was read")]
    NotReadBack {
        /// The object.
        url: String,
    },
    /// An object is there after it was deleted.
    #[error("{url} was deleted, and is still there")]
    NotDeleted {
        /// The object.
        url: String,
    },
    /// The clocks differ.
    #[error("the store's clock is {} s {} this machine's", seconds.abs(), if *seconds < 0 { "behind" } else { "ahead of" })]
    Clock {
        /// Store's minus ours, in seconds.
        seconds: i64,
    },
    /// Next to no space.
    #[error("{free} of {} are free on the disk of {}", size(*total), folder.display(), free = size(*free))]
    Disk {
        /// A folder on the disk.
        folder: PathBuf,
        /// Bytes that this process may write.
        free: u64,
        /// Bytes of the disk.
        total: u64,
    },
}

impl CheckError {
    /// What the user can do about it.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::NotExclusive { .. } | Self::NotProtected { .. } => {
                "use a store that honors `If-None-Match: *` on PUT (S3, Google Cloud Storage, Azure, MinIO, SeaweedFS 4 do), and no \
                 proxy or gateway that drops it: commits of two runs would overwrite each other"
            }
            Self::NotReadBack { .. } | Self::NotDeleted { .. } => {
                "use a store that is consistent, and no cache or gateway before it that is not"
            }
            Self::Clock { .. } => "synchronize this machine's clock (NTP)",
            Self::Disk { .. } => "make room, or put [output] table on another disk",
        }
    }
}

/// How one thing was found.
#[derive(Debug, Clone, PartialEq)]
enum Outcome {
    Passed { detail: String },
    Failed { why: String, fix: String, status: ExitStatus },
    Skipped { needs: &'static str },
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq)]
struct Finding {
    what: &'static str,
    outcome: Outcome,
}

impl Finding {
    fn line(&self) -> String {
        let what = self.what;
        match &self.outcome {
            Outcome::Passed { detail } => format!("✔ {what} ({detail})"),
            Outcome::Failed { why, fix, .. } => format!("✖ {what}: {why}\n  fix: {fix}"),
            Outcome::Skipped { needs } => format!("- {what}: skipped, for it needs: {needs}"),
        }
    }

    fn json(&self) -> serde_json::Value {
        match &self.outcome {
            Outcome::Passed { detail } => json!({"check": self.what, "status": "passed", "detail": detail}),
            Outcome::Failed { why, fix, status } => {
                json!({"check": self.what, "status": "failed", "why": why, "fix": fix, "exit_code": *status as u8})
            }
            Outcome::Skipped { needs } => json!({"check": self.what, "status": "skipped", "needs": needs}),
        }
    }
}

/// Tries everything out, says what it found, and returns the exit code of the first failure.
pub fn check(context: &Context, file: &Path, overrides: &Overrides, as_json: bool) -> Result<ExitStatus, Error> {
    let mut checks = Checks { context, findings: Vec::new(), prints: !as_json };
    checks.all(file, overrides)?;
    let status = checks.findings.iter().find_map(|finding| match finding.outcome {
        Outcome::Failed { status, .. } => Some(status),
        _ => None,
    });
    let status = status.unwrap_or(ExitStatus::Success);
    if as_json {
        let findings: Vec<_> = checks.findings.iter().map(Finding::json).collect();
        context.print(&json!({"checks": findings, "exit_code": status as u8}).to_string())?;
    }
    Ok(status)
}

struct Checks<'a> {
    context: &'a Context,
    findings: Vec<Finding>,
    /// Whether each finding is printed as soon as it is made.
    prints: bool,
}

impl Checks<'_> {
    /// Tries one thing out. `fix` is what to do where the error itself has no advice.
    fn run<T>(
        &mut self,
        what: &'static str,
        fix: &str,
        trial: impl FnOnce(&Context) -> Result<(T, String), Error>,
    ) -> Result<Option<T>, Error> {
        let (value, outcome) = match trial(self.context) {
            Ok((value, detail)) => (Some(value), Outcome::Passed { detail }),
            Err(error) => {
                let mut why = vec![error.to_string()];
                if let Error::Config(config) = &error
                    && let problems @ [_, _, ..] = config.problems()
                {
                    why.extend(problems.iter().map(ToString::to_string));
                }
                why.extend(error.causes());
                let why = why.join(": ");
                let fix = error.hint().unwrap_or_else(|| fix.to_owned());
                (None, Outcome::Failed { why, fix, status: error.exit_status() })
            }
        };
        self.found(Finding { what, outcome })?;
        Ok(value)
    }

    fn skip(&mut self, what: &'static str, needs: &'static str) -> Result<(), Error> {
        self.found(Finding { what, outcome: Outcome::Skipped { needs } })
    }

    fn found(&mut self, finding: Finding) -> Result<(), Error> {
        if self.prints {
            self.context.print(&finding.line())?;
        }
        self.findings.push(finding);
        Ok(())
    }

    fn all(&mut self, file: &Path, overrides: &Overrides) -> Result<(), Error> {
        let pipeline = self.run("pipeline file", "name a pipeline file that this user may read", |context| {
            let pipeline = load_pipeline(context, file, overrides)?;
            let detail = format!("{}, name `{}`", file.display(), pipeline.name);
            Ok((pipeline, detail))
        })?;
        let runtime = self.run("ONNX Runtime", "install another build of ONNX Runtime", |context| {
            let runtime = Runtime::load(context.onnxruntime.as_deref())?;
            let detail = format!("{} from {} ({})", runtime.version, runtime.library.display(), runtime.found_by);
            Ok((runtime, detail))
        })?;
        let Some(pipeline) = pipeline else {
            for what in ["provider", "model package", "model replay", "source", "output list"] {
                self.skip(what, "pipeline file")?;
            }
            for what in OUTPUT_TRIALS.iter().chain(&["tables"]) {
                self.skip(what, "pipeline file")?;
            }
            return Ok(());
        };
        let provider = if let Some(runtime) = &runtime {
            let fix = "set another device in [execution]";
            self.run("provider", fix, |_| provider(runtime, pipeline.execution.device))?
        } else {
            self.skip("provider", "ONNX Runtime")?;
            None
        };
        let package = self.model(&pipeline, runtime, provider)?;
        let source = self.run("source", "check [source] in the pipeline file", |context| source(context, &pipeline))?;
        let is_reachable = self.output(&pipeline)?;
        match (package, source, is_reachable) {
            (None, ..) => self.skip("tables", "model package"),
            (_, None, _) => self.skip("tables", "source"),
            (.., false) => self.skip("tables", "output list"),
            (Some(_), Some(()), true) => {
                let fix = "choose another [output] table, or move away what lies there";
                self.run("tables", fix, |context| tables(context, &pipeline)).map(drop)
            }
        }
    }

    /// The package, its golden images, and the reference, which is of one model. Returns the contract if it is as agreed.
    fn model(
        &mut self,
        pipeline: &Pipeline,
        runtime: Option<Runtime>,
        provider: Option<Provider>,
    ) -> Result<Option<Contract>, Error> {
        let fix = "export the package again, or name another in [model] package";
        let package = self.run("model package", fix, |context| {
            let packages = Packages::find(context, pipeline)?;
            let urls = std::iter::once(&packages.model)
                .chain(&packages.encoder)
                .map(|package| package.store.url().to_string());
            let detail =
                format!("{}, sha256 {}, {}", packages.names(), packages.sha256(), urls.collect::<Vec<_>>().join(" "));
            Ok((packages, detail))
        })?;
        match (&package, runtime, provider) {
            (None, ..) => self.skip("model replay", "model package")?,
            (_, None, _) => self.skip("model replay", "ONNX Runtime")?,
            (_, _, None) => self.skip("model replay", "provider")?,
            (Some(packages), Some(runtime), Some(provider)) => {
                self.run("model replay", fix, |context| {
                    let model = packages.load(context, pipeline, &runtime, 1)?;
                    let each = std::iter::once(&packages.model).chain(&packages.encoder);
                    let detail = format!(
                        "{} files whole, golden images give on {} what the exporter saw, embedding of {}",
                        each.map(|package| package.contract.files.len()).sum::<usize>(),
                        provider.name(),
                        model.encoder.as_deref().unwrap_or(&model).embedding_dim,
                    );
                    Ok(((), detail))
                })?;
            }
        }
        if let Some(url) = pipeline.anomaly.as_ref().and_then(|anomaly| anomaly.reference.as_ref()) {
            match &package {
                None => self.skip("reference", "model package")?,
                Some(packages) => {
                    self.run("reference", "calibrate anew", |context| {
                        let (store, name) = context.open_file(url)?;
                        let reference = context.block_on(Reference::read(&store, &name, &packages.sha256()))?;
                        Ok(((), format!("{} of {} rows, {url}", reference.id, reference.num_rows)))
                    })?;
                }
            }
        }
        Ok(package.map(|packages| packages.model.contract))
    }

    /// The store that the tables go to. Returns whether it can be listed.
    fn output(&mut self, pipeline: &Pipeline) -> Result<bool, Error> {
        let url = &pipeline.output.table;
        let fix = "check [output] table, and that these credentials may list it";
        let output = self.run("output list", fix, |context| {
            let store = context.stores.open(url)?;
            let prefix = store.path("")?;
            let top = context.block_on(store.client().list_with_delimiter(Some(&prefix)));
            let top = top.map_err(|source| store.request("list", "", source))?;
            let detail = format!("{} folders and {} files in {url}", top.common_prefixes.len(), top.objects.len());
            Ok((store, detail))
        })?;
        let Some(output) = output else {
            for what in OUTPUT_TRIALS {
                self.skip(what, "output list")?;
            }
            return Ok(false);
        };
        let folder = output.folder(&format!("{FOLDER}/{}", uuid::Uuid::new_v4()))?;
        let missing = missing_folders(&folder);
        let fix = "check that these credentials, or this user, may write there";
        let written = self.run("output write", fix, |context| {
            let written = context.block_on(written_and_read(&folder))?;
            Ok((written, "written and read back".to_owned()))
        })?;
        if let Some((started, written, ended)) = &written {
            self.run("output put-if-absent", fix, |context| {
                race(context, &folder)?;
                Ok(((), format!("{ROUNDS} races of {WRITERS} writers, one winner each")))
            })?;
            self.run("output delete", "check that these credentials may delete", |context| {
                Ok(((), context.block_on(deleted(&folder))?))
            })?;
            self.run("clock", "synchronize this machine's clock (NTP)", |_| {
                Ok(((), clock(written, *started, *ended)?))
            })?;
        } else {
            for what in &OUTPUT_TRIALS[1..] {
                self.skip(what, "output write")?;
            }
        }
        clean_up(self.context, &folder, &missing);
        if let Ok(path) = url.to_file_path() {
            self.run("disk", "check the folder of [output] table", |_| Ok(((), disk(&path)?)))?;
        }
        Ok(true)
    }
}

/// The provider that the device means here, tried out.
fn provider(runtime: &Runtime, device: Device) -> Result<(Provider, String), Error> {
    let named = |provider: Provider| (provider, provider.name().to_owned());
    if let Some(provider) = Provider::of(device) {
        return Ok(try_provider(runtime, provider).map(|()| named(provider))?);
    }
    Ok(match try_provider(runtime, Provider::Cuda) {
        Ok(()) => named(Provider::Cuda),
        Err(error) => {
            try_provider(runtime, Provider::Cpu)?;
            (Provider::Cpu, format!("{}, for {error}", Provider::Cpu.name()))
        }
    })
}

/// Lists the table, reads its footers, and decodes one image, or reads one row of features.
fn source(context: &Context, pipeline: &Pipeline) -> Result<((), String), Error> {
    let unit_rows = pipeline.execution.unit_rows.get() as u64;
    let all = Selection::default();
    let source = context.block_on(Source::discover(&context.stores, &pipeline.source, unit_rows, &all))?;
    let limits = context.pass(pipeline, &source).limits;
    let options = ReadOptions { batch_rows: 1, max_image_bytes: limits.max_image_bytes };
    let mut first = None;
    context.block_on(source.read_until(&options, |batch| {
        first = match batch.cells {
            Cells::Images(images) => images.into_iter().next().map(|image| {
                let pixels = image.and_then(|bytes| decode::decode(&bytes, &TRIAL_PIXELS, &limits));
                pixels.map(|Pixels { source_width, source_height, .. }| {
                    format!("the first image has {source_width} x {source_height} pixels")
                })
            }),
            Cells::Features(rows) => {
                let told = |row: Tensor| format!("the first row has {} values", shape_text(&row.shape));
                rows.into_iter().next().map(|row| row.map(told))
            }
        };
        false
    }))?;
    let first = match first {
        None => "no row satisfies `where`".to_owned(),
        Some(Ok(first)) => first,
        Some(Err(reject)) => format!("the first image is rejected: {reject}"),
    };
    let rows = source.num_rows().map_or_else(|| "rows not counted yet".to_owned(), |rows| format!("{rows} rows"));
    let partitions = source.partitions.len();
    Ok(((), format!("{rows} in {partitions} partitions of {}; {first}", source.url())))
}

/// Opens the tables as a run would, and reads what is live in them.
fn tables(context: &Context, pipeline: &Pipeline) -> Result<((), String), Error> {
    let job = Job::prepare(context, pipeline, &Backfill::default())?;
    job.check_rule()?;
    let mut parts = Vec::new();
    let is_written = |table: &&&Table| job.tables().contains(&table.name());
    for table in [&job.latents, &job.neighbors, &job.groups, &job.anomalies].iter().filter(is_written) {
        let live = context.block_on(table.live())?;
        parts.push(format!("{} partitions in {}", live.partitions().len(), table.name().name()));
    }
    Ok(((), parts.join(", ")))
}

/// Writes an object, reads it back, and returns what the store says of it, with the times before and after it was written.
async fn written_and_read(folder: &Store) -> Result<(DateTime<Utc>, ObjectMeta, DateTime<Utc>), Error> {
    let name = "object";
    let started = Utc::now();
    let bytes = Bytes::from(format!("written by lookalike check at {}", Utc::now().to_rfc3339()));
    folder.put(name, bytes.clone()).await?;
    let ended = Utc::now();
    if folder.get(name).await? != bytes {
        return Err(CheckError::NotReadBack { url: folder.url_of(name) }.into());
    }
    Ok((started, folder.head(name).await?, ended))
}

/// Lets several writers create one object at once. Exactly one may be told that it did, and its bytes must be there, then and later.
fn race(context: &Context, folder: &Store) -> Result<(), Error> {
    for round in 0..ROUNDS {
        let name = format!("race-{round}");
        let bytes = |writer: usize| Bytes::from(format!("writer {writer} of round {round}"));
        let writers: Vec<_> = (0..WRITERS)
            .map(|writer| {
                let (folder, name, bytes) = (folder.clone(), name.clone(), bytes(writer));
                context.handle().spawn(async move { folder.put_if_absent(&name, bytes).await })
            })
            .collect();
        let mut winners = Vec::new();
        for (writer, outcome) in writers.into_iter().enumerate() {
            let outcome =
                context.block_on(outcome).unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()));
            if outcome? == PutOutcome::Created {
                winners.push(writer);
            }
        }
        let url = folder.url_of(&name);
        let [winner] = winners[..] else {
            return Err(CheckError::NotExclusive { url, winners: winners.len() }.into());
        };
        let late = context.block_on(folder.put_if_absent(&name, Bytes::from_static(b"late")))?;
        if late != PutOutcome::AlreadyThere || context.block_on(folder.get(&name))? != bytes(winner) {
            return Err(CheckError::NotProtected { url }.into());
        }
    }
    Ok(())
}

/// Deletes everything in the folder, and looks whether it is gone.
async fn deleted(folder: &Store) -> Result<String, Error> {
    let objects = folder.list("").await?;
    for object in &objects {
        let name = folder.relative(&object.location);
        folder.delete(&name).await?;
        match folder.head(&name).await {
            Ok(_) => return Err(CheckError::NotDeleted { url: folder.url_of(&name) }.into()),
            Err(error) if error.is_not_found() => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(format!("{} objects", objects.len()))
}

/// Compares the time that the store gave an object with the time in which it was written here. Stores keep whole seconds.
fn clock(written: &ObjectMeta, started: DateTime<Utc>, ended: DateTime<Utc>) -> Result<String, CheckError> {
    let time = written.last_modified;
    let second = TimeDelta::seconds(1);
    let skew = if time + second < started {
        time - started
    } else if time > ended + second {
        time - ended
    } else {
        return Ok("that of the store agrees".to_owned());
    };
    let seconds = skew.num_seconds();
    if skew.abs() > MAX_CLOCK_SKEW {
        Err(CheckError::Clock { seconds })
    } else {
        Ok(format!("{seconds} s off the store's"))
    }
}

/// Looks how much room the disk of a folder has, which need not be there yet.
fn disk(folder: &Path) -> Result<String, Error> {
    let there = folder.ancestors().find(|folder| folder.is_dir()).unwrap_or(folder);
    let space = fs4::statvfs(there)
        .map_err(|source| Error::Io { action: format!("ask for the free space of {}", there.display()), source })?;
    Ok(enough_space(there, space.available_space(), space.total_space())?)
}

fn enough_space(folder: &Path, free: u64, total: u64) -> Result<String, CheckError> {
    if free < MIN_FREE_BYTES {
        return Err(CheckError::Disk { folder: folder.to_owned(), free, total });
    }
    Ok(format!("{} of {} are free", size(free), size(total)))
}

/// Bytes as people say them.
fn size(bytes: u64) -> String {
    format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30))
}

/// The folders of a local disk that writing to `folder` makes, innermost first. Other stores have none.
fn missing_folders(folder: &Store) -> Vec<PathBuf> {
    let Ok(path) = folder.url().to_file_path() else { return Vec::new() };
    path.ancestors().take_while(|folder| !folder.exists()).map(Path::to_owned).collect()
}

/// Removes what the trials have left. Where that fails, the trial of deleting has said so.
fn clean_up(context: &Context, folder: &Store, missing: &[PathBuf]) {
    let objects = context.block_on(folder.list("")).unwrap_or_default();
    for object in objects {
        if let Err(error) = context.block_on(folder.delete(&folder.relative(&object.location))) {
            tracing::debug!(%error, "left behind");
        }
    }
    for made in missing {
        // Whoever has put something into it meanwhile keeps it.
        if std::fs::remove_dir(made).is_err() {
            break;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(seconds: i64) -> ObjectMeta {
        ObjectMeta { location: "x".into(), last_modified: at(seconds), size: 0, e_tag: None, version: None }
    }

    fn at(seconds: i64) -> DateTime<Utc> {
        DateTime::from_timestamp(seconds, 500_000_000).unwrap()
    }

    #[test]
    fn clocks_may_differ_by_less_than_minutes() {
        let skew = |seconds| clock(&object(seconds), at(1_000), at(1_010)).map_err(|error| error.to_string());
        for agreeing in [1_000, 1_005, 1_010] {
            assert_eq!(skew(agreeing).unwrap(), "that of the store agrees");
        }
        assert_eq!(skew(1_040).unwrap(), "30 s off the store's");
        assert_eq!(skew(940).unwrap(), "-60 s off the store's");
        assert_eq!(skew(1_010 + 3_600).unwrap_err(), "the store's clock is 3600 s ahead of this machine's");
        assert_eq!(skew(1_000 - 3_600).unwrap_err(), "the store's clock is 3600 s behind this machine's");
    }

    #[test]
    fn a_disk_that_is_nearly_full_is_refused() {
        assert_eq!(enough_space(Path::new("/lake"), 1 << 30, 1 << 31).unwrap(), "1.0 GiB of 2.0 GiB are free");
        let error = enough_space(Path::new("/lake"), MIN_FREE_BYTES - 1, 1 << 31).unwrap_err();
        assert_eq!(error.to_string(), "0.2 GiB of 2.0 GiB are free on the disk of /lake");
    }
}
