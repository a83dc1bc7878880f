//! The files of a model package beside the networks: their names, golden images, and writing a package as a whole.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow::array::{Array as _, AsArray as _, BinaryArray, ListArray, RecordBatch};
use arrow::datatypes::{DataType, Field, Float32Type, Schema};
use bytes::Bytes;
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use parquet::errors::ParquetError;
use parquet::file::metadata::{ParquetMetaData, RowGroupMetaData};

use super::{CONTRACT_FILE, Contract, Role};
use crate::caught::caught;
use crate::store::{Store, StoreError};

/// Column of the image's bytes in the golden file.
const IMAGE_COLUMN: &str = "image";
/// Column of the input tensor in the golden file.
const INPUT_COLUMN: &str = "input";

/// Golden images of a package at most: each is decoded and run at every start.
pub const MAX_GOLDEN_IMAGES: usize = 1024;

/// Values of a column of golden tensors at most, 512 MiB of them. Parquet can say a thousand zeros in a byte.
const MAX_GOLDEN_VALUES: usize = 1 << 27;

/// Bytes of all golden images together at most.
const MAX_GOLDEN_IMAGE_BYTES: usize = 256 << 20;

/// Golden images read at a time.
const GOLDEN_BATCH: usize = 8;

/// Signs that no file of a package has in its name: some stores and systems give them a meaning, and ONNX Runtime reads `*/…` as a
/// place in memory.
const FORBIDDEN_SIGNS: &[char] = &['\\', ':', '*', '?', '"', '<', '>', '|'];

/// Whether a name, relative to the package's folder and with `/` between its parts, is that of a file in it.
pub fn is_file_name(name: &str) -> bool {
    let is_name = |part: &str| !matches!(part, "" | "." | "..");
    name.split('/').all(is_name) && !name.contains(|sign: char| sign.is_control() || FORBIDDEN_SIGNS.contains(&sign))
}

/// Whether a file of a package on the local disk is a link out of its folder. Other stores have no links.
pub fn is_link_out_of(store: &Store, file: &str) -> bool {
    let Ok(folder) = store.url().to_file_path() else { return false };
    // What is not there is no link; reading it will say so.
    let (Ok(place), Ok(folder)) = (folder.join(file).canonicalize(), folder.canonicalize()) else { return false };
    !place.starts_with(folder)
}

