use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use arrow::array::AsArray as _;
use lookalike::model::onnx_proto::{
    DataLocation, DimensionSize, ModelProto, NodeProto, OperatorSetIdProto, StringStringEntryProto, TypeProto,
};
use lookalike::model::{Contract, InputKind, Layout, Role, package};
use lookalike::schema::TableName;
use prost::Message as _;
use tempfile::TempDir;

use crate::support::{batches, folder, image_table, lookalike, peak_memory, python, rows, write};

/// What the fuzz targets do with their bytes.
#[path = "../../fuzz/entry.rs"]
mod entry;

/// Resident set that a process with two workers stays below, whatever its images are: 200 MB for the largest cell and what Parquet takes to
/// read it, and 300 MB for each image of 2^26 gray pixels that is decoded.
const MAX_RESIDENT_KIB: u64 = 1536 << 10;

const PIPELINE: &str = "[pipeline]\nname = \"p\"\n[source]\ntable = \"images\"\n[model]\npackage = \"model\"\n[output]\ntable = \"out\"\n\
                        [limits]\nmax_decode_secs = 1\n";

/// A source of eight pictures, and a model fitted to it in `model`.
fn fitted() -> TempDir {
    let folder = folder();
    write(&folder.path().join("p.toml"), PIPELINE);
    let rows = ["a", "b", "c", "d", "e", "f", "g", "h"].into_iter().zip(1..).collect::<Vec<_>>();
    image_table(&folder.path().join("images/x.parquet"), &rows);
    let fit = ["fit", "p.toml", "--latent-dim", "3", "--height", "8", "--width", "8"];
    lookalike(folder.path(), &fit).expect(0);
    folder
}

#[test]
fn a_bomb_is_a_row_with_a_status_and_takes_no_more_memory_than_is_allowed() {
    let folder = fitted();
    let bombs = folder.path().join("bombs");
    python("hostile_images.py", &[Path::new("bombs"), &bombs]);
    let expected = std::fs::read_to_string(bombs.join("expected.json")).unwrap();
    let expected: BTreeMap<String, String> = serde_json::from_str(&expected).unwrap();
    write(&folder.path().join("p.toml"), &PIPELINE.replace("\"images\"", "\"bombs/images.parquet\""));

    // Published, and said by the exit code that more was rejected than is usual.
    let (_, resident_kib) = peak_memory(folder.path(), &["embed", "p.toml", "--workers", "2"], 3);
    println!("{} bombs: {} MiB", expected.len(), resident_kib >> 10);

    let mut found = BTreeMap::new();
    for (_, batch) in batches(&folder.path().join("out"), TableName::Latents) {
        let text = |name: &str| batch.column_by_name(name).unwrap().as_string::<i32>().clone();
        let (ids, statuses) = (text("image_id"), text("status"));
        found.extend((0..batch.num_rows()).map(|row| (ids.value(row).to_owned(), statuses.value(row).to_owned())));
    }
    assert_eq!(found, expected);
    assert!(resident_kib < MAX_RESIDENT_KIB, "{resident_kib} KiB");
}

#[test]
fn no_seed_of_the_fuzz_targets_breaks_what_must_hold() {
    type Target = fn(&[u8]);
    let targets: [(&str, Target); 6] = [
        ("decode", entry::image),
        ("model_toml", entry::model_toml),
        ("onnx_proto", entry::onnx_proto),
        ("pipeline_file", entry::pipeline_file),
        ("predicate", entry::predicate),
        ("receipt", entry::receipt),
    ];
    let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds");
    let mut folders: Vec<_> = std::fs::read_dir(&seeds).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    folders.sort();
    assert_eq!(folders, targets.map(|(name, _)| name), "each target has a folder of seeds");
    for (name, target) in targets {
        for seed in std::fs::read_dir(seeds.join(name)).unwrap() {
            let seed = seed.unwrap().path();
            println!("{}", seed.display());
            target(&std::fs::read(seed).unwrap());
        }
    }
}

/// A model package to tamper with.
struct Package(PathBuf);

impl Package {
    /// A copy of the fitted package.
    fn copy_of(fitted: &Path, name: &str) -> Self {
        let folder = fitted.join(name);
        std::fs::create_dir_all(&folder).unwrap();
        for file in std::fs::read_dir(fitted.join("model")).unwrap() {
            let file = file.unwrap();
            std::fs::copy(file.path(), folder.join(file.file_name())).unwrap();
        }
        Self(folder)
    }

    fn contract(&self) -> Contract {
        toml::from_str(&std::fs::read_to_string(self.0.join("model.toml")).unwrap()).unwrap()
    }

