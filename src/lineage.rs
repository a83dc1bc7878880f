//! Lineage: where tables come from, told to a server of [OpenLineage](https://openlineage.io) while runs go on.
//!
//! Nothing is told unless the environment says where, by the variables of its own clients:
//!
//! | variable | meaning |
//! |---|---|
//! | `OPENLINEAGE_URL` | the server, by http or https |
//! | `OPENLINEAGE_ENDPOINT` | the path there; else `api/v1/lineage` |
//! | `OPENLINEAGE_API_KEY` | a key, sent as a bearer token |
//! | `OPENLINEAGE_NAMESPACE` | the namespace of the job; else `default` |
//! | `OPENLINEAGE_DISABLED` | `true`: nothing is told |
//! | `OPENLINEAGE_CONTEXT` | the run that this one is a part of, as JSON; or |
//! | `OPENLINEAGE_PARENT_ID`, `OPENLINEAGE_ROOT_PARENT_ID` | the same as `namespace/name/run id`, as Airflow's macros give it |
//! | `OPENLINEAGE__TRANSPORT__TYPE` | `file`: events go to files, and no server is asked; or `http` |
//! | `OPENLINEAGE__TRANSPORT__LOG_FILE_PATH`, `…__APPEND` | the file, to which lines are added where `…__APPEND` is `true`; else each event has a file of its own, with the time in its name |
//!
//! A [`Run`] is told of twice: when it begins, and when it has ended, as complete, failed, or stopped. It is a value that a scheduler's
//! later step can make again: where several processes do the work of one run, the first calls [`Lineage::begin`], each of the
//! others [`Lineage::join`], with the same [`run_id`], and the last [`Lineage::end`]. So a plan tells of the beginning, and the commit of its
//! last stage of the end; that a task between them failed is for the engine to tell, which may try it again.
//!
//! No run fails for it: what goes wrong is a line in the log. A server has [`PATIENCE`] for an event, and the first one is sent while the
//! work goes on.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use arrow::datatypes::{DataType, Field, Schema};
use chrono::{DateTime, Days, NaiveDate, SecondsFormat, Utc};
use object_store::ClientOptions;
use object_store::client::{HttpConnector as _, HttpRequest, ReqwestConnector};
use serde_json::{Value, json};
use tokio::task::JoinHandle;
use url::Url;
use uuid::Uuid;

use crate::config::Pipeline;
use crate::context::Context;
use crate::error::{Error, ExitStatus};
use crate::hash;
use crate::redact::redact_line;
use crate::schema::{TableName, table_schema};
use crate::source::Selection;
use crate::stages::record::RunReport;
use crate::stages::{Job, StageReport, tables_of};

/// How long a server may take for an event, and a run wait for it.
pub const PATIENCE: Duration = Duration::from_secs(3);

/// How long it may take for the last event where the first one has used that up.
const LEAST_PATIENCE: Duration = Duration::from_secs(1);

/// The variable that holds the key of the server.
pub(crate) const API_KEY_VARIABLE: &str = "OPENLINEAGE_API_KEY";

/// Where servers take events, below their URL.
const DEFAULT_ENDPOINT: &str = "api/v1/lineage";

/// The namespace that the clients of OpenLineage give jobs without one.
const DEFAULT_NAMESPACE: &str = "default";

/// Who tells.
const PRODUCER: &str = concat!("urn:lookalike:", env!("CARGO_PKG_VERSION"));

const EVENT_SCHEMA: &str = "https://openlineage.io/spec/2-0-2/OpenLineage.json#/$defs/RunEvent";

/// The schemas of facets: the version of each, and its name.
const FACETS: &str = "https://openlineage.io/spec/facets/";

/// Bytes of an answer that are shown where a server refuses an event.
const ANSWER_SHOWN: usize = 200;

/// The id of a run that began at a time, by which all its processes know it: of version 7, as the clients of OpenLineage make them. `key`
/// is what no two runs that begin at a time share.
pub fn run_id(began: DateTime<Utc>, key: &str) -> Uuid {
    let millis = u64::try_from(began.timestamp_millis()).unwrap_or_default();
    let mut rest = [0; 10];
    rest.copy_from_slice(&hash::digest(key.as_bytes())[..10]);
    uuid::Builder::from_unix_timestamp_millis(millis, &rest).into_uuid()
}

