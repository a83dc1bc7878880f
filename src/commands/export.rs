//! `export`: what a run published, in the forms of neighbouring tools.

use std::sync::Arc;

use arrow::array::{Array as _, ArrayRef, AsArray, RecordBatch, StringArray};
use arrow::datatypes::{
    DataType, Field, Float32Type, Float64Type, Int8Type, Int16Type, Int32Type, Int64Type, Schema, SchemaRef,
};
use arrow::error::ArrowError;
use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _};
use serde_json::{Map, Value, json};

use super::new_folder;
use crate::config::{Pipeline, SourceFormat};
use crate::context::Context;
use crate::error::{Error, ExitStatus};
use crate::export::{ArrayFile, Rows, Upload, column, vectors};
use crate::report::display;
use crate::schema::column as published;
use crate::source::{Cells, Content, ImageBatch};
use crate::stages::{Backfill, Job, MODEL_FOOTER};
use crate::store::Store;
use crate::table::{DataFileWriter, TableError};

/// Rows of a part of a `clip-retrieval` export, as many as that tool's own.
const PART_ROWS: usize = 1_000_000;

/// Column of the image's location in a `clip-retrieval` export.
const IMAGE_PATH: &str = "image_path";

/// The list of samples of a `fiftyone` export.
const SAMPLES_FILE: &str = "samples.json";

/// Field of a sample that says where the picture is.
const FILEPATH: &str = "filepath";

/// Field of a sample that filters of the app go by.
const TAGS: &str = "tags";

/// Fields of a sample that FiftyOne fills in itself.
const SAMPLE_FIELDS: [&str; 6] = ["id", FILEPATH, TAGS, "metadata", "created_at", "last_modified_at"];

/// Where the types of a sample's fields are.
const FIELDS: &str = "fiftyone.core.fields";

/// Pictures written at a time.
const PUTS_IN_FLIGHT: usize = 16;

/// Form of an export.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// The array embeddings.npy (float32), and rows.parquet: its row i is about row i of the array
    Numpy,
    /// Folders of arrays and tables in parts of at most a million rows, with vectors of length 1; autofaiss takes them too
    ClipRetrieval,
    /// One table, atlas.parquet, with vectors and lists of neighbors
    EmbeddingAtlas,
    /// The list samples.json of a FiftyOne dataset, and, where they are in no local folder, the pictures
    Fiftyone,
}

impl Format {
    /// As the command line names it.
    fn name(self) -> &'static str {
        match self {
            Self::Numpy => "numpy",
            Self::ClipRetrieval => "clip-retrieval",
            Self::EmbeddingAtlas => "embedding-atlas",
            Self::Fiftyone => "fiftyone",
        }
    }

    /// How the tool takes it, in the folder.
    fn opened_by(self) -> &'static str {
        match self {
            Self::Numpy => "numpy.load(\"embeddings.npy\")",
            Self::ClipRetrieval => "autofaiss build_index --embeddings=img_emb --index_path=knn.index --metric_type=ip",
            Self::EmbeddingAtlas => "embedding-atlas atlas.parquet --vector embedding --neighbors neighbors",
            Self::Fiftyone => "fiftyone.Dataset.from_json(\"samples.json\", rel_dir=\".\")",
        }
    }
}

/// What the forms share.
struct Export<'a> {
    job: &'a Job<'a>,
    rows: Rows<'a>,
    store: Store,
    footer: Vec<(&'static str, String)>,
}

