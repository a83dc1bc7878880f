//! The files of a model package beside the networks: golden images, and writing a package as a whole.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow::array::{Array as _, AsArray as _, BinaryArray, ListArray, RecordBatch};
use arrow::datatypes::{DataType, Field, Float32Type, Schema};
use bytes::Bytes;
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use parquet::errors::ParquetError;

use super::{CONTRACT_FILE, Contract, Outputs, Role};
use crate::store::{Store, StoreError};

/// Column of the image's bytes in the golden file.
const IMAGE_COLUMN: &str = "image";
/// Column of the input tensor in the golden file.
const INPUT_COLUMN: &str = "input";

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
    /// Reads the golden images, with the outputs of the roles that the contract has.
    pub fn read(bytes: Bytes, outputs: &Outputs) -> Result<Self, GoldenError> {
        let roles: Vec<Role> = outputs.roles().map(|(role, _)| role).collect();
        let mut images = Vec::new();
        for rows in ParquetRecordBatchReaderBuilder::try_new(bytes)?.build()? {
            let rows = rows?;
            let column = |name: &str, wanted| {
                rows.column_by_name(name).ok_or(GoldenError::Column { column: name.to_owned(), wanted })
            };
            let bytes = column(IMAGE_COLUMN, "binary")?
                .as_binary_opt::<i32>()
                .ok_or(GoldenError::Column { column: IMAGE_COLUMN.to_owned(), wanted: "binary" })?;
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
        let outputs = Outputs { mu: Some("mu".to_owned()), ..Outputs::default() };
        assert_eq!(Golden::read(golden.write().unwrap(), &outputs).unwrap(), golden);
    }

    #[test]
    fn a_golden_file_without_a_role_of_the_contract_is_refused_by_name() {
        let golden = Golden { images: vec![GoldenImage { image: vec![1], input: vec![0.5], outputs: vec![] }] };
        let outputs = Outputs { mu: Some("mu".to_owned()), ..Outputs::default() };
        let error = Golden::read(golden.write().unwrap(), &outputs).unwrap_err();
        assert!(error.to_string().contains("`mu`"), "{error}");
    }
}
