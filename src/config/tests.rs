//! What a person sees of the pipeline file: every kind of wrong file with its message, its line and
//! its hint, and every key of a right one.

use miette::{GraphicalReportHandler, GraphicalTheme};

use super::*;
use crate::decode::{DEFAULT_MAX_PIXELS, DecodeMode};

/// The smallest file that a run accepts.
const SMALLEST: &str = r#"
[pipeline]
name = "cells"
[source]
table = "images"
[model]
package = "model"
[output]
table = "lookalike"
"#;

fn load(text: &str) -> Result<Pipeline, ConfigError> {
    Pipeline::load_str(text, "cells.toml", Path::new("/jobs/solar"))
}

/// [`SMALLEST`] with `lines` at the end.
fn load_with(lines: &str) -> Result<Pipeline, ConfigError> {
    load(&format!("{SMALLEST}{lines}"))
}

/// [`SMALLEST`] with `new` in place of the one line `old`.
fn load_replaced(old: &str, new: &str) -> Result<Pipeline, ConfigError> {
    assert_eq!(SMALLEST.matches(old).count(), 1, "{old}");
    load(&SMALLEST.replace(old, new))
}

fn flags() -> Overrides {
    Overrides { current_dir: PathBuf::from("/home/ada"), ..Overrides::default() }
}

fn load_flags(overrides: &Overrides) -> Result<Pipeline, ConfigError> {
    Pipeline::load_str_with(SMALLEST, "cells.toml", Path::new("/jobs/solar"), overrides)
}

/// The error as a terminal without colors shows it.
fn render(error: &ConfigError) -> String {
    let mut report = String::new();
    GraphicalReportHandler::new_themed(GraphicalTheme::unicode_nocolor())
        .with_width(400)
        .render_report(&mut report, error)
        .unwrap();
    report
}

#[track_caller]
fn assert_report(result: Result<Pipeline, ConfigError>, parts: &[&str]) {
    let report = render(&result.unwrap_err());
    for part in parts {
        assert!(report.contains(part), "no {part:?} in\n{report}");
    }
}

#[test]
fn the_smallest_file_gets_the_documented_defaults() {
    let pipeline = load(SMALLEST).unwrap();
    let expected = Pipeline {
        name: "cells".to_owned(),
        source: Source {
            table: Url::parse("file:///jobs/solar/images").unwrap(),
            format: SourceFormat::Parquet,
            id: "image_id".to_owned(),
            image: "image".to_owned(),
            columns: Vec::new(),
            predicate: None,
            duplicates: Duplicates::Refuse,
            partition: None,
        },
        model: Some(ModelRef {
            package: Url::parse("file:///jobs/solar/model").unwrap(),
            sha256: None,
            elbo_samples: 0,
        }),
        encoder: None,
        execution: Execution {
            device: Device::Cpu,
            batch_size: None,
            workers: None,
            threads: NonZeroUsize::MIN,
            unit_rows: NonZeroUsize::new(32_768).unwrap(),
            memory_limit: NonZeroU64::new(4 << 30).unwrap(),
            decode: DecodeMode::Exact,
            tf32: false,
            gpu_memory_limit: None,
        },
        neighbors: Some(Neighbors {
            k: NonZeroUsize::new(10).unwrap(),
            metric: Metric::Cosine,
            scope: NeighborScope::Corpus,
            reference: None,
            search: Search::Auto,
            recall: 0.99,
            nprobe: None,
            cells: None,
            duplicate_distance: None,
        }),
        anomaly: Some(Anomaly {
            rule: Rule::Fused,
            threshold: Threshold::Contamination(0.05),
            reference: None,
            segment: None,
            k: NonZeroUsize::MIN,
        }),
        drift: Some(Drift { alpha: 0.01 }),
        report: true,
        output: Output { table: Url::parse("file:///jobs/solar/lookalike").unwrap(), publish: Publish::Delta },
        limits: Limits {
            max_image_bytes: NonZeroU64::new(67_108_864).unwrap(),
            max_pixels: NonZeroU64::new(67_108_864).unwrap(),
            max_decode_secs: NonZeroU64::new(30).unwrap(),
            max_rejected_fraction: 0.1,
        },
    };
    assert_eq!(pipeline, expected);
}

/// A file with every key, none at its default.
const EVERY_KEY: &str = r#"
[pipeline]
name = "cells-2_x"
[source]
table = "s3://lake/images/"
format = "parquet"
id = "cell"
image = "picture"
columns = ["defect", "module"]
where = "defect = 0"
duplicates = "keep_first"
partition = ["ds"]
[model]
package = "gs://models/solar/3"
sha256 = "E3B0C44298FC1C149AFBF4C8996FB92427AE41E4649B934CA495991B7852B855"
elbo_samples = 16
[encoder]
package = "encoder"
[execution]
device = "cuda"
batch_size = 4096
workers = 3
threads = 2
unit_rows = 10_000_000
memory_limit = "512MiB"
decode = "fast"
tf32 = true
gpu_memory_limit = "8GiB"
[neighbors]
enabled = true
k = 1000
metric = "inner_product"
scope = "reference"
reference = "s3://lake/train"
search = "exact"
recall = 0.9
nprobe = 8
cells = 64
[anomaly]
enabled = true
rule = "top_1pct_squared_error"
threshold = { quantile = 0.95 }
reference = "../reference.parquet"
segment = "module"
k = 3
[drift]
enabled = true
alpha = 0.05
[report]
enabled = false
[output]
table = "s3://lake/lookalike"
publish = "parquet"
[limits]
max_image_bytes = 1_000_000
max_pixels = 1
max_decode_secs = 5
max_rejected_fraction = 1
"#;

