use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use futures::TryStreamExt as _;
use futures::stream::BoxStream;
use lookalike::config::Overrides;
use lookalike::context::Context;
use lookalike::error::ExitStatus;
use lookalike::store::Stores;
use object_store::memory::InMemory;
use object_store::path::Path as ObjectPath;
use object_store::{
    CopyOptions, DynObjectStore, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore, PutMode,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};
use serde_json::Value;
use url::Url;

use crate::servers::{S3_SECRET, block_on, s3};
use crate::support::{Ran, folder, image_table, lookalike, needed, write};

/// Everything that is looked at, in order, with a named reference and a local output.
const ALL: [&str; 14] = [
    "pipeline file",
    "ONNX Runtime",
    "provider",
    "model package",
    "model replay",
    "reference",
    "source",
    "output list",
    "output write",
    "output put-if-absent",
    "output delete",
    "clock",
    "disk",
    "tables",
];

const PIPELINE: &str = "[pipeline]\nname = \"cells\"\n[source]\ntable = \"images\"\n[model]\npackage = \"model\"\n\
     [anomaly]\nreference = \"reference.parquet\"\nthreshold = { contamination = 0.3 }\n[output]\ntable = \"looked/out\"\n";

/// A folder in which a run would work.
fn prepared() -> tempfile::TempDir {
    let folder = folder();
    write(&folder.path().join("p.toml"), PIPELINE);
    let ids: Vec<String> = (0..8).map(|number| format!("row{number}")).collect();
    let rows: Vec<(&str, i64)> = ids.iter().zip(1..).map(|(id, seed)| (id.as_str(), seed)).collect();
    image_table(&folder.path().join("images/cells.parquet"), &rows);
    lookalike(folder.path(), &["fit", "p.toml", "--height", "8", "--width", "8"]).expect(0);
    lookalike(folder.path(), &["calibrate", "p.toml"]).expect(0);
    folder
}

/// The status of each check, by its name, and what was said to it.
fn findings(ran: &Ran) -> BTreeMap<String, (String, String)> {
    let checks = ran.summary()["checks"].as_array().unwrap().clone();
    let text = |check: &Value, key: &str| check[key].as_str().unwrap_or_default().to_owned();
    let found = checks.iter().map(|check| {
        let said = ["detail", "why", "fix", "needs"].map(|key| text(check, key)).join(" ");
        (text(check, "check"), (text(check, "status"), said))
    });
    found.collect()
}

/// Checks that `failed` and `skipped` did so and that all others passed, and returns what was said of the failure.
#[track_caller]
fn assert_finds(ran: &Ran, failed: &str, skipped: &[&str]) -> String {
    let findings = findings(ran);
    assert!(findings.contains_key(failed), "{failed} is not in {findings:#?}");
    for (what, (status, said)) in &findings {
        let expected = match what.as_str() {
            what if what == failed => "failed",
            what if skipped.contains(&what) => "skipped",
            _ => "passed",
        };
        assert_eq!(status, expected, "{what}: {said}");
    }
    findings[failed].1.clone()
}

/// Every file and folder below a folder.
fn tree(folder: &Path) -> Vec<String> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            found.push(path.display().to_string());
            if path.is_dir() {
                folders.push(path);
            }
        }
    }
    found.sort();
    found
}

