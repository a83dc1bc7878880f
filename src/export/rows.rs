//! The rows of `latents` that have a vector, with what the other tables say of each.

use std::collections::HashMap;
use std::sync::Arc;

use arrow::array::{
    Array as _, ArrayRef, AsArray, BooleanArray, BooleanBuilder, Float32Array, Float64Builder, Int64Array, ListArray,
    ListBuilder, RecordBatch, StringArray, StringBuilder, StructArray, new_null_array,
};
use arrow::buffer::OffsetBuffer;
use arrow::compute::filter;
use arrow::datatypes::{DataType, Field, Fields, Float32Type, Float64Type, Int64Type, Schema, SchemaRef};
use arrow::error::ArrowError;
use futures::stream::BoxStream;
use futures::{StreamExt as _, TryStreamExt as _};

use crate::config::NeighborScope;
use crate::corpus::Corpus;
use crate::error::Error;
use crate::schema::{TableName, column as published, data_schema, vector_type};
use crate::source::PartitionValues;
use crate::stages::{Job, flag, groups, neighbors};
use crate::table::{Live, LiveFile, Table, TableError};

/// Names of the columns beside the published ones.
pub mod column {
    /// Partition of the image, as `key=value` pairs joined by slashes; null in a table without partitions.
    pub const PARTITION: &str = "partition";
    /// Whether the image represents its group.
    pub const IS_REPRESENTATIVE: &str = "is_representative";
    /// Nearest images: `ids`, their row numbers, and `distances`, nearest first.
    pub const NEIGHBORS: &str = "neighbors";
}

/// Bytes of vectors read at a time.
const BATCH_BYTES: usize = 8 << 20;

/// Rows read at a time at most.
const BATCH_ROWS: usize = 8192;

/// What is read of the tables beside `latents`; the image's id is the first column of each.
const FLAG_COLUMNS: [&str; 4] =
    [published::IMAGE_ID, published::ANOMALY_SCORE, published::IS_ANOMALY, published::REASONS];
const GROUP_COLUMNS: [&str; 5] = [
    published::IMAGE_ID,
    published::GROUP_ID,
    published::REPRESENTATIVE_ID,
    published::REPRESENTATIVE_PARTITION,
    published::GROUP_SIZE,
];
const NEIGHBOR_COLUMNS: [&str; 4] =
    [published::IMAGE_ID, published::NEIGHBOR_ID, published::DISTANCE, published::NEIGHBOR_PARTITION];

/// A row has no number, for it has no vector.
const UNNUMBERED: u32 = u32::MAX;

/// A name for a kept column: its own, or, where one of `taken` is the same but for case, that with `source_` before it.
fn free_name(name: &str, taken: &[&str]) -> String {
    let mut name = name.to_owned();
    while taken.iter().any(|taken| taken.eq_ignore_ascii_case(&name)) {
        name.insert_str(0, "source_");
    }
    name
}

/// The vectors of some of [`Rows`], one row after the other.
pub fn vectors(rows: &RecordBatch) -> &[f32] {
    let Some(lists) = rows.column_by_name(published::EMBEDDING).map(AsArray::as_list::<i32>) else { return &[] };
    let offsets = lists.value_offsets();
    let (from, to) = (offsets[0].unsigned_abs() as usize, offsets[lists.len()].unsigned_abs() as usize);
    &lists.values().as_primitive::<Float32Type>().values()[from..to]
}

/// The rows of `latents` that have a vector of the pipeline's model, in the order of the data files. A row's number is its place among
/// them, from zero.
///
/// Columns: `image_id`, `partition`, the kept columns of the source; of `anomalies`, where the pipeline has that table, `anomaly_score`,
/// `is_anomaly` and `reasons`; of `groups`, likewise, `group_id`, `group_size` and `is_representative`; `embedding`, in the unit of
/// the model; and where they are asked for, `neighbors`.
pub struct Rows<'a> {
    job: &'a Job<'a>,
    latents: Live,
    corpus: Corpus,
    flags: Option<Live>,
    groups: Option<Live>,
    neighbors: Option<Live>,
    /// The numbers of the rows by their positions in the corpus.
    numbers: Vec<u32>,
    /// Places of the partitions in the corpus, by their names.
    partitions: HashMap<String, usize>,
    /// Columns that are read of `latents`.
    names: Vec<String>,
    schema: SchemaRef,
}

