//! Large files that are no Parquet: arrays of NumPy, and others as bytes.

use bytes::Bytes;
use object_store::{ObjectStoreExt as _, WriteMultipart};

use crate::store::{Store, StoreError};

/// Bytes of a part of an upload. Every store takes parts of this size.
const PART_BYTES: usize = 10 << 20;

/// Parts that are on their way at a time; so much is held of a file.
const PARTS_IN_FLIGHT: usize = 2;

/// What the length of an array's header, with all that comes before it, is a multiple of, so that the values can be mapped into memory.
const HEADER_ALIGNMENT: usize = 64;

/// A file that is written from beginning to end. It is there when it is closed, and not before.
pub struct Upload {
    parts: WriteMultipart,
    store: Store,
    name: String,
}

impl Upload {
    /// Starts the file `name` below the folder of `store`.
    pub async fn create(store: &Store, name: &str) -> Result<Self, StoreError> {
        let upload = store.client().put_multipart(&store.path(name)?).await;
        let upload = upload.map_err(|source| store.request("write", name, source))?;
        let parts = WriteMultipart::new_with_chunk_size(upload, PART_BYTES);
        Ok(Self { parts, store: store.clone(), name: name.to_owned() })
    }

    /// Appends bytes.
    pub async fn write(&mut self, bytes: Vec<u8>) -> Result<(), StoreError> {
        let room = self.parts.wait_for_capacity(PARTS_IN_FLIGHT).await;
        room.map_err(|source| self.store.request("write", &self.name, source))?;
        self.parts.put(Bytes::from(bytes));
        Ok(())
    }

    /// Finishes the file.
    pub async fn close(self) -> Result<(), StoreError> {
        let Self { parts, store, name } = self;
        parts.finish().await.map(drop).map_err(|source| store.request("write", &name, source))
    }

    /// Gives the file up, so that no half of it stays in the store.
    pub async fn abort(self) {
        if let Err(error) = self.parts.abort().await {
            tracing::debug!("cannot take back the unfinished {}: {error}", self.store.url_of(&self.name));
        }
    }
}

/// An array in NumPy's format (version 1.0): float32, little-endian, row after row.
pub struct ArrayFile(Upload);

impl ArrayFile {
    /// Starts the file `name` below the folder of `store`, of the shape (`num_rows`, `dim`): that many values must follow.
    pub async fn create(store: &Store, name: &str, num_rows: usize, dim: usize) -> Result<Self, StoreError> {
        let mut file = Upload::create(store, name).await?;
        file.write(header(num_rows, dim)).await?;
        Ok(Self(file))
    }

    /// Appends rows.
    pub async fn write(&mut self, values: &[f32]) -> Result<(), StoreError> {
        let mut bytes = Vec::with_capacity(size_of_val(values));
        for value in values {
            bytes.extend_from_slice(&value.to_le_bytes());
        }
        self.0.write(bytes).await
    }

    /// Finishes the file.
    pub async fn close(self) -> Result<(), StoreError> {
        self.0.close().await
    }

    /// Gives the file up.
    pub async fn abort(self) {
        self.0.abort().await;
    }
}

/// What stands before the values: magic, version, length of the rest, and a Python dictionary that is filled up with spaces.
fn header(num_rows: usize, dim: usize) -> Vec<u8> {
    let mut header = b"\x93NUMPY\x01\x00\x00\x00".to_vec();
    let before = header.len();
    header.extend(format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({num_rows}, {dim}), }}").bytes());
    let length = (header.len() + 1).next_multiple_of(HEADER_ALIGNMENT);
    header.resize(length - 1, b' ');
    header.push(b'\n');
    let rest = u16::try_from(length - before).unwrap_or(u16::MAX);
    header[before - 2..before].copy_from_slice(&rest.to_le_bytes());
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_is_as_the_format_wants_it_whatever_the_shape() {
        for (num_rows, dim) in [(0, 0), (1, 1), (2624, 128), (usize::MAX, usize::MAX)] {
            let header = header(num_rows, dim);
            assert_eq!(&header[..8], b"\x93NUMPY\x01\x00");
            assert_eq!(usize::from(u16::from_le_bytes([header[8], header[9]])), header.len() - 10);
            assert_eq!((header.len() % 64, header.last()), (0, Some(&b'\n')));
            let text = std::str::from_utf8(&header[10..]).unwrap();
            assert!(text.starts_with("{'descr': '<f4', 'fortran_order': False, 'shape': ("), "{text}");
            assert!(text.trim_end().ends_with(&format!("({num_rows}, {dim}), }}")), "{text}");
        }
    }
}
