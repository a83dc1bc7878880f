use std::collections::BTreeMap;
use std::path::Path;

use arrow::array::AsArray as _;
use lookalike::schema::TableName;

use crate::support::{batches, encoder_of, folder, image_table, lookalike, python, rows, write};

/// The shapes of column that `feature_tables.py` writes, in `tables` below a folder.
fn tables(folder: &Path) -> Vec<String> {
    let names = python("feature_tables.py", &[&folder.join("tables")]);
    names.split_whitespace().map(str::to_owned).collect()
}

/// Writes a pipeline file for one of the tables, with a model and an output of its name, unless `rest` says otherwise.
fn pipeline(folder: &Path, name: &str, table: &str, rest: &str) -> String {
    let file = format!("{name}.toml");
    write(
        &folder.join(&file),
        &format!(
            "[pipeline]\nname = \"{name}\"\n[source]\ntable = \"tables/{table}\"\nimage = \"features\"\n{rest}[output]\ntable = \"out/{name}\"\n\
             [limits]\nmax_rejected_fraction = 1.0\n"
        ),
    );
    file
}

const MODEL: &str = "[model]\npackage = \"model\"\n";

/// Status and message of each row of `latents`.
fn statuses(tables: &Path) -> BTreeMap<String, (String, Option<String>)> {
    let mut found = BTreeMap::new();
    for (_, batch) in batches(tables, TableName::Latents) {
        let text = |name: &str| batch.column_by_name(name).unwrap().as_string::<i32>().clone();
        let (ids, statuses, messages) = (text("image_id"), text("status"), text("error_message"));
        for ((id, status), message) in ids.iter().zip(&statuses).zip(&messages) {
            found.insert(id.unwrap().to_owned(), (status.unwrap().to_owned(), message.map(str::to_owned)));
        }
    }
    found
}

#[test]
fn the_worked_example_finds_what_scikit_learn_finds() {
    let folder = folder();
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let here = folder.path().join("pipelines/features");
    write(
        &here.join("breast_cancer.toml"),
        &std::fs::read_to_string(root.join("pipelines/features/breast_cancer.toml")).unwrap(),
    );
    let data = folder.path().join(".cache/features");
    python("../../pipelines/features/breast_cancer_table.py", &[&data.join("breast-cancer")]);
    let run = |args: &[&str]| lookalike(&here, args);

    let fit = ["fit", "breast_cancer.toml", "--standardize", "--latent-dim", "8", "--where", "split = 'fit'"];
    let fitted = run(&fit).expect(0);
    assert!(fitted.stderr.contains("fitted 8 latents to 179 rows (0 rejected)"), "{}", fitted.stderr);
    // The same rows, the same package.
    assert_eq!(run(&fit).expect(0).summary(), fitted.summary());
    let contract = std::fs::read_to_string(data.join("model/model.toml")).unwrap();
    assert!(contract.contains("kind = \"features\"\nshape = [30]\n"), "{contract}");
    run(&["calibrate", "breast_cancer.toml", "--where", "split = 'calibrate'"]).expect(0);
    let summary = run(&["run", "breast_cancer.toml"]).expect(0).summary();
    assert_eq!((&summary["rows_in"], &summary["rows_ok"]), (&569.into(), &569.into()), "{summary}");

    let expected = python("features_agree.py", &[&data.join("breast-cancer"), &data.join("tables")]);
    let expected: BTreeMap<String, f64> = serde_json::from_str(&expected).unwrap();
    let evaluate = ["evaluate", "breast_cancer.toml", "--positive", "diagnosis = 'malignant'", "--negative"];
    let evaluate = [&evaluate[..], &["diagnosis = 'benign' AND split = 'rest'", "--json"]].concat();
    let baseline = [&evaluate[..], &["--baseline", "split = 'fit'"]].concat();
    let summary = run(&baseline).expect(0).summary();
    let measured = summary["rules"].as_array().unwrap();
    let auroc = |model: &str, rule: &str| {
        let found = measured.iter().find(|line| line["model"] == model && line["rule"] == rule);
        found.unwrap_or_else(|| panic!("{rule} of {model}: {summary}"))["auroc"].as_f64().unwrap()
    };
    for (rule, expected) in &expected {
        let found = auroc("model", rule);
        assert!((found - expected).abs() < 1e-9, "{rule}: {found} is not {expected}");
        // A linear model of the same rows and size, through the same input, is the same model.
        assert!((auroc("baseline", rule) - found).abs() < 1e-3, "{rule}: {summary}");
    }
    assert!(auroc("model", "mean_squared_error") > 0.93, "{summary}");
    assert!(auroc("model", "mahalanobis_distance") > 0.9 && auroc("model", "fused") > 0.9, "{summary}");
    // Complexity is of images: there is no such score.
    assert!(measured.iter().all(|line| line["rule"] != "complexity_adjusted_error"), "{summary}");

    verbs_on_features(&here, &data);
}

