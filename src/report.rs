//! What people want to know of the tables after a run: the strangest images, the pairs most alike, the largest groups.
//!
//! Table mathematics in memory, by polars, on the few columns that a question needs; the vectors are never read here.

use std::collections::BTreeMap;

use arrow::array::{Array as _, AsArray, RecordBatch};
use arrow::datatypes::{DataType, Float32Type, Float64Type, Int32Type, Int64Type};
use arrow::util::display::{ArrayFormatter, FormatOptions};
use polars::prelude::{Column, DataFrame, SortMultipleOptions};

use crate::error::Error;
use crate::schema::column;
use crate::source::PartitionValues;
use crate::stages::Job;
use crate::table::{Live, LiveFile, Table};

/// Column of the frames here that holds the partition's name.
const PARTITION: &str = "partition";

/// Characters of a cell at most, where tables are shown to a person: more than a line of a screen helps nobody, and formatting has
/// its own limit.
const CELL_MAX_CHARS: usize = 80;

/// The `count` images of highest score in some partitions, strangest first, as lines of a table, with the kept columns of the source.
pub fn strangest(job: &Job<'_>, partitions: &[PartitionValues], count: usize) -> Result<Vec<String>, Error> {
    let names =
        [column::IMAGE_ID, column::ANOMALY_SCORE, column::SEVERITY_PERCENTILE, column::P_VALUE, column::IS_ANOMALY];
    let live = job.context.block_on(job.anomalies.live())?;
    let anomalies = read_frame(job, &job.anomalies, of_partitions(live, partitions), &names, |_, rows| {
        // The rows that could not be scored are not strange, they are unknown.
        let scores = rows.column(1).as_primitive::<Float64Type>();
        first(rows, count, |row| scores.is_valid(row).then(|| -scores.value(row)))
    })?;
    let order = SortMultipleOptions::new().with_order_descending_multi([true, false]).with_maintain_order(true);
    let sorted = anomalies
        .sort([column::ANOMALY_SCORE, column::IMAGE_ID], order)
        .map_err(frame_error("the strangest images"))?
        .head(Some(count));
    if sorted.height() == 0 {
        return Ok(Vec::new());
    }
    let kept = kept_columns(job, &sorted)?;
    let mut table = vec![header(job, &["score", "percentile", "p-value", "flag"])];
    for row in 0..sorted.height() {
        let id = cell(&sorted, column::IMAGE_ID, row);
        let partition = cell(&sorted, PARTITION, row);
        let mut cells = vec![
            id.clone(),
            significant(&cell(&sorted, column::ANOMALY_SCORE, row)),
            significant(&cell(&sorted, column::SEVERITY_PERCENTILE, row)),
            significant(&cell(&sorted, column::P_VALUE, row)),
            if cell(&sorted, column::IS_ANOMALY, row) == "true" { "strange".to_owned() } else { String::new() },
        ];
        if !job.source.partition_keys.is_empty() {
            cells.push(partition.clone());
        }
        cells.extend(kept.get(&(id, partition)).cloned().unwrap_or_default());
        table.push(cells);
    }
    Ok(align_within(&table, cell_chars(job)))
}

