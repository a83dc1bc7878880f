//! Networks as other programs export them: looked into, packaged, run, and compared with what their own file gives elsewhere; and models
//! that are wrong, each refused for its own reason before the first image.

use std::path::Path;

use arrow::array::AsArray as _;
use arrow::datatypes::Float64Type;
use lookalike::schema::TableName;

use crate::support::{Ran, batches, folder, lookalike, python, write};

/// A folder with pictures and networks.
fn made() -> tempfile::TempDir {
    let folder = folder();
    python("foreign_networks.py", &[Path::new("make"), folder.path()]);
    folder
}

fn file_of(name: &str) -> String {
    format!("networks/{name}/{name}.onnx")
}

/// Makes a package of a network of a pair or alone, with the folder `images`.
fn package(folder: &Path, name: &str, more: &[&str]) -> Ran {
    let (file, to) = (file_of(name), format!("packages/{name}"));
    lookalike(folder, &[&["model", "package", &file, "--images", "images", "--to", &to], more].concat())
}

/// Runs a pipeline with a package over the pictures, in batches of five.
fn run(folder: &Path, name: &str, more: &str) -> Ran {
    write(
        &folder.join(format!("{name}.toml")),
        &format!(
            "[pipeline]\nname = \"{name}\"\n[source]\ntable = \"images\"\nformat = \"directory\"\n[model]\n\
             package = \"packages/{name}\"\n[execution]\nbatch_size = 5\n[neighbors]\nk = 2\n[output]\ntable = \"out/{name}\"\n{more}"
        ),
    );
    lookalike(folder, &["run", &format!("{name}.toml")])
}

#[test]
fn networks_of_seven_kinds_give_here_what_their_own_file_gives_elsewhere() {
    let folder = made();
    let folder = folder.path();
    let inspected = |name: &str| lookalike(folder, &["model", "inspect", &file_of(name)]).expect(0).stdout;
    for (name, told, proposed) in [
        ("anomalib", "# metadata task = segmentation", "pred_score = \"pred_score\""),
        ("keras", "# input    serving/input f32 n x 24 x 40 x 3", "layout = \"nhwc\""),
        ("half", "# input    pixel_values f16 n x 3 x ? x ?", "filter = \"bicubic\""),
        ("int8", "QuantizeLinear", "resize = 37"),
        ("pixels", "# input    bytes u8 4 x 20 x 28 x 3", "scale = 1.0"),
        ("double", "# output   embedding f64 n x 5", "color = \"gray\""),
        ("pair", "# output   z_log_var f32 n x 6", "logvar = \"z_log_var\""),
    ] {
        let text = inspected(name);
        assert!(text.contains(told) && text.contains(proposed), "{name}: {text}");
        // What is printed is a contract, and can be given back.
        write(&folder.join(format!("{name}-contract.toml")), &text);
        let contract = format!("{name}-contract.toml");
        let decoder = (name == "pair").then_some(["--decoder", "networks/pair/decoder.onnx"]);
        let more: Vec<&str> = ["--contract", &contract].into_iter().chain(decoder.into_iter().flatten()).collect();
        let summary = package(folder, name, &more).expect(0).summary();
        let rule = if name == "anomalib" { "[anomaly]\nrule = \"pred_score\"\n" } else { "" };
        let ran = run(folder, name, rule).expect(0).summary();
        assert_eq!((ran["rows_ok"].as_u64(), &ran["model_sha256"]), (Some(7), &summary["sha256"]), "{name}");
        python(
            "foreign_networks.py",
            &[Path::new("check"), folder, Path::new(name), &folder.join(format!("out/{name}/latents"))],
        );
        lookalike(folder, &["check", &format!("{name}.toml")]).expect(0);
    }
    let told = inspected("anomalib");
    assert!(told.contains("# within   /pool/Flatten_output_0 f32 n x 12"), "{told}");

    // The model's own score decides, and the strangest is the one that the model finds strangest.
    let [(_, flags)] = batches(&folder.join("out/anomalib"), TableName::Anomalies).try_into().unwrap();
    let [(_, latents)] = batches(&folder.join("out/anomalib"), TableName::Latents).try_into().unwrap();
    let column = |rows: &arrow::array::RecordBatch, name: &str| {
        rows.column_by_name(name).unwrap().as_primitive::<Float64Type>().values().to_vec()
    };
    assert_eq!(column(&flags, "anomaly_score"), column(&latents, "pred_score"));

    // A pair reconstructs, so it can be asked for pictures too.
    lookalike(folder, &["generate", "pair.toml", "--to", "sampled", "--count", "3"]).expect(0);
    lookalike(folder, &["explain", "pair.toml", "3.png", "--png", "3.png"]).expect(0);
}

