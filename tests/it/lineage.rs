use std::io::{BufReader, Write as _};
use std::net::TcpListener;
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::http::Message;
use crate::support::{Ran, command, folder, image_table, lookalike, python, write};

const PIPELINE: &str = "[pipeline]\nname = \"cells\"\n[source]\ntable = \"images\"\ncolumns = [\"label\"]\n\
     [model]\npackage = \"model\"\n[neighbors]\nk = 2\nduplicate_distance = 0.001\n[output]\ntable = \"out\"\n\
     [limits]\nmax_rejected_fraction = 0.3\n";

const SECRET: &str = "key-that-nobody-may-see";

const PARENT_RUN: &str = "01912345-6789-7abc-8def-0123456789ab";

/// A pipeline with a small model, and 10 rows of which 2 are no pictures.
fn prepared() -> tempfile::TempDir {
    let folder = folder();
    write(&folder.path().join("cells.toml"), PIPELINE);
    let ids: Vec<String> = (0..10).map(|number| format!("row{number}")).collect();
    let rows: Vec<(&str, i64)> =
        ids.iter().zip([1, 2, 3, 4, 5, 6, 7, 7, -1, -1]).map(|(id, seed)| (id.as_str(), seed)).collect();
    image_table(&folder.path().join("images/ds=2026-11-21/cells.parquet"), &rows);
    lookalike(folder.path(), &["fit", "cells.toml", "--height", "8", "--width", "8"]).expect(0);
    folder
}

/// A server that keeps what it is sent.
struct Collector {
    url: String,
    taken: Arc<Mutex<Vec<Message>>>,
}

