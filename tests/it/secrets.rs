use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use arrow::array::{ArrayRef, RecordBatch, StringArray};
use lookalike::context::LogFormat;
use lookalike::schema::TableName;

use crate::support::{Ran, command, folder, picture, rows, write};

/// A secret as clouds make them, with the signs that URLs and JSON escape.
const CANARY: &str = "cAnArY/aB+cD=eF\"gH";

/// What would be left of the canary in any encoding.
const TRACES: [&str; 2] = ["cAnArY", "gH"];

/// Runs the program with the canary as its key of S3 and everything logged.
fn lookalike(folder: &Path, args: &[&str]) -> Ran {
    command(folder, args)
        .env("AWS_SECRET_ACCESS_KEY", CANARY)
        .env("RUST_LOG", "trace,ort=info")
        .output()
        .unwrap()
        .into()
}

#[track_caller]
fn assert_no_secret(text: &str) {
    for trace in TRACES.iter().chain(&["hunter2", "s1gned"]) {
        assert!(!text.contains(trace), "{trace} is in:\n{text}");
    }
}

#[track_caller]
fn assert_told_without_secret(ran: &Ran, told: &str) {
    assert!(ran.stderr.contains(told), "{told} is not in:\n{}", ran.stderr);
    assert!(ran.stderr.contains("***"), "nothing was hidden in:\n{}", ran.stderr);
    assert_no_secret(&ran.stderr);
    assert_no_secret(&ran.stdout);
}

fn pipeline(table: &str) -> String {
    let table = serde_json::Value::from(table);
    format!(
        "[pipeline]\nname = \"canary\"\n[source]\ntable = {table}\n[model]\npackage = \"model\"\n\
         [output]\ntable = \"out\"\n[limits]\nmax_rejected_fraction = 1.0\n"
    )
}

#[test]
fn a_secret_in_a_path_a_flag_or_a_pipeline_file_is_not_told() {
    let folder = folder();
    for format in ["text", "json"] {
        let run = |args: &[&str]| lookalike(folder.path(), &[args, &["--log-format", format]].concat());
        // A missing table, whose URL has the secret percent-encoded.
        write(&folder.path().join("p.toml"), &pipeline(&format!("images/{CANARY}")));
        assert_told_without_secret(&run(&["fit", "p.toml"]).expect(4), "images/");
        // A misspelled key beside it: the error shows the line of the file, where TOML escapes the secret.
        let misspelled = pipeline("images").replace("[model]", &format!("idd = {CANARY:?}\n[model]"));
        write(&folder.path().join("q.toml"), &misspelled);
        let ran = run(&["fit", "q.toml"]).expect(2);
        assert_no_secret(&ran.stderr);
        assert_eq!(ran.stderr.contains("***"), format == "text", "{}", ran.stderr);
        // A value that is shown as it was typed.
        assert_told_without_secret(&run(&["run", "p.toml", "--device", CANARY]).expect(2), "--device");
        assert_no_secret(&run(&["run", "p.toml", "--out", "s3://me:hunter2@lake/x"]).expect(2).stderr);
        assert_told_without_secret(&run(&["fit", &format!("{CANARY}.toml")]).expect(2), ".toml");
    }
}

#[test]
fn a_row_tells_what_was_wrong_with_its_uri_and_not_the_secret_in_it() {
    let folder = folder();
    for seed in 0..8 {
        let path = folder.path().join(format!("images/{seed}.png"));
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        #[expect(clippy::disallowed_methods, reason = "a test writes its own files")]
        std::fs::write(path, picture(seed)).unwrap();
    }
    let bad = [
        "https://me:hunter2@pictures.example/1.png".to_owned(),
        "https://pictures.example/2.png?X-Amz-Signature=s1gned&x=1".to_owned(),
        format!("file:///nowhere/{}/3.png", CANARY.replace('+', "%2B")),
        format!("nowhere/{CANARY}/4.png"),
    ];
    let uris: Vec<String> = (0..8).map(|seed| format!("{seed}.png")).chain(bad).collect();
    let ids = (0..uris.len()).map(|number| Some(format!("row{number}"))).collect::<StringArray>();
    let table = RecordBatch::try_from_iter([
        ("image_id", Arc::new(ids) as ArrayRef),
        ("image", Arc::new(StringArray::from(uris))),
    ])
    .unwrap();
    let mut bytes = Vec::new();
    let mut writer = parquet::arrow::ArrowWriter::try_new(&mut bytes, table.schema(), None).unwrap();
    writer.write(&table).unwrap();
    writer.close().unwrap();
    #[expect(clippy::disallowed_methods, reason = "a test writes its own files")]
    std::fs::write(folder.path().join("images/table.parquet"), bytes).unwrap();
    write(&folder.path().join("p.toml"), &pipeline("images"));
    let mut told = String::new();
    for args in
        [&["fit", "p.toml", "--height", "8", "--width", "8"][..], &["run", "p.toml"], &["explain", "p.toml", "row9"]]
    {
        let ran = lookalike(folder.path(), args).expect(0);
        told += &(ran.stdout + &ran.stderr);
    }
    assert_no_secret(&told);
    let rows = rows(&folder.path().join("out"), TableName::Latents, &[]);
    assert_eq!(rows.len(), 12);
    for place in ["pictures.example/1.png", "pictures.example/2.png", "file:///nowhere/", "nowhere/"] {
        let row = rows.iter().find(|row| row.contains(place)).unwrap_or_else(|| panic!("{place} is not in {rows:#?}"));
        assert!(row.contains("***"), "{row}");
    }
    for row in &rows {
        assert_no_secret(row);
    }
}

/// Set in the process that is to panic.
const PANICS: &str = "LOOKALIKE_TEST_PANICS";

#[test]
fn a_panic_tells_where_it_was_and_not_the_secret_in_its_text() {
    if std::env::vars().any(|(name, _)| name == PANICS) {
        lookalike::redact::learn(std::env::vars_os());
        lookalike::cli::tell_panics(LogFormat::Json);
        panic!("the answer was {CANARY:?} from https://me:hunter2@lake");
    }
    let name = "secrets::a_panic_tells_where_it_was_and_not_the_secret_in_its_text";
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args([name, "--exact", "--nocapture"]).env(PANICS, "1").env("AWS_SECRET_ACCESS_KEY", CANARY);
    let ran: Ran = child.output().unwrap().into();
    assert_ne!(ran.code, 0);
    assert_told_without_secret(&ran, "the answer was");
    let line = ran.stderr.lines().find(|line| line.contains("the answer was")).unwrap();
    let line: serde_json::Value = serde_json::from_str(line).unwrap();
    assert!(line["fields"]["message"].as_str().unwrap().contains("secrets.rs"), "{line}");
}
