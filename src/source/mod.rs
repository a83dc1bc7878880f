//! The source table: where images come from, and how they are cut into resumable slices of work.
//!
//! [`Source::discover`] lists the files, finds the hive partitions in their paths, reads the footers, and cuts each partition
//! into [`WorkUnit`]s. [`Source::read_unit`] streams a unit's rows as [`ImageBatch`]es: keys and kept columns as Arrow, images as
//! bytes still undecoded. An image that cannot be fetched is a row with a [`Reject`]; only the store failing is an error.

mod partition;
pub mod predicate;
mod rows;

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow::array::{RecordBatch, StringArray};
use arrow::buffer::Buffer;
use arrow::datatypes::{DataType, Field, Schema, SchemaRef, TimeUnit};
use futures::{StreamExt as _, TryStreamExt as _};
use object_store::ObjectMeta;
use parquet::arrow::arrow_reader::ArrowReaderMetadata;
use parquet::errors::ParquetError;
use sha2::{Digest as _, Sha256};

use crate::config::{self, SourceFormat};
use crate::decode::Reject;
use crate::parquet_file::ParquetFile;
use crate::store::{Store, StoreError, Stores};
pub use partition::PartitionValues;
use predicate::{Predicate, PredicateError};
pub use rows::ReadOptions;

/// A unit holds at most this many rows: what a crash can cost, and about the rows of one published data file.
const UNIT_MAX_ROWS: u64 = 32_768;

/// A unit reads at most about this many compressed source bytes, so that tables of large pictures are resumable too.
const UNIT_MAX_BYTES: u64 = 1 << 30;

/// Footers fetched at a time while planning.
const FOOTERS_IN_FLIGHT: usize = 64;

/// Endings of the files that a folder of images consists of; others in it are left alone. The content decides how a file is
/// decoded, not its ending.
const IMAGE_ENDINGS: [&str; 8] = ["jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"];

/// Endings of the files that a Parquet table consists of.
const PARQUET_ENDINGS: [&str; 3] = ["parquet", "parq", "pq"];

/// A source table that cannot be read as the pipeline file says.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SourceError {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// No file of the wanted kind lies there.
    #[error("no {wanted} found below {url}")]
    Empty {
        /// The table's location.
        url: String,
        /// What was looked for.
        wanted: String,
    },
    /// A partition key has the name of a published column.
    #[error("the partition key `{key}` of {url} is also a column of the published tables")]
    PartitionKeyIsColumn {
        /// The key.
        key: String,
        /// The table's location.
        url: String,
    },
    /// The predicate excludes every partition.
    #[error("no partition of {url} satisfies `where` ({predicate}); nothing was changed")]
    NoPartition {
        /// The table's location.
        url: String,
        /// The predicate.
        predicate: String,
    },
    /// The folder is a Delta table; reading its Parquet files would bring removed rows back.
    #[error("{url} is a Delta table, which cannot be read as plain Parquet: removed rows would come back")]
    IsDelta {
        /// The table's location.
        url: String,
    },
    /// A file is no readable Parquet.
    #[error("cannot read {file}")]
    Parquet {
        /// The file.
        file: String,
        /// What the reader found.
        source: ParquetError,
    },
    /// A column that the pipeline file names is not in the file.
    #[error("{file} has no column `{column}`; it has {available}")]
    MissingColumn {
        /// The file.
        file: String,
        /// The column asked for.
        column: String,
        /// The columns there are.
        available: String,
        /// The nearest name, if one is near.
        similar: Option<String>,
    },
    /// A column's type does not fit its role.
    #[error("column `{column}` of {file} is {data_type}, but {role} must be {wanted}")]
    ColumnType {
        /// The file.
        file: String,
        /// The column.
        column: String,
        /// Its type.
        data_type: DataType,
        /// What the pipeline uses it for.
        role: &'static str,
        /// The types that fit.
        wanted: &'static str,
    },
    /// A kept column has another type than in the table's first file.
    #[error("kept column `{column}` is {found} in {file}, but {expected} in {first_file}")]
    ColumnTypesDiffer {
        /// The column.
        column: String,
        /// The file that differs.
        file: String,
        /// Its type there.
        found: DataType,
        /// The type in the first file.
        expected: DataType,
        /// The first file.
        first_file: String,
    },
    /// A row has no key, so nothing could be joined to it.
    #[error("{file} has a row without `{column}` (row {row} of the rows read from it)")]
    NullId {
        /// The file.
        file: String,
        /// The key column.
        column: String,
        /// Zero-based number of the row.
        row: u64,
    },
    /// The folders above a file do not spell the partition keys that others spell.
    #[error("{file} lies in partition keys [{found}], but the table has [{expected}]")]
    PartitionKeys {
        /// The file.
        file: String,
        /// Keys in its path.
        found: String,
        /// Keys of the table.
        expected: String,
    },
    /// The predicate does not fit the table.
    #[error("`where` does not fit {file}")]
    Where {
        /// The file.
        file: String,
        /// Why.
        source: PredicateError,
    },
    /// The predicate cannot be read.
    #[error("cannot understand `where`")]
    Predicate(#[from] PredicateError),
}

