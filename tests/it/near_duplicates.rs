use std::process::Command;

use crate::support::{Ran, cells, folder, needed};

/// Pictures of which copies are planted: seven of each.
const PICTURES: &str = "24";

#[test]
fn planted_copies_of_pictures_are_found_by_an_encoder_and_by_pca() {
    let folder = folder();
    let script = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/near_duplicates.py");
    let mut command = Command::new(needed("LOOKALIKE_TEST_PYTHON"));
    command.arg(script).arg(env!("CARGO_BIN_EXE_lookalike")).arg(cells()).arg(needed("LOOKALIKE_TEST_ENCODER"));
    let ran = Ran::from(command.arg(folder.path().join("work")).args(["--pictures", PICTURES]).output().unwrap());
    let ran = ran.expect(0);
    println!("{}", ran.stdout);
    let found = ran.summary();
    for model in ["encoder", "pca"] {
        let of = |figure: &str, name: &str| found[model][figure][name].as_f64().unwrap();
        // By chance, one pair in 27 would be right.
        assert!(of("best", "precision") > 0.6 && of("best", "recall") > 0.5, "{model}: {found:#}");
        // A group holds only what is near its representative, and so fewer of the pairs.
        assert!(of("groups", "precision") > 0.5 && of("groups", "recall") > 0.4, "{model}: {found:#}");
        assert!(of("by_change", "resize 75 %") > 0.7, "{model}: {found:#}");
    }
    for change in ["jpeg 80", "jpeg 50", "resize 75 %", "resize 50 %"] {
        assert!(found["pca"]["by_change"][change].as_f64().unwrap() > 0.9, "{change}: {found:#}");
    }
}