    fn set_contract(&self, change: impl FnOnce(&mut Contract)) {
        let mut contract = self.contract();
        change(&mut contract);
        self.write("model.toml", toml::to_string(&contract).unwrap().as_bytes());
    }

    fn write(&self, file: &str, bytes: &[u8]) {
        let path = self.0.join(file);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        #[expect(clippy::disallowed_methods, reason = "a test writes its own files")]
        std::fs::write(path, bytes).unwrap();
    }

    /// Writes a file and lists it with its hash.
    fn put(&self, file: &str, bytes: &[u8]) {
        self.write(file, bytes);
        self.list(file, bytes);
    }

    /// Lists a file, wherever it is, with the hash of `bytes`.
    fn list(&self, file: &str, bytes: &[u8]) {
        let sha256 = lookalike::hash::sha256(bytes);
        self.set_contract(|contract| {
            contract.files.insert(file.to_owned(), sha256);
        });
    }

    fn change_network(&self, change: impl FnOnce(&mut ModelProto)) {
        let main = self.contract().graph.main;
        let mut network = ModelProto::decode(&*std::fs::read(self.0.join(&main)).unwrap()).unwrap();
        change(&mut network);
        self.put(&main, &network.encode_to_vec());
    }

    /// Moves the largest weights of the network to a file, and returns them.
    fn move_weights_to(&self, location: &str) -> Vec<u8> {
        let mut weights = Vec::new();
        self.change_network(|network| {
            let constants = &mut network.graph.as_mut().unwrap().initializer;
            let largest = constants.iter_mut().max_by_key(|constant| constant.raw_data.len()).unwrap();
            weights = std::mem::take(&mut largest.raw_data).to_vec();
            largest.data_location = DataLocation::External.into();
            let entry = |key: &str, value: String| StringStringEntryProto { key: key.to_owned(), value };
            largest.external_data = vec![
                entry("location", location.to_owned()),
                entry("offset", "0".to_owned()),
                entry("length", weights.len().to_string()),
            ];
        });
        weights
    }

    /// Embeds with the package, which must end with the exit code; returns all that was said.
    #[track_caller]
    fn embed(&self, code: i32) -> String {
        let name = self.0.file_name().unwrap().to_str().unwrap();
        let out = format!("out-{name}");
        let ran =
            lookalike(self.0.parent().unwrap(), &["embed", "p.toml", "--model", name, "--out", &out]).expect(code);
        assert!(!ran.stderr.contains("panicked"), "{}", ran.stderr);
        ran.stderr
    }
}

#[test]
fn weights_beside_the_network_are_read_from_the_package_and_hashed_like_all_else() {
    let folder = fitted();
    let whole = Package::copy_of(folder.path(), "whole");
    whole.embed(0);
    let package = Package::copy_of(folder.path(), "package");
    let weights = package.move_weights_to("weights/all.bin");
    assert!(package.embed(4).contains("does not list `weights/all.bin` under [files]"));
    package.put("weights/all.bin", &weights);
    package.embed(0);
    let latents = |out: &str| rows(&folder.path().join(out), TableName::Latents, &["run_id", "model_sha256"]);
    assert_eq!(latents("out-package"), latents("out-whole"));

    let changed = Package::copy_of(folder.path(), "changed");
    let mut weights = changed.move_weights_to("weights.bin");
    changed.put("weights.bin", &weights);
    weights[0] ^= 1;
    changed.write("weights.bin", &weights);
    assert!(changed.embed(4).contains("weights.bin has sha256"));
}

#[test]
fn what_lies_outside_the_package_is_refused_before_it_is_read() {
    let folder = fitted();
    // The last is what ONNX Runtime takes for an address in its own memory.
    let absolute = folder.path().join("weights.bin").to_str().unwrap().to_owned();
    let locations = ["../weights.bin", &absolute, "weights/../../weights.bin", "*/_ORT_MEM_ADDR_/*"];
    for (number, location) in locations.into_iter().enumerate() {
        let package = Package::copy_of(folder.path(), &format!("package-{number}"));
        let weights = package.move_weights_to(location);
        package.write("../weights.bin", &weights);
        let refused = format!("names the file `{location}`, which is not within the package");
        assert!(package.embed(4).contains(&refused), "{location}");
        // Nor does it help to list it.
        package.list(location, &weights);
        assert!(package.embed(4).contains(&refused), "{location}");
    }

    let package = Package::copy_of(folder.path(), "links");
    let weights = package.move_weights_to("weights.bin");
    package.list("weights.bin", &weights);
    std::os::unix::fs::symlink("../weights.bin", folder.path().join("links/weights.bin")).unwrap();
    assert!(package.embed(4).contains("names the file `weights.bin`, which is not within the package"));
    // A link that stays inside is a file like any other.
    package.write("version-7/weights.bin", &weights);
    std::fs::remove_file(folder.path().join("links/weights.bin")).unwrap();
    std::os::unix::fs::symlink("version-7/weights.bin", folder.path().join("links/weights.bin")).unwrap();
    package.embed(0);
}

