//! The program from outside: real images, real models, real tables, read back by other people's readers.
//!
//! `make test` prepares what these tests need and names it in the environment; a test that misses it fails.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::cast_possible_truncation,
    clippy::case_sensitive_file_extension_comparisons,
    reason = "a test that goes wrong panics, and shows its figures"
)]

/// What is typed and what comes back: help, versions, exit codes.
mod command_line;
/// Images that are broken, odd or hostile: each a row with its status.
mod hard_images;
/// The journey through a real S3 server.
mod object_store;
/// Partitions that come, change, empty and go; attempts that fail, race and are repeated.
mod partitions;
/// The same rows whatever the number of workers, the batch size, or the attempt.
mod same_rows;
/// The whole journey on photographs of solar cells, checked by independent programs.
mod solar_cells;
/// The same images in every shape a source can have.
mod source_shapes;
mod support;