#[test]
fn every_key_arrives_in_the_resolved_settings() {
    let settings = load(EVERY_KEY).unwrap().settings_json();
    let expected = json!({
        "pipeline": { "name": "cells-2_x" },
        "source": {
            "table": "s3://lake/images",
            "format": "parquet",
            "id": "cell",
            "image": "picture",
            "columns": ["defect", "module"],
            "where": "defect = 0",
            "duplicates": "keep_first",
            "partition": ["ds"],
        },
        "model": {
            "package": "gs://models/solar/3",
            "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
            "elbo_samples": 16,
        },
        "execution": {
            "device": "cuda",
            "batch_size": 4096,
            "workers": 3,
            "threads": 2,
            "unit_rows": 10_000_000,
            "memory_limit": 536_870_912,
            "decode": "fast",
            "tf32": true,
            "gpu_memory_limit": 8_589_934_592_u64,
        },
        "encoder": { "package": "file:///jobs/solar/encoder", "sha256": null },
        "neighbors": {
            "enabled": true,
            "k": 1000,
            "metric": "inner_product",
            "scope": "reference",
            "reference": "s3://lake/train",
            "search": "exact",
            "recall": 0.9,
            "nprobe": 8,
            "cells": 64,
            "duplicate_distance": null,
        },
        "anomaly": {
            "enabled": true,
            "rule": "top_1pct_squared_error",
            "threshold": { "quantile": 0.95 },
            "reference": "file:///jobs/reference.parquet",
            "segment": "module",
            "k": 3,
        },
        "drift": { "enabled": true, "alpha": 0.05 },
        "report": { "enabled": false },
        "output": { "table": "s3://lake/lookalike", "publish": "parquet" },
        "limits": {
            "max_image_bytes": 1_000_000,
            "max_pixels": 1,
            "max_decode_secs": 5,
            "max_rejected_fraction": 1.0,
        },
    });
    assert_eq!(settings, expected);
}

#[test]
fn a_pipeline_comes_back_from_its_settings() {
    for text in [SMALLEST, EVERY_KEY] {
        let pipeline = load(text).unwrap();
        assert_eq!(Pipeline::from_settings(&pipeline.settings_json()).unwrap(), pipeline);
    }
}

#[test]
fn every_choice_can_be_written() {
    for (rule, expected) in [
        ("mean_squared_error", Rule::MeanSquaredError),
        ("mean_absolute_error", Rule::MeanAbsoluteError),
        ("top_1pct_squared_error", Rule::Top1PctSquaredError),
        ("kl_divergence", Rule::KlDivergence),
        ("negative_elbo", Rule::NegativeElbo),
        ("complexity_adjusted_error", Rule::ComplexityAdjustedError),
        ("mahalanobis_distance", Rule::MahalanobisDistance),
        ("knn_distance", Rule::KnnDistance),
        ("fused", Rule::Fused),
    ] {
        let pipeline = load_with(&format!("[anomaly]\nrule = \"{rule}\"")).unwrap();
        assert_eq!(pipeline.anomaly.unwrap().rule, expected);
    }
    for (metric, expected) in [("cosine", Metric::Cosine), ("l2", Metric::L2), ("inner_product", Metric::InnerProduct)]
    {
        let pipeline = load_with(&format!("[neighbors]\nmetric = \"{metric}\"")).unwrap();
        assert_eq!(pipeline.neighbors.unwrap().metric, expected);
    }
    for (device, expected) in [
        ("cpu", Device::Cpu),
        ("cuda", Device::Cuda),
        ("auto", Device::Auto),
        ("tensorrt", Device::TensorRt),
        ("openvino", Device::OpenVino),
    ] {
        let pipeline = load_with(&format!("[execution]\ndevice = \"{device}\"")).unwrap();
        assert_eq!(pipeline.execution.device, expected);
    }
    for (threshold, expected) in [
        ("{ contamination = 0 }", Threshold::Contamination(0.0)),
        ("{ contamination = 0.5 }", Threshold::Contamination(0.5)),
        ("{ quantile = 0.5 }", Threshold::Quantile(0.5)),
        ("{ value = -3 }", Threshold::Value(-3.0)),
    ] {
        let pipeline = load_with(&format!("[anomaly]\nthreshold = {threshold}")).unwrap();
        assert_eq!(pipeline.anomaly.unwrap().threshold, expected);
    }
    let pipeline = load_with("[neighbors]\nenabled = false").unwrap();
    assert_eq!(pipeline.neighbors, None);
    let pipeline = load_with("[neighbors]\nenabled = false\nduplicate_distance = 0.1").unwrap();
    assert_eq!(pipeline.groups(), None);
    let pipeline = load_with("[neighbors]\nduplicate_distance = 0").unwrap();
    assert_eq!(pipeline.groups().map(|(_, distance)| distance), Some(0.0));
    let pipeline = load_with("[anomaly]\nenabled = false\nrule = \"kl_divergence\"").unwrap();
    assert_eq!(pipeline.anomaly, None);
    assert_eq!(pipeline.settings_json()["anomaly"], json!({ "enabled": false }));
    let pipeline = load_with("[drift]\nenabled = false\nalpha = 0.1").unwrap();
    assert_eq!(pipeline.drift, None);
    assert_eq!(pipeline.settings_json()["drift"], json!({ "enabled": false }));
}

