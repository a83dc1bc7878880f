//! The object stores of the tests: real servers on loopback, one of each kind for all tests, and a bucket in each.
//!
//! `SeaweedFS` speaks S3 and checks signatures, Azurite is Microsoft's own Azure storage server. For Google Cloud Storage there is no
//! such server, but a stand-in (see `google`). They end with the tests.

use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use futures::TryStreamExt as _;
use object_store::aws::AmazonS3Builder;
use object_store::azure::{AzureAccessKey, AzureAuthorizer, AzureCredential, MicrosoftAzureBuilder};
use object_store::client::{HttpRequest, HttpRequestBody};
use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey};
use object_store::{DynObjectStore, ObjectStore, ObjectStoreExt as _};

use crate::support::{Ran, command, needed};
use crate::{google, http};

/// The secret key of the S3 server, by which the tests would know it again in any output.
pub(crate) const S3_SECRET: &str = "canary-secret-of-the-test";

const S3_KEY: &str = "lookalike-test";
const AZURE_ACCOUNT: &str = "lookaliketest";
/// The key of the Azure server, in base64 as Azure's keys are.
pub(crate) const AZURE_SECRET: &str = "Y2FuYXJ5LXNlY3JldC1vZi10aGUtdGVzdHMtYXp1cmU=";

/// The bearer token that the stand-in for Google's server wants.
pub(crate) const GOOGLE_SECRET: &str = "canary-token-of-the-test";

/// Name of the bucket, or container, in each server.
const BUCKET: &str = "lake";

/// How long a server may take to answer its first request.
const START_TIMEOUT: Duration = Duration::from_mins(1);