impl Collector {
    /// Starts one that answers with a status, after a while.
    fn start(status: &'static str, after: Duration) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let taken = Arc::new(Mutex::new(Vec::new()));
        let keep = Arc::clone(&taken);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let keep = Arc::clone(&keep);
                std::thread::spawn(move || {
                    let mut stream = stream.unwrap();
                    let mut reader = BufReader::new(stream.try_clone().unwrap());
                    while let Ok(Some(message)) = Message::read(&mut reader, true) {
                        keep.lock().unwrap().push(message);
                        std::thread::sleep(after);
                        let answer = format!("HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n");
                        if stream.write_all(answer.as_bytes()).is_err() {
                            break;
                        }
                    }
                });
            }
        });
        Self { url, taken }
    }

    /// The events so far, which the client of OpenLineage can read.
    fn events(&self, folder: &Path) -> Vec<Value> {
        let bodies: Vec<String> = self.taken.lock().unwrap().iter().map(|message| text(&message.body)).collect();
        read(folder, &bodies.join("\n"))
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// Events, one a line, which the client of OpenLineage can read.
fn read(folder: &Path, lines: &str) -> Vec<Value> {
    let events: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    write(&folder.join("events.ndjson"), lines);
    let read = python("lineage_events.py", &[&folder.join("events.ndjson")]);
    assert_eq!(read.trim(), events.len().to_string());
    events
}

fn run(folder: &Path, args: &[&str], variables: &[(&str, &str)]) -> Ran {
    let mut command: Command = command(folder, &[&["run", "cells.toml"], args].concat());
    command.envs(variables.iter().copied()).output().unwrap().into()
}

/// Kinds of events, and the run and job that they are about.
fn told(events: &[Value]) -> Vec<(&str, &str, &str)> {
    events
        .iter()
        .map(|event| {
            let text = |pointer: &str| event.pointer(pointer).and_then(Value::as_str).unwrap();
            (text("/eventType"), text("/run/runId"), text("/job/name"))
        })
        .collect()
}

/// The datasets of a role: the end of each name, and its number of rows.
fn datasets(event: &Value, role: &str) -> Vec<(String, Option<u64>)> {
    let rows = format!("/{role}Facets/{role}Statistics/rowCount");
    let each = event[format!("{role}s")].as_array().unwrap().iter();
    each.map(|dataset| {
        assert_eq!(dataset["namespace"], "file");
        let name = dataset["name"].as_str().unwrap();
        (name.rsplit('/').next().unwrap().to_owned(), dataset.pointer(&rows).and_then(Value::as_u64))
    })
    .collect()
}

fn names(datasets: &[(String, Option<u64>)]) -> Vec<&str> {
    datasets.iter().map(|(name, _)| name.as_str()).collect()
}

#[test]
fn a_server_is_told_what_runs_read_and_write_and_how_they_end() {
    let folder = prepared();
    let folder = folder.path();
    let server = Collector::start("201 Created", Duration::ZERO);
    let parent = format!("airflow/nightly.look/{PARENT_RUN}");
    let variables = [
        ("OPENLINEAGE_URL", server.url.as_str()),
        ("OPENLINEAGE_API_KEY", SECRET),
        ("OPENLINEAGE_NAMESPACE", "lake"),
        ("OPENLINEAGE_PARENT_ID", &parent),
    ];
    let range = ["--from", "2026-11-20", "--to", "2026-11-21"];
    run(folder, &range, &variables).expect(0);
    let events = server.events(folder);
    let [("START", id, "cells"), ("COMPLETE", same, "cells")] = told(&events)[..] else { panic!("{events:#?}") };
    assert_eq!(id, same);
    for message in server.taken.lock().unwrap().iter() {
        assert_eq!(message.line, "POST /api/v1/lineage HTTP/1.1");
        assert_eq!(message.header("content-type"), Some("application/json"));
        assert_eq!(message.header("authorization"), Some(format!("Bearer {SECRET}").as_str()));
        assert!(!text(&message.body).contains(SECRET));
    }
    let (begun, ended) = (&events[0], &events[1]);
    for event in &events {
        assert_eq!(event["job"]["namespace"], "lake");
        let facets = &event["run"]["facets"];
        assert_eq!(facets["parent"]["run"]["runId"], PARENT_RUN);
        assert_eq!(facets["parent"]["job"]["name"], "nightly.look");
        assert_eq!(facets["nominalTime"]["nominalStartTime"], "2026-11-20T00:00:00Z");
        assert_eq!(facets["nominalTime"]["nominalEndTime"], "2026-11-22T00:00:00Z");
        assert_eq!(facets["processing_engine"]["version"], env!("CARGO_PKG_VERSION"));
        assert_eq!(names(&datasets(event, "input")), ["images", "model"]);
        assert_eq!(names(&datasets(event, "output")), ["latents", "neighbors", "groups", "anomalies", "runs"]);
    }
    assert!(datasets(begun, "output").iter().all(|(_, rows)| rows.is_none()), "{begun:#}");
    let path = folder.join("images").canonicalize().unwrap();
    assert_eq!(ended["inputs"][0]["name"].as_str(), path.to_str());
    assert_eq!(datasets(ended, "input")[0].1, Some(10));
    let rows: Vec<Option<u64>> = datasets(ended, "output").into_iter().map(|(_, rows)| rows).collect();
    assert_eq!(rows, [Some(10), Some(16), Some(8), Some(10), None]);
    let summary = run(folder, &range, &[]).expect(0).summary();
    assert_eq!(ended["inputs"][1]["facets"]["version"]["datasetVersion"], summary["model_sha256"]);
    let columns = ended["outputs"][0]["facets"]["schema"]["fields"].as_array().unwrap();
    let column = |name: &str| columns.iter().find(|column| column["name"] == name).unwrap_or(&Value::Null);
    assert_eq!(column("label")["type"], "long");
    assert_eq!(column("embedding")["fields"][0]["type"], "float");
    assert_eq!(column("ds")["type"], "string");

    // Nothing to do: complete, and nothing written.
    let before = events.len();
    run(folder, &[], &variables).expect(0);
    let events = server.events(folder);
    assert_eq!(told(&events[before..]).iter().map(|(kind, ..)| *kind).collect::<Vec<_>>(), ["START", "COMPLETE"]);
    assert_ne!(told(&events)[before].1, id);
    assert_eq!(datasets(&events[before + 1], "output")[0].1, Some(0));
    assert!(events[before]["run"]["facets"].get("nominalTime").is_none());

    // Committed with too many rejects: failed, with what is written.
    write(&folder.join("cells.toml"), &PIPELINE.replace("0.3", "0.1").replace("\"out\"", "\"out2\""));
    let before = events.len();
    run(folder, &[], &variables).expect(3);
    let events = server.events(folder);
    assert_eq!(told(&events)[before + 1].0, "FAIL");
    assert_eq!(datasets(&events[before + 1], "output")[0].1, Some(10));

    // Failed: with the message, without secrets, and with the exit code.
    write(&folder.join("cells.toml"), &PIPELINE.replace("\"images\"", &format!("\"{SECRET}/images\"")));
    let before = events.len();
    let said = run(folder, &[], &variables).expect(4);
    let events = server.events(folder);
    let [("START", ..), ("FAIL", ..)] = told(&events[before..])[..] else { panic!("{events:#?}") };
    let message = events[before + 1]["run"]["facets"]["errorMessage"]["message"].as_str().unwrap();
    assert!(message.ends_with("(exit code 4)") && message.contains("images"), "{message}");
    let all: Vec<String> = events.iter().map(ToString::to_string).chain([said.stderr, said.stdout]).collect();
    assert!(!all.iter().any(|text| text.contains(SECRET)), "{all:?}");

    // A pipeline file that says nothing of a job, and a switch: nothing is told.
    let before = events.len();
    run(folder, &[], &[&variables[..], &[("OPENLINEAGE_DISABLED", "true")]].concat()).expect(4);
    write(&folder.join("cells.toml"), "no toml");
    run(folder, &[], &variables).expect(2);
    assert_eq!(server.taken.lock().unwrap().len(), before);
}

#[test]
fn a_server_that_is_down_slow_or_refuses_does_not_stop_or_delay_a_run() {
    let folder = prepared();
    let folder = folder.path();
    run(folder, &[], &[]).expect(0);
    let told = |url: &str| {
        let start = Instant::now();
        let ran = run(folder, &[], &[("OPENLINEAGE_URL", url), ("OPENLINEAGE_API_KEY", SECRET)]).expect(0);
        assert_eq!(ran.summary()["status"], "nothing_to_do");
        assert_eq!(ran.stderr.matches("a lineage event was not taken").count(), 2, "{}", ran.stderr);
        assert!(!ran.stderr.contains(SECRET), "{}", ran.stderr);
        (start.elapsed(), ran.stderr)
    };
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let (took, said) = told(&format!("http://user:passw0rd@127.0.0.1:{port}"));
    assert!(took < Duration::from_secs(5) && !said.contains("passw0rd"), "{took:?}: {said}");
    let (_, said) = told(&Collector::start("403 Forbidden", Duration::ZERO).url);
    assert!(said.contains("403 Forbidden"), "{said}");
    let (took, said) = told(&Collector::start("201 Created", Duration::from_mins(1)).url);
    assert!(took < Duration::from_secs(15) && said.contains("no answer within 3.0 s"), "{took:?}: {said}");
    let said = run(folder, &[], &[("OPENLINEAGE_URL", "no url")]).expect(0).stderr;
    assert!(said.contains("OPENLINEAGE_URL"), "{said}");
}

#[test]
fn events_go_to_a_file_where_the_environment_says_so() {
    let folder = prepared();
    let folder = folder.path();
    let variables = [
        ("OPENLINEAGE__TRANSPORT__TYPE", "file"),
        ("OPENLINEAGE__TRANSPORT__LOG_FILE_PATH", "told.ndjson"),
        ("OPENLINEAGE__TRANSPORT__APPEND", "true"),
    ];
    for _ in 0..2 {
        run(folder, &[], &variables).expect(0);
    }
    let events = read(folder, &std::fs::read_to_string(folder.join("told.ndjson")).unwrap());
    assert_eq!(told(&events).iter().map(|(kind, ..)| *kind).collect::<Vec<_>>(), ["START", "COMPLETE"].repeat(2));

    // A file for each event, and a run on pictures without a pipeline file.
    let pictures = folder.join("pictures");
    for seed in 1..9 {
        std::fs::create_dir_all(&pictures).unwrap();
        #[expect(clippy::disallowed_methods, reason = "a test writes its own files")]
        std::fs::write(pictures.join(format!("{seed}.png")), crate::support::picture(seed)).unwrap();
    }
    let mut command = command(folder, &["run", "--images", "pictures", "--out", "looked"]);
    command.envs([variables[0], ("OPENLINEAGE__TRANSPORT__LOG_FILE_PATH", "each")]);
    Ran::from(command.output().unwrap()).expect(0);
    let files = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let mut files: Vec<_> =
        files.filter(|path| path.file_name().unwrap().to_str().unwrap().starts_with("each-")).collect();
    files.sort();
    let lines: String = files.iter().map(|path| std::fs::read_to_string(path).unwrap()).collect();
    let events = read(folder, &lines);
    assert_eq!(
        told(&events).iter().map(|(kind, _, job)| (*kind, *job)).collect::<Vec<_>>(),
        [("START", "images"), ("COMPLETE", "images")]
    );
    assert_eq!(names(&datasets(&events[1], "input")), ["pictures", "model"]);
}

#[test]
fn a_run_that_is_told_to_stop_is_told_as_stopped() {
    let folder = prepared();
    let folder = folder.path();
    let server = Collector::start("201 Created", Duration::ZERO);
    let ids: Vec<String> = (0..20_000).map(|number| format!("row{number}")).collect();
    let rows: Vec<(&str, i64)> = ids.iter().zip(1..).map(|(id, seed)| (id.as_str(), seed)).collect();
    image_table(&folder.join("images/ds=2026-11-22/cells.parquet"), &rows);
    let child = command(folder, &["run", "cells.toml"]).env("OPENLINEAGE_URL", &server.url).spawn().unwrap();
    let begun = Instant::now();
    while server.taken.lock().unwrap().is_empty() {
        assert!(begun.elapsed() < Duration::from_mins(1), "the run never began");
        std::thread::sleep(Duration::from_millis(5));
    }
    let stopped = Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap();
    assert!(stopped.success());
    let ran = Ran::from(child.wait_with_output().unwrap());
    assert_eq!(ran.code, 143);
    let events = server.events(folder);
    assert_eq!(told(&events).iter().map(|(kind, ..)| *kind).collect::<Vec<_>>(), ["START", "ABORT"]);
}

#[test]
fn the_processes_of_a_plan_tell_of_one_run() {
    let folder = prepared();
    let folder = folder.path();
    let server = Collector::start("201 Created", Duration::ZERO);
    let call = |args: &[&str]| -> Ran {
        let mut command: Command = command(folder, args);
        command.env("OPENLINEAGE_URL", &server.url).output().unwrap().into()
    };
    call(&["plan", "cells.toml", "--plan", "plan"]).expect(0);
    for (step, stage) in [
        (&["embed"][..], "embed"),
        (&["neighbors", "--step", "sort"], "sort"),
        (&["neighbors", "--step", "join"], "neighbors"),
        (&["flag"], "flag"),
    ] {
        // One that comes too early says so to whoever started it, and ends no run.
        call(&["commit", "--plan", "plan", "--stage", "flag"]).expect(5);
        call(&[step, &["--plan", "plan"]].concat()).expect(0);
        call(&["commit", "--plan", "plan", "--stage", stage]).expect(0);
    }
    let events = server.events(folder);
    let [("START", id, "cells"), ("COMPLETE", same, "cells")] = told(&events)[..] else { panic!("{events:#?}") };
    assert_eq!(id, same);
    let written = datasets(&events[1], "output");
    assert_eq!(names(&written), ["latents", "neighbors", "groups", "anomalies", "runs"]);
    assert_eq!(written[0].1, Some(10));
}