impl<'a> Rows<'a> {
    /// Reads which rows there are. All tables must be of the same run: those that the pipeline would make anew are refused. Kept columns that
    /// have a name of `taken` or of a column here have `source_` before it.
    ///
    /// # Errors
    /// [`Error::Usage`] where there are no vectors of the model, and where a table is not of these latents or these settings.
    pub fn read(job: &'a Job<'a>, with_neighbors: bool, taken: &[&str]) -> Result<Self, Error> {
        job.require_latents()?;
        let latents = job.comparable_latents()?;
        let memory_limit = job.pipeline.execution.memory_limit;
        let corpus = Corpus::read(job.context, &job.latents, latents.files.clone(), false, memory_limit)?;
        if corpus.is_empty() {
            return Err(Error::Usage {
                message: format!("no row of {} has a vector of this model", job.latents.store().url()),
                hint: "name the model of the run with --model; `status` in latents says why rows have no vector"
                    .to_owned(),
            });
        }
        let flags = flags_of(job, &latents)?;
        let lists = neighbors_of(job, &latents)?;
        let groups = groups_of(job, &latents, lists.as_ref())?;
        // Neighbors in another table have no row here.
        let is_own = job.pipeline.neighbors.as_ref().is_some_and(|settings| settings.scope != NeighborScope::Reference);
        let neighbors = lists.filter(|_| with_neighbors && is_own);
        let mut number = 0..;
        let number_at = |position| corpus.number_at(position).and_then(|_| number.next()).unwrap_or(UNNUMBERED);
        let numbers = corpus.all().map(number_at).collect();
        let partitions = corpus.partitions().iter().map(ToString::to_string).zip(0..).collect();
        let kept = &job.source.kept_schema;
        let mut names = vec![published::IMAGE_ID.to_owned()];
        names.extend(kept.fields().iter().map(|field| field.name().clone()));
        names.push(published::EMBEDDING.to_owned());
        let schema = schema(kept, taken, flags.is_some(), groups.is_some(), neighbors.is_some())?;
        Ok(Self { job, latents, corpus, flags, groups, neighbors, numbers, partitions, names, schema })
    }

    /// The columns.
    pub fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    /// How many rows there are; never none.
    pub fn num_rows(&self) -> usize {
        self.corpus.len()
    }

    /// Rows of `latents` that are left out, for they have no vector.
    pub fn num_left_out(&self) -> usize {
        self.corpus.all().len() - self.corpus.len()
    }

    /// Values of a vector.
    pub fn dim(&self) -> usize {
        self.corpus.dim()
    }

    /// Whether the rows have their neighbors.
    pub fn has_neighbors(&self) -> bool {
        self.neighbors.is_some()
    }

    /// Hands all rows to `sink`, in order, some at a time, with the number of the first.
    pub fn each(&self, mut sink: impl FnMut(usize, RecordBatch) -> Result<(), Error>) -> Result<(), Error> {
        let job = self.job;
        let names: Vec<&str> = self.names.iter().map(String::as_str).collect();
        let batch_rows = (BATCH_BYTES / (self.dim().max(1) * size_of::<f32>())).clamp(1, BATCH_ROWS);
        let (mut position, mut number) = (0, 0);
        for (place, partition) in self.corpus.partitions().iter().enumerate() {
            let follow = |live: &Option<Live>, table, columns| {
                live.as_ref().map(|live| Following::new(job, table, live, partition, columns))
            };
            let mut beside = Beside {
                flags: follow(&self.flags, &job.anomalies, &FLAG_COLUMNS),
                neighbors: follow(&self.neighbors, &job.neighbors, &NEIGHBOR_COLUMNS),
                groups: self.groups_of(place)?,
            };
            for file in self.latents.of(partition) {
                let mut batches = job.context.block_on(job.latents.scan(file, &names, None, batch_rows))?;
                while let Some(batch) = job.context.block_on(batches.try_next())? {
                    job.context.stop.check()?;
                    let at = Place { partition: place, position, file };
                    let rows = self.rows(&at, &batch, &mut beside)?;
                    position += batch.num_rows();
                    let num_rows = rows.num_rows();
                    if num_rows > 0 {
                        sink(number, rows)?;
                    }
                    number += num_rows;
                }
            }
            let Beside { flags, neighbors, .. } = beside;
            for following in [flags, neighbors].into_iter().flatten() {
                following.end()?;
            }
        }
        Ok(())
    }

