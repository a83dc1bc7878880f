use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc::sync_channel;
use std::time::{Duration, Instant};

use crate::days::{Days, Tables};
use crate::proxy::{Fate, Proxy};
use crate::servers::s3;
use crate::support::{Ran, folder, image_table, lookalike, write};

/// How long a run may take to end after a signal.
const SIGNAL_TIMEOUT: Duration = Duration::from_secs(10);

/// Moments of a run at which it gets a signal, and the one at which the store does not answer any more.
const SIGNALS: usize = 8;
const HELD: usize = 3;

const PIPELINE: &str = "[pipeline]\nname = \"p\"\n[source]\ntable = \"images\"\n[model]\npackage = \"model\"\n[neighbors]\nk = 3\n\
                        [output]\ntable = \"out\"\n";

/// A small source with one broken image in six, and a model fitted to it.
fn one_table() -> tempfile::TempDir {
    let folder = folder();
    write(&folder.path().join("p.toml"), PIPELINE);
    let rows = [("a", 1), ("b", 2), ("c", 3), ("d", 4), ("e", 5), ("f", -1)];
    image_table(&folder.path().join("images/x.parquet"), &rows[..5]);
    lookalike(folder.path(), &["fit", "p.toml", "--latent-dim", "2", "--height", "8", "--width", "8"]).expect(0);
    image_table(&folder.path().join("images/x.parquet"), &rows);
    write(&folder.path().join("p.toml"), &format!("{PIPELINE}[limits]\nmax_rejected_fraction = 0.5\n"));
    folder
}

fn run(folder: &Path, args: &[&str]) -> Ran {
    lookalike(folder, &[&["run", "p.toml"], args].concat())
}

#[test]
fn code_0_is_committed_or_nothing_to_do_and_99_is_nothing_to_do_where_that_is_asked_for() {
    let folder = one_table();
    assert_eq!(run(folder.path(), &["--skip-exit-code"]).expect(0).summary()["status"], "committed");
    assert_eq!(run(folder.path(), &[]).expect(0).summary()["status"], "nothing_to_do");
    assert_eq!(run(folder.path(), &["--skip-exit-code"]).expect(99).summary()["status"], "nothing_to_do");
}

#[test]
fn code_1_is_what_should_not_happen() {
    let folder = one_table();
    run(folder.path(), &[]).expect(0);
    let log = folder.path().join("out/latents/_delta_log/00000000000000000001.json");
    write(&log, "no log");
    let ran = run(folder.path(), &[]).expect(1);
    assert!(ran.stderr.contains("out/latents"), "{}", ran.stderr);
}

#[test]
fn code_2_is_a_pipeline_file_or_command_line_that_is_wrong() {
    let folder = one_table();
    write(&folder.path().join("wrong.toml"), &PIPELINE.replace("k = 3", "q = 3"));
    lookalike(folder.path(), &["run", "wrong.toml"]).expect(2);
    lookalike(folder.path(), &["run", "none.toml"]).expect(2);
    run(folder.path(), &["--sideways"]).expect(2);
}

#[test]
fn code_3_is_committed_with_more_rejects_than_allowed() {
    let folder = one_table();
    write(&folder.path().join("p.toml"), PIPELINE);
    let ran = run(folder.path(), &[]).expect(3);
    assert_eq!(ran.summary()["status"], "committed");
}

#[test]
fn code_4_is_data_or_a_model_that_is_not_as_agreed() {
    let folder = one_table();
    image_table(&folder.path().join("images/x.parquet"), &[("a", 1), ("a", 2), ("b", 3)]);
    run(folder.path(), &[]).expect(4);
    run(folder.path(), &["--model", "images"]).expect(4);
}

#[test]
fn code_5_is_a_store_in_the_way() {
    let folder = folder();
    write(&folder.path().join("p.toml"), &PIPELINE.replace("\"images\"", "\"s3://lake/images\""));
    // An answer that is no refusal, and that the client does not ask for again.
    let busy = "<Error><Code>RequestTimeout</Code><Message>idle for too long</Message></Error>";
    let proxy = Proxy::start(s3().port, move |_| Fate::Answered("400 Bad Request", busy));
    let ran = s3().through(proxy.port).lookalike(folder.path(), &["fit", "p.toml"]).expect(5);
    assert!(ran.stderr.contains("s3://lake/images"), "{}", ran.stderr);
}

#[test]
fn code_6_is_something_missing_on_this_machine() {
    let folder = one_table();
    let missing = folder.path().join("libonnxruntime.so");
    let ran = lookalike(folder.path(), &["--onnxruntime", missing.to_str().unwrap(), "run", "p.toml"]).expect(6);
    assert!(ran.stderr.contains("libonnxruntime.so"), "{}", ran.stderr);
}

/// Sends a run a signal at a moment of its, and waits for its end.
fn signaled(days: &Days, out: &str, signal: &str, after_requests: usize, fate: Fate) -> Ran {
    let (reached, moment) = sync_channel(1);
    let mut left = after_requests;
    let proxy = Proxy::start(days.bucket.port, move |_| {
        if left > 0 {
            left -= 1;
            return Fate::Passes;
        }
        reached.try_send(()).ok();
        fate
    });
    let file = days.pipeline_to(out);
    let mut run = days.bucket.through(proxy.port).command(days.folder(), &["run", &file]);
    let mut run = run.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    moment.recv_timeout(Duration::from_mins(1)).unwrap();
    let kill = format!("kill -{signal} {}", run.id());
    assert!(Command::new("sh").args(["-c", &kill]).status().unwrap().success());
    let deadline = Instant::now() + SIGNAL_TIMEOUT;
    while run.try_wait().unwrap().is_none() {
        assert!(Instant::now() < deadline, "{out} did not end within {SIGNAL_TIMEOUT:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
    run.wait_with_output().unwrap().into()
}

/// Requests of a run, by which its moments are chosen.
fn moments(days: &Days) -> impl Iterator<Item = usize> + use<> {
    let requests = crate::network::count_requests(days);
    (0..SIGNALS).map(move |number| (2 * number + 1) * requests / (2 * SIGNALS))
}

fn ends_and_goes_on(days: &Days, expected: &Tables, signal: &str, code: i32) {
    for (number, after) in moments(days).enumerate() {
        let fate = if number == HELD { Fate::Held } else { Fate::Passes };
        let out = format!("{signal}{number}");
        let ran = signaled(days, &out, signal, after, fate);
        // Whoever is done a moment later has ended well.
        if !(ran.code == 0 && fate == Fate::Passes) {
            ran.expect(code);
        }
        days.finish(&out, expected);
    }
}

#[test]
fn code_130_is_an_interrupt_and_143_a_termination_and_the_next_run_goes_on() {
    let days = Days::new(s3(), "signals");
    let expected = days.undisturbed();
    ends_and_goes_on(&days, &expected, "INT", 130);
    ends_and_goes_on(&days, &expected, "TERM", 143);
}