impl SourceError {
    /// What the user can do about it, where there is more to say than the message does.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Empty { .. } => Some("check the folder, and in a pipeline file [source] table and format".into()),
            Self::IsDelta { .. } => {
                Some("export the table as plain Parquet, or point [source] table at its original files".into())
            }
            Self::MissingColumn { similar: Some(similar), .. } => Some(format!("did you mean `{similar}`?")),
            Self::ColumnType { role: "a kept column", column, .. } => {
                Some(format!("leave `{column}` out of [source] columns"))
            }
            Self::Store(error) => error.hint(),
            _ => None,
        }
    }
}

/// A table of images, cut into partitions and units.
#[derive(Debug)]
pub struct Source {
    store: Store,
    settings: config::Source,
    predicate: Option<Predicate>,
    stores: Stores,
    /// Keys of the hive partitions, outermost first; empty for a table without.
    pub partition_keys: Vec<String>,
    /// The partitions, sorted by their values.
    pub partitions: Vec<SourcePartition>,
    /// The kept columns as they will be published.
    pub kept_schema: SchemaRef,
}

/// One hive partition of the source: what a run publishes atomically.
#[derive(Debug)]
pub struct SourcePartition {
    /// The values of the partition keys; empty for a table without partitions.
    pub values: PartitionValues,
    /// The slices of work, in the order of the rows.
    pub units: Vec<WorkUnit>,
    /// Rows by the footers (or files), before `where`.
    pub num_rows: u64,
    /// Compressed bytes of the files.
    pub num_bytes: u64,
    /// Hash of the files' names, sizes and versions: another hash means other rows.
    pub identity: String,
}

/// A resumable slice of a partition.
#[derive(Debug)]
pub struct WorkUnit {
    /// Number within the partition, from 0.
    pub index: usize,
    /// Rows before `where`.
    pub num_rows: u64,
    input: UnitInput,
}

#[derive(Debug)]
enum UnitInput {
    /// Row groups of Parquet files.
    RowGroups(Vec<(Arc<TableFile>, Vec<usize>)>),
    /// Whole image files.
    ImageFiles(Vec<ObjectMeta>),
}

/// A Parquet file of the source whose footer has been read.
#[derive(Debug)]
struct TableFile {
    meta: ObjectMeta,
    footer: ArrowReaderMetadata,
}

/// Rows as they come from the source: images undecoded.
#[derive(Debug)]
pub struct ImageBatch {
    /// Keys, one a row, none null.
    pub ids: StringArray,
    /// Compressed image of each row, or why there is none.
    pub images: Vec<Result<Buffer, Reject>>,
    /// The kept columns.
    pub kept: RecordBatch,
}

