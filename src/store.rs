//! Object stores: every byte that `lookalike` reads or writes passes through here, whether it lies on the local disk, in S3,
//! Google Cloud Storage, Azure, or in memory.
//!
//! A [`Store`] is one folder (a prefix) in one store. Credentials come from the environment, by the standard variables of each
//! cloud, and from nowhere else. This module knows nothing of tables, images or models.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use futures::TryStreamExt as _;
use object_store::aws::AmazonS3Builder;
use object_store::azure::MicrosoftAzureBuilder;
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::local::LocalFileSystem;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{DynObjectStore, ObjectMeta, ObjectStoreExt as _, ObjectStoreScheme, PutMode};
use url::Url;

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
        match self.answer() {
            object_store::Error::PermissionDenied { .. } | object_store::Error::Unauthenticated { .. } => Some(
                "credentials come from the environment: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_REGION for S3, \
                 GOOGLE_… and AZURE_… for the others"
                    .to_owned(),
            ),
            _ => None,
        }
    }

    /// Whether the object asked for does not exist.
    pub fn is_not_found(&self) -> bool {
        matches!(self.answer(), object_store::Error::NotFound { .. })
    }
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
#[derive(Debug, Default, Clone)]
pub struct Stores {
    clients: Arc<Mutex<HashMap<String, Arc<DynObjectStore>>>>,
}

impl Stores {
    /// Opens the folder `url`. Nothing is read: a missing bucket shows at the first request.
    pub fn open(&self, url: &Url) -> Result<Store, StoreError> {
        let open_error = |source| StoreError::Open { url: url.to_string(), source };
        let (scheme, prefix) = ObjectStoreScheme::parse(url).map_err(|e| open_error(e.into()))?;
        let origin = url[..url::Position::BeforePath].to_owned();
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

/// Builds the client of one bucket (or of the local disk). Its settings are those of the environment, by the variables that
/// each cloud's tools read (`AWS_…`, `GOOGLE_…`, `AZURE_…`); a server without TLS needs `AWS_ALLOW_HTTP=true` or its like.
fn connect(scheme: &ObjectStoreScheme, url: &Url) -> Result<Arc<DynObjectStore>, object_store::Error> {
    Ok(match scheme {
        // A commit that a power cut takes back is no commit: fsync what we write.
        ObjectStoreScheme::Local => Arc::new(LocalFileSystem::new().with_fsync(true)),
        ObjectStoreScheme::Memory => Arc::new(InMemory::new()),
        ObjectStoreScheme::AmazonS3 => Arc::new(AmazonS3Builder::from_env().with_url(url.as_str()).build()?),
        ObjectStoreScheme::GoogleCloudStorage => {
            Arc::new(GoogleCloudStorageBuilder::from_env().with_url(url.as_str()).build()?)
        }
        ObjectStoreScheme::MicrosoftAzure => {
            Arc::new(MicrosoftAzureBuilder::from_env().with_url(url.as_str()).build()?)
        }
        _ => {
            return Err(object_store::Error::NotSupported {
                source: "this kind of store is not supported; use file, s3, gs, az or memory".into(),
            });
        }
    })
}

/// One folder of one store. Paths given to its methods are relative to it, with `/` between the parts.
#[derive(Debug, Clone)]
pub struct Store {
    client: Arc<DynObjectStore>,
    url: Url,
    prefix: Path,
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
    pub async fn put_if_absent(&self, relative: &str, bytes: Bytes) -> Result<PutOutcome, StoreError> {
        let path = self.path(relative)?;
        match self.client.put_opts(&path, bytes.into(), PutMode::Create.into()).await {
            Ok(_) => Ok(PutOutcome::Created),
            Err(object_store::Error::AlreadyExists { .. }) => Ok(PutOutcome::AlreadyThere),
            Err(source) => Err(self.request("write", relative, source)),
        }
    }

    /// Deletes an object; one that is gone already is no error.
    pub async fn delete(&self, relative: &str) -> Result<(), StoreError> {
        match self.client.delete(&self.path(relative)?).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(source) => Err(self.request("delete", relative, source)),
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
        StoreError::Request { action, url: self.url_of(relative), source }
    }
}
