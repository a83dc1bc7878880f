//! The verbs of the command line: a file for each, where `run` holds its stages too.

pub mod bench;
pub mod calibrate;
pub mod check;
pub mod compare;
pub mod compare_tables;
pub mod completions;
pub mod evaluate;
pub mod explain;
pub mod export;
pub mod fit;
pub mod generate;
pub mod man;
pub mod model;
pub mod plan;
pub mod reconstruct;
pub mod report;
pub mod run;
pub mod tasks;
pub mod vacuum;

use std::path::Path;

use url::Url;

use crate::config::{Overrides, Pipeline};
use crate::context::Context;
use crate::error::Error;
use crate::source::PartitionValues;
use crate::store::Store;

/// Reads and resolves a pipeline file.
pub fn load_pipeline(context: &Context, file: &Path, overrides: &Overrides) -> Result<Pipeline, Error> {
    let text = std::fs::read_to_string(file)
        .map_err(|source| Error::PipelineFile { file: file.display().to_string(), source })?;
    let path = context.current_dir.join(file);
    let folder = path.parent().unwrap_or(&context.current_dir);
    Ok(Pipeline::load_str_with(&text, &file.display().to_string(), folder, overrides)?)
}

/// The settings of a stage that a pipeline can be without, for a command that is about it; `table` is theirs in the pipeline file.
fn required<'a, T>(settings: Option<&'a T>, table: &str) -> Result<&'a T, Error> {
    settings.ok_or_else(|| Error::Usage {
        message: format!("the pipeline says enabled = false in [{table}], and this command is about that stage"),
        hint: format!("set enabled = true in [{table}]"),
    })
}

/// Opens the folder that an option of the command line names, for files of our own: there must be nothing in it, so that nothing is
/// overwritten and no files of two calls stand side by side.
fn new_folder(context: &Context, option: &str, location: &str) -> Result<Store, Error> {
    let store = context.stores.open(&context.locate(option, location)?)?;
    if context.block_on(store.list(""))?.is_empty() {
        return Ok(store);
    }
    Err(Error::Usage {
        message: format!("there are files at {} already", store.url()),
        hint: format!("name a new folder with {option}"),
    })
}

/// The URL of a file in the folder of a partition below a store's.
fn file_in(store: &Store, partition: &PartitionValues, name: &str) -> Url {
    let mut url = store.url().clone();
    if let Ok(mut segments) = url.path_segments_mut() {
        segments.pop_if_empty().extend(partition.folders()).push(name);
    }
    url
}

/// Seconds as people say them.
pub fn seconds(secs: f64) -> String {
    if secs < 60.0 { format!("{secs:.1} s") } else { format!("{:.0} min {:.0} s", (secs / 60.0).floor(), secs % 60.0) }
}
