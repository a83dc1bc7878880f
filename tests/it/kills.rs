use std::collections::BTreeMap;
use std::process::Stdio;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::days::Days;
use crate::network::two_at_a_time;
use crate::servers::s3;
use crate::support::Random;

/// Times that a run is killed.
const KILLS: usize = 100;

/// Decides at which moments.
const SEED: u64 = 20_261_122;

/// How far a run has come, by what lies in its output.
fn progress(days: &Days, out: &str) -> &'static str {
    let objects = days.bucket.list(&format!("{}/{out}", days.prefix));
    let has_commit = |table: &str| {
        let log = format!("/{table}/_delta_log/");
        objects.iter().any(|name| name.contains(&log) && !name.contains("00000000000000000000"))
    };
    let reached = ["runs", "anomalies", "neighbors", "latents"].into_iter().find(|table| has_commit(table));
    match reached {
        Some("runs") => "5 after the last commit",
        Some("anomalies") => "4 with the first flags out",
        Some("neighbors") => "3 with the first neighbors out",
        Some(_) => "2 with the first latents out",
        None if objects.iter().any(|name| name.contains("/receipts/")) => "1 with the first receipt in",
        None => "0 before the first receipt",
    }
}

/// Starts the run that publishes `out`, and kills it after a time unless it has ended by then.
fn killed(days: &Days, out: &str, after: Duration) -> bool {
    let file = days.pipeline_to(out);
    let mut run = days.bucket.command(days.folder(), &["run", &file]);
    let mut run = run.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    std::thread::sleep(after);
    run.kill().unwrap();
    // A process that had ended already has a code.
    run.wait().unwrap().code().is_none()
}

#[test]
fn a_run_killed_at_any_of_100_moments_is_finished_by_the_next_one_which_does_nothing_again() {
    let days = Days::new(s3(), "kills");
    let expected = days.undisturbed();
    // As long as a run takes when another runs beside it.
    let durations = Mutex::new(Vec::new());
    two_at_a_time(4, |number| {
        let start = Instant::now();
        days.run(&format!("timed{number}"), &[]).expect(0);
        durations.lock().unwrap().push(start.elapsed());
    });
    let longest = durations.into_inner().unwrap().into_iter().max().unwrap();
    let random = Mutex::new(Random::new(SEED));
    let reached = Mutex::new(BTreeMap::<_, u32>::new());
    two_at_a_time(KILLS, |number| {
        let mut out = format!("out{number}");
        let moment = || longest.mul_f64(random.lock().unwrap().fraction());
        while !killed(&days, &out, moment()) {
            // It was over before its moment; the next moment has its turn.
            out += "-again";
        }
        *reached.lock().unwrap().entry(progress(&days, &out)).or_default() += 1;
        days.finish(&out, &expected);
    });
    println!("{KILLS} kills within {longest:?}: {:?}", reached.into_inner().unwrap());
}