/// A run, as events tell of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Run {
    /// Its id.
    pub id: Uuid,
    /// The job: the pipeline's name.
    pub job: String,
    /// Days that it is about, the last one included.
    days: Option<(NaiveDate, Option<NaiveDate>)>,
    inputs: Vec<Dataset>,
    outputs: Vec<Dataset>,
}

/// A table, or something else at a location, that is read or written.
#[derive(Debug, Clone, PartialEq)]
struct Dataset {
    url: Url,
    /// What the pipeline calls it.
    table: Option<TableName>,
    /// The digest of what does not change.
    version: Option<String>,
    schema: Option<Arc<Schema>>,
    /// Rows that were read or written.
    rows: Option<u64>,
}

impl Dataset {
    fn at(url: &Url) -> Self {
        Self { url: url.clone(), table: None, version: None, schema: None, rows: None }
    }
}

impl Run {
    /// A run of a pipeline over a selection of its partitions.
    pub fn of(pipeline: &Pipeline, selection: &Selection, id: Uuid) -> Self {
        let packages = pipeline.model.iter().map(|model| &model.package);
        let packages = packages.chain(pipeline.encoder.iter().map(|encoder| &encoder.package));
        let neighbors = pipeline.neighbors.iter().filter_map(|neighbors| neighbors.reference.as_ref());
        let searched = neighbors.map(|output| Dataset::at(&below(output, TableName::Latents)));
        let normal = pipeline.anomaly.iter().filter_map(|anomaly| anomaly.reference.as_ref());
        let inputs = std::iter::once(&pipeline.source.table).chain(packages).chain(normal).map(Dataset::at);
        let output = |table| Dataset { table: Some(table), ..Dataset::at(&below(&pipeline.output.table, table)) };
        Self {
            id,
            job: pipeline.name.clone(),
            days: selection.from.map(|from| (from, selection.to)),
            inputs: inputs.chain(searched).collect(),
            outputs: tables_of(pipeline).into_iter().map(output).collect(),
        }
    }

    /// Takes over what the stages of a job have read and written.
    fn wrote(&mut self, job: &Job<'_>, report: &RunReport) {
        if let Some(source) = self.inputs.first_mut() {
            source.rows = Some(report.rows_in());
        }
        let packages = std::iter::once(&job.packages.model).chain(&job.packages.encoder);
        for (dataset, package) in self.inputs.iter_mut().skip(1).zip(packages) {
            dataset.version = Some(package.sha256.clone());
        }
        for dataset in &mut self.outputs {
            let Some(table) = dataset.table else { continue };
            let source = &job.source;
            dataset.schema = Some(Arc::new(table_schema(table, &source.kept_schema, &source.partition_keys)));
            let stage = match table {
                TableName::Latents => Some(&report.embed),
                TableName::Neighbors => report.neighbors.as_ref(),
                TableName::Groups => report.groups.as_ref(),
                TableName::Anomalies => report.flag.as_ref(),
                TableName::Runs => None,
            };
            dataset.rows = stage.map(StageReport::rows_written);
        }
    }
}

/// The location of a table below an output prefix.
fn below(output: &Url, table: TableName) -> Url {
    let mut url = output.clone();
    url.set_path(&format!("{}/{}", output.path().trim_end_matches('/'), table.name()));
    url
}

/// How a run has ended.
#[derive(Debug, Clone, Copy)]
pub enum End<'a> {
    /// By itself, with an exit code.
    Code(ExitStatus),
    /// By an error.
    Failed(&'a Error),
    /// By a panic.
    Panicked,
}

/// What the events of a process go to, and the run that they are about.
#[derive(Debug, Default)]
pub struct Lineage {
    settings: Option<Settings>,
    run: Mutex<Option<UnderWay>>,
}

