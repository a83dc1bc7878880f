//! What is freed goes back to the system.
//!
//! The allocator of glibc keeps what a thread frees for the next request of that thread, up to 32 MiB at a time, and input and output are
//! done by many threads: a search that streams a table through a fixed number of buffers was seen to hold twice what it uses. A
//! limit on memory is a limit on what the system gives, so buffers above 256 KiB are taken from the system one by one instead.
#![expect(unsafe_code, reason = "the setting is one call into the C library, which takes two integers and no pointer")]

/// Buffers from this size on are returned to the system when they are freed. Smaller ones are not worth a request to it.
#[cfg(target_env = "gnu")]
const LARGE_BYTES: libc::c_int = 256 << 10;

/// Sets this up for the process. Other C libraries than glibc need no setting: theirs returns what is freed, or has no such thing.
pub fn return_what_is_freed() {
    #[cfg(target_env = "gnu")]
    // SAFETY: mallopt may be called at any time, from any thread, and keeps no reference to anything.
    let is_set = unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE_BYTES) } == 1;
    #[cfg(target_env = "gnu")]
    if !is_set {
        tracing::debug!("the C library does not take the setting; memory that is freed may stay with the process");
    }
}