#[test]
fn an_inner_product_says_not_which_images_are_the_same() {
    assert_report(
        load_with("[neighbors]\nmetric = \"inner_product\"\nduplicate_distance = 0.1"),
        &["an image is nearest to itself", "cells.toml:12:22", "set metric = \"cosine\" or \"l2\""],
    );
}

#[test]
fn another_table_is_searched_exactly_and_makes_no_groups() {
    let reference = "[neighbors]\nscope = \"reference\"\nreference = \"../train\"\n";
    assert_eq!(load_with(reference).unwrap().neighbors.unwrap().reference.unwrap().as_str(), "file:///jobs/train");
    for (line, place) in [("duplicate_distance = 0.1", "cells.toml:13:22"), ("search = \"ivf\"", "cells.toml:13:10")] {
        assert_report(
            load_with(&format!("{reference}{line}")),
            &["about the neighbors of images within a table", place, "compare-tables"],
        );
    }
    assert_report(load_with("[neighbors]\nscope = \"reference\""), &["`neighbors.reference` is required"]);
    assert_report(
        load_with("[neighbors]\nreference = \"../train\""),
        &["does not search it", "set scope = \"reference\""],
    );
}

#[test]
fn a_fixed_threshold_may_have_a_reference() {
    let lines = "[anomaly]\nthreshold.value = 0.01\nreference = \"ref\"";
    let anomaly = load_with(lines).unwrap().anomaly.unwrap();
    assert_eq!(anomaly.threshold, Threshold::Value(0.01));
    assert_eq!(anomaly.reference.unwrap().as_str(), "file:///jobs/solar/ref");
}

#[test]
fn a_misspelled_key_of_any_table_gets_its_line_and_the_key_meant() {
    for (table, wrong, meant, all) in [
        ("pipeline", "nmae", "name", "`name`"),
        ("source", "tabel", "table", "`table`, `format`, `id`, `image`, `columns`, `where`, `duplicates`, `partition`"),
        ("model", "packages", "package", "`package`, `sha256`, `elbo_samples`"),
        (
            "execution",
            "batchsize",
            "batch_size",
            "`device`, `batch_size`, `workers`, `threads`, `unit_rows`, `memory_limit`, `decode`, `tf32`, `gpu_memory_limit`",
        ),
        (
            "neighbors",
            "metrics",
            "metric",
            "`enabled`, `k`, `metric`, `scope`, `reference`, `search`, `recall`, `nprobe`, `cells`, `duplicate_distance`",
        ),
        ("anomaly", "treshold", "threshold", "`enabled`, `rule`, `threshold`, `reference`"),
        ("drift", "alfa", "alpha", "`enabled`, `alpha`"),
        ("report", "enable", "enabled", "`enabled`"),
        ("output", "Table", "table", "`table`, `publish`"),
        (
            "limits",
            "max_pixel",
            "max_pixels",
            "`max_image_bytes`, `max_pixels`, `max_decode_secs`, `max_rejected_fraction`",
        ),
    ] {
        let result = load(&format!("# a comment\n\n[{table}]\n{wrong} = 1\n"));
        assert_report(
            result,
            &[
                &format!("unknown key `{wrong}` in [{table}]"),
                "[cells.toml:4:1]",
                &format!("4 │ {wrong} = 1"),
                &format!("did you mean `{meant}`? keys of [{table}]: {all}"),
            ],
        );
    }
}

#[test]
fn a_misspelled_or_premature_table_gets_the_list_of_tables() {
    let tables = "tables of the file: `pipeline`, `source`, `model`, `encoder`, `execution`, `neighbors`, `anomaly`, \
                  `drift`, `report`, `output`, `limits`";
    let hint = format!("did you mean `neighbors`? {tables}");
    assert_report(
        load_with("[neighbours]\nk = 3\n"),
        &["unknown key `neighbours` in the file", "cells.toml:10:2", &hint],
    );
    let hint = format!("help: {tables}");
    assert_report(
        load_with("[schedule]\ncron = \"x\"\n"),
        &["unknown key `schedule` in the file", "cells.toml:10:2", &hint],
    );
}

