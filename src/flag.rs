//! Flags: which scores are strange, measured against a reference.
//!
//! A [`Reference`] is the frozen scores of rows taken as normal. Against it every score has a percentile and a conformal p-value
//! that mean the same tomorrow as today. A threshold by share or quantile is a statement about the reference, so one odd batch does
//! not move it. Where a pipeline names no reference, the rows themselves stand in for one.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::config::Threshold;
use crate::score::{Rule, Scores};
use crate::store::{PutOutcome, Store, StoreError};

/// The version of the reference's file format.
pub const FORMAT_VERSION: u32 = 1;

/// Scores that a reference file holds at most: exact quantiles of a million scores are 8 MB a rule in memory, and the error of a tail
/// share of 1 % is already ten times smaller than the share.
pub const MAX_ROWS: usize = 1_000_000;

/// Shares times counts are rounded up from this far below an integer: 0.1 x 10 is 0.999…98 in floating point, and means 1.
const COUNT_ROUNDING: f64 = 1e-9;

/// What to do with a model that gives no score, such as an encoder.
const NO_STAGE: &str = "a pipeline that needs no flags says enabled = false in [anomaly]";

/// A reference that cannot be used or made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReferenceError {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The file is no reference.
    #[error("cannot read the reference {url}")]
    Format {
        /// The file.
        url: String,
        /// What the parser found.
        source: serde_json::Error,
    },
    /// The file was written by another version of the format.
    #[error("the reference {url} has format version {found}, but this program reads {FORMAT_VERSION}")]
    Version {
        /// The file.
        url: String,
        /// Its version.
        found: u32,
    },
    /// The file was changed after it was written.
    #[error("the reference {url} was changed: its scores do not give the id {id}")]
    Changed {
        /// The file.
        url: String,
        /// The id it claims.
        id: String,
    },
    /// The scores in it are another model's.
    #[error("the reference {url} was calibrated with the model {found}, but the pipeline uses {wanted}")]
    OtherModel {
        /// The file.
        url: String,
        /// Its model.
        found: String,
        /// Ours.
        wanted: String,
    },
    /// It has no scores for the rule.
    #[error("{url} has no scores for the rule {}", rule.name())]
    NoScores {
        /// The file, or what stands in for it.
        url: String,
        /// The rule.
        rule: Rule,
    },
    /// Another reference lies where this one should go.
    #[error("another reference is already at {url}, and references never change")]
    Exists {
        /// The file.
        url: String,
    },
    /// Too many rows to keep the scores of.
    #[error("a reference file holds at most {MAX_ROWS} rows, and {found} satisfy `where`")]
    TooManyRows {
        /// Rows found.
        found: usize,
    },
}

impl ReferenceError {
    /// What the user can do about it, where there is more to say than the message does.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::OtherModel { .. } => Some("run `lookalike calibrate` with this model".to_owned()),
            Self::Exists { .. } => Some("write to a new name, and name it in [anomaly] reference".to_owned()),
            Self::TooManyRows { .. } => Some("choose fewer rows with --where".to_owned()),
            Self::NoScores { rule: Rule::KlDivergence | Rule::NegativeElbo, .. } => {
                Some(format!("the rule needs a model with mu and logvar (and, for the ELBO, a likelihood); {NO_STAGE}"))
            }
            Self::NoScores { .. } => Some(format!("the rule needs a model with a reconstruction; {NO_STAGE}")),
            Self::Store(error) if error.is_not_found() => Some("`lookalike calibrate` writes one".to_owned()),
            _ => None,
        }
    }
}

/// Frozen scores of rows taken as normal.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reference {
    format_version: u32,
    /// Fingerprint of the model, the counts and the scores: equal ids mean equal references.
    pub id: String,
    /// The model whose scores these are.
    pub model_sha256: String,
    /// Where the rows came from.
    pub source: String,
    /// Which of them were taken.
    pub predicate: Option<String>,
    /// Rows scored.
    pub num_rows: usize,
    /// Rows that could not be scored, which are not in it.
    pub num_rejected: usize,
    /// The scores of each rule that the model has, ascending.
    scores: BTreeMap<Rule, Vec<f64>>,
}

/// Gathers scores into a reference.
#[derive(Debug, Default)]
pub struct ReferenceBuilder {
    scores: BTreeMap<Rule, Vec<f64>>,
    num_rows: usize,
    num_rejected: usize,
}