/// The `count` pairs of smallest distance in some partitions, each pair once, as lines of a table.
pub fn nearest_pairs(job: &Job<'_>, partitions: &[PartitionValues], count: usize) -> Result<Vec<String>, Error> {
    let live = job.context.block_on(job.neighbors.live())?;
    let names = [column::IMAGE_ID, column::RANK, column::NEIGHBOR_ID, column::DISTANCE, column::NEIGHBOR_PARTITION];
    let nearest = read_frame(job, &job.neighbors, of_partitions(live, partitions), &names, |_, rows| {
        let distances = rows.column(3).as_primitive::<Float32Type>();
        // A pair stands there twice, seen from either side.
        first(rows, 2 * count, |row| Some(f64::from(distances.value(row))))
    })?;
    let order = SortMultipleOptions::new().with_maintain_order(true);
    let sorted = nearest
        .sort([column::DISTANCE, column::IMAGE_ID, column::RANK], order)
        .map_err(frame_error("the pairs most alike"))?;
    let mut table = vec![vec!["image".to_owned(), "neighbor".to_owned(), "distance".to_owned()]];
    let mut seen = std::collections::BTreeSet::new();
    for row in 0..sorted.height() {
        if table.len() > count {
            break;
        }
        // Ids are unique within a partition only.
        let place = |id: &str, partition: &str| [cell(&sorted, id, row), cell(&sorted, partition, row)];
        let mut pair = [place(column::IMAGE_ID, PARTITION), place(column::NEIGHBOR_ID, column::NEIGHBOR_PARTITION)];
        pair.sort();
        let [[first, _], [second, _]] = pair.clone();
        if seen.insert(pair) {
            table.push(vec![first, second, significant(&cell(&sorted, column::DISTANCE, row))]);
        }
    }
    Ok(if table.len() > 1 { align_within(&table, cell_chars(job)) } else { Vec::new() })
}

/// The `count` groups of most images whose representatives lie in some partitions, as lines of a table.
pub fn largest_groups(job: &Job<'_>, partitions: &[PartitionValues], count: usize) -> Result<Vec<String>, Error> {
    let live = job.context.block_on(job.groups.live())?;
    let names = [column::IMAGE_ID, column::REPRESENTATIVE_ID, column::REPRESENTATIVE_PARTITION, column::GROUP_SIZE];
    let largest = read_frame(job, &job.groups, of_partitions(live, partitions), &names, |partition, rows| {
        let [ids, heads, partitions] = [0, 1, 2].map(|number| rows.column(number).as_string::<i32>());
        let sizes = rows.column(3).as_primitive::<Int64Type>();
        let own = partition.to_string();
        first(rows, count, |row| {
            let is_own = partitions.is_null(row) || partitions.value(row) == own;
            let is_head = is_own && ids.value(row) == heads.value(row) && sizes.value(row) > 1;
            is_head.then(|| -(sizes.value(row) as f64))
        })
    })?;
    let order = SortMultipleOptions::new().with_order_descending_multi([true, false]).with_maintain_order(true);
    let sorted = largest
        .sort([column::GROUP_SIZE, column::IMAGE_ID], order)
        .map_err(frame_error("the largest groups"))?
        .head(Some(count));
    let mut table = vec![vec!["representative".to_owned(), "images".to_owned()]];
    for row in 0..sorted.height() {
        let size = cell(&sorted, column::GROUP_SIZE, row);
        table.push(vec![cell(&sorted, column::IMAGE_ID, row), size.trim_end_matches(".0").to_owned()]);
    }
    Ok(if table.len() > 1 { align_within(&table, cell_chars(job)) } else { Vec::new() })
}

/// The kept columns of the rows that a frame names, by id and partition, as text.
fn kept_columns(job: &Job<'_>, frame: &DataFrame) -> Result<BTreeMap<(String, String), Vec<String>>, Error> {
    let wanted: std::collections::BTreeSet<(String, String)> =
        (0..frame.height()).map(|row| (cell(frame, column::IMAGE_ID, row), cell(frame, PARTITION, row))).collect();
    let mut names = vec![column::IMAGE_ID];
    names.extend(job.source.kept_schema.fields().iter().map(|field| field.name().as_str()));
    let mut kept = BTreeMap::new();
    if names.len() == 1 {
        return Ok(kept);
    }
    let live = job.context.block_on(job.latents.live())?;
    for file in live.files {
        let partition = file.partition.to_string();
        if !wanted.iter().any(|(_, wanted)| *wanted == partition) {
            continue;
        }
        for (_, batch) in job.context.block_on(job.latents.read(vec![file], &names))? {
            let ids = batch.column(0).as_string::<i32>();
            for row in 0..batch.num_rows() {
                let key = (ids.value(row).to_owned(), partition.clone());
                if wanted.contains(&key) {
                    kept.insert(key, batch.columns()[1..].iter().map(|values| display(values, row)).collect());
                }
            }
        }
    }
    Ok(kept)
}

