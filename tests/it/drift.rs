use std::collections::BTreeMap;

use arrow::array::{Array as _, AsArray as _};
use lookalike::schema::TableName;

use crate::support::{batches, cells, folder, lookalike, python, write};

const PIPELINE: &str = "[pipeline]\nname = \"cells\"\n[source]\ntable = \"images\"\n\
     where = \"kind NOT IN ('fit', 'reference')\"\n[model]\npackage = \"model\"\n[neighbors]\nenabled = false\n\
     [anomaly]\nreference = \"reference.parquet\"\n[output]\ntable = \"tables\"\n";

/// The checks of each partition in `runs`, those that fired first: (input, metric); `None` where the partition was not compared.
type Checks = BTreeMap<String, Option<(Vec<(String, String)>, usize)>>;

fn checks(tables: &std::path::Path) -> Checks {
    let mut found = Checks::new();
    for (_, runs) in batches(tables, TableName::Runs) {
        let partitions = runs.column_by_name("partition").unwrap().as_string::<i32>();
        let drift = runs.column_by_name("drift").unwrap().as_list::<i32>();
        for row in 0..runs.num_rows() {
            let checks = drift.is_valid(row).then(|| {
                let checks = drift.value(row);
                let checks = checks.as_struct();
                let text = |name: &str, row: usize| {
                    checks.column_by_name(name).unwrap().as_string::<i32>().value(row).to_owned()
                };
                let fired = checks.column_by_name("is_anomaly").unwrap().as_boolean();
                let fired = (0..checks.len()).filter(|check| fired.value(*check));
                (fired.map(|check| (text("input", check), text("metric", check))).collect(), checks.len())
            });
            found.insert(partitions.value(row).to_owned(), checks);
        }
    }
    found
}

#[test]
fn a_brighter_lamp_a_blurred_lens_and_a_new_kind_of_cell_are_found_and_other_cells_are_not() {
    let folder = folder();
    let folder = folder.path();
    python("drifted_cells.py", &[&cells(), &folder.join("images")]);
    write(&folder.join("p.toml"), PIPELINE);
    lookalike(folder, &["fit", "p.toml", "--color", "gray", "--latent-dim", "32", "--where", "kind = 'fit'"]).expect(0);
    lookalike(folder, &["calibrate", "p.toml", "--where", "kind = 'reference'"]).expect(0);
    let ran = lookalike(folder, &["run", "p.toml"]).expect(0);
    assert_eq!(ran.summary()["drifted"], 3, "{}", ran.stderr);

    let found = checks(&folder.join("tables"));
    println!("{found:#?}");
    let has = |kind: &str, input: &str, metric: &str| {
        let (fired, _) = found[&format!("kind={kind}")].as_ref().unwrap();
        assert!(fired.contains(&(input.to_owned(), metric.to_owned())), "{kind}: {fired:?}");
        assert!(ran.stderr.contains(&format!("kind={kind} is not like the reference: ")), "{}", ran.stderr);
    };
    has("bright", "brightness", "cliffs_delta");
    has("blurred", "sharpness", "cliffs_delta");
    // The new kind is one image in twenty: most of the cells are where they were.
    has("mixed", "kl_divergence", "upper_tail_excess");
    let (fired, _) = found["kind=mixed"].as_ref().unwrap();
    assert!(fired.iter().all(|(_, metric)| metric != "cliffs_delta"), "{fired:?}");
    let (fired, num_checks) = found["kind=same"].as_ref().unwrap();
    assert!(fired.is_empty(), "{fired:?}");
    assert_eq!(*num_checks, 5 * 2 + 4 * 3 + 1, "location and tails of scores and pixel statistics, and the vectors");

    // The same partitions again, on their own and by other workers: the same checks, to the last bit.
    let again = |out: &str, args: &[&str]| {
        lookalike(folder, &[&["run", "p.toml", "--out", out][..], args].concat()).expect(0);
        checks(&folder.join(out))
    };
    assert_eq!(again("again", &["--workers", "1"]), found);
    // Switched off, or without a reference that was calibrated, nothing is compared.
    write(&folder.join("off.toml"), &format!("{PIPELINE}[drift]\nenabled = false\n"));
    lookalike(folder, &["run", "off.toml", "--out", "off"]).expect(0);
    assert!(checks(&folder.join("off")).values().all(Option::is_none));
    write(&folder.join("own.toml"), &PIPELINE.replace("[anomaly]\nreference = \"reference.parquet\"\n", ""));
    let own = lookalike(folder, &["run", "own.toml", "--out", "own"]).expect(0);
    assert!(checks(&folder.join("own")).values().all(Option::is_none));
    assert_eq!(own.summary()["drifted"], 0);
}
