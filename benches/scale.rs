//! The scale model: what a run as tasks takes on so many machines, for tables that are not there.
//!
//! ```text
//! cargo bench --bench scale -- FIGURES.json SAMPLE.f32
//! ```
//!
//! FIGURES is what `benches/scale.py` measured: the first two runs in it calibrate the model, and all are compared with it. SAMPLE holds
//! embeddings of such rows (raw little-endian f32, row-major). Cells are trained on it, dealt to buckets, and probed, all by the code of
//! the stages; what a step costs a core is a sum of two terms, whose factors are those of the two runs:
//!
//! - *embed*: rows. *sort* and *probe*: rows, and rows times the centroids that each is multiplied with.
//! - *join*: what *probe* takes for its own rows; rows that are searched for; and rows of the cells that they look into.
//! - *merge*: what was found, and requests.
//!
//! To each comes what it reads and writes, by the bandwidth of a machine, and by the latency of requests, 16 of which are under way. The
//! time of a step is that of its slowest machine: tasks are dealt to machines as [`Share`] does, units as the planner cuts them.
//!
//! The store is one of 30 ms to the first byte and 100 MB/s a machine; prices are list prices of 2026 in us-east-1 in dollars: S3 0.005 per 1,000
//! writes and 0.0004 per 1,000 reads, a core of a compute-optimized machine 0.043 an hour (c7a).

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a measurement that goes wrong panics, and shows its figures; they are estimates"
)]

use std::collections::HashSet;

use lookalike::neighbors::buckets::{Buckets, bucket_rows};
use lookalike::neighbors::cells::{Cells, Probes, SAMPLE_ROWS_A_CELL, recall_by_probes, suggested_cells};
use lookalike::neighbors::exact::{Metric, QueryJoin};
use lookalike::tasks::Share;
use ndarray::{Array2, Axis};
use serde_json::Value;
use std::num::NonZeroUsize;

/// Seconds from a request to its first byte, and bytes a second of a machine.
const LATENCY_SECS: f64 = 0.03;
const BYTES_PER_SEC: f64 = 100e6;

/// Dollars.
const PUT: f64 = 0.005 / 1000.0;
const GET: f64 = 0.0004 / 1000.0;
const CORE_HOUR: f64 = 0.043;

/// Cores of a machine that the tables are about.
const CORES: f64 = 8.0;

/// Rows of a row group of what travels, at most: what goes from one task to another is one or more.
const ROW_GROUP_ROWS: f64 = 122_880.0;

/// Photographs a second that a core embeds, EfficientNet-Lite0 on 512x512 JPEG, and bytes of one: of the README's table.
const PHOTOGRAPHS_PER_SEC: f64 = 82.0;
const PHOTOGRAPH_BYTES: f64 = 43_500.0;

/// Rows of a partition of the tables that are told of, and most partitions.
const PARTITION_ROWS: f64 = 250_000.0;
const MOST_PARTITIONS: u64 = 1000;

/// Rows of the sample that are searched for, to choose how many cells are looked into and how much of the recall that gives.
const QUERIES: usize = 1000;
const RECALL: f64 = 0.99;

/// Most cells that are trained; a larger table has as many more as are looked into more.
const MOST_CELLS: usize = 8192;

const SEED: u64 = 1;

fn main() {
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| arg != "--bench").collect();
    let [figures, sample] = args.as_slice() else { panic!("give FIGURES.json SAMPLE.f32") };
    let figures: Value = serde_json::from_slice(&std::fs::read(figures).unwrap()).unwrap();
    let number = |name: &str| usize::try_from(figures[name].as_u64().unwrap()).unwrap();
    let setting = Setting {
        dim: number("dim"),
        k: number("k"),
        unit_rows: number("unit_rows") as u64,
        partitions: number("partitions") as u64,
    };
    let bytes = std::fs::read(sample).unwrap();
    let values: Vec<f32> = bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
    let sample = Array2::from_shape_vec((values.len() / setting.dim, setting.dim), values).unwrap();
    let runs = figures["runs"].as_array().unwrap();
    let [first, second] = [0, 1].map(|run| (Plan::of(&setting, &sample, rows_of(&runs[run])), &runs[run]));
    let costs = Costs::measured(&setting, &first, &second);
    println!("calibrated with {} and {} rows: {costs:?}", first.0.rows, second.0.rows);
    println!(
        "\npredicted / measured, of runs with {} tasks on two cores",
        figures["runs"][0]["steps"]["join"]["task_secs"].as_array().unwrap().len()
    );
    for run in runs {
        let plan = Plan::of(&setting, &sample, rows_of(run));
        compare(&setting, &plan, &costs, run);
    }
    println!(
        "\n| rows | machines | cells, looked into | buckets | embed | sort | probe | join | merge | commits | neighbors, in all | travels | requests | dollars | slowest / mean |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|");
    for exponent in 6..=9 {
        let rows = 10_f64.powi(exponent);
        let setting = Setting { partitions: ((rows / PARTITION_ROWS) as u64).clamp(4, MOST_PARTITIONS), ..setting };
        let plan = Plan::of(&setting, &sample, rows);
        for machines in [1, 8, 64, 512] {
            tell(&setting, &plan, &costs, machines);
        }
    }
}

