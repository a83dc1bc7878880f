//! The source table: where images come from, and how they are cut into resumable slices of work.
//!
//! [`Source::discover`] finds the files and their partitions (by the hive folders in their paths, or by the log of a Delta table),
//! reads the footers, and cuts each partition into [`WorkUnit`]s. [`Source::read`] streams the rows of units as [`ImageBatch`]es:
//! keys and kept columns as Arrow, images as bytes still undecoded, features as numbers. An image that cannot be fetched is a row with a
//! [`Reject`]; only the store failing, or a file that is broken as a whole, is an error.

mod buffers;
mod delta;
mod partition;
pub mod predicate;
mod read_ahead;
mod rows;
mod selection;
mod shard;
mod units;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use arrow::array::{RecordBatch, StringArray};
use arrow::buffer::Buffer;
use arrow::datatypes::{DataType, Field, Schema, SchemaRef, TimeUnit};
use chrono::{DateTime, Utc};
use futures::{StreamExt as _, TryStreamExt as _};
use object_store::ObjectMeta;
use parquet::arrow::arrow_reader::ArrowReaderMetadata;
use parquet::errors::ParquetError;

use crate::config::{self, SourceFormat};
use crate::decode::Reject;
use crate::features::Tensor;
use crate::parquet_file::ParquetFile;
use crate::store::{Store, StoreError, Stores};
use delta::DeltaTable;
pub use partition::PartitionValues;
use predicate::{Predicate, PredicateError};
pub use rows::{Read, ReadOptions, Slice, read_image};
pub use selection::{Selection, SelectionError};
pub use shard::ShardFault;
use units::{Found, Piece, TableFile};
pub use units::{SourceFile, SourcePartition, WorkUnit};

/// Footers fetched at a time while planning.
const FOOTERS_IN_FLIGHT: usize = 64;

/// Endings of the files that a folder of images consists of; others in it are left alone. The content decides how a file is
/// decoded, not its ending.
const IMAGE_ENDINGS: [&str; 8] = ["jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"];

/// Endings of the files that a Parquet table consists of.
const PARQUET_ENDINGS: [&str; 3] = ["parquet", "parq", "pq"];

/// Endings of the shards that a `WebDataset` consists of.
const SHARD_ENDINGS: [&str; 5] = ["tar", "tar.gz", "tgz", "tar.zst", "tzst"];

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
    /// The command line selects what the table does not have.
    #[error("cannot select partitions of {url}: {source}")]
    Selection {
        /// The table's location.
        url: String,
        /// Why.
        source: SelectionError,
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
    /// The log of a Delta table cannot be read, or asks for something that the Delta library cannot do.
    #[error("cannot read the Delta table {url}")]
    Delta {
        /// The table's location.
        url: String,
        /// What the log says.
        source: Box<delta_kernel::KernelError>,
    },
    /// The data files of a Delta table have other column names than the table.
    #[error("the Delta table {url} uses column mapping, which is not supported")]
    ColumnMapping {
        /// The table's location.
        url: String,
    },
    /// A shard is no whole tar archive, or its members make no samples.
    #[error("cannot read the shard {shard} at byte {byte} of the archive{member}")]
    Shard {
        /// The shard.
        shard: String,
        /// How far it was read, in bytes after decompression.
        byte: u64,
        /// The member that was being read, where there is one, with words before it.
        member: String,
        /// What is wrong.
        source: ShardFault,
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
    /// Files of one table hold images and features, or lists of another depth.
    #[error("column `{column}` holds {found} in {file}, but {expected} in {first_file}")]
    ContentsDiffer {
        /// The column.
        column: String,
        /// The file that differs.
        file: String,
        /// What it holds there.
        found: Content,
        /// What it holds in the files before.
        expected: Content,
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
                Some("set format = \"delta\" in [source], which reads the rows that the table has now".into())
            }
            Self::ColumnMapping { .. } => Some(
                "write the table to one without delta.columnMapping.mode, for example with CREATE TABLE … AS SELECT"
                    .into(),
            ),
            Self::Shard { source, .. } => source.hint().map(str::to_owned),
            Self::MissingColumn { similar: Some(similar), .. } => Some(format!("did you mean `{similar}`?")),
            Self::ColumnType { role: "a kept column", column, .. } => {
                Some(format!("leave `{column}` out of [source] columns"))
            }
            Self::Store(error) => error.hint(),
            Self::Selection { source: SelectionError::NoSuchPartition { similar: Some(similar), .. }, .. } => {
                Some(format!("did you mean `{similar}`?"))
            }
            Self::Selection { source: SelectionError::NoDate { .. }, .. } => {
                Some("name the partitions with --partition KEY=VALUE".to_owned())
            }
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
    delta: Option<Arc<DeltaTable>>,
    /// Version of the table that is read, where it has versions.
    pub version: Option<u64>,
    /// When the newest of the files was written; `None` where no partition is selected.
    pub newest: Option<DateTime<Utc>>,
    /// Keys of the partitions, outermost first; empty for a table without.
    pub partition_keys: Vec<String>,
    /// The partitions, sorted by their values.
    pub partitions: Vec<SourcePartition>,
    /// The kept columns as they will be published.
    pub kept_schema: SchemaRef,
    content: Option<Content>,
}

/// What the image column of a source holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    /// Images: their bytes, or where they are.
    Images,
    /// Feature vectors or tensors. The lengths of the lists by the column's type, outermost first; `None`: it differs from row to row.
    Features(Vec<Option<usize>>),
}