/// A bucket in a server, or rather what there is of it for one test: everything lies below a prefix of the test's own.
#[derive(Debug, Clone)]
pub(crate) struct Bucket {
    /// Where the program finds it.
    pub(crate) url: String,
    /// The variables that tell the program where the server is and with which credentials.
    pub(crate) variables: Vec<(&'static str, String)>,
    /// The server's port on loopback.
    pub(crate) port: u16,
    client: Arc<DynObjectStore>,
}

/// The S3 bucket.
pub(crate) fn s3() -> Bucket {
    static SERVER: LazyLock<(Server, Bucket)> = LazyLock::new(|| {
        let program = needed("LOOKALIKE_TEST_PYTHON").parent().unwrap().join("weed");
        let ports: [u16; 10] = free_ports();
        let mut arguments = vec![program.display().to_string(), "mini".to_owned(), "-dir={folder}".to_owned()];
        arguments.extend(["-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-webdav=false"].map(str::to_owned));
        for (number, name) in ["s3", "master", "filer", "volume", "admin"].iter().enumerate() {
            arguments.push(format!("-{name}.port={}", ports[2 * number]));
            arguments.push(format!("-{name}.port.grpc={}", ports[2 * number + 1]));
        }
        let off = ["-admin.ui=false", "-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false"];
        arguments.extend(off.map(str::to_owned));
        let credentials = [("AWS_ACCESS_KEY_ID", S3_KEY.to_owned()), ("AWS_SECRET_ACCESS_KEY", S3_SECRET.to_owned())];
        let mut settings = credentials.to_vec();
        settings.push(("S3_BUCKET", BUCKET.to_owned()));
        let server = Server::start("seaweedfs", &arguments, &settings);
        let endpoint = format!("http://127.0.0.1:{}", ports[0]);
        let client = AmazonS3Builder::new()
            .with_endpoint(&endpoint)
            .with_allow_http(true)
            .with_region("us-east-1")
            .with_bucket_name(BUCKET)
            .with_access_key_id(S3_KEY)
            .with_secret_access_key(S3_SECRET);
        let mut variables = credentials.to_vec();
        variables.extend([
            ("AWS_ENDPOINT", endpoint),
            ("AWS_ALLOW_HTTP", "true".to_owned()),
            ("AWS_REGION", "us-east-1".to_owned()),
        ]);
        let client = Arc::new(client.build().unwrap());
        let bucket = Bucket { url: format!("s3://{BUCKET}"), variables, port: ports[0], client };
        server.wait(ports[0], || bucket.is_there());
        (server, bucket)
    });
    SERVER.1.clone()
}

/// The Azure container.
pub(crate) fn azure() -> Bucket {
    static SERVER: LazyLock<(Server, Bucket)> = LazyLock::new(|| {
        let azurite = needed("LOOKALIKE_TEST_AZURITE");
        let [port] = free_ports();
        let file = |name: &str| azurite.join(name).display().to_string();
        let mut arguments = vec![file("node"), file("node_modules/azurite/dist/src/blob/main.js")];
        arguments
            .extend(["--disableTelemetry", "--location", "{folder}", "--blobHost", "127.0.0.1"].map(str::to_owned));
        // The client speaks a newer version of the protocol than the server has heard of; what it uses of it is old.
        arguments.extend(["--skipApiVersionCheck", "--blobPort"].map(str::to_owned));
        arguments.push(port.to_string());
        let accounts = format!("{AZURE_ACCOUNT}:{AZURE_SECRET}");
        let server = Server::start("azurite", &arguments, &[("AZURITE_ACCOUNTS", accounts)]);
        let endpoint = format!("http://127.0.0.1:{port}/{AZURE_ACCOUNT}");
        let client = MicrosoftAzureBuilder::new()
            .with_account(AZURE_ACCOUNT)
            .with_access_key(AZURE_SECRET)
            .with_endpoint(endpoint.clone())
            .with_allow_http(true)
            .with_container_name(BUCKET);
        let variables = vec![
            ("AZURE_STORAGE_ACCOUNT_NAME", AZURE_ACCOUNT.to_owned()),
            ("AZURE_STORAGE_ACCOUNT_KEY", AZURE_SECRET.to_owned()),
            ("AZURE_STORAGE_USE_EMULATOR", "true".to_owned()),
            ("AZURITE_BLOB_STORAGE_URL", format!("http://127.0.0.1:{port}")),
        ];
        let client = Arc::new(client.build().unwrap());
        let bucket = Bucket { url: format!("az://{BUCKET}"), variables, port, client };
        server.wait(port, || create_container(port));
        (server, bucket)
    });
    SERVER.1.clone()
}

/// The Google bucket, in the stand-in.
pub(crate) fn google() -> Bucket {
    static SERVER: LazyLock<Bucket> = LazyLock::new(|| {
        let port = google::start(BUCKET, GOOGLE_SECRET);
        let variables = vec![
            ("GOOGLE_BASE_URL", format!("http://127.0.0.1:{port}")),
            ("GOOGLE_BEARER_TOKEN", GOOGLE_SECRET.to_owned()),
            ("GOOGLE_ALLOW_HTTP", "true".to_owned()),
        ];
        let client = variables.iter().fold(GoogleCloudStorageBuilder::new(), |client, (name, value)| {
            client.with_config(name.to_lowercase().parse::<GoogleConfigKey>().unwrap(), value)
        });
        let client = Arc::new(client.with_bucket_name(BUCKET).build().unwrap());
        Bucket { url: format!("gs://{BUCKET}"), variables, port, client }
    });
    SERVER.clone()
}

/// Creates the container, which the object store's client cannot; returns whether it is there now.
fn create_container(port: u16) -> bool {
    let url = format!("http://127.0.0.1:{port}/{AZURE_ACCOUNT}/{BUCKET}?restype=container");
    let mut request = HttpRequest::new(HttpRequestBody::empty());
    *request.method_mut() = "PUT".parse().unwrap();
    *request.uri_mut() = url.parse().unwrap();
    request.headers_mut().insert("content-length", object_store::HeaderValue::from(0));
    let credential = AzureCredential::AccessKey(AzureAccessKey::try_new(AZURE_SECRET).unwrap());
    AzureAuthorizer::new(&credential, AZURE_ACCOUNT).try_authorize(&mut request).unwrap();
    let headers = request.headers().iter().map(|(name, value)| format!("{name}: {}\r\n", value.to_str().unwrap()));
    let (target, headers) = (request.uri().path_and_query().unwrap(), headers.collect::<String>());
    http::ask(port, &format!("PUT {target} HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\n{headers}\r\n"))
        .is_ok_and(|answer| ["201", "409"].contains(&answer.status()))
}

impl Bucket {
    /// The same bucket with another value of a variable.
    pub(crate) fn with(&self, name: &'static str, value: &str) -> Self {
        let mut bucket = self.clone();
        bucket.variables.retain(|(other, _)| *other != name);
        bucket.variables.push((name, value.to_owned()));
        bucket
    }