/// The verbs that are left, on the tables of the worked example: each does its work, or says why not.
fn verbs_on_features(here: &Path, data: &Path) {
    let run = |args: &[&str]| lookalike(here, args);
    let says = |args: &[&str], code: i32, expected: &str| {
        let ran = run(args).expect(code);
        assert!(
            ran.stdout.contains(expected) || ran.stderr.contains(expected),
            "{args:?}: {}{}",
            ran.stdout,
            ran.stderr
        );
    };
    let file = "breast_cancer.toml";
    says(&["plan", file], 0, "up to date");
    says(&["check", file], 0, "the first row has 30 values");
    says(&["explain", file, "17"], 0, "mean_squared_error");
    says(&["explain", file, "17", "--png", "17.png"], 2, "--png shows pictures");
    says(&["explain", file, "17", "--html", "17.html"], 0, "written to");
    let page = std::fs::read_to_string(here.join("17.html")).unwrap();
    assert!(page.contains("Nearest neighbors") && page.contains("percentile") && !page.contains("does not have this"));
    let model = data.join("model");
    let model = model.to_str().unwrap();
    says(
        &["compare", file, file, "--model", model],
        4,
        "`compare`, which reads image files, needs one that takes images",
    );
    let tables = data.join("tables");
    let tables = tables.to_str().unwrap();
    says(&["compare-tables", tables, tables, "--out", "near.parquet"], 0, "569");
    says(&["vacuum", file], 0, "");
    says(
        &["reconstruct", file, "--to", "small"],
        4,
        "`reconstruct`, which compares pictures, needs one that takes images",
    );
    // What is generated goes through the model again, and means what it was made of.
    says(&["generate", file, "--count", "40", "--seed", "7", "--to", "made"], 0, "40 rows of 30 values in");
    assert!(!here.join("made/sheet.png").exists());
    says(
        &["generate", file, "--interpolate", "17", "20", "--steps", "3", "--to", "between"],
        0,
        "3 rows of 30 values in",
    );
    write(
        &here.join("made.toml"),
        &format!(
            "[pipeline]\nname = \"made\"\n[source]\ntable = \"made\"\nimage = \"features\"\n[model]\npackage = \"{model}\"\n\
             [output]\ntable = \"of-made\"\n"
        ),
    );
    says(&["run", "made.toml"], 0, "40 images in, 40 scored, 0 rejected");
    python("generated_features.py", &[&here.join("made"), &here.join("of-made"), Path::new(model)]);
    // Read anew, and the same.
    let before = rows(Path::new(tables), TableName::Latents, &["run_id"]);
    says(&["embed", file, "--force"], 0, "");
    assert_eq!(rows(Path::new(tables), TableName::Latents, &["run_id"]), before);
    // Golden rows are normalized and run again: another mean, or another shape, does not replay.
    for (written, instead, expected) in [
        ("    12.152435,", "    12.2,", "golden image 0 of"),
        ("shape = [30]", "shape = [30, 1]", "f32, f16 or u8 of rows x 30 x 1"),
        ("scale = 1.0", "scale = nan", "does not normalize"),
    ] {
        let tampered = here.join("tampered");
        std::fs::create_dir_all(&tampered).unwrap();
        for name in ["vae.onnx", "decoder.onnx", "golden.parquet"] {
            std::fs::copy(data.join("model").join(name), tampered.join(name)).unwrap();
        }
        let contract = std::fs::read_to_string(data.join("model/model.toml")).unwrap();
        assert!(contract.contains(written), "{contract}");
        write(&tampered.join("model.toml"), &contract.replacen(written, instead, 1));
        says(&["calibrate", file, "--model", "tampered", "--to", "tampered.parquet"], 4, expected);
    }
    // Scored by a rule that the model does not give.
    let text = std::fs::read_to_string(here.join(file)).unwrap();
    write(&here.join("complex.toml"), &text.replace("\"fused\"", "\"complexity_adjusted_error\""));
    says(&["run", "complex.toml"], 4, "complexity_adjusted_error");
}