/// Writes the folder `to`, prints a summary as one line of JSON, and says how to open it.
pub fn export(context: &Context, pipeline: &Pipeline, format: Format, to: &str) -> Result<ExitStatus, Error> {
    let job = Job::prepare(context, pipeline, &Backfill::default())?;
    if format == Format::Fiftyone && matches!(job.source.content(), Some(Content::Features(_))) {
        return Err(Error::Usage {
            message: format!("FiftyOne shows pictures, and {} has features", job.source.url()),
            hint: "choose another --format".to_owned(),
        });
    }
    let taken: &[&str] = match format {
        Format::ClipRetrieval => &[IMAGE_PATH],
        Format::Fiftyone => &SAMPLE_FIELDS,
        Format::Numpy | Format::EmbeddingAtlas => &[],
    };
    let rows = Rows::read(&job, format == Format::EmbeddingAtlas, taken)?;
    let store = new_folder(context, "--to", to)?;
    let metric = pipeline.neighbors.as_ref().map(|neighbors| neighbors.metric.name().to_owned());
    let footer = vec![
        ("version", env!("CARGO_PKG_VERSION").to_owned()),
        (MODEL_FOOTER, job.model_sha256.clone()),
        ("metric", metric.unwrap_or_default()),
    ];
    let export = Export { job: &job, rows, store, footer };
    let num_lost = match format {
        Format::Numpy => export.numpy(),
        Format::ClipRetrieval => export.clip_retrieval(),
        Format::EmbeddingAtlas => export.embedding_atlas(),
        Format::Fiftyone => export.fiftyone(),
    }?;
    let Export { rows, store, .. } = export;
    let num_rows = rows.num_rows() - num_lost;
    context.say(&format!("{num_rows} rows with vectors of {} values below {}", rows.dim(), store.url()))?;
    if rows.num_left_out() > 0 {
        context.say(&format!(
            "{} rows without a vector are left out: `status` in latents says why they have none",
            rows.num_left_out()
        ))?;
    }
    if num_lost > 0 {
        context.say(&format!("{num_lost} images that the source does not have any more are left out"))?;
    }
    if format == Format::EmbeddingAtlas && !rows.has_neighbors() {
        context.say("without neighbors: the pipeline has none, or they are in another table; leave out --neighbors")?;
    }
    context.say(&format!("open it there with {}", format.opened_by()))?;
    let summary = json!({
        "format": format.name(),
        "url": store.url().as_str(),
        "rows": num_rows,
        "rows_left_out": rows.num_left_out() + num_lost,
        "dim": rows.dim(),
        "model_sha256": job.model_sha256,
    });
    context.print(&summary.to_string())?;
    Ok(ExitStatus::Success)
}

