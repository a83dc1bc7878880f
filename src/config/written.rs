//! The pipeline file as written: the keys and their types, each value with its place in the file.
//!
//! Every key is optional here and no value is checked beyond its type; `resolve` knows what is required and what makes
//! sense. The structs are the one place where the keys of the file are named.

use std::fmt;
use std::marker::PhantomData;
use std::num::NonZeroU64;
use std::ops::Range;

use serde::de::value::MapAccessDeserializer;
use serde::de::{self, Deserialize, Deserializer, MapAccess, Visitor};
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::problem::{Fault, Problems};
use super::{Device, Duplicates, NeighborScope, Publish, Search, SourceFormat};
use crate::decode::DecodeMode;
use crate::neighbors::exact::Metric;
use crate::redact::redact;
use crate::score::Rule;

/// Units of byte sizes, with their bytes. The decimal ones are those of disk makers, the binary ones those of memory.
const BYTE_UNITS: [(&str, u64); 6] =
    [("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30), ("KB", 1_000), ("MB", 1_000_000), ("GB", 1_000_000_000)];

/// What the TOML and serde libraries call types, and what a person who writes a pipeline file calls them.
const TYPE_NAMES: [(&str, &str); 6] = [
    ("wanted string or table", "expected a string"),
    ("expected i64", "expected an integer"),
    ("expected f64", "expected a number"),
    ("expected a sequence", "expected a list"),
    ("found sequence", "found a list"),
    ("found map", "found a table"),
];

/// The whole file.
#[derive(Debug, Default, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Written {
    pub(super) pipeline: Option<Spanned<Table<PipelineTable>>>,
    pub(super) source: Option<Spanned<Table<SourceTable>>>,
    pub(super) model: Option<Spanned<Table<ModelTable>>>,
    pub(super) encoder: Option<Spanned<Table<EncoderTable>>>,
    pub(super) execution: Option<Spanned<Table<ExecutionTable>>>,
    pub(super) neighbors: Option<Spanned<Table<NeighborsTable>>>,
    pub(super) anomaly: Option<Spanned<Table<AnomalyTable>>>,
    pub(super) drift: Option<Spanned<Table<DriftTable>>>,
    pub(super) report: Option<Spanned<Table<ReportTable>>>,
    pub(super) output: Option<Spanned<Table<OutputTable>>>,
    pub(super) limits: Option<Spanned<Table<LimitsTable>>>,
}

/// `[pipeline]`
#[derive(Debug, Default, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct PipelineTable {
    pub(super) name: Option<Spanned<String>>,
}

/// `[source]`
#[derive(Debug, Default, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct SourceTable {
    pub(super) table: Option<Spanned<String>>,
    pub(super) format: Option<SourceFormat>,
    pub(super) id: Option<Spanned<String>>,
    pub(super) image: Option<Spanned<String>>,
    pub(super) columns: Option<Spanned<Vec<Spanned<String>>>>,
    #[serde(rename = "where")]
    pub(super) predicate: Option<Spanned<String>>,
    pub(super) duplicates: Option<Duplicates>,
    pub(super) partition: Option<Vec<Spanned<String>>>,
}

/// `[model]`
#[derive(Debug, Default, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct ModelTable {
    pub(super) package: Option<Spanned<String>>,
    pub(super) sha256: Option<Spanned<String>>,
    pub(super) elbo_samples: Option<Spanned<i64>>,
}

/// `[encoder]`
#[derive(Debug, Default, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct EncoderTable {
    pub(super) package: Option<Spanned<String>>,
    pub(super) sha256: Option<Spanned<String>>,
}

/// `[execution]`
#[derive(Debug, Default, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct ExecutionTable {
    pub(super) device: Option<Device>,
    pub(super) batch_size: Option<Spanned<i64>>,
    pub(super) workers: Option<Spanned<i64>>,
    pub(super) threads: Option<Spanned<i64>>,
    pub(super) unit_rows: Option<Spanned<i64>>,
    pub(super) memory_limit: Option<ByteSize>,
    pub(super) decode: Option<DecodeMode>,
    pub(super) tf32: Option<bool>,
    pub(super) gpu_memory_limit: Option<ByteSize>,
}

/// `[neighbors]`
#[derive(Debug, Default, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct NeighborsTable {
    pub(super) enabled: Option<bool>,
    pub(super) k: Option<Spanned<i64>>,
    pub(super) metric: Option<Metric>,
    pub(super) scope: Option<NeighborScope>,
    pub(super) reference: Option<Spanned<String>>,
    pub(super) search: Option<Spanned<Search>>,
    pub(super) recall: Option<Spanned<f64>>,
    pub(super) nprobe: Option<Spanned<i64>>,
    pub(super) cells: Option<Spanned<i64>>,
    pub(super) duplicate_distance: Option<Spanned<f64>>,
}

/// `[anomaly]`
#[derive(Debug, Default, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct AnomalyTable {
    pub(super) enabled: Option<bool>,
    pub(super) rule: Option<Rule>,
    pub(super) threshold: Option<Spanned<Table<ThresholdTable>>>,
    pub(super) reference: Option<Spanned<String>>,
    pub(super) segment: Option<Spanned<String>>,
    pub(super) k: Option<Spanned<i64>>,
}