impl Source {
    /// Lists the table, reads the footers and cuts the work; reads no image.
    pub async fn discover(stores: &Stores, settings: &config::Source) -> Result<Self, SourceError> {
        let predicate = settings.predicate.as_deref().map(Predicate::parse).transpose()?;
        let (store, files) = list(stores, settings).await?;
        let mut keys: Option<(Vec<String>, String)> = settings.partition.clone().map(|keys| (keys, String::new()));
        let mut by_partition: BTreeMap<PartitionValues, Vec<ObjectMeta>> = BTreeMap::new();
        for file in files {
            let relative = store.relative(&file.location);
            // A folder of pictures is flat unless keys are asked for: `=` may be part of any name there.
            let is_flat = settings.format == SourceFormat::Directory && settings.partition.is_none();
            let values = if is_flat { PartitionValues::default() } else { PartitionValues::from_path(&relative) };
            let found: Vec<String> = values.keys().map(str::to_owned).collect();
            match &keys {
                None => keys = Some((found, relative)),
                Some((expected, _)) if *expected == found => {}
                Some((expected, _)) => {
                    return Err(SourceError::PartitionKeys {
                        file: relative,
                        found: found.join(", "),
                        expected: expected.join(", "),
                    });
                }
            }
            by_partition.entry(values).or_default().push(file);
        }
        let keys = keys.map(|(keys, _)| keys).unwrap_or_default();
        if let Some(key) = keys.iter().find(|key| crate::schema::is_column(key) || settings.columns.contains(key)) {
            return Err(SourceError::PartitionKeyIsColumn { key: key.clone(), url: store.url().to_string() });
        }
        let mut source = Self {
            store,
            settings: settings.clone(),
            predicate,
            stores: stores.clone(),
            partition_keys: keys,
            partitions: Vec::new(),
            kept_schema: Arc::new(Schema::empty()),
        };
        if let Some(predicate) = &source.predicate {
            let mut matching = BTreeMap::new();
            for (values, files) in by_partition {
                if predicate.partition_may_match(&values.to_map())? {
                    matching.insert(values, files);
                }
            }
            if matching.is_empty() {
                return Err(SourceError::NoPartition {
                    url: source.store.url().to_string(),
                    predicate: predicate.to_string(),
                });
            }
            by_partition = matching;
        }
        for (values, files) in by_partition {
            let partition = match settings.format {
                SourceFormat::Directory => source.plan_images(values, files),
                SourceFormat::Parquet => source.plan_tables(values, files).await?,
            };
            source.partitions.push(partition);
        }
        Ok(source)
    }

    /// The predicate that rows must satisfy, in canonical text.
    pub fn predicate_text(&self) -> Option<String> {
        self.predicate.as_ref().map(ToString::to_string)
    }

    /// The table's URL.
    pub fn url(&self) -> &url::Url {
        self.store.url()
    }

    fn plan_images(&self, values: PartitionValues, files: Vec<ObjectMeta>) -> SourcePartition {
        let mut partition = SourcePartition::new(values, &self.store, &files);
        let mut cut = UnitCutter::default();
        for file in files {
            let size = file.size;
            cut.push(file, 1, size);
        }
        partition.add_units(cut.finish(), UnitInput::ImageFiles);
        partition
    }

    async fn plan_tables(
        &mut self,
        values: PartitionValues,
        files: Vec<ObjectMeta>,
    ) -> Result<SourcePartition, SourceError> {
        let mut partition = SourcePartition::new(values, &self.store, &files);
        let store = &self.store;
        let table_files: Vec<TableFile> = futures::stream::iter(files)
            .map(async |meta| {
                let file = ParquetFile::new(Arc::clone(store.client()), meta.location.clone(), meta.size);
                let footer = file
                    .metadata()
                    .await
                    .map_err(|source| SourceError::Parquet { file: store.relative(&meta.location), source })?;
                Ok::<_, SourceError>(TableFile { meta, footer })
            })
            .buffered(FOOTERS_IN_FLIGHT)
            .try_collect()
            .await?;
        let mut cut = UnitCutter::default();
        for file in table_files {
            self.check_columns(&file, &partition.values)?;
            let matching = self.matching_row_groups(&file)?;
            let file = Arc::new(file);
            for (number, group) in file.footer.metadata().row_groups().iter().enumerate() {
                if matching[number] {
                    let rows = u64::try_from(group.num_rows()).unwrap_or(0);
                    let bytes = u64::try_from(group.compressed_size()).unwrap_or(0);
                    cut.push((Arc::clone(&file), number), rows, bytes);
                }
            }
        }
        partition.add_units(cut.finish(), |groups| {
            let mut files: Vec<(Arc<TableFile>, Vec<usize>)> = Vec::new();
            for (file, number) in groups {
                match files.last_mut() {
                    Some((last, numbers)) if Arc::ptr_eq(last, &file) => numbers.push(number),
                    _ => files.push((file, vec![number])),
                }
            }
            UnitInput::RowGroups(files)
        });
        Ok(partition)
    }

