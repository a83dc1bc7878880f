use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use arrow::array::{ArrayRef, RecordBatch, StringArray};
use arrow::util::display::{ArrayFormatter, FormatOptions};
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;

use crate::servers::{AZURE_SECRET, Bucket, azure, google, s3};
use crate::support::{Ran, folder, picture, write};

/// What every secret of these tests contains.
const CANARY: &str = "canary";

/// What the secrets become in base64, as Azure's keys are.
const IN_BASE64: [&str; 3] = ["Y2FuYXJ5", "NhbmFye", "jYW5hcn"];

/// Cells of an image column that carry secrets, and one that is an image of the table. `{}` stands for the scheme of the store.
const IMAGES: [(&str, &str); 9] = [
    ("fine", "pictures/1.png"),
    ("presigned", "https://pictures.example/1.png?X-Amz-Credential=canaryid&X-Amz-Signature=canary0123456789"),
    ("shared", "https://pictures.example/1.png?sv=2026-01-01&sig=canary%2Bsignature%3D"),
    ("password", "https://user:canary-password@pictures.example/1.png"),
    ("user", "{}://user:canary/with+slash@lake/1.png"),
    ("missing", "{}://lake/none.png?X-Amz-Signature=canary0123456789"),
    ("relative", "pictures/none.png?X-Amz-Security-Token=canary-token-0123"),
    ("ftp", "ftp://user:canary-password@lake/1.png"),
    ("elsewhere", "{}://lake/none.png?X-Goog-Signature=canary0123456789&x=1"),
];

/// Variables with secrets of all clouds. A run needs those of its own store alone; the others must not be told either.
const OTHERS: [(&str, &str); 5] = [
    ("AZURE_STORAGE_SAS_TOKEN", "sv=2026-01-01&sr=c&sp=rwdl&sig=canary%2Bsignature%3D"),
    ("AZURE_CLIENT_SECRET", "canary-client-secret"),
    ("GOOGLE_BEARER_TOKEN", "canary-bearer-token"),
    (
        "GOOGLE_SERVICE_ACCOUNT_KEY",
        r#"{"private_key":"-----BEGIN PRIVATE KEY-----\ncanaryMIIEvQIBADANBg\n-----END PRIVATE KEY-----\n","private_key_id":"canary-key-id","client_email":"me@example.org"}"#,
    ),
    ("AWS_CONTAINER_AUTHORIZATION_TOKEN", "canary-container-token"),
];

#[track_caller]
fn assert_tells_nothing(what: &str, text: &[u8]) {
    let text = String::from_utf8_lossy(text);
    for secret in [&[CANARY], IN_BASE64.as_slice()].concat() {
        // Words are found whatever their case, base64 as it is.
        let found = if secret == CANARY { text.to_lowercase().find(secret) } else { text.find(secret) };
        if let Some(at) = found {
            let around: String = text.chars().skip(text[..at].chars().count().saturating_sub(300)).take(600).collect();
            panic!("{what} tells {secret}: … {around} …");
        }
    }
}

/// Everything in a file: its bytes, and the values of a Parquet file, which are compressed in them.
fn assert_file_tells_nothing(name: &str, bytes: bytes::Bytes) {
    assert_tells_nothing(name, &bytes);
    if !name.ends_with(".parquet") {
        return;
    }
    for batch in ParquetRecordBatchReaderBuilder::try_new(bytes).unwrap().build().unwrap() {
        let batch = batch.unwrap();
        for column in batch.columns() {
            let values = ArrayFormatter::try_new(column, &FormatOptions::default()).unwrap();
            let rows: Vec<_> = (0..batch.num_rows()).map(|row| values.value(row).to_string()).collect();
            assert_tells_nothing(name, rows.join("\n").as_bytes());
        }
    }
}

