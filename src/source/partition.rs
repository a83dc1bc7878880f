//! Hive partitions: `key=value` folders in a path.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use arrow::array::{RecordBatch, StringArray, new_null_array};
use arrow::datatypes::{DataType, Field, Schema};
use arrow::error::ArrowError;
use percent_encoding::{AsciiSet, CONTROLS};
use serde::{Deserialize, Serialize};

/// How a null value is spelled in a folder name, by the convention of Hive.
const HIVE_NULL: &str = "__HIVE_DEFAULT_PARTITION__";

/// Characters that Hive and Spark escape in folder names.
const UNSAFE: AsciiSet = CONTROLS
    .add(b'"')
    .add(b'#')
    .add(b'%')
    .add(b'\'')
    .add(b'*')
    .add(b'/')
    .add(b':')
    .add(b'=')
    .add(b'?')
    .add(b'\\')
    .add(b'{')
    .add(b'[')
    .add(b']')
    .add(b'^');

/// The `key=value` pairs of a partition, outermost first. `None` is SQL's null.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PartitionValues(Vec<(String, Option<String>)>);

impl PartitionValues {
    /// Reads the pairs from the folders of a file's path.
    pub fn from_path(relative: &str) -> Self {
        let folders = relative.rsplit_once('/').map_or("", |(folders, _)| folders);
        Self(
            folders
                .split('/')
                .filter_map(|folder| folder.split_once('='))
                .map(|(key, value)| {
                    let value = unescape(value);
                    // Delta keeps an empty value as null, so it is null here too.
                    (unescape(key), (value != HIVE_NULL && !value.is_empty()).then_some(value))
                })
                .collect(),
        )
    }

    /// Puts pairs together.
    pub fn new(pairs: Vec<(String, Option<String>)>) -> Self {
        Self(pairs)
    }

    /// What the partition is called in messages, where a table without partitions has one too.
    pub fn name(&self) -> String {
        if self.is_empty() { "the table".to_owned() } else { self.to_string() }
    }

    /// The keys, outermost first.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|(key, _)| key.as_str())
    }

    /// The pairs, outermost first.
    pub fn pairs(&self) -> &[(String, Option<String>)] {
        &self.0
    }

    /// Whether the table has no partitions.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The `key=value` folders of the partition, outermost first, with `%XX` for what folder names cannot hold.
    pub fn folders(&self) -> impl Iterator<Item = String> {
        self.0.iter().map(|(key, value)| {
            let value = value.as_deref().map_or_else(|| HIVE_NULL.to_owned(), escape);
            format!("{}={value}", escape(key))
        })
    }

    /// The pairs by key.
    pub fn to_map(&self) -> BTreeMap<String, Option<String>> {
        self.0.iter().cloned().collect()
    }

    /// The schema of a file with the partition keys as further string columns, where the file has none of that name.
    pub fn extend_schema(&self, schema: &Schema) -> Schema {
        let mut fields = schema.fields().to_vec();
        for key in self.keys().filter(|key| schema.field_with_name(key).is_err()) {
            fields.push(Field::new(key, DataType::Utf8, true).into());
        }
        Schema::new(fields)
    }

    /// The value of a key; `None` where it is null, or there is no such key.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.0.iter().find(|(name, _)| name == key).and_then(|(_, value)| value.as_deref())
    }

    /// The rows of a file with the partition keys as further string columns, where the file has none of that name.
    pub fn extend_batch(&self, rows: &RecordBatch) -> Result<RecordBatch, ArrowError> {
        let schema = Arc::new(self.extend_schema(&rows.schema()));
        let mut columns = rows.columns().to_vec();
        for field in schema.fields().iter().skip(rows.num_columns()) {
            let pair = self.0.iter().find(|(key, _)| key == field.name());
            columns.push(match pair.and_then(|(_, value)| value.as_deref()) {
                Some(value) => Arc::new(StringArray::from(vec![value; rows.num_rows()])),
                None => new_null_array(&DataType::Utf8, rows.num_rows()),
            });
        }
        RecordBatch::try_new(schema, columns)
    }
}

impl fmt::Display for PartitionValues {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, (key, value)) in self.0.iter().enumerate() {
            let separator = if number == 0 { "" } else { "/" };
            write!(f, "{separator}{key}={}", value.as_deref().unwrap_or(HIVE_NULL))?;
        }
        Ok(())
    }
}

/// Writes characters that Hive and Spark do not put into folder names as `%XX`.
fn escape(text: &str) -> String {
    percent_encoding::utf8_percent_encode(text, &UNSAFE).to_string()
}

/// Undoes the `%XX` by which Hive and Spark write characters that folder names cannot hold.
fn unescape(text: &str) -> String {
    percent_encoding::percent_decode_str(text).decode_utf8_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_come_from_folders_and_not_from_the_file_name() {
        let values = PartitionValues::from_path("ds=2026-11-22/region=a%2Fb/x=1.parquet");
        assert_eq!(
            values.pairs(),
            [("ds".to_owned(), Some("2026-11-22".to_owned())), ("region".to_owned(), Some("a/b".to_owned()))]
        );
    }

    #[test]
    fn folders_read_back_as_the_values_they_were_made_of() {
        for value in [Some("2026-11-22"), Some("a/b=c:d%e"), Some("größe 1"), None] {
            let values =
                PartitionValues::new(vec![("ds".to_owned(), value.map(str::to_owned)), ("b=".to_owned(), None)]);
            let path: Vec<String> = values.folders().chain(["x.parquet".to_owned()]).collect();
            assert_eq!(PartitionValues::from_path(&path.join("/")), values);
        }
    }

    #[test]
    fn the_null_folder_of_hive_is_null() {
        let values = PartitionValues::from_path("ds=__HIVE_DEFAULT_PARTITION__/x.parquet");
        assert_eq!(values.pairs(), [("ds".to_owned(), None)]);
        assert_eq!(values.to_string(), "ds=__HIVE_DEFAULT_PARTITION__");
    }

    #[test]
    fn an_empty_value_is_null_as_delta_has_it() {
        assert_eq!(PartitionValues::from_path("ds=/x.parquet").pairs(), [("ds".to_owned(), None)]);
    }

    #[test]
    fn a_flat_table_has_no_pairs() {
        assert!(PartitionValues::from_path("x.parquet").is_empty());
    }
}
