//! Object stores: every byte that `lookalike` reads or writes passes through here, whether it lies on the local disk, in S3,
//! Google Cloud Storage, Azure, or in memory.
//!
//! A [`Store`] is one folder (a prefix) in one store. Credentials come from the environment, by the standard variables of each
//! cloud, and from nowhere else. This module knows nothing of tables, images or models.

mod steady;

use std::collections::HashMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use chrono::{DateTime, Utc};
use futures::{StreamExt as _, TryStreamExt as _};
use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};
use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey};
use object_store::local::LocalFileSystem;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    BackoffConfig, ClientConfigKey, ClientOptions, DynObjectStore, ObjectMeta, ObjectStoreExt as _, ObjectStoreScheme,
    PutMode, RetryConfig,
};
use url::Url;

use crate::redact::redact;

/// Objects deleted at a time.
const DELETES_IN_FLIGHT: usize = 16;

/// What S3, Azure and Google Cloud Storage call a missing bucket.
const MISSING_BUCKET: [&str; 3] = ["NoSuchBucket", "ContainerNotFound", "The specified bucket does not exist"];

/// Attempts at a put-if-absent that is refused although nothing is there.
const PUT_ATTEMPTS: u32 = 10;
use steady::Steady;

/// How long a request is tried again that finds no way to its store, or a store that is too busy for it. A shorter outage is ridden
/// out, a longer one reported within two minutes, for the last try may have to wait for a time-out too.
const RETRY_FOR: Duration = Duration::from_mins(1);

/// The first pause between two tries; each is longer than the one before, at random, up to the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(100);

/// The longest pause between two tries: a store that is back is noticed within this time.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// Tries at most; the time ends them first.
const MAX_TRIES: usize = 1000;

/// Time-outs of the clients where the environment does not set them (`AWS_TIMEOUT` and its like): a connection on which nothing
/// arrives for half a minute is dead, and one that brings something may take its time, as images and vectors are large and lines slow.
/// One that nobody needs is closed soon: looking over a table takes many, which have a hundred kilobytes each, and reading takes few.
const TIMEOUTS: [(ClientConfigKey, &str); 3] = [
    (ClientConfigKey::ReadTimeout, "30 seconds"),
    (ClientConfigKey::Timeout, "30 minutes"),
    (ClientConfigKey::PoolIdleTimeout, "5 seconds"),
];

/// What stores call credentials that were good once. (S3; Azure, where a signature has its time; Google, in exchange for a token.)
const EXPIRED: [&str; 5] = [
    "ExpiredToken",
    "TokenRefreshRequired",
    "Signature not valid in the specified time frame",
    "Signature expired",
    "invalid_grant",
];

/// What stores call credentials that they do not know, beside the statuses 401 and 403.
const UNKNOWN: [&str; 2] = ["InvalidToken", "InvalidAccessKeyId"];

/// Where clients without other credentials ask the machine they run on for some: on Amazon's, Google's and Microsoft's machines.
const ASKS_THE_MACHINE: [&str; 5] = [
    "/latest/api/token",
    "/latest/meta-data/iam/",
    "http://169.254.170.2/",
    "/computeMetadata/v1/",
    "/metadata/identity/oauth2/token",
];

/// What can go wrong between us and a store.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The URL names no store that we can open, or its settings are incomplete.
    #[error("cannot open the store of {url}")]
    Open {
        /// The location asked for.
        url: String,
        /// Why the client could not be built.
        source: object_store::Error,
    },
    /// A request failed, after the client's own retries.
    #[error("cannot {action} {url}")]
    Request {
        /// The verb of the request, as in "cannot read …".
        action: &'static str,
        /// The object or prefix.
        url: String,
        /// What the store answered.
        source: object_store::Error,
    },
}

impl StoreError {
    /// The answer of the store behind this error.
    pub fn answer(&self) -> &object_store::Error {
        match self {
            Self::Open { source, .. } | Self::Request { source, .. } => source,
        }
    }

