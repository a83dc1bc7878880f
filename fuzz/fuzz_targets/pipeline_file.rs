//! See `entry::pipeline_file`.

#![no_main]

#[allow(dead_code, reason = "each target calls one of the functions")]
#[path = "../entry.rs"]
mod entry;

libfuzzer_sys::fuzz_target!(|data: &[u8]| entry::pipeline_file(data));