impl fmt::Display for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Images => f.write_str("images"),
            Self::Features(lengths) => {
                let length =
                    |length: &Option<usize>| length.map_or_else(|| "any".to_owned(), |length| length.to_string());
                write!(f, "features of {} values", lengths.iter().map(length).collect::<Vec<_>>().join(" x "))
            }
        }
    }
}

impl Content {
    /// What two files hold together: `None` where that is not one thing.
    fn and(&self, other: &Self) -> Option<Self> {
        match (self, other) {
            (Self::Images, Self::Images) => Some(Self::Images),
            (Self::Features(a), Self::Features(b)) if a.len() == b.len() => {
                Some(Self::Features(a.iter().zip(b).map(|(a, b)| a.filter(|_| a == b)).collect()))
            }
            _ => None,
        }
    }
}

/// Rows as they come from the source: images undecoded.
#[derive(Debug)]
pub struct ImageBatch {
    /// Keys, one a row, none null.
    pub ids: StringArray,
    /// The image column.
    pub cells: Cells,
    /// The kept columns.
    pub kept: RecordBatch,
}

impl ImageBatch {
    /// Bytes of the image column.
    pub fn num_bytes(&self) -> u64 {
        let bytes = match &self.cells {
            Cells::Images(images) => images.iter().flatten().map(Buffer::len).sum::<usize>(),
            Cells::Features(features) => features.iter().flatten().map(|row| row.bytes.len()).sum(),
        };
        bytes as u64
    }
}

/// What the image column holds in some rows, or why it holds nothing.
#[derive(Debug)]
pub enum Cells {
    /// Compressed images.
    Images(Vec<Result<Buffer, Reject>>),
    /// Feature vectors or tensors.
    Features(Vec<Result<Tensor, Reject>>),
}

impl Source {
    /// Finds out what columns the table has, by its first file: for stages that read no image. The partitions are not all there are.
    pub async fn describe(stores: &Stores, settings: &config::Source) -> Result<Self, SourceError> {
        Self::find(stores, settings, u64::MAX, &Selection::default(), Depth::Columns).await
    }

