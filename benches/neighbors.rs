//! How long the neighbor search takes: exact and by cells, on vectors that it makes or reads.
//!
//! ```text
//! cargo bench --bench neighbors -- exact ROWS DIM K METRIC        all rows with each other
//! cargo bench --bench neighbors -- ivf   ROWS DIM K RECALL        train, assign, choose nprobe, search all rows (cosine)
//! cargo bench --bench neighbors -- sizes DIM K RECALL FILE.csv    time per query from 10⁴ to 10⁶ rows, both ways
//! cargo bench --bench neighbors -- data  ROWS DIM FILE            only makes vectors: raw little-endian f32, row-major
//! ```
//!
//! ROWS is how many rows to make, or a file that `data` wrote. A run prints one line of JSON; times are in seconds of wall
//! clock, `cpu_secs` of processor time. Options: `--threads N`, `--cells N`, and of the rows that are made `--clusters N`
//! (2,000) or `--random`, all over the sphere. Clustered rows are normal with standard deviation 0.7 around centers that are
//! normal with 1; all rows are scaled to length 1.
//!
//! How well cells do depends on the clusters: where these have fewer rows than `k`, or are many more than the cells, a query
//! has to probe far more cells. `--clusters` shows it; `sizes` grows a table within the same clusters.
//!
//! Comparing with FAISS is the case `neighbors` of `side_by_side`; what `sizes` wrote is drawn by `plot.py`.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::cast_possible_truncation,
    clippy::disallowed_methods,
    reason = "a measurement that goes wrong panics, and shows its figures; it writes files of its own"
)]

use std::fmt::Write as _;
use std::path::Path;
use std::time::Instant;

use lookalike::neighbors::cells::{CellJoin, Cells, Probes, SAMPLE_ROWS_A_CELL, recall_by_probes, suggested_cells};
use lookalike::neighbors::exact::{Metric, QueryJoin, self_join};
use lookalike::neighbors::topk::NeighborLists;
use ndarray::{Array2, ArrayView2, Axis, Slice};
use rayon::prelude::*;

/// Queries by which nprobe is chosen, and as many others by which the recall is measured then.
const SAMPLE_QUERIES: usize = 1000;

/// Queries searched at a time by cells, as they come from a table sorted by cell. In many dimensions even those of a few
/// cells probe cells all over, and every block of them has all those prepared anew.
const QUERIES_A_BLOCK: usize = 262_144;

/// Queries of an exact search of which the time is told per query.
const EXACT_QUERIES: usize = 4096;

const SIZES: [usize; 5] = [10_000, 31_623, 100_000, 316_228, 1_000_000];

const SEED: u64 = 1;

fn main() {
    let mut args: Vec<String> = std::env::args().skip(1).filter(|arg| arg != "--bench").collect();
    let option = |args: &mut Vec<String>, name: &str| {
        let at = args.iter().position(|arg| arg == name)?;
        args.remove(at);
        Some(args.remove(at).parse::<usize>().unwrap())
    };
    if let Some(num_threads) = option(&mut args, "--threads") {
        rayon::ThreadPoolBuilder::new().num_threads(num_threads).build_global().unwrap();
    }
    let num_cells = option(&mut args, "--cells");
    let num_clusters = option(&mut args, "--clusters").unwrap_or(2000);
    let random = args.iter().position(|arg| arg == "--random").map(|at| args.remove(at)).is_some();
    let num_clusters = Some(num_clusters).filter(|_| !random);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let number = |text: &str| text.parse::<usize>().unwrap();
    match *args.as_slice() {
        ["exact", rows, dim, k, metric] => {
            let metric = serde_json::from_str(&format!("\"{metric}\"")).unwrap();
            exact(&vectors(rows, number(dim), num_clusters).view(), number(k), metric);
        }
        ["ivf", rows, dim, k, recall] => {
            let vectors = vectors(rows, number(dim), num_clusters);
            println!("{}", ivf(&vectors.view(), number(k), recall.parse().unwrap(), num_cells).line());
        }
        ["sizes", dim, k, recall, file] => {
            let all = make(SIZES[SIZES.len() - 1], number(dim), num_clusters);
            sizes(&all.view(), number(k), recall.parse().unwrap(), num_cells, Path::new(file));
        }
        ["data", rows, dim, file] => {
            let vectors = make(number(rows), number(dim), num_clusters);
            let bytes: Vec<u8> = vectors.iter().flat_map(|value| value.to_le_bytes()).collect();
            std::fs::write(file, bytes).unwrap();
        }
        // What `cargo test --benches` and `cargo bench` start.
        [] => println!("usage: exact | ivf | sizes | data; see benches/neighbors.rs"),
        _ => panic!("cannot read the arguments {args:?}; see benches/neighbors.rs"),
    }
}