    /// The number of the row of an image, if it has one; `partition` as [`PartitionValues`] write it, empty in a table without.
    pub fn find(&self, id: &str, partition: &str) -> Option<u32> {
        let number = self.corpus.find(id, *self.partitions.get(partition)?)?;
        self.numbers.get(self.corpus.position(number)).copied()
    }

    /// Puts together the rows of a batch of `latents` that have a vector.
    fn rows(&self, at: &Place<'_>, batch: &RecordBatch, beside: &mut Beside<'_>) -> Result<RecordBatch, Error> {
        let column = |name: &str| -> Result<&ArrayRef, Error> {
            batch.column_by_name(name).ok_or_else(|| Error::Usage {
                message: format!(
                    "{} has no column `{name}`, which [source] columns names",
                    self.job.latents.store().url()
                ),
                hint: "name the columns that the pipeline was run with, or run it again to another [output] table"
                    .to_owned(),
            })
        };
        let is_chosen: BooleanArray =
            (0..batch.num_rows()).map(|row| Some(self.corpus.number_at(at.position + row).is_some())).collect();
        let chosen = |name: &str| -> Result<ArrayRef, Error> { filter(column(name)?, &is_chosen).map_err(rows_error) };
        let embeddings = chosen(published::EMBEDDING)?;
        self.check_lengths(at.file, embeddings.as_list::<i32>())?;
        let num_rows = embeddings.len();
        let name = self.corpus.partitions()[at.partition].to_string();
        let partition: ArrayRef = if name.is_empty() {
            new_null_array(&DataType::Utf8, num_rows)
        } else {
            Arc::new(StringArray::from(vec![name.as_str(); num_rows]))
        };
        let mut columns = vec![chosen(published::IMAGE_ID)?, partition];
        let kept = &self.names[1..self.names.len() - 1];
        columns.extend(kept.iter().map(|name| chosen(name)).collect::<Result<Vec<_>, _>>()?);
        let ids = column(published::IMAGE_ID)?.as_string::<i32>();
        columns.extend(beside.flags_of(ids, &is_chosen)?);
        if let Some(groups) = &beside.groups {
            let start = at.position - self.corpus.positions_of(at.partition).start;
            let members: Vec<Option<Member>> = groups[start..start + batch.num_rows()]
                .iter()
                .zip(is_chosen.values())
                .filter_map(|(member, is_chosen)| is_chosen.then_some(*member))
                .collect();
            columns.extend(group_columns(&members));
        }
        columns.push(embeddings);
        columns.extend(beside.neighbors_of(ids, &is_chosen, |id, partition| self.find(id, partition))?);
        RecordBatch::try_new(Arc::clone(&self.schema), columns).map_err(rows_error)
    }

    fn check_lengths(&self, file: &LiveFile, lists: &ListArray) -> Result<(), TableError> {
        let expected = self.dim();
        match lists.offsets().lengths().find(|length| *length != expected) {
            Some(found) => Err(TableError::Vector { url: file.url.to_string(), found, expected }),
            None => Ok(()),
        }
    }

    /// What `groups` says of a partition's rows, by their places in it.
    fn groups_of(&self, partition: usize) -> Result<Option<Vec<Option<Member>>>, Error> {
        let (Some(live), job) = (&self.groups, self.job) else { return Ok(None) };
        let values = &self.corpus.partitions()[partition];
        let own = values.to_string();
        let positions = self.corpus.positions_of(partition);
        let mut members = vec![None; positions.len()];
        for file in live.of(values) {
            let mut batches = job.context.block_on(job.groups.scan(file, &GROUP_COLUMNS, None, BATCH_ROWS))?;
            while let Some(rows) = job.context.block_on(batches.try_next())? {
                job.context.stop.check()?;
                let [ids, group_ids, heads, partitions] =
                    [0, 1, 2, 3].map(|number| rows.column(number).as_string::<i32>());
                let sizes = rows.column(4).as_primitive::<Int64Type>();
                for row in 0..rows.num_rows() {
                    let id = ids.value(row);
                    let is_own = partitions.is_null(row) || partitions.value(row) == own;
                    let member = u128::from_str_radix(group_ids.value(row), 16).ok().map(|group_id| Member {
                        group_id,
                        group_size: sizes.value(row),
                        is_representative: is_own && heads.value(row) == id,
                    });
                    let number = self.corpus.find(id, partition).ok_or_else(|| other_run(&job.groups))?;
                    members[self.corpus.position(number) - positions.start] = member;
                }
            }
        }
        Ok(Some(members))
    }
}