fn rows_of(run: &Value) -> f64 {
    run["rows"].as_f64().unwrap()
}

/// What a table is like.
#[derive(Clone, Copy)]
struct Setting {
    dim: usize,
    k: usize,
    unit_rows: u64,
    partitions: u64,
}

/// What the planner makes of so many rows like those of the sample.
struct Plan {
    rows: f64,
    num_cells: f64,
    nprobe: f64,
    /// Rows of each bucket, and rows that come to it.
    buckets: Vec<(f64, f64)>,
    /// Pairs of buckets between which rows travel.
    pairs: f64,
    /// Rows of cells that a row is compared with.
    compared: f64,
    /// Tasks that merge.
    units: f64,
    /// Rows of an own bucket and of those that come, by unit: pairs of bucket and unit that lists are sent between.
    lists: f64,
}

impl Plan {
    fn of(setting: &Setting, all: &Array2<f32>, rows: f64) -> Self {
        // Evenly spaced, as they are sorted by cells.
        let spaced = |of: usize, count: usize| (0..count).map(|row| row * of / count).collect::<Vec<_>>();
        let sample = all.select(Axis(0), &spaced(all.nrows(), all.nrows().min(rows as usize)));
        let wanted = suggested_cells(rows as usize);
        let trained = wanted.min(MOST_CELLS).min(sample.nrows() / 8);
        let to_train = spaced(sample.nrows(), (trained * SAMPLE_ROWS_A_CELL).min(sample.nrows()));
        let cells = Cells::train(&sample.select(Axis(0), &to_train).view(), Metric::Cosine, trained, SEED);
        let assigned = cells.assign(&sample.view()).unwrap();
        // Cells that are not trained are like those that are, and as many more are looked into.
        let finer = wanted as f64 / cells.len() as f64;
        let nprobe_trained = fewest_probes(setting, &sample, &cells, &assigned);
        let scale = rows / sample.nrows() as f64;
        let mut rows_of = vec![0.0; cells.len()];
        for cell in assigned.iter().flatten() {
            rows_of[*cell as usize] += scale;
        }
        let counts: Vec<u64> = rows_of.iter().map(|rows| rows.round() as u64).collect();
        let buckets = Buckets::deal(&counts, bucket_rows(rows as u64, 4 * setting.unit_rows));
        let probes = cells.nearest(&sample.view(), nprobe_trained).unwrap();
        let mut arriving = vec![0.0; buckets.list().len()];
        let mut pairs = HashSet::new();
        let mut compared = 0.0;
        for row in 0..probes.num_rows() {
            let mine = probes.get(row);
            let Some(home) = mine.first().map(|cell| buckets.of_cell(*cell).start) else { continue };
            compared += mine.iter().map(|cell| rows_of[*cell as usize]).sum::<f64>();
            for to in buckets.destinations(home, mine) {
                arriving[to] += scale;
                pairs.insert((home, to));
            }
        }
        let num_buckets = buckets.list().len();
        let rows_a_partition = rows / setting.partitions as f64;
        let units = setting.partitions as f64 * (rows_a_partition / (4 * setting.unit_rows) as f64).ceil();
        // A unit has the rows of a run of buckets, of one partition; what has travelled comes from the buckets beside them.
        let units_a_partition = units / setting.partitions as f64;
        let own = setting.partitions as f64 * (num_buckets as f64 + units_a_partition - 1.0).max(1.0);
        let of_pairs = setting.partitions as f64 * (pairs.len() as f64).min(num_buckets as f64 * units_a_partition);
        let lists = if units_a_partition > 1.0 {
            (own + of_pairs).min(num_buckets as f64 * units)
        } else {
            num_buckets as f64 * units
        };
        let of_list = buckets.list().iter().map(|bucket| bucket.num_rows() as f64);
        Self {
            rows,
            num_cells: wanted as f64,
            nprobe: nprobe_trained as f64 * finer,
            buckets: of_list.zip(arriving).collect(),
            pairs: pairs.len() as f64,
            compared: compared / sample.nrows() as f64,
            units,
            lists,
        }
    }