impl Export<'_> {
    /// Hands all rows to `sink` with the number of the first, and shows how far it has come.
    fn each(&self, mut sink: impl FnMut(usize, RecordBatch) -> Result<(), Error>) -> Result<(), Error> {
        let progress = self.job.context.progress("export", Some(self.rows.num_rows() as u64));
        self.rows.each(|first, rows| {
            let num_rows = rows.num_rows() as u64;
            sink(first, rows)?;
            progress.advance(num_rows, 0);
            Ok(())
        })?;
        progress.finish();
        Ok(())
    }

    /// Starts parts of at most so many rows.
    fn parts<'p, N>(&'p self, schema: &'p SchemaRef, part_rows: usize, names: N) -> Parts<'p, N> {
        let (num_rows, dim) = (self.rows.num_rows(), self.rows.dim());
        let (context, store, footer) = (self.job.context, &self.store, self.footer.as_slice());
        Parts { context, store, schema, footer, num_rows, dim, part_rows, names, open: None, num_written: 0 }
    }

    fn numpy(&self) -> Result<usize, Error> {
        let schema = without_vectors(self.rows.schema(), &[]);
        let names = |_| ("embeddings.npy".to_owned(), "rows.parquet".to_owned());
        let mut parts = self.parts(&schema, usize::MAX, names);
        let written = self.each(|_, rows| parts.push(vectors(&rows), &project(&rows, &schema, Vec::new())?));
        parts.finish(written)?;
        Ok(0)
    }

    fn clip_retrieval(&self) -> Result<usize, Error> {
        let schema = without_vectors(self.rows.schema(), &[Field::new(IMAGE_PATH, DataType::Utf8, false)]);
        let digits = self.rows.num_rows().div_ceil(PART_ROWS).to_string().len();
        let names = move |part: usize| {
            (format!("img_emb/img_emb_{part:0digits$}.npy"), format!("metadata/metadata_{part:0digits$}.parquet"))
        };
        let mut parts = self.parts(&schema, PART_ROWS, names);
        let written = self.each(|_, rows| {
            let mut unit = vectors(&rows).to_vec();
            unit.chunks_exact_mut(self.rows.dim().max(1)).for_each(normalize);
            parts.push(&unit, &project(&rows, &schema, vec![self.image_paths(&rows)])?)
        });
        parts.finish(written)?;
        Ok(0)
    }

    /// Where the images are: in a folder, their place in it; else what the image column says of it, where it is text that the pipeline
    /// keeps; and else their ids.
    fn image_paths(&self, rows: &RecordBatch) -> ArrayRef {
        let source = &self.job.pipeline.source;
        let ids = rows.column_by_name(published::IMAGE_ID).map(AsArray::as_string::<i32>);
        let paths = if source.format == SourceFormat::Directory {
            ids.into_iter().flatten().flatten().map(|id| Some(self.place(id))).collect::<StringArray>()
        } else {
            let uris = rows.column_by_name(&source.image).and_then(|column| column.as_string_opt::<i32>());
            let uri = |row: usize| uris.filter(|uris| uris.is_valid(row)).map(|uris| uris.value(row));
            let id = |row: usize| ids.map(|ids| ids.value(row));
            (0..rows.num_rows()).map(|row| uri(row).or_else(|| id(row))).collect()
        };
        Arc::new(paths)
    }

    /// The path or URL of an image in a folder of them.
    fn place(&self, id: &str) -> String {
        let folder = self.job.source.url();
        match folder.to_file_path() {
            Ok(path) => path.join(id).to_string_lossy().into_owned(),
            Err(()) => format!("{folder}{id}"),
        }
    }

    fn embedding_atlas(&self) -> Result<usize, Error> {
        let context = self.job.context;
        let mut file = parquet(&self.store, "atlas.parquet", self.rows.schema(), &self.footer)?;
        let written = self.each(|_, rows| Ok(context.block_on(file.write(&rows))?));
        finish_parquet(context, file, written)?;
        Ok(0)
    }

    /// Writes the pictures, unless they lie in a local folder already, and then the samples. Returns the number of rows whose picture is
    /// not in the source any more.
    fn fiftyone(&self) -> Result<usize, Error> {
        let context = self.job.context;
        let source = &self.job.pipeline.source;
        let is_local = source.format == SourceFormat::Directory && self.job.source.url().scheme() == "file";
        let endings = if is_local { None } else { Some(self.pictures()?) };
        let samples = Samples::new(self.rows.schema());
        let mut file = context.block_on(Upload::create(&self.store, SAMPLES_FILE))?;
        let mut num_lost = 0;
        let mut write = || -> Result<(), Error> {
            context.block_on(file.write(samples.head(&self.job.pipeline.name)))?;
            let mut is_first = true;
            self.each(|first, rows| {
                let ids = rows.column_by_name(published::IMAGE_ID).map(AsArray::as_string::<i32>);
                let mut text = Vec::new();
                for row in 0..rows.num_rows() {
                    let filepath = match &endings {
                        None => ids.map(|ids| self.place(ids.value(row))),
                        Some(endings) => endings[first + row].map(|ending| picture_name(first + row, ending)),
                    };
                    let Some(filepath) = filepath else {
                        num_lost += 1;
                        continue;
                    };
                    text.extend_from_slice(if is_first { b"\n" } else { b",\n" });
                    is_first = false;
                    Samples::push(&mut text, &rows, row, filepath, self.rows.dim())?;
                }
                Ok(context.block_on(file.write(text))?)
            })?;
            Ok(context.block_on(file.write(b"\n]}\n".to_vec()))?)
        };
        match write() {
            Ok(()) => context.block_on(file.close())?,
            Err(error) => {
                context.block_on(file.abort());
                return Err(error);
            }
        }
        Ok(num_lost)
    }

    /// Writes the pictures of all rows as the source has them. Returns the ending of each row's file; `None` where there is no picture
    /// any more.
    fn pictures(&self) -> Result<Vec<Option<&'static str>>, Error> {
        let (job, context) = (self.job, self.job.context);
        let mut endings = vec![None; self.rows.num_rows()];
        let pass = job.pass();
        let progress = context.progress("pictures", Some(self.rows.num_rows() as u64));
        for partition in &job.source.partitions {
            let name = partition.values.to_string();
            for unit in &partition.units {
                pass.read_unit(partition, unit, |batch| {
                    let ImageBatch { ids, cells: Cells::Images(images), .. } = batch else { return Ok(()) };
                    let mut files = Vec::new();
                    for (id, image) in ids.iter().zip(images) {
                        let Some(row) = id.and_then(|id| self.rows.find(id, &name)) else { continue };
                        let (Ok(bytes), row) = (image, row as usize) else { continue };
                        let Some(ending) = ending(&bytes) else { continue };
                        // Of rows of the same id, the first is the one that counts.
                        if endings[row].replace(ending).is_none() {
                            files.push((picture_name(row, ending), Bytes::copy_from_slice(&bytes)));
                        }
                    }
                    let num_files = files.len() as u64;
                    let puts = futures::stream::iter(files)
                        .map(async |(name, bytes)| self.store.put(&name, bytes).await)
                        .buffer_unordered(PUTS_IN_FLIGHT);
                    context.block_on(puts.try_collect::<()>())?;
                    progress.advance(num_files, 0);
                    Ok(())
                })?;
            }
        }
        progress.finish();
        Ok(endings)
    }
}

