use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use crate::days::{Days, Tables, assert_same};
use crate::http::Message;
use crate::proxy::{Fate, Proxy};
use crate::servers::s3;
use crate::support::{Ran, Random, write};

/// Requests of a run after which its credentials expire, or its network goes: so many moments of it are tried.
const EXPIRIES: usize = 32;
const OUTAGES: usize = 3;

/// Runs over a network that loses requests, and the share of requests that it loses.
const BAD_NETWORKS: u64 = 6;
const LOSSES: f64 = 0.1;

/// What S3 answers when it does not like the credentials, and a word of our hint.
const REFUSALS: [(&str, &str, &str); 4] = [
    (
        "400 Bad Request",
        "<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>",
        "renew",
    ),
    ("403 Forbidden", "<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>", "may read and write"),
    ("400 Bad Request", "<Error><Code>TokenRefreshRequired</Code><Message>refresh</Message></Error>", "renew"),
    ("403 Forbidden", "<Error><Code>InvalidAccessKeyId</Code><Message>unknown</Message></Error>", "may read and write"),
];

/// Runs the pipeline that publishes `out` through a proxy.
fn run_through(proxy: &Proxy, days: &Days, out: &str) -> Ran {
    let file = days.pipeline_to(out);
    days.bucket.through(proxy.port).lookalike(days.folder(), &["run", &file])
}

/// Requests that an undisturbed run makes.
pub(crate) fn count_requests(days: &Days) -> usize {
    let requests = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&requests);
    let proxy = Proxy::start(days.bucket.port, move |_| {
        counted.fetch_add(1, Ordering::SeqCst);
        Fate::Passes
    });
    run_through(&proxy, days, "counted").expect(0);
    requests.load(Ordering::SeqCst)
}

/// Does `check` with every number below `count`, two at a time.
pub(crate) fn two_at_a_time(count: usize, check: impl Fn(usize) + Sync) {
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::SeqCst);
                    if number >= count {
                        break;
                    }
                    check(number);
                }
            });
        }
    });
}

/// Whether a request puts a version of the `runs` table, with which a run is complete.
fn completes_the_run(request: &Message) -> bool {
    request.method() == "PUT" && request.line.contains("/runs/_delta_log/") && !request.line.contains("0000.json")
}

#[test]
fn credentials_that_expire_or_are_refused_end_a_run_with_a_hint_and_new_ones_finish_it() {
    let days = Days::new(s3(), "expired");
    let expected = days.undisturbed();
    let requests = count_requests(&days);
    println!("{requests} requests");
    two_at_a_time(EXPIRIES, |number| {
        let (status, body, hint) = REFUSALS[number % REFUSALS.len()];
        let is_complete = Arc::new(AtomicBool::new(false));
        let (mut left, complete) = (number * requests / EXPIRIES, Arc::clone(&is_complete));
        let proxy = Proxy::start(days.bucket.port, move |request| {
            if left == 0 {
                return Fate::Answered(status, body);
            }
            left -= 1;
            complete.fetch_or(completes_the_run(request), Ordering::SeqCst);
            Fate::Passes
        });
        let out = format!("out{number}");
        let ran = run_through(&proxy, &days, &out);
        // What comes after the last commit does no harm if it fails.
        if !(ran.code == 0 && is_complete.load(Ordering::SeqCst)) {
            let ran = ran.expect(6);
            assert!(ran.stderr.contains("s3://lake/expired") && ran.stderr.contains(hint), "{number}: {}", ran.stderr);
        }
        days.finish(&out, &expected);
    });
}

#[test]
fn a_lost_network_ends_a_run_as_transient_and_when_it_is_back_the_next_run_finishes() {
    let days = Days::new(s3(), "outage");
    let expected = days.undisturbed();
    let requests = count_requests(&days);
    // All at once, for they do nothing but wait.
    std::thread::scope(|scope| {
        for number in 0..OUTAGES {
            let (days, expected) = (&days, &expected);
            scope.spawn(move || {
                let mut left = (2 * number + 1) * requests / (2 * OUTAGES);
                let proxy = Proxy::start(days.bucket.port, move |_| {
                    left = left.saturating_sub(1);
                    if left == 0 { Fate::NetworkLost } else { Fate::Passes }
                });
                let out = format!("out{number}");
                let ran = run_through(&proxy, days, &out).expect(5);
                assert!(ran.stderr.contains("s3://lake/outage"), "{}", ran.stderr);
                proxy.restored();
                run_over(&proxy, days, &out, expected);
            });
        }
    });
}

/// The run after one that failed, over the same network, which is good now.
fn run_over(proxy: &Proxy, days: &Days, out: &str, expected: &Tables) {
    let receipted = days.receipted_rows(out);
    let summary = run_through(proxy, days, out).expect(0).summary();
    assert_eq!(summary["rows_embedded"].as_u64(), Some((crate::days::ROWS - receipted) as u64), "{summary}");
    assert_same(&days.tables(out), expected, out);
}

#[test]
fn a_run_survives_a_network_that_loses_every_tenth_request_or_its_answer() {
    let days = Days::new(s3(), "losses");
    let expected = days.undisturbed();
    let lost = Arc::new(AtomicUsize::new(0));
    two_at_a_time(usize::try_from(BAD_NETWORKS).unwrap(), |number| {
        let mut random = Random::new(number as u64);
        let counted = Arc::clone(&lost);
        let proxy = Proxy::start(days.bucket.port, move |_| {
            if random.fraction() >= LOSSES {
                return Fate::Passes;
            }
            counted.fetch_add(1, Ordering::SeqCst);
            match random.fraction() {
                0.0..0.33 => Fate::LostBefore,
                0.33..0.67 => Fate::LostAfter,
                _ => Fate::LostWithin,
            }
        });
        let out = format!("out{number}");
        let summary = run_through(&proxy, &days, &out).expect(0).summary();
        assert_eq!(summary["status"], "committed", "{summary}");
        assert_same(&days.tables(&out), &expected, &out);
    });
    println!("{} requests or answers were lost in {BAD_NETWORKS} runs", lost.load(Ordering::SeqCst));
}

#[test]
fn a_machine_without_credentials_is_told_so() {
    let folder = crate::support::folder();
    // Nothing listens there, as on a machine outside of the cloud.
    let pipeline = "[pipeline]\nname = \"p\"\n[source]\ntable = \"s3://lake/images/x.parquet\"\n[model]\npackage = \"m\"\n[output]\ntable = \"out\"\n";
    write(&folder.path().join("p.toml"), pipeline);
    let mut command = crate::support::command(folder.path(), &["fit", "p.toml"]);
    for (name, _) in s3().variables {
        command.env_remove(name);
    }
    let ran: Ran = command.env("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9/").output().unwrap().into();
    let ran = ran.expect(6);
    assert!(ran.stderr.contains("there are no credentials"), "{}", ran.stderr);
}
