//! What is freed goes back to the system.
//!
//! The allocator of glibc keeps what a thread frees for the next request of that thread, up to 32 MiB at a time, in up to eight arenas a core,
//! and input and output are done by many threads. What one takes and another one gives back leaves holes, in each arena others: a pass over
//! 40,000 images was seen to grow from 150 to 500 MiB, and stays below 180 with these settings; a search that streams a table through a
//! fixed number of buffers held twice what it uses. A limit on memory is a limit on what the system gives.
#![expect(unsafe_code, reason = "calls into the C library, which take integers and no pointer")]

/// Buffers from this size on are taken from the system one by one, and returned to it when they are freed. Smaller ones are not worth a
/// request to it.
pub(crate) const LARGE_BYTES: usize = 512 << 10;

/// Bytes at the end of an arena that stay with the process when they are free. By default it is 128 KiB, and every image that is decoded gives
/// back what the next one asks for again, which stops the other threads each time.
#[cfg(target_env = "gnu")]
const KEPT_BYTES: libc::c_int = 16 << 20;

/// Arenas. Threads keep what is smallest to themselves, so they meet here seldom.
#[cfg(target_env = "gnu")]
const ARENAS: libc::c_int = 1;

/// Sets this up for the process, before its first thread. Other C libraries than glibc need no setting: theirs returns what is freed, or has
/// no such thing.
pub fn return_what_is_freed() {
    #[cfg(target_env = "gnu")]
    for (setting, value) in [
        (libc::M_MMAP_THRESHOLD, libc::c_int::try_from(LARGE_BYTES).unwrap_or(libc::c_int::MAX)),
        (libc::M_TRIM_THRESHOLD, KEPT_BYTES),
        (libc::M_ARENA_MAX, ARENAS),
    ] {
        // SAFETY: mallopt may be called at any time, from any thread, and keeps no reference to anything.
        // One that it does not take is one that it does without.
        let _ = unsafe { libc::mallopt(setting, value) };
    }
}

/// Returns what is free between what is in use: the allocator does so at the end of an arena alone.
pub(crate) fn return_holes() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim may be called at any time, from any thread.
    let _ = unsafe { libc::malloc_trim(0) };
}