    fn travellers(&self) -> f64 {
        self.buckets.iter().map(|(_, arriving)| arriving).sum()
    }
}

/// The fewest cells that give the recall in the sample.
fn fewest_probes(setting: &Setting, sample: &Array2<f32>, cells: &Cells, assigned: &[Option<u32>]) -> usize {
    let step = (sample.nrows() / QUERIES).max(1);
    let picked: Vec<usize> = (0..sample.nrows()).step_by(step).collect();
    let queries = sample.select(Axis(0), &picked);
    let own: Vec<Option<u32>> = picked.iter().map(|row| Some(*row as u32)).collect();
    let mut join = QueryJoin::excluding(&queries.view(), Metric::Cosine, setting.k, &own).unwrap();
    join.push(&sample.view(), &(0..sample.nrows() as u32).collect::<Vec<_>>()).unwrap();
    let orders: Probes = cells.nearest(&queries.view(), cells.len()).unwrap();
    recall_by_probes(&join.finish(), &orders, cells.len(), |row| assigned[row as usize]).fewest_probes(RECALL)
}

/// Seconds of a core for one of each, and bytes.
#[derive(Debug)]
struct Costs {
    start: f64,
    embed_row: f64,
    sort: [f64; 2],
    probe: [f64; 2],
    join: [f64; 2],
    merge: [f64; 2],
    /// Of all commits together, in one process.
    commits_row: f64,
    latents_row_bytes: f64,
    candidate_bytes: f64,
}

fn task_secs(run: &Value, step: &str) -> Vec<f64> {
    run["steps"][step]["task_secs"].as_array().unwrap().iter().map(|secs| secs.as_f64().unwrap()).collect()
}

fn commit_secs(run: &Value) -> f64 {
    run["commits"].as_object().unwrap().values().map(|commit| commit["secs"].as_f64().unwrap()).sum()
}

fn shuffled(run: &Value, step: &str, name: &str) -> f64 {
    run["steps"][step]["shuffle"][name].as_f64().unwrap()
}

/// Factors that are not negative, for two sums of two terms each.
fn factors([a, b]: [[f64; 2]; 2], [x, y]: [f64; 2]) -> [f64; 2] {
    let determinant = a[0] * b[1] - a[1] * b[0];
    let both = [(x * b[1] - y * a[1]) / determinant, (y * a[0] - x * b[0]) / determinant];
    match both {
        [first, second] if first >= 0.0 && second >= 0.0 => both,
        [first, _] if first < 0.0 => [0.0, (x + y) / (a[1] + b[1])],
        _ => [(x + y) / (a[0] + b[0]), 0.0],
    }
}

fn dot(factors: [f64; 2], terms: [f64; 2]) -> f64 {
    factors[0] * terms[0] + factors[1] * terms[1]
}

impl Plan {
    fn centroid_terms(&self) -> [f64; 2] {
        [self.rows, self.rows * self.num_cells]
    }

    fn join_terms(&self) -> [f64; 2] {
        [self.rows + self.travellers(), self.rows * self.compared]
    }

    fn candidates(&self, setting: &Setting) -> f64 {
        (self.rows + self.travellers()) * setting.k as f64
    }

    fn merge_gets(&self, setting: &Setting) -> f64 {
        self.units * self.buckets.len() as f64 + self.lists + self.candidates(setting) / ROW_GROUP_ROWS
    }
}

impl Costs {
    fn measured(setting: &Setting, first: &(Plan, &Value), second: &(Plan, &Value)) -> Self {
        // Tasks without work start, read the plan, and end.
        let start = task_secs(first.1, "probe").into_iter().fold(f64::INFINITY, f64::min);
        let work = |run: &Value, step: &str| task_secs(run, step).into_iter().map(|secs| secs - start).sum::<f64>();
        let fit = |step: &str, terms: &dyn Fn(&Plan) -> [f64; 2], less: &dyn Fn(&Plan) -> f64| {
            let secs = [first, second].map(|(plan, run)| (work(run, step) - less(plan)).max(0.0));
            factors([terms(&first.0), terms(&second.0)], secs)
        };
        let probe = fit("probe", &Plan::centroid_terms, &|_| 0.0);
        let candidates = shuffled(second.1, "join", "rows_written");
        Self {
            start,
            embed_row: work(second.1, "embed") / second.0.rows,
            sort: fit("sort", &Plan::centroid_terms, &|_| 0.0),
            probe,
            join: fit("join", &Plan::join_terms, &|plan| dot(probe, plan.centroid_terms())),
            merge: fit("merge", &|plan| [plan.candidates(setting), plan.merge_gets(setting)], &|_| 0.0),
            commits_row: commit_secs(second.1) / second.0.rows,
            latents_row_bytes: setting.dim as f64 * 4.0 + 150.0,
            candidate_bytes: shuffled(second.1, "join", "bytes_written") / candidates,
        }
    }

