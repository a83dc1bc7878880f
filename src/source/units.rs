//! What a partition consists of, and how it is cut into resumable slices of work.
//!
//! A partition is a list of files. They fall into [`Piece`]s that are never divided (a row group, an image, a shard), and
//! consecutive pieces make a unit. The cut depends on the files alone, so every attempt and every machine cuts alike.

use std::collections::HashSet;
use std::sync::Arc;

use chrono::{DateTime, Utc};
use object_store::path::Path;
use object_store::{DynObjectStore, ObjectMeta};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::delta::{DeletedRows, DeltaTable};
use super::{PartitionValues, SourceError};
use crate::parquet_file::Footer;
use crate::store::Store;

/// A unit reads at most about this many compressed source bytes, so that tables of large pictures are resumable too.
const UNIT_MAX_BYTES: u64 = 1 << 30;

/// A file of the source, as far as it tells whether rows are others than they were.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourceFile {
    /// Its path below the table; for a file of a Delta table that lies elsewhere, its URL.
    pub name: String,
    /// Its size in bytes.
    pub size: u64,
    /// What changes with its content: the `ETag` where the store has one (S3, Azure, GCS), else the time of the last write. Files of
    /// a Delta table are never changed, so there it is the id of the deletion vector, empty where no row is deleted.
    pub version: String,
}

/// One partition of the source: what a run publishes atomically.
#[derive(Debug)]
pub struct SourcePartition {
    /// The values of the partition keys; empty for a table without partitions.
    pub values: PartitionValues,
    /// The files, in the order of the rows.
    pub files: Vec<SourceFile>,
    /// The slices of work, in the order of the rows.
    pub units: Vec<WorkUnit>,
    /// Rows before `where`, without those of row groups that it excludes; `None` where only reading tells.
    pub num_rows: Option<u64>,
    /// Compressed bytes of the files.
    pub num_bytes: u64,
    /// Hash of the files' names, sizes and versions: another hash means other rows.
    pub identity: String,
    /// The opened Parquet files, as many as `files`; none for other formats.
    pub(super) tables: Vec<TableFile>,
    pieces: Vec<Piece>,
    unit_rows: u64,
}

/// A resumable slice of a partition.
#[derive(Debug)]
pub struct WorkUnit {
    /// Number within the partition, from 0.
    pub index: usize,
    /// Rows before `where`; `None` where only reading tells.
    pub num_rows: Option<u64>,
    /// What it consists of, in the order of the rows.
    pub(super) pieces: Vec<Piece>,
}

/// The least that is read at a time: a row group, an image file, or a shard.
#[derive(Debug, Clone, Copy)]
pub(super) struct Piece {
    /// Number of the file in its partition.
    pub(super) file: usize,
    /// Number of the row group in the file; 0 for what has no row groups.
    pub(super) row_group: usize,
    /// Rows, where that is known before reading.
    pub(super) num_rows: Option<u64>,
    /// Compressed bytes.
    pub(super) num_bytes: u64,
}

/// A file of the source that was found, and where it lies.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) file: SourceFile,
    pub(super) client: Arc<DynObjectStore>,
    pub(super) path: Path,
    pub(super) modified: DateTime<Utc>,
    pub(super) deleted: Option<DeletedRows>,
}

/// A Parquet file of the source whose footer has been read.
#[derive(Debug)]
pub(super) struct TableFile {
    pub(super) client: Arc<DynObjectStore>,
    pub(super) path: Path,
    pub(super) footer: Footer,
    pub(super) deleted: Option<DeletedRows>,
}

impl Found {
    /// A file that a listing of the table has.
    pub(super) fn listed(store: &Store, object: ObjectMeta) -> Self {
        let modified = object.last_modified;
        let version = object.e_tag.unwrap_or_else(|| modified.to_rfc3339());
        let file = SourceFile { name: store.relative(&object.location), size: object.size, version };
        Self { file, client: Arc::clone(store.client()), path: object.location, modified, deleted: None }
    }
}

impl TableFile {
    /// The numbers of the deleted rows, ascending, where the file is one of a Delta table.
    pub(super) async fn deleted_rows(&self, delta: Option<&DeltaTable>) -> Result<Vec<u64>, SourceError> {
        match (delta, &self.deleted) {
            (Some(delta), Some(deleted)) => delta.deleted_rows(deleted).await,
            _ => Ok(Vec::new()),
        }
    }
}

impl SourcePartition {
    /// Cuts units of at most `unit_rows` rows (more where one piece has more).
    pub(super) fn new(
        values: PartitionValues,
        files: Vec<SourceFile>,
        tables: Vec<TableFile>,
        pieces: Vec<Piece>,
        unit_rows: u64,
    ) -> Self {
        let mut identity = Sha256::new();
        for file in &files {
            identity.update(format!("{}\0{}\0{}\n", file.name, file.size, file.version));
        }
        Self {
            units: cut(pieces.iter().copied(), unit_rows),
            num_rows: pieces.iter().map(|piece| piece.num_rows).sum(),
            num_bytes: files.iter().map(|file| file.size).sum(),
            identity: crate::hash::hex(&identity.finalize()),
            values,
            files,
            tables,
            pieces,
            unit_rows,
        }
    }