impl ReferenceBuilder {
    /// Adds a row; `None` is one that could not be scored.
    pub fn push(&mut self, scores: Option<&Scores>) {
        let Some(scores) = scores else {
            self.num_rejected += 1;
            return;
        };
        self.num_rows += 1;
        for rule in Rule::ALL {
            if let Some(score) = scores.get(rule) {
                self.scores.entry(rule).or_default().push(score);
            }
        }
    }

    /// Adds the score of one rule alone.
    pub fn push_score(&mut self, rule: Rule, score: f64) {
        self.num_rows += 1;
        self.scores.entry(rule).or_default().push(score);
    }

    /// Freezes the reference.
    pub fn build(mut self, model_sha256: &str, source: &str, predicate: Option<String>) -> Reference {
        for scores in self.scores.values_mut() {
            scores.sort_by(f64::total_cmp);
        }
        let mut reference = Reference {
            format_version: FORMAT_VERSION,
            id: String::new(),
            model_sha256: model_sha256.to_owned(),
            source: source.to_owned(),
            predicate,
            num_rows: self.num_rows,
            num_rejected: self.num_rejected,
            scores: self.scores,
        };
        reference.id = reference.fingerprint();
        reference
    }
}

impl Reference {
    fn fingerprint(&self) -> String {
        let mut fingerprint = crate::hash::Fingerprint::new("reference")
            .with("model", &self.model_sha256)
            .with("rows", &self.num_rows.to_string())
            .with("rejected", &self.num_rejected.to_string());
        for (rule, scores) in &self.scores {
            let bytes: Vec<u8> = scores.iter().flat_map(|score| score.to_le_bytes()).collect();
            fingerprint = fingerprint.with(rule.name(), &crate::hash::sha256(&bytes));
        }
        fingerprint.short()
    }

    /// Reads the reference `name` of `store` and checks that it is whole and of this model.
    pub async fn read(store: &Store, name: &str, model_sha256: &str) -> Result<Self, ReferenceError> {
        let url = store.url_of(name);
        let text = store.get(name).await?;
        let reference: Self =
            serde_json::from_slice(&text).map_err(|source| ReferenceError::Format { url: url.clone(), source })?;
        if reference.format_version != FORMAT_VERSION {
            return Err(ReferenceError::Version { url, found: reference.format_version });
        }
        if reference.fingerprint() != reference.id {
            return Err(ReferenceError::Changed { url, id: reference.id });
        }
        if reference.model_sha256 != model_sha256 {
            return Err(ReferenceError::OtherModel {
                url,
                found: reference.model_sha256,
                wanted: model_sha256.to_owned(),
            });
        }
        Ok(reference)
    }

    /// Writes the reference as `name`, once: the same one again is fine, another one is refused.
    pub async fn write(&self, store: &Store, name: &str) -> Result<(), ReferenceError> {
        let url = store.url_of(name);
        let text =
            serde_json::to_vec_pretty(self).map_err(|source| ReferenceError::Format { url: url.clone(), source })?;
        match store.put_if_absent(name, text.into()).await? {
            PutOutcome::Created => Ok(()),
            PutOutcome::AlreadyThere => match Self::read(store, name, &self.model_sha256).await {
                Ok(there) if there.id == self.id => Ok(()),
                Ok(_) | Err(ReferenceError::OtherModel { .. }) => Err(ReferenceError::Exists { url }),
                Err(error) => Err(error),
            },
        }
    }

    /// The reference's scores of a rule, ascending, at least one. `url` names the reference in errors.
    pub fn scores(&self, rule: Rule, url: &str) -> Result<&[f64], ReferenceError> {
        match self.scores.get(&rule) {
            Some(scores) if !scores.is_empty() => Ok(scores),
            _ => Err(ReferenceError::NoScores { url: url.to_owned(), rule }),
        }
    }
}

/// The score above which (strictly) a row is an anomaly. `reference` is ascending; without scores in it there is no cutoff, unless
/// it is given.
///
/// With `contamination` c, at most the share c of the reference lies above it: of n scores, ⌊c n⌋.
pub fn cutoff(threshold: Threshold, reference: &[f64]) -> Option<f64> {
    let share = match threshold {
        Threshold::Contamination(share) => share,
        Threshold::Quantile(quantile) => 1.0 - quantile,
        Threshold::Value(value) => return Some(value),
    };
    let last = reference.len().checked_sub(1)?;
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a share of a count is a count")]
    let above = (share * reference.len() as f64 + COUNT_ROUNDING).floor() as usize;
    reference.get(last - above.min(last)).copied()
}

