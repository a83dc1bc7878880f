//! `lookalike`: which pictures look alike, and which look like nothing seen before?
//!
//! A batch job. It reads a table of images, runs an exported model over them, and publishes tables that a warehouse can query:
//!
//! ```text
//! source table ──► embed ──► latents ──► neighbors ──► neighbors
//!                                   └──► flag ───────► anomalies ──► runs
//! ```
//!
//! # Reading order
//! The modules in the order in which the data meets them:
//!
//! 1. [`cli`] and [`commands`]: what can be typed. [`config`]: the pipeline file, as written and as resolved. [`context`]: what a
//!    process has one of.
//! 2. [`store`]: object stores. [`parquet_file`]: Parquet in them. [`source`]: the table of images, its partitions and work units.
//! 3. [`decode`]: image bytes to pixels, as Pillow does it.
//! 4. [`model`]: the model package, its contract and golden images, ONNX Runtime; [`model::ppca`]: the model we fit ourselves.
//! 5. [`score`]: reconstruction errors, KL divergence, ELBO. [`pass`]: the workers that take images from bytes to scores.
//! 6. [`neighbors`]: the exact join. [`flag`]: references, thresholds, p-values.
//! 7. [`schema`] and [`table`]: the published tables, receipts and commits. [`stages`]: what reads which table and writes which.
//! 8. [`report`]: what people want to know afterwards. [`error`]: exit codes. [`hash`]: fingerprints.
//!
//! # What always holds
//! - **A row in is a row out.** Every source row gives one row in `latents`, with a status; checked before each commit.
//! - **Keys travel with vectors**, in the same file. Nothing is joined by position.
//! - **Invisible until committed.** Readers see a partition's old rows or its new ones.
//! - **Run twice = run once.** Rows carry a run id, a fingerprint of everything they depend on; rows that are live are not made again,
//!   and the same inputs give the same rows in the same order whatever the number of workers.
//! - **No silent fallback.** Asked for CUDA: CUDA or an error. A model whose golden images do not replay: an error.
//! - **Scores are deterministic**: from `mu`, never from a sample.
//! - Only a model package knows about its model.
//!
//! # Words that mean one thing
//! *decode*: image bytes to pixels. *encode*: pixels to latents. *reconstruct*: the model's decoder. *batch*: images in one inference
//! call. *run*: one execution. *run id*: the fingerprint of a partition's rows in one table, whichever execution wrote them. *partition*: a hive folder of a table. *unit*: a resumable slice of a partition. *anomaly score*:
//! higher = stranger. *distance*: smaller = nearer. *provider*: what computes for ONNX Runtime. *store*: an object store.

pub mod cli;
pub mod commands;
pub mod config;
pub mod context;
pub mod decode;
pub mod error;
pub mod flag;
pub mod hash;
pub mod model;
pub mod neighbors;
pub mod parquet_file;
pub mod pass;
pub mod report;
pub mod schema;
pub mod score;
pub mod source;
pub mod stages;
pub mod store;
pub mod table;