#[test]
fn a_single_problem_is_the_error_itself() {
    let error = load_with("[neighbors]\nmetrik = \"l2\"\n").unwrap_err();
    assert_eq!(error.to_string(), "cells.toml, line 11: unknown key `metrik` in [neighbors]");
    let expected = "  × cells.toml, line 11: unknown key `metrik` in [neighbors]
    ╭─[cells.toml:11:1]
 10 │ [neighbors]
 11 │ metrik = \"l2\"
    · ───┬──
    ·    ╰── no such key
    ╰────
  help: did you mean `metric`? keys of [neighbors]: `enabled`, `k`, `metric`, `scope`, `reference`, `search`, `recall`, `nprobe`, `cells`, `duplicate_distance`
";
    assert_eq!(render(&error), expected);
}

#[test]
fn all_problems_of_a_file_are_told_at_once_and_in_its_order() {
    let text = r#"
[pipeline]
name = "Cells"
[source]
format = "iceberg"
columns = "defect"
idd = "cell"
[execution]
batch_size = "ten"
workers = 0
[anomaly]
threshold = { contamination = 0.7 }
[output]
table = "ftp://host/x"
"#;
    let error = load(text).unwrap_err();
    assert_eq!(error.to_string(), "cells.toml has 9 problems, on line 3, 4, 5, 6, 7, 9, 10, 12, 14");
    let faults: Vec<String> = error.problems().iter().map(ToString::to_string).collect();
    assert_eq!(
        faults,
        [
            "`pipeline.name` is not made of lower case letters, digits, `_` and `-` alone",
            "`source.table` is required and not given",
            "`source.format` cannot be `iceberg`",
            "`source.columns` cannot be read: found string \"defect\", expected a list",
            "unknown key `idd` in [source]",
            "`execution.batch_size` cannot be read: found string \"ten\", expected an integer",
            "`execution.workers` is 0, outside of 1 to 1024",
            "`anomaly.threshold.contamination` is 0.7, outside of 0 to 0.5",
            "`output.table` has the unsupported scheme `ftp`",
        ]
    );
    let report = render(&error);
    for problem in error.problems() {
        assert!(report.contains(&problem.to_string()), "{report}");
        assert!(report.contains(&problem.fault().help()), "{report}");
    }
    assert!(report.contains("9 │ batch_size = \"ten\""), "{report}");
}

#[test]
fn a_wrong_type_is_told_in_words_with_an_example() {
    for (lines, message, example) in [
        (
            "[neighbors]\nk = 2.5",
            "`neighbors.k` cannot be read: found floating point `2.5`, expected an integer",
            "k = 10",
        ),
        (
            "[neighbors]\nenabled = \"yes\"",
            "`neighbors.enabled` cannot be read: found string \"yes\", expected a boolean",
            "enabled = true",
        ),
        ("[neighbors]\nmetric = 2", "`neighbors.metric` cannot be read: expected a string", "metric = \"cosine\""),
        (
            "[anomaly]\nthreshold = 0.05",
            "`anomaly.threshold` cannot be read: found floating point `0.05`, expected a table",
            "threshold = { contamination = 0.05 }",
        ),
        (
            "[anomaly]\nthreshold = { value = \"1\" }",
            "`anomaly.threshold.value` cannot be read: found string \"1\", expected a number",
            "threshold = { value = 0.01 }",
        ),
        (
            "[limits]\nmax_pixels = [1]",
            "`limits.max_pixels` cannot be read: found a list, expected an integer",
            "max_pixels = 67108864",
        ),
    ] {
        assert_report(load_with(lines), &[message, "cells.toml:11:", &format!("help: for example: {example}")]);
    }
    let error = load_replaced("[model]\npackage = \"model\"\n", "").unwrap();
    assert_eq!(error.model, None);
    assert_report(
        load("limits = 3\n"),
        &["`limits` cannot be read: found integer `3`, expected a table", "cells.toml:1:", "[limits]"],
    );
}

#[test]
fn an_unknown_choice_gets_the_supported_ones() {
    for (lines, message, help) in [
        (
            "[execution]\ndevice = \"gpu\"",
            "`execution.device` cannot be `gpu`",
            "supported: `cpu`, `cuda`, `tensorrt`, `openvino`, `auto`",
        ),
        (
            "[neighbors]\nmetric = \"cosin\"",
            "`neighbors.metric` cannot be `cosin`",
            "did you mean `cosine`? supported: `cosine`, `l2`, `inner_product`",
        ),
        (
            "[neighbors]\nscope = \"partitions\"",
            "`neighbors.scope` cannot be `partitions`",
            "did you mean `partition`? supported: `corpus`, `partition`",
        ),
        (
            "[anomaly]\nrule = \"mean_square_error\"",
            "`anomaly.rule` cannot be `mean_square_error`",
            "did you mean `mean_squared_error`? supported: `mean_squared_error`, `mean_absolute_error`, `top_1pct_squared_error`, `kl_divergence`, `negative_elbo`",
        ),
    ] {
        assert_report(load_with(lines), &[message, "cells.toml:11:", help]);
    }
    for format in ["iceberg", "web_dataset"] {
        assert_report(
            load_replaced("table = \"images\"", &format!("table = \"images\"\nformat = \"{format}\"")),
            &[
                &format!("`source.format` cannot be `{format}`"),
                "cells.toml:6:10",
                "supported: `parquet`, `directory`, `webdataset`, `delta`",
            ],
        );
    }
}