#[test]
fn a_network_without_a_score_of_its_own_or_without_a_vector_is_told_what_it_lacks() {
    let folder = made();
    let folder = folder.path();
    // Without the tensor within, anomalib's export has no vector.
    let text = lookalike(folder, &["model", "inspect", &file_of("anomalib")]).expect(0).stdout;
    let text: String =
        text.lines().filter(|line| !line.starts_with("embedding")).flat_map(|line| [line, "\n"]).collect();
    write(&folder.join("contract.toml"), &text);
    package(folder, "anomalib", &["--contract", "contract.toml"]).expect(0);
    let ran = run(folder, "anomalib", "[anomaly]\nrule = \"pred_score\"\n").expect(4);
    assert!(ran.stderr.contains("gives no vector to search by, and there is no [encoder]"), "{}", ran.stderr);
    assert!(ran.stderr.contains("model inspect"), "{}", ran.stderr);
    // An encoder gives it one.
    package(folder, "keras", &[]).expect(0);
    let encoder = "[anomaly]\nrule = \"pred_score\"\n[encoder]\npackage = \"packages/keras\"\n";
    assert_eq!(run(folder, "anomalib", encoder).expect(0).summary()["rows_ok"], 7);
    // And a model without that score cannot be judged by it.
    let ran = run(folder, "keras", "[anomaly]\nrule = \"pred_score\"\n").expect(4);
    assert!(ran.stderr.contains("needs a model with `pred_score` or `anomaly_map`"), "{}", ran.stderr);
}

#[test]
fn a_wrong_model_is_refused_before_the_first_image_each_with_its_own_message() {
    let folder = made();
    let folder = folder.path();
    package(folder, "int8", &[]).expect(0);
    let contract = folder.join("packages/int8/model.toml");
    let whole = std::fs::read_to_string(&contract).unwrap();
    let network = folder.join("packages/int8/int8.onnx");
    let bytes = std::fs::read(&network).unwrap();

    let refused = |message: &str, hint: &str| {
        let ran = run(folder, "int8", "").expect(4);
        assert!(ran.stderr.contains(message) && ran.stderr.contains(hint), "{message}: {}", ran.stderr);
        assert!(!folder.join("out/int8/latents").exists(), "{message}: rows were published");
    };
    let edited = |from: &str, to: &str| {
        assert!(whole.contains(from), "{from} in {whole}");
        write(&contract, &whole.replacen(from, to, 1));
    };
    edited("width = 32", "width = 36");
    // The golden tensors are of the old width, which is found out first.
    refused("its column `input` has 12288 values for 4 rows, where an input of the network has 3456", "cannot read");
    edited("    0.485,", "    0.5,");
    refused("does not replay: input differs by", "check [input] of model.toml");
    edited("embedding = \"embedding\"", "embedding = \"embeddings\"");
    refused("has no output `embeddings`; it has embedding", "model inspect");
    edited("layout = \"nchw\"", "layout = \"nhwc\"");
    refused("the input `image` of", "check height, width, color and layout");
    edited("tensor = \"image\"", "tensor = \"picture\"");
    refused("has no input `picture`; it has image", "model inspect");
    write(&contract, &whole);
    let mut changed = bytes.clone();
    changed[bytes.len() / 2] ^= 1;
    overwrite(&network, &changed);
    refused("int8.onnx has sha256", "export it again");
    // Other weights, honestly listed: the network is one, and not the one that the exporter saw.
    overwrite(&network, &std::fs::read(folder.join(file_of("nan"))).unwrap());
    let hash = lookalike::hash::sha256(&bytes);
    let with_hash = |other: &[u8]| whole.replace(&hash, &lookalike::hash::sha256(other));
    write(&contract, &with_hash(&std::fs::read(&network).unwrap()));
    refused("the input `image` of", "check height, width, color and layout");
    overwrite(&network, b"not a network");
    write(&contract, &with_hash(b"not a network"));
    refused("int8.onnx is not an ONNX model", "");

    // Numbers that are none are found when the package is made, and when it is loaded.
    let ran = package(folder, "nan", &[]).expect(4);
    assert!(
        ran.stderr.contains("gives numbers that are none (NaN or infinite) for image 0: output embedding"),
        "{}",
        ran.stderr
    );
    assert!(!folder.join("packages/nan").exists());
    // More than a picture goes in.
    let ran = package(folder, "two_inputs", &[]).expect(4);
    assert!(ran.stderr.contains("it has 2 inputs, and a picture is one: image f32"), "{}", ran.stderr);
}

#[test]
fn a_device_that_is_not_there_exits_6_and_says_what_to_install() {
    let folder = made();
    let folder = folder.path();
    package(folder, "int8", &[]).expect(0);
    run(folder, "int8", "").expect(0);
    for (device, remedy) in [
        ("cuda", "pip install onnxruntime-gpu"),
        ("tensorrt", "pip install tensorrt"),
        ("openvino", "pip install onnxruntime-openvino"),
    ] {
        for args in
            [&["run", "int8.toml", "--force", "--device", device][..], &["check", "int8.toml", "--device", device]]
        {
            let ran = lookalike(folder, args).expect(6);
            let said = format!("{}{}", ran.stdout, ran.stderr);
            assert!(said.contains(remedy) && said.contains(device), "{said}");
        }
    }
    // `auto` takes what there is, and says which.
    let ran = lookalike(folder, &["run", "int8.toml", "--force", "--device", "auto"]).expect(0);
    assert_eq!(ran.summary()["provider"], "cpu");
}

fn overwrite(path: &Path, bytes: &[u8]) {
    #[expect(clippy::disallowed_methods, reason = "a test writes its own files")]
    std::fs::write(path, bytes).unwrap();
}