    /// What the user can do about it, where there is more to say than the message does.
    pub fn hint(&self) -> Option<String> {
        hint(self.answer())
    }

    /// Whether the object asked for does not exist.
    pub fn is_not_found(&self) -> bool {
        matches!(self.answer(), object_store::Error::NotFound { .. })
    }
}

/// What the user can do about a store's answer, where there is more to say than the answer does.
pub fn hint(answer: &object_store::Error) -> Option<String> {
    if is_bucket_missing(answer) {
        return Some("create the bucket, or check its name and the endpoint".to_owned());
    }
    credential_fault(answer).map(|fault| fault.hint().to_owned())
}

/// Settings in the environment with which no client can be made: a key that is none, an account that is missing.
#[derive(Debug, thiserror::Error)]
#[error("the settings in the environment make no client")]
struct Unusable {
    source: object_store::Error,
}

impl From<Unusable> for object_store::Error {
    fn from(error: Unusable) -> Self {
        Self::Generic { store: "cloud", source: Box::new(error) }
    }
}

/// What is wrong with the credentials.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CredentialFault {
    /// They were good once.
    Expired,
    /// The store does not know them, or they do not allow this.
    Refused,
    /// There are none.
    Missing,
    /// They are none, or other settings of the store are wrong or missing.
    Unusable,
}

impl CredentialFault {
    /// What to do about it.
    pub fn hint(self) -> &'static str {
        match self {
            Self::Expired => {
                "the credentials have expired: renew them, and run it again; what is finished is not done again"
            }
            Self::Refused => {
                "credentials come from the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_REGION for S3, GOOGLE_… and \
                 AZURE_… for the others): check that they are those of this store and may read and write there"
            }
            Self::Missing => {
                "there are no credentials, and this machine has no role: set the variables of the store (AWS_ACCESS_KEY_ID, \
                 AWS_SECRET_ACCESS_KEY and AWS_REGION for S3, GOOGLE_… and AZURE_… for the others)"
            }
            Self::Unusable => {
                "credentials and settings of stores come from the environment, by the variables of each cloud (AWS_…, GOOGLE_…, AZURE_…): \
                 complete or correct them"
            }
        }
    }
}

/// Whether a store's answer is about the credentials, and what it says about them.
pub fn credential_fault(answer: &object_store::Error) -> Option<CredentialFault> {
    use object_store::Error as Answer;
    let mut refused = matches!(answer, Answer::PermissionDenied { .. } | Answer::Unauthenticated { .. });
    let mut is_head = false;
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(answer);
    while let Some(error) = cause {
        if error.is::<Unusable>() {
            return Some(CredentialFault::Unusable);
        }
        // The library keeps its errors to itself, so their text must do. An answer by the server stands last.
        let text = error.to_string();
        is_head |= text.contains(" performing HEAD ");
        if let Some(reply) = text.strip_prefix("Server returned non-2xx status code: ") {
            if EXPIRED.iter().any(|expired| reply.contains(expired)) {
                return Some(CredentialFault::Expired);
            }
            // An answer to HEAD has no body that could say so. S3 answers 400 there for a token that has expired.
            if is_head && reply.trim_end() == "400 Bad Request:" {
                return Some(CredentialFault::Expired);
            }
            refused |= reply.starts_with("401") || reply.starts_with("403");
            refused |= UNKNOWN.iter().any(|unknown| reply.contains(unknown));
        } else if ASKS_THE_MACHINE.iter().any(|place| text.contains(place)) {
            return Some(CredentialFault::Missing);
        }
        cause = error.source();
    }
    refused.then_some(CredentialFault::Refused)
}

/// Whether there is no bucket (or container) of that name. The clients answer so to a listing by text alone.
pub fn is_bucket_missing(answer: &object_store::Error) -> bool {
    let text = answer.to_string();
    matches!(answer, object_store::Error::Generic { .. } | object_store::Error::NotFound { .. })
        && MISSING_BUCKET.iter().any(|code| text.contains(code))
}

