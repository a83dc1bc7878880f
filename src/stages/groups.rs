//! The groups stage: `latents` and `neighbors` → `groups`.
//!
//! Near-duplicates are the pairs of the neighbor table within `[neighbors] duplicate_distance`, and images of the same bytes; how
//! groups come of them is said in [`crate::groups`]. The lists are read a batch at a time, and only what is near enough is kept.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use arrow::array::{Array as _, AsArray as _, Float32Array, Int32Array, Int64Array, RecordBatch, StringArray};
use arrow::datatypes::{Float32Type, Int32Type, Int64Type, Schema};
use futures::TryStreamExt as _;

use super::{Job, PartitionReport, StageReport};
use crate::config::{NeighborScope, Neighbors};
use crate::error::Error;
use crate::groups::{Facts, Grouping, Images, Member};
use crate::hash::Fingerprint;
use crate::schema::{STATUS_OK, TableName, column, data_schema};
use crate::source::PartitionValues;
use crate::table::{Live, LiveFile, Published, Table, TableError};

/// Name under which groups of more than one image are counted, by the partition of their representative.
pub const GROUPS: &str = "groups";

/// Name under which images are counted that another one represents.
pub const DUPLICATES: &str = "duplicates";

/// Rows read and put together at a time.
const ROWS_A_BATCH: usize = 65_536;

/// Digits of a group's id: 128 bits, by which no two of any number of groups meet by chance.
const GROUP_ID_DIGITS: usize = 32;

/// Groups the images of `latents` by the lists in `neighbors`, and publishes every partition whose groups may have changed.
/// `max_distance` is `settings.duplicate_distance`.
pub fn groups(job: &Job<'_>, settings: &Neighbors, max_distance: f64) -> Result<StageReport, Error> {
    let started = Instant::now();
    let mut report = StageReport::default();
    let read = || {
        let latents = job.context.block_on(job.latents.live())?;
        Ok((latents, job.context.block_on(job.neighbors.live())?))
    };
    job.settle_over(read, |(latents, neighbors)| {
        let latents = job.of_this_model(&job.latents, latents.clone())?;
        group_all(job, settings, max_distance, &latents, neighbors, &mut report)
    })?;
    report.secs = started.elapsed().as_secs_f64();
    Ok(report)
}

fn group_all(
    job: &Job<'_>,
    settings: &Neighbors,
    max_distance: f64,
    latents: &Live,
    neighbors: &Live,
    report: &mut StageReport,
) -> Result<(), Error> {
    let live = job.context.block_on(job.groups.live())?;
    job.remove_vanished(&job.groups, &live)?;
    let partitions = latents.partitions();
    report.partitions.retain(|partition, _| partitions.contains(partition));
    let mut due = Vec::new();
    for partition in &partitions {
        let run_id = run_id(settings, max_distance, latents, neighbors, partition);
        let is_live = live.run_of(partition) == Some(run_id.as_str());
        let entry = report.partitions.entry(partition.clone()).or_default();
        *entry = PartitionReport { run_id, written: entry.written, ..PartitionReport::default() };
        if is_live {
            count_live(job, &live, partition, entry)?;
        } else {
            due.push(partition.clone());
        }
    }
    let scopes: Vec<Vec<PartitionValues>> = match settings.scope {
        NeighborScope::Corpus | NeighborScope::Reference => vec![partitions],
        NeighborScope::Partition => partitions.into_iter().map(|partition| vec![partition]).collect(),
    };
    for partitions in scopes {
        if partitions.iter().any(|partition| due.contains(partition)) {
            let names = partitions.iter().map(ToString::to_string).collect();
            let scope = Scope { job, partitions, names };
            let grouping = scope.read(settings, max_distance, latents, neighbors)?;
            scope.publish(&grouping, &due, report)?;
        }
    }
    Ok(())
}

/// The run id of a partition's groups: they depend on every image and every list that may have a part in them.
pub fn run_id(
    settings: &Neighbors,
    max_distance: f64,
    latents: &Live,
    neighbors: &Live,
    partition: &PartitionValues,
) -> String {
    let mut fingerprint = Fingerprint::new("groups")
        .with("schema", &crate::schema::VERSION.to_string())
        .with("duplicate_distance", &max_distance.to_string())
        .with("partition", &partition.to_string());
    for searched in latents.partitions() {
        if settings.scope == NeighborScope::Corpus || searched == *partition {
            fingerprint = fingerprint
                .with(&searched.to_string(), latents.run_of(&searched).unwrap_or_default())
                .with("neighbors", neighbors.run_of(&searched).unwrap_or_default());
        }
    }
    fingerprint.short()
}

