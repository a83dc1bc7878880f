use std::collections::BTreeMap;
use std::path::Path;

use arrow::array::{Array as _, AsArray as _};
use arrow::datatypes::Float64Type;
use lookalike::schema::TableName;

use crate::support::{batches, folder, lookalike, python};

fn statuses(tables: &Path) -> BTreeMap<String, String> {
    let mut statuses = BTreeMap::new();
    for (_, batch) in batches(tables, TableName::Latents) {
        let text = |name: &str| batch.column_by_name(name).unwrap().as_string::<i32>().clone();
        let (ids, status, message) = (text("image_id"), text("status"), text("error_message"));
        let embeddings = batch.column_by_name("embedding").unwrap();
        for row in 0..batch.num_rows() {
            let is_ok = status.value(row) == "ok";
            assert_eq!(embeddings.is_valid(row), is_ok, "{}", ids.value(row));
            assert_eq!(message.is_null(row), is_ok, "{}", ids.value(row));
            statuses.insert(ids.value(row).to_owned(), status.value(row).to_owned());
        }
    }
    statuses
}

#[test]
fn every_hard_image_is_a_row_with_the_right_status() {
    let folder = folder();
    python("hostile_images.py", &[Path::new("hard"), &folder.path().join("hard")]);
    let expected = std::fs::read_to_string(folder.path().join("hard/expected.json")).unwrap();
    let expected: BTreeMap<String, String> = serde_json::from_str(&expected).unwrap();
    // More than a tenth of the images is broken: published, and said so by the exit code.
    let ran = lookalike(folder.path(), &["run", "--images", "hard", "--out", "out"]).expect(3);
    let summary = ran.summary();
    assert_eq!(summary["status"], "committed");
    assert_eq!(summary["rows_in"].as_u64().unwrap() as usize, expected.len());
    assert_eq!(statuses(&folder.path().join("out")), expected);

    // The numbers of the good ones are Pillow's and NumPy's, JPEG and all.
    let (out, hard) = (folder.path().join("out"), folder.path().join("hard"));
    python("reference_scores.py", &[&hard, &out.join("model"), &out.join("latents")]);

    // Unknown is not the same as normal.
    for (_, batch) in batches(&folder.path().join("out"), TableName::Anomalies) {
        let ids = batch.column_by_name("image_id").unwrap().as_string::<i32>();
        let score = batch.column_by_name("anomaly_score").unwrap().as_primitive::<Float64Type>();
        let flag = batch.column_by_name("is_anomaly").unwrap();
        for row in 0..batch.num_rows() {
            let is_ok = expected[ids.value(row)] == "ok";
            assert_eq!((score.is_valid(row), flag.is_valid(row)), (is_ok, is_ok), "{}", ids.value(row));
        }
    }
}
