//! The published tables: their columns and types, version 1. The only place where columns are named.
//!
//! The files of `schemas/` say what each column means; a test holds the two together. Partition keys of the source become
//! further columns of every table but `runs`; Delta keeps them in the log and in folder names, not in the data files.

use std::sync::Arc;

use arrow::datatypes::{DataType, Field, Fields, Schema, SchemaRef, TimeUnit};

use crate::pixel_stats::PixelStat;

/// Version of the tables' columns; a change that breaks a reader's query raises it.
pub const VERSION: u32 = 1;

/// Names of the columns.
pub mod column {
    /// Key of the row, from the source.
    pub const IMAGE_ID: &str = "image_id";
    /// `ok`, or why the image could not be used.
    pub const STATUS: &str = "status";
    /// The same in words.
    pub const ERROR_MESSAGE: &str = "error_message";
    /// Width of the source image.
    pub const WIDTH: &str = "width";
    /// Height of the source image.
    pub const HEIGHT: &str = "height";
    /// Size of the compressed image.
    pub const IMAGE_BYTES: &str = "image_bytes";
    /// Hash of the compressed image.
    pub const CONTENT_SHA256: &str = "content_sha256";
    /// The vector to search by.
    pub const EMBEDDING: &str = "embedding";
    /// Mean of the posterior, where it is not the embedding.
    pub const MU: &str = "mu";
    /// Log-variance of the posterior.
    pub const LOGVAR: &str = "logvar";
    /// Cell of the embedding, where the table is searched by cells.
    pub const CELL: &str = "cell";
    /// The run that wrote the row.
    pub const RUN_ID: &str = "run_id";
    /// The model package.
    pub const MODEL_SHA256: &str = "model_sha256";
    /// Place in the list of neighbors.
    pub const RANK: &str = "rank";
    /// Key of the neighbor.
    pub const NEIGHBOR_ID: &str = "neighbor_id";
    /// Distance to the neighbor.
    pub const DISTANCE: &str = "distance";
    /// Partition of the neighbor.
    pub const NEIGHBOR_PARTITION: &str = "neighbor_partition";
    /// The group.
    pub const GROUP_ID: &str = "group_id";
    /// Key of the image that represents the group.
    pub const REPRESENTATIVE_ID: &str = "representative_id";
    /// Partition of that image.
    pub const REPRESENTATIVE_PARTITION: &str = "representative_partition";
    /// Distance to that image.
    pub const DISTANCE_TO_REPRESENTATIVE: &str = "distance_to_representative";
    /// Images in the group.
    pub const GROUP_SIZE: &str = "group_size";
    /// The score that decided.
    pub const ANOMALY_SCORE: &str = "anomaly_score";
    /// Which score that is.
    pub const RULE: &str = "rule";
    /// Share of the reference at or below the score.
    pub const SEVERITY_PERCENTILE: &str = "severity_percentile";
    /// Conformal p-value.
    pub const P_VALUE: &str = "p_value";
    /// The cutoff.
    pub const ANOMALY_THRESHOLD: &str = "anomaly_threshold";
    /// The flag.
    pub const IS_ANOMALY: &str = "is_anomaly";
    /// The rules that fired.
    pub const REASONS: &str = "reasons";
    /// The kind of rows that the row was compared with.
    pub const SEGMENT: &str = "segment";
    /// The reference scored against.
    pub const REFERENCE_ID: &str = "reference_id";
}

/// `status` of a row whose image was read and scored.
pub const STATUS_OK: &str = "ok";

/// Names that a source column cannot be kept under.
pub const RESERVED: &[&str] = &[
    column::IMAGE_ID,
    column::STATUS,
    column::ERROR_MESSAGE,
    column::WIDTH,
    column::HEIGHT,
    column::IMAGE_BYTES,
    column::CONTENT_SHA256,
    column::EMBEDDING,
    column::MU,
    column::LOGVAR,
    "mean_squared_error",
    "mean_absolute_error",
    "top_1pct_squared_error",
    "kl_divergence",
    "negative_elbo",
    "pred_score",
    PixelStat::Brightness.name(),
    PixelStat::Contrast.name(),
    PixelStat::Sharpness.name(),
    PixelStat::Complexity.name(),
    column::CELL,
    column::RUN_ID,
    column::MODEL_SHA256,
];

/// The published tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TableName {
    /// One row an image: vector and scores.
    Latents,
    /// One row an image and rank.
    Neighbors,
    /// One row an image that could be read: near-duplicates.
    Groups,
    /// One row an image: flag.
    Anomalies,
    /// One row a run and partition.
    Runs,
}

impl TableName {
    /// All tables.
    pub const ALL: [Self; 5] = [Self::Latents, Self::Neighbors, Self::Groups, Self::Anomalies, Self::Runs];

    /// The table's folder below the output prefix.
    pub fn name(self) -> &'static str {
        match self {
            Self::Latents => "latents",
            Self::Neighbors => "neighbors",
            Self::Groups => "groups",
            Self::Anomalies => "anomalies",
            Self::Runs => "runs",
        }
    }
}

