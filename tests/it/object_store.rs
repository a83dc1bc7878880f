use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use object_store::aws::AmazonS3Builder;
use object_store::{ObjectStore as _, ObjectStoreExt as _};

use crate::support::{Ran, cells, command, folder, lookalike, needed, write};

const ACCESS_KEY: &str = "lookalike-test";
const SECRET_KEY: &str = "canary-secret-of-the-test";
const BUCKET: &str = "lake";

/// How long the server may take to answer its first request.
const START_TIMEOUT: Duration = Duration::from_mins(1);

/// An S3 server (`SeaweedFS`) that checks signatures, on loopback, for one test.
struct Server {
    process: Child,
    endpoint: String,
    _folder: tempfile::TempDir,
}

impl Server {
    fn start() -> Self {
        let folder = folder();
        let program = needed("LOOKALIKE_TEST_PYTHON").parent().unwrap().join("weed");
        let ports = free_ports();
        let names = ["s3", "master", "filer", "volume", "admin"];
        let mut start = Command::new(&program);
        start.arg("mini").arg(format!("-dir={}", folder.path().display()));
        start.args(["-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-webdav=false", "-admin.ui=false"]);
        for (number, name) in names.iter().enumerate() {
            start.arg(format!("-{name}.port={}", ports[2 * number]));
            start.arg(format!("-{name}.port.grpc={}", ports[2 * number + 1]));
        }
        start.args(["-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false"]);
        start.env("AWS_ACCESS_KEY_ID", ACCESS_KEY).env("AWS_SECRET_ACCESS_KEY", SECRET_KEY).env("S3_BUCKET", BUCKET);
        let process = start.stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        let process = process.unwrap_or_else(|e| panic!("{}: {e}", program.display()));
        let server = Self { process, endpoint: format!("http://127.0.0.1:{}", ports[0]), _folder: folder };
        let deadline = Instant::now() + START_TIMEOUT;
        while TcpStream::connect(("127.0.0.1", ports[0])).is_err() || !server.has_bucket() {
            assert!(Instant::now() < deadline, "{} did not start", program.display());
            std::thread::sleep(Duration::from_millis(200));
        }
        server
    }

    fn client(&self) -> object_store::aws::AmazonS3 {
        AmazonS3Builder::new()
            .with_endpoint(&self.endpoint)
            .with_allow_http(true)
            .with_region("us-east-1")
            .with_bucket_name(BUCKET)
            .with_access_key_id(ACCESS_KEY)
            .with_secret_access_key(SECRET_KEY)
            .build()
            .unwrap()
    }

    fn has_bucket(&self) -> bool {
        block_on(async { self.client().list_with_delimiter(None).await }).is_ok()
    }

    fn upload(&self, from: &Path, to: &str) {
        let bytes = std::fs::read(from).unwrap();
        block_on(async { self.client().put(&to.into(), bytes.into()).await }).unwrap();
    }

    /// Runs the program with the settings of this server.
    fn lookalike(&self, folder: &Path, secret: &str, args: &[&str]) -> Ran {
        let mut command = command(folder, args);
        command.env("AWS_ENDPOINT", &self.endpoint).env("AWS_ALLOW_HTTP", "true").env("AWS_REGION", "us-east-1");
        command.env("AWS_ACCESS_KEY_ID", ACCESS_KEY).env("AWS_SECRET_ACCESS_KEY", secret);
        command.output().unwrap().into()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap().block_on(future)
}

/// Ports that nothing listens on now.
fn free_ports() -> [u16; 10] {
    let listeners = [(); 10].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
    listeners.map(|listener| listener.local_addr().unwrap().port())
}

fn pipeline(table: &str, base: &str) -> String {
    format!(
        "[pipeline]\nname = \"cells\"\n[source]\ntable = \"{table}\"\ncolumns = [\"defect\", \"split\"]\n\
         [model]\npackage = \"{base}/model\"\n[anomaly]\nreference = \"{base}/reference.json\"\n[output]\ntable = \"{base}/tables\"\n"
    )
}

#[test]
fn the_journey_through_s3_gives_what_the_journey_on_disk_gives() {
    let server = Server::start();
    let folder = folder();
    for module in ["mono", "poly"] {
        let file = format!("module={module}/cells.parquet");
        server.upload(&cells().join(&file), &format!("images/{file}"));
    }
    write(&folder.path().join("s3.toml"), &pipeline("s3://lake/images", "s3://lake/looked"));
    write(&folder.path().join("disk.toml"), &pipeline(cells().to_str().unwrap(), "looked"));
    let journey = |run: &dyn Fn(&[&str]) -> Ran, file: &str| -> String {
        run(&["fit", file, "--color", "gray", "--latent-dim", "32", "--where", "split = 'fit'"]).expect(0);
        run(&["calibrate", file, "--where", "split = 'calibrate'"]).expect(0);
        let summary = run(&["run", file]).expect(0).summary();
        assert_eq!((summary["status"].as_str(), summary["rows_ok"].as_u64()), (Some("committed"), Some(2624)));
        assert_eq!(run(&["run", file]).expect(0).summary()["status"], "nothing_to_do");
        let areas =
            run(&["evaluate", file, "--positive", "defect = 1", "--negative", "defect = 0", "--json"]).expect(0);
        let cell = run(&["explain", file, "cell0002"]).expect(0).stdout;
        // Run ids are of the files, which have other names and versions here and there.
        let cell: Vec<_> = cell.lines().filter(|line| !line.contains("run_id")).collect();
        format!("{}\n{}\n{}", summary["rows_flagged"], areas.stdout, cell.join("\n"))
    };
    let through_s3 = journey(&|args| server.lookalike(folder.path(), SECRET_KEY, args), "s3.toml");
    let on_disk = journey(&|args| lookalike(folder.path(), args), "disk.toml");
    assert_eq!(through_s3, on_disk);
}

#[test]
fn refused_credentials_are_a_missing_resource_and_the_secret_is_not_told() {
    let server = Server::start();
    let folder = folder();
    write(&folder.path().join("s3.toml"), &pipeline("s3://lake/images/x.parquet", "s3://lake/looked"));
    let wrong = "wrong-canary-secret";
    let ran = server.lookalike(folder.path(), wrong, &["fit", "s3.toml"]).expect(6);
    assert!(ran.stderr.contains("s3://lake/images"), "{}", ran.stderr);
    assert!(!ran.stderr.contains(wrong) && !ran.stdout.contains(wrong), "{}", ran.stderr);
}