/// What a put-if-absent did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PutOutcome {
    /// The object is there now and holds our bytes.
    Created,
    /// An object of that name was there before; it is unchanged, and may be an earlier attempt of our own.
    AlreadyThere,
}

/// The clients of one process, one per bucket, so that connections and in-memory stores are shared.
#[derive(Default, Clone)]
pub struct Stores {
    clients: Arc<Mutex<HashMap<String, Arc<DynObjectStore>>>>,
}

/// The clients hold credentials, and some of them show these.
impl fmt::Debug for Stores {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stores").finish_non_exhaustive()
    }
}

impl Stores {
    /// Takes `client` for everything of the bucket that `url` lies in, instead of one built from the environment: a client with
    /// its own credentials, retries or instruments. It must come before the bucket's first use.
    pub fn insert(&self, url: &Url, client: Arc<DynObjectStore>) {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner).insert(origin(url), client);
    }

    /// Opens the folder `url`. Nothing is read: a missing bucket shows at the first request.
    pub fn open(&self, url: &Url) -> Result<Store, StoreError> {
        // A cell of a source may name any URL.
        let open_error = |source| StoreError::Open { url: redact(url.as_str()).into_owned(), source };
        let unknown = |source| object_store::Error::NotSupported { source: Box::new(source) };
        let (scheme, prefix) = ObjectStoreScheme::parse(url).map_err(|e| open_error(unknown(e)))?;
        let origin = origin(url);
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        let client = if let Some(client) = clients.get(&origin) {
            Arc::clone(client)
        } else {
            let client = connect(&scheme, url).map_err(open_error)?;
            clients.insert(origin, Arc::clone(&client));
            client
        };
        let mut url = url.clone();
        if !url.path().ends_with('/') {
            url.set_path(&format!("{}/", url.path()));
        }
        Ok(Store { client, url, prefix })
    }
}

/// What URLs of one bucket have in common.
fn origin(url: &Url) -> String {
    url[..url::Position::BeforePath].to_owned()
}

/// A builder with our own patience.
macro_rules! patient {
    ($builder:expr, $key:ident) => {{
        let backoff =
            BackoffConfig { init_backoff: FIRST_PAUSE, max_backoff: LONGEST_PAUSE, ..BackoffConfig::default() };
        let mut builder =
            $builder.with_retry(RetryConfig { backoff, max_retries: MAX_TRIES, retry_timeout: RETRY_FOR });
        for (setting, value) in TIMEOUTS {
            let default = ClientOptions::default().get_config_value(&setting);
            if builder.get_config_value(&$key::Client(setting)) == default {
                builder = builder.with_config($key::Client(setting), value);
            }
        }
        builder
    }};
}

/// Builds the client of one bucket (or of the local disk). Its settings are those of the environment, by the variables that
/// each cloud's tools read (`AWS_…`, `GOOGLE_…`, `AZURE_…`); a server without TLS needs `AWS_ALLOW_HTTP=true` or its like.
fn connect(scheme: &ObjectStoreScheme, url: &Url) -> Result<Arc<DynObjectStore>, object_store::Error> {
    let unusable = |source| Unusable { source };
    Ok(match scheme {
        // A commit that a power cut takes back is no commit: fsync what we write.
        ObjectStoreScheme::Local => Arc::new(LocalFileSystem::new().with_fsync(true)),
        ObjectStoreScheme::Memory => Arc::new(InMemory::new()),
        ObjectStoreScheme::AmazonS3 => {
            let builder = AmazonS3Builder::from_env().with_url(url.as_str());
            Arc::new(Steady::new(patient!(builder, AmazonS3ConfigKey).build().map_err(unusable)?))
        }
        ObjectStoreScheme::GoogleCloudStorage => {
            let builder = GoogleCloudStorageBuilder::from_env().with_url(url.as_str());
            Arc::new(Steady::new(patient!(builder, GoogleConfigKey).build().map_err(unusable)?))
        }
        ObjectStoreScheme::MicrosoftAzure => {
            let builder = MicrosoftAzureBuilder::from_env().with_url(url.as_str());
            Arc::new(Steady::new(patient!(builder, AzureConfigKey).build().map_err(unusable)?))
        }
        _ => {
            return Err(object_store::Error::NotSupported {
                source: "this kind of store is not supported; use file, s3, gs, az or memory".into(),
            });
        }
    })
}