    fn traveller_bytes(setting: &Setting) -> f64 {
        // Vectors hardly shrink; a row's place and its cells do.
        setting.dim as f64 * 4.0 * 0.93 + 3.0
    }
}

/// What a step takes: seconds of a core of each task, bytes and requests of all.
struct Step {
    core_secs: Vec<f64>,
    bytes: f64,
    puts: f64,
    gets: f64,
}

fn puts_of(bytes: f64) -> f64 {
    let parts = (bytes / f64::from(10 << 20)).ceil().max(1.0);
    if parts > 1.0 { parts + 2.0 } else { 1.0 }
}

fn probe(setting: &Setting, plan: &Plan, costs: &Costs) -> Step {
    let num_buckets = plan.buckets.len() as f64;
    let bytes = plan.travellers() * Costs::traveller_bytes(setting);
    let secs = dot(costs.probe, plan.centroid_terms());
    Step {
        core_secs: plan.buckets.iter().map(|(rows, _)| secs * rows / plan.rows).collect(),
        bytes,
        puts: num_buckets * puts_of(bytes / num_buckets),
        gets: 0.0,
    }
}

fn join(setting: &Setting, plan: &Plan, costs: &Costs) -> Step {
    let num_buckets = plan.buckets.len() as f64;
    let found = plan.candidates(setting) * costs.candidate_bytes;
    let own = dot(costs.probe, plan.centroid_terms()) / plan.rows;
    // A row that travels is compared in all its buckets with what it looks into in all of them.
    let searched = dot(costs.join, plan.join_terms()) / (plan.rows + plan.travellers());
    Step {
        core_secs: plan.buckets.iter().map(|(rows, arriving)| rows * own + (rows + arriving) * searched).collect(),
        bytes: plan.travellers() * Costs::traveller_bytes(setting) + found,
        puts: num_buckets * puts_of(found / num_buckets),
        gets: num_buckets * num_buckets + plan.pairs + plan.travellers() / ROW_GROUP_ROWS,
    }
}

fn merge(setting: &Setting, plan: &Plan, costs: &Costs) -> Step {
    let secs = dot(costs.merge, [plan.candidates(setting), plan.merge_gets(setting)]);
    Step {
        core_secs: vec![secs / plan.units; plan.units as usize],
        bytes: plan.candidates(setting) * costs.candidate_bytes,
        puts: plan.units * 2.0,
        gets: plan.merge_gets(setting),
    }
}

fn compare(setting: &Setting, plan: &Plan, costs: &Costs, run: &Value) {
    let figure = |step: &str, name: &str| shuffled(run, step, name);
    let secs = |step: &str| task_secs(run, step).into_iter().map(|secs| secs - costs.start).sum::<f64>();
    let [probe, join, merge] = [probe(setting, plan, costs), join(setting, plan, costs), merge(setting, plan, costs)];
    let of = |predicted: f64, measured: f64| {
        let ratio =
            if measured == 0.0 { if predicted == 0.0 { 1.0 } else { f64::INFINITY } } else { predicted / measured };
        let decimals = usize::from(measured < 100.0);
        format!("{predicted:.decimals$} / {measured:.decimals$} = {ratio:.2}")
    };
    let total = |step: &Step| step.core_secs.iter().sum::<f64>();
    let written = figure("probe", "bytes_written") + figure("join", "bytes_written");
    let predicted = probe.bytes + plan.candidates(setting) * costs.candidate_bytes;
    println!(
        "{} rows: {} cells, {:.0} looked into, {} buckets",
        plan.rows,
        plan.num_cells,
        plan.nprobe,
        plan.buckets.len()
    );
    println!("  rows that travel  {}", of(plan.travellers(), figure("probe", "rows_written")));
    println!("  shuffle bytes     {}", of(predicted, written));
    let requests = |name: &str| ["probe", "join", "merge"].map(|step| figure(step, name)).iter().sum::<f64>();
    println!("  shuffle reads     {}", of(join.gets + merge.gets, requests("gets")));
    println!("  shuffle writes    {}", of(probe.puts + join.puts, figure("probe", "puts") + figure("join", "puts")));
    let embed = plan.rows * costs.embed_row;
    let sort = dot(costs.sort, plan.centroid_terms());
    println!("  core-seconds      embed {}, sort {}", of(embed, secs("embed")), of(sort, secs("sort")));
    println!("  seconds of commits {}", of(plan.rows * costs.commits_row, commit_secs(run)));
    println!(
        "                    probe {}, join {}, merge {}",
        of(total(&probe), secs("probe")),
        of(total(&join), secs("join")),
        of(total(&merge), secs("merge")),
    );
}