fn of_partitions(live: Live, partitions: &[PartitionValues]) -> Vec<LiveFile> {
    live.files.into_iter().filter(|file| partitions.contains(&file.partition)).collect()
}

fn header(job: &Job<'_>, columns: &[&str]) -> Vec<String> {
    let mut header = vec!["image".to_owned()];
    header.extend(columns.iter().map(|name| (*name).to_owned()));
    if !job.source.partition_keys.is_empty() {
        header.push(PARTITION.to_owned());
    }
    header.extend(job.source.kept_schema.fields().iter().map(|field| field.name().clone()));
    header
}

/// The `count` rows of smallest key, ties by id; rows without a key are left out.
fn first(rows: &RecordBatch, count: usize, key: impl Fn(usize) -> Option<f64>) -> Vec<usize> {
    let ids = rows.column(0).as_string::<i32>();
    let mut keyed: Vec<(f64, usize)> = (0..rows.num_rows()).filter_map(|row| Some((key(row)?, row))).collect();
    keyed.sort_unstable_by(|a, b| a.0.total_cmp(&b.0).then_with(|| ids.value(a.1).cmp(ids.value(b.1))));
    keyed.truncate(count);
    keyed.into_iter().map(|(_, row)| row).collect()
}

/// Reads columns of live files into a frame, with the partition's name beside them: of each batch the rows that `keep` names, so that
/// the frame is small however large the table is. Holds one file's columns.
fn read_frame(
    job: &Job<'_>,
    table: &Table,
    files: Vec<LiveFile>,
    columns: &[&str],
    keep: impl Fn(&PartitionValues, &RecordBatch) -> Vec<usize>,
) -> Result<DataFrame, Error> {
    let mut values: BTreeMap<&str, Values> = BTreeMap::new();
    let mut partitions: Vec<String> = Vec::new();
    for file in files {
        for (file, batch) in job.context.block_on(table.read(vec![file], columns))? {
            let rows = keep(&file.partition, &batch);
            partitions.extend(rows.iter().map(|_| file.partition.to_string()));
            for name in columns {
                let Some(array) = batch.column_by_name(name) else { continue };
                values.entry(name).or_insert_with(|| Values::of(array.data_type())).extend(array, &rows);
            }
        }
    }
    let height = partitions.len();
    let mut frame: Vec<Column> = columns
        .iter()
        .map(|name| values.remove(name).unwrap_or_else(|| Values::Text(Vec::new())).into_column(name))
        .collect();
    frame.push(Column::new(PARTITION.into(), partitions));
    DataFrame::new(height, frame).map_err(frame_error(table.name().name()))
}

/// A column on its way from Arrow to polars.
enum Values {
    Text(Vec<Option<String>>),
    Number(Vec<Option<f64>>),
    Flag(Vec<Option<bool>>),
}

impl Values {
    fn of(data_type: &DataType) -> Self {
        match data_type {
            DataType::Boolean => Self::Flag(Vec::new()),
            DataType::Float64 | DataType::Float32 | DataType::Int32 | DataType::Int64 => Self::Number(Vec::new()),
            _ => Self::Text(Vec::new()),
        }
    }

    fn extend(&mut self, array: &arrow::array::ArrayRef, rows: &[usize]) {
        match self {
            Self::Flag(values) => {
                let array = array.as_boolean();
                values.extend(rows.iter().map(|row| array.is_valid(*row).then(|| array.value(*row))));
            }
            Self::Number(values) => {
                let number = |row: usize| match array.data_type() {
                    DataType::Float32 => f64::from(array.as_primitive::<Float32Type>().value(row)),
                    DataType::Int32 => f64::from(array.as_primitive::<Int32Type>().value(row)),
                    DataType::Int64 => array.as_primitive::<Int64Type>().value(row) as f64,
                    _ => array.as_primitive::<Float64Type>().value(row),
                };
                values.extend(rows.iter().map(|row| array.is_valid(*row).then(|| number(*row))));
            }
            Self::Text(values) => {
                values.extend(rows.iter().map(|row| array.is_valid(*row).then(|| display(array, *row))));
            }
        }
    }

