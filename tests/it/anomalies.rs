//! Rules that compare with a reference, on real pictures: how well they find what is broken, what their error rates are worth, and
//! that they are what other people's code makes of the same numbers.

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use arrow::array::{Array as _, ArrayRef, AsArray as _, BinaryArray, BooleanArray, RecordBatch, StringArray};
use arrow::compute::{concat_batches, filter_record_batch, take_record_batch};
use arrow::datatypes::Float64Type;
use lookalike::decode::DecodeMode;
use lookalike::evaluation::auroc;
use lookalike::flag::{benjamini_hochberg, judge};
use lookalike::neighbors::exact::Metric;
use lookalike::random::SplitMix64;
use lookalike::reference::{FORMAT_VERSION, Header, LatentRows, Reference, ReferenceBuilder};
use lookalike::schema::TableName;
use lookalike::score::Rule;
use lookalike::source::PartitionValues;

use crate::support::{
    batches, cells, folder, image_table, lookalike, needed, parquet_file, parquet_rows, python, rows, write,
};

const MODULES: [&str; 2] = ["mono", "poly"];

/// Full runs over all cells with a model of each kind's sound cells, and an encoder of regions beside it. Half of the sound cells are
/// fitted to, calibrated with, or both.
struct Journey {
    folder: PathBuf,
}

impl Journey {
    fn tables(&self) -> PathBuf {
        self.folder.join("tables")
    }
}

fn pipeline(module: &str, source: &Path, more: &str) -> String {
    format!(
        "[pipeline]\nname = \"cells-{module}\"\n[source]\ntable = \"{}\"\ncolumns = [\"defect\", \"split\"]\n\
         where = \"module = '{module}'\"\n[model]\npackage = \"model-{module}\"\n[encoder]\npackage = \"{}\"\n\
         [output]\ntable = \"tables\"\n[anomaly]\nreference = \"reference-{module}.parquet\"\n{more}",
        source.display(),
        needed("LOOKALIKE_TEST_REGIONS").display(),
    )
}

fn journey() -> &'static Journey {
    static JOURNEY: OnceLock<Journey> = OnceLock::new();
    JOURNEY.get_or_init(|| {
        let folder = folder().keep();
        for module in MODULES {
            let file = format!("{module}.toml");
            write(&folder.join(&file), &pipeline(module, &cells(), ""));
            let part = |split: &str| format!("module = '{module}' AND split = '{split}'");
            let fit = ["fit", &file, "--color", "gray", "--latent-dim", "128", "--where", &part("fit")];
            lookalike(&folder, &fit).expect(0);
            let calibrate = ["calibrate", &file, "--where", &part("calibrate"), "--bank", &part("fit")];
            let told = lookalike(&folder, &calibrate).expect(0);
            assert!(told.stderr.contains("a new normal image is flagged with a chance of 5."), "{}", told.stderr);
            assert_eq!(lookalike(&folder, &["run", &file]).expect(0).summary()["status"], "committed");
        }
        Journey { folder }
    })
}

/// The rows of both tables of one kind of cells, in one order.
struct Cells {
    latents: RecordBatch,
    anomalies: RecordBatch,
}

fn cells_of(module: &str) -> Cells {
    let tables = journey().tables();
    let table = |name| {
        let partition = format!("module={module}");
        let found: Vec<RecordBatch> = batches(&tables, name)
            .into_iter()
            .filter(|(found, _)| *found == partition)
            .map(|(_, batch)| batch)
            .collect();
        concat_batches(&found[0].schema(), &found).unwrap()
    };
    let cells = Cells { latents: table(TableName::Latents), anomalies: table(TableName::Anomalies) };
    assert_eq!(cells.latents.column_by_name("image_id"), cells.anomalies.column_by_name("image_id"));
    cells
}

impl Cells {
    fn numbers(&self, name: &str) -> Vec<f64> {
        let column = self.latents.column_by_name(name).or_else(|| self.anomalies.column_by_name(name)).unwrap();
        column.as_primitive::<Float64Type>().values().to_vec()
    }

    fn splits(&self) -> Vec<String> {
        let splits = self.latents.column_by_name("split").unwrap().as_string::<i32>();
        splits.iter().flatten().map(str::to_owned).collect()
    }