/// A table of image locations, and beside it the one image that is there.
fn put_source(bucket: &Bucket, folder: &Path, prefix: &str) {
    let scheme = bucket.url.split(':').next().unwrap();
    let secretive = IMAGES.into_iter().map(|(id, image)| (id.to_owned(), image.replace("{}", scheme)));
    let others = (2..6).map(|number| (format!("image{number}"), format!("pictures/{number}.png")));
    let (ids, images): (Vec<_>, Vec<_>) = secretive.chain(others).unzip();
    let rows = RecordBatch::try_from_iter([
        ("image_id", Arc::new(StringArray::from(ids)) as ArrayRef),
        ("image", Arc::new(StringArray::from(images))),
    ])
    .unwrap();
    let mut bytes = Vec::new();
    let mut writer = ArrowWriter::try_new(&mut bytes, rows.schema(), None).unwrap();
    writer.write(&rows).unwrap();
    writer.close().unwrap();
    let source = folder.join("source");
    std::fs::create_dir_all(source.join("pictures")).unwrap();
    let mut files = BTreeMap::from([("rows.parquet".to_owned(), bytes)]);
    files.extend((1..6).map(|number| (format!("pictures/{number}.png"), picture(number))));
    for (name, bytes) in files {
        #[expect(clippy::disallowed_methods, reason = "a test writes its own files")]
        std::fs::write(source.join(name), bytes).unwrap();
    }
    bucket.upload(&source, &format!("{prefix}/source"));
    std::fs::remove_dir_all(source).unwrap();
}

fn pipeline(url: &str) -> String {
    format!(
        "[pipeline]\nname = \"p\"\n[source]\ntable = \"{url}/source\"\n[model]\npackage = \"{url}/looked/model\"\n\
         [neighbors]\nk = 2\n[anomaly]\nreference = \"{url}/looked/reference.parquet\"\nthreshold = {{ contamination = 0.4 }}\n[output]\ntable = \"{url}/looked/out\"\n\
         [limits]\nmax_rejected_fraction = 0.9\n"
    )
}

/// Runs a command as talkative as it can be, and looks at what it says.
fn run(bucket: &Bucket, folder: &Path, args: &[&str], code: i32) -> Ran {
    let mut last = None;
    for format in ["text", "json"] {
        let mut command = bucket.command(folder, &[args, &["--log-format", format]].concat());
        let cloud = bucket.variables[0].0.split('_').next().unwrap();
        command.envs(OTHERS.into_iter().filter(|(name, _)| !name.starts_with(cloud)));
        let ran = Ran::from(command.env("RUST_LOG", "trace").output().unwrap());
        assert_tells_nothing(&format!("{args:?}, standard error"), ran.stderr.as_bytes());
        assert_tells_nothing(&format!("{args:?}, standard output"), ran.stdout.as_bytes());
        assert!(ran.code == code || format == "json", "{args:?}: {} {}", ran.code, ran.stderr);
        last = last.or(Some(ran));
    }
    last.unwrap()
}

/// The whole journey in a bucket, with all secrets in the environment.
fn the_journey_tells_nothing(bucket: &Bucket) {
    let folder = folder();
    put_source(bucket, folder.path(), "secrets");
    write(&folder.path().join("p.toml"), &pipeline(&format!("{}/secrets", bucket.url)));
    let metrics = folder.path().join("metrics.prom");
    let run = |args: &[&str]| run(bucket, folder.path(), args, 0);
    run(&["fit", "p.toml", "--latent-dim", "2", "--height", "8", "--width", "8"]);
    run(&["calibrate", "p.toml"]);
    run(&["plan", "p.toml", "--json"]);
    let summary = run(&["run", "p.toml", "--metrics-file", metrics.to_str().unwrap()]).summary();
    assert_eq!(summary["rows_ok"].as_u64(), Some(5), "{summary}");
    run(&["explain", "p.toml", "presigned"]);
    run(&["explain", "p.toml", "fine"]);
    run(&["check", "p.toml"]);
    run(&["vacuum", "p.toml", "--older-than-days", "1"]);
    let written = bucket.list("secrets/looked");
    assert!(written.iter().filter(|name| name.ends_with(".parquet")).count() > 4, "{written:?}");
    for name in written {
        assert_file_tells_nothing(&name, bucket.get(&name));
    }
    for entry in std::fs::read_dir(folder.path()).unwrap() {
        let path = entry.unwrap().path();
        assert_file_tells_nothing(path.to_str().unwrap(), std::fs::read(&path).unwrap().into());
    }
}