    fn into_column(self, name: &str) -> Column {
        match self {
            Self::Text(values) => Column::new(name.into(), values),
            Self::Number(values) => Column::new(name.into(), values),
            Self::Flag(values) => Column::new(name.into(), values),
        }
    }
}

fn frame_error(what: &'static str) -> impl Fn(polars::error::PolarsError) -> Error {
    move |source| Error::Frame { what, source }
}

/// A cell of a frame as text; empty where it is null.
fn cell(frame: &DataFrame, name: &str, row: usize) -> String {
    let value = frame.column(name).ok().and_then(|column| column.get(row).ok());
    match value {
        Some(value) if !value.is_null() => value.str_value().into_owned(),
        _ => String::new(),
    }
}

/// A value of an Arrow array as text.
pub(crate) fn display(array: &dyn arrow::array::Array, row: usize) -> String {
    ArrayFormatter::try_new(array, &FormatOptions::default())
        .map_or_else(|_| String::new(), |formatter| formatter.value(row).to_string())
}

/// A number with four significant digits; other text as it is.
pub(crate) fn significant(text: &str) -> String {
    match text.parse::<f64>() {
        Ok(0.0) => "0".to_owned(),
        Ok(number) if (1e-4..1e6).contains(&number.abs()) => {
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a logarithm between -4 and 6")]
            let decimals = (3 - number.abs().log10().floor() as i32).max(0) as usize;
            format!("{number:.decimals$}")
        }
        Ok(number) => format!("{number:.3e}"),
        Err(_) => text.to_owned(),
    }
}

/// Characters of a cell at most, so that two ids and a number find room on the terminal.
fn cell_chars(job: &Job<'_>) -> usize {
    job.context.columns().map_or(CELL_MAX_CHARS, |columns| (columns * 2 / 5).min(CELL_MAX_CHARS))
}

/// Puts cells into columns of equal width, long ones cut.
pub fn align(table: &[Vec<String>]) -> Vec<String> {
    align_within(table, CELL_MAX_CHARS)
}

/// [`align`] with cells of at most so many characters. Long ones are cut in the middle: of paths, the end tells more than the beginning.
fn align_within(table: &[Vec<String>], max_chars: usize) -> Vec<String> {
    let cut = |cell: &String| {
        let num_chars = cell.chars().count();
        if num_chars <= max_chars {
            return cell.clone();
        }
        let end = max_chars / 2;
        let start = max_chars.saturating_sub(end + 1);
        cell.chars().take(start).chain(['…']).chain(cell.chars().skip(num_chars - end)).collect()
    };
    let table: Vec<Vec<String>> = table.iter().map(|row| row.iter().map(cut).collect()).collect();
    let num_columns = table.iter().map(Vec::len).max().unwrap_or(0);
    let widths: Vec<usize> = (0..num_columns)
        .map(|column| {
            table.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
        })
        .collect();
    table
        .iter()
        .map(|row| {
            let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
            format!("  {}", cells.collect::<Vec<_>>().join("  ")).trim_end().to_owned()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_shown_with_four_digits_whatever_their_size() {
        assert_eq!(significant("0.00123456"), "0.001235");
        assert_eq!(significant("97.26027397"), "97.26");
        assert_eq!(significant("0"), "0");
        assert_eq!(significant("0.00000123456"), "1.235e-6");
        assert_eq!(significant("cell0001"), "cell0001");
    }

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let table = [vec!["a".to_owned(), "b".to_owned()], vec!["long".to_owned(), "c".to_owned()]];
        assert_eq!(align(&table), ["  a     b", "  long  c"]);
    }

    #[test]
    fn a_cell_that_no_screen_holds_is_cut() {
        let table = [vec!["é".repeat(100_000), "b".to_owned()]];
        assert_eq!(align(&table), [format!("  {}…{}  b", "é".repeat(39), "é".repeat(40))]);
        assert_eq!(align_within(&[vec!["folder/a.png".to_owned()]], 8), ["  fol….png"]);
    }
}