#[test]
fn where_a_run_would_work_every_check_passes_and_nothing_is_left_behind() {
    let folder = prepared();
    let before = tree(folder.path());
    let ran = lookalike(folder.path(), &["check", "p.toml"]).expect(0);
    let lines: Vec<&str> = ran.stdout.lines().collect();
    assert_eq!(lines.len(), ALL.len(), "{}", ran.stdout);
    for (line, what) in lines.iter().zip(ALL) {
        assert!(line.starts_with(&format!("✔ {what} (")), "{what}: {line}");
    }
    for told in ["ONNX Runtime (1.", "8 rows in 1 partitions", "24 x 16 pixels", "3 races of 8 writers"] {
        assert!(ran.stdout.contains(told), "{told} is not in:\n{}", ran.stdout);
    }
    assert_eq!(tree(folder.path()), before);
    // Tables that are there are left as they are.
    lookalike(folder.path(), &["run", "p.toml"]).expect(0);
    let before = tree(folder.path());
    let ran = lookalike(folder.path(), &["check", "p.toml", "--json"]).expect(0);
    let names: Vec<String> = ran.summary()["checks"]
        .as_array()
        .unwrap()
        .iter()
        .map(|check| check["check"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(names, ALL);
    assert!(findings(&ran)["tables"].1.contains("1 partitions in latents"), "{}", ran.stdout);
    assert_eq!(tree(folder.path()), before);
    assert_eq!(lookalike(folder.path(), &["run", "p.toml"]).expect(0).summary()["status"], "nothing_to_do");
}

#[test]
fn a_wrong_key_in_the_pipeline_file_is_told_with_its_line_and_the_runtime_is_checked_all_the_same() {
    let folder = prepared();
    let problems = PIPELINE.replace("package", "pakage").replace("[output]", "[neighbors]\nkk = 3\n[output]");
    write(&folder.path().join("p.toml"), &problems);
    let ran = lookalike(folder.path(), &["check", "p.toml", "--json"]).expect(2);
    let said = findings(&ran)["pipeline file"].1.clone();
    assert!(
        said.contains("unknown key `kk`") && said.contains("did you mean `k`?") && said.contains("`pakage`"),
        "{said}"
    );
    write(&folder.path().join("p.toml"), &PIPELINE.replace("package", "pakage"));
    let ran = lookalike(folder.path(), &["check", "p.toml", "--json"]).expect(2);
    let skipped: Vec<&str> = ALL[2..].iter().copied().filter(|what| !["reference", "disk"].contains(what)).collect();
    let said = assert_finds(&ran, "pipeline file", &skipped);
    assert!(said.contains("line 6") && said.contains("did you mean `package`?"), "{said}");
    let text = lookalike(folder.path(), &["check", "p.toml"]).expect(2).stdout;
    assert!(
        text.contains("✖ pipeline file: ") && text.contains("\n  fix: ") && text.contains("✔ ONNX Runtime"),
        "{text}"
    );
    assert!(text.contains("- source: skipped, for it needs: pipeline file"), "{text}");
}

#[test]
fn a_missing_runtime_is_told_with_the_way_to_get_it_and_the_stores_are_checked_all_the_same() {
    let folder = prepared();
    let ran =
        lookalike(folder.path(), &["check", "p.toml", "--json", "--onnxruntime", "no/libonnxruntime.so"]).expect(6);
    let said = assert_finds(&ran, "ONNX Runtime", &["provider", "model replay"]);
    assert!(said.contains("no/libonnxruntime.so") && said.contains("pip install onnxruntime"), "{said}");
}

#[test]
fn a_device_that_is_not_there_is_told_and_auto_says_what_it_takes_instead() {
    let folder = prepared();
    let ran = lookalike(folder.path(), &["check", "p.toml", "--json", "--device", "cuda"]).expect(6);
    let said = assert_finds(&ran, "provider", &["model replay"]);
    assert!(said.contains("device \"cuda\" is not available") && said.contains("onnxruntime-gpu"), "{said}");
    let ran = lookalike(folder.path(), &["check", "p.toml", "--json", "--device", "auto"]).expect(0);
    assert!(findings(&ran)["provider"].1.starts_with("cpu, for device \"cuda\""), "{}", ran.stdout);
}

#[test]
fn a_model_whose_golden_images_do_not_replay_or_whose_files_changed_is_told() {
    let folder = prepared();
    let contract = folder.path().join("model/model.toml");
    let text = std::fs::read_to_string(&contract).unwrap();
    // Another preprocessing than the exporter's. The reference is of the contract as it was.
    write(
        &folder.path().join("p.toml"),
        &PIPELINE.replace("[anomaly]\nreference = \"reference.parquet\"\nthreshold = { contamination = 0.3 }\n", ""),
    );
    let changed: Vec<&str> =
        text.lines().map(|line| if line.starts_with("scale = ") { "scale = 0.5" } else { line }).collect();
    let changed = changed.join("\n");
    assert!(changed.contains("scale = 0.5"), "{text}");
    write(&contract, &changed);
    let said = assert_finds(&lookalike(folder.path(), &["check", "p.toml", "--json"]).expect(4), "model replay", &[]);
    assert!(said.contains("does not replay: input differs") && said.contains("[input] of model.toml"), "{said}");
    // A file that was copied incompletely.
    write(&contract, &text);
    write(&folder.path().join("model/vae.onnx"), "half");
    let said = assert_finds(&lookalike(folder.path(), &["check", "p.toml", "--json"]).expect(4), "model replay", &[]);
    assert!(said.contains("vae.onnx has sha256") && said.contains("export it again"), "{said}");
    // None at all.
    let other = ["check", "p.toml", "--json", "--model", "nowhere"];
    let said = assert_finds(&lookalike(folder.path(), &other).expect(4), "model package", &["model replay", "tables"]);
    assert!(said.contains("nowhere/model.toml") && said.contains("lookalike fit"), "{said}");
}

#[test]
fn a_source_or_a_reference_that_is_not_as_agreed_is_told() {
    let folder = prepared();
    let check = || lookalike(folder.path(), &["check", "p.toml", "--json"]);
    write(&folder.path().join("p.toml"), &PIPELINE.replace("images\"", "images\"\ncolumns = [\"lable\"]"));
    let said = assert_finds(&check().expect(4), "source", &["tables"]);
    assert!(said.contains("no column `lable`") && said.contains("did you mean `label`?"), "{said}");
    write(&folder.path().join("p.toml"), &PIPELINE.replace("images\"", "pictures\""));
    assert!(assert_finds(&check().expect(4), "source", &["tables"]).contains("pictures"));
    // The tables need the reference too, and find it missing themselves.
    write(&folder.path().join("p.toml"), &PIPELINE.replace("reference.parquet", "other.parquet"));
    let ran = check().expect(4);
    let found = findings(&ran);
    assert_eq!((found["reference"].0.as_str(), found["source"].0.as_str()), ("failed", "passed"));
    assert!(found["reference"].1.contains("other.parquet") && found["reference"].1.contains("lookalike calibrate"));
}

#[test]
fn an_output_that_cannot_be_written_is_told() {
    let folder = prepared();
    // A folder that nobody, not even root, makes folders in.
    let read_only = if cfg!(target_os = "linux") { "/sys/kernel/lookalike" } else { "/System/lookalike" };
    let ran = lookalike(folder.path(), &["check", "p.toml", "--json", "--out", read_only]).expect(6);
    let found = findings(&ran);
    for (what, expected) in [
        ("source", "passed"),
        ("output list", "passed"),
        ("output write", "failed"),
        ("output put-if-absent", "skipped"),
        ("output delete", "skipped"),
        ("clock", "skipped"),
        ("tables", "passed"),
    ] {
        assert_eq!(found[what].0, expected, "{what}: {found:#?}");
    }
    let said = &found["output write"].1;
    assert!(said.contains(read_only) && said.contains("may write there"), "{said}");
}

#[test]
fn an_s3_bucket_passes_every_check_and_a_missing_one_or_a_wrong_key_is_told() {
    let bucket = s3();
    let folder = prepared();
    let check = |secret: &str, out: &str| {
        bucket
            .with("AWS_SECRET_ACCESS_KEY", secret)
            .lookalike(folder.path(), &["check", "p.toml", "--json", "--out", out])
    };
    let out = format!("{}/checked", bucket.url);
    let ran = check(S3_SECRET, &out).expect(0);
    let found = findings(&ran);
    assert!(found.values().all(|(status, _)| status == "passed") && !found.contains_key("disk"), "{found:#?}");
    assert!(found["output delete"].1.starts_with("4 objects"), "{found:#?}");
    let left = bucket.client().list(Some(&"checked".into()));
    let left: Vec<ObjectMeta> = block_on(left.try_collect()).unwrap();
    assert!(left.is_empty(), "{left:#?}");
    let skipped = ["output write", "output put-if-absent", "output delete", "clock", "tables"];
    let said = assert_finds(&check(S3_SECRET, "s3://no-such-bucket/looked").expect(4), "output list", &skipped);
    assert!(said.contains("s3://no-such-bucket/looked") && said.contains("create the bucket"), "{said}");
    let said = assert_finds(&check("another-secret-key", &out).expect(6), "output list", &skipped);
    assert!(said.contains("AWS_SECRET_ACCESS_KEY") && !said.contains("another-secret-key"), "{said}");
}

/// How a store breaks its promises.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Fault {
    /// Put-if-absent overwrites what is there.
    Overwrites,
    /// Put-if-absent tells one writer of several that it was first, and keeps the bytes of the last.
    KeepsTheLast,
    /// Nothing can be created.
    NobodyWins,
    /// What is read is not what was written.
    Garbles,
    /// Objects stay when they are deleted.
    KeepsDeleted,
    /// The clock is an hour ahead.
    Ahead,
}

/// A store in memory that breaks one promise.
#[derive(Debug)]
struct Broken {
    inner: InMemory,
    fault: Fault,
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "broken")
    }
}