    /// Checks that the columns the pipeline names are there and have types that fit, before the first row is read.
    fn check_columns(&mut self, file: &TableFile, values: &PartitionValues) -> Result<(), SourceError> {
        let name = self.store.relative(&file.meta.location);
        let schema = file.footer.schema();
        let column = |column: &str| schema.field_with_name(column).map_err(|_| missing_column(&name, schema, column));
        let type_error = |field: &Field, role, wanted| SourceError::ColumnType {
            file: name.clone(),
            column: field.name().clone(),
            data_type: field.data_type().clone(),
            role,
            wanted,
        };
        let id = column(&self.settings.id)?;
        if !rows::is_id_type(id.data_type()) {
            return Err(type_error(id, "the id", "a string or an integer"));
        }
        let image = column(&self.settings.image)?;
        if !rows::is_image_type(image.data_type()) {
            return Err(type_error(image, "the image", "binary, a URI string, or struct<bytes, path>"));
        }
        let mut kept = Vec::new();
        for name in &self.settings.columns {
            let field = column(name)?;
            let published = published_type(field.data_type())
                .ok_or_else(|| type_error(field, "a kept column", "a type that Delta tables have"))?;
            kept.push(Field::new(name, published, true));
        }
        if self.partitions.is_empty() && self.kept_schema.fields().is_empty() {
            self.kept_schema = Arc::new(Schema::new(kept));
        } else if let Some((field, expected)) = kept
            .iter()
            .zip(self.kept_schema.fields())
            .find(|(field, expected)| field.data_type() != expected.data_type())
        {
            return Err(SourceError::ColumnTypesDiffer {
                column: field.name().clone(),
                file: name,
                found: field.data_type().clone(),
                expected: expected.data_type().clone(),
                first_file: self.store.url().to_string(),
            });
        }
        if let Some(predicate) = &self.predicate {
            predicate
                .check(&values.extend_schema(schema))
                .map_err(|source| SourceError::Where { file: name.clone(), source })?;
        }
        Ok(())
    }

    /// Which row groups can hold a row that satisfies the predicate, by their statistics.
    fn matching_row_groups(&self, file: &TableFile) -> Result<Vec<bool>, SourceError> {
        let metadata = file.footer.metadata();
        let Some(predicate) = &self.predicate else {
            return Ok(vec![true; metadata.num_row_groups()]);
        };
        predicate
            .may_match(metadata, file.footer.schema())
            .map_err(|source| SourceError::Where { file: self.store.relative(&file.meta.location), source })
    }
}

impl SourcePartition {
    fn new(values: PartitionValues, store: &Store, files: &[ObjectMeta]) -> Self {
        let mut identity = Sha256::new();
        for file in files {
            // The ETag where the store has one (S3, Azure, GCS: it changes with the content), else the time of the last write.
            let version = file.e_tag.clone().unwrap_or_else(|| file.last_modified.to_rfc3339());
            identity.update(format!("{}\0{}\0{version}\n", store.relative(&file.location), file.size));
        }
        Self {
            values,
            units: Vec::new(),
            num_rows: 0,
            num_bytes: files.iter().map(|file| file.size).sum(),
            identity: crate::hash::hex(&identity.finalize()),
        }
    }

    fn add_units<T>(&mut self, slices: Vec<(Vec<T>, u64)>, input: impl Fn(Vec<T>) -> UnitInput) {
        for (index, (items, num_rows)) in slices.into_iter().enumerate() {
            self.num_rows += num_rows;
            self.units.push(WorkUnit { index, num_rows, input: input(items) });
        }
    }
}

/// Collects consecutive items into slices of bounded rows and bytes; the cut depends on the items alone, so every attempt and
/// every machine cuts alike.
#[derive(Debug)]
struct UnitCutter<T> {
    done: Vec<(Vec<T>, u64)>,
    open: Vec<T>,
    rows: u64,
    bytes: u64,
}

impl<T> Default for UnitCutter<T> {
    fn default() -> Self {
        Self { done: Vec::new(), open: Vec::new(), rows: 0, bytes: 0 }
    }
}