/// Starts a Parquet file below a folder.
fn parquet(
    store: &Store,
    name: &str,
    schema: &SchemaRef,
    footer: &[(&str, String)],
) -> Result<DataFileWriter, TableError> {
    let url = store.url().join(name).map_err(|source| TableError::FileName { name: name.to_owned(), source })?;
    DataFileWriter::create(store, url, name.to_owned(), Arc::clone(schema), footer)
}

/// Closes a file, or gives it up where writing failed.
fn finish_parquet(context: &Context, file: DataFileWriter, written: Result<(), Error>) -> Result<(), Error> {
    match written {
        Ok(()) => Ok(context.block_on(file.close()).map(drop)?),
        Err(error) => {
            context.block_on(file.abort());
            Err(error)
        }
    }
}

/// The columns that are not lists of numbers, after `first`.
fn without_vectors(schema: &Schema, first: &[Field]) -> SchemaRef {
    let is_left = |field: &&Arc<Field>| field.name() != published::EMBEDDING && field.name() != column::NEIGHBORS;
    let fields = first.iter().cloned().map(Arc::new).chain(schema.fields().iter().filter(is_left).cloned());
    Arc::new(Schema::new(fields.collect::<Vec<_>>()))
}

/// The columns of `schema`: first those given, and the others as they are in `rows`.
fn project(rows: &RecordBatch, schema: &SchemaRef, mut columns: Vec<ArrayRef>) -> Result<RecordBatch, Error> {
    for field in schema.fields().iter().skip(columns.len()) {
        columns.extend(rows.column_by_name(field.name()).cloned());
    }
    RecordBatch::try_new(Arc::clone(schema), columns).map_err(rows_error)
}

fn rows_error(source: ArrowError) -> Error {
    Error::Rows { table: "the export", source }
}

/// Brings a vector to length 1; one of zeros stays as it is.
fn normalize(vector: &mut [f32]) {
    let norm = vector.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt();
    if norm > 0.0 {
        for value in vector {
            #[expect(clippy::cast_possible_truncation, reason = "rounded to the vector's own precision")]
            let scaled = (f64::from(*value) / norm) as f32;
            *value = scaled;
        }
    }
}

/// Arrays and tables of which rows of the same number belong together, in parts of at most `part_rows` rows.
struct Parts<'a, N> {
    context: &'a Context,
    store: &'a Store,
    schema: &'a SchemaRef,
    footer: &'a [(&'static str, String)],
    /// Rows of all parts together.
    num_rows: usize,
    dim: usize,
    part_rows: usize,
    /// Names of a part's array and of its table, by its number from zero.
    names: N,
    open: Option<Part>,
    num_written: usize,
}

struct Part {
    array: ArrayFile,
    table: DataFileWriter,
    /// Rows that it still takes.
    room: usize,
}