/// The vectors of a file, or so many new ones.
fn vectors(rows: &str, dim: usize, num_clusters: Option<usize>) -> Array2<f32> {
    if let Ok(num_rows) = rows.parse() {
        return make(num_rows, dim, num_clusters);
    }
    let bytes = std::fs::read(rows).unwrap();
    let values: Vec<f32> = bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
    Array2::from_shape_vec((values.len() / dim, dim), values).unwrap()
}

/// The same rows for every number of threads, and the first ones of more; without clusters all over the sphere.
fn make(num_rows: usize, dim: usize, num_clusters: Option<usize>) -> Array2<f32> {
    let mut rng = fastrand::Rng::with_seed(SEED);
    let centers: Vec<f32> = (0..num_clusters.unwrap_or(0) * dim).map(|_| normal(&mut rng)).collect();
    let mut values = vec![0.0; num_rows * dim];
    values.par_chunks_mut(dim).enumerate().for_each(|(row, values)| {
        let mut rng = fastrand::Rng::with_seed(SEED + 1 + row as u64);
        for value in values.iter_mut() {
            *value = normal(&mut rng);
        }
        if let Some(num_clusters) = num_clusters {
            let center = rng.usize(..num_clusters) * dim;
            for (value, center) in values.iter_mut().zip(&centers[center..]) {
                *value = center + 0.7 * *value;
            }
        }
        let norm = values.iter().map(|value| value * value).sum::<f32>().sqrt();
        for value in values {
            *value /= norm;
        }
    });
    Array2::from_shape_vec((num_rows, dim), values).unwrap()
}

/// Box and Muller's transform, half of it.
fn normal(rng: &mut fastrand::Rng) -> f32 {
    (-2.0 * (1.0 - rng.f32()).ln()).sqrt() * (std::f32::consts::TAU * rng.f32()).cos()
}

fn exact(vectors: &ArrayView2<'_, f32>, k: usize, metric: Metric) {
    let clock = Clock::start();
    let found = self_join(vectors, metric, k).unwrap();
    let (secs, cpu_secs) = clock.read();
    let (num_rows, dim) = vectors.dim();
    println!(
        "{}",
        serde_json::json!({
            "search": "exact", "num_rows": num_rows, "dim": dim, "k": k, "metric": metric.name(),
            "threads": rayon::current_num_threads(), "total_secs": secs, "cpu_secs": cpu_secs,
            "found": found.iter().map(<[_]>::len).sum::<usize>(),
        })
    );
}

/// What a search by cells came to.
struct Ivf {
    num_rows: usize,
    dim: usize,
    k: usize,
    num_cells: usize,
    nprobe: usize,
    train_secs: f64,
    assign_secs: f64,
    choose_secs: f64,
    search_secs: f64,
    total_secs: f64,
    cpu_secs: Option<f64>,
    recall: f64,
}