#[test]
fn numbers_out_of_range_are_refused_at_both_ends() {
    for (lines, message) in [
        ("[execution]\nbatch_size = 0", "`execution.batch_size` is 0, outside of 1 to 4096"),
        ("[execution]\nbatch_size = 4097", "`execution.batch_size` is 4097, outside of 1 to 4096"),
        ("[execution]\nunit_rows = 0", "`execution.unit_rows` is 0, outside of 1 to 10000000"),
        ("[execution]\nunit_rows = 10_000_001", "`execution.unit_rows` is 10000001, outside of 1 to 10000000"),
        ("[execution]\nworkers = -1", "`execution.workers` is -1, outside of 1 to 1024"),
        ("[neighbors]\nk = 0", "`neighbors.k` is 0, outside of 1 to 1000"),
        ("[neighbors]\nk = 1001", "`neighbors.k` is 1001, outside of 1 to 1000"),
        (
            "[neighbors]\nduplicate_distance = -0.01",
            "`neighbors.duplicate_distance` is -0.01, outside of the finite numbers from 0 on",
        ),
        (
            "[neighbors]\nduplicate_distance = inf",
            "`neighbors.duplicate_distance` is inf, outside of the finite numbers from 0 on",
        ),
        (
            "[anomaly]\nthreshold = { contamination = -0.01 }",
            "`anomaly.threshold.contamination` is -0.01, outside of 0 to 0.5",
        ),
        (
            "[anomaly]\nthreshold = { contamination = 0.51 }",
            "`anomaly.threshold.contamination` is 0.51, outside of 0 to 0.5",
        ),
        (
            "[anomaly]\nthreshold = { contamination = nan }",
            "`anomaly.threshold.contamination` is NaN, outside of 0 to 0.5",
        ),
        (
            "[anomaly]\nthreshold = { quantile = 0.49 }",
            "`anomaly.threshold.quantile` is 0.49, outside of 0.5 to 1, without 1",
        ),
        (
            "[anomaly]\nthreshold = { quantile = 1.0 }",
            "`anomaly.threshold.quantile` is 1, outside of 0.5 to 1, without 1",
        ),
        ("[anomaly]\nthreshold = { value = inf }", "`anomaly.threshold.value` is inf, outside of the finite numbers"),
        ("[drift]\nalpha = 0.0001", "`drift.alpha` is 0.0001, outside of 0.001 to 0.5"),
        ("[limits]\nmax_pixels = 0", "`limits.max_pixels` is 0, outside of 1 and more"),
        ("[limits]\nmax_decode_secs = 0", "`limits.max_decode_secs` is 0, outside of 1 to 3600"),
        ("[limits]\nmax_decode_secs = 3601", "`limits.max_decode_secs` is 3601, outside of 1 to 3600"),
        ("[limits]\nmax_rejected_fraction = 1.1", "`limits.max_rejected_fraction` is 1.1, outside of 0 to 1"),
    ] {
        assert_report(load_with(lines), &[message, "cells.toml:11:", "help: give a number in"]);
    }
}

#[test]
fn a_missing_key_gets_a_line_to_add() {
    for (line, message, place, help) in [
        ("name = \"cells\"", "`pipeline.name` is required", "cells.toml:2:1", "add to [pipeline]: name = \"cells\""),
        (
            "table = \"images\"",
            "`source.table` is required",
            "cells.toml:4:1",
            "add to [source]: table = \"s3://lake/images\"",
        ),
        (
            "package = \"model\"",
            "`model.package` is required",
            "cells.toml:6:1",
            "add to [model]: package = \"s3://models/solar/3\"",
        ),
        (
            "table = \"lookalike\"",
            "`output.table` is required",
            "cells.toml:8:1",
            "add to [output]: table = \"s3://lake/lookalike\"",
        ),
    ] {
        assert_report(load_replaced(line, ""), &[message, place, help]);
    }
    assert_report(
        load_replaced("[output]\ntable = \"lookalike\"", ""),
        &["cells.toml: `output.table` is required and not given", "add to [output]: table"],
    );
    assert_eq!(load("").unwrap_err().problems().len(), 3);
}