impl<N: Fn(usize) -> (String, String)> Parts<'_, N> {
    /// Appends rows, and their vectors.
    fn push(&mut self, vectors: &[f32], rows: &RecordBatch) -> Result<(), Error> {
        let dim = self.dim;
        let mut start = 0;
        while start < rows.num_rows() {
            if self.open.is_none() {
                self.open = Some(self.begin()?);
            }
            let Some(part) = &mut self.open else { break };
            let end = rows.num_rows().min(start + part.room);
            self.context.block_on(async {
                part.array.write(&vectors[start * dim..end * dim]).await?;
                part.table.write(&rows.slice(start, end - start)).await
            })?;
            part.room -= end - start;
            self.num_written += end - start;
            start = end;
            if part.room == 0 {
                self.close()?;
            }
        }
        Ok(())
    }

    fn begin(&self) -> Result<Part, Error> {
        let (array, table) = (self.names)(self.num_written / self.part_rows);
        let room = self.part_rows.min(self.num_rows - self.num_written);
        let table = parquet(self.store, &table, self.schema, self.footer)?;
        Ok(Part { array: self.context.block_on(ArrayFile::create(self.store, &array, room, self.dim))?, table, room })
    }

    fn close(&mut self) -> Result<(), TableError> {
        let Some(Part { array, table, .. }) = self.open.take() else { return Ok(()) };
        self.context.block_on(async {
            array.close().await?;
            table.close().await.map(drop)
        })
    }

    /// Gives up the part that is open where writing failed; the last one is full otherwise, and closed.
    fn finish(self, written: Result<(), Error>) -> Result<(), Error> {
        if let Some(Part { array, table, .. }) = self.open {
            self.context.block_on(async {
                array.abort().await;
                table.abort().await;
            });
        }
        written
    }
}

/// The ending of a picture's file name, by what it holds; `None` where it is no picture.
fn ending(bytes: &[u8]) -> Option<&'static str> {
    image::guess_format(bytes).ok()?.extensions_str().first().copied()
}

/// The file of a row's picture, relative to the folder: ids may be no names of files.
fn picture_name(row: usize, ending: &str) -> String {
    format!("data/{row:09}.{ending}")
}

/// How rows become samples: fields by name, each with what it is called in a sample's type.
struct Samples {
    fields: Map<String, Value>,
}

impl Samples {
    fn new(schema: &Schema) -> Self {
        let field = |field: &Arc<Field>| {
            let kind = match field.data_type() {
                _ if field.name() == published::EMBEDDING => "VectorField".to_owned(),
                DataType::Boolean => "BooleanField".to_owned(),
                DataType::Int8 | DataType::Int16 | DataType::Int32 | DataType::Int64 => "IntField".to_owned(),
                DataType::Float32 | DataType::Float64 => "FloatField".to_owned(),
                DataType::List(_) => format!("ListField({FIELDS}.StringField)"),
                _ => "StringField".to_owned(),
            };
            (field.name().clone(), Value::from(format!("{FIELDS}.{kind}")))
        };
        Self { fields: schema.fields().iter().map(field).collect() }
    }

    /// What stands before the samples.
    fn head(&self, name: &str) -> Vec<u8> {
        let mut head =
            json!({"name": name, "media_type": "image", "sample_fields": self.fields}).to_string().into_bytes();
        head.pop();
        head.extend_from_slice(b",\n\"samples\": [");
        head
    }

    /// Appends a sample.
    fn push(text: &mut Vec<u8>, rows: &RecordBatch, row: usize, filepath: String, dim: usize) -> Result<(), Error> {
        let mut sample = Map::new();
        sample.insert(FILEPATH.to_owned(), filepath.into());
        let mut tags = Vec::new();
        for (field, column) in rows.schema().fields().iter().zip(rows.columns()) {
            if field.name() != published::EMBEDDING {
                sample.insert(field.name().clone(), value(column, row));
            }
        }
        let is = |name: &str, is: bool| sample.get(name).and_then(Value::as_bool) == Some(is);
        tags.extend(is(published::IS_ANOMALY, true).then_some("anomaly"));
        tags.extend(is(column::IS_REPRESENTATIVE, false).then_some("duplicate"));
        sample.insert(TAGS.to_owned(), json!(tags));
        let json = |error: serde_json::Error| rows_error(ArrowError::from_external_error(Box::new(error)));
        serde_json::to_writer(&mut *text, &sample).map_err(json)?;
        // Numbers of 32 bits are written with as few digits as tell them apart, which a JSON value would not do.
        text.pop();
        text.extend_from_slice(format!(",\"{}\":", published::EMBEDDING).as_bytes());
        serde_json::to_writer(&mut *text, &vectors(rows)[row * dim..(row + 1) * dim]).map_err(json)?;
        text.push(b'}');
        Ok(())
    }
}