#[test]
fn no_output_table_log_or_report_tells_a_secret_of_s3() {
    the_journey_tells_nothing(&s3());
}

#[test]
fn no_output_table_log_or_report_tells_a_secret_of_azure() {
    assert!(AZURE_SECRET.contains(IN_BASE64[0]));
    the_journey_tells_nothing(&azure());
}

#[test]
fn no_output_table_log_or_report_tells_a_secret_of_google() {
    the_journey_tells_nothing(&google());
}

#[test]
fn what_goes_wrong_with_credentials_is_told_without_them() {
    let folder = folder();
    write(&folder.path().join("s3.toml"), &pipeline("s3://lake/secrets"));
    write(&folder.path().join("az.toml"), &pipeline("az://lake/secrets"));
    write(&folder.path().join("gs.toml"), &pipeline("gs://lake/secrets"));
    let mut shared = azure().with("AZURE_STORAGE_SAS_TOKEN", OTHERS[0].1);
    shared.variables.retain(|(name, _)| *name != "AZURE_STORAGE_ACCOUNT_KEY");
    let refusals: [(Bucket, &str); 6] = [
        (s3().with("AWS_SECRET_ACCESS_KEY", "wrong-canary-secret"), "s3.toml"),
        (s3().with("AWS_SESSION_TOKEN", "wrong-canary-token"), "s3.toml"),
        (azure().with("AZURE_STORAGE_ACCOUNT_KEY", "Y2FuYXJ5LXdyb25nLXNlY3JldA=="), "az.toml"),
        (azure().with("AZURE_STORAGE_ACCOUNT_KEY", "canary: no base64 at all"), "az.toml"),
        (shared, "az.toml"),
        (google().with("GOOGLE_BEARER_TOKEN", "wrong-canary-token"), "gs.toml"),
    ];
    for (bucket, file) in refusals {
        for args in [&["fit", file][..], &["run", file], &["check", file]] {
            let ran = Ran::from(bucket.command(folder.path(), args).env("RUST_LOG", "trace").output().unwrap());
            let ran = ran.expect(6);
            assert_tells_nothing(&format!("{args:?}"), ran.stderr.as_bytes());
            assert_tells_nothing(&format!("{args:?}"), ran.stdout.as_bytes());
        }
    }
    // Service accounts that are none, in full and cut short.
    let mut google = google();
    google.variables.retain(|(name, _)| *name != "GOOGLE_BEARER_TOKEN");
    for key in [OTHERS[3].1, &OTHERS[3].1[..60], "canary"] {
        let ran = google.with("GOOGLE_SERVICE_ACCOUNT_KEY", key).lookalike(folder.path(), &["fit", "gs.toml"]);
        let ran = ran.expect(6);
        assert_tells_nothing("a service account", ran.stderr.as_bytes());
    }
}

#[test]
fn what_is_typed_wrong_is_told_without_the_secret_in_it() {
    let folder = folder();
    let with_password = pipeline("s3://user:canary-password@lake/secrets");
    write(&folder.path().join("user.toml"), &with_password);
    write(&folder.path().join("query.toml"), &pipeline("s3://lake/secrets?X-Amz-Signature=canary0123456789"));
    write(&folder.path().join("broken.toml"), &format!("{with_password}[[\n"));
    write(&folder.path().join("good.toml"), &pipeline("s3://lake/secrets"));
    let endpoint = s3().with("AWS_ENDPOINT", "http://user:canary-password@127.0.0.1:1/?sig=canary0123456789");
    for args in [
        &["run", "user.toml"][..],
        &["run", "query.toml"],
        &["run", "broken.toml"],
        &["run", "good.toml", "--out", "s3://user:canary-password@lake/out"],
        &["run", "good.toml", "--model", "https://lake.example.org/model?sig=canary0123456789"],
    ] {
        let ran = run(&s3(), folder.path(), args, 2);
        assert!(args[1] == "broken.toml" || ran.stderr.contains("credentials"), "{args:?}: {}", ran.stderr);
    }
    let ran = endpoint.lookalike(folder.path(), &["fit", "good.toml"]);
    assert!(ran.code != 0);
    assert_tells_nothing("an endpoint with a password", ran.stderr.as_bytes());
}
