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

/// Partitions taken up by name, by date, again, or only where something is missing.
mod anomalies;
mod backfill;
/// Secrets in the environment and in image locations, on real servers: they are nowhere in what is said and written.
mod canary;
/// What `check` finds fit, and each thing that it finds unfit.
mod check;
/// What is typed and what comes back: help, versions, exit codes.
mod command_line;
/// Two images, or several, compared: in one store or in two, with a table's neighbors as the yardstick or without.
mod compare;
/// Two tables compared.
mod compare_tables;
/// A small source of six days in a store, and what is published of it.
mod days;
/// Partitions that are like the reference, and partitions that are not any more.
mod drift;
/// An encoder, which gives vectors and no scores, and pipelines without some of the stages.
mod encoder;
mod engines;
/// Every operation on a store fails once, before and after it was done: nothing is lost, nothing is there twice.
mod every_operation;
/// The exit codes, each provoked from outside.
mod exit_codes;
/// What was published, in the forms of other tools.
mod export;
/// Networks of other makers, exported by the module for it.
mod exporter;
/// The same neighbors as FAISS.
mod faiss;
mod fault_store;
/// Vectors and tensors in the place of pictures.
mod features;
/// Networks of other programs, and models that are wrong.
mod foreign;
/// A disk that is full, and then has room again.
mod full_disk;
mod google;
/// Near-duplicates, and who represents them.
mod groups;
/// Images that are broken, odd or hostile: each a row with its status.
mod hard_images;
/// Bytes made to do harm: bombs, tampered model packages, and the seeds of the fuzz targets.
mod hostile_input;
mod http;
/// Runs that are killed, and what the next one makes of it.
mod kills;
/// What a server of lineage is told of runs.
mod lineage;
/// The metrics file, read by the parsers of those who collect it.
mod metrics;
/// Copies of real pictures, planted and found again.
mod near_duplicates;
/// Lists patched, searched in little memory, by cells, and in other tables.
mod neighbors;
/// Networks that fail, and credentials that do.
mod network;
/// The journey through real S3 and Azure servers.
mod object_store;
/// Partitions that come, change, empty and go; attempts that fail, race and are repeated.
mod partitions;
/// Pictures that the model makes: of samples, of codes, and beside an image that is explained.
mod pictures;
/// Tables for those without a Delta reader.
mod plain_parquet;
mod proxy;
/// Processes that work on the same tables at once, and readers meanwhile.
mod races;
/// The page about a run: its numbers by another program, and its use in a browser.
mod report;
/// The same rows whatever the number of workers, the batch size, or the attempt.
mod same_rows;
/// No output tells a secret: errors, logs, usage, panics, tables.
mod secrets;
mod servers;
/// The whole journey on photographs of solar cells, checked by independent programs.
mod solar_cells;
/// The same images in every shape a source can have.
mod source_shapes;
/// The queries of `sql/`, in the engines that run here and by the grammar of the others.
mod sql;
mod support;
mod tasks;
/// What is shown on a terminal, and what elsewhere.
mod terminal;
/// What runs leave behind, and how it goes.
mod vacuum;
/// What `pip install` and `docker build` make of a checkout.
mod wheel;