/// Whether a published table has a column of this name, in any case.
pub fn is_column(name: &str) -> bool {
    TableName::ALL.into_iter().filter(|table| *table != TableName::Runs).any(|table| {
        let schema = data_schema(table, &Schema::empty());
        schema.fields().iter().any(|field| field.name().eq_ignore_ascii_case(name))
    })
}

/// The type of a vector column: elements are never null, and are called `element` as Delta and `BigQuery` expect.
///
/// A list, not a fixed-size list: Parquet stores both alike, and readers that take the table's type from the Delta log, which
/// knows lists only, refuse files that claim another one.
pub fn vector_type() -> DataType {
    DataType::List(Arc::new(Field::new("element", DataType::Float32, false)))
}

fn list_of_strings() -> DataType {
    DataType::List(Arc::new(Field::new("element", DataType::Utf8, false)))
}

/// The checks of a partition against the reference.
pub fn drift_type() -> DataType {
    DataType::List(Arc::new(Field::new("element", DataType::Struct(drift_fields()), false)))
}

/// The fields of a check: nullable, for most readers know no others in a struct.
pub fn drift_fields() -> Fields {
    Fields::from(vec![
        Field::new("input", DataType::Utf8, true),
        Field::new("metric", DataType::Utf8, true),
        Field::new("threshold", DataType::Float64, true),
        Field::new("value", DataType::Float64, true),
        Field::new("p_value", DataType::Float64, true),
        Field::new("rows", DataType::Int64, true),
        Field::new("is_anomaly", DataType::Boolean, true),
    ])
}

/// Timestamps: microseconds, UTC.
pub fn timestamp_type() -> DataType {
    DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into()))
}

/// The columns of a table's data files. `kept` are the source's columns that `latents` carries along.
pub fn data_schema(table: TableName, kept: &Schema) -> SchemaRef {
    let required = |name: &str, data_type| Field::new(name, data_type, false);
    let optional = |name: &str, data_type| Field::new(name, data_type, true);
    let fields = match table {
        TableName::Latents => {
            let mut fields = vec![required(column::IMAGE_ID, DataType::Utf8)];
            fields.extend(kept.fields().iter().map(|field| field.as_ref().clone()));
            fields.extend([
                required(column::STATUS, DataType::Utf8),
                optional(column::ERROR_MESSAGE, DataType::Utf8),
                optional(column::WIDTH, DataType::Int32),
                optional(column::HEIGHT, DataType::Int32),
                optional(column::IMAGE_BYTES, DataType::Int64),
                optional(column::CONTENT_SHA256, DataType::Utf8),
                optional(column::EMBEDDING, vector_type()),
                optional(column::MU, vector_type()),
                optional(column::LOGVAR, vector_type()),
            ]);
            fields.extend(crate::score::Rule::OF_IMAGE.map(|rule| optional(rule.name(), DataType::Float64)));
            fields.extend(PixelStat::ALL.map(|stat| optional(stat.name(), DataType::Float64)));
            fields.push(optional(column::CELL, DataType::Int32));
            fields.extend([required(column::RUN_ID, DataType::Utf8), required(column::MODEL_SHA256, DataType::Utf8)]);
            fields
        }
        TableName::Neighbors => vec![
            required(column::IMAGE_ID, DataType::Utf8),
            required(column::RANK, DataType::Int32),
            required(column::NEIGHBOR_ID, DataType::Utf8),
            required(column::DISTANCE, DataType::Float32),
            optional(column::NEIGHBOR_PARTITION, DataType::Utf8),
            required(column::RUN_ID, DataType::Utf8),
        ],
        TableName::Groups => vec![
            required(column::IMAGE_ID, DataType::Utf8),
            required(column::GROUP_ID, DataType::Utf8),
            required(column::REPRESENTATIVE_ID, DataType::Utf8),
            optional(column::REPRESENTATIVE_PARTITION, DataType::Utf8),
            required(column::DISTANCE_TO_REPRESENTATIVE, DataType::Float32),
            required(column::GROUP_SIZE, DataType::Int64),
            required(column::RUN_ID, DataType::Utf8),
        ],
        TableName::Anomalies => {
            let mut fields = vec![
                required(column::IMAGE_ID, DataType::Utf8),
                optional(column::ANOMALY_SCORE, DataType::Float64),
                required(column::RULE, DataType::Utf8),
                optional(column::SEVERITY_PERCENTILE, DataType::Float64),
                optional(column::P_VALUE, DataType::Float64),
                optional(column::ANOMALY_THRESHOLD, DataType::Float64),
                optional(column::IS_ANOMALY, DataType::Boolean),
                required(column::REASONS, list_of_strings()),
            ];
            fields.extend(crate::score::Rule::OF_REFERENCE.map(|rule| optional(rule.name(), DataType::Float64)));
            fields.extend([
                optional(column::SEGMENT, DataType::Utf8),
                required(column::REFERENCE_ID, DataType::Utf8),
                required(column::RUN_ID, DataType::Utf8),
            ]);
            fields
        }
        TableName::Runs => vec![
            optional(column::RUN_ID, DataType::Utf8),
            required("latents_run_id", DataType::Utf8),
            optional("neighbors_run_id", DataType::Utf8),
            optional("groups_run_id", DataType::Utf8),
            required("pipeline", DataType::Utf8),
            optional("partition", DataType::Utf8),
            required("started_at", timestamp_type()),
            required("finished_at", timestamp_type()),
            required("rows_in", DataType::Int64),
            required("rows_ok", DataType::Int64),
            required("rows_rejected", DataType::Int64),
            required("rows_duplicate", DataType::Int64),
            required("rejects", DataType::Utf8),
            optional("rows_flagged", DataType::Int64),
            optional("drift", drift_type()),
            required("embed_secs", DataType::Float64),
            required("neighbors_secs", DataType::Float64),
            required("flag_secs", DataType::Float64),
            optional("neighbors_search", DataType::Utf8),
            optional("neighbors_cells", DataType::Int64),
            optional("neighbors_nprobe", DataType::Int64),
            optional("neighbors_recall", DataType::Float64),
            required("source_url", DataType::Utf8),
            optional("source_version", DataType::Int64),
            required("model_package", DataType::Utf8),
            required(column::MODEL_SHA256, DataType::Utf8),
            optional(column::REFERENCE_ID, DataType::Utf8),
            required("settings", DataType::Utf8),
            required("provider", DataType::Utf8),
            required("onnxruntime_version", DataType::Utf8),
            required("lookalike_version", DataType::Utf8),
        ],
    };
    Arc::new(Schema::new(fields))
}

