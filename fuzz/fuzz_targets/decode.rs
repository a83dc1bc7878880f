//! See `entry::image`.

#![no_main]

#[allow(dead_code, reason = "each target calls one of the functions")]
#[path = "../entry.rs"]
mod entry;

libfuzzer_sys::fuzz_target!(
    init: {
        // libFuzzer ends the process at every panic. One within a decoder is caught and becomes the status of a row; what is not
        // caught still ends the process.
        std::panic::set_hook(Box::new(|panic| eprintln!("{panic}")));
    },
    |data: &[u8]| entry::image(data)
);
