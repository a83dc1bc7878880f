//! Comparison of partitions with the reference as a whole, for `runs`: no table of its own.
//!
//! What is compared are the scores of an image by itself, its pixels and its vector. Scores that compare an image with the reference say
//! nothing here: among its own rows, the reference's images have one neighbor fewer than new ones.

use std::collections::BTreeMap;

use super::Job;
use super::flag::{ReferenceInUse, scan};
use crate::config::Drift;
use crate::drift::{Check, Input, Side, Significance, compare};
use crate::error::Error;
use crate::pixel_stats::PixelStat;
use crate::reference::ReferenceRow;
use crate::score::Rule;
use crate::source::PartitionValues;

/// Compares some partitions with the reference; none where the pipeline names no reference.
pub fn drift(
    job: &Job<'_>,
    settings: &Drift,
    partitions: &[PartitionValues],
    reference: &ReferenceInUse,
) -> Result<BTreeMap<PartitionValues, Vec<Check>>, Error> {
    let mut checks = BTreeMap::new();
    let anomaly = job.pipeline.anomaly.as_ref().filter(|anomaly| anomaly.reference.is_some() && !partitions.is_empty());
    let Some((anomaly, reference)) = anomaly.zip(reference.reference()) else { return Ok(checks) };
    let rules: Vec<Rule> = Rule::OF_IMAGE.into_iter().filter(|rule| job.packages.gives(*rule)).collect();
    let scores = rules.iter().map(|rule| Input { name: rule.name(), has_lower_tail: false });
    let stats = PixelStat::ALL.map(|stat| Input { name: stat.name(), has_lower_tail: true });
    let inputs: Vec<Input<'_>> = scores.chain(stats).collect();

    let rows = reference.segments().flat_map(|(_, segment)| segment.rows()).map(|(row, _)| row);
    let reference = side_of(rows.filter(|row| row.is_counted), &rules);
    let significance = Significance { alpha: settings.alpha, ..Significance::default() };
    let latents = job.comparable_latents()?;
    for partition in partitions {
        let mut side = Side::default();
        for file in latents.of(partition) {
            scan(job, anomaly, file, |rows| {
                for row in (0..rows.len()).filter(|row| rows.is_ok(*row)) {
                    let mut numbers: Vec<Option<f64>> = rules.iter().map(|rule| rows.score(row, *rule)).collect();
                    numbers.extend(rows.stats(row));
                    side.push(rows.ids().value(row), &numbers, rows.embedding(row));
                }
                Ok(())
            })?;
        }
        checks.insert(partition.clone(), compare(&reference, &side, &inputs, significance));
    }
    Ok(checks)
}

/// The rows of a reference. Where it does not hold all vectors, it holds those of the rows whose keys have the smallest hashes, which
/// are the rows that are looked at.
fn side_of<'a>(rows: impl Iterator<Item = &'a ReferenceRow>, rules: &[Rule]) -> Side {
    let mut side = Side::default();
    for row in rows {
        let Some(embedding) = &row.embedding else { continue };
        let of_rule =
            |rule: &Rule| Rule::OF_IMAGE.iter().position(|other| other == rule).and_then(|place| row.scores[place]);
        let mut numbers: Vec<Option<f64>> = rules.iter().map(of_rule).collect();
        numbers.extend(row.stats);
        side.push(&row.key(), &numbers, embedding);
    }
    side
}
