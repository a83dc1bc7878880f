use crate::support::{Ran, folder, image_table, lookalike, picture, write};

const VERBS: [&str; 22] = [
    "run",
    "bench",
    "plan",
    "embed",
    "neighbors",
    "flag",
    "commit",
    "fit",
    "calibrate",
    "evaluate",
    "explain",
    "report",
    "generate",
    "reconstruct",
    "export",
    "compare",
    "compare-tables",
    "model",
    "check",
    "vacuum",
    "completions",
    "man",
];

#[test]
fn help_names_every_verb_and_the_exit_codes() {
    let folder = folder();
    let help = lookalike(folder.path(), &["--help"]).expect(0).stdout;
    for verb in VERBS {
        assert!(help.contains(&format!("\n  {verb} ")), "{verb} is not in:\n{help}");
    }
    assert!(help.contains("Exit codes: 0 committed or nothing to do"), "{help}");
}

#[test]
fn every_verb_has_help_that_describes_each_of_its_options() {
    let folder = folder();
    for verb in VERBS {
        let help = lookalike(folder.path(), &[verb, "--help"]).expect(0).stdout;
        assert!(help.contains("Usage: lookalike"), "{help}");
        for line in help.lines().filter(|line| line.trim_start().starts_with("--") && line.contains('<')) {
            let described = line.split_once('>').is_some_and(|(_, rest)| rest.trim().len() > 5)
                || help
                    .split_once(line)
                    .is_some_and(|(_, rest)| rest.lines().nth(1).is_some_and(|next| next.trim().len() > 5));
            assert!(described, "{verb}: {line}");
        }
    }
}

#[test]
fn the_version_names_onnx_runtime_and_where_it_is() {
    let folder = folder();
    let version = lookalike(folder.path(), &["--version"]).expect(0).stdout;
    assert!(version.contains(concat!("lookalike ", env!("CARGO_PKG_VERSION"))), "{version}");
    assert!(version.contains("ONNX Runtime 1."), "{version}");
    assert!(version.contains("ORT_DYLIB_PATH"), "{version}");
}

#[test]
fn a_missing_runtime_is_a_missing_resource_and_the_error_says_how_to_get_it() {
    let folder = folder();
    let missing = folder.path().join("libonnxruntime.so");
    let ran = lookalike(folder.path(), &["--onnxruntime", missing.to_str().unwrap(), "--version"]).expect(6);
    assert!(ran.stderr.contains("pip install onnxruntime"), "{}", ran.stderr);
    assert!(ran.stderr.contains("libonnxruntime.so"), "{}", ran.stderr);
}

#[test]
fn nonsense_on_the_command_line_is_a_usage_error() {
    let folder = folder();
    lookalike(folder.path(), &["rum"]).expect(2);
    lookalike(folder.path(), &["run"]).expect(2);
    lookalike(folder.path(), &["run", "no-such-file.toml"]).expect(2);
}

#[test]
fn a_misspelled_key_is_a_usage_error_with_the_line_and_the_key_meant() {
    let folder = folder();
    write(
        &folder.path().join("p.toml"),
        "[pipeline]\nname = \"x\"\n[source]\ntable = \"images\"\n[model]\npackage = \"m\"\n[output]\ntable = \"out\"\n[neighbors]\nkk = 3\n",
    );
    let ran = lookalike(folder.path(), &["plan", "p.toml"]).expect(2);
    for expected in ["p.toml", "10", "kk", "did you mean `k`?"] {
        assert!(ran.stderr.contains(expected), "{expected} is not in:\n{}", ran.stderr);
    }
}

#[test]
fn an_empty_folder_of_images_is_a_broken_agreement() {
    let folder = folder();
    std::fs::create_dir(folder.path().join("images")).unwrap();
    let ran = lookalike(folder.path(), &["run", "--images", "images", "--out", "out"]).expect(4);
    assert!(ran.stderr.contains("no file ending in .jpg"), "{}", ran.stderr);
}