/// Where a batch of `latents` lies.
struct Place<'a> {
    /// Its partition, by the place in the corpus.
    partition: usize,
    /// Position of its first row.
    position: usize,
    file: &'a LiveFile,
}

/// What is read beside the rows of a partition.
struct Beside<'a> {
    flags: Option<Following<'a>>,
    neighbors: Option<Following<'a>>,
    groups: Option<Vec<Option<Member>>>,
}

impl Beside<'_> {
    /// The columns of `anomalies` for those of some rows of `latents` that are chosen.
    fn flags_of(&mut self, ids: &StringArray, is_chosen: &BooleanArray) -> Result<Vec<ArrayRef>, Error> {
        let Some(following) = &mut self.flags else { return Ok(Vec::new()) };
        let mut flags = Flags::default();
        for row in 0..ids.len() {
            let (is_chosen, mut is_there) = (is_chosen.value(row), false);
            following.take(ids.value(row), |rows, row| {
                if is_chosen {
                    is_there = true;
                    flags.push(Some((rows, row)));
                }
                Ok(())
            })?;
            if is_chosen && !is_there {
                flags.push(None);
            }
        }
        Ok(flags.finish().into())
    }

    /// The lists of `neighbors` likewise; `find` gives the number of an image's row by its id and partition.
    fn neighbors_of(
        &mut self,
        ids: &StringArray,
        is_chosen: &BooleanArray,
        find: impl Fn(&str, &str) -> Option<u32>,
    ) -> Result<Option<ArrayRef>, Error> {
        let Some(following) = &mut self.neighbors else { return Ok(None) };
        let table = following.table;
        let mut lists = Lists::default();
        for row in (0..ids.len()).filter(|row| is_chosen.value(*row)) {
            following.take(ids.value(row), |rows, row| {
                let [near, partitions] = [1, 3].map(|number| rows.column(number).as_string::<i32>());
                let partition = if partitions.is_null(row) { "" } else { partitions.value(row) };
                let number = find(near.value(row), partition).ok_or_else(|| other_run(table))?;
                lists.push(number, rows.column(2).as_primitive::<Float32Type>().value(row));
                Ok(())
            })?;
            lists.end_row();
        }
        lists.finish().map(Some).map_err(rows_error)
    }
}

fn rows_error(source: ArrowError) -> Error {
    Error::Rows { table: TableName::Latents.name(), source }
}

/// What `groups` says of an image.
#[derive(Debug, Clone, Copy)]
struct Member {
    group_id: u128,
    group_size: i64,
    is_representative: bool,
}

fn group_columns(members: &[Option<Member>]) -> [ArrayRef; 3] {
    let ids = members.iter().map(|member| member.map(|member| format!("{:032x}", member.group_id)));
    let sizes = members.iter().map(|member| member.map(|member| member.group_size));
    let heads = members.iter().map(|member| member.map(|member| member.is_representative));
    [
        Arc::new(ids.collect::<StringArray>()),
        Arc::new(sizes.collect::<Int64Array>()),
        Arc::new(heads.collect::<BooleanArray>()),
    ]
}

/// Columns of `anomalies`.
struct Flags {
    scores: Float64Builder,
    is_anomaly: BooleanBuilder,
    reasons: ListBuilder<StringBuilder>,
}

impl Default for Flags {
    fn default() -> Self {
        let element = Field::new("element", DataType::Utf8, false);
        Self {
            scores: Float64Builder::new(),
            is_anomaly: BooleanBuilder::new(),
            reasons: ListBuilder::new(StringBuilder::new()).with_field(element),
        }
    }
}

impl Flags {
    /// Takes a row of `anomalies`; `None`: there is none.
    fn push(&mut self, row: Option<(&RecordBatch, usize)>) {
        let Some((rows, row)) = row else {
            self.scores.append_null();
            self.is_anomaly.append_null();
            self.reasons.append_null();
            return;
        };
        let (scores, flags) = (rows.column(1).as_primitive::<Float64Type>(), rows.column(2).as_boolean());
        self.scores.append_option(scores.is_valid(row).then(|| scores.value(row)));
        self.is_anomaly.append_option(flags.is_valid(row).then(|| flags.value(row)));
        let reasons = rows.column(3).as_list::<i32>().value(row);
        self.reasons.append_value(reasons.as_string::<i32>());
    }