    /// Scores of cells that are surely broken, and of sound ones that nothing was learned from.
    fn classes(&self, name: &str) -> (Vec<f64>, Vec<f64>) {
        let (scores, defects, splits) = (self.numbers(name), self.numbers("defect"), self.splits());
        let of =
            |keep: &dyn Fn(usize) -> bool| (0..scores.len()).filter(|row| keep(*row)).map(|row| scores[row]).collect();
        (of(&|row| defects[row] > 0.99), of(&|row| defects[row] == 0.0 && splits[row] == "rest"))
    }
}

#[test]
fn one_rule_finds_broken_cells_of_either_kind_and_of_both_together() {
    let [mono, poly] = MODULES.map(|module| cells_of(module).classes("fused"));
    let area = |(broken, sound): &(Vec<f64>, Vec<f64>)| auroc(broken, sound).unwrap();
    let all = ([&mono.0[..], &poly.0].concat(), [&mono.1[..], &poly.1].concat());
    assert_eq!((mono.1.len(), poly.1.len()), (294, 460));
    println!("AUROC: mono {:.4}, poly {:.4}, all {:.4}", area(&mono), area(&poly), area(&all));
    assert!(area(&mono) >= 0.95, "{}", area(&mono));
    assert!(area(&poly) >= 0.87, "{}", area(&poly));
    assert!(area(&all) >= 0.89, "{}", area(&all));
}

/// The interval around the share `p` of `count` draws that holds 99 % of them.
fn binomial_99(p: f64, count: usize) -> (usize, usize) {
    let mut chances = vec![(1.0 - p).powi(i32::try_from(count).unwrap())];
    for success in 0..count {
        chances.push(chances[success] * (count - success) as f64 / (success + 1) as f64 * p / (1.0 - p));
    }
    let mut below = 0.0;
    let mut low = None;
    for (successes, chance) in chances.into_iter().enumerate() {
        below += chance;
        if low.is_none() && below > 0.005 {
            low = Some(successes);
        }
        if below >= 0.995 {
            return (low.unwrap(), successes);
        }
    }
    (low.unwrap(), count)
}

#[test]
fn sound_cells_that_nothing_was_learned_from_have_the_p_values_that_chance_gives() {
    for module in MODULES {
        let (_, sound) = cells_of(module).classes("p_value");
        for alpha in [0.01, 0.05, 0.1] {
            let found = sound.iter().filter(|p| **p <= alpha).count();
            let (low, high) = binomial_99(alpha, sound.len());
            println!("{module}: {found} of {} sound cells have p <= {alpha} ({low} to {high})", sound.len());
            assert!((low..=high).contains(&found), "{module} {alpha}: {found} of {}", sound.len());
        }
    }
}

/// A reference of counted rows and a bank of rows of `latents`, and the p-values of other rows against it.
fn p_values(latents: &RecordBatch, counted: &[usize], bank: &[usize], tested: &[usize]) -> (Reference, Vec<f64>) {
    let part = |rows: &[usize]| {
        let rows: arrow::array::UInt64Array = rows.iter().map(|row| *row as u64).collect();
        take_record_batch(latents, &rows).unwrap()
    };
    let header = Header {
        format_version: FORMAT_VERSION,
        model_sha256: "m".to_owned(),
        elbo_samples: 0,
        decode: DecodeMode::Exact,
        source: "cells".to_owned(),
        predicate: None,
        bank: None,
        segment: None,
        regions: 9,
        metric: Metric::Cosine,
        k: 1,
    };
    let partition = PartitionValues::default();
    let mut builder = ReferenceBuilder::new(header);
    builder.push(&partition, &LatentRows::of(&part(counted), None).unwrap(), true).unwrap();
    builder.push(&partition, &LatentRows::of(&part(bank), None).unwrap(), false).unwrap();
    let reference = builder.build("cells").unwrap();
    let segment = reference.segment(None).unwrap();
    let tested = part(tested);
    let tested = LatentRows::of(&tested, None).unwrap();
    let numbers: Vec<usize> = (0..tested.len()).collect();
    let compared = segment.compare("", &tested, &numbers).unwrap();
    let sorted = segment.scores(Rule::Fused);
    let found = compared.iter().map(|row| judge(row.fused.unwrap(), sorted).p_value).collect();
    (reference, found)
}