#[test]
fn completions_are_a_script_for_the_shell() {
    let folder = folder();
    let script = lookalike(folder.path(), &["completions", "bash"]).expect(0).stdout;
    assert!(script.contains("_lookalike()"), "{script}");
}

#[test]
fn every_command_has_a_manual_page_with_all_of_its_options() {
    let folder = folder();
    let path = folder.path();
    let ran = lookalike(path, &["man", "--to", "man"]).expect(0);
    let commands: Vec<Vec<&str>> = VERBS
        .iter()
        .map(|verb| vec![*verb])
        .chain([vec!["model", "inspect"], vec!["model", "package"], Vec::new()])
        .collect();
    let page = |command: &[&str]| {
        let name = [&["lookalike"], command].concat().join("-");
        let page = std::fs::read_to_string(path.join(format!("man/{name}.1"))).unwrap();
        assert!(page.is_ascii() && page.contains(&format!(".TH {name} 1 ")), "{page}");
        page
    };
    assert_eq!(std::fs::read_dir(path.join("man")).unwrap().count(), commands.len(), "{}", ran.stderr);
    for command in &commands {
        let page = page(command);
        // Requests of roff, each of those that are meant: text that begins with a dot would be taken for one and vanish.
        for request in page.lines().filter(|line| line.starts_with(['.', '\''])) {
            let name = request.split_whitespace().next().unwrap();
            assert!(
                [".ie", ".el", ".TH", ".SH", ".SS", ".TP", ".PP", ".RS", ".RE", ".br", ".sp", ".IP"].contains(&name),
                "{request}"
            );
        }
        let help = lookalike(path, &[command, &["--help"][..]].concat()).expect(0).stdout;
        for option in help.split_whitespace().filter(|word| word.starts_with("--") && word.len() > 2) {
            let option = option.trim_matches(|sign: char| !sign.is_ascii_alphanumeric() && sign != '-');
            assert!(page.contains(&option.replace('-', "\\-")), "{option} is not on the page of {command:?}:\n{page}");
        }
    }
    assert_eq!(lookalike(path, &["man"]).expect(0).stdout.trim_end(), page(&[]).trim_end());
}

/// The lines of standard error, each a JSON object as log shippers take it.
#[track_caller]
fn json_lines(ran: &Ran) -> Vec<serde_json::Value> {
    let lines = ran.stderr.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line:?}")));
    let lines: Vec<serde_json::Value> = lines.collect();
    for line in &lines {
        assert!(line["timestamp"].as_str().is_some_and(|time| time.ends_with('Z')), "{line}");
        assert!(line["level"].is_string() && line["fields"]["message"].is_string(), "{line}");
    }
    lines
}

#[test]
fn the_log_in_json_has_not_one_line_of_plain_text() {
    let folder = folder();
    let run = |args: &[&str]| lookalike(folder.path(), &[args, &["--log-format", "json"]].concat());
    for seed in 0..4 {
        let path = folder.path().join(format!("images/{seed}.png"));
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        #[expect(clippy::disallowed_methods, reason = "a test writes its own files")]
        std::fs::write(path, picture(seed)).unwrap();
    }
    // What is said after a run, to people otherwise.
    let ran = run(&["run", "--images", "images", "--out", "out"]).expect(0);
    assert_eq!(ran.summary()["status"], "committed");
    let messages = json_lines(&ran);
    let said = |text: &str| messages.iter().any(|line| line["fields"]["message"].as_str().unwrap().contains(text));
    assert!(said("4 images in") && said("strangest by"), "{}", ran.stderr);
    assert!(run(&["run", "--images", "images", "--out", "out", "--quiet"]).expect(0).stderr.is_empty());
    // An error of the store, with its cause and its hint.
    let ran = run(&["run", "--images", "nowhere", "--out", "out2"]).expect(4);
    let error = json_lines(&ran).pop().unwrap();
    assert_eq!((error["level"].as_str(), error["fields"]["exit_code"].as_u64()), (Some("ERROR"), Some(4)));
    assert!(error["fields"]["hint"].as_str().unwrap().contains("check the folder"), "{error}");
    let ran = run(&["plan", "nowhere.toml"]).expect(2);
    let error = json_lines(&ran).pop().unwrap();
    assert!(error["fields"]["causes"][0].as_str().unwrap().contains("No such file"), "{error}");
    // The problems of a pipeline file, by line.
    write(&folder.path().join("p.toml"), "[source]\ntabel = \"images\"\n[neighbors]\nkk = 3\n");
    let ran = run(&["plan", "p.toml"]).expect(2);
    let error = json_lines(&ran).pop().unwrap();
    let problems = error["fields"]["problems"].as_array().unwrap();
    assert!(problems.iter().any(|problem| problem["line"] == 4 && problem["hint"].as_str().unwrap().contains("`k`")));
    // The command line itself.
    let error = json_lines(&run(&["rum"]).expect(2)).pop().unwrap();
    assert!(error["fields"]["message"].as_str().unwrap().starts_with("unrecognized subcommand"), "{error}");
    assert_eq!(json_lines(&lookalike(folder.path(), &["--log-format=json", "run"]).expect(2)).len(), 1);
}

