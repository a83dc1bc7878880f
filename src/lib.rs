//! `lookalike`: which pictures look alike, and which look like nothing seen before?
//!
//! A batch job. It reads a table of images, or of feature vectors, runs an exported model over them, and publishes tables that a warehouse can
//! query:
//!
//! ```text
//! source table ──► embed ──► latents ──► neighbors ──► neighbors ──► groups ──► groups
//!                                   └──► flag ───────► anomalies ──► runs
//! ```
//!
//! # Reading order
//! The modules in the order in which the data meets them:
//!
//! 1. [`cli`] and [`commands`]: what can be typed. [`config`]: the pipeline file, as written and as resolved. [`context`]: what a
//!    process has one of. [`stop`]: signals.
//! 2. [`store`]: object stores. [`parquet_file`]: Parquet in them. [`source`]: the table of images, its partitions and work units, read ahead.
//! 3. [`decode`]: image bytes to pixels, as Pillow does it. [`features`]: rows that are numbers already.
//! 4. [`model`]: the model package, its contract and golden images, ONNX Runtime; [`model::ppca`]: the model we fit ourselves.
//! 5. [`score`]: reconstruction errors, KL divergence, ELBO. [`pixel_stats`]: brightness, contrast, sharpness. [`pass`]: the workers that take images from bytes to scores.
//! 6. [`neighbors`]: the exact join, and the search by cells. [`corpus`]: the vectors of a table, streamed to them. [`groups`]: near-duplicates, and who represents them. [`normal`]: scores that compare an image with others. [`reference`](mod@reference): rows taken as normal. [`flag`]: thresholds, p-values, what they promise. [`drift`]: whether a partition is like its reference. [`sample`], [`random`]: chance that comes out the same every time.
//! 7. [`schema`] and [`table`]: the published tables, receipts and commits. [`stages`]: what reads which table and writes which. [`tasks`]: the same on many machines.
//! 8. [`report`] and [`explanation`]: what people want to know afterwards, of a run and of an image. [`export`]: what other tools want.
//!    [`evaluation`]: how good scores are where the truth is known.
//!    [`picture`] and [`quality`]: pictures that we make, and how near they are to others. [`error`]: exit codes. [`hash`]: fingerprints.
//!    [`metrics`]: what an operator alerts on. [`lineage`]: what other systems want to know of where tables come from. [`redact`]: what no output may tell. [`memory`]: what is freed is given back.
//!
//! # What always holds
//! - **A row in is a row out.** Every source row gives one row in `latents`, with a status; checked before each commit.
//! - **Keys travel with vectors**, in the same file. Nothing is joined by position.
//! - **Invisible until committed.** Readers see a partition's old rows or its new ones.
//! - **Run twice = run once.** Rows carry a run id, a fingerprint of everything they depend on; rows that are live are not made again,
//!   and the same inputs give the same rows in the same order whatever the number of workers.
//! - **Nothing lost, nothing twice**, whatever fails, is killed or races; how is said below.
//! - **No silent fallback.** Asked for CUDA: CUDA or an error, also where it would leave some of the work to the CPU. A model whose
//!   golden images do not replay: an error.
//! - **Scores are deterministic**: from `mu`, or from samples that are drawn by the row's key.
//! - **Memory is set by the configuration, not by the table**: of the images, a bounded number of batches and of bytes is under way, and files are
//!   read in blocks, however large their row groups are. Neighbors are searched within `execution.memory_limit`, whatever the number of
//!   vectors. Ids are held: they count, and a limit too small for them is an error before anything is searched.
//! - Only a model package knows about its model.
//! - **No output tells a secret**: all text that leaves the process passes through [`redact`].
//!
//! # How nothing is lost
//! Below the output prefix lie the tables and a folder `_lookalike` of what runs tell each other. Every store can put an object where
//! there is none and refuse where there is one; nothing here needs more of a store than that.
//!
//! 1. A partition of the source is cut into units, by its files alone. A unit's rows go to a data file whose name carries the run id and
//!    an attempt of its own; then a *receipt* that names the file is put if absent ([`table::Receipts`]). The first receipt counts,
//!    whoever handed it in. A run does the units without receipts.
//! 2. When all receipts of a partition are there, rows and ids are counted, and one entry of the table's log makes their files the whole
//!    content of the partition ([`table::Table`]). Where another entry came first, the newest version is read and the change decided
//!    anew: rows of this run id are live, so there is nothing to do; or they are not, so all that is there is replaced.
//! 3. Stages that read all of `latents` look again when they have published ([`stages::Job::settle`]), and that of the groups looks at the
//!    neighbors too; of two runs that raced, the one that publishes last looks last. `runs` comes at the end and speaks only of rows that are live.
//! 4. A lost answer is a question, not a failure: the log, the receipt or the row of `runs` is read, and tells whether it was ours.
//! 5. What nobody names any more is taken away by `vacuum` alone, and not while a run shows a sign of life ([`table::Presence`]).
//!
//! Lists of neighbors depend on every row that was searched, and mostly stay as they are when rows are added. Below `_lookalike/searched` lies
//! which runs' lists are right for which latents; the next run compares what has changed since with everything, and everything else
//! with that alone. Below `_lookalike/cells` lie the centroids of tables that are searched by cells. Both can be lost: without them a run
//! searches, or trains, anew.
//!
//! Rows can be made again on demand, by the same fingerprint: they are a *revision*, and the run id has its number at the end. So a later
//! run still finds them up to date, while neighbors and flags notice that they are others.
//!
//! # On many machines
//! A run can be written down as a plan, and done by tasks that share nothing but the store ([`tasks`]). The stages are the same code: a
//! task is given its share of the units, a commit none, and `run` is all of it in one process. Neighbors by cells travel between tasks
//! ([`stages::neighbors::shares`]), since no task holds all vectors; the kernel that compares, and with it each list, is that of one machine.
//!
//! # Words that mean one thing
//! *features*: numbers of a list column, in the place of an image and in its column. *decode*: image bytes to pixels. *encode*: pixels to latents. *reconstruct*: the model's decoder. *batch*: images in one inference
//! call. *run*: one execution. *run id*: the fingerprint of a partition's rows in one table, whichever execution wrote them. *partition*:
//! a hive folder of a table. *unit*: a resumable slice of a partition. *task*: a process that does a share of a step. *bucket*: cells that one task searches. *left over*: written and named by nobody. *anomaly score*: higher =
//! stranger. *distance*: smaller = nearer. *provider*: what computes for ONNX Runtime. *store*: an object store.

mod caught;
pub mod cli;
pub mod commands;
pub mod config;
pub mod context;
pub mod corpus;
pub mod decode;
pub mod drift;
pub mod error;
pub mod evaluation;
pub mod explanation;
pub mod export;
pub mod features;
pub mod flag;
pub mod groups;
pub mod hash;
pub mod lineage;
pub mod memory;
pub mod metrics;
pub mod model;
pub mod neighbors;
pub mod normal;
pub mod parquet_file;
pub mod pass;
pub mod picture;
pub mod pixel_stats;
pub mod quality;
pub mod random;
pub mod redact;
pub mod reference;
pub mod report;
pub mod sample;
pub mod schema;
pub mod score;
pub mod source;
pub mod stages;
pub mod stop;
pub mod store;
pub mod table;
pub mod tasks;