#[test]
fn over_random_splits_the_share_of_false_flags_is_the_one_asked_for_at_most() {
    const SPLITS: u64 = 200;
    const RATE: f64 = 0.1;

    let cells = cells_of("mono");
    let (defects, splits) = (cells.numbers("defect"), cells.splits());
    let of = |keep: &dyn Fn(usize) -> bool| (0..defects.len()).filter(|row| keep(*row)).collect::<Vec<usize>>();
    // The model has learned from the cells of the bank; all other sound ones are exchangeable.
    let bank = of(&|row| splits[row] == "fit");
    let sound = of(&|row| defects[row] == 0.0 && splits[row] != "fit");
    let broken = of(&|row| defects[row] > 0.99);
    let (mut sum, mut alphas, mut num_found) = (0.0, [0.0; 3], 0);
    for split in 0..SPLITS {
        let mut random = SplitMix64::stream(17, split);
        let mut order = sound.clone();
        random.shuffle(&mut order);
        let (counted, new) = order.split_at(sound.len() / 2);
        let mut others = broken.clone();
        random.shuffle(&mut others);
        let tested = [new, &others[..60]].concat();
        let (_, p_values) = p_values(&cells.latents, counted, &bank, &tested);
        let cutoff = benjamini_hochberg(&mut p_values.clone(), RATE);
        let is_flagged = |p: &f64| cutoff.is_some_and(|cutoff| *p <= cutoff);
        let flagged = p_values.iter().filter(|p| is_flagged(p)).count();
        let false_ones = p_values[..new.len()].iter().filter(|p| is_flagged(p)).count();
        num_found += flagged - false_ones;
        sum += false_ones as f64 / flagged.max(1) as f64;
        for (sum, alpha) in alphas.iter_mut().zip([0.01, 0.05, 0.1]) {
            let below = p_values[..new.len()].iter().filter(|p| **p <= alpha).count();
            *sum += below as f64 / new.len() as f64 / SPLITS as f64;
        }
    }
    let average = sum / SPLITS as f64;
    println!(
        "false discovery rate {average:.4}, {num_found} true ones; shares of sound cells up to alpha: {alphas:.4?}"
    );
    assert!(average <= RATE, "{average}");
    // A procedure that flags nothing has no false flags either.
    assert!(num_found as f64 > 0.5 * 60.0 * SPLITS as f64, "{num_found}");
    for (share, alpha) in alphas.into_iter().zip([0.01, 0.05, 0.1]) {
        assert!(share <= alpha && share >= alpha - 0.02, "{share} of the sound cells have p <= {alpha}");
    }
}

#[test]
fn scores_p_values_and_flags_are_those_of_numpy_scipy_and_scikit_learn() {
    let journey = journey();
    for module in MODULES {
        let reference = journey.folder.join(format!("reference-{module}.parquet"));
        python("anomalies_agree.py", &[&reference, &journey.tables(), Path::new(&format!("module={module}"))]);
    }
    // The same with as many flags as a false discovery rate allows.
    let file = journey.folder.join("fdr.toml");
    let fdr = pipeline("mono", &cells(), "threshold = { fdr = 0.1 }\n").replace("\"tables\"", "\"fdr\"");
    write(&file, &fdr);
    lookalike(&journey.folder, &["run", "fdr.toml"]).expect(0);
    let reference = journey.folder.join("reference-mono.parquet");
    let told = python("anomalies_agree.py", &[&reference, &journey.folder.join("fdr"), Path::new("module=mono")]);
    assert!(told.contains("false discovery rate 0.1"), "{told}");
}

/// A gray picture of 300 x 300 as PNG.
fn picture(value: impl FnMut(u32, u32) -> u8) -> Vec<u8> {
    let mut value = value;
    let picture = image::GrayImage::from_fn(300, 300, |x, y| image::Luma([value(x, y)]));
    let mut png = std::io::Cursor::new(Vec::new());
    picture.write_to(&mut png, image::ImageFormat::Png).unwrap();
    png.into_inner()
}

