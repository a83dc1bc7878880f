//! `compare-tables`: for every image of one table, the nearest images of another. Which pictures of the test set are in the training set
//! too, and which of a new batch look like nothing seen before?

use std::num::{NonZeroU64, NonZeroUsize};
use std::ops::Range;
use std::sync::Arc;

use arrow::array::RecordBatch;
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use url::Url;

use crate::context::Context;
use crate::corpus::Corpus;
use crate::error::{Error, ExitStatus};
use crate::neighbors::exact::Metric;
use crate::neighbors::topk::Neighbor;
use crate::schema::{TableName, column};
use crate::stages::MODEL_FOOTER;
use crate::stages::neighbors::output::{FoundRow, columns, partition_column};
use crate::stages::neighbors::search::{Search, Sides, Sink, between};
use crate::table::{DataFileWriter, Presence, Table};

/// Rows written at a time.
const ROWS_A_BATCH: usize = 65_536;

/// Pairs and images that are named at the end.
const SHOWN: usize = 10;

/// Quantiles of the distance to the nearest image that the summary has.
const QUANTILES: [f64; 5] = [0.0, 0.05, 0.5, 0.95, 1.0];

/// What is compared, and how.
#[derive(Debug, Clone)]
pub struct TableComparison {
    /// Prefix of the tables whose images are asked about.
    pub query: Url,
    /// Prefix of the tables that are searched.
    pub reference: Url,
    /// The Parquet file to write.
    pub out: Url,
    /// Distance between embeddings.
    pub metric: Metric,
    /// Nearest images for each.
    pub k: NonZeroUsize,
    /// Distance up to which two images count as near-duplicates.
    pub duplicate_distance: Option<f32>,
    /// Bytes that the search may hold.
    pub memory_limit: NonZeroU64,
}

/// The distance of a query's nearest image, and where both are.
#[derive(Debug, Clone, Copy)]
struct Nearest {
    query: usize,
    neighbor: Neighbor,
}

/// Writes lists to one file, and keeps the nearest of each.
struct ToFile<'a> {
    context: &'a Context,
    file: DataFileWriter,
    schema: SchemaRef,
    nearest: Vec<Nearest>,
}

impl Sink for ToFile<'_> {
    fn due(&self, queries: &Corpus) -> Vec<Range<usize>> {
        vec![queries.all()]
    }

    fn take<'l>(
        &mut self,
        sides: Sides<'_>,
        positions: &[Range<usize>],
        list: impl Fn(usize) -> &'l [Neighbor],
    ) -> Result<(), Error> {
        let mut found: Vec<FoundRow> = Vec::new();
        for position in positions.iter().cloned().flatten() {
            let list = list(position);
            self.nearest.extend(list.first().map(|neighbor| Nearest { query: position, neighbor: *neighbor }));
            found.extend(list.iter().enumerate().map(|(place, neighbor)| (position, place + 1, *neighbor)));
            if found.len() >= ROWS_A_BATCH {
                self.write(sides, &found)?;
                found.clear();
            }
        }
        self.write(sides, &found)
    }
}

impl ToFile<'_> {
    fn write(&mut self, sides: Sides<'_>, found: &[FoundRow]) -> Result<(), Error> {
        let mut columns = columns(sides, found);
        columns.insert(1, partition_column(sides.queries, found.iter().map(|(query, ..)| *query)));
        let rows = RecordBatch::try_new(Arc::clone(&self.schema), columns)
            .map_err(|source| Error::Rows { table: "compared images", source })?;
        Ok(self.context.block_on(self.file.write(&rows))?)
    }
}

/// The columns of the file.
fn schema() -> SchemaRef {
    Arc::new(Schema::new(vec![
        Field::new(column::IMAGE_ID, DataType::Utf8, false),
        Field::new("partition", DataType::Utf8, true),
        Field::new(column::RANK, DataType::Int32, false),
        Field::new(column::NEIGHBOR_ID, DataType::Utf8, false),
        Field::new(column::DISTANCE, DataType::Float32, false),
        Field::new(column::NEIGHBOR_PARTITION, DataType::Utf8, true),
    ]))
}