#[test]
fn a_list_is_no_table() {
    for lines in ["limits = [1, 2]", "[[limits]]\nmax_pixels = 3"] {
        assert_report(
            load(&format!("{lines}\n{SMALLEST}")),
            &["`limits` cannot be read: found a list, expected a table", "cells.toml:1:", "[limits]"],
        );
    }
    assert_report(
        load_with("[anomaly]\nthreshold = [0.05]"),
        &["`anomaly.threshold` cannot be read: found a list, expected a table", "cells.toml:11:13"],
    );
}

#[test]
fn a_key_that_cannot_be_read_is_not_called_missing_too() {
    for (old, new) in
        [("table = \"images\"", "tabel = \"images\""), ("[source]", "[sources]"), ("[pipeline]", "[pipelines]")]
    {
        let error = load_replaced(old, new).unwrap_err();
        assert_eq!(error.problems().len(), 1, "{}", render(&error));
    }
    let error = load_replaced("table = \"images\"", "table = 3").unwrap_err();
    assert_eq!(error.problems().len(), 1, "{error}");
    let error = load_with("[anomaly]\nthreshold = { contaminaton = 0.1 }").unwrap_err();
    assert_eq!(error.problems().len(), 1, "{error}");
}

#[test]
fn a_threshold_is_given_in_exactly_one_way() {
    assert_report(
        load_with("[anomaly]\nthreshold = { contamination = 0.05, quantile = 0.95 }"),
        &[
            "`anomaly.threshold` needs exactly one of `contamination`, `quantile`, `value` and `fdr`, and has 2",
            "cells.toml:11:13",
            "help: keep one",
        ],
    );
    assert_report(load_with("[anomaly]\nthreshold = {}"), &["and has 0", "cells.toml:11:13"]);
    assert_report(
        load_with("[anomaly.threshold]\nvalue = 1\nvalues = 2"),
        &["unknown key `values` in [anomaly.threshold]", "cells.toml:12:1", "did you mean `value`?"],
    );
}

#[test]
fn a_byte_size_without_a_known_unit_is_refused() {
    for (value, message) in [
        ("\"64 Mb\"", "ends in KB, MB, GB, KiB, MiB or GiB"),
        ("\"lots\"", "ends in KB, MB, GB, KiB, MiB or GiB"),
        ("\"1.5GiB\"", "a byte size is an integer before its unit"),
        ("0", "a byte size is at least 1"),
        ("-5", "a byte size is at least 1"),
        ("1.5", "found floating point `1.5`, expected a byte size"),
    ] {
        assert_report(
            load_with(&format!("[limits]\nmax_image_bytes = {value}")),
            &["`limits.max_image_bytes` cannot be read", message, "cells.toml:11:19", "max_image_bytes = \"64MiB\""],
        );
    }
}

#[test]
fn an_unsupported_scheme_gets_the_list_of_schemes() {
    assert_report(
        load_replaced("\"images\"", "\"hdfs://lake/images\""),
        &[
            "`source.table` has the unsupported scheme `hdfs`",
            "cells.toml:5:9",
            "5 │ table = \"hdfs://lake/images\"",
            "supported are file://, memory://, s3://, s3a://, gs://, az://, abfs://, abfss:// and paths",
        ],
    );
}

#[test]
fn credentials_are_refused_and_never_shown() {
    for url in [
        "s3://AKIA:hunter2@lake/images",
        "s3://AKIA:hun/ter2@lake/hunter2@x",
        "s3://AKIA:a b hunter2@lake/images",
        "s3://AKIA\\u003ahunter2\\u0040lake/images",
        "hdfs://ada:hunter2@lake/images",
        "https://a.blob.core.windows.net/c?sv=1&sig=hunter2",
        "s3://lake/images?X-Amz-Signature=hunter2",
        "gs://lake/images?access_token=hunter2",
    ] {
        for (old, key) in
            [("\"images\"", "source.table"), ("\"model\"", "model.package"), ("\"lookalike\"", "output.table")]
        {
            let error = load_replaced(old, &format!("\"{url}\"")).unwrap_err();
            let report = render(&error);
            assert!(!report.contains("ter2"), "{report}");
            assert!(!format!("{error:?}").contains("ter2"), "{error:?}");
            assert!(report.contains(key), "{report}");
            assert!(report.contains("│ table = \"***") || key == "model.package", "{report}");
            assert!(report.contains("credentials come from the environment"), "{report}");
        }
    }
}

#[test]
fn a_secret_near_another_problem_is_covered_too() {
    for lines in [
        "[neighbors]\n# s3://ada:hunter2@lake\nk = 0",
        "[neighbors]\nmetric = \"s3://ada:hunter2@lake\"",
        "[neighbors]\nk = \"s3://lake?sig=hunter2\"",
        "[neighbors]\nk = \"s3://ada:hunter2@lake\" oops",
    ] {
        let report = render(&load_with(lines).unwrap_err());
        assert!(!report.contains("hunter2"), "{report}");
        assert!(report.contains("**"), "{report}");
    }
}