#[test]
fn black_white_and_noise_are_flagged_by_the_default_rule() {
    let journey = journey();
    let mut random = SplitMix64(5);
    let pictures = [
        ("black", picture(|_, _| 0)),
        ("white", picture(|_, _| 255)),
        ("gray", picture(|_, _| 128)),
        ("noise", picture(|_, _| u8::try_from(random.below(256)).unwrap())),
    ];
    let table = RecordBatch::try_from_iter([
        ("image_id", Arc::new(StringArray::from_iter_values(pictures.iter().map(|(id, _)| *id))) as ArrayRef),
        ("image", Arc::new(BinaryArray::from_iter_values(pictures.iter().map(|(_, png)| png)))),
    ])
    .unwrap();
    let source = folder();
    let file = source.path().join("module=mono/x.parquet");
    std::fs::create_dir_all(file.parent().unwrap()).unwrap();
    #[expect(clippy::disallowed_methods, reason = "a test writes its own files")]
    std::fs::write(&file, parquet_file(&table, None)).unwrap();
    let with_defaults = pipeline("mono", source.path(), "")
        .replace("columns = [\"defect\", \"split\"]\n", "")
        .replace("\"tables\"", "\"odd\"");
    write(&journey.folder.join("odd.toml"), &with_defaults);
    let summary = lookalike(&journey.folder, &["run", "odd.toml"]).expect(0).summary();
    assert_eq!((summary["rows_ok"].as_u64(), summary["rows_flagged"].as_u64()), (Some(4), Some(4)), "{summary}");
    // Without an encoder too, where the model's own latents are the second view.
    let alone: String = with_defaults.replace("\"odd\"", "\"alone\"").replace("reference-mono", "reference-alone");
    let (before, rest) = alone.split_once("[encoder]").unwrap();
    let (_, after) = rest.split_once("[output]").unwrap();
    let sound = pipeline("mono", &cells(), "").replace("reference-mono", "reference-alone");
    let (sound_before, rest) = sound.split_once("[encoder]").unwrap();
    let (_, sound_after) = rest.split_once("[output]").unwrap();
    write(&journey.folder.join("alone.toml"), &format!("{before}[output]{after}"));
    write(&journey.folder.join("sound.toml"), &format!("{sound_before}[output]{sound_after}"));
    let part = "module = 'mono' AND split = 'calibrate'";
    lookalike(&journey.folder, &["calibrate", "sound.toml", "--where", part]).expect(0);
    let summary = lookalike(&journey.folder, &["run", "alone.toml"]).expect(0).summary();
    assert_eq!(summary["rows_flagged"].as_u64(), Some(4), "{summary}");
}

#[test]
fn scores_are_the_same_to_the_last_bit_whatever_runs_workers_batches_and_orders() {
    let journey = journey();
    let columns = ["run_id", "reference_id"];
    let of_mono = |tables: &str| -> Vec<String> {
        let found = rows(&journey.folder.join(tables), TableName::Anomalies, &columns);
        let mut found: Vec<String> = found.into_iter().filter(|row| row.starts_with("module=mono ")).collect();
        found.sort_unstable();
        found
    };
    let first = of_mono("tables");
    assert_eq!(first.len(), 1074);
    for (out, workers, batch_size) in [("again", "1", "32"), ("three", "3", "7"), ("eight", "8", "64")] {
        let run = ["run", "mono.toml", "--out", out, "--workers", workers, "--batch-size", batch_size];
        lookalike(&journey.folder, &run).expect(0);
        assert_eq!(of_mono(out), first, "{out}");
    }
    // The same cells in another order, in files of another number.
    let file = cells().join("module=mono").read_dir().unwrap().next().unwrap().unwrap().path();
    let all = parquet_rows(&file);
    let all = concat_batches(&all[0].schema(), &all).unwrap();
    let mut order: Vec<usize> = (0..all.num_rows()).collect();
    SplitMix64(9).shuffle(&mut order);
    let source = folder();
    std::fs::create_dir_all(source.path().join("module=mono")).unwrap();
    for (number, part) in order.chunks(300).enumerate() {
        let rows: arrow::array::UInt64Array = part.iter().map(|row| *row as u64).collect();
        let part = parquet_file(&take_record_batch(&all, &rows).unwrap(), Some(64));
        #[expect(clippy::disallowed_methods, reason = "a test writes its own files")]
        std::fs::write(source.path().join(format!("module=mono/{number}.parquet")), part).unwrap();
    }
    let shuffled = pipeline("mono", source.path(), "").replace("\"tables\"", "\"shuffled\"");
    write(&journey.folder.join("shuffled.toml"), &shuffled);
    lookalike(&journey.folder, &["run", "shuffled.toml", "--workers", "8"]).expect(0);
    assert_eq!(of_mono("shuffled"), first);
}