/// A golden file that cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GoldenError {
    /// It is no Parquet file.
    #[error("it is not a readable Parquet file")]
    Parquet(#[from] ParquetError),
    /// A batch of it does not decode, or does not fit together.
    #[error("its rows cannot be read or written")]
    Arrow(#[from] arrow::error::ArrowError),
    /// A column is missing or of another type.
    #[error("it needs a column `{column}` of type {wanted}")]
    Column {
        /// The column.
        column: String,
        /// The type.
        wanted: &'static str,
    },
    /// There is nothing to replay.
    #[error("it has no rows")]
    Empty,
    /// There are more images than anybody replays.
    #[error("it has {found} rows, and a package has {MAX_GOLDEN_IMAGES} golden images at most")]
    TooManyRows {
        /// Rows by the file's footer.
        found: i64,
    },
    /// A column has more or fewer values than its rows can have.
    #[error("its column `{column}` has {found} values for {num_rows} rows, where {expected}")]
    Shape {
        /// The column.
        column: String,
        /// Values by the file's footer, or bytes.
        found: i64,
        /// Rows by the file's footer.
        num_rows: i64,
        /// What there should be.
        expected: String,
    },
    /// The Parquet reader met something that its authors did not think of.
    #[error("the Parquet reader panicked on it: {0}")]
    Panicked(String),
}

/// The golden images of a package.
#[derive(Debug, Clone, PartialEq)]
pub struct Golden {
    /// At least one.
    pub images: Vec<GoldenImage>,
}

/// An image as the exporter saw it go through the model.
#[derive(Debug, Clone, PartialEq)]
pub struct GoldenImage {
    /// The compressed image.
    pub image: Vec<u8>,
    /// Its input tensor.
    pub input: Vec<f32>,
    /// The outputs, by role.
    pub outputs: Vec<(Role, Vec<f32>)>,
}

impl Golden {
    /// Reads the golden images of a network whose input has `num_values` values, with the outputs of these roles.
    pub fn read(bytes: Bytes, num_values: usize, roles: &[Role]) -> Result<Self, GoldenError> {
        // The reader owns all that it touches.
        caught(|| Self::read_parquet(bytes, num_values, roles)).unwrap_or_else(|said| Err(GoldenError::Panicked(said)))
    }

    fn read_parquet(bytes: Bytes, num_values: usize, roles: &[Role]) -> Result<Self, GoldenError> {
        let reader = ParquetRecordBatchReaderBuilder::try_new(bytes)?.with_batch_size(GOLDEN_BATCH);
        check_sizes(reader.metadata(), num_values)?;
        let mut images: Vec<GoldenImage> = Vec::new();
        let mut image_bytes = 0;
        for rows in reader.build()? {
            let rows = rows?;
            let column = |name: &str, wanted| {
                rows.column_by_name(name).ok_or(GoldenError::Column { column: name.to_owned(), wanted })
            };
            let bytes = column(IMAGE_COLUMN, "binary")?
                .as_binary_opt::<i32>()
                .ok_or(GoldenError::Column { column: IMAGE_COLUMN.to_owned(), wanted: "binary" })?;
            image_bytes += bytes.value_data().len();
            if image_bytes > MAX_GOLDEN_IMAGE_BYTES {
                return Err(GoldenError::Shape {
                    column: IMAGE_COLUMN.to_owned(),
                    found: i64::try_from(image_bytes).unwrap_or(i64::MAX),
                    num_rows: to_count(images.len() + rows.num_rows()),
                    expected: format!("{MAX_GOLDEN_IMAGE_BYTES} bytes are the most"),
                });
            }
            let input = tensors(&rows, INPUT_COLUMN)?;
            let outputs: Vec<(Role, Vec<Vec<f32>>)> = roles
                .iter()
                .map(|role| Ok((*role, tensors(&rows, role.name())?)))
                .collect::<Result<_, GoldenError>>()?;
            for (row, input) in input.into_iter().enumerate() {
                images.push(GoldenImage {
                    image: bytes.value(row).to_vec(),
                    input,
                    outputs: outputs.iter().map(|(role, rows)| (*role, rows[row].clone())).collect(),
                });
            }
        }
        if images.is_empty() { Err(GoldenError::Empty) } else { Ok(Self { images }) }
    }

    /// Writes the golden images as a Parquet file.
    pub fn write(&self) -> Result<Bytes, GoldenError> {
        let list = |name: &str, rows: &mut dyn Iterator<Item = &Vec<f32>>| {
            let values = ListArray::from_iter_primitive::<Float32Type, _, _>(
                rows.map(|row| Some(row.iter().copied().map(Some))),
            );
            (Field::new(name, values.data_type().clone(), false), Arc::new(values) as _)
        };
        let images = BinaryArray::from_iter_values(self.images.iter().map(|image| &image.image));
        let mut columns: Vec<(Field, arrow::array::ArrayRef)> = vec![
            (Field::new(IMAGE_COLUMN, DataType::Binary, false), Arc::new(images)),
            list(INPUT_COLUMN, &mut self.images.iter().map(|image| &image.input)),
        ];
        let roles = self.images.first().map(|image| image.outputs.len()).unwrap_or_default();
        for number in 0..roles {
            let role = self.images[0].outputs[number].0;
            columns.push(list(role.name(), &mut self.images.iter().map(|image| &image.outputs[number].1)));
        }
        let (fields, columns): (Vec<Field>, Vec<_>) = columns.into_iter().unzip();
        let rows = RecordBatch::try_new(Arc::new(Schema::new(fields)), columns)?;
        let mut file = Vec::new();
        let mut writer = ArrowWriter::try_new(&mut file, rows.schema(), None)?;
        writer.write(&rows)?;
        writer.close()?;
        Ok(file.into())
    }
}

/// Checks what a golden file says of its sizes, before there is room made for them.
fn check_sizes(metadata: &ParquetMetaData, input_values: usize) -> Result<(), GoldenError> {
    let num_rows = metadata.file_metadata().num_rows();
    if !(0..=to_count(MAX_GOLDEN_IMAGES)).contains(&num_rows) {
        return Err(GoldenError::TooManyRows { found: num_rows });
    }
    let mut found: BTreeMap<&str, i64> = BTreeMap::new();
    for column in metadata.row_groups().iter().flat_map(RowGroupMetaData::columns) {
        let name = column.column_path().parts().first().map(String::as_str).unwrap_or_default();
        let values = found.entry(name).or_default();
        *values = values.saturating_add(column.num_values());
    }
    let shape =
        |column: &str, found, expected| GoldenError::Shape { column: column.to_owned(), found, num_rows, expected };
    for (column, found) in found {
        if !(0..=to_count(MAX_GOLDEN_VALUES)).contains(&found) {
            return Err(shape(column, found, format!("{MAX_GOLDEN_VALUES} are the most")));
        }
        if column == INPUT_COLUMN && Some(found) != num_rows.checked_mul(to_count(input_values)) {
            return Err(shape(column, found, format!("an input of the network has {input_values}")));
        }
    }
    Ok(())
}

/// A count as Parquet has it.
fn to_count(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

fn tensors(rows: &RecordBatch, name: &str) -> Result<Vec<Vec<f32>>, GoldenError> {
    let error = || GoldenError::Column { column: name.to_owned(), wanted: "list<float32>" };
    let lists = rows.column_by_name(name).and_then(|column| column.as_list_opt::<i32>()).ok_or_else(error)?;
    lists
        .iter()
        .map(|list| {
            let list = list.ok_or_else(error)?;
            Ok(list.as_primitive_opt::<Float32Type>().ok_or_else(error)?.values().to_vec())
        })
        .collect()
}

/// Writes a package: the files first and the contract last, so that a package is complete once its contract is there.
///
/// The hashes of `files` are put into the contract here. Returns the hash that stands for the package.
pub async fn write(
    store: &Store,
    mut contract: Contract,
    files: BTreeMap<String, Bytes>,
) -> Result<String, WriteError> {
    contract.files = files.iter().map(|(name, bytes)| (name.clone(), crate::hash::sha256(bytes))).collect();
    let text = toml::to_string_pretty(&contract)?;
    for (name, bytes) in files {
        store.put(&name, bytes).await?;
    }
    let sha256 = crate::hash::sha256(text.as_bytes());
    store.put(CONTRACT_FILE, text.into()).await?;
    Ok(sha256)
}

/// A package that could not be written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WriteError {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The contract has no TOML form.
    #[error("the contract of the new model package cannot be written as TOML")]
    Contract(#[from] toml::ser::Error),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_images_survive_writing_and_reading() {
        let golden = Golden {
            images: vec![
                GoldenImage { image: vec![1, 2], input: vec![0.5, 0.25], outputs: vec![(Role::Mu, vec![1.0])] },
                GoldenImage { image: vec![3], input: vec![0.0, 1.0], outputs: vec![(Role::Mu, vec![-2.0])] },
            ],
        };
        assert_eq!(Golden::read(golden.write().unwrap(), 2, &[Role::Mu]).unwrap(), golden);
    }

    #[test]
    fn a_golden_file_without_a_role_of_the_contract_is_refused_by_name() {
        let golden = Golden { images: vec![GoldenImage { image: vec![1], input: vec![0.5], outputs: vec![] }] };
        let error = Golden::read(golden.write().unwrap(), 1, &[Role::Mu]).unwrap_err();
        assert!(error.to_string().contains("`mu`"), "{error}");
    }

    fn golden(num_images: usize, num_values: usize) -> Bytes {
        let image = GoldenImage {
            image: vec![1, 2, 3],
            input: (0..num_values).map(|value| value as f32).collect(),
            outputs: vec![(Role::Mu, vec![1.0; 5])],
        };
        Golden { images: vec![image; num_images] }.write().unwrap()
    }

    fn read(bytes: Bytes, num_values: usize) -> Result<Golden, GoldenError> {
        Golden::read(bytes, num_values, &[Role::Mu])
    }

    #[test]
    fn golden_tensors_of_another_shape_are_refused_before_they_are_read() {
        assert_eq!(read(golden(3, 12), 12).unwrap().images.len(), 3);
        let error = read(golden(3, 12), 1 << 40).unwrap_err().to_string();
        assert_eq!(
            error,
            "its column `input` has 36 values for 3 rows, where an input of the network has 1099511627776"
        );
        let error = read(golden(MAX_GOLDEN_IMAGES + 1, 1), 1).unwrap_err().to_string();
        assert_eq!(error, "it has 1025 rows, and a package has 1024 golden images at most");
        // A few kilobytes that say a billion zeros.
        let zeros = GoldenImage {
            image: vec![1],
            input: vec![0.0],
            outputs: vec![(Role::Mu, vec![0.0; MAX_GOLDEN_VALUES + 1])],
        };
        let error = read(Golden { images: vec![zeros] }.write().unwrap(), 1).unwrap_err().to_string();
        assert_eq!(error, "its column `mu` has 134217729 values for 1 rows, where 134217728 are the most");
    }

    #[test]
    fn a_damaged_golden_file_is_an_error_or_another_file() {
        let whole = golden(2, 6);
        for place in 0..whole.len() {
            for damage in [0x01, 0x80, 0xFF] {
                let mut bytes = whole.to_vec();
                bytes[place] ^= damage;
                if let Ok(golden) = read(bytes.into(), 6) {
                    assert!(golden.images.len() <= MAX_GOLDEN_IMAGES);
                }
            }
            assert!(read(whole.slice(..place), 6).is_err());
        }
    }

    #[test]
    fn names_of_files_stay_in_the_package() {
        for name in ["vae.onnx", "weights/layer 1.bin", "späte Zelle.onnx", "..weights", "a..b"] {
            assert!(is_file_name(name), "{name}");
        }
        let outside =
            ["", ".", "..", "../vae.onnx", "/etc/passwd", "a//b", "a/", "a/../../b", "a/./b", "C:\\vae.onnx", "a\\b"];
        for name in outside.into_iter().chain(["file:///vae.onnx", "*/_ORT_MEM_ADDR_/*", "a\nb", "a\0b"]) {
            assert!(!is_file_name(name), "{name}");
        }
    }
}