#[test]
fn the_same_numbers_give_the_same_latents_in_every_type_of_column() {
    let folder = folder();
    let names = tables(folder.path());
    assert_eq!(names.len(), 13);
    let fit = pipeline(folder.path(), "fit", "nested_int64", MODEL);
    lookalike(folder.path(), &["fit", &fit, "--latent-dim", "16"]).expect(0);
    let contract = std::fs::read_to_string(folder.path().join("model/model.toml")).unwrap();
    assert!(contract.contains("shape = [\n    8,\n    8,\n]") || contract.contains("shape = [8, 8]"), "{contract}");
    let mut expected = None;
    for name in names {
        let format = if name.starts_with("delta") { "format = \"delta\"\n" } else { "" };
        let file = pipeline(folder.path(), &name, &name, &format!("columns = [\"digit\"]\n{format}{MODEL}"));
        lookalike(folder.path(), &["run", &file]).expect(0);
        let mut found = rows(&folder.path().join("out").join(&name), TableName::Latents, &["run_id"]);
        if !format.is_empty() {
            let without: Vec<String> = found.extract_if(.., |row| row.contains("image_id=none ")).collect();
            assert!(without.len() == 1 && without[0].contains("status=missing"), "{without:?}");
        }
        assert_eq!(found.len(), 240);
        assert!(found.iter().all(|row| row.contains("status=ok")), "{name}: {}", found[0]);
        assert_eq!(&found, expected.get_or_insert_with(|| found.clone()), "{name}");
    }
    // Digits lie near digits of their kind.
    let evaluate = ["evaluate", "nested_int64.toml", "--positive", "digit = 1", "--negative", "digit <> 1"];
    let evaluate = [&evaluate[..], &["--label", "digit", "--json"]].concat();
    let summary = lookalike(folder.path(), &evaluate).expect(0).summary();
    assert!(summary["models"][0]["neighbor_accuracy"].as_f64().unwrap() > 0.9, "{summary}");
    // Rows of equal numbers are one, and have no size to be preferred by: the smallest id stands for them.
    let twice = format!("{MODEL}[neighbors]\nduplicate_distance = 0.0001\n");
    let twice = pipeline(folder.path(), "twice", "twice", &twice);
    let summary = lookalike(folder.path(), &["run", &twice]).expect(0).summary();
    assert_eq!(summary["groups"], 1, "{summary}");
    let groups = rows(&folder.path().join("out/twice"), TableName::Groups, &["run_id", "group_id"]);
    let representatives = ["b", "b", "x"];
    for ((group, id), representative) in groups.iter().zip(["b", "c", "x"]).zip(representatives) {
        assert!(group.contains(&format!("image_id={id} representative_id={representative} ")), "{groups:?}");
    }
}

#[test]
fn rows_that_cannot_be_used_have_a_status_and_the_others_are_scored() {
    let folder = folder();
    tables(folder.path());
    let fit = pipeline(folder.path(), "fit", "list_double", MODEL);
    lookalike(folder.path(), &["fit", &fit, "--latent-dim", "16"]).expect(0);
    // A model of flat rows does not take lists of lists: that is known before the first row.
    let flat = pipeline(folder.path(), "flat", "odd", MODEL);
    let refused = lookalike(folder.path(), &["run", &flat]).expect(4);
    let expected = "takes features of 64 values, but the image column of";
    assert!(refused.stderr.contains(expected) && refused.stderr.contains("any x any"), "{}", refused.stderr);

    let nested = MODEL.replace("\"model\"", "\"nested\"");
    let fit = pipeline(folder.path(), "fit_nested", "nested_double", &nested);
    lookalike(folder.path(), &["fit", &fit, "--latent-dim", "16"]).expect(0);
    let odd = pipeline(folder.path(), "odd", "odd", &nested);
    lookalike(folder.path(), &["run", &odd]).expect(0);
    let found = statuses(&folder.path().join("out/odd"));
    for (id, status, words) in [
        ("good", "ok", None),
        ("null", "missing", Some("the cell is null")),
        ("null_list", "null_value", Some("a value of the row is null")),
        ("null_value", "null_value", Some("a value of the row is null")),
        ("short", "wrong_shape", Some("the row is of 7 x 8 values, and the model takes 8 x 8")),
        ("long", "wrong_shape", Some("the row is of 9 x 8 values, and the model takes 8 x 8")),
        ("other_shape", "wrong_shape", Some("the row is of 2 x 32 values, and the model takes 8 x 8")),
        ("ragged", "wrong_shape", Some("the lists in the row are of unequal lengths, which make no tensor")),
        ("empty", "wrong_shape", Some("the row is of 0 x 0 values, and the model takes 8 x 8")),
        ("nan", "non_finite_input", Some("value 58 of the row, counted from 0, is NaN, which makes no finite number")),
        (
            "infinite",
            "non_finite_input",
            Some("value 63 of the row, counted from 0, is -inf, which makes no finite number"),
        ),
        (
            "too_large",
            "non_finite_input",
            Some("value 56 of the row, counted from 0, is inf, which makes no finite number"),
        ),
    ] {
        assert_eq!(found[id], (status.to_owned(), words.map(str::to_owned)), "{id}");
    }
    assert_eq!(found.len(), 12);

    // One good row is too little to learn from; it is counted, and so are the others.
    let few = pipeline(folder.path(), "few", "odd", &MODEL.replace("\"model\"", "\"few\""));
    let refused = lookalike(folder.path(), &["fit", &few]).expect(4);
    assert!(
        refused.stderr.contains("only 1 rows of") && refused.stderr.contains("(11 could not)"),
        "{}",
        refused.stderr
    );
    let none = lookalike(folder.path(), &["fit", &few, "--where", "image_id = 'null'"]).expect(4);
    assert!(none.stderr.contains("holds features that a model could be fitted to; the first one: the cell is null"));
}