#[test]
fn rows_are_compared_with_reference_rows_of_their_own_segment_and_have_no_flag_where_there_are_none() {
    let folder = folder();
    let numbered: Vec<(String, i64)> = (0..60).map(|number| (format!("n{number:02}"), number)).collect();
    let images: Vec<(&str, i64)> = numbered.iter().map(|(id, number)| (id.as_str(), *number)).collect();
    for (camera, images) in [("a", &images[..25]), ("b", &images[25..50]), ("c", &images[50..])] {
        image_table(&folder.path().join(format!("images/camera={camera}/x.parquet")), images);
    }
    let settings = "segment = \"camera\"\nthreshold = { contamination = 0.1 }\n";
    let pipeline = |settings: &str| {
        format!(
            "[pipeline]\nname = \"p\"\n[source]\ntable = \"images\"\n[model]\npackage = \"model\"\n[output]\ntable = \"out\"\n\
             [anomaly]\nreference = \"r.parquet\"\n{settings}"
        )
    };
    write(&folder.path().join("p.toml"), &pipeline(settings));
    let fit = ["fit", "p.toml", "--latent-dim", "3", "--height", "8", "--width", "8"];
    lookalike(folder.path(), &fit).expect(0);
    let told = lookalike(folder.path(), &["calibrate", "p.toml", "--where", "camera <> 'c'"]).expect(0);
    assert_eq!(told.stderr.matches("camera = ").count(), 2, "{}", told.stderr);
    let ran = lookalike(folder.path(), &["run", "p.toml"]).expect(0);
    assert!(ran.stderr.contains("no rows of these rows' segment"), "{}", ran.stderr);
    for (partition, batch) in batches(&folder.path().join("out"), TableName::Anomalies) {
        let flags = batch.column_by_name("is_anomaly").unwrap();
        let camera = partition.strip_prefix("camera=").unwrap();
        assert_eq!(flags.null_count(), if camera == "c" { flags.len() } else { 0 });
        let segments = batch.column_by_name("segment").unwrap().as_string::<i32>();
        assert!(segments.iter().all(|segment| segment == Some(camera)));
        // Every row is of the reference: ranked among the others of its own camera, ten percent lie above the cutoff.
        if camera != "c" {
            assert_eq!(flags.as_boolean().true_count(), 2, "{partition}");
        }
    }
    // What the reference is not of is refused.
    for (settings, told) in [
        ("threshold = { contamination = 0.1 }\n", "anomaly.segment = camera"),
        ("segment = \"camera\"\nk = 2\n", "anomaly.k = 1"),
        ("segment = \"camera\"\nthreshold = { contamination = 0.03 }\n", "which can promise an error rate of 3.846 %"),
        ("segment = \"lens\"\n", "there is no column lens"),
    ] {
        write(&folder.path().join("q.toml"), &pipeline(settings));
        let ran = lookalike(folder.path(), &["run", "q.toml"]).expect(4);
        assert!(ran.stderr.contains(told), "{}", ran.stderr);
    }
    // A row of the file that says something else than it did.
    let file = folder.path().join("r.parquet");
    let rows = parquet_rows(&file);
    let kept: BooleanArray = (0..rows[0].num_rows()).map(|row| Some(row != 3)).collect();
    let shorter = filter_record_batch(&rows[0], &kept).unwrap();
    #[expect(clippy::disallowed_methods, reason = "a test writes its own files")]
    std::fs::write(folder.path().join("none.parquet"), parquet_file(&shorter, None)).unwrap();
    write(&folder.path().join("q.toml"), &pipeline(settings).replace("r.parquet", "none.parquet"));
    let ran = lookalike(folder.path(), &["run", "q.toml"]).expect(4);
    assert!(ran.stderr.contains("its footer is not that of a reference"), "{}", ran.stderr);
    let ran = lookalike(folder.path(), &["calibrate", "p.toml", "--where", "camera = 'c'"]).expect(4);
    assert!(
        ran.stderr.contains("which can promise an error rate of 9.091 %") || ran.stderr.contains("already"),
        "{}",
        ran.stderr
    );
}