#[async_trait]
impl ObjectStore for Broken {
    async fn put_opts(&self, path: &ObjectPath, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        if !matches!(options.mode, PutMode::Create) {
            return self.inner.put_opts(path, payload, options).await;
        }
        let refused = || object_store::Error::AlreadyExists { path: path.to_string(), source: "it is there".into() };
        match self.fault {
            Fault::Overwrites => self.inner.put_opts(path, payload, PutOptions::default()).await,
            Fault::NobodyWins => Err(refused()),
            Fault::KeepsTheLast => {
                let first = self.inner.put_opts(path, payload.clone(), options).await;
                self.inner.put_opts(path, payload, PutOptions::default()).await?;
                first
            }
            _ => self.inner.put_opts(path, payload, options).await,
        }
    }

    async fn put_multipart_opts(
        &self,
        path: &ObjectPath,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.inner.put_multipart_opts(path, options).await
    }

    async fn get_opts(&self, path: &ObjectPath, options: GetOptions) -> Result<GetResult> {
        if self.fault == Fault::Garbles && path.filename() == Some("object") && !options.head {
            self.inner.put_opts(path, "garbled".into(), PutOptions::default()).await?;
        }
        let mut result = self.inner.get_opts(path, options).await?;
        if self.fault == Fault::Ahead {
            result.meta.last_modified += chrono::TimeDelta::hours(1);
        }
        Ok(result)
    }