impl Ivf {
    fn line(&self) -> serde_json::Value {
        serde_json::json!({
            "search": "ivf", "num_rows": self.num_rows, "dim": self.dim, "k": self.k, "cells": self.num_cells,
            "nprobe": self.nprobe, "threads": rayon::current_num_threads(), "train_secs": self.train_secs,
            "assign_secs": self.assign_secs, "choose_secs": self.choose_secs, "search_secs": self.search_secs,
            "total_secs": self.total_secs, "cpu_secs": self.cpu_secs, "recall": self.recall,
        })
    }
}

/// A whole self-join by cells, as the neighbors stage makes it of a table, but in memory.
fn ivf(vectors: &ArrayView2<'_, f32>, k: usize, target: f64, num_cells: Option<usize>) -> Ivf {
    let metric = Metric::Cosine;
    let (num_rows, dim) = vectors.dim();
    let num_cells = num_cells.unwrap_or_else(|| suggested_cells(num_rows));
    let clock = Clock::start();
    let sample = vectors.slice_axis(Axis(0), Slice::from(..num_rows.min(num_cells * SAMPLE_ROWS_A_CELL)));
    let cells = Cells::train(&sample, metric, num_cells, SEED);
    let train_secs = clock.read().0;

    let assigned = cells.assign(vectors).unwrap();
    let assign_secs = clock.read().0;

    // The first rows are as good a sample as any, for the rows are in random order.
    let num_sampled = SAMPLE_QUERIES.min(num_rows / 2);
    let sample = |first: usize| vectors.slice_axis(Axis(0), Slice::from(first..first + num_sampled));
    let (sampled, held_out) = (sample(0), sample(num_sampled));
    let truth = exact_lists(vectors, &sampled, 0, k);
    let all_cells = cells.nearest(&sampled, cells.len()).unwrap();
    let nprobe = recall_by_probes(&truth, &all_cells, cells.len(), |row| assigned[row as usize]).fewest_probes(target);
    let choose_secs = clock.read().0;

    let found = search(vectors, &cells, &assigned, nprobe, k);
    let (total_secs, cpu_secs) = clock.read();

    let truth = exact_lists(vectors, &held_out, num_sampled, k);
    let lists = |query: usize| found[num_sampled + query].as_slice();
    let num_true: usize = truth.iter().map(<[_]>::len).sum();
    let num_found: usize = truth
        .iter()
        .enumerate()
        .map(|(query, truth)| truth.iter().filter(|near| lists(query).contains(&near.row)).count())
        .sum();
    Ivf {
        num_rows,
        dim,
        k,
        num_cells: cells.len(),
        nprobe,
        train_secs,
        assign_secs: assign_secs - train_secs,
        choose_secs: choose_secs - assign_secs,
        search_secs: total_secs - choose_secs,
        total_secs,
        cpu_secs,
        recall: num_found as f64 / num_true as f64,
    }
}

/// The rows of each cell.
fn by_cell(assigned: &[Option<u32>], num_cells: usize) -> Vec<Vec<u32>> {
    let mut order = vec![Vec::new(); num_cells];
    for (row, cell) in assigned.iter().enumerate() {
        if let Some(cell) = cell {
            order[*cell as usize].push(row as u32);
        }
    }
    order
}