#[test]
fn bench_measures_a_model_or_a_pipeline_and_prints_lines_that_the_pipeline_file_takes() {
    let folder = folder();
    image_table(&folder.path().join("images/0.parquet"), &PICTURES);
    let pipeline = "[pipeline]\nname = \"p\"\n[source]\ntable = \"images\"\n[model]\npackage = \"model\"\n[output]\ntable = \"out\"\n";
    write(&folder.path().join("p.toml"), pipeline);
    lookalike(folder.path(), &["fit", "p.toml", "--latent-dim", "2", "--width", "8", "--height", "8"]).expect(0);
    let found = lookalike(folder.path(), &["bench", "model"]).expect(0).stdout;
    assert!(found.contains("workers  threads  batch_size  images/s"), "{found}");
    let (_, lines) = found.split_once("\n\n").unwrap();
    write(&folder.path().join("p.toml"), &format!("{pipeline}{lines}"));
    lookalike(folder.path(), &["run", "p.toml"]).expect(0);

    let found = lookalike(folder.path(), &["bench", "p.toml", "--json"]).expect(0).stdout;
    let found: serde_json::Value = serde_json::from_str(found.trim()).unwrap();
    let rate = |name: &str| found[name].as_f64().unwrap();
    let (decode, infer) = (rate("decode_images_per_sec"), rate("infer_images_per_sec"));
    assert!(decode > 0.0 && infer > 0.0, "{found}");
    assert!((rate("floor_images_per_sec") - decode * infer / (decode + infer)).abs() < 1e-6 * decode, "{found}");
    assert_eq!(found["default_batch_size"], 32, "{found}");
    assert!(found["sweep"].as_array().unwrap().len() > 1, "{found}");

    let one = ["bench", "p.toml", "--json", "--workers", "1", "--batch-size", "5"];
    let found: serde_json::Value =
        serde_json::from_str(lookalike(folder.path(), &one).expect(0).stdout.trim()).unwrap();
    assert_eq!(found["sweep"].as_array().unwrap().len(), 1, "{found}");
    assert_eq!((&found["fastest"]["workers"], &found["fastest"]["batch_size"]), (&1.into(), &5.into()), "{found}");
    for (number, said) in [("0", "`--batch-size` is 0"), ("4097", "`--batch-size` is 4097, outside of 1 to 4096")] {
        let refused = lookalike(folder.path(), &["bench", "model", "--batch-size", number]).expect(2);
        assert!(refused.stderr.contains(said), "{}", refused.stderr);
    }
    lookalike(folder.path(), &["bench", "nowhere"]).expect(4);
}

const PICTURES: [(&str, i64); 8] = [("a", 0), ("b", 1), ("c", 2), ("d", 3), ("e", 4), ("f", 5), ("g", 6), ("h", 7)];