    /// The opened file that pieces of one file lie in.
    pub(super) fn file_of(&self, pieces: &[Piece]) -> Option<(&SourceFile, &TableFile)> {
        let number = pieces.first()?.file;
        Some((self.files.get(number)?, self.tables.get(number)?))
    }

    /// The units cut from the files of these names alone, as if the partition had no others.
    pub fn units_of(&self, names: &HashSet<String>) -> Vec<WorkUnit> {
        cut(self.pieces.iter().copied().filter(|piece| names.contains(&self.files[piece.file].name)), self.unit_rows)
    }
}

/// Puts consecutive pieces together as long as they are within the bounds. A piece of unknown rows is a unit of its own.
fn cut(pieces: impl Iterator<Item = Piece>, unit_rows: u64) -> Vec<WorkUnit> {
    let mut units: Vec<WorkUnit> = Vec::new();
    let mut num_bytes = 0;
    for piece in pieces {
        let num_rows = match (units.last().map(|unit| unit.num_rows), piece.num_rows) {
            (Some(Some(open)), Some(more)) => open.checked_add(more),
            _ => None,
        };
        num_bytes += piece.num_bytes;
        match units.last_mut() {
            Some(unit) if num_rows.is_some_and(|rows| rows <= unit_rows) && num_bytes <= UNIT_MAX_BYTES => {
                unit.num_rows = num_rows;
                unit.pieces.push(piece);
            }
            _ => {
                num_bytes = piece.num_bytes;
                units.push(WorkUnit { index: units.len(), num_rows: piece.num_rows, pieces: vec![piece] });
            }
        }
    }
    units
}

#[cfg(test)]
mod tests {
    use super::*;

    fn partition(pieces: &[(usize, Option<u64>, u64)], unit_rows: u64) -> SourcePartition {
        let num_files = pieces.iter().map(|(file, ..)| file + 1).max().unwrap_or(0);
        let file = |number| SourceFile { name: format!("{number}.parquet"), size: 7, version: "v".to_owned() };
        let piece = |&(file, num_rows, num_bytes): &_| Piece { file, row_group: 0, num_rows, num_bytes };
        let pieces = pieces.iter().map(piece).collect();
        SourcePartition::new(PartitionValues::default(), (0..num_files).map(file).collect(), vec![], pieces, unit_rows)
    }

    /// Files and rows of each unit.
    fn shape(units: &[WorkUnit]) -> Vec<(Vec<usize>, Option<u64>)> {
        assert!(units.iter().enumerate().all(|(number, unit)| unit.index == number));
        units.iter().map(|unit| (unit.pieces.iter().map(|piece| piece.file).collect(), unit.num_rows)).collect()
    }

    #[test]
    fn units_have_bounded_rows_and_bytes_and_no_piece_is_divided() {
        let by_rows =
            partition(&[(0, Some(4), 1), (1, Some(6), 1), (2, Some(1), 1), (3, Some(25), 1), (4, Some(0), 1)], 10);
        let expected = [(vec![0, 1], Some(10)), (vec![2], Some(1)), (vec![3], Some(25)), (vec![4], Some(0))];
        assert_eq!(shape(&by_rows.units), expected);
        assert_eq!(by_rows.num_rows, Some(36));
        let by_bytes =
            partition(&[(0, Some(1), UNIT_MAX_BYTES), (1, Some(1), 1), (2, Some(1), UNIT_MAX_BYTES - 1)], 10);
        assert_eq!(shape(&by_bytes.units), [(vec![0], Some(1)), (vec![1, 2], Some(2))]);
        assert!(partition(&[], 10).units.is_empty());
    }

    #[test]
    fn what_has_unknown_rows_is_a_unit_of_its_own() {
        let shards = partition(&[(0, None, 1), (1, None, 1), (2, Some(1), 1)], 10);
        assert_eq!(shape(&shards.units), [(vec![0], None), (vec![1], None), (vec![2], Some(1))]);
        assert_eq!(shards.num_rows, None);
    }

    #[test]
    fn units_of_some_files_are_cut_as_if_there_were_no_others() {
        let all = partition(&[(0, Some(6), 1), (1, Some(6), 1), (2, Some(4), 1), (3, Some(1), 1)], 10);
        let names = HashSet::from(["0.parquet".to_owned(), "2.parquet".to_owned(), "gone.parquet".to_owned()]);
        assert_eq!(shape(&all.units_of(&names)), [(vec![0, 2], Some(10))]);
        assert!(all.units_of(&HashSet::new()).is_empty());
    }

    #[test]
    fn the_identity_changes_with_every_name_size_and_version() {
        let with = |change: fn(&mut SourceFile)| {
            let mut file = SourceFile { name: "a".to_owned(), size: 1, version: "x".to_owned() };
            change(&mut file);
            SourcePartition::new(PartitionValues::default(), vec![file], vec![], vec![], 1).identity
        };
        let identities: HashSet<String> = HashSet::from([
            with(|_| ()),
            with(|file| file.name.push('b')),
            with(|file| file.size = 2),
            with(|file| file.version.push('y')),
        ]);
        assert_eq!(identities.len(), 4);
    }
}
