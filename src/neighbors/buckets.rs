//! Cells dealt to tasks: which rows each task searches, and to which tasks a query has to travel.
//!
//! A bucket is a run of cells of about as many rows as every other one. Cells near each other have numbers near each other
//! ([`super::cells`]), so a row often looks into several cells of one bucket, and travels there once, or is there. A cell with
//! more rows than a bucket should have (rows that are much alike cannot be parted by centroids) is split: each part is a
//! bucket, and all that look into the cell look into every part.

use std::ops::Range;

use serde::{Deserialize, Serialize};

/// Most buckets of a table; a larger one has larger buckets. What travels goes from every bucket to every other one, and the
/// more rows a bucket has, the fewer travel.
const MOST_BUCKETS: u64 = 1024;

/// A cell is split if it alone has more than so many times the rows of a bucket.
const SPLIT: u64 = 2;

/// Some cells, or a part of one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bucket {
    /// The cells.
    pub cells: Range<u32>,
    /// The rows of the cell, by their place in it; all of them where there is more than one cell.
    pub rows: Range<u64>,
}

/// All cells, each in one bucket, or in several if it is split.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Buckets {
    buckets: Vec<Bucket>,
    /// For each cell the buckets that have rows of it.
    of_cell: Vec<Range<usize>>,
}

/// Rows of a bucket of a table of `num_rows`: `wanted`, unless there are too many buckets then.
pub fn bucket_rows(num_rows: u64, wanted: u64) -> u64 {
    wanted.max(num_rows.div_ceil(MOST_BUCKETS))
}

impl Buckets {
    /// Deals cells with so many rows each. Buckets have `most` rows, or fewer; up to twice as many if that is one cell.
    pub fn deal(rows_of: &[u64], most: u64) -> Self {
        let most = most.max(1);
        let mut buckets: Vec<Bucket> = Vec::new();
        let mut is_open = false;
        for (cell, num_rows) in (0_u32..).zip(rows_of) {
            match buckets.last_mut() {
                Some(bucket) if is_open && bucket.rows.end + num_rows <= most => {
                    bucket.cells.end = cell + 1;
                    bucket.rows.end += num_rows;
                }
                _ if *num_rows > SPLIT * most => {
                    let num_parts = num_rows.div_ceil(most);
                    let bound = |part: u64| {
                        u64::try_from(u128::from(part) * u128::from(*num_rows) / u128::from(num_parts))
                            .unwrap_or(*num_rows)
                    };
                    let parts = (0..num_parts).map(|part| bound(part)..bound(part + 1));
                    buckets.extend(parts.map(|rows| Bucket { cells: cell..cell + 1, rows }));
                    is_open = false;
                }
                _ => {
                    buckets.push(Bucket { cells: cell..cell + 1, rows: 0..*num_rows });
                    is_open = true;
                }
            }
        }
        Self::of(buckets)
    }

    /// Takes buckets that were dealt before.
    pub fn of(buckets: Vec<Bucket>) -> Self {
        let num_cells = buckets.last().map_or(0, |bucket| bucket.cells.end as usize);
        let mut of_cell = vec![0..0; num_cells];
        for (number, bucket) in buckets.iter().enumerate() {
            for cell in bucket.cells.clone() {
                let buckets = &mut of_cell[cell as usize];
                if buckets.start == buckets.end {
                    *buckets = number..number;
                }
                buckets.end = number + 1;
            }
        }
        Self { buckets, of_cell }
    }

    /// The buckets.
    pub fn list(&self) -> &[Bucket] {
        &self.buckets
    }

    /// The buckets that have rows of a cell.
    pub fn of_cell(&self, cell: u32) -> Range<usize> {
        self.of_cell.get(cell as usize).cloned().unwrap_or_default()
    }

    /// The buckets that a row of bucket `home` must travel to for the cells that it looks into, ascending.
    pub fn destinations(&self, home: usize, cells: &[u32]) -> Vec<usize> {
        let mut buckets: Vec<usize> = cells.iter().flat_map(|cell| self.of_cell(*cell)).collect();
        buckets.sort_unstable();
        buckets.dedup();
        buckets.retain(|bucket| *bucket != home);
        buckets
    }
}

impl Bucket {
    /// Rows of it.
    pub fn num_rows(&self) -> u64 {
        self.rows.end - self.rows.start
    }

    /// The part of consecutive rows of one of its cells that is in the bucket, of which the first is the `first`-th of the
    /// cell.
    pub fn part_of(&self, first: u64, num_rows: u64) -> Range<u64> {
        if self.cells.len() > 1 {
            return 0..num_rows;
        }
        let within = |row: u64| row.clamp(first, first + num_rows) - first;
        within(self.rows.start)..within(self.rows.end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(buckets: &Buckets) -> Vec<(Range<u32>, Range<u64>)> {
        buckets.list().iter().map(|bucket| (bucket.cells.clone(), bucket.rows.clone())).collect()
    }

    #[test]
    fn buckets_are_runs_of_cells_of_about_the_same_rows_and_hot_cells_are_split() {
        let buckets = Buckets::deal(&[4, 5, 0, 3, 15, 2, 35, 1, 1], 10);
        let expected = [
            (0..3, 0..9),
            (3..4, 0..3),
            (4..5, 0..15),
            (5..6, 0..2),
            (6..7, 0..8),
            (6..7, 8..17),
            (6..7, 17..26),
            (6..7, 26..35),
            (7..9, 0..2),
        ];
        assert_eq!(shape(&buckets), expected);
        assert_eq!(buckets.of_cell(1), 0..1);
        assert_eq!(buckets.of_cell(6), 4..8);
        assert_eq!(buckets.of_cell(9), 0..0);
        assert_eq!(Buckets::of(buckets.list().to_vec()), buckets);
        assert!(Buckets::deal(&[], 10).list().is_empty());
    }

    #[test]
    fn a_row_travels_once_to_each_other_bucket_that_it_looks_into() {
        let buckets = Buckets::deal(&[5, 5, 5, 5, 35], 10);
        assert_eq!(shape(&buckets).len(), 6);
        assert_eq!(buckets.destinations(0, &[1, 0]), [0_usize; 0]);
        assert_eq!(buckets.destinations(0, &[0, 2, 3]), [1]);
        assert_eq!(buckets.destinations(3, &[4, 0]), [0, 2, 4, 5]);
    }

    #[test]
    fn the_parts_of_a_split_cell_share_out_its_rows_file_by_file() {
        let buckets = Buckets::deal(&[35], 10);
        // The cell's rows lie in files of 20, 0 and 15.
        for (first, num_rows) in [(0_u64, 20_u64), (20, 0), (20, 15)] {
            let mut end = 0;
            for bucket in buckets.list() {
                let part = bucket.part_of(first, num_rows);
                if !part.is_empty() {
                    assert_eq!(part.start, end);
                    end = part.end;
                }
            }
            assert_eq!(end, num_rows);
        }
        assert_eq!(buckets.list().iter().map(Bucket::num_rows).sum::<u64>(), 35);
    }

    #[test]
    fn large_tables_have_large_buckets() {
        assert_eq!(bucket_rows(1_000_000, 131_072), 131_072);
        assert_eq!(bucket_rows(10_000_000_000, 131_072), 9_765_625);
    }
}