#[test]
fn text_that_is_not_toml_gets_its_line() {
    assert_report(
        load("[pipeline]\nname = cells\n"),
        &["cells.toml, line 2: not valid TOML", "cells.toml:2:8", "2 │ name = cells", "texts are in quotes"],
    );
    assert_report(
        load("[pipeline]\nname = \"a\"\nname = \"b\"\n"),
        &["not valid TOML: duplicate key", "cells.toml:3:1"],
    );
}

#[test]
fn a_malformed_text_says_the_form() {
    assert_report(
        load_replaced("\"cells\"", "\"solar cells\""),
        &["`pipeline.name` is not made of lower case letters", "cells.toml:3:8", "name = \"cells\""],
    );
    assert_report(
        load_replaced("package = \"model\"", "package = \"model\"\nsha256 = \"e3b0\""),
        &["`model.sha256` is not 64 hexadecimal digits", "cells.toml:8:10", "sha256 = \"e3b0c442"],
    );
    assert_report(
        load_replaced("table = \"images\"", "table = \"images\"\nwhere = \"\""),
        &["`source.where` is not a text with something in it", "cells.toml:6:9"],
    );
}

#[test]
fn a_kept_column_has_a_name_of_its_own() {
    for (columns, message, column) in [
        (
            "columns = [\"a\", \"A\"]",
            "the column `A`, which the output has already as a column or partition key named before",
            17,
        ),
        ("id = \"cell\"\ncolumns = [\"cell\"]", "the column `cell`, which the output has already as the id", 12),
        ("columns = [\"image\"]", "the column `image`, which the output has already as the image", 12),
        (
            "columns = [\"Embedding\"]",
            "the column `Embedding`, which the output has already as a column of its own",
            12,
        ),
        ("columns = [\"ds\"]\npartition = [\"ds\"]", "`source.partition` names the column `ds`", 14),
        ("columns = [\" \"]", "`source.columns` is not a list of column names", 12),
    ] {
        let line = 5 + columns.lines().count();
        assert_report(
            load_replaced("table = \"images\"", &format!("table = \"images\"\n{columns}")),
            &[message, &format!("cells.toml:{line}:{column}")],
        );
    }
}

#[test]
fn shards_say_themselves_what_the_id_and_the_image_are() {
    let webdataset = |line: &str| {
        load_replaced("table = \"images\"", &format!("table = \"images\"\nformat = \"webdataset\"\n{line}"))
    };
    let source = webdataset("columns = [\"txt\", \"seg.json\"]\nwhere = \"txt = 'x'\"").unwrap().source;
    assert_eq!((source.format, source.columns.len()), (SourceFormat::WebDataset, 2));
    for key in ["id", "image"] {
        let result = webdataset(&format!("{key} = \"name\""));
        assert_report(result, &[&format!("`source.{key}` is not for a source of format `webdataset`"), "leave it out"]);
    }
    assert_report(webdataset("columns = [\".txt\"]"), &["without the dot", "cells.toml:7:"]);
    assert_report(webdataset("columns = [\"status\"]"), &["a column of its own"]);
}

#[test]
fn a_directory_has_no_columns() {
    for (key, line) in [("id", "id = \"a\""), ("image", "image = \"a\""), ("columns", "columns = []")] {
        assert_report(
            load_replaced("table = \"images\"", &format!("table = \"images\"\nformat = \"directory\"\n{line}")),
            &[&format!("`source.{key}` is about columns"), "cells.toml:7:", "the relative path of a file is its id"],
        );
    }
}

#[test]
fn the_output_cannot_lie_in_the_source() {
    for (output, is_inside) in [
        ("images", true),
        ("images/out", true),
        ("./images/../images/out/", true),
        ("/jobs/solar/images", true),
        ("images2", false),
        (".", false),
    ] {
        let result = load_replaced("\"lookalike\"", &format!("\"{output}\""));
        if is_inside {
            assert_report(
                result,
                &["`output.table` lies in `source.table`", "cells.toml:9:9", "a prefix beside the source"],
            );
        } else {
            result.unwrap();
        }
    }
}

#[test]
fn flags_go_before_the_file_and_are_relative_to_the_current_folder() {
    let overrides = Overrides {
        source_table: Some("pictures".to_owned()),
        predicate: Some("defect = 1".to_owned()),
        model_package: Some("s3://models/solar/4".to_owned()),
        device: Some(Device::Auto),
        batch_size: Some(8),
        workers: Some(2),
        output_table: Some("../out".to_owned()),
        ..flags()
    };
    let pipeline = load_flags(&overrides).unwrap();
    assert_eq!(pipeline.source.table.as_str(), "file:///home/ada/pictures");
    assert_eq!(pipeline.source.predicate.as_deref(), Some("defect = 1"));
    assert_eq!(pipeline.require_model().unwrap().package.as_str(), "s3://models/solar/4");
    assert_eq!(pipeline.execution.device, Device::Auto);
    assert_eq!(pipeline.execution.batch_size.unwrap().get(), 8);
    assert_eq!(pipeline.execution.workers.unwrap().get(), 2);
    assert_eq!(pipeline.output.table.as_str(), "file:///home/out");
}