/// The rows found for every row, the queries in blocks of consecutive cells.
fn search(
    vectors: &ArrayView2<'_, f32>,
    cells: &Cells,
    assigned: &[Option<u32>],
    nprobe: usize,
    k: usize,
) -> Vec<Vec<u32>> {
    let order = by_cell(assigned, cells.len());
    let gather = |rows: &[u32]| {
        let mut gathered = Vec::with_capacity(rows.len() * vectors.ncols());
        for row in rows {
            gathered.extend_from_slice(vectors.row(*row as usize).to_slice().unwrap());
        }
        Array2::from_shape_vec((rows.len(), vectors.ncols()), gathered).unwrap()
    };
    // The table sorted by cell.
    let sorted: Vec<Array2<f32>> = order.par_iter().map(|rows| gather(rows)).collect();
    let mut found = vec![Vec::new(); vectors.nrows()];
    let mut next = 0;
    while next < order.len() {
        let mut queries: Vec<u32> = Vec::new();
        while next < order.len() && (queries.is_empty() || queries.len() + order[next].len() <= QUERIES_A_BLOCK) {
            queries.extend(&order[next]);
            next += 1;
        }
        let block = gather(&queries);
        let own_rows: Vec<_> = queries.iter().copied().map(Some).collect();
        let probes = if nprobe == 1 {
            Probes::own(&queries.iter().map(|row| assigned[*row as usize]).collect::<Vec<_>>())
        } else {
            cells.nearest(&block.view(), nprobe).unwrap()
        };
        let join = CellJoin::new(&block.view(), Metric::Cosine, k, &own_rows, &probes).unwrap();
        join.cells().par_iter().for_each(|&cell| {
            join.push(cell, &sorted[cell as usize].view(), &order[cell as usize]).unwrap();
        });
        for (query, list) in queries.iter().zip(join.finish().iter()) {
            found[*query as usize] = list.iter().map(|near| near.row).collect();
        }
    }
    found
}

/// The exact neighbors of `queries`, which are the rows of `vectors` from `first` on.
fn exact_lists(vectors: &ArrayView2<'_, f32>, queries: &ArrayView2<'_, f32>, first: usize, k: usize) -> NeighborLists {
    let numbers = |first: usize, num_rows: usize| first as u32..(first + num_rows) as u32;
    let own_rows: Vec<_> = numbers(first, queries.nrows()).map(Some).collect();
    let mut join = QueryJoin::excluding(queries, Metric::Cosine, k, &own_rows).unwrap();
    join.push(vectors, &numbers(0, vectors.nrows()).collect::<Vec<_>>()).unwrap();
    join.finish()
}

/// Both searches for the first rows of a table, more and more of them, a line each.
fn sizes(all: &ArrayView2<'_, f32>, k: usize, target: f64, num_cells: Option<usize>, file: &Path) {
    let mut lines =
        "num_rows,exact_secs_per_query,ivf_secs_per_query,ivf_search_secs_per_query,cells,nprobe,recall\n".to_owned();
    for num_rows in SIZES {
        let vectors = all.slice_axis(Axis(0), Slice::from(..num_rows));
        let clock = Clock::start();
        exact_lists(&vectors, &vectors.slice_axis(Axis(0), Slice::from(..EXACT_QUERIES)), 0, k);
        let exact = clock.read().0 / EXACT_QUERIES as f64;
        let ivf = ivf(&vectors, k, target, num_cells);
        println!("{}", ivf.line());
        let (total, search) = (ivf.total_secs / num_rows as f64, ivf.search_secs / num_rows as f64);
        writeln!(lines, "{num_rows},{exact:e},{total:e},{search:e},{},{},{:.4}", ivf.num_cells, ivf.nprobe, ivf.recall)
            .unwrap();
    }
    std::fs::write(file, lines).unwrap();
}

/// Wall clock and processor time since a moment.
struct Clock {
    wall: Instant,
    cpu_secs: Option<f64>,
}

impl Clock {
    fn start() -> Self {
        Self { wall: Instant::now(), cpu_secs: cpu_secs() }
    }

    fn read(&self) -> (f64, Option<f64>) {
        let cpu_secs = cpu_secs().zip(self.cpu_secs).map(|(now, then)| now - then);
        (self.wall.elapsed().as_secs_f64(), cpu_secs)
    }
}

/// Processor time of this process so far, where Linux tells it, in its hundredths of a second.
fn cpu_secs() -> Option<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    // The fields after the name, which is in parentheses: the 12th and 13th are user and system time.
    let ticks = |field: usize| stat.rsplit(')').next()?.split_whitespace().nth(field)?.parse::<f64>().ok();
    Some((ticks(11)? + ticks(12)?) / 100.0)
}
