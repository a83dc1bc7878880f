//! Which partitions of a table a run takes: by name, or by a range of dates.
//!
//! A selection says what is looked at now. Unlike `where`, it is no part of what the rows are: a partition that was backfilled alone is
//! up to date for a run over all.

use chrono::NaiveDate;

use super::PartitionValues;
use crate::config;

/// How dates are spelled in folder names: as ISO has it, and without the dashes.
const DATE_FORMATS: [&str; 2] = ["%Y-%m-%d", "%Y%m%d"];

/// Keys of tables whose date is spread over three folders.
const DATE_KEYS: [&str; 3] = ["year", "month", "day"];

/// Partitions that can be selected, named in an error.
const EXAMPLES_NAMED: usize = 5;

/// A selection that does not fit the table.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SelectionError {
    /// No partition has the values.
    #[error("the source has no partition {partition}; it has {available}")]
    NoSuchPartition {
        /// What was asked for.
        partition: String,
        /// Some of those there are.
        available: String,
        /// The nearest one, if one is near.
        similar: Option<String>,
    },
    /// A range of dates was asked for, and the partitions have none.
    #[error("--from and --to need partitions with a date, and {partition} has none")]
    NoDate {
        /// A partition without.
        partition: String,
    },
}

/// The partitions that a run takes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Selection {
    /// Partitions with all pairs of one of these; empty for all.
    pub partitions: Vec<PartitionValues>,
    /// Partitions of this date and later.
    pub from: Option<NaiveDate>,
    /// Partitions of this date and earlier.
    pub to: Option<NaiveDate>,
    /// The table as it was in this version, where it has versions; `None` for the newest.
    pub version: Option<u64>,
}

impl Selection {
    /// Reads `key=value` pairs joined by slashes, as in folder names.
    pub fn parse_partition(text: &str) -> Option<PartitionValues> {
        let text = text.trim_matches('/');
        let is_pairs = !text.is_empty()
            && text.split('/').all(|folder| folder.split_once('=').is_some_and(|(key, _)| !key.is_empty()));
        is_pairs.then(|| PartitionValues::from_path(&format!("{text}/")))
    }

    /// Checks that the selection fits a table that has `all` these partitions.
    pub fn check<'a>(&self, all: impl Iterator<Item = &'a PartitionValues> + Clone) -> Result<(), SelectionError> {
        for wanted in &self.partitions {
            if !all.clone().any(|values| has_pairs(values, wanted)) {
                let names: Vec<String> = all.map(PartitionValues::name).collect();
                let known: Vec<&str> = names.iter().map(String::as_str).collect();
                let wanted = wanted.to_string();
                let more = if names.len() > EXAMPLES_NAMED { ", …" } else { "" };
                return Err(SelectionError::NoSuchPartition {
                    similar: config::nearest(&wanted, &known).map(str::to_owned),
                    partition: wanted,
                    available: format!("{}{more}", known[..known.len().min(EXAMPLES_NAMED)].join(", ")),
                });
            }
        }
        if self.from.is_some() || self.to.is_some() {
            // The null partition has no date in any table.
            let dateless = |values: &&PartitionValues| {
                date(values).is_none() && values.pairs().iter().all(|(_, value)| value.is_some())
            };
            if let Some(values) = all.clone().find(dateless) {
                return Err(SelectionError::NoDate { partition: values.name() });
            }
        }
        Ok(())
    }

    /// Whether the selection takes a partition.
    pub fn takes(&self, values: &PartitionValues) -> bool {
        let is_named = self.partitions.is_empty() || self.partitions.iter().any(|wanted| has_pairs(values, wanted));
        let in_range = match (self.from, self.to) {
            (None, None) => true,
            (from, to) => {
                date(values).is_some_and(|date| from.is_none_or(|from| from <= date) && to.is_none_or(|to| date <= to))
            }
        };
        is_named && in_range
    }
}

fn has_pairs(values: &PartitionValues, wanted: &PartitionValues) -> bool {
    wanted.pairs().iter().all(|pair| values.pairs().contains(pair))
}

