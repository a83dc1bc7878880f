//! What a run published, row by row, for tools that have a form of their own.
//!
//! [`Rows`] reads `latents` once, in the order of its data files, by partition and then by name, and puts beside each row what the other tables
//! say of it. So files that belong together by the place of their rows come of one pass, and a row's number is its place in it, from
//! zero. Rows without a vector are left out.
//!
//! Memory: the ids of all rows and twenty bytes for each, and of one partition at a time 32 bytes a row for the groups. Vectors, flags
//! and lists of neighbors are read as they are needed.

mod files;
mod rows;

pub use files::{ArrayFile, Upload};
pub use rows::{Rows, column, vectors};