/// A file on the local disk that was begun and not finished, which listings leave out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unfinished {
    /// Where it lies.
    pub path: PathBuf,
    /// Its size so far.
    pub size: u64,
    /// When it was last written to.
    pub modified: DateTime<Utc>,
}

/// Whether the local client made this file to rename it when it is whole: it puts `#` and a number after the name.
fn is_staged(path: &std::path::Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let number = name.rsplit_once(".parquet#").or_else(|| name.rsplit_once(".json#")).map(|(_, number)| number);
    number.is_some_and(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
}

fn local_error(action: &'static str, path: &std::path::Path, source: std::io::Error) -> StoreError {
    let source = object_store::Error::Generic { store: "LocalFileSystem", source: Box::new(source) };
    StoreError::Request { action, url: path.display().to_string(), source }
}

/// One folder of one store. Paths given to its methods are relative to it, with `/` between the parts.
#[derive(Clone)]
pub struct Store {
    client: Arc<DynObjectStore>,
    url: Url,
    prefix: Path,
}

/// The client holds credentials, and may show them.
impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store").field("url", &redact(self.url.as_str())).finish_non_exhaustive()
    }
}

impl Store {
    /// The folder's URL; it ends with a slash.
    pub fn url(&self) -> &Url {
        &self.url
    }

    /// The client, for libraries that read or write by themselves; its paths are those of [`Store::path`].
    pub fn client(&self) -> &Arc<DynObjectStore> {
        &self.client
    }

    /// The path of `relative` as the client wants it. Names are taken as they are: nothing is percent-encoded or decoded.
    pub fn path(&self, relative: &str) -> Result<Path, StoreError> {
        let relative = relative.trim_matches('/');
        if relative.is_empty() {
            return Ok(self.prefix.clone());
        }
        Path::parse(format!("{}/{relative}", self.prefix))
            .map_err(|source| self.request("name", relative, source.into()))
    }

    /// The path below this folder of an object that [`Store::list`] returned.
    pub fn relative(&self, path: &Path) -> String {
        path.prefix_match(&self.prefix).map_or_else(
            || path.to_string(),
            |parts| parts.map(|part| part.as_ref().to_owned()).collect::<Vec<_>>().join("/"),
        )
    }

    /// The URL of `relative`, for messages and logs.
    pub fn url_of(&self, relative: &str) -> String {
        format!("{}{relative}", self.url)
    }

    /// A folder below this one.
    pub fn folder(&self, relative: &str) -> Result<Self, StoreError> {
        let mut url = self.url.clone();
        url.set_path(&format!("{}{}/", self.url.path(), relative.trim_matches('/')));
        Ok(Self { client: Arc::clone(&self.client), url, prefix: self.path(relative)? })
    }

    /// Reads a whole object.
    pub async fn get(&self, relative: &str) -> Result<Bytes, StoreError> {
        let path = self.path(relative)?;
        let read = async { self.client.get(&path).await?.bytes().await };
        read.await.map_err(|source| self.request("read", relative, source))
    }

    /// The size and modification time of an object.
    pub async fn head(&self, relative: &str) -> Result<ObjectMeta, StoreError> {
        self.client.head(&self.path(relative)?).await.map_err(|source| self.request("look up", relative, source))
    }

    /// Writes an object, whether or not one of that name exists.
    pub async fn put(&self, relative: &str, bytes: Bytes) -> Result<(), StoreError> {
        match self.client.put(&self.path(relative)?, bytes.into()).await {
            Ok(_) => Ok(()),
            Err(source) => Err(self.request("write", relative, source)),
        }
    }