    fn finish(mut self) -> [ArrayRef; 3] {
        [Arc::new(self.scores.finish()), Arc::new(self.is_anomaly.finish()), Arc::new(self.reasons.finish())]
    }
}

/// Lists of neighbors.
#[derive(Default)]
struct Lists {
    numbers: Vec<i64>,
    distances: Vec<f32>,
    lengths: Vec<usize>,
    ended: usize,
}

impl Lists {
    fn push(&mut self, number: u32, distance: f32) {
        self.numbers.push(number.into());
        self.distances.push(distance);
    }

    /// The row's list is whole.
    fn end_row(&mut self) {
        self.lengths.push(self.numbers.len() - self.ended);
        self.ended = self.numbers.len();
    }

    fn finish(self) -> Result<ArrayRef, ArrowError> {
        let offsets = OffsetBuffer::from_lengths(self.lengths);
        let fields = neighbor_fields();
        let lists: [ArrayRef; 2] =
            [Arc::new(Int64Array::from(self.numbers)), Arc::new(Float32Array::from(self.distances))];
        let columns = fields.iter().zip(lists).map(|(field, values)| {
            let DataType::List(element) = field.data_type() else {
                return Err(ArrowError::SchemaError("neighbors are lists".to_owned()));
            };
            Ok(Arc::new(ListArray::try_new(Arc::clone(element), offsets.clone(), values, None)?) as ArrayRef)
        });
        let columns = columns.collect::<Result<_, _>>()?;
        Ok(Arc::new(StructArray::try_new(fields, columns, None)?))
    }
}

fn neighbor_fields() -> Fields {
    let list = |data_type| DataType::List(Arc::new(Field::new("element", data_type, false)));
    Fields::from(vec![
        Field::new("ids", list(DataType::Int64), false),
        Field::new("distances", list(DataType::Float32), false),
    ])
}

fn schema(
    kept: &Schema,
    taken: &[&str],
    with_flags: bool,
    with_groups: bool,
    with_neighbors: bool,
) -> Result<SchemaRef, Error> {
    let of = |table: TableName, name: &str| -> Result<Field, Error> {
        let field = data_schema(table, &Schema::empty()).field_with_name(name).cloned();
        // A partition may have rows that the stage has not come to.
        field.map(|field| field.with_nullable(true)).map_err(|source| Error::Rows { table: table.name(), source })
    };
    let mut after = Vec::new();
    if with_flags {
        for name in &FLAG_COLUMNS[1..] {
            after.push(of(TableName::Anomalies, name)?);
        }
    }
    if with_groups {
        for name in [published::GROUP_ID, published::GROUP_SIZE] {
            after.push(of(TableName::Groups, name)?);
        }
        after.push(Field::new(column::IS_REPRESENTATIVE, DataType::Boolean, true));
    }
    after.push(Field::new(published::EMBEDDING, vector_type(), false));
    if with_neighbors {
        after.push(Field::new(column::NEIGHBORS, DataType::Struct(neighbor_fields()), false));
    }
    let mut fields = vec![
        Field::new(published::IMAGE_ID, DataType::Utf8, false),
        Field::new(column::PARTITION, DataType::Utf8, true),
    ];
    let names: Vec<&str> =
        fields.iter().chain(&after).map(|field| field.name().as_str()).chain(taken.iter().copied()).collect();
    let kept: Vec<Field> =
        kept.fields().iter().map(|field| field.as_ref().clone().with_name(free_name(field.name(), &names))).collect();
    fields.extend(kept);
    fields.extend(after);
    Ok(Arc::new(Schema::new(fields)))
}

/// The rows of a partition of a table that stand in the order of those of `latents`: none or some for each image.
struct Following<'a> {
    job: &'a Job<'a>,
    table: &'a Table,
    batches: BoxStream<'static, Result<RecordBatch, TableError>>,
    batch: Option<RecordBatch>,
    /// The next row of the batch.
    row: usize,
    is_ended: bool,
}