/// Compares two tables, writes the file, prints a summary as one line of JSON, and says which images are most and least alike.
pub fn compare_tables(context: &Context, comparison: &TableComparison) -> Result<ExitStatus, Error> {
    let (queries, query_model) = read(context, &comparison.query, comparison.memory_limit)?;
    let (corpus, model) = read(context, &comparison.reference, comparison.memory_limit)?;
    if query_model != model {
        return Err(Error::Usage {
            message: format!(
                "{} was embedded with model {query_model}, and {} with {model}",
                comparison.query, comparison.reference
            ),
            hint: "embed both tables with the same model package".to_owned(),
        });
    }
    let (store, name) = context.open_file(&comparison.out)?;
    let schema = schema();
    let footer = [
        ("version", env!("CARGO_PKG_VERSION").to_owned()),
        (MODEL_FOOTER, model),
        ("metric", comparison.metric.name().to_owned()),
        ("query", comparison.query.to_string()),
        ("reference", comparison.reference.to_string()),
    ];
    let file = DataFileWriter::create(&store, comparison.out.clone(), name, Arc::clone(&schema), &footer)?;
    let mut output = ToFile { context, file, schema, nearest: Vec::new() };
    let search =
        Search { context, memory_limit: comparison.memory_limit, metric: comparison.metric, k: comparison.k.get() };
    let sides = Sides { queries: &queries, corpus: &corpus };
    between(search, sides, &mut output)?;
    let ToFile { file, mut nearest, .. } = output;
    let file = context.block_on(file.close())?;
    nearest.sort_unstable_by(|a, b| {
        a.neighbor.distance.total_cmp(&b.neighbor.distance).then_with(|| a.query.cmp(&b.query))
    });
    say(context, sides, &nearest)?;
    let within = |distance: f32| nearest.partition_point(|nearest| nearest.neighbor.distance <= distance);
    let quantiles: Vec<_> =
        QUANTILES.iter().filter_map(|share| Some((format!("{share}"), quantile(&nearest, *share)?.into()))).collect();
    let summary = serde_json::json!({
        "query": comparison.query.to_string(),
        "reference": comparison.reference.to_string(),
        "out": comparison.out.to_string(),
        "rows_query": queries.len(),
        "rows_reference": corpus.len(),
        "rows_written": file.num_rows,
        "metric": comparison.metric,
        "duplicates": comparison.duplicate_distance.map(within),
        "equal": if comparison.metric == Metric::InnerProduct { None } else { Some(within(0.0)) },
        "nearest_distance": serde_json::Map::from_iter(quantiles),
    });
    context.print(&summary.to_string())?;
    Ok(ExitStatus::Success)
}

/// The images of a table, and the one model that embedded them.
fn read(context: &Context, url: &Url, memory_limit: NonZeroU64) -> Result<(Corpus, String), Error> {
    let store = context.stores.open(url)?;
    let presence = Presence::new(&store, context.handle());
    let table = context.block_on(Table::find(&store, TableName::Latents, &presence, context.handle()))?;
    let Some(table) = table else {
        return Err(Error::Usage {
            message: format!("there is no table latents below {url}"),
            hint: "name the [output] table of a run that has ended".to_owned(),
        });
    };
    let live = context.block_on(table.live())?;
    let mut models: Vec<String> = Vec::new();
    for partition in live.partitions() {
        if let Some(file) = live.of(&partition).next() {
            models.extend(context.block_on(table.footer_value(file, MODEL_FOOTER))?);
        }
    }
    models.sort();
    models.dedup();
    match models.as_slice() {
        [model] => Ok((Corpus::read(context, &table, live.files, false, memory_limit)?, model.clone())),
        models => Err(Error::Usage {
            message: format!(
                "{url} holds latents of {} models, and vectors of different ones do not compare",
                models.len()
            ),
            hint: "embed all of its partitions with one model package".to_owned(),
        }),
    }
}

/// The distance that a share of the images is no farther than; nearest first.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a place in a list")]
fn quantile(nearest: &[Nearest], share: f64) -> Option<f32> {
    let place = (nearest.len().checked_sub(1)? as f64 * share).round() as usize;
    nearest.get(place).map(|nearest| nearest.neighbor.distance)
}

fn say(context: &Context, sides: Sides<'_>, nearest: &[Nearest]) -> Result<(), Error> {
    let line = |nearest: &Nearest| {
        let near = sides.corpus.position(nearest.neighbor.row);
        let name = |corpus: &Corpus, position: usize| {
            let partition = corpus.partitions()[corpus.partition_at(position)].to_string();
            let id = corpus.id_at(position);
            if partition.is_empty() { id.to_owned() } else { format!("{partition}/{id}") }
        };
        format!(
            "  {:<10.6} {}  {}",
            nearest.neighbor.distance,
            name(sides.queries, nearest.query),
            name(sides.corpus, near)
        )
    };
    context.say("most alike (distance, image, nearest image of the other table):")?;
    for nearest in nearest.iter().take(SHOWN) {
        context.say(&line(nearest))?;
    }
    context.say("least like anything there:")?;
    for nearest in nearest.iter().rev().take(SHOWN) {
        context.say(&line(nearest))?;
    }
    Ok(())
}