    /// Writes an object if none of that name exists: the one conditional write that every store has.
    ///
    /// A store may also refuse because another write or a deletion of that name is under way (S3's 409), and then nothing need be
    /// there. So a refusal is looked into, and where nothing is there the write is tried again.
    pub async fn put_if_absent(&self, relative: &str, bytes: Bytes) -> Result<PutOutcome, StoreError> {
        let path = self.path(relative)?;
        let mut attempts = 0;
        loop {
            attempts += 1;
            match self.client.put_opts(&path, bytes.clone().into(), PutMode::Create.into()).await {
                Ok(_) => return Ok(PutOutcome::Created),
                Err(refusal @ object_store::Error::AlreadyExists { .. }) => match self.client.head(&path).await {
                    Ok(_) => return Ok(PutOutcome::AlreadyThere),
                    Err(object_store::Error::NotFound { .. }) if attempts < PUT_ATTEMPTS => {}
                    Err(object_store::Error::NotFound { .. }) => return Err(self.request("write", relative, refusal)),
                    Err(source) => return Err(self.request("look up", relative, source)),
                },
                Err(source) => return Err(self.request("write", relative, source)),
            }
        }
    }

    /// Deletes an object; one that is gone already is no error.
    pub async fn delete(&self, relative: &str) -> Result<(), StoreError> {
        match self.client.delete(&self.path(relative)?).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(source) => Err(self.request("delete", relative, source)),
        }
    }

    /// Deletes many objects, several at a time; those that are gone already are no error.
    pub async fn delete_all(&self, paths: Vec<Path>) -> Result<(), StoreError> {
        let deletes = futures::stream::iter(paths).map(|path| async move { self.delete(&self.relative(&path)).await });
        deletes.buffer_unordered(DELETES_IN_FLIGHT).try_collect().await
    }

    /// Files on the local disk that were begun below this folder and not finished. Other stores do not show theirs: there, a rule of
    /// the bucket takes unfinished uploads away.
    pub fn unfinished(&self) -> Result<Vec<Unfinished>, StoreError> {
        let Ok(folder) = self.url.to_file_path() else { return Ok(Vec::new()) };
        let mut found = Vec::new();
        let mut folders = vec![folder];
        while let Some(folder) = folders.pop() {
            let entries = match std::fs::read_dir(&folder) {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
                entries => entries.map_err(|e| local_error("list", &folder, e))?,
            };
            for entry in entries {
                let entry = entry.map_err(|e| local_error("list", &folder, e))?;
                let path = entry.path();
                let meta = entry.metadata().map_err(|e| local_error("look up", &path, e))?;
                if meta.is_dir() {
                    folders.push(path);
                } else if is_staged(&path) {
                    let modified = meta.modified().map_err(|e| local_error("look up", &path, e))?.into();
                    found.push(Unfinished { path, size: meta.len(), modified });
                }
            }
        }
        found.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(found)
    }

    /// Deletes an unfinished file.
    pub fn delete_unfinished(&self, file: &Unfinished) -> Result<(), StoreError> {
        match std::fs::remove_file(&file.path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(local_error("delete", &file.path, error)),
            _ => Ok(()),
        }
    }

    /// All objects below `relative` (below this folder if it is empty), sorted by path.
    pub async fn list(&self, relative: &str) -> Result<Vec<ObjectMeta>, StoreError> {
        let prefix = self.path(relative)?;
        let mut objects: Vec<ObjectMeta> = self
            .client
            .list(Some(&prefix))
            .try_collect()
            .await
            .map_err(|source| self.request("list", relative, source))?;
        objects.sort_by(|a, b| a.location.cmp(&b.location));
        Ok(objects)
    }

    /// An error about `relative`, with the folder's URL before it.
    pub fn request(&self, action: &'static str, relative: &str, source: object_store::Error) -> StoreError {
        StoreError::Request { action, url: redact(&self.url_of(relative)).into_owned(), source }
    }
}