#[test]
fn models_and_tables_of_different_kinds_are_refused_before_the_first_row() {
    let folder = folder();
    tables(folder.path());
    image_table(&folder.path().join("tables/pictures/x.parquet"), &[("a", 1), ("b", 2), ("c", 3), ("d", 4)]);
    let of = |package: &str| format!("[model]\npackage = \"{package}\"\n");
    let fit = |name: &str, table: &str, options: &[&str]| {
        let file = pipeline(folder.path(), name, table, &of(name));
        lookalike(folder.path(), &[&["fit", &file, "--latent-dim", "2"], options].concat())
    };
    fit("digits", "fixed_float", &[]).expect(0);
    let pictures = pipeline(folder.path(), "pictures", "pictures", &of("pictures")).replace(".toml", "");
    let text = std::fs::read_to_string(folder.path().join("pictures.toml")).unwrap();
    write(&folder.path().join("pictures.toml"), &text.replace("image = \"features\"\n", ""));
    lookalike(folder.path(), &["fit", "pictures.toml", "--latent-dim", "2", "--height", "8", "--width", "8"]).expect(0);

    let refused = |args: &[&str], code: i32, expected: &str| {
        let ran = lookalike(folder.path(), args).expect(code);
        assert!(ran.stderr.contains(expected), "{args:?}: {}", ran.stderr);
    };
    let wrong = "takes features of 64 values, but the image column of";
    for verb in ["run", "plan", "embed", "neighbors"] {
        refused(&[verb, "pictures.toml", "--model", "digits"], 4, wrong);
        refused(&[verb, "digits.toml", "--model", &pictures], 4, "holds features of 64 values");
    }
    assert!(!folder.path().join("out").exists(), "nothing was written");
    write(&folder.path().join("tables/folder/a.png"), "a picture");
    refused(&["run", "--images", "tables/folder", "--out", "out", "--model", "digits"], 4, wrong);
    // A length that the type tells is compared before any row is read.
    fit("nested", "fixed_nested_float", &[]).expect(0);
    let contract = folder.path().join("nested/model.toml");
    write(&contract, &std::fs::read_to_string(&contract).unwrap().replace('8', "7"));
    refused(&["plan", "digits.toml", "--model", "nested"], 4, "features of 7 x 7 values, but the image column of");
    // The encoder beside a model must take the same.
    pipeline(folder.path(), "both", "fixed_float", &format!("{}[encoder]\npackage = \"pictures\"\n", of("digits")));
    refused(&["run", "both.toml"], 4, "pictures/ takes images, but the image column of");
    refused(&["fit", "digits.toml", "--model", "new", "--height", "8"], 2, "--height is for images");
    refused(&["fit", "pictures.toml", "--model", "new", "--standardize"], 2, "--standardize is for features");
    pipeline(folder.path(), "mixed", "mixed", &of("digits"));
    refused(&["run", "mixed.toml"], 4, "column `features` holds images in b.parquet, but features of any values in");
    pipeline(folder.path(), "label", "fixed_float", &of("digits"));
    let text = std::fs::read_to_string(folder.path().join("label.toml")).unwrap();
    write(&folder.path().join("label.toml"), &text.replace("\"features\"", "\"digit\""));
    refused(&["run", "label.toml"], 4, "or lists of numbers");
}

#[test]
fn features_go_through_an_encoder_beside_the_model() {
    let folder = folder();
    tables(folder.path());
    let fit = pipeline(folder.path(), "fit", "list_float", MODEL);
    lookalike(folder.path(), &["fit", &fit, "--latent-dim", "4"]).expect(0);
    encoder_of(&folder.path().join("model"), &folder.path().join("encoder"));
    for (name, encoder) in [("alone", ""), ("both", "[encoder]\npackage = \"encoder\"\n")] {
        let file = pipeline(folder.path(), name, "list_float", &format!("{MODEL}{encoder}"));
        lookalike(folder.path(), &["run", &file]).expect(0);
    }
    let except = ["run_id", "model_sha256", "mu"];
    let found = |name: &str| rows(&folder.path().join("out").join(name), TableName::Latents, &except);
    assert_eq!(found("alone"), found("both"));
}