/// Counts the rows of a partition whose groups were there before this run.
fn count_live(
    job: &Job<'_>,
    live: &Live,
    partition: &PartitionValues,
    entry: &mut PartitionReport,
) -> Result<(), Error> {
    let columns = [column::IMAGE_ID, column::REPRESENTATIVE_ID, column::REPRESENTATIVE_PARTITION, column::GROUP_SIZE];
    let own = partition.to_string();
    for file in live.of(partition) {
        each_batch(job, &job.groups, file, &columns, |rows| {
            let [ids, heads, partitions] = [0, 1, 2].map(|number| rows.column(number).as_string::<i32>());
            let sizes = rows.column(3).as_primitive::<Int64Type>();
            for row in 0..rows.num_rows() {
                let is_own = partitions.is_null(row) || partitions.value(row) == own;
                count(entry, is_own && ids.value(row) == heads.value(row), sizes.value(row));
            }
        })?;
    }
    Ok(())
}

/// Counts one image.
fn count(entry: &mut PartitionReport, is_representative: bool, group_size: i64) {
    entry.num_rows += 1;
    for (name, counts) in [(GROUPS, is_representative && group_size > 1), (DUPLICATES, !is_representative)] {
        *entry.counts.entry(name.to_owned()).or_default() += u64::from(counts);
    }
}

/// Hands columns of a live file, in the order of the table, to `sink`, a batch at a time.
fn each_batch(
    job: &Job<'_>,
    table: &Table,
    file: &LiveFile,
    columns: &[&str],
    mut sink: impl FnMut(&RecordBatch),
) -> Result<(), Error> {
    job.context.stop.check()?;
    job.context.block_on(async {
        let mut batches = table.scan(file, columns, None, ROWS_A_BATCH).await?;
        while let Some(rows) = batches.try_next().await? {
            sink(&rows);
        }
        Ok::<_, TableError>(())
    })?;
    Ok(())
}

/// The partitions that share their groups.
struct Scope<'a> {
    job: &'a Job<'a>,
    partitions: Vec<PartitionValues>,
    /// The partitions as `neighbors` and `groups` name them.
    names: Vec<String>,
}

impl Scope<'_> {
    /// Reads the images that have a vector, and the pairs of them that are near enough.
    fn read(
        &self,
        settings: &Neighbors,
        max_distance: f64,
        latents: &Live,
        neighbors: &Live,
    ) -> Result<Grouping, Error> {
        let mut images = Images::default();
        let columns = [
            column::IMAGE_ID,
            column::STATUS,
            column::WIDTH,
            column::HEIGHT,
            column::IMAGE_BYTES,
            column::CONTENT_SHA256,
        ];
        for (number, partition) in (0_u32..).zip(&self.partitions) {
            for file in latents.of(partition) {
                each_batch(self.job, &self.job.latents, file, &columns, |rows| push(&mut images, number, rows))?;
            }
        }
        let mut grouping = Grouping::new(images, max_distance)?;
        let numbers: HashMap<&str, u32> = self.names.iter().map(String::as_str).zip(0..).collect();
        let k = settings.k.get();
        let mut num_full: u64 = 0;
        let columns =
            [column::IMAGE_ID, column::RANK, column::NEIGHBOR_ID, column::DISTANCE, column::NEIGHBOR_PARTITION];
        for (number, partition) in (0_u32..).zip(&self.partitions) {
            for file in neighbors.of(partition) {
                each_batch(self.job, &self.job.neighbors, file, &columns, |rows| {
                    num_full += connect(&mut grouping, number, &numbers, k, rows);
                })?;
            }
        }
        // A list that holds every other image hides none.
        if num_full > 0 && k + 1 < grouping.num_images() {
            tracing::warn!(
                "all {k} neighbors of {num_full} images lie within duplicate_distance; further duplicates of these may be in groups of \
                 their own: raise k in [neighbors]"
            );
        }
        Ok(grouping)
    }

    /// Writes the rows of those partitions that are due and makes them their content.
    fn publish(&self, grouping: &Grouping, due: &[PartitionValues], report: &mut StageReport) -> Result<(), Error> {
        let members = grouping.members();
        let mut images_of: Vec<Vec<u32>> = vec![Vec::new(); self.partitions.len()];
        for image in (0_u32..).take(grouping.num_images()) {
            images_of[grouping.name(image).1 as usize].push(image);
        }
        for (partition, images) in self.partitions.iter().zip(images_of) {
            self.job.context.stop.check()?;
            let entry = report.partitions.get_mut(partition).filter(|_| due.contains(partition));
            if let Some(entry) = entry {
                let published = self.publish_partition(grouping, &members, partition, &images, entry)?;
                entry.written |= published != Published::Unchanged;
            }
        }
        Ok(())
    }

    fn publish_partition(
        &self,
        grouping: &Grouping,
        members: &[Member],
        partition: &PartitionValues,
        images: &[u32],
        entry: &mut PartitionReport,
    ) -> Result<Published, Error> {
        let job = self.job;
        let schema = data_schema(TableName::Groups, &Schema::empty());
        let footer = job.footer(&entry.run_id)?;
        let file = job.groups.create_file(partition, &entry.run_id, 0, Arc::clone(&schema), &footer);
        let mut file = job.context.block_on(file)?;
        for images in images.chunks(ROWS_A_BATCH) {
            let member = |image: &u32| members[*image as usize];
            // Id of the representative, and its partition's name.
            let head = |image: &u32| {
                let (id, partition) = grouping.name(member(image).representative);
                (id, self.names[partition as usize].as_str())
            };
            for image in images {
                count(entry, member(image).representative == *image, i64::from(member(image).group_size));
            }
            let batch = RecordBatch::try_new(
                Arc::clone(&schema),
                vec![
                    Arc::new(StringArray::from_iter_values(images.iter().map(|image| grouping.name(*image).0))),
                    Arc::new(StringArray::from_iter_values(images.iter().map(|image| group_id(head(image))))),
                    Arc::new(StringArray::from_iter_values(images.iter().map(|image| head(image).0))),
                    Arc::new(
                        images
                            .iter()
                            .map(|image| Some(head(image).1).filter(|name| !name.is_empty()))
                            .collect::<StringArray>(),
                    ),
                    Arc::new(Float32Array::from_iter_values(images.iter().map(|image| member(image).distance))),
                    Arc::new(Int64Array::from_iter_values(
                        images.iter().map(|image| i64::from(member(image).group_size)),
                    )),
                    Arc::new(StringArray::from(vec![entry.run_id.as_str(); images.len()])),
                ],
            )
            .map_err(|source| Error::Rows { table: TableName::Groups.name(), source })?;
            job.context.block_on(file.write(&batch))?;
        }
        let file = job.context.block_on(file.close())?;
        Ok(job.context.block_on(job.groups.replace_partition(partition, &entry.run_id, &[file]))?)
    }
}