    /// Finds the files, reads the footers of the partitions that `selection` takes and cuts units of at most `unit_rows` rows; reads no
    /// image.
    pub async fn discover(
        stores: &Stores,
        settings: &config::Source,
        unit_rows: u64,
        selection: &Selection,
    ) -> Result<Self, SourceError> {
        Self::find(stores, settings, unit_rows, selection, Depth::Units).await
    }

    async fn find(
        stores: &Stores,
        settings: &config::Source,
        unit_rows: u64,
        selection: &Selection,
        depth: Depth,
    ) -> Result<Self, SourceError> {
        let predicate = settings.predicate.as_deref().map(Predicate::parse).transpose()?;
        let (store, delta, found) = if settings.format == SourceFormat::Delta {
            let store = stores.open(&settings.table)?;
            let (table, found) = DeltaTable::open(stores, &store, selection.version).await?;
            (store, Some(table), found)
        } else {
            let (store, objects) = list(stores, settings).await?;
            let found = objects.into_iter().map(|object| Found::listed(&store, object));
            // A folder of pictures is flat unless keys are asked for: `=` may be part of any name there.
            let is_flat = settings.format == SourceFormat::Directory && settings.partition.is_none();
            let values =
                |name: &str| if is_flat { PartitionValues::default() } else { PartitionValues::from_path(name) };
            let found = found.map(|found| (values(&found.file.name), found)).collect();
            (store, None, found)
        };
        let (keys, mut by_partition) = group(settings.partition.clone(), found)?;
        if let Some(key) = keys.iter().find(|key| crate::schema::is_column(key) || settings.columns.contains(key)) {
            return Err(SourceError::PartitionKeyIsColumn { key: key.clone(), url: store.url().to_string() });
        }
        selection
            .check(by_partition.keys())
            .map_err(|error| SourceError::Selection { url: store.url().to_string(), source: error })?;
        by_partition.retain(|values, _| selection.takes(values));
        // A range of dates may be empty: then there is nothing to do, whatever `where` says.
        let is_nothing_selected = by_partition.is_empty();
        if let Some(predicate) = predicate.as_ref().filter(|_| !is_nothing_selected) {
            let mut matching = BTreeMap::new();
            for (values, files) in by_partition {
                if predicate.partition_may_match(&values.to_map())? {
                    matching.insert(values, files);
                }
            }
            if matching.is_empty() {
                return Err(SourceError::NoPartition {
                    url: store.url().to_string(),
                    predicate: predicate.to_string(),
                });
            }
            by_partition = matching;
        }
        if depth == Depth::Columns {
            by_partition = by_partition.into_iter().take(1).collect();
            for files in by_partition.values_mut() {
                files.truncate(1);
            }
        }
        let mut source = Self {
            store,
            settings: settings.clone(),
            predicate,
            stores: stores.clone(),
            version: delta.as_ref().map(|table| table.version),
            delta: delta.map(Arc::new),
            newest: by_partition.values().flatten().map(|found| found.modified).max(),
            partition_keys: keys,
            partitions: Vec::new(),
            kept_schema: Arc::new(Schema::empty()),
            content: None,
        };
        for (values, found) in by_partition {
            let partition = match settings.format {
                SourceFormat::Directory => {
                    source.content = Some(Content::Images);
                    plan_whole_files(values, found, Some(1), unit_rows)
                }
                SourceFormat::WebDataset => {
                    source.content = Some(Content::Images);
                    source.check_shard_columns(&values)?;
                    plan_whole_files(values, found, None, unit_rows)
                }
                SourceFormat::Parquet | SourceFormat::Delta => source.plan_tables(values, found, unit_rows).await?,
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

    /// What the image column holds; `None` where no partition is selected.
    pub fn content(&self) -> Option<&Content> {
        self.content.as_ref()
    }

    /// Rows of all partitions before `where`; `None` where only reading tells.
    pub fn num_rows(&self) -> Option<u64> {
        self.partitions.iter().map(|partition| partition.num_rows).sum()
    }

    async fn plan_tables(
        &mut self,
        values: PartitionValues,
        found: Vec<Found>,
        unit_rows: u64,
    ) -> Result<SourcePartition, SourceError> {
        // The log says what columns a Delta table has, for all its files.
        let by_log = self.delta.as_ref().map(|delta| (self.store.url().to_string(), Arc::clone(&delta.schema)));
        if let Some((table, schema)) = &by_log {
            self.check_columns(table, schema, &values)?;
        }
        let delta = self.delta.clone();
        let mut opened = futures::stream::iter(found)
            .map(async |found| {
                let Found { file, client, path, deleted, .. } = found;
                let parquet_error = |source| SourceError::Parquet { file: file.name.clone(), source };
                let mut parquet = ParquetFile::new(Arc::clone(&client), path.clone(), file.size);
                let footer = parquet.footer().await.map_err(parquet_error)?;
                let metadata = footer.decode().map_err(parquet_error)?;
                let table = TableFile { client, path, footer, deleted };
                let deleted = table.deleted_rows(delta.as_deref()).await?;
                Ok::<_, SourceError>((file, table, metadata, deleted))
            })
            .buffered(FOOTERS_IN_FLIGHT)
            .boxed();
        let mut pieces = Vec::new();
        let (mut files, mut tables) = (Vec::new(), Vec::new());
        while let Some((file, table, metadata, deleted)) = opened.try_next().await? {
            if by_log.is_none() {
                self.check_columns(&file.name, metadata.schema(), &values)?;
            }
            let matching = self.matching_row_groups(&file.name, &metadata)?;
            let places = rows::row_groups(&metadata).zip(metadata.metadata().row_groups()).zip(matching).enumerate();
            for (row_group, ((rows, group), _)) in places.filter(|(_, (_, matches))| *matches) {
                let num_rows = rows.end - rows.start - rows::within(&deleted, &rows).len() as u64;
                let num_bytes = u64::try_from(group.compressed_size()).unwrap_or(0);
                pieces.push(Piece { file: files.len(), row_group, num_rows: Some(num_rows), num_bytes });
            }
            files.push(file);
            tables.push(table);
        }
        Ok(SourcePartition::new(values, files, tables, pieces, unit_rows))
    }

    /// Shards have the columns that the pipeline asks for, all of them text.
    fn check_shard_columns(&mut self, values: &PartitionValues) -> Result<(), SourceError> {
        let text = |name: &String| Field::new(name, DataType::Utf8, true);
        self.kept_schema = Arc::new(Schema::new(self.settings.columns.iter().map(text).collect::<Vec<_>>()));
        let Some(predicate) = &self.predicate else { return Ok(()) };
        let columns = std::iter::once(&self.settings.id).chain(&self.settings.columns).map(text);
        predicate
            .check(&values.extend_schema(&Schema::new(columns.collect::<Vec<_>>())))
            .map_err(|source| SourceError::Where { file: self.store.url().to_string(), source })
    }

    /// Checks that the columns the pipeline names are there and have types that fit, before the first row is read.
    fn check_columns(&mut self, name: &str, schema: &Schema, values: &PartitionValues) -> Result<(), SourceError> {
        let column = |column: &str| schema.field_with_name(column).map_err(|_| missing_column(name, schema, column));
        let type_error = |field: &Field, role, wanted| SourceError::ColumnType {
            file: name.to_owned(),
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
        let wanted = "binary, a URI string, struct<bytes, path>, or lists of numbers";
        let content = rows::content_of(image.data_type()).ok_or_else(|| type_error(image, "the image", wanted))?;
        let together = self.content.as_ref().map_or_else(|| Some(content.clone()), |expected| expected.and(&content));
        if let (None, Some(expected)) = (&together, &self.content) {
            return Err(SourceError::ContentsDiffer {
                column: image.name().clone(),
                file: name.to_owned(),
                found: content,
                expected: expected.clone(),
                first_file: self.store.url().to_string(),
            });
        }
        self.content = together;
        let mut kept = Vec::new();
        for kept_name in &self.settings.columns {
            let field = column(kept_name)?;
            let published = published_type(field.data_type())
                .ok_or_else(|| type_error(field, "a kept column", "a type that Delta tables have"))?;
            kept.push(Field::new(kept_name, published, true));
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
                file: name.to_owned(),
                found: field.data_type().clone(),
                expected: expected.data_type().clone(),
                first_file: self.store.url().to_string(),
            });
        }
        if let Some(predicate) = &self.predicate {
            predicate
                .check(&values.extend_schema(schema))
                .map_err(|source| SourceError::Where { file: name.to_owned(), source })?;
        }
        Ok(())
    }

    /// Which row groups can hold a row that satisfies the predicate, by their statistics.
    fn matching_row_groups(&self, name: &str, metadata: &ArrowReaderMetadata) -> Result<Vec<bool>, SourceError> {
        let Some(predicate) = &self.predicate else {
            return Ok(vec![true; metadata.metadata().num_row_groups()]);
        };
        predicate
            .may_match(metadata.metadata(), metadata.schema())
            .map_err(|source| SourceError::Where { file: name.to_owned(), source })
    }
}

/// How much is found out of a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Depth {
    /// What it consists of, cut into units.
    Units,
    /// What columns it has.
    Columns,
}

/// The files of each partition, in order.
type ByPartition = BTreeMap<PartitionValues, Vec<Found>>;

/// The partition keys, which are the given ones or else those of the first file, and the files by partition, in order. All files must
/// have the same keys.
fn group(
    keys: Option<Vec<String>>,
    found: Vec<(PartitionValues, Found)>,
) -> Result<(Vec<String>, ByPartition), SourceError> {
    let mut expected = keys;
    let mut by_partition = ByPartition::new();
    for (values, found) in found {
        let keys: Vec<String> = values.keys().map(str::to_owned).collect();
        match &expected {
            None => expected = Some(keys),
            Some(expected) if *expected == keys => {}
            Some(expected) => {
                return Err(SourceError::PartitionKeys {
                    file: found.file.name,
                    found: keys.join(", "),
                    expected: expected.join(", "),
                });
            }
        }
        by_partition.entry(values).or_default().push(found);
    }
    Ok((expected.unwrap_or_default(), by_partition))
}

/// Plans files that are read as a whole, with `num_rows` rows each.
fn plan_whole_files(
    values: PartitionValues,
    found: Vec<Found>,
    num_rows: Option<u64>,
    unit_rows: u64,
) -> SourcePartition {
    let files: Vec<SourceFile> = found.into_iter().map(|found| found.file).collect();
    let piece = |(file, SourceFile { size, .. }): (usize, &_)| Piece { file, row_group: 0, num_rows, num_bytes: *size };
    let pieces = files.iter().enumerate().map(piece).collect();
    SourcePartition::new(values, files, Vec::new(), pieces, unit_rows)
}

/// Lists the files of the table, sorted by path. A URL that names a single file is a table of one file.
async fn list(stores: &Stores, settings: &config::Source) -> Result<(Store, Vec<ObjectMeta>), SourceError> {
    let endings: &[&str] = match settings.format {
        SourceFormat::Parquet => &PARQUET_ENDINGS,
        SourceFormat::Directory => &IMAGE_ENDINGS,
        SourceFormat::WebDataset => &SHARD_ENDINGS,
        // Its log lists it.
        SourceFormat::Delta => &[],
    };
    let path = settings.table.path();
    // A name with the ending of a file may be a folder all the same: Spark and others write such.
    let mut single = None;
    if settings.format != SourceFormat::Directory && has_ending(path, endings) {
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
    let is_table = settings.format != SourceFormat::Directory;
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
    let path = path.to_ascii_lowercase();
    endings.iter().any(|known| path.strip_suffix(known).is_some_and(|name| name.ends_with('.')))
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