/// The seconds of a step on so many machines, as tasks are shared out, and how much slower the slowest is than the mean.
fn on_machines(step: &Step, machines: usize) -> (f64, f64) {
    let count = NonZeroUsize::new(machines).unwrap();
    let mut slowest: f64 = 0.0;
    for index in 0..machines {
        let (share, _) = Share::find(Some(index), Some(count), |_| None).unwrap();
        slowest = slowest.max(step.core_secs[share.of(step.core_secs.len())].iter().sum::<f64>());
    }
    let total: f64 = step.core_secs.iter().sum();
    let busy = machines.min(step.core_secs.len()).max(1) as f64;
    let mean = total / machines as f64;
    let moved = step.bytes / busy / BYTES_PER_SEC + (step.gets + step.puts) / busy / 16.0 * LATENCY_SECS;
    (slowest / CORES + moved, slowest / mean.max(f64::MIN_POSITIVE))
}

fn tell(setting: &Setting, plan: &Plan, costs: &Costs, machines: usize) {
    let units = (plan.rows / setting.unit_rows as f64).ceil();
    let even = |core_secs: f64, bytes: f64, puts: f64, gets: f64| Step {
        core_secs: vec![core_secs / units; units as usize],
        bytes,
        puts,
        gets,
    };
    let latents = plan.rows * costs.latents_row_bytes;
    let embed =
        even(plan.rows / PHOTOGRAPHS_PER_SEC, plan.rows * PHOTOGRAPH_BYTES + latents, units * 2.0, units * 64.0);
    let partitions = setting.partitions as usize;
    let sort_secs = dot(costs.sort, plan.centroid_terms());
    let sort = Step {
        core_secs: vec![sort_secs / partitions as f64; partitions],
        bytes: 3.0 * latents,
        puts: setting.partitions as f64 * puts_of(latents / partitions as f64),
        gets: units * 4.0,
    };
    let steps = [embed, sort, probe(setting, plan, costs), join(setting, plan, costs), merge(setting, plan, costs)];
    let secs: Vec<(f64, f64)> = steps.iter().map(|step| on_machines(step, machines)).collect();
    let puts: f64 = steps.iter().map(|step| step.puts).sum();
    let gets: f64 = steps.iter().map(|step| step.gets).sum();
    let core_hours: f64 = steps.iter().flat_map(|step| &step.core_secs).sum::<f64>() / 3600.0;
    let dollars = puts * PUT + gets * GET + core_hours * CORE_HOUR;
    let commits = plan.rows * costs.commits_row;
    let neighbors: f64 = secs[1..].iter().map(|(secs, _)| secs).sum();
    println!(
        "| {:.0e} | {machines} | {:.0}, {:.0} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {dollars:.0} | {:.2} |",
        plan.rows,
        plan.num_cells,
        plan.nprobe,
        plan.buckets.len(),
        time(secs[0].0),
        time(secs[1].0),
        time(secs[2].0),
        time(secs[3].0),
        time(secs[4].0),
        time(commits),
        time(neighbors + commits),
        size(steps[2].bytes),
        count(puts + gets),
        secs[3].1,
    );
}

fn time(secs: f64) -> String {
    match secs {
        secs if secs < 90.0 => format!("{secs:.0} s"),
        secs if secs < 5400.0 => format!("{:.0} min", secs / 60.0),
        secs if secs < 172_800.0 => format!("{:.1} h", secs / 3600.0),
        secs => format!("{:.1} d", secs / 86_400.0),
    }
}

fn size(bytes: f64) -> String {
    if bytes < 1e9 { format!("{:.0} MB", bytes / 1e6) } else { format!("{:.0} GB", bytes / 1e9) }
}

fn count(number: f64) -> String {
    if number < 1e4 {
        format!("{number:.0}")
    } else if number < 1e6 {
        format!("{:.0}k", number / 1e3)
    } else {
        format!("{:.1}M", number / 1e6)
    }
}