/// A score's place in the reference.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Judgment {
    /// Share of the reference at or below the score, in percent.
    pub severity_percentile: f64,
    /// (1 + number of reference scores at or above it) / (n + 1): under exchangeability, the chance that a normal row scores this
    /// high is at most this (Vovk, Gammerman & Shafer 2005).
    pub p_value: f64,
    /// Whether the score is strictly above the cutoff.
    pub is_anomaly: bool,
}

/// Judges one score. `reference` is ascending and not empty.
pub fn judge(score: f64, reference: &[f64], cutoff: f64) -> Judgment {
    let count = reference.len() as f64;
    let at_or_below = reference.partition_point(|other| *other <= score) as f64;
    let at_or_above = count - reference.partition_point(|other| *other < score) as f64;
    Judgment {
        severity_percentile: 100.0 * at_or_below / count,
        p_value: (1.0 + at_or_above) / (count + 1.0),
        is_anomaly: score > cutoff,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Stores;
    use url::Url;

    fn ten() -> Vec<f64> {
        (1..=10).map(f64::from).collect()
    }

    #[test]
    fn contamination_is_the_share_of_the_reference_above_the_cutoff() {
        for (share, above) in [(0.0, 0), (0.1, 1), (0.3, 3), (0.35, 3), (0.5, 5)] {
            let cutoff = cutoff(Threshold::Contamination(share), &ten()).unwrap();
            assert_eq!(ten().iter().filter(|score| **score > cutoff).count(), above, "{share}");
        }
    }

    #[test]
    fn a_quantile_is_the_contamination_that_it_leaves() {
        assert_eq!(cutoff(Threshold::Quantile(0.9), &ten()), Some(9.0));
        assert_eq!(cutoff(Threshold::Quantile(0.9), &[]), None);
    }

    #[test]
    fn a_score_at_the_cutoff_is_no_anomaly_and_one_above_is() {
        assert!(!judge(9.0, &ten(), 9.0).is_anomaly);
        assert!(judge(9.0 + 1e-12, &ten(), 9.0).is_anomaly);
    }

    #[test]
    fn ties_with_the_reference_count_for_the_percentile_and_for_the_p_value() {
        let judgment = judge(2.0, &[1.0, 2.0, 2.0, 3.0], 9.0);
        assert!((judgment.severity_percentile - 75.0).abs() < 1e-12);
        assert!((judgment.p_value - 4.0 / 5.0).abs() < 1e-12);
    }

    #[test]
    fn a_score_above_all_of_the_reference_has_the_smallest_p_value_that_its_size_allows() {
        let judgment = judge(99.0, &ten(), 9.0);
        assert!((judgment.p_value - 1.0 / 11.0).abs() < 1e-12);
        assert!((judgment.severity_percentile - 100.0).abs() < 1e-12);
    }

    #[tokio::test]
    async fn a_reference_is_read_back_as_written_and_never_overwritten() {
        let store = Stores::default().open(&Url::parse("memory:///refs").unwrap()).unwrap();
        let build = |score: f64| {
            let mut builder = ReferenceBuilder::default();
            builder.push_score(Rule::MeanSquaredError, score);
            builder.push_score(Rule::MeanSquaredError, 0.1 + 0.2);
            builder.build("model", "here", None)
        };
        let reference = build(0.25);
        reference.write(&store, "r.json").await.unwrap();
        reference.write(&store, "r.json").await.unwrap();
        assert_eq!(Reference::read(&store, "r.json", "model").await.unwrap(), reference);
        assert!(matches!(build(0.5).write(&store, "r.json").await, Err(ReferenceError::Exists { .. })));
        assert!(matches!(Reference::read(&store, "r.json", "another").await, Err(ReferenceError::OtherModel { .. })));
    }

    #[tokio::test]
    async fn a_reference_whose_scores_were_edited_is_refused() {
        let store = Stores::default().open(&Url::parse("memory:///edited").unwrap()).unwrap();
        let mut builder = ReferenceBuilder::default();
        builder.push_score(Rule::MeanSquaredError, 0.25);
        let reference = builder.build("model", "here", None);
        let text = serde_json::to_string(&reference).unwrap().replace("0.25", "0.26");
        store.put("r.json", text.into()).await.unwrap();
        assert!(matches!(Reference::read(&store, "r.json", "model").await, Err(ReferenceError::Changed { .. })));
    }
}