/// The id of the group that an image represents, which is the same in every run.
fn group_id((representative_id, partition): (&str, &str)) -> String {
    let group = Fingerprint::new("group").with("partition", partition).with("image", representative_id);
    let mut digits = group.full();
    digits.truncate(GROUP_ID_DIGITS);
    digits
}

/// Adds the images of some rows of `latents` that have a vector.
fn push(images: &mut Images, partition: u32, rows: &RecordBatch) {
    let [ids, statuses, hashes] = [0, 1, 5].map(|number| rows.column(number).as_string::<i32>());
    let [widths, heights] = [2, 3].map(|number| rows.column(number).as_primitive::<Int32Type>());
    let bytes = rows.column(4).as_primitive::<Int64Type>();
    for row in (0..rows.num_rows()).filter(|row| statuses.value(*row) == STATUS_OK) {
        // Features have none.
        let side = |sides: &Int32Array| if sides.is_valid(row) { i64::from(sides.value(row)) } else { 0 };
        let pixels = side(widths) * side(heights);
        let [pixels, bytes] = [pixels, bytes.value(row)].map(|count| u64::try_from(count).unwrap_or(0));
        let content = hashes.is_valid(row).then(|| hashes.value(row));
        images.push(ids.value(row), partition, Facts::new(pixels, bytes, content));
    }
}

/// Takes note of the pairs in some rows of `neighbors`. Returns how many of the rows are the last of a list of `k` and near all the
/// same.
fn connect(grouping: &mut Grouping, partition: u32, numbers: &HashMap<&str, u32>, k: usize, rows: &RecordBatch) -> u64 {
    let [ids, others, partitions] = [0, 2, 4].map(|number| rows.column(number).as_string::<i32>());
    let ranks = rows.column(1).as_primitive::<Int32Type>();
    let distances = rows.column(3).as_primitive::<Float32Type>();
    let mut num_full = 0;
    for row in 0..rows.num_rows() {
        if !grouping.is_near(distances.value(row)) {
            continue;
        }
        num_full += u64::from(usize::try_from(ranks.value(row)).is_ok_and(|rank| rank >= k));
        let other = numbers.get(if partitions.is_null(row) { "" } else { partitions.value(row) });
        let other = other.and_then(|other| grouping.find(others.value(row), *other));
        // An image that is not there was in latents that somebody has replaced meanwhile; the lists of the new ones come next.
        if let (Some(image), Some(other)) = (grouping.find(ids.value(row), partition), other) {
            grouping.connect(image, other, distances.value(row));
        }
    }
    num_full
}