    /// The same S3 bucket behind another port.
    pub(crate) fn through(&self, port: u16) -> Self {
        self.with("AWS_ENDPOINT", &format!("http://127.0.0.1:{port}"))
    }

    /// The program with this bucket's settings, to be run in `folder`.
    pub(crate) fn command(&self, folder: &Path, args: &[&str]) -> Command {
        let mut command = command(folder, args);
        command.envs(self.variables.iter().map(|(name, value)| (name, value)));
        command
    }

    /// Runs the program with this bucket's settings in `folder`.
    pub(crate) fn lookalike(&self, folder: &Path, args: &[&str]) -> Ran {
        self.command(folder, args).output().unwrap().into()
    }

    /// The client, which does not pass through any proxy.
    pub(crate) fn client(&self) -> &Arc<DynObjectStore> {
        &self.client
    }

    /// Copies a file, or all files of a folder, into the bucket.
    pub(crate) fn upload(&self, from: &Path, to: &str) {
        if from.is_dir() {
            for entry in std::fs::read_dir(from).unwrap() {
                let entry = entry.unwrap();
                self.upload(&entry.path(), &format!("{to}/{}", entry.file_name().to_str().unwrap()));
            }
        } else {
            let bytes = std::fs::read(from).unwrap();
            block_on(self.client.put(&object_store::path::Path::parse(to).unwrap(), bytes.into())).unwrap();
        }
    }

    /// Copies everything below a prefix into a folder.
    pub(crate) fn download(&self, from: &str, to: &Path) {
        for name in self.list(from) {
            let target = to.join(name.strip_prefix(from).unwrap().trim_start_matches('/'));
            std::fs::create_dir_all(target.parent().unwrap()).unwrap();
            #[expect(clippy::disallowed_methods, reason = "a test writes its own files")]
            std::fs::write(target, self.get(&name)).unwrap();
        }
    }

    /// The content of an object.
    pub(crate) fn get(&self, name: &str) -> bytes::Bytes {
        block_on(async { self.client.get(&object_store::path::Path::parse(name)?).await?.bytes().await }).unwrap()
    }

    /// The names of all objects below a prefix.
    pub(crate) fn list(&self, prefix: &str) -> Vec<String> {
        let prefix = object_store::path::Path::parse(prefix).unwrap();
        let objects: Vec<_> = block_on(self.client.list(Some(&prefix)).try_collect()).unwrap();
        let mut names: Vec<_> = objects.into_iter().map(|object| object.location.to_string()).collect();
        names.sort();
        names
    }

    fn is_there(&self) -> bool {
        block_on(self.client.list_with_delimiter(None)).is_ok()
    }
}

/// A server's process. It ends when this is dropped, and with the tests at the latest.
struct Server {
    name: &'static str,
    guard: Child,
}

impl Server {
    fn start(name: &'static str, arguments: &[String], settings: &[(&str, String)]) -> Self {
        let mut start = Command::new(needed("LOOKALIKE_TEST_PYTHON"));
        start.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/python/serve.py"));
        start.arg(Self::log(name)).args(arguments);
        start.envs(settings.iter().map(|(name, value)| (name, value))).env("TMPDIR", env!("CARGO_TARGET_TMPDIR"));
        Self { name, guard: start.stdin(Stdio::piped()).spawn().unwrap() }
    }

    fn log(name: &str) -> String {
        format!("{}/{name}.log", env!("CARGO_TARGET_TMPDIR"))
    }

    /// Waits until the server is ready.
    fn wait(&self, port: u16, is_ready: impl Fn() -> bool) {
        let deadline = Instant::now() + START_TIMEOUT;
        while TcpStream::connect(("127.0.0.1", port)).is_err() || !is_ready() {
            assert!(Instant::now() < deadline, "{} did not start; see {}", self.name, Self::log(self.name));
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.guard.stdin.take());
        self.guard.wait().unwrap();
    }
}

/// Waits for a client; one runtime for all, as clients keep connections that belong to it.
pub(crate) fn block_on<T>(future: impl Future<Output = T>) -> T {
    static RUNTIME: LazyLock<tokio::runtime::Runtime> =
        LazyLock::new(|| tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap());
    RUNTIME.block_on(future)
}

/// Ports that nothing listens on now.
fn free_ports<const N: usize>() -> [u16; N] {
    let listeners = [(); N].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
    listeners.map(|listener| listener.local_addr().unwrap().port())
}
