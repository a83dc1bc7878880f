//! Makes a table `latents` of given vectors, to time and weigh the neighbors stage on more rows than there are pictures at hand.
//!
//! ```text
//! cargo bench --bench neighbors -- data ROWS DIM FILE
//! cargo bench --bench latents   -- PIPELINE FILE DIM
//! lookalike neighbors PIPELINE
//! ```
//!
//! FILE holds raw little-endian f32, row-major. The rows go into the [output] table of PIPELINE, which must be new and without
//! partitions, under the model of PIPELINE, in data files of as many rows as a run writes.

#![expect(clippy::unwrap_used, reason = "what goes wrong here panics")]

use std::io::{BufReader, Read as _};
use std::sync::Arc;

use arrow::array::{ArrayRef, Float32Array, ListArray, RecordBatch, StringArray, new_null_array};
use arrow::buffer::OffsetBuffer;
use arrow::datatypes::{DataType, Field, Schema};
use lookalike::commands::load_pipeline;
use lookalike::config::{Overrides, Pipeline};
use lookalike::context::Context;
use lookalike::schema::{STATUS_OK, TableName, column, data_schema};
use lookalike::source::PartitionValues;
use lookalike::stages::{Backfill, Job};

/// What the rows say made them.
const RUN_ID: &str = "0123456789abcdef";

fn main() {
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| arg != "--bench").collect();
    let [pipeline, file, dim] = args.as_slice() else { panic!("give PIPELINE FILE DIM") };
    let dim: usize = dim.parse().unwrap();
    let context = Context::new(None, true).unwrap();
    let overrides = Overrides { current_dir: context.current_dir.clone(), ..Overrides::default() };
    let pipeline: Pipeline = load_pipeline(&context, pipeline.as_ref(), &overrides).unwrap();
    let job = Job::prepare(&context, &pipeline, &Backfill::default()).unwrap();
    job.ensure(&[TableName::Latents]).unwrap();

    let file = std::fs::File::open(file).unwrap();
    let num_rows = usize::try_from(file.metadata().unwrap().len()).unwrap() / (dim * 4);
    let mut reader = BufReader::new(file);
    let unit_rows = pipeline.execution.unit_rows.get();
    let partition = PartitionValues::default();
    let footer = job.footer(RUN_ID).unwrap();
    let mut files = Vec::new();
    for (unit, start) in (0..num_rows).step_by(unit_rows).enumerate() {
        let rows = unit_rows.min(num_rows - start);
        let mut bytes = vec![0; rows * dim * 4];
        reader.read_exact(&mut bytes).unwrap();
        let values = bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes));
        let batch = latents(start, rows, dim, Float32Array::from_iter_values(values), &job.model_sha256);
        let written = async {
            let file = job.latents.create_file(&partition, RUN_ID, unit, batch.schema(), &footer);
            let mut file = file.await.unwrap();
            file.write(&batch).await.unwrap();
            file.close().await.unwrap()
        };
        files.push(context.block_on(written));
    }
    context.block_on(job.latents.replace_partition(&partition, RUN_ID, &files)).unwrap();
}

/// Rows of which only ids and vectors say anything.
fn latents(start: usize, num_rows: usize, dim: usize, values: Float32Array, model_sha256: &str) -> RecordBatch {
    let schema = data_schema(TableName::Latents, &Schema::empty());
    let same = |text: &str| -> ArrayRef { Arc::new(StringArray::from(vec![text; num_rows])) };
    let element = Arc::new(Field::new("element", DataType::Float32, false));
    let lengths = OffsetBuffer::from_lengths(vec![dim; num_rows]);
    let vectors: ArrayRef = Arc::new(ListArray::new(element, lengths, Arc::new(values), None));
    let columns = schema.fields().iter().map(|field| match field.name().as_str() {
        column::IMAGE_ID => {
            let ids = (start..start + num_rows).map(|row| format!("image-{row:08}.jpg"));
            Arc::new(StringArray::from_iter_values(ids)) as ArrayRef
        }
        column::STATUS => same(STATUS_OK),
        column::EMBEDDING => Arc::clone(&vectors),
        column::RUN_ID => same(RUN_ID),
        column::MODEL_SHA256 => same(model_sha256),
        _ => new_null_array(field.data_type(), num_rows),
    });
    let columns = columns.collect();
    RecordBatch::try_new(schema, columns).unwrap()
}
