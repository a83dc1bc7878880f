//! Nearest neighbors: vectors in, lists of the nearest rows out. The mathematics alone; tables are read and written by
//! [`crate::stages::neighbors`].

pub mod cells;
pub mod exact;
pub mod topk;