#[derive(Debug)]
struct UnderWay {
    run: Run,
    /// The first event, on its way.
    beginning: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Settings {
    destination: Destination,
    namespace: String,
    /// The parent facet, without what all facets have.
    parent: Option<Value>,
    /// The account that URLs without one are of.
    azure_account: Option<String>,
}

#[derive(Debug, Clone)]
enum Destination {
    Server { url: Url, key: Option<String> },
    File { path: PathBuf, append: bool },
}

impl Lineage {
    /// What the environment says; with nothing there, or what makes no sense, nothing is told.
    pub fn from_environment() -> Self {
        #[expect(clippy::disallowed_methods, reason = "these variables are what a scheduler sets, and read here alone")]
        let variable = |name: &str| std::env::var(name).ok();
        let settings = Settings::read(|name| variable(name).filter(|value| !value.trim().is_empty()));
        Self { settings, run: Mutex::default() }
    }

    /// Tells that a run begins, without waiting for it.
    pub fn begin(&self, context: &Context, run: Run) {
        let Some(settings) = &self.settings else { return };
        let event = settings.event("START", &run, None);
        let destination = settings.destination.clone();
        let beginning = Some(context.handle().spawn(async move { destination.take(&event, PATIENCE).await }));
        *self.lock() = Some(UnderWay { run, beginning });
    }

    /// Waits until the beginning is told, and leaves the rest of the run to other processes.
    pub fn leave(&self, context: &Context) {
        if let Some(UnderWay { beginning: Some(beginning), .. }) = self.lock().take() {
            // It gives up by itself.
            let _ = context.block_on(beginning);
        }
    }

    /// Takes part in a run that another process has begun.
    pub fn join(&self, run: Run) {
        *self.lock() = Some(UnderWay { run, beginning: None });
    }

    /// Takes over what the stages of a job have read and written, for the last event.
    pub fn wrote(&self, job: &Job<'_>, report: &RunReport) {
        if let Some(under_way) = &mut *self.lock() {
            under_way.run.wrote(job, report);
        }
    }

