//! What is freed goes back to the system.
//!
//! The allocator of glibc keeps what a thread frees for the next request of that thread, up to 32 MiB at a time, and input and output are
//! done by many threads: a search that streams a table through a fixed number of buffers was seen to hold twice what it uses. A
//! limit on memory is a limit on what the system gives, so buffers above 128 KiB are taken from the system one by one instead.
//!
//! Smaller ones lie in arenas, of which it has up to eight a core. What one thread takes and another one gives back leaves holes there, in
//! each of them others: a pass over 40,000 images was seen to grow from 180 to 480 MiB, and stays at 210 with one arena.
#![expect(unsafe_code, reason = "settings are calls into the C library, which take two integers and no pointer")]

/// Buffers from this size on are returned to the system when they are freed. Smaller ones are not worth a request to it.
#[cfg(target_env = "gnu")]
const LARGE_BYTES: libc::c_int = 128 << 10;

/// Arenas. Threads keep what is smallest to themselves, so they meet here seldom.
#[cfg(target_env = "gnu")]
const ARENAS: libc::c_int = 1;

/// Sets this up for the process. Other C libraries than glibc need no setting: theirs returns what is freed, or has no such thing.
pub fn return_what_is_freed() {
    #[cfg(target_env = "gnu")]
    for (setting, value) in [(libc::M_MMAP_THRESHOLD, LARGE_BYTES), (libc::M_ARENA_MAX, ARENAS)] {
        // SAFETY: mallopt may be called at any time, from any thread, and keeps no reference to anything.
        if unsafe { libc::mallopt(setting, value) } != 1 {
            tracing::debug!("the C library does not take a setting; memory that is freed may stay with the process");
        }
    }
}