#[test]
fn a_pin_does_not_outlive_its_package() {
    let text = EVERY_KEY.replace("inner_product", "l2");
    let overrides = Overrides { model_package: Some("model".to_owned()), ..flags() };
    let pipeline = Pipeline::load_str_with(&text, "cells.toml", Path::new("/jobs"), &overrides).unwrap();
    assert_eq!(pipeline.model.unwrap().sha256, None);
}

#[test]
fn a_wrong_flag_is_named_and_not_the_key_it_replaces() {
    let overrides = Overrides { batch_size: Some(5000), ..flags() };
    assert_report(
        load_flags(&overrides),
        &["cells.toml: `--batch-size` is 5000, outside of 1 to 4096", "give a number in 1 to 4096"],
    );
    let overrides = Overrides { output_table: Some("s3://ada:hunter2@lake/out".to_owned()), ..flags() };
    let result = load_flags(&overrides);
    assert!(!render(result.as_ref().unwrap_err()).contains("hunter2"));
    assert_report(result, &["`--out` carries credentials", "environment"]);
}

#[test]
fn a_folder_of_images_needs_no_file() {
    let pipeline = Pipeline::for_images("cells", "out", &flags()).unwrap();
    assert_eq!(pipeline.name, "images");
    assert_eq!(pipeline.source.format, SourceFormat::Directory);
    assert_eq!(pipeline.source.table.as_str(), "file:///home/ada/cells");
    assert_eq!(pipeline.output.table.as_str(), "file:///home/ada/out");
    assert_eq!(pipeline.limits.max_pixels, DEFAULT_MAX_PIXELS);
    assert_report(
        pipeline.require_model().map(|_| pipeline.clone()),
        &["images: `model.package` is required", "--model"],
    );
    assert_report(
        Pipeline::for_images("cells", "cells/out", &flags()),
        &["command line: `--out` lies in `source.table`"],
    );
}

#[test]
fn settings_do_not_depend_on_how_a_file_is_written() {
    let written_otherwise = "output = { table = './lookalike/' } # same place\n\
                             model.package = \"/jobs/solar/model\"\n\
                             pipeline.name = 'cells'\n\
                             source = { table = \"images\", format = \"parquet\" }\n";
    assert_eq!(load(written_otherwise).unwrap().settings_json(), load(SMALLEST).unwrap().settings_json());
}

#[test]
fn every_key_has_an_example_that_can_be_pasted_into_a_file() {
    let unknown = |table: &str| {
        let error = load(&format!("[{table}]\nno_such_key = 1\n")).unwrap_err();
        let faults = error.problems().iter().map(Problem::fault);
        let allowed = faults.filter_map(|fault| {
            let Fault::UnknownKey { allowed, .. } = fault else {
                return None;
            };
            Some(allowed.clone())
        });
        allowed.flatten().collect::<Vec<_>>()
    };
    let mut num_keys = 0;
    for table in unknown("no_such_table").iter().map(String::as_str).chain(["anomaly.threshold"]) {
        for key in unknown(table) {
            let key = format!("{table}.{key}");
            let example = problem::example(&key).unwrap_or_else(|| panic!("{key}"));
            let section = key.split('.').next().unwrap();
            let mut problems = problem::Problems::default();
            let text = format!("[{section}]\n{example}\n");
            written::read(&text, &mut problems).unwrap();
            assert!(!problems.has_unreadable(section), "{text}");
            assert!(example.starts_with(&format!("{} = ", key.split('.').nth(1).unwrap())));
            num_keys += 1;
        }
    }
    assert_eq!(num_keys, problem::EXAMPLES.len());
}

#[test]
fn a_file_cut_anywhere_has_an_error_that_can_be_shown() {
    let text = EVERY_KEY.replace("cells-2_x", "Zellen-größe");
    for (end, _) in text.char_indices() {
        let error = load(&text[..end]).unwrap_err();
        assert!(!render(&error).is_empty());
        assert!(!error.problems().is_empty());
    }
}

#[test]
fn the_pipeline_file_of_the_readme_is_one() {
    let readme = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/README.md")).unwrap();
    let (_, rest) = readme.split_once("```toml\n").unwrap();
    let (example, _) = rest.split_once("```").unwrap();
    let pipeline = load(&example.replace('…', &"0".repeat(64))).unwrap();
    let defaults = load("[pipeline]\nname = \"x\"\n[source]\ntable = \"t\"\n[output]\ntable = \"o\"\n").unwrap();
    // The README says that what it shows for the sections without a required key are the defaults.
    assert_eq!(pipeline.neighbors, defaults.neighbors);
    assert_eq!(pipeline.limits, defaults.limits);
    let rule = |pipeline: &Pipeline| pipeline.anomaly.as_ref().map(|anomaly| (anomaly.rule, anomaly.threshold));
    assert_eq!(rule(&pipeline), rule(&defaults));
    assert_eq!(pipeline.execution.batch_size, defaults.execution.batch_size);
    assert_eq!(pipeline.execution.device, defaults.execution.device);
}