/// The columns of a table as a reader sees it: those of the data files, and the partition keys as strings.
pub fn table_schema(table: TableName, kept: &Schema, partition_keys: &[String]) -> Schema {
    let data = data_schema(table, kept);
    let mut fields = data.fields().to_vec();
    if table != TableName::Runs {
        fields.extend(partition_keys.iter().map(|key| Arc::new(Field::new(key, DataType::Utf8, true))));
    }
    Schema::new(fields)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Published {
        table: String,
        version: u32,
        description: String,
        column: Vec<PublishedColumn>,
    }

    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct PublishedColumn {
        name: String,
        r#type: String,
        nullable: bool,
        #[serde(default)]
        unit: String,
        description: String,
        #[serde(default)]
        null_rule: String,
    }

    fn delta_type(data_type: &DataType) -> String {
        match data_type {
            DataType::Utf8 => "string".to_owned(),
            DataType::Boolean => "boolean".to_owned(),
            DataType::Int32 => "integer".to_owned(),
            DataType::Int64 => "long".to_owned(),
            DataType::Float32 => "float".to_owned(),
            DataType::Float64 => "double".to_owned(),
            DataType::Timestamp(..) => "timestamp".to_owned(),
            DataType::List(element) => format!("array<{}>", delta_type(element.data_type())),
            DataType::Struct(fields) => {
                let fields = fields.iter().map(|field| format!("{}: {}", field.name(), delta_type(field.data_type())));
                format!("struct<{}>", fields.collect::<Vec<_>>().join(", "))
            }
            other => panic!("no table has {other}"),
        }
    }

    #[test]
    fn the_contracts_in_schemas_are_what_is_written() {
        for table in TableName::ALL {
            let file = format!("{}/schemas/{}.v{VERSION}.toml", env!("CARGO_MANIFEST_DIR"), table.name());
            let published: Published = toml::from_str(&std::fs::read_to_string(&file).unwrap()).unwrap();
            assert_eq!((published.table.as_str(), published.version), (table.name(), VERSION), "{file}");
            assert!(!published.description.is_empty());
            let expected: Vec<_> = data_schema(table, &Schema::empty())
                .fields()
                .iter()
                .map(|field| (field.name().clone(), delta_type(field.data_type()), field.is_nullable()))
                .collect();
            let found: Vec<_> = published
                .column
                .iter()
                .map(|column| (column.name.clone(), column.r#type.clone(), column.nullable))
                .collect();
            assert_eq!(found, expected, "{file}");
            for column in published.column {
                assert!(column.description.len() > 10, "{} of {file} is not described", column.name);
                assert!(!column.unit.contains('\n'));
                let says_when = column.null_rule.starts_with("Null ") && column.null_rule.ends_with('.');
                assert_eq!(says_when, column.nullable, "{} of {file}: when is it null?", column.name);
            }
        }
    }

    #[test]
    fn reserved_names_are_the_columns_of_latents() {
        let schema = data_schema(TableName::Latents, &Schema::empty());
        let names: Vec<&str> = schema.fields().iter().map(|field| field.name().as_str()).collect();
        assert_eq!(names, RESERVED);
    }
}