/// The date of a partition: the first value that is one (or starts with one, as `2026-11-22T13`), or `year`, `month` and `day`.
fn date(values: &PartitionValues) -> Option<NaiveDate> {
    let value = |key: &str| {
        let pair = values.pairs().iter().find(|(name, _)| name.eq_ignore_ascii_case(key));
        pair.and_then(|(_, value)| value.as_deref())
    };
    let in_one = values.pairs().iter().find_map(|(_, value)| {
        let value = value.as_deref()?;
        let day = value.split(['T', ' ', '-']).next().filter(|first| first.len() == 8).unwrap_or(value);
        let day = day.get(..10).unwrap_or(day);
        DATE_FORMATS.iter().find_map(|format| NaiveDate::parse_from_str(day, format).ok())
    });
    in_one.or_else(|| {
        let [year, month, day] = DATE_KEYS.map(value);
        NaiveDate::from_ymd_opt(year?.parse().ok()?, month?.parse().ok()?, day?.parse().ok()?)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn partition(text: &str) -> PartitionValues {
        Selection::parse_partition(text).unwrap()
    }

    fn day(text: &str) -> NaiveDate {
        NaiveDate::parse_from_str(text, "%Y-%m-%d").unwrap()
    }

    #[test]
    fn dates_are_found_however_folders_spell_them() {
        for text in [
            "ds=2026-11-22",
            "region=eu/ds=2026-11-22",
            "hour=2026-11-22T13",
            "ds=20261122",
            "year=2026/month=11/day=22",
            "year=2026/month=11/day=22/hour=5",
        ] {
            assert_eq!(date(&partition(text)), Some(day("2026-11-22")), "{text}");
        }
        for text in ["module=mono", "ds=2026-13-01", "year=2026/month=11", "ds=latest"] {
            assert_eq!(date(&partition(text)), None, "{text}");
        }
    }

    #[test]
    fn both_ends_of_a_range_are_taken() {
        let selection =
            Selection { from: Some(day("2026-11-02")), to: Some(day("2026-11-04")), ..Selection::default() };
        let taken: Vec<bool> =
            (1..=5).map(|number| selection.takes(&partition(&format!("ds=2026-11-0{number}")))).collect();
        assert_eq!(taken, [false, true, true, true, false]);
        let open = Selection { from: Some(day("2026-11-02")), ..Selection::default() };
        assert!(open.takes(&partition("ds=2027-01-01")));
    }

    #[test]
    fn a_partition_is_taken_by_all_pairs_or_some() {
        let selection =
            Selection { partitions: vec![partition("ds=1/region=eu"), partition("ds=2")], ..Selection::default() };
        assert!(selection.takes(&partition("ds=1/region=eu")));
        assert!(!selection.takes(&partition("ds=1/region=us")));
        assert!(selection.takes(&partition("ds=2/region=us")));
        assert!(Selection::default().takes(&PartitionValues::default()));
    }

    #[test]
    fn what_is_not_there_is_an_error_that_names_what_is() {
        let all = [partition("ds=2026-11-21"), partition("ds=2026-11-22")];
        let selection = Selection { partitions: vec![partition("ds=2026-11-23")], ..Selection::default() };
        let error = selection.check(all.iter()).unwrap_err();
        assert!(error.to_string().contains("ds=2026-11-21, ds=2026-11-22"), "{error}");
        let modules = [partition("module=mono")];
        let range = Selection { from: Some(day("2026-11-02")), ..Selection::default() };
        assert_eq!(range.check(modules.iter()), Err(SelectionError::NoDate { partition: "module=mono".to_owned() }));
        assert_eq!(range.check([partition("ds=__HIVE_DEFAULT_PARTITION__")].iter()), Ok(()));
    }

    #[test]
    fn text_without_pairs_is_no_partition() {
        for text in ["", "2026-11-22", "=x", "ds=1/x"] {
            assert_eq!(Selection::parse_partition(text), None, "{text}");
        }
    }
}
