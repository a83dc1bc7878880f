use lookalike::schema::TableName;
use lookalike::score::Rule;

use crate::support::{folder, image_table, lookalike, python, rows, write};

const PIPELINE: &str = r#"
[pipeline]
name = "exported"
[source]
table = "images"
[model]
package = "package"
elbo_samples = 4
[output]
table = "out"
"#;

#[test]
fn a_network_that_users_export_replays_is_scored_and_makes_pictures() {
    let folder = folder();
    let folder = folder.path();
    let told = python("exported.py", &[&folder.join("package")]);
    image_table(&folder.join("images/ds=1/x.parquet"), &[("a", 1), ("b", 2), ("c", 3), ("d", 4)]);
    write(&folder.join("p.toml"), PIPELINE);

    let checked = lookalike(folder, &["check", "p.toml"]).expect(0);
    assert!(checked.stdout.contains("golden images give on cpu what the exporter saw"), "{}", checked.stdout);
    let summary = lookalike(folder, &["run", "p.toml"]).expect(0).summary();
    let sha256 = summary["model_sha256"].as_str().unwrap();
    assert!(told.trim_end().ends_with(sha256), "the exporter says {told}, the program {sha256}");
    assert_eq!(summary["rows_ok"].as_u64(), Some(4), "{summary}");
    let latents = rows(&folder.join("out"), TableName::Latents, &[]);
    // The model has no score of its own.
    for score in Rule::OF_IMAGE.into_iter().filter(|rule| *rule != Rule::PredScore) {
        let null = format!(" {}=NULL", score.name());
        assert!(!latents.iter().any(|row| row.contains(&null)), "{null} in {latents:?}");
    }
    lookalike(folder, &["generate", "p.toml", "--count", "4", "--to", "samples"]).expect(0);
}