    /// Tells how the run ended, if one has begun.
    pub fn end(&self, context: &Context, end: End<'_>) {
        let (Some(settings), Some(UnderWay { run, beginning })) = (&self.settings, self.lock().take()) else { return };
        let (kind, message) = told(end);
        let event = settings.event(kind, &run, message.as_deref());
        let asked = Instant::now();
        context.block_on(async {
            // It gives up by itself.
            if let Some(beginning) = beginning {
                let _ = beginning.await;
            }
            let left = PATIENCE.saturating_sub(asked.elapsed());
            settings.destination.take(&event, left.max(LEAST_PATIENCE)).await;
        });
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<UnderWay>> {
        self.run.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The kind of the last event, and what went wrong.
fn told(end: End<'_>) -> (&'static str, Option<String>) {
    let code = |message: &str, status: ExitStatus| Some(format!("{message} (exit code {})", status as u8));
    match end {
        End::Code(status) if status.is_success() => ("COMPLETE", None),
        End::Code(status @ ExitStatus::Rejects) => {
            ("FAIL", code("the tables are written, but more images were rejected than the pipeline allows", status))
        }
        End::Code(status) => ("FAIL", code("failed", status)),
        End::Failed(error) => {
            let kind = if matches!(error, Error::Stopped { .. }) { "ABORT" } else { "FAIL" };
            let causes = error.causes().into_iter();
            let texts: Vec<String> = std::iter::once(error.to_string()).chain(causes).collect();
            (kind, code(&texts.join(": "), error.exit_status()))
        }
        End::Panicked => ("FAIL", code("a bug of lookalike", ExitStatus::Unexpected)),
    }
}

impl Settings {
    fn read(variable: impl Fn(&str) -> Option<String>) -> Option<Self> {
        let is_true = |name: &str| variable(name).is_some_and(|value| value.trim().eq_ignore_ascii_case("true"));
        if is_true("OPENLINEAGE_DISABLED") {
            return None;
        }
        let transport = variable("OPENLINEAGE__TRANSPORT__TYPE");
        let destination = match transport.as_deref() {
            None | Some("http" | "async_http") => Destination::server(&variable)?,
            Some("file") => {
                let Some(path) = variable("OPENLINEAGE__TRANSPORT__LOG_FILE_PATH") else {
                    warn(
                        "OPENLINEAGE__TRANSPORT__TYPE is file, and OPENLINEAGE__TRANSPORT__LOG_FILE_PATH is not set: nothing is told",
                    );
                    return None;
                };
                Destination::File { path: path.into(), append: is_true("OPENLINEAGE__TRANSPORT__APPEND") }
            }
            Some(other) => {
                warn(&format!(
                    "OPENLINEAGE__TRANSPORT__TYPE is {other}; lookalike knows http and file, and tells nothing"
                ));
                return None;
            }
        };
        Some(Self {
            destination,
            namespace: variable("OPENLINEAGE_NAMESPACE").unwrap_or_else(|| DEFAULT_NAMESPACE.to_owned()),
            parent: parent(&variable),
            azure_account: variable("AZURE_STORAGE_ACCOUNT_NAME"),
        })
    }

    /// An event about a run; `message` says what went wrong.
    fn event(&self, kind: &str, run: &Run, message: Option<&str>) -> Value {
        let version = env!("CARGO_PKG_VERSION");
        let mut facets = json!({
            "processing_engine": facet(
                "1-1-1/ProcessingEngineRunFacet",
                json!({"name": "lookalike", "version": version, "openlineageAdapterVersion": version}),
            ),
        });
        if let Some((from, to)) = run.days {
            let midnight = |day: NaiveDate| format!("{day}T00:00:00Z");
            let end = to.and_then(|to| to.checked_add_days(Days::new(1))).map(midnight);
            let days = json!({"nominalStartTime": midnight(from), "nominalEndTime": end});
            facets["nominalTime"] = facet("1-0-1/NominalTimeRunFacet", days);
        }
        if let Some(parent) = &self.parent {
            facets["parent"] = facet("1-2-0/ParentRunFacet", parent.clone());
        }
        if let Some(message) = message {
            let message = json!({"message": message, "programmingLanguage": "RUST"});
            facets["errorMessage"] = facet("1-0-1/ErrorMessageRunFacet", message);
        }
        let job_type = json!({"processingType": "BATCH", "integration": "LOOKALIKE", "jobType": "RUN"});
        json!({
            "eventType": kind,
            "eventTime": Utc::now().to_rfc3339_opts(SecondsFormat::Millis, true),
            "producer": PRODUCER,
            "schemaURL": EVENT_SCHEMA,
            "run": {"runId": run.id.to_string(), "facets": facets},
            "job": {
                "namespace": self.namespace,
                "name": run.job,
                "facets": {"jobType": facet("2-0-4/JobTypeJobFacet", job_type)},
            },
            "inputs": run.inputs.iter().map(|dataset| self.dataset(dataset, "inputFacets")).collect::<Vec<_>>(),
            "outputs": run.outputs.iter().map(|dataset| self.dataset(dataset, "outputFacets")).collect::<Vec<_>>(),
        })
    }

    /// A dataset of an event, with the number of rows in the facets of its role.
    fn dataset(&self, dataset: &Dataset, role: &str) -> Value {
        let (namespace, name) = naming(&dataset.url, self.azure_account.as_deref());
        let source = json!({"name": namespace, "uri": dataset.url});
        let mut facets = json!({"dataSource": facet("1-0-1/DatasourceDatasetFacet", source)});
        if let Some(schema) = &dataset.schema {
            let fields: Vec<Value> = schema.fields().iter().map(|field| column(field)).collect();
            facets["schema"] = facet("1-2-0/SchemaDatasetFacet", json!({"fields": fields}));
        }
        if let Some(version) = &dataset.version {
            facets["version"] = facet("1-0-1/DatasetVersionDatasetFacet", json!({"datasetVersion": version}));
        }
        let mut told = json!({"namespace": namespace, "name": name, "facets": facets});
        if let Some(rows) = dataset.rows {
            let (key, schema) = match role {
                "inputFacets" => ("inputStatistics", "1-0-0/InputStatisticsInputDatasetFacet"),
                _ => ("outputStatistics", "1-0-2/OutputStatisticsOutputDatasetFacet"),
            };
            told[role] = json!({key: facet(schema, json!({"rowCount": rows}))});
        }
        told
    }
}

/// A facet: its fields, and those that all have.
fn facet(schema: &str, mut fields: Value) -> Value {
    let name = schema.split('/').next_back().unwrap_or_default();
    fields["_producer"] = PRODUCER.into();
    fields["_schemaURL"] = format!("{FACETS}{schema}.json#/$defs/{name}").into();
    // A field without a value is left out.
    if let Value::Object(fields) = &mut fields {
        fields.retain(|_, value| !value.is_null());
    }
    fields
}

/// A column, with those that are within it.
fn column(field: &Field) -> Value {
    let mut told = json!({"name": field.name(), "type": type_name(field.data_type())});
    let within: Vec<Value> = match field.data_type() {
        DataType::Struct(fields) => fields.iter().map(|field| column(field)).collect(),
        DataType::List(element) | DataType::LargeList(element) => {
            vec![column(&element.as_ref().clone().with_name("_element"))]
        }
        _ => return told,
    };
    told["fields"] = within.into();
    told
}

/// A type as Delta calls it.
fn type_name(data_type: &DataType) -> String {
    match data_type {
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => "string",
        DataType::Binary | DataType::LargeBinary | DataType::BinaryView => "binary",
        DataType::Boolean => "boolean",
        DataType::Int8 => "byte",
        DataType::Int16 => "short",
        DataType::Int32 => "integer",
        DataType::Int64 => "long",
        DataType::Float32 => "float",
        DataType::Float64 => "double",
        DataType::Date32 => "date",
        DataType::Timestamp(_, Some(_)) => "timestamp",
        DataType::Timestamp(_, None) => "timestamp_ntz",
        DataType::List(_) | DataType::LargeList(_) => "array",
        DataType::Struct(_) => "struct",
        other => return other.to_string().to_lowercase(),
    }
    .to_owned()
}

/// The namespace and the name of what lies at a location, as OpenLineage's rules have them.
fn naming(url: &Url, azure_account: Option<&str>) -> (String, String) {
    let path = percent_encoding::percent_decode_str(url.path()).decode_utf8_lossy().into_owned();
    let key = || path.trim_matches('/').to_owned();
    let host = url.host_str().unwrap_or_default();
    match url.scheme() {
        "file" => ("file".to_owned(), path.clone()),
        "memory" => ("inmemory://".to_owned(), key()),
        // Hadoop's name for the same buckets.
        "s3a" => (format!("s3://{host}"), key()),
        // A container alone, of the account that the environment names.
        "az" | "abfs" | "abfss" => match (url.username(), azure_account) {
            ("", Some(account)) => (format!("abfss://{host}@{account}.dfs.core.windows.net"), key()),
            ("", None) => (format!("abfss://{host}"), key()),
            (container, _) => (format!("abfss://{container}@{host}"), key()),
        },
        scheme => (format!("{scheme}://{host}"), key()),
    }
}

/// What the parent facet says: the run that this one is a part of, and the one at the top of all.
fn parent(variable: &impl Fn(&str) -> Option<String>) -> Option<Value> {
    if let Some(context) = variable("OPENLINEAGE_CONTEXT") {
        let given = serde_json::from_str::<Value>(&context).unwrap_or_default();
        let Some(mut parent) = of_context(&given["parent"]) else {
            warn("OPENLINEAGE_CONTEXT has no parent with run.runId, job.namespace and job.name, and is left out");
            return None;
        };
        if let Some(root) = of_context(&given["parent"]["root"]) {
            parent["root"] = root;
        }
        return Some(parent);
    }
    let of_variable = |name: &str| {
        let text = variable(name)?;
        let read = of_text(&text);
        if read.is_none() {
            warn(&format!("{name} is not namespace/name/run id, with a UUID as the run id, and is left out"));
        }
        read
    };
    let mut parent = of_variable("OPENLINEAGE_PARENT_ID")?;
    if let Some(root) = of_variable("OPENLINEAGE_ROOT_PARENT_ID") {
        parent["root"] = root;
    }
    Some(parent)
}

/// A run and its job, of JSON.
fn of_context(given: &Value) -> Option<Value> {
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let (run, job) = (&given["run"], &given["job"]);
    run_of_job(&text(&run["runId"])?, &text(&job["namespace"])?, &text(&job["name"])?)
}

/// A run and its job, of `namespace/name/run id`. A slash may be in the namespace, such as that of a URL, and is in no name of a task.
fn of_text(text: &str) -> Option<Value> {
    let (job, run_id) = text.trim().rsplit_once('/')?;
    let (namespace, name) = job.rsplit_once('/')?;
    run_of_job(run_id, namespace, name)
}

fn run_of_job(run_id: &str, namespace: &str, name: &str) -> Option<Value> {
    let run_id = Uuid::parse_str(run_id).ok()?;
    let is_named = !namespace.is_empty() && !name.is_empty();
    is_named.then(|| json!({"run": {"runId": run_id.to_string()}, "job": {"namespace": namespace, "name": name}}))
}

impl Destination {
    fn server(variable: &impl Fn(&str) -> Option<String>) -> Option<Self> {
        let base = variable("OPENLINEAGE_URL")?;
        let endpoint = variable("OPENLINEAGE_ENDPOINT");
        let url = Url::parse(base.trim()).and_then(|url| url.join(endpoint.as_deref().unwrap_or(DEFAULT_ENDPOINT)));
        match url {
            Ok(url) if matches!(url.scheme(), "http" | "https") => {
                Some(Self::Server { url, key: variable(API_KEY_VARIABLE) })
            }
            // The URL may hold a password, and is not shown.
            _ => {
                warn("OPENLINEAGE_URL, with OPENLINEAGE_ENDPOINT after it, is no http or https URL: nothing is told");
                None
            }
        }
    }

    /// Takes an event, without secrets; what goes wrong is said.
    async fn take(&self, event: &Value, patience: Duration) {
        let text = event.to_string();
        let text = redact_line(&text);
        let taken = match self {
            Self::Server { url, key } => tokio::time::timeout(patience, post(url, key.as_deref(), &text))
                .await
                .unwrap_or_else(|_| Err(format!("no answer within {:.1} s", patience.as_secs_f64()))),
            Self::File { path, append } => write(path, *append, &text),
        };
        let kind = event["eventType"].as_str().unwrap_or_default();
        let place = match self {
            Self::Server { url, .. } => url.to_string(),
            Self::File { path, .. } => path.display().to_string(),
        };
        match taken {
            Ok(()) => tracing::debug!(kind, place, "told a lineage event"),
            Err(error) => tracing::warn!(kind, place, error, "a lineage event was not taken; the run goes on without"),
        }
    }
}

/// Posts an event; `Err` says what went wrong. The client is that of the stores, with its certificates and proxies.
async fn post(url: &Url, key: Option<&str>, text: &str) -> Result<(), String> {
    let failed = |error: &dyn std::error::Error| {
        let causes = std::iter::successors(Some(error), |error| error.source());
        causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
    };
    let options = ClientOptions::new().with_allow_http(true).with_timeout(PATIENCE);
    let client = ReqwestConnector::default().connect(&options).map_err(|error| failed(&error))?;
    let mut request = HttpRequest::new(text.as_bytes().to_vec().into());
    *request.method_mut() = "POST".parse().map_err(|error| failed(&error))?;
    *request.uri_mut() = url.as_str().parse().map_err(|error| failed(&error))?;
    let headers = request.headers_mut();
    headers.insert("content-type", "application/json".parse().map_err(|error| failed(&error))?);
    if let Some(key) = key {
        let mut bearer: object_store::HeaderValue = format!("Bearer {key}").parse().map_err(|error| failed(&error))?;
        bearer.set_sensitive(true);
        headers.insert("authorization", bearer);
    }
    let answer = client.execute(request).await.map_err(|error| failed(&error))?;
    let status = answer.status();
    if status.is_success() {
        return Ok(());
    }
    let said = answer.into_body().bytes().await.unwrap_or_default();
    let said: String = String::from_utf8_lossy(&said).chars().take(ANSWER_SHOWN).collect();
    Err(format!("{status} {}", said.trim()))
}

/// Adds a line with an event to a file, or writes it to a file of its own, as OpenLineage's own client does.
fn write(path: &Path, append: bool, text: &str) -> Result<(), String> {
    let file = if append {
        path.to_owned()
    } else {
        let mut name = path.as_os_str().to_owned();
        name.push(format!("-{}.json", Utc::now().format("%Y%m%d-%H%M%S.%6f")));
        name.into()
    };
    let open = std::fs::OpenOptions::new().create(true).append(true).open(file);
    // In one write, so that lines of several processes do not mix.
    open.and_then(|mut file| file.write_all(format!("{text}\n").as_bytes())).map_err(|error| error.to_string())
}

/// Says that a variable is not what it should be.
fn warn(message: &str) {
    tracing::warn!("lineage: {message}");
}

#[cfg(test)]
mod tests {
    use super::*;

    const RUN: &str = "01912345-6789-7abc-8def-0123456789ab";

    fn settings(variables: &[(&str, &str)]) -> Option<Settings> {
        let find = |name: &str| variables.iter().find(|(known, _)| *known == name);
        Settings::read(|name| find(name).map(|(_, value)| (*value).to_owned()))
    }

    #[test]
    fn the_environment_says_where_events_go_and_what_makes_no_sense_tells_nothing() {
        let server = |variables: &[(&str, &str)]| match settings(variables)?.destination {
            Destination::Server { url, key } => Some((url.to_string(), key)),
            Destination::File { .. } => None,
        };
        let url = ("OPENLINEAGE_URL", "http://marquez:5000");
        assert_eq!(server(&[url]), Some(("http://marquez:5000/api/v1/lineage".to_owned(), None)));
        assert_eq!(
            server(&[url, ("OPENLINEAGE_ENDPOINT", "events?project=a"), ("OPENLINEAGE_API_KEY", "k")]),
            Some(("http://marquez:5000/events?project=a".to_owned(), Some("k".to_owned())))
        );
        for refused in [
            &[][..],
            &[url, ("OPENLINEAGE_DISABLED", "True")],
            &[("OPENLINEAGE_URL", "marquez:5000")],
            &[("OPENLINEAGE_URL", "ftp://marquez")],
            &[url, ("OPENLINEAGE__TRANSPORT__TYPE", "kafka")],
            &[("OPENLINEAGE__TRANSPORT__TYPE", "file")],
        ] {
            assert!(settings(refused).is_none(), "{refused:?}");
        }
        let file = settings(&[
            ("OPENLINEAGE__TRANSPORT__TYPE", "file"),
            ("OPENLINEAGE__TRANSPORT__LOG_FILE_PATH", "/tmp/events"),
            ("OPENLINEAGE__TRANSPORT__APPEND", "true"),
        ]);
        let file = file.map(|settings| settings.destination);
        assert!(matches!(file, Some(Destination::File { path, append: true }) if path.as_os_str() == "/tmp/events"));
    }

    #[test]
    fn the_parent_is_that_of_airflow_or_of_the_context_or_left_out() {
        let parent = |variables: &[(&str, &str)]| {
            parent(&|name: &str| {
                let found = variables.iter().find(|(known, _)| *known == name);
                found.map(|(_, value)| (*value).to_owned())
            })
        };
        let of =
            |namespace: &str, name: &str| json!({"run": {"runId": RUN}, "job": {"namespace": namespace, "name": name}});
        let id = |namespace: &str| format!("{namespace}/nightly.look/{RUN}");
        assert_eq!(parent(&[]), None);
        assert_eq!(parent(&[("OPENLINEAGE_PARENT_ID", &id("airflow"))]), Some(of("airflow", "nightly.look")));
        assert_eq!(parent(&[("OPENLINEAGE_PARENT_ID", &id("http://air"))]), Some(of("http://air", "nightly.look")));
        let mut with_root = of("a", "nightly.look");
        with_root["root"] = of("b", "nightly.look");
        let variables = [("OPENLINEAGE_PARENT_ID", id("a")), ("OPENLINEAGE_ROOT_PARENT_ID", id("b"))];
        let variables: Vec<(&str, &str)> = variables.iter().map(|(name, value)| (*name, value.as_str())).collect();
        assert_eq!(parent(&variables), Some(with_root.clone()));
        let context = json!({"parent": with_root}).to_string();
        assert_eq!(parent(&[("OPENLINEAGE_CONTEXT", &context)]), Some(with_root));
        for wrong in ["a/b/c", "a", RUN, "//", &format!("/b/{RUN}"), &format!("b/{RUN}")] {
            assert_eq!(parent(&[("OPENLINEAGE_PARENT_ID", wrong)]), None, "{wrong}");
            assert_eq!(parent(&[("OPENLINEAGE_CONTEXT", wrong)]), None, "{wrong}");
        }
    }

    #[test]
    fn locations_are_named_by_the_rules_of_openlineage() {
        for (url, account, namespace, name) in [
            ("file:///data/images%20of/cells", None, "file", "/data/images of/cells"),
            ("s3://lake/images/cells", None, "s3://lake", "images/cells"),
            ("s3a://lake/images", None, "s3://lake", "images"),
            ("gs://lake/images", None, "gs://lake", "images"),
            ("memory:///images", None, "inmemory://", "images"),
            ("abfss://box@acc.dfs.core.windows.net/a/b", Some("other"), "abfss://box@acc.dfs.core.windows.net", "a/b"),
            ("az://box/a/b", Some("acc"), "abfss://box@acc.dfs.core.windows.net", "a/b"),
            ("az://box/a/b", None, "abfss://box", "a/b"),
        ] {
            let named = naming(&Url::parse(url).unwrap(), account);
            assert_eq!(named, (namespace.to_owned(), name.to_owned()), "{url}");
        }
        let output = Url::parse("s3://lake/out").unwrap();
        assert_eq!(below(&output, TableName::Latents).as_str(), "s3://lake/out/latents");
    }

    #[test]
    fn the_processes_of_one_run_have_its_id() {
        let began = DateTime::from_timestamp_millis(1_764_400_000_123).unwrap();
        let id = run_id(began, "plan 7");
        assert_eq!(id, run_id(began, "plan 7"));
        assert_ne!(id, run_id(began, "plan 8"));
        assert_eq!(id.get_version_num(), 7);
        let (secs, nanos) = id.get_timestamp().unwrap().to_unix();
        assert_eq!((secs, nanos / 1_000_000), (1_764_400_000, 123));
    }

    #[test]
    fn columns_are_told_with_what_is_within_them() {
        let schema = table_schema(TableName::Runs, &Schema::empty(), &[]);
        let drift = schema.fields().iter().find(|field| field.name() == "drift").unwrap();
        let told = column(drift);
        assert_eq!((&told["type"], &told["fields"][0]["name"]), (&json!("array"), &json!("_element")));
        assert_eq!(told["fields"][0]["fields"][2], json!({"name": "threshold", "type": "double"}));
        assert_eq!(type_name(&DataType::Decimal128(9, 2)), "decimal128(9, 2)");
    }

    #[test]
    fn how_a_run_ends_is_told_as_complete_failed_or_stopped() {
        assert_eq!(told(End::Code(ExitStatus::Success)), ("COMPLETE", None));
        assert_eq!(told(End::Code(ExitStatus::NothingToDo)), ("COMPLETE", None));
        let (kind, message) = told(End::Code(ExitStatus::Rejects));
        assert!(kind == "FAIL" && message.unwrap().ends_with("(exit code 3)"));
        let stopped = Error::Stopped { signal: crate::stop::Signal::Terminate };
        let (kind, message) = told(End::Failed(&stopped));
        assert!(kind == "ABORT" && message.unwrap().ends_with("(exit code 143)"));
        assert_eq!(told(End::Panicked).0, "FAIL");
    }
}