impl<T> UnitCutter<T> {
    fn push(&mut self, item: T, rows: u64, bytes: u64) {
        let full = self.rows + rows > UNIT_MAX_ROWS || self.bytes + bytes > UNIT_MAX_BYTES;
        if full && !self.open.is_empty() {
            self.close();
        }
        self.open.push(item);
        self.rows += rows;
        self.bytes += bytes;
    }

    fn close(&mut self) {
        self.done.push((std::mem::take(&mut self.open), self.rows));
        self.rows = 0;
        self.bytes = 0;
    }

    fn finish(mut self) -> Vec<(Vec<T>, u64)> {
        if !self.open.is_empty() {
            self.close();
        }
        self.done
    }
}

/// Lists the files of the table, sorted by path. A URL that names a single file is a table of one file.
async fn list(stores: &Stores, settings: &config::Source) -> Result<(Store, Vec<ObjectMeta>), SourceError> {
    let endings: &[&str] = match settings.format {
        SourceFormat::Parquet => &PARQUET_ENDINGS,
        SourceFormat::Directory => &IMAGE_ENDINGS,
    };
    let path = settings.table.path();
    // A name with the ending of a file may be a folder all the same: Spark and others write such.
    let mut single = None;
    if settings.format == SourceFormat::Parquet && has_ending(path, endings) {
        let mut folder = settings.table.clone();
        let (parent, name) = path.rsplit_once('/').unwrap_or(("", path));
        folder.set_path(&format!("{parent}/"));
        let store = stores.open(&folder)?;
        let name = percent_encoding::percent_decode_str(name).decode_utf8_lossy().into_owned();
        match store.head(&name).await {
            Ok(file) => single = Some((store, vec![file])),
            Err(error) if error.is_not_found() => {}
            Err(error) => return Err(error.into()),
        }
    }
    let (store, files) = if let Some(single) = single {
        single
    } else {
        let store = stores.open(&settings.table)?;
        let files = store.list("").await?;
        (store, files)
    };
    // Engines leave their own files beside a table's under names with an underscore; cameras name pictures so.
    let is_table = settings.format == SourceFormat::Parquet;
    let is_hidden = |relative: &str| {
        let mut parts = relative.split('/');
        parts.any(|part| part.starts_with('.') || (is_table && part.starts_with('_') && !part.contains('=')))
    };
    if files.iter().any(|file| store.relative(&file.location).starts_with("_delta_log/")) {
        return Err(SourceError::IsDelta { url: store.url().to_string() });
    }
    let files: Vec<ObjectMeta> = files
        .into_iter()
        .filter(|file| {
            let relative = store.relative(&file.location);
            !is_hidden(&relative) && has_ending(&relative, endings)
        })
        .collect();
    if files.is_empty() {
        return Err(SourceError::Empty {
            url: store.url().to_string(),
            wanted: format!("file ending in .{}", endings.join(", .")),
        });
    }
    Ok((store, files))
}

fn has_ending(path: &str, endings: &[&str]) -> bool {
    path.rsplit_once('.').is_some_and(|(_, ending)| endings.iter().any(|known| ending.eq_ignore_ascii_case(known)))
}

fn missing_column(file: &str, schema: &Schema, column: &str) -> SourceError {
    let names: Vec<&str> = schema.fields().iter().map(|field| field.name().as_str()).collect();
    let similar = config::nearest(column, &names).map(str::to_owned);
    SourceError::MissingColumn {
        file: file.to_owned(),
        column: column.to_owned(),
        available: names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", "),
        similar,
    }
}

/// The type under which a kept column is published: Delta has signed integers, microseconds and plain strings only. `None` where
/// it has nothing that fits.
fn published_type(data_type: &DataType) -> Option<DataType> {
    Some(match data_type {
        DataType::Boolean
        | DataType::Int8
        | DataType::Int16
        | DataType::Int32
        | DataType::Int64
        | DataType::Float32
        | DataType::Float64
        | DataType::Date32
        | DataType::Decimal128(..) => data_type.clone(),
        DataType::UInt8 => DataType::Int16,
        DataType::UInt16 => DataType::Int32,
        DataType::UInt32 => DataType::Int64,
        DataType::Float16 => DataType::Float32,
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => DataType::Utf8,
        DataType::Date64 => DataType::Date32,
        DataType::Timestamp(_, Some(_)) => DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into())),
        DataType::Dictionary(_, value) => published_type(value)?,
        _ => return None,
    })
}