/// Sets the length of an axis of a tensor.
fn set_axis(tensor: Option<&mut TypeProto>, axis: usize, length: i64) {
    let shape = tensor.unwrap().tensor_type.as_mut().unwrap().shape.as_mut().unwrap();
    shape.dim[axis].size = Some(DimensionSize::Value(length));
}

#[test]
fn a_network_that_does_not_fit_is_refused_by_what_does_not_fit() {
    let folder = fitted();
    let refused = |name: &str, change: &dyn Fn(&mut ModelProto)| {
        let package = Package::copy_of(folder.path(), name);
        package.change_network(change);
        package.embed(4)
    };
    let contains = |words: &str, expected: &str| assert!(words.contains(expected), "{words}");
    let opset = |version: i64| move |network: &mut ModelProto| network.opset_import[0].version = version;
    contains(&refused("old", &opset(6)), "its opset is 6, and the oldest that is run is 7");
    contains(&refused("new", &opset(999)), "which is of opset 999");
    contains(&refused("none", &|network| network.opset_import.clear()), "it names no opset");
    let foreign = refused("foreign", &|network: &mut ModelProto| {
        network.opset_import.push(OperatorSetIdProto { domain: "acme.ops".to_owned(), version: 1 });
        let node = NodeProto { domain: "acme.ops".to_owned(), ..NodeProto::new("Sharpen", &["a"], &["b"]) };
        network.graph.as_mut().unwrap().node.push(node);
    });
    contains(&foreign, "its operator `Sharpen` is of the domain `acme.ops`");
    // One image at a time is slow, and no fault.
    let package = Package::copy_of(folder.path(), "batch");
    package.change_network(|network| set_axis(network.graph.as_mut().unwrap().input[0].r#type.as_mut(), 0, 1));
    package.embed(0);
    let package = Package::copy_of(folder.path(), "layout");
    package.set_contract(|contract| {
        if let InputKind::Image(image) = &mut contract.input.kind {
            image.layout = Layout::Nhwc;
        }
    });
    contains(&package.embed(4), "and by model.toml it is f32, f16 or u8 of images x 8 x 8 x 3");
    contains(&refused("empty", &|network| *network = ModelProto::default()), "it has no graph");

    let package = Package::copy_of(folder.path(), "text");
    package.put(&package.contract().graph.main, b"this is not a network");
    contains(&package.embed(4), "is not an ONNX model");
}

#[test]
fn golden_images_that_prove_nothing_are_refused() {
    let folder = fitted();
    let contains = |words: &str, expected: &str| assert!(words.contains(expected), "{words}");
    let package = Package::copy_of(folder.path(), "tolerance");
    package.set_contract(|contract| contract.golden.output_tolerance = f32::NAN);
    contains(&package.embed(4), "`golden.output_tolerance` is NaN");

    let write_golden = |name: &str, change: &dyn Fn(&mut package::Golden)| {
        let package = Package::copy_of(folder.path(), name);
        let contract = package.contract();
        let bytes = std::fs::read(package.0.join(&contract.golden.file)).unwrap();
        let mut golden =
            package::Golden::read(bytes.into(), contract.input.num_values(), &contract.roles().collect::<Vec<_>>())
                .unwrap();
        change(&mut golden);
        package.put(&contract.golden.file, &golden.write().unwrap());
        package.embed(4)
    };
    contains(&write_golden("short", &|golden| golden.images[0].input.truncate(1)), "its column `input` has");
    contains(&write_golden("none", &|golden| golden.images.clear()), "it has no rows");
    let long = write_golden("long", &|golden| {
        for (role, values) in &mut golden.images[0].outputs {
            if *role == Role::Mu {
                values.push(0.0);
            }
        }
    });
    contains(&long, "mu differs by NaN");
    let package = Package::copy_of(folder.path(), "text");
    package.put(&package.contract().golden.file, b"this is not Parquet");
    contains(&package.embed(4), "it is not a readable Parquet file");
}

#[test]
fn a_file_of_weights_calls_nothing_that_it_names() {
    let folder = folder();
    python("hostile_weights.py", &[folder.path()]);
}