    fn delete_stream(&self, paths: BoxStream<'static, Result<ObjectPath>>) -> BoxStream<'static, Result<ObjectPath>> {
        if self.fault == Fault::KeepsDeleted { paths } else { self.inner.delete_stream(paths) }
    }

    fn list(&self, prefix: Option<&ObjectPath>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.inner.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&ObjectPath>) -> Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &ObjectPath, to: &ObjectPath, options: CopyOptions) -> Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}

/// Takes what is printed.
#[derive(Debug, Clone, Default)]
struct Printed(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Printed {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_store_that_breaks_a_promise_commits_rely_on_is_told() {
    let folder = prepared();
    for (fault, failed, told) in [
        (Fault::Overwrites, "output put-if-absent", "8 of 8 writers were told that they created"),
        (Fault::KeepsTheLast, "output put-if-absent", "has not the bytes of the writer that created it"),
        (Fault::NobodyWins, "output put-if-absent", ""),
        (Fault::Garbles, "output write", "something else was read"),
        (Fault::KeepsDeleted, "output delete", "was deleted, and is still there"),
        (Fault::Ahead, "clock", "s ahead of this machine's synchronize"),
    ] {
        let stores = Stores::default();
        let client: Arc<DynObjectStore> = Arc::new(Broken { inner: InMemory::new(), fault });
        stores.insert(&Url::parse("s3://lake").unwrap(), client);
        let printed = Printed::default();
        let context = Context::with_stores(stores, Some(needed("ORT_DYLIB_PATH")), true).unwrap();
        let context = context.printing_to(printed.clone());
        let overrides = Overrides {
            current_dir: folder.path().to_owned(),
            output_table: Some("s3://lake/looked".to_owned()),
            ..Overrides::default()
        };
        let status =
            lookalike::commands::check::check(&context, &folder.path().join("p.toml"), &overrides, true).unwrap();
        let stdout = String::from_utf8(printed.0.lock().unwrap().clone()).unwrap();
        let ran = Ran { code: status as i32, stdout, stderr: String::new() };
        let skipped: &[&str] =
            if failed == "output write" { &["output put-if-absent", "output delete", "clock"] } else { &[] };
        let said = assert_finds(&ran, failed, skipped);
        assert!(said.contains(told), "{told} is not in {said}");
        assert_ne!(status, ExitStatus::Success);
    }
}
