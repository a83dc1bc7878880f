use crate::support::{folder, lookalike, write};

const VERBS: [&str; 10] =
    ["run", "plan", "embed", "neighbors", "flag", "fit", "calibrate", "evaluate", "explain", "completions"];

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