impl<'a> Following<'a> {
    fn new(
        job: &'a Job<'a>,
        table: &'a Table,
        live: &Live,
        partition: &PartitionValues,
        columns: &'static [&'static str],
    ) -> Self {
        let files: Vec<LiveFile> = live.of(partition).cloned().collect();
        let opened = table.clone();
        let batches = futures::stream::iter(files)
            .then(move |file| {
                let table = opened.clone();
                async move { table.scan(&file, columns, None, BATCH_ROWS).await }
            })
            .try_flatten();
        Self { job, table, batches: batches.boxed(), batch: None, row: 0, is_ended: false }
    }

    /// Hands the rows of an image to `each`, if it is the image whose rows come next.
    fn take(&mut self, id: &str, mut each: impl FnMut(&RecordBatch, usize) -> Result<(), Error>) -> Result<(), Error> {
        while let Some(batch) = self.next_batch()? {
            let ids = batch.column(0).as_string::<i32>();
            while self.row < batch.num_rows() && ids.value(self.row) == id {
                each(&batch, self.row)?;
                self.row += 1;
            }
            let is_another_image = self.row < batch.num_rows();
            self.batch = Some(batch);
            if is_another_image {
                break;
            }
        }
        Ok(())
    }

    /// Takes the batch that the next row lies in; `None` at the end.
    fn next_batch(&mut self) -> Result<Option<RecordBatch>, Error> {
        let mut batch = self.batch.take();
        while batch.as_ref().is_some_and(|batch| self.row == batch.num_rows()) || (batch.is_none() && !self.is_ended) {
            self.row = 0;
            batch = self.job.context.block_on(self.batches.try_next())?;
            self.is_ended = batch.is_none();
        }
        Ok(batch)
    }

    /// Fails where there are rows of images that `latents` does not have, or not in this order.
    fn end(mut self) -> Result<(), Error> {
        match self.next_batch()? {
            Some(_) => Err(other_run(self.table)),
            None => Ok(()),
        }
    }
}

/// A table whose rows were made of other latents, or by other settings.
fn other_run(table: &Table) -> Error {
    Error::Usage {
        message: format!(
            "{} is not up to date with the latents beside it and the pipeline's settings",
            table.store().url()
        ),
        hint: "run `lookalike run` with this pipeline first, so that all tables are of one run".to_owned(),
    }
}

/// What is live of a table that the pipeline has, where all of it is of these latents.
fn current(
    table: &Table,
    latents: &Live,
    live: Live,
    run_id: impl Fn(&PartitionValues) -> Option<String>,
) -> Result<Live, Error> {
    let is_current = |partition: &PartitionValues| {
        live.run_of(partition).is_some_and(|run| run_id(partition).as_deref() == Some(run))
    };
    if latents.partitions().iter().all(is_current) { Ok(live) } else { Err(other_run(table)) }
}

fn flags_of(job: &Job<'_>, latents: &Live) -> Result<Option<Live>, Error> {
    let Some(settings) = &job.pipeline.anomaly else { return Ok(None) };
    let live = job.context.block_on(job.anomalies.live())?;
    let reference = match flag::named_reference(job, settings)? {
        Some(named) => named,
        None => flag::own_reference(job, settings, latents),
    };
    let run_id = |partition: &PartitionValues| Some(flag::run_id(settings, latents, &reference, partition));
    current(&job.anomalies, latents, live, run_id).map(Some)
}

fn neighbors_of(job: &Job<'_>, latents: &Live) -> Result<Option<Live>, Error> {
    let Some(settings) = &job.pipeline.neighbors else { return Ok(None) };
    let live = job.context.block_on(job.neighbors.live())?;
    let Some(plan) = neighbors::Plan::read(job, settings, latents)? else { return Err(other_run(&job.neighbors)) };
    let runs = plan.current(job, &live)?;
    current(&job.neighbors, latents, live, |partition| runs.get(partition).cloned().flatten()).map(Some)
}

fn groups_of(job: &Job<'_>, latents: &Live, neighbors: Option<&Live>) -> Result<Option<Live>, Error> {
    let (Some((settings, distance)), Some(neighbors)) = (job.pipeline.groups(), neighbors) else { return Ok(None) };
    let live = job.context.block_on(job.groups.live())?;
    let run_id = |partition: &PartitionValues| Some(groups::run_id(settings, distance, latents, neighbors, partition));
    current(&job.groups, latents, live, run_id).map(Some)
}