/// `[anomaly.threshold]`, usually in braces
#[derive(Debug, Default, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct ThresholdTable {
    pub(super) contamination: Option<Spanned<f64>>,
    pub(super) quantile: Option<Spanned<f64>>,
    pub(super) value: Option<Spanned<f64>>,
    pub(super) fdr: Option<Spanned<f64>>,
}

/// `[drift]`
#[derive(Debug, Default, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct DriftTable {
    pub(super) enabled: Option<bool>,
    pub(super) alpha: Option<Spanned<f64>>,
}

/// `[report]`
#[derive(Debug, Default, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct ReportTable {
    pub(super) enabled: Option<bool>,
}

/// `[output]`
#[derive(Debug, Default, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct OutputTable {
    pub(super) table: Option<Spanned<String>>,
    pub(super) publish: Option<Publish>,
}

/// `[limits]`
#[derive(Debug, Default, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
#[expect(clippy::struct_field_names, reason = "the names are the keys of the file")]
pub(super) struct LimitsTable {
    pub(super) max_image_bytes: Option<ByteSize>,
    pub(super) max_pixels: Option<Spanned<i64>>,
    pub(super) max_decode_secs: Option<Spanned<i64>>,
    pub(super) max_rejected_fraction: Option<Spanned<f64>>,
}

impl Written {
    /// What a file of a pipeline over a folder of images says, before its locations are given.
    pub(super) fn directory(name: &str) -> Self {
        let pipeline = PipelineTable { name: Some(Spanned::new(0..0, name.to_owned())) };
        let source = SourceTable { format: Some(SourceFormat::Directory), ..SourceTable::default() };
        Self {
            pipeline: Some(Spanned::new(0..0, Table(pipeline))),
            source: Some(Spanned::new(0..0, Table(source))),
            ..Self::default()
        }
    }
}

/// The keys `T` in a TOML table. Serde's own structs would also read a list, as the values of the keys
/// in order: `pipeline = ["cells"]`.
#[derive(Debug, Default)]
pub(super) struct Table<T>(pub(super) T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Table<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TableVisitor<T>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>> Visitor<'de> for TableVisitor<T> {
            type Value = Table<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a table")
            }

            fn visit_map<A: MapAccess<'de>>(self, keys: A) -> Result<Table<T>, A::Error> {
                T::deserialize(MapAccessDeserializer::new(keys)).map(Table)
            }
        }

        deserializer.deserialize_map(TableVisitor(PhantomData))
    }
}

/// A number of bytes, written as an integer or as a text with a unit, `"64MiB"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ByteSize(pub(super) NonZeroU64);

/// Why a text or number is no byte size.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum ByteSizeFault {
    #[error("a byte size ends in KB, MB, GB, KiB, MiB or GiB, or is an integer without quotes")]
    Unit,
    #[error("a byte size is an integer before its unit")]
    Number,
    #[error("a byte size is at least 1")]
    NotPositive,
    #[error("a byte size is less than 2^64")]
    TooLarge,
}

impl ByteSize {
    pub(super) fn parse(text: &str) -> Result<Self, ByteSizeFault> {
        let (number, bytes_per_unit) = BYTE_UNITS
            .iter()
            .find_map(|(unit, bytes)| Some((text.strip_suffix(unit)?, bytes)))
            .ok_or(ByteSizeFault::Unit)?;
        let number = number.trim();
        let is_integer = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
        if !is_integer {
            return Err(ByteSizeFault::Number);
        }
        let num_bytes = number
            .parse::<u64>()
            .ok()
            .and_then(|number| number.checked_mul(*bytes_per_unit))
            .ok_or(ByteSizeFault::TooLarge)?;
        Self::from_bytes(num_bytes)
    }

    fn from_bytes(num_bytes: u64) -> Result<Self, ByteSizeFault> {
        NonZeroU64::new(num_bytes).map(Self).ok_or(ByteSizeFault::NotPositive)
    }
}

impl<'de> Deserialize<'de> for ByteSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ByteSizeVisitor;

        impl Visitor<'_> for ByteSizeVisitor {
            type Value = ByteSize;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a byte size")
            }

            fn visit_i64<E: de::Error>(self, num_bytes: i64) -> Result<ByteSize, E> {
                u64::try_from(num_bytes)
                    .map_err(|_| ByteSizeFault::NotPositive)
                    .and_then(ByteSize::from_bytes)
                    .map_err(E::custom)
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<ByteSize, E> {
                ByteSize::parse(text).map_err(E::custom)
            }
        }

        deserializer.deserialize_any(ByteSizeVisitor)
    }
}