/// A cell as JSON; what JSON has no type for is text.
fn value(column: &ArrayRef, row: usize) -> Value {
    if column.is_null(row) {
        return Value::Null;
    }
    match column.data_type() {
        DataType::Boolean => column.as_boolean().value(row).into(),
        DataType::Int8 => column.as_primitive::<Int8Type>().value(row).into(),
        DataType::Int16 => column.as_primitive::<Int16Type>().value(row).into(),
        DataType::Int32 => column.as_primitive::<Int32Type>().value(row).into(),
        DataType::Int64 => column.as_primitive::<Int64Type>().value(row).into(),
        DataType::Float32 => f64::from(column.as_primitive::<Float32Type>().value(row)).into(),
        DataType::Float64 => column.as_primitive::<Float64Type>().value(row).into(),
        DataType::List(_) => {
            column.as_list::<i32>().value(row).as_string_opt::<i32>().into_iter().flatten().flatten().collect()
        }
        _ => display(column, row).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Stores;
    use arrow::array::Int64Array;
    use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;

    #[test]
    fn rows_of_an_array_and_of_the_table_beside_it_are_cut_at_the_same_places() {
        let stores = Stores::default();
        let store = stores.open(&url::Url::parse("memory:///parts").unwrap()).unwrap();
        let context = Context::with_stores(stores, None, true).unwrap();
        let schema: SchemaRef = Arc::new(Schema::new(vec![Field::new("row", DataType::Int64, false)]));
        let names = |part: usize| (format!("{part}.npy"), format!("{part}.parquet"));
        let mut parts = Parts {
            context: &context,
            store: &store,
            schema: &schema,
            footer: &[],
            num_rows: 9,
            dim: 2,
            part_rows: 4,
            names,
            open: None,
            num_written: 0,
        };
        for numbers in [0..3, 3..8, 8..9_i64] {
            let vectors: Vec<f32> = numbers.clone().flat_map(|row| [row as f32, 0.5]).collect();
            let rows = Arc::new(Int64Array::from_iter_values(numbers));
            parts.push(&vectors, &RecordBatch::try_new(Arc::clone(&schema), vec![rows]).unwrap()).unwrap();
        }
        parts.finish(Ok(())).unwrap();
        let files = context.block_on(store.list("")).unwrap();
        assert_eq!(files.len(), 6, "{files:?}");
        let mut first = 0;
        for (part, num_rows) in [4, 4, 1].into_iter().enumerate() {
            let array = context.block_on(store.get(&format!("{part}.npy"))).unwrap();
            let (head, values) = array.split_at(array.len() - num_rows * 2 * 4);
            assert!(std::str::from_utf8(&head[10..]).unwrap().contains(&format!("'shape': ({num_rows}, 2)")));
            let table = context.block_on(store.get(&format!("{part}.parquet"))).unwrap();
            let table =
                ParquetRecordBatchReaderBuilder::try_new(table).unwrap().build().unwrap().next().unwrap().unwrap();
            let table = table.column(0).as_primitive::<Int64Type>();
            assert_eq!(table.len(), num_rows);
            for (vector, row) in values.chunks_exact(8).zip(table.values()) {
                assert_eq!(*row, first);
                assert_eq!(vector[..4], (*row as f32).to_le_bytes());
                assert_eq!(vector[4..], 0.5_f32.to_le_bytes());
                first += 1;
            }
        }
    }

    #[test]
    fn vectors_come_to_length_one_and_zeros_stay() {
        let mut vector = [3.0, -4.0];
        normalize(&mut vector);
        assert!((vector[0] - 0.6).abs() < 1e-7 && (vector[1] + 0.8).abs() < 1e-7, "{vector:?}");
        let mut zeros = [0.0; 3];
        normalize(&mut zeros);
        assert!(zeros.iter().all(|value| value.to_bits() == 0), "{zeros:?}");
    }
}