/// Reads the text of a pipeline file. What cannot be read is reported and left out, so that one pass finds every wrong
/// key and every wrong type; `None` only if the text is not TOML.
///
/// Serde stops at the first error. The entry it stopped at is taken out of the parsed document and the rest is read again:
/// a file has a few dozen keys, so reading it once for every error costs nothing.
pub(super) fn read(text: &str, problems: &mut Problems) -> Option<Written> {
    let mut document = match DeTable::parse(text) {
        Ok(document) => document,
        Err(error) => {
            let detail = redact(error.message()).into_owned();
            problems.push(Fault::Syntax { detail }, error.span());
            return None;
        }
    };
    loop {
        let error = match Written::deserialize(toml::de::Deserializer::from(document.clone())) {
            Ok(written) => return Some(written),
            Err(error) => error,
        };
        let message = redact(error.message()).into_owned();
        let span = error.span().unwrap_or_default();
        let Some(path) = take_entry(document.get_mut(), &span) else {
            // Every error of serde is about an entry; should one ever not be, this is the last that can be told.
            problems.push(Fault::Syntax { detail: message }, error.span());
            return None;
        };
        let path: Vec<String> = path.iter().map(|key| redact(key).into_owned()).collect();
        problems.push_unreadable(&path, read_fault(&path, &message), span);
    }
}

/// Takes the innermost entry at `span` out of `table` and returns its key with those of the tables around it.
fn take_entry(table: &mut DeTable<'_>, span: &Range<usize>) -> Option<Vec<String>> {
    // The key first: the span of a table is its header, and the header `[a.b]` holds the keys of two tables.
    let by_key = table.keys().find(|key| key.span() == *span).map(|key| key.get_ref().to_string());
    if let Some(key) = by_key {
        table.remove(key.as_str());
        return Some(vec![key]);
    }
    for (key, value) in table.iter_mut() {
        if let DeValue::Table(inner) = value.get_mut()
            && let Some(mut path) = take_entry(inner, span)
        {
            path.insert(0, key.get_ref().to_string());
            return Some(path);
        }
    }
    let by_value = table
        .iter()
        .find(|(_, value)| value.span().start <= span.start && span.end <= value.span().end)
        .map(|(key, _)| key.get_ref().to_string())?;
    table.remove(by_value.as_str());
    Some(vec![by_value])
}

/// What serde's `message` about the entry at `path` means.
fn read_fault(path: &[String], message: &str) -> Fault {
    let key = path.join(".");
    // Serde's messages are "unknown field `a`, expected one of `b`, `c`", and "unknown variant" in the same way.
    let (found, expected) = message.rsplit_once(", expected ").unwrap_or((message, ""));
    let allowed = || {
        let names = expected.split('`').skip(1).step_by(2);
        names.map(str::to_owned).collect()
    };
    if found.starts_with("unknown field `")
        && let Some((last, tables)) = path.split_last()
    {
        return Fault::UnknownKey { key: last.clone(), table: tables.join("."), allowed: allowed() };
    }
    if let Some(value) = found.strip_prefix("unknown variant `") {
        return Fault::UnknownValue { key, value: value.trim_end_matches('`').to_owned(), allowed: allowed() };
    }
    let mut detail = match message.strip_prefix("invalid type: ") {
        Some(types) => format!("found {types}"),
        None => message.to_owned(),
    };
    for (name, plain_name) in TYPE_NAMES {
        detail = detail.replace(name, plain_name);
    }
    Fault::Unreadable { key, detail }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{ConfigError, Problem};

    #[test]
    fn byte_sizes_have_a_unit_or_are_integers() {
        let bytes = |text| ByteSize::parse(text).map(|size| size.0.get());
        assert_eq!(bytes("64MiB"), Ok(67_108_864));
        assert_eq!(bytes("4 GiB"), Ok(4_294_967_296));
        assert_eq!(bytes("3KB"), Ok(3_000));
        assert_eq!(bytes("2KiB"), Ok(2_048));
        assert_eq!(bytes("1MB"), Ok(1_000_000));
        assert_eq!(bytes("1GB"), Ok(1_000_000_000));
        assert_eq!(bytes("64"), Err(ByteSizeFault::Unit));
        assert_eq!(bytes("64Gb"), Err(ByteSizeFault::Unit));
        assert_eq!(bytes("GiB"), Err(ByteSizeFault::Number));
        assert_eq!(bytes("1.5GiB"), Err(ByteSizeFault::Number));
        assert_eq!(bytes("-1GiB"), Err(ByteSizeFault::Number));
        assert_eq!(bytes("0MiB"), Err(ByteSizeFault::NotPositive));
        assert_eq!(bytes("17179869184GiB"), Err(ByteSizeFault::TooLarge));
        assert_eq!(bytes("99999999999999999999KB"), Err(ByteSizeFault::TooLarge));
    }

    #[test]
    fn a_misspelled_table_is_reported_by_its_own_name_and_not_by_that_of_the_table_in_it() {
        let mut problems = Problems::default();
        read("[embedding.threshold]\nvalue = 1.0\n", &mut problems).unwrap();
        problems.missing("embedding.dimension", None);
        let error = ConfigError::new(problems, "", "cells.toml");
        let faults: Vec<&Fault> = error.problems().iter().map(Problem::fault).collect();
        assert!(matches!(
            faults.as_slice(),
            [Fault::UnknownKey { key, table, .. }] if key == "embedding" && table.is_empty()
        ));
    }
}
